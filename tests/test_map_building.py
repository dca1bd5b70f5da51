from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from commands import photo
from PIL import ExifTags, Image

from tetra.coordinates import CoordinateFrame
from tetra.errors import DatasetError, ImageError, MapError
from tetra.files import load
from tetra.map_building import add_folder, build_map, read_poses
from tetra.model import TetraModel
from tetra.place_map import PlaceMap


@pytest.fixture
def model(model_file: Path) -> TetraModel:
    return load(model_file)


def with_gps(path: Path, latitude: float, longitude: float, heading: float | None = None) -> None:
    photo(path, 1)
    image = Image.open(path).convert("RGB")
    exif = Image.Exif()
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    for value, tag, ref, letters in (
        (latitude, ExifTags.GPS.GPSLatitude, ExifTags.GPS.GPSLatitudeRef, "NS"),
        (longitude, ExifTags.GPS.GPSLongitude, ExifTags.GPS.GPSLongitudeRef, "EW"),
    ):
        degrees = int(abs(value))
        minutes, seconds = divmod((abs(value) - degrees) * 3600, 60)
        gps[tag] = (degrees, minutes, seconds)
        gps[ref] = letters[value < 0]
    if heading is not None:
        gps[ExifTags.GPS.GPSImgDirection] = heading
    image.save(path, exif=exif)


# --- poses ---


def test_names_give_positions_and_the_zone(tmp_path: Path) -> None:
    paths = [tmp_path / f"@{500000.5 + i}@4100000@10@S@@@@.jpg" for i in range(3)]
    poses = read_poses(tmp_path, paths)
    assert str(poses.frame) == "utm 10 north"
    assert poses.positions.tolist() == [[500000.5 + i, 4100000] for i in range(3)]
    assert (poses.source, poses.n_located) == ("names", 3)
    assert str(read_poses(tmp_path, [tmp_path / "@5@7@.jpg"]).frame) == "local"
    with pytest.raises(MapError, match=r"zone 11 north, but .* is in 10 north"):
        read_poses(tmp_path, [*paths, tmp_path / "@500000@4100000@11@S@.jpg"])
    with pytest.raises(MapError, match="zone 10 north, but the map is in 'utm 11 north'"):
        read_poses(tmp_path, paths, frame=CoordinateFrame.parse("utm 11 north"))
    with pytest.raises(MapError, match="does not say north or south"):
        read_poses(tmp_path, [tmp_path / "@500000@4100000@10@@.jpg"])
    with pytest.raises(DatasetError, match="does not give a position"):
        read_poses(tmp_path, [*paths, tmp_path / "plain.jpg"])


def test_exif_gives_positions_headings_and_nothing(tmp_path: Path) -> None:
    with_gps(tmp_path / "a.jpg", 48.2, 16.36, 90.0)
    photo(tmp_path / "b.jpg", 2)
    poses = read_poses(tmp_path, [tmp_path / "a.jpg", tmp_path / "b.jpg"])
    assert str(poses.frame) == "utm 33 north"
    assert np.allclose(poses.frame.to_latlon(poses.positions[0]), (48.2, 16.36), atol=1e-7)
    assert np.isnan(poses.positions[1]).all()
    assert poses.headings[0] == 90.0
    assert (poses.source, poses.n_located) == ("EXIF", 1)
    nothing = read_poses(tmp_path, [tmp_path / "b.jpg"])
    assert (str(nothing.frame), nothing.source, nothing.n_located) == ("local", "nowhere", 0)
    with_gps(tmp_path / "c.jpg", 48.2, 20.0)
    with pytest.raises(MapError, match="zone"):
        read_poses(tmp_path, [tmp_path / "a.jpg", tmp_path / "c.jpg"])
    beside = read_poses(tmp_path, [tmp_path / "a.jpg", tmp_path / "c.jpg"], frame=CoordinateFrame.parse("utm 33 north"))
    assert beside.n_located == 2
    (tmp_path / "d.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"d\.jpg"):
        read_poses(tmp_path, [tmp_path / "d.jpg"])


@pytest.mark.parametrize(
    ("text", "frame", "positions"),
    [
        ("file,x,y\na/1.jpg,1.5,-2\nb.jpg,3,4\n", "local", [[1.5, -2], [3, 4]]),
        ("FILE, East ,north,zone\nb.jpg,500003,5400004,32 north\n", "utm 32 north", [[np.nan] * 2, [500003, 5400004]]),
        ("file,x,y,time,heading\r\nb.jpg,3,4,17.5,\r\nelsewhere.jpg,1,1,1,1\r\n", "local", [[np.nan] * 2, [3, 4]]),
        ("﻿file,x,y\nb.jpg,,\n", "local", [[np.nan] * 2, [np.nan] * 2]),
    ],
)
def test_a_table_gives_positions(tmp_path: Path, text: str, frame: str, positions: list[list[float]]) -> None:
    table = tmp_path / "where.csv"
    table.write_text(text)
    poses = read_poses(tmp_path, [tmp_path / "a/1.jpg", tmp_path / "b.jpg"], table)
    assert str(poses.frame) == frame
    assert np.array_equal(poses.positions, np.array(positions), equal_nan=True)
    assert poses.source == "where.csv"
    if "time" in text:
        assert poses.times[1] == 17.5
        assert np.isnan(poses.headings[1])


def test_degrees_in_a_table_are_converted(tmp_path: Path) -> None:
    table = tmp_path / "where.csv"
    table.write_text("file,latitude,longitude\nb.jpg,-33.9,151.2\n")
    poses = read_poses(tmp_path, [tmp_path / "b.jpg"], table)
    assert str(poses.frame) == "utm 56 south"
    assert np.allclose(poses.frame.to_latlon(poses.positions), [[-33.9, 151.2]], atol=1e-9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rows"),
        ("file,x,y\n", "no rows"),
        ("name,x,y\nb.jpg,1,2\n", "has to name file, and latitude,longitude or east,north or x,y"),
        ("file,x\nb.jpg,1\n", "has to name file"),
        ("file,x,y\nc.jpg,1,2\n", "names none of the 1 images"),
        ("file,x,y\nb.jpg,1,two\n", "line 2: y is 'two'"),
        ("file,x,y\nb.jpg,1,nan\n", "line 2: y is 'nan'"),
        ("file,x,y\nb.jpg,1,2\nb.jpg,1,2\n", "line 3: b.jpg stands in line 2 too"),
        ("file,x,y\nb.jpg,3,\n", "line 2: has one of x and y only"),
        ("file,x,y\nb.jpg,1,2\nc.jpg,3,4,5\n", "line 3: has more fields"),
        ("file,x,y,heading\nb.jpg,1,2,400\n", "line 2: heading is 400"),
        ("file,latitude,longitude\nb.jpg,95,3\n", r"where\.csv: line 2: latitude 95"),
        ("file,latitude,longitude\nb.jpg,48,8\na.jpg,-89.9,8\n", r"where\.csv: line 3: latitude -89\.9"),
        ("file,latitude,longitude\nb.jpg,48,11.9\na.jpg,48,12.1\n", "line 2 is in UTM zone 32.*line 3 in 33.*--frame"),
        ("file,latitude,longitude\na.jpg,-17,179.9\nb.jpg,-17,-179.9\n", "--frame, such as 'utm 1 south'"),
        ("file,latitude,longitude\na.jpg,-0.1,9\nb.jpg,0.1,9\n", r"several hemispheres.*--frame"),
        ("file,east,north,zone\nb.jpg,500000,1,61 north\n", r"where\.csv: .*zone 61"),
        ("file,east,north,zone\nb.jpg,5,5400000,32 north\n", "line 2: positions: easting 5 is not"),
    ],
)
def test_a_table_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    table = tmp_path / "where.csv"
    table.write_text(text)
    with pytest.raises((DatasetError, MapError), match=words):
        read_poses(
            tmp_path, [tmp_path / name for name in ("b.jpg", "a.jpg") if name in text] or [tmp_path / "b.jpg"], table
        )


def test_a_table_in_two_zones_that_is_missing_or_no_text(tmp_path: Path) -> None:
    table = tmp_path / "where.csv"
    table.write_text("file,east,north,zone\na.jpg,500000,1,32 north\nb.jpg,500000,1,33 north\n")
    with pytest.raises(MapError, match="zone 32 north in line 2, 33 north in line 3"):
        read_poses(tmp_path, [tmp_path / "a.jpg", tmp_path / "b.jpg"], table)
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="not UTF-8"):
        read_poses(tmp_path, [tmp_path / "a.jpg"], table)
    with pytest.raises(DatasetError, match=r"missing\.csv: can't be read"):
        read_poses(tmp_path, [tmp_path / "a.jpg"], tmp_path / "missing.csv")


# --- maps ---


def test_a_folder_becomes_a_map_in_the_order_of_its_names(model: TetraModel, tmp_path: Path) -> None:
    for i in (1, 2, 10):
        photo(tmp_path / f"drive/cam/@{i}@7@.jpg", i)
    report = build_map(model, tmp_path / "drive", tmp_path / "map", batch_size=2, keep_descriptors=True, progress=False)
    assert report.n_added == 3
    with PlaceMap.open(tmp_path / "map", model_hash=model.content_hash) as place_map:
        rows = place_map.rows()
        assert place_map.ids(rows) == ["cam/@1@7@.jpg", "cam/@2@7@.jpg", "cam/@10@7@.jpg"]
        assert place_map.positions(rows).tolist() == [[1, 7], [2, 7], [10, 7]]
        assert Image.open(io.BytesIO(place_map.thumbnails(rows)[1] or b"")).size == (40, 30)
        found = place_map.query(tmp_path / "drive/cam/@2@7@.jpg", model=model, shortlist=3)[0]
        assert (found.id, found.distance, found.position) == ("cam/@2@7@.jpg", 0, (2.0, 7.0))
        photo(tmp_path / "more/@3@7@.jpg", 3)
        with pytest.raises(MapError, match="already"):
            add_folder(model, place_map, tmp_path / "drive", progress=False)
        add_folder(model, place_map, tmp_path / "more", prefix="second/", thumbnails=False, progress=False)
        assert place_map.row("second/@3@7@.jpg") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drive", "map", "more", "tiny.safetensors"]


def test_nothing_is_left_of_a_map_that_was_not_finished(model: TetraModel, tmp_path: Path) -> None:
    photo(tmp_path / "drive/1.png", 1)
    (tmp_path / "drive/2.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"2\.png"):
        build_map(model, tmp_path / "drive", tmp_path / "map", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drive", "tiny.safetensors"]
    report = build_map(model, tmp_path / "drive", tmp_path / "map", skip_bad_images=True, progress=False)
    assert (report.n_added, len(report.skipped)) == (1, 1)
    with pytest.raises(MapError, match="exists already"):
        build_map(model, tmp_path / "drive", tmp_path / "map", progress=False)
    with pytest.raises(MapError, match=r"map: the folder .*nowhere' does not exist"):
        build_map(model, tmp_path / "drive", tmp_path / "nowhere/map", skip_bad_images=True, progress=False)


def test_a_folder_is_added_as_a_whole_or_not_at_all(model: TetraModel, tmp_path: Path) -> None:
    photo(tmp_path / "drive/1.png", 1)
    build_map(model, tmp_path / "drive", tmp_path / "map", progress=False)
    for i in range(3):
        photo(tmp_path / f"more/{i}.jpg", i)
    whole = (tmp_path / "more/2.jpg").read_bytes()
    (tmp_path / "more/2.jpg").write_bytes(whole[: len(whole) - 200])  # its header can be read, its pixels can't
    with PlaceMap.open(tmp_path / "map") as place_map:
        with pytest.raises(ImageError, match=r"2\.jpg"):
            add_folder(model, place_map, tmp_path / "more", prefix="m/", batch_size=1, progress=False)
        assert place_map.ids(place_map.rows()) == ["1.png"]
        (tmp_path / "more/2.jpg").write_bytes(whole)
        add_folder(model, place_map, tmp_path / "more", prefix="m/", batch_size=1, progress=False)
        assert place_map.ids(place_map.rows()) == ["1.png", "m/0.jpg", "m/1.jpg", "m/2.jpg"]


def test_models_that_cannot_make_a_map(model: TetraModel, tiny_model: TetraModel, tmp_path: Path) -> None:
    photo(tmp_path / "drive/1.png", 1)
    with pytest.raises(MapError, match="never saved"):
        build_map(tiny_model, tmp_path / "drive", tmp_path / "map", progress=False)
    build_map(model, tmp_path / "drive", tmp_path / "map", progress=False)
    with PlaceMap.open(tmp_path / "map") as place_map, pytest.raises(MapError, match="never saved, the map"):
        add_folder(tiny_model, place_map, tmp_path / "drive", prefix="b/", progress=False)
