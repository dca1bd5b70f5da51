"""Training steps beside plain PyTorch: the figures, and the counts against arithmetic and the documents."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetra.bench_train import (
    MAPS,
    PLAIN,
    RECOMPUTE,
    _distill_case,
    _Setting,
    attention_by_maps,
    averaged_logits,
    averaged_maps,
    bench_train,
    torch_attention,
    torch_attention_loss,
    torch_token_loss,
)
from tetra.config import BACKBONES, BackboneConfig, ModelConfig
from tetra.errors import ConfigError
from tetra.kernels import attention_distillation, token_loss
from tetra.kernels.backend import backend_for
from tetra.saved_tensors import count_saved, total_bytes

ROOT = Path(__file__).resolve().parent.parent
OWN = ["tetra", "tetra, attention again", "tetra, blocks again"]

SMALL = BackboneConfig(width=48, depth=3, n_heads=3, head_dim=16, mlp_dim=192, image_size=(42, 70), patch_size=7)


def by_variant(rows: list[dict[str, Any]], case: str, stage: str = "") -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in rows if (row["case"], row["stage"]) == (case, stage)}


# --- counting ---


def test_a_storage_counts_once_and_parameters_not() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    with count_saved(layer, [x]) as found:
        y = layer(x)
        z = y.sigmoid()
        loss = (z * z[:, :]).sum() + z.t().exp().sum()
        saved = found()
        loss.backward()  # what was noted can still be used
    assert layer.weight.grad is not None
    # sigmoid and the product keep z, in three views; exp keeps its result.
    assert [(s.operation, s.shape, s.count, s.n_bytes) for s in saved] == [
        ("exp", (4, 3), 1, 48),
        ("sigmoid", (3, 4), 1, 48),
    ]
    with count_saved() as found:
        loss = layer(x).sum()
        assert total_bytes(found()) == x.nbytes  # for the weight's gradient


def test_views_count_as_what_they_keep_alive_and_what_is_gone_not_at_all() -> None:
    x = torch.randn(100, 4, requires_grad=True)
    with count_saved() as found:
        kept = (x * 2)[:3].exp()
        (x * 3).sigmoid()  # nobody holds it
        small = (x * 2)[:3].square()
        groups = {s.operation: s.n_bytes for s in found()}
    assert groups == {"exp": 3 * 4 * 4, "square": 100 * 4 * 4}
    del kept, small


def test_places_are_named() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    x = torch.randn(2, 4, requires_grad=True)
    with count_saved(model, [x]) as found:
        y = model(x)
        groups = {(s.module, s.operation, s.shape, s.dtype, s.count) for s in found()}
    del y
    assert groups == {("*.*", "gelu", (2, 4), "float32", 2), ("*.*", "linear", (2, 4), "float32", 1)}


# --- the yardsticks ---


def heads(seed: int, h: int, e: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, h, 9, e, generator=generator, dtype=torch.float64) for _ in "qk")
    return q, k


def test_what_the_kernels_are_compared_with_computes_the_same() -> None:
    student, teacher = heads(1, 3, 4), heads(2, 2, 8)
    torch.testing.assert_close(averaged_logits(*student), averaged_maps(*student))
    # The yardsticks take the logarithms in float32.
    expected = attention_distillation(*student, *teacher, temperature=4.0)
    for mean in (averaged_logits, averaged_maps):
        torch.testing.assert_close(
            torch_attention_loss(student, teacher, mean).double(), expected, rtol=1e-4, atol=1e-9
        )
    a, b = torch.randn(2, 5, 7).unbind()
    torch.testing.assert_close(torch_token_loss(a, b), token_loss(a, b))
    qkv = torch.randn(2, 9, 3 * 3 * 4)
    torch.testing.assert_close(attention_by_maps(qkv, 3, 0.0), torch_attention(qkv, 3))
    assert not torch.equal(attention_by_maps(qkv, 3, 0.5), attention_by_maps(qkv, 3, 0.5))


def test_one_step_of_every_variant_has_the_same_loss_and_gradient() -> None:
    """Without dropout, where the masks would differ; autocast rounds."""
    case = _distill_case(_Setting(ModelConfig("small", SMALL), 2, torch.device("cpu"), RECOMPUTE, 2))
    found: dict[str, tuple[float, Tensor]] = {}
    for name, variant in case.variants.items():
        with variant.context():
            loss = variant.loss()
            loss.backward()
        weight = case.model["student"].backbone.blocks[0].mlp.up.weight  # type: ignore[index]
        found[name] = loss.item(), weight.grad.clone()
        case.model.zero_grad()
    wanted = found.pop(PLAIN)
    assert list(found) == [MAPS, *OWN]
    for loss_value, gradient in found.values():
        assert loss_value == pytest.approx(wanted[0], rel=1e-2)
        assert F.cosine_similarity(gradient.flatten(), wanted[1].flatten(), dim=0) > 0.99
    assert torch.equal(found["tetra"][1], found["tetra, blocks again"][1])


# --- the figures ---


def test_every_case_is_timed_and_counted() -> None:
    lines: list[str] = []
    rows = bench_train("nano", 4, 64, recompute=RECOMPUTE, repeats=2, threads=1, progress=lines.append)
    names = {(row["stage"], row["case"]) for row in rows}
    components = {"ternary block", "blended linear", "attention", "token loss", "descriptor loss"}
    assert names == {("distill", "step"), ("finetune", "step"), *(("", name) for name in components)}
    assert len(lines) == len({(row["case"], row["stage"], str(row["shape"])) for row in rows})
    for row in rows:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert row["images_per_s"] == pytest.approx(4e3 / row["median_ms"])
        assert row["saved_bytes"] == row["lse_bytes_by_formula"] + sum(group["n_bytes"] for group in row["saved"])
        assert (row["threads"], row["batch"], row["arch"], row["peak_bytes"]) == (1, 4, "nano", None)
        assert row["backend"] == (backend_for(torch.empty(0)) if row["variant"].startswith("tetra") else "torch")
    for stage in ("distill", "finetune"):
        found = by_variant(rows, "step", stage)
        assert list(found) == [PLAIN, *([MAPS] if stage == "distill" else []), *OWN]
        assert found[PLAIN]["ratio"] == found[PLAIN]["times_less_saved"] == 1
        sizes = [found[name]["saved_bytes"] for name in OWN]
        assert sizes == sorted(sizes, reverse=True)
    json.dumps(rows)


@pytest.mark.usefixtures("fused_training")
def test_a_ternary_block_keeps_what_it_says() -> None:
    rows = bench_train("vit-b", 1, 70, ("distill",), RECOMPUTE, 1, threads=1, count_only=True)
    found = by_variant(rows, "ternary block")
    n_seeds, d = 3, 768
    assert found["tetra"]["saved_bytes"] == 26 * (4 * d + 2 * (4 * d + d + 4 * d) + 4 * 12) + 8 * n_seeds
    assert found["tetra, attention again"]["saved_bytes"] == 26 * (4 * d + 2 * (d + 4 * d)) + 8 * n_seeds
    assert found["tetra, blocks again"]["saved_bytes"] == 26 * 4 * d
    assert "median_ms" not in found["tetra"]
    assert {"residual dropout", "attention loss"} <= {row["case"] for row in rows}


def bars_of(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """How many times less each variant keeps than plain modules, and than the reference's formulation."""
    found = by_variant(rows, "step", "distill")
    return {
        name: tuple(found[other]["saved_bytes"] / found[name]["saved_bytes"] for other in (PLAIN, MAPS))  # type: ignore[misc]
        for name in OWN
    }


@pytest.mark.usefixtures("fused_training")
def test_the_bars_hold_on_fewer_blocks() -> None:
    """Three blocks of ViT-B, one of them in the attention loss, where the documents have four of twelve; batch 2."""
    config = ModelConfig("short", replace(BACKBONES["vit-b"], depth=3))
    case = _distill_case(_Setting(config, 2, torch.device("cpu"), RECOMPUTE, 1))
    kept = {name: total_bytes(case.saved(variant)) + variant.lse_bytes for name, variant in case.variants.items()}
    table = documented()
    for name in OWN:
        for yardstick, ratio in zip((PLAIN, MAPS), table[name][1:], strict=True):
            # Weights in bfloat16, which plain modules keep, weigh more in a batch of 2, what is kept once more too.
            assert kept[yardstick] / kept[name] == pytest.approx(ratio, rel=0.35)
    assert kept[PLAIN] >= 2 * kept["tetra"]
    assert kept[MAPS] >= 4.5 * kept["tetra"]


def documented() -> dict[str, tuple[float, float, float]]:
    """Variant -> MiB, times less than plain modules and than the reference, of the table in docs/training.md."""
    text = (ROOT / "docs" / "training.md").read_text()
    lines = re.findall(r"^\| `(t.+?)` \| ([\d.,]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    return {name: tuple(float(x.replace(",", "")) for x in figures) for name, *figures in lines}  # type: ignore[misc]


def test_the_documented_ratios_clear_the_bars() -> None:
    table = documented()
    assert list(table) == [PLAIN, MAPS, *OWN]
    for name, (mib, less_than_plain, less_than_maps) in table.items():
        assert less_than_plain == pytest.approx(table[PLAIN][0] / mib, abs=0.006), name
        assert less_than_maps == pytest.approx(table[MAPS][0] / mib, abs=0.006), name
    assert table["tetra"][1] >= 2
    assert table["tetra"][2] >= 5


@pytest.mark.slow
@pytest.mark.usefixtures("fused_training")
def test_the_documented_count_is_what_is_counted() -> None:
    rows = bench_train("vit-b", 8, stages=("distill",), recompute=RECOMPUTE, count_only=True)
    found = by_variant(rows, "step", "distill")
    for name, (mib, *_) in documented().items():
        assert found[name]["saved_bytes"] / 2**20 == pytest.approx(mib, abs=0.06)
    ratios = bars_of(rows)
    assert ratios["tetra"][0] >= 2
    assert ratios["tetra"][1] >= 5


def test_compiled_attention_keeps_what_the_formula_says() -> None:
    """Counted where the compiled kernels run, in Triton's interpreter, against the count of this process."""
    pytest.importorskip("triton")
    code = """
import json, torch
from tetra.bench_train import bench_train
rows = bench_train("nano", 1, 32, ("distill",), threads=1, count_only=True)
print(json.dumps([[r["case"], r["variant"], r["saved_bytes"], r["lse_bytes_by_formula"]] for r in rows]))
"""
    environment = {**os.environ, "TETRA_BACKEND": "interpreter"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = bench_train("nano", 1, 32, ("distill",), threads=1, count_only=True)
    for row, (case, variant, n_bytes, by_formula) in zip(rows, json.loads(done.stdout), strict=True):
        assert (row["case"], row["variant"]) == (case, variant)
        assert by_formula == 0
        if variant == "tetra" and case in ("step", "ternary block", "attention"):
            if backend_for(torch.empty(0)) == "native":
                assert row["lse_bytes_by_formula"] > 0
                # Attention's component has nobody else who would keep its result.
                own_result = 5 * 256 * 2 if case == "attention" else 0
                assert n_bytes == row["saved_bytes"] + own_result
        else:
            assert n_bytes == row["saved_bytes"]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown architecture 'vit-x'"):
        bench_train("vit-x")
    for argument in ("batch", "repeats", "threads", "image_size"):
        with pytest.raises(ConfigError, match=f"{argument} is 0"):
            bench_train("nano", **{argument: 0})
    with pytest.raises(ConfigError, match="stage 2 needs 4 images"):
        bench_train("nano", 3)
    with pytest.raises(ConfigError, match="attention_layers is 7, expected 0 to 6"):
        bench_train("nano", attention_layers=7)


@pytest.mark.gpu
def test_on_a_gpu_peaks_are_measured() -> None:
    rows = bench_train("nano", 4, 64, recompute=RECOMPUTE, repeats=2, device="cuda")
    assert all(row["peak_bytes"] > 0 and row["lse_bytes_by_formula"] == 0 for row in rows)
