"""Products of int8 activations with ternary weights that stay packed at 2 bits.

Contract
    letters: M rows (tokens), K inputs, N outputs, P = 32 * ceil(K / 128) packed bytes a weight row
    pack_ternary(codes int8 [N, K] in {-1, 0, 1}) -> uint8 [N, P]
    unpack_ternary(packed uint8 [N, P], k) -> int8 [N, k]
    ternary_matmul_int32(x_q int8 [M, K], packed) -> int32 [M, N] = x_q @ codes.T, exact on every backend
    ternary_linear(x float [..., K], packed, weight_scale, bias [N] | None) -> [..., N] in x.dtype
        = (x_q @ codes.T) * (scale * weight_scale) + bias,
        where (x_q, scale) = quantize_rows(x) and weight = codes * weight_scale

Layout of ``packed``
    A value is two bits, two's complement: 00 = 0, 01 = +1, 11 = -1. 10 is illegal: ``pack_ternary`` never
    writes it, ``unpack_ternary`` and ``check_packed`` refuse it (the products trust a weight that was checked
    when it was loaded). Rows are padded to a multiple of 128 values with 00. A group of 128 values takes 32
    bytes; byte i of a group holds the values i, 32 + i, 64 + i and 96 + i in its bits 0-1, 2-3, 4-5 and 6-7.
    So one [N, 32] byte tile gives four int8 planes, each contiguous along K, by a shift and a mask.

Errors
    TypeError for a wrong dtype, ValueError for shapes that do not fit, for illegal codes and for K > MAX_K,
    beyond which 32 bits could overflow in the compiled kernel. NaN or infinity in ``x`` of ``ternary_linear``
    is a ValueError on the CPU; on other devices, where looking would stop the queue of launches, it makes
    that row of the result non-finite.

Source of the arithmetic: TeTRA (arXiv 2503.02511), inference of a ternary layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tetra.autotune.table import lookup
from tetra.kernels.backend import arch_of, backend_for, on_device_of, tl, triton
from tetra.kernels.row_quantize import check_finite_scale, quantize_rows_unchecked

GROUP = 128  # values along K that are packed together
GROUP_BYTES = 32
PLANES = 4  # values a byte
UNPACKED_ONE = 64  # what the Triton kernel's planes hold for a code of +1
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
    return codes.view(n, packed.shape[1] * PLANES)[:, :k].contiguous()


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
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


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
    """product int32 [M, N] * (scale [M] * weight_scale) + bias [N], in float32."""
    row_scale = (scale * weight_scale).unsqueeze(-1)
    out = product.to(torch.float32)
    return out.mul_(row_scale) if bias is None else torch.addcmul(bias, out, row_scale, out=out)


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


def _interleave(x_q: Tensor, width: int) -> Tensor:
    """[M, K] in the order of ``_unpack_interleaved``, padded with zeros to [M, 4 width].

    The products do not care about the order along K, and the activations are cheaper to reorder than the
    weights: there are fewer of them. Two neighbours move together, as one int16.
    """
    m, k = x_q.shape
    x_q = torch.nn.functional.pad(x_q, (0, PLANES * width - k)) if k < PLANES * width else _aligned(x_q)
    planes = x_q.view(torch.int16).view(m * (width // GROUP_BYTES), PLANES, GROUP_BYTES // 2)
    return torch.stack(planes.unbind(1), dim=-1).view(torch.int8).view(m, PLANES * width)


@cache
def _has_int8_dot_product() -> bool:
    """Whether ``torch._int_mm`` runs on vector instructions here; elsewhere a float32 product is faster."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(supported and supported())


def _product_in_floats(x_q: Tensor, codes: Tensor) -> Tensor:
    """x_q int8 [M, K] @ codes int8 [N, K].T -> int32 [M, N], exact, on any machine."""
    # Sums of K <= 131072 products of at most 128 are whole numbers up to 2^24, which float32 holds exactly.
    dtype = torch.float32 if x_q.shape[1] * 128 <= 1 << 24 else torch.float64
    return (x_q.to(dtype) @ codes.to(dtype).T).to(torch.int32)


def _product_int32(x_q: Tensor, codes: Tensor) -> Tensor:
    """The same, by the fastest way on this machine."""
    if x_q.device.type == "cpu" and _has_int8_dot_product() and x_q.numel() and codes.numel():
        return torch._int_mm(x_q, codes.T)
    return _product_in_floats(x_q, codes)


def _split_rows(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of about equal size, of at most ``_ROWS_AT_A_TIME`` rows."""
    n_parts = max(-(-len(x) // _ROWS_AT_A_TIME), 1)
    return x.split(max(-(-len(x) // n_parts), 1))


def _matmul_torch(x_q: Tensor, packed: Tensor) -> Tensor:
    """The exact product in plain torch, on any device."""
    codes, width = _unpack_interleaved(packed), packed.shape[1]
    parts = [_product_int32(_interleave(part, width), codes) for part in _split_rows(x_q)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _linear_torch(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The layer in plain torch, on any device."""
    codes, width = _unpack_interleaved(packed), packed.shape[1]
    bias = None if bias is None else bias.to(torch.float32)
    parts = []
    for part in _split_rows(x):
        x_q, scale = quantize_rows_unchecked(part)
        product = _product_int32(_interleave(x_q, width), codes)
        parts.append(dequantize(product, scale, weight_scale, bias).to(x.dtype))
        if x.device.type == "cpu":  # elsewhere a look at the values would stop the queue of launches
            check_finite_scale(scale)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# --- Triton ----------------------------------------------------------------------------------------------

# Tile of outputs (rows of x, rows of the weight), warps, pipeline stages. The first row is what runs when
# nothing better is known for the chip and the shape.
CONFIG_FIELDS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
CONFIGS = (
    (128, 128, 4, 3),
    (128, 64, 4, 3),
    (64, 64, 4, 4),
    (32, 64, 4, 4),
    (16, 64, 4, 4),
)


def cost(m: int, n: int, k: int, out_bytes: int = 2) -> tuple[int, int]:
    """(integer operations, bytes moved at least) of one product.

    A multiply-add counts as two operations; every tensor moves once.
    """
    return 2 * m * n * k, m * k + n * packed_width(k) + m * n * out_bytes


@triton.jit
def _on_four_bytes(packed, PTX: tl.constexpr):
    """int8 tile from a uint8 tile, four neighbouring bytes in one register."""
    return tl.inline_asm_elementwise(PTX, "=r,r", [packed], tl.int8, is_pure=True, pack=4)


@triton.jit
def _unpack_plane(packed, PLANE: tl.constexpr, INLINE_ASM: tl.constexpr):
    """int8 tile of 64 * code from the bits 2 * PLANE and 2 * PLANE + 1 of a uint8 tile.

    The pair becomes the top bits of its byte. In PTX four bytes share one 32-bit register, and the mask
    clears the bits that the shift moves from one byte into the next.
    """
    if INLINE_ASM:
        if PLANE == 0:
            plane = _on_four_bytes(packed, "{ .reg .b32 t; shl.b32 t, $1, 6; and.b32 $0, t, 0xC0C0C0C0; }")
        elif PLANE == 1:
            plane = _on_four_bytes(packed, "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xC0C0C0C0; }")
        elif PLANE == 2:
            plane = _on_four_bytes(packed, "{ .reg .b32 t; shl.b32 t, $1, 2; and.b32 $0, t, 0xC0C0C0C0; }")
        else:
            plane = _on_four_bytes(packed, "and.b32 $0, $1, 0xC0C0C0C0;")
    else:
        plane = ((packed << (6 - 2 * PLANE)) & 0xC0).to(tl.int8, bitcast=True)
    return plane


@triton.jit
def _ternary_matmul_kernel(
    x_ptr,  # int8 [M, 128 * n_groups], rows contiguous, zero where K ends earlier
    packed_ptr,  # uint8 [N, 32 * n_groups], contiguous
    scale_ptr,  # float32 [M]; unused if RAW
    weight_scale_ptr,  # float32 [1]; unused if RAW
    bias_ptr,  # [N], any float; unused unless HAS_BIAS
    out_ptr,  # [M, stride_out], of which N columns count; int32 if RAW, else fp16, bf16 or fp32
    M,
    N,
    stride_x,  # of a row, in elements
    stride_out,  # N rounded up to a multiple of 16, so that stores are 16 bytes wide
    n_groups,  # of 128 values along K
    RAW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INLINE_ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # out^T [N, M] = codes [N, K] @ x^T [K, M]: with the weights as the A operand each warp owns its weight
    # rows and unpacks every weight once. One group an iteration, one product a plane.
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, 32)
    # Rows past the end wrap round, so that they need no mask; what they give is not stored.
    x_tile = x_ptr + (rows_m % M).to(tl.int64)[None, :] * stride_x + byte[:, None]
    packed_tile = packed_ptr + (rows_n % N).to(tl.int64)[:, None] * (n_groups * 32) + byte[None, :]
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for _ in range(n_groups):
        packed = tl.load(packed_tile)
        for plane in tl.static_range(4):
            codes = _unpack_plane(packed, plane, INLINE_ASM)
            accumulator = tl.dot(codes, tl.load(x_tile + plane * 32), accumulator, out_dtype=tl.int32)
        x_tile += 128
        packed_tile += 32
    product = accumulator >> 6  # exact: every term is a multiple of 64
    out_tile = out_ptr + rows_m.to(tl.int64)[None, :] * stride_out + rows_n[:, None]
    mask = (rows_m < M)[None, :] & (rows_n < stride_out)[:, None]
    if RAW:
        tl.store(out_tile, product, mask=mask)
    else:
        row_scale = tl.load(scale_ptr + rows_m % M) * tl.load(weight_scale_ptr)
        out = product.to(tl.float32) * row_scale[None, :]
        if HAS_BIAS:
            out += tl.load(bias_ptr + rows_n % N).to(tl.float32)[:, None]
        tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=mask)


def shape_key(m: int, n: int, k: int) -> str:
    """Key of a shape among the tuned results; M is rounded up to a power of two."""
    return f"m{1 << max(m - 1, 0).bit_length()}_n{n}_k{k}"


def _launch_ternary_matmul(
    x_q: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """One launch: raw int32 without ``scale``, else dequantised to ``out_dtype``."""
    (m, k), n = x_q.shape, packed.shape[0]
    raw = scale is None
    out = torch.empty((m, -(-n // 16) * 16), dtype=torch.int32 if raw else out_dtype, device=x_q.device)
    if m == 0 or n == 0:
        return out[:, :n].contiguous()
    packed = _aligned(packed)
    n_groups = packed.shape[1] // GROUP_BYTES
    # The kernel has no masks along K and loads 16 bytes at a time.
    if k % GROUP or x_q.stride(1) != 1 or x_q.stride(0) % 16 or x_q.data_ptr() % 16:
        x_q = torch.nn.functional.pad(x_q, (0, GROUP * n_groups - k)).contiguous()
    config = lookup("ternary_matmul", arch_of(x_q.device), shape_key(m, n, k), CONFIGS)
    options: dict[str, Any] = dict(zip(CONFIG_FIELDS, config, strict=True))
    grid = (triton.cdiv(m, options["BLOCK_M"]), triton.cdiv(n, options["BLOCK_N"]))
    with on_device_of(x_q):
        _ternary_matmul_kernel[grid](
            x_q,
            packed,
            scale,
            weight_scale,
            bias,
            out,
            m,
            n,
            x_q.stride(0),
            out.stride(0),
            n_groups,
            RAW=raw,
            HAS_BIAS=bias is not None,
            INLINE_ASM=x_q.is_cuda,
            **options,
        )
    return out[:, :n].contiguous()


# --- torch operators -------------------------------------------------------------------------------------


@torch.library.custom_op("tetra::ternary_matmul_int32", mutates_args=())
def _ternary_matmul_int32_op(x_q: Tensor, packed: Tensor) -> Tensor:
    if backend_for(x_q) in ("torch", "native"):
        return _matmul_torch(x_q, packed)
    return _launch_ternary_matmul(x_q, packed, None, None, None, torch.int32)


@_ternary_matmul_int32_op.register_fake
def _(x_q: Tensor, packed: Tensor) -> Tensor:
    return x_q.new_empty((x_q.shape[0], packed.shape[0]), dtype=torch.int32)


@torch.library.custom_op("tetra::ternary_linear", mutates_args=())
def _ternary_linear_op(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    if backend_for(x) in ("torch", "native"):
        return _linear_torch(x, packed, weight_scale, bias)
    x_q, scale = quantize_rows_unchecked(x)
    return _launch_ternary_matmul(x_q, packed, scale, weight_scale, bias, x.dtype)


@_ternary_linear_op.register_fake
def _(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


# --- public ----------------------------------------------------------------------------------------------


def ternary_matmul_int32(x_q: Tensor, packed: Tensor) -> Tensor:
    """x_q int8 [M, K] times the packed ternary weight (uint8 [N, P]), transposed: int32 [M, N], exact.

    K has to be one that P packs (P = 32 * ceil(K / 128)). M, N may be 0; inputs need not be contiguous.
    """
    if x_q.dtype != torch.int8:
        raise TypeError(f"x_q: dtype is {x_q.dtype}, wanted torch.int8 (see quantize_rows)")
    if x_q.ndim != 2:
        raise ValueError(f"x_q: shape is {tuple(x_q.shape)}, wanted [M, K]")
    _check_product("x_q", x_q, packed)
    return _ternary_matmul_int32_op(x_q, packed)


def ternary_linear(x: Tensor, packed: Tensor, weight_scale: float | Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer with a packed ternary weight: x float [..., K] -> [..., N] in x.dtype.

    Inference only: there is no gradient. ``weight_scale`` is the value of a code of 1 (a float, or a tensor
    with one element); ``bias`` is [N] of any floating dtype. Rows are quantised to int8, the product is exact
    in int32, scales and bias are applied in float32.
    """
    if not x.is_floating_point():
        raise TypeError(f"x: dtype is {x.dtype}, wanted a floating dtype")
    if x.ndim == 0:
        raise ValueError("x: is a scalar, wanted [..., K]")
    _check_product("x", x, packed)
    n = packed.shape[0]
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias: shape is {tuple(bias.shape)}, wanted ({n},), one value a row of the weight")
    if not isinstance(weight_scale, Tensor):
        weight_scale = torch.tensor(weight_scale, dtype=torch.float32, device=x.device)
    elif weight_scale.numel() != 1:
        raise ValueError(f"weight_scale: shape is {tuple(weight_scale.shape)}, wanted one element")
    rows = x.reshape(-1, x.shape[-1])
    return _ternary_linear_op(rows, packed, weight_scale.reshape(()), bias).view(*x.shape[:-1], n)


def _check_product(name: str, x: Tensor, packed: Tensor) -> None:
    """What every product checks: forms only, no values, so it costs nothing and waits for no device."""
    _check_packed_form(packed)
    k = x.shape[-1]
    if k > MAX_K:
        raise ValueError(f"{name}: K = {k} could overflow 32-bit sums; wanted at most {MAX_K}")
    if packed_width(k) != packed.shape[1]:
        raise ValueError(
            f"{name}: {k} values a row take {packed_width(k)} packed bytes, but packed has {packed.shape[1]}"
        )
    if x.device != packed.device:
        raise ValueError(f"packed: is on {packed.device}, but {name} is on {x.device}; move one of them")
