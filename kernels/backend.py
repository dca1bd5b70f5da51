"""Choice of backend: the one place that knows which implementation of a kernel runs.

- ``torch``: plain PyTorch; on every device.
- ``native``: the C++ kernels for CPUs, built on demand (``tetra.kernels.native``); on CPU tensors.
- ``triton``: the compiled Triton kernel; on CUDA tensors, from sm_80 on.
- ``interpreter``: the same Triton kernel in Triton's interpreter; on CPU tensors, slow, for tests.

``TETRA_BACKEND`` overrides the choice: ``auto`` (default: Triton where it runs, native on CPUs that have it,
else torch) or one of these.
Triton decides when a kernel is *defined* whether it is interpreted, so ``interpreter`` has to be set before
``tetra.kernels`` is imported.

Triton is optional. When it is missing or too old, ``triton`` and ``tl`` below are stand-ins that let the kernel
files be imported; the kernels in them cannot be launched. Where a GPU could run compiled kernels but does not,
one warning a device says why.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch

from tetra.kernels import native

Backend = Literal["torch", "native", "triton", "interpreter"]

VARIABLE = "TETRA_BACKEND"
CHOICES = ("auto", "torch", "native", "triton", "interpreter")
MINIMUM_ARCH = 80
MINIMUM_TRITON = (3, 5)


def requested() -> str:
    """The value of ``TETRA_BACKEND``, checked. Raises ValueError for an unknown one."""
    value = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    if value not in CHOICES:
        raise ValueError(f"{VARIABLE} is {os.environ[VARIABLE]!r}; set it to one of {', '.join(CHOICES)}")
    return value


class _MissingTriton:
    """Stands in for ``triton`` and ``triton.language``: ``jit`` returns the function, all else is None."""

    @staticmethod
    def jit(function: Any) -> Any:
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _is_too_old(version: str) -> bool:
    """Whether a version of Triton such as "3.4.0+git12" is below MINIMUM_TRITON."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < MINIMUM_TRITON


if TYPE_CHECKING:
    import triton
    import triton.language as tl

    HAS_TRITON: bool
    TRITON_PROBLEM: str | None
else:
    if os.environ.get(VARIABLE, "").strip().lower() == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # read by triton.jit when a kernel is defined
    try:
        import triton
        import triton.language as tl

        TRITON_PROBLEM = None
        if _is_too_old(triton.__version__):
            wanted = ".".join(map(str, MINIMUM_TRITON))
            TRITON_PROBLEM = f"Triton {triton.__version__} is too old; pip install 'triton>={wanted}'"
    except ImportError:
        TRITON_PROBLEM = "Triton is not installed; pip install triton"
    HAS_TRITON = TRITON_PROBLEM is None
    if not HAS_TRITON:
        triton = tl = _MissingTriton()


def versions() -> dict[str, str | None]:
    """Versions of what the kernels run on, for reports; None for what is not installed."""
    return {"torch": torch.__version__, "triton": triton.__version__ if HAS_TRITON else None}


@cache
def arch_of(device: torch.device) -> int:
    """Compute capability of a CUDA device, 80 for sm_80; 0 for other devices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def n_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; an A100's for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108


def check_arch(arch: int) -> None:
    """ValueError for compute capabilities without the instructions that the Triton kernels need."""
    if arch < MINIMUM_ARCH:
        raise ValueError(
            f"arch: sm_{arch} is not supported by the compiled kernels, because Triton has no int8 "
            f"tensor-core product before sm_{MINIMUM_ARCH} (Ampere); set {VARIABLE}=torch"
        )


@cache
def why_not_compiled(device: torch.device) -> str | None:
    """Why no compiled Triton kernel can run on ``device``, in a few words; None where it can."""
    if device.type != "cuda":
        return f"there are none for {device.type} devices"
    if torch.version.hip is not None:
        return "there are none for AMD GPUs"
    if TRITON_PROBLEM is not None:
        return TRITON_PROBLEM
    try:
        check_arch(arch_of(device))
    except ValueError as error:
        return str(error)
    return None


@cache
def _warn_of_plain_torch(device: torch.device) -> None:
    warnings.warn(
        f"the kernels run in plain PyTorch on {device}, with the same results but slower: {why_not_compiled(device)}",
        stacklevel=4,
    )


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, which is where Triton launches; nothing for CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a graph is being made of what happens to ``tensor``, which may hold no values then."""
    return torch.compiler.is_compiling() or type(tensor) not in (torch.Tensor, torch.nn.Parameter)


def operator_or_function(tensor: torch.Tensor, operator: Any, function: Callable[..., Any]) -> Any:
    """``operator``, a custom operator of PyTorch, or the ``function`` that it runs, for a call with ``tensor``.

    The dispatcher takes as long about a custom operator as a small kernel runs. Graphs need it; where nothing is traced
    the function does. For calls without a gradient of their own.
    """
    return operator if is_traced(tensor) else function


def backend_for(tensor: torch.Tensor) -> Backend:
    """The backend for an operation on ``tensor``: by its device, unless ``TETRA_BACKEND`` says otherwise.

    Raises ValueError where the requested backend cannot run: no Triton, or a tensor on the wrong device.
    """
    choice = requested()
    if choice == "auto":
        if tensor.device.type == "cpu":
            return "native" if native.available() else "torch"
        if why_not_compiled(tensor.device) is None:
            return "triton"
        _warn_of_plain_torch(tensor.device)
        return "torch"
    if choice == "torch":
        return "torch"
    if choice == "native":
        if tensor.device.type != "cpu":
            raise ValueError(f"{VARIABLE} is native, but a tensor is on {tensor.device}; set {VARIABLE}=auto")
        if not native.available():
            raise ValueError(
                f"{VARIABLE} is native, but the C++ kernels do not run on this machine; set {VARIABLE}=auto"
            )
        return "native"
    if not HAS_TRITON:
        raise ValueError(f"{VARIABLE} is {choice}, but {TRITON_PROBLEM}, or unset {VARIABLE}")
    if choice == "triton":
        if not tensor.is_cuda:
            raise ValueError(f"{VARIABLE} is triton, but a tensor is on {tensor.device}; set {VARIABLE}=auto")
        check_arch(arch_of(tensor.device))
        return "triton"
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{VARIABLE} became interpreter after tetra.kernels was imported; set it before")
    if tensor.device.type != "cpu":
        raise ValueError(f"{VARIABLE} is interpreter, but a tensor is on {tensor.device}; move it to the CPU")
    return "interpreter"
