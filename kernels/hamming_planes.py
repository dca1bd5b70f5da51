"""Hamming distances on the tensor cores of GPUs: the functions of ``hamming_popcount``, for many queries.

Contract
    letters: Q queries and R rows of B bytes, C = ceil(B / 16) columns of 16 bytes, G = ceil(B / 32) groups of 32
    launch_distances, launch_topk, launch_range: as in ``kernels/hamming_popcount.py``, with the same arguments, of the
        same ``words`` (see its word_major) and with the same answers, bit for bit
    query_planes(queries uint8 [Q, B]) -> (planes int8 [Q, 256 G], ones int32 [Q])

The sum
    With bits q_i of a query and d_i of a row,
    distance = sum_i q_i + d_i - 2 q_i d_i = ones(q) + sum_i d_i s_i,    s_i = 1 - 2 q_i, which is 1 or -1.
    The last sum is a product of int8 matrices. A mask is all it takes to unpack rows: plane j of a group of 32 bytes is
    ``byte & 2^j``, which is 2^j d_i, four values a register. So the query's side holds 2^(6 - j) s_i, the product is
    64 d_i s_i for every plane, and the total is divided by 64, exactly. Bit 7 would be -128 and need halves; it is
    shifted to where bit 6 is, the one plane of eight that needs a second instruction. Nothing of a row has to be known
    but its bits.
    Bound: |total| <= 64 x 8 B < 2^31, for B <= MAX_BYTES.

The kernel
    Rows are the A operand: every warp has its own, and unpacks every byte once; on Hopper they go to the tensor cores
    from registers. A query's planes are 8 B bytes, made once a launch, in the order of groups, planes, bytes, so that a
    step of 32 bytes of a row meets 256 bytes of a query, and each of its eight products is contiguous in both.
    A last group of which there is only the first column reads that one twice; the query is zero there.
    A word of a row is 32 multiplications a query: at least 32 x 4 C Q R / (multiplications of int8 a clock) clocks of
    one multiprocessor. Against 16 popcounts a clock this is 4 times less on sm_80 (2048 a clock), 2 times less where
    there are 1024, and 8 times less on sm_90 (4096), if all of a block's queries are there.
    What follows a tile of distances is shared with ``hamming_popcount``.

Errors
    Those of ``hamming_popcount``; ValueError for B > MAX_BYTES.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tetra.autotune.table import lookup
from tetra.kernels.backend import arch_of, on_device_of, tl, triton
from tetra.kernels.hamming_popcount import (
    _FARTHEST,
    blocks_and_parts,
    check_codes,
    nearest_keys,
    offer_tile,
    range_by_rows,
    rows_that_count,
    search_trial,
    shape_key,
    start_lists,
    topk_by_queries,
)
from tetra.kernels.specimen import Specimen
from tetra.kernels.tunable import Sizes, Tunable, Work

GROUP_BYTES = 32  # of a row, a step
PLANES = 8
UNPACKED_ONE = 64  # what a differing bit adds to the total
MAX_BYTES = (2**31 - 1) // (8 * UNPACKED_ONE)


# --- queries -----------------------------------------------------------------------------------------------


def query_planes(queries: Tensor, queries_multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Queries uint8 [Q, B] as planes int8 [Q, 256 G] and their numbers of ones int32 [Q]; Q rounded up to a multiple.

    Value 256 g + 32 j + i is of bit j (the lowest is 0) of byte 32 g + i: 2^(6 - j) where it is 0, the negative where
    it is 1; bit 7 like bit 6. 0 from byte B on.
    """
    n_bytes = queries.shape[1]
    n_groups = -(-n_bytes // GROUP_BYTES)
    padding = (0, n_groups * GROUP_BYTES - n_bytes, 0, -queries.shape[0] % queries_multiple)
    codes = F.pad(queries, padding).view(-1, n_groups, 1, GROUP_BYTES)
    plane = torch.arange(PLANES, dtype=torch.uint8, device=queries.device).view(PLANES, 1)
    bits = ((codes >> plane) & 1).to(torch.int8)
    ones = bits.sum((1, 2, 3), dtype=torch.int32)
    weights = (UNPACKED_ONE >> plane.clamp(max=6)).to(torch.int8)
    there = torch.arange(n_groups * GROUP_BYTES, device=queries.device).view(n_groups, 1, GROUP_BYTES) < n_bytes
    return ((1 - 2 * bits) * (weights * there)).view(len(codes), -1), ones


# --- configurations and cost -------------------------------------------------------------------------------

# Queries and rows of a tile, warps, stages of the pipeline, registers a thread, and how many blocks a multiprocessor
# has place for. Left to itself, the compiler spills a few registers to get by with less.
CONFIG_FIELDS = ("BLOCK_Q", "BLOCK_R", "num_warps", "num_stages", "maxnreg", "blocks_per_sm")
CONFIGS = (
    (128, 128, 4, 3, 255, 2),
    (128, 128, 4, 2, 255, 2),
    (64, 128, 4, 3, 168, 2),
    (32, 128, 4, 3, 128, 4),
)
# More rows for the tuners. Which of them spill depends on the chip.
MORE_CONFIGS = (
    (128, 128, 8, 3, 128, 2),
    (128, 64, 4, 3, 168, 2),
    (64, 128, 4, 2, 168, 2),
    (64, 128, 4, 4, 168, 2),
    (64, 64, 4, 3, 128, 4),
    (32, 128, 4, 2, 128, 4),
    (16, 128, 4, 3, 128, 4),
)
_SMALL_SHARED = (86, 89, 120)  # where two blocks of the first row do not fit the shared memory


def configs_for(arch: int, among: tuple[tuple[int, ...], ...] = CONFIGS) -> tuple[tuple[int, ...], ...]:
    """The rows ``among`` these for a compute capability (80 means sm_80)."""
    return tuple(row for row in among if not (arch in _SMALL_SHARED and row == CONFIGS[0]))


def default_config(arch: int, n_queries: int) -> tuple[int, ...]:
    """The row with the smallest block that holds all queries, or the largest block."""
    rows = configs_for(arch)
    return next((row for row in reversed(rows) if row[0] >= n_queries and row != CONFIGS[1]), rows[0])


@lru_cache(maxsize=4096)
def _rows_and_key(arch: int, n_queries: int, n_rows: int, n_bytes: int) -> tuple[tuple[tuple[int, ...], ...], str]:
    """What a launch looks up: rows of the table that may run, the default first, and the key."""
    rows = (default_config(arch, n_queries), *configs_for(arch, CONFIGS + MORE_CONFIGS))
    return rows, shape_key(n_queries, n_rows, n_bytes)


def cost(n_queries: int, n_rows: int, n_bytes: int, k: int | None = None) -> tuple[int, int]:
    """(integer operations, bytes moved at least) of a search for k rows or, without k, of all distances.

    Two operations of the tensor cores a bit of a group: multiplication, addition.
    """
    n_groups = -(-n_bytes // GROUP_BYTES)
    answer = 4 * n_queries * n_rows if k is None else 8 * n_queries * k
    moved = GROUP_BYTES * n_groups * (PLANES * n_queries + n_rows) + answer
    return 2 * 8 * GROUP_BYTES * n_groups * n_queries * n_rows, moved


# --- Triton ------------------------------------------------------------------------------------------------


@triton.jit
def _on_four_bytes(packed, PTX: tl.constexpr):
    """int8 tile from a uint8 tile, four neighbouring bytes in one register."""
    return tl.inline_asm_elementwise(PTX, "=r,r", [packed], tl.int8, is_pure=True, pack=4)


@triton.jit
def _unpack_plane(packed, PLANE: tl.constexpr, INLINE_ASM: tl.constexpr):
    """int8 tile from a uint8 tile: 2^PLANE where bit PLANE is set, else 0; bit 7 gives 64, like bit 6.

    The compiler takes plain operations on bytes one by one, so they are written for four at once; the mask clears what
    the shift moves from one byte into the next.
    """
    if INLINE_ASM:
        if PLANE == 0:
            plane = _on_four_bytes(packed, "and.b32 $0, $1, 0x01010101;")
        elif PLANE == 1:
            plane = _on_four_bytes(packed, "and.b32 $0, $1, 0x02020202;")
        elif PLANE == 2:
            plane = _on_four_bytes(packed, "and.b32 $0, $1, 0x04040404;")
        elif PLANE == 3:
            plane = _on_four_bytes(packed, "and.b32 $0, $1, 0x08080808;")
        elif PLANE == 4:
            plane = _on_four_bytes(packed, "and.b32 $0, $1, 0x10101010;")
        elif PLANE == 5:
            plane = _on_four_bytes(packed, "and.b32 $0, $1, 0x20202020;")
        elif PLANE == 6:
            plane = _on_four_bytes(packed, "and.b32 $0, $1, 0x40404040;")
        else:
            plane = _on_four_bytes(packed, "{ .reg .b32 t; shr.b32 t, $1, 1; and.b32 $0, t, 0x40404040; }")
    elif PLANE == 7:
        plane = ((packed >> 1) & 0x40).to(tl.int8)
    else:
        plane = (packed & (1 << PLANE)).to(tl.int8)
    return plane


@triton.jit
def _tile_totals(
    words_ptr,
    planes_ptr,
    first_row,
    first_query,
    C,
    rows_apart,
    INLINE_ASM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """int32 [BLOCK_R, BLOCK_Q]: 64 times what the distances are larger than the queries' ones."""
    n_groups = (C + 1) // 2
    byte = tl.arange(0, 32)
    place = (first_row + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None] * 16 + (byte % 16)[None, :]
    queries = (first_query + tl.arange(0, BLOCK_Q)).to(tl.int64)[None, :] * (n_groups * 256)
    planes_ptr += queries + byte[:, None]
    column_apart = rows_apart.to(tl.int64) * 16
    totals = tl.zeros((BLOCK_R, BLOCK_Q), tl.int32)
    for group in range(n_groups):
        column = tl.minimum(2 * group + byte // 16, C - 1).to(tl.int64)
        packed = tl.load(words_ptr + place + (column * column_apart)[None, :])
        for plane in tl.static_range(8):
            bits = _unpack_plane(packed, plane, INLINE_ASM)
            totals = tl.dot(bits, tl.load(planes_ptr + 32 * plane), totals, out_dtype=tl.int32)
        planes_ptr += 256
    return totals


@triton.jit
def _store_distances(
    totals, ones_ptr, distances_ptr, first_row, first_query, Q, R, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Stores a tile; a large one in halves, each thread's own, or addresses take more registers than there are."""
    if BLOCK_Q * BLOCK_R > 2048:
        HALF: tl.constexpr = BLOCK_Q // 2
        low, high = tl.split(tl.permute(tl.reshape(totals, (BLOCK_R, 2, HALF)), (0, 2, 1)))
        _store_distances(low, ones_ptr, distances_ptr, first_row, first_query, Q, R, HALF, BLOCK_R)
        _store_distances(high, ones_ptr, distances_ptr, first_row, first_query + HALF, Q, R, HALF, BLOCK_R)
    else:
        queries = first_query + tl.arange(0, BLOCK_Q)
        rows = first_row + tl.arange(0, BLOCK_R)
        distances = (totals >> 6) + tl.load(ones_ptr + queries)[None, :]
        to = distances_ptr + queries.to(tl.int64)[None, :] * R + rows[:, None]
        tl.store(to, distances, mask=(rows < R)[:, None] & (queries < Q)[None, :])


@triton.jit
def _plane_distances_kernel(
    words_ptr,  # uint8 [C, rows_apart, 16], contiguous
    planes_ptr,  # int8 [Q rounded up to whole blocks, 256 G], contiguous
    ones_ptr,  # int32 [Q rounded up]
    distances_ptr,  # int32 [Q, R], contiguous
    Q,
    R,
    C,
    rows_apart,  # from column to column; R rounded up to whole tiles, or more
    INLINE_ASM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    q_blocks = tl.cdiv(Q, BLOCK_Q)
    first_query = tl.program_id(0) % q_blocks * BLOCK_Q
    first_row = tl.program_id(0) // q_blocks * BLOCK_R
    # fmt: off
    totals = _tile_totals(words_ptr, planes_ptr, first_row, first_query, C, rows_apart, INLINE_ASM, BLOCK_Q, BLOCK_R)
    # fmt: on
    _store_distances(totals, ones_ptr, distances_ptr, first_row, first_query, Q, R, BLOCK_Q, BLOCK_R)


@triton.jit
def _plane_topk_kernel(
    words_ptr,  # uint8 [C, rows_apart, 16], contiguous
    planes_ptr,  # int8 [Q rounded up to whole blocks, 256 G], contiguous
    ones_ptr,  # int32 [Q rounded up]
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
    INLINE_ASM: tl.constexpr,
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
    ones_ptr += first_query
    start_lists(counts_ptr, bounds_ptr, Q - first_query, BLOCK_Q)
    first_tile = program // q_blocks * tiles_a_part
    end_tile = tl.minimum(first_tile + tiles_a_part, tl.cdiv(R, BLOCK_R))
    # fmt: off
    for tile in tl.range(first_tile, end_tile, disable_licm=True):
        first_row = tile * BLOCK_R
        allowed = rows_that_count(allowed_ptr, first_row, R, BLOCK_R)
        if tl.max(allowed.to(tl.int32)) != 0:
            totals = _tile_totals(words_ptr, planes_ptr, first_row, first_query, C, rows_apart,
                                  INLINE_ASM, BLOCK_Q, BLOCK_R)
            ones = tl.load(ones_ptr + tl.arange(0, BLOCK_Q))[None, :]
            distances = (totals >> 6) + ones + tl.where(allowed, 0, _FARTHEST)[:, None]
            offer_tile(tl.trans(distances), first_row, keys_ptr, counts_ptr, bounds_ptr, tile_ptr, k, capacity,
                       BLOCK_Q, BLOCK_R, CHUNK)
    # fmt: on


_CHUNK = 32  # rows that are appended together; divides BLOCK_R


def _fields(
    config: tuple[int, ...] | None, device: torch.device, n_queries: int, n_rows: int, n_bytes: int
) -> dict[str, int]:
    if config is None:
        arch = arch_of(device)
        rows, key = _rows_and_key(arch, n_queries, n_rows, n_bytes)
        config = lookup("hamming_planes", arch, key, rows, device=device)
    return dict(zip(CONFIG_FIELDS, config, strict=True))


def _options(fields: dict[str, int], device: torch.device) -> dict[str, Any]:
    options: dict[str, Any] = {name: value for name, value in fields.items() if name != "blocks_per_sm"}
    return options | {"INLINE_ASM": device.type == "cuda"}


def launch_distances(queries: Tensor, words: Tensor, n_rows: int, *, config: tuple[int, ...] | None = None) -> Tensor:
    """Distances int32 [Q, n_rows] of ``queries`` uint8 [Q, B] from the first rows of ``words`` (see word_major)."""
    check_codes(queries, words, n_rows, 0, MAX_BYTES)
    n_queries, n_bytes = queries.shape
    distances = torch.empty((n_queries, n_rows), dtype=torch.int32, device=queries.device)
    if n_queries:
        fields = _fields(config, queries.device, n_queries, n_rows, n_bytes)
        programs = -(-n_queries // fields["BLOCK_Q"]) * -(-n_rows // fields["BLOCK_R"])
        with on_device_of(queries):
            _plane_distances_kernel[(programs,)](
                *(words.view(torch.uint8), *query_planes(queries, fields["BLOCK_Q"]), distances),
                *(n_queries, n_rows, words.shape[0], words.stride(0) // 4),
                **_options(fields, queries.device),
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
    block_q = fields["BLOCK_Q"]

    def launch(programs: int, lists: tuple[Tensor, ...], tiles_a_part: int, capacity: int) -> None:
        _plane_topk_kernel[(programs,)](
            *(words.view(torch.uint8), *query_planes(queries, block_q), allowed, *lists),
            *(n_queries, n_rows, words.shape[0], words.stride(0) // 4, k, tiles_a_part, capacity),
            CHUNK=_CHUNK,
            **_options(fields, queries.device),
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
    """Keys int64 [Q, k] of the nearest of the first ``n_rows`` rows; ``hamming_popcount.launch_topk`` says the rest."""
    check_codes(queries, words, n_rows, first_row, MAX_BYTES)
    return topk_by_queries(_topk, queries, words, n_rows, k, allowed, first_row, config, parts)


def launch_range(
    queries: Tensor, words: Tensor, n_rows: int, radius: int, allowed: Tensor | None = None, first_row: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows at a distance of at most ``radius``; ``hamming_popcount.launch_range`` says the rest."""
    check_codes(queries, words, n_rows, first_row, MAX_BYTES)
    return range_by_rows(launch_distances, queries, words, n_rows, radius, allowed, first_row)


def specimens(arch: int) -> list[Specimen]:
    """All distances, and the nearest rows of all and of some, in every configuration."""
    return [specimen(config, kind) for config in configs_for(arch) for kind in ("distances", "topk", "topk of allowed")]


def specimen(config: tuple[int, ...], kind: str, *, inline_asm: bool = True) -> Specimen:
    """One kernel: "distances", "topk" or "topk of allowed"."""
    fields = dict(zip(CONFIG_FIELDS, config, strict=True))
    pointers = {"words_ptr": "*u8", "planes_ptr": "*i8", "ones_ptr": "*i32"}
    sizes = dict.fromkeys(("Q", "R", "C", "rows_apart"), "i32")
    constants: dict[str, Any] = {"INLINE_ASM": inline_asm, **{name: fields[name] for name in ("BLOCK_Q", "BLOCK_R")}}
    if kind == "distances":
        pointers["distances_ptr"] = "*i32"
    else:
        constants["CHUNK"] = _CHUNK
        if kind == "topk":
            constants["allowed_ptr"] = None
        else:
            pointers["allowed_ptr"] = "*u8"
        pointers |= {"keys_ptr": "*i64", "counts_ptr": "*i32", "bounds_ptr": "*i32", "tile_ptr": "*i32"}
        sizes |= dict.fromkeys(("k", "tiles_a_part", "capacity"), "i32")
    return Specimen(
        name="hamming_planes",
        config={"kernel": kind, **fields} | ({} if inline_asm else {"inline_asm": False}),
        kernel=_plane_distances_kernel if kind == "distances" else _plane_topk_kernel,
        signature=pointers | sizes,
        constants=constants,
        options={name: fields[name] for name in ("num_warps", "num_stages", "maxnreg")},
        unaligned=tuple(size for size in sizes if size not in ("rows_apart", "capacity")),
    )


# --- tuning ------------------------------------------------------------------------------------------------


def _works(arch: int, n_sms: int, sizes: Sizes, config: tuple[int, ...]) -> list[Work]:
    n_queries, n_rows, n_bytes, k = (sizes[name] for name in ("n_queries", "n_rows", "n_bytes", "k"))
    fields = dict(zip(CONFIG_FIELDS, config, strict=True))
    n_blocks, parts, tiles_a_part = blocks_and_parts(n_queries, n_rows, k, fields, None, n_sms)
    operations, moved = cost(n_queries, n_rows, n_bytes, k)
    return [
        Work(
            specimen(config, "topk"),
            blocks=n_blocks * parts,
            iterations=tiles_a_part * -(-n_bytes // GROUP_BYTES),
            macs=fields["BLOCK_Q"] * fields["BLOCK_R"] * GROUP_BYTES * PLANES,
            operations=operations,
            n_bytes=moved,
            dtype="int8",
            resident=fields["blocks_per_sm"],
        )
    ]


def tunables() -> list[Tunable]:
    """A search. A problem: ``n_queries, n_rows, n_bytes, k``."""
    return [
        Tunable(
            name="hamming_planes",
            module="hamming_planes",
            on="cuda",
            fields=CONFIG_FIELDS,
            key=lambda sizes: shape_key(sizes["n_queries"], sizes["n_rows"], sizes["n_bytes"]),
            space=lambda arch, sizes: configs_for(arch, CONFIGS + MORE_CONFIGS),
            default=lambda arch, n_sms, sizes: default_config(arch, sizes["n_queries"]),
            works=_works,
            trial=lambda sizes, device: search_trial(launch_topk, sizes, device),
        )
    ]
