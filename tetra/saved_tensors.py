"""What autograd keeps between the forward and the backward pass, tensor by tensor.

Counted by saved-tensor hooks, so the figures are exact on every device, and no allocator blurs them: what is still kept
when the forward pass has ended, each storage once and whole, however many views of it are kept. Parameters, and inputs
that the caller names, are not counted, for they exist anyway.
"""

from __future__ import annotations

import itertools
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Saved:
    """Tensors that are alike.

    Attributes:
        module: dotted path of the module that keeps them, block numbers as ``*``; empty outside modules.
        operation: of PyTorch, or the function of this project, for whose gradient they are kept.
        shape, dtype: of the tensor; of a view that is the first one kept, whose storage may be larger.
        count: storages.
        n_bytes: of all their storages.
    """

    module: str
    operation: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    n_bytes: int


class _Kept:
    """A tensor that autograd keeps, what for, and how many were kept before it."""

    def __init__(self, tensor: Tensor, module: str, operation: str, number: int) -> None:
        self.tensor, self.module, self.operation, self.number = tensor, module, operation, number


class _Operations(TorchFunctionMode):
    """Knows which of PyTorch's functions runs."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = getattr(func, "_schema", None)
        self.running.append(schema.name.rpartition("::")[2] if schema is not None else func.__name__)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.running.pop()


def _frames() -> Iterator[FrameType]:
    """Of the Python code that led here, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _function_at_work() -> str:
    """The innermost function that is neither PyTorch's nor of this file."""
    outside = (f for f in _frames() if not f.f_code.co_filename.startswith((_TORCH, __file__)))
    return next(outside).f_code.co_name.strip("_")


def _module_at_work(names: dict[int, str]) -> str:
    """Path of the innermost module whose method runs, or of the layer that a function is given."""
    for frame in _frames():
        for variable in ("linear", "attention", "self"):
            name = names.get(id(frame.f_locals.get(variable)))
            if name:
                return name
    return ""


@contextmanager
def count_saved(model: nn.Module | None = None, inputs: Iterable[Tensor] = ()) -> Iterator[Callable[[], list[Saved]]]:
    """Within this context autograd's tensors are noted; call what it yields while the result is still alive.

    Args:
        model: names the modules; its parameters are not counted.
        inputs: are not counted either.

    Yields:
        A function that gives what is kept at the time, largest first.
    """
    names = {} if model is None else {id(module): name for name, module in model.named_modules()}
    known = [*inputs, *(() if model is None else model.parameters())]
    exist = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()
    operations, numbers = _Operations(), itertools.count()

    def pack(tensor: Tensor) -> Tensor | _Kept:
        if tensor.untyped_storage().data_ptr() in exist:
            return tensor
        operation = operations.running[0] if operations.running else _function_at_work()
        place = re.sub(r"(?<![^.])\d+(?![^.])", "*", _module_at_work(names))
        # A result that is kept would hold what keeps it in a circle, and outlive it, if it were not detached.
        found = _Kept(tensor.detach(), place, operation, next(numbers))
        kept.add(found)
        return found

    def unpack(found: Tensor | _Kept) -> Tensor:
        return found.tensor if isinstance(found, _Kept) else found

    def summary() -> list[Saved]:
        storages: dict[int, _Kept] = {}
        for found in sorted(kept, key=lambda found: found.number):
            storages.setdefault(found.tensor.untyped_storage().data_ptr(), found)
        groups: dict[tuple[str, str, tuple[int, ...], str], list[int]] = {}
        for found in storages.values():
            tensor = found.tensor
            key = (found.module, found.operation, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            groups.setdefault(key, []).append(tensor.untyped_storage().nbytes())
        saved = [Saved(*key, len(sizes), sum(sizes)) for key, sizes in groups.items()]
        return sorted(saved, key=lambda group: (-group.n_bytes, group.module, group.operation))

    with operations, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield summary


def total_bytes(saved: Iterable[Saved]) -> int:
    """Bytes of all groups."""
    return sum(group.n_bytes for group in saved)
