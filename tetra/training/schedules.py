"""Learning-rate schedules, as factors of the base rate."""

from __future__ import annotations

import math
from collections.abc import Sequence


def warmup_cosine(step: int, total_steps: int, warmup_fraction: float = 0.05) -> float:
    """Linear warm-up over ``warmup_fraction`` of ``total_steps``, then a cosine down to 0.

    The first step has 1 / warm-up steps, not 0, so that no step is lost.
    """
    warmup = max(1, round(total_steps * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def warmup_steps_down(
    epoch: float, warmup_epochs: float = 3.0, milestones: Sequence[float] = (10, 20, 30), gamma: float = 0.3
) -> float:
    """Linear warm-up over ``warmup_epochs``, then times ``gamma`` at each milestone (in epochs)."""
    factor = min(1.0, (epoch + 1e-9) / warmup_epochs) if warmup_epochs > 0 else 1.0
    return factor * gamma ** sum(epoch >= m for m in milestones)
