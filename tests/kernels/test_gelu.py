from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tetra.kernels.backend import tl, triton
from tetra.kernels.gelu import gelu_in_registers, gelu_reference


@triton.jit
def _gelu_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, gelu_in_registers(tl.load(x_ptr + at)))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """``x`` [n * 1024] through the kernel."""
    out = torch.empty_like(x)
    _gelu_kernel[(len(x) // 1024,)](x, out, BLOCK=1024)
    return out


@pytest.fixture(params=["interpreter", pytest.param("triton", marks=pytest.mark.gpu)])
def run_kernel(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")
    return lambda function, x: function(x.cuda()).cpu()


def test_error_against_float64(run_kernel) -> None:  # type: ignore[no-untyped-def]
    positive = torch.cat([torch.logspace(-8, 4.8, 8192), torch.linspace(0, 12, 8192)])
    x = torch.cat([positive, -positive]).float()
    error = (run_kernel(gelu, x).double() - gelu_reference(x)).abs()
    assert (error[: len(positive)] <= 3e-7 * positive.double() + 1e-30).all()
    assert (error[len(positive) :] <= 1e-7).all()
    # A single formula for both signs in float32 is no better.
    assert error.max() <= (torch.nn.functional.gelu(x).double() - gelu_reference(x)).abs().max()


def test_what_is_not_finite_stays_so(run_kernel) -> None:  # type: ignore[no-untyped-def]
    x = torch.zeros(1024)
    x[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    out = run_kernel(gelu, x)
    assert torch.isnan(out[:3]).all()
    assert (out[3:] == 0).all()
