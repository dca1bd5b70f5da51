"""Rows in registers: what the kernels that work row by row have in common.

One block of threads takes one row and reads it once, in parts: ``CHUNK`` neighbouring values, 16 bytes a thread. So
no part is wasted at the widths that transformers have (768 = 3 x 256, 3072 = 3 x 1024, with one warp and four),
every load is 16 bytes wide, and only the last part of a row may need a mask. A row of K <= 1024 half-precision
values is one warp's, which needs no barrier. Kernels hold the parts in a tuple, whose length is known when they
compile. Rows that registers do not hold (beyond 32768 half-precision values) are read again for every sum, by the
``wide_`` functions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tetra.autotune.table import lookup
from tetra.kernels.backend import arch_of, tl, triton
from tetra.kernels.gelu import gelu_in_registers
from tetra.kernels.interpreted import cast
from tetra.kernels.tunable import Config

MAX_PARTS = 4  # of 16 bytes a thread; more would not fit into 64 registers
MAX_WARPS = 32
# What the compiler is told for the smallest blocks, where it would take 72 registers, and for the largest, where on
# sm_100 it would squeeze a row into 32 and spill. 62 are allocated as 64, of which a multiprocessor holds 1024
# threads' worth: enough loads in flight to saturate its memory. Told 64, the compiler of sm_100 loads so far ahead
# that it spills.
MAX_REGISTERS = 62


def row_config(k: int, dtype: torch.dtype) -> dict[str, int]:
    """``CHUNK``, ``num_warps`` and in part ``maxnreg``: the fewest warps that hold rows of ``k`` values."""
    per_warp = 32 * 16 // max(dtype.itemsize, 2)
    warps = 1
    while MAX_PARTS * per_warp * warps < k and warps < MAX_WARPS:
        warps *= 2
    config = {"CHUNK": per_warp * warps, "num_warps": warps}
    return config | {"maxnreg": MAX_REGISTERS} if warps in (1, MAX_WARPS) else config


def fits_registers(k: int, config: dict[str, Any]) -> bool:
    """Whether a row of ``k`` values is at most ``MAX_PARTS`` chunks; wider ones have to be read several times."""
    return k <= MAX_PARTS * config["CHUNK"]


# --- tables ------------------------------------------------------------------------------------------------

# What kernels over rows choose: values of a part, warps, and the most registers a thread; 0 for the compiler's choice.
ROW_FIELDS = ("CHUNK", "num_warps", "maxnreg")


def row_options(config: Config) -> dict[str, int]:
    """A row of a table as the kernel's and the compiler's arguments."""
    chunk, warps, registers = config
    return {"CHUNK": chunk, "num_warps": warps} | ({"maxnreg": registers} if registers else {})


@lru_cache(maxsize=4096)
def row_configs(k: int, dtype: torch.dtype, limited: bool = True) -> tuple[Config, ...]:
    """The table for rows of ``k`` values: what ``row_config`` says, then more threads, 8 bytes a thread, no limit.

    Args:
        limited: whether the first may have a limit of registers.
    """
    first = row_config(k, dtype)
    registers = first.get("maxnreg", 0) if limited else 0
    rows = [(first["CHUNK"], first["num_warps"], registers)]
    if fits_registers(k, first):
        per_warp = 32 * 16 // max(dtype.itemsize, 2)
        for warps in (1, 2, 4, 8, 16, MAX_WARPS):
            for chunk in (per_warp * warps, per_warp * warps // 2):
                if fits_registers(k, {"CHUNK": chunk}) and chunk < 2 * k:  # at least half of a part is there
                    rows.append((chunk, warps, 0))
    return tuple(dict.fromkeys(rows))


def tuned_row(
    kernel: str, key: str, rows: tuple[Config, ...], device: torch.device, config: Config | None
) -> dict[str, int]:
    """Arguments of a launch: those of ``config``, or of the row that is known to be the best."""
    if config is None:
        config = lookup(kernel, arch_of(device), key, rows, device=device)
    return row_options(config)


def along_rows(x: Tensor) -> Tensor:
    """``x`` [M, K] with neighbouring values side by side, copied if need be."""
    return x if x.stride(1) == 1 else x.contiguous()


TRITON_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@triton.jit
def load_part(row_ptr, columns, END, K: tl.constexpr):
    """float32 values of a row; 0 from column K on. ``END`` is past the last of ``columns``."""
    if END <= K:
        part = tl.load(row_ptr + columns)
    else:
        part = tl.load(row_ptr + columns, mask=columns < K, other=0.0)
    return part.to(tl.float32)


@triton.jit
def store_part(row_ptr, columns, part, END, K: tl.constexpr):
    """``part``, cast to the pointer's type, where there are columns."""
    if END <= K:
        tl.store(row_ptr + columns, cast(part, row_ptr.dtype.element_ty))
    else:
        tl.store(row_ptr + columns, cast(part, row_ptr.dtype.element_ty), mask=columns < K)


@triton.jit
def load_row(x_row, residual_row, total_row, K: tl.constexpr, CHUNK: tl.constexpr, GELU: tl.constexpr):
    """The parts of a row: x, or x + residual (rounded to x's type and stored), then GELU where asked for."""
    columns = tl.arange(0, CHUNK)
    parts = ()
    for start in tl.static_range(0, K, CHUNK):
        part = load_part(x_row, start + columns, start + CHUNK, K)
        if residual_row is not None:
            part += load_part(residual_row, start + columns, start + CHUNK, K)
            part = cast(part, x_row.dtype.element_ty)
            store_part(total_row, start + columns, part, start + CHUNK, K)
            part = part.to(tl.float32)
        if GELU:
            part = gelu_in_registers(part)
        parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
    return parts


@triton.jit
def centre_row(parts, eps, K: tl.constexpr, CHUNK: tl.constexpr):
    """Parts of a row minus its mean, 0 from column K on as ``parts`` are, and 1 / sqrt(variance + eps)."""
    columns = tl.arange(0, CHUNK)
    total = parts[0]
    for i in tl.static_range(1, len(parts)):
        total += parts[i]
    mean = tl.sum(total) * (1.0 / K)
    squares = tl.zeros((CHUNK,), tl.float32)
    centred = ()
    for i in tl.static_range(len(parts)):
        part = parts[i] - mean
        if (i + 1) * CHUNK > K:
            part = tl.where(i * CHUNK + columns < K, part, 0.0)
        squares += part * part
        centred = centred + (part,)  # type: ignore[assignment]  # noqa: RUF005
    return centred, tl.rsqrt(tl.sum(squares) * (1.0 / K) + eps)


@triton.jit
def normalize_row(parts, weight_ptr, bias_ptr, eps, K: tl.constexpr, CHUNK: tl.constexpr):
    """LayerNorm of a row whose parts are 0 from column K on; so are the results."""
    columns = tl.arange(0, CHUNK)
    centred, factor = centre_row(parts, eps, K, CHUNK)
    normalized = ()
    for i in tl.static_range(len(parts)):
        weight = load_part(weight_ptr, i * CHUNK + columns, (i + 1) * CHUNK, K)
        bias = load_part(bias_ptr, i * CHUNK + columns, (i + 1) * CHUNK, K)
        normalized = normalized + (centred[i] * factor * weight + bias,)  # type: ignore[assignment]  # noqa: RUF005
    return normalized


@triton.jit
def wide_part(x_row, residual_row, start, K, CHUNK: tl.constexpr, GELU: tl.constexpr):
    """float32 values of a row from ``start`` on: x, or x + residual, then GELU where asked for."""
    columns = start + tl.arange(0, CHUNK)
    part = tl.load(x_row + columns, mask=columns < K, other=0.0).to(tl.float32)
    if residual_row is not None:
        part += tl.load(residual_row + columns, mask=columns < K, other=0.0).to(tl.float32)
        part = cast(part, x_row.dtype.element_ty).to(tl.float32)
    return gelu_in_registers(part) if GELU else part


@triton.jit
def wide_statistics(x_row, residual_row, eps, K, CHUNK: tl.constexpr, GELU: tl.constexpr):
    """Mean of a row, and 1 / sqrt(variance + eps)."""
    sums = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, K, CHUNK):
        sums += wide_part(x_row, residual_row, start, K, CHUNK, GELU)
    mean = tl.sum(sums) / K
    squares = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, K, CHUNK):
        part = wide_part(x_row, residual_row, start, K, CHUNK, GELU) - mean
        part = tl.where(start + tl.arange(0, CHUNK) < K, part, 0.0)
        squares += part * part
    return mean, tl.rsqrt(tl.sum(squares) / K + eps)


@triton.jit
def wide_affine(part, mean, factor, weight_ptr, bias_ptr, start, K, CHUNK: tl.constexpr):
    """LayerNorm of one part of a row; 0 from column K on."""
    columns = start + tl.arange(0, CHUNK)
    weight = tl.load(weight_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
    return (part - mean) * factor * weight + bias


def norm_signature(
    dtype: str, norm: bool, residual: bool, out: dict[str, str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants of the arguments that kernels over rows share, for their specimens.

    ``out`` are those of the kernel's own.
    """
    types = {"x_ptr": f"*{dtype}", **out, "stride_x": "i32", "stride_residual": "i32", "eps": "fp32"}
    constants: dict[str, Any] = {}
    for name, kind, used in (
        ("residual_ptr", f"*{dtype}", residual),
        ("total_ptr", f"*{dtype}", residual),
        ("weight_ptr", "*fp32", norm),
        ("bias_ptr", "*fp32", norm),
    ):
        if used:
            types[name] = kind
        else:
            constants[name] = None
    return types, constants
