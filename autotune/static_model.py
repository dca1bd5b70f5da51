"""How long a candidate is predicted to take, from its compiled code: every term of it. Predictions, never measurements.

A launch of B blocks gives the busiest of N multiprocessors t = ceil(B / N) of them, of which r are resident at once, as
registers, shared memory and threads allow. With c_u the clocks for which a block keeps unit u busy
(``tetra.profiling.roofline``), n compiled iterations of the main loop and l_u, o_u a unit's clocks in an iteration and
outside,

    unit u     t c_u                                              c_u = n l_u + o_u
    latency    ceil(t / r) (n (max(max_u l_u, m / d) + s) + w + max_u o_u)
    memory     bytes / bandwidth

and the launch takes the largest of these, a tenth of the sum of the others, since nothing overlaps entirely, and 1 us.
The units are tensor cores, instruction issue, integer, float and special function units, shared memory and the
second-level cache; ceil(t / r) are the waves. The latency term is what one block takes that nothing overlaps:
m = ``MEMORY_LATENCY`` is waited for in every iteration whose loads are in flight d iterations ahead (d = stages - 1 for
asynchronous copies; loads to registers are used at once, and m is added instead), s are the waits of an iteration for
other units (``WAITS``), w those of the rest: m for the first loads, and the same waits. With enough blocks resident it
is less than the busiest unit's, and does not count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from tetra.autotune.hardware import Product
from tetra.kernels.tunable import Work
from tetra.profiling.roofline import LAUNCH_OVERHEAD_S, UNITS, CodeClocks, code_clocks
from tetra.profiling.sass import Instruction, Report

MEMORY_LATENCY = 800  # clocks from asking for bytes to having them; an assumption, as in kernels/ternary_matmul.py
# Clocks that a warp waits for the result of an instruction, by kind; rounded from microbenchmarks of Ampere and Hopper
# (arXiv 2208.11174, arXiv 2402.13499). Barriers are counted one by one, as are shuffles, which make reductions.
WAITS = {"ldsm": 30, "lds": 30, "mma": 35, "cvt": 20}
SHUFFLE_WAIT = 25
BARRIER_WAIT = 30
MOST_SHUFFLES_WAITED_FOR = 10  # more are those of several rows, which do not wait for each other
# Share of the tensor cores' peak that mma.sync reaches where newer instructions reach it: sm_90 measured by arXiv
# 2402.13499 on an H100, sm_100 an assumption, as in kernels/ternary_matmul.py.
MMA_SHARE = {90: 0.63, 100: 0.25}
OVERLAP_LOST = 0.1  # share of the terms that do not decide which is added nevertheless; an assumption
_NEW_PRODUCTS = re.compile(r"UTC|[IHQ]GMMA")
TERMS = (*UNITS, "latency", "memory")


@dataclass(frozen=True)
class Code:
    """What was read of one compiled kernel; JSON values. Instructions are counted by their full names."""

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    num_warps: int
    loop: dict[str, int]
    outside: dict[str, int]

    @classmethod
    def of(cls, found: Report) -> Code:
        """Of a report of compiled code."""
        return cls(
            registers=found.registers,
            stack_bytes=found.stack_bytes,
            spills=found.spill_instructions,
            shared_bytes=found.shared_bytes,
            num_warps=found.num_warps,
            loop=dict(Counter(i.name for i in found.loop)),
            outside=dict(Counter(i.name for i in found.outside)),
        )

    @cached_property
    def loop_kinds(self) -> Counter[str]:
        """Instructions of the main loop by kind; barriers and bulk copies apart."""
        return _kinds(self.loop)

    @cached_property
    def outside_kinds(self) -> Counter[str]:
        """The others."""
        return _kinds(self.outside)

    @cached_property
    def _analyses(self) -> dict[tuple[str, str, int, int], CodeClocks]:
        return {}

    def clocks(self, product: Product, work: Work) -> CodeClocks:
        """What a block takes of every unit; see ``tetra.profiling.roofline.code_clocks``."""
        key = (product.name, work.dtype, work.macs, work.popcounts)
        if key not in self._analyses:
            found = code_clocks(self.loop, self.outside, self.num_warps, product, work.dtype, work.macs, work.popcounts)
            if any(_kind(name) == "mma" and not _NEW_PRODUCTS.match(name) for name in self.loop):
                for part in (found.loop, found.once):
                    part["tensor"] /= MMA_SHARE.get(product.arch, 1.0)
            self._analyses[key] = found
        return self._analyses[key]

    def resident(self, product: Product) -> int:
        """Blocks that a multiprocessor holds at once."""
        return product.chip.blocks_resident(self.registers, self.shared_bytes, self.num_warps)


@lru_cache(maxsize=65536)
def _kind(name: str) -> str:
    instruction = Instruction(0, name, "")
    if instruction.base in ("UTMALDG", "UBLKCP"):
        return "bulk"
    return "barrier" if instruction.base == "BAR" else instruction.kind


def _kinds(names: Mapping[str, int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, n in names.items():
        found[_kind(name)] += n
    return found


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of one launch.

    Attributes:
        seconds: of the launch, with what passes between two launches.
        terms: seconds of each of ``TERMS``; the largest decides.
        limit: which one that is.
        waves: how often the launch fills the GPU.
        blocks_per_sm: resident at once.
    """

    seconds: float
    terms: dict[str, float]
    limit: str
    waves: float
    blocks_per_sm: int


def refusal(work: Work, code: Code, product: Product) -> str | None:
    """Why compiled code may not run, in a few words; None if it may."""
    chip = product.chip
    if code.spills or code.stack_bytes:
        return f"spills: {code.spills} local loads and stores, {code.stack_bytes} bytes of stack"
    if code.shared_bytes > chip.shared_per_block:
        return f"{code.shared_bytes} bytes of shared memory a block, at most {chip.shared_per_block} on sm_{chip.arch}"
    resident = code.resident(product)
    if resident == 0:
        return f"no block fits a multiprocessor: {code.num_warps} warps of {code.registers} registers"
    if resident < work.resident:
        return f"{resident} blocks fit a multiprocessor, but the launch counts on {work.resident}"
    if work.macs and not code.loop_kinds["mma"]:
        # Where a tile does not fit the tensor memory, Triton makes a kernel that stops at once, and says nothing.
        return "no tensor-core instruction in the main loop"
    return None


def _waits(names: Mapping[str, int], kinds: Counter[str]) -> float:
    """Clocks that a warp waits for units other than memory in these instructions."""
    waits = sum(wait for kind, wait in WAITS.items() if kinds[kind])
    # Triton waits for each product of a warp group before it goes on.
    waits += WAITS["mma"] * max(sum(n for name, n in names.items() if "GMMA" in name) - 1, 0)
    shuffles = min(kinds["shfl"], MOST_SHUFFLES_WAITED_FOR)
    return waits + SHUFFLE_WAIT * shuffles + BARRIER_WAIT * kinds["barrier"]


def predict(work: Work, code: Code, product: Product) -> Prediction:
    """Predicted time of a launch of ``code``, which may run, by the formula of this module."""
    clocks, kinds, has_loop = code.clocks(product, work), code.loop_kinds, bool(code.outside)
    iterations = work.iterations / clocks.unrolled if has_loop else 1
    in_turn = -(-work.blocks // product.n_sms)
    resident = max(code.resident(product), 1)
    per_second = product.clock_ghz * 1e9
    terms = {unit: in_turn * (iterations * clocks.loop[unit] + clocks.once[unit]) / per_second for unit in UNITS}

    busiest = max(clocks.loop.values())
    if kinds["ldgsts"] or kinds["bulk"]:
        ahead = max(work.specimen.options.get("num_stages", 3) - 1, 1)
        alone = max(busiest, MEMORY_LATENCY / ahead)
    else:
        alone = busiest + (MEMORY_LATENCY if kinds["ldg"] else 0)
    once = _waits(code.outside, code.outside_kinds) + max(clocks.once.values()) + (MEMORY_LATENCY if has_loop else 0)
    latency = iterations * (alone + _waits(code.loop, kinds)) + once
    terms["latency"] = -(-in_turn // resident) * latency / per_second
    terms["memory"] = work.n_bytes / (product.dram_gb_per_s * 1e9)

    limit = max(terms, key=lambda name: terms[name])
    others = sum(terms.values()) - terms[limit]
    waves = work.blocks / (product.n_sms * resident)
    seconds = terms[limit] + OVERLAP_LOST * others + LAUNCH_OVERHEAD_S
    return Prediction(seconds, terms, limit, waves, resident)


def describe(work: Work, code: Code, prediction: Prediction) -> dict[str, Any]:
    """One launch of a candidate, for explanations."""
    return {
        "registers": code.registers,
        "shared_bytes": code.shared_bytes,
        "num_warps": code.num_warps,
        "blocks": work.blocks,
        "blocks_per_sm": prediction.blocks_per_sm,
        "waves": prediction.waves,
    }
