from __future__ import annotations

import math

import pytest
import torch

from tetra.kernels import attention
from tetra.kernels.attention import attention_reference, force_formulation


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
    with pytest.raises(TypeError, match="differ"):
        attention(q, q.double(), q)
