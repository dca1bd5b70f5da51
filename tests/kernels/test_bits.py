from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tetra.kernels import pack_bits, unpack_bits


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
def test_every_real_dtype(dtype: torch.dtype) -> None:
    values = torch.randn(3, 17).sign().to(dtype)
    assert np.array_equal(pack_bits(values).numpy(), np.packbits((values > 0).numpy(), axis=-1))


def test_zero_is_not_set_and_the_first_value_is_the_highest_bit() -> None:
    assert pack_bits(torch.tensor([1.0, 0.0, -0.0, -1.0, 0.0, 0.0, 0.0, 2.0, 3.0])).tolist() == [0b10000001, 0b10000000]


def test_values_need_not_be_contiguous() -> None:
    values = torch.randn(24, 5).T
    assert np.array_equal(pack_bits(values).numpy(), np.packbits(values.numpy() > 0, axis=-1))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="scalar"):
        pack_bits(torch.tensor(1.0))
    with pytest.raises(TypeError, match="no sign"):
        pack_bits(torch.zeros(8, dtype=torch.complex64))
    with pytest.raises(TypeError, match="codes: dtype"):
        unpack_bits(torch.zeros(2), 3)
    with pytest.raises(ValueError, match="n_bits: 17"):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), 17)
