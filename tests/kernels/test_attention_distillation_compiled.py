"""What the compiler makes of the kernels of attention distillation, for GPUs that need not be here."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton")

from tetra.autotune.hardware import CHIPS
from tetra.kernels.ahead_of_time import ARCHITECTURES, all_specimens, compile_for
from tetra.profiling.sass import Report, report

N_SPECIMENS = len(all_specimens(80, "attention_distillation"))


@cache
def _report(arch: int, index: int) -> Report:
    return report(compile_for(all_specimens(arch, "attention_distillation")[index], arch))


def find(arch: int, **wanted: Any) -> Report:
    """The first in the table, which is the one that runs untuned."""
    listed = all_specimens(arch, "attention_distillation")
    return _report(arch, next(i for i, s in enumerate(listed) if wanted.items() <= s.config.items()))


def check_health(found: Report) -> None:
    assert found.spill_instructions == 0
    assert found.stack_bytes == 0
    assert found.shared_bytes <= CHIPS[found.arch].shared_per_block
    assert found.blocks_per_sm >= 1


@pytest.mark.parametrize("index", range(N_SPECIMENS))
def test_every_configuration_is_healthy(index: int) -> None:
    check_health(_report(80, index))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_runs_untuned_is_healthy_everywhere_and_uses_tensor_cores(arch: int) -> None:
    for part in ("forward", "logit gradient"):
        found = find(arch, dtype="bf16", **{"pass": part})
        check_health(found)
        assert found.blocks_per_sm >= 2
        wanted = {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")
        assert found.tensor_core
        assert all(name.startswith(wanted) for name in found.tensor_core)


@pytest.mark.parametrize("part", ["forward", "logit gradient"])
def test_two_blocks_of_64_by_64_share_a_multiprocessor(part: str) -> None:
    for dtype in ("bf16", "fp16", "fp32"):
        assert find(80, dtype=dtype, BLOCK_M=64, BLOCK_N=64, **{"pass": part}).blocks_per_sm >= 2


@pytest.mark.parametrize("part", ["forward", "logit gradient"])
@pytest.mark.parametrize("arch", [80, 86, 87, 89, 120])
def test_a_step_of_the_products_is_short(arch: int, part: str) -> None:
    """64 x 64 x 64 are 32 tensor-core instructions a warp. Rows that exist: no comparisons, hardly any integers."""
    found = find(arch, dtype="bf16", student_width=768, **{"pass": part})
    assert found.main_loop["mma"] == 32
    assert found.main_loop.total() <= 100
    assert found.main_loop["alu"] <= 30  # 25; a mask in the loop takes it past 100


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_on_every_architecture(arch: int) -> None:
    for index in range(N_SPECIMENS):
        check_health(_report(arch, index))
