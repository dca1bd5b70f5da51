"""How well a model finds places: recall@k, precision-recall, and plain matching of two folders.

Letters: Q queries, R references, D values of a descriptor (one bit each), k matches of a query.

Both forms of the descriptor are judged on the same forward pass: float by cosine similarity, binary by
Hamming distance. Equal scores are ordered by the reference's row.

**Memory**: the float descriptors of the references are never held together. Each batch is compared with all
queries and only the k best of a query stay, so a run needs Q x D floats, R x D / 8 bytes of codes and the
batch at hand: for 1000 queries, 1 M references and D = 12288 that is 49 MB and 1.5 GB, where R x D floats
would be 49 GB.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import tetra
from tetra.datasets import IntArray, PlaceDataset
from tetra.devices import why_unusable
from tetra.errors import ConfigError, DatasetError, TetraError
from tetra.images import SkippedImage, iterate_batches, list_images
from tetra.kernels import hamming_search, pack_bits

if TYPE_CHECKING:
    from tetra.model import TetraModel

DEFAULT_KS = (1, 5, 10, 20)
DEFAULT_MATCHES = 5


# --- measures: pure functions of predictions and truth ------------------------------------------------------


def recall_at_k(predictions: npt.ArrayLike, ground_truth: Sequence[IntArray], ks: Sequence[int]) -> dict[int, float]:
    """Percentage of queries that have a right reference among their first k predictions, for each k.

    ``predictions`` is integer [Q, at least max(ks)], rows of the map, best first. ``ground_truth[i]`` holds
    the right rows of query i. Queries without any right reference are left out of both counts.

    Raises ValueError for shapes that do not fit, or a k beyond the predictions, and
    :class:`~tetra.errors.DatasetError` if no query has a right reference.
    """
    rows = np.asarray(predictions)
    if rows.ndim != 2 or len(rows) != len(ground_truth):
        raise ValueError(f"predictions {list(rows.shape)} do not fit the ground truth of {len(ground_truth)} queries")
    if min(ks) < 1 or max(ks) > rows.shape[1]:
        raise ValueError(f"k must be between 1 and the {rows.shape[1]} predictions of a query, not {list(ks)}")
    hits = [np.isin(row, right) for row, right in zip(rows, ground_truth, strict=True) if len(right)]
    if not hits:
        raise DatasetError("no query has a right reference, so there is no recall to compute")
    found = np.array(hits)
    return {k: 100.0 * float(found[:, :k].any(axis=1).mean()) for k in ks}


@dataclass(frozen=True)
class PrecisionRecall:
    """What accepting only best matches up to a distance gives, for each distance that occurs.

    At ``threshold[i]`` the queries whose best match is at most that far are answered. ``precision[i]`` is the
    share of the answers that are right, ``recall[i]`` the share of the queries with a right reference that
    are answered rightly, so the curve ends at recall@1. A query of an unknown place can only be answered
    wrongly.
    """

    threshold: list[float]
    precision: list[float]
    recall: list[float]

    @property
    def auc(self) -> float:
        """Area under the curve by steps, sum (recall_i - recall_(i-1)) precision_i, as average precision."""
        steps = np.diff(self.recall, prepend=0.0)
        return float((steps * np.asarray(self.precision)).sum())

    @property
    def recall_at_full_precision(self) -> float:
        """The largest recall without a single wrong answer, in [0, 1]."""
        return max((r for p, r in zip(self.precision, self.recall, strict=True) if p == 1.0), default=0.0)


def precision_recall(distances: npt.ArrayLike, is_right: npt.ArrayLike, n_with_positive: int) -> PrecisionRecall:
    """The curve from the distance [Q] of each query's best match and whether that match is right, bool [Q].

    ``n_with_positive`` counts the queries that have a right reference at all. Equal distances share a point.
    """
    thresholds, point = np.unique(np.asarray(distances), return_inverse=True)
    answered = np.cumsum(np.bincount(point, minlength=len(thresholds)))
    right = np.cumsum(np.bincount(point, weights=np.asarray(is_right, dtype=np.float64), minlength=len(thresholds)))
    return PrecisionRecall(
        [float(value) for value in thresholds],
        [float(value) for value in right / answered],
        [float(value) for value in right / max(n_with_positive, 1)],
    )


# --- descriptors of files -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Descriptors:
    """Descriptors of image files, on the CPU."""

    floats: Tensor
    """float32 [N, D]"""
    codes: Tensor
    """uint8 [N, ceil(D / 8)]; a bit is (value > 0)"""
    kept: list[int]
    """place in the list of paths that each row is from: all of them unless images were skipped"""
    skipped: list[SkippedImage]


def describe_folder(
    model: TetraModel,
    paths: str | Path | Sequence[str | Path],
    *,
    batch_size: int = 32,
    image_size: tuple[int, int] | None = None,
    skip_bad_images: bool = False,
    workers: int = 2,
    progress: bool = True,
    label: str = "images",
) -> Descriptors:
    """Describe all images of a folder (with its subfolders) or a list of paths, on the model's device.

    Holds N x D floats; for big maps that need codes only, go through :func:`describe_batches`.

    Raises :class:`~tetra.errors.ImageError` for an image that cannot be read, unless ``skip_bad_images``, and
    :class:`~tetra.errors.DatasetError` if the folder has no image or not one could be read.
    """
    paths = list_images(paths, recursive=True) if isinstance(paths, (str, Path)) else paths
    skipped: list[SkippedImage] = []
    batches = describe_batches(
        model,
        paths,
        batch_size=batch_size,
        image_size=image_size,
        skipped=skipped if skip_bad_images else None,
        workers=workers,
        progress=progress,
        label=label,
    )
    indices, floats, codes = zip(*((i, f.cpu(), c.cpu()) for i, f, c in batches), strict=True)
    return Descriptors(torch.cat(floats), torch.cat(codes), torch.cat(indices).tolist(), skipped)


def describe_batches(
    model: TetraModel,
    paths: Sequence[str | Path],
    *,
    batch_size: int = 32,
    image_size: tuple[int, int] | None = None,
    skipped: list[SkippedImage] | None = None,
    workers: int = 2,
    progress: bool = True,
    label: str = "images",
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (indices int64 [B], floats float32 [B, D], codes uint8 [B, ceil(D / 8)]) batch by batch.

    Indices are places in ``paths``; floats and codes are on the model's device.
    The codes are the signs of the floats, which is what ``model.describe`` computes, without a second forward
    pass. ``skipped`` collects unreadable images; without that list the first one raises. The model works in
    evaluation mode and gets its own mode back.

    Raises what :func:`describe_folder` raises, and :class:`~tetra.errors.TetraError` for a descriptor with
    NaN or infinity.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}: it must be at least 1")
    device = _device_of(model)
    n_described = 0
    batches = iterate_batches(
        paths,
        image_size or model.image_size,
        batch_size,
        workers=workers,
        on_error="raise" if skipped is None else "skip",
        skipped=skipped,
    )
    with _evaluation_mode(model), _progress_bar(progress) as bar:
        task = bar.add_task(label, total=len(paths))
        for indices, images in batches:
            with torch.inference_mode():
                floats = model(images.to(device)).float()
                codes = pack_bits(floats)
                is_finite = floats.isfinite().all(dim=1)
            if not is_finite.all():
                path = paths[int(indices[int((~is_finite).nonzero()[0])])]
                raise TetraError(f"{path}: the model gives a descriptor with NaN or infinity; check its weights")
            n_described += len(indices)
            bar.update(task, completed=int(indices[-1]) + 1)
            yield indices, floats, codes
        bar.update(task, completed=len(paths))
    if not n_described:
        raise DatasetError(f"not one of the {len(paths)} {label} could be read; the first is {paths[0]}")


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:  # one by one: a frozen part of a training model stays as it is
            module.training = True


def _progress_bar(visible: bool) -> Progress:
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not visible)


# --- search -------------------------------------------------------------------------------------------------


class CosineSearch:
    """The k most similar references of each query, with the references arriving in batches.

    After every batch, ``similarities`` is float32 [Q, k] and ``rows`` int64 [Q, k], with fewer columns until
    k references have come, sorted by falling cosine similarity, then by row: the order in which they came.
    """

    def __init__(self, queries: Tensor, k: int) -> None:
        """``queries`` is float [Q, D]; references have to be on its device."""
        self.k = k
        self._queries = F.normalize(queries.float(), dim=1)
        self._n_seen = 0
        self.similarities = queries.new_empty((len(queries), 0), dtype=torch.float32)
        self.rows = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)

    def add(self, references: Tensor) -> None:
        """Compare float [B, D] with all queries; their rows go on where the last batch ended."""
        similarities = self._queries @ F.normalize(references.float(), dim=1).T
        rows = torch.arange(self._n_seen, self._n_seen + len(references), device=self.rows.device)
        self._n_seen += len(references)
        similarities = torch.cat([self.similarities, similarities], dim=1)
        rows = torch.cat([self.rows, rows.expand(len(self._queries), -1)], dim=1)
        # Kept rows stand first and are lower than new ones, so a stable sort breaks ties by row.
        order = similarities.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        self.similarities, self.rows = similarities.gather(1, order), rows.gather(1, order)


# --- reports ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFacts:
    """What produced a result: enough to know the model, its size and where it ran."""

    n_bits: int
    bytes_per_image: int
    image_size: tuple[int, int]
    """height, width"""
    device: str
    model: str
    """name of the architecture"""
    model_hash: str | None
    """content hash of the model's file; None for a model that was never saved"""
    commit: str | None
    """as :func:`source_commit` gives it"""
    tetra_version: str = tetra.__version__

    @classmethod
    def of(cls, model: TetraModel, image_size: tuple[int, int]) -> RunFacts:
        """The facts about ``model`` as it stands, fed images of ``image_size``."""
        return cls(
            n_bits=model.n_bits,
            bytes_per_image=math.ceil(model.n_bits / 8),
            image_size=image_size,
            device=_device_name(_device_of(model)),
            model=model.config.arch,
            model_hash=model.content_hash,
            commit=source_commit(),
        )


def source_commit() -> str | None:
    """The git commit of the checkout that ``tetra`` is imported from, with ``-dirty`` if files were changed.

    None for an installed package and without git.
    """
    root = Path(tetra.__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an installed package may lie in somebody else's repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _device_of(model: nn.Module) -> torch.device:
    return next(chain(model.parameters(), model.buffers())).device


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _move(model: nn.Module, device: str | torch.device | None) -> None:
    if device is None:
        return
    reason = why_unusable(device)
    if reason is not None:
        raise ConfigError(f"device '{device}' cannot be used ({reason}); choose cpu or a device of this machine")
    model.to(torch.device(device))


def format_recalls(recalls: dict[int, float]) -> str:
    """``R@1: 90.1, R@5: 95.0, R@10: 96.2, R@20: 97.0``."""
    return ", ".join(f"R@{k}: {percent:.1f}" for k, percent in recalls.items())


@dataclass(frozen=True)
class EvaluationReport:
    """Result of :func:`evaluate`. Recalls are percentages by k, over queries that have a right reference."""

    dataset: str
    layout: str
    n_queries: int
    n_references: int
    n_queries_without_positive: int
    recall_float: dict[int, float]
    recall_binary: dict[int, float]
    precision_recall: PrecisionRecall
    """of the binary descriptors, by Hamming distance of the best match"""
    facts: RunFacts
    skipped: list[SkippedImage] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    """lines that the reader of the numbers should see"""
    pictures: list[Path] = field(default_factory=list)

    def recall_lines(self) -> list[str]:
        """One line for the float and one for the binary descriptor."""
        return [
            f"float   {format_recalls(self.recall_float)}",
            f"binary  {format_recalls(self.recall_binary)}",
        ]

    def to_json_dict(self) -> dict[str, Any]:
        """Everything but the pictures as plain JSON values; see :func:`tetra.files.write_json`."""
        curve = self.precision_recall
        return {
            "dataset": self.dataset,
            "layout": self.layout,
            "n_queries": self.n_queries,
            "n_references": self.n_references,
            "n_queries_without_positive": self.n_queries_without_positive,
            "recall_float": {str(k): value for k, value in self.recall_float.items()},
            "recall_binary": {str(k): value for k, value in self.recall_binary.items()},
            "auc_binary": curve.auc,
            "recall_at_full_precision_binary": 100.0 * curve.recall_at_full_precision,
            **_facts_json(self.facts),
            "skipped": [skip.reason for skip in self.skipped],
            "notices": self.notices,
            "precision_recall_binary": asdict(curve),
        }


def _facts_json(facts: RunFacts) -> dict[str, Any]:
    return asdict(facts) | {"image_size": list(facts.image_size)}


def evaluate(
    model: TetraModel,
    dataset: PlaceDataset,
    *,
    ks: Sequence[int] | None = None,
    batch_size: int = 32,
    image_size: tuple[int, int] | None = None,
    device: str | torch.device | None = None,
    skip_bad_images: bool = False,
    pictures_dir: str | Path | None = None,
    n_pictures: int = 10,
    workers: int = 2,
    progress: bool = True,
) -> EvaluationReport:
    """Recall and precision-recall of ``model`` on ``dataset``, by float and by binary descriptors.

    ``ks`` defaults to 1, 5, 10 and 20; where the map is smaller, all of it counts and a notice says so. A k
    that was asked for and is larger than the map is refused. ``image_size`` (height, width) defaults to the
    model's. ``device`` moves the model; None leaves it where it is. ``skip_bad_images`` leaves out images
    that cannot be read and logs a line for each; a right reference left out no longer counts as one.

    ``pictures_dir`` (made if missing) gets ``match_*.png`` of ``n_pictures`` queries spread evenly over the
    set, with their best binary matches, and ``precision_recall.png``.

    Raises :class:`~tetra.errors.ConfigError` for a k or device that cannot be used, and what
    :func:`describe_folder` raises.
    """
    _check_ks(ks, dataset.num_references)
    if pictures_dir is not None:
        _prepare_pictures(pictures_dir)
    _move(model, device)
    search = _search_both(
        model,
        dataset.query_paths,
        dataset.database_paths,
        k=max(ks or DEFAULT_KS),
        batch_size=batch_size,
        image_size=image_size,
        skip_bad_images=skip_bad_images,
        workers=workers,
        progress=progress,
    )
    if search.skipped:
        dataset = dataset.subset(search.kept_queries, search.kept_references)
        _check_ks(ks, dataset.num_references)

    # Beyond the end of a small map, the first k are the whole map.
    depth = {k: min(k, dataset.num_references) for k in ks or DEFAULT_KS}
    notices = [f"the map holds {n} references, so R@{k} looks at all of them" for k, n in depth.items() if n < k]
    n_without = sum(not len(right) for right in dataset.ground_truth)
    if n_without:
        notices.append(
            f"{n_without} of {dataset.num_queries} queries have no right reference and are not counted in R@k"
        )
    notices.extend(_skip_notices(search.skipped))

    def recalls(rows: IntArray) -> dict[int, float]:
        by_depth = recall_at_k(rows, dataset.ground_truth, sorted(set(depth.values())))
        return {k: by_depth[n] for k, n in depth.items()}

    is_right = [row[0] in right for row, right in zip(search.binary_rows, dataset.ground_truth, strict=True)]
    curve = precision_recall(search.distances[:, 0], is_right, dataset.num_queries - n_without)
    report = EvaluationReport(
        dataset=dataset.name,
        layout=dataset.layout,
        n_queries=dataset.num_queries,
        n_references=dataset.num_references,
        n_queries_without_positive=n_without,
        recall_float=recalls(search.float_rows),
        recall_binary=recalls(search.binary_rows),
        precision_recall=curve,
        facts=RunFacts.of(model, image_size or model.image_size),
        skipped=search.skipped,
        notices=notices,
    )
    if pictures_dir is not None:
        from tetra.pictures import save_precision_recall

        path = Path(pictures_dir) / "precision_recall.png"
        save_precision_recall(path, curve, title=f"{dataset.name}, {report.facts.n_bits} bits")
        report.pictures.append(path)
        report.pictures.extend(
            _save_matches(
                Path(pictures_dir),
                n_pictures,
                dataset.query_paths,
                dataset.database_paths,
                search,
                report.facts.n_bits,
                dataset.ground_truth,
            )
        )
    return report


@dataclass(frozen=True)
class MatchReport:
    """Result of :func:`match_folders`: the nearest references of each query by Hamming distance."""

    query_paths: list[Path]
    reference_paths: list[Path]
    rows: IntArray
    """int64 [Q, k], into ``reference_paths``, nearest first"""
    distances: IntArray
    """int64 [Q, k], differing bits"""
    facts: RunFacts
    skipped: list[SkippedImage] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)

    def table(self, max_queries: int | None = None) -> Table:
        """A table to print: the best match of each of the first ``max_queries`` queries, and the others."""
        n_shown = len(self.query_paths) if max_queries is None else min(max_queries, len(self.query_paths))
        more = "" if n_shown == len(self.query_paths) else f", the first {n_shown} of {len(self.query_paths)}"
        table = Table(title=f"Matches (differing bits of {self.facts.n_bits}){more}", title_justify="left")
        table.add_column("query", overflow="fold")
        table.add_column("best match", overflow="fold")
        table.add_column("bits", justify="right")
        table.add_column("next", overflow="fold")
        for path, rows, distances in zip(
            self.query_paths[:n_shown], self.rows.tolist(), self.distances.tolist(), strict=False
        ):
            names = [self.reference_paths[row].name for row in rows]
            others = ", ".join(f"{name} ({bits})" for name, bits in zip(names[1:], distances[1:], strict=True))
            # A name may hold what rich takes for markup, such as "[old]".
            table.add_row(Text(path.name), Text(names[0]), str(distances[0]), Text(others))  # no markup
        return table

    def to_json_dict(self) -> dict[str, Any]:
        """Everything but the pictures as plain JSON values; paths are as they were given."""
        return {
            "n_queries": len(self.query_paths),
            "n_references": len(self.reference_paths),
            "k": self.rows.shape[1],
            **_facts_json(self.facts),
            "skipped": [skip.reason for skip in self.skipped],
            "notices": self.notices,
            "matches": [
                {
                    "query": str(path),
                    "references": [
                        {"path": str(self.reference_paths[row]), "distance": distance}
                        for row, distance in zip(rows, distances, strict=True)
                    ],
                }
                for path, rows, distances in zip(
                    self.query_paths, self.rows.tolist(), self.distances.tolist(), strict=True
                )
            ],
        }


def match_folders(
    model: TetraModel,
    queries: str | Path,
    references: str | Path,
    *,
    k: int | None = None,
    batch_size: int = 32,
    image_size: tuple[int, int] | None = None,
    device: str | torch.device | None = None,
    skip_bad_images: bool = False,
    pictures_dir: str | Path | None = None,
    n_pictures: int = 10,
    workers: int = 2,
    progress: bool = True,
) -> MatchReport:
    """The ``k`` nearest images of folder ``references`` for each image of folder ``queries``, without labels.

    Both folders are searched with their subfolders. ``k`` defaults to 5 or to the whole map if that is
    smaller; a given ``k`` larger than the map is refused. The other arguments and errors are those of
    :func:`evaluate`; the pictures have grey borders, since nobody said what is right.
    """
    query_paths, reference_paths = (
        list_images(queries, recursive=True),
        list_images(references, recursive=True),
    )
    asked = None if k is None else [k]
    _check_ks(asked, len(reference_paths))
    if pictures_dir is not None:
        _prepare_pictures(pictures_dir, with_curve=False)
    _move(model, device)
    search = _search_both(
        model,
        query_paths,
        reference_paths,
        k=k or DEFAULT_MATCHES,
        batch_size=batch_size,
        image_size=image_size,
        skip_bad_images=skip_bad_images,
        workers=workers,
        progress=progress,
        with_floats=False,
    )
    _check_ks(asked, len(search.kept_references))
    report = MatchReport(
        query_paths=[query_paths[i] for i in search.kept_queries],
        reference_paths=[reference_paths[i] for i in search.kept_references],
        rows=search.binary_rows,
        distances=search.distances,
        facts=RunFacts.of(model, image_size or model.image_size),
        skipped=search.skipped,
        notices=_skip_notices(search.skipped),
    )
    if pictures_dir is not None:
        report.pictures.extend(
            _save_matches(
                Path(pictures_dir),
                n_pictures,
                report.query_paths,
                report.reference_paths,
                search,
                report.facts.n_bits,
                None,
            )
        )
    return report


# --- shared by evaluate and match_folders -------------------------------------------------------------------


@dataclass(frozen=True)
class _Search:
    """Nearest references of the images that could be read; rows count those only."""

    kept_queries: list[int]
    kept_references: list[int]
    skipped: list[SkippedImage]
    float_rows: IntArray
    binary_rows: IntArray
    distances: IntArray


def _search_both(
    model: TetraModel,
    query_paths: Sequence[Path],
    reference_paths: Sequence[Path],
    *,
    k: int,
    batch_size: int,
    image_size: tuple[int, int] | None,
    skip_bad_images: bool,
    workers: int,
    progress: bool,
    with_floats: bool = True,
) -> _Search:
    queries = describe_folder(
        model,
        query_paths,
        batch_size=batch_size,
        image_size=image_size,
        skip_bad_images=skip_bad_images,
        workers=workers,
        progress=progress,
        label="queries",
    )
    device = _device_of(model)
    by_cosine = CosineSearch(queries.floats.to(device), k)
    skipped: list[SkippedImage] = []
    kept: list[int] = []
    codes: list[Tensor] = []
    for indices, batch_floats, batch_codes in describe_batches(
        model,
        reference_paths,
        batch_size=batch_size,
        image_size=image_size,
        skipped=skipped if skip_bad_images else None,
        workers=workers,
        progress=progress,
        label="references",
    ):
        if with_floats:
            by_cosine.add(batch_floats)
        kept.extend(indices.tolist())
        codes.append(batch_codes)
    distances, rows = hamming_search(queries.codes.to(device), torch.cat(codes), min(k, len(kept)))
    return _Search(
        kept_queries=queries.kept,
        kept_references=kept,
        skipped=queries.skipped + skipped,
        float_rows=by_cosine.rows.cpu().numpy(),
        binary_rows=rows.cpu().numpy(),
        distances=distances.cpu().numpy().astype(np.int64),
    )


def _check_ks(ks: Sequence[int] | None, n_references: int) -> None:
    """Refuse what was asked for and cannot be; None asks for nothing."""
    for k in ks if ks is not None else ():
        if k < 1:
            raise ConfigError(f"k = {k}: it counts matches, so it must be at least 1")
        if k > n_references:
            raise ConfigError(
                f"k = {k} is larger than the map of {n_references} references; ask for at most {n_references}"
            )
    if ks is not None and not ks:
        raise ConfigError("no k was given; name at least one, such as 1")


def _skip_notices(skipped: Sequence[SkippedImage]) -> list[str]:
    return [f"images that could not be read and were skipped: {len(skipped)}"] if skipped else []


def _prepare_pictures(folder: str | Path, with_curve: bool = True) -> None:
    """Fail before the long work if there is nowhere, or nothing, to draw with."""
    if with_curve:
        from tetra.pictures import require_matplotlib

        require_matplotlib()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TetraError(
            f"{folder}: cannot make the folder for pictures: {error.strerror or error}; name another"
        ) from None


def _save_matches(
    folder: Path,
    n_pictures: int,
    query_paths: Sequence[Path],
    reference_paths: Sequence[Path],
    search: _Search,
    n_bits: int,
    ground_truth: Sequence[IntArray] | None,
) -> list[Path]:
    from tetra.pictures import Match, save_match_picture

    saved = []
    n_pictures = min(n_pictures, len(query_paths))
    for query in np.linspace(0, len(query_paths) - 1, n_pictures).round().astype(int).tolist():
        right = None if ground_truth is None else set(ground_truth[query].tolist())
        matches = [
            Match(reference_paths[row], f"{distance} of {n_bits} bits", None if right is None else row in right)
            for row, distance in zip(
                search.binary_rows[query, :DEFAULT_MATCHES].tolist(),
                search.distances[query, :DEFAULT_MATCHES].tolist(),
                strict=True,
            )
        ]
        path = folder / f"match_{query:05d}.png"
        save_match_picture(path, query_paths[query], matches)
        saved.append(path)
    return saved
