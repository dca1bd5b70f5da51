"""Calls of the public operations, whose launches ``tetra.profiling.static_profile`` counts.

The text of this file is run inside the tree that is looked at (see ``static_worker``), with kernels that do not run:
results are whatever memory held. Shapes are those of ViT-B where nothing says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tetra import kernels

TOKENS, WIDTH, HEADS, MLP = 530, 768, 12, 3072
BATCH = 2  # of one image, a transposed tensor may be contiguous

Call = Callable[[], object]
# The kernel files that a call may launch from, and what makes its inputs and returns it.
Traced = tuple[tuple[str, ...], Callable[[], Call]]


def _half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def _attention() -> Call:
    qkv = _half(BATCH, TOKENS, 3 * WIDTH)
    return lambda: kernels.attention_qkv(qkv, HEADS, prescaled=True)


def _linear(gelu: bool = False, residual: bool = False) -> Call:
    x_q, scale = torch.zeros(TOKENS, WIDTH, dtype=torch.int8), torch.ones(TOKENS)
    packed = kernels.pack_ternary(torch.zeros(MLP, WIDTH, dtype=torch.int8))
    weight_scale, bias = torch.tensor(0.05), torch.zeros(MLP)
    left = _half(TOKENS, MLP) if residual else None

    def call() -> object:
        return kernels.ternary_linear_int8(
            x_q, scale, packed, weight_scale, bias, gelu=gelu, residual=left, out_dtype=torch.float16
        )

    return call


def _matmul() -> Call:
    x_q = torch.zeros(TOKENS, WIDTH, dtype=torch.int8)
    packed = kernels.pack_ternary(torch.zeros(MLP, WIDTH, dtype=torch.int8))
    return lambda: kernels.ternary_matmul_int32(x_q, packed)


def _float_linear() -> Call:
    x, weight_scale, bias = _half(TOKENS, WIDTH), torch.tensor(0.05), torch.zeros(MLP)
    packed = kernels.pack_ternary(torch.zeros(MLP, WIDTH, dtype=torch.int8))
    return lambda: kernels.ternary_linear_float(x, packed, weight_scale, bias)


def _rows(norm: bool) -> Call:
    x, weight, bias = _half(TOKENS, WIDTH), torch.ones(WIDTH), torch.zeros(WIDTH)
    return (lambda: kernels.norm_quantize(x, weight, bias)) if norm else (lambda: kernels.quantize_rows(x))


def _layer_norm() -> Call:
    x, weight, bias = _half(TOKENS, WIDTH), torch.ones(WIDTH), torch.zeros(WIDTH)
    return lambda: kernels.layer_norm(x, weight, bias)


def _patches() -> Call:
    images = torch.zeros(BATCH, 3, 322, 322, dtype=torch.uint8)
    weight, bias = torch.ones(588), torch.zeros(588)
    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    return lambda: kernels.patch_rows(images, 14, weight, bias, mean=mean, std=std, out_dtype=torch.float16)


def _bits() -> Call:
    values = torch.zeros(8, 12288)
    return lambda: kernels.pack_bits(values)


def _both_ways(forward: Callable[[], Tensor], *leaves: Tensor) -> Call:
    """Forward and backward pass."""

    def call() -> None:
        forward().sum().backward()
        for leaf in leaves:
            leaf.grad = None

    return call


def _leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_()


def _blended() -> Call:
    x, weight, bias = (
        _leaf(BATCH, TOKENS, WIDTH),
        _leaf(192, WIDTH, dtype=torch.float32),
        _leaf(192, dtype=torch.float32),
    )
    norm = (_leaf(WIDTH, dtype=torch.float32), _leaf(WIDTH, dtype=torch.float32), 1e-5)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return kernels.blended_linear(x, weight, bias, 0.5, norm=norm)

    return _both_ways(forward, x, weight, bias, *norm[:2])


def _residual() -> Call:
    stream, branch = _leaf(BATCH, TOKENS, WIDTH, dtype=torch.float32), _leaf(BATCH, TOKENS, WIDTH)
    return _both_ways(lambda: kernels.residual_dropout(stream, branch, 0.1, 1), stream, branch)


def _attention_train() -> Call:
    qkv = _leaf(BATCH, TOKENS, 3 * WIDTH)
    return _both_ways(lambda: kernels.attention_train(qkv, HEADS), qkv)


def _attention_loss() -> Call:
    student = [_leaf(BATCH, TOKENS, HEADS, 64) for _ in "qk"]
    teacher = [_leaf(BATCH, TOKENS, HEADS, 64).detach() for _ in "qk"]
    q, k, tq, tk = (x.transpose(1, 2) for x in (*student, *teacher))
    return _both_ways(lambda: kernels.attention_distillation(q, k, tq, tk), *student)


def _token_loss() -> Call:
    student, teacher = _leaf(BATCH, TOKENS, WIDTH, dtype=torch.float32), torch.zeros(BATCH, TOKENS, WIDTH)
    return _both_ways(lambda: kernels.token_loss(student, teacher), student)


def _similarity() -> Call:
    descriptors = _leaf(32, 4096, dtype=torch.float32)
    return _both_ways(lambda: kernels.sign_similarity(descriptors), descriptors)


def _search(n_queries: int) -> Call:
    queries, database = (torch.zeros(n, 64, dtype=torch.uint8) for n in (n_queries, 512))
    return lambda: kernels.hamming_search(queries, database, 5)


def _distances() -> Call:
    queries, database = (torch.zeros(n, 64, dtype=torch.uint8) for n in (4, 512))
    return lambda: kernels.hamming_distances(queries, database)


def calls() -> dict[str, Traced]:
    """By name, every operation with compiled kernels."""
    searches = ("hamming_popcount", "hamming_planes")
    return {
        "attention_qkv": (("attention",), _attention),
        "ternary_linear_int8": (("ternary_matmul",), _linear),
        "ternary_linear_int8, GELU": (("ternary_matmul",), lambda: _linear(gelu=True)),
        "ternary_linear_int8, residual": (("ternary_matmul",), lambda: _linear(residual=True)),
        "ternary_matmul_int32": (("ternary_matmul",), _matmul),
        "ternary_linear_float": (("ternary_matmul",), _float_linear),
        "norm_quantize": (("row_quantize",), lambda: _rows(norm=True)),
        "quantize_rows": (("row_quantize",), lambda: _rows(norm=False)),
        "layer_norm": (("layer_norm",), _layer_norm),
        "patch_rows": (("patches",), _patches),
        "pack_bits": (("bits",), _bits),
        "blended_linear, both passes": (("blended_linear",), _blended),
        "residual_dropout, both passes": (("residual_dropout",), _residual),
        "attention_train, both passes": (("attention_training",), _attention_train),
        "attention_distillation, both passes": (("attention_distillation",), _attention_loss),
        "token_loss, both passes": (("token_loss",), _token_loss),
        "sign_similarity, both passes": (("sign_similarity",), _similarity),
        "hamming_search, 1 query": (searches, lambda: _search(1)),
        "hamming_search, 100 queries": (searches, lambda: _search(100)),
        "hamming_distances": (searches, _distances),
    }
