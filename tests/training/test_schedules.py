"""Learning-rate schedules against their definitions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetra.training.schedules import warmup_cosine, warmup_steps_down


def test_warm_up_is_linear_and_the_cosine_ends_at_zero() -> None:
    factors = [warmup_cosine(step, 200) for step in range(201)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    for step in range(10, 201):
        assert factors[step] == pytest.approx((1 + math.cos(math.pi * (step - 10) / 190)) / 2)
    assert factors[200] == pytest.approx(0.0, abs=1e-12)


@given(st.integers(1, 500), st.floats(0, 1), st.integers(0, 600))
def test_the_factor_stays_within_bounds(total: int, fraction: float, step: int) -> None:
    factor = warmup_cosine(step, total, fraction)
    assert 0.0 <= factor <= 1.0
    if step < total * min(fraction, 0.9):
        assert factor > 0.0  # no step is lost


def test_a_stage_of_one_step_trains_at_the_full_rate() -> None:
    assert warmup_cosine(0, 1) == 1.0


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [
        (0.0, 0.0),
        (1.5, 0.5),
        (3.0, 1.0),
        (9.99, 1.0),
        (10.0, 0.3),
        (19.99, 0.3),
        (20.0, 0.09),
        (30.0, 0.027),
        (40.0, 0.027),
    ],
)
def test_steps_down(epoch: float, factor: float) -> None:
    assert warmup_steps_down(epoch) == pytest.approx(factor, abs=1e-8)


def test_steps_down_settings() -> None:
    assert warmup_steps_down(0.0, warmup_epochs=0.0) == 1.0
    assert warmup_steps_down(5.0, 0.0, milestones=(5,), gamma=0.5) == 0.5
    assert warmup_steps_down(50.0, 0.0, milestones=()) == 1.0
