"""Attention distillation on every backend against float64 autograd through the maps of every head."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tetra.kernels import attention_distillation

# The package's attribute of this name is the function.
module = importlib.import_module("tetra.kernels.attention_distillation")
reference = module.attention_distillation_reference

Run = Callable[..., Any]

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
LOSS_SCALE = 2.0**12  # as training in float16 has it, or gradients would be subnormal


def distil(student: Tensor, teacher: Tensor, reduction: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss, and its scaled gradient in the student's projection; [B, T, 3, H, E] each."""
    student = student.detach().requires_grad_()
    (q, k, _), (tq, tk, _) = (x.permute(2, 0, 3, 1, 4) for x in (student, teacher))
    loss = attention_distillation(q, k, tq, tk, temperature=temperature, reduction=reduction)  # type: ignore[arg-type]
    (loss * LOSS_SCALE).backward()
    assert student.grad is not None
    return loss.detach(), student.grad


def by_autograd(student: Tensor, teacher: Tensor, reduction: str, temperature: float) -> tuple[Tensor, Tensor]:
    """The same in float64, by definition."""
    student = student.detach().double().requires_grad_()
    (q, k, _), (tq, tk, _) = (x.permute(2, 0, 3, 1, 4) for x in (student, teacher.double()))
    loss = reference(q, k, tq, tk, temperature=temperature, reduction=reduction)
    (loss * LOSS_SCALE).backward()
    assert student.grad is not None
    return loss.detach(), student.grad


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(run: Run, student: Tensor, teacher: Tensor, reduction: str = "elements", temperature: float = 4.0) -> None:
    loss, gradient = run(distil, student, teacher, reduction, temperature)
    wanted, wanted_gradient = by_autograd(student, teacher, reduction, temperature)
    assert loss.dtype == torch.float32
    assert gradient.dtype == student.dtype
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3, abs=1e-9)
    assert relative_rms(gradient, wanted_gradient) <= TOLERANCE[student.dtype]
    assert not gradient[:, :, 2].any()  # values have no part in it


# One token; a prime; not a multiple of a block of 64, just past one, just before two; widths with and without a rest.
SHAPES = [
    (2, 1, (2, 4), (1, 3)),
    (2, 7, (3, 5), (2, 8)),
    (1, 64, (2, 32), (2, 32)),
    (2, 65, (1, 24), (4, 32)),
    (1, 127, (2, 16), (3, 24)),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("b", "t", "student", "teacher"), SHAPES)
def test_loss_and_gradient(
    run: Run, dtype: torch.dtype, b: int, t: int, student: tuple[int, int], teacher: tuple[int, int]
) -> None:
    x, y = ((2 * torch.randn(b, t, 3, *heads)).to(dtype) for heads in (student, teacher))
    for reduction in module.REDUCTIONS:
        check(run, x, y, reduction)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 30.0])
def test_temperatures(run: Run, temperature: float) -> None:
    check(run, torch.randn(1, 20, 3, 2, 8), torch.randn(1, 20, 3, 2, 8), "rows", temperature)


def test_student_and_teacher_of_different_dtypes(run: Run) -> None:
    for student, teacher in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        check(run, torch.randn(2, 33, 3, 2, 16).to(student), torch.randn(2, 33, 3, 3, 8).to(teacher), "rows")


def test_a_reduction_differs_by_the_number_of_tokens(run: Run) -> None:
    x, y = torch.randn(2, 2, 9, 3, 2, 8)
    (elements, of_elements), (rows, of_rows) = (run(distil, x, y, reduction, 4.0) for reduction in module.REDUCTIONS)
    torch.testing.assert_close(rows, elements * 9)
    torch.testing.assert_close(of_rows, of_elements * 9)


def test_no_images(run: Run) -> None:
    """A mean of nothing is not a number, as everywhere in torch; the gradient is as empty as the input."""
    loss, gradient = run(distil, torch.zeros(0, 9, 3, 2, 8), torch.zeros(0, 9, 3, 2, 8), "rows", 4.0)
    assert math.isnan(loss)
    assert gradient.shape == (0, 9, 3, 2, 8)


def test_a_student_like_its_teacher_has_no_loss(run: Run) -> None:
    x = 5 * torch.randn(2, 70, 3, 2, 16)
    for dtype in TOLERANCE:
        loss, gradient = run(distil, x.to(dtype), x.to(dtype), "rows", 4.0)
        assert loss.item() == pytest.approx(0.0, abs=1e-6)
        assert gradient.double().abs().max() <= 1e-5 * LOSS_SCALE


def test_logits_that_only_a_maximum_tames(run: Run) -> None:
    """Logits of some thousand: all of a row's weight is on one key, which need not be the teacher's."""
    check(run, 40 * torch.randn(1, 67, 3, 1, 16), 40 * torch.randn(1, 67, 3, 1, 16), "rows", 1.0)


def test_a_token_that_is_not_finite_shows_in_the_loss(run: Run) -> None:
    x, y = torch.randn(2, 1, 70, 3, 2, 8)
    for bad in (float("nan"), float("inf")):
        for side in (0, 1):
            z = [x.clone(), y.clone()]
            z[side][0, 66, 1, 0, 0] = bad
            loss, _ = run(distil, *z, "rows", 4.0)
            assert not math.isfinite(loss)


def from_views(wide: Tensor, teacher: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Loss, and gradient in ``wide`` [B, T, 3, H, E], from views of it that are laid out in one way or another."""
    wide = wide.detach().requires_grad_()
    q, k, _ = wide.permute(2, 0, 3, 1, 4)
    if kind == "every other token":
        q, k = q[:, :, ::2], k[:, :, ::2]
    elif kind == "apart":  # heads are not side by side
        q, k = (x.contiguous() for x in (q, k))
    elif kind == "one repeated":
        q, k = q[:1].expand(len(q), -1, -1, -1), k[:1].expand(len(q), -1, -1, -1)
    elif kind == "two layouts":
        k = k.contiguous()
    tq, tk, _ = teacher.to(wide.dtype).permute(2, 0, 3, 1, 4)
    loss_of = reference if wide.dtype == torch.float64 else attention_distillation
    loss = loss_of(q, k, tq, tk, reduction="rows")
    loss.backward()
    assert wide.grad is not None
    return loss.detach(), wide.grad


@pytest.mark.parametrize("kind", ["plain", "every other token", "apart", "one repeated", "two layouts"])
def test_views(run: Run, kind: str) -> None:
    wide = torch.randn(2, 10, 3, 2, 16)
    teacher = torch.randn(2, 5 if kind == "every other token" else 10, 3, 2, 16)
    loss, gradient = run(from_views, wide, teacher, kind)
    wanted, wanted_gradient = from_views(wide.double(), teacher, kind)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert relative_rms(gradient, wanted_gradient) <= 1e-3


@contextmanager
def small_strips() -> Iterator[None]:
    before = module.STRIP_BYTES, module._CPU_STRIP_VALUES
    module.STRIP_BYTES, module._CPU_STRIP_VALUES = 4, 1
    try:
        yield
    finally:
        module.STRIP_BYTES, module._CPU_STRIP_VALUES = before


def distil_in_small_strips(student: Tensor, teacher: Tensor, reduction: str, temperature: float) -> Any:
    with small_strips():
        return distil(student, teacher, reduction, temperature)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_images_that_take_several_strips(run: Run, dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 2, 150, 3, 2, 8).to(dtype)
    check(lambda _, *arguments: run(distil_in_small_strips, *arguments), x, y, "rows")


@given(b=st.integers(0, 9), t=st.integers(0, 400), max_values=st.integers(1, 100_000))
@settings(deadline=None, max_examples=200)
def test_strips_cover_every_row_once_and_are_small(b: int, t: int, max_values: int) -> None:
    seen = torch.zeros(b, t, dtype=torch.int64)
    for images, parts in module._strips(b, t, max_values):
        for rows in parts:
            seen[images, rows] += 1
            n_images, n_rows = images.stop - images.start, rows.stop - rows.start
            assert n_images * n_rows * t <= max(max_values, min(64, t) * t)
    assert (seen == 1).all()


def test_gradcheck() -> None:
    q, k = (torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tq, tk = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    for reduction in module.REDUCTIONS:
        assert torch.autograd.gradcheck(
            lambda q, k, r=reduction: attention_distillation(q, k, tq, tk, temperature=2.0, reduction=r), (q, k)
        )


def twice(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    return *distil(student, teacher, "rows", 4.0), *distil(student, teacher, "rows", 4.0)


def test_results_repeat_bit_for_bit(run: Run) -> None:
    loss, gradient, again, gradient_again = run(twice, *torch.randn(2, 2, 130, 3, 2, 16).bfloat16())
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradient_again)


def saved_storages(compute: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> int:
    """Bytes that ``compute`` saves for backward, each storage once, those of ``inputs`` left out."""
    known = {x.untyped_storage().data_ptr() for x in inputs}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = compute()  # alive while we count, or storages would be used again
    assert loss.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("t", [17, 34])
def test_two_numbers_a_row_are_saved(t: int) -> None:
    student = torch.randn(3, t, 3, 2, 8).bfloat16().requires_grad_()
    teacher = torch.randn(3, t, 3, 2, 8).bfloat16()
    (q, k, _), (tq, tk, _) = (x.permute(2, 0, 3, 1, 4) for x in (student, teacher))
    assert saved_storages(lambda: attention_distillation(q, k, tq, tk), (student, teacher)) == 2 * 4 * 3 * t


def test_teachers_get_no_gradient() -> None:
    q, k, tq, tk = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(4))
    attention_distillation(q, k, tq, tk).backward()
    assert q.grad is not None
    assert k.grad is not None
    assert tq.grad is None
    assert tk.grad is None


def test_autocast_changes_nothing() -> None:
    student, teacher = torch.randn(2, 2, 9, 3, 2, 8)
    plain = distil(student, teacher, "rows", 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = distil(student, teacher, "rows", 4.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, under_autocast, strict=True))


def test_operators_are_well_formed_and_compile_whole() -> None:
    rows = tuple(torch.randn(2, 5, 8, requires_grad=i < 2) for i in range(4))
    torch.library.opcheck(module._attention_distillation_op, (*rows, 0.1, 0.2))
    q, k, tq, tk = (torch.randn(1, 2, 5, 4, requires_grad=i < 2) for i in range(4))
    compiled = torch.compile(attention_distillation, fullgraph=True, backend="aot_eager")
    loss = compiled(q, k, tq, tk)
    assert torch.equal(loss, attention_distillation(q, k, tq, tk))
    found = torch.autograd.grad(loss, (q, k))
    wanted = torch.autograd.grad(attention_distillation(q, k, tq, tk), (q, k))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_wrong_arguments_are_refused() -> None:
    x = torch.zeros(2, 3, 5, 4)
    with pytest.raises(TypeError, match=r"teacher_q, teacher_k: dtypes are torch\.int8 and torch\.int8, wanted one"):
        attention_distillation(x, x, x.to(torch.int8), x.to(torch.int8))
    with pytest.raises(TypeError, match=r"student_q, student_k: dtypes are torch\.float32 and torch\.float64"):
        attention_distillation(x, x.double(), x, x)
    with pytest.raises(ValueError, match=r"student_q, student_k: shapes are \(2, 3, 5, 4\) and \(2, 3, 6, 4\), wanted"):
        attention_distillation(x, torch.zeros(2, 3, 6, 4), x, x)
    with pytest.raises(ValueError, match=r"wanted \[B, H, T, E\] twice"):
        attention_distillation(x[0], x[0], x, x)
    with pytest.raises(ValueError, match=r"wanted \[B, H, T, E\] twice"):
        attention_distillation(x, x, x[..., :0], x[..., :0])
    y = torch.zeros(2, 3, 6, 4)
    with pytest.raises(
        ValueError, match="teacher_q: holds 2 images of 6 tokens, but student_q 2 of 5; wanted the same"
    ):
        attention_distillation(x, x, y, y)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"temperature: is {temperature}, wanted a finite number > 0"):
            attention_distillation(x, x, x, x, temperature=temperature)
    with pytest.raises(ValueError, match="reduction: is 'sum', wanted one of elements, rows"):
        attention_distillation(x, x, x, x, reduction="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="teacher_k: is on meta, but student_q is on cpu; move one of them"):
        attention_distillation(x, x, x, x.to("meta"))


def test_cost_counts_the_products_and_every_tensor_once() -> None:
    operations, n_bytes = module.cost(2, 530, 768, 768)
    assert operations == 2 * 530 * 530 * (2 * (768 + 768) + 16)
    assert n_bytes == 4 * (2 * 530 * 768) * 2 + 3 * 4 * (2 * 530)
    more, _ = module.cost(2, 530, 768, 768, backward=True)
    assert more - operations == 2 * (2 * 2 * 530 * 530 * 768)
