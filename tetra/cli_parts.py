"""What the files of the command line share: options, tables, progress, checks of paths and devices."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tetra.errors import ConfigError, TetraError

if TYPE_CHECKING:
    from rich.table import Table

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model file, or the name of a shipped model: nano.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the GPU if there is one.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images described at a time.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad-images", help="Report unreadable images and go on.")]
Pictures = Annotated[Path | None, typer.Option(metavar="DIR", help="Write pictures of the matches there.")]

Batch = Annotated[int, typer.Option(min=1, help="Images a pass.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed passes of each variant.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: PyTorch's choice]")]
Compiled = Annotated[
    bool | None,
    typer.Option("--compiled/--no-compiled", help="PyTorch under torch.compile too. [default: on GPUs]"),
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw the result.")]
NPictures = Annotated[int, typer.Option(min=1, help="How many queries get one.")]


_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """With escapes for what a terminal would obey or can't be sent: control characters other than tabs and ends of
    lines, and halves of surrogate pairs. Names in files of others may hold either."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def print_table(table: Table) -> None:
    from rich.console import Console
    from rich.segment import Segment, Segments

    console = Console(markup=False, emoji=False)  # names of kernels and files hold brackets and colons
    if not console.is_terminal:  # a file or a pipe has room
        console.width = max(console.width, Console(width=1000, markup=False, emoji=False).measure(table).maximum)
    shown = (Segment(printable(text), style, control) for text, style, control in console.render(table))
    console.print(Segments(shown), end="", crop=False)


def make_table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def check_json_path(path: Path | None) -> None:
    """Refuse a path that can't be written before the work, not after it."""
    from tetra.files import check_output

    if path is not None:
        check_output(path)


def write_json(path: Path | None, value: object) -> None:
    from tetra.files import write_json

    if path is not None:
        write_json(path, value)


@contextmanager
def user_errors() -> Iterator[None]:
    """What the libraries below say about bad arguments, as an error of the command line."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, TetraError):
            raise
        raise TetraError(str(error)) from error


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, where that is a terminal: call it with (done, all, what comes next)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title)
        yield lambda done, total, text: progress.update(
            task, completed=done, total=total, description=f"{title} {text}"
        )


def print_report(lines: list[str], notices: list[str], pictures: list[Path], folder: Path | None) -> None:
    for notice in notices:
        print(f"note: {printable(notice)}", file=sys.stderr)
    for line in lines:
        print(printable(line))
    if pictures:
        print(f"{len(pictures)} pictures in {folder}")


def chosen_device(name: str | None) -> str:
    import torch

    from tetra.devices import why_unusable

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    reason = why_unusable(name)
    if reason is not None:
        raise ConfigError(f"--device '{name}': {reason}; use cpu or a device of this machine")
    return name


def machine_text(row: dict[str, Any]) -> str:
    return f"{row['device_name']} ({row['device']}, {row['threads']} threads)"


@contextmanager
def progress_line() -> Iterator[Callable[[str], None] | None]:
    """Shows the last line of progress on stderr, where that is a terminal; None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    yield lambda line: print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def config_text(config: dict[str, object]) -> str:
    """A configuration on one line: without ``BLOCK_`` and ``num_``, and flags that are set by their name alone."""
    words = []
    for name, value in config.items():
        name = name.removeprefix("BLOCK_").removeprefix("num_")
        if value is True:
            words.append(name)
        elif value is not False:
            words.append(f"{name}={value}")
    return " ".join(words)
