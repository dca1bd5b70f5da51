"""``tetra bench``: the parts of the product, timed on this machine."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    progress_line,
    write_json,
)
from tetra.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

bench_app = typer.Typer(no_args_is_help=True, help="Time the parts on this machine.", rich_markup_mode=None)


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


@bench_app.command("model")
def bench_model(
    arch: Annotated[Arch, typer.Option(help="Architecture; weights are random.")] = Arch.vit_b,
    batch: Batch = 1,
    repeats: Repeats = 15,
    threads: Threads = None,
    device: Device = None,
    compiled: Compiled = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """The backbone's latency, packed and in full precision, taking turns in one run."""
    from tetra import bench
    from tetra.timing import plot_medians, require_plot

    check_json_path(json)
    require_plot(plot)
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


@bench_app.command("kernels")
def bench_kernels(
    arch: Annotated[Arch, typer.Option(help="Architecture whose shapes are taken.")] = Arch.vit_b,
    kernel: Annotated[str | None, typer.Option(metavar="NAME", help="Only this one, such as attention.")] = None,
    batch: Batch = 1,
    repeats: Repeats = 15,
    threads: Threads = None,
    device: Device = None,
    compiled: Compiled = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Each kernel's latency, beside PyTorch's own and that of other libraries, taking turns."""
    from tetra import bench_kernels as bench
    from tetra.timing import plot_medians, require_plot

    check_json_path(json)
    require_plot(plot)
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


@bench_app.command("search")
def bench_search(
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
) -> None:
    """Hamming search beside faiss, on the same random codes, taking turns."""
    from tetra import bench_search as bench
    from tetra.timing import plot_medians, require_plot

    check_json_path(json)
    require_plot(plot)
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


@bench_app.command("train")
def bench_train(
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
) -> None:
    """Training steps and their parts, beside plain PyTorch: images a second, and bytes kept for the backward pass.

    Kept is what autograd saves until the forward pass has ended, each storage once; parameters and images are not
    counted, what a loss saves of the teacher's outputs is.
    """
    from tetra import bench_train as bench
    from tetra.timing import plot_medians, require_plot

    check_json_path(json)
    require_plot(plot)
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


def _compiled(wanted: bool | None, device: str) -> bool:
    """torch.compile takes minutes on a CPU and needs a C++ compiler there."""
    return device.startswith("cuda") if wanted is None else wanted
