"""The measured tuner with times and faults of the test's own, in real processes."""

from __future__ import annotations

import fcntl
import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tetra.autotune import measured_tuner, table
from tetra.autotune.measured_tuner import BudgetError, measure, verify
from tetra.autotune.store import FOLDER_VARIABLE, Identity, Results, Store, StoreError, forget_notices, read_results
from tetra.autotune.timers import CpuTimer
from tetra.autotune.workloads import Problem
from tetra.kernels.tunable import Config, Sizes, Trial, Tunable

HERE = Identity({"kind": "cpu", "name": "Test CPU", "cores": 2}, {})
CPU = torch.device("cpu")
CONFIGS: tuple[Config, ...] = tuple((i, 7) for i in range(24))


def answer(config: Config) -> tuple[Tensor, ...]:
    """What configuration (i, fault) of ``faulty`` gives, if anything."""
    out = torch.empty(1000)
    fault = config[1]
    if fault == 1:
        raise RuntimeError("the configuration takes too much shared memory\nand more lines")
    if fault == 2:
        return (out.fill_(3.0).index_fill_(0, torch.tensor([500]), 4.0),)
    if fault == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == 4:
        time.sleep(1000)
    if fault == 5:
        return (out,)  # nothing is written
    if fault == 6:
        os._exit(3)
    return (out.fill_(3.0),)


def trial(sizes: Sizes, device: torch.device) -> Trial:
    return Trial(answer, lambda: (torch.full((1000,), 3.0),))


def tight_trial(sizes: Sizes, device: torch.device) -> Trial:
    """There is memory for one process at a time; the configuration (3, 9) needs more than there is."""
    memory = Path(os.environ[FOLDER_VARIABLE], "memory").open("w")  # noqa: SIM115 (closed when the trial is dropped)

    def run(config: Config) -> tuple[Tensor, ...]:
        try:
            fcntl.flock(memory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the trial is dropped
        except BlockingIOError:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB") from None
        if config[1] == 9:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return (torch.full((1000,), 3.0),)

    return Trial(run, lambda: (torch.full((1000,), 3.0),))


def tunable(name: str, space: tuple[Config, ...], trial: Callable[[Sizes, torch.device], Trial] = trial) -> Tunable:
    return Tunable(
        name=name,
        module="native",
        on="cpu",
        fields=("I", "FAULT"),
        key=lambda sizes: f"n{sizes['n']}",
        space=lambda arch, sizes: space,
        default=lambda arch, cores, sizes: space[0],
        works=None,
        trial=trial,
    )


def tunables() -> dict[str, Tunable]:
    """Also imported by the processes that candidates run in."""
    return {
        "sound": tunable("sound", CONFIGS),
        "faulty": tunable("faulty", tuple((i, fault) for i, fault in enumerate((7, 1, 2, 3, 4, 5, 6, 7)))),
        "broken": tunable("broken", ((0, 1), (1, 2))),
        "tight": tunable("tight", ((0, 7), (1, 7), (2, 7), (3, 9), (4, 7)), tight_trial),
        "gpu": Tunable(**{**vars(tunable("gpu", CONFIGS)), "on": "cuda"}),
    }


class Scripted:
    """Times of a test: those of candidate i are ``seconds(i)``, with noise and outliers."""

    method = "scripted"

    def __init__(self, seconds: Callable[[int], float], noise: float = 0.0, takes_s: float = 0.0) -> None:
        self.seconds, self.noise, self.takes_s = seconds, noise, takes_s
        self.chance = random.Random(0)
        self.calls: list[Config] = []

    def prepare(self, device: torch.device) -> None:
        pass

    def __call__(self, run: Callable[[], object]) -> list[float]:
        time.sleep(self.takes_s)
        config = run.__closure__ and next(
            c.cell_contents for c in run.__closure__ if isinstance(c.cell_contents, tuple)
        )
        assert isinstance(config, tuple)
        self.calls.append(config)
        true = self.seconds(config[0])
        return [
            true * (1 + self.noise * self.chance.random()) * (50 if self.chance.random() < 0.05 else 1)
            for _ in range(3)
        ]


def later_is_faster(i: int) -> float:
    """At module level, so that it travels to other processes."""
    return 1e-3 / (1 + i)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    table.reset()
    return Store()


def run(store: Store, timer: Scripted, problems: list[Problem], **options: object) -> measured_tuner.Report:
    given: dict[str, object] = {"budget_s": 60.0, "isolate": False} | options
    return measure(problems, CPU, timer=timer, store=store, tunables=tunables, identity=HERE, **given)  # type: ignore[arg-type]


def sound(n: int = 1) -> Problem:
    return Problem("sound", {"n": n})


@pytest.mark.parametrize("best", [0, 5, 23])
def test_the_fastest_wins_through_noise_and_outliers(store: Store, best: int) -> None:
    timer = Scripted(lambda i: 1e-3 * (1 + 0.06 * abs(i - best)), noise=0.03)
    report = run(store, timer, [sound()])
    (result,) = report.finished
    assert result.config == CONFIGS[best]
    assert result.n_candidates == 24
    assert result.seconds == pytest.approx(1e-3, rel=0.04)
    kept = read_results(store.path_of(HERE))
    entry = kept.results["sound"]["n1"]
    assert entry["config"] == list(CONFIGS[best])
    assert entry["measured_us"] == pytest.approx(1e3, rel=0.04)
    assert entry["timing"] == "scripted"
    assert kept.kernels == {"native": table.current_hash("native")}
    # Successive halving: the best few take most of the time.
    counts = [timer.calls.count(config) for config in CONFIGS]
    assert max(counts) == counts[best] if best else counts[0] >= measured_tuner.FINAL_ROUNDS
    assert sorted(counts)[12] <= 2 * measured_tuner.ROUNDS


def test_the_default_stays_where_nothing_is_clearly_faster(store: Store) -> None:
    (result,) = run(store, Scripted(lambda i: 1e-3 if i != 9 else 0.99e-3), [sound()]).finished
    assert result.config == CONFIGS[0]
    (result,) = run(store, Scripted(lambda i: 1e-3 if i != 9 else 0.97e-3), [sound()], again=True).finished
    assert result.config == CONFIGS[9]


def test_what_is_there_is_not_measured_again(store: Store) -> None:
    run(store, Scripted(later_is_faster), [sound(1)])
    timer = Scripted(lambda i: 1e-3 * (1 + i))
    report = run(store, timer, [sound(1), sound(2), sound(2), Problem("gpu", {"n": 1})])
    assert report.present == [("sound", "n1")]
    assert [(r.kernel, r.key) for r in report.finished] == [("sound", "n2")]
    report = run(store, timer, [sound(1)], again=True)
    assert report.finished[0].config == CONFIGS[0]


def test_results_of_another_source_are_measured_again(store: Store) -> None:
    store.add(HERE, {"native": "old"}, "sound", "n1", {"config": [3, 7]})
    report = run(store, Scripted(later_is_faster), [sound(1)])
    assert len(report.finished) == 1
    assert report.present == []


def test_only_the_best_predicted_are_tried(store: Store) -> None:
    timer = Scripted(later_is_faster)
    predicted = [(5, 7), (99, 99), (4, 7), (3, 7), (2, 7)]
    (result,) = run(store, timer, [sound()], ranking=lambda tunable, key: predicted, top_n=3).finished
    assert set(timer.calls) == {CONFIGS[0], CONFIGS[5], CONFIGS[4], CONFIGS[3]}
    assert result.config == CONFIGS[5]
    timer = Scripted(later_is_faster)
    (result,) = run(store, timer, [sound()], ranking=lambda tunable, key: [], again=True).finished
    assert set(timer.calls) == set(CONFIGS)


@pytest.mark.parametrize("budget", [0, -1, math.nan, 0.0])
def test_a_budget_of_zero(store: Store, budget: float) -> None:
    with pytest.raises(BudgetError, match=r"budget: is .* seconds, wanted more than 0"):
        run(store, Scripted(later_is_faster), [sound()], budget_s=budget)
    assert store.files() == []


def test_a_budget_that_is_spent_keeps_what_is_finished(store: Store) -> None:
    problems = [sound(n) for n in range(50)]
    started = time.monotonic()
    report = run(store, Scripted(later_is_faster, takes_s=0.001), problems, budget_s=2.5)
    assert time.monotonic() - started < 20
    assert 0 < len(report.finished) < 50
    assert len(report.finished) + len(report.unfinished) == 50
    kept = read_results(store.path_of(HERE)).results["sound"]
    assert set(kept) == {result.key for result in report.finished}
    # The next run goes on.
    more = run(store, Scripted(later_is_faster), problems, budget_s=60.0)
    assert len(more.present) == len(report.finished)
    assert len(more.finished) == len(report.unfinished)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    timer = Scripted(later_is_faster)
    with pytest.raises(StoreError, match="set TETRA_TUNING_DIR"):
        run(Store(tmp_path / "file"), timer, [sound()])
    assert timer.calls == []


def test_each_result_is_written_at_once(store: Store) -> None:
    class Stops(Scripted):
        def __call__(self, run: Callable[[], object]) -> list[float]:
            if len(self.calls) > 300:
                raise KeyboardInterrupt
            return super().__call__(run)

    with pytest.raises(KeyboardInterrupt):
        run(store, Stops(later_is_faster), [sound(n) for n in range(20)])
    assert read_results(store.path_of(HERE)).results["sound"]["n0"]["config"] == list(CONFIGS[23])


def test_a_timer_that_changes_its_method_each_time_is_of_no_use(store: Store) -> None:
    class Restless(Scripted):
        def __call__(self, run: Callable[[], object]) -> list[float]:
            self.method = f"method {len(self.calls)}"
            return super().__call__(run)

    report = run(store, Restless(later_is_faster), [sound()])
    assert report.failed == [("sound", "n1", "no candidate works when it is timed")]


def test_a_method_that_changes_starts_the_times_anew(store: Store) -> None:
    class Falls(Scripted):
        """Candidate 20 can't be timed as the others are, so that all are timed otherwise from then on."""

        def prepare(self, device: torch.device) -> None:
            self.method = "graph"

        def __call__(self, run: Callable[[], object]) -> list[float]:
            seconds = super().__call__(run)
            if self.calls[-1] == CONFIGS[20]:
                self.method = "events"
            return [s * (1 if self.method == "graph" else 100) for s in seconds]

    (result,) = run(store, Falls(later_is_faster), [sound()]).finished
    assert result.method == "events"
    assert result.config == CONFIGS[23]
    assert result.seconds == pytest.approx(100 * later_is_faster(23))


# --- faults, in processes of their own -------------------------------------------------------------------------


@pytest.mark.parametrize("checkers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_faulty_candidates_are_recorded_and_never_chosen(store: Store, checkers: int) -> None:
    report = run(
        store,
        Scripted(later_is_faster),
        [Problem("faulty", {"n": 1}), Problem("broken", {"n": 1})],
        isolate=True,
        checkers=checkers,
        candidate_timeout_s=2.0,
    )
    (result,) = report.finished
    assert result.config == (7, 7)
    reasons = {config[1]: reason for config, reason in result.rejected}
    assert reasons[1] == "raised RuntimeError: the configuration takes too much shared memory"
    assert reasons[2] == "wrong values: output 0 differs in 1 of 1000 values, by up to 1"
    assert reasons[3] == "ended its process (signal 11)"
    assert reasons[4].startswith("did not come back within")
    assert reasons[5].startswith("wrong values: output 0 differs in 1000 of 1000")
    assert reasons[6] == "ended its process (exit status 3)"
    assert len(reasons) == 6
    entry = read_results(store.path_of(HERE)).results["faulty"]["n1"]
    assert {tuple(row["config"]): row["reason"] for row in entry["rejected"]} == dict(result.rejected)
    ((kernel, key, reason),) = report.failed
    assert (kernel, key) == ("broken", "n1")
    assert "none of 2 candidates works; the default raised RuntimeError" in reason


def test_candidates_that_found_no_memory_beside_others_are_tried_alone(store: Store) -> None:
    store.folder.mkdir(parents=True)
    problems = [Problem("tight", {"n": n}) for n in (1, 2)]  # of which the second has what the first gave back
    report = run(store, Scripted(later_is_faster), problems, isolate=True, checkers=2)
    for result in report.finished:
        assert result.config == (4, 7)
        assert result.rejected == (((3, 9), "raised OutOfMemoryError: tried to allocate 9 GiB"),)
    assert len(report.finished) == 2


def test_a_candidate_that_fails_when_it_is_timed(store: Store) -> None:
    class Sometimes(Scripted):
        def __call__(self, run: Callable[[], object]) -> list[float]:
            seconds = super().__call__(run)
            if self.calls[-1] == CONFIGS[23] and self.calls.count(CONFIGS[23]) > 3:
                raise RuntimeError("CUDA error: misaligned address")
            return seconds

    (result,) = run(store, Sometimes(later_is_faster), [sound()]).finished
    assert result.config == CONFIGS[22]
    assert result.rejected == ((CONFIGS[23], "raised RuntimeError: CUDA error: misaligned address"),)


def test_a_hanging_candidate_does_not_outlast_the_budget(store: Store) -> None:
    started = time.monotonic()
    report = run(store, Scripted(later_is_faster), [Problem("faulty", {"n": 1})], isolate=True, budget_s=6.0)
    assert time.monotonic() - started < 40
    assert report.unfinished == [("faulty", "n1")]
    assert not store.path_of(HERE).exists()


# --- verify ----------------------------------------------------------------------------------------------------


def test_regret_is_what_was_planted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "device_identity", lambda device: HERE)
    monkeypatch.setattr(table.device_identity, "cache_clear", lambda: None, raising=False)
    monkeypatch.setattr(table, "module_of", lambda kernel: "native")

    def regret(seconds: Callable[[int], float]) -> measured_tuner.Verdict:
        timer = Scripted(seconds, noise=0.02)
        (verdict,) = verify([sound()], CPU, budget_s=60, timer=timer, tunables=tunables, isolate=False).verdicts
        return verdict

    store.add(HERE, {"native": table.current_hash("native")}, "sound", "n1", {"config": [4, 7]})
    table.reset()
    found = regret(lambda i: 1e-3 * (1 + 0.1 * abs(i - 4)))
    assert (found.config, found.origin, found.regret) == (CONFIGS[4], "user", 1.0)
    found = regret(lambda i: 1e-3 * (1 + 0.1 * abs(i - 6)))
    assert found.best == CONFIGS[6]
    assert found.regret == pytest.approx(1.2, rel=0.02)
    # Equals: the luck of the smallest of many medians is no regret.
    assert regret(lambda i: 1e-3).regret < 1.01
    with pytest.raises(BudgetError):
        verify([sound()], CPU, budget_s=0, tunables=tunables, isolate=False)


def test_the_wall_clock() -> None:
    timer = CpuTimer()
    calls = []
    seconds = timer(lambda: (calls.append(1), time.sleep(0.01)))
    assert len(seconds) == CpuTimer.SAMPLES
    assert all(0.01 <= s < 1 for s in seconds)
    quick = timer(lambda: None)
    assert all(0 <= s < 1e-3 for s in quick)


def test_results_that_the_table_no_longer_has_are_measured_again(store: Store) -> None:
    store.add(HERE, {"native": table.current_hash("native")}, "sound", "n1", {"config": [99, 99]})
    report = run(store, Scripted(later_is_faster), [sound(1)])
    assert report.present == []
    assert [result.config for result in report.finished] == [CONFIGS[-1]]


@pytest.mark.parametrize("time_", [math.nan, math.inf, 0.0, -1.0])
def test_a_candidate_without_a_time_is_left_out(store: Store, time_: float) -> None:
    (result,) = run(store, Scripted(lambda i: time_ if i == 3 else later_is_faster(i)), [sound()]).finished
    assert result.config != CONFIGS[3]
    assert [(config, reason[:11]) for config, reason in result.rejected] == [(CONFIGS[3], "has no time")]


def test_a_predicted_order_that_cannot_be_read_is_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for ranked in (5, None, [None], "64xtwo", ["64x2"], {}):
        results = Results("static", {}, {}, {}, {"sound": {"n1": {"config": [1], "ranked": ranked}}})
        source = table.Source("user static", store.folder / "static-sm_80.json", results)
        monkeypatch.setattr(table, "sources", lambda arch, device, source=source: (source,))
        monkeypatch.setattr(table, "is_current", lambda source, kernel: True)
        forget_notices()
        with pytest.warns(UserWarning, match="predicted order of sound n1 is ignored"):
            assert measured_tuner.predicted(tunables()["sound"], "n1", CPU) == []
    monkeypatch.undo()
