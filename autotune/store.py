"""Tuning results in files: how they are read, and written by several processes at once.

A file holds the results of one device with one toolchain, as JSON:

==============  ================================================================================================
``format``      ``tetra-tuning``
``version``     1
``origin``      ``measured``, or ``static``: predicted from compiled code, nothing was run
``note``        for readers
``device``      ``kind`` (``cuda``, ``cpu``), ``name``; of a GPU ``arch``, ``sms``, ``driver``; of a CPU ``cores`` and
                ``instructions``
``toolchain``   versions of what compiled: ``triton``, ``ptxas``
``kernels``     file of ``tetra.kernels`` -> hash of its source
``results``     kernel -> problem -> ``config`` (a row of the kernel's table) and what was found out about it
==============  ================================================================================================

Whoever writes holds a lock, reads what is there, adds to it, and replaces the file at once. The lock is the operating
system's (``lockf``): it goes with the process that holds it, however that ends. So a result, once added, stays, and no
process waits for one that is gone. A file that can't be used gives one notice and counts as missing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FORMAT = "tetra-tuning"
VERSION = 1
FOLDER_VARIABLE = "TETRA_TUNING_DIR"
LOCK_WAIT_S = 60.0
MAX_BYTES = 64 << 20  # of a file; those of this package have less than 100 KB
MAX_DEPTH = 16  # of tables and lists in one another; what is nested deeper can't be written by every Python

USER_PREFIX = "user:"  # of the names of kernels that are not this package's

Entry = dict[str, Any]
_SCALARS = (int, float, str, bool, type(None))


class TuningFileError(ValueError):
    """A file does not hold usable tuning results; the message names it, and says what to do."""


class StoreError(RuntimeError):
    """Tuning results can't be kept in a folder; the message names it, and the way out."""


@dataclass
class Results:
    """Contents of a file; see the top of this module."""

    origin: str
    device: dict[str, Any]
    toolchain: dict[str, Any]
    kernels: dict[str, str] = field(default_factory=dict)
    results: dict[str, dict[str, Entry]] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "origin": self.origin,
            "note": self.note,
            "device": self.device,
            "toolchain": self.toolchain,
            "kernels": self.kernels,
            "results": self.results,
        }

    @classmethod
    def from_json(cls, value: Any, path: str | Path) -> Results:
        """Checked. Raises TuningFileError, which names ``path``."""

        def refuse(problem: str, advice: str = "delete it, or tune again") -> TuningFileError:
            return TuningFileError(f"{path}: {problem}; {advice}")

        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise refuse("holds no tuning results", "name a file that `tetra tune` wrote")
        if value.get("version") != VERSION:
            raise refuse(
                f"has version {value.get('version')!r} of the format, this release reads {VERSION}",
                "delete it and tune again, or use the release that wrote it",
            )
        if value.get("origin") not in ("measured", "static"):
            raise refuse(f"origin is {value.get('origin')!r}, not measured or static")
        for name in ("device", "toolchain", "kernels", "results"):
            if not isinstance(value.get(name), dict):
                raise refuse(f"has no table '{name}'")
        device = value["device"]
        if device.get("kind") not in ("cuda", "cpu") or not isinstance(device.get("name"), str):
            raise refuse("does not say which device its results are for")
        if device["kind"] == "cuda" and not re.fullmatch(r"sm_[0-9]{2,3}", str(device.get("arch"))):
            raise refuse(f"the device's arch is {device.get('arch')!r}, not one like sm_80")
        if not all(isinstance(digest, str) for digest in value["kernels"].values()):
            raise refuse("a kernel's hash is no text")
        for kernel, entries in value["results"].items():
            if not isinstance(entries, dict):
                raise refuse(f"the results of '{kernel}' are no table")
            for key, entry in entries.items():
                config = entry.get("config") if isinstance(entry, dict) else None
                if not isinstance(config, list) or not config or not all(isinstance(v, _SCALARS) for v in config):
                    raise refuse(f"the result of '{kernel}' for '{key}' has no configuration")
        if not _is_shallow(value):
            raise refuse(f"has tables more than {MAX_DEPTH} deep in one another")
        note = value.get("note")
        parts = (device, value["toolchain"], value["kernels"], value["results"])
        return cls(value["origin"], *parts, note=note if isinstance(note, str) else "")


def _is_shallow(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [part.values() if isinstance(part, dict) else part for part in level]
        level = [item for part in inner for item in part if isinstance(item, (dict, list))]
        if not level:
            return True
    return False


# --- notices -------------------------------------------------------------------------------------------------

_said: set[str] = set()


def notice(text: str) -> None:
    """A warning, once a process."""
    if text not in _said:
        _said.add(text)
        warnings.warn(text, stacklevel=2)


def forget_notices() -> None:
    """Each may be given once more."""
    _said.clear()


# --- which device --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """What a measured result holds for: this very device, with this driver and this compiler."""

    device: dict[str, Any]
    toolchain: dict[str, Any]

    @property
    def family(self) -> str:
        """Beginning of the file name, the same for all drivers and compilers."""
        name = re.sub(r"[^a-z0-9]+", "-", self.device["name"].lower()).strip("-")[:60] or "unnamed"
        return "-".join([self.device["kind"], name, *([self.device["arch"]] if "arch" in self.device else [])])

    @property
    def file_name(self) -> str:
        """Where its results are, within a folder."""
        text = json.dumps([FORMAT, VERSION, self.device, self.toolchain], sort_keys=True)
        return f"{self.family}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"

    def difference(self, results: Results) -> str | None:
        """How the device or toolchain of ``results`` is another one, in words; None for this one."""
        for here, there in ((self.device, results.device), (self.toolchain, results.toolchain)):
            for name in sorted({*here, *there}):
                if here.get(name) != there.get(name):
                    what = name if name != "name" else "device"
                    return f"{what} was {there.get(name)}, here it is {here.get(name)}"
        return None


def _driver_version() -> str:
    """Of the NVIDIA driver, such as 580.159.04; else the CUDA version that it supports."""
    for path, pattern in (
        ("/sys/module/nvidia/version", r"([\d.]+)"),
        ("/proc/driver/nvidia/version", r"Kernel Module\D*([\d.]+)"),
    ):
        with contextlib.suppress(OSError):
            found = re.search(pattern, Path(path).read_text())
            if found:
                return found[1]
    import torch

    version: Callable[[], int] | None = getattr(torch._C, "_cuda_getDriverVersion", None)
    with contextlib.suppress(RuntimeError):
        return "unknown" if version is None else f"CUDA {version()}"
    return "unknown"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def cpu_name() -> str:
    """The processor as the operating system calls it."""
    import platform

    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


@cache
def device_identity(device: torch.device) -> Identity:
    """Of a GPU (which it touches) or of this machine's CPU (whose C++ kernels it builds, once)."""
    import torch

    if device.type != "cuda":
        from tetra.kernels import native

        facts = {"cores": os.cpu_count() or 1, "instructions": native.instructions()}
        return Identity({"kind": "cpu", "name": cpu_name(), **facts}, {})
    found = torch.cuda.get_device_properties(device)
    facts = {"arch": f"sm_{found.major}{found.minor}", "sms": found.multi_processor_count, "driver": _driver_version()}
    return Identity({"kind": "cuda", "name": found.name, **facts}, {"triton": _triton_version()})


def static_file_name(arch: int) -> str:
    """Of a user's own predictions, within the cache folder."""
    return f"static-sm_{arch}.json"


# --- reading and writing -------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """``TETRA_TUNING_DIR``, else ``tetra/tuning`` in the user's cache folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tetra" / "tuning"


def read_results(path: str | Path) -> Results:
    """Contents of a file. Raises TuningFileError for whatever can't be read or used."""
    try:
        if str(path) != "/dev/stdin" and stat.S_ISFIFO(os.stat(path).st_mode):
            raise TuningFileError(f"{path}: is a pipe; name a file that `tetra tune` wrote, or /dev/stdin")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise TuningFileError(
                f"{path}: is larger than {MAX_BYTES >> 20} MiB; name a file that `tetra tune` wrote, or delete it"
            )
        value = json.loads(content)
    except OSError as error:
        raise TuningFileError(f"{path}: can't be read: {error.strerror}; check the path and its permissions") from None
    except TuningFileError:
        raise
    except (ValueError, RecursionError):
        raise TuningFileError(
            f"{path}: is no JSON, or only a part; name a file that `tetra tune` wrote, or delete it and tune again"
        ) from None
    return Results.from_json(value, path)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; not where that can't be found out."""
    try:
        return path.is_dir()
    except OSError:  # no permission, or no name that could exist
        return False


def _check_is_file(path: Path) -> None:
    if not path.is_file():  # a pipe would never end
        raise TuningFileError(f"{path}: is no file; remove it, and tune again")


def read_or_notice(path: Path) -> Results | None:
    """Contents of a file; None where there is none, and after one notice where it can't be used. For look-ups."""
    try:
        if not path.exists():
            return None
        _check_is_file(path)
        return read_results(path)
    except (OSError, TuningFileError) as error:
        notice(f"tuning results are ignored: {error}")
        return None


def write_results(path: str | Path, results: Results) -> None:
    """Replace ``path``, whole and synced to disk, or not at all. One writer at a time; see :class:`Store`.

    Raises StoreError where it can't be written.
    """
    path = Path(os.path.realpath(path))
    # One name: a file left by a process that was killed is written over by the next.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write((json.dumps(results.to_json(), indent=1) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not all file systems sync folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StoreError(f"{path}: can't be written: {error.strerror}; free space or choose another folder") from None


_one_thread = threading.Lock()


def _other_subject(added: Results, found: Results) -> str | None:
    """What ``found`` is about that ``added`` is not, in words; None where they belong into one file."""
    if found.origin != added.origin:
        return f"they are {found.origin}, not {added.origin}"
    if added.origin == "measured":
        return Identity(added.device, added.toolchain).difference(found)
    here, there = added.device.get("arch"), found.device.get("arch")
    return None if here == there else f"they are for {there}, not {here}"


class Store:
    """The user's results, one file a device and toolchain, in a folder that processes share."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else cache_folder()

    def check_writable(self) -> None:
        """Before long work: StoreError unless results can be written here. Creates the folder."""
        with self._locked():
            probe = self.folder / ".probe"
            try:
                probe.write_bytes(b"")
                probe.unlink()
            except OSError as error:
                raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(
            f"{self.folder}: tuning results can't be written there: {error.strerror}; "
            f"set {FOLDER_VARIABLE} to a folder that can be written"
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Within this context no other process or thread is."""
        import fcntl  # here, since reading works without

        with _one_thread:  # the lock below is the process's
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise self._unwritable(error) from None
            try:
                until = time.monotonic() + LOCK_WAIT_S
                while True:
                    try:
                        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except OSError as error:
                        if error.errno not in (errno.EACCES, errno.EAGAIN):
                            raise self._unwritable(error) from None
                    if time.monotonic() > until:
                        raise StoreError(
                            f"{self.folder / '.lock'}: another process has held the lock for {LOCK_WAIT_S:.0f} s; "
                            f"end it, or set {FOLDER_VARIABLE} to another folder"
                        )
                    time.sleep(0.002)
                yield
            finally:
                os.close(file)

    def path_of(self, identity: Identity) -> Path:
        """The file of a device and toolchain, which need not exist."""
        return self.folder / identity.file_name

    def files(self) -> list[Path]:
        """Whatever results are there, of any device."""
        if not is_folder(self.folder):
            return []
        return [path for path in sorted(self.folder.glob("*.json")) if path.is_file()]

    def _current(self, path: Path, added: Results) -> Results | None:
        """What is at ``path``, for one who will add to it and replace it: what can't be used is kept beside it."""
        if not path.exists():
            return None
        try:
            _check_is_file(path)
            found = read_results(path)
            different = _other_subject(added, found)
            if different is None:
                return found
            raise TuningFileError(f"{path}: holds other results than its name says: {different}")
        except TuningFileError as error:
            aside = path.with_name(path.name + ".unusable")
            number = 1
            while aside.is_dir() or (path.is_dir() and aside.exists()):  # a folder replaces nothing and stays
                number += 1
                aside = path.with_name(f"{path.name}.unusable{number}")
            try:
                os.replace(path, aside)
            except OSError as problem:
                raise self._unwritable(problem) from None
            notice(f"{error}; it was renamed to {aside.name}")
            return None

    def merge(self, path: Path, added: Results) -> None:
        """Add results to a file: problems that it has are replaced, those of kernels whose source changed are left out.

        Raises StoreError where the file can't be written.
        """
        from tetra.autotune.table import module_of

        with self._locked():
            kept = self._current(path, added)
            if kept is None:
                kept = Results(added.origin, added.device, added.toolchain, note=added.note)
            changed = {module for module, digest in added.kernels.items() if kept.kernels.get(module, digest) != digest}
            for kernel in [kernel for kernel in kept.results if module_of(kernel) in changed]:
                del kept.results[kernel]
            kept.kernels.update(added.kernels)
            for kernel, entries in added.results.items():
                kept.results.setdefault(kernel, {}).update(entries)
            write_results(path, kept)

    def add(
        self, identity: Identity, kernel_hashes: Mapping[str, str], kernel: str, key: str, entry: Entry, note: str = ""
    ) -> None:
        """Keep one measured result. When this returns, it is on disk.

        Args:
            kernel_hashes: of the kernel's file, by its name.
            kernel, key: of the result.
            entry: with ``config``.

        Raises:
            StoreError: it can't be written.
        """
        results = {kernel: {key: entry}}
        added = Results("measured", identity.device, identity.toolchain, dict(kernel_hashes), results, note)
        self.merge(self.path_of(identity), added)

    def clear(self, kernel: str | None = None) -> int:
        """Remove all results, or those of one kernel; how many there were.

        Raises:
            StoreError: a file can't be changed.
        """
        removed = 0
        if not is_folder(self.folder):
            return 0
        with self._locked():
            for path in self.files():
                try:
                    found = read_results(path)
                except TuningFileError:
                    found = None  # nothing that anybody could use
                if kernel is None or found is None:
                    if kernel is None:
                        removed += sum(map(len, found.results.values())) if found else 0
                        try:
                            path.unlink()
                        except OSError as error:
                            raise self._unwritable(error) from None
                elif kernel in found.results:
                    removed += len(found.results.pop(kernel))
                    write_results(path, found)
        return removed
