"""``tetra tune``: which configuration each kernel uses on a chip, and how that was found out."""

from __future__ import annotations

import json as json_module
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tetra.cli_parts import (
    Device,
    Json,
    check_json_path,
    chosen_device,
    config_text,
    make_table,
    print_report,
    print_table,
    printable,
    progress_bar,
    user_errors,
    write_json,
)
from tetra.errors import ConfigError, TetraError

if TYPE_CHECKING:
    import torch

    from tetra.autotune.table import Choice
    from tetra.autotune.workloads import Problem
    from tetra.kernels.tunable import Tunable

tune_app = typer.Typer(
    no_args_is_help=True, help="Choose the kernels' configurations, with a GPU or without.", rich_markup_mode=None
)

Kernel = Annotated[str | None, typer.Option("--kernel", metavar="NAME", help="Only this one, such as attention.")]
Model = Annotated[
    str | None,
    typer.Option("--arch", metavar="MODEL", help="Architecture whose shapes are taken, such as vit-b. [default: all]"),
]
Checkers = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Processes that check candidates. [GPU: 8 or the CPUs; CPU: 1]")
]
Budget = Annotated[float, typer.Option("--budget", metavar="SECONDS", help="For all of it.")]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Processes that compile. [default: all CPUs]")]


def _problems(kind: str, model: str | None, kernel: str | None) -> list[Problem]:
    """What is tuned on a kind of device, cuda or cpu."""
    from tetra.autotune.cpu_workloads import cpu_problems
    from tetra.autotune.workloads import problems
    from tetra.config import BACKBONES
    from tetra.kernels.tunable import all_tunables

    if model is not None and model not in BACKBONES:
        raise ConfigError(f"--arch {model!r} is no architecture; known: {', '.join(BACKBONES)}")
    names = sorted(name for name, tunable in all_tunables().items() if tunable.on == kind)
    if kernel is not None and kernel not in names:
        raise ConfigError(f"--kernel {kernel!r} can't be tuned on {kind}; known: {', '.join(names)}")
    backbones = BACKBONES if model is None else {model: BACKBONES[model]}
    found = problems(backbones) if kind == "cuda" else cpu_problems(backbones)
    return [problem for problem in found if kernel in (None, problem.tunable)]


def _device(name: str | None) -> torch.device:
    from tetra.autotune.measured_tuner import concrete

    device = concrete(chosen_device(name))
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"--device '{name}': kernels are tuned for cpu and cuda")
    return device


def _config(tunable: Tunable | None, config: Any) -> str:
    """By field names, such as ``BLOCK_M=64 warps=4``."""
    if config is None:
        return "-"
    if tunable is None or len(tunable.fields) != len(config):
        return " ".join(map(str, config))
    return config_text(dict(zip(tunable.fields, config, strict=True)))


def _busy_notice(device: torch.device) -> list[str]:
    """A line for who measures on a CPU that has other things to do. TetraError where there is nothing to measure."""
    from tetra.kernels import native

    if device.type == "cpu" and not native.available():
        raise TetraError(
            "the C++ kernels don't build here, so that nothing can be tuned on the CPU; install a compiler"
        )
    if device.type != "cpu" or not hasattr(os, "getloadavg"):
        return []
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < 0.5 * cores:
        return []
    return [f"the load is {load:.1f} on {cores} CPUs: what else runs here is part of what is measured"]


@tune_app.command("static")
def tune_static(
    arch: Annotated[str, typer.Option("--arch", metavar="ARCH", help="Such as sm_80.")],
    kernel: Kernel = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the results there. [default: the user's cache]"),
    ] = None,
    jobs: Jobs = None,
    json: Json = None,
) -> None:
    """Predict the best configurations for an architecture from compiled code; needs no GPU."""
    from tetra.autotune import static_tuner, table
    from tetra.autotune.store import Results, Store, static_file_name
    from tetra.files import check_output
    from tetra.kernels.ahead_of_time import check_compiler, parse_arch
    from tetra.kernels.tunable import all_tunables

    check_json_path(json)
    if output is not None:
        check_output(output)
    with user_errors():
        number = parse_arch(arch)
        check_compiler()
        wanted = _problems("cuda", None, kernel)
        store = Store()
        target = output if output is not None else store.folder / static_file_name(number)
        if output is None:
            store.check_writable()
        with progress_bar("compiling") as progress:
            result = static_tuner.tune_static(number, wanted, workers=jobs, progress=progress)
        document = result.document()
        if output is not None:
            static_tuner.save(result, output)
        else:
            store.merge(target, Results.from_json(document, target))
            table.reset()
    write_json(json, document)
    rows = make_table(
        f"sm_{number}: PREDICTED for {result.product.name}, nothing was measured",
        *("kernel", "problem", "configuration", "predicted µs", "candidates", "rejected"),
    )
    for name, keys in result.ranked.items():
        for key, candidates in keys.items():
            rejected = len(result.rejected[name][key])
            best = result.chosen(name, key)
            rows.add_row(
                name,
                key,
                _config(all_tunables()[name], best.config if best else None),
                f"{1e6 * best.seconds:.1f}" if best else "",
                str(len(candidates) + rejected),
                str(rejected),
            )
    print_table(rows)
    print_report([], result.notices, [], None)
    print(f"{result.compiled} candidates compiled, {result.cached} read from the cache, {result.seconds:.1f} s")
    print(f"results: {target}")


def _checkers(jobs: int | None, device: torch.device) -> int:
    return jobs or (1 if device.type == "cpu" else min(8, os.cpu_count() or 1))


@tune_app.command("measure")
def tune_measure(
    device: Device = None,
    kernel: Kernel = None,
    budget: Budget = 600.0,
    arch: Model = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Candidates of each problem, the best predicted.")] = 8,
    again: Annotated[bool, typer.Option("--again", help="Also what has a result already.")] = False,
    jobs: Checkers = None,
    json: Json = None,
) -> None:
    """Measure candidates on this device, and keep the best of each problem in the user's cache."""
    from tetra.autotune import measured_tuner
    from tetra.autotune.store import Store
    from tetra.kernels.tunable import all_tunables

    check_json_path(json)
    where = _device(device)
    notices = _busy_notice(where)
    with user_errors():
        wanted = _problems(where.type, arch, kernel)
        store = Store()
        with progress_bar("measuring") as progress:
            report = measured_tuner.measure(
                wanted,
                where,
                budget_s=budget,
                ranking=None
                if where.type == "cpu"
                else lambda tunable, key: measured_tuner.predicted(tunable, key, where),
                top_n=top,
                store=store,
                progress=progress,
                again=again,
                checkers=_checkers(jobs, where),
            )
        path = store.path_of(measured_tuner.device_identity(where))
    write_json(json, {"file": str(path), **report.to_json()})
    rows = make_table(
        f"measured on {measured_tuner.device_identity(where).device['name']}",
        *("kernel", "problem", "configuration", "µs", "default µs", "times as fast", "candidates", "rejected"),
    )
    for found in report.finished:
        default = found.default_seconds
        rows.add_row(
            *(found.kernel, found.key, _config(all_tunables()[found.kernel], found.config)),
            f"{1e6 * found.seconds:.1f}",
            "failed" if default is None else f"{1e6 * default:.1f}",
            "" if default is None else f"{default / found.seconds:.2f}",
            *(str(found.n_candidates), str(len(found.rejected))),
        )
    print_table(rows)
    notices += [f"{name} {key}: {reason}" for name, key, reason in report.failed]
    notices += [
        f"{found.kernel} {found.key}: {_config(all_tunables()[found.kernel], config)} {reason}"
        for found in report.finished
        for config, reason in found.rejected
    ]
    if report.unfinished:
        notices.append(
            f"the budget of {budget:g} s did not suffice for {len(report.unfinished)} problems; "
            "the same command goes on with them"
        )
    print_report([], notices, [], None)
    print(
        f"{len(report.finished)} measured in {report.seconds:.0f} s, {len(report.present)} were there already, "
        f"{len(report.unfinished)} left, {len(report.failed)} failed"
    )
    print(f"results: {path}")


@tune_app.command("show")
def tune_show(
    device: Device = None,
    arch: Annotated[
        str | None, typer.Option("--arch", metavar="ARCH", help="A GPU that need not be here, such as sm_80.")
    ] = None,
    kernel: Kernel = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="With --arch: the five best of each problem, with every term.")
    ] = False,
    jobs: Jobs = None,
    json: Json = None,
) -> None:
    """Which configuration each kernel uses, and where it comes from."""
    from tetra.autotune import measured_tuner
    from tetra.autotune.hardware import product_of
    from tetra.autotune.table import mode
    from tetra.kernels.ahead_of_time import parse_arch
    from tetra.kernels.tunable import all_tunables

    check_json_path(json)
    if arch is not None and device is not None:
        raise ConfigError("--arch and --device: name one of them")
    if explain and arch is None:
        raise ConfigError("--explain is about predictions; name the architecture with --arch")
    with user_errors():
        number = parse_arch(arch) if arch is not None else None
        if explain:
            assert number is not None
            _explain(number, kernel, jobs, json)
            return
        where = _device(device) if number is None else None
        wanted = _problems("cpu" if where is not None and where.type == "cpu" else "cuda", None, kernel)
        cores = product_of(number).n_sms if number is not None else 0
        found: dict[tuple[str, str], Choice] = {}
        for problem in wanted:
            tunable = all_tunables()[problem.tunable]
            found[tunable.name, tunable.key(problem.sizes)] = measured_tuner.chosen(
                tunable, problem.sizes, where, number, cores
            )
    values = [
        {
            "kernel": name,
            "key": key,
            "config": list(choice.config),
            "fields": list(all_tunables()[name].fields),
            "origin": choice.origin,
            "file": None if choice.path is None else str(choice.path),
            # In a file may stand what is no number, which JSON for others must not have.
            "entry": json_module.loads(json_module.dumps(choice.entry), parse_constant=lambda name: None),
        }
        for (name, key), choice in found.items()
    ]
    write_json(json, values)
    title = f"{arch or where}; TETRA_TUNING is {mode()}; µs are as measured, or predicted (p)"
    rows = make_table(title, "kernel", "problem", "configuration", "from", "µs")
    for (name, key), choice in found.items():
        entry = choice.entry or {}
        us = _time(entry.get("measured_us"))
        us = f"{_time(entry['predicted_us'])} p" if _time(entry.get("predicted_us")) else us
        rows.add_row(name, key, _config(all_tunables()[name], choice.config), choice.origin, us)
    print_table(rows)
    for path in dict.fromkeys(choice.path for choice in found.values() if choice.path is not None):
        print(f"{next(c.origin for c in found.values() if c.path == path)}: {path}")


def _time(value: Any) -> str:
    """Of a file, in which anything may stand."""
    return f"{value:.1f}" if isinstance(value, float) or (type(value) is int and abs(value) < 1 << 53) else ""


def _explain(arch: int, kernel: str | None, jobs: int | None, json: Path | None) -> None:
    from tetra.autotune import static_tuner
    from tetra.kernels.ahead_of_time import check_compiler

    check_compiler()
    with progress_bar("compiling") as progress:
        result = static_tuner.tune_static(arch, _problems("cuda", None, kernel), workers=jobs, progress=progress)
    values: list[dict[str, Any]] = []
    for name, keys in result.ranked.items():
        for key in keys:
            top = static_tuner.explain(result, name, key)
            values.append({"kernel": name, "key": key, "top": top})
            if not top:
                continue
            top = [{**{k: v for k, v in row.items() if k != "terms_us"}, **row.get("terms_us", {})} for row in top]
            columns = list(dict.fromkeys(column for row in top for column in row if column != "config"))
            rows = make_table(f"{name} {key}, sm_{arch}: PREDICTED, µs", "configuration", *columns)
            for row in top:
                rows.add_row(config_text(row["config"]), *(_cell(row.get(column)) for column in columns))
            print_table(rows)
    write_json(json, values)
    print_report([], result.notices, [], None)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


@tune_app.command("diff")
def tune_diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A file of results, user, shipped, or such as sm_80.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    kernel: Kernel = None,
    device: Device = None,
    json: Json = None,
) -> None:
    """Problems for which two sets of results choose otherwise."""
    from tetra.autotune.exchange import differences, named_results
    from tetra.kernels.tunable import all_tunables

    check_json_path(json)
    with user_errors():
        where = _device(device) if {"user", "shipped"} & {first, second} else None
        sets = [named_results(name, where) for name in (first, second)]
        if kernel is not None:
            known = sorted({name for results in sets for name, _ in results})
            if kernel not in known:
                raise ConfigError(f"--kernel {kernel!r} is in neither; known: {', '.join(known)}")
            sets = [{pair: row for pair, row in results.items() if pair[0] == kernel} for results in sets]
        found = differences(*sets)
    write_json(json, [vars(row) for row in found])
    rows = make_table("", "kernel", "problem", first, second)
    for row in found:
        tunable = all_tunables().get(row.kernel)
        rows.add_row(row.kernel, row.key, _config(tunable, row.first), _config(tunable, row.second))
    if found:
        print_table(rows)
    same = len([problem for problem in sets[0] if sets[1].get(problem) == sets[0][problem]])
    print(f"{len(found)} problems differ, {same} are the same")


@tune_app.command("export")
def tune_export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="To be written.")], device: Device = None
) -> None:
    """Write the user's measured results for a device to a file."""
    from tetra.autotune.exchange import export_results
    from tetra.files import check_output

    check_output(file)
    with user_errors():
        n = export_results(file, _device(device))
    print(f"{file}: {n} results")


@tune_app.command("import")
def tune_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="That `tetra tune` wrote.")], json: Json = None
) -> None:
    """Add results of a file to the user's cache; those that would not count here are refused."""
    from tetra.autotune.exchange import import_results

    check_json_path(json)
    with user_errors():
        found = import_results(file)
    write_json(json, {"accepted": found.accepted, "refused": [list(pair) for pair in found.refused]})
    for name, n in found.accepted.items():
        print(f"{name}: {n} results")
    for name, reason in found.refused:
        print(printable(f"note: {name}: refused: {reason}"), file=sys.stderr)
    if not found.accepted:
        raise TetraError(
            f"{file}: nothing was imported; the notes above say why" if found.refused else f"{file}: holds no results"
        )


@tune_app.command("clear")
def tune_clear(
    kernel: Annotated[str | None, typer.Option("--kernel", metavar="NAME", help="Only this one's.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Remove the user's results, of all devices."""
    from tetra.autotune.store import Store

    store = Store()
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("this removes results for good; add --yes")
        what = f"the results of {kernel}" if kernel else "all results"
        if not typer.confirm(f"Remove {what} in {store.folder}?", err=True):
            raise typer.Exit(0)
    with user_errors():
        removed = store.clear(kernel)
    print(f"{store.folder}: {removed} results removed")


@tune_app.command("verify")
def tune_verify(
    device: Device = None,
    kernel: Kernel = None,
    budget: Budget = 600.0,
    arch: Model = None,
    jobs: Checkers = None,
    json: Json = None,
) -> None:
    """Measure what is chosen against all other configurations: regret is chosen / best found, 1 at best."""
    from tetra.autotune import measured_tuner
    from tetra.kernels.tunable import all_tunables

    check_json_path(json)
    where = _device(device)
    notices = _busy_notice(where)
    with user_errors(), progress_bar("measuring") as progress:
        report = measured_tuner.verify(
            _problems(where.type, arch, kernel),
            where,
            budget_s=budget,
            progress=progress,
            checkers=_checkers(jobs, where),
        )
    write_json(json, report.to_json())
    rows = make_table(
        f"{where}: chosen against the best other configuration, taking turns",
        *("kernel", "problem", "chosen", "from", "µs", "best other", "µs", "regret", "candidates"),
    )
    for row in report.verdicts:
        tunable = all_tunables()[row.kernel]
        rows.add_row(
            *(row.kernel, row.key, _config(tunable, row.config), row.origin, f"{1e6 * row.seconds:.1f}"),
            *(_config(tunable, row.best), f"{1e6 * row.best_seconds:.1f}", f"{row.regret:.3f}"),
            str(row.n_candidates),
        )
    print_table(rows)
    notices += [f"{name} {key}: {reason}" for name, key, reason in report.failed]
    if report.unfinished:
        notices.append(f"the budget of {budget:g} s did not suffice for {len(report.unfinished)} problems")
    print_report([], notices, [], None)
    print(f"{len(report.verdicts)} verified" + (f", largest regret {report.worst:.3f}" if report.verdicts else ""))
