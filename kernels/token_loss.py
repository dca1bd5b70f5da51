"""Mean squared error between L2-normalised tokens, without the normalised tokens.

Contract
    letters: M tokens, C their width
    token_loss(student float [..., C], teacher float [..., C]) -> float32 scalar (float64 if an input is)
        differentiable in the student, once

    a = student / max(|student|, 1e-12),  b likewise of the teacher      token by token, as F.normalize has it
    loss = 1 / (M C) sum (a - b)^2

Memory: forward reads both tokens once and saves the inputs and two numbers a token, alpha and beta, for backward:
    d/dstudent sum (a - b)^2 = alpha student + beta teacher
    alpha = 2 a.b / |student|^2,  beta = -2 / (|student| |teacher|), norms being at least 1e-12;
    a student below that is divided by a constant, and has alpha = 2e24

Numerics: float32 whatever the dtype. The term of a token is summed from (a - b)^2, not taken as 2 - 2 a.b, which
for nearly equal tokens is a difference of nearly equal numbers: where 1 - a.b is 1e-5 it would lose three digits of
seven. The gradient is rounded once, to the student's dtype.

The student's projection (Linear, where it is narrower than its teacher) is not fused. What that would save is the
projected token, which can be made again in backward: for a ViT-S with a teacher as wide as ViT-B, 0.8 MiB an image of
530 tokens in bfloat16. The student's twelve blocks save 68 MiB, so that a second product would buy 1 %.

Errors
    TypeError for dtypes that are not floating, ValueError for shapes that differ and for C = 0. Tokens that are not
    finite give a loss that is not.

Source of the loss: TeTRA-VPR (arXiv 2503.02511), which takes it times 100.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tetra.kernels.backend import backend_for, on_device_of, tl, triton
from tetra.kernels.rows import (
    ROW_FIELDS,
    TRITON_DTYPES,
    fits_registers,
    load_part,
    row_config,
    row_configs,
    row_options,
    store_part,
    tuned_row,
)
from tetra.kernels.specimen import Specimen
from tetra.kernels.tunable import (
    DTYPES,
    TOLERANCES,
    TRITON_NAMES,
    Config,
    Sizes,
    Trial,
    Tunable,
    Work,
    dtype_name,
    seeded,
)

SMALLEST_NORM = 1e-12


# --- reference ---------------------------------------------------------------------------------------------


def token_loss_reference(student: Tensor, teacher: Tensor) -> Tensor:
    """The formula of the contract."""
    a, b = (x / x.norm(dim=-1, keepdim=True).clamp(min=SMALLEST_NORM) for x in (student, teacher))
    return (a - b).square().mean()


# --- CPU ---------------------------------------------------------------------------------------------------

# Tokens are [A, R, C] from here on, so that the patches of every image, which lie apart, are read in place.

_ROWS_AT_A_TIME = 1024  # bounds the float32 temporaries to what the caches hold


def _new_terms(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Terms, alpha and beta [A, R], to be filled."""
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    terms, alpha, beta = (student.new_empty(student.shape[:2], dtype=dtype) for _ in range(3))
    return terms, alpha, beta


def _parts(a: int, r: int) -> list[tuple[slice, slice]]:
    """Of [a, r]: some images, or some rows of one."""
    images = max(1, _ROWS_AT_A_TIME // max(r, 1))
    return [
        (slice(image, image + images), slice(row, row + _ROWS_AT_A_TIME))
        for image in range(0, a, images)
        for row in range(0, r, _ROWS_AT_A_TIME)
    ]


def _forward_torch(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    terms, alpha, beta = _new_terms(student, teacher)
    for part in _parts(*terms.shape):
        a, b = student[part].to(terms.dtype), teacher[part].to(terms.dtype)
        norm_a, norm_b = a.norm(dim=-1), b.norm(dim=-1)
        free = norm_a >= SMALLEST_NORM
        norm_a, norm_b = norm_a.clamp_(min=SMALLEST_NORM), norm_b.clamp_(min=SMALLEST_NORM)
        a, b = a / norm_a[..., None], b / norm_b[..., None]
        alpha[part] = torch.where(free, torch.linalg.vecdot(a, b), 1.0) * 2 / norm_a / norm_a
        beta[part] = -2 / norm_a / norm_b
        terms[part] = a.sub_(b).square_().sum(-1)
    return terms, alpha, beta


def _backward_torch(weights: Tensor, student: Tensor, teacher: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    for part in _parts(*alpha.shape):
        from_student = student[part].to(alpha.dtype) * (weights[part] * alpha[part])[..., None]
        from_teacher = teacher[part].to(alpha.dtype) * (weights[part] * beta[part])[..., None]
        gradient[part] = from_student.add_(from_teacher)
    return gradient


# --- Triton ------------------------------------------------------------------------------------------------


def cost(m: int, c: int, n_bytes: int = 2, *, backward: bool = False) -> tuple[int, int]:
    """(float operations, bytes moved at least) of m tokens: the loss, or with ``backward`` the gradient.

    Operations a value: 11 for two norms, a dot product, two quotients and the squared difference; 3 backward.
    """
    if backward:
        return 3 * m * c, 3 * m * c * n_bytes + 12 * m
    return 11 * m * c, 2 * m * c * n_bytes + 12 * m


@triton.jit
def _token_loss_kernel(
    student_ptr,  # float [A, R, C], values side by side
    teacher_ptr,
    term_ptr,  # float32 [A, R], contiguous
    alpha_ptr,
    beta_ptr,
    R,
    student_stride_a,  # in elements
    student_stride_r,
    teacher_stride_a,
    teacher_stride_r,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    image = (tl.program_id(0) // R).to(tl.int64)
    row = (tl.program_id(0) % R).to(tl.int64)
    student_row = student_ptr + image * student_stride_a + row * student_stride_r
    teacher_row = teacher_ptr + image * teacher_stride_a + row * teacher_stride_r
    columns = tl.arange(0, CHUNK)
    student = ()
    teacher = ()
    squares_a = tl.zeros((CHUNK,), tl.float32)
    squares_b = squares_a
    for start in tl.static_range(0, C, CHUNK):
        a = load_part(student_row, start + columns, start + CHUNK, C)
        b = load_part(teacher_row, start + columns, start + CHUNK, C)
        squares_a += a * a
        squares_b += b * b
        student = student + (a,)  # type: ignore[assignment]  # noqa: RUF005
        teacher = teacher + (b,)  # type: ignore[assignment]  # noqa: RUF005
    norm_a = tl.sqrt_rn(tl.sum(squares_a))
    norm_b = tl.sqrt_rn(tl.sum(squares_b))
    is_free = norm_a >= 1e-12
    norm_a = tl.where(norm_a < 1e-12, 1e-12, norm_a)  # NaN stays
    norm_b = tl.where(norm_b < 1e-12, 1e-12, norm_b)
    share_a = 1.0 / norm_a
    share_b = 1.0 / norm_b
    dots = tl.zeros((CHUNK,), tl.float32)
    squares = dots
    for i in tl.static_range(len(student)):
        a = student[i] * share_a
        b = teacher[i] * share_b
        dots += a * b
        squares += (a - b) * (a - b)
    cosine = tl.where(is_free, tl.sum(dots), 1.0)
    tl.store(term_ptr + token, tl.sum(squares))
    tl.store(alpha_ptr + token, 2.0 * cosine * share_a * share_a)
    tl.store(beta_ptr + token, -2.0 * share_a * share_b)


@triton.jit
def _token_gradient_kernel(
    weight_ptr,  # float32 [A, R], contiguous: dL/dterm
    student_ptr,  # as above
    teacher_ptr,
    alpha_ptr,
    beta_ptr,
    gradient_ptr,  # like student, contiguous
    R,
    student_stride_a,
    student_stride_r,
    teacher_stride_a,
    teacher_stride_r,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    image = (tl.program_id(0) // R).to(tl.int64)
    row = (tl.program_id(0) % R).to(tl.int64)
    student_row = student_ptr + image * student_stride_a + row * student_stride_r
    teacher_row = teacher_ptr + image * teacher_stride_a + row * teacher_stride_r
    columns = tl.arange(0, CHUNK)
    weight = tl.load(weight_ptr + token)
    alpha = tl.load(alpha_ptr + token) * weight
    beta = tl.load(beta_ptr + token) * weight
    for start in tl.static_range(0, C, CHUNK):
        a = load_part(student_row, start + columns, start + CHUNK, C)
        b = load_part(teacher_row, start + columns, start + CHUNK, C)
        store_part(gradient_ptr + token * C, start + columns, alpha * a + beta * b, start + CHUNK, C)


def _configs(c: int, student: torch.dtype, teacher: torch.dtype) -> tuple[Config, ...]:
    """Those of rows twice as wide, because both tokens are in registers at once."""
    rows = row_configs(2 * c, max(student, teacher, key=lambda dtype: dtype.itemsize))
    return (rows[0], *(row for row in rows[1:] if row[0] < 2 * c))


@lru_cache(maxsize=4096)
def _rows_and_key(part: str, c: int, student: torch.dtype, teacher: torch.dtype) -> tuple[tuple[Config, ...], str]:
    """What a launch looks up: rows that may run, the default first, and the key."""
    return _configs(c, student, teacher), f"{part}_c{c}_{dtype_name(student)}_{dtype_name(teacher)}"


def _launch(
    part: str,
    before: tuple[Tensor, ...],
    student: Tensor,
    teacher: Tensor,
    after: tuple[Tensor, ...],
    config: Config | None,
) -> None:
    """Runs the "forward" or the "gradient" kernel, one block a token.

    ``before`` and ``after`` are the other tensors, in the kernel's order.
    """
    a, r, c = student.shape
    if a * r:
        strides = (*student.stride()[:2], *teacher.stride()[:2])
        rows, key = _rows_and_key(part, c, student.dtype, teacher.dtype)
        options = tuned_row("token_loss", key, rows, student.device, config)
        kernel = _token_loss_kernel if part == "forward" else _token_gradient_kernel
        with on_device_of(student):
            kernel[(a * r,)](*before, student, teacher, *after, r, *strides, C=c, **options)


def _launch_token_loss(student: Tensor, teacher: Tensor, config: Config | None = None) -> tuple[Tensor, Tensor, Tensor]:
    terms = _new_terms(student, teacher)
    _launch("forward", (), _along_rows(student), _along_rows(teacher), terms, config)
    return terms


def _launch_token_gradient(
    weights: Tensor, student: Tensor, teacher: Tensor, alpha: Tensor, beta: Tensor, config: Config | None = None
) -> Tensor:
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    tensors = (_along_rows(student), _along_rows(teacher))
    _launch("gradient", (weights,), *tensors, (alpha, beta, gradient), config)
    return gradient


def _along_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def specimens(arch: int) -> list[Specimen]:
    """Tokens of the widths that teachers have; a width with a rest."""
    return [
        _specimen(gradient, c, student, teacher)
        for gradient in (False, True)
        for c, student, teacher in (
            (768, "bf16", "bf16"),
            (768, "fp16", "fp16"),
            (768, "fp32", "fp32"),
            (768, "fp32", "bf16"),
            (384, "bf16", "bf16"),
            (1280, "bf16", "fp32"),
            (432, "bf16", "fp32"),
            (16384, "bf16", "bf16"),
        )
    ]


def _specimen(gradient: bool, c: int, student: str, teacher: str, row: Config | None = None) -> Specimen:
    config = row_options(row or _configs(c, TRITON_DTYPES[student], TRITON_DTYPES[teacher])[0])
    signature = {"student_ptr": f"*{student}", "teacher_ptr": f"*{teacher}", "alpha_ptr": "*fp32", "beta_ptr": "*fp32"}
    if gradient:
        signature |= {"weight_ptr": "*fp32", "gradient_ptr": f"*{student}"}
    else:
        signature["term_ptr"] = "*fp32"
    strides = {f"{side}_stride_{x}": "i32" for side in ("student", "teacher") for x in "ar"}
    described = {"pass": "gradient" if gradient else "forward", "C": c, "student": student, "teacher": teacher}
    return Specimen(
        name="token_loss",
        config=described | config,
        kernel=_token_gradient_kernel if gradient else _token_loss_kernel,
        signature={**signature, "R": "i32", **strides},
        constants={"C": c, "CHUNK": config.pop("CHUNK")},
        options=config,
        unaligned=("R",),
    )


# --- tuning ------------------------------------------------------------------------------------------------


def _sizes_key(sizes: Sizes) -> tuple[tuple[Config, ...], str]:
    return _rows_and_key(sizes["part"], sizes["c"], DTYPES[sizes["student"]], DTYPES[sizes["teacher"]])


def _works(arch: int, n_sms: int, sizes: Sizes, config: Config) -> list[Work]:
    m, c, gradient = sizes["m"], sizes["c"], sizes["part"] == "gradient"
    n_bytes = max(DTYPES[sizes[side]].itemsize for side in ("student", "teacher"))
    operations, moved = cost(m, c, n_bytes, backward=gradient)
    code = _specimen(gradient, c, TRITON_NAMES[sizes["student"]], TRITON_NAMES[sizes["teacher"]], config)
    return [Work(code, m, 1, 0, operations, moved, "fp32")]


def _trial(sizes: Sizes, device: torch.device) -> Trial:
    random, shape = seeded(device), (1, sizes["m"], sizes["c"])
    student, teacher = (
        torch.randn(shape, generator=random, device=device).to(DTYPES[sizes[side]]) for side in ("student", "teacher")
    )
    wide = student.to(torch.float64), teacher.to(torch.float64)
    if sizes["part"] == "forward":
        return Trial(
            lambda config: _launch_token_loss(student, teacher, config),
            lambda: _forward_torch(*wide),
            rtol=1e-4,
            atol=(1e-5, 1e-6, 1e-6),
        )
    weights = torch.rand(shape[:2], generator=random, device=device)
    _, alpha, beta = (part.to(torch.float32) for part in _forward_torch(*wide))
    tolerance = TOLERANCES[sizes["student"]]
    return Trial(
        lambda config: (_launch_token_gradient(weights, student, teacher, alpha, beta, config),),
        lambda: (_backward_torch(weights.double(), *wide, alpha.double(), beta.double()),),
        rtol=tolerance,
        atol=tolerance / sizes["c"],
    )


def tunables() -> list[Tunable]:
    """Both kernels, each a ``part``: "forward" and "gradient".

    A problem: that, ``m`` tokens of ``c`` values, dtypes ``student`` and ``teacher``; the key leaves ``m`` out.
    """
    return [
        Tunable(
            name="token_loss",
            module="token_loss",
            on="cuda",
            fields=ROW_FIELDS,
            key=lambda sizes: _sizes_key(sizes)[1],
            space=lambda arch, sizes: _sizes_key(sizes)[0],
            default=lambda arch, n_sms, sizes: _sizes_key(sizes)[0][0],
            works=_works,
            trial=_trial,
        )
    ]


# --- torch operators ---------------------------------------------------------------------------------------


def _compiles(student: Tensor, teacher: Tensor) -> bool:
    """Whether the Triton kernels take these tokens."""
    if backend_for(student) not in ("triton", "interpreter"):
        return False
    known = all(x.dtype in TRITON_DTYPES.values() for x in (student, teacher))
    c, widest = student.shape[2], max(student.dtype, teacher.dtype, key=lambda dtype: dtype.itemsize)
    return known and fits_registers(2 * c, row_config(2 * c, widest))


@torch.library.custom_op("tetra::token_loss", mutates_args=())
def _token_loss_op(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Terms, alpha and beta [A, R] of tokens [A, R, C]."""
    return (_launch_token_loss if _compiles(student, teacher) else _forward_torch)(student, teacher)


@_token_loss_op.register_fake
def _(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _new_terms(student, teacher)


@torch.library.custom_op("tetra::token_loss_backward", mutates_args=())
def _backward_op(weights: Tensor, student: Tensor, teacher: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """The student's gradient, from that of the terms, ``weights`` [A, R]."""
    backward = _launch_token_gradient if _compiles(student, teacher) else _backward_torch
    return backward(weights.contiguous(), student, teacher, alpha, beta)


@_backward_op.register_fake
def _(weights: Tensor, student: Tensor, teacher: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return student.new_empty(student.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, weights: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None]:
    return None if weights is None else _backward_op(weights, *ctx.saved_tensors), None


_token_loss_op.register_autograd(_differentiate, setup_context=_keep)


# --- public ------------------------------------------------------------------------------------------------


def token_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between L2-normalised tokens, a scalar with a gradient for the student.

    Args:
        student: float [..., C]; [A, R, C] of any strides is read in place if values lie side by side.
        teacher: float [..., C], of the same shape; it gets no gradient.
    """
    for name, tokens in (("student", student), ("teacher", teacher)):
        if not tokens.is_floating_point():
            raise TypeError(f"{name}: dtype is {tokens.dtype}, wanted a floating dtype")
    if student.ndim == 0 or student.shape[-1] == 0:
        raise ValueError(f"student: shape is {tuple(student.shape)}, wanted [..., C], C >= 1")
    if teacher.shape != student.shape:
        raise ValueError(f"teacher: shape is {tuple(teacher.shape)}, wanted that of student, {tuple(student.shape)}")
    if teacher.device != student.device:
        raise ValueError(f"teacher: is on {teacher.device}, but student is on {student.device}; move one of them")
    terms, _, _ = _token_loss_op(_as_rows(student), _as_rows(teacher.detach()))
    return terms.mean() / student.shape[-1]


def _as_rows(x: Tensor) -> Tensor:
    """[..., C] as [A, R, C], a view for up to three dimensions."""
    return x.flatten(0, -3) if x.ndim > 3 else x[(None,) * (3 - x.ndim)]
