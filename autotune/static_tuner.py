"""Chooses configurations for a GPU that need not be there: compiles all candidates, refuses what is unhealthy, and
ranks the others by the model of :mod:`tetra.autotune.static_model`.

Candidates are compiled by several processes. What was read of each is kept, by kernel source, compiler and
architecture, so that only what changed is compiled again. A row other than the kernel's own choice is taken where it is
predicted to need less than ``MARGIN`` of its time, and ``LEAST_GAIN_S`` less: the model is no better than that, and
nothing here was measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tetra.autotune.hardware import Product, product_of
from tetra.autotune.source import function_hash, kernel_hash, toolchain
from tetra.autotune.static_model import Code, Prediction, describe, predict, refusal
from tetra.autotune.store import cache_folder
from tetra.autotune.workloads import Problem
from tetra.kernels.ahead_of_time import check_compiler, check_known_arch, compile_for
from tetra.kernels.specimen import Specimen
from tetra.kernels.tunable import Config, Tunable, Work, all_tunables

Progress = Callable[[int, int, str], None]

MARGIN = 0.95
LEAST_GAIN_S = 0.5e-6
NOTE = "static, unmeasured"
_SAVE_EVERY_S = 10.0  # what was compiled; an interruption loses no more


@dataclass(frozen=True)
class Candidate:
    """A configuration that may run.

    Attributes:
        config: a row of the kernel's table.
        seconds: predicted, of all launches.
        terms: seconds by term, summed over the launches.
        limit: the term that decides the longest launch.
        works: of every launch registers, shared bytes, resident blocks, waves.
    """

    config: Config
    seconds: float
    terms: dict[str, float]
    limit: str
    works: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Rejection:
    """A configuration that may not run, and why."""

    config: Config
    reason: str


@dataclass
class StaticResult:
    """Candidates of every problem, best first, and what was refused.

    Attributes:
        arch: 80 for sm_80.
        product: that the times are predicted for.
        ranked, rejected: by tunable, then by key.
        defaults: what runs without a result, the same way.
        compiled, cached: specimens that were compiled now, and those that were known.
        seconds: that all took.
        notices: for the user.
    """

    arch: int
    product: Product
    ranked: dict[str, dict[str, list[Candidate]]] = field(default_factory=dict)
    rejected: dict[str, dict[str, list[Rejection]]] = field(default_factory=dict)
    defaults: dict[str, dict[str, Config]] = field(default_factory=dict)
    compiled: int = 0
    cached: int = 0
    seconds: float = 0.0
    notices: list[str] = field(default_factory=list)

    def chosen(self, tunable: str, key: str) -> Candidate | None:
        """The default, unless another row is predicted to be faster by the margins; None if all were refused."""
        ranked = self.ranked[tunable][key]
        default = next((one for one in ranked if one.config == self.defaults[tunable][key]), None)
        if default is not None and ranked[0].seconds > min(MARGIN * default.seconds, default.seconds - LEAST_GAIN_S):
            return default
        return ranked[0] if ranked else None

    def top(self, tunable: str, key: str, n: int) -> list[Config]:
        """The ``n`` best rows, the chosen one first."""
        chosen = self.chosen(tunable, key)
        rows = [candidate.config for candidate in self.ranked[tunable][key]]
        if chosen is not None:
            rows = [chosen.config, *(row for row in rows if row != chosen.config)]
        return rows[:n]

    def document(self) -> dict[str, Any]:
        """The content of a file of results."""
        results: dict[str, dict[str, Any]] = {}
        for name, by_key in self.ranked.items():
            for key, ranked in by_key.items():
                chosen = self.chosen(name, key)
                if chosen is None:
                    continue
                entry: dict[str, Any] = {"config": list(chosen.config), "predicted_us": _rounded(1e6 * chosen.seconds)}
                default = next((one for one in ranked if one.config == self.defaults[name][key]), None)
                if default is not None and default is not chosen:
                    entry["default_predicted_us"] = _rounded(1e6 * default.seconds)
                entry |= {"limit": chosen.limit, "candidates": len(ranked)}
                # For the measured tuner, which tries the first; in one string, or a file would be all brackets.
                entry["ranked"] = " ".join("x".join(map(str, row)) for row in self.top(name, key, len(ranked)))
                refused = self.rejected[name][key]
                if refused:
                    entry["rejected"] = [f"{'x'.join(map(str, one.config))}: {one.reason}" for one in refused]
                results.setdefault(name, {})[key] = entry
        modules = sorted({all_tunables()[name].module for name in results})
        return {
            "format": "tetra-tuning",
            "version": 1,
            "origin": "static",
            "note": NOTE,
            "device": {"kind": "cuda", "arch": f"sm_{self.arch}", "name": self.product.name},
            "toolchain": toolchain(),
            "kernels": {module: kernel_hash(module) for module in modules},
            "results": {name: dict(sorted(by_key.items())) for name, by_key in sorted(results.items())},
        }


def _rounded(us: float) -> float:
    return float(f"{us:.4g}")


# --- what is compiled ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A specimen, as another process finds it: the i-th launch of a configuration of a problem."""

    tunable: str
    sizes: tuple[tuple[str, Any], ...]
    config: Config
    index: int
    n_sms: int


def _specimen_of(task: _Task, arch: int) -> Specimen:
    works = all_tunables()[task.tunable].works
    assert works is not None
    return works(arch, task.n_sms, dict(task.sizes), task.config)[task.index].specimen


def _identity(module: str, specimen: Specimen) -> str:
    """Of the source, and of all that the compiler is given with it."""
    name = str(getattr(specimen.kernel, "__name__", specimen.kernel))
    parts = [
        sorted(specimen.signature.items()),
        sorted((name, repr(value)) for name, value in specimen.constants.items()),
        sorted(specimen.options.items()),
        sorted(specimen.unaligned),
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return f"{name}-{function_hash(module, name)}-{digest}"


def compile_one(task: _Task, arch: int) -> Code | str:
    """What was read of the compiled code, or why there is none, in a line."""
    from tetra.profiling.sass import report

    try:
        return Code.of(report(compile_for(_specimen_of(task, arch), arch)))
    except Exception as error:  # whatever a compiler says about a candidate, it is the candidate's
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"does not compile: {type(error).__name__}: {(lines or ['no message'])[-1][:200]}"


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers of a process that was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# --- what is kept --------------------------------------------------------------------------------------------


class _Cache:
    """What is known of compiled code by its identity: a file for each architecture and file of kernels."""

    def __init__(self, folder: Path, arch: int) -> None:
        self.folder = folder / f"sm_{arch}"
        self.stamp = {"version": 1, "toolchain": toolchain()}
        self.known: dict[str, dict[str, Code | str]] = {}
        self.changed: set[str] = set()
        self.notice: str | None = None

    def of(self, module: str) -> dict[str, Code | str]:
        """All that is known of a module's specimens."""
        if module not in self.known:
            self.known[module] = self._read(module)
        return self.known[module]

    def _read(self, module: str) -> dict[str, Code | str]:
        try:
            content = json.loads((self.folder / f"{module}.json").read_text(encoding="utf-8"))
            if content["stamp"] != self.stamp:
                return {}
            codes = {name: one if isinstance(one, str) else Code(**one) for name, one in content["codes"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # not there, or damaged: it is compiled again
        return {name: code for name, code in codes.items() if _is_current(module, name)}

    def add(self, module: str, identity: str, code: Code | str) -> None:
        self.of(module)[identity] = code
        self.changed.add(module)

    def save(self) -> None:
        """Writes what changed; a folder that can't be written gives one notice."""
        for module in sorted(self.changed):
            codes = {name: one if isinstance(one, str) else asdict(one) for name, one in self.known[module].items()}
            try:
                write_json(self.folder / f"{module}.json", {"stamp": self.stamp, "codes": codes})
            except OSError as error:
                self.notice = f"{self.folder}: what was compiled can't be kept: {error.strerror or error}"
        self.changed.clear()


def _is_current(module: str, identity: str) -> bool:
    """Whether code is of the source as it is now."""
    name, source, _ = identity.rsplit("-", 2)
    try:
        return function_hash(module, name) == source
    except KeyError:  # a function that is gone
        return False


def write_json(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """Whole or not at all. OSError where the folder can't be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=indent)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


# --- processes -----------------------------------------------------------------------------------------------


def _compile_all(tasks: dict[str, _Task], arch: int, workers: int) -> Iterator[tuple[str, Code | str]]:
    """Pairs of identity and what was read, as they come. A task that kills its process says so, alone."""

    def pool(n: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), _start_worker)

    if workers == 1 and len(tasks) <= 2:
        for identity, task in tasks.items():
            yield identity, compile_one(task, arch)
        return
    left = dict(tasks)
    with _stopping(pool(workers)) as running:
        futures = {running.submit(compile_one, task, arch): identity for identity, task in left.items()}
        for identity, code in _as_they_end(futures):
            if code is not None:
                del left[identity]
                yield identity, code
    # A process died, and took with it what the others were at. One alone does them in order, so that it is known which
    # one it dies of.
    while left:
        with _stopping(pool(1)) as running:
            in_order = {running.submit(compile_one, task, arch): identity for identity, task in left.items()}
            for future, identity in in_order.items():
                try:
                    code = future.result()
                except BrokenProcessPool:
                    code = "the compiler's process died"
                del left[identity]
                yield identity, code
                if future.exception() is not None:
                    break


def _as_they_end(futures: dict[Future[Code | str], str]) -> Iterator[tuple[str, Code | str | None]]:
    """Identity and result of every future; None if its process died."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                yield futures[future], None


@contextlib.contextmanager
def _stopping(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """Where the context ends early, by Ctrl-C or an error, the pool's processes end too, whatever they are at."""
    try:
        yield pool
    except BaseException:
        processes = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(5)
        raise
    pool.shutdown()


# --- tuning --------------------------------------------------------------------------------------------------


def tune_static(
    arch: int,
    problems: Iterable[Problem],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
    product: Product | None = None,
) -> StaticResult:
    """Compile and rank all candidates of ``problems`` for compute capability ``arch`` (80 means sm_80).

    Args:
        problems: those of kernels that run on CPUs are left out.
        workers: processes that compile; by default as many as there are cores.
        progress: told (specimens compiled, those to compile, the one that was).
        cache_dir: what is read of compiled code is kept there; by default in the user's cache.
        product: that times are predicted for; by default the one that stands for the architecture.

    Raises:
        ValueError: the architecture or a kernel is unknown, ``workers`` is below 1, or ``product`` is of another one.
        RuntimeError: there is no Triton that can compile.
    """
    check_known_arch(arch)
    check_compiler()
    if workers is not None and workers < 1:
        raise ValueError(f"workers: is {workers}, wanted 1 or more")
    product = product or product_of(arch)
    if product.arch != arch:
        raise ValueError(f"product: {product.name} is sm_{product.arch}, not sm_{arch}")
    started = time.monotonic()
    listed = [problem for problem in problems if _tunable(problem.tunable).works is not None]
    result, cache = StaticResult(arch, product), _Cache(cache_dir or cache_folder() / "static", arch)
    works = {(problem.tunable, problem.key): _works(problem, arch, product) for problem in listed}
    tasks, modules = _tasks(listed, works, product, cache)
    result.cached = len(modules) - len(tasks)
    result.compiled = len(tasks)
    n_workers = min(workers or os.cpu_count() or 1, max(len(tasks), 1))
    saved = time.monotonic()
    try:
        for done, (identity, code) in enumerate(_compile_all(tasks, arch, n_workers), 1):
            cache.add(modules[identity], identity, code)
            if progress is not None:
                progress(done, len(tasks), tasks[identity].tunable)
            if time.monotonic() - saved > _SAVE_EVERY_S:
                cache.save()
                saved = time.monotonic()
    finally:
        cache.save()
    for problem in listed:
        _rank(problem, works[problem.tunable, problem.key], result, cache)
    if cache.notice is not None:
        result.notices.append(cache.notice)
    result.seconds = time.monotonic() - started
    return result


def _tunable(name: str) -> Tunable:
    if name not in all_tunables():
        raise ValueError(f"kernel: {name!r} can't be tuned; wanted one of {', '.join(sorted(all_tunables()))}")
    return all_tunables()[name]


_Works = dict[Config, list[Work]]


def _works(problem: Problem, arch: int, product: Product) -> _Works:
    tunable = _tunable(problem.tunable)
    assert tunable.works is not None
    space = tunable.space(arch, problem.sizes)
    return {config: tunable.works(arch, product.n_sms, problem.sizes, config) for config in space}


def _tasks(
    problems: list[Problem], works: dict[tuple[str, str], _Works], product: Product, cache: _Cache
) -> tuple[dict[str, _Task], dict[str, str]]:
    """What has to be compiled, and the module of every specimen, by identity."""
    tasks: dict[str, _Task] = {}
    modules: dict[str, str] = {}
    for problem in problems:
        module = _tunable(problem.tunable).module
        for config, launches in works[problem.tunable, problem.key].items():
            for i, work in enumerate(launches):
                identity = _identity(module, work.specimen)
                if identity not in modules and identity not in cache.of(module):
                    sizes = tuple(problem.sizes.items())
                    tasks[identity] = _Task(problem.tunable, sizes, config, i, product.n_sms)
                modules[identity] = module
    return tasks, modules


def _rank(problem: Problem, works: _Works, result: StaticResult, cache: _Cache) -> None:
    name, key, tunable = problem.tunable, problem.key, _tunable(problem.tunable)
    codes = cache.of(tunable.module)
    ranked: list[Candidate] = []
    rejected: list[Rejection] = []
    for config, launches in works.items():
        read = [codes[_identity(tunable.module, work.specimen)] for work in launches]
        reasons = [
            code if isinstance(code, str) else refusal(work, code, result.product)
            for work, code in zip(launches, read, strict=True)
        ]
        reason = next((one for one in reasons if one is not None), None)
        if reason is not None:
            rejected.append(Rejection(config, reason))
            continue
        healthy = [code for code in read if isinstance(code, Code)]
        predictions = [predict(work, code, result.product) for work, code in zip(launches, healthy, strict=True)]
        ranked.append(_candidate(config, launches, healthy, predictions))
    ranked.sort(key=lambda one: one.seconds)  # stable: of equals the first row of the table
    result.ranked.setdefault(name, {})[key] = ranked
    result.rejected.setdefault(name, {})[key] = rejected
    result.defaults.setdefault(name, {})[key] = tunable.default(result.arch, result.product.n_sms, problem.sizes)


def _candidate(config: Config, works: list[Work], codes: list[Code], predictions: list[Prediction]) -> Candidate:
    longest = max(predictions, key=lambda one: one.seconds)
    return Candidate(
        config,
        seconds=sum(one.seconds for one in predictions),
        terms={term: sum(one.terms[term] for one in predictions) for term in longest.terms},
        limit=longest.limit,
        works=tuple(describe(*one) for one in zip(works, codes, predictions, strict=True)),
    )


def explain(result: StaticResult, tunable: str, key: str, n: int = 5) -> list[dict[str, Any]]:
    """The best ``n`` candidates of a problem with every term, best first.

    Returns:
        Mappings with ``config`` (by field), ``predicted_us``, ``share_of_best``, ``chosen``, ``limit``, ``terms_us``,
        and of the first launch ``registers, shared_bytes, num_warps, blocks, blocks_per_sm, waves``.

    Raises:
        ValueError: the result does not hold this kernel or this key.
    """
    if key not in result.ranked.get(tunable, {}):
        known = ", ".join(sorted(result.ranked.get(tunable, result.ranked)))
        raise ValueError(f"no prediction of {tunable} {key}; there are {known}")
    fields, chosen = all_tunables()[tunable].fields, result.chosen(tunable, key)
    ranked = result.ranked[tunable][key]
    return [
        {
            "config": dict(zip(fields, one.config, strict=True)),
            "predicted_us": 1e6 * one.seconds,
            "share_of_best": one.seconds / ranked[0].seconds,
            "chosen": one is chosen,
            "limit": one.limit,
            "terms_us": {term: 1e6 * seconds for term, seconds in one.terms.items()},
            **one.works[0],
        }
        for one in ranked[:n]
    ]


def save(result: StaticResult, path: Path) -> None:
    """Writes ``document()`` as JSON, whole or not at all. OSError where that can't be."""
    write_json(path, result.document(), indent=1)
