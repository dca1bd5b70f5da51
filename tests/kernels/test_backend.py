from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tetra.kernels import native, pack_ternary, ternary_matmul_int32
from tetra.kernels.backend import (
    _is_too_old,
    _warn_of_plain_torch,
    backend_for,
    check_arch,
    requested,
    why_not_compiled,
)

USE_EVERYTHING = """
import torch
import tetra.kernels as K
codes = torch.randint(-1, 2, (6, 40), dtype=torch.int8)
K.ternary_linear(torch.randn(3, 40), K.pack_ternary(codes), 0.1)
K.hamming_search(K.pack_bits(torch.randn(2, 20)), K.pack_bits(torch.randn(5, 20)), 2)
K.attention(*torch.randn(3, 1, 2, 5, 4))
"""


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_package_works_without_triton_and_without_a_gpu() -> None:
    hide = "import sys; sys.modules['triton'] = None\n"
    done = python(hide + USE_EVERYTHING, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr


def test_requested_kernel_without_triton_says_so() -> None:
    done = python("import sys; sys.modules['triton'] = None\n" + USE_EVERYTHING, TETRA_BACKEND="interpreter")
    assert "Triton is not installed" in done.stderr.splitlines()[-1]


def test_cpu_tensors_use_native_kernels_or_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = "native" if native.available() else "torch"
    for value, expected in (("auto", automatic), ("torch", "torch"), ("", automatic), (" Torch ", "torch")):
        monkeypatch.setenv("TETRA_BACKEND", value)
        assert backend_for(torch.zeros(1)) == expected


def test_an_old_triton_is_not_used() -> None:
    pytest.importorskip("triton")
    age = "import triton\ntriton.__version__ = '3.4.0+git1'\n"
    done = python(age + USE_EVERYTHING, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    done = python(age + USE_EVERYTHING, TETRA_BACKEND="interpreter")
    assert "Triton 3.4.0+git1 is too old; pip install 'triton>=3.5'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("version", "too_old"), [("3.4.0", True), ("2.1.0", True), ("3.5.0", False), ("3.7.1+git", False), ("4.0", False)]
)
def test_versions_of_triton(version: str, too_old: bool) -> None:
    assert _is_too_old(version) == too_old


def test_other_devices_run_in_plain_torch_and_say_so_once() -> None:
    why_not_compiled.cache_clear()
    _warn_of_plain_torch.cache_clear()
    tensor = torch.zeros(1, device="meta")
    with pytest.warns(UserWarning, match=r"plain PyTorch on meta.*slower: there are none for meta devices") as caught:
        chosen = [backend_for(tensor), backend_for(tensor)]
    assert chosen == ["torch", "torch"]
    assert len(caught) == 1


def test_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETRA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="TETRA_BACKEND is 'cuda'; set it to one of auto, torch, native"):
        requested()
    with pytest.raises(ValueError, match="TETRA_BACKEND is 'cuda'"):
        ternary_matmul_int32(torch.zeros(1, 4, dtype=torch.int8), pack_ternary(torch.zeros(1, 4, dtype=torch.int8)))


def test_backends_that_cannot_run_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TETRA_BACKEND", "triton")
    with pytest.raises(ValueError, match="a tensor is on cpu"):
        backend_for(torch.zeros(1))
    monkeypatch.setenv("TETRA_BACKEND", "interpreter")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="set it before"):
        backend_for(torch.zeros(1))


@pytest.mark.parametrize("arch", [61, 70, 75])
def test_chips_without_int8_tensor_cores_in_triton_are_refused(arch: int) -> None:
    with pytest.raises(ValueError, match=rf"sm_{arch} is not supported .* no int8 tensor-core product before sm_80"):
        check_arch(arch)
