"""Records, GeoJSON and KML: read back by the parsers of others and compared with the answers and the map."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tetra.coordinates import CoordinateFrame, utm_of
from tetra.errors import MapError, TetraError
from tetra.geo_files import write_geojson, write_kml
from tetra.localizer import Answer, Localizer, Timings
from tetra.map_outputs import FrameResult, frame_record, latency_table, with_decode_ms
from tetra.place_map import PlaceMap

N, B = 12, 16
LATITUDE, LONGITUDE = np.linspace(51.750, 51.752, N), np.linspace(-1.26, -1.25, N)
EVIL = "a</name><script>&\"'{{7*7}}\x07ü"
CODES = np.random.default_rng(0).integers(0, 256, (N, B), dtype=np.uint8)
KML = "{http://www.opengis.net/kml/2.2}"


def new_map(path: Path, frame: CoordinateFrame, positions: Any, **columns: Any) -> PlaceMap:
    """Places 0, 1, ... in ``frame``."""
    made = PlaceMap.create(path, model_hash="ab" * 32, code_bytes=B, frame=frame)
    made.add_many([f"place {number}" for number in range(N)], CODES, positions, **columns)
    return made


@pytest.fixture
def oxford(tmp_path: Path) -> Iterator[PlaceMap]:
    """Places on a line through Oxford; number 5 has no position."""
    east, north, frame = utm_of(LATITUDE, LONGITUDE)
    positions: list[Any] = np.stack([east, north], axis=1).tolist()
    positions[5] = None
    times = [None, *range(1_700_000_000, 1_700_000_000 + N - 1)]
    with new_map(tmp_path / "oxford", frame, positions, headings=[90.0] * N, times=times) as opened:
        yield opened


def results_of(place_map: PlaceMap, verdicts: list[bool | None]) -> list[FrameResult]:
    """Answers to the codes of the first places, each right; the sixth has no position."""
    localizer = Localizer(None, place_map, k=4, window=1)
    answers = [localizer.push(code, 100.0 + number) for number, code in enumerate(CODES[: len(verdicts)])]
    if len(answers) > 5:
        answers[5] = replace(answers[5], position=None, spread_m=None)
    pairs = enumerate(zip(answers, verdicts, strict=True))
    return [FrameResult(f"q/{number}.jpg", replace(answer, accepted=verdict)) for number, (answer, verdict) in pairs]


# --- records ------------------------------------------------------------------------------------------------


def test_a_record_has_the_keys_that_scripts_rely_on(oxford: PlaceMap) -> None:
    answer = results_of(oxford, [True])[0].answer
    record = json.loads(json.dumps(frame_record("a.jpg", answer, 2), allow_nan=False))
    assert list(record)[:5] == ["file", "accepted", "matches", "position", "spread_m"]
    assert record["file"] == "a.jpg"
    assert record["accepted"] is True
    first, second = record["matches"]
    assert list(first) == list(second) == ["id", "distance", "position"]
    assert (first["id"], first["distance"]) == ("place 0", 0)
    assert first["position"] == oxford.positions([0])[0].tolist()
    assert record["position"] == pytest.approx(first["position"], abs=1)
    assert record["spread_m"] >= 0
    assert (record["id"], record["distance"], record["time"]) == ("place 0", 0, 100.0)
    assert {"margin", "score", "belief"} <= record.keys()
    steps = ["decode", "preprocess", "network", "search", "decide", "total"]
    assert list(record["timings_ms"]) == steps
    assert record["timings_ms"]["search"] > 0
    assert len(frame_record("a.jpg", answer)["matches"]) == 4
    assert frame_record("a.jpg", answer, 0)["matches"] == []


def test_a_record_of_what_is_not_known(oxford: PlaceMap) -> None:
    answer = results_of(oxford, [None] * 6)[5].answer
    record = frame_record("a.jpg", answer, 1)
    assert record["accepted"] is None
    assert record["position"] is record["spread_m"] is None
    assert record["matches"] == [{"id": "place 5", "distance": 0, "position": None}]


# --- GeoJSON ------------------------------------------------------------------------------------------------


def read_geojson(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Features by kind, after the rules of RFC 7946 that can be checked without knowing the data."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert set(found) == {"type", "features"}
    assert found["type"] == "FeatureCollection"
    kinds: dict[str, list[dict[str, Any]]] = {"frame": [], "track": [], "place": []}
    for feature in found["features"]:
        assert set(feature) == {"type", "geometry", "properties"}
        assert feature["type"] == "Feature"
        geometry = feature["geometry"]
        if geometry is not None:
            depth = {"Point": 0, "LineString": 1, "MultiLineString": 2}[geometry["type"]]
            points = np.array(geometry["coordinates"][0] if depth == 2 else geometry["coordinates"])
            assert points.shape[-1] == 2
            assert (abs(points) <= (180, 90)).all()
            assert depth == 0 or len(points) >= 2
        kinds[feature["properties"]["kind"]].append(feature)
    return kinds


def test_geojson_has_frames_tracks_and_places(tmp_path: Path, oxford: PlaceMap) -> None:
    results = results_of(oxford, [True, True, False, True, True, True])
    results[0] = replace(results[0], name=EVIL)
    write_geojson(tmp_path / "a.geojson", results, oxford, with_places=True)
    found = read_geojson(tmp_path / "a.geojson")

    assert [feature["properties"]["name"] for feature in found["frame"]] == [EVIL, *(r.name for r in results[1:])]
    for number, (feature, result) in enumerate(zip(found["frame"], results, strict=True)):
        properties = feature["properties"]
        assert properties["accepted"] is result.answer.accepted
        assert (properties["id"], properties["time"]) == (f"place {number}", 100.0 + number)
        assert "matches" not in properties
        if number == 5:
            assert feature["geometry"] is None
            assert properties["position"] is None
        else:  # longitude first
            wanted = [LONGITUDE[number], LATITUDE[number]]
            assert feature["geometry"]["coordinates"] == pytest.approx(wanted, abs=2e-8)
            assert properties["position"] == list(result.answer.position or ())

    (track,) = found["track"]
    points = [found["frame"][number]["geometry"]["coordinates"] for number in (0, 1, 3, 4)]
    assert track["geometry"] == {"type": "LineString", "coordinates": points}

    places = found["place"]
    assert [place["properties"]["id"] for place in places] == [f"place {number}" for number in range(N)]
    assert [place["geometry"] is None for place in places] == [number == 5 for number in range(N)]
    assert places[1]["properties"]["heading"] == 90.0
    assert [place["properties"]["time"] for place in places[:2]] == [None, 1_700_000_000.0]
    coordinates = [place["geometry"]["coordinates"] for place in places if place["geometry"]]
    known = np.arange(N) != 5
    assert np.allclose(coordinates, np.stack([LONGITUDE, LATITUDE], axis=1)[known], rtol=0, atol=2e-8)


def test_tracks_end_with_their_sequences_and_need_two_points(tmp_path: Path, oxford: PlaceMap) -> None:
    results = results_of(oxford, [True, True, True, None, False])
    results = [replace(r, sequence=s) for r, s in zip(results, [0, 0, 1, 2, 2], strict=True)]
    write_geojson(tmp_path / "a.geojson", results, oxford)
    found = read_geojson(tmp_path / "a.geojson")
    assert [track["properties"] for track in found["track"]] == [{"kind": "track", "sequence": 0, "frames": 2}]
    assert found["place"] == []
    write_geojson(tmp_path / "a.geojson", [], oxford)
    assert read_geojson(tmp_path / "a.geojson") == {"frame": [], "track": [], "place": []}


def test_a_track_across_the_antimeridian_is_cut_there(tmp_path: Path) -> None:
    """RFC 7946, section 3.1.9. Zone 60 counts on beyond 180 degrees."""
    longitudes = [179.8, 179.9, -179.9, -179.8, 179.7, *[179.7] * (N - 5)]
    frame = CoordinateFrame("utm", 60, "south")
    latitudes = [-17.0, -17.0, -17.1, -17.1, -17.0, *[-17.0] * (N - 5)]
    with new_map(tmp_path / "fiji", frame, frame.from_latlon(latitudes, longitudes)) as fiji:
        results = results_of(fiji, [True] * 5)
        write_geojson(tmp_path / "a.geojson", results, fiji)
    (track,) = read_geojson(tmp_path / "a.geojson")["track"]
    assert track["geometry"]["type"] == "MultiLineString"
    lines = track["geometry"]["coordinates"]
    assert [[round(lon, 6) for lon, _ in line] for line in lines] == [
        [179.8, 179.9, 180.0],
        [-180.0, -179.9, -179.8, -180.0],
        [180.0, 179.7],
    ]
    assert lines[0][-1][1] == lines[1][0][1] == pytest.approx(-17.05, abs=1e-6)
    assert lines[1][-1][1] == pytest.approx(-17.06, abs=1e-6)


# --- KML ----------------------------------------------------------------------------------------------------


def test_kml_has_the_same(tmp_path: Path, oxford: PlaceMap) -> None:
    results = results_of(oxford, [True, False, None, True, True, True])
    results[0] = replace(results[0], name=EVIL)
    write_kml(tmp_path / "a.kml", results, oxford, with_places=True)
    root = ElementTree.parse(tmp_path / "a.kml").getroot()
    assert root.tag == f"{KML}kml"
    folders = {folder.findtext(f"{KML}name"): folder for folder in root.iter(f"{KML}Folder")}
    assert list(folders) == ["frames", "tracks", "places"]
    frames = folders["frames"].findall(f"{KML}Placemark")
    assert [mark.findtext(f"{KML}name") for mark in frames] == [
        EVIL.replace("\x07", "\ufffd"),
        *(result.name for result in results[1:]),
    ]
    styles = [mark.findtext(f"{KML}styleUrl") for mark in frames]
    assert styles == ["#accepted", "#rejected", "#unknown", "#accepted", "#accepted", "#accepted"]
    assert {f"#{style.get('id')}" for style in root.iter(f"{KML}Style")} >= {*styles, "#track", "#place"}
    assert frames[1].findtext(f"{KML}TimeStamp/{KML}when") == "1970-01-01T00:01:41.000Z"
    for number, mark in enumerate(frames):
        order = [part.tag.removeprefix(KML) for part in mark]  # as the schema has it
        assert order == ["name", "TimeStamp", "styleUrl", "ExtendedData", "Point"][: 4 if number == 5 else 5]
        data = {d.get("name"): d.findtext(f"{KML}value") for d in mark.iter(f"{KML}Data")}
        assert data["id"] == f"place {number}"
        assert data["distance"] == "0"
        if number != 5:
            lon, lat = map(float, (mark.findtext(f"{KML}Point/{KML}coordinates") or "").split(","))
            assert (lon, lat) == pytest.approx((LONGITUDE[number], LATITUDE[number]), abs=2e-8)
    (track,) = folders["tracks"].findall(f"{KML}Placemark")
    points = (track.findtext(f"{KML}LineString/{KML}coordinates") or "").split()
    assert points == [frames[number].findtext(f"{KML}Point/{KML}coordinates") for number in (0, 2, 3, 4)]
    places = folders["places"].findall(f"{KML}Placemark")
    assert len(places) == N
    assert places[0].find(f"{KML}TimeStamp") is None
    assert places[1].findtext(f"{KML}TimeStamp/{KML}when") == "2023-11-14T22:13:20.000Z"
    assert b"http" not in (tmp_path / "a.kml").read_bytes().replace(b"http://www.opengis.net/kml/2.2", b"")


@pytest.mark.parametrize("time", [None, 1e300, -1e13, float(2**40)])
def test_times_that_no_calendar_has_are_left_out(tmp_path: Path, oxford: PlaceMap, time: float | None) -> None:
    result = results_of(oxford, [True])[0]
    write_kml(tmp_path / "a.kml", [replace(result, answer=replace(result.answer, time=time))], oxford)
    root = ElementTree.parse(tmp_path / "a.kml").getroot()
    assert root.find(f".//{KML}TimeStamp") is None
    assert root.find(f".//{KML}Point") is not None


def test_an_empty_kml(tmp_path: Path, oxford: PlaceMap) -> None:
    write_kml(tmp_path / "a.kml", [], oxford)
    assert ElementTree.parse(tmp_path / "a.kml").getroot().find(f".//{KML}Folder") is None


# --- both ---


@pytest.mark.parametrize("write", [write_geojson, write_kml])
def test_local_metres_are_refused(tmp_path: Path, write: Any) -> None:
    (tmp_path / "a").write_text("the old file")
    with new_map(tmp_path / "hall", CoordinateFrame(), [(i, 0) for i in range(N)]) as hall:
        results = results_of(hall, [True])
        with pytest.raises(MapError) as caught:
            write(tmp_path / "a", results, hall)
    for word in (str(tmp_path / "a"), "latitude and longitude", "'local'", "HTML", "UTM"):
        assert word in str(caught.value)
    assert (tmp_path / "a").read_text() == "the old file"


@pytest.mark.parametrize("write", [write_geojson, write_kml])
def test_files_are_written_whole_or_not_at_all(tmp_path: Path, oxford: PlaceMap, write: Any) -> None:
    with pytest.raises(TetraError, match="does not exist"):
        write(tmp_path / "none" / "a", [], oxford)
    out = tmp_path / "out"
    out.mkdir()
    write(out / "a", results_of(oxford, [True]), oxford)
    before = (out / "a").read_bytes()
    write(out / "a", results_of(oxford, [True]), oxford)
    assert (out / "a").read_bytes() == before
    broken = replace(results_of(oxford, [True])[0].answer, position=(math.inf, 0.0))
    with pytest.raises(TetraError):
        write(out / "a", [FrameResult("a", broken)], oxford)
    assert (out / "a").read_bytes() == before
    assert [path.name for path in out.iterdir()] == ["a"]


# --- time and memory ----------------------------------------------------------------------------------------


def test_latency_table_has_the_percentiles_of_each_step() -> None:
    rng = np.random.default_rng(1)
    timings = [Timings(*values) for values in rng.exponential(10, (200, 5)).tolist()]
    table = latency_table(timings)
    assert list(table) == ["decode", "preprocess", "network", "search", "decide", "total"]
    for step, row in table.items():
        values = sorted(getattr(each, f"{step}_ms") for each in timings)
        for percent in (50, 95, 99):
            at = percent / 100 * (len(values) - 1)
            low = values[int(at)]
            wanted = low + (at - int(at)) * (values[min(int(at) + 1, 199)] - low)
            assert row[f"p{percent}_ms"] == pytest.approx(wanted, abs=1e-3)
    json.dumps(table, allow_nan=False)
    assert latency_table([Timings(network_ms=3.0)])["total"] == {"p50_ms": 3.0, "p95_ms": 3.0, "p99_ms": 3.0}
    assert latency_table([]) == {}


def test_decoding_before_the_push_is_counted(oxford: PlaceMap) -> None:
    answer: Answer = results_of(oxford, [True])[0].answer
    counted = with_decode_ms(answer, 7.5)
    assert counted == answer
    assert counted.timings.decode_ms == 7.5
    assert counted.timings.total_ms == pytest.approx(answer.timings.total_ms + 7.5)


def test_peak_memory_is_in_bytes_and_stays_at_the_top() -> None:
    others = bytearray(b"x") * (400 << 20)  # on Linux a process may count the memory of the one that started it
    code = """
from tetra.map_outputs import peak_memory_bytes
before = peak_memory_bytes()
held = bytearray(b"x") * (300 << 20)
during = peak_memory_bytes()
del held
print(before, during, peak_memory_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    del others
    before, during, after = map(int, done.stdout.split())
    assert 20 << 20 < before < 4 << 30
    assert during - before > 250 << 20
    assert after > during - (1 << 20)  # Linux counts pages in bundles
