"""Stage 2: supervised fine-tuning of the head and the last block with place labels.

Source: TeTRA-VPR (arXiv 2503.02511). The backbone is frozen at lambda = 1 but for its last block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tetra.config import check_range
from tetra.errors import ConfigError, DatasetError
from tetra.heads import Head, MixVPR
from tetra.layers import set_lambda
from tetra.model import TetraModel
from tetra.quantization import LambdaSchedule, lambda_at
from tetra.training import distributed, guard
from tetra.training.augment import AugmentConfig, augment, resize
from tetra.training.data import Place, PlaceBatches, StepSampler, gsv_cities_places, photo_places, video_places
from tetra.training.loop import CHECKPOINT, LoopConfig, StageModule, run_stage
from tetra.training.losses import BinaryMultiSimilarityLoss
from tetra.training.schedules import warmup_steps_down
from tetra.vit import Features


@dataclass(frozen=True)
class PlaceSource:
    """Where places come from.

    Attributes:
        kind: "gsv-cities", "video" (consecutive frames are a place) or "photos" (each photo is one, told apart by
            augmentation).
        folder: where the images lie.
        exclude: subfolders to leave out, of videos and photos.
        cities: of GSV-Cities; empty takes all.
        window: consecutive frames of a video that are a place.
        stride: frames from the start of one place of a video to that of the next.
    """

    kind: Literal["gsv-cities", "video", "photos"]
    folder: str
    exclude: tuple[str, ...] = ()
    cities: tuple[str, ...] = ()
    window: int = 4
    stride: int = 16

    def __post_init__(self) -> None:
        check_range("source", self, "window stride", 1)
        needless = (
            ("exclude", "name the wanted ones in 'cities'") if self.kind == "gsv-cities" else ("cities", "remove it")
        )
        if getattr(self, needless[0]):
            raise ConfigError(f"source: '{needless[0]}' means nothing for kind '{self.kind}'; {needless[1]}")

    def places(self, base_dir: Path) -> list[Place]:
        """The places; see the functions of :mod:`tetra.training.data` for errors.

        Raises:
            DatasetError: an excluded folder does not exist.
        """
        folder = base_dir / self.folder
        if self.kind == "gsv-cities":
            return gsv_cities_places(folder, self.cities)
        found = video_places(folder, self.window, self.stride) if self.kind == "video" else photo_places(folder)
        left_out = [folder / name for name in self.exclude]
        missing = next((f for f in left_out if not f.is_dir()), None)
        if missing is not None:
            raise DatasetError(f"{missing}: excluded from training but not there; check the path")
        return [p for p in found if not any(p.paths[0].is_relative_to(f) for f in left_out)]


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of stage 2; the defaults are TeTRA-VPR's.

    Attributes:
        sources: where places come from.
        places_per_batch, images_per_place: make a batch, in all processes together.
        min_scale: smallest share of an image's area that a random crop keeps.
        augment: null trains on the images as they are.
        trainable_blocks: last blocks of the backbone that train along with the head.
        epochs: passes over all places.
        max_steps: if positive, so many optimiser steps count instead; milestones keep their shares of the stage.
        lr, weight_decay: AdamW's.
        warmup_epochs: in which the learning rate rises.
        milestones: epochs at which the learning rate falls to ``gamma`` of itself.
        gamma: see ``milestones``.
        lambda_schedule: how the loss goes from float to binary descriptors.
        keep_decoded: hold all decoded images in memory.
        initialize_head: start the head from so many training images (see :meth:`tetra.heads.MixVPR.initialize`);
            0 starts it at random.
    """

    sources: tuple[PlaceSource, ...]
    places_per_batch: int = 100
    images_per_place: int = 4
    min_scale: float = 0.6
    epochs: float = 40.0
    max_steps: int = 0
    lr: float = 1e-4
    weight_decay: float = 1e-3
    warmup_epochs: float = 3.0
    milestones: tuple[float, ...] = (10, 20, 30)
    gamma: float = 0.3
    lambda_schedule: LambdaSchedule = "sigmoid"
    trainable_blocks: int = 1
    keep_decoded: bool = False
    initialize_head: int = 0
    augment: AugmentConfig | None = None
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("finetune: 'sources' is empty; name at least one folder with places")
        if self.places_per_batch < 2 or self.images_per_place < 2:
            raise ConfigError("finetune: a batch needs at least 2 places with 2 images each")
        check_range("finetune", self, "min_scale", 0, 1)
        check_range("finetune", self, "epochs max_steps lr weight_decay warmup_epochs gamma", 0)
        check_range("finetune", self, "trainable_blocks initialize_head", 0)
        if not (self.epochs or self.max_steps):
            raise ConfigError("finetune: 'epochs' is 0, expected a positive number unless 'max_steps' is given")


def check_model(model: TetraModel, config: FinetuneConfig) -> Head:
    """The model's head, if ``config`` fits the model.

    Raises:
        ConfigError: no head, one that ``initialize_head`` is not for, or more ``trainable_blocks`` than there are.
    """
    if model.head is None:
        raise ConfigError(f"model '{model.config.arch}' has no head to fine-tune; choose one")
    n_blocks = len(model.backbone.blocks)
    if not 0 <= config.trainable_blocks <= n_blocks:
        raise ConfigError(f"finetune: 'trainable_blocks' is {config.trainable_blocks}, expected 0 to {n_blocks}")
    if config.initialize_head and not isinstance(model.head, MixVPR):
        raise ConfigError(f"finetune: 'initialize_head' is for the MixVPR head, not {type(model.head).__name__}; set 0")
    return model.head


def place_dataset(model: TetraModel, config: FinetuneConfig, base_dir: Path) -> PlaceBatches:
    """The training places of ``config``, for images of the model's size; raises as their readers do."""
    places = [place for source in config.sources for place in source.places(base_dir)]
    return PlaceBatches(
        places, model.image_size, config.images_per_place, config.loop.seed, config.min_scale, config.keep_decoded
    )


class FinetuneModule(StageModule):
    """Head and last block in training, the rest frozen; see :class:`FinetuneConfig`."""

    def __init__(
        self,
        model: TetraModel,
        config: FinetuneConfig,
        n_steps: int,
        validate: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        super().__init__(config.loop, n_steps, validate)
        head, blocks = check_model(model, config), model.backbone.blocks
        self.model, self.config = model, config
        set_lambda(model, 1.0)
        model.backbone.requires_grad_(False)
        head.requires_grad_(True)
        self._trained_blocks = list(blocks[len(blocks) - config.trainable_blocks :])
        for block in self._trained_blocks:
            block.requires_grad_(True)
        self.criterion = BinaryMultiSimilarityLoss()
        self.lr, self.weight_decay = config.lr, config.weight_decay

    def lr_factor(self, step: int) -> float:
        epoch = step / self.n_steps * self.config.epochs
        config = self.config
        return warmup_steps_down(
            epoch + self.config.epochs / self.n_steps, config.warmup_epochs, config.milestones, config.gamma
        )

    def train(self, mode: bool = True) -> FinetuneModule:
        """Training mode for what trains; frozen blocks stay in evaluation mode, on the integer product."""
        super().train(mode)
        if mode:
            self.model.backbone.train(False)
            for block in self._trained_blocks:
                block.train(True)
        return self

    def loss(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """{"loss", "lambda", "code_entropy", "stuck_bits"} of uint8 images [P, n, 3, H, W] with labels [P]."""
        lam = lambda_at(progress, self.config.lambda_schedule)
        images = batch["images"].flatten(0, 1)
        labels = batch["label"].repeat_interleave(self.config.images_per_place)
        size = self.model.image_size
        prepared = resize(images, size) if self.config.augment is None else augment(images, self.config.augment, size)
        try:
            descriptors = self.model(prepared)
        except ValueError as error:
            if not (distributed.is_on() and guard.is_refusal(error)):
                raise
            # The others wait for descriptors; these make the loss of all NaN, and then all look where it began.
            descriptors = prepared.new_full((len(prepared), self.model.n_bits), torch.nan)
        loss = self.criterion(descriptors, labels, lam)
        with torch.no_grad():
            bits = guard.bit_figures(distributed.gather((descriptors > 0).byte()))
        return {"loss": loss, "lambda": torch.tensor(lam), **bits}


def _initialize_head(model: TetraModel, config: FinetuneConfig, dataset: PlaceBatches) -> None:
    head = check_model(model, config)
    assert isinstance(head, MixVPR)
    set_lambda(model, 1.0)
    model.eval()
    picked = StepSampler(len(dataset), min(config.initialize_head, len(dataset)), 1, config.loop.seed).batch(0)
    features = []
    with torch.inference_mode():
        for start in range(0, len(picked), 32):
            images = torch.stack([dataset[i]["images"][0] for i in picked[start : start + 32]])
            seen = resize(images, model.image_size)
            if config.augment is not None:
                seen = augment(images, config.augment, model.image_size)
            features.append(model.features(seen.to(model.image_mean.device)))
    tokens = torch.cat([f.tokens for f in features])
    head.initialize(Features(tokens, features[0].grid))


def _collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        "images": torch.stack([item["images"] for item in items]),
        "label": torch.tensor([item["label"] for item in items]),
    }


def finetune(
    model: TetraModel,
    config: FinetuneConfig,
    folder: Path,
    *,
    base_dir: Path = Path(),
    resume: bool = False,
    validate: Callable[[], dict[str, float]] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Run stage 2 on ``model`` in place; see :func:`tetra.training.distill.distill` for the arguments."""
    dataset = place_dataset(model, config, base_dir)
    distributed.share("finetune", "places_per_batch", config.places_per_batch)
    per_step = config.places_per_batch * config.loop.accumulate
    n_steps = config.max_steps or max(1, round(config.epochs * len(dataset) / per_step))
    torch.manual_seed(config.loop.seed)
    if config.initialize_head and not (folder / CHECKPOINT).exists():
        _initialize_head(model, config, dataset)
    module = FinetuneModule(model, config, n_steps, validate)
    return run_stage(
        module,
        dataset,
        config.places_per_batch,
        folder,
        resume=resume,
        with_epoch=True,
        collate=_collate,
        progress=progress,
    )
