"""Activations to int8, one scale a row (a token), with what comes before it: residual sum, GELU, LayerNorm.

Contract
    quantize_rows(x: float [..., K]) -> (x_q int8 [..., K], scale float32 [...]) with x ~= x_q * scale

    m     = max(max |x|, 1e-5)            over the row, in float32
    scale = m / 127
    x_q   = clip(round(x * (127 / m)), -128, 127)      rounding half to even

    norm_quantize(x float16|bfloat16|float32 [..., K], weight [K], bias [K], eps, gelu, residual [..., K] | None)
        -> (x_q, scale), or (x_q, scale, total) with ``residual``

    total = x + residual                  rounded to x.dtype
    t     = x, or total; gelu(t) = t/2 (1 + erf(t / sqrt 2)) where ``gelu`` is set; in float32, not rounded
    y     = (t - mean t) / sqrt(var t + eps) * weight + bias      biased variance, in float32
    (x_q, scale) = quantize_rows(y)

A row of zeros gives zeros and the scale 1e-5 / 127. ``quantize_rows`` gives the same codes and scales on every
backend, bit for bit; ``norm_quantize`` sums in different orders, so that a code may differ by one where y * 127 / m
lies within 1e-3 of a rounding boundary, and a scale in its last bits.

Errors
    TypeError for a dtype that is not floating (``norm_quantize``: not one of the three), ValueError for K = 0 and
    for shapes and devices that do not fit. Rows with NaN or infinity: ValueError from ``quantize_rows``; from
    ``norm_quantize``, which never waits for a device, a scale that is not finite, and codes that mean nothing.

Source: TeTRA (arXiv 2503.02511), quantisation of activations; the same as BitNet b1.58's (arXiv 2402.17764).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from tetra.kernels import native
from tetra.kernels.backend import backend_for, on_device_of, tl, triton
from tetra.kernels.interpreted import cast
from tetra.kernels.rows import (
    ROW_FIELDS,
    TRITON_DTYPES,
    along_rows,
    fits_registers,
    load_row,
    norm_signature,
    normalize_row,
    row_configs,
    row_options,
    store_part,
    tuned_row,
    wide_affine,
    wide_part,
    wide_statistics,
)
from tetra.kernels.specimen import Specimen
from tetra.kernels.tunable import DTYPES, TRITON_NAMES, Config, Sizes, Trial, Tunable, Work, dtype_name, seeded

LEVELS = 127.0
SMALLEST_MAXIMUM = 1e-5
NORM_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# --- reference ---------------------------------------------------------------------------------------------


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas of the contract, step by step."""
    x = x.to(torch.float32)
    maximum = x.abs().amax(dim=-1).clamp(min=SMALLEST_MAXIMUM)
    # Tensor by tensor is a true division; torch takes a scalar operand's reciprocal, which rounds twice.
    levels = torch.full_like(maximum, LEVELS)
    x_q = torch.round(x * (levels / maximum).unsqueeze(-1)).clamp(-128, 127).to(torch.int8)
    return x_q, maximum / levels


def norm_quantize_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool, residual: Tensor | None
) -> tuple[Tensor, ...]:
    """The formulas of the contract, step by step."""
    total = x if residual is None else x + residual
    t = total.to(torch.float32)
    if gelu:
        t = 0.5 * t * (1.0 + torch.erf(t * 0.5**0.5))
    centred = t - t.mean(dim=-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    x_q, scale = quantize_rows_reference(y * weight.to(torch.float32) + bias.to(torch.float32))
    return (x_q, scale) if residual is None else (x_q, scale, total)


# --- CPU ---------------------------------------------------------------------------------------------------


def _quantize_rows_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(torch.float32)
    # max(max x, -min x): two reductions without a temporary beat abs and one.
    maximum = torch.maximum(x.amax(dim=-1), -x.amin(dim=-1)).clamp_(min=SMALLEST_MAXIMUM)
    levels = torch.full_like(maximum, LEVELS)
    # |x * (127 / m)| < 127.5, so that there is nothing to clip.
    x_q = torch.mul(x, (levels / maximum).unsqueeze(-1)).round_().to(torch.int8)
    return x_q, maximum / levels


_ROWS_AT_A_TIME = 1024  # bounds the float32 temporaries to what the caches hold


def _norm_quantize_torch(t: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> tuple[Tensor, Tensor]:
    weight, bias = weight.to(torch.float32), bias.to(torch.float32)
    x_q = torch.empty(t.shape, dtype=torch.int8, device=t.device)
    scale = torch.empty(len(t), dtype=torch.float32, device=t.device)
    for start in range(0, len(t), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        part = t[rows].to(torch.float32)
        part = F.gelu(part) if gelu else part
        x_q[rows], scale[rows] = _quantize_rows_torch(F.layer_norm(part, weight.shape, weight, bias, eps))
    return x_q, scale


# --- Triton ------------------------------------------------------------------------------------------------


def cost(
    m: int, k: int, in_bytes: int = 2, *, norm: bool = False, gelu: bool = False, residual: bool = False
) -> tuple[int, int]:
    """(float operations, bytes moved at least) of quantising [m, k].

    Operations a value: 4 to quantise (absolute value, maximum, product, rounding), 7 for a LayerNorm, 13 for a
    GELU. Every tensor moves once: a value in, a byte out; with a residual one more value in and one out.
    """
    operations = m * k * (4 + 7 * norm + 13 * gelu + residual)
    values = m * k * (in_bytes + 1 + 2 * in_bytes * residual)
    return operations, values + 4 * m + 8 * k * norm


@triton.jit
def _absolute_bits(x):
    """|x| as an integer, in the order of the floats. NaN comes out as the largest, where tl.max would skip it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _maximum_of_bits(bits):
    maximum = bits.to(tl.float32, bitcast=True)
    return tl.where(maximum < 1e-5, 1e-5, maximum)


@triton.jit
def _round_to_int8(x):
    """Half to even: after adding 1.5 * 2^23 the low byte of the sum is the rounded number."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _row_quantize_kernel(
    x_ptr,  # float [M, K], rows contiguous
    residual_ptr,  # the same, or None
    weight_ptr,  # float [K], or None for no LayerNorm
    bias_ptr,  # float [K], or None
    x_q_ptr,  # int8 [M, K], contiguous
    scale_ptr,  # float32 [M]
    total_ptr,  # like x, contiguous, or None: x + residual
    stride_x,  # of a row, in elements
    stride_residual,
    eps,
    K: tl.constexpr,
    GELU: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, CHUNK)
    residual_row = None if residual_ptr is None else residual_ptr + row * stride_residual
    total_row = None if total_ptr is None else total_ptr + row * K
    parts = load_row(x_ptr + row * stride_x, residual_row, total_row, K, CHUNK, GELU)
    if weight_ptr is not None:
        parts = normalize_row(parts, weight_ptr, bias_ptr, eps, K, CHUNK)
    bits = _absolute_bits(parts[0])
    for i in tl.static_range(1, len(parts)):
        bits = tl.maximum(bits, _absolute_bits(parts[i]))
    maximum = _maximum_of_bits(tl.max(bits))
    factor = tl.div_rn(127.0, maximum)
    for i in tl.static_range(len(parts)):
        store_part(x_q_ptr + row * K, i * CHUNK + columns, _round_to_int8(parts[i] * factor), (i + 1) * CHUNK, K)
    tl.store(scale_ptr + row, tl.div_rn(maximum, 127.0))


@triton.jit
def _wide_row_quantize_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    x_q_ptr,
    scale_ptr,
    total_ptr,
    stride_x,
    stride_residual,
    eps,
    K,
    GELU: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The same, arguments too, for rows that registers do not hold: they are read again for every sum."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, CHUNK)
    x_row = x_ptr + row * stride_x
    residual_row = None if residual_ptr is None else residual_ptr + row * stride_residual
    mean = 0.0
    factor = 1.0
    if weight_ptr is not None:
        mean, factor = wide_statistics(x_row, residual_row, eps, K, CHUNK, GELU)
    bits = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, K, CHUNK):
        part = wide_part(x_row, residual_row, start, K, CHUNK, GELU)
        if weight_ptr is not None:
            part = wide_affine(part, mean, factor, weight_ptr, bias_ptr, start, K, CHUNK)
        bits = tl.maximum(bits, _absolute_bits(part))
    maximum = _maximum_of_bits(tl.max(bits))
    levels = tl.div_rn(127.0, maximum)
    for start in range(0, K, CHUNK):
        mask = start + columns < K
        if total_ptr is not None:
            total = wide_part(x_row, residual_row, start, K, CHUNK, False)
            tl.store(total_ptr + row * K + start + columns, cast(total, total_ptr.dtype.element_ty), mask=mask)
        part = wide_part(x_row, residual_row, start, K, CHUNK, GELU)
        if weight_ptr is not None:
            part = wide_affine(part, mean, factor, weight_ptr, bias_ptr, start, K, CHUNK)
        tl.store(x_q_ptr + row * K + start + columns, _round_to_int8(part * levels), mask=mask)
    tl.store(scale_ptr + row, tl.div_rn(maximum, 127.0))


@lru_cache(maxsize=4096)
def shape_key(k: int, dtype: torch.dtype, norm: bool, gelu: bool, residual: bool) -> str:
    """Key of rows of ``k`` values, and of what comes before they are quantised, among the tuned results."""
    return f"k{k}_{dtype_name(dtype)}" + "_norm" * norm + "_gelu" * gelu + "_residual" * residual


def _launch_row_quantize(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    gelu: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    m, k = x.shape
    x = along_rows(x)
    x_q = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    total = None
    if residual is not None:
        residual = along_rows(residual)
        total = torch.empty((m, k), dtype=x.dtype, device=x.device)
    if m:
        key = shape_key(k, x.dtype, weight is not None, gelu, residual is not None)
        options = tuned_row("row_quantize", key, row_configs(k, x.dtype), x.device, config)
        kernel = _row_quantize_kernel if fits_registers(k, options) else _wide_row_quantize_kernel
        with on_device_of(x):
            kernel[(m,)](
                x,
                residual,
                None if weight is None else weight.contiguous(),
                None if bias is None else bias.contiguous(),
                x_q,
                scale,
                total,
                x.stride(0),
                0 if residual is None else residual.stride(0),
                eps,
                K=k,
                GELU=gelu,
                enable_fp_fusion=weight is not None,
                **options,
            )
    return x_q, scale, total


def specimens(arch: int) -> list[Specimen]:
    """What the model runs: rows of 768 and 3072 values, and one row wider than registers."""
    found = []
    for k in (768, 3072):
        for dtype in ("fp16", "bf16", "fp32"):
            found.append(_specimen(k, dtype))
            found.append(_specimen(k, dtype, norm=True))
            found.append(_specimen(k, dtype, norm=True, gelu=True, residual=True))
        found.append(_specimen(k, "fp16", norm=True, gelu=True))
        found.append(_specimen(k, "fp16", norm=True, residual=True))
    return [*found, _specimen(1 << 16, "fp16", norm=True, gelu=True, residual=True)]


def _specimen(
    k: int,
    dtype: str,
    *,
    norm: bool = False,
    gelu: bool = False,
    residual: bool = False,
    row: Config | None = None,
) -> Specimen:
    tile = row_options(row or row_configs(k, TRITON_DTYPES[dtype])[0])
    config = dict(tile)
    wide = not fits_registers(k, config)
    constants: dict[str, Any] = {"GELU": gelu, "CHUNK": config.pop("CHUNK")}
    signature, missing = norm_signature(dtype, norm, residual, {"x_q_ptr": "*i8", "scale_ptr": "*fp32"})
    constants |= missing
    if wide:
        signature["K"] = "i32"
    else:
        constants["K"] = k
    return Specimen(
        name="row_quantize",
        config={"K": k, "dtype": dtype, "norm": norm, "gelu": gelu, "residual": residual, **tile},
        kernel=_wide_row_quantize_kernel if wide else _row_quantize_kernel,
        signature=signature,
        constants=constants,
        options={**config, "enable_fp_fusion": norm},
        unaligned=("eps",),
    )


# --- tuning ------------------------------------------------------------------------------------------------


def _works(arch: int, n_sms: int, sizes: Sizes, config: Config) -> list[Work]:
    m, k = sizes["m"], sizes["k"]
    flags = {name: sizes[name] for name in ("norm", "gelu", "residual")}
    operations, n_bytes = cost(m, k, DTYPES[sizes["dtype"]].itemsize, **flags)
    code = _specimen(k, TRITON_NAMES[sizes["dtype"]], **flags, row=config)
    return [Work(code, m, 1, 0, operations, n_bytes, "fp32")]


def _trial(sizes: Sizes, device: torch.device) -> Trial:
    m, k, random, dtype = sizes["m"], sizes["k"], seeded(device), DTYPES[sizes["dtype"]]
    x = torch.randn((m, k), generator=random, device=device).to(dtype)
    residual = torch.randn((m, k), generator=random, device=device).to(dtype) if sizes["residual"] else None
    weight, bias = torch.rand((2, k), generator=random, device=device) + 0.5 if sizes["norm"] else (None, None)

    def run(config: Config) -> tuple[Tensor, ...]:
        found = _launch_row_quantize(x, residual, weight, bias, 1e-5, sizes["gelu"], config)
        return tuple(part for part in found if part is not None)

    def expected() -> tuple[Tensor, ...]:
        if weight is None or bias is None:
            return quantize_rows_reference(x)
        return norm_quantize_reference(x, weight, bias, 1e-5, sizes["gelu"], residual)

    # With a norm a code may differ by one.
    return Trial(run, expected, rtol=(0.0, 1e-4, 1e-2), atol=(float(sizes["norm"]), 0.0, 1e-2))


def tunables() -> list[Tunable]:
    """Both operations. A problem: ``m, k``, ``dtype``, and ``norm, gelu, residual``; the key leaves ``m`` out."""
    return [
        Tunable(
            name="row_quantize",
            module="row_quantize",
            on="cuda",
            fields=ROW_FIELDS,
            key=lambda sizes: shape_key(
                sizes["k"], DTYPES[sizes["dtype"]], sizes["norm"], sizes["gelu"], sizes["residual"]
            ),
            space=lambda arch, sizes: row_configs(sizes["k"], DTYPES[sizes["dtype"]]),
            default=lambda arch, n_sms, sizes: row_configs(sizes["k"], DTYPES[sizes["dtype"]])[0],
            works=_works,
            trial=_trial,
        )
    ]


# --- torch operator ----------------------------------------------------------------------------------------


@torch.library.custom_op("tetra::quantize_rows", mutates_args=())
def _quantize_rows_op(x: Tensor, checked: bool = True) -> tuple[Tensor, Tensor]:
    x_q, scale = quantize_rows_unchecked(x)
    if checked:
        check_finite_scale(scale)  # in here, where a compiled graph does not look
    return x_q, scale


@_quantize_rows_op.register_fake
def _(x: Tensor, checked: bool = True) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


# Two operators, because one cannot have an output that is sometimes there.


@torch.library.custom_op("tetra::norm_quantize", mutates_args=())
def _norm_quantize_op(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> tuple[Tensor, Tensor]:
    backend = backend_for(x)
    if backend == "native" and native.supports("norm_quantize", x.dtype):
        return native.norm_quantize(x, weight, bias, eps, gelu, None)  # type: ignore[return-value]
    if backend in ("triton", "interpreter"):
        x_q, scale, _ = _launch_row_quantize(x, None, weight, bias, eps, gelu)
        return x_q, scale
    return _norm_quantize_torch(x, weight, bias, eps, gelu)


@_norm_quantize_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("tetra::add_norm_quantize", mutates_args=())
def _add_norm_quantize_op(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    backend = backend_for(x)
    if backend == "native" and native.supports("norm_quantize", x.dtype):
        return native.norm_quantize(x, weight, bias, eps, gelu, residual)  # type: ignore[return-value]
    if backend in ("triton", "interpreter"):
        return _launch_row_quantize(x, residual, weight, bias, eps, gelu)  # type: ignore[return-value]
    total = x + residual
    return *_norm_quantize_torch(total, weight, bias, eps, gelu), total


@_add_norm_quantize_op.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        x.new_empty(x.shape),
    )


# --- public ------------------------------------------------------------------------------------------------


def quantize_rows_unchecked(x: Tensor) -> tuple[Tensor, Tensor]:
    """``quantize_rows`` of x [M, K] without checks.

    A row with NaN or infinity gets a scale that is not finite, and codes that mean nothing.
    """
    backend = backend_for(x)
    if backend in ("triton", "interpreter"):
        x_q, scale, _ = _launch_row_quantize(x)
        return x_q, scale
    if backend == "native" and native.supports("quantize_rows", x.dtype):
        return native.quantize_rows(x)
    return _quantize_rows_torch(x)


def check_finite_scale(scale: Tensor, first_row: int = 0) -> None:
    """ValueError naming the first row, counted from ``first_row``, whose scale shows that it held NaN or infinity."""
    # The maximum is NaN if any is, so that one number tells.
    if scale.numel() and not math.isfinite(float(scale.amax())):
        row = first_row + int((~torch.isfinite(scale)).flatten().nonzero()[0])
        raise ValueError(f"x: row {row} holds NaN or infinity; quantisation needs finite values")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [..., K] and float32 scales [...] of ``x`` (float [..., K]); x ~= x_q * scale[..., None]."""
    if not x.is_floating_point():
        raise TypeError(f"x: dtype is {x.dtype}, wanted a floating dtype")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)} has no values in its last dimension; wanted [..., K], K >= 1")
    x_q, scale = _quantize_rows_op(x.detach().reshape(-1, x.shape[-1]))
    return x_q.view(x.shape), scale.view(x.shape[:-1])


@overload
def norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, gelu: bool = ..., residual: None = None
) -> tuple[Tensor, Tensor]: ...


@overload
def norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, gelu: bool = ..., residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]: ...


def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Residual sum and GELU where asked for, LayerNorm and int8 in one pass over the rows of ``x``.

    Args:
        x: float16, bfloat16 or float32 [..., K].
        weight, bias: of the LayerNorm, [K], any floating dtype.
        eps: added to the variance.
        gelu: apply the exact (erf) GELU before the norm.
        residual: like ``x``; added to it first.

    Returns:
        int8 codes [..., K] and float32 scales [...]; with ``residual`` also the sum, [..., K] in x.dtype.
    """
    check_norm_arguments(x, weight, bias, eps, residual)
    k, shape = x.shape[-1], x.shape
    rows = x.reshape(-1, k)
    if residual is None:
        x_q, scale = _norm_quantize_op(rows, weight, bias, eps, gelu)
        return x_q.view(shape), scale.view(shape[:-1])
    x_q, scale, total = _add_norm_quantize_op(rows, residual.reshape(-1, k), weight, bias, eps, gelu)
    return x_q.view(shape), scale.view(shape[:-1]), total.view(shape)


def check_norm_arguments(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None) -> None:
    """Raises unless the arguments of a LayerNorm over the last dimension of ``x`` fit each other."""
    if x.dtype not in NORM_DTYPES:
        raise TypeError(f"x: dtype is {x.dtype}, wanted one of {', '.join(map(str, NORM_DTYPES))}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)} has no values in its last dimension; wanted [..., K], K >= 1")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if not parameter.is_floating_point():
            raise TypeError(f"{name}: dtype is {parameter.dtype}, wanted a floating dtype")
        if parameter.shape != x.shape[-1:]:
            raise ValueError(f"{name}: shape is {tuple(parameter.shape)}, wanted ({x.shape[-1]},), as x has")
        if parameter.device != x.device:
            raise ValueError(f"{name}: is on {parameter.device}, but x is on {x.device}; move one of them")
    if not eps >= 0:
        raise ValueError(f"eps: is {eps}, wanted a number >= 0")
    if residual is not None:
        if residual.dtype != x.dtype:
            raise TypeError(f"residual: dtype is {residual.dtype}, wanted that of x, {x.dtype}")
        if residual.shape != x.shape:
            raise ValueError(f"residual: shape is {tuple(residual.shape)}, wanted that of x, {tuple(x.shape)}")
        if residual.device != x.device:
            raise ValueError(f"residual: is on {residual.device}, but x is on {x.device}; move one of them")
