"""Attention with a gradient, for training: no map of weights is kept for the backward pass.

Contract
    letters: B images, T tokens, H heads, D head dim
    attention_train(qkv float16|bfloat16|float32|float64 [B, T, 3 H D], n_heads, dropout, seed) -> [B, T, H D]
        = M softmax(q k^T / sqrt(D)) v for every head, in qkv's dtype, on the output of one projection whose columns are
        (q, k, v) x (head) x (dim), read in place; the gradient is one tensor like qkv
    Dropout M is 0 or 1 / (1 - dropout) for every weight, by the hash of (seed, image * H + head, query, key), the same
    on every backend; see ``tetra.kernels.dropout``. It is never stored.
    Errors: TypeError for a wrong dtype, ValueError for shapes, devices and dropout outside [0, 1).

What is kept between the passes
    Compiled kernels: qkv, the result, and the logits' log-sum-exp, float32 [B, H, T]. Plain PyTorch in parts: qkv.
    PyTorch's own attention: as the kernels. Never anything of T x T.

Numerics
    Compiled kernels: products of 16-bit inputs accumulate in float32; weights, and the gradients of logits, are rounded
    to the input dtype before the next product; all else is float32. The backward pass makes a weight again as
    2^(logit - log-sum-exp), where a sum of rounded weights and the size of the logits leave a relative error of at most
    u + 2^-22 max|logit|, u = 2^-11 (float16) or 2^-8 (bfloat16). The result, and every gradient, is rounded once. There
    are no atomics: two runs give the same bits.
    Plain PyTorch rounds what its products round: in bfloat16 the logits too, as in ``tetra.kernels.attention``.

Where what runs
    CUDA, float16 and bfloat16: the compiled kernels, for D <= 96, and D = 128 without dropout.
    bfloat16 on CPUs: the C++ kernels. Forward is that of inference; backward makes the weights again, some queries at a
    time, and is nearer to the exact gradient than products that round their logits (2.3e-3 against 4.2e-3).
    Dropout wherever no kernel runs, and bfloat16 on CPUs without a compiler: product, softmax, product, some maps at a
    time, made again in the backward pass.
    All else: PyTorch's scaled_dot_product_attention. So float32 on GPUs: compiled, its products would be three of TF32,
    whose split operands take twice the registers (at D = 64, sm_80, a tile of 32 x 32 spills 401 times in the gradient
    of queries), or run on the float units ("ieee": 172 times at 16 x 32), and models train in 16 bits.

The kernels (source: FlashAttention-2, arXiv 2307.08691)
    Forward: that of ``tetra.kernels.attention``, which says what keeps its loop short, with the scale in the
    subtraction of the maximum: one multiply-add a logit, so that queries need not be scaled before.
    Backward: one kernel for the gradient of queries, block of queries by block, which also writes the inner products of
    results and their gradients; then one for those of keys and values, block of keys by block. Both make the weights
    again: seven products instead of five, but no two blocks of threads add to the same values. In the second, maps are
    [keys, queries], so that each goes from the product that makes it into the next one in registers.
    sm_80, D = 64, bfloat16, 530 tokens:

    | kernel  | queries x keys a step | registers | shared KiB | instructions of the loop | tensor-core | blocks an SM |
    |---------|-----------------------|-----------|------------|--------------------------|-------------|--------------|
    | forward | 64 x 64               |       161 |         40 |                      334 |          68 |            3 |
    | queries | 64 x 32               |       164 |         24 |                      188 |          48 |            3 |
    | keys    | 32 x 64               |       222 |         24 |                      256 |          64 |            2 |

    64 x 64 in the last takes all 255 registers, and spills on sm_86 and sm_120. Dropout adds 11 to 17
    integer instructions a weight, which doubles the loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tetra.autotune.table import lookup
from tetra.kernels import native
from tetra.kernels.attention import (
    QKV_DTYPES,
    _load_tile,
    _split_head,
    attention,
    query_scale,
)
from tetra.kernels.backend import HAS_TRITON, arch_of, backend_for, on_device_of, operator_or_function, tl, triton
from tetra.kernels.dropout import (
    check_dropout,
    hash_seed,
    hash_words,
    keep_scale,
    mix_in_registers,
    seed_words,
    threshold,
)
from tetra.kernels.interpreted import cast, product
from tetra.kernels.specimen import Specimen
from tetra.kernels.tunable import DTYPES as BY_NAME
from tetra.kernels.tunable import TOLERANCES, TRITON_NAMES, Sizes, Trial, Tunable, Work, bucket, dtype_name, seeded

DTYPES = (*QKV_DTYPES, torch.float64)

_MAX_LOGITS = 1 << 20  # held at once in plain PyTorch


# --- reference ---------------------------------------------------------------------------------------------


def split_heads(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v [B, H, T, D] of a projection [B, T, 3 H D]."""
    b, t, width = qkv.shape  # all sizes spelt out: -1 would be ambiguous without images
    q, k, v = qkv.view(b, t, 3, n_heads, width // (3 * n_heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def dropout_factors(seed: Tensor, dropout: float, maps: Tensor, t: int, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies the weights of some ``maps`` (image times H plus head) by, [maps, T, T].

    That is 0 or 1 / (1 - dropout).
    """
    tokens = torch.arange(t, device=maps.device)
    hashes = hash_words(*seed_words(seed), maps[:, None, None], tokens[:, None], tokens)
    return (hashes >= threshold(dropout)).to(dtype) * keep_scale(dropout)


def attention_train_reference(qkv: Tensor, n_heads: int, dropout: float = 0.0, seed: int = 0) -> Tensor:
    """By definition, with every map of weights in memory; PyTorch finds the gradient."""
    q, k, v = split_heads(qkv, n_heads)
    weights = torch.softmax((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5, dim=-1)
    if threshold(dropout):
        b, h, t, _ = q.shape
        maps = torch.arange(b * h, device=qkv.device)
        factors = dropout_factors(torch.tensor(seed, device=qkv.device), dropout, maps, t, qkv.dtype)
        weights = weights * factors.view(b, h, t, t)
    return (weights @ v).transpose(1, 2).flatten(2)


# --- plain PyTorch -----------------------------------------------------------------------------------------
# Some maps of weights at a time, which the backward pass makes again.


def _chunks(t: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of tensors [maps, ...], of so many maps that their weights are at most ``_MAX_LOGITS``."""
    at_once = max(1, _MAX_LOGITS // max(t * t, 1))
    return zip(*(tensor.split(at_once) for tensor in tensors), strict=True)


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) of maps [n, T, D]."""
    logits = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    return torch.softmax(logits, dim=-1, out=logits)


def _forward_torch(qkv: Tensor, n_heads: int, dropout: float, seed: Tensor | None) -> Tensor:
    b, t, width = qkv.shape
    q, k, v = (part.flatten(0, 1) for part in split_heads(qkv, n_heads))
    maps, out = torch.arange(len(q), device=q.device), torch.empty_like(q)
    for q_, k_, v_, out_, maps_ in _chunks(t, q, k, v, out, maps):
        weights = _weights(q_, k_, q.shape[-1] ** -0.5)
        if seed is not None:
            weights *= dropout_factors(seed, dropout, maps_, t, qkv.dtype)
        torch.bmm(weights, v_, out=out_)
    return out.view(b, n_heads, t, q.shape[2]).transpose(1, 2).reshape(b, t, width // 3)


def _backward_torch(grad: Tensor, qkv: Tensor, n_heads: int, dropout: float, seed: Tensor | None) -> Tensor:
    b, t, _ = qkv.shape
    q, k, v = (part.flatten(0, 1) for part in split_heads(qkv, n_heads))
    grad = grad.reshape(b, t, n_heads, q.shape[2]).transpose(1, 2).flatten(0, 1)
    grads = torch.empty((3, *q.shape), dtype=q.dtype, device=q.device)
    maps, scale, nothing = torch.arange(len(q), device=q.device), q.shape[-1] ** -0.5, q.new_empty(())
    for q_, k_, v_, grad_, grad_q, grad_k, grad_v, maps_ in _chunks(t, q, k, v, grad, *grads, maps):
        weights = _weights(q_, k_, scale)
        through, kept = grad_ @ v_.transpose(1, 2), weights
        if seed is not None:
            factors = dropout_factors(seed, dropout, maps_, t, qkv.dtype)
            through, kept = through * factors, weights * factors
        torch.bmm(kept.transpose(1, 2), grad_, out=grad_v)
        through = torch.ops.aten._softmax_backward_data(through, weights, -1, weights.dtype)
        torch.baddbmm(nothing, through, k_, beta=0, alpha=scale, out=grad_q)
        torch.baddbmm(nothing, through.transpose(1, 2), q_, beta=0, alpha=scale, out=grad_k)
    return grads.view(3, b, n_heads, t, q.shape[2]).permute(1, 3, 0, 2, 4).reshape(qkv.shape)


# --- Triton ------------------------------------------------------------------------------------------------

Part = Literal["forward", "queries", "keys"]
PARTS: tuple[Part, ...] = ("forward", "queries", "keys")

# Queries and keys of a block, warps, pipeline stages.
CONFIG_FIELDS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
CONFIGS = (
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (128, 64, 4, 2),
    (64, 32, 4, 2),
    (32, 64, 4, 2),
    (16, 64, 4, 2),
    (64, 16, 4, 2),
)
# More rows for the tuners. Which of them spill depends on the chip, the head dim and dropout.
MORE_CONFIGS: dict[Part, tuple[tuple[int, ...], ...]] = {
    "forward": ((64, 32, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3)),
    "queries": ((64, 32, 4, 3), (128, 32, 8, 2), (128, 64, 8, 2)),
    "keys": ((32, 64, 4, 3), (32, 128, 8, 2), (64, 128, 8, 2)),
}
_OF_PART: dict[Part, tuple[int, ...]] = {"forward": (0, 1, 2, 3), "queries": (0, 1, 3, 6), "keys": (1, 4, 5)}
MAX_HEAD_DIM = 96
WIDE_HEAD_DIM = 128  # too, but without dropout; what has to be masked or hashed as well would not fit the registers
COMPILED_DTYPES = (torch.float16, torch.bfloat16)

LN_2 = tl.constexpr(math.log(2.0)) if HAS_TRITON else None
LOG2_E = tl.constexpr(math.log2(math.e)) if HAS_TRITON else None


def config_for(part: Part, arch: int, head_dim: int) -> tuple[int, ...]:
    """The row of ``CONFIGS`` for compute capability ``arch`` when no tuning result says otherwise.

    What decides is registers: sums and operands of a head are held by every warp for its 16 rows. On sm_90 and sm_100
    operands lie in shared memory, on sm_100 sums too in a memory of their own, and tiles can be larger.
    """
    roomy, wide = arch in (90, 100), head_dim > 64
    if part == "forward":
        if arch == 100:
            return CONFIGS[2]
        return CONFIGS[0] if 32 < head_dim <= 64 else CONFIGS[1]
    if part == "queries":
        if roomy:
            return CONFIGS[3] if wide else CONFIGS[0]
        return CONFIGS[6] if head_dim > 96 else CONFIGS[3]
    if wide:
        return CONFIGS[4] if roomy else CONFIGS[5]
    return CONFIGS[1] if roomy or head_dim <= 32 else CONFIGS[4]


def shape_key(part: Part, b: int, t: int, n_heads: int, head_dim: int, dtype: str, dropout: float) -> str:
    """Key of a shape among the tuned results; the number of maps is rounded up to a power of two."""
    dropped = "_dropout" if threshold(dropout) else ""
    return f"{part}_maps{bucket(b * n_heads)}_t{t}_d{head_dim}_{dtype}{dropped}"


def configs_of(part: Part) -> tuple[tuple[int, ...], ...]:
    """The rows that may run a part."""
    return (*(CONFIGS[i] for i in _OF_PART[part]), *MORE_CONFIGS[part])


@lru_cache(maxsize=4096)
def _rows_and_key(
    part: Part, arch: int, b: int, t: int, n_heads: int, head_dim: int, dtype: torch.dtype, dropout: float
) -> tuple[tuple[tuple[int, ...], ...], str]:
    """What a launch looks up: rows that may run, the default first, and the key."""
    key = shape_key(part, b, t, n_heads, head_dim, dtype_name(dtype), dropout)
    return (config_for(part, arch, head_dim), *configs_of(part)), key


def cost(b: int, t: int, n_heads: int, head_dim: int, n_bytes: int = 2, *, backward: bool = False) -> tuple[int, int]:
    """(float operations, bytes moved at least) of ``attention_train`` on [b, t, 3 * n_heads * head_dim].

    Forward: two products, a multiply-add counting as two operations, and 4 operations a weight; q, k, v and the result
    move once, and 4 bytes a row of weights. Backward: seven products (two of them made in both kernels) and 10
    operations a weight; q, k, v and the result's gradient move twice, the result and the gradient of q, k, v once, and
    16 bytes a row. What blocks of threads read again comes from the L2 cache.
    """
    weights, values, rows = b * n_heads * t * t, b * t * n_heads * head_dim * n_bytes, b * n_heads * t
    if backward:
        return weights * (14 * head_dim + 10), 12 * values + 16 * rows
    return weights * (4 * head_dim + 4), 4 * values + 4 * rows


@triton.jit
def _store_tile(
    tile_ptr,  # of the first row, at the head's first dim
    tile,  # float32 [BLOCK, WIDTH]
    n_rows,  # that there are
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,  # dims FIRST to FIRST + WIDTH, of which D exist
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    STRIDE_T: tl.constexpr,
):
    rows = tl.arange(0, BLOCK)[:, None]
    columns = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = tile_ptr + rows * STRIDE_T + columns
    tl.store(pointers, cast(tile, tile_ptr.dtype.element_ty), mask=(rows < n_rows) & (columns < D))


@triton.jit
def _place(T, BLOCK: tl.constexpr, N_HEADS: tl.constexpr):
    """First token, head and image of this block of threads."""
    n_tiles = tl.cdiv(T, BLOCK)
    first = tl.program_id(0) % n_tiles * BLOCK
    head = tl.program_id(0) // n_tiles % N_HEADS
    return first, head, (tl.program_id(0) // n_tiles // N_HEADS).to(tl.int64)


@triton.jit
def _hash_head(seed_ptr, image_head, THRESHOLD: tl.constexpr):
    """Hash of seed, image and head, to which query and key are still to come."""
    state = image_head.to(tl.uint32)
    if THRESHOLD:
        state = mix_in_registers(hash_seed(tl.load(seed_ptr)) ^ state)
    return state


@triton.jit
def _hash_rows(head_hash, queries, THRESHOLD: tl.constexpr):
    """The same of queries too."""
    state = queries.to(tl.uint32)
    if THRESHOLD:
        state = mix_in_registers(head_hash ^ state)
    return state


@triton.jit
def _keep(values, row_hashes, keys, THRESHOLD: tl.constexpr):
    """``values`` where dropout keeps them, else 0."""
    if THRESHOLD:
        values = tl.where(mix_in_registers(row_hashes ^ keys.to(tl.uint32)) >= THRESHOLD, values, 0.0)
    return values


@triton.jit
def _forward_step(
    q_low,  # [BLOCK_M, LOW]
    q_high,  # [BLOCK_M, HIGH]
    row_hashes,  # uint32 [BLOCK_M]
    image_ptr,  # of the head's first query
    first_key,
    T,
    factor,
    maximum,  # float32 [BLOCK_M], of the logits so far, times factor
    total,  # float32 [BLOCK_M, 8 or 1], of the weights so far
    low,  # float32 [BLOCK_M, LOW], weighted sum of values so far
    high,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # first_key + BLOCK <= T
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    STRIDE_T: tl.constexpr,
    WIDTH: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SUM_BY_PRODUCT: tl.constexpr,
):
    """One step of the online softmax, over ``BLOCK`` keys."""
    keys_ptr = image_ptr + first_key * STRIDE_T + WIDTH
    keys = first_key + tl.arange(0, BLOCK)[None, :]
    k_low = _load_tile(keys_ptr, T - first_key, BLOCK, 0, LOW, D, STRIDE_T, WHOLE)
    v_low = _load_tile(keys_ptr + WIDTH, T - first_key, BLOCK, 0, LOW, D, STRIDE_T, WHOLE)
    logits = product(q_low, k_low.T, None)
    if HIGH:
        k_high = _load_tile(keys_ptr, T - first_key, BLOCK, LOW, HIGH, D, STRIDE_T, WHOLE)
        v_high = _load_tile(keys_ptr + WIDTH, T - first_key, BLOCK, LOW, HIGH, D, STRIDE_T, WHOLE)
        logits = product(q_high, k_high.T, logits)
    if not WHOLE:
        logits = tl.where(keys < T, logits, -float("inf"))
    new_maximum = tl.maximum(maximum, tl.max(logits, 1) * factor)
    weights = tl.exp2(logits * factor - new_maximum[:, None])
    fade = tl.exp2(maximum - new_maximum)[:, None]
    rounded = cast(weights, v_low.dtype)
    if SUM_BY_PRODUCT:
        ones = cast(tl.full((BLOCK, 8), 1.0, tl.float32), rounded.dtype)
        total = product(rounded, ones, total * fade)
    else:
        total = total * fade + tl.sum(rounded.to(tl.float32), 1)[:, None]
    rounded = cast(_keep(weights, row_hashes[:, None], keys, THRESHOLD), v_low.dtype)
    low = product(rounded, v_low, low * fade)
    if HIGH:
        high = product(rounded, v_high, high * fade)
    return new_maximum, total, low, high


@triton.jit
def _forward_kernel(
    qkv_ptr,  # float16, bfloat16 or float32 [B, T, 3 * WIDTH], rows contiguous
    seed_ptr,  # int64; None without dropout
    out_ptr,  # the same type, [B, T, WIDTH], contiguous
    lse_ptr,  # float32 [B, H, T], log-sum-exp of the logits
    T,
    factor,  # log2(e) / sqrt(D)
    stride_b,  # of an image, in elements
    STRIDE_T: tl.constexpr,  # of a token
    WIDTH: tl.constexpr,  # H * D
    D: tl.constexpr,
    LOW: tl.constexpr,  # dims in the first part of a head and in the second, powers of two or 0
    HIGH: tl.constexpr,
    TAIL: tl.constexpr,  # keys of the last step, at least T % BLOCK_N; 0 if none are left
    THRESHOLD: tl.constexpr,  # hashes below are dropped
    KEEP_SCALE: tl.constexpr,
    SUM_BY_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first, head, image = _place(T, BLOCK_M, WIDTH // D)
    image_head = image * (WIDTH // D) + head
    head_ptr = qkv_ptr + image * stride_b + head * D
    q_ptr = head_ptr + first * STRIDE_T
    q_low = _load_tile(q_ptr, T - first, BLOCK_M, 0, LOW, D, STRIDE_T, False)
    low = tl.zeros((BLOCK_M, LOW), tl.float32)
    q_high = q_low
    high = 0.0
    if HIGH:
        q_high = _load_tile(q_ptr, T - first, BLOCK_M, LOW, HIGH, D, STRIDE_T, False)
        high = tl.zeros((BLOCK_M, HIGH), tl.float32)
    queries = first + tl.arange(0, BLOCK_M)
    row_hashes = _hash_rows(_hash_head(seed_ptr, image_head, THRESHOLD), queries, THRESHOLD)
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 8 if SUM_BY_PRODUCT else 1), tl.float32)
    n_whole = T // BLOCK_N
    for block in range(n_whole):
        maximum, total, low, high = _forward_step(
            q_low, q_high, row_hashes, head_ptr, block * BLOCK_N, T, factor, maximum, total, low, high,
            BLOCK_N, True, D, LOW, HIGH, STRIDE_T, WIDTH, THRESHOLD, SUM_BY_PRODUCT,
        )  # fmt: skip
    if TAIL:
        maximum, total, low, high = _forward_step(
            q_low, q_high, row_hashes, head_ptr, n_whole * BLOCK_N, T, factor, maximum, total, low, high,
            TAIL, False, D, LOW, HIGH, STRIDE_T, WIDTH, THRESHOLD, SUM_BY_PRODUCT,
        )  # fmt: skip
    sums = tl.max(total, 1)
    tl.store(lse_ptr + image_head * T + queries, (maximum + tl.log2(sums)) * LN_2, mask=queries < T)
    share = (KEEP_SCALE / sums)[:, None]
    out_tile = out_ptr + (image * T + first) * WIDTH + head * D
    _store_tile(out_tile, low * share, T - first, BLOCK_M, 0, LOW, D, WIDTH)
    if HIGH:
        _store_tile(out_tile, high * share, T - first, BLOCK_M, LOW, HIGH, D, WIDTH)


@triton.jit
def _queries_step(
    q_low,  # [BLOCK_M, LOW]
    q_high,
    grad_low,  # of the result, [BLOCK_M, LOW]
    grad_high,
    row_hashes,  # uint32 [BLOCK_M]
    lse,  # float32 [BLOCK_M], log2
    delta,  # float32 [BLOCK_M]
    image_ptr,  # of the head's first query
    first_key,
    T,
    factor,
    low,  # float32 [BLOCK_M, LOW], gradient so far
    high,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    STRIDE_T: tl.constexpr,
    WIDTH: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
):
    """What ``BLOCK`` keys add to the gradient of a block of queries."""
    keys_ptr = image_ptr + first_key * STRIDE_T + WIDTH
    keys = first_key + tl.arange(0, BLOCK)[None, :]
    k_low = _load_tile(keys_ptr, T - first_key, BLOCK, 0, LOW, D, STRIDE_T, WHOLE)
    v_low = _load_tile(keys_ptr + WIDTH, T - first_key, BLOCK, 0, LOW, D, STRIDE_T, WHOLE)
    logits = product(q_low, k_low.T, None)
    grads = product(grad_low, v_low.T, None)
    if HIGH:
        k_high = _load_tile(keys_ptr, T - first_key, BLOCK, LOW, HIGH, D, STRIDE_T, WHOLE)
        v_high = _load_tile(keys_ptr + WIDTH, T - first_key, BLOCK, LOW, HIGH, D, STRIDE_T, WHOLE)
        logits = product(q_high, k_high.T, logits)
        grads = product(grad_high, v_high.T, grads)
    weights = tl.exp2(logits * factor - lse[:, None])
    if not WHOLE:
        weights = tl.where(keys < T, weights, 0.0)
    if THRESHOLD:
        grads = _keep(grads * KEEP_SCALE, row_hashes[:, None], keys, THRESHOLD)
    through_softmax = cast(weights * (grads - delta[:, None]), k_low.dtype)
    low = product(through_softmax, k_low, low)
    if HIGH:
        high = product(through_softmax, k_high, high)
    return low, high


@triton.jit
def _queries_kernel(
    qkv_ptr,  # as for the forward kernel
    seed_ptr,
    out_ptr,
    lse_ptr,
    grad_out_ptr,  # [B, T, WIDTH], contiguous
    grad_qkv_ptr,  # [B, T, 3 * WIDTH], contiguous; the queries' part is written here
    delta_ptr,  # float32 [B, H, T], inner products of the results and their gradients; written for _keys_kernel
    T,
    factor,
    scale,  # 1 / sqrt(D)
    stride_b,
    STRIDE_T: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    TAIL: tl.constexpr,  # keys of the last step, at least T % BLOCK_N; 0 if none are left
    THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first, head, image = _place(T, BLOCK_M, WIDTH // D)
    image_head = image * (WIDTH // D) + head
    head_ptr = qkv_ptr + image * stride_b + head * D
    q_ptr = head_ptr + first * STRIDE_T
    place = (image * T + first) * WIDTH + head * D
    q_low = _load_tile(q_ptr, T - first, BLOCK_M, 0, LOW, D, STRIDE_T, False)
    out = _load_tile(out_ptr + place, T - first, BLOCK_M, 0, LOW, D, WIDTH, False)
    grad_low = _load_tile(grad_out_ptr + place, T - first, BLOCK_M, 0, LOW, D, WIDTH, False)
    delta = tl.sum(out.to(tl.float32) * grad_low.to(tl.float32), 1)
    low = tl.zeros((BLOCK_M, LOW), tl.float32)
    q_high = q_low
    grad_high = grad_low
    high = 0.0
    if HIGH:
        q_high = _load_tile(q_ptr, T - first, BLOCK_M, LOW, HIGH, D, STRIDE_T, False)
        out = _load_tile(out_ptr + place, T - first, BLOCK_M, LOW, HIGH, D, WIDTH, False)
        grad_high = _load_tile(grad_out_ptr + place, T - first, BLOCK_M, LOW, HIGH, D, WIDTH, False)
        delta += tl.sum(out.to(tl.float32) * grad_high.to(tl.float32), 1)
        high = tl.zeros((BLOCK_M, HIGH), tl.float32)
    queries = first + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + image_head * T + queries, delta, mask=queries < T)
    lse = tl.load(lse_ptr + image_head * T + queries, mask=queries < T, other=0.0) * LOG2_E
    row_hashes = _hash_rows(_hash_head(seed_ptr, image_head, THRESHOLD), queries, THRESHOLD)
    n_whole = T // BLOCK_N
    for block in range(n_whole):
        low, high = _queries_step(
            q_low, q_high, grad_low, grad_high, row_hashes, lse, delta, head_ptr, block * BLOCK_N, T, factor,
            low, high, BLOCK_N, True, D, LOW, HIGH, STRIDE_T, WIDTH, THRESHOLD, KEEP_SCALE,
        )  # fmt: skip
    if TAIL:
        low, high = _queries_step(
            q_low, q_high, grad_low, grad_high, row_hashes, lse, delta, head_ptr, n_whole * BLOCK_N, T, factor,
            low, high, TAIL, False, D, LOW, HIGH, STRIDE_T, WIDTH, THRESHOLD, KEEP_SCALE,
        )  # fmt: skip
    grad_tile = grad_qkv_ptr + (image * T + first) * (3 * WIDTH) + head * D
    _store_tile(grad_tile, low * scale, T - first, BLOCK_M, 0, LOW, D, 3 * WIDTH)
    if HIGH:
        _store_tile(grad_tile, high * scale, T - first, BLOCK_M, LOW, HIGH, D, 3 * WIDTH)


@triton.jit
def _keys_step(
    k_low,  # [BLOCK_N, LOW]
    k_high,
    v_low,
    v_high,
    head_hash,
    keys,  # int32 [BLOCK_N]
    image_ptr,  # of the head's first query
    grad_ptr,  # of its result's gradient
    lse_ptr,  # of its first query
    delta_ptr,
    first_query,
    T,
    factor,
    grad_k_low,  # float32 [BLOCK_N, LOW], so far
    grad_k_high,
    grad_v_low,
    grad_v_high,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # first_query + BLOCK <= T
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    STRIDE_T: tl.constexpr,
    WIDTH: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
):
    """What ``BLOCK`` queries add to the gradients of a block of keys and values.

    Maps are [keys, queries] here, so that they are left operands as they come out of the product before.
    """
    q_ptr = image_ptr + first_query * STRIDE_T
    g_ptr = grad_ptr + first_query * WIDTH
    queries = first_query + tl.arange(0, BLOCK)
    q_low = _load_tile(q_ptr, T - first_query, BLOCK, 0, LOW, D, STRIDE_T, WHOLE)
    grad_low = _load_tile(g_ptr, T - first_query, BLOCK, 0, LOW, D, WIDTH, WHOLE)
    if WHOLE:
        lse = tl.load(lse_ptr + queries)
        delta = tl.load(delta_ptr + queries)
    else:  # weights of queries that do not exist are 2^-inf
        lse = tl.load(lse_ptr + queries, mask=queries < T, other=float("inf"))
        delta = tl.load(delta_ptr + queries, mask=queries < T, other=0.0)
    logits = product(k_low, q_low.T, None)
    if HIGH:
        q_high = _load_tile(q_ptr, T - first_query, BLOCK, LOW, HIGH, D, STRIDE_T, WHOLE)
        logits = product(k_high, q_high.T, logits)
    weights = tl.exp2(logits * factor - (lse * LOG2_E)[None, :])
    row_hashes = _hash_rows(head_hash, queries, THRESHOLD)
    rounded = cast(_keep(weights, row_hashes[None, :], keys[:, None], THRESHOLD), grad_low.dtype)
    grad_v_low = product(rounded, grad_low, grad_v_low)
    grads = product(v_low, grad_low.T, None)
    if HIGH:
        grad_high = _load_tile(g_ptr, T - first_query, BLOCK, LOW, HIGH, D, WIDTH, WHOLE)
        grad_v_high = product(rounded, grad_high, grad_v_high)
        grads = product(v_high, grad_high.T, grads)
    if THRESHOLD:
        grads = _keep(grads * KEEP_SCALE, row_hashes[None, :], keys[:, None], THRESHOLD)
    through_softmax = cast(weights * (grads - delta[None, :]), q_low.dtype)
    grad_k_low = product(through_softmax, q_low, grad_k_low)
    if HIGH:
        grad_k_high = product(through_softmax, q_high, grad_k_high)
    return grad_k_low, grad_k_high, grad_v_low, grad_v_high


@triton.jit
def _keys_kernel(
    qkv_ptr,  # as for the forward kernel
    seed_ptr,
    lse_ptr,
    grad_out_ptr,  # [B, T, WIDTH], contiguous
    delta_ptr,  # float32 [B, H, T], of _queries_kernel
    grad_qkv_ptr,  # [B, T, 3 * WIDTH], contiguous; the keys' and values' part is written here
    T,
    factor,
    scale,  # 1 / sqrt(D)
    stride_b,
    STRIDE_T: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    TAIL: tl.constexpr,  # queries of the last step, at least T % BLOCK_M; 0 if none are left
    THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first, head, image = _place(T, BLOCK_N, WIDTH // D)
    image_head = image * (WIDTH // D) + head
    head_ptr = qkv_ptr + image * stride_b + head * D
    k_ptr = head_ptr + first * STRIDE_T + WIDTH
    k_low = _load_tile(k_ptr, T - first, BLOCK_N, 0, LOW, D, STRIDE_T, False)
    v_low = _load_tile(k_ptr + WIDTH, T - first, BLOCK_N, 0, LOW, D, STRIDE_T, False)
    grad_k_low = tl.zeros((BLOCK_N, LOW), tl.float32)
    grad_v_low = tl.zeros((BLOCK_N, LOW), tl.float32)
    k_high = k_low
    v_high = v_low
    grad_k_high = 0.0
    grad_v_high = 0.0
    if HIGH:
        k_high = _load_tile(k_ptr, T - first, BLOCK_N, LOW, HIGH, D, STRIDE_T, False)
        v_high = _load_tile(k_ptr + WIDTH, T - first, BLOCK_N, LOW, HIGH, D, STRIDE_T, False)
        grad_k_high = tl.zeros((BLOCK_N, HIGH), tl.float32)
        grad_v_high = tl.zeros((BLOCK_N, HIGH), tl.float32)
    keys = first + tl.arange(0, BLOCK_N)
    head_hash = _hash_head(seed_ptr, image_head, THRESHOLD)
    grad_ptr = grad_out_ptr + image * T * WIDTH + head * D
    lse_ptr += image_head * T
    delta_ptr += image_head * T
    n_whole = T // BLOCK_M
    for block in range(n_whole):
        grad_k_low, grad_k_high, grad_v_low, grad_v_high = _keys_step(
            k_low, k_high, v_low, v_high, head_hash, keys, head_ptr, grad_ptr, lse_ptr, delta_ptr,
            block * BLOCK_M, T, factor, grad_k_low, grad_k_high, grad_v_low, grad_v_high,
            BLOCK_M, True, D, LOW, HIGH, STRIDE_T, WIDTH, THRESHOLD, KEEP_SCALE,
        )  # fmt: skip
    if TAIL:
        grad_k_low, grad_k_high, grad_v_low, grad_v_high = _keys_step(
            k_low, k_high, v_low, v_high, head_hash, keys, head_ptr, grad_ptr, lse_ptr, delta_ptr,
            n_whole * BLOCK_M, T, factor, grad_k_low, grad_k_high, grad_v_low, grad_v_high,
            TAIL, False, D, LOW, HIGH, STRIDE_T, WIDTH, THRESHOLD, KEEP_SCALE,
        )  # fmt: skip
    grad_tile = grad_qkv_ptr + (image * T + first) * (3 * WIDTH) + head * D + WIDTH
    _store_tile(grad_tile, grad_k_low * scale, T - first, BLOCK_N, 0, LOW, D, 3 * WIDTH)
    _store_tile(grad_tile + WIDTH, grad_v_low * KEEP_SCALE, T - first, BLOCK_N, 0, LOW, D, 3 * WIDTH)
    if HIGH:
        _store_tile(grad_tile, grad_k_high * scale, T - first, BLOCK_N, LOW, HIGH, D, 3 * WIDTH)
        _store_tile(grad_tile + WIDTH, grad_v_high * KEEP_SCALE, T - first, BLOCK_N, LOW, HIGH, D, 3 * WIDTH)


def _parts_of_head(head_dim: int) -> tuple[int, int]:
    """As for inference, but 33 to 63 dims are one part of 64.

    As 32 + 16 (33 to 48 dims), the gradient of the queries' second part came out wrong on an H200 (Triton 3.6.0) where
    images do not begin at multiples of 16 values, though the compiled code shows no reason; 64 + 16 was right.
    """
    return (64, 0) if 32 < head_dim < 64 else _split_head(head_dim)


def _arguments(
    part: Part, config: tuple[int, ...], t: int, n_heads: int, head_dim: int, stride_t: int, dropout: float, arch: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constant arguments of a kernel, and options of the compiler."""
    options: dict[str, Any] = dict(zip(CONFIG_FIELDS, config, strict=True))
    low, high = _parts_of_head(head_dim)
    left = t % options["BLOCK_M" if part == "keys" else "BLOCK_N"]
    constants = {
        "STRIDE_T": stride_t,
        "WIDTH": n_heads * head_dim,
        "D": head_dim,
        "LOW": low,
        "HIGH": high,
        "TAIL": max(1 << (left - 1).bit_length(), 16) if left else 0,
        "THRESHOLD": threshold(dropout),
        "KEEP_SCALE": keep_scale(dropout),
        "BLOCK_M": options.pop("BLOCK_M"),
        "BLOCK_N": options.pop("BLOCK_N"),
    }
    if part == "forward":
        constants["SUM_BY_PRODUCT"] = arch != 100  # whose products want their operands in shared memory
    return constants, options


def _prepare(
    part: Part, qkv: Tensor, n_heads: int, dropout: float, config: tuple[int, ...] | None = None
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constants of a launch."""
    b, t, width = qkv.shape
    head_dim = width // (3 * n_heads)
    arch = arch_of(qkv.device)
    if config is None:
        rows, key = _rows_and_key(part, arch, b, t, n_heads, head_dim, qkv.dtype, dropout)
        config = lookup("attention_training", arch, key, rows, device=qkv.device)
    constants, options = _arguments(part, config, t, n_heads, head_dim, qkv.stride(1), dropout, arch)
    block = constants["BLOCK_N" if part == "keys" else "BLOCK_M"]
    return (triton.cdiv(t, block) * n_heads * b,), constants | options


def _with_rows_contiguous(qkv: Tensor) -> Tensor:
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    if (qkv.shape[1] - 1) * qkv.stride(1) + qkv.shape[2] >= 2**31:
        raise ValueError(
            f"qkv: an image of {qkv.shape[1]} tokens with stride {qkv.stride(1)} reaches over 2^31 values; wanted less"
        )
    return qkv


def _launch_forward(
    qkv: Tensor, n_heads: int, dropout: float, seed: Tensor | None, config: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    b, t, width = qkv.shape
    qkv = _with_rows_contiguous(qkv)
    out = torch.empty((b, t, width // 3), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((b, n_heads, t), dtype=torch.float32, device=qkv.device)
    if out.numel():
        grid, constants = _prepare("forward", qkv, n_heads, dropout, config)
        with on_device_of(qkv):
            factor = query_scale(width // (3 * n_heads))
            _forward_kernel[grid](qkv, seed, out, lse, t, factor, qkv.stride(0), **constants)
    return out, lse


def _scalars(qkv: Tensor, n_heads: int) -> tuple[int, float, float, int]:
    """What both kernels of the backward pass take after their tensors."""
    head_dim = qkv.shape[2] // (3 * n_heads)
    return qkv.shape[1], query_scale(head_dim), head_dim**-0.5, qkv.stride(0)


def _launch_queries(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_qkv: Tensor,
    n_heads: int,
    dropout: float,
    seed: Tensor | None,
    config: tuple[int, ...] | None = None,
) -> Tensor:
    """Writes the queries' part of ``grad_qkv``; returns the inner products of results and their gradients."""
    delta = torch.empty_like(lse)
    grid, constants = _prepare("queries", qkv, n_heads, dropout, config)
    with on_device_of(qkv):
        _queries_kernel[grid](qkv, seed, out, lse, grad, grad_qkv, delta, *_scalars(qkv, n_heads), **constants)
    return delta


def _launch_keys(
    grad: Tensor,
    qkv: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_qkv: Tensor,
    n_heads: int,
    dropout: float,
    seed: Tensor | None,
    config: tuple[int, ...] | None = None,
) -> None:
    """Writes the keys' and the values' part of ``grad_qkv``."""
    grid, constants = _prepare("keys", qkv, n_heads, dropout, config)
    with on_device_of(qkv):
        _keys_kernel[grid](qkv, seed, lse, grad, delta, grad_qkv, *_scalars(qkv, n_heads), **constants)


def _launch_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_heads: int, dropout: float, seed: Tensor | None
) -> Tensor:
    qkv, grad = _with_rows_contiguous(qkv), grad.contiguous()
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if grad_qkv.numel():
        delta = _launch_queries(grad, qkv, out, lse, grad_qkv, n_heads, dropout, seed)
        _launch_keys(grad, qkv, lse, delta, grad_qkv, n_heads, dropout, seed)
    return grad_qkv


def specimens(arch: int) -> list[Specimen]:
    """530 tokens, as the model trains with, and the head dims from 32 to 128; and 50 tokens, less than a block."""
    return [
        _specimen(part, arch, *shape)
        for part in PARTS
        for shape in (
            (64, 530, "fp16", 0.0),
            (64, 530, "bf16", 0.0),
            (64, 530, "bf16", 0.1),
            (64, 50, "bf16", 0.0),
            (32, 530, "bf16", 0.0),
            (32, 530, "bf16", 0.1),
            (96, 530, "bf16", 0.0),
            (96, 530, "bf16", 0.1),
            (128, 530, "bf16", 0.0),
        )
    ]


def _specimen(
    part: Part,
    arch: int,
    head_dim: int,
    t: int,
    dtype: str,
    dropout: float,
    config: tuple[int, ...] | None = None,
    n_heads: int | None = None,
) -> Specimen:
    n_heads = n_heads or max(768 // head_dim, 1)
    config = config or config_for(part, arch, head_dim)
    constants, options = _arguments(part, config, t, n_heads, head_dim, 3 * n_heads * head_dim, dropout, arch)
    backward = {"lse_ptr": "fp32", "grad_out_ptr": dtype, "grad_qkv_ptr": dtype, "delta_ptr": "fp32"}
    pointers = {
        "forward": {"qkv_ptr": dtype, "out_ptr": dtype, "lse_ptr": "fp32"},
        "queries": {"qkv_ptr": dtype, "out_ptr": dtype, **backward},
        "keys": {"qkv_ptr": dtype, **backward},
    }[part]
    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    if dropout:
        signature["seed_ptr"] = "*i64"
    else:
        constants["seed_ptr"] = None
    signature |= {"T": "i32", "factor": "fp32", "stride_b": "i32"}
    if part != "forward":
        signature["scale"] = "fp32"
    described: dict[str, Any] = dict(zip(CONFIG_FIELDS, config, strict=True))
    described |= {"part": part, "head_dim": head_dim, "tokens": t, "dtype": dtype, "dropout": dropout}
    return Specimen(
        name="attention_training",
        config=described,
        kernel={"forward": _forward_kernel, "queries": _queries_kernel, "keys": _keys_kernel}[part],
        signature=signature,
        constants=constants,
        options=options,
        unaligned=("T", "factor") if part == "forward" else ("T", "factor", "scale"),
    )


# --- tuning ------------------------------------------------------------------------------------------------

_SHAPE = ("b", "t", "n_heads", "head_dim")


def _works(arch: int, n_sms: int, sizes: Sizes, config: tuple[int, ...]) -> list[Work]:
    part: Part = sizes["part"]
    b, t, n_heads, head_dim = (sizes[name] for name in _SHAPE)
    block_m, block_n, *_ = config
    own, step = (block_n, block_m) if part == "keys" else (block_m, block_n)
    products = {"forward": 2, "queries": 3, "keys": 4}[part]
    itemsize = BY_NAME[sizes["dtype"]].itemsize
    values, maps = b * t * n_heads * head_dim * itemsize, b * n_heads * t * t
    return [
        Work(
            _specimen(part, arch, head_dim, t, TRITON_NAMES[sizes["dtype"]], sizes["dropout"], config, n_heads),
            blocks=b * n_heads * -(-t // own),
            iterations=t // step,  # what does not fill a step comes after the loop
            macs=products * block_m * block_n * sum(_parts_of_head(head_dim)),
            operations=maps * (2 * products * head_dim + (4 if part == "forward" else 5)),
            # q, k, v in and the result out; q, k, v, the result and its gradient in and one out; or one less and two.
            n_bytes={"forward": 4, "queries": 6, "keys": 6}[part] * values + 8 * b * n_heads * t,
            dtype="fp16",
        )
    ]


def _trial(sizes: Sizes, device: torch.device) -> Trial:
    part, dropout = sizes["part"], sizes["dropout"]
    b, t, n_heads, head_dim = (sizes[name] for name in _SHAPE)
    width, random = n_heads * head_dim, seeded(device)
    dtype = BY_NAME[sizes["dtype"]]
    qkv = torch.randn((b, t, 3 * width), generator=random, device=device).to(dtype)
    grad = torch.randn((b, t, width), generator=random, device=device).to(dtype)
    seed = torch.tensor(1, device=device) if threshold(dropout) else None
    exact = _forward_torch(qkv.to(torch.float32), n_heads, dropout, seed)
    tolerance = TOLERANCES[sizes["dtype"]]

    def forward(config: tuple[int, ...]) -> tuple[Tensor, ...]:
        return _launch_forward(qkv, n_heads, dropout, seed, config)

    def log_sum_exps() -> Tensor:
        lse = torch.empty((b, n_heads, t), device=device)
        for i in range(b):
            q, k, _ = split_heads(qkv[i : i + 1].to(torch.float32), n_heads)
            lse[i] = (q @ k.transpose(-2, -1) * head_dim**-0.5).logsumexp(-1)[0]
        return lse

    if part == "forward":
        return Trial(forward, lambda: (exact, log_sum_exps()), rtol=tolerance, atol=(tolerance, 1e-3))
    out, lse = exact.to(dtype), log_sum_exps()
    delta = (out.float() * grad.float()).view(b, t, n_heads, head_dim).sum(-1).transpose(1, 2).contiguous()
    mine = slice(0, width) if part == "queries" else slice(width, 3 * width)

    def backward(config: tuple[int, ...]) -> tuple[Tensor, ...]:
        grad_qkv = torch.empty_like(qkv)
        if part == "queries":
            _launch_queries(grad, qkv, out, lse, grad_qkv, n_heads, dropout, seed, config)
        else:
            _launch_keys(grad, qkv, lse, delta, grad_qkv, n_heads, dropout, seed, config)
        return (grad_qkv[:, :, mine],)

    def expected() -> tuple[Tensor, ...]:
        whole = _backward_torch(grad.to(torch.float32), qkv.to(torch.float32), n_heads, dropout, seed)
        return (whole[:, :, mine],)

    return Trial(backward, expected, rtol=tolerance, atol=tolerance)


def _key_of(sizes: Sizes) -> str:
    b, t, n_heads, head_dim = (sizes[name] for name in _SHAPE)
    return shape_key(sizes["part"], b, t, n_heads, head_dim, sizes["dtype"], sizes["dropout"])


def tunables() -> list[Tunable]:
    """The three kernels, each a ``part``. A problem: that, ``b, t, n_heads, head_dim``, ``dtype`` and ``dropout``."""
    return [
        Tunable(
            name="attention_training",
            module="attention_training",
            on="cuda",
            fields=CONFIG_FIELDS,
            key=_key_of,
            space=lambda arch, sizes: configs_of(sizes["part"]),
            default=lambda arch, n_sms, sizes: config_for(sizes["part"], arch, sizes["head_dim"]),
            works=_works,
            trial=_trial,
        )
    ]


# --- torch operators ---------------------------------------------------------------------------------------


def _is_compiled(qkv: Tensor, n_heads: int, dropout: float) -> bool:
    """Whether the Triton kernels run; else plain PyTorch."""
    head_dim = qkv.shape[2] // (3 * n_heads)
    fits = head_dim <= MAX_HEAD_DIM or (head_dim == WIDE_HEAD_DIM and not threshold(dropout))
    return fits and qkv.dtype in COMPILED_DTYPES and backend_for(qkv) in ("triton", "interpreter")


def _attention_train(qkv: Tensor, n_heads: int, dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Result, and the logits' log-sum-exp [B, H, T], which is empty where the backward pass does not need it."""
    if _is_compiled(qkv, n_heads, dropout):
        return _launch_forward(qkv, n_heads, dropout, seed)
    nothing = qkv.new_empty((0,), dtype=torch.float32)
    if seed is None and backend_for(qkv) == "native" and native.supports("attention_qkv", qkv.dtype):
        return native.attention_qkv(qkv, n_heads), nothing  # the kernel that infers
    return _forward_torch(qkv, n_heads, dropout, seed), nothing


_attention_train_op = torch.library.custom_op("tetra::attention_train", _attention_train, mutates_args=())


@_attention_train_op.register_fake
def _(qkv: Tensor, n_heads: int, dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    b, t, width = qkv.shape
    shape = (b, n_heads, t) if _is_compiled(qkv, n_heads, dropout) else (0,)
    return qkv.new_empty((b, t, width // 3)), qkv.new_empty(shape, dtype=torch.float32)


def _attention_train_backward(
    grad: Tensor, qkv: Tensor, out: Tensor | None, lse: Tensor | None, n_heads: int, dropout: float, seed: Tensor | None
) -> Tensor:
    if out is not None and lse is not None:
        return _launch_backward(grad, qkv, out, lse, n_heads, dropout, seed)
    if seed is None and backend_for(qkv) == "native" and native.supports("attention_qkv_backward", qkv.dtype):
        return native.attention_qkv_backward(grad, qkv, n_heads)
    return _backward_torch(grad, qkv, n_heads, dropout, seed)


_attention_train_backward_op = torch.library.custom_op(
    "tetra::attention_train_backward", _attention_train_backward, mutates_args=()
)


@_attention_train_backward_op.register_fake
def _(
    grad: Tensor, qkv: Tensor, out: Tensor | None, lse: Tensor | None, n_heads: int, dropout: float, seed: Tensor | None
) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.n_heads, ctx.dropout, seed = inputs
    out, lse = output if _is_compiled(qkv, ctx.n_heads, ctx.dropout) else (None, None)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, seed, out, lse)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    qkv, seed, out, lse = ctx.saved_tensors
    run = operator_or_function(grad, _attention_train_backward_op, _attention_train_backward)
    return run(grad, qkv, out, lse, ctx.n_heads, ctx.dropout, seed), None, None, None


_attention_train_op.register_autograd(_backward, setup_context=_keep_for_backward)


class _AttentionTrain(torch.autograd.Function):
    """The operator, for calls that nothing traces."""

    forward = staticmethod(_attention_train)
    setup_context = staticmethod(_keep_for_backward)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _backward(ctx, *grads)


# --- public ------------------------------------------------------------------------------------------------


def attention_train(qkv: Tensor, n_heads: int, dropout: float = 0.0, seed: int | Tensor = 0) -> Tensor:
    """Self-attention of every image on the output of its QKV projection, with a gradient.

    Args:
        qkv: float16, bfloat16, float32 or float64 [B, T, 3 * H * D], columns (q, k, v) x (head) x (dim); any strides.
        n_heads: H.
        dropout: share of the attention weights to drop, below 1; the others are divided by 1 - dropout.
        seed: of what is dropped: an integer, or an int64 tensor of one value on the device of ``qkv``.

    Returns:
        [B, T, H * D] in qkv.dtype.
    """
    if qkv.dtype not in DTYPES:
        raise TypeError(f"qkv: dtype is {qkv.dtype}, wanted one of {', '.join(map(str, DTYPES))}")
    if qkv.ndim != 3:
        raise ValueError(f"qkv: shape is {tuple(qkv.shape)}, wanted [B, T, 3 * H * D]")
    if n_heads < 1 or qkv.shape[2] % (3 * n_heads) or qkv.shape[2] == 0:
        raise ValueError(
            f"n_heads: {qkv.shape[2]} columns of qkv are not 3 x {n_heads} heads x head dim; wanted a multiple"
        )
    check_dropout(dropout)
    drawn = _seed_on(seed, qkv.device) if threshold(dropout) else None
    if drawn is None and not _is_compiled(qkv, n_heads, dropout) and not _is_slow_fused(qkv):
        return attention(*split_heads(qkv, n_heads)).transpose(1, 2).flatten(2)
    out: Tensor = operator_or_function(qkv, _attention_train_op, _AttentionTrain.apply)(qkv, n_heads, dropout, drawn)[0]
    return out


def _is_slow_fused(qkv: Tensor) -> bool:
    """Whether PyTorch's own attention is the slower of the two ways in plain PyTorch."""
    return qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu"


def _seed_on(seed: int | Tensor, device: torch.device) -> Tensor:
    if not isinstance(seed, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"seed: is {seed.dtype} of shape {tuple(seed.shape)}, wanted an int64 tensor of one value")
    if seed.device != device:
        raise ValueError(f"seed: is on {seed.device}, but qkv is on {device}; move one of them")
    return seed.reshape(())
