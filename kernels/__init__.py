"""Operations on packed tensors: tensors in, tensors out, nothing of the model.

Every file holds one operation: its contract, a reference in plain torch, the fast path for the CPU, and the
Triton kernel where there is one. ``backend`` chooses among them. Importing this package needs neither Triton
nor a GPU.
"""

from tetra.kernels.attention import attention, attention_qkv, query_scale
from tetra.kernels.attention_distillation import attention_distillation
from tetra.kernels.attention_training import attention_train
from tetra.kernels.bits import pack_bits, pack_bits_checked, unpack_bits
from tetra.kernels.blended_linear import blended_linear
from tetra.kernels.hamming_database import HammingDatabase
from tetra.kernels.hamming_search import hamming_distances, hamming_range_search, hamming_search
from tetra.kernels.layer_norm import layer_norm
from tetra.kernels.patches import patch_rows
from tetra.kernels.residual_dropout import residual_dropout
from tetra.kernels.row_quantize import norm_quantize, quantize_rows
from tetra.kernels.sign_similarity import sign_similarity
from tetra.kernels.ternary_matmul import (
    check_packed,
    pack_ternary,
    packed_width,
    ternary_linear,
    ternary_linear_float,
    ternary_linear_int8,
    ternary_matmul_int32,
    unpack_ternary,
)
from tetra.kernels.token_loss import token_loss

__all__ = [
    "HammingDatabase",
    "attention",
    "attention_distillation",
    "attention_qkv",
    "attention_train",
    "blended_linear",
    "check_packed",
    "hamming_distances",
    "hamming_range_search",
    "hamming_search",
    "layer_norm",
    "norm_quantize",
    "pack_bits",
    "pack_bits_checked",
    "pack_ternary",
    "packed_width",
    "patch_rows",
    "quantize_rows",
    "query_scale",
    "residual_dropout",
    "sign_similarity",
    "ternary_linear",
    "ternary_linear_float",
    "ternary_linear_int8",
    "ternary_matmul_int32",
    "token_loss",
    "unpack_bits",
    "unpack_ternary",
]
