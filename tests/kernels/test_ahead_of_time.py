"""What the compiler makes of the kernels, for GPUs that need not be here."""

from __future__ import annotations

from functools import cache

import pytest

pytest.importorskip("triton")

from tetra.autotune.hardware import CHIPS
from tetra.kernels.ahead_of_time import (
    ARCHITECTURES,
    compile_for,
    quantize_rows_specimen,
    ternary_matmul_specimen,
)
from tetra.kernels.ternary_matmul import CONFIGS
from tetra.profiling.sass import Report, report


@cache
def matmul_report(arch: int, config: tuple[int, ...] = CONFIGS[0], **options: object) -> Report:
    return report(compile_for(ternary_matmul_specimen(config, **options), arch))  # type: ignore[arg-type]


def check_health(found: Report) -> None:
    assert found.spill_instructions == 0
    assert found.stack_bytes == 0
    assert found.shared_bytes <= CHIPS[found.arch].shared_per_block
    assert found.blocks_per_sm >= 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_product_uses_tensor_cores_and_does_not_spill(arch: int) -> None:
    found = matmul_report(arch)
    check_health(found)
    wanted = "IGMMA" if arch == 90 else "IMMA"
    assert found.tensor_core
    assert all(name.startswith(wanted) for name in found.tensor_core)


@pytest.mark.parametrize("arch", [80, 86, 87, 89, 120])
def test_unpacking_takes_less_than_one_instruction_a_product(arch: int) -> None:
    found = matmul_report(arch)
    assert found.alu_per_mma <= 0.8
    assert found.all_per_mma <= 2.3


def test_inline_assembly_earns_its_place() -> None:
    assert matmul_report(80, inline_asm=False).alu_per_mma > 2 * matmul_report(80).alu_per_mma


@pytest.mark.parametrize("config", CONFIGS[1:], ids=str)
def test_every_configuration_compiles_well(config: tuple[int, ...]) -> None:
    found = matmul_report(80, config)
    check_health(found)
    assert found.main_loop["mma"] > 0


@pytest.mark.parametrize("options", [{"raw": True}, {"aligned_n": False}, {"out": "bf16"}, {"out": "fp32"}], ids=str)
def test_other_specialisations_compile_well(options: dict[str, object]) -> None:
    found = matmul_report(87, CONFIGS[0], **options)
    check_health(found)
    assert found.main_loop["mma"] > 0


@pytest.mark.parametrize("k", [768, 3072, 5000])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_row_quantiser_is_small(k: int, dtype: str) -> None:
    found = report(compile_for(quantize_rows_specimen(k, dtype), 80))
    assert found.registers <= 64
    assert found.spill_instructions == found.stack_bytes == 0


def test_architectures_outside_the_list_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sm_75 is not supported .* no int8 tensor-core product"):
        compile_for(ternary_matmul_specimen(), 75)
    with pytest.raises(ValueError, match="sm_88 is unknown"):
        compile_for(ternary_matmul_specimen(), 88)
    assert set(CHIPS) == set(ARCHITECTURES)
