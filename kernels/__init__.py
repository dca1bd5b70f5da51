"""Operations on packed tensors: tensors in, tensors out, nothing of the model.

Every file holds one operation: its contract, a reference in plain torch, the fast path for the CPU, and the
Triton kernel where there is one. ``backend`` chooses among them. Importing this package needs neither Triton
nor a GPU.
"""

from tetra.kernels.attention import attention
from tetra.kernels.bits import pack_bits, unpack_bits
from tetra.kernels.hamming_search import hamming_search
from tetra.kernels.row_quantize import quantize_rows
from tetra.kernels.ternary_matmul import (
    check_packed,
    pack_ternary,
    packed_width,
    ternary_linear,
    ternary_matmul_int32,
    unpack_ternary,
)

__all__ = [
    "attention",
    "check_packed",
    "hamming_search",
    "pack_bits",
    "pack_ternary",
    "packed_width",
    "quantize_rows",
    "ternary_linear",
    "ternary_matmul_int32",
    "unpack_bits",
    "unpack_ternary",
]
