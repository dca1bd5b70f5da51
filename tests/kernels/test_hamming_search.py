from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tetra.kernels import hamming_distances, hamming_range_search, hamming_search, native
from tetra.kernels.hamming_search import _search_op, hamming_search_reference

Codes = npt.NDArray[np.uint8]
BACKENDS = ["torch", "native"]


@pytest.fixture(params=BACKENDS)
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs on each implementation for CPUs."""
    if request.param == "native" and not native.available():
        pytest.skip("the C++ kernels can't be built here")
    monkeypatch.setenv("TETRA_BACKEND", request.param)
    return str(request.param)


def all_distances(queries: Codes, database: Codes) -> npt.NDArray[np.int64]:
    """[Q, R], bit by bit."""
    query_bits, bits = np.unpackbits(queries, axis=1), np.unpackbits(database, axis=1)
    return np.stack([(q != bits).sum(axis=1) for q in query_bits]) if len(queries) else np.empty((0, len(database)))


def nearest(distances: npt.NDArray[np.int64], k: int, allowed: npt.NDArray[np.bool_] | None) -> tuple[Any, Any]:
    """The first k (distance, row) of every query, sorted as pairs; (-1, -1) where there are none left."""
    pairs = [
        sorted((int(d), row) for row, d in enumerate(line) if allowed is None or allowed[row])[:k] for line in distances
    ]
    padded = [line + [(-1, -1)] * (k - len(line)) for line in pairs]
    return [[d for d, _ in line] for line in padded], [[row for _, row in line] for line in padded]


def make_codes(kind: str, n: int, n_bytes: int, generator: np.random.Generator) -> Codes:
    """Random bits, rows near a few centres, or hardly any different rows."""
    if kind == "random":
        return generator.integers(0, 256, (n, n_bytes), dtype=np.uint8)
    centres = generator.integers(0, 256, (3, n_bytes), dtype=np.uint8)
    rows = centres[generator.integers(0, 3, n)]
    if kind == "clustered":
        flips = generator.random((n, n_bytes, 8)) < 0.03
        rows = rows ^ np.packbits(flips, axis=2)[:, :, 0]
    return rows


KINDS = ("random", "clustered", "ties")


def check(queries: Codes, database: Codes, k: int, radius: int, allowed: npt.NDArray[np.bool_] | None) -> None:
    q, d = torch.from_numpy(queries), torch.from_numpy(database)
    mask = None if allowed is None else torch.from_numpy(allowed)
    true = all_distances(queries, database)
    found = hamming_distances(q, d)
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), true)
    distances, rows = hamming_search(q, d, k, allowed=mask)
    assert (distances.dtype, rows.dtype) == (torch.int32, torch.int64)
    assert (distances.tolist(), rows.tolist()) == nearest(true, k, allowed)
    offsets, distances, rows = hamming_range_search(q, d, radius, allowed=mask)
    assert (offsets.dtype, distances.dtype, rows.dtype) == (torch.int64, torch.int32, torch.int64)
    assert offsets.tolist()[0] == 0
    for i, line in enumerate(true):
        within = sorted(
            (int(x), row) for row, x in enumerate(line) if x <= radius and (allowed is None or allowed[row])
        )
        part = slice(int(offsets[i]), int(offsets[i + 1]))
        assert list(zip(distances[part].tolist(), rows[part].tolist(), strict=True)) == within
    assert len(rows) == offsets[-1]


def draw_case(data: st.DataObject) -> tuple[Codes, Codes, int, int, npt.NDArray[np.bool_] | None]:
    n_bytes, n_rows, n_queries = (data.draw(st.integers(low, high)) for low, high in ((1, 150), (1, 70), (0, 5)))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    kind = data.draw(st.sampled_from(KINDS))
    codes = make_codes(kind, n_queries + n_rows, n_bytes, generator)
    allowed = data.draw(st.sampled_from([None, 0.0, 0.05, 0.8]))
    mask = None if allowed is None else generator.random(n_rows) < allowed
    radius = data.draw(st.integers(0, 8 * n_bytes + 5))
    return codes[:n_queries], codes[n_queries:], data.draw(st.integers(1, n_rows)), radius, mask


@given(data=st.data())
@settings(max_examples=120, deadline=None)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_search_is_brute_force(backend: str, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TETRA_BACKEND", backend)
        check(*draw_case(data))


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=10_000, deadline=None)
def test_ten_thousand_searches_are_the_same_everywhere_and_as_far_as_faiss_says(data: st.DataObject) -> None:
    faiss = pytest.importorskip("faiss")
    queries, database, k, _, allowed = draw_case(data)
    mask = None if allowed is None else torch.from_numpy(allowed)
    answers = []
    for backend in BACKENDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TETRA_BACKEND", backend)
            answers.append(hamming_search(torch.from_numpy(queries), torch.from_numpy(database), k, allowed=mask))
    for distances, rows in answers:
        assert torch.equal(distances, answers[0][0])
        assert torch.equal(rows, answers[0][1])
    if allowed is None and len(queries):
        index = faiss.IndexBinaryFlat(8 * queries.shape[1])
        index.add(database)
        assert np.array_equal(index.search(queries, k)[0], answers[0][0].numpy())


@pytest.mark.parametrize("n_bytes", [1, 7, 8, 9, 63, 64, 65, 192, 200, 1056])
@pytest.mark.parametrize("n_rows", [1, 7, 8, 9, 333])
def test_sizes_that_fill_no_word_vector_or_tile(cpu: str, n_rows: int, n_bytes: int) -> None:
    generator = np.random.default_rng(n_bytes + n_rows)
    for n_queries in (1, 2, 3, 66):
        queries = make_codes("random", n_queries, n_bytes, generator)
        check(queries, make_codes("clustered", n_rows, n_bytes, generator), min(5, n_rows), 4 * n_bytes, None)


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 40, 700, 3000])
def test_ties_across_blocks_and_threads_keep_row_order(cpu: str, k: int, n_threads: int) -> None:
    """More rows than one block holds, with only three different codes, so that every answer is a tie."""
    generator = np.random.default_rng(3)
    few = generator.integers(0, 256, (3, 1024), dtype=np.uint8)
    database = few[generator.integers(0, 3, 3000)]
    queries = torch.from_numpy(few)
    distances, rows = hamming_search(queries, torch.from_numpy(database), k, threads=n_threads)
    for query, found_distances, found_rows in zip(few, distances.numpy(), rows.numpy(), strict=True):
        true = np.bitwise_count(database ^ query).sum(axis=1, dtype=np.int64)
        order = np.lexsort((np.arange(len(database)), true))[:k]
        assert np.array_equal(found_rows, order)
        assert np.array_equal(found_distances, true[order])


@pytest.mark.parametrize("order", [1, -1])
def test_rows_that_come_ever_nearer_are_all_kept(cpu: str, order: int) -> None:
    """What is best first, or last: every row replaces one that was kept, or none does."""
    n = 2500
    database = np.zeros((n, 320), np.uint8)
    for row in range(n):
        database[row, : row // 8] = 255
        database[row, row // 8] = (1 << row % 8) - 1
    distances, rows = hamming_search(
        torch.zeros(1, 320, dtype=torch.uint8), torch.from_numpy(database[::order].copy()), 9
    )
    assert distances.tolist() == [list(range(9))]
    assert rows.tolist() == [list(range(9)) if order == 1 else list(range(n - 1, n - 10, -1))]


def test_more_candidates_than_are_kept_at_once(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are searched some at a time then."""
    module = sys.modules["tetra.kernels.hamming_search"]  # the package has a function of the same name
    monkeypatch.setattr(module, "_HEAP_BYTES", 8 * 5 * 3)
    generator = np.random.default_rng(5)
    check(make_codes("random", 11, 16, generator), make_codes("clustered", 90, 16, generator), 5, 40, None)


@pytest.mark.parametrize("n_bytes", [8, 192, 1056])
def test_faiss_finds_the_same_distances(cpu: str, n_bytes: int) -> None:
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


def test_codes_need_not_be_contiguous(cpu: str) -> None:
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 90), dtype=np.uint8))
    for view in (codes.T, codes[:, 3:50], codes[::3], codes.expand(40, 90)[:, ::2]):
        assert torch.equal(hamming_search(view[:4], view, 3)[0], hamming_search_reference(view[:4], view, 3)[0])
        offsets, distances, rows = hamming_range_search(view[:4], view, 0)
        assert offsets.tolist() == [0, 1, 2, 3, 4]
        assert (distances.tolist(), rows.tolist()) == ([0] * 4, [0, 1, 2, 3])


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_memory_mapped_file_is_searched_up_to_its_last_byte(cpu: str, tmp_path: Path) -> None:
    """Pages end with the file: reading on would be a crash."""
    n_bytes = 100
    codes = make_codes("random", 1601, n_bytes, np.random.default_rng(1))
    size = len(codes) * n_bytes
    start = -size % mmap.PAGESIZE  # so that the codes end where a page does
    (tmp_path / "codes").write_bytes(bytes(start) + codes.tobytes())
    mapped = np.memmap(tmp_path / "codes", np.uint8, "r", offset=start, shape=codes.shape)
    database = torch.from_numpy(mapped)
    distances, rows = hamming_search(torch.from_numpy(codes[-3:]), database, 1)
    assert distances.tolist() == [[0]] * 3
    assert rows.tolist() == [[len(codes) - 3], [len(codes) - 2], [len(codes) - 1]]


def test_it_compiles_whole_and_exports_for_any_number_of_queries() -> None:
    class Search(torch.nn.Module):
        def forward(self, queries: Tensor, database: Tensor) -> tuple[Tensor, Tensor]:
            return hamming_search(queries, database, 3)

    database = torch.randint(0, 256, (50, 30), dtype=torch.uint8)
    queries = torch.randint(0, 256, (7, 30), dtype=torch.uint8)
    torch.library.opcheck(_search_op, (queries, database, 3, None, None))
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
    with pytest.raises(ValueError, match="radius: -1"):
        hamming_range_search(codes, codes, -1)
    calls: list[Callable[..., Any]] = [
        hamming_distances,
        lambda q, d, **options: hamming_search(q, d, 1, **options),
        lambda q, d, **options: hamming_range_search(q, d, 1, **options),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"queries: 7 bytes.*database has 8"):
            call(codes[:, :7], codes)
        with pytest.raises(TypeError, match="database: dtype"):
            call(codes, codes.float())
        with pytest.raises(ValueError, match="queries: shape"):
            call(codes[0], codes)
        with pytest.raises(ValueError, match="threads: 0"):
            call(codes, codes, threads=0)
    for call in calls[1:]:
        with pytest.raises(TypeError, match="allowed: dtype"):
            call(codes, codes, allowed=torch.ones(5))
        with pytest.raises(ValueError, match=r"allowed: shape is \(4,\), wanted \[5\]"):
            call(codes, codes, allowed=torch.ones(4, dtype=torch.bool))
