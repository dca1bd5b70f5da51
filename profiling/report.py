"""Report on the compiled kernels: what the compiler made of every kernel and configuration, for GPUs that need not
be here.

Everything is read from machine code; the limiting unit and the tensor cores' share of it are predictions of the
static model in ``tetra.profiling.roofline``. Nothing here was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tetra.autotune.hardware import product_of
from tetra.kernels.ahead_of_time import (
    ARCHITECTURES,
    all_specimens,
    check_compiler,
    check_kernel,
    check_known_arch,
    compile_for,
)
from tetra.kernels.specimen import Specimen
from tetra.profiling.roofline import loop_limit
from tetra.profiling.sass import KINDS, Report, mma_shape, report

Progress = Callable[[int, int, str], None]


def loop_counts(found: Report) -> dict[str, Any]:
    """Instructions of the main loop: ``all``, one number a kind, and some that say what went wrong.

    ``prmt`` and ``i2f`` are also counted among ``alu`` and ``cvt``; ``mma_shape`` is the size of the tensor-core
    instruction (the largest, if there are several), None without one or where its name does not tell.
    """
    shapes = [shape for shape in map(mma_shape, found.tensor_core) if shape]
    return {
        "all": found.main_loop.total(),
        **{kind: found.main_loop[kind] for kind in KINDS},
        "prmt": sum(i.base == "PRMT" for i in found.loop),
        "i2f": sum(i.base in ("I2F", "I2FP") for i in found.loop),
        "mma_shape": list(max(shapes)) if shapes else None,
    }


def report_row(specimen: Specimen, arch: int) -> dict[str, Any]:
    """Compile one kernel and describe it; see :func:`kernel_report`."""
    return describe(specimen.name, specimen.config, report(compile_for(specimen, arch)))


def describe(kernel: str, config: dict[str, Any], found: Report) -> dict[str, Any]:
    """The row of a kernel that was compiled and read; see :func:`kernel_report`."""
    product = product_of(found.arch)
    limit = loop_limit(found, product)
    busiest = limit.clocks[limit.unit] or 1.0
    return {
        "kernel": kernel,
        "config": config,
        "arch": f"sm_{found.arch}",
        "registers": found.registers,
        "spills": found.spill_instructions,
        "stack_bytes": found.stack_bytes,
        "shared_bytes": found.shared_bytes,
        "shared_bytes_limit": product.chip.shared_per_block,
        "ctas_per_sm": found.blocks_per_sm,
        "num_warps": found.num_warps,
        "instructions": len(found.loop) + len(found.outside),
        "has_loop": found.has_loop,
        "loop": loop_counts(found),
        "tensor_core": sorted(found.tensor_core),
        "limiting_unit": limit.unit,
        "predicted": {
            "on": product.name,
            "tensor_core_share": limit.tensor_share,
            "clocks_per_iteration": {unit: round(clocks, 2) for unit, clocks in limit.clocks.items()},
            "busy_share": {unit: round(clocks / busiest, 4) for unit, clocks in limit.clocks.items()},
            "measured": False,
        },
    }


def kernel_report(
    archs: Iterable[int] = ARCHITECTURES, kernel: str | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Compile the kernels for ``archs`` and describe each in each of its configurations.

    Args:
        archs: compute capabilities, 80 for sm_80.
        kernel: only those of this file, such as ``ternary_matmul``.
        progress: called before each compilation with (number done, number of all, what comes next).

    Returns:
        One mapping a kernel, configuration and architecture: ``kernel``, ``config``, ``arch`` ("sm_80"),
        ``registers`` (a thread), ``spills`` (local loads and stores), ``stack_bytes``, ``shared_bytes`` (a block) and
        its limit, ``ctas_per_sm`` (resident blocks), ``num_warps``, ``loop`` (see :func:`loop_counts`; the whole
        kernel where ``has_loop`` is false), ``tensor_core`` (names of its instructions), ``limiting_unit`` and
        ``predicted``: the static model's view of an iteration on the product named.

    Raises:
        ValueError: an architecture or the kernel is unknown.
        RuntimeError: there is no Triton that can compile.
    """
    archs = list(dict.fromkeys(archs))
    for arch in archs:
        check_known_arch(arch)
    if kernel is not None:
        check_kernel(kernel)
    check_compiler()
    work = [(specimen, arch) for arch in archs for specimen in all_specimens(arch, kernel)]
    rows = []
    for done, (specimen, arch) in enumerate(work):
        if progress is not None:
            progress(done, len(work), f"{specimen.name} sm_{arch}")
        rows.append(report_row(specimen, arch))
    if progress is not None:
        progress(len(work), len(work), "")
    return rows
