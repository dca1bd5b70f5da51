"""Latency and memory of the backbone: full precision against packed ternary, in one interleaved run.

The variants take turns (A B C A B C ...), so that whatever else the machine does meets all of them alike, and
medians are compared. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tetra.config import ModelConfig, model_config
from tetra.errors import ConfigError
from tetra.kernels.attention import Formulation, force_formulation
from tetra.model import TetraModel

MIB = 1 << 20
BASELINE = "fp32 sdpa"


def weights_mib(module: nn.Module) -> float:
    """Memory of all parameters and buffers of ``module``, in MiB."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) / MIB


def _full_precision(config: ModelConfig) -> ModelConfig:
    backbone = dataclasses.replace(config.backbone, full_precision_blocks=config.backbone.depth)
    return dataclasses.replace(config, backbone=backbone)


def _model(config: ModelConfig, dtype: torch.dtype, packed: bool, device: torch.device) -> TetraModel:
    model = TetraModel(config).eval()
    model = model.pack(dtype) if packed else model.rest_to(dtype)
    model.compute_dtype = dtype
    return model.to(device)


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _variants(config: ModelConfig, device: torch.device) -> dict[str, tuple[TetraModel, Formulation | None]]:
    """Name -> (model without head, attention formulation or None for the default); the baseline first."""
    full, half = _full_precision(config), torch.bfloat16
    full_half = _model(full, half, packed=False, device=device)
    return {
        BASELINE: (_model(full, torch.float32, packed=False, device=device), "fused"),
        "bf16 sdpa": (full_half, "fused"),
        "bf16 matmul-softmax": (full_half, "plain"),
        "tetra packed, fp32 rest": (_model(config, torch.float32, packed=True, device=device), None),
        "tetra packed, bf16 rest": (_model(config, half, packed=True, device=device), None),
    }


def _timed(model: TetraModel, formulation: Formulation | None, images: Tensor) -> float:
    """Seconds of one pass through the backbone."""
    with nullcontext() if formulation is None else force_formulation(formulation):
        start = time.perf_counter()
        model.features(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - start


@torch.inference_mode()
def bench_model(
    arch: str = "vit-b",
    batch: int = 1,
    image_size: tuple[int, int] | int | None = None,
    repeats: int = 15,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Time the backbone of ``arch``, from normalised pixels to tokens, in five variants.

    Args:
        arch: a stock architecture (see :func:`tetra.config.model_config`).
        batch: images a pass.
        image_size: (height, width) or one side; the architecture's own by default.
        repeats: timed passes of each variant, after two untimed ones.
        threads: PyTorch threads on the CPU; the current setting by default.
        device: where to run.
        progress: called with one line a round.

    Returns:
        One mapping a variant, the full-precision baseline first: ``variant``, ``median_ms``, ``p95_ms``,
        ``min_ms``, ``ratio_to_fp32_sdpa`` (how many times as fast as the baseline, by medians),
        ``weights_mib`` (backbone, at rest), ``arch``, ``batch``, ``image_size``, ``threads``, ``device``,
        ``repeats``.

    Raises:
        ConfigError: unknown ``arch``, or a number that is not positive.
        ImageError: ``image_size`` does not fit the patches.
    """
    for name, value in (("batch", batch), ("repeats", repeats), ("threads", threads)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected 1 or more")
    config, device = model_config(arch, None), torch.device(device)
    size = config.backbone.image_size if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else size
    with _threads(threads):
        variants = _variants(config, device)
        images = torch.rand(batch, 3, height, width, device=device)
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for round_number in range(-2, repeats):
            for name, (model, formulation) in variants.items():
                taken = _timed(model, formulation, images)
                if round_number >= 0:
                    seconds[name].append(taken)
            if progress is not None and round_number >= 0:
                progress(f"round {round_number + 1} of {repeats}")
        used_threads = torch.get_num_threads()
    baseline = statistics.median(seconds[BASELINE])
    return [
        {
            "variant": name,
            "median_ms": 1e3 * statistics.median(taken),
            "p95_ms": 1e3 * sorted(taken)[min(round(0.95 * len(taken)), len(taken) - 1)],
            "min_ms": 1e3 * min(taken),
            "ratio_to_fp32_sdpa": baseline / statistics.median(taken),
            "weights_mib": weights_mib(variants[name][0].backbone),
            "arch": arch,
            "batch": batch,
            "image_size": [height, width],
            "threads": used_threads,
            "device": str(device),
            "repeats": repeats,
        }
        for name, taken in seconds.items()
    ]
