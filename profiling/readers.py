"""Opens what profilers write, whichever of them it was."""

from __future__ import annotations

import gzip
import shlex
import stat
import zlib
from pathlib import Path

from tetra.profiling import chrome_trace, ncu_csv, nsys_sqlite
from tetra.profiling.events import Profile, ReadError

MAX_BYTES = 2 << 30
"""Of a text, decompressed. A trace that is larger holds more steps than anybody compares."""

_REPORTS = {
    ".nsys-rep": "nsys export --type=sqlite {}",
    ".qdrep": "nsys export --type=sqlite {}",
    ".ncu-rep": "ncu --import {} --csv --page raw > report.csv",
}


def read(path: str | Path) -> Profile:
    """A SQLite export of nsys, a CSV of ncu (``--csv --page raw``), or a Chrome trace of torch.profiler (.json, .gz).

    Raises:
        ReadError: the file can't be read, or is none of these; says what to do.
    """
    path = Path(path)
    export = _REPORTS.get(path.suffix.lower())
    if export is not None:
        raise ReadError(f"{path}: is a report for NVIDIA's own tools; run: {export.format(shlex.quote(str(path)))}")
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ReadError(f"{path}: is a folder; name the file that the profiler wrote")
        if not stat.S_ISREG(mode):
            raise ReadError(f"{path}: is not a plain file; name the file that the profiler wrote")
        with path.open("rb") as file:
            start = file.read(16)
        if not start:
            raise ReadError(f"{path}: is empty; did the profiler end well?")
        if start == b"SQLite format 3\x00":
            return nsys_sqlite.read(path)
        text = _text(path, start[:2] == b"\x1f\x8b")
    except OSError as error:
        raise ReadError(f"{path}: {error.strerror or error}; check the path and its permissions") from None
    if text.lstrip()[:1] in ("{", "["):
        return chrome_trace.parse(path, text)
    if ncu_csv.is_one(text):
        return ncu_csv.parse(path, text)
    raise ReadError(
        f"{path}: is neither a SQLite export of nsys nor a CSV of ncu (--csv --page raw) nor a trace of torch.profiler"
    )


def _text(path: Path, is_compressed: bool) -> str:
    try:
        with gzip.open(path) if is_compressed else path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ReadError(f"{path}: the compressed file is damaged or cut short ({error}); write it again") from None
    if len(data) > MAX_BYTES:
        raise ReadError(f"{path}: has more than {MAX_BYTES:,} bytes; profile fewer steps (--count)")
    return data.decode("utf-8", "replace")
