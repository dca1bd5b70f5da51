"""Dropout and sum at the end of a residual branch, on every backend, against a mask made word by word."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tetra.kernels import blended_linear, residual_dropout
from tetra.kernels.blended_linear import blend_rows
from tetra.kernels.residual_dropout import _residual_dropout_op, cost, residual_dropout_reference

Run = Callable[..., Any]

SEED = 2**40 + 7
SHAPES = [(0, 8), (1, 1), (3, 7), (2, 5, 127), (9, 200), (2, 1, 768), (1, 2100)]
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (None, torch.float32),
    (None, torch.bfloat16),
]
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@cache
def mask(shape: tuple[int, ...], dropout: float, seed: int) -> Tensor:
    """float64: 0, or 1 / (1 - dropout), by the hash's definition in Python's integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    k = shape[-1]
    kept = torch.zeros(shape, dtype=torch.float64).view(-1)
    for i in range(kept.numel()):
        state = 0x9E3779B9
        for word in (seed % 2**32, (seed >> 32) % 2**32, i // k, i % k):
            state = mix(state ^ word)
        kept[i] = state >= round(dropout * 2**32)
    return kept.view(shape) / (1.0 - dropout)


def step(
    residual: Tensor | None, y: Tensor, grad: Tensor, dropout: float, seed: int | Tensor = SEED
) -> tuple[Tensor, ...]:
    """The result and the gradients."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in (residual, y)]
    assert leaves[1] is not None
    out = residual_dropout(leaves[0], leaves[1], dropout, seed)
    out.backward(grad)
    return out.detach(), *(t.grad for t in leaves if t is not None and t.grad is not None)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool(((found.double() - expected).abs() <= ROUNDING[found.dtype] * expected.abs() + 2e-6).all())


@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_result_and_gradients(run: Run, dtypes: tuple[torch.dtype | None, torch.dtype], dropout: float) -> None:
    for shape in SHAPES:
        y = torch.randn(shape).to(dtypes[1])
        residual = None if dtypes[0] is None else (3 * torch.randn(shape)).to(dtypes[0])
        wider = y.dtype if residual is None else torch.promote_types(residual.dtype, y.dtype)
        grad = torch.randn(shape).to(wider)
        out, *grads = run(step, residual, y, grad, dropout)
        kept = mask(shape, dropout, SEED)
        expected = y.double() * kept
        assert out.dtype == wider
        assert close(out, expected if residual is None else residual.double() + expected)
        assert close(grads[-1], grad.double() * kept)
        assert grads[-1].dtype == y.dtype
        if residual is not None:
            assert grads[0].dtype == residual.dtype
            assert close(grads[0], grad.double())


def test_every_backend_gives_the_same_bits(run: Run) -> None:
    residual, y, grad = torch.randn(12, 300), torch.randn(12, 300).bfloat16(), torch.randn(12, 300)
    expected = step(residual, y, grad, 0.1)
    for found, wanted in zip(run(step, residual, y, grad, 0.1), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1, -1])
def test_the_seed_decides(run: Run, seed: int) -> None:
    y = torch.ones(6, 131)
    out, _ = run(step, None, y, y, 0.3, torch.tensor(seed))
    torch.testing.assert_close(out.double(), mask((6, 131), 0.3, seed), rtol=1e-6, atol=0)
    assert torch.equal(run(step, None, y, y, 0.3, seed)[0], out)


def test_it_drops_what_the_blended_layer_drops() -> None:
    y = torch.randn(30, 50)
    assert torch.equal(residual_dropout(None, y, 0.4, 9), blend_rows(y, 0.0, None, False, 0.4, 9))


def test_gradcheck() -> None:
    tensors = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda r, y: residual_dropout(r, y, 0.4, 1), tensors)


@given(st.integers(1, 9), st.integers(1, 70), st.floats(0.01, 0.95), st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=40, deadline=None)
def test_against_the_reference(m: int, k: int, dropout: float, seed: int) -> None:
    residual, y = torch.randn(2, m, k).unbind()
    found = residual_dropout(residual, y, dropout, seed)
    torch.testing.assert_close(found, residual_dropout_reference(residual, y, dropout, seed))


def test_only_the_seed_is_kept_and_nothing_without_dropout() -> None:
    residual, y = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        residual_dropout(residual, y, 0.5, 1)
        assert [t.nbytes for t in kept] == [8]
        assert torch.equal(residual_dropout(residual, y, 0.0, 1), residual + y)
        assert residual_dropout(None, y, 1e-11, 1) is y  # rounds to none
    assert len(kept) == 1


def test_any_strides_and_more_rows_than_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    residual, y = torch.randn(40, 3, 1500).permute(2, 1, 0), torch.randn(1500, 40, 3).transpose(1, 2)
    for backend in ("torch", "auto"):
        monkeypatch.setenv("TETRA_BACKEND", backend)
        found = residual_dropout(residual, y, 0.2, 4)
        assert torch.equal(found, residual_dropout(residual.contiguous(), y.contiguous(), 0.2, 4))
        torch.testing.assert_close(found, residual_dropout_reference(residual, y.contiguous(), 0.2, 4))


def test_wrong_arguments_are_refused() -> None:
    x = torch.zeros(2, 8)
    for dropout in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="dropout: is"):
            residual_dropout(x, x, dropout)
    with pytest.raises(TypeError, match=r"y: dtype is torch\.int64"):
        residual_dropout(x, x.long(), 0.1)
    with pytest.raises(ValueError, match=r"residual: shape is \(2, 8\), wanted that of y, \(2, 7\)"):
        residual_dropout(x, x[:, :7], 0.1)
    with pytest.raises(ValueError, match="residual: is on meta"):
        residual_dropout(x.to("meta"), x, 0.1)
    with pytest.raises(ValueError, match="no dimension"):
        residual_dropout(None, torch.tensor(1.0), 0.1)
    with pytest.raises(TypeError, match="seed: dtype is"):
        residual_dropout(x, x, 0.1, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"branch|residual: shape is"):
        blended_linear(x, torch.zeros(3, 8), None, 0.5, branch=(x[:1], 0.1, 0))


@pytest.mark.parametrize("residual", [None, torch.randn(3, 8)])
def test_the_operator_is_registered_soundly(residual: Tensor | None) -> None:
    arguments = (residual, torch.randn(3, 8), 0.3, torch.tensor(5), torch.float32)
    torch.library.opcheck(_residual_dropout_op, arguments)


def test_cost_counts_every_tensor_once() -> None:
    assert cost(10, 768)[1] == 10 * 768 * (2 + 4 + 4)
    assert cost(10, 768, 4, 2, residual=False)[1] == 10 * 768 * 6
    assert cost(20, 768)[0] == 2 * cost(10, 768)[0]


# --- at the beginning of a blended layer -------------------------------------------------------------------


def layer_step(
    x: Tensor, z: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, grad: Tensor, grad_total: Tensor,
    lam: float, dropout: float, fused: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The layer after a branch, in one call or by its parts."""
    leaves = [t.clone().requires_grad_() for t in (x, z, weight, norm_weight, norm_bias)]
    norm = (leaves[3], leaves[4], 1e-5)
    if fused:
        out, total = blended_linear(leaves[0], leaves[2], None, lam, norm=norm, branch=(leaves[1], dropout, SEED))
    else:
        total = residual_dropout(leaves[0], leaves[1], dropout, SEED)
        out = blended_linear(total, leaves[2], None, lam, norm=norm)
    torch.autograd.backward([out, total], [grad.to(out.dtype), grad_total.to(total.dtype)])
    return out.detach(), total.detach(), *(t.grad for t in leaves if t.grad is not None)


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("z_dtype", [torch.float32, torch.bfloat16])
def test_a_branch_is_the_sum_before_the_layer(run: Run, lam: float, dropout: float, z_dtype: torch.dtype) -> None:
    x, z, weight = torch.randn(2, 3, 40), torch.randn(2, 3, 40).to(z_dtype), 0.1 * torch.randn(5, 40)
    norm, grads = torch.rand(2, 40) + 0.5, (torch.randn(2, 3, 5), torch.randn(2, 3, 40))
    arguments = (x, z, weight, *norm.unbind(), *grads, lam, dropout)
    found, expected = (run(layer_step, *arguments, fused) for fused in (True, False))
    assert len(found) == len(expected) == 7
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_either_result_alone_has_its_gradient() -> None:
    x, z, weight = torch.randn(9, 40), torch.randn(9, 40), torch.randn(5, 40)
    for which in (0, 1):
        leaves = [t.clone().requires_grad_() for t in (x, z, weight)]
        blended_linear(leaves[0], leaves[2], None, 0.4, branch=(leaves[1], 0.3, SEED))[which].sum().backward()
        expected = [t.clone().requires_grad_() for t in (x, z, weight)]
        total = residual_dropout(expected[0], expected[1], 0.3, SEED)
        (blended_linear(total, expected[2], None, 0.4) if which == 0 else total).sum().backward()
        for a, b in zip(leaves, expected, strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("z_dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_kept_only_if_its_parts_take_no_less(z_dtype: torch.dtype) -> None:
    x, z, weight = (torch.randn(n, 40) for n in (9, 9, 5))
    x, z, weight = x.requires_grad_(), z.to(z_dtype).requires_grad_(), weight.requires_grad_()
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, total = blended_linear(x, weight, None, 0.4, branch=(z, 0.3, SEED))
    is_kept = [t.untyped_storage().data_ptr() in kept for t in (x, z, total, weight)]
    assert is_kept == ([False, False, True, True] if z_dtype == torch.float32 else [True, True, False, True])
    assert len(kept) == sum(is_kept) + 1  # the branch's seed
