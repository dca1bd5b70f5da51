"""Recipes: one YAML file that says how a model is made, and the function that makes it."""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import logging
import os
import time
from collections.abc import Hashable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

import tetra
from tetra.config import HeadConfig, ModelConfig, from_dict, model_config
from tetra.errors import ConfigError, TrainingError
from tetra.files import load, save, write_json, writing_into
from tetra.model import TetraModel
from tetra.training import distributed
from tetra.training.distill import DistillConfig, distill
from tetra.training.finetune import FinetuneConfig, check_model, finetune, place_dataset
from tetra.training.loop import CHECKPOINT, read_log
from tetra.training.losses import BinaryMultiSimilarityLoss
from tetra.training.probe import Probe, ProbeConfig, backbone_probe, head_probe
from tetra.training.teachers import TeacherConfig, create_teacher, describe_teacher

logger = logging.getLogger("tetra.training")

_SHIPPED = importlib.resources.files(tetra) / "training" / "recipes"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExportConfig:
    """The packed file.

    Attributes:
        rest_dtype: how everything but the ternary weights is stored. The trained weights are rounded to it before
            packing, so that model and file agree in every bit.
    """

    rest_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Recipe:
    """How to make a model.

    Attributes:
        name: of the model.
        arch: stock architecture to start from.
        backbone: settings of it to change, see :class:`tetra.config.BackboneConfig`.
        head: aggregation head.
        head_options: options of its class in :mod:`tetra.heads`.
        description: for people; it travels with the model.
        data_dir: where relative folders start; relative itself to the current directory.
    """

    name: str
    arch: str
    head: str
    teacher: TeacherConfig | None = None
    distill: DistillConfig | None = None
    finetune: FinetuneConfig | None = None
    probe: ProbeConfig | None = None
    export: ExportConfig = ExportConfig()
    head_options: dict[str, Any] | None = None
    backbone: dict[str, Any] | None = None
    data_dir: str = "."
    description: str = ""

    def __post_init__(self) -> None:
        if self.distill is not None and self.teacher is None:
            raise ConfigError(f"recipe '{self.name}': 'distill' needs a 'teacher'; add one")
        if self.distill is None and self.finetune is None:
            raise ConfigError(f"recipe '{self.name}': neither 'distill' nor 'finetune'; nothing to train")

    def model(self) -> ModelConfig:
        """The configuration of the model that the recipe makes."""
        stock = model_config(self.arch, self.head)
        backbone = asdict(stock.backbone) | (self.backbone or {})
        assert stock.head is not None
        head = HeadConfig(stock.head.kind, stock.head.options | (self.head_options or {}))
        return ModelConfig.from_dict(
            {"arch": self.name if self.backbone else self.arch, "backbone": backbone, "head": asdict(head)},
            f"recipe '{self.name}'",
        )


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(
                    f"key '{key.value}' of line {lines[key.value]} stands again in line {line}; remove one of them"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(file.name[:-5] for file in _SHIPPED.iterdir() if file.name.endswith(".yaml"))


def load_recipe(source: str | Path | dict[str, Any]) -> Recipe:
    """Read and check a recipe: a mapping, a YAML file, or the name of a shipped one.

    Raises:
        ConfigError: no such recipe, not YAML, unknown, misspelt or repeated key, or a value that can't be.
    """
    if isinstance(source, dict):
        return from_dict(Recipe, source, _name_of(source))
    path = Path(source)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        names = shipped_recipes()
        if str(source) not in names:
            raise ConfigError(f"recipe '{source}': no such file and not a shipped recipe; shipped: {', '.join(names)}")
        text = (_SHIPPED / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: recipe can't be read ({error.strerror}); check the path") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not a text file in UTF-8; expected a recipe in YAML") from None
    try:
        data = yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from None
    return from_dict(Recipe, data, str(source))


def _name_of(source: str | Path | dict[str, Any]) -> str:
    """What errors call a recipe: its file, or "recipe"."""
    return "recipe" if isinstance(source, dict) else str(source)


def run_recipe(
    source: str | Path | dict[str, Any],
    out_dir: str | Path,
    *,
    resume: bool = False,
    data_dir: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Make the model of a recipe: distil, fine-tune, pack, save.

    Writes into ``out_dir``: ``distill/`` and ``finetune/`` (checkpoints and logs), ``model.safetensors`` (packed), the
    recipe as read, ``log.json`` (figures of both stages) and ``curves.png``.

    Args:
        resume: continue an interrupted run; stages that are complete are not run again.
        data_dir: overrides the recipe's.

    Returns:
        The path of the packed model.

    Raises:
        ConfigError: the recipe can't be read or asks for what can't be; the message names it.
        TetraError: images, teacher or checkpoint are not as they should be, or another run works in the folder.
        SystemExit: with status 143 after SIGTERM.
    """
    with distributed.processes(), distributed.lost_process(), writing_into(out_dir), contextlib.ExitStack() as held:
        try:
            return _run(source, Path(out_dir), resume, data_dir, progress, held)
        except ConfigError as error:
            where = _name_of(source)
            if where in str(error):
                raise
            raise ConfigError(f"{where}: {error}") from None


@contextlib.contextmanager
def _sole_use(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder, by a lock that falls with this process however it ends.

    Raises:
        TrainingError: another run works there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _locked.add(descriptor)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainingError(
                    f"{folder}: another run is at work in this folder; wait for its end or choose another folder"
                ) from None
        yield
    finally:
        if descriptor in _locked:
            _locked.remove(descriptor)
            os.close(descriptor)


_locked: set[int] = set()


def _let_go() -> None:
    """Processes that load data would hold on to the lock of a run that was killed."""
    for descriptor in _locked:
        os.close(descriptor)
    _locked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


# What may change between the parts of a run without changing its result.
_FREE_SETTINGS = ("workers", "threads", "checkpoint_every", "validate_every", "log_every", "recompute")


def _check_same_recipe(recipe: Recipe, out: Path) -> None:
    """Refuse to go on with a stage under other settings than those that it began with."""
    file = out / "recipe.json"
    if not file.is_file():
        return
    try:
        before = json.loads(file.read_text())
        if not isinstance(before, dict):
            raise ValueError(f"holds a {type(before).__name__}, not a recipe")
        with contextlib.suppress(ConfigError):  # an older release knew fewer settings; they had their defaults
            before = json.loads(json.dumps(asdict(from_dict(Recipe, before, str(file)))))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{file}: can't be read ({error}); choose another folder") from None
    now = json.loads(json.dumps(asdict(recipe)))
    shared = ("arch", "head", "head_options", "backbone")
    parts = {"distill": (*shared, "teacher", "distill"), "finetune": (*shared, "finetune")}
    keys = {key for stage, keys in parts.items() if (out / stage / CHECKPOINT).exists() for key in keys}
    for key in sorted(keys):
        for name, old, new in _differences(key, before.get(key), now[key]):
            raise TrainingError(
                f"{file}: '{name}' was {old!r} when the run began and is {new!r} now; "
                "resume with the recipe that the run began with, or choose another folder"
            )


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every setting that differs and matters."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new} - set(_FREE_SETTINGS)):
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield name, old, new


def _run(
    source: str | Path | dict[str, Any],
    out: Path,
    resume: bool,
    data_dir: str | Path | None,
    progress: bool,
    held: contextlib.ExitStack,
) -> Path:
    started = time.monotonic()
    is_main = distributed.rank() == 0
    with distributed.together():  # what is wrong is said before any process has begun
        recipe = load_recipe(source)
        for stage in ("distill", "finetune"):
            if not resume and (out / stage / CHECKPOINT).exists():
                raise TrainingError(
                    f"{out / stage / CHECKPOINT}: a training lies here already; resume it or choose another folder"
                )
        seed = (recipe.distill or recipe.finetune).loop.seed  # type: ignore[union-attr]
        torch.manual_seed(seed)
        model = TetraModel(recipe.model())
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{out}: can't be made a folder ({error.strerror}); choose another one") from None
        if is_main:
            held.enter_context(_sole_use(out))
        base = Path(data_dir) if data_dir is not None else Path(recipe.data_dir)
        if resume:
            _check_same_recipe(recipe, out)
        if recipe.distill is not None:
            distributed.share("distill", "batch_size", recipe.distill.batch_size)
        if recipe.finetune is not None:
            distributed.share("finetune", "places_per_batch", recipe.finetune.places_per_batch)
        probe = Probe(recipe.probe, model.image_size, base) if recipe.probe else None
        if recipe.finetune is not None:  # what is wrong with stage 2 is better known before stage 1 has run for days
            check_model(model, recipe.finetune)
            place_dataset(model, recipe.finetune, base)
            BinaryMultiSimilarityLoss()
        teacher = create_teacher(recipe.teacher, base) if recipe.distill is not None and recipe.teacher else None
    with distributed.together():  # after everyone has compared
        if is_main:
            write_json(out / "recipe.json", asdict(recipe))
    facts: dict[str, Any] = {"recipe": recipe.name, "processes": distributed.world_size()}
    if recipe.distill is not None and recipe.teacher is not None and teacher is not None:
        facts["teacher"] = describe_teacher(teacher)
        logger.info("stage 1: distilling %s", recipe.name)
        facts["distill"] = distill(
            model,
            teacher,
            recipe.distill,
            out / "distill",
            teacher_size=recipe.teacher.image_size,
            base_dir=base,
            resume=resume,
            progress=progress,
            validate=(lambda: backbone_probe(probe, model)) if probe else None,
        )
    if recipe.finetune is not None:
        logger.info("stage 2: fine-tuning %s", recipe.name)
        facts["finetune"] = finetune(
            model,
            recipe.finetune,
            out / "finetune",
            base_dir=base,
            resume=resume,
            progress=progress,
            validate=(lambda: head_probe(probe, model)) if probe else None,
        )
    path = out / "model.safetensors"
    with distributed.together():
        if is_main:
            facts["seconds"] = round(time.monotonic() - started, 1)
            _save(recipe, model, path, facts)
    return path


def _save(recipe: Recipe, model: TetraModel, path: Path, facts: dict[str, Any]) -> None:
    """Write the packed model, the trainable one, the figures and the curves."""
    out = path.parent
    model.cpu().eval()
    dtype = _DTYPES[recipe.export.rest_dtype]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))
    packed = model.pack(dtype)
    packed.info = {"recipe": recipe.name, "description": recipe.description}
    save(packed, path)
    save(model, out / "trained.safetensors")
    facts["content_hash"] = load(path).content_hash
    facts["curves"] = {s: read_log(out / s) for s in ("distill", "finetune") if (out / s).is_dir()}
    write_json(out / "log.json", facts)
    from tetra.training.curves import plot_curves

    plot_curves(facts["curves"], out / "curves.png")
    logger.info("packed model: %s (%d bytes); %s", path, path.stat().st_size, json.dumps(facts.get("finetune", {})))
