"""The demo's data set: one district photographed in daylight as the map, and again in other weather as queries.

A second district, with other streets and houses, gives the training images, so that nothing in the evaluation has
been seen in training. Layout of the folder that :func:`write_town_dataset` makes::

    database/   @UTM_east@UTM_north@32@U@...@.jpg     traversal 1, in daylight
    queries/    the same naming                       shifted viewpoints at dusk, at night, in rain, fog and snow
    train/video/STREET/frame_NNNN.jpg                 drives through the other district, without labels
    train/probe/STREET/frame_NNNN.jpg                 one more, to watch the training with
    train/places/                                     its places in GSV-Cities layout, some pictures of each
"""

from __future__ import annotations

import contextlib
import csv
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tetra.demo.plan import Pose, Town, build_town, drive
from tetra.demo.render import CONDITIONS, Conditions, as_jpeg, render_view, trace_depth, vary

__all__ = [
    "CONDITIONS",
    "Conditions",
    "Pose",
    "Shot",
    "Town",
    "TownDataset",
    "build_town",
    "drive",
    "render_view",
    "trace_depth",
    "vary",
    "write_town_dataset",
]

QUERY_CONDITIONS = ("overcast", "dusk", "night", "rain", "fog", "snow", "night-rain", "morning")
TRAIN_CONDITIONS = ("day", *QUERY_CONDITIONS)
_ORIGIN = (500_000.0, 5_400_000.0)  # zone 32 U, on the central meridian
_TRAIN_OFFSET_M = 2_000.0
_PROBE_SPACING_M = 4.0
_CITY = "Town"


@dataclass(frozen=True)
class Shot:
    """A photograph of the data set: its file and how it was taken."""

    path: Path
    pose: Pose
    conditions: Conditions


@dataclass(frozen=True)
class TownDataset:
    """What :func:`write_town_dataset` wrote, and the district that it shows."""

    folder: Path
    town: Town
    database: list[Shot]
    queries: list[Shot]
    n_train_images: int

    @property
    def train_videos(self) -> Path:
        """Folder of the unlabelled drives."""
        return self.folder / "train" / "video"

    @property
    def train_places(self) -> Path:
        """Root of the labelled places, in GSV-Cities layout."""
        return self.folder / "train" / "places"


def utm_name(town: Town, pose: Pose, number: int, note: str) -> str:
    """``@UTM_east@UTM_north@zone@letter@lat@lon@pano@tile@heading@pitch@roll@height@timestamp@note@.jpg``."""
    east, north = town.utm(pose)
    return f"@{east:.2f}@{north:.2f}@32@U@@@{number:05d}@@{pose.heading:.1f}@@@{pose.height:.2f}@@{note}@.jpg"


def shifted(pose: Pose, rng: np.random.Generator, *, sideways_m: float, along_m: float, turn_deg: float) -> Pose:
    """The pose of another visit: up to ``sideways_m`` and ``along_m`` away and ``turn_deg`` turned."""
    side, ahead = rng.uniform(-sideways_m, sideways_m), rng.uniform(-along_m, along_m)
    heading = math.radians(pose.heading)
    return Pose(
        pose.x + side * math.cos(heading) + ahead * math.sin(heading),
        pose.y - side * math.sin(heading) + ahead * math.cos(heading),
        (pose.heading + rng.uniform(-turn_deg, turn_deg)) % 360,
        pose.height + rng.uniform(-0.25, 0.35),
    )


def write_town_dataset(
    out_dir: str | Path,
    *,
    seed: int = 0,
    size: tuple[int, int] = (224, 224),
    database_spacing_m: float = 6.0,
    query_spacing_m: float = 11.0,
    place_spacing_m: float = 11.0,
    images_per_place: int = 4,
    video_spacing_m: float = 6.0,
    max_streets: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> TownDataset:
    """Render and write the data set; the same seed and arguments give the same files.

    Args:
        size: height and width of the images.
        database_spacing_m, query_spacing_m, place_spacing_m, video_spacing_m: metres between neighbours along a
            street. A place spans 3 m, so places stay apart as long as their spacing is more.
        max_streets: only so many streets of each district.
        on_progress: called with (images written, images in all).
        workers: processes that render; default: one a core. With more than one, a script that calls this needs the
            usual ``if __name__ == "__main__":`` guard of multiprocessing.
    """
    folder = Path(out_dir)
    rng = np.random.default_rng([seed, 5])
    town = build_town(seed, origin=_ORIGIN)
    elsewhere = build_town(seed + 1_000_003, origin=(_ORIGIN[0] + _TRAIN_OFFSET_M, _ORIGIN[1]))

    database = [
        Shot(folder / "database" / utm_name(town, pose, i, "day"), pose, vary("day", seed=i))
        for i, pose in enumerate(_poses(town, database_spacing_m, 0.0, max_streets))
    ]
    queries = []
    for i, pose in enumerate(_poses(town, query_spacing_m, 0.4 * query_spacing_m, max_streets)):
        name = QUERY_CONDITIONS[i % len(QUERY_CONDITIONS)]
        seen_from = shifted(pose, rng, sideways_m=1.0, along_m=2.0, turn_deg=10)
        path = folder / "queries" / utm_name(town, seen_from, i, name)
        queries.append(Shot(path, seen_from, vary(name, seed=i)))
    training = _video_shots(folder, elsewhere, video_spacing_m, max_streets)
    training += _place_shots(folder, elsewhere, place_spacing_m, images_per_place, max_streets, rng)

    jobs = [("here", shot) for shot in database + queries] + [("elsewhere", shot) for shot in training]
    _render_all({"here": town, "elsewhere": elsewhere}, jobs, size, on_progress, workers or os.cpu_count() or 1)
    return TownDataset(folder, town, database, queries, len(training))


def _poses(town: Town, spacing_m: float, start_m: float, max_streets: int | None) -> list[Pose]:
    return [pose for route in drive(town, spacing_m, start_m=start_m)[:max_streets] for pose in route]


def _video_shots(folder: Path, town: Town, spacing_m: float, max_streets: int | None) -> list[Shot]:
    """Drives along all streets but the last, each in its own weather, and one in daylight along the last."""
    drives = [
        ("video", street, TRAIN_CONDITIONS[street % len(TRAIN_CONDITIONS)], route)
        for street, route in enumerate(drive(town, spacing_m)[:-1][:max_streets])
    ]
    drives.append(("probe", len(town.lines) - 1, "day", drive(town, _PROBE_SPACING_M)[-1]))
    return [
        Shot(folder / "train" / kind / f"street_{street:02d}_{name}" / f"frame_{i:04d}.jpg", pose, vary(name, seed=i))
        for kind, street, name, route in drives
        for i, pose in enumerate(route)
    ]


def _place_shots(
    folder: Path, town: Town, spacing_m: float, images: int, max_streets: int | None, rng: np.random.Generator
) -> list[Shot]:
    shots, rows = [], []
    streets = drive(town, spacing_m, start_m=2.0)[:-1][:max_streets]
    for place, pose in enumerate(pose for route in streets for pose in route):
        weather = rng.permutation(len(TRAIN_CONDITIONS))[:images]
        for i in range(images):
            c = vary(TRAIN_CONDITIONS[weather[i % len(weather)]], seed=i)
            seen_from = shifted(pose, rng, sideways_m=1.0, along_m=1.5, turn_deg=9)
            east, north = town.utm(seen_from)
            # Latitude and longitude near zone 32's central meridian, to about a metre: names need no more.
            lat = 48.7535 + (north - _ORIGIN[1]) / 111_320
            lon = 9.0 + (east - _ORIGIN[0]) / (111_320 * math.cos(math.radians(lat)))
            row = {
                "place_id": place,
                "year": 2020 + i,
                "month": 1 + i,
                "northdeg": round(seen_from.heading) % 360,
                "city_id": _CITY,
                "lat": f"{lat:.7f}",
                "lon": f"{lon:.7f}",
                "panoid": f"{place:05d}{i}{c.name}",
            }
            rows.append(row)
            name = (
                f"{_CITY}_{place:07d}_{row['year']:04d}_{row['month']:02d}_{row['northdeg']:03d}_{row['lat']}_"
                f"{row['lon']}_{row['panoid']}.jpg"
            )
            shots.append(Shot(folder / "train" / "places" / "Images" / _CITY / name, seen_from, c))
    frame = folder / "train" / "places" / "Dataframes" / f"{_CITY}.csv"
    frame.parent.mkdir(parents=True, exist_ok=True)
    with frame.open("w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return shots


Jobs = list[tuple[str, Shot]]  # which district, what to photograph

_districts: dict[str, Town] = {}  # what this process can render


def _know(districts: dict[str, Town]) -> None:
    _districts.update(districts)


def _render_all(
    districts: dict[str, Town],
    jobs: Jobs,
    size: tuple[int, int],
    on_progress: Callable[[int, int], None] | None,
    workers: int,
) -> None:
    for parent in {shot.path.parent for _, shot in jobs}:
        parent.mkdir(parents=True, exist_ok=True)
    chunks = [jobs[i : i + 8] for i in range(0, len(jobs), 8)]
    done = 0
    with contextlib.ExitStack() as stack:
        if workers > 1:
            # Fresh processes: forking one that runs threads (torch's, the progress bar's) can hang.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(workers, context, initializer=_know, initargs=(districts,))
            finished = stack.enter_context(pool).map(_render_chunk, chunks, [size] * len(chunks))
        else:
            _know(districts)
            stack.callback(_districts.clear)
            finished = map(_render_chunk, chunks, [size] * len(chunks))
        for n in finished:
            done += n
            if on_progress is not None:
                on_progress(done, len(jobs))


def _render_chunk(jobs: Jobs, size: tuple[int, int]) -> int:
    for district, shot in jobs:
        shot.path.write_bytes(as_jpeg(render_view(_districts[district], shot.pose, shot.conditions, size)))
    return len(jobs)
