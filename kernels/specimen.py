"""One kernel in one configuration, as its launcher would specialise it: what can be compiled ahead of time.

Every kernel file lists its own in ``specimens(arch)``; ``tetra.kernels.ahead_of_time`` collects and compiles
them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Specimen:
    """One kernel as the launcher would specialise it.

    Attributes:
        name: the file that holds the kernel, such as ``ternary_matmul``.
        config: what tells this one from the kernel's others, for reports: tile sizes, warps, stages, variant,
            and the sizes it stands for; JSON values only.
        kernel: the ``@triton.jit`` function.
        signature: argument -> Triton type, such as ``*i8`` or ``i32``, for the arguments known at run time.
        constants: argument -> value, for constexpr arguments and for pointers that are None.
        options: ``num_warps``, ``num_stages`` and other compiler options.
        unaligned: arguments that are not known to be multiples of 16.
    """

    name: str
    config: dict[str, Any]
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ()
