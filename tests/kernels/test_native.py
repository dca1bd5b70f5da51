from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tetra.kernels import native, pack_ternary, quantize_rows, row_quantize, ternary_matmul_int32
from tetra.kernels.backend import backend_for
from tetra.kernels.measure import measure_cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler"
)


def runs_here(isa: str) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.ISA_VARIABLE, isa)
        try:
            native.instruction_set()
        except ValueError:
            return False
    return True


ISAS = [isa for isa in ("native", "avx512vnni", "avx512", "avx2vnni", "avx2", "portable") if runs_here(isa)]


@pytest.fixture(scope="module", params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The rest of the test runs on one instruction set of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.ISA_VARIABLE, request.param)
        native.reset()
        if not native.available():
            pytest.skip("the C++ kernels can't be built here")
        yield request.param
    native.reset()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own, and the quickest build."""
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv(native.ISA_VARIABLE, "portable")
    native.reset()
    yield tmp_path
    monkeypatch.undo()
    native.reset()


def random_codes(n: int, k: int) -> Tensor:
    return torch.randint(-1, 2, (n, k), dtype=torch.int8)


def random_activations(m: int, k: int) -> Tensor:
    return torch.randint(-128, 128, (m, k), dtype=torch.int8)


def product(x_q: Tensor, codes: Tensor) -> Tensor:
    """The definition, in numpy."""
    return torch.from_numpy((x_q.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T).astype(np.int32))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * torch.special.erfc(-x / 2**0.5)


def supported(name: str, dtype: torch.dtype) -> None:
    if not native.supports(name, dtype):
        assert dtype == torch.float16  # the one format that a plain machine need not have
        pytest.skip("this instruction set has no float16")


# --- products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [0, 1, 2, 15, 17, 128, 530, 531])
def test_product_is_exact(isa: str, m: int) -> None:
    for n, k in [(1, 1), (0, 8), (33, 7), (16, 128), (31, 130), (97, 768), (64, 1029)]:
        x_q, codes = random_activations(m, k), random_codes(n, k)
        assert torch.equal(native.ternary_matmul_int32(x_q, pack_ternary(codes)), product(x_q, codes)), (n, k)


@pytest.mark.parametrize("k", [128, 3072, 20000])
@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("code", [-1, 1])
def test_largest_sums_do_not_overflow(isa: str, k: int, value: int, code: int) -> None:
    x_q = torch.full((7, k), value, dtype=torch.int8)
    packed = pack_ternary(torch.full((35, k), code, dtype=torch.int8))
    assert bool((native.ternary_matmul_int32(x_q, packed) == value * code * k).all())


def test_products_of_views(isa: str) -> None:
    """Rows with gaps, a start that no vector load likes, columns instead of rows, a weight that is a slice."""
    codes = random_codes(40, 260)
    packed = pack_ternary(codes)
    whole = random_activations(70, 400)
    for x_q in (whole[:, 3:263], whole[5::3, :260], random_activations(260, 9).T):
        assert torch.equal(native.ternary_matmul_int32(x_q, packed), product(x_q, codes))
        assert torch.equal(native.ternary_matmul_int32(x_q, packed[7:]), product(x_q, codes[7:]))
        assert torch.equal(native.ternary_matmul_int32(x_q, packed[::3]), product(x_q, codes[::3]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_what_follows_the_product(isa: str, dtype: torch.dtype, with_gelu: bool, with_residual: bool) -> None:
    supported("ternary_linear", dtype)
    for m, n, k, scaled in [(1, 1, 5, 0), (15, 37, 64, 11), (40, 96, 128, 32)]:
        x_q, codes, scale = random_activations(m, k), random_codes(n, k), torch.rand(m) * 0.01
        bias = torch.randn(n).to(dtype)
        residual = torch.randn(m, n + 3).to(dtype)[:, :n] if with_residual else None
        y = native.ternary_linear(
            x_q, scale, pack_ternary(codes), torch.tensor(0.3), bias, with_gelu, residual, scaled, 0.18, dtype
        )
        expected = product(x_q, codes).double() * scale.double()[:, None] * float(torch.tensor(0.3)) + bias.double()
        expected = gelu(expected) if with_gelu else expected
        expected[:, :scaled] *= 0.18
        expected = expected if residual is None else expected + residual.double()
        assert y.dtype == dtype
        assert y.shape == (m, n)
        assert bool(((y.double() - expected).abs() <= 0.51 * EPS[dtype] * expected.abs() + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_parameters_of_any_float_dtype(isa: str, dtype: torch.dtype) -> None:
    x_q, codes, scale = random_activations(9, 32), random_codes(21, 32), torch.rand(9)
    bias, residual = torch.randn(21).to(dtype), torch.randn(9, 21).to(dtype)
    y = native.ternary_linear(x_q, scale, pack_ternary(codes), 0.1, bias, residual=residual, out_dtype=torch.float32)
    expected = product(x_q, codes).double() * scale.double()[:, None] * 0.1 + bias.double() + residual.double()
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(32).to(dtype)
    x = torch.randn(9, 32)
    expected = torch.nn.functional.layer_norm(x.double(), (32,), weight.double(), weight.double())
    assert torch.allclose(native.layer_norm(x, weight, weight).double(), expected, rtol=1e-5, atol=1e-5)


def test_gelu_is_the_exact_one(isa: str) -> None:
    """A product of ones is the row's scale, so that the layer shows its GELU at any value."""
    values = torch.cat([torch.linspace(-14, 14, 20001), torch.logspace(-30, 30, 61), -torch.logspace(-30, 30, 61)])
    one = torch.ones(len(values), 1, dtype=torch.int8)
    packed = pack_ternary(torch.ones(1, 1, dtype=torch.int8))
    y = native.ternary_linear(one, values, packed, 1.0, gelu=True, out_dtype=torch.float32)[:, 0].double()
    expected = gelu(values.double())
    assert bool(((y - expected).abs() <= 1e-7 * expected.abs().clamp(min=1.0)).all())
    broken = native.ternary_linear(
        one[:1], torch.tensor([float("nan")]), packed, 1.0, gelu=True, out_dtype=torch.float32
    )
    assert bool(broken.isnan().all())


# --- rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_rows_equal_the_reference(isa: str, dtype: torch.dtype) -> None:
    supported("quantize_rows", dtype)
    for m, k in [(0, 8), (1, 1), (3, 127), (19, 768), (5, 3072), (2, 5001)]:
        x = (torch.randn(m, k + 1) * torch.logspace(-6, 3, m)[:, None]).to(dtype)
        for view in (x[:, :k], x[:, 1:], x.T.contiguous().T):
            codes, scale = native.quantize_rows(view)
            expected_codes, expected_scale = row_quantize.quantize_rows_reference(view)
            assert torch.equal(codes, expected_codes)
            assert torch.equal(scale, expected_scale)


def test_ties_are_rounded_to_even_and_broken_rows_are_marked(isa: str) -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]).repeat(20)[None]
    assert native.quantize_rows(x)[0][0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    for bad in (float("nan"), float("inf"), -float("inf")):
        for position in (0, 77, 158):
            rows = torch.randn(3, 159)
            rows[1, position] = bad
            for scale in (
                native.quantize_rows(rows)[1],
                native.norm_quantize(rows, torch.ones(159), torch.zeros(159))[1],
            ):
                assert torch.isfinite(scale).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_and_codes(isa: str, dtype: torch.dtype, with_gelu: bool, with_residual: bool) -> None:
    supported("norm_quantize", dtype)
    for m, k in [(0, 9), (1, 2), (9, 768), (3, 3072), (4, 101)]:
        x = (torch.randn(m, k) * 3 + 1).to(dtype)
        weight, bias = torch.randn(k), torch.randn(k).to(dtype)
        residual = torch.randn(m, k).to(dtype) if with_residual else None
        result = native.norm_quantize(x, weight, bias, 1e-5, with_gelu, residual)
        codes, scale = result[:2]
        total = x if residual is None else x + residual
        if residual is not None:
            assert torch.equal(result[2], total)
        t = gelu(total.double()) if with_gelu else total.double()
        y = torch.nn.functional.layer_norm(t, (k,), weight.double(), bias.double(), 1e-5)
        levels = y / scale.double()[:, None]
        assert torch.allclose(scale.double() * 127, y.abs().amax(-1), rtol=1e-5)
        assert bool(((codes.double() - levels).abs() <= 0.5 + 2e-3).all())  # off by one at a boundary only


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_layer_norm(isa: str, dtype: torch.dtype, with_residual: bool) -> None:
    supported("layer_norm", dtype)
    for m, k in [(0, 9), (1, 1), (9, 768), (5, 101)]:
        x = (torch.randn(m, k) * 2 + 100).to(dtype)  # a mean that a sloppy variance would not survive
        weight, bias = torch.randn(k).to(dtype), torch.randn(k)
        residual = torch.randn(m, k).to(dtype) if with_residual else None
        result = native.layer_norm(x, weight, bias, 1e-5, residual)
        out, total = (result, x) if residual is None else result
        assert torch.equal(total, x if residual is None else x + residual)
        expected = torch.nn.functional.layer_norm(total.double(), (k,), weight.double(), bias.double(), 1e-5)
        assert out.dtype == dtype
        assert bool(((out.double() - expected).abs() <= 0.6 * EPS[dtype] * expected.abs() + 2e-4).all())


# --- attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("images", "tokens", "heads", "dim"),
    [(0, 5, 2, 32), (2, 0, 2, 32), (1, 1, 1, 1), (2, 17, 3, 32), (1, 64, 2, 33), (3, 33, 1, 128), (1, 530, 2, 64)],
)
def test_attention(isa: str, dtype: torch.dtype, images: int, tokens: int, heads: int, dim: int) -> None:
    supported("attention_qkv", dtype)
    for size in (1.0, 8.0):  # 8: logits in the hundreds, where a softmax that is not shifted overflows
        whole = (torch.randn(images, tokens, 3 * heads * dim + 8) * size).to(dtype)
        qkv = whole[:, :, 4:-4]
        out = native.attention_qkv(qkv, heads)
        q, k, v = qkv.double().reshape(images, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-2, -1) / dim**0.5, -1)
        expected = (weights @ v).transpose(1, 2).reshape(images, tokens, heads * dim)
        # Weights are rounded to the inputs' dtype, logits to float32.
        bound = weights @ v.abs() * (2 * EPS[dtype] + 2.0**-21 * size**2 * dim**0.5)
        assert out.dtype == dtype
        assert bool(((out.double() - expected).abs() <= bound.transpose(1, 2).reshape(out.shape) + 1e-6).all())


def test_attention_of_queries_scaled_before(isa: str) -> None:
    qkv = torch.randn(2, 50, 3 * 64)
    scaled = qkv.clone()
    scaled[..., :64] *= 1.4426950408889634 / 32**0.5
    assert torch.allclose(native.attention_qkv(scaled, 2, True), native.attention_qkv(qkv, 2), atol=1e-5)


def test_attention_keeps_nan_to_its_image_and_head(isa: str) -> None:
    qkv = torch.randn(2, 20, 3 * 64)
    qkv[1, 7, 64 + 32 + 5] = float("nan")  # a key of the second head
    broken = native.attention_qkv(qkv, 2).isnan()
    assert bool(broken[1, :, 32:].all())
    assert not bool(broken[0].any() or broken[1, :, :32].any())


# --- threads -----------------------------------------------------------------------------------------------


def everything(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(97, 384, generator=generator).to(torch.bfloat16)
    weight = torch.randn(384, generator=generator)
    packed = pack_ternary(torch.randint(-1, 2, (1152, 384), dtype=torch.int8, generator=generator))
    codes, scale, total = native.norm_quantize(x, weight, weight, residual=x)
    qkv = native.ternary_linear(codes, scale, packed, 0.02, out_dtype=torch.bfloat16)
    return [codes, scale, total, qkv, native.attention_qkv(qkv[None], 6), native.ternary_matmul_int32(codes, packed)]


def test_results_do_not_depend_on_threads(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything(0)
        for n in (2, 5):
            torch.set_num_threads(n)
            for a, b in zip(alone, everything(0), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


def test_python_threads_do_not_meet() -> None:
    if not native.available():
        pytest.skip("the C++ kernels can't be built here")
    expected = [everything(seed) for seed in range(4)]
    same = [False] * 4

    def check(seed: int) -> None:
        with torch.inference_mode():
            runs = [everything(seed) for _ in range(8)]
        same[seed] = all(torch.equal(a, b) for run in runs for a, b in zip(run, expected[seed], strict=True))

    threads = [threading.Thread(target=check, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same)


# --- building ----------------------------------------------------------------------------------------------


def is_right() -> bool:
    """Whether the public operation gives the right product, whatever runs it."""
    x_q, codes = random_activations(5, 40), random_codes(6, 40)
    return torch.equal(ternary_matmul_int32(x_q, pack_ternary(codes)), product(x_q, codes))


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CXX", "/bin/false", r"/bin/false failed with exit status 1"),
        ("CXX", "g++ '-O3", r"CXX is \"g\+\+ '-O3\", which is no command: No closing quotation"),
        ("CXX", "no-such-compiler", r"no C\+\+ compiler: no-such-compiler is not in PATH"),
        ("PATH", "", r"no C\+\+ compiler: c\+\+, g\+\+ or clang\+\+ is not in PATH"),
    ],
)
def test_without_a_compiler_pytorch_runs_after_one_warning(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.warns(UserWarning, match=f"{said}.*plain PyTorch runs instead"):
        assert is_right()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_right()
        assert not native.available()
        assert not native.supports("quantize_rows", torch.float32)
    assert not list(empty_cache.iterdir())


@needs_compiler
def test_source_that_does_not_compile_is_reported(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++ -include no-such-header.h")
    with pytest.warns(UserWarning, match=r"failed with exit status 1: .*no-such-header\.h"):
        assert is_right()


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_a_build_and_a_warning(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_cache / "file").touch()
    monkeypatch.setenv(native.CACHE_VARIABLE, str(empty_cache / "file" / "folder"))
    with pytest.warns(UserWarning, match=r"this process only.*TETRA_NATIVE_CACHE"):
        assert native.available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.available()
        assert is_right()


@needs_compiler
def test_the_cache_is_used_again_and_damage_is_repaired(empty_cache: Path) -> None:
    def library() -> tuple[Path, int]:
        native.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert native.available()
            assert is_right()
        (path,) = empty_cache.iterdir()
        return path, path.stat().st_mtime_ns

    path, built = library()
    assert library() == (path, built)
    whole = path.read_bytes()
    other = empty_cache / "other"
    for damaged in (b"", whole[:-1], whole[:5000] + b"?" + whole[5001:], b"not a library"):
        other.write_bytes(damaged)
        assert not native._is_whole(other)
    other.write_bytes(whole[: len(whole) // 2])
    os.replace(other, path)  # a new file: the old one is mapped into this process
    assert library()[0] == path
    assert native._is_whole(path)


PROGRAM = """
import torch
from tetra.kernels import native
torch.set_num_threads(2)
assert native.available()
torch.mm(torch.randn(200, 200), torch.randn(200, 200))
codes, _ = native.quantize_rows(torch.randn(400, 512))
print("sum", int(codes.int().abs().amax()))
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}
print("runtimes", *runtimes)
"""


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what Linux has mapped")
def test_processes_that_build_at_once_and_share_pytorch_s_threads(empty_cache: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    for process in running:
        said = process.communicate()[0].splitlines()
        assert process.returncode == 0
        assert said[0] == "sum 127"
        assert len(said[1].split()) <= 2, f"two OpenMP runtimes, whose threads would fight: {said[1]}"
    assert len(list(empty_cache.iterdir())) == 1


def test_impossible_instruction_sets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "sse9")
    with pytest.raises(ValueError, match="TETRA_NATIVE_ISA is 'sse9'; set it to one of native, avx512vnni"):
        native.instruction_set()
    monkeypatch.setattr(native, "_cpu_features", lambda: "fp asimd")
    monkeypatch.setenv(native.ISA_VARIABLE, "avx2")
    with pytest.raises(ValueError, match="TETRA_NATIVE_ISA is 'avx2', but this CPU has no avx2, fma, f16c"):
        native.instruction_set()


# --- choice ------------------------------------------------------------------------------------------------


def test_what_is_supported() -> None:
    with pytest.raises(ValueError, match="name is 'convolution', wanted one of quantize_rows"):
        native.supports("convolution", torch.float32)
    with native.switched_off():
        assert not native.available()
        assert not native.supports("quantize_rows", torch.float32)
    if not native.available():
        pytest.skip("the C++ kernels can't be built here")
    for name in native.OPERATIONS:
        integer = {"ternary_matmul_int32": torch.int8, "hamming": torch.uint8}.get(name)
        for dtype in (torch.int8, torch.uint8):
            assert native.supports(name, dtype) == (dtype == integer)
        assert native.supports(name, torch.float32) == (integer is None)
        assert not native.supports(name, torch.float64)


def test_backend_that_was_asked_for_has_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETRA_BACKEND", "native")
    with native.switched_off(), pytest.raises(ValueError, match=r"is native, but the C\+\+ kernels do not run"):
        is_right()
    with pytest.raises(ValueError, match="is native, but a tensor is on meta"):
        backend_for(torch.zeros(1, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_keeps_the_faster(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available():
        pytest.skip("the C++ kernels can't be built here")
    try:
        report = measure_cpu(dtype, tokens=20, width=128, n_heads=2)
        assert set(report) == set(native.INFERENCE_OPERATIONS)
        for name, line in report.items():
            kept = native.supports(name, torch.int8 if name == "ternary_matmul_int32" else dtype)
            assert kept == (line["chosen"] == "native")
            assert kept == (float(line["torch_ms"]) >= 0.95 * float(line["native_ms"]))
        monkeypatch.setenv("TETRA_BACKEND", "torch")
        assert measure_cpu(dtype) == {}
    finally:
        native.reset()


def test_results_are_the_same_where_pytorch_is_preferred() -> None:
    if not native.available():
        pytest.skip("the C++ kernels can't be built here")
    x = torch.randn(9, 300)
    expected = quantize_rows(x)
    try:
        native.prefer("quantize_rows", torch.float32, compiled=False)
        assert not native.supports("quantize_rows", torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(quantize_rows(x), expected, strict=True))
        native.prefer("quantize_rows", torch.float32, compiled=True)
        assert native.supports("quantize_rows", torch.float32)
    finally:
        native.reset()


def test_measuring_is_on_the_cpu_whatever_the_default_device() -> None:
    try:
        with torch.device("meta"):
            report = measure_cpu(torch.float32, tokens=5, width=16, n_heads=2)
        assert bool(report) == (native.available() and os.environ.get("TETRA_BACKEND", "auto") == "auto")
    finally:
        native.reset()


def test_measuring_refuses_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="tokens: is 0, wanted 1 or more"):
        measure_cpu(tokens=0)
    with pytest.raises(ValueError, match="width: 100 is not a multiple of n_heads = 3"):
        measure_cpu(width=100, n_heads=3)
