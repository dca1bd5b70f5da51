"""Distances, nearest rows and rows within a radius of both kernels against numpy, in Triton's interpreter and on GPUs.

Rows and queries of small tiles are given as configurations, so that few rows are many tiles and many parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tetra.kernels import hamming_planes, hamming_popcount
from tetra.kernels.hamming_popcount import (
    CONFIGS,
    MAX_BYTES,
    MAX_K,
    NO_KEY,
    TILE_ROWS,
    cost,
    default_config,
    launch_distances,
    launch_range,
    launch_topk,
    parts_of_rows,
    shape_key,
    word_major,
)

Run = Callable[..., Any]

KERNELS = {"popcount": hamming_popcount, "planes": hamming_planes}
# Tiles of few rows, or the one that ships.
SMALL = {"popcount": (4, 32, 1, 1), "planes": (16, 32, 1, 2, 255, 1)}


@pytest.fixture(params=["interpreter", pytest.param("triton", marks=pytest.mark.gpu)])
def triton_only(request: pytest.FixtureRequest) -> Run:
    """Calls a function where Triton's kernels run."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")  # type: ignore[no-any-return]

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        result = function(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments))
        return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()

    return call


# What runs in the interpreter's process, from codes.


def distances(kernel: str, queries: Tensor, codes: Tensor, config: Any = None) -> Tensor:
    return KERNELS[kernel].launch_distances(queries, word_major(codes), len(codes), config=config)


def topk(
    kernel: str,
    queries: Tensor,
    codes: Tensor,
    k: int,
    allowed: Tensor | None = None,
    first_row: int = 0,
    config: Any = None,
    parts: int | None = None,
) -> Tensor:
    words = word_major(codes)
    return KERNELS[kernel].launch_topk(queries, words, len(codes), k, allowed, first_row, config=config, parts=parts)


def within(
    kernel: str, queries: Tensor, codes: Tensor, radius: int, allowed: Tensor | None = None, first_row: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    return KERNELS[kernel].launch_range(queries, word_major(codes), len(codes), radius, allowed, first_row)


# The same by definition.


def true_distances(queries: Tensor, codes: Tensor) -> np.ndarray:
    bits, query_bits = (np.unpackbits(x.numpy(), axis=1).astype(np.int32) for x in (codes, queries))
    return query_bits.sum(1)[:, None] + bits.sum(1)[None, :] - 2 * query_bits @ bits.T


def true_keys(queries: Tensor, codes: Tensor, k: int, allowed: Tensor | None = None, first_row: int = 0) -> Tensor:
    keys = np.full((len(queries), k), NO_KEY)
    rows = np.arange(len(codes)) if allowed is None else np.flatnonzero(allowed.numpy())
    for query, row in enumerate(true_distances(queries, codes)):
        order = np.argsort(row[rows], kind="stable")[:k]
        keys[query, : len(order)] = (row[rows][order].astype(np.int64) << 32) + rows[order] + first_row
    return torch.from_numpy(keys)


def true_within(
    queries: Tensor, codes: Tensor, radius: int, allowed: Tensor | None = None, first_row: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    found = []
    for row in true_distances(queries, codes).tolist():
        near = [(d, i + first_row) for i, d in enumerate(row) if d <= radius and (allowed is None or allowed[i])]
        found.append(sorted(near))
    offsets = np.cumsum([0, *map(len, found)])
    pairs = np.array([pair for near in found for pair in near], dtype=np.int64).reshape(-1, 2)
    return tuple(map(torch.from_numpy, (offsets, pairs[:, 0].astype(np.int32), pairs[:, 1])))  # type: ignore[return-value]


def uniform(n: int, n_bytes: int) -> Tensor:
    return torch.randint(0, 256, (n, n_bytes), dtype=torch.uint8)


def clustered(n: int, n_bytes: int) -> Tensor:
    """Copies of few codes with few bits changed."""
    noise = uniform(n, n_bytes) & uniform(n, n_bytes) & uniform(n, n_bytes) & uniform(n, n_bytes)
    return uniform(3, n_bytes)[torch.randint(3, (n,))] ^ noise


def two_codes(n: int, n_bytes: int) -> Tensor:
    return uniform(2, n_bytes)[torch.randint(2, (n,))]


def one_code(n: int, n_bytes: int) -> Tensor:
    return uniform(1, n_bytes).expand(n, n_bytes)


KINDS = {kind.__name__: kind for kind in (uniform, clustered, two_codes, one_code)}


# --- layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_rows", "n_bytes"), [(1, 1), (3, 16), (511, 17), (512, 40), (513, 4), (0, 5)])
def test_words_are_columns_of_16_bytes_and_rows_fill_whole_tiles(n_rows: int, n_bytes: int) -> None:
    codes = uniform(n_rows, n_bytes)
    words = word_major(codes)
    assert words.shape == (-(-n_bytes // 16), -(-n_rows // TILE_ROWS) * TILE_ROWS, 4)
    as_bytes = words.view(torch.uint8)
    for column in range(words.shape[0]):
        there = codes[:, 16 * column : 16 * column + 16]
        assert torch.equal(as_bytes[column, :n_rows, : there.shape[1]], there)
        assert not as_bytes[column, :, there.shape[1] :].any()
        assert not as_bytes[column, n_rows:].any()


def test_codes_need_not_be_contiguous() -> None:
    codes = uniform(40, 33)
    assert torch.equal(word_major(codes.T), word_major(codes.T.contiguous()))
    assert torch.equal(word_major(codes[1:, 1:17]), word_major(codes[1:, 1:17].clone()))


# --- distances ---------------------------------------------------------------------------------------------

SHAPES = [
    *((1, 1, 1), (3, 2, 2), (8, 63, 3), (9, 257, 4), (2, 40, 7), (1, 600, 16), (17, 65, 17), (4, 129, 33)),
    (3, 100, 192),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n_queries", "n_rows", "n_bytes"), SHAPES)
def test_distances(triton_only: Run, kernel: str, n_queries: int, n_rows: int, n_bytes: int) -> None:
    queries, codes = uniform(n_queries, n_bytes), uniform(n_rows, n_bytes)
    found = triton_only(distances, kernel, queries, codes)
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), true_distances(queries, codes))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_largest_and_the_smallest_distance(triton_only: Run, kernel: str) -> None:
    for n_bytes in (5, 48):
        codes = torch.tensor([[0], [255], [0x80], [0x7F]], dtype=torch.uint8).expand(4, n_bytes)
        found = triton_only(distances, kernel, codes, codes, SMALL[kernel])
        assert np.array_equal(found.numpy(), true_distances(codes, codes))
        assert (found[0, 1], found[0, 0]) == (8 * n_bytes, 0)


# --- nearest rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("n_queries", "n_rows", "n_bytes", "k", "kind"),
    [
        (1, 1, 1, 1, "uniform"),
        (3, 63, 2, 25, "two_codes"),
        (2, 257, 33, 257, "uniform"),
        (8, 300, 16, 25, "one_code"),
        (9, 700, 4, 2, "clustered"),
        (1, 1000, 1, 1000, "uniform"),
    ],
)
def test_nearest_rows_with_the_configuration_that_ships(
    triton_only: Run, kernel: str, n_queries: int, n_rows: int, n_bytes: int, k: int, kind: str
) -> None:
    queries, codes = uniform(n_queries, n_bytes), KINDS[kind](n_rows, n_bytes)
    found = triton_only(topk, kernel, queries, codes, k)
    assert found.dtype == torch.int64
    assert torch.equal(found, true_keys(queries, codes, k))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "parts"), [(1, 1), (2, 3), (25, 1), (70, 2)])
def test_many_tiles_and_parts(triton_only: Run, kernel: str, kind: str, k: int, parts: int) -> None:
    """Lists are cut several times, where each distance is one of few and all of a tile may equal the k-th."""
    queries, codes = uniform(3, 3), KINDS[kind](450, 3)
    found = triton_only(topk, kernel, queries, codes, k, None, 0, SMALL[kernel], parts)
    assert torch.equal(found, true_keys(queries, codes, k))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.8])
def test_long_lists_are_cut_piece_by_piece(triton_only: Run, kernel: str, share: float) -> None:
    """Of the k-th distance there are more keys than are kept, in every piece of a list, with nearer ones between."""
    queries = uniform(2, 2)
    codes = torch.where(torch.rand(1000, 1) < share, queries[:1], ~queries[:1])
    found = triton_only(topk, kernel, queries, codes, 300, None, 0, SMALL[kernel], 1)
    assert torch.equal(found, true_keys(queries, codes, 300))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("order", ["nearest first", "nearest last", "nearest in the middle"])
def test_tiles_are_skipped_only_where_nothing_is_nearer(triton_only: Run, kernel: str, order: str) -> None:
    queries, codes = uniform(1, 8), uniform(600, 8)
    by_distance = torch.from_numpy(np.argsort(true_distances(queries, codes)[0], kind="stable"))
    if order == "nearest last":
        by_distance = by_distance.flip(0)
    elif order == "nearest in the middle":
        by_distance = torch.cat([by_distance[::2].flip(0), by_distance[1::2]])
    codes = codes[by_distance]
    for k in (1, 40):
        found = triton_only(topk, kernel, queries, codes, k, None, 0, SMALL[kernel], 1)
        assert torch.equal(found, true_keys(queries, codes, k))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_only_allowed_rows_are_found(triton_only: Run, kernel: str, share: float) -> None:
    """Also where fewer than k are, or none of a tile, or none at all."""
    queries, codes = uniform(3, 5), clustered(300, 5)
    allowed = torch.rand(300) < share
    if share == 0.5:
        allowed[:100] = False
    for mask in (allowed, allowed.to(torch.uint8) * 3):
        found = triton_only(topk, kernel, queries, codes, 20, mask, 0, SMALL[kernel], 2)
        assert torch.equal(found, true_keys(queries, codes, 20, allowed))
    assert int((found == NO_KEY).sum()) == 3 * max(20 - int(allowed.sum()), 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_fewer_rows_than_asked_for(triton_only: Run, kernel: str) -> None:
    queries, codes = uniform(2, 4), uniform(7, 4)
    found = triton_only(topk, kernel, queries, codes, MAX_K)
    assert torch.equal(found, true_keys(queries, codes, MAX_K))
    assert bool((found[:, 7:] == NO_KEY).all())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("first_row", [5, 2**31 - 20, 2**31 + 7, 2**32 - 40])
def test_rows_count_on_to_2_to_the_32(triton_only: Run, kernel: str, first_row: int) -> None:
    queries, codes = uniform(2, 4), two_codes(40, 4)
    allowed = torch.arange(40) % 3 != 0
    found = triton_only(topk, kernel, queries, codes, 30, allowed, first_row)
    assert torch.equal(found, true_keys(queries, codes, 30, allowed, first_row))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_queries_have_no_neighbours(triton_only: Run, kernel: str) -> None:
    nothing, codes = uniform(0, 9), uniform(3, 9)
    assert triton_only(distances, kernel, nothing, codes).shape == (0, 3)
    assert triton_only(topk, kernel, nothing, codes, 5).shape == (0, 5)
    offsets, near, rows = triton_only(within, kernel, nothing, codes, 72)
    assert (offsets.tolist(), near.tolist(), rows.tolist()) == ([0], [], [])


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_search_is_a_stable_sort(interpreter: Run, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    kernel = data.draw(st.sampled_from(list(KERNELS)))
    kind = KINDS[data.draw(st.sampled_from(list(KINDS)))]
    n_bytes, n_rows = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 400))
    queries, codes = uniform(data.draw(st.integers(1, 5)), n_bytes), kind(n_rows, n_bytes)
    queries[0] = codes[-1]
    k = data.draw(st.integers(1, n_rows + 5))
    allowed = None if data.draw(st.booleans()) else torch.rand(n_rows) < data.draw(st.floats(0, 1))
    parts = data.draw(st.integers(1, 4))
    found = interpreter(topk, kernel, queries, codes, k, allowed, 0, SMALL[kernel], parts)
    assert torch.equal(found, true_keys(queries, codes, k, allowed))


# --- rows within a radius ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("radius", [-1, 0, 9, 14, 40])
def test_rows_within_a_radius(triton_only: Run, kernel: str, radius: int) -> None:
    queries, codes = clustered(4, 5), clustered(150, 5)
    codes[[3, 70, 71]] = queries[1]
    allowed = torch.rand(150) < 0.7
    for arguments in ((), (allowed, 2**31 + 3)):
        found = triton_only(within, kernel, queries, codes, radius, *arguments)
        for part, true in zip(found, true_within(queries, codes, radius, *arguments), strict=True):
            assert part.dtype == true.dtype
            assert torch.equal(part, true)


def within_by_parts(queries: Tensor, codes: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hamming_popcount, "_DISTANCES_AT_A_TIME", 1)
        return within("popcount", queries, codes, radius)


def test_rows_within_a_radius_are_found_part_by_part(triton_only: Run) -> None:
    queries, codes = uniform(2, 2), uniform(1100, 2)
    for part, true in zip(triton_only(within_by_parts, queries, codes, 6), true_within(queries, codes, 6), strict=True):
        assert torch.equal(part, true)


# --- parts, views, sizes -----------------------------------------------------------------------------------


def of_a_view(kernel: str, queries: Tensor, codes: Tensor, start: int, end: int, k: int) -> tuple[Tensor, Tensor]:
    """Distances and keys of rows start..end, from the words of all."""
    module, part = KERNELS[kernel], word_major(codes)[:, start : -(-end // TILE_ROWS) * TILE_ROWS]
    return module.launch_distances(queries, part, end - start), module.launch_topk(
        queries, part, end - start, k, None, start
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_part_of_the_rows_is_a_view(triton_only: Run, kernel: str) -> None:
    queries, codes = uniform(2, 20), uniform(1300, 20)
    for start, end in ((0, 300), (512, 1024), (512, 1300)):
        found, keys = triton_only(of_a_view, kernel, queries, codes, start, end, 9)
        assert np.array_equal(found.numpy(), true_distances(queries, codes[start:end]))
        assert torch.equal(keys, true_keys(queries, codes[start:end], 9, None, start))


def many_queries(kernel: str, queries: Tensor, codes: Tensor, k: int) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hamming_popcount, "_QUERIES_AT_A_TIME", 3)
        return topk(kernel, queries, codes, k)


@pytest.mark.parametrize("kernel", KERNELS)
def test_many_queries_go_some_at_a_time(triton_only: Run, kernel: str) -> None:
    queries, codes = uniform(7, 3), uniform(50, 3)
    assert torch.equal(triton_only(many_queries, kernel, queries, codes, 4), true_keys(queries, codes, 4))


@given(
    n_blocks=st.integers(1, 3000),
    n_tiles=st.integers(1, 100_000),
    n_resident=st.integers(1, 1000),
    start=st.integers(0, 20),
)
@settings(deadline=None)
def test_rows_are_split_for_the_whole_chip(n_blocks: int, n_tiles: int, n_resident: int, start: int) -> None:
    def in_turn(parts: int) -> int:
        return -(-n_blocks * parts // n_resident) * (-(-n_tiles // parts) + start)

    parts = parts_of_rows(n_blocks, n_tiles, n_resident, start)
    assert 1 <= parts <= n_tiles
    assert in_turn(parts) <= in_turn(1)
    fill = n_resident // n_blocks
    assert not 1 <= fill <= n_tiles or in_turn(parts) <= in_turn(fill)


def test_one_query_fills_the_chip_and_many_blocks_need_no_parts() -> None:
    assert parts_of_rows(1, 4000, 540, 2) == 500  # eight tiles each
    assert parts_of_rows(540, 4000, 540, 2) == 1
    assert parts_of_rows(1, 1, 540, 2) == 1


def test_few_queries_have_small_blocks() -> None:
    assert [default_config(n)[0] for n in (1, 2, 3, 4, 5, 8, 9, 1000)] == [1, 2, 4, 4, 8, 8, 8, 8]
    assert all(default_config(n) in CONFIGS for n in range(1, 20))


@pytest.mark.parametrize(
    ("n_rows", "bucket"),
    [(1, 4096), (4096, 4096), (4097, 16384), (200_000, 262_144), (262_145, 1_048_576), (2**31 - 1024, 1_048_576)],
)
def test_searches_of_databases_of_about_one_size_share_a_key(n_rows: int, bucket: int) -> None:
    assert shape_key(5, n_rows, 800) == f"q8_r{bucket}_b800"


def test_cost_counts_pairs_of_words_and_every_byte_once() -> None:
    assert cost(8, 1000, 192, 25) == (3 * 8 * 1000 * 48, 192 * 1008 + 8 * 8 * 25)
    assert cost(2, 10, 17) == (3 * 2 * 10 * 8, 32 * 12 + 4 * 2 * 10)


def test_wrong_arguments_are_named() -> None:
    queries, words = uniform(2, 20), word_major(uniform(5, 20))
    for launch in (launch_distances, hamming_planes.launch_distances):
        with pytest.raises(TypeError, match=r"queries: dtype is torch\.int32, wanted torch\.uint8"):
            launch(queries.int(), words, 5)
        with pytest.raises(TypeError, match=r"words: dtype is torch\.int64"):
            launch(queries, words.long(), 5)
        with pytest.raises(ValueError, match=r"words: 2 columns do not hold codes of 40 bytes"):
            launch(uniform(2, 40), words, 5)
        with pytest.raises(ValueError, match=r"words: shape .* strides"):
            launch(queries, words[:, :5], 5)
        with pytest.raises(ValueError, match="n_rows: 513 is not between 1 and 512"):
            launch(queries, words, 513)
    with pytest.raises(ValueError, match="k: 1025 is not between 1 and 1024"):
        launch_topk(queries, words, 5, 1025)
    with pytest.raises(ValueError, match="k: 0"):
        launch_topk(queries, words, 5, 0)
    with pytest.raises(ValueError, match=r"allowed: shape is \(4,\), wanted \[5\]"):
        launch_topk(queries, words, 5, 1, torch.ones(4, dtype=torch.bool))
    with pytest.raises(TypeError, match="allowed: dtype"):
        launch_range(queries, words, 5, 1, torch.ones(5))
    with pytest.raises(ValueError, match=r"first_row: rows from 4294967292 to 4294967297"):
        launch_topk(queries, words, 5, 1, None, 2**32 - 4)
    with pytest.raises(ValueError, match=f"bytes a code, wanted 1 to {MAX_BYTES}"):
        launch_topk(queries[:, :0], words, 5, 1)


# --- larger ones, on GPUs ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n_queries", "n_rows", "n_bytes", "k"),
    [(1, 300_007, 64, 25), (8, 100_000, 192, 1024), (130, 70_001, 40, 25), (300, 40_000, 16, 300)],
)
def test_many_rows_on_a_gpu(kernel: str, kind: str, n_queries: int, n_rows: int, n_bytes: int, k: int) -> None:
    module = KERNELS[kernel]
    queries, codes = uniform(n_queries, n_bytes).cuda(), KINDS[kind](n_rows, n_bytes).cuda()
    place = torch.arange(8, dtype=torch.uint8, device="cuda")
    bits, query_bits = (((x[..., None] >> place) & 1).flatten(1).double() for x in (codes, queries))
    true = (query_bits.sum(1)[:, None] + bits.sum(1)[None, :] - 2 * query_bits @ bits.T).long()
    words = word_major(codes)
    assert torch.equal(module.launch_distances(queries, words, n_rows).long(), true)
    allowed = torch.rand(n_rows, device="cuda") < 0.3
    for mask in (None, allowed):
        keys = (true << 32) + torch.arange(n_rows, device="cuda")
        keys = keys if mask is None else keys.masked_fill(~mask, NO_KEY)
        for parts in (None, 1, 7):
            found = module.launch_topk(queries, words, n_rows, k, mask, parts=parts)
            assert torch.equal(found, keys.sort(1).values[:, :k])
