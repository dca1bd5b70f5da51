"""The journal: whole records survive, torn ones are cut, damaged ones are refused."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest

from tetra.errors import MapError, MissingMapFileError
from tetra.journal import HEADER_BYTES, Journal, create_journal, read_journal

MAP_ID = "0123456789abcdef" * 2
PAYLOADS = [b"", b"a", b"rec\n" * 9, bytes(range(256)) * 40, b"\0" * 17]
RECORD_HEADER_BYTES = 24


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create_journal(tmp_path / "journal", MAP_ID, 7)
    return tmp_path / "journal"


def write(path: Path, payloads: list[bytes], **policy: float) -> None:
    _, end = read_journal(path, MAP_ID, 7)
    journal = Journal(path, end, **{"sync_records": 1000, "sync_seconds": 1000.0, **policy})  # type: ignore[arg-type]
    for payload in payloads:
        journal.append(payload[:3], memoryview(payload)[3:])
    journal.close()


def read(path: Path, **options: int) -> list[bytes]:
    return read_journal(path, MAP_ID, 7, **options)[0]  # type: ignore[arg-type]


def test_what_goes_in_comes_out(path: Path) -> None:
    assert read(path) == []
    write(path, PAYLOADS[:2])
    write(path, PAYLOADS[2:])
    assert read(path) == PAYLOADS


def test_reading_goes_on_where_it_stopped(path: Path) -> None:
    write(path, PAYLOADS[:3])
    payloads, end = read_journal(path, MAP_ID, 7)
    assert payloads == PAYLOADS[:3]
    write(path, PAYLOADS[3:])
    assert read(path, start=end) == PAYLOADS[3:]


def test_a_torn_end_is_ignored_and_then_cut(path: Path) -> None:
    write(path, PAYLOADS)
    whole = path.read_bytes()
    ends = [HEADER_BYTES]
    for payload in PAYLOADS:
        ends.append(ends[-1] + RECORD_HEADER_BYTES + len(payload))
    assert ends[-1] == len(whole)
    for size in [*range(HEADER_BYTES, 300), *range(ends[-2] - 3, ends[-1] + 1)]:
        path.write_bytes(whole[:size])
        n_whole = sum(end <= size for end in ends) - 1
        assert read(path) == PAYLOADS[:n_whole]
        write(path, [b"next"])
        assert read(path) == [*PAYLOADS[:n_whole], b"next"]


@pytest.mark.parametrize("record", range(len(PAYLOADS)))
@pytest.mark.parametrize("where", ["magic", "crc", "length", "synced", "payload"])
def test_damage_in_what_was_synced_is_refused(path: Path, record: int, where: str) -> None:
    write(path, PAYLOADS)
    size = path.stat().st_size
    start = HEADER_BYTES + sum(RECORD_HEADER_BYTES + len(p) for p in PAYLOADS[:record])
    at = start + {"magic": 0, "crc": 4, "length": 8, "synced": 16, "payload": RECORD_HEADER_BYTES}[where]
    if where == "payload" and not PAYLOADS[record]:
        return
    data = bytearray(path.read_bytes())
    data[at] ^= 0x11
    path.write_bytes(data)
    with pytest.raises(MapError, match=rf"journal: is damaged at byte {start}.*repair=True"):
        read(path, synced=size)
    assert read_journal(path, MAP_ID, 7, synced=size, cut=True) == (PAYLOADS[:record], start)
    # A later record tells that it had been synced, where nobody else does.
    path.write_bytes(data)
    records = bytes(data) + record_bytes(b"later", synced=size)
    path.write_bytes(records)
    with pytest.raises(MapError, match="damaged"):
        read(path)
    # Without that knowledge a power cut may have left it: what follows was not synced either.
    path.write_bytes(bytes(data) + record_bytes(b"later", synced=start))
    assert read(path) == PAYLOADS[:record]


def record_bytes(payload: bytes, synced: int) -> bytes:
    """A record as the format says."""
    covered = struct.pack("<QQ", len(payload), synced) + payload
    return b"rec\n" + struct.pack("<I", zlib.crc32(covered)) + covered


def test_records_are_laid_out_as_documented(path: Path) -> None:
    journal = Journal(path, HEADER_BYTES, sync_records=1, sync_seconds=1000)
    journal.append(b"one")
    journal.append(b"two")
    journal.close()
    first = record_bytes(b"one", synced=HEADER_BYTES)
    expected = first + record_bytes(b"two", synced=HEADER_BYTES + len(first))
    assert path.read_bytes()[HEADER_BYTES:] == expected


def test_truncation_below_what_was_synced_is_refused(path: Path) -> None:
    write(path, PAYLOADS)
    size = path.stat().st_size
    os.truncate(path, size - 30)
    with pytest.raises(MapError, match=rf"is truncated.* of {size} bytes"):
        read(path, synced=size)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:20], "truncated, 20"),
        (lambda data: b"", "truncated, 0"),
        (lambda data: b"PK" + data[2:], "no journal of a place map"),
        (lambda data: data[:8] + struct.pack("<I", 2) + data[12:], "format 2.*upgrade"),
        (lambda data: data[:20] + b"\xff" + data[21:], "damaged at its beginning"),
    ],
)
def test_files_that_are_no_journal(path: Path, damage: object, words: str) -> None:
    write(path, PAYLOADS)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(MapError, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_journals_of_others(path: Path) -> None:
    with pytest.raises(MapError, match="another place map"):
        read_journal(path, "f" * 32, 7)
    with pytest.raises(MapError, match="another place map"):
        read_journal(path, MAP_ID, 8)
    path.unlink()
    with pytest.raises(MissingMapFileError, match="missing"):
        read(path)


def test_synced_by_number_by_time_and_by_call(path: Path) -> None:
    journal = Journal(path, HEADER_BYTES, sync_records=3, sync_seconds=1000)
    for n in (1, 2):
        journal.append(b"x")
        assert journal.synced == HEADER_BYTES, n
    journal.append(b"x")
    assert journal.synced == journal.n_bytes > HEADER_BYTES
    journal.append(b"x")
    assert journal.synced < journal.n_bytes
    journal.sync()
    assert journal.synced == journal.n_bytes
    journal.close()
    journal.close()
    with pytest.raises(MapError, match="closed"):
        journal.append(b"x")

    end = path.stat().st_size
    journal = Journal(path, end, sync_records=1000, sync_seconds=0.05)
    journal.append(b"x")
    synced = threading.Event()
    for _ in range(200):  # nothing more is written, and it is synced all the same
        if journal.synced == journal.n_bytes:
            synced.set()
            break
        threading.Event().wait(0.05)
    assert synced.is_set()
    journal.close()


FULL_DISK = """
import resource, sys
from pathlib import Path
from tetra.errors import MapError
from tetra.journal import Journal, HEADER_BYTES
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
journal = Journal(path, HEADER_BYTES, sync_records=10, sync_seconds=1000)
journal.append(b"a" * 500)
sizes = [path.stat().st_size]
try:
    journal.append(b"b" * 2000)
except MapError as error:
    print(error)
sizes.append(path.stat().st_size)
journal.append(b"c" * 100)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append(b"d" * 2000)
journal.close()
print(sizes)
"""


def test_a_disk_that_fills_up_in_the_middle_of_a_record(path: Path) -> None:
    """A limit on the file's size takes the first part of a write and refuses the rest, as a full disk does."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    message, sizes = done.stdout.splitlines()
    assert str(path) in message
    assert "File too large" in message
    assert sizes == f"[{HEADER_BYTES + 24 + 500}, {HEADER_BYTES + 24 + 500}]"
    assert read(path) == [b"a" * 500, b"c" * 100, b"d" * 2000]


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(MapError, match="can't be written"):
        create_journal(tmp_path / "none" / "journal", MAP_ID, 0)
    with pytest.raises(MapError, match="can't be opened"):
        Journal(tmp_path / "none", HEADER_BYTES, sync_records=1, sync_seconds=1)
