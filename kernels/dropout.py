"""Dropout without stored masks: whether a value is kept is computed from where it stands.

Contract
    words: integers below 2^32, of which the first two are the low and the high half of a 64-bit seed
    hash(w_1, w_2, ...) = h_n, where h_0 = START and h_i = mix(h_i-1 xor w_i), 32 bits
    A value is kept where the hash of its words is at least ``threshold(p)`` = p 2^32, rounded; what is kept is
    multiplied by ``keep_scale(p)`` = 1 / (1 - p), with p as rounded.
    The same bits on every backend: int64 with masks in PyTorch, uint32 in compiled kernels.

Words that change together (the key of a row of weights) come last, so that a kernel hashes the others once.
Source: ``mix`` is lowbias32 of Chris Wellons's hash prospector (nullprogram.com/blog/2018/07/31), a bijection of 32-bit
words found by a search for the least bias: a change of any bit flips every bit of the result about half of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tetra.kernels.backend import HAS_TRITON, tl, triton

MASK = 0xFFFFFFFF
START = 0x9E3779B9  # any word but 0, which mix maps to itself
_START = tl.constexpr(START) if HAS_TRITON else None


def check_dropout(dropout: float) -> None:
    """ValueError unless ``dropout`` is a probability below 1."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: is {dropout}, wanted 0 <= dropout < 1")


def threshold(p: float) -> int:
    """What the hash of a value that is kept is at least; 0 keeps every value."""
    return min(round(p * 2**32), MASK)


def keep_scale(p: float) -> float:
    """What values that are kept are multiplied by, so that means stay as they were."""
    return 2**32 / (2**32 - threshold(p))


def mix(x: Tensor) -> Tensor:
    """int64 words in [0, 2^32) -> the same, well mixed."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def hash_words(*words: Tensor) -> Tensor:
    """Hash of int64 words in [0, 2^32), broadcast against each other."""
    state = mix(words[0] ^ START)
    for word in words[1:]:
        state = mix(state ^ word)
    return state


def seed_words(seed: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high half of int64 seeds."""
    return seed & MASK, (seed >> 32) & MASK


def dropped_scale(seed: Tensor, dropout: float, first: int, m: int, k: int) -> Tensor:
    """What rows are multiplied by: 0 or 1 / (1 - dropout), float64 [m, k] from row ``first`` on.

    The words are the seed's, the row and the column.
    """
    rows = torch.arange(first, first + m, device=seed.device).unsqueeze(1)
    words = hash_words(*seed_words(seed), rows, torch.arange(k, device=seed.device))
    return (words >= threshold(dropout)).to(torch.float64) * keep_scale(dropout)


def dropout_constants(dropout: float) -> dict[str, Any]:
    """Constant arguments of the kernels that drop values."""
    return {"THRESHOLD": threshold(dropout), "KEEP_SCALE": keep_scale(dropout)}


def seed_of(seed: int | Tensor | None, dropout: float, device: torch.device) -> Tensor | None:
    """``seed`` as an int64 tensor [] on ``device``, or None where nothing is dropped."""
    if not threshold(dropout):
        return None
    if not isinstance(seed, Tensor):
        return torch.full((), 0 if seed is None else seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed: dtype is {seed.dtype}, wanted torch.int64")
    if seed.numel() != 1 or seed.device != device:
        raise ValueError(f"seed: {seed.numel()} elements on {seed.device}, wanted 1 on {device}, where x is")
    return seed.reshape(())


@triton.jit
def mix_in_registers(x):
    """``mix`` of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def hash_seed(seed):
    """Hash of an int64 seed, to go on with: ``mix_in_registers(state ^ word)`` for every further word."""
    state = mix_in_registers(seed.to(tl.uint32) ^ _START)
    return mix_in_registers(state ^ (seed >> 32).to(tl.uint32))


@triton.jit
def hash_row(seed_ptr, row):
    """Hash of seed and row, to which the column is still to come."""
    return mix_in_registers(hash_seed(tl.load(seed_ptr)) ^ row.to(tl.uint32))


@triton.jit
def dropout_factor(row_hash, columns, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr):
    """What values of a row are multiplied by."""
    return tl.where(mix_in_registers(row_hash ^ columns.to(tl.uint32)) >= THRESHOLD, KEEP_SCALE, 0.0)
