"""Attention with its gradient, on every backend, against autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tetra.kernels import attention_train
from tetra.kernels.attention_training import (
    _attention_train_backward_op,
    _attention_train_op,
    _launch_backward,
    _launch_forward,
    attention_train_reference,
    cost,
)

Run = Callable[..., Any]

BOUND = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-2}
SEED = 2**41 + 12345
# Images, tokens, heads, head dim: less than a block, whole blocks, one more; every way to cut a head in two.
SHAPES = [
    (2, 2, 2, 64),
    (1, 17, 3, 32),
    (2, 63, 1, 96),
    (1, 64, 1, 64),
    (1, 65, 2, 12),
    (1, 129, 1, 40),
    (1, 67, 1, 128),
]


def mixed(x: np.ndarray) -> np.ndarray:
    """The mixer of the contract on uint32, which wraps by itself."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def kept(seed: int, b: int, n_heads: int, t: int, dropout: float) -> Tensor:
    """bool [B, H, T, T]."""
    state = np.full((b * n_heads, t, t), 0x9E3779B9, np.uint32)
    maps, queries, keys = np.indices(state.shape, np.uint32)
    for word in (np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32 & 0xFFFFFFFF), maps, queries, keys):
        state = mixed(state ^ word)
    return torch.from_numpy(state >= round(dropout * 2**32)).view(b, n_heads, t, t)


def definition(qkv: Tensor, upstream: Tensor, n_heads: int, dropout: float = 0.0, seed: int = 0) -> tuple[Tensor, ...]:
    """Result and gradient in float64."""
    b, t, width = qkv.shape
    qkv = qkv.detach().double().requires_grad_()
    q, k, v = qkv.reshape(b, t, 3, n_heads, width // (3 * n_heads)).unbind(2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = torch.exp(logits - logits.logsumexp(-1, keepdim=True))
    if dropout:
        weights = weights * kept(seed, b, n_heads, t, dropout) / (1 - dropout)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, width // 3)
    return out.detach(), *torch.autograd.grad(out, qkv, upstream.double())


def with_gradient(
    qkv: Tensor, upstream: Tensor, n_heads: int, dropout: float = 0.0, seed: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = attention_train(qkv, n_heads, dropout, seed)
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    return out.detach(), grad


def by_the_kernels(qkv: Tensor, upstream: Tensor, n_heads: int, dropout: float, seed: int) -> tuple[Tensor, ...]:
    """The kernels themselves, on tensors of any type."""
    drawn = torch.tensor(seed) if dropout else None
    out, lse = _launch_forward(qkv, n_heads, dropout, drawn)
    return out, _launch_backward(upstream, qkv, out, lse, n_heads, dropout, drawn), lse


def error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square, relative."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm())


def check(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], bound: float) -> None:
    """The result, and the gradients of queries, keys and values each."""
    assert error(found[0], wanted[0]) <= bound
    for part in zip(found[1].chunk(3, 2), wanted[1].chunk(3, 2), strict=True):
        assert error(*part) <= bound


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("b", "t", "n_heads", "head_dim"), SHAPES)
def test_result_and_gradients(
    run: Run, b: int, t: int, n_heads: int, head_dim: int, dropout: float, dtype: torch.dtype
) -> None:
    qkv = torch.randn(b, t, 3 * n_heads * head_dim).to(dtype)
    upstream = torch.randn(b, t, n_heads * head_dim).to(dtype)
    found = run(with_gradient, qkv, upstream, n_heads, dropout, SEED)
    assert {x.dtype for x in found} == {dtype}
    check(found, definition(qkv, upstream, n_heads, dropout, SEED), BOUND[dtype])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("b", "t", "n_heads", "head_dim"), SHAPES)
def test_the_kernels_compute_what_they_should_but_for_rounding(
    interpreter: Run, b: int, t: int, n_heads: int, head_dim: int, dropout: float
) -> None:
    """Interpreted, they take float32 too, where no rounding can hide an error."""
    qkv, upstream = torch.randn(b, t, 3 * n_heads * head_dim), torch.randn(b, t, n_heads * head_dim)
    out, grad, lse = interpreter(by_the_kernels, qkv, upstream, n_heads, dropout, SEED)
    check((out, grad), definition(qkv, upstream, n_heads, dropout, SEED), 3e-6)
    q, k, _ = qkv.double().view(b, t, 3, n_heads, head_dim).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(lse.double(), (q @ k.mT / math.sqrt(head_dim)).logsumexp(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_whole_image(run: Run, dtype: torch.dtype) -> None:
    qkv, upstream = torch.randn(1, 530, 3 * 32).to(dtype), torch.randn(1, 530, 32).to(dtype)
    check(run(with_gradient, qkv, upstream, 1), definition(qkv, upstream, 1), BOUND[dtype])


@pytest.mark.parametrize("dtype", BOUND)
def test_one_token_attends_to_itself(run: Run, dtype: torch.dtype) -> None:
    qkv, upstream = torch.randn(3, 1, 96).to(dtype), torch.randn(3, 1, 32).to(dtype)
    out, grad = run(with_gradient, qkv, upstream, 2)
    torch.testing.assert_close(out, qkv[..., 64:])
    torch.testing.assert_close(grad[..., 64:], upstream)
    torch.testing.assert_close(grad[..., :64], torch.zeros(3, 1, 64, dtype=dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 70), (3, 0)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_images_or_tokens(run: Run, dtype: torch.dtype, dropout: float, shape: tuple[int, int]) -> None:
    qkv, upstream = torch.zeros(*shape, 48, dtype=dtype), torch.zeros(*shape, 16, dtype=dtype)
    out, grad = run(with_gradient, qkv, upstream, 1, dropout)
    assert (out.shape, grad.shape) == (upstream.shape, qkv.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_and_gradients_may_be_strided(run: Run, dtype: torch.dtype) -> None:
    wide = torch.randn(2, 33, 200).to(dtype)
    upstreams = torch.randn(2, 33, 64).to(dtype)[..., ::2], torch.ones(()).to(dtype).expand(2, 33, 32)
    for qkv in (wide[..., 8:104], wide[:, ::2, 1:97], wide[:, :3, 8:104].transpose(0, 1), wide[..., 4:196:2]):
        for upstream in upstreams:
            part = upstream[:, : qkv.shape[1]] if len(qkv) == 2 else upstream[:1, :2].expand(3, 2, 32)
            check(run(with_gradient, qkv, part, 2), definition(qkv, part, 2), BOUND[dtype])


@pytest.mark.parametrize("seed", [0, 7, SEED, -3])
@pytest.mark.parametrize("dtype", BOUND)
def test_every_backend_drops_the_same_weights(run: Run, dtype: torch.dtype, seed: int) -> None:
    """With equal logits and one value a token a result shows its weight."""
    b, t, n_heads = 2, 16, 3
    qkv = torch.zeros(b, t, 3, n_heads, t)
    qkv[:, :, 2] = torch.eye(t)[:, None]
    out, _ = run(
        with_gradient, qkv.view(b, t, -1).to(dtype), torch.zeros(b, t, n_heads * t).to(dtype), n_heads, 0.4, seed
    )
    weights = out.view(b, t, n_heads, t).transpose(1, 2)
    wanted = kept(seed, b, n_heads, t, 0.4) / (1 - 0.4) / t
    torch.testing.assert_close(weights.double(), wanted.double(), rtol=1e-2, atol=0)


def test_seeds_may_be_tensors() -> None:
    qkv, upstream = torch.randn(1, 9, 48), torch.randn(1, 9, 16)
    for found, wanted in zip(
        with_gradient(qkv, upstream, 1, 0.5, torch.tensor([SEED])),
        with_gradient(qkv, upstream, 1, 0.5, SEED),
        strict=True,
    ):
        assert torch.equal(found, wanted)
    assert not torch.equal(attention_train(qkv, 1, 0.5, 1), attention_train(qkv, 1, 0.5, 2))
    assert torch.equal(attention_train(qkv, 1, 0.0, 1), attention_train(qkv, 1, 0.0, 2))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_second_run_gives_the_same_bits(run: Run, dropout: float) -> None:
    qkv, upstream = torch.randn(2, 70, 96).bfloat16(), torch.randn(2, 70, 32).bfloat16()
    for once, twice in zip(*(run(with_gradient, qkv, upstream, 2, dropout, 5) for _ in range(2)), strict=True):
        assert torch.equal(once, twice)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout: float) -> None:
    qkv = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention_train_reference(x, 2, dropout, SEED), qkv)
    assert torch.autograd.gradcheck(lambda x: attention_train(x, 2, dropout, SEED), qkv)
    torch.testing.assert_close(attention_train(qkv, 2, dropout, SEED), attention_train_reference(qkv, 2, dropout, SEED))


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.integers(1, 20), st.sampled_from([0.0, 0.25]))
@settings(max_examples=30, deadline=None)
def test_moving_all_keys_together_changes_nothing(b: int, t: int, n_heads: int, head_dim: int, dropout: float) -> None:
    """So that their gradients add up to nothing."""
    qkv, upstream = torch.randn(b, t, 3 * n_heads * head_dim), torch.randn(b, t, n_heads * head_dim)
    _, grad = with_gradient(qkv, upstream, n_heads, dropout, b * t)
    keys = grad.chunk(3, 2)[1]
    torch.testing.assert_close(keys.sum(1), torch.zeros_like(keys[:, 0]), rtol=0, atol=1e-4)


def test_many_maps_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, upstream = torch.randn(3, 9, 72).bfloat16(), torch.randn(3, 9, 24).bfloat16()
    whole = with_gradient(qkv, upstream, 2, 0.2, 5)
    monkeypatch.setattr("tetra.kernels.attention_training._MAX_LOGITS", 4 * 81)
    for part, wanted in zip(with_gradient(qkv, upstream, 2, 0.2, 5), whole, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-2, atol=1e-3)


def saved_bytes(qkv: Tensor, n_heads: int, dropout: float) -> Tensor:
    """What autograd holds between the passes, every storage once."""
    sizes = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attention_train(qkv.detach().requires_grad_(), n_heads, dropout)
    return torch.tensor(sum(sizes.values()))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", BOUND)
def test_no_map_of_weights_is_kept(run: Run, dtype: torch.dtype, dropout: float) -> None:
    """Only the projection, the result, a float32 a row of weights, and the seed."""
    b, t, n_heads, head_dim = 2, 150, 2, 16
    qkv = torch.randn(b, t, 3 * n_heads * head_dim).to(dtype)
    allowed = qkv.nbytes + qkv.nbytes // 3 + 4 * b * n_heads * t + 8 * (dropout > 0)
    # PyTorch's own attention may keep two sums a row and pads them; a map would be 150 a row.
    own = dtype == torch.float32 and not dropout
    assert qkv.nbytes <= run(saved_bytes, qkv, n_heads, dropout) <= allowed * (1.3 if own else 1)


def test_a_token_that_is_not_finite_reaches_its_image_only(run: Run) -> None:
    qkv, upstream = torch.randn(2, 66, 96).bfloat16(), torch.randn(2, 66, 32).bfloat16()
    qkv[1, 65, 40] = float("nan")
    out, grad = run(with_gradient, qkv, upstream, 2)
    assert torch.isfinite(out[0]).all()
    assert torch.isfinite(grad[0]).all()
    assert torch.isnan(out[1, :, :16]).all()
    assert torch.isnan(grad[1].view(66, 3, 2, 16)[:, :2, 0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_that_only_a_maximum_tames(run: Run, dtype: torch.dtype) -> None:
    """e to these logits is beyond float32; two keys share all of the weight."""
    qkv = torch.randn(1, 70, 96).to(dtype)
    qkv[..., :32] = 64.0
    qkv[..., 32:64] = -1.0
    qkv[0, [11, 66], 32:64] = 1.0
    upstream = torch.randn(1, 70, 32).to(dtype)
    out, grad = run(with_gradient, qkv, upstream, 1)
    torch.testing.assert_close(
        out[0].double(), qkv[0, [11, 66], 64:].double().mean(0).expand(70, 32), rtol=0, atol=2e-2
    )
    assert torch.isfinite(grad).all()
    assert not grad[0, 12:66, 32:].any()


def test_wrong_arguments_are_refused() -> None:
    qkv = torch.zeros(1, 4, 48)
    with pytest.raises(TypeError, match=r"qkv: dtype is torch\.int8, wanted one of torch\.float16"):
        attention_train(qkv.to(torch.int8), 1)
    with pytest.raises(ValueError, match=r"qkv: shape is \(4, 48\), wanted \[B, T, 3 \* H \* D\]"):
        attention_train(qkv[0], 1)
    for n_heads in (0, -1, 5):
        with pytest.raises(ValueError, match=f"n_heads: 48 columns of qkv are not 3 x {n_heads} heads"):
            attention_train(qkv, n_heads)
    for dropout in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"dropout: is .*, wanted 0 <= dropout < 1"):
            attention_train(qkv, 1, dropout)
    with pytest.raises(TypeError, match=r"seed: is torch\.float32 of shape \(\)"):
        attention_train(qkv, 1, 0.1, torch.tensor(1.0))
    with pytest.raises(TypeError, match="wanted an int64 tensor of one value"):
        attention_train(qkv, 1, 0.1, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="seed: is on meta, but qkv is on cpu"):
        attention_train(qkv, 1, 0.1, torch.tensor(1, device="meta"))


def check_operators() -> Tensor:
    seed = torch.tensor(3)
    for qkv in (torch.randn(2, 5, 48), torch.randn(1, 9, 36).bfloat16()):
        for dropout, drawn in ((0.0, None), (0.2, seed)):
            torch.library.opcheck(_attention_train_op, (qkv.requires_grad_(), 1, dropout, drawn))
            out, lse = _attention_train_op(qkv.detach(), 1, dropout, drawn)
            kept_out, kept_lse = (out, lse) if lse.numel() else (None, None)
            arguments = (out, qkv.detach(), kept_out, kept_lse, 1, dropout, drawn)
            torch.library.opcheck(_attention_train_backward_op, arguments)
    return seed


def test_operators_are_well_formed() -> None:
    check_operators()


def test_operators_of_the_kernels_are_well_formed(interpreter: Run) -> None:
    interpreter(check_operators)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_compiles_whole_with_its_gradient(dtype: torch.dtype) -> None:
    def layer(qkv: Tensor) -> Tensor:
        return attention_train(qkv, 2, 0.1, 3) * 2

    qkv = torch.randn(3, 9, 48).to(dtype)
    found = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = qkv.clone().requires_grad_()
        out = function(x)
        out.float().square().sum().backward()
        found.append((out.detach(), x.grad))
    for plain, compiled in zip(*found, strict=True):
        assert torch.equal(plain, compiled)


def test_cost_counts_every_product_and_tensor() -> None:
    operations, n_bytes = cost(2, 530, 12, 64)
    assert operations == 2 * 12 * 530 * 530 * (2 * 2 * 64 + 4)
    assert n_bytes == 2 * (2 * 530 * 4 * 768) + 4 * 2 * 12 * 530
    operations, n_bytes = cost(2, 530, 12, 64, backward=True)
    assert operations == 2 * 12 * 530 * 530 * (7 * 2 * 64 + 10)
    # Twice q, k, v and the result's gradient; the result; the gradient of q, k, v.
    assert n_bytes == 2 * (2 * 530 * 768) * (2 * 4 + 1 + 3) + 16 * 2 * 12 * 530
