"""Databases with the tables that ``nsys export --type=sqlite`` writes, and what every reader has to hold to."""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tetra.profiling.events import ReadError, table
from tetra.profiling.readers import read

# As the exporter declares them, in the order of its columns; not every column that it has.
SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE ENUM_NSYS_EVENT_TYPE (id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
CREATE TABLE TARGET_INFO_GPU (
    vmId INTEGER NOT NULL, id INTEGER NOT NULL, name TEXT, busLocation TEXT NOT NULL, smCount INTEGER,
    memoryBandwidth INTEGER, chipName TEXT, computeMajor INTEGER, computeMinor INTEGER);
CREATE TABLE NVTX_EVENTS (
    start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL REFERENCES ENUM_NSYS_EVENT_TYPE(id),
    rangeId INTEGER, category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER,
    textId INTEGER REFERENCES StringIds(id), domainId INTEGER, uint64Value INTEGER, int64Value INTEGER,
    doubleValue REAL, uint32Value INTEGER, int32Value INTEGER, floatValue REAL, jsonTextId INTEGER, jsonText TEXT,
    binaryData BLOB);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (
    start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL, globalTid INTEGER,
    correlationId INTEGER, nameId INTEGER NOT NULL REFERENCES StringIds(id), returnValue INTEGER NOT NULL,
    callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (
    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL,
    streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL,
    shortName INTEGER NOT NULL, mangledName INTEGER, launchType INTEGER, registersPerThread INTEGER NOT NULL,
    gridX INTEGER NOT NULL, gridY INTEGER NOT NULL, gridZ INTEGER NOT NULL, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (
    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL,
    streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, bytes INTEGER NOT NULL,
    copyKind INTEGER NOT NULL, graphNodeId INTEGER);
"""

PUSH_POP, START_END, DOMAIN = 59, 60, 75


def global_tid(process: int, thread: int) -> int:
    """As nsys serialises them: hardware and machine in the highest bits, then process, then thread."""
    return (1 << 56) | (process << 24) | thread


def payload(n_bytes: int, *shape: int) -> bytes:
    """A structured payload: a header of domain, schema, size of the payload and of all, then the fields."""
    body = struct.pack(f"<{1 + len(shape)}q", n_bytes, *shape)
    return struct.pack("<4q", 1, 17, len(body), 32 + len(body)) + body


class Export:
    """A database in the making; times are nanoseconds."""

    def __init__(self, path: Path, schema: str = SCHEMA) -> None:
        self.path = path
        self._strings: dict[str, int] = {}
        self._correlation = 0
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(schema)
        if "TARGET_INFO_GPU" in schema:
            self.insert("TARGET_INFO_GPU", vmId=0, id=0, name="NVIDIA H200", busLocation="0000:00:00.0", smCount=132)
        if "ENUM_NSYS_EVENT_TYPE" in schema:
            names = {PUSH_POP: "NvtxPushPopRange", START_END: "NvtxStartEndRange", DOMAIN: "NvtxDomainCreate"}
            for number, name in names.items():
                self.insert("ENUM_NSYS_EVENT_TYPE", id=number, name=name)

    def insert(self, table: str, **values: Any) -> None:
        """Columns that the table lacks are left out: older versions have fewer."""
        with closing(sqlite3.connect(self.path)) as connection, connection:
            there = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
            kept = {name: value for name, value in values.items() if name in there}
            names = ", ".join(f'"{name}"' for name in kept)
            marks = ", ".join("?" * len(kept))
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(kept.values()))

    def string(self, text: str) -> int:
        if text not in self._strings:
            self._strings[text] = 100 + len(self._strings)
            self.insert("StringIds", id=self._strings[text], value=text)
        return self._strings[text]

    def range(
        self,
        name: str,
        start: int,
        end: int | None,
        thread: tuple[int, int] = (7, 7),
        *,
        registered: bool = True,
        kind: int = PUSH_POP,
        **values: Any,
    ) -> None:
        text = {"textId": self.string(name)} if registered else {"text": name}
        where = {"globalTid": global_tid(*thread), "domainId": 1}
        self.insert("NVTX_EVENTS", start=start, end=end, eventType=kind, **text, **where, **values)

    def launch(self, at: int, thread: tuple[int, int] = (7, 7), name: str = "cudaLaunchKernel_v7000") -> int:
        self._correlation += 1
        self.insert(
            "CUPTI_ACTIVITY_KIND_RUNTIME",
            start=at,
            end=at + 5,
            eventClass=0,
            globalTid=global_tid(*thread),
            correlationId=self._correlation,
            nameId=self.string(name),
            returnValue=0,
        )
        return self._correlation

    def kernel(self, name: str, start: int, end: int, correlation: int, process: int = 7) -> None:
        common = dict.fromkeys(("deviceId", "contextId", "registersPerThread", "gridX", "gridY", "gridZ"), 1)
        self.insert(
            "CUPTI_ACTIVITY_KIND_KERNEL",
            start=start,
            end=end,
            streamId=7,
            correlationId=correlation,
            globalPid=global_tid(process, 0),
            demangledName=self.string(name),
            shortName=self.string(name.partition("(")[0]),
            **common,
        )

    def copy(self, start: int, end: int, correlation: int, n_bytes: int, kind: int, process: int = 7) -> None:
        where = {"deviceId": 0, "contextId": 1, "streamId": 7, "globalPid": global_tid(process, 0)}
        self.insert(
            "CUPTI_ACTIVITY_KIND_MEMCPY",
            start=start,
            end=end,
            correlationId=correlation,
            bytes=n_bytes,
            copyKind=kind,
            **where,
        )


def two_blocks(path: Path, scale: int = 1, extra: Sequence[str] = ()) -> Path:
    """describe [0, 1000] with blocks.0 and blocks.1, two kernels in each, that run after all ranges are closed."""
    export = Export(path)
    export.range("describe", 0, 1000, binaryData=payload(150528, 1, 3, 224, 224))
    for i, start in enumerate((100, 500)):
        export.range(f"blocks.{i}", start, start + 300, int64Value=4096)
        for j, name in enumerate(("_row_quantize_kernel", "_ternary_matmul_kernel")):
            number = export.launch(start + 50 + 100 * j)
            begin = 5000 + 1000 * (2 * i + j)
            export.kernel(name, begin, begin + scale * (100 if j == 0 else 400), number)
    export.copy(9000, 9050, export.launch(900, name="cudaMemcpyAsync_v3020"), 64, 1)
    for name in extra:
        export.kernel(name, 20000, 20300, export.launch(1500))
    return path


def assert_table_or_one_line(path: Path) -> None:
    """Whatever a file holds, reading it gives a table, or an error of one line that names it."""
    try:
        profile = read(path)
    except ReadError as error:
        message = str(error)
    else:
        message = f"{path}: can be read"
        assert all(row.time_ns >= 0 for row in table(profile, "range") + table(profile, "kernel"))
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
