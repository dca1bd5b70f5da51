from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tetra.kernels import layer_norm
from tetra.kernels.layer_norm import _add_layer_norm_op, _layer_norm_op, cost, layer_norm_reference

Run = Callable[..., Any]

# Half a unit in the last place of a result of size one, and what float32 sums add to it.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2e-6}


def with_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    return layer_norm(x, weight, bias, residual=residual)


def expected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


def check(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    wanted = expected(x, weight, bias)
    # The sums err relative to the largest term, of the size of the product of weight and normalised value.
    size = (wanted - bias.double()).abs() + bias.double().abs() + 1.0
    assert ((out.double() - wanted).abs() <= (ROUNDING[out.dtype] + 2e-6) * size).all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 127), (2, 3, 768), (1, 1025), (1, 3072)])
def test_layer_norm_is_its_definition(run: Run, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (3.0 * torch.randn(shape) + torch.randn(shape[:-1]).unsqueeze(-1)).to(dtype)
    weight, bias = torch.rand(shape[-1]) + 0.5, torch.randn(shape[-1])
    out = run(layer_norm, x, weight, bias)
    assert out.dtype == dtype
    assert out.shape == shape
    check(out, x, weight, bias)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_residual_is_added_first_and_rounded(run: Run, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 5, 130).to(dtype)
    weight, bias = torch.rand(130) + 0.5, torch.randn(130)
    out, total = run(with_residual, x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    check(out, x + residual, weight, bias)


def test_rows_wider_than_registers(run: Run) -> None:
    x, residual = torch.randn(2, 2, 33000).half()
    weight, bias = torch.rand(33000).bfloat16(), torch.randn(33000).half()
    out, total = run(with_residual, x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    check(out, total, weight, bias)


def test_rows_need_not_be_contiguous(run: Run) -> None:
    wide = torch.randn(6, 100)
    weight, bias = torch.rand(40), torch.randn(40)
    check(run(layer_norm, wide[:, 30:70], weight, bias), wide[:, 30:70], weight, bias)
    check(run(layer_norm, wide[:, :40].T.contiguous().T, weight, bias), wide[:, :40], weight, bias)


def test_parameters_may_be_strided_and_of_another_dtype(run: Run) -> None:
    x = torch.randn(3, 20)
    weight, bias = torch.rand(20, 2).half()[:, 0], torch.randn(40).bfloat16()[::2]
    check(run(layer_norm, x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_alone(run: Run, bad: float) -> None:
    x = torch.randn(3, 700)
    x[1, 699] = bad
    out = run(layer_norm, x, torch.ones(700), torch.zeros(700))
    assert torch.isnan(out).all(dim=1).tolist() == [False, True, False]
    assert torch.isfinite(out[[0, 2]]).all()


@given(st.integers(0, 5), st.integers(1, 90), st.sampled_from(list(ROUNDING)))
@settings(max_examples=40, deadline=None)
def test_any_size(m: int, k: int, dtype: torch.dtype) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(97 * m + k)).to(dtype)
    weight, bias = torch.linspace(0.5, 2.0, k), torch.linspace(-1.0, 1.0, k)
    check(layer_norm(x, weight, bias), x, weight, bias)
    check(layer_norm_reference(x, weight, bias), x, weight, bias)


def test_wrong_arguments_are_refused() -> None:
    x, ones = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(TypeError, match=r"x: dtype is torch\.float64, wanted one of torch\.float16"):
        layer_norm(x.double(), ones, ones)
    with pytest.raises(ValueError, match=r"x: shape .* no values"):
        layer_norm(torch.zeros(2, 0), torch.ones(0), torch.ones(0))
    with pytest.raises(ValueError, match=r"weight: shape is \(7,\), wanted \(8,\)"):
        layer_norm(x, torch.ones(7), ones)
    with pytest.raises(TypeError, match=r"bias: dtype is torch\.int64"):
        layer_norm(x, ones, torch.ones(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="eps: is -1"):
        layer_norm(x, ones, ones, -1.0)
    with pytest.raises(ValueError, match="eps: is nan"):
        layer_norm(x, ones, ones, float("nan"))
    with pytest.raises(TypeError, match="residual: dtype"):
        layer_norm(x, ones, ones, residual=x.half())
    with pytest.raises(ValueError, match="residual: shape"):
        layer_norm(x, ones, ones, residual=x[:1])
    with pytest.raises(ValueError, match="weight: is on meta, but x is on cpu"):
        layer_norm(x, ones.to("meta"), ones)


def test_there_is_no_silent_gradient() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        layer_norm(x, torch.ones(8), torch.zeros(8)).sum().backward()


def test_operators_are_well_formed() -> None:
    x, weight = torch.randn(5, 40).half(), torch.rand(40)
    torch.library.opcheck(_layer_norm_op, (x, weight, weight, 1e-5))
    torch.library.opcheck(_add_layer_norm_op, (x, x.flip(0), weight, weight, 1e-5))


def test_it_compiles_whole() -> None:
    def double(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out, total = layer_norm(x, weight, weight, residual=residual)
        return out + total

    x, residual, weight = torch.randn(2, 4, 24), torch.randn(2, 4, 24), torch.rand(24)
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, residual, weight), double(x, residual, weight), rtol=0, atol=0)


def test_cost_counts_every_tensor_once() -> None:
    assert cost(530, 768) == (530 * 768 * 7, 530 * 768 * 4 + 768 * 8)
    assert cost(1, 100, 4, residual=True) == (800, 100 * 16 + 800)
