"""Binary descriptors: one bit a value, eight values a byte.

Contract
    pack_bits(values [..., D]) -> uint8 [..., ceil(D / 8)]
    unpack_bits(codes uint8 [..., B], n_bits) -> bool [..., n_bits]

A bit is ``value > 0``, everywhere. The most significant bit of a byte comes first and the last byte is filled
with zeros, as ``numpy.packbits`` does. NaN is not greater than zero, so it gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BIT_WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)


def pack_bits(values: Tensor) -> Tensor:
    """Signs of ``values`` (float, integer or bool, [..., D]) as bytes: uint8 [..., ceil(D / 8)]."""
    if values.ndim == 0:
        raise ValueError("values: a scalar has no last dimension to pack; give a tensor of shape [..., D]")
    if values.is_complex():
        raise TypeError(f"values: {values.dtype} has no sign; give a real or bool tensor")
    bits = values if values.dtype == torch.bool else values > 0
    missing = -bits.shape[-1] % 8
    if missing:
        bits = torch.nn.functional.pad(bits, (0, missing))
    grouped = bits.reshape(*bits.shape[:-1], bits.shape[-1] // 8, 8)
    weights = torch.tensor(_BIT_WEIGHTS, dtype=torch.uint8, device=bits.device)
    return (grouped * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(codes: Tensor, n_bits: int) -> Tensor:
    """The first ``n_bits`` bits of every row of ``codes`` (uint8 [..., B]): bool [..., n_bits]."""
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: dtype is {codes.dtype}, wanted torch.uint8")
    if codes.ndim == 0:
        raise ValueError("codes: a scalar has no last dimension; give a tensor of shape [..., B]")
    if not 0 <= n_bits <= 8 * codes.shape[-1]:
        raise ValueError(f"n_bits: {n_bits} is not between 0 and the {8 * codes.shape[-1]} bits of a row")
    weights = torch.tensor(_BIT_WEIGHTS, dtype=torch.uint8, device=codes.device)
    bits = (codes.unsqueeze(-1) & weights) != 0
    return bits.flatten(-2)[..., :n_bits]
