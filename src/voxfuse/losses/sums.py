"""The sums behind a loss, as they are handed out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sums(NamedTuple):
    r"""Soft counts of every sample and class, (B, C) each, float64: what a loss was computed from.

    TP, FP, FN and NLL as :func:`voxfuse.soft_confusion` defines them; OFF, P2, G2 and W where the
    loss needed them, else None. The scores below are of soft counts, so they follow the loss; NaN
    stands for 0/0, a class that is neither in the target nor in the prediction.

    Example:
        >>> import torch, voxfuse
        >>> logits = torch.tensor([[[4.0, -4.0, 0.0], [-4.0, 4.0, 0.0]]])
        >>> loss = voxfuse.DiceCELoss()
        >>> value, sums = loss(logits, torch.tensor([[0, 1, 1]]), return_sums=True)
        >>> sums.dice().round(decimals=3)  # of class 0: 2 / 2.5; of class 1: 3 / 3.5
        tensor([[0.8000, 0.8570]], dtype=torch.float64)
    """

    TP: Tensor
    FP: Tensor
    FN: Tensor
    NLL: Tensor
    OFF: Tensor | None = None
    P2: Tensor | None = None
    G2: Tensor | None = None
    W: Tensor | None = None

    def pooled(self) -> Sums:
        """The sums over all samples, (1, C)."""
        return Sums._make(x if x is None else x.sum(0, keepdim=True) for x in self)

    def tversky(self, alpha: float, beta: float) -> Tensor:
        """TP / (TP + alpha FP + beta FN), (B, C)."""
        return self.TP / (self.TP + alpha * self.FP + beta * self.FN)

    def dice(self) -> Tensor:
        """2 TP / (2 TP + FP + FN), (B, C)."""
        return self.tversky(0.5, 0.5)

    def jaccard(self) -> Tensor:
        """TP / (TP + FP + FN), (B, C)."""
        return self.tversky(1.0, 1.0)

    def precision(self) -> Tensor:
        """TP / (TP + FP), (B, C)."""
        return self.tversky(1.0, 0.0)

    def recall(self) -> Tensor:
        """TP / (TP + FN), (B, C)."""
        return self.tversky(0.0, 1.0)


def sums_of(stats: Tensor) -> Sums:
    """The columns of what ``soft_confusion`` returns, detached."""
    return Sums(*stats.detach().unbind(-1))
