"""Static model: what a launch must take at least, and what its compiled code makes of that. Predictions, never
measurements.

A launch of ``blocks`` thread blocks on a GPU with ``n_sms`` multiprocessors (SMs) is predicted to take

    max(max over units u of c_u * ceil(blocks / n_sms) / clock, bytes / bandwidth) + overhead

where c_u are the clocks for which one block keeps unit u of its SM busy: instructions of the main loop times its
iterations, plus those outside it, each at the unit's rate. ceil(blocks / n_sms) is what the busiest SM gets (wave
quantisation); ``bytes`` counts every tensor once. The units are

    tensor   multiply-adds of the tensor-core instructions / the chip's peak
    issue    all instructions, 4 warp instructions a clock
    alu, float, special   integer, float32, and conversion or exponential instructions, 32 lanes each
    shared   bytes through shared memory, 128 a clock
    l2       bytes to and from the second-level cache, 64 a clock

The model knows no latency: it takes for granted that the resident warps hide it. The *bound* is what no code could
pass, max(operations / peak, bytes / bandwidth), without overhead; a launch's share of the bound is
bound / prediction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from tetra.autotune.hardware import Product
from tetra.profiling.sass import Instruction, Report, mma_shape

UNITS = ("tensor", "issue", "alu", "float", "special", "shared", "l2")

# Seconds between two kernels of one CUDA graph. NVIDIA's "Getting Started with CUDA Graphs" measured 3.4 us a kernel
# for kernels of 2.9 us, on a V100; doubled here for filling and draining the multiprocessors. An assumption.
LAUNCH_OVERHEAD_S = 1e-6

FORMULA = (
    "launch = max(max_u(clocks_u of a block) * ceil(blocks / SMs) / clock, bytes / bandwidth) + 1 us; "
    "u: tensor, issue, alu, float, special, shared, l2; bound = max(operations / peak, bytes / bandwidth)"
)

_LANES = 32
_WARPGROUP = 4  # wgmma is issued by four warps together
_SLOW = {"MUFU", "I2F", "F2I", "F2F"}  # the other conversions run at the integer units' rate


def tensor_dtype(name: str) -> str:
    """``int8``, ``tf32`` or ``fp16`` (also bf16): the operands of a tensor-core instruction."""
    if "IMMA" in name or "IGMMA" in name:
        return "int8"
    return "tf32" if "TF32" in name else "fp16"


def warp_macs(name: str) -> float | None:
    """Multiply-adds that one warp contributes with a tensor-core instruction; None where its name does not tell."""
    shape = mma_shape(name)
    if shape is None:
        return None
    return math.prod(shape) / (_WARPGROUP if "GMMA" in name else 1)


def unit_clocks(instructions: Iterable[Instruction], num_warps: int, product: Product) -> dict[str, float]:
    """Clocks for which each unit of one SM is busy when ``num_warps`` warps run ``instructions`` once.

    Tensor-core instructions whose size is not in their name (tcgen05) count nothing.
    """
    return named_clocks(Counter(instruction.name for instruction in instructions), num_warps, product)


def named_clocks(names: Mapping[str, int], num_warps: int, product: Product) -> dict[str, float]:
    """The same of instructions that are counted by their full names, which tell all that matters."""
    clocks = dict.fromkeys(UNITS, 0.0)
    for name, n in names.items():
        for unit, taken in _clocks_of(name, product):
            clocks[unit] += n * num_warps * taken
    return clocks


@lru_cache(maxsize=65536)
def _clocks_of(name: str, product: Product) -> tuple[tuple[str, float], ...]:
    """Units that one instruction of one warp keeps busy, and for how many clocks."""
    chip, instruction = product.chip, Instruction(0, name, "")
    kind, found = instruction.kind, [("issue", 1 / chip.issue_per_clock)]
    if kind == "mma":
        found.append(("tensor", (warp_macs(name) or 0) / product.macs_per_clock(tensor_dtype(name))))
    elif kind == "float":
        found.append(("float", _LANES / chip.float_per_clock))
    elif instruction.base == "POPC":
        found.append(("special", _LANES / chip.popc_per_clock))
    elif kind == "cvt" and instruction.base in _SLOW:
        found.append(("special", _LANES / chip.special_per_clock))
    elif kind in ("alu", "cvt"):
        found.append(("alu", _LANES / chip.alu_per_clock))
    elif kind == "shfl":
        found.append(("shared", 128 / chip.shared_bytes_per_clock))
    elif kind in ("lds", "ldsm", "sts"):
        found.append(("shared", instruction.access_bytes / chip.shared_bytes_per_clock))
    elif kind in ("ldg", "stg", "local", "ldgsts", "atomic"):
        found.append(("l2", instruction.access_bytes / chip.l2_bytes_per_clock))
        if kind == "ldgsts":
            found.append(("shared", instruction.access_bytes / chip.shared_bytes_per_clock))
    return tuple(found)


@dataclass(frozen=True)
class LoopLimit:
    """Which unit an iteration of a main loop waits for, predicted.

    Attributes:
        clocks: of every unit, a block and iteration; of ``memory`` too for kernels without products.
        unit: the busiest one.
        tensor_share: of the busiest unit's time the tensor cores work; None without products, and for tcgen05,
            whose size is unknown.
    """

    clocks: dict[str, float]
    unit: str
    tensor_share: float | None


def loop_limit(report: Report, product: Product) -> LoopLimit:
    """What limits the main loop of a compiled kernel on ``product``."""
    clocks = unit_clocks(report.loop, report.num_warps, product)
    if not report.tensor_core:
        # Nothing is used twice, so what passes the second-level cache comes from memory.
        per_sm = product.dram_gb_per_s / product.clock_ghz / product.n_sms
        clocks["memory"] = clocks["l2"] * product.chip.l2_bytes_per_clock / per_sm
    unit = max(clocks, key=lambda name: clocks[name])
    sized = bool(report.tensor_core) and all(warp_macs(name) is not None for name in report.tensor_core)
    return LoopLimit(clocks, unit, clocks["tensor"] / clocks[unit] if sized and clocks[unit] else None)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, on a shape.

    Attributes:
        name: what it does in the model.
        kernel: the file that holds it, or ``library`` for products that torch's own libraries compute.
        operations: two a multiply-add.
        dtype: of the operands: int8, fp16 (tensor cores) or fp32 (elsewhere).
        n_bytes: moved at least, every tensor once.
        blocks: thread blocks.
        iterations: of a block's main loop, as it is written; 1 for kernels whose code runs once.
        macs: multiply-adds of one iteration, with padding; 0 where there are none.
        popcounts: of words, in one iteration, with padding; 0 where there are none.
    """

    name: str
    kernel: str
    operations: int
    dtype: str
    n_bytes: int
    blocks: int
    iterations: int = 1
    macs: int = 0
    popcounts: int = 0


@dataclass(frozen=True)
class CodeClocks:
    """What compiled code takes of every unit of a multiprocessor, for one block.

    Attributes:
        loop: clocks of an iteration of the main loop, as it is compiled.
        once: of everything else.
        unrolled: how many iterations, as the loop is written, one of the compiled loop does.
    """

    loop: dict[str, float]
    once: dict[str, float]
    unrolled: int


def code_clocks(
    loop: Mapping[str, int],
    outside: Mapping[str, int],
    num_warps: int,
    product: Product,
    dtype: str,
    macs: int,
    popcounts: int = 0,
) -> CodeClocks:
    """Unit by unit, what a block of compiled code takes on ``product``.

    Args:
        loop, outside: instructions of the main loop and the others, counted by their full names.
        num_warps: of a block.
        dtype: of the tensor cores' operands.
        macs: multiply-adds of an iteration as it is written, 0 without any.
        popcounts: of words, in an iteration as it is written, 0 without any.
    """
    taken = named_clocks(loop, num_warps, product)
    sizes = {name: warp_macs(name) for name in loop if Instruction(0, name, "").kind == "mma"}
    unrolled = 1
    if None in sizes.values():  # tcgen05
        taken["tensor"] = macs / product.macs_per_clock(dtype)
    elif macs:
        found = num_warps * sum((size or 0) * loop[name] for name, size in sizes.items())
        unrolled = max(round(found / macs), 1)
    elif popcounts:
        found = num_warps * _LANES * sum(n for name, n in loop.items() if Instruction(0, name, "").base == "POPC")
        unrolled = max(round(found / popcounts), 1)
    return CodeClocks(taken, named_clocks(outside, num_warps, product), unrolled)


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of one launch, the bound that no code could pass, and what decides each (a unit or memory)."""

    launch: Launch
    seconds: float
    bound_s: float
    limit: str
    bound_by: str


def bound_seconds(launch: Launch, product: Product) -> tuple[float, str]:
    """The roofline: (seconds, which of ``tensor``, ``float`` and ``memory`` sets it)."""
    on_tensor_cores = launch.dtype != "fp32"
    macs = product.macs_per_clock(launch.dtype) if on_tensor_cores else product.chip.float_per_clock
    compute = launch.operations / (2 * macs * product.n_sms * product.clock_ghz * 1e9)
    memory = launch.n_bytes / (product.dram_gb_per_s * 1e9)
    return max(compute, memory), "memory" if memory >= compute else "tensor" if on_tensor_cores else "float"


def predict_launch(launch: Launch, product: Product, report: Report | None = None) -> Prediction:
    """Predicted time of ``launch`` on ``product``, by the formula of this module.

    Without a ``report`` of compiled code (library products) the tensor cores are taken to run at their peak on
    whole blocks.
    """
    bound, bound_by = bound_seconds(launch, product)
    seconds, limit = bound, bound_by
    waves = -(-launch.blocks // product.n_sms)  # blocks of the busiest multiprocessor
    if report is None:
        macs = launch.iterations * launch.macs
        clocks = {"tensor": macs / product.macs_per_clock(launch.dtype)} if macs else {}
    else:
        in_loop, outside = (Counter(i.name for i in part) for part in (report.loop, report.outside))
        counts = launch.macs, launch.popcounts
        code = code_clocks(in_loop, outside, report.num_warps, product, launch.dtype, *counts)
        iterations = launch.iterations / code.unrolled
        clocks = {unit: iterations * code.loop[unit] + code.once[unit] for unit in UNITS}
    for unit, n in clocks.items():
        taken = n * waves / (product.clock_ghz * 1e9)
        if taken > seconds:
            seconds, limit = taken, unit
    return Prediction(launch, seconds + LAUNCH_OVERHEAD_S, bound, limit, bound_by)
