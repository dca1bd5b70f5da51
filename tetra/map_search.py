"""The nearest places among the parts of a map, on the CPU or on other devices."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from tetra.devices import why_unusable
from tetra.errors import MapError
from tetra.kernels import HammingDatabase, hamming_search
from tetra.map_columns import Part
from tetra.map_segments import Segment


class PartSearch:
    """Searches the parts of a map where they lie: segments in their memory maps, the rest in memory."""

    def nearest(self, part: Part, queries: Tensor, k: int, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Distances int32 [Q, k] and numbers within the part, int64 [Q, k]: see :func:`tetra.kernels.hamming_search`.

        ``queries`` uint8 [Q, B], ``allowed`` bool [n] and the answer are on the CPU.
        """
        return hamming_search(queries, part.codes, k, allowed=allowed)

    def follow(self, parts: Sequence[Part]) -> None:
        """The map has these parts now."""


class DeviceSearch(PartSearch):
    """Searches segments on other devices, with the same answers.

    Segments never change, so each is laid out there once, by the first search that finds it; what was removed from it
    is left out by a mask. Places that are in the journal alone are searched on the CPU: they are few.

    Args:
        devices: among which the rows of every segment are divided.

    Raises:
        MapError: a device is not there.
    """

    def __init__(self, devices: Sequence[torch.device | str]) -> None:
        self._devices = []
        for device in devices:
            reason = why_unusable(device)
            if reason is not None:
                raise MapError(f"search_devices: '{device}': {reason}; name devices of this machine")
            self._devices.append(torch.device(device))
        if not self._devices:
            raise MapError("search_devices: none given; name one, such as 'cuda', or leave it out")
        self._laid_out: dict[str, HammingDatabase] = {}  # by the names of files, which a map uses once
        self._lock = threading.Lock()

    def nearest(self, part: Part, queries: Tensor, k: int, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """As in :class:`PartSearch`."""
        if not isinstance(part, Segment):
            return super().nearest(part, queries, k, allowed)
        with self._lock:  # two threads would lay it out twice
            database = self._laid_out.get(part.entry.file)
            if database is None:
                database = HammingDatabase(part.codes, devices=self._devices)
                self._laid_out[part.entry.file] = database
        return database.search(queries, k, allowed=allowed)

    def follow(self, parts: Sequence[Part]) -> None:
        """Let go of the segments that the map no longer has."""
        kept = {part.entry.file for part in parts if isinstance(part, Segment)}
        with self._lock:
            self._laid_out = {file: found for file, found in self._laid_out.items() if file in kept}
