"""Numbers that are no longer finite: the layer is named, a dump is written, and the last checkpoint stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tetra.errors import TrainingError
from tetra.layers import TernaryLinear
from tetra.model import TetraModel
from tetra.quantization import ternarize_weight
from tetra.training.checkpoint import load_checkpoint
from tetra.training.distill import DistillConfig, DistillModule, distill
from tetra.training.guard import DUMP, bit_figures, first_bad_layer, zero_share
from tetra.training.loop import CHECKPOINT, LoopConfig, StageModule
from tetra.training.teachers import TeacherOutput, TetraTeacher

Make = Callable[..., TetraModel]


def settings(pictures: Path, **loop: Any) -> DistillConfig:
    loop = {"checkpoint_every": 1, "log_every": 1, "precision": "32-true", "threads": 1} | loop
    return DistillConfig((str(pictures),), batch_size=4, max_steps=4, attention_layers=1, loop=LoopConfig(**loop))


class Spoiler(TetraTeacher):
    """Calls ``spoil`` before its ``at``-th batch."""

    def __init__(self, file: Path, at: int, spoil: Callable[[], None]) -> None:
        super().__init__(str(file))
        self.left, self.spoil = at, spoil

    def forward(self, images: Tensor, n_attention: int = 0) -> TeacherOutput:
        if self.left == 0:
            self.spoil()
        self.left -= 1
        return super().forward(images, n_attention)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "weight",
    ["backbone.blocks.0.mlp.up.weight", "backbone.blocks.1.attention.norm_out.bias", "backbone.stem.project.weight"],
)
def test_a_bad_weight_is_named(
    weight: str,
    backend: str,
    pictures: Path,
    tetra_teacher_file: Path,
    make_student: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TETRA_BACKEND", backend)
    model = make_student()

    @torch.no_grad()
    def spoil() -> None:
        model.get_parameter(weight).view(-1)[3] = math.inf

    teacher = Spoiler(tetra_teacher_file, 2, spoil)
    with pytest.raises(TrainingError) as caught:
        distill(model, teacher, settings(pictures), tmp_path, progress=False)
    message = str(caught.value)
    assert "step 2" in message
    assert f"'model.{weight}'" in message
    assert str(tmp_path / DUMP) in message
    assert "resume" not in message  # to the same end
    dump = load_checkpoint(tmp_path / DUMP)
    assert dump["report"]["step"] == 2
    assert weight in dump["report"]["where"]
    assert dump["batch"]["images"].shape == (4, 3, 32, 32)
    assert math.isinf(dump["state_dict"][f"model.{weight}"].view(-1)[3])
    # The checkpoint before is whole, and good.
    saved = load_checkpoint(tmp_path / CHECKPOINT)
    assert saved["global_step"] == 2
    assert all(torch.isfinite(t).all() for t in saved["state_dict"].values())


def test_a_layer_that_overflows_is_named(make_student: Make, pictures: Path, tetra_teacher_file: Path) -> None:
    """Its weights are finite and what goes in is, but not what comes out."""
    model = make_student()
    module = DistillModule(model, TetraTeacher(str(tetra_teacher_file)), settings(pictures), 4)
    module.train()
    with torch.no_grad():
        model.backbone.blocks[1].mlp.up.bias[5] = 3e38
        model.backbone.blocks[1].mlp.norm.weight.fill_(1e30)
        model.backbone.blocks[1].mlp.up.weight.mul_(1e10)
    batch = {"images": torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)}
    assert not torch.isfinite(module.loss(batch, 0.5)["loss"])
    found = first_bad_layer(module, lambda: module.loss(batch, 0.5))
    assert found is not None
    assert found.startswith("layer 'model.backbone.blocks.1.mlp.up")


def test_a_bad_gradient_is_named(
    pictures: Path, tetra_teacher_file: Path, make_student: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite; the weights don't take the step."""
    model = make_student()
    loss = DistillModule.loss

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * torch.nan

    def poisoned(self: StageModule, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        if self.global_step < 1:
            return loss(self, batch, progress)  # type: ignore[arg-type]
        hook = model.backbone.blocks[0].register_forward_hook(lambda m, i, out: Poison.apply(out))
        try:
            return loss(self, batch, progress)  # type: ignore[arg-type]
        finally:
            hook.remove()

    monkeypatch.setattr(DistillModule, "loss", poisoned)
    with pytest.raises(TrainingError, match=r"gradient.*'model\.backbone\.blocks\.0\.mlp\.down\.bias'"):
        distill(model, TetraTeacher(str(tetra_teacher_file)), settings(pictures), tmp_path, progress=False)
    assert load_checkpoint(tmp_path / DUMP)["report"]["step"] == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("bad", "name"), [(math.inf, "the weight 'model.backbone.blocks.0"), (3e38, "validation: layer")]
)
def test_weights_that_a_step_has_ruined(
    bad: float,
    name: str,
    pictures: Path,
    tetra_teacher_file: Path,
    make_student: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They don't take the place of the last good checkpoint, and validation has no traceback."""
    model = make_student()
    step = StageModule.optimizer_step

    def ruinous(self: StageModule, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        if self.global_step == 2:
            with torch.no_grad():
                model.backbone.blocks[0].mlp.norm.weight.fill_(bad)

    def validate() -> dict[str, float]:
        model(torch.rand(2, 3, 32, 32, device=model.image_mean.device))
        return {"recall_binary": 1.0}

    monkeypatch.setattr(StageModule, "optimizer_step", ruinous)
    config = replace(settings(pictures, validate_every=3), lambda_schedule="none")
    teacher = TetraTeacher(str(tetra_teacher_file))
    with pytest.raises(TrainingError) as caught:
        distill(model, teacher, config, tmp_path, validate=None if bad == math.inf else validate, progress=False)
    if torch.cuda.is_available() and name.startswith("validation"):
        name = ""  # a GPU is not asked for values in the middle of its work; the next step finds out
    assert str(caught.value).startswith(f"step 3: {name}")
    saved = load_checkpoint(tmp_path / CHECKPOINT)
    assert saved["global_step"] == 2
    assert all(torch.isfinite(t).all() for t in saved["state_dict"].values())


def test_the_first_layer_of_several(make_student: Make) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), nn.Linear(3, 1))
    x = torch.randn(2, 3)
    assert first_bad_layer(network, lambda: network(x)) is None
    with torch.no_grad():
        network[1][1].bias[0] = torch.nan
        network[2].bias[0] = torch.nan
    assert first_bad_layer(network, lambda: network(x)) == "layer '1.1 (LayerNorm)'"
    assert not any(m._forward_hooks for m in network.modules())


def test_share_of_zeros(make_student: Make) -> None:
    model = make_student()
    codes = [ternarize_weight(m.weight)[0] for m in model.modules() if isinstance(m, TernaryLinear)]
    wanted = sum(int((c == 0).sum()) for c in codes) / sum(c.numel() for c in codes)
    assert zero_share(model) == pytest.approx(wanted, abs=1e-9)
    assert zero_share(nn.Linear(2, 2)) == 0.0


def test_figures_of_bits() -> None:
    bits = torch.zeros(8, 4, dtype=torch.bool)
    bits[:4, 1] = True  # half
    bits[:, 2] = True  # stuck at 1
    bits[:2, 3] = True  # a quarter
    figures = bit_figures(bits)
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert float(figures["code_entropy"]) == pytest.approx((0 + 1 + 0 + quarter) / 4, rel=1e-6)
    assert float(figures["stuck_bits"]) == 0.5
