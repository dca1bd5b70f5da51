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


def queries_keys(layers: int, b: int, t: int, n_heads: int, head_dim: int) -> list[tuple[Tensor, Tensor]]:
    """Of projections as the backbone makes them: views."""
    projections = [(2 * torch.randn(b, t, 3, n_heads, head_dim)).permute(2, 0, 3, 1, 4) for _ in range(layers)]
    return [(projection[0], projection[1]) for projection in projections]


def mean_maps(layers: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Logits of every head, then their mean."""
    return [
        (torch.einsum("bhie,bhje->bhij", q.double(), k.double()) / math.sqrt(q.shape[-1])).mean(1) for q, k in layers
    ]


@pytest.mark.parametrize("layers", [1, 4])
def test_attention_loss(layers: int) -> None:
    student, teacher = queries_keys(layers, 2, 5, 3, 4), queries_keys(layers, 2, 5, 2, 6)
    wanted = kl_by_hand(mean_maps(student), mean_maps(teacher))
    assert attention_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-4)
    assert attention_loss(student, teacher, "rows").item() == pytest.approx(5 * wanted, rel=1e-4)
    assert attention_loss(student, student).item() == pytest.approx(0.0, abs=1e-5)
    # Softmax doesn't see a constant added to a row, which is what moving all keys does.
    shifted = [(q, k + torch.randn(2, 3, 1, 4)) for q, k in student]
    assert attention_loss(shifted, teacher).item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        ([(1, 5)], [(1, 6)], r"1 x 5 for the student and 1 x 6 for the teacher.*same number of patches"),
        ([(2, 5)], [(1, 5)], r"2 x 5 for the student and 1 x 5 for the teacher.*same number of patches"),
        ([(1, 5)] * 3, [(1, 5)] * 2, "3 student layers and 2 teacher layers; set 'attention_layers' to at most 2"),
        ([(1, 5)], [], "1 student layers and 0 teacher layers; set 'attention_layers' to at most 0"),
        ([], [], "0 student layers and 0 teacher layers"),
    ],
)
def test_attention_that_does_not_fit_is_refused(
    student: list[tuple[int, int]], teacher: list[tuple[int, int]], words: str
) -> None:
    sides = [[queries_keys(1, b, t, 2, 4)[0] for b, t in side] for side in (student, teacher)]
    with pytest.raises(TrainingError, match=f"attention loss: .*{words}"):
        attention_loss(*sides)


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
