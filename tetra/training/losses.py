"""Losses of both stages. Source of the formulas: TeTRA-VPR (arXiv 2503.02511)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetra.errors import TrainingError

TOKEN_SCALE = 100.0
ATTENTION_SCALE = 50.0
TEMPERATURE = 4.0


def token_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """100 x mean squared error between L2-normalised tokens, [..., C] each -> scalar."""
    return TOKEN_SCALE * F.mse_loss(F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1))


def attention_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """KL(teacher || student) of head-averaged attention logits, temperature 4.

    Mean over all elements of all layers, times 4^2 x 50.

    Args:
        student, teacher: per layer, logits [B, T, T].

    Raises:
        TrainingError: the number of layers or the token counts differ.
    """
    if len(student) != len(teacher):
        raise TrainingError(
            f"attention loss: maps of {len(student)} student layers and {len(teacher)} teacher layers; lower "
            f"'attention_layers' to {min(len(student), len(teacher))}"
        )
    if any(s.shape != t.shape for s, t in zip(student, teacher, strict=True)):
        shapes = [[tuple(x.shape) for x in side] for side in (student, teacher)]
        raise TrainingError(
            f"attention loss: student maps {shapes[0]} against teacher maps {shapes[1]}; choose image sizes "
            "that give both the same number of patches"
        )
    total = student[0].new_zeros(()).float()
    for s, t in zip(student, teacher, strict=True):
        log_s = F.log_softmax(s.float() / TEMPERATURE, dim=-1)
        log_t = F.log_softmax(t.float() / TEMPERATURE, dim=-1)
        total = total + F.kl_div(log_s, log_t, reduction="none", log_target=True).mean()
    return total / len(student) * TEMPERATURE**2 * ATTENTION_SCALE


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


class BinaryMultiSimilarityLoss(nn.Module):
    """(1 - lambda) L(float) + lambda L(sign), with pairs mined on the float descriptors.

    L is MultiSimilarityLoss(alpha 1, beta 50, base 0) on cosine similarity, the pairs come from
    MultiSimilarityMiner(epsilon 0.1). Source: Wang et al., arXiv 1904.06627.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 50.0, base: float = 0.0, epsilon: float = 0.1) -> None:
        super().__init__()
        from pytorch_metric_learning.distances import CosineSimilarity
        from pytorch_metric_learning.losses import MultiSimilarityLoss
        from pytorch_metric_learning.miners import MultiSimilarityMiner

        self.loss = MultiSimilarityLoss(alpha=alpha, beta=beta, base=base, distance=CosineSimilarity())
        self.miner = MultiSimilarityMiner(epsilon=epsilon, distance=CosineSimilarity())

    def forward(self, descriptors: Tensor, labels: Tensor, lam: float) -> Tensor:
        """float [B, D], integer labels [B] -> scalar."""
        descriptors = descriptors.float()
        pairs = self.miner(descriptors, labels)
        loss = (1.0 - lam) * self.loss(descriptors, labels, pairs)
        if lam > 0.0:
            loss = loss + lam * self.loss(sign_descriptor(descriptors), labels, pairs)
        total: Tensor = loss
        return total
