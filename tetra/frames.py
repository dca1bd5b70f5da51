"""Frames from wherever they come: image files, folders, videos, and pipes such as a live camera's.

=====================  ==========================================  ====================================================
source                 frames                                      time in seconds
=====================  ==========================================  ====================================================
image file             one                                         when it was taken, since 1970, if EXIF says so
folder                 its images in natural order                 as above
video file             all, in the order in which they are shown   from the start of the video
``-``                  JPEG and PNG files, one after the other     as of image files
``raw:WIDTHxHEIGHT``   from stdin too: RGB, 3 bytes a pixel, rows  none
                       from the top
=====================  ==========================================  ====================================================
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from tetra.errors import ConfigError, ImageError
from tetra.exif import exif_time
from tetra.frame_stream import MAX_FRAME_BYTES, frame_name, split_images, split_raw
from tetra.images import IMAGE_SUFFIXES, list_images, load_image, to_rgb

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".h264", ".m2ts", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".ogv", ".ts", ".webm", ".wmv", ".y4m"),
)
"""Files with these endings, in either case, are taken for videos."""

STDIN = "stdin"
"""what frames from a pipe are named after"""

Pixels = npt.NDArray[np.uint8]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """A picture of a camera."""

    name: str
    """path of an image file; ``clip.mp4#000123`` and ``stdin#000123`` for frames numbered from 0"""
    pixels: Pixels = field(repr=False, compare=False)
    """[height, width, 3], RGB, upright"""
    time_s: float | None
    """see the table above"""
    decode_ms: float = field(compare=False)
    """what it took to get from the file to pixels, with the frames of a video that were left out before; waiting for a
    pipe does not count"""
    sequence: int
    """changes where a video, a folder or a stream begins or ends; image files named in a row are of one sequence"""
    path: Path | None
    """the file, of an image"""


@dataclass(frozen=True)
class _Sequence:
    """Image files named in a row, or a folder's, or one video or stream."""

    kind: Literal["files", "folder", "video", "stream"]
    paths: list[Path]
    size: tuple[int, int] | None = None  # (height, width) of raw frames


def open_frames(
    sources: Sequence[str | Path],
    *,
    recursive: bool = False,
    every: int = 1,
    fps: float | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    skipped: list[str] | None = None,
    stdin: BinaryIO | None = None,
    max_frame_bytes: int = MAX_FRAME_BYTES,
) -> Iterator[Frame]:
    """The frames of ``sources``, see the table above, decoded one by one as they are asked for.

    That the sources exist is seen at once, before the first frame is asked for.

    Args:
        recursive: take images from the subfolders of folders too.
        every: of each sequence take the first frame and then every ``every``-th.
        fps: take at most that many frames of a second of a video, by their times.
        on_error: ``"raise"`` ends with the first picture that can't be decoded; ``"skip"`` goes on, with a warning and
            its message in ``skipped``. What makes all that follows unreadable always raises: a video's structure, a
            stream in which the next frame can't be found.
        stdin: what ``-`` and ``raw:`` read; that of the process by default. Frames come as soon as they are complete.
        max_frame_bytes: limit for a frame of stdin, so that a stream of something else can't fill the memory.

    Raises:
        ImageError: no such file, an unknown kind of file, a file that can't be read, a device, a terminal. While
            iterating, after the frames before: a picture that is damaged or cut off. The message names file or frame.
        DatasetError: a folder without images, or one that can't be listed.
        ConfigError: an option that cannot be; stdin named twice.
        ModuleNotFoundError: there is a video, but PyAV is not installed.
    """
    if every < 1:
        raise ConfigError(f"every = {every}: it counts frames, so it must be at least 1")
    if fps is not None and not 0 < fps < float("inf"):
        raise ConfigError(f"fps = {fps}: it must be a number above 0")
    if on_error not in ("raise", "skip"):
        raise ConfigError(f"on_error is 'raise' or 'skip', not {on_error!r}")
    if not sources:
        raise ConfigError("no frames: name image files, folders, videos, or - for frames from stdin")
    sequences: list[_Sequence] = []
    for source in sources:
        found = _find(source, recursive, max_frame_bytes)
        if found.kind == "files" and sequences and sequences[-1].kind == "files":
            sequences[-1].paths.extend(found.paths)
        else:
            sequences.append(found)
    n_streams = sum(sequence.kind == "stream" for sequence in sequences)
    if n_streams > 1:
        raise ConfigError(f"stdin is named {n_streams} times as a source of frames; name it once")
    if any(sequence.kind == "video" for sequence in sequences):
        import av  # noqa: F401  # now, not when the frames before the video are done
    stream = _open_stdin(stdin) if n_streams else None

    def fail(error: ImageError) -> None:
        if on_error == "raise":
            raise error
        logger.warning("skipped: %s", error)
        if skipped is not None:
            skipped.append(str(error))

    def frames(number: int, sequence: _Sequence) -> Iterator[Frame]:
        if sequence.kind == "video":
            return _video_frames(sequence.paths[0], number, every, fps, fail)
        if sequence.kind == "stream" and stream is not None:
            return _stream_frames(stream, sequence.size, number, every, max_frame_bytes, fail)
        return _image_frames(sequence.paths[::every], number, fail)

    return chain.from_iterable(frames(number, sequence) for number, sequence in enumerate(sequences))


# --- finding them ---


def _find(source: str | Path, recursive: bool, max_frame_bytes: int) -> _Sequence:
    """What a source is, after a look at the file system."""
    if str(source) == "-":
        return _Sequence("stream", [])
    if isinstance(source, str) and source.startswith("raw:"):
        return _Sequence("stream", [], _raw_size(source, max_frame_bytes))
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise ImageError(f"{path}: no such file or folder; check the path") from None
        raise ImageError(f"{path}: can't be read: {error.strerror}; check the path and its permissions") from None
    except ValueError as error:
        raise ImageError(f"{str(path)!r}: no path ({error}); check it") from None
    if stat.S_ISDIR(mode):
        return _Sequence("folder", list_images(path, recursive=recursive))
    if not stat.S_ISREG(mode):
        raise ImageError(
            f"{path}: is a device or a pipe; name - and pipe frames into it, for example from ffmpeg -i {path} "
            "-f image2pipe -c:v mjpeg -"
        )
    if not os.access(path, os.R_OK):
        raise ImageError(f"{path}: may not be read; change its permissions")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _Sequence("files", [path])
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return _Sequence("video", [path])
    known = " ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
    raise ImageError(f"{path}: the ending '{path.suffix}' is not of an image or a video ({known}); rename the file")


def _raw_size(source: str, max_frame_bytes: int) -> tuple[int, int]:
    found = re.fullmatch(r"raw:([0-9]{1,9})x([0-9]{1,9})", source)
    width, height = (int(found[1]), int(found[2])) if found else (0, 0)
    if not found or not width or not height:
        raise ConfigError(f"{source}: raw frames are named by their size, such as raw:640x480")
    if 3 * width * height > max_frame_bytes:
        raise ConfigError(f"{source}: {3 * width * height} bytes a frame, more than the limit of {max_frame_bytes}")
    return height, width


def _open_stdin(given: BinaryIO | None) -> BinaryIO:
    stream = given if given is not None else getattr(sys.stdin, "buffer", None)
    if stream is None:
        raise ImageError(f"{STDIN}: is closed; pipe frames into it")
    if stream.isatty():
        raise ImageError(
            f"{STDIN}: is a terminal; pipe frames into it, as ffmpeg -f image2pipe -c:v mjpeg - makes them"
        )
    return stream


# --- reading them ---

_Fail = Callable[[ImageError], None]


def _image_frames(paths: list[Path], sequence: int, fail: _Fail) -> Iterator[Frame]:
    for path in paths:
        start = perf_counter()
        try:
            pixels = load_image(path).permute(1, 2, 0).contiguous().numpy()
        except ImageError as error:
            fail(error)
            continue
        decode_ms = 1e3 * (perf_counter() - start)
        yield Frame(str(path), pixels, exif_time(path), decode_ms, sequence, path)


def _stream_frames(
    stream: BinaryIO, size: tuple[int, int] | None, sequence: int, every: int, max_frame_bytes: int, fail: _Fail
) -> Iterator[Frame]:
    if size is None:
        parts = split_images(stream, STDIN, max_frame_bytes=max_frame_bytes)
    else:
        parts = split_raw(stream, STDIN, 3 * size[0] * size[1])
    n_frames = 0
    for data in parts:
        number, n_frames = n_frames, n_frames + 1
        if number % every:
            continue
        name = frame_name(STDIN, number)
        start = perf_counter()
        try:
            pixels = _decoded(data, name) if size is None else np.frombuffer(data, np.uint8).reshape(*size, 3).copy()
        except ImageError as error:
            fail(error)
            continue
        decode_ms = 1e3 * (perf_counter() - start)
        yield Frame(name, pixels, None if size else exif_time(io.BytesIO(data)), decode_ms, sequence, None)
    if not n_frames:
        raise ImageError(f"{STDIN}: ended without a frame; check what writes into the pipe")


def _decoded(data: bytes, name: str) -> Pixels:
    """As :func:`tetra.images.load_image`, of a JPEG or PNG file in memory."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as opened:
            opened.load()
            return np.array(to_rgb(ImageOps.exif_transpose(opened), Path(name)))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # a damaged picture can make a decoder raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: is damaged ({reason}); check what writes the stream") from error


def _video_frames(path: Path, sequence: int, every: int, fps: float | None, fail: _Fail) -> Iterator[Frame]:
    import av

    limit = _RateLimit(fps)
    number = -1
    start = perf_counter()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ImageError(f"{path}: has no pictures, only sound or data; name a video")
            video = container.streams.video[0]
            n_promised = video.frames  # 0: not known
            for packet in container.demux(video):
                try:
                    decoded = packet.decode()
                except av.error.InvalidDataError as error:  # of this packet; the next ones may be sound
                    fail(ImageError(f"{frame_name(path, number + 1)}: {_damage(error)}"))
                    continue
                for picture in decoded:
                    number += 1
                    if number % every or not limit.takes(picture.time):
                        continue
                    pixels = _upright(picture)
                    decode_ms = 1e3 * (perf_counter() - start)
                    yield Frame(frame_name(path, number), pixels, picture.time, decode_ms, sequence, None)
                    start = perf_counter()
    except (av.error.FFmpegError, OSError) as error:
        where = frame_name(path, number + 1) if number >= 0 else str(path)
        raise ImageError(f"{where}: {_damage(error)}") from error
    if number < 0:
        raise ImageError(f"{path}: holds no frame; replace or remove the file")
    if number + 1 < n_promised:  # not an error: a video may hide frames of its beginning
        logger.warning(
            "%s: ended after %d frames, its header says %d; it may be truncated", path, number + 1, n_promised
        )


def _damage(error: Any) -> str:
    """What is wrong with a video, in one line."""
    if isinstance(error, PermissionError):
        return "may not be read; change its permissions"
    reason = error.strerror or type(error).__name__
    return f"is damaged, truncated or no video that FFmpeg knows ({reason}); replace or remove the file"


def _upright(picture: Any) -> Pixels:
    """The pixels of a video's frame, turned as the video says they are to be shown."""
    pixels: Pixels = picture.to_ndarray(format="rgb24")
    quarter_turns = round(picture.rotation / 90) % 4  # counterclockwise
    return np.ascontiguousarray(np.rot90(pixels, quarter_turns)) if quarter_turns else pixels


class _RateLimit:
    """Takes the first frame of each slot of 1/fps seconds: at most ``fps`` a second, evenly where they come evenly."""

    def __init__(self, fps: float | None) -> None:
        self._fps = fps
        self._first_s: float | None = None
        self._slot = -1

    def takes(self, time_s: float | None) -> bool:
        if self._fps is None or time_s is None:
            return True
        if self._first_s is None:
            self._first_s = time_s
        slot = int((time_s - self._first_s) * self._fps + 1e-6)  # times of frames are rounded
        is_new = slot > self._slot
        self._slot = max(slot, self._slot)
        return is_new
