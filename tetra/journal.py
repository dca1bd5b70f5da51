"""An append-only file of records that survives being killed at any moment.

===========  =========================================================================================
file header  40 bytes: magic ``TeTRAjnl``, uint32 version, uint32 CRC of what follows, 16 bytes of the
             map's id, uint64 number of the first row that this journal may add
record       24 bytes: magic ``rec\\n``, uint32 CRC of what follows, uint64 length of the payload, uint64
             ``synced``; then the payload
===========  =========================================================================================

All little-endian; a CRC is that of zlib. ``synced`` says how many bytes of the file were known to be on the disk when
the record was written.

**Why nothing is lost.** A record is written by one ``write`` before :meth:`Journal.append` returns, so from then on the
operating system holds it: the process may be killed. After :meth:`Journal.sync` the disk holds it: the power may go.
A record that was being written at that moment is torn: shorter than it says, or with a wrong CRC. Nobody was told
that it was there, so readers ignore it and the next writer cuts it off. If the disk is full in the middle of a record,
the writer itself cuts it off and goes on.

**What is torn and what is damaged.** After a power cut anything behind the last sync may be torn, also in its middle.
What had been synced can't be: if a record there is wrong, the file was damaged later, and it is refused, not cut.
How far it had been synced is known from the records behind, and from whoever keeps the journal (``synced``).
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tetra.errors import MapError, MissingMapFileError

Buffer = bytes | memoryview
"""Contiguous memory."""

VERSION = 1

_MAGIC = b"TeTRAjnl"
_HEADER = struct.Struct("<8sII16sQ")
_RECORD_MAGIC = b"rec\n"
_RECORD = struct.Struct("<4sIQQ")
_COVERED = 8  # bytes of a header in front of what its CRC covers: magic and CRC

HEADER_BYTES = _HEADER.size


def _packed(payload: Sequence[Buffer], synced: int) -> bytes:
    covered = struct.pack("<QQ", sum(memoryview(piece).nbytes for piece in payload), synced)
    crc = zlib.crc32(covered)
    for piece in payload:
        crc = zlib.crc32(piece, crc)
    return b"".join((_RECORD_MAGIC, struct.pack("<I", crc), covered, *payload))


def create_journal(path: Path, map_id: str, first_row: int) -> None:
    """Write an empty journal for the map ``map_id`` (32 hexadecimal digits), synced; its folder is not.

    Raises:
        MapError: the file can't be written, for example because the disk is full; then there is none.
    """
    covered = bytes.fromhex(map_id) + struct.pack("<Q", first_row)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            _write_all(fd, _MAGIC + struct.pack("<II", VERSION, zlib.crc32(covered)) + covered)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise MapError(f"{path}: can't be written: {error.strerror}; free space or change permissions") from error


def _write_all(fd: int, data: bytes) -> None:
    """Write all of ``data``; a disk that fills up takes a part first and complains at the next call."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def read_journal(
    path: Path, map_id: str, first_row: int, *, start: int = 0, synced: int = 0, cut: bool = False
) -> tuple[list[bytes], int]:
    """Payloads of the whole records from byte ``start`` on (0: from the first), and where the last of them ends.

    A torn end is left out. ``synced`` bytes are known to have been on the disk. ``cut`` takes damage for a torn end.

    Raises:
        MapError: the file is missing, of another map, of a newer version, shorter than ``synced``, or damaged.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
            _check_header(path, header, map_id, first_row)
            start = max(start, HEADER_BYTES)
            file.seek(start)
            data = file.read()
    except FileNotFoundError:
        raise MissingMapFileError(f"{path}: is missing, the map needs it; restore the map from a copy") from None
    except OSError as error:
        raise MapError(f"{path}: can't be read: {error.strerror}; check its permissions or restore it") from None
    payloads = []
    position = 0
    while (record := _record_at(data, position)) is not None:
        payloads.append(record[0])
        position += _RECORD.size + len(record[0])
    end = start + position
    if position < len(data):
        synced = max([synced, *(later for _, later in _records_behind(data, position + 1))])
    if end < synced and not cut:
        n_bytes = start + len(data)
        found = f"is truncated, {n_bytes} of {synced} bytes" if n_bytes < synced else f"is damaged at byte {end}"
        raise MapError(
            f"{path}: {found}; restore it from a copy, or lose what follows by opening the map with repair=True"
        )
    return payloads, end


def _record_at(data: bytes, position: int) -> tuple[bytes, int] | None:
    """(payload, synced) of the whole and right record at ``position``, if there is one."""
    if position + _RECORD.size > len(data):
        return None
    magic, crc, length, synced = _RECORD.unpack_from(data, position)
    end = position + _RECORD.size + length
    if magic != _RECORD_MAGIC or end > len(data) or zlib.crc32(memoryview(data)[position + _COVERED : end]) != crc:
        return None
    return data[position + _RECORD.size : end], synced


def _records_behind(data: bytes, position: int) -> Iterator[tuple[bytes, int]]:
    """Right records that begin anywhere at or behind ``position``."""
    while (position := data.find(_RECORD_MAGIC, position)) >= 0:
        record = _record_at(data, position)
        position += 1
        if record is not None:
            position += _RECORD.size - 1 + len(record[0])
            yield record


def _check_header(path: Path, header: bytes, map_id: str, first_row: int) -> None:
    if len(header) < HEADER_BYTES:
        raise MapError(f"{path}: is truncated, {len(header)} of at least {HEADER_BYTES} bytes; restore it from a copy")
    magic, version, crc, owner, row = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise MapError(f"{path}: is no journal of a place map (begins with {magic!r}); restore it from a copy")
    if version > VERSION:
        raise MapError(
            f"{path}: journal format {version}, this release reads up to {VERSION}; "
            "upgrade: pip install --upgrade tetra-vpr"
        )
    if zlib.crc32(header[16:]) != crc:
        raise MapError(f"{path}: is damaged at its beginning; restore it from a copy")
    if owner.hex() != map_id or row != first_row:
        raise MapError(
            f"{path}: belongs to another place map or another state of it (map {owner.hex()[:12]}, first row {row}); "
            "restore the one of this map"
        )


class Journal:
    """The writing end of a journal that exists. Safe to use from several threads.

    Args:
        path: of the file.
        end: where its last whole record ends; what lies behind is cut off.
        sync_records, sync_seconds: unsynced records are synced when there are that many, by the call that writes the
            last, or after that time, by a thread that holds up nobody; so it happens when nothing more is written too.

    Raises:
        MapError: the file can't be opened for writing.
    """

    def __init__(self, path: Path, end: int, *, sync_records: int, sync_seconds: float) -> None:
        self.path = path
        self._sync_records, self._sync_seconds = sync_records, sync_seconds
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self._broken = ""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise MapError(f"{path}: can't be opened: {error.strerror}; check its permissions") from None
        self.n_bytes = end
        """size of the file"""
        self.synced = 0
        """so many bytes of it are on the disk"""
        self.n_records = 0
        """records appended since it was opened"""
        self._n_synced = 0  # of these records
        try:
            if os.fstat(self._fd).st_size > end:
                os.ftruncate(self._fd, end)
            os.lseek(self._fd, end, os.SEEK_SET)
            # A writer that was killed may have left records that only the operating system holds.
            self._sync()
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, *payload: Buffer) -> None:
        """Write a record, its payload in pieces; when this returns, it survives the end of the process.

        Raises:
            MapError: it can't be written, for example because the disk is full; then the file is as it was. Or it
                was written but could not be synced, after which the journal takes no more records.
        """
        with self._lock:
            self._check_usable()
            record = _packed(payload, self.synced)
            try:
                _write_all(self._fd, record)
            except OSError as error:
                self._undo()
                raise MapError(
                    f"{self.path}: can't be written: {error.strerror}; nothing was added, free space and try again"
                ) from error
            except BaseException:  # an interrupt between two writes
                self._undo()
                raise
            self.n_bytes += len(record)
            self.n_records += 1
            n_unsynced = self.n_records - self._n_synced
            if n_unsynced >= self._sync_records:
                self._sync()
            elif self._timer is None:
                self._start_timer()

    def _undo(self) -> None:
        try:
            os.ftruncate(self._fd, self.n_bytes)
            os.lseek(self._fd, self.n_bytes, os.SEEK_SET)
        except OSError as error:
            self._broken = f"a record that was half written can't be cut off ({error.strerror})"

    def sync(self) -> None:
        """When this returns, every record survives a power cut.

        Raises:
            MapError: the disk could not take them. The journal takes no more records after that, since nobody can say
                which of them it holds.
        """
        with self._lock:
            self._check_usable()
            if self.n_records > self._n_synced:
                self._sync()

    def _sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._break(error)
            self._check_usable()
        self.synced, self._n_synced = self.n_bytes, self.n_records

    def _break(self, error: OSError) -> None:
        # The system may have dropped what it could not write, and the next fsync would not tell.
        self._broken = f"it can't be synced to the disk ({error.strerror})"

    def _check_usable(self) -> None:
        if self._fd < 0:
            raise MapError(f"{self.path}: the journal is closed; open the map again")
        if self._broken:
            raise MapError(f"{self.path}: {self._broken}; check the disk and open the map again")

    def _start_timer(self) -> None:
        self._timer = threading.Timer(self._sync_seconds, self._on_time)  # by a clock that never goes back
        self._timer.daemon = True
        self._timer.start()

    def _on_time(self) -> None:
        """Sync what is there now, while others go on appending."""
        with self._lock:
            if self._fd < 0 or self._broken:
                return
            n_bytes, n_records = self.n_bytes, self.n_records
            fd = os.dup(self._fd)  # close() may close the other one
        try:
            os.fsync(fd)
        except OSError as error:
            with self._lock:
                self._break(error)  # the next call says so
            return
        finally:
            os.close(fd)
        with self._lock:
            self._timer = None
            self.synced, self._n_synced = max(self.synced, n_bytes), max(self._n_synced, n_records)
            if self._fd >= 0 and self.n_records > self._n_synced:
                self._start_timer()

    def close(self, *, sync: bool = True) -> None:
        """Sync and close. Raises what :meth:`sync` raises, and is closed all the same."""
        with self._lock:
            if self._fd < 0:
                return
            try:
                if sync and self.n_records > self._n_synced and not self._broken:
                    self._sync()
            finally:
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
                os.close(self._fd)
                self._fd = -1
