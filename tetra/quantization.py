"""The quantisers of TeTRA and the schedule that blends them in.

Source: TeTRA-VPR (arXiv 2503.02511); the quantisers are those of BitNet b1.58 (arXiv 2402.17764).

Weights, per tensor:     s = 1 / max(mean|W|, 1e-5),  W_t = clip(round(W s), -1, 1),     value W_t / s.
Activations, per token:  a = 127 / max(max|x|, 1e-5), x_q = clip(round(x a), -128, 127), value x_q / a.
Training sees x + lambda (Q(x) - x).detach(), and the same for W, with lambda rising from 0 to 1.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from tetra.errors import ConfigError

EPSILON = 1e-5
LambdaSchedule = Literal["sigmoid", "linear", "cosine", "none"]


def ternarize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary codes of a weight and the factor that brings them back.

    Args:
        weight: float, any shape.

    Returns:
        codes: int8 in {-1, 0, 1}, the shape of ``weight``.
        scale: float32 scalar tensor, 1 / s, so that ``weight ~= codes * scale``. A weight of zeros has codes 0.

    Raises:
        ValueError: the weight is empty or has NaN or infinite values.
    """
    scale = weight.detach().float().abs().mean().clamp(min=EPSILON)
    if not torch.isfinite(scale):  # mean|W| is finite only if every weight is
        raise ValueError(f"the weight {tuple(weight.shape)} is empty or has NaN or infinite values")
    codes = (weight.detach().float() * (1.0 / scale)).round().clamp(-1, 1).to(torch.int8)
    return codes, scale


def blend_weight(weight: Tensor, lam: float) -> Tensor:
    """W + lambda (Q(W) - W).detach(): the gradient with respect to W is the identity."""
    if lam == 0.0:
        return weight
    with torch.no_grad():
        scale = weight.abs().mean().clamp(min=EPSILON)
        delta = (weight * (1.0 / scale)).round_().clamp_(-1, 1).mul_(scale).sub_(weight).mul_(lam)
    return weight + delta


def blend_activation(x: Tensor, lam: float) -> Tensor:
    """x + lambda (Q(x) - x).detach(), quantised per row of the last dimension; identity gradient."""
    if lam == 0.0:
        return x
    with torch.no_grad():
        absmax = x.abs().amax(-1, keepdim=True).clamp(min=EPSILON)
        # `127.0 / absmax` would multiply by a rounded reciprocal; a true division agrees with the integer path.
        factor = torch.full_like(absmax, 127.0) / absmax
        delta = (x * factor).round_().clamp_(-128, 127).mul_(absmax / 127.0).sub_(x).mul_(lam)
    return x + delta


def lambda_at(progress: float, schedule: LambdaSchedule = "sigmoid") -> float:
    """lambda at ``progress`` = t / T in [0, 1] (clamped).

    sigmoid: sigmoid(16 t/T - 6), linear: t/T, cosine: (1 - cos(pi t/T)) / 2, none: 1 throughout.

    Raises:
        ConfigError: unknown schedule.
    """
    t = min(max(progress, 0.0), 1.0)
    if schedule == "sigmoid":
        return 1.0 / (1.0 + math.exp(6.0 - 16.0 * t))
    if schedule == "linear":
        return t
    if schedule == "cosine":
        return (1.0 - math.cos(math.pi * t)) / 2.0
    if schedule == "none":
        return 1.0
    raise ConfigError(f"unknown lambda schedule '{schedule}'; known: {', '.join(get_args(LambdaSchedule))}")
