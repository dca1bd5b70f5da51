from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tetra.kernels import bits, pack_bits, pack_bits_checked, unpack_bits

Run = Callable[..., Any]


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=40),
        elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
    )
)
@settings(max_examples=100, deadline=None)
def test_signs_are_packed_as_numpy_packs_them(values: np.ndarray) -> None:
    packed = pack_bits(torch.from_numpy(values))
    with np.errstate(invalid="ignore"):
        expected = np.packbits(values > 0, axis=-1)
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), expected)
    assert np.array_equal(unpack_bits(packed, values.shape[-1]).numpy(), values > 0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_every_real_dtype(run: Run, dtype: torch.dtype) -> None:
    values = torch.randn(3, 17).sign().to(dtype)
    assert np.array_equal(run(pack_bits, values).numpy(), np.packbits((values > 0).numpy(), axis=-1))


def test_zero_is_not_set_and_the_first_value_is_the_highest_bit() -> None:
    assert pack_bits(torch.tensor([1.0, 0.0, -0.0, -1.0, 0.0, 0.0, 0.0, 2.0, 3.0])).tolist() == [0b10000001, 0b10000000]


def test_values_need_not_be_contiguous(run: Run) -> None:
    wide = torch.randn(9, 3, 50)
    for values in (wide[:, 0].T, wide[..., 7:31], wide[::3, 1:], wide.transpose(0, 1)[..., ::2]):
        expected = np.packbits(values.numpy() > 0, axis=-1)
        assert np.array_equal(run(pack_bits, values).numpy(), expected)
        assert np.array_equal(run(pack_bits_checked, values)[0].numpy(), expected)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 9), (1, 1), (7,), (2, 3, 1023), (2, 1025), (1, 12288)])
def test_every_size(run: Run, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    expected = np.packbits(values.numpy() > 0, axis=-1)
    codes, finite = run(pack_bits_checked, values)
    assert codes.dtype == torch.uint8
    assert np.array_equal(codes.numpy(), expected)
    assert np.array_equal(run(pack_bits, values).numpy(), expected)
    assert finite.dtype == torch.bool
    assert finite.shape == shape[:-1]
    assert finite.all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_finite_are_reported(run: Run, bad: float, dtype: torch.dtype) -> None:
    values = torch.randn(2, 3, 2500).to(dtype)
    values[0, 2, 2499] = bad
    values[1, 0, 3] = bad
    codes, finite = run(pack_bits_checked, values)
    assert finite.tolist() == [[True, True, False], [False, True, True]]
    assert np.array_equal(codes.numpy(), np.packbits((values > 0).numpy(), axis=-1))


def test_operators_are_well_formed() -> None:
    values = torch.randn(3, 21)
    torch.library.opcheck(bits._pack_bits_op, (values,))
    torch.library.opcheck(bits._pack_bits_checked_op, (values.half(),))


def test_they_compile_whole() -> None:
    def both(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pack_bits(values), pack_bits_checked(values)[1]

    values = torch.randn(3, 4, 21)
    codes, finite = torch.compile(both, fullgraph=True, backend="aot_eager")(values)
    assert torch.equal(codes, pack_bits(values))
    assert finite.all()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="scalar"):
        pack_bits(torch.tensor(1.0))
    for dtype in (torch.complex64, torch.uint16, torch.float8_e4m3fn):
        for call in (pack_bits, pack_bits_checked):
            with pytest.raises(TypeError, match=f"values: dtype is {dtype}, wanted one of torch.bool"):
                call(torch.zeros(8).to(dtype))
    with pytest.raises(TypeError, match="codes: dtype"):
        unpack_bits(torch.zeros(2), 3)
    with pytest.raises(ValueError, match="n_bits: 17"):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), 17)
