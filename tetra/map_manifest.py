"""``map.json``: which files are a place map, and what holds for all of it.

The manifest names every file of the map. It is replaced as a whole, so a map changes from one set of files to the next
at one moment. Files that it does not name are left over from a process that was killed; the next writer deletes them.
``manifest_hash`` is the sha256 of the other entries as canonical JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tetra import __version__
from tetra.coordinates import CoordinateFrame
from tetra.errors import MapError, TetraError
from tetra.files import atomic_write
from tetra.map_segments import FORMAT_VERSION, SegmentEntry

MANIFEST = "map.json"
LOCK = "lock"
KIND = "tetra-place-map"

_OWN_FILE = re.compile(r"(segment|changes)-[0-9]{6,}\.safetensors|journal-[0-9]{6,}\.log")
_TEMPORARY = re.compile(rf"\.(map\.json|{_OWN_FILE.pattern})\.[0-9a-f]{{8}}\.tmp")
_RESTORE = "restore the map from a copy"


@dataclass(frozen=True)
class Manifest:
    """What ``map.json`` says, next to ``kind``, ``format_version``, ``tetra_version`` and ``manifest_hash``."""

    map_id: str
    """32 random hexadecimal digits, which every file of the map repeats"""
    model_hash: str
    code_bytes: int
    frame: CoordinateFrame
    descriptor_dims: int | None
    segments: tuple[SegmentEntry, ...]
    journal: str
    journal_first_row: int
    journal_synced: int
    """so many bytes of the journal were on the disk when this was written"""
    next_file: int
    """number for the name of the next file"""
    calibration: dict[str, Any] | None = None

    @property
    def files(self) -> set[str]:
        """Names of all files of the map but the manifest itself."""
        return {self.journal, *(file.file for segment in self.segments for file in segment.files)}

    def to_json(self) -> dict[str, Any]:
        """All entries of the file."""
        entries = {
            **asdict(self),
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "tetra_version": __version__,
            "frame": str(self.frame),
            "segments": [segment.to_json() for segment in self.segments],
        }
        return {**entries, "manifest_hash": _hash(entries)}


def _hash(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a map.

    Raises:
        MapError: there is no map, or its manifest is unreadable, damaged, of another kind or of a newer format.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise MapError(f"{folder}: no such place map; check the path, or create it")
    if not folder.is_dir():
        raise MapError(f"{folder}: is a file; a place map is a folder with a {MANIFEST}")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise MapError(f"{folder}: is no place map, it has no {MANIFEST}; name a map's folder, or create one") from None
    except OSError as error:
        raise MapError(f"{path}: can't be read: {error.strerror}; check its permissions") from None
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError):
        raise MapError(f"{path}: is not JSON ({len(raw)} bytes), so it is damaged; {_RESTORE}") from None
    if not isinstance(entries, dict) or entries.get("kind") != KIND:
        kind = entries.get("kind") if isinstance(entries, dict) else None
        raise MapError(f"{path}: is of kind {kind!r}, expected '{KIND}'; name a map's folder")
    version = entries.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise MapError(
            f"{path}: map format {version}, this release ({__version__}) reads up to {FORMAT_VERSION}; "
            "upgrade: pip install --upgrade tetra-vpr"
        )
    claimed = entries.pop("manifest_hash", None)
    if _hash(entries) != claimed:
        raise MapError(f"{path}: was altered (its hash does not match); {_RESTORE}")
    try:
        known = {field.name: entries[field.name] for field in fields(Manifest)}
        known["frame"] = CoordinateFrame.parse(known["frame"])
        known["segments"] = tuple(SegmentEntry.from_json(segment) for segment in known["segments"])
        manifest = Manifest(**known)
        foreign = [name for name in manifest.files if not _OWN_FILE.fullmatch(name)]
    except (AttributeError, KeyError, TypeError, MapError) as error:
        raise MapError(f"{path}: lacks or garbles {error}; {_RESTORE}") from None
    if foreign:
        raise MapError(f"{path}: names the file {foreign[0]!r}, which no map has; {_RESTORE}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest, *, replaces: Manifest | None = None) -> None:
    """Write the manifest; if it ``replaces`` one, that has to be there. The caller syncs the folder.

    Raises:
        MapError: another manifest is there. The lock prevents that, but not where somebody deletes a map and puts
            another one in its place.
        TetraError: as files do.
    """
    if replaces is not None and read_manifest(folder) != replaces:
        raise MapError(f"{folder}: another map was put in its place; open it again")
    with atomic_write(folder / MANIFEST) as file:
        file.write(json.dumps(manifest.to_json(), indent=2, allow_nan=False).encode() + b"\n")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut.

    Raises:
        TetraError: the disk could not do it.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise TetraError(f"{folder}: can't be synced to the disk: {error.strerror}; check the disk") from error


def is_leftover(name: str, manifest: Manifest | None) -> bool:
    """Whether a file in a map's folder was made by a writer that was killed, and belongs to nothing."""
    if _TEMPORARY.fullmatch(name):
        return True
    return _OWN_FILE.fullmatch(name) is not None and (manifest is None or name not in manifest.files)
