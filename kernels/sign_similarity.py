"""Cosine similarity between the signs of descriptors, every one with every one, without the signs as floats.

Contract
    letters: B descriptors of D values, W words of 32 bits a descriptor
    sign_similarity(x float [B, D]) -> float32 [B, B] (float64 if x is)
        differentiable in x, once

    b_i  = +1 where x_i > 0, else -1
    s_ij = b_i . b_j / D = (D - 2 Hamming(i, j)) / D        exact: an int32, divided once

    Gradient: straight-through where |x| <= 1, as of cosine similarity between b / sqrt(D). With G = dL/ds,
    dx = where(|x| <= 1, M b / D, 0)
    M  = G + G^T off the diagonal,  M_ii = - sum_{j != i} M_ij s_ij
    so that M b is at right angles to b row by row: that is the normalisation's part, and needs no second pass over D.

Memory: forward saves two bits a value, the sign and |x| <= 1: 2 B ceil(D / 8) bytes. The similarities are made again
in backward. A float copy of the signs never exists; plain PyTorch unpacks ``_COLUMNS_AT_A_TIME`` columns at once.

Numerics: similarities are the same bits on every backend. M is float32; the product with the signs takes it as two
bfloat16 parts on GPUs, a relative error of 2^-17 a term, and sums in float32. The gradient is rounded once, to the
dtype of x.

Descriptors that are not finite have similarities that are not, with all others and with themselves. Their values
that are not finite get no gradient.

Errors
    TypeError for dtypes that are not floating, ValueError for shapes other than [B, D] with 1 <= D <= 2^24.

The kernels
    Forward: popcounts of 32-bit words, which lie word by word, so that neighbouring threads read neighbouring
    descriptors. 400 of 12288 bits are 61 million popcounts; with thousands, products of int8 on tensor cores would be
    several times faster, but so small a part of a training step is not worth a second kernel.
    Backward: M times the signs, which become bfloat16 in registers, on their way to the tensor cores. M is padded
    with zeros to whole tiles, so that no load in the loop has a mask; what it meets there does not matter.

Source of the straight-through sign: Courbariaux et al., arXiv 1602.02830, eq. 4.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tetra.autotune.table import lookup
from tetra.kernels.backend import arch_of, backend_for, n_sms, on_device_of, tl, triton
from tetra.kernels.bits import pack_bits, pack_bits_checked, unpack_bits
from tetra.kernels.interpreted import cast, product
from tetra.kernels.rows import TRITON_DTYPES
from tetra.kernels.specimen import Specimen
from tetra.kernels.tunable import DTYPES as BY_NAME
from tetra.kernels.tunable import TOLERANCES, TRITON_NAMES, Sizes, Trial, Tunable, Work, bucket, dtype_name, seeded

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_D = 2**24  # the largest sum of signs up to which float32 holds every integer


# --- reference ---------------------------------------------------------------------------------------------


def sign_similarity_reference(x: Tensor) -> Tensor:
    """The formulas of the contract, with signs as floats and autograd's straight-through trick."""
    within = x.clamp(-1, 1)
    signs = within + (torch.where(x > 0, 1.0, -1.0).to(x.dtype) - within).detach()
    unit = F.normalize(signs / x.shape[1] ** 0.5, dim=1)
    return unit @ unit.T


# --- CPU ---------------------------------------------------------------------------------------------------

_COLUMNS_AT_A_TIME = 512  # a multiple of 8; bounds the signs that are floats at once


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _column_parts(d: int) -> list[tuple[int, int]]:
    return [(start, min(start + _COLUMNS_AT_A_TIME, d)) for start in range(0, d, _COLUMNS_AT_A_TIME)]


def _bits_torch(codes: Tensor, start: int, end: int) -> Tensor:
    """bool [B, end - start]; ``start`` is a multiple of 8."""
    return unpack_bits(codes[:, start // 8 : (end + 7) // 8], end - start)


def _signs_torch(codes: Tensor, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """+-1 [B, end - start]."""
    return _bits_torch(codes, start, end).to(dtype).mul_(2).sub_(1)


def _similarity_torch(signs: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    sums = signs.new_zeros((signs.shape[0],) * 2, dtype=dtype)  # integers, which floats of this size add exactly
    for start, end in _column_parts(d):
        part = _signs_torch(signs, start, end, dtype)
        sums.addmm_(part, part.T)
    return sums.div_(d)


def _gradient_torch(m: Tensor, signs: Tensor, passes: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    gradient = m.new_empty((m.shape[0], d), dtype=dtype)
    for start, end in _column_parts(d):
        part = m @ _signs_torch(signs, start, end, m.dtype)
        gradient[:, start:end] = part.div_(d).masked_fill_(~_bits_torch(passes, start, end), 0)
    return gradient


# --- Triton ------------------------------------------------------------------------------------------------

# Forward. A thread of these tiles has one column and all rows, which it loads four at a time.
FORWARD_FIELDS = ("BLOCK_M", "BLOCK_N", "num_warps")
FORWARD_CONFIG = (16, 128, 4)
FORWARD_CONFIGS = (FORWARD_CONFIG, (8, 128, 4), (32, 128, 4), (16, 64, 2), (32, 64, 2), (32, 128, 8))
# Backward: descriptors and columns of a tile, descriptors a step, warps, pipeline stages. Wider tiles spill.
CONFIG_FIELDS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
CONFIGS = (
    (64, 64, 64, 4, 3),
    (128, 64, 64, 8, 3),
)
# More rows for the tuners.
MORE_CONFIGS = ((64, 64, 64, 4, 2), (64, 64, 32, 4, 3), (64, 32, 64, 4, 3), (32, 64, 64, 4, 3), (128, 64, 32, 8, 3))
_WORDS = 4  # a descriptor is padded to a multiple of so many words, 16 bytes
_ROWS = 128  # and B to a multiple of so many, of which every tile's sides are parts


@lru_cache(maxsize=4096)
def shape_key(b: int, d: int, dtype: torch.dtype | None = None) -> str:
    """Key of a shape among the tuned results; of backward with the gradient's ``dtype``. B is rounded up to a power of
    two."""
    return f"b{bucket(b)}_d{d}" + ("" if dtype is None else f"_{dtype_name(dtype)}")


def default_forward_config(b: int, n_sms: int) -> tuple[int, ...]:
    """``FORWARD_CONFIG``; half of its tile where there are few tiles a multiprocessor.

    One H200, 26 November 2026: 128 and 512 descriptors take 1.3 to 1.6 times as long with the larger tile.
    """
    n_tiles = -(-b // FORWARD_CONFIG[0]) * -(-b // FORWARD_CONFIG[1])
    return FORWARD_CONFIG if n_tiles >= 4 * n_sms else FORWARD_CONFIGS[1]


def cost(b: int, d: int, n_bytes: int = 4, *, backward: bool = False) -> tuple[int, int]:
    """(operations, bytes moved at least) of b descriptors of d values: similarities, or with ``backward`` the gradient.

    Forward counts integer operations: 3 a pair of words (XOR, popcount, addition), and 6 a value for comparing and
    packing. Backward counts float operations of the product, which is done in two parts: 4 a pair and column.
    """
    codes, square = 2 * b * -(-d // 8), 4 * b * b
    if backward:
        return 4 * b * b * d, square + codes + b * d * n_bytes
    return 3 * b * b * -(-d // 32) + 6 * b * d, b * d * n_bytes + codes + square


@triton.jit
def _popcount(x):
    """Bits set in every uint32. The compiler knows this pattern, and makes it one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _sign_similarity_kernel(
    words_ptr,  # int32 [W, N]: signs, word by word; contiguous, zeros from B on
    similarity_ptr,  # float32 [B, B], contiguous
    B,
    D,
    divisor,  # D as a float
    W,  # % 4 == 0
    N,  # B, padded to whole tiles
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n_tiles = tl.cdiv(B, BLOCK_N)
    rows = tl.program_id(0) // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptr = words_ptr + rows[:, None]
    b_ptr = words_ptr + columns[None, :]
    distances = tl.zeros((BLOCK_M, BLOCK_N), tl.uint32)
    for _ in range(0, W, 4):
        for _i in tl.static_range(4):
            differing = tl.load(a_ptr) ^ tl.load(b_ptr)
            distances += _popcount(differing.to(tl.uint32, bitcast=True))
            a_ptr += N
            b_ptr += N
    sums = D - 2 * distances.to(tl.int32)
    tile = similarity_ptr + rows.to(tl.int64)[:, None] * B + columns[None, :]
    similarity = tl.div_rn(sums.to(tl.float32), divisor)
    tl.store(tile, similarity, mask=(rows[:, None] < B) & (columns[None, :] < B))


@triton.jit
def _spread(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """int32 [ROWS, WORDS] -> [ROWS, 32 WORDS]: every bit in the lowest place, under others."""
    place = tl.arange(0, 32) ^ 7  # bytes are in little-endian order, their bits most significant first
    return (words[:, :, None] >> place[None, None, :]).reshape(ROWS, 32 * WORDS)


@triton.jit
def _sign_gradient_kernel(
    parts_ptr,  # bfloat16 [2, N, N], contiguous: M is their sum; zeros from B on
    signs_ptr,  # int32 [B, 4 QUADS], contiguous
    passes_ptr,  # the same: where |x| <= 1
    gradient_ptr,  # float [B, D], contiguous
    B,
    D,
    N,  # B, padded to whole tiles
    QUADS,
    share,  # 1 / D
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n_tiles = tl.cdiv(B, BLOCK_M)
    rows = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) // n_tiles * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    words = tl.minimum(first // 32 + tl.arange(0, BLOCK_N // 32), 4 * QUADS - 1)[None, :]
    steps = tl.arange(0, BLOCK_K)
    parts = parts_ptr + rows.to(tl.int64)[:, None] * N + steps[None, :]
    second = N.to(tl.int64) * N
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, B, BLOCK_K):
        others = tl.minimum(start + steps, B - 1).to(tl.int64)[:, None] * (4 * QUADS)
        bits = _spread(tl.load(signs_ptr + others + words), BLOCK_K, BLOCK_N // 32)
        signs = (((bits & 1) << 15) ^ 0xBF80).to(tl.int16).to(tl.bfloat16, bitcast=True)  # 0x3F80 is 1, 0xBF80 is -1
        sums = product(tl.load(parts + start), signs, sums)
        sums = product(tl.load(parts + second + start), signs, sums)
    own = tl.minimum(rows, B - 1).to(tl.int64)[:, None] * (4 * QUADS)
    passes = _spread(tl.load(passes_ptr + own + words), BLOCK_M, BLOCK_N // 32).to(tl.int8) & 1
    gradient = tl.where(passes != 0, sums * share, 0.0)
    tile = gradient_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :]
    inside = (rows[:, None] < B) & (columns[None, :] < D)
    tl.store(tile, cast(gradient, gradient_ptr.dtype.element_ty), mask=inside)


def _as_words(codes: Tensor) -> Tensor:
    """uint8 [B, n] as int32 [B, W], W a multiple of 4: a view where the bytes are whole words."""
    missing = -codes.shape[1] % (4 * _WORDS)
    return (F.pad(codes, (0, missing)) if missing else codes.contiguous()).view(torch.int32)


def _launch_sign_similarity(signs: Tensor, d: int, dtype: torch.dtype, config: tuple[int, ...] | None = None) -> Tensor:
    words, b = _as_words(signs), signs.shape[0]
    similarity = torch.empty((b, b), dtype=dtype, device=signs.device)
    if b:
        if config is None:
            device = signs.device
            rows = (default_forward_config(b, n_sms(device)), *FORWARD_CONFIGS)
            config = lookup("sign_similarity", arch_of(device), shape_key(b, d), rows, device=device)
        fields = dict(zip(FORWARD_FIELDS, config, strict=True))
        by_word = words.new_zeros((words.shape[1], triton.cdiv(b, _ROWS) * _ROWS))
        by_word[:, :b] = words.T
        tiles = triton.cdiv(b, fields["BLOCK_M"]) * triton.cdiv(b, fields["BLOCK_N"])
        with on_device_of(signs):
            _sign_similarity_kernel[(tiles,)](by_word, similarity, b, d, float(d), *by_word.shape, **fields)
    return similarity


_ROWS_OF_TABLE = CONFIGS + MORE_CONFIGS


def _launch_sign_gradient(
    m: Tensor, signs: Tensor, passes: Tensor, d: int, dtype: torch.dtype, config: tuple[int, ...] | None = None
) -> Tensor:
    b = m.shape[0]
    gradient = torch.empty((b, d), dtype=dtype, device=m.device)
    if b:
        if config is None:
            key = shape_key(b, d, dtype)
            config = lookup("sign_gradient", arch_of(m.device), key, _ROWS_OF_TABLE, device=m.device)
        fields = dict(zip(CONFIG_FIELDS, config, strict=True))
        n = triton.cdiv(b, _ROWS) * _ROWS
        parts = m.new_zeros((2, n, n), dtype=torch.bfloat16)
        parts[0, :b, :b] = m
        parts[1, :b, :b] = m - parts[0, :b, :b]
        words = _as_words(signs)
        tiles = triton.cdiv(b, fields["BLOCK_M"]) * triton.cdiv(d, fields["BLOCK_N"])
        with on_device_of(m):
            _sign_gradient_kernel[(tiles,)](
                parts, words, _as_words(passes), gradient, b, d, n, words.shape[1] // _WORDS, 1.0 / d, **fields
            )
    return gradient


def specimens(arch: int) -> list[Specimen]:
    """Descriptors of any number and length, for each dtype of the gradient; some with all sizes multiples of 16."""
    return [
        *(_forward_specimen(aligned) for aligned in (False, True)),
        *(_gradient_specimen(config, dtype, False) for config in CONFIGS for dtype in TRITON_DTYPES),
        *(_gradient_specimen(config, "fp32", True) for config in CONFIGS),
    ]


def _forward_specimen(aligned: bool, config: tuple[int, ...] = FORWARD_CONFIG) -> Specimen:
    fields: dict[str, Any] = dict(zip(FORWARD_FIELDS, config, strict=True))
    return Specimen(
        name="sign_similarity",
        config={"pass": "forward", "aligned": aligned, **fields},
        kernel=_sign_similarity_kernel,
        signature={
            "words_ptr": "*i32", "similarity_ptr": "*fp32", **dict.fromkeys("BDWN", "i32"), "divisor": "fp32"
        },
        constants={name: fields[name] for name in ("BLOCK_M", "BLOCK_N")},
        options={"num_warps": fields["num_warps"]},
        unaligned=("divisor",) if aligned else ("B", "D", "W", "divisor"),
    )  # fmt: skip


def _gradient_specimen(config: tuple[int, ...], dtype: str, aligned: bool) -> Specimen:
    fields: dict[str, Any] = dict(zip(CONFIG_FIELDS, config, strict=True))
    pointers = {"parts_ptr": "*bf16", "signs_ptr": "*i32", "passes_ptr": "*i32", "gradient_ptr": f"*{dtype}"}
    return Specimen(
        name="sign_similarity",
        config={"pass": "gradient", "dtype": dtype, "aligned": aligned, **fields},
        kernel=_sign_gradient_kernel,
        signature={**pointers, **dict.fromkeys(("B", "D", "N", "QUADS"), "i32"), "share": "fp32"},
        constants={name: fields[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
        options={name: fields[name] for name in ("num_warps", "num_stages")},
        unaligned=("share",) if aligned else ("B", "D", "QUADS", "share"),
    )


# --- tuning ------------------------------------------------------------------------------------------------


def _forward_works(arch: int, n_sms: int, sizes: Sizes, config: tuple[int, ...]) -> list[Work]:
    b, d = sizes["b"], sizes["d"]
    n_words = -(-d // (32 * _WORDS)) * _WORDS
    return [
        Work(
            _forward_specimen(b % 16 == 0 and d % 16 == 0, config),
            blocks=-(-b // config[0]) * -(-b // config[1]),
            iterations=n_words // 4,
            macs=0,
            operations=3 * b * b * n_words,
            n_bytes=4 * b * n_words + 4 * b * b,
            dtype="fp32",
            popcounts=4 * config[0] * config[1],
        )
    ]


def _forward_trial(sizes: Sizes, device: torch.device) -> Trial:
    b, d = sizes["b"], sizes["d"]
    bits = torch.randint(0, 2, (b, d), generator=seeded(device), device=device)
    signs = pack_bits(bits)

    def run(config: tuple[int, ...]) -> tuple[Tensor, ...]:
        return (_launch_sign_similarity(signs, d, torch.float32, config),)

    return Trial(run, lambda: (_similarity_torch(signs, d, torch.float64),), rtol=1e-6, atol=1e-7)


def _gradient_works(arch: int, n_sms: int, sizes: Sizes, config: tuple[int, ...]) -> list[Work]:
    b, d = sizes["b"], sizes["d"]
    block_m, block_n, block_k, *_ = config
    itemsize = BY_NAME[sizes["dtype"]].itemsize
    return [
        Work(
            _gradient_specimen(config, TRITON_NAMES[sizes["dtype"]], b % 16 == 0 and d % 16 == 0),
            blocks=-(-b // block_m) * -(-d // block_n),
            iterations=-(-b // block_k),
            macs=2 * block_m * block_n * block_k,
            operations=4 * b * b * d,
            n_bytes=4 * b * b + 2 * b * -(-d // 8) + b * d * itemsize,
            dtype="fp16",
        )
    ]


def _gradient_trial(sizes: Sizes, device: torch.device) -> Trial:
    b, d, dtype, random = sizes["b"], sizes["d"], BY_NAME[sizes["dtype"]], seeded(device)
    signs, passes = (
        pack_bits(torch.randint(0, 2, (b, d), generator=random, device=device)) for _ in ("signs", "passes")
    )
    m = torch.randn((b, b), generator=random, device=device)

    def run(config: tuple[int, ...]) -> tuple[Tensor, ...]:
        return (_launch_sign_gradient(m, signs, passes, d, dtype, config),)

    def expected() -> tuple[Tensor, ...]:
        return (_gradient_torch(m.to(torch.float64), signs, passes, d, torch.float64),)

    return Trial(run, expected, rtol=TOLERANCES[sizes["dtype"]], atol=1e-3 * b**0.5 / d)


def tunables() -> list[Tunable]:
    """Both kernels. A problem: ``b`` descriptors of ``d`` values; of the gradient its ``dtype`` too."""
    return [
        Tunable(
            name="sign_similarity",
            module="sign_similarity",
            on="cuda",
            fields=FORWARD_FIELDS,
            key=lambda sizes: shape_key(sizes["b"], sizes["d"]),
            space=lambda arch, sizes: FORWARD_CONFIGS,
            default=lambda arch, n_sms, sizes: default_forward_config(sizes["b"], n_sms),
            works=_forward_works,
            trial=_forward_trial,
        ),
        Tunable(
            name="sign_gradient",
            module="sign_similarity",
            on="cuda",
            fields=CONFIG_FIELDS,
            key=lambda sizes: shape_key(sizes["b"], sizes["d"], BY_NAME[sizes["dtype"]]),
            space=lambda arch, sizes: _ROWS_OF_TABLE,
            default=lambda arch, n_sms, sizes: CONFIGS[0],
            works=_gradient_works,
            trial=_gradient_trial,
        ),
    ]


# --- torch operators ---------------------------------------------------------------------------------------


def _compiles(codes: Tensor, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels take descriptors of ``dtype``."""
    return backend_for(codes) in ("triton", "interpreter") and dtype != torch.float64


def _similarity(signs: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """float32 or float64 [B, B] of packed signs."""
    return (_launch_sign_similarity if _compiles(signs, dtype) else _similarity_torch)(signs, d, dtype)


@torch.library.custom_op("tetra::sign_similarity", mutates_args=())
def _sign_similarity_op(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities [B, B]; for backward, packed, the signs and where |x| <= 1."""
    signs, finite = pack_bits_checked(x)
    passes = pack_bits((x >= -1) & (x <= 1))
    similarity = _similarity(signs, x.shape[1], _wide(x.dtype))
    unknown = similarity.new_zeros(x.shape[0]).masked_fill_(~finite, torch.nan)
    return similarity.add_(unknown).add_(unknown[:, None]), signs, passes


@_sign_similarity_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, d = x.shape
    signs, passes = (x.new_empty((b, (d + 7) // 8), dtype=torch.uint8) for _ in range(2))
    return x.new_empty((b, b), dtype=_wide(x.dtype)), signs, passes


@torch.library.custom_op("tetra::sign_similarity_backward", mutates_args=())
def _backward_op(weights: Tensor, signs: Tensor, passes: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """Gradient [B, d] in ``dtype``, from that of the similarities, ``weights`` [B, B]."""
    m = weights + weights.T
    m.fill_diagonal_(0)
    m.diagonal().copy_(_similarity(signs, d, m.dtype).mul_(m).sum(1).neg_())
    backward = _launch_sign_gradient if _compiles(signs, dtype) else _gradient_torch
    with torch.autocast(m.device.type, enabled=False):
        return backward(m, signs, passes, d, dtype)


@_backward_op.register_fake
def _(weights: Tensor, signs: Tensor, passes: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    return weights.new_empty((weights.shape[0], d), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.d, ctx.dtype = inputs[0].shape[1], inputs[0].dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, weights: Tensor | None, *_: Tensor | None) -> Tensor | None:
    return None if weights is None else _backward_op(weights, *ctx.saved_tensors, ctx.d, ctx.dtype)


_sign_similarity_op.register_autograd(_differentiate, setup_context=_keep)


# --- public ------------------------------------------------------------------------------------------------


def sign_similarity(x: Tensor) -> Tensor:
    """Cosine similarity between the signs of descriptors (float [B, D]): float32 [B, B], with a gradient for ``x``.

    A sign is +1 where a value is > 0, as a bit of a packed descriptor is set. The gradient passes where |x| <= 1.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x: dtype is {x.dtype}, wanted one of {', '.join(map(str, DTYPES))}")
    if x.ndim != 2 or not 1 <= x.shape[1] <= MAX_D:
        raise ValueError(f"x: shape is {tuple(x.shape)}, wanted [B, D], 1 <= D <= {MAX_D}")
    return _sign_similarity_op(x)[0]
