"""Activations to int8, one scale a row (a token).

Contract
    quantize_rows(x: float [..., K]) -> (x_q int8 [..., K], scale float32 [...]) with x ~= x_q * scale

    m     = max(max |x|, 1e-5)            over the row, in float32
    scale = m / 127
    x_q   = clip(round(x * (127 / m)), -128, 127)      rounding half to even

A row of zeros gives zeros and the scale 1e-5 / 127. Every backend gives the same codes and scales, bit for
bit.

Errors
    TypeError for a dtype that is not floating, ValueError for K = 0 and for rows with NaN or infinity.

Source: TeTRA (arXiv 2503.02511), quantisation of activations; the same as BitNet b1.58's (arXiv 2402.17764).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tetra.kernels.backend import backend_for, on_device_of, tl, triton

LEVELS = 127.0
SMALLEST_MAXIMUM = 1e-5


# --- reference ---------------------------------------------------------------------------------------------


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas of the contract, step by step."""
    x = x.to(torch.float32)
    maximum = x.abs().amax(dim=-1).clamp(min=SMALLEST_MAXIMUM)
    # Tensor by tensor is a true division; torch takes a scalar operand's reciprocal, which rounds twice.
    levels = torch.full_like(maximum, LEVELS)
    x_q = torch.round(x * (levels / maximum).unsqueeze(-1)).clamp(-128, 127).to(torch.int8)
    return x_q, maximum / levels


# --- CPU ---------------------------------------------------------------------------------------------------


def _quantize_rows_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(torch.float32)
    # max(max x, -min x): two reductions without a temporary beat abs and one.
    maximum = torch.maximum(x.amax(dim=-1), -x.amin(dim=-1)).clamp_(min=SMALLEST_MAXIMUM)
    levels = torch.full_like(maximum, LEVELS)
    # |x * (127 / m)| < 127.5, so that there is nothing to clip.
    x_q = torch.mul(x, (levels / maximum).unsqueeze(-1)).round_().to(torch.int8)
    return x_q, maximum / levels


# --- Triton ------------------------------------------------------------------------------------------------

CONFIG_FIELDS = ("BLOCK_K", "num_warps")
CONFIGS = ((1024, 4), (4096, 8))  # the first that holds a row is taken, else the row is read twice


def cost(m: int, k: int, in_bytes: int = 2) -> tuple[int, int]:
    """(float operations, bytes moved at least) of quantising [m, k].

    Absolute value, maximum, product and rounding; one read and one write of every value.
    """
    return 4 * m * k, m * k * (in_bytes + 1) + 4 * m


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # float [M, K], rows contiguous
    x_q_ptr,  # int8 [M, K], contiguous
    scale_ptr,  # float32 [M]
    K,
    stride_x,  # of a row of x, in elements
    ONE_BLOCK: tl.constexpr,  # K <= BLOCK_K: the row is read once
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    x_row = x_ptr + row * stride_x
    x_q_row = x_q_ptr + row * K
    if ONE_BLOCK:
        x = tl.load(x_row + columns, mask=columns < K, other=0.0).to(tl.float32)
        # x * 0 is 0, or NaN where x is not finite: tl.max alone would pass over NaN.
        maximum = tl.max(tl.abs(x)) + tl.sum(x * 0.0)
        maximum = tl.where(maximum < 1e-5, 1e-5, maximum)
        # Adding and subtracting 1.5 * 2^23 rounds half to even.
        rounded = (x * tl.div_rn(127.0, maximum) + 12582912.0) - 12582912.0
        tl.store(x_q_row + columns, rounded.to(tl.int8), mask=columns < K)
    else:
        largest = tl.zeros((BLOCK_K,), tl.float32)
        zeros = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(0, K, BLOCK_K):
            x = tl.load(x_row + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(x))
            zeros += x * 0.0
        maximum = tl.max(largest) + tl.sum(zeros)
        maximum = tl.where(maximum < 1e-5, 1e-5, maximum)
        factor = tl.div_rn(127.0, maximum)
        for start in range(0, K, BLOCK_K):
            x = tl.load(x_row + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
            rounded = (x * factor + 12582912.0) - 12582912.0
            tl.store(x_q_row + start + columns, rounded.to(tl.int8), mask=start + columns < K)
    tl.store(scale_ptr + row, tl.div_rn(maximum, 127.0))


def _launch_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    x_q = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if m:
        block_k, num_warps = next((row for row in CONFIGS if k <= row[0]), CONFIGS[-1])
        # Fusing the multiplication into the addition that rounds would round once instead of twice.
        with on_device_of(x):
            _quantize_rows_kernel[(m,)](
                x,
                x_q,
                scale,
                k,
                x.stride(0),
                ONE_BLOCK=k <= block_k,
                BLOCK_K=block_k,
                num_warps=num_warps,
                enable_fp_fusion=False,
            )
    return x_q, scale


# --- torch operator ----------------------------------------------------------------------------------------


@torch.library.custom_op("tetra::quantize_rows", mutates_args=())
def _quantize_rows_op(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows_unchecked(x)


@_quantize_rows_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


# --- public ------------------------------------------------------------------------------------------------


def quantize_rows_unchecked(x: Tensor) -> tuple[Tensor, Tensor]:
    """``quantize_rows`` of x [M, K] without checks.

    A row with NaN or infinity gets a scale that is not finite, and codes that mean nothing.
    """
    return _quantize_rows_torch(x) if backend_for(x) in ("torch", "native") else _launch_quantize_rows(x)


def check_finite_scale(scale: Tensor) -> None:
    """ValueError naming the first row whose scale shows that it held NaN or infinity."""
    # The maximum is NaN if any is, so that one number tells.
    if scale.numel() and not math.isfinite(float(scale.amax())):
        row = int((~torch.isfinite(scale)).flatten().nonzero()[0])
        raise ValueError(f"x: row {row} holds NaN or infinity; quantisation needs finite values")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [..., K] and float32 scales [...] of ``x`` (float [..., K]); x ~= x_q * scale[..., None]."""
    if not x.is_floating_point():
        raise TypeError(f"x: dtype is {x.dtype}, wanted a floating dtype")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)} has no values in its last dimension; wanted [..., K], K >= 1")
    x_q, scale = _quantize_rows_op(x.detach().reshape(-1, x.shape[-1]))
    check_finite_scale(scale)
    return x_q.view(x.shape), scale.view(x.shape[:-1])
