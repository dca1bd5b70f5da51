"""Answers and places on the earth: GeoJSON (RFC 7946) and KML 2.2 (OGC 07-147r2).

Both are WGS84 and put longitude before latitude. Features are written one by one, so a large map needs little memory.

=========  ==================================  ======================================================================
kind       geometry                            properties
=========  ==================================  ======================================================================
``frame``  point, none without a position      name, accepted, id, distance, margin, score, belief, position,
                                               spread_m, time, sequence
``track``  line through the frames of a        sequence, frames
           sequence that were not rejected
``place``  point, none without a position      id, position, heading, time
=========  ==================================  ======================================================================

Positions among the properties are metres in the map's frame. What is not known is null in GeoJSON, left out in KML.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from tetra.coordinates import CoordinateFrame
from tetra.errors import MapError
from tetra.files import atomic_write
from tetra.map_outputs import FrameResult, Places, joined_tracks

_DIGITS = 8  # of a degree: a millimetre
_BLOCK = 1 << 14  # places looked up at a time

LonLat = tuple[float, float]


def write_geojson(
    path: str | Path, results: Sequence[FrameResult], places: Places, *, with_places: bool = False
) -> None:
    """Write a FeatureCollection of the answers, their tracks and, if ``with_places``, the places of the map.

    A track that crosses the 180th meridian is a MultiLineString, as the RFC asks for.

    Raises:
        MapError: the map has local metres.
        TetraError: ``path`` can't be written.
    """
    _require_earth(path, places.frame, "GeoJSON")
    with atomic_write(path) as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        separator = b"\n"
        for feature in _features(results, places, with_places):
            value = {"type": "Feature", "geometry": feature.to_geojson(), "properties": feature.properties}
            file.write(separator + json.dumps(value, allow_nan=False).encode())
            separator = b",\n"
        file.write(b"\n]}\n")


def write_kml(path: str | Path, results: Sequence[FrameResult], places: Places, *, with_places: bool = False) -> None:
    """Write a KML document with a folder each for frames, tracks and, if ``with_places``, places.

    Accepted answers are green, rejected ones red, others grey. Where a time is known a placemark has a TimeStamp, in
    seconds since 1970; times that count from the start of a video lie in 1970. The properties are ExtendedData.

    Raises as :func:`write_geojson`.
    """
    _require_earth(path, places.frame, "KML")
    with atomic_write(path) as file:
        file.write(
            b'<?xml version="1.0" encoding="UTF-8"?>\n<kml xmlns="http://www.opengis.net/kml/2.2">\n<Document>\n'
        )
        for name, colour in _KML_COLOURS.items():
            file.write(_xml(_style(name, colour)))
        folder = ""
        for feature in _features(results, places, with_places):
            if feature.kind != folder:
                file.write(b"</Folder>\n" if folder else b"")
                folder = feature.kind
                file.write(f"<Folder>\n<name>{folder}s</name>\n".encode())
            file.write(_xml(_placemark(feature)))
        file.write((b"</Folder>\n" if folder else b"") + b"</Document>\n</kml>\n")


def _require_earth(path: str | Path, frame: CoordinateFrame, kind: str) -> None:
    if frame.kind == "local":
        raise MapError(
            f"{path}: {kind} needs latitude and longitude, which a map in the frame '{frame}' does not have; write "
            "HTML, which draws local metres too, or build the map in a UTM zone"
        )


# --- features ---


@dataclass(frozen=True)
class _Feature:
    kind: str
    points: list[LonLat]
    """none, one, or those of a line"""
    properties: dict[str, Any]

    def to_geojson(self) -> dict[str, Any] | None:
        if not self.points:
            return None
        if len(self.points) == 1:
            return {"type": "Point", "coordinates": self.points[0]}
        lines = _cut_at_antimeridian(self.points)
        if len(lines) == 1:
            return {"type": "LineString", "coordinates": lines[0]}
        return {"type": "MultiLineString", "coordinates": lines}


def _features(results: Sequence[FrameResult], places: Places, with_places: bool) -> Iterator[_Feature]:
    answers = [result.answer for result in results]
    lonlat = _lonlat(places.frame, [answer.position or (math.nan, math.nan) for answer in answers])
    for result, answer, points in zip(results, answers, lonlat, strict=True):
        properties = {key: value for key, value in answer.to_dict(0).items() if key != "matches"}
        yield _Feature(
            "frame", points, {"kind": "frame", "name": result.name, **properties, "sequence": result.sequence}
        )
    for track in joined_tracks(results):
        points = [lonlat[number][0] for number in track]
        properties = {"kind": "track", "sequence": results[track[0]].sequence, "frames": len(track)}
        yield _Feature("track", points, properties)
    if with_places:
        yield from _place_features(places)


def _place_features(places: Places) -> Iterator[_Feature]:
    all_rows = places.rows()
    for start in range(0, len(all_rows), _BLOCK):
        rows = all_rows[start : start + _BLOCK]
        positions = places.positions(rows)
        columns = (places.ids(rows), positions, places.headings(rows), places.times(rows))
        lonlat = _lonlat(places.frame, positions)
        for id, position, heading, time, points in zip(*columns, lonlat, strict=True):
            properties = {
                "kind": "place",
                "id": id,
                "position": position.tolist() if points else None,
                "heading": _known(heading),
                "time": _known(time),
            }
            yield _Feature("place", points, properties)


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _lonlat(frame: CoordinateFrame, positions: npt.ArrayLike) -> list[list[LonLat]]:
    """One (longitude, latitude) for each of positions [n, 2], or none where it is NaN."""
    latlon = frame.to_latlon(np.asarray(positions, dtype=np.float64).reshape(-1, 2)).round(_DIGITS)
    return [[(lon, lat)] if math.isfinite(lat) else [] for lat, lon in latlon.tolist()]


def _cut_at_antimeridian(points: Sequence[LonLat]) -> list[list[LonLat]]:
    """A line as the lines east and west of the 180th meridian (RFC 7946, section 3.1.9)."""
    lines = [[points[0]]]
    for (lon, lat), (next_lon, next_lat) in pairwise(points):
        if abs(next_lon - lon) > 180:  # the short way is across
            side = math.copysign(180.0, lon)
            apart = 360 - abs(next_lon - lon)
            share = (180 - abs(lon)) / apart if apart else 0.0
            crossing = round(lat + share * (next_lat - lat), _DIGITS)
            lines[-1].append((side, crossing))
            lines.append([(-side, crossing)])
        lines[-1].append((next_lon, next_lat))
    return lines


# --- KML ---

_KML_COLOURS = {  # alpha, blue, green, red
    "accepted": "ff50981a",
    "rejected": "ff2730d7",
    "unknown": "ff9a9a9a",
    "track": "ff8a5c2b",
    "place": "ffb0b0b0",
}
# What XML 1.0 can't hold, even escaped.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _element(tag: str, *children: ElementTree.Element, text: str | None = None, **attributes: str) -> Any:
    element = ElementTree.Element(tag, attributes)
    element.text = None if text is None else _NOT_XML.sub("\ufffd", text)
    element.extend(children)
    return element


def _xml(element: ElementTree.Element) -> bytes:
    return ElementTree.tostring(element, encoding="unicode").encode() + b"\n"


def _style(name: str, colour: str) -> ElementTree.Element:
    point = _element("IconStyle", _element("color", text=colour), _element("scale", text="0.6"))
    line = _element("LineStyle", _element("color", text=colour), _element("width", text="3"))
    return _element("Style", point, line, id=name)  # type: ignore[no-any-return]


def _placemark(feature: _Feature) -> ElementTree.Element:
    """Its parts in the order that the schema asks for."""
    properties = feature.properties
    style = feature.kind
    name = properties.get("id") or ""
    if feature.kind == "frame":
        style = {True: "accepted", False: "rejected", None: "unknown"}[properties["accepted"]]
        name = properties["name"]
    elif feature.kind == "track":
        name = f"track {properties['sequence']}"
    mark = _element("Placemark", _element("name", text=name))
    when = _timestamp(properties.get("time"))
    if when is not None:
        mark.append(_element("TimeStamp", _element("when", text=when)))
    mark.append(_element("styleUrl", text=f"#{style}"))
    data = [
        _element("Data", _element("value", text=value if isinstance(value, str) else json.dumps(value)), name=key)
        for key, value in properties.items()
        if value is not None and key not in ("kind", "name")
    ]
    mark.append(_element("ExtendedData", *data))
    if feature.points:
        coordinates = _element(
            "coordinates", text=" ".join(f"{lon:.{_DIGITS}f},{lat:.{_DIGITS}f}" for lon, lat in feature.points)
        )
        if len(feature.points) == 1:
            mark.append(_element("Point", coordinates))
        else:
            mark.append(_element("LineString", _element("tessellate", text="1"), coordinates))
    return mark  # type: ignore[no-any-return]


def _timestamp(seconds: float | None) -> str | None:
    """XML's dateTime of seconds since 1970; None beyond the years 1 to 9999."""
    if seconds is None:
        return None
    try:
        when = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=seconds)
    except OverflowError:
        return None
    return when.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"
