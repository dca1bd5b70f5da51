from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tetra.kernels import norm_quantize, quantize_rows, row_quantize

Run = Callable[..., Any]


def expected(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The formulas of the contract in numpy, with float32 rounding after every step."""
    maximum = np.maximum(np.abs(x).max(axis=-1), np.float32(1e-5))
    scaled = x * (np.float32(127) / maximum)[..., None]
    return np.clip(np.rint(scaled), -128, 127).astype(np.int8), maximum / np.float32(127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (0, 8), (3, 127), (5, 768), (2, 3072), (2, 5000), (1, 33000)])
def test_codes_and_scales_are_the_formulas(run: Run, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape) * torch.logspace(-4, 3, shape[0] or 1)[: shape[0], None]).to(dtype)
    codes, scale = run(quantize_rows, x)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    codes_expected, scale_expected = expected(x.float().numpy())
    assert np.array_equal(codes.numpy(), codes_expected)
    assert np.array_equal(scale.numpy(), scale_expected)


def test_ties_round_to_even(run: Run) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert run(quantize_rows, x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_zero_and_constant_and_tiny_rows(run: Run) -> None:
    x = torch.stack([torch.zeros(9), torch.full((9,), -3.0), torch.full((9,), 1e-7), torch.full((9,), 3e38)])
    codes, scale = run(quantize_rows, x)
    assert codes[:, 0].tolist() == [0, -127, 1, 127]
    assert np.array_equal(scale.numpy(), expected(x.numpy())[1])


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=20),
        elements=st.floats(-(2.0**126), 2.0**126, width=32),
    )
)
@settings(max_examples=80, deadline=None)
def test_any_finite_values(x: np.ndarray) -> None:
    codes, scale = quantize_rows(torch.from_numpy(x))
    reference_codes, reference_scale = row_quantize.quantize_rows_reference(torch.from_numpy(x))
    assert torch.equal(codes, reference_codes)
    assert torch.equal(scale, reference_scale)
    error = np.abs(codes.numpy() * scale.double().numpy()[..., None] - x)
    assert (error <= 0.5001 * scale.double().numpy()[..., None] + 1e-45).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [5, 5000])
def test_values_that_are_not_finite_are_refused(run: Run, bad: float, k: int) -> None:
    x = torch.randn(4, k)
    x[2, k - 1] = bad
    with pytest.raises(ValueError, match="row 2 holds NaN or infinity"):
        run(quantize_rows, x)


def test_rows_need_not_be_contiguous(run: Run) -> None:
    x = torch.randn(40, 6).T
    codes, scale = run(quantize_rows, x)
    assert np.array_equal(codes.numpy(), expected(x.numpy())[0])
    assert scale.shape == (6,)


@pytest.mark.gpu
def test_rows_further_apart_than_32_bits_can_tell() -> None:
    x = torch.empty(2, 2**31 + 64, dtype=torch.float16, device="cuda")[:, :256]
    x.copy_(torch.randn(2, 256))
    weight = torch.rand(256, device="cuda") + 0.5
    codes, scale = quantize_rows(x)
    assert np.array_equal(codes.cpu().numpy(), expected(x.float().cpu().numpy())[0])
    assert np.array_equal(scale.cpu().numpy(), expected(x.float().cpu().numpy())[1])
    result = tuple(t.cpu() for t in norm_quantize(x, weight, weight))
    check_normed(result, x.cpu(), weight.cpu(), weight.cpu(), False, None)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"x: dtype is torch\.int32"):
        quantize_rows(torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="no values"):
        quantize_rows(torch.zeros(2, 0))


def test_operator_is_well_formed() -> None:
    torch.library.opcheck(row_quantize._quantize_rows_op, (torch.randn(5, 40),))


def test_it_compiles_whole_and_exports_for_any_number_of_rows() -> None:
    class Quantize(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return quantize_rows(x * 2)

    x = torch.randn(3, 5, 40)
    compiled = torch.compile(Quantize(), fullgraph=True, backend="aot_eager")
    program = torch.export.export(Quantize(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for call in (compiled, program.module()):
        for n in (3, 2):
            assert all(torch.equal(a, b) for a, b in zip(call(x[:n]), quantize_rows(2 * x[:n]), strict=True))
        with pytest.raises(ValueError, match="row 7 holds NaN or infinity"):
            call(torch.where(torch.arange(15).view(3, 5, 1) == 7, float("nan"), x))


# --- with a LayerNorm first --------------------------------------------------------------------------------


def normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: bool, residual: torch.Tensor | None) -> Any:
    return norm_quantize(x, weight, bias, gelu=gelu, residual=residual)


def check_normed(
    result: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gelu: bool,
    residual: torch.Tensor | None,
) -> None:
    """Against float64: a code may differ, by one, only within 1e-3 of a rounding boundary."""
    codes, scale = result[:2]
    assert (codes.dtype, codes.shape) == (torch.int8, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, x.shape[:-1])
    assert len(result) == (2 if residual is None else 3)
    if residual is not None:
        assert torch.equal(result[2], x + residual)
        x = x + residual
    t = x.double()
    if gelu:
        t = 0.5 * t * torch.special.erfc(-t / 2**0.5)
    centred = t - t.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
    maximum = y.abs().amax(-1, keepdim=True).clamp(min=1e-5) if y.numel() else y.sum(-1, keepdim=True)
    before = y * (127 / maximum)
    difference = (codes.double() - before.round()).abs()
    at_boundary = ((before - before.floor()) - 0.5).abs() <= 1e-3
    assert (difference <= 1).all()
    assert (at_boundary | (difference == 0)).all()
    torch.testing.assert_close(scale.double(), maximum.squeeze(-1) / 127, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("gelu", "with_residual"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(0, 8), (3, 127), (2, 3, 768), (2, 3072), (1, 4100)])
def test_norm_quantize_is_its_definition(
    run: Run, dtype: torch.dtype, gelu: bool, with_residual: bool, shape: tuple[int, ...]
) -> None:
    x = (2.0 * torch.randn(shape) + torch.randn(shape[:-1]).unsqueeze(-1)).to(dtype)
    residual = torch.randn(shape).to(dtype) if with_residual else None
    weight, bias = torch.rand(shape[-1]) + 0.5, 0.3 * torch.randn(shape[-1])
    check_normed(run(normed, x, weight, bias, gelu, residual), x, weight, bias, gelu, residual)


def test_norm_quantize_of_one_value_gives_its_bias(run: Run) -> None:
    """The only value is its own mean, whatever it is."""
    codes, scale = run(normed, torch.tensor([[7.0], [-9.0]]), torch.ones(1), torch.tensor([-2.0]), False, None)
    assert codes.tolist() == [[-127], [-127]]
    assert np.array_equal(scale.numpy(), np.full(2, np.float32(2) / np.float32(127)))


def test_norm_quantize_of_rows_wider_than_registers(run: Run) -> None:
    x, residual = torch.randn(2, 2, 33000).half()
    weight, bias = torch.rand(33000) + 0.5, torch.randn(33000)
    for arguments in ((True, residual), (False, None)):
        check_normed(run(normed, x, weight, bias, *arguments), x, weight, bias, *arguments)


def test_norm_quantize_takes_strided_rows_and_any_parameters(run: Run) -> None:
    x, residual = torch.randn(9, 200)[:, 60:160].half(), torch.randn(100, 9).half().T
    weight, bias = torch.rand(200).half()[::2] + 0.5, torch.randn(100).bfloat16()
    check_normed(run(normed, x, weight, bias, True, residual), x, weight, bias, True, residual)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gelu", [False, True])
def test_norm_quantize_marks_rows_that_are_not_finite(run: Run, bad: float, gelu: bool) -> None:
    x = torch.randn(4, 300)
    x[2, 299] = bad
    scale = run(normed, x, torch.ones(300), torch.zeros(300), gelu, None)[1]
    assert torch.isfinite(scale).tolist() == [True, True, False, True]


def test_norm_quantize_in_steps_is_the_same() -> None:
    x, residual, weight, bias = torch.randn(6, 50), torch.randn(6, 50), torch.rand(50), torch.randn(50)
    for gelu in (False, True):
        for other in (None, residual):
            result = row_quantize.norm_quantize_reference(x, weight, bias, 1e-5, gelu, other)
            check_normed(result, x, weight, bias, gelu, other)


def test_wrong_arguments_of_norm_quantize_are_refused() -> None:
    x, ones = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(TypeError, match=r"x: dtype is torch\.float64"):
        norm_quantize(x.double(), ones, ones)
    with pytest.raises(ValueError, match=r"bias: shape is \(3,\), wanted \(8,\)"):
        norm_quantize(x, ones, torch.ones(3))
    with pytest.raises(ValueError, match="residual: shape"):
        norm_quantize(x, ones, ones, residual=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="residual: is on meta"):
        norm_quantize(x, ones, ones, residual=x.to("meta"))


def test_operators_of_norm_quantize_are_well_formed() -> None:
    x, weight = torch.randn(5, 40), torch.rand(40)
    torch.library.opcheck(row_quantize._norm_quantize_op, (x, weight, weight, 1e-5, True))
    torch.library.opcheck(row_quantize._add_norm_quantize_op, (x, x.flip(0), weight, weight, 1e-5, False))


def test_norm_quantize_compiles_whole_and_exports_for_any_number_of_rows() -> None:
    class Quantizer(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            codes, scale, total = norm_quantize(x, weight, weight, gelu=True, residual=x)
            return codes * scale.unsqueeze(-1) + total

    x, weight = torch.randn(3, 5, 24), torch.rand(24)
    module = Quantizer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), module(x, weight))
    program = torch.export.export(module, (x, weight), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    assert torch.equal(program.module()(x[:2], weight), module(x[:2], weight))


def test_cost_counts_every_tensor_once() -> None:
    assert row_quantize.cost(530, 768) == (530 * 768 * 4, 530 * 768 * 3 + 530 * 4)
    operations, n_bytes = row_quantize.cost(10, 100, norm=True, residual=True)
    assert (operations, n_bytes) == (1000 * 12, 1000 * (2 + 2 + 2 + 1) + 40 + 800)
