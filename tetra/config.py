"""Configuration of a model: plain frozen dataclasses that travel as JSON inside every model file."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tetra.errors import ConfigError

T = TypeVar("T")


def _type_matches(value: object, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_type_matches(value, a) for a in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if origin is tuple:
        args = typing.get_args(annotation)
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_type_matches(v, args[0]) for v in value)
        return len(value) == len(args) and all(_type_matches(v, a) for v, a in zip(value, args, strict=True))
    if origin in (list, dict):
        return isinstance(value, origin)
    if annotation is Any:
        return True
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is type(None):
        return value is None
    return isinstance(value, annotation)


def _freeze(value: object) -> object:
    return tuple(_freeze(v) for v in value) if isinstance(value, list) else value


def from_dict(cls: type[T], data: object, where: str) -> T:
    """Build the dataclass ``cls`` from a mapping; ``where`` names the file or section in errors.

    Lists become tuples where the field is a tuple, nested dataclasses are built in turn.

    Raises:
        ConfigError: ``data`` is not a mapping, has an unknown key (the nearest known one is named), lacks a
            required key or holds a value of the wrong type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of settings, found {type(data).__name__} {data!r:.80}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kwargs: dict[str, Any] = {}
    for key, value in data.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"{where}: unknown key '{key}'{hint}")
        annotation = hints[key]
        members = [a for a in (annotation, *typing.get_args(annotation)) if dataclasses.is_dataclass(a)]
        if members and typing.get_origin(annotation) is tuple:
            if not isinstance(value, (list, tuple)):
                raise ConfigError(f"{where}: '{key}' is {value!r:.80}, expected a list")
            item = typing.cast(type, members[0])
            kwargs[key] = tuple(from_dict(item, v, f"{where}: {key}[{i}]") for i, v in enumerate(value))
            continue
        if members and value is not None:
            kwargs[key] = from_dict(typing.cast(type, members[0]), value, f"{where}: {key}")
            continue
        is_tuple = any(typing.get_origin(a) is tuple for a in (annotation, *typing.get_args(annotation)))
        value = _freeze(value) if is_tuple else value
        if not _type_matches(value, annotation):
            wanted = getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")
            if typing.get_args(annotation):
                wanted = str(annotation).replace("typing.", "")
            raise ConfigError(f"{where}: '{key}' is {value!r}, expected {wanted}{_number_hint(value)}")
        kwargs[key] = value
    missing = [
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and n not in kwargs
    ]
    if missing:
        raise ConfigError(f"{where}: missing key '{missing[0]}'; add it")
    try:
        return cls(**kwargs)
    except ConfigError as error:  # the class knows its section, only we know the file
        section = where.rpartition(": ")[2]
        raise ConfigError(f"{where}: {str(error).removeprefix(f'{section}: ')}") from None


def _number_hint(value: object) -> str:
    """YAML 1.1 takes 1e-3 for text: only a mantissa with a point makes it a number."""
    try:
        return f"; write {float(value):.1e}, with a point, for YAML to see a number" if isinstance(value, str) else ""
    except ValueError:
        return ""


def check_range(where: str, config: object, names: str, low: float, high: float = math.inf) -> None:
    """Refuse a field of ``config`` outside [low, high]; ``names`` lists the fields, separated by spaces.

    Raises:
        ConfigError: names the field, its value and the range.
    """
    for name in names.split():
        value = getattr(config, name)
        if not low <= value <= high:
            wanted = f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
            raise ConfigError(f"{where}: '{name}' is {value!r}, expected {wanted}")


def _positive(where: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{where}: '{name}' is {value}, expected a positive integer")


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of the ternary vision transformer.

    ``stem`` is "patch" (flattened patches, LayerNorm, linear, LayerNorm, as in TeTRA-VPR) or "conv" (a small
    strided convolution pyramid, which learns from far fewer images). The last ``full_precision_blocks`` blocks
    are not quantised.
    """

    width: int
    depth: int
    n_heads: int
    head_dim: int
    mlp_dim: int
    image_size: tuple[int, int] = (322, 322)
    patch_size: int = 14
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    full_precision_blocks: int = 1
    stem: typing.Literal["patch", "conv"] = "patch"
    stem_channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = "backbone"
        _positive(
            where,
            width=self.width,
            depth=self.depth,
            n_heads=self.n_heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            patch_size=self.patch_size,
        )
        if not 0 <= self.full_precision_blocks <= self.depth:
            raise ConfigError(
                f"{where}: 'full_precision_blocks' is {self.full_precision_blocks}, expected 0 to depth {self.depth}"
            )
        for name in ("dropout", "embedding_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{where}: '{name}' is {getattr(self, name)}, expected 0 <= value < 1")
        if any(s < self.patch_size or s % self.patch_size for s in self.image_size):
            raise ConfigError(
                f"{where}: 'image_size' is {self.image_size}, expected multiples of patch_size {self.patch_size}"
            )
        if self.stem == "conv" and 2 ** (len(self.stem_channels) + 1) != self.patch_size:
            raise ConfigError(
                f"{where}: 'stem_channels' has {len(self.stem_channels)} entries, a conv stem of patch_size "
                f"{self.patch_size} needs log2(patch_size) - 1 of them"
            )

    @property
    def inner_dim(self) -> int:
        """Width of the attention's heads together."""
        return self.n_heads * self.head_dim

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns at ``image_size``."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


HeadKind = typing.Literal["boq", "salad", "mixvpr", "gem"]


@dataclass(frozen=True)
class HeadConfig:
    """Aggregation head. ``options`` are the keyword arguments of the head's class in :mod:`tetra.heads`."""

    kind: HeadKind
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: architecture name (for people), backbone and, unless only tokens are wanted, a head."""

    arch: str
    backbone: BackboneConfig
    head: HeadConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: object, where: str = "model config") -> ModelConfig:
        """Inverse of :meth:`to_dict`, also after a trip through JSON or YAML; see :func:`from_dict`."""
        return from_dict(cls, data, where)


BACKBONES: dict[str, BackboneConfig] = {
    "vit-s": BackboneConfig(
        width=384, depth=12, n_heads=6, head_dim=96, mlp_dim=1536, dropout=0.05, embedding_dropout=0.1
    ),
    "vit-b": BackboneConfig(
        width=768, depth=12, n_heads=12, head_dim=64, mlp_dim=3072, dropout=0.1, embedding_dropout=0.05
    ),
    # For CPUs and for training on a laptop. Every block is ternary, since one full-precision block alone would
    # weigh more than the other five together; a conv stem makes up for it at a tenth of the arithmetic.
    "nano": BackboneConfig(
        width=256,
        depth=6,
        n_heads=4,
        head_dim=64,
        mlp_dim=1024,
        image_size=(224, 224),
        patch_size=16,
        full_precision_blocks=0,
        stem="conv",
        stem_channels=(32, 64, 128),
    ),
}

_NANO_HEADS: dict[str, dict[str, Any]] = {
    # A coarse grid and two mixer layers keep the whole nano file below 2 MB; as many rows as the grid has cells let
    # every bit belong to one part of the image.
    "mixvpr": {"grid": (5, 5), "out_channels": 256, "mix_depth": 2, "out_rows": 25},
}


def model_config(arch: str, head: str | None = "boq") -> ModelConfig:
    """The stock configuration of ``arch`` ("vit-s", "vit-b", "nano") with ``head`` or None.

    Raises:
        ConfigError: the architecture or the head is unknown.
    """
    if arch not in BACKBONES:
        raise ConfigError(f"unknown architecture '{arch}'; known: {', '.join(BACKBONES)}")
    if head is None:
        return ModelConfig(arch, BACKBONES[arch])
    known = typing.get_args(HeadKind)
    if head not in known:
        raise ConfigError(f"unknown head '{head}'; known: {', '.join(known)}")
    options = dict(_NANO_HEADS.get(head, {})) if arch == "nano" else {}
    return ModelConfig(arch, BACKBONES[arch], HeadConfig(typing.cast(HeadKind, head), options))
