"""Sums of an overlap loss and a log-likelihood, both from one pass over the voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from voxfuse.losses.declared import declared
from voxfuse.losses.module import OverlapLoss
from voxfuse.losses.options import ClassWeights, exponent, likelihood_options, number
from voxfuse.losses.overlap import Coefficients, dice_coefficients, tversky_coefficients
from voxfuse.losses.plan import Recipe, overlap_recipe


@dataclass(kw_only=True, eq=False, repr=False)
class CompoundLoss(OverlapLoss):
    """A loss with a ratio of sums and a log-likelihood."""

    likelihood_weight: ClassWeights = None
    likelihood_include_background: bool | None = None


@dataclass(kw_only=True, eq=False, repr=False)
class BinaryCompoundLoss(CompoundLoss):
    """One whose likelihood may be of every class on its own."""

    pos_weight: ClassWeights = None


def _reduction(options: Any) -> str:
    """Of the likelihood: with "none" a sample's own mean."""
    reduction: str = options.reduction
    return "mean" if reduction == "none" else reduction


def _background(options: Any) -> bool:
    """Whether class 0 counts in a focal term."""
    own: bool | None = options.likelihood_include_background
    return bool(options.include_background if own is None else own)


def _with_cross_entropy(
    options: Any, coefficients: Coefficients, scale: float, power: float = 1.0
) -> Recipe:
    part = likelihood_options(
        options.ce_activation or options.activation,
        scale=number("lambda_ce", options.lambda_ce),
        label_smoothing=options.label_smoothing,
        include_background=options.likelihood_include_background is not False,
        reduction=_reduction(options),
    )
    return overlap_recipe(options, *coefficients, power, scale=scale, likelihood=part)


def _with_focal(
    options: Any, coefficients: Coefficients, scale: float, power: float = 1.0
) -> Recipe:
    part = likelihood_options(
        options.focal_activation or options.activation,
        scale=number("lambda_focal", options.lambda_focal),
        gamma=number("focal_gamma", options.focal_gamma),
        alpha=options.focal_alpha,
        include_background=_background(options),
        mean="elements",
        reduction=_reduction(options),
    )
    return overlap_recipe(options, *coefficients, power, scale=scale, likelihood=part)


@declared
class TverskyCELoss(BinaryCompoundLoss):
    r"""``lambda_tversky`` x :class:`TverskyLoss` + ``lambda_ce`` x :class:`CrossEntropyLoss`.

    No peer has this sum. The defaults equal ``monai.losses.DiceCELoss(softmax=True,
    to_onehot_y=True)`` with twice its smoothing terms (``smooth_nr=2e-5, smooth_dr=2e-5``).

    Args:
        alpha, beta, gamma: of the Tversky term.
        lambda_tversky, lambda_ce: factors of the two terms, >= 0.
        label_smoothing: of the cross-entropy. With a sigmoid it is an error: it would need the sum
            of the logits beside the likelihood. Pass the smoothed target g (1 - s) + s/2, dense.
        ce_activation: activation of the cross-entropy where it differs from ``activation``; a
            sigmoid makes it a binary cross-entropy.
        class_weight: weights of the classes in the Tversky term alone, as in
            :class:`TverskyLoss`.
        likelihood_weight: weights (C,) of the classes in the cross-entropy, which ``class_weight``
            leaves unweighted. MONAI's one ``weight`` is both: the Tversky term's without the
            background's where ``include_background=False``, the cross-entropy's with it.
        pos_weight: weights (C,) of the positives in a binary cross-entropy.
        likelihood_include_background: whether class 0 counts in the cross-entropy, whatever
            ``include_background`` says of the Tversky term; by default it does.
        options: as in :class:`TverskyLoss`; ``reduction="none"`` gives (B,), each sample's loss as
            if it were alone, not with ``batch``.

    Example:
        >>> import voxfuse
        >>> voxfuse.TverskyCELoss(alpha=0.3, beta=0.7, lambda_ce=0.5)
        TverskyCELoss(alpha=0.3, beta=0.7, lambda_tversky=1.0, lambda_ce=0.5)
    """

    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 1.0
    lambda_tversky: float = 1.0
    lambda_ce: float = 1.0
    label_smoothing: float = 0.0
    ce_activation: str | None = None

    shown = ("alpha", "beta", "lambda_tversky", "lambda_ce")

    def make_recipe(self) -> Recipe:
        coefficients = tversky_coefficients(self.alpha, self.beta)
        power = exponent("gamma", self.gamma)
        scale = number("lambda_tversky", self.lambda_tversky)
        return _with_cross_entropy(self, coefficients, scale, power)


@declared
class DiceCELoss(BinaryCompoundLoss):
    r"""``lambda_dice`` x :class:`DiceLoss` + ``lambda_ce`` x :class:`CrossEntropyLoss`.

    The defaults equal ``monai.losses.DiceCELoss(softmax=True, to_onehot_y=True)``; for its other
    habits (one shared weight, a softmax cross-entropy beside a sigmoid Dice) see
    ``likelihood_weight`` and ``ce_activation``.

    Args:
        lambda_dice, lambda_ce: factors of the two terms, >= 0.
        squared: as in :class:`DiceLoss`.
        label_smoothing, ce_activation, class_weight: as in :class:`TverskyCELoss`.
        likelihood_weight, pos_weight, likelihood_include_background: as there.
        options: as in :class:`TverskyLoss`; ``reduction="none"`` gives (B,), each sample's loss as
            if it were alone, not with ``batch``.

    Example:
        >>> import torch, voxfuse
        >>> loss = voxfuse.DiceCELoss(include_background=False)
        >>> loss(torch.zeros(1, 2, 8), torch.ones(1, 8, dtype=torch.uint8))  # 1/3 + log 2
        tensor(1.0265)
    """

    lambda_dice: float = 1.0
    lambda_ce: float = 1.0
    squared: bool = False
    label_smoothing: float = 0.0
    ce_activation: str | None = None

    shown = ("lambda_dice", "lambda_ce")

    def make_recipe(self) -> Recipe:
        scale = number("lambda_dice", self.lambda_dice)
        return _with_cross_entropy(self, dice_coefficients(self.squared), scale)


@declared
class TverskyFocalLoss(BinaryCompoundLoss):
    r"""``lambda_tversky`` x :class:`TverskyLoss` + ``lambda_focal`` x :class:`FocalLoss`.

    No peer has this sum. With ``focal_activation="sigmoid"`` the other defaults equal
    ``monai.losses.DiceFocalLoss(softmax=True, to_onehot_y=True)`` with twice its smoothing terms.

    Args:
        alpha, beta, gamma: of the Tversky term.
        focal_gamma, focal_alpha: gamma and alpha of the focal term; alpha may be one number for
            every class.
        lambda_tversky, lambda_focal: factors of the two terms, >= 0.
        focal_activation: activation of the focal term where it differs from ``activation``.
        class_weight: weights of the classes in the Tversky term alone.
        likelihood_weight, pos_weight: weights (C,) in the focal term, which ``class_weight`` leaves
            unweighted.
        likelihood_include_background: whether class 0 counts in the focal term; by default as
            ``include_background`` says.
        options: as in :class:`TverskyLoss`; ``reduction="none"`` gives (B,), each sample's loss as
            if it were alone, not with ``batch``.

    Example:
        >>> import voxfuse
        >>> voxfuse.TverskyFocalLoss()
        TverskyFocalLoss(alpha=0.5, beta=0.5, focal_gamma=2.0, lambda_tversky=1.0, lambda_focal=1.0)
    """

    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 1.0
    focal_gamma: float = 2.0
    focal_alpha: float | Sequence[float] | None = None
    lambda_tversky: float = 1.0
    lambda_focal: float = 1.0
    focal_activation: str | None = None

    shown = ("alpha", "beta", "focal_gamma", "lambda_tversky", "lambda_focal")

    def make_recipe(self) -> Recipe:
        coefficients = tversky_coefficients(self.alpha, self.beta)
        power = exponent("gamma", self.gamma)
        scale = number("lambda_tversky", self.lambda_tversky)
        return _with_focal(self, coefficients, scale, power)


@declared
class DiceFocalLoss(BinaryCompoundLoss):
    r"""``lambda_dice`` x :class:`DiceLoss` + ``lambda_focal`` x :class:`FocalLoss`.

    With ``focal_activation="sigmoid"`` it equals ``monai.losses.DiceFocalLoss(softmax=True,
    to_onehot_y=True)``.

    Args:
        focal_gamma, focal_alpha, lambda_focal, focal_activation: as in :class:`TverskyFocalLoss`.
        lambda_dice, squared: of the Dice term.
        class_weight, likelihood_weight, pos_weight, likelihood_include_background: as in
            :class:`TverskyFocalLoss`.
        options: as in :class:`TverskyLoss`; ``reduction="none"`` gives (B,), each sample's loss as
            if it were alone, not with ``batch``.

    Example:
        >>> import voxfuse
        >>> voxfuse.DiceFocalLoss()
        DiceFocalLoss(focal_gamma=2.0, lambda_dice=1.0, lambda_focal=1.0)
    """

    focal_gamma: float = 2.0
    focal_alpha: float | Sequence[float] | None = None
    lambda_dice: float = 1.0
    lambda_focal: float = 1.0
    squared: bool = False
    focal_activation: str | None = None

    shown = ("focal_gamma", "lambda_dice", "lambda_focal")

    def make_recipe(self) -> Recipe:
        scale = number("lambda_dice", self.lambda_dice)
        return _with_focal(self, dice_coefficients(self.squared), scale)


@declared
class UnifiedFocalLoss(CompoundLoss):
    r"""Unified focal loss, symmetric or asymmetric (Yeung et al. 2022, arXiv 2102.04525).

    .. math::
        loss = \lambda\; \mathrm{mean}_v\; \delta_c (1-p)^\gamma (-\log p)
            + (1-\lambda)\; \mathrm{mean}_{b,c}\; (1 - TI)^{1-\gamma}

    with TI weighing false negatives by delta and false positives by 1 - delta, and
    :math:`\delta_c` delta for the foreground classes and 1 - delta for the background. In the
    asymmetric form the two exponents are for rare foreground: only the background's likelihood is
    suppressed by :math:`(1-p)^\gamma`, and only the foreground's overlap terms have the exponent
    :math:`1-\gamma`, the background's has 1.

    The defaults are the paper's; ``docs/differences.md`` has the arguments and the factor that make
    it ``monai.losses.AsymmetricUnifiedFocalLoss``.

    Args:
        balance: lambda, in [0, 1].
        delta: in [0, 1].
        gamma: in [0, 1).
        symmetric: False for the asymmetric form; it needs a softmax (or probabilities) with class
            0 the background.
        options: as in :class:`TverskyLoss`; ``reduction="none"`` gives (B,), each sample's loss as
            if it were alone, not with ``batch``.

    Example:
        >>> import voxfuse
        >>> voxfuse.UnifiedFocalLoss()
        UnifiedFocalLoss(balance=0.5, delta=0.6, gamma=0.5)
    """

    balance: float = 0.5
    delta: float = 0.6
    gamma: float = 0.5
    symmetric: bool = True

    shown = ("balance", "delta", "gamma")

    def make_recipe(self) -> Recipe:
        balance = number("balance", self.balance, 0.0, 1.0)
        delta = number("delta", self.delta, 0.0, 1.0)
        gamma = number("gamma", self.gamma)
        if gamma >= 1:
            raise ValueError(f"gamma: got {gamma}, expected a number in [0, 1)")
        if not self.symmetric and self.activation == "sigmoid":
            raise ValueError("symmetric: False needs one softmax over background and foreground")
        part = likelihood_options(
            self.activation,
            scale=balance,
            gamma=gamma,
            alpha=delta,
            include_background=_background(self),
            mean="voxels",
            reduction=_reduction(self),
            # The background alone is suppressed in the likelihood, the foreground alone enhanced
            # in the overlap.
            focal_classes=None if self.symmetric else 1,
        )
        return overlap_recipe(
            self,
            *tversky_coefficients(1 - delta, delta),
            1 - gamma,
            exponent_from=0 if self.symmetric else 1,
            scale=1 - balance,
            likelihood=part,
        )
