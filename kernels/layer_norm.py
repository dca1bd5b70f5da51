"""LayerNorm over the last dimension, with a residual sum before it where asked for.

Contract
    layer_norm(x float16|bfloat16|float32 [..., K], weight [K], bias [K], eps, residual [..., K] | None)
        -> [..., K] in x.dtype, or (that, total) with ``residual``

    total = x + residual                                             rounded to x.dtype
    out   = (t - mean t) / sqrt(var t + eps) * weight + bias         t = x, or total; biased variance

Everything but ``total`` is float32, rounded once to x.dtype.

Errors
    TypeError for other dtypes, ValueError for K = 0 and for shapes and devices that do not fit. A row with NaN
    or infinity comes out as NaN.
"""

from __future__ import annotations

from functools import lru_cache
from typing import overload

import torch
from torch import Tensor
from torch.nn import functional as F

from tetra.kernels import native
from tetra.kernels.backend import backend_for, on_device_of, tl, triton
from tetra.kernels.interpreted import cast
from tetra.kernels.row_quantize import check_norm_arguments
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

# --- reference ---------------------------------------------------------------------------------------------


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The formula of the contract."""
    t = x.to(torch.float32)
    centred = t - t.mean(dim=-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return (out * weight.to(torch.float32) + bias.to(torch.float32)).to(x.dtype)


# --- CPU ---------------------------------------------------------------------------------------------------


def _layer_norm_torch(t: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    weight, bias = weight.to(torch.float32), bias.to(torch.float32)
    if t.device.type == "cpu":  # takes float32 parameters beside half-precision rows
        return F.layer_norm(t, weight.shape, weight, bias, eps)
    return F.layer_norm(t.to(torch.float32), weight.shape, weight, bias, eps).to(t.dtype)


# --- Triton ------------------------------------------------------------------------------------------------


def cost(m: int, k: int, n_bytes: int = 2, *, residual: bool = False) -> tuple[int, int]:
    """(float operations, bytes moved at least) of normalising [m, k]: 7 operations a value, a read and a write.

    With a residual one more operation, one more read and one more write.
    """
    return m * k * (7 + residual), m * k * n_bytes * (2 + 2 * residual) + 8 * k


@triton.jit
def _layer_norm_kernel(
    x_ptr,  # float [M, K], rows contiguous
    residual_ptr,  # the same, or None
    weight_ptr,  # float [K]
    bias_ptr,  # float [K]
    out_ptr,  # like x, contiguous
    total_ptr,  # like out, or None: x + residual
    stride_x,  # of a row, in elements
    stride_residual,
    eps,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, CHUNK)
    residual_row = None if residual_ptr is None else residual_ptr + row * stride_residual
    total_row = None if total_ptr is None else total_ptr + row * K
    parts = load_row(x_ptr + row * stride_x, residual_row, total_row, K, CHUNK, False)
    parts = normalize_row(parts, weight_ptr, bias_ptr, eps, K, CHUNK)
    for i in tl.static_range(len(parts)):
        store_part(out_ptr + row * K, i * CHUNK + columns, parts[i], (i + 1) * CHUNK, K)


@triton.jit
def _wide_layer_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    stride_x,
    stride_residual,
    eps,
    K,
    CHUNK: tl.constexpr,
):
    """The same, arguments too, for rows that registers do not hold."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_x
    residual_row = None if residual_ptr is None else residual_ptr + row * stride_residual
    mean, factor = wide_statistics(x_row, residual_row, eps, K, CHUNK, False)
    for start in range(0, K, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        part = wide_part(x_row, residual_row, start, K, CHUNK, False)
        if total_ptr is not None:
            tl.store(total_ptr + row * K + columns, cast(part, total_ptr.dtype.element_ty), mask=columns < K)
        part = wide_affine(part, mean, factor, weight_ptr, bias_ptr, start, K, CHUNK)
        tl.store(out_ptr + row * K + columns, cast(part, out_ptr.dtype.element_ty), mask=columns < K)


@lru_cache(maxsize=4096)
def shape_key(k: int, dtype: torch.dtype, residual: bool) -> str:
    """Key of rows of ``k`` values among the tuned results."""
    return f"k{k}_{dtype_name(dtype)}" + "_residual" * residual


def _launch_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, config: Config | None = None
) -> tuple[Tensor, Tensor | None]:
    m, k = x.shape
    x = along_rows(x)
    residual = None if residual is None else along_rows(residual)
    out = torch.empty((m, k), dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    if m:
        key = shape_key(k, x.dtype, residual is not None)
        options = tuned_row("layer_norm", key, row_configs(k, x.dtype), x.device, config)
        kernel = _layer_norm_kernel if fits_registers(k, options) else _wide_layer_norm_kernel
        with on_device_of(x):
            kernel[(m,)](
                x,
                residual,
                weight.contiguous(),
                bias.contiguous(),
                out,
                total,
                x.stride(0),
                0 if residual is None else residual.stride(0),
                eps,
                K=k,
                **options,
            )
    return out, total


def specimens(arch: int) -> list[Specimen]:
    """Rows of the full-precision last block, with and without a residual, and one row wider than registers."""
    return [
        *(_specimen(768, dtype, residual) for dtype in ("fp16", "bf16", "fp32") for residual in (False, True)),
        _specimen(3072, "fp16", False),
        _specimen(1 << 16, "fp16", True),
    ]


def _specimen(k: int, dtype: str, residual: bool, row: Config | None = None) -> Specimen:
    tile = row_options(row or row_configs(k, TRITON_DTYPES[dtype])[0])
    config = dict(tile)
    wide = not fits_registers(k, config)
    signature, constants = norm_signature(dtype, True, residual, {"out_ptr": f"*{dtype}"})
    constants["CHUNK"] = config.pop("CHUNK")
    if wide:
        signature["K"] = "i32"
    else:
        constants["K"] = k
    return Specimen(
        name="layer_norm",
        config={"K": k, "dtype": dtype, "residual": residual, **tile},
        kernel=_wide_layer_norm_kernel if wide else _layer_norm_kernel,
        signature=signature,
        constants=constants,
        options=config,
        unaligned=("eps",),
    )


# --- tuning ------------------------------------------------------------------------------------------------


def _works(arch: int, n_sms: int, sizes: Sizes, config: Config) -> list[Work]:
    m, k, residual = sizes["m"], sizes["k"], sizes["residual"]
    operations, n_bytes = cost(m, k, DTYPES[sizes["dtype"]].itemsize, residual=residual)
    return [Work(_specimen(k, TRITON_NAMES[sizes["dtype"]], residual, config), m, 1, 0, operations, n_bytes, "fp32")]


def _trial(sizes: Sizes, device: torch.device) -> Trial:
    m, k, random, dtype = sizes["m"], sizes["k"], seeded(device), DTYPES[sizes["dtype"]]
    x = torch.randn((m, k), generator=random, device=device).to(dtype)
    residual = torch.randn((m, k), generator=random, device=device).to(dtype) if sizes["residual"] else None
    weight, bias = torch.rand((2, k), generator=random, device=device) + 0.5

    def run(config: Config) -> tuple[Tensor, ...]:
        found = _launch_layer_norm(x, residual, weight, bias, 1e-5, config)
        return tuple(part for part in found if part is not None)

    def expected() -> tuple[Tensor, ...]:
        if residual is None:
            return (layer_norm_reference(x, weight, bias),)
        return layer_norm_reference(x + residual, weight, bias), x + residual

    return Trial(run, expected, rtol=TOLERANCES[sizes["dtype"]], atol=TOLERANCES[sizes["dtype"]])


def tunables() -> list[Tunable]:
    """The norm. A problem: ``m, k``, ``dtype`` and ``residual``; the key leaves ``m`` out."""
    return [
        Tunable(
            name="layer_norm",
            module="layer_norm",
            on="cuda",
            fields=ROW_FIELDS,
            key=lambda sizes: shape_key(sizes["k"], DTYPES[sizes["dtype"]], sizes["residual"]),
            space=lambda arch, sizes: row_configs(sizes["k"], DTYPES[sizes["dtype"]]),
            default=lambda arch, n_sms, sizes: row_configs(sizes["k"], DTYPES[sizes["dtype"]])[0],
            works=_works,
            trial=_trial,
        )
    ]


# --- torch operators ---------------------------------------------------------------------------------------


@torch.library.custom_op("tetra::layer_norm", mutates_args=())
def _layer_norm_op(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    backend = backend_for(x)
    if backend == "native" and native.supports("layer_norm", x.dtype):
        return native.layer_norm(x, weight, bias, eps, None)  # type: ignore[return-value]
    if backend in ("triton", "interpreter"):
        return _launch_layer_norm(x, None, weight, bias, eps)[0]
    return _layer_norm_torch(x, weight, bias, eps)


@_layer_norm_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("tetra::add_layer_norm", mutates_args=())
def _add_layer_norm_op(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    backend = backend_for(x)
    if backend == "native" and native.supports("layer_norm", x.dtype):
        return native.layer_norm(x, weight, bias, eps, residual)  # type: ignore[return-value]
    if backend in ("triton", "interpreter"):
        return _launch_layer_norm(x, residual, weight, bias, eps)  # type: ignore[return-value]
    total = x + residual
    return _layer_norm_torch(total, weight, bias, eps), total


@_add_layer_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


# --- public ------------------------------------------------------------------------------------------------


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, residual: None = None) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of ``x`` [..., K], or of x + residual. Inference only: there is no gradient.

    Args:
        x: float16, bfloat16 or float32 [..., K].
        weight, bias: [K], any floating dtype.
        eps: added to the variance.
        residual: like ``x``; added to it first.

    Returns:
        [..., K] in x.dtype; with ``residual`` the pair of that and the sum.
    """
    check_norm_arguments(x, weight, bias, eps, residual)
    rows = x.reshape(-1, x.shape[-1])
    if residual is None:
        return _layer_norm_op(rows, weight, bias, eps).view(x.shape)
    out, total = _add_layer_norm_op(rows, residual.reshape(rows.shape), weight, bias, eps)
    return out.view(x.shape), total.view(x.shape)
