"""What both stages share: averaged weights, validation once an epoch, what is logged, options of the backbone."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tetra.errors import ConfigError, TrainingError
from tetra.model import TetraModel
from tetra.training.data import ViewDataset
from tetra.training.distill import DistillConfig, distill
from tetra.training.loop import CHECKPOINT, Averages, LoopConfig, StageModule, read_log, step_seed
from tetra.training.schedules import warmup_cosine
from tetra.training.teachers import TetraTeacher

Make = Callable[..., TetraModel]


@pytest.fixture
def teacher(tetra_teacher_file: Path) -> TetraTeacher:
    return TetraTeacher(str(tetra_teacher_file))


def settings(pictures: Path, max_steps: int = 6, **loop: Any) -> DistillConfig:
    loop = {"checkpoint_every": 2, "log_every": 1, "precision": "32-true", "threads": 1} | loop
    return DistillConfig(
        (str(pictures),), batch_size=5, max_steps=max_steps, attention_layers=1, lr=3e-3, loop=LoopConfig(**loop)
    )


def weights_after_every_step(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Fills while a stage runs; the first are the weights before it."""
    seen: list[dict[str, Tensor]] = []
    step = StageModule.optimizer_step

    def keep(self: StageModule, *args: Any, **kwargs: Any) -> None:
        if not seen:
            seen.append({n: p.detach().cpu().clone() for n, p in self.named_parameters() if p.requires_grad})
        step(self, *args, **kwargs)
        seen.append({n: p.detach().cpu().clone() for n, p in self.named_parameters() if p.requires_grad})

    monkeypatch.setattr(StageModule, "optimizer_step", keep)
    return seen


def test_averaged_weights_are_the_result(
    teacher: TetraTeacher, pictures: Path, make_student: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = weights_after_every_step(monkeypatch)
    model = make_student()
    validated: list[Tensor] = []

    def validate() -> dict[str, float]:
        validated.append(model.backbone.cls_token.detach().cpu().clone())
        return {"recall_binary": 1.0}

    config = settings(pictures, ema=0.7, validate_every=3)
    distill(model, teacher, config, tmp_path, validate=validate, progress=False)
    wanted = {name: tensor.double() for name, tensor in seen[0].items()}
    averages = []
    for step, weights in enumerate(seen[1:], start=1):
        decay = min(0.7, (1 + step) / (10 + step))
        wanted = {name: decay * wanted[name] + (1 - decay) * weights[name].double() for name in wanted}
        averages.append(wanted)
    assert len(averages) == 6
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.double(), averages[-1][f"model.{name}"], rtol=1e-5, atol=1e-6)
            assert not torch.equal(parameter, seen[-1][f"model.{name}"])
    for found, step in zip(validated, (3, 6), strict=True):
        torch.testing.assert_close(found.double(), averages[step - 1]["model.backbone.cls_token"])


def test_averages_leave_the_training_alone_and_survive_a_resumption(
    teacher: TetraTeacher, pictures: Path, make_student: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for ema in (0.0, 0.9):
        with pytest.MonkeyPatch.context() as patch:
            runs.append(weights_after_every_step(patch))
            model = make_student()
            distill(model, teacher, settings(pictures, ema=ema), tmp_path / str(ema), progress=False)
    for plain, averaged in zip(*runs, strict=True):
        assert all(torch.equal(plain[name], averaged[name]) for name in plain)
    # Stop after four of six steps; a stage that is complete gives its averages again, too.
    save = StageModule.on_save_checkpoint

    def stop(self: StageModule, checkpoint: dict[str, Any]) -> None:
        save(self, checkpoint)
        if self.global_step == 6:
            raise InterruptedError

    monkeypatch.setattr(StageModule, "on_save_checkpoint", stop)
    out = tmp_path / "resumed"
    with pytest.raises(InterruptedError):
        distill(make_student(), teacher, settings(pictures, ema=0.9), out, progress=False)
    monkeypatch.undo()
    for _ in range(2):
        resumed = make_student()
        distill(resumed, teacher, settings(pictures, ema=0.9), out, resume=True, progress=False)
        for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_first_steps_weigh_little() -> None:
    layer = torch.nn.Linear(2, 1)
    averages = Averages(layer, 0.999)
    with torch.no_grad():
        layer.weight += 100.0
    averages.update(1)
    assert float((averages.values["weight"] - layer.weight).abs().max()) < 100 * 2 / 11 + 1e-3
    averages.exchange()
    averages.exchange()
    assert averages.values.keys() == {"weight", "bias"}


@pytest.mark.parametrize(("ema", "text"), [(1.0, "1.0"), (-0.1, "-0.1"), (1.5, "1.5")])
def test_decays_that_cannot_be(ema: float, text: str) -> None:
    with pytest.raises(ConfigError, match=f"'ema' is {text}"):
        LoopConfig(ema=ema)


def test_validation_comes_once_an_epoch(
    teacher: TetraTeacher, pictures: Path, make_student: Make, tmp_path: Path
) -> None:
    """24 views in steps of 10: the passes end in steps 3, 5, 8 and 10."""
    config = settings(pictures, max_steps=11, accumulate=2)
    distill(make_student(), teacher, config, tmp_path, validate=lambda: {"recall_binary": 50.0}, progress=False)
    steps = [row["step"] for row in read_log(tmp_path) if "recall_binary" in row]
    assert steps == [3, 5, 8, 10, 11]  # the last one comes at the end


def test_what_is_logged(teacher: TetraTeacher, pictures: Path, make_student: Make, tmp_path: Path) -> None:
    config = settings(pictures, clip=0.1)
    distill(make_student(), teacher, config, tmp_path, progress=False)
    rows = [row for row in read_log(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(6))
    for row in rows:
        assert row["lr"] == pytest.approx(3e-3 * warmup_cosine(int(row["step"]), 6, 0.05))
        assert row["grad_norm"] > 0.1  # before it was clipped
        assert 0.1 < row["zero_weights"] < 0.6


@pytest.mark.parametrize("recompute", ["attention", "blocks"])
def test_recomputing_changes_nothing(
    recompute: str, teacher: TetraTeacher, pictures: Path, make_student: Make, tmp_path: Path
) -> None:
    results = []
    for option in ("nothing", recompute):
        model = make_student(dropout=0.1)
        config = settings(pictures, max_steps=3, recompute=option)
        distill(model, teacher, config, tmp_path / option, progress=False)
        assert model.backbone.recompute == "nothing"  # an option of the training, not of the model
        results.append(model.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_blocks_train_as_others_do(
    teacher: TetraTeacher, pictures: Path, make_student: Make, tmp_path: Path
) -> None:
    """Composed of the same plain modules; lambda, which moves every step, is no reason to compile again.

    The second time as in a run that is resumed, with what the compiler has left on disk.
    """
    results = []
    for name, compiled in (("plain", False), ("compiled", True), ("again", True)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = make_student(dropout=0.0)
        config = settings(pictures, max_steps=8, compile=compiled)
        with pytest.MonkeyPatch.context() as patch:
            if not compiled:
                patch.setenv("TETRA_BACKEND", "torch")
            distill(model, teacher, config, tmp_path / name, progress=False)
        assert all(block._compiled_call_impl is None for block in model.backbone.blocks)
        results.append([row["loss"] for row in read_log(tmp_path / name) if "loss" in row])
    assert results[1] == pytest.approx(results[0], rel=2e-3)
    assert results[2] == pytest.approx(results[0], rel=2e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
    assert not torch._dynamo.utils.counters["recompile_limit"]


def test_seeds_of_processes_differ() -> None:
    seeds = {step_seed(1, step, rank) for step in range(50) for rank in range(4)}
    assert len(seeds) == 200
    assert step_seed(1, 7, 0) == step_seed(1, 7)


def test_a_checkpoint_says_how_many_wrote_it(
    teacher: TetraTeacher, pictures: Path, make_student: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tetra.training.checkpoint import load_checkpoint, save_checkpoint

    model = make_student()
    distill(model, teacher, settings(pictures), tmp_path, progress=False)
    saved = load_checkpoint(tmp_path / CHECKPOINT)
    assert saved["world_size"] == 1
    save_checkpoint({**saved, "world_size": 3}, tmp_path / CHECKPOINT)
    distill(make_student(), teacher, settings(pictures), tmp_path, resume=True, progress=False)
    assert "written by 3 processes and goes on with 1" in caplog.text


def test_averages_begin_with_the_weights_of_a_checkpoint_that_has_none(
    teacher: TetraTeacher, pictures: Path, make_student: Make, tmp_path: Path
) -> None:
    distill(make_student(), teacher, settings(pictures), tmp_path, progress=False)
    plain, averaged = make_student(), make_student()
    distill(plain, teacher, settings(pictures), tmp_path, resume=True, progress=False)
    distill(averaged, teacher, settings(pictures, ema=0.9), tmp_path, resume=True, progress=False)
    for a, b in zip(plain.parameters(), averaged.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_log_cut_short_loses_one_row(
    teacher: TetraTeacher, pictures: Path, make_student: Make, tmp_path: Path
) -> None:
    """As a kill while it was written would leave it."""
    distill(make_student(), teacher, settings(pictures), tmp_path, progress=False)
    rows, file = read_log(tmp_path), tmp_path / "csv/part0/metrics.csv"
    text = file.read_text()
    last = len(text.rstrip("\n").splitlines()[-1])
    for n in range(1, last + 1):
        file.write_text(text[:-n])
        assert read_log(tmp_path) == rows[:-1]


def test_the_last_validation_is_in_the_log_even_if_the_process_died_in_it(
    teacher: TetraTeacher, pictures: Path, make_student: Make, tmp_path: Path
) -> None:
    """Earlier ones are written no later than the checkpoint behind them. What a killed process left is removed."""

    def die() -> dict[str, float]:
        if die_at.pop(0):
            raise InterruptedError
        return {"recall_binary": 50.0}

    config = settings(pictures, max_steps=6, validate_every=3, checkpoint_every=2, log_every=50)
    die_at = [False, True]
    with pytest.raises(InterruptedError):
        distill(make_student(), teacher, config, tmp_path, validate=die, progress=False)
    (tmp_path / f".{CHECKPOINT}.17.tmp").write_text("half")
    for _ in range(2):
        die_at.append(False)
        distill(make_student(), teacher, config, tmp_path, validate=die, resume=True, progress=False)
        assert [row["step"] for row in read_log(tmp_path) if "recall_binary" in row] == [3, 6]
    assert len(list(tmp_path.glob("csv/part*"))) == 2  # of the first run and of the row that it lacked
    assert not list(tmp_path.glob(".*"))


def test_a_lost_loader_process_is_no_traceback(
    teacher: TetraTeacher, pictures: Path, make_student: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out and the system kills one."""
    item = ViewDataset.__getitem__

    def die(self: ViewDataset, key: int) -> dict[str, Any]:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, key)

    monkeypatch.setattr(ViewDataset, "__getitem__", die)
    with pytest.raises(TrainingError, match=r"a process that loads images was killed.*'workers'.*--resume"):
        distill(make_student(), teacher, settings(pictures, workers=1), tmp_path, progress=False)
