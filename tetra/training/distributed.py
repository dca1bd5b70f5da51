"""Training in several processes, one a device: who we are, and what the processes tell each other.

Every function does the plain thing in a run of one process. Batches are *global*: the processes share each out in
equal, consecutive parts, so that what is gathered stands in the order in which one process would have it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def is_on() -> bool:
    """Whether this is one of several processes that know each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_on() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_on() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
        dist.all_gather(list(out.chunk(world_size())), x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        own = grads[0].chunk(world_size())[rank()]
        return own * world_size()


def gather(x: Tensor) -> Tensor:
    """Rows of all processes, in the order of their ranks: [n, ...] -> [world_size * n, ...], n the same everywhere.

    The gradient is for a loss that *every process computes from the gathered rows*: it needs no communication, and is
    multiplied by the number of processes, so that their mean, which DistributedDataParallel takes of the parameters'
    gradients, is the gradient of the loss.
    """
    if not is_on():
        return x
    out: Tensor = _Gather.apply(x)
    return out


def mean(x: Tensor) -> Tensor:
    """Mean over the processes of a tensor without gradient."""
    if is_on():
        x = x.detach().clone()
        dist.all_reduce(x)
        x /= world_size()
    return x
