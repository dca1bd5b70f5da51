"""The model that ships: small, whole, and good enough on real places."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tetra
from tetra.datasets import load_dataset
from tetra.evaluation import evaluate
from tetra.files import find
from tetra.kernels import pack_bits
from tetra.training.recipe import load_recipe

ASSETS = find("nano").parent


def test_it_is_at_most_two_megabytes() -> None:
    assert find("nano").stat().st_size <= 2_000_000


def test_it_is_what_its_recipe_makes_and_what_its_log_tells_of() -> None:
    model = tetra.load("nano")
    made = load_recipe("nano").model().to_dict()
    assert model.config.to_dict() == json.loads(json.dumps(made)) | {"backbone": made["backbone"]}
    assert model.content_hash == json.loads((ASSETS / "nano-log.json").read_text())["content_hash"]
    assert model.content_hash in (ASSETS / "nano.md").read_text()


def test_it_describes_images_of_several_shapes() -> None:
    model = tetra.load("nano")
    for size in ((224, 224), (160, 320), (96, 96)):
        images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        codes = model.describe(images)
        with torch.inference_mode():
            assert torch.equal(codes, pack_bits(model(images)))
        assert not torch.equal(codes[0], codes[1])


@pytest.mark.parametrize("name", ["corridor", "gardens_point"])
def test_recall_on_real_places(name: str, shared_data: Path) -> None:
    report = evaluate(tetra.load("nano"), load_dataset(shared_data / "eval" / name), progress=False).to_json_dict()
    # The card has 72 and 86. Another processor adds in another order, and codes at the border flip: a few of
    # 111 queries go either way. HOG reaches 34 and 49.
    assert report["recall_binary"]["1"] >= 68
    assert report["recall_binary"]["5"] >= 87
    assert report["recall_binary"]["1"] >= report["recall_float"]["1"] - 5
