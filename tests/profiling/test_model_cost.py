"""Costs of a block and predictions for a model: the bars, the arithmetic, and what has to hold for any figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tetra.autotune import table
from tetra.autotune.hardware import PRODUCTS, Product
from tetra.config import BACKBONES
from tetra.kernels.tunable import all_tunables
from tetra.profiling.model_cost import (
    PREDICTED_GPUS,
    block_cost,
    block_steps,
    chosen_works,
    compiled_launch,
    distillation_cost,
    model_steps,
    n_tokens,
    predict_model,
    to_markdown,
    training_block_cost,
)
from tetra.profiling.roofline import bound_seconds

VIT_B = BACKBONES["vit-b"]
ORIN = PRODUCTS["Jetson AGX Orin 64GB"]


def test_traffic_and_launches_of_a_block() -> None:
    cost = block_cost(VIT_B, batch=1)
    assert n_tokens(VIT_B) == 530
    assert cost.launches <= 9
    assert cost.n_bytes <= 26e6
    # The four products and attention, two operations a multiply-add.
    m, d, h = 530, 768, 3072
    assert cost.operations >= 2 * m * (3 * d * d + d * d + 2 * d * h) + 2 * 2 * m * m * d


def test_what_a_block_must_move_by_hand() -> None:
    # Activations that one launch leaves for the next, in float16 or int8, and the packed weights, two bits each.
    m, d, h = 530, 768, 3072
    norms = 3 * m * d * (2 + 1) + m * h * (2 + 1)
    qkv, attention = m * d + 2 * m * 3 * d, 2 * m * 3 * d + 2 * m * d
    out, up, down = m * d + 2 * 2 * m * d, m * d + 2 * m * h, m * h + 2 * 2 * m * d
    weights = (3 * d * d + d * d + 2 * d * h) // 4
    by_hand = norms + qkv + attention + out + up + down + weights
    assert block_cost(VIT_B).n_bytes == pytest.approx(by_hand, rel=0.01)  # scales, biases and norms are small


def test_traffic_grows_with_tokens_and_batch() -> None:
    one = block_cost(VIT_B)
    assert block_cost(VIT_B, batch=4).operations == 4 * one.operations
    assert one.n_bytes < block_cost(VIT_B, batch=4).n_bytes < 4 * one.n_bytes  # weights move once
    assert block_cost(VIT_B, tokens=1000).n_bytes > one.n_bytes
    assert block_cost(VIT_B, batch=2, tokens=265).n_bytes < one.n_bytes * 1.01


def test_a_block_in_training_is_its_products_and_little_else() -> None:
    m, d = 8 * 530, 768
    products = 3 * 2 * m * 12 * d * d
    attention = (4 + 14) * m * 530 * d
    cost = training_block_cost(VIT_B, batch=8)
    assert products + attention < cost.operations < 1.1 * (products + attention)
    # Rows: x in and y out twice, x and two gradients once, of each layer; nothing of T x T anywhere.
    rows = sum(2 * k * (x + 2) + k * (2 * x + 2) for k, x in ((d, 4), (d, 2), (d, 4), (4 * d, 2)))
    assert cost.n_bytes > m * rows
    assert training_block_cost(VIT_B, batch=8, dropout=False).n_bytes < cost.n_bytes
    assert cost.launches == 4 * 8 + 2 + 5


def test_losses_of_distillation_grow_with_what_they_compare() -> None:
    one, two = distillation_cost(VIT_B, 768, batch=1), distillation_cost(VIT_B, 768, batch=2)
    assert two.operations == 2 * one.operations
    assert two.n_bytes == 2 * one.n_bytes
    assert distillation_cost(VIT_B, 1024).operations > one.operations
    # Four products of T x T x C a layer at least, on each side one, and two for the gradient.
    assert one.operations > 4 * 2 * 4 * 530 * 530 * 768
    assert one.n_bytes < 4 * 20 * 530 * 768 * 2 * 2
    assert distillation_cost(VIT_B, 768, layers=0).launches == 2


def test_a_model_is_its_stem_and_blocks() -> None:
    n_block, n_model = len(block_steps(VIT_B)), len(model_steps(VIT_B))
    assert n_model == len(model_steps(replace(VIT_B, depth=1))) + 11 * n_block
    names = [step.launch.name for step in model_steps(VIT_B)]
    assert names.count("attention") == 12
    # Only the full-precision block and the stem leave products to the library.
    assert sum(step.launch.kernel == "library" and "product" in step.launch.name for step in model_steps(VIT_B)) == 5


def test_predictions_are_labelled_and_respect_the_bounds() -> None:
    rows = [predict_model(ORIN, VIT_B, batch) for batch in (1, 64)]
    for row in rows:
        assert (row["label"], row["measured"]) == ("predicted", False)
        assert row["arch"] == "sm_87"
        assert "max(" in row["formula"]
        assert row["launches"] == len(model_steps(VIT_B)) == sum(kind["count"] for kind in row["steps"])
        bound_ms = sum(1e3 * bound_seconds(s.launch, ORIN)[0] for s in model_steps(VIT_B, row["batch"]))
        assert row["bound_ms"] == pytest.approx(bound_ms)
        memory_ms = sum(s.launch.n_bytes for s in model_steps(VIT_B, row["batch"])) / (ORIN.dram_gb_per_s * 1e6)
        assert row["predicted_ms"] > row["bound_ms"] + row["overhead_ms"] * 0.999 > memory_ms * 0.999
        assert 0 < row["share_of_bound"] < 1
        assert sum(row["limited_by_ms"].values()) == pytest.approx(row["predicted_ms"])
        assert sum(row["bound_by_ms"].values()) == pytest.approx(row["bound_ms"])
        assert {"memory", "tensor"} <= row["bound_by_ms"].keys()
        for kind in row["steps"]:
            assert kind["predicted_us"] > kind["bound_us"]
    one, many = rows
    assert one["predicted_ms"] < many["predicted_ms"] < 64 * one["predicted_ms"]
    page = to_markdown(rows, "vit-b")
    assert "predicted, never measured" in page
    assert f"{many['predicted_ms']:.2f}" in page
    assert "ceil(blocks / SMs)" in page


@pytest.mark.slow
@pytest.mark.parametrize("product", [PRODUCTS[name] for name in PREDICTED_GPUS], ids=lambda product: product.name)
def test_predictions_never_fall_with_the_batch(product: Product) -> None:
    times = [predict_model(product, VIT_B, batch)["predicted_ms"] for batch in (1, 2, 8, 64)]
    assert times == sorted(times)


def test_what_is_predicted_is_what_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuned configuration, and without tuning the kernel's own."""
    product = PRODUCTS["A100 SXM 80GB"]
    sizes = {"m": 530, "n": 2304, "k": 768, "x": "int8", "out": "float16"}
    sizes |= {"bias": False, "gelu": False, "residual": False, "scaled": True}
    tunable = all_tunables()["ternary_matmul"]
    shipped = json.loads((Path(table.__file__).parent / "sm_80.json").read_text())["results"]["ternary_matmul"]
    config, (work,) = chosen_works(product, "ternary_matmul", sizes)
    assert list(config) == shipped[tunable.key(sizes)]["config"]
    (step,) = (step for step in block_steps(VIT_B) if step.launch.name == "QKV product")
    assert step.sizes == sizes
    _, launch = compiled_launch(step, product)
    assert (launch.blocks, launch.macs) == (work.blocks, work.macs)
    monkeypatch.setenv("TETRA_TUNING", "off")
    table.reset()
    try:
        default, _ = chosen_works(product, "ternary_matmul", sizes)
        assert default == tunable.default(80, product.n_sms, sizes) != config
    finally:
        monkeypatch.undo()
        table.reset()
    with pytest.raises(LookupError, match="nothing is not known"):
        chosen_works(product, "nothing", sizes)


def test_a_batch_has_to_be_positive() -> None:
    with pytest.raises(ValueError, match="batch: is 0, wanted 1 or more"):
        predict_model(ORIN, VIT_B, 0)
