"""MONAI's Tversky, Dice and generalised Dice losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from voxfuse.contract import Absent, Activation, ClassPooling, Overlap, RatioOptions, Reduction, Sum
from voxfuse.integrations.lowering import (
    Voxels,
    activated,
    from_sums,
    fused_loss,
    plain,
    ratio_of,
    requires_grad,
    sums,
)
from voxfuse.integrations.monai._common import (
    ClassWeight,
    CustomActivation,
    FusedLoss,
    LossReduction,
    Weight,
    as_index_labels,
    as_predictions,
    as_weight,
    check_activation,
    exclusion,
    ignore_mask,
    look_up,
    one_hot,
    reduction_of,
    warn_ignored,
)
from voxfuse.losses.declared import declared
from voxfuse.losses.matthews import ROUNDING, MatthewsOptions
from voxfuse.losses.plan import Likelihood


class Case(NamedTuple):
    """One call: what the operators read, and whether they can do it."""

    voxels: Voxels
    #: Whether the target holds labels, to be made one-hot.
    labels: bool
    first_class: int
    #: The loss's ignore_index, for the path through PyTorch.
    ignored: int | None
    fused: bool

    @property
    def counted(self) -> int:
        """Number of classes that count."""
        return int(self.voxels.input.shape[1]) - self.first_class


class Counts(NamedTuple):
    """(B, C') or, pooled over the batch, (C',)."""

    tp: Tensor
    fp: Tensor
    fn: Tensor


#: Masked voxels are zeros before the activation of the others.
_SAME = -1


class OverlapLoss(FusedLoss):
    """Activation, one-hot labels, background and ignored voxels, in MONAI's order."""

    include_background: bool
    to_onehot_y: bool
    sigmoid: bool
    softmax: bool
    other_act: CustomActivation | None
    smooth_nr: float
    smooth_dr: float
    batch: bool
    soft_label: bool = False
    ignore_index: int | None = None
    squared_pred: bool = False

    def set_up(self, *args: Any, **options: Any) -> None:
        options["reduction"] = LossReduction(options["reduction"]).value
        check_activation(options["sigmoid"], options["softmax"], options["other_act"])
        options["smooth_nr"] = float(options["smooth_nr"])
        options["smooth_dr"] = float(options["smooth_dr"])
        super().set_up(**options)

    def _forward(self, input: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        return self._evaluate(self._case(input, target, mask))

    def _takes_mask(self) -> bool:
        return self.other_act is None and self.ignore_index is None

    # The case

    def _activation(self, channels: int) -> int:
        if self.sigmoid:
            return Activation.sigmoid
        if self.softmax:
            if channels > 1:
                return Activation.softmax
            warn_ignored("softmax=True")
        return Activation.none

    def _case(
        self,
        input: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        labels: bool | None = None,
        activation: int | None = None,
        blank: int | None = _SAME,
    ) -> Case:
        """Check and warn as MONAI does; ``labels`` overrides to_onehot_y, without its warning."""
        channels = input.shape[1]
        if activation is None:
            activation = self._activation(channels)
        input, target = as_predictions(input), plain(target)
        if self.other_act is not None:
            input = as_predictions(self.other_act(input))
        if labels is None:
            labels = self.to_onehot_y and channels > 1
            if self.to_onehot_y and not labels:
                warn_ignored("to_onehot_y=True")
        if labels:
            target = as_index_labels(target)
        first_class = self._first_class(channels)
        input = self._aligned(input, target)
        self._check_shapes(input, target, channels if labels else None, first_class)

        soft = self.soft_label and not self.squared_pred
        overlap = Overlap.min if soft else Overlap.product
        # Of a negative prediction, the norms in MONAI's formula take the absolute value.
        fused = (
            input.ndim > 2
            and not (soft and activation == Activation.none)
            and not target.requires_grad
            and (mask is None or not mask.requires_grad)
        )
        if mask is not None:
            blank = activation if blank == _SAME else blank
            if not fused:
                input, target = _blanked(input, target, mask, activation, blank)
                activation, mask = (Activation.none if blank != activation else activation), None
            voxels = Voxels(input, target, mask, activation, overlap, None, blank)
            return Case(voxels, labels, first_class, None, fused)
        weight, ignore_index = None, None
        if fused and self.ignore_index is not None:
            weight, ignore_index, fused = exclusion(target, labels, self.ignore_index)
        voxels = Voxels(input, target, weight, activation, overlap, ignore_index)
        return Case(voxels, labels, first_class, self.ignore_index, fused)

    def _first_class(self, channels: int) -> int:
        if self.include_background:
            return 0
        if channels == 1:
            warn_ignored("include_background=False")
            return 0
        return 1

    def _aligned(self, input: Tensor, target: Tensor) -> Tensor:
        return input

    #: How MONAI's message says that shapes differ.
    _differing = "different"

    def _check_shapes(
        self, input: Tensor, target: Tensor, classes: int | None, first_class: int
    ) -> None:
        shape = target.shape
        if classes is not None:
            shape = torch.Size((shape[0], classes, *shape[2:]))
        if shape == input.shape:
            return
        shown = (_without_background(x) if first_class else x for x in (shape, input.shape))
        target_shape, input_shape = shown
        if target_shape != input_shape:
            raise AssertionError(
                f"ground truth has {self._differing} shape ({target_shape}) from input "
                f"({input_shape})"
            )

    # The loss

    def _ratio(self, case: Case) -> RatioOptions | None:
        """The terms for the operator; None where PyTorch has to evaluate them."""
        raise NotImplementedError

    def _terms(self, counts: Counts, case: Case) -> Tensor:
        """MONAI's terms before the reduction."""
        raise NotImplementedError

    def _weights(self, classes: int) -> Tensor | None:
        """The weights of the classes that count."""
        return None

    def _evaluate(
        self, case: Case, likelihood: Likelihood | None = None, scale: float = 1.0
    ) -> Tensor:
        """Return ``scale`` times this loss plus the likelihood, from one pass."""
        reduction = reduction_of(self)
        ratio = self._ratio(case)
        voxels = case.voxels
        if case.fused and ratio is not None:
            ratio = ratio._replace(reduction=int(Reduction[reduction]), ratio_scale=scale)
            loss = fused_loss(voxels, ratio, likelihood, self._weights(case.counted))
            return self._shaped(loss, reduction, voxels.input)
        if not case.fused:
            assert likelihood is None
            counts = self._counts_of(*_predictions(case))
            return self._reduced(self._terms(counts, case), voxels.input)
        stats = sums(voxels, likelihood)
        loss = self._reduced(self._terms(self._counts_from(stats, case), case), voxels.input)
        loss = scale * loss.to(torch.promote_types(voxels.input.dtype, torch.float32))
        return loss if likelihood is None else loss + from_sums(stats, voxels, None, likelihood)

    def _counts_from(self, stats: Tensor, case: Case) -> Counts:
        stats = stats[:, case.first_class :]
        if self.batch:
            stats = stats.sum(0)
        tp, fp, fn = stats[..., Sum.TP], stats[..., Sum.FP], stats[..., Sum.FN]
        if self.squared_pred:
            fp, fn = stats[..., Sum.P2] - tp, stats[..., Sum.G2] - tp
        return Counts(tp, fp, fn)

    def _counts_of(self, p: Tensor, g: Tensor) -> Counts:
        """The same from predictions and target."""
        axes = [*([0] if self.batch else []), *range(2, p.ndim)]

        def total(x: Tensor) -> Tensor:
            return x.sum(axes) if axes else x.sum()

        if self.squared_pred:
            predicted, actual, tp = total(p * p), total(g * g), total(p * g)
        elif self.soft_label:
            predicted, actual = total(p.abs()), total(g.abs())
            tp = (predicted + actual - total((p - g).abs())) / 2
        else:
            tp = total(p * g)
            return Counts(tp, total(p * (1 - g)), total((1 - p) * g))
        return Counts(tp, predicted - tp, actual - tp)

    def _reduced(self, terms: Tensor, input: Tensor) -> Tensor:
        reduction = reduction_of(self)
        if reduction == "mean":
            return terms.mean()
        if reduction == "sum":
            return terms.sum()
        return self._shaped(terms, reduction, input)

    def _shaped(self, loss: Tensor, reduction: str, input: Tensor) -> Tensor:
        """Without a reduction, MONAI keeps a shape that broadcasts with the input."""
        if reduction != "none":
            return loss
        return loss.reshape([*loss.shape[:2], *[1] * (input.ndim - 2)])


def _without_background(shape: torch.Size) -> torch.Size:
    return torch.Size((shape[0], max(shape[1] - 1, 0), *shape[2:]))


def _blanked(
    input: Tensor, target: Tensor, mask: Tensor, activation: int, blank: int | None
) -> tuple[Tensor, Tensor]:
    """Zeros outside the mask, before the activation or (where it differs) after it."""
    if blank != activation:
        input = activated(input, activation)
    return input * mask, target * mask


def _predictions(case: Case) -> tuple[Tensor, Tensor]:
    """Predictions and target of the classes that count, as whole volumes."""
    voxels = case.voxels
    input, target = voxels.input, voxels.target
    if input.dtype in (torch.float16, torch.bfloat16):
        input = input.float()
    p = activated(input, voxels.activation)
    mask = ignore_mask(target, case.ignored)
    if case.labels:
        if case.ignored is not None:
            target = torch.where(target == case.ignored, torch.zeros_like(target), target)
        target = one_hot(target, p.shape[1])
    g = target if target.is_floating_point() else target.to(p.dtype)
    if mask is not None:
        p, g = p * mask, g * mask
    return p[:, case.first_class :], g[:, case.first_class :]


@declared
class TverskyLoss(OverlapLoss):
    r"""``monai.losses.TverskyLoss`` in one pass over the voxels.

    .. math::
        loss = \mathrm{mean}_{b,c}\; 1 - \frac{TP + s_n}{TP + \alpha FP + \beta FN + s_d}

    (Salehi et al. 2017, arXiv 1706.05721). Arguments, defaults, warnings and errors are MONAI's;
    the background is left out after the activation.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import TverskyLoss
        >>> loss = TverskyLoss(softmax=True, to_onehot_y=True, alpha=0.3, beta=0.7)
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 1, 8, 8))
        tensor(0.7059)
    """

    _differing = "differing"

    include_background: bool = True
    to_onehot_y: bool = False
    sigmoid: bool = False
    softmax: bool = False
    other_act: CustomActivation | None = None
    alpha: float = 0.5
    beta: float = 0.5
    reduction: LossReduction | str = LossReduction.MEAN
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    batch: bool = False
    soft_label: bool = False
    ignore_index: int | None = None

    def _aligned(self, input: Tensor, target: Tensor) -> Tensor:
        """MONAI multiplies by the mask before it compares the shapes, and so may broadcast."""
        if self.ignore_index is None or target.shape == input.shape:
            return input
        mask = (target.shape[0], 1, *target.shape[2:])
        return input.expand(torch.broadcast_shapes(input.shape, mask))

    def _ratio(self, case: Case) -> RatioOptions | None:
        if requires_grad(self.alpha, self.beta):
            return None
        return ratio_of(
            (1.0,),
            (1.0, float(self.alpha), float(self.beta)),
            self.smooth_nr,
            self.smooth_dr,
            first_class=case.first_class,
            batch=self.batch,
        )

    def _terms(self, counts: Counts, case: Case) -> Tensor:
        tp, fp, fn = counts
        size = tp + self.alpha * fp + self.beta * fn
        return 1 - (tp + self.smooth_nr) / (size + self.smooth_dr)

    def _shaped(self, loss: Tensor, reduction: str, input: Tensor) -> Tensor:
        return loss


@declared
class DiceLoss(OverlapLoss):
    r"""``monai.losses.DiceLoss`` in one pass over the voxels.

    .. math::
        loss = \mathrm{mean}_{b,c}\; w_c \Bigl(1 - \frac{2 TP + s_n}{2 TP + FP + FN + s_d}\Bigr)

    (Milletari et al. 2016); ``jaccard`` counts FP and FN twice, ``squared_pred`` takes the sums of
    squares, ``soft_label`` the semimetric of Wang et al. (2023). Arguments, defaults, warnings and
    errors are MONAI's.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import DiceLoss
        >>> loss = DiceLoss(softmax=True, to_onehot_y=True, include_background=False)
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 1, 8, 8))
        tensor(0.3333)
    """

    include_background: bool = True
    to_onehot_y: bool = False
    sigmoid: bool = False
    softmax: bool = False
    other_act: CustomActivation | None = None
    squared_pred: bool = False
    jaccard: bool = False
    reduction: LossReduction | str = LossReduction.MEAN
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    batch: bool = False
    weight: ClassWeight = None
    soft_label: bool = False
    ignore_index: int | None = None

    def set_up(self, *args: Any, **options: Any) -> None:
        weight = options.pop("weight")
        super().set_up(**options)
        self.register_buffer("class_weight", as_weight(weight))

    def _ratio(self, case: Case) -> RatioOptions:
        k = 2.0 if self.jaccard else 1.0
        squared = (2 - 2 * k, 0.0, 0.0, 0.0, 0.0, k, k)
        return ratio_of(
            (2.0,),
            squared if self.squared_pred else (2.0, k, k),
            self.smooth_nr,
            self.smooth_dr,
            first_class=case.first_class,
            batch=self.batch,
        )

    def _terms(self, counts: Counts, case: Case) -> Tensor:
        k = 1.0 if self.jaccard else 0.5
        tp, fp, fn = counts
        size = 2 * (tp + k * fp + k * fn)
        terms = 1 - (2 * tp + self.smooth_nr) / (size + self.smooth_dr)
        weight = self._weights(case.counted)
        return terms if weight is None else terms * weight.to(terms)

    def _weights(self, classes: int) -> Tensor | None:
        """The weights of the classes, a single number made one a class for good (as in MONAI)."""
        weight = self.class_weight
        if weight is None or classes == 1:
            return None
        if weight.ndim == 0:
            weight = self.class_weight = weight.expand(classes).clone()
        elif weight.shape[0] != classes:
            raise ValueError(
                "The length of the `weight` sequence should be the same as the number of classes. "
                "If `include_background=False`, the weight should not include the background "
                "category class 0."
            )
        self._check_nonnegative(
            weight, "the value/values of the `weight` should be no less than 0."
        )
        return weight


@declared
class MCCLoss(OverlapLoss):
    r"""``monai.losses.MCCLoss`` in one pass over the voxels.

    .. math::
        loss = \mathrm{mean}_{b,c}\; 1 - \frac{TP\,TN - FP\,FN + s_n}
            {\sqrt{(TP+FP)(TP+FN)(TN+FP)(TN+FN) + s_d}}

    and 0 where FP and FN are (Abhishek, Hamarneh 2021). Arguments, defaults, warnings and errors
    are MONAI's; :class:`voxfuse.MCCLoss` says what an absent class costs.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import MCCLoss
        >>> probabilities = torch.tensor([[[0.75, 0.25, 0.25, 0.25]]])
        >>> MCCLoss()(probabilities, torch.tensor([[[1.0, 0, 0, 0]]])).round(decimals=4)
        tensor(0.5528)
    """

    _differing = "differing"

    include_background: bool = True
    to_onehot_y: bool = False
    sigmoid: bool = False
    softmax: bool = False
    other_act: CustomActivation | None = None
    reduction: LossReduction | str = LossReduction.MEAN
    smooth_nr: float = 0.0
    smooth_dr: float = 1e-5
    batch: bool = False

    def _ratio(self, case: Case) -> RatioOptions:
        smoothing = (self.smooth_nr, self.smooth_dr)
        return MatthewsOptions(
            [],
            [],
            *smoothing,
            ratio_scale=1.0,
            first_class=case.first_class,
            batch=self.batch,
        )

    def _terms(self, counts: Counts, case: Case) -> Tensor:
        """Where the target varies, for whose derivatives the operator has no slopes."""
        tp, fp, fn = (x.double() for x in counts)
        others = case.voxels.input[:, case.first_class :].numel() / max(tp.numel(), 1) - (tp + fn)
        tn = others - fp
        tn = tn.masked_fill((tn < 0) & (tn > -ROUNDING * others), 0)
        square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + self.smooth_dr
        flat = square == 0
        numerator = (tp * tn - fp * fn + self.smooth_nr).masked_fill(flat, 0)
        terms = 1 - numerator / square.masked_fill(flat, 1).sqrt()
        terms = terms.masked_fill((fp == 0) & (fn == 0), 0)
        return terms.to(torch.promote_types(case.voxels.input.dtype, torch.float32))

    def _shaped(self, loss: Tensor, reduction: str, input: Tensor) -> Tensor:
        return loss


@declared
class GeneralizedDiceLoss(OverlapLoss):
    r"""``monai.losses.GeneralizedDiceLoss`` in one pass over the voxels.

    .. math::
        loss = \mathrm{mean}_b\; 1 - \frac{2 \sum_c w_c TP_c + s_n}
            {\sum_c w_c (2 TP_c + FP_c + FN_c) + s_d}

    with :math:`w_c` 1/G^2, 1/G or 1 of the target's volume G (Sudre et al. 2017); absent classes
    take the largest weight of the others. Arguments, defaults, warnings and errors are MONAI's.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import GeneralizedDiceLoss
        >>> loss = GeneralizedDiceLoss(softmax=True, to_onehot_y=True, w_type="uniform")
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 1, 8, 8))
        tensor(0.5000)
    """

    _differing = "differing"

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
    soft_label: bool = False

    def set_up(self, w_type: Weight | str, **options: Any) -> None:
        super().set_up(w_type=w_type, **options)
        self.w_type = look_up(w_type, Weight)

    def _ratio(self, case: Case) -> RatioOptions | None:
        uniform = self.w_type == Weight.UNIFORM
        if not uniform and self.smooth_nr != self.smooth_dr:
            # Without any target volume MONAI's loss is then 1 - smooth_nr / smooth_dr.
            return None
        return ratio_of(
            (2.0,),
            (2.0, 1.0, 1.0),
            self.smooth_nr,
            self.smooth_dr,
            first_class=case.first_class,
            batch=self.batch,
            class_pooling=ClassPooling[Weight(self.w_type).value],
            absent=Absent.keep if uniform else Absent.zero,
        )

    def _terms(self, counts: Counts, case: Case) -> Tensor:
        tp, fp, fn = counts
        axis = 0 if self.batch else 1
        volume = tp + fn
        if not case.voxels.target.requires_grad:
            volume = volume.detach()
        if self.w_type == Weight.UNIFORM:
            volume = torch.ones_like(volume)
        elif self.w_type == Weight.SQUARE:
            volume = volume * volume
        infinite = (1 / volume.detach()).isinf()
        weight = (1 / volume.masked_fill(infinite, 1)).masked_fill(infinite, 0)
        largest = weight.amax(axis, keepdim=True)
        weight = torch.where(infinite, largest, weight)
        hits = (2 * tp * weight).sum(axis, keepdim=True) + self.smooth_nr
        size = ((2 * tp + fp + fn) * weight).sum(axis, keepdim=True) + self.smooth_dr
        return 1 - hits / size

    def _shaped(self, loss: Tensor, reduction: str, input: Tensor) -> Tensor:
        if reduction != "none":
            return loss
        axes = input.ndim - 2 + (not self.batch)
        return loss.reshape([-1, *[1] * axes])
