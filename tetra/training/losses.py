"""Losses of both stages. Source of the formulas: TeTRA-VPR (arXiv 2503.02511)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetra import kernels
from tetra.errors import TrainingError
from tetra.kernels.attention_distillation import Reduction
from tetra.training import distributed

QueriesKeys = tuple[Tensor, Tensor]

TOKEN_SCALE = 100.0
ATTENTION_SCALE = 50.0
TEMPERATURE = 4.0


def token_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """100 x mean squared error between L2-normalised tokens, [..., C] each -> scalar; no gradient for the teacher."""
    return TOKEN_SCALE * kernels.token_loss(student, teacher)


def attention_loss(
    student: Sequence[QueriesKeys],
    teacher: Sequence[QueriesKeys],
    reduction: Reduction = "elements",
) -> Tensor:
    """KL(teacher || student) of head-averaged attention logits, temperature 4; no gradient for the teacher.

    Mean over all elements, or all rows, of all layers, times 4^2 x 50.

    Args:
        student, teacher: per layer, queries and keys, [B, H, T, E] each; numbers and widths of heads may differ.
        reduction: "elements", as in TeTRA-VPR, or "rows", which is T times as much: a row of T probabilities has
            one divergence, so that its weight does not fall with the size of the images.

    Raises:
        TrainingError: the number of layers, images or tokens differ.
    """
    if len(student) != len(teacher) or not student:
        raise TrainingError(
            f"attention loss: {len(student)} student layers and {len(teacher)} teacher layers; set 'attention_layers' "
            f"to at most {min(len(student), len(teacher))}"
        )
    sizes = [[(q.shape[0], q.shape[2]) for q, _ in side] for side in (student, teacher)]
    if sizes[0] != sizes[1]:
        names = [", ".join(f"{b} x {t}" for b, t in side) for side in sizes]
        raise TrainingError(
            f"attention loss: images x tokens of each layer are {names[0]} for the student and {names[1]} for the "
            "teacher; choose image sizes that give both the same number of patches"
        )
    losses = [
        kernels.attention_distillation(*s, *t, temperature=TEMPERATURE, reduction=reduction)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean() * (TEMPERATURE**2 * ATTENTION_SCALE)


class _StraightThroughSign(torch.autograd.Function):
    """+1 where x > 0, else -1; the gradient passes where |x| <= 1."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0] * (x.abs() <= 1).to(grads[0].dtype)


def sign_descriptor(x: Tensor) -> Tensor:
    """L2-normalised +-1 descriptor, [B, D] -> [B, D]; its bits are those of search (value > 0)."""
    signs: Tensor = _StraightThroughSign.apply(x)
    return signs / x.shape[-1] ** 0.5


def _given_matrices() -> Any:
    """A distance of pytorch-metric-learning for embeddings [B, B] that are the similarities themselves."""
    from pytorch_metric_learning.distances import BaseDistance

    class GivenMatrices(BaseDistance):
        def __init__(self) -> None:
            super().__init__(normalize_embeddings=False, is_inverted=True)

        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            return query_emb

    return GivenMatrices()


def _check_places(labels: Tensor) -> None:
    """TrainingError unless there are two places, and two images of one of them."""
    counts = labels.unique(return_counts=True)[1]
    found = f"multi-similarity loss: places in a batch of {len(labels)} images: {len(counts)}"
    if len(counts) < 2:
        raise TrainingError(f"{found}, wanted 2 or more; raise 'places_per_batch', or add places to 'sources'")
    if int(counts.max()) < 2:
        raise TrainingError(f"{found}, each shown once, wanted 2 images of a place; raise 'images_per_place'")


class BinaryMultiSimilarityLoss(nn.Module):
    """(1 - lambda) L(float) + lambda L(sign), with pairs mined on the float descriptors.

    L is MultiSimilarityLoss(alpha 1, beta 50, base 0) on cosine similarity, the pairs come from
    MultiSimilarityMiner(epsilon 0.1). Source: Wang et al., arXiv 1904.06627.

    Both get matrices of similarities instead of descriptors: that of the floats is computed once, and that of the signs
    by :func:`tetra.kernels.sign_similarity`, without a float copy of them. All in float32 (float64 if the descriptors
    are), also under autocast: beta multiplies what bfloat16 rounds off by 50.

    One of several processes passes its own part of the batch, and gets the loss of the whole: every process gathers
    all descriptors and computes the same; see :func:`tetra.training.distributed.gather` for the gradient.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 50.0, base: float = 0.0, epsilon: float = 0.1) -> None:
        super().__init__()
        from pytorch_metric_learning.losses import MultiSimilarityLoss
        from pytorch_metric_learning.miners import MultiSimilarityMiner

        self.loss = MultiSimilarityLoss(alpha=alpha, beta=beta, base=base, distance=_given_matrices())
        self.miner = MultiSimilarityMiner(epsilon=epsilon, distance=_given_matrices())

    def forward(self, descriptors: Tensor, labels: Tensor, lam: float) -> Tensor:
        """float [B, D], integer labels [B] -> scalar, which is NaN if a descriptor is not finite.

        Raises:
            ValueError: ``lam`` is outside [0, 1].
            TrainingError: the labels of all processes are of one place, or each of a place of its own.
        """
        if not 0.0 <= lam <= 1.0:
            raise ValueError(f"lambda is {lam}, expected 0 <= lambda <= 1")
        labels = distributed.gather(labels)
        _check_places(labels)
        with torch.autocast(descriptors.device.type, enabled=False):
            wide = descriptors if descriptors.dtype == torch.float64 else descriptors.float()
            wide = distributed.gather(wide)
            unit = F.normalize(wide, dim=1)
            cosines = unit @ unit.T
            mined = cosines.detach()
            pairs = self.miner(mined.clone(), labels)  # which it overwrites
            loss = (1.0 - lam) * self.loss(cosines, labels, pairs)
            if lam > 0.0:
                loss = loss + lam * self.loss(kernels.sign_similarity(wide), labels, pairs)
        # The miner drops pairs whose similarity is NaN, and the loss of the others would look like any loss.
        total: Tensor = torch.where(mined.diagonal().isfinite().all(), loss, torch.nan)
        return total
