"""Results that travel: to a file and back, and what two sets of them don't have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tetra.autotune import table
from tetra.autotune.store import (
    USER_PREFIX,
    Identity,
    Results,
    Store,
    TuningFileError,
    device_identity,
    read_results,
    static_file_name,
    write_results,
)
from tetra.kernels.ahead_of_time import parse_arch
from tetra.kernels.backend import arch_of
from tetra.kernels.tunable import all_tunables


def identities_here() -> list[Identity]:
    """Of the GPUs and the CPU of this machine."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [device_identity(device) for device in (*devices, torch.device("cpu"))]


def export_results(path: str | Path, device: torch.device, store: Store | None = None) -> int:
    """Write the user's results for a device to a file; how many they are.

    Raises:
        ValueError: there are none, or they can't be read.
        StoreError: the file can't be written.
    """
    store = store if store is not None else Store()
    source = store.path_of(device_identity(device))
    if source not in store.files():
        raise ValueError(f"{store.folder}: holds no results for {device}; run `tetra tune measure` first")
    results = read_results(source)
    write_results(path, results)
    return sum(map(len, results.results.values()))


@dataclass(frozen=True)
class Imported:
    """How many results of each kernel came in, and (kernel, reason) of what did not."""

    accepted: dict[str, int]
    refused: list[tuple[str, str]]


def import_results(path: str | Path, store: Store | None = None) -> Imported:
    """Add the results of a file to the user's; those that would not count here are refused, with a reason.

    Raises:
        TuningFileError: the file holds no results that can be used.
        StoreError: the user's can't be written.
    """
    store = store if store is not None else Store()
    results = read_results(path)
    if results.origin == "measured":
        identity = Identity(results.device, results.toolchain)
        here = identities_here()
        if identity not in here:
            same = [other for other in here if other.device.get("name") == results.device["name"]]
            why = same[0].difference(results) if same else f"there is no {results.device['name']} here"
            return Imported({}, [(kernel, str(why)) for kernel in results.results])
        identity = here[here.index(identity)]  # equal numbers may be written otherwise: the file's name is of ours
        results.device, results.toolchain = identity.device, identity.toolchain
        target = store.path_of(identity)
    elif results.device["kind"] == "cuda":
        target = store.folder / static_file_name(parse_arch(results.device["arch"]))
    else:
        raise TuningFileError(f"{path}: predictions are about GPUs, these say {results.device['kind']}")
    accepted, refused = {}, []
    for kernel, entries in results.results.items():
        reason = _why_not(kernel, entries, results)
        if reason is not None:
            refused.append((kernel, reason))
        elif entries:
            module = table.module_of(kernel)
            hashes = {module: results.kernels[module]}
            store.merge(
                target,
                Results(results.origin, results.device, results.toolchain, hashes, {kernel: entries}, results.note),
            )
            accepted[kernel] = len(entries)
    table.reset()
    return Imported(accepted, refused)


def _why_not(kernel: str, entries: dict[str, Any], results: Results) -> str | None:
    tunable = all_tunables().get(kernel)
    module = table.module_of(kernel)
    if tunable is None:
        # A kernel of the user's, whose source is looked at when it is launched.
        known = kernel.startswith(USER_PREFIX) and module in results.kernels
        return None if known else "this release has no such kernel"
    if tunable.on != results.device["kind"]:
        return f"it runs on {tunable.on}, the results are for {results.device['kind']}"
    if results.kernels.get(module) != table.current_hash(module):
        return "its source has changed since"
    for key, entry in entries.items():
        if len(entry["config"]) != len(tunable.fields) or not all(type(value) is int for value in entry["config"]):
            return f"{key}: {entry['config']} is no configuration ({', '.join(tunable.fields)})"
    return None


def named_results(name: str, device: torch.device | None) -> dict[tuple[str, str], list[Any]]:
    """(kernel, key) -> configuration, of a file or of what a name stands for.

    Args:
        name: a file; ``user``, the user's results for the device; ``shipped``, the shipped ones for it; or an
            architecture such as ``sm_80``, whose shipped predictions are meant.
        device: what the first two names are about.

    Raises:
        ValueError: there are none.
    """
    files = [Path(name)]
    if name in ("user", "shipped"):
        if device is None:
            raise ValueError(f"'{name}' needs a device")
        arch = arch_of(device)
        sources = table.sources(arch, device)
        files = [source.path for source in reversed(sources) if source.label.startswith(name)]
        if not files:
            raise ValueError(f"there are no {name} results for {device}; see `tetra tune show`")
    elif re.fullmatch(r"sm_[0-9]{2,3}", name) and not Path(name).exists():
        files = [table.SHIPPED / f"{name}.json"]
        if not files[0].is_file():
            raise ValueError(f"there are no shipped results for {name}")
    found = {}
    for file in files:  # the most important last
        for kernel, entries in read_results(file).results.items():
            found.update({(kernel, key): entry["config"] for key, entry in entries.items()})
    return found


@dataclass(frozen=True)
class Difference:
    """A problem for which two sets say different things; None where one of them says nothing."""

    kernel: str
    key: str
    first: Sequence[Any] | None
    second: Sequence[Any] | None


def differences(first: dict[tuple[str, str], list[Any]], second: dict[tuple[str, str], list[Any]]) -> list[Difference]:
    """Problems with unequal configurations, by name."""
    return [
        Difference(*problem, first.get(problem), second.get(problem))
        for problem in sorted({*first, *second})
        if first.get(problem) != second.get(problem)
    ]
