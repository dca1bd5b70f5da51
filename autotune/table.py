"""Which configuration a kernel uses, on a device, for a problem: the first answer of

1. the user's cache (``tetra tune measure``), measured on this very device,
2. measurements that are shipped,
3. predictions of the user's (``tetra tune static``), for the architecture,
4. predictions that are shipped,
5. the first row of the kernel's table.

Measurements of the user count where GPU, driver, Triton and the kernel's source are those that were measured; shipped
ones where GPU, Triton's release and source are (a driver does not compile). Predictions count where the architecture
and the source are the same. What is left out for such a reason, or can't be read, gives one notice.

Kernels ask at every launch. The first time files are read; from then on an answer is a look-up in a dictionary. Nothing
here tunes, fails or touches a GPU on import.

Environment
    TETRA_TUNING       auto (default), static: predictions only, off: always the first row
    TETRA_TUNING_DIR   the user's cache; otherwise ~/.cache/tetra/tuning (or XDG's)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetra.autotune.store import (
    USER_PREFIX,
    Entry,
    Identity,
    Results,
    Store,
    cache_folder,
    device_identity,
    forget_notices,
    is_folder,
    notice,
    read_or_notice,
    static_file_name,
)

if TYPE_CHECKING:
    import torch

Config = tuple[Any, ...]  # of this package's kernels, integers

VARIABLE = "TETRA_TUNING"
MODES = ("auto", "static", "off")
SHIPPED = Path(__file__).parent

_found: dict[tuple[str, int, str, torch.device | None], tuple[Config, int] | None] = {}
_MISSING = (None, -1)


@dataclass(frozen=True)
class Source:
    """A file that may answer. ``label`` says what it is: "user", "shipped", "user static" or "shipped static"."""

    label: str
    path: Path
    results: Results


@dataclass(frozen=True)
class Choice:
    """A configuration, and where it comes from.

    Attributes:
        config: a row of the kernel's table.
        origin: a source's label, or "first row".
        path: the file; None for the first row.
        entry: all that the file says about it.
    """

    config: Config
    origin: str
    path: Path | None = None
    entry: Entry | None = None


def lookup(kernel: str, arch: int, key: str, configs: tuple[Config, ...], device: torch.device | None = None) -> Config:
    """The configuration of ``kernel`` for a problem; ``configs[0]`` where nothing is known. Never fails.

    Args:
        kernel: its name among the results.
        arch: 80 for sm_80; 0 for a CPU.
        key: of the problem, as the kernel's file names it.
        configs: rows that may run it. What is not among them counts as unknown.
        device: of the launch; None for a GPU that need not be here, about which only predictions are known.
    """
    found = _found.get((kernel, arch, key, device), _MISSING)
    if found is _MISSING:
        found = _find(kernel, arch, key, configs, device)
    if found is None:
        return configs[0]
    row, place = found
    if (place < len(configs) and configs[place] == row) or row in configs:
        return row  # type: ignore[no-any-return]
    return configs[0]


def _find(
    kernel: str, arch: int, key: str, configs: tuple[Config, ...], device: torch.device | None
) -> tuple[Config, int] | None:
    found = None
    try:
        choice = explain(kernel, arch, key, configs, device)
        if choice.path is not None:
            found = choice.config, configs.index(choice.config)
    except Exception as error:  # a launch must not fail for a file beside it
        notice(f"tuning results of {kernel} are ignored: {type(error).__name__}: {error}")
    _found[kernel, arch, key, device] = found
    return found


def explain(
    kernel: str,
    arch: int,
    key: str,
    configs: tuple[Config, ...],
    device: torch.device | None = None,
    kernel_hash: str | None = None,
) -> Choice:
    """What ``lookup`` gives, and where it comes from.

    Args:
        kernel_hash: of the kernel's source, where it is not in ``tetra.kernels``.
    """
    for source in sources(arch, device):
        entry = source.results.results.get(kernel, {}).get(key)
        if entry is None or not is_current(source, kernel, kernel_hash):
            continue
        config = tuple(entry["config"])
        if config in configs:  # the row of the table, since numbers of a file may be equal and no integers
            return Choice(configs[configs.index(config)], source.label, source.path, entry)
    return Choice(configs[0], "first row")


def reset() -> None:
    """Forget what was read; the next look-up reads files and environment again."""
    _found.clear()
    sources.cache_clear()
    device_identity.cache_clear()
    forget_notices()


def mode() -> str:
    """The value of ``TETRA_TUNING``; "auto", after one notice, for an unknown one."""
    value = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    if value not in MODES:
        notice(f"{VARIABLE} is {value!r}; set it to one of {', '.join(MODES)}")
        return "auto"
    return value


@cache
def sources(arch: int, device: torch.device | None) -> tuple[Source, ...]:
    """The files that may answer for a device, in order. Triton's interpreter, a CPU with an arch, has none."""
    chosen = mode()
    if chosen == "off" or (device is not None and device.type == "cpu" and arch):
        return ()
    found: list[tuple[str, Path, Results | None]] = []
    if chosen == "auto" and (device is not None or not arch):
        import torch

        identity = device_identity(device if device is not None else torch.device("cpu"))
        own = Store().path_of(identity)
        found.append(("user", own, _of_this_device(own, identity)))
        for path in sorted(SHIPPED.glob("measured_*.json")):
            results = read_or_notice(path)
            if results is not None and is_shipped_for(results, identity):
                found.append(("shipped", path, results))
    if arch:
        for label, path in (
            ("user static", cache_folder() / static_file_name(arch)),
            ("shipped static", SHIPPED / f"sm_{arch}.json"),
        ):
            found.append((label, path, _predictions(path, arch)))
    return tuple(Source(label, path, results) for label, path, results in found if results is not None)


def _of_this_device(path: Path, identity: Identity) -> Results | None:
    """The user's results; a notice where there are only those of another driver or compiler."""
    results = read_or_notice(path)
    if results is not None:
        different = identity.difference(results)
        if results.origin != "measured":
            different = f"they are {results.origin}, not measured"
        if different is None:
            return results
        notice(f"{path}: tuning results are ignored: {different}; run `tetra tune measure` again")
        return None
    others = sorted(path.parent.glob(f"{identity.family}-*.json")) if is_folder(path.parent) else []
    for other in others:
        stale = read_or_notice(other)
        if stale is not None:
            different = identity.difference(stale) or f"the file was renamed, its name here is {path.name}"
            notice(f"{other}: tuning results are ignored: {different}; run `tetra tune measure` again")
            break
    return None


def _predictions(path: Path, arch: int) -> Results | None:
    """Those of a file, if they are for the architecture that its name says; else None, after a notice."""
    results = read_or_notice(path)
    if results is None:
        return None
    there = f"{results.origin} for {results.device.get('arch', results.device['name'])}"
    if there == f"static for sm_{arch}":
        return results
    notice(f"{path}: tuning results are ignored: they are {there}, not static for sm_{arch}; delete the file")
    return None


def _release(toolchain: dict[str, Any]) -> list[str]:
    return str(toolchain.get("triton")).split(".")[:2]


def is_shipped_for(results: Results, identity: Identity) -> bool:
    """Whether shipped measurements hold for a device: the same GPU and release of Triton, whatever the driver."""
    here, there = ({k: v for k, v in d.items() if k != "driver"} for d in (identity.device, results.device))
    return here == there and _release(identity.toolchain) == _release(results.toolchain)


def module_of(kernel: str) -> str:
    """The file of ``tetra.kernels`` that holds a kernel; its own name for those of others."""
    from tetra.kernels.tunable import all_tunables

    tunable = all_tunables().get(kernel)
    return kernel if tunable is None else tunable.module


@cache
def current_hash(module: str) -> str:
    """Of the source of a file of ``tetra.kernels``, as it is now; "unknown" where it can't be read."""
    from tetra.autotune.source import kernel_hash

    try:
        return kernel_hash(module)
    except (OSError, ValueError, ImportError, SyntaxError) as error:
        notice(
            f"the source of the kernels in '{module}' can't be read, so tuning results for them are ignored: {error}"
        )
        return "unknown"


def is_current(source: Source, kernel: str, kernel_hash: str | None = None) -> bool:
    """Whether a file's results of a kernel are of its source as it is now; a notice where they are not."""
    module = kernel if kernel_hash is not None else module_of(kernel)
    if source.results.kernels.get(module) == (kernel_hash or current_hash(module)):
        return True
    again = "run `tetra tune measure` again" if source.results.origin == "measured" else "run `tetra tune static` again"
    if kernel.startswith(USER_PREFIX):
        again = "call its .tune() again, or give two kernels of one name different names"
    notice(f"{source.path}: results of {kernel} are ignored: its source has changed since; {again}")
    return False
