"""What the compiler makes of the kernels of the blended linear layer, for GPUs that need not be here."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton")

from tetra.autotune.hardware import CHIPS
from tetra.kernels.ahead_of_time import ARCHITECTURES, all_specimens, compile_for, disassemble
from tetra.kernels.specimen import Specimen
from tetra.profiling.sass import Instruction, Report, parse_instructions, report

WIDTH = {"64": 8, "128": 16}
DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@cache
def compiled(arch: int, index: int) -> tuple[Specimen, Report, list[Instruction]]:
    found = all_specimens(arch, "blended_linear")[index]
    result = compile_for(found, arch)
    return found, report(result), parse_instructions(disassemble(result)[0])


def find(arch: int, **wanted: Any) -> tuple[Specimen, Report, list[Instruction]]:
    specimens = all_specimens(arch, "blended_linear")
    (index,) = [i for i, s in enumerate(specimens) if wanted.items() <= s.config.items()]
    return compiled(arch, index)


def check_health(found: Report) -> None:
    assert found.spill_instructions == 0
    assert found.stack_bytes == 0
    assert found.shared_bytes <= CHIPS[found.arch].shared_per_block
    assert found.blocks_per_sm >= 1


def moved(instructions: list[Instruction], pattern: str, threads: int) -> int:
    """Bytes that all threads of a block move with instructions of that name, an iteration over rows counted once."""
    widths = [
        next((WIDTH[part] for part in i.name.split(".") if part in WIDTH), 4)
        for i in instructions
        if re.match(pattern, i.name)
    ]
    return sum(widths) * threads


@pytest.mark.parametrize("index", range(len(all_specimens(80, "blended_linear"))))
def test_every_configuration_is_healthy(index: int) -> None:
    check_health(compiled(80, index)[1])


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("dtype", "out"), [("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")])
def test_a_row_is_read_and_written_once(arch: int, dtype: str, out: str) -> None:
    found, health, instructions = find(arch, part="rows", K=768, dtype=dtype, out=out, blend=True)
    threads = 32 * found.options["num_warps"]
    # The row, and weight and bias, which are float32; nothing twice.
    assert moved(instructions, r"LDG", threads) == 768 * (DTYPE_BYTES[dtype] + 8)
    assert moved(instructions, r"STG", threads) == 768 * DTYPE_BYTES[out]
    assert all(i.name.startswith("LDG.E.128") for i in instructions if i.name.startswith("LDG"))
    assert health.registers <= 80


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("dtype", "out"), [("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")])
def test_gradients_read_and_write_a_row_once(arch: int, dtype: str, out: str) -> None:
    found, health, instructions = find(arch, part="rows_backward", K=768, dtype=dtype, out=out)
    threads = 32 * found.options["num_warps"]
    # x, the gradient and the norm's weight in; the gradient out, and once a block the sums of two rows.
    assert moved(instructions, r"LDG", threads) == 768 * (DTYPE_BYTES[dtype] + DTYPE_BYTES[out] + 4)
    assert moved(instructions, r"STG", threads) == 768 * (DTYPE_BYTES[dtype] + 8)
    assert health.registers <= 80


def test_gradients_without_a_norm_need_no_sums() -> None:
    _, health, instructions = find(80, part="rows_backward", norm=False)
    assert health.shared_bytes == 0
    assert not any(i.name.startswith(("SHFL", "BAR")) for i in instructions)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_on_every_architecture(arch: int) -> None:
    for index in range(len(all_specimens(arch, "blended_linear"))):
        check_health(compiled(arch, index)[1])
