"""Binary descriptors: one bit a value, eight values a byte.

Contract
    pack_bits(values [..., D]) -> uint8 [..., ceil(D / 8)]
    pack_bits_checked(values [..., D]) -> (the same, finite bool [...]): whether a row holds no NaN or infinity
    unpack_bits(codes uint8 [..., B], n_bits) -> bool [..., n_bits]

A bit is ``value > 0``, everywhere. The most significant bit of a byte comes first and the last byte is filled
with zeros, as ``numpy.packbits`` does. NaN is not greater than zero, so it gives 0.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from tetra.autotune.table import lookup
from tetra.kernels.backend import arch_of, backend_for, on_device_of, tl, triton
from tetra.kernels.specimen import Specimen
from tetra.kernels.tunable import DTYPES as BY_NAME
from tetra.kernels.tunable import TRITON_NAMES, Config, Sizes, Trial, Tunable, Work, dtype_name, seeded

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
_BIT_WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)


# --- reference and CPU -------------------------------------------------------------------------------------


def _pack_bits_torch(values: Tensor) -> Tensor:
    bits = values if values.dtype == torch.bool else values > 0
    missing = -bits.shape[-1] % 8
    if missing:
        bits = torch.nn.functional.pad(bits, (0, missing))
    grouped = bits.reshape(*bits.shape[:-1], bits.shape[-1] // 8, 8)
    weights = torch.tensor(_BIT_WEIGHTS, dtype=torch.uint8, device=bits.device)
    return (grouped * weights).sum(-1, dtype=torch.uint8)


# --- Triton ------------------------------------------------------------------------------------------------

CONFIG_FIELDS = ("BLOCK_BYTES", "num_warps")
CONFIGS = ((128, 4), (64, 2), (32, 1), (64, 4), (256, 4), (256, 8), (512, 8))


@lru_cache(maxsize=4096)
def shape_key(d: int, dtype: torch.dtype, checked: bool) -> str:
    """Key of rows of ``d`` values among the tuned results."""
    return f"d{d}_{dtype_name(dtype)}" + "_checked" * checked


def cost(rows: int, d: int, value_bytes: int = 4) -> tuple[int, int]:
    """(operations, bytes moved at least) of packing [rows, d]: a comparison and an addition a value."""
    return 2 * rows * d, rows * d * value_bytes + rows * -(-d // 8)


@triton.jit
def _pack_bits_kernel(
    values_ptr,  # any real type [rows, D], rows contiguous
    codes_ptr,  # uint8 [rows, ceil(D / 8)], contiguous
    not_finite_ptr,  # int32 [rows], zeros, or None: set where a row holds NaN or infinity
    D,
    n_blocks,  # of BLOCK_BYTES bytes, a row
    stride,  # of a row of values, in elements
    BLOCK_BYTES: tl.constexpr,
):
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    first = tl.program_id(0) % n_blocks * BLOCK_BYTES
    byte = first + tl.arange(0, BLOCK_BYTES)
    bit = tl.arange(0, 8)[None, :]
    value = byte[:, None] * 8 + bit
    values = tl.load(values_ptr + row * stride + value, mask=value < D, other=0)
    if values.dtype == tl.bfloat16:  # which not every chip, nor Triton's interpreter, calculates with
        values = values.to(tl.float32)
    codes = tl.sum((values > 0).to(tl.int32) << (7 - bit), 1)
    width = (D + 7) // 8
    tl.store(codes_ptr + row * width + byte, codes.to(tl.uint8), mask=byte < width)
    if not_finite_ptr is not None:
        # x - x is 0, or NaN, which no comparison holds for, where x is not finite.
        strange = tl.max((values - values != 0).to(tl.int32).reshape(8 * BLOCK_BYTES))
        tl.atomic_or(not_finite_ptr + row, 1, mask=strange != 0, sem="relaxed")


def _launch_pack_bits(values: Tensor, checked: bool, config: Config | None = None) -> tuple[Tensor, Tensor | None]:
    """Codes of values [rows, D] and, if ``checked``, int32 [rows], not 0 where a row is not finite."""
    rows, d = values.shape
    values = values if values.stride(1) == 1 else values.contiguous()
    values = values.to(torch.uint8) if values.dtype == torch.bool else values
    codes = torch.empty((rows, -(-d // 8)), dtype=torch.uint8, device=values.device)
    not_finite = torch.zeros(rows, dtype=torch.int32, device=values.device) if checked else None
    if codes.numel():
        if config is None:
            key = shape_key(d, values.dtype, checked)
            config = lookup("bits", arch_of(values.device), key, CONFIGS, device=values.device)
        options = dict(zip(CONFIG_FIELDS, config, strict=True))
        n_blocks = triton.cdiv(codes.shape[1], options["BLOCK_BYTES"])
        with on_device_of(values):
            _pack_bits_kernel[(rows * n_blocks,)](values, codes, not_finite, d, n_blocks, values.stride(0), **options)
    return codes, not_finite


def specimens(arch: int) -> list[Specimen]:
    """Rows of descriptors, with and without the check."""
    return [_specimen(dtype, checked) for dtype in ("fp16", "fp32") for checked in (False, True)]


def _specimen(dtype: str, checked: bool, config: Config = CONFIGS[0]) -> Specimen:
    options = dict(zip(CONFIG_FIELDS, config, strict=True))
    signature = {"values_ptr": f"*{dtype}", "codes_ptr": "*u8"}
    if checked:
        signature["not_finite_ptr"] = "*i32"
    constants = {} if checked else {"not_finite_ptr": None}
    return Specimen(
        name="bits",
        config={"dtype": dtype, "checked": checked, **options},
        kernel=_pack_bits_kernel,
        signature=signature | dict.fromkeys(("D", "n_blocks", "stride"), "i32"),
        constants=constants | {"BLOCK_BYTES": options["BLOCK_BYTES"]},
        options={"num_warps": options["num_warps"]},
        unaligned=("n_blocks",),
    )


# --- tuning ------------------------------------------------------------------------------------------------


def _works(arch: int, n_sms: int, sizes: Sizes, config: Config) -> list[Work]:
    rows, d, dtype = sizes["rows"], sizes["d"], sizes["dtype"]
    operations, n_bytes = cost(rows, d, BY_NAME[dtype].itemsize)
    bytes_a_row = (d + 7) // 8
    blocks = rows * -(-bytes_a_row // config[0])
    return [Work(_specimen(TRITON_NAMES[dtype], sizes["checked"], config), blocks, 1, 0, operations, n_bytes, "fp32")]


def _trial(sizes: Sizes, device: torch.device) -> Trial:
    values = torch.randn((sizes["rows"], sizes["d"]), generator=seeded(device), device=device)
    values = values.to(BY_NAME[sizes["dtype"]])
    values[sizes["rows"] // 2, 0] = torch.nan  # a bit that is not set, in a row that is not finite

    def run(config: Config) -> tuple[Tensor, ...]:
        codes, not_finite = _launch_pack_bits(values, sizes["checked"], config)
        return (codes,) if not_finite is None else (codes, not_finite)

    def expected() -> tuple[Tensor, ...]:
        codes = _pack_bits_torch(values)
        return (codes, ~torch.isfinite(values).all(1)) if sizes["checked"] else (codes,)

    return Trial(run, expected)


def tunables() -> list[Tunable]:
    """Packing. A problem: ``rows, d``, ``dtype`` and whether values are ``checked``; the key leaves ``rows`` out."""
    return [
        Tunable(
            name="bits",
            module="bits",
            on="cuda",
            fields=CONFIG_FIELDS,
            key=lambda sizes: shape_key(sizes["d"], BY_NAME[sizes["dtype"]], sizes["checked"]),
            space=lambda arch, sizes: CONFIGS,
            default=lambda arch, n_sms, sizes: CONFIGS[0],
            works=_works,
            trial=_trial,
        )
    ]


# --- torch operators ---------------------------------------------------------------------------------------


@torch.library.custom_op("tetra::pack_bits", mutates_args=())
def _pack_bits_op(values: Tensor) -> Tensor:
    if backend_for(values) in ("triton", "interpreter"):
        return _launch_pack_bits(values, False)[0]
    return _pack_bits_torch(values)


@_pack_bits_op.register_fake
def _(values: Tensor) -> Tensor:
    return values.new_empty((values.shape[0], (values.shape[1] + 7) // 8), dtype=torch.uint8)


@torch.library.custom_op("tetra::pack_bits_checked", mutates_args=())
def _pack_bits_checked_op(values: Tensor) -> tuple[Tensor, Tensor]:
    if backend_for(values) in ("triton", "interpreter"):
        codes, not_finite = _launch_pack_bits(values, True)
        return codes, not_finite == 0  # type: ignore[return-value]
    return _pack_bits_torch(values), torch.isfinite(values).all(dim=-1)


@_pack_bits_checked_op.register_fake
def _(values: Tensor) -> tuple[Tensor, Tensor]:
    codes = values.new_empty((values.shape[0], (values.shape[1] + 7) // 8), dtype=torch.uint8)
    return codes, values.new_empty(values.shape[0], dtype=torch.bool)


# --- public ------------------------------------------------------------------------------------------------


def _check_values(values: Tensor) -> None:
    if values.ndim == 0:
        raise ValueError("values: a scalar has no last dimension to pack; give a tensor of shape [..., D]")
    if values.dtype not in DTYPES:
        raise TypeError(f"values: dtype is {values.dtype}, wanted one of {', '.join(map(str, DTYPES))}")


def _as_rows(values: Tensor) -> Tensor:
    """[rows, D]; written out because a view cannot tell how many rows there are when D is 0."""
    return values.detach().reshape(math.prod(values.shape[:-1]), values.shape[-1])


def pack_bits(values: Tensor) -> Tensor:
    """Signs of ``values`` (float, integer or bool, [..., D]) as bytes: uint8 [..., ceil(D / 8)]."""
    _check_values(values)
    codes = _pack_bits_op(_as_rows(values))
    return codes.view(*values.shape[:-1], codes.shape[-1])


def pack_bits_checked(values: Tensor) -> tuple[Tensor, Tensor]:
    """``pack_bits`` and, for every row, whether all its values are finite: uint8 [..., ceil(D / 8)], bool [...].

    So descriptors can be refused without ever being written as floats.
    """
    _check_values(values)
    codes, finite = _pack_bits_checked_op(_as_rows(values))
    return codes.view(*values.shape[:-1], codes.shape[-1]), finite.view(values.shape[:-1])


def unpack_bits(codes: Tensor, n_bits: int) -> Tensor:
    """The first ``n_bits`` bits of every row of ``codes`` (uint8 [..., B]): bool [..., n_bits]."""
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: dtype is {codes.dtype}, wanted torch.uint8")
    if codes.ndim == 0:
        raise ValueError("codes: a scalar has no last dimension; give a tensor of shape [..., B]")
    if not 0 <= n_bits <= 8 * codes.shape[-1]:
        raise ValueError(f"n_bits: {n_bits} is not between 0 and the {8 * codes.shape[-1]} bits of a row")
    weights = torch.tensor(_BIT_WEIGHTS, dtype=torch.uint8, device=codes.device)
    bits = (codes.unsqueeze(-1) & weights) != 0
    return bits.flatten(-2)[..., :n_bits]
