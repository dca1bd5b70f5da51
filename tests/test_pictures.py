"""Pictures are read back and looked at: borders, order, sizes; and nothing is left half-written."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tetra.errors import ImageError, TetraError
from tetra.evaluation import PrecisionRecall, precision_recall
from tetra.pictures import Match, save_match_picture, save_precision_recall

GREEN, RED, GREY, BLUE = (0x1A, 0x98, 0x50), (0xD7, 0x30, 0x27), (0x9A, 0x9A, 0x9A), (0x2B, 0x5C, 0x8A)
WHITE = (255, 255, 255)


def plain_image(path: Path, colour: str, size: tuple[int, int] = (60, 40)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def borders_from_left(picture: Path) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(border colour, image colour) of each tile, found by walking from left to right through the tiles."""
    with Image.open(picture) as image:
        width, height = image.size
        line = [image.getpixel((x, height // 2 - 10)) for x in range(width)]
    runs = [colour for colour, _ in itertools.groupby(line)]
    triples = zip(runs, runs[1:], runs[2:], strict=False)
    return [(left, middle) for left, middle, right in triples if left == right and left != WHITE]


def test_borders_say_right_wrong_and_unknown(tmp_path: Path) -> None:
    query = plain_image(tmp_path / "query.png", "#000000")
    matches = [
        Match(plain_image(tmp_path / "a.png", "#ff0000"), "3 of 64 bits", True),
        Match(plain_image(tmp_path / "b.png", "#00ff00"), "5 of 64 bits", False),
        Match(plain_image(tmp_path / "c.png", "#0000ff"), "", None),
    ]
    save_match_picture(tmp_path / "out.png", query, matches)
    assert borders_from_left(tmp_path / "out.png") == [
        (BLUE, (0, 0, 0)),
        (GREEN, (255, 0, 0)),
        (RED, (0, 255, 0)),
        (GREY, (0, 0, 255)),
    ]


def test_captions_are_drawn_below(tmp_path: Path) -> None:
    query = plain_image(tmp_path / "q.png", "#000000")
    pictures = []
    for number, caption in enumerate(["", "3 of 64 bits", "4 of 64 bits"]):
        save_match_picture(tmp_path / f"out{number}.png", query, [Match(query, caption, True)])
        with Image.open(tmp_path / f"out{number}.png") as image:
            pictures.append(np.asarray(image))
    assert pictures[0].shape == pictures[1].shape == pictures[2].shape
    for one, other in ((0, 1), (1, 2)):
        changed = np.argwhere((pictures[one] != pictures[other]).any(-1))
        assert len(changed) > 0
        assert changed[:, 0].min() > pictures[0].shape[0] * 0.6  # below the images
        assert changed[:, 1].min() > pictures[0].shape[1] / 2  # under the match, not the query


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3000, 500), (5, 9)])
def test_any_shape_of_image_fits(tmp_path: Path, size: tuple[int, int]) -> None:
    image = plain_image(tmp_path / f"{'long-name-' * 9}.png", "#123456", size)
    save_match_picture(tmp_path / "out.png", image, [Match(image, "far too long a caption " * 5, None)])
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width < 600
        assert picture.height < 400
        colours = {tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3)}
    assert (0x12, 0x34, 0x56) in colours


def test_an_unreadable_image_leaves_the_old_picture(tmp_path: Path) -> None:
    query = plain_image(tmp_path / "q.png", "#000000")
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "out.png").write_text("the old picture")
    with pytest.raises(ImageError, match=r"bad\.png"):
        save_match_picture(tmp_path / "out.png", query, [Match(tmp_path / "bad.png", "", None)])
    assert (tmp_path / "out.png").read_text() == "the old picture"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png", "out.png", "q.png"]


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    query = plain_image(tmp_path / "q.png", "#000000")
    with pytest.raises(TetraError, match="does not exist"):
        save_match_picture(tmp_path / "none" / "out.png", query, [])
    pytest.importorskip("matplotlib")
    with pytest.raises(TetraError, match="does not exist"):
        save_precision_recall(tmp_path / "none" / "out.png", precision_recall([1], [True], 1))


@pytest.mark.parametrize(
    "curve",
    [
        precision_recall([1, 2, 3, 4], [True, True, False, True], 5),
        precision_recall([1], [True], 1),
        precision_recall([7, 7], [False, False], 2),
    ],
)
def test_curve_is_drawn_without_global_state(tmp_path: Path, curve: PrecisionRecall) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    save_precision_recall(tmp_path / "curve.png", curve, title="a set, 64 bits")
    assert dict(matplotlib.rcParams) == before
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG"
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_a_better_curve_shades_more(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shaded = []
    for number, is_right in enumerate([[False, False, True, True], [True, True, True, False]]):
        path = tmp_path / f"{number}.png"
        save_precision_recall(path, precision_recall([1, 2, 3, 4], is_right, 4))
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        # The faint blue under the curve: not white, not a grey line, not dark.
        shaded.append(int(((pixels[..., 2] - pixels[..., 0] > 8) & (pixels.min(-1) > 200)).sum()))
    assert 0 < shaded[0] < shaded[1]


def test_without_matplotlib_the_curve_says_what_to_install_and_matches_still_work(tmp_path: Path) -> None:
    query = plain_image(tmp_path / "q.png", "#000000")
    code = f"""
import sys
sys.modules["matplotlib"] = None  # what an import of a missing package finds
from pathlib import Path
from tetra.errors import TetraError
from tetra.evaluation import precision_recall
from tetra.pictures import Match, save_match_picture, save_precision_recall
query = Path({str(query)!r})
save_match_picture(query.with_name("matches.png"), query, [Match(query, "0", True)])
try:
    save_precision_recall(query.with_name("curve.png"), precision_recall([1], [True], 1))
except TetraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'tetra-vpr[pictures]'" in done.stdout
    assert (tmp_path / "matches.png").is_file()
    assert not (tmp_path / "curve.png").exists()
