"""Stage 1, end to end on small pictures: what trains, what stays, and what is written."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetra.errors import ConfigError, DatasetError, TrainingError
from tetra.layers import TernaryLinear
from tetra.model import TetraModel
from tetra.quantization import lambda_at
from tetra.training.augment import AugmentConfig
from tetra.training.distill import DistillConfig, DistillModule, distill
from tetra.training.loop import CHECKPOINT, LoopConfig, read_log, step_seed
from tetra.training.schedules import warmup_cosine
from tetra.training.teachers import CnnTeacher, TetraTeacher

Make = Callable[..., TetraModel]
STILL = AugmentConfig(**{f.name: 0.0 for f in fields(AugmentConfig)})


def settings(pictures: Path, **changes: Any) -> DistillConfig:
    loop = {"accumulate": 2, "checkpoint_every": 4, "log_every": 1, "precision": "32-true", "threads": 1}
    loop |= changes.pop("loop", {})
    return DistillConfig(
        **({"folders": (str(pictures),), "batch_size": 4, "max_steps": 6, "lr": 2e-3} | changes),
        loop=LoopConfig(**loop),
    )


def cnn_teacher(width: int = 20) -> CnnTeacher:
    torch.manual_seed(2)
    network = nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.ReLU(), nn.Conv2d(width, 40, 1))
    return CnnTeacher(network, ["1"], cls_layer="2")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}


def test_distilling_from_a_transformer_with_attention(
    pictures: Path, tetra_teacher_file: Path, make_student: Make, tmp_path: Path
) -> None:
    model = make_student()
    before = state_of(model)
    teacher = TetraTeacher(str(tetra_teacher_file))
    teacher_before = state_of(teacher)
    config = settings(pictures, attention_layers=2, max_steps=8)
    distill(model, teacher, config, tmp_path / "run", progress=False)

    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        # Only the backbone trains; the head is for the second stage.
        assert torch.equal(tensor, before[name]) == name.startswith("head."), name
    for name, tensor in state_of(teacher).items():
        assert torch.equal(tensor, teacher_before[name]), name
    assert all(m.lam == 1.0 for m in model.modules() if isinstance(m, TernaryLinear))

    rows = [row for row in read_log(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(8))
    for row in rows:
        total = row["cls"] + 0.3 * row["patch"] + 0.05 * row["attention"]
        assert row["loss"] == pytest.approx(total, rel=1e-4)
        assert math.isfinite(row["loss"])
        # Two batches a step; the log has the second one's.
        assert row["lambda"] == pytest.approx(lambda_at((row["step"] + 0.5) / 8), abs=0.07)
    assert rows[0]["lambda"] < 0.01
    assert rows[-1]["lambda"] > 0.99
    assert rows[-1]["cls"] < rows[0]["cls"]
    assert list((tmp_path / "run" / "csv").glob("part0/metrics.csv"))
    assert list((tmp_path / "run" / "tensorboard").glob("part0/events.out.tfevents.*"))
    assert (tmp_path / "run" / CHECKPOINT).is_file()


def test_distilling_from_a_cached_cnn(pictures: Path, make_student: Make, tmp_path: Path) -> None:
    class Counting(CnnTeacher):
        calls = 0

        def forward(self, images: Tensor, n_attention: int = 0) -> Any:
            Counting.calls += len(images)
            return super().forward(images, n_attention)

    torch.manual_seed(2)
    teacher = Counting(nn.Sequential(nn.Conv2d(3, 20, 8, stride=8), nn.ReLU()), ["1"])
    Counting.calls = 0
    model = make_student()
    config = settings(
        pictures, cache_teacher=True, views=2, attention_weight=0.0, sizes=((0.0, 16), (0.5, 32)), max_steps=10
    )
    distill(model, teacher, config, tmp_path / "run", progress=False)
    assert Counting.calls == 48  # every view once, whatever the steps
    rows = [row for row in read_log(tmp_path / "run") if "loss" in row]
    assert len(rows) == 10
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert all("attention" not in row for row in rows)
    assert (tmp_path / "run" / "teacher-cache" / "cache.json").is_file()


def test_a_student_learns_its_teacher(pictures: Path, make_student: Make, tmp_path: Path) -> None:
    config = settings(
        pictures,
        max_steps=60,
        batch_size=12,
        lr=5e-3,
        augment=STILL,
        loop={"accumulate": 1, "checkpoint_every": 1000},
    )
    distill(make_student(), cnn_teacher(), config, tmp_path / "run", progress=False)
    losses = [row["loss"] for row in read_log(tmp_path / "run") if "loss" in row]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_the_figures_of_validations_are_logged_and_returned(pictures: Path, make_student: Make, tmp_path: Path) -> None:
    model = make_student()
    modes: list[tuple[bool, bool]] = []

    def validate() -> dict[str, float]:
        modes.append((model.training, torch.is_inference_mode_enabled()))
        torch.rand(7)  # must not disturb the training
        return {"recall_float": 10.0 * len(modes)}

    config = settings(pictures, loop={"validate_every": 2})
    figures = distill(model, cnn_teacher(), config, tmp_path / "a", validate=validate, progress=False)
    assert modes == [(False, True)] * 3  # after 2 and 4 steps, and at the end
    assert figures == {"recall_float": 30.0}
    rows = {row["step"]: row["recall_float"] for row in read_log(tmp_path / "a") if "recall_float" in row}
    assert rows == {2: 10.0, 4: 20.0, 6: 30.0}
    other = make_student()
    distill(other, cnn_teacher(), settings(pictures), tmp_path / "b", progress=False)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_seed_one_result(pictures: Path, make_student: Make, tmp_path: Path) -> None:
    results = []
    for i, seed in enumerate((0, 0, 1)):
        model = make_student()
        torch.manual_seed(i)  # what was drawn before does not matter
        config = settings(pictures, max_steps=3, loop={"seed": seed})
        distill(model, cnn_teacher(), config, tmp_path / str(i), progress=False)
        results.append(state_of(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not all(torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_accumulated_batches_are_one_large_batch(pictures: Path, make_student: Make, tmp_path: Path) -> None:
    """Without anything random, two batches of 4 make the step of one batch of 8."""
    plain = STILL
    results = []
    for accumulate, batch_size in ((1, 8), (2, 4)):
        model = make_student(dropout=0.0)
        config = settings(
            pictures,
            max_steps=3,
            batch_size=batch_size,
            augment=plain,
            lambda_schedule="none",
            loop={"accumulate": accumulate},
        )
        distill(model, cnn_teacher(), config, tmp_path / str(accumulate), progress=False)
        results.append(state_of(model))
    start = make_student(dropout=0.0).state_dict()
    for name, tensor in results[0].items():
        moved = (tensor - start[name]).abs().max()
        if name == "backbone.position_embedding":
            assert moved > 0
        # AdamW divides by the gradient's size, which magnifies rounding where a gradient is nearly zero.
        assert (tensor - results[1][name]).abs().mean() <= 0.05 * moved.clamp(min=1e-6), name


def test_a_run_is_not_overwritten_and_a_finished_one_not_repeated(
    pictures: Path, make_student: Make, tmp_path: Path
) -> None:
    model = make_student()
    config = settings(pictures, max_steps=2)
    distill(model, cnn_teacher(), config, tmp_path, progress=False)
    with pytest.raises(TrainingError, match="a training lies here already; resume it or choose another folder"):
        distill(make_student(), cnn_teacher(), config, tmp_path, progress=False)
    again = make_student()
    distill(again, cnn_teacher(), config, tmp_path, resume=True, progress=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert len([row for row in read_log(tmp_path) if "loss" in row]) == 2


@pytest.mark.parametrize("where", ["weight", "teacher"])
def test_a_loss_that_is_not_finite_stops_the_training(
    where: str, pictures: Path, make_student: Make, tmp_path: Path
) -> None:
    model, teacher = make_student(), cnn_teacher()
    with torch.no_grad():
        if where == "weight":
            model.backbone.stem.project.weight[0, 0] = math.nan
        else:
            teacher.network[0].weight.fill_(math.inf)
    with pytest.raises(TrainingError) as caught:
        distill(model, teacher, settings(pictures), tmp_path, progress=False)
    message = str(caught.value)
    assert message.startswith("step 0: the loss is not finite (loss nan")
    assert "lower the learning rate" in message
    assert "\n" not in message
    assert not (tmp_path / CHECKPOINT).exists()


def test_gradients_are_clipped(pictures: Path, make_student: Make, tmp_path: Path) -> None:
    results = []
    for name, clip in (("off", 0.0), ("loose", 1e9), ("tight", 1e-12)):
        model = make_student()
        config = settings(pictures, max_steps=1, weight_decay=0.0, loop={"clip": clip})
        distill(model, cnn_teacher(), config, tmp_path / name, progress=False)
        results.append(state_of(model))
    start = make_student().state_dict()

    def moved(state: dict[str, Tensor]) -> float:
        return sum(float((state[n] - start[n]).abs().sum()) for n in start)

    assert moved(results[0]) == moved(results[1])
    # AdamW's epsilon of 1e-8 outweighs a gradient of 1e-12.
    assert moved(results[2]) < 0.01 * moved(results[0])


# --- the module ---


def test_the_optimiser_and_its_schedule(make_student: Make) -> None:
    config = DistillConfig(folders=("x",))
    assert (config.lr, config.weight_decay, config.epochs, config.batch_size) == (4e-4, 0.01, 30.0, 128)
    assert (config.loop.accumulate, config.warmup_fraction, config.lambda_schedule) == (2, 0.05, "sigmoid")
    assert (config.cls_weight, config.patch_weight, config.attention_weight) == (1.0, 0.3, 0.05)
    assert config.attention_layers == 4
    module = DistillModule(make_student(), cnn_teacher(), config, n_steps=100)
    configured: Any = module.configure_optimizers()
    optimizer = configured["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    wanted = {
        id(p) for m in (module.model.backbone, module.project_cls, module.project_patches) for p in m.parameters()
    }
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == wanted
    assert configured["lr_scheduler"]["interval"] == "step"
    for step in range(100):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(4e-4 * warmup_cosine(step, 100))
        optimizer.step()
        configured["lr_scheduler"]["scheduler"].step()


def test_sizes_by_progress(make_student: Make) -> None:
    config = DistillConfig(folders=("x",), sizes=((0.5, 24), (0.0, 16), (0.9, 32)))
    module = DistillModule(make_student(), cnn_teacher(), config, n_steps=10)
    sides = [module.size_at(p) for p in (0.0, 0.49, 0.5, 0.89, 0.9, 1.0)]
    assert sides == [(s, s) for s in (16, 16, 24, 24, 32, 32)]
    assert DistillModule(make_student(), cnn_teacher(), DistillConfig(folders=("x",)), 10).size_at(0.5) == (32, 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes": ((0.1, 16),)}, "size to begin with"),
        ({"sizes": ((0.0, 16), (1.0, 32))}, r"'sizes' has \(1.0, 32\)"),
        ({"sizes": ((0.0, 0),)}, r"'sizes' has \(0.0, 0\)"),
        ({"views": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"attention_reduction": "sum"}, "'attention_reduction' is 'sum', expected one of elements, rows"),
    ],
)
def test_settings_that_can_not_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DistillConfig(folders=("x",), **changes)


def test_a_cache_can_not_hold_attention(
    pictures: Path, tetra_teacher_file: Path, make_student: Make, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="'cache_teacher' can't hold attention; set attention_weight to 0"):
        distill(make_student(), TetraTeacher(str(tetra_teacher_file)), settings(pictures, cache_teacher=True), tmp_path)


def test_the_attention_loss_by_elements_and_by_rows(tetra_teacher_file: Path, make_student: Make) -> None:
    """A mean over rows is as many times the mean over elements as there are tokens; the other losses stay."""
    found = {}
    for reduction in ("elements", "rows"):
        config = DistillConfig(folders=("x",), attention_layers=2, attention_reduction=reduction, augment=STILL)  # type: ignore[arg-type]
        module = DistillModule(make_student(dropout=0.0), TetraTeacher(str(tetra_teacher_file)), config, n_steps=10)
        torch.manual_seed(0)
        found[reduction] = module.loss({"images": torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)}, 0.5)
        found[reduction]["loss"].backward()
        gradient = module.model.backbone.blocks[0].attention.qkv.weight.grad
        assert gradient is not None
        assert torch.isfinite(gradient).all()
    torch.testing.assert_close(found["rows"]["attention"], found["elements"]["attention"] * 17)
    torch.testing.assert_close(found["rows"]["patch"], found["elements"]["patch"])


def test_token_grids_that_differ_are_refused(tetra_teacher_file: Path, make_student: Make) -> None:
    config = DistillConfig(folders=("x",), attention_layers=1, sizes=((0.0, 16),))
    module = DistillModule(make_student(), TetraTeacher(str(tetra_teacher_file)), config, n_steps=10)
    with pytest.raises(
        TrainingError, match=r"are 2 x 5 for the student and 2 x 17 for the teacher; choose image sizes"
    ):
        module.loss({"images": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)}, 0.5)


def test_missing_folders_are_named(make_student: Make, tmp_path: Path) -> None:
    config = settings(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="nowhere: no such folder"):
        distill(make_student(), cnn_teacher(), config, tmp_path / "run")


@pytest.mark.parametrize("shift", [(1, 0), (0, -2), (2, 1)])
def test_cached_maps_move_with_their_images(shift: tuple[int, int], make_student: Make) -> None:
    """Moving the map by whole patches is what the teacher makes of the moved image, away from the border."""
    teacher = cnn_teacher()
    config = DistillConfig(folders=("x",))
    module = DistillModule(make_student(image_size=(64, 64)), teacher, config, n_steps=10)
    smooth = F.interpolate(torch.rand(2, 3, 8, 8), size=(64, 64), mode="bilinear")
    images = (smooth * 255).to(torch.uint8)
    motion = torch.eye(3).repeat(2, 1, 1)
    motion[:, 0, 2], motion[:, 1, 2] = 2 * shift[0] / 8, 2 * shift[1] / 8
    with torch.no_grad():
        at_rest = teacher(images.float() / 255)
    moved_map = module._targets({"images": images, "cls": at_rest.cls, "patches": at_rest.patches}, motion)
    moved_image = module._targets({"images": images}, motion)
    inside = (slice(None), slice(2, 6), slice(2, 6))
    torch.testing.assert_close(moved_map.patches[inside], moved_image.patches[inside], rtol=1e-2, atol=1e-3)
    assert not torch.allclose(moved_map.patches[inside], at_rest.patches[inside], rtol=1e-2, atol=1e-3)
    assert torch.equal(moved_map.cls, at_rest.cls)


def test_the_teacher_sees_undisturbed_light(make_student: Make) -> None:
    teacher = cnn_teacher()
    module = DistillModule(make_student(), teacher, DistillConfig(folders=("x",)), n_steps=10)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    out = module._targets({"images": images}, torch.eye(3).repeat(2, 1, 1))
    torch.testing.assert_close(out.patches, teacher(images.float() / 255).patches, rtol=1e-3, atol=1e-4)


def test_step_seeds_are_distinct_and_fit() -> None:
    seeds = {step_seed(seed, step) for seed in range(10) for step in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**63 for s in seeds)
    assert step_seed(1, 23) != step_seed(12, 3)


def test_logs_of_parts_are_joined(tmp_path: Path) -> None:
    """After a resume the later part's rows count where both have a step."""
    for part, rows in enumerate(([(0, 5.0), (1, 4.0), (2, 3.0)], [(1, 4.5), (2, 3.5), (3, 2.5)])):
        folder = tmp_path / "csv" / f"part{part}"
        folder.mkdir(parents=True)
        with (folder / "metrics.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["step", "loss", "recall_float"])
            writer.writerows([[step, loss, ""] for step, loss in rows])
            writer.writerow([rows[-1][0], "", 50.0 + part])
    rows_read = read_log(tmp_path)
    assert [(r["step"], r["loss"]) for r in rows_read if "loss" in r] == [(0, 5.0), (1, 4.5), (2, 3.5), (3, 2.5)]
    assert [(r["step"], r["recall_float"]) for r in rows_read if "recall_float" in r] == [(2, 50.0), (3, 51.0)]
    assert read_log(tmp_path / "nothing") == []
