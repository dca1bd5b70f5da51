"""A packed model goes whole through torch.compile and torch.export."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tetra.config import BackboneConfig, HeadConfig, ModelConfig
from tetra.model import TetraModel

# Head dim 48 and patches that fill no power of two; the last block is in full precision.
BACKBONE = BackboneConfig(width=40, depth=2, n_heads=1, head_dim=48, mlp_dim=136, image_size=(28, 42), patch_size=14)
HEADS: dict[str, dict[str, Any]] = {
    "boq": {"channels": 32, "n_queries": 4, "n_layers": 1, "n_heads": 4, "out_rows": 8},
    "salad": {"n_clusters": 3, "cluster_dim": 32, "token_dim": 64, "hidden_dim": 32},
    "mixvpr": {"out_channels": 64, "mix_depth": 1, "out_rows": 4},
    "gem": {"out_dim": 256},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def packed(kind: Any = "gem", stem: Any = "patch", dtype: torch.dtype = torch.float32) -> TetraModel:
    backbone = BACKBONE
    if stem == "conv":
        backbone = replace(BACKBONE, stem="conv", stem_channels=(8, 12, 16), patch_size=16, image_size=(32, 48))
    model = TetraModel(ModelConfig("tiny", backbone, HeadConfig(kind, HEADS[kind]))).pack()
    model.compute_dtype = dtype
    return model


def pixels(model: TetraModel, batch: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    images = torch.randint(0, 256, (batch, 3, *model.image_size), dtype=torch.uint8, device=model.image_mean.device)
    return images if dtype == torch.uint8 else images / 255.0


class Describer(nn.Module):
    """What a deployment exports: pixels to codes."""

    def __init__(self, model: TetraModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.describe(images)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("call", "kind", "stem", "dtype"),
    [
        ("forward", "boq", "patch", torch.float32),
        ("describe", "salad", "conv", torch.float32),
        ("describe", "mixvpr", "patch", torch.bfloat16),
        ("forward", "gem", "conv", torch.float16),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_the_whole_model_is_one_graph(device: str, call: str, kind: str, stem: str, dtype: torch.dtype) -> None:
    model = packed(kind, stem, dtype).to(device)
    images = pixels(model, 2, torch.float32 if call == "forward" else torch.uint8)
    # The graph runs as it was caught, without a code generator: results are the same, bit for bit.
    compiled = torch.compile(getattr(model, call), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), getattr(model, call)(images))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("device", DEVICES)
def test_inductor(device: str) -> None:
    model = packed("mixvpr").to(device)
    images = pixels(model, 2)
    values = model(images)
    forward = torch.compile(model, fullgraph=True)
    describe = torch.compile(model.describe, fullgraph=True)
    # Generated code adds in another order, and an activation may round the other way.
    torch.testing.assert_close(forward(images), values, rtol=1e-2, atol=1e-2)
    differ = (describe(images) ^ model.describe(images)).cpu()
    bits = torch.stack([(differ >> i) & 1 for i in range(8)]).sum()
    assert bits <= 0.01 * values.numel()


def export(model: TetraModel, example: Tensor) -> torch.export.ExportedProgram:
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    return torch.export.export(Describer(model), (example,), dynamic_shapes=shapes)


@pytest.mark.parametrize(
    ("kind", "stem", "dtype"),
    [
        ("boq", "conv", torch.float32),
        ("salad", "patch", torch.bfloat16),
        ("mixvpr", "conv", torch.float16),
        ("gem", "patch", torch.float32),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_an_exported_program_takes_any_batch(
    device: str, kind: str, stem: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = packed(kind, stem, dtype).to(device)
    program = export(model, pixels(model, 2))
    torch.export.save(program, tmp_path / "describe.pt2")
    loaded = torch.export.load(tmp_path / "describe.pt2").module()
    for batch in (1, 3, 5):
        images = pixels(model, batch)
        expected = model.describe(images)
        assert torch.equal(program.module()(images), expected)
        assert torch.equal(loaded(images), expected)


def test_an_exported_program_keeps_the_kernels() -> None:
    model = packed()
    graphs = [m for m in export(model, pixels(model, 2)).graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    operations = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    assert {
        "tetra.patch_rows.default",
        "tetra.norm_quantize.default",
        "tetra.ternary_linear_int8.default",
        "tetra.attention_qkv.default",
    } <= operations


def test_a_packed_block_is_nine_kernels() -> None:
    block = packed().backbone.blocks[0]
    graph = torch.export.export(block, (torch.randn(2, 7, 40),)).graph
    # Views, and the cast of a scale that is float32 already.
    views = ("view", "reshape", "getitem", "detach", "aten.to.dtype", "_assert", "_guards")
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    kernels = [name for name in names if not any(view in name for view in views)]
    product = ["tetra.norm_quantize.default", "tetra.ternary_linear_int8.default"]
    assert kernels == [*product, "tetra.attention_qkv.default", *product, *product, *product]


@pytest.mark.parametrize("wrong", [(2, 3, 28, 28), (2, 1, 28, 42)])
def test_an_exported_program_refuses_other_images(wrong: tuple[int, ...]) -> None:
    model = packed()
    program = export(model, pixels(model, 2)).module()
    with pytest.raises((RuntimeError, AssertionError)):
        program(torch.zeros(wrong, dtype=torch.uint8))


def test_images_that_do_not_fit_are_refused_while_exporting() -> None:
    model = packed()
    with pytest.raises(Exception, match=r"28x40.*multiples of 14"):
        export(model, torch.zeros(2, 3, 28, 40, dtype=torch.uint8))
