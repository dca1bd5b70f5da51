from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tetra.kernels import hamming_search
from tetra.kernels.hamming_search import _hamming_search_op, hamming_search_reference


def brute_force(queries: np.ndarray, database: np.ndarray, k: int) -> tuple[list[list[int]], list[list[int]]]:
    """Sorted pairs of (distance, row), bit by bit."""
    query_bits, bits = np.unpackbits(queries, axis=1), np.unpackbits(database, axis=1)
    nearest = [sorted((int((q != row).sum()), i) for i, row in enumerate(bits))[:k] for q in query_bits]
    return [[d for d, _ in near] for near in nearest], [[i for _, i in near] for near in nearest]


def check(queries: np.ndarray, database: np.ndarray, k: int) -> None:
    distances, rows = hamming_search(torch.from_numpy(queries), torch.from_numpy(database), k)
    assert distances.dtype == torch.int32
    assert rows.dtype == torch.int64
    assert (distances.tolist(), rows.tolist()) == brute_force(queries, database, k)
    reference = hamming_search_reference(torch.from_numpy(queries), torch.from_numpy(database), k)
    assert torch.equal(distances, reference[0])
    assert torch.equal(rows, reference[1])


@given(data=st.data(), n_bytes=st.integers(1, 20), n_rows=st.integers(1, 60), n_queries=st.integers(0, 4))
@settings(max_examples=80, deadline=None)
def test_search_is_brute_force(data: st.DataObject, n_bytes: int, n_rows: int, n_queries: int) -> None:
    k = data.draw(st.integers(1, n_rows))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    n_values = data.draw(st.sampled_from([2, 4, 256]))  # few values give many ties
    codes = generator.integers(0, n_values, (n_queries + n_rows, n_bytes), dtype=np.uint8)
    check(codes[:n_queries], codes[n_queries:], k)


@pytest.mark.parametrize("k", [1, 40, 700, 3000])
def test_ties_across_blocks_keep_row_order(k: int) -> None:
    """More rows than one block holds, with only three different codes, so that every answer is a tie."""
    generator = np.random.default_rng(3)
    few = generator.integers(0, 256, (3, 1024), dtype=np.uint8)
    database = few[generator.integers(0, 3, 3000)]
    distances, rows = hamming_search(torch.from_numpy(few), torch.from_numpy(database), k)
    for query, found_distances, found_rows in zip(few, distances.numpy(), rows.numpy(), strict=True):
        true = np.bitwise_count(database ^ query).sum(axis=1, dtype=np.int64)
        order = np.lexsort((np.arange(len(database)), true))[:k]
        assert np.array_equal(found_rows, order)
        assert np.array_equal(found_distances, true[order])


@pytest.mark.parametrize("n_bytes", [8, 192, 1056])
def test_faiss_finds_the_same_distances(n_bytes: int) -> None:
    faiss = pytest.importorskip("faiss")
    generator = np.random.default_rng(n_bytes)
    database = generator.integers(0, 256, (5000, n_bytes), dtype=np.uint8)
    queries = database[:20] ^ (generator.random((20, n_bytes)) < 0.1).astype(np.uint8)
    index = faiss.IndexBinaryFlat(8 * n_bytes)
    index.add(database)
    witness, _ = index.search(queries, 25)
    distances, rows = hamming_search(torch.from_numpy(queries), torch.from_numpy(database), 25)
    assert np.array_equal(distances.numpy(), witness)
    for query, near, found in zip(queries, distances.numpy(), rows.numpy(), strict=True):
        assert np.array_equal(np.bitwise_count(database[found] ^ query).sum(axis=1), near)


def test_codes_need_not_be_contiguous() -> None:
    codes = np.random.default_rng(0).integers(0, 256, (11, 30), dtype=np.uint8)
    distances, rows = hamming_search(torch.from_numpy(codes).T[:4], torch.from_numpy(codes).T, 3)
    assert rows[:, 0].tolist() == [0, 1, 2, 3]
    assert distances[:, 0].tolist() == [0, 0, 0, 0]


def test_it_compiles_whole_and_exports_for_any_number_of_queries() -> None:
    class Search(torch.nn.Module):
        def forward(self, queries: torch.Tensor, database: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return hamming_search(queries, database, 3)

    database = torch.randint(0, 256, (50, 30), dtype=torch.uint8)
    queries = torch.randint(0, 256, (7, 30), dtype=torch.uint8)
    torch.library.opcheck(_hamming_search_op, (queries, database, 3))
    compiled = torch.compile(Search(), fullgraph=True, backend="aot_eager")
    program = torch.export.export(
        Search(), (queries, database), dynamic_shapes=({0: torch.export.Dim("queries")}, None)
    )
    for n in (7, 2):
        expected = hamming_search(queries[:n], database, 3)
        for call in (compiled, program.module()):
            assert all(torch.equal(a, b) for a, b in zip(call(queries[:n], database), expected, strict=True))


def test_wrong_arguments_name_the_argument_and_the_value() -> None:
    codes = torch.zeros(5, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"k: 6 neighbours.*5 rows"):
        hamming_search(codes, codes, 6)
    with pytest.raises(ValueError, match="k: 0"):
        hamming_search(codes, codes, 0)
    with pytest.raises(ValueError, match=r"queries: 7 bytes.*database has 8"):
        hamming_search(codes[:, :7], codes, 1)
    with pytest.raises(TypeError, match="database: dtype"):
        hamming_search(codes, codes.float(), 1)
    with pytest.raises(ValueError, match="queries: shape"):
        hamming_search(codes[0], codes, 1)
