"""The diary of benchmarks: what is in the file, whatever happens to it, and what two runs show."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tetra import diary
from tetra.diary import DiaryError, Run

FACTS = {
    "device": "cpu",
    "device_name": "Some CPU",
    "threads": 2,
    "versions": {"tetra": "1", "torch": "2"},
    "commit": "abc",
}


def row(variant: str = "tetra x", samples: Any = (1.0, 1.1, 1.2), **rest: Any) -> dict[str, Any]:
    samples = [float(s) for s in samples]
    figures = {"median_ms": float(np.median(samples)), "samples_ms": samples}
    return {"kernel": "attention", "shape": {"B": 1, "T": 530}, "variant": variant, **figures, **FACTS, **rest}


def run(rows: list[dict[str, Any]], name: str = "a", **environment: Any) -> Run:
    return Run(name, "", "bench kernels", {**FACTS, **environment}, rows)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "diary.jsonl"


# --- the file ----------------------------------------------------------------------------------------------


def test_a_run_comes_back_as_it_was(path: Path) -> None:
    rows = [row("torch fp32", batch=1), row("tetra x", batch=1)]
    run_id = diary.append(path, "bench kernels", rows)
    (found,) = diary.read_diary(path)
    assert (found.id, found.command) == (run_id, "bench kernels")
    assert found.environment == FACTS
    assert [{**r, **found.environment} for r in found.rows] == rows
    entry = json.loads(path.read_text())
    assert entry["format"] == "tetra-diary"
    assert entry["device"] == "Some CPU"
    assert entry["time"].endswith("+00:00")


def test_runs_are_named_by_age_and_by_the_beginning_of_their_id(path: Path) -> None:
    ids = [diary.append(path, "bench kernels", [row()]) for _ in range(3)]
    assert diary.find_run("last", path).id == ids[2]
    assert diary.find_run("last~2", path).id == ids[0]
    assert diary.find_run(ids[1][:8], path).id == ids[1]
    for text, words in (("last~3", "3 runs"), ("zz", "no run"), ("", "no run")):
        with pytest.raises(DiaryError, match=words):
            diary.find_run(text, path)


def write_many(path: Path, count: int) -> None:
    for _ in range(count):
        diary.append(path, "bench kernels", [row(samples=np.full(2000, 1.5))])


def test_processes_that_write_at_the_same_time_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_many, args=(path, 25)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    runs = diary.read_diary(path)
    assert len({r.id for r in runs}) == len(runs) == 100


def test_a_killed_writer_leaves_whole_runs(path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=write_many, args=(path, 100_000))
    process.start()
    while not path.exists() or path.stat().st_size < 200_000:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = len(diary.read_diary(path))
    assert before > 0
    run_id = diary.append(path, "bench kernels", [row()])
    runs = diary.read_diary(path)
    assert runs[-1].id == run_id
    assert len(runs) == before + 1


@pytest.mark.parametrize("kept", [1, 40, 0.5, 0.99])
def test_a_torn_last_line_costs_only_itself(path: Path, kept: float) -> None:
    first = diary.append(path, "bench kernels", [row()])
    whole = path.stat().st_size
    diary.append(path, "bench kernels", [row()])
    n_bytes = int(kept) if kept >= 1 else int(kept * whole)
    os.truncate(path, whole + n_bytes)
    notices: list[str] = []
    assert [r.id for r in diary.read_diary(path, notices)] == [first]
    assert len(notices) == 1
    assert "line 2" in notices[0]
    last = diary.append(path, "bench kernels", [row()])
    assert [r.id for r in diary.read_diary(path)] == [first, last]


@pytest.mark.parametrize(
    "text",
    ["hello\nworld\n", "[1, 2]\n", '{"format": "other"}\n', "\x00\xff\x00", '{"a": 1}\n{"b": 2}\n', "[" * 100_000],
)
def test_foreign_files_are_refused_and_not_written_to(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(DiaryError, match=r"is no diary|can't be"):
        diary.check_diary(path)
    assert path.read_text() == text


def test_a_run_of_a_newer_release_is_left_out(path: Path) -> None:
    first = diary.append(path, "bench kernels", [row()])
    newer = json.loads(path.read_text()) | {"version": 2}
    with path.open("a") as file:
        file.write(json.dumps(newer) + "\n")
    notices: list[str] = []
    assert [r.id for r in diary.read_diary(path, notices)] == [first]
    assert "newer release" in notices[0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_diary_of_a_newer_release_says_so(path: Path, count: int) -> None:
    diary.append(path, "bench kernels", [row()])
    line = json.dumps(json.loads(path.read_text()) | {"version": 2}) + "\n"
    path.write_text(count * line)
    for read in (diary.read_diary, diary.check_diary):
        with pytest.raises(DiaryError, match=r"newer release \(version 2 .* reads 1\); update tetra"):
            read(path)
    assert path.read_text() == count * line


def test_a_diary_whose_lines_are_all_damaged_is_one_all_the_same(path: Path) -> None:
    diary.append(path, "bench kernels", [row()])
    entry = json.loads(path.read_text()) | {"version": None}
    path.write_text(2 * (json.dumps(entry) + "\n"))
    notices: list[str] = []
    assert diary.read_diary(path, notices) == []
    assert "line 1, 2" in notices[0]


@pytest.mark.parametrize("value", [float("nan"), -1.0, "1", True, None, 10**400, 1e-300])
def test_figures_that_are_no_times_are_not_read(path: Path, value: Any) -> None:
    diary.append(path, "bench kernels", [row()])
    entry = json.loads(path.read_text())
    entry["rows"][0]["samples_ms"] = [1.0, value]
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    notices: list[str] = []
    assert len(diary.read_diary(path, notices)) == 1
    assert notices


@pytest.mark.parametrize("environment", [{}, {"device": "cpu"}, {"device": "cpu", "device_name": ["x"]}, None])
def test_runs_of_an_unknown_machine_are_not_read(path: Path, environment: Any) -> None:
    diary.append(path, "bench kernels", [row()])
    entry = json.loads(path.read_text())
    with path.open("a") as file:
        file.write(json.dumps(entry | {"environment": environment}) + "\n")
    notices: list[str] = []
    assert len(diary.read_diary(path, notices)) == 1
    assert notices
    with path.open("a") as file:
        file.write(json.dumps(entry | {"environment": {"device": "cpu", "device_name": "x"}}) + "\n")
    assert diary.read_diary(path)[-1].environment["threads"] is None


@pytest.mark.parametrize(
    "environment",
    [
        *[{"threads": value} for value in (float("nan"), "2", [2], {}, True, 0, -1, 2.5, 10**400)],
        *[{"commit": value} for value in (float("nan"), 7, ["abc"])],
        *[{"versions": value} for value in (float("nan"), 2, ["torch", 2], {"torch": float("nan")}, {"torch": [2]})],
    ],
)
def test_environments_that_cannot_be_are_not_read(path: Path, environment: dict[str, Any]) -> None:
    diary.append(path, "bench kernels", [row()])
    entry = json.loads(path.read_text())
    with path.open("a") as file:
        file.write(json.dumps(entry | {"environment": FACTS | environment}) + "\n")
        file.write(json.dumps(entry | {"environment": FACTS | dict.fromkeys(environment)}) + "\n")
    notices: list[str] = []
    assert len(diary.read_diary(path, notices)) == 2  # what is not known may be missing
    assert "line 2" in notices[0]


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DiaryError, match="no file"):
        diary.check_diary(tmp_path)
    with pytest.raises(DiaryError, match="nothing was measured"):
        diary.append(tmp_path / "d", "bench", [])
    (tmp_path / "file").touch()
    with pytest.raises(DiaryError, match="folder"):
        diary.check_diary(tmp_path / "file" / "diary.jsonl")
    monkeypatch.setenv("TETRA_DIARY", str(tmp_path / "deep" / "er" / "diary.jsonl"))
    assert diary.check_diary() == tmp_path / "deep" / "er" / "diary.jsonl"


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs the device that is always full")
def test_a_full_disk_is_an_error_in_a_line() -> None:
    with pytest.raises(DiaryError, match="No space left"):
        diary.append(Path("/dev/full"), "bench", [row()])


# --- what two runs show ------------------------------------------------------------------------------------


def samples(seed: int, median: float, n: int = 15) -> list[float]:
    """Times as machines give them: skewed, some far off."""
    random = np.random.default_rng(seed)
    values = median * random.lognormal(0, 0.01, n)
    values[random.random(n) < 0.1] *= 1.5
    return [float(v) for v in values]


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "faster"), (1.1, "slower"), (0.5, "faster"), (2.0, "slower")])
def test_effects_far_above_the_noise_are_found(factor: float, verdict: str) -> None:
    found = []
    for seed in range(40):
        a, b = row(samples=samples(seed, 3.0)), row(samples=samples(1000 + seed, 3.0 * factor))
        (compared,) = diary.compare(run([a]), run([b], "b"))
        assert compared.low is not None
        assert compared.high is not None
        assert compared.low <= compared.ratio <= compared.high
        found.append(compared.verdict)
    # Some samples hold so many slow calls that they show nothing; none shows the opposite.
    assert found.count(verdict) >= 36
    assert set(found) <= {verdict, "no difference shown"}


def test_noise_alone_shows_nothing() -> None:
    wrong = 0
    for seed in range(200):
        a, b = row(samples=samples(seed, 3.0)), row(samples=samples(1000 + seed, 3.0))
        wrong += diary.compare(run([a]), run([b], "b"))[0].verdict != "no difference shown"
    assert wrong <= 4  # of 200: at 99% two are expected, and differences below 1% never count


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        a, b = random.lognormal(0, 0.05, 41), 1.2 * random.lognormal(0, 0.05, 41)
        low, high = diary.ratio_interval(list(a), list(b), random, confidence=0.9)
        inside += low <= 1.2 <= high
    assert 0.8 <= inside / 100 <= 0.98


def test_small_differences_do_not_count_however_sure() -> None:
    a, b = row(samples=[1.0] * 50), row(samples=[1.009] * 50)
    assert diary.compare(run([a]), run([b]))[0].verdict == "no difference shown"
    assert diary.compare(run([a]), run([b]), threshold_percent=0.5)[0].verdict == "slower"


def test_a_comparison_says_the_same_twice() -> None:
    a, b = run([row(samples=samples(1, 1.0))]), run([row(samples=samples(2, 1.02))])
    assert diary.compare(a, b) == diary.compare(a, b)


def test_few_samples_are_no_evidence() -> None:
    a, b = row(samples=[1.0, 1.0, 1.0, 1.0]), row(samples=[2.0] * 30)
    (compared,) = diary.compare(run([a]), run([b]))
    assert (compared.verdict, compared.low, compared.ratio) == ("too few samples", None, 2.0)
    bare = {k: v for k, v in row().items() if k != "samples_ms"}
    assert diary.compare(run([bare]), run([bare]))[0].verdict == "too few samples"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"device_name": "Other CPU"}, ["devices", "Some CPU", "Other CPU"]),
        ({"device": "cuda"}, ["kinds of device", "cpu", "cuda"]),
        ({"threads": 4}, ["threads", "2", "4"]),
    ],
)
def test_other_machines_are_not_compared(other: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DiaryError) as caught:
        diary.compare(run([row()], "first"), run([row()], "second", **other))
    for word in (*words, "first", "second"):
        assert word in str(caught.value)


def test_other_shapes_are_not_compared() -> None:
    with pytest.raises(DiaryError) as caught:
        diary.compare(run([row()], "first"), run([row(shape={"B": 8, "T": 530})], "second"))
    for word in ("shapes", "B=1", "B=8", "first", "second"):
        assert word in str(caught.value)
    with pytest.raises(DiaryError, match="variants"):
        diary.compare(run([row("x")]), run([row("y")]))
    with pytest.raises(DiaryError, match="no times"):
        diary.compare(run([{"stage": "distill", **FACTS}]), run([row()]))


def test_what_is_in_one_run_alone_is_left_out() -> None:
    a = run([row(), row("tetra y"), row(shape={"B": 2, "T": 530})])
    b = run([row(), row("tetra z")])
    assert [(c.variant, c.setting) for c in diary.compare(a, b)] == [("tetra x", "attention B=1 T=530")]


def test_changes_between_runs_are_told() -> None:
    b = run([row()], versions={"tetra": "1", "torch": "3"}, commit="def")
    assert diary.changes(run([row()]), b) == ["commit: abc in A, def in B", "torch: 2 in A, 3 in B"]


def test_files_of_json_are_runs_too(tmp_path: Path, path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row(), row("tetra y")]))
    found = diary.find_run(str(file))
    assert found.environment == FACTS
    diary.append(path, "bench kernels", [row()])
    last = diary.append(path, "bench kernels", [row()])
    assert diary.find_run(str(path)).id == last
    for text in ("{}", "[]", "[1]", '[{"a": 1}]', "{", '"x"'):
        file.write_text(text)
        with pytest.raises(DiaryError, match=r"no figures|no diary|no whole run"):
            diary.find_run(str(file))
    with pytest.raises(DiaryError, match="no such file"):
        diary.find_run(str(tmp_path / "missing.json"))
    file.write_text(json.dumps([row(), row("tetra y", device_name="Other")]))
    with pytest.raises(DiaryError, match="several machines"):
        diary.find_run(str(file))
    file.write_text('{"format":"tetra-diary","version":2}')
    with pytest.raises(DiaryError, match="newer release"):
        diary.find_run(str(file))
    file.write_text('{"format":"tetra-diary","version":1}')
    with pytest.raises(DiaryError, match="no whole run"):
        diary.find_run(str(file))
    for threads in (float("nan"), 10**400):
        file.write_text(json.dumps([row(threads=threads)]))
        with pytest.raises(DiaryError, match="no figures"):
            diary.find_run(str(file))


def test_history_has_a_point_a_run_and_variant() -> None:
    points = diary.history([run([row(samples=samples(1, 2.0)), row("tetra y", samples=[1.0])], "a"), run([row()], "b")])
    assert [(p["run"], p["variant"]) for p in points] == [("a", "tetra x"), ("a", "tetra y"), ("b", "tetra x")]
    assert points[0]["low"] <= points[0]["median_ms"] <= points[0]["high"]
    assert points[1]["low"] is None
