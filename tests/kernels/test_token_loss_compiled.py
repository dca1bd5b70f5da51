"""What the compiler makes of the token loss, for GPUs that need not be here."""

from __future__ import annotations

import re
from functools import cache

import pytest

pytest.importorskip("triton")

from tetra.kernels.ahead_of_time import ARCHITECTURES, all_specimens, compile_for, disassemble
from tetra.kernels.specimen import Specimen
from tetra.profiling.sass import Instruction, Report, parse_instructions, report

N_SPECIMENS = len(all_specimens(80, "token_loss"))
DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@cache
def compiled(arch: int, index: int) -> tuple[Specimen, Report, list[Instruction]]:
    found = all_specimens(arch, "token_loss")[index]
    result = compile_for(found, arch)
    return found, report(result), parse_instructions(disassemble(result)[0])


def check_health(found: Report) -> None:
    assert found.spill_instructions == 0
    assert found.stack_bytes == 0
    assert found.registers <= 64
    assert found.blocks_per_sm >= 1


@pytest.mark.parametrize("index", range(N_SPECIMENS))
def test_tokens_are_read_once(index: int) -> None:
    """In 16-byte loads of the wider type, forward and backward; forward writes three numbers."""
    found, health, instructions = compiled(80, index)
    check_health(health)
    n_warps, config = found.options["num_warps"], found.config
    loads = [i for i in instructions if re.match(r"LDG", i.name)]
    values = -(-config["C"] // config["CHUNK"]) * config["CHUNK"]
    read = values * (DTYPE_BYTES[config["student"]] + DTYPE_BYTES[config["teacher"]])
    if config["pass"] == "gradient":
        scalars = [i for i in loads if i.access_bytes == 128]  # the same address for all threads
        assert len(scalars) >= 3
        read += 3 * 128 * n_warps
    assert sum(i.access_bytes for i in loads) * n_warps == read
    if config["student"] == config["teacher"]:
        assert sum("128" in i.name for i in loads) >= len(loads) - 3
    stores = [i for i in instructions if i.name.startswith("STG")]
    if config["pass"] == "forward":
        assert len(stores) == 3


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_on_every_architecture(arch: int) -> None:
    for index in range(N_SPECIMENS):
        check_health(compiled(arch, index)[1])
