"""What a whole model costs on a GPU: the launches of a ternary block and of a backbone, their traffic by the kernels'
own cost functions, and a predicted latency; the traffic of a block and of the losses in training. Predictions, never
measurements.

Letters: M rows (tokens of all images), K inputs, N outputs of a product. Activations are float16.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from tetra.autotune.hardware import Product
from tetra.autotune.measured_tuner import chosen
from tetra.autotune.workloads import Shape
from tetra.kernels.ahead_of_time import check_compiler, compile_for
from tetra.kernels.attention import cost as attention_cost
from tetra.kernels.attention_distillation import cost as attention_distillation_cost
from tetra.kernels.attention_training import cost as attention_training_cost
from tetra.kernels.blended_linear import cost as blended_cost
from tetra.kernels.layer_norm import cost as layer_norm_cost
from tetra.kernels.patches import cost as patches_cost
from tetra.kernels.residual_dropout import cost as residual_dropout_cost
from tetra.kernels.row_quantize import cost as row_quantize_cost
from tetra.kernels.specimen import Specimen
from tetra.kernels.ternary_matmul import cost as ternary_matmul_cost
from tetra.kernels.token_loss import cost as token_loss_cost
from tetra.kernels.tunable import Config, Sizes, Work, all_tunables
from tetra.profiling.roofline import FORMULA, LAUNCH_OVERHEAD_S, Launch, Prediction, predict_launch
from tetra.profiling.sass import Report, report

BYTES = 2  # of a float16
Cost = tuple[int, int]  # operations, bytes moved
PREDICTED_GPUS = ("A100 SXM 80GB", "H100 SXM", "Jetson AGX Orin 64GB", "RTX 4090")
_LIBRARY_TILE = 64  # what the library's products are taken to compute a block


@dataclass(frozen=True)
class Step:
    """One launch of the model.

    Attributes:
        launch: what it does; the blocks of this project's kernels, and what they do, depend on the configuration.
        sizes: the problem as tuners know it (see ``tetra.kernels.tunable``); None for library products.
    """

    launch: Launch
    sizes: Sizes | None = None


def _blocks(n: int, tile: int) -> int:
    return -(-n // tile)


def _product(
    name: str, m: int, n: int, k: int, *, gelu: bool = False, residual: bool = False, scaled: bool = False
) -> Step:
    operations, n_bytes = ternary_matmul_cost(m, n, k, BYTES, residual=residual)
    epilogue = {"bias": not scaled, "gelu": gelu, "residual": residual, "scaled": scaled}
    sizes = {"m": m, "n": n, "k": k, "x": "int8", "out": "float16", **epilogue}
    return Step(Launch(name, "ternary_matmul", operations, "int8", n_bytes, 0), sizes)


def _norm(name: str, m: int, k: int) -> Step:
    operations, n_bytes = row_quantize_cost(m, k, BYTES, norm=True)
    sizes = {"m": m, "k": k, "dtype": "float16", "norm": True, "gelu": False, "residual": False}
    return Step(Launch(name, "row_quantize", operations, "fp32", n_bytes, 0), sizes)


def _attention(batch: int, tokens: int, n_heads: int, head_dim: int, prescaled: bool = True) -> Step:
    operations, n_bytes = attention_cost(batch, tokens, n_heads, head_dim, BYTES)
    heads = {"b": batch, "t": tokens, "n_heads": n_heads, "head_dim": head_dim}
    sizes = {**heads, "dtype": "float16", "prescaled": prescaled}
    return Step(Launch("attention", "attention", operations, "fp16", n_bytes, 0), sizes)


def block_steps(shape: Shape, batch: int = 1, tokens: int | None = None) -> list[Step]:
    """The launches of one ternary block, in order, as the model makes them in evaluation mode."""
    tokens = tokens or n_tokens(shape)
    m, inner = batch * tokens, shape.n_heads * shape.head_dim
    return [
        _norm("norm, quantise", m, shape.width),
        _product("QKV product", m, 3 * inner, shape.width, scaled=True),
        _attention(batch, tokens, shape.n_heads, shape.head_dim),
        _norm("norm, quantise", m, inner),
        _product("output product, residual", m, shape.width, inner, residual=True),
        _norm("norm, quantise", m, shape.width),
        _product("up product, GELU", m, shape.mlp_dim, shape.width, gelu=True),
        _norm("norm, quantise", m, shape.mlp_dim),
        _product("down product, residual", m, shape.width, shape.mlp_dim, residual=True),
    ]


def n_tokens(shape: Shape) -> int:
    """Patches and the CLS token at the backbone's own image size."""
    height, width = shape.image_size
    return 1 + (height // shape.patch_size) * (width // shape.patch_size)


@dataclass(frozen=True)
class BlockCost:
    """Of one ternary block: ``launches``, ``operations`` (two a multiply-add) and ``n_bytes`` of memory traffic, every
    tensor of every launch once."""

    launches: int
    operations: int
    n_bytes: int


def block_cost(shape: Shape, batch: int = 1, tokens: int | None = None) -> BlockCost:
    """Sum of the kernels' own cost functions over the launches of a ternary block with float16 activations.

    Args:
        shape: of the backbone.
        tokens: an image; those of the backbone's own image size by default.
    """
    steps = block_steps(shape, batch, tokens)
    operations, n_bytes = (sum(getattr(s.launch, name) for s in steps) for name in ("operations", "n_bytes"))
    return BlockCost(len(steps), operations, n_bytes)


def _blended_costs(m: int, n: int, k: int, in_bytes: int, **flags: bool) -> list[Cost]:
    """Of a ternary layer in training, forward and backward: its rows and weight, and the library's three products.

    ``flags``: ``gelu`` and ``dropout`` before the norm.
    """
    rows = blended_cost(m, k, in_bytes, BYTES, **flags)
    weight = (10 * n * k, n * k * (4 + 4 + BYTES))  # float32, once to be summed and once to be blended
    product = (2 * m * n * k, BYTES * (m * k + n * k + m * n))
    gradient = blended_cost(m, k, in_bytes, BYTES, backward=True, **flags)
    return [rows, weight, product, weight, product, gradient, rows, product]


def training_block_cost(shape: Shape, batch: int = 1, tokens: int | None = None, dropout: bool = True) -> BlockCost:
    """Forward and backward pass of a ternary block that trains: the kernels' own cost functions, and the products.

    The stream is float32, all else bfloat16. What PyTorch does between them (sums of biases' gradients, additions of
    gradients) is not counted; a pass over a weight counts as one launch.

    Args:
        shape: of the backbone.
        tokens: an image; those of the backbone's own image size by default.
        dropout: whether the branches drop values.
    """
    tokens = tokens or n_tokens(shape)
    m, inner = batch * tokens, shape.n_heads * shape.head_dim
    heads = (batch, tokens, shape.n_heads, shape.head_dim)
    costs = [
        *_blended_costs(m, 3 * inner, shape.width, 4),
        *_blended_costs(m, shape.width, inner, BYTES),
        *_blended_costs(m, shape.mlp_dim, shape.width, 4),
        *_blended_costs(m, shape.width, shape.mlp_dim, BYTES, gelu=True, dropout=dropout),
        attention_training_cost(*heads, BYTES),
        attention_training_cost(*heads, BYTES, backward=True),
    ]
    if dropout:  # two sums, of which the backward pass makes one again, and two gradients
        costs += [residual_dropout_cost(m, shape.width, BYTES, 4)] * 3
        costs += [residual_dropout_cost(m, shape.width, 4, BYTES, residual=False)] * 2
    return BlockCost(len(costs), sum(operations for operations, _ in costs), sum(n_bytes for _, n_bytes in costs))


def distillation_cost(shape: Shape, teacher_width: int, batch: int = 1, layers: int = 4) -> BlockCost:
    """The losses of stage 1, forward and backward: of tokens, and of the attention of ``layers`` blocks."""
    tokens, inner = n_tokens(shape), shape.n_heads * shape.head_dim
    costs = [token_loss_cost(batch * tokens, teacher_width, 4, backward=backward) for backward in (False, True)]
    for backward in (False, True):
        costs += [attention_distillation_cost(batch, tokens, inner, teacher_width, BYTES, backward=backward)] * layers
    return BlockCost(len(costs), sum(operations for operations, _ in costs), sum(n_bytes for _, n_bytes in costs))


def _library(name: str, m: int, n: int, k: int, residual: bool = False) -> Step:
    n_bytes = BYTES * (m * k + n * k + m * n * (1 + residual))
    blocks = _blocks(m, _LIBRARY_TILE) * _blocks(n, _LIBRARY_TILE)
    return Step(Launch(name, "library", 2 * m * n * k, "fp16", n_bytes, blocks, macs=_LIBRARY_TILE**2 * k))


def _elementwise(name: str, n_values: int, n_tensors: int) -> Step:
    return Step(Launch(name, "library", n_values, "fp32", BYTES * n_values * n_tensors, 1))


def _plain_norm(name: str, m: int, k: int, residual: bool = False) -> Step:
    operations, n_bytes = layer_norm_cost(m, k, BYTES, residual=residual)
    sizes = {"m": m, "k": k, "dtype": "float16", "residual": residual}
    return Step(Launch(name, "layer_norm", operations, "fp32", n_bytes, 0), sizes)


def model_steps(shape: Shape, batch: int = 1) -> list[Step]:
    """The launches of a backbone, from uint8 pixels to tokens: stem, ternary blocks, full-precision blocks.

    Products in full precision run in torch's own library, and so do sums and GELUs between them.
    """
    tokens, inner, width = n_tokens(shape), shape.n_heads * shape.head_dim, shape.width
    m, patch_values = batch * tokens, 3 * shape.patch_size**2
    height, width_px = shape.image_size
    operations, n_bytes = patches_cost(batch, height, width_px, 1, BYTES)
    n_patches = batch * (tokens - 1)
    image = {"b": batch, "height": height, "width": width_px, "patch_size": shape.patch_size}
    stem = [
        Step(
            Launch("patches", "patches", operations, "fp32", n_bytes, 0), {**image, "images": "uint8", "out": "float16"}
        ),
        _library("patch product", n_patches, width, patch_values),
        _plain_norm("stem norm", n_patches, width),
        _elementwise("CLS token", m * width, 2),
        _elementwise("positions", m * width, 3),
    ]
    full = [
        _plain_norm("full: norm", m, width),
        _library("full: QKV product", m, 3 * inner, width),
        _attention(batch, tokens, shape.n_heads, shape.head_dim, prescaled=False),
        _plain_norm("full: norm", m, inner),
        _library("full: output product", m, width, inner),
        _plain_norm("full: norm", m, width, residual=True),
        _library("full: up product", m, shape.mlp_dim, width),
        _elementwise("full: GELU", m * shape.mlp_dim, 2),
        _library("full: down product", m, width, shape.mlp_dim),
        _elementwise("full: residual", m * width, 3),
    ]
    n_full = shape.full_precision_blocks
    return stem + (shape.depth - n_full) * block_steps(shape, batch) + n_full * full


_reports: dict[tuple[str, str, int], Report] = {}


def _report_of(specimen: Specimen, arch: int) -> Report:
    """Compiled and read once a process: a model launches the same code many times."""
    key = (specimen.name, json.dumps(specimen.config, sort_keys=True), arch)
    if key not in _reports:
        _reports[key] = report(compile_for(specimen, arch))
    return _reports[key]


def chosen_works(product: Product, kernel: str, sizes: Sizes) -> tuple[Config, list[Work]]:
    """The configuration that runs a problem on ``product`` (see ``tetra.autotune.table``), and its launches.

    Raises:
        LookupError: no such kernel, or its launches are not known.
    """
    tunable = all_tunables().get(kernel)
    if tunable is None or tunable.works is None:
        raise LookupError(f"{kernel} is not known to the tuner")
    config = chosen(tunable, sizes, None, product.arch, product.n_sms).config
    return config, tunable.works(product.arch, product.n_sms, sizes, config)


def compiled_launch(step: Step, product: Product) -> tuple[Report | None, Launch]:
    """The compiled code that runs ``step`` on ``product`` (None for the library's), and the launch with its blocks."""
    if step.sizes is None:
        return None, step.launch
    _, (work,) = chosen_works(product, step.launch.kernel, step.sizes)
    found = _report_of(work.specimen, product.arch)
    return found, replace(step.launch, blocks=work.blocks, iterations=work.iterations, macs=work.macs)


def _describe(prediction: Prediction, found: Report | None, product: Product) -> dict[str, Any]:
    launch = prediction.launch
    return {
        "name": launch.name,
        "kernel": launch.kernel,
        "predicted_us": 1e6 * prediction.seconds,
        "bound_us": 1e6 * prediction.bound_s,
        "limit": prediction.limit,
        "n_bytes": launch.n_bytes,
        "blocks": launch.blocks,
        "blocks_per_sm": found.blocks_per_sm if found else None,
        "waves": launch.blocks / (product.n_sms * found.blocks_per_sm) if found else None,
    }


def _add_up_ms(parts: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds by name, of pairs of name and seconds."""
    total: dict[str, float] = {}
    for name, seconds in parts:
        total[name] = total.get(name, 0.0) + 1e3 * seconds
    return total


def predict_model(product: Product, shape: Shape, batch: int = 1) -> dict[str, Any]:
    """Predicted latency of a backbone on ``product``, from compiled code and data sheets; nothing is measured.

    Args:
        shape: of the backbone, such as ``tetra.config.BACKBONES["vit-b"]``.
        batch: images a pass.

    Returns:
        ``predicted_ms``, ``bound_ms`` (the sum of the launches' bounds, see ``tetra.profiling.roofline``),
        ``share_of_bound`` (bound / prediction), ``launches``, ``overhead_ms``, ``limited_by_ms`` (milliseconds by
        what limits them), ``bound_by_ms`` (the same of the bound), ``steps`` (a mapping for each kind of launch, with
        ``count``, ``blocks_per_sm``, how many thread blocks a multiprocessor holds at once, and ``waves``, how often
        the launch fills the GPU), ``block`` (launches and bytes of one ternary block), ``gpu``, ``arch``, ``batch``,
        ``formula``, ``source`` of the peaks, ``label`` ("predicted") and ``measured`` (False).

    Raises:
        ValueError: ``batch`` is below 1.
        RuntimeError: there is no Triton that can compile.
    """
    if batch < 1:
        raise ValueError(f"batch: is {batch}, wanted 1 or more")
    check_compiler()
    predictions: list[Prediction] = []
    kinds: Counter[tuple[tuple[str, Any], ...]] = Counter()
    for step in model_steps(shape, batch):
        found, launch = compiled_launch(step, product)
        predictions.append(predict_launch(launch, product, found))
        kinds[tuple(_describe(predictions[-1], found, product).items())] += 1
    predicted_ms, bound_ms = 1e3 * sum(p.seconds for p in predictions), 1e3 * sum(p.bound_s for p in predictions)
    return {
        "gpu": product.name,
        "arch": f"sm_{product.arch}",
        "batch": batch,
        "label": "predicted",
        "measured": False,
        "predicted_ms": predicted_ms,
        "bound_ms": bound_ms,
        "share_of_bound": bound_ms / predicted_ms,
        "launches": len(predictions),
        "overhead_ms": 1e3 * LAUNCH_OVERHEAD_S * len(predictions),
        "limited_by_ms": _add_up_ms((p.limit, p.seconds) for p in predictions),
        "bound_by_ms": _add_up_ms((p.bound_by, p.bound_s) for p in predictions),
        "block": asdict(block_cost(shape, batch)),
        "formula": FORMULA,
        "source": product.source,
        "steps": [{**dict(kind), "count": count} for kind, count in kinds.items()],
    }


_PAGE = """# Predicted latency of {model} on GPUs

These figures are **predicted, never measured**: no GPU was used. `tetra kernels predict --markdown FILE` wrote this
page from the compiled kernels' instructions, in the configurations that `tetra tune show` names, and the makers' data
sheets. What is predicted is the backbone alone, from uint8 pixels to tokens, with float16 activations and packed
ternary weights, as one CUDA graph. The model knows no latency within a kernel. That is optimistic, above all at batch
1 on large GPUs, where a launch is less than one wave and an SM has few warps to switch between. It lets no tensor stay
in the cache from one launch to the next, which is pessimistic at small batches. `tetra bench model` measures.

| GPU | batch | predicted ms | bound ms | share of bound | launches | predicted ms by what limits the launch |
|---|---:|---:|---:|---:|---:|---|
{rows}

**Formula.** A launch takes

    max(max over units of clocks * ceil(blocks / SMs) / clock rate, bytes / memory bandwidth) + {overhead:g} us

where clocks is how long one thread block keeps a unit of its multiprocessor (SM) busy: tensor cores, instruction
issue, integer, float and special function units, shared memory, second-level cache. ceil(blocks / SMs) is the wave
quantisation. The *bound* of a launch is max(operations / tensor-core peak, bytes / memory bandwidth) without overhead;
the share of the bound is bound / prediction, each summed over the launches.

**Assumptions.** {overhead:g} us pass between two kernels of a graph: NVIDIA measured 0.5 us on a V100 ("Getting
Started with CUDA Graphs", 2019), doubled here for filling and draining the multiprocessors. The clock is the boost
clock. Products of the full-precision block run in torch's library and are taken at the peak on {tile} x {tile} tiles.

**A ternary block** takes {launches} launches and, at batch {batch}, {megabytes:.1f} MB of memory traffic by the
kernels' own cost functions. The launches of {gpu} at batch {batch} (a wave is as many thread blocks as the GPU
holds at once):

| launch | count | blocks | waves | predicted us | bound us | limited by |
|---|---:|---:|---:|---:|---:|---|
{steps}

Peaks are taken from:

{sources}
"""


def to_markdown(rows: list[dict[str, Any]], model: str) -> str:
    """A page on the predictions ``rows`` (from :func:`predict_model`), which says what they are."""

    def row_line(row: dict[str, Any]) -> str:
        limits = sorted(row["limited_by_ms"].items(), key=lambda item: -item[1])
        parts = ", ".join(f"{unit} {ms:.2f}" for unit, ms in limits)
        figures = f"{row['predicted_ms']:.2f} | {row['bound_ms']:.2f} | {row['share_of_bound']:.0%}"
        return f"| {row['gpu']} | {row['batch']} | {figures} | {row['launches']} | {parts} |"

    def step_line(kind: dict[str, Any]) -> str:
        figures = f"{kind['predicted_us']:.2f} | {kind['bound_us']:.2f} | {kind['limit']}"
        waves = "" if kind["waves"] is None else f"{kind['waves']:.2f}"
        return f"| {kind['name']} | {kind['count']} | {kind['blocks']} | {waves} | {figures} |"

    first = rows[0]
    return _PAGE.format(
        model=model,
        rows="\n".join(map(row_line, rows)),
        overhead=1e6 * LAUNCH_OVERHEAD_S,
        tile=_LIBRARY_TILE,
        launches=first["block"]["launches"],
        batch=first["batch"],
        megabytes=first["block"]["n_bytes"] / 1e6,
        gpu=first["gpu"],
        steps="\n".join(map(step_line, first["steps"])),
        sources="\n".join(dict.fromkeys(f"- {row['gpu']}: {row['source']}" for row in rows)),
    )
