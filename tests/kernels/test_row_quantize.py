from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tetra.kernels import quantize_rows, row_quantize

Run = Callable[..., Any]


def expected(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The formulas of the contract in numpy, with float32 rounding after every step."""
    maximum = np.maximum(np.abs(x).max(axis=-1), np.float32(1e-5))
    scaled = x * (np.float32(127) / maximum)[..., None]
    return np.clip(np.rint(scaled), -128, 127).astype(np.int8), maximum / np.float32(127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (0, 8), (3, 127), (5, 768), (2, 3072), (2, 5000)])
def test_codes_and_scales_are_the_formulas(run: Run, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape) * torch.logspace(-4, 3, shape[0] or 1)[: shape[0], None]).to(dtype)
    codes, scale = run(quantize_rows, x)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    codes_expected, scale_expected = expected(x.float().numpy())
    assert np.array_equal(codes.numpy(), codes_expected)
    assert np.array_equal(scale.numpy(), scale_expected)


def test_ties_round_to_even(run: Run) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert run(quantize_rows, x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_zero_and_constant_and_tiny_rows(run: Run) -> None:
    x = torch.stack([torch.zeros(9), torch.full((9,), -3.0), torch.full((9,), 1e-7), torch.full((9,), 3e38)])
    codes, scale = run(quantize_rows, x)
    assert codes[:, 0].tolist() == [0, -127, 1, 127]
    assert np.array_equal(scale.numpy(), expected(x.numpy())[1])


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=20),
        elements=st.floats(-(2.0**126), 2.0**126, width=32),
    )
)
@settings(max_examples=80, deadline=None)
def test_any_finite_values(x: np.ndarray) -> None:
    codes, scale = quantize_rows(torch.from_numpy(x))
    reference_codes, reference_scale = row_quantize.quantize_rows_reference(torch.from_numpy(x))
    assert torch.equal(codes, reference_codes)
    assert torch.equal(scale, reference_scale)
    error = np.abs(codes.numpy() * scale.double().numpy()[..., None] - x)
    assert (error <= 0.5001 * scale.double().numpy()[..., None] + 1e-45).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [5, 5000])
def test_values_that_are_not_finite_are_refused(run: Run, bad: float, k: int) -> None:
    x = torch.randn(4, k)
    x[2, k - 1] = bad
    with pytest.raises(ValueError, match="row 2 holds NaN or infinity"):
        run(quantize_rows, x)


def test_rows_need_not_be_contiguous(run: Run) -> None:
    x = torch.randn(40, 6).T
    codes, scale = run(quantize_rows, x)
    assert np.array_equal(codes.numpy(), expected(x.numpy())[0])
    assert scale.shape == (6,)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"x: dtype is torch\.int32"):
        quantize_rows(torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="no values"):
        quantize_rows(torch.zeros(2, 0))


def test_operator_is_well_formed() -> None:
    torch.library.opcheck(row_quantize._quantize_rows_op, (torch.randn(5, 40),))
