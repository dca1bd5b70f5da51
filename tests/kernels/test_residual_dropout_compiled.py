"""What the compiler makes of the residual dropout, for GPUs that need not be here."""

from __future__ import annotations

import re
from functools import cache

import pytest

pytest.importorskip("triton")

from tetra.kernels.ahead_of_time import ARCHITECTURES, all_specimens, compile_for, disassemble
from tetra.kernels.specimen import Specimen
from tetra.profiling.sass import Instruction, Report, parse_instructions, report

N_SPECIMENS = len(all_specimens(80, "residual_dropout"))
DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@cache
def compiled(arch: int, index: int) -> tuple[Specimen, Report, list[Instruction]]:
    found = all_specimens(arch, "residual_dropout")[index]
    result = compile_for(found, arch)
    return found, report(result), parse_instructions(disassemble(result)[0])


def check_health(found: Report) -> None:
    assert found.spill_instructions == 0
    assert found.stack_bytes == 0
    assert found.shared_bytes == 0
    assert found.registers <= 64


@pytest.mark.parametrize("index", range(N_SPECIMENS))
def test_rows_are_read_and_written_once(index: int) -> None:
    found, health, instructions = compiled(80, index)
    check_health(health)
    config, n_warps = found.config, found.options["num_warps"]
    values = -(-config["K"] // found.constants["CHUNK"]) * found.constants["CHUNK"]
    loads = [i for i in instructions if re.match(r"LDG", i.name)]
    read = sum(i.access_bytes for i in loads) * n_warps
    seed = sum(i.access_bytes for i in loads if ".64" in i.name and i.access_bytes == 256) * n_warps
    sides = DTYPE_BYTES[config["y"]] + (DTYPE_BYTES[config["out"]] if config["residual"] else 0)
    assert read in (values * sides, values * sides + seed, values * sides + 256 * n_warps)
    stores = [i for i in instructions if i.name.startswith("STG")]
    assert sum(i.access_bytes for i in stores) * n_warps == values * DTYPE_BYTES[config["out"]]
    assert not any(i.name.startswith(("SHFL", "BAR")) for i in instructions)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_on_every_architecture(arch: int) -> None:
    for index in range(N_SPECIMENS):
        check_health(compiled(arch, index)[1])
