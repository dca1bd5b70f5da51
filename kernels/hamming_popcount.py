"""Hamming distances, nearest rows and rows within a radius on GPUs, by counting bits.

Contract
    letters: Q queries and R rows of B bytes, C = ceil(B / 16) columns of 16 bytes, N = R rounded up to whole tiles,
    k <= 1024
    word_major(codes uint8 [R, B]) -> int32 [C, N, 4]
    launch_distances(queries uint8 [Q, B], words int32 [C, N, 4], n_rows) -> int32 [Q, R]
    launch_topk(queries, words, n_rows, k, allowed bool or uint8 [R] | None, first_row) -> keys int64 [Q, k], sorted
    launch_range(queries, words, n_rows, radius, allowed, first_row)
        -> (offsets int64 [Q + 1], distances int32 [n], rows int64 [n]), by query, then distance, then row

A key is distance << 32 | row, so that the order of keys is the order of the answer: by distance, then by row. Rows
count from ``first_row`` and end at 2^32; where fewer than k rows are allowed, ``NO_KEY``, which is larger than any key,
fills the rest. All take a part of the rows as a view, ``words[:, start:end]`` with start and end multiples of
``TILE_ROWS``. ``kernels/hamming_planes.py`` has the same functions for many queries, with the same answers from the
same words; it shares what follows a tile of distances.

Layout of ``words``
    Words are in the order of columns, all rows of one before the next, but four words of a row stay together. So
    neighbouring threads have neighbouring rows and read 16 bytes each: every load is 128 bits wide and no byte of a
    cache line is left. With words one by one, loads would be four times as many. And 16 bytes is what one asynchronous
    copy moves into shared memory, which is how the tensor cores are fed, so that one copy of the database serves both
    kernels. Rows are padded with zeros to whole tiles, and nothing is masked where distances are counted.

The kernel
    A thread has two rows (four, for one or two queries) and all queries of its block. A word is one XOR, one POPC and
    half an addition, since three numbers are added at once. POPC is the limit, 16 a clock and multiprocessor: at least
    4 C Q R / 16 clocks of one multiprocessor, wherever the words come from memory faster than that.

Nearest rows
    A block walks over the tiles of its part of the rows, in order, and keeps for each of its queries a list of keys and
    a bound, the k-th smallest distance when it was last known. A tile without a distance below its query's bound costs
    one comparison a distance and no more: rows come in order, so one that only equals the k-th loses. Otherwise the
    tile goes through memory, small enough for the caches, and what is below the bounds is appended, at places given by
    prefix sums. A list without place for a further tile is cut to its k nearest: the k-th distance is found by
    bisection, of those at that distance the first stay, and the order of rows stays too. So nothing is sorted in the
    kernel, no list is in registers while distances are counted, k is a number like any other, and the main loop is the
    one of ``launch_distances``. A second launch cuts every list to k; ``torch.topk`` merges those of the parts.
    Tiles without an allowed row are passed over before anything of them is read.

Limits
    R <= 2^31 - 1024 a launch; B <= 2^27 - 16, so that distances stay below 2^30, which is added where a row does not
    count. Workspace: 16 k + 12 BLOCK_R + 1 KiB bytes a list; there is one for each part of the rows and query, queries
    rounded up to whole blocks.

Errors
    TypeError for a wrong dtype; ValueError for shapes that do not fit, k out of range and rows from 2^32 on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tetra.autotune.table import lookup
from tetra.kernels.backend import HAS_TRITON, arch_of, n_sms, on_device_of, tl, triton
from tetra.kernels.sign_similarity import _popcount
from tetra.kernels.specimen import Specimen
from tetra.kernels.tunable import Sizes, Trial, Tunable, Work, bucket, seeded

MAX_K = 1024
MAX_ROWS = 2**31 - 1024  # of a launch: every row of its last tile is an int32
MAX_BYTES = 2**27 - 16
NO_KEY = 2**63 - 1
COLUMN_BYTES = 16
TILE_ROWS = 512  # a multiple of every tile's

_FARTHEST = tl.constexpr(2**30) if HAS_TRITON else None  # at least, of a row that does not count
_NO_KEY = tl.constexpr(NO_KEY) if HAS_TRITON else None
_PIECE = tl.constexpr(512) if HAS_TRITON else None  # keys of a list that are looked at together
_REGISTERS = 96  # a thread: left to itself, the compiler spills a few to get by with less


# --- layout ------------------------------------------------------------------------------------------------


def by_word(codes: Tensor, rows_multiple: int = 1) -> Tensor:
    """uint8 [R, B] as int32 [R, 4 C], R rounded up to a multiple; zeros at the end of a row add no distance."""
    padding = (0, -codes.shape[1] % COLUMN_BYTES, 0, -codes.shape[0] % rows_multiple)
    codes = F.pad(codes, padding) if any(padding) else codes.contiguous()
    codes = codes if codes.data_ptr() % COLUMN_BYTES == 0 else codes.clone()
    return codes.flatten().view(torch.int32).view(codes.shape[0], codes.shape[1] // 4)


def word_major(codes: Tensor) -> Tensor:
    """Codes uint8 [R, B] in the order that the kernels read: int32 [C, N, 4]."""
    n_rows, n_columns = codes.shape[0], -(-codes.shape[1] // COLUMN_BYTES)
    words = codes.new_zeros((n_columns, -(-n_rows // TILE_ROWS) * TILE_ROWS, 4), dtype=torch.int32)
    words[:, :n_rows] = by_word(codes).view(n_rows, n_columns, 4).transpose(0, 1)
    return words


# --- configurations and cost -------------------------------------------------------------------------------

# Queries and rows of a tile, warps, and how many blocks every multiprocessor has place for.
CONFIG_FIELDS = ("BLOCK_Q", "BLOCK_R", "num_warps", "blocks_per_sm")
CONFIGS = (
    (8, 256, 4, 5),
    (4, 256, 4, 5),
    (2, 512, 4, 5),
    (1, 512, 4, 5),
)
# More rows for the tuners.
MORE_CONFIGS = (
    (16, 256, 8, 2),
    (8, 128, 4, 5),
    (8, 256, 8, 2),
    (4, 128, 4, 5),
    (4, 512, 8, 2),
    (2, 256, 4, 5),
    (1, 256, 4, 5),
)


def default_config(n_queries: int) -> tuple[int, ...]:
    """The row of ``CONFIGS`` with the smallest block that holds all queries, or the largest block."""
    return next((row for row in reversed(CONFIGS) if row[0] >= n_queries), CONFIGS[0])


def shape_key(n_queries: int, n_rows: int, n_bytes: int) -> str:
    """Key of a search among the tuned results; for both kernels.

    The number of queries is rounded up to a power of two, that of rows to a power of four from 4096 to 1,048,576: what
    counts is how often the tiles fill a GPU, and from there on they do so many times.
    """
    rows = 1 << 2 * -(-max(n_rows - 1, 0).bit_length() // 2)
    return f"q{bucket(n_queries)}_r{min(max(rows, 2**12), 2**20)}_b{n_bytes}"


@lru_cache(maxsize=4096)
def _rows_and_key(n_queries: int, n_rows: int, n_bytes: int) -> tuple[tuple[tuple[int, ...], ...], str]:
    """What a launch looks up: rows of the table that may run, the default first, and the key."""
    return (default_config(n_queries), *CONFIGS, *MORE_CONFIGS), shape_key(n_queries, n_rows, n_bytes)


def cost(n_queries: int, n_rows: int, n_bytes: int, k: int | None = None) -> tuple[int, int]:
    """(integer operations, bytes moved at least) of a search for k rows or, without k, of all distances.

    Three operations a pair of words: XOR, popcount, addition. What a tile with nearer rows costs depends on the data,
    and is not counted.
    """
    n_columns = -(-n_bytes // COLUMN_BYTES)
    answer = 4 * n_queries * n_rows if k is None else 8 * n_queries * k
    return 12 * n_columns * n_queries * n_rows, COLUMN_BYTES * n_columns * (n_queries + n_rows) + answer


@cache
def parts_of_rows(n_blocks: int, n_tiles: int, n_resident: int, tiles_to_start: int) -> int:
    """How many parts the rows are split into, each walked over by its own block, for ``n_blocks`` blocks of queries.

    The number with which the busiest place of a chip is done first that holds ``n_resident`` blocks at once. To start a
    block and to fill its lists takes as long as ``tiles_to_start`` tiles.
    """

    def tiles_in_turn(parts: int) -> int:
        return -(-n_blocks * parts // n_resident) * (-(-n_tiles // parts) + tiles_to_start)

    most = min(n_tiles, max(4 * n_resident // n_blocks, 1))
    return min(range(1, most + 1), key=tiles_in_turn)


# --- lists of the nearest rows, for every kernel that makes tiles of distances ------------------------------
# Loops that hoist nothing are not unrolled either: registers are what the distances need.


@triton.jit
def start_lists(counts_ptr, bounds_ptr, n_queries, BLOCK_Q: tl.constexpr):
    """Empty lists; what comes after the last query never gets a key."""
    query = tl.arange(0, BLOCK_Q)
    tl.store(counts_ptr + query, tl.zeros((BLOCK_Q,), tl.int32))
    tl.store(bounds_ptr + query, tl.where(query < n_queries, _FARTHEST, 0))
    tl.debug_barrier()


@triton.jit
def _keep_nearest(keys_ptr, n, k):
    """Cuts a list of n > k keys to the k smallest, in their order; gives the largest distance among them.

    It is read over and over, by pieces: it lies in the caches.
    """
    piece = tl.arange(0, _PIECE)
    nearest = tl.full((_PIECE,), 0x7FFFFFFF, tl.int32)
    farthest = tl.zeros((_PIECE,), tl.int32)
    for start in tl.range(0, n, _PIECE, disable_licm=True):
        there = start + piece < n
        distances = (tl.load(keys_ptr + start + piece, mask=there, other=_NO_KEY) >> 32).to(tl.int32)
        nearest = tl.minimum(nearest, distances)
        farthest = tl.maximum(farthest, tl.where(there, distances, 0))
    low = tl.min(nearest)
    high = tl.max(farthest)
    n_nearer = 0  # than low
    while low < high:  # which hold the k-th distance between them
        middle = low + ((high - low) >> 1)
        counts = tl.zeros((_PIECE,), tl.int32)
        for start in tl.range(0, n, _PIECE, disable_licm=True):
            keys = tl.load(keys_ptr + start + piece, mask=start + piece < n, other=_NO_KEY)
            counts += ((keys >> 32).to(tl.int32) <= middle).to(tl.int32)
        n_within = tl.sum(counts)
        n_nearer = tl.where(n_within < k, n_within, n_nearer)
        low = tl.where(n_within < k, middle + 1, low)
        high = tl.where(n_within < k, high, middle)
    n_tied = k - n_nearer  # of those at the k-th distance, the first so many stay
    to = keys_ptr
    for start in tl.range(0, n, _PIECE, disable_licm=True):
        keys = tl.load(keys_ptr + start + piece, mask=start + piece < n, other=_NO_KEY)
        distances = (keys >> 32).to(tl.int32)
        tied = (distances == low).to(tl.int32)
        kept = (distances < low) | ((tied != 0) & (tl.cumsum(tied, 0) <= n_tied))
        place = tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.debug_barrier()  # all threads have their keys before one is overwritten
        tl.store(to + place, keys, mask=kept)
        to += tl.sum(kept.to(tl.int32))
        n_tied -= tl.sum(tied)
    return low


@triton.jit
def offer_tile(
    distances,  # int32 tile [BLOCK_Q, BLOCK_R]; _FARTHEST or more where a row does not count
    first_row,
    keys_ptr,  # int64 [BLOCK_Q, capacity]: the block's lists
    counts_ptr,  # int32 [BLOCK_Q]: of keys in a list
    bounds_ptr,  # int32 [BLOCK_Q]: distances from here on are of no use
    tile_ptr,  # int32 [BLOCK_Q, BLOCK_R], any values
    k,
    capacity,  # > k + BLOCK_R
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,  # rows that are appended together
):
    """Appends what a tile has below the bounds; every list has place for a whole tile, before and after."""
    query = tl.arange(0, BLOCK_Q)
    if tl.max((tl.min(distances, 1) < tl.load(bounds_ptr + query)).to(tl.int32)) != 0:
        tl.store(tile_ptr + query[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :], distances)
        tl.debug_barrier()
        bounds = tl.load(bounds_ptr + query)[:, None]
        counts = tl.load(counts_ptr + query)
        for start in tl.range(0, BLOCK_R, CHUNK, disable_licm=True):
            row = start + tl.arange(0, CHUNK)
            chunk = tl.load(tile_ptr + query[:, None] * BLOCK_R + row[None, :])
            taken = (chunk < bounds).to(tl.int32)
            place = query[:, None] * capacity + counts[:, None] + tl.cumsum(taken, 1) - 1
            keys = (chunk.to(tl.int64) << 32) | (first_row + row).to(tl.int64)[None, :]
            tl.store(keys_ptr + place, keys, mask=taken != 0)
            counts += tl.sum(taken, 1)
        tl.debug_barrier()  # all threads have read the old counts
        tl.store(counts_ptr + query, counts)
        tl.debug_barrier()
        if tl.max(counts) > capacity - BLOCK_R:
            for one in tl.range(0, BLOCK_Q, disable_licm=True):
                n = tl.load(counts_ptr + one)
                if n > capacity - BLOCK_R:
                    tl.store(bounds_ptr + one, _keep_nearest(keys_ptr + one * capacity, n, k))
                    tl.store(counts_ptr + one, k)
        tl.debug_barrier()  # before the next tile is compared with the bounds, and stored


@triton.jit
def _finish_lists_kernel(
    keys_ptr,  # int64 [lists, capacity]: the first k become the smallest of the list, then NO_KEY
    counts_ptr,  # int32 [lists]
    k,
    capacity,
):
    keys_ptr += tl.program_id(0).to(tl.int64) * capacity
    n = tl.load(counts_ptr + tl.program_id(0))
    if n > k:
        _keep_nearest(keys_ptr, n, k)
    else:
        for start in tl.range(n, k, _PIECE, disable_licm=True):
            place = start + tl.arange(0, _PIECE)
            tl.store(keys_ptr + place, tl.full((_PIECE,), _NO_KEY, tl.int64), mask=place < k)


@triton.jit
def rows_that_count(allowed_ptr, first_row, R, BLOCK_R: tl.constexpr):
    """int1 [BLOCK_R]: rows of a tile that there are and that are allowed."""
    rows = first_row + tl.arange(0, BLOCK_R)
    counts = rows < R
    if allowed_ptr is not None:
        counts &= tl.load(allowed_ptr + rows, mask=counts, other=0) != 0
    return counts


def blocks_and_parts(
    n_queries: int, n_rows: int, k: int, fields: dict[str, int], parts: int | None, n_sms: int
) -> tuple[int, int, int]:
    """Blocks of queries, parts of the rows (the best number, unless given), and tiles of a part."""
    block_r = fields["BLOCK_R"]
    n_blocks, n_tiles = -(-n_queries // fields["BLOCK_Q"]), -(-n_rows // block_r)
    n_resident = n_sms * fields["blocks_per_sm"]
    parts = parts or parts_of_rows(n_blocks, n_tiles, n_resident, 2 + 2 * k // block_r)
    tiles_a_part = -(-n_tiles // parts)
    return n_blocks, -(-n_tiles // tiles_a_part), tiles_a_part


def nearest_keys(
    launch: Callable[..., None],
    n_queries: int,
    n_rows: int,
    k: int,
    fields: dict[str, int],
    parts: int | None,
    device: torch.device,
) -> Tensor:
    """Keys int64 [n_queries, k]: makes the lists' memory, lets ``launch`` fill the lists, and merges them.

    Args:
        launch: called with the number of programs, the kernel's pointers of lists, and its tiles a part and capacity.
        fields: one of the kernel's configurations, by name.
        parts: of the rows; the best number, unless given.
    """
    block_q, block_r = fields["BLOCK_Q"], fields["BLOCK_R"]
    n_blocks, parts, tiles_a_part = blocks_and_parts(n_queries, n_rows, k, fields, parts, n_sms(device))
    n_lists = parts * n_blocks * block_q
    capacity = -(-(2 * k + block_r + 128) // 16) * 16
    keys = torch.empty((n_lists, capacity), dtype=torch.int64, device=device)
    counts, bounds = torch.empty((2, n_lists), dtype=torch.int32, device=device)
    tile = torch.empty((n_lists, block_r), dtype=torch.int32, device=device)
    launch(parts * n_blocks, (keys, counts, bounds, tile), tiles_a_part, capacity)
    _finish_lists_kernel[(n_lists,)](keys, counts, k, capacity)
    found = keys.view(parts, n_blocks * block_q, capacity)[:, :n_queries, :k].transpose(0, 1).reshape(n_queries, -1)
    return torch.topk(found, k, dim=1, largest=False).values


_QUERIES_AT_A_TIME = 1 << 14  # bounds the lists' memory


def topk_by_queries(
    topk: Callable[..., Tensor],
    queries: Tensor,
    words: Tensor,
    n_rows: int,
    k: int,
    allowed: Tensor | None,
    first_row: int,
    config: tuple[int, ...] | None,
    parts: int | None,
) -> Tensor:
    """Keys int64 [Q, k]: checks what all kernels check, gives some queries at a time to ``topk``, counts rows on."""
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k: {k} is not between 1 and {MAX_K}")
    allowed = as_bytes(allowed, n_rows)
    found = queries.new_empty((len(queries), k), dtype=torch.int64)
    with on_device_of(queries):
        for start in range(0, len(queries), _QUERIES_AT_A_TIME):
            some = queries[start : start + _QUERIES_AT_A_TIME]
            found[start : start + len(some)] = topk(some, words, n_rows, k, allowed, config, parts)
    return torch.where(found == NO_KEY, found, found + first_row)


_DISTANCES_AT_A_TIME = 1 << 26  # 256 MiB of them


def range_by_rows(
    distances_of: Callable[[Tensor, Tensor, int], Tensor],
    queries: Tensor,
    words: Tensor,
    n_rows: int,
    radius: int,
    allowed: Tensor | None,
    first_row: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The answer of ``launch_range``, from ``distances_of`` queries and parts of the rows."""
    allowed = as_bytes(allowed, n_rows)
    n_queries = len(queries)
    rows_a_part = max(_DISTANCES_AT_A_TIME // max(n_queries, 1) // TILE_ROWS, 1) * TILE_ROWS
    of_query, keys = [], []
    for start in range(0, n_rows, rows_a_part):
        end = min(start + rows_a_part, n_rows)
        distances = distances_of(queries, words[:, start : start + rows_a_part], end - start)
        near = distances <= radius
        if allowed is not None:
            near &= allowed[start:end] != 0
        query, row = near.nonzero(as_tuple=True)
        of_query.append(query)
        keys.append((distances[query, row].to(torch.int64) << 32) + row + (start + first_row))
    query, key = torch.cat(of_query), torch.cat(keys)
    key, order = torch.sort(key)
    query, order = torch.sort(query[order], stable=True)
    key = key[order]
    offsets = torch.searchsorted(query, torch.arange(n_queries + 1, device=query.device))
    return offsets, (key >> 32).to(torch.int32), key & (2**32 - 1)


# --- checks, for both kernels -------------------------------------------------------------------------------


def check_codes(queries: Tensor, words: Tensor, n_rows: int, first_row: int, max_bytes: int) -> None:
    """TypeError or ValueError unless a launch takes these queries and words."""
    for name, codes, dtype, n_dims in (("queries", queries, torch.uint8, 2), ("words", words, torch.int32, 3)):
        if codes.dtype != dtype:
            raise TypeError(f"{name}: dtype is {codes.dtype}, wanted {dtype}")
        if codes.ndim != n_dims:
            raise ValueError(f"{name}: shape is {tuple(codes.shape)}, wanted {n_dims} dimensions")
    n_columns, n, width = words.shape
    if not 1 <= queries.shape[1] <= max_bytes:
        raise ValueError(f"queries: {queries.shape[1]} bytes a code, wanted 1 to {max_bytes}")
    if n_columns != -(-queries.shape[1] // COLUMN_BYTES):
        raise ValueError(f"words: {n_columns} columns do not hold codes of {queries.shape[1]} bytes (see word_major)")
    if width != 4 or words.stride()[1:] != (4, 1) or words.data_ptr() % COLUMN_BYTES or n % TILE_ROWS:
        raise ValueError(f"words: shape {tuple(words.shape)}, strides {words.stride()} are not those of word_major")
    if not 1 <= n_rows <= min(n, MAX_ROWS):
        raise ValueError(f"n_rows: {n_rows} is not between 1 and {min(n, MAX_ROWS)}")
    if first_row < 0 or first_row + n_rows > 2**32:
        raise ValueError(f"first_row: rows from {first_row} to {first_row + n_rows} do not stay within 0 and 2^32")


def as_bytes(allowed: Tensor | None, n_rows: int) -> Tensor | None:
    """A mask bool or uint8 [n_rows] as uint8."""
    if allowed is None:
        return None
    if allowed.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"allowed: dtype is {allowed.dtype}, wanted torch.bool or torch.uint8")
    if allowed.shape != (n_rows,):
        raise ValueError(f"allowed: shape is {tuple(allowed.shape)}, wanted [{n_rows}]")
    return allowed.contiguous().view(torch.uint8)


# --- Triton ------------------------------------------------------------------------------------------------


@triton.jit
def _tile_distances(
    words_ptr, queries_ptr, first_row, first_query, C, rows_apart, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr
):
    """int32 [BLOCK_Q, BLOCK_R]. Places in a tile stay apart from where it starts, which is the same for all threads."""
    word = tl.arange(0, 4)[None, None, :]
    words_ptr += first_row.to(tl.int64) * 4
    queries_ptr += first_query.to(tl.int64) * (4 * C)
    row = tl.arange(0, BLOCK_R)[None, :, None] * 4 + word
    query = tl.arange(0, BLOCK_Q)[:, None, None] * (4 * C) + word
    column = rows_apart.to(tl.int64) * 4
    distances = tl.zeros((BLOCK_Q, BLOCK_R), tl.uint32)
    for _ in range(C):
        differing = tl.load(queries_ptr + query) ^ tl.load(words_ptr + row)
        distances += tl.sum(_popcount(differing.to(tl.uint32, bitcast=True)), 2)
        words_ptr += column
        queries_ptr += 4
    return distances.to(tl.int32)


@triton.jit
def _hamming_distances_kernel(
    words_ptr,  # int32 [C, rows_apart, 4], contiguous
    queries_ptr,  # int32 [Q rounded up to whole blocks, 4 C], contiguous
    distances_ptr,  # int32 [Q, R], contiguous
    Q,
    R,
    C,
    rows_apart,  # from column to column; R rounded up to whole tiles, or more
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # Blocks of queries count first, so that those which read the same rows run at the same time.
    q_blocks = tl.cdiv(Q, BLOCK_Q)
    first_query = tl.program_id(0) % q_blocks * BLOCK_Q
    first_row = tl.program_id(0) // q_blocks * BLOCK_R
    distances = _tile_distances(words_ptr, queries_ptr, first_row, first_query, C, rows_apart, BLOCK_Q, BLOCK_R)
    queries = first_query + tl.arange(0, BLOCK_Q)
    rows = first_row + tl.arange(0, BLOCK_R)
    to = distances_ptr + queries.to(tl.int64)[:, None] * R + rows[None, :]
    tl.store(to, distances, mask=(queries < Q)[:, None] & (rows < R)[None, :])


@triton.jit
def _hamming_topk_kernel(
    words_ptr,  # int32 [C, rows_apart, 4], contiguous
    queries_ptr,  # int32 [Q rounded up to whole blocks, 4 C], contiguous
    allowed_ptr,  # uint8 [R], or None
    keys_ptr,  # int64 [programs, BLOCK_Q, capacity], any values: the lists
    counts_ptr,  # int32 [programs, BLOCK_Q], any values: of keys in a list
    bounds_ptr,  # int32 [programs, BLOCK_Q], any values
    tile_ptr,  # int32 [programs, BLOCK_Q, BLOCK_R], any values
    Q,
    R,
    C,
    rows_apart,
    k,
    tiles_a_part,
    capacity,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    q_blocks = tl.cdiv(Q, BLOCK_Q)
    program = tl.program_id(0)
    first_query = program % q_blocks * BLOCK_Q
    lists = program.to(tl.int64) * BLOCK_Q
    keys_ptr += lists * capacity
    counts_ptr += lists
    bounds_ptr += lists
    tile_ptr += lists * BLOCK_R
    start_lists(counts_ptr, bounds_ptr, Q - first_query, BLOCK_Q)
    first_tile = program // q_blocks * tiles_a_part
    end_tile = tl.minimum(first_tile + tiles_a_part, tl.cdiv(R, BLOCK_R))
    # fmt: off
    for tile in tl.range(first_tile, end_tile, disable_licm=True):
        first_row = tile * BLOCK_R
        allowed = rows_that_count(allowed_ptr, first_row, R, BLOCK_R)
        if tl.max(allowed.to(tl.int32)) != 0:
            distances = _tile_distances(words_ptr, queries_ptr, first_row, first_query, C, rows_apart,
                                        BLOCK_Q, BLOCK_R)
            distances += tl.where(allowed, 0, _FARTHEST)[None, :]
            offer_tile(distances, first_row, keys_ptr, counts_ptr, bounds_ptr, tile_ptr, k, capacity,
                       BLOCK_Q, BLOCK_R, CHUNK)
    # fmt: on


def _chunk(block_q: int, block_r: int) -> int:
    """Rows that are appended together: eight distances a thread, which takes no more registers than the popcounts."""
    return min(1024 // block_q, block_r)


def _fields(
    config: tuple[int, ...] | None, device: torch.device, n_queries: int, n_rows: int, n_bytes: int
) -> dict[str, int]:
    if config is None:
        rows, key = _rows_and_key(n_queries, n_rows, n_bytes)
        config = lookup("hamming_popcount", arch_of(device), key, rows, device=device)
    return dict(zip(CONFIG_FIELDS, config, strict=True))


def launch_distances(queries: Tensor, words: Tensor, n_rows: int, *, config: tuple[int, ...] | None = None) -> Tensor:
    """Distances int32 [Q, n_rows] of ``queries`` uint8 [Q, B] from the first rows of ``words`` (see word_major)."""
    check_codes(queries, words, n_rows, 0, MAX_BYTES)
    n_queries, n_bytes = queries.shape
    distances = torch.empty((n_queries, n_rows), dtype=torch.int32, device=queries.device)
    if n_queries:
        fields = _fields(config, queries.device, n_queries, n_rows, n_bytes)
        block_q, block_r = fields["BLOCK_Q"], fields["BLOCK_R"]
        programs = -(-n_queries // block_q) * -(-n_rows // block_r)
        with on_device_of(queries):
            _hamming_distances_kernel[(programs,)](
                *(words, by_word(queries, block_q), distances),
                *(n_queries, n_rows, words.shape[0], words.stride(0) // 4),
                BLOCK_Q=block_q,
                BLOCK_R=block_r,
                num_warps=fields["num_warps"],
            )
    return distances


def _topk(
    queries: Tensor,
    words: Tensor,
    n_rows: int,
    k: int,
    allowed: Tensor | None,
    config: tuple[int, ...] | None,
    parts: int | None,
) -> Tensor:
    """``launch_topk`` of a few queries, with rows that count from 0."""
    n_queries, n_bytes = queries.shape
    fields = _fields(config, queries.device, n_queries, n_rows, n_bytes)
    block_q, block_r = fields["BLOCK_Q"], fields["BLOCK_R"]

    def launch(programs: int, lists: tuple[Tensor, ...], tiles_a_part: int, capacity: int) -> None:
        _hamming_topk_kernel[(programs,)](
            *(words, by_word(queries, block_q), allowed, *lists),
            *(n_queries, n_rows, words.shape[0], words.stride(0) // 4, k, tiles_a_part, capacity),
            BLOCK_Q=block_q,
            BLOCK_R=block_r,
            CHUNK=_chunk(block_q, block_r),
            num_warps=fields["num_warps"],
            maxnreg=_REGISTERS,
        )

    return nearest_keys(launch, n_queries, n_rows, k, fields, parts, queries.device)


def launch_topk(
    queries: Tensor,
    words: Tensor,
    n_rows: int,
    k: int,
    allowed: Tensor | None = None,
    first_row: int = 0,
    *,
    config: tuple[int, ...] | None = None,
    parts: int | None = None,
) -> Tensor:
    """Keys int64 [Q, k] of the nearest of the first ``n_rows`` rows of ``words``, sorted; ``NO_KEY`` after the last.

    Args:
        queries: uint8 [Q, B].
        words: int32 [C, N, 4], see word_major.
        allowed: bool or uint8 [n_rows]: rows that count; all of them without.
        first_row: number of the first row.
        config, parts: one of ``CONFIGS`` and the parts that rows are split into; the best ones, unless given.
    """
    check_codes(queries, words, n_rows, first_row, MAX_BYTES)
    return topk_by_queries(_topk, queries, words, n_rows, k, allowed, first_row, config, parts)


def launch_range(
    queries: Tensor, words: Tensor, n_rows: int, radius: int, allowed: Tensor | None = None, first_row: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows at a distance of at most ``radius``: offsets int64 [Q + 1], distances int32 [n], rows int64 [n].

    Those of query q are at offsets[q] to offsets[q + 1], by distance, then row. Distances of parts of the rows go
    through memory, whose bandwidth they need less of than popcounts take time.
    """
    check_codes(queries, words, n_rows, first_row, MAX_BYTES)
    return range_by_rows(launch_distances, queries, words, n_rows, radius, allowed, first_row)


def specimens(arch: int) -> list[Specimen]:
    """All distances, and the nearest rows of all and of some, for every block of queries."""
    return [
        *(_specimen(config, kind) for config in CONFIGS for kind in ("distances", "topk", "topk of allowed")),
        Specimen(
            name="hamming_popcount",
            config={"kernel": "finish"},
            kernel=_finish_lists_kernel,
            signature={"keys_ptr": "*i64", "counts_ptr": "*i32", "k": "i32", "capacity": "i32"},
            constants={},
            unaligned=("k",),
        ),
    ]


def _specimen(config: tuple[int, ...], kind: str) -> Specimen:
    fields = dict(zip(CONFIG_FIELDS, config, strict=True))
    block_q, block_r = fields["BLOCK_Q"], fields["BLOCK_R"]
    pointers = {"words_ptr": "*i32", "queries_ptr": "*i32"}
    sizes = dict.fromkeys(("Q", "R", "C", "rows_apart"), "i32")
    constants: dict[str, Any] = {"BLOCK_Q": block_q, "BLOCK_R": block_r}
    options = {"num_warps": fields["num_warps"]}
    if kind == "distances":
        pointers["distances_ptr"] = "*i32"
    else:
        options["maxnreg"] = _REGISTERS
        constants["CHUNK"] = _chunk(block_q, block_r)
        if kind == "topk":
            constants["allowed_ptr"] = None
        else:
            pointers["allowed_ptr"] = "*u8"
        pointers |= {"keys_ptr": "*i64", "counts_ptr": "*i32", "bounds_ptr": "*i32", "tile_ptr": "*i32"}
        sizes |= dict.fromkeys(("k", "tiles_a_part", "capacity"), "i32")
    return Specimen(
        name="hamming_popcount",
        config={"kernel": kind, **fields},
        kernel=_hamming_distances_kernel if kind == "distances" else _hamming_topk_kernel,
        signature=pointers | sizes,
        constants=constants,
        options=options,
        unaligned=tuple(size for size in sizes if size not in ("rows_apart", "capacity")),
    )


# --- tuning ------------------------------------------------------------------------------------------------

_SHAPE = ("n_queries", "n_rows", "n_bytes", "k")


def _works(arch: int, n_sms: int, sizes: Sizes, config: tuple[int, ...]) -> list[Work]:
    n_queries, n_rows, n_bytes, k = (sizes[name] for name in _SHAPE)
    fields = dict(zip(CONFIG_FIELDS, config, strict=True))
    n_blocks, parts, tiles_a_part = blocks_and_parts(n_queries, n_rows, k, fields, None, n_sms)
    operations, moved = cost(n_queries, n_rows, n_bytes, k)
    return [
        Work(
            _specimen(config, "topk"),
            blocks=n_blocks * parts,
            iterations=tiles_a_part * -(-n_bytes // COLUMN_BYTES),
            macs=0,
            operations=operations,
            n_bytes=moved,
            dtype="fp32",
            resident=fields["blocks_per_sm"],
            popcounts=fields["BLOCK_Q"] * fields["BLOCK_R"] * COLUMN_BYTES // 4,
        )
    ]


def search_trial(launch: Callable[..., Tensor], sizes: Sizes, device: torch.device) -> Trial:
    """Of a ``launch_topk``, on random codes; for both kernels."""
    n_queries, n_rows, n_bytes, k = (sizes[name] for name in _SHAPE)
    random = seeded(device)
    codes, queries = (
        torch.randint(0, 256, (n, n_bytes), generator=random, device=device, dtype=torch.uint8)
        for n in (n_rows, n_queries)
    )
    words = word_major(codes)

    def expected() -> tuple[Tensor, ...]:
        bits = _bits(queries)
        best = codes.new_empty((n_queries, 0), dtype=torch.int64)
        for start in range(0, n_rows, _ROWS_AT_A_TIME):
            part = _bits(codes[start : start + _ROWS_AT_A_TIME])
            # |a - b|^2 of zeros and ones; whole numbers, which float32 holds exactly.
            distances = bits.sum(1)[:, None] + part.sum(1) - 2 * (bits @ part.T)
            rows = torch.arange(start, start + len(part), device=device)
            both = torch.cat([best, (distances.to(torch.int64) << 32) | rows], 1)
            best = torch.topk(both, min(k, both.shape[1]), dim=1, largest=False).values
        return (F.pad(best, (0, k - best.shape[1]), value=NO_KEY),)

    return Trial(lambda config: (launch(queries, words, n_rows, k, config=config),), expected)


_ROWS_AT_A_TIME = 4096  # of the reference


def _bits(codes: Tensor) -> Tensor:
    return ((codes[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=codes.device)) & 1).flatten(1).float()


def tunables() -> list[Tunable]:
    """A search. A problem: ``n_queries, n_rows, n_bytes, k``."""
    return [
        Tunable(
            name="hamming_popcount",
            module="hamming_popcount",
            on="cuda",
            fields=CONFIG_FIELDS,
            key=lambda sizes: shape_key(sizes["n_queries"], sizes["n_rows"], sizes["n_bytes"]),
            space=lambda arch, sizes: CONFIGS + MORE_CONFIGS,
            default=lambda arch, n_sms, sizes: default_config(sizes["n_queries"]),
            works=_works,
            trial=lambda sizes, device: search_trial(launch_topk, sizes, device),
        )
    ]
