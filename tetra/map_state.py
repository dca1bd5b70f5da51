"""A map at one moment, as its readers see it: searching, and looking up places by row or by id.

Letters: Q queries, k places each, B bytes a code, D values of a float descriptor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tetra.map_columns import Ids, Ints, Part, Tail, as_tensor
from tetra.map_search import PartSearch
from tetra.map_segments import Segment
from tetra.regions import Region


@dataclass(frozen=True)
class Hits:
    """The k nearest places of Q codes, best first; where there are fewer, distance and row are -1."""

    distances: npt.NDArray[np.int32]
    """[Q, k] bits that differ"""
    rows: Ints
    """[Q, k]"""
    similarities: npt.NDArray[np.float32] | None = None
    """[Q, k] cosine similarities, by which they are ordered if they were ranked again; -1 where there is no place"""


@dataclass(frozen=True)
class Match:
    """A place that was found."""

    id: str
    row: int
    distance: int
    """bits that differ"""
    position: tuple[float, float] | None
    """metres, in the map's frame"""
    heading: float | None
    """degrees"""
    time: float | None
    """seconds"""
    metadata: dict[str, Any] | None
    similarity: float | None = None
    """of the float descriptors, if they were compared"""


@dataclass(frozen=True)
class State:
    """All parts of a map, by rising rows: its segments, then what is in the journal. Replaced as a whole."""

    parts: tuple[Part, ...]
    tail: Tail
    """whose part is the last one; it may have grown since"""
    searcher: PartSearch

    @cached_property
    def n_places(self) -> int:
        return sum(part.n_allowed for part in self.parts)

    def search(self, codes: npt.NDArray[np.uint8], k: int, max_distance: int | None, within: Region | None) -> Hits:
        """The k nearest places of each of uint8 [Q, B], by (distance, row)."""
        queries = as_tensor(codes)
        distances, rows = [np.empty((len(codes), 0), dtype=np.int32)], [np.empty((len(codes), 0), dtype=np.int64)]
        for part in self.parts:
            allowed, n_allowed = part.allowed, part.n_allowed
            if within is not None and n_allowed:
                mask = within.mask(part.places.positions, part.places.headings)
                allowed = mask if allowed is None else mask & allowed
                n_allowed = int(np.count_nonzero(allowed))
            if n_allowed and len(codes):
                mask_tensor = None if allowed is None else as_tensor(allowed)
                near, numbers = self.searcher.nearest(part, queries, min(k, n_allowed), mask_tensor)
                distances.append(near.numpy())
                rows.append(part.row_numbers(numbers.numpy()))
        # Parts follow each other in rows, so a stable sort by distance orders by (distance, row).
        all_distances, all_rows = np.concatenate(distances, axis=1), np.concatenate(rows, axis=1)
        order = np.argsort(all_distances, axis=1, kind="stable")[:, :k]
        n = order.shape[1]
        hits = Hits(np.full((len(codes), k), -1, dtype=np.int32), np.full((len(codes), k), -1, dtype=np.int64))
        hits.distances[:, :n] = np.take_along_axis(all_distances, order, axis=1)
        hits.rows[:, :n] = np.take_along_axis(all_rows, order, axis=1)
        if max_distance is not None:
            is_far = hits.distances > max_distance
            hits.distances[is_far] = -1
            hits.rows[is_far] = -1
        return hits

    def rerank(self, hits: Hits, queries: npt.NDArray[np.float32], k: int | None) -> Hits:
        """The k hits (None: all) most similar to float32 [Q, D]; the map keeps descriptors."""
        similarities = np.full(hits.rows.shape, -1.0, dtype=np.float32)
        # A query at a time: the descriptors of its shortlist are all that is in memory.
        for query, rows, result in zip(queries, hits.rows, similarities, strict=True):
            for part, which, numbers in self.located(rows):
                assert part.places.descriptors is not None
                kept = part.places.descriptors[numbers].astype(np.float32)
                norms = np.linalg.norm(kept, axis=1) * np.linalg.norm(query)
                result[which] = (kept @ query) / np.maximum(norms, np.finfo(np.float32).tiny)
        key = np.where(hits.rows >= 0, -similarities, np.inf)
        order = np.argsort(key, axis=1, kind="stable")[:, :k]
        return Hits(
            np.take_along_axis(hits.distances, order, axis=1),
            np.take_along_axis(hits.rows, order, axis=1),
            np.take_along_axis(similarities, order, axis=1),
        )

    def find(self, ids: Ids) -> Ints:
        """Rows of the places with these ids, int64 [n]; -1 where there is none."""
        rows = np.full(len(ids.keys), -1, dtype=np.int64)
        for part in self.parts:
            which, numbers = part.find(ids) if isinstance(part, Segment) else self.tail.find(ids)
            if len(which):
                known = numbers < len(part.places)  # the tail may have grown since
                if part.allowed is not None:
                    known[known] = part.allowed[numbers[known]]
                rows[which[known]] = part.row_numbers(numbers[known])
        return rows

    def located(self, rows: Ints) -> Iterator[tuple[Part, Ints, Ints]]:
        """Part by part: which of ``rows`` [n] are there and not removed, and their numbers within the part."""
        starts = np.array([part.first_row for part in self.parts])
        home = np.searchsorted(starts, rows, side="right") - 1
        for i in np.unique(home).tolist():
            which = np.flatnonzero(home == i)
            numbers = self.parts[max(i, 0)].local_numbers(rows[which])
            known = numbers >= 0
            if known.any():
                yield self.parts[i], which[known], numbers[known]

    def rows(self) -> Ints:
        """Rows of all places, rising."""
        kept = [(p, np.arange(len(p.places)) if (k := p.kept()) is None else k) for p in self.parts]
        return np.concatenate([part.row_numbers(numbers) for part, numbers in kept])

    def gather(self, rows: npt.ArrayLike, name: str, dtype: Any, *width: int, fill: float = np.nan) -> Any:
        """A column of ``dtype`` [..., width] at rows [...]; ``fill`` where there is no place."""
        wanted = np.asarray(rows, dtype=np.int64)
        result = np.full((wanted.size, *width), fill, dtype=dtype)
        for part, which, numbers in self.located(wanted.ravel()):
            result[which] = getattr(part.places, name)[numbers]
        return result.reshape(*wanted.shape, *width)

    def blobs(self, rows: npt.ArrayLike, name: str) -> list[bytes | None]:
        """Ids, metadata or thumbnails at rows [n]; None where there is no place."""
        wanted = np.asarray(rows, dtype=np.int64).ravel()
        result: list[bytes | None] = [None] * len(wanted)
        for part, which, numbers in self.located(wanted):
            taken = getattr(part.places, name).take(numbers).to_list()
            for i, raw in zip(which.tolist(), taken, strict=True):
                result[i] = raw
        return result

    def matches(self, hits: Hits, query: int) -> list[Match]:
        """The places of one query's hits, best first."""
        rows = hits.rows[query]
        ids, metadata = self.blobs(rows, "ids"), self.blobs(rows, "metadata")
        positions = self.gather(rows, "positions", np.float64, 2)
        headings, times = self.gather(rows, "headings", np.float32), self.gather(rows, "times", np.float64)
        return [
            Match(
                id=raw.decode(),
                row=int(rows[i]),
                distance=int(hits.distances[query, i]),
                position=None if np.isnan(positions[i]).any() else (float(positions[i, 0]), float(positions[i, 1])),
                heading=_known(headings[i]),
                time=_known(times[i]),
                metadata=json.loads(about) if (about := metadata[i]) else None,
                similarity=None if hits.similarities is None else float(hits.similarities[query, i]),
            )
            for i, raw in enumerate(ids)
            if raw is not None
        ]


def _known(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)
