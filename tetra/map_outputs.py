"""What came of the frames, for programs: records for JSON, where the milliseconds went, the memory taken."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tetra.coordinates import CoordinateFrame
from tetra.localizer import Answer, Timings


@dataclass(frozen=True)
class FrameResult:
    """A frame and its answer, as the files of maps take them."""

    name: str
    answer: Answer
    thumbnail: bytes | None = None
    """the frame as a small JPEG file, see :func:`tetra.picture_strips.thumbnail`"""
    sequence: int = 0
    """tracks join the answers of one sequence"""


class Places(Protocol):
    """What is needed of a map: of a :class:`tetra.place_map.PlaceMap`."""

    @property
    def frame(self) -> CoordinateFrame: ...

    def __len__(self) -> int: ...

    def rows(self) -> npt.NDArray[np.int64]: ...

    def ids(self, rows: npt.ArrayLike) -> list[str | None]: ...

    def positions(self, rows: npt.ArrayLike) -> npt.NDArray[np.float64]: ...

    def headings(self, rows: npt.ArrayLike) -> npt.NDArray[np.float32]: ...

    def times(self, rows: npt.ArrayLike) -> npt.NDArray[np.float64]: ...

    def thumbnails(self, rows: npt.ArrayLike) -> list[bytes | None]: ...


def frame_record(name: str, answer: Answer, n_matches: int | None = None) -> dict[str, Any]:
    """The answer of a frame as plain JSON values.

    ``file``, ``accepted`` (true, false, or null without a calibration), ``matches`` (at most ``n_matches`` of the
    shortlist, nearest first, each with ``id``, ``distance`` in bits and ``position``), ``position`` [x, y] in metres in
    the map's frame or null, ``spread_m``; then ``id``, ``distance``, ``margin``, ``score``, ``belief``, ``time``, as
    :class:`tetra.localizer.Answer` has them, and ``timings_ms``.
    """
    timings = {step: round(getattr(answer.timings, f"{step}_ms"), 3) for step in _STEPS}
    record = {"file": name, **answer.to_dict(n_matches), "timings_ms": timings}
    first = ("file", "accepted", "matches", "position", "spread_m")
    return {key: record[key] for key in (*first, *(key for key in record if key not in first))}


def joined_tracks(results: Sequence[FrameResult]) -> list[list[int]]:
    """The numbers of the results that make up each track: positions of one sequence that were not rejected.

    Without a calibration nothing is rejected. A single position is no track.
    """
    tracks: dict[int, list[int]] = {}
    for number, result in enumerate(results):
        if result.answer.position is not None and result.answer.accepted is not False:
            tracks.setdefault(result.sequence, []).append(number)
    return [track for track in tracks.values() if len(track) > 1]


# --- time and memory ---

_STEPS = (*(field.name.removesuffix("_ms") for field in fields(Timings)), "total")


def with_decode_ms(answer: Answer, decode_ms: float) -> Answer:
    """An answer whose timings count the decoding that was done before the push, see :class:`tetra.frames.Frame`."""
    timings = replace(answer.timings, decode_ms=answer.timings.decode_ms + decode_ms)
    return replace(answer, timings=timings)


def latency_table(timings: Collection[Timings]) -> dict[str, dict[str, float]]:
    """``p50_ms``, ``p95_ms`` and ``p99_ms`` of ``decode``, ``preprocess``, ``network``, ``search``, ``decide`` and
    ``total``; percentiles between two values are interpolated. No rows without timings."""
    if not timings:
        return {}
    table = {}
    for step in _STEPS:
        values = np.percentile([getattr(each, f"{step}_ms") for each in timings], (50, 95, 99))
        table[step] = {f"p{p}_ms": round(float(value), 3) for p, value in zip((50, 95, 99), values, strict=True)}
    return table


def peak_memory_bytes() -> int:
    """The most main memory that this process has had so far, with the files that it has mapped and read."""
    try:
        # On Linux the figure of getrusage begins with the memory of the program that started this one.
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, others KiB
