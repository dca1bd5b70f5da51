"""What the compiler makes of the packed product, with what follows it fused, for GPUs that need not be here."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton")

from tetra.autotune.hardware import CHIPS
from tetra.kernels.ahead_of_time import ARCHITECTURES, compile_for
from tetra.kernels.ternary_matmul import CONFIGS, configs_for, default_config, specimen, specimens
from tetra.profiling.sass import Report, report

LARGE, LARGE_2, HOPPER, SMALL_M, SMALL = CONFIGS[:5]
SPLIT = CONFIGS[5]
# What follows the four products of a ternary block.
QKV: dict[str, Any] = {"bias": False, "scaled": True}
UP: dict[str, Any] = {"gelu": True}
OUT_AND_DOWN: dict[str, Any] = {"residual": True}


@cache
def _compiled(arch: int, config: tuple[int, ...], options: tuple[tuple[str, Any], ...]) -> Report:
    return report(compile_for(specimen(config, **dict(options)), arch))


def compiled(arch: int, config: tuple[int, ...], **options: Any) -> Report:
    found = _compiled(arch, config, tuple(sorted(options.items())))
    check_health(found)
    return found


def check_health(found: Report) -> None:
    assert found.spill_instructions == 0
    assert found.stack_bytes == 0
    assert found.shared_bytes <= CHIPS[found.arch].shared_per_block
    assert found.blocks_per_sm >= 1
    # Where a tile does not fit the tensor memory, Triton makes a kernel that stops at once, and says nothing.
    assert found.has_loop
    assert found.main_loop["mma"] > 0


def names(found: Report) -> set[str]:
    return {i.name.split(".")[0] for i in found.loop}


@pytest.mark.parametrize(
    ("arch", "options"),
    [(80, QKV), (80, UP), *((arch, OUT_AND_DOWN) for arch in (80, 86, 87, 89, 120))],
    ids=str,
)
def test_the_loop_is_integer_products_and_little_else(arch: int, options: dict[str, Any]) -> None:
    found = compiled(arch, LARGE, **options)
    assert set(found.tensor_core) == {"IMMA.16832.S8.S8.SAT"}
    assert not names(found) & {"I2F", "I2FP", "PRMT", "HMMA", "STS"}
    assert found.alu_per_mma <= 0.70
    assert found.all_per_mma <= 2.15
    assert found.blocks_per_sm >= 2


@pytest.mark.parametrize("arch", [80, 87])
def test_two_groups_an_iteration_where_shared_memory_is_large(arch: int) -> None:
    found = compiled(arch, LARGE_2, **OUT_AND_DOWN)
    assert found.alu_per_mma <= 0.57
    assert found.all_per_mma <= 2.0
    assert found.blocks_per_sm >= 2


def test_tiles_for_few_rows_on_orin() -> None:
    few, fewer = compiled(87, SMALL_M, **OUT_AND_DOWN), compiled(87, SMALL, **OUT_AND_DOWN)
    assert few.alu_per_mma <= 1.1
    assert few.all_per_mma <= 2.65
    assert few.blocks_per_sm >= 3
    assert fewer.alu_per_mma <= 1.25
    assert fewer.blocks_per_sm >= 4


@pytest.mark.parametrize(("config", "most", "blocks"), [(LARGE, 11.5, 2), (LARGE_2, 9.0, 2), (HOPPER, 5.5, 1)], ids=str)
def test_weights_go_from_registers_to_hopper_s_tensor_cores(config: tuple[int, ...], most: float, blocks: int) -> None:
    """Instructions of one warp for each 64 x 128 x 32 product of its group of four."""
    found = compiled(90, config, **OUT_AND_DOWN)
    assert set(found.tensor_core) == {"IGMMA.64x128x32.S8.S8"}
    assert found.main_loop["sts"] == 0
    assert found.alu_per_mma <= most
    assert found.blocks_per_sm >= blocks


def test_blackwell_s_servers_use_the_older_products_for_integers() -> None:
    found = compiled(100, LARGE_2, **UP)
    assert set(found.tensor_core) == {"IMMA.16832.S8.S8.SAT"}
    assert found.alu_per_mma <= 0.57


def test_float_activations_use_the_tensor_cores_of_their_type() -> None:
    assert set(compiled(80, SMALL_M, x="fp16", **UP).tensor_core) == {"HMMA.16816.F32"}
    assert set(compiled(100, SMALL_M, x="bf16", out="bf16", **OUT_AND_DOWN).tensor_core) == {"UTCHMMA"}


def test_splitting_k_and_int32_sums_cost_no_register_file() -> None:
    assert compiled(80, SPLIT, **OUT_AND_DOWN).blocks_per_sm >= 4
    raw = compiled(80, LARGE, out="i32")
    assert raw.blocks_per_sm >= 2
    # What follows the loop leaves the loop alone, so what is proven of the raw sums holds for the layers.
    assert raw.main_loop == compiled(80, LARGE, **OUT_AND_DOWN).main_loop


def test_inline_assembly_earns_its_place() -> None:
    plain = compiled(80, SMALL, inline_asm=False, **OUT_AND_DOWN)
    assert plain.alu_per_mma > 2 * compiled(80, SMALL, **OUT_AND_DOWN).alu_per_mma


@pytest.mark.parametrize("arch", [86, 90])
def test_any_n_has_a_tile_that_does_not_spill(arch: int) -> None:
    """Outputs that are not a multiple of 16 move one by one, which takes registers."""
    config = default_config(arch, 16, 64 * 530, 700, 768)
    assert compiled(arch, config, aligned_n=False, **OUT_AND_DOWN).blocks_per_sm >= 2


def test_float32_results_are_healthy() -> None:
    assert compiled(86, LARGE, out="fp32", **OUT_AND_DOWN).alu_per_mma <= 0.7


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_that_ships_is_healthy_on_every_architecture(arch: int) -> None:
    found = [(s.config, report(compile_for(s, arch))) for s in specimens(arch)]
    for row in configs_for(arch, n=700):
        found.append((row, compiled(arch, row, aligned_n=False, residual=True, gelu=True)))
    for x, n_bytes in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
        found += [(row, compiled(arch, row, x=x, out=x, residual=True)) for row in configs_for(arch, n_bytes)]
    for config, one in found:
        check_health(one)
        if isinstance(config, dict) and config["x"] == "i8":
            wanted = "IGMMA" if arch == 90 else "IMMA"
            assert all(re.match(wanted, name) for name in one.tensor_core), config
        if arch != 90 and isinstance(config, dict) and (config["BLOCK_M"], config["BLOCK_N"]) == (128, 128):
            assert one.alu_per_mma <= 0.8, config
            assert one.all_per_mma <= 2.3, config
