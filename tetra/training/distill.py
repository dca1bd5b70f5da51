"""Stage 1: progressive distillation from a full-precision teacher; no labels.

Loss = cls_weight L_cls + patch_weight L_patch + attention_weight L_attn (:mod:`tetra.training.losses`), with
lambda rising by schedule (:func:`tetra.quantization.lambda_at`). Source: TeTRA-VPR (arXiv 2503.02511).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tetra.config import check_range
from tetra.errors import ConfigError
from tetra.kernels.attention_distillation import REDUCTIONS, Reduction
from tetra.layers import set_lambda
from tetra.model import TetraModel
from tetra.quantization import LambdaSchedule, lambda_at
from tetra.training import distributed
from tetra.training.augment import AugmentConfig, photometric, random_homography, warp
from tetra.training.data import CachedViews, ViewDataset, find_images
from tetra.training.loop import LoopConfig, StageModule, run_stage
from tetra.training.losses import attention_loss, token_loss
from tetra.training.schedules import warmup_cosine
from tetra.training.teachers import Teacher, TeacherOutput, resample_tokens


@dataclass(frozen=True)
class DistillConfig:
    """Settings of stage 1; the defaults are TeTRA-VPR's.

    Attributes:
        folders: images, searched with their subfolders.
        exclude: folders below these to leave out.
        views: views of every image: the whole, then random crops.
        min_scale: smallest share of an image's area that such a crop keeps.
        crop: side in pixels of a square that every view is then cut out as, at random and anew in each epoch; for
            panoramas. 0 takes views as above.
        cache_teacher: compute the teacher's tokens once per view and keep them on disk; otherwise every
            step runs the teacher, and every epoch sees the same views. Not with an attention loss.
        sizes: (progress, side) pairs: from this share of the stage on, the student sees square images
            of this side. Empty: its own image size throughout.
        attention_reduction: "elements", or "rows" for an attention loss that does not fall with the number of tokens
            (:func:`tetra.training.losses.attention_loss`); ``attention_weight`` wants to be chosen anew then.
        epochs: passes over all views.
        max_steps: if positive, so many optimiser steps count instead.
        batch_size: images of a batch, in all processes together.
        lr, weight_decay: AdamW's; the learning rate rises, then falls by a cosine.
        warmup_fraction: share of the stage in which the learning rate rises.
        lambda_schedule: how quantisation comes in, see :func:`tetra.quantization.lambda_at`.
        cls_weight, patch_weight, attention_weight: of the parts of the loss.
        attention_layers: last blocks whose attention is imitated.
        augment: what the student sees; its motion is the teacher's too.
    """

    folders: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    views: int = 1
    min_scale: float = 0.3
    crop: int = 0
    cache_teacher: bool = False
    sizes: tuple[tuple[float, int], ...] = ()
    epochs: float = 30.0
    max_steps: int = 0
    batch_size: int = 128
    lr: float = 4e-4
    weight_decay: float = 0.01
    warmup_fraction: float = 0.05
    lambda_schedule: LambdaSchedule = "sigmoid"
    cls_weight: float = 1.0
    patch_weight: float = 0.3
    attention_weight: float = 0.05
    attention_layers: int = 4
    attention_reduction: Reduction = "elements"
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(accumulate=2))

    def __post_init__(self) -> None:
        if not self.folders:
            raise ConfigError("distill: 'folders' is empty; name at least one folder of images")
        for progress, side in self.sizes:
            if not 0.0 <= progress < 1.0 or side < 1:
                raise ConfigError(f"distill: 'sizes' has ({progress}, {side}), expected 0 <= progress < 1, side > 0")
        if self.sizes and min(p for p, _ in self.sizes) > 0.0:
            raise ConfigError("distill: 'sizes' must say which size to begin with, at progress 0")
        check_range("distill", self, "views batch_size", 1)
        check_range("distill", self, "min_scale warmup_fraction", 0, 1)
        check_range("distill", self, "crop epochs max_steps lr weight_decay attention_layers", 0)
        check_range("distill", self, "cls_weight patch_weight attention_weight", 0)
        if self.attention_reduction not in REDUCTIONS:
            found, known = self.attention_reduction, ", ".join(REDUCTIONS)
            raise ConfigError(f"distill: 'attention_reduction' is {found!r}, expected one of {known}")
        if not (self.epochs or self.max_steps):
            raise ConfigError("distill: 'epochs' is 0, expected a positive number unless 'max_steps' is given")


def _projection(student_dim: int, teacher_dim: int) -> nn.Module:
    return nn.Identity() if student_dim == teacher_dim else nn.Linear(student_dim, teacher_dim)


class DistillModule(StageModule):
    """The student, its projections to the teacher's widths, and the loss.

    Args:
        model: the student; only its backbone trains.
        teacher: see :class:`tetra.training.teachers.Teacher`; run here unless batches hold its outputs.
        config: settings.
        n_steps: optimiser steps.
        validate: see :class:`StageModule`.
    """

    def __init__(
        self,
        model: TetraModel,
        teacher: Teacher,
        config: DistillConfig,
        n_steps: int,
        validate: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        super().__init__(config.loop, n_steps, validate)
        width = model.config.backbone.width
        self.model, self.config = model, config
        if model.head is not None:
            model.head.requires_grad_(False)
        self.project_cls = _projection(width, teacher.cls_dim)
        self.project_patches = _projection(width, teacher.patch_dim)
        self._teacher = (teacher,)  # in a tuple: neither trained nor saved
        self.lr, self.weight_decay = config.lr, config.weight_decay
        self.n_attention = config.attention_layers if config.attention_weight and teacher.gives_attention else 0
        if self.n_attention > len(model.backbone.blocks):
            raise ConfigError(
                f"distill: 'attention_layers' is {self.n_attention}, but the student has only "
                f"{len(model.backbone.blocks)} blocks; lower it"
            )

    def lr_factor(self, step: int) -> float:
        return warmup_cosine(step, self.n_steps, self.config.warmup_fraction)

    def size_at(self, progress: float) -> tuple[int, int]:
        """Height and width that the student sees at ``progress`` in [0, 1]."""
        sides = [side for start, side in sorted(self.config.sizes) if start <= progress]
        return (sides[-1], sides[-1]) if sides else self.model.image_size

    def _targets(self, batch: dict[str, Tensor], motion: Tensor) -> TeacherOutput:
        """The teacher's view of the batch: moved as the student's, but in undisturbed light."""
        if "cls" in batch:  # cached for the view at rest, so that the map moves instead of the image
            patches = batch["patches"].float().permute(0, 3, 1, 2)
            moved = warp(patches, motion, (patches.shape[2], patches.shape[3])).permute(0, 2, 3, 1)
            return TeacherOutput(batch["cls"].float(), moved)
        teacher = self._teacher[0].to(self.device)
        images = batch["images"]
        with torch.no_grad():
            return teacher(warp(images.float() / 255.0, motion, (images.shape[2], images.shape[3])), self.n_attention)

    def loss(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """{"loss", "cls", "patch", "attention", "lambda"} of uint8 images [B, 3, H, W]."""
        lam = lambda_at(progress, self.config.lambda_schedule)
        set_lambda(self.model, lam)
        motion = random_homography(len(batch["images"]), self.config.augment, batch["images"].device)
        targets = self._targets(batch, motion)
        moved = warp(batch["images"].float() / 255.0, motion, self.size_at(progress))
        features = self.model.features(photometric(moved, self.config.augment), self.n_attention)
        losses = {
            "cls": token_loss(self.project_cls(features.cls), targets.cls),
            "patch": token_loss(
                self.project_patches(features.patches), resample_tokens(targets.patches, features.grid)
            ),
        }
        total = self.config.cls_weight * losses["cls"] + self.config.patch_weight * losses["patch"]
        if self.n_attention:
            reduction = self.config.attention_reduction
            losses["attention"] = attention_loss(features.queries_keys, targets.queries_keys, reduction)
            total = total + self.config.attention_weight * losses["attention"]
        return {"loss": total, **losses, "lambda": torch.tensor(lam)}


def distill(
    model: TetraModel,
    teacher: Teacher,
    config: DistillConfig,
    folder: Path,
    *,
    teacher_size: int | None = None,
    base_dir: Path = Path(),
    resume: bool = False,
    validate: Callable[[], dict[str, float]] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Run stage 1 on ``model`` in place; afterwards lambda is 1.

    Args:
        folder: for checkpoints, logs and the teacher's cache.
        teacher_size: square size that the teacher sees; default: the student's image size.
        base_dir: relative image folders start here.

    Returns:
        The last validation's figures.

    Raises:
        ConfigError: an attention loss is asked for with a cached teacher.
        DatasetError, TrainingError: see the parts.
    """
    if config.cache_teacher and config.attention_weight and teacher.gives_attention:
        raise ConfigError(
            "distill: 'cache_teacher' can't hold attention; set attention_weight to 0 or cache_teacher to false"
        )
    paths = find_images([base_dir / f for f in config.folders], [base_dir / f for f in config.exclude])
    height, width = model.image_size
    if teacher_size is not None and not config.cache_teacher:
        height = width = teacher_size
    views = ViewDataset(paths, (height, width), config.views, config.loop.seed, config.min_scale, config.crop)
    dataset: ViewDataset | CachedViews = views
    if config.cache_teacher:
        cache = CachedViews(views, folder / "teacher-cache", model.config.backbone.grid)
        with distributed.together():
            if distributed.rank() == 0:
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                cache.fill(teacher.to(device), max(1, config.loop.workers), teacher_size)
        dataset = cache
    distributed.share("distill", "batch_size", config.batch_size)
    per_step = config.batch_size * config.loop.accumulate
    n_steps = config.max_steps or max(1, round(config.epochs * len(views) / per_step))
    torch.manual_seed(config.loop.seed)
    module = DistillModule(model, teacher, config, n_steps, validate)
    figures = run_stage(
        module,
        dataset,
        config.batch_size,
        folder,
        resume=resume,
        with_epoch=config.crop > 0 and not config.cache_teacher,  # a cache holds one crop of each image
        progress=progress,
    )
    set_lambda(model, 1.0)
    return figures
