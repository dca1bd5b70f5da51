from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tetra.kernels import attention, attention_qkv, native, query_scale
from tetra.kernels.attention import _attention_qkv_op, attention_reference, cost, force_formulation

Run = Callable[..., Any]


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = torch.exp(logits - logits.logsumexp(-1, keepdim=True))
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 50, 12), (1, 6, 37, 96), (3, 2, 17, 64)])
@pytest.mark.parametrize("formulation", [None, "fused", "plain"])
def test_attention_is_its_definition(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], formulation: str | None
) -> None:
    b, h, t, d = shape
    # Views of one projection, as the model makes them.
    q, k, v = torch.randn(b, t, 3, h, d).to(dtype).permute(2, 0, 3, 1, 4)
    if formulation is None:
        out = attention(q, k, v)
    else:
        with force_formulation(formulation):  # type: ignore[arg-type]
            out = attention(q, k, v)
    assert out.dtype == dtype
    assert out.shape == shape
    torch.testing.assert_close(out.double(), definition(q, k, v), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        attention_reference(q, k, v).double(), definition(q, k, v), rtol=tolerance, atol=tolerance
    )


def test_large_batches_go_image_by_image() -> None:
    """More logits than are held at once: every image comes out as if it were alone."""
    q, k, v = torch.randn(3, 3, 2, 2400, 4).bfloat16()
    out = attention(q, k, v)
    for image in range(3):
        assert torch.equal(out[image], attention(*(t[image : image + 1] for t in (q, k, v)))[0])


def test_gradients_flow() -> None:
    q, k, v = (torch.randn(1, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(attention, (q, k, v))


def test_large_logits_do_not_overflow() -> None:
    q = torch.full((1, 1, 5, 4), 300.0, dtype=torch.bfloat16)
    v = torch.randn(1, 1, 5, 4).bfloat16()
    torch.testing.assert_close(
        attention(q, q, v).double(), v.double().mean(2, keepdim=True).expand(1, 1, 5, 4), rtol=0.02, atol=0.02
    )


def test_wrong_arguments_are_refused() -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, q[..., :3], q[..., :3])
    with pytest.raises(ValueError, match=r"wanted \[B, H, T, D\]"):
        attention(q[0], q[0], q[0])
    with pytest.raises(ValueError, match=r"shape \(1, 2, 3, 0\) has no values in its last dimension"):
        attention(q[..., :0], q[..., :0], q[..., :0])
    with pytest.raises(ValueError, match="are on cpu, meta, cpu; move them"):
        attention(q, q.to("meta"), q)
    with pytest.raises(TypeError, match=r"torch.float32, torch.float64, torch.float32; wanted one"):
        attention(q, q.double(), q)
    with pytest.raises(TypeError, match="wanted one floating dtype"):
        attention(q.int(), q.int(), q.int())
    with pytest.raises(ValueError, match="head_dim: is 0, wanted 1 or more"):
        query_scale(0)


# --- on the output of the projection -----------------------------------------------------------------------

UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-20}


def prescaled(qkv: torch.Tensor, n_heads: int) -> torch.Tensor:
    return attention_qkv(qkv, n_heads, prescaled=True)


def definition_qkv(qkv: torch.Tensor, n_heads: int, scale: float) -> torch.Tensor:
    """In float64; logits are natural, q k^T times ``scale``."""
    b, t, width = qkv.shape
    q, k, v = qkv.double().reshape(b, t, 3, n_heads, width // (3 * n_heads)).permute(2, 0, 3, 1, 4)
    out = torch.softmax(q @ k.transpose(-2, -1) * scale, dim=-1) @ v
    return out.transpose(1, 2).reshape(b, t, width // 3)


def check_qkv(out: torch.Tensor, qkv: torch.Tensor, n_heads: int, scale: float) -> None:
    """The bound of the contract; logits rounded to 16 bits, as on CPUs, add theirs."""
    assert out.dtype == qkv.dtype
    assert out.shape == (*qkv.shape[:2], qkv.shape[2] // 3)
    wanted = definition_qkv(qkv, n_heads, scale)
    largest = qkv[..., 2 * qkv.shape[2] // 3 :].double().abs().amax()
    assert ((out.double() - wanted).abs() <= 2 * UNIT[qkv.dtype] * largest).all()


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(
    ("b", "t", "n_heads", "head_dim"),
    [(2, 1, 2, 64), (1, 17, 3, 32), (2, 63, 1, 96), (1, 64, 1, 64), (1, 65, 2, 12), (1, 129, 1, 40), (1, 20, 1, 128)],
)
def test_attention_qkv_is_its_definition(
    run: Run, dtype: torch.dtype, b: int, t: int, n_heads: int, head_dim: int
) -> None:
    qkv = torch.randn(b, t, 3 * n_heads * head_dim).to(dtype)
    check_qkv(run(attention_qkv, qkv, n_heads), qkv, n_heads, head_dim**-0.5)
    qkv[..., : n_heads * head_dim] *= query_scale(head_dim)
    check_qkv(run(prescaled, qkv, n_heads), qkv, n_heads, math.log(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_qkv_of_a_whole_image(run: Run, dtype: torch.dtype) -> None:
    qkv = torch.randn(1, 530, 3 * 32).to(dtype)
    qkv[..., :32] *= query_scale(32)
    check_qkv(run(prescaled, qkv, 1), qkv, 1, math.log(2))


@pytest.mark.parametrize("t", [0, 70])
def test_attention_qkv_of_no_images_or_tokens(run: Run, t: int) -> None:
    assert run(attention_qkv, torch.zeros(3 if t == 0 else 0, t, 48).half(), 1).shape == (3 if t == 0 else 0, t, 16)


@pytest.mark.parametrize("dtype", UNIT)
def test_attention_qkv_reads_strided_projections(run: Run, dtype: torch.dtype) -> None:
    wide = torch.randn(2, 33, 200).to(dtype)
    for qkv in (wide[..., 8:104], wide[:, ::2, 1:97], wide[:, :3, 8:104].transpose(0, 1), wide[..., 4:196:2]):
        check_qkv(run(attention_qkv, qkv, 2), qkv, 2, 16**-0.5)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2.0**15), (torch.bfloat16, 2.0**50)])
def test_logits_that_only_a_maximum_tames(run: Run, dtype: torch.dtype, size: float) -> None:
    """e to these logits is far beyond float64; the largest of a row takes all of the weight, or shares it.

    Powers of two, so that sums are exact in any order.
    """
    qkv = torch.randn(1, 70, 96).to(dtype)
    qkv[..., :32] = size
    qkv[..., 32:64] = -1.0
    qkv[0, 11, 32:64] = 1.0
    qkv[0, 66, 32:64] = 1.0
    shared = (qkv[0, 11, 64:].double() + qkv[0, 66, 64:].double()) / 2
    for function in (attention_qkv, prescaled):
        out = run(function, qkv, 1)
        torch.testing.assert_close(out[0].double(), shared.expand(70, 32), rtol=UNIT[dtype] * 2, atol=1e-3)


def test_huge_inputs_do_not_overflow(run: Run) -> None:
    qkv = torch.full((1, 66, 48), 2.0**15).half()
    qkv[..., 32:] = torch.randn(66, 16).half()
    for function in (attention_qkv, prescaled):
        out = run(function, qkv, 1).double()
        torch.testing.assert_close(out, qkv[..., 32:].double().mean(1, keepdim=True).expand_as(out), rtol=0, atol=4e-3)


@pytest.mark.parametrize("dtype", UNIT)
def test_equal_logits_give_the_mean(run: Run, dtype: torch.dtype) -> None:
    qkv = torch.zeros(2, 67, 96)
    qkv[..., 64:] = torch.randn(2, 67, 32)
    qkv = qkv.to(dtype)
    out = run(attention_qkv, qkv, 2).double()
    mean = qkv[..., 64:].double().mean(1, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, mean, rtol=0, atol=2 * UNIT[dtype] * 4)


def test_a_token_that_is_not_finite_reaches_every_output_of_its_image_only(run: Run) -> None:
    qkv = torch.randn(2, 66, 96).half()
    qkv[1, 65, 40] = float("nan")
    out = run(attention_qkv, qkv, 2)
    assert torch.isfinite(out[0]).all()
    assert torch.isnan(out[1, :, :16]).all()
    assert torch.isfinite(out[1, :, 16:]).all()


def test_qkv_agrees_with_attention_on_its_parts(run: Run) -> None:
    qkv = torch.randn(2, 33, 3 * 2 * 24)
    q, k, v = qkv.view(2, 33, 3, 2, 24).permute(2, 0, 3, 1, 4)
    expected = attention(q, k, v).transpose(1, 2).reshape(2, 33, 48)
    torch.testing.assert_close(run(attention_qkv, qkv, 2), expected, rtol=1e-5, atol=1e-5)


def test_wrong_arguments_of_attention_qkv_are_refused() -> None:
    qkv = torch.zeros(1, 4, 48)
    with pytest.raises(TypeError, match=r"qkv: dtype is torch\.int8, wanted one of torch\.float16"):
        attention_qkv(qkv.to(torch.int8), 1)
    with pytest.raises(ValueError, match=r"qkv: shape is \(4, 48\), wanted \[B, T, 3 \* H \* D\]"):
        attention_qkv(qkv[0], 1)
    for n_heads in (0, -1, 5):
        with pytest.raises(ValueError, match=f"n_heads: 48 columns of qkv are not 3 x {n_heads} heads"):
            attention_qkv(qkv, n_heads)


def test_operator_is_well_formed() -> None:
    torch.library.opcheck(_attention_qkv_op, (torch.randn(2, 5, 48), 2, False))
    torch.library.opcheck(_attention_qkv_op, (torch.randn(1, 9, 36).bfloat16(), 1, True))


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native" and not native.available():
        pytest.skip("the C++ kernels can't be built here")
    monkeypatch.setenv("TETRA_BACKEND", backend)
    qkv = torch.randn(2, 9, 48).to(dtype)
    expected = attention_qkv(qkv, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_qkv(qkv, 2)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_it_compiles_whole_and_exports_for_any_batch() -> None:
    class Layer(torch.nn.Module):
        def forward(self, qkv: torch.Tensor) -> torch.Tensor:
            return attention_qkv(qkv, 2, prescaled=True) * 2

    qkv = torch.randn(3, 9, 48)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(qkv), Layer()(qkv))
    program = torch.export.export(Layer(), (qkv,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(qkv[:2]), Layer()(qkv[:2]))


def test_cost_counts_both_products_and_every_tensor_once() -> None:
    operations, n_bytes = cost(2, 530, 12, 64)
    assert operations == 2 * 12 * 530 * 530 * (2 * 2 * 64 + 4)
    assert n_bytes == 2 * (2 * 530 * 3 * 768) + 2 * (2 * 530 * 768)
