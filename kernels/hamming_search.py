"""Exact nearest codes by Hamming distance.

Contract
    hamming_search(queries uint8 [Q, B], database uint8 [R, B], k)
        -> (distances int32 [Q, k], rows int64 [Q, k])

Every row of the answer is sorted by (distance, row number): equal distances have one order, so that every
backend gives the same answer. Any number of bytes B >= 1 and of queries; 1 <= k <= R.

On the CPU the database is visited in blocks that stay in the cache while all queries pass over them;
distances are popcounts of 64-bit words.

Errors
    TypeError for a dtype that is not uint8; ValueError for shapes that do not fit and for a k out of range.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 18  # of the database: a share of one core's L2 cache
_ROW_BITS = 32  # of a key that holds (distance, row)


# --- reference ---------------------------------------------------------------------------------------------


def hamming_search_reference(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All distances, then a stable sort, which keeps rows of equal distance in their order."""
    differing = queries.unsqueeze(1) ^ database.unsqueeze(0)
    bits = (differing.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=queries.device)) & 1
    distances = bits.sum(dim=(-2, -1), dtype=torch.int32)
    distances, rows = torch.sort(distances, dim=1, stable=True)
    return distances[:, :k], rows[:, :k]


# --- CPU ---------------------------------------------------------------------------------------------------


def _as_words(codes: Tensor) -> np.ndarray:
    """[rows, B] bytes as [rows, ceil(B / 8)] 64-bit words; zeros that fill the last one add no distance."""
    array = codes.detach().cpu().numpy()
    missing = -array.shape[1] % 8
    return np.ascontiguousarray(np.pad(array, ((0, 0), (0, missing))) if missing else array).view(np.uint64)


def _search_cpu(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    query_words, words = _as_words(queries), _as_words(database)
    n_rows, n_words = words.shape
    # One int64 key holds (distance, row), so that its order is the order of the answer.
    best = np.full((len(query_words), k), np.iinfo(np.int64).max)
    ones = np.ones(n_words, dtype=np.float32)
    block = max(_BLOCK_BYTES // (8 * n_words), 1)
    for start in range(0, n_rows, block):
        part = words[start : start + block]
        rows = np.arange(start, start + len(part))
        for query, kept in zip(query_words, best, strict=True):
            counts = np.bitwise_count(part ^ query)
            # A product with ones adds them fastest, and float32 is exact below 2^24 bits.
            distances = (counts.astype(np.float32) @ ones).astype(np.int64)
            near = distances < (kept[-1] >> _ROW_BITS)  # a later row loses a tie
            if near.any():
                candidates = np.concatenate([kept, (distances[near] << _ROW_BITS) | rows[near]])
                kept[:] = np.sort(np.partition(candidates, k - 1)[:k])
    distances, rows = best >> _ROW_BITS, best & ((1 << _ROW_BITS) - 1)
    return torch.from_numpy(distances.astype(np.int32)), torch.from_numpy(rows)


# --- torch operator ----------------------------------------------------------------------------------------


@torch.library.custom_op("tetra::hamming_search", mutates_args=())
def _hamming_search_op(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    distances, rows = _search_cpu(queries, database, k)
    return distances.to(queries.device), rows.to(queries.device)


@_hamming_search_op.register_fake
def _(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.int64)


# --- public ------------------------------------------------------------------------------------------------


def hamming_search(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest rows of ``database`` (uint8 [R, B]) for every one of ``queries`` (uint8 [Q, B]).

    Returns distances int32 [Q, k] and row numbers int64 [Q, k], on the device of ``queries``, nearest first.
    """
    for name, codes in (("queries", queries), ("database", database)):
        if codes.dtype != torch.uint8:
            raise TypeError(f"{name}: dtype is {codes.dtype}, wanted torch.uint8 (see pack_bits)")
        if codes.ndim != 2 or codes.shape[1] == 0:
            raise ValueError(f"{name}: shape is {tuple(codes.shape)}, wanted [rows, bytes], 1 byte or more")
    if queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"queries: {queries.shape[1]} bytes a code, but the database has {database.shape[1]}; "
            "both have to come from one model"
        )
    if k < 1:
        raise ValueError(f"k: {k} is not a number of neighbours; wanted 1 or more")
    if k > database.shape[0]:
        raise ValueError(f"k: {k} neighbours asked for, but the database has {database.shape[0]} rows; lower k")
    return _hamming_search_op(queries, database, k)
