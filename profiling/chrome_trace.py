"""Reads Chrome traces of ``torch.profiler``.

Kernels have the ``correlation`` of the CUDA call that launched them; ranges are events of the category
``user_annotation``. A trace of a CPU has operators (``cpu_op``) alone: they are counted by their own time, without the
operators that they called.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from tetra.profiling.events import (
    MAX_INTEGER,
    Activity,
    Kind,
    Profile,
    ReadError,
    Span,
    Thread,
    activities_of,
    attribute,
)

_GPU: dict[str, Kind] = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "fill"}
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_READ = {*_GPU, *_LAUNCHES, "user_annotation", "cpu_op"}


class _Event:
    """A complete event whose fields have the right types."""

    __slots__ = ("arguments", "category", "duration", "name", "start", "thread")

    def __init__(self, event: dict[str, Any]) -> None:
        self.category = str(event["cat"])
        self.name = str(event["name"])
        self.start = _nanoseconds(event["ts"])
        self.duration = _nanoseconds(event["dur"])
        if self.duration < 0:
            raise ValueError
        self.thread: Thread = (_number(event.get("pid")), _number(event.get("tid")))
        arguments = event.get("args")
        self.arguments: dict[str, Any] = arguments if isinstance(arguments, dict) else {}

    @property
    def end(self) -> int:
        return self.start + self.duration

    def integer(self, name: str) -> int | None:
        value = self.arguments.get(name)
        is_one = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INTEGER
        return value if is_one else None


def _nanoseconds(microseconds: Any) -> int:
    if isinstance(microseconds, bool) or not isinstance(microseconds, (int, float)) or not math.isfinite(microseconds):
        raise ValueError
    nanoseconds = round(1000 * microseconds)
    if abs(nanoseconds) > MAX_INTEGER:
        raise ValueError
    return nanoseconds


def _number(value: Any) -> int:
    """Of a process or thread; traces have words for some of them."""
    return value if isinstance(value, int) else hash(value) if isinstance(value, str) else -1


def parse(path: Path, text: str) -> Profile:
    """
    Raises:
        ReadError: not a trace, or cut short.
    """
    try:
        trace = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReadError(f"{path}: is no JSON, or was cut short ({error}); write the trace again") from None
    events = trace.get("traceEvents") if isinstance(trace, dict) else trace
    if not isinstance(events, list):
        raise ReadError(f"{path}: is JSON, but no Chrome trace: it has no list 'traceEvents'")
    found: dict[str, list[_Event]] = defaultdict(list)
    n_strange = 0
    for event in events:
        if not isinstance(event, dict):
            n_strange += 1
        elif event.get("ph") == "X" and isinstance(event.get("cat"), str) and event["cat"] in _READ:
            try:
                found[event["cat"]].append(_Event(event))
            except (KeyError, TypeError, ValueError, OverflowError):
                n_strange += 1
    spans = [_span(event) for event in found["user_annotation"]]
    on_gpu = [(event, kind) for category, kind in _GPU.items() for event in found[category]]
    notices = [f"{n_strange} events of the trace were not understood and left out"] if n_strange else []
    if on_gpu:
        activities = _gpu_activities(on_gpu, found, spans)
    else:
        activities = _operators(found["cpu_op"], spans)
        if activities:
            notices.append(
                "the trace has nothing of a GPU: these are operators on the CPU, each without those it called"
            )
    if not (activities or spans):
        raise ReadError(f"{path}: a Chrome trace without kernels, operators or ranges; was anything profiled?")
    return Profile(path, "torch", _device(trace), activities, spans, notices)


def _span(event: _Event) -> Span:
    shape = event.arguments.get("shape")
    sizes = tuple(map(int, re.findall(r"\d{1,18}", shape))) if isinstance(shape, str) else None
    return Span(event.name, event.start, event.end, event.thread, event.integer("bytes"), sizes)


def _gpu_activities(
    on_gpu: list[tuple[_Event, Kind]], found: dict[str, list[_Event]], spans: list[Span]
) -> list[Activity]:
    by_correlation = {e.integer("correlation"): e for category in _LAUNCHES for e in found[category]}
    by_operator = {e.integer("External id"): e for e in found["cpu_op"]}
    by_correlation.pop(None, None)
    by_operator.pop(None, None)
    launches: list[tuple[Thread, int]] = []
    for event, _ in on_gpu:
        launch = by_correlation.get(event.integer("correlation")) or by_operator.get(event.integer("External id"))
        launches.append((launch.thread, launch.start) if launch else ((-1, -1), event.start))
    return [
        Activity(event.name, kind, event.start, event.duration, path, event.integer("bytes"))
        for (event, kind), path in zip(on_gpu, attribute(launches, spans), strict=True)
    ]


def _operators(events: list[_Event], spans: list[Span]) -> list[Activity]:
    operators = activities_of([Span(event.name, event.start, event.end, event.thread) for event in events], "operator")
    paths = attribute([(event.thread, event.start) for event in events], spans)  # of ranges, not of operators
    return [replace(operator, path=path) for operator, path in zip(operators, paths, strict=True)]


def _device(trace: Any) -> str | None:
    try:
        name = trace["deviceProperties"][0]["name"]
    except (KeyError, IndexError, TypeError):
        return None
    return name if isinstance(name, str) else None
