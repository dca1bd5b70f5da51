"""From one set of a map's files to the next: parts become segments, the journal begins anew, the manifest changes.

Until the manifest is replaced the old files are complete and nothing of them has changed; from then on the new ones
are. Whoever is killed in between leaves files that no manifest names, which the next writer deletes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tetra.errors import MapError
from tetra.journal import HEADER_BYTES, Journal, create_journal
from tetra.map_columns import Part
from tetra.map_manifest import Manifest, read_manifest, sync_folder, write_manifest
from tetra.map_segments import Segment, SegmentEntry, damage_named, write_changes, write_segment
from tetra.map_tiers import join_youngest, size_of

KEEP_SHARE = 0.5
"""of a segment's places; with fewer left it is written anew"""


@dataclass(frozen=True)
class Saved:
    """The files that count now."""

    manifest: Manifest
    segments: list[Part]
    journal: Journal
    """empty, open for writing"""


def open_segment(folder: Path, manifest: Manifest, entry: SegmentEntry) -> Segment:
    """A segment of the map; see :meth:`tetra.map_segments.Segment.open`."""
    return Segment.open(folder, entry, manifest.map_id, manifest.code_bytes, manifest.descriptor_dims)


def planned(parts: Sequence[Part], limit_bytes: int) -> list[list[Part]]:
    """All parts in groups, each of which is to be one segment: the youngest may be joined."""
    first = join_youngest([size_of(part) for part in parts], limit_bytes)
    return [*([part] for part in parts[:first]), list(parts[first:])]


def save_parts(
    folder: Path,
    old: Manifest,
    groups: Sequence[Sequence[Part]],
    added: Sequence[Part],
    next_row: int,
    sync_policy: Mapping[str, Any],
    keep_share: float = KEEP_SHARE,
) -> Saved:
    """Make every group of parts one segment, add the places of ``added`` behind, and begin an empty journal.

    Args:
        old: the manifest that is in force.
        added: parts of this map or of another one; their places get rows from ``next_row`` on.
        sync_policy: of the new journal.
        keep_share: a segment with fewer of its places left is written anew.

    Raises:
        TetraError: a file can't be written, for example because the disk is full. Then ``old`` stays in force and the
            new files are gone, which also holds for an interrupt, unless it came after the manifest was replaced.
    """
    number, first_row = old.next_file, next_row
    new_files: list[Path] = []

    def name(kind: str, suffix: str = "safetensors") -> Path:
        nonlocal number
        new_files.append(folder / f"{kind}-{number:06d}.{suffix}")
        number += 1
        return new_files[-1]

    def written(parts: Sequence[Part], first_row: int | None = None) -> Segment:
        file = write_segment(name("segment"), old.map_id, parts, first_row)
        n = sum(part.n_allowed for part in parts)
        if first_row is None:
            kept = parts[0].kept()
            first_row = int(parts[0].row_numbers(np.zeros(1, dtype=np.int64) if kept is None else kept[:1])[0])
        return open_segment(folder, old, SegmentEntry(**file.__dict__, n_places=n, first_row=first_row))

    journal: Journal | None = None
    try:
        segments: list[Part] = []
        with damage_named(folder):
            for group in groups:
                parts = [part for part in group if part.n_allowed]
                if len(parts) == 1 and isinstance(parts[0], Segment):
                    segment = parts[0]
                    if segment.n_allowed >= keep_share * len(segment.places):
                        segments.append(_with_changes(folder, old, segment, name) if segment.is_dirty else segment)
                        continue
                if parts:
                    segments.append(written(parts))
            if added:
                segments.append(written(added, first_row))
                first_row += sum(part.n_allowed for part in added)
        path = name("journal", "log")
        create_journal(path, old.map_id, first_row)
        journal = Journal(path, HEADER_BYTES, **sync_policy)
        manifest = replace(
            old,
            segments=tuple(segment.entry for segment in segments if isinstance(segment, Segment)),
            journal=path.name,
            journal_first_row=first_row,
            journal_synced=HEADER_BYTES,
            next_file=number,
        )
        sync_folder(folder)
        write_manifest(folder, manifest, replaces=old)
    except BaseException:
        if journal is not None:
            journal.close(sync=False)
        if is_in_force(folder, old):
            for file in new_files:
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
        raise
    return Saved(manifest, segments, journal)


def delete_replaced(folder: Path, old: Manifest, new: Manifest) -> None:
    """Delete the files that the new manifest does not name any more, once it survives a power cut."""
    sync_folder(folder)
    for file in old.files - new.files:
        with contextlib.suppress(OSError):
            (folder / file).unlink()


def is_in_force(folder: Path, manifest: Manifest) -> bool:
    """Whether the map is still as the manifest says."""
    try:
        return read_manifest(folder) == manifest
    except MapError:
        return False


def _with_changes(folder: Path, manifest: Manifest, segment: Segment, name: Callable[[str], Path]) -> Segment:
    """The segment with what was moved and removed in a file."""
    changes = write_changes(name("changes"), manifest.map_id, segment, positions=segment.is_moved)
    n_removed = len(segment.places) - segment.n_allowed
    return open_segment(folder, manifest, replace(segment.entry, changes=changes, n_removed=n_removed))
