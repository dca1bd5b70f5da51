"""The model's forward passes, whose launches ``tetra kernels check`` counts, beside those of the single operations.

The text of this file is run inside the tree that is looked at, with kernels that do not run: results are whatever
memory held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from tetra.config import BACKBONES, BackboneConfig, model_config
from tetra.model import TetraModel

Call = Callable[[], object]
# The kernel files that a call launches from, and what makes its inputs and returns it.
Traced = tuple[tuple[str, ...], Callable[[], Call]]

INFERENCE = ("ternary_matmul", "row_quantize", "attention", "layer_norm", "patches")


def _backbone() -> Call:
    """Packed, float16, two blocks as wide as ViT-S's, of which one is in full precision."""
    config = model_config("vit-s", None)
    backbone = replace(config.backbone, depth=2, image_size=(112, 112), full_precision_blocks=1)
    model = TetraModel(replace(config, backbone=backbone)).pack(torch.float16)
    model.compute_dtype = torch.float16
    images = torch.zeros(2, 3, 112, 112, dtype=torch.uint8)

    @torch.inference_mode()
    def call() -> object:
        return model.features(images).tokens

    return call


def backbones() -> dict[str, BackboneConfig]:
    """Whose problems the shipped configurations are compiled for."""
    return dict(BACKBONES)


def calls() -> dict[str, Traced]:
    """By name."""
    return {"backbone, packed, two blocks": (INFERENCE, _backbone)}
