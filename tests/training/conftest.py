"""Small pictures, students and teachers that the training tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tetra.config import BackboneConfig, HeadConfig, ModelConfig
from tetra.files import save
from tetra.model import TetraModel

BACKBONE = {
    "width": 32,
    "depth": 2,
    "n_heads": 2,
    "head_dim": 16,
    "mlp_dim": 48,
    "image_size": (32, 32),
    "patch_size": 8,
    "dropout": 0.1,
}


def draw_pictures(folder: Path, n: int, height: int = 40, width: int = 48, start: int = 0) -> list[Path]:
    """``n`` PNG files of coloured rectangles on a gradient, a pure function of their number."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(start, start + n):
        rng = np.random.default_rng(i)
        y, x = np.mgrid[:height, :width]
        image = np.stack([y * 4 + i, x * 4, (x + y) * 2], axis=-1).astype(np.uint8)
        for _ in range(4):
            top, left = rng.integers(0, height - 10), rng.integers(0, width - 10)
            image[top : top + 10, left : left + 10] = rng.integers(0, 256, 3)
        path = folder / f"frame_{i:04d}.png"
        Image.fromarray(image).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="session", name="draw_pictures")
def _draw_pictures() -> Callable[..., list[Path]]:
    return draw_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 pictures, 12 in each of two subfolders."""
    root = tmp_path_factory.mktemp("pictures")
    draw_pictures(root / "one", 12)
    draw_pictures(root / "two", 12, start=12)
    return root


@pytest.fixture
def make_student() -> Callable[..., TetraModel]:
    """make_student(head="gem", **backbone) -> a fresh student, the same every time."""

    def make(head: str | None = "gem", **backbone: Any) -> TetraModel:
        torch.manual_seed(11)
        options = {"gem": {"out_dim": 64}, "mixvpr": {"out_channels": 16, "out_rows": 4, "mix_depth": 1}}
        head_config = None if head is None else HeadConfig(head, options[head])  # type: ignore[arg-type]
        return TetraModel(ModelConfig("student", BackboneConfig(**(BACKBONE | backbone)), head_config))

    return make


@pytest.fixture(scope="session")
def tetra_teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed transformer of width 48 that can teach, attention included."""
    torch.manual_seed(5)
    backbone = BackboneConfig(**(BACKBONE | {"width": 48, "dropout": 0.0}))
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save(TetraModel(ModelConfig("teacher", backbone, HeadConfig("gem", {"out_dim": 64}))).pack(), path)
    return path


@pytest.fixture
def make_recipe(pictures: Path, tetra_teacher_file: Path) -> Callable[..., dict[str, Any]]:
    """make_recipe(loop, backbone={}, distill={}, finetune={}, **rest): both stages of a tiny model, as YAML gives it.

    Whatever is given comes on top; ``loop`` counts for both stages, and a stage's own comes on top of it.
    """

    def make(
        loop: dict[str, Any],
        backbone: dict[str, Any] | None = None,
        distill: dict[str, Any] | None = None,
        finetune: dict[str, Any] | None = None,
        **rest: Any,
    ) -> dict[str, Any]:
        loop = {"log_every": 1, "threads": 1, **loop}
        student = {**BACKBONE, "image_size": [32, 32], "stem": "patch", "stem_channels": [], **(backbone or {})}
        stage_1 = {"folders": ["one", "two"], "attention_layers": 2}
        stage_2 = {
            "sources": [{"kind": "video", "folder": ".", "window": 3, "stride": 3}],
            "images_per_place": 2,
            "augment": {},
        }

        def stage(usual: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
            return {**usual, **own, "loop": {**loop, **own.get("loop", {})}}

        return {
            "name": "tiny",
            "arch": "nano",
            "head": "mixvpr",
            "head_options": {"grid": [4, 4], "out_channels": 16, "out_rows": 4, "mix_depth": 1},
            "backbone": student,
            "data_dir": str(pictures),
            "teacher": {"kind": "tetra", "name": str(tetra_teacher_file)},
            "distill": stage(stage_1, distill or {}),
            "finetune": stage(stage_2, finetune or {}),
            "probe": {"folders": ["two"], "max_frames": 8},
            **rest,
        }

    return make
