"""Traces of torch.profiler: one of an H200 (in data/, with fewer fields), one made here, and damaged ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nsys_files import assert_table_or_one_line
from torch.profiler import ProfilerActivity, profile, record_function

from tetra.profiling.events import NO_RANGE, ReadError, readable, table
from tetra.profiling.readers import read

TRACE = Path(__file__).parent / "data" / "trace.json.gz"


def test_a_trace_of_a_gpu() -> None:
    found = read(TRACE)
    assert (found.tool, found.device, found.notices) == ("torch", "NVIDIA H200", [])
    with gzip.open(TRACE) as file:
        events = json.load(file)["traceEvents"]
    gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    assert len(found.activities) == len(gpu) == 160
    assert found.total_ns == pytest.approx(1000 * sum(e["dur"] for e in gpu), abs=len(gpu))
    ranges = {row.name: row for row in table(found, "range")}
    assert set(ranges) == {"tetra.describe", "tetra.search"}
    # The tool's own projection of ranges to the GPU covers the same kernels.
    for span in (e for e in events if e.get("cat") == "gpu_user_annotation"):
        inside = [e for e in gpu if span["ts"] <= e["ts"] and e["ts"] + e["dur"] <= span["ts"] + span["dur"] + 0.01]
        assert ranges[span["name"]].count == len(inside)
        assert ranges[span["name"]].time_ns == pytest.approx(1000 * sum(e["dur"] for e in inside), abs=len(inside))
    kernels = {readable(row.name): row for row in table(found)}
    products = [e for e in gpu if e["name"] == "_ternary_matmul_kernel"]
    assert kernels["_ternary_matmul_kernel"].count == len(products) == 24


def test_a_trace_of_this_machine(tmp_path: Path) -> None:
    x = torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("outer"):
        x @ x
        with record_function("inner"):
            torch.nn.functional.layer_norm(x, [64])
    torch.ones(1)
    path = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(path))
    found = read(path)
    assert not found.is_of_gpu
    assert any("CPU" in notice for notice in found.notices)
    ranges = {row.name: row for row in table(found, "range")}
    assert ranges["outer"].time_ns > ranges["outer"].own_ns > 0
    assert ranges["inner"].calls == 1
    # Operators' own times are what they take without their callees: together no more than the range around them.
    assert found.total_ns <= ranges["outer"].wall_ns  # type: ignore[operator]
    averages = {event.key: event for event in profiler.key_averages()}
    kernels = {row.name: row for row in table(found)}
    for name in ("aten::mm", "aten::native_layer_norm"):
        assert kernels[name].count == averages[name].count
        assert kernels[name].time_ns / 1000 == pytest.approx(averages[name].self_cpu_time_total, abs=5)


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def write(path: Path, events: object, **more: Any) -> Path:
    path.write_text(json.dumps({"traceEvents": events, **more}))
    return path


def test_payloads_and_nesting(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json",
        [
            event("user_annotation", "describe", 0, 100, shape="[1, 3, 224, 224]", bytes=150528),
            event("user_annotation", "stem", 10, 20),
            event("cuda_runtime", "cudaLaunchKernel", 15, 5, correlation=1),
            event("kernel", "k", 200, 7, 99, correlation=1),
            event("cuda_driver", "cuLaunchKernelEx", 50, 5, correlation=2),
            event("kernel", "k", 210, 3, 99, correlation=2),
            event("cpu_op", "aten::copy_", 60, 5, **{"External id": 9}),
            event("gpu_memcpy", "Memcpy", 220, 2, 99, **{"External id": 9, "bytes": 64}),
            event("kernel", "unknown", 230, 1, 99),
        ],
    )
    found = read(path)
    assert found.spans[0].shape == (1, 3, 224, 224)
    rows = {row.name: row for row in table(found, "range")}
    assert (rows["describe"].time_ns, rows["describe"].own_ns, rows["stem"].own_ns) == (12000, 5000, 7000)
    assert (rows["describe"].n_bytes, rows["describe"].input_bytes) == (64, 150528)
    assert rows[NO_RANGE].time_ns == 1000


def own_us(path: Path, *operators: tuple[str, float, float]) -> dict[str, float]:
    """Own times, of operators given by name, start and end."""
    found = read(write(path, [event("cpu_op", name, start, end - start) for name, start, end in operators]))
    return {activity.name: activity.duration_ns / 1000 for activity in found.activities}


def test_operators_that_end_after_their_caller_lose_no_time(tmp_path: Path) -> None:
    found = own_us(tmp_path / "a.json", ("a", 0, 10), ("c", 2, 3), ("b", 5, 15))
    assert found == {"a": 4, "c": 1, "b": 10}
    # d ends after its caller b, which ends before its own: what d has of a is a's no more.
    found = own_us(tmp_path / "a.json", ("a", 0, 10), ("b", 5, 8), ("d", 6, 9))
    assert found == {"a": 6, "b": 1, "d": 3}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operators=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), min_size=1, max_size=12))
def test_own_times_add_up_to_the_time_that_the_thread_was_busy(
    tmp_path: Path, operators: list[tuple[int, int]]
) -> None:
    found = own_us(tmp_path / "a.json", *((str(i), start, start + size) for i, (start, size) in enumerate(operators)))
    assert all(time >= 0 for time in found.values())
    assert sum(found.values()) == len({us for start, size in operators for us in range(start, start + size)})


def test_traces_without_ranges_and_bare_lists(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([event("kernel", "k", 0, 1)]))
    assert [row.name for row in table(read(path), "range")] == [NO_RANGE]


def test_events_that_make_no_sense_are_left_out_and_counted(tmp_path: Path) -> None:
    good = event("kernel", "k", 0, 1)
    bad = [7, None, {**good, "ts": "soon"}, {**good, "dur": -1}, {**good, "dur": 1e400}, {**good, "dur": True}]
    bad.append({**good, "dur": 10**307})
    bad.append({key: value for key, value in good.items() if key != "name"})
    found = read(write(tmp_path / "a.json", [good, *bad, {"ph": "M"}, {**good, "args": [], "tid": "word"}]))
    assert len(found.activities) == 2
    assert found.notices == [f"{len(bad)} events of the trace were not understood and left out"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"{", "cut short"),
        (b"[" * 100_000, "cut short"),
        (b'{"a": 1}', "traceEvents"),
        (b'{"traceEvents": {}}', "traceEvents"),
        (b'{"traceEvents": []}', "was anything profiled"),
        (b"hello", "neither"),
        (b"\xff\xfe\x00\x01" * 50, "neither"),
        (b"\x1f\x8b\x08\x00 not gzip", "damaged or cut short"),
        (gzip.compress(b"hello", mtime=0), "neither"),
        (TRACE.read_bytes()[:9000], "damaged or cut short"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ReadError, match=words) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReadError, match="No such file"):
        read(tmp_path / "nowhere.json")
    with pytest.raises(ReadError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(ReadError, match="not a plain file"):
        read("/dev/null")
    with pytest.raises(ReadError, match="nsys export"):
        read("a.nsys-rep")
    with pytest.raises(ReadError, match="ncu --import"):
        read("a.ncu-rep")
    with pytest.raises(ReadError, match=r"--type=sqlite 'my run\.nsys-rep'"):
        read("my run.nsys-rep")
    monkeypatch.setattr("tetra.profiling.readers.MAX_BYTES", 1000)
    with pytest.raises(ReadError, match="more than 1,000 bytes"):
        read(TRACE)


NAMES = st.sampled_from(["ph", "cat", "name", "ts", "dur", "pid", "tid", "args", "traceEvents", "correlation", "shape"])
WORDS = st.sampled_from(["X", "kernel", "cpu_op", "user_annotation", "cuda_runtime", "gpu_memcpy"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(NAMES, inner, max_size=8),
    max_leaves=40,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(VALUES, max_size=8))
def test_any_json_gives_a_table_or_one_line(tmp_path: Path, events: list[Any]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"traceEvents": [*events, event("kernel", "k", 0, 1)]}))
    assert table(read(path))
    path.write_text(json.dumps(events))
    assert_table_or_one_line(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), prefix=st.sampled_from([b"", b"{", b"[{", b"\x1f\x8b", b'"ID",', b"==PROF== "]))
def test_any_bytes_give_one_line(tmp_path: Path, content: bytes, prefix: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(prefix + content)
    with pytest.raises(ReadError) as error:
        read(path)
    assert "\n" not in str(error.value)
