"""Answers and places as one HTML file to look at in a browser, which asks no host for anything.

folium lays out the page; Leaflet comes from the package XStatic-Leaflet and goes into the file, as do the pictures. A
policy in the page (Content-Security-Policy) forbids the browser to load anything else, so that this is not a matter of
trust. Only street tiles, if asked for, come from their server.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tetra.errors import ImageError, MapError, TetraError
from tetra.files import atomic_write
from tetra.map_outputs import FrameResult, Places, joined_tracks
from tetra.picture_strips import thumbnail

MAX_PLACES = 20_000
"""a browser stays quick with so many dots"""
MAX_PICTURES = 1_000
"""frames whose pictures are in the page, some kilobytes each"""

_PICTURE_SIDE = 160
_ZOOMS = {"local": (-16, 9), "utm": (0, 22)}  # least and most; local: 2^zoom pixels a metre
_STYLE = """
.tetra-legend { background: #ffffffd9; padding: 6px 10px; border-radius: 4px; }
.tetra-picture { display: inline-block; margin: 4px 4px 0 0; }
.tetra-picture img { display: block; max-width: 160px; }
"""
_SCRIPT = Path(__file__).parent / "assets" / "map_page.js"


def write_html_map(
    path: str | Path,
    results: Sequence[FrameResult],
    places: Places,
    *,
    title: str = "TeTRA",
    tiles: str | None = None,
    max_places: int = MAX_PLACES,
    max_pictures: int = MAX_PICTURES,
) -> None:
    """Write the page ``path``: places of the map, and on them the frames with their spread and best match.

    Frames are green if accepted, red if rejected, grey without a calibration. Their tooltips show id, distance and the
    pictures of frame and best match, where both or one are known. A map in local metres is drawn as a plane.

    Args:
        tiles: streets below, from their server each time that the page is opened: a name that folium knows, such as
            "OpenStreetMap", or an address with {z}, {x} and {y}.
        max_places, max_pictures: of more, that many are in the page, spread evenly; places that frames were taken for
            always are.

    Raises:
        MapError: tiles under a map in local metres.
        TetraError: folium does not know the tiles; ``path`` can't be written.
        ModuleNotFoundError: folium or XStatic-Leaflet is not installed.
    """
    import folium
    from branca.element import Element, Figure

    kind = places.frame.kind
    if tiles is not None and kind == "local":
        raise MapError(
            f"tiles {tiles!r}: streets need latitude and longitude, which local metres do not have; drop them"
        )
    data = _page_data(results, places, max_places, max_pictures)
    figure = Figure(title=html.escape(title))
    # Crs Simple: a plane in which latitude is y and longitude x.
    page = folium.Map(
        location=(0, 0),
        zoom_start=2,
        tiles=None if tiles is None else _tile_layer(tiles),
        crs="Simple" if kind == "local" else "EPSG3857",
        control_scale=True,
        prefer_canvas=True,
        attribution_control=tiles is not None,
    )
    page._id = "tetra"  # instead of a random one: equal maps give equal files
    page.default_js, page.default_css = [], []  # links into the web
    figure.add_child(page)

    def verbatim(text: str) -> Any:
        element: Any = Element("{{ this.text }}")  # a text that is the template itself could hold {{ }}
        element.text = text
        return element

    script, style = _leaflet()
    images = "data:" if tiles is None else "data: https: http:"
    policy = f"default-src 'none'; img-src {images}; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    figure.header.add_child(verbatim(f'<meta http-equiv="Content-Security-Policy" content="{policy}" />'))
    figure.header.add_child(verbatim(f"<style>{style}{_STYLE}</style>"))
    figure.header.add_child(verbatim(f"<script>{script}</script>"))
    figure.header.add_child(verbatim(f"<script>{_SCRIPT.read_text(encoding='utf-8')}</script>"))
    draw = f'addEventListener("DOMContentLoaded", () => drawTetraMap({page.get_name()}, {_script_json(data)}));'
    figure.script.add_child(verbatim(draw))
    text = figure.render()
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def _tile_layer(tiles: str) -> Any:
    import folium

    credit = html.escape(re.sub(r"^\w*:?//([^/]*).*", r"\1", tiles)) if "{z}" in tiles else None
    try:
        return folium.TileLayer(tiles, attr=credit, max_zoom=_ZOOMS["utm"][1], max_native_zoom=19)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise TetraError(
            f"tiles {tiles!r}: {reason}; try OpenStreetMap, or an address with {{z}}, {{x}}, {{y}}"
        ) from None


def _leaflet() -> tuple[str, str]:
    """Leaflet's script and style sheet with its pictures inside, so that they ask for no other file."""
    import xstatic.pkg.leaflet

    folder = Path(xstatic.pkg.leaflet.BASE_DIR)
    script = (folder / "leaflet.js").read_text(encoding="utf-8")
    script = re.sub(r"^//[#@] sourceMappingURL=.*$", "", script, flags=re.MULTILINE)

    def inlined(match: re.Match[str]) -> str:
        return f"url({_data_uri((folder / match[1]).read_bytes(), 'png')})"

    style = (folder / "leaflet.css").read_text(encoding="utf-8")
    return script, re.sub(r"url\((images/[\w.-]+\.png)\)", inlined, style)


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _script_json(value: object) -> str:
    """JSON that can stand in a script: nothing in it can end the script or begin a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # in ASCII, so without U+2028
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- what the page shows ---


def _page_data(results: Sequence[FrameResult], places: Places, max_places: int, max_pictures: int) -> dict[str, Any]:
    """What assets/map_page.js draws. ``at`` and ``to`` are [latitude, longitude], or [y, x] in a plane."""
    answers = [result.answer for result in results]
    rows, n_located = _shown_places(places, [answer.row for answer in answers], max_places)
    positions = places.positions(rows)
    shown_places = [
        {"id": id, "xy": xy, "at": at}
        for id, xy, at in zip(places.ids(rows), _pairs(positions), _on_page(places, positions), strict=True)
    ]

    estimates = np.array([answer.position or (math.nan, math.nan) for answer in answers]).reshape(-1, 2)
    at = _on_page(places, estimates)
    to = _on_page(places, places.positions([answer.row for answer in answers])) if answers else []
    pictures = _Pictures(places)
    has_pictures = set(_spread_evenly(np.arange(len(results)), max_pictures).tolist())
    frames = []
    for number, (result, answer) in enumerate(zip(results, answers, strict=True)):
        is_with_picture = number in has_pictures
        frames.append(
            {
                "name": result.name,
                "accepted": answer.accepted,
                "id": answer.id,
                "distance": answer.distance,
                "margin": answer.margin,
                "spread_m": answer.spread_m,
                "xy": None if answer.position is None else list(answer.position),
                "at": at[number],
                "to": to[number],
                "picture": pictures.add(result.thumbnail) if is_with_picture else None,
                "match_picture": pictures.add_place(answer.row) if is_with_picture else None,
            }
        )
    n_accepted = sum(answer.accepted is True for answer in answers)
    n_unlocated = sum(answer.position is None for answer in answers)
    judged = any(answer.accepted is not None for answer in answers)
    legend = [
        _counted(len(results), "frame") + (f", {n_accepted} accepted" if judged else "") if results else "",
        f"{n_unlocated} of them without a position" if n_unlocated else "",
        _counted(n_located, "place") + (f", {len(rows)} of them shown" if len(rows) < n_located else ""),
        f"{len(places) - n_located} more without a position" if n_located < len(places) else "",
        f"frame: {places.frame}" if places.frame.kind != "local" else "frame: local metres",
    ]
    return {
        "places": shown_places,
        "frames": frames,
        "tracks": [[at[number] for number in track] for track in joined_tracks(results)],
        "pictures": pictures.uris,
        "legend": legend,
        "zooms": _ZOOMS[places.frame.kind],
    }


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _shown_places(places: Places, needed: Sequence[int], limit: int) -> tuple[npt.NDArray[np.int64], int]:
    """Rows of places with positions, at most ``limit`` besides the ``needed``, and how many places have positions."""
    rows = places.rows()
    located = rows[np.isfinite(places.positions(rows)).all(axis=1)]
    kept = np.union1d(_spread_evenly(located, limit), np.intersect1d(located, np.array(needed, dtype=np.int64)))
    return kept, len(located)


def _spread_evenly(values: npt.NDArray[np.int64], limit: int) -> npt.NDArray[np.int64]:
    if len(values) <= limit:
        return values
    return values[np.linspace(0, len(values) - 1, limit).round().astype(np.int64)]


def _on_page(places: Places, positions: npt.NDArray[np.float64]) -> list[list[float] | None]:
    if places.frame.kind == "local":
        return _pairs(positions[:, ::-1])
    latlon = places.frame.to_latlon(positions)
    # A map across the 180th meridian is drawn in one piece: Leaflet takes longitudes beyond it.
    middle = 6 * (places.frame.zone or 0) - 183
    latlon[:, 1] = middle + (latlon[:, 1] - middle + 180) % 360 - 180
    return _pairs(latlon.round(8))


def _pairs(values: npt.NDArray[np.float64]) -> list[list[float] | None]:
    return [pair if math.isfinite(pair[0]) and math.isfinite(pair[1]) else None for pair in values.tolist()]


class _Pictures:
    """The pictures of the page, each once."""

    def __init__(self, places: Places) -> None:
        self.uris: list[str] = []
        self._places = places
        self._of_rows: dict[int, int | None] = {}

    def add(self, picture: bytes | None) -> int | None:
        """Its number; None if there is none, or none that can be read."""
        if picture is None:
            return None
        try:
            small = thumbnail(picture, _PICTURE_SIDE)
        except ImageError:  # a map may have been given anything that begins like a JPEG
            return None
        self.uris.append(_data_uri(small, "jpeg"))
        return len(self.uris) - 1

    def add_place(self, row: int) -> int | None:
        """The number of a place's thumbnail."""
        if row not in self._of_rows:
            self._of_rows[row] = self.add(self._places.thumbnails([row])[0])
        return self._of_rows[row]
