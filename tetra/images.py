"""Image files in, uint8 tensors out: the one place that decodes pictures.

Whatever the file holds, :func:`load_image` gives an upright 8-bit RGB tensor, so that nothing behind it has
to know about colour modes:

=====================  ===========================================================================
file                   result
=====================  ===========================================================================
EXIF orientation       applied: the picture stands as the photographer saw it
greyscale, 1-bit       the grey value in all three channels
16-bit greyscale       scaled, 0..65535 to 0..255 with rounding (not clipped)
palette                its colours
transparency           laid over black, whatever the mode (alpha is not a colour the model has seen)
CMYK, YCbCr            converted to RGB by Pillow, without colour profiles
animation, pages       the first frame
32-bit int or float    refused: such files do not say which values are black and white
LAB                    refused: it needs a colour profile
=====================  ===========================================================================
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from tetra.errors import DatasetError, ImageError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Files with these endings, in either case, are taken for images."""

logger = logging.getLogger(__name__)


def load_image(path: str | Path, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Decode the image file ``path`` to uint8 [3, H, W], RGB, upright.

    ``size`` is (height, width) in pixels: the whole picture is squashed to it by an antialiased bicubic
    filter, whatever its shape. None keeps the size of the file.

    Raises :class:`~tetra.errors.ImageError` for a file that is missing, empty, truncated or no image, and for
    a ``size`` that is not positive.
    """
    path = Path(path)
    if size is not None and min(size) < 1:
        raise ImageError(f"image size {size[0]}x{size[1]}: height and width must be at least 1 pixel")
    try:
        # Given a path, Pillow maps uncompressed TIFF into memory and then turns it wrongly (seen in 13.0).
        with path.open("rb") as file, Image.open(file) as opened:
            opened.load()
            image = to_rgb(ImageOps.exif_transpose(opened), path)
            if size is not None and image.size != (size[1], size[0]):
                image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
            pixels = np.array(image)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make a decoder raise almost anything
        raise ImageError(f"{path}: {_explain(path, error)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """Bring any Pillow mode to RGB (table in the module docstring)."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)  # a 16-bit PNG is "I;16" or, in older Pillow, "I"
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{path}: 32-bit grey values from {values.min()} to {values.max()}; "
                "save the image with 8 or 16 bits a channel"
            )
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 / 255 = 257
    elif image.mode in ("F", "LAB"):
        kind = "32-bit float" if image.mode == "F" else "LAB"
        raise ImageError(f"{path}: {kind} pixels; save the image as RGB with 8 bits a channel")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return image.convert("RGB")


def _explain(path: Path, error: Exception) -> str:
    """What is wrong with an unreadable file and what to do about it, in one line."""
    if isinstance(error, FileNotFoundError):
        return "no such file; check the path"
    if isinstance(error, IsADirectoryError) or path.is_dir():
        return "is a folder, not an image; name a file in it"
    if isinstance(error, PermissionError):
        return "may not be read; change its permissions"
    if path.exists() and path.stat().st_size == 0:
        return "is empty (0 bytes); replace or remove the file"
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as file:
            start = file.read(8)
        return f"is not an image in a known format (it begins with {start!r}); replace or remove the file"
    if isinstance(error, Image.DecompressionBombError):
        return f"has too many pixels to decode safely ({error}); scale the image down"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"is damaged or truncated ({reason}); replace or remove the file"


def list_images(folder: str | Path, *, recursive: bool = False) -> list[Path]:
    """The image files of ``folder`` in natural order: 2.jpg before 10.jpg.

    ``recursive`` includes the subfolders, also those that are symbolic links. An image is a file whose name ends in
    one of ``IMAGE_SUFFIXES``; files and folders whose names begin with a dot are left out. A link that leads nowhere
    counts as an image, which cannot be read: left out in silence, it would shift the numbers of all that follow.

    Raises :class:`~tetra.errors.DatasetError` for a folder that is missing, cannot be listed or holds no image.
    """
    folder = Path(folder)
    if not folder.exists():
        raise DatasetError(f"{folder}: no such folder; check the path")
    if not folder.is_dir():
        raise DatasetError(f"{folder}: is a file; name the folder that holds the images")
    paths = [path for path in _files(folder, recursive) if _is_image_name(path)]
    if not paths:
        looked_for = " ".join(IMAGE_SUFFIXES)
        deeper = not recursive and next((path for path in _files(folder, True) if _is_image_name(path)), None)
        hint = f"but there are some in {deeper.parent}" if deeper else "put some there or name another folder"
        raise DatasetError(f"{folder}: no images (looked for {looked_for}); {hint}")
    return sorted(paths, key=lambda path: _natural_key(path.relative_to(folder)))


def _files(folder: Path, recursive: bool, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """What is no folder in ``folder``, in any order; links back to the folders ``above`` it are not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise DatasetError(f"{folder}: can't be listed: {error.strerror}; check its permissions") from None
    for entry in entries:
        if not (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()):
            yield Path(entry.path)
        elif recursive:
            yield from _files(Path(entry.path), True, above | {real})


def _is_image_name(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and (path.is_file() or path.is_symlink())


def _natural_key(path: Path) -> tuple[list[list[str | int]], str]:
    """Sort key that reads runs of digits as numbers; the exact text breaks ties (``1.jpg``, ``01.jpg``)."""
    return [_split_numbers(part) for part in path.parts], str(path)


def _split_numbers(text: str) -> list[str | int]:
    # re.split with a group alternates text and digits, so equal positions always hold the same type.
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(re.split(r"([0-9]+)", text))]


@dataclass(frozen=True)
class SkippedImage:
    """An image that could not be read: its place in the list of paths, and why."""

    index: int
    path: Path
    reason: str


def iterate_batches(
    paths: Sequence[str | Path],
    size: tuple[int, int],
    batch_size: int = 32,
    *,
    workers: int = 2,
    on_error: Literal["raise", "skip"] = "raise",
    skipped: list[SkippedImage] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Decode ``paths`` in order and yield (indices int64 [B], images uint8 [B, 3, H, W]).

    ``size`` is (height, width), as in :func:`load_image`. ``workers`` threads decode up to two batches ahead,
    so at most about three batches are in memory. All batches but the last hold ``batch_size`` images.

    ``on_error="raise"`` lets the first unreadable file end the iteration with its ImageError. ``"skip"``
    leaves the file out, logs one warning line that names it, and appends it to ``skipped`` if that list is
    given.
    """
    if batch_size < 1 or workers < 1:
        raise ValueError(f"batch_size {batch_size} and workers {workers} must be at least 1")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is 'raise' or 'skip', not {on_error!r}")

    with ThreadPoolExecutor(workers, thread_name_prefix="images") as pool:
        remaining = enumerate(paths)
        pending: deque[tuple[int, Future[torch.Tensor]]] = deque()
        indices: list[int] = []
        images: list[torch.Tensor] = []

        def submit(count: int) -> None:
            for index, path in islice(remaining, count):
                pending.append((index, pool.submit(load_image, path, size)))

        try:
            submit(2 * batch_size)
            while pending:
                index, future = pending.popleft()
                submit(1)
                try:
                    image = future.result()
                except ImageError as error:
                    if on_error == "raise":
                        raise
                    logger.warning("skipped: %s", error)
                    if skipped is not None:
                        skipped.append(SkippedImage(index, Path(paths[index]), str(error)))
                    continue
                indices.append(index)
                images.append(image)
                if len(images) == batch_size:
                    yield torch.tensor(indices), torch.stack(images)
                    indices, images = [], []
            if images:
                yield torch.tensor(indices), torch.stack(images)
        finally:  # also when the reader stops early: do not decode what nobody will see
            for _, future in pending:
                future.cancel()
