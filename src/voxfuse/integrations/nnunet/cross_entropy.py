"""nnU-Net's cross-entropies of labels."""

from __future__ import annotations

import numbers

from torch import Tensor, nn

from voxfuse.contract import Activation, Normaliser
from voxfuse.integrations.lowering import (
    Voxels,
    fused_loss,
    ignored,
    plain,
    smoothed_cross_entropy,
    whole_labels,
    with_peers_errors,
)
from voxfuse.losses.functional import cross_entropy_loss
from voxfuse.losses.plan import Likelihood


class RobustCrossEntropyLoss(nn.CrossEntropyLoss):
    """nnU-Net's RobustCrossEntropyLoss: labels of any dtype, with or without a channel axis.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.nnunet import RobustCrossEntropyLoss
        >>> RobustCrossEntropyLoss()(torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 8, 8))
        tensor(1.3863)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of logits (b, c, x, y(, z)) and labels (b, [1,] x, y(, z))."""
        if target.ndim == input.ndim:
            assert target.shape[1] == 1
            target = target[:, 0]
        input, target = plain(input), plain(target)
        likelihood = self._likelihood(input)
        if likelihood is None or target.shape != input.shape[:1] + input.shape[2:]:
            result: Tensor = super().forward(input, whole_labels(target))
            return result
        voxels = Voxels(
            input, target, activation=Activation.softmax, ignore_index=self.ignore_index
        )
        if self.reduction == "none":
            return self._map(voxels)
        return fused_loss(voxels, None, likelihood)

    @with_peers_errors
    def _map(self, voxels: Voxels) -> Tensor:
        """The loss of every voxel."""
        return cross_entropy_loss(
            voxels.input,
            voxels.target,
            class_weight=self.weight,
            label_smoothing=max(self.label_smoothing, 0.0),
            reduction="none",
            ignore_index=ignored(voxels),
        )

    def _likelihood(self, input: Tensor) -> Likelihood | None:
        """The loss for the operators; None where PyTorch has to compute it."""
        classes = input.shape[1]
        weight = self.weight
        if input.ndim < 3 or classes == 1 or not input.is_floating_point():
            return None
        if weight is not None and tuple(weight.shape) != (classes,):
            return None
        smoothing = max(self.label_smoothing, 0.0)  # PyTorch takes a negative one for none
        if smoothing > 1 or self.reduction not in ("none", "mean", "sum"):
            return None
        if type(self.ignore_index) is bool or not isinstance(self.ignore_index, numbers.Integral):
            return None
        normaliser = Normaliser.target if self.reduction == "mean" else Normaliser.one
        return smoothed_cross_entropy(smoothing, classes, normaliser, weight)


class TopKLoss(RobustCrossEntropyLoss):
    """nnU-Net's TopKLoss: the mean cross-entropy of the worst ``k`` percent of the voxels.

    Keeps one single-channel volume, of the voxels' losses.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.nnunet import TopKLoss
        >>> TopKLoss(k=50)(torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 8, 8))
        tensor(1.3863)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        k: float = 10,
        label_smoothing: float = 0,
    ) -> None:
        self.k = k
        super().__init__(weight, False, ignore_index, reduce=False, label_smoothing=label_smoothing)

    def forward(self, inp: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (b, c, x, y(, z)) and labels (b, 1, x, y(, z))."""
        check_labels(inp, target)
        losses = super().forward(inp, target[:, 0]).reshape(-1)
        return losses.topk(int(losses.numel() * self.k / 100), sorted=False).values.mean()


def check_labels(input: Tensor, target: Tensor) -> None:
    """nnU-Net takes the first channel for labels, whatever the others hold."""
    if target.ndim != input.ndim or target.shape[1] != 1:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected labels "
            f"{(input.shape[0], 1, *input.shape[2:])} to go with input of shape "
            f"{tuple(input.shape)}"
        )
