"""The model: descriptors, codes, packing, dtypes and what it refuses."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tetra.config import BACKBONES, BackboneConfig, HeadConfig, ModelConfig, model_config
from tetra.errors import ConfigError, ImageError
from tetra.layers import PackedTernaryLinear, TernaryLinear, set_lambda
from tetra.model import TetraModel, create_model

TINY = BackboneConfig(width=40, depth=3, n_heads=2, head_dim=20, mlp_dim=136, image_size=(64, 64), patch_size=16)
HEADS: dict[str, dict[str, Any]] = {
    "boq": {"channels": 32, "n_queries": 4, "n_heads": 4, "out_rows": 8},
    "salad": {"n_clusters": 4, "cluster_dim": 32, "token_dim": 64, "hidden_dim": 32},
    "mixvpr": {"out_channels": 64, "mix_depth": 1, "out_rows": 4},
    "gem": {"out_dim": 256},
}
KINDS = sorted(HEADS)


def make(kind: str = "mixvpr", stem: str = "patch") -> TetraModel:
    backbone = (
        replace(TINY, stem="conv", stem_channels=(8, 16, 24), full_precision_blocks=0) if stem == "conv" else TINY
    )
    return TetraModel(ModelConfig("tiny", backbone, HeadConfig(kind, HEADS[kind])))  # type: ignore[arg-type]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 64, 64)


def assert_codes_agree(a: Tensor, b: Tensor, values: Tensor) -> None:
    """Equal bits, but where the value is less than 1e-4 of its row's maximum."""
    differ = np.unpackbits((a ^ b).numpy(), axis=1).astype(bool)
    tiny = (values.abs() < 1e-4 * values.abs().amax(1, keepdim=True)).numpy()
    assert not (differ & ~tiny).any()


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_packed_signs_of_the_descriptors(kind: str, stem: str, images: Tensor) -> None:
    model = make(kind, stem).eval()
    descriptors = model(images)
    assert descriptors.shape == (5, model.n_bits)
    assert descriptors.dtype == torch.float32
    codes = model.describe(images)
    assert codes.dtype == torch.uint8
    np.testing.assert_array_equal(codes.numpy(), np.packbits((descriptors > 0).numpy(), axis=1))


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_trained_agree_at_lambda_1(kind: str, stem: str, images: Tensor) -> None:
    model = make(kind, stem).train()
    before = copy.deepcopy(model.state_dict())
    packed = model.pack()
    assert model.training
    assert not model.is_packed
    assert packed.is_packed
    assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in model.state_dict().items()}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    values = packed(images)
    assert_codes_agree(model.describe(images), packed.describe(images), values)
    torch.testing.assert_close(model.eval()(images), values)
    assert not [m for m in packed.modules() if isinstance(m, TernaryLinear)]
    assert packed.n_ternary() == model.n_ternary() > 0


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_trained_and_packed_tokens_are_the_same(stem: str, images: Tensor) -> None:
    model = make("gem", stem).eval()
    expected = model.pack().features(images).tokens
    with torch.no_grad():
        assert torch.equal(model.features(images).tokens, expected)
    with_gradient = model.features(images).tokens
    assert with_gradient.requires_grad
    assert torch.equal(with_gradient, expected)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_gradients_in_evaluation_are_those_of_training(stem: str, images: Tensor) -> None:
    model = make("mixvpr", stem)
    upstream = torch.randn(5, model.n_bits)
    gradients = []
    for training in (True, False):
        copied = copy.deepcopy(model).train(training)
        copied(images).backward(upstream)
        gradients.append({name: p.grad for name, p in copied.named_parameters()})
    trained, evaluated = gradients
    for name, expected in trained.items():
        assert expected is not None, name
        # Where an activation rounds the other way in one of the two, all that follows differs a little.
        error = (evaluated[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 0.05, name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_activations_are_refused_by_the_name_of_the_layer(value: float, images: Tensor) -> None:
    packed = make().pack()
    packed.backbone.position_embedding[0, 3, 5] = value
    for call in (packed, packed.describe):
        with pytest.raises(ValueError, match=r"layer 'backbone\.blocks\.0\.attention\.qkv': .*row 3 .*NaN or infinity"):
            call(images)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_descriptors_have_no_codes(kind: str, value: float, images: Tensor) -> None:
    packed = make(kind).pack()
    parameter = dict(packed.head.named_parameters())  # type: ignore[union-attr]
    name = {"boq": "rows.bias", "salad": "token.3.bias", "mixvpr": "rows.bias", "gem": "project.bias"}[kind]
    parameter[name].data[1] = value
    with pytest.raises(ValueError, match="descriptor 0 of the batch has NaN or infinite values"):
        packed.describe(images)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_activations_on_a_gpu_have_no_codes(value: float, images: Tensor) -> None:
    # A look at every layer's values would stop the queue of launches; the last one tells as well.
    packed = make().pack().cuda()
    packed.backbone.position_embedding[0, 3, 5] = value
    with pytest.raises(ValueError, match="descriptor 0 of the batch has NaN or infinite values"):
        packed.describe(images.cuda())


@pytest.mark.gpu
def test_a_model_and_images_on_different_devices(images: Tensor) -> None:
    for model, other in ((make().pack().cuda(), images), (make().pack(), images.cuda())):
        with pytest.raises(ImageError, match=r"images are on .*, but the model is on .*; move one"):
            model.describe(other)


@pytest.mark.gpu
@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_on_a_gpu_are_those_of_the_cpu(kind: str, stem: str, images: Tensor) -> None:
    packed = make(kind, stem).pack()
    values, codes = packed(images), packed.describe(images)
    found = packed.cuda().describe(images.cuda()).cpu()
    # float32 convolutions and products may run in TF32 there.
    differ = np.unpackbits((found ^ codes).numpy(), axis=1).astype(bool)
    assert not (differ & (values.abs() > 2e-2 * values.abs().amax(1, keepdim=True)).numpy()).any()


def test_packing_copies_everything(images: Tensor) -> None:
    model = make()
    packed = model.pack()
    expected = packed(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(packed(images), expected)
    again = packed.pack()
    assert again is not packed
    assert torch.equal(again(images), expected)


def test_the_trained_model_below_lambda_1_is_another_function(images: Tensor) -> None:
    model = make().eval()
    set_lambda(model, 0.0)
    assert not torch.allclose(model(images), model.pack()(images))


@pytest.mark.parametrize("rest_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_rest_dtype(kind: str, rest_dtype: torch.dtype, images: Tensor) -> None:
    model = make(kind).eval()
    packed = model.pack(rest_dtype)
    for name, parameter in packed.named_parameters():
        assert parameter.dtype == rest_dtype, name
    for module in packed.modules():
        if isinstance(module, PackedTernaryLinear):
            assert module.packed.dtype == torch.uint8
            assert module.weight_scale.dtype == torch.float32
    assert packed.image_mean.dtype == torch.float32
    assert packed(images).dtype == torch.float32
    # The same bits as a model whose parameters were rounded before.
    rounded = copy.deepcopy(model.pack())
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(rest_dtype).float())
    torch.testing.assert_close(packed(images), rounded(images), rtol=1e-5, atol=1e-6)
    similarity = torch.nn.functional.cosine_similarity(packed(images), model(images))
    assert similarity.min() > 0.9


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_computing_in_half_precision(kind: str, packed: bool, dtype: torch.dtype, stem: str, images: Tensor) -> None:
    model = make(kind, stem).eval()
    reference = model(images)
    model = model.pack(torch.bfloat16) if packed else model
    model.compute_dtype = dtype
    out = model(images)
    assert out.dtype == dtype
    similarity = torch.nn.functional.cosine_similarity(out.float(), reference)
    assert similarity.min() > 0.9
    assert model.describe(images).shape == (5, model.n_bits // 8)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_casting_a_packed_model_keeps_scales_and_statistics(cast: torch.dtype, images: Tensor) -> None:
    packed = make().pack()
    expected = packed.pack(cast)(images)
    packed.to(cast)
    assert packed.image_mean.dtype == packed.image_std.dtype == torch.float32
    assert torch.equal(packed(images), expected)


def test_bytes_and_floats_agree(images: Tensor) -> None:
    model = make().eval()
    as_bytes = (images * 255).round().to(torch.uint8)
    as_floats = as_bytes.float() / 255
    assert torch.equal(model(as_bytes), model(as_floats))
    assert torch.equal(model.describe(as_bytes), model.describe(as_floats))
    assert torch.equal(model(as_floats.double()), model(as_floats))


def test_images_are_normalised_with_imagenet_statistics() -> None:
    model = make()
    image = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1).expand(1, 3, 64, 64)
    torch.testing.assert_close(model.prepare(image), torch.zeros(1, 3, 64, 64), rtol=0, atol=1e-6)
    white = model.prepare(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(white[0, :, 0, 0], expected)


@pytest.mark.parametrize("training", [True, False])
def test_describing_keeps_every_mode(training: bool, images: Tensor) -> None:
    backbone = replace(TINY, dropout=0.5, embedding_dropout=0.5)
    model = TetraModel(ModelConfig("tiny", backbone, HeadConfig("gem", {"out_dim": 64}))).train(training)
    model.backbone.blocks[1].train(not training)
    modes = {name: m.training for name, m in model.named_modules()}
    codes = model.describe(images)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.equal(codes, model.describe(images))  # no dropout
    with pytest.raises(ImageError):
        model.describe(images[0])
    assert {name: m.training for name, m in model.named_modules()} == modes


def test_a_packed_model_can_only_infer(images: Tensor) -> None:
    packed = make().pack().train()
    assert not any(m.training for m in packed.modules())
    assert not any(p.requires_grad for p in packed.parameters())
    assert not packed(images).requires_grad


@pytest.mark.parametrize("size", [(32, 96), (64, 48), (128, 128)])
def test_other_image_sizes(size: tuple[int, int]) -> None:
    model = make().eval()
    assert model(torch.rand(2, 3, *size)).shape == (2, model.n_bits)
    assert_codes_agree(
        model.describe(torch.full((1, 3, *size), 0.25)),
        model.pack().describe(torch.full((1, 3, *size), 0.25)),
        model(torch.full((1, 3, *size), 0.25)),
    )


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(3, 64, 64), r"shape \(3, 64, 64\).*\[batch, 3, height, width\]"),
        (torch.zeros(1, 1, 64, 64), r"shape \(1, 1, 64, 64\)"),
        (torch.zeros(1, 64, 64, 3), r"shape \(1, 64, 64, 3\)"),
        (torch.zeros(1, 3, 65, 64), "65x64.*resize to 64x64"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int32), "torch.int32, expected uint8 or float"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.bool), "torch.bool"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.complex64), "torch.complex64"),
        (torch.full((1, 3, 64, 64), 200.0), "torch.float32 with values up to 200, expected 0 to 1; divide by 255"),
        (torch.full((1, 3, 64, 64), 2.0, dtype=torch.float16), "torch.float16 with values up to 2, expected 0 to 1"),
        (torch.full((1, 3, 64, 64), math.nan), "values up to nan, expected 0 to 1"),
        (torch.full((1, 3, 64, 64), math.inf), "values up to inf, expected 0 to 1"),
        (torch.zeros(1, 3, 64, 64, device="meta"), "images are on meta, but the model is on cpu"),
    ],
)
def test_images_that_are_refused(images: Tensor, words: str) -> None:
    model = make().eval()
    for call in (model, model.describe, model.features):
        with pytest.raises(ImageError, match=words):
            call(images)


def test_a_model_without_a_head_gives_tokens_only(images: Tensor) -> None:
    model = TetraModel(ModelConfig("bare", TINY)).eval()
    assert model.features(images).tokens.shape == (5, 17, 40)
    for call in (lambda: model(images), lambda: model.describe(images), lambda: model.n_bits):
        with pytest.raises(ConfigError, match="model 'bare' has no head"):
            call()
    assert model.pack().features(images).tokens.shape == (5, 17, 40)


def test_codes_do_not_depend_on_the_batch(images: Tensor) -> None:
    packed = make("gem").pack()
    values = packed(images)
    alone = torch.cat([packed.describe(image[None]) for image in images])
    assert_codes_agree(packed.describe(images), alone, values)


def test_an_empty_batch() -> None:
    model = make("gem").eval()
    assert model.describe(torch.zeros(0, 3, 64, 64)).shape == (0, 32)


@pytest.mark.parametrize("head", [*KINDS, None])
@pytest.mark.parametrize("arch", sorted(BACKBONES))
def test_create_model_makes_the_stock_configuration(arch: str, head: str | None) -> None:
    with torch.device("meta"):
        model = create_model(arch, head)
    assert model.config == model_config(arch, head)
    assert model.image_size == BACKBONES[arch].image_size
    assert (model.head is None) == (head is None)


def test_create_model_refuses_unknown_names() -> None:
    with pytest.raises(ConfigError, match="unknown architecture 'vit-x'"):
        create_model("vit-x")


def test_packed_vit_b_backbone_fits_in_36_megabytes() -> None:
    model = create_model("vit-b", head=None)
    packed = model.pack(torch.bfloat16)
    del model
    n_bytes = sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    assert n_bytes <= 36e6
    # Two bits a ternary weight; everything else rests in two bytes.
    ternary = sum(m.packed.numel() for m in packed.modules() if isinstance(m, PackedTernaryLinear))
    assert ternary == packed.n_ternary() / 4
