"""A database of binary codes that is laid out once and searched many times.

Contract
    letters: Q queries, R rows of B bytes
    HammingDatabase(codes uint8 [R, B], devices=None, backend=None)
        .search, .range_search: as ``hamming_search`` and ``hamming_range_search``, with the same answers

Rows are divided evenly among ``devices``, in order; each searches its own, and the answers are merged by
(distance, row).

    CPU                 codes are read where they lie, also in a memory-mapped file
    GPU                 as many rows as fit are kept there in the kernels' layout; the others stay in the CPU's memory
                        and come over chunk by chunk, in every search
    backend "faiss"     an index of faiss, on the CPU or on a GPU; see ``tetra.kernels.hamming_faiss``
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from tetra.kernels.backend import backend_for
from tetra.kernels.hamming_faiss import FaissIndex
from tetra.kernels.hamming_search import (
    check_codes,
    check_k,
    check_radius,
    check_search,
    hamming_range_search,
    hamming_search,
    in_chunks,
    merge_nearest,
    merge_ranges,
    range_of_words,
    rows_at_once,
    search_words,
)

_SHARE_OF_FREE_MEMORY = 0.8  # of a GPU that rows may take; the rest is for queries, lists and chunks

Nearest = tuple[Tensor, Tensor]
Within = tuple[Tensor, Tensor, Tensor]


class _Part(Protocol):
    """Some of the rows. Answers count rows as the whole database does, and have fewer columns where k rows are not."""

    device: torch.device

    def search(self, queries: Tensor, k: int, allowed: Tensor | None, threads: int | None) -> Nearest: ...

    def range_search(self, queries: Tensor, radius: int, allowed: Tensor | None, threads: int | None) -> Within: ...


def _shifted(rows: Tensor, first: int) -> Tensor:
    return torch.where(rows < 0, rows, rows + first) if first else rows


class _OnCpu:
    """Rows that are searched where they lie."""

    def __init__(self, codes: Tensor, first: int) -> None:
        self._codes, self._first, self.device = codes, first, codes.device

    def search(self, queries: Tensor, k: int, allowed: Tensor | None, threads: int | None) -> Nearest:
        k = min(k, len(self._codes))
        distances, rows = hamming_search(queries, self._codes, k, allowed=allowed, threads=threads)
        return distances, _shifted(rows, self._first)

    def range_search(self, queries: Tensor, radius: int, allowed: Tensor | None, threads: int | None) -> Within:
        offsets, distances, rows = hamming_range_search(queries, self._codes, radius, allowed=allowed, threads=threads)
        return offsets, distances, rows + self._first


class _OnGpu:
    """Rows that the Triton kernels search: some laid out on the device, some that come over in every search."""

    def __init__(self, codes: Tensor, first: int, device: torch.device, n_resident: int) -> None:
        self.device, self._first, self._n_resident = device, first, n_resident
        self._resident = list(in_chunks(codes[:n_resident], device))  # piece by piece, so that no second copy is needed
        self._rest = codes[n_resident:].cpu()

    def _pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first row in the part, number of rows, words)."""
        yield from self._resident
        for start, n, words in in_chunks(self._rest, self.device):
            yield self._n_resident + start, n, words

    def search(self, queries: Tensor, k: int, allowed: Tensor | None, threads: int | None) -> Nearest:
        found: list[Nearest] = []
        for start, n, words in self._pieces():
            mask = None if allowed is None else allowed[start : start + n]
            found.append(search_words(queries, words, n, k, mask, self._first + start))
            found = [merge_nearest(found, min(k, sum(distances.shape[1] for distances, _ in found)))]
        return found[0]

    def range_search(self, queries: Tensor, radius: int, allowed: Tensor | None, threads: int | None) -> Within:
        found = []
        for start, n, words in self._pieces():
            mask = None if allowed is None else allowed[start : start + n]
            found.append(range_of_words(queries, words, n, radius, mask, self._first + start))
        return merge_ranges(found)


class _InFaiss:
    """Rows in an index of faiss. It knows nothing of rows to leave out: an index of the others is made for the call."""

    def __init__(self, codes: Tensor, first: int, device: torch.device) -> None:
        self._codes, self._first, self._target = codes.cpu(), first, device
        self.device = torch.device("cpu")  # where queries are handed over
        self._index = FaissIndex(self._codes, device)

    def _of(self, allowed: Tensor | None) -> tuple[FaissIndex, Tensor]:
        if allowed is None:
            return self._index, torch.arange(self._first, self._first + len(self._codes))
        rows = allowed.nonzero().flatten()
        return FaissIndex(self._codes[rows], self._target), rows + self._first

    def search(self, queries: Tensor, k: int, allowed: Tensor | None, threads: int | None) -> Nearest:
        index, numbers = self._of(allowed)
        if index.n_rows == 0:
            return merge_nearest(
                [(torch.empty(len(queries), 0, dtype=torch.int32), numbers.expand(len(queries), 0))], k
            )
        distances, rows = index.search(queries, min(k, index.n_rows), threads)
        return distances, numbers[rows]

    def range_search(self, queries: Tensor, radius: int, allowed: Tensor | None, threads: int | None) -> Within:
        index, numbers = self._of(allowed)
        offsets, distances, rows = index.range_search(queries, radius, threads)
        return offsets, distances, numbers[rows]


class HammingDatabase:
    """Codes on one or more devices, for any number of searches."""

    def __init__(
        self,
        codes: Tensor,
        *,
        devices: Sequence[torch.device | str] | None = None,
        backend: Literal["faiss"] | None = None,
        resident_bytes: int | None = None,
    ) -> None:
        """
        Args:
            codes: uint8 [R, B]. On the CPU they are not copied, and must not change.
            devices: where rows are searched, for example every GPU; None: where ``codes`` are.
            backend: "faiss" for its index, else this package's kernels.
            resident_bytes: that rows may take on every GPU; None: most of what is free there.

        Raises:
            TypeError, ValueError: ``codes`` are no codes, a device is unknown, or a value is out of range.
            ModuleNotFoundError: faiss is asked for and not installed.
        """
        check_codes("codes", codes)
        if backend not in (None, "faiss"):
            raise ValueError(f"backend: {backend!r}, wanted 'faiss' or None")
        if devices is not None and not devices:
            raise ValueError("devices: none given; name one, such as 'cpu', or leave the argument out")
        if resident_bytes is not None and resident_bytes < 0:
            raise ValueError(f"resident_bytes: {resident_bytes}, wanted 0 or more")
        self.n_rows, self.n_bytes = codes.shape
        self._parts: list[tuple[int, int, _Part]] = []
        places = [codes.device] if devices is None else [torch.device(device) for device in devices]
        for i, place in enumerate(places):
            first, last = self.n_rows * i // len(places), self.n_rows * (i + 1) // len(places)
            if first < last:
                part = self._make_part(codes[first:last].detach(), first, place, backend, resident_bytes)
                self._parts.append((first, last, part))

    def __len__(self) -> int:
        return self.n_rows

    def _make_part(
        self, codes: Tensor, first: int, device: torch.device, backend: str | None, resident_bytes: int | None
    ) -> _Part:
        if backend == "faiss":
            return _InFaiss(codes, first, device)
        if backend_for(torch.empty(0, device=device)) not in ("triton", "interpreter"):
            return _OnCpu(codes.to(device), first)
        if resident_bytes is None:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else codes.numel() * 2
            resident_bytes = int(free * _SHARE_OF_FREE_MEMORY)
        step = rows_at_once(self.n_bytes)
        n_resident = resident_bytes // (-(-self.n_bytes // 16) * 16)
        return _OnGpu(codes, first, device, len(codes) if n_resident >= len(codes) else n_resident // step * step)

    def _checked(self, queries: Tensor, allowed: Tensor | None, threads: int | None) -> None:
        like_database = torch.empty((1, self.n_bytes), dtype=torch.uint8, device=queries.device)
        check_search(queries, like_database.expand(self.n_rows, -1), allowed, threads)

    def search(
        self, queries: Tensor, k: int, *, allowed: Tensor | None = None, threads: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The ``k`` nearest rows for each of ``queries``: see :func:`tetra.kernels.hamming_search`."""
        self._checked(queries, allowed, threads)
        check_k(k, self.n_rows)
        found = [
            part.search(queries.to(part.device), k, self._mask(allowed, first, last, part), threads)
            for first, last, part in self._parts
        ]
        return merge_nearest([(d.to(queries.device), rows.to(queries.device)) for d, rows in found], k)

    def range_search(
        self, queries: Tensor, radius: int, *, allowed: Tensor | None = None, threads: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All rows at a distance of at most ``radius``: see :func:`tetra.kernels.hamming_range_search`."""
        self._checked(queries, allowed, threads)
        check_radius(radius)
        radius = min(radius, 8 * self.n_bytes)
        if not self._parts:
            nothing = torch.zeros(len(queries) + 1, dtype=torch.int64, device=queries.device)
            return nothing, nothing[:0].to(torch.int32), nothing[:0]
        found = [
            part.range_search(queries.to(part.device), radius, self._mask(allowed, first, last, part), threads)
            for first, last, part in self._parts
        ]
        home = queries.device
        return merge_ranges([(offsets.to(home), d.to(home), rows.to(home)) for offsets, d, rows in found])

    @staticmethod
    def _mask(allowed: Tensor | None, first: int, last: int, part: _Part) -> Tensor | None:
        return None if allowed is None else allowed[first:last].to(part.device)
