"""Aggregation heads against implementations of their own, written from the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetra.config import BACKBONES, BackboneConfig, HeadConfig
from tetra.errors import ConfigError, ImageError
from tetra.heads import GeM, Head, MixVPR, create_head, resample, sinkhorn
from tetra.vit import Features

BACKBONE = BackboneConfig(width=24, depth=1, n_heads=2, head_dim=12, mlp_dim=48, image_size=(32, 48), patch_size=8)
OPTIONS: dict[str, dict[str, Any]] = {
    "boq": {"channels": 32, "n_queries": 5, "n_layers": 2, "n_heads": 4, "out_rows": 3},
    "salad": {"n_clusters": 6, "cluster_dim": 8, "token_dim": 16, "hidden_dim": 20},
    "mixvpr": {"out_channels": 16, "mix_depth": 2, "out_rows": 3},
    "gem": {"out_dim": 40},
}
DIMENSIONS = {"boq": 32 * 3, "salad": 16 + 6 * 8, "mixvpr": 48, "gem": 40}
KINDS = sorted(OPTIONS)


def features_of(batch: int = 2, grid: tuple[int, int] = (4, 6), width: int = 24) -> Features:
    return Features(torch.randn(batch, 1 + grid[0] * grid[1], width, dtype=torch.float64), grid)


def tiny_head(kind: str, **options: Any) -> Head:
    head = create_head(HeadConfig(kind, OPTIONS[kind] | options), BACKBONE).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name not in ("p", "dustbin"):
                parameter.normal_(0.0, 0.3)
    return head


@pytest.mark.parametrize(("kind", "dimensions"), [("boq", 12288), ("salad", 8448), ("mixvpr", 4096), ("gem", 2048)])
def test_stock_dimensions(kind: str, dimensions: int) -> None:
    with torch.device("meta"):
        head = create_head(HeadConfig(kind), BACKBONES["vit-b"])  # type: ignore[arg-type]
        out = head.eval()(Features(torch.zeros(1, 530, 768), (23, 23)))
    assert head.n_bits == dimensions
    assert out.shape == (1, dimensions)


@pytest.mark.parametrize("kind", KINDS)
def test_descriptors_are_unit_vectors(kind: str) -> None:
    head = tiny_head(kind)
    out = head(features_of(3))
    assert out.shape == (3, DIMENSIONS[kind])
    torch.testing.assert_close(out.norm(dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (3, 3), (8, 12), (5, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_other_grids(kind: str, grid: tuple[int, int]) -> None:
    out = tiny_head(kind)(features_of(2, grid))
    assert out.shape == (2, DIMENSIONS[kind])
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_inference_in_every_dtype_is_near_float64(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    head, features = tiny_head(kind), features_of()
    expected = head(features)
    narrow = Features(features.tokens.to(dtype), features.grid)
    with torch.no_grad():
        found = head.to(dtype)(narrow)
    assert found.dtype == dtype
    assert (found.double() - expected).norm(dim=1).max() < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_values_before_the_normalisation_have_the_descriptors_signs(kind: str) -> None:
    head, features = tiny_head(kind), features_of(3)
    assert torch.equal(head.values(features) > 0, head(features) > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_keeps_the_gradient(kind: str) -> None:
    head, features = tiny_head(kind).float(), features_of()
    upstream = torch.randn(2, DIMENSIONS[kind])
    gradients = []
    for dtype in (torch.float64, torch.float32):
        head.zero_grad()
        head.to(dtype)(Features(features.tokens.to(dtype), features.grid)).backward(upstream.to(dtype))
        gradients.append({name: p.grad.double() for name, p in head.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {name for name, _ in head.named_parameters()}
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-3 * expected.norm() + 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind: str) -> None:
    assert tiny_head(kind)(features_of(0)).shape == (0, DIMENSIONS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_batch_do_not_see_each_other(kind: str) -> None:
    head, features = tiny_head(kind), features_of(3)
    alone = torch.cat([head(Features(features.tokens[i : i + 1], features.grid)) for i in range(3)])
    torch.testing.assert_close(head(features), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    head = tiny_head(kind).train()
    out = head(features_of(4))
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_options_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"head '{kind}': unknown option 'chanels'; known: "):
        create_head(HeadConfig(kind, {"chanels": 3}), BACKBONE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        ("gem", {"out_dim": 12}, "multiple of 8"),
        ("gem", {"out_dim": "many"}, "do not fit"),
        ("gem", {"p": "three"}, "do not fit"),
        ("mixvpr", {"grid": 7}, "do not fit"),
        ("mixvpr", {"mix_depth": -1}, "'mix_depth' is -1, expected at least 0"),
        ("gem", {"out_dim": 0}, "0 dimensions, expected a multiple of 8"),
    ],
)
def test_options_that_can_not_be_are_refused(kind: str, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        create_head(HeadConfig(kind, options), BACKBONE)  # type: ignore[arg-type]
    assert f"head '{kind}'" in str(caught.value)


# --- BoQ ---


def copy_attention(ours: nn.Module, theirs: nn.MultiheadAttention) -> None:
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())


def test_boq_against_torch_modules() -> None:
    head, features = tiny_head("boq"), features_of()
    state = head.state_dict()
    x = F.conv2d(features.feature_map(), state["reduce.weight"], state["reduce.bias"], padding=1)
    x = F.layer_norm(x.flatten(2).transpose(1, 2), (32,), state["norm.weight"], state["norm.bias"])
    outputs = []
    for layer in head.layers:
        encoder = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, batch_first=True).double()
        copy_attention(layer.encoder.attention, encoder.self_attn)
        for theirs, ours in (
            ("linear1", "up"),
            ("linear2", "down"),
            ("norm1", "norm_attention"),
            ("norm2", "norm_mlp"),
        ):
            getattr(encoder, theirs).load_state_dict(getattr(layer.encoder, ours).state_dict())
        self_attention = nn.MultiheadAttention(32, 4, batch_first=True).double()
        cross_attention = nn.MultiheadAttention(32, 4, batch_first=True).double()
        copy_attention(layer.self_attention, self_attention)
        copy_attention(layer.cross_attention, cross_attention)
        x = encoder(x)
        queries = layer.queries.expand(2, -1, -1)
        queries = layer.norm_queries(queries + self_attention(queries, queries, queries)[0])
        outputs.append(layer.norm_out(cross_attention(queries, x, x)[0]))
    stacked = torch.cat(outputs, dim=1)  # [B, 2 * 5 queries, 32]
    rows = torch.einsum("bqc,rq->bcr", stacked, state["rows.weight"]) + state["rows.bias"]
    expected = rows.flatten(1) / rows.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(features), expected)


# --- SALAD ---


def sinkhorn_loop(scores: Tensor, dustbin: float, n_iterations: int) -> Tensor:
    """Sinkhorn on plain probabilities, token by token and cluster by cluster, for one image [M, T]."""
    m, t = scores.shape
    kernel = torch.exp(torch.cat([scores.detach(), torch.full((1, t), dustbin, dtype=scores.dtype)]))
    mass = [1.0] * m + [float(t - m)]
    a, b = [1.0] * (m + 1), [1.0] * t
    for _ in range(n_iterations):
        a = [mass[i] / sum(float(kernel[i, j]) * b[j] for j in range(t)) for i in range(m + 1)]
        b = [1.0 / sum(float(kernel[i, j]) * a[i] for i in range(m + 1)) for j in range(t)]
    return kernel * torch.tensor(a, dtype=scores.dtype)[:, None] * torch.tensor(b, dtype=scores.dtype)


@pytest.mark.parametrize(("m", "t", "iterations"), [(1, 2, 3), (4, 9, 3), (6, 24, 1), (6, 7, 5)])
def test_sinkhorn_against_a_loop(m: int, t: int, iterations: int) -> None:
    scores = torch.randn(2, m, t, dtype=torch.float64) * 2
    found = sinkhorn(scores, torch.tensor(0.7, dtype=torch.float64), iterations).exp()
    expected = torch.stack([sinkhorn_loop(image, 0.7, iterations) for image in scores])
    torch.testing.assert_close(found, expected)


def test_sinkhorn_marginals() -> None:
    scores = torch.randn(3, 5, 20, dtype=torch.float64) * 3
    plan = sinkhorn(scores, torch.tensor(1.0), 500).exp()
    torch.testing.assert_close(plan.sum(1), torch.ones(3, 20, dtype=torch.float64))
    torch.testing.assert_close(plan[:, :-1].sum(2), torch.ones(3, 5, dtype=torch.float64))
    torch.testing.assert_close(plan[:, -1].sum(1), torch.full((3,), 15.0, dtype=torch.float64))
    # After any number of iterations every token is given away whole.
    few = sinkhorn(scores, torch.tensor(1.0), 3).exp()
    torch.testing.assert_close(few.sum(1), torch.ones(3, 20, dtype=torch.float64))


def test_sinkhorn_survives_large_scores() -> None:
    assert torch.isfinite(sinkhorn(torch.randn(1, 4, 9) * 1000, torch.tensor(1.0), 3)).all()


def test_salad_against_a_plain_one() -> None:
    head, features = tiny_head("salad"), features_of()

    def mlp(name: str, x: Tensor) -> Tensor:
        layers = getattr(head, name)
        hidden = (x @ layers[0].weight.T + layers[0].bias).clamp(min=0)
        return hidden @ layers[3].weight.T + layers[3].bias

    expected = []
    for tokens in features.tokens:
        local = mlp("clusters", tokens[1:])  # [T, 8]
        # The transport itself runs in float32 at least.
        plan = sinkhorn_loop(mlp("scores", tokens[1:]).T, 1.0, 3)[:-1]  # [6, T], without the dustbin
        clusters = torch.stack([(row[:, None] * local).sum(0) for row in plan])
        clusters = clusters / clusters.norm(dim=1, keepdim=True)
        token = mlp("token", tokens[0])
        # Dimension by dimension, clusters within.
        whole = torch.cat([token / token.norm(), clusters.T.flatten()])
        expected.append(whole / whole.norm())
    torch.testing.assert_close(head(features), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_salad_with_too_few_patches() -> None:
    head = tiny_head("salad")
    for grid in ((2, 3), (1, 2)):
        with pytest.raises(ImageError, match=rf"6 clusters .* only {grid[0] * grid[1]} patches .*larger image"):
            head(features_of(1, grid))
    head(features_of(1, (1, 7)))


# --- MixVPR ---


def test_mixvpr_against_a_plain_one() -> None:
    head, features = tiny_head("mixvpr"), features_of()
    x = features.patches.transpose(1, 2)  # [B, C, T]
    for layer in head.mix:
        y = F.layer_norm(x, (24,), layer.norm.weight, layer.norm.bias)
        y = torch.relu(y @ layer.up.weight.T + layer.up.bias) @ layer.down.weight.T + layer.down.bias
        x = x + y
    x = torch.einsum("bct,oc->bot", x, head.channels.weight) + head.channels.bias[:, None]
    x = torch.einsum("bot,rt->bor", x, head.rows.weight) + head.rows.bias
    expected = x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(features), expected)


def test_mixvpr_resamples_to_its_own_grid() -> None:
    head = tiny_head("mixvpr", grid=[2, 3])
    features = features_of(2, (4, 6))
    pooled = features.feature_map().reshape(2, 24, 2, 2, 3, 2).mean((3, 5))
    tokens = torch.cat([features.tokens[:, :1], pooled.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(head(features), head(Features(tokens, (2, 3))))


def test_resampling_keeps_constants_and_the_right_grid() -> None:
    x = torch.randn(1, 2, 4, 6)
    assert resample(x, (4, 6)) is x
    for grid in ((2, 3), (3, 5), (7, 9), (1, 1)):
        torch.testing.assert_close(resample(torch.full((1, 2, 4, 6), 2.5), grid), torch.full((1, 2, *grid), 2.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_resampling_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = torch.rand(1, 2, 4, 6).to(dtype)
    out = resample(x, (3, 5))
    assert out.dtype == dtype
    torch.testing.assert_close(out, resample(x.double(), (3, 5)).to(dtype))


@pytest.mark.parametrize(("width", "out_channels"), [(24, 16), (24, 24), (24, 40)])
def test_mixvpr_starts_from_averaged_decorrelated_tokens(width: int, out_channels: int) -> None:
    backbone = BackboneConfig(
        width=width, depth=1, n_heads=2, head_dim=12, mlp_dim=48, image_size=(32, 48), patch_size=8
    )
    head = MixVPR(backbone, out_channels=out_channels, out_rows=6).eval()
    mixing = torch.randn(width, width)
    features = Features(torch.randn(64, 25, width) @ mixing + 5.0, (4, 6))
    head.initialize(features)
    cells = features.feature_map().reshape(64, width, 2, 2, 3, 2).mean((3, 5)).flatten(2)  # 2 x 3 cells
    projected = torch.einsum("bct,oc->bot", cells, head.channels.weight) + head.channels.bias[:, None]
    expected = F.normalize(projected.flatten(1), dim=1)
    found = head(features)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    # Centred: every bit is about as often on as off, over a data set with a mean of 5.
    share = (found > 0).float().mean(0)
    assert share.min() > 0.1
    assert share.max() < 0.9


# --- GeM ---


@pytest.mark.parametrize("p", [1.0, 3.0, 4.5])
def test_gem_against_a_plain_one(p: float) -> None:
    head, features = tiny_head("gem", p=p), features_of()
    expected = []
    for tokens in features.tokens:
        pooled = [
            (sum(max(float(v), 1e-6) ** p for v in tokens[1:, c]) / (len(tokens) - 1)) ** (1 / p) for c in range(24)
        ]
        y = torch.tensor(pooled, dtype=torch.float64) @ head.project.weight.T + head.project.bias
        expected.append(y / y.norm())
    torch.testing.assert_close(head(features), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_gem_sees_neither_cls_nor_negative_values() -> None:
    head, features = tiny_head("gem"), features_of()
    before = head(features)
    changed = features.tokens.clone()
    changed[:, 0] = 1e3
    patches = changed[:, 1:]
    patches[patches < 0] = -1e3
    assert torch.equal(head(Features(changed, features.grid)), before)
    patches[:, 3] = patches[:, 3].abs() + 1.0
    assert not torch.equal(head(Features(changed, features.grid)), before)


def test_gem_learns_p() -> None:
    head = GeM(BACKBONE, out_dim=16)
    assert head.p.item() == 3.0
    assert head.p.requires_grad
    assert GeM(BACKBONE, out_dim=16, p=2).p.item() == 2.0


def test_gem_in_half_precision_stays_finite() -> None:
    head = GeM(BACKBONE, out_dim=16).eval()
    tokens = (torch.rand(2, 25, 24) * 60).to(
        torch.bfloat16
    )  # 60^3 is beyond float16, sums of it beyond bfloat16's digits
    out = head(Features(tokens, (4, 6)))
    assert out.dtype == torch.bfloat16
    reference = head(Features(tokens.float(), (4, 6)))
    torch.testing.assert_close(out.float(), reference, rtol=5e-2, atol=1e-2)
