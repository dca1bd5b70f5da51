"""The vision transformer against a plain implementation of its own."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tetra.config import BACKBONES, BackboneConfig
from tetra.errors import ImageError
from tetra.layers import TernaryLinear, set_lambda
from tetra.vit import Block, VisionTransformer

TINY = BackboneConfig(width=32, depth=3, n_heads=2, head_dim=12, mlp_dim=48, image_size=(32, 48), patch_size=8)
State = dict[str, Tensor]


def expected_shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the transformer as the paper describes it."""
    d, inner, hidden = config.width, config.n_heads * config.head_dim, config.mlp_dim
    values = 3 * config.patch_size**2
    n_patches = (config.image_size[0] // config.patch_size) * (config.image_size[1] // config.patch_size)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "position_embedding": (1, 1 + n_patches, d),
        "stem.norm_in.weight": (values,),
        "stem.norm_in.bias": (values,),
        "stem.project.weight": (d, values),
        "stem.project.bias": (d,),
        "stem.norm_out.weight": (d,),
        "stem.norm_out.bias": (d,),
    }
    for i in range(config.depth):
        block: dict[str, tuple[int, ...]] = {
            "attention.norm.weight": (d,),
            "attention.norm.bias": (d,),
            "attention.qkv.weight": (3 * inner, d),
            "attention.norm_out.weight": (inner,),
            "attention.norm_out.bias": (inner,),
            "attention.out.weight": (d, inner),
            "attention.out.bias": (d,),
            "mlp.norm.weight": (d,),
            "mlp.norm.bias": (d,),
            "mlp.up.weight": (hidden, d),
            "mlp.up.bias": (hidden,),
            "mlp.down.weight": (d, hidden),
            "mlp.down.bias": (d,),
        }
        if i < config.depth - 1:
            block["mlp.norm_down.weight"] = block["mlp.norm_down.bias"] = (hidden,)
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


@pytest.mark.parametrize(("arch", "millions"), [("vit-s", 25.3), ("vit-b", 86.0)])
def test_parameters_of_the_stock_architectures(arch: str, millions: float) -> None:
    with torch.device("meta"):
        backbone = VisionTransformer(BACKBONES[arch])
    shapes = {name: tuple(p.shape) for name, p in backbone.named_parameters()}
    assert shapes == expected_shapes(BACKBONES[arch])
    assert not list(backbone.named_buffers())
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    ternary = {name for name, m in backbone.named_modules() if isinstance(m, TernaryLinear)}
    layers = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    assert ternary == {f"blocks.{i}.{layer}" for i in range(11) for layer in layers}


def test_nano_is_small_and_all_ternary() -> None:
    with torch.device("meta"):
        backbone = VisionTransformer(BACKBONES["nano"])
    ternary = sum(m.weight.numel() for m in backbone.modules() if isinstance(m, TernaryLinear))
    total = sum(p.numel() for p in backbone.parameters())
    assert 4e6 < total < 6e6
    assert ternary / total > 0.9


# --- a plain implementation ---


def norm(x: Tensor, state: State, name: str) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: State, name: str, quantised: bool) -> Tensor:
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    if quantised:
        s = 1 / max(float(weight.abs().mean()), 1e-5)
        weight = (weight * s).round().clamp(-1, 1) / s
        a = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        x = (x * a).round().clamp(-128, 127) / a
    y = x @ weight.T
    return y if bias is None else y + bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def patches_of(image: Tensor, size: int) -> Tensor:
    """[3, H, W] -> [T, 3 size^2], value by value: row in the patch, then column, then channel."""
    _, height, width = image.shape
    rows = []
    for top in range(0, height, size):
        for left in range(0, width, size):
            rows.append([image[c, top + y, left + x] for y in range(size) for x in range(size) for c in range(3)])
    return torch.stack([torch.stack(row) for row in rows])


def plain_forward(
    state: State, config: BackboneConfig, images: Tensor, quantised: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    h, e = config.n_heads, config.head_dim
    x = torch.stack([patches_of(image, config.patch_size) for image in images])
    x = norm(linear(norm(x, state, "stem.norm_in"), state, "stem.project", False), state, "stem.norm_out")
    x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x], dim=1) + state["position_embedding"]
    queries_keys = []
    for i in range(config.depth):
        last = i == config.depth - 1
        name, ternary = f"blocks.{i}", quantised and not last
        y = linear(norm(x, state, f"{name}.attention.norm"), state, f"{name}.attention.qkv", ternary)
        heads, qs, ks = [], [], []
        for j in range(h):  # the columns are all queries, then all keys, then all values; heads within
            q, k, v = (y[..., (part * h + j) * e : (part * h + j + 1) * e] for part in range(3))
            weights = torch.exp(q @ k.transpose(1, 2) / math.sqrt(e))
            heads.append(weights / weights.sum(-1, keepdim=True) @ v)
            qs.append(q)
            ks.append(k)
        queries_keys.append((torch.stack(qs, 1), torch.stack(ks, 1)))
        y = norm(torch.cat(heads, dim=-1), state, f"{name}.attention.norm_out")
        x = x + linear(y, state, f"{name}.attention.out", ternary)
        y = gelu(linear(norm(x, state, f"{name}.mlp.norm"), state, f"{name}.mlp.up", ternary))
        if not last:
            y = norm(y, state, f"{name}.mlp.norm_down")
        x = x + linear(y, state, f"{name}.mlp.down", ternary)
    return x, queries_keys


def randomised(config: BackboneConfig) -> VisionTransformer:
    """Every parameter random, so that none can be left out unnoticed; float64."""
    backbone = VisionTransformer(config).double()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(0.0, 0.3)
    return backbone


@pytest.mark.parametrize(("lam", "training"), [(0.0, False), (0.0, True), (1.0, True)])
def test_forward_is_the_plain_one(lam: float, training: bool) -> None:
    backbone = randomised(TINY).train(training)
    set_lambda(backbone, lam)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    expected, queries_keys = plain_forward(backbone.state_dict(), TINY, images, quantised=lam == 1.0)
    features = backbone.features(images, collect_last=2)
    torch.testing.assert_close(features.tokens, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(backbone(images), features.tokens)
    assert features.grid == (4, 6)
    assert len(features.queries_keys) == 2
    for found, wanted in zip(features.queries_keys, queries_keys[1:], strict=True):
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == (2, 2, 25, 12)
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.float16, 2e-2), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize(("n_heads", "head_dim"), [(2, 12), (1, 96), (3, 33)])
def test_inference_in_integers_is_close_to_the_plain_one(
    n_heads: int, head_dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    config = replace(TINY, n_heads=n_heads, head_dim=head_dim)
    backbone = randomised(config).float().eval()
    images = torch.randn(2, 3, 32, 48)
    state = {k: v.double() for k, v in backbone.state_dict().items()}
    expected, _ = plain_forward(state, config, images.double(), quantised=True)
    # One activation that rounds the other way moves a result by a step of 1/127.
    error = (backbone(images.to(dtype)).double() - expected).norm() / expected.norm()
    assert error < tolerance


@pytest.mark.parametrize("ternary", [True, False])
def test_a_block_infers_the_same_whether_or_not_a_gradient_is_wanted(ternary: bool) -> None:
    block = Block(TINY, ternary).eval()
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        expected = block(x)
    assert torch.equal(block(x), expected)
    assert torch.equal(block(x.requires_grad_()), expected)
    assert torch.equal(block.requires_grad_(False)(x), expected)


@pytest.mark.parametrize("wanted", ["all", "input", "one parameter"])
@pytest.mark.parametrize("ternary", [True, False])
def test_gradients_of_an_evaluated_block_are_those_of_training(ternary: bool, wanted: str) -> None:
    block = Block(TINY, ternary)
    if wanted != "all":
        block.requires_grad_(False)
    if wanted == "one parameter":
        block.mlp.up.bias.requires_grad_(True)
    upstream = torch.randn(2, 7, 32)
    found = []
    for training in (True, False):
        x = torch.linspace(-2, 2, 2 * 7 * 32).reshape(2, 7, 32).requires_grad_(wanted != "one parameter")
        copied = copy.deepcopy(block).train(training)
        copied(x).backward(upstream)
        found.append([x.grad, *(p.grad for p in copied.parameters())])
    for trained, evaluated in zip(*found, strict=True):
        assert (trained is None) == (evaluated is None)
        if trained is not None:
            torch.testing.assert_close(evaluated, trained, rtol=2e-2, atol=2e-2 * float(trained.abs().max()))


@pytest.mark.parametrize("ternary", [True, False])
def test_autocast_gets_the_composed_block(ternary: bool) -> None:
    block, x = Block(TINY, ternary).eval(), torch.randn(2, 7, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = x + block.attention(x)
        assert torch.equal(block(x), y + block.mlp(y))


@pytest.mark.usefixtures("fused_training")
@pytest.mark.parametrize("ternary", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_a_block_trains_the_same_fused_and_composed(lam: float, ternary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(TINY, ternary)
    set_lambda(block, lam)
    upstream = torch.randn(3, 25, 32)
    found, n_bytes = [], []

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in {p.data_ptr() for p in block.parameters()}:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for backend in ("torch", "auto"):
        monkeypatch.setenv("TETRA_BACKEND", backend)
        block.zero_grad()
        sizes: dict[int, int] = {}
        x = torch.linspace(-2, 2, 3 * 25 * 32).sin().reshape(3, 25, 32).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            y = block(x)
        y.backward(upstream)
        found.append([y.detach(), x.grad, *(p.grad for p in block.parameters())])
        n_bytes.append(sum(sizes.values()))
    for composed, fused in zip(*found, strict=True):
        # One activation may round the other way.
        assert (fused - composed).norm() <= (2e-2 if lam else 1e-4) * composed.norm()
    assert n_bytes[1] < 0.75 * n_bytes[0]


@pytest.mark.parametrize("ternary", [True, False])
def test_a_block_made_again_in_the_backward_pass_drops_the_same_values(ternary: bool) -> None:
    block = Block(replace(TINY, dropout=0.3), ternary)
    found = []
    for again in (False, True):
        torch.manual_seed(5)
        x = torch.linspace(-2, 2, 2 * 25 * 32).sin().reshape(2, 25, 32).requires_grad_()
        y = checkpoint(block, x, use_reentrant=False) if again else block(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
    for once, twice in zip(*found, strict=True):
        assert torch.equal(once, twice)


def test_collected_queries_and_keys_are_those_of_the_projection() -> None:
    backbone = randomised(TINY).float().eval()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        features = backbone.features(images, collect_last=2)
        # Collecting composes the layers; one activation may round the other way.
        error = (features.tokens - backbone(images)).norm() / features.tokens.norm()
        assert error < 1e-2
        state = {k: v.double() for k, v in backbone.state_dict().items()}
        _, expected = plain_forward(state, TINY, images.double(), quantised=True)
    for found, wanted in zip(features.queries_keys, expected[1:], strict=True):
        for a, b in zip(found, wanted, strict=True):
            assert (a.double() - b).norm() / b.norm() < 2e-2


@pytest.mark.parametrize("size", [(32, 48), (16, 64)])
def test_resizing_interpolates_positions_once(size: tuple[int, int]) -> None:
    backbone = VisionTransformer(TINY).eval()
    images = torch.randn(1, 3, *size)
    expected = backbone(images)
    backbone.resize(size)
    assert backbone.position_embedding.shape == (1, 1 + size[0] * size[1] // 64, 32)
    assert torch.equal(backbone(images), expected)
    with pytest.raises(ImageError, match="multiples of 8"):
        backbone.resize((33, 48))


def test_feature_views() -> None:
    backbone = randomised(TINY).eval()
    features = backbone.features(torch.randn(2, 3, 32, 48, dtype=torch.float64))
    assert features.queries_keys == []
    assert torch.equal(features.cls, features.tokens[:, 0])
    assert features.patches.shape == (2, 24, 32)
    for t in range(24):
        assert torch.equal(features.feature_map()[:, :, t // 6, t % 6], features.tokens[:, 1 + t])


def test_more_collected_than_there_are_blocks_gives_all() -> None:
    backbone = randomised(TINY).eval()
    assert len(backbone.features(torch.randn(1, 3, 32, 48, dtype=torch.float64), collect_last=9).queries_keys) == 3


def test_images_of_a_batch_do_not_see_each_other() -> None:
    backbone = randomised(TINY).float().eval()
    images = torch.randn(3, 3, 32, 48)
    alone = torch.cat([backbone(image[None]) for image in images])
    torch.testing.assert_close(backbone(images), alone, rtol=2e-2, atol=2e-2)
    set_lambda(backbone, 0.0)
    alone = torch.cat([backbone(image[None]) for image in images])
    torch.testing.assert_close(backbone(images), alone, rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_only() -> None:
    config = replace(TINY, dropout=0.5, embedding_dropout=0.5)
    backbone = randomised(config)
    images = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    set_lambda(backbone, 0.0)
    assert not torch.equal(backbone.train()(images), backbone(images))
    assert torch.equal(backbone.eval()(images), backbone(images))


# --- image sizes ---


def test_positions_are_the_learned_ones_at_the_trained_size() -> None:
    backbone = randomised(TINY)
    assert torch.equal(backbone.positions((4, 6)), backbone.position_embedding)


@pytest.mark.parametrize("grid", [(4, 4), (6, 4), (1, 1), (8, 12), (2, 3)])
def test_positions_are_interpolated_bicubically(grid: tuple[int, int]) -> None:
    backbone = randomised(TINY).float()
    positions = backbone.positions(grid)
    assert positions.shape == (1, 1 + grid[0] * grid[1], 32)
    assert torch.equal(positions[:, 0], backbone.position_embedding[:, 0])
    for channel in (0, 17):
        plane = backbone.position_embedding[0, 1:, channel].detach().reshape(1, 1, 4, 6).double()
        wanted = F.interpolate(plane, size=grid, mode="bicubic", align_corners=False).flatten()
        torch.testing.assert_close(positions[0, 1:, channel].double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_constant_embedding_stays_constant_and_a_transposed_grid_differs() -> None:
    backbone = randomised(TINY).float()
    assert not torch.allclose(backbone.positions((6, 4)), backbone.position_embedding)
    with torch.no_grad():
        backbone.position_embedding.fill_(0.75)
    torch.testing.assert_close(backbone.positions((7, 5)), torch.full((1, 36, 32), 0.75))


@pytest.mark.parametrize(("height", "width"), [(32, 48), (8, 8), (64, 24), (16, 96)])
def test_other_sizes_that_fit(height: int, width: int) -> None:
    backbone = VisionTransformer(TINY).eval()
    features = backbone.features(torch.randn(2, 3, height, width))
    assert features.grid == (height // 8, width // 8)
    assert features.tokens.shape == (2, 1 + height * width // 64, 32)
    assert torch.isfinite(features.tokens).all()


@pytest.mark.parametrize(
    ("height", "width", "fit"),
    [(33, 48, "32x48"), (32, 47, "32x48"), (39, 45, "40x48"), (4, 8, "8x8"), (1, 1, "8x8"), (0, 8, "8x8")],
)
def test_sizes_that_do_not_fit_are_refused(height: int, width: int, fit: str) -> None:
    backbone = VisionTransformer(TINY).eval()
    with pytest.raises(ImageError) as caught:
        backbone(torch.zeros(1, 3, height, width))
    message = str(caught.value)
    assert f"{height}x{width}" in message
    assert f"multiples of 8; resize to {fit}" in message


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (16, 16)])
def test_the_conv_stem_yields_one_token_a_patch(size: tuple[int, int]) -> None:
    config = replace(TINY, stem="conv", patch_size=16, stem_channels=(8, 12, 16), image_size=(32, 48))
    backbone = VisionTransformer(config).double().eval()
    set_lambda(backbone, 0.0)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    features = backbone.features(images)
    assert features.grid == (size[0] // 16, size[1] // 16)
    state = backbone.state_dict()
    x = images
    for i in range(3):
        stride, padding = (4, 0) if i == 0 else (2, 1)
        x = F.conv2d(x, state[f"stem.convs.{i}.weight"], state[f"stem.convs.{i}.bias"], stride, padding)
        x = norm(x.permute(0, 2, 3, 1), state, f"stem.norms.{i}").clamp(min=0).permute(0, 3, 1, 2)
    tokens = norm(linear(x.flatten(2).transpose(1, 2), state, "stem.project", False), state, "stem.norm_out")
    torch.testing.assert_close(backbone.stem(images), tokens, rtol=1e-9, atol=1e-9)
