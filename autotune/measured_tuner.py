"""Measures configurations on the device that is here, and keeps the best.

For every problem (a kernel and a bucket of shapes):

1. Each candidate runs once, and what it gives is compared with the reference. One that raises, gives wrong values, ends
   its process or doesn't come back is recorded as such, and is out.
2. The others are timed in turns, so that whatever else the machine does meets all of them. The slower half goes after
   every ``ROUNDS`` (successive halving); ``FINALISTS`` are left, and the default, for ``FINAL_ROUNDS`` more.
3. The median of a candidate's ratios to the others, round by round, decides. The default stays where the best is not
   faster by more than ``TIE``: a difference that small is noise. The result is written at once.

Candidates run in processes of their own, which are started again after a crash. Several check candidates side by side
(most of that is compiling); one of them times, while the others do nothing.

A budget bounds the whole. A problem that it does not suffice for is not kept, and reported.
"""

from __future__ import annotations

import datetime
import math
import queue
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from tetra.autotune import table
from tetra.autotune.candidates import (
    CANDIDATE_TIMEOUT_S,
    OUT_OF_MEMORY,
    Bench,
    BudgetSpent,
    CandidateFailed,
    Tunables,
    Worker,
    first_line,
)
from tetra.autotune.store import Identity, Store, device_identity, notice, read_or_notice
from tetra.autotune.timers import Timer, timer_for
from tetra.autotune.workloads import Problem
from tetra.kernels.backend import arch_of, n_sms
from tetra.kernels.tunable import Config, Sizes, Tunable, all_tunables

TIE = 0.02  # of the default's time
ROUNDS = 3  # before the slower half goes
FINALISTS = 4  # are never halved away
FINAL_ROUNDS = 30
MOST_METHODS = 4  # of timing, before a candidate counts as one that can not be timed
VERIFY_ROUNDS = 15  # of the whole space
DUEL_ROUNDS = 41  # of the chosen configuration against the best other one

Progress = Callable[[int, int, str], None]


class BudgetError(ValueError):
    """The budget is not a positive number of seconds."""


# --- all candidates of a problem -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What was found out about one problem.

    Attributes:
        kernel, key: the problem.
        config: the best.
        seconds: its median; ``default_seconds`` that of the default, None where that failed.
        n_candidates: how many were tried.
        method: of timing.
        rejected: configuration and reason of those that failed.
    """

    kernel: str
    key: str
    config: Config
    seconds: float
    default_seconds: float | None
    n_candidates: int
    method: str
    rejected: tuple[tuple[Config, str], ...]

    def entry(self) -> dict[str, Any]:
        """As it is kept."""
        return {
            "config": list(self.config),
            "measured_us": round(1e6 * self.seconds, 4),
            "default_us": None if self.default_seconds is None else round(1e6 * self.default_seconds, 4),
            "candidates": self.n_candidates,
            "timing": self.method,
            "rejected": [{"config": list(config), "reason": reason} for config, reason in self.rejected],
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }


@dataclass
class Report:
    """What :func:`measure` did.

    Attributes:
        finished: kept results.
        present: (kernel, key) that had a result already.
        unfinished: (kernel, key) that the budget did not suffice for.
        failed: (kernel, key, reason) of problems without a working candidate.
        seconds: that it took.
    """

    finished: list[Result] = field(default_factory=list)
    present: list[tuple[str, str]] = field(default_factory=list)
    unfinished: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON values only."""
        return {
            "finished": [{"kernel": r.kernel, "key": r.key, **r.entry()} for r in self.finished],
            "present": [list(pair) for pair in self.present],
            "unfinished": [list(pair) for pair in self.unfinished],
            "failed": [list(row) for row in self.failed],
            "seconds": self.seconds,
        }


class Times:
    """Seconds of candidates of one problem, round by round.

    What else a machine does comes and goes, and meets all candidates of a round. So they are compared by ratios within
    rounds, of which the median counts, and not by their times.
    """

    def __init__(self, bench: Callable[..., Any], kernel: str, sizes: Sizes, deadline: float) -> None:
        self._bench, self._kernel, self._sizes, self._deadline = bench, kernel, sizes, deadline
        self._rounds: list[dict[Config, float]] = []
        self.method, self._n_methods = "", 0
        self.failures: dict[Config, str] = {}

    def take(self, configs: Sequence[Config]) -> None:
        """One round: every candidate once. One that fails is noted, and has no more rounds."""
        found: dict[Config, float] = {}
        for config in configs:
            if config in self.failures:
                continue
            try:
                method, seconds = self._bench("time", self._kernel, self._sizes, config, deadline=self._deadline)
            except CandidateFailed as failure:
                self.failures[config] = str(failure)
                continue
            if not all(math.isfinite(second) and second > 0 for second in seconds) or not seconds:
                self.failures[config] = f"has no time: {seconds}"
                continue
            if method != self.method:  # what was timed otherwise can't be compared
                self._rounds.clear()
                first, self.method = not self.method, method
                self._n_methods += 1
                if self._n_methods > MOST_METHODS:
                    self.failures[config] = "can't be compared: it is timed in another way each time"
                    continue
                if not first:
                    return self.take(configs)
            found[config] = statistics.median(seconds)
        self._rounds.append(found)

    def median(self, config: Config) -> float:
        """Seconds; infinite without a time."""
        seconds = [found[config] for found in self._rounds if config in found]
        return statistics.median(seconds) if seconds and config not in self.failures else math.inf

    def ratio(self, config: Config, other: Config) -> float:
        """How many times as long one takes as another, in the rounds that had both; infinite without one."""
        ratios = [found[config] / found[other] for found in self._rounds if config in found and other in found]
        return statistics.median(ratios) if ratios and config not in self.failures else math.inf

    def ranked(self, configs: Sequence[Config]) -> list[Config]:
        """Those that have not failed, the fastest first."""
        working = [config for config in configs if config not in self.failures]
        return sorted(working, key=lambda config: self.ratio(config, working[0]))


def halve(times: Times, candidates: list[Config], default: Config) -> Config:
    """The winner among candidates that work."""
    left = list(candidates)
    while len(left) > FINALISTS:
        for round_number in range(ROUNDS):
            times.take(left if round_number % 2 else left[::-1])
        kept = times.ranked(left)[: max(-(-len(left) // 2), FINALISTS)]
        left = [c for c in left if c in kept]
    finalists = [c for c in candidates if c in left or (c == default and c not in times.failures)]
    for round_number in range(FINAL_ROUNDS):
        times.take(finalists if round_number % 2 else finalists[::-1])
    ranked = times.ranked(finalists)
    if not ranked:
        raise CandidateFailed("no candidate works when it is timed")
    return default if times.ratio(default, ranked[0]) <= 1 + TIE else ranked[0]


class _Session:
    """The processes of a run, and its deadline."""

    def __init__(
        self,
        device: torch.device,
        timer: Timer | None,
        tunables: Tunables,
        budget_s: float,
        checkers: int,
        isolate: bool,
        candidate_timeout_s: float,
    ) -> None:
        if not budget_s > 0:
            raise BudgetError(f"budget: is {budget_s:g} seconds, wanted more than 0")
        self.started = time.monotonic()
        self.deadline = self.started + budget_s
        self.tunables, self._timeout_s, self._isolate = tunables, candidate_timeout_s, isolate
        arguments = (device, timer or timer_for(device), tunables, torch.get_num_threads())
        if isolate:
            self._workers = [Worker(*arguments) for _ in range(max(checkers, 1))]
        else:
            self._bench = Bench(*arguments)

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._isolate:
            for worker in self._workers:
                worker.stop()

    def call(self, method: str, *given: Any, deadline: float) -> Any:
        """Of the worker that times."""
        self.check_budget()
        if self._isolate:
            return self._workers[0](method, *given, deadline=deadline, timeout_s=self._timeout_s)
        try:
            return getattr(self._bench, method)(*given)
        except Exception as error:
            raise CandidateFailed(f"raised {type(error).__name__}: {first_line(error)}") from None

    def check_budget(self) -> None:
        if time.monotonic() >= self.deadline:
            raise BudgetSpent

    def wrong(self, kernel: str, sizes: Sizes, candidates: Sequence[Config]) -> dict[Config, str]:
        """Reasons of those that don't work."""
        if not self._isolate:
            reasons = {}
            for config in candidates:
                self.check_budget()
                reasons[config] = self._bench.check(kernel, sizes, config)
            return {config: reason for config, reason in reasons.items() if reason is not None}
        wrong = self._wrong_by(self._workers, kernel, sizes, candidates)
        # Side by side, they may need more memory than there is: those that found none have it for themselves now.
        starved = [config for config, reason in wrong.items() if reason.startswith(OUT_OF_MEMORY)]
        for worker in self._workers if starved else self._workers[1:]:
            worker.release(self.deadline)
        again = self._wrong_by(self._workers[:1], kernel, sizes, starved)
        reasons = {c: again.get(c) if c in starved else reason for c, reason in wrong.items()}
        return {config: reason for config, reason in reasons.items() if reason is not None}

    def _wrong_by(
        self, workers: Sequence[Worker], kernel: str, sizes: Sizes, candidates: Sequence[Config]
    ) -> dict[Config, str]:
        free: queue.Queue[Worker] = queue.Queue()
        for worker in workers[: len(candidates)]:
            free.put(worker)

        def reason(config: Config) -> str | None:
            worker = free.get()
            try:
                self.check_budget()
                found = worker("check", kernel, sizes, config, deadline=self.deadline, timeout_s=self._timeout_s)
                return None if found is None else str(found)
            except CandidateFailed as failure:
                return str(failure)
            finally:
                free.put(worker)

        with ThreadPoolExecutor(free.qsize() or 1) as threads:
            futures = [threads.submit(reason, config) for config in candidates]
            try:
                found = [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                for worker in workers:  # or this would wait for the candidates at work
                    worker.kill()
                raise
        return {config: text for config, text in zip(candidates, found, strict=True) if text is not None}


def _cores(device: torch.device) -> int:
    return n_sms(device) if device.type == "cuda" else torch.get_num_threads()


def _for_device(
    problems: Sequence[Problem], tunables: Mapping[str, Tunable], device: torch.device
) -> Iterator[tuple[Problem, Tunable, str]]:
    """(problem, its kernel, key) of what runs on a kind of device, each key once."""
    seen = set()
    for problem in problems:
        tunable = tunables[problem.tunable]
        key = tunable.key(problem.sizes)
        if tunable.on == device.type and (problem.tunable, key) not in seen:
            seen.add((problem.tunable, key))
            yield problem, tunable, key


def concrete(device: torch.device | str) -> torch.device:
    """With the number of the GPU."""
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def measure(
    problems: Sequence[Problem],
    device: torch.device | str,
    *,
    budget_s: float,
    timer: Timer | None = None,
    ranking: Callable[[Tunable, str], Sequence[Config]] | None = None,
    top_n: int = 8,
    store: Store | None = None,
    progress: Progress | None = None,
    again: bool = False,
    tunables: Tunables = all_tunables,
    identity: Identity | None = None,
    checkers: int = 1,
    isolate: bool = True,
    candidate_timeout_s: float = CANDIDATE_TIMEOUT_S,
) -> Report:
    """Find the best configuration of every problem, and keep it.

    Args:
        problems: those of other kinds of devices are left out.
        device: a GPU, or the CPU.
        budget_s: seconds for all of it.
        timer: source of times; None: the device's.
        ranking: a problem's configurations by a prediction, the best first: the first ``top_n`` are tried, with the
            default. Where it knows nothing, or is None, the whole space is.
        store: that keeps the results; None: the user's.
        progress: told (done, all, what comes next).
        again: measure what has a result already.
        tunables: the kernels by name; called in every process.
        identity: of the device, if it is to be another one.
        checkers: processes that check candidates side by side.
        isolate: candidates run in processes of their own. Without, one that crashes ends the caller's.
        candidate_timeout_s: after so long a candidate counts as hanging.

    Raises:
        BudgetError: ``budget_s`` is not above 0.
        StoreError: results can't be kept.
        KeyError: no kernel has the name that a problem says.
    """
    device = concrete(device)
    store = store if store is not None else Store()
    report = Report()
    with _Session(device, timer, tunables, budget_s, checkers, isolate, candidate_timeout_s) as session:
        store.check_writable()
        identity = identity if identity is not None else device_identity(device)
        kernels = tunables()
        wanted = list(_for_device(problems, kernels, device))
        known = {} if again else _results_of(store, identity, kernels)
        for done, (problem, tunable, key) in enumerate(wanted):
            if progress is not None:
                progress(done, len(wanted), f"{tunable.name} {key}")
            entry = known.get(tunable.name, {}).get(key)
            if entry is not None and tuple(entry["config"]) in _rows(tunable, problem.sizes, device):
                report.present.append((tunable.name, key))
                continue
            try:
                result = _measure_one(session, problem.sizes, tunable, key, device, ranking, top_n)
            except BudgetSpent:
                report.unfinished.append((tunable.name, key))
                continue
            except CandidateFailed as failure:
                report.failed.append((tunable.name, key, str(failure)))
                continue
            digest = _hash_of(tunable)
            store.add(identity, {tunable.module: digest}, tunable.name, key, result.entry())
            report.finished.append(result)
        report.seconds = time.monotonic() - session.started
    table.reset()
    return report


def _rows(tunable: Tunable, sizes: Sizes, device: torch.device) -> tuple[Config, ...]:
    """All that may be chosen for a problem, the default first."""
    arch = arch_of(device)
    return tuple(dict.fromkeys((tunable.default(arch, _cores(device), sizes), *tunable.space(arch, sizes))))


def _hash_of(tunable: Tunable) -> str:
    return table.current_hash(tunable.module)


def _results_of(store: Store, identity: Identity, kernels: Mapping[str, Tunable]) -> Mapping[str, Any]:
    """Results that are there for this device, and still hold."""
    found = read_or_notice(store.path_of(identity))
    if found is None or identity.difference(found) is not None:
        return {}
    return {
        name: entries
        for name, entries in found.results.items()
        if name in kernels and found.kernels.get(kernels[name].module) == _hash_of(kernels[name])
    }


def _measure_one(
    session: _Session,
    sizes: Sizes,
    tunable: Tunable,
    key: str,
    device: torch.device,
    ranking: Callable[[Tunable, str], Sequence[Config]] | None,
    top_n: int,
) -> Result:
    session.check_budget()
    default = tunable.default(arch_of(device), _cores(device), sizes)
    space = tunable.space(arch_of(device), sizes)
    predicted = [tuple(config) for config in ranking(tunable, key)] if ranking is not None else []
    chosen = [config for config in predicted if config in space][:top_n] or space
    candidates = list(dict.fromkeys((default, *chosen)))
    rejected = session.wrong(tunable.name, sizes, candidates)
    working = [config for config in candidates if config not in rejected]
    if not working:
        reason = next(iter(rejected.values()))
        raise CandidateFailed(f"none of {len(candidates)} candidates works; the default {reason}")
    times = Times(session.call, tunable.name, sizes, session.deadline)
    best = halve(times, working, default)
    rejected |= times.failures
    default_seconds = times.median(default)
    return Result(
        tunable.name,
        key,
        best,
        times.median(best),
        default_seconds if math.isfinite(default_seconds) else None,
        len(candidates),
        times.method,
        tuple(rejected.items()),
    )


# --- how good the choices are --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One choice, measured against all other configurations.

    Attributes:
        kernel, key: the problem.
        config, origin: what is chosen, and where that comes from.
        best: the fastest other configuration.
        seconds, best_seconds: their medians.
        regret: how many times as long the choice takes as the best: 1 where it is the best.
        n_candidates: how many were measured.
        method: of timing.
    """

    kernel: str
    key: str
    config: Config
    origin: str
    best: Config
    seconds: float
    best_seconds: float
    regret: float
    n_candidates: int
    method: str


@dataclass
class VerifyReport:
    """Verdicts; problems that the budget did not suffice for; (kernel, key, reason) of those without one."""

    verdicts: list[Verdict] = field(default_factory=list)
    unfinished: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest regret; 1 without any."""
        return max((verdict.regret for verdict in self.verdicts), default=1.0)

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON values only."""
        return {
            "verdicts": [{**vars(v), "config": list(v.config), "best": list(v.best)} for v in self.verdicts],
            "unfinished": [list(pair) for pair in self.unfinished],
            "failed": [list(row) for row in self.failed],
            "largest_regret": self.worst,
        }


def verify(
    problems: Sequence[Problem],
    device: torch.device | str,
    *,
    budget_s: float,
    timer: Timer | None = None,
    progress: Progress | None = None,
    tunables: Tunables = all_tunables,
    checkers: int = 1,
    isolate: bool = True,
    candidate_timeout_s: float = CANDIDATE_TIMEOUT_S,
) -> VerifyReport:
    """Measure what is chosen against the whole space.

    All configurations are timed in turns, ``VERIFY_ROUNDS`` times. The smallest of many medians is small by luck too,
    so the fastest other one then meets the chosen one in ``DUEL_ROUNDS`` new rounds, one right after the other; the
    regret is the median of their ratios, and 1 where the chosen one is the faster.

    Raises as :func:`measure`, but writes nothing.
    """
    device = concrete(device)
    report = VerifyReport()
    with _Session(device, timer, tunables, budget_s, checkers, isolate, candidate_timeout_s) as session:
        wanted = list(_for_device(problems, tunables(), device))
        for done, (problem, tunable, key) in enumerate(wanted):
            if progress is not None:
                progress(done, len(wanted), f"{tunable.name} {key}")
            try:
                report.verdicts.append(_verify_one(session, problem.sizes, tunable, key, device))
            except BudgetSpent:
                report.unfinished.append((tunable.name, key))
            except CandidateFailed as failure:
                report.failed.append((tunable.name, key, str(failure)))
    return report


def _verify_one(session: _Session, sizes: Sizes, tunable: Tunable, key: str, device: torch.device) -> Verdict:
    session.check_budget()
    choice = chosen(tunable, sizes, device)
    candidates = list(dict.fromkeys((choice.config, *tunable.space(arch_of(device), sizes))))
    rejected = session.wrong(tunable.name, sizes, candidates)
    if choice.config in rejected:
        raise CandidateFailed(f"the chosen {list(choice.config)} {rejected[choice.config]}")
    working = [config for config in candidates if config not in rejected]
    times = Times(session.call, tunable.name, sizes, session.deadline)
    for round_number in range(VERIFY_ROUNDS):
        times.take(working if round_number % 2 else working[::-1])
    if choice.config in times.failures:
        raise CandidateFailed(f"the chosen {list(choice.config)} {times.failures[choice.config]}")
    others = [config for config in times.ranked(working) if config != choice.config]
    regret, rival, seconds, rival_seconds = 1.0, choice.config, times.median(choice.config), times.median(choice.config)
    if others:
        rival = others[0]
        duel = Times(session.call, tunable.name, sizes, session.deadline)
        for round_number in range(DUEL_ROUNDS):
            duel.take((choice.config, rival) if round_number % 2 else (rival, choice.config))
        if duel.failures:
            raise CandidateFailed(next(iter(duel.failures.values())))
        regret = max(duel.ratio(choice.config, rival), 1.0)
        seconds, rival_seconds = duel.median(choice.config), duel.median(rival)
    return Verdict(
        *(tunable.name, key, choice.config, choice.origin, rival, seconds, rival_seconds, regret),
        *(len(candidates), times.method),
    )


def chosen(
    tunable: Tunable, sizes: Sizes, device: torch.device | None, arch: int | None = None, cores: int = 0
) -> table.Choice:
    """What a launch uses for a problem.

    Args:
        device: of the launch; None for a GPU of compute capability ``arch`` with so many ``cores`` (multiprocessors).
    """
    if device is not None:
        arch, cores = arch_of(device), _cores(device)
    assert arch is not None
    default = tunable.default(arch, cores, sizes)
    rows = (default, *(row for row in tunable.space(arch, sizes) if row != default))
    where = None if device is None or device.type == "cpu" else device
    return table.explain(tunable.name, arch, tunable.key(sizes), rows, where)


def predicted(tunable: Tunable, key: str, device: torch.device) -> list[Config]:
    """Configurations of a problem by what files predict for a GPU, the best first; empty where they don't."""
    for source in table.sources(arch_of(device), device):
        entry = source.results.results.get(tunable.name, {}).get(key, {})
        if "ranked" in entry and table.is_current(source, tunable.name):
            try:
                return [tuple(int(number) for number in row.split("x")) for row in entry["ranked"].split()]
            except (AttributeError, ValueError):
                notice(f"{source.path}: the predicted order of {tunable.name} {key} is ignored: it can't be read")
    return []
