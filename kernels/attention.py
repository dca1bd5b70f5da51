"""Attention for inference, written the way that is fastest on the device at hand.

Contract
    attention(q, k, v: float [B, H, T, D]) -> [B, H, T, D] = softmax(q k^T / sqrt(D)) v, in the inputs' dtype

Two formulations: ``fused`` is PyTorch's scaled_dot_product_attention, ``plain`` writes product, softmax,
product. On CPUs the fused one is the slower in bfloat16: at 1 x 12 x 530 x 64 the plain one takes half its
time, because both products run on the machine's bfloat16 units. In float32, on GPUs, and where a gradient is
wanted, the fused one runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Formulation = Literal["fused", "plain"]

_MAX_LOGITS = 1 << 25  # 64 MiB of bfloat16 logits; beyond it the plain form runs image by image
_forced: ContextVar[Formulation | None] = ContextVar("forced attention formulation", default=None)


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, by definition."""
    return torch.softmax((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5, dim=-1) @ v


@contextmanager
def force_formulation(formulation: Formulation) -> Iterator[None]:
    """Within this context ``attention`` uses ``formulation`` whatever the device; for comparisons.

    ``plain`` gives no gradients.
    """
    token = _forced.set(formulation)
    try:
        yield
    finally:
        _forced.reset(token)


def _choose(q: Tensor, k: Tensor, v: Tensor) -> Formulation:
    forced = _forced.get()
    if forced is not None:
        return forced
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return "plain" if q.dtype == torch.bfloat16 and q.device.type == "cpu" and not needs_grad else "fused"


def _attention_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Without gradients: the softmax overwrites the logits, which are the largest tensor by far."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return torch.softmax(logits, dim=-1, out=logits) @ v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q, k, v of shape [B, H, T, D]; k and v may have another T than q.

    Raises ValueError for shapes and TypeError for dtypes that do not fit each other.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k, v: shapes {shapes} do not fit; wanted [B, H, T, D] each")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v: dtypes {q.dtype}, {k.dtype}, {v.dtype} differ; wanted one floating dtype")
    if _choose(q, k, v) == "fused":
        return scaled_dot_product_attention(q, k, v)
    if len(q) > 1 and len(q) * q.shape[1] * q.shape[2] * k.shape[2] > _MAX_LOGITS:
        parts = [_attention_plain(*part) for part in zip(q.split(1), k.split(1), v.split(1), strict=True)]
        return torch.cat(parts)
    return _attention_plain(q, k, v)
