"""The demo: a town that is a place (geometry holds, light changes), its data set, its report, and one whole run."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tetra.datasets import load_dataset, parse_utm_name
from tetra.demo.plan import PolygonTable, box
from tetra.demo.report import (
    Localised,
    Picture,
    Report,
    Table,
    bar_chart,
    data_uri,
    jpeg,
    line_chart,
    stacked_bars,
    town_map,
)
from tetra.demo.town import (
    CONDITIONS,
    Pose,
    Town,
    TownDataset,
    build_town,
    drive,
    render_view,
    shifted,
    trace_depth,
    vary,
    write_town_dataset,
)
from tetra.errors import TetraError
from tetra.files import save
from tetra.model import create_model

SIZE = (96, 112)


@pytest.fixture(scope="module")
def town() -> Town:
    return build_town(7)


@pytest.fixture(scope="module")
def poses(town: Town) -> list[Pose]:
    return [route[i] for route in drive(town, 10.0) for i in (2, 8, 14)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TownDataset:
    return write_town_dataset(
        tmp_path_factory.mktemp("town"),
        seed=3,
        size=(64, 64),
        max_streets=1,
        database_spacing_m=12,
        query_spacing_m=16,
        place_spacing_m=40,
        video_spacing_m=30,
        workers=1,
    )


# --- renderer -----------------------------------------------------------------------------------------------


def test_same_seed_same_pixels(town: Town, poses: list[Pose]) -> None:
    again = build_town(7)
    for name in ("day", "night-rain", "snow"):
        first, second = render_view(town, poses[1], name, SIZE), render_view(again, poses[1], name, SIZE)
        assert first.shape == (*SIZE, 3)
        assert first.dtype == np.uint8
        np.testing.assert_array_equal(first, second)


def test_another_seed_is_another_town(town: Town) -> None:
    other = build_town(8)
    pose, elsewhere = drive(town, 10.0)[0][5], drive(other, 10.0)[0][5]
    first, second = render_view(town, pose, "day", SIZE), render_view(other, elsewhere, "day", SIZE)
    assert np.abs(first.astype(int) - second).mean() > 20


@pytest.mark.parametrize("name", sorted(set(CONDITIONS) - {"day"}))
def test_conditions_change_pixels(town: Town, poses: list[Pose], name: str) -> None:
    day, other = (render_view(town, poses[4], c, SIZE).astype(int) for c in ("day", name))
    assert np.abs(day - other).mean() > 8


def test_weather_looks_like_itself(town: Town, poses: list[Pose]) -> None:
    views = {name: np.stack([render_view(town, p, name, SIZE) for p in poses[:4]]).astype(float) for name in CONDITIONS}
    ground = {name: v[:, -20:].mean() for name, v in views.items()}
    contrast = {name: v.mean(-1).std(axis=(1, 2)).mean() for name, v in views.items()}
    assert views["night"][:, :20].mean() < 0.6 * views["day"][:, :20].mean()
    assert ground["snow"] > 1.5 * ground["overcast"]
    assert contrast["fog"] < 0.8 * contrast["day"]
    # Overcast light has no colour of its own; dusk is warmer in the sky than day.
    warmth = {name: (v[:, :20, :, 0] - v[:, :20, :, 2]).mean() for name, v in views.items()}
    assert warmth["day"] < warmth["overcast"] < warmth["dusk"] + 20


def edges(image: np.ndarray) -> np.ndarray:
    """Where the picture changes, blurred a little, as a unit vector."""
    grey = image.astype(float).mean(-1)
    strength = np.abs(np.diff(grey, axis=0))[:, 1:] + np.abs(np.diff(grey, axis=1))[1:]
    strength = np.sqrt(strength[: strength.shape[0] // 4 * 4, : strength.shape[1] // 4 * 4])
    blocks = strength.reshape(strength.shape[0] // 4, 4, strength.shape[1] // 4, 4).mean((1, 3)).ravel()
    return (blocks - blocks.mean()) / np.linalg.norm(blocks - blocks.mean())


@pytest.mark.parametrize("name", ["overcast", "dusk", "rain", "morning"])
def test_conditions_keep_the_geometry(town: Town, poses: list[Pose], name: str) -> None:
    """The outlines at a pose in other conditions are those of the same pose by day, not of another pose."""
    by_day = np.stack([edges(render_view(town, p, "day", SIZE)) for p in poses])
    changed = np.stack([edges(render_view(town, p, vary(name, noise=0.0, rain=0.0), SIZE)) for p in poses])
    similarity = changed @ by_day.T
    assert np.mean(similarity.argmax(1) == np.arange(len(poses))) >= 0.8


def test_near_poses_look_more_alike_than_far_ones(town: Town) -> None:
    """By the oldest descriptor there is: a small, grey, normalised picture."""

    def tiny(pose: Pose) -> np.ndarray:
        image = Image.fromarray(render_view(town, pose, "overcast", (96, 96))).convert("L").resize((16, 16))
        values = np.asarray(image, float).ravel()
        return (values - values.mean()) / values.std()

    closer = 0
    routes = drive(town, 10.0)
    for route in routes:
        here, there = route[9], routes[0][4] if route is not routes[0] else routes[1][4]
        rng = np.random.default_rng(1)
        near = shifted(here, rng, sideways_m=0.6, along_m=0.8, turn_deg=2)
        closer += np.linalg.norm(tiny(here) - tiny(near)) < np.linalg.norm(tiny(here) - tiny(there))
    assert closer == len(routes)


def test_depth_agrees_with_the_plan(town: Town) -> None:
    """Depth of a wall straight ahead: compare with the nearest crossing of the viewing ray and the plan's walls."""
    a, b = town.walls.a.astype(float), town.walls.b.astype(float)
    checked = 0
    for route in drive(town, 15.0):
        for pose in route[3:8:2]:
            sideways = replace(pose, heading=(pose.heading + 90) % 360)
            # The middle of the picture lies between two columns; an odd width has a middle column.
            depth = trace_depth(town, sideways, (101, 101))
            look = np.array([math.sin(math.radians(sideways.heading)), math.cos(math.radians(sideways.heading))])
            edge, offset = b - a, a - [pose.x, pose.y]
            cross = look[0] * edge[:, 1] - look[1] * edge[:, 0]
            with np.errstate(divide="ignore", invalid="ignore"):
                t = (offset[:, 0] * edge[:, 1] - offset[:, 1] * edge[:, 0]) / cross
                u = (offset[:, 0] * look[1] - offset[:, 1] * look[0]) / cross
            faces_us = offset[:, 0] * edge[:, 1] - offset[:, 1] * edge[:, 0] < 0
            crossings = t[(u >= 0) & (u <= 1) & (t > 0) & faces_us]
            if not len(crossings) or crossings.min() > 60:
                continue
            # At eye level the first wall is hit whatever its height.
            row = round(0.62 * 101) - 1
            np.testing.assert_allclose(depth[row, 50], crossings.min(), rtol=0.01)
            checked += 1
    assert checked >= 8


def test_depth_of_the_ground_follows_the_camera_height(town: Town, poses: list[Pose]) -> None:
    low, high = (trace_depth(town, replace(poses[0], height=h), SIZE)[-1, SIZE[1] // 2] for h in (1.0, 2.0))
    assert high == pytest.approx(2 * low, rel=1e-4)


def test_moving_forward_brings_things_nearer(town: Town) -> None:
    here = drive(town, 10.0)[2][6]
    angle = math.radians(here.heading)
    ahead = replace(here, x=here.x + 4 * math.sin(angle), y=here.y + 4 * math.cos(angle))
    near, far = trace_depth(town, ahead, SIZE), trace_depth(town, here, SIZE)
    column, row = SIZE[1] // 2, round(0.62 * SIZE[0]) - 2
    assert near[row, column] == pytest.approx(far[row, column] - 4, abs=1.0)


def test_moving_the_camera_moves_the_traffic_with_the_town(town: Town, poses: list[Pose]) -> None:
    quiet, busy = (render_view(town, poses[0], vary("day", traffic=t), SIZE).astype(int) for t in (1, 2))
    assert (np.abs(quiet - busy).max(-1) > 20).mean() > 0.001  # cars and people have moved
    same = render_view(town, poses[0], vary("day", traffic=1), SIZE)
    np.testing.assert_array_equal(same, quiet)


def test_box_faces_look_outwards() -> None:
    faces = PolygonTable.of([box(3.0, -2.0, 1.0, 4.0, 2.0, 1.5, 0.7, (200, 100, 50))])
    middle = np.array([3.0, -2.0, 1.75])
    outwards = ((faces.corners[:, 0] - middle) * faces.normal).sum(1)
    assert (outwards > 0).all()
    turned = faces.placed(10.0, 5.0, 90.0)
    np.testing.assert_allclose(np.linalg.norm(turned.normal, axis=1), 1, rtol=1e-5)
    # 90 degrees clockwise from north: what lay north of the origin now lies east of it.
    np.testing.assert_allclose(
        turned.corners[0, 0],
        [faces.corners[0, 0, 1] + 10, -faces.corners[0, 0, 0] + 5, faces.corners[0, 0, 2]],
        atol=1e-4,
    )


# --- data set -----------------------------------------------------------------------------------------------


def test_dataset_parses_with_the_right_positives(dataset: TownDataset) -> None:
    places = load_dataset(dataset.folder)
    assert places.layout == "utm"
    assert places.num_references == len(dataset.database)
    assert places.num_queries == len(dataset.queries)
    references = {shot.path.name: shot for shot in dataset.database}
    queries = {shot.path.name: shot for shot in dataset.queries}
    for path, rows in zip(places.query_paths, places.ground_truth, strict=True):
        pose = queries[path.name].pose
        distance = [
            math.hypot(references[p.name].pose.x - pose.x, references[p.name].pose.y - pose.y)
            for p in places.database_paths
        ]
        # Names hold centimetres, so what lies within one of the radius is left open.
        assert (
            {i for i, d in enumerate(distance) if d < 24.98}
            <= set(rows.tolist())
            <= {i for i, d in enumerate(distance) if d < 25.02}
        )
        assert len(rows)


def test_names_hold_position_and_zone(dataset: TownDataset) -> None:
    for shot in dataset.database[:3] + dataset.queries[:3]:
        (east, north), zone = parse_utm_name(shot.path)
        assert (east, north) == pytest.approx(dataset.town.utm(shot.pose), abs=0.006)
        assert zone == "32 north"
        with Image.open(shot.path) as image:
            assert image.size == (64, 64)


def test_queries_see_other_conditions_than_the_map(dataset: TownDataset) -> None:
    assert {shot.conditions.name for shot in dataset.database} == {"day"}
    assert "day" not in {shot.conditions.name for shot in dataset.queries}
    assert len({shot.conditions.name for shot in dataset.queries}) >= 6


def test_training_split_is_elsewhere_and_labelled_by_pose(dataset: TownDataset) -> None:
    data = pytest.importorskip("tetra.training.data", reason="needs the training extra")
    places = data.gsv_cities_places(dataset.train_places)
    assert len(places) >= 3
    for place in places:
        assert len(place.paths) == 4
        lat, lon = np.array([[float(v) for v in p.name.split("_")[5:7]] for p in place.paths]).T
        metres = np.hypot((lat - lat.mean()) * 111_320, (lon - lon.mean()) * 111_320 * math.cos(math.radians(48.75)))
        assert metres.max() < 4  # one place
        assert (lon - 9.0).min() * 111_320 * math.cos(math.radians(48.75)) > 1_500  # another district
    videos = data.find_images([dataset.train_videos])
    assert len(videos) >= 5
    assert dataset.n_train_images == sum(len(p.paths) for p in places) + len(videos) + len(
        data.find_images([dataset.folder / "train" / "probe"])
    )


def test_dataset_is_the_same_with_more_processes(dataset: TownDataset, tmp_path: Path) -> None:
    again = write_town_dataset(
        tmp_path,
        seed=3,
        size=(64, 64),
        max_streets=1,
        database_spacing_m=12,
        query_spacing_m=16,
        place_spacing_m=40,
        video_spacing_m=30,
        workers=2,
    )
    for one, two in zip(dataset.queries, again.queries, strict=True):
        assert one.path.name == two.path.name
        assert one.path.read_bytes() == two.path.read_bytes()


# --- report -------------------------------------------------------------------------------------------------


class _Links(HTMLParser):
    """Collects whatever a browser would fetch, and the tags in order."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset", "poster")]
        if tag not in ("img", "meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_self_contained(page: str) -> None:
    links = _Links()
    links.feed(page)
    assert not links.open  # every tag is closed
    assert links.targets
    assert all(target.startswith("data:image/") for target in links.targets)
    styled = re.findall(r"url\(([^)]*)\)", page)
    assert all(target.startswith("data:image/") for target in styled)
    assert "<script" not in page
    assert "@import" not in page


def test_report_is_one_file_with_the_numbers_given(town: Town, tmp_path: Path) -> None:
    photo = jpeg(render_view(town, drive(town, 10.0)[0][3], "day", (60, 90)))
    report = Report("Where <b>am</b> I?", "A & B", photo)
    report.cards([("recall", "87.5 %", "of 40"), ("size", "1.71 MiB", "was 18.4")])
    table = Table(
        ["name", "R@1"],
        [["float", "91.25"], ["<binary>", "90.75"]],
        "Numbers & more",
        frozenset({(0, 1)}),
        frozenset({(1, 1)}),
        frozenset({1}),
    )
    chart = line_chart(
        {"loss": ([0, 1, 2], [3.0, 2.0, 1.5])},
        "step",
        "loss",
        twin={"lambda": ([0, 2], [0.0, 1.0])},
        twin_label="lambda",
        split_at=1,
    )
    report.section(
        "Numbers", "What came out.", table, [Picture(chart, "Loss falls."), Picture(photo, 'A "photo"', True)]
    )
    report.gallery([Picture(photo, f"view {i}", True) for i in range(3)], wide=True)
    path = report.write(tmp_path / "index.html", "made by a test")
    page = path.read_text()
    assert_self_contained(page)
    for number in ("87.5 %", "1.71 MiB", "91.25", "90.75", "made by a test"):
        assert number in page
    assert "&lt;b&gt;am" in page  # text is text
    assert "&lt;binary&gt;" in page
    assert page.count("<img") == 5


def test_pictures_in_the_page_decode_to_what_was_given() -> None:
    image = np.full((20, 30, 3), 77, np.uint8)
    kind, data = data_uri(jpeg(image)).split(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (30, 20)
    svg = bar_chart(["fog", "rain"], {"a": [10, 20], "b": [30, 40]}, "%")
    kind, data = data_uri(svg).split(";base64,")
    assert kind == "data:image/svg+xml"
    assert base64.b64decode(data).decode() == svg


def test_charts_are_reproducible() -> None:
    make = [
        lambda: line_chart({"loss": ([0, 1], [2, 1])}, "x", "y", markers=True, y_from_zero=True),
        lambda: bar_chart(["a"], {"s": [1.0]}, "y", top=5),
        lambda: stacked_bars(["before", "after"], {"ternary": [9.0, 0.6], "rest": [1.0, 0.5]}, "MiB", "MiB"),
    ]
    for chart in make:
        assert chart() == chart()
        assert chart().lstrip().startswith("<?xml")


def test_town_map_marks_right_and_wrong_answers(town: Town) -> None:
    positions = [(p.x, p.y) for p in drive(town, 20.0)[0]]
    found = [Localised((100.0, 100.0), (104.0, 101.0), True), Localised((200.0, 200.0), (120.0, 220.0), False)]
    picture = np.asarray(Image.open(io.BytesIO(town_map(town, positions, found)))).astype(int)
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    assert ((red > 200) & (green < 110) & (blue < 100)).sum() > 50
    assert ((green > 180) & (red < 90) & (blue < 160)).sum() > 20


def test_unwritable_report_is_one_clear_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(TetraError):
        Report("t", "s", jpeg(np.zeros((4, 4, 3), np.uint8))).write(blocker / "index.html")


# --- the whole demo -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fast_demo_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="needs the demo extra")
    from tetra.demo import run_demo

    torch.manual_seed(0)
    save(create_model("nano", "mixvpr").pack(torch.float16), tmp_path / "model.safetensors")
    out = tmp_path / "report"
    (out / "town").mkdir(parents=True)
    (out / "town" / "stale.jpg").write_bytes(b"left by an earlier run")
    (out / "mine.txt").write_text("not the demo's")
    path = run_demo(out, seed=1, fast=True, model=tmp_path / "model.safetensors")
    assert path == out / "index.html"
    page = path.read_text()
    assert_self_contained(page)
    assert "tetra" in page
    assert not (out / "town" / "stale.jpg").exists()
    assert (out / "mine.txt").read_text() == "not the demo's"
    places = load_dataset(out / "town")
    assert f"{places.num_queries} queries" in page
    assert (out / "student" / "packed.safetensors").stat().st_size < 600_000


def test_demo_refuses_a_file_as_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="needs the demo extra")
    from tetra.demo import run_demo

    save(create_model("nano", "gem").pack(torch.float16), tmp_path / "model.safetensors")
    with pytest.raises(TetraError, match=r"model\.safetensors.*folder"):
        run_demo(tmp_path / "model.safetensors", fast=True, model=tmp_path / "model.safetensors")
