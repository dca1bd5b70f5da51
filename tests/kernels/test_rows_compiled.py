"""What the compiler makes of the kernels that work row by row, for GPUs that need not be here."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton")

from tetra.kernels import bits, layer_norm, patches, row_quantize  # noqa: F401
from tetra.kernels.ahead_of_time import ARCHITECTURES, all_specimens, compile_for, disassemble
from tetra.kernels.specimen import Specimen
from tetra.profiling.sass import Instruction, Report, parse_instructions, report

FILES = ("row_quantize", "layer_norm", "patches", "bits")
WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@cache
def compiled(name: str, arch: int, index: int) -> tuple[Specimen, Report, list[Instruction]]:
    found = all_specimens(arch, name)[index]
    result = compile_for(found, arch)
    return found, report(result), parse_instructions(disassemble(result)[0])


def find(name: str, arch: int, **wanted: Any) -> tuple[Specimen, Report, list[Instruction]]:
    specimens = all_specimens(arch, name)
    (index,) = [i for i, s in enumerate(specimens) if wanted.items() <= s.config.items()]
    return compiled(name, arch, index)


def width(instruction: Instruction) -> int:
    """Bytes that a thread moves with a load or a store."""
    known = [WIDTH[part] for part in instruction.name.split(".")[1:] if part in WIDTH]
    return known[0] if known else 4


def moved(instructions: list[Instruction], pattern: str, threads: int) -> int:
    """Bytes that all threads of a block move with instructions of that name; a row's are never in a loop."""
    return sum(width(i) for i in instructions if re.match(pattern, i.name)) * threads


def check_health(found: Report, max_registers: int = 64) -> None:
    assert found.spill_instructions == 0
    assert found.stack_bytes == 0
    assert found.registers <= max_registers
    assert found.blocks_per_sm >= 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("k", [768, 3072])
def test_a_row_is_read_and_written_once_in_16_byte_loads(arch: int, k: int) -> None:
    found, health, instructions = find("row_quantize", arch, K=k, dtype="fp16", norm=True, gelu=False, residual=False)
    check_health(health)
    threads = 32 * found.options["num_warps"]
    loads = [i for i in instructions if re.match(r"LDG|LD\.", i.name)]
    assert loads
    assert all(i.name.startswith("LDG.E.128") for i in loads)
    # The row, and weight and bias, which are float32; nothing twice.
    assert moved(instructions, r"LDG", threads) == 2 * k + 8 * k
    scale = 4 * threads  # written by one thread, but counted for all
    assert moved(instructions, r"STG", threads) == k + scale


@pytest.mark.parametrize("index", range(len(row_quantize.specimens(80))))
def test_every_row_quantizer_is_healthy(index: int) -> None:
    found, health, instructions = compiled("row_quantize", 80, index)
    check_health(health)
    k, dtype = found.config["K"], found.config["dtype"]
    if found.constants.get("K") is None:
        return  # read several times, in a loop
    threads = 32 * found.options["num_warps"]
    n_rows = 2 if found.config["residual"] else 1
    read = k * DTYPE_BYTES[dtype] * n_rows + 8 * k * found.config["norm"]
    assert moved(instructions, r"LDG", threads) == read
    assert all(i.name.startswith("LDG.E.128") for i in instructions if i.name.startswith("LDG"))
    written = k * DTYPE_BYTES[dtype] * (n_rows - 1) + k + 4 * threads
    assert moved(instructions, r"STG", threads) == written


@pytest.mark.parametrize("name", ["layer_norm", "patches", "bits"])
def test_other_row_kernels_are_healthy(name: str) -> None:
    for index in range(len(all_specimens(80, name))):
        check_health(compiled(name, 80, index)[1])


def test_layer_norm_reads_and_writes_a_row_once() -> None:
    found, _, instructions = find("layer_norm", 80, K=768, dtype="fp16", residual=True)
    threads = 32 * found.options["num_warps"]
    assert moved(instructions, r"LDG", threads) == 768 * (2 + 2 + 8)
    assert moved(instructions, r"STG", threads) == 768 * (2 + 2)


def test_bits_read_16_bytes_and_use_no_float_memory() -> None:
    for checked in (False, True):
        _, _, instructions = find("bits", 80, dtype="fp16", checked=checked)
        assert [i.name for i in instructions if i.name.startswith("LDG")] == ["LDG.E.128"]
        assert [i.name for i in instructions if i.name.startswith("STG")] == ["STG.E.U8"]


def test_gelu_is_cheaper_than_a_library_erf() -> None:
    """A thread holds 24 values of the row; each takes at most 15 instructions more for its GELU."""
    counts = []
    for gelu in (False, True):
        _, _, instructions = find("row_quantize", 80, K=3072, dtype="fp16", norm=True, gelu=gelu, residual=False)
        counts.append(len(instructions))
    assert counts[1] - counts[0] <= 24 * 15


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", FILES)
def test_every_configuration_on_every_architecture(arch: int, name: str) -> None:
    for index in range(len(all_specimens(arch, name))):
        check_health(compiled(name, arch, index)[1])
