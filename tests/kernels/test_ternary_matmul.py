from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tetra.kernels import (
    check_packed,
    pack_ternary,
    packed_width,
    quantize_rows,
    ternary_linear,
    ternary_matmul_int32,
    unpack_ternary,
)
from tetra.kernels import ternary_matmul as source

Run = Callable[..., Any]


def random_codes(n: int, k: int) -> Tensor:
    return torch.randint(-1, 2, (n, k), dtype=torch.int8)


def random_activations(m: int, k: int) -> Tensor:
    return torch.randint(-128, 128, (m, k), dtype=torch.int8)


def product(x_q: Tensor, codes: Tensor) -> Tensor:
    """The definition, in numpy."""
    return torch.from_numpy((x_q.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T).astype(np.int32))


# --- packing -----------------------------------------------------------------------------------------------


@given(n=st.integers(0, 9), k=st.integers(1, 300), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_packing_round_trip(n: int, k: int, seed: int) -> None:
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (n, 32 * -(-k // 128))
    check_packed(packed, k)
    assert torch.equal(unpack_ternary(packed, k), codes)
    padding = unpack_ternary(packed, 4 * packed.shape[1])[:, k:]
    assert not padding.any()


def test_layout_is_four_planes_of_a_group() -> None:
    """Byte i of a group holds the values i, 32 + i, 64 + i, 96 + i from its low bits up."""
    codes = random_codes(3, 256)
    packed = pack_ternary(codes).numpy()
    as_bits = {0: 0b00, 1: 0b01, -1: 0b11}
    for row in range(3):
        for value in range(256):
            group, within = divmod(value, 128)
            plane, byte = divmod(within, 32)
            bits = packed[row, 32 * group + byte] >> (2 * plane) & 3
            assert bits == as_bits[int(codes[row, value])]


@pytest.mark.parametrize("k", [1, 127, 128, 129, 384])
@pytest.mark.parametrize("field", [0, 1, 2, 3])
def test_illegal_code_is_refused(k: int, field: int) -> None:
    packed = pack_ternary(random_codes(5, k))
    column = packed.shape[1] - 7
    packed[3, column] = packed[3, column] & ~(3 << (2 * field)) | (2 << (2 * field))
    with pytest.raises(ValueError, match=r"row 3 .*illegal code 10"):
        check_packed(packed)
    with pytest.raises(ValueError, match=r"row 3 .*illegal code 10"):
        unpack_ternary(packed, k)


@pytest.mark.parametrize("k", [1, 40, 127, 129])
def test_values_in_the_padding_are_refused(k: int) -> None:
    full = torch.zeros(2, 4 * packed_width(k), dtype=torch.int8)
    full[1, k] = -1
    with pytest.raises(ValueError, match="not zero"):
        check_packed(pack_ternary(full), k)


@pytest.mark.parametrize("bad", [2, -2, 127, -128])
def test_codes_outside_ternary_are_refused(bad: int) -> None:
    codes = random_codes(2, 5)
    codes[1, 2] = bad
    with pytest.raises(ValueError, match=f"found {bad}"):
        pack_ternary(codes)


def test_packing_of_wrong_types_and_shapes_is_refused() -> None:
    with pytest.raises(TypeError, match=r"codes: dtype is torch\.float32"):
        pack_ternary(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="codes: shape"):
        pack_ternary(torch.zeros(3, dtype=torch.int8))
    with pytest.raises(TypeError, match="packed: dtype"):
        unpack_ternary(torch.zeros(2, 32, dtype=torch.int8), 5)
    with pytest.raises(ValueError, match="multiple of 32"):
        unpack_ternary(torch.zeros(2, 33, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="129 values take 64"):
        unpack_ternary(torch.zeros(2, 32, dtype=torch.uint8), 129)


def run_ptx(ptx: str, word: np.ndarray) -> np.ndarray:
    """Executes the two instructions that the unpacking uses, on 32-bit registers."""
    registers: dict[str, np.ndarray | np.uint32] = {"$1": word.astype(np.uint32)}
    instructions = re.findall(r"(shl|and)\.b32 (\S+), (\S+), (\w+);", ptx)
    assert instructions
    for operation, target, operand, constant in instructions:
        number = np.uint32(int(constant, 0))
        value = registers[operand]
        registers[target] = value << number if operation == "shl" else value & number
    return np.asarray(registers["$0"])


def test_inline_assembly_on_every_byte_in_every_lane() -> None:
    text = inspect.getsource(source._unpack_plane.fn)
    programs = re.findall(r'_on_four_bytes\(packed, "([^"]*)"\)', text)
    assert len(programs) == 4
    every_byte = np.arange(256, dtype=np.uint32)
    code_of = np.array([0, 1, -128, -1])  # 10, which is illegal, has no value
    for lane in range(4):
        for others in (0, 0xFFFFFFFF, 0xA5A5A5A5, 0x5A5A5A5A):
            words = (every_byte << np.uint32(8 * lane)) | np.uint32(others & ~(0xFF << 8 * lane))
            for plane, ptx in enumerate(programs):
                out = run_ptx(ptx, words)
                byte = ((out >> np.uint32(8 * lane)) & np.uint32(0xFF)).astype(np.uint8).view(np.int8)
                fields = every_byte >> 2 * plane & 3
                legal = fields != 2
                assert np.array_equal(byte[legal], 64 * code_of[fields[legal]])


# --- the exact product -------------------------------------------------------------------------------------

SHAPES = [(0, 5, 7), (1, 1, 1), (3, 0, 40), (1, 130, 127), (7, 5, 128), (33, 17, 129), (65, 70, 260), (2, 3, 3072)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_product_is_exact(run: Run, m: int, n: int, k: int) -> None:
    x_q, codes = random_activations(m, k), random_codes(n, k)
    out = run(ternary_matmul_int32, x_q, pack_ternary(codes))
    assert out.dtype == torch.int32
    assert torch.equal(out, product(x_q, codes))
    assert torch.equal(source.ternary_matmul_int32_reference(x_q, pack_ternary(codes)), out)


def test_product_of_extreme_values(run: Run) -> None:
    """The largest sums there are: all activations -128 or 127 against all weights of one sign."""
    k = 3072
    x_q = torch.tensor([[-128], [127]], dtype=torch.int8).repeat(1, k)
    codes = torch.tensor([[1], [-1]], dtype=torch.int8).repeat(1, k)
    out = run(ternary_matmul_int32, x_q, pack_ternary(codes))
    assert out.tolist() == [[-128 * k, 128 * k], [127 * k, -127 * k]]


@pytest.mark.parametrize("m", [1023, 1025, 2500])
def test_many_rows_are_exact(m: int) -> None:
    """More rows than are worked on at a time."""
    x_q, codes = random_activations(m, 50), random_codes(9, 50)
    assert torch.equal(ternary_matmul_int32(x_q, pack_ternary(codes)), product(x_q, codes))


@given(m=st.integers(0, 40), n=st.integers(0, 40), k=st.integers(1, 400), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_cpu_product_is_exact_for_any_shape(m: int, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=generator)
    assert torch.equal(ternary_matmul_int32(x_q, pack_ternary(codes)), product(x_q, codes))


@pytest.mark.parametrize("k", [128, 131072, 131073, 200000])
def test_product_in_floats_is_exact(k: int) -> None:
    """What machines without int8 dot products run, on both sides of what float32 holds."""
    x_q, codes = random_activations(2, k), random_codes(3, k)
    x_q[0], codes[0] = -128, 1
    assert torch.equal(source._product_in_floats(x_q, codes), product(x_q, codes))


@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE"])
def test_product_is_exact_on_older_processors(isa: str) -> None:
    """oneDNN reads the instruction set that it may use when it starts, so this takes a process."""
    program = (
        "import torch; from tetra.kernels import ternary_matmul_int32, pack_ternary\n"
        "x = torch.randint(-128, 128, (65, 768), dtype=torch.int8); x[0] = -128; x[1] = 127\n"
        "w = torch.randint(-1, 2, (130, 768), dtype=torch.int8); w[0] = 1; w[1] = -1\n"
        "assert torch.equal(ternary_matmul_int32(x, pack_ternary(w)).long(), x.long() @ w.long().T)\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_inputs_need_not_be_contiguous(run: Run) -> None:
    x_q = random_activations(300, 14).T  # columns apart
    codes = random_codes(20, 300)
    packed = torch.stack([pack_ternary(codes)] * 2, dim=-1)[..., 0]
    assert not packed.is_contiguous()
    assert torch.equal(run(ternary_matmul_int32, x_q, packed), product(x_q, codes))
    wide = random_activations(6, 700)[:, 100:400]  # rows apart, at an odd offset
    assert torch.equal(run(ternary_matmul_int32, wide, packed), product(wide, codes))


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_inputs_may_start_at_any_byte(run: Run, offset: int) -> None:
    """As they do when they are views into the bytes of a file."""
    x_q, codes = random_activations(4, 128), random_codes(6, 128)
    packed = pack_ternary(codes)
    x_bytes, packed_bytes = torch.zeros(offset + 512, dtype=torch.int8), torch.zeros(offset + 192, dtype=torch.uint8)
    x_bytes[offset:], packed_bytes[offset:] = x_q.flatten(), packed.flatten()
    moved = packed_bytes[offset:].view(6, 32)
    assert torch.equal(run(ternary_matmul_int32, x_bytes[offset:].view(4, 128), moved), product(x_q, codes))
    assert torch.equal(unpack_ternary(moved, 128), codes)


# --- the linear layer --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 33, 130), (66, 17, 256)])
def test_linear_is_dequantised_product(run: Run, dtype: torch.dtype, tolerance: float, m: int, n: int, k: int) -> None:
    x, codes, bias = torch.randn(m, k).to(dtype), random_codes(n, k), torch.randn(n).to(dtype)
    out = run(ternary_linear, x, pack_ternary(codes), 0.37, bias)
    x_q, scale = quantize_rows(x)
    expected = product(x_q, codes).double() * scale.double()[:, None] * 0.37 + bias.double()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_linear_keeps_leading_dimensions_and_takes_no_bias() -> None:
    x, packed = torch.randn(2, 3, 5, 40), pack_ternary(random_codes(7, 40))
    out = ternary_linear(x, packed, torch.tensor([0.5]))
    assert out.shape == (2, 3, 5, 7)
    flat = ternary_linear(x.reshape(30, 40), packed, 0.5)
    assert torch.equal(out.reshape(30, 7), flat)
    assert ternary_linear(x[:0], packed, 0.5).shape == (0, 3, 5, 7)


def test_rows_do_not_depend_on_each_other() -> None:
    """A batch is worked on in parts; every row comes out as if it were alone."""
    x, packed = torch.randn(1500, 64), pack_ternary(random_codes(10, 64))
    out = ternary_linear(x, packed, 0.1)
    for row in (0, 749, 750, 1499):
        assert torch.equal(out[row], ternary_linear(x[row], packed, 0.1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_linear_refuses_values_that_are_not_finite(bad: float) -> None:
    x = torch.randn(4, 40)
    x[2, 39] = bad
    with pytest.raises(ValueError, match="row 2 holds NaN or infinity"):
        ternary_linear(x, pack_ternary(random_codes(3, 40)), 1.0)


def test_wrong_arguments_name_the_argument_and_the_value() -> None:
    packed = pack_ternary(random_codes(6, 40))
    with pytest.raises(TypeError, match=r"x_q: dtype is torch\.float32"):
        ternary_matmul_int32(torch.zeros(2, 40), packed)
    with pytest.raises(ValueError, match=r"x_q: shape is \(40,\)"):
        ternary_matmul_int32(torch.zeros(40, dtype=torch.int8), packed)
    with pytest.raises(ValueError, match="x_q: 200 values a row"):
        ternary_matmul_int32(torch.zeros(2, 200, dtype=torch.int8), packed)
    with pytest.raises(TypeError, match=r"x: dtype is torch\.int64"):
        ternary_linear(torch.zeros(2, 40, dtype=torch.int64), packed, 1.0)
    with pytest.raises(ValueError, match=r"bias: shape is \(5,\)"):
        ternary_linear(torch.zeros(2, 40), packed, 1.0, torch.zeros(5))
    with pytest.raises(ValueError, match=r"weight_scale: shape is \(2,\)"):
        ternary_linear(torch.zeros(2, 40), packed, torch.ones(2))
    too_wide = source.MAX_K + 1
    with pytest.raises(ValueError, match="overflow"):
        ternary_matmul_int32(
            torch.zeros(1, too_wide, dtype=torch.int8), torch.zeros(1, packed_width(too_wide), dtype=torch.uint8)
        )


def test_widest_accepted_product_cannot_overflow() -> None:
    """128 (largest activation) x 64 (an unpacked 1) a term, as the compiled kernel sums them."""
    assert source.MAX_K * 128 * 64 < 2**31 <= (source.MAX_K + 1) * 128 * 64


# --- torch operators ---------------------------------------------------------------------------------------


def test_operators_are_well_formed() -> None:
    packed = pack_ternary(random_codes(6, 40))
    torch.library.opcheck(source._ternary_matmul_int32_op, (random_activations(5, 40), packed))
    for bias in (None, torch.randn(6)):
        torch.library.opcheck(source._ternary_linear_op, (torch.randn(5, 40), packed, torch.tensor(0.3), bias))


def test_cost_counts_operations_and_bytes() -> None:
    assert source.cost(530, 3072, 768) == (2 * 530 * 3072 * 768, 530 * 768 + 3072 * 192 + 2 * 530 * 3072)
