"""Stage 2, end to end on small pictures: frozen parts stay to the bit, head and last block train."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tetra.config import HeadConfig, ModelConfig
from tetra.errors import ConfigError, DatasetError, TrainingError
from tetra.layers import TernaryLinear
from tetra.model import TetraModel
from tetra.quantization import lambda_at
from tetra.training.augment import AugmentConfig
from tetra.training.finetune import FinetuneConfig, FinetuneModule, PlaceSource, finetune
from tetra.training.loop import CHECKPOINT, LoopConfig, read_log
from tetra.training.losses import BinaryMultiSimilarityLoss

Make = Callable[..., TetraModel]


def settings(pictures: Path, **changes: Any) -> FinetuneConfig:
    loop = {"checkpoint_every": 4, "log_every": 1, "precision": "32-true", "threads": 1} | changes.pop("loop", {})
    sources = (PlaceSource("video", str(pictures), window=3, stride=3),)
    plain: dict[str, Any] = {"places_per_batch": 4, "images_per_place": 2, "max_steps": 5, "lr": 1e-3}
    return FinetuneConfig(**({"sources": sources} | plain | changes), loop=LoopConfig(**loop))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("full_precision_blocks", [0, 1])
@pytest.mark.parametrize("trainable_blocks", [0, 1, 2])
def test_only_head_and_last_blocks_change(
    trainable_blocks: int, full_precision_blocks: int, pictures: Path, make_student: Make, tmp_path: Path
) -> None:
    model = make_student("mixvpr", full_precision_blocks=full_precision_blocks)
    before = state_of(model)
    config = settings(pictures, trainable_blocks=trainable_blocks, augment=AugmentConfig())
    finetune(model, config, tmp_path, progress=False)
    trained = ("head.", *(f"backbone.blocks.{i}." for i in range(2 - trainable_blocks, 2)))
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor, before[name]) != name.startswith(trained), name
    assert all(m.lam == 1.0 for m in model.modules() if isinstance(m, TernaryLinear))

    rows = [row for row in read_log(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(5))
    for row in rows:
        assert math.isfinite(row["loss"])
        assert row["lambda"] == pytest.approx(lambda_at(row["step"] / 5), rel=1e-5)
        assert 0.0 <= row["stuck_bits"] <= 1.0
    assert list(tmp_path.glob("csv/part0/metrics.csv"))
    assert list(tmp_path.glob("tensorboard/part0/events.out.tfevents.*"))
    assert (tmp_path / CHECKPOINT).is_file()


def test_training_separates_places(pictures: Path, make_student: Make, tmp_path: Path) -> None:
    config = settings(
        pictures,
        max_steps=50,
        milestones=(),
        places_per_batch=8,
        images_per_place=3,
        lr=3e-3,
        min_scale=1.0,
        warmup_epochs=0.0,
        lambda_schedule="linear",
    )
    finetune(make_student("mixvpr"), config, tmp_path, progress=False)
    losses = [row["loss"] for row in read_log(tmp_path) if "loss" in row]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_frozen_blocks_run_without_dropout_on_the_integer_product(make_student: Make) -> None:
    model = make_student("mixvpr", full_precision_blocks=0, embedding_dropout=0.5)
    module = FinetuneModule(model, FinetuneConfig(sources=(PlaceSource("photos", "x"),)), n_steps=10).train()
    assert not model.backbone.dropout.training
    assert not model.backbone.blocks[0].attention.qkv.training
    assert model.backbone.blocks[1].attention.qkv.training
    assert model.head is not None
    assert model.head.training
    assert not module.eval().model.head.training
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(("head.", "backbone.blocks.1."))}


def test_the_loss_of_a_batch(make_student: Make) -> None:
    model = make_student("mixvpr", dropout=0.0)
    config = FinetuneConfig(sources=(PlaceSource("photos", "x"),), images_per_place=3, lambda_schedule="linear")
    module = FinetuneModule(model, config, n_steps=10)
    images = torch.randint(0, 256, (4, 3, 3, 32, 32), dtype=torch.uint8)
    found = module.loss({"images": images, "label": torch.tensor([5, 9, 2, 7])}, 0.25)
    descriptors = model(images.flatten(0, 1))
    labels = torch.tensor([5, 5, 5, 9, 9, 9, 2, 2, 2, 7, 7, 7])
    torch.testing.assert_close(found["loss"], BinaryMultiSimilarityLoss()(descriptors, labels, 0.25))
    assert found["lambda"] == 0.25
    share = (descriptors > 0).double().mean(0)
    assert found["stuck_bits"].item() == pytest.approx(((share < 0.02) | (share > 0.98)).double().mean().item())


def test_defaults_and_the_schedule_are_the_paper_s(make_student: Make) -> None:
    config = FinetuneConfig(sources=(PlaceSource("photos", "x"),))
    assert (config.lr, config.weight_decay, config.epochs, config.images_per_place) == (1e-4, 1e-3, 40.0, 4)
    assert (config.warmup_epochs, config.milestones, config.gamma) == (3.0, (10, 20, 30), 0.3)
    module = FinetuneModule(make_student("mixvpr"), config, n_steps=400)  # 10 steps an epoch
    configured: Any = module.configure_optimizers()
    assert isinstance(configured["optimizer"], torch.optim.AdamW)
    factors = [module.lr_factor(step) for step in range(400)]
    assert factors[:30] == pytest.approx([(i + 1) / 30 for i in range(30)])
    assert all(f > 0 for f in factors)
    for epoch, factor in ((5, 1.0), (12, 0.3), (22, 0.09), (35, 0.027)):
        assert factors[epoch * 10] == pytest.approx(factor)
    decays = {group["weight_decay"] for group in configured["optimizer"].param_groups}
    assert decays == {0.0, 1e-3}


def test_a_short_run_keeps_the_shares_of_the_stage(make_student: Make) -> None:
    config = FinetuneConfig(sources=(PlaceSource("photos", "x"),), max_steps=40)
    module = FinetuneModule(make_student("mixvpr"), config, n_steps=40)
    assert module.lr_factor(5) == pytest.approx(1.0)
    assert module.lr_factor(35) == pytest.approx(0.027)


def test_the_head_can_start_from_the_images(pictures: Path, make_student: Make, tmp_path: Path) -> None:
    model = make_student("mixvpr")
    config = settings(pictures, initialize_head=8, lr=0.0, weight_decay=0.0, max_steps=1)
    finetune(model, config, tmp_path, progress=False)
    assert model.head is not None
    for layer in model.head.mix:
        assert not layer.down.weight.any()
    # The rows of the 4-row head average the four quarters of the 4 x 4 grid.
    expected = torch.zeros(4, 4, 4)
    for row in range(4):
        expected[row, row // 2 * 2 : row // 2 * 2 + 2, row % 2 * 2 : row % 2 * 2 + 2] = 0.25
    torch.testing.assert_close(model.head.rows.weight.detach(), expected.flatten(1))
    with pytest.raises(ConfigError, match="'initialize_head' is for the MixVPR head, not GeM"):
        finetune(make_student("gem"), config, tmp_path / "gem", progress=False)


def test_sources_of_places(pictures: Path, tmp_path: Path) -> None:
    video = PlaceSource("video", pictures.name, window=4, stride=4)
    assert len(video.places(pictures.parent)) == 6
    excluded = PlaceSource("video", pictures.name, exclude=("one",), window=4, stride=4).places(pictures.parent)
    assert {place.paths[0].parent.name for place in excluded} == {"two"}
    assert len(PlaceSource("photos", pictures.name, exclude=("two",)).places(pictures.parent)) == 12
    with pytest.raises(DatasetError, match="three"):
        PlaceSource("photos", pictures.name, exclude=("three",)).places(pictures.parent)


def test_a_gsv_cities_source(tmp_path: Path, make_student: Make) -> None:
    (tmp_path / "Dataframes").mkdir()
    (tmp_path / "Images" / "Rome").mkdir(parents=True)
    lines = ["place_id,year,month,northdeg,city_id,lat,lon,panoid"]
    for place in range(3):
        for i in range(4):
            lines.append(f"{place},2019,{i + 1},90,Rome,41.9,12.5,pano{place}{i}")
            name = f"Rome_{place:07d}_2019_{i + 1:02d}_090_41.9_12.5_pano{place}{i}.jpg"
            Image.new("RGB", (40, 40), (place * 90, i * 50, 30)).save(tmp_path / "Images" / "Rome" / name)
    (tmp_path / "Dataframes" / "Rome.csv").write_text("\n".join(lines) + "\n")
    config = settings(tmp_path, sources=(PlaceSource("gsv-cities", ".", cities=("Rome",)),), places_per_batch=3)
    finetune(make_student("mixvpr"), config, tmp_path / "run", base_dir=tmp_path, progress=False)
    assert len([row for row in read_log(tmp_path / "run") if "loss" in row]) == 5


def test_a_loss_that_is_not_finite_stops_the_training(pictures: Path, make_student: Make, tmp_path: Path) -> None:
    model = make_student("mixvpr")
    assert model.head is not None
    with torch.no_grad():
        model.head.channels.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"step 0: the loss is not finite .*lower the learning rate"):
        finetune(model, settings(pictures), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": ()}, "'sources' is empty"),
        ({"places_per_batch": 1}, "at least 2 places with 2 images"),
        ({"images_per_place": 1}, "at least 2 places with 2 images"),
    ],
)
def test_settings_that_can_not_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FinetuneConfig(**({"sources": (PlaceSource("photos", "x"),)} | changes))


def test_models_that_can_not_be_fine_tuned(make_student: Make) -> None:
    config = FinetuneConfig(sources=(PlaceSource("photos", "x"),))
    with pytest.raises(ConfigError, match="has no head to fine-tune"):
        FinetuneModule(make_student(None), config, 10)
    source = PlaceSource("photos", "x")
    with pytest.raises(ConfigError, match="'trainable_blocks' is -1, expected"):
        FinetuneModule(make_student(), FinetuneConfig(sources=(source,), trainable_blocks=-1), 10)
    with pytest.raises(ConfigError, match="'trainable_blocks' is 3, expected 0 to 2"):
        FinetuneModule(make_student(), FinetuneConfig(sources=(source,), trainable_blocks=3), 10)


def test_other_heads_train(pictures: Path, tmp_path: Path, make_student: Make) -> None:
    backbone = make_student().config.backbone
    for kind, options in (
        ("boq", {"channels": 16, "n_queries": 4, "n_heads": 2, "out_rows": 4}),
        ("salad", {"n_clusters": 4, "cluster_dim": 8, "token_dim": 16, "hidden_dim": 16}),
        ("gem", {"out_dim": 32}),
    ):
        model = TetraModel(ModelConfig("x", backbone, HeadConfig(kind, options)))  # type: ignore[arg-type]
        before = state_of(model)
        finetune(model, settings(pictures, max_steps=2), tmp_path / kind, progress=False)
        assert not any(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n.startswith("head."))
