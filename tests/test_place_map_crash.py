"""Writers of a place map that are killed: at random moments, and at every single step of what they do to the disk."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from soak import Soak

from tetra.coordinates import LOCAL
from tetra.place_map import PlaceMap

TINY = {"journal_limit_records": 60, "journal_limit_bytes": 20_000, "segment_limit_bytes": 100_000}


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments(tmp_path: Path, seed: int) -> None:
    """With a journal and segments so small that many kills come in the middle of a save."""
    soak = Soak(tmp_path, seed, n_places=200_000, limits=TINY)
    for seconds in np.random.default_rng(seed).exponential(0.12, 10).tolist():
        soak.live(seconds)
        assert not soak.violations
    assert soak.n_kills == 10
    assert soak.twin.n > 100
    soak.reader.refresh()
    assert not soak.twin.difference(soak.reader)


# --- at every step ---

N = 30
CODES = np.random.default_rng(0).integers(0, 256, (3 * N, 8), dtype=np.uint8)
EXTRA = [f"extra {i}" for i in range(N)]


def prepare(path: Path) -> None:
    with PlaceMap.create(path, model_hash="x", code_bytes=8, frame=LOCAL) as places:
        for i in range(N):
            places.add(f"{i}", CODES[i], (i, i))
        places.save()
        for i in range(N, 2 * N):
            places.add(f"{i}", CODES[i], (i, i))
        places.update_positions(["0", f"{N}"], [(7, 7)] * 2)
        places.remove(["1", f"{N + 1}"])
    with PlaceMap.create(path.with_name("other"), model_hash="x", code_bytes=8, frame=LOCAL) as other:
        other.add_many(EXTRA, CODES[2 * N :], np.zeros((N, 2)))


def contents(places: PlaceMap) -> list[Any]:
    rows = places.rows()
    return [rows.tolist(), places.ids(rows), places.codes(rows).tolist(), places.positions(rows).tolist()]


def add_large(places: PlaceMap) -> None:
    places.journal_limit_bytes = 100
    places.add_many(EXTRA, CODES[2 * N :], np.zeros((N, 2)))


ACTIONS: dict[str, Callable[[PlaceMap], object]] = {
    "save": lambda places: places.save(),
    "compact": lambda places: places.compact(),
    "add": lambda places: places.add("extra 0", CODES[2 * N], (1, 1)),
    "add_many": lambda places: places.add_many(EXTRA, CODES[2 * N :], np.zeros((N, 2))),
    "add_large": add_large,
    "remove": lambda places: places.remove([f"{i}" for i in range(2, 2 * N, 3) if i != N + 1]),
    "move": lambda places: places.update_positions([f"{i}" for i in range(2, N)], np.full((N - 2, 2), 3.5)),
    "merge": lambda places: places.merge(PlaceMap.open(places.path.with_name("other"), read_only=True)),
    "calibrate": lambda places: setattr(places, "calibration", {"a": 1}),
}  # fmt: skip


def act(path: Path, action: str, kill_at: int) -> NoReturn:
    """In a child process: do it, and die in front of its system call number ``kill_at`` that changes the disk.

    A write is cut in half first: the first half is done, then the process dies.
    """
    count = 0

    def dying(call: Callable[..., Any], is_write: bool) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == kill_at:
                if is_write:
                    call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return wrapped

    try:
        places = PlaceMap.open(path)
        for name in ("fsync", "replace", "write", "unlink", "ftruncate"):
            setattr(os, name, dying(getattr(os, name), name == "write"))
        ACTIONS[action](places)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("action", ACTIONS)
def test_killed_at_every_step(tmp_path: Path, action: str) -> None:
    """The map is what it was or what it was to become, opens, verifies, has no leftovers, and takes more."""
    prepare(tmp_path / "map")
    with PlaceMap.open(tmp_path / "map", read_only=True) as places:
        before = contents(places)
    shutil.copytree(tmp_path / "map", tmp_path / "done")
    with PlaceMap.open(tmp_path / "done") as places:
        ACTIONS[action](places)
        after = contents(places)
    n_before = n_after = kill_at = 0
    while True:
        kill_at += 1
        path = tmp_path / f"killed {kill_at}"
        shutil.copytree(tmp_path / "map", path)
        pid = os.fork()
        if pid == 0:
            act(path, action, kill_at)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with PlaceMap.open(path, read_only=True) as reader:
            found = contents(reader)
        with PlaceMap.open(path) as places:
            assert contents(places) == found
            places.verify()
            names = set(os.listdir(path))
            assert names == places._manifest.files | {"map.json", "lock"}
            places.add("more", CODES[0], (5, 5))
        with PlaceMap.open(path, read_only=True) as reader:
            assert reader.positions(reader.row("more")).tolist() == [5, 5]
        if status == 0:
            assert found == after
            break
        assert status == -signal.SIGKILL
        assert found in (before, after), f"half of {action} is there"
        n_before += found == before
        n_after += found == after
        shutil.rmtree(path)
    if action in ("add", "add_many", "remove", "move", "merge", "add_large"):
        assert n_before >= 1
    if action in ("save", "compact"):
        assert kill_at > 8
