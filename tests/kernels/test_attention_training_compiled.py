"""What the compiler makes of the kernels of attention for training, for GPUs that need not be here."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton")

from tetra.autotune.hardware import CHIPS
from tetra.kernels.ahead_of_time import ARCHITECTURES, all_specimens, compile_for
from tetra.kernels.attention_training import PARTS
from tetra.profiling.sass import Report, report

NAME = "attention_training"
USUAL = {"head_dim": 64, "tokens": 530, "dtype": "bf16", "dropout": 0.0}


@cache
def _report(arch: int, index: int) -> Report:
    return report(compile_for(all_specimens(arch, NAME)[index], arch))


def training_report(arch: int, **wanted: Any) -> Report:
    (index,) = [i for i, s in enumerate(all_specimens(arch, NAME)) if wanted.items() <= s.config.items()]
    return _report(arch, index)


def check_health(found: Report) -> None:
    assert found.spill_instructions == 0
    assert found.stack_bytes == 0
    assert found.shared_bytes <= CHIPS[found.arch].shared_per_block
    assert found.blocks_per_sm >= 2


@pytest.mark.parametrize("part", PARTS)
def test_the_kernels_are_healthy_and_use_tensor_cores(part: str) -> None:
    found = training_report(80, part=part, **USUAL)
    check_health(found)
    assert all(name.startswith("HMMA.16816.F32.BF16") for name in found.tensor_core)


@pytest.mark.parametrize(
    ("part", "blocks", "mma", "instructions"),
    [
        # Queries by keys of a step: 64 x 64, 64 x 32, 64 x 32; two, three and four products of 64 dims. Forward, 4 more
        # instructions add the weights up.
        ("forward", 3, 68, 368),
        ("queries", 3, 48, 207),
        ("keys", 2, 64, 282),
    ],
)
def test_the_main_loops_are_short(part: str, blocks: int, mma: int, instructions: int) -> None:
    found = training_report(80, part=part, **USUAL)
    assert found.blocks_per_sm >= blocks
    assert found.main_loop["mma"] == mma
    assert found.main_loop.total() <= instructions
    # No comparison of a position with the number of tokens: what is left of the integers is addresses.
    assert found.main_loop["alu"] <= 42
    # Maps go from one product into the next in registers.
    assert found.main_loop["sts"] == found.main_loop["shfl"] == 0 or part == "forward"


@pytest.mark.parametrize("part", PARTS)
def test_dropout_hashes_every_weight_once(part: str) -> None:
    plain, dropped = (training_report(80, part=part, **{**USUAL, "dropout": p}) for p in (0.0, 0.1))
    check_health(dropped)
    weights = 64 * 64 // 128 if part == "forward" else 64 * 32 // 128
    # A product is two instructions on some chips; in "keys" the rows are hashed anew in every step.
    assert dropped.main_loop["alu"] - plain.main_loop["alu"] <= (14 if part != "keys" else 18) * weights


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_other_head_dims(part: str, head_dim: int) -> None:
    check_health(training_report(80, part=part, **{**USUAL, "head_dim": head_dim}))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_on_every_architecture(arch: int) -> None:
    for index in range(len(all_specimens(arch, NAME))):
        check_health(_report(arch, index))
