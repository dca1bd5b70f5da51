"""Hamming search by faiss, with the answers of ``tetra.kernels.hamming_search``.

Contract
    FaissIndex(codes uint8 [R, B] on the CPU, device=None)
        .search(queries uint8 [Q, B], k) -> (distances int32 [Q, k], rows int64 [Q, k])
        .range_search(queries, radius) -> (offsets int64 [Q + 1], distances int32 [N], rows int64 [N])
    sorted by (distance, row), as everywhere here. The index holds a copy of the codes.

faiss promises nothing about equal distances: neither their order, nor which of them make up the last places. So one
neighbour more is asked for. Where it is farther than the k-th, the k found are the right ones and only sorted; where it
is not, all rows up to that distance are fetched and the first k of them taken.

On a GPU (a build of faiss with CUDA) the index of faiss is searched there; it knows no search by radius and at most
2048 neighbours, and what needs more goes through the index on the CPU.

Source: faiss, IndexBinaryFlat, github.com/facebookresearch/faiss (MIT).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MAX_K_ON_GPU = 2048

Found = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]


class FaissIndex:
    """Codes in an exact binary index of faiss."""

    def __init__(self, codes: Tensor, device: torch.device | str | None = None) -> None:
        """Copies ``codes`` uint8 [R, B] into the index, and onto ``device`` where that is a GPU.

        Raises:
            ModuleNotFoundError: faiss is not installed.
            ValueError: ``device`` is a GPU, and this build of faiss has no support for GPUs.
        """
        import faiss

        self.n_rows, n_bytes = codes.shape
        self._index: Any = faiss.IndexBinaryFlat(8 * n_bytes)
        self._index.add(np.ascontiguousarray(codes.numpy()))
        self._on_gpu: Any = None
        device = torch.device("cpu" if device is None else device)
        if device.type != "cpu":
            if not hasattr(faiss, "GpuIndexBinaryFlat"):
                raise ValueError(
                    f"device: {device}, but this build of faiss has no support for GPUs; install faiss-gpu or use cpu"
                )
            config = faiss.GpuIndexBinaryFlatConfig()
            config.device = device.index or 0
            self._resources = faiss.StandardGpuResources()  # has to live as long as the index
            self._on_gpu = faiss.GpuIndexBinaryFlat(self._resources, self._index, config)

    def search(self, queries: Tensor, k: int, threads: int | None = None) -> tuple[Tensor, Tensor]:
        """The ``k`` nearest rows, 1 <= k <= R."""
        codes = np.ascontiguousarray(queries.numpy())
        asked = min(k + 1, self.n_rows)
        index = self._index if self._on_gpu is None or asked > _MAX_K_ON_GPU else self._on_gpu
        with _Threads(threads):
            distances, rows = index.search(codes, asked)
            distances = distances.astype(np.int32)
            order = np.lexsort((rows, distances), axis=1)[:, :k]
            best, found = (np.take_along_axis(values, order, axis=1) for values in (distances, rows))
            if asked > k:
                for i in np.flatnonzero(distances.max(axis=1) == best[:, -1]):
                    _, best_i, found_i = self._within(codes[i : i + 1], int(best[i, -1]))
                    best[i], found[i] = best_i[:k], found_i[:k]
        return torch.from_numpy(best), torch.from_numpy(found)

    def range_search(self, queries: Tensor, radius: int, threads: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """All rows at a distance of at most ``radius``."""
        with _Threads(threads):
            offsets, distances, rows = self._within(np.ascontiguousarray(queries.numpy()), radius)
        return torch.from_numpy(offsets), torch.from_numpy(distances.astype(np.int32)), torch.from_numpy(rows)

    def _within(self, codes: npt.NDArray[np.uint8], radius: int) -> Found:
        offsets, distances, rows = self._index.range_search(codes, radius + 1)  # below it
        offsets = offsets.astype(np.int64)
        query = np.repeat(np.arange(len(codes)), np.diff(offsets))
        order = np.lexsort((rows, distances, query))
        return offsets, distances[order].astype(np.int64), rows[order].astype(np.int64)


class _Threads:
    """Within it faiss uses so many threads; None leaves its setting."""

    def __init__(self, threads: int | None) -> None:
        self._threads = threads

    def __enter__(self) -> None:
        import faiss

        self._before = faiss.omp_get_max_threads()
        if self._threads is not None:
            faiss.omp_set_num_threads(self._threads)

    def __exit__(self, *_: object) -> None:
        import faiss

        faiss.omp_set_num_threads(self._before)
