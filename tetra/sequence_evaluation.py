"""How much a sequence helps on a data set, and which answers can be trusted: single frames against sequences.

The queries of the set are taken for the frames of a robot, in the order of their names, and the references for one
traversal of the map, in the order of theirs; positions in the names of UTM folders are used. Every query counts from
the first one on, when a sequence knows no more than a frame. Nothing looks ahead.

**Unknown places.** Calibrating needs wrong answers, and the worst ones are those to views of places that the map does
not have. So each set is gone through twice: with its whole map, and with the middle third of the references hidden;
a query whose right references are hidden can only be answered wrongly. Thresholds are calibrated on both runs
together, and precision is told for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tetra.confidence import DEFAULT_CONFIDENCE, DEFAULT_TARGET, Calibration, calibrate
from tetra.datasets import IntArray, PlaceDataset, parse_utm_name
from tetra.errors import ConfigError, DatasetError, TetraError
from tetra.evaluation import describe_folder
from tetra.localizer import DEFAULT_K, DEFAULT_PLACE_RADIUS_M, DEFAULT_PLACE_ROWS, CodeMap, Localizer
from tetra.model import TetraModel
from tetra.sequences import DEFAULT_SPEEDS, DEFAULT_WINDOW

BoolArray = npt.NDArray[np.bool_]

KINDS = ("frame", "sequence")


@dataclass(frozen=True)
class Run:
    """The answers to all queries of a set, in order."""

    scores: npt.NDArray[np.float64]
    """[Q]; see :class:`tetra.localizer.Answer`"""
    is_right: BoolArray
    """[Q]"""
    has_right: BoolArray
    """[Q], whether the map has a right reference at all"""

    @property
    def recall(self) -> float:
        """Percentage of right answers among the queries that have a right reference; 0 if none has."""
        return 100.0 * float(self.is_right.sum()) / max(int(self.has_right.sum()), 1)


def run(
    queries: Tensor,
    place_map: CodeMap,
    ground_truth: Sequence[IntArray],
    **options: Any,
) -> Run:
    """Push codes uint8 [Q, B] through a localizer with ``options``; right rows of query i are ``ground_truth[i]``."""
    localizer = Localizer(None, place_map, **options)
    answers = [localizer.push(code) for code in queries]
    return Run(
        np.array([answer.score for answer in answers]),
        np.array([answer.row in right for answer, right in zip(answers, ground_truth, strict=True)]),
        np.array([len(right) > 0 for right in ground_truth]),
    )


@dataclass(frozen=True)
class Trust:
    """What accepting answers up to a threshold gives."""

    share_accepted: float
    """of all queries"""
    precision: float | None
    """right answers / accepted answers; None if none was accepted"""

    @classmethod
    def of(cls, answers: Run, calibration: Calibration) -> Trust:
        """What ``calibration`` makes of ``answers``."""
        accepted = answers.scores <= calibration.threshold
        precision = float(answers.is_right[accepted].mean()) if accepted.any() else None
        return cls(float(accepted.mean()), precision)


@dataclass(frozen=True)
class SequenceReport:
    """Result of :func:`evaluate_sequences`; the keys of the dicts are "frame" and "sequence"."""

    dataset: str
    n_queries: int
    n_references: int
    n_hidden: int
    """references left out in the second run"""
    window: int
    k: int
    model_hash: str | None
    recall: dict[str, float]
    """recall@1 in percent over all queries that have a right reference, with the whole map"""
    recall_hidden: dict[str, float]
    """the same with the middle third hidden; fewer queries have a right reference then"""
    calibration: dict[str, Calibration]
    """from both runs on this set; a kind that could not be calibrated is missing, and a notice says why"""
    trust: dict[str, Trust]
    """on this set, with the whole map, at the thresholds that were given"""
    trust_hidden: dict[str, Trust]
    """the same with the middle third hidden"""
    notices: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What to print."""
        lines = [
            f"{kind:8}  R@1: {self.recall[kind]:.1f}, with a third of the map hidden: {self.recall_hidden[kind]:.1f}"
            for kind in self.recall
        ]
        for kind, trust in self.trust.items():
            lines.append(f"{kind:8}  {_trusted(trust)}; with a third hidden: {_trusted(self.trust_hidden[kind])}")
        return lines

    def to_json_dict(self) -> dict[str, Any]:
        """Plain JSON values; see :func:`tetra.files.write_json`."""
        return asdict(self)


def _trusted(trust: Trust) -> str:
    precision = "" if trust.precision is None else f", {100 * trust.precision:.1f}% of them right"
    return f"{100 * trust.share_accepted:.1f}% accepted{precision}"


def evaluate_sequences(
    model: TetraModel,
    dataset: PlaceDataset,
    *,
    batch_size: int = 32,
    image_size: tuple[int, int] | None = None,
    workers: int = 2,
    progress: bool = True,
    **options: Any,
) -> SequenceReport:
    """Recall@1 and trust of single frames and of sequences.

    ``options`` are those of :func:`report_sequences`, the other arguments those of :func:`tetra.evaluation.evaluate`.
    Raises what these raise; images that can't be read are not skipped, since a sequence would lose its rhythm.
    """
    _check(dataset)
    queries, references = (
        describe_folder(
            model,
            paths,
            batch_size=batch_size,
            image_size=image_size,
            workers=workers,
            progress=progress,
            label=label,
        ).codes
        for label, paths in (("queries", dataset.query_paths), ("references", dataset.database_paths))
    )
    return report_sequences(dataset, queries, references, model_hash=model.content_hash, **options)


def report_sequences(
    dataset: PlaceDataset,
    queries: Tensor,
    references: Tensor,
    *,
    model_hash: str | None = None,
    calibration: Mapping[str, Calibration] | None = None,
    k: int = DEFAULT_K,
    window: int = DEFAULT_WINDOW,
    speeds: tuple[float, ...] = DEFAULT_SPEEDS,
    backwards: bool = False,
    place_radius_m: float = DEFAULT_PLACE_RADIUS_M,
    place_rows: int = DEFAULT_PLACE_ROWS,
    target_precision: float = DEFAULT_TARGET,
    confidence: float = DEFAULT_CONFIDENCE,
) -> SequenceReport:
    """:func:`evaluate_sequences` on codes uint8 [Q, B] and [R, B] of the data set's images, by model ``model_hash``.

    ``calibration`` has the thresholds to judge, by "frame" and "sequence", from a report on another set. The other
    arguments are those of :class:`~tetra.localizer.Localizer` and :func:`~tetra.confidence.calibrate`.

    Raises :class:`~tetra.errors.DatasetError` if there are fewer than 3 references or no query has a right one,
    :class:`~tetra.errors.ConfigError` for an argument that cannot be or a calibration of another model.
    """
    _check(dataset)
    calibration = calibration or {}
    code_bytes = int(references.shape[1])
    for kind, given in calibration.items():
        if kind not in KINDS:
            raise ConfigError(f"calibration of {kind!r}: expected {' and '.join(KINDS)}")
        given.check(model_hash, code_bytes)
    positions = None
    if dataset.layout == "utm":
        positions = np.array([parse_utm_name(path)[0] for path in dataset.database_paths])

    n = dataset.num_references
    shown = [row for row in range(n) if not n // 3 <= row < 2 * n // 3]
    hidden_truth = dataset.subset(range(dataset.num_queries), shown).ground_truth
    common: dict[str, Any] = {"k": k, "place_radius_m": place_radius_m, "place_rows": place_rows}
    own: dict[str, dict[str, Any]] = {
        "frame": {"window": 1},
        "sequence": {"window": window, "speeds": speeds, "backwards": backwards},
    }
    whole_map = CodeMap(references, positions)
    part_map = CodeMap(references[shown], None if positions is None else positions[shown])
    whole = {kind: run(queries, whole_map, dataset.ground_truth, **common, **own[kind]) for kind in KINDS}
    part = {kind: run(queries, part_map, hidden_truth, **common, **own[kind]) for kind in KINDS}

    learned, notices = {}, []
    for kind in KINDS:
        try:
            learned[kind] = calibrate(
                np.concatenate([whole[kind].scores, part[kind].scores]),
                np.concatenate([whole[kind].is_right, part[kind].is_right]),
                target_precision=target_precision,
                confidence=confidence,
                of_sequences=kind == "sequence",
                model_hash=model_hash,
                code_bytes=code_bytes,
            )
        except ConfigError:
            raise
        except TetraError as error:
            notices.append(f"{kind}: {error}")
    return SequenceReport(
        dataset=dataset.name,
        n_queries=dataset.num_queries,
        n_references=n,
        n_hidden=n - len(shown),
        window=window,
        k=k,
        model_hash=model_hash,
        recall={kind: result.recall for kind, result in whole.items()},
        recall_hidden={kind: result.recall for kind, result in part.items()},
        calibration=learned,
        trust={kind: Trust.of(whole[kind], given) for kind, given in calibration.items()},
        trust_hidden={kind: Trust.of(part[kind], given) for kind, given in calibration.items()},
        notices=notices,
    )


def _check(dataset: PlaceDataset) -> None:
    if dataset.num_references < 3:
        raise DatasetError(f"{dataset.name}: {dataset.num_references} references; a sequence needs at least 3")
    if not any(len(right) for right in dataset.ground_truth):
        raise DatasetError(f"{dataset.name}: no query has a right reference, so there is no recall to compute")
