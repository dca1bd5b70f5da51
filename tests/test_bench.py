from __future__ import annotations

import pytest
import torch

from tetra.bench import BASELINE, bench_model
from tetra.errors import ConfigError, ImageError


def test_variants_and_their_figures() -> None:
    threads = torch.get_num_threads()
    lines: list[str] = []
    rows = bench_model("nano", batch=2, image_size=(64, 96), repeats=3, threads=1, progress=lines.append)
    by_name = {row["variant"]: row for row in rows}
    assert rows[0]["variant"] == BASELINE
    assert rows[0]["ratio_to_fp32_sdpa"] == 1
    assert len(by_name) == len(rows) == 5
    assert len(lines) == 3
    for row in rows:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert (row["threads"], row["batch"], row["image_size"]) == (1, 2, [64, 96])
    assert torch.get_num_threads() == threads
    fp32, bf16 = by_name[BASELINE]["weights_mib"], by_name["bf16 sdpa"]["weights_mib"]
    assert bf16 == pytest.approx(fp32 / 2)
    # Two bits for sixteen in the blocks; the stem stays as it is.
    assert by_name["tetra packed, bf16 rest"]["weights_mib"] < bf16 / 3
    assert by_name["tetra packed, fp32 rest"]["weights_mib"] < bf16


def test_vit_b_backbone_takes_less_than_36_mib_packed() -> None:
    from tetra.bench import weights_mib
    from tetra.model import create_model

    with torch.device("meta"):
        model = create_model("vit-b", head=None)
    packed = sum(
        module.out_features * 32 * -(-module.in_features // 128)
        for name, module in model.backbone.named_modules()
        if type(module).__name__ == "TernaryLinear"
    )
    ternary = sum(module.weight.numel() for module in model.modules() if type(module).__name__ == "TernaryLinear")
    rest_mib = (weights_mib(model.backbone) - 4 * ternary / 2**20) / 2  # at 2 bytes a value
    assert packed / 2**20 + rest_mib <= 36


@pytest.mark.parametrize("argument", ["batch", "repeats", "threads"])
def test_numbers_have_to_be_positive(argument: str) -> None:
    with pytest.raises(ConfigError, match=f"{argument} is 0"):
        bench_model("nano", **{argument: 0})  # type: ignore[arg-type]


def test_unknown_architecture_and_wrong_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown architecture 'vit-x'"):
        bench_model("vit-x")
    with pytest.raises(ImageError, match="does not fit"):
        bench_model("nano", image_size=65, repeats=1)
