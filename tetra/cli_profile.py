"""``tetra profile``: where time and bytes go, by the profilers' own tools."""

from __future__ import annotations

import shlex
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tetra.cli_parts import (
    Batch,
    Device,
    Json,
    check_json_path,
    chosen_device,
    make_table,
    print_report,
    print_table,
    user_errors,
    write_json,
)
from tetra.errors import ConfigError, TetraError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tetra.profiling.events import By, Profile, Row
    from tetra.profiling.movers import Mover
    from tetra.profiling.nsight import Recipe, Window

profile_app = typer.Typer(
    no_args_is_help=True, help="Where time and bytes go: Nsight, traces, rooflines.", rich_markup_mode=None
)

Command = Annotated[list[str] | None, typer.Argument(metavar="-- COMMAND...", help="What to profile.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="NAME", help="Of the files, without an ending.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command line and do nothing.")]
Range = Annotated[
    str | None, typer.Option("--range", metavar="RANGE", help="Record only ranges of this name, such as describe.")
]
Skip = Annotated[int, typer.Option(min=0, help="With --range: this many pass first, to warm up.")]
Count = Annotated[int, typer.Option(min=1, help="With --range: record this many.")]
Top = Annotated[int, typer.Option("--top", min=1, help="Rows to print; a JSON file has all.")]


class MetricSets(str, Enum):
    """Of Nsight Compute."""

    tetra = "tetra"
    basic = "basic"
    full = "full"


class Grouping(str, Enum):
    """What a row of a report is."""

    range = "range"
    kernel = "kernel"


GroupBy = Annotated[Grouping, typer.Option("--by", help="A row for each range, or for each kernel.")]


def enable_ranges() -> None:
    """What TETRA_NVTX=1 asks for: ranges in this process, for whichever profiler looks at it."""
    from tetra.profiling import ranges

    with warnings.catch_warnings(record=True) as caught, user_errors():
        warnings.simplefilter("always")
        ranges.enable()
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)


def _run(recipe: Recipe, dry_run: bool) -> None:
    from tetra.profiling.nsight import INSTALL, run

    if dry_run:
        print(recipe.text())
        return
    if not recipe.is_there():
        print(recipe.text())
        raise TetraError(f"'{recipe.tool}' is not on the PATH; install {INSTALL[recipe.tool]}, or run the above there")
    outcome = run(recipe)
    written = [output for output in recipe.outputs if output.is_file()]
    for output in written:
        print(f"{output}: {output.stat().st_size:,} bytes", file=sys.stderr)
    if written:
        print(f"look at it with: tetra profile read {shlex.quote(str(written[0]))}", file=sys.stderr)
    if outcome.advice:
        raise TetraError(outcome.advice)
    if outcome.status:
        how = f"was ended by signal {-outcome.status}" if outcome.status < 0 else f"ended with status {outcome.status}"
        print(f"note: {outcome.failed} {how}", file=sys.stderr)
        raise typer.Exit(128 - outcome.status if outcome.status < 0 else outcome.status)
    if not written:
        raise TetraError(f"{recipe.outputs[0]}: was not written; did the profiled part run? (--range, --kernel)")


def _window(name: str | None, skip: int, count: int) -> Window:
    from tetra.profiling.nsight import Window

    return Window(name, skip, count)


@profile_app.command()
def nsys(
    command: Command = None,
    output: Output = Path("profile"),
    range: Range = None,
    skip: Skip = 0,
    count: Count = 1,
    whole_graphs: Annotated[
        bool, typer.Option("--whole-graphs", help="A CUDA graph is one event, not one for each kernel in it.")
    ] = False,
    trace: Annotated[
        str, typer.Option(metavar="LIST", help="What nsys records; osrt, calls of the system, can take gigabytes.")
    ] = "cuda,nvtx",
    dry_run: DryRun = False,
) -> None:
    """Record COMMAND with Nsight Systems: when what ran, under which range.

    Without nsys, prints the command line and what to install, and ends with status 2; else with the status of COMMAND.
    """
    from tetra.profiling import nsight

    with user_errors():
        window = _window(range, skip, count)
        recipe = nsight.nsys(command or [], output, window, whole_graphs=whole_graphs, trace=trace)
    _run(recipe, dry_run)


@profile_app.command()
def ncu(
    command: Command = None,
    output: Output = Path("kernels"),
    range: Range = None,
    skip: Skip = 0,
    count: Count = 1,
    metrics: Annotated[
        MetricSets, typer.Option(help="tetra: those that say something about its kernels; full is slow.")
    ] = MetricSets.tetra,
    kernel: Annotated[
        str | None, typer.Option(metavar="NAME", help="Kernels of this name, or regex:...; all for every kernel.")
    ] = None,
    inside: Annotated[
        str | None, typer.Option(metavar="RANGE", help="Only what is launched within ranges of this name.")
    ] = None,
    launches: Annotated[int | None, typer.Option(min=1, help="At most so many launches.")] = None,
    arch: Annotated[
        int | None, typer.Option(help="Compute capability, such as 90. [default: that of the GPU here]")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Measure each launch of TeTRA's kernels in COMMAND with Nsight Compute: what it did with the hardware.

    Without ncu, prints the command line and what to install, and ends with status 2; else with the status of COMMAND.
    """
    from tetra.profiling import nsight

    names = {None: nsight.KERNELS, "all": None}
    with user_errors():
        recipe = nsight.ncu(
            command or [],
            output,
            _window(range, skip, count),
            metrics=metrics.value,
            arch=_arch_here() if arch is None else arch,
            kernel=names.get(kernel, kernel),
            inside=inside,
            launches=launches,
        )
    _run(recipe, dry_run)


def _arch_here() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@profile_app.command()
def torch(
    command: Command = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Ends in .json or .json.gz.")] = Path(
        "trace.json.gz"
    ),
    range: Range = None,
    skip: Skip = 0,
    count: Count = 1,
    stack: Annotated[bool, typer.Option("--stack", help="Python's call stacks too: much larger.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Trace COMMAND, a Python program such as tetra, with torch.profiler; needs no GPU and no other tool.

    Ends with the status of COMMAND. The trace opens in ui.perfetto.dev and chrome://tracing.
    """
    from tetra.profiling import nsight

    with user_errors():
        recipe = nsight.torch(command or [], output, _window(range, skip, count), with_stack=stack)
    _run(recipe, dry_run)


@profile_app.command()
def read(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A SQLite export of nsys, a CSV of ncu, or a trace.")],
    by: GroupBy = Grouping.range,
    top: Top = 25,
    json: Json = None,
) -> None:
    """Where the time went, by range or by kernel, in what a profiler wrote."""
    from tetra.profiling.events import NO_RANGE, table

    check_json_path(json)
    profile = _read(file)
    rows = table(profile, by.value)
    write_json(
        json,
        {
            "file": str(file),
            "tool": profile.tool,
            "device": profile.device,
            "total_ns": profile.total_ns,
            "by": by.value,
            "notices": profile.notices,
            "rows": [row.to_dict() for row in rows],
        },
    )
    if by is Grouping.range and all(row.name == NO_RANGE for row in rows):
        print(
            f"note: {file} names no ranges: run the command with TETRA_NVTX=1, or by tetra profile; --by kernel shows "
            "what is there",
            file=sys.stderr,
        )
    _print_rows(profile, by.value, top)


def _read(file: Path) -> Profile:
    from tetra.profiling.readers import read

    with user_errors():
        profile = read(file)
    print_report([], [" ".join(notice.split()) for notice in profile.notices], [], None)
    return profile


def _print_rows(profile: Profile, by: By, top: int) -> None:
    from tetra.profiling.events import readable, table
    from tetra.profiling.nsight import METRICS

    rows = table(profile, by)
    kinds = {activity.kind for activity in profile.activities}
    things = "launches" if profile.is_of_gpu else "ranges (CPU)" if kinds == {"range"} else "operators (CPU)"
    what = f"{len(profile.activities)} {things}"
    title = f"{profile.source}: {profile.device or 'no GPU named'}, {what}, {_ms(profile.total_ns)} ms"
    if by == "range":
        cells: dict[str, Callable[[Row], str]] = {
            "range": lambda row: row.name,
            "ms": lambda row: _ms(row.time_ns),
            "of it own": lambda row: _ms(row.own_ns),
            "share": lambda row: f"{row.share:.1%}",
            "launches": lambda row: str(row.count),
            "calls": lambda row: "" if row.calls is None else str(row.calls),
            "wall ms": lambda row: "" if row.wall_ns is None else _ms(row.wall_ns),
            "bytes": lambda row: _count(row.n_bytes),
            "input": lambda row: _count(row.input_bytes),
        }
        if kinds == {"range"}:  # nothing was launched: what there is of time is wall time
            cells = {name: cell for name, cell in cells.items() if name not in ("launches", "wall ms", "bytes")}
        found = make_table(title, *cells)
        for row in rows[:top]:
            found.add_row(*(cell(row) for cell in cells.values()))
    else:
        measured = {name for row in rows for name in row.metrics}
        shown = [metric for metric in METRICS if metric.label and metric.name in measured]
        found = make_table(
            title, "kernel", "ms", "share", "launches", "us each", "bytes", *(metric.label for metric in shown)
        )
        for row in rows[:top]:
            found.add_row(
                readable(row.name),
                _ms(row.time_ns),
                f"{row.share:.1%}",
                str(row.count),
                f"{row.time_ns / 1e3 / row.count:,.1f}",
                _count(row.n_bytes),
                *(f"{row.metrics[m.name]:,.4g}" if m.name in row.metrics else "" for m in shown),
            )
    print_table(found)
    if len(rows) > top:
        print(f"and {len(rows) - top} more; --top shows them")


def _ms(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:,.3f}"


def _count(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes:,}"


@profile_app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="What a profiler wrote.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="The same of another run.")],
    by: GroupBy = Grouping.kernel,
    top: Top = 25,
    json: Json = None,
) -> None:
    """What became slower or faster between two runs, the largest change first."""

    from tetra.profiling.events import readable
    from tetra.profiling.movers import caveats, movers

    check_json_path(json)
    profiles = _read(before), _read(after)
    found = movers(*profiles, by.value)
    notes = caveats(*profiles)
    print_report([], notes, [], None)
    totals = [profile.total_ns for profile in profiles]
    write_json(
        json,
        {
            "before": str(before),
            "after": str(after),
            "by": by.value,
            "total_before_ns": totals[0],
            "total_after_ns": totals[1],
            "notices": notes,
            "movers": [mover.to_dict() for mover in found],
        },
    )
    title = f"{_ms(totals[0])} ms in {before}, {_ms(totals[1])} ms in {after}: {_change(totals[1] - totals[0])}"
    columns = ("change ms", "before", "after", "ratio", "times", "us each", "then")
    rows = make_table(title, by.value, *columns)
    for mover in found[:top]:
        rows.add_row(
            readable(mover.name),
            _change(mover.change_ns),
            _ms(mover.before_ns),
            _ms(mover.after_ns),
            _ratio(mover),
            f"{mover.count_before} to {mover.count_after}"
            if mover.count_before != mover.count_after
            else str(mover.count_after),
            f"{mover.each_before_ns / 1e3:,.1f}",
            f"{mover.each_after_ns / 1e3:,.1f}",
        )
    print_table(rows)


def _ratio(mover: Mover) -> str:
    if mover.found_in != "both":
        return "new" if mover.found_in == "after" else "gone"
    return "-" if mover.ratio is None else f"{mover.ratio:.3f}"


def _change(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:+,.3f}"


@profile_app.command()
def overhead(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model file, or the name of a shipped model.")
    ] = "nano",
    batch: Batch = 1,
    rounds: Annotated[int, typer.Option(min=2, help="Times that each state has its turn.")] = 200,
    device: Device = None,
    json: Json = None,
) -> None:
    """What ranges cost MODEL, on and off, measured here in turns."""
    import torch

    from tetra.files import load
    from tetra.profiling.overhead import measure
    from tetra.timing import environment

    check_json_path(json)
    where = torch.device(chosen_device(device))
    packed = load(model, device=where)
    images = torch.randint(0, 256, (batch, 3, *packed.image_size), dtype=torch.uint8, device=where)
    try:
        found = measure(
            lambda: packed.describe(images), rounds, torch.cuda.synchronize if where.type == "cuda" else None
        ).to_dict()
    except RuntimeError as error:
        raise ConfigError(str(error)) from None
    write_json(json, {"model": model, "batch": batch, **environment(where), **found})
    print(f"{model}, batch {batch}, {where}, {rounds} rounds: median {found['never_ms']:.3f} ms without ranges")
    for label, key in (("the same once more", "noise"), ("switched on and off", "off_cost"), ("on", "on_cost")):
        print(f"{label:20} {found[key]:+.2%}")


class Stage(str, Enum):
    """Stages of training."""

    distill = "distill"
    finetune = "finetune"


@profile_app.command("memory")
def memory(
    arch: Annotated[str, typer.Option(help="Architecture; weights, images and the teacher's outputs are random.")] = (
        "nano"
    ),
    stage: Annotated[Stage, typer.Option(help="Which step.")] = Stage.distill,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 8,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the images. [default: the model's]")] = None,
    recompute: Annotated[str, typer.Option(help="What is made again: nothing, attention or blocks.")] = "nothing",
    device: Device = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw the timeline.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the timeline as a page.")] = None,
    json: Json = None,
) -> None:
    """Memory over a training step: what is allocated at every moment, the peak, and what holds it then."""
    import torch

    from tetra import bench_train as bench
    from tetra.files import atomic_write
    from tetra.profiling import memory_timeline
    from tetra.timing import environment

    for path in (json, png, html):
        check_json_path(path)
    if png is not None:
        import matplotlib.figure  # noqa: F401
    chosen = next((known for known in bench.RECOMPUTE if known == recompute), None)
    if chosen is None:
        raise ConfigError(f"--recompute '{recompute}': wanted one of {', '.join(bench.RECOMPUTE)}")
    where = torch.device(chosen_device(device))
    case, variant = bench.step_case(arch, stage.value, batch, image_size, chosen, where)
    assert case.optimizer is not None
    with user_errors():
        found = memory_timeline.record(variant.loss, case.model, case.optimizer, where, case.given, variant.context)
    about = {"arch": arch, "stage": stage.value, "batch": batch, "recompute": recompute, **case.shape}
    write_json(json, {**about, **environment(where), **found.to_json()})
    title = f"{arch}, {stage.value}, batch {batch}, {recompute} made again, on {environment(where)['device_name']}"
    if png is not None:
        with atomic_write(png) as file:
            memory_timeline.draw_png(found, title, file)
    if html is not None:
        with atomic_write(html) as file:
            file.write(memory_timeline.draw_html(found, title).encode())
    mib = 1 / memory_timeline.MIB
    table = make_table(f"{title}: MiB", "at the end of", *memory_timeline.CATEGORIES, "together")
    for name, _, _ in found.phases:
        values = found.at_end_of(name)
        figures = (f"{values[category] * mib:.2f}" for category in memory_timeline.CATEGORIES)
        table.add_row(name, *figures, f"{sum(values.values()) * mib:.2f}")
    print_table(table)
    table = make_table(
        f"peak: {found.peak_bytes * mib:.2f} MiB, in the {found.peak_phase} phase, held by",
        *("where", "category", "operation", "storages", "MiB"),
    )
    for holder in found.holders:
        place = holder.where or "before the step"
        table.add_row(place, holder.category, holder.operation, str(holder.count), f"{holder.n_bytes * mib:.2f}")
    print_table(table)
