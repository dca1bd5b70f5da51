"""Ternary vision transformer, as in TeTRA-VPR (arXiv 2503.02511).

Letters: B images, T patches (CLS not counted), D width, H heads, E head dim.

Stems and blocks are written twice, composed of layers to train and in fused kernels to infer; see
:func:`tetra.layers.run`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tetra.config import BackboneConfig
from tetra.errors import ImageError
from tetra.kernels import attention, attention_qkv, attention_train, layer_norm, patch_rows, query_scale
from tetra.layers import (
    Conv2d,
    LayerNorm,
    Linear,
    TernaryLinear,
    add_dropped,
    norm_linear,
    resized,
    run,
    train_linear,
    train_linear_after,
    trains_fused,
)

Colours = tuple[float, float, float]
QueriesKeys = tuple[Tensor, Tensor]
Collected = list[QueriesKeys]
LinearFactory = Callable[..., nn.Module]

Recompute = Literal["nothing", "attention", "blocks"]
"""What the backward pass makes again instead of keeping it: see :class:`VisionTransformer`."""


class PatchEmbedding(nn.Module):
    """Flattened patches -> LayerNorm -> Linear -> LayerNorm. Patches flatten as (row, column, channel)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        n_values = 3 * config.patch_size**2
        self.norm_in = LayerNorm(n_values)
        self.project = Linear(n_values, config.width)
        self.norm_out = LayerNorm(config.width)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, T, D]."""
        b, c, h, w = images.shape
        p = self.patch_size
        rows, columns = h // p, w // p
        patches = images.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
        patches = patches.reshape(b, rows * columns, p * p * c)
        tokens: Tensor = self.norm_out(train_linear(patches, self.project, self.norm_in))
        return tokens

    def infer(self, images: Tensor, mean: Colours, std: Colours, dtype: torch.dtype) -> Tensor:
        """The same of images that are not normalised, uint8 or float in [0, 1], computed in ``dtype``."""
        norm = self.norm_in
        rows = patch_rows(
            images, self.patch_size, norm.weight, norm.bias, norm.eps, mean=mean, std=std, out_dtype=dtype
        )
        tokens: Tensor = self.norm_out(self.project(rows))
        return tokens


class ConvStem(nn.Module):
    """Strided convolutions (x4, then x2 each) with LayerNorm over channels and ReLU, then a linear projection.

    A few early convolutions make small transformers learn much faster (Xiao et al., arXiv 2106.14881).
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        channels = config.stem_channels
        self.convs = nn.ModuleList([Conv2d(3, channels[0], kernel_size=4, stride=4)])
        for c_in, c_out in pairwise(channels):
            self.convs.append(Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1))
        self.norms = nn.ModuleList(LayerNorm(c) for c in channels)
        self.project = Linear(channels[-1], config.width)
        self.norm_out = LayerNorm(config.width)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, T, D]."""
        x = images.contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            # Channels-last storage makes the permutes free, and LayerNorm runs over contiguous channels.
            x = F.relu(norm(conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        tokens: Tensor = self.norm_out(self.project(x.permute(0, 2, 3, 1).flatten(1, 2)))
        return tokens


class Attention(nn.Module):
    """Pre-norm self-attention with a second LayerNorm before the output projection."""

    def __init__(self, config: BackboneConfig, linear: LinearFactory) -> None:
        super().__init__()
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.norm = LayerNorm(config.width)
        self.qkv = linear(config.width, 3 * config.inner_dim, bias=False)
        self.norm_out = LayerNorm(config.inner_dim)
        self.out = linear(config.inner_dim, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, collect: Collected | None = None) -> Tensor:
        """[B, 1 + T, D] -> the same; queries and keys [B, H, 1 + T, E] are appended to ``collect``."""
        y, queries_keys = self.branch(x)
        if collect is not None:
            collect.append(queries_keys)
        return add_dropped(None, y, self.dropout)

    def branch(self, x: Tensor) -> tuple[Tensor, QueriesKeys]:
        """[B, 1 + T, D] -> the same, before the dropout; and queries and keys, [B, H, 1 + T, E] each."""
        b, t, _ = x.shape
        qkv = train_linear(x, self.qkv, self.norm)
        q, k, v = qkv.view(b, t, 3, self.n_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if trains_fused(x, self):
            y = attention_train(qkv, self.n_heads)
        else:
            y = attention(q, k, v).transpose(1, 2).flatten(2)
        return train_linear(y, self.out, self.norm_out), (q, k)


class Mlp(nn.Module):
    """LayerNorm -> up -> GELU (erf) -> LayerNorm, in ternary blocks only -> down."""

    def __init__(self, config: BackboneConfig, linear: LinearFactory, inner_norm: bool) -> None:
        super().__init__()
        self.norm = LayerNorm(config.width)
        self.up = linear(config.width, config.mlp_dim)
        self.norm_down = LayerNorm(config.mlp_dim) if inner_norm else nn.Identity()
        self.down = linear(config.mlp_dim, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1 + T, D] -> the same."""
        return add_dropped(None, self.second_half(train_linear(x, self.up, self.norm)), self.dropout)

    def second_half(self, hidden: Tensor) -> Tensor:
        """[B, 1 + T, hidden width], before the GELU -> [B, 1 + T, D], before the last dropout."""
        return train_linear(hidden, self.down, self.norm_down, gelu=True, dropout=self.dropout)


Attend = Callable[[Tensor], tuple[Tensor, QueriesKeys]]


def _made_again(function: Attend, x: Tensor, collected: bool) -> tuple[Tensor, QueriesKeys]:
    """function(x), of which x alone is kept for the backward pass, and the state of the random numbers."""

    def run(x: Tensor) -> tuple[Tensor, QueriesKeys]:
        y, (q, k) = function(x)
        return y, (_apart(q), _apart(k)) if collected else (q, k)

    made: tuple[Tensor, QueriesKeys] = checkpoint(run, x, use_reentrant=False)
    return made


def _apart(heads: Tensor) -> Tensor:
    """A copy of [B, H, T, E], laid out like a projection: as a view it would keep queries, keys and values alive."""
    return heads.transpose(1, 2).clone().transpose(1, 2)


class Block(nn.Module):
    """One transformer block; ``ternary`` chooses the linear layers and the MLP's inner norm."""

    def __init__(self, config: BackboneConfig, ternary: bool) -> None:
        super().__init__()
        self.ternary = ternary
        linear: LinearFactory = TernaryLinear if ternary else Linear
        self.attention = Attention(config, linear)
        self.mlp = Mlp(config, linear, inner_norm=ternary)

    def forward(self, x: Tensor, collect: Collected | None = None, recompute: Recompute = "nothing") -> Tensor:
        """[B, 1 + T, D] -> the same; queries and keys are appended to ``collect``, see :class:`Attention`."""
        if collect is not None or self._is_blended() or self.training:
            return self._compose(x, collect, recompute)
        return run(self, x, self._infer_ternary if self.ternary else self._infer_full, self._compose)

    def _is_blended(self) -> bool:
        layers = (self.attention.qkv, self.attention.out, self.mlp.up, self.mlp.down)
        return any(isinstance(layer, TernaryLinear) and layer.lam < 1.0 for layer in layers)

    def _compose(self, x: Tensor, collect: Collected | None = None, recompute: Recompute = "nothing") -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            recompute = "nothing"
        if recompute == "blocks":
            x, queries_keys = _made_again(self._branches, x, collect is not None)
        elif recompute == "attention":
            attend = partial(_made_again, self.attention.branch, collected=collect is not None)
            x, queries_keys = self._branches(x, attend)
        else:
            x, queries_keys = self._branches(x)
        if collect is not None:
            collect.append(queries_keys)
        return x

    def _branches(self, x: Tensor, attend: Attend | None = None) -> tuple[Tensor, QueriesKeys]:
        """The stream after both branches, and queries and keys; ``attend`` computes the first branch."""
        y, queries_keys = (attend or self.attention.branch)(x)
        if trains_fused(x, self):
            hidden, x = train_linear_after(x, y, self.attention.dropout, self.mlp.up, self.mlp.norm)
            return add_dropped(x, self.mlp.second_half(hidden), self.mlp.dropout), queries_keys
        x = add_dropped(x, y, self.attention.dropout)
        return x + self.mlp(x), queries_keys

    def _infer_ternary(self, x: Tensor) -> Tensor:
        """Nine kernels: LayerNorm with quantisation, then a product, four times; attention after the first."""
        attention, mlp = self.attention, self.mlp
        n_queries, scale = attention.n_heads * attention.head_dim, query_scale(attention.head_dim)
        qkv = norm_linear(x, attention.norm, attention.qkv, scaled_columns=n_queries, column_scale=scale)
        y = attention_qkv(qkv, attention.n_heads, prescaled=True)
        x = norm_linear(y, attention.norm_out, attention.out, residual=x)
        hidden = norm_linear(x, mlp.norm, mlp.up, gelu=True)
        return norm_linear(hidden, mlp.norm_down, mlp.down, residual=x)

    def _infer_full(self, x: Tensor) -> Tensor:
        """Full precision: the products are the library's."""
        attention, mlp = self.attention, self.mlp
        y = attention_qkv(attention.qkv(attention.norm(x)), attention.n_heads)
        y = attention.out(attention.norm_out(y))
        y, x = layer_norm(y, mlp.norm.weight, mlp.norm.bias, mlp.norm.eps, residual=x)
        out: Tensor = x + mlp.down(F.gelu(mlp.up(y)))
        return out


@dataclass
class Features:
    """What the backbone makes of a batch.

    Attributes:
        tokens: [B, 1 + T, D], CLS first.
        grid: patch rows and columns, T = rows * columns.
        queries_keys: for the last blocks asked for, (queries, keys), each [B, H, 1 + T, E].
    """

    tokens: Tensor
    grid: tuple[int, int]
    queries_keys: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def cls(self) -> Tensor:
        """[B, D]."""
        return self.tokens[:, 0]

    @property
    def patches(self) -> Tensor:
        """[B, T, D]."""
        return self.tokens[:, 1:]

    def feature_map(self) -> Tensor:
        """[B, D, rows, columns]."""
        return self.patches.transpose(1, 2).unflatten(2, self.grid)


class VisionTransformer(nn.Module):
    """The backbone: stem, CLS token, learned position embedding, blocks. No norm after the last block.

    Attributes:
        recompute: less memory for more time while training. "nothing" keeps what each layer needs; "attention" keeps
            of the attention half of every block its input alone, and computes the rest again in the backward pass;
            "blocks" does so with whole blocks. Results and gradients are the same, bit for bit.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute: Recompute = "nothing"
        self.stem = ConvStem(config) if config.stem == "conv" else PatchEmbedding(config)
        n_patches = config.grid[0] * config.grid[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + n_patches, config.width))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.02)
        self.dropout = nn.Dropout(config.embedding_dropout)
        first_full = config.depth - config.full_precision_blocks
        self.blocks = nn.ModuleList(Block(config, ternary=i < first_full) for i in range(config.depth))

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patch rows and columns of an image.

        Raises:
            ImageError: a side is not a positive multiple of the patch size; names the nearest size that fits.
        """
        p = self.config.patch_size
        if height % p or width % p or height < p or width < p:
            fit = tuple(max(p, round(s / p) * p) for s in (height, width))
            raise ImageError(
                f"image size {height}x{width} (height x width) does not fit: both sides must be multiples of "
                f"{p}; resize to {fit[0]}x{fit[1]}"
            )
        return height // p, width // p

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding [1, 1 + T, D] for ``grid``, interpolated bicubically from the trained grid."""
        embedding = self.position_embedding
        if grid == self.config.grid:
            return embedding
        patches = embedding[:, 1:].float().transpose(1, 2).unflatten(2, self.config.grid)
        patches = resized(patches, lambda x: F.interpolate(x, size=grid, mode="bicubic", align_corners=False))
        # Joined in float32: autocast to bfloat16 refuses to join float16, the dtype in which packed weights may rest.
        joined = torch.cat([embedding[:, :1].float(), patches.flatten(2).transpose(1, 2)], dim=1)
        return joined.to(embedding.dtype)

    def resize(self, image_size: tuple[int, int]) -> None:
        """Make ``image_size`` the trained one: the position embedding is interpolated now, not at every call."""
        grid = self.grid_of(*image_size)
        embedding = self.position_embedding
        self.position_embedding = nn.Parameter(self.positions(grid).detach(), requires_grad=embedding.requires_grad)
        self.config = replace(self.config, image_size=image_size)

    def features(self, images: Tensor, collect_last: int = 0) -> Features:
        """Tokens of a batch and the queries and keys of its last ``collect_last`` blocks.

        Args:
            images: float [B, 3, height, width], normalised; sides are multiples of the patch size.
        """
        grid = self.grid_of(images.shape[-2], images.shape[-1])
        return self.encode(self.stem(images), grid, collect_last)

    def encode(self, patches: Tensor, grid: tuple[int, int], collect_last: int = 0) -> Features:
        """:meth:`features` from the stem's patches [B, T, D] on."""
        cls = self.cls_token.to(patches.dtype).expand(patches.shape[0], -1, -1)
        x = torch.cat([cls, patches], dim=1) + self.positions(grid).to(patches.dtype)
        x = add_dropped(None, x, self.dropout)
        collected: Collected = []
        for i, block in enumerate(self.blocks):
            x = block(x, collected if i >= len(self.blocks) - collect_last else None, self.recompute)
        return Features(x, grid, collected)

    def forward(self, images: Tensor) -> Tensor:
        """float [B, 3, height, width], normalised -> tokens [B, 1 + T, D], CLS first."""
        return self.features(images).tokens
