"""Products of int8 activations with ternary weights that stay packed at 2 bits.

Contract
    letters: M rows (tokens), K inputs, N outputs, P = 32 * ceil(K / 128) packed bytes a weight row
    pack_ternary(codes int8 [N, K] in {-1, 0, 1}) -> uint8 [N, P]
    unpack_ternary(packed uint8 [N, P], k) -> int8 [N, k]
    ternary_matmul_int32(x_q int8 [M, K], packed) -> int32 [M, N] = x_q @ codes.T, exact on every backend
    ternary_linear(x float [..., K], packed, weight_scale, bias [N] | None) -> [..., N] in x.dtype
        = (x_q @ codes.T) * (scale * weight_scale) + bias,
        where (x_q, scale) = quantize_rows(x) and weight = codes * weight_scale
    ternary_linear_int8(x_q int8 [..., K], scale float32 [...], packed, weight_scale, bias) -> [..., N]
        the same from rows that are quantised already, with GELU, scaled first columns, a residual and the result's
        dtype of choice (float16, bfloat16, float32): a layer of a ternary block and what follows it in one launch
    ternary_linear_float(x float16 | bfloat16 | float32 [..., K], packed, weight_scale, bias) -> [..., N] in x.dtype
        with activations that are not quantised, summed in float32; with GELU and a residual
    Where tiles are too few for the chip, K is split into parts, each summed by its own block; the last block to finish
    a tile adds them up, always in the same order. With int8 activations this changes no bit.

Layout of ``packed``
    A value is two bits, two's complement: 00 = 0, 01 = +1, 11 = -1. 10 is illegal: ``pack_ternary`` never
    writes it, ``unpack_ternary`` and ``check_packed`` refuse it (the products trust a weight that was checked
    when it was loaded). Rows are padded to a multiple of 128 values with 00. A group of 128 values takes 32
    bytes; byte i of a group holds the values i, 32 + i, 64 + i and 96 + i in its bits 0-1, 2-3, 4-5 and 6-7.
    So one [N, 32] byte tile gives four int8 planes, each contiguous along K, by a shift and a mask.

Errors
    TypeError for a wrong dtype, ValueError for shapes and devices that do not fit, for illegal codes, for K = 0 and
    for K > MAX_K, beyond which 32 bits could overflow in the compiled kernel. NaN or infinity in ``x`` of
    ``ternary_linear`` is a ValueError on the CPU; on other devices, where looking would stop the queue of launches,
    it makes that row of the result non-finite.

What the compiled kernel reaches, what was tried and what limits it is in docs/kernels.md.

Source of the arithmetic: TeTRA (arXiv 2503.02511), inference of a ternary layer.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tetra.autotune.table import lookup
from tetra.kernels import native
from tetra.kernels.backend import arch_of, backend_for, n_sms, on_device_of, tl, triton
from tetra.kernels.gelu import gelu_in_registers
from tetra.kernels.row_quantize import check_finite_scale, quantize_rows_unchecked
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

GROUP = 128  # values along K that are packed together
GROUP_BYTES = 32
PLANES = 4  # values a byte
UNPACKED_ONE = 64  # what the Triton kernel's planes hold for a code of +1
OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_K = (2**31 - 1) // (128 * UNPACKED_ONE)  # |accumulator| <= 128 * 64 * K has to stay below 2^31


# --- pack and unpack -------------------------------------------------------------------------------------


def packed_width(k: int) -> int:
    """Bytes of a packed row of ``k`` values."""
    return GROUP_BYTES * -(-k // GROUP)


def pack_ternary(codes: Tensor) -> Tensor:
    """Codes int8 [N, K] in {-1, 0, 1} to uint8 [N, 32 * ceil(K / 128)]."""
    if codes.dtype != torch.int8:
        raise TypeError(f"codes: dtype is {codes.dtype}, wanted torch.int8")
    if codes.ndim != 2:
        raise ValueError(f"codes: shape is {tuple(codes.shape)}, wanted [N, K]")
    illegal = (codes > 1) | (codes < -1)  # not abs(), which leaves -128 as it is
    if bool(illegal.any()):
        raise ValueError(f"codes: found {int(codes[illegal][0])}, wanted -1, 0 or 1 only")
    return pack_ternary_unchecked(codes)


def pack_ternary_unchecked(codes: Tensor) -> Tensor:
    """``pack_ternary`` of codes that are known to be legal; does not wait for a device."""
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -k % GROUP))
    planes = (padded.view(torch.uint8) & 3).view(n, -(-k // GROUP), PLANES, GROUP_BYTES)
    low, second, third, high = planes.unbind(2)
    return (low | (second << 2) | (third << 4) | (high << 6)).reshape(n, packed_width(k))


def unpack_ternary(packed: Tensor, k: int) -> Tensor:
    """The codes int8 [N, k] of ``packed`` (uint8 [N, P]).

    Raises ValueError for illegal codes and for a width that is not ``k``'s.
    """
    check_packed(packed, k)
    n = packed.shape[0]
    groups = packed.reshape(n, packed.shape[1] // GROUP_BYTES, 1, GROUP_BYTES)
    shifts = torch.tensor([6, 4, 2, 0], dtype=torch.uint8, device=packed.device).view(PLANES, 1)
    # The two bits go to the top of the byte; shifting back as a signed number extends the sign.
    codes = ((groups << shifts) & 0xC0).view(torch.int8) >> 6
    return codes.reshape(n, packed.shape[1] * PLANES)[:, :k].contiguous()


def check_packed(packed: Tensor, k: int | None = None) -> None:
    """Raises unless ``packed`` is a packed weight: dtype, shape, no illegal code.

    Given ``k``, the width has to be that of ``k`` values and the padding zero. One vectorised pass; call it
    when a weight comes from outside (a file, another program).
    """
    _check_packed_form(packed)
    if k is not None and packed.shape[1] != packed_width(k):
        raise ValueError(f"packed: {packed.shape[1]} bytes a row, but {k} values take {packed_width(k)}")
    # Illegal: the high bit of a pair is set and the low one is not. As int32 words, four bytes an operation.
    words = _aligned(packed).view(torch.int32)
    illegal = (words >> 1) & ~words & 0x55555555
    if bool(illegal.any()):
        row = int(illegal.any(dim=1).nonzero()[0])
        raise ValueError(f"packed: row {row} holds the illegal code 10; the weight is damaged or not in this format")
    if k is not None and k % GROUP and packed.shape[0]:
        last = packed[:, -GROUP_BYTES:]
        for plane in range(PLANES):
            used = min(max(k % GROUP - plane * GROUP_BYTES, 0), GROUP_BYTES)
            if bool(((last[:, used:] >> (2 * plane)) & 3).any()):
                raise ValueError(f"packed: values after the {k}th are not zero; the weight is damaged or has another K")


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and starting at a multiple of 16 bytes, so that several bytes can be read as one number."""
    tensor = tensor.contiguous()
    tensor = tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
    # A single row counts as contiguous whatever its stride, which may not be a multiple of the larger number's size.
    return tensor.flatten().view(tensor.shape)


def _check_packed_form(packed: Tensor) -> None:
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: dtype is {packed.dtype}, wanted torch.uint8 (see pack_ternary)")
    if packed.ndim != 2 or packed.shape[1] % GROUP_BYTES:
        raise ValueError(f"packed: shape is {tuple(packed.shape)}, wanted [N, P] with P a multiple of {GROUP_BYTES}")


# --- reference -------------------------------------------------------------------------------------------


def ternary_matmul_int32_reference(x_q: Tensor, packed: Tensor) -> Tensor:
    """The product in 64-bit integers, by definition."""
    codes = unpack_ternary(packed, x_q.shape[1])
    return (x_q.to(torch.int64) @ codes.to(torch.int64).T).to(torch.int32)


def dequantize(product: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """product [M, N] * (scale [M] * weight_scale) + bias [N], in float32."""
    row_scale = (scale * weight_scale).unsqueeze(-1)
    out = product.to(torch.float32)
    return out.mul_(row_scale) if bias is None else torch.addcmul(bias, out, row_scale, out=out)


def ternary_linear_reference(
    x: Tensor,
    scale: Tensor | float,
    packed: Tensor,
    weight_scale: Tensor | float,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    scaled_columns: int = 0,
    column_scale: float = 1.0,
) -> Tensor:
    """``ternary_linear_int8`` (x int8 [M, K], scale [M]) and ``ternary_linear_float`` (x float, scale 1) in float64."""
    codes = unpack_ternary(packed, x.shape[1])
    row_scale = torch.as_tensor(scale * weight_scale, dtype=torch.float64).reshape(-1, 1)
    y = (x.to(torch.float64) @ codes.to(torch.float64).T) * row_scale
    if bias is not None:
        y = y + bias.to(torch.float64)
    if gelu:
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    y[:, :scaled_columns] *= column_scale
    return y if residual is None else y + residual.to(torch.float64)


class Epilogue(NamedTuple):
    """What follows a product in the same launch, in this order, in float32; see ``ternary_linear_int8``."""

    bias: Tensor | None = None
    gelu: bool = False
    residual: Tensor | None = None  # added after the columns are scaled
    scaled_columns: int = 0
    column_scale: float = 1.0

    def with_float32_bias(self) -> Epilogue:
        return self if self.bias is None else self._replace(bias=self.bias.to(torch.float32))


# --- CPU ---------------------------------------------------------------------------------------------------

_ROWS_AT_A_TIME = 1024  # bounds the temporaries of one call to what the caches hold


@cache
def _unpack_table(device: torch.device) -> Tensor:
    """For every pair of bytes (2 i, 2 i + 1) of a group its eight codes as one int64, plane by plane.

    So the values 2 i, 2 i + 1, 32 + 2 i, 32 + 2 i + 1, 64 + ... come out side by side. 512 KiB.
    """
    with torch.inference_mode(False):  # an inference tensor could not be used outside that mode later
        both = torch.arange(1 << 16, device=device).view(-1, 1)
        shifts = torch.tensor([byte + 2 * plane for plane in range(PLANES) for byte in (0, 8)], device=device)
        codes = torch.tensor([0, 1, 0, -1], dtype=torch.int8, device=device)[(both >> shifts) & 3]
        return codes.view(torch.int64).flatten()


def _unpack_interleaved(packed: Tensor) -> Tensor:
    """int8 [N, 4 P], along K in the table's order, which ``_interleave`` gives to the activations too."""
    n, width = packed.shape
    pairs = _aligned(packed).view(torch.uint16).flatten().to(torch.int32)
    return _unpack_table(packed.device).index_select(0, pairs).view(torch.int8).view(n, PLANES * width)


def _interleave(x: Tensor, width: int) -> Tensor:
    """x int8 or float32 [M, K] in the order of ``_unpack_interleaved``, padded with zeros to [M, 4 width].

    The products do not care about the order along K, and the activations are cheaper to reorder than the
    weights: there are fewer of them. Two neighbours move together, as one number of twice the size.
    """
    m, k = x.shape
    both = torch.int16 if x.dtype == torch.int8 else torch.int64
    x = torch.nn.functional.pad(x, (0, PLANES * width - k)) if k < PLANES * width else _aligned(x)
    planes = x.view(both).view(m * (width // GROUP_BYTES), PLANES, GROUP_BYTES // 2)
    return torch.stack(planes.unbind(1), dim=-1).view(x.dtype).view(m, PLANES * width)


@cache
def _has_int8_dot_product() -> bool:
    """Whether ``torch._int_mm`` runs on vector instructions here; elsewhere a float32 product is faster."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(supported and supported())


def _product_in_floats(x_q: Tensor, codes: Tensor) -> Tensor:
    """x_q int8 [M, K] @ codes int8 [N, K].T -> int32 [M, N], exact, on any machine."""
    # Sums of K <= 131072 products of at most 128 are whole numbers up to 2^24, which float32 holds exactly.
    dtype = torch.float32 if x_q.shape[1] * 128 <= 1 << 24 else torch.float64
    with torch.autocast(x_q.device.type, enabled=False):  # which would round the sums to half precision
        return (x_q.to(dtype) @ codes.to(dtype).T).to(torch.int32)


def _product_int32(x_q: Tensor, codes: Tensor) -> Tensor:
    """The same, by the fastest way on this machine."""
    if x_q.device.type == "cpu" and _has_int8_dot_product() and x_q.numel() and codes.numel():
        return torch._int_mm(x_q, codes.T)
    return _product_in_floats(x_q, codes)


def _parts_of_rows(m: int) -> list[slice]:
    """Parts of about equal size, of at most ``_ROWS_AT_A_TIME`` rows."""
    n_parts = max(-(-m // _ROWS_AT_A_TIME), 1)
    size = max(-(-m // n_parts), 1)
    return [slice(start, start + size) for start in range(0, max(m, 1), size)]


def _matmul_torch(x_q: Tensor, packed: Tensor) -> Tensor:
    """The exact product in plain torch, on any device."""
    codes, width = _unpack_interleaved(packed), packed.shape[1]
    parts = [_product_int32(_interleave(x_q[rows], width), codes) for rows in _parts_of_rows(len(x_q))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _finish(
    product: Tensor, scale: Tensor, weight_scale: Tensor, epilogue: Epilogue, rows: slice, out_dtype: torch.dtype
) -> Tensor:
    """Dequantises the product of some of the rows, and what follows, in float32."""
    out = dequantize(product, scale, weight_scale, epilogue.bias)
    if epilogue.gelu:
        out = torch.nn.functional.gelu(out)
    if epilogue.scaled_columns:
        out[:, : epilogue.scaled_columns] *= epilogue.column_scale
    if epilogue.residual is not None:
        out += epilogue.residual[rows].to(torch.float32)
    return out.to(out_dtype)


def _linear_int8_torch(
    x_q: Tensor, scale: Tensor, packed: Tensor, weight_scale: Tensor, epilogue: Epilogue, out_dtype: torch.dtype
) -> Tensor:
    """The layer on quantised rows in plain torch, on any device."""
    codes, width = _unpack_interleaved(packed), packed.shape[1]
    epilogue = epilogue.with_float32_bias()
    out = []
    for rows in _parts_of_rows(len(x_q)):
        product = _product_int32(_interleave(x_q[rows], width), codes)
        out.append(_finish(product, scale[rows], weight_scale, epilogue, rows, out_dtype))
    return out[0] if len(out) == 1 else torch.cat(out)


def _linear_torch(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The layer that quantises its rows in plain torch, on any device."""
    codes, width = _unpack_interleaved(packed), packed.shape[1]
    epilogue = Epilogue(bias).with_float32_bias()
    out = []
    for rows in _parts_of_rows(len(x)):
        x_q, scale = quantize_rows_unchecked(x[rows])
        product = _product_int32(_interleave(x_q, width), codes)
        out.append(_finish(product, scale, weight_scale, epilogue, rows, x.dtype))
        if x.device.type == "cpu":  # elsewhere a look at the values would stop the queue of launches
            check_finite_scale(scale, rows.start)
    return out[0] if len(out) == 1 else torch.cat(out)


def _linear_float_torch(x: Tensor, packed: Tensor, weight_scale: Tensor, epilogue: Epilogue) -> Tensor:
    """The layer on float rows in plain torch, on any device: float32 products of any of the dtypes."""
    codes, width = _unpack_interleaved(packed).to(torch.float32), packed.shape[1]
    epilogue = epilogue.with_float32_bias()
    out = []
    for rows in _parts_of_rows(len(x)):
        with torch.autocast(x.device.type, enabled=False):
            product = _interleave(x[rows].to(torch.float32), width) @ codes.T
        out.append(_finish(product, product.new_ones(len(product)), weight_scale, epilogue, rows, x.dtype))
    return out[0] if len(out) == 1 else torch.cat(out)


# --- Triton ----------------------------------------------------------------------------------------------

# Tile of outputs (rows of x, rows of the weight); groups of 128 values along K an iteration, at most; parts that
# K is split into, each summed by its own block; warps; pipeline stages. ``default_config`` chooses among them
# where no measurement is shipped for the chip and the shape.
CONFIG_FIELDS = ("BLOCK_M", "BLOCK_N", "GROUPS", "SPLIT_K", "num_warps", "num_stages")
CONFIGS = (
    (128, 128, 1, 1, 4, 3),
    (128, 128, 2, 1, 4, 3),
    (256, 128, 2, 1, 8, 3),
    (64, 128, 2, 1, 4, 3),
    (64, 64, 2, 1, 4, 3),
    (64, 64, 1, 4, 4, 4),
    (32, 64, 2, 1, 4, 3),
    (32, 64, 1, 4, 4, 4),
    (16, 64, 2, 1, 4, 3),
    (16, 64, 1, 8, 4, 4),
)
# More rows for the tuners. Which of them spill depends on the chip, and on what follows the product.
MORE_CONFIGS = (
    (128, 128, 1, 1, 4, 4),
    (128, 128, 1, 1, 8, 3),
    (128, 64, 2, 1, 4, 3),
    (128, 64, 1, 1, 4, 4),
    (64, 128, 1, 1, 4, 4),
    (64, 128, 2, 2, 4, 3),
    (64, 64, 2, 1, 4, 4),
    (64, 64, 1, 2, 4, 4),
    (32, 128, 2, 1, 4, 3),
    (32, 64, 2, 1, 4, 4),
    (32, 64, 1, 2, 4, 4),
    (16, 64, 2, 1, 4, 4),
    (16, 64, 1, 4, 4, 4),
)
# Rows that do not pay everywhere: two blocks an SM take 160 KiB; 208 KiB, and tiles for two warp groups.
_ONLY_ON = {CONFIGS[1]: (80, 87, 90, 100), CONFIGS[2]: (90,)}
_LARGEST_BLOCK_M = {1: 256, 2: 64, 4: 32}  # by bytes a value of x: registers, and tensor memory on sm_100
_ALIGNED_N = 16  # of a multiple of this, outputs move 16 bytes at a time; of others one by one, in more registers
_LARGEST_TILE_UNALIGNED = 64 * 64

# For predictions: int8 multiply-adds a clock of one multiprocessor's tensor cores by the instructions that Triton
# uses (from NVIDIA's data sheets; sm_100's, for instructions older than its own, is a guess), bytes a clock from
# the L2 cache to a multiprocessor, clocks from asking for bytes to having them.
_MACS_PER_CLOCK = {80: 2048, 86: 1024, 87: 2048, 89: 1024, 90: 4096, 100: 2048, 120: 1024}
_L2_BYTES_PER_CLOCK = 64
_LATENCY = 800


def cost(m: int, n: int, k: int, out_bytes: int = 2, *, residual: bool = False, x_bytes: int = 1) -> tuple[int, int]:
    """(operations, bytes moved at least) of one product and what follows it.

    A multiply-add counts as two operations; every tensor moves once: x with a float32 scale a row (if quantised),
    the packed weight with a float32 bias a row, the result and, where there is one, a residual of the same size.
    """
    n_bytes = m * k * x_bytes + n * (packed_width(k) + 4) + m * n * out_bytes * (1 + residual)
    return 2 * m * n * k, n_bytes + (4 * m if x_bytes == 1 else 0)


def configs_for(
    arch: int, x_bytes: int = 1, n: int = _ALIGNED_N, among: tuple[tuple[int, ...], ...] = CONFIGS
) -> tuple[tuple[int, ...], ...]:
    """The rows ``among`` these for compute capability ``arch`` (80 means sm_80), x of so many bytes a value and N."""
    largest_tile = _LARGEST_TILE_UNALIGNED if n % _ALIGNED_N else 1 << 30
    return tuple(
        row
        for row in among
        if row[0] <= _LARGEST_BLOCK_M[x_bytes]
        and row[0] * row[1] <= largest_tile
        and (row not in _ONLY_ON or arch in _ONLY_ON[row])
    )


def predicted_clocks(config: tuple[int, ...], arch: int, n_sms: int, m: int, n: int, k: int, x_bytes: int = 1) -> float:
    """Clocks that a product takes, *predicted*, to rank configurations where nothing was measured.

    A multiprocessor gets t = ceil(blocks / n_sms) blocks and holds r of them at once. A group of 128 values along
    K keeps its tensor cores busy for BLOCK_M * BLOCK_N * 128 * x_bytes / macs clocks, its port to the L2 cache for
    (128 * BLOCK_M * x_bytes + 32 * BLOCK_N) / 64, its integer units for 7 instructions every 16 weights and 24 a
    warp and iteration, and a block waits for it at least latency / (groups in flight). So the loop takes, if nothing
    overlaps, groups * max(t * (sum of the first three), ceil(t / r) * the last), and the result as long as 4 bytes a
    value through the same port. Splitting K adds a write, a read and two latencies.
    """
    block_m, block_n, groups_at_once, split_k, warps, stages = config
    blocks = -(-m // block_m) * -(-n // block_n) * split_k
    in_turn = -(-blocks // n_sms)
    at_once = max(min(32768 // (block_m * block_n), 4), 1)
    groups = -(-k // (GROUP * split_k))
    products = block_m * block_n * GROUP * x_bytes / _MACS_PER_CLOCK.get(arch, 2048)
    loads = (GROUP * block_m * x_bytes + GROUP_BYTES * block_n) / _L2_BYTES_PER_CLOCK
    unpacking = (block_n * GROUP * 7 / 16 + 24 * 32 * warps / groups_at_once) / 64  # 64 a clock
    waiting = _LATENCY / (groups_at_once * (stages - 1))
    loop = groups * max(in_turn * (products + loads + unpacking), -(-in_turn // at_once) * waiting)
    written = in_turn * block_m * block_n * 4 / _L2_BYTES_PER_CLOCK
    if split_k > 1:
        written += 2 * written + 2 * _LATENCY
    return _LATENCY + loop + written


def default_config(arch: int, n_sms: int, m: int, n: int, k: int, x_bytes: int = 1) -> tuple[int, ...]:
    """The row of ``CONFIGS`` with the fewest predicted clocks; what runs where nothing was measured."""
    rows = configs_for(arch, x_bytes, n)
    return min(rows, key=lambda row: predicted_clocks(row, arch, n_sms, m, n, k, x_bytes))


def shape_key(m: int, n: int, k: int, x_dtype: str, out_dtype: str) -> str:
    """Key of a shape among the tuned results; M is rounded up to a power of two."""
    return f"m{bucket(m)}_n{n}_k{k}_{x_dtype}_{out_dtype}"


@lru_cache(maxsize=4096)
def _rows_and_key(
    arch: int, n_sms: int, m: int, n: int, k: int, x_dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[tuple[tuple[int, ...], ...], str]:
    """What a launch looks up: rows that may run, the default first, and the key."""
    default = default_config(arch, n_sms, m, n, k, x_dtype.itemsize)
    key = shape_key(m, n, k, dtype_name(x_dtype), dtype_name(out_dtype))
    return (default, *configs_for(arch, x_dtype.itemsize, n, CONFIGS + MORE_CONFIGS)), key


@triton.jit
def _on_four_bytes(packed, PTX: tl.constexpr):
    """int8 tile from a uint8 tile, four neighbouring bytes in one register."""
    return tl.inline_asm_elementwise(PTX, "=r,r", [packed], tl.int8, is_pure=True, pack=4)


@triton.jit
def _to_four_halves(packed, SHIFT: tl.constexpr):
    """int16 tile from a uint8 tile: every byte becomes the upper half of its value, is shifted and masked."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 s, t; prmt.b32 s, $2, 0, 0x1404; prmt.b32 t, $2, 0, 0x3424; "
        + SHIFT
        + "and.b32 $0, s, 0xC000C000; and.b32 $1, t, 0xC000C000; }",
        "=r,=r,r",
        [packed],
        tl.int16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _unpack_plane(packed, PLANE: tl.constexpr, DTYPE: tl.constexpr, INLINE_ASM: tl.constexpr):
    """Tile of the codes in the bits 2 * PLANE and 2 * PLANE + 1 of a uint8 tile: int8 64 * code, or 2 * code of a
    float DTYPE.

    The pair becomes the top bits of its value, whatever the type: 01 and 11 there are 64 and -64 of an int8, and
    the sign and the highest bit of the exponent, 2.0 and -2.0, of every IEEE format and bfloat16. In PTX several
    values share one 32-bit register, and the mask clears the bits that the shift moves from one into the next.
    """
    if INLINE_ASM and DTYPE.is_int8():
        if PLANE == 0:
            plane = _on_four_bytes(packed, "{ .reg .b32 t; shl.b32 t, $1, 6; and.b32 $0, t, 0xC0C0C0C0; }")
        elif PLANE == 1:
            plane = _on_four_bytes(packed, "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xC0C0C0C0; }")
        elif PLANE == 2:
            plane = _on_four_bytes(packed, "{ .reg .b32 t; shl.b32 t, $1, 2; and.b32 $0, t, 0xC0C0C0C0; }")
        else:
            plane = _on_four_bytes(packed, "and.b32 $0, $1, 0xC0C0C0C0;")
    elif INLINE_ASM and DTYPE.primitive_bitwidth == 16:
        if PLANE == 0:
            halves = _to_four_halves(packed, "shl.b32 s, s, 6; shl.b32 t, t, 6; ")
        elif PLANE == 1:
            halves = _to_four_halves(packed, "shl.b32 s, s, 4; shl.b32 t, t, 4; ")
        elif PLANE == 2:
            halves = _to_four_halves(packed, "shl.b32 s, s, 2; shl.b32 t, t, 2; ")
        else:
            halves = _to_four_halves(packed, "")
        plane = halves.to(DTYPE, bitcast=True)
    elif DTYPE.is_int8():
        plane = ((packed << (6 - 2 * PLANE)) & 0xC0).to(DTYPE, bitcast=True)
    elif DTYPE.is_fp32():
        plane = ((packed.to(tl.uint32) << (30 - 2 * PLANE)) & 0xC0000000).to(DTYPE, bitcast=True)
    else:
        plane = ((packed.to(tl.uint16) << (14 - 2 * PLANE)) & 0xC000).to(DTYPE, bitcast=True)
    return plane


@triton.jit
def _store_outputs(
    total,  # int32 or float32 tile [rows_n, rows_m] of sums, times 64 or 2
    rows_m,
    rows_n,
    scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    stride_residual,
    scaled_columns,
    column_scale,
    GELU: tl.constexpr,
    SCALED: tl.constexpr,
):
    """All that follows the product, on a tile that fits the registers next to the residual and the result."""
    mask = (rows_m < M)[None, :] & (rows_n < N)[:, None]
    out_tile = out_ptr + rows_m.to(tl.int64)[None, :] * N + rows_n[:, None]
    if weight_scale_ptr is None:
        tl.store(out_tile, total >> 6, mask=mask)  # exact: every term is a multiple of 64
    else:
        # The factor of the unpacked codes goes into the scale, where it is exact.
        if scale_ptr is None:
            out = total * (tl.load(weight_scale_ptr) * 0.5)
        else:
            row_scale = tl.load(scale_ptr + rows_m % M) * tl.load(weight_scale_ptr) * 0.015625
            out = total.to(tl.float32) * row_scale[None, :]
        if bias_ptr is not None:
            out += tl.load(bias_ptr + rows_n % N).to(tl.float32)[:, None]
        if GELU:
            out = gelu_in_registers(out)
        if SCALED:
            out *= tl.where(rows_n < scaled_columns, column_scale, 1.0)[:, None]
        if residual_ptr is not None:
            residual_tile = residual_ptr + rows_m.to(tl.int64)[None, :] * stride_residual + rows_n[:, None]
            out += tl.load(residual_tile, mask=mask).to(tl.float32)
        tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_tile(
    total,  # as in _store_outputs, BLOCK_M columns wide
    start_m,
    rows_n,
    scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    stride_residual,
    scaled_columns,
    column_scale,
    GELU: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``_store_outputs`` of a tile of any size; a large one in two halves, each thread's own, or registers spill."""
    # fmt: off
    if BLOCK_M < 128:
        rows_m = start_m + tl.arange(0, BLOCK_M)
        _store_outputs(total, rows_m, rows_n, scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, out_ptr, M, N,
                       stride_residual, scaled_columns, column_scale, GELU, SCALED)
    else:
        HALF: tl.constexpr = BLOCK_M // 2
        low, high = tl.split(tl.permute(tl.reshape(total, (BLOCK_N, 2, HALF)), (0, 2, 1)))
        rows_m = start_m + tl.arange(0, HALF)
        _store_outputs(low, rows_m, rows_n, scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, out_ptr, M, N,
                       stride_residual, scaled_columns, column_scale, GELU, SCALED)
        _store_outputs(high, rows_m + HALF, rows_n, scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, out_ptr, M, N,
                       stride_residual, scaled_columns, column_scale, GELU, SCALED)
    # fmt: on


@triton.jit
def _ternary_matmul_kernel(
    x_ptr,  # int8, fp16, bf16 or fp32 [M, 128 * n_groups], rows contiguous, zero where K ends earlier
    packed_ptr,  # uint8 [N, 32 * n_groups], contiguous
    scale_ptr,  # float32 [M]; None if x is float, or for int32 out
    weight_scale_ptr,  # float32 [1]; None for int32 out
    bias_ptr,  # any float [N], or None
    residual_ptr,  # any float [M, N], rows contiguous, or None
    out_ptr,  # int32 or any float [M, N], contiguous
    parts_ptr,  # int32 (x int8) or float32 [tiles, SPLIT_K, BLOCK_N, BLOCK_M], any values; None unless K is split
    arrived_ptr,  # int32 [tiles], zero before and after; None unless K is split
    M,
    N,
    stride_x,  # of a row, in elements
    stride_residual,
    n_groups,  # of 128 values along K; a multiple of GROUPS
    scaled_columns,  # the first so many columns of out are multiplied by column_scale
    column_scale,
    GELU: tl.constexpr,
    SCALED: tl.constexpr,  # whether there are scaled columns
    INLINE_ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    # out^T [N, M] = codes [N, K] @ x^T [K, M]: with the weights as the A operand each warp owns its weight
    # rows and unpacks every weight once. GROUPS groups an iteration, one product a plane of a group.
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SUM: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    # Neighbouring blocks share rows of x, which pass through the caches once; the packed weight stays there.
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    start_m = (tile // tiles_n) * BLOCK_M
    rows_m = start_m + tl.arange(0, BLOCK_M)
    rows_n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, 32)
    # Rows past the end wrap round, so that they need no mask; what they give is not stored.
    x_tile = x_ptr + (rows_m % M).to(tl.int64)[None, :] * stride_x + byte[:, None]
    packed_tile = packed_ptr + (rows_n % N).to(tl.int64)[:, None] * (n_groups * 32) + byte[None, :]
    first_group = 0
    end_group = n_groups
    if SPLIT_K > 1:
        share = tl.cdiv(n_groups, SPLIT_K * GROUPS) * GROUPS
        first_group = tl.program_id(1) * share
        end_group = tl.minimum(first_group + share, n_groups)
        x_tile += first_group * 128
        packed_tile += first_group * 32
    total = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    for _ in range(first_group, end_group, GROUPS):
        for group in tl.static_range(GROUPS):
            packed = tl.load(packed_tile + group * 32)
            for plane in tl.static_range(4):
                codes = _unpack_plane(packed, plane, DTYPE, INLINE_ASM)
                x = tl.load(x_tile + group * 128 + plane * 32)
                if DTYPE.is_bf16() and not INLINE_ASM:  # numpy, where the interpreter computes, has no bf16
                    codes, x = codes.to(tl.float32), x.to(tl.float32)
                # tf32x3, for fp32: both sides are split into parts that tf32 holds; codes are exact.
                total = tl.dot(codes, x, total, input_precision="tf32x3", out_dtype=SUM)
        x_tile += 128 * GROUPS
        packed_tile += 32 * GROUPS
    # fmt: off
    if SPLIT_K == 1:
        _store_tile(total, start_m, rows_n, scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, out_ptr, M, N,
                    stride_residual, scaled_columns, column_scale, GELU, SCALED, BLOCK_M, BLOCK_N)
    else:
        # Every block leaves its part; the last to arrive adds them up, always in the same order.
        within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        parts = parts_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_N * BLOCK_M) + within
        tl.store(parts + tl.program_id(1) * (BLOCK_N * BLOCK_M), total, cache_modifier=".cg")
        tl.debug_barrier()  # all threads have stored before one tells
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1:
            tl.store(arrived_ptr + tile, 0)  # clean for the next launch
            total = tl.load(parts, cache_modifier=".cg")
            for part in range(1, SPLIT_K):
                total += tl.load(parts + part * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            _store_tile(total, start_m, rows_n, scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, out_ptr, M, N,
                        stride_residual, scaled_columns, column_scale, GELU, SCALED, BLOCK_M, BLOCK_N)
    # fmt: on


def _that_divides(config: tuple[int, ...], n_groups: int, dtype: torch.dtype) -> tuple[int, ...]:
    """``config`` with one group an iteration where its own number does not divide them, and for floats."""
    if dtype == torch.int8 and n_groups % config[2] == 0:
        return config
    return (*config[:2], 1, *config[3:])


_arrival_counters: dict[tuple[torch.device, int], Tensor] = {}


def _zeroed_counters(device: torch.device, n: int) -> Tensor:
    """At least n int32 zeros, to be left as zeros: kept for each stream, whose launches follow each other.

    A CUDA graph may be replayed on any stream, so one that is being captured gets its own, and zeroes them.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(n, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _arrival_counters or len(_arrival_counters[key]) < n:
        _arrival_counters[key] = torch.zeros(max(n, 1024), dtype=torch.int32, device=device)
    return _arrival_counters[key]


def _launch_ternary_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    weight_scale: Tensor | None,
    epilogue: Epilogue,
    out_dtype: torch.dtype,
    config: tuple[int, ...] | None = None,
) -> Tensor:
    """One launch: x int8 with ``scale`` or float without; int32 sums without ``weight_scale``."""
    (m, k), n = x.shape, packed.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0 or n == 0:
        return out
    packed = _aligned(packed)
    n_groups = packed.shape[1] // GROUP_BYTES
    # The kernel has no masks along K and loads 16 bytes at a time.
    if k % GROUP or x.stride(1) != 1 or x.stride(0) % 16 or x.data_ptr() % 16:
        x = torch.nn.functional.pad(x, (0, GROUP * n_groups - k)).contiguous()
    bias, residual = epilogue.bias, epilogue.residual
    if residual is not None:
        apart = residual.stride(1) != 1 or residual.stride(0) % _ALIGNED_N or residual.data_ptr() % 16
        if apart and (n % _ALIGNED_N == 0 or residual.stride(1) != 1):
            residual = residual.clone(memory_format=torch.contiguous_format)
    if config is None:
        arch = arch_of(x.device) or 80
        rows, key = _rows_and_key(arch, n_sms(x.device), m, n, k, x.dtype, out_dtype)
        config = lookup("ternary_matmul", arch, key, rows, device=x.device)
    options: dict[str, Any] = dict(zip(CONFIG_FIELDS, _that_divides(config, n_groups, x.dtype), strict=True))
    tiles = triton.cdiv(m, options["BLOCK_M"]) * triton.cdiv(n, options["BLOCK_N"])
    parts = arrived = None
    if options["SPLIT_K"] > 1:
        part = (options["SPLIT_K"], options["BLOCK_N"], options["BLOCK_M"])
        parts = torch.empty(
            (tiles, *part), dtype=torch.int32 if x.dtype == torch.int8 else torch.float32, device=x.device
        )
        arrived = _zeroed_counters(x.device, tiles)
    with on_device_of(x):
        _ternary_matmul_kernel[tiles, options["SPLIT_K"]](
            x,
            packed,
            None if scale is None else scale.contiguous(),
            weight_scale,
            None if bias is None else bias.contiguous(),
            residual,
            out,
            parts,
            arrived,
            m,
            n,
            x.stride(0),
            n if residual is None else residual.stride(0),
            n_groups,
            epilogue.scaled_columns,
            epilogue.column_scale,
            GELU=epilogue.gelu,
            SCALED=epilogue.scaled_columns > 0,
            INLINE_ASM=x.is_cuda,
            **options,
        )
    return out


def specimen(
    config: tuple[int, ...] = CONFIGS[0],
    *,
    x: str = "i8",
    out: str = "fp16",
    bias: bool = True,
    gelu: bool = False,
    residual: bool = False,
    scaled: bool = False,
    aligned_n: bool = True,
    inline_asm: bool = True,
) -> Specimen:
    """The kernel as the launcher would specialise it, for compiling ahead of time.

    Args:
        config: a row of ``CONFIGS``.
        x, out: Triton's names of types; ``out`` is i32 for the product alone.
        bias, gelu, residual, scaled: what follows it; a residual has the type of ``out``.
        aligned_n: N is a multiple of 16.
        inline_asm: as on a GPU; False for what the interpreter runs.
    """
    options = dict(zip(CONFIG_FIELDS, config, strict=True))
    if x != "i8":
        options["GROUPS"] = 1
    sums = "*i32" if x == "i8" else "*fp32"
    raw, split = out == "i32", options["SPLIT_K"] > 1
    pointers = {
        "x_ptr": f"*{x}",
        "packed_ptr": "*u8",
        "scale_ptr": "*fp32" if x == "i8" and not raw else None,
        "weight_scale_ptr": None if raw else "*fp32",
        "bias_ptr": "*fp32" if bias and not raw else None,
        "residual_ptr": f"*{out}" if residual else None,
        "out_ptr": f"*{out}",
        "parts_ptr": sums if split else None,
        "arrived_ptr": "*i32" if split else None,
    }
    signature = {name: kind for name, kind in pointers.items() if kind is not None}
    signature |= dict.fromkeys(("M", "N", "stride_x", "stride_residual", "n_groups", "scaled_columns"), "i32")
    signature["column_scale"] = "fp32"
    constants: dict[str, Any] = {name: None for name, kind in pointers.items() if kind is None}
    constants |= {"GELU": gelu, "SCALED": scaled, "INLINE_ASM": inline_asm}
    constants |= {name: options[name] for name in ("BLOCK_M", "BLOCK_N", "GROUPS", "SPLIT_K")}
    unaligned = ("M", "n_groups", "column_scale") + (() if aligned_n else ("N", "stride_residual", "scaled_columns"))
    shown = {**options, "x": x, "out": out, "bias": bias and not raw, "gelu": gelu, "residual": residual}
    return Specimen(
        "ternary_matmul",
        {**shown, "scaled": scaled},
        _ternary_matmul_kernel,
        signature,
        constants,
        {name: options[name] for name in ("num_warps", "num_stages")},
        unaligned,
    )


def specimens(arch: int) -> list[Specimen]:
    """Every configuration for compute capability ``arch`` (80 means sm_80) with a residual, the largest register
    taker; the other layers of a ternary block on the tiles that they use; int32 sums; float activations."""
    found = [specimen(row, residual=True) for row in configs_for(arch)]
    for row in (CONFIGS[0], CONFIGS[4]):
        found.append(specimen(row, bias=False, scaled=True))
        found.append(specimen(row, gelu=True))
    found.append(specimen(out="i32"))
    found.append(specimen(CONFIGS[3], x="fp16", gelu=True))
    found.append(specimen(CONFIGS[3], x="bf16", out="bf16", residual=True))
    found.append(specimen(CONFIGS[6], x="fp32", out="fp32", residual=True))
    return found


# --- tuning ----------------------------------------------------------------------------------------------


def _by_code(arch: int, sizes: Sizes) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Rows that may run a problem by what they come to; of those of the same code the first."""
    x_dtype, n_groups = DTYPES[sizes["x"]], -(-sizes["k"] // GROUP)
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    for row in configs_for(arch, x_dtype.itemsize, sizes["n"], CONFIGS + MORE_CONFIGS):
        found.setdefault(_that_divides(row, n_groups, x_dtype), row)
    return found


def _default(arch: int, n_sms: int, sizes: Sizes) -> tuple[int, ...]:
    x_dtype, n_groups = DTYPES[sizes["x"]], -(-sizes["k"] // GROUP)
    row = default_config(arch, n_sms, sizes["m"], sizes["n"], sizes["k"], x_dtype.itemsize)
    return _by_code(arch, sizes)[_that_divides(row, n_groups, x_dtype)]


def _works(arch: int, n_sms: int, sizes: Sizes, config: tuple[int, ...]) -> list[Work]:
    m, n, k, x_dtype = sizes["m"], sizes["n"], sizes["k"], DTYPES[sizes["x"]]
    n_groups = -(-k // GROUP)
    block_m, block_n, groups, split_k, *_ = config = _that_divides(config, n_groups, x_dtype)
    operations, n_bytes = cost(
        m, n, k, DTYPES[sizes["out"]].itemsize, residual=sizes["residual"], x_bytes=x_dtype.itemsize
    )
    code = specimen(
        config,
        x=TRITON_NAMES[sizes["x"]],
        out=TRITON_NAMES[sizes["out"]],
        bias=sizes["bias"],
        gelu=sizes["gelu"],
        residual=sizes["residual"],
        scaled=sizes["scaled"],
        aligned_n=n % _ALIGNED_N == 0,
    )
    tiles = -(-m // block_m) * -(-n // block_n)
    if split_k > 1:  # every part is written and read once; it stays in the L2 cache, which the code's loads count
        n_bytes += 4 * n * sizes["m"]
    return [
        Work(
            code,
            blocks=tiles * split_k,
            iterations=-(-n_groups // (groups * split_k)),
            macs=block_m * block_n * GROUP * groups,
            operations=operations,
            n_bytes=n_bytes,
            dtype={"int8": "int8", "float32": "tf32"}.get(sizes["x"], "fp16"),
        )
    ]


def _trial(sizes: Sizes, device: torch.device) -> Trial:
    m, n, k, out_dtype = sizes["m"], sizes["n"], sizes["k"], DTYPES[sizes["out"]]
    random = seeded(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    packed = pack_ternary(torch.randint(-1, 2, (n, k), generator=random, device=device, dtype=torch.int8))
    weight_scale = torch.full((), k**-0.5, device=device)
    scale = None
    x = normal(m, k)
    if sizes["x"] == "int8":
        x, scale = torch.clamp(x * 40, -127, 127).to(torch.int8), normal(m).abs() * 0.02 + 0.005
    else:
        x = x.to(DTYPES[sizes["x"]])
    residual = normal(m, n).to(out_dtype) if sizes["residual"] else None
    scaled = n // 3 // _ALIGNED_N * _ALIGNED_N if sizes["scaled"] else 0
    epilogue = Epilogue(normal(n) if sizes["bias"] else None, sizes["gelu"], residual, scaled, 0.125)

    def expected() -> tuple[Tensor, ...]:
        parts = []
        for start in range(0, m, _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            parts.append(
                ternary_linear_reference(
                    x[rows],
                    1.0 if scale is None else scale[rows].to(torch.float64),
                    packed,
                    weight_scale.to(torch.float64),
                    epilogue.bias,
                    gelu=epilogue.gelu,
                    residual=None if residual is None else residual[rows],
                    scaled_columns=scaled,
                    column_scale=epilogue.column_scale,
                ).to(torch.float32)
            )
        return (torch.cat(parts),)

    def run(config: tuple[int, ...]) -> tuple[Tensor, ...]:
        return (_launch_ternary_matmul(x, packed, scale, weight_scale, epilogue, out_dtype, config),)

    tolerance = max(TOLERANCES[sizes["out"]], TOLERANCES["float32"])
    return Trial(run, expected, rtol=tolerance, atol=tolerance)


def tunables() -> list[Tunable]:
    """The product. A problem: ``m, n, k``, dtypes ``x`` and ``out``, and what follows: ``bias, gelu, residual,
    scaled``."""
    return [
        Tunable(
            name="ternary_matmul",
            module="ternary_matmul",
            on="cuda",
            fields=CONFIG_FIELDS,
            key=lambda sizes: shape_key(sizes["m"], sizes["n"], sizes["k"], sizes["x"], sizes["out"]),
            space=lambda arch, sizes: tuple(_by_code(arch, sizes).values()),
            default=_default,
            works=_works,
            trial=_trial,
        )
    ]


# --- torch operators -------------------------------------------------------------------------------------


def _runs_native(operation: str, dtype: torch.dtype, x_q: Tensor, packed: Tensor) -> bool:
    """Whether the C++ kernels run this operation; plain torch does what they do not take, and what is empty."""
    chosen = backend_for(x_q) == "native" and native.supports(operation, dtype)
    return chosen and x_q.numel() > 0 and packed.numel() > 0


@torch.library.custom_op("tetra::ternary_matmul_int32", mutates_args=())
def _ternary_matmul_int32_op(x_q: Tensor, packed: Tensor) -> Tensor:
    if _runs_native("ternary_matmul_int32", torch.int8, x_q, packed):
        return native.ternary_matmul_int32(x_q, packed)
    if backend_for(x_q) in ("torch", "native"):
        return _matmul_torch(x_q, packed)
    return _launch_ternary_matmul(x_q, packed, None, None, Epilogue(), torch.int32)


@_ternary_matmul_int32_op.register_fake
def _(x_q: Tensor, packed: Tensor) -> Tensor:
    return x_q.new_empty((x_q.shape[0], packed.shape[0]), dtype=torch.int32)


@torch.library.custom_op("tetra::ternary_linear_int8", mutates_args=())
def _ternary_linear_int8_op(
    x_q: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    residual: Tensor | None,
    scaled_columns: int,
    column_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    epilogue = Epilogue(bias, gelu, residual, scaled_columns, column_scale)
    if _runs_native("ternary_linear", out_dtype, x_q, packed):
        return native.ternary_linear(x_q, scale, packed, weight_scale, *epilogue, out_dtype)
    if backend_for(x_q) in ("torch", "native"):
        return _linear_int8_torch(x_q, scale, packed, weight_scale, epilogue, out_dtype)
    return _launch_ternary_matmul(x_q, packed, scale, weight_scale, epilogue, out_dtype)


@_ternary_linear_int8_op.register_fake
def _(
    x_q: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    residual: Tensor | None,
    scaled_columns: int,
    column_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    return x_q.new_empty((x_q.shape[0], packed.shape[0]), dtype=out_dtype)


@torch.library.custom_op("tetra::ternary_linear", mutates_args=())
def _ternary_linear_op(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    backend = backend_for(x)
    if backend == "torch" or (backend == "native" and not native.supports("ternary_linear", x.dtype)):
        return _linear_torch(x, packed, weight_scale, bias)
    x_q, scale = quantize_rows_unchecked(x)
    if x.device.type == "cpu":  # elsewhere a look at the values would stop the queue of launches
        check_finite_scale(scale)
    dtype = x.dtype if x.dtype in OUT_DTYPES else torch.float32
    return _ternary_linear_int8_op(x_q, scale, packed, weight_scale, bias, False, None, 0, 1.0, dtype).to(x.dtype)


@_ternary_linear_op.register_fake
def _(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


@torch.library.custom_op("tetra::ternary_linear_float", mutates_args=())
def _ternary_linear_float_op(
    x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None
) -> Tensor:
    epilogue = Epilogue(bias, gelu, residual)
    if backend_for(x) in ("torch", "native"):
        return _linear_float_torch(x, packed, weight_scale, epilogue)
    return _launch_ternary_matmul(x, packed, None, weight_scale, epilogue, x.dtype)


@_ternary_linear_float_op.register_fake
def _(
    x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


# --- public ----------------------------------------------------------------------------------------------


def ternary_matmul_int32(x_q: Tensor, packed: Tensor) -> Tensor:
    """x_q int8 [M, K] times the packed ternary weight (uint8 [N, P]), transposed: int32 [M, N], exact.

    K has to be one that P packs (P = 32 * ceil(K / 128)). M, N may be 0; inputs need not be contiguous.
    """
    _check_codes(x_q)
    if x_q.ndim != 2:
        raise ValueError(f"x_q: shape is {tuple(x_q.shape)}, wanted [M, K]")
    _check_product("x_q", x_q, packed)
    return _ternary_matmul_int32_op(x_q, packed)


def ternary_linear_int8(
    x_q: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: float | Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    scaled_columns: int = 0,
    column_scale: float = 1.0,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """A linear layer on quantised rows, and what follows it: x_q int8 [..., K] -> [..., N] in ``out_dtype``.

    Inference only: there is no gradient. All that follows the exact int32 product is done in float32 and
    rounded once, in this order.

    Args:
        x_q, scale: from ``quantize_rows`` or ``norm_quantize``; scale is float32 [...].
        packed: uint8 [N, P], from ``pack_ternary``.
        weight_scale: the value of a code of 1; a float, or a tensor with one element.
        bias: any float [N], added.
        gelu: apply the exact GELU.
        scaled_columns, column_scale: the first ``scaled_columns`` of the N columns are multiplied by it.
        residual: any float [..., N], added.
        out_dtype: float16, bfloat16 or float32.
    """
    _check_codes(x_q)
    if x_q.ndim == 0:
        raise ValueError("x_q: is a scalar, wanted [..., K]")
    _check_product("x_q", x_q, packed)
    n = packed.shape[0]
    if scale.dtype != torch.float32:
        raise TypeError(f"scale: dtype is {scale.dtype}, wanted torch.float32 (see quantize_rows)")
    if scale.shape != x_q.shape[:-1]:
        raise ValueError(
            f"scale: shape is {tuple(scale.shape)}, wanted {tuple(x_q.shape[:-1])}, one value a row of x_q"
        )
    _check_device("scale", scale, "x_q", x_q)
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"out_dtype: is {out_dtype}, wanted torch.float16, torch.bfloat16 or torch.float32")
    if not 0 <= scaled_columns <= n:
        raise ValueError(f"scaled_columns: is {scaled_columns}, wanted 0 to {n}, the rows of the weight")
    _check_bias("x_q", x_q, bias, n)
    _check_residual("x_q", x_q, residual, n)
    rows = x_q.reshape(-1, x_q.shape[-1])
    return _ternary_linear_int8_op(
        rows,
        scale.reshape(-1),
        packed,
        _as_scalar("x_q", x_q, weight_scale),
        bias,
        gelu,
        None if residual is None else residual.reshape(rows.shape[0], n),
        scaled_columns,
        float(column_scale),
        out_dtype,
    ).view(*x_q.shape[:-1], n)


def ternary_linear(x: Tensor, packed: Tensor, weight_scale: float | Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer with a packed ternary weight: x float [..., K] -> [..., N] in x.dtype.

    Inference only: there is no gradient. ``weight_scale`` is the value of a code of 1 (a float, or a tensor
    with one element); ``bias`` is [N] of any floating dtype. Rows are quantised to int8, the product is exact
    in int32, scales and bias are applied in float32.
    """
    _check_floats(x)
    _check_product("x", x, packed)
    n = packed.shape[0]
    _check_bias("x", x, bias, n)
    rows = x.reshape(-1, x.shape[-1])
    return _ternary_linear_op(rows, packed, _as_scalar("x", x, weight_scale), bias).view(*x.shape[:-1], n)


def ternary_linear_float(
    x: Tensor,
    packed: Tensor,
    weight_scale: float | Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer with a packed ternary weight and activations that are not quantised.

    x float16, bfloat16 or float32 [..., K] -> [..., N] in x.dtype. Products are summed, and all that follows
    is done, in float32, rounded once. Arguments as in ``ternary_linear_int8``.
    """
    _check_floats(x)
    if x.dtype not in OUT_DTYPES:
        raise TypeError(f"x: dtype is {x.dtype}, wanted torch.float16, torch.bfloat16 or torch.float32")
    _check_product("x", x, packed)
    n = packed.shape[0]
    _check_bias("x", x, bias, n)
    _check_residual("x", x, residual, n)
    rows = x.reshape(-1, x.shape[-1])
    flat_residual = None if residual is None else residual.reshape(rows.shape[0], n)
    scalar = _as_scalar("x", x, weight_scale)
    return _ternary_linear_float_op(rows, packed, scalar, bias, gelu, flat_residual).view(*x.shape[:-1], n)


def _check_codes(x_q: Tensor) -> None:
    if x_q.dtype != torch.int8:
        raise TypeError(f"x_q: dtype is {x_q.dtype}, wanted torch.int8 (see quantize_rows)")


def _check_floats(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: dtype is {x.dtype}, wanted a floating dtype")
    if x.ndim == 0:
        raise ValueError("x: is a scalar, wanted [..., K]")


def _check_device(name: str, tensor: Tensor, x_name: str, x: Tensor) -> None:
    if x.device != tensor.device:
        raise ValueError(f"{name}: is on {tensor.device}, but {x_name} is on {x.device}; move one of them")


def _check_bias(x_name: str, x: Tensor, bias: Tensor | None, n: int) -> None:
    if bias is None:
        return
    if not bias.is_floating_point():
        raise TypeError(f"bias: dtype is {bias.dtype}, wanted a floating dtype")
    if bias.shape != (n,):
        raise ValueError(f"bias: shape is {tuple(bias.shape)}, wanted ({n},), one value a row of the weight")
    _check_device("bias", bias, x_name, x)


def _check_residual(x_name: str, x: Tensor, residual: Tensor | None, n: int) -> None:
    if residual is None:
        return
    if not residual.is_floating_point():
        raise TypeError(f"residual: dtype is {residual.dtype}, wanted a floating dtype")
    if residual.shape != (*x.shape[:-1], n):
        raise ValueError(f"residual: shape is {tuple(residual.shape)}, wanted {(*x.shape[:-1], n)}, that of the result")
    _check_device("residual", residual, x_name, x)


def _as_scalar(x_name: str, x: Tensor, weight_scale: float | Tensor) -> Tensor:
    """weight_scale as a float32 tensor [] on the device of x."""
    if not isinstance(weight_scale, Tensor):
        try:
            return torch.full((), weight_scale, dtype=torch.float32, device=x.device)
        except (TypeError, RuntimeError):
            raise ValueError(f"weight_scale: is {weight_scale!r}, wanted a number that float32 holds") from None
    if weight_scale.numel() != 1:
        raise ValueError(f"weight_scale: shape is {tuple(weight_scale.shape)}, wanted one element")
    if not weight_scale.is_floating_point():
        raise TypeError(f"weight_scale: dtype is {weight_scale.dtype}, wanted a floating dtype")
    _check_device("weight_scale", weight_scale, x_name, x)
    return weight_scale.reshape(()).to(torch.float32)


def _check_product(name: str, x: Tensor, packed: Tensor) -> None:
    """What every product checks: forms only, no values, so it costs nothing and waits for no device."""
    _check_packed_form(packed)
    k = x.shape[-1]
    if k == 0:
        raise ValueError(f"{name}: shape {tuple(x.shape)} has no values in its last dimension; wanted K >= 1")
    if k > MAX_K:
        raise ValueError(f"{name}: K = {k} could overflow 32-bit sums; wanted at most {MAX_K}")
    if packed_width(k) != packed.shape[1]:
        raise ValueError(
            f"{name}: {k} values a row take {packed_width(k)} packed bytes, but packed has {packed.shape[1]}"
        )
    _check_device("packed", packed, name, x)
