"""Decoding of image files: every kind of file gives upright 8-bit RGB or one clear error."""

from __future__ import annotations

import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tetra.errors import DatasetError, ImageError
from tetra.images import IMAGE_SUFFIXES, SkippedImage, iterate_batches, list_images, load_image

HEIGHT, WIDTH = 12, 20
RGB = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = np.random.default_rng(2).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)


def pixels(path: Path) -> np.ndarray:
    """What load_image gives, as [H, W, 3]."""
    image = load_image(path)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    return image.permute(1, 2, 0).numpy()


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


# --- kinds of files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp", ".PNG"])
def test_rgb_files_are_read_exactly(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(RGB).save(tmp_path / f"a{suffix}", lossless=True)
    assert np.array_equal(pixels(tmp_path / f"a{suffix}"), RGB)


def test_jpeg_is_close(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, WIDTH).astype(np.uint8)[None, :, None].repeat(HEIGHT, 0).repeat(3, 2)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - smooth).max() <= 4


@pytest.mark.parametrize("suffix", [".png", ".pgm", ".tif", ".gif"])
def test_greyscale_fills_three_channels(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(GREY).save(tmp_path / f"a{suffix}")
    assert np.array_equal(pixels(tmp_path / f"a{suffix}"), grey_to_rgb(GREY))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    bits = GREY > 127
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), grey_to_rgb(bits * np.uint8(255)))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    expected = np.round(values.astype(np.float64) * 255 / 65535).astype(np.uint8)
    assert expected.min() == 0
    assert expected.max() == 255
    assert np.array_equal(pixels(tmp_path / f"a{suffix}"), grey_to_rgb(expected))


def test_big_endian_16_bit_tiff(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256], [257, 40000, 65535]], dtype=">u2")
    tags = [
        (256, 3),
        (257, 2),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8 + 2 + 12 * 9 + 4),
        (277, 1),
        (278, 2),
        (279, 12),
    ]
    header = struct.pack(">2sHI", b"MM", 42, 8) + struct.pack(">H", len(tags))
    entries = b"".join(
        struct.pack(">HHI", tag, 4, 1) + struct.pack(">I", value)
        if tag in (273, 279)
        else struct.pack(">HHIHH", tag, 3, 1, value, 0)
        for tag, value in tags
    )
    (tmp_path / "a.tif").write_bytes(header + entries + struct.pack(">I", 0) + values.tobytes())
    expected = np.round(values.astype(np.float64) * 255 / 65535).astype(np.uint8)
    assert np.array_equal(pixels(tmp_path / "a.tif"), grey_to_rgb(expected))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_transparency_is_laid_over_black(tmp_path: Path, suffix: str) -> None:
    alpha = np.random.default_rng(7).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / f"a{suffix}", lossless=True, exact=True)
    expected = RGB.astype(np.float64) * alpha[:, :, None] / 255
    got = pixels(tmp_path / f"a{suffix}")
    assert np.abs(got - expected).max() <= 1
    assert np.array_equal(got[0], np.zeros((WIDTH, 3)))
    assert np.array_equal(got[1], RGB[1])


def test_grey_with_alpha(tmp_path: Path) -> None:
    alpha = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    alpha[0] = 0
    Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)]).save(tmp_path / "a.png")
    expected = GREY.copy()
    expected[0] = 0
    assert np.array_equal(pixels(tmp_path / "a.png"), grey_to_rgb(expected))


def test_palette_and_transparent_palette(tmp_path: Path) -> None:
    index = np.random.default_rng(7).integers(0, 3, (HEIGHT, WIDTH), dtype=np.uint8)
    colours = np.array([[250, 10, 20], [0, 200, 90], [30, 60, 255]], dtype=np.uint8)
    image = Image.frombytes("P", (WIDTH, HEIGHT), index.tobytes())
    image.putpalette(colours.tobytes())
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "transparent.png", transparency=1)
    assert np.array_equal(pixels(tmp_path / "plain.png"), colours[index])
    colours[1] = 0
    assert np.array_equal(pixels(tmp_path / "transparent.png"), colours[index])


@pytest.mark.parametrize("suffix", [".tif", ".jpg"])
def test_cmyk_becomes_rgb(tmp_path: Path, suffix: str) -> None:
    ink = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    ink[:, : WIDTH // 2] = (255, 0, 0, 0)  # full cyan takes all red away
    ink[:, WIDTH // 2 :, 3] = 255  # black
    Image.frombytes("CMYK", (WIDTH, HEIGHT), ink.tobytes()).save(tmp_path / f"a{suffix}", quality=100)
    got = pixels(tmp_path / f"a{suffix}").astype(int)
    assert np.abs(got[:, 2] - (0, 255, 255)).max() <= 6
    assert np.abs(got[:, -2]).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "grey.tif", "grey16.png"])
def test_exif_orientation_is_applied(tmp_path: Path, name: str, orientation: int) -> None:
    stored = RGB if name.startswith("a.") else GREY.astype(np.uint16) * 257 if "16" in name else GREY
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / name, exif=exif)
    # Exif 2.3, tag 274: where row 0 and column 0 of the stored picture belong.
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a[::-1].swapaxes(0, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a[:, ::-1].swapaxes(0, 1),
    }[orientation]
    expected = upright(RGB) if name.startswith("a.") else grey_to_rgb(upright(GREY))
    assert np.array_equal(pixels(tmp_path / name), expected)


def test_exif_orientation_of_a_jpeg_swaps_its_sides(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (3, WIDTH, HEIGHT)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_first_frame_of_animations_and_pages(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert image.n_frames == 3
    assert np.array_equal(pixels(tmp_path / f"a{suffix}"), np.broadcast_to([255, 0, 0], (HEIGHT, WIDTH, 3)))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (224, 224)])
def test_one_pixel_is_resized_to_its_colour(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    Image.new(mode, (1, 1)).save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as image:
        colour = np.asarray(image.convert("RGB"))[0, 0]
    got = load_image(tmp_path / "a.tif", size)
    assert got.shape == (3, *size)
    assert (got.permute(1, 2, 0).numpy() == colour).all()


# --- resizing -----------------------------------------------------------------------------------------------


def test_resize_is_antialiased_bicubic_like_torch(tmp_path: Path) -> None:
    """torch's antialiased bicubic filter is the reference; Pillow rounds and clips between its two passes."""
    image = np.random.default_rng(7).integers(64, 192, (90, 133, 3), dtype=np.uint8)  # overshoots stay within 0 to 255
    Image.fromarray(image).save(tmp_path / "a.png")
    for size in [(30, 44), (224, 224), (90, 50), (13, 400)]:
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(image).permute(2, 0, 1)[None].float(), size, mode="bicubic", antialias=True
        )[0].clamp(0, 255)
        difference = (load_image(tmp_path / "a.png", size).float() - expected).abs()
        assert difference.max() <= 1.5
        assert difference.mean() <= 0.5


def test_fine_stripes_become_grey_when_shrunk(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png", (8, 8)).float() - 127.5).abs().max() <= 5


def test_exif_is_applied_before_the_resize(tmp_path: Path) -> None:
    picture = np.zeros((10, 40, 3), dtype=np.uint8)
    picture[:, :20] = 255  # stored left half is white; turned by 90 degrees clockwise it is the top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    got = load_image(tmp_path / "a.png", (8, 6)).float()
    assert got[:, 0].min() > 250
    assert got[:, -1].max() < 5


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 3)])
def test_size_must_be_positive(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="at least 1 pixel"):
        load_image(tmp_path / "a.png", size)


# --- files that cannot be read ------------------------------------------------------------------------------


def assert_one_clear_line(error: BaseException, *words: str) -> None:
    message = str(error)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "none.jpg")
    assert_one_clear_line(caught.value, "none.jpg", "no such file", "check the path")


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path)
    assert_one_clear_line(caught.value, str(tmp_path), "is a folder")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "a.jpg")
    assert_one_clear_line(caught.value, "a.jpg", "0 bytes", "replace or remove")


def test_text_file_named_jpg(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("<html>not found</html>")
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "a.jpg")
    assert_one_clear_line(caught.value, "a.jpg", "is not an image", "<html>no", "replace or remove")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".bmp", ".webp", ".gif", ".ppm"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.8])
def test_truncated_file(tmp_path: Path, suffix: str, keep: float) -> None:
    noise = np.random.default_rng(7).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"a{suffix}")
    whole = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / f"a{suffix}")
    assert_one_clear_line(caught.value, f"a{suffix}", "replace or remove")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".bmp", ".webp", ".gif", ".ppm"])
def test_flipped_bytes_never_raise_anything_else(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(RGB).save(tmp_path / f"a{suffix}")
    whole = (tmp_path / f"a{suffix}").read_bytes()
    n_refused = 0
    for position in np.random.default_rng(7).integers(0, min(len(whole), 120), 40):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        (tmp_path / f"a{suffix}").write_bytes(damaged)
        try:
            image = load_image(tmp_path / f"a{suffix}", (8, 8))
        except ImageError as error:
            assert_one_clear_line(error, f"a{suffix}")
            n_refused += 1
        else:
            assert image.shape == (3, 8, 8)
    assert n_refused > 0


def test_float_and_32_bit_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(7).random((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 1 << 20, dtype=np.int32)).save(tmp_path / "int.tif")
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "float.tif")
    assert_one_clear_line(caught.value, "float.tif", "float", "8 bits")
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "int.tif")
    assert_one_clear_line(caught.value, "int.tif", "1048576", "8 or 16 bits")


# --- folders ------------------------------------------------------------------------------------------------


def make_images(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), (number, 2 * number, 0)).save(path)
    return paths


def test_natural_order(tmp_path: Path) -> None:
    names = ["1.png", "2.png", "02a.png", "10.png", "a1b2.png", "a1b10.png", "A2.png", "b.png"]
    make_images(tmp_path, *reversed(names))
    assert [path.name for path in list_images(tmp_path)] == names


def test_only_images_and_no_hidden_files(tmp_path: Path) -> None:
    make_images(tmp_path, "a.JPG", "b.jpeg", "sub/c.png", "sub/deeper/d.webp")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "._a.jpg").write_text("a resource fork")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.JPG", "b.jpeg"]
    assert [path.name for path in list_images(str(tmp_path), recursive=True)] == [
        "a.JPG",
        "b.jpeg",
        "c.png",
        "d.webp",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    make_images(tmp_path, "map/a.png", "disk/b.png", "disk/deep/c.png")
    (tmp_path / "map" / "city").symlink_to(tmp_path / "disk")
    (tmp_path / "map" / "d.png").symlink_to(tmp_path / "disk" / "b.png")
    (tmp_path / "map" / "itself").symlink_to(tmp_path / "map")
    (tmp_path / "disk" / "deep" / "back").symlink_to(tmp_path / "map")
    (tmp_path / "link").symlink_to(tmp_path / "map")
    for root in (tmp_path / "map", tmp_path / "link"):
        names = [path.relative_to(root).as_posix() for path in list_images(root, recursive=True)]
        assert names == ["a.png", "city/b.png", "city/deep/c.png", "d.png"]
        assert [path.name for path in list_images(root)] == ["a.png", "d.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.parametrize("recursive", [False, True])
def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(tmp_path: Path, recursive: bool) -> None:
    make_images(tmp_path, "1.png", "3.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "4.png").symlink_to(tmp_path / "4.png")
    paths = list_images(tmp_path, recursive=recursive)
    assert [path.name for path in paths] == ["1.png", "2.png", "3.png", "4.png"]
    for path in (paths[1], paths[3]):
        with pytest.raises(ImageError) as caught:
            load_image(path)
        assert_one_clear_line(caught.value, str(path), "check the path" if path == paths[1] else "replace or remove")


def test_hidden_folders_are_left_out(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", ".thumbnails/a.png", ".hidden/deep/b.png")
    assert [path.name for path in list_images(tmp_path, recursive=True)] == ["a.png"]


def test_missing_folder_and_file_as_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        list_images(tmp_path / "none")
    assert_one_clear_line(caught.value, "none", "no such folder")
    (file,) = make_images(tmp_path, "a.png")
    with pytest.raises(DatasetError) as caught:
        list_images(file)
    assert_one_clear_line(caught.value, "a.png", "is a file")


def test_folder_without_images_names_the_suffixes(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DatasetError) as caught:
        list_images(tmp_path, recursive=True)
    assert_one_clear_line(caught.value, str(tmp_path), "no images", *IMAGE_SUFFIXES)


def test_folder_without_images_points_to_the_subfolder_that_has_them(tmp_path: Path) -> None:
    make_images(tmp_path, "deep/er/a.png")
    with pytest.raises(DatasetError) as caught:
        list_images(tmp_path)
    assert_one_clear_line(caught.value, str(tmp_path / "deep" / "er"))


# --- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize("workers", [1, 4])
def test_batches_hold_all_images_in_order(tmp_path: Path, batch_size: int, workers: int) -> None:
    paths = make_images(tmp_path, *(f"{i}.png" for i in range(7)))
    batches = list(iterate_batches(paths, (4, 5), batch_size, workers=workers))
    assert [len(indices) for indices, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.cat([indices for indices, _ in batches]).tolist() == list(range(7))
    assert torch.equal(torch.cat([images for _, images in batches]), torch.stack([load_image(p) for p in paths]))


def test_no_paths_give_no_batches() -> None:
    assert list(iterate_batches([], (4, 5))) == []


def test_the_first_bad_image_raises(tmp_path: Path) -> None:
    paths = make_images(tmp_path, *(f"{i}.png" for i in range(6)))
    paths[3].write_text("no image")
    with pytest.raises(ImageError, match=r"3\.png"):
        list(iterate_batches(paths, (4, 5), 2))


def test_bad_images_are_skipped_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = make_images(tmp_path, *(f"{i}.png" for i in range(8)))
    paths[0].write_text("no image")
    paths[5].unlink()
    skipped: list[SkippedImage] = []
    batches = list(iterate_batches(paths, (4, 5), 4, on_error="skip", skipped=skipped))
    assert [indices.tolist() for indices, _ in batches] == [[1, 2, 3, 4], [6, 7]]
    assert [(skip.index, skip.path) for skip in skipped] == [(0, paths[0]), (5, paths[5])]
    assert len(caplog.records) == 2
    for record, name in zip(caplog.records, ("0.png", "5.png"), strict=True):
        assert record.levelname == "WARNING"
        assert name in record.message
        assert "\n" not in record.message


def test_a_reader_that_stops_early_leaves_no_thread(tmp_path: Path) -> None:
    paths = make_images(tmp_path, *(f"{i}.png" for i in range(40)))
    batches = iterate_batches(paths, (4, 5), 2, workers=3)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"workers": 0}, {"on_error": "ignore"}])
def test_arguments_are_checked(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"batch_size|on_error"):
        list(iterate_batches(["a.png"], (4, 5), **arguments))
