"""A map of places: codes, where they were taken, and whatever else is known of them, in a folder.

=========================  ==========================================================================================
``map.json``               manifest: which files count, see :mod:`tetra.map_manifest`
``segment-N.safetensors``  places, immutable, see :mod:`tetra.map_segments`
``changes-N.safetensors``  what of a segment is no longer so: positions, and which places were removed
``journal-N.log``          what was done since, see :mod:`tetra.journal`
``lock``                   held by the one writer; its process id
=========================  ==========================================================================================

**Rows.** Every place gets a row, a number that counts the places ever added. It is never used again and never changes,
so order by row is order of insertion, and hits stay valid whatever happens to the map.

**What survives.** What a call has returned for is there after the process was killed, at any moment. After a power cut,
everything up to the last :meth:`PlaceMap.sync`, :meth:`~PlaceMap.save` or :meth:`~PlaceMap.close` is there, and what
the writer synced by itself: the changes of the last ``sync_seconds`` (and of the time that the disk then takes), or the
last ``sync_records`` of them, may be missing, but none in front of one that is there. A call is there as a whole or not
at all.

Why: each change is one record in the journal (see there). :meth:`PlaceMap.save`, which also runs by itself when the
journal is long, writes the places of the journal as a segment, begins an empty journal under a new name, syncs all this
and then replaces the manifest, which is atomic. Until then the old files are complete, from then on the new ones are;
whichever do not count are deleted, by this writer or by the next.

**Segments** are joined as :mod:`tetra.map_tiers` says, so that a map has few of them and removed places leave the disk.
A segment is not joined beyond a gigabyte, so that no call takes long.

**Threads and processes.** One process at a time may write, and one of its threads at a time. Any number of threads may
read without waiting: they see the state before a change or after it. Other processes open the map read-only and call
:meth:`PlaceMap.refresh` to see what was added.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tetra.coordinates import CoordinateFrame
from tetra.errors import MapError, MissingMapFileError, TetraError
from tetra.journal import HEADER_BYTES, Journal, create_journal, read_journal
from tetra.map_checks import (
    LARGEST,
    check_descriptors,
    check_headings,
    check_metadata,
    check_numbers,
    check_positions,
    check_thumbnails,
    check_whole,
    to_json,
)
from tetra.map_columns import Added, Floats, Ids, Ints, Moved, Part, Places, Removed, Tail, TailPart, decode, joined
from tetra.map_lock import lock_map
from tetra.map_manifest import LOCK, MANIFEST, Manifest, is_leftover, read_manifest, sync_folder, write_manifest
from tetra.map_reader import MapReader, one_code
from tetra.map_saving import KEEP_SHARE, delete_replaced, is_in_force, open_segment, planned, save_parts
from tetra.map_search import DeviceSearch, PartSearch
from tetra.map_segments import Segment, check_data, damage_named
from tetra.map_state import Hits, Match, State
from tetra.map_tiers import pack_all, size_of
from tetra.regions import Region

__all__ = ["Hits", "Match", "PlaceMap", "Region"]

_MERGE_BLOCK = 1 << 16  # ids compared at a time


class PlaceMap(MapReader):
    """A place map on disk: made by :meth:`create`, opened by :meth:`open`, a context manager that closes it.

    Attributes:
        path: the folder.
        frame: what positions mean.
        model_hash: content hash of the model whose codes it holds.
        code_bytes: of a code.
        descriptor_dims: values of the float descriptors that are kept beside the codes, or None.
        read_only: nothing can be changed through this object.
    """

    # When the journal is longer than this, the next change first saves. That bounds memory and the time to open: bytes
    # have to be copied, records decoded one by one.
    journal_limit_bytes = 1 << 26
    journal_limit_records = 1 << 14
    # Segments are not joined beyond this size.
    segment_limit_bytes = 1 << 30
    # Files of segments that are read and checked as the map is opened, if they have no more bytes together: a twentieth
    # of a second. More of them are checked by verify().
    checked_bytes = 1 << 26

    def __init__(
        self,
        folder: Path,
        lock_fd: int | None,
        sync_records: int,
        sync_seconds: float,
        repair: bool,
        searcher: PartSearch,
    ) -> None:
        """Use :meth:`open`."""
        self.path = folder
        self._searcher = searcher
        self._map_id = ""
        self.read_only = lock_fd is None
        self._lock_fd = lock_fd
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._sync_policy: dict[str, Any] = {"sync_records": sync_records, "sync_seconds": sync_seconds}
        self._journal: Journal | None = None
        self._is_closed = False
        self._broken = ""
        self._segments: list[Part] = []
        self._n_replayed = 0
        self._load(repair)
        if not self.read_only:
            self._delete_leftovers()
            end = self._journal_end
            self._journal = Journal(folder / self._manifest.journal, end, **self._sync_policy)
            if end < self._manifest.journal_synced:  # repaired
                self._replace_manifest(journal_synced=end)

    # --- create, open, close ---

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        model_hash: str,
        code_bytes: int,
        frame: CoordinateFrame,
        keep_descriptors: int | None = None,
        sync_records: int = 1 << 14,
        sync_seconds: float = 1.0,
        search_devices: Sequence[torch.device | str] | None = None,
    ) -> PlaceMap:
        """Make an empty map in the new folder ``path`` and open it for writing.

        Args:
            model_hash: ``content_hash`` of the model whose codes will be added.
            code_bytes: of every code, at least 1.
            frame: what positions mean.
            keep_descriptors: number of values of the float descriptors to keep as float16, for re-ranking; None: none.
            sync_records, sync_seconds, search_devices: as in :meth:`open`.

        Raises:
            MapError: ``path`` is a map already, a file, or a folder with other things; it can't be written; an argument
                cannot be.
        """
        if not model_hash or not isinstance(model_hash, str):
            raise MapError(
                f"model_hash {model_hash!r}: name the model by its content_hash; save it first if it has none"
            )
        check_whole(code_bytes, "code_bytes", 1, "it has to be a whole number from 1 on")
        if keep_descriptors is not None:
            check_whole(keep_descriptors, "keep_descriptors", 1, "it has to be a whole number from 1 on")
        if not isinstance(frame, CoordinateFrame):
            raise MapError(f"frame {frame!r}: pass a CoordinateFrame, such as CoordinateFrame.parse('utm 32 north')")
        searcher = _searcher(search_devices)
        folder = Path(os.path.abspath(path))
        if (folder / MANIFEST).exists():
            raise MapError(f"{path}: is a place map already; open it or choose another name")
        if folder.exists() and not folder.is_dir():
            raise MapError(f"{path}: is a file; choose another name")
        try:
            folder.mkdir(exist_ok=True)
            others = sorted(name for name in os.listdir(folder) if name != LOCK and not is_leftover(name, None))
        except OSError as error:
            raise MapError(
                f"{path}: can't be created: {error.strerror}; the folder above has to exist and be writable"
            ) from None
        if others:
            raise MapError(f"{path}: holds other files ({others[0]}); name a new or an empty folder")
        lock_fd = lock_map(folder)
        try:
            manifest = Manifest(
                map_id=secrets.token_hex(16),
                model_hash=model_hash,
                code_bytes=code_bytes,
                frame=frame,
                descriptor_dims=keep_descriptors,
                segments=(),
                journal="journal-000000.log",
                journal_first_row=0,
                journal_synced=HEADER_BYTES,
                next_file=1,
            )
            create_journal(folder / manifest.journal, manifest.map_id, 0)
            sync_folder(folder)
            write_manifest(folder, manifest)
            sync_folder(folder)
            sync_folder(folder.parent)
            return cls(folder, lock_fd, sync_records, sync_seconds, False, searcher)
        except BaseException:
            os.close(lock_fd)
            raise

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        read_only: bool = False,
        model_hash: str | None = None,
        sync_records: int = 1 << 14,
        sync_seconds: float = 1.0,
        repair: bool = False,
        search_devices: Sequence[torch.device | str] | None = None,
    ) -> PlaceMap:
        """Open a map. Takes the time to read the journal, and the segments of a small map; :meth:`verify` checks all.

        Args:
            read_only: others may write meanwhile; needs no right to write.
            model_hash: refuse the map unless it is of this model.
            sync_records, sync_seconds: changes are synced to disk when that many are not, and after that time. What is
                not synced yet a power cut can take; a killed process loses nothing.
            repair: if the journal is damaged, lose its records from the damage on instead of refusing it.
            search_devices: such as ``["cuda"]``: search segments there, with the same answers. Their codes are laid out
                on the devices, by rows, as far as they fit; None: they are searched on the CPU, in their files.

        Raises:
            MapError: there is no map; a file of it is missing, truncated, altered, of another map or of a newer format;
                it is of another model; another writer has it open; a permission or a device is missing.
        """
        folder = Path(os.path.abspath(path))
        manifest = read_manifest(folder)  # before the lock, whose file would be made in any folder
        if model_hash is not None and model_hash != manifest.model_hash:
            raise MapError(
                f"{path}: holds codes of the model {manifest.model_hash[:12]}, not of {model_hash[:12]}; "
                "use that model, or build the map again"
            )
        if sync_records < 1 or not sync_seconds > 0:
            raise MapError(f"sync_records {sync_records}, sync_seconds {sync_seconds}: both have to be above 0")
        searcher = _searcher(search_devices)
        lock_fd = None if read_only else lock_map(folder)
        try:
            return cls(folder, lock_fd, sync_records, sync_seconds, repair, searcher)
        except BaseException:
            if lock_fd is not None:
                os.close(lock_fd)
            raise

    def __enter__(self) -> PlaceMap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Sync, and let others write. Searching goes on working; closing twice does nothing.

        Raises:
            MapError: the journal can't be synced; the map is closed all the same.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            if self._journal is None or self._lock_fd is None:
                return
            if os.getpid() != self._pid:  # a fork: the map is the parent's, whose lock this process shares
                self._journal.close(sync=False)
                os.close(self._lock_fd)
                return
            try:
                self._journal.close()
                if self._journal.synced != self._manifest.journal_synced and not self._broken:
                    # Lets the next one tell damage from a torn end; without it nothing is lost.
                    with contextlib.suppress(TetraError):
                        self._replace_manifest(journal_synced=self._journal.synced)
            finally:
                os.close(self._lock_fd)

    def _load(self, repair: bool = False) -> None:
        """Read the manifest and all that it names."""
        for attempt in range(100):
            manifest = read_manifest(self.path)
            try:
                self._load_files(manifest, repair)
                return
            except MissingMapFileError:
                # A writer may have replaced the files between the manifest and now. Else they are really gone.
                if not self.read_only or read_manifest(self.path) == manifest or attempt == 99:
                    raise

    def _load_files(self, manifest: Manifest, repair: bool) -> None:
        self._refuse_other_map(manifest)
        known = {s.entry: s for s in self._segments if isinstance(s, Segment) and not s.is_dirty}
        new_files = [file for entry in manifest.segments if entry not in known for file in entry.files]
        segments: list[Part] = [known.get(e) or open_segment(self.path, manifest, e) for e in manifest.segments]
        if sum(file.n_bytes for file in new_files) <= self.checked_bytes:
            for file in new_files:
                check_data(self.path / file.file, file)
        payloads, end = read_journal(
            self.path / manifest.journal,
            manifest.map_id,
            manifest.journal_first_row,
            synced=manifest.journal_synced,
            cut=repair,
        )
        self._manifest, self._map_id = manifest, manifest.map_id
        self._segments = segments
        self._tail = Tail(manifest.journal_first_row, manifest.code_bytes, manifest.descriptor_dims)
        self._next_row = manifest.journal_first_row
        self._n_replayed = self._journal_end = 0
        self._replay(payloads, end)

    def _refuse_other_map(self, manifest: Manifest) -> None:
        if self._map_id not in ("", manifest.map_id):
            raise MapError(f"{self.path}: another map was put in its place; open it again")

    def _replay(self, payloads: list[bytes], end: int) -> None:
        try:
            records = joined([decode(p, self.code_bytes, self.descriptor_dims) for p in payloads])
            self._apply(records)
        except ValueError as error:
            raise MapError(
                f"{self.path / self._manifest.journal}: holds a record that does not fit ({error}); restore the map "
                "from a copy"
            ) from None
        self._n_replayed += len(payloads)
        self._journal_end = end

    def _delete_leftovers(self) -> None:
        with contextlib.suppress(OSError):
            for name in os.listdir(self.path):
                if is_leftover(name, self._manifest):
                    (self.path / name).unlink(missing_ok=True)

    # --- facts ---

    @property
    def calibration(self) -> dict[str, Any] | None:
        """What was measured of the confidence of answers, as plain JSON values. Setting it is durable at once.

        Raises :class:`~tetra.errors.MapError` if set on a read-only map, or to what JSON can't hold.
        """
        return self._manifest.calibration

    @calibration.setter
    def calibration(self, value: dict[str, Any] | None) -> None:
        with self._writing():
            self._replace_manifest(calibration=None if value is None else json.loads(to_json(value, "calibration")))

    def _replace_manifest(self, **changes: Any) -> None:
        manifest = replace(self._manifest, **changes)
        write_manifest(self.path, manifest, replaces=self._manifest)
        self._manifest = manifest
        sync_folder(self.path)

    def statistics(self) -> dict[str, int]:
        """Counts of places, of removed ones still on disk, of segments, bytes and journal records."""
        with self._lock:
            state, manifest = self._state, self._manifest
            journal_bytes, records = self._journal_end, self._n_replayed
            if self._journal is not None:
                journal_bytes, records = self._journal.n_bytes, records + self._journal.n_records
        files = sum(file.n_bytes for segment in manifest.segments for file in segment.files)
        return {
            "places": state.n_places,
            "removed": sum(len(part.places) - part.n_allowed for part in state.parts),
            "segments": len(manifest.segments),
            "bytes": files + journal_bytes,
            "journal_bytes": journal_bytes,
            "journal_records": records,
        }

    # --- changing ---

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock:
            if self.read_only:
                raise MapError(f"{self.path}: is open read-only; open it without read_only to change it")
            if self._is_closed or self._journal is None:
                raise MapError(f"{self.path}: is closed; open it again")
            if os.getpid() != self._pid:
                raise MapError(f"{self.path}: was opened by process {self._pid}, which forked; let that one write")
            if self._broken:
                raise MapError(f"{self.path}: {self._broken}; open it again")
            yield

    def add(
        self,
        id: str,
        code: Tensor | npt.NDArray[np.uint8],
        position: tuple[float, float] | None,
        *,
        heading: float | None = None,
        time: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        thumbnail: bytes | None = None,
        descriptor: Tensor | npt.NDArray[Any] | None = None,
        frame: CoordinateFrame | None = None,
    ) -> int:
        """Add one place and return its row; see :meth:`add_many`. ``code`` is uint8 [B], ``descriptor`` float [D]."""
        rows = self.add_many(
            [id],
            one_code(code),
            None if position is None else [position],
            headings=None if heading is None else [heading],
            times=None if time is None else [time],
            metadata=None if metadata is None else [metadata],
            thumbnails=None if thumbnail is None else [thumbnail],
            descriptors=None if descriptor is None else descriptor[None],
            frame=frame,
        )
        return int(rows[0])

    def add_many(
        self,
        ids: Sequence[str],
        codes: Tensor | npt.NDArray[np.uint8],
        positions: npt.ArrayLike | Sequence[tuple[float, float] | None] | None,
        *,
        headings: npt.ArrayLike | Sequence[float | None] | None = None,
        times: npt.ArrayLike | Sequence[float | None] | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        thumbnails: Sequence[bytes | None] | None = None,
        descriptors: Tensor | npt.NDArray[Any] | None = None,
        frame: CoordinateFrame | None = None,
    ) -> Ints:
        """Add n places, all or none, and return their rows, int64 [n].

        Args:
            ids: names, each once in the map: relative paths without ``..``, at most 512 bytes of UTF-8. An id that was
                removed may be added again.
            codes: uint8 [n, B] of the map's model.
            positions: [n, 2] metres in the map's frame. None, for all or in a list for some: unknown.
            headings: [n] degrees, -360 to 360, clockwise from north (or from the y axis); kept in [0, 360).
            times: [n] seconds from any origin, in any order. The map itself never asks what time it is.
            metadata: what JSON can hold, at most a megabyte each.
            thumbnails: JPEG files, at most 16 MB each.
            descriptors: float [n, D], for a map that keeps them.
            frame: of the positions; refused unless it is the map's.

        Raises:
            MapError: any of these cannot be, or an id is there already; or the disk is full or fails. Nothing was added
                then, and once there is space again the map goes on working.
        """
        with self._writing():
            checked, places = self._check_places(
                ids, codes, positions, headings, times, metadata, thumbnails, descriptors, frame
            )
            self._make_room()
            rows = np.arange(self._next_row, self._next_row + len(places))
            if places.n_bytes > self.journal_limit_bytes:
                self._commit(self._planned(), [TailPart(places, 0, id_hashes=checked.hashes)])
            elif len(places):
                self._record(Added(self._next_row, places), checked)
            return rows

    def remove(self, ids: Sequence[str]) -> None:
        """Remove places, all or none; they keep nothing but their row. Their ids may be added again.

        Raises:
            MapError: an id is not in the map, or as :meth:`add_many`.
        """
        with self._writing():
            rows = np.unique(self._known_rows(ids))
            self._make_room()
            if len(rows):
                self._record(Removed(rows))

    def update_positions(self, ids: Sequence[str], positions: npt.ArrayLike) -> None:
        """Give n places new positions [n, 2], all or none; codes and everything else stay as they are.

        Meant for many at once, such as after a pose graph was optimised: the positions of each segment with a place
        among them are copied, 16 bytes a place.

        Raises:
            MapError: an id is not in the map or named twice, a position cannot be, or as :meth:`add_many`.
        """
        with self._writing():
            rows = self._known_rows(ids)
            unique, first = np.unique(rows, return_index=True)
            if len(unique) != len(rows):
                twice = self.ids(rows[np.setdiff1d(np.arange(len(rows)), first)[:1]])[0]
                raise MapError(f"ids: {twice!r} is named twice; give each place one position")
            moved = check_positions(positions, len(rows), self.frame, may_lack=False)
            self._make_room()
            if len(rows):
                self._record(Moved(rows, moved))

    def sync(self) -> None:
        """When this returns, everything so far survives a power cut.

        Raises:
            MapError: the disk could not take it; the map has to be opened again.
        """
        with self._writing():
            self._open_journal.sync()

    def save(self) -> None:
        """Put what is in the journal into a segment. Runs by itself when the journal is long.

        Raises:
            TetraError: it can't be written, for example because the disk is full; then the map is as it was.
        """
        with self._writing():
            if self._journal_records():
                self._commit(self._planned())

    def compact(self) -> None:
        """As :meth:`save`, and rewrite the map into as few segments as possible, without the places that were removed.

        Raises:
            TetraError: as :meth:`save`.
        """
        with self._writing():
            parts = self._parts_with_places()
            sizes = [size_of(part) * part.n_allowed // len(part.places) for part in parts]
            left = iter(parts)
            groups = [list(islice(left, count)) for count in pack_all(sizes, self.segment_limit_bytes)]
            is_tidy = len(groups) == len(self._segments) and not self._journal_records()
            if not is_tidy or any(part.allowed is not None for part in self._segments):
                self._commit(groups, keep_share=1.0)

    def merge(self, other: PlaceMap) -> Ints:
        """Add all places of another map of the same model and frame, all or none; returns their rows, int64 [n].

        They are streamed from file to file: memory for a few numbers a place is enough.

        Raises:
            MapError: model, code length or frame differ; an id is in both; this map keeps descriptors and the other
                does not. Or as :meth:`add_many`.
        """
        with self._writing():
            for name in ("model_hash", "code_bytes", "frame"):
                mine, its = getattr(self, name), getattr(other, name)
                if mine != its:
                    raise MapError(
                        f"{other.path}: its {name} is {str(its)[:32]}, that of {self.path} is {str(mine)[:32]}; only "
                        "maps of one model and one frame can be merged"
                    )
            if self.descriptor_dims not in (None, other.descriptor_dims):
                raise MapError(
                    f"{other.path}: keeps {other.descriptor_dims or 'no'} descriptor values a place, "
                    f"{self.path} {self.descriptor_dims}; build it with the same"
                )
            added: list[Part] = []
            for part in other._state.parts:
                kept = np.arange(len(part.places)) if (numbers := part.kept()) is None else numbers
                for start in range(0, len(kept), _MERGE_BLOCK):
                    with damage_named(other.path):
                        ids = Ids.trusted(part.places.ids.take(kept[start : start + _MERGE_BLOCK]))
                    self._refuse_known(ids, f"{other.path}: ")
                if self.descriptor_dims is None and part.places.descriptors is not None:
                    part = replace(part, places=replace(part.places, descriptors=None))
                if len(kept):
                    added.append(part)
            first = self._next_row
            if added:
                self._commit(self._planned(), added)
            return np.arange(first, self._next_row)

    def _journal_records(self) -> int:
        return self._n_replayed + (0 if self._journal is None else self._journal.n_records)

    @property
    def _open_journal(self) -> Journal:
        assert self._journal is not None  # as _writing has checked
        return self._journal

    def _make_room(self) -> None:
        """Save first if the journal is long: afterwards it would be too late to say that a change failed."""
        if (
            self._open_journal.n_bytes > self.journal_limit_bytes
            or self._journal_records() >= self.journal_limit_records
        ):
            self._commit(self._planned())

    def _record(self, record: Added | Removed | Moved, ids: Ids | None = None) -> None:
        """Do what has been checked: from the moment that the journal has it, it is done."""
        self._open_journal.append(*record.encode())
        self._apply([record], ids)

    def _apply(self, records: Sequence[Added | Removed | Moved], ids: Ids | None = None) -> None:
        """Change the state in memory as the records in the journal say; ``ids`` are those of a single Added."""
        removed = [record.rows for record in records if isinstance(record, Removed)]
        moved = [record for record in records if isinstance(record, Moved)]
        for record in records:
            if isinstance(record, Added):
                if record.first_row != self._next_row:
                    raise ValueError(f"row {record.first_row} where {self._next_row} comes next")
                places = record.places
                self._tail.append(places, ids or Ids.trusted(places.ids))
                self._next_row += len(places)
        # All at once: each time a segment's column is copied. Whether a place was moved before it was removed or
        # after makes no difference, and of several moves numpy keeps the last.
        if moved:
            rows, values = np.concatenate([m.rows for m in moved]), np.concatenate([m.positions for m in moved])
            self._change(rows, values)
        if removed:
            self._change(np.concatenate(removed), None)
        self._publish()

    def _change(self, rows: Ints, positions: Floats | None) -> None:
        """Give the places ``rows`` these positions, or remove them."""
        for i, part in enumerate(self._segments):
            numbers = part.local_numbers(rows)
            known = numbers >= 0
            if known.any():
                numbers = numbers[known]
                self._segments[i] = (
                    part.changed(remove=numbers)
                    if positions is None
                    else part.changed(move=(numbers, positions[known]))
                )
        numbers = self._tail.part().local_numbers(rows)
        known = numbers >= 0
        if known.any() and positions is None:
            self._tail.remove(numbers[known])
        elif known.any() and positions is not None:
            self._tail.move(numbers[known], positions[known])

    def _publish(self) -> None:
        parts = (*self._segments, self._tail.part())
        self._searcher.follow(parts)
        self._state = State(parts, self._tail, self._searcher)

    # --- segments ---

    def _parts_with_places(self) -> list[Part]:
        return [part for part in (*self._segments, self._tail.part()) if part.n_allowed]

    def _planned(self) -> list[list[Part]]:
        return planned(self._parts_with_places(), self.segment_limit_bytes)

    def _commit(
        self, groups: Sequence[Sequence[Part]], added: Sequence[Part] = (), keep_share: float = KEEP_SHARE
    ) -> None:
        """Save the parts as :func:`tetra.map_saving.save_parts` does, and go on with what it made."""
        old, old_journal = self._manifest, self._journal
        try:
            saved = save_parts(self.path, old, groups, added, self._next_row, self._sync_policy, keep_share)
        except BaseException:
            if not is_in_force(self.path, old):
                self._broken = "was interrupted while it was saved"
            raise
        self._manifest, self._segments, self._journal = saved.manifest, saved.segments, saved.journal
        self._next_row = saved.manifest.journal_first_row
        self._tail = Tail(self._next_row, self.code_bytes, self.descriptor_dims)
        self._n_replayed = 0
        self._publish()
        if old_journal is not None:
            old_journal.close(sync=False)
        delete_replaced(self.path, old, saved.manifest)

    # --- checks ---

    def _check_places(
        self,
        ids: Sequence[str],
        codes: Tensor | npt.NDArray[np.uint8],
        positions: Any,
        headings: Any,
        times: Any,
        metadata: Sequence[Mapping[str, Any] | None] | None,
        thumbnails: Sequence[bytes | None] | None,
        descriptors: Tensor | npt.NDArray[Any] | None,
        frame: CoordinateFrame | None,
    ) -> tuple[Ids, Places]:
        checked = Ids.of(ids)
        n = len(checked.keys)
        if frame is not None and frame != self.frame:
            raise MapError(
                f"positions: they are in '{frame}', the map {self.path} is in '{self.frame}'; convert them first"
            )
        places = Places(
            self._check_codes(codes, n),
            check_positions(positions, n, self.frame),
            check_headings(headings, n),
            check_numbers(times, n, "times", LARGEST),
            checked.blobs,
            check_metadata(metadata, n),
            check_thumbnails(thumbnails, n),
            self._check_descriptors(descriptors, n),
        )
        self._refuse_known(checked)
        return checked, places

    def _check_descriptors(self, descriptors: Tensor | npt.NDArray[Any] | None, n: int) -> Any:
        dims = self.descriptor_dims
        if dims is None:
            if descriptors is not None:
                raise MapError(f"descriptors: the map {self.path} keeps none; create it with keep_descriptors")
            return None
        if descriptors is None:
            raise MapError(f"descriptors: missing, the map {self.path} keeps {dims} values a place; pass them")
        return check_descriptors(descriptors, n, dims).astype(np.float16)

    def _refuse_known(self, ids: Ids, where: str = "") -> None:
        if len(set(ids.keys)) < len(ids.keys):
            seen: set[bytes] = set()
            twice = next(key for key in ids.keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise MapError(f"{where}ids: {twice.decode()!r} is there twice; ids name one place each")
        with damage_named(self.path):
            rows = self._state.find(ids)
        if (rows >= 0).any():
            known = ids.keys[int((rows >= 0).argmax())].decode()
            raise MapError(
                f"{where}ids: {known!r} is in {self.path} already; remove that place first or rename this one"
            )

    def _known_rows(self, ids: Sequence[str]) -> Ints:
        checked = Ids.of(ids)
        with damage_named(self.path):
            rows = self._state.find(checked)
        if (rows < 0).any():
            unknown = checked.keys[int((rows < 0).argmax())].decode()
            raise MapError(f"ids: {unknown!r} is not in {self.path}; check its spelling")
        return rows

    # --- keeping up, checking ---

    def refresh(self) -> bool:
        """See what the writer has done since; True if there was something. A map open for writing always sees it.

        Raises:
            MapError: as :meth:`open`.
        """
        with self._lock:
            if not self.read_only:
                return False
            manifest = read_manifest(self.path)
            self._refuse_other_map(manifest)
            if manifest.journal != self._manifest.journal:
                self._load()
                return True
            is_new = manifest != self._manifest
            self._manifest = manifest
            start = self._journal_end
            try:
                payloads, end = read_journal(
                    self.path / manifest.journal, manifest.map_id, manifest.journal_first_row, start=start
                )
            except MissingMapFileError:  # replaced since
                self._load()
                return True
            if payloads:
                self._replay(payloads, end)
            return is_new or bool(payloads)

    def verify(self) -> int:
        """Read every file of the map and compare it with its checksum; returns how many bytes were read.

        Raises:
            MapError: a file is damaged; names the first.
        """
        with self._lock:
            manifest = read_manifest(self.path)
            n_bytes = 0
            for segment in manifest.segments:
                for file in segment.files:
                    check_data(self.path / file.file, file)
                    n_bytes += file.n_bytes
            _, end = read_journal(
                self.path / manifest.journal,
                manifest.map_id,
                manifest.journal_first_row,
                synced=max(manifest.journal_synced, 0 if self._journal is None else self._journal.n_bytes),
            )
            return n_bytes + end


def _searcher(devices: Sequence[torch.device | str] | None) -> PartSearch:
    return PartSearch() if devices is None else DeviceSearch(devices)
