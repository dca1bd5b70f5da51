"""Performance diary: runs of the benchmarks, kept one a line, and what can be said of two of them.

A diary is a file of JSON lines, each one run: ``format`` ("tetra-diary"), ``version``, ``id``, ``time`` (UTC),
``command``, ``device``, ``environment`` (see :func:`tetra.timing.environment`) and ``rows``, what the benchmark gives,
with ``samples_ms``: every timed call, from which confidence is computed. Runs are appended under a lock, whole or not
at all; a last line that a power cut left half-written ends before the next run begins.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from tetra.errors import TetraError

FORMAT, VERSION = "tetra-diary", 1
VARIABLE = "TETRA_DIARY"
ENVIRONMENT = ("device", "device_name", "threads", "versions", "commit")
CONFIDENCE = 0.99
RESAMPLES = 4000
MIN_SAMPLES = 5
THRESHOLD_PERCENT = 1.0

_MAX_THREADS = 2**31 - 1  # what is larger was never counted, and may be no number in a page

# What tells one measurement of a run from the others, beside its variant.
_SETTING = ("kernel", "stage", "case", "arch", "batch", "image_size", "shape", "rows", "bytes", "queries", "k")

Verdict = Literal["faster", "slower", "no difference shown", "too few samples"]


class DiaryError(TetraError):
    """A diary or a run that can't be read, or runs that can't be compared."""


@dataclass(frozen=True)
class Run:
    """One run of a benchmark.

    Attributes:
        id: twelve hexadecimal digits; of a file that was written by ``--json``, its path.
        time: in UTC, ISO 8601; "" if unknown.
        command: such as "bench kernels".
        environment: of :func:`tetra.timing.environment`.
        rows: what the benchmark gave.
    """

    id: str
    time: str
    command: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """For people: id, time and command."""
        return ", ".join(part for part in (self.id, self.time, self.command) if part)


def default_path() -> Path:
    """``TETRA_DIARY``, or ``tetra/diary.jsonl`` in the user's folder for data."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "tetra" / "diary.jsonl"


# --- writing -----------------------------------------------------------------------------------------------


def check_diary(path: Path | None = None) -> Path:
    """The diary's path, after making sure that a run can be appended; its folder is made.

    Raises:
        DiaryError: it is a folder or no diary, or can't be written.
    """
    path = default_path() if path is None else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiaryError(f"{path}: its folder can't be made: {error.strerror}; name another with {VARIABLE}") from None
    if path.exists() and not path.is_file():
        raise DiaryError(f"{path}: is no file; name another with {VARIABLE}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise DiaryError(f"{path}: is not writable; name another with {VARIABLE}")
    if path.exists():
        read_diary(path)
    return path


def append(path: Path, command: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a run at the end of the diary, and return its id. What the rows say of the machine is written once.

    Several processes may append at a time. After this the run is on the disk.

    Raises:
        DiaryError: there are no rows, or the file can't be written.
    """
    if not rows:
        raise DiaryError("nothing was measured, so there is nothing to save")
    run_id = secrets.token_hex(6)
    entry = {
        "format": FORMAT,
        "version": VERSION,
        "id": run_id,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "device": rows[0].get("device_name"),
        "environment": {key: rows[0].get(key) for key in ENVIRONMENT},
        "rows": [{key: value for key, value in row.items() if key not in ENVIRONMENT} for row in rows],
    }
    line = json.dumps(entry, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    try:
        with open(path, "ab") as file, _locked(file):
            size = os.fstat(file.fileno()).st_size
            if size and not _ends_line(path):
                line = b"\n" + line
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size)  # whole or not at all
                raise
    except OSError as error:
        raise DiaryError(f"{path}: can't be written: {error.strerror}; free space or name another file") from error
    return run_id


def _ends_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


@contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows appends without: a line that two processes mix is skipped by the reader
        yield
        return
    fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)


# --- reading -----------------------------------------------------------------------------------------------


def read_diary(path: Path, notices: list[str] | None = None) -> list[Run]:
    """The runs of a diary, oldest first; damaged lines are left out, with a notice.

    Raises:
        DiaryError: it can't be read, or none of its lines is of a diary, or of one that this release reads.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DiaryError(f"{path}: can't be read: {error.strerror}; run a benchmark with --save first") from None
    runs: list[Run] = []
    damaged: list[int] = []
    versions: list[int] = []
    is_one = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = _entry_of(line)
        is_one = is_one or entry is not None or line.startswith(b'{"format":"tetra-diary"')  # which may be torn
        run = None if entry is None else _run_of(entry)
        if run is not None:
            runs.append(run)
            continue
        damaged.append(number)
        version = None if entry is None else entry.get("version")
        if isinstance(version, int):
            versions.append(version)
    if damaged and not is_one:
        start = repr(lines[damaged[0] - 1][:20].decode(errors="replace"))
        raise DiaryError(f"{path}: is no diary of benchmarks: line {damaged[0]} begins with {start}")
    if not runs and max(versions, default=VERSION) > VERSION:
        raise DiaryError(
            f"{path}: was written by a newer release (version {max(versions)} of diaries, this one reads {VERSION}); "
            f"update tetra, or name another file with {VARIABLE}"
        )
    if damaged and notices is not None:
        where = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        notices.append(f"{path}: damaged or from a newer release, left out: line {where}")
    return runs


def _entry_of(line: bytes) -> dict[str, Any] | None:
    """None for anything that is no line of a diary, of whatever version."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and entry.get("format") == FORMAT else None


def _run_of(entry: dict[str, Any]) -> Run | None:
    """None for anything that is not a whole run of this version."""
    if entry.get("version") != VERSION:
        return None
    values: list[Any] = [entry.get(key) for key in ("id", "time", "command", "environment", "rows")]
    if isinstance(values[3], dict):
        values[3] = {**dict.fromkeys(ENVIRONMENT), **values[3]}
    run = Run(*values)
    texts = all(isinstance(text, str) for text in (run.id, run.time, run.command))
    return run if texts and _is_environment(run.environment) and _are_rows(run.rows) else None


def _is_environment(value: object) -> bool:
    """Whether it says where the figures are from; what else it says may be missing, but not be anything."""
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("device", "device_name")):
        return False
    threads, versions, commit = (value.get(key) for key in ("threads", "versions", "commit"))
    is_count = isinstance(threads, int) and not isinstance(threads, bool) and 1 <= threads <= _MAX_THREADS
    names = versions.values() if isinstance(versions, dict) else [versions]
    return (threads is None or is_count) and all(text is None or isinstance(text, str) for text in (commit, *names))


def _are_rows(rows: object) -> bool:
    """Whether these are figures of a benchmark."""
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) and _is_row(row) for row in rows)


def _is_row(row: dict[str, Any]) -> bool:
    samples = row.get("samples_ms", [])
    if not isinstance(samples, list) or not all(_is_time(value) for value in samples):
        return False
    return "median_ms" not in row or _is_time(row["median_ms"])


def _is_time(value: object) -> bool:
    """Of a call; ratios of what is absurdly short or long may be no numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-50 < value < 1e50


def find_run(text: str, diary: Path | None = None, notices: list[str] | None = None) -> Run:
    """The run that ``text`` names: ``last``, ``last~1`` (the one before), the beginning of an id, or a file: of
    ``--json``, or a diary, whose last run is taken.

    Raises:
        DiaryError: there is none, or more than one id begins so.
    """
    path = Path(text)
    if path.is_file():
        return _run_of_file(path, notices)
    if path.suffix in (".json", ".jsonl") or os.sep in text:
        raise DiaryError(f"{text}: no such file; name a run's id, last, last~1, or a file that --json or --save wrote")
    diary = default_path() if diary is None else diary
    runs = read_diary(diary, notices)
    back = re.fullmatch(r"last(?:~(\d{1,6}))?", text)
    if back:
        number = int(back[1] or 0)
        if number >= len(runs):
            raise DiaryError(f"{text}: {diary} has {len(runs)} runs")
        return runs[-1 - number]
    found = [run for run in runs if text and run.id.startswith(text.lower())]
    if len(found) != 1:
        known = ", ".join(run.id for run in runs[-5:]) or "none"
        what = "no run" if not found else f"{len(found)} runs"
        raise DiaryError(f"{text!r}: {what} of {diary} with such an id; the last ones are {known}")
    return found[0]


def _run_of_file(path: Path, notices: list[str] | None) -> Run:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DiaryError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        runs = read_diary(path, notices)
        if not runs:
            raise DiaryError(f"{path}: holds no whole run") from None
        return runs[-1]
    if isinstance(value, dict) and value.get("format") == FORMAT:  # a diary of one run
        runs = read_diary(path, notices)
        if not runs:
            raise DiaryError(f"{path}: holds no whole run of this version")
        return runs[-1]
    if not _are_rows(value) or not all(map(_is_environment, value)):
        raise DiaryError(f"{path}: holds no figures of a benchmark; name a file that tetra bench wrote with --json")
    environment = {key: value[0].get(key) for key in ENVIRONMENT}
    for key in ("device_name", "device", "threads"):
        if any(row.get(key) != environment[key] for row in value):
            raise DiaryError(f"{path}: its figures are of several machines ({key} differs); compare files of one run")
    return Run(str(path), "", "", environment, value)


# --- comparing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """One variant in two runs.

    Attributes:
        setting: what was measured.
        variant: in which way.
        a_ms, b_ms: medians.
        ratio: b / a: below 1 where B is faster.
        low, high: confidence interval of the ratio; None with too few samples.
        verdict: of B against A.
        is_own: of this project; the others are the machine's pulse.
    """

    setting: str
    variant: str
    a_ms: float
    b_ms: float
    ratio: float
    low: float | None
    high: float | None
    verdict: Verdict
    is_own: bool


def setting_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row measured, without how."""
    return {key: row[key] for key in _SETTING if row.get(key) not in (None, "")}


def variant_of(row: Mapping[str, Any]) -> str:
    return str(row.get("variant") or row.get("backend") or "")


def setting_text(setting: Mapping[str, Any]) -> str:
    """On one line."""
    parts = []
    for key, value in setting.items():
        if isinstance(value, dict):
            parts.append(" ".join(f"{k}={v}" for k, v in value.items()))
        elif key in ("kernel", "stage", "case", "arch"):
            parts.append(str(value))
        else:
            parts.append(f"{key}={'x'.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(parts)


def compare(a: Run, b: Run, threshold_percent: float = THRESHOLD_PERCENT, seed: int = 0) -> list[Compared]:
    """Every variant that both runs timed.

    B is "faster" or "slower" where the whole confidence interval of the ratio of medians lies below or above 1, and the
    ratio is more than ``threshold_percent`` from it. The interval knows the spread within the two runs, not what
    changed on the machine between them: variants that are not this project's show that.

    Raises:
        DiaryError: the runs are of different devices, numbers of threads or shapes.
    """
    _check_comparable(a, b)
    rows_a, rows_b = _timed(a), _timed(b)
    generator = np.random.default_rng(seed)
    found = []
    for key, row_a in rows_a.items():
        if key not in rows_b:
            continue
        row_b, (setting, variant) = rows_b[key], key
        ratio = row_b["median_ms"] / row_a["median_ms"]
        samples = [row.get("samples_ms") or [] for row in (row_a, row_b)]
        low, high = None, None
        verdict: Verdict = "too few samples"
        if min(map(len, samples)) >= MIN_SAMPLES:
            low, high = ratio_interval(samples[0], samples[1], generator)
            verdict = _verdict(ratio, low, high, threshold_percent)
        own = variant.startswith("tetra")
        figures = (row_a["median_ms"], row_b["median_ms"], ratio)
        found.append(Compared(setting, variant, *figures, low, high, verdict, own))
    return found


def _verdict(ratio: float, low: float, high: float, threshold_percent: float) -> Verdict:
    if abs(ratio - 1) <= threshold_percent / 100 or low <= 1 <= high:
        return "no difference shown"
    return "faster" if high < 1 else "slower"


def _timed(run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows with times, by setting and variant."""
    return {(setting_text(setting_of(row)), variant_of(row)): row for row in run.rows if "median_ms" in row}


def _check_comparable(a: Run, b: Run) -> None:
    def differs(what: str, value_a: object, value_b: object, fix: str) -> None:
        if value_a != value_b:
            raise DiaryError(f"{what} differ: {a.id} has {value_a!r}, {b.id} has {value_b!r}; {fix}")

    first, second = a.environment, b.environment
    differs("devices", first.get("device_name"), second.get("device_name"), "compare runs of one machine")
    kind, other_kind = (str(e.get("device")).partition(":")[0] for e in (first, second))
    differs("kinds of device", kind, other_kind, "give both the same --device")
    if kind == "cpu":
        differs("threads", first.get("threads"), second.get("threads"), "give both the same --threads")
    settings_a, settings_b = ({setting for setting, _ in _timed(run)} for run in (a, b))
    for run, settings in ((a, settings_a), (b, settings_b)):
        if not settings:
            raise DiaryError(f"{run.id}: holds no times; run the benchmark without --count")
    if not settings_a & settings_b:
        one, other = min(settings_a - settings_b), min(settings_b - settings_a)
        raise DiaryError(
            f"shapes differ: {a.id} measured {one!r}, {b.id} measured {other!r}; give both the same options"
        )
    if not _timed(a).keys() & _timed(b).keys():
        one, other = (min(variant for _, variant in _timed(run)) for run in (a, b))
        raise DiaryError(f"variants differ: {a.id} has {one!r}, {b.id} has {other!r}; nothing is in both")


def _medians(samples: Sequence[float], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Of ``RESAMPLES`` samples drawn from these, with replacement."""
    values = np.asarray(samples, dtype=np.float64)
    medians: npt.NDArray[np.float64] = np.median(generator.choice(values, (RESAMPLES, len(values))), axis=1)
    return medians


def ratio_interval(
    a_ms: Sequence[float], b_ms: Sequence[float], generator: np.random.Generator, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Bootstrap interval (percentiles) of median(b) / median(a).

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    ratios = _medians(b_ms, generator) / _medians(a_ms, generator)
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def median_interval(samples_ms: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0) -> tuple[float, float]:
    """The same of one median."""
    medians = _medians(samples_ms, np.random.default_rng(seed))
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def changes(a: Run, b: Run) -> list[str]:
    """What else is different about the runs: versions, and commits."""
    lines = []
    for key in ("commit", "versions"):
        first, second = a.environment.get(key), b.environment.get(key)
        if isinstance(first, dict) and isinstance(second, dict):
            names = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
            lines += [f"{name}: {first.get(name)} in A, {second.get(name)} in B" for name in names]
        elif first != second:
            lines.append(f"{key}: {first} in A, {second} in B")
    return lines


def history(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One point a run, setting and variant, for a page: ``run``, ``time``, ``command``, ``device``, ``threads``,
    ``commit``, ``setting``, ``variant``, ``own``, ``median_ms`` and ``low``, ``high``, its confidence interval (None
    with too few samples)."""
    points = []
    for run in runs:
        for (setting, variant), row in _timed(run).items():
            samples = row.get("samples_ms") or []
            interval = median_interval(samples) if len(samples) >= MIN_SAMPLES else (None, None)
            points.append(
                {
                    "run": run.id,
                    "time": run.time,
                    "command": run.command,
                    "device": str(run.environment.get("device_name")),
                    "threads": run.environment.get("threads"),
                    "commit": run.environment.get("commit"),
                    "setting": setting,
                    "variant": variant,
                    "own": variant.startswith("tetra"),
                    "median_ms": row["median_ms"],
                    "low": interval[0],
                    "high": interval[1],
                }
            )
    return points
