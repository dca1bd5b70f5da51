"""One process at a time may write to a map."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from tetra.errors import MapError
from tetra.map_manifest import LOCK


def lock_map(folder: Path) -> int:
    """The descriptor of a map's lock file, locked. The system frees it when the process ends, however it ends.

    Raises:
        MapError: another process, which the message names, or another map object of this one holds the lock; the file
            can't be opened or locked.
    """
    path = folder / LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise MapError(
            f"{folder}: can't be opened for writing: {error.strerror}; change its permissions, or open it read-only"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            owner = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise MapError(
                f"{folder}: process {owner} has it open for writing; close it there, or open it read-only"
            ) from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return fd  # only the number is missing
        os.close(fd)
        raise MapError(f"{folder}: can't be locked: {error.strerror}; keep it on a disk of this machine") from None
    return fd
