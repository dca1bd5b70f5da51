"""What the compiler makes of the attention kernel, for GPUs that need not be here."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton")

from tetra.autotune.hardware import CHIPS
from tetra.kernels.ahead_of_time import ARCHITECTURES, all_specimens, compile_for
from tetra.profiling.sass import Report, report


@cache
def _report(arch: int, index: int) -> Report:
    return report(compile_for(all_specimens(arch, "attention")[index], arch))


def attention_report(arch: int, **wanted: Any) -> Report:
    (index,) = [i for i, s in enumerate(all_specimens(arch, "attention")) if wanted.items() <= s.config.items()]
    return _report(arch, index)


def check_health(found: Report) -> None:
    assert found.spill_instructions == 0
    assert found.stack_bytes == 0
    assert found.shared_bytes <= CHIPS[found.arch].shared_per_block
    assert found.blocks_per_sm >= 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernel_is_healthy_and_uses_tensor_cores(arch: int) -> None:
    found = attention_report(arch, head_dim=64, tokens=530, dtype="fp16", prescaled=True)
    check_health(found)
    wanted = {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")
    assert any(name.startswith(wanted) for name in found.tensor_core)
    assert all("MMA" in name and not name.startswith(("IMMA", "DMMA")) for name in found.tensor_core)


@pytest.mark.parametrize("arch", [80, 86, 87, 89, 120])
def test_the_main_loop_is_short(arch: int) -> None:
    """64 queries by 64 keys by 64 dims are 64 tensor-core instructions a warp, and 4 that add the weights up."""
    found = attention_report(arch, head_dim=64, tokens=530, dtype="fp16", prescaled=True)
    assert found.main_loop["mma"] == 68
    assert found.main_loop.total() <= 372  # 324 on sm_80, 315 on sm_120; without a peeled last step about 400
    # No comparison of a position with the number of tokens: what is left of the integers is addresses.
    assert found.main_loop["alu"] <= 50


def test_three_blocks_share_a_multiprocessor() -> None:
    for arch in (80, 87, 90):
        assert attention_report(arch, head_dim=64, tokens=530, dtype="fp16", prescaled=True).blocks_per_sm >= 3


@pytest.mark.parametrize(("head_dim", "mma", "instructions"), [(32, 36, 290), (96, 100, 455), (128, 132, 525)])
def test_other_head_dims(head_dim: int, mma: int, instructions: int) -> None:
    """A head dim of 96 is 64 + 32: padded to 128 it would take as many products as 128."""
    found = attention_report(80, head_dim=head_dim, tokens=530)
    check_health(found)
    assert found.main_loop["mma"] == mma
    assert found.main_loop.total() <= instructions


def test_scaling_in_the_kernel_costs_an_instruction_a_logit() -> None:
    scaled = attention_report(80, head_dim=64, prescaled=False)
    plain = attention_report(80, head_dim=64, tokens=530, dtype="fp16", prescaled=True)
    check_health(scaled)
    assert 24 <= scaled.main_loop["float"] - plain.main_loop["float"] <= 40


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_on_every_architecture(arch: int) -> None:
    for index in range(len(all_specimens(arch, "attention"))):
        found = _report(arch, index)
        assert found.spill_instructions == found.stack_bytes == 0
        assert found.shared_bytes <= CHIPS[arch].shared_per_block
        assert found.blocks_per_sm >= 1
