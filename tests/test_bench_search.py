from __future__ import annotations

import json
from pathlib import Path

import pytest

from tetra import bench_search
from tetra.errors import ConfigError
from tetra.kernels import hamming_search
from tetra.timing import forced_backend


def test_each_backend_has_its_figures() -> None:
    pytest.importorskip("faiss")
    rows = bench_search.bench_search(300, 24, 3, 5, n_threads=1, repeats=2, plain=True)
    assert [row["backend"] for row in rows] == [
        *("tetra", "faiss", "faiss, equal distances by row", "tetra, no compiled kernels")
    ]
    faiss = rows[1]["median_ms"]
    for row in rows:
        assert row["ratio_to_faiss"] == pytest.approx(faiss / row["median_ms"])
        assert row["gigabytes_per_s"] == pytest.approx(300 * 24 / row["median_ms"] / 1e6)
        assert row["share_of_read_bandwidth"] > 0
        assert (row["rows"], row["bytes"], row["queries"], row["k"], row["threads"]) == (300, 24, 3, 5, 1)
    json.dumps(rows)


def test_every_variant_searches_the_same_codes_for_the_same_answer() -> None:
    pytest.importorskip("faiss")
    database, queries = bench_search.random_codes(500, 17, 1), bench_search.random_codes(4, 17, 2)
    assert database.shape == (500, 17)
    assert len(set(map(bytes, database.numpy()))) == 500
    wanted = hamming_search(queries, database, 7)
    variants = bench_search._variants(database, queries, 7, database.device, False, None)
    for name in ("tetra", "faiss, equal distances by row"):
        found = variants[name]()
        assert all((a == b).all() for a, b in zip(found, wanted, strict=True))  # type: ignore[call-overload]
    with forced_backend("torch"):
        assert all((a == b).all() for a, b in zip(hamming_search(queries, database, 7), wanted, strict=True))


def test_growth_leaves_out_what_has_too_few_rows(tmp_path: Path) -> None:
    rows = bench_search.bench_growth((5, 50, 100), 8, 1, 20, repeats=1)
    assert sorted({row["rows"] for row in rows}) == [50, 100]
    pytest.importorskip("matplotlib")
    bench_search.plot_growth(tmp_path / "growth.png", rows, "growth")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_figures_out_of_range() -> None:
    with pytest.raises(ConfigError, match="k is 9, but there are 8 rows"):
        bench_search.bench_search(8, 4, 1, 9)
    with pytest.raises(ConfigError, match="k is 9, but there are 8 rows"):
        bench_search.bench_growth((2, 8), 4, 1, 9)
    with pytest.raises(ConfigError, match="queries is 0"):
        bench_search.bench_search(8, 4, 0, 1)
