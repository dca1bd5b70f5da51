"""An early view of recall while training, on images that training leaves out.

They are frames of videos, which need no labels, or a labelled data set as ``tetra evaluate`` reads it. In a run of
several processes each describes an equal share of the images and all of them return the same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tetra.config import check_range
from tetra.datasets import PlaceDataset, load_dataset
from tetra.errors import ConfigError, DatasetError
from tetra.evaluation import CosineSearch, recall_at_k
from tetra.images import iterate_batches, load_image
from tetra.kernels import hamming_search, pack_bits
from tetra.model import TetraModel
from tetra.training.augment import AugmentConfig, augment, resize
from tetra.training.data import find_images
from tetra.training.distributed import gather, rank, world_size
from tetra.vit import Features

Describe = Callable[[Tensor], Tensor]

BATCH = 32


@dataclass(frozen=True)
class ProbeConfig:
    """What recall is measured on while training: ``folders`` or ``dataset``.

    Attributes:
        folders: folders of video frames. Even frames are the references; odd frames, changed by augmentation, the
            queries. A query is right if its nearest reference is one of the two frames beside it.
        max_frames: frames of each folder, from its start.
        seed: of the augmentation.
        augment: how the queries among the frames are changed.
        dataset: a labelled data set in place of the folders. Its images are read anew at every validation.
        layout: of the data set; "auto" tells UTM folders and VPR-Bench apart.
        radius_m: references of UTM folders this near to a query are right, in metres.
        max_queries: take so many queries, evenly spread, of those that have a right reference; 0 takes all.
        max_references: take so many references, the right ones of these queries and others evenly spread; 0 takes all.
            The smaller the map, the higher the recall.
        workers: threads that decode the data set's images.
    """

    folders: tuple[str, ...] = ()
    max_frames: int = 160
    seed: int = 0
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    dataset: str = ""
    layout: Literal["auto", "utm", "vpr-bench"] = "auto"
    radius_m: float = 25.0
    max_queries: int = 0
    max_references: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        if bool(self.folders) == bool(self.dataset):
            found = "both 'folders' and 'dataset'" if self.folders else "neither 'folders' nor 'dataset'"
            raise ConfigError(f"probe: {found}; name one of them")
        check_range("probe", self, "max_frames", 2)
        check_range("probe", self, "seed", 0, 2**63 - 1)
        check_range("probe", self, "radius_m max_queries max_references", 0)
        check_range("probe", self, "workers", 1)


def pooled_tokens(features: Features) -> Tensor:
    """Patch tokens averaged on a 4 x 4 grid, float32 [B, 16 D]: centred over a set, a descriptor without a head."""
    return F.adaptive_avg_pool2d(features.feature_map().float(), (4, 4)).flatten(1)


def own_part(n: int) -> list[int]:
    """This process's part of ``n`` items: consecutive, as long as everyone's; the last item fills up the last ones."""
    each = -(-n // world_size())
    return [min(i, n - 1) for i in range(rank() * each, (rank() + 1) * each)]


class Probe:
    """The probe's images. Frames are loaded and changed once, so that every validation sees the same.

    Raises:
        DatasetError: the images or the data set can't be used; the message names the folder.
        ConfigError: the right references are more than ``max_references``.
    """

    def __init__(self, config: ProbeConfig, size: tuple[int, int], base_dir: Path) -> None:
        self.size, self.workers = size, config.workers
        self.sets: list[tuple[Tensor, Tensor]] = []
        self.dataset: PlaceDataset | None = None
        if config.dataset:
            dataset = load_dataset(base_dir / config.dataset, config.layout, config.radius_m)
            self.dataset = reduced(dataset, config.max_queries, config.max_references)
        with torch.random.fork_rng(devices=[]):  # images are augmented on the CPU; no GPU is to be woken for it
            torch.default_generator.manual_seed(config.seed)
            for folder in config.folders:
                paths = find_images([base_dir / folder])[: config.max_frames]
                if len(paths) < 2:
                    raise DatasetError(f"{base_dir / folder}: holds 1 image, a probe needs 2 frames; add some")
                frames = torch.stack([load_image(p, size) for p in paths])
                self.sets.append((augment(frames[1::2], config.augment, size), resize(frames[0::2], size)))

    @torch.inference_mode()
    def recall(self, describe: Describe, *, centre: bool = False) -> dict[str, float]:
        """Recall in percent: of folders {"recall_float", "recall_binary"}, recall@1, the folders' mean.

        Of a data set "recall5_float" and "recall5_binary", recall@5, as well.

        Args:
            describe: images [B, 3, H, W], float in [0, 1] or uint8 -> float descriptors [B, D]; a bit is (value > 0).
            centre: subtract the descriptors' mean, over all queries or all references, and normalise.
        """
        if self.dataset is not None:
            return self._recall_of_dataset(self.dataset, describe, centre)
        totals = {"recall_float": 0.0, "recall_binary": 0.0}
        for images in self.sets:
            q, r = (_together(describe(x[own_part(len(x))]), len(x), centre) for x in images)
            truth = torch.arange(len(q))
            for name, (a, b) in {
                "recall_float": (q, r),
                "recall_binary": (torch.where(q > 0, 1.0, -1.0), torch.where(r > 0, 1.0, -1.0)),
            }.items():
                best = (a @ b.T).argmax(1).cpu()
                right = ((best - truth) >= 0) & ((best - truth) <= 1)
                totals[name] += 100.0 * right.float().mean().item() / len(self.sets)
        return totals

    def _recall_of_dataset(self, dataset: PlaceDataset, describe: Describe, centre: bool) -> dict[str, float]:
        """Holds a batch of images at a time, and the descriptors: R x D floats for R references."""
        q = self._describe_files(dataset.query_paths, describe, centre)
        r = self._describe_files(dataset.database_paths, describe, centre)
        k = min(5, len(r))
        by_cosine = CosineSearch(q, k)
        for part in r.split(1024):
            by_cosine.add(part)
        _, binary_rows = hamming_search(pack_bits(q), pack_bits(r), k)
        figures: dict[str, float] = {}
        for name, rows in (("float", by_cosine.rows), ("binary", binary_rows)):
            recalls = recall_at_k(rows.cpu().numpy(), dataset.ground_truth, (1, k))
            figures |= {f"recall_{name}": recalls[1], f"recall5_{name}": recalls[k]}
        return figures

    def _describe_files(self, paths: Sequence[Path], describe: Describe, centre: bool) -> Tensor:
        mine = [paths[i] for i in own_part(len(paths))]
        parts = [describe(images) for _, images in iterate_batches(mine, self.size, BATCH, workers=self.workers)]
        return _together(torch.cat(parts), len(paths), centre)


def _together(part: Tensor, n: int, centre: bool) -> Tensor:
    """Descriptors [n, D] of all items, in their order, from those of every process's :func:`own_part`."""
    whole = gather(part)[:n]
    return F.normalize(whole - whole.mean(0), dim=-1) if centre else whole


def reduced(dataset: PlaceDataset, max_queries: int, max_references: int) -> PlaceDataset:
    """The part of a data set that :class:`ProbeConfig` describes, the same every time; 0 is no limit.

    Raises:
        ConfigError: the queries have more right references than ``max_references``.
    """
    queries = list(range(dataset.num_queries))
    if 0 < max_queries < len(queries):
        queries = _spread([i for i in queries if len(dataset.ground_truth[i])], max_queries)
    references = list(range(dataset.num_references))
    if 0 < max_references < len(references):
        right = {int(row) for i in queries for row in dataset.ground_truth[i]}
        if len(right) > max_references:
            raise ConfigError(
                f"probe: 'max_references' is {max_references}, but the {len(queries)} queries of {dataset.name} have "
                f"{len(right)} right references; raise it or lower 'max_queries'"
            )
        others = [row for row in references if row not in right]
        references = sorted(right.union(_spread(others, max_references - len(right))))
    return dataset.subset(queries, references)


def _spread(items: list[int], n: int) -> list[int]:
    """``n`` of the items, or all if they are fewer, evenly spread."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(n, len(items))).round().astype(int).tolist()]


def in_batches(fn: Describe, device: torch.device, size: int = BATCH) -> Describe:
    """Run ``fn`` on parts of a batch and put the results together."""
    return lambda x: torch.cat([fn(part.to(device)).float() for part in x.split(size)])


def backbone_probe(probe: Probe, model: TetraModel) -> dict[str, float]:
    """Recall of :func:`pooled_tokens`, before a head is trained."""
    describe = in_batches(lambda x: pooled_tokens(model.features(x)), model.image_mean.device)
    return probe.recall(describe, centre=True)


def head_probe(probe: Probe, model: TetraModel) -> dict[str, float]:
    """Recall of the model's own descriptors."""
    return probe.recall(in_batches(model, model.image_mean.device))
