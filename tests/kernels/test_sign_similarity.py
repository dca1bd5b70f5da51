"""Similarity of signs on every backend against float64 autograd through the plain formulas."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tetra.kernels import pack_bits, sign_similarity

# The package's attribute of this name is the function.
module = importlib.import_module("tetra.kernels.sign_similarity")

Run = Callable[..., Any]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
SHAPES = [(1, 1), (1, 40), (2, 7), (3, 8), (5, 13), (9, 131), (17, 509), (65, 96), (130, 33), (12, 1100), (7, 4096)]


def differentiate(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities, and the gradient of their weighted sum."""
    x = x.detach().requires_grad_()
    similarity = sign_similarity(x)
    similarity.backward(weights)
    assert x.grad is not None
    return similarity.detach(), x.grad


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (ctx.saved_tensors[0].abs() <= 1)


def by_autograd(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64: signs divided by sqrt(D), normalised, multiplied."""
    x = x.detach().double().requires_grad_()
    signs: Tensor = _Sign.apply(x)
    unit = F.normalize(signs / x.shape[1] ** 0.5, dim=1)
    similarity = unit @ unit.T
    similarity.backward(weights.double())
    assert x.grad is not None
    return similarity.detach(), x.grad


def sums_of_signs(x: Tensor) -> Tensor:
    signs = torch.where(x > 0, 1, -1)
    return (signs[:, None] * signs[None, :]).sum(-1)


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(run: Run, x: Tensor) -> None:
    weights = torch.randn(len(x), len(x))
    similarity, gradient = run(differentiate, x, weights)
    _, wanted = by_autograd(x, weights)
    assert similarity.dtype == torch.float32
    assert torch.equal(similarity, sums_of_signs(x).float() / x.shape[1])
    assert (gradient.dtype, gradient.shape) == (x.dtype, x.shape)
    assert not gradient[(x.abs() > 1).expand_as(gradient)].any()
    if len(x) == 1:  # whose similarity with itself is 1, come what may; autograd leaves rounding errors
        assert not gradient.any()
    else:
        assert relative_rms(gradient, wanted) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_exact_and_the_gradient_is_autograd_s(run: Run, shape: tuple[int, int]) -> None:
    check(run, torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 13), (9, 131), (12, 1100)])
def test_half_precision(run: Run, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(run, torch.randn(shape).to(dtype))


def test_views_are_taken(run: Run) -> None:
    x = torch.randn(40, 60)
    for view in (x[::3], x[:9, 5:28], x[:, ::2], x.T):
        check(run, view)


def test_every_value_on_an_edge(run: Run) -> None:
    """Zeros are negative, both of them, and the gradient passes up to 1 with its ends."""
    x = torch.tensor([[0.0, -0.0, 1.0, -1.0, 1 + 2**-23, -1 - 2**-23, 1e-40, 5e37]]).repeat(6, 1)
    x[torch.rand(x.shape) < 0.4] = -0.5
    check(run, x)


def test_gradients_of_very_different_sizes(run: Run) -> None:
    x = torch.randn(8, 65)
    for scale in (1e-30, 1e30):
        weights = torch.randn(8, 8) * scale
        _, gradient = run(differentiate, x, weights)
        assert relative_rms(gradient, by_autograd(x, weights)[1]) <= TOLERANCE[torch.float32]


def test_the_gradient_is_at_right_angles_to_the_signs(run: Run) -> None:
    """Where nothing is cut off, which is what the normalisation adds; also where the similarities are all large."""
    x = torch.rand(6, 1000) - 0.01
    weights = torch.rand(6, 6)
    _, gradient = run(differentiate, x, weights)
    assert relative_rms(gradient, by_autograd(x, weights)[1]) <= TOLERANCE[torch.float32]
    signs = torch.where(x > 0, 1.0, -1.0)
    assert ((gradient * signs).sum(1).abs() <= 1e-4 * gradient.abs().sum(1)).all()


@given(b=st.integers(1, 6), d=st.integers(1, 70), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_any_shape_in_float64(b: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weights = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((b, d), (b, b)))
    similarity, gradient = differentiate(x, weights)
    wanted, wanted_gradient = by_autograd(x, weights)
    assert similarity.dtype == gradient.dtype == torch.float64
    torch.testing.assert_close(similarity, wanted, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=0, atol=1e-12)
    assert torch.equal(similarity, similarity.T)
    assert (similarity.diagonal() == 1).all()
    assert (similarity.abs() <= 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_descriptor_that_is_not_finite_shows(run: Run, bad: float, dtype: torch.dtype) -> None:
    x = torch.randn(5, 300).to(dtype)
    x[2, 299] = bad
    similarity, _ = run(differentiate, x, torch.zeros(5, 5))
    touched = torch.zeros(5, 5, dtype=torch.bool)
    touched[2] = touched[:, 2] = True
    assert torch.equal(~torch.isfinite(similarity), touched)
    assert torch.equal(similarity[~touched], (sums_of_signs(x) / 300)[~touched])


def test_a_gradient_that_is_not_finite_stays_so(run: Run) -> None:
    weights = torch.randn(5, 5)
    weights[1, 3] = float("nan")
    _, gradient = run(differentiate, torch.rand(5, 40), weights)
    assert gradient[[1, 3]].isnan().all()


def test_no_descriptors(run: Run) -> None:
    similarity, gradient = run(differentiate, torch.zeros(0, 8), torch.zeros(0, 0))
    assert similarity.shape == (0, 0)
    assert gradient.shape == (0, 8)


def test_reference_is_the_definition() -> None:
    x, weights = torch.randn(6, 21, dtype=torch.float64, requires_grad=True), torch.randn(6, 6).double()
    similarity = module.sign_similarity_reference(x)
    wanted, wanted_gradient = by_autograd(x, weights)
    torch.testing.assert_close(similarity.detach(), wanted)
    torch.testing.assert_close(torch.autograd.grad(similarity, x, weights)[0], wanted_gradient)


@pytest.mark.parametrize(("b", "d"), [(12, 509), (4, 4096)])
def test_two_bits_a_value_are_saved(b: int, d: int) -> None:
    x = torch.randn(b, d, requires_grad=True)
    found: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        found[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        similarity = sign_similarity(x)
    assert similarity.requires_grad
    assert x.untyped_storage().data_ptr() not in found
    assert sum(found.values()) == 2 * b * -(-d // 8)


def test_signs_are_never_floats_all_at_once() -> None:
    class LargestFloat(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point() and not out._is_view():
                self.largest = max(self.largest, out.numel())
            return out

    b, d = 16, 4096
    codes = pack_bits(torch.randn(b, d))
    with LargestFloat() as mode:
        module._similarity_torch(codes, d, torch.float32)
    assert mode.largest == b * module._COLUMNS_AT_A_TIME
    gradient_itself = b * d
    with LargestFloat() as mode:
        module._gradient_torch(torch.randn(b, b), codes, codes, d, torch.bfloat16)
    assert mode.largest == gradient_itself


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    assert not sign_similarity(torch.randn(3, 5)).requires_grad
    with torch.no_grad():
        assert not sign_similarity(torch.randn(3, 5, requires_grad=True)).requires_grad


def test_autocast_changes_nothing() -> None:
    x, weights = torch.randn(9, 1300), torch.randn(9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = differentiate(x, weights)
    for a, b in zip(found, differentiate(x, weights), strict=True):
        assert torch.equal(a, b)


def test_operators_are_well_formed_and_compile_whole() -> None:
    x = torch.randn(3, 21, requires_grad=True)
    torch.library.opcheck(module._sign_similarity_op, (x,))
    codes = pack_bits(x.detach())
    torch.library.opcheck(module._backward_op, (torch.randn(3, 3), codes, codes, 21, torch.bfloat16))

    def loss(x: Tensor) -> Tensor:
        return sign_similarity(x).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(f(x), x)[0] for f in (compiled, loss))
    assert torch.equal(found, wanted)


def test_wrong_arguments_are_refused() -> None:
    for dtype in (torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(TypeError, match=f"x: dtype is {dtype}, wanted one of torch.float16"):
            sign_similarity(torch.zeros(3, 8).to(dtype))
    for shape in ((8,), (2, 3, 8), (3, 0), ()):
        with pytest.raises(ValueError, match=r"x: shape is \(.*\), wanted \[B, D\], 1 <= D <= 16777216"):
            sign_similarity(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"x: shape is \(1, 16777217\)"):
        sign_similarity(torch.zeros(1, 1).expand(1, 2**24 + 1))


def test_cost_counts_every_tensor_once() -> None:
    assert module.cost(10, 768) == (3 * 100 * 24 + 6 * 7680, 4 * 7680 + 2 * 960 + 400)
    assert module.cost(10, 768, 2, backward=True) == (4 * 100 * 768, 400 + 2 * 960 + 2 * 7680)


def test_few_tiles_are_halved() -> None:
    small, large = module.FORWARD_CONFIGS[1], module.FORWARD_CONFIG
    assert small[0] * small[1] * 2 == large[0] * large[1]
    # 512 descriptors are 128 tiles, 2048 are 2048.
    assert [module.default_forward_config(b, 132) for b in (1, 512, 2048)] == [small, small, large]
    assert module.default_forward_config(512, 16) == large
