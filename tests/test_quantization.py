"""The quantisers against their formulas, in float64 where rounding matters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from tetra.errors import ConfigError
from tetra.kernels import quantize_rows
from tetra.quantization import blend_activation, blend_weight, lambda_at, ternarize_weight

SHAPES = [(1, 1), (3, 5), (64, 48), (7, 129), (1, 300)]
LAMBDAS = [0.0, 0.1, 0.5, 0.99, 1.0]


def weight_reference(weight: Tensor) -> tuple[np.ndarray, float]:
    """Codes and 1 / s by definition, in float64."""
    w = weight.double().numpy()
    s = 1.0 / max(float(np.abs(w).mean()), 1e-5)
    return np.clip(np.round(w * s), -1, 1), 1.0 / s


def activation_reference(x: Tensor) -> np.ndarray:
    """Q(x) by definition, in float64."""
    values = x.double().numpy()
    a = 127.0 / np.maximum(np.abs(values).max(-1, keepdims=True), 1e-5)
    return np.clip(np.round(values * a), -128, 127) / a


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_codes_follow_the_formula(shape: tuple[int, int], magnitude: float) -> None:
    weight = torch.randn(shape) * magnitude
    codes, scale = ternarize_weight(weight)
    expected, expected_scale = weight_reference(weight)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == ()
    np.testing.assert_array_equal(codes.numpy(), expected)
    assert scale.item() == pytest.approx(expected_scale, rel=1e-6)


def test_half_way_values_round_to_even() -> None:
    # mean|W| = 1, so that 0.5 lies half way between the codes 0 and 1, and 1.5 between 1 and the clipped 2.
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5]])
    codes, scale = ternarize_weight(weight)
    assert scale == 1.0
    assert codes.tolist() == [[0, 0, 1, -1]]


@pytest.mark.parametrize("value", [0.0, 1e-9, -1e-6])
def test_weights_below_epsilon(value: float) -> None:
    codes, scale = ternarize_weight(torch.full((4, 6), value))
    assert scale.item() == pytest.approx(1e-5)
    assert not codes.any()
    assert torch.equal(blend_weight(torch.zeros(4, 6), 1.0), torch.zeros(4, 6))


def test_zero_rows_and_constant_weights() -> None:
    weight = torch.randn(4, 8)
    weight[1] = 0.0
    codes, _ = ternarize_weight(weight)
    assert not codes[1].any()
    codes, scale = ternarize_weight(torch.full((3, 5), -0.25))
    assert (codes == -1).all()
    assert scale.item() == 0.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_quantise_as_their_float32_values(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 17).to(dtype)
    codes, scale = ternarize_weight(weight)
    expected, expected_scale = ternarize_weight(weight.float())
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused(value: float) -> None:
    weight = torch.randn(3, 4)
    weight[2, 1] = value
    with pytest.raises(ValueError, match=r"\(3, 4\).*NaN or infinite"):
        ternarize_weight(weight)


def test_an_empty_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        ternarize_weight(torch.zeros(0, 4))


floats32 = st.floats(-1e6, 1e6, width=32)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=floats32)


@settings(deadline=None, max_examples=100)
@given(matrices)
def test_weight_properties(array: np.ndarray) -> None:
    weight = torch.from_numpy(array)
    codes, scale = ternarize_weight(weight)
    assert set(codes.unique().tolist()) <= {-1, 0, 1}
    assert scale >= 1e-5
    assert torch.equal(ternarize_weight(-weight)[0], -codes)
    # A code never has the wrong sign, and what is well above or below half the scale has the right size.
    ratio = weight.double() / scale.double()
    assert (codes * weight >= 0).all()
    assert (codes[ratio.abs() > 0.50001] != 0).all()
    assert (codes[ratio.abs() < 0.49999] == 0).all()
    if weight.abs().mean() > 1e-4:
        doubled, doubled_scale = ternarize_weight(weight * 4)
        assert torch.equal(doubled, codes)
        assert doubled_scale == scale * 4


@settings(deadline=None, max_examples=100)
@given(matrices)
def test_activation_properties(array: np.ndarray) -> None:
    x = torch.from_numpy(array)
    quantised = blend_activation(x, 1.0).double()
    step = x.double().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    # Within half a step of the value; the slack is float32's rounding.
    assert ((quantised - x.double()).abs() <= step * 0.501 + x.abs().amax() * 1e-6).all()
    # The same values as the integer path of inference.
    x_q, scale = quantize_rows(x)
    torch.testing.assert_close(quantised, x_q.double() * scale.double()[:, None], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_blends_follow_the_formula(shape: tuple[int, int], lam: float) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    codes, scale = weight_reference(x)
    expected = x.numpy() + lam * (codes * scale - x.numpy())
    np.testing.assert_allclose(blend_weight(x, lam).numpy(), expected, rtol=1e-12, atol=1e-12)
    expected = x.numpy() + lam * (activation_reference(x) - x.numpy())
    np.testing.assert_allclose(blend_activation(x, lam).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("blend", [blend_weight, blend_activation])
def test_gradients_pass_straight_through(blend: object, lam: float) -> None:
    assert callable(blend)
    x = torch.randn(5, 7, requires_grad=True)
    upstream = torch.randn(5, 7)
    blend(x, lam).backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream)


def test_blending_leaves_its_input_alone() -> None:
    x = torch.randn(4, 6)
    before = x.clone()
    for lam in LAMBDAS:
        blend_weight(x, lam)
        blend_activation(x, lam)
    assert torch.equal(x, before)


def test_rows_of_activations_are_independent() -> None:
    x = torch.randn(6, 33)
    x[2] = 0.0
    x[3] = -7.5
    x[4] *= 1e5
    together = blend_activation(x, 1.0)
    alone = torch.cat([blend_activation(row[None], 1.0) for row in x])
    assert torch.equal(together, alone)
    assert not together[2].any()
    torch.testing.assert_close(together[3], x[3])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_show_in_the_blend(value: float) -> None:
    # Training finds them in the loss; nothing may hide them before.
    x = torch.randn(2, 4)
    x[0, 1] = value
    assert not torch.isfinite(blend_activation(x, 0.5)[0]).all()
    assert torch.isfinite(blend_activation(x, 0.5)[1]).all()
    assert not torch.isfinite(blend_weight(x, 0.5)).all()


@pytest.mark.parametrize("t", [0.0, 0.1, 0.375, 0.5, 0.9, 1.0])
def test_lambda_schedules(t: float) -> None:
    assert lambda_at(t) == pytest.approx(1 / (1 + np.exp(-(16 * t - 6))), rel=1e-12)
    assert lambda_at(t, "sigmoid") == lambda_at(t)
    assert lambda_at(t, "linear") == t
    assert lambda_at(t, "cosine") == pytest.approx((1 - np.cos(np.pi * t)) / 2, abs=1e-15)
    assert lambda_at(t, "none") == 1.0


def test_lambda_end_points() -> None:
    assert lambda_at(0.375) == 0.5
    assert lambda_at(0.0) < 0.0025
    assert lambda_at(1.0) > 0.9999
    for schedule in ("linear", "cosine"):
        assert lambda_at(0.0, schedule) == 0.0  # type: ignore[arg-type]
        assert lambda_at(1.0, schedule) == 1.0  # type: ignore[arg-type]


@given(st.floats(-2, 3), st.floats(-2, 3), st.sampled_from(["sigmoid", "linear", "cosine", "none"]))
def test_lambda_rises_and_stays_within_bounds(a: float, b: float, schedule: str) -> None:
    low, high = sorted((a, b))
    first, second = lambda_at(low, schedule), lambda_at(high, schedule)  # type: ignore[arg-type]
    assert 0.0 <= first <= second <= 1.0


def test_unknown_schedule() -> None:
    with pytest.raises(ConfigError, match=r"unknown lambda schedule 'step'; known: sigmoid, linear, cosine, none"):
        lambda_at(0.5, "step")  # type: ignore[arg-type]
