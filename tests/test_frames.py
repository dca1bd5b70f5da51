"""Frames from files, folders, videos and pipes: the files are real ones, and so are the pipes."""

from __future__ import annotations

import io
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo

from tetra.errors import ConfigError, DatasetError, ImageError, TetraError
from tetra.frame_stream import split_images, split_raw
from tetra.frames import Frame, open_frames
from tetra.images import load_image

NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def refused(action: Any, *words: str, error: type[TetraError] = ImageError) -> None:
    """``action`` raises one line with these words."""
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def save(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.roll(NOISE, number, axis=1)).save(path)
    return path


def names(frames: Iterator[Frame]) -> list[str]:
    return [Path(frame.name).name for frame in frames]


# --- files and folders --------------------------------------------------------------------------------------


def test_files_and_folders_in_the_order_given(tmp_path: Path) -> None:
    for number, name in enumerate(["b/10.png", "b/9.png", "b/deep/1.png", "c.jpg", "a.png"]):
        save(tmp_path / name, number)
    sources = [str(tmp_path / name) for name in ("c.jpg", "a.png", "b", "a.png")]
    frames = list(open_frames(sources))
    assert [frame.name for frame in frames] == [*sources[:2], f"{tmp_path}/b/9.png", f"{tmp_path}/b/10.png", sources[3]]
    assert [frame.sequence for frame in frames] == [0, 0, 1, 1, 2]
    for frame in frames:
        assert frame.path is not None
        assert frame.pixels.dtype == np.uint8
        assert frame.pixels.flags.c_contiguous
        assert np.array_equal(frame.pixels, load_image(frame.path).permute(1, 2, 0).numpy())
        assert frame.time_s is None
        assert frame.decode_ms > 0
    assert names(open_frames([tmp_path / "b"], recursive=True)) == ["9.png", "10.png", "1.png"]
    assert names(open_frames([tmp_path / "b"], recursive=True, every=2)) == ["9.png", "1.png"]


def test_times_of_images_are_from_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(IFD.Exif).update({Base.DateTimeOriginal: "1970:01:01 00:01:00", Base.SubsecTimeOriginal: "5"})
    Image.fromarray(NOISE).save(tmp_path / "a.jpg", exif=exif)
    (frame,) = open_frames([tmp_path / "a.jpg"])
    assert frame.time_s == 60.5
    (frame,) = open_frames(["-"], stdin=io.BytesIO((tmp_path / "a.jpg").read_bytes()))
    assert frame.time_s == 60.5


def test_sources_that_are_not_there_are_seen_before_the_first_frame(tmp_path: Path) -> None:
    good = save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    refused(lambda: open_frames([good, tmp_path / "none.png"]), "none.png", "no such file", "check the path")
    refused(lambda: open_frames([good, good / "inside.png"]), "inside.png", "no such file")
    refused(lambda: open_frames([tmp_path / "notes.txt"]), "notes.txt", "'.txt'", ".jpg", ".mp4")
    refused(lambda: open_frames([tmp_path / "empty"]), "empty", "no images", error=DatasetError)
    refused(lambda: open_frames([good, "/dev/null"]), "/dev/null", "device", "ffmpeg")
    refused(lambda: open_frames(["a\0b.png"]), "a\\x00b.png")
    refused(lambda: open_frames([]), "no frames", error=ConfigError)
    os.mkfifo(tmp_path / "pipe.png")
    refused(lambda: open_frames([tmp_path / "pipe.png"]), "pipe.png", "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    save(tmp_path / "closed" / "a.png").chmod(0)
    refused(lambda: open_frames([tmp_path / "closed" / "a.png"]), "a.png", "permissions")
    (tmp_path / "closed").chmod(0)
    refused(lambda: open_frames([tmp_path / "closed" / "a.png"]), "a.png", "permissions")
    (tmp_path / "closed").chmod(0o700)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every = 0"),
        ({"fps": 0}, "fps = 0"),
        ({"fps": float("nan")}, "fps = nan"),
        ({"fps": float("inf")}, "fps = inf"),
        ({"on_error": "ignore"}, "'ignore'"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    refused(lambda: open_frames([save(tmp_path / "a.png")], **options), words, error=ConfigError)


def test_a_damaged_image_ends_it_or_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(4):
        save(tmp_path / f"{number}.png", number)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:200])
    frames = open_frames([tmp_path])
    assert [Path(next(frames).name).name for _ in range(2)] == ["0.png", "1.png"]
    refused(lambda: next(frames), "2.png", "truncated", "replace or remove")
    skipped: list[str] = []
    assert names(open_frames([tmp_path], on_error="skip", skipped=skipped)) == ["0.png", "1.png", "3.png"]
    (reason,) = skipped
    assert "2.png" in reason
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


# --- videos -------------------------------------------------------------------------------------------------


def write_video(path: Path, n_frames: int = 20, rate: int = 10) -> Path:
    """Frame i is of the grey value 10 i, its left half red."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for number in range(n_frames):
            pixels = np.full((48, 64, 3), 10 * number, dtype=np.uint8)
            pixels[:, :32] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def grey(frame: Frame) -> float:
    return float(frame.pixels[4:-4, 40:-4].mean())


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".MKV", ".mov"])
def test_a_video_gives_its_frames_with_their_times(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"clip{suffix.lower()}").rename(tmp_path / f"clip{suffix}")
    frames = list(open_frames([path]))
    assert [frame.name for frame in frames] == [f"{path}#{number:06d}" for number in range(20)]
    assert [frame.time_s for frame in frames] == pytest.approx([number / 10 for number in range(20)], abs=1e-3)
    for number, frame in enumerate(frames):
        assert frame.pixels.shape == (48, 64, 3)
        assert grey(frame) == pytest.approx(10 * number, abs=3)
        assert np.abs(frame.pixels[4:-4, 4:24].mean((0, 1)) - (255, 0, 0)).max() < 8  # RGB, not BGR
        assert frame.decode_ms > 0
        assert frame.path is None


def test_every_and_fps(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4")

    def taken(**options: Any) -> list[int]:
        return [int(frame.name[-6:]) for frame in open_frames([path], **options)]

    assert taken(every=7) == [0, 7, 14]
    assert taken(every=100) == [0]
    assert taken(fps=5) == list(range(0, 20, 2))
    assert taken(fps=4) == [0, 3, 5, 8, 10, 13, 15, 18]  # on average 2.5 frames apart
    for fps in (10, 10.5, 1000):
        assert taken(fps=fps) == list(range(20))
    assert taken(fps=0.1) == [0]
    assert taken(fps=5, every=3) == [0, 3, 6, 9, 12, 15, 18]
    assert [frame.sequence for frame in open_frames([path, path], every=10)] == [0, 0, 1, 1]


@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
def test_a_rotated_video_stands_upright(tmp_path: Path, quarter_turns: int) -> None:
    data = bytearray(write_video(tmp_path / "clip.mp4", 3).read_bytes())
    # The matrix of a track header, ISO/IEC 14496-12, 8.3.2: a quarter turn clockwise takes (x, y) to (-y, x).
    sine, cosine = [(0, 1), (1, 0), (0, -1), (-1, 0)][quarter_turns]
    matrix = np.array([cosine, sine, 0, -sine, cosine, 0, 0, 0, 1 << 14]) << 16
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    data[at : at + 36] = matrix.astype(">i4").tobytes()
    (tmp_path / "turned.mp4").write_bytes(data)
    stored, turned = (next(open_frames([tmp_path / name])).pixels for name in ("clip.mp4", "turned.mp4"))
    assert np.array_equal(turned, np.rot90(stored, -quarter_turns))


def test_videos_that_cannot_be_read(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "clip.mp4").read_bytes()
    for name, data in [("text.mp4", b"no video"), ("empty.mp4", b""), ("cut.mp4", whole[: len(whole) // 2])]:
        (tmp_path / name).write_bytes(data)
        frames = open_frames([tmp_path / name])
        refused(lambda frames=frames: next(frames), name, "replace or remove")


def test_a_video_without_pictures(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    refused(lambda: next(open_frames([tmp_path / "sound.mkv"])), "sound.mkv", "no pictures")


def test_a_damaged_video_gives_what_comes_before(tmp_path: Path) -> None:
    """Motion JPEG, so that the damage stays in its frame."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(6):
            pixels = np.full((48, 64, 3), 40 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray((tmp_path / "clip.avi").read_bytes())
    starts = [at for at in range(len(data)) if data[at : at + 3] == b"\xff\xd8\xff"]
    data[starts[3] : starts[3] + 600] = bytes(600)
    (tmp_path / "clip.avi").write_bytes(data)

    seen: list[int] = []

    def read() -> None:
        for frame in open_frames([tmp_path / "clip.avi"]):
            seen.append(round(grey(frame) / 40))

    refused(read, "clip.avi#", "damaged", "replace or remove")
    assert seen == [0, 1, 2]
    skipped: list[str] = []
    rest = open_frames([tmp_path / "clip.avi"], on_error="skip", skipped=skipped)
    assert [round(grey(frame) / 40) for frame in rest] == [0, 1, 2, 4, 5]
    assert len(skipped) == 1


def test_a_missing_pyav_is_seen_at_once(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.mp4").touch()
    code = f"""
import sys
sys.modules["av"] = None
from tetra.frames import open_frames
print(len(list(open_frames([{str(tmp_path / "a.png")!r}]))))
try:
    open_frames([{str(tmp_path / "a.png")!r}, {str(tmp_path / "a.mp4")!r}])
except ModuleNotFoundError as error:
    print(error.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "av"]


# --- streams ------------------------------------------------------------------------------------------------


def encoded(format: str, size: tuple[int, int] = (40, 24), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(NOISE).resize(size).save(file, format=format, **options)
    return file.getvalue()


def with_segment(jpeg: bytes, code: int, payload: bytes) -> bytes:
    """``jpeg`` with one more part after its start."""
    return jpeg[:2] + bytes([0xFF, code]) + (len(payload) + 2).to_bytes(2, "big") + payload + jpeg[2:]


def pictures() -> list[bytes]:
    """JPEG and PNG files in which the bytes that end an image stand in other places too."""
    small = encoded("JPEG", (16, 12), quality=30)
    text = PngInfo()
    text.add_text("note", "IEND and \xff\xd9", zip=False)
    exif = Image.Exif()
    exif[Base.ImageDescription] = "a camera"
    plain = encoded("JPEG", quality=95)
    coded_data = plain.index(b"\xff\xda")
    return [
        plain,
        small,
        encoded("JPEG", progressive=True),
        encoded("JPEG", progressive=True, restart_marker_rows=1, exif=exif),
        encoded("JPEG", restart_marker_blocks=1),
        encoded("JPEG", (1, 1)),
        with_segment(plain, 0xE1, b"Exif\0\0" + small),  # a thumbnail
        with_segment(with_segment(small, 0xFE, b"\xff\xd9\xff\xd8\xff"), 0xE2, b""),
        plain[:coded_data] + b"\xff\xff" + plain[coded_data:-2] + b"\xff\xff\xff\xd9",  # padding before markers
        encoded("PNG"),
        encoded("PNG", (1, 1)),
        encoded("PNG", pnginfo=text),
    ]


PICTURES = pictures()


def test_the_pictures_are_real() -> None:
    for data in PICTURES:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    assert sum(data.count(b"\xff\xd9") > 1 for data in PICTURES) >= 2


class Chopped(io.RawIOBase):
    """A stream that gives its bytes in pieces of these sizes, over and over."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes, self.n_read = data, itertools.cycle(sizes), 0

    def read(self, size: int = -1) -> bytes:
        piece = self._data[self.n_read : self.n_read + min(next(self._sizes), size)]
        self.n_read += len(piece)
        return piece


CHOICES = st.lists(st.integers(0, len(PICTURES) - 1), max_size=6)
SIZES = st.lists(st.integers(1, 3000), min_size=1, max_size=8)


@given(CHOICES, SIZES)
@settings(max_examples=150, deadline=None)
def test_a_stream_gives_back_the_files_that_it_was_made_of(choices: list[int], sizes: list[int]) -> None:
    files = [PICTURES[choice] for choice in choices]
    assert list(split_images(Chopped(b"".join(files), sizes), "stdin")) == files  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_smallest_pieces(size: int) -> None:
    assert list(split_images(Chopped(b"".join(PICTURES), [size]), "stdin")) == PICTURES  # type: ignore[arg-type]


@given(CHOICES.filter(bool), SIZES, st.data())
@settings(max_examples=150, deadline=None)
def test_a_stream_that_is_cut_gives_the_whole_files_and_one_error(
    choices: list[int], sizes: list[int], data: st.DataObject
) -> None:
    files = [PICTURES[choice] for choice in choices]
    ends = list(itertools.accumulate(len(file) for file in files))
    cut = data.draw(st.integers(0, ends[-1]))
    whole = sum(end <= cut for end in ends)
    parts = split_images(Chopped(b"".join(files)[:cut], sizes), "stdin")  # type: ignore[arg-type]
    assert list(itertools.islice(parts, whole)) == files[:whole]
    if cut in (0, *ends):
        assert list(parts) == []
    else:
        refused(lambda: next(parts), f"stdin#{whole:06d}", "cut off")


@given(CHOICES.filter(bool), st.binary(min_size=1, max_size=40), SIZES)
@settings(max_examples=100, deadline=None)
def test_garbage_between_frames_is_named(choices: list[int], garbage: bytes, sizes: list[int]) -> None:
    files = [PICTURES[choice] for choice in choices]
    stream = Chopped(b"".join(files) + garbage + PICTURES[0], sizes)
    parts = split_images(stream, "stdin")  # type: ignore[arg-type]
    assert list(itertools.islice(parts, len(files))) == files
    if garbage[0] not in (0xFF, 0x89):
        refused(lambda: next(parts), f"stdin#{len(files):06d}", "neither JPEG nor PNG", "ffmpeg")


@given(st.integers(0, len(PICTURES) - 1), st.data())
@settings(max_examples=200, deadline=None)
def test_flipped_bytes_end_or_give_frames_but_never_hang(choice: int, data: st.DataObject) -> None:
    damaged = bytearray(PICTURES[choice] * 2)
    for _ in range(3):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    messages = []
    try:
        for frame in open_frames(["-"], stdin=io.BytesIO(damaged), on_error="skip", skipped=messages):
            assert frame.pixels.ndim == 3
    except ImageError as error:
        messages.append(str(error))
    assert all(message.startswith("stdin") and "\n" not in message for message in messages)


def test_a_frame_that_begins_inside_another() -> None:
    stream = io.BytesIO(PICTURES[0] + PICTURES[0][:-100] + PICTURES[1])
    parts = split_images(stream, "stdin")
    assert next(parts) == PICTURES[0]
    refused(lambda: next(parts), "stdin#000001", "cut off", "begins inside")


class Endless(io.RawIOBase):
    """A beginning, and then zeros for ever."""

    def __init__(self, start: bytes) -> None:
        self._start, self.n_read = start, 0

    def read(self, size: int = -1) -> bytes:
        start, self._start = self._start, b""
        piece = start or bytes(size)
        self.n_read += len(piece)
        return piece


@pytest.mark.parametrize(
    "start",
    [
        PICTURES[0][: PICTURES[0].index(b"\xff\xda") + 30],
        b"\x89PNG\r\n\x1a\n" + b"\x7f\xff\xff\xffIDAT",
    ],
    ids=["coded data without an end", "a chunk of 2 GiB"],
)
def test_a_frame_without_an_end_does_not_fill_the_memory(start: bytes) -> None:
    stream = Endless(start)
    parts = split_images(stream, "stdin", max_frame_bytes=1 << 20)  # type: ignore[arg-type]
    refused(lambda: next(parts), "stdin#000000", "more than 1048576 bytes")
    assert stream.n_read < (1 << 20) + (1 << 17)


def test_streams_of_other_things() -> None:
    refused(lambda: next(open_frames(["-"], stdin=io.BytesIO())), "stdin", "without a frame")
    with open("/dev/null", "rb") as null:
        refused(lambda: next(open_frames(["-"], stdin=null)), "stdin", "without a frame")
    with open("/dev/zero", "rb", buffering=0) as zeros:
        refused(lambda: next(open_frames(["-"], stdin=zeros)), "stdin#000000", "neither JPEG nor PNG", "raw:")
    with io.BytesIO(b"<html>") as web:
        refused(lambda: next(open_frames(["-"], stdin=web)), "<html>", "ffmpeg")
    refused(lambda: open_frames(["-", "-"], stdin=io.BytesIO()), "2 times", error=ConfigError)
    master, slave = os.openpty()
    with os.fdopen(master, "rb", buffering=0), os.fdopen(slave, "rb", buffering=0) as terminal:
        refused(lambda: open_frames(["-"], stdin=terminal), "terminal", "pipe")


def test_streamed_frames_are_what_the_files_are(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    files = [*PICTURES, encoded("JPEG", exif=exif)]
    frames = list(open_frames(["-"], stdin=io.BytesIO(b"".join(files))))
    assert [frame.name for frame in frames] == [f"stdin#{number:06d}" for number in range(len(files))]
    for frame, data in zip(frames, files, strict=True):
        (tmp_path / "one").write_bytes(data)
        assert np.array_equal(frame.pixels, load_image(tmp_path / "one").permute(1, 2, 0).numpy())
    some = open_frames(["-"], stdin=io.BytesIO(b"".join(files)), every=5)
    assert names(some) == ["stdin#000000", "stdin#000005", "stdin#000010"]


def test_a_damaged_streamed_frame_ends_it_or_is_skipped() -> None:
    damaged = bytearray(PICTURES[9])
    damaged[60] ^= 0xFF  # in the compressed pixels, against their sum
    data = PICTURES[0] + damaged + PICTURES[1]
    frames = open_frames(["-"], stdin=io.BytesIO(data))
    assert next(frames).name == "stdin#000000"
    refused(lambda: next(frames), "stdin#000001", "damaged")
    skipped: list[str] = []
    rest = open_frames(["-"], stdin=io.BytesIO(data), on_error="skip", skipped=skipped)
    assert names(rest) == ["stdin#000000", "stdin#000002"]
    assert len(skipped) == 1


# --- raw frames ---


@pytest.mark.parametrize("sizes", [[1], [7, 4096], [1 << 20]])
def test_raw_frames(sizes: list[int]) -> None:
    frames = np.random.default_rng(3).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    found = list(open_frames(["raw:7x5"], stdin=Chopped(frames.tobytes(), sizes)))  # type: ignore[arg-type]
    assert np.array_equal(np.stack([frame.pixels for frame in found]), frames)
    assert found[0].pixels.flags.writeable
    parts = split_raw(Chopped(frames.tobytes()[:-1], sizes), "stdin", 105)  # type: ignore[arg-type]
    assert len(list(itertools.islice(parts, 2))) == 2
    refused(lambda: next(parts), "stdin#000002", "cut off", "104 bytes")


@pytest.mark.parametrize("source", ["raw:", "raw:7", "raw:0x5", "raw:7x-5", "raw:7x5x3", "raw:axb"])
def test_raw_sizes_that_cannot_be(source: str) -> None:
    refused(lambda: open_frames([source], stdin=io.BytesIO()), source, "raw:640x480", error=ConfigError)


def test_raw_frames_beyond_the_limit() -> None:
    refused(lambda: open_frames(["raw:99999x99999"], stdin=io.BytesIO()), "29999400003 bytes", error=ConfigError)


# --- live ---


@pytest.mark.parametrize("buffering", [0, -1])
def test_a_frame_comes_before_the_next_is_written(buffering: int) -> None:
    """With nobody to write on, a reader that waited for more than the frame would wait for ever."""
    end, start = os.pipe()
    with os.fdopen(end, "rb", buffering) as stream, os.fdopen(start, "wb", 0) as camera:
        frames = open_frames(["-"], stdin=stream)  # type: ignore[arg-type]
        for number, data in enumerate(PICTURES):
            camera.write(data)
            assert next(frames).name == f"stdin#{number:06d}"
        camera.close()
        assert list(frames) == []


def test_a_slow_process_that_waits_for_each_answer() -> None:
    """The camera writes frame by frame in small pieces, and the next only when it has heard of the one before."""
    code = f"""
import sys, time
data = {PICTURES[2]!r}
for number in range(3):
    for at in range(0, len(data), 500):
        sys.stdout.buffer.write(data[at : at + 500])
        sys.stdout.buffer.flush()
        time.sleep(0.002)
    assert sys.stdin.readline() == f"got {{number}}\\n"
sys.stdout.buffer.write(data[:-1])
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as camera:
        assert camera.stdin is not None
        assert camera.stdout is not None
        watchdog = threading.Timer(60, camera.kill)
        watchdog.start()
        frames = open_frames(["-"], stdin=camera.stdout)  # type: ignore[arg-type]
        for number in range(3):
            assert next(frames).name == f"stdin#{number:06d}"
            camera.stdin.write(f"got {number}\n".encode())
            camera.stdin.flush()
        refused(lambda: next(frames), "stdin#000003", "cut off")
        watchdog.cancel()
    assert camera.returncode == 0


def test_the_real_stdin() -> None:
    code = "from tetra.frames import open_frames; print([f.pixels.shape for f in open_frames(['-'])])"
    data = PICTURES[0] + PICTURES[1]
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "[(24, 40, 3), (12, 16, 3)]"
