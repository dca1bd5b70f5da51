"""Memory over a training step, against figures that are counted another way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import Runner, assert_refused, read_json
from torch import Tensor, nn

from tetra.profiling.memory_timeline import CATEGORIES, PHASES, Timeline, draw_html, draw_png, record, timeline_of
from tetra.saved_tensors import count_saved, total_bytes

CPU = torch.device("cpu")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))


def step(model: nn.Module, x: Tensor, device: torch.device = CPU) -> Timeline:
    optimizer = torch.optim.AdamW(model.parameters())
    return record(lambda: model(x).square().sum(), model, optimizer, device, [x])


def n_bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def check(found: Timeline) -> None:
    assert [name for name, _, _ in found.phases] == list(PHASES)
    assert list(found.n_bytes) == list(CATEGORIES)
    together = [sum(values) for values in zip(*found.n_bytes.values(), strict=True)]
    assert len(together) == len(found.times_ms)
    assert min(min(values) for values in found.n_bytes.values()) >= 0
    assert found.peak_bytes == max(together)
    assert found.times_ms == sorted(found.times_ms)
    assert sum(holder.n_bytes for holder in found.holders) == found.peak_bytes


def test_every_category_of_a_plain_network_is_what_it_should_be() -> None:
    model, x = mlp(), torch.randn(32, 64)
    found = step(model, x)
    check(found)
    weights = n_bytes(list(model.parameters()))
    optimizer = 2 * weights + 4 * len(list(model.parameters()))  # two moments, and a number of steps
    kept = 4 * (32 * 256 + 32 * 256 + 32 * 10)  # before and after the GELU, and what is squared
    before = {"weights": weights, "optimizer": optimizer, "inputs": n_bytes([x])}
    assert found.at_end_of("forward") | {"temporary": 0} == {**before, "kept": kept, "gradients": 0, "temporary": 0}
    assert found.at_end_of("backward")["gradients"] == weights
    assert found.at_end_of("backward")["kept"] == 0
    assert found.at_end_of("step") == {**before, "kept": 0, "gradients": 0, "temporary": 0}


def test_what_is_kept_is_what_the_hooks_of_saved_tensors_count() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(4, 3, 16, 16)
    model(x)
    found = step(model, x)
    check(found)
    with count_saved(model, [x]) as saved:
        loss = model(x).square().sum()
        expected = total_bytes(saved())
    del loss
    assert found.at_end_of("forward")["kept"] == expected


def test_a_module_in_the_network_holds_what_was_made_in_it() -> None:
    found = step(mlp(), torch.randn(4096, 64))
    places = {(holder.where, holder.category): holder for holder in found.holders}
    assert places["0", "kept"].n_bytes == places["1", "kept"].n_bytes == 4 * 4096 * 256
    assert places["0", "kept"].operation == "linear"
    assert places["1", "kept"].operation == "gelu"
    assert found.peak_phase in PHASES


def test_a_target_that_exists_anyway_is_an_input() -> None:
    model, x, target = mlp(), torch.randn(8, 64), torch.randn(8, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    found = record(lambda: (model(x) - target).mul(target).sum(), model, optimizer, CPU, [x])
    assert found.at_end_of("forward")["inputs"] == n_bytes([x, target])


def test_nothing_is_left_behind() -> None:
    model = mlp()
    step(model, torch.randn(8, 64))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_trace_without_memory_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no memory events"):
        timeline_of([], {}, CPU)
    with pytest.raises(RuntimeError, match="no memory events"):
        timeline_of([{"ph": "X", "name": "tetra memory: phase forward", "ts": 1, "dur": 1}], {}, CPU)


def test_allocations_by_hand() -> None:
    """An address that is used twice, one that is freed unseen, one that lives on."""

    def memory(ts: float, address: int, change: int) -> dict[str, object]:
        return {"ph": "i", "name": "[memory]", "ts": ts, "args": {"Addr": address, "Bytes": change, "Device Type": 0}}

    def span(name: str, ts: float, dur: float) -> dict[str, object]:
        return {"ph": "X", "cat": "user_annotation", "name": f"tetra memory: {name}", "ts": ts, "dur": dur}

    events = [
        span("phase forward", 0, 10_000), span("phase backward", 10_000, 10_000), span("phase step", 20_000, 1_000),
        memory(1_000, 1, 100), span("kept 1 100", 2_000, 1), memory(11_000, 1, -100),
        memory(12_000, 1, 70), span("gradient 1 70", 13_000, 1), memory(20_500, 1, -70),
        memory(3_000, 2, -999), memory(4_000, 3, 5),
    ]  # fmt: skip
    # A trace of a GPU holds every span again, where the work that it launched ran.
    events += [{**e, "cat": "gpu_user_annotation", "ts": float(str(e["ts"])) + 500} for e in events if e["ph"] == "X"]
    found = timeline_of(events, {"weights": {9: 1000}}, CPU)
    check(found)
    assert found.peak_bytes == 1000 + 100 + 5
    assert (found.peak_ms, found.peak_phase) == (4.0, "forward")
    assert found.at_end_of("forward")["kept"] == 100
    assert found.at_end_of("backward") == {
        "weights": 1000, "optimizer": 0, "inputs": 0, "kept": 0, "gradients": 70, "temporary": 5,
    }  # fmt: skip


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = step(mlp(), torch.randn(8, 64))
    with open(tmp_path / "x.png", "wb") as file:
        draw_png(found, "title", file)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "peak_bytes" in draw_html(found, "title")


def test_the_command(tetra: Runner, tmp_path: Path) -> None:
    files = {name: tmp_path / f"x.{name}" for name in ("png", "html", "json")}
    options = [part for name, path in files.items() for part in (f"--{name}", path)]
    result = tetra("profile", "memory", "--batch", "2", "--image-size", "32", "--device", "cpu", *options)
    assert result.status == 0, result.err
    for word in ("peak", "kept", "gradients", "optimizer", "MiB", "backward"):
        assert word in result.out
    found = read_json(files["json"])
    assert found["peak_bytes"] > sum(values[0] for values in found["n_bytes"].values())
    assert (found["arch"], found["stage"], found["batch"]) == ("nano", "distill", 2)
    assert all(path.stat().st_size for path in files.values())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--arch", "nonsense"], ["nonsense", "nano"]),
        (["--stage", "nonsense"], ["nonsense", "distill"]),
        (["--stage", "finetune", "--batch", "2"], ["batch is 2", "4"]),
        (["--recompute", "nonsense"], ["nonsense", "blocks"]),
        (["--png", "/nowhere/x.png"], ["/nowhere"]),
        (["--device", "nonsense"], ["nonsense"]),
    ],
)
def test_bad_input(tetra: Runner, args: list[str], words: list[str]) -> None:
    assert_refused(tetra("profile", "memory", *args), *words)


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_the_allocators() -> None:
    device = torch.device("cuda")
    model, x = mlp().to(device), torch.randn(4096, 64, device=device)
    before = torch.cuda.memory_allocated(device) - n_bytes([*model.parameters(), x])
    torch.cuda.reset_peak_memory_stats(device)
    found = step(model, x, device)
    check(found)
    assert found.peak_bytes == pytest.approx(torch.cuda.max_memory_allocated(device) - before, rel=0.2)
