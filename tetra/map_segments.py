"""The immutable files of a place map: segments, and the changes to them.

Both are safetensors files, whose one metadata entry ``tetra`` is a JSON object with ``format_version``, ``kind``
(``tetra-place-map-segment`` or ``tetra-place-map-changes``) and ``map_id``. A segment has n places:

=========================  =====================================================================
``id_hashes`` U64 [n]      sorted; blake2b of 8 bytes of the id, little-endian
``id_order`` U32 [n]       the place that each of them belongs to
``rows`` I64 [n]           sorted row numbers; missing if they count on from ``first_row``
``positions`` F64 [n, 2]   metres; NaN: unknown
``times`` F64 [n]          seconds; NaN: unknown
``headings`` F32 [n]       degrees; NaN: unknown
``descriptors`` F16 [n, D] missing in a map that keeps none
``codes`` U8 [n, B]
``ids`` U8 [...]           UTF-8, end to end; place i has bytes ``ids_offsets[i]`` to ``ids_offsets[i + 1]``
``ids_offsets`` I64 [n+1]
``metadata`` ...           the same with JSON and JPEG files; missing if no place of the segment has any
``thumbnails`` ...
=========================  =====================================================================

A file of changes holds what of a segment is no longer so: ``positions`` F64 [n, 2] and ``allowed`` BOOL [n], False for
places that were removed. It is written anew, under another name, when that changes.

Tensors lie in the order of their element sizes, largest first, so that all are aligned and usable from a memory map.
The manifest holds each file's size and the sha256 of its header and of its data. Opening a file looks at the first two,
which takes no time; :func:`check_data` reads it all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tetra.errors import MapError, MissingMapFileError, TetraError
from tetra.files import atomic_write
from tetra.map_columns import Blobs, Bools, Hashes, Ids, Ints, Part, Places

FORMAT_VERSION = 1
SEGMENT_KIND = "tetra-place-map-segment"
CHANGES_KIND = "tetra-place-map-changes"

_BLOCK_BYTES = 1 << 22  # copied or hashed at a time
_FIND_BLOCK = 1 << 16  # ids looked up at a time
_ALIGNMENT = 64  # of the first tensor
_DTYPES = {
    "<u8": "U64",
    "<i8": "I64",
    "<f8": "F64",
    "<u4": "U32",
    "<f4": "F32",
    "<f2": "F16",
    "|u1": "U8",
    "|b1": "BOOL",
}
_NUMPY = {name: np.dtype(code) for code, name in _DTYPES.items()}
_RESTORE = "restore the map from a copy"
_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says about a file of the map."""

    file: str
    n_bytes: int
    header_sha256: str
    data_sha256: str


# --- writing ---


@dataclass(frozen=True)
class _Column:
    """A tensor on its way to a file: its pieces are made one by one, so that a segment need not fit into memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[npt.NDArray[Any]]

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def _write(path: Path, kind: str, map_id: str, columns: Sequence[_Column]) -> FileEntry:
    # Sorted stably by element size: everything lies aligned.
    columns = sorted(columns, key=lambda column: -np.dtype(column.dtype).itemsize)
    header: dict[str, Any] = {
        "__metadata__": {"tetra": json.dumps({"format_version": FORMAT_VERSION, "kind": kind, "map_id": map_id})}
    }
    end = 0
    for column in columns:
        start, end = end, end + column.n_bytes
        header[column.name] = {
            "dtype": _DTYPES[column.dtype],
            "shape": list(column.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for column in columns:
            n_written = 0
            for piece in column.pieces:
                data = np.ascontiguousarray(piece, dtype=column.dtype).reshape(-1).view(np.uint8).data
                digest.update(data)
                n_written += file.write(data)
            if n_written != column.n_bytes:  # texts whose places in their column contradict each other
                raise ValueError(f"{column.name}: {n_written} of {column.n_bytes} bytes")
    return FileEntry(path.name, 8 + len(text) + end, hashlib.sha256(text).hexdigest(), digest.hexdigest())


def _pieces(arrays: Sequence[npt.NDArray[Any]], keeps: Sequence[Ints | None]) -> Iterator[npt.NDArray[Any]]:
    for array, keep in zip(arrays, keeps, strict=True):
        n = len(array) if keep is None else len(keep)
        block = max(_BLOCK_BYTES // max(array[:1].nbytes, 1), 1)
        for start in range(0, n, block):
            yield array[start : start + block] if keep is None else array[keep[start : start + block]]


def _blob_columns(name: str, blobs: Sequence[Blobs], keeps: Sequence[Ints | None]) -> list[_Column]:
    lengths = np.concatenate(
        [b.lengths if keep is None else b.lengths[keep] for b, keep in zip(blobs, keeps, strict=True)]
    )
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    runs = (run for b, keep in zip(blobs, keeps, strict=True) for run in b.runs(keep))
    return [
        _Column(name, "|u1", (int(offsets[-1]),), runs),
        _Column(f"{name}_offsets", "<i8", (len(offsets),), [offsets]),
    ]


def write_segment(path: Path, map_id: str, parts: Sequence[Part], first_row: int | None = None) -> FileEntry:
    """Write the places of ``parts`` that were not removed as one segment, synced; at least one has to be left.

    They keep their rows, or count on from ``first_row`` if that is given. Needs memory for two numbers a place, and for
    a few megabytes of the rest.

    Raises:
        TetraError: it can't be written, for example because the disk is full; then there is no file.
    """
    keeps = [part.kept() for part in parts]
    places = [part.places for part in parts]
    n = sum(part.n_allowed for part in parts)
    hashes = np.concatenate(
        [part.hashes if keep is None else part.hashes[keep] for part, keep in zip(parts, keeps, strict=True)]
    )
    order = np.argsort(hashes, kind="stable")

    def fixed(name: str, dtype: str, arrays: Sequence[npt.NDArray[Any]]) -> _Column:
        return _Column(name, dtype, (n, *arrays[0].shape[1:]), _pieces(arrays, keeps))

    columns = [
        _Column("id_hashes", "<u8", (n,), [hashes[order]]),
        _Column("id_order", "<u4", (n,), [order]),
        fixed("positions", "<f8", [p.positions for p in places]),
        fixed("times", "<f8", [p.times for p in places]),
        fixed("headings", "<f4", [p.headings for p in places]),
        fixed("codes", "|u1", [p.codes for p in places]),
        *_blob_columns("ids", [p.ids for p in places], keeps),
    ]
    if first_row is None:
        rows = np.concatenate(
            [p.row_numbers(np.arange(len(p.places)) if k is None else k) for p, k in zip(parts, keeps, strict=True)]
        )
        if rows[-1] - rows[0] != n - 1:
            columns.append(_Column("rows", "<i8", (n,), [rows]))
    descriptors = [p.descriptors for p in places if p.descriptors is not None]
    if descriptors:
        columns.append(fixed("descriptors", "<f2", descriptors))
    for name in ("metadata", "thumbnails"):
        blobs = [getattr(p, name) for p in places]
        if any(len(b.data) for b in blobs):
            columns += _blob_columns(name, blobs, keeps)
    return _write(path, SEGMENT_KIND, map_id, columns)


def write_changes(path: Path, map_id: str, part: Part, *, positions: bool) -> FileEntry:
    """Write which places of a segment were removed and, if ``positions``, where they all are now. Raises as above."""
    columns = []
    if positions:
        columns.append(_Column("positions", "<f8", (len(part.places), 2), _pieces([part.places.positions], [None])))
    if part.allowed is not None:
        columns.append(_Column("allowed", "|b1", (len(part.places),), [part.allowed]))
    return _write(path, CHANGES_KIND, map_id, columns)


# --- reading ---


def open_columns(path: Path, entry: FileEntry, kind: str, map_id: str) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a file as read-only views of its memory map.

    Raises:
        MapError: the file is missing, truncated, of another map, of a newer format, or its header was altered.
    """
    mapped, text = _open(path, entry)
    header = json.loads(text)
    about = json.loads(header.pop("__metadata__")["tetra"])
    if about["format_version"] > FORMAT_VERSION:
        raise MapError(
            f"{path}: map format {about['format_version']}, this release reads up to {FORMAT_VERSION}; "
            "upgrade: pip install --upgrade tetra-vpr"
        )
    if about["kind"] != kind or about["map_id"] != map_id:
        raise MapError(f"{path}: a '{about['kind']}' of map {about['map_id'][:12]}, not of this one; {_RESTORE}")
    columns = {}
    for name, tensor in header.items():
        dtype, shape = _NUMPY[tensor["dtype"]], tensor["shape"]
        start = 8 + len(text) + tensor["data_offsets"][0]
        n = int(np.prod(shape, dtype=np.int64))
        # An empty tensor at the end would begin behind the last byte.
        flat = np.frombuffer(mapped, dtype=dtype, count=n, offset=start) if n else np.empty(0, dtype=dtype)
        columns[name] = flat.reshape(shape)
    return columns


def _open(path: Path, entry: FileEntry) -> tuple[mmap.mmap, bytes]:
    """The memory map of a file that has the size and the header that it should have, and the header."""
    try:
        with open(path, "rb") as file:
            n_bytes = path.stat().st_size
            if n_bytes != entry.n_bytes:
                how = "is truncated" if n_bytes < entry.n_bytes else "was altered"
                raise MapError(f"{path}: {how}, {n_bytes} of {entry.n_bytes} bytes; {_RESTORE}")
            n_header = int.from_bytes(file.read(8), "little")
            text = file.read(n_header) if n_header < n_bytes else b""
            if hashlib.sha256(text).hexdigest() != entry.header_sha256:
                raise MapError(f"{path}: its header was altered, or it belongs to another map; {_RESTORE}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), text
    except FileNotFoundError:
        raise MissingMapFileError(f"{path}: is missing, the map needs it; {_RESTORE}") from None
    except OSError as error:
        raise MapError(f"{path}: can't be read: {error.strerror}; check its permissions") from None


def check_data(path: Path, entry: FileEntry) -> None:
    """Read all of a file and compare it with its checksum. Raises :class:`~tetra.errors.MapError` if it differs."""
    mapped, text = _open(path, entry)
    digest, data = hashlib.sha256(), memoryview(mapped)
    for start in range(8 + len(text), len(data), _BLOCK_BYTES):
        digest.update(data[start : start + _BLOCK_BYTES])
    if digest.hexdigest() != entry.data_sha256:
        raise MapError(f"{path}: is damaged, its checksum is not the one in the manifest; {_RESTORE}")


@contextlib.contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """What only a damaged segment can cause, as an error that says what to do.

    Large segments are not read when they are opened, so that damage shows where their bytes are used.
    """
    try:
        yield
    except TetraError:
        raise
    except (IndexError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise MapError(
            f"{folder}: a file of the map is damaged ({reason}); `tetra map info --verify` names it, {_RESTORE}"
        ) from error


@dataclass(frozen=True)
class SegmentEntry(FileEntry):
    """A segment in the manifest."""

    n_places: int
    first_row: int
    changes: FileEntry | None = None
    n_removed: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SegmentEntry:
        """Raises TypeError for a value of another form."""
        changes = value.get("changes")
        return cls(**{**value, "changes": None if changes is None else FileEntry(**changes)})

    @property
    def files(self) -> list[FileEntry]:
        return [self] if self.changes is None else [self, self.changes]


@dataclass(frozen=True)
class Segment(Part):
    """A part that lies in a file, as its entry in the manifest says, and finds ids without reading them all."""

    id_hashes: Hashes = None  # type: ignore[assignment]  # always given; the fields before it have defaults
    id_order: npt.NDArray[np.uint32] = None  # type: ignore[assignment]
    entry: SegmentEntry = None  # type: ignore[assignment]
    is_dirty: bool = False
    """places were moved or removed since the entry was written"""
    is_moved: bool = False
    """positions are not those of the segment's own file"""

    @classmethod
    def open(cls, folder: Path, entry: SegmentEntry, map_id: str, n_code_bytes: int, n_dims: int | None) -> Segment:
        """Memory-map a segment with its changes. Raises as :func:`open_columns`."""
        path = folder / entry.file
        columns = open_columns(path, entry, SEGMENT_KIND, map_id)
        allowed: Bools | None = None
        n = entry.n_places
        is_moved = False
        try:
            if entry.changes is not None:
                changes = open_columns(folder / entry.changes.file, entry.changes, CHANGES_KIND, map_id)
                allowed = changes.get("allowed")
                is_moved = "positions" in changes
                columns.update((k, v) for k, v in changes.items() if k == "positions")

            def blobs(name: str) -> Blobs:
                if name not in columns:
                    return Blobs.empty(n)
                return Blobs(columns[name], columns[f"{name}_offsets"])

            places = Places(
                columns["codes"],
                columns["positions"],
                columns["headings"],
                columns["times"],
                blobs("ids"),
                blobs("metadata"),
                blobs("thumbnails"),
                columns.get("descriptors"),
            )
            shapes = [places.codes.shape, places.positions.shape, places.ids.offsets.shape]
            dims = None if places.descriptors is None else places.descriptors.shape[1]
            if shapes != [(n, n_code_bytes), (n, 2), (n + 1,)] or dims != n_dims:
                raise MapError(f"{path}: its tensors do not have the shapes that the manifest says; {_RESTORE}")
            segment = cls(
                places,
                entry.first_row,
                columns.get("rows"),
                allowed,
                columns["id_hashes"],
                columns["id_order"],
                entry,
                is_moved=is_moved,
            )
        except KeyError as error:
            raise MapError(f"{path}: the tensor {error} is missing; {_RESTORE}") from None
        # Counting what is allowed would read it all.
        segment.__dict__["n_allowed"] = n - entry.n_removed
        return segment

    @property
    def hashes(self) -> Hashes:
        """uint64 [n], of the ids in the order of the places."""
        hashes = np.empty(len(self.places), dtype=np.uint64)
        hashes[self.id_order] = self.id_hashes
        return hashes

    def changed(self, **changes: Any) -> Part:
        part = super().changed(**changes)
        return replace(part, is_dirty=True, is_moved=self.is_moved or "move" in changes)  # type: ignore[call-arg]

    def find(self, ids: Ids) -> tuple[Ints, Ints]:
        """Which of the ids are here, int64 [m], and the numbers of their places, removed or not."""
        hashes, whose = ids.sorted_hashes
        if len(hashes) <= _FIND_BLOCK:
            return self._find(ids, hashes, whose)
        found = [
            self._find(ids, hashes[start : start + _FIND_BLOCK], whose[start : start + _FIND_BLOCK])
            for start in range(0, len(hashes), _FIND_BLOCK)
        ]
        which, numbers = zip(*found, strict=True)
        return np.concatenate(which), np.concatenate(numbers)

    def _find(self, ids: Ids, hashes: Hashes, whose: Ints) -> tuple[Ints, Ints]:
        """Of some of the ids, whose hashes these are."""
        at = self.id_hashes.searchsorted(hashes)
        which = (self.id_hashes.take(at, mode="clip") == hashes).nonzero()[0]
        if not len(which):
            return _NONE, _NONE
        at, which = at[which], whose[which]
        numbers = self.id_order[at].astype(np.int64)
        wanted, there = ids.blobs.take(which), self.places.ids.take(numbers)
        if not (np.array_equal(wanted.offsets, there.offsets) and np.array_equal(wanted.data, there.data)):
            # Somewhere two ids have one hash.
            numbers = np.array([self._number_of(ids.keys[i], int(a)) for i, a in zip(which, at, strict=True)])
            which, numbers = which[numbers >= 0], numbers[numbers >= 0]
        return which, numbers

    def _number_of(self, key: bytes, at: int) -> int:
        """The number of the place with this id, whose hash is the one at ``at``; -1 if there is none."""
        value = self.id_hashes[at]
        while at < len(self.id_hashes) and self.id_hashes[at] == value:
            number = int(self.id_order[at])
            if self.places.ids[number] == key:
                return number
            at += 1
        return -1
