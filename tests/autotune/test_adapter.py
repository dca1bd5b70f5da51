"""``tetra_autotune`` on kernels of a user's: in Triton's interpreter, with times of the test's own."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tetra.autotune import table
from tetra.autotune.adapter import CachedKernel, tetra_autotune
from tetra.autotune.store import FOLDER_VARIABLE, Store, read_results

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


def _scaled(x, out, n, factor, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * factor + WRONG, mask=i < n)


def _added(x, total, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(total + i, tl.load(total + i, mask=i < n) + tl.load(x + i, mask=i < n), mask=i < n)


def config(block: int, wrong: int = 0, **options: Any) -> Any:
    return triton.Config({"BLOCK": block, "WRONG": wrong}, **options)


CONFIGS = [config(16), config(32, num_warps=2), config(64), config(128, num_stages=2)]


class ByBlock:
    """A source of times: the nearer a block is to ``best``, the faster."""

    method = "scripted"

    def __init__(self, best: int = 1024) -> None:
        self.best, self.seen = best, list[Any]()

    def prepare(self, device: torch.device) -> None:
        pass

    def __call__(self, run: Callable[[], object]) -> list[float]:
        run()
        row = next(cell.cell_contents for cell in run.__closure__ or () if isinstance(cell.cell_contents, tuple))
        self.seen.append(row)
        return [1e-3 * (1 + abs(row[0] - self.best))]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    table.reset()
    yield
    monkeypatch.undo()
    table.reset()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CachedKernel]:
    """Decorates a function as a file of the user's would, for the interpreter."""

    def decorated(
        function: Any, configs: list[Any] = CONFIGS, key: tuple[str, ...] = ("n",), **options: Any
    ) -> CachedKernel:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        kernel = tetra_autotune(configs, key, **options)(triton.jit(function))
        monkeypatch.delenv("TRITON_INTERPRET")
        return kernel

    return decorated


def launch(kernel: CachedKernel, n: int = 100) -> torch.Tensor:
    x, out = torch.arange(n, dtype=torch.float32), torch.empty(n)
    kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, out, n, 2.0)
    return out


def tune(kernel: CachedKernel, n: int = 100, **options: Any) -> Any:
    x, out = torch.arange(n, dtype=torch.float32), torch.zeros(n)
    return kernel.tune(x, out, n, 2.0, grid=lambda meta: (triton.cdiv(n, meta["BLOCK"]),), **options)


def chosen(kernel: CachedKernel, n: int = 100, dtype: torch.dtype = torch.float32) -> Any:
    return kernel.config_for(torch.empty(n, dtype=dtype), torch.empty(n), n, 2.0)


def test_a_launch_uses_the_first_and_tunes_nothing(make: Callable[..., CachedKernel]) -> None:
    kernel = make(_scaled)
    assert torch.equal(launch(kernel), 2.0 * torch.arange(100))
    assert chosen(kernel) is CONFIGS[0]
    assert not Store().folder.exists()


def test_what_was_tuned_is_used_kept_and_shared(make: Callable[..., CachedKernel]) -> None:
    kernel = make(_scaled)
    assert chosen(kernel) is CONFIGS[0]
    assert tune(kernel, timer=ByBlock(64)) is CONFIGS[2]
    assert chosen(kernel) is CONFIGS[2]
    assert torch.equal(launch(kernel), 2.0 * torch.arange(100))
    # Another process: a new kernel object reads the file.
    again = make(_scaled)
    assert chosen(again) is CONFIGS[2]
    timer = ByBlock(16)
    assert tune(again, timer=timer) is CONFIGS[2]  # it is there
    assert timer.seen == []
    assert tune(again, timer=timer, again=True) is CONFIGS[0]
    (path,) = Store().files()
    ((name, entries),) = read_results(path).results.items()
    assert name.startswith("user:")
    ((key, entry),) = entries.items()
    assert key == "n=128 float32 float32"
    assert dict(zip(entry["fields"], entry["config"], strict=True)) == {
        "BLOCK": 16,
        "WRONG": 0,
        "num_warps": 4,
        "num_stages": 3,
        "num_ctas": 1,
        "maxnreg": None,
    }


def test_problems_are_told_apart_by_bucket_and_dtype(make: Callable[..., CachedKernel]) -> None:
    kernel = make(_scaled)
    tune(kernel, 100, timer=ByBlock(64))
    assert chosen(kernel, 65) is CONFIGS[2]
    assert chosen(kernel, 128) is CONFIGS[2]
    assert chosen(kernel, 64) is CONFIGS[0]
    assert chosen(kernel, 129) is CONFIGS[0]
    assert chosen(kernel, 100, torch.float16) is CONFIGS[0]
    exact = make(_scaled, name="exact", round_up=lambda n: n)
    tune(exact, 100, timer=ByBlock(64))
    assert chosen(exact, 100) is CONFIGS[2]
    assert chosen(exact, 101) is CONFIGS[0]


def test_keys_that_are_equal_and_not_the_same(make: Callable[..., CachedKernel]) -> None:
    """In this process as in the next one, which reads names of keys from a file."""
    kernel = make(_scaled, key=("factor",))
    x, out = torch.empty(100), torch.empty(100)
    kernel.tune(x, out, 100, 1, grid=lambda meta: (triton.cdiv(100, meta["BLOCK"]),), timer=ByBlock(64))
    for one in (kernel, make(_scaled, key=("factor",))):
        assert [one.config_for(x, out, 100, factor) for factor in (1, True, 1.0)] == [
            CONFIGS[2],
            CONFIGS[0],
            CONFIGS[0],
        ]


def test_a_changed_source_or_table_is_a_miss(make: Callable[..., CachedKernel]) -> None:
    kernel = make(_scaled, name="mine")
    tune(kernel, timer=ByBlock(64))
    assert chosen(make(_scaled, name="mine", configs=[CONFIGS[0], CONFIGS[2]])) is CONFIGS[2]
    assert chosen(make(_scaled, name="mine", configs=CONFIGS[:2])) is CONFIGS[0]
    changed = make(_scaled, name="mine")
    changed.source_hash = "another"
    with pytest.warns(UserWarning, match="results of user:mine are ignored: its source has changed"):
        assert chosen(changed) is CONFIGS[0]


def test_bad_configurations_are_left_out(make: Callable[..., CachedKernel]) -> None:
    def refuses(arguments: dict[str, Any]) -> None:
        raise RuntimeError("out of resources: shared memory")

    configs = [config(16), config(32, wrong=1), config(64, pre_hook=refuses), config(128)]
    kernel = make(_scaled, configs=configs)
    assert tune(kernel, timer=ByBlock(40)) is configs[0]
    (path,) = Store().files()
    ((entries),) = read_results(path).results.values()
    rejected = {row["config"][0]: row["reason"] for row in entries["n=128 float32 float32"]["rejected"]}
    assert rejected.keys() == {32, 64}
    assert rejected[32].startswith("wrong values: output 1 differs in 50 of 100 values, by up to 1")
    assert rejected[64] == "raised RuntimeError: out of resources: shared memory"
    unchecked = make(_scaled, configs=configs[:2], name="unchecked")
    assert tune(unchecked, timer=ByBlock(32), check=False) is configs[1]
    broken = make(_scaled, configs=[configs[2]], name="broken")
    with pytest.raises(RuntimeError, match="user:broken: no configuration works: the first raised RuntimeError"):
        tune(broken)


@pytest.mark.parametrize("check", [True, False])
def test_values_are_restored_or_zeroed_while_tuning(make: Callable[..., CachedKernel], check: bool) -> None:
    configs = [triton.Config({"BLOCK": block}) for block in (16, 32)]
    x = torch.ones(50)
    kernel = make(_added, configs=configs, restore_value=["total"], name="restored")
    total = torch.full((50,), 7.0)
    kernel.tune(x, total, 50, grid=grid_of(50), timer=ByBlock(32), check=check)
    assert torch.equal(total, torch.full((50,), 7.0))
    kernel[grid_of(50)](x, total, 50)
    assert torch.equal(total, torch.full((50,), 8.0))
    kernel = make(_added, configs=configs, reset_to_zero=["total"], name="zeroed")
    kernel.tune(x, total, 50, grid=grid_of(50), timer=ByBlock(32), check=check)
    assert torch.equal(total, torch.zeros(50))
    kernel[grid_of(50)](x, total, 50)
    assert torch.equal(total, x)


def grid_of(n: int) -> Callable[[dict[str, Any]], tuple[int]]:
    return lambda meta: (triton.cdiv(n, meta["BLOCK"]),)


def test_hooks(make: Callable[..., CachedKernel]) -> None:
    calls: list[str] = []

    def before(arguments: dict[str, Any]) -> None:
        arguments["total"].zero_()
        calls.append(f"before {arguments['BLOCK']}")

    def after(arguments: dict[str, Any], exception: Exception | None) -> None:
        calls.append(f"after {arguments['BLOCK']} {exception}")

    configs = [triton.Config({"BLOCK": 16}, pre_hook=lambda arguments: calls.append(f"own {arguments['BLOCK']}"))]
    kernel = make(_added, configs=configs, pre_hook=before, post_hook=after)
    total = torch.ones(50)
    kernel.tune(torch.ones(50), total, 50, grid=grid_of(50), timer=ByBlock())
    assert calls[-3:] == ["own 16", "before 16", "after 16 None"]
    calls.clear()
    kernel[grid_of(50)](torch.ones(50), total, 50)
    assert calls == ["own 16"]


def test_pruning(make: Callable[..., CachedKernel]) -> None:
    def fitting(configs: list[Any], named: dict[str, Any], **meta: Any) -> list[Any]:
        return [c for c in configs if c.kwargs["BLOCK"] >= min(named["n"], 64)]

    def model(BLOCK: int, **arguments: Any) -> float:
        return -BLOCK

    kernel = make(_scaled, prune_configs_by={"early_config_prune": fitting, "perf_model": model, "top_k": 1})
    assert chosen(kernel) is CONFIGS[2]  # the first that may run
    timer = ByBlock(64)
    assert tune(kernel, timer=timer) is CONFIGS[3]
    assert {row[0] for row in timer.seen} == {128}
    assert chosen(kernel, 10) is CONFIGS[0]
    nothing = make(_scaled, prune_configs_by={"early_config_prune": lambda configs, named, **meta: []}, name="nothing")
    with pytest.raises(ValueError, match="early_config_prune of user:nothing: left no configuration"):
        launch(nothing)


def test_bad_arguments(make: Callable[..., CachedKernel]) -> None:
    with pytest.raises(ValueError, match="configs of user:x: is empty"):
        make(_scaled, configs=[], name="x")
    with pytest.raises(ValueError, match="key of user:x: 'm' is none of its arguments x, out, n"):
        make(_scaled, key=("m",), name="x")
    with pytest.raises(ValueError, match="BLOCK is \\[1\\]; wanted a number"):
        make(_scaled, configs=[triton.Config({"BLOCK": [1]})], name="x")
    kernel = make(_scaled, name="x")
    with pytest.raises(ValueError, match="budget_s: is 0 seconds"):
        tune(kernel, budget_s=0)
    with pytest.raises(ValueError, match="BLOCK is set by configurations and by the call"):
        tune(kernel, BLOCK=16)
    with pytest.raises(ValueError, match="no argument is a tensor"):
        kernel.tune(1, 2, 3, 4.0, grid=(1,))
    with pytest.raises(RuntimeError, match="the budget of 1e-09 s did not suffice"):
        tune(kernel, budget_s=1e-9)
    assert not Store().files()


_KERNEL_FILE = """
import sys, torch, triton, triton.language as tl
from tetra.autotune.adapter import tetra_autotune

@tetra_autotune(
    configs=[triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((16, 4), (64, 2))],
    key=["n"],
    name="doubled",
)
@triton.jit
def doubled(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)

class Timer:
    method = "scripted"
    def prepare(self, device): pass
    def __call__(self, run):
        row = next(c.cell_contents for c in run.__closure__ if isinstance(c.cell_contents, tuple))
        return [1.0 / row[0]]

x, out = torch.ones(60), torch.zeros(60)
grid = lambda meta: (triton.cdiv(60, meta["BLOCK"]),)
if sys.argv[1:] == ["tune"]:
    doubled.tune(x, out, 60, grid=grid, timer=Timer())
doubled[grid](x, out, 60)
assert bool((out == 2).all())
print(doubled.config_for(x, out, 60).kwargs["BLOCK"])
"""


def test_processes_share_what_was_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text(_KERNEL_FILE)
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def run(*arguments: str) -> str:
        done = subprocess.run([sys.executable, str(file), *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("tune") == "64\n"
    assert run() == "64\n"


def test_parameters_expanded_tensors_and_those_of_inference_mode(make: Callable[..., CachedKernel]) -> None:
    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(100, meta["BLOCK"]),)

    with torch.inference_mode():
        inferred = torch.ones(100)
    for i, x in enumerate((torch.nn.Parameter(torch.ones(100)), torch.ones(100).expand(2, 100), inferred)):
        out = torch.full((100,), 3.0)
        kernel = make(_scaled, name=f"kind-{i}", restore_value=["x"], reset_to_zero=["out"])
        assert kernel.tune(x, out, 100, 2.0, grid=grid, timer=ByBlock(64)) is CONFIGS[2]
        assert bool((x.detach() == 1).all())
        assert torch.equal(out, torch.zeros(100))


def test_the_order_of_named_arguments_does_not_count(make: Callable[..., CachedKernel]) -> None:
    kernel = make(_scaled)
    x, out = torch.zeros(100), torch.zeros(100, dtype=torch.float64)
    assert kernel.tune(x, out, 100, 2.0, grid=(7,), timer=ByBlock(64)) is CONFIGS[2]
    assert kernel.config_for(factor=2.0, n=100, out=out, x=x) is CONFIGS[2]
    assert make(_scaled).config_for(factor=2.0, n=np.int64(100), out=out, x=x) is CONFIGS[2]


def test_tensors_in_the_key_are_not_kept(make: Callable[..., CachedKernel]) -> None:
    kernel = make(_scaled, key=("x", "n"))
    x = torch.zeros(100)
    gone = weakref.ref(x)
    kernel.config_for(x, x, 100, 2.0)
    del x
    assert gone() is None


def test_pruning_may_make_configurations(make: Callable[..., CachedKernel]) -> None:
    def prune(configs: list[Any], named: dict[str, Any], **rest: Any) -> list[Any]:
        return [config(8), config(256)]

    by = {"early_config_prune": prune}
    assert tune(make(_scaled, prune_configs_by=by, name="new"), timer=ByBlock(256)).kwargs["BLOCK"] == 256
    assert chosen(make(_scaled, prune_configs_by=by, name="new")).kwargs["BLOCK"] == 256
