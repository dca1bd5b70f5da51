"""Which segments of a map to write anew, and which together.

Segments of about one size (a tier: within a factor of four) are joined when there are four of them, so a place is
copied once a tier and a map of n places has a number of segments that grows as log n, until they reach their limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tetra.map_columns import Part
from tetra.map_segments import Segment

_JOINED = 4
_SMALLEST_TIER_BYTES = 1 << 22
_ROW_BYTES = 64  # of a place in a segment, beyond its code, descriptor and texts


def size_of(part: Part) -> int:
    """About the bytes of the segment that it is or would be."""
    if isinstance(part, Segment):
        return part.entry.n_bytes
    return part.places.n_bytes + _ROW_BYTES * len(part.places)


def _tier(n_bytes: int) -> int:
    return max(0, math.ceil(math.log(max(n_bytes, 1) / _SMALLEST_TIER_BYTES, _JOINED)))


def join_youngest(sizes: Sequence[int], limit: int) -> int:
    """From which one on segments of ``sizes`` bytes, oldest first, should be joined; ``limit`` is the largest sum."""
    if not sizes:
        return 0
    joined, total = len(sizes) - 1, sizes[-1]
    while joined:
        start, size = joined, total
        while start and _tier(sizes[start - 1]) <= _tier(total) and size + sizes[start - 1] <= limit:
            start -= 1
            size += sizes[start]
        # Near the limit four may never fit: then fewer are joined, if that gives a large one.
        if joined - start + 1 < _JOINED and (start == joined or 2 * size <= limit):
            break
        joined, total = start, size
    return joined


def pack_all(sizes: Sequence[int], limit: int) -> list[int]:
    """How many neighbours to join at a time, so that there are few segments of at most ``limit`` bytes."""
    counts: list[int] = []
    total = limit
    for size in sizes:
        if total + size > limit:
            counts.append(0)
            total = 0
        counts[-1] += 1
        total += size
    return counts
