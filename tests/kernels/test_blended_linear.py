from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tetra.kernels import (
    blended_linear,
    norm_quantize,
    pack_ternary,
    ternary_linear,
    ternary_linear_int8,
)
from tetra.kernels.backend import tl, triton
from tetra.kernels.blended_linear import (
    MAX_BLOCKS,
    MAX_K,
    ROWS_A_BLOCK,
    Norm,
    _blend_rows_backward_op,
    _blend_rows_op,
    _blend_weight_op,
    blend_rows,
    blend_rows_backward,
    blend_weight,
    blended_linear_reference,
    cost,
)
from tetra.kernels.gelu import gelu_reference, gelu_with_slope
from tetra.quantization import ternarize_weight

Run = Callable[..., Any]

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
SHAPES = [(0, 8, 3), (1, 1, 1), (5, 7, 2), (19, 127, 13), (3, 200, 1), (2, 768, 5)]
SEED = 2**40 + 7


def step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    grad: Tensor,
    lam: float,
    gelu: bool,
    dropout: float,
    reference: bool = False,
) -> tuple[Tensor, ...]:
    """The result and the gradients of all tensors that are there."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias, norm_weight, norm_bias)]
    norm = None if leaves[3] is None or leaves[4] is None else (leaves[3], leaves[4], 1e-5)
    assert leaves[0] is not None
    assert leaves[1] is not None
    if reference:
        out = blended_linear_reference(leaves[0], leaves[1], leaves[2], lam, norm, gelu, dropout, SEED)
    else:
        out = blended_linear(
            leaves[0], leaves[1], leaves[2], lam, norm=norm, gelu=gelu, dropout=dropout, seed=SEED, out_dtype=grad.dtype
        )
    out.backward(grad)
    return out.detach(), *(t.grad for t in leaves if t is not None and t.grad is not None)


def operands(m: int, k: int, n: int, dtype: torch.dtype, with_norm: bool) -> list[Tensor | None]:
    """x, weight, bias, the norm's weight and bias, gradient."""
    x = (2.0 * torch.randn(m, k) + torch.randn(m, 1)).to(dtype)
    norm = [torch.rand(k) + 0.5, 0.3 * torch.randn(k)] if with_norm else [None, None]
    return [x, 0.1 * torch.randn(n, k), torch.randn(n), *norm, torch.randn(m, n).to(dtype)]


def in_float64(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def check_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative root-mean-square error; 1e-5 beside it for gradients that cancel to nothing."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).square().sum().sqrt()
    assert error <= tolerance * expected.double().square().sum().sqrt() + 1e-5 * expected.numel() ** 0.5


# --- against float64 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("with_norm", "gelu", "dropout"),
    [(False, False, 0.0), (True, False, 0.0), (True, True, 0.1), (False, True, 0.3), (False, False, 0.5)],
)
def test_result_and_gradients_are_those_of_float64(
    run: Run, dtype: torch.dtype, lam: float, with_norm: bool, gelu: bool, dropout: float
) -> None:
    for shape in SHAPES:
        given_ = operands(*shape, dtype, with_norm)
        found = run(step, *given_, lam, gelu, dropout)
        expected = step(*in_float64(given_), lam, gelu, dropout, True)  # type: ignore[arg-type]
        assert [t.dtype for t in found] == [dtype, dtype] + [torch.float32] * (len(found) - 2)
        for a, b in zip(found, expected, strict=True):
            check_close(a, b, TOLERANCE[dtype])


@pytest.mark.parametrize(("with_norm", "gelu", "dropout"), [(True, False, 0.0), (True, True, 0.3), (False, True, 0.3)])
def test_gradcheck_where_the_function_is_smooth(with_norm: bool, gelu: bool, dropout: float) -> None:
    x, weight, bias, norm_weight, norm_bias, _ = (
        None if t is None else t.requires_grad_() for t in in_float64(operands(4, 9, 3, torch.float64, with_norm))
    )

    def layer(*parameters: Tensor) -> Tensor:
        x_, weight_, bias_, *norm = parameters
        affine: Norm | None = (*norm, 1e-5) if norm else None  # type: ignore[assignment]
        return blended_linear(x_, weight_, bias_, 0.0, norm=affine, gelu=gelu, dropout=dropout, seed=3)

    leaves = tuple(t for t in (x, weight, bias, norm_weight, norm_bias) if t is not None)
    assert torch.autograd.gradcheck(layer, leaves)


def rows_step(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, grad: Tensor, gelu: bool, dropout: float
) -> tuple[Tensor, ...]:
    norm = (norm_weight, norm_bias, 1e-5)
    y = blend_rows(x, 0.7, norm, gelu, dropout, SEED)
    again = blend_rows_backward(grad, x, norm, gelu, dropout, SEED)
    found = blend_rows_backward(grad, x, norm, gelu, dropout, SEED)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    return y, *(t.clone() for t in found)


@pytest.mark.parametrize("m", [ROWS_A_BLOCK - 1, ROWS_A_BLOCK, 3 * ROWS_A_BLOCK + 1])
def test_sums_over_rows_of_many_blocks(run: Run, m: int) -> None:
    x, _, _, norm_weight, norm_bias, _ = operands(m, 70, 1, torch.float32, True)
    assert x is not None
    assert norm_weight is not None
    assert norm_bias is not None
    grad = torch.randn(m, 70)
    _, *found = run(rows_step, x, norm_weight, norm_bias, grad, True, 0.2)
    identity = torch.eye(70, dtype=torch.float64)  # a layer that leaves rows as they are
    _, *expected = step(
        x.double(), identity, None, norm_weight.double(), norm_bias.double(), grad.double(), 0.0, True, 0.2, True
    )
    for a, b in zip(found, [expected[0], *expected[2:]], strict=True):
        check_close(a, b, 1e-5)


@pytest.mark.gpu
def test_more_rows_than_blocks_on_a_gpu() -> None:
    x, _, _, norm_weight, norm_bias, _ = operands(MAX_BLOCKS * ROWS_A_BLOCK + 1, 64, 1, torch.float32, True)
    assert x is not None
    norm = (norm_weight.cuda(), norm_bias.cuda(), 1e-5)  # type: ignore[union-attr]
    grad = torch.randn(x.shape)
    found = blend_rows_backward(grad.cuda(), x.cuda(), norm)
    t = x.double()
    h = (t - t.mean(1, keepdim=True)) / (t.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    check_close(found[1].cpu(), (grad * h).sum(0), 1e-5)
    check_close(found[2].cpu(), grad.double().sum(0), 1e-5)


def test_rows_wider_than_registers(run: Run) -> None:
    given_ = operands(2, MAX_K + 5, 3, torch.float32, True)
    found = run(step, *given_, 0.4, True, 0.1)
    for a, b in zip(found, step(*in_float64(given_), 0.4, True, 0.1, True), strict=True):  # type: ignore[arg-type]
        check_close(a, b, 1e-3)


# --- lambda = 1 is inference -------------------------------------------------------------------------------


def trained_and_packed(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor]:
    codes, scale = ternarize_weight(weight)
    packed = pack_ternary(codes)
    if norm_weight is None or norm_bias is None:
        return blended_linear(x, weight, bias, 1.0), ternary_linear(x, packed, scale, bias)
    x_q, row_scale = norm_quantize(x, norm_weight, norm_bias, gelu=gelu)
    expected = ternary_linear_int8(x_q, row_scale, packed, scale, bias, out_dtype=x.dtype)
    return blended_linear(x, weight, bias, 1.0, norm=(norm_weight, norm_bias, 1e-5), gelu=gelu), expected


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("with_norm", "gelu"), [(False, False), (True, False), (True, True)])
def test_lambda_one_is_what_the_packed_layer_computes(
    run: Run, dtype: torch.dtype, with_norm: bool, gelu: bool
) -> None:
    for shape in SHAPES:
        *given_, _ = operands(*shape, dtype, with_norm)
        found, expected = run(trained_and_packed, *given_, gelu)
        assert found.dtype == dtype
        assert torch.equal(found, expected)


# --- dropout -----------------------------------------------------------------------------------------------


def masks(m: int, k: int, dropout: float, seeds: list[int]) -> tuple[Tensor, ...]:
    ones = torch.ones(m, k)
    given_ = [seed if i % 2 else torch.tensor(seed) for i, seed in enumerate(seeds)]
    return tuple(blend_rows(ones, 0.0, None, False, dropout, seed) for seed in given_)


def expected_mask(m: int, k: int, dropout: float, seed: int) -> Tensor:
    """Word by word, in Python's integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    def is_kept(row: int, column: int) -> bool:
        state = 0x9E3779B9
        for word in (seed % 2**32, (seed >> 32) % 2**32, row, column):
            state = mix(state ^ word)
        return state >= round(dropout * 2**32)

    kept = torch.tensor([[is_kept(row, column) for column in range(k)] for row in range(m)])
    return kept.float() / (1.0 - dropout)


@pytest.mark.parametrize("dropout", [1e-9, 0.1, 0.5, 0.999])
def test_every_backend_drops_the_same_values(run: Run, dropout: float) -> None:
    seeds = [0, 1, 2**31, 2**32, 2**63 - 1, -1, -(2**63)]
    for found, seed in zip(run(masks, 6, 131, dropout, seeds), seeds, strict=True):
        torch.testing.assert_close(found, expected_mask(6, 131, dropout, seed), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.5])
def test_masks_are_uniform_and_independent(dropout: float) -> None:
    m, k = 300, 400
    first, second, third = ((mask > 0).double() for mask in masks(m, k, dropout, [1, 2, 1 + 2**32]))
    p, n = 1.0 - dropout, m * k
    deviation = (p * (1 - p)) ** 0.5
    for mask in (first, second, third):
        assert abs(mask.mean() - p) <= 5 * deviation / n**0.5
        assert ((mask.mean(0) - p).abs() <= 6 * deviation / m**0.5).all()
        assert ((mask.mean(1) - p).abs() <= 6 * deviation / k**0.5).all()
    centred = first - p
    for other in (second - p, third - p, centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, 1), (0, 1))):
        assert abs((centred * other).mean()) <= 5 * deviation**2 / n**0.5


def test_dropped_values_get_no_gradient_and_the_seed_decides() -> None:
    x, weight = torch.randn(20, 30, requires_grad=True), torch.eye(30)
    out = blended_linear(x, weight, None, 0.0, dropout=0.5, seed=5)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, out == 0)
    assert torch.equal(blended_linear(x, weight, None, 0.0, dropout=0.5, seed=torch.tensor([5])), out)
    assert not torch.equal(blended_linear(x, weight, None, 0.0, dropout=0.5, seed=6), out)
    assert torch.equal(blended_linear(x, weight, None, 0.0, dropout=1e-11, seed=6), x)  # rounds to none


# --- what is kept, dtypes, shapes --------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_only_what_exists_anyway_is_kept_for_the_backward_pass(lam: float) -> None:
    x, weight, bias, norm_weight, norm_bias, _ = operands(40, 24, 6, torch.float32, True)
    assert x is not None
    leaves = [t.requires_grad_() for t in (x, weight, bias, norm_weight, norm_bias) if t is not None]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x_, weight_, bias_, *norm = leaves
        blended_linear(x_, weight_, bias_, lam, norm=(norm[0], norm[1], 1e-5), gelu=True, dropout=0.1, seed=1)
    own = {t.untyped_storage().data_ptr() for t in leaves}
    assert sum(t.nbytes for t in kept if t.untyped_storage().data_ptr() not in own) == 8  # the seed


def test_gradients_are_only_made_where_someone_wants_them() -> None:
    x, weight, bias, norm_weight, norm_bias, _ = operands(4, 8, 3, torch.float32, True)
    for wanted in range(5):
        leaves = [t.clone() for t in (x, weight, bias, norm_weight, norm_bias) if t is not None]
        leaves[wanted].requires_grad_()
        x_, weight_, bias_, *norm = leaves
        blended_linear(x_, weight_, bias_, 0.5, norm=(norm[0], norm[1], 1e-5)).sum().backward()
        assert [t.grad is not None for t in leaves] == [i == wanted for i in range(5)]
    assert not blended_linear(x, weight, bias, 0.5).requires_grad  # type: ignore[arg-type]


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_autocast_chooses_the_dtype_of_the_products(lam: float) -> None:
    given_ = operands(6, 40, 5, torch.float32, True)
    x, weight, bias, norm_weight, norm_bias, grad = (None if t is None else t.requires_grad_() for t in given_)
    with torch.autocast("cpu", torch.bfloat16):
        out = blended_linear(x, weight, bias, lam, norm=(norm_weight, norm_bias, 1e-5))  # type: ignore[arg-type]
    assert out.dtype == torch.bfloat16
    out.backward(grad.detach().bfloat16())  # type: ignore[union-attr]
    expected = step(*in_float64([t if t is None else t.detach() for t in given_]), lam, False, 0.0, True)  # type: ignore[arg-type]
    for a, b in zip(
        (out.detach(), *(t.grad for t in (x, weight, bias, norm_weight, norm_bias))), expected, strict=True
    ):  # type: ignore[union-attr]
        check_close(a, b, 1e-2)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        assert blended_linear(x.double(), weight.double(), None, lam).dtype == torch.float64  # type: ignore[union-attr]
        wide = blended_linear(x, weight, None, lam, out_dtype=torch.float32)  # type: ignore[arg-type]
    assert wide.dtype == torch.float32


def test_any_shape_and_strides() -> None:
    weight, bias = torch.randn(3, 8), torch.randn(6)[::2]
    x = torch.randn(8, 5, 2).permute(2, 1, 0)
    norm = (torch.rand(8, 2)[:, 0].half(), torch.randn(8).bfloat16(), 1e-5)
    expected = blended_linear(x.contiguous(), weight, bias, 0.5, norm=norm)
    assert expected.shape == (2, 5, 3)
    assert torch.equal(blended_linear(x, weight.T.contiguous().T, bias, 0.5, norm=norm), expected)
    torch.testing.assert_close(blended_linear(x[0, 0], weight, bias, 0.5, norm=norm), expected[0, 0])
    for lam in (0.0, 0.5, 1.0):
        for x_, weight_, shape in ((x, weight[:0], (2, 5, 0)), (x[:0], weight, (0, 5, 3))):
            leaf = x_.clone().requires_grad_()
            out = blended_linear(leaf, weight_, None, lam, norm=norm)
            assert out.shape == shape
            out.sum().backward()
            assert torch.equal(leaf.grad, torch.zeros_like(x_))  # type: ignore[arg-type]


def with_bad_values(bad: float, lam: float) -> tuple[Tensor, ...]:
    x, weight = torch.randn(4, 300), torch.randn(5, 300)
    broken = x.clone()
    broken[2, 299] = bad
    norm = (torch.ones(300), torch.zeros(300), 1e-5)
    outs = [blended_linear(broken, weight, None, lam, norm=n) for n in (None, norm)]
    broken = weight.clone()
    broken[1, 7] = bad
    return *outs, blend_weight(broken, lam)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_a_row_that_is_not_finite_stays_alone(run: Run, bad: float, lam: float) -> None:
    *outs, weight = run(with_bad_values, bad, lam)
    for out in outs:
        assert torch.isfinite(out).all(1).tolist() == [True, True, False, True]
        assert not torch.isfinite(out[2]).any()
    assert not torch.isfinite(weight).any()


# --- the weight, properties --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 127), (70, 100), (200, 300)])
def test_blended_weight_is_its_formula(run: Run, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape) * 0.02
    found = run(blend_weight, weight, 0.3, dtype)
    assert found.dtype == dtype
    if weight.numel():
        scale = weight.double().abs().mean().clamp(min=1e-5)
        expected = weight + 0.3 * ((weight / scale).round().clamp(-1, 1) * scale - weight)
        check_close(found, expected, 2e-3 if dtype == torch.bfloat16 else 3e-4)
        values = run(blend_weight, weight, 1.0, torch.float32)
        assert ((values / scale).round() - values / scale).abs().max() <= 1e-5
    assert torch.equal(run(blend_weight, torch.zeros(7, 9), 0.3, dtype), torch.zeros(7, 9, dtype=dtype))


@given(st.integers(1, 40), st.integers(1, 90), st.floats(0, 1), st.integers(-30, 30))
@settings(max_examples=60, deadline=None)
def test_blends_lie_between_a_value_and_its_quantised_one(m: int, k: int, lam: float, exponent: int) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(97 * m + k)) * 2.0**exponent
    steps = x.abs().amax(1, keepdim=True).clamp(min=1e-5) / 127
    y = blend_rows(x, lam)
    assert ((y - x).abs() <= steps * (0.5001 * lam + 1e-4)).all()
    w, scale = blend_weight(x, lam), x.abs().mean().clamp(min=1e-5)
    nearest = (x / scale).round().clamp(-1, 1) * scale
    low, high = torch.minimum(x, nearest), torch.maximum(x, nearest)
    slack = 1e-5 * (scale + x.abs())
    at_border = ((x / scale).abs() - 0.5).abs() < 1e-4
    assert (at_border | ((w >= low - slack) & (w <= high + slack))).all()


@triton.jit
def _slope_kernel(x_ptr, value_ptr, slope_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value, slope = gelu_with_slope(tl.load(x_ptr + at))
    tl.store(value_ptr + at, value)
    tl.store(slope_ptr + at, slope)


def value_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = torch.empty_like(x), torch.empty_like(x)
    _slope_kernel[(len(x) // 1024,)](x, value, slope, BLOCK=1024)
    return value, slope


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("triton", marks=pytest.mark.gpu)])
def test_slope_of_gelu(backend: str, request: pytest.FixtureRequest) -> None:
    x = torch.cat([torch.linspace(-14, 14, 8192), torch.logspace(-30, 4, 4096), -torch.logspace(-30, 4, 4096)])
    if backend == "interpreter":
        value, slope = request.getfixturevalue("interpreter")(value_and_slope, x)
    else:
        value, slope = (t.cpu() for t in value_and_slope(x.cuda()))
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(gelu_reference(leaf).sum(), leaf)
    assert (slope.double() - expected).abs().max() <= 5e-7
    assert ((value.double() - gelu_reference(x)).abs() <= 3e-7 * x.abs().clamp(min=1.0)).all()


# --- errors, operators, compiling --------------------------------------------------------------------------


def test_wrong_arguments_are_refused() -> None:
    x, weight, ones = torch.zeros(2, 8), torch.zeros(3, 8), torch.ones(8)
    for lam in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"lam: is .*, wanted 0 <= lam <= 1"):
            blended_linear(x, weight, None, lam)
    for dropout in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="dropout: is"):
            blended_linear(x, weight, None, 0.5, dropout=dropout)
    with pytest.raises(TypeError, match=r"x: dtype is torch\.int64"):
        blended_linear(x.long(), weight, None, 0.5)
    with pytest.raises(ValueError, match=r"x: shape .* no values"):
        blended_linear(torch.zeros(2, 0), torch.zeros(3, 0), None, 0.5)
    with pytest.raises(ValueError, match=r"weight: shape is \(8, 3\), wanted \[N, 8\]"):
        blended_linear(x, weight.T, None, 0.5)
    with pytest.raises(TypeError, match=r"weight: dtype is torch\.int8"):
        blended_linear(x, weight.to(torch.int8), None, 0.5)
    with pytest.raises(ValueError, match="weight: is on meta, but x is on cpu"):
        blended_linear(x, weight.to("meta"), None, 0.5)
    with pytest.raises(ValueError, match=r"bias: shape is \(8,\), wanted \(3,\)"):
        blended_linear(x, weight, ones, 0.5)
    with pytest.raises(ValueError, match=r"norm\[1\]: shape is \(7,\), wanted \(8,\)"):
        blended_linear(x, weight, None, 0.5, norm=(ones, torch.ones(7), 1e-5))
    with pytest.raises(TypeError, match=r"norm\[0\]: dtype is torch\.int64"):
        blended_linear(x, weight, None, 0.5, norm=(ones.long(), ones, 1e-5))
    with pytest.raises(ValueError, match=r"norm\[2\]: is nan, wanted eps >= 0"):
        blended_linear(x, weight, None, 0.5, norm=(ones, ones, float("nan")))
    with pytest.raises(TypeError, match=r"seed: dtype is torch\.float32"):
        blended_linear(x, weight, None, 0.5, dropout=0.1, seed=torch.tensor(1.0))
    with pytest.raises(ValueError, match="seed: 2 elements on cpu"):
        blended_linear(x, weight, None, 0.5, dropout=0.1, seed=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"out_dtype: is torch\.int8"):
        blended_linear(x, weight, None, 0.5, out_dtype=torch.int8)


def test_there_is_no_silent_second_gradient() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(blended_linear(x, torch.ones(3, 8), None, 0.5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_operators_are_well_formed() -> None:
    x, norm, seed = torch.randn(5, 40), (torch.rand(40), torch.rand(40), 1e-5), torch.tensor(3)
    torch.library.opcheck(_blend_rows_op, (x, 0.5, *norm, True, 0.1, seed, torch.bfloat16))
    torch.library.opcheck(_blend_rows_op, (x, 0.5, None, None, 0.0, False, 0.0, None, torch.float32))
    torch.library.opcheck(_blend_rows_backward_op, (x.bfloat16(), x, *norm, True, 0.1, seed))
    torch.library.opcheck(_blend_rows_backward_op, (x, x.flip(0), None, None, 0.0, True, 0.0, None))
    torch.library.opcheck(_blend_weight_op, (x, 0.5, torch.float16))


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_it_compiles_whole_with_its_gradient(lam: float) -> None:
    def layer(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, seed: Tensor) -> Tensor:
        norm = (norm_weight, norm_bias, 1e-5)
        out = blended_linear(x, weight, bias, lam, norm=norm, gelu=True, dropout=0.2, seed=seed)
        return out.square().sum()

    leaves = [t for t in operands(6, 24, 5, torch.float32, True)[:5] if t is not None]
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        given_ = [t.clone().requires_grad_() for t in leaves]
        loss = function(*given_, torch.tensor(9))
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in given_)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_cost_counts_every_tensor_once() -> None:
    assert cost(530, 768) == (530 * 768 * 14, 530 * 768 * 4 + 8 * 768)
    assert cost(10, 100, 4, 2, norm=False, gelu=True, dropout=True) == (1000 * 30, 6000)
    assert cost(10, 100, 4, 2, gelu=True, dropout=True, backward=True) == (1000 * 46, 10000 + 1600)
