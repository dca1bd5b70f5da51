"""Compiled CPU kernels: the C++ in ``native_src/``, built on demand by the machine's own compiler.

The first use compiles for this very CPU (a few seconds, once) into the user's cache folder; later processes load
what they find there. Nothing is downloaded and nothing is built at install time. Where building fails (no
compiler, say) one warning tells why, and the operations run in plain PyTorch, with the same results, slower.

The functions here have the semantics of the public operations of the same names, for CPU tensors, and check
nothing: callers ask ``supports`` first. They run on the threads that PyTorch uses (its OpenMP pool and
``torch.get_num_threads()``), release the GIL, and may be called from several Python threads at once.

How work is cut into blocks, and how much work is worth another thread, are rows of the tables below: looked up in
``tetra.autotune.table`` at every call, the first row where nothing was measured. Results are the same with every row.

Environment
    CXX                  compiler; otherwise the first of c++, g++, clang++ in PATH
    TETRA_NATIVE_CACHE   folder for the compiled library; otherwise ~/.cache/tetra (or XDG's)
    TETRA_NATIVE_ISA     instruction set: native (default: all that this CPU has), avx512vnni, avx512, avx2vnni,
                         avx2, portable
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetra.autotune import table
from tetra.kernels.tunable import Config, bucket, dtype_name

COMPILER_VARIABLE = "CXX"
CACHE_VARIABLE = "TETRA_NATIVE_CACHE"
ISA_VARIABLE = "TETRA_NATIVE_ISA"

_SOURCES = Path(__file__).with_name("native_src")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
# Extensions of x86 that each choice needs, by the names that compilers give them.
_INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "native": (),
    "avx512vnni": (*_AVX512, "avx512vnni"),
    "avx512": _AVX512,
    "avx2vnni": (*_AVX2, "avxvnni"),
    "avx2": _AVX2,
    "portable": (),
}
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3}  # Format in vectors.hpp
INFERENCE_OPERATIONS = (
    "quantize_rows",
    "norm_quantize",
    "layer_norm",
    "ternary_linear",
    "ternary_matmul_int32",
    "attention_qkv",
)
OPERATIONS = (
    *INFERENCE_OPERATIONS,
    "hamming",
    "blend_rows",  # with its backward
    "blend_weight",
    "pack_weight",
    "attention_qkv_backward",
)


class BuildError(RuntimeError):
    """The kernels can't be compiled or loaded here; the message says why, in one line."""


# --- building ----------------------------------------------------------------------------------------------


def _cpu_features() -> str:
    """The CPU's extensions as the operating system lists them, separated by spaces; empty where it doesn't."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(("flags", "Features"))), "")


def instruction_set() -> str:
    """The value of ``TETRA_NATIVE_ISA``, checked. Raises ValueError for one that this machine can't run."""
    name = os.environ.get(ISA_VARIABLE, "").strip().lower() or "native"
    if name not in _INSTRUCTION_SETS:
        raise ValueError(f"{ISA_VARIABLE} is {name!r}; set it to one of {', '.join(_INSTRUCTION_SETS)}")
    present = _cpu_features().replace("_", "").split()  # Linux writes avx512_vnni, compilers avx512vnni
    missing = [feature for feature in _INSTRUCTION_SETS[name] if feature not in present]
    if missing:
        raise ValueError(f"{ISA_VARIABLE} is {name!r}, but this CPU has no {', '.join(missing)}; unset it")
    return name


def _compiler() -> list[str]:
    value = os.environ.get(COMPILER_VARIABLE, "")
    try:
        named = shlex.split(value)
    except ValueError as error:
        raise BuildError(f"{COMPILER_VARIABLE} is {value!r}, which is no command: {error}") from None
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    for program, *options in candidates:
        path = shutil.which(program)
        if path is not None:
            return [path, *options]
    wanted = " ".join(named) if named else "c++, g++ or clang++"
    raise BuildError(f"no C++ compiler: {wanted} is not in PATH")


def _command(isa: str) -> list[str]:
    if isa == "native":
        target = ["-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"]
    else:
        target = [f"-m{feature}" for feature in _INSTRUCTION_SETS[isa]]
    return [*_compiler(), *_FLAGS, *target, str(_SOURCES / "native.cpp")]


def _key(command: list[str]) -> str:
    """Changes with everything that the library depends on: sources, flags, compiler, CPU."""
    compiler = Path(command[0]).resolve().stat()
    parts = [*command, compiler.st_size, compiler.st_mtime_ns, platform.machine(), _cpu_features()]
    digest = hashlib.sha256(repr(parts).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _cache_folder() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tetra"


def _is_whole(path: Path) -> bool:
    """Whether a library is as ``_compile`` left it: its last 32 bytes are the digest of those before."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _compile(command: list[str], path: Path) -> None:
    """Build ``path``. It appears at once and whole, whatever other processes do at the same time."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        built = Path(folder) / path.name
        try:
            done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.SubprocessError) as error:
            raise BuildError(f"{command[0]} can't be run: {error}") from None
        if done.returncode or not built.is_file():
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            said = f": {lines[0].strip()}" if lines else ""
            raise BuildError(f"{command[0]} failed with exit status {done.returncode}{said}")
        # Loaders ignore what follows the last section; they can crash on a file that was cut off.
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())
        built.chmod(0o755)
        os.replace(built, path)


def _load(isa: str) -> ctypes.CDLL:
    """The library for an instruction set: from the cache, or built. Raises BuildError."""
    command = _command(isa)
    name = f"native-{isa}-{_key(command)}.so"
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / name
        if not _is_whole(path):
            _compile(command, path)
        return _declare(ctypes.CDLL(str(path)))
    except (OSError, RuntimeError) as error:
        if isinstance(error, BuildError):
            raise
        reason = error
    # No folder to keep it in, or one from which nothing may be loaded.
    try:
        with tempfile.TemporaryDirectory(prefix="tetra-") as temporary:
            path = Path(temporary) / name
            _compile(command, path)
            library = _declare(ctypes.CDLL(str(path)))
    except OSError as error:
        raise BuildError(f"no folder for the compiled library: {reason}; {error}") from None
    warnings.warn(
        f"the C++ kernels were built for this process only, because the cache can't be used ({reason}); "
        f"set {CACHE_VARIABLE} to a folder that can be written, and later starts need not build them",
        stacklevel=2,
    )
    return library


_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the signatures in native.cpp, and the library the threads to run on."""
    library.tetra_instructions.restype = ctypes.c_char_p
    library.tetra_has_float16.restype = _INT
    rows: list[Any] = [
        _POINTER,
        _INT,
        _LONG,
        _LONG,
        _LONG,
        _POINTER,
        _LONG,
        _POINTER,
        _INT,
        _POINTER,
        _INT,
        _POINTER,
        _INT,
    ]
    library.tetra_rows.argtypes = [*rows, _FLOAT, _POINTER, _POINTER, _POINTER, _LONG, _LONG]
    product: list[Any] = [
        _POINTER,
        _LONG,
        _LONG,
        _LONG,
        _LONG,
        _POINTER,
        _POINTER,
        _FLOAT,
        _POINTER,
        _INT,
        _POINTER,
        _INT,
    ]
    library.tetra_ternary_linear.argtypes = [*product, _LONG, _INT, _LONG, _FLOAT, _POINTER, _INT, _LONG, _LONG]
    library.tetra_pack_ternary.argtypes = [_POINTER, _LONG, _LONG, _FLOAT, _POINTER, _LONG]
    library.tetra_attention.argtypes = [_POINTER, _INT, *[_LONG] * 6, _FLOAT, _POINTER, _LONG]
    library.tetra_attention_backward.argtypes = [
        _POINTER,
        _INT,
        *[_LONG] * 6,
        _FLOAT,
        _FLOAT,
        _POINTER,
        _POINTER,
        _LONG,
    ]
    activation: list[Any] = [_POINTER, _INT, _LONG, _LONG, _INT, ctypes.c_double, _LONG, *[_POINTER, _INT] * 2, _FLOAT]
    library.tetra_blend_rows.argtypes = [*activation, _FLOAT, _POINTER, _INT, _LONG]
    gradients: list[Any] = [_POINTER, _INT, *[_POINTER] * 3]
    library.tetra_blend_rows_backward.argtypes = [*activation, *gradients, _FLOAT, _POINTER, _LONG]
    library.tetra_blend_weight.argtypes = [_POINTER, _INT, _LONG, _FLOAT, _POINTER, _INT, _LONG]
    codes: list[Any] = [_POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG, _LONG]
    library.tetra_hamming_nearest.argtypes = [*codes, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG]
    library.tetra_hamming_within.argtypes = [*codes, _POINTER, _INT, *[_POINTER] * 4, _LONG, _LONG]
    library.tetra_hamming_all.argtypes = [*codes, _POINTER, _LONG, _LONG]
    for name in (
        "tetra_rows",
        "tetra_ternary_linear",
        "tetra_pack_ternary",
        "tetra_attention",
        "tetra_attention_backward",
        "tetra_blend_rows",
        "tetra_blend_rows_backward",
        "tetra_blend_weight",
        "tetra_hamming_nearest",
        "tetra_hamming_within",
        "tetra_hamming_all",
    ):
        getattr(library, name).restype = None
    library.tetra_use_threads_of.argtypes = [_POINTER]
    library.tetra_use_threads_of(_gomp_parallel())
    return library


def _gomp_parallel() -> int | None:
    """Address of the function that starts a parallel region in the OpenMP runtime that PyTorch has loaded."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:  # a search from PyTorch's library goes through the libraries that it was linked with
            function = ctypes.CDLL(str(folder / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, _POINTER).value
    return None


_lock = threading.Lock()


@cache
def _library() -> ctypes.CDLL | None:
    """The loaded library, or None after one warning. Decided once a process, see ``reset``."""
    try:
        return _load(instruction_set())
    except BuildError as error:
        warnings.warn(
            f"the C++ kernels for CPUs can't be built ({error}); plain PyTorch runs instead: the same results, slower",
            stacklevel=2,
        )
        return None


# --- choice ------------------------------------------------------------------------------------------------

_off: ContextVar[bool] = ContextVar("compiled CPU kernels are off", default=False)
_slower: set[tuple[str, torch.dtype]] = set()  # what plain PyTorch was measured to do faster


def available() -> bool:
    """Whether the compiled kernels can run on this machine; builds them on the first call.

    Raises ValueError for a ``TETRA_NATIVE_ISA`` that can't be.
    """
    return not _off.get() and _loaded() is not None


def _loaded() -> ctypes.CDLL | None:
    if _library.cache_info().currsize == 0:
        with _lock:  # or two threads would build, and warn, at once
            return _library()
    return _library()


def instructions() -> str:
    """What the compiled kernels use, "AVX-512 with VNNI and BF16" for example; "none" without them."""
    library = _loaded()
    return "none" if library is None else library.tetra_instructions().decode()


def supports(name: str, dtype: torch.dtype) -> bool:
    """Whether operation ``name`` runs here for ``dtype``, and was not measured to be slower than plain PyTorch.

    ``dtype`` is that of the floating input, for ``ternary_linear`` that of the output, for
    ``ternary_matmul_int32`` int8, for ``hamming`` uint8.
    """
    if name not in OPERATIONS:
        raise ValueError(f"name is {name!r}, wanted one of {', '.join(OPERATIONS)}")
    library = None if _off.get() else _loaded()
    if library is None or (name, dtype) in _slower:
        return False
    integer = {"ternary_matmul_int32": torch.int8, "hamming": torch.uint8}.get(name)
    return _known(dtype) if integer is None else dtype == integer


def prefer(name: str, dtype: torch.dtype, compiled: bool) -> None:
    """From now on ``supports`` says for an operation that the compiled kernel is the faster, or that it is not."""
    (_slower.discard if compiled else _slower.add)((name, dtype))


def reset() -> None:
    """Forget the library and all preferences; the next use reads the environment again."""
    with _lock:
        _library.cache_clear()
        _has_float16.cache_clear()
        _slower.clear()
    table.reset()


@contextmanager
def switched_off() -> Iterator[None]:
    """Within this context nothing is available; for comparisons."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


# --- what can be tuned -------------------------------------------------------------------------------------

# A thread is worth starting for so many values, or bytes compared: fewer are done before it has woken up. The largest
# number means one thread.
_NEVER = 1 << 62
ROW_FIELDS = ("VALUES_A_THREAD", "ROWS_A_TASK")
ROW_CONFIGS: tuple[Config, ...] = (
    (1 << 14, 8),
    *((1 << 14, rows) for rows in (1, 2, 4, 16, 32, 64, 128)),
    *((values, rows) for values in (1 << 12, 1 << 16, 1 << 18, _NEVER) for rows in (1, 2, 4, 8, 16, 32, 64, 128)),
)
HAMMING_FIELDS = ("BYTES_A_BLOCK", "BYTES_A_THREAD")
HAMMING_CONFIGS: tuple[Config, ...] = (
    (1 << 18, 1 << 20),
    *((block, 1 << 20) for block in (1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 19, 1 << 20, 1 << 21)),
    *((1 << block, n_bytes) for n_bytes in (1 << 16, 1 << 18, 1 << 22, 1 << 24, _NEVER) for block in range(14, 22)),
)
TERNARY_FIELDS = ("BYTES_A_BLOCK",)
TERNARY_CONFIGS: tuple[Config, ...] = ((192 << 10,), *((kib << 10,) for kib in (32, 64, 96, 128, 256, 384, 512, 768)))


def rows_key(operation: str, m: int, k: int, dtype: torch.dtype, threads: int) -> str:
    """Names a problem of the row kernels: ``quantize_rows``, ``norm_quantize`` or ``layer_norm`` of [m, k]."""
    return f"{operation}_m{bucket(m)}_k{k}_{dtype_name(dtype)}_t{threads}"


def hamming_key(n_queries: int, n_rows: int, n_bytes: int, threads: int) -> str:
    """Names a search of queries among rows of n_bytes."""
    return f"q{bucket(n_queries)}_r{bucket(n_rows)}_b{n_bytes}_t{threads}"


def ternary_key(m: int, n: int, k: int, threads: int) -> str:
    """Names a product of [m, k] with a packed weight [n, k]."""
    return f"m{bucket(m)}_n{n}_k{k}_t{threads}"


# --- operations --------------------------------------------------------------------------------------------


def _rows_of(x: Tensor) -> Tensor:
    """As [M, K] with neighbours along K side by side; a view where possible."""
    x = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _format_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else _FORMATS[tensor.dtype]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _has_float16() -> bool:
    library = _loaded()
    return library is not None and bool(library.tetra_has_float16())


def _known(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16) or (dtype == torch.float16 and _has_float16())


def _readable(values: Tensor) -> Tensor:
    """In a format that the kernels read."""
    return values if _known(values.dtype) else values.float()


def _written(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or what to write, and convert, where the kernels don't write it."""
    return dtype if _known(dtype) else torch.float32


def _parameter(values: Tensor | None) -> Tensor | None:
    return None if values is None else _readable(values).contiguous()


def _run_rows(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gelu: bool,
    residual: Tensor | None,
    total: Tensor | None,
    out: Tensor | None,
    codes: Tensor | None,
    scale: Tensor | None,
    operation: str,
    config: Config | None,
) -> None:
    library = _loaded()
    assert library is not None  # callers have asked
    rows, added = _rows_of(x), None if residual is None else _rows_of(residual)
    weight, bias = _parameter(weight), _parameter(bias)
    threads, (m, k) = torch.get_num_threads(), rows.shape
    if config is None:
        config = table.lookup("native_rows", 0, rows_key(operation, m, k, rows.dtype, threads), ROW_CONFIGS)
    values_a_thread, rows_a_task = config
    library.tetra_rows(
        rows.data_ptr(),
        _FORMATS[rows.dtype],
        m,
        k,
        rows.stride(0),
        _pointer(added),
        0 if added is None else added.stride(0),
        _pointer(total),
        gelu,
        _pointer(weight),
        _format_of(weight),
        _pointer(bias),
        _format_of(bias),
        eps,
        _pointer(out),
        _pointer(codes),
        _pointer(scale),
        rows_a_task,
        min(threads, m * k // values_a_thread + 1),
    )


def _codes_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[:-1], dtype=torch.float32)


def quantize_rows(x: Tensor, *, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes [..., K] and float32 scales [...] of ``x`` [..., K]; see ``tetra.kernels.row_quantize``."""
    codes, scale = _codes_and_scale(x)
    _run_rows(x, None, None, 0.0, False, None, None, None, codes, scale, "quantize_rows", config)
    return codes, scale


def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    gelu: bool = False,
    residual: Tensor | None = None,
    *,
    config: Config | None = None,
) -> tuple[Tensor, ...]:
    """(codes, scale) of LayerNorm(gelu(x + residual)), and with ``residual`` the sum too."""
    codes, scale = _codes_and_scale(x)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    _run_rows(x, weight, bias, eps, gelu, residual, total, None, codes, scale, "norm_quantize", config)
    return (codes, scale) if total is None else (codes, scale, total)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(x + residual) [..., K] in x.dtype, and with ``residual`` the sum too."""
    out = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    _run_rows(x, weight, bias, eps, False, residual, total, out, None, None, "layer_norm", config)
    return out if total is None else (out, total)


def _run_product(
    x_q: Tensor,
    packed: Tensor,
    out_dtype: torch.dtype,
    scale: Tensor | None = None,
    weight_scale: float = 1.0,
    bias: Tensor | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    scaled_columns: int = 0,
    column_scale: float = 1.0,
    config: Config | None = None,
) -> Tensor:
    library = _loaded()
    assert library is not None  # callers have asked
    n, threads = packed.shape[0], torch.get_num_threads()
    out = torch.empty((*x_q.shape[:-1], n), dtype=out_dtype)
    rows = _rows_of(x_q)
    if rows.shape[1] % 4:  # the products take four values at a time
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))
    packed, bias = packed.contiguous(), _parameter(bias)
    scale = None if scale is None else scale.contiguous()
    if residual is not None:
        residual = _rows_of(_readable(residual))
    if config is None:
        config = table.lookup(
            "native_ternary", 0, ternary_key(rows.shape[0], n, rows.shape[1], threads), TERNARY_CONFIGS
        )
    library.tetra_ternary_linear(
        rows.data_ptr(),
        rows.shape[0],
        n,
        rows.shape[1],
        rows.stride(0),
        packed.data_ptr(),
        _pointer(scale),
        weight_scale,
        _pointer(bias),
        _format_of(bias),
        _pointer(residual),
        _format_of(residual),
        0 if residual is None else residual.stride(0),
        gelu,
        scaled_columns,
        column_scale,
        out.data_ptr(),
        _FORMATS[out_dtype],
        *config,
        threads,
    )
    return out


def ternary_matmul_int32(x_q: Tensor, packed: Tensor, *, config: Config | None = None) -> Tensor:
    """int8 [..., K] times the packed weight, transposed: int32 [..., N], exact."""
    return _run_product(x_q, packed, torch.int32, config=config)


def ternary_linear(
    x_q: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor | float,
    bias: Tensor | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    scaled_columns: int = 0,
    column_scale: float = 1.0,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """The layer from codes and scales, with what follows it; see ``tetra.kernels.ternary_linear_int8``."""
    return _run_product(
        x_q,
        packed,
        out_dtype,
        scale,
        float(weight_scale),
        bias,
        gelu,
        residual,
        scaled_columns,
        column_scale,
    )


_LOG2_E = 1.4426950408889634  # exp(x) = 2^(x log2 e)


def attention_qkv(qkv: Tensor, n_heads: int, prescaled: bool = False) -> Tensor:
    """Attention of ``qkv`` [B, T, 3 * H * D] -> [B, T, H * D]; see ``tetra.kernels.attention``."""
    library = _loaded()
    assert library is not None  # callers have asked
    b, t, width = qkv.shape
    dim = width // (3 * n_heads)
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    out = torch.empty((b, t, n_heads * dim), dtype=qkv.dtype)
    scale = 1.0 if prescaled else _LOG2_E / dim**0.5
    library.tetra_attention(
        qkv.data_ptr(),
        _FORMATS[qkv.dtype],
        b,
        t,
        n_heads,
        dim,
        qkv.stride(0),
        qkv.stride(1),
        scale,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def attention_qkv_backward(grad: Tensor, qkv: Tensor, n_heads: int) -> Tensor:
    """From the gradient of ``attention_qkv``'s result, [B, T, H * D], that of ``qkv``; both are of its dtype."""
    library = _loaded()
    assert library is not None  # callers have asked
    b, t, width = qkv.shape
    dim = width // (3 * n_heads)
    qkv, grad = qkv if qkv.stride(2) == 1 else qkv.contiguous(), grad.contiguous()
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    library.tetra_attention_backward(
        qkv.data_ptr(),
        _FORMATS[qkv.dtype],
        b,
        t,
        n_heads,
        dim,
        qkv.stride(0),
        qkv.stride(1),
        _LOG2_E / dim**0.5,
        dim**-0.5,
        grad.data_ptr(),
        grad_qkv.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_qkv


def _activation(
    x: Tensor, norm: tuple[Tensor, Tensor, float] | None, gelu: bool, dropout: float, seed: int | Tensor
) -> list[object]:
    """The arguments that ``blend_rows`` and its backward share. Callers keep the list, and with it the tensors."""
    weight, bias, eps = (None, None, 0.0) if norm is None else norm
    return [x, x.shape[0], x.shape[1], gelu, dropout, int(seed), _parameter(weight), _parameter(bias), eps]


def _pointers(arguments: list[object]) -> Iterator[object]:
    """What C++ takes: for a tensor its address and its format, for None those of no tensor."""
    for argument in arguments:
        if argument is None or isinstance(argument, Tensor):
            yield _pointer(argument)
            yield _format_of(argument)
        else:
            yield argument


def blend_rows(
    x: Tensor,
    lam: float,
    norm: tuple[Tensor, Tensor, float] | None,
    gelu: bool,
    dropout: float,
    seed: int | Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """Blend of LayerNorm(dropout(gelu(x))) for ``x`` [M, K], contiguous; see ``tetra.kernels.blended_linear``."""
    library = _loaded()
    assert library is not None  # callers have asked
    out = torch.empty(x.shape, dtype=_written(out_dtype))
    arguments = [*_activation(x, norm, gelu, dropout, seed), lam, out]
    library.tetra_blend_rows(*_pointers(arguments), torch.get_num_threads())
    return out.to(out_dtype)


def blend_rows_backward(
    grad: Tensor,
    x: Tensor,
    norm: tuple[Tensor, Tensor, float] | None,
    gelu: bool,
    dropout: float,
    seed: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of ``blend_rows``' result those of x and of the norm's weight and bias.

    The last two are float32 [K], or empty without ``norm``.
    """
    return _blend_rows_backward(grad, x, norm, gelu, dropout, seed, 0.0, None)


def blend_rows_again(
    grad: Tensor,
    x: Tensor,
    lam: float,
    norm: tuple[Tensor, Tensor, float] | None,
    gelu: bool,
    dropout: float,
    seed: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``blend_rows_backward``, and ``blend_rows`` in grad.dtype, in one pass over the rows."""
    y = torch.empty(grad.shape, dtype=_readable(grad).dtype)
    return *_blend_rows_backward(grad, x, norm, gelu, dropout, seed, lam, y), y.to(grad.dtype)


def _blend_rows_backward(
    grad: Tensor,
    x: Tensor,
    norm: tuple[Tensor, Tensor, float] | None,
    gelu: bool,
    dropout: float,
    seed: int | Tensor,
    lam: float,
    y: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Also writes ``y``, if there is one, in the dtype in which ``grad`` is read."""
    library = _loaded()
    assert library is not None  # callers have asked
    grad_x = torch.empty_like(x)
    sums = torch.empty(2, 0 if norm is None else x.shape[1])
    arguments = [*_activation(x, norm, gelu, dropout, seed), _readable(grad).contiguous()]
    library.tetra_blend_rows_backward(
        *_pointers(arguments),
        grad_x.data_ptr(),
        sums[0].data_ptr(),
        sums[1].data_ptr(),
        lam,
        None if y is None else y.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_x, sums[0], sums[1]


def pack_weight(weight: Tensor, factor: float, width: int) -> Tensor:
    """Codes of ``weight`` (float32 [N, K]) times ``factor``, rounded and clipped, packed: uint8 [N, width].

    The layout is that of ``tetra.kernels.ternary_matmul``, whose ``packed_width(K)`` is ``width``.
    """
    library = _loaded()
    assert library is not None  # callers have asked
    weight = weight.contiguous()
    packed = torch.empty((weight.shape[0], width), dtype=torch.uint8)
    library.tetra_pack_ternary(weight.data_ptr(), *weight.shape, factor, packed.data_ptr(), torch.get_num_threads())
    return packed


def blend_weight(weight: Tensor, lam: float, out_dtype: torch.dtype) -> Tensor:
    """W + lambda (Q(W) - W) of ``weight`` in ``out_dtype``; see ``tetra.kernels.blended_linear``."""
    library = _loaded()
    assert library is not None  # callers have asked
    weight = weight.contiguous()
    out = torch.empty(weight.shape, dtype=_written(out_dtype))
    library.tetra_blend_weight(
        weight.data_ptr(),
        _FORMATS[weight.dtype],
        weight.numel(),
        lam,
        out.data_ptr(),
        _FORMATS[out.dtype],
        torch.get_num_threads(),
    )
    return out.to(out_dtype)


def _codes(queries: Tensor, database: Tensor) -> list[object]:
    """The arguments that all searches share. Callers keep the tensors; rows may be any number of bytes apart."""
    queries, database = (codes if codes.stride(1) == 1 else codes.contiguous() for codes in (queries, database))
    return [queries, len(queries), queries.stride(0), database, len(database), database.stride(0), database.shape[1]]


def _addresses(arguments: list[object]) -> Iterator[object]:
    for argument in arguments:
        yield argument.data_ptr() if isinstance(argument, Tensor) else argument


def _hamming_plan(
    queries: Tensor, database: Tensor, threads: int | None, config: Config | None = None
) -> tuple[int, int]:
    """Bytes of a block, and threads: as many as are asked for, or of PyTorch's those that are worth it."""
    n_queries, (n_rows, n_bytes), most = len(queries), database.shape, threads or torch.get_num_threads()
    if config is None:
        config = table.lookup("native_hamming", 0, hamming_key(n_queries, n_rows, n_bytes, most), HAMMING_CONFIGS)
    block_bytes, bytes_a_thread = config
    return block_bytes, threads or min(most, n_queries * n_rows * n_bytes // bytes_a_thread + 1)


def hamming_threads(queries: Tensor, database: Tensor, threads: int | None) -> int:
    """As many as are asked for, or as PyTorch uses, but fewer where that many would cost more than they do."""
    return _hamming_plan(queries, database, threads)[1]


def hamming_search(
    queries: Tensor,
    database: Tensor,
    k: int,
    allowed: Tensor | None,
    threads: int | None,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest allowed rows of ``database`` (uint8 [R, B]); see ``tetra.kernels.hamming_search``.

    Distances int32 and rows int64 [Q, k], -1 where fewer rows are allowed.
    """
    library = _loaded()
    assert library is not None  # callers have asked
    distances = torch.empty((len(queries), k), dtype=torch.int32)
    rows = torch.empty((len(queries), k), dtype=torch.int64)
    arguments = [*_codes(queries, database), None if allowed is None else allowed.contiguous(), k, distances, rows]
    library.tetra_hamming_nearest(*_addresses(arguments), *_hamming_plan(queries, database, threads, config))
    return distances, rows


def hamming_range_search(
    queries: Tensor,
    database: Tensor,
    radius: int,
    allowed: Tensor | None,
    threads: int | None,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allowed rows within ``radius``: offsets int64 [Q + 1], distances int32 [N], rows int64 [N]."""
    library = _loaded()
    assert library is not None  # callers have asked
    arguments = [*_codes(queries, database), None if allowed is None else allowed.contiguous(), radius]
    plan = _hamming_plan(queries, database, threads, config)
    offsets = torch.zeros(len(queries) + 1, dtype=torch.int64)
    library.tetra_hamming_within(*_addresses([*arguments, offsets[1:], None, None, None]), *plan)
    offsets = offsets.cumsum(0)
    n = int(offsets[-1])
    distances, rows = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int64)
    if n:
        library.tetra_hamming_within(*_addresses([*arguments, None, offsets, distances, rows]), *plan)
    return offsets, distances, rows


def hamming_distances(
    queries: Tensor, database: Tensor, threads: int | None, *, config: Config | None = None
) -> Tensor:
    """Every distance, int32 [Q, R]."""
    library = _loaded()
    assert library is not None  # callers have asked
    arguments = _codes(queries, database)
    out = torch.empty((len(queries), len(database)), dtype=torch.int32)
    plan = _hamming_plan(queries, database, threads, config)
    library.tetra_hamming_all(*_addresses(arguments), out.data_ptr(), *plan)
    return out
