"""A loss over the outputs of several resolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from voxfuse.ops import _checks

_SCHEMES: dict[str, Callable[[int], float]] = {
    "same": lambda level: 1.0,
    "exp": lambda level: max(0.5**level, 0.0625),
    "two": lambda level: 1.0 if level == 0 else 0.5,
}


def resample_nearest(tensor: Tensor, size: Sequence[int]) -> Tensor:
    """Sample the trailing axes of ``tensor`` at the nearest of its own voxel centres.

    The values keep their type: labels are never turned into floats. Equals
    ``torch.nn.functional.interpolate(mode="nearest-exact")``.
    """
    for axis, length in zip(range(-len(size), 0), size, strict=True):
        own = tensor.shape[axis]
        if own != length:
            centres = torch.arange(length, device=tensor.device) * 2 + 1
            index = torch.div(centres * own, 2 * length, rounding_mode="floor")
            tensor = tensor.index_select(axis, index)
    return tensor


class DeepSupervisionLoss(nn.Module):
    r"""Weighted sum of one loss over the outputs of a deeply supervised network.

    .. math:: loss = \sum_i w_i\; L(output_i, target_i)

    The target is given once, at any resolution, and sampled down to each output (nearest voxel
    centre, in its own type; no logits are resampled), or as one target an output, as nnU-Net does.
    The defaults equal ``monai.losses.DeepSupervisionLoss``; ``weights=[1, 1/2, 1/4, ..., 0]`` with
    ``normalize`` are nnU-Net's. Ranks and the backend are options of the loss inside
    (``process_group``, ``ddp_average``, ``backend``) and hold at every output.

    Args:
        loss: any loss of this package, or another callable of (input, target[, weight]).
        weights: "exp" (1, 1/2, 1/4, ... not below 1/16), "same", "two" (1, 1/2, 1/2, ...), the
            three of ``monai.losses.DeepSupervisionLoss``; or a number for every output (an output
            of weight 0 is not looked at).
        normalize: divide the weights by their sum, as nnU-Net does.

    Example:
        >>> import torch, voxfuse
        >>> loss = voxfuse.DeepSupervisionLoss(voxfuse.CrossEntropyLoss())
        >>> outputs = [torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 2, 4, 4, 4)]
        >>> loss(outputs, torch.ones(1, 1, 8, 8, 8, dtype=torch.uint8))  # 1.5 log 2
        tensor(1.0397)
    """

    def __init__(
        self,
        loss: nn.Module | Callable[..., Tensor],
        weights: str | Sequence[float] = "exp",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"loss: got {type(loss).__name__}, expected a loss to call")
        if isinstance(weights, str):
            _checks.choice("weights", weights, dict.fromkeys(_SCHEMES, 0))
        self.loss = loss
        self.weights = weights if isinstance(weights, str) else [float(x) for x in weights]
        self.normalize = normalize

    def level_weights(self, levels: int) -> list[float]:
        """The weights of ``levels`` outputs, finest first."""
        if isinstance(self.weights, str):
            weights = [_SCHEMES[self.weights](level) for level in range(levels)]
        else:
            weights = list(self.weights[:levels])
            if len(weights) < levels:
                raise ValueError(f"weights: got {len(weights)} numbers for {levels} outputs")
        total = sum(weights) if self.normalize else 1.0
        return [weight / total for weight in weights]

    def forward(
        self,
        input: Tensor | Sequence[Tensor],
        target: Tensor | Sequence[Tensor],
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted sum; ``weight`` (voxel weights) is sampled like the target."""
        outputs = [input] if isinstance(input, Tensor) else list(input)
        if not outputs:
            raise ValueError("input: got no output at all")
        if not isinstance(target, Tensor) and len(target) < len(outputs):
            raise ValueError(f"target: got {len(target)} targets for {len(outputs)} outputs")
        total: Tensor | None = None
        for level, factor in enumerate(self.level_weights(len(outputs))):
            if factor == 0:
                continue
            size = outputs[level].shape[2:]
            own = target if isinstance(target, Tensor) else target[level]
            arguments = [outputs[level], resample_nearest(own, size)]
            if weight is not None:
                arguments.append(resample_nearest(weight, size))
            term = factor * self.loss(*arguments)
            total = term if total is None else total + term
        if total is None:
            raise ValueError("weights: every output has weight 0")
        return total

    def extra_repr(self) -> str:
        return f"weights={self.weights!r}, normalize={self.normalize}"
