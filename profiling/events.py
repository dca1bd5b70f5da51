"""What every profiler's file is turned into: what ran on the GPU, the ranges around it, and tables of both.

Times are nanoseconds on whatever clock the tool used. A *path* is the names of the ranges that were open around a
launch, the outermost first. On a GPU a kernel runs long after it was launched: it belongs to the ranges that were open
where and when it was launched, not to those that are open while it runs.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Thread = tuple[int, int]  # process, thread
Kind = Literal["kernel", "copy", "fill", "graph", "operator", "range"]
By = Literal["range", "kernel"]

NO_RANGE = "(no range)"
MAX_INTEGER = 2**63 - 1
"""Of a time in nanoseconds or a number of bytes: what is larger was never measured, and sums of it may be no floats."""


class ReadError(ValueError):
    """A file is not what a profiler writes. One line: the file, what is wrong, the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a library's words may have more


@dataclass(frozen=True, slots=True)
class Span:
    """A range as it was opened and closed by one thread.

    Attributes:
        n_bytes, shape: its payload, where the file has one.
    """

    name: str
    start_ns: int
    end_ns: int
    thread: Thread
    n_bytes: int | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Activity:
    """Something that took time: on the GPU; or on the CPU, an operator or a range, where a file has nothing of a GPU.

    Attributes:
        duration_ns: of an operator or range without those inside it.
        n_bytes: memory traffic, where it was measured; of a copy or fill its size.
        metrics: what else was measured of it, by the tool's own names.
    """

    name: str
    kind: Kind
    start_ns: int
    duration_ns: int
    path: tuple[str, ...] = ()
    n_bytes: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Profile:
    """One file.

    Attributes:
        tool: that wrote it.
        device: name of the GPU, where the file has it.
        spans: none where a file only names the ranges of each kernel.
        notices: what the reader of a report should know, one line each.
    """

    source: Path
    tool: Literal["nsys", "ncu", "torch"]
    device: str | None
    activities: list[Activity]
    spans: list[Span]
    notices: list[str] = field(default_factory=list)

    @property
    def total_ns(self) -> int:
        return sum(activity.duration_ns for activity in self.activities)

    @property
    def is_of_gpu(self) -> bool:
        return not any(activity.kind in ("operator", "range") for activity in self.activities)


def attribute(launches: Sequence[tuple[Thread, int]], spans: Iterable[Span]) -> list[tuple[str, ...]]:
    """The path of each launch, given as (thread, time).

    A launch in a thread that has no range open, such as the one in which PyTorch runs backward passes, belongs to the
    ranges of the process's other thread that has some open then; to none if there are several such threads.
    """
    by_thread: dict[Thread, list[Span]] = defaultdict(list)
    for span in spans:
        by_thread[span.thread].append(span)
    for own in by_thread.values():
        own.sort(key=lambda span: (span.start_ns, -span.end_ns))
    waiting: dict[Thread, list[int]] = defaultdict(list)
    for number, (thread, _) in enumerate(launches):
        waiting[thread].append(number)
    paths: list[tuple[str, ...]] = [()] * len(launches)
    homeless: dict[int, list[int]] = defaultdict(list)
    for thread, numbers in waiting.items():
        for number, path in _sweep(numbers, launches, by_thread.get(thread, [])):
            paths[number] = path
            if not path:
                homeless[thread[0]].append(number)
    for process, numbers in homeless.items():
        found: dict[int, list[tuple[str, ...]]] = defaultdict(list)
        for thread, own in by_thread.items():
            if thread[0] == process:
                for number, path in _sweep(numbers, launches, own):
                    if path:
                        found[number].append(path)
        for number, candidates in found.items():
            if len(candidates) == 1:
                paths[number] = candidates[0]
    return paths


def _sweep(
    numbers: list[int], launches: Sequence[tuple[Thread, int]], spans: list[Span]
) -> Iterable[tuple[int, tuple[str, ...]]]:
    """(number, path) of launches, among spans of one thread in the order of their starts."""
    open_spans: list[Span] = []
    next_span = 0
    for number in sorted(numbers, key=lambda number: launches[number][1]):
        time = launches[number][1]
        while next_span < len(spans) and spans[next_span].start_ns <= time:
            open_spans.append(spans[next_span])
            next_span += 1
        open_spans = [span for span in open_spans if span.end_ns >= time]
        yield number, tuple(span.name for span in open_spans)


def activities_of(spans: Sequence[Span], kind: Kind = "range") -> list[Activity]:
    """Ranges or operators themselves, in their order, as what took time on the CPU: each without those that its thread
    opened in it. At every moment the one opened last counts, so that together they take as long as their threads did.
    """
    own = [span.end_ns - span.start_ns for span in spans]
    paths: list[tuple[str, ...]] = [()] * len(spans)
    by_thread: dict[Thread, list[int]] = defaultdict(list)
    for number, span in enumerate(spans):
        by_thread[span.thread].append(number)
    for numbers in by_thread.values():
        open_spans: list[int] = []
        for number in sorted(numbers, key=lambda n: (spans[n].start_ns, -spans[n].end_ns)):
            span = spans[number]
            open_spans = [outer for outer in open_spans if spans[outer].end_ns > span.start_ns]
            covered = span.start_ns
            for outer in reversed(open_spans):  # several, where it ends after the one that it was opened in
                inside = min(span.end_ns, spans[outer].end_ns) - covered
                if inside > 0:
                    own[outer] -= inside
                    covered += inside
            open_spans.append(number)
            paths[number] = tuple(spans[n].name for n in open_spans)
    return [
        Activity(span.name, kind, span.start_ns, time, path) for span, time, path in zip(spans, own, paths, strict=True)
    ]


# --- tables


@dataclass
class Row:
    """A line of a report.

    Attributes:
        time_ns: on the GPU (or of operators), of everything launched inside a range; of all launches of a kernel.
        own_ns: of a range without the ranges in it; of a kernel the same as ``time_ns``.
        share: of all time in the file.
        count: launches.
        calls: how often a range was opened; None where the file does not say.
        wall_ns: from opening to closing on the CPU, of ranges.
        n_bytes: sum of what is known of the launches; None where nothing is.
        input_bytes: sum of the payloads of ranges.
        metrics: means of what was measured of the launches.
    """

    name: str
    time_ns: int = 0
    own_ns: int = 0
    share: float = 0.0
    count: int = 0
    calls: int | None = None
    wall_ns: int | None = None
    n_bytes: int | None = None
    input_bytes: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def table(profile: Profile, by: By = "kernel") -> list[Row]:
    """Rows by name, the longest first. Times of ranges include those inside them: they add up to more than all."""
    rows = _by_range(profile) if by == "range" else _by_kernel(profile)
    total = profile.total_ns
    for row in rows:
        row.share = row.time_ns / total if total else 0.0
    return sorted(rows, key=lambda row: (-row.time_ns, -(row.wall_ns or 0), row.name))


def _add(row: Row, activity: Activity) -> None:
    row.time_ns += activity.duration_ns
    row.count += 1
    if activity.n_bytes is not None:
        row.n_bytes = (row.n_bytes or 0) + activity.n_bytes


def _by_kernel(profile: Profile) -> list[Row]:
    rows: dict[str, Row] = {}
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for activity in profile.activities:
        row = rows.setdefault(activity.name, Row(activity.name))
        _add(row, activity)
        row.own_ns = row.time_ns
        for metric, value in activity.metrics.items():
            values[activity.name, metric].append(value)
    for (name, metric), found in values.items():
        rows[name].metrics[metric] = math.fsum(found) / len(found)
    return list(rows.values())


def _by_range(profile: Profile) -> list[Row]:
    rows: dict[str, Row] = {}
    for activity in profile.activities:
        for name in {*activity.path} or {NO_RANGE}:
            _add(rows.setdefault(name, Row(name)), activity)
        rows[activity.path[-1] if activity.path else NO_RANGE].own_ns += activity.duration_ns
    ends: dict[tuple[Thread, str], int] = {}
    for span in sorted(profile.spans, key=lambda span: (span.start_ns, -span.end_ns)):
        row = rows.setdefault(span.name, Row(span.name))
        row.calls = (row.calls or 0) + 1
        if span.n_bytes is not None:
            row.input_bytes = (row.input_bytes or 0) + span.n_bytes
        if span.end_ns > ends.get((span.thread, span.name), span.start_ns - 1):  # not inside one of its own name
            row.wall_ns = (row.wall_ns or 0) + span.end_ns - span.start_ns
            ends[span.thread, span.name] = span.end_ns
    return list(rows.values())


_TEMPLATE = re.compile(r"<[^<>]*>")


def readable(name: str, width: int = 72) -> str:
    """A kernel's name for a table: no return type, parameters or template arguments, and not too long."""
    short = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    before = ""
    while before != short:
        before, short = short, _TEMPLATE.sub("", short)
    if not short.startswith("("):
        short = short.partition("(")[0]
    short = short.strip() or name
    return short if len(short) <= width else short[: width - 1] + "…"
