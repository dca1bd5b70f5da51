"""Reads the SQLite export of Nsight Systems (``nsys export --type=sqlite``).

Tables appear only where something was recorded, and columns come and go with versions: each is looked for. A kernel
has the ``correlationId`` of the CUDA call that launched it, and that call a thread and a time. Names are numbers of
``StringIds``. A global thread id holds the process in its upper bits and the thread in its lower 24.

Source of the schema: "SQLite Schema Reference" in the user guide of Nsight Systems.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from tetra.profiling.events import Activity, Kind, Profile, ReadError, Span, Thread, activities_of, attribute

_LAUNCHES = ("CUPTI_ACTIVITY_KIND_RUNTIME", "CUPTI_ACTIVITY_KIND_DRIVER")
_GPU: dict[str, Kind] = {
    "CUPTI_ACTIVITY_KIND_KERNEL": "kernel",
    "CUPTI_ACTIVITY_KIND_MEMCPY": "copy",
    "CUPTI_ACTIVITY_KIND_MEMSET": "fill",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": "graph",  # with --cuda-graph-trace=graph: one event for all of its kernels
}
_COPIES = {1: "HtoD", 2: "DtoH", 8: "DtoD", 10: "PtoP"}
_EVENT_TYPES = {"NvtxPushPopRange": 59, "NvtxStartEndRange": 60, "NvtxDomainCreate": 75}
_PAYLOAD_HEADER = 32  # bytes before a structured payload: domain, schema, its size, all sizes

Correlation = tuple[int, int]  # process, number


def read(path: Path) -> Profile:
    """
    Raises:
        ReadError: damaged, or not of nsys.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            connection.text_factory = lambda data: data.decode("utf-8", "replace")
            return _Export(path, connection).profile()
    except (sqlite3.Error, UnicodeError, OverflowError, MemoryError) as error:
        raise ReadError(f"{path}: the database is damaged or cut short ({error}); export it again") from None


class _Export:
    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path, self.connection = path, connection
        found = connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
        self.tables = {name for (name,) in found if isinstance(name, str)}
        self.n_strange = 0

    def rows(self, table: str, *columns: str) -> Iterator[tuple[Any, ...]]:
        """Values of ``columns``, None for those that this version lacks."""
        if table not in self.tables:
            return
        here = {row[1] for row in self.connection.execute(f'PRAGMA table_info("{table}")')}
        wanted = ", ".join(f'"{column}"' if column in here else "NULL" for column in columns)
        yield from self.connection.execute(f'SELECT {wanted} FROM "{table}"')

    def profile(self) -> Profile:
        if not self.tables & {*_GPU, *_LAUNCHES, "NVTX_EVENTS", "TARGET_INFO_GPU", "ANALYSIS_DETAILS"}:
            raise ReadError(f"{self.path}: is a database, but none that nsys exported")
        strings = {key: text for key, text in self.rows("StringIds", "id", "value") if isinstance(text, str)}
        spans, n_open = self._spans(strings)
        launches = self._launches()
        on_gpu, at = self._on_gpu(strings, launches)
        activities = [
            Activity(a.name, a.kind, a.start_ns, a.duration_ns, path, a.n_bytes)
            for a, path in zip(on_gpu, attribute(at, spans), strict=True)
        ]
        if not (activities or spans):
            raise ReadError(f"{self.path}: an export of nsys without kernels and ranges; trace cuda and nvtx")
        notices = []
        if self.n_strange:
            notices.append(f"{self.n_strange} rows of the database were not understood and left out")
        if n_open:
            notices.append(f"{n_open} ranges were still open when recording ended; they count up to there")
        if not activities:
            notices.append("the export has no kernels: times are of ranges on the CPU")
            activities = activities_of(spans)
        device = next((n for (n,) in self.rows("TARGET_INFO_GPU", "name") if isinstance(n, str)), None)
        return Profile(self.path, "nsys", device, activities, spans, notices)

    def _event_types(self) -> dict[str, int]:
        listed = {
            name: number
            for number, name in self.rows("ENUM_NSYS_EVENT_TYPE", "id", "name")
            if name in _EVENT_TYPES and isinstance(number, int)
        }
        return {**_EVENT_TYPES, **listed}

    def _spans(self, strings: dict[Any, str]) -> tuple[list[Span], int]:
        types = self._event_types()
        ranges = {None, types["NvtxPushPopRange"], types["NvtxStartEndRange"]}
        spans: list[Span] = []
        still_open: list[tuple[str, int, Thread, Any]] = []
        columns = (
            "start",
            "end",
            "eventType",
            "text",
            "textId",
            "globalTid",
            "int64Value",
            "uint64Value",
            "binaryData",
        )
        for start, end, kind, text, text_id, thread_id, signed, unsigned, data in self.rows("NVTX_EVENTS", *columns):
            if kind not in ranges:
                continue
            name = text if isinstance(text, str) and text else strings.get(text_id)
            thread = _thread(thread_id)
            if name is None or not isinstance(start, int) or not (end is None or isinstance(end, int)):
                self.n_strange += 1
                continue
            n_bytes, shape = _payload(data)
            if n_bytes is None:
                n_bytes = next((v for v in (signed, unsigned) if isinstance(v, int) and v > 0), None)
            if end is None:
                still_open.append((name, start, thread, (n_bytes, shape)))
            elif end >= start:
                spans.append(Span(name, start, end, thread, n_bytes, shape))
            else:
                self.n_strange += 1
        last = self._last_moment()
        for name, start, thread, (n_bytes, shape) in still_open:
            spans.append(Span(name, start, max(start, last), thread, n_bytes, shape))
        return spans, len(still_open)

    def _last_moment(self) -> int:
        ends = [row[0] for table in (*_GPU, *_LAUNCHES, "NVTX_EVENTS") for row in self.rows(table, "end")]
        return max((end for end in ends if isinstance(end, int)), default=0)

    def _launches(self) -> dict[Correlation, tuple[Thread, int]]:
        found: dict[Correlation, tuple[Thread, int]] = {}
        for table in _LAUNCHES:
            for start, thread_id, number in self.rows(table, "start", "globalTid", "correlationId"):
                if isinstance(start, int) and isinstance(number, int):
                    thread = _thread(thread_id)
                    found[thread[0], number] = (thread, start)
                    found.setdefault((-1, number), (thread, start))  # for versions whose kernels don't name a process
        return found

    def _on_gpu(
        self, strings: dict[Any, str], launches: dict[Correlation, tuple[Thread, int]]
    ) -> tuple[list[Activity], list[tuple[Thread, int]]]:
        activities: list[Activity] = []
        at: list[tuple[Thread, int]] = []
        columns = ("start", "end", "correlationId", "globalPid", "demangledName", "shortName", "name", "bytes")
        for table, kind in _GPU.items():
            for start, end, number, process_id, *names, n_bytes, copy, graph in self.rows(
                table, *columns, "copyKind", "graphId"
            ):
                if not isinstance(start, int) or not isinstance(end, int) or end < start:
                    self.n_strange += 1
                    continue
                if kind == "copy":
                    name = f"copy {_COPIES.get(copy, '')}".strip()
                elif kind == "graph":
                    name = f"CUDA graph {graph}"
                else:
                    name = next((strings.get(n, n) for n in names if n is not None), kind)
                size = n_bytes if isinstance(n_bytes, int) and n_bytes >= 0 else None
                process = _thread(process_id)[0] if process_id is not None else -1
                activities.append(Activity(str(name), kind, start, end - start, (), size))
                launch = launches.get((process, number)) if isinstance(number, int) else None
                at.append(launch or ((-1, -1), start))
        return activities, at


def _thread(global_id: Any) -> Thread:
    if not isinstance(global_id, int):
        return -1, -1
    return global_id >> 24, global_id & 0xFFFFFF


def _payload(data: Any) -> tuple[int | None, tuple[int, ...] | None]:
    """Bytes and shape, of the payloads that ``tetra.profiling.ranges`` writes; None of others."""
    if not isinstance(data, bytes) or len(data) < _PAYLOAD_HEADER + 16 or len(data) % 8:
        return None, None
    values = struct.unpack(f"<{len(data) // 8}q", data)
    _, _, size, total = values[:4]
    if size != len(data) - _PAYLOAD_HEADER or total not in (len(data), _PAYLOAD_HEADER):
        return None, None
    n_bytes, *shape = values[4:]
    return (n_bytes, tuple(shape)) if n_bytes >= 0 and all(side >= 0 for side in shape) else (None, None)
