"""A training killed in mid-run and resumed ends with the weights of an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tetra.model import TetraModel
from tetra.training.checkpoint import load_checkpoint
from tetra.training.distill import DistillConfig, distill
from tetra.training.loop import CHECKPOINT, LoopConfig, read_log
from tetra.training.recipe import run_recipe
from tetra.training.teachers import TeacherOutput, TetraTeacher

N_STEPS = 60

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL is a POSIX signal")


@pytest.fixture
def recipe(make_recipe: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return make_recipe(
        {"accumulate": 2, "checkpoint_every": 3},
        backbone={"embedding_dropout": 0.1},
        distill={
            "views": 2,
            "max_steps": N_STEPS,
            "batch_size": 5,
            "lr": 2e-3,
            "sizes": [[0.0, 16], [0.5, 32]],
            "attention_weight": 0.0,
            "loop": {"validate_every": 7, "clip": 1.0},
        },
        finetune={"places_per_batch": 3, "max_steps": N_STEPS, "lr": 1e-3, "initialize_head": 8},
        probe={"folders": ["two"], "max_frames": 6},
    )


def stop_behind_a_checkpoint(
    recipe: dict[str, Any], out: Path, checkpoint: Path, by: signal.Signals = signal.SIGKILL, status: int = -9
) -> int:
    """Run the recipe in a process of its own, signal it once ``checkpoint`` lies there; the checkpoint's step."""
    file = out.with_name("recipe.yaml")
    file.write_text(json.dumps(recipe))  # JSON is YAML
    command = [sys.executable, "-m", "tetra.cli", "train", "run", str(file), "--out", str(out), "--resume"]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 300
        while not checkpoint.exists():
            assert process.stderr is not None
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline, "no checkpoint within five minutes"
            time.sleep(0.002)
        process.send_signal(by)
        _, err = process.communicate(timeout=300)
        assert process.returncode == status, err.decode()
    return int(load_checkpoint(checkpoint)["global_step"])


def test_killed_and_resumed_in_both_stages(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for stage in ("distill", "finetune"):
        step = stop_behind_a_checkpoint(recipe, killed, killed / stage / CHECKPOINT)
        assert 0 < step < N_STEPS
        assert not (killed / "model.safetensors").exists()
    assert not (killed / "finetune" / "csv" / "part1").exists()
    # The last resumption and the uninterrupted run, here.
    run_recipe(recipe, killed, resume=True, progress=False)
    torch.manual_seed(1234)
    run_recipe(recipe, whole, progress=False)

    for name in ("trained.safetensors", "model.safetensors"):
        expected, found = load_file(whole / name), load_file(killed / name)
        assert expected.keys() == found.keys()
        for key in expected:
            assert torch.equal(expected[key], found[key]), f"{name}: {key}"
    for stage in ("distill", "finetune"):
        expected_log, found_log = read_log(whole / stage), read_log(killed / stage)
        assert [row["step"] for row in found_log] == [row["step"] for row in expected_log]
        for a, b in zip(expected_log, found_log, strict=True):
            assert a.get("loss") == b.get("loss")
            assert a.get("recall_binary") == b.get("recall_binary")


@pytest.mark.parametrize(("by", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(recipe: dict[str, Any], tmp_path: Path, by: signal.Signals, status: int) -> None:
    """Nobody may take a run that was stopped for one that has finished."""
    if signal.getsignal(by) == signal.SIG_IGN:
        pytest.skip(f"{by.name} is ignored where the tests run, and so in what they start")
    recipe["distill"]["max_steps"] = 100_000
    out = tmp_path / "run"
    stop_behind_a_checkpoint(recipe, out, out / "distill" / CHECKPOINT, by, status)
    assert sorted(path.name for path in out.iterdir()) == ["distill", "recipe.json"]


class Stop(Exception):
    """Ends a training at a chosen moment."""


class StoppingTeacher(TetraTeacher):
    """Teaches a number of batches."""

    n_batches = 1 << 30

    def forward(self, images: Tensor, n_attention: int = 0) -> TeacherOutput:
        if self.n_batches == 0:
            raise Stop
        self.n_batches -= 1
        return super().forward(images, n_attention)


@pytest.mark.parametrize("stop", [3, 6, 11])
def test_stopped_before_any_batch(
    stop: int, pictures: Path, tetra_teacher_file: Path, make_student: Callable[..., TetraModel], tmp_path: Path
) -> None:
    """Also between the two batches that one step accumulates."""
    loop = LoopConfig(accumulate=2, checkpoint_every=1, threads=1)
    config = DistillConfig((str(pictures),), max_steps=6, batch_size=5, attention_layers=2, loop=loop)
    teacher = StoppingTeacher(str(tetra_teacher_file))
    expected = make_student()
    distill(expected, teacher, config, tmp_path / "whole", progress=False)
    teacher.n_batches = stop
    with pytest.raises(Stop):
        distill(make_student(), teacher, config, tmp_path / "run", progress=False)
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["global_step"] == stop // 2
    teacher.n_batches = 12 - stop // 2 * 2  # what is left, and no more
    model = make_student()
    distill(model, teacher, config, tmp_path / "run", resume=True, progress=False)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_stopped_with_a_cached_teacher(
    pictures: Path, tetra_teacher_file: Path, make_student: Callable[..., TetraModel], tmp_path: Path
) -> None:
    loop = LoopConfig(accumulate=1, checkpoint_every=2, validate_every=3, threads=1)
    config = DistillConfig(
        (str(pictures),), views=2, max_steps=6, batch_size=5, cache_teacher=True, attention_weight=0.0, loop=loop
    )
    teacher = StoppingTeacher(str(tetra_teacher_file))
    expected = make_student()
    distill(expected, teacher, config, tmp_path / "whole", progress=False)

    def stop() -> dict[str, float]:
        raise Stop

    with pytest.raises(Stop):
        distill(make_student(), teacher, config, tmp_path / "run", validate=stop, progress=False)
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["global_step"] == 2
    teacher.n_batches = 0  # all its outputs are on disk
    model = make_student()
    distill(model, teacher, config, tmp_path / "run", resume=True, progress=False)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
