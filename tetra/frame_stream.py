"""Frames out of a pipe: where one picture ends and the next begins.

A stream is one JPEG or PNG file after the other with nothing between them, as ``ffmpeg -f image2pipe -c:v mjpeg -`` and
camera programs write it. The end of a picture is found by walking through its parts, never by looking for the bytes
that end one: a thumbnail inside has those too. Or the stream is raw pixels, of a size that the caller knows.

A picture is given out as soon as its last byte has come, and no more than one picture and one read are held.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

from tetra.errors import ImageError

MAX_FRAME_BYTES = 1 << 26
"""a picture of a stream may not have more, so that a stream which is none can't fill the memory"""

_READ_BYTES = 1 << 16
_PNG_START = b"\x89PNG\r\n\x1a\n"
_HOW = "pipe JPEG or PNG images, as ffmpeg -f image2pipe -c:v mjpeg - writes them, or name raw:WIDTHxHEIGHT"

# ITU-T T.81, table B.1. After SOS comes coded data, in which FF 00 stands for FF and restarts may lie.
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_ALONE = {0x01, *range(0xD0, 0xD8)}  # without a length
_AFTER_CODED_DATA = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


def frame_name(source: object, number: int) -> str:
    """``clip.mp4#000123``: frame ``number`` of a video or a stream, from 0."""
    return f"{source}#{number:06d}"


def split_images(stream: BinaryIO, name: str, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> Iterator[bytes]:
    """The JPEG and PNG files that ``stream`` is made of, each as soon as it is complete.

    Args:
        stream: open for reading; a pipe may be unbuffered or buffered.
        name: of the stream, for errors.

    Raises:
        ImageError: after the frames before it, for a frame that is cut off or too large, and for anything else between
            frames. The message has the frame's name, see :func:`frame_name`.
    """
    reader = _Reader(stream, name, max_frame_bytes)
    while reader.has_more():
        if reader.starts_with(b"\xff"):
            _walk_jpeg(reader)
        elif reader.starts_with(_PNG_START[:1]):
            _walk_png(reader)
        else:
            raise reader.error(f"begins with {reader.start()!r}, which is neither JPEG nor PNG; {_HOW}")
        yield reader.take()


def split_raw(stream: BinaryIO, name: str, frame_bytes: int) -> Iterator[bytes]:
    """The frames of ``frame_bytes`` that ``stream`` is made of, each as soon as it is complete.

    Raises :class:`~tetra.errors.ImageError`, after the frames before it, for a last one that is cut off.
    """
    reader = _Reader(stream, name, frame_bytes)
    while reader.has_more():
        reader.skip(frame_bytes)
        yield reader.take()


def _walk_jpeg(reader: _Reader) -> None:
    """Move to the end of a JPEG file, marker by marker."""
    if reader.peek(2)[1] != _SOI:
        raise reader.error(f"begins with {reader.start()!r}, which is neither JPEG nor PNG; {_HOW}")
    reader.skip(2)
    while True:
        first, code = reader.peek(2)
        if first != 0xFF or (code < 0xC0 and code != 0x01):
            raise reader.error("is a damaged JPEG image, or other data follow it; check what writes the stream")
        if code == 0xFF:  # padding before a marker
            reader.skip(1)
        elif code == _SOI:
            raise reader.error("is cut off, the next frame begins inside it; check what writes the stream")
        elif code in _ALONE:
            reader.skip(2)
        elif code == _EOI:
            reader.skip(2)
            return
        else:
            reader.skip(2)
            n_bytes = int.from_bytes(reader.peek(2), "big")
            if n_bytes < 2:
                raise reader.error(f"is a damaged JPEG image, a part of {n_bytes} bytes; check what writes the stream")
            reader.skip(n_bytes)
            if code == _SOS:
                reader.skip_to(_AFTER_CODED_DATA)


def _walk_png(reader: _Reader) -> None:
    """Move to the end of a PNG file, chunk by chunk; the decoder checks the sums."""
    if reader.peek(len(_PNG_START)) != _PNG_START:
        raise reader.error(f"begins with {reader.start()!r}, which is neither JPEG nor PNG; {_HOW}")
    reader.skip(len(_PNG_START))
    kind = b""
    while kind != b"IEND":
        header = reader.peek(8)
        n_bytes, kind = int.from_bytes(header[:4], "big"), header[4:]
        if not kind.isalpha():
            raise reader.error(f"is a damaged PNG image, a part named {kind!r}; check what writes the stream")
        reader.skip(12 + n_bytes)


class _Reader:
    """The bytes of the frame at hand, and a place in them."""

    def __init__(self, stream: BinaryIO, name: str, max_frame_bytes: int) -> None:
        # A buffered stream's read waits for all that was asked for, and a live frame would come late.
        self._read: Callable[[int], bytes | None] = getattr(stream, "read1", stream.read)
        self._name = name
        self._limit = max_frame_bytes
        self._data = bytearray()
        self._at = 0
        self._n_frames = 0

    def error(self, what: str) -> ImageError:
        return ImageError(f"{frame_name(self._name, self._n_frames)}: {what}")

    def _read_more(self) -> bool:
        try:
            data = self._read(_READ_BYTES)
        except OSError as error:
            raise self.error(f"can't be read: {error.strerror or error}; check what writes the stream") from None
        self._data += data or b""
        return bool(data)

    def has_more(self) -> bool:
        """Whether another frame begins; waits for its first byte."""
        return bool(self._data) or self._read_more()

    def starts_with(self, start: bytes) -> bool:
        return self._data.startswith(start)

    def start(self) -> bytes:
        """The first bytes, as far as they have come."""
        return bytes(self._data[:8])

    def peek(self, n_bytes: int) -> bytes:
        """The next bytes; waits for them."""
        self._have(self._at + n_bytes)
        return bytes(self._data[self._at : self._at + n_bytes])

    def skip(self, n_bytes: int) -> None:
        """Move on; waits for the bytes moved over."""
        self._have(self._at + n_bytes)
        self._at += n_bytes

    def skip_to(self, pattern: re.Pattern[bytes]) -> None:
        """Move to the first match of a pattern of two bytes; waits for it."""
        while not (found := pattern.search(self._data, self._at)):
            self._at = max(self._at, len(self._data) - 1)  # the last byte may begin a match
            self._have(len(self._data) + 1)
        self._at = found.start()

    def take(self) -> bytes:
        """The frame, which ends here."""
        frame = bytes(self._data[: self._at])
        del self._data[: self._at]
        self._at = 0
        self._n_frames += 1
        return frame

    def _have(self, n_bytes: int) -> None:
        if n_bytes > self._limit:
            raise self.error(f"has more than {self._limit} bytes, more than a frame may; check what writes the stream")
        while len(self._data) < n_bytes:
            if not self._read_more():
                raise self.error(
                    f"is cut off, the stream ended after {len(self._data)} bytes of it; check what writes the stream"
                )
