"""When and where a picture was taken, as its camera wrote it into the file (Exif 2.32, CIPA DC-008).

What a camera leaves open is None: no such tag, blanks, a receiver without a fix (status "V", or values over zero).
What contradicts itself is refused rather than guessed at, because a wrong place in a map is worse than a missing one: a
latitude without N or S, degrees out of range, half a position, a block that can't be parsed.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image

from tetra.errors import ImageError

_FIX = "correct the tag or remove it"


def exif_position(path: str | Path) -> tuple[float, float] | None:
    """(latitude, longitude) of an image file in degrees, WGS84, north and east positive; None if there is none.

    Raises :class:`~tetra.errors.ImageError` for a file that can't be read and for a position that cannot be.
    """
    gps = _read(path, ExifTags.IFD.GPSInfo)
    if _text(gps.get(ExifTags.GPS.GPSStatus)) == "V":
        return None
    latitude = _degrees(path, gps, ExifTags.GPS.GPSLatitude, ExifTags.GPS.GPSLatitudeRef, "NS", 90.0)
    longitude = _degrees(path, gps, ExifTags.GPS.GPSLongitude, ExifTags.GPS.GPSLongitudeRef, "EW", 180.0)
    if latitude is None and longitude is None:
        return None
    if latitude is None or longitude is None:
        known, unknown = ("longitude", "latitude") if latitude is None else ("latitude", "longitude")
        raise ImageError(f"{path}: EXIF has a {known} but no {unknown}; add it or remove both")
    return latitude, longitude


def exif_heading(path: str | Path) -> float | None:
    """Where the camera of an image file looked, in degrees clockwise from north, 0 <= heading < 360; None if not known.

    North is the true or the magnetic one, whichever the camera took (tag GPSImgDirectionRef): nothing is corrected.

    Raises :class:`~tetra.errors.ImageError` for a file that can't be read and for a heading out of range.
    """
    value = _read(path, ExifTags.IFD.GPSInfo).get(ExifTags.GPS.GPSImgDirection)
    heading = _number(value)
    if heading is None:
        return None
    if not 0 <= heading <= 360:
        raise ImageError(f"{path}: EXIF GPSImgDirection {heading:g} is not between 0 and 360 degrees; {_FIX}")
    return heading % 360


def exif_time(file: str | Path | BinaryIO) -> float | None:
    """When a picture was taken, in seconds since 1970 (UTC): DateTimeOriginal with its fraction and offset.

    A camera that writes no offset is taken to show UTC: differences are right, the hour may not be. None where there is
    no such time or it can't be read; a time is never worth refusing a picture.
    """
    try:
        tags = _read(file, ExifTags.IFD.Exif)
    except ImageError:
        return None
    found = re.fullmatch(
        r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)", _text(tags.get(ExifTags.Base.DateTimeOriginal))
    )
    if not found:
        return None
    try:
        when = datetime(*(int(part) for part in found.groups()), tzinfo=timezone.utc)  # type: ignore[arg-type, misc]
    except ValueError:  # such as 0000:00:00
        return None
    fraction = _text(tags.get(ExifTags.Base.SubsecTimeOriginal))
    seconds = float(f"0.{fraction}") if re.fullmatch(r"[0-9]+", fraction) else 0.0
    offset = re.fullmatch(r"([+-])(\d\d):(\d\d)", _text(tags.get(ExifTags.Base.OffsetTimeOriginal)))
    ahead = timedelta(hours=int(offset[2]), minutes=int(offset[3])) if offset else timedelta()
    local = (when - datetime(1970, 1, 1, tzinfo=timezone.utc)).total_seconds()
    return local - (-1 if offset and offset[1] == "-" else 1) * ahead.total_seconds() + seconds


def _read(file: str | Path | BinaryIO, part: ExifTags.IFD) -> Mapping[int, Any]:
    """The tags of one part of the EXIF block; none if the file has no such part."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a block that is damaged in parts; the rest counts
            with Image.open(file) as image:
                return dict(image.getexif().get_ifd(part))
    except MemoryError:
        raise
    except Exception as error:  # a damaged block can make a parser raise almost anything
        name = file if isinstance(file, (str, Path)) else "the image"
        if isinstance(error, OSError) and error.strerror:
            raise ImageError(f"{name}: can't be read: {error.strerror}; check the path and its permissions") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: the EXIF data can't be read ({reason}); replace the file or remove them") from None


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    return value.strip("\0 ") if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    """None for what is no number and for a fraction over zero."""
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) else None


def _degrees(
    path: str | Path, gps: Mapping[int, Any], tag: ExifTags.GPS, ref_tag: ExifTags.GPS, letters: str, limit: float
) -> float | None:
    value = gps.get(tag)
    if value is None:
        return None
    parts = [_number(part) for part in (value if isinstance(value, tuple) else (value,))]
    if all(part is None for part in parts):  # 0/0: no fix
        return None
    numbers = [part or 0.0 for part in parts]  # who writes fractions of minutes may leave seconds unknown, 0/0
    if parts[0] is None or len(parts) > 3 or min(numbers) < 0 or max([0.0, *numbers[1:]]) > 60:
        raise ImageError(f"{path}: EXIF {tag.name} {_shown(value)} is no angle in degrees, minutes, seconds; {_FIX}")
    degrees = sum(number / 60**power for power, number in enumerate(numbers))
    if degrees > limit:
        raise ImageError(f"{path}: EXIF {tag.name} {degrees:g} is more than {limit:g} degrees; {_FIX}")
    letter = _text(gps.get(ref_tag)).upper()
    if letter not in tuple(letters):
        found = repr(letter) if letter else "missing"
        raise ImageError(f"{path}: EXIF {ref_tag.name} is {found}, not one of {', '.join(letters)}; {_FIX}")
    return degrees if letter == letters[0] else -degrees


def _shown(value: Any) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    return " ".join(str(part)[:20] for part in parts[:4])
