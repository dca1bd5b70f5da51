"""The places of a map as tables, for programs: CSV and JSON."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tetra.files import atomic_write, write_json
from tetra.place_map import PlaceMap

_ROWS_AT_ONCE = 1 << 14
COLUMNS = ("file", "x", "y", "latitude", "longitude", "heading", "time")


def place_records(place_map: PlaceMap) -> Iterator[dict[str, Any]]:
    """``file`` (the id), ``x`` and ``y`` in the map's frame, ``latitude`` and ``longitude`` unless that is local,
    ``heading``, ``time`` and ``metadata`` of every place, in the order of rows; None for what is not known."""
    is_on_earth = place_map.frame.kind != "local"
    rows = place_map.rows()
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        positions = place_map.positions(part)
        degrees = place_map.frame.to_latlon(positions) if is_on_earth else positions * math.nan
        for id, position, point, heading, time, metadata in zip(
            place_map.ids(part),
            positions.tolist(),
            degrees.tolist(),
            place_map.headings(part).tolist(),
            place_map.times(part).tolist(),
            place_map.metadata(part),
            strict=True,
        ):
            values = (id, *map(_known, (*position, *point, heading, time)))
            yield {**dict(zip(COLUMNS, values, strict=True)), "metadata": metadata}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def write_csv(path: str | Path, place_map: PlaceMap) -> None:
    """Write :func:`place_records` but for the metadata as CSV, which `tetra map build --positions` reads.

    Raises :class:`~tetra.errors.TetraError` where ``path`` cannot be written.
    """
    names = COLUMNS if place_map.frame.kind != "local" else (*COLUMNS[:3], *COLUMNS[5:])
    with atomic_write(path) as file:
        writer = csv.DictWriter(_AsText(file), names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(place_records(place_map))


class _AsText:
    """Takes text for a file of bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        return self._file.write(text.encode())


def write_places(path: str | Path, place_map: PlaceMap) -> None:
    """Write what a map is and :func:`place_records` as JSON."""
    write_json(
        path,
        {
            "frame": str(place_map.frame),
            "model_hash": place_map.model_hash,
            "code_bytes": place_map.code_bytes,
            "places": list(place_records(place_map)),
        },
    )
