"""Which implementation of an operation is the faster on this CPU, found out by running both.

The compiled kernels run wherever they build. That is the right default for what they were written for, but not a
law: PyTorch's libraries use instructions that the kernels don't (matrix units such as AMX, for one), and a CPU
without byte products or bfloat16 units has another balance. ``measure_cpu`` runs every operation both ways at the
sizes at hand and keeps the faster for this process. It takes some hundred milliseconds and never runs by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from tetra.kernels import native
from tetra.kernels.attention import attention_qkv
from tetra.kernels.backend import requested
from tetra.kernels.layer_norm import layer_norm
from tetra.kernels.row_quantize import norm_quantize, quantize_rows
from tetra.kernels.ternary_matmul import pack_ternary, ternary_linear_int8, ternary_matmul_int32

ROUNDS = 5
MARGIN = 0.95  # PyTorch has to take less than this share of the time, or noise would decide


def _median_ms(call: Callable[[], object]) -> float:
    call()
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


@torch.inference_mode()
def measure_cpu(
    dtype: torch.dtype = torch.bfloat16, tokens: int = 530, width: int = 768, n_heads: int = 12
) -> dict[str, dict[str, float | str]]:
    """Run each operation of inference compiled and in plain PyTorch, and from now on use the faster for ``dtype``.

    Args:
        dtype: of activations: float32, bfloat16 or float16.
        tokens: rows of activations, those of one image.
        width: of the model, a multiple of ``n_heads``.
        n_heads: attention heads.

    Returns:
        By operation ``native_ms``, ``torch_ms`` (medians) and ``chosen``, "native" or "torch". Empty where there
        is nothing to choose: no compiled kernels, or ``TETRA_BACKEND`` names a backend.

    Raises:
        ValueError: a size is not positive, or ``width`` is not a multiple of ``n_heads``.
    """
    for name, value in (("tokens", tokens), ("width", width), ("n_heads", n_heads)):
        if value < 1:
            raise ValueError(f"{name}: is {value}, wanted 1 or more")
    if width % n_heads:
        raise ValueError(f"width: {width} is not a multiple of n_heads = {n_heads}")
    if requested() != "auto" or not native.available():
        return {}
    with torch.device("cpu"):  # whatever the default device is
        x = torch.randn(tokens, width).to(dtype)
        ones, zeros = torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype)
        packed = pack_ternary(torch.randint(-1, 2, (4 * width, width), dtype=torch.int8))
        codes, scale = quantize_rows(x)
        qkv = torch.randn(1, tokens, 3 * width).to(dtype)
    calls: dict[str, tuple[torch.dtype, Callable[[], object]]] = {
        "quantize_rows": (dtype, lambda: quantize_rows(x)),
        "norm_quantize": (dtype, lambda: norm_quantize(x, ones, zeros)),
        "layer_norm": (dtype, lambda: layer_norm(x, ones, zeros)),
        "ternary_linear": (dtype, lambda: ternary_linear_int8(codes, scale, packed, 1.0, gelu=True, out_dtype=dtype)),
        "ternary_matmul_int32": (torch.int8, lambda: ternary_matmul_int32(codes, packed)),
        "attention_qkv": (dtype, lambda: attention_qkv(qkv, n_heads)),
    }
    report: dict[str, dict[str, float | str]] = {}
    for name, (of_dtype, call) in calls.items():
        native.prefer(name, of_dtype, compiled=True)
        if not native.supports(name, of_dtype):
            continue
        compiled_ms = _median_ms(call)
        with native.switched_off():
            torch_ms = _median_ms(call)
        faster = torch_ms >= MARGIN * compiled_ms
        native.prefer(name, of_dtype, faster)
        report[name] = {"native_ms": compiled_ms, "torch_ms": torch_ms, "chosen": "native" if faster else "torch"}
    return report
