"""KL divergence between the attention of a teacher and of a student, from their queries and keys, without a map.

Contract
    letters: B images, T tokens, H heads, E head dim, C = H E the width of all heads; teachers have H, E of their own
    attention_distillation(student_q, student_k [B, H, T, E], teacher_q, teacher_k [B, H', T, E'],
                           temperature, reduction)
        -> float32 scalar (float64 if an input is); differentiable in the student's queries and keys, once

    s_ij = 1/H sum_h q_hi . k_hj / sqrt(E)       logits averaged over the heads, the student's; t_ij the teacher's
    p_i  = softmax_j(s_ij / temperature),  r_i = softmax_j(t_ij / temperature)
    KL_i = sum_j r_ij (log r_ij - log p_ij)
    rows:     1 / (B T)   sum KL_i, the mean over rows
    elements: 1 / (B T T) sum KL_i, the mean over all terms, as TeTRA-VPR has it

One product instead of heads: with the heads side by side, [B, T, C], the average is Q K^T / (H sqrt(E)). Views of a
projection [B, T, 3, H, E] are read in place.

Memory: forward saves the inputs, and of its own two numbers a row, the log-sum-exps of s and t: 8 B T bytes. Backward
makes (p - r) again in strips of at most ``STRIP_BYTES``: dL/ds = w (p - r), dQ = dL/ds K, dK = (dL/ds)^T Q. Of the
teacher that keeps queries and keys alive, 2 C values a token. While T < 2 C its averaged map would be smaller, T values
a token; it is not kept, so that memory grows with T and not with T^2.

Numerics: logits, softmaxes and KL in float32 whatever the inputs' dtype (float32 inputs by three TF32 products on
GPUs). A row's KL errs by some 2^-22 max|s, t| / temperature. dL/ds is rounded to bfloat16 before the last two
products if the student is bfloat16, and is float32 if it is float16, which has no room for numbers so small. (The
gradient itself is float16 then: the loss wants to be scaled.) Sums have a fixed order: the same inputs give the same
bits. Inputs that are not finite give a loss that is not.

Errors
    TypeError for dtypes that are not floating, ValueError for shapes that do not fit (student and teacher need the
    same images and tokens), a temperature that is not positive, and an unknown reduction.

The kernels (streaming after FlashAttention-2, arXiv 2307.08691)
    Forward: one block of threads takes 64 queries and walks over blocks of 64 keys. A tile of s and one of t are
    products over C = 768 each, so the online softmax of both, some 30 instructions a logit, is little beside them.
    Rows past the last token read the last token instead, so that no load in the products' loop has a mask.
    Backward: a kernel for tiles of dL/ds, and the library's batched products. Without the strip, a block of threads
    would keep its 64 x 768 sums of dQ to itself: in 96 registers of 512 threads if it keeps all columns, or else
    making the tiles again for every 128 columns, twice (dQ, dK): 26 products of T x T x C in all, where this way it
    is 4. Strips of 16 MiB hold 29 images of 530 tokens in bfloat16; an image of more than 2896 tokens takes several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from tetra.autotune.table import lookup
from tetra.kernels.backend import arch_of, backend_for, on_device_of, tl, triton
from tetra.kernels.interpreted import cast, product
from tetra.kernels.specimen import Specimen
from tetra.kernels.tunable import DTYPES, TRITON_NAMES, Sizes, Trial, Tunable, Work, bucket, dtype_name, seeded

Reduction = Literal["elements", "rows"]
REDUCTIONS = ("elements", "rows")

STRIP_BYTES = 16 << 20  # of dL/dlogits that backward holds at once
_CPU_STRIP_VALUES = 1 << 20  # logits that plain PyTorch holds at once, a few times over
_MIN_ROWS = 64  # of a strip, however long the rows are

LogitGradient = Callable[[slice, slice], Tensor]


# --- reference ---------------------------------------------------------------------------------------------


def attention_distillation_reference(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "elements",
) -> Tensor:
    """The formulas of the contract, with a map of every head."""
    logs = []
    for q, k in ((student_q, student_k), (teacher_q, teacher_k)):
        maps = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        logs.append(torch.log_softmax(maps.mean(1) / temperature, dim=-1))
    terms = logs[1].exp() * (logs[1] - logs[0])
    return terms.mean() if reduction == "elements" else terms.sum(-1).mean()


# --- strips ------------------------------------------------------------------------------------------------


def _strips(b: int, t: int, max_values: int) -> Iterator[tuple[slice, list[slice]]]:
    """Images, and parts of their rows, that cut maps [b, t, t] into strips of some ``max_values`` logits."""
    rows = max(1, min(t, max(_MIN_ROWS, max_values // max(t, 1))))
    images = max(1, max_values // max(t * rows, 1))
    parts = [slice(row, min(row + rows, t)) for row in range(0, t, rows)]
    for image in range(0, b, images):
        yield slice(image, min(image + images, b)), parts


def _student_gradients(logit_gradient: LogitGradient, q: Tensor, k: Tensor, max_values: int) -> tuple[Tensor, Tensor]:
    """dQ and dK [B, T, C], from strips of dL/dlogits [images, rows, T]."""
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    for images, parts in _strips(q.shape[0], q.shape[1], max_values):
        total = None
        for rows in parts:
            gradient = logit_gradient(images, rows)
            dq[images, rows] = torch.bmm(gradient, k[images].to(gradient.dtype))
            part = torch.bmm(gradient.transpose(1, 2), q[images, rows].to(gradient.dtype))
            total = part if total is None else total.to(_wide(q)) + part
        if total is not None:
            dk[images] = total
    return dq, dk


# --- CPU ---------------------------------------------------------------------------------------------------


def _wide(*tensors: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 if a tensor is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _gradient_dtype(q: Tensor) -> torch.dtype:
    """That of dL/dlogits; float16 has no room for numbers so small."""
    return torch.bfloat16 if q.dtype == torch.bfloat16 else _wide(q)


def _new_rows(student_q: Tensor, teacher_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL and the log-sum-exps of student and teacher, [B, T] each, to be filled."""
    dtype = _wide(student_q, teacher_q)
    kl, student_lse, teacher_lse = (student_q.new_empty(student_q.shape[:2], dtype=dtype) for _ in range(3))
    return kl, student_lse, teacher_lse


def _log_softmax_torch(
    q: Tensor, k: Tensor, factor: float, images: slice, rows: slice, lse: Tensor, known: bool
) -> Tensor:
    """Of a strip's logits, in the dtype of ``lse`` [B, T], which is filled unless it is ``known``."""
    logits = torch.bmm(q[images, rows].to(lse.dtype) * factor, k[images].to(lse.dtype).transpose(1, 2))
    if not known:
        lse[images, rows] = logits.logsumexp(-1)
    return logits.sub_(lse[images, rows, None])


def _forward_torch(
    student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor, factors: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    kl, student_lse, teacher_lse = _new_rows(student_q, teacher_q)
    for images, parts in _strips(kl.shape[0], kl.shape[1], _CPU_STRIP_VALUES):
        for rows in parts:
            s = _log_softmax_torch(student_q, student_k, factors[0], images, rows, student_lse, known=False)
            t = _log_softmax_torch(teacher_q, teacher_k, factors[1], images, rows, teacher_lse, known=False)
            difference = s.neg_().add_(t)
            kl[images, rows] = t.exp_().mul_(difference).sum(-1)
    return kl, student_lse, teacher_lse


def _backward_torch(
    weights: Tensor,
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    lse: tuple[Tensor, Tensor],
    factors: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    def logit_gradient(images: slice, rows: slice) -> Tensor:
        p = _log_softmax_torch(q, k, factors[0], images, rows, lse[0], known=True).exp_()
        r = _log_softmax_torch(teacher_q, teacher_k, factors[1], images, rows, lse[1], known=True).exp_()
        return p.sub_(r).mul_(weights[images, rows, None] * factors[0]).to(_gradient_dtype(q))

    return _student_gradients(logit_gradient, q, k, _CPU_STRIP_VALUES)


# --- Triton ------------------------------------------------------------------------------------------------

# Queries and keys of a tile, values of C a step, warps, pipeline stages; for 16-bit inputs.
CONFIG_FIELDS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
CONFIGS = (
    (64, 64, 64, 4, 3),
    (64, 64, 64, 4, 2),
    (128, 64, 64, 8, 3),
)
# More rows for the tuners. Which of them spill depends on the chip.
MORE_CONFIGS = (
    (64, 64, 32, 4, 4),
    (64, 64, 128, 4, 2),
    (64, 128, 64, 8, 3),
    (128, 64, 32, 8, 4),
    (128, 128, 32, 8, 3),
    (128, 128, 64, 8, 2),
)
# For float32 on either side: a product of it is three, of operands that are split in registers, which hold short steps.
FLOAT32_CONFIG = (64, 64, 16, 4, 3)
# What the compiler is told: an SM holds two blocks of four warps. Left alone it squeezes a tile into 168 registers, for
# three blocks, and spills some.
MAX_REGISTERS = 224
_TRITON_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_LOG2_E = math.log2(math.e)


def shape_key(part: str, b: int, t: int, student_width: int, teacher_width: int, student: str, teacher: str) -> str:
    """Key of a shape among the tuned results, of the "forward" kernel or of that of the logits' "gradient"; the number
    of images is rounded up to a power of two, dtypes are the last two."""
    return f"{part}_b{bucket(b)}_t{t}_c{student_width}_c{teacher_width}_{student}_{teacher}"


@lru_cache(maxsize=4096)
def _key(
    part: str, b: int, t: int, student_width: int, teacher_width: int, student: torch.dtype, teacher: torch.dtype
) -> str:
    return shape_key(part, b, t, student_width, teacher_width, dtype_name(student), dtype_name(teacher))


_ROWS = CONFIGS + MORE_CONFIGS


def cost(
    b: int, t: int, student_width: int, teacher_width: int, n_bytes: int = 2, *, backward: bool = False
) -> tuple[int, int]:
    """(float operations, bytes moved at least) of one layer: its loss, or with ``backward`` the gradients.

    A multiply-add counts as two operations, a logit of either side as 8 for softmax and KL. Inputs move once;
    backward writes dQ and dK, and moves dL/dlogits three times: out of the kernel and into two products.
    """
    inputs = 2 * b * t * (student_width + teacher_width) * n_bytes
    operations = b * t * t * (2 * (student_width + teacher_width) + 16)
    if not backward:
        return operations, inputs + 12 * b * t
    gradients = (2 * b * t * student_width + 3 * b * t * t) * n_bytes
    return operations + 4 * b * t * t * student_width, inputs + gradients + 12 * b * t


@triton.jit
def _logit_tile(
    q_ptr,  # of the image
    k_ptr,
    queries,  # [BLOCK_M], each a token that exists
    keys,  # [BLOCK_N]
    stride_t,
    factor,
    width,  # not a constant, or the compiler would write all steps out, and spill
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,  # width % BLOCK_K == 0
):
    """float32 [BLOCK_M, BLOCK_N]: q k^T * factor."""
    columns = tl.arange(0, BLOCK_K)
    q_tile = q_ptr + queries[:, None] * stride_t + columns[None, :]
    k_tile = k_ptr + keys[None, :] * stride_t + columns[:, None]
    sums = tl.zeros((queries.shape[0], keys.shape[0]), tl.float32)
    for start in range(0, width, BLOCK_K):
        if WHOLE:
            q = tl.load(q_tile + start)
            k = tl.load(k_tile + start)
        else:
            q = tl.load(q_tile + start, mask=columns[None, :] < width - start, other=0.0)
            k = tl.load(k_tile + start, mask=columns[:, None] < width - start, other=0.0)
        if q.dtype == tl.float32:
            sums = tl.dot(q, k, sums, input_precision="tf32x3")
        else:
            sums = product(q, k, sums)
    return sums * factor


@triton.jit
def _attention_distillation_kernel(
    student_q_ptr,  # 16-bit or 32-bit float [B, T, student_width], rows contiguous
    student_k_ptr,  # the same type and strides
    teacher_q_ptr,  # [B, T, teacher_width]
    teacher_k_ptr,
    kl_ptr,  # float32 [B, T], contiguous
    student_lse_ptr,  # the same
    teacher_lse_ptr,
    T,
    student_factor,  # what makes logits of products: 1 / (H sqrt(E) temperature) * log2(e)
    teacher_factor,
    student_width,
    teacher_width,
    student_stride_b,  # in elements
    student_stride_t,
    teacher_stride_b,
    teacher_stride_t,
    STUDENT_WHOLE: tl.constexpr,
    TEACHER_WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n_tiles = tl.cdiv(T, BLOCK_M)
    image = (tl.program_id(0) // n_tiles).to(tl.int64)
    student_q_ptr += image * student_stride_b
    student_k_ptr += image * student_stride_b
    teacher_q_ptr += image * teacher_stride_b
    teacher_k_ptr += image * teacher_stride_b
    rows = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = tl.minimum(rows, T - 1)
    student_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    teacher_max = student_max
    student_sum = tl.zeros((BLOCK_M,), tl.float32)
    teacher_sum = student_sum
    weighted = student_sum  # sum of 2^(t - teacher_max) (t - s)
    for first in range(0, T, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        keys = tl.minimum(columns, T - 1)
        s = _logit_tile(
            student_q_ptr, student_k_ptr, queries, keys,
            student_stride_t, student_factor, student_width, BLOCK_K, STUDENT_WHOLE,
        )  # fmt: skip
        t = _logit_tile(
            teacher_q_ptr, teacher_k_ptr, queries, keys,
            teacher_stride_t, teacher_factor, teacher_width, BLOCK_K, TEACHER_WHOLE,
        )  # fmt: skip
        exists = columns[None, :] < T
        new_max = tl.maximum(teacher_max, tl.max(tl.where(exists, t, -float("inf")), 1))
        fade = tl.exp2(teacher_max - new_max)
        weights = tl.where(exists, tl.exp2(t - new_max[:, None]), 0.0)
        teacher_sum = teacher_sum * fade + tl.sum(weights, 1)
        weighted = weighted * fade + tl.sum(weights * (t - s), 1)
        teacher_max = new_max
        new_max = tl.maximum(student_max, tl.max(tl.where(exists, s, -float("inf")), 1))
        weights = tl.where(exists, tl.exp2(s - new_max[:, None]), 0.0)
        student_sum = student_sum * tl.exp2(student_max - new_max) + tl.sum(weights, 1)
        student_max = new_max
    student_lse = student_max + tl.log2(student_sum)
    teacher_lse = teacher_max + tl.log2(teacher_sum)
    kl = weighted / teacher_sum - (teacher_lse - student_lse)
    at = image * T + rows
    ln_2 = 0.6931471805599453
    tl.store(kl_ptr + at, kl * ln_2, mask=rows < T)
    tl.store(student_lse_ptr + at, student_lse * ln_2, mask=rows < T)
    tl.store(teacher_lse_ptr + at, teacher_lse * ln_2, mask=rows < T)


@triton.jit
def _logit_gradient_kernel(
    student_q_ptr,  # as above
    student_k_ptr,
    teacher_q_ptr,
    teacher_k_ptr,
    weight_ptr,  # float32 [B, T], contiguous: dL/dKL
    student_lse_ptr,  # as above
    teacher_lse_ptr,
    gradient_ptr,  # bfloat16 or float32 [B, R, STRIDE]: weight (p - r) * scale of rows FIRST to FIRST + R
    T,
    first_row,  # FIRST
    n_rows,  # R
    stride,  # STRIDE >= T
    scale,
    student_factor,
    teacher_factor,
    student_width,
    teacher_width,
    student_stride_b,
    student_stride_t,
    teacher_stride_b,
    teacher_stride_t,
    STUDENT_WHOLE: tl.constexpr,
    TEACHER_WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n_row_tiles = tl.cdiv(n_rows, BLOCK_M)
    n_key_tiles = tl.cdiv(T, BLOCK_N)
    image = (tl.program_id(0) // (n_key_tiles * n_row_tiles)).to(tl.int64)
    rows = tl.program_id(0) // n_key_tiles % n_row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % n_key_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    queries = tl.minimum(first_row + rows, T - 1)
    keys = tl.minimum(columns, T - 1)
    s = _logit_tile(
        student_q_ptr + image * student_stride_b, student_k_ptr + image * student_stride_b,
        queries, keys, student_stride_t, student_factor, student_width, BLOCK_K, STUDENT_WHOLE,
    )  # fmt: skip
    t = _logit_tile(
        teacher_q_ptr + image * teacher_stride_b, teacher_k_ptr + image * teacher_stride_b,
        queries, keys, teacher_stride_t, teacher_factor, teacher_width, BLOCK_K, TEACHER_WHOLE,
    )  # fmt: skip
    at = image * T + queries
    log2_e = 1.4426950408889634
    p = tl.exp2(s - (tl.load(student_lse_ptr + at) * log2_e)[:, None])
    r = tl.exp2(t - (tl.load(teacher_lse_ptr + at) * log2_e)[:, None])
    gradient = (p - r) * (tl.load(weight_ptr + at) * scale)[:, None]
    tile = gradient_ptr + (image * n_rows + rows[:, None]) * stride + columns[None, :]
    inside = (rows[:, None] < n_rows) & (columns[None, :] < T)
    tl.store(tile, cast(gradient, gradient_ptr.dtype.element_ty), mask=inside)


def _arguments(
    config: tuple[int, ...], student_width: int, teacher_width: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constant arguments of both kernels, and options of the compiler."""
    fields: dict[str, Any] = dict(zip(CONFIG_FIELDS, config, strict=True))
    constants: dict[str, Any] = {name: fields[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    constants["STUDENT_WHOLE"] = student_width % fields["BLOCK_K"] == 0
    constants["TEACHER_WHOLE"] = teacher_width % fields["BLOCK_K"] == 0
    # Without fused multiply-adds a logit is the same number wherever it is used, so that equal ones differ by 0.
    options = {name: fields[name] for name in ("num_warps", "num_stages")}
    return constants, {**options, "enable_fp_fusion": False, "maxnreg": MAX_REGISTERS}


def _launch_arguments(
    part: str, student_q: Tensor, teacher_q: Tensor, config: tuple[int, ...] | None = None
) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """``_arguments`` for tensors, and their widths and strides."""
    (b, t, student_width), teacher_width = student_q.shape, teacher_q.shape[2]
    if torch.float32 in (student_q.dtype, teacher_q.dtype):
        config = FLOAT32_CONFIG
    if config is None:
        key = _key(part, b, t, student_width, teacher_width, student_q.dtype, teacher_q.dtype)
        config = lookup("attention_distillation", arch_of(student_q.device), key, _ROWS, device=student_q.device)
    sizes = [student_width, teacher_width, *student_q.stride()[:2], *teacher_q.stride()[:2]]
    return *_arguments(config, student_width, teacher_width), sizes


def _alike(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with the same strides and neighbouring values side by side, copied if need be."""
    if q.stride() == k.stride() and q.stride(2) == 1 and q.shape[1] * q.stride(1) < 2**31:
        return q, k
    return q.contiguous(), k.contiguous()


def _launch_attention_distillation(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    factors: tuple[float, float],
    config: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _new_rows(student_q, teacher_q)
    b, t = student_q.shape[:2]
    if b * t:
        student_q, student_k = _alike(student_q, student_k)
        teacher_q, teacher_k = _alike(teacher_q, teacher_k)
        constants, options, sizes = _launch_arguments("forward", student_q, teacher_q, config)
        with on_device_of(student_q):
            _attention_distillation_kernel[(b * triton.cdiv(t, constants["BLOCK_M"]),)](
                student_q, student_k, teacher_q, teacher_k, *rows, t, *(f * _LOG2_E for f in factors), *sizes,
                **constants, **options,
            )  # fmt: skip
    return rows


def _logit_gradients(
    weights: Tensor,
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    lse: tuple[Tensor, Tensor],
    factors: tuple[float, float],
    config: tuple[int, ...] | None = None,
) -> LogitGradient:
    """What makes strips of dL/dlogits, by a launch each."""
    constants, options, sizes = _launch_arguments("gradient", q, teacher_q, config)
    dtype, t = _gradient_dtype(q), q.shape[1]
    stride = triton.cdiv(t, 64) * 64  # the library's fast products want aligned rows

    def logit_gradient(images: slice, rows: slice) -> Tensor:
        n, n_rows = images.stop - images.start, rows.stop - rows.start
        gradient = torch.empty((n, n_rows, stride), dtype=dtype, device=q.device)
        tiles = n * triton.cdiv(n_rows, constants["BLOCK_M"]) * triton.cdiv(t, constants["BLOCK_N"])
        with on_device_of(q):
            _logit_gradient_kernel[(tiles,)](
                q[images], k[images], teacher_q[images], teacher_k[images], weights[images], *(x[images] for x in lse),
                gradient, t, rows.start, n_rows, stride, factors[0], *(f * _LOG2_E for f in factors), *sizes,
                **constants, **options,
            )  # fmt: skip
        return gradient[:, :, :t]

    return logit_gradient


def _launch_backward(
    weights: Tensor, q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor,
    lse: tuple[Tensor, Tensor], factors: tuple[float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (q, k), (teacher_q, teacher_k) = _alike(q, k), _alike(teacher_q, teacher_k)
    logit_gradient = _logit_gradients(weights, q, k, teacher_q, teacher_k, lse, factors)
    return _student_gradients(logit_gradient, q, k, STRIP_BYTES // _gradient_dtype(q).itemsize)


def specimens(arch: int) -> list[Specimen]:
    """Teachers as wide as ViT-B with students as wide and half as wide, in every dtype; a width with a rest."""
    return [
        _specimen(gradient, config, student_width, teacher_width, dtype)
        for gradient in (False, True)
        for config, student_width, teacher_width, dtype in (
            *((config, 768, 768, "bf16") for config in CONFIGS),
            (CONFIGS[0], 576, 768, "bf16"),
            (CONFIGS[0], 768, 768, "fp16"),
            (FLOAT32_CONFIG, 768, 768, "fp32"),
            (CONFIGS[0], 200, 1024, "bf16"),
        )
    ]


def _specimen(gradient: bool, config: tuple[int, ...], student_width: int, teacher_width: int, dtype: str) -> Specimen:
    constants, options = _arguments(config, student_width, teacher_width)
    inputs = {f"{side}_{x}_ptr": f"*{dtype}" for side in ("student", "teacher") for x in "qk"}
    lse = {"student_lse_ptr": "*fp32", "teacher_lse_ptr": "*fp32"}
    outputs = {"kl_ptr": "*fp32"}
    if gradient:
        outputs = {"weight_ptr": "*fp32", "gradient_ptr": f"*{'fp32' if dtype == 'fp16' else dtype}"}
        outputs |= {"first_row": "i32", "n_rows": "i32", "stride": "i32", "scale": "fp32"}
    sizes = {f"{side}_{x}": "i32" for side in ("student", "teacher") for x in ("width", "stride_b", "stride_t")}
    factors = {"student_factor": "fp32", "teacher_factor": "fp32"}
    ragged = ("student_width", "student_stride_b", "student_stride_t") if student_width % 16 else ()
    return Specimen(
        name="attention_distillation",
        config={
            "pass": "logit gradient" if gradient else "forward",
            "student_width": student_width,
            "teacher_width": teacher_width,
            "dtype": dtype,
            **dict(zip(CONFIG_FIELDS, config, strict=True)),
        },
        kernel=_logit_gradient_kernel if gradient else _attention_distillation_kernel,
        signature={**inputs, **lse, **outputs, "T": "i32", **factors, **sizes},
        constants=constants,
        options=options,
        unaligned=("T", *factors, *(("first_row", "n_rows", "scale") if gradient else ()), *ragged),
    )


# --- tuning ------------------------------------------------------------------------------------------------

_SHAPE = ("b", "t", "student_width", "teacher_width")


def _works(arch: int, n_sms: int, sizes: Sizes, config: tuple[int, ...]) -> list[Work]:
    b, t, student_width, teacher_width = (sizes[name] for name in _SHAPE)
    gradient, itemsize = sizes["part"] == "gradient", DTYPES[sizes["dtype"]].itemsize
    block_m, block_n, block_k, *_ = config
    row_tiles, key_tiles = -(-t // block_m), -(-t // block_n)
    operations, n_bytes = cost(b, t, student_width, teacher_width, itemsize)
    steps = -(-student_width // block_k) + -(-teacher_width // block_k)
    # The loops over the widths are the main one; there are two, of the same code.
    return [
        Work(
            _specimen(gradient, config, student_width, teacher_width, TRITON_NAMES[sizes["dtype"]]),
            blocks=b * row_tiles * (key_tiles if gradient else 1),
            iterations=steps * (1 if gradient else key_tiles),
            macs=block_m * block_n * block_k,
            operations=operations,
            n_bytes=n_bytes + (itemsize * b * t * t if gradient else 0),
            dtype="fp16",
        )
    ]


def _trial(sizes: Sizes, device: torch.device) -> Trial:
    b, t, student_width, teacher_width = (sizes[name] for name in _SHAPE)
    random, dtype = seeded(device), DTYPES[sizes["dtype"]]
    q, k, teacher_q, teacher_k = (
        torch.randn((b, t, width), generator=random, device=device).to(dtype)
        for width in (student_width, student_width, teacher_width, teacher_width)
    )
    weights = torch.rand((b, t), generator=random, device=device)
    # So that logits are of the size that one head's are, over four.
    factors = (student_width**-0.5 / 4, teacher_width**-0.5 / 4)
    wide = [x.to(torch.float32) for x in (q, k, teacher_q, teacher_k)]
    exact = _forward_torch(wide[0], wide[1], wide[2], wide[3], factors)
    if sizes["part"] == "forward":

        def forward(config: tuple[int, ...]) -> tuple[Tensor, ...]:
            return _launch_attention_distillation(q, k, teacher_q, teacher_k, factors, config)

        return Trial(forward, lambda: exact, rtol=1e-3, atol=1e-3)
    everything = slice(0, b), slice(0, t)

    def gradient(config: tuple[int, ...]) -> tuple[Tensor, ...]:
        make = _logit_gradients(weights, q, k, teacher_q, teacher_k, exact[1:], factors, config)
        return (make(*everything),)

    def expected() -> tuple[Tensor, ...]:
        p, r = (
            _log_softmax_torch(wide[i], wide[i + 1], factors[i // 2], *everything, exact[1 + i // 2], known=True).exp_()
            for i in (0, 2)
        )
        return (p.sub_(r).mul_(weights[:, :, None] * factors[0]),)

    return Trial(gradient, expected, rtol=0.02, atol=0.02 * factors[0] / t)


def _key_of(sizes: Sizes) -> str:
    b, t, student_width, teacher_width = (sizes[name] for name in _SHAPE)
    return shape_key(sizes["part"], b, t, student_width, teacher_width, sizes["dtype"], sizes["dtype"])


def tunables() -> list[Tunable]:
    """Both kernels, each a ``part``: "forward" and "gradient", of all strips in one launch.

    A problem: that, ``b, t, student_width, teacher_width`` and a 16-bit ``dtype``.
    """
    return [
        Tunable(
            name="attention_distillation",
            module="attention_distillation",
            on="cuda",
            fields=CONFIG_FIELDS,
            key=_key_of,
            space=lambda arch, sizes: _ROWS,
            default=lambda arch, n_sms, sizes: CONFIGS[0],
            works=_works,
            trial=_trial,
        )
    ]


# --- torch operators ---------------------------------------------------------------------------------------


def _compiles(*tensors: Tensor) -> bool:
    """Whether the Triton kernels take these tensors."""
    return backend_for(tensors[0]) in ("triton", "interpreter") and all(x.dtype in _TRITON_DTYPES for x in tensors)


@torch.library.custom_op("tetra::attention_distillation", mutates_args=())
def _attention_distillation_op(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_factor: float,
    teacher_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL [B, T] of [B, T, C] each, and for backward the log-sum-exps of student and teacher, [B, T] each."""
    forward = _launch_attention_distillation if _compiles(student_q, teacher_q) else _forward_torch
    with torch.autocast(student_q.device.type, enabled=False):
        return forward(student_q, student_k, teacher_q, teacher_k, (student_factor, teacher_factor))


@_attention_distillation_op.register_fake
def _(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_factor: float,
    teacher_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_rows(student_q, teacher_q)


@torch.library.custom_op("tetra::attention_distillation_backward", mutates_args=())
def _backward_op(
    weights: Tensor,
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    student_factor: float,
    teacher_factor: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the student's queries and keys, [B, T, C] each; ``weights`` [B, T] are those of the KL."""
    backward = _launch_backward if _compiles(student_q, teacher_q) else _backward_torch
    lse, factors = (student_lse, teacher_lse), (student_factor, teacher_factor)
    with torch.autocast(student_q.device.type, enabled=False):
        return backward(weights.contiguous(), student_q, student_k, teacher_q, teacher_k, lse, factors)


@_backward_op.register_fake
def _(
    weights: Tensor,
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    student_factor: float,
    teacher_factor: float,
) -> tuple[Tensor, Tensor]:
    return student_q.new_empty(student_q.shape), student_k.new_empty(student_k.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.student_factor, ctx.teacher_factor = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, weights: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if weights is None:
        return (None,) * 6
    dq, dk = _backward_op(weights, *ctx.saved_tensors, ctx.student_factor, ctx.teacher_factor)
    return dq, dk, None, None, None, None


_attention_distillation_op.register_autograd(_differentiate, setup_context=_keep)


# --- public ------------------------------------------------------------------------------------------------


def attention_distillation(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "elements",
) -> Tensor:
    """KL(teacher || student) of head-averaged attention, a scalar with gradients for the student.

    Args:
        student_q, student_k: float [B, H, T, E]; views of a projection [B, T, 3, H, E] are read in place.
        teacher_q, teacher_k: float [B, H', T, E'], with heads of their own; they get no gradient.
        temperature: what logits are divided by before the softmax, > 0.
        reduction: "rows" for the mean over rows, "elements" for the mean over all B T T terms, T times less.
    """
    for side, q, k in (("student", student_q, student_k), ("teacher", teacher_q, teacher_k)):
        if not q.is_floating_point() or q.dtype != k.dtype:
            raise TypeError(f"{side}_q, {side}_k: dtypes are {q.dtype} and {k.dtype}, wanted one floating dtype")
        if q.ndim != 4 or q.shape != k.shape or q.shape[1] * q.shape[3] == 0:
            shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
            raise ValueError(f"{side}_q, {side}_k: shapes are {shapes}, wanted [B, H, T, E] twice")
    for name, tensor in (("student_k", student_k), ("teacher_q", teacher_q), ("teacher_k", teacher_k)):
        if tensor.device != student_q.device:
            raise ValueError(f"{name}: is on {tensor.device}, but student_q is on {student_q.device}; move one of them")
    (b, _, t, _), (teacher_b, _, teacher_t, _) = student_q.shape, teacher_q.shape
    if (b, t) != (teacher_b, teacher_t):
        raise ValueError(
            f"teacher_q: holds {teacher_b} images of {teacher_t} tokens, but student_q {b} of {t}; wanted the same"
        )
    if not temperature > 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature: is {temperature}, wanted a finite number > 0")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: is {reduction!r}, wanted one of {', '.join(REDUCTIONS)}")
    sides = (student_q, student_k, teacher_q.detach(), teacher_k.detach())
    factors = (1.0 / (q.shape[1] * q.shape[3] ** 0.5 * temperature) for q in (student_q, teacher_q))
    # Flattening gives a view where the heads lie side by side.
    kl = _attention_distillation_op(*(x.transpose(1, 2).flatten(2) for x in sides), *factors)[0].mean()
    return kl / t if reduction == "elements" else kl
