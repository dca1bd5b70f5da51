"""Losses of both stages against explicit float64 formulas and the library that they build on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tetra.errors import TrainingError
from tetra.kernels import pack_bits
from tetra.training.losses import BinaryMultiSimilarityLoss, attention_loss, sign_descriptor, token_loss
from tetra.training.teachers import mean_head_logits


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 16), (1, 1, 1)])
def test_token_loss(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape) * 40
    s, t = student.double().numpy(), teacher.double().numpy()
    s, t = s / np.linalg.norm(s, axis=-1, keepdims=True), t / np.linalg.norm(t, axis=-1, keepdims=True)
    assert token_loss(student, teacher).item() == pytest.approx(100 * np.mean((s - t) ** 2), rel=1e-5)
    assert token_loss(teacher / 40, teacher).item() == pytest.approx(0.0, abs=1e-10)
    assert token_loss(student.bfloat16(), teacher.half()).dtype == torch.float32


def kl_by_hand(student: list[Tensor], teacher: list[Tensor]) -> float:
    """KL(teacher || student), every element of every layer on its own."""
    terms = []
    for s, t in zip(student, teacher, strict=True):
        for row_s, row_t in zip(s.double().flatten(0, 1), t.double().flatten(0, 1), strict=True):
            p, q = (torch.exp(r / 4) / torch.exp(r / 4).sum() for r in (row_t, row_s))
            terms += [float(a * math.log(a / b)) for a, b in zip(p, q, strict=True)]
    return sum(terms) / len(terms) * 4**2 * 50


@pytest.mark.parametrize("layers", [1, 4])
def test_attention_loss(layers: int) -> None:
    student = [torch.randn(2, 5, 5) * 3 for _ in range(layers)]
    teacher = [torch.randn(2, 5, 5) * 3 for _ in range(layers)]
    assert attention_loss(student, teacher).item() == pytest.approx(kl_by_hand(student, teacher), rel=1e-4)
    assert attention_loss(student, student).item() == pytest.approx(0.0, abs=1e-5)
    # Softmax doesn't see a constant added to a row.
    shifted = [s + torch.randn(2, 5, 1) for s in student]
    assert attention_loss(shifted, teacher).item() == pytest.approx(kl_by_hand(student, teacher), rel=1e-4)


def test_attention_loss_of_queries_and_keys_against_maps_per_head() -> None:
    b, h, t, e = 2, 3, 7, 4
    (q_s, k_s), (q_t, k_t) = ((torch.randn(b, h, t, e), torch.randn(b, h, t, e)) for _ in range(2))
    maps = []
    for q, k in ((q_s, k_s), (q_t, k_t)):
        per_head = torch.einsum("bhie,bhje->bhij", q.double(), k.double()) / math.sqrt(e)
        torch.testing.assert_close(mean_head_logits(q, k).double(), per_head.mean(1), rtol=1e-5, atol=1e-6)
        maps.append([per_head.mean(1)])
    found = attention_loss([mean_head_logits(q_s, k_s)], [mean_head_logits(q_t, k_t)])
    assert found.item() == pytest.approx(kl_by_hand(*maps), rel=1e-4)


def test_mean_head_logits_of_strided_projections() -> None:
    packed = torch.randn(2, 6, 3, 4, 5).permute(2, 0, 3, 1, 4)  # as the backbone cuts them out of one product
    q, k, _ = packed
    expected = (q @ k.transpose(-1, -2) / math.sqrt(5)).mean(1)
    torch.testing.assert_close(mean_head_logits(q, k), expected)


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        ([(1, 5, 5)], [(1, 6, 6)], r"\(1, 5, 5\).*same number of patches"),
        ([(1, 5, 5)] * 3, [(1, 5, 5)] * 2, r"3 student layers and 2 teacher layers; lower 'attention_layers' to 2"),
        ([(1, 5, 5)], [], "lower 'attention_layers' to 0"),
    ],
)
def test_maps_that_do_not_fit_are_refused(
    student: list[tuple[int, ...]], teacher: list[tuple[int, ...]], words: str
) -> None:
    with pytest.raises(TrainingError, match=f"attention loss: .*{words}"):
        attention_loss([torch.zeros(s) for s in student], [torch.zeros(t) for t in teacher])


def test_sign_descriptor_and_its_gradient() -> None:
    x = torch.tensor([[0.5, -0.5, 0.0, 1.0, -1.0, 1.01, -3.0, -0.0]], requires_grad=True)
    y = sign_descriptor(x)
    signs = torch.tensor([[1.0, -1, -1, 1, -1, 1, -1, -1]])
    torch.testing.assert_close(y, signs / math.sqrt(8))
    torch.testing.assert_close(y.norm(), torch.tensor(1.0))
    assert torch.equal(pack_bits(y.detach()), pack_bits(x.detach()))
    upstream = torch.randn(1, 8)
    y.backward(upstream)
    passes = torch.tensor([[1.0, 1, 1, 1, 1, 0, 0, 1]])
    torch.testing.assert_close(x.grad, upstream * passes / math.sqrt(8))


# --- multi-similarity ---

LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])


def multi_similarity(descriptors: Tensor, labels: Tensor, mined_on: Tensor) -> float:
    """The loss and its miner as in the paper, pair by pair, in float64."""

    def cosines(x: Tensor) -> np.ndarray:
        unit = x.detach().double().numpy()
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        return unit @ unit.T

    sim, mining = cosines(descriptors), cosines(mined_on)
    n, total = len(labels), 0.0
    for i in range(n):
        positives = [j for j in range(n) if j != i and labels[j] == labels[i]]
        negatives = [j for j in range(n) if labels[j] != labels[i]]
        if positives and negatives:
            hardest_positive = min(mining[i, j] for j in positives)
            hardest_negative = max(mining[i, j] for j in negatives)
            kept_p = [j for j in positives if mining[i, j] < hardest_negative + 0.1]
            kept_n = [j for j in negatives if mining[i, j] > hardest_positive - 0.1]
        else:
            kept_p, kept_n = [], []
        total += math.log(1 + sum(math.exp(-1 * sim[i, j]) for j in kept_p)) / 1
        total += math.log(1 + sum(math.exp(50 * sim[i, j]) for j in kept_n)) / 50
    return total / n


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_binary_multi_similarity_against_the_paper(lam: float) -> None:
    descriptors = torch.randn(9, 24) + torch.eye(4, 24)[LABELS] * 4
    expected = (1 - lam) * multi_similarity(descriptors, LABELS, descriptors)
    signs = torch.where(descriptors > 0, 1.0, -1.0)
    expected += lam * multi_similarity(signs, LABELS, descriptors)
    found = BinaryMultiSimilarityLoss()(descriptors, LABELS, lam)
    assert found.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_binary_multi_similarity_against_the_library(lam: float) -> None:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import MultiSimilarityLoss
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    loss = MultiSimilarityLoss(alpha=1, beta=50, base=0, distance=CosineSimilarity())
    miner = MultiSimilarityMiner(epsilon=0.1, distance=CosineSimilarity())
    x = torch.randn(9, 24).div(8).requires_grad_()
    y = x.detach().clone().requires_grad_()
    found = BinaryMultiSimilarityLoss()(x, LABELS, lam)
    pairs = miner(y, LABELS)
    signs = y + (torch.where(y > 0, 1.0, -1.0) - y).detach()  # straight through; every |value| is below 1
    expected = (1 - lam) * loss(y, LABELS, pairs) + lam * loss(signs, LABELS, pairs)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    assert x.detach().abs().max() < 1
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6)
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
