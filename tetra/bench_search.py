"""Hamming search beside faiss, on the same random codes, taking turns in one run.

``gigabytes_per_s`` is the database's size over the time: with one query, what is read from memory. What the machine can
read at most is measured too, by a sum over the same bytes on as many threads, and every result says which share of it
was reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetra.errors import ConfigError
from tetra.kernels import HammingDatabase, hamming_search
from tetra.timing import Progress, Stopwatch, check_positive, environment, forced_backend, take_turns, threads

GROWTH = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
READ_REPEATS = 7


def random_codes(n: int, n_bytes: int, seed: int) -> Tensor:
    """uint8 [n, n_bytes]."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**63), 2**63 - 1, (-(-n * n_bytes // 8),), generator=generator)
    return words.view(torch.uint8)[: n * n_bytes].view(n, n_bytes)


def bench_search(
    n_rows: int,
    n_bytes: int,
    n_queries: int,
    k: int,
    *,
    n_threads: int | None = None,
    device: str = "cpu",
    repeats: int = 15,
    plain: bool = False,
    progress: Progress | None = None,
    notices: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Time the search for the ``k`` nearest of ``n_rows`` codes of ``n_bytes``.

    Args:
        plain: also without the compiled kernels.
        notices: gets a line for what could not run.

    Returns:
        One entry a backend: ``backend``, ``median_ms``, ``p95_ms``, ``min_ms``, ``first_call_ms``, ``ratio_to_faiss``
        (how many times as fast; None where faiss is not installed), ``gigabytes_per_s``, ``share_of_read_bandwidth``,
        ``rows``, ``bytes``, ``queries``, ``k`` and :func:`tetra.timing.environment`.

    Raises:
        ConfigError: a figure is out of range.
    """
    check_positive(rows=n_rows, bytes=n_bytes, queries=n_queries, k=k, threads=n_threads, repeats=repeats)
    if k > n_rows:
        raise ConfigError(f"k is {k}, but there are {n_rows} rows; lower it")
    place = torch.device(device)
    database, queries = random_codes(n_rows, n_bytes, 1), random_codes(n_queries, n_bytes, 2)
    with threads(n_threads):
        variants = _variants(database, queries, k, place, plain, notices)
        if progress is not None:
            progress(f"{n_rows:,} rows of {n_bytes} bytes, {n_queries} queries")
        times = take_turns(variants, place, repeats, left_out=notices)
        bandwidth = _read_bandwidth(database.to(place), place)
        facts = environment(place)
    faiss = times.get("faiss")
    shape = {"rows": n_rows, "bytes": n_bytes, "queries": n_queries, "k": k}
    rows = []
    for name, taken in times.items():
        gigabytes_per_s = n_rows * n_bytes / taken.median / 1e9
        rows.append(
            {
                "backend": name,
                **taken.figures(),
                "ratio_to_faiss": None if faiss is None else faiss.median / taken.median,
                "gigabytes_per_s": gigabytes_per_s,
                "share_of_read_bandwidth": gigabytes_per_s / bandwidth,
                **shape,
                **facts,
            }
        )
    return rows


def _variants(
    database: Tensor, queries: Tensor, k: int, device: torch.device, plain: bool, notices: list[str] | None
) -> dict[str, Callable[[], object]]:
    prepared, on_device = HammingDatabase(database, devices=[device]), queries.to(device)
    variants: dict[str, Callable[[], object]] = {"tetra": lambda: prepared.search(on_device, k)}
    try:
        import faiss

        index = faiss.IndexBinaryFlat(8 * database.shape[1])
        index.add(database.numpy())
        faiss.omp_set_num_threads(torch.get_num_threads())
        variants["faiss"] = lambda: index.search(queries.numpy(), k)
        ordered = HammingDatabase(database, devices=[device], backend="faiss")
        variants["faiss, equal distances by row"] = lambda: ordered.search(queries, k)
    except (ModuleNotFoundError, ValueError) as error:
        if notices is not None:
            notices.append(f"faiss was left out: {error}")
    if plain:

        def without_kernels() -> None:
            with forced_backend("torch"):
                hamming_search(queries, database, k)

        variants["tetra, no compiled kernels"] = without_kernels
    return variants


def _read_bandwidth(database: Tensor, device: torch.device) -> float:
    """Gigabytes a second, by summing the database as 64-bit words; the best of some rounds."""
    n_words = database.numel() // 8
    if n_words == 0:
        return float("inf")
    words = database.view(-1)[: 8 * n_words].view(torch.int64)
    stopwatch = Stopwatch(device)
    return 8 * n_words / min(stopwatch(words.sum) for _ in range(READ_REPEATS)) / 1e9


def bench_growth(
    counts: Sequence[int], n_bytes: int, n_queries: int, k: int, *, progress: Progress | None = None, **options: Any
) -> list[dict[str, Any]]:
    """:func:`bench_search` for each of the numbers of rows that are at least ``k``.

    Raises :class:`~tetra.errors.ConfigError` where none is.
    """
    if k > max(counts):
        raise ConfigError(f"k is {k}, but there are {max(counts)} rows; lower it")
    return [
        row
        for n_rows in counts
        if n_rows >= k
        for row in bench_search(n_rows, n_bytes, n_queries, k, progress=progress, **options)
    ]


def plot_growth(path: str | Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Write a PNG of the median time over the number of rows, a line a backend, both axes logarithmic.

    Raises:
        TetraError: ``path`` cannot be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from tetra.files import atomic_write

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for backend in dict.fromkeys(row["backend"] for row in rows):
        line = [row for row in rows if row["backend"] == backend]
        style = {"color": "#1f6f8b", "linewidth": 2.0} if backend == "tetra" else {"linestyle": "--"}
        axes.plot([row["rows"] for row in line], [row["median_ms"] for row in line], marker="o", label=backend, **style)
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="milliseconds, median", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        canvas.print_png(file)
