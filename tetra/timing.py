"""Timing for the benchmarks: variants take turns, and what the machine was is written down with the figures.

The variants of a comparison run A B C A B C ..., so that whatever else the machine does meets all of them alike, and
medians are compared. On a GPU a call is timed between two CUDA events, after the second-level cache was overwritten;
on a CPU by the wall clock. The first call, which may compile, tune or allocate, is kept apart.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tetra import __version__
from tetra.errors import ConfigError, TetraError
from tetra.kernels import backend

Progress = Callable[[str], None]

WARM_UP_ROUNDS = 2  # the first of them is the first call


@dataclass(frozen=True)
class Times:
    """Seconds of one variant: the first call, and every timed one after the warm-up."""

    first: float
    calls: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.calls)

    def figures(self) -> dict[str, Any]:
        """``median_ms``, ``p95_ms``, ``min_ms``, ``first_call_ms`` and ``samples_ms``, every timed call."""
        p95 = sorted(self.calls)[min(round(0.95 * len(self.calls)), len(self.calls) - 1)]
        return {
            "median_ms": 1e3 * self.median,
            "p95_ms": 1e3 * p95,
            "min_ms": 1e3 * min(self.calls),
            "first_call_ms": 1e3 * self.first,
            "samples_ms": [1e3 * taken for taken in self.calls],
        }


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._scratch: torch.Tensor | None = None
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self._scratch = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], object]) -> float:
        """Seconds of one call."""
        if self._scratch is None:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            self._scratch.zero_()
            before.record()
            function()
            after.record()
            torch.cuda.synchronize(self.device)
        return before.elapsed_time(after) / 1e3


def take_turns(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    progress: Callable[[int], None] | None = None,
    left_out: list[str] | None = None,
) -> dict[str, Times]:
    """Time every variant ``repeats`` times, in turn, after warm-up rounds; the first is the baseline.

    Args:
        progress: told each round's number.
        left_out: what cannot run here (an operation that a device lacks, a compiler that is missing) is left out with
            a line in this list. The baseline and this project's own variants ("tetra ...") have to run.
    """
    stopwatch = Stopwatch(device)
    first: dict[str, float] = {}
    for name, function in variants.items():
        try:
            first[name] = stopwatch(function)
        except RuntimeError as error:  # an operation or a compiler that is not there; the caller shows the line
            if left_out is None or not first or name.startswith("tetra"):
                raise
            left_out.append(f"{name} was left out: {(str(error).splitlines() or [type(error).__name__])[0]:.150}")
    calls: dict[str, list[float]] = {name: [] for name in first}
    for round_number in range(1 - WARM_UP_ROUNDS, repeats):
        for name in first:
            taken = stopwatch(variants[name])
            if round_number >= 0:
                calls[name].append(taken)
        if progress is not None and round_number >= 0:
            progress(round_number + 1)
    return {name: Times(first[name], calls[name]) for name in first}


@contextmanager
def threads(n: int | None) -> Iterator[None]:
    """Within this context PyTorch uses ``n`` threads on the CPU; None leaves them as they are."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def forced_backend(name: str | None) -> Iterator[None]:
    """Within this context the kernels run on backend ``name`` (see ``tetra.kernels.backend``); None changes nothing."""
    before = os.environ.get(backend.VARIABLE)
    if name is not None:
        os.environ[backend.VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(backend.VARIABLE, None)
        else:
            os.environ[backend.VARIABLE] = before


def check_positive(**values: int | None) -> None:
    """ConfigError naming the first of ``values`` that is below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected 1 or more")


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if device.type == "cpu" and info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """What figures depend on: ``device``, ``device_name``, ``threads``, ``versions`` and ``commit``.

    The commit is None unless this is a git checkout, and ends in -dirty where files were changed since.
    """
    return {
        "device": str(device),
        "device_name": _device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {"tetra": __version__, "python": platform.python_version(), **backend.versions()},
        "commit": _commit(),
    }


def plot_medians(path: str | Path, groups: Mapping[str, list[dict[str, Any]]], title: str) -> None:
    """Write a PNG of horizontal bars, one a variant, its median and (as a thin line) its p95, a panel a group.

    Raises:
        TetraError: ``path`` cannot be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from tetra.files import atomic_write

    heights = [len(rows) + 1.5 for rows in groups.values()]
    figure = Figure(figsize=(8, 0.32 * sum(heights) + 0.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(len(groups), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, (name, rows) in zip(panels, groups.items(), strict=True):
        medians = [row["median_ms"] for row in rows]
        late = [row["p95_ms"] - row["median_ms"] for row in rows]
        colours = ["#1f6f8b" if row["variant"].startswith("tetra") else "#b0b0b0" for row in rows]
        panel.barh([row["variant"] for row in rows], medians, xerr=[[0.0] * len(rows), late], color=colours)
        panel.invert_yaxis()
        panel.set_title(name, fontsize="small", loc="left")
        panel.tick_params(labelsize="small")
    panels[-1].set_xlabel("milliseconds, median; the line ends at the 95th percentile")
    with atomic_write(path) as file:
        canvas.print_png(file)


def require_plot(path: Path | None) -> None:
    """Before the work, if a plot is wanted at ``path``: TetraError if it could not be written, ModuleNotFoundError
    without matplotlib."""
    from tetra.files import check_output

    if path is not None:
        if path.suffix.lower() != ".png":
            raise TetraError(f"{path}: a plot is a PNG picture; name a file that ends in .png")
        check_output(path)
        import matplotlib.figure  # noqa: F401
