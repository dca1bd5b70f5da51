"""An early view of recall while training: can the student find a changed frame in a video it never saw?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tetra.config import check_range
from tetra.errors import DatasetError
from tetra.images import load_image
from tetra.model import TetraModel
from tetra.training.augment import AugmentConfig, augment, resize
from tetra.training.data import find_images
from tetra.vit import Features


@dataclass(frozen=True)
class ProbeConfig:
    """Folders of video frames that training leaves out.

    Even frames are the references; odd frames, changed by augmentation, the queries. A query is right if its
    nearest reference is one of the two frames beside it. ``max_frames`` per folder.
    """

    folders: tuple[str, ...]
    max_frames: int = 160
    seed: int = 0
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        check_range("probe", self, "max_frames", 2)
        check_range("probe", self, "seed", 0, 2**63 - 1)


def pooled_tokens(features: Features) -> Tensor:
    """A descriptor without a head: patch tokens averaged on a 4 x 4 grid, centred, [B, 16 D]."""
    pooled = F.adaptive_avg_pool2d(features.feature_map().float(), (4, 4)).flatten(1)
    return F.normalize(pooled - pooled.mean(0), dim=-1)


class Probe:
    """The probe's images, loaded and changed once, so that every validation sees the same."""

    def __init__(self, config: ProbeConfig, size: tuple[int, int], base_dir: Path) -> None:
        self.sets: list[tuple[Tensor, Tensor]] = []
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            for folder in config.folders:
                paths = find_images([base_dir / folder])[: config.max_frames]
                if len(paths) < 2:
                    raise DatasetError(f"{base_dir / folder}: holds 1 image, a probe needs 2 frames; add some")
                frames = torch.stack([load_image(p, size) for p in paths])
                self.sets.append((augment(frames[1::2], config.augment, size), resize(frames[0::2], size)))

    def recall(self, describe: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean recall@1 over the folders in percent: {"recall_float", "recall_binary"}.

        Args:
            describe: float images [B, 3, H, W] in [0, 1] -> float descriptors [B, D]; a bit is (value > 0).
        """
        totals = {"recall_float": 0.0, "recall_binary": 0.0}
        for queries, references in self.sets:
            q, r = describe(queries), describe(references)
            truth = torch.arange(len(q))
            for name, (a, b) in {
                "recall_float": (q, r),
                "recall_binary": (torch.where(q > 0, 1.0, -1.0), torch.where(r > 0, 1.0, -1.0)),
            }.items():
                best = (a @ b.T).argmax(1).cpu()
                right = ((best - truth) >= 0) & ((best - truth) <= 1)
                totals[name] += 100.0 * right.float().mean().item() / len(self.sets)
        return totals


def in_batches(fn: Callable[[Tensor], Tensor], device: torch.device, size: int = 32) -> Callable[[Tensor], Tensor]:
    """Run ``fn`` on parts of a batch and put the results together."""
    return lambda x: torch.cat([fn(part.to(device)).float() for part in x.split(size)])


def backbone_probe(probe: Probe, model: TetraModel) -> dict[str, float]:
    """Recall of :func:`pooled_tokens`, before a head is trained."""

    def describe(x: Tensor) -> Tensor:
        maps = [model.features(part.to(model.image_mean.device)) for part in x.split(32)]
        tokens = torch.cat([m.tokens.float() for m in maps])
        return pooled_tokens(Features(tokens, maps[0].grid))

    return probe.recall(describe)


def head_probe(probe: Probe, model: TetraModel) -> dict[str, float]:
    """Recall of the model's own descriptors."""
    return probe.recall(in_batches(model, model.image_mean.device))
