"""Latency and memory of the backbone: full precision against packed ternary, in one interleaved run.

The variants take turns (see :mod:`tetra.timing`). Weights are random: speed does not depend on them. The float
variants are composed of PyTorch's own layers and use none of this project's kernels. A packed variant runs the
kernels that a user gets; where those are not plain PyTorch, a second line shows what plain PyTorch makes of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tetra.config import ModelConfig, model_config
from tetra.kernels.attention import Formulation, force_formulation
from tetra.kernels.backend import backend_for
from tetra.model import TetraModel
from tetra.timing import Progress, check_positive, environment, forced_backend, take_turns
from tetra.timing import threads as _threads

MIB = 1 << 20
BASELINE = "fp32 sdpa"


def weights_mib(module: nn.Module) -> float:
    """Memory of all parameters and buffers of ``module``, in MiB."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) / MIB


@dataclass(frozen=True)
class Variant:
    """One way to run the backbone: a model without head, and what is forced while it runs."""

    model: TetraModel
    formulation: Formulation | None = None
    backend: str | None = None
    compiled: bool = False
    graph: bool = False


def _full_precision(config: ModelConfig) -> ModelConfig:
    backbone = dataclasses.replace(config.backbone, full_precision_blocks=config.backbone.depth)
    return dataclasses.replace(config, backbone=backbone)


def _plain_layer_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.LayerNorm):
            plain = nn.LayerNorm(child.normalized_shape, child.eps)
            plain.load_state_dict(child.state_dict())
            setattr(module, name, plain)
        else:
            _plain_layer_norms(child)


def _float_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> TetraModel:
    """A model in full precision, composed of PyTorch's layers, as it is while training, but without dropout."""
    model = TetraModel(_full_precision(config)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    _plain_layer_norms(model)
    model.rest_to(dtype).compute_dtype = dtype
    return model.to(device)


def _packed_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> TetraModel:
    model = TetraModel(config).pack(dtype)
    model.compute_dtype = dtype
    return model.to(device)


def _variants(config: ModelConfig, device: torch.device, compiled: bool) -> dict[str, Variant]:
    """All that can run on ``device``, the baseline first."""
    cuda = device.type == "cuda"
    full = _float_model(config, torch.float32, device)
    half = {"bf16": torch.bfloat16, **({"fp16": torch.float16} if cuda else {})}
    floats = {name: _float_model(config, dtype, device) for name, dtype in half.items()}
    found = {BASELINE: Variant(full, "fused", "torch")}
    for name, model in floats.items():
        found[f"{name} sdpa"] = Variant(model, "fused", "torch")
        found[f"{name} matmul-softmax"] = Variant(model, "plain", "torch")
    if compiled:
        for name, model in {"fp32": full, **floats}.items():
            found[f"{name} compiled"] = Variant(model, None, "torch", compiled=True)
    own = backend_for(torch.empty(0, device=device)) != "torch"
    for name, dtype in {"fp32": torch.float32, **half}.items():
        packed = _packed_model(config, dtype, device)
        found[f"tetra packed, {name} rest"] = Variant(packed)
        if own:
            found[f"tetra packed, {name} rest, plain torch"] = Variant(packed, None, "torch")
        if cuda and own:
            found[f"tetra packed, {name} rest, CUDA graph"] = Variant(packed, graph=True)
    if cuda:
        for name, model in floats.items():
            found[f"{name} sdpa, CUDA graph"] = Variant(model, "fused", "torch", graph=True)
    return found


def _call(variant: Variant, images: Tensor) -> Callable[[], object]:
    """One pass through the backbone."""

    def eager(images: Tensor) -> Tensor:
        return variant.model.features(images).tokens

    forward: Callable[[Tensor], Tensor] = torch.compile(eager) if variant.compiled else eager

    def run() -> Tensor:
        with ExitStack() as stack:
            if variant.formulation is not None:
                stack.enter_context(force_formulation(variant.formulation))
            stack.enter_context(forced_backend(variant.backend))
            return forward(images)

    return _captured(run, images.device) if variant.graph else run


def _captured(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``function`` as a CUDA graph, captured at the first call."""
    graph: torch.cuda.CUDAGraph | None = None

    def replay() -> None:
        nonlocal graph
        if graph is None:
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):  # compiles, and fills the libraries' workspaces
                for _ in range(3):
                    function()
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
        graph.replay()

    return replay


@torch.inference_mode()
def bench_model(
    arch: str = "vit-b",
    batch: int = 1,
    image_size: tuple[int, int] | int | None = None,
    repeats: int = 15,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    compiled: bool = False,
    notices: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Time the backbone of ``arch``, from pixels to tokens, in every variant that can run on ``device``.

    Args:
        arch: a stock architecture (see :func:`tetra.config.model_config`).
        batch: images a pass.
        image_size: (height, width) or one side; the architecture's own by default.
        repeats: timed passes of each variant, after two untimed ones.
        threads: PyTorch threads on the CPU; the current setting by default.
        device: where to run.
        progress: called with one line a round.
        compiled: add the float variants under torch.compile, whose first call takes a minute or more.
        notices: lines are appended that say which variant cannot run here, and why.

    Returns:
        One mapping a variant, the full-precision baseline first: ``variant``, ``median_ms``, ``p95_ms``,
        ``min_ms``, ``first_call_ms`` (before any warm-up), ``ratio_to_fp32_sdpa`` (how many times as fast as the
        baseline, by medians), ``weights_mib`` (backbone, at rest), ``backend`` (of the kernels), ``arch``,
        ``batch``, ``image_size``, ``repeats``, and what :func:`tetra.timing.environment` tells: ``device``,
        ``device_name``, ``threads``, ``versions``, ``commit``.

    Raises:
        ConfigError: unknown ``arch``, or a number that is not positive.
        ImageError: ``image_size`` does not fit the patches.
    """
    check_positive(batch=batch, repeats=repeats, threads=threads)
    config, device = model_config(arch, None), torch.device(device)
    size = config.backbone.image_size if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else size
    with _threads(threads):
        variants = _variants(config, device, compiled)
        images = torch.rand(batch, 3, height, width, device=device)
        times = take_turns(
            {name: _call(variant, images) for name, variant in variants.items()},
            device,
            repeats,
            None if progress is None else lambda done: progress(f"round {done} of {repeats}"),
            [] if notices is None else notices,
        )
        facts = environment(device)
        backend = backend_for(images)
    return [
        {
            "variant": name,
            **taken.figures(),
            "ratio_to_fp32_sdpa": times[BASELINE].median / taken.median,
            "weights_mib": weights_mib(variants[name].model.backbone),
            "backend": variants[name].backend or backend,
            "arch": arch,
            "batch": batch,
            "image_size": [height, width],
            "repeats": repeats,
            **facts,
        }
        for name, taken in times.items()
    ]
