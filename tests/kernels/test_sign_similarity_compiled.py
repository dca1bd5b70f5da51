"""What the compiler makes of the kernels of sign similarity, for GPUs that need not be here."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton")

from tetra.autotune.hardware import CHIPS
from tetra.kernels.ahead_of_time import ARCHITECTURES, all_specimens, compile_for
from tetra.profiling.sass import Report, report

N_SPECIMENS = len(all_specimens(80, "sign_similarity"))


@cache
def _report(arch: int, index: int) -> Report:
    return report(compile_for(all_specimens(arch, "sign_similarity")[index], arch))


def find(arch: int, **wanted: Any) -> Report:
    """The first in the table, which is the one that runs untuned."""
    listed = all_specimens(arch, "sign_similarity")
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
def test_what_runs_untuned_is_healthy_everywhere(arch: int) -> None:
    for part, aligned in (("forward", True), ("gradient", False), ("gradient", True)):
        found = find(arch, aligned=aligned, **{"pass": part})
        check_health(found)
        assert found.blocks_per_sm >= 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_popcount_is_one_instruction_and_takes_two_more(arch: int) -> None:
    """XOR and addition; two popcounts are added at once. Rows come four to a load, and nothing is masked."""
    found = find(arch, **{"pass": "forward"})
    n_popcounts = 16 * 4  # rows, words a step; of one column a thread
    assert found.main_loop["popc"] == n_popcounts
    assert found.main_loop["ldg"] == n_popcounts // 4 + 4
    assert found.main_loop["alu"] <= 2.1 * n_popcounts


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_gradient_s_product_runs_on_tensor_cores(arch: int) -> None:
    found = find(arch, **{"pass": "gradient"})
    wanted = {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")
    assert found.tensor_core
    assert all(name.startswith(wanted) for name in found.tensor_core)


@pytest.mark.parametrize("arch", [80, 86, 87, 89, 120])
def test_unpacking_takes_four_integer_instructions_a_sign(arch: int) -> None:
    """A thread unpacks 32 signs for 64 products, each of 16 x 8 x 16 values."""
    found = find(arch, **{"pass": "gradient"})
    assert found.main_loop["mma"] == 64
    assert found.main_loop["alu"] <= 4.5 * 32


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_on_every_architecture(arch: int) -> None:
    for index in range(N_SPECIMENS):
        check_health(_report(arch, index))
