"""The C++ kernels' block sizes and threads: tuned for real, and what was tuned is what runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tetra.autotune import measured_tuner, table
from tetra.autotune.cpu_workloads import cpu_problems
from tetra.autotune.store import FOLDER_VARIABLE, Store, device_identity
from tetra.autotune.workloads import Problem
from tetra.config import BACKBONES
from tetra.kernels import hamming_search, native, quantize_rows, ternary_matmul_int32
from tetra.kernels.native_tunables import ROW_OPERATIONS
from tetra.kernels.tunable import all_tunables

CPU = torch.device("cpu")
PROBLEMS = [
    Problem("native_rows", {"operation": "norm_quantize", "m": 197, "k": 256, "dtype": "bfloat16"}),
    Problem("native_hamming", {"queries": 3, "rows": 3000, "n_bytes": 32}),
    Problem("native_ternary", {"m": 64, "n": 256, "k": 256}),
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not native.available():
        pytest.skip("the C++ kernels can't be built here")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    table.reset()
    yield
    monkeypatch.undo()
    table.reset()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_measured_choices_are_kept_and_used() -> None:
    report = measured_tuner.measure(PROBLEMS, "cpu", budget_s=120, isolate=False)
    assert [(result.kernel, result.rejected) for result in report.finished] == [
        ("native_rows", ()),
        ("native_hamming", ()),
        ("native_ternary", ()),
    ]
    for problem, result in zip(PROBLEMS, report.finished, strict=True):
        tunable = all_tunables()[problem.tunable]
        assert result.seconds <= result.default_seconds  # type: ignore[operator]
        assert result.n_candidates == len(tunable.space(0, problem.sizes))
        choice = measured_tuner.chosen(tunable, problem.sizes, CPU)
        assert (choice.config, choice.origin) == (result.config, "user")
    found = measured_tuner.verify(PROBLEMS, "cpu", budget_s=120, isolate=False)
    assert [verdict.origin for verdict in found.verdicts] == ["user"] * 3
    assert all(verdict.regret >= 1 for verdict in found.verdicts)


def keep(kernel: str, key: str, config: tuple[int, ...]) -> None:
    entry = {"config": list(config)}
    Store().add(device_identity(CPU), {"native": table.current_hash("native")}, kernel, key, entry)
    table.reset()


def test_a_launch_runs_with_what_is_kept(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is told the kept numbers, and the first row's for other problems."""
    library = native._loaded()
    assert library is not None
    told: dict[str, list[Any]] = {}

    class Spy:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                told[name] = list(arguments)
                return getattr(library, name)(*arguments)

            return call

    x = torch.randn(100, 512)
    codes = torch.randint(0, 256, (5000, 32), dtype=torch.uint8)
    x_q = torch.randint(-127, 128, (10, 128), dtype=torch.int8)
    packed = torch.zeros(64, 32, dtype=torch.uint8)
    expected = (quantize_rows(x), hamming_search(codes[:9], codes, 3), ternary_matmul_int32(x_q, packed))
    keep("native_rows", native.rows_key("quantize_rows", 100, 512, torch.float32, 2), (1 << 16, 32))
    keep("native_hamming", native.hamming_key(9, 5000, 32, 2), (1 << 15, 1 << 24))
    keep("native_ternary", native.ternary_key(10, 64, 128, 2), (96 << 10,))
    monkeypatch.setattr(native, "_loaded", lambda: Spy())
    found = (quantize_rows(x), hamming_search(codes[:9], codes, 3), ternary_matmul_int32(x_q, packed))
    assert told["tetra_rows"][-2:] == [32, 1]
    assert told["tetra_hamming_nearest"][-2:] == [1 << 15, 1]
    assert told["tetra_ternary_linear"][-2:] == [96 << 10, 2]
    for mine, theirs in zip(found, expected, strict=True):
        pairs = zip(mine, theirs, strict=True) if isinstance(mine, tuple) else [(mine, theirs)]
        assert all(torch.equal(a, b) for a, b in pairs)
    quantize_rows(torch.randn(100, 256))
    assert told["tetra_rows"][-2:] == [8, 2]
    quantize_rows(torch.randn(1, 256))
    assert told["tetra_rows"][-2:] == [8, 1]


def test_every_problem_of_the_models_has_a_trial_that_is_right() -> None:
    problems = cpu_problems({"nano": BACKBONES["nano"]}, batches=(1,))
    assert {problem.tunable for problem in problems} == {"native_rows", "native_hamming", "native_ternary"}
    kinds = {}
    for problem in problems:
        tunable = all_tunables()[problem.tunable]
        assert tunable.key(problem.sizes)
        if problem.sizes.get("rows", 0) * problem.sizes.get("queries", 0) <= 1_000_000:
            kinds[problem.tunable, problem.sizes.get("operation"), problem.sizes.get("dtype")] = problem
    assert len(kinds) == 2 * len(ROW_OPERATIONS) + 2
    for problem in kinds.values():
        tunable = all_tunables()[problem.tunable]
        trial = tunable.trial(problem.sizes, CPU)
        expected: tuple[Tensor, ...] = trial.expected()
        assert trial.difference(trial.run(tunable.default(0, 1, problem.sizes)), expected) is None
