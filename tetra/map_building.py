"""Place maps from folders of images: where each image was taken, and what the model makes of it.

Positions come from the first of these that there is:

=====================  ==============================================================================================
a table (CSV)          columns ``file`` (relative to the folder), and ``latitude, longitude`` or ``east, north`` with
                       ``zone`` ("32 north") or ``x, y`` in local metres; and ``heading`` (degrees), ``time`` (seconds)
names                  ``@UTM_east@UTM_north@zone@letter@...@.jpg``; without a zone: local metres
EXIF                   GPS position and direction, and the time
=====================  ==============================================================================================

An image without a position is a place that can be recognised, but not put on a map.
"""

from __future__ import annotations

import csv
import io
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tetra.coordinates import LOCAL, CoordinateFrame, utm_of, zone_of
from tetra.datasets import parse_utm_name
from tetra.errors import ConfigError, DatasetError, ImageError, MapError
from tetra.evaluation import describe_batches
from tetra.exif import exif_heading, exif_position, exif_time
from tetra.images import SkippedImage, list_images
from tetra.model import TetraModel
from tetra.picture_strips import thumbnail
from tetra.place_map import PlaceMap

FloatArray = npt.NDArray[np.float64]

_COORDINATES = (("latitude", "longitude"), ("east", "north"), ("x", "y"))


# --- poses --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Poses:
    """Where and when n images were taken; NaN for what is not known."""

    frame: CoordinateFrame
    positions: FloatArray
    """[n, 2], metres in ``frame``"""
    headings: FloatArray
    """[n], degrees clockwise from north"""
    times: FloatArray
    """[n], seconds"""
    source: str
    """what they come from, for people"""
    problems: tuple[str, ...] = ()
    """why images have no position, where that was asked to be no error"""

    @property
    def n_located(self) -> int:
        """Images with a position."""
        return int((~np.isnan(self.positions).any(axis=1)).sum())


def read_poses(
    folder: Path,
    paths: Sequence[Path],
    table: Path | None = None,
    frame: CoordinateFrame | None = None,
    *,
    skip_bad_images: bool = False,
) -> Poses:
    """Positions, headings and times of the images ``paths`` of ``folder``, see the module's table.

    Args:
        table: CSV file; None: names, or else EXIF.
        frame: what the map's positions mean; None: as the source says. Degrees are converted into it.
        skip_bad_images: an image whose EXIF cannot be has no position, and a line in ``problems``.

    Raises:
        DatasetError: a name or the table is damaged; the message names the line.
        MapError: positions are in several zones, or do not fit ``frame``.
        ImageError: EXIF that cannot be.
    """
    if table is not None:
        return _from_table(folder, paths, table, frame)
    if any(path.name.startswith("@") for path in paths):
        return _from_names(paths, frame)
    return _from_exif(paths, frame, skip_bad_images)


def _from_names(paths: Sequence[Path], frame: CoordinateFrame | None) -> Poses:
    named = [parse_utm_name(path) for path in paths]
    zones = {zone: path for (_, zone), path in zip(reversed(named), reversed(paths), strict=True)}
    if len(zones) > 1:
        (zone, path), (other, other_path) = list(zones.items())[:2]
        raise MapError(
            f"{path}: UTM zone {zone or 'not given'}, but {other_path.name} is in {other or 'none'}; "
            "a map has one zone, so make a map of each"
        )
    zone = next(iter(zones))
    if frame is None:
        frame = LOCAL if not zone else _utm(zone, str(paths[0]))
    elif zone and frame.kind == "utm" and _utm(zone, str(paths[0])) != frame:
        raise MapError(f"{paths[0]}: UTM zone {zone}, but the map is in '{frame}'; make another map of these")
    positions = np.array([position for position, _ in named], dtype=np.float64)
    _check_each(positions, map(str, paths), frame.check)
    nothing = np.full(len(paths), np.nan)
    return Poses(frame, positions, nothing, nothing, "names")


def _utm(zone: str, where: str) -> CoordinateFrame:
    """The frame of a zone such as "32 north"."""
    if not zone.endswith((" north", " south")):
        raise MapError(f"{where}: UTM zone {zone!r} does not say north or south; pass the frame, as 'utm 32 north'")
    try:
        return CoordinateFrame.parse(f"utm {zone}")
    except MapError as error:
        raise MapError(f"{where}: {error}") from None


def _from_exif(paths: Sequence[Path], frame: CoordinateFrame | None, skip_bad_images: bool) -> Poses:
    values, problems = np.full((len(paths), 4), np.nan), []
    for i, path in enumerate(paths):
        try:
            position, found = exif_position(path), (exif_heading(path), exif_time(path))
        except ImageError as error:
            if not skip_bad_images:
                raise
            problems.append(str(error))
            continue
        values[i] = [np.nan if value is None else value for value in (*(position or (None, None)), *found)]
    frame, positions = _of_degrees(values[:, :2], frame, [str(path) for path in paths])
    source = "EXIF" if np.isfinite(positions).any() else "nowhere"
    return Poses(frame, positions, values[:, 2], values[:, 3], source, tuple(problems))


def _of_degrees(
    degrees: FloatArray, frame: CoordinateFrame | None, sources: Sequence[str]
) -> tuple[CoordinateFrame, FloatArray]:
    """Latitudes and longitudes [n, 2] as positions of ``frame``, or of the zone in which they lie.

    ``sources`` [n] say where each comes from, for errors.
    """
    positions, known = np.full(degrees.shape, np.nan), np.isfinite(degrees).all(axis=1)
    if not known.any():
        return frame or LOCAL, positions
    _check_each(degrees, sources, lambda points: utm_of(points[:, 0], points[:, 1], frame))
    if frame is None:
        zones = zone_of(*degrees[known].T)
        one, other = int(zones.argmin()), int(zones.argmax())
        if zones[one] != zones[other]:
            names = [sources[i] for i in np.flatnonzero(known).tolist()]
            side = "north" if degrees[known][one, 0] >= 0 else "south"
            raise MapError(
                f"{names[one]} is in UTM zone {zones[one]}, {names[other]} in {zones[other]}; a map has one zone: make "
                f"a map of each, or count all of them in one by --frame, such as 'utm {zones[one]} {side}'"
            )
        try:
            _, _, frame = utm_of(*degrees[known].T)
        except MapError as error:  # on both sides of the equator
            raise MapError(f"{sources[0]} and others: {error} (--frame)") from None
    positions[known] = frame.from_latlon(*degrees[known].T)
    _check_each(positions, sources, frame.check)
    return frame, positions


def _check_each(points: FloatArray, sources: Iterable[str], check: Callable[[FloatArray], object]) -> None:
    """Name the source of the first of points [n, 2] that is known and that ``check`` refuses."""
    known = np.flatnonzero(np.isfinite(points).all(axis=1))
    try:
        # Of points that are all right one by one, some may still not go together.
        check(points[known])
    except MapError:
        names = list(sources)
        for i in known.tolist():
            try:
                check(points[i : i + 1])
            except MapError as error:
                raise MapError(f"{names[i]}: {error}") from None


def _from_table(folder: Path, paths: Sequence[Path], table: Path, frame: CoordinateFrame | None) -> Poses:
    rows = _read_table(table)
    columns = set(rows[0][1]) if rows else set()
    kind = next((pair for pair in _COORDINATES if columns.issuperset(pair)), None)
    if "file" not in columns or kind is None:
        wanted = " or ".join(",".join(pair) for pair in _COORDINATES)
        found = ",".join(sorted(columns)) or "nothing"
        raise DatasetError(f"{table}: the first line names {found}; it has to name file, and {wanted}")
    number = {str(path.relative_to(folder).as_posix()): i for i, path in enumerate(paths)}
    coordinates = np.full((len(paths), 2), np.nan)
    headings, times = np.full(len(paths), np.nan), np.full(len(paths), np.nan)
    zones: dict[str, int] = {}
    seen: dict[int, int] = {}
    for line, row in rows:
        i = number.get(row["file"])
        if i is None:
            continue  # a table may be of more images than these
        if i in seen:
            raise DatasetError(f"{table}: line {line}: {row['file']} stands in line {seen[i]} too; keep one of them")
        seen[i] = line
        coordinates[i] = [_number(table, line, row, name) for name in kind]
        if np.isnan(coordinates[i]).sum() == 1:
            raise DatasetError(f"{table}: line {line}: has one of {' and '.join(kind)} only; give both or none")
        headings[i], times[i] = (_number(table, line, row, name) for name in ("heading", "time"))
        if abs(headings[i]) > 360:
            raise DatasetError(f"{table}: line {line}: heading is {headings[i]:g}, expected -360 to 360 degrees")
        if kind == ("east", "north") and row.get("zone"):
            zones.setdefault(" ".join(row["zone"].split()), line)
    if not seen:
        raise DatasetError(f"{table}: names none of the {len(paths)} images of {folder}; files are relative to it")
    sources = [f"{table}: line {seen.get(i, 0)}" for i in range(len(paths))]
    if kind == ("latitude", "longitude"):
        frame, positions = _of_degrees(coordinates, frame, sources)
        return Poses(frame, positions, headings, times, table.name)
    if len(zones) > 1:
        (one, line), (other, other_line) = list(zones.items())[:2]
        raise MapError(f"{table}: zone {one} in line {line}, {other} in line {other_line}; make a map of each zone")
    given = _utm(next(iter(zones)), str(table)) if zones else None
    if frame is not None and given is not None and frame != given:
        raise MapError(f"{table}: is in '{given}', the map in '{frame}'; make another map of these")
    frame = frame or given or LOCAL
    _check_each(coordinates, sources, frame.check)
    return Poses(frame, coordinates, headings, times, table.name)


def _read_table(table: Path) -> list[tuple[int, dict[str, str]]]:
    """(line, column -> text) of every row of a CSV file."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DatasetError(f"{table}: can't be read: {reason}; give a CSV file") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = []
    try:
        for row in reader:
            if any(row.pop(None, None) or ()):  # type: ignore[call-overload]  # fields without a column
                raise DatasetError(
                    f"{table}: line {reader.line_num}: has more fields than the first line has columns; put names with "
                    "commas into quotes"
                )
            rows.append(
                (reader.line_num, {(name or "").strip().lower(): (value or "").strip() for name, value in row.items()})
            )
    except csv.Error as error:
        raise DatasetError(f"{table}: line {reader.line_num}: {error}; give a CSV file") from None
    if not rows:
        raise DatasetError(f"{table}: has no rows below the line that names the columns")
    return rows


def _number(table: Path, line: int, row: dict[str, str], name: str) -> float:
    """A finite number; NaN where the column is missing or empty."""
    text = row.get(name, "")
    if not text:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DatasetError(f"{table}: line {line}: {name} is {text!r}, expected a number")
    return value


# --- maps ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildReport:
    """What was added to a map."""

    n_added: int
    poses: Poses
    skipped: list[SkippedImage]


def build_map(
    model: TetraModel,
    folder: str | Path,
    path: str | Path,
    *,
    table: Path | None = None,
    frame: CoordinateFrame | None = None,
    thumbnails: bool = True,
    keep_descriptors: bool = False,
    batch_size: int = 32,
    skip_bad_images: bool = False,
    progress: bool = True,
) -> BuildReport:
    """Make a map of the images in ``folder`` and its subfolders, in natural order, under the new name ``path``.

    Ids are the files' names, relative to the folder. It appears as a whole when all are described.

    Raises:
        MapError: ``path`` exists; positions cannot be; the model was never saved.
        DatasetError, ImageError, ConfigError: as :func:`read_poses` and :func:`tetra.evaluation.describe_batches`.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise MapError(f"{path}: exists already; choose another name, or add to it with `tetra map add`")
    if model.content_hash is None:
        raise MapError("model: it was never saved, so a map could not name it; save it first")
    if not path.parent.is_dir():
        raise MapError(f"{path}: the folder '{path.parent}' does not exist; create it first")
    folder, paths = _images(folder)
    poses = read_poses(folder, paths, table, frame, skip_bad_images=skip_bad_images)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        made = PlaceMap.create(
            unfinished,
            model_hash=model.content_hash,
            code_bytes=-(-model.n_bits // 8),
            frame=poses.frame,
            keep_descriptors=model.n_bits if keep_descriptors else None,
        )
        with made:
            report = _add(made, model, folder, paths, poses, "", thumbnails, batch_size, skip_bad_images, progress)
            made.save()
        os.rename(unfinished, path)
    except OSError as error:
        raise MapError(f"{path}: can't be made: {error.strerror}; free space or choose another folder") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return report


def add_folder(
    model: TetraModel,
    place_map: PlaceMap,
    folder: str | Path,
    *,
    prefix: str = "",
    table: Path | None = None,
    thumbnails: bool = True,
    batch_size: int = 32,
    skip_bad_images: bool = False,
    progress: bool = True,
) -> BuildReport:
    """Add the images in ``folder`` to a map that is open for writing, all or none; ids begin with ``prefix``.

    Raises what :func:`build_map` raises, and :class:`~tetra.errors.MapError` for another model and ids that are there.
    """
    if model.content_hash != place_map.model_hash:
        name = "a model that was never saved" if model.content_hash is None else model.content_hash[:12]
        raise MapError(f"model: it is {name}, the map {place_map.path} is of {place_map.model_hash[:12]}; use that one")
    folder, paths = _images(folder)
    ids = [_id(folder, path, prefix) for path in paths]
    rows = place_map.rows_of(ids)
    if (rows >= 0).any():
        known = ids[int((rows >= 0).argmax())]
        raise MapError(f"{place_map.path}: has {known!r} already; give the new ones a prefix, or remove the old ones")
    poses = read_poses(folder, paths, table, place_map.frame, skip_bad_images=skip_bad_images)
    try:
        return _add(place_map, model, folder, paths, poses, prefix, thumbnails, batch_size, skip_bad_images, progress)
    except BaseException:  # an image that can't be read, a full disk, Ctrl-C: earlier batches are in the map
        with suppress(MapError):
            place_map.remove([id for id in ids if id in place_map])
        raise


def _images(folder: str | Path) -> tuple[Path, list[Path]]:
    return Path(folder), list_images(folder, recursive=True)


def _id(folder: Path, path: Path, prefix: str) -> str:
    return prefix + path.relative_to(folder).as_posix()


def _add(
    place_map: PlaceMap,
    model: TetraModel,
    folder: Path,
    paths: Sequence[Path],
    poses: Poses,
    prefix: str,
    thumbnails: bool,
    batch_size: int,
    skip_bad_images: bool,
    progress: bool,
) -> BuildReport:
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}: it must be at least 1")
    skipped: list[SkippedImage] = []
    batches = describe_batches(
        model, paths, batch_size=batch_size, skipped=skipped if skip_bad_images else None, progress=progress
    )
    n_added = 0
    for indices, floats, codes in batches:
        chosen = indices.numpy()
        files = [paths[i] for i in chosen]
        place_map.add_many(
            [_id(folder, file, prefix) for file in files],
            codes.cpu(),
            [None if np.isnan(position).any() else tuple(position) for position in poses.positions[chosen]],
            headings=[None if np.isnan(value) else value for value in poses.headings[chosen]],
            times=[None if np.isnan(value) else value for value in poses.times[chosen]],
            thumbnails=[thumbnail(file) for file in files] if thumbnails else None,
            descriptors=floats.cpu() if place_map.descriptor_dims else None,
        )
        n_added += len(files)
    return BuildReport(n_added, poses, skipped)
