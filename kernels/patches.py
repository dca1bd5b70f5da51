"""Images to normalised patch rows: the input of the patch projection.

Contract
    letters: B images of H x W pixels, p patch size, T = (H / p) (W / p) patches
    patch_rows(images uint8 | float [B, 3, H, W], p, weight [3 p p], bias [3 p p], eps, mean, std, out_dtype)
        -> out_dtype [B, T, 3 p p]

    x   = images / 255 if uint8, else images (in [0, 1])
    x   = (x - mean) / std                          by channel, in float32, as one multiply-add
    row = x of one patch, flattened as (row, column, channel); patches in reading order
    out = LayerNorm(row) = (row - mean row) / sqrt(var row + eps) * weight + bias       in float32

Errors
    TypeError for other dtypes, ValueError for sides that are not positive multiples of the patch size and for
    parameters that do not fit. A patch with NaN or infinity comes out as NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from tetra.kernels.backend import backend_for, on_device_of, tl, triton
from tetra.kernels.rows import ROW_FIELDS, normalize_row, row_configs, row_options, store_part, tuned_row
from tetra.kernels.specimen import Specimen
from tetra.kernels.tunable import DTYPES as BY_NAME
from tetra.kernels.tunable import TOLERANCES, TRITON_NAMES, Config, Sizes, Trial, Tunable, Work, dtype_name, seeded

IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# --- reference ---------------------------------------------------------------------------------------------


def patch_rows_reference(
    images: Tensor,
    patch_size: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mean: Sequence[float],
    std: Sequence[float],
    out_dtype: torch.dtype,
) -> Tensor:
    """The formulas of the contract, in plain torch."""
    b, _, height, width = images.shape
    rows, columns, p = height // patch_size, width // patch_size, patch_size
    x = images.to(torch.float32) / 255.0 if images.dtype == torch.uint8 else images.to(torch.float32)
    x = (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)
    x = x.reshape(b, 3, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1).reshape(b, rows * columns, 3 * p * p)
    return F.layer_norm(x, weight.shape, weight.to(torch.float32), bias.to(torch.float32), eps).to(out_dtype)


# --- Triton ------------------------------------------------------------------------------------------------


def cost(b: int, height: int, width: int, image_bytes: int = 1, out_bytes: int = 2) -> tuple[int, int]:
    """(float operations, bytes moved at least): colours take 2 operations a value, LayerNorm 7."""
    values = 3 * b * height * width
    return 9 * values, values * (image_bytes + out_bytes)


def _configs(k: int) -> tuple[Config, ...]:
    """As for rows of float32: four values a thread, not eight, because addresses of pixels take registers too."""
    return row_configs(k, torch.float32)


@lru_cache(maxsize=4096)
def shape_key(patch_size: int, images: torch.dtype, out: torch.dtype) -> str:
    """Key of patches among the tuned results."""
    return f"p{patch_size}_{dtype_name(images)}_{dtype_name(out)}"


@triton.jit
def _patch_rows_kernel(
    images_ptr,  # uint8 or float [B, 3, H, W], any strides
    weight_ptr,  # float [K], K = 3 * P * P
    bias_ptr,  # float [K]
    out_ptr,  # float [B, T, K], contiguous
    n_rows,  # patch rows and columns, T = n_rows * n_columns
    n_columns,
    stride_b,  # in elements
    stride_c,
    stride_h,
    stride_w,
    factor_0,  # colour c becomes image * factor_c + offset_c
    factor_1,
    factor_2,
    offset_0,
    offset_1,
    offset_2,
    eps,
    P: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # One block a patch. Neighbouring patches read neighbouring pixels, which the caches hold by then.
    patch = tl.program_id(0)
    column = patch % n_columns
    row = patch // n_columns % n_rows
    image_ptr = images_ptr + (patch // n_columns // n_rows).to(tl.int64) * stride_b
    patch_ptr = image_ptr + (row * P).to(tl.int64) * stride_h + column * P * stride_w
    parts = ()
    for start in tl.static_range(0, K, CHUNK):
        value = start + tl.arange(0, CHUNK)  # (row in patch, column in patch, channel)
        colour = value % 3
        offsets = value // (3 * P) * stride_h + value // 3 % P * stride_w + colour * stride_c
        factor = tl.where(colour == 0, factor_0, tl.where(colour == 1, factor_1, factor_2))
        offset = tl.where(colour == 0, offset_0, tl.where(colour == 1, offset_1, offset_2))
        if start + CHUNK <= K:
            part = tl.load(patch_ptr + offsets).to(tl.float32) * factor + offset
        else:
            part = tl.load(patch_ptr + offsets, mask=value < K, other=0).to(tl.float32) * factor + offset
            part = tl.where(value < K, part, 0.0)
        parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
    parts = normalize_row(parts, weight_ptr, bias_ptr, eps, K, CHUNK)
    out_row = out_ptr + patch.to(tl.int64) * K
    for i in tl.static_range(len(parts)):
        store_part(out_row, i * CHUNK + tl.arange(0, CHUNK), parts[i], (i + 1) * CHUNK, K)


def _launch_patch_rows(
    images: Tensor,
    patch_size: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mean: Sequence[float],
    std: Sequence[float],
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    b, _, height, width = images.shape
    n_rows, n_columns, k = height // patch_size, width // patch_size, 3 * patch_size**2
    out = torch.empty((b, n_rows * n_columns, k), dtype=out_dtype, device=images.device)
    largest = 255.0 if images.dtype == torch.uint8 else 1.0
    if b:
        key = shape_key(patch_size, images.dtype, out_dtype)
        options = tuned_row("patches", key, _configs(k), images.device, config)
        with on_device_of(images):
            _patch_rows_kernel[(b * n_rows * n_columns,)](
                images,
                weight.contiguous(),
                bias.contiguous(),
                out,
                n_rows,
                n_columns,
                *images.stride(),
                *(1.0 / (largest * s) for s in std),
                *(-m / s for m, s in zip(mean, std, strict=True)),
                eps,
                P=patch_size,
                K=k,
                **options,
            )
    return out


def specimens(arch: int) -> list[Specimen]:
    """Patches of 14 x 14 pixels."""
    return [_specimen(14, kind, out) for kind, out in (("u8", "fp16"), ("u8", "bf16"), ("fp32", "fp16"))]


def _specimen(patch_size: int, kind: str, out: str, row: Config | None = None) -> Specimen:
    k = 3 * patch_size**2
    config = row_options(row or _configs(k)[0])
    signature = {"images_ptr": f"*{kind}", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "out_ptr": f"*{out}"}
    sizes = ("n_rows", "n_columns", "stride_b", "stride_c", "stride_h")
    floats = ("factor_0", "factor_1", "factor_2", "offset_0", "offset_1", "offset_2", "eps")
    signature |= dict.fromkeys(sizes, "i32") | dict.fromkeys(floats, "fp32")
    return Specimen(
        name="patches",
        config={"patch_size": patch_size, "images": kind, "out": out, **config},
        kernel=_patch_rows_kernel,
        signature=signature,
        constants={"stride_w": 1, "P": patch_size, "K": k, "CHUNK": config.pop("CHUNK")},
        options=dict(config),
        unaligned=(*sizes, *floats),
    )


# --- tuning ------------------------------------------------------------------------------------------------


def _works(arch: int, n_sms: int, sizes: Sizes, config: Config) -> list[Work]:
    b, height, width, p = (sizes[name] for name in ("b", "height", "width", "patch_size"))
    images, out = sizes["images"], sizes["out"]
    operations, n_bytes = cost(b, height, width, BY_NAME[images].itemsize, BY_NAME[out].itemsize)
    code = _specimen(p, TRITON_NAMES[images], TRITON_NAMES[out], config)
    return [Work(code, b * (height // p) * (width // p), 1, 0, operations, n_bytes, "fp32")]


def _trial(sizes: Sizes, device: torch.device) -> Trial:
    p, random, dtype, out = sizes["patch_size"], seeded(device), BY_NAME[sizes["images"]], BY_NAME[sizes["out"]]
    images = torch.rand((sizes["b"], 3, sizes["height"], sizes["width"]), generator=random, device=device)
    images = (images * 255).to(dtype) if dtype == torch.uint8 else images.to(dtype)
    weight, bias = torch.rand((2, 3 * p * p), generator=random, device=device) + 0.5
    rest = (images, p, weight, bias, 1e-5, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def run(config: Config) -> tuple[Tensor, ...]:
        return (_launch_patch_rows(*rest, out, config),)

    tolerance = TOLERANCES[sizes["out"]]
    return Trial(run, lambda: (patch_rows_reference(*rest, torch.float32),), rtol=tolerance, atol=tolerance)


def tunables() -> list[Tunable]:
    """``patch_rows``. A problem: ``b, height, width, patch_size``, dtypes ``images`` and ``out``."""
    return [
        Tunable(
            name="patches",
            module="patches",
            on="cuda",
            fields=ROW_FIELDS,
            key=lambda sizes: shape_key(sizes["patch_size"], BY_NAME[sizes["images"]], BY_NAME[sizes["out"]]),
            space=lambda arch, sizes: _configs(3 * sizes["patch_size"] ** 2),
            default=lambda arch, n_sms, sizes: _configs(3 * sizes["patch_size"] ** 2)[0],
            works=_works,
            trial=_trial,
        )
    ]


# --- torch operator ----------------------------------------------------------------------------------------


@torch.library.custom_op("tetra::patch_rows", mutates_args=())
def _patch_rows_op(
    images: Tensor,
    patch_size: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mean: Sequence[float],
    std: Sequence[float],
    out_dtype: torch.dtype,
) -> Tensor:
    compute = _launch_patch_rows if backend_for(images) in ("triton", "interpreter") else patch_rows_reference
    return compute(images, patch_size, weight, bias, eps, mean, std, out_dtype)


@_patch_rows_op.register_fake
def _(
    images: Tensor,
    patch_size: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mean: Sequence[float],
    std: Sequence[float],
    out_dtype: torch.dtype,
) -> Tensor:
    b, _, height, width = images.shape
    n_patches = (height // patch_size) * (width // patch_size)
    return images.new_empty((b, n_patches, 3 * patch_size**2), dtype=out_dtype)


# --- public ------------------------------------------------------------------------------------------------


def patch_rows(
    images: Tensor,
    patch_size: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Images to colour-normalised, LayerNorm'ed patch rows, in one pass. Inference only: there is no gradient.

    Args:
        images: RGB [B, 3, H, W], uint8, or float in [0, 1]; any strides; sides are multiples of ``patch_size``.
        patch_size: side of a patch in pixels.
        weight, bias: of the LayerNorm, [3 * patch_size ** 2], any floating dtype, in (row, column, channel) order.
        eps: added to the variance.
        mean, std: by colour channel, of images in [0, 1].
        out_dtype: float16, bfloat16 or float32.

    Returns:
        [B, T, 3 * patch_size ** 2], patches in reading order.
    """
    if images.dtype not in IMAGE_DTYPES:
        raise TypeError(f"images: dtype is {images.dtype}, wanted one of {', '.join(map(str, IMAGE_DTYPES))}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: shape is {tuple(images.shape)}, wanted [B, 3, H, W]")
    if patch_size < 1:
        raise ValueError(f"patch_size: is {patch_size}, wanted a number of pixels >= 1")
    height, width = images.shape[2:]
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        raise ValueError(f"images: {height} x {width} pixels are not positive multiples of patch_size = {patch_size}")
    n_values = 3 * patch_size**2
    for name, parameter in (("weight", weight), ("bias", bias)):
        if not parameter.is_floating_point():
            raise TypeError(f"{name}: dtype is {parameter.dtype}, wanted a floating dtype")
        if parameter.shape != (n_values,):
            raise ValueError(
                f"{name}: shape is {tuple(parameter.shape)}, wanted ({n_values},) = (3 * patch_size ** 2,)"
            )
        if parameter.device != images.device:
            raise ValueError(f"{name}: is on {parameter.device}, but images are on {images.device}; move one of them")
    if not eps >= 0:
        raise ValueError(f"eps: is {eps}, wanted a number >= 0")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name}: has {len(values)} values, wanted 3, one a colour channel")
    if not all(value > 0 for value in std):
        raise ValueError(f"std: is {tuple(std)}, wanted positive numbers")
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"out_dtype: is {out_dtype}, wanted one of {', '.join(map(str, OUT_DTYPES))}")
    return _patch_rows_op(images, patch_size, weight, bias, eps, list(mean), list(std), out_dtype)
