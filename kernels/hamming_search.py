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

On GPUs: ``hamming_popcount`` for few queries, ``hamming_planes`` for many; ``counts_bits`` states which. The database
is laid out anew for each call, in chunks; ``HammingDatabase`` keeps it laid out, and holds more rows than a GPU does.

Errors
    TypeError for a dtype that is not uint8 (bool for ``allowed``); ValueError for shapes and devices that do not fit,
    codes of 2^20 bytes or more, and for a k, radius or number of threads out of range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tetra.kernels import hamming_planes, hamming_popcount, native
from tetra.kernels.backend import arch_of, backend_for, n_sms, operator_or_function

_BLOCK_BYTES = 1 << 18  # of the database: a share of one core's L2 cache
_HEAP_BYTES = 1 << 26  # of candidates, kept at once
_ROW_BITS = 32  # of a key that holds (distance, row)
MERGE_ROW_BITS = 40  # of one where rows of several parts meet
MAX_BYTES = 1 << 20  # a code's: so that distances fit above them


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


# --- GPU ---------------------------------------------------------------------------------------------------

# Multiplications of int8 a clock and multiprocessor, by compute capability; from the peak rates in NVIDIA's data sheets
# over clock and multiprocessors. Popcounts: 16 (CUDA C++ Programming Guide, throughput of instructions).
_PRODUCTS = {80: 2048, 86: 1024, 87: 2048, 89: 1024, 90: 4096, 100: 8192, 120: 1024}
_POPCOUNTS = 16
# Clocks, fitted to both kernels on an H200, from 1 to 1000 queries, k = 25, 100 k to 1 M rows of 192 and 1024 bytes:
# mean error 7 % (popcounts) and 5 %. Of other chips only the rates differ, and the share of the products' that is
# reached: with sm_80's instructions, which do not wait for each other, it is taken to be larger.
_POPCOUNT_SHARE = 0.8
_PRODUCT_SHARES = {90: 0.44, 100: 0.44}
_OTHER_PRODUCT_SHARE = 0.6
_UNPACK = 0.21  # a word of a row, for every block of queries
_OFFER_ROW, _OFFER = 15, 1.06  # a row for every block, a distance: on their way into the lists
_FILL = 16_000  # a query of a block: lists that still take every row
_PREPARE = 380_000  # more than popcounts take before anything is compared: bit planes of the queries
_CHUNK_BYTES = 1 << 30  # of codes that are laid out anew, or moved to a GPU, at once


def counts_bits(arch: int, n_queries: int, n_rows: int, n_bytes: int, sms: int) -> bool:
    """Whether popcounts take no longer than tensor cores, on a GPU of compute capability ``arch`` with ``sms``
    multiprocessors.

    Cost model, clocks of a multiprocessor, which gets R = n_rows / sms rows of W words of 32 bits; Q' are the queries
    rounded up to whole blocks of a kernel, of which there are n, of b queries::

        popcounts      R W Q' / (16 * 0.8)
        tensor cores   R (0.21 n W + 15 n + Q' (32 W / (share of the products a clock) + 1.06)) + 16 000 b + 380 000

    Few queries are limited by memory with either. docs/search.md has the numbers of queries at which it changes.
    """
    products = _PRODUCTS.get(arch, min(_PRODUCTS.values())) * _PRODUCT_SHARES.get(arch, _OTHER_PRODUCT_SHARE)
    rows, words = n_rows / sms, -(-n_bytes // 4)
    block = hamming_popcount.default_config(n_queries)[0]
    by_counting = rows * words * -(-n_queries // block) * block / (_POPCOUNTS * _POPCOUNT_SHARE)
    block = hamming_planes.default_config(arch, n_queries)[0]
    a_query = 32 * words / products + _OFFER
    a_row = -(-n_queries // block) * (_UNPACK * words + _OFFER_ROW + block * a_query)
    return by_counting <= rows * a_row + _FILL * min(n_queries, block) + _PREPARE


def gpu_kernel(queries: Tensor, n_rows: int) -> ModuleType:
    """The file whose kernels search ``n_rows`` rows for ``queries`` (uint8 [Q, B]): ``hamming_popcount`` or
    ``hamming_planes``."""
    n_queries, n_bytes = queries.shape
    device = queries.device
    few = n_bytes > hamming_planes.MAX_BYTES or counts_bits(arch_of(device), n_queries, n_rows, n_bytes, n_sms(device))
    return hamming_popcount if few else hamming_planes


def rows_at_once(n_bytes: int) -> int:
    """Rows of a chunk that is laid out or moved at once: whole tiles, at least one."""
    tile = hamming_popcount.TILE_ROWS
    return min(max(_CHUNK_BYTES // n_bytes // tile, 1) * tile, hamming_popcount.MAX_ROWS // tile * tile)


def merge_nearest(parts: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of several answers for the same queries, each (distances [Q, k_i], rows [Q, k_i])."""
    if len(parts) == 1 and parts[0][0].shape[1] == k:
        return parts[0]
    distances, rows = (torch.cat(values, dim=1) for values in zip(*parts, strict=True))
    if distances.shape[1] < k:
        missing = (0, k - distances.shape[1])
        distances, rows = F.pad(distances, missing, value=-1), F.pad(rows, missing, value=-1)
    keys = (distances.to(torch.int64) << MERGE_ROW_BITS) | rows
    order = keys.masked_fill_(rows < 0, torch.iinfo(torch.int64).max).argsort(dim=1)[:, :k]
    return distances.gather(1, order), rows.gather(1, order)


def merge_ranges(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The answers to a range search of several parts of the rows, for the same queries, as one."""
    if len(parts) == 1:
        return parts[0]
    counts = [offsets.diff() for offsets, _, _ in parts]
    queries = torch.cat([torch.arange(len(c), device=c.device).repeat_interleave(c) for c in counts])
    distances, rows = (torch.cat(values) for values in list(zip(*parts, strict=True))[1:])
    order = ((distances.to(torch.int64) << MERGE_ROW_BITS) | rows).argsort()
    order = order[queries[order].argsort(stable=True)]
    offsets = F.pad(torch.stack(counts).sum(0).cumsum(0), (1, 0))
    return offsets, distances[order], rows[order]


def search_words(
    queries: Tensor, words: Tensor, n_rows: int, k: int, allowed: Tensor | None, first_row: int
) -> tuple[Tensor, Tensor]:
    """The ``min(k, n_rows)`` nearest of codes that are laid out for GPUs; see ``hamming_popcount.word_major``."""
    k = min(k, n_rows)
    if k > hamming_popcount.MAX_K:  # more than a list of the kernels holds
        distances = gpu_kernel(queries, n_rows).launch_distances(queries, words, n_rows)
        if allowed is not None:
            distances.masked_fill_(~allowed, hamming_popcount.MAX_BYTES * 8)
        distances, rows = distances.sort(dim=1, stable=True)
        distances, rows = distances[:, :k], rows[:, :k]
        missing = distances == hamming_popcount.MAX_BYTES * 8
    else:
        keys = gpu_kernel(queries, n_rows).launch_topk(queries, words, n_rows, k, allowed)
        missing = keys == hamming_popcount.NO_KEY
        distances, rows = (keys >> 32).to(torch.int32), keys & 0xFFFFFFFF
    return distances.masked_fill(missing, -1), (rows + first_row).masked_fill(missing, -1)


def range_of_words(
    queries: Tensor, words: Tensor, n_rows: int, radius: int, allowed: Tensor | None, first_row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows within ``radius`` among codes that are laid out for GPUs."""
    offsets, distances, rows = gpu_kernel(queries, n_rows).launch_range(queries, words, n_rows, radius, allowed)
    return offsets, distances, rows + first_row


def in_chunks(database: Tensor, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, number of rows, their words on ``device``), chunk by chunk."""
    step = rows_at_once(database.shape[1])
    for start in range(0, len(database), step):
        part = database[start : start + step].to(device)
        yield start, len(part), hamming_popcount.word_major(part)


def _part(allowed: Tensor | None, first_row: int, n_rows: int) -> Tensor | None:
    return None if allowed is None else allowed[first_row : first_row + n_rows]


def _with_triton(queries: Tensor) -> bool:
    return backend_for(queries) in ("triton", "interpreter") and queries.shape[1] <= hamming_popcount.MAX_BYTES


# --- torch operators ---------------------------------------------------------------------------------------


def _compiled_on_cpu(queries: Tensor) -> bool:
    return backend_for(queries) == "native" and native.supports("hamming", queries.dtype)


def _search(
    queries: Tensor, database: Tensor, k: int, allowed: Tensor | None, threads: int | None
) -> tuple[Tensor, Tensor]:
    device = queries.device
    queries, database = queries.detach(), database.detach()
    if _with_triton(queries):
        parts = [
            search_words(queries, words, n, k, _part(allowed, start, n), start)
            for start, n, words in in_chunks(database, device)
        ]
        return merge_nearest(parts, k)
    queries, database = queries.cpu(), database.cpu()
    allowed = None if allowed is None else allowed.cpu()
    if not _compiled_on_cpu(queries):
        distances, rows = _search_numpy(queries, database, k, allowed)
        return distances.to(device), rows.to(device)
    at_once = max(_HEAP_BYTES // (8 * k * native.hamming_threads(queries, database, threads)), 1)
    if len(queries) <= at_once:
        return native.hamming_search(queries, database, k, allowed, threads)
    parts = [native.hamming_search(part, database, k, allowed, threads) for part in queries.split(at_once)]
    return torch.cat([distances for distances, _ in parts]), torch.cat([rows for _, rows in parts])


_search_op = torch.library.custom_op("tetra::hamming_search", _search, mutates_args=())


@_search_op.register_fake
def _(queries: Tensor, database: Tensor, k: int, allowed: Tensor | None, threads: int | None) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.int64)


def _range_search(
    queries: Tensor, database: Tensor, radius: int, allowed: Tensor | None, threads: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    device = queries.device
    queries, database = queries.detach(), database.detach()
    if _with_triton(queries) and len(database):
        parts = [
            range_of_words(queries, words, n, radius, _part(allowed, start, n), start)
            for start, n, words in in_chunks(database, device)
        ]
        return merge_ranges(parts)
    queries, database = queries.cpu(), database.cpu()
    allowed = None if allowed is None else allowed.cpu()
    if _compiled_on_cpu(queries):
        return native.hamming_range_search(queries, database, radius, allowed, threads)
    offsets, distances, rows = _range_numpy(queries, database, radius, allowed)
    return offsets.to(device), distances.to(device), rows.to(device)


def _distances(queries: Tensor, database: Tensor, threads: int | None) -> Tensor:
    device = queries.device
    queries, database = queries.detach(), database.detach()
    if _with_triton(queries) and len(database):
        parts = in_chunks(database, device)
        return torch.cat([gpu_kernel(queries, n).launch_distances(queries, words, n) for _, n, words in parts], dim=1)
    queries, database = queries.cpu(), database.cpu()
    if _compiled_on_cpu(queries):
        return native.hamming_distances(queries, database, threads)
    return _distances_numpy(queries, database).to(device)


_distances_op = torch.library.custom_op("tetra::hamming_distances", _distances, mutates_args=())


@_distances_op.register_fake
def _(queries: Tensor, database: Tensor, threads: int | None) -> Tensor:
    return queries.new_empty((queries.shape[0], database.shape[0]), dtype=torch.int32)


# --- public ------------------------------------------------------------------------------------------------


def check_codes(name: str, codes: Tensor) -> None:
    """TypeError and ValueError unless ``codes`` is uint8 [rows, B], 1 <= B < ``MAX_BYTES``."""
    if codes.dtype != torch.uint8:
        raise TypeError(f"{name}: dtype is {codes.dtype}, wanted torch.uint8 (see pack_bits)")
    if codes.ndim != 2 or codes.shape[1] == 0:
        raise ValueError(f"{name}: shape is {tuple(codes.shape)}, wanted [rows, bytes], 1 byte or more")
    if codes.shape[1] >= MAX_BYTES:
        raise ValueError(f"{name}: {codes.shape[1]} bytes a code, wanted fewer than {MAX_BYTES}")


def check_search(queries: Tensor, database: Tensor, allowed: Tensor | None, threads: int | None) -> None:
    """ValueError and TypeError for arguments that all searches share, on one device."""
    check_codes("queries", queries)
    check_codes("database", database)
    if queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"queries: {queries.shape[1]} bytes a code, but the database has {database.shape[1]}; "
            "both have to come from one model"
        )
    if allowed is not None and allowed.dtype != torch.bool:
        raise TypeError(f"allowed: dtype is {allowed.dtype}, wanted torch.bool")
    if allowed is not None and allowed.shape != database.shape[:1]:
        raise ValueError(f"allowed: shape is {tuple(allowed.shape)}, wanted [{len(database)}], one for every row")
    for name, tensor in (("database", database), ("allowed", allowed)):
        if tensor is not None and tensor.device != queries.device:
            raise ValueError(f"{name}: is on {tensor.device}, but queries are on {queries.device}; move one of them")
    if threads is not None and threads < 1:
        raise ValueError(f"threads: {threads}; wanted 1 or more, or None")


def check_k(k: int, n_rows: int) -> None:
    """ValueError unless 1 <= k <= n_rows."""
    if k < 1:
        raise ValueError(f"k: {k} is not a number of neighbours; wanted 1 or more")
    if k > n_rows:
        raise ValueError(f"k: {k} neighbours asked for, but the database has {n_rows} rows; lower k")


def check_radius(radius: int) -> None:
    """ValueError for a negative one."""
    if radius < 0:
        raise ValueError(f"radius: {radius} is not a distance; wanted 0 or more")


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
    check_search(queries, database, allowed, threads)
    check_k(k, len(database))
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
    check_search(queries, database, allowed, threads)
    check_radius(radius)
    return _range_search(queries, database, min(radius, 8 * queries.shape[1]), allowed, threads)


def hamming_distances(queries: Tensor, database: Tensor, *, threads: int | None = None) -> Tensor:
    """Every distance between ``queries`` (uint8 [Q, B]) and ``database`` (uint8 [R, B]): int32 [Q, R]."""
    check_search(queries, database, None, threads)
    out: Tensor = operator_or_function(queries, _distances_op, _distances)(queries, database, threads)
    return out
