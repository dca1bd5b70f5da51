"""Compiles kernels for GPUs that are not there: what the compiler made of a kernel can be read, and tested,
on any machine.

``compile_for(specimen, arch)`` gives the cubin of one kernel in one configuration; ``disassemble`` gives its
SASS and its resource usage, which ``tetra.profiling.sass`` reads. Nothing here runs on a GPU, so nothing here
is a speed.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetra.kernels import row_quantize, ternary_matmul
from tetra.kernels.backend import HAS_TRITON, check_arch, triton
from tetra.kernels.specimen import Specimen

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)


@dataclass(frozen=True)
class Compiled:
    """The result: machine code and how much shared memory a block takes."""

    arch: int
    cubin: bytes
    shared_bytes: int
    num_warps: int


def ternary_matmul_specimen(
    config: tuple[int, ...] = ternary_matmul.CONFIGS[0],
    *,
    raw: bool = False,
    out: str = "fp16",
    aligned_n: bool = True,
    inline_asm: bool = True,
) -> Specimen:
    """The packed product: ``out`` is fp16, bf16 or fp32; ``raw`` gives int32 accumulators instead.

    ``aligned_n`` says that N is a multiple of 16.
    """
    options = dict(zip(ternary_matmul.CONFIG_FIELDS, config, strict=True))
    constants: dict[str, Any] = {
        "RAW": raw,
        "HAS_BIAS": not raw,
        "INLINE_ASM": inline_asm,
        **{name: options[name] for name in ("BLOCK_M", "BLOCK_N")},
    }
    signature = {
        "x_ptr": "*i8",
        "packed_ptr": "*u8",
        "scale_ptr": "*fp32",
        "weight_scale_ptr": "*fp32",
        "bias_ptr": "*fp32",
        "out_ptr": "*i32" if raw else f"*{out}",
        **dict.fromkeys(("M", "N", "stride_x", "stride_out", "n_groups"), "i32"),
    }
    if raw:
        for name in ("scale_ptr", "weight_scale_ptr", "bias_ptr"):
            del signature[name]
            constants[name] = None
    warps = {"num_warps": options["num_warps"], "num_stages": options["num_stages"]}
    unaligned = ("M", "n_groups") if aligned_n else ("M", "N", "n_groups")
    return Specimen("ternary_matmul", options, ternary_matmul._ternary_matmul_kernel, signature, constants, warps, unaligned)


def quantize_rows_specimen(k: int = 768, dtype: str = "fp16") -> Specimen:
    """The row quantiser for rows of ``k`` values of ``dtype`` (fp16, bf16, fp32)."""
    block_k, num_warps = next((row for row in row_quantize.CONFIGS if k <= row[0]), row_quantize.CONFIGS[-1])
    signature = {"x_ptr": f"*{dtype}", "x_q_ptr": "*i8", "scale_ptr": "*fp32", "K": "i32", "stride_x": "i32"}
    constants = {"ONE_BLOCK": k <= block_k, "BLOCK_K": block_k}
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    return Specimen("row_quantize", {"K": k, "dtype": dtype}, row_quantize._quantize_rows_kernel, signature, constants, options)


def compile_for(specimen: Specimen, arch: int) -> Compiled:
    """Machine code of ``specimen`` for compute capability ``arch`` (80 means sm_80).

    Raises ValueError for an architecture that is not supported and RuntimeError without Triton, or where
    Triton interprets.
    """
    check_arch(arch)
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: sm_{arch} is unknown; wanted one of {', '.join(map(str, ARCHITECTURES))}")
    if not HAS_TRITON:
        raise RuntimeError("compiling kernels needs Triton, which is not installed; pip install triton")
    if not isinstance(specimen.kernel, triton.runtime.JITFunction):
        raise RuntimeError("the kernels were imported for the interpreter; unset TETRA_BACKEND")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = specimen.kernel.arg_names
    types = {name: specimen.signature.get(name, "constexpr") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]] for name in specimen.signature if name not in specimen.unaligned
    }
    source = ASTSource(fn=specimen.kernel, signature=types, constexprs=specimen.constants, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=specimen.options)
    return Compiled(arch, result.asm["cubin"], result.metadata.shared, result.metadata.num_warps)


def disassemble(compiled: Compiled) -> tuple[str, str]:
    """(SASS, resource usage) as the ``cuobjdump`` that comes with Triton prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.cubin)
        texts = []
        for option in ("-sass", "-res-usage"):
            done = subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True)
            texts.append(done.stdout + done.stderr)
    return texts[0], texts[1]
