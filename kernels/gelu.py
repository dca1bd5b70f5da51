"""GELU (the exact one, with erf) at the price of one exponential: what kernels apply to values in registers.

Contract
    gelu(x) = x Phi(x) = x/2 (1 + erf(x / sqrt 2)), in float32
    computed as max(x, 0) - |x| 2^P(|x|) with the polynomial P(z) ~= log2 Phi(-z) of degree 8

13 instructions on sm_80 (nine multiply-adds, one base-2 exponential), with no branch and no division. With the erf of
CUDA's library it is 34, so that in the epilogue of a ternary product, where a thread holds 128 values, GELU would
take more instructions than the whole main loop at K = 768.

Error against float64: at most 3e-7 gelu(x) for x > 0 and at most 1e-7 for x < 0, where x/2 (1 + erf) in float32 errs by
1e-6, because 1 + erf cancels. NaN and infinity, of either sign, give NaN.

The polynomial is a weighted minimax fit on [0, 5]: relative error of Phi, times max(z, 1), down to Phi = 1e-3, absolute
error below. Its leading coefficient is negative, so that 2^P goes on falling to 0 beyond.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tetra.kernels.backend import tl, triton


def gelu_reference(x: Tensor) -> Tensor:
    """x Phi(x) by definition, in float64."""
    x = x.to(torch.float64)
    return 0.5 * x * torch.special.erfc(-x / 2**0.5)


@triton.jit
def _tail_in_registers(z):
    """Phi(-z), for z >= 0."""
    p = z * -1.1517176e-06 + 1.888732e-05
    p = p * z - 8.826607e-05
    p = p * z - 0.00037169896
    p = p * z + 0.0073629483
    p = p * z - 0.052694794
    p = p * z - 0.4591465
    p = p * z - 1.1511122
    p = p * z - 0.9999999
    return tl.exp2(p)


@triton.jit
def gelu_in_registers(x):
    """GELU of a float32 tile, for use inside kernels."""
    z = tl.abs(x)
    return tl.maximum(x, 0.0) - z * _tail_in_registers(z)


@triton.jit
def gelu_with_slope(x):
    """The same, and its derivative Phi(x) + x phi(x) with phi(x) = exp(-x^2 / 2) / sqrt(2 pi)."""
    z = tl.abs(x)
    tail = _tail_in_registers(z)
    density = tl.exp2(x * x * -0.72134752) * 0.39894228
    return tl.maximum(x, 0.0) - z * tail, tl.where(x > 0.0, 1.0 - tail, tail) + x * density
