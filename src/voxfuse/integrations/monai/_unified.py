"""MONAI's asymmetric unified focal loss."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from voxfuse.contract import Activation, Normaliser
from voxfuse.integrations.lowering import Voxels, fused_loss, plain, ratio_of, requires_grad
from voxfuse.integrations.monai._common import (
    FusedLoss,
    LossReduction,
    as_index_labels,
    as_predictions,
    exclusion,
    ignore_mask,
    one_hot,
    reduction_of,
    refuse_others,
    warn_ignored,
)
from voxfuse.losses.declared import declared
from voxfuse.losses.plan import Likelihood

#: Distance that probabilities keep from 0 and 1, and both smoothing terms.
EPSILON = 1e-7


@declared
class AsymmetricUnifiedFocalLoss(FusedLoss):
    r"""``monai.losses.AsymmetricUnifiedFocalLoss``: both terms from one pass over the voxels.

    .. math::
        loss = \frac{w}{2}\, \mathrm{mean}_v\; [\delta\, g_1 (-\log p_1)
            + (1 - \delta)\, g_0 (1-p_0)^\gamma (-\log p_0)]
            + \frac{1-w}{2}\, \mathrm{mean}_b\; [(1 - TI_0) + (1 - TI_1)^{1-\gamma}]

    with TI weighing false negatives by delta and false positives by 1 - delta (Yeung et al. 2022,
    arXiv 2102.04525). The input are probabilities, of which a copy is clamped to [1e-7, 1 - 1e-7].
    One channel is the foreground's. Arguments, defaults, warnings and errors are MONAI's,
    ``reduction`` among them, of which nothing depends: both terms are means.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import AsymmetricUnifiedFocalLoss
        >>> loss = AsymmetricUnifiedFocalLoss(to_onehot_y=True)
        >>> loss(torch.full((1, 2, 8, 8), 0.5), torch.ones(1, 1, 8, 8))
        tensor(0.5317)
    """

    to_onehot_y: bool = False
    num_classes: int = 2
    weight: float = 0.5
    gamma: float = 0.5
    delta: float = 0.7
    reduction: LossReduction | str = LossReduction.MEAN
    ignore_index: int | None = None

    def set_up(self, reduction: LossReduction | str, **options: Any) -> None:
        super().set_up(reduction=LossReduction(reduction).value, **options)

    # MONAI's names of the arguments.
    def forward(  # type: ignore[override]
        self, y_pred: Tensor, y_true: Tensor, **others: Any
    ) -> Tensor:
        """Return the loss.

        Args:
            y_pred: probabilities B x 2 x spatial, or B x 1 x spatial; two or three spatial axes.
            y_true: one value a channel, or labels B x 1 x spatial with ``to_onehot_y``.
        """
        refuse_others(self, others)
        if y_pred.ndim not in (4, 5):
            raise ValueError(f"input shape must be 4 or 5, but got {y_pred.shape}")
        reduction_of(self)
        single = y_pred.shape[1] == 1
        if single and self.to_onehot_y:
            warn_ignored("to_onehot_y=True")
        if single and self.ignore_index is not None:
            warnings.warn(
                "single channel prediction, `ignore_index` is applied to label-encoded targets.",
                stacklevel=2,
            )
        labels = self.to_onehot_y and not single
        p, given = as_predictions(y_pred), plain(y_true)
        if not labels and not (single and given.shape[1] == 1):
            _check_shapes(given.shape, p.shape)
        if p.dtype in (torch.float16, torch.bfloat16):
            p = p.float()
        p = _both_classes(p) if single else p
        target = as_index_labels(given) if labels else given
        if single and given.shape[1] == 1:
            target = _both_classes(given if given.is_floating_point() else given.to(p.dtype))
        if self.ignore_index is None:
            self._check_largest(target, labels)
        classes = (self.num_classes,) if labels else target.shape[1:2]
        _check_shapes(torch.Size((target.shape[0], *classes, *target.shape[2:])), p.shape)
        voxels = self._voxels(p, target, given if single else target, labels)
        if voxels is None:
            return self._composed(p, target, given, labels)
        likelihood = Likelihood(
            Activation.none,
            self.weight,
            0.0,
            Normaliser.one,
            self.gamma,
            focal_classes=1,
            on_weight=torch.tensor([1 - self.delta, self.delta], dtype=torch.float64),
            divisor=max(p.numel(), 1),
        )
        ratio = ratio_of(
            (1.0,),
            (1.0, 1 - self.delta, self.delta),
            EPSILON,
            EPSILON,
            exponent=1 - self.gamma,
            exponent_from=1,
        )
        return fused_loss(voxels, ratio._replace(ratio_scale=1 - self.weight), likelihood)

    def _check_largest(self, target: Tensor, labels: bool) -> None:
        """Raise for a target above the last class; looks at it, which may synchronise."""
        if torch.compiler.is_compiling():
            return
        if target.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if target.dtype in (torch.uint16, torch.uint32, torch.uint64):
            target = target.to(torch.int64)  # PyTorch has no maximum of these
        largest = 1 if labels or target.dtype == torch.bool else target.max()
        if bool(largest > self.num_classes - 1):
            raise ValueError(
                f"Invalid class index found. Maximum class should be {self.num_classes - 1}"
            )

    def _voxels(self, p: Tensor, target: Tensor, given: Tensor, labels: bool) -> Voxels | None:
        """What the operators read; None where they cannot."""
        if p.shape[1] != 2 or not 0 <= self.gamma < 1:
            return None
        if requires_grad(target, self.weight, self.gamma, self.delta):
            return None
        weight, ignore_index, fused = None, None, True
        if self.ignore_index is not None and given.shape[1] == 1 and not labels:
            weight = given != self.ignore_index
        elif self.ignore_index is not None:
            weight, ignore_index, fused = exclusion(given, labels, self.ignore_index)
        if not fused:
            return None
        p = p.clamp(EPSILON, 1 - EPSILON)
        return Voxels(p, target, weight, Activation.none, ignore_index=ignore_index)

    def _composed(self, p: Tensor, target: Tensor, given: Tensor, labels: bool) -> Tensor:
        """The first two of any number of channels, by PyTorch."""
        mask = ignore_mask(given, self.ignore_index)
        if labels:
            if self.ignore_index is not None:
                target = torch.where(target == self.ignore_index, 0, target)
            target = one_hot(target, self.num_classes)
        g = target[:, :2].to(p.dtype)
        p = p[:, :2]
        if mask is not None:
            p, g = p * mask, g * mask
        p = p.clamp(EPSILON, 1 - EPSILON)
        axes = list(range(2, p.ndim))
        tp, fp, fn = (x.sum(axes) for x in (p * g, p * (1 - g), (1 - p) * g))
        size = tp + (1 - self.delta) * fp + self.delta * fn
        missed = 1 - (tp + EPSILON) / (size + EPSILON)
        overlap = (missed[:, 0] + missed[:, 1] ** (1 - self.gamma)).mean() / 2
        background, foreground = (-g * p.log()).unbind(1)
        background = (1 - self.delta) * (1 - p[:, 0]) ** self.gamma * background
        likelihood = (background + self.delta * foreground).mean() / 2
        result: Tensor = self.weight * likelihood + (1 - self.weight) * overlap
        return result


def _both_classes(foreground: Tensor) -> Tensor:
    return torch.cat([1 - foreground, foreground], 1)


def _check_shapes(actual: torch.Size, predicted: torch.Size) -> None:
    if actual != predicted:
        raise ValueError(f"ground truth has different shape ({actual}) from input ({predicted})")
