"""The HTML map: parsed as a browser parses it, for what it would load and for what it would run."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tetra.coordinates import CoordinateFrame
from tetra.errors import MapError, TetraError
from tetra.localizer import Localizer
from tetra.map_outputs import FrameResult
from tetra.map_page import write_html_map
from tetra.picture_strips import thumbnail
from tetra.place_map import PlaceMap

pytest.importorskip("folium")
pytest.importorskip("xstatic.pkg.leaflet")

EVIL = "</script><img src=x onerror=boom()>&\"'`{{7*7}}{% raw %}{#\u2028<!--"
UTM = CoordinateFrame("utm", 32, "north")
N = 9
POSITIONS = np.stack([np.arange(N) * 10.0, np.arange(N) * 3.0], axis=1)
CODES = np.random.default_rng(0).integers(0, 256, (N, 16), dtype=np.uint8)


class Page(HTMLParser):
    """What a page loads, its scripts, its text, and the data that it draws."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.policy = self.title = ""
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._inside = ""
        self.feed(self.text)
        self.close()
        self.loads += re.findall(r"url\(\s*['\"]?([^)'\"]*)", "".join(self.styles))
        self.loads += re.findall(r"@import\s+(\S+)", "".join(self.styles))
        self.own = [script for script in self.scripts if "@preserve" not in script[:200]]
        _, _, draws = "".join(self.own).partition("drawTetraMap(map_tetra, ")
        self.data: dict[str, Any] = json.JSONDecoder().raw_decode(draws)[0]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        values = dict(attrs)
        for name, value in attrs:
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "href", "srcset", "data", "action", "background", "poster"):
                self.loads.append(value or "")
            if name == "style":
                self.styles.append(value or "")
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside == "style":
            self.styles.append(data)
        elif self._inside == "title":
            self.title += data


def jpeg(grey: int) -> bytes:
    return thumbnail(np.full((30, 40, 3), grey, dtype=np.uint8))


@pytest.fixture(params=["local", "utm"])
def place_map(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[PlaceMap]:
    """Nine places, the fourth without a position, the even ones with pictures."""
    frame, corner = (UTM, (500_000, 5_300_000)) if request.param == "utm" else (CoordinateFrame(), (0, 0))
    positions: list[Any] = (POSITIONS + corner).tolist()
    positions[3] = None
    pictures = [jpeg(20 * i) if i % 2 == 0 else None for i in range(N)]
    with PlaceMap.create(tmp_path / "map", model_hash="ab" * 32, code_bytes=16, frame=frame) as made:
        made.add_many([EVIL.replace("\u2028", "") + str(i) for i in range(N)], CODES, positions, thumbnails=pictures)
        yield made


def results_of(place_map: PlaceMap, verdicts: list[bool | None]) -> list[FrameResult]:
    localizer = Localizer(None, place_map, k=3, window=1)
    answers = [replace(localizer.push(c), accepted=v) for c, v in zip(CODES[: len(verdicts)], verdicts, strict=True)]
    return [FrameResult(f"{EVIL}{i}", answer, jpeg(200 + i)) for i, answer in enumerate(answers)]


def test_the_page_asks_nobody_for_anything(tmp_path: Path, place_map: PlaceMap) -> None:
    write_html_map(tmp_path / "a.html", results_of(place_map, [True, False, None, True]), place_map, title=EVIL)
    page = Page(tmp_path / "a.html")
    assert "link" not in page.tags
    for address in page.loads:
        assert address.startswith(("data:image/", "#")), address
    assert page.policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert "sourceMappingURL" not in page.text
    for word in ("cdn", "jquery", "bootstrap", "fetch(", "XMLHttpRequest", "import("):
        assert word not in "".join(page.own).lower()
    addresses = set(re.findall(r"https?://[^\s\"'<>\\)]*", re.sub(r"/\*.*?\*/", "", page.text)))
    assert addresses <= {  # a link to click on and the name of a format, which browsers do not load
        "https://leafletjs.com",
        "http://www.w3.org/2000/svg",
    }


def test_all_that_the_page_calls_is_in_it(tmp_path: Path, place_map: PlaceMap) -> None:
    write_html_map(tmp_path / "a.html", results_of(place_map, [True]), place_map)
    page = Page(tmp_path / "a.html")
    (library,) = [script for script in page.scripts if script not in page.own]
    given = set(re.findall(r"\bt\.(\w+)=", library))  # the names that Leaflet puts into L
    asked = set(re.findall(r"\bL\.(\w+)", "".join(page.own)))
    assert {"map", "circleMarker", "circle", "polyline", "control"} <= asked <= given
    assert "$" not in re.sub(r'"(\\.|[^"])*"', "", "".join(page.own))
    node = shutil.which("node")
    for number, script in enumerate(page.scripts if node else []):
        (tmp_path / f"{number}.js").write_text(script, encoding="utf-8")
        subprocess.run([str(node), "--check", str(tmp_path / f"{number}.js")], check=True)


def test_names_stay_text(tmp_path: Path, place_map: PlaceMap) -> None:
    results = results_of(place_map, [True, False])
    write_html_map(tmp_path / "evil.html", results, place_map, title=EVIL)
    write_html_map(tmp_path / "tame.html", [replace(r, name="a") for r in results], place_map, title="a")
    evil, tame = Page(tmp_path / "evil.html"), Page(tmp_path / "tame.html")
    assert evil.tags == tame.tags
    assert len(evil.scripts) == len(tame.scripts)
    assert evil.title == EVIL
    assert [frame["name"] for frame in evil.data["frames"]] == [f"{EVIL}0", f"{EVIL}1"]
    assert evil.data["places"][0]["id"] == EVIL.replace("\u2028", "") + "0"
    drawing = (Path(__file__).parent.parent / "tetra" / "assets" / "map_page.js").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", drawing)


def test_the_page_has_frames_places_and_pictures(tmp_path: Path, place_map: PlaceMap) -> None:
    results = results_of(place_map, [True, False, True, None, True])
    results[3] = replace(results[3], answer=replace(results[3].answer, position=None, spread_m=None))
    write_html_map(tmp_path / "a.html", results, place_map)
    data = Page(tmp_path / "a.html").data
    assert [frame["accepted"] for frame in data["frames"]] == [True, False, True, None, True]
    assert [frame["distance"] for frame in data["frames"]] == [0] * 5
    assert [frame["at"] is None for frame in data["frames"]] == [False, False, False, True, False]

    rows = [0, 1, 2, 4, 5, 6, 7, 8]
    assert [place["xy"] for place in data["places"]] == place_map.positions(rows).tolist()
    if place_map.frame.kind == "local":
        wanted = place_map.positions(rows)[:, ::-1]
    else:
        wanted = place_map.frame.to_latlon(place_map.positions(rows))
    assert np.allclose([place["at"] for place in data["places"]], wanted, rtol=0, atol=1e-7)
    frames = [data["frames"][number] for number in (0, 1, 2, 4)]
    assert np.allclose([frame["to"] for frame in frames], wanted[[0, 1, 2, 3]], rtol=0, atol=1e-7)
    assert data["tracks"] == [[data["frames"][number]["at"] for number in (0, 2, 4)]]

    def grey(number: int | None) -> int | None:
        if number is None:
            return None
        with Image.open(io.BytesIO(base64.b64decode(data["pictures"][number].partition(",")[2]))) as image:
            return int(np.asarray(image).mean().round())

    found = [(grey(frame["picture"]), grey(frame["match_picture"])) for frame in data["frames"]]
    assert found == [(200, 0), (201, None), (202, 40), (203, None), (204, 80)]
    assert "5 frames, 3 accepted" in data["legend"]
    assert "1 of them without a position" in data["legend"]


def test_equal_maps_give_equal_files(tmp_path: Path, place_map: PlaceMap) -> None:
    results = results_of(place_map, [True, False])
    for name in ("a.html", "b.html"):
        write_html_map(tmp_path / name, results, place_map)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_map_without_frames_and_frames_without_positions(tmp_path: Path, place_map: PlaceMap) -> None:
    write_html_map(tmp_path / "a.html", [], place_map)
    data = Page(tmp_path / "a.html").data
    assert len(data["places"]) == 8
    assert data["frames"] == data["tracks"] == data["pictures"] == []
    assert data["legend"][2:4] == ["8 places", "1 more without a position"]
    place_map.remove([place for place in place_map.ids(place_map.rows()) if place])
    write_html_map(tmp_path / "a.html", [], place_map)
    assert Page(tmp_path / "a.html").data["places"] == []


def test_thousands_of_places_are_thinned_but_not_those_that_frames_were_taken_for(tmp_path: Path) -> None:
    n = 3000
    codes = np.random.default_rng(1).integers(0, 256, (n, 16), dtype=np.uint8)
    codes[:N] = CODES
    with PlaceMap.create(tmp_path / "m", model_hash="ab" * 32, code_bytes=16, frame=CoordinateFrame()) as made:
        made.add_many([f"p{i}" for i in range(n)], codes, [(float(i), 0.0) for i in range(n)])
        results = results_of(made, [True] * N)
        write_html_map(tmp_path / "a.html", results, made, max_places=100, max_pictures=3)
    data = Page(tmp_path / "a.html").data
    shown = [int(place["id"][1:]) for place in data["places"]]
    assert shown == sorted(shown)
    assert set(shown) >= {*range(N), n - 1}
    assert len(shown) == 108  # row 0 is of both kinds
    assert max(np.diff(shown)) <= 31
    assert [frame["picture"] is not None for frame in data["frames"]] == [i in (0, 4, 8) for i in range(N)]
    assert "3000 places, 108 of them shown" in data["legend"]


def test_pictures_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    with PlaceMap.create(tmp_path / "m", model_hash="ab" * 32, code_bytes=16, frame=CoordinateFrame()) as made:
        made.add_many([f"p{i}" for i in range(N)], CODES, POSITIONS, thumbnails=[b"\xff\xd8\xff no picture"] * N)
        result = replace(results_of(made, [True])[0], thumbnail=b"neither")
        write_html_map(tmp_path / "a.html", [result], made)
    data = Page(tmp_path / "a.html").data
    assert data["frames"][0]["picture"] is data["frames"][0]["match_picture"] is None
    assert data["pictures"] == []


@pytest.mark.parametrize("tiles", ["OpenStreetMap", "https://{s}.tiles.example/{z}/{x}/{y}.png"])
def test_street_tiles_are_asked_for_by_name_only(tmp_path: Path, tiles: str) -> None:
    with PlaceMap.create(tmp_path / "m", model_hash="ab" * 32, code_bytes=16, frame=UTM) as made:
        made.add_many([f"p{i}" for i in range(N)], CODES, POSITIONS + np.array([500_000, 5_300_000]))
        write_html_map(tmp_path / "a.html", [], made, tiles=tiles)
        page = Page(tmp_path / "a.html")
        assert "L.tileLayer" in "".join(page.own)
        assert all(address.startswith(("data:", "#")) for address in page.loads)
        assert "img-src data: https:" in page.policy
        with pytest.raises(TetraError, match=r"'nowhere'.*OpenStreetMap"):
            write_html_map(tmp_path / "a.html", [], made, tiles="nowhere")


def test_street_tiles_need_the_earth(tmp_path: Path) -> None:
    with PlaceMap.create(tmp_path / "m", model_hash="ab" * 32, code_bytes=16, frame=CoordinateFrame()) as made:
        made.add_many([f"p{i}" for i in range(N)], CODES, POSITIONS)
        with pytest.raises(MapError, match=r"'OpenStreetMap'.*latitude and longitude"):
            write_html_map(tmp_path / "a.html", [], made, tiles="OpenStreetMap")
    assert not (tmp_path / "a.html").exists()


def test_a_map_across_the_antimeridian_is_in_one_piece(tmp_path: Path) -> None:
    frame = CoordinateFrame("utm", 60, "south")
    longitudes = [179.8, 179.9, -179.9, -179.8, *[179.7] * (N - 4)]
    with PlaceMap.create(tmp_path / "m", model_hash="ab" * 32, code_bytes=16, frame=frame) as made:
        made.add_many([f"p{i}" for i in range(N)], CODES, frame.from_latlon([-17.0] * N, longitudes))
        write_html_map(tmp_path / "a.html", [], made)
    places = Page(tmp_path / "a.html").data["places"]
    assert [round(place["at"][1], 6) for place in places[:4]] == [179.8, 179.9, 180.1, 180.2]


@pytest.mark.parametrize("missing", ["folium", "xstatic.pkg.leaflet"])
def test_what_is_missing_is_named(tmp_path: Path, place_map: PlaceMap, missing: str) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None
from tetra.map_page import write_html_map
from tetra.place_map import PlaceMap
try:
    write_html_map({str(tmp_path / "a.html")!r}, [], PlaceMap.open({str(place_map.path)!r}, read_only=True))
except ModuleNotFoundError as error:
    print((error.name or "").partition(".")[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [missing.partition(".")[0]]
