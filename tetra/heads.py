"""Aggregation heads: from the backbone's tokens to one global descriptor.

Every head takes :class:`tetra.vit.Features` and gives L2-normalised descriptors, float [B, n_bits]; a
descriptor's bit is (value > 0). Normalising changes no sign, so ``values`` stops before it, for codes alone.
Letters: B images, C backbone width, T patches.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetra.config import BackboneConfig, HeadConfig
from tetra.errors import ConfigError, ImageError
from tetra.kernels import attention, attention_qkv
from tetra.layers import Conv2d, LayerNorm, Linear, resized, run
from tetra.vit import Features


class Head(nn.Module, ABC):
    """Base of the heads; ``n_bits`` is the descriptor's dimension."""

    n_bits: int

    @abstractmethod
    def values(self, features: Features) -> Tensor:
        """[B, n_bits] with the descriptor's signs, not normalised."""

    def forward(self, features: Features) -> Tensor:
        """Descriptors [B, n_bits], L2-normalised."""
        return F.normalize(self.values(features), dim=-1)


class _MultiheadAttention(nn.Module):
    """Multi-head attention with separate query and memory inputs, [B, Q, W] x [B, T, W] -> [B, Q, W]."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        if memory is x:
            return run(self, x, self._infer_self, lambda x: self._compose(x, x))
        return self._compose(x, memory)

    def _infer_self(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(attention_qkv(torch.cat([self.query(x), self.key_value(x)], dim=-1), self.n_heads))
        return y

    def _compose(self, x: Tensor, memory: Tensor) -> Tensor:
        b, n_queries, width = x.shape
        dim = width // self.n_heads
        q = self.query(x).reshape(b, n_queries, self.n_heads, dim).transpose(1, 2)
        k, v = self.key_value(memory).reshape(b, memory.shape[1], 2, self.n_heads, dim).permute(2, 0, 3, 1, 4)
        y = attention(q, k, v).transpose(1, 2).reshape(b, n_queries, width)
        y = self.out(y)
        return y


class _EncoderLayer(nn.Module):
    """Post-norm transformer encoder layer with a ReLU MLP four times as wide."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.attention = _MultiheadAttention(width, n_heads)
        self.norm_attention = LayerNorm(width)
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)
        self.norm_mlp = LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_attention(x + self.attention(x, x))
        x = self.norm_mlp(x + self.down(F.relu(self.up(x))))
        return x


class _BoQLayer(nn.Module):
    """Encoder layer over the tokens, self-attention over learned queries, then cross-attention."""

    def __init__(self, width: int, n_queries: int, n_heads: int) -> None:
        super().__init__()
        self.encoder = _EncoderLayer(width, n_heads)
        self.queries = nn.Parameter(torch.randn(1, n_queries, width))
        self.self_attention = _MultiheadAttention(width, n_heads)
        self.norm_queries = LayerNorm(width)
        self.cross_attention = _MultiheadAttention(width, n_heads)
        self.norm_out = LayerNorm(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.encoder(x)
        queries = self.queries.to(x.dtype)  # the same for every image
        queries = self.norm_queries(queries + self.self_attention(queries, queries)).expand(x.shape[0], -1, -1)
        return x, self.norm_out(self.cross_attention(queries, x))


class BoQ(Head):
    """Bag of learnable queries. Source: Ali-bey et al., arXiv 2405.07364. 12288 = 512 x 24 dimensions."""

    def __init__(
        self,
        backbone: BackboneConfig,
        *,
        channels: int = 512,
        n_queries: int = 64,
        n_layers: int = 2,
        n_heads: int = 8,
        out_rows: int = 24,
    ) -> None:
        super().__init__()
        self.reduce = Conv2d(backbone.width, channels, kernel_size=3, padding=1)
        self.norm = LayerNorm(channels)
        self.layers = nn.ModuleList(_BoQLayer(channels, n_queries, n_heads) for _ in range(n_layers))
        self.rows = Linear(n_layers * n_queries, out_rows)
        self.n_bits = channels * out_rows

    def values(self, features: Features) -> Tensor:
        x = self.norm(self.reduce(features.feature_map()).flatten(2).transpose(1, 2))
        outputs = []
        for layer in self.layers:
            x, out = layer(x)
            outputs.append(out)
        y: Tensor = self.rows(torch.cat(outputs, dim=1).transpose(1, 2))
        return y.flatten(1)


def sinkhorn(scores: Tensor, dustbin: Tensor, n_iterations: int) -> Tensor:
    """Log assignment of tokens to clusters and a dustbin by optimal transport (Sinkhorn in log space).

    Every token has mass 1, every cluster takes 1, the dustbin the remaining T - M (arXiv 2311.15937, eq. 3).

    Args:
        scores: float32 [B, M, T] for M clusters and T > M tokens.
        dustbin: scalar score of the dustbin.

    Returns:
        float32 [B, M + 1, T], log assignment; the dustbin is the last row.
    """
    b, m, t = scores.shape
    scores = torch.cat([scores, dustbin.to(scores.dtype).expand(b, 1, t)], dim=1)
    log_rows = scores.new_zeros(m + 1)
    log_rows[-1:].fill_(math.log(t - m))  # an assignment would copy from the CPU, which no CUDA graph records
    u, v = scores.new_zeros(b, m + 1), scores.new_zeros(b, t)
    for _ in range(n_iterations):
        u = log_rows - torch.logsumexp(scores + v[:, None, :], dim=2)
        v = -torch.logsumexp(scores + u[:, :, None], dim=1)
    return scores + u[:, :, None] + v[:, None, :]


class SALAD(Head):
    """Optimal-transport aggregation. Source: Izquierdo and Civera, arXiv 2311.15937.

    8448 = 256 (from CLS) + 64 clusters x 128 dimensions. Needs more patch tokens than clusters.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        *,
        n_clusters: int = 64,
        cluster_dim: int = 128,
        token_dim: int = 256,
        hidden_dim: int = 512,
        n_iterations: int = 3,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.n_clusters, self.n_iterations = n_clusters, n_iterations
        c = backbone.width

        def mlp(out: int, drop: float) -> nn.Sequential:
            return nn.Sequential(Linear(c, hidden_dim), nn.Dropout(drop), nn.ReLU(), Linear(hidden_dim, out))

        self.token = mlp(token_dim, 0.0)
        self.clusters = mlp(cluster_dim, dropout)
        self.scores = mlp(n_clusters, dropout)
        self.dustbin = nn.Parameter(torch.ones(()))
        self.n_bits = token_dim + n_clusters * cluster_dim

    def _parts(self, features: Features) -> tuple[Tensor, Tensor]:
        """Global token [B, token_dim] and clusters [B, cluster_dim, n_clusters]."""
        n_tokens = features.patches.shape[1]
        if n_tokens <= self.n_clusters:
            raise ImageError(
                f"the SALAD head has {self.n_clusters} clusters and the image only {n_tokens} patches "
                f"({features.grid[0]}x{features.grid[1]}); use a larger image"
            )
        local = self.clusters(features.patches)
        scores = self.scores(features.patches).transpose(1, 2).float()
        assignment = sinkhorn(scores, self.dustbin, self.n_iterations).exp()[:, :-1].to(local.dtype)
        return self.token(features.cls), (assignment @ local).transpose(1, 2)

    def values(self, features: Features) -> Tensor:
        token, clusters = self._parts(features)
        return torch.cat([token, clusters.flatten(1)], dim=-1)

    def forward(self, features: Features) -> Tensor:
        """Descriptors; the token and every cluster are normalised before the whole is."""
        token, clusters = self._parts(features)
        whole = torch.cat([F.normalize(token, dim=-1), F.normalize(clusters, dim=1).flatten(1)], dim=-1)
        return F.normalize(whole, dim=-1)


class _MixerLayer(nn.Module):
    """x + MLP(LayerNorm(x)) over the spatial axis."""

    def __init__(self, n_positions: int) -> None:
        super().__init__()
        self.norm = LayerNorm(n_positions)
        self.up, self.down = Linear(n_positions, n_positions), Linear(n_positions, n_positions)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.relu(self.up(self.norm(x))))
        return x


class MixVPR(Head):
    """Holistic feature mixing. Source: Ali-bey et al., arXiv 2303.02190. 4096 = 1024 channels x 4 rows.

    Mixing is over a fixed ``grid`` of positions (the backbone's own by default); feature maps of another shape
    are resampled to it.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        *,
        grid: tuple[int, int] | None = None,
        out_channels: int = 1024,
        mix_depth: int = 4,
        out_rows: int = 4,
    ) -> None:
        super().__init__()
        self.grid = (grid[0], grid[1]) if grid is not None else backbone.grid
        n_positions = self.grid[0] * self.grid[1]
        self.mix = nn.Sequential(*(_MixerLayer(n_positions) for _ in range(mix_depth)))
        self.channels = Linear(backbone.width, out_channels)
        self.rows = Linear(n_positions, out_rows)
        self.n_bits = out_channels * out_rows

    def values(self, features: Features) -> Tensor:
        x = resample(features.feature_map(), self.grid).flatten(2)
        x = self.channels(self.mix(x).transpose(1, 2)).transpose(1, 2)
        y: Tensor = self.rows(x)
        return y.flatten(1)

    @torch.no_grad()
    def initialize(self, features: Features) -> None:
        """Start training from a descriptor that works: tokens averaged over cells of the image, decorrelated.

        The mixer layers begin as the identity, a row as the mean of one cell of a ``out_rows``-cell raster, and
        the channels as centred, whitened principal components under a random rotation. Whitening makes every bit
        count the same, in the float descriptor too (Jegou and Chum, ECCV 2012).

        Args:
            features: of some hundred training images.
        """
        for layer in self.mix:
            assert isinstance(layer, _MixerLayer)
            nn.init.zeros_(layer.down.weight)
            nn.init.zeros_(layer.down.bias)
        n = self.grid[0] * self.grid[1]
        cells = _raster(self.rows.out_features, self.grid)
        masks = torch.eye(n, device=self.rows.weight.device).reshape(n, 1, *self.grid)
        pooling = F.adaptive_avg_pool2d(masks, cells).reshape(n, -1).T
        self.rows.weight.copy_(pooling)
        nn.init.zeros_(self.rows.bias)
        x = resample(features.feature_map().float(), self.grid).flatten(2) @ pooling.T
        x = x.transpose(1, 2).flatten(0, 1).double()
        mean = x.mean(0)
        variances, directions = torch.linalg.eigh(torch.cov((x - mean).T))
        out = self.channels.out_features
        kept = directions[:, -out:] * variances[-out:].clamp(min=variances[-1] * 1e-4) ** -0.5
        rotation = torch.linalg.qr(torch.randn(out, kept.shape[1], dtype=torch.float64, device=x.device).T)[0].T
        weight = rotation @ kept.T if kept.shape[1] >= out else torch.randn(out, kept.shape[1]).to(kept) @ kept.T
        weight = weight / weight.norm(dim=1).mean()
        self.channels.weight.copy_(weight)
        self.channels.bias.copy_(-(weight @ mean))


def _raster(n_cells: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The rows x columns = ``n_cells`` whose cells are nearest to squares on ``grid``."""
    shapes = [(r, n_cells // r) for r in range(1, n_cells + 1) if n_cells % r == 0]
    return min(shapes, key=lambda s: abs(math.log((grid[0] / s[0]) / (grid[1] / s[1]))))


def resample(feature_map: Tensor, grid: tuple[int, int]) -> Tensor:
    """Area-aware resampling of [B, C, rows, columns] to ``grid``; the identity where the shape is right."""
    if tuple(feature_map.shape[-2:]) == grid:
        return feature_map
    if all(s % g == 0 for s, g in zip(feature_map.shape[-2:], grid, strict=True)):
        return resized(feature_map, lambda x: F.adaptive_avg_pool2d(x, grid))
    # PyTorch's antialiased filter has no half precision on CPUs.
    wide = feature_map.to(torch.promote_types(feature_map.dtype, torch.float32))
    wide = resized(wide, lambda x: F.interpolate(x, size=grid, mode="bilinear", antialias=True, align_corners=False))
    return wide.to(feature_map.dtype)


class GeM(Head):
    """Generalised mean per channel over the patch tokens (CLS excluded), then a linear layer to 2048.

    (mean_t max(x, 1e-6)^p)^(1/p): only positive values take part; p is learned, 3 at the start.
    Source: Radenovic et al., arXiv 1711.02512.
    """

    def __init__(self, backbone: BackboneConfig, *, out_dim: int = 2048, p: float = 3.0) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(float(p)))
        self.project = Linear(backbone.width, out_dim)
        self.n_bits = out_dim

    def values(self, features: Features) -> Tensor:
        # Powers of values near zero leave the range of half precision.
        p = self.p.float()
        pooled = features.patches.float().clamp(min=1e-6).pow(p).mean(1).pow(1.0 / p)
        y: Tensor = self.project(pooled.to(features.tokens.dtype))
        return y


HEADS: dict[str, type[Head]] = {"boq": BoQ, "salad": SALAD, "mixvpr": MixVPR, "gem": GeM}


def create_head(config: HeadConfig, backbone: BackboneConfig) -> Head:
    """Build a head.

    Raises:
        ConfigError: an option is not one of the head's keyword arguments, or does not fit.
    """
    cls = HEADS[config.kind]
    known = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "backbone")]
    for key in config.options:
        if key not in known:
            raise ConfigError(f"head '{config.kind}': unknown option '{key}'; known: {', '.join(known)}")
        value = config.options[key]
        if isinstance(value, (int, float)) and value < 0:
            raise ConfigError(f"head '{config.kind}': '{key}' is {value}, expected at least 0")
    try:
        head = cls(backbone, **config.options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"head '{config.kind}': options {config.options} do not fit: {error}") from None
    if head.n_bits < 8 or head.n_bits % 8:
        raise ConfigError(f"head '{config.kind}': {head.n_bits} dimensions, expected a multiple of 8 to pack")
    return head
