"""The end of a residual branch while training: dropout and the sum, without a mask to keep.

Contract
    residual_dropout(residual float [..., K] | None, y float [..., K], dropout, seed) -> [..., K]
        in the wider dtype of the two; differentiable in both, once

    out = residual + y * 0 or 1 / (1 - dropout)      by the hash of (seed, row, column), rows counted over all leading
                                                     dimensions; see ``tetra.kernels.dropout``

Memory: the seed, 8 bytes. The gradient of y is that of the result through the same mask, made again.

Numerics: float32 (float64 where an input is), rounded once to the result's dtype; the gradients once to their input's.
Every backend drops the same values, and gives the same bits.

Errors
    TypeError for dtypes that are not floating, ValueError for shapes and devices that differ, for no dimension and for
    dropout outside [0, 1).

On CPUs the C++ kernel of ``tetra.kernels.blended_linear`` drops (it blends nothing), and PyTorch adds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tetra.kernels import native
from tetra.kernels.backend import backend_for, on_device_of, operator_or_function, tl, triton
from tetra.kernels.dropout import (
    check_dropout,
    dropout_constants,
    dropout_factor,
    dropped_scale,
    hash_row,
    seed_of,
)
from tetra.kernels.rows import ROW_FIELDS, TRITON_DTYPES, load_part, row_configs, row_options, store_part, tuned_row
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


def residual_dropout_reference(residual: Tensor | None, y: Tensor, dropout: float, seed: int) -> Tensor:
    """The formula of the contract; PyTorch finds the gradients."""
    k = y.shape[-1]
    scale = dropped_scale(torch.tensor(seed, device=y.device), dropout, 0, y.numel() // max(k, 1), k)
    dropped = y * scale.to(y.dtype).view(y.shape)
    return dropped if residual is None else residual + dropped


# --- CPU ---------------------------------------------------------------------------------------------------

_ROWS_AT_A_TIME = 1024  # bounds the words of the hash to what the caches hold


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _residual_dropout_torch(
    residual: Tensor | None, y: Tensor, dropout: float, seed: Tensor, out_dtype: torch.dtype
) -> Tensor:
    out = torch.empty_like(y, dtype=out_dtype)
    wide = _wide(torch.promote_types(y.dtype, out_dtype))
    for start in range(0, len(y), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        part = y[rows].to(wide)
        part = part * dropped_scale(seed, dropout, start, *part.shape).to(wide)
        out[rows] = part if residual is None else part.add_(residual[rows])
    return out


def _residual_dropout_native(
    residual: Tensor | None, y: Tensor, dropout: float, seed: Tensor, out_dtype: torch.dtype
) -> Tensor:
    if residual is None:
        return native.blend_rows(y, 0.0, None, False, dropout, seed, out_dtype)
    dropped = native.blend_rows(y, 0.0, None, False, dropout, seed, torch.float32)
    return dropped.add_(residual).to(out_dtype)


# --- Triton ------------------------------------------------------------------------------------------------


def cost(m: int, k: int, in_bytes: int = 2, out_bytes: int = 4, *, residual: bool = True) -> tuple[int, int]:
    """(operations, bytes moved at least) of [m, k]: 10 integer operations a value to hash, one or two to use it.

    Every tensor moves once, the residual in as many bytes a value as the result.
    """
    return m * k * (11 + residual), m * k * (in_bytes + out_bytes * (1 + residual))


@triton.jit
def _residual_dropout_kernel(
    residual_ptr,  # float [M, K], contiguous; None for none
    y_ptr,  # float [M, K], contiguous
    seed_ptr,  # int64
    out_ptr,  # float [M, K], contiguous
    K: tl.constexpr,
    THRESHOLD: tl.constexpr,  # hashes below are dropped
    KEEP_SCALE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_hash = hash_row(seed_ptr, row)
    for start in tl.static_range(0, K, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        part = load_part(y_ptr + row * K, columns, start + CHUNK, K)
        part *= dropout_factor(row_hash, columns, THRESHOLD, KEEP_SCALE)
        if residual_ptr is not None:
            part += load_part(residual_ptr + row * K, columns, start + CHUNK, K)
        store_part(out_ptr + row * K, columns, part, start + CHUNK, K)


def _configs(k: int, *dtypes: torch.dtype) -> tuple[Config, ...]:
    # A part at a time needs few registers, so that there is nothing to limit.
    return row_configs(k, max(dtypes, key=lambda dtype: dtype.itemsize), limited=False)


# No fused multiply-add, which would round once where the CPU rounds twice.
_OPTIONS = {"enable_fp_fusion": False}


@lru_cache(maxsize=4096)
def _rows_and_key(
    k: int, residual: torch.dtype | None, y: torch.dtype, out: torch.dtype
) -> tuple[tuple[Config, ...], str]:
    """What a launch looks up: rows that may run, the default first, and the key."""
    names = (dtype_name(y), dtype_name(out), *(() if residual is None else (f"{dtype_name(residual)}residual",)))
    return _configs(k, y, out), "_".join((f"k{k}", *names))


def _launch_residual_dropout(
    residual: Tensor | None,
    y: Tensor,
    dropout: float,
    seed: Tensor,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    m, k = y.shape
    out = torch.empty_like(y, dtype=out_dtype)
    if out.numel():
        rows, key = _rows_and_key(k, None if residual is None else residual.dtype, y.dtype, out_dtype)
        options = tuned_row("residual_dropout", key, rows, y.device, config)
        with on_device_of(y):
            _residual_dropout_kernel[(m,)](
                residual, y, seed, out, K=k, **dropout_constants(dropout), **options, **_OPTIONS
            )
    return out


def specimens(arch: int) -> list[Specimen]:
    """Rows of 384 and 768 values as autocast leaves them, their gradient, and other dtypes; a width with a rest."""
    return [
        _specimen(k, residual, y, out)
        for k, residual, y, out in (
            (768, "fp32", "bf16", "fp32"),
            (768, None, "fp32", "bf16"),
            (768, "bf16", "bf16", "bf16"),
            (768, "fp32", "fp32", "fp32"),
            (768, None, "fp32", "fp32"),
            (768, "fp32", "fp16", "fp32"),
            (384, "fp32", "bf16", "fp32"),
            (200, "fp32", "bf16", "fp32"),
        )
    ]


def _specimen(
    k: int, residual: str | None, y: str, out: str, dropout: float = 0.1, row: Config | None = None
) -> Specimen:
    tile = row_options(row or _configs(k, TRITON_DTYPES[y], TRITON_DTYPES[out])[0])
    config: dict[str, Any] = tile | _OPTIONS
    shown = {"K": k, "residual": residual is not None, "y": y, "out": out, **tile}
    signature = {"y_ptr": f"*{y}", "seed_ptr": "*i64", "out_ptr": f"*{out}"}
    constants = {"K": k, "CHUNK": config.pop("CHUNK"), **dropout_constants(dropout)}
    if residual is None:
        constants["residual_ptr"] = None
    else:
        signature["residual_ptr"] = f"*{residual}"
    return Specimen("residual_dropout", shown, _residual_dropout_kernel, signature, constants, config)


# --- tuning ------------------------------------------------------------------------------------------------


def _sizes_dtypes(sizes: Sizes) -> tuple[torch.dtype | None, torch.dtype, torch.dtype]:
    residual = sizes["residual"]
    return None if residual is None else DTYPES[residual], DTYPES[sizes["y"]], DTYPES[sizes["out"]]


def _works(arch: int, n_sms: int, sizes: Sizes, config: Config) -> list[Work]:
    m, k, residual = sizes["m"], sizes["k"], sizes["residual"]
    y, out = sizes["y"], sizes["out"]
    operations, n_bytes = cost(m, k, DTYPES[y].itemsize, DTYPES[out].itemsize, residual=residual is not None)
    name = None if residual is None else TRITON_NAMES[residual]
    code = _specimen(k, name, TRITON_NAMES[y], TRITON_NAMES[out], row=config)
    return [Work(code, m, 1, 0, operations, n_bytes, "fp32")]


def _trial(sizes: Sizes, device: torch.device) -> Trial:
    random, (residual_dtype, y_dtype, out_dtype) = seeded(device), _sizes_dtypes(sizes)
    shape = sizes["m"], sizes["k"]
    y = torch.randn(shape, generator=random, device=device).to(y_dtype)
    residual = None
    if residual_dtype is not None:
        residual = torch.randn(shape, generator=random, device=device).to(residual_dtype)
    seed = torch.tensor(1, device=device)

    def run(config: Config) -> tuple[Tensor, ...]:
        return (_launch_residual_dropout(residual, y, 0.1, seed, out_dtype, config),)

    def expected() -> tuple[Tensor, ...]:
        wide = None if residual is None else residual.to(torch.float64)
        return (residual_dropout_reference(wide, y.to(torch.float64), 0.1, 1),)

    return Trial(run, expected, rtol=TOLERANCES[sizes["out"]], atol=TOLERANCES[sizes["out"]])


def tunables() -> list[Tunable]:
    """The sum. A problem: ``m, k``, dtypes ``residual`` (or None), ``y`` and ``out``; the key leaves ``m`` out."""
    return [
        Tunable(
            name="residual_dropout",
            module="residual_dropout",
            on="cuda",
            fields=ROW_FIELDS,
            key=lambda sizes: _rows_and_key(sizes["k"], *_sizes_dtypes(sizes))[1],
            space=lambda arch, sizes: _rows_and_key(sizes["k"], *_sizes_dtypes(sizes))[0],
            default=lambda arch, n_sms, sizes: _rows_and_key(sizes["k"], *_sizes_dtypes(sizes))[0][0],
            works=_works,
            trial=_trial,
        )
    ]


# --- torch operators ---------------------------------------------------------------------------------------


def _residual_dropout(
    residual: Tensor | None, y: Tensor, dropout: float, seed: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """residual + dropout(y) of rows [M, K], contiguous, in ``out_dtype``."""
    dtypes = (y.dtype, out_dtype, y.dtype if residual is None else residual.dtype)
    backend = backend_for(y)
    if backend == "native" and torch.float64 not in dtypes and native.supports("blend_rows", y.dtype):
        return _residual_dropout_native(residual, y, dropout, seed, out_dtype)
    if backend in ("triton", "interpreter") and all(dtype in TRITON_DTYPES.values() for dtype in dtypes):
        return _launch_residual_dropout(residual, y, dropout, seed, out_dtype)
    return _residual_dropout_torch(residual, y, dropout, seed, out_dtype)


_residual_dropout_op = torch.library.custom_op("tetra::residual_dropout", _residual_dropout, mutates_args=())


@_residual_dropout_op.register_fake
def _(residual: Tensor | None, y: Tensor, dropout: float, seed: Tensor, out_dtype: torch.dtype) -> Tensor:
    return torch.empty_like(y, dtype=out_dtype)


def add_dropped(
    residual: Tensor | None, y: Tensor, dropout: float, seed: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """residual + dropout(y) in ``out_dtype``, [..., K]; without a seed nothing is dropped. There is no gradient."""
    if seed is None:
        return (y if residual is None else residual + y).to(out_dtype)
    rows = None if residual is None else residual.reshape(-1, residual.shape[-1]).contiguous()
    run = operator_or_function(y, _residual_dropout_op, _residual_dropout)
    out: Tensor = run(rows, y.reshape(-1, y.shape[-1]).contiguous(), dropout, seed, out_dtype)
    return out.view(y.shape)


class _ResidualDropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor | None, y: Tensor, dropout: float, seed: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.dropout, ctx.dtypes = dropout, (None if residual is None else residual.dtype, y.dtype)
        return add_dropped(residual, y, dropout, seed, out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (seed,), (residual_dtype, y_dtype) = ctx.saved_tensors, ctx.dtypes
        grad_y = add_dropped(None, grads[0], ctx.dropout, seed, y_dtype) if ctx.needs_input_grad[1] else None
        return None if residual_dtype is None else grads[0].to(residual_dtype), grad_y, None, None, None


# --- public ------------------------------------------------------------------------------------------------


def residual_dropout(residual: Tensor | None, y: Tensor, dropout: float, seed: int | Tensor = 0) -> Tensor:
    """residual + dropout(y), with a gradient, in the wider dtype of the two.

    Args:
        residual: float [..., K], or None for dropout alone.
        y: float [..., K], of the same shape.
        dropout: share of the values of y to drop, below 1; the others are divided by 1 - dropout.
        seed: of what is dropped: an integer, or an int64 tensor with one element on y's device.
    """
    check_dropout(dropout)
    check_branch(residual, y)
    out_dtype = y.dtype if residual is None else torch.promote_types(residual.dtype, y.dtype)
    drawn = seed_of(seed, dropout, y.device)
    if drawn is None:
        return y if residual is None else residual + y
    out: Tensor = _ResidualDropout.apply(residual, y, dropout, drawn, out_dtype)
    return out


def check_branch(residual: Tensor | None, y: Tensor) -> None:
    """TypeError or ValueError unless ``y`` can be added to ``residual``."""
    for name, tensor in (("residual", residual), ("y", y)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: dtype is {tensor.dtype}, wanted a floating dtype")
    if y.ndim == 0:
        raise ValueError("y: has no dimension; wanted [..., K]")
    if residual is None:
        return
    if residual.shape != y.shape:
        raise ValueError(f"residual: shape is {tuple(residual.shape)}, wanted that of y, {tuple(y.shape)}")
    if residual.device != y.device:
        raise ValueError(f"residual: is on {residual.device}, but y is on {y.device}; move one of them")
