"""Latency of the kernels on the shapes of one model, side by side with PyTorch and with other libraries.

A *case* is one operation on one shape; its variants take turns (see :mod:`tetra.timing`) and the first is what the
others are compared with. Variants that begin with "tetra" are this project's; where their default is not plain
PyTorch, a second line shows what plain PyTorch makes of the same operation. Of the kernels for training this times the
forward pass alone; :mod:`tetra.bench_train` times both passes, and counts what is kept between them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tetra import kernels
from tetra.config import model_config
from tetra.errors import ConfigError
from tetra.kernels.backend import backend_for
from tetra.model import IMAGE_MEAN, IMAGE_STD
from tetra.quantization import blend_activation, blend_weight
from tetra.timing import Progress, check_positive, environment, forced_backend, take_turns
from tetra.timing import threads as _threads

Call = Callable[[], object]

INFERENCE_KERNELS = ("ternary_matmul", "row_quantize", "layer_norm", "attention", "patches", "bits")
TRAINING_KERNELS = ("blended_linear", "residual_dropout", "attention_training", "attention_distillation", "token_loss")
KERNELS = INFERENCE_KERNELS + TRAINING_KERNELS
LAMBDA = 0.5  # what training blends with
DESCRIPTOR_BITS = 12288  # of the BoQ head


@dataclass
class Case:
    """One operation on one shape: ``variants`` are calls without arguments, the first the baseline."""

    kernel: str
    shape: dict[str, Any]
    variants: dict[str, Call] = field(default_factory=dict)


@dataclass(frozen=True)
class _Setting:
    """What every case needs to know."""

    device: torch.device
    half: tuple[torch.dtype, ...]  # half precisions to compare with, the one that the kernels use first
    compiled: bool

    def add_floats(self, case: Case, make: Callable[[torch.dtype], Callable[[], Tensor]]) -> None:
        """PyTorch in float32 and in half precision, and compiled where asked for."""
        for dtype in (torch.float32, *self.half):
            case.variants[f"torch {_short(dtype)}"] = make(dtype)
        if self.compiled:
            for dtype in (torch.float32, *self.half):
                case.variants[f"torch {_short(dtype)} compiled"] = torch.compile(make(dtype))

    def add_own(self, case: Case, name: str, call: Call) -> None:
        """One of this project's operations: as it runs by default, and in plain PyTorch where that differs."""
        case.variants[f"tetra {name}"] = call
        if backend_for(torch.empty(0, device=self.device)) != "torch":
            case.variants[f"tetra {name}, plain torch"] = partial(_in_plain_torch, call)


def _in_plain_torch(call: Call) -> object:
    with forced_backend("torch"):
        return call()


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


# --- cases -------------------------------------------------------------------------------------------------


def _product_case(setting: _Setting, layer: str, m: int, n: int, k: int, notices: list[str]) -> Case:
    case = Case("ternary_matmul", {"layer": layer, "M": m, "N": n, "K": k})
    device, half = setting.device, setting.half[0]
    x = torch.randn(m, k, device=device)
    codes = torch.randint(-1, 2, (n, k), device=device).to(torch.int8)
    weight, bias = codes.float() * 0.05, torch.zeros(n, device=device)

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        x_, w_, b_ = x.to(dtype), weight.to(dtype), bias.to(dtype)
        return lambda: F.linear(x_, w_, b_)

    setting.add_floats(case, make)
    x_q, scale = kernels.quantize_rows(x)
    packed, x_half, weight_scale = kernels.pack_ternary(codes), x.to(half), torch.tensor(0.05, device=device)
    case.variants["torch int8 _int_mm, product only"] = lambda: torch._int_mm(x_q, codes.T)
    _add_gemlite(case, codes, bias, x_half, notices)
    _add_bitblas(case, codes, x_q, notices)
    setting.add_own(case, "int32, product only", lambda: kernels.ternary_matmul_int32(x_q, packed))
    setting.add_own(
        case,
        f"int8 to {_short(half)}",
        lambda: kernels.ternary_linear_int8(x_q, scale, packed, weight_scale, bias, out_dtype=half),
    )
    setting.add_own(
        case, f"{_short(half)}, quantised here", lambda: kernels.ternary_linear(x_half, packed, weight_scale, bias)
    )
    setting.add_own(
        case, f"{_short(half)}, weights only", lambda: kernels.ternary_linear_float(x_half, packed, weight_scale, bias)
    )
    return case


def _norm_case(setting: _Setting, m: int, k: int, quantised: bool) -> Case:
    case = Case("row_quantize" if quantised else "layer_norm", {"M": m, "K": k})
    device, half = setting.device, setting.half[0]
    x, weight, bias = torch.randn(m, k, device=device), torch.ones(k, device=device), torch.zeros(k, device=device)

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        x_, w_, b_ = x.to(dtype), weight.to(dtype), bias.to(dtype)
        if not quantised:
            return lambda: F.layer_norm(x_, (k,), w_, b_)

        def norm_then_quantise() -> Tensor:
            y = F.layer_norm(x_, (k,), w_, b_).float()
            levels = 127.0 / y.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
            return (y * levels).round().to(torch.int8)

        return norm_then_quantise

    setting.add_floats(case, make)
    for dtype in (half, torch.float32):
        x_ = x.to(dtype)
        own = kernels.norm_quantize if quantised else kernels.layer_norm
        setting.add_own(case, f"{own.__name__} {_short(dtype)}", partial(own, x_, weight, bias))
    return case


def _attention_case(setting: _Setting, batch: int, tokens: int, n_heads: int, head_dim: int) -> Case:
    case = Case("attention", {"B": batch, "T": tokens, "H": n_heads, "D": head_dim})
    qkv = torch.randn(batch, tokens, 3 * n_heads * head_dim, device=setting.device)

    def split(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return qkv.to(dtype).view(batch, tokens, 3, n_heads, head_dim).permute(2, 0, 3, 1, 4).unbind()

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        q, k, v = split(dtype)
        return lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)

    def make_plain(dtype: torch.dtype) -> Callable[[], Tensor]:
        q, k, v = split(dtype)
        return lambda: (
            (torch.softmax((q * head_dim**-0.5) @ k.transpose(-2, -1), dim=-1) @ v)
            .transpose(1, 2)
            .reshape(batch, tokens, -1)
        )

    setting.add_floats(case, make)
    for dtype in setting.half:
        case.variants[f"torch {_short(dtype)} matmul-softmax"] = make_plain(dtype)
    for dtype in (setting.half[0], torch.float32):
        rows = qkv.to(dtype)
        setting.add_own(case, f"attention_qkv {_short(dtype)}", partial(kernels.attention_qkv, rows, n_heads))
    return case


def _patches_case(setting: _Setting, batch: int, size: tuple[int, int], patch_size: int) -> Case:
    height, width = size
    case = Case("patches", {"B": batch, "H": height, "W": width, "patch_size": patch_size})
    device, half = setting.device, setting.half[0]
    n_values = 3 * patch_size**2
    images = torch.randint(0, 256, (batch, 3, height, width), device=device, dtype=torch.uint8)
    weight, bias = torch.ones(n_values, device=device), torch.zeros(n_values, device=device)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        def cut() -> Tensor:
            x = ((images.float() / 255 - mean) / std).to(dtype)
            rows, columns = height // patch_size, width // patch_size
            x = x.reshape(batch, 3, rows, patch_size, columns, patch_size).permute(0, 2, 4, 3, 5, 1)
            return F.layer_norm(
                x.reshape(batch, rows * columns, n_values), (n_values,), weight.to(dtype), bias.to(dtype)
            )

        return cut

    setting.add_floats(case, make)
    own = partial(kernels.patch_rows, images, patch_size, weight, bias, mean=IMAGE_MEAN, std=IMAGE_STD, out_dtype=half)
    setting.add_own(case, f"patch_rows {_short(half)}", own)
    return case


def _bits_case(setting: _Setting, batch: int) -> Case:
    case = Case("bits", {"B": batch, "D": DESCRIPTOR_BITS})
    values = torch.randn(batch, DESCRIPTOR_BITS, device=setting.device)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=setting.device)

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        x = values.to(dtype)
        return lambda: ((x > 0).view(batch, -1, 8) * weights).sum(-1, dtype=torch.uint8)

    setting.add_floats(case, make)
    if setting.device.type == "cpu":
        array = values.numpy()
        case.variants["numpy packbits"] = lambda: np.packbits(array > 0, axis=-1)
    setting.add_own(case, "pack_bits fp32", partial(kernels.pack_bits, values))
    return case


def _blended_case(setting: _Setting, layer: str, m: int, n: int, k: int) -> Case:
    """A ternary layer in training, with the norm before it; PyTorch's is composed of plain modules."""
    case = Case("blended_linear", {"layer": layer, "M": m, "N": n, "K": k})
    device = setting.device
    x, weight, bias = (torch.randn(shape, device=device) for shape in ((m, k), (n, k), (n,)))
    scale, shift = torch.ones(k, device=device), torch.zeros(k, device=device)

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        x_, w_, b_, scale_, shift_ = (t.to(dtype) for t in (x, weight, bias, scale, shift))

        def layer() -> Tensor:
            y = F.layer_norm(x_, (k,), scale_, shift_)
            return F.linear(blend_activation(y, LAMBDA), blend_weight(w_, LAMBDA), b_)

        return layer

    setting.add_floats(case, make)
    for dtype in (setting.half[0], torch.float32):
        own = partial(kernels.blended_linear, x.to(dtype), weight, bias, LAMBDA, norm=(scale, shift, 1e-5))
        setting.add_own(case, f"blended_linear {_short(dtype)}", own)
    return case


def _residual_case(setting: _Setting, m: int, k: int, dropout: float) -> Case:
    case = Case("residual_dropout", {"M": m, "K": k, "dropout": dropout})
    residual, y = torch.randn(2, m, k, device=setting.device).unbind()

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        y_ = y.to(dtype)
        return lambda: residual + F.dropout(y_, dropout)

    setting.add_floats(case, make)
    for dtype in (setting.half[0], torch.float32):
        own = partial(kernels.residual_dropout, residual, y.to(dtype), dropout, 1)
        setting.add_own(case, f"residual_dropout {_short(dtype)}", own)
    return case


def _attention_training_case(setting: _Setting, batch: int, tokens: int, n_heads: int, head_dim: int) -> Case:
    case = Case("attention_training", {"B": batch, "T": tokens, "H": n_heads, "D": head_dim})
    qkv = torch.randn(batch, tokens, 3 * n_heads * head_dim, device=setting.device)

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        q, k, v = qkv.to(dtype).view(batch, tokens, 3, n_heads, head_dim).permute(2, 0, 3, 1, 4).unbind()
        return lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)

    setting.add_floats(case, make)
    for dtype in (setting.half[0], torch.float32):
        setting.add_own(
            case, f"attention_train {_short(dtype)}", partial(kernels.attention_train, qkv.to(dtype), n_heads)
        )
    return case


def _attention_loss_case(setting: _Setting, batch: int, tokens: int, n_heads: int, head_dim: int) -> Case:
    """A teacher of the same shape; PyTorch's from one averaged map."""
    case = Case("attention_distillation", {"B": batch, "T": tokens, "H": n_heads, "D": head_dim})
    sides = torch.randn(4, batch, tokens, n_heads, head_dim, device=setting.device).transpose(2, 3)

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        rows = [x.transpose(1, 2).flatten(2) for x in sides.to(dtype)]

        def loss() -> Tensor:
            logits = [(q @ k.transpose(1, 2)).float() / (4 * n_heads * head_dim**0.5) for q, k in (rows[:2], rows[2:])]
            log_p, log_r = (torch.log_softmax(x, -1) for x in logits)
            return F.kl_div(log_p, log_r, log_target=True, reduction="sum") / log_p.numel()

        return loss

    setting.add_floats(case, make)
    for dtype in (setting.half[0], torch.float32):
        own = partial(kernels.attention_distillation, *sides.to(dtype))
        setting.add_own(case, f"attention_distillation {_short(dtype)}", own)
    return case


def _token_loss_case(setting: _Setting, m: int, width: int) -> Case:
    case = Case("token_loss", {"M": m, "C": width})
    student, teacher = torch.randn(2, m, width, device=setting.device).unbind()

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        a, b = student.to(dtype), teacher.to(dtype)
        return lambda: F.mse_loss(F.normalize(a, dim=-1), F.normalize(b, dim=-1))

    setting.add_floats(case, make)
    for dtype in (setting.half[0], torch.float32):
        own = partial(kernels.token_loss, student.to(dtype), teacher.to(dtype))
        setting.add_own(case, f"token_loss {_short(dtype)}", own)
    return case


# --- other libraries ---------------------------------------------------------------------------------------


def _missing(name: str, device: torch.device, notices: list[str]) -> bool:
    """Whether to leave a library out; says once why."""
    reason = None
    if device.type != "cuda":
        reason = "runs on NVIDIA GPUs alone"
    elif importlib.util.find_spec(name.lower()) is None:
        reason = "is not installed"
    line = f"{name} {reason} and was left out"
    if reason and line not in notices:
        notices.append(line)
    return reason is not None


def _add_gemlite(case: Case, codes: Tensor, bias: Tensor, x: Tensor, notices: list[str]) -> None:
    """gemlite's A8W158: int8 activations, quantised in the call, times 2-bit weights.

    Written against the sources of gemlite 0.6.0; has not been run.
    """
    if _missing("gemlite", codes.device, notices):
        return
    helper = importlib.import_module("gemlite.helper")
    maker = helper.A8W158_INT_dynamic(device=str(codes.device), dtype=x.dtype)
    layer = maker.from_weights(codes.to(x.dtype), torch.tensor(0.05, device=codes.device), bias.to(x.dtype))
    case.variants["gemlite A8W158"] = lambda: layer(x)


def _add_bitblas(case: Case, codes: Tensor, x_q: Tensor, notices: list[str]) -> None:
    """BitBLAS W_int2 A_int8: the int32 product alone. The first call of a shape tunes for minutes.

    Written against the documentation and sources of BitBLAS 0.1.0; has not been run.
    """
    if _missing("BitBLAS", codes.device, notices):
        return
    bitblas = importlib.import_module("bitblas")
    config = bitblas.MatmulConfig(
        M=x_q.shape[0],
        N=codes.shape[0],
        K=codes.shape[1],
        A_dtype="int8",
        W_dtype="int2",
        accum_dtype="int32",
        out_dtype="int32",
        layout="nt",
        with_bias=False,
    )
    product = bitblas.Matmul(config=config)
    weight = product.transform_weight(codes)
    case.variants["BitBLAS W2A8, product only"] = lambda: product(x_q, weight)


# --- run ---------------------------------------------------------------------------------------------------


def _cases(setting: _Setting, arch: str, batch: int, kernel: str | None, notices: list[str]) -> Iterator[Case]:
    """The cases of one block, of the stem, of the codes and of training; one set of tensors is alive at a time."""
    c = model_config(arch, None).backbone
    tokens = 1 + c.grid[0] * c.grid[1]
    m = batch * tokens

    def wanted(name: str) -> bool:
        return kernel in (None, name)

    layers = (
        ("qkv", 3 * c.inner_dim, c.width),
        ("out", c.width, c.inner_dim),
        ("up", c.mlp_dim, c.width),
        ("down", c.width, c.mlp_dim),
    )
    if wanted("ternary_matmul"):
        for layer, n, k in layers:
            yield _product_case(setting, layer, m, n, k, notices)
    if wanted("row_quantize"):
        for k in dict.fromkeys((c.width, c.inner_dim, c.mlp_dim)):
            yield _norm_case(setting, m, k, quantised=True)
    if wanted("layer_norm"):
        yield _norm_case(setting, m, c.width, quantised=False)
    if wanted("attention"):
        yield _attention_case(setting, batch, tokens, c.n_heads, c.head_dim)
    if wanted("patches") and c.stem == "patch":
        yield _patches_case(setting, batch, c.image_size, c.patch_size)
    if wanted("bits"):
        yield _bits_case(setting, batch)
    if wanted("blended_linear"):
        for layer, n, k in layers:
            yield _blended_case(setting, layer, m, n, k)
    if wanted("residual_dropout") and c.dropout:
        yield _residual_case(setting, m, c.width, c.dropout)
    if wanted("attention_training"):
        yield _attention_training_case(setting, batch, tokens, c.n_heads, c.head_dim)
    if wanted("attention_distillation"):
        yield _attention_loss_case(setting, batch, tokens, c.n_heads, c.head_dim)
    if wanted("token_loss"):
        yield _token_loss_case(setting, m, c.width)


@torch.inference_mode()
def bench_kernels(
    arch: str = "vit-b",
    batch: int = 1,
    repeats: int = 15,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    kernel: str | None = None,
    compiled: bool = False,
    progress: Progress | None = None,
    notices: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Time the kernels on the shapes that ``arch`` gives them, each beside PyTorch's own.

    Args:
        arch: a stock architecture, whose shapes are taken.
        batch: images a pass.
        repeats: timed calls of each variant, after two untimed ones.
        threads: PyTorch threads on the CPU; the current setting by default.
        device: where to run.
        kernel: only the cases of this one of ``KERNELS``.
        compiled: add PyTorch under torch.compile.
        progress: called with one line a case.
        notices: lines are appended that say which library or variant was left out, and why.

    Returns:
        One mapping a case and variant: ``kernel`` (the file that holds it), ``shape``, ``variant``, ``median_ms``,
        ``p95_ms``, ``min_ms``, ``first_call_ms``, ``ratio`` (how many times as fast as the case's first variant,
        float32 PyTorch, by medians), ``arch``, ``batch``, ``repeats``, and what
        :func:`tetra.timing.environment` tells.

    Raises:
        ConfigError: unknown ``arch`` or ``kernel``, or a number that is not positive.
    """
    check_positive(batch=batch, repeats=repeats, threads=threads)
    if kernel is not None and kernel not in KERNELS:
        raise ConfigError(f"unknown kernel '{kernel}'; known: {', '.join(KERNELS)}")
    device, notices = torch.device(device), [] if notices is None else notices
    half = (torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.bfloat16,)
    setting = _Setting(device, half, compiled)
    rows: list[dict[str, Any]] = []
    with _threads(threads):
        facts = environment(device)
        for case in _cases(setting, arch, batch, kernel, notices):
            if progress is not None:
                progress(f"{case.kernel} {case.shape}")
            times = take_turns(case.variants, device, repeats, left_out=notices)
            baseline = next(iter(times.values())).median
            rows += [
                {
                    "kernel": case.kernel,
                    "shape": case.shape,
                    "variant": name,
                    **taken.figures(),
                    "ratio": baseline / taken.median,
                    "arch": arch,
                    "batch": batch,
                    "repeats": repeats,
                    **facts,
                }
                for name, taken in times.items()
            ]
    return rows
