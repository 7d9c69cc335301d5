"""MONAI's loss over the outputs of several resolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from voxfuse.integrations.lowering import plain
from voxfuse.integrations.monai._common import FusedLoss
from voxfuse.losses.deep_supervision import SCHEMES, resample_nearest
from voxfuse.losses.module import Loss


class DeepSupervisionLoss(_Loss):
    """``monai.losses.DeepSupervisionLoss``: the weighted sum of one loss over a list of outputs.

    The target is sampled to each output's size (nearest voxel centre), in its own type. See
    :class:`voxfuse.DeepSupervisionLoss` for stacked outputs, masks and normalised weights.

    Args:
        loss: the loss of one output.
        weight_mode: "exp" (1, 1/2, 1/4, ... not below 1/16), "two" (1, 1/2, 1/2, ...) or "same";
            anything else is "same", as in MONAI.
        weights: a weight an output; used where there are enough of them.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import DeepSupervisionLoss, DiceLoss
        >>> loss = DeepSupervisionLoss(DiceLoss(sigmoid=True))
        >>> outputs = [torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)]
        >>> loss(outputs, torch.ones(1, 1, 8, 8))  # 1/3 + 1/2 of 1/3
        tensor(0.5000)
    """

    interp_mode = "nearest-exact"

    def __init__(
        self, loss: _Loss, weight_mode: str = "exp", weights: list[float] | None = None
    ) -> None:
        super().__init__()
        self.loss: Callable[..., Any] = loss
        self.weight_mode = weight_mode
        self.weights = weights

    def get_weights(self, levels: int = 1) -> list[float]:
        """The weights of ``levels`` outputs, finest first."""
        levels = max(1, levels)
        if self.weights is not None and len(self.weights) >= levels:
            return self.weights[:levels]
        scheme = SCHEMES.get(self.weight_mode, SCHEMES["same"])
        return [scheme(level) for level in range(levels)]

    def get_loss(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of one output, the target sampled to its size.

        Raises:
            ValueError: the target has other axes than the output.
        """
        size = input.shape[2:]
        if size != target.shape[2:]:
            if target.ndim != input.ndim:
                raise ValueError(
                    f"target: got shape {tuple(target.shape)}, expected {input.ndim} axes to go "
                    f"with an output of shape {tuple(input.shape)}"
                )
            target = resample_nearest(plain(target), size)
        loss: Tensor = self.loss(input, target)
        return loss

    def forward(self, input: Tensor | Sequence[Tensor] | None, target: Tensor) -> Tensor:
        """Return the weighted sum.

        Args:
            input: a list of outputs B x N x spatial, finest first, or one of them.
            target: B x N x spatial, or labels B x 1 x spatial.
        """
        if input is None:
            raise ValueError("input shouldn't be None.")
        if isinstance(input, Tensor):
            loss: Tensor = self.loss(self._readable(input), target)
            return loss
        total = torch.zeros((), dtype=torch.float32, device=target.device)
        for weight, output in zip(self.get_weights(len(input)), input, strict=False):
            total = total + weight * self.get_loss(self._readable(output), target)
        return total

    def _readable(self, output: Tensor) -> Tensor:
        own = isinstance(self.loss, (FusedLoss, Loss))
        return output if own else output.float()
