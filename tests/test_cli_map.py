"""``tetra map`` and ``tetra localize`` as scripts see them."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Runner, assert_refused, photo, read_json
from PIL import Image

from tetra.cli_map import _answers
from tetra.coordinates import CoordinateFrame
from tetra.files import load
from tetra.frames import Frame
from tetra.localizer import Localizer
from tetra.place_map import PlaceMap


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    """12 places, 40 m apart, in UTM zone 32."""
    for i in range(12):
        photo(tmp_path / f"drive/@{500000 + 40 * i}@5400000@32@U@.png", i)
    return tmp_path / "drive"


@pytest.fixture
def place_map(tetra: Runner, model_file: Path, drive: Path, tmp_path: Path) -> Path:
    result = tetra("map", "build", model_file, drive, "-o", tmp_path / "map")
    assert result.status == 0, result.err
    assert "12 places added, 12 in all" in result.out
    return tmp_path / "map"


@pytest.fixture
def calibration(place_map: Path, tmp_path: Path) -> Path:
    """Accepts single frames that are far nearer to one place than to all others."""
    with PlaceMap.open(place_map, read_only=True) as opened:
        common = {"model_hash": opened.model_hash, "code_bytes": opened.code_bytes}
    learnt = {"threshold": 0.5, "target_precision": 0.95, "confidence": 0.8, "precision": 1.0, "lower_bound": 0.96}
    counts = {"share_accepted": 0.5, "n_answers": 100, "n_right": 90, "quantity": "ratio", "of_sequences": False}
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"frame": {**learnt, **counts, **common}}))
    return path


def test_a_map_says_what_it_holds(tetra: Runner, place_map: Path, model_file: Path, tmp_path: Path) -> None:
    result = tetra("map", "info", place_map, "--verify", "--json", tmp_path / "info.json")
    assert "12, 12 with a position (utm 32 north)" in result.out
    assert "500000.00 to 500440.00" in result.out
    found = read_json(tmp_path / "info.json")
    assert (found["places"], found["frame"], found["calibration"]) == (12, "utm 32 north", None)
    assert found["verified_bytes"] > 0
    assert_refused(tetra("map", "build", model_file, tmp_path / "drive", "-o", place_map), place_map, "exists already")
    assert_refused(tetra("map", "info", tmp_path / "nowhere"), "nowhere")


def test_places_are_added_and_maps_merged(
    tetra: Runner, place_map: Path, model_file: Path, drive: Path, tmp_path: Path
) -> None:
    assert_refused(tetra("map", "add", model_file, place_map, drive), "already", "prefix")
    assert tetra("map", "add", model_file, place_map, drive, "--prefix", "again/").status == 0
    photo(tmp_path / "other/@500900@5400000@32@U@.png", 77)
    assert tetra("map", "build", model_file, tmp_path / "other", "-o", tmp_path / "map2").status == 0
    assert "1 places of" in tetra("map", "merge", place_map, tmp_path / "map2").out
    with PlaceMap.open(place_map, read_only=True) as opened:
        assert len(opened) == 25
        assert opened.row("again/@500000@5400000@32@U@.png") == 12
    assert_refused(tetra("map", "merge", place_map, tmp_path / "map2"), "@500900")
    assert_refused(tetra("map", "merge", place_map, place_map), "is the map that is merged into")


def test_frames_are_localised(
    tetra: Runner, place_map: Path, model_file: Path, drive: Path, calibration: Path, tmp_path: Path
) -> None:
    photo(tmp_path / "frames/known.png", 3)
    photo(tmp_path / "frames/unknown.png", 99)
    out = tmp_path / "out.json"
    files = {name: tmp_path / name for name in ("a.geojson", "a.kml", "a.html")}
    options = [o for name, path in files.items() for o in (f"--{name.partition('.')[2]}", path)]
    result = tetra("localize", model_file, place_map, tmp_path / "frames", "--k", 3, "--json", out, *options)
    assert result.status == 0, result.err
    assert "not calibrated for single frames" in result.err
    assert [record["accepted"] for record in read_json(out)] == [None, None]

    assert tetra("map", "calibrate", place_map, calibration).status == 0
    strips = tmp_path / "strips"
    result = tetra(
        "localize", model_file, place_map, tmp_path / "frames", "--k", 3, "--json", out, *options, "--strips", strips
    )
    known, unknown = read_json(out)
    assert known["file"] == str(tmp_path / "frames/known.png")
    assert known["accepted"] is True
    assert known["matches"][0] == {
        "id": "@500120@5400000@32@U@.png", "distance": 0, "position": [500120.0, 5400000.0]
    }  # fmt: skip
    assert len(known["matches"]) == 3
    assert known["position"] == pytest.approx([500120.0, 5400000.0])
    assert known["spread_m"] > 0
    assert unknown["accepted"] is False
    assert {"decode", "preprocess", "network", "search", "total"} <= set(known["timings_ms"])
    assert "2 frames, 1 accepted; peak memory" in result.err
    for word in ("decode", "network", "search", "p50", "p95", "p99"):
        assert word in result.err
    assert "known.png: accepted @500120" in result.out
    assert len(list(strips.iterdir())) == 2
    points = [f for f in read_json(files["a.geojson"])["features"] if f["geometry"]["type"] == "Point"]
    assert len(points) == 2
    assert b"<kml" in files["a.kml"].read_bytes()
    assert b"known.png" in files["a.html"].read_bytes()


def test_frames_from_a_pipe_give_a_line_each(place_map: Path, model_file: Path, drive: Path, tmp_path: Path) -> None:
    data = b"".join(path.read_bytes() for path in sorted(drive.iterdir()))
    command = [sys.executable, "-m", "tetra.cli", "localize", str(model_file), str(place_map), "-", "--json", "-"]
    done = subprocess.run(command, input=data, capture_output=True, timeout=120, check=True)
    records = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [record["file"] for record in records] == [f"stdin#{i:06d}" for i in range(12)]
    assert [record["matches"][0]["id"] for record in records] == [path.name for path in sorted(drive.iterdir())]


def test_lines_are_written_to_a_file_that_ends_so(
    tetra: Runner, place_map: Path, model_file: Path, drive: Path
) -> None:
    out = drive.parent / "out.jsonl"
    assert tetra("localize", model_file, place_map, drive, "--sequence", "--json", out).status == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["file"] for record in records] == [str(path) for path in sorted(drive.iterdir())]
    assert [record["matches"][0]["distance"] for record in records] == [0] * 12


def matched(out: Path) -> list[list[str]]:
    return [[match["id"] for match in record["matches"]] for record in read_json(out)]


def test_only_places_that_are_asked_for(tetra: Runner, model_file: Path, drive: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "where.csv", tmp_path / "out.json"
    names = sorted(path.name for path in drive.iterdir())
    frame = CoordinateFrame.parse("utm 56 south")
    east, north = 333_500.0, 6_247_500.0
    lines = [
        "{},{:.9f},{:.9f},{}".format(name, *frame.to_latlon([east + 40 * i, north]), 30 * i)
        for i, name in enumerate(names)
    ]
    table.write_text("\n".join(["file,latitude,longitude,heading", *lines]))
    place_map = tmp_path / "map"
    assert tetra("map", "build", model_file, drive, "-o", place_map, "--positions", table).status == 0
    command = ("localize", model_file, place_map, drive / names[9], "--json", out, "--k", 12)
    latitude, longitude = frame.to_latlon([east, north])
    for point in (f"{east},{north}", f"{latitude:.8f},{longitude:.8f}"):  # a latitude below zero is no option
        assert tetra(*command, "--near", point, "--within", 90).status == 0
        assert [sorted(ids) for ids in matched(out)] == [names[:3]]
    assert tetra(*command, "--heading", 345, "--heading-tolerance", 20).status == 0
    assert [sorted(ids) for ids in matched(out)] == [sorted([names[0], names[11]])]
    assert tetra(*command, "--near", f"{east},{north}", "--within", 90, "--heading", 30).status == 0
    assert [sorted(ids) for ids in matched(out)] == [names[:3]]
    assert tetra(*command, "--near", f"{east},{north}", "--within", 90, "--sequence").status == 0
    assert [sorted(ids) for ids in matched(out)] == [names[:3]]

    assert_refused(tetra(*command, "--near", "1,2"), "--near and --within go together")
    assert_refused(tetra(*command, "--within", 5), "--near and --within go together")
    assert_refused(tetra(*command, "--near", "here", "--within", 5), "--near here", "48.75,9.1")
    assert_refused(tetra(*command, "--near", "48.7,9.1", "--within", 5), "--near 48.7,9.1", "longitude 9.1")
    assert_refused(tetra(*command, "--near", "333,444", "--within", 5), "--near 333,444", "easting 333")
    assert_refused(tetra(*command, "--near", "nan,1", "--within", 5), "--near nan,1")
    assert_refused(tetra(*command, "--near", f"{east},{north}", "--within", -1), "--within -1")
    assert_refused(
        tetra(*command, "--near", f"{east},{north + 500}", "--within", 5), "none of the 12 places", "12 have a position"
    )
    assert_refused(tetra(*command, "--heading", 15, "--heading-tolerance", 2), "none of the 12 places", "12 a heading")
    assert_refused(tetra(*command, "--heading", 15, "--heading-tolerance", 200), "--heading-tolerance 200")


def test_matches_are_ranked_again_where_the_map_keeps_descriptors(
    tetra: Runner, place_map: Path, model_file: Path, drive: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    assert_refused(tetra("localize", model_file, place_map, drive, "--rerank"), place_map, "--keep-descriptors")
    kept = tmp_path / "kept"
    assert tetra("map", "build", model_file, drive, "-o", kept, "--keep-descriptors").status == 0
    photo(tmp_path / "frame.png", 99)
    for option in ((), ("--rerank",)):
        assert (
            tetra("localize", model_file, kept, tmp_path / "frame.png", "--json", out, "--k", 12, *option).status == 0
        )
        (record,) = read_json(out)
        if option:
            similarities = [match["similarity"] for match in record["matches"]]
            assert similarities == sorted(similarities, reverse=True)
            assert record["id"] == record["matches"][0]["id"]
        else:
            assert all("similarity" not in match for match in record["matches"])
    assert_refused(tetra("localize", model_file, kept, drive, "--rerank", "--sequence"), "--rerank", "--single")


def test_no_output_may_replace_a_file_of_the_map(tetra: Runner, place_map: Path, model_file: Path, drive: Path) -> None:
    before = {path.name: path.read_bytes() for path in place_map.iterdir()}
    for option, name in (("--json", "map.json"), ("--html", "a.html"), ("--kml", "a.kml"), ("--strips", "strips")):
        result = tetra("localize", model_file, place_map, drive, option, place_map / name)
        assert_refused(result, place_map / name, "lies in the map")
    assert_refused(tetra("map", "export", place_map, "-o", place_map / "map.json"), "lies in the map")
    assert before == {path.name: path.read_bytes() for path in place_map.iterdir()}


def test_what_came_before_the_end_of_a_stream_is_kept(place_map: Path, model_file: Path, drive: Path) -> None:
    data = b"".join(path.read_bytes() for path in sorted(drive.iterdir()))
    out, page = drive.parent / "out.json", drive.parent / "out.geojson"
    command = [sys.executable, "-m", "tetra.cli", "localize", str(model_file), str(place_map), "-", "--json", str(out)]
    done = subprocess.run([*command, "--geojson", str(page)], input=data[:-5], capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error: stdin#000011: is cut off")
    assert done.stderr.count(b"\n") == 1
    assert [record["file"] for record in read_json(out)] == [f"stdin#{i:06d}" for i in range(11)]
    assert len([f for f in read_json(page)["features"] if f["properties"]["kind"] == "frame"]) == 11
    out.unlink()
    # Where the tests run in the background Ctrl-C is ignored, and would be in what they start.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, preexec_fn=heed) as live:
        assert live.stdin is not None
        assert live.stdout is not None
        live.stdin.write(data)
        live.stdin.flush()
        for _ in range(12):
            assert b"stdin#" in live.stdout.readline()
        live.send_signal(signal.SIGINT)  # how a live camera ends
        assert live.wait(60) == 130
    assert len(read_json(out)) == 12


def test_a_folder_with_a_broken_image_gives_no_part_of_a_list(
    tetra: Runner, place_map: Path, model_file: Path, drive: Path, tmp_path: Path
) -> None:
    (drive / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out.json"
    assert_refused(tetra("localize", model_file, place_map, drive, "--json", out), "broken.png")
    assert not out.exists()
    assert tetra("localize", model_file, place_map, drive, "--json", out, "--skip-bad-images").status == 0
    assert len(read_json(out)) == 12


def test_a_full_disk_under_lines_of_json_is_named(
    place_map: Path, model_file: Path, drive: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)); from tetra.cli import main; main()"
    )
    command = [
        sys.executable,
        "-c",
        limited,
        "localize",
        str(model_file),
        str(place_map),
        str(drive),
        "--json",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"error: {out}: can't be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_video_whose_clock_goes_back_begins_a_new_sequence(place_map: Path, drive: Path, model_file: Path) -> None:
    pixels = [np.array(Image.open(path)) for path in sorted(drive.iterdir())]
    times = [0.0, 0.1, 0.2, 0.05, 0.15, 7.0]
    frames = [Frame(f"v#{i}", pixels[i], time, 0.0, 0, None) for i, time in enumerate(times)]
    frames.append(Frame("w#0", pixels[6], 0.0, 0.0, 1, None))  # another video, whose clock is its own
    with PlaceMap.open(place_map, read_only=True) as opened:
        localizer, notices = Localizer(load(model_file), opened), list[str]()
        answers = [answer for _, answer in _answers(frames, localizer, None, notices)]
        assert [answer.time for answer in answers] == [*times, 0.0]
        assert notices == ["v#3: time goes back from 0.2 to 0.05 s, so a new sequence begins"]
        localizer.reset()
        fresh = [localizer.push(pixels[3], 0.05), localizer.push(pixels[4], 0.15), localizer.push(pixels[5], 7.0)]
        assert [a.belief for a in answers[3:6]] == [a.belief for a in fresh]


@pytest.mark.parametrize("suffix", ["geojson", "kml", "html", "csv", "json"])
def test_maps_are_exported(tetra: Runner, place_map: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"places.{suffix}"
    assert f"{out}: 12 places" in tetra("map", "export", place_map, "-o", out).out
    assert out.stat().st_size > 100
    if suffix == "json":
        places: list[dict[str, Any]] = read_json(out)["places"]
        assert [place["x"] for place in places] == [500000.0 + 40 * i for i in range(12)]
        assert places[0]["latitude"] == pytest.approx(48.75, abs=0.01)


def test_an_exported_table_builds_the_same_map(
    tetra: Runner, place_map: Path, model_file: Path, drive: Path, tmp_path: Path
) -> None:
    table = tmp_path / "places.csv"
    assert tetra("map", "export", place_map, "-o", table).status == 0
    assert len(list(csv.DictReader(table.open()))) == 12
    again = tmp_path / "again"
    assert tetra("map", "build", model_file, drive, "-o", again, "--positions", table).status == 0
    with PlaceMap.open(place_map, read_only=True) as a, PlaceMap.open(again, read_only=True) as b:
        assert a.frame == b.frame
        assert abs(a.positions(a.rows()) - b.positions(b.rows())).max() < 1e-6


def test_bad_input_is_one_line(
    tetra: Runner, place_map: Path, model_file: Path, drive: Path, calibration: Path, tmp_path: Path
) -> None:
    assert_refused(tetra("map", "export", place_map, "-o", tmp_path / "places.shp"), "places.shp", ".geojson")
    assert_refused(tetra("localize", "nano", place_map, drive), "holds codes of the model")
    assert_refused(tetra("localize", model_file, place_map, tmp_path / "none.png"), "none.png")
    assert_refused(tetra("localize", model_file, drive, drive), drive)
    (tmp_path / "bad.json").write_text("{}")
    assert_refused(
        tetra("map", "calibrate", place_map, tmp_path / "bad.json"), "bad.json", "tetra evaluate --calibrate"
    )
    (tmp_path / "bad.json").write_text("no json")
    assert_refused(tetra("map", "calibrate", place_map, tmp_path / "bad.json"), "is not JSON")
    assert_refused(tetra("map", "calibrate", place_map, tmp_path / "none.json"), "none.json: can't be read")
    wrong = json.loads(calibration.read_text())
    wrong["frame"]["model_hash"] = "0" * 64
    (tmp_path / "bad.json").write_text(json.dumps(wrong))
    assert_refused(tetra("map", "calibrate", place_map, tmp_path / "bad.json"), "calibrate again")
    assert_refused(tetra("evaluate", model_file, "--dataset", drive, "--calibrate", tmp_path / "c.json"), "--sequence")
    photo(tmp_path / "local/a.png", 1)
    assert tetra("map", "build", model_file, tmp_path / "local", "-o", tmp_path / "local-map").status == 0
    command = ("localize", model_file, tmp_path / "local-map", tmp_path / "local", "--kml", tmp_path / "a.kml")
    assert_refused(tetra(*command), "a.kml", "local")


def test_sequences_are_evaluated_and_teach_what_to_accept(
    tetra: Runner, model_file: Path, drive: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    drive.rename(data / "database")
    for i in range(12):
        photo(data / f"queries/@{500003 + 40 * i}@5400000@32@U@.png", i)
    out, learnt = tmp_path / "report.json", tmp_path / "learnt.json"
    command = ("evaluate", model_file, "--dataset", data, "--sequence", "--json", out)
    result = tetra(*command, "--calibrate", learnt, "--precision", 0.6)
    assert result.status == 0, result.err
    assert "12 queries, 12 references, in order" in result.out
    assert read_json(out)["recall"]["frame"] == 100.0
    assert set(read_json(learnt)) <= {"frame", "sequence"}
    judged = tetra(*command, "--calibration", learnt)
    assert judged.status == 0, judged.err
    assert "accepted" in judged.out
    refused = tetra("evaluate", "nano", "--dataset", data, "--sequence", "--calibration", learnt)
    assert_refused(refused, "calibrate again")
    never = tetra(*command, "--calibrate", tmp_path / "never.json", "--precision", 1.0)
    assert never.status == 2
    assert "never.json: not written" in never.err
    assert not (tmp_path / "never.json").exists()
