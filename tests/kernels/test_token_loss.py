"""The loss of normalised tokens on every backend against float64 autograd through F.normalize."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tetra.kernels import token_loss

# The package's attribute of this name is the function.
module = importlib.import_module("tetra.kernels.token_loss")

Run = Callable[..., Any]

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
LOSS_SCALE = 2.0**12  # as training in float16 has it, or gradients would be subnormal


def differentiate(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and its scaled gradient."""
    student = student.detach().requires_grad_()
    loss = token_loss(student, teacher)
    (loss * LOSS_SCALE).backward()
    assert student.grad is not None
    return loss.detach(), student.grad


def by_autograd(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64, as PyTorch writes it."""
    student = student.detach().double().requires_grad_()
    loss = F.mse_loss(F.normalize(student, dim=-1), F.normalize(teacher.double(), dim=-1))
    (loss * LOSS_SCALE).backward()
    assert student.grad is not None
    return loss.detach(), student.grad


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(run: Run, student: Tensor, teacher: Tensor) -> None:
    loss, gradient = run(differentiate, student, teacher)
    wanted, wanted_gradient = by_autograd(student, teacher)
    assert loss.dtype == torch.float32
    assert gradient.dtype == student.dtype
    assert gradient.shape == student.shape
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert relative_rms(gradient, wanted_gradient) <= TOLERANCE[student.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape", [(5,), (3, 8), (2, 7, 13), (1, 3, 256), (2, 3, 432), (1, 2, 768), (2, 1, 1280), (2, 1, 3, 40)]
)
def test_loss_and_gradient(run: Run, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    student = 3 * torch.randn(shape)
    check(run, student.to(dtype), (student + 20 * torch.randn(shape)).to(dtype))


def test_more_tokens_than_are_computed_at_once() -> None:
    for shape in ((2, 1500, 3), (700, 2, 3)):
        check(lambda f, *arguments: f(*arguments), torch.randn(shape), torch.randn(shape))


def test_rows_too_wide_for_registers(run: Run) -> None:
    check(run, torch.randn(2, 20000).bfloat16(), torch.randn(2, 20000).bfloat16())


def test_student_and_teacher_of_different_dtypes(run: Run) -> None:
    for student, teacher in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        check(run, torch.randn(4, 300).to(student), torch.randn(4, 300).to(teacher))


def test_views_are_read_in_place(run: Run) -> None:
    tokens = torch.randn(3, 8, 40)
    teacher = torch.randn(3, 8, 40)
    check(run, tokens[:, 1:], teacher[:, 1:])  # the patches of every image
    check(run, tokens[:, 0], teacher[:, 0])  # their CLS tokens
    check(run, tokens[..., 3:20], teacher[..., 4:21])
    check(run, tokens[..., ::2], teacher[..., 1::2])
    check(run, tokens.transpose(0, 1), teacher.transpose(0, 1))


def test_nearly_equal_tokens_lose_no_digits(run: Run) -> None:
    """1 - cos is 5e-7 here, of which a float32 cosine holds one digit."""
    teacher = torch.randn(5, 768)
    student = teacher + 1e-3 * torch.randn(5, 768)
    check(run, student, teacher)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_and_tiny_tokens_are_as_normalize_has_them(run: Run, dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 4, 24).to(dtype)
    student[1] = 0
    teacher[2] = 0
    student[3] *= 1e-14
    loss, gradient = run(differentiate, student, teacher)
    wanted, wanted_gradient = by_autograd(student, teacher)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert not gradient[2].any()  # whatever the student's direction, it is as far from zero
    for row in (0, 1, 3):  # one by one, as their sizes differ by 12 powers of ten
        assert relative_rms(gradient[row], wanted_gradient[row]) <= TOLERANCE[dtype]


def test_no_tokens(run: Run) -> None:
    """A mean of nothing is not a number, as everywhere in torch; the gradient is as empty as the input."""
    for shape in ((0, 8), (0, 3, 8), (3, 0, 8)):
        loss, gradient = run(differentiate, torch.zeros(shape), torch.zeros(shape))
        assert math.isnan(loss)
        assert gradient.shape == shape


def test_a_token_that_is_not_finite_shows_in_the_loss(run: Run) -> None:
    for bad in (float("nan"), float("inf")):
        for side in (0, 1):
            tokens = list(torch.randn(2, 3, 300))
            tokens[side][1, 299] = bad
            assert not math.isfinite(run(differentiate, *tokens)[0])


@given(scale=st.floats(1e-6, 1e6), a=st.integers(1, 4), r=st.integers(1, 9), c=st.integers(1, 50))
@settings(deadline=None, max_examples=50)
def test_the_length_of_a_token_does_not_matter(scale: float, a: int, r: int, c: int) -> None:
    student, teacher = torch.randn(2, a, r, c, dtype=torch.float64)
    loss = token_loss(student, teacher)
    torch.testing.assert_close(token_loss(student * scale, teacher), loss)
    torch.testing.assert_close(token_loss(student, teacher * scale), loss)
    assert 0 <= loss * c <= 4 + 1e-12


def test_gradcheck() -> None:
    student = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: token_loss(x, teacher), student)


def test_reference_is_the_definition() -> None:
    student, teacher = torch.randn(2, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(module.token_loss_reference(student, teacher), by_autograd(student, teacher)[0])


def test_two_numbers_a_token_are_saved() -> None:
    tokens = torch.randn(3, 12, 64).bfloat16().requires_grad_()
    teacher = torch.randn(3, 11, 64).bfloat16()
    known = {x.untyped_storage().data_ptr() for x in (tokens, teacher)}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = token_loss(tokens[:, 1:], teacher)
    assert loss.requires_grad
    assert sum(n_bytes for pointer, n_bytes in found.items() if pointer not in known) == 2 * 4 * 3 * 11


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    token_loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_operators_are_well_formed_and_compile_whole() -> None:
    student, teacher = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8)
    torch.library.opcheck(module._token_loss_op, (student, teacher))
    compiled = torch.compile(token_loss, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(f(student, teacher), student)[0] for f in (compiled, token_loss))
    assert torch.equal(found, wanted)


def test_wrong_arguments_are_refused() -> None:
    x = torch.zeros(3, 8)
    with pytest.raises(TypeError, match=r"teacher: dtype is torch\.int8, wanted a floating dtype"):
        token_loss(x, x.to(torch.int8))
    with pytest.raises(ValueError, match=r"student: shape is \(3, 0\), wanted \[\.\.\., C\], C >= 1"):
        token_loss(x[:, :0], x[:, :0])
    with pytest.raises(ValueError, match=r"student: shape is \(\), wanted"):
        token_loss(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"teacher: shape is \(3, 7\), wanted that of student, \(3, 8\)"):
        token_loss(x, x[:, :7])
    with pytest.raises(ValueError, match="teacher: is on meta, but student is on cpu"):
        token_loss(x, x.to("meta"))


def test_cost_counts_every_tensor_once() -> None:
    assert module.cost(10, 768) == (11 * 7680, 2 * 7680 * 2 + 120)
    assert module.cost(10, 768, backward=True) == (3 * 7680, 3 * 7680 * 2 + 120)
