"""Prepared databases, several devices, faiss: the same answers as one search of one tensor."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tetra.kernels import HammingDatabase, hamming_distances, hamming_range_search, hamming_search
from tetra.kernels.hamming_search import counts_bits, hamming_distances_reference, merge_nearest, merge_ranges

Answer = list[Tensor]


def codes_of(kind: str, n_queries: int, n_rows: int, n_bytes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n_queries + n_rows, n_bytes), dtype=torch.uint8, generator=generator)
    if kind == "ties":
        codes = codes[torch.randint(0, min(3, len(codes)), (len(codes),), generator=generator)]
    return codes[:n_queries], codes[n_queries:]


def expected(queries: Tensor, codes: Tensor, k: int, radius: int, allowed: Tensor | None) -> Answer:
    """Both searches by definition, in lists of Python."""
    lines = hamming_distances_reference(queries, codes).tolist()
    pairs = [sorted((d, i) for i, d in enumerate(line) if allowed is None or allowed[i]) for line in lines]
    near = [(line + [(-1, -1)] * k)[:k] for line in pairs]
    within = [[pair for pair in line if pair[0] <= radius] for line in pairs]
    flat = [pair for line in within for pair in line]
    offsets = np.cumsum([0, *map(len, within)])
    return [
        torch.tensor([[d for d, _ in line] for line in near], dtype=torch.int32).view(len(lines), k),
        torch.tensor([[row for _, row in line] for line in near], dtype=torch.int64).view(len(lines), k),
        torch.from_numpy(offsets).to(torch.int64),
        torch.tensor([d for d, _ in flat], dtype=torch.int32),
        torch.tensor([row for _, row in flat], dtype=torch.int64),
    ]


def answers(queries: Tensor, codes: Tensor, k: int, radius: int, allowed: Tensor | None, options: Any) -> Answer:
    database = HammingDatabase(codes, **options)
    assert len(database) == len(codes)
    return [*database.search(queries, k, allowed=allowed), *database.range_search(queries, radius, allowed=allowed)]


def check(found: Answer, wanted: Answer) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("backend", [None, "faiss"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_parts_of_the_rows_give_the_answer_of_all(backend: str | None, data: st.DataObject) -> None:
    if backend:
        pytest.importorskip("faiss")
    n_rows, n_queries = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 4))
    kind, seed = data.draw(st.sampled_from(["random", "ties"])), data.draw(st.integers(0, 2**31))
    queries, codes = codes_of(kind, n_queries, n_rows, data.draw(st.integers(1, 20)), seed)
    k, radius = data.draw(st.integers(1, n_rows)), data.draw(st.integers(0, 170))
    share = data.draw(st.sampled_from([None, 0.0, 0.1, 0.7]))
    allowed = None if share is None else torch.rand(n_rows, generator=torch.Generator().manual_seed(seed)) < share
    options = {"devices": ["cpu"] * data.draw(st.integers(1, 5)), "backend": backend}
    check(answers(queries, codes, k, radius, allowed, options), expected(queries, codes, k, radius, allowed))


def test_faiss_orders_ties_by_row_with_a_thousand_of_them() -> None:
    pytest.importorskip("faiss")
    queries, codes = codes_of("ties", 5, 1000, 32, 3)
    for k in (1, 10, 400, 1000):
        check(answers(queries, codes, k, 0, None, {"backend": "faiss"}), expected(queries, codes, k, 0, None))


def in_small_chunks(queries: Tensor, codes: Tensor, k: int, radius: int, allowed: Tensor | None) -> Answer:
    """Every way through the Triton kernels, with chunks of one tile: plain calls, and kept, streamed and split rows."""
    module = sys.modules["tetra.kernels.hamming_search"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", 1)
        wanted = [*hamming_search(queries, codes, k, allowed=allowed)]
        wanted += hamming_range_search(queries, codes, radius, allowed=allowed)
        tile_bytes = 512 * -(-codes.shape[1] // 16) * 16
        for options in ({}, {"resident_bytes": 0}, {"resident_bytes": tile_bytes}, {"devices": [codes.device] * 2}):
            check(answers(queries, codes, k, radius, allowed, options), [w.cpu() for w in wanted])
        assert torch.equal(hamming_distances(queries, codes), hamming_distances_reference(queries, codes))
    return wanted


@pytest.mark.parametrize(("n_queries", "k"), [(1, 9), (20, 1100)])
def test_rows_that_come_in_chunks(interpreter: Any, n_queries: int, k: int) -> None:
    """Three chunks, the last of them not a whole tile; more neighbours than the kernels' lists hold."""
    queries, codes = codes_of("ties", n_queries, 1200, 3, 1)
    allowed = torch.rand(1200) < 0.9
    found = interpreter(in_small_chunks, queries, codes, k, 5, allowed)
    check(found, expected(queries, codes, k, 5, allowed))


@pytest.mark.gpu
@pytest.mark.parametrize(("n_queries", "k"), [(1, 25), (7, 1), (200, 1024), (40, 3000)])
def test_rows_that_come_in_chunks_on_a_gpu(n_queries: int, k: int) -> None:
    queries, codes = codes_of("random", n_queries, 9000, 64, 1)
    allowed = torch.rand(9000) < 0.9
    check(
        in_small_chunks(queries.cuda(), codes.cuda(), k, 230, allowed.cuda()),
        expected(queries, codes, k, 230, allowed),
    )


@pytest.mark.gpu
def test_codes_on_the_cpu_are_searched_on_gpus() -> None:
    queries, codes = codes_of("random", 30, 5000, 192, 1)
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    check(answers(queries, codes, 25, 740, None, {"devices": devices}), expected(queries, codes, 25, 740, None))


# Milliseconds that popcounts and tensor cores took on an H200 with 132 multiprocessors (docs/search.md), k = 25.
MEASURED = {
    (1_000_000, 1024): {1: (0.50, 1.61), 8: (0.93, 1.45), 16: (1.57, 1.56), 32: (2.79, 1.79), 100: (8.72, 4.35)},
    (1_000_000, 192): {1: (0.30, 0.97), 16: (0.55, 1.01), 32: (0.78, 1.08), 100: (1.96, 2.43), 1000: (14.1, 9.6)},
    (100_000, 1024): {1: (0.30, 0.55), 16: (0.37, 0.65), 32: (0.47, 0.70), 100: (1.08, 1.38), 1000: (8.08, 4.15)},
}


def test_the_kernel_is_chosen_that_was_faster_where_both_were_measured() -> None:
    for (n_rows, n_bytes), by_queries in MEASURED.items():
        for n_queries, (counted, multiplied) in by_queries.items():
            chosen = counted if counts_bits(90, n_queries, n_rows, n_bytes, 132) else multiplied
            assert chosen <= 1.01 * min(counted, multiplied), (n_rows, n_bytes, n_queries)


def test_the_crossover_is_the_one_that_is_documented() -> None:
    """(architecture, multiprocessors, rows, bytes) -> the first number of queries for tensor cores, and the first from
    which on they always win."""
    documented = {
        (90, 132, 1_000_000, 1024): (9, 17),
        (90, 132, 100_000, 1024): (233, 273),
        (90, 132, 1_000_000, 192): (225, 297),
        (80, 108, 1_000_000, 1024): (17, 17),
        (87, 16, 100_000, 1024): (17, 17),
        (86, 82, 1_000_000, 1024): (25, 393),
        (100, 148, 1_000_000, 1024): (9, 9),
    }
    for (arch, sms, n_rows, n_bytes), (first, always) in documented.items():
        multiplied = [n for n in range(1, 3000) if not counts_bits(arch, n, n_rows, n_bytes, sms)]
        assert multiplied[0] == first
        assert [n for n in multiplied if n >= always] == list(range(always, 3000))
        assert always - 1 not in multiplied
    for arch in (80, 86, 87, 89, 90, 100, 120):
        assert all(counts_bits(arch, n, 10_000, 192, 100) for n in range(1, 1000))


def test_answers_without_columns_or_queries_merge() -> None:
    nothing = torch.empty(2, 0, dtype=torch.int32), torch.empty(2, 0, dtype=torch.int64)
    distances, rows = merge_nearest([nothing, nothing], 2)
    assert distances.tolist() == rows.tolist() == [[-1, -1]] * 2
    empty = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    assert [part.tolist() for part in merge_ranges([empty, empty])] == [[0], [], []]


def test_no_rows_have_nothing_within_a_radius() -> None:
    database = HammingDatabase(torch.empty(0, 4, dtype=torch.uint8))
    offsets, distances, rows = database.range_search(torch.zeros(2, 4, dtype=torch.uint8), 3)
    assert (offsets.tolist(), distances.tolist(), rows.tolist()) == ([0, 0, 0], [], [])
    with pytest.raises(ValueError, match="k: 1 neighbours asked for, but the database has 0 rows"):
        database.search(torch.zeros(2, 4, dtype=torch.uint8), 1)


def test_wrong_arguments_name_the_argument_and_the_value() -> None:
    codes = torch.zeros(5, 8, dtype=torch.uint8)
    with pytest.raises(TypeError, match="codes: dtype"):
        HammingDatabase(codes.float())
    with pytest.raises(ValueError, match="devices: none given"):
        HammingDatabase(codes, devices=[])
    with pytest.raises(ValueError, match="backend: 'annoy'"):
        HammingDatabase(codes, backend="annoy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resident_bytes: -1"):
        HammingDatabase(codes, resident_bytes=-1)
    database = HammingDatabase(codes)
    with pytest.raises(ValueError, match=r"queries: 7 bytes.*database has 8"):
        database.search(codes[:, :7], 1)
    with pytest.raises(ValueError, match=r"k: 6 neighbours.*5 rows"):
        database.search(codes, 6)
    with pytest.raises(ValueError, match="radius: -2"):
        database.range_search(codes, -2)
    with pytest.raises(ValueError, match=r"allowed: shape is \(4,\), wanted \[5\]"):
        database.search(codes, 1, allowed=torch.ones(4, dtype=torch.bool))
