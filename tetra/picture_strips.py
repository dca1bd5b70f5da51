"""A frame beside the places that it was taken for: one PNG file a frame, drawn with Pillow alone."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tetra.errors import ImageError, TetraError
from tetra.files import atomic_write
from tetra.images import load_image
from tetra.localizer import Answer
from tetra.map_outputs import Places
from tetra.pictures import FAINT_TEXT, RIGHT, TILE, UNKNOWN, WRONG, Tile, draw_tiles, font

Picture = str | Path | bytes | npt.NDArray[np.uint8]
"""An image file, its bytes, or pixels [height, width, 3], RGB."""

_N_LINES = 3
_MAX_FILE_NAME = 40  # characters; of four bytes each they still make a file name, also while it is written
_VERDICTS = {True: ("accepted", RIGHT), False: ("rejected", WRONG), None: ("", UNKNOWN)}


def thumbnail(picture: Picture, side: int = 160, *, quality: int = 75) -> bytes:
    """A small JPEG file of ``picture``, its longer side at most ``side`` pixels: a few kilobytes.

    Raises :class:`~tetra.errors.ImageError` for a picture that can't be read.
    """
    image = _opened(picture)
    image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=None)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=quality, optimize=True)
    return file.getvalue()


class StripWriter:
    """Writes strips into a folder, which is created if it is missing; the map has the pictures of places.

    Files are named after the frames: ``query/7.jpg`` gives ``7.jpg.png``. Only letters, digits and ``. _ - #`` are
    kept, so that no name leads out of the folder, and a name that was given before gets a number. The same frames in
    the same order give the same files, which replace those of an earlier run.

    Raises:
        TetraError: the folder can't be made.
    """

    def __init__(self, folder: str | Path, places: Places) -> None:
        self.folder = Path(folder)
        self._places = places
        self._used: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise TetraError(f"{folder}: is a file; name a folder for the pictures") from None
        except OSError as error:
            raise TetraError(f"{folder}: can't be made: {error.strerror}; choose another folder") from None

    def write(self, name: str, frame: Picture, answer: Answer, n_matches: int = 3) -> Path:
        """Write the strip of a frame, the frame and then its nearest ``n_matches`` places, and return the file.

        The border of the frame and of the match that the answer names is green if it is accepted, red if rejected;
        other borders are grey. A place of which the map has no picture is an empty tile.

        Raises:
            ImageError: the frame can't be read.
            TetraError: the file can't be written.
        """
        verdict, colour = _VERDICTS[answer.accepted]
        found = [f"{answer.id}, {answer.distance} bits" + (f", {verdict}" if verdict else ""), _place(answer.position)]
        if answer.position is not None and answer.spread_m is not None:
            found[1] += f" ± {answer.spread_m:.1f} m"
        tiles = [Tile(f"Query {verdict}".rstrip(), colour, _opened(frame), [*found, name])]
        matches = answer.matches[:n_matches]
        pictures = self._places.thumbnails([match.row for match in matches]) if matches else []
        for rank, (match, picture) in enumerate(zip(matches, pictures, strict=True), start=1):
            is_answer = match.row == answer.row
            lines = [match.id, f"{match.distance} bits", _place(match.position)]
            title = f"{rank} {verdict}".rstrip() if is_answer else str(rank)
            tiles.append(Tile(title, colour if is_answer else UNKNOWN, _opened_if_sound(picture), lines))
        strip = draw_tiles(tiles, _N_LINES)
        path = self.folder / self._file_name(name)
        with atomic_write(path) as file:
            strip.save(file, format="PNG")
        return path

    def _file_name(self, name: str) -> str:
        stem = re.sub(r"[^\w.#-]", "_", re.split(r"[/\\]", name)[-1])[-_MAX_FILE_NAME:].lstrip(".-") or "frame"
        # Letters of file systems that know no case, or only one form of an accent, should not collide either.
        count, candidate = 1, stem
        while candidate.casefold() in self._used:
            count += 1
            candidate = f"{stem}-{count}"
        self._used.add(candidate.casefold())
        return f"{candidate}.png"


def _place(position: tuple[float, float] | None) -> str:
    return "position unknown" if position is None else f"({position[0]:.1f}, {position[1]:.1f})"


def _opened(picture: Picture) -> Image.Image:
    if isinstance(picture, (str, Path)):
        return Image.fromarray(load_image(picture).permute(1, 2, 0).contiguous().numpy())
    if isinstance(picture, bytes):
        try:
            with Image.open(io.BytesIO(picture)) as image:
                return image.convert("RGB")
        except Exception as error:  # a damaged picture can make a decoder raise almost anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"thumbnail of {len(picture)} bytes: is damaged or no picture ({reason})") from error
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ImageError(f"picture of shape {list(picture.shape)} and {picture.dtype}: expected uint8 [H, W, 3]")
    return Image.fromarray(picture)


def _opened_if_sound(picture: bytes | None) -> Image.Image:
    """A place's picture; a grey one if there is none, or if what the map was given is damaged."""
    if picture is not None:
        with contextlib.suppress(ImageError):
            return _opened(picture)
    image = Image.new("RGB", (TILE, TILE * 3 // 4), "#eeeeee")
    centre = (image.width // 2, image.height // 2)
    ImageDraw.Draw(image).text(centre, "no picture", fill=FAINT_TEXT, font=font(13), anchor="mm")
    return image
