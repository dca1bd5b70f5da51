"""EXIF as cameras write it, and as it must not be: the tags are written by Pillow and read back."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import GPS, IFD, Base
from PIL.TiffImagePlugin import IFDRational

from tetra.errors import ImageError
from tetra.exif import exif_heading, exif_position, exif_time

OXFORD = {
    GPS.GPSLatitudeRef: "N",
    GPS.GPSLatitude: (IFDRational(51), IFDRational(45), IFDRational(2952, 100)),
    GPS.GPSLongitudeRef: "W",
    GPS.GPSLongitude: (IFDRational(1), IFDRational(15), IFDRational(3096, 100)),
}
NOWHERE = IFDRational(0, 0)


def picture(path: Path, gps: dict[Any, Any] | None = None, times: dict[Any, Any] | None = None) -> Path:
    made = Image.Exif()
    for part, tags in ((IFD.GPSInfo, gps), (IFD.Exif, times)):
        if tags:
            made[part] = tags
    exif = Image.Exif()
    exif.load(made.tobytes())  # or TIFF files would lack them
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_a_position_is_read_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    position = exif_position(picture(tmp_path / name, OXFORD))
    assert position == pytest.approx((51 + 45 / 60 + 29.52 / 3600, -(1 + 15 / 60 + 30.96 / 3600)), abs=1e-12)


@pytest.mark.parametrize(("ns", "north"), [("N", 1), ("S", -1), ("s", -1), (b"N", 1)])
@pytest.mark.parametrize(("ew", "east"), [("E", 1), ("W", -1)])
def test_the_letters_give_the_signs(tmp_path: Path, ns: str, north: int, ew: str, east: int) -> None:
    gps = {**OXFORD, GPS.GPSLatitudeRef: ns, GPS.GPSLongitudeRef: ew}
    latitude, longitude = exif_position(picture(tmp_path / "a.jpg", gps)) or (0, 0)
    assert latitude * north > 51
    assert longitude * east > 1


@given(micro_latitude=st.integers(-90_000_000, 90_000_000), micro_longitude=st.integers(-180_000_000, 180_000_000))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_degrees_as_fractions_come_back(tmp_path: Path, micro_latitude: int, micro_longitude: int) -> None:
    gps = {
        GPS.GPSLatitudeRef: "N" if micro_latitude >= 0 else "S",
        GPS.GPSLatitude: (IFDRational(abs(micro_latitude), 10**6), IFDRational(0), IFDRational(0)),
        GPS.GPSLongitudeRef: "E" if micro_longitude >= 0 else "W",
        GPS.GPSLongitude: (IFDRational(abs(micro_longitude), 10**6), IFDRational(0), IFDRational(0)),
    }
    found = exif_position(picture(tmp_path / "a.jpg", gps))
    assert found == pytest.approx((micro_latitude / 1e6, micro_longitude / 1e6), abs=1e-12)


@pytest.mark.parametrize(
    "gps",
    [
        {},
        {GPS.GPSImgDirection: IFDRational(5)},
        {**OXFORD, GPS.GPSStatus: "V"},
        {**OXFORD, GPS.GPSLatitude: (NOWHERE,) * 3, GPS.GPSLongitude: (NOWHERE,) * 3},
    ],
    ids=["no tags", "heading only", "void", "zero over zero"],
)
def test_a_camera_without_a_fix_has_no_position(tmp_path: Path, gps: dict[Any, Any]) -> None:
    assert exif_position(picture(tmp_path / "a.jpg", gps)) is None


def test_unknown_seconds_count_as_none(tmp_path: Path) -> None:
    gps = {**OXFORD, GPS.GPSLatitude: (IFDRational(51), IFDRational(4550, 100), NOWHERE)}
    latitude, _ = exif_position(picture(tmp_path / "a.jpg", gps)) or (0, 0)
    assert latitude == pytest.approx(51 + 45.5 / 60)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({GPS.GPSLatitude: (IFDRational(91), IFDRational(0), IFDRational(0))}, "GPSLatitude 91 is more than 90"),
        (
            {GPS.GPSLongitude: (IFDRational(180), IFDRational(1), IFDRational(0))},
            "GPSLongitude 180.017 is more than 180",
        ),
        ({GPS.GPSLatitude: (IFDRational(51), IFDRational(61), IFDRational(0))}, "GPSLatitude 51.0 61.0"),
        ({GPS.GPSLatitude: (NOWHERE, IFDRational(1), IFDRational(0))}, "no angle"),
        ({GPS.GPSLatitudeRef: None}, "GPSLatitudeRef is missing"),
        ({GPS.GPSLongitudeRef: None}, "GPSLongitudeRef is missing"),
        ({GPS.GPSLongitudeRef: "Q"}, "'Q', not one of E, W"),
        ({GPS.GPSLatitude: None}, "a longitude but no latitude"),
        ({GPS.GPSLongitude: (NOWHERE,) * 3}, "a latitude but no longitude"),
    ],
)
def test_a_position_that_cannot_be_is_refused(tmp_path: Path, change: dict[Any, Any], words: str) -> None:
    gps = {tag: value for tag, value in {**OXFORD, **change}.items() if value is not None}
    with pytest.raises(ImageError) as caught:
        exif_position(picture(tmp_path / "a.jpg", gps))
    assert words in str(caught.value)
    assert str(tmp_path / "a.jpg") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("value", "heading"), [(0, 0.0), (12.5, 12.5), (360, 0.0), (359.99, 359.99)])
def test_headings(tmp_path: Path, value: float, heading: float) -> None:
    path = picture(
        tmp_path / "a.jpg", {GPS.GPSImgDirectionRef: "T", GPS.GPSImgDirection: IFDRational(value * 100, 100)}
    )
    assert exif_heading(path) == pytest.approx(heading)


def test_headings_that_are_not_known_or_cannot_be(tmp_path: Path) -> None:
    assert exif_heading(picture(tmp_path / "a.jpg", OXFORD)) is None
    assert exif_heading(picture(tmp_path / "a.jpg", {GPS.GPSImgDirection: NOWHERE})) is None
    with pytest.raises(ImageError, match=r"a\.jpg: EXIF GPSImgDirection 361 .* 0 and 360"):
        exif_heading(picture(tmp_path / "a.jpg", {GPS.GPSImgDirection: IFDRational(361)}))


@pytest.mark.parametrize(
    ("fraction", "offset", "expected"),
    [
        (None, None, datetime(2024, 2, 29, 23, 59, 58, tzinfo=timezone.utc)),
        ("25", None, datetime(2024, 2, 29, 23, 59, 58, 250_000, tzinfo=timezone.utc)),
        ("250 ", "+02:00", datetime(2024, 2, 29, 23, 59, 58, 250_000, tzinfo=timezone(timedelta(hours=2)))),
        ("", "-05:30", datetime(2024, 2, 29, 23, 59, 58, tzinfo=timezone(-timedelta(hours=5, minutes=30)))),
        ("x", "  :  ", datetime(2024, 2, 29, 23, 59, 58, tzinfo=timezone.utc)),
    ],
)
def test_times(tmp_path: Path, fraction: str | None, offset: str | None, expected: datetime) -> None:
    tags = {
        Base.DateTimeOriginal: "2024:02:29 23:59:58",
        Base.SubsecTimeOriginal: fraction,
        Base.OffsetTimeOriginal: offset,
    }
    path = picture(tmp_path / "a.jpg", times={tag: text for tag, text in tags.items() if text is not None})
    assert exif_time(path) == expected.timestamp()


@pytest.mark.parametrize("text", ["0000:00:00 00:00:00", "    :  :     :  :  ", "yesterday", "2024:02:30 00:00:00", ""])
def test_a_time_that_is_none(tmp_path: Path, text: str) -> None:
    assert exif_time(picture(tmp_path / "a.jpg", times={Base.DateTimeOriginal: text})) is None


def test_files_without_exif_and_files_that_are_none(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.jpg")
    for read in (exif_position, exif_heading, exif_time):
        assert read(tmp_path / "plain.jpg") is None
    (tmp_path / "text.jpg").write_text("no picture")
    for name, words in (("text.jpg", "can't be read"), ("none.jpg", "No such file")):
        assert exif_time(tmp_path / name) is None
        with pytest.raises(ImageError, match=words):
            exif_position(tmp_path / name)


def test_damaged_blocks_never_raise_anything_else(tmp_path: Path) -> None:
    whole = picture(tmp_path / "a.jpg", {**OXFORD, GPS.GPSImgDirection: IFDRational(5)}).read_bytes()
    start, end = whole.index(b"Exif"), whole.index(b"\xff\xdb")
    errors = []
    for at in range(start, end):
        damaged = bytearray(whole)
        damaged[at] ^= 0xA5
        (tmp_path / "b.jpg").write_bytes(damaged)
        assert exif_time(tmp_path / "b.jpg") is None
        for read in (exif_position, exif_heading):
            try:
                read(tmp_path / "b.jpg")
            except ImageError as error:
                errors.append(str(error))
    assert len(errors) > 10
    assert not any("\n" in message for message in errors)
