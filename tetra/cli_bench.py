"""``tetra bench``: the parts of the product, timed on this machine."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from tetra.cli_parts import (
    Batch,
    Compiled,
    Device,
    Json,
    Plot,
    Repeats,
    Threads,
    check_json_path,
    chosen_device,
    config_text,
    machine_text,
    make_table,
    print_report,
    print_table,
    printable,
    progress_line,
    write_json,
)
from tetra.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from tetra.diary import Compared, Run

bench_app = typer.Typer(no_args_is_help=True, help="Time the parts on this machine.", rich_markup_mode=None)

_DIARY_DEFAULT = ""  # what --save means without a file


class SavingCommand(TyperCommand):
    """A command whose ``--save`` may stand without a file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spelt = []
        for place, word in enumerate(args):
            following = args[place + 1 : place + 2]
            alone = word == "--save" and (not following or following[0].startswith("-"))
            spelt.append(f"--save={_DIARY_DEFAULT}" if alone else word)
        return super().parse_args(ctx, spelt)


Save = Annotated[
    str | None,
    typer.Option(
        "--save",
        metavar="[FILE]",
        help="Append the run to the diary FILE. [default: TETRA_DIARY, or ~/.local/share/tetra/diary.jsonl]",
    ),
]


@bench_app.callback()
def bench(
    context: typer.Context,
    save: Annotated[bool, typer.Option("--save", help="Append the run to the diary; see tetra bench compare.")] = False,
) -> None:
    context.obj = save


def _diary(context: typer.Context, save: str | None) -> Callable[[list[dict[str, Any]]], None]:
    """What saves a run, after making sure that it can be: nothing unless ``--save`` was given, here or before the
    command."""
    from tetra import diary

    if save is None and not context.obj:
        return lambda rows: None
    path = diary.check_diary(Path(save) if save else None)

    def append(rows: list[dict[str, Any]]) -> None:
        if rows:
            run_id = diary.append(path, f"bench {context.info_name}", rows)
            print(f"saved as run {run_id} in {path}")

    return append


class Arch(str, Enum):
    """Stock architectures."""

    vit_s = "vit-s"
    vit_b = "vit-b"
    nano = "nano"


class Stage(str, Enum):
    """Stages of training that ``bench train`` knows."""

    distill = "distill"
    finetune = "finetune"
    all = "all"


class RecomputeChoice(str, Enum):
    """What may be made again in the backward pass."""

    nothing = "nothing"
    attention = "attention"
    blocks = "blocks"
    all = "all"


@bench_app.command("model", cls=SavingCommand)
def bench_model(
    context: typer.Context,
    arch: Annotated[Arch, typer.Option(help="Architecture; weights are random.")] = Arch.vit_b,
    batch: Batch = 1,
    repeats: Repeats = 15,
    threads: Threads = None,
    device: Device = None,
    compiled: Compiled = None,
    json: Json = None,
    plot: Plot = None,
    save: Save = None,
) -> None:
    """The backbone's latency, packed and in full precision, taking turns in one run."""
    from tetra import bench
    from tetra.timing import plot_medians, require_plot

    check_json_path(json)
    require_plot(plot)
    keep = _diary(context, save)
    device = chosen_device(device)
    notices: list[str] = []
    with progress_line() as show:
        rows = bench.bench_model(
            arch.value,
            batch,
            repeats=repeats,
            threads=threads,
            device=device,
            progress=show,
            compiled=_compiled(compiled, device),
            notices=notices,
        )
    write_json(json, rows)
    keep(rows)
    first = rows[0]
    height, width = first["image_size"]
    title = f"{arch.value}, {height} x {width}, batch {batch}, {machine_text(first)}"
    table = make_table(title, "", "median ms", "p95 ms", "first call ms", "times as fast", "weights MiB")
    for row in rows:
        keys = ("median_ms", "p95_ms", "first_call_ms", "ratio_to_fp32_sdpa", "weights_mib")
        formats = ("{:.1f}", "{:.1f}", "{:.1f}", "{:.2f}", "{:.1f}")
        table.add_row(row["variant"], *(f.format(row[key]) for f, key in zip(formats, keys, strict=True)))
    print_table(table)
    print_report([], notices, [], None)
    if plot is not None:
        plot_medians(plot, {"backbone": rows}, title)


@bench_app.command("kernels", cls=SavingCommand)
def bench_kernels(
    context: typer.Context,
    arch: Annotated[Arch, typer.Option(help="Architecture whose shapes are taken.")] = Arch.vit_b,
    kernel: Annotated[str | None, typer.Option(metavar="NAME", help="Only this one, such as attention.")] = None,
    batch: Batch = 1,
    repeats: Repeats = 15,
    threads: Threads = None,
    device: Device = None,
    compiled: Compiled = None,
    json: Json = None,
    plot: Plot = None,
    save: Save = None,
) -> None:
    """Each kernel's latency, beside PyTorch's own and that of other libraries, taking turns."""
    from tetra import bench_kernels as bench
    from tetra.timing import plot_medians, require_plot

    check_json_path(json)
    require_plot(plot)
    keep = _diary(context, save)
    device = chosen_device(device)
    notices: list[str] = []
    with progress_line() as show:
        rows = bench.bench_kernels(
            arch.value,
            batch,
            repeats=repeats,
            threads=threads,
            device=device,
            kernel=kernel,
            compiled=_compiled(compiled, device),
            progress=show,
            notices=notices,
        )
    write_json(json, rows)
    keep(rows)
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(f"{row['kernel']}  {config_text(row['shape'])}", []).append(row)
    title = f"{arch.value}, batch {batch}, {machine_text(rows[0])}" if rows else "nothing to time"
    table = make_table(title, "", "median ms", "p95 ms", "first call ms", "times as fast")
    for case, variants in cases.items():
        table.add_section()
        table.add_row(case)
        for row in variants:
            keys, formats = ("median_ms", "p95_ms", "first_call_ms", "ratio"), ("{:.3f}", "{:.3f}", "{:.1f}", "{:.2f}")
            table.add_row(f"  {row['variant']}", *(f.format(row[key]) for f, key in zip(formats, keys, strict=True)))
    print_table(table)
    print_report([], notices, [], None)
    if plot is not None and cases:
        plot_medians(plot, cases, title)


@bench_app.command("search", cls=SavingCommand)
def bench_search(
    context: typer.Context,
    rows: Annotated[int, typer.Option(min=1, help="Codes in the database.")] = 100_000,
    n_bytes: Annotated[int, typer.Option("--bytes", min=1, help="Bytes a code.")] = 1024,
    queries: Annotated[int, typer.Option(min=1, help="Codes searched for together.")] = 100,
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours of a query.")] = 25,
    repeats: Repeats = 15,
    threads: Threads = None,
    device: Device = None,
    plain: Annotated[bool, typer.Option("--plain", help="Also without the compiled kernels.")] = False,
    growth: Annotated[
        bool, typer.Option("--growth", help="1 thousand, 10 thousand, ... up to --rows codes, and --plot the curve.")
    ] = False,
    json: Json = None,
    plot: Plot = None,
    save: Save = None,
) -> None:
    """Hamming search beside faiss, on the same random codes, taking turns."""
    from tetra import bench_search as bench
    from tetra.timing import plot_medians, require_plot

    check_json_path(json)
    require_plot(plot)
    keep = _diary(context, save)
    counts = [n for n in bench.GROWTH if n <= rows] if growth else [rows]
    if not counts:
        raise ConfigError(f"--growth begins with {bench.GROWTH[0]} rows, and --rows is {rows}; raise it")
    notices: list[str] = []
    with progress_line() as show:
        found = bench.bench_growth(
            counts,
            n_bytes,
            queries,
            k,
            n_threads=threads,
            device=chosen_device(device),
            repeats=repeats,
            plain=plain,
            progress=show,
            notices=notices,
        )
    write_json(json, found)
    keep(found)
    title = f"{queries} queries, {n_bytes} bytes a code, k = {k}, {machine_text(found[0])}"
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        cases.setdefault(f"{row['rows']:,} rows", []).append({**row, "variant": row["backend"]})
    table = make_table(title, "", "median ms", "p95 ms", "times as fast as faiss", "GB/s", "of read bandwidth")
    for case, variants in cases.items():
        table.add_section()
        table.add_row(case)
        for row in variants:
            ratio = row["ratio_to_faiss"]
            table.add_row(
                f"  {row['backend']}",
                f"{row['median_ms']:.3f}",
                f"{row['p95_ms']:.3f}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{row['gigabytes_per_s']:.2f}",
                f"{row['share_of_read_bandwidth']:.0%}",
            )
    print_table(table)
    print_report([], list(dict.fromkeys(notices)), [], None)
    if plot is not None:
        if growth:
            bench.plot_growth(plot, found, title)
        else:
            plot_medians(plot, cases, title)


@bench_app.command("train", cls=SavingCommand)
def bench_train(
    context: typer.Context,
    arch: Annotated[Arch, typer.Option(help="Architecture; weights, images and the teacher's outputs are random.")] = (
        Arch.vit_b
    ),
    stage: Annotated[Stage, typer.Option(help="Which step, with its components.")] = Stage.all,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 8,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the images. [default: the model's]")] = None,
    attention_layers: Annotated[
        int | None, typer.Option(min=0, help="Blocks in the attention loss. [default: 4; nano: 0]")
    ] = None,
    recompute: Annotated[
        RecomputeChoice, typer.Option(help="What is made again in the backward pass; all compares the three.")
    ] = RecomputeChoice.nothing,
    count: Annotated[bool, typer.Option("--count", help="Count what is kept, from one forward pass; time nothing.")] = (
        False
    ),
    by_tensor: Annotated[bool, typer.Option("--by-tensor", help="Show which tensors the steps keep.")] = False,
    repeats: Repeats = 15,
    threads: Threads = None,
    device: Device = None,
    json: Json = None,
    plot: Plot = None,
    save: Save = None,
) -> None:
    """Training steps and their parts, beside plain PyTorch: images a second, and bytes kept for the backward pass.

    Kept is what autograd saves until the forward pass has ended, each storage once; parameters and images are not
    counted, what a loss saves of the teacher's outputs is.
    """
    from tetra import bench_train as bench
    from tetra.timing import plot_medians, require_plot

    check_json_path(json)
    require_plot(plot)
    keep = _diary(context, save)
    if count and plot is not None:
        raise ConfigError("--plot draws times, and --count takes none; leave one of them out")
    device = chosen_device(device)
    notices: list[str] = []
    with progress_line() as show:
        rows = bench.bench_train(
            arch.value,
            batch,
            image_size,
            bench.STAGES if stage is Stage.all else (stage.value,),
            bench.RECOMPUTE if recompute is RecomputeChoice.all else (recompute.value,),
            attention_layers,
            repeats=repeats,
            threads=threads,
            device=device,
            count_only=count,
            progress=show,
            notices=notices,
        )
    write_json(json, rows)
    keep(rows)
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = f"{row['stage']} {row['case']}".lstrip()
        cases.setdefault(f"{name}  {config_text(row['shape'])}", []).append(row)
    title = f"{arch.value}, batch {batch}, {machine_text(rows[0])}"
    timed = (
        {}
        if count
        else {"images/s": "images_per_s", "median ms": "median_ms", "p95 ms": "p95_ms", "times as fast": "ratio"}
    )
    counted = {"kept MiB": "saved_bytes", "bytes a token": "saved_bytes_per_token", "times less": "times_less_saved"}
    peak = {"peak MiB": "peak_bytes"} if rows[0]["peak_bytes"] is not None else {}
    columns = {**timed, **counted, **peak}
    table = make_table(title, "", *columns)
    for case, variants in cases.items():
        table.add_section()
        table.add_row(case)
        for row in variants:
            table.add_row(f"  {row['variant']}", *(_train_figure(key, row[key]) for key in columns.values()))
    print_table(table)
    if by_tensor:
        for row in rows:
            if row["stage"]:
                print_table(_saved_table(row))
    by_formula = [row for row in rows if row["lse_bytes_by_formula"]]
    if by_formula:
        notices.append(
            "compiled attention, which also keeps the log-sum-exp of every row, did not run here; that was added by "
            f"formula, {by_formula[0]['lse_bytes_by_formula'] / 2**20:.2f} MiB in the first of {len(by_formula)} rows"
        )
    print_report([], notices, [], None)
    if plot is not None:
        plot_medians(plot, cases, title)


def _train_figure(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key.endswith("_bytes"):
        value /= 2**20
    return f"{value:,.0f}" if key == "saved_bytes_per_token" else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _saved_table(row: dict[str, Any]) -> Table:
    """What one variant keeps, by tensor; what is below a thousandth together."""
    table = make_table(f"{row['stage']}, {row['variant']}: kept", "module", "operation", "shape", "tensors", "MiB")
    rest = row["saved_bytes"]
    for group in row["saved"]:
        if group["n_bytes"] >= row["saved_bytes"] / 1000:
            rest -= group["n_bytes"]
            shape = f"{group['dtype']} {group['shape']}"
            figures = str(group["count"]), f"{group['n_bytes'] / 2**20:.2f}"
            table.add_row(group["module"] or "losses", group["operation"], shape, *figures)
    table.add_row("the rest", "", "", "", f"{rest / 2**20:.2f}")
    return table


@bench_app.command("compare")
def bench_compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A run: its id, last, last~1, or a file of --json or --save.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The run that is judged.")],
    diary: Annotated[Path | None, typer.Option("--diary", metavar="FILE", help="The diary. [default: TETRA_DIARY]")] = (
        None
    ),
    threshold: Annotated[float, typer.Option(min=0.0, max=100.0, help="Percent; smaller differences are none.")] = 1.0,
    json: Json = None,
) -> None:
    """Two runs of a benchmark on one device: medians, their ratio with its confidence interval, and a verdict.

    Exit status: 0 if nothing of this project is slower in B, 1 if something is, 2 if the runs can't be compared.
    """
    from dataclasses import asdict

    from tetra import diary as diaries

    check_json_path(json)
    notices: list[str] = []
    first, second = (diaries.find_run(name, diary, notices) for name in (a, b))
    found = diaries.compare(first, second, threshold)
    write_json(
        json,
        {"a": first.id, "b": second.id, "confidence": diaries.CONFIDENCE, "rows": [asdict(row) for row in found]},
    )
    table = make_table(
        f"A: {first.title}\nB: {second.title}\n{machine_text(first.environment)}",
        *("", "A, median ms", "B, median ms", "B / A", f"{diaries.CONFIDENCE:.0%} interval", "verdict on B"),
    )
    for setting in dict.fromkeys(row.setting for row in found):
        table.add_section()
        table.add_row(setting)
        for row in (row for row in found if row.setting == setting):
            interval = "" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}"
            figures = f"{row.a_ms:.4g}", f"{row.b_ms:.4g}", f"{row.ratio:.3f}", interval
            table.add_row(f"  {row.variant}", *figures, row.verdict)
    print_table(table)
    print_report(_summary(found), [*dict.fromkeys(notices), *_left_out(first, second, found)], [], None)
    for line in diaries.changes(first, second):
        print(printable(line))
    if any(row.is_own and row.verdict == "slower" for row in found):
        raise typer.Exit(1)


def _summary(found: list[Compared]) -> list[str]:
    own = [row for row in found if row.is_own]
    counts = {verdict: sum(row.verdict == verdict for row in own) for verdict in ("faster", "slower")}
    lines = [f"{counts['faster']} of {len(own)} variants of this project are faster in B, {counts['slower']} slower"]
    moved = [row for row in found if not row.is_own and row.verdict in counts]
    if moved:
        worst = max(moved, key=lambda row: abs(row.ratio - 1))
        lines.append(
            f"{len(moved)} other variants moved too, {worst.variant} by {worst.ratio:.3f}: what did not change here "
            "tells how the machine did"
        )
    return lines


def _left_out(a: Run, b: Run, found: list[Compared]) -> list[str]:
    n_other = len([row for row in (*a.rows, *b.rows) if "median_ms" in row]) - 2 * len(found)
    return [f"{n_other} figures are in one of the runs alone, and were left out"] if n_other else []


@bench_app.command("history")
def bench_history(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="The page.")],
    diary: Annotated[Path | None, typer.Option("--diary", metavar="FILE", help="The diary. [default: TETRA_DIARY]")] = (
        None
    ),
) -> None:
    """A page of all saved runs: a line a variant, with confidence intervals. It asks no host for anything."""
    from tetra import diary as diaries
    from tetra.files import atomic_write, check_output
    from tetra.profiling.history_page import history_html

    check_output(output)
    notices: list[str] = []
    path = diaries.default_path() if diary is None else diary
    runs = diaries.read_diary(path, notices)
    if not runs:
        raise diaries.DiaryError(f"{path}: holds no runs; run a benchmark with --save first")
    text = history_html(diaries.history(runs), diaries.CONFIDENCE)
    with atomic_write(output) as file:
        file.write(text.encode())
    print_report([f"{len(runs)} runs in {output}"], notices, [], None)


def _compiled(wanted: bool | None, device: str) -> bool:
    """torch.compile takes minutes on a CPU and needs a C++ compiler there."""
    return device.startswith("cuda") if wanted is None else wanted
