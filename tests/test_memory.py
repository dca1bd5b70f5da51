"""The memory tables against sums made from the shapes alone."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path

import pytest
import torch

from tetra.files import save
from tetra.memory import file_bytes, inspect_model, memory_bytes
from tetra.model import TetraModel, create_model


def ternary_bytes(width: int, inner: int, hidden: int, n_blocks: int) -> int:
    """2-bit rows padded to 128 values, and a float32 scale for each of a block's four layers."""
    shapes = [(3 * inner, width), (width, inner), (hidden, width), (width, hidden)]
    return n_blocks * sum(n * 32 * ceil(k / 128) + 4 for n, k in shapes)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float16, 2), (torch.bfloat16, 2)])
def test_items_add_up(tiny_model: TetraModel, tmp_path: Path, dtype: torch.dtype, size: int) -> None:
    path = tmp_path / "m.safetensors"
    save(tiny_model.pack(dtype), path)
    found = inspect_model(path)
    in_file, in_memory = found["file_bytes"], found["memory_bytes"]
    assert in_file["ternary"] == in_memory["ternary"] == ternary_bytes(40, 24, 136, 1)
    head = 40 * 64 + 64 + 1  # projection and p
    assert in_file["head"] == in_memory["head"] == size * head
    n_other = sum(p.numel() for p in tiny_model.backbone.parameters()) - 3 * 24 * 40 - 40 * 24 - 2 * 136 * 40
    assert in_file["full_precision"] == size * n_other
    assert in_memory["full_precision"] == size * n_other + 2 * 3 * 4  # mean and deviation of the pixels
    assert in_file["total"] == path.stat().st_size == sum(v for k, v in in_file.items() if k != "total")
    assert in_memory["total"] == sum(v for k, v in in_memory.items() if k != "total")
    assert found["n_parameters"] == found["n_ternary"] + 4 + n_other + head
    assert found["bytes_per_image"] * 8 == found["n_bits"] == 64
    assert file_bytes(path) == in_file
    json.dumps(found, allow_nan=False)


def test_a_model_without_a_head(tmp_path: Path) -> None:
    save(create_model("nano", None).pack(), tmp_path / "m.safetensors")
    found = inspect_model(tmp_path / "m.safetensors")
    assert found["head"] is found["n_bits"] is found["bytes_per_image"] is None
    assert found["memory_bytes"]["head"] == 0
    assert found["memory_bytes"]["ternary"] == ternary_bytes(256, 256, 1024, 6)


def test_a_slice_counts_with_all_that_it_keeps_alive(tiny_model: TetraModel) -> None:
    model = tiny_model.pack()
    before = memory_bytes(model)["head"]
    model.head.project.bias.data = torch.zeros(1000, 64)[0]
    assert memory_bytes(model)["head"] == before + 999 * 64 * 4


def test_packed_vit_b_backbone_fits_in_36_megabytes() -> None:
    sizes = memory_bytes(create_model("vit-b", None).pack(torch.float16))
    assert sizes["ternary"] == ternary_bytes(768, 768, 3072, 11)
    assert sizes["total"] <= 36_000_000
