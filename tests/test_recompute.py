"""What is made again in the backward pass: the same results and gradients, bit for bit, from fewer kept bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tetra.config import BackboneConfig
from tetra.kernels.backend import backend_for
from tetra.layers import set_lambda
from tetra.saved_tensors import count_saved, total_bytes
from tetra.timing import forced_backend
from tetra.vit import Recompute, VisionTransformer

TINY = BackboneConfig(
    width=32, depth=3, n_heads=2, head_dim=12, mlp_dim=48, image_size=(32, 48), patch_size=8, dropout=0.2
)
Found = tuple[list[Tensor], int]


def step(backbone: VisionTransformer, recompute: Recompute, n_collected: int, autocast: bool) -> Found:
    """Tokens, queries and keys, all gradients and the next random number; and how many bytes were kept."""
    backbone.recompute = recompute
    backbone.zero_grad()
    torch.manual_seed(3)
    images = torch.linspace(-2, 2, 2 * 3 * 32 * 48).sin().reshape(2, 3, 32, 48)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), count_saved(backbone, [images]) as saved:
        features = backbone.features(images, n_collected)
        kept = total_bytes(saved())
        loss = features.tokens.square().sum()
        for i, (q, k) in enumerate(features.queries_keys):
            loss = loss + (q * k.flip(2)).sum() * (i + 1)
    following = torch.rand(3)
    loss.backward()
    outputs = [features.tokens.detach(), *(t.detach() for pair in features.queries_keys for t in pair)]
    assert len(features.queries_keys) == n_collected
    return [*outputs, following, *(p.grad for p in backbone.parameters() if p.grad is not None)], kept


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("n_collected", [0, 2])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_gradients_are_the_same_bits(backend: str | None, n_collected: int, autocast: bool, lam: float) -> None:
    backbone = VisionTransformer(replace(TINY, embedding_dropout=0.1))
    set_lambda(backbone, lam)
    with forced_backend(backend):
        expected, all_bytes = step(backbone, "nothing", n_collected, autocast)
        assert len(expected) == 2 + 2 * n_collected + len(list(backbone.parameters()))
        kept = [all_bytes]
        for recompute in ("attention", "blocks"):
            found, n_bytes = step(backbone, recompute, n_collected, autocast)  # type: ignore[arg-type]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            kept.append(n_bytes)
    assert kept[0] > 1.2 * kept[1] > 1.2 * 1.2 * kept[2]


def test_masks_differ_from_step_to_step() -> None:
    """So that the tests above compare more than one mask with itself."""
    backbone = VisionTransformer(TINY)
    images = torch.ones(1, 3, 32, 48)
    assert not torch.equal(backbone(images), backbone(images))


@pytest.mark.parametrize("recompute", ["attention", "blocks"])
def test_nothing_is_kept_or_made_again_without_a_gradient(recompute: Recompute) -> None:
    backbone = VisionTransformer(replace(TINY, dropout=0.0))
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        expected = backbone(images), backbone.eval()(images)
    evaluated = backbone(images)
    backbone.recompute = recompute
    assert torch.equal(backbone(images), evaluated)
    with count_saved(backbone) as saved, torch.no_grad():
        assert torch.equal(backbone(images), expected[1])
        assert torch.equal(backbone.train()(images), expected[0])
        assert saved() == []


@pytest.mark.parametrize("recompute", ["attention", "blocks"])
def test_frozen_blocks_are_left_alone(recompute: Recompute) -> None:
    """Stage 2: the last block trains, those before it infer."""
    found = []
    for chosen in ("nothing", recompute):
        torch.manual_seed(1)
        backbone = VisionTransformer(replace(TINY, dropout=0.0)).eval().requires_grad_(False)
        backbone.blocks[-1].train().requires_grad_(True)
        backbone.recompute = chosen  # type: ignore[assignment]
        backbone(torch.linspace(-1, 1, 3 * 32 * 48).reshape(1, 3, 32, 48)).square().sum().backward()
        found.append([p.grad for p in backbone.parameters() if p.grad is not None])
    assert len(found[0]) == len(list(backbone.blocks[-1].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("fused_training")
def test_what_a_fused_block_keeps() -> None:
    """Its input, q, k and v, the result of attention, the branch that ends it and the MLP's hidden values; no sums."""
    backbone = VisionTransformer(TINY)
    set_lambda(backbone, 0.5)
    assert backend_for(torch.empty(0)) == "native"
    b, t, d, inner, hidden = 2, 25, TINY.width, TINY.n_heads * TINY.head_dim, TINY.mlp_dim
    expected: dict[Recompute, int] = {
        "nothing": b * t * (4 * d + 2 * (4 * inner + d + hidden)),
        "attention": b * t * (4 * d + 2 * (d + hidden)),
        "blocks": b * t * 4 * d,
    }
    x = torch.randn(b, t, d, requires_grad=True)
    for recompute, n_bytes in expected.items():
        with torch.autocast("cpu", torch.bfloat16), count_saved(backbone) as saved:
            y = backbone.blocks[0](x, None, recompute)
            n_seeds = 3 if recompute != "blocks" else 0
            assert total_bytes(saved()) == n_bytes + 8 * n_seeds
        assert y.dtype == torch.float32
