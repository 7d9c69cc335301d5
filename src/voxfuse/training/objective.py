"""The loss of a run: any loss of voxfuse by name, over one output or several depths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from voxfuse import losses
from voxfuse.losses.declared import did_you_mean
from voxfuse.training.config import ConfigError, LossOptions

#: Losses of logits and labels by name.
LOSSES: Mapping[str, Any] = {
    name: getattr(losses, name)
    for name in losses.__all__
    if name.endswith("Loss")
    and not name.startswith("Head")
    and name not in ("SumsLoss", "DeepSupervisionLoss")
}


class Objective(nn.Module):
    """A loss of what a network returns: logits, or several of them, the finest first.

    Several are a list, or a stack (B, outputs, classes, \\*spatial) as MONAI's DynUNet has them.

    Depths are weighed by ``depth_weights``; the labels of a coarser one are those of the rarest
    class that it covers, so that a lesion of one voxel is in all of them.

    Args:
        options: the section ``[loss]``.
        depth_weights: see :class:`voxfuse.DeepSupervisionLoss`.
        ignored: the class whose voxels do not count.

    Raises:
        ConfigError: an unknown loss or option (the message has the nearest one), one that wants
            probabilities: networks give logits; or one that is no number.

    Example:
        >>> import torch
        >>> from voxfuse.training.config import LossOptions
        >>> from voxfuse.training.objective import Objective
        >>> objective = Objective(LossOptions("CrossEntropyLoss"))
        >>> objective(torch.zeros(1, 2, 4, 4, 4), torch.ones(1, 1, 4, 4, 4, dtype=torch.uint8))
        tensor(0.6931)
    """

    def __init__(
        self, options: LossOptions, depth_weights: str = "exp", ignored: int | None = None
    ) -> None:
        super().__init__()
        made = LOSSES.get(options.name)
        if made is None:
            raise ConfigError(
                f"loss.name: got {options.name!r}, expected one of {', '.join(LOSSES)}"
                + did_you_mean(options.name, LOSSES)
            )
        try:
            label = {} if ignored is None else {"ignore_index": ignored}
            self.loss = made(**{**options.options, **label})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"loss.{error}") from None
        if getattr(self.loss, "reduction", None) == "none":
            raise ConfigError("loss.reduction: got 'none', expected mean or sum: one number a step")
        #: What makes probabilities of the logits that it trains: "softmax" or "sigmoid".
        self.activation = getattr(self.loss, "activation", None) or (
            "sigmoid" if options.name in ("BCELoss", "LovaszHingeLoss") else "softmax"
        )
        if self.activation == "none":
            raise ConfigError("loss.activation: got 'none', expected softmax or sigmoid of logits")
        self.deep = losses.DeepSupervisionLoss(self.loss, depth_weights, downsample="max")

    def forward(
        self, outputs: Tensor | Sequence[Tensor], label: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The loss; label and mask (B, 1, \\*spatial)."""
        if isinstance(outputs, Tensor) and outputs.ndim == label.ndim + 1:
            outputs = outputs.unbind(1)
        one = isinstance(outputs, Tensor)
        value: Tensor = (self.loss if one else self.deep)(outputs, label, mask)
        return value
