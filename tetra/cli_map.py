"""``tetra map`` and ``tetra localize``: place maps, and where frames were taken."""

from __future__ import annotations

import json as json_module
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tetra.cli_parts import (
    BatchSize,
    Device,
    Json,
    Model,
    SkipBad,
    check_json_path,
    chosen_device,
    make_table,
    print_report,
    write_json,
)
from tetra.errors import ConfigError, ImageError, MapError, TetraError

if TYPE_CHECKING:
    from tetra.confidence import Calibration
    from tetra.coordinates import CoordinateFrame
    from tetra.frames import Frame
    from tetra.localizer import Answer, Localizer, Timings
    from tetra.map_building import BuildReport
    from tetra.map_outputs import FrameResult
    from tetra.place_map import PlaceMap
    from tetra.regions import Region

map_app = typer.Typer(no_args_is_help=True, help="Build, extend and look at place maps.", rich_markup_mode=None)

Map = Annotated[Path, typer.Argument(metavar="MAP", help="A place map: a folder that `tetra map build` made.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Images of the places, in the order of travel.")]
Positions = Annotated[
    Path | None,
    typer.Option(metavar="FILE.csv", help="Where they were taken. [default: the names, or EXIF]"),
]
Thumbnails = Annotated[bool, typer.Option(help="Keep a small picture of every place.")]

LINES = (".jsonl", ".ndjson")
STREETS = "OpenStreetMap"
LATENCIES_KEPT = 100_000
"""frames of which percentiles are told: a live camera may run for weeks"""


@map_app.command("build")
def map_build(
    model: Model,
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="MAP", help="The new map.")],
    positions: Positions = None,
    frame: Annotated[
        str | None,
        typer.Option(
            metavar="FRAME", help="What positions mean: local, or as in 'utm 32 north'. [default: see the docs]"
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Which answers to accept, from `tetra evaluate --calibrate`.")
    ] = None,
    thumbnails: Thumbnails = True,
    keep_descriptors: Annotated[
        bool, typer.Option("--keep-descriptors", help="Keep the float descriptors too, for `localize --rerank`.")
    ] = False,
    batch_size: BatchSize = 32,
    device: Device = None,
    skip_bad_images: SkipBad = False,
) -> None:
    """Make a map of a folder of images."""
    from tetra.coordinates import CoordinateFrame
    from tetra.files import load
    from tetra.map_building import build_map
    from tetra.place_map import PlaceMap

    loaded = load(model, device=chosen_device(device))
    given = None if calibration is None else read_calibration(calibration)
    report = build_map(
        loaded,
        folder,
        out,
        table=positions,
        frame=None if frame is None else CoordinateFrame.parse(frame),
        thumbnails=thumbnails,
        keep_descriptors=keep_descriptors,
        batch_size=batch_size,
        skip_bad_images=skip_bad_images,
        progress=sys.stderr.isatty(),
    )
    with PlaceMap.open(out) as place_map:
        if given is not None:
            _calibrate(place_map, given)
        _print_built(out, place_map, report)


@map_app.command("add")
def map_add(
    model: Model,
    place_map: Map,
    folder: Folder,
    positions: Positions = None,
    prefix: Annotated[str, typer.Option(help="What their ids begin with, such as 'second-drive/'.")] = "",
    thumbnails: Thumbnails = True,
    batch_size: BatchSize = 32,
    device: Device = None,
    skip_bad_images: SkipBad = False,
) -> None:
    """Add a folder of images to a map."""
    from tetra.files import load
    from tetra.map_building import add_folder
    from tetra.place_map import PlaceMap

    loaded = load(model, device=chosen_device(device))
    with PlaceMap.open(place_map, model_hash=loaded.content_hash) as opened:
        report = add_folder(
            loaded,
            opened,
            folder,
            prefix=prefix,
            table=positions,
            thumbnails=thumbnails,
            batch_size=batch_size,
            skip_bad_images=skip_bad_images,
            progress=sys.stderr.isatty(),
        )
        _print_built(place_map, opened, report)


def _print_built(path: Path, place_map: PlaceMap, report: BuildReport) -> None:
    notices = [f"left out: {image.reason}" for image in report.skipped]
    notices += [f"no position: {problem}" for problem in report.poses.problems]
    located, n = report.poses.n_located, len(report.poses.positions)
    if located < n:
        where = "nowhere" if not located else f"{report.poses.source}, for {located} of {n} images"
        notices.append(f"positions found: {where}; images without one can be recognised but not put on a map")
    n_bytes = place_map.statistics()["bytes"]
    line = f"{path}: {report.n_added} places added, {len(place_map)} in all, {n_bytes:,} bytes, {place_map.frame}"
    print_report([line], notices, [], None)


@map_app.command("info")
def map_info(
    place_map: Map,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and check it.")] = False,
    json: Json = None,
) -> None:
    """What a map holds."""
    import numpy as np

    from tetra.place_map import PlaceMap

    check_json_path(json)
    with PlaceMap.open(place_map, read_only=True) as opened:
        rows = opened.rows()
        positions = opened.positions(rows)
        known = positions[np.isfinite(positions).all(axis=1)]
        found: dict[str, Any] = {
            "path": str(place_map),
            "model_hash": opened.model_hash,
            "code_bytes": opened.code_bytes,
            "descriptor_dims": opened.descriptor_dims,
            "frame": str(opened.frame),
            **opened.statistics(),
            "with_position": len(known),
            "box": None if not len(known) else [known.min(axis=0).tolist(), known.max(axis=0).tolist()],
            "calibration": opened.calibration,
        }
        if verify:
            found["verified_bytes"] = opened.verify()
    write_json(json, found)
    print(f"{place_map}")
    print(f"model          {found['model_hash']}")
    print(f"places         {found['places']:,}, {found['with_position']:,} with a position ({found['frame']})")
    if found["box"]:
        (left, low), (right, high) = found["box"]
        print(f"extent         {left:.2f} to {right:.2f}, {low:.2f} to {high:.2f} m")
    print(f"codes          {found['code_bytes']} bytes each")
    print(f"on disk        {found['bytes']:,} bytes in {found['segments']} segments and the journal")
    print(f"calibrated     {', '.join(found['calibration'] or ()) or 'no'}")
    if verify:
        print(f"verified       {found['verified_bytes']:,} bytes are as they were written")


@map_app.command("merge")
def map_merge(
    place_map: Map,
    others: Annotated[list[Path], typer.Argument(metavar="OTHER...", help="Maps whose places are added to MAP.")],
) -> None:
    """Add the places of other maps, of the same model and frame."""
    from tetra.place_map import PlaceMap

    with PlaceMap.open(place_map) as opened:
        for other in others:
            if other.resolve() == place_map.resolve():
                raise ConfigError(f"{other}: is the map that is merged into; name others")
            with PlaceMap.open(other, read_only=True) as source:
                rows = opened.merge(source)
            print(f"{place_map}: {len(rows)} places of {other} added, {len(opened)} in all")


@map_app.command("calibrate")
def map_calibrate(
    place_map: Map,
    calibration: Annotated[Path, typer.Argument(metavar="FILE", help="From `tetra evaluate --calibrate`.")],
) -> None:
    """Keep in a map which answers to accept."""
    from tetra.place_map import PlaceMap

    given = read_calibration(calibration)
    with PlaceMap.open(place_map) as opened:
        _calibrate(opened, given)
    print(f"{place_map}: calibrated for {' and '.join(given)}")


@map_app.command("export")
def map_export(
    place_map: Map,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Ends in .geojson, .kml, .html, .csv or .json.")
    ],
    tiles: Annotated[bool, typer.Option("--tiles", help="HTML: streets under it, from the internet.")] = False,
) -> None:
    """Write the places of a map for other programs, or to look at."""
    from tetra.files import check_output
    from tetra.geo_files import write_geojson, write_kml
    from tetra.map_page import write_html_map
    from tetra.map_tables import write_csv, write_places
    from tetra.place_map import PlaceMap

    check_output(out)
    _refuse_inside(place_map, out)
    with PlaceMap.open(place_map, read_only=True) as opened:
        if out.suffix == ".geojson":
            write_geojson(out, [], opened, with_places=True)
        elif out.suffix == ".kml":
            write_kml(out, [], opened, with_places=True)
        elif out.suffix == ".html":
            write_html_map(out, [], opened, title=place_map.name, tiles=STREETS if tiles else None)
        elif out.suffix == ".csv":
            write_csv(out, opened)
        elif out.suffix == ".json":
            write_places(out, opened)
        else:
            raise ConfigError(f"{out}: can't tell what to write; end it in .geojson, .kml, .html, .csv or .json")
        print(f"{out}: {len(opened)} places")


def _refuse_inside(place_map: Path, *outputs: Path | None) -> None:
    """A file that replaced one of the map's own would destroy it."""
    for path in outputs:
        if path is not None and place_map.resolve() in (path.resolve(), *path.resolve().parents):
            raise ConfigError(f"{path}: lies in the map {place_map}, whose folder is its own; choose another place")


def read_calibration(path: Path) -> dict[str, Calibration]:
    """``{"frame": ..., "sequence": ...}``, one of them or both, from a JSON file."""
    try:
        values = json_module.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}; name a calibration file") from None
    except ValueError:
        raise ConfigError(f"{path}: is not JSON; name a file that `tetra evaluate --calibrate` wrote") from None
    return _calibrations(values, str(path))


def _calibrations(values: Any, where: str) -> dict[str, Calibration]:
    from tetra.confidence import Calibration
    from tetra.sequence_evaluation import KINDS

    if not isinstance(values, dict) or not values or not set(values) <= set(KINDS):
        raise ConfigError(
            f"{where}: expected an object with {' and '.join(KINDS)}, as `tetra evaluate --calibrate` writes"
        )
    return {kind: Calibration.from_dict(value, f"{where}: {kind}") for kind, value in values.items()}


def _calibrate(place_map: PlaceMap, given: dict[str, Calibration]) -> None:
    for calibration in given.values():
        calibration.check(place_map.model_hash, place_map.code_bytes)
    place_map.calibration = {kind: calibration.to_dict() for kind, calibration in given.items()}


# --- localize -----------------------------------------------------------------------------------------------


def localize(
    model: Model,
    place_map: Map,
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Images, folders, videos; - for JPEG or PNG files from stdin, raw:640x480 for pixels.",
        ),
    ],
    k: Annotated[int, typer.Option("--k", min=1, help="Matches shown of a frame.")] = 5,
    sequence: Annotated[
        bool | None,
        typer.Option("--sequence/--single", help="Use the frames before. [default: for videos and stdin]"),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Frames that a sequence remembers.")] = 30,
    near: Annotated[
        str | None,
        typer.Option(
            metavar="LAT,LON|X,Y",
            help="Only places around this point, X,Y in the map's metres. With --within.",
        ),
    ] = None,
    within: Annotated[float | None, typer.Option(metavar="M", help="How far from --near, in metres.")] = None,
    heading: Annotated[
        float | None, typer.Option(metavar="DEG", help="Only places that look this way, clockwise from north.")
    ] = None,
    heading_tolerance: Annotated[
        float, typer.Option(metavar="DEG", help="How far from --heading, to either side.")
    ] = 45.0,
    rerank: Annotated[
        bool,
        typer.Option("--rerank", help="Rank the matches of single frames by float descriptors that the map keeps."),
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Which answers to accept. [default: what the map has]")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Take every n-th frame.")] = 1,
    fps: Annotated[float | None, typer.Option(help="Take at most so many frames of a second of a video.")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Take the images in subfolders too.")] = False,
    json: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="One object a frame: a list, or lines for .jsonl and - (stdout)."),
    ] = None,
    geojson: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write GeoJSON.")] = None,
    kml: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write KML.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw a map for a browser.")] = None,
    tiles: Annotated[bool, typer.Option("--tiles", help="HTML: streets under it, from the internet.")] = False,
    strips: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write a picture of every frame and its matches.")
    ] = None,
    device: Device = None,
    skip_bad_images: SkipBad = False,
) -> None:
    """Where frames were taken: their places in a map."""
    from rich.console import Console

    from tetra.engine import Engine
    from tetra.files import check_output, load
    from tetra.frames import open_frames
    from tetra.localizer import Localizer
    from tetra.map_outputs import FrameResult, frame_record, latency_table, peak_memory_bytes
    from tetra.picture_strips import StripWriter, thumbnail
    from tetra.place_map import PlaceMap

    json_path = None if json in (None, "-") else Path(str(json))
    for path in (geojson, kml, html, json_path):
        if path is not None:
            check_output(path)
    _refuse_inside(place_map, geojson, kml, html, json_path, strips)
    is_sequence = _is_stream(paths) if sequence is None else sequence
    if rerank and is_sequence:
        raise ConfigError("--rerank: ranks the matches of single frames, a sequence weighs bits; add --single")
    chosen_for = chosen_device(device)
    loaded = load(model, device=chosen_for)
    search_devices = None if chosen_for == "cpu" else [chosen_for]
    with (
        PlaceMap.open(
            place_map, read_only=True, model_hash=loaded.content_hash, search_devices=search_devices
        ) as opened,
        _Records(json) as records,
    ):
        region = _region(opened, near, within, heading, heading_tolerance)
        skipped: list[str] = []
        frames = open_frames(
            paths,
            recursive=recursive,
            every=every,
            fps=fps,
            on_error="skip" if skip_bad_images else "raise",
            skipped=skipped,
        )
        chosen = read_calibration(calibration) if calibration else _calibrations_of(opened)
        localizer = Localizer(
            loaded,
            opened,
            engine=Engine(
                loaded, dtype=loaded.compute_dtype
            ).warm_up(),  # so the first frame is quick; the dtype made the map
            window=window if is_sequence else 1,
            k=max(25, k),
            calibration=chosen.get("sequence" if is_sequence else "frame"),
            rerank=rerank,
        )
        strip_writer = None if strips is None else StripWriter(strips, opened)
        results: list[FrameResult] = []  # only where files need them, as a live camera may run for weeks
        is_mapped = any(path is not None for path in (geojson, kml, html))
        timings: deque[Timings] = deque(maxlen=LATENCIES_KEPT)
        notices: list[str] = []
        n_frames = n_accepted = 0
        ended: BaseException | None = None
        try:
            for frame, answer in _answers(frames, localizer, region, notices):
                n_frames += 1
                n_accepted += answer.accepted is True
                timings.append(answer.timings)
                if is_mapped:
                    picture = thumbnail(frame.pixels) if html is not None else None
                    results.append(FrameResult(frame.name, answer, picture, frame.sequence))
                records.write(frame_record(frame.name, answer, k))
                if strip_writer is not None:
                    strip_writer.write(frame.name, frame.pixels, answer, k)
                if json != "-":
                    _print_answer(frame.name, answer)
        except (KeyboardInterrupt, ImageError) as error:
            # So ends a stream: what came before counts.
            if not _is_stream(paths) or not n_frames:
                raise
            ended = error
        records.finish()
        _write_maps(opened, results, geojson, kml, html, tiles)
        if isinstance(ended, TetraError):
            raise ended
        if n_frames and localizer.calibration is None:
            kind = "sequences" if is_sequence else "single frames"
            notices.append(
                f"the map is not calibrated for {kind}, so nothing is accepted or rejected; see map calibrate"
            )
        _print_summary(n_frames, n_accepted, latency_table(timings), peak_memory_bytes(), Console(stderr=True))
        print_report([], [*(f"left out: {reason}" for reason in skipped), *notices], [], None)
        if ended is not None:
            raise ended


def _answers(
    frames: Iterable[Frame], localizer: Localizer, region: Region | None, notices: list[str]
) -> Iterator[tuple[Frame, Answer]]:
    """Each frame with its answer; sequences begin where frames do, and where the time of a video goes back."""
    from tetra.frames import STDIN
    from tetra.map_outputs import with_decode_ms

    last: tuple[int, float | None] | None = None
    for frame in frames:
        time = None
        if localizer.window > 1:
            # Cameras write whole seconds into pictures, too coarse for a sequence; a video has the time of each frame.
            time = frame.time_s if frame.path is None and not frame.name.startswith(STDIN) else None
            if last is not None and last[0] == frame.sequence and _is_before(time, last[1]):
                notices.append(f"{frame.name}: time goes back from {last[1]} to {time} s, so a new sequence begins")
                localizer.reset()
            elif last is None or last[0] != frame.sequence:
                localizer.reset()
            last = (frame.sequence, time)
        yield frame, with_decode_ms(localizer.push(frame.pixels, time, within=region), frame.decode_ms)


def _is_before(time: float | None, other: float | None) -> bool:
    return time is not None and other is not None and time < other


def _region(
    place_map: PlaceMap, near: str | None, within: float | None, heading: float | None, tolerance: float
) -> Region | None:
    """What ``--near``, ``--within`` and ``--heading`` ask for, if the map has a place there."""
    import numpy as np

    from tetra.regions import Region

    if (near is None) != (within is None):
        raise ConfigError("--near and --within go together, as in: --near 48.75,9.1 --within 200; give both or none")
    regions: list[Region] = []
    asked: list[str] = []
    try:
        if near is not None and within is not None:
            asked.append(f"--near {near} --within {within:g}")
            regions.append(Region.circle(_point(near, place_map.frame), within))
        if heading is not None:
            asked.append(f"--heading {heading:g} --heading-tolerance {tolerance:g}")
            regions.append(Region.heading(heading, tolerance))
    except MapError as error:
        raise MapError(f"{asked[-1]}: {error}") from None
    if not regions:
        return None
    region = regions[0] if len(regions) == 1 else regions[0] & regions[1]
    rows = place_map.rows()
    positions, headings = place_map.positions(rows), place_map.headings(rows)
    if not region.mask(positions, headings).any():
        n_located, n_headed = np.isfinite(positions).all(axis=1).sum(), np.isfinite(headings).sum()
        raise MapError(
            f"{' '.join(asked)}: none of the {len(rows)} places of {place_map.path} is there ({n_located} have a "
            f"position, {n_headed} a heading); widen it, or leave it out"
        )
    return region


def _point(text: str, frame: CoordinateFrame) -> tuple[float, float]:
    """A point in metres of the frame, of "x,y" there or of "latitude,longitude"; eastings are never so small."""
    import numpy as np

    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--near {text}: expected two numbers, as in 48.75,9.1 or 500000,5400000") from None
    if frame.kind == "utm" and abs(first) <= 90 and abs(second) <= 180:
        first, second = frame.from_latlon(first, second).tolist()
    frame.check(np.array([[first, second]]))
    return first, second


def _write_maps(
    place_map: PlaceMap,
    results: list[FrameResult],
    geojson: Path | None,
    kml: Path | None,
    html: Path | None,
    tiles: bool,
) -> None:
    from tetra.geo_files import write_geojson, write_kml
    from tetra.map_page import write_html_map

    if geojson is not None:
        write_geojson(geojson, results, place_map)
    if kml is not None:
        write_kml(kml, results, place_map)
    if html is not None:
        write_html_map(html, results, place_map, title=place_map.path.name, tiles=STREETS if tiles else None)


def _is_stream(paths: list[str]) -> bool:
    from tetra.frames import VIDEO_SUFFIXES

    return all(path == "-" or path.startswith("raw:") or path.lower().endswith(VIDEO_SUFFIXES) for path in paths)


def _calibrations_of(place_map: PlaceMap) -> dict[str, Calibration]:
    return {} if place_map.calibration is None else _calibrations(place_map.calibration, str(place_map.path))


class _Records:
    """Where records of frames go: nowhere, to stdout or a file line by line as they come, or to a list at the end."""

    def __init__(self, target: str | None) -> None:
        self._path = None if target in (None, "-") else Path(str(target))
        self._as_lines = target == "-" or (self._path is not None and self._path.suffix.lower() in LINES)
        self._to_stdout = target == "-"
        self._all: list[dict[str, Any]] = []
        self._file: Any = None

    def __enter__(self) -> _Records:
        if self._as_lines and self._path is not None:
            self._file = open(self._path, "w", encoding="utf-8")  # closed by __exit__
        return self

    def write(self, record: dict[str, Any]) -> None:
        """One more, which is there for others to read when this returns, where lines are written."""
        if not self._as_lines:
            if self._path is not None:
                self._all.append(record)
            return
        line = json_module.dumps(record, allow_nan=False)
        if self._to_stdout:
            print(line, flush=True)
            return
        try:
            print(line, file=self._file, flush=True)
        except OSError as error:
            raise TetraError(
                f"{self._path}: can't be written: {error.strerror}; free space or choose another folder"
            ) from None

    def finish(self) -> None:
        """No more will come: write the list."""
        if not self._as_lines:
            write_json(self._path, self._all)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written has been told
                self._file.close()


def _print_answer(name: str, answer: Answer) -> None:
    verdict = {True: "accepted", False: "rejected", None: "nearest"}[answer.accepted]
    where = "" if answer.position is None else "  at {:.2f}, {:.2f}".format(*answer.position)
    if answer.spread_m is not None:
        where += f" +- {answer.spread_m:.1f} m"
    print(f"{name}: {verdict} {answer.id}, {answer.distance} bits, margin {answer.margin}{where}", flush=True)


def _print_summary(
    n_frames: int, n_accepted: int, latency: dict[str, dict[str, float]], peak_bytes: int, console: Any
) -> None:
    """How many were accepted, and where the time went, on stderr."""
    print(f"{n_frames} frames, {n_accepted} accepted; peak memory {peak_bytes / 2**20:.0f} MiB", file=sys.stderr)
    if latency:
        table = make_table("milliseconds a frame", "", "p50", "p95", "p99")
        for step, figures in latency.items():
            table.add_row(step, *(f"{figures[f'p{p}_ms']:.2f}" for p in (50, 95, 99)))
        console.print(table)
