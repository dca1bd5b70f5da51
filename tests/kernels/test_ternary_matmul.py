from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tetra.kernels import (
    check_packed,
    native,
    pack_ternary,
    packed_width,
    quantize_rows,
    ternary_linear,
    ternary_linear_float,
    ternary_linear_int8,
    ternary_matmul_int32,
    unpack_ternary,
)
from tetra.kernels import ternary_matmul as source

Run = Callable[..., Any]

TOO_WIDE = source.MAX_K + 1


@pytest.fixture(params=["interpreter", pytest.param("triton", marks=pytest.mark.gpu)])
def triton_only(request: pytest.FixtureRequest) -> Run:
    """Calls a function where the Triton kernel runs."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")  # type: ignore[no-any-return]

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments)).cpu()

    return call


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


def run_ptx(ptx: str, word: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Executes the instructions that the unpacking uses, on 32-bit registers; ``name`` holds ``word``."""
    registers: dict[str, np.ndarray] = {name: word.astype(np.uint32)}
    instructions = re.findall(r"(shl|and|prmt)\.b32 ([^;]+);", ptx)
    assert len(instructions) == ptx.count(".b32") - ptx.count(".reg")
    for operation, operands in instructions:
        target, source_name, *constants = operands.split(", ")
        value, numbers = registers[source_name], [np.uint32(int(text, 0)) for text in constants]
        if operation == "shl":
            registers[target] = value << numbers[0]
        elif operation == "and":
            registers[target] = value & numbers[0]
        else:  # byte i of the result is that byte of (value, other) which digit i of the selector names
            pair = value.astype(np.uint64) | np.uint64(numbers[0]) << np.uint64(32)
            picked = [pair >> np.uint64(8 * (int(numbers[1]) >> 4 * i & 7)) & np.uint64(0xFF) for i in range(4)]
            registers[target] = sum(byte << np.uint64(8 * i) for i, byte in enumerate(picked)).astype(np.uint32)
    return registers


def every_byte_in_every_lane() -> Iterator[tuple[int, np.ndarray]]:
    """(lane, words): all bytes in one lane of a 32-bit word, with different neighbours in the others."""
    every_byte = np.arange(256, dtype=np.uint32)
    for lane in range(4):
        for others in (0, 0xFFFFFFFF, 0xA5A5A5A5, 0x5A5A5A5A):
            yield lane, (every_byte << np.uint32(8 * lane)) | np.uint32(others & ~(0xFF << 8 * lane))


CODE_OF = np.array([0, 1, -128, -1])  # of two bits; 10, which is illegal, has no value


def test_inline_assembly_on_every_byte_in_every_lane() -> None:
    programs = re.findall(r'_on_four_bytes\(packed, "([^"]*)"\)', inspect.getsource(source._unpack_plane.fn))
    assert len(programs) == 4
    for lane, words in every_byte_in_every_lane():
        for plane, ptx in enumerate(programs):
            out = run_ptx(ptx, words, "$1")["$0"]
            byte = ((out >> np.uint32(8 * lane)) & np.uint32(0xFF)).astype(np.uint8).view(np.int8)
            fields = np.arange(256) >> 2 * plane & 3
            legal = fields != 2
            assert np.array_equal(byte[legal], 64 * CODE_OF[fields[legal]])


def test_inline_assembly_for_floats_on_every_byte_in_every_lane() -> None:
    """The result is 2 * code as float16 and, with the same bits, as bfloat16."""
    around = re.findall(r'"([^"]*)"', inspect.getsource(source._to_four_halves.fn).split('"""')[2])
    shifts = re.findall(r'_to_four_halves\(packed, "([^"]*)"\)', inspect.getsource(source._unpack_plane.fn))
    assert len(shifts) == 4
    for lane, words in every_byte_in_every_lane():
        for plane, shift in enumerate(shifts):
            registers = run_ptx(around[0] + shift + around[1], words, "$2")
            halves = (registers[f"${lane // 2}"] >> np.uint32(16 * (lane % 2)) & np.uint32(0xFFFF)).astype(np.uint16)
            fields = np.arange(256) >> 2 * plane & 3
            legal = fields != 2
            bits = torch.from_numpy(halves.view(np.int16))
            for dtype in (torch.float16, torch.bfloat16):
                assert np.array_equal(bits.view(dtype).float().numpy()[legal], 2 * CODE_OF[fields[legal]])


# --- the exact product -------------------------------------------------------------------------------------

SHAPES = [
    *((0, 5, 7), (3, 0, 40), (1, 1, 1), (1, 130, 127), (2, 3, 3072), (33, 17, 129), (65, 70, 260), (128, 48, 384)),
    # A few rows to many, times sizes that fill whole tiles and groups and sizes that don't.
    *((m, n, k) for m in (1, 2, 15, 17, 128, 530, 531) for n, k in ((64, 128), (21, 130))),
]


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
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "TETRA_BACKEND": "torch"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("has_dot_product", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(
    backend: str, has_dot_product: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast would round the products that plain PyTorch makes in floats."""
    if (has_dot_product and not source._has_int8_dot_product()) or (backend == "native" and not native.available()):
        pytest.skip("this machine has no such product")
    monkeypatch.setenv("TETRA_BACKEND", backend)
    monkeypatch.setattr(source, "_has_int8_dot_product", lambda: has_dot_product)
    x_q, codes, x = random_activations(5, 3000), random_codes(9, 3000), torch.randn(5, 3000)
    packed = pack_ternary(codes)
    layers = (ternary_linear, ternary_linear_float)
    expected = [layer(x, packed, 0.1) for layer in layers]
    with torch.autocast("cpu", dtype):
        assert torch.equal(ternary_matmul_int32(x_q, packed), product(x_q, codes))
        for layer, y in zip(layers, expected, strict=True):
            assert torch.equal(layer(x, packed, 0.1), y)


def test_unpacking_takes_any_strides() -> None:
    codes = random_codes(7, 200)
    packed = pack_ternary(codes)
    for view in (packed.T.contiguous().T, torch.cat([packed, packed], 1)[:, packed.shape[1] :]):
        assert torch.equal(unpack_ternary(view, 200), codes)
    assert torch.equal(unpack_ternary(packed[:1].expand(3, -1), 200), codes[:1].expand(3, -1))


@pytest.mark.parametrize("k", [128, 200])
def test_single_rows_of_wider_tensors(run: Run, k: int) -> None:
    """They count as contiguous, with strides that no vector load likes."""
    x_q, codes = random_activations(1, k + 5), random_codes(1, k)
    packed = pack_ternary(codes)
    wide = torch.cat([packed, packed[:, :5]], 1)[:, : packed.shape[1]]
    check_packed(wide, k)
    assert torch.equal(unpack_ternary(wide, k), codes)
    assert torch.equal(run(ternary_matmul_int32, x_q[:, :k], wide), product(x_q[:, :k], codes))
    x = torch.randn(1, k + 5)[:, :k]
    expected = x.double() @ codes.double().T
    assert torch.allclose(run(ternary_linear_float, x, wide, 1.0).double(), expected, atol=1e-4)


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


def int32_sums(x_q: Tensor, packed: Tensor, config: tuple[int, ...]) -> Tensor:
    """The product in a configuration of one's own choice."""
    return source._launch_ternary_matmul(x_q, packed, None, None, source.Epilogue(), torch.int32, config)


@pytest.mark.parametrize("config", source.CONFIGS, ids=str)
def test_every_configuration_is_exact(triton_only: Run, config: tuple[int, ...]) -> None:
    for m, n, k in ((17, 66, 3 * 128), (35, 64, 2 * 128)):  # odd and even numbers of groups
        x_q, codes = random_activations(m, k), random_codes(n, k)
        assert torch.equal(triton_only(int32_sums, x_q, pack_ternary(codes), config), product(x_q, codes))


def int32_sums_of_rows_apart(x_q: Tensor, packed: Tensor) -> Tensor:
    """The product of rows that 32 bits cannot count the distance of; most of the memory is never touched."""
    m, k = x_q.shape
    apart = 2**31 // (m - 1) + 16
    memory = torch.empty((m - 1) * apart + k, dtype=torch.int8, device=x_q.device)
    rows = memory.as_strided((m, k), (apart, 1)).copy_(x_q)
    return int32_sums(rows, packed, source.CONFIGS[0])


def test_offsets_beyond_32_bits(triton_only: Run) -> None:
    x_q, codes = random_activations(3, 128), random_codes(4, 128)
    assert torch.equal(triton_only(int32_sums_of_rows_apart, x_q, pack_ternary(codes)), product(x_q, codes))


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


# Relative to 1 + |result|: a rounding of the type, and for float32 those of a handful of operations. Triton's
# interpreter cuts bfloat16 off instead of rounding it.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= tolerance * (1 + expected.abs())).all()


def layer(
    x_q: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    scaled_columns: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """ternary_linear_int8 with all arguments by position, as ``run`` wants them."""
    return ternary_linear_int8(
        *(x_q, scale, packed, weight_scale, bias),
        gelu=gelu,
        residual=residual,
        scaled_columns=scaled_columns,
        column_scale=-0.37,
        out_dtype=out_dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("with_bias", "gelu", "scaled_columns", "with_residual"),
    [(False, False, 20, False), (True, False, 0, True), (True, True, 0, False), (True, True, 33, True)],
)
def test_layer_on_codes_is_the_formula(
    run: Run, dtype: torch.dtype, with_bias: bool, gelu: bool, scaled_columns: int, with_residual: bool
) -> None:
    """The epilogues of a ternary block (q scaled; bias and residual; bias and GELU), and all of them at once."""
    m, n, k = 19, 33, 130
    x_q, scale = quantize_rows(torch.randn(m, k))
    packed, weight_scale = pack_ternary(random_codes(n, k)), torch.tensor(0.11)
    bias = torch.randn(n).to(dtype) if with_bias else None
    residual = torch.randn(m, n).to(dtype) if with_residual else None
    found = run(layer, x_q, scale, packed, weight_scale, bias, residual, gelu, scaled_columns, dtype)
    expected = source.ternary_linear_reference(
        *(x_q, scale, packed, weight_scale, bias),
        gelu=gelu,
        residual=residual,
        scaled_columns=scaled_columns,
        column_scale=-0.37,
    )
    assert found.dtype == dtype
    assert_near(found, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("n", [24, 48])
def test_layer_takes_arguments_as_views(run: Run, n: int) -> None:
    """Rows, residual and parameters of any strides and at any offset; leading dimensions are kept."""
    x_q, scale = quantize_rows(torch.randn(2, 5, 140))
    x_q, scale = torch.cat([x_q, x_q], -1)[..., 3:143], torch.stack([scale, scale], -1)[..., 1]
    packed = pack_ternary(random_codes(n, 140))
    bias, residual = torch.randn(2 * n)[1::2], torch.randn(2, 5, n + 3)[..., 1 : n + 1].half()
    found = run(layer, x_q, scale, packed, torch.tensor([0.2]), bias, residual, False, 0, torch.float16)
    plain = (x_q.reshape(10, 140).contiguous(), scale.reshape(10).contiguous(), packed, 0.2, bias)
    expected = source.ternary_linear_reference(*plain, residual=residual.reshape(10, n))
    assert_near(found, expected.view(2, 5, n), TOLERANCES[torch.float16])


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3,), ()])
def test_layer_on_codes_of_few_rows(run: Run, shape: tuple[int, ...]) -> None:
    x_q, scale = torch.ones(*shape, 40, dtype=torch.int8), torch.full(shape, 0.5)
    packed = pack_ternary(torch.ones(7, 40, dtype=torch.int8))
    found = run(layer, x_q, scale, packed, torch.tensor(0.1), None, None, False, 0, torch.float32)
    torch.testing.assert_close(found, torch.full((*shape, 7), 2.0))


def int8_layer(x_q: Tensor, scale: Tensor, packed: Tensor, bias: Tensor, config: tuple[int, ...]) -> Tensor:
    epilogue, weight_scale = source.Epilogue(bias, gelu=True), torch.tensor(0.3, device=x_q.device)
    return source._launch_ternary_matmul(x_q, packed, scale, weight_scale, epilogue, torch.float16, config)


def float_layer(x: Tensor, packed: Tensor, bias: Tensor, residual: Tensor, config: tuple[int, ...] | None) -> Tensor:
    """In the configuration ``config``, or in that which the operation chooses."""
    if config is None:
        return ternary_linear_float(x, packed, 0.3, bias, gelu=True, residual=residual)
    epilogue, weight_scale = source.Epilogue(bias, True, residual), torch.tensor(0.3, device=x.device)
    return source._launch_ternary_matmul(x, packed, None, weight_scale, epilogue, x.dtype, config)


SPLIT = [row for row in source.CONFIGS if row[3] > 1]


@pytest.mark.parametrize("config", SPLIT, ids=str)
def test_splitting_k_changes_no_bit(triton_only: Run, config: tuple[int, ...]) -> None:
    x_q, scale = quantize_rows(torch.randn(18, 5 * 128))
    packed, bias = pack_ternary(random_codes(70, 5 * 128)), torch.randn(70)
    whole = triton_only(int8_layer, x_q, scale, packed, bias, source.CONFIGS[0])
    assert torch.equal(triton_only(int8_layer, x_q, scale, packed, bias, config), whole)


def split_twice(x_q: Tensor, packed: Tensor) -> Tensor:
    """Two launches one after the other with the same counters, which the second finds as the first left them."""
    kept = torch.zeros(8, dtype=torch.int32, device=x_q.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_zeroed_counters", lambda device, n: kept)
        both = [int32_sums(x_q, packed, SPLIT[0]) for _ in range(2)]
    return torch.stack([*both, kept.sum().expand_as(both[0])])


def test_splitting_k_leaves_its_counters_clean(triton_only: Run) -> None:
    x_q, codes = random_activations(20, 512), random_codes(80, 512)
    first, second, kept = triton_only(split_twice, x_q, pack_ternary(codes))
    assert torch.equal(first, product(x_q, codes))
    assert torch.equal(second, first)
    assert not kept.any()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 100), (20, 66, 384)])
def test_layer_on_floats_is_the_formula(run: Run, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, packed, bias, residual = torch.randn(m, k), pack_ternary(random_codes(n, k)), torch.randn(n), torch.randn(m, n)
    x, bias, residual = x.to(dtype), bias.to(dtype), residual.to(dtype)
    found = run(float_layer, x, packed, bias, residual, None)
    expected = source.ternary_linear_reference(x, 1.0, packed, 0.3, bias, gelu=True, residual=residual)
    assert found.dtype == dtype
    # Sums of K float32 products round too.
    assert_near(found, expected, TOLERANCES[dtype] + 1e-7 * k**0.5)


def test_layer_on_floats_takes_arguments_as_views(run: Run) -> None:
    """Rows a step apart, at an offset that is no multiple of 16 bytes; leading dimensions are kept."""
    x = torch.randn(2, 5, 300, dtype=torch.float16)[..., 3:283:2]
    packed = torch.stack([pack_ternary(random_codes(24, 140))] * 2, dim=-1)[..., 1]
    bias, residual = torch.randn(48)[1::2], torch.randn(24, 2, 7)[..., 1:6].permute(1, 2, 0)
    found = run(float_layer, x, packed, bias, residual, None)
    plain = (x.reshape(10, 140).contiguous(), 1.0, packed.contiguous(), 0.3, bias)
    expected = source.ternary_linear_reference(*plain, gelu=True, residual=residual.reshape(10, 24))
    assert_near(found, expected.view(2, 5, 24), TOLERANCES[torch.float16])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_layer_on_floats_in_every_configuration(triton_only: Run, dtype: torch.dtype) -> None:
    x, packed = torch.randn(9, 640).to(dtype), pack_ternary(random_codes(40, 640))
    bias, residual = torch.randn(40).to(dtype), torch.randn(9, 40).to(dtype)
    expected = source.ternary_linear_reference(x, 1.0, packed, 0.3, bias, gelu=True, residual=residual)
    for config in source.configs_for(80, x.itemsize):
        found = triton_only(float_layer, x, packed, bias, residual, config)
        assert_near(found, expected, TOLERANCES[dtype] + 1e-7 * 640**0.5)


def test_half_precision_sums_do_not_overflow() -> None:
    """Each product fits float16 and so does the result, but the sum on its way is 100 times too large."""
    x, packed = torch.full((1, 1024), 6000.0, dtype=torch.float16), pack_ternary(torch.ones(1, 1024, dtype=torch.int8))
    torch.testing.assert_close(ternary_linear_float(x, packed, 1e-3), torch.tensor([[6144.0]], dtype=torch.float16))


def without_outputs(x_q: Tensor, scale: Tensor, packed: Tensor) -> Tensor:
    residual = x_q.new_zeros((*x_q.shape[:-1], 0), dtype=torch.float32)
    y = ternary_linear_int8(x_q, scale, packed, 1.0, residual=residual, out_dtype=torch.float32)
    assert torch.equal(ternary_linear_float(x_q.float(), packed, 1.0, residual=residual), y)
    return y


def test_a_weight_without_rows_takes_a_residual(run: Run) -> None:
    y = run(without_outputs, random_activations(3, 40), torch.ones(3), pack_ternary(random_codes(0, 40)))
    assert y.shape == (3, 0)


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


@pytest.mark.parametrize("row", [999, 1000, 1999])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_linear_counts_rows_from_the_first(backend: str, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETRA_BACKEND", backend)
    x = torch.randn(2000, 3)
    x[row, 1] = float("nan")
    with pytest.raises(ValueError, match=f"row {row} holds NaN or infinity"):
        ternary_linear(x, pack_ternary(random_codes(2, 3)), 1.0)


@pytest.mark.parametrize("value", [1e39, "1", None, 1j])
def test_weight_scales_that_are_no_numbers_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"weight_scale: is {value!r}, wanted a number")):
        ternary_linear(torch.randn(2, 4), pack_ternary(random_codes(3, 4)), value)


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
    with pytest.raises(TypeError, match=r"bias: dtype is torch\.int64"):
        ternary_linear(torch.zeros(2, 40), packed, 1.0, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"x_q: K = {TOO_WIDE} could overflow"):
        ternary_matmul_int32(
            torch.zeros(1, TOO_WIDE, dtype=torch.int8), torch.zeros(1, packed_width(TOO_WIDE), dtype=torch.uint8)
        )


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x_q": torch.zeros(2, 40)}, TypeError, r"x_q: dtype is torch\.float32"),
        ({"x_q": torch.zeros(2, 200, dtype=torch.int8)}, ValueError, "x_q: 200 values a row"),
        ({"x_q": torch.tensor(1, dtype=torch.int8)}, ValueError, "x_q: is a scalar"),
        ({"x_q": torch.zeros(2, 0, dtype=torch.int8)}, ValueError, r"x_q: shape \(2, 0\) has no values"),
        ({"scale": torch.ones(2).half()}, TypeError, r"scale: dtype is torch\.float16"),
        ({"scale": torch.ones(3)}, ValueError, r"scale: shape is \(3,\), wanted \(2,\)"),
        ({"packed": torch.zeros(6, 32)}, TypeError, r"packed: dtype is torch\.float32"),
        ({"packed": torch.zeros(6, 40, dtype=torch.uint8)}, ValueError, "multiple of 32"),
        ({"packed": torch.zeros(6, 32, dtype=torch.uint8, device="meta")}, ValueError, "packed: is on meta"),
        ({"x_q": torch.zeros(2, TOO_WIDE, dtype=torch.int8)}, ValueError, f"x_q: K = {TOO_WIDE} could overflow"),
        ({"scale": torch.ones(2, device="meta")}, ValueError, "scale: is on meta, but x_q is on cpu"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "bias: is on meta, but x_q is on cpu"),
        ({"residual": torch.zeros(2, 6, device="meta")}, ValueError, "residual: is on meta, but x_q is on cpu"),
        ({"weight_scale": torch.ones(1, device="meta")}, ValueError, "weight_scale: is on meta, but x_q is on cpu"),
        ({"bias": torch.zeros(6, dtype=torch.int32)}, TypeError, r"bias: dtype is torch\.int32"),
        ({"weight_scale": torch.ones(2)}, ValueError, r"weight_scale: shape is \(2,\)"),
        ({"weight_scale": torch.tensor(1)}, TypeError, r"weight_scale: dtype is torch\.int64"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: shape is \(5,\), wanted \(6,\)"),
        ({"residual": torch.zeros(6)}, ValueError, r"residual: shape is \(6,\), wanted \(2, 6\)"),
        ({"residual": torch.zeros(2, 6, dtype=torch.int8)}, TypeError, r"residual: dtype is torch\.int8"),
        ({"scaled_columns": 7}, ValueError, "scaled_columns: is 7, wanted 0 to 6"),
        ({"scaled_columns": -1}, ValueError, "scaled_columns: is -1"),
        ({"out_dtype": torch.int32}, TypeError, r"out_dtype: is torch\.int32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_of_the_layer_on_codes(change: dict[str, Any], error: type[Exception], match: str) -> None:
    right = {
        "x_q": torch.zeros(2, 40, dtype=torch.int8),
        "scale": torch.ones(2),
        "packed": pack_ternary(random_codes(6, 40)),
        "weight_scale": 1.0,
    }
    ternary_linear_int8(**right)
    with pytest.raises(error, match=match):
        ternary_linear_int8(**{**right, **change})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(2, 40, dtype=torch.float64)}, TypeError, r"x: dtype is torch\.float64"),
        ({"x": torch.zeros(2, 40, dtype=torch.int8)}, TypeError, r"x: dtype is torch\.int8"),
        ({"x": torch.zeros(2, 129)}, ValueError, "x: 129 values a row"),
        ({"x": torch.zeros(2, TOO_WIDE)}, ValueError, f"x: K = {TOO_WIDE} could overflow"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: is a scalar"),
        ({"x": torch.zeros(2, 0)}, ValueError, r"x: shape \(2, 0\) has no values"),
        ({"packed": torch.zeros(6, 32, dtype=torch.int8)}, TypeError, r"packed: dtype is torch\.int8"),
        ({"packed": torch.zeros(6, 32, dtype=torch.uint8, device="meta")}, ValueError, "packed: is on meta"),
        ({"weight_scale": torch.ones(1, 2)}, ValueError, r"weight_scale: shape is \(1, 2\)"),
        ({"bias": torch.zeros(1, 6)}, ValueError, r"bias: shape is \(1, 6\), wanted \(6,\)"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "bias: is on meta, but x is on cpu"),
        ({"residual": torch.zeros(2, 5)}, ValueError, r"residual: shape is \(2, 5\), wanted \(2, 6\)"),
        ({"residual": torch.zeros(2, 6, dtype=torch.int64)}, TypeError, r"residual: dtype is torch\.int64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_of_the_layer_on_floats(change: dict[str, Any], error: type[Exception], match: str) -> None:
    right = {"x": torch.zeros(2, 40), "packed": pack_ternary(random_codes(6, 40)), "weight_scale": 1.0}
    ternary_linear_float(**right)
    with pytest.raises(error, match=match):
        ternary_linear_float(**{**right, **change})


def test_widest_accepted_product_cannot_overflow() -> None:
    """128 (largest activation) x 64 (an unpacked 1) a term, as the compiled kernel sums them."""
    assert source.MAX_K * 128 * 64 < 2**31 <= (source.MAX_K + 1) * 128 * 64


# --- choice of the configuration ---------------------------------------------------------------------------


@given(
    arch=st.sampled_from([80, 86, 87, 89, 90, 100, 120]),
    n_sms=st.integers(1, 200),
    m=st.integers(1, 1 << 20),
    n=st.integers(1, 8192),
    k=st.integers(1, 8192),
    x_bytes=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=60, deadline=None)
def test_prediction_is_above_the_tensor_cores_bound(
    arch: int, n_sms: int, m: int, n: int, k: int, x_bytes: int
) -> None:
    macs = {80: 2048, 86: 1024, 87: 2048, 89: 1024, 90: 4096, 100: 2048, 120: 1024}[arch] / x_bytes
    config = source.default_config(arch, n_sms, m, n, k, x_bytes)
    assert config in source.configs_for(arch, x_bytes, n)
    clocks = source.predicted_clocks(config, arch, n_sms, m, n, k, x_bytes)
    assert clocks >= m * n * k / (macs * n_sms)
    rows = source.configs_for(arch, x_bytes, n)
    others = (source.predicted_clocks(row, arch, n_sms, m, n, k, x_bytes) for row in rows)
    assert clocks <= min(others)


def test_few_rows_get_small_tiles_and_many_get_large_ones() -> None:
    for arch in (80, 86, 87, 89, 90, 100, 120):
        assert source.default_config(arch, 100, 1, 768, 768)[0] == 16
        assert source.default_config(arch, 100, 64 * 530, 3072, 768)[:2] in ((128, 128), (256, 128))
    few_tiles = source.default_config(80, 108, 8, 768, 3072)
    assert few_tiles[3] > 1, "12 tiles on 108 multiprocessors: K should be split"


# --- torch operators ---------------------------------------------------------------------------------------


def test_operators_are_well_formed() -> None:
    packed, x_q, scale = pack_ternary(random_codes(6, 40)), random_activations(5, 40), torch.rand(5)
    x, weight_scale, residual = torch.randn(5, 40), torch.tensor(0.3), torch.randn(5, 6)
    torch.library.opcheck(source._ternary_matmul_int32_op, (x_q, packed))
    for bias in (None, torch.randn(6)):
        torch.library.opcheck(source._ternary_linear_op, (x, packed, weight_scale, bias))
    full = (x_q, scale, packed, weight_scale, torch.randn(6), True, residual, 3, 0.5, torch.bfloat16)
    plain = (x_q, scale, packed, weight_scale, None, False, None, 0, 1.0, torch.float32)
    for arguments in (full, plain):
        torch.library.opcheck(source._ternary_linear_int8_op, arguments)
    for dtype in (torch.float16, torch.float32):
        torch.library.opcheck(
            source._ternary_linear_float_op, (x.to(dtype), packed, weight_scale, None, True, residual.to(dtype))
        )


class Layers(torch.nn.Module):
    """Every product once."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", pack_ternary(random_codes(40, 40)))
        self.register_buffer("weight_scale", torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        x = ternary_linear(x, self.packed, self.weight_scale)
        x = ternary_linear_float(x, self.packed, self.weight_scale, gelu=True, residual=x)
        x_q, scale = quantize_rows_for_export(x)
        options = {"residual": x, "scaled_columns": 8, "column_scale": 0.5, "out_dtype": torch.float32}
        y = ternary_linear_int8(x_q, scale, self.packed, self.weight_scale, **options)
        return y + ternary_matmul_int32(x_q.flatten(0, 1), self.packed).view(y.shape)


def quantize_rows_for_export(x: Tensor) -> tuple[Tensor, Tensor]:
    """Without quantize_rows' look at the values."""
    scale = x.abs().amax(-1) / 127
    return (x / scale[..., None]).round().to(torch.int8), scale


def test_layers_compile_and_export() -> None:
    layers = Layers()
    small, large = torch.randn(2, 3, 40), torch.randn(5, 3, 40)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(small), layers(small))
    exported = torch.export.export(layers, (small,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    torch.testing.assert_close(exported.module()(large), layers(large))


def test_cost_counts_operations_and_bytes() -> None:
    operations = 2 * 530 * 3072 * 768
    n_bytes = 530 * (768 + 4) + 3072 * (192 + 4) + 2 * 530 * 3072
    assert source.cost(530, 3072, 768) == (operations, n_bytes)
    assert source.cost(530, 3072, 768, residual=True) == (operations, n_bytes + 2 * 530 * 3072)
    assert source.cost(530, 3072, 768, 4, x_bytes=2) == (operations, 530 * 1536 + 3072 * 196 + 4 * 530 * 3072)
