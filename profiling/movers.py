"""What became slower or faster between two runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tetra.profiling.events import By, Profile, Row, table


@dataclass(frozen=True)
class Mover:
    """One range or kernel in both runs; 0 where a run lacks it.

    Attributes:
        change_ns: after - before: negative is faster.
        each_before_ns, each_after_ns: of a launch (of a call, where calls of ranges are known).
    """

    name: str
    before_ns: int
    after_ns: int
    count_before: int
    count_after: int
    each_before_ns: float
    each_after_ns: float

    @property
    def change_ns(self) -> int:
        return self.after_ns - self.before_ns

    @property
    def found_in(self) -> Literal["both", "before", "after"]:
        """By the counts: what launches nothing, such as a range around work of the CPU, takes no time in either."""
        return "before" if not self.count_after else "after" if not self.count_before else "both"

    @property
    def ratio(self) -> float | None:
        """after / before; None where either is 0."""
        return self.after_ns / self.before_ns if self.before_ns and self.after_ns else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "found_in": self.found_in, "change_ns": self.change_ns, "ratio": self.ratio}


def movers(before: Profile, after: Profile, by: By = "kernel") -> list[Mover]:
    """Of every name, the largest change first."""
    left, right = ({row.name: row for row in table(profile, by)} for profile in (before, after))
    found = []
    for name in {*left, *right}:
        a, b = left.get(name, Row(name)), right.get(name, Row(name))
        counts = _number(a), _number(b)
        found.append(
            Mover(
                name,
                a.time_ns,
                b.time_ns,
                *counts,
                a.time_ns / counts[0] if counts[0] else 0.0,
                b.time_ns / counts[1] if counts[1] else 0.0,
            )
        )
    return sorted(found, key=lambda mover: (-abs(mover.change_ns), mover.name))


def _number(row: Row) -> int:
    return row.count if row.calls is None else row.calls


def caveats(before: Profile, after: Profile) -> list[str]:
    """Why the two may not be comparable, one line each."""
    found = []
    if before.tool != after.tool:
        found.append(f"{before.source} is of {before.tool}, {after.source} of {after.tool}: they don't time alike")
    if before.device != after.device:
        names = [profile.device or "an unnamed device" for profile in (before, after)]
        found.append(f"{before.source} is of {names[0]}, {after.source} of {names[1]}")
    if before.is_of_gpu != after.is_of_gpu:
        found.append("one of the files is of a GPU, the other of a CPU")
    counts = [{row.name: _number(row) for row in table(profile)} for profile in (before, after)]
    common = counts[0].keys() & counts[1].keys()
    if any(counts[0][name] != counts[1][name] for name in common):
        found.append("the runs launched some kernels a different number of times: look at the time of each")
    return found
