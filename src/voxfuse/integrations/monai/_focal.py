"""MONAI's focal loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from voxfuse.contract import Activation, Normaliser, Sum
from voxfuse.integrations.lowering import (
    Voxels,
    fused_loss,
    is_binary,
    plain,
    requires_grad,
    sums,
)
from voxfuse.integrations.monai._common import (
    ClassWeight,
    FusedLoss,
    LossReduction,
    as_index_labels,
    as_predictions,
    as_weight,
    exclusion,
    ignore_mask,
    one_hot,
    reduction_of,
    warn_ignored,
)
from voxfuse.losses.declared import declared
from voxfuse.losses.plan import Likelihood


class FocalCase(NamedTuple):
    """One call: the operators' arguments, and whether they can do it."""

    voxels: Voxels
    #: None where PyTorch has to compute the loss voxel by voxel.
    likelihood: Likelihood | None
    #: Whether each sample is divided by its own number of voxels.
    by_sample: bool
    labels: bool
    first_class: int
    alpha: float | Tensor | None
    class_weight: Tensor | None


@declared
class FocalLoss(FusedLoss):
    r"""``monai.losses.FocalLoss`` in one pass over the voxels.

    .. math::
        loss = \mathrm{mean}_{b,c,v}\; \alpha_c\, g\, (1-p)^\gamma (-\log p)
            \;[\, + (1-\alpha)(1-g)\, p^\gamma (-\log(1-p)) \text{ for a sigmoid}]

    (Lin et al. 2017, arXiv 1708.02002). Arguments, defaults, warnings and errors are MONAI's. A
    float target with one value a class is looked at first: between 0 and 1 MONAI's formula is not
    a sum of the two terms above and PyTorch computes it, as it does for ``reduction="none"``.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import FocalLoss
        >>> FocalLoss(to_onehot_y=True)(torch.zeros(1, 2, 8, 8), torch.ones(1, 1, 8, 8))
        tensor(0.1733)
    """

    include_background: bool = True
    to_onehot_y: bool = False
    gamma: float = 2.0
    alpha: float | Sequence[float] | Tensor | None = None
    weight: ClassWeight = None
    reduction: LossReduction | str = LossReduction.MEAN
    use_softmax: bool = False
    ignore_index: int | None = None

    def set_up(
        self, alpha: float | Sequence[float] | Tensor | None, weight: ClassWeight, **options: Any
    ) -> None:
        options["reduction"] = LossReduction(options["reduction"]).value
        if alpha is not None:
            alpha = float(alpha) if isinstance(alpha, (float, int)) else as_weight(alpha)
        super().set_up(alpha=alpha, weight=weight, **options)
        self.register_buffer("class_weight", as_weight(weight))

    def _forward(self, input: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        return self._evaluate(self._case(input, target, mask))

    def _takes_mask(self) -> bool:
        return self.ignore_index is None and not self.use_softmax

    # The case

    def _case(
        self,
        input: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        labels: bool | None = None,
    ) -> FocalCase:
        """Check and warn as MONAI does; ``labels`` overrides to_onehot_y, without its warning."""
        input, target = as_predictions(input), plain(target)
        channels = input.shape[1]
        if labels is None:
            labels = self.to_onehot_y and channels > 1
            if self.to_onehot_y and not labels:
                warn_ignored("to_onehot_y=True")
        if labels:
            target = as_index_labels(target)
        first_class = 0
        if not self.include_background:
            if channels == 1:
                warn_ignored("include_background=False")
            else:
                first_class = 1
        kept = channels - first_class
        self._check_shapes(input, target, channels if labels else None, first_class)
        alpha = self._checked_alpha(kept)
        class_weight = self._checked_weight(kept)
        reduction = reduction_of(self)

        activation = Activation.softmax if self.use_softmax else Activation.sigmoid
        voxels = Voxels(input, target, mask, activation, blank=None if mask is None else activation)
        by_sample = reduction == "sum" and self.ignore_index is not None
        case = FocalCase(voxels, None, by_sample, labels, first_class, alpha, class_weight)
        fused = (
            reduction != "none"
            and input.ndim > 2
            and 0 <= self.gamma < math.inf
            and not requires_grad(target, self.gamma, alpha, class_weight)
            and not (self.use_softmax and kept == 1)
        )
        if fused and not self.use_softmax and not labels and (self.gamma or alpha is not None):
            fused = is_binary(target)
        if fused and self.ignore_index is not None:
            case, fused = self._with_exclusion(case)
        if fused and self.use_softmax and first_class:
            case = _without_background(case)
        if not fused:
            if mask is not None:
                voxels = Voxels(input * mask, target * mask, None, activation)
                case = case._replace(voxels=voxels)
            return case
        return case._replace(likelihood=self._likelihood(case, kept, reduction))

    def _check_shapes(
        self, input: Tensor, target: Tensor, classes: int | None, first_class: int
    ) -> None:
        shapes = []
        for shape, channels in ((target.shape, classes), (input.shape, None)):
            channels = shape[1] if channels is None else channels
            kept = max(channels - first_class, 0)
            shapes.append(torch.Size((shape[0], kept, *shape[2:])))
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"ground truth has different shape ({shapes[0]}) from input ({shapes[1]})"
            )

    def _checked_alpha(self, classes: int) -> float | Tensor | None:
        alpha: Any = self.alpha
        if isinstance(alpha, Tensor) and alpha.ndim:
            if alpha.shape[0] != classes:
                raise ValueError(
                    f"The length of alpha ({alpha.shape[0]}) must match the number of classes "
                    f"({classes})."
                )
            return alpha
        if alpha is None:
            return None
        if self.use_softmax and not self.include_background and not isinstance(alpha, Tensor):
            warnings.warn(
                "`include_background=False`, scalar `alpha` ignored when using softmax.",
                stacklevel=2,
            )
            return None
        return alpha if requires_grad(alpha) else float(alpha)

    def _checked_weight(self, classes: int) -> Tensor | None:
        weight = self.class_weight
        if weight is None:
            return None
        if weight.ndim:
            if classes == 1:
                raise ValueError(
                    "Per-class class_weight is not supported for single-channel outputs."
                )
            if weight.numel() != classes:
                raise ValueError(
                    f"The number of class_weight ({weight.numel()}) must match the number of "
                    f"output channels ({classes})."
                )
            weight = weight.reshape(-1)
        self._check_nonnegative(weight, "class_weight values must be non-negative.")
        return weight

    def _with_exclusion(self, case: FocalCase) -> tuple[FocalCase, bool]:
        """Leave out the ignored voxels; False where the operators cannot."""
        if self.use_softmax and case.first_class and case.labels:
            # The background's voxels would be needed in the count and not in the loss.
            return case, False
        assert self.ignore_index is not None
        weight, ignore_index, fused = exclusion(case.voxels.target, case.labels, self.ignore_index)
        voxels = case.voxels._replace(weight=weight, ignore_index=ignore_index)
        return case._replace(voxels=voxels), fused

    def _likelihood(self, case: FocalCase, kept: int, reduction: str) -> Likelihood:
        voxels = case.voxels
        input = voxels.input
        channels = input.shape[1]
        softmax = voxels.activation == Activation.softmax
        on_weight, off_weight = self._class_weights(case, channels, input.device)
        on, off = 1.0, 0.0 if softmax else 1.0
        if not softmax and isinstance(case.alpha, float):
            on, off = case.alpha, 1 - case.alpha
        divisor = 1
        if reduction == "sum":
            normaliser, scale, divisor = Normaliser.one, 1.0, math.prod(input.shape[2:])
        elif self.ignore_index is not None:
            normaliser, scale = Normaliser.voxels, 1.0
        elif not softmax:
            normaliser, scale = Normaliser.elements, channels / kept
        elif channels < case.first_class + kept:
            # Without the background's channel: its voxels count, though no class is theirs.
            divisor = input.shape[0] * math.prod(input.shape[2:])
            normaliser, scale = Normaliser.one, 1 / kept
        else:
            normaliser = Normaliser.volume if case.labels else Normaliser.voxels
            scale = 1 / kept
        likelihood = Likelihood(
            voxels.activation,
            on,
            off,
            normaliser,
            self.gamma,
            on_weight=on_weight,
            off_weight=off_weight,
            divisor=max(divisor, 1),
        )
        return likelihood.scaled(scale)

    def _class_weights(
        self, case: FocalCase, channels: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """Weights of all channels for the positives and for the negatives."""
        missing = case.first_class if case.voxels.activation == Activation.sigmoid else 0
        alpha, weight = case.alpha, case.class_weight
        softmax = case.voxels.activation == Activation.softmax
        if softmax and isinstance(alpha, float):
            alpha = as_weight([1 - alpha] + [alpha] * (channels - 1))
        if not missing and weight is None and not isinstance(alpha, Tensor):
            return None, None
        off = torch.ones(channels, dtype=torch.float64, device=device)
        off[:missing] = 0
        if weight is not None:
            off[missing:] *= weight.to(off)
        on = off
        if isinstance(alpha, Tensor):
            on = off.clone()
            on[missing:] *= alpha.to(off)
        return on, off

    # The loss

    def _evaluate(self, case: FocalCase) -> Tensor:
        likelihood = case.likelihood
        if likelihood is None:
            return self._composed(case)
        if not case.by_sample:
            return fused_loss(case.voxels, None, likelihood)
        stats = sums(case.voxels, likelihood)
        one = stats.new_ones(())
        on, off = (one if w is None else w for w in (likelihood.on_weight, likelihood.off_weight))
        total = (
            likelihood.on * on * stats[..., Sum.NLL] + likelihood.off * off * stats[..., Sum.OFF]
        )
        # MONAI divides by the sample's own number of voxels, not by the volume's.
        count = stats[:, 0, Sum.W].detach().clamp(min=torch.finfo(torch.float32).eps)
        loss = (total.sum(1) / count).sum()
        return loss.to(torch.promote_types(case.voxels.input.dtype, torch.float32))

    def _composed(self, case: FocalCase) -> Tensor:
        """Voxel by voxel in PyTorch."""
        input, target = case.voxels.input, case.voxels.target
        if input.dtype in (torch.float16, torch.bfloat16):
            input = input.float()
        mask = ignore_mask(target, self.ignore_index)
        if case.labels:
            if self.ignore_index is not None:
                ignored = target == self.ignore_index
                target = torch.where(ignored, torch.zeros_like(target), target)
            target = one_hot(target, input.shape[1])
        z, g = input[:, case.first_class :], target[:, case.first_class :].to(input.dtype)
        if mask is not None:
            z, g = z * mask, g * mask
        shape = (-1, *[1] * (z.ndim - 2))
        alpha = case.alpha
        if self.use_softmax:
            log_p = z.log_softmax(1)
            loss = -((1 - log_p.exp()) ** self.gamma) * log_p * g
            if isinstance(alpha, float):
                alpha = as_weight([1 - alpha] + [alpha] * (z.shape[1] - 1))
            elif alpha is not None and not alpha.ndim:
                alpha = torch.stack([1 - alpha] + [alpha] * (z.shape[1] - 1))
            if alpha is not None:
                loss = loss * alpha.to(loss).reshape(shape)
        else:
            loss = F.binary_cross_entropy_with_logits(z, g, reduction="none")
            loss = loss * (self.gamma * F.logsigmoid(z * (1 - 2 * g))).exp()
            if isinstance(alpha, float) or (alpha is not None and not alpha.ndim):
                loss = loss * (g * alpha + (1 - g) * (1 - alpha))
            elif alpha is not None:
                loss = loss * torch.where(g == 1, alpha.to(loss).reshape(shape), 1)
        if mask is not None:
            loss = loss * mask
        if case.class_weight is not None:
            weight = case.class_weight.to(loss)
            loss = loss * (weight.reshape(shape) if weight.ndim else weight)
        return self._reduced(loss, mask)

    def _reduced(self, loss: Tensor, mask: Tensor | None) -> Tensor:
        reduction = reduction_of(self)
        if reduction == "none":
            return loss
        if mask is None:
            # Without spatial axes PyTorch's mean over no axis is the mean over all.
            return loss.mean(list(range(2, loss.ndim))).sum() if reduction == "sum" else loss.mean()
        eps = torch.finfo(mask.dtype).eps
        if reduction == "mean":
            return loss.sum() / mask.sum().clamp(min=eps)
        axes = list(range(2, loss.ndim))
        return (loss.sum(axes, keepdim=True) / mask.sum(axes, keepdim=True).clamp(min=eps)).sum()


def _without_background(case: FocalCase) -> FocalCase:
    """The softmax over the foreground's channels: the labels of the background have no class."""
    voxels = case.voxels
    input, target = voxels.input[:, 1:], voxels.target
    if not case.labels:
        return case._replace(voxels=voxels._replace(input=input, target=target[:, 1:]))
    # One volume of labels, counted from the first foreground class.
    # PyTorch does not subtract from bool, nor from unsigned integers of more than one byte.
    narrow = target.dtype in (torch.bool, torch.int8)
    if narrow or (target.dtype == torch.uint8 and input.shape[1] > 255):
        target = target.to(torch.int16)
    elif target.dtype in (torch.uint16, torch.uint32, torch.uint64):
        target = target.to(torch.int64)
    shifted = target - 1
    ignored = 255 if target.dtype == torch.uint8 else -1
    return case._replace(voxels=voxels._replace(input=input, target=shifted, ignore_index=ignored))
