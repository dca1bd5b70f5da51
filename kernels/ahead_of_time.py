"""Compiles kernels for GPUs that are not there: what the compiler made of a kernel can be read, and tested,
on any machine.

``all_specimens(arch)`` lists every kernel in every shipped configuration, ``compile_for(specimen, arch)`` gives
the cubin of one, ``disassemble`` its SASS and its resource usage, which ``tetra.profiling.sass`` reads. Nothing
here runs on a GPU, so nothing here is a speed. Triton keeps what it compiled (``~/.triton/cache``), so that a
second time is quick.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tetra.kernels
from tetra.kernels.backend import MINIMUM_TRITON, TRITON_PROBLEM, check_arch, triton
from tetra.kernels.specimen import Specimen

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)

_ENCODING = re.compile(r"\n?[ \t]*/\* 0x[0-9a-f]+ \*/")


@dataclass(frozen=True)
class Compiled:
    """The result: machine code and how much shared memory a block takes."""

    arch: int
    cubin: bytes
    shared_bytes: int
    num_warps: int


def check_known_arch(arch: int) -> None:
    """ValueError for a compute capability that kernels are not compiled for (80 means sm_80)."""
    check_arch(arch)
    if arch not in ARCHITECTURES:
        known = ", ".join(f"sm_{known}" for known in ARCHITECTURES)
        raise ValueError(f"arch: sm_{arch} is unknown; wanted one of {known}")


def parse_arch(text: str | int) -> int:
    """80 from ``sm_80``, ``80`` or 80. ValueError for anything that is not an architecture to compile for."""
    found = re.fullmatch(r"(?:sm_)?(\d{2,3})", str(text).strip().lower())
    if found is None:
        known = ", ".join(f"sm_{known}" for known in ARCHITECTURES)
        raise ValueError(f"arch: {text!r} is not an architecture; wanted one of {known}")
    check_known_arch(int(found[1]))
    return int(found[1])


def check_compiler() -> None:
    """RuntimeError unless this process can compile kernels: it needs Triton, not too old, not interpreting; no GPU."""
    if TRITON_PROBLEM is not None:
        wanted = ".".join(map(str, MINIMUM_TRITON))
        raise RuntimeError(f"compiling kernels needs Triton {wanted} or newer: {TRITON_PROBLEM}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("the kernels were imported for Triton's interpreter; unset TETRA_BACKEND and start again")


@cache
def _sources() -> dict[str, Callable[[int], list[Specimen]]]:
    """File name -> its ``specimens``, for every file of this package that has compiled kernels."""
    found = {}
    for module in pkgutil.iter_modules(tetra.kernels.__path__):
        lister = getattr(importlib.import_module(f"tetra.kernels.{module.name}"), "specimens", None)
        if lister is not None:
            found[module.name] = lister
    return found


def kernel_names() -> list[str]:
    """Names of the files with compiled kernels, which ``all_specimens`` takes."""
    return sorted(_sources())


def check_kernel(kernel: str) -> None:
    """ValueError unless ``kernel`` is one of :func:`kernel_names`."""
    if kernel not in kernel_names():
        raise ValueError(f"kernel: {kernel!r} is unknown; wanted one of {', '.join(kernel_names())}")


def all_specimens(arch: int, kernel: str | None = None) -> list[Specimen]:
    """Every kernel in every configuration that is shipped for compute capability ``arch``, file by file.

    Args:
        arch: 80 for sm_80.
        kernel: only those of this file.

    Raises:
        ValueError: ``arch`` or ``kernel`` is unknown.
    """
    check_known_arch(arch)
    if kernel is not None:
        check_kernel(kernel)
    return [found for name in ([kernel] if kernel else kernel_names()) for found in _sources()[name](arch)]


def compile_for(specimen: Specimen, arch: int) -> Compiled:
    """Machine code of ``specimen`` for compute capability ``arch`` (80 means sm_80).

    Raises ValueError for an architecture that is not supported and RuntimeError without Triton, with one that is
    too old, or where it interprets.
    """
    check_known_arch(arch)
    check_compiler()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = specimen.kernel.arg_names
    types = {name: specimen.signature.get(name, "constexpr") for name in names}
    aligned: dict[tuple[int, ...], Any] = {
        (names.index(name),): [["tt.divisibility", 16]] for name in specimen.signature if name not in specimen.unaligned
    }
    source = ASTSource(fn=specimen.kernel, signature=types, constexprs=specimen.constants, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=specimen.options)
    return Compiled(arch, result.asm["cubin"], result.metadata.shared, result.metadata.num_warps)


def disassemble(compiled: Compiled) -> tuple[str, str]:
    """(SASS without its encoding, resource usage), as the ``cuobjdump`` that comes with Triton prints them.

    Kept in Triton's cache by the content of the cubin.
    """
    from triton.runtime.cache import get_cache_manager

    manager = get_cache_manager(hashlib.sha256(compiled.cubin).hexdigest())
    texts = []
    for option in ("sass", "res-usage"):
        kept = manager.get_file(f"cuobjdump-{option}.txt")
        if kept is not None:
            texts.append(Path(kept).read_text())
            continue
        text = _ENCODING.sub("", _cuobjdump(compiled.cubin, option))
        manager.put(text, f"cuobjdump-{option}.txt", binary=False)
        texts.append(text)
    return texts[0], texts[1]


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([tool, f"-{option}", file], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuobjdump -{option} failed: {(done.stderr or done.stdout).strip()[:200]}")
    return done.stdout + done.stderr
