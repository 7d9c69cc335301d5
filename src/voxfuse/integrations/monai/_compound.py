"""MONAI's sums of a Dice loss and a cross-entropy or focal loss, both from one pass."""

from __future__ import annotations

from torch import Tensor, nn

from voxfuse.integrations._fused import Likelihood, Voxels, fused_loss, plain
from voxfuse.integrations.monai._common import (
    Activation,
    ClassWeight,
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


def _check_factor(name: str, value: float) -> None:
    if value < 0.0:
        raise ValueError(f"{name} should be no less than 0.0.")


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

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Activation | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        reduction = look_up(reduction, DiceCEReduction).value
        dice_weight = weight
        if weight is not None and not include_background:
            dice_weight = weight[1:]
        self.dice = DiceLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            jaccard=jaccard,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=dice_weight,
        )
        self.cross_entropy = nn.CrossEntropyLoss(
            weight=weight, reduction=reduction, label_smoothing=label_smoothing
        )
        self.binary_cross_entropy = nn.BCEWithLogitsLoss(pos_weight=weight, reduction=reduction)
        _check_factor("lambda_dice", lambda_dice)
        _check_factor("lambda_ce", lambda_ce)
        self.lambda_dice = lambda_dice
        self.lambda_ce = lambda_ce

    def _takes_mask(self) -> bool:
        return self.dice._takes_mask()

    def _forward(self, input: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        check_pair(input, target)
        case = self.dice._case(input, target, mask)
        entropy = self._likelihood(input, target)
        if case.fused and entropy is not None and self.dice.other_act is None:
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
            normaliser = "elements" if binary.reduction == "mean" else "one"
            return Likelihood("sigmoid", 1.0, 1.0, normaliser, on_weight=weight)
        entropy = self.cross_entropy
        weight, classes = entropy.weight, input.shape[1]
        smoothing = max(entropy.label_smoothing, 0.0)  # PyTorch takes a negative one for none
        usual = type(entropy) is nn.CrossEntropyLoss and entropy.ignore_index == -100
        usual = usual and smoothing <= 1
        if not usual or (weight is not None and tuple(weight.shape) != (classes,)):
            return None
        off = smoothing / classes
        on = 1 - smoothing + off
        normaliser = "one"
        if entropy.reduction == "mean":
            normaliser = "target" if target.shape[1] == 1 else "voxels"
        return Likelihood(
            "softmax", on, off, normaliser, on_weight=weight, off_weight=weight if off else None
        )

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
            result = self.cross_entropy(input, target.squeeze(1).long())
        return result


class _OverlapFocalLoss(FusedLoss):
    """An overlap loss plus a focal loss, in one pass where both have the same voxels."""

    focal: FocalLoss

    def _sum(
        self, overlap: OverlapLoss, case: Case, focal: FocalCase, factors: tuple[float, float]
    ) -> Tensor:
        likelihood = focal.likelihood
        if likelihood is not None and not focal.by_sample and _shared(overlap, case, focal):
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

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Activation | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        gamma: float = 2.0,
        weight: ClassWeight = None,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.dice = DiceLoss(
            include_background=include_background,
            to_onehot_y=False,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            jaccard=jaccard,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
        )
        self.focal = FocalLoss(
            include_background=include_background,
            to_onehot_y=False,
            gamma=gamma,
            weight=weight,
            alpha=alpha,
            reduction=reduction,
        )
        _check_factor("lambda_dice", lambda_dice)
        _check_factor("lambda_focal", lambda_focal)
        self.lambda_dice = lambda_dice
        self.lambda_focal = lambda_focal
        self.to_onehot_y = to_onehot_y

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

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Activation | None = None,
        w_type: Weight | str = Weight.SQUARE,
        reduction: LossReduction | str = LossReduction.MEAN,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        gamma: float = 2.0,
        weight: ClassWeight = None,
        lambda_gdl: float = 1.0,
        lambda_focal: float = 1.0,
    ) -> None:
        super().__init__()
        self.generalized_dice = GeneralizedDiceLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            w_type=w_type,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
        )
        self.focal = FocalLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            gamma=gamma,
            weight=weight,
            reduction=reduction,
        )
        _check_factor("lambda_gdl", lambda_gdl)
        _check_factor("lambda_focal", lambda_focal)
        self.lambda_gdl = lambda_gdl
        self.lambda_focal = lambda_focal

    def _takes_mask(self) -> bool:
        return self.generalized_dice._takes_mask() and self.focal._takes_mask()

    def _forward(self, input: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        check_pair(input, target)
        case = self.generalized_dice._case(input, target, mask)
        focal = self.focal._case(input, target, mask)
        return self._sum(self.generalized_dice, case, focal, (self.lambda_gdl, self.lambda_focal))
