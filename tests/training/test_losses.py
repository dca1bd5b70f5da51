"""Losses of both stages against explicit float64 formulas and the library that they build on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

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


def by_autograd(x: Tensor, labels: Tensor, lam: float) -> Tensor:
    """The same in float64, for gradients: all pairs at once."""
    same = labels[:, None] == labels
    kinds = {1.0: same & ~torch.eye(len(x), dtype=torch.bool), -50.0: ~same}
    unit = F.normalize(x, dim=1)
    cosines = unit @ unit.T
    hardest_positive = cosines.masked_fill(~kinds[1.0], math.inf).amin(1, keepdim=True)
    hardest_negative = cosines.masked_fill(~kinds[-50.0], -math.inf).amax(1, keepdim=True)
    kept = {1.0: cosines < hardest_negative + 0.1, -50.0: cosines > hardest_positive - 0.1}
    within = x.clamp(-1, 1)
    signs = within + (torch.where(x > 0, 1.0, -1.0) - within).detach()
    unit = signs / signs.norm(dim=1, keepdim=True)
    total = torch.zeros((), dtype=x.dtype)
    for similarity, weight in ((cosines, 1 - lam), (unit @ unit.T, lam)):
        for scale, kind in kinds.items():
            terms = torch.exp(-scale * similarity) * (kind & kept[scale])
            total = total + weight * (1 + terms.sum(1)).log().div(abs(scale)).mean()
    return total


def some_descriptors(dtype: torch.dtype = torch.float32) -> Tensor:
    """Of the places of LABELS, alike within one; a third of the values beyond 1."""
    x = torch.randn(9, 27) + torch.randn(4, 27)[LABELS] / 4
    assert 0.2 < (x.abs() > 1).float().mean() < 0.4
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_binary_multi_similarity_and_its_gradient_against_the_formulas(lam: float) -> None:
    x = some_descriptors(torch.float64)
    found, wanted = BinaryMultiSimilarityLoss()(x, LABELS, lam), by_autograd(x, LABELS, lam)
    assert wanted.item() == pytest.approx(
        (1 - lam) * multi_similarity(x, LABELS, x)
        + lam * multi_similarity(torch.where(x > 0, 1.0, -1.0), LABELS, mined_on=x)
    )
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    gradient, wanted_gradient = (torch.autograd.grad(loss, x)[0] for loss in (found, wanted))
    torch.testing.assert_close(gradient, wanted_gradient, rtol=0, atol=1e-12)
    assert gradient.abs().max() > 1e-3
    for dtype in (torch.float32, torch.bfloat16):
        y = x.detach().to(dtype).requires_grad_()
        exact = y.detach().double().requires_grad_()  # the same values, rounded
        found, wanted = BinaryMultiSimilarityLoss()(y, LABELS, lam), by_autograd(exact, LABELS, lam)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        gradient, wanted_gradient = torch.autograd.grad(found, y)[0], torch.autograd.grad(wanted, exact)[0]
        assert (gradient - wanted_gradient).norm() <= (
            1e-5 if dtype == torch.float32 else 1e-2
        ) * wanted_gradient.norm()


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_binary_multi_similarity_against_the_library(lam: float) -> None:
    """On descriptors, where ours gives it similarities."""
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import MultiSimilarityLoss
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    loss = MultiSimilarityLoss(alpha=1, beta=50, base=0, distance=CosineSimilarity())
    miner = MultiSimilarityMiner(epsilon=0.1, distance=CosineSimilarity())
    x = some_descriptors()
    y = x.detach().clone().requires_grad_()
    found = BinaryMultiSimilarityLoss()(x, LABELS, lam)
    pairs = miner(y, LABELS)
    expected = (1 - lam) * loss(y, LABELS, pairs) + lam * loss(sign_descriptor(y), LABELS, pairs)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6)
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_autocast_does_not_round_similarities() -> None:
    x, criterion = some_descriptors(), BinaryMultiSimilarityLoss()
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion(x, LABELS, 0.5)
    assert found.item() == criterion(x, LABELS, 0.5).item()


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_descriptor_that_is_not_finite_shows_in_the_loss(bad: float, lam: float) -> None:
    x = some_descriptors().detach()
    x[4, 3] = bad
    assert math.isnan(BinaryMultiSimilarityLoss()(x.requires_grad_(), LABELS, lam).item())


def test_the_sign_loss_saves_two_bits_a_value() -> None:
    """Beside matrices [B, B]: no signs as floats, and no second copy of the descriptors."""
    x = torch.randn(9, 4000, requires_grad=True)

    def saved_bytes(lam: float) -> int:
        found: dict[int, int] = {}

        def pack(saved: Tensor) -> Tensor:
            found[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            kept = BinaryMultiSimilarityLoss()(x, LABELS, lam)
        assert kept.requires_grad
        return sum(found.values())

    extra = saved_bytes(0.5) - saved_bytes(0.0)
    assert 2 * 9 * 500 <= extra <= 2 * 9 * 500 + 20 * 4 * 9 * 9


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([7] * 4, "places in a batch of 4 images: 1, wanted 2 or more; raise 'places_per_batch'"),
        ([1, 2, 3], "places in a batch of 3 images: 3, each shown once, wanted 2 .*; raise 'images_per_place'"),
        ([1], "places in a batch of 1 images: 1, wanted 2 or more"),
        ([], "places in a batch of 0 images: 0, wanted 2 or more"),
    ],
)
def test_batches_that_teach_nothing_are_refused(labels: list[int], words: str) -> None:
    with pytest.raises(TrainingError, match=f"multi-similarity loss: {words}"):
        BinaryMultiSimilarityLoss()(torch.randn(len(labels), 8), torch.tensor(labels), 0.5)


@pytest.mark.parametrize("lam", [-0.1, 1.5, math.nan])
def test_lambdas_that_can_not_be(lam: float) -> None:
    with pytest.raises(ValueError, match=f"lambda is {lam}, expected 0 <= lambda <= 1"):
        BinaryMultiSimilarityLoss()(torch.randn(len(LABELS), 8), LABELS, lam)
