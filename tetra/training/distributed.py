"""Training in several processes, one a device: who we are, and what the processes tell each other.

``torchrun`` starts them, :func:`processes` joins them. Everything else here does the plain thing in a run of one.

Batches are *global*: the processes share each out in equal, consecutive parts, so that what is gathered stands in the
order in which one process would have it, and a recipe means the same however many processes run it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tetra.errors import ConfigError, TetraError, TrainingError

_PATIENCE = timedelta(days=7)  # for work that one process does while the others wait, such as a teacher's cache
_patient: dist.ProcessGroup | None = None
_is_alone = False


class Stopped(SystemExit):
    """Ends a process because of an error that another one reports; status 2."""

    def __init__(self) -> None:
        super().__init__(2)


def is_on() -> bool:
    """Whether this is one of several processes that know each other."""
    return not _is_alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def alone() -> Iterator[None]:
    """Within this context the process neither waits for the others nor talks to them, as in a run of one."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_on() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_on() else 1


def local_world_size() -> int:
    """Number of processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", world_size()) if is_on() else 1


def requested_rank() -> int:
    """The number that ``torchrun`` gave this process, before it has joined the others."""
    return _number("RANK", 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


@contextmanager
def processes() -> Iterator[None]:
    """Join the other processes of a ``torchrun``, if there are some; leave them at the end.

    Raises:
        TrainingError: this machine has fewer GPUs than processes, or the others can't be found.
    """
    global _patient
    n = _number("WORLD_SIZE", 1)
    if n < 2 or not dist.is_available() or dist.is_initialized():
        yield
        return
    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if absent:
        raise TrainingError(
            f"WORLD_SIZE is {n} in the environment, but {absent[0]} is not set; start with torchrun, which sets both, "
            "or unset WORLD_SIZE"
        )
    if _number("RANK", n) >= n:
        raise TrainingError(f"RANK is {os.environ['RANK']} in the environment, expected 0 to {n - 1} (WORLD_SIZE {n})")
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        local, n_gpus = _number("LOCAL_RANK", 0), torch.cuda.device_count()
        if local >= n_gpus:
            raise TrainingError(
                f"{_number('LOCAL_WORLD_SIZE', local + 1)} processes on a machine with {n_gpus} GPUs; "
                f"start it with: torchrun --nproc-per-node {n_gpus}"
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if on_gpus else "gloo")
        _patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TrainingError(
            f"the {n} processes of this run don't find each other at {where} ({_first_words(error)}); check that all "
            "were started and that the port is free, which torchrun sees to"
        ) from None
    try:
        yield
    finally:
        _patient = None
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Processes go on behind this block when all have come through it; what stops one stops all.

    An error that several have is raised in the first of them only; the others end with status 2 and no words. The block
    itself must not talk to the other processes. Work for one process alone: ``if rank() == 0`` inside.

    Raises:
        TrainingError: another process has died.
        Stopped: another process has an error.
    """
    if not is_on():
        yield
        return
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    told = tell(message)
    if failure is not None and told.index(message) == rank():
        raise failure
    if any(text is not None for text in told):
        raise Stopped


def tell(value: Any) -> list[Any]:
    """What all processes call this with, by rank: small Python objects. It waits for everyone, for days if need be.

    Raises:
        TrainingError: another process has died.
    """
    told = [value] * world_size()
    if is_on():
        with lost_process():
            dist.all_gather_object(told, value, _patient)
    return told


@contextmanager
def lost_process(advice: str = "start all of them again, with --resume") -> Iterator[None]:
    """What a broken connection to another process raises, as an error that says what to do.

    Raises:
        TrainingError: the connection broke.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TetraError) or not is_on() or not _is_about_connections(error):
            raise
        raise TrainingError(
            f"the connection to another process of this run of {world_size()} broke, so that one has died or hangs "
            f"({_first_words(error)}); {advice}"
        ) from None


def _is_about_connections(error: RuntimeError) -> bool:
    words = re.search(r"gloo|NCCL|Connection (closed|reset)", str(error))
    return isinstance(error, dist.DistError) or words is not None


def _first_words(error: Exception) -> str:
    text = re.sub(r"\[[^\]]*\]", "", str(error)).strip()
    return text.splitlines()[0].partition(". This")[0].strip(" .")[:120] if text else type(error).__name__


def share(where: str, name: str, value: int) -> int:
    """The part of a batch of ``value`` that each process has.

    Raises:
        ConfigError: the processes can't share it equally.
    """
    n = world_size()
    if value % n:
        raise ConfigError(
            f"{where}: '{name}' is {value}, which {n} processes can't share equally; make it a multiple of {n}, "
            f"such as {value // n * n or n}, or start another number of processes"
        )
    return value // n


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
