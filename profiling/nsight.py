"""Command lines for Nsight Systems, Nsight Compute and ``torch.profiler``, and running them.

A :class:`Recipe` is what would be typed: it can be printed where the tool is missing, and run where it is not. The
profiled command runs with ``TETRA_NVTX=1``, so that any ``tetra`` command shows its ranges.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from tetra.profiling.ranges import CAPTURE_VARIABLE, DOMAIN, VARIABLE

MetricSet = Literal["tetra", "basic", "full"]


@dataclass(frozen=True)
class Metric:
    """A number that says something about this project's kernels.

    Attributes:
        archs: compute capabilities that have it; empty for all from 8.0 on.
        label: its column in a report; "" for those that are not shown.
    """

    name: str
    label: str
    why: str
    archs: tuple[int, ...] = ()


_ACTIVE = "avg.pct_of_peak_sustained_active"
_SM80_TO_90 = (80, 86, 87, 89, 90)
METRICS = (
    Metric("gpu__time_duration.sum", "", "what all of it is about"),
    Metric(f"sm__pipe_tensor_cycles_active.{_ACTIVE}", "tensor %", "products and attention should be bound by this"),
    Metric(
        f"sm__inst_executed_pipe_tensor_op_imma.{_ACTIVE}",
        "int8 %",
        "int8 products: the ternary layers, the search by sign planes",
        _SM80_TO_90,
    ),
    Metric(
        f"sm__inst_executed_pipe_tensor_op_hmma.{_ACTIVE}",
        "fp16 %",
        "float16 products: attention, the blocks in full precision",
        _SM80_TO_90,
    ),
    Metric(
        f"sm__inst_executed_pipe_tensor_op_gmma.{_ACTIVE}",
        "wgmma %",
        "Hopper's products of whole warp groups; 0 means that the older instructions were compiled",
        (90,),
    ),
    Metric(f"sm__inst_executed_pipe_alu.{_ACTIVE}", "ALU %", "unpacking of weights; above tensor %, it is the limit"),
    Metric(f"sm__inst_executed_pipe_xu.{_ACTIVE}", "XU %", "POPC of the Hamming search, exponentials of attention"),
    Metric(f"smsp__issue_active.{_ACTIVE}", "issue %", "near 100, the number of instructions is the limit"),
    Metric(
        "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
        "conflicts",
        "of shared memory; a layout of tiles that fits has next to none",
    ),
    Metric("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum", "", "passes through shared memory, to compare with"),
    Metric("lts__throughput.avg.pct_of_peak_sustained_elapsed", "L2 %", "tiles that are read again by other blocks"),
    Metric("dram__bytes_read.sum", "", "to compare with the kernel's own cost(): each tensor once"),
    Metric("dram__bytes_write.sum", "", "as above"),
    Metric(
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "DRAM %",
        "row kernels, and the search for one query, should be bound by this",
    ),
    Metric(f"sm__warps_active.{_ACTIVE}", "occupancy %", "warps that hide latency; few are enough for big tiles"),
    Metric("launch__registers_per_thread", "registers", "what limits blocks an SM; also in tetra kernels report"),
    Metric("launch__waves_per_multiprocessor", "waves", "just above a whole number, the last wave is nearly empty"),
    Metric("smsp__sass_inst_executed_op_local_ld.sum", "spill loads", "registers in memory; should be 0"),
    Metric("smsp__sass_inst_executed_op_local_st.sum", "spill stores", "as above"),
)

KERNELS = "regex:^_[a-z0-9_]+_kernel$"
"""Names of this project's kernels, for ``--kernel-name``; no others begin and end so."""

INSTALL = {
    "nsys": "Nsight Systems: part of the CUDA toolkit, or the package nsight-systems of NVIDIA's repository, or "
    "https://developer.nvidia.com/nsight-systems",
    "ncu": "Nsight Compute: part of the CUDA toolkit, or the package nsight-compute of NVIDIA's repository, or "
    "https://developer.nvidia.com/nsight-compute",
}

NOTHING_RECORDED = (
    "nothing was recorded, and no report written: no kernel of the kind asked for ran, or no range of that name was "
    "opened in a process that uses CUDA (--range, --inside, --kernel; tetra profile torch shows which ranges there are)"
)

_NO_PERMISSION = "ERR_NVGPUCTRPERM"
PERMISSION = (
    "the driver lets only administrators read performance counters (ERR_NVGPUCTRPERM). One of these helps: run as "
    "root; give the container CAP_SYS_ADMIN (docker run --cap-add=SYS_ADMIN); or set, on the machine, 'options nvidia "
    "NVreg_RestrictProfilingToAdminUsers=0' in a file of /etc/modprobe.d and load the driver again (reboot)"
)

NO_TETRA = "{0}: this Python has no tetra, a part of which records the trace there; run: {0} -m pip install tetra-vpr"


@dataclass(frozen=True)
class Recipe:
    """Commands to run one after the other; the first profiles, the others convert what it wrote.

    Attributes:
        tool: the program that has to be there; "" where Python is enough.
        environment: what is set on top of what is there.
        outputs: files that there will be, the one to read first.
        python: interpreter with its options that has to have this package; empty where none has.
    """

    tool: str
    commands: list[list[str]]
    environment: dict[str, str]
    outputs: list[Path] = field(default_factory=list)
    python: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The commands as a shell takes them."""
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        first, *others = (shlex.join(command) for command in self.commands)
        return "\n".join([f"{settings} {first}", *others])

    def is_there(self) -> bool:
        return not self.tool or shutil.which(self.tool) is not None


@dataclass(frozen=True)
class Window:
    """Which part of a run is recorded: ``count`` ranges of a name, after ``skip`` of them. Without a name all of it.

    Raises:
        ValueError: a count without a name, a count below 1, a name that can't be in a command line.
    """

    name: str | None = None
    skip: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.name is None and (self.skip, self.count) != (0, 1):
            raise ValueError("skip and count are about ranges: name one, such as --range describe")
        if self.skip < 0 or self.count < 1:
            raise ValueError(f"skip is {self.skip} and count {self.count}, expected 0 or more and 1 or more")
        if self.name is not None and (not self.name.strip() or ":" in self.name or "\n" in self.name):
            raise ValueError(f"range: is {self.name!r}, expected the name of a range, without ':'")

    def environment(self) -> dict[str, str]:
        found = {VARIABLE: "1"}
        if self.name is not None:
            found[CAPTURE_VARIABLE] = f"{self.name}:{self.skip}:{self.count}"
        return found


def _check(command: Sequence[str]) -> None:
    if not command:
        raise ValueError("nothing to profile: put the command after --, such as: -- tetra match MODEL QUERIES MAP")


def nsys(
    command: Sequence[str], output: Path, window: Window, *, whole_graphs: bool = False, trace: str = "cuda,nvtx"
) -> Recipe:
    """Nsight Systems: a time line of CUDA calls, kernels and ranges, and its export as SQLite.

    Args:
        output: name of the files, without an ending.
        whole_graphs: record a CUDA graph as one event, which costs less than one for each of its kernels.
        trace: what is recorded, by nsys's names. With ``osrt``, the operating system's calls, a run in which Triton
            compiles leaves gigabytes, on which nsys works for minutes.

    Raises:
        ValueError: no command, or ``trace`` is no list of names.
    """
    _check(command)
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*(,[a-z0-9][a-z0-9-]*)*", trace):
        raise ValueError(f"trace: is '{trace}', expected names that nsys knows, such as cuda,nvtx,osrt")
    report, database = Path(f"{output}.nsys-rep"), Path(f"{output}.sqlite")
    profile = ["nsys", "profile", f"--trace={trace}", "--sample=none", "--cpuctxsw=none"]
    profile += [f"--cuda-graph-trace={'graph' if whole_graphs else 'node'}", "--trace-fork-before-exec=true"]
    if window.name is not None:  # the ranges themselves call cudaProfilerStart and -Stop
        profile += ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
    profile += ["--force-overwrite=true", f"--output={report}", *command]
    export = ["nsys", "export", "--type=sqlite", "--force-overwrite=true", f"--output={database}", str(report)]
    return Recipe("nsys", [profile, export], window.environment(), [database, report])


def ncu(
    command: Sequence[str],
    output: Path,
    window: Window,
    *,
    metrics: MetricSet = "tetra",
    arch: int | None = None,
    kernel: str | None = KERNELS,
    inside: str | None = None,
    launches: int | None = None,
) -> Recipe:
    """Nsight Compute: what each launch of a kernel did with the hardware, and its table as CSV.

    Every launch is run several times, so profile few: by ``window``, ``kernel``, ``inside`` or ``launches``.

    Args:
        output: name of the files, without an ending.
        metrics: "tetra" are :data:`METRICS`; "basic" and "full" are sets of ncu's own, of which the second is slow.
        arch: compute capability such as 90, for metrics that not every GPU has.
        kernel: name of the kernels, or ``regex:...``; None for all.
        inside: only launches within ranges of this name.
        launches: at most so many.

    Raises:
        ValueError: no command.
    """
    _check(command)
    report, table = Path(f"{output}.ncu-rep"), Path(f"{output}.csv")
    profile = ["ncu", "--nvtx", "--target-processes=all"]
    if metrics == "tetra":
        names = [metric.name for metric in METRICS if not metric.archs or arch in metric.archs]
        profile += ["--metrics", ",".join(names)]
    else:
        profile += ["--set", metrics]
    if kernel is not None:
        profile += ["--kernel-name", kernel]
    if inside is not None:
        profile += ["--nvtx-include", nvtx_filter(inside)]
    if window.name is not None:
        profile += ["--profile-from-start", "off"]
    if launches is not None:
        profile += ["--launch-count", str(launches)]
    profile += ["--force-overwrite", "--export", str(report), *command]
    convert = ["ncu", "--import", str(report), "--csv", "--page", "raw", "--log-file", str(table)]
    convert = ["env", "LC_ALL=C", *convert]  # numbers as in English, which are those that can be read here
    return Recipe("ncu", [profile, convert], window.environment(), [table, report])


def nvtx_filter(name: str) -> str:
    """ncu's expression for launches inside pushed ranges of ``name``; characters that mean something are escaped."""
    escaped = re.sub(r"([\\@,\[\]/*+])", r"\\\1", name)
    # Without the package, PyTorch's own NVTX has no domains.
    return f"{DOMAIN}@{escaped}/" if importlib.util.find_spec("nvtx") else f"{escaped}/"


def torch(command: Sequence[str], output: Path, window: Window, *, with_stack: bool = False) -> Recipe:
    """``torch.profiler`` in the process of a Python command; works without a GPU too.

    Args:
        command: ``python ...``, a Python script, or a program that pip installed, such as tetra.
        output: of the trace; ends in .json or .json.gz.

    Raises:
        ValueError: no command, one that is not a Python program, another ending.
    """
    _check(command)
    if not str(output).endswith((".json", ".json.gz")):
        raise ValueError(f"{output}: a trace is named .json or .json.gz")
    interpreter, program = _python_of(command)
    options = ["--stack"] if with_stack else []
    run = [*interpreter, "-m", _TRACER, str(output), *options, "--", *program]
    return Recipe("", [run], window.environment(), [output], interpreter)


_TRACER = "tetra.profiling.torch_trace"


def _python_of(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """The interpreter with its own options, and what it runs: ``-m module ...``, ``-c code ...`` or ``script ...``."""
    name, *rest = command
    if re.fullmatch(r"python(3(\.\d+)?)?t?", Path(name).name):
        options, program = _split_options(rest)
        if not program or program[0] == "-" or (program[0] in ("-m", "-c") and len(program) < 2):
            raise ValueError(f"{shlex.join(command)}: runs no script; name one, or -m and a module")
        return [shutil.which(name) or name, *options], program
    if name.endswith(".py"):
        return [sys.executable], list(command)
    path = shutil.which(name)
    if path is None:
        raise ValueError(f"{name}: no such program; torch.profiler takes 'python ...', a script, or a program of pip's")
    interpreter = _interpreter_of(Path(path))
    if interpreter is None:
        raise ValueError(f"{name}: is not a Python program, and torch.profiler looks into Python alone; use nsys")
    return [interpreter], [path, *rest]


def _split_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Python's own options and the rest, which begins with ``-m``, ``-c`` or a script.

    As Python reads them: letters may share a dash (``-uOO``), and one that takes a value takes what follows it there
    (``-Xdev``, ``-umjson.tool``) or else the next argument.
    """
    options: list[str] = []
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        option = rest.pop(0)
        if option == "--":  # ends the options
            break
        takes_next = option == "--check-hash-based-pycs"
        if not option.startswith("--"):
            letter = next((letter for letter in option if letter in "mcXW"), "")
            flags, _, value = option.partition(letter) if letter else (option, "", "")
            if letter in ("m", "c"):
                return options + [flags] * (flags != "-"), [f"-{letter}"] + [value] * (value != "") + rest
            takes_next = letter != "" and not value
        options.append(option)
        if takes_next:
            options += rest[:1]
            rest = rest[1:]
    return options, rest


def _interpreter_of(script: Path) -> str | None:
    """From the first lines of a program that pip installed."""
    with script.open("rb") as file:
        start = file.read(1024).decode("utf-8", "replace")
    # With a long path, or a space in it, the first line is of a shell, and the second starts Python.
    match = re.match(r"#!\s*(?:/usr/bin/env\s+)?(\S*python\S*)", start) or re.match(
        r"""#!/bin/sh\n'''exec' "?([^"\n]*?python[^"\s]*)"? """, start
    )
    return match[1] if match else None


# --- running


@dataclass(frozen=True)
class Outcome:
    """How a recipe ended.

    Attributes:
        status: of the first command that failed; 0 if none did. Negative for a signal.
        failed: that command, as text; "" if none did.
        advice: what to do about it, where that is known.
    """

    status: int
    failed: str = ""
    advice: str = ""


def run(recipe: Recipe) -> Outcome:
    """Run the commands of a recipe; what they say goes to stdout and stderr as it comes.

    What ncu says is listened to; the others have the terminal, if there is one, for themselves. SIGTERM and SIGHUP are
    passed on to the command that runs, and end the recipe with it.

    Raises:
        OSError: the program can't be started, or the folder of the output can't be made.
    """
    for output in recipe.outputs:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)  # or an old one would be taken for the result of this run
    environment = {**os.environ, **recipe.environment}
    for number, command in enumerate(recipe.commands):
        status, denied, asked_to_end = _run(command, environment, listen=recipe.tool == "ncu")
        if asked_to_end:
            return Outcome(-asked_to_end, shlex.join(command))
        if denied:
            return Outcome(status or 1, shlex.join(command), PERMISSION)
        to_convert = number == 0 and len(recipe.commands) > 1
        if status == 0 and to_convert and not recipe.outputs[-1].exists():
            return Outcome(1, shlex.join(command), NOTHING_RECORDED)
        if status == 0:
            continue
        if recipe.python and not recipe.outputs[0].exists() and not _has_tracer(recipe.python, environment):
            return Outcome(status, shlex.join(command), NO_TETRA.format(shlex.quote(recipe.python[0])))
        if to_convert and recipe.outputs[-1].exists():
            # The profiled command failed; what was recorded up to there is worth converting.
            for others in recipe.commands[1:]:
                *_, asked_to_end = _run(others, environment, listen=False)
                if asked_to_end:
                    return Outcome(-asked_to_end, shlex.join(others))
        return Outcome(status, shlex.join(command))
    return Outcome(0)


def _run(command: Sequence[str], environment: Mapping[str, str], listen: bool) -> tuple[int, bool, int]:
    """Exit status; whether the driver has refused to give counters, for which one has to listen; and the signal that
    asked this process to end, or 0."""
    pipe = subprocess.PIPE if listen else None
    denied = threading.Event()
    process: subprocess.Popen[bytes] | None = None
    asked: list[int] = []

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        if process is not None:
            process.send_signal(number)

    with _handled_by(pass_on):
        process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe)
        for number in asked:  # before there was anything to pass it on to
            process.send_signal(number)
        copies = [
            threading.Thread(target=_copy, args=(source, target, denied), daemon=True)
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
            if source is not None
        ]
        for copy in copies:
            copy.start()
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:  # it got the signal too, and writes what it has
                continue
        for copy in copies:
            copy.join(1.0 if asked else None)  # what the tool leaves behind may hold the pipe open
    return status, denied.is_set(), asked[0] if asked else 0


@contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    """What asks a process to end goes to ``handler``: a batch system signals the process that it started alone."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # others can't have handlers
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup ignores it
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _has_tracer(python: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether this package is installed for that interpreter."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({_TRACER!r}) is None)"
    return subprocess.run([*python, "-c", code], env=environment, capture_output=True, check=False).returncode == 0


def _copy(source: IO[bytes], target: IO[str], denied: threading.Event) -> None:
    for line in iter(source.readline, b""):
        text = line.decode("utf-8", "replace")
        if _NO_PERMISSION in text:
            denied.set()
        target.write(text)
        target.flush()
