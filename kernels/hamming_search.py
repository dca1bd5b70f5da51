"""Exact search of binary codes by Hamming distance.

Contract
    letters: Q queries, R rows of the database, B >= 1 bytes a code, k neighbours
    hamming_search(queries uint8 [Q, B], database uint8 [R, B], k)
        -> (distances int32 [Q, k], rows int64 [Q, k])          the k nearest rows, 1 <= k <= R
    hamming_range_search(queries, database, radius)
        -> (offsets int64 [Q + 1], distances int32 [N], rows int64 [N])
        all rows at a distance of at most ``radius``; those of query i are [offsets[i] : offsets[i + 1]]
    hamming_distances(queries, database) -> int32 [Q, R]        all distances
    ``allowed``, bool [R], leaves rows out, as if they were not there; where fewer than k are left, what is missing has
    distance -1 and row -1.

Answers are sorted by (distance, row): equal distances have one order, so that every backend gives the same answer.

On the CPU, compiled: rows are read where they lie (a memory-mapped file need not be loaded), in blocks that stay in
the second-level cache while the queries pass over them. ``threads`` is by default what PyTorch uses, and fewer where a
job is so small that more would only wait for each other.

Errors
    TypeError for a dtype that is not uint8 (bool for ``allowed``); ValueError for shapes that do not fit and for a k,
    radius or number of threads out of range.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tetra.kernels import native
from tetra.kernels.backend import backend_for, operator_or_function

_BLOCK_BYTES = 1 << 18  # of the database: a share of one core's L2 cache
_HEAP_BYTES = 1 << 26  # of candidates, kept at once
_ROW_BITS = 32  # of a key that holds (distance, row)


# --- reference ---------------------------------------------------------------------------------------------


def hamming_distances_reference(queries: Tensor, database: Tensor) -> Tensor:
    """Bits that differ, by definition."""
    differing = queries.unsqueeze(1) ^ database.unsqueeze(0)
    bits = (differing.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=queries.device)) & 1
    return bits.sum(dim=(-2, -1), dtype=torch.int32)


def hamming_search_reference(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All distances, then a stable sort, which keeps rows of equal distance in their order."""
    distances, rows = torch.sort(hamming_distances_reference(queries, database), dim=1, stable=True)
    return distances[:, :k], rows[:, :k]


# --- CPU, without the compiled kernels -----------------------------------------------------------------------


def _as_words(codes: Tensor) -> npt.NDArray[np.uint64]:
    """[rows, B] bytes as [rows, ceil(B / 8)] 64-bit words; zeros that fill the last one add no distance."""
    array = codes.numpy()
    missing = -array.shape[1] % 8
    return np.ascontiguousarray(np.pad(array, ((0, 0), (0, missing))) if missing else array).view(np.uint64)


def _blocks(queries: Tensor, database: Tensor) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
    """(first row, query, distances of a block's rows), blocks in order."""
    query_words = _as_words(queries)
    block = max(_BLOCK_BYTES // (8 * query_words.shape[1]), 1)
    # A product with ones adds counts fastest, and float32 is exact below 2^24 bits.
    ones = np.ones(query_words.shape[1], dtype=np.float32)
    for start in range(0, len(database), block):
        words = _as_words(database[start : start + block])
        for i, query in enumerate(query_words):
            yield start, i, (np.bitwise_count(words ^ query).astype(np.float32) @ ones).astype(np.int64)


def _search_numpy(queries: Tensor, database: Tensor, k: int, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    missing = np.iinfo(np.int64).max
    # One int64 key holds (distance, row), so that its order is the order of the answer.
    best = np.full((len(queries), k), missing)
    for start, i, distances in _blocks(queries, database):
        kept = best[i]
        near = distances < (kept[-1] >> _ROW_BITS)  # a later row loses a tie
        if allowed is not None:
            near &= allowed[start : start + len(near)].numpy()
        if near.any():
            found = np.flatnonzero(near)
            candidates = np.concatenate([kept, (distances[found] << _ROW_BITS) | (start + found)])
            kept[:] = np.sort(np.partition(candidates, k - 1)[:k])
    rows = np.where(best == missing, -1, best & ((1 << _ROW_BITS) - 1))
    distances = np.where(best == missing, -1, best >> _ROW_BITS)
    return torch.from_numpy(distances.astype(np.int32)), torch.from_numpy(rows)


def _range_numpy(
    queries: Tensor, database: Tensor, radius: int, allowed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    parts: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(len(queries))]
    for start, i, distances in _blocks(queries, database):
        near = distances <= radius
        if allowed is not None:
            near &= allowed[start : start + len(near)].numpy()
        found = np.flatnonzero(near)
        parts[i].append((distances[found] << _ROW_BITS) | (start + found))
    keys = [np.sort(np.concatenate([np.empty(0, np.int64), *part])) for part in parts]
    offsets = np.cumsum([0, *map(len, keys)])
    flat = np.concatenate([np.empty(0, np.int64), *keys])
    return (
        torch.from_numpy(offsets.astype(np.int64)),
        torch.from_numpy((flat >> _ROW_BITS).astype(np.int32)),
        torch.from_numpy(flat & ((1 << _ROW_BITS) - 1)),
    )


def _distances_numpy(queries: Tensor, database: Tensor) -> Tensor:
    out = torch.empty((len(queries), len(database)), dtype=torch.int32)
    for start, i, distances in _blocks(queries, database):
        out[i, start : start + len(distances)] = torch.from_numpy(distances)
    return out


# --- torch operators ---------------------------------------------------------------------------------------


def _compiled_on_cpu(queries: Tensor) -> bool:
    return backend_for(queries) == "native" and native.supports("hamming", queries.dtype)


def _search(
    queries: Tensor, database: Tensor, k: int, allowed: Tensor | None, threads: int | None
) -> tuple[Tensor, Tensor]:
    device = queries.device
    queries, database = queries.detach().cpu(), database.detach().cpu()
    allowed = None if allowed is None else allowed.cpu()
    if not _compiled_on_cpu(queries):
        distances, rows = _search_numpy(queries, database, k, allowed)
        return distances.to(device), rows.to(device)
    at_once = max(_HEAP_BYTES // (8 * k * native.hamming_threads(queries, database, threads)), 1)
    parts = [native.hamming_search(part, database, k, allowed, threads) for part in queries.split(at_once)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([distances for distances, _ in parts]), torch.cat([rows for _, rows in parts])


_search_op = torch.library.custom_op("tetra::hamming_search", _search, mutates_args=())


@_search_op.register_fake
def _(queries: Tensor, database: Tensor, k: int, allowed: Tensor | None, threads: int | None) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.int64)


def _distances(queries: Tensor, database: Tensor, threads: int | None) -> Tensor:
    device = queries.device
    queries, database = queries.detach().cpu(), database.detach().cpu()
    if _compiled_on_cpu(queries):
        return native.hamming_distances(queries, database, threads)
    return _distances_numpy(queries, database).to(device)


_distances_op = torch.library.custom_op("tetra::hamming_distances", _distances, mutates_args=())


@_distances_op.register_fake
def _(queries: Tensor, database: Tensor, threads: int | None) -> Tensor:
    return queries.new_empty((queries.shape[0], database.shape[0]), dtype=torch.int32)


# --- public ------------------------------------------------------------------------------------------------


def _check(queries: Tensor, database: Tensor, allowed: Tensor | None, threads: int | None) -> None:
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
    if allowed is not None and allowed.dtype != torch.bool:
        raise TypeError(f"allowed: dtype is {allowed.dtype}, wanted torch.bool")
    if allowed is not None and allowed.shape != database.shape[:1]:
        raise ValueError(f"allowed: shape is {tuple(allowed.shape)}, wanted [{len(database)}], one for every row")
    if threads is not None and threads < 1:
        raise ValueError(f"threads: {threads}; wanted 1 or more, or None")


def hamming_search(
    queries: Tensor, database: Tensor, k: int, *, allowed: Tensor | None = None, threads: int | None = None
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest rows of ``database`` (uint8 [R, B]) for every one of ``queries`` (uint8 [Q, B]).

    Args:
        k: 1 to R.
        allowed: bool [R]; rows to leave out are False.
        threads: of the CPU; None: those of PyTorch, fewer for small jobs.

    Returns:
        Distances int32 [Q, k] and row numbers int64 [Q, k], on the device of ``queries``, nearest first, equal ones by
        row; -1 and -1 past the last where fewer than k rows are allowed.
    """
    _check(queries, database, allowed, threads)
    if k < 1:
        raise ValueError(f"k: {k} is not a number of neighbours; wanted 1 or more")
    if k > database.shape[0]:
        raise ValueError(f"k: {k} neighbours asked for, but the database has {database.shape[0]} rows; lower k")
    run = operator_or_function(queries, _search_op, _search)
    found: tuple[Tensor, Tensor] = run(queries, database, k, allowed, threads)
    return found


def hamming_range_search(
    queries: Tensor, database: Tensor, radius: int, *, allowed: Tensor | None = None, threads: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All rows of ``database`` (uint8 [R, B]) at a distance of at most ``radius`` from ``queries`` (uint8 [Q, B]).

    Returns:
        Offsets int64 [Q + 1], distances int32 [N] and rows int64 [N], on the device of ``queries``: the answers to
        query i are those from offsets[i] to offsets[i + 1], nearest first, equal ones by row.
    """
    _check(queries, database, allowed, threads)
    if radius < 0:
        raise ValueError(f"radius: {radius} is not a distance; wanted 0 or more")
    radius = min(radius, 8 * queries.shape[1])  # as far as there is
    device = queries.device
    queries, database = queries.detach().cpu(), database.detach().cpu()
    allowed = None if allowed is None else allowed.cpu()
    if _compiled_on_cpu(queries):
        return native.hamming_range_search(queries, database, radius, allowed, threads)
    offsets, distances, rows = _range_numpy(queries, database, radius, allowed)
    return offsets.to(device), distances.to(device), rows.to(device)


def hamming_distances(queries: Tensor, database: Tensor, *, threads: int | None = None) -> Tensor:
    """Every distance between ``queries`` (uint8 [Q, B]) and ``database`` (uint8 [R, B]): int32 [Q, R]."""
    _check(queries, database, None, threads)
    out: Tensor = operator_or_function(queries, _distances_op, _distances)(queries, database, threads)
    return out
