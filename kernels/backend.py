"""Choice of backend: the one place that knows which implementation of a kernel runs.

- ``torch``: plain PyTorch; on every device.
- ``native``: the C++ kernels for CPUs, built on demand (``tetra.kernels.native``); on CPU tensors.
- ``triton``: the compiled Triton kernel; on CUDA tensors, from sm_80 on.
- ``interpreter``: the same Triton kernel in Triton's interpreter; on CPU tensors, slow, for tests.

``TETRA_BACKEND`` overrides the choice: ``auto`` (default: Triton where it runs, native on CPUs that have it,
else torch) or one of these.
Triton decides when a kernel is *defined* whether it is interpreted, so ``interpreter`` has to be set before
``tetra.kernels`` is imported.

Triton is optional. When it is missing, ``triton`` and ``tl`` below are stand-ins that let the kernel files be
imported; the kernels in them cannot be launched.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch

from tetra.kernels import native

Backend = Literal["torch", "native", "triton", "interpreter"]

VARIABLE = "TETRA_BACKEND"
CHOICES = ("auto", "torch", "native", "triton", "interpreter")
MINIMUM_ARCH = 80


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


if TYPE_CHECKING:
    import triton
    import triton.language as tl

    HAS_TRITON: bool
else:
    if os.environ.get(VARIABLE, "").strip().lower() == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # read by triton.jit when a kernel is defined
    try:
        import triton
        import triton.language as tl

        HAS_TRITON = True
    except ImportError:
        triton = tl = _MissingTriton()
        HAS_TRITON = False


@cache
def arch_of(device: torch.device) -> int:
    """Compute capability of a CUDA device, 80 for sm_80; 0 for other devices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check_arch(arch: int) -> None:
    """ValueError for compute capabilities without the instructions that the Triton kernels need."""
    if arch < MINIMUM_ARCH:
        raise ValueError(
            f"arch: sm_{arch} is not supported by the compiled kernels, because Triton has no int8 "
            f"tensor-core product before sm_{MINIMUM_ARCH} (Ampere); set {VARIABLE}=torch"
        )


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, which is where Triton launches; nothing for CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def backend_for(tensor: torch.Tensor) -> Backend:
    """The backend for an operation on ``tensor``: by its device, unless ``TETRA_BACKEND`` says otherwise.

    Raises ValueError where the requested backend cannot run: no Triton, or a tensor on the wrong device.
    """
    choice = requested()
    if choice == "auto":
        compiled = tensor.is_cuda and HAS_TRITON and arch_of(tensor.device) >= MINIMUM_ARCH
        if compiled:
            return "triton"
        return "native" if tensor.device.type == "cpu" and native.available() else "torch"
    if choice == "torch":
        return "torch"
    if choice == "native":
        if tensor.device.type != "cpu":
            raise ValueError(f"{VARIABLE} is native, but a tensor is on {tensor.device}; set {VARIABLE}=auto")
        if not native.available():
            raise ValueError(f"{VARIABLE} is native, but the C++ kernels do not run on this machine; set {VARIABLE}=auto")
        return "native"
    if not HAS_TRITON:
        raise ValueError(f"{VARIABLE} is {choice}, but Triton is not installed; pip install triton or unset it")
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
