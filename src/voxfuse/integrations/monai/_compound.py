"""MONAI's sums of a Dice loss and a cross-entropy or focal loss, both from one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from voxfuse.contract import Activation, Normaliser
from voxfuse.integrations.lowering import (
    Voxels,
    fused_loss,
    plain,
    requires_grad,
    smoothed_cross_entropy,
    whole_labels,
)
from voxfuse.integrations.monai._common import (
    ClassWeight,
    CustomActivation,
    DiceCEReduction,
    FusedLoss,
    LossReduction,
    Weight,
    as_index_labels,
    check_pair,
    look_up,
    warn_ignored,
)
from voxfuse.integrations.monai._focal import FocalCase, FocalLoss
from voxfuse.integrations.monai._overlap import Case, DiceLoss, GeneralizedDiceLoss, OverlapLoss
from voxfuse.losses.declared import declared
from voxfuse.losses.plan import Likelihood


def _checked(factors: dict[str, float]) -> dict[str, float]:
    for name, value in factors.items():
        if value < 0.0:
            raise ValueError(f"{name} should be no less than 0.0.")
    return factors


@declared
class DiceCELoss(FusedLoss):
    r"""``monai.losses.DiceCELoss``: Dice and cross-entropy from one pass over the voxels.

    ``lambda_dice`` x :class:`DiceLoss` + ``lambda_ce`` x a softmax cross-entropy, or a binary one
    for a single channel. Arguments, defaults, warnings, errors and state_dict are MONAI's.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import DiceCELoss
        >>> loss = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 1, 8, 8))  # 1/3 + log 2
        tensor(1.0265)
    """

    include_background: bool = True
    to_onehot_y: bool = False
    sigmoid: bool = False
    softmax: bool = False
    other_act: CustomActivation | None = None
    squared_pred: bool = False
    jaccard: bool = False
    reduction: str = "mean"
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    batch: bool = False
    weight: Tensor | None = None
    lambda_dice: float = 1.0
    lambda_ce: float = 1.0
    label_smoothing: float = 0.0

    def set_up(
        self, weight: Tensor | None, label_smoothing: float, reduction: str, **options: Any
    ) -> None:
        reduction = look_up(reduction, DiceCEReduction).value
        factors = {name: options.pop(name) for name in ("lambda_dice", "lambda_ce")}
        dice_weight = weight
        if weight is not None and not options["include_background"]:
            dice_weight = weight[1:]
        self.reduction = "mean"
        self.dice = DiceLoss(reduction=reduction, weight=dice_weight, **options)
        self.cross_entropy = nn.CrossEntropyLoss(
            weight=weight, reduction=reduction, label_smoothing=label_smoothing
        )
        self.binary_cross_entropy = nn.BCEWithLogitsLoss(pos_weight=weight, reduction=reduction)
        super().set_up(**_checked(factors))

    def _takes_mask(self) -> bool:
        return self.dice._takes_mask()

    def _forward(self, input: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        check_pair(input, target)
        case = self.dice._case(input, target, mask)
        entropy = self._likelihood(input, target)
        learnt = requires_grad(self.lambda_dice, self.lambda_ce)
        if case.fused and entropy is not None and self.dice.other_act is None and not learnt:
            return self.dice._evaluate(case, entropy.scaled(self.lambda_ce), self.lambda_dice)
        if mask is not None:
            input, target = input * mask, target * mask
        dice = self.dice._evaluate(case)
        return self.lambda_dice * dice + self.lambda_ce * self._entropy(input, target)

    def _likelihood(self, input: Tensor, target: Tensor) -> Likelihood | None:
        """The cross-entropy for the operators; None where PyTorch has to compute it."""
        if input.ndim < 3 or target.requires_grad or not input.is_floating_point():
            return None
        if input.shape[1] == 1:
            binary = self.binary_cross_entropy
            weight = binary.pos_weight
            usual = type(binary) is nn.BCEWithLogitsLoss and binary.weight is None
            if not usual or (weight is not None and weight.numel() != 1):
                return None
            weight = None if weight is None else weight.reshape(1)
            normaliser = Normaliser.elements if binary.reduction == "mean" else Normaliser.one
            return Likelihood(Activation.sigmoid, 1.0, 1.0, normaliser, on_weight=weight)
        entropy = self.cross_entropy
        weight, classes = entropy.weight, input.shape[1]
        smoothing = max(entropy.label_smoothing, 0.0)  # PyTorch takes a negative one for none
        usual = type(entropy) is nn.CrossEntropyLoss and entropy.ignore_index == -100
        usual = usual and smoothing <= 1
        if not usual or (weight is not None and tuple(weight.shape) != (classes,)):
            return None
        by_voxel = Normaliser.target if target.shape[1] == 1 else Normaliser.voxels
        normaliser = by_voxel if entropy.reduction == "mean" else Normaliser.one
        return smoothed_cross_entropy(smoothing, classes, normaliser, weight)

    def _entropy(self, input: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy alone."""
        input, target = plain(input), plain(target)
        likelihood = self._likelihood(input, target)
        if likelihood is not None:
            return fused_loss(
                Voxels(input, target, activation=likelihood.activation), None, likelihood
            )
        if input.shape[1] == 1 or target.shape[1] == input.shape[1]:
            target = target if target.is_floating_point() else target.to(input.dtype)
            binary = input.shape[1] == 1
            module = self.binary_cross_entropy if binary else self.cross_entropy
            result: Tensor = module(input, target)
        else:
            result = self.cross_entropy(input, whole_labels(target.squeeze(1)))
        return result


class _OverlapFocalLoss(FusedLoss):
    """An overlap loss plus a focal loss, in one pass where both have the same voxels."""

    focal: FocalLoss

    def _sum(
        self, overlap: OverlapLoss, case: Case, focal: FocalCase, factors: tuple[float, float]
    ) -> Tensor:
        likelihood = focal.likelihood
        together = not focal.by_sample and not requires_grad(*factors)
        if likelihood is not None and together and _shared(overlap, case, focal):
            return overlap._evaluate(case, likelihood.scaled(factors[1]), factors[0])
        return factors[0] * overlap._evaluate(case) + factors[1] * self.focal._evaluate(focal)


def _shared(overlap: OverlapLoss, case: Case, focal: FocalCase) -> bool:
    return (
        case.fused
        and overlap.reduction != "none"
        and overlap.other_act is None
        and case.labels == focal.labels
        and case.voxels.ignore_index == focal.voxels.ignore_index
        and case.voxels.weight is focal.voxels.weight
        and case.voxels.input.shape == focal.voxels.input.shape
    )


@declared
class DiceFocalLoss(_OverlapFocalLoss):
    r"""``monai.losses.DiceFocalLoss``: Dice and focal loss from one pass over the voxels.

    ``lambda_dice`` x :class:`DiceLoss` + ``lambda_focal`` x :class:`FocalLoss`, whose probabilities
    are always a sigmoid's. Arguments, defaults, warnings, errors and state_dict are MONAI's.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import DiceFocalLoss
        >>> loss = DiceFocalLoss(softmax=True, to_onehot_y=True, include_background=False)
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 1, 8, 8))  # 1/3 + log(2) / 4
        tensor(0.5066)
    """

    include_background: bool = True
    to_onehot_y: bool = False
    sigmoid: bool = False
    softmax: bool = False
    other_act: CustomActivation | None = None
    squared_pred: bool = False
    jaccard: bool = False
    reduction: str = "mean"
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    batch: bool = False
    gamma: float = 2.0
    weight: ClassWeight = None
    lambda_dice: float = 1.0
    lambda_focal: float = 1.0
    alpha: float | None = None

    def set_up(self, to_onehot_y: bool, gamma: float, alpha: float | None, **options: Any) -> None:
        factors = {name: options.pop(name) for name in ("lambda_dice", "lambda_focal")}
        self.reduction = "mean"
        self.dice = DiceLoss(to_onehot_y=False, **options)
        self.focal = FocalLoss(
            include_background=options["include_background"],
            to_onehot_y=False,
            gamma=gamma,
            weight=options["weight"],
            alpha=alpha,
            reduction=options["reduction"],
        )
        super().set_up(to_onehot_y=to_onehot_y, **_checked(factors))

    def _takes_mask(self) -> bool:
        return self.dice._takes_mask() and self.focal._takes_mask()

    def _forward(self, input: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        check_pair(input, target)
        labels = self.to_onehot_y and input.shape[1] > 1
        if self.to_onehot_y and not labels:
            warn_ignored("to_onehot_y=True")
        if labels:
            as_index_labels(target)
        case = self.dice._case(input, target, mask, labels=labels)
        self.dice._weights(case.counted)  # MONAI's Dice loss complains first
        focal = self.focal._case(input, target, mask, labels=labels)
        return self._sum(self.dice, case, focal, (self.lambda_dice, self.lambda_focal))


@declared
class GeneralizedDiceFocalLoss(_OverlapFocalLoss):
    r"""``monai.losses.GeneralizedDiceFocalLoss`` from one pass over the voxels.

    ``lambda_gdl`` x :class:`GeneralizedDiceLoss` + ``lambda_focal`` x :class:`FocalLoss`, whose
    probabilities are always a sigmoid's. Arguments, defaults, warnings, errors and state_dict are
    MONAI's.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import GeneralizedDiceFocalLoss
        >>> loss = GeneralizedDiceFocalLoss(softmax=True, to_onehot_y=True, w_type="uniform")
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 1, 8, 8))  # 1/2 + log(2) / 4
        tensor(0.6733)
    """

    include_background: bool = True
    to_onehot_y: bool = False
    sigmoid: bool = False
    softmax: bool = False
    other_act: CustomActivation | None = None
    w_type: Weight | str = Weight.SQUARE
    reduction: LossReduction | str = LossReduction.MEAN
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    batch: bool = False
    gamma: float = 2.0
    weight: ClassWeight = None
    lambda_gdl: float = 1.0
    lambda_focal: float = 1.0

    def set_up(self, gamma: float, weight: ClassWeight, **options: Any) -> None:
        factors = {name: options.pop(name) for name in ("lambda_gdl", "lambda_focal")}
        self.reduction = "mean"
        self.generalized_dice = GeneralizedDiceLoss(**options)
        self.focal = FocalLoss(
            include_background=options["include_background"],
            to_onehot_y=options["to_onehot_y"],
            gamma=gamma,
            weight=weight,
            reduction=options["reduction"],
        )
        super().set_up(**_checked(factors))

    def _takes_mask(self) -> bool:
        return self.generalized_dice._takes_mask() and self.focal._takes_mask()

    def _forward(self, input: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        check_pair(input, target)
        case = self.generalized_dice._case(input, target, mask)
        focal = self.focal._case(input, target, mask)
        return self._sum(self.generalized_dice, case, focal, (self.lambda_gdl, self.lambda_focal))
