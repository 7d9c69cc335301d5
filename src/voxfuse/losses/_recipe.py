"""What a loss is made of: the activation, a ratio of sums and a log-likelihood.

A :class:`Recipe` describes a loss as the user stated it. For a number of classes and a kind of
target it becomes a :class:`Plan`: the literal arguments of the two operators behind every loss of
the family, ``soft_confusion`` (the only pass over the voxels) and ``ratio_loss``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from voxfuse.contract import CORE, Absent, Activation, ClassPooling, Normaliser, Overlap, Reduction
from voxfuse.ops import _checks

#: Smallest ratio under a logarithm, as in segmentation-models-pytorch.
LOG_FLOOR = 1e-7


class Plan(NamedTuple):
    """Arguments of the operators, in the order of their schemas."""

    confusion: tuple[int, int, int, int | None, float, bool]
    ratio: tuple[list[float], list[float], float, float, float, float, bool]
    terms: tuple[int, bool, int, int, int, float]
    likelihood: tuple[float, float, int]
    #: How many classes, from the first on, the likelihood's gamma applies to; None: all.
    focal_classes: int | None = None
    #: Classes before this one have the exponent 1.
    exponent_from: int = 0

    @property
    def first_class(self) -> int:
        return self.terms[0]

    @property
    def batch(self) -> bool:
        return self.terms[1]


#: A loss without a ratio: pooling the batch changes nothing then, and lets ranks hold different
#: batches.
_NO_RATIO = ([0.0], [0.0], 0.0, 0.0, 0.0, 1.0, False)
_NO_TERMS = (0, True, 0, 0, Reduction.sum, 0.0)


@dataclass(frozen=True)
class Ratio:
    """``scale`` times the reduced terms ``(1 - N/D)^exponent`` or ``-log(N/D)``."""

    numerator: Sequence[float]
    denominator: Sequence[float]
    smooth_nr: float
    smooth_dr: float
    exponent: float
    log: bool
    include_background: bool
    batch: bool
    class_pooling: int
    absent: int
    reduction: int
    scale: float
    exponent_from: int = 0


@dataclass(frozen=True)
class Likelihood:
    """``scale`` times a cross-entropy or focal loss.

    A mean is over the voxels, each with its class's weight ("weighted", PyTorch's cross-entropy),
    over the "voxels", or over the "elements" (voxels x classes, MONAI's focal loss). A sigmoid
    likelihood has a term for every element, so its mean is always over the elements.
    """

    activation: int
    scale: float
    gamma: float
    alpha: float | None
    label_smoothing: float
    include_background: bool
    mean: str
    reduction: int
    top_percent: float | None
    focal_classes: int | None = None


@dataclass
class Recipe:
    """A loss as the user stated it."""

    activation: int
    overlap: int
    ignore_index: int | None
    ratio: Ratio | None
    likelihood: Likelihood | None
    plans: dict[tuple[int, bool], Plan] = field(default_factory=dict, repr=False, compare=False)

    @property
    def by_voxel(self) -> bool:
        """Whether the loss looks at single voxels: their map, or the worst of them."""
        part = self.likelihood
        return part is not None and (
            part.top_percent is not None or part.reduction == Reduction.none
        )

    def plan(self, classes: int, dense: bool) -> Plan:
        """Return the operators' arguments for ``classes`` classes and a dense or label target."""
        key = (classes, dense)
        if key not in self.plans:
            self.plans[key] = self._make_plan(classes, dense)
        return self.plans[key]

    def _make_plan(self, classes: int, dense: bool) -> Plan:
        likelihood = self.likelihood
        for activation in (self.activation, likelihood.activation if likelihood else None):
            if activation == Activation.softmax and classes == 1:
                raise ValueError(
                    "activation: a softmax over one class is constant; use 'sigmoid' for an input "
                    "with one channel"
                )
        for part in (self.ratio, likelihood):
            if part is not None and not part.include_background and classes == 1:
                raise ValueError(
                    "include_background: False leaves no class of an input with one channel"
                )
        if classes == 1 and likelihood is not None and likelihood.focal_classes is not None:
            raise ValueError(
                "symmetric: False needs a channel for the background, and the input has only one "
                "channel"
            )
        nll_scale, off_scale, normaliser = self._likelihood_scales(classes, dense)
        counted = normaliser in (Normaliser.voxels, Normaliser.elements)
        ratio = self.ratio
        squared = ratio is not None and any(
            any(x[CORE:]) for x in (ratio.numerator, ratio.denominator)
        )
        confusion = (
            self.activation,
            likelihood.activation if likelihood else self.activation,
            self.overlap,
            self.ignore_index,
            likelihood.gamma if likelihood else 0.0,
            off_scale != 0 or counted or squared,
        )
        if ratio is None:
            return Plan(confusion, _NO_RATIO, _NO_TERMS, (nll_scale, off_scale, normaliser))
        return Plan(
            confusion,
            (
                list(ratio.numerator),
                list(ratio.denominator),
                ratio.smooth_nr,
                ratio.smooth_dr,
                LOG_FLOOR if ratio.log else 0.0,
                ratio.exponent,
                ratio.log,
            ),
            (
                0 if ratio.include_background else 1,
                ratio.batch,
                ratio.class_pooling,
                ratio.absent,
                ratio.reduction,
                ratio.scale,
            ),
            (nll_scale, off_scale, normaliser),
            likelihood.focal_classes if likelihood else None,
            ratio.exponent_from,
        )

    def _likelihood_scales(self, classes: int, dense: bool) -> tuple[float, float, int]:
        """Return the scales of NLL and OFF and the normaliser."""
        part = self.likelihood
        if part is None:
            return 0.0, 0.0, Normaliser.one
        binary = part.activation == Activation.sigmoid or classes == 1
        on, off = 1.0, 1.0 if binary else 0.0
        if binary:
            if part.label_smoothing:
                raise ValueError("label_smoothing: needs a softmax cross-entropy")
            if part.alpha is not None:
                on, off = part.alpha, 1 - part.alpha
        elif part.label_smoothing:
            off = part.label_smoothing / classes
            on = 1 - part.label_smoothing + off
        scale = part.scale
        if part.reduction != Reduction.mean:
            return scale * on, scale * off, Normaliser.one
        kept = classes if part.include_background else classes - 1
        if binary:
            # The mean over all elements of the classes that count.
            normaliser, scale = "elements", scale * classes / kept
        elif dense:
            normaliser = "voxels"
        else:
            # One-hot rows: the target volumes add up to the voxels, without the full statistics.
            normaliser = "target" if part.mean == "weighted" else "volume"
        if not binary and part.mean == "elements":
            scale /= kept
        return scale * on, scale * off, Normaliser[normaliser]


def number(name: str, value: float, low: float, high: float = math.inf) -> float:
    """Return ``value`` as a float in [low, high], or raise naming the argument."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {value!r}, expected a number") from None
    if not (low <= result <= high and math.isfinite(result)):
        allowed = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: got {value}, expected a finite number {allowed}")
    return result


def exponent(name: str, value: float) -> float:
    result = number(name, value, 0.0)
    if result == 0:
        raise ValueError(f"{name}: got {value}, expected a finite number > 0")
    return result


def _reduction(value: str, allow_none: bool = True) -> int:
    if allow_none:
        return _checks.choice("reduction", value, Reduction)
    reduced = {code.name: code for code in Reduction if code != Reduction.none}
    return _checks.choice("reduction", value, reduced)


def ratio_recipe(
    numerator: Sequence[float],
    denominator: Sequence[float],
    power: float = 1.0,
    *,
    activation: str = "softmax",
    include_background: bool = True,
    batch: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    ignore_index: int | None = None,
    absent: str = "keep",
    log: bool = False,
    overlap: str = "product",
    class_pooling: str = "none",
    scale: float = 1.0,
    likelihood: Likelihood | None = None,
    exponent_from: int = 0,
) -> Recipe:
    """A ratio of sums, and possibly a log-likelihood from the same pass."""
    ratio = Ratio(
        numerator=tuple(numerator),
        denominator=tuple(denominator),
        smooth_nr=number("smooth_nr", smooth_nr, 0.0),
        smooth_dr=number("smooth_dr", smooth_dr, 0.0),
        exponent=power,
        log=bool(log),
        include_background=bool(include_background),
        batch=bool(batch),
        class_pooling=_checks.choice("class_pooling", class_pooling, ClassPooling),
        absent=_checks.choice("absent", absent, Absent),
        reduction=_reduction(reduction, allow_none=likelihood is None),
        scale=scale,
        exponent_from=exponent_from,
    )
    return Recipe(
        _checks.choice("activation", activation, Activation),
        _checks.choice("overlap", overlap, Overlap),
        ignore_index,
        ratio,
        likelihood,
    )


def tversky_coefficients(alpha: float, beta: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Numerator and denominator of TP / (TP + alpha FP + beta FN)."""
    return (1.0,), (1.0, number("alpha", alpha, 0.0), number("beta", beta, 0.0))


def fbeta_weights(beta: float) -> tuple[float, float]:
    """The alpha and beta of the Tversky index that equals F_beta (Hashemi et al. 2018)."""
    square = number("beta", beta, 0.0) ** 2
    return 1 / (1 + square), square / (1 + square)


def dice_coefficients(squared: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """2 TP over (predicted + true volume), or over the sums of squares."""
    return (2.0,), ((0.0,) * 5 + (1.0, 1.0) if squared else (2.0, 1.0, 1.0))


def jaccard_coefficients(squared: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """TP over the union, or over (sums of squares - TP)."""
    return (1.0,), ((-1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0) if squared else (1.0, 1.0, 1.0))


def likelihood_part(
    activation: str,
    *,
    scale: float = 1.0,
    gamma: float = 0.0,
    alpha: float | None = None,
    label_smoothing: float = 0.0,
    include_background: bool = True,
    mean: str = "weighted",
    reduction: str = "mean",
    top_percent: float | None = None,
    focal_classes: int | None = None,
) -> Likelihood:
    code = _checks.choice("activation", activation, Activation)
    if label_smoothing and code != Activation.softmax:
        raise ValueError(
            "label_smoothing: needs a softmax cross-entropy; with a sigmoid pass the smoothed "
            "target g (1 - s) + s/2, dense"
        )
    return Likelihood(
        activation=code,
        scale=scale,
        gamma=number("gamma", gamma, 0.0),
        alpha=None if alpha is None else number("alpha", alpha, 0.0, 1.0),
        label_smoothing=number("label_smoothing", label_smoothing, 0.0, 1.0),
        include_background=bool(include_background),
        mean=mean,
        reduction=_reduction(reduction, allow_none=top_percent is None),
        top_percent=top_percent,
        focal_classes=focal_classes,
    )


def tversky(alpha: float = 0.5, beta: float = 0.5, gamma: float = 1.0, **options: Any) -> Recipe:
    numerator, denominator = tversky_coefficients(alpha, beta)
    return ratio_recipe(numerator, denominator, exponent("gamma", gamma), **options)


def fbeta(beta: float = 1.5, gamma: float = 1.0, **options: Any) -> Recipe:
    return tversky(*fbeta_weights(beta), gamma, **options)


def focal_tversky(
    alpha: float = 0.3, beta: float = 0.7, gamma: float = 0.75, **options: Any
) -> Recipe:
    return tversky(alpha, beta, gamma, **options)


def dice(squared: bool = False, **options: Any) -> Recipe:
    return ratio_recipe(*dice_coefficients(squared), **options)


def jaccard(squared: bool = False, **options: Any) -> Recipe:
    return ratio_recipe(*jaccard_coefficients(squared), **options)


def generalized_dice(class_pooling: str = "square", **options: Any) -> Recipe:
    if class_pooling == "none":
        raise ValueError("class_pooling: got 'none', expected 'uniform', 'simple' or 'square'")
    return ratio_recipe(*dice_coefficients(False), class_pooling=class_pooling, **options)


def cross_entropy(
    activation: str = "softmax",
    label_smoothing: float = 0.0,
    include_background: bool = True,
    reduction: str = "mean",
    ignore_index: int | None = None,
) -> Recipe:
    part = likelihood_part(
        activation,
        label_smoothing=label_smoothing,
        include_background=include_background,
        reduction=reduction,
    )
    return likelihood_recipe(part, ignore_index)


def binary_cross_entropy(
    include_background: bool = True, reduction: str = "mean", ignore_index: int | None = None
) -> Recipe:
    return cross_entropy("sigmoid", 0.0, include_background, reduction, ignore_index)


def top_k(
    k: float = 10.0,
    activation: str = "softmax",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    ignore_index: int | None = None,
) -> Recipe:
    percent = number("k", k, 0.0, 100.0)
    if percent == 0:
        raise ValueError(f"k: got {k}, expected a percentage in (0, 100]")
    part = likelihood_part(
        activation,
        label_smoothing=label_smoothing,
        mean="voxels",
        reduction=reduction,
        top_percent=percent,
    )
    return likelihood_recipe(part, ignore_index)


def focal(
    gamma: float = 2.0,
    alpha: float | None = None,
    activation: str = "softmax",
    include_background: bool = True,
    reduction: str = "mean",
    ignore_index: int | None = None,
) -> Recipe:
    part = likelihood_part(
        activation,
        gamma=gamma,
        alpha=alpha,
        include_background=include_background,
        mean="elements",
        reduction=reduction,
    )
    return likelihood_recipe(part, ignore_index)


def _with_cross_entropy(
    coefficients: tuple[Sequence[float], Sequence[float]],
    power: float,
    lambda_ratio: float,
    lambda_ce: float,
    ce_activation: str | None,
    label_smoothing: float,
    options: dict[str, Any],
) -> Recipe:
    part = likelihood_part(
        ce_activation or options.get("activation", "softmax"),
        scale=number("lambda_ce", lambda_ce, 0.0),
        label_smoothing=label_smoothing,
        reduction=options.get("reduction", "mean"),
    )
    return ratio_recipe(*coefficients, power, scale=lambda_ratio, likelihood=part, **options)


def tversky_ce(
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    lambda_tversky: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    ce_activation: str | None = None,
    **options: Any,
) -> Recipe:
    return _with_cross_entropy(
        tversky_coefficients(alpha, beta),
        exponent("gamma", gamma),
        number("lambda_tversky", lambda_tversky, 0.0),
        lambda_ce,
        ce_activation,
        label_smoothing,
        options,
    )


def dice_ce(
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    squared: bool = False,
    label_smoothing: float = 0.0,
    ce_activation: str | None = None,
    **options: Any,
) -> Recipe:
    return _with_cross_entropy(
        dice_coefficients(squared),
        1.0,
        number("lambda_dice", lambda_dice, 0.0),
        lambda_ce,
        ce_activation,
        label_smoothing,
        options,
    )


def _with_focal(
    coefficients: tuple[Sequence[float], Sequence[float]],
    power: float,
    lambda_ratio: float,
    lambda_focal: float,
    focal_gamma: float,
    focal_alpha: float | None,
    focal_activation: str | None,
    options: dict[str, Any],
) -> Recipe:
    part = likelihood_part(
        focal_activation or options.get("activation", "softmax"),
        scale=number("lambda_focal", lambda_focal, 0.0),
        gamma=number("focal_gamma", focal_gamma, 0.0),
        alpha=focal_alpha,
        include_background=options.get("include_background", True),
        mean="elements",
        reduction=options.get("reduction", "mean"),
    )
    return ratio_recipe(*coefficients, power, scale=lambda_ratio, likelihood=part, **options)


def tversky_focal(
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    focal_gamma: float = 2.0,
    focal_alpha: float | None = None,
    lambda_tversky: float = 1.0,
    lambda_focal: float = 1.0,
    focal_activation: str | None = None,
    **options: Any,
) -> Recipe:
    return _with_focal(
        tversky_coefficients(alpha, beta),
        exponent("gamma", gamma),
        number("lambda_tversky", lambda_tversky, 0.0),
        lambda_focal,
        focal_gamma,
        focal_alpha,
        focal_activation,
        options,
    )


def dice_focal(
    focal_gamma: float = 2.0,
    focal_alpha: float | None = None,
    lambda_dice: float = 1.0,
    lambda_focal: float = 1.0,
    squared: bool = False,
    focal_activation: str | None = None,
    **options: Any,
) -> Recipe:
    return _with_focal(
        dice_coefficients(squared),
        1.0,
        number("lambda_dice", lambda_dice, 0.0),
        lambda_focal,
        focal_gamma,
        focal_alpha,
        focal_activation,
        options,
    )


def unified_focal(
    balance: float = 0.5,
    delta: float = 0.6,
    gamma: float = 0.5,
    symmetric: bool = True,
    **options: Any,
) -> Recipe:
    balance = number("balance", balance, 0.0, 1.0)
    delta = number("delta", delta, 0.0, 1.0)
    gamma = number("gamma", gamma, 0.0)
    if gamma >= 1:
        raise ValueError(f"gamma: got {gamma}, expected a number in [0, 1)")
    if not symmetric and options.get("activation", "softmax") == "sigmoid":
        raise ValueError("symmetric: False needs one softmax over background and foreground")
    part = likelihood_part(
        options.get("activation", "softmax"),
        scale=balance,
        gamma=gamma,
        alpha=delta,
        include_background=options.get("include_background", True),
        mean="voxels",
        reduction=options.get("reduction", "mean"),
        # The background alone is suppressed in the likelihood, the foreground alone enhanced in
        # the overlap.
        focal_classes=None if symmetric else 1,
    )
    return ratio_recipe(
        *tversky_coefficients(1 - delta, delta),
        1 - gamma,
        scale=1 - balance,
        likelihood=part,
        exponent_from=0 if symmetric else 1,
        **options,
    )


def likelihood_recipe(part: Likelihood, ignore_index: int | None) -> Recipe:
    """A log-likelihood alone."""
    return Recipe(part.activation, Overlap.product, ignore_index, None, part)
