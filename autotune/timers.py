"""How long a call takes, on a GPU and on a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Timer(Protocol):
    """A source of times. A test gives its own; it travels to another process by pickle."""

    method: str  # how it measures now; times by different methods are not compared

    def prepare(self, device: torch.device) -> None:
        """Before the first candidate of a problem."""

    def __call__(self, run: Callable[[], object]) -> list[float]:
        """Seconds of some calls, of which the median counts."""


class CpuTimer:
    """The wall clock. Calls that are too short for it are taken several at a time."""

    SAMPLES = 3
    SAMPLE_S = 2e-3

    def __init__(self) -> None:
        self.method = "wall clock"

    def prepare(self, device: torch.device) -> None:
        """Nothing to do."""

    def __call__(self, run: Callable[[], object]) -> list[float]:
        """Seconds of some calls."""
        run()
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
        if once > 10 * self.SAMPLE_S:
            return [once]
        n_calls = max(math.ceil(self.SAMPLE_S / max(once, 1e-6)), 1)
        taken = []
        for _ in range(self.SAMPLES):
            start = time.perf_counter()
            for _ in range(n_calls):
                run()
            taken.append((time.perf_counter() - start) / n_calls)
        return taken


class CudaTimer:
    """Two events around the replay of a CUDA graph of one call, after the second-level cache was written over.

    Writing over the cache keeps the GPU busy while the replay is enqueued, so that the time between the events is the
    GPU's alone. A call that can't be captured (one that waits for the GPU, say) is launched instead, as are all other
    candidates of its problem from then on.
    """

    SAMPLES = 5
    FLUSH_BYTES = 256 << 20  # at least, and twice the cache

    def __init__(self) -> None:
        self.method = "graph"
        self._flush: torch.Tensor | None = None
        self._graphs: dict[Callable[[], object], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def prepare(self, device: torch.device) -> None:
        """Before the first candidate of a problem."""
        self.method = "graph"
        self._graphs.clear()
        self._pool = None
        if self._flush is None:
            n_bytes = max(self.FLUSH_BYTES, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
            self._flush = torch.empty(n_bytes, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object]) -> list[float]:
        """Seconds of some calls."""
        assert self._flush is not None  # prepare() comes first
        with torch.cuda.device(self._flush.device):
            if self.method == "graph" and run not in self._graphs:
                self._capture(run)
            call: Callable[[], object] = self._graphs[run].replay if self.method == "graph" else run
            call()  # whatever happens only once
            events = []
            for _ in range(self.SAMPLES):
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                before.record()
                call()
                after.record()
                events.append((before, after))
            torch.cuda.synchronize()
            return [before.elapsed_time(after) / 1e3 for before, after in events]

    def _capture(self, run: Callable[[], object]) -> None:
        """Keep a graph of the call, or change the method."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles and allocates, which a capture may not
                run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                # Not torch.cuda.graph, which collects garbage and empties caches each time. One pool for all: the
                # results of a replay are nobody's, so the next graph may write over them.
                graph.capture_begin(**({} if self._pool is None else {"pool": self._pool}))
                try:
                    run()
                finally:
                    graph.capture_end()
                self._graphs[run] = graph
                self._pool = graph.pool()
            except RuntimeError:
                self.method = "events"
                self._graphs.clear()
        torch.cuda.synchronize()


def timer_for(device: torch.device) -> Timer:
    """The timer of a kind of device."""
    return CudaTimer() if device.type == "cuda" else CpuTimer()
