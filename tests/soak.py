"""A million adds and queries on a place map whose writer is killed again and again.

    python tests/soak.py [--adds 1000000] [--minutes M] [--seed 0]

A child process works on a map: it adds places one by one and in batches, removes some, moves some, searches, saves and
compacts, and says after each step that it has done it. The parent kills it (SIGKILL) at random moments, opens the map
and compares all of it with a plain model: every step that was acknowledged has to be there, and the one that was at
work either as a whole or not at all. A third party, a reader in the parent, follows meanwhile.

Each step is a function of the seed, its number and what the map holds by then, so child and parent agree on it.

Memory: what the child holds for itself (not pages of the map's files) may grow, from the moment the map is open, by at
most ``ALLOWED_BYTES``, whatever the map holds, and ``BYTES_A_PLACE`` a place, which is what joining segments takes
for a moment (and this test's plain model). A place's data are about 150 bytes. The files on disk may hold at most as
many removed places as there are others, and ``ALLOWED_REMOVED``.

Exits with 1 if anything was lost, torn or out of order, or memory grew beyond that.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import torch

from tetra.coordinates import LOCAL
from tetra.errors import TetraError
from tetra.place_map import PlaceMap

CODE_BYTES = 64
MODEL_HASH = "50a4" * 16
ALLOWED_BYTES = 96 << 20
BYTES_A_PLACE = 64
ALLOWED_REMOVED = 20_000

Ints = npt.NDArray[np.int64]

_TABLE = np.random.default_rng(0).integers(0, 256, (4096, CODE_BYTES), dtype=np.uint8)


def codes_of(rows: Ints) -> npt.NDArray[np.uint8]:
    """The code of the place in each row; all differ."""
    codes = _TABLE[rows % len(_TABLE)].copy()
    codes[:, :8] ^= rows.astype("<i8").view(np.uint8).reshape(-1, 8)
    return codes


def name(number: int) -> str:
    """The id with this number."""
    return f"run {number % 7}/{number:07d}.jpg"


class Twin:
    """What the map should hold."""

    def __init__(self, capacity: int) -> None:
        self.n = 0
        self.is_there = np.zeros(capacity, dtype=np.bool_)
        self.positions = np.zeros((capacity, 2))
        self.number = np.zeros(capacity, dtype=np.int64)
        """of the id of a row"""
        self.is_used = np.zeros(capacity, dtype=np.bool_)
        """by number of an id"""
        self.steps = 0

    def plan(self, seed: int) -> tuple[str, Any]:
        """The next step: its kind and what it needs."""
        rng = np.random.default_rng((seed, self.steps))
        chance = rng.random()
        known = np.unique(rng.integers(0, max(self.n, 1), 20))
        there = known[self.is_there[known]]
        if chance < 0.9 or not len(there):
            count = 1
        elif chance < 0.94:
            count = int(rng.integers(1, 200))
        elif chance < 0.96:
            return "remove", there[: rng.integers(1, 20)]
        elif chance < 0.975:
            return "move", (there, rng.uniform(-1e4, 1e4, (len(there), 2)))
        elif chance < 0.998:
            return "search", there[:3]
        else:
            return ("save" if chance < 0.9995 else "compact"), None
        numbers = np.arange(self.n, self.n + count)
        gone = known[~self.is_there[known]]
        if count == 1 and len(gone) and chance < 0.1 and not self.is_used[self.number[gone[0]]]:
            numbers = self.number[gone[:1]]  # an id comes back
        return "add", (numbers, rng.uniform(-1e4, 1e4, (count, 2)))

    def apply(self, kind: str, what: Any) -> None:
        """What :meth:`plan` gave has been done."""
        self.steps += 1
        if kind == "add":
            numbers, positions = what
            rows = slice(self.n, self.n + len(numbers))
            self.is_there[rows], self.positions[rows], self.number[rows] = True, positions, numbers
            self.is_used[numbers] = True
            self.n += len(numbers)
        elif kind == "remove":
            self.is_there[what] = False
            self.is_used[self.number[what]] = False
        elif kind == "move":
            self.positions[what[0]] = what[1]

    def difference(self, places: PlaceMap) -> str:
        """What is not as it should be in the map; "" if all is."""
        rows = np.flatnonzero(self.is_there[: self.n])
        found = places.rows()
        if not np.array_equal(found, rows):
            return f"{len(found)} rows, expected {len(rows)}"
        if not np.array_equal(places.positions(rows), self.positions[rows]):
            return "positions differ"
        for start in range(0, len(rows), 1 << 16):
            block = rows[start : start + (1 << 16)]
            if not np.array_equal(places.codes(block), codes_of(block)):
                return "codes differ"
            if places.ids(block) != [name(number) for number in self.number[block].tolist()]:
                return "ids differ"
        return ""


def perform(places: PlaceMap, twin: Twin, kind: str, what: Any) -> None:
    """Do a step on the map. Raises AssertionError for an answer that is wrong."""
    if kind == "add":
        numbers, positions = what
        ids, codes = [name(number) for number in numbers.tolist()], codes_of(np.arange(twin.n, twin.n + len(numbers)))
        if len(ids) == 1:
            places.add(ids[0], codes[0], tuple(positions[0].tolist()), time=float(-twin.steps))
        else:
            places.add_many(ids, codes, positions)
    elif kind == "remove":
        places.remove([name(number) for number in twin.number[what].tolist()])
    elif kind == "move":
        places.update_positions([name(number) for number in twin.number[what[0]].tolist()], what[1])
    elif kind == "search":
        hits = places.search(codes_of(what), 1)
        assert hits.rows[:, 0].tolist() == what.tolist(), f"search found {hits.rows[:, 0]} for {what}"
        assert not hits.distances.any()
    else:
        getattr(places, kind)()


def private_bytes(pid: int | str = "self") -> int:
    """Memory that is the process's own, not pages of files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def work(path: Path, twin: Twin, seed: int, limits: dict[str, int], n_places: int, acks: Connection) -> None:
    """The child: steps until ``n_places`` were added. Sends its memory, then one message a step."""
    torch.set_num_threads(1)  # threads of the parent do not exist here
    with PlaceMap.open(path) as places:
        for key, value in limits.items():
            setattr(places, key, value)
        acks.send(private_bytes())
        try:
            while twin.n < n_places:
                kind, what = twin.plan(seed)
                perform(places, twin, kind, what)
                twin.apply(kind, what)
                acks.send(kind)
        except (AssertionError, TetraError) as error:
            acks.send(error)
            raise SystemExit(2) from error


@dataclass
class Soak:
    """A map, what it should hold, and what went wrong so far."""

    folder: Path
    seed: int
    n_places: int
    limits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.twin = Twin(self.n_places + 1000)
        self.violations: list[str] = []
        self.n_kills = self.n_kept = self.n_searches = 0
        self.largest_growth = 0
        PlaceMap.create(self.path, model_hash=MODEL_HASH, code_bytes=CODE_BYTES, frame=LOCAL).close()
        self.reader = PlaceMap.open(self.path, read_only=True)

    @property
    def path(self) -> Path:
        """Of the map."""
        return self.folder / "map"

    def live(self, seconds: float) -> None:
        """Let a child work, kill it after that long, and compare the map with the twin."""
        context = multiprocessing.get_context("fork")  # which starts at once, and with the twin
        acks, child_end = context.Pipe(duplex=False)
        arguments = (self.path, self.twin, self.seed, self.limits, self.n_places, child_end)
        child = context.Process(target=work, args=arguments, daemon=True)
        child.start()
        child_end.close()
        try:
            self._follow(acks, child, seconds)
        finally:
            child.kill()
            child.join()
        if child.exitcode == -9:
            self.n_kills += 1
        elif child.exitcode != 0:
            self.violations.append(f"the writer ended with status {child.exitcode}")
        self._compare()

    def _follow(self, acks: Connection, child: Any, seconds: float) -> None:
        """Take acknowledgements until the child is killed and all are read."""
        start_bytes: int | None = None
        end = looked = time.monotonic()
        while True:
            now = time.monotonic()
            if start_bytes is not None and now >= end:
                child.kill()
                end = float("inf")
            if start_bytes is not None and now > looked + 0.25 and end < float("inf"):
                looked = now
                self._look(child, start_bytes)
            if not acks.poll(0.0005 if start_bytes is not None else 0.05):
                continue
            try:
                message = acks.recv()
            except (EOFError, OSError):
                return
            if isinstance(message, int):
                start_bytes, end = message, time.monotonic() + seconds
            elif isinstance(message, Exception):
                self.violations.append(f"step {self.twin.steps}: {message}")
            else:
                kind, what = self.twin.plan(self.seed)
                assert kind == message
                self.n_searches += kind == "search"
                self.twin.apply(kind, what)

    def _look(self, child: Any, start_bytes: int) -> None:
        """At the child's memory, and at the map as another process sees it."""
        try:
            growth = private_bytes(child.pid) - start_bytes
        except (OSError, StopIteration):  # it has ended
            return
        self.largest_growth = max(self.largest_growth, growth)
        allowed = ALLOWED_BYTES + BYTES_A_PLACE * self.twin.n
        if growth > allowed:
            self.violations.append(f"the writer's memory grew by {growth >> 20} MiB, allowed are {allowed >> 20}")
        self.reader.refresh()
        rows = self.reader.rows()
        if len(rows):
            some = rows[self.rng.integers(0, len(rows), 20)]
            if not np.array_equal(self.reader.codes(some), codes_of(some)) or (np.diff(rows) <= 0).any():
                self.violations.append("a reader saw wrong codes or rows")

    def _compare(self) -> None:
        places = PlaceMap.open(self.path)
        try:
            difference = self.twin.difference(places)
            if difference:
                # The step that was at work may have been done, but nobody was told.
                self.twin.apply(*self.twin.plan(self.seed))
                self.n_kept += 1
                again = self.twin.difference(places)
                if again:
                    self.violations.append(f"after step {self.twin.steps}: {difference}; or, with one more: {again}")
            places.verify()
            counts = places.statistics()
            if counts["removed"] > counts["places"] + ALLOWED_REMOVED:
                self.violations.append(f"{counts['removed']} removed places are on disk beside {counts['places']}")
        except TetraError as error:
            self.violations.append(str(error))
        finally:
            places.close()


def main() -> int:
    """Run it and say how it went."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parser = argparse.ArgumentParser(description="Kill a place map's writer at random moments; nothing may be lost.")
    parser.add_argument("--adds", type=int, default=1_000_000, help="places to add")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tetra-soak-"))
    start = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        soak = Soak(folder, options.seed, options.adds)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("adds", total=options.adds)
            while soak.twin.n < options.adds and not soak.violations:
                if options.minutes is not None and time.monotonic() > start + 60 * options.minutes:
                    break
                # Many short lives and some long ones.
                soak.live(float(soak.rng.exponential(1.5)))
                progress.update(task, completed=min(soak.twin.n, options.adds), description=f"{soak.n_kills} kills")
        soak.reader.refresh()
        counts = soak.reader.statistics()
        bytes_on_disk = sum(file.stat().st_size for file in soak.path.iterdir())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for violation in soak.violations:
        print(f"violation: {violation}")
    print(
        f"{'FAILED' if soak.violations else 'passed'}: {soak.twin.n} adds, {soak.n_searches} searches, "
        f"{soak.twin.steps} steps, {soak.n_kills} kills ({soak.n_kept} left a whole step that was not acknowledged), "
        f"{counts['places']} places in {counts['segments']} segments, {bytes_on_disk / 1e6:.1f} MB on disk, "
        f"private memory grew by at most {soak.largest_growth / 1e6:.1f} MB, "
        f"{time.monotonic() - start:.0f} s, {len(soak.violations)} violations"
    )
    return 1 if soak.violations else 0


if __name__ == "__main__":
    sys.exit(main())
