"""What of a kernel can be chosen, and how a choice is tried: all that ``tetra.autotune`` needs to know of a kernel.

A configuration is one row of a kernel's table, a tuple of integers whose meaning ``fields`` names. Every kernel file
that looks its configuration up (``tetra.autotune.table``) says in ``tunables()`` what may be chosen, next to the table;
:func:`all_tunables` collects them. The file's launcher uses the same functions, so that what was tuned is what runs.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

import tetra.kernels
from tetra.kernels.specimen import Specimen

Config = tuple[int, ...]
Sizes = Mapping[str, Any]  # shape and dtypes of a problem by the kernel's own names; JSON values


@dataclass(frozen=True)
class Work:
    """One launch of a candidate, for the static model.

    Attributes:
        specimen: the code.
        blocks: thread blocks.
        iterations: of a block's main loop, as it is written; 1 for code that runs once.
        macs: tensor-core multiply-adds of one iteration, with padding; 0 where there are none.
        operations: of the whole launch, two a multiply-add, without padding.
        n_bytes: moved at least, every tensor once.
        dtype: of the operands: int8, fp16 (also bf16), tf32 (tensor cores) or fp32 (elsewhere).
        resident: blocks that a multiprocessor has to hold at once, because the launch counts on it.
        popcounts: of words of 32 bits, in one iteration, with padding; 0 where there are none.
    """

    specimen: Specimen
    blocks: int
    iterations: int
    macs: int
    operations: int
    n_bytes: int
    dtype: str
    resident: int = 1
    popcounts: int = 0


@dataclass(frozen=True)
class Trial:
    """Inputs of one problem on one device, to run candidates on.

    Attributes:
        run: computes the outputs with a configuration; what is timed.
        expected: computes them by the reference, in plain PyTorch.
        rtol, atol: how near they have to be, one number for all outputs or one for each; 0 and 0 for what has to be
            equal.
    """

    run: Callable[[Config], tuple[Tensor, ...]]
    expected: Callable[[], tuple[Tensor, ...]]
    rtol: float | tuple[float, ...] = 0.0
    atol: float | tuple[float, ...] = 0.0

    def difference(self, outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
        """What is wrong with ``outputs`` of :attr:`run`, in a line; None if they are as ``expected``."""
        if len(outputs) != len(expected):
            return f"gives {len(outputs)} tensors, wanted {len(expected)}"
        for i, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
            if found.shape != wanted.shape:
                return f"output {i} has shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}"
            rtol, atol = (value[i] if isinstance(value, tuple) else value for value in (self.rtol, self.atol))
            found, wanted = found.to(torch.float64), wanted.to(torch.float64)
            near = torch.isclose(found, wanted, rtol=rtol, atol=atol, equal_nan=True)
            if not bool(near.all()):
                largest = float((found - wanted).abs()[~near].nan_to_num(torch.inf).max())
                return f"output {i} differs in {int((~near).sum())} of {near.numel()} values, by up to {largest:.3g}"
        return None


@dataclass(frozen=True)
class Tunable:
    """A kernel whose configuration can be chosen.

    Attributes:
        name: of the kernel among the results, such as ``ternary_matmul``.
        module: the file of ``tetra.kernels`` with its source.
        on: what it runs on: "cuda" or "cpu".
        fields: what the numbers of a configuration are.
        key: names the problem among the results: its bucket of shapes, and the dtypes.
        space: all configurations that may run a problem on an architecture (80 for sm_80; 0 on a CPU), the table's
            order.
        default: what runs where nothing is known: of (architecture, multiprocessors or cores, problem).
        works: the launches of a candidate, for the static model: of (architecture, multiprocessors, problem,
            configuration); None for kernels that are not compiled by Triton.
        trial: makes inputs of a problem on a device.
    """

    name: str
    module: str
    on: Literal["cuda", "cpu"]
    fields: tuple[str, ...]
    key: Callable[[Sizes], str]
    space: Callable[[int, Sizes], tuple[Config, ...]]
    default: Callable[[int, int, Sizes], Config]
    works: Callable[[int, int, Sizes, Config], list[Work]] | None
    trial: Callable[[Sizes, torch.device], Trial]


def bucket(n: int) -> int:
    """``n`` rounded up to a power of two: problems of one bucket share a result."""
    return 1 << max(n - 1, 0).bit_length()


DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
TRITON_NAMES = {"int8": "i8", "uint8": "u8", "float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-4}
"""How far results of a dtype may be from the reference's, of values around one."""


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` of torch.float16: how keys and problems write dtypes."""
    return str(dtype).removeprefix("torch.")


def seeded(device: torch.device, seed: int = 0) -> torch.Generator:
    """For the inputs of a trial, which are the same every time."""
    return torch.Generator(device).manual_seed(seed)


@cache
def all_tunables() -> dict[str, Tunable]:
    """By name, those of every file of this package."""
    found: dict[str, Tunable] = {}
    for module in pkgutil.iter_modules(tetra.kernels.__path__):
        lister = getattr(importlib.import_module(f"tetra.kernels.{module.name}"), "tunables", None)
        for tunable in lister() if lister else ():
            found[tunable.name] = tunable
    return found
