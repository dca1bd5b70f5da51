"""A linear layer that trains towards ternary weights and int8 activations, and the LayerNorm, GELU, dropout before it.

Contract
    letters: M rows (tokens), K inputs, N outputs; lam in [0, 1] blends the quantised values in
    blended_linear(x float [..., K], weight [N, K], bias [N] | None, lam, norm, gelu, dropout, seed) -> [..., N]

    t   = dropout(gelu(x))       each where asked for; gelu(x) = x/2 (1 + erf(x / sqrt 2))
    v   = (t - mean t) / sqrt(var t + eps) * norm_weight + norm_bias, or t without ``norm``; biased variance
    y   = v + lam (Q(v) - v)     Q(v) = clip(round(v a), -128, 127) / a,  a = 127 / max(max |v|, 1e-5), per row
    w   = W + lam (Q(W) - W)     Q(W) = clip(round(W / s), -1, 1) s,      s = max(mean |W|, 1e-5)
    out = y w^T + bias           rounding is half to even
    With a ``branch`` = (z, dropout, seed) the layer's input is x + dropout(z), the end of the residual branch before it
    (``tetra.kernels.residual_dropout``), and comes back beside the result.

    Gradients are straight-through: dL/dv = dL/dout w and dL/dW = (dL/dout)^T y, as if Q were the identity; then those
    of LayerNorm, dropout and GELU as they are.

    The steps, on [M, K] and [N, K]:
    blend_rows(x, lam, norm, gelu, dropout, seed, out_dtype) -> y
    blend_rows_backward(dL/dy, x, norm, gelu, dropout, seed) -> dL/dx in x.dtype, dL/dnorm_weight, dL/dnorm_bias
    blend_weight(W, lam, out_dtype) -> w

Memory
    Kept for the backward pass: x and the parameters, which exist anyway, and the seed. y and w are made again. With a
    branch that is narrower than the sum (bfloat16 beside a float32 stream), x and z instead of the sum: where a layer
    before has kept x, that is z alone.

Numerics
    Everything but the products is float32 (float64 for float64 inputs). y and w are rounded once, to the compute dtype:
    autocast's where it is on, else that of x; the products run in it. A code may differ by one between backends where
    v a lies within 1e-3 of a rounding boundary, for sums are taken in different orders.
    At lam = 1 the forward pass is inference: int8 codes times ternary codes, summed exactly in int32 by
    ``ternary_linear_int8``; without dropout it gives what ``norm_quantize`` (without ``norm`` and GELU
    ``quantize_rows``) and the packed weight give, bit for bit.
    Sums over rows are taken in an order that depends on the shape alone, so that a step gives the same bits every time.
    Dropout keeps value (row, column) by the hash of (seed, row, column), with the same bits on every backend; see
    ``tetra.kernels.dropout``.

Errors
    TypeError for dtypes that are not floating, ValueError for shapes and devices that do not fit, for K = 0, lam
    outside [0, 1], dropout outside [0, 1). NaN or infinity in a row of x makes that row of the result not finite, in
    the weight all of it (at lam = 0 its column).

Source: TeTRA (arXiv 2503.02511), quantisation-aware training with a blend; the quantisers are BitNet b1.58's (arXiv
2402.17764).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tetra.autotune.table import lookup
from tetra.kernels import native
from tetra.kernels.backend import arch_of, backend_for, is_traced, on_device_of, operator_or_function, tl, triton
from tetra.kernels.dropout import (
    check_dropout,
    dropout_constants,
    dropout_factor,
    dropped_scale,
    hash_row,
    seed_of,
    threshold,
)
from tetra.kernels.gelu import gelu_with_slope
from tetra.kernels.interpreted import cast
from tetra.kernels.residual_dropout import add_dropped, check_branch
from tetra.kernels.row_quantize import (
    LEVELS,
    NORM_DTYPES,
    SMALLEST_MAXIMUM,
    _absolute_bits,
    _maximum_of_bits,
    _quantize_rows_op,
    norm_quantize,
)
from tetra.kernels.rows import (
    ROW_FIELDS,
    TRITON_DTYPES,
    centre_row,
    load_part,
    load_row,
    normalize_row,
    row_configs,
    row_options,
    store_part,
    tuned_row,
)
from tetra.kernels.specimen import Specimen
from tetra.kernels.ternary_matmul import pack_ternary_unchecked, packed_width, ternary_linear_int8
from tetra.kernels.tunable import DTYPES as BY_NAME
from tetra.kernels.tunable import TOLERANCES, TRITON_NAMES, Config, Sizes, Trial, Tunable, Work, dtype_name, seeded

Norm = tuple[Tensor, Tensor, float]
"""Weight [K] and bias [K] of a LayerNorm, of any floating dtype, and eps."""

Branch = tuple[Tensor, float, "int | Tensor"]
"""A residual branch [..., K], what share of it is dropped, and the seed of that."""

SMALLEST_MEAN = 1e-5
DTYPES = (*NORM_DTYPES, torch.float64)


# --- reference ---------------------------------------------------------------------------------------------


def quantized_rows(v: Tensor) -> Tensor:
    """Q(v)."""
    maximum = v.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_MAXIMUM)
    levels = torch.full_like(maximum, LEVELS)  # tensor by tensor is a true division
    return torch.round(v * (levels / maximum)).clamp(-128, 127) * (maximum / levels)


def ternary_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of a weight [N, K] in {-1, 0, 1}, as floats, and their scale: Q(W) = codes * scale."""
    scale = _weight_scale(weight)
    return torch.round(weight * (1.0 / scale)).clamp(-1, 1), scale


def _weight_scale(weight: Tensor) -> Tensor:
    return weight.abs().mean().clamp(min=SMALLEST_MEAN)


def _packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``ternary_codes`` of float32 weights, packed, and their scale."""
    if not is_traced(weight) and backend_for(weight) == "native" and native.supports("pack_weight", weight.dtype):
        scale = _weight_scale(weight)
        return native.pack_weight(weight, float(1.0 / scale), packed_width(weight.shape[1])), scale
    codes, scale = ternary_codes(weight)
    return pack_ternary_unchecked(codes.to(torch.int8)), scale


def blended_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lam: float,
    norm: Norm | None = None,
    gelu: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """The formulas of the contract, step by step, in the dtype of x; PyTorch finds the gradients."""
    v = F.gelu(x) if gelu else x
    if threshold(dropout):
        rows = v.reshape(-1, v.shape[-1])
        scale = dropped_scale(torch.tensor(seed, device=x.device), dropout, 0, *rows.shape)
        v = v * scale.to(v.dtype).view(v.shape)
    if norm is not None:
        v = F.layer_norm(v, v.shape[-1:], norm[0].to(v.dtype), norm[1].to(v.dtype), norm[2])
    codes, weight_scale = ternary_codes(weight.detach())
    y = v + lam * (quantized_rows(v) - v).detach()
    w = weight + lam * (codes * weight_scale - weight).detach()
    return F.linear(y, w.to(y.dtype), None if bias is None else bias.to(y.dtype))


# --- plain PyTorch -----------------------------------------------------------------------------------------

_ROWS_AT_A_TIME = 1024  # bounds the float32 temporaries to what the caches hold


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and single values are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _activate(x: Tensor, first: int, gelu: bool, dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """t of rows from number ``first`` on, and what dropout multiplied it by."""
    t = F.gelu(x) if gelu else x
    if seed is None:
        return t, None
    scale = dropped_scale(seed, dropout, first, *x.shape).to(x.dtype)
    return t * scale, scale


def _blend_rows_torch(
    x: Tensor,
    lam: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    dropout: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    wide = _wide(x.dtype)
    y = torch.empty_like(x, dtype=out_dtype)
    for start in range(0, len(x), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        v, _ = _activate(x[rows].to(wide), start, gelu, dropout, seed)
        if norm_weight is not None and norm_bias is not None:
            v = F.layer_norm(v, norm_weight.shape, norm_weight.to(wide), norm_bias.to(wide), eps)
        y[rows] = v if lam == 0.0 else torch.add(v, quantized_rows(v).sub_(v), alpha=lam)
    return y


def _blend_rows_backward_torch(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide, shape = _wide(x.dtype), x.shape[1:]
    grad_x = torch.empty_like(x)
    sums = torch.zeros((2, 0 if norm_weight is None else x.shape[1]), dtype=wide, device=x.device)
    for start in range(0, len(x), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        part, g = x[rows].to(wide), grad[rows].to(wide)
        t, scale = _activate(part, start, gelu, dropout, seed)
        if norm_weight is not None and norm_bias is not None:
            parameters = norm_weight.to(wide), norm_bias.to(wide)
            _, *moments = torch.native_layer_norm(t, shape, *parameters, eps)
            g, *terms = torch.ops.aten.native_layer_norm_backward(g, t, shape, *moments, *parameters, [True] * 3)
            sums += torch.stack(terms)
        g = g if scale is None else g * scale
        grad_x[rows] = torch.ops.aten.gelu_backward(g, part) if gelu else g
    return grad_x, sums


def _blend_weight_torch(weight: Tensor, lam: float, out_dtype: torch.dtype) -> Tensor:
    weight = weight.to(_wide(weight.dtype))
    codes, scale = ternary_codes(weight)
    return torch.add(weight, codes.mul_(scale).sub_(weight), alpha=lam).to(out_dtype)


# --- Triton ------------------------------------------------------------------------------------------------

# Rows go to blocks of threads as in ``tetra.kernels.rows``, in the backward pass with 4 values a thread and part: it
# holds five rows, of which the sums over rows are two. Registers do not hold wider rows than these, which plain
# PyTorch takes.
MAX_K = 6144
# Of the backward pass: at most so many blocks, which write one row of sums each, and at least so many rows a block.
MAX_BLOCKS = 1024
ROWS_A_BLOCK = 8
# Of the weight: values that a block takes at a time, and warps. The first row is that of the sum of |W| too, which
# nothing may change: its order is the shape's alone. At most so many blocks take part in it.
WEIGHT_FIELDS = ("BLOCK", "num_warps")
WEIGHT_CONFIGS = ((2048, 8), (1024, 4), (1024, 8), (2048, 4), (4096, 8), (4096, 16))
MAX_SUMS = 128


def cost(
    m: int,
    k: int,
    in_bytes: int = 2,
    out_bytes: int = 2,
    *,
    norm: bool = True,
    gelu: bool = False,
    dropout: bool = False,
    backward: bool = False,
) -> tuple[int, int]:
    """(operations, bytes moved at least) of ``blend_rows`` on [m, k], or of its backward pass.

    Operations a value, forward: 7 to blend, 7 for a LayerNorm, 13 for a GELU, 10 (integer) for dropout. Backward, where
    all but the blend is computed again: 14 for a LayerNorm, 20 for a GELU, 12 for dropout. Every tensor moves once:
    x and y, or x and the gradients with respect to it (``in_bytes`` a value) and to y (``out_bytes``).
    """
    if backward:
        return m * k * (14 * norm + 20 * gelu + 12 * dropout), m * k * (2 * in_bytes + out_bytes) + 16 * k * norm
    return m * k * (7 + 7 * norm + 13 * gelu + 10 * dropout), m * k * (in_bytes + out_bytes) + 8 * k * norm


@triton.jit
def _round(x):
    """Half to even, for |x| <= 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _blend_rows_kernel(
    x_ptr,  # float [M, K], contiguous
    seed_ptr,  # int64; None without dropout
    weight_ptr,  # float [K], or None for no LayerNorm
    bias_ptr,  # float [K], or None
    y_ptr,  # float [M, K], contiguous
    lam,
    eps,
    K: tl.constexpr,
    GELU: tl.constexpr,
    THRESHOLD: tl.constexpr,  # hashes below are dropped; 0 without dropout
    KEEP_SCALE: tl.constexpr,
    BLEND: tl.constexpr,  # lam > 0
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, CHUNK)
    parts = load_row(x_ptr + row * K, None, None, K, CHUNK, GELU)
    if THRESHOLD:
        row_hash = hash_row(seed_ptr, row)
        kept = ()
        for i in tl.static_range(len(parts)):
            factor = dropout_factor(row_hash, i * CHUNK + columns, THRESHOLD, KEEP_SCALE)
            kept = kept + (parts[i] * factor,)  # type: ignore[assignment]  # noqa: RUF005
        parts = kept
    if weight_ptr is not None:
        parts = normalize_row(parts, weight_ptr, bias_ptr, eps, K, CHUNK)
    if BLEND:
        bits = _absolute_bits(parts[0])
        for i in tl.static_range(1, len(parts)):
            bits = tl.maximum(bits, _absolute_bits(parts[i]))
        maximum = _maximum_of_bits(tl.max(bits))
        to_codes = tl.div_rn(127.0, maximum)
        to_values = tl.div_rn(maximum, 127.0)
    for i in tl.static_range(len(parts)):
        part = parts[i]
        if BLEND:
            part += lam * (_round(part * to_codes) * to_values - part)
        store_part(y_ptr + row * K, i * CHUNK + columns, part, (i + 1) * CHUNK, K)


@triton.jit
def _blend_rows_backward_kernel(
    grad_ptr,  # float [M, K], contiguous: dL/dy
    x_ptr,  # float [M, K], contiguous
    seed_ptr,  # as in the forward kernel
    weight_ptr,
    grad_x_ptr,  # like x
    sums_ptr,  # float32 [blocks, 2, K]: what the rows of a block add to dL/dweight and dL/dbias; None without LayerNorm
    M,
    rows_a_block,
    eps,
    K: tl.constexpr,
    GELU: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    columns = tl.arange(0, CHUNK)
    first = tl.program_id(0).to(tl.int64) * rows_a_block
    weight_sums = ()
    bias_sums = ()
    for _ in tl.static_range(0, K, CHUNK):
        weight_sums = weight_sums + (tl.zeros((CHUNK,), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        bias_sums = bias_sums + (tl.zeros((CHUNK,), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for i_row in range(tl.minimum(rows_a_block, M - first).to(tl.int32)):
        row = first + i_row
        grads = load_row(grad_ptr + row * K, None, None, K, CHUNK, False)
        values = load_row(x_ptr + row * K, None, None, K, CHUNK, False)
        slopes = ()
        parts = ()
        for i in tl.static_range(len(values)):
            part = values[i]
            slope = tl.full((CHUNK,), 1.0, tl.float32)
            if GELU:
                part, slope = gelu_with_slope(part)
            if THRESHOLD:
                factor = dropout_factor(hash_row(seed_ptr, row), i * CHUNK + columns, THRESHOLD, KEEP_SCALE)
                part *= factor
                slope *= factor
            parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
            slopes = slopes + (slope,)  # type: ignore[assignment]  # noqa: RUF005
        if weight_ptr is not None:
            # dL/dt = (g - mean g - h mean(g h)) * factor with g = weight dL/dy and h = (t - mean t) * factor
            centred, factor = centre_row(parts, eps, K, CHUNK)
            added_weight = ()
            added_bias = ()
            total = tl.zeros((CHUNK,), tl.float32)
            slanted = tl.zeros((CHUNK,), tl.float32)
            for i in tl.static_range(len(grads)):
                added_weight = added_weight + (weight_sums[i] + grads[i] * centred[i] * factor,)  # type: ignore[assignment]  # noqa: RUF005
                added_bias = added_bias + (bias_sums[i] + grads[i],)  # type: ignore[assignment]  # noqa: RUF005
                scaled = grads[i] * load_part(weight_ptr, i * CHUNK + columns, (i + 1) * CHUNK, K)
                total += scaled
                slanted += scaled * centred[i]
            weight_sums = added_weight
            bias_sums = added_bias
            mean = tl.sum(total) * (1.0 / K)
            slant = tl.sum(slanted) * (1.0 / K) * factor * factor
            through_norm = ()
            for i in tl.static_range(len(grads)):
                scaled = grads[i] * load_part(weight_ptr, i * CHUNK + columns, (i + 1) * CHUNK, K)
                through_norm = through_norm + ((scaled - mean - centred[i] * slant) * factor,)  # type: ignore[assignment]  # noqa: RUF005
            grads = through_norm
        for i in tl.static_range(len(grads)):
            store_part(grad_x_ptr + row * K, i * CHUNK + columns, grads[i] * slopes[i], (i + 1) * CHUNK, K)
    if weight_ptr is not None:
        weight_row = sums_ptr + tl.program_id(0).to(tl.int64) * (2 * K)
        for i in tl.static_range(len(weight_sums)):
            store_part(weight_row, i * CHUNK + columns, weight_sums[i], (i + 1) * CHUNK, K)
            store_part(weight_row + K, i * CHUNK + columns, bias_sums[i], (i + 1) * CHUNK, K)


@triton.jit
def _absolute_sums_kernel(
    weight_ptr,  # float [n]
    sums_ptr,  # float32 [blocks]
    n,
    values_a_block,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * values_a_block
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, tl.minimum(first + values_a_block, n), BLOCK):
        places = start + tl.arange(0, BLOCK)
        sums += tl.abs(tl.load(weight_ptr + places, mask=places < n, other=0.0).to(tl.float32))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(sums))


@triton.jit
def _blend_weight_kernel(
    weight_ptr,  # float [n]
    sums_ptr,  # float32 [n_sums], from the kernel above
    out_ptr,  # float [n]
    n,
    n_sums,
    lam,
    MAX_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_sums = tl.arange(0, MAX_SUMS)
    mean = tl.div_rn(tl.sum(tl.load(sums_ptr + i_sums, mask=i_sums < n_sums, other=0.0)), n * 1.0)
    scale = tl.where(mean < 1e-5, 1e-5, mean)  # NaN stays
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + places, mask=places < n, other=0.0).to(tl.float32)
    codes = _round(tl.minimum(tl.maximum(weight * tl.div_rn(1.0, scale), -1.0), 1.0))
    blended = weight + lam * (codes * scale - weight)
    tl.store(out_ptr + places, cast(blended, out_ptr.dtype.element_ty), mask=places < n)


def _configs(k: int, dtype: torch.dtype = torch.float32) -> tuple[Config, ...]:
    """For rows of ``k`` values of ``dtype``; the default is the backward pass's, whatever its dtypes."""
    return row_configs(k, dtype, limited=False)  # a limit is enough for a row and its norm; the blend would spill


@lru_cache(maxsize=4096)
def _rows_and_key(
    part: str, k: int, dtype: torch.dtype, out: torch.dtype, norm: bool, gelu: bool, dropout: bool, blend: bool
) -> tuple[tuple[Config, ...], str]:
    """What a launch looks up: rows that may run, the default first, and the key. ``out`` is the dtype of y or dL/dy."""
    rows = _configs(k, dtype) if part == "forward" else _configs(k)
    flags = "_norm" * norm + "_gelu" * gelu + "_dropout" * dropout + "_blend" * (blend and part == "forward")
    return rows, f"{part}_k{k}_{dtype_name(dtype)}_{dtype_name(out)}{flags}"


@lru_cache(maxsize=4096)
def _weight_key(n: int, dtype: torch.dtype, out: torch.dtype) -> str:
    """Key of a weight of n values among the tuned results."""
    return f"n{n}_{dtype_name(dtype)}_{dtype_name(out)}"


def _launch_blend_rows(
    x: Tensor,
    lam: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    dropout: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    m, k = x.shape
    y = torch.empty_like(x, dtype=out_dtype)
    if m:
        flags = (norm_weight is not None, gelu, threshold(dropout) > 0, lam > 0.0)
        rows, key = _rows_and_key("forward", k, x.dtype, out_dtype, *flags)
        options = tuned_row("blend_rows", key, rows, x.device, config)
        with on_device_of(x):
            _blend_rows_kernel[(m,)](
                x,
                seed,
                None if norm_weight is None else norm_weight.contiguous(),
                None if norm_bias is None else norm_bias.contiguous(),
                y,
                lam,
                eps,
                K=k,
                GELU=gelu,
                BLEND=lam > 0.0,
                **dropout_constants(dropout),
                **options,
            )
    return y


def _rows_a_block(m: int, norm: bool) -> int:
    return max(-(-m // MAX_BLOCKS), ROWS_A_BLOCK) if norm else 1


def _launch_blend_rows_backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    gelu: bool,
    dropout: float,
    seed: Tensor | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    grad_x = torch.empty_like(x)
    # Of the shape alone, so that every GPU adds the rows up in the same order.
    rows_a_block = _rows_a_block(m, norm_weight is not None)
    n_blocks = -(-m // rows_a_block)
    sums = torch.empty((n_blocks, 2, 0 if norm_weight is None else k), dtype=torch.float32, device=x.device)
    if m:
        flags = (norm_weight is not None, gelu, threshold(dropout) > 0, False)
        rows, key = _rows_and_key("backward", k, x.dtype, grad.dtype, *flags)
        options = tuned_row("blend_rows", key, rows, x.device, config)
        with on_device_of(x):
            _blend_rows_backward_kernel[(n_blocks,)](
                grad,
                x,
                seed,
                None if norm_weight is None else norm_weight.contiguous(),
                grad_x,
                None if norm_weight is None else sums,
                m,
                rows_a_block,
                eps,
                K=k,
                GELU=gelu,
                **dropout_constants(dropout),
                **options,
            )
    return grad_x, sums.sum(0)


def _launch_blend_weight(weight: Tensor, lam: float, out_dtype: torch.dtype, config: Config | None = None) -> Tensor:
    out, n = torch.empty_like(weight, dtype=out_dtype), weight.numel()
    if n:
        for_sums = dict(zip(WEIGHT_FIELDS, WEIGHT_CONFIGS[0], strict=True))
        values_a_block = triton.cdiv(triton.cdiv(n, MAX_SUMS), for_sums["BLOCK"]) * for_sums["BLOCK"]
        n_sums = triton.cdiv(n, values_a_block)
        sums = torch.empty(n_sums, dtype=torch.float32, device=weight.device)
        if config is None:
            key = _weight_key(n, weight.dtype, out_dtype)
            config = lookup("blend_weight", arch_of(weight.device), key, WEIGHT_CONFIGS, device=weight.device)
        options = dict(zip(WEIGHT_FIELDS, config, strict=True))
        with on_device_of(weight):
            _absolute_sums_kernel[(n_sums,)](weight, sums, n, values_a_block, **for_sums)
            blocks = (triton.cdiv(n, options["BLOCK"]),)
            _blend_weight_kernel[blocks](weight, sums, out, n, n_sums, lam, MAX_SUMS=MAX_SUMS, **options)
    return out


def specimens(arch: int) -> list[Specimen]:
    """What training runs: rows of 768 and 3072 values (with GELU), in bfloat16 and from float32; weights; the
    widest rows."""
    found = [_weight_specimen(dtype, out) for dtype, out in (("fp32", "bf16"), ("fp32", "fp16"), ("fp32", "fp32"))]
    for backward in (False, True):
        for dtype, out in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16"), ("fp32", "fp32")):
            found.append(_rows_specimen(768, dtype, out, backward))
            found.append(_rows_specimen(3072, dtype, out, backward, gelu=True, dropout=0.1))
        found.append(_rows_specimen(3072, "bf16", "bf16", backward, norm=False, gelu=True, dropout=0.1))
        for k in (4096, MAX_K):  # most values a thread, and most threads
            found.append(_rows_specimen(k, "fp32", "fp32", backward, gelu=True, dropout=0.1))
    return [*found, _rows_specimen(768, "fp32", "bf16", False, blend=False), _sums_specimen("fp32")]


def _rows_specimen(
    k: int,
    dtype: str,
    out: str,
    backward: bool,
    *,
    norm: bool = True,
    gelu: bool = False,
    dropout: float = 0.0,
    blend: bool = True,
    row: Config | None = None,
) -> Specimen:
    config = row_options(row or (_configs(k) if backward else _configs(k, TRITON_DTYPES[dtype]))[0])
    shown: dict[str, Any] = {"part": "rows_backward" if backward else "rows", "K": k, "dtype": dtype, "out": out}
    shown |= {"norm": norm, "gelu": gelu, "dropout": dropout, "blend": blend, **config}
    constants: dict[str, Any] = {"K": k, "GELU": gelu, "CHUNK": config.pop("CHUNK"), **dropout_constants(dropout)}
    parameter = "*fp32" if norm else None
    arguments = {"x_ptr": f"*{dtype}", "seed_ptr": "*i64" if dropout else None, "weight_ptr": parameter, "eps": "fp32"}
    if backward:
        arguments |= {"grad_ptr": f"*{out}", "grad_x_ptr": f"*{dtype}", "sums_ptr": parameter, "M": "i32"}
        if norm:
            arguments["rows_a_block"] = "i32"
        else:
            constants["rows_a_block"] = 1
    else:
        arguments |= {"bias_ptr": parameter, "y_ptr": f"*{out}", "lam": "fp32"}
        constants["BLEND"] = blend
    return Specimen(
        name="blended_linear",
        config=shown,
        kernel=_blend_rows_backward_kernel if backward else _blend_rows_kernel,
        signature={name: kind for name, kind in arguments.items() if kind is not None},
        constants=constants | {name: None for name, kind in arguments.items() if kind is None},
        options=config,
        unaligned=tuple(name for name in ("lam", "eps", "M", "rows_a_block") if name in arguments),
    )


def _weight_specimen(dtype: str, out: str, config: Config = WEIGHT_CONFIGS[0]) -> Specimen:
    block, warps = config
    pointers = {"weight_ptr": f"*{dtype}", "sums_ptr": "*fp32", "out_ptr": f"*{out}"}
    return Specimen(
        name="blended_linear",
        config={"part": "weight", "dtype": dtype, "out": out, "BLOCK": block, "num_warps": warps},
        kernel=_blend_weight_kernel,
        signature={**pointers, "n": "i32", "n_sums": "i32", "lam": "fp32"},
        constants={"MAX_SUMS": MAX_SUMS, "BLOCK": block},
        options={"num_warps": warps},
        unaligned=("n_sums", "lam"),
    )


def _sums_specimen(dtype: str) -> Specimen:
    block, warps = WEIGHT_CONFIGS[0]
    return Specimen(
        name="blended_linear",
        config={"part": "sums", "dtype": dtype, "BLOCK": block, "num_warps": warps},
        kernel=_absolute_sums_kernel,
        signature={"weight_ptr": f"*{dtype}", "sums_ptr": "*fp32", "n": "i32", "values_a_block": "i32"},
        constants={"BLOCK": block},
        options={"num_warps": warps},
    )


# --- tuning ------------------------------------------------------------------------------------------------

_FLAGS = ("norm", "gelu", "dropout", "blend")


def _problem_rows_and_key(sizes: Sizes) -> tuple[tuple[Config, ...], str]:
    dtypes = BY_NAME[sizes["x"]], BY_NAME[sizes["y"]]
    return _rows_and_key(sizes["part"], sizes["k"], *dtypes, *(bool(sizes[name]) for name in _FLAGS))


def _rows_works(arch: int, n_sms: int, sizes: Sizes, config: Config) -> list[Work]:
    m, k, backward = sizes["m"], sizes["k"], sizes["part"] == "backward"
    norm, gelu, dropout = sizes["norm"], sizes["gelu"], sizes["dropout"]
    operations, n_bytes = cost(
        m,
        k,
        BY_NAME[sizes["x"]].itemsize,
        BY_NAME[sizes["y"]].itemsize,
        norm=norm,
        gelu=gelu,
        dropout=dropout > 0,
        backward=backward,
    )
    code = _rows_specimen(
        k,
        TRITON_NAMES[sizes["x"]],
        TRITON_NAMES[sizes["y"]],
        backward,
        norm=norm,
        gelu=gelu,
        dropout=dropout,
        blend=sizes["blend"],
        row=config,
    )
    rows_a_block = _rows_a_block(m, norm) if backward else 1
    return [Work(code, -(-m // rows_a_block), rows_a_block, 0, operations, n_bytes, "fp32")]


def _rows_trial(sizes: Sizes, device: torch.device) -> Trial:
    shape, random = (sizes["m"], sizes["k"]), seeded(device)
    x, grad = (torch.randn(shape, generator=random, device=device).to(BY_NAME[sizes[name]]) for name in ("x", "y"))
    weight, bias = torch.rand((2, sizes["k"]), generator=random, device=device) + 0.5 if sizes["norm"] else (None, None)
    lam, gelu, dropout = 0.7 if sizes["blend"] else 0.0, sizes["gelu"], sizes["dropout"]
    seed = torch.tensor(1, device=device) if threshold(dropout) else None
    tolerance = TOLERANCES[sizes["y"]]
    if sizes["part"] == "forward":

        def forward(config: Config) -> tuple[Tensor, ...]:
            return (_launch_blend_rows(x, lam, weight, bias, 1e-5, gelu, dropout, seed, grad.dtype, config),)

        def expected() -> tuple[Tensor, ...]:
            wide = x.to(torch.float32)
            return (_blend_rows_torch(wide, lam, weight, bias, 1e-5, gelu, dropout, seed, torch.float32),)

        # A code may differ by one, which is a 127th of the largest value.
        return Trial(forward, expected, rtol=tolerance, atol=max(tolerance, 0.06 * lam))

    def backward(config: Config) -> tuple[Tensor, ...]:
        grad_x, sums = _launch_blend_rows_backward(grad, x, weight, 1e-5, gelu, dropout, seed, config)
        return (grad_x, sums) if sizes["norm"] else (grad_x,)

    def expected_backward() -> tuple[Tensor, ...]:
        wide = grad.to(torch.float64), x.to(torch.float64)
        grad_x, sums = _blend_rows_backward_torch(*wide, weight, bias, 1e-5, gelu, dropout, seed)
        return (grad_x, sums) if sizes["norm"] else (grad_x,)

    tolerance = TOLERANCES[sizes["x"]]
    return Trial(backward, expected_backward, rtol=tolerance, atol=(tolerance, 1e-3 * sizes["m"] ** 0.5))


def _weight_works(arch: int, n_sms: int, sizes: Sizes, config: Config) -> list[Work]:
    n, dtype, out = sizes["n"], sizes["x"], sizes["y"]
    n_bytes = n * (BY_NAME[dtype].itemsize + BY_NAME[out].itemsize)
    code = _weight_specimen(TRITON_NAMES[dtype], TRITON_NAMES[out], config)
    return [Work(code, -(-n // config[0]), 1, 0, 8 * n, n_bytes, "fp32")]


def _weight_trial(sizes: Sizes, device: torch.device) -> Trial:
    weight = torch.randn((sizes["n"],), generator=seeded(device), device=device).to(BY_NAME[sizes["x"]])
    out = BY_NAME[sizes["y"]]

    def expected() -> tuple[Tensor, ...]:
        return (_blend_weight_torch(weight.to(torch.float32), 0.7, torch.float32),)

    # A code may differ by one where a value lies on the boundary.
    return Trial(
        lambda config: (_launch_blend_weight(weight, 0.7, out, config),),
        expected,
        rtol=TOLERANCES[sizes["y"]],
        atol=1e-2,
    )


def tunables() -> list[Tunable]:
    """Rows and weights. A problem of rows: ``part`` ("forward", "backward"), ``m, k``, dtypes ``x`` and ``y``, whether
    there are ``norm, gelu, blend``, and ``dropout``; the key leaves ``m`` out. Of weights: ``n``, ``x``, ``y``."""
    return [
        Tunable(
            name="blend_rows",
            module="blended_linear",
            on="cuda",
            fields=ROW_FIELDS,
            key=lambda sizes: _problem_rows_and_key(sizes)[1],
            space=lambda arch, sizes: _problem_rows_and_key(sizes)[0],
            default=lambda arch, n_sms, sizes: _problem_rows_and_key(sizes)[0][0],
            works=_rows_works,
            trial=_rows_trial,
        ),
        Tunable(
            name="blend_weight",
            module="blended_linear",
            on="cuda",
            fields=WEIGHT_FIELDS,
            key=lambda sizes: _weight_key(sizes["n"], BY_NAME[sizes["x"]], BY_NAME[sizes["y"]]),
            space=lambda arch, sizes: WEIGHT_CONFIGS,
            default=lambda arch, n_sms, sizes: WEIGHT_CONFIGS[0],
            works=_weight_works,
            trial=_weight_trial,
        ),
    ]


# --- torch operators ---------------------------------------------------------------------------------------


def _is_compiled(backend: str, k: int, *dtypes: torch.dtype) -> bool:
    return backend in ("triton", "interpreter") and k <= MAX_K and all(dtype in NORM_DTYPES for dtype in dtypes)


def _norm_of(norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float) -> Norm | None:
    return None if norm_weight is None or norm_bias is None else (norm_weight, norm_bias, eps)


def _blend_rows(
    x: Tensor,
    lam: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    dropout: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    backend = backend_for(x)
    if backend == "native" and native.supports("blend_rows", x.dtype):
        norm = _norm_of(norm_weight, norm_bias, eps)
        return native.blend_rows(x, lam, norm, gelu, dropout, 0 if seed is None else int(seed), out_dtype)
    run = _launch_blend_rows if _is_compiled(backend, x.shape[1], x.dtype, out_dtype) else _blend_rows_torch
    return run(x, lam, norm_weight, norm_bias, eps, gelu, dropout, seed, out_dtype)


_blend_rows_op = torch.library.custom_op("tetra::blend_rows", _blend_rows, mutates_args=())


@_blend_rows_op.register_fake
def _(
    x: Tensor,
    lam: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    dropout: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(x, dtype=out_dtype)


def _blend_rows_backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dL/dx, and those of the norm's weight and bias in one tensor [2, K], or [2, 0] without norm."""
    backend = backend_for(x)
    if backend == "native" and native.supports("blend_rows", x.dtype):
        norm = _norm_of(norm_weight, norm_bias, eps)
        found = native.blend_rows_backward(grad, x, norm, gelu, dropout, 0 if seed is None else int(seed))
        return found[0], torch.stack(found[1:])
    if _is_compiled(backend, x.shape[1], x.dtype, grad.dtype):
        return _launch_blend_rows_backward(grad, x, norm_weight, eps, gelu, dropout, seed)
    return _blend_rows_backward_torch(grad, x, norm_weight, norm_bias, eps, gelu, dropout, seed)


_blend_rows_backward_op = torch.library.custom_op("tetra::blend_rows_backward", _blend_rows_backward, mutates_args=())


@_blend_rows_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    k = 0 if norm_weight is None else x.shape[1]
    return torch.empty_like(x), x.new_empty((2, k), dtype=_wide(x.dtype))


def _blend_weight(weight: Tensor, lam: float, out_dtype: torch.dtype) -> Tensor:
    backend = backend_for(weight)
    if backend == "native" and native.supports("blend_weight", weight.dtype):
        return native.blend_weight(weight, lam, out_dtype)
    if _is_compiled(backend, 0, weight.dtype, out_dtype):
        return _launch_blend_weight(weight, lam, out_dtype)
    return _blend_weight_torch(weight, lam, out_dtype)


_blend_weight_op = torch.library.custom_op("tetra::blend_weight", _blend_weight, mutates_args=())


@_blend_weight_op.register_fake
def _(weight: Tensor, lam: float, out_dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=out_dtype)


# --- with a gradient ---------------------------------------------------------------------------------------


class _Settings(NamedTuple):
    """What is not a tensor."""

    lam: float
    eps: float
    gelu: bool
    dropout: float
    branch_dropout: float
    dtype: torch.dtype  # of the products
    out_dtype: torch.dtype


class _BlendedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        seed: Tensor | None,
        branch_seed: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor | None]:
        lam, eps, gelu, dropout, branch_dropout, dtype, out_dtype = settings
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.bias_dtype = settings, None if bias is None else bias.dtype
        ctx.dtypes = x.dtype, None if branch is None else branch.dtype
        total = None
        if branch is not None:
            total = _total(x, branch, branch_dropout, branch_seed)
            if total.element_size() <= branch.element_size():  # then its parts take no less
                x, branch = total, None
        ctx.save_for_backward(x, branch, weight, norm_weight, norm_bias, seed, branch_seed)
        norm = _norm_of(norm_weight, norm_bias, eps)
        x = x if total is None else total
        rows = x.reshape(-1, x.shape[-1])
        if lam == 1.0 and {x.dtype, dtype, out_dtype} <= set(NORM_DTYPES):
            out = _infer(rows, weight, bias, norm, gelu, dropout, seed, out_dtype)
        else:
            y = blend_rows(rows, lam, norm, gelu, dropout, seed, dtype)
            w = blend_weight(weight, lam, dtype)
            out = F.linear(y, w, None if bias is None else bias.to(dtype)).to(out_dtype)
        return out.view(*x.shape[:-1], len(weight)), total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        x, branch, weight, norm_weight, norm_bias, seed, branch_seed = ctx.saved_tensors
        lam, eps, gelu, dropout, branch_dropout, dtype, _ = ctx.settings
        needs, (x_dtype, branch_dtype) = ctx.needs_input_grad, ctx.dtypes
        norm = _norm_of(norm_weight, norm_bias, eps)
        found: list[Tensor | None] = [None] * 9
        grad_x = grad_total
        if grad is not None:
            total = x if branch is None else _total(x, branch, branch_dropout, branch_seed)
            rows = total.reshape(-1, x.shape[-1])
            grad = grad.reshape(len(rows), len(weight)).to(dtype)
            if needs[0] or needs[1] or needs[4] or needs[5]:
                grad_rows = grad @ blend_weight(weight, lam, dtype)
                if needs[2]:
                    grad_rows, *grad_norm, y = blend_rows_again(grad_rows, rows, lam, norm, gelu, dropout, seed)
                else:
                    grad_rows, *grad_norm = blend_rows_backward(grad_rows, rows, norm, gelu, dropout, seed)
                grad_x = grad_rows.view(x.shape)
                if grad_total is not None:
                    grad_x += grad_total
                if norm is not None:
                    found[4], found[5] = (g.to(p.dtype) for g, p in zip(grad_norm, norm[:2], strict=True))
            elif needs[2]:
                y = blend_rows(rows, lam, norm, gelu, dropout, seed, dtype)
            if needs[2]:
                found[2] = (grad.T @ y).to(weight.dtype)
            if needs[3]:
                found[3] = grad.sum(0).to(ctx.bias_dtype)
        if grad_x is not None:
            found[0] = grad_x.to(x_dtype) if needs[0] else None
            if branch_dtype is not None and needs[1]:
                found[1] = add_dropped(None, grad_x, branch_dropout, branch_seed, branch_dtype)
        return tuple(found)


def _total(x: Tensor, branch: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """x + dropout(branch)."""
    return add_dropped(x, branch, dropout, seed, torch.promote_types(x.dtype, branch.dtype))


def _infer(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    gelu: bool,
    dropout: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """What the layer computes once it is packed, from a weight that is not."""
    if norm is not None and seed is None:
        x_q, scale = norm_quantize(rows, *norm, gelu=gelu)
    else:
        activated = blend_rows(rows, 0.0, norm, gelu, dropout, seed, torch.float32)
        x_q, scale = _quantize_rows_op(activated, checked=False)
    packed, weight_scale = _packed(weight.to(torch.float32))
    return ternary_linear_int8(x_q, scale, packed, weight_scale, bias, out_dtype=out_dtype)


# --- public ------------------------------------------------------------------------------------------------


def blend_rows(
    x: Tensor,
    lam: float,
    norm: Norm | None = None,
    gelu: bool = False,
    dropout: float = 0.0,
    seed: int | Tensor | None = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y of the rows ``x`` [M, K] in ``out_dtype``, by default x.dtype. There is no gradient; nothing is checked."""
    weight, bias, eps = (None, None, 0.0) if norm is None else norm
    drawn = seed_of(seed, dropout, x.device)
    if lam == 0.0 and norm is None and drawn is None and not gelu:
        return x.to(out_dtype or x.dtype)
    run = operator_or_function(x, _blend_rows_op, _blend_rows)
    y: Tensor = run(x.contiguous(), lam, weight, bias, eps, gelu, dropout, drawn, out_dtype or x.dtype)
    return y


def blend_rows_backward(
    grad: Tensor,
    x: Tensor,
    norm: Norm | None = None,
    gelu: bool = False,
    dropout: float = 0.0,
    seed: int | Tensor | None = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """From dL/dy [M, K] dL/dx in x.dtype and those of the norm's weight and bias: float32 [K], or [0] without norm."""
    weight, bias, eps = (None, None, 0.0) if norm is None else norm
    drawn = seed_of(seed, dropout, x.device)
    if norm is None and drawn is None and not gelu:
        return grad.to(x.dtype), *x.new_empty((2, 0), dtype=_wide(x.dtype))
    x, grad = x.contiguous(), grad.contiguous()
    run = operator_or_function(x, _blend_rows_backward_op, _blend_rows_backward)
    grad_x, sums = run(grad, x, weight, bias, eps, gelu, dropout, drawn)
    return grad_x, sums[0], sums[1]


def _native_takes(x: Tensor, grad: Tensor) -> bool:
    return backend_for(x) == "native" and all(native.supports("blend_rows", t.dtype) for t in (x, grad))


def blend_rows_again(
    grad: Tensor,
    x: Tensor,
    lam: float,
    norm: Norm | None = None,
    gelu: bool = False,
    dropout: float = 0.0,
    seed: int | Tensor | None = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`blend_rows_backward`, and y in grad.dtype, which the weight's gradient needs; on CPUs in one pass."""
    drawn = seed_of(seed, dropout, x.device)
    does_nothing = norm is None and drawn is None and not gelu and lam == 0.0
    if not (does_nothing or is_traced(x)) and _native_takes(x, grad):
        number = 0 if drawn is None else int(drawn)
        return native.blend_rows_again(grad.contiguous(), x.contiguous(), lam, norm, gelu, dropout, number)
    found = blend_rows_backward(grad, x, norm, gelu, dropout, drawn)
    return *found, blend_rows(x, lam, norm, gelu, dropout, drawn, grad.dtype)


def blend_weight(weight: Tensor, lam: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """w of ``weight`` [N, K] in ``out_dtype``, by default weight.dtype. There is no gradient; nothing is checked."""
    if lam == 0.0:
        return weight.to(out_dtype or weight.dtype)
    run = operator_or_function(weight, _blend_weight_op, _blend_weight)
    w: Tensor = run(weight.contiguous(), lam, out_dtype or weight.dtype)
    return w


@overload
def blended_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lam: float,
    *,
    norm: Norm | None = None,
    gelu: bool = False,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    out_dtype: torch.dtype | None = None,
    branch: None = None,
) -> Tensor: ...


@overload
def blended_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lam: float,
    *,
    norm: Norm | None = None,
    gelu: bool = False,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    out_dtype: torch.dtype | None = None,
    branch: Branch,
) -> tuple[Tensor, Tensor]: ...


def blended_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lam: float,
    *,
    norm: Norm | None = None,
    gelu: bool = False,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    out_dtype: torch.dtype | None = None,
    branch: Branch | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear layer of blended operands, with a gradient: x [..., K] -> [..., N].

    Args:
        x: float [..., K].
        weight: float [N, K].
        bias: float [N], or None.
        lam: from 0, an ordinary layer, to 1, ternary weights and int8 activations.
        norm: weight [K], bias [K] and eps of a LayerNorm that comes first.
        gelu: apply the exact (erf) GELU before that.
        dropout: share of the values that are dropped after the GELU, before the norm.
        seed: of the dropout; an integer, or an int64 tensor with one element on x's device.
        out_dtype: of the result; by default the compute dtype, which is autocast's where it is on, else x.dtype.
        branch: float [..., K], its dropout and seed: the input is x + dropout(branch) in the wider dtype of the two,
            and is returned after the result.
    """
    _check_arguments(x, weight, bias, lam, norm, out_dtype)
    check_dropout(dropout)
    z, branch_dropout, branch_seed = (None, 0.0, 0) if branch is None else branch
    if z is not None:
        if z.dtype not in DTYPES:
            raise TypeError(f"branch: dtype is {z.dtype}, wanted one of {', '.join(map(str, DTYPES))}")
        check_branch(x, z)
        check_dropout(branch_dropout)
    dtype = _compute_dtype(x)
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else norm
    settings = _Settings(float(lam), eps, gelu, dropout, branch_dropout, dtype, out_dtype or dtype)
    seeds = seed_of(seed, dropout, x.device), seed_of(branch_seed, branch_dropout, x.device)
    out, total = _BlendedLinear.apply(x, z, weight, bias, norm_weight, norm_bias, *seeds, settings)
    return out if branch is None else (out, total)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def _check_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, lam: float, norm: Norm | None, out_dtype: torch.dtype | None
) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x: dtype is {x.dtype}, wanted one of {', '.join(map(str, DTYPES))}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)} has no values in its last dimension; wanted [..., K], K >= 1")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: shape is {tuple(weight.shape)}, wanted [N, {x.shape[-1]}], as x has")
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam: is {lam}, wanted 0 <= lam <= 1")
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(f"out_dtype: is {out_dtype}, wanted one of {', '.join(map(str, DTYPES))}")
    vectors = [("bias", bias, weight.shape[0])]
    if norm is not None:
        vectors += [("norm[0]", norm[0], x.shape[-1]), ("norm[1]", norm[1], x.shape[-1])]
        if not norm[2] >= 0:
            raise ValueError(f"norm[2]: is {norm[2]}, wanted eps >= 0")
    for name, vector, n in vectors:
        if vector is not None and vector.shape != (n,):
            raise ValueError(f"{name}: shape is {tuple(vector.shape)}, wanted ({n},)")
    for name, tensor in (("weight", weight), *((name, vector) for name, vector, _ in vectors)):
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: dtype is {tensor.dtype}, wanted one of {', '.join(map(str, DTYPES))}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, but x is on {x.device}; move one of them")
