"""The columns of a map's places: one form in memory, in a journal's record and in a segment.

Letters: n places, B bytes a code, D values of a float descriptor.

:class:`Places` holds the columns, as views wherever it can: of the caller's arrays, of a record, of a memory map, or of
the growing arrays of a :class:`Tail`. What has a length of its own (ids, metadata, thumbnails) lies end to end in
:class:`Blobs`.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tetra.errors import MapError

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Hashes = npt.NDArray[np.uint64]

_NO_BYTES = np.empty(0, dtype=np.uint8)
_ZERO = np.zeros(1, dtype=np.int64)

# --- byte strings of any length ---


@dataclass(frozen=True)
class Blobs:
    """n byte strings end to end: number i is ``data[offsets[i]:offsets[i + 1]]``."""

    data: Bytes
    offsets: Ints
    """[n + 1], from 0 to the size of ``data``"""

    @classmethod
    def of(cls, items: Sequence[bytes]) -> Blobs:
        return cls.joined(b"".join(items), np.fromiter(map(len, items), dtype=np.int64, count=len(items)))

    @classmethod
    def joined(cls, data: bytes | Bytes, lengths: npt.NDArray[Any]) -> Blobs:
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        lengths.cumsum(out=offsets[1:])
        return cls(np.frombuffer(data, dtype=np.uint8), offsets)

    @classmethod
    def empty(cls, n: int) -> Blobs:
        """n strings of no bytes."""
        return cls(_NO_BYTES, np.zeros(n + 1, dtype=np.int64))  # zeros take no memory until they are written

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> bytes:
        return self.data[self.offsets[i] : self.offsets[i + 1]].tobytes()

    def to_list(self) -> list[bytes]:
        raw = self.data.tobytes()
        return [raw[start:end] for start, end in pairwise(self.offsets.tolist())]

    @property
    def lengths(self) -> Ints:
        return self.offsets[1:] - self.offsets[:-1]

    def runs(self, keep: Ints | None) -> Iterator[Bytes]:
        """The strings ``keep`` (sorted numbers; None: all), neighbours in one piece."""
        if keep is None:
            yield self.data
            return
        breaks = np.flatnonzero(np.diff(keep) != 1) + 1
        firsts, lasts = keep[np.r_[0, breaks]], keep[np.r_[breaks, len(keep)] - 1]
        for start, end in zip(self.offsets[firsts].tolist(), self.offsets[lasts + 1].tolist(), strict=True):
            yield self.data[start:end]

    def take(self, numbers: Ints) -> Blobs:
        """A copy of the strings ``numbers``, in that order. Raises ValueError where offsets cannot be."""
        starts, lengths = self.offsets[numbers], self.offsets[numbers + 1] - self.offsets[numbers]
        # Of a damaged file they could ask for more memory than there is.
        if len(numbers) and (starts.min() < 0 or lengths.min() < 0 or (starts + lengths).max() > len(self.data)):
            raise ValueError("texts that lie outside of their column")
        taken = Blobs.joined(b"", lengths)
        at = np.arange(taken.offsets[-1]) + np.repeat(starts - taken.offsets[:-1], lengths)
        return Blobs(self.data[at], taken.offsets)


# --- ids ---

# An id names files in exports, so it has to be a relative path that stays below where it starts: no part of it may be
# empty, "." or "..". Control characters would break lists of ids; line ends are how ids are joined here.
_BAD_CHARACTER = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\\]")
_BAD_PART = re.compile(r"(?:^|(?<=/))\.{0,2}(?=/|$)|^[A-Za-z]:(?=/|$)", re.MULTILINE)
# Every bad part has one of these; to look for them is quick, and few ids have any.
_SUSPECTS = ("\n\n", "//", "\n/", "/\n", "/.", "\n.", ":/", ":\n")
MAX_ID_BYTES = 512


def _is_bad(lines: str) -> bool:
    """Whether any of the lines can't be an id, for what is in it."""
    if _BAD_CHARACTER.search(lines):
        return True
    between = f"\n{lines}\n"
    return any(suspect in between for suspect in _SUSPECTS) and _BAD_PART.search(lines) is not None


@dataclass(frozen=True)
class Ids:
    """Ids that have been checked, as UTF-8."""

    keys: list[bytes]
    blobs: Blobs

    @cached_property
    def hashes(self) -> Hashes:
        """uint64 [n]: by which a segment finds an id without reading all of them."""
        return hash_ids(self.keys)

    @cached_property
    def sorted_hashes(self) -> tuple[Hashes, Ints]:
        """The hashes in rising order, so that looking them up goes through memory one way, and whose they are."""
        if len(self.keys) == 1:
            return self.hashes, _ZERO
        order = np.argsort(self.hashes)
        return self.hashes[order], order

    @classmethod
    def of(cls, ids: Iterable[str]) -> Ids:
        """Check ids: non-empty text of at most 512 bytes of UTF-8 without control characters, a relative path.

        Raises :class:`~tetra.errors.MapError` that names the first wrong one.
        """
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):  # letters of a text would be taken for ids
            raise MapError(f"ids: a list was expected, not {ids!r}; put one id into a list")
        ids = list(ids)
        try:
            text = "\n".join(ids)
            raw = text.encode()
        except (TypeError, UnicodeEncodeError):
            raise _explain_id(ids) from None
        keys = raw.split(b"\n") if ids else []
        if len(keys) != len(ids) or (ids and _is_bad(text)):
            raise _explain_id(ids)
        lengths = np.fromiter(map(len, keys), dtype=np.int64, count=len(keys))
        if len(keys) and lengths.max() > MAX_ID_BYTES:
            raise _explain_id(ids)
        return cls(keys, Blobs.joined(b"".join(keys), lengths))

    @classmethod
    def trusted(cls, blobs: Blobs) -> Ids:
        """Ids that were checked when they were written."""
        return cls(blobs.to_list(), blobs)


def _explain_id(ids: Sequence[Any]) -> MapError:
    for number, value in enumerate(ids):
        name = f"ids: number {number}, {str(value)[:80]!r},"
        if not isinstance(value, str):
            return MapError(f"ids: number {number} is {value!r}, a {type(value).__name__}; ids are text")
        if not value:
            return MapError(f"ids: number {number} is empty; give every place a name")
        try:
            n_bytes = len(value.encode())
        except UnicodeEncodeError:
            return MapError(f"{name} is not valid Unicode text; rename it")
        if n_bytes > MAX_ID_BYTES:
            return MapError(f"{name} has {n_bytes} bytes of UTF-8, the limit is {MAX_ID_BYTES}; shorten it")
        if "\n" in value or _is_bad(value):
            return MapError(
                f"{name} can't name a file: control characters, backslashes, absolute paths and the parts '', '.' and "
                "'..' are refused; rename it"
            )
    raise AssertionError("every id is fine")


def hash_ids(keys: Sequence[bytes]) -> Hashes:
    """uint64 [n]: blake2b of 8 bytes, little-endian, of every id."""
    blake2b = hashlib.blake2b
    return np.frombuffer(b"".join([blake2b(key, digest_size=8).digest() for key in keys]), dtype="<u8")


# --- the columns ---


@dataclass(frozen=True)
class Places:
    """n places. Positions and headings that are unknown are NaN, as are times; metadata and thumbnails are empty."""

    codes: Bytes
    """[n, B]"""
    positions: Floats
    """[n, 2] metres, in the map's frame"""
    headings: npt.NDArray[np.float32]
    """[n] degrees"""
    times: Floats
    """[n] seconds"""
    ids: Blobs
    metadata: Blobs
    """JSON"""
    thumbnails: Blobs
    """JPEG"""
    descriptors: npt.NDArray[np.float16] | None
    """[n, D], or None in a map that keeps none"""

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def n_bytes(self) -> int:
        """About what they take on disk."""
        floats = 0 if self.descriptors is None else self.descriptors.nbytes
        texts = len(self.ids.data) + len(self.metadata.data) + len(self.thumbnails.data)
        return self.codes.nbytes + 28 * len(self) + floats + texts


# --- journal records ---

_ADD, _REMOVE, _MOVE = 1, 2, 3
_HAS_METADATA, _HAS_THUMBNAILS, _HAS_DESCRIPTORS = 1, 2, 4
_START = struct.Struct("<BBHIQ")  # kind, which columns there are, 0, number of places, first row


@dataclass(frozen=True)
class Added:
    """A record: these places were added, from row ``first_row`` on."""

    first_row: int
    places: Places

    def encode(self) -> list[bytes | memoryview]:
        """The payload in pieces."""
        places, n = self.places, len(self.places)
        flags, texts = 0, [_raw(places.ids.lengths.astype("<u2")), _raw(places.ids.data)]
        for flag, blobs in ((_HAS_METADATA, places.metadata), (_HAS_THUMBNAILS, places.thumbnails)):
            if len(blobs.data):
                flags |= flag
                texts += [_raw(blobs.lengths.astype("<u4")), _raw(blobs.data)]
        if places.descriptors is not None:
            flags |= _HAS_DESCRIPTORS
            texts.append(_raw(places.descriptors))
        start = _START.pack(_ADD, flags, 0, n, self.first_row)
        numbers = [_raw(column) for column in (places.codes, places.positions, places.headings, places.times)]
        return [start, *numbers, *texts]


@dataclass(frozen=True)
class Removed:
    """A record: the places of these rows were removed."""

    rows: Ints

    def encode(self) -> list[bytes | memoryview]:
        """The payload in pieces."""
        return [_START.pack(_REMOVE, 0, 0, len(self.rows), 0), _raw(self.rows)]


@dataclass(frozen=True)
class Moved:
    """A record: the places of these rows [n] have these positions [n, 2] now."""

    rows: Ints
    positions: Floats

    def encode(self) -> list[bytes | memoryview]:
        """The payload in pieces."""
        return [_START.pack(_MOVE, 0, 0, len(self.rows), 0), _raw(self.rows), _raw(self.positions)]


def _raw(array: npt.NDArray[Any]) -> bytes | memoryview:
    return np.ascontiguousarray(array).data if array.size else b""


def decode(payload: bytes, n_code_bytes: int, n_dims: int | None) -> Added | Removed | Moved:
    """What ``encode`` wrote. Raises ValueError for a payload that it can't have written."""
    if len(payload) < _START.size:
        raise ValueError(f"{len(payload)} bytes")
    kind, flags, _, n, first_row = _START.unpack_from(payload)
    position = _START.size

    def take(dtype: str, *shape: int) -> npt.NDArray[Any]:
        nonlocal position
        array = np.frombuffer(payload, dtype=dtype, count=math.prod(shape), offset=position)
        position += array.nbytes
        return array if len(shape) == 1 else array.reshape(shape)

    def take_blobs(dtype: str) -> Blobs:
        lengths = take(dtype, n)
        return Blobs.joined(take("u1", int(lengths.sum(dtype=np.int64))), lengths)

    record: Added | Removed | Moved
    if kind == _ADD:
        codes, positions, headings = take("u1", n, n_code_bytes), take("<f8", n, 2), take("<f4", n)
        times, ids = take("<f8", n), take_blobs("<u2")
        metadata = take_blobs("<u4") if flags & _HAS_METADATA else Blobs.empty(n)
        thumbnails = take_blobs("<u4") if flags & _HAS_THUMBNAILS else Blobs.empty(n)
        if bool(flags & _HAS_DESCRIPTORS) != (n_dims is not None):
            raise ValueError("float descriptors where the map keeps none, or none where it does")
        descriptors = None if n_dims is None else take("<f2", n, n_dims)
        record = Added(first_row, Places(codes, positions, headings, times, ids, metadata, thumbnails, descriptors))
    elif kind == _REMOVE:
        record = Removed(take("<i8", n))
    elif kind == _MOVE:
        record = Moved(take("<i8", n), take("<f8", n, 2))
    else:
        raise ValueError(f"kind {kind}")
    if position != len(payload):
        raise ValueError(f"{len(payload)} bytes, expected {position}")
    return record


def joined(records: Sequence[Added | Removed | Moved]) -> list[Added | Removed | Moved]:
    """The same changes in fewer records: neighbours that only add are one."""
    out: list[Added | Removed | Moved] = []
    for kind, run in groupby(records, type):
        found = list(run)
        out += [_as_one([r for r in found if isinstance(r, Added)])] if kind is Added else found
    return out


def _as_one(records: list[Added]) -> Added:
    """ValueError where rows don't follow each other."""
    following = records[0].first_row
    for record in records:
        if record.first_row != following:
            raise ValueError(f"row {record.first_row} where {following} comes next")
        following += len(record.places)
    every = [record.places for record in records]

    def column(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(places, name) for places in every])

    def blobs(name: str) -> Blobs:
        parts: list[Blobs] = [getattr(places, name) for places in every]
        return Blobs.joined(np.concatenate([p.data for p in parts]), np.concatenate([p.lengths for p in parts]))

    return Added(
        records[0].first_row,
        Places(
            codes=column("codes"),
            positions=column("positions"),
            headings=column("headings"),
            times=column("times"),
            ids=blobs("ids"),
            metadata=blobs("metadata"),
            thumbnails=blobs("thumbnails"),
            descriptors=None if every[0].descriptors is None else column("descriptors"),
        ),
    )


# --- parts of a map ---

_warnings_lock = threading.Lock()


def as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """A tensor in the same memory. PyTorch warns that read-only memory could be written, which nobody here does."""
    if array.flags.writeable:
        return torch.from_numpy(array)
    with _warnings_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


@dataclass(frozen=True)
class Part:
    """Places of neighbouring rows, as a search sees them. Nothing in it ever changes."""

    places: Places
    first_row: int
    rows: Ints | None = None
    """[n] sorted, where some between them were dropped; None: they count on from ``first_row``"""
    allowed: Bools | None = None
    """[n] which have not been removed; None: all of them"""

    @property
    def hashes(self) -> Hashes:
        """uint64 [n], of the ids."""
        return hash_ids(self.places.ids.to_list())

    @cached_property
    def n_allowed(self) -> int:
        return len(self.places) if self.allowed is None else int(np.count_nonzero(self.allowed))

    @property
    def end_row(self) -> int:
        """One behind the last row."""
        n = len(self.places)
        return int(self.rows[-1]) + 1 if self.rows is not None and n else self.first_row + n

    @cached_property
    def codes(self) -> Tensor:
        """uint8 [n, B], the memory of ``places.codes``."""
        return as_tensor(self.places.codes)

    def row_numbers(self, local: Ints) -> Ints:
        """Rows of the map, of numbers within this part."""
        return local + self.first_row if self.rows is None else self.rows[local]

    def local_numbers(self, rows: Ints) -> Ints:
        """Numbers within this part of rows of the map; -1 where there is none, or it was removed."""
        if not len(self.places):
            return np.full(len(rows), -1, dtype=np.int64)
        if self.rows is None:
            local = rows - self.first_row
            known = (local >= 0) & (local < len(self.places))
        else:
            local = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
            known = self.rows[local] == rows
        if self.allowed is not None:
            known &= self.allowed[np.where(known, local, 0)]
        return np.where(known, local, -1)

    def kept(self) -> Ints | None:
        """Numbers of the places that were not removed; None: all of them."""
        return None if self.allowed is None else np.flatnonzero(self.allowed)

    def changed(self, *, remove: Ints | None = None, move: tuple[Ints, Floats] | None = None) -> Part:
        """This part without the places ``remove``, or with new positions of others; numbers are within this part."""
        if remove is not None:
            allowed = np.ones(len(self.places), dtype=np.bool_) if self.allowed is None else self.allowed.copy()
            allowed[remove] = False
            return replace(self, allowed=allowed)
        assert move is not None
        numbers, values = move
        positions = np.array(self.places.positions)
        positions[numbers] = values
        return replace(self, places=replace(self.places, positions=positions))


@dataclass(frozen=True)
class TailPart(Part):
    """A part that knows its hashes."""

    id_hashes: Hashes | None = None

    @property
    def hashes(self) -> Hashes:
        """uint64 [n], of the ids."""
        return super().hashes if self.id_hashes is None else self.id_hashes


class _Growing:
    """An array [n, ...] that grows at its end. What :meth:`view` gave before stays as it was."""

    def __init__(self, dtype: npt.DTypeLike, *shape: int) -> None:
        self._buffer = np.empty((16, *shape), dtype=dtype)
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def view(self) -> npt.NDArray[Any]:
        return self._buffer[: self._n]

    def append(self, values: npt.NDArray[Any]) -> None:
        end = self._n + len(values)
        if end > len(self._buffer):
            larger = np.empty((max(end, 2 * len(self._buffer)), *self._buffer.shape[1:]), dtype=self._buffer.dtype)
            larger[: self._n] = self._buffer[: self._n]
            self._buffer = larger
        self._buffer[self._n : end] = values
        self._n = end

    def replace(self, rows: Ints, values: npt.NDArray[Any] | bool) -> None:
        self._buffer = self._buffer.copy()  # readers hold views of the old one
        self._buffer[rows] = values


class _GrowingBlobs:
    def __init__(self) -> None:
        self._data, self._offsets = _Growing(np.uint8), _Growing(np.int64)
        self._offsets.append(np.zeros(1, dtype=np.int64))

    def view(self) -> Blobs:
        return Blobs(self._data.view(), self._offsets.view())

    def append(self, blobs: Blobs) -> None:
        n = len(self._data)
        if len(blobs.data):
            self._data.append(blobs.data)
        self._offsets.append(blobs.offsets[1:] + n)


class Tail:
    """The places that are in the journal and in no segment yet. One thread may change it, many may read its parts."""

    def __init__(self, first_row: int, n_code_bytes: int, n_dims: int | None) -> None:
        self.first_row = first_row
        self._codes, self._positions = _Growing(np.uint8, n_code_bytes), _Growing(np.float64, 2)
        self._headings, self._times = _Growing(np.float32), _Growing(np.float64)
        self._ids, self._metadata, self._thumbnails = _GrowingBlobs(), _GrowingBlobs(), _GrowingBlobs()
        self._descriptors = None if n_dims is None else _Growing(np.float16, n_dims)
        self._allowed, self._hashes = _Growing(np.bool_), _Growing(np.uint64)
        self._has_removed = False
        self._number: dict[bytes, int] = {}

    def append(self, places: Places, ids: Ids) -> None:
        """``ids`` are those of ``places``."""
        n = len(self._codes)
        self._codes.append(places.codes)
        self._positions.append(places.positions)
        self._headings.append(places.headings)
        self._times.append(places.times)
        self._ids.append(places.ids)
        self._metadata.append(places.metadata)
        self._thumbnails.append(places.thumbnails)
        if self._descriptors is not None and places.descriptors is not None:
            self._descriptors.append(places.descriptors)
        self._allowed.append(np.ones(len(places), dtype=np.bool_))
        self._hashes.append(ids.hashes)
        self._number.update(zip(ids.keys, range(n, n + len(places)), strict=True))

    def remove(self, numbers: Ints) -> None:
        self._allowed.replace(numbers, False)
        self._has_removed = True
        ids = self._ids.view()
        for number in numbers.tolist():
            if self._number.get(key := ids[number]) == number:  # else the id was added again
                del self._number[key]

    def move(self, numbers: Ints, positions: Floats) -> None:
        self._positions.replace(numbers, positions)

    def find(self, ids: Ids) -> tuple[Ints, Ints]:
        """Which of the ids are here, int64 [m], and the numbers of their places."""
        number_of = self._number.get
        found = [(i, number) for i, key in enumerate(ids.keys) if (number := number_of(key)) is not None]
        which, numbers = np.array(found, dtype=np.int64).reshape(-1, 2).T
        return which, numbers

    def part(self) -> Part:
        """What is there now."""
        places = Places(
            self._codes.view(),
            self._positions.view(),
            self._headings.view(),
            self._times.view(),
            self._ids.view(),
            self._metadata.view(),
            self._thumbnails.view(),
            None if self._descriptors is None else self._descriptors.view(),
        )
        allowed = self._allowed.view() if self._has_removed else None
        return TailPart(places, self.first_row, None, allowed, self._hashes.view())
