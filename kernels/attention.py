"""Attention for inference, written the way that is fastest on the device at hand.

Contract
    letters: B images, T tokens, H heads, D head dim
    attention(q, k, v: float [B, H, T, D]) -> [B, H, T, D] = softmax(q k^T / sqrt(D)) v, in the inputs' dtype
    attention_qkv(qkv float16|bfloat16|float32 [B, T, 3 H D], n_heads, prescaled) -> [B, T, H D] in qkv.dtype
        the same, on the output of one projection whose columns are (q, k, v) x (head) x (dim), read in place;
        with ``prescaled``, q carries ``query_scale(D)`` = log2(e) / sqrt(D), so that the softmax is 2^(q k^T),
        normalised

Numerics
    The compiled kernel: products of 16-bit inputs accumulate in float32; the running maximum and the rescaling are
    float32; weights 2^(logit - maximum) are rounded to the input dtype, and their sum, in float32, is of the rounded
    weights, so that they add up to one whatever the rounding. The result is rounded once. Against float64 on the
    same inputs an output errs by at most 2 u max|v|, u = 2^-11 (float16) or 2^-8 (bfloat16): one u from the weights,
    one from the result. No finite input overflows.
    On CPUs: float16 and float32 as scaled_dot_product_attention has them; in bfloat16 the logits and the weights are
    rounded to bfloat16 between the products, an error of up to 2^-8 max|logit| in a weight's exponent.

Formulations
    ``fused`` is PyTorch's scaled_dot_product_attention, ``plain`` writes product, softmax, product. On CPUs the fused
    one is the slower in bfloat16: at 1 x 12 x 530 x 64 the plain one takes half its time, because both products run on
    the machine's bfloat16 units. In float32, and where a gradient is wanted, the fused one runs.
    On GPUs ``attention_qkv`` in float16 and bfloat16 with D <= 128 is the compiled kernel. In float32, or with wider
    heads, it is scaled_dot_product_attention: tensor cores would cut float32 to the 11 bits of TF32, or take three
    products for one, and no model needs it.

The kernel (source: FlashAttention-2, arXiv 2307.08691, on tensors that were not rearranged)
    One block of threads takes 64 queries of one head and walks over blocks of 64 keys. What keeps the loop short:
    - No masks: keys after the last whole block are a step of their own, of 16, 32 or 64 keys (530 = 8 x 64 + 18).
      With the mask in the loop, even behind a branch, it is 75 instructions longer.
    - The sum of the weights is a product with a column of ones, 4 tensor-core instructions in place of 32 additions
      and 4 shuffles.
    - 2^x in place of e^x, with log2(e) in the queries; without ``prescaled`` the loop is 32 instructions longer.
    - Strides are constants, so that addresses are one base and offsets.
    - A head dim that is no power of two is cut in two, 96 = 64 + 32: 394 instructions, against 581, with spills, where
      it is padded to 128. 128 itself is 64 + 64, for which the compiler keeps a warp's rows together.
    On sm_80 at D = 64 the loop has 324 instructions, 68 of them tensor-core, and the kernel 161 registers and 40 KiB,
    so that an SM holds 3 blocks. What is left: 106 float (32 each to subtract the maximum, to rescale and to find it),
    50 exponentials and roundings, 36 loads of operands from shared memory, which every warp does for itself, and 42
    for addresses. Blocks of 128 queries load operands half as often, but fill the last block of 530 tokens worse.

int8 queries and keys
    Tried and not shipped, because the loop gets no shorter (sm_80, D = 64, same tiles): 324 instructions in float16;
    433 with a scale a query and a key; 333 with a scale a query and a scale for each block of 64 keys, where the
    conversion to float is free (accumulators start at 1.5 * 2^23) and the scale is in the subtraction of the maximum.
    Tensor-core instructions fall from 68 to 52, but 32 registers have to be set for every block, registers rise to
    183, which leaves 2 blocks an SM, and sm_90 goes from 267 to 325. Besides, a scale of 64 keys can't be found in
    the projection's epilogue, whose tiles cross images: that is one more launch, and about 4 instructions a value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tetra.autotune.table import lookup
from tetra.kernels import native
from tetra.kernels.backend import arch_of, backend_for, on_device_of, tl, triton
from tetra.kernels.interpreted import cast, product
from tetra.kernels.specimen import Specimen
from tetra.kernels.tunable import (
    DTYPES,
    TOLERANCES,
    TRITON_NAMES,
    Sizes,
    Trial,
    Tunable,
    Work,
    bucket,
    dtype_name,
    seeded,
)

Formulation = Literal["fused", "plain"]

QKV_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_MAX_LOGITS = 1 << 25  # 64 MiB of bfloat16 logits; beyond it the plain form runs image by image
_forced: ContextVar[Formulation | None] = ContextVar("forced attention formulation", default=None)


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, by definition."""
    return torch.softmax((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5, dim=-1) @ v


@contextmanager
def force_formulation(formulation: Formulation) -> Iterator[None]:
    """Within this context ``attention`` uses ``formulation`` whatever the device; for comparisons.

    ``plain`` gives no gradients.
    """
    token = _forced.set(formulation)
    try:
        yield
    finally:
        _forced.reset(token)


def _choose(q: Tensor, k: Tensor, v: Tensor) -> Formulation:
    forced = None if torch.compiler.is_compiling() else _forced.get()  # Dynamo can't read context variables
    if forced is not None:
        return forced
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return "plain" if q.dtype == torch.bfloat16 and q.device.type == "cpu" and not needs_grad else "fused"


def _attention_plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Without gradients: the softmax overwrites the logits, which are the largest tensor by far."""
    logits = (q * scale) @ k.transpose(-2, -1)
    return torch.softmax(logits, dim=-1, out=logits) @ v


def _attention_torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if _choose(q, k, v) == "fused":
        return scaled_dot_product_attention(q, k, v, scale=scale)
    if len(q) > 1 and len(q) * q.shape[1] * q.shape[2] * k.shape[2] > _MAX_LOGITS:
        images = zip(q.split(1), k.split(1), v.split(1), strict=True)
        return torch.cat([_attention_plain(*image, scale) for image in images])
    return _attention_plain(q, k, v, scale)


def _attention_qkv_torch(qkv: Tensor, n_heads: int, prescaled: bool) -> Tensor:
    b, t, width = qkv.shape
    head_dim = width // (3 * n_heads)
    q, k, v = qkv.view(b, t, 3, n_heads, head_dim).permute(2, 0, 3, 1, 4)
    with torch.autocast(qkv.device.type, enabled=False):  # which would change the result's dtype
        # 2^x = e^(x ln 2)
        out = _attention_torch(q, k, v, math.log(2.0) if prescaled else head_dim**-0.5)
    return out.transpose(1, 2).reshape(b, t, width // 3)


# --- Triton ------------------------------------------------------------------------------------------------

# Queries and keys of a block, warps, pipeline stages.
CONFIG_FIELDS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
CONFIGS = (
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (128, 64, 4, 2),
)
# More rows for the tuners. Which of them spill depends on the chip and the head dim.
MORE_CONFIGS = (
    (64, 64, 4, 4),
    (64, 32, 4, 3),
    (64, 32, 4, 2),
    (64, 128, 4, 2),
    (32, 64, 2, 3),
    (128, 32, 4, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
)
MAX_HEAD_DIM = 128


def config_for(arch: int, head_dim: int) -> tuple[int, ...]:
    """The row of ``CONFIGS`` for compute capability ``arch`` when no tuning result says otherwise.

    Three stages load one block of keys while another is worked on; with two, a block waits for its own load, and
    only other blocks of threads hide that. They take 40 KiB at D = 64: three blocks an SM, two on chips with 100 KiB.
    Wide heads take two stages, for three would leave room for one block an SM there. sm_100's tensor cores take 128
    rows at a time.
    """
    if arch == 100:
        return CONFIGS[2]
    return CONFIGS[0] if head_dim <= 64 else CONFIGS[1]


def shape_key(b: int, t: int, n_heads: int, head_dim: int, dtype: str, prescaled: bool) -> str:
    """Key of a shape among the tuned results; the number of maps is rounded up to a power of two."""
    return f"maps{bucket(b * n_heads)}_t{t}_d{head_dim}_{dtype}" + ("_prescaled" if prescaled else "")


@lru_cache(maxsize=4096)
def _rows_and_key(
    arch: int, b: int, t: int, n_heads: int, head_dim: int, dtype: torch.dtype, prescaled: bool
) -> tuple[tuple[tuple[int, ...], ...], str]:
    """What a launch looks up: rows that may run, the default first, and the key."""
    key = shape_key(b, t, n_heads, head_dim, dtype_name(dtype), prescaled)
    return (config_for(arch, head_dim), *CONFIGS, *MORE_CONFIGS), key


def cost(b: int, t: int, n_heads: int, head_dim: int, n_bytes: int = 2) -> tuple[int, int]:
    """(float operations, bytes moved at least) of ``attention_qkv`` on [b, t, 3 * n_heads * head_dim].

    Two products, a multiply-add counting as two operations, and 4 operations a weight; q, k, v and the result
    move once (keys and values are read again by every block of queries, but from the L2 cache).
    """
    return b * n_heads * t * t * (4 * head_dim + 4), 4 * b * t * n_heads * head_dim * n_bytes


@triton.jit
def _load_tile(
    tile_ptr,  # of the first row, at the head's first dim
    n_rows,  # that there are
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,  # dims FIRST to FIRST + WIDTH, of which D exist
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    STRIDE_T: tl.constexpr,
    WHOLE: tl.constexpr,  # n_rows >= BLOCK
):
    rows = tl.arange(0, BLOCK)[:, None]
    columns = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = tile_ptr + rows * STRIDE_T + columns
    if WHOLE and FIRST + WIDTH <= D:
        tile = tl.load(pointers)
    elif WHOLE:
        tile = tl.load(pointers, mask=columns < D, other=0.0)
    elif FIRST + WIDTH <= D:
        tile = tl.load(pointers, mask=rows < n_rows, other=0.0)
    else:
        tile = tl.load(pointers, mask=(rows < n_rows) & (columns < D), other=0.0)
    return tile


@triton.jit
def _attend(
    q_low,  # [BLOCK_M, LOW]
    q_high,  # [BLOCK_M, HIGH]
    keys_ptr,  # of the first key
    n_keys,
    factor,
    maximum,  # float32 [BLOCK_M], of the logits so far
    total,  # float32 [BLOCK_M, 8 or 1], of the weights so far
    low,  # float32 [BLOCK_M, LOW], weighted sum of values so far
    high,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    STRIDE_T: tl.constexpr,
    WIDTH: tl.constexpr,
    PRESCALED: tl.constexpr,
    SUM_BY_PRODUCT: tl.constexpr,
):
    """One step of the online softmax, over ``BLOCK`` keys."""
    k_low = _load_tile(keys_ptr, n_keys, BLOCK, 0, LOW, D, STRIDE_T, WHOLE)
    v_low = _load_tile(keys_ptr + WIDTH, n_keys, BLOCK, 0, LOW, D, STRIDE_T, WHOLE)
    logits = product(q_low, k_low.T, None)
    if HIGH:
        k_high = _load_tile(keys_ptr, n_keys, BLOCK, LOW, HIGH, D, STRIDE_T, WHOLE)
        v_high = _load_tile(keys_ptr + WIDTH, n_keys, BLOCK, LOW, HIGH, D, STRIDE_T, WHOLE)
        logits = product(q_high, k_high.T, logits)
    if not PRESCALED:
        logits *= factor
    if not WHOLE:
        logits = tl.where(tl.arange(0, BLOCK)[None, :] < n_keys, logits, -float("inf"))
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    weights = tl.exp2(logits - new_maximum[:, None])
    fade = tl.exp2(maximum - new_maximum)[:, None]
    rounded = cast(weights, v_low.dtype)
    if SUM_BY_PRODUCT:
        ones = cast(tl.full((BLOCK, 8), 1.0, tl.float32), rounded.dtype)
        total = product(rounded, ones, total * fade)
    else:
        total = total * fade + tl.sum(rounded.to(tl.float32), 1)[:, None]
    low = product(rounded, v_low, low * fade)
    if HIGH:
        high = product(rounded, v_high, high * fade)
    return new_maximum, total, low, high


@triton.jit
def _attention_kernel(
    qkv_ptr,  # float16 or bfloat16 [B, T, 3 * WIDTH], rows contiguous
    out_ptr,  # the same type, [B, T, WIDTH], contiguous
    T,
    factor,  # what logits are multiplied by; unused if PRESCALED
    stride_b,  # of an image, in elements
    STRIDE_T: tl.constexpr,  # of a token
    WIDTH: tl.constexpr,  # H * D
    D: tl.constexpr,
    LOW: tl.constexpr,  # dims in the first part of a head and in the second, powers of two or 0
    HIGH: tl.constexpr,
    TAIL: tl.constexpr,  # keys of the last step, at least T % BLOCK_N; 0 if none are left
    PRESCALED: tl.constexpr,
    SUM_BY_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n_tiles = tl.cdiv(T, BLOCK_M)
    first = tl.program_id(0) % n_tiles * BLOCK_M
    head = tl.program_id(0) // n_tiles % (WIDTH // D)
    image = (tl.program_id(0) // n_tiles // (WIDTH // D)).to(tl.int64)
    head_ptr = qkv_ptr + image * stride_b + head * D
    q_ptr = head_ptr + first * STRIDE_T
    q_low = _load_tile(q_ptr, T - first, BLOCK_M, 0, LOW, D, STRIDE_T, False)
    low = tl.zeros((BLOCK_M, LOW), tl.float32)
    q_high = q_low
    high = 0.0
    if HIGH:
        q_high = _load_tile(q_ptr, T - first, BLOCK_M, LOW, HIGH, D, STRIDE_T, False)
        high = tl.zeros((BLOCK_M, HIGH), tl.float32)
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 8 if SUM_BY_PRODUCT else 1), tl.float32)
    n_whole = T // BLOCK_N
    for block in range(n_whole):
        keys_ptr = head_ptr + (block * (BLOCK_N * STRIDE_T) + WIDTH)
        maximum, total, low, high = _attend(
            q_low, q_high, keys_ptr, BLOCK_N, factor, maximum, total, low, high,
            BLOCK_N, True, D, LOW, HIGH, STRIDE_T, WIDTH, PRESCALED, SUM_BY_PRODUCT,
        )  # fmt: skip
    if TAIL:
        keys_ptr = head_ptr + (n_whole * (BLOCK_N * STRIDE_T) + WIDTH)
        maximum, total, low, high = _attend(
            q_low, q_high, keys_ptr, T - n_whole * BLOCK_N, factor, maximum, total, low, high,
            TAIL, False, D, LOW, HIGH, STRIDE_T, WIDTH, PRESCALED, SUM_BY_PRODUCT,
        )  # fmt: skip
    share = 1.0 / tl.max(total, 1)[:, None]
    rows = first + tl.arange(0, BLOCK_M)[:, None]
    out_tile = out_ptr + (image * T + rows) * WIDTH + head * D
    columns = tl.arange(0, LOW)[None, :]
    tl.store(out_tile + columns, cast(low * share, out_ptr.dtype.element_ty), mask=(rows < T) & (columns < D))
    if HIGH:
        columns = LOW + tl.arange(0, HIGH)[None, :]
        tl.store(out_tile + columns, cast(high * share, out_ptr.dtype.element_ty), mask=(rows < T) & (columns < D))


def _split_head(head_dim: int) -> tuple[int, int]:
    """Powers of two from 16 to 64 (128 spills) that together hold a head; the second is 0 if one is as good."""
    whole = max(1 << (head_dim - 1).bit_length(), 16)
    low = min(whole, 64) if whole in (16, head_dim) else whole // 2
    high = max(1 << (head_dim - low - 1).bit_length(), 16) if head_dim > low else 0
    return (whole, 0) if low + high == whole <= 64 else (low, high)


def _arguments(
    config: tuple[int, ...], t: int, n_heads: int, head_dim: int, stride_t: int, prescaled: bool, arch: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constant arguments of the kernel, and options of the compiler."""
    options: dict[str, Any] = dict(zip(CONFIG_FIELDS, config, strict=True))
    # The difference of logit and maximum has to be exactly 0 at the maximum: a fused multiply-subtract would round
    # one and not the other, which at large logits is far from 0.
    options["enable_fp_fusion"] = False
    low, high = _split_head(head_dim)
    left = t % options["BLOCK_N"]
    constants = {
        "STRIDE_T": stride_t,
        "WIDTH": n_heads * head_dim,
        "D": head_dim,
        "LOW": low,
        "HIGH": high,
        "TAIL": max(1 << (left - 1).bit_length(), 16) if left else 0,
        "PRESCALED": prescaled,
        "SUM_BY_PRODUCT": arch != 100,  # whose products want their operands in shared memory
        "BLOCK_M": options.pop("BLOCK_M"),
        "BLOCK_N": options.pop("BLOCK_N"),
    }
    return constants, options


def _launch_attention_qkv(qkv: Tensor, n_heads: int, prescaled: bool, config: tuple[int, ...] | None = None) -> Tensor:
    b, t, width = qkv.shape
    head_dim = width // (3 * n_heads)
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    if (t - 1) * qkv.stride(1) + width >= 2**31:
        raise ValueError(
            f"qkv: an image of {t} tokens with stride {qkv.stride(1)} reaches over 2^31 values; wanted less"
        )
    out = torch.empty((b, t, width // 3), dtype=qkv.dtype, device=qkv.device)
    if out.numel():
        arch = arch_of(qkv.device)
        if config is None:
            rows, key = _rows_and_key(arch, b, t, n_heads, head_dim, qkv.dtype, prescaled)
            config = lookup("attention", arch, key, rows, device=qkv.device)
        constants, options = _arguments(config, t, n_heads, head_dim, qkv.stride(1), prescaled, arch)
        grid = (triton.cdiv(t, constants["BLOCK_M"]) * n_heads * b,)
        with on_device_of(qkv):
            _attention_kernel[grid](qkv, out, t, query_scale(head_dim), qkv.stride(0), **constants, **options)
    return out


def specimens(arch: int) -> list[Specimen]:
    """530 tokens, as the model runs it, with the head dims from 32 to 128."""
    return [
        _specimen(arch, head_dim, tokens, dtype, prescaled)
        for head_dim, tokens, dtype, prescaled in (
            (64, 530, "fp16", True),
            (32, 530, "fp16", True),
            (96, 530, "fp16", True),
            (128, 530, "fp16", True),
            (64, 530, "bf16", True),
            (64, 530, "fp16", False),
            (64, 576, "fp16", True),
        )
    ]


def _specimen(
    arch: int,
    head_dim: int,
    tokens: int,
    dtype: str,
    prescaled: bool,
    n_heads: int | None = None,
    config: tuple[int, ...] | None = None,
) -> Specimen:
    n_heads = n_heads or max(768 // head_dim, 1)
    config = config or config_for(arch, head_dim)
    constants, options = _arguments(config, tokens, n_heads, head_dim, 3 * n_heads * head_dim, prescaled, arch)
    described: dict[str, Any] = dict(zip(CONFIG_FIELDS, config, strict=True))
    described |= {"head_dim": head_dim, "tokens": tokens, "dtype": dtype, "prescaled": prescaled}
    return Specimen(
        name="attention",
        config=described,
        kernel=_attention_kernel,
        signature={
            "qkv_ptr": f"*{dtype}",
            "out_ptr": f"*{dtype}",
            "T": "i32",
            "factor": "fp32",
            "stride_b": "i32",
        },
        constants=constants,
        options=options,
        unaligned=("T", "factor"),
    )


# --- tuning ------------------------------------------------------------------------------------------------


def _works(arch: int, n_sms: int, sizes: Sizes, config: tuple[int, ...]) -> list[Work]:
    b, t, n_heads, head_dim = (sizes[name] for name in ("b", "t", "n_heads", "head_dim"))
    block_m, block_n, *_ = config
    operations, n_bytes = cost(b, t, n_heads, head_dim, DTYPES[sizes["dtype"]].itemsize)
    return [
        Work(
            _specimen(arch, head_dim, t, TRITON_NAMES[sizes["dtype"]], sizes["prescaled"], n_heads, config),
            blocks=b * n_heads * -(-t // block_m),
            iterations=t // block_n,  # keys that do not fill a block come after the loop
            macs=2 * block_m * block_n * sum(_split_head(head_dim)),
            operations=operations,
            n_bytes=n_bytes,
            dtype="fp16",
        )
    ]


def _trial(sizes: Sizes, device: torch.device) -> Trial:
    b, t, n_heads, head_dim = (sizes[name] for name in ("b", "t", "n_heads", "head_dim"))
    qkv = torch.randn((b, t, 3 * n_heads * head_dim), generator=seeded(device), device=device)
    if sizes["prescaled"]:
        qkv[:, :, : n_heads * head_dim] *= query_scale(head_dim)
    qkv = qkv.to(DTYPES[sizes["dtype"]])

    def expected() -> tuple[Tensor, ...]:
        q, k, v = qkv.view(b, t, 3, n_heads, head_dim).permute(2, 0, 3, 1, 4)
        out = qkv.new_empty((b, n_heads, t, head_dim), dtype=torch.float32)
        # The reference divides by sqrt(D) and takes e^x.
        factor = math.log(2.0) * head_dim**0.5 if sizes["prescaled"] else 1.0
        for i in range(b):
            out[i] = attention_reference(q[i].float() * factor, k[i].float(), v[i].float())
        return (out.transpose(1, 2).reshape(b, t, n_heads * head_dim),)

    def run(config: tuple[int, ...]) -> tuple[Tensor, ...]:
        return (_launch_attention_qkv(qkv, n_heads, sizes["prescaled"], config),)

    return Trial(run, expected, rtol=TOLERANCES[sizes["dtype"]], atol=TOLERANCES[sizes["dtype"]])


def tunables() -> list[Tunable]:
    """``attention_qkv``. A problem: ``b, t, n_heads, head_dim``, ``dtype`` and whether queries are ``prescaled``."""
    return [
        Tunable(
            name="attention",
            module="attention",
            on="cuda",
            fields=CONFIG_FIELDS,
            key=lambda sizes: shape_key(
                *(sizes[name] for name in ("b", "t", "n_heads", "head_dim", "dtype", "prescaled"))
            ),
            space=lambda arch, sizes: CONFIGS + MORE_CONFIGS,
            default=lambda arch, n_sms, sizes: config_for(arch, sizes["head_dim"]),
            works=_works,
            trial=_trial,
        )
    ]


# --- torch operator ----------------------------------------------------------------------------------------


@torch.library.custom_op("tetra::attention_qkv", mutates_args=())
def _attention_qkv_op(qkv: Tensor, n_heads: int, prescaled: bool) -> Tensor:
    backend = backend_for(qkv)
    if backend == "native" and native.supports("attention_qkv", qkv.dtype):
        return native.attention_qkv(qkv, n_heads, prescaled)
    compiled = backend in ("triton", "interpreter") and qkv.dtype != torch.float32
    if compiled and qkv.shape[2] <= 3 * n_heads * MAX_HEAD_DIM:
        return _launch_attention_qkv(qkv, n_heads, prescaled)
    return _attention_qkv_torch(qkv, n_heads, prescaled)


@_attention_qkv_op.register_fake
def _(qkv: Tensor, n_heads: int, prescaled: bool) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3))


# --- public ------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q, k, v of shape [B, H, T, D]; k and v may have another T than q.

    Raises ValueError for shapes and TypeError for dtypes that do not fit each other.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k, v: shapes {shapes} do not fit; wanted [B, H, T, D] each")
    if q.shape[-1] == 0:
        raise ValueError(f"q, k, v: shape {tuple(q.shape)} has no values in its last dimension; wanted D >= 1")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v: are on {q.device}, {k.device}, {v.device}; move them to one device")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise TypeError(f"q, k, v: dtypes are {q.dtype}, {k.dtype}, {v.dtype}; wanted one floating dtype")
    return _attention_torch(q, k, v, q.shape[-1] ** -0.5)


def query_scale(head_dim: int) -> float:
    """log2(e) / sqrt(head_dim): what ``q`` is multiplied by so that the softmax is 2^(q k^T), normalised."""
    if head_dim < 1:
        raise ValueError(f"head_dim: is {head_dim}, wanted 1 or more")
    return math.log2(math.e) / math.sqrt(head_dim)


def attention_qkv(qkv: Tensor, n_heads: int, *, prescaled: bool = False) -> Tensor:
    """Self-attention of every image on the output of its QKV projection. Inference only: there is no gradient.

    Args:
        qkv: float16, bfloat16 or float32 [B, T, 3 * H * D], columns (q, k, v) x (head) x (dim); any strides.
        n_heads: H.
        prescaled: q was multiplied by ``query_scale(D)`` already; otherwise logits are divided by sqrt(D) here.

    Returns:
        [B, T, H * D] in qkv.dtype.
    """
    if qkv.dtype not in QKV_DTYPES:
        raise TypeError(f"qkv: dtype is {qkv.dtype}, wanted one of {', '.join(map(str, QKV_DTYPES))}")
    if qkv.ndim != 3:
        raise ValueError(f"qkv: shape is {tuple(qkv.shape)}, wanted [B, T, 3 * H * D]")
    if n_heads < 1 or qkv.shape[2] % (3 * n_heads) or qkv.shape[2] == 0:
        raise ValueError(
            f"n_heads: {qkv.shape[2]} columns of qkv are not 3 x {n_heads} heads x head dim; wanted a multiple"
        )
    return _attention_qkv_op(qkv, n_heads, prescaled)
