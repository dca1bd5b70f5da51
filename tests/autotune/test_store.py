"""Tuning results in files: bad files, several processes, processes that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tetra.autotune import store as stores
from tetra.autotune.store import (
    Identity,
    Results,
    Store,
    StoreError,
    TuningFileError,
    read_or_notice,
    read_results,
    write_results,
)

HERE = Identity(
    {"kind": "cuda", "name": "NVIDIA Test 1", "arch": "sm_80", "sms": 4, "driver": "1.2"}, {"triton": "3.6.0"}
)


def results(**changes: Any) -> dict[str, Any]:
    value = Results(
        "measured",
        dict(HERE.device),
        dict(HERE.toolchain),
        {"attention": "0123"},
        {"attention": {"t530": {"config": [64, 64, 4, 2], "measured_us": 1.5}}},
    ).to_json()
    return value | changes


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_results(path, Results.from_json(results(), path))
    assert read_results(path).to_json() == results()
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (json.dumps(results()).encode()[:-40], "no JSON"),
        (b"[]", "holds no tuning results"),
        (b'{"format": "something else"}', "name a file that `tetra tune` wrote"),
        (json.dumps(results(version=2)).encode(), "version 2 of the format, this release reads 1"),
        (json.dumps(results(version="1")).encode(), "version '1'"),
        (json.dumps(results(origin="guessed")).encode(), "origin is 'guessed'"),
        (json.dumps(results(device=None)).encode(), "no table 'device'"),
        (json.dumps(results(device={"kind": "tpu", "name": "x"})).encode(), "which device"),
        (json.dumps(results(device={"kind": "cuda", "name": "x", "arch": 80})).encode(), "arch is 80"),
        (json.dumps(results(kernels={"attention": 1})).encode(), "hash is no text"),
        (json.dumps(results(results={"attention": []})).encode(), "'attention' are no table"),
        (json.dumps(results(results={"attention": {"k": []}})).encode(), "'k' has no configuration"),
        (json.dumps(results(results={"attention": {"k": {"config": []}}})).encode(), "'k' has no configuration"),
        (json.dumps(results(results={"attention": {"k": {"config": [[1]]}}})).encode(), "'k' has no configuration"),
    ],
)
def test_bad_files_are_refused_and_ignored_by_look_ups(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(TuningFileError, match=r"bad\.json: ") as caught:
        read_results(path)
    assert words in str(caught.value)
    stores.forget_notices()
    with pytest.warns(UserWarning, match=r"ignored: .*bad\.json") as warned:
        found = [read_or_notice(path) for _ in range(3)]
    assert found == [None, None, None]
    assert len(warned) == 1


def test_any_part_of_a_file_is_refused_or_whole(tmp_path: Path) -> None:
    whole = json.dumps(results()).encode()
    path = tmp_path / "part.json"
    chance = random.Random(0)
    for _ in range(300):
        content = bytearray(whole[: chance.randrange(len(whole) + 1)])
        if content and chance.random() < 0.7:
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        with contextlib.suppress(TuningFileError):  # and nothing else
            found = read_results(path)
            assert found.results == json.loads(content)["results"]


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert read_or_notice(tmp_path / "none.json") is None
    with pytest.raises(TuningFileError, match="can't be read"):
        read_results(tmp_path)


def test_results_are_merged_and_those_of_changed_sources_go(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(HERE, {"attention": "a"}, "attention", "k1", {"config": [1]})
    store.add(HERE, {"attention": "a"}, "attention", "k2", {"config": [2]})
    store.add(HERE, {"row_quantize": "r"}, "row_quantize", "k1", {"config": [3]})
    store.add(HERE, {"attention": "a"}, "attention", "k2", {"config": [4]})
    found = read_results(store.path_of(HERE))
    assert found.results["attention"] == {"k1": {"config": [1]}, "k2": {"config": [4]}}
    store.add(HERE, {"attention": "b"}, "attention", "k3", {"config": [5]})
    found = read_results(store.path_of(HERE))
    assert found.results == {"attention": {"k3": {"config": [5]}}, "row_quantize": {"k1": {"config": [3]}}}
    assert found.kernels == {"attention": "b", "row_quantize": "r"}


def test_every_identity_has_a_file(tmp_path: Path) -> None:
    other = Identity({**HERE.device, "driver": "1.3"}, HERE.toolchain)
    newer = Identity(HERE.device, {"triton": "3.7.0"})
    names = {identity.file_name for identity in (HERE, other, newer)}
    assert len(names) == 3
    assert all(name.startswith("cuda-nvidia-test-1-sm_80-") for name in names)
    found = Results.from_json(results(), "x")
    assert HERE.difference(found) is None
    assert other.difference(found) == "driver was 1.2, here it is 1.3"
    assert newer.difference(found) == "triton was 3.6.0, here it is 3.7.0"


def test_an_unusable_file_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.path_of(HERE)
    path.write_text("{ half")
    stores.forget_notices()
    with pytest.warns(UserWarning, match="renamed"):
        store.add(HERE, {"attention": "a"}, "attention", "k1", {"config": [1]})
    assert read_results(path).results == {"attention": {"k1": {"config": [1]}}}
    assert path.with_name(path.name + ".unusable").read_text() == "{ half"


def test_clear(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    assert store.clear() == 0
    store = Store(tmp_path)
    for kernel in ("attention", "row_quantize"):
        for key in ("a", "b"):
            store.add(HERE, {kernel: "a"}, kernel, key, {"config": [1]})
    (tmp_path / "foreign.json").write_text("no")
    assert store.clear("attention") == 2
    assert list(read_results(store.path_of(HERE)).results) == ["row_quantize"]
    assert store.clear() == 2
    assert store.files() == []


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/tetra")):
        with pytest.raises(StoreError, match=rf"{folder}: .* set TETRA_TUNING_DIR"):
            Store(folder).check_writable()
        with pytest.raises(StoreError, match=rf"{folder}: .* set TETRA_TUNING_DIR"):
            Store(folder).add(HERE, {}, "attention", "k", {"config": [1]})
        assert Store(folder).files() == []


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(HERE, {}, "attention", "k", {"config": [1]})
    before = store.path_of(HERE).read_bytes()
    code = (
        "import resource, signal, sys; from tetra.autotune.store import *;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100));"
        f"here = Identity({HERE.device!r}, {HERE.toolchain!r});"
        f"Store({str(tmp_path)!r}).add(here, {{}}, 'attention', 'l', {{'config': [2]}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "StoreError" in done.stderr
    assert "can't be written: File too large" in done.stderr
    assert store.path_of(HERE).read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_lock_that_is_held_is_waited_for_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
            "print('held', flush=True); time.sleep(100)",
            str(tmp_path / ".lock"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(stores, "LOCK_WAIT_S", 0.2)
        with pytest.raises(StoreError, match="another process has held the lock"):
            Store(tmp_path).add(HERE, {}, "attention", "k", {"config": [1]})
    finally:
        holder.kill()
        holder.wait()
    Store(tmp_path).add(HERE, {}, "attention", "k", {"config": [1]})  # it went with its holder


# --- processes that are killed ---------------------------------------------------------------------------------

# Tunes problems that the others tune too: after each it says so. Without torch and the rest it starts at once.
_TUNER = """
import sys
sys.modules["tetra.kernels.tunable"] = type(sys)("tunable")
sys.modules["tetra.kernels.tunable"].all_tunables = dict
from tetra.autotune.store import *
store = Store(sys.argv[1])
name, identity = sys.argv[2], Identity(%r, %r)
print("ready", flush=True)
i = 0
while True:
    store.add(identity, {"attention": "a"}, "attention", f"{name}-{i}", {"config": [i]})
    print(i, flush=True)
    store.add(identity, {"attention": "a"}, "attention", "shared", {"config": [int(name), i], "filling": "x" * 500})
    i += 1
""" % (HERE.device, HERE.toolchain)  # noqa: UP031


def _start(script: Path, folder: Path, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), name], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def _kill_rounds(tmp_path: Path, n_rounds: int, n_processes: int) -> None:
    folder, script = tmp_path / "cache", tmp_path / "tuner.py"
    script.write_text(_TUNER)
    chance = random.Random(1)
    acknowledged: dict[str, int] = {}
    for round_number in range(n_rounds):
        processes = {
            str(n_processes * round_number + i): _start(script, folder, str(n_processes * round_number + i))
            for i in range(n_processes)
        }
        for process in processes.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes.values():
            time.sleep(chance.uniform(0.0, 0.12))
            process.send_signal(signal.SIGKILL)
        for name, process in processes.items():
            out, _ = process.communicate(timeout=30)
            lines = [line for line in out.splitlines(keepends=True) if line.endswith("\n")]
            acknowledged |= {f"{name}-{int(line)}": int(line) for line in lines}
        started = time.monotonic()
        Store(folder).check_writable()  # takes the lock
        assert time.monotonic() - started < 10
        path = Store(folder).path_of(HERE)
        if path.exists():
            found = read_results(path).results["attention"]  # whole
            lost = {key for key, i in acknowledged.items() if found.get(key, {}).get("config") != [i]}
            assert not lost
        left = {file.name for file in folder.iterdir()} - {".lock", path.name, f".{path.name}.tmp"}
        assert not left
    assert len(acknowledged) > n_rounds


def test_killed_processes_lose_and_spoil_nothing(tmp_path: Path) -> None:
    _kill_rounds(tmp_path, n_rounds=6, n_processes=3)


@pytest.mark.slow
def test_killed_processes_lose_and_spoil_nothing_in_many_rounds(tmp_path: Path) -> None:
    _kill_rounds(tmp_path, n_rounds=60, n_processes=4)


def test_processes_that_finish_keep_all(tmp_path: Path) -> None:
    script = tmp_path / "tuner.py"
    script.write_text(_TUNER.replace("while True:", "while i < 25:"))
    processes = [_start(script, tmp_path / "cache", str(i)) for i in range(4)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    found = read_results(Store(tmp_path / "cache").path_of(HERE)).results["attention"]
    assert found.keys() == {"shared", *(f"{name}-{i}" for name in range(4) for i in range(25))}


# --- what is in the place of a file --------------------------------------------------------------------------


def test_results_of_another_device_in_the_place_of_ours_are_set_aside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.path_of(HERE)
    path.write_text(json.dumps(results(device={**HERE.device, "driver": "9"})))
    with pytest.warns(UserWarning, match=r"driver was 9, here it is 1\.2; it was renamed to"):
        store.add(HERE, {"attention": "0123"}, "attention", "k", {"config": [1]})
    found = read_results(path)
    assert found.device == HERE.device
    assert found.results == {"attention": {"k": {"config": [1]}}}
    static = tmp_path / "static-sm_80.json"
    static.write_text(json.dumps(results(origin="static", device={"kind": "cuda", "name": "x", "arch": "sm_90"})))
    mine = Results.from_json(results(origin="static", results={"attention": {"k": {"config": [1]}}}), static)
    with pytest.warns(UserWarning, match="they are for sm_90, not sm_80"):
        store.merge(static, mine)
    assert read_results(static).results == mine.results


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_a_folder_or_a_pipe_in_the_place_of_a_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    store = Store(tmp_path)
    path = store.path_of(HERE)
    make(path)
    stores.forget_notices()
    with pytest.warns(UserWarning, match="is no file") as warned:
        assert [read_or_notice(path) for _ in range(3)] == [None] * 3
    assert len(warned) == 1
    assert store.files() == []
    assert store.clear() == 0
    for i in range(2):
        (tmp_path / f"{path.name}.unusable").touch()
        with pytest.warns(UserWarning, match="it was renamed"):
            store.add(HERE, {}, "attention", f"k{i}", {"config": [1]})
        assert list(read_results(path).results["attention"]) == [f"k{i}"]
        path.unlink()
        path.mkdir()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TuningFileError, match="pipe: is a pipe; name a file"):
        read_results(tmp_path / "pipe")


def test_a_folder_whose_name_cannot_exist() -> None:
    store = Store("/tmp/" + "a" * 300)
    assert store.files() == []
    assert store.clear() == 0
    with pytest.raises(StoreError, match="File name too long; set TETRA_TUNING_DIR"):
        store.check_writable()


def test_files_that_are_too_large_or_too_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    deep: list[Any] = []
    for _ in range(40):
        deep = [deep]
    path.write_text(json.dumps(results(results={"attention": {"k": {"config": [1], "more": deep}}})))
    with pytest.raises(TuningFileError, match="more than 16 deep"):
        read_results(path)
    monkeypatch.setattr(stores, "MAX_BYTES", 1 << 20)
    with pytest.raises(TuningFileError, match="/dev/zero: is larger than 1 MiB"):
        read_results("/dev/zero")
