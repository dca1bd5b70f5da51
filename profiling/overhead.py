"""What ranges cost, on and off: the same call, timed in turns in one process.

Off means: switched on, and off again. Nothing is left in place then, so the cost has to be that of measuring twice
the same, which is measured too.
"""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tetra.profiling import ranges

_WARM = 2  # calls after each switch that don't count: Python specialises its bytecode anew


@dataclass(frozen=True)
class Overhead:
    """Medians in seconds.

    Attributes:
        never: before ranges were ever switched on in a round.
        again: the same once more, to show what the difference of two equal things is.
        off: after they were switched on and off.
        on: while they are on and no tool listens.
        spread: half the width of the middle half of ``off / never - 1`` over the rounds.
    """

    rounds: int
    never: float
    again: float
    off: float
    on: float
    spread: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            **{f"{name}_ms": 1e3 * getattr(self, name) for name in ("never", "again", "off", "on")},
            "noise": self.again / self.never - 1,
            "off_cost": self.off / self.never - 1,
            "on_cost": self.on / self.never - 1,
            "off_spread": self.spread,
        }


def measure(call: Callable[[], object], rounds: int = 200, synchronize: Callable[[], object] | None = None) -> Overhead:
    """Time ``call`` in all states, in another order in every round.

    Args:
        synchronize: waits for what ``call`` has left running, on a GPU.

    Raises:
        ValueError: less than one round.
        RuntimeError: ranges are on already.
    """
    if rounds < 1:
        raise ValueError(f"rounds: is {rounds}, expected 1 or more")
    if ranges.is_enabled():
        raise RuntimeError("ranges are on already; measure without TETRA_NVTX")
    taken: dict[str, list[float]] = {name: [] for name in ("never", "again", "off", "on")}
    order = random.Random(0)

    def timed(name: str) -> None:
        if name in ("off", "on"):
            ranges.enable()
        if name == "off":
            call()
            ranges.disable()
        for _ in range(_WARM):
            call()
        if synchronize is not None:
            synchronize()
        start = time.perf_counter()
        call()
        if synchronize is not None:
            synchronize()
        taken[name].append(time.perf_counter() - start)
        ranges.disable()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(rounds):
            for name in order.sample(list(taken), len(taken)):
                timed(name)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    ratios = [off / never - 1 for off, never in zip(taken["off"], taken["never"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if rounds > 1 else (0.0, 0.0, 0.0)
    return Overhead(rounds, **medians, spread=(high - low) / 2)
