"""The static model: rates of units by hand, and what has to hold whatever the figures are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetra.autotune.hardware import PRODUCTS, Product
from tetra.profiling.roofline import (
    FORMULA,
    LAUNCH_OVERHEAD_S,
    UNITS,
    Launch,
    bound_seconds,
    loop_limit,
    predict_launch,
    tensor_dtype,
    unit_clocks,
    warp_macs,
)
from tetra.profiling.sass import Instruction, Report

A100 = PRODUCTS["A100 SXM 80GB"]
any_product = st.sampled_from(list(PRODUCTS.values()))


def code(*names: str) -> tuple[Instruction, ...]:
    return tuple(Instruction(16 * i, name, "") for i, name in enumerate(names))


def made_of(loop: tuple[Instruction, ...], outside: tuple[Instruction, ...] = ()) -> Report:
    return Report(80, 128, 0, 0, 0, 4, 2, loop, outside)


LOOP = code(*["IMMA.16832.S8.S8"] * 8, *["LOP3.LUT"] * 4, "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "BRA")


def test_clocks_of_units_by_hand() -> None:
    clocks = unit_clocks(LOOP, 4, A100)
    assert clocks["tensor"] == pytest.approx(4 * 8 * 4096 / 2048, rel=1e-3)  # 2048 multiply-adds a clock
    assert clocks["issue"] == 4 * 15 / 4
    assert clocks["alu"] == 4 * 4 * 32 / 64
    assert clocks["shared"] == 4 * (512 + 512) / 128
    assert clocks["l2"] == 4 * 512 / 64
    assert clocks["float"] == clocks["special"] == 0
    assert unit_clocks(code("MUFU.EX2", "POPC", "FFMA", "F2FP.F16.F32"), 1, A100) | {"issue": 0} == {
        "tensor": 0, "issue": 0, "alu": 0.5, "float": 0.5, "special": 4, "shared": 0, "l2": 0,
    }  # fmt: skip


def test_products_of_a_warpgroup_count_once() -> None:
    assert warp_macs("IGMMA.64x128x32.S8.S8") == 64 * 128 * 32 / 4
    assert warp_macs("HMMA.16816.F32") == 16 * 8 * 16
    assert warp_macs("UTCHMMA") is None
    names = ("IMMA.16832", "IGMMA.64x8x32", "UTCIMMA", "HMMA.16816.F32", "HMMA.1688.F32.TF32")
    assert [tensor_dtype(name) for name in names] == ["int8", "int8", "int8", "fp16", "tf32"]


def test_the_busiest_unit_limits_a_loop() -> None:
    limit = loop_limit(made_of(LOOP, code("EXIT")), A100)
    assert limit.unit == "tensor"
    assert limit.tensor_share == 1
    slow = loop_limit(made_of((*LOOP, *code(*["PRMT"] * 60))), A100)
    assert slow.unit == "alu"
    assert slow.tensor_share == pytest.approx(limit.clocks["tensor"] / slow.clocks["alu"])
    assert loop_limit(made_of(code("LDG.E.128", "FADD", "STG.E.128", "EXIT")), A100).unit == "memory"
    assert loop_limit(made_of(code("UTCHMMA", "FADD")), A100).tensor_share is None


@given(
    product=any_product,
    operations=st.integers(0, 10**12),
    n_bytes=st.integers(0, 10**10),
    blocks=st.integers(1, 10**5),
    iterations=st.integers(1, 10**4),
    macs=st.integers(0, 10**6),
    with_code=st.booleans(),
)
def test_no_prediction_beats_the_bound(
    product: Product, operations: int, n_bytes: int, blocks: int, iterations: int, macs: int, with_code: bool
) -> None:
    launch = Launch("x", "x", operations, "int8", n_bytes, blocks, iterations, macs)
    found = made_of(LOOP, code("EXIT")) if with_code else None
    prediction = predict_launch(launch, product, found)
    assert prediction.bound_s == bound_seconds(launch, product)[0]
    assert prediction.seconds >= prediction.bound_s + LAUNCH_OVERHEAD_S
    assert prediction.seconds >= n_bytes / (product.dram_gb_per_s * 1e9)
    assert prediction.limit in (*UNITS, "memory")
    # More blocks, work or bytes never take less.
    for more in ({"blocks": 2 * blocks}, {"iterations": 2 * iterations}, {"n_bytes": 2 * n_bytes}):
        assert predict_launch(replace(launch, **more), product, found).seconds >= prediction.seconds


def test_work_outside_the_tensor_cores_is_bound_by_the_float_units() -> None:
    launch = Launch("x", "x", 10**12, "fp32", 1, 1)
    seconds, limit = bound_seconds(launch, A100)
    assert limit == "float"
    assert seconds == pytest.approx(1 / 19.5, rel=0.01)  # the A100 is sold with 19.5 TFLOPS in float32
    assert bound_seconds(replace(launch, n_bytes=2039 * 10**9), A100) == (1.0, "memory")


def test_waves_are_quantised() -> None:
    def seconds(blocks: int) -> float:
        return predict_launch(Launch("x", "x", 0, "int8", 0, blocks, 100), A100, made_of(LOOP, code("EXIT"))).seconds

    assert seconds(1) == seconds(A100.n_sms)
    one = seconds(1) - LAUNCH_OVERHEAD_S
    assert seconds(A100.n_sms + 1) - LAUNCH_OVERHEAD_S == pytest.approx(2 * one)


def test_a_loop_that_the_compiler_unrolled_runs_less_often() -> None:
    launch = Launch("x", "x", 0, "int8", 0, 1, iterations=1000, macs=4 * 8 * 4096)
    once = predict_launch(launch, A100, made_of(LOOP, code("EXIT"))).seconds
    assert predict_launch(launch, A100, made_of(LOOP + LOOP, code("EXIT"))).seconds == pytest.approx(once, rel=1e-3)
    # A fraction more products, which sum rows say, is not another iteration.
    more = LOOP + code("IMMA.16832.S8.S8")
    assert predict_launch(launch, A100, made_of(more, code("EXIT"))).seconds > 1.05 * once


def test_products_of_unknown_size_are_counted_by_the_shape() -> None:
    b200 = PRODUCTS["B200"]
    launch = Launch("x", "x", 0, "fp16", 0, 1, iterations=1000, macs=1 << 20)
    seconds = predict_launch(launch, b200, made_of(code("UTCHMMA", "BRA"), code("EXIT"))).seconds
    clocks = 1000 * (1 << 20) / b200.macs_per_clock("fp16")
    assert seconds - LAUNCH_OVERHEAD_S == pytest.approx(clocks / (b200.clock_ghz * 1e9))


def test_the_formula_states_the_overhead() -> None:
    assert f"+ {1e6 * LAUNCH_OVERHEAD_S:g} us" in FORMULA
