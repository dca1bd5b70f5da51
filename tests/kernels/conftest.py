"""Runs an operation on every backend: ``run(function, *arguments)`` gives CPU tensors back."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from tetra.kernels import native
from tetra.kernels.backend import HAS_TRITON

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Run]:
    """Calls a function of the package in a process where Triton's kernels are interpreted.

    Triton decides that when a kernel is defined, so one process cannot have both; here the compiler is needed too.
    """
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    before = os.environ.get("TETRA_BACKEND")
    os.environ["TETRA_BACKEND"] = "interpreter"
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    try:
        pool.submit(int).result()  # the process starts, and inherits the environment, with its first task
    finally:
        if before is None:
            del os.environ["TETRA_BACKEND"]
        else:
            os.environ["TETRA_BACKEND"] = before
    with pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def _run_on_gpu(function: Callable[..., Any], *arguments: Any) -> Any:
    moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    result = function(*moved)
    return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()


def _run_on_cpu(backend: str) -> Run:
    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TETRA_BACKEND", backend)
            return function(*arguments)

    return call


@pytest.fixture(
    scope="session", params=["torch", "native", "interpreter", pytest.param("triton", marks=pytest.mark.gpu)]
)
def run(request: pytest.FixtureRequest) -> Run:
    """Calls a function of the package on one of the backends."""
    if request.param == "native" and not native.available():
        pytest.skip("the C++ kernels can't be built here")
    if request.param in ("torch", "native"):
        return _run_on_cpu(request.param)
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")  # type: ignore[no-any-return]
    return _run_on_gpu
