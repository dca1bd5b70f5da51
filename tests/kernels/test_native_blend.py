"""The C++ kernels of training against their formulas in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tetra.kernels import native
from tetra.kernels.attention_training import attention_train_reference
from tetra.kernels.row_quantize import quantize_rows_reference
from tetra.kernels.ternary_matmul import pack_ternary, packed_width

Norm = tuple[Tensor, Tensor, float]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(0, 9), (1, 1), (1, 2), (7, 101), (9, 256), (131, 64), (3, 3072)]


def runs_here(isa: str) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.ISA_VARIABLE, isa)
        try:
            native.instruction_set()
        except ValueError:
            return False
    return True


@pytest.fixture(scope="module", params=[isa for isa in native._INSTRUCTION_SETS if runs_here(isa)])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The rest of the test runs on one instruction set of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.ISA_VARIABLE, request.param)
        native.reset()
        if not native.available():
            pytest.skip("the C++ kernels can't be built here")
        yield request.param
    native.reset()


def supported(dtype: torch.dtype) -> None:
    if not native.supports("blend_rows", dtype):
        assert dtype == torch.float16  # the one format that a plain machine need not have
        pytest.skip("this instruction set has no float16")


def kept(m: int, k: int, dropout: float, seed: int) -> Tensor:
    """Which values the hash keeps, by its definition, in numpy."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = ((x ^ (x >> 16)) * np.uint64(0x7FEB352D)) & np.uint64(0xFFFFFFFF)
        x = ((x ^ (x >> 15)) * np.uint64(0x846CA68B)) & np.uint64(0xFFFFFFFF)
        return x ^ (x >> np.uint64(16))

    state = np.full((m, k), 0x9E3779B9, dtype=np.uint64)
    rows, columns = np.indices((m, k), dtype=np.uint64)
    for word in (np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF), rows, columns):
        state = mix(state ^ word)
    return torch.from_numpy(state.astype(np.int64) >= round(dropout * 2**32))


def operand(x: Tensor, norm: Norm | None, gelu: bool, dropout: float, seed: int) -> Tensor:
    """What is quantised: LayerNorm(dropout(gelu(x)))."""
    v = 0.5 * x * torch.special.erfc(-x / 2**0.5) if gelu else x
    if dropout:
        v = v * kept(*x.shape, dropout, seed) / (1.0 - dropout)
    if norm is None:
        return v
    return F.layer_norm(v, v.shape[1:], norm[0].double(), norm[1].double(), norm[2])


def norm_of(k: int, dtype: torch.dtype) -> Norm:
    return torch.randn(k), torch.randn(k).to(dtype), 1e-5


# --- rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rows_are_the_formula(isa: str, dtype: torch.dtype, with_norm: bool, gelu: bool, dropout: float) -> None:
    supported(dtype)
    for m, k in SHAPES:
        x, norm = (torch.randn(m, k) * 3 + 1).to(dtype), norm_of(k, dtype) if with_norm else None
        v = operand(x.double(), norm, gelu, dropout, 5)
        step = v.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        codes = (v / step).round()
        border = ((v / step - codes).abs() > 0.498).double()  # where float32 may round the other way
        for lam in (0.0, 0.3, 1.0):
            for out_dtype in (dtype, torch.float32, torch.float16):
                y = native.blend_rows(x, lam, norm, gelu, dropout, 5, out_dtype)
                expected = v + lam * (codes * step - v)
                assert y.dtype == out_dtype
                assert y.shape == x.shape
                bound = 1.1 * EPS[out_dtype] * expected.abs() + 1.01 * lam * border * step + 2.5e-4 * step + 1e-6
                assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_rows_are_those_of_inference(isa: str, dtype: torch.dtype) -> None:
    supported(dtype)
    for m, k in SHAPES:
        whole = (torch.randn(m, k + 3) * torch.logspace(-6, 3, m)[:, None]).to(dtype)
        for x in (whole[:, :k].contiguous(), whole.flatten()[3 : 3 + m * k].view(m, k)):
            codes, scale = quantize_rows_reference(x)
            y = native.blend_rows(x, 1.0, None, False, 0.0, 0, torch.float32)
            assert torch.equal(y, codes * scale[:, None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_rows(isa: str, dtype: torch.dtype, with_norm: bool, gelu: bool, dropout: float) -> None:
    supported(dtype)
    for m, k in SHAPES:
        x, norm = (torch.randn(m, k) * 2 + 0.5).to(dtype), norm_of(k, dtype) if with_norm else None
        for grad_dtype in (dtype, torch.float32, torch.float16):
            grad = torch.randn(m, k).to(grad_dtype)
            found = native.blend_rows_backward(grad, x, norm, gelu, dropout, 2**40 + 7)
            leaves = [x.double().requires_grad_()]
            exact = None
            if norm is not None:
                leaves += [norm[0].double().requires_grad_(), norm[1].double().requires_grad_()]
                exact = (leaves[1], leaves[2], norm[2])
            v = operand(leaves[0], exact, gelu, dropout, 2**40 + 7)
            expected = torch.autograd.grad(v, leaves, grad.double())
            assert [t.dtype for t in found] == [dtype, torch.float32, torch.float32]
            assert found[1].shape == found[2].shape == ((k,) if with_norm else (0,))
            for i, (a, b) in enumerate(zip(found, expected, strict=False)):
                assert a.shape == b.shape
                tolerance = 1e-5 + EPS[dtype] * (i == 0)
                # With one or two columns LayerNorm's gradient cancels to next to nothing.
                size = b.norm() + grad.double().norm() * (k <= 2)
                assert float((a.double() - b).norm()) <= tolerance * float(size), (m, k, i)


def test_slope_of_gelu(isa: str) -> None:
    x = torch.cat([torch.linspace(-14, 14, 20001), torch.logspace(-30, 10, 41), -torch.logspace(-30, 10, 41)])
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad((0.5 * leaf * torch.special.erfc(-leaf / 2**0.5)).sum(), leaf)
    found, _, _ = native.blend_rows_backward(torch.ones(1, len(x)), x[None], None, True, 0.0, 0)
    assert float((found[0].double() - expected).abs().max()) <= 5e-7


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32, 2**63 - 1, -1])
@pytest.mark.parametrize("dropout", [1e-9, 0.05, 0.5, 0.999])
def test_the_hash_keeps_the_same_values_everywhere(isa: str, seed: int, dropout: float) -> None:
    m, k = 33, 77
    expected = kept(m, k, dropout, seed) / (1.0 - dropout)
    for given in (seed, torch.tensor(seed)):
        y = native.blend_rows(torch.ones(m, k), 0.0, None, False, dropout, given, torch.float32)
        assert torch.allclose(y, expected.float(), rtol=1e-6, atol=0)
        grad, _, _ = native.blend_rows_backward(torch.ones(m, k), torch.ones(m, k), None, False, dropout, given)
        assert torch.equal(grad, y)


def test_nan_stays_in_its_row(isa: str) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(3, 159)
        x[1, 77] = bad
        for norm in (None, norm_of(159, torch.float32)):
            y = native.blend_rows(x, 0.5, norm, False, 0.0, 0, torch.float32)
            assert y.isfinite().all(-1).tolist() == [True, False, True]
            assert not y[1].isfinite().any()


# --- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 127), (64, 128), (91, 97), (400, 129)])
def test_weights_are_the_formula(isa: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    supported(dtype)
    w = (torch.randn(shape) * 0.02).to(dtype)
    exact = w.double()
    scale = max(float(exact.abs().mean()), 1e-5)
    codes = (exact / scale).round().clamp(-1, 1)
    border = ((exact / scale).abs() - 0.5).abs() < 1e-5
    for lam in (0.0, 0.3, 1.0):
        for out_dtype in (dtype, torch.float32, torch.float16):
            expected = exact + lam * (codes * scale - exact)
            found = native.blend_weight(w, lam, out_dtype)
            assert found.dtype == out_dtype
            error = (found.double() - expected).abs()
            assert bool((border | (error <= 1.1 * EPS[out_dtype] * expected.abs() + 1e-7 * scale + 2.0**-25)).all())


def test_weights_at_the_ends(isa: str) -> None:
    w = torch.randn(40, 50)
    assert torch.equal(native.blend_weight(w, 0.0, torch.float32), w)
    assert len(native.blend_weight(w, 1.0, torch.float32).unique()) == 3
    assert torch.equal(native.blend_weight(w.T, 0.0, torch.float32), w.T)
    assert not native.blend_weight(torch.zeros(9, 9), 0.7, torch.float32).any()
    w[3, 4] = float("nan")
    assert not native.blend_weight(w, 0.7, torch.float32).isfinite().any()


# --- threads -----------------------------------------------------------------------------------------------


def everything() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(701, 256, generator=generator).to(torch.bfloat16)
    grad = torch.randn(701, 256, generator=generator)
    norm = (torch.randn(256, generator=generator), torch.randn(256, generator=generator), 1e-5)
    weight = torch.randn(257, 300, generator=generator)
    return [
        native.blend_rows(x, 0.5, norm, True, 0.1, 3, torch.bfloat16),
        *native.blend_rows_backward(grad, x, norm, True, 0.1, 3),
        native.blend_weight(weight, 0.5, torch.bfloat16),
    ]


def test_results_do_not_depend_on_threads(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        for n in (2, 5):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(alone, everything(), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (7, 40), (65, 129), (3, 1024), (0, 8)])
def test_both_passes_at_once_give_what_each_gives(
    m: int, k: int, lam: float, gelu: bool, with_norm: bool, dtype: torch.dtype
) -> None:
    x, grad = torch.randn(m, k).to(dtype), torch.randn(m, k).to(dtype)
    norm = (torch.randn(k), torch.randn(k), 1e-5) if with_norm else None
    *found, y = native.blend_rows_again(grad, x, lam, norm, gelu, 0.3, 99)
    for a, b in zip(found, native.blend_rows_backward(grad, x, norm, gelu, 0.3, 99), strict=True):
        assert torch.equal(a, b)
    # The compiler may round a product and a sum at once in one pass and not in the other: a code may differ by one.
    wanted = native.blend_rows(x, lam, norm, gelu, 0.3, 99, dtype)
    assert y.dtype == dtype
    step = wanted.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    assert ((y.float() - wanted.float()).abs() <= 1.01 * step + 1e-6).all()
    assert ((y != wanted).float().mean() <= 0.01) if m * k > 200 else True


@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (5, 128), (7, 129), (16, 588), (2, 31), (0, 5)])
def test_a_weight_is_packed_as_its_codes_are(isa: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    weight[:, ::7] = 0.5  # half way between two codes
    for factor in (1.0, 3.7, 1e-9, 1e9):
        codes = torch.round(weight.double() * torch.tensor(factor, dtype=torch.float32)).clamp(-1, 1).to(torch.int8)
        found = native.pack_weight(weight, factor, packed_width(shape[1]))
        assert torch.equal(found, pack_ternary(codes))


ATTENTION_SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 2, 3),
    (2, 3, 50, 64),
    (1, 2, 97, 40),
    (3, 1, 193, 96),
    (1, 2, 300, 20),
    (0, 2, 5, 8),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_gradient_of_attention(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    if not native.supports("attention_qkv_backward", dtype):
        pytest.skip("this instruction set has no float16")
    b, n_heads, t, dim = shape
    whole = torch.randn(b + 1, t, 3 * n_heads * dim + 5).to(dtype)
    qkv, grad = whole[1:, :, 2:-3], torch.randn(b, t, n_heads * dim).to(dtype)  # rows and images are apart
    exact = qkv.double().requires_grad_()
    attention_train_reference(exact, n_heads).backward(grad.double())
    wanted = exact.grad
    assert wanted is not None
    found = native.attention_qkv_backward(grad, qkv, n_heads)
    assert found.shape == qkv.shape
    assert found.dtype == dtype
    bound = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    # Of one token the queries and keys have no gradient: what is left there is rounding.
    assert (found.double() - wanted).norm() <= bound * wanted.norm() + 1e-30
    for part, wanted_part in zip(found.double().chunk(3, -1), wanted.chunk(3, -1), strict=True):
        assert (part - wanted_part).norm() <= 2 * bound * wanted_part.norm() + bound * 1e-3 * wanted.norm()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(native.attention_qkv_backward(grad, qkv, n_heads), found)
    finally:
        torch.set_num_threads(before)


def test_gradient_of_attention_with_logits_that_would_overflow(isa: str) -> None:
    qkv, grad = 30 * torch.randn(1, 70, 3 * 16), torch.randn(1, 70, 16)
    exact = qkv.double().requires_grad_()
    attention_train_reference(exact, 1).backward(grad.double())
    assert exact.grad is not None
    found = native.attention_qkv_backward(grad, qkv, 1).double()
    assert (found - exact.grad).norm() <= 1e-3 * exact.grad.norm()  # logits of thousands are rounded
    qkv[0, 3, 5] = torch.nan
    assert native.attention_qkv_backward(grad, qkv, 1).isnan().any()
