"""SQLite exports of Nsight Systems, made here with the tables and columns that it writes."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nsys_files import SCHEMA, START_END, Export, assert_table_or_one_line, global_tid, two_blocks

from tetra.profiling.events import NO_RANGE, ReadError, Row, table
from tetra.profiling.readers import read


def rows(path: Path, by: str = "range") -> dict[str, Row]:
    return {row.name: row for row in table(read(path), by)}  # type: ignore[arg-type]


def test_kernels_belong_to_the_ranges_around_their_launch(tmp_path: Path) -> None:
    profile = read(two_blocks(tmp_path / "a.sqlite"))
    assert (profile.tool, profile.device, profile.notices) == ("nsys", "NVIDIA H200", [])
    assert [a.path for a in profile.activities] == [
        ("describe", "blocks.0"),
        ("describe", "blocks.0"),
        ("describe", "blocks.1"),
        ("describe", "blocks.1"),
        ("describe",),
    ]
    found = {row.name: row for row in table(profile, "range")}
    assert (found["describe"].time_ns, found["describe"].own_ns, found["describe"].share) == (1050, 50, 1.0)
    assert (found["describe"].calls, found["describe"].wall_ns) == (1, 1000)
    assert found["describe"].n_bytes == 64  # of the copy
    assert found["describe"].input_bytes == 150528  # of the structured payload
    assert profile.spans[0].shape == (1, 3, 224, 224)
    assert (found["blocks.1"].time_ns, found["blocks.1"].count, found["blocks.1"].input_bytes) == (500, 2, 4096)
    kernels = {row.name: row for row in table(profile)}
    assert (kernels["_ternary_matmul_kernel"].time_ns, kernels["_ternary_matmul_kernel"].count) == (800, 2)
    assert kernels["copy HtoD"].n_bytes == 64
    assert sum(row.time_ns for row in kernels.values()) == profile.total_ns == 1050


REAL = Path(__file__).parent / "data" / "nsys_h200.sqlite"
"""By Nsight Systems 2023.4.4 on an H200, exported there: two images described in nano, one search between them. Only
the tables that matter here."""


def test_an_export_of_the_real_tool() -> None:
    profile = read(REAL)
    assert (profile.device, profile.notices) == ("NVIDIA H200", [])
    with closing(sqlite3.connect(REAL)) as connection:
        connection.execute(
            """CREATE TEMP VIEW on_gpu AS SELECT start, end, correlationId FROM CUPTI_ACTIVITY_KIND_KERNEL
            UNION ALL SELECT start, end, correlationId FROM CUPTI_ACTIVITY_KIND_MEMCPY"""
        )
        whole = connection.execute("SELECT count(*), sum(end - start) FROM on_gpu").fetchone()
        assert whole == (len(profile.activities), profile.total_ns)
        # What was launched while a range of a name was open, by the thread that had opened it.
        inside = """SELECT count(*), sum(g.end - g.start) FROM on_gpu g
            JOIN CUPTI_ACTIVITY_KIND_RUNTIME r USING (correlationId)
            JOIN NVTX_EVENTS n ON r.start BETWEEN n.start AND n.end AND r.globalTid = n.globalTid
            JOIN StringIds s ON s.id = n.textId WHERE s.value = ?"""
        found = {row.name: row for row in table(profile, "range")}
        for name in ("blocks.0", "mlp.up", "attention", "search"):
            assert (found[name].count, found[name].time_ns) == connection.execute(inside, (name,)).fetchone(), name
    assert (found["describe"].calls, found["search"].calls, found["mlp.up"].calls) == (2, 1, 12)
    assert found["describe"].input_bytes == 2 * 3 * 224 * 224
    assert found["describe"].time_ns > found["backbone"].time_ns > found["blocks"].time_ns > found["attention"].time_ns
    kernels = {row.name: row.count for row in table(profile)}
    layers = {"_ternary_matmul_kernel": 4, "_row_quantize_kernel": 4, "_attention_kernel": 1, "_layer_norm_kernel": 1}
    assert {name: kernels[name] for name in layers} == {name: 2 * 6 * n for name, n in layers.items()}
    assert kernels["_hamming_topk_kernel"] == 1


def test_threads_and_processes_are_kept_apart(tmp_path: Path) -> None:
    export = Export(tmp_path / "a.sqlite")
    export.range("mine", 0, 100, (7, 7))
    export.range("theirs", 0, 100, (8, 8))
    export.kernel("k", 500, 510, export.launch(50, (7, 7)), process=7)
    export.kernel("k", 600, 620, export.launch(50, (8, 8)), process=8)
    export.kernel("k", 700, 740, export.launch(50, (9, 9)), process=9)  # nothing is open in that process
    found = rows(export.path)
    assert {name: row.time_ns for name, row in found.items()} == {"mine": 10, "theirs": 20, NO_RANGE: 40}


def test_a_number_of_another_process_is_another_launch(tmp_path: Path) -> None:
    export = Export(tmp_path / "a.sqlite")
    export.range("mine", 0, 100, (7, 7))
    number = export.launch(50, (7, 7))
    export.kernel("k", 500, 510, number, process=8)
    assert set(rows(export.path)) == {"mine", NO_RANGE}


def test_a_backward_thread_counts_for_the_range_that_waits_for_it(tmp_path: Path) -> None:
    export = Export(tmp_path / "a.sqlite")
    export.range("backward", 0, 100, (7, 7))
    export.kernel("k", 500, 510, export.launch(50, (7, 70)))
    assert rows(export.path)["backward"].time_ns == 10
    export.range("read image", 40, 60, (7, 71))  # now two threads could have meant it
    assert rows(export.path)[NO_RANGE].time_ns == 10


def test_all_kernels_of_a_graph_belong_to_its_launch(tmp_path: Path) -> None:
    export = Export(tmp_path / "a.sqlite")
    export.range("describe", 0, 100)
    number = export.launch(50, name="cudaGraphLaunch_v10000")
    for i in range(3):
        export.kernel("k", 500 + i, 501 + i, number)
    assert rows(export.path)["describe"].count == 3


def test_ranges_that_started_and_ended_count_too(tmp_path: Path) -> None:
    export = Export(tmp_path / "a.sqlite")
    export.range("a", 0, 100, kind=START_END, registered=False)
    export.range("b", 50, 200, kind=START_END)  # which overlaps without being inside
    export.range("mark", 10, None, kind=34)
    export.kernel("k", 500, 510, export.launch(60))
    export.kernel("k", 600, 620, export.launch(150))
    assert {name: row.time_ns for name, row in rows(export.path).items()} == {"a": 10, "b": 30}


def test_a_range_that_never_ended_goes_on_to_the_last_event(tmp_path: Path) -> None:
    export = Export(tmp_path / "a.sqlite")
    export.range("describe", 0, None)
    export.kernel("k", 500, 510, export.launch(50))
    profile = read(export.path)
    assert profile.spans[0].end_ns == 510
    assert any("still open" in notice for notice in profile.notices)


def test_the_same_range_inside_itself_counts_once(tmp_path: Path) -> None:
    export = Export(tmp_path / "a.sqlite")
    export.range("map", 0, 100)
    export.range("map", 10, 60)
    export.kernel("k", 500, 510, export.launch(50))
    found = rows(export.path)["map"]
    assert (found.time_ns, found.calls, found.wall_ns) == (10, 2, 100)


OLDER = {
    "no ranges": re.sub(r"CREATE TABLE NVTX_EVENTS \(.*?\);", "", SCHEMA, flags=re.DOTALL),
    "no GPU table": re.sub(r"CREATE TABLE TARGET_INFO_GPU \(.*?\);", "", SCHEMA, flags=re.DOTALL),
    "no enumerations": re.sub(r"CREATE TABLE ENUM_NSYS_EVENT_TYPE \(.*?\);", "", SCHEMA).replace(
        " REFERENCES ENUM_NSYS_EVENT_TYPE(id)", ""
    ),
    "no payloads": SCHEMA.replace(", jsonTextId INTEGER, jsonText TEXT,\n    binaryData BLOB", ""),
    "no processes": SCHEMA.replace(" globalPid INTEGER,", ""),
    "short names only": SCHEMA.replace(" demangledName INTEGER NOT NULL,", ""),
}


@pytest.mark.parametrize("schema", OLDER.values(), ids=OLDER.keys())
def test_versions_that_lack_something(tmp_path: Path, schema: str) -> None:
    export = Export(tmp_path / "a.sqlite", schema)
    if "NVTX_EVENTS" in schema:
        export.range("describe", 0, 100, int64Value=12)
    export.kernel("k(int)", 500, 510, export.launch(50))
    profile = read(export.path)
    wanted = ("describe",) if "NVTX_EVENTS" in schema else ()
    assert [a.path for a in profile.activities] == [wanted]
    assert profile.activities[0].name == ("k(int)" if "demangledName" in schema else "k")
    assert profile.device == ("NVIDIA H200" if "TARGET_INFO_GPU" in schema else None)


def test_rows_that_make_no_sense_are_left_out_and_counted(tmp_path: Path) -> None:
    path = two_blocks(tmp_path / "a.sqlite")
    export = Export.__new__(Export)
    export.path = path
    nonsense = {"deviceId": 0, "contextId": 0, "streamId": 0, "demangledName": 1, "shortName": 1}
    sizes = dict.fromkeys(("registersPerThread", "gridX", "gridY", "gridZ"), 1)
    export.insert("CUPTI_ACTIVITY_KIND_KERNEL", start="early", end=5, **nonsense, **sizes)
    export.insert("CUPTI_ACTIVITY_KIND_KERNEL", start=9, end=5, **nonsense, **sizes)
    export.insert("NVTX_EVENTS", start=0, end=9, eventType=59, textId=999999, globalTid=global_tid(7, 7))
    profile = read(path)
    assert profile.total_ns == 1050
    assert profile.notices == ["3 rows of the database were not understood and left out"]


def database(path: Path, script: str) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


def test_other_databases(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="none that nsys exported"):
        read(database(tmp_path / "b.sqlite", "CREATE TABLE places (id INTEGER)"))
    with pytest.raises(ReadError, match="without kernels and ranges"):
        read(database(tmp_path / "c.sqlite", SCHEMA))
    with pytest.raises(ReadError, match="without kernels and ranges"):
        read(database(tmp_path / "d.sqlite", "CREATE VIEW NVTX_EVENTS AS SELECT 1 AS start, 2 AS other"))


def test_without_kernels_the_ranges_are_what_took_time(tmp_path: Path) -> None:
    export = Export(tmp_path / "a.sqlite")
    export.range("describe", 0, 100)
    export.range("blocks", 10, 60)
    export.range("blocks.0", 10, 30)
    export.range("describe", 200, 220)
    export.range("read image", 5, 95, (7, 70))  # of another thread
    export.range("overlaps", 210, 230, kind=START_END)  # and goes on after the range in which it began
    profile = read(export.path)
    assert any("no kernels" in notice for notice in profile.notices)
    assert not profile.is_of_gpu
    found = {row.name: row for row in table(profile, "range")}
    assert {name: (row.time_ns, row.own_ns, row.calls, row.wall_ns) for name, row in found.items()} == {
        "describe": (130, 60, 2, 120),  # what began in it is counted whole, as kernels are
        "blocks": (50, 30, 1, 50),
        "blocks.0": (20, 20, 1, 20),
        "read image": (90, 90, 1, 90),
        "overlaps": (20, 20, 1, 20),
    }
    assert profile.total_ns == sum(row.own_ns for row in found.values())
    assert {row.name: row.time_ns for row in table(profile)} == {row.name: row.own_ns for row in found.values()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_databases_never_end_in_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    source = tmp_path / "whole.sqlite"
    if not source.exists():
        two_blocks(source)
    whole = bytearray(source.read_bytes())
    if data.draw(st.booleans(), "cut"):
        whole = whole[: data.draw(st.integers(16, len(whole)), "length")]
    for _ in range(data.draw(st.integers(0, 8), "bytes changed")):
        whole[data.draw(st.integers(16, len(whole) - 1)) if len(whole) > 16 else 0] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(whole)
    assert_table_or_one_line(damaged)
