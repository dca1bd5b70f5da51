"""Strips are read back and looked at: borders, order, text; and no name leads out of the folder."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tetra.coordinates import CoordinateFrame
from tetra.errors import ImageError, TetraError
from tetra.localizer import Answer, Localizer
from tetra.picture_strips import StripWriter, thumbnail
from tetra.place_map import PlaceMap

GREEN, RED, GREY, WHITE = (0x1A, 0x98, 0x50), (0xD7, 0x30, 0x27), (0x9A, 0x9A, 0x9A), (255, 255, 255)
CODES = np.random.default_rng(0).integers(0, 256, (5, 16), dtype=np.uint8)
COLOURS = [(0, 0, 200), (0, 200, 200), (200, 0, 200), (200, 200, 0), (0, 0, 0)]


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (60, 40)) -> np.ndarray:
    return np.full((size[1], size[0], 3), colour, dtype=np.uint8)


@pytest.fixture(scope="module")
def place_map(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlaceMap]:
    """Five places of one colour each; the fourth has no picture, the fifth a damaged one."""
    path = tmp_path_factory.mktemp("map") / "m"
    pictures = [*(thumbnail(plain(colour), quality=100) for colour in COLOURS[:3]), None, b"\xff\xd8\xff no picture"]
    with PlaceMap.create(path, model_hash="ab" * 32, code_bytes=16, frame=CoordinateFrame()) as made:
        ids = [f"place {i}" for i in range(5)]
        made.add_many(ids, CODES, [(30.0 * i, 0.0) for i in range(4)] + [None], thumbnails=pictures)
        yield made


def answer_of(place_map: PlaceMap, number: int = 0, accepted: bool | None = True) -> Answer:
    return replace(Localizer(None, place_map, k=5, window=1).push(CODES[number]), accepted=accepted)


def tiles_from_left(path: Path) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(border colour, image colour) of each tile, found by walking from left to right through the tiles."""
    with Image.open(path) as image:
        line = np.asarray(image).astype(int)[28 + 50]  # above the text of an empty tile
    runs = [key for key, run in itertools.groupby(map(tuple, (line // 4).tolist())) if len(list(run)) > 3]
    triples = zip(runs, runs[1:], runs[2:], strict=False)
    return [(left, middle) for left, middle, right in triples if left == right and (63, 63, 63) not in (left, middle)]


def quarter(colour: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(value // 4 for value in colour)


@pytest.mark.parametrize(("accepted", "colour"), [(True, GREEN), (False, RED), (None, GREY)])
def test_borders_say_accepted_rejected_and_unknown(
    tmp_path: Path, place_map: PlaceMap, accepted: bool | None, colour: tuple[int, int, int]
) -> None:
    answer = answer_of(place_map, 1, accepted)
    frame = plain((100, 60, 20))
    path = StripWriter(tmp_path, place_map).write("a.jpg", frame, answer, 5)
    tiles = tiles_from_left(path)
    assert [border for border, _ in tiles] == [quarter(colour)] * 2 + [quarter(GREY)] * 4
    assert tiles[0][1] == quarter((100, 60, 20))
    for (_, found), match in zip(tiles[1:], answer.matches, strict=True):
        wanted = COLOURS[match.row] if match.row < 3 else (0xEE, 0xEE, 0xEE)
        assert np.abs(np.subtract(found, quarter(wanted))).max() <= 2  # JPEG
    assert answer.matches[0].row == 1


def test_the_place_that_a_sequence_names_is_marked_wherever_it_is(tmp_path: Path, place_map: PlaceMap) -> None:
    answer = answer_of(place_map, 0)
    third = answer.matches[2]
    path = StripWriter(tmp_path, place_map).write("a", plain((9, 9, 9)), replace(answer, row=third.row, id=third.id), 3)
    assert [border for border, _ in tiles_from_left(path)] == [quarter(c) for c in (GREEN, GREY, GREY, GREEN)]


def test_captions_have_id_distance_and_position(tmp_path: Path, place_map: PlaceMap) -> None:
    answer = answer_of(place_map)
    first = answer.matches[0]
    changes = [replace(first, id="b"), replace(first, distance=7), replace(first, position=(7.0, 7.0))]
    writer = StripWriter(tmp_path, place_map)
    strips = []
    for number, match in enumerate([first, *changes]):
        path = writer.write(str(number), plain((9, 9, 9)), replace(answer, matches=(match,)))
        with Image.open(path) as image:
            strips.append(np.asarray(image).astype(int))
    text_top = 28 + strips[0].shape[0] - (28 + 54 + 14)
    for line, strip in enumerate(strips[1:]):
        rows, columns = np.nonzero((strip != strips[0]).any(-1))
        under = columns > strip.shape[1] / 2  # the frame's name differs too
        assert rows[under].min() >= text_top
        assert set((rows[under] - text_top) // 18) <= {line, line + 1}  # letters that hang below the line


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3000, 500)])
def test_any_shape_of_frame_fits(tmp_path: Path, place_map: PlaceMap, size: tuple[int, int]) -> None:
    path = StripWriter(tmp_path, place_map).write("x" * 5000, plain((18, 52, 86), size), answer_of(place_map), 0)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 14 + 236 + 14
        assert image.height < 400
        assert (18, 52, 86) in {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3)}


def test_frames_are_files_bytes_or_pixels(tmp_path: Path, place_map: PlaceMap) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    writer = StripWriter(tmp_path / "deep" / "strips", place_map)
    frames = (pixels, tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes())
    strips = [writer.write("a.png", frame, answer_of(place_map)) for frame in frames]
    assert [path.name for path in strips] == ["a.png.png", "a.png-2.png", "a.png-3.png", "a.png-4.png"]
    assert len({path.read_bytes() for path in strips}) == 1


def test_what_cannot_be_drawn_or_written(tmp_path: Path, place_map: PlaceMap) -> None:
    writer = StripWriter(tmp_path, place_map)
    answer = answer_of(place_map)
    for frame in (b"no picture", tmp_path / "none.png", np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ImageError):
            writer.write("a", frame, answer)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(TetraError, match="is a file; name a folder"):
        StripWriter(tmp_path / "file", place_map)
    with pytest.raises(TetraError, match="can't be made"):
        StripWriter(tmp_path / "file" / "x", place_map)


# --- names --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_answer(place_map: PlaceMap) -> Answer:
    return replace(answer_of(place_map), matches=())


NAMES = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["..", ".", "", "/", "../../etc/passwd", "a/b.jpg", "c/b.jpg", "B.JPG", "a\\b.jpg", "-2", "b.jpg-2"]
    ),
    st.text("ü👍\u0301", min_size=60, max_size=300),
)


@given(st.lists(NAMES, min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_names_never_leave_the_folder_nor_collide(
    tmp_path_factory: pytest.TempPathFactory, place_map: PlaceMap, tiny_answer: Answer, names: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("strips")
    writer = StripWriter(folder, place_map)
    paths = [writer.write(name, plain((1, 2, 3), (2, 2)), tiny_answer) for name in names]
    assert sorted(folder.iterdir()) == sorted(paths)
    assert len({path.name.casefold() for path in paths}) == len(names)
    assert not any(path.name.startswith((".", "-")) for path in paths)


def test_names_are_those_of_the_frames(tmp_path: Path, place_map: PlaceMap, tiny_answer: Answer) -> None:
    def named(*names: str) -> list[str]:
        writer = StripWriter(tmp_path, place_map)
        return [writer.write(name, plain((1, 2, 3), (2, 2)), tiny_answer).name for name in names]

    names = ["drive/clip.mp4#000012", "query/7.jpg", "other/7.jpg", "my picture.jpg", ".hidden"]
    wanted = ["clip.mp4#000012.png", "7.jpg.png", "7.jpg-2.png", "my_picture.jpg.png", "hidden.png"]
    assert named(*names) == wanted
    assert named(*names) == wanted  # the next run replaces them
    assert len(list(tmp_path.iterdir())) == 5


# --- thumbnails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "wanted"), [((320, 80), (160, 40)), ((80, 320), (40, 160)), ((20, 10), (20, 10)), ((1000, 1), (160, 1))]
)
def test_thumbnails_are_small_jpeg_files(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    data = thumbnail(plain((200, 100, 50), size))
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        assert image.size == wanted
        assert np.abs(np.asarray(image).astype(int) - (200, 100, 50)).max() < 5
    assert thumbnail(data) == thumbnail(data)
