"""Training in several processes, with gloo on this machine: the gradients of one, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tetra.errors import TrainingError
from tetra.files import load, load_trainable
from tetra.training.checkpoint import load_checkpoint
from tetra.training.distributed import processes
from tetra.training.loop import CHECKPOINT, read_log
from tetra.training.probe import Probe, ProbeConfig, head_probe

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL is a POSIX signal")

TIMEOUT_S = 300


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(n: int, arguments: Sequence[str]) -> list[subprocess.Popen[str]]:
    """``n`` processes as ``torchrun`` would start them, but with nobody who looks after them."""
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # this machine may have one GPU only
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Status, output and errors of each."""
    try:
        return [(out_err := p.communicate(timeout=TIMEOUT_S)) and (p.returncode, *out_err) for p in processes]
    finally:
        for process in processes:
            process.kill()


def train(recipe: Path, out: Path) -> list[str]:
    return ["-m", "tetra.cli", "train", "run", str(recipe), "--out", str(out), "--resume"]


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


@pytest.fixture
def recipe(make_recipe: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return make_recipe(
        {"checkpoint_every": 2, "precision": "32-true"},
        head="gem",
        head_options={"out_dim": 64},
        distill={
            "max_steps": 6,
            "batch_size": 8,
            "lr": 2e-3,
            "loop": {"accumulate": 2, "clip": 1.0, "ema": 0.9},
        },
        finetune={"places_per_batch": 4, "max_steps": 6, "lr": 1e-3},
        probe={"folders": ["two"], "max_frames": 11},
    )


def written(recipe: dict[str, Any], folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


GRADIENTS = """
import json, sys
from dataclasses import fields
from pathlib import Path
import torch
from safetensors.torch import save_file
from tetra.config import from_dict
from tetra.model import TetraModel
from tetra.training import distributed
from tetra.training.augment import AugmentConfig
from tetra.training.distill import DistillConfig, distill
from tetra.training.finetune import FinetuneConfig, finetune
from tetra.training.loop import StageModule
from tetra.training.recipe import load_recipe
from tetra.training.teachers import create_teacher

recipe, out, stage = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
still = {f.name: 0.0 for f in fields(AugmentConfig)}
recipe["backbone"]["dropout"] = 0.0
for part in ("distill", "finetune"):
    recipe[part] |= {"augment": still, "max_steps": 2, "lambda_schedule": "linear"}
recipe = load_recipe(recipe)
before = StageModule.on_before_optimizer_step

def keep(self, optimizer):
    before(self, optimizer)
    if self.global_step == 0 and distributed.rank() == 0:
        save_file({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}, out / "gradients")

StageModule.on_before_optimizer_step = keep
with distributed.processes():
    torch.manual_seed(3)
    model = TetraModel(recipe.model())
    base = Path(recipe.data_dir)
    if stage == "distill":
        distill(model, create_teacher(recipe.teacher), recipe.distill, out / "run", base_dir=base, progress=False)
    else:
        finetune(model, recipe.finetune, out / "run", base_dir=base, progress=False)
"""


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_gradients_are_those_of_one_process(recipe: dict[str, Any], stage: str, tmp_path: Path) -> None:
    """With the same global batch, nothing dropped and nothing augmented; places of a batch lie on both processes."""
    found = []
    for n in (1, 2):
        out = tmp_path / str(n)
        out.mkdir()
        for status, _, err in finish(start(n, ["-c", GRADIENTS, json.dumps(recipe), str(out), stage])):
            assert status == 0, err
        found.append(load_file(out / "gradients"))
    one, two = found
    assert one.keys() == two.keys()
    assert any(bool(g.abs().max() > 0) for g in one.values())
    size = torch.stack([g.norm() for g in one.values()]).norm()
    for name in one:
        difference = (one[name] - two[name]).norm()
        assert difference <= 1e-6 * max(one[name].norm(), 0.1 * size), name


def test_both_stages_from_the_command_line(recipe: dict[str, Any], tmp_path: Path, pictures: Path) -> None:
    """One set of files comes out, and the model is as good in one process as the two found it."""
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    done = subprocess.run(
        [*command, *train(written(recipe, tmp_path), out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model.safetensors") == 1
    assert sorted(p.name for p in out.iterdir()) == [
        *("curves.png", "distill", "finetune", "log.json", "model.safetensors", "recipe.json", "trained.safetensors"),
    ]
    for stage in ("distill", "finetune"):
        assert sorted(p.name for p in (out / stage / "csv").iterdir()) == ["part0"]
        rows = [row for row in read_log(out / stage) if "loss" in row]
        assert [row["step"] for row in rows] == list(range(6))
    log = json.loads((out / "log.json").read_text())
    assert log["processes"] == 2
    model = load_trainable(out / "trained.safetensors")
    probe = Probe(ProbeConfig(("two",), max_frames=11), model.image_size, pictures)
    assert head_probe(probe, model.eval()) == pytest.approx(log["finetune"])
    assert load(out / "model.safetensors").content_hash == log["content_hash"]


def test_what_several_processes_resume_ends_as_if_they_had_not_stopped(recipe: dict[str, Any], tmp_path: Path) -> None:
    """One process is killed; the other says so by itself, and the checkpoint is whole."""
    file, whole, killed = written(recipe, tmp_path), tmp_path / "whole", tmp_path / "killed"
    recipe["distill"]["max_steps"] = 6
    for status, _, err in finish(start(2, train(file, whole))):
        assert status == 0, err
    processes = start(2, train(file, killed))
    checkpoint = killed / "distill" / CHECKPOINT
    deadline = time.monotonic() + TIMEOUT_S
    while not checkpoint.exists() and time.monotonic() < deadline and processes[0].poll() is None:
        time.sleep(0.002)
    processes[1].send_signal(signal.SIGKILL)
    (status, _, err), (killed_status, _, _) = finish(processes)
    assert killed_status == -signal.SIGKILL
    assert status == 2, err
    (line,) = errors(err)
    assert line.startswith("error: process 0: the connection to another process of this run of 2 broke")
    assert "has died or hangs" in line
    assert "--resume" in line
    assert load_checkpoint(checkpoint)["global_step"] in (2, 4, 6)
    for status, _, err in finish(start(2, train(file, killed))):
        assert status == 0, err
    expected, found = load_file(whole / "trained.safetensors"), load_file(killed / "trained.safetensors")
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_batches_that_processes_cant_share(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Said once, before anything is written but the folder."""
    recipe["finetune"]["places_per_batch"] = 5
    results = finish(start(2, train(written(recipe, tmp_path), tmp_path / "run")))
    assert [status for status, _, _ in results] == [2, 2]
    (line,) = [line for _, _, err in results for line in errors(err)]
    assert "'places_per_batch' is 5" in line
    assert "2 processes" in line
    assert list((tmp_path / "run").iterdir()) == []


TROUBLE = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from tetra.model import TetraModel
from tetra.training import distributed
from tetra.training.finetune import FinetuneModule, finetune
from tetra.training.loop import CHECKPOINT
from tetra.training.recipe import load_recipe

recipe, out = load_recipe(json.loads(sys.argv[1])), Path(sys.argv[2])
plain = FinetuneModule.loss

def spoiled(layer):
    def loss(self, batch, progress):
        if self.global_step < 3 or distributed.requested_rank() != 1:
            return plain(self, batch, progress)
        def spoil(module, inputs, output):
            output = output.clone()
            output[0, 1, 0] = torch.nan
            return output
        hook = self.model.get_submodule(layer).register_forward_hook(spoil, prepend=True)
        try:
            return plain(self, batch, progress)
        finally:
            hook.remove()
    return loss

def attempt(folder, loss=plain, base=Path(recipe.data_dir), resume=False):
    FinetuneModule.loss = loss
    torch.manual_seed(3)
    try:
        finetune(TetraModel(recipe.model()), recipe.finetune, folder, base_dir=base, resume=resume, progress=False)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"

with distributed.processes():
    said = {layer: attempt(out / layer, spoiled(layer)) for layer in ("backbone.blocks.0", "backbone.blocks.2")}
    own = out / f"of {distributed.rank()}"
    with distributed.together():
        own.mkdir()
        if distributed.rank() == 1:
            (own / CHECKPOINT).write_bytes((out / "backbone.blocks.0" / CHECKPOINT).read_bytes())
    said["checkpoint of one"] = attempt(own, resume=True)
    said["data of one"] = attempt(out / "data", base=Path(recipe.data_dir, "one" if distributed.rank() else ""))
    with distributed.together():
        if distributed.rank() == 0:
            file = out / "backbone.blocks.0" / CHECKPOINT
            file.write_bytes(file.read_bytes()[:-50])
    said["damaged"] = attempt(out / "backbone.blocks.0", resume=True)
print(json.dumps(said))
"""


def test_what_goes_wrong_is_said_once_and_by_who_knows(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Numbers that are not finite in one process, in a block that is frozen and one that trains; files of one."""
    recipe["backbone"]["depth"] = 3
    recipe["finetune"]["loop"] |= {"accumulate": 2}
    results = finish(start(2, ["-c", TROUBLE, json.dumps(recipe), str(tmp_path)]))
    assert [status for status, _, _ in results] == [0, 0], results
    first, second = (json.loads(out) for _, out, _ in results)
    for layer in ("backbone.blocks.0", "backbone.blocks.2"):
        assert first[layer] == "Stopped: 2"
        assert second[layer].startswith("TrainingError: step 3: the loss is not finite")
        assert f"it began in layer 'model.{layer} (Block)'" in second[layer]
        assert [p.name for p in (tmp_path / layer).glob("*finite*")] == ["rank1-not-finite.safetensors"]
    for said in (first, second):  # each names its own folder
        assert "the step of the last checkpoint is 0, 2 for the processes" in said["checkpoint of one"]
    assert "the number of training items is 8, 4 for the processes" in first["data of one"]
    assert "not a readable checkpoint" in first["damaged"]
    assert second["data of one"] == second["damaged"] == "Stopped: 2"


def test_one_of_several_is_asked_to_stop(recipe: dict[str, Any], tmp_path: Path) -> None:
    """It does so at once, whatever the others are at; they see that it has gone."""
    recipe["distill"]["max_steps"] = 100_000
    processes = start(2, train(written(recipe, tmp_path), tmp_path / "run"))
    checkpoint = tmp_path / "run/distill" / CHECKPOINT
    deadline = time.monotonic() + TIMEOUT_S
    while not checkpoint.exists() and time.monotonic() < deadline and processes[0].poll() is None:
        time.sleep(0.002)
    processes[0].send_signal(signal.SIGTERM)
    (status, _, err), (other_status, _, other_err) = finish(processes)
    assert status == 143, err
    assert "resuming goes on from the last checkpoint" in err
    assert other_status == 2, other_err
    assert len(errors(other_err)) == 1


@pytest.mark.parametrize("absent", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_environment_that_torchrun_did_not_make(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv(absent)
    with pytest.raises(TrainingError, match=f"WORLD_SIZE is 2.*{absent} is not set.*torchrun"), processes():
        pass


@pytest.mark.parametrize(
    ("rank", "message"), [("5", "RANK is 5.*0 to 1"), ("0", "don't find each other at 127.0.0.1:")]
)
def test_processes_that_do_not_find_each_other(rank: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
        for name, value in {**facts, "MASTER_PORT": taken.getsockname()[1], "CUDA_VISIBLE_DEVICES": ""}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(TrainingError, match=message), processes():
            pass


TOGETHER = """
import sys
from tetra.errors import ConfigError
from tetra.training import distributed
with distributed.processes():
    with distributed.together():
        if distributed.rank() in map(int, sys.argv[1].split(",")):
            raise ConfigError(sys.argv[2].format(distributed.rank()))
"""


@pytest.mark.parametrize(
    ("ranks", "text", "reported"),
    [("0,1,2", "the same", [0]), ("2", "one", [2]), ("1,2", "number {}", [1, 2])],
)
def test_what_stops_one_process_stops_all(ranks: str, text: str, reported: list[int]) -> None:
    results = finish(start(3, ["-c", TOGETHER, ranks, text]))
    assert [rank for rank, (_, _, err) in enumerate(results) if "ConfigError" in err] == reported
    assert [status for status, _, _ in results] == [1 if rank in reported else 2 for rank in range(3)]


@pytest.mark.gpu
def test_more_processes_than_gpus(recipe: dict[str, Any], tmp_path: Path) -> None:
    n = torch.cuda.device_count() + 1
    last = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "RANK": n - 1, "LOCAL_RANK": n - 1}
    last |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    done = subprocess.run(
        [sys.executable, *train(written(recipe, tmp_path), tmp_path / "run")],
        env={**os.environ, **{name: str(value) for name, value in last.items()}},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 2
    assert f"{n} processes on a machine with {n - 1} GPUs" in done.stderr
