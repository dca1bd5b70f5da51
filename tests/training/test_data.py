"""Training data: views, caches, places and the order of steps, all pure functions of the seed."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from tetra.errors import DatasetError, ImageError, TrainingError
from tetra.images import load_image
from tetra.training.data import (
    CachedViews,
    Place,
    PlaceBatches,
    StepSampler,
    ViewDataset,
    crop_box,
    find_images,
    gsv_cities_places,
    load_view,
    photo_places,
    square_box,
    video_places,
)
from tetra.training.teachers import CnnTeacher, resample_tokens

# --- views ---


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.text(max_size=5), st.floats(0.05, 1.0))
def test_crops_lie_inside_the_image(height: int, width: int, key: str, min_scale: float) -> None:
    (left, top, right, bottom), mirror = crop_box(height, width, key, min_scale)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert isinstance(mirror, bool)
    assert crop_box(height, width, key, min_scale) == ((left, top, right, bottom), mirror)
    if min(height, width) >= 100:
        # Where the aspect would leave the image, the crop ends at its side; that costs at most a quarter.
        share = (right - left) * (bottom - top) / (height * width)
        assert share >= min_scale * 0.75 - 0.02


def test_crops_and_mirrors_vary() -> None:
    drawn = [crop_box(200, 300, str(i), 0.3) for i in range(400)]
    assert len({box for box, _ in drawn}) > 380
    assert 120 < sum(mirror for _, mirror in drawn) < 280
    ratios = [(r - left) / (b - t) / 1.5 for (left, t, r, b), _ in drawn]
    assert min(ratios) >= 0.74
    assert max(ratios) <= 1.35


def test_the_first_view_is_the_whole_image(pictures: Path) -> None:
    paths = find_images([pictures])
    assert len(paths) == 24
    dataset = ViewDataset(paths, (40, 48), views=3)
    assert len(dataset) == 72
    assert torch.equal(dataset[3]["images"], load_image(paths[1]))
    assert dataset[3]["index"] == 3
    assert dataset[4]["images"].shape == (3, 40, 48)
    assert not torch.equal(dataset[4]["images"], dataset[3]["images"])
    assert not torch.equal(dataset[4]["images"], dataset[5]["images"])


def test_views_are_crops_of_their_image(pictures: Path) -> None:
    path = find_images([pictures])[0]
    view = load_view(path, (20, 24), "some key", 0.3)
    box, mirror = crop_box(40, 48, "some key", 0.3)
    with Image.open(path) as image:
        expected = image.convert("RGB").resize((24, 20), Image.Resampling.BILINEAR, box=box)
    array = np.asarray(expected)
    array = array[:, ::-1] if mirror else array
    np.testing.assert_array_equal(view.permute(1, 2, 0).numpy(), array)


def test_views_depend_on_seed_and_index_alone(pictures: Path) -> None:
    paths = find_images([pictures])
    first, again = ViewDataset(paths, (24, 24), 2, seed=4), ViewDataset(paths, (24, 24), 2, seed=4)
    torch.manual_seed(99)
    for index in (47, 3, 11):
        assert torch.equal(first[index]["images"], again[index]["images"])
    other = ViewDataset(paths, (24, 24), 2, seed=5)
    assert any(not torch.equal(first[i]["images"], other[i]["images"]) for i in range(1, 48, 2))
    assert torch.equal(first[0]["images"], other[0]["images"])  # whole images have nothing to draw


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 900), st.text(max_size=5))
def test_squares_lie_inside_the_image(height: int, width: int, side: int, key: str) -> None:
    left, top, right, bottom = square_box(height, width, side, key)
    assert right - left == bottom - top == min(side, height, width)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert square_box(height, width, side, key) == (left, top, right, bottom)


def test_squares_are_cut_anew_in_every_epoch(draw_pictures: Callable[..., list[Path]], tmp_path: Path) -> None:
    paths = draw_pictures(tmp_path, 3, height=24, width=120)
    panoramas = ViewDataset(paths, (24, 24), seed=2, crop=24)
    whole = load_image(paths[1])
    columns = set()
    for epoch in range(6):
        item = panoramas[epoch, 1]
        assert item["index"] == 1
        found = [x for x in range(97) if torch.equal(whole[:, :, x : x + 24], item["images"])]
        assert len(found) == 1  # a window of the panorama, of its height, neither squashed nor mirrored
        columns |= set(found)
    assert len(columns) > 3
    assert torch.equal(panoramas[0, 1]["images"], panoramas[1]["images"])
    again = ViewDataset(paths, (24, 24), seed=2, crop=24)
    assert torch.equal(again[5, 1]["images"], panoramas[5, 1]["images"])
    other = ViewDataset(paths, (24, 24), seed=3, crop=24)
    assert any(not torch.equal(other[e, 1]["images"], panoramas[e, 1]["images"]) for e in range(3))
    both = ViewDataset(paths, (24, 24), views=2, seed=2, crop=24)
    assert len(both) == 6
    assert any(not torch.equal(both[e, 2]["images"], both[e, 3]["images"]) for e in range(3))
    # Without a crop every epoch sees the same views, as a cache of them has to.
    views = ViewDataset(paths, (24, 24), views=2)
    assert all(torch.equal(views[e, 3]["images"], views[3]["images"]) for e in range(3))


def test_of_a_small_image_the_largest_square_is_cut(draw_pictures: Callable[..., list[Path]], tmp_path: Path) -> None:
    path = draw_pictures(tmp_path, 1, height=24, width=24)[0]
    assert torch.equal(ViewDataset([path], (24, 24), crop=512)[3, 0]["images"], load_image(path))


def test_fingerprints_follow_what_items_depend_on(pictures: Path) -> None:
    paths = find_images([pictures])
    prints = {
        ViewDataset(paths, (24, 24), 2).fingerprint(),
        ViewDataset(paths, (24, 32), 2).fingerprint(),
        ViewDataset(paths, (24, 24), 3).fingerprint(),
        ViewDataset(paths, (24, 24), 2, seed=1).fingerprint(),
        ViewDataset(paths, (24, 24), 2, min_scale=0.5).fingerprint(),
        ViewDataset(paths[1:], (24, 24), 2).fingerprint(),
        ViewDataset(paths[::-1], (24, 24), 2).fingerprint(),
        ViewDataset(paths, (24, 24), 2, crop=16).fingerprint(),
        ViewDataset(paths, (24, 24), 2, crop=17).fingerprint(),
    }
    assert len(prints) == 9
    assert ViewDataset(paths, (24, 24), 2).fingerprint() in prints


def test_finding_images(pictures: Path, tmp_path: Path) -> None:
    assert [p.parent.name for p in find_images([pictures], [pictures / "one"])] == ["two"] * 12
    assert find_images([pictures / "two", pictures / "one"])[0].parent.name == "two"
    with pytest.raises(DatasetError, match="three: excluded from training but not there"):
        find_images([pictures], [pictures / "three"])
    with pytest.raises(DatasetError, match="three"):
        find_images([pictures / "three"])
    with pytest.raises(DatasetError, match="no images"):
        find_images([tmp_path])
    with pytest.raises(DatasetError, match="no training images"):
        ViewDataset([], (8, 8))


def test_a_damaged_image_is_named(draw_pictures: Callable[..., list[Path]], tmp_path: Path) -> None:
    path = draw_pictures(tmp_path, 1)[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ImageError, match=path.name):
        ViewDataset([path], (8, 8))[0]


# --- cache ---


class Counting(CnnTeacher):
    """A one-layer teacher that counts the images it saw."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.seen = 0
        super().__init__(nn.Sequential(nn.Conv2d(3, 6, 8, stride=8), nn.ReLU()), ["1"])
        self.seen = 0

    def forward(self, images: Tensor, n_attention: int = 0) -> Any:
        self.seen += len(images)
        return super().forward(images, n_attention)


class SmallChunks(CachedViews):
    CHUNK = 7


@pytest.fixture
def views(pictures: Path) -> ViewDataset:
    return ViewDataset(find_images([pictures]), (32, 32), 2)  # 48 views


def contents(cache: CachedViews) -> list[dict[str, Any]]:
    return [cache[i] for i in range(len(cache))]


def assert_equal_items(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x["index"] == y["index"]
        for name in ("images", "cls", "patches"):
            assert torch.equal(x[name], y[name]), name


@pytest.mark.parametrize("grid", [None, (4, 4), (2, 3)])
def test_the_cache_holds_views_and_the_teacher_s_outputs(
    grid: tuple[int, int] | None, views: ViewDataset, tmp_path: Path
) -> None:
    teacher = Counting()
    cache = SmallChunks(views, tmp_path / "cache", grid)
    cache.fill(teacher)
    assert teacher.seen == len(cache) == 48
    for i in (0, 7, 13, 47):
        item = cache[i]
        assert item["index"] == i
        assert torch.equal(item["images"], views[i]["images"])
        out = teacher(views[i]["images"][None].float() / 255)
        patches = out.patches if grid is None else resample_tokens(out.patches, grid).unflatten(1, grid)
        assert item["cls"].dtype == item["patches"].dtype == torch.float16
        assert item["patches"].shape == (*(grid or (4, 4)), 6)
        # bfloat16 where the machine has it, and float16 in the file.
        torch.testing.assert_close(item["cls"].float(), out.cls[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(item["patches"].float(), patches[0], rtol=2e-2, atol=2e-2)


def test_the_teacher_may_see_another_size(views: ViewDataset, tmp_path: Path) -> None:
    cache = SmallChunks(views, tmp_path / "cache")
    cache.fill(Counting(), teacher_size=64)
    assert cache[0]["patches"].shape == (8, 8, 6)
    assert cache[0]["images"].shape == (3, 32, 32)


def test_an_interrupted_cache_goes_on(views: ViewDataset, tmp_path: Path) -> None:
    whole = SmallChunks(views, tmp_path / "whole")
    whole.fill(Counting())
    expected = contents(whole)

    folder = tmp_path / "cache"
    SmallChunks(views, folder).fill(Counting())
    manifest = json.loads((folder / "cache.json").read_text())
    assert manifest["done"] == 48
    # As if it had stopped after the third chunk, in the middle of writing the fourth.
    (folder / "cache.json").write_text(json.dumps({**manifest, "done": 21}))
    for name in ("images", "cls", "patches"):
        array = np.load(folder / f"{name}.npy", mmap_mode="r+")
        array[21:] = 0
        array.flush()
    teacher = Counting()
    again = SmallChunks(views, folder)
    again.fill(teacher)
    assert teacher.seen == 48 - 21
    assert_equal_items(contents(again), expected)
    teacher.seen = 0
    again.fill(teacher)
    assert teacher.seen == 0
    assert_equal_items(contents(again), expected)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"fingerprint": 3}', '{"done": 48}'])
def test_a_damaged_manifest_starts_the_cache_anew(text: str, views: ViewDataset, tmp_path: Path) -> None:
    SmallChunks(views, tmp_path).fill(Counting())
    (tmp_path / "cache.json").write_text(text)
    teacher = Counting()
    SmallChunks(views, tmp_path).fill(teacher)
    assert teacher.seen == 48


@pytest.mark.parametrize("done", [-1, 49, "x", None])
def test_a_manifest_that_counts_wrong_starts_the_cache_anew(done: object, views: ViewDataset, tmp_path: Path) -> None:
    SmallChunks(views, tmp_path).fill(Counting())
    manifest = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps({**manifest, "done": done}))
    teacher = Counting()
    SmallChunks(views, tmp_path).fill(teacher)
    assert teacher.seen == 48


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5])
def test_a_truncated_array_starts_the_cache_anew(share: float, views: ViewDataset, tmp_path: Path) -> None:
    SmallChunks(views, tmp_path).fill(Counting())
    data = (tmp_path / "patches.npy").read_bytes()
    (tmp_path / "patches.npy").write_bytes(data[: int(share * len(data))])
    teacher = Counting()
    SmallChunks(views, tmp_path).fill(teacher)
    assert teacher.seen == 48
    assert (tmp_path / "patches.npy").read_bytes() == data


@pytest.mark.parametrize("lost", ["images", "cls", "patches"])
def test_a_lost_array_is_made_again(lost: str, views: ViewDataset, tmp_path: Path) -> None:
    SmallChunks(views, tmp_path).fill(Counting())
    manifest = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps({**manifest, "done": 21}))
    (tmp_path / f"{lost}.npy").unlink()
    cache = SmallChunks(views, tmp_path)
    cache.fill(Counting())
    expected = SmallChunks(views, tmp_path / "expected")
    expected.fill(Counting())
    assert_equal_items(contents(cache), contents(expected))


def test_another_teacher_other_data_or_another_size_fill_it_anew(
    views: ViewDataset, pictures: Path, tmp_path: Path
) -> None:
    SmallChunks(views, tmp_path).fill(Counting())
    expected = SmallChunks(views, tmp_path / "expected")
    expected.fill(Counting(1))
    teacher = Counting(1)
    cache = SmallChunks(views, tmp_path)
    cache.fill(teacher)
    assert teacher.seen == 48
    assert_equal_items(contents(cache), contents(expected))
    teacher.seen = 0
    SmallChunks(views, tmp_path, grid=(2, 2)).fill(teacher)
    assert teacher.seen == 48
    fewer = ViewDataset(find_images([pictures / "one"]), (32, 32), 2)
    SmallChunks(fewer, tmp_path, grid=(2, 2)).fill(teacher)
    assert teacher.seen == 48 + 24
    assert len(np.load(tmp_path / "images.npy", mmap_mode="r")) == 24


def test_a_cache_travels_to_loader_processes(views: ViewDataset, tmp_path: Path) -> None:
    import pickle

    cache = SmallChunks(views, tmp_path)
    cache.fill(Counting())
    expected = cache[5]
    raw = pickle.dumps(cache)
    assert len(raw) < 20_000  # paths, not arrays
    assert_equal_items([pickle.loads(raw)[5]], [expected])


# --- places ---

COLUMNS = ["place_id", "year", "month", "northdeg", "city_id", "lat", "lon", "panoid"]


def gsv_cities(root: Path, city: str = "London", places: int = 3, images: int = 4) -> list[dict[str, Any]]:
    """A small data set in GSV-Cities layout; returns its rows."""
    rows = []
    (root / "Images" / city).mkdir(parents=True)
    (root / "Dataframes").mkdir(exist_ok=True)
    for place in range(places):
        for i in range(images):
            row = {
                "place_id": 1234500007 + place,
                "year": 2010 + i,
                "month": i + 1,
                "northdeg": 7 * i,
                "city_id": city,
                "lat": f"51.{place}5",
                "lon": "-0.125",
                "panoid": f"p{place}_{i}-x",
            }
            rows.append(row)
            name = f"{city}_{7 + place:07d}_{2010 + i}_{i + 1:02d}_{7 * i:03d}_51.{place}5_-0.125_p{place}_{i}-x.jpg"
            Image.new("RGB", (16, 12), (80 * place, 40 * i, 9)).save(root / "Images" / city / name)
    write_frame(root / "Dataframes" / f"{city}.csv", rows)
    return rows


def write_frame(path: Path, rows: list[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def test_gsv_cities_layout(tmp_path: Path) -> None:
    gsv_cities(tmp_path, "London")
    gsv_cities(tmp_path, "Oslo", places=2, images=5)
    places = gsv_cities_places(tmp_path)
    assert [len(place.paths) for place in places] == [4, 4, 4, 5, 5]
    assert all(path.is_file() for place in places for path in place.paths)
    for place in places:
        assert len({path.name.split("_")[1] for path in place.paths}) == 1
    assert len(gsv_cities_places(tmp_path, ["Oslo"])) == 2
    assert len(gsv_cities_places(tmp_path, ["Oslo", "London"])) == 5


def test_gsv_cities_leaves_out_places_with_few_images(tmp_path: Path) -> None:
    rows = gsv_cities(tmp_path)
    write_frame(tmp_path / "Dataframes" / "London.csv", rows[1:])
    assert [len(p.paths) for p in gsv_cities_places(tmp_path)] == [4, 4]
    assert [len(p.paths) for p in gsv_cities_places(tmp_path, min_images=2)] == [3, 4, 4]
    with pytest.raises(DatasetError, match="no place with at least 9 images"):
        gsv_cities_places(tmp_path, min_images=9)


def test_gsv_cities_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="not in GSV-Cities layout; expected the folders Dataframes and Images"):
        gsv_cities_places(tmp_path)
    rows = gsv_cities(tmp_path)
    with pytest.raises(DatasetError, match=r"Paris.csv: no such city; known: London"):
        gsv_cities_places(tmp_path, ["Paris"])
    frame = tmp_path / "Dataframes" / "London.csv"
    write_frame(frame, rows, [c for c in COLUMNS if c != "panoid"])
    with pytest.raises(DatasetError, match=r"London.csv, line 2: bad or missing column.*panoid"):
        gsv_cities_places(tmp_path)
    write_frame(frame, [*rows[:3], {**rows[3], "year": "soon"}])
    with pytest.raises(DatasetError, match=r"London.csv, line 5: .*soon"):
        gsv_cities_places(tmp_path)
    write_frame(frame, rows)
    next((tmp_path / "Images" / "London").iterdir()).unlink()
    with pytest.raises(DatasetError, match="listed in a data frame but not there"):
        gsv_cities_places(tmp_path)


def test_a_truncated_gsv_row_is_named(tmp_path: Path) -> None:
    rows = gsv_cities(tmp_path)
    frame = tmp_path / "Dataframes" / "London.csv"
    write_frame(frame, rows)
    text = frame.read_text().rstrip()
    frame.write_text(text[: text.rindex(",")])  # the last row ends before its panoid
    with pytest.raises(DatasetError, match=r"London.csv, line 13: bad or missing column"):
        gsv_cities_places(tmp_path)


def test_windows_of_video(draw_pictures: Callable[..., list[Path]], tmp_path: Path) -> None:
    draw_pictures(tmp_path / "a", 11, 12, 12)
    draw_pictures(tmp_path / "b", 3, 12, 12)
    places = video_places(tmp_path, window=4, stride=3)
    names = [[int(p.stem[-4:]) for p in place.paths] for place in places]
    assert names == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [0, 1, 2]]
    assert all(len({p.parent for p in place.paths}) == 1 for place in places)
    # By default neighbouring places share no view.
    assert [int(p.paths[0].stem[-4:]) for p in video_places(tmp_path / "a", window=2)] == [0, 8]


def test_photos_are_places(pictures: Path) -> None:
    places = photo_places(pictures)
    assert len(places) == 24
    assert all(len(place.paths) == 1 for place in places)


@pytest.mark.parametrize("keep_decoded", [False, True])
def test_places_give_images_of_their_own(keep_decoded: bool, pictures: Path) -> None:
    places = video_places(pictures, window=6, stride=6)
    dataset = PlaceBatches(places, (24, 32), images_per_place=4, seed=3, min_scale=1.0, keep_decoded=keep_decoded)
    assert len(dataset) == len(places) == 4
    item = dataset[0, 2]
    assert item["label"] == 2
    assert item["images"].shape == (4, 3, 24, 32)
    assert item["images"].dtype == torch.uint8
    assert torch.equal(item["images"], dataset[0, 2]["images"])
    assert torch.equal(dataset[2]["images"], item["images"])
    assert not torch.equal(dataset[1, 2]["images"], item["images"])  # another epoch, another draw


def test_images_of_a_place_are_drawn_without_repetition(tmp_path: Path) -> None:
    paths = []
    for i in range(6):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (20, 20), (i * 40, 0, 0)).save(path)
        paths.append(path)
    dataset = PlaceBatches([Place(tuple(paths)), Place(tuple(paths[:2]))], (8, 8), images_per_place=4)
    seen = set()
    for epoch in range(10):
        colours = [int(image[0, 0, 0]) for image in dataset[epoch, 0]["images"]]
        assert len(set(colours)) == 4
        seen.update(colours)
        few = [int(image[0, 0, 0]) for image in dataset[epoch, 1]["images"]]
        assert set(few) == {0, 40}
    assert len(seen) == 6


def test_one_place_is_too_few(pictures: Path) -> None:
    with pytest.raises(DatasetError, match="1 training places; at least 2"):
        PlaceBatches(photo_places(pictures)[:1], (8, 8))


# --- the order of steps ---


@settings(deadline=None)
@given(st.integers(1, 23), st.integers(1, 9), st.integers(1, 30), st.integers(0, 5))
def test_every_epoch_is_a_permutation(n_items: int, batch_size: int, n_steps: int, seed: int) -> None:
    sampler = StepSampler(n_items, batch_size, n_steps, seed)
    batches = list(sampler)
    assert len(batches) == len(sampler) == n_steps
    assert all(len(batch) == batch_size for batch in batches)
    flat = [i for batch in batches for i in batch]
    for start in range(0, len(flat) - n_items + 1, n_items):
        assert sorted(flat[start : start + n_items]) == list(range(n_items))
    assert len(set(flat[len(flat) // n_items * n_items :])) == len(flat) % n_items
    assert list(StepSampler(n_items, batch_size, n_steps, seed)) == batches


@settings(deadline=None)
@given(st.integers(1, 23), st.integers(1, 9), st.integers(1, 20), st.data())
def test_a_later_first_step_goes_on_exactly(n_items: int, batch_size: int, n_steps: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, n_steps))
    whole = list(StepSampler(n_items, batch_size, n_steps, 7, with_epoch=True))
    resumed = StepSampler(n_items, batch_size, n_steps, 7, with_epoch=True)
    resumed.first_step = first
    assert list(resumed) == whole[first:]
    for step, batch in enumerate(whole):
        for k, (epoch, _) in enumerate(batch):
            assert epoch == (step * batch_size + k) // n_items


def test_epochs_and_seeds_differ() -> None:
    batches = list(StepSampler(50, 50, 3, 1))
    assert batches[0] != batches[1] != batches[2]
    assert batches[0] != next(iter(StepSampler(50, 50, 3, 2)))


@pytest.mark.parametrize(("n_items", "batch_size"), [(0, 4), (4, 0), (-1, 2)])
def test_nothing_to_sample(n_items: int, batch_size: int) -> None:
    with pytest.raises(TrainingError, match="both must be positive"):
        StepSampler(n_items, batch_size, 3, 0)


@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(0, 2**32),
)
def test_processes_share_every_batch(n_items: int, part: int, n: int, n_steps: int, seed: int) -> None:
    """Put together in the order of their ranks, their parts are the batch of one process, across epochs too."""
    whole = list(StepSampler(n_items, part * n, n_steps, seed, with_epoch=True))
    parts = [list(StepSampler(n_items, part * n, n_steps, seed, True, rank, n)) for rank in range(n)]
    for step, batch in enumerate(whole):
        assert [item for own in parts for item in own[step]] == batch
        assert {len(own[step]) for own in parts} == {part}


def test_processes_cant_share_some_batches() -> None:
    with pytest.raises(TrainingError, match=r"a batch of 10 can't be shared by 3 processes"):
        StepSampler(50, 10, 1, 0, False, 0, 3)


@pytest.mark.parametrize("n_items", [3, 5, 9])
def test_a_batch_of_two_never_has_one_item_twice(n_items: int) -> None:
    for seed in range(30):
        for batch in StepSampler(n_items, 2, 40, seed):
            assert len(set(batch)) == 2
