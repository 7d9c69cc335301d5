"""From a loss to the arguments of its operators: the one way down, for losses and adapters alike.

A :class:`Recipe` is a loss as the user stated it. For a number of classes and a kind of target it
becomes a :class:`Plan`: the options of the two operators behind every loss of the family,
``soft_confusion`` (the only pass over the voxels) and ``ratio_loss``. An adapter, whose options no
recipe has, makes its plan of a ratio and a :class:`Likelihood` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from voxfuse.contract import (
    CORE,
    Absent,
    Activation,
    ClassPooling,
    ConfusionOptions,
    Normaliser,
    Overlap,
    RatioOptions,
    Reduction,
    Unlabelled,
)
from voxfuse.losses.matthews import MatthewsOptions
from voxfuse.losses.options import (
    ClassWeights,
    LikelihoodOptions,
    OverlapOptions,
    number,
    reduction_code,
)
from voxfuse.losses.sums import Sums
from voxfuse.ops import _checks
from voxfuse.ops.soft_confusion import check_unlabelled

#: Smallest ratio under a logarithm, as in segmentation-models-pytorch.
LOG_FLOOR = 1e-7


class TermWeights(NamedTuple):
    """Weights of the classes: in the ratio's terms, in NLL and in OFF."""

    class_weight: Tensor | None = None
    nll_weight: Tensor | None = None
    off_weight: Tensor | None = None


NO_WEIGHTS = TermWeights()


class Likelihood(NamedTuple):
    """``(on NLL + off OFF) / (normaliser divisor)``, with weights of the classes."""

    activation: int
    on: float
    off: float
    normaliser: int
    gamma: float = 0.0
    focal_classes: int | None = None
    on_weight: Tensor | None = None
    off_weight: Tensor | None = None
    #: A number of voxels, of which a compiler knows only the symbol.
    divisor: int = 1

    def scaled(self, factor: float) -> Likelihood:
        return self._replace(on=factor * self.on, off=factor * self.off)


class Plan(NamedTuple):
    """The options of both operators."""

    confusion: ConfusionOptions
    #: Whether all eight sums are needed.
    full: bool
    ratio: RatioOptions


#: No terms. Pooling the batch then changes nothing, and lets ranks hold different batches.
_NO_RATIO = RatioOptions([0.0], [0.0], batch=True, reduction=int(Reduction.sum))


def plan_of(
    activation: int,
    overlap: int,
    ignore_index: int | None,
    ratio: RatioOptions | None,
    likelihood: Likelihood | None,
    unlabelled: int = Unlabelled.exclude,
) -> Plan:
    """The plan of a ratio of the sums, a log-likelihood or both.

    Codes become plain integers, which an operator reads faster.
    """
    terms = ratio or _NO_RATIO
    full = isinstance(terms, MatthewsOptions)
    full = full or any(terms.numerator[CORE:]) or any(terms.denominator[CORE:])
    predictions, gamma, focal_classes = activation, 0.0, None
    if likelihood is not None:
        predictions, gamma = likelihood.activation, float(likelihood.gamma)
        focal_classes = likelihood.focal_classes
        counted = likelihood.normaliser in (Normaliser.voxels, Normaliser.elements)
        full = full or counted or likelihood.off != 0
        terms = terms._replace(
            nll_scale=likelihood.on, off_scale=likelihood.off, normaliser=int(likelihood.normaliser)
        )
    confusion = ConfusionOptions(
        int(activation),
        int(predictions),
        int(overlap),
        ignore_index,
        gamma,
        focal_classes,
        int(unlabelled),
    )
    return Plan(confusion, full, terms)


@dataclass
class Recipe:
    """A loss as the user stated it."""

    activation: int
    overlap: int
    ignore_index: int | None
    ratio: RatioOptions | None
    likelihood: LikelihoodOptions | None
    #: In place of the two: of the sums, of all of which it may ask.
    function: Callable[[Sums], Tensor] | None = None
    full: bool = False
    #: Whether the loss is one number for every sample, as if it were alone.
    by_sample: bool = False
    unlabelled: int = Unlabelled.exclude
    plans: dict[tuple[int, bool], Plan] = field(default_factory=dict, repr=False, compare=False)

    @property
    def by_voxel(self) -> bool:
        """Whether the loss looks at single voxels: their map, or the worst of them."""
        part = self.likelihood
        return part is not None and (
            part.top_percent is not None or part.reduction == Reduction.none
        )

    def plan(self, classes: int, dense: bool) -> Plan:
        """Return the operators' options for ``classes`` classes and a dense or label target."""
        key = (classes, dense)
        if key not in self.plans:
            self._check_classes(classes)
            plan = plan_of(
                self.activation,
                self.overlap,
                self.ignore_index,
                self.ratio,
                self._likelihood(classes, dense),
                self.unlabelled,
            )
            self.plans[key] = plan._replace(full=plan.full or self.full)
        return self.plans[key]

    def _check_classes(self, classes: int) -> None:
        part = self.likelihood
        if classes != 1:
            return
        if Activation.softmax in (self.activation, part.activation if part else None):
            raise ValueError(
                "activation: a softmax over one class is constant; use 'sigmoid' for an input "
                "with one channel"
            )
        if (self.ratio and self.ratio.first_class) or (part and not part.include_background):
            raise ValueError(
                "include_background: False leaves no class of an input with one channel"
            )
        if part is not None and part.focal_classes is not None:
            raise ValueError(
                "symmetric: False needs a channel for the background, and the input has only one "
                "channel"
            )

    def _likelihood(self, classes: int, dense: bool) -> Likelihood | None:
        part = self.likelihood
        if part is None:
            return None
        binary = part.activation == Activation.sigmoid or classes == 1
        on, off = 1.0, 1.0 if binary else 0.0
        if binary:
            if part.label_smoothing:
                raise ValueError("label_smoothing: needs a softmax cross-entropy")
            if isinstance(part.alpha, tuple):
                raise ValueError(
                    f"alpha: got {list(part.alpha)}, expected one number in [0, 1] for an input "
                    "with one channel"
                )
            if part.alpha is not None:
                on, off = part.alpha, 1 - part.alpha
        elif part.label_smoothing:
            off = part.label_smoothing / classes
            on = 1 - part.label_smoothing + off
        kept = classes if part.include_background else classes - 1
        scale = part.scale
        if part.reduction != Reduction.mean:
            normaliser = Normaliser.one
        elif binary:
            # The mean over all elements of the classes that count.
            normaliser, scale = Normaliser.elements, scale * classes / kept
        else:
            # One-hot rows: the target volumes add up to the voxels, without the full statistics.
            labels = Normaliser.target if part.mean == "weighted" else Normaliser.volume
            normaliser = Normaliser.voxels if dense else labels
            if part.mean == "elements":
                scale /= kept
        return Likelihood(
            part.activation, scale * on, scale * off, normaliser, part.gamma, part.focal_classes
        )

    def weights(
        self,
        samples: int,
        classes: int,
        device: torch.device,
        class_weight: ClassWeights,
        likelihood_weight: ClassWeights,
        pos_weight: ClassWeights,
    ) -> TermWeights:
        """The weights of the classes as the operators take them."""
        terms = None
        name = "likelihood_weight"
        if self.ratio is None:
            name, likelihood_weight = "class_weight", class_weight
        else:
            counted = classes - self.ratio.first_class
            terms = class_weights("class_weight", class_weight, counted, device, samples)
        part = self.likelihood
        if part is None:
            return TermWeights(terms)
        on = class_weights(name, likelihood_weight, classes, device)
        off = on
        binary = part.activation == Activation.sigmoid or classes == 1
        if part.alpha is not None and not binary:
            alpha = part.alpha
            if not isinstance(alpha, tuple):
                # MONAI's convention: 1 - alpha for the background, alpha for every other class.
                alpha = (1 - alpha, *[alpha] * (classes - 1))
            if len(alpha) != classes:
                raise ValueError(
                    f"alpha: got {len(alpha)} numbers, expected {classes}, one for every class"
                )
            on = _product(on, class_weights("alpha", alpha, classes, device))
        if pos_weight is not None:
            if not binary:
                raise ValueError("pos_weight: needs a sigmoid likelihood; weigh classes instead")
            on = _product(on, class_weights("pos_weight", pos_weight, classes, device))
        if not part.include_background:
            foreground = torch.ones(classes, dtype=torch.float64, device=device)
            foreground[0] = 0
            on, off = _product(on, foreground), _product(off, foreground)
        return TermWeights(terms, on, off)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


def class_weights(
    name: str,
    value: ClassWeights,
    length: int,
    device: torch.device,
    samples: int | None = None,
) -> Tensor | None:
    """Return the classes' weights as the operators take them: float64 on ``device``.

    There may be one for each of the ``samples``, where they are given.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=torch.float64)
    value = _checks.plain(value)
    if value.requires_grad:
        raise ValueError(f"{name}: requires grad, but no gradient flows to it; detach it")
    if value.ndim == 0:
        value = value.expand(length)
    by_sample = samples is not None and tuple(value.shape) == (samples, length)
    if not by_sample and tuple(value.shape) != (length,):
        more = "" if samples is None else f", or ({samples}, {length}), one for every sample too"
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected ({length},), one weight for every "
            f"class that counts{more}"
        )
    if value.dtype != torch.float64 or value.device != device:
        value = value.to(device, torch.float64)
    return value.contiguous()


def overlap_recipe(
    options: OverlapOptions,
    numerator: Sequence[float],
    denominator: Sequence[float],
    exponent: float = 1.0,
    *,
    exponent_from: int = 0,
    class_pooling: str = "none",
    scale: float = 1.0,
    likelihood: LikelihoodOptions | None = None,
) -> Recipe:
    """A ratio of sums, and possibly a log-likelihood from the same pass; validates ``options``."""
    by_sample = likelihood is not None and options.reduction == "none"
    if by_sample and options.batch:
        raise ValueError(
            "batch: True pools the samples, of which reduction='none' gives each a loss"
        )
    ratio = RatioOptions(
        list(numerator),
        list(denominator),
        smooth_nr=number("smooth_nr", options.smooth_nr),
        smooth_dr=number("smooth_dr", options.smooth_dr),
        min_denominator=LOG_FLOOR if options.log else 0.0,
        exponent=exponent,
        exponent_from=exponent_from,
        log=bool(options.log),
        first_class=0 if options.include_background else 1,
        batch=bool(options.batch),
        class_pooling=_checks.choice("class_pooling", class_pooling, ClassPooling),
        absent=_checks.choice("absent", options.absent, Absent),
        reduction=reduction_code("mean" if by_sample else options.reduction),
        ratio_scale=scale,
    )
    activation = _checks.choice("activation", options.activation, Activation)
    predictions = activation if likelihood is None else likelihood.activation
    return Recipe(
        activation,
        _checks.choice("overlap", options.overlap, Overlap),
        _checks.ignored_label(options.ignore_index),
        ratio,
        likelihood,
        by_sample=by_sample,
        unlabelled=check_unlabelled(options.unlabelled, activation, predictions),
    )


def likelihood_recipe(
    part: LikelihoodOptions, ignore_index: int | None, unlabelled: str = "exclude"
) -> Recipe:
    """A log-likelihood alone."""
    code = check_unlabelled(unlabelled, part.activation)
    ignored = _checks.ignored_label(ignore_index)
    return Recipe(part.activation, Overlap.product, ignored, None, part, unlabelled=code)
