"""Losses from a ratio of soft counts: Tversky, F_beta, Dice, Jaccard and their kin."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from voxfuse.losses.declared import declared
from voxfuse.losses.matthews import MatthewsOptions
from voxfuse.losses.module import OverlapLoss
from voxfuse.losses.options import exponent, number
from voxfuse.losses.plan import Recipe, overlap_recipe

#: Of the sums, in the numerator and in the denominator of a ratio.
Coefficients = tuple[Sequence[float], Sequence[float]]


def tversky_coefficients(alpha: float, beta: float) -> Coefficients:
    """TP / (TP + alpha FP + beta FN)."""
    return (1.0,), (1.0, number("alpha", alpha), number("beta", beta))


def dice_coefficients(squared: bool) -> Coefficients:
    """2 TP over (predicted + true volume), or over the sums of squares."""
    return (2.0,), ((0.0,) * 5 + (1.0, 1.0) if squared else (2.0, 1.0, 1.0))


def jaccard_coefficients(squared: bool) -> Coefficients:
    """TP over the union, or over (sums of squares - TP)."""
    return (1.0,), ((-1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0) if squared else (1.0, 1.0, 1.0))


@declared
class TverskyLoss(OverlapLoss):
    r"""Tversky loss: overlap with separate prices for false positives and false negatives.

    With the soft counts TP, FP, FN of every sample and class (over the pooled batch with
    ``batch``),

    .. math::
        TI = \frac{TP + s_n}{TP + \alpha\,FP + \beta\,FN + s_d}, \qquad
        loss = \mathrm{mean}_{b,c}\; \omega_c\,(1 - TI)^\gamma

    (Salehi, Erdogmus, Gholipour 2017, arXiv 1706.05721). alpha weighs false positives, beta false
    negatives. alpha = beta = 1/2 is soft Dice, alpha = beta = 1 soft Jaccard. The defaults equal
    ``monai.losses.TverskyLoss(softmax=True, to_onehot_y=True)``.

    One pass over the voxels forward, one backward; nothing volume-sized is kept but the logits and
    the target themselves. The counts are summed in float64, so pure float16 logits are safe. The
    loss is float32 (float64 for float64 logits).

    Args:
        alpha: weight of the false positives, >= 0.
        beta: weight of the false negatives, >= 0.
        gamma: exponent of the term, > 0 (focal Tversky); its slope at a perfect prediction is 0.
        activation: "softmax", "sigmoid", or "none" for an input of probabilities.
        include_background: whether class 0 counts.
        smooth_nr, smooth_dr: added to the numerator and to the denominator.
        class_weight: weights of the classes that count (C, or C - 1 without background), or one
            number. The mean stays the plain mean of the weighted terms. One for every sample too,
            (B, C), says which class is annotated in which sample: a weight of 0 takes the class's
            term there out of the loss, with ``batch`` the sample's counts out of the class's pooled
            ones (whose term has the mean of the other weights), and with ``absent="ignore"`` the
            term out of the mean. The softmax still has the class.
        batch: pool the counts over the batch before the ratio.
        reduction: "mean", "sum", or "none" for (B, C) terms ((C,) with ``batch``).
        ignore_index: voxels with this label do not count.
        absent: classes with no target volume in a sample: "keep" them, "ignore" them (not in the
            mean either) or make their term "zero".
        log: ``-log(TI)`` in place of ``(1 - TI)^gamma``.
        overlap: "product", or "min" for min(p, g) in place of p g, which is right for soft
            targets (MONAI's ``soft_label``).
        unlabelled: what becomes of classes that the call's ``annotated`` (B, C) says are not
            annotated in a sample: "exclude" them from its softmax, or count them as "background"
            (softmax only); the formulas are in :func:`voxfuse.soft_confusion`. Their terms are 0;
            with ``absent="ignore"`` they do not count in the mean either.
        process_group: sum the counts over these ranks: None, "world" (resolved at the first
            forward) or a process group. With ``batch`` the loss is that of the global batch;
            without, the ranks hold parts of the same samples (a volume split along space).
        ddp_average: multiply the gradient by the number of ranks, which undoes the averaging of
            DistributedDataParallel.
        backend: "auto", "cpp", "cuda", "triton" or "reference".

    Shapes: input (B, C, \*spatial), any number of spatial axes; target labels (B, [1,] \*spatial)
    of any integer type (or integers held in floats), or dense (B, C, \*spatial); with C = 1 the
    foreground indicator. Optional third argument of the call: voxel weights or a mask
    (B, [1,] \*spatial), applied after the activation; and by name ``annotated``, bool (B, C):
    which classes are annotated in which sample, all of them if it is not given.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch, voxfuse
        >>> loss = voxfuse.TverskyLoss(alpha=0.3, beta=0.7)
        >>> logits = torch.zeros(1, 2, 4, 4, 4, requires_grad=True)
        >>> labels = torch.ones(1, 4, 4, 4, dtype=torch.uint8)
        >>> loss(logits, labels)  # class 0: TI = 0; class 1: TI = 32 / (32 + 0.7 * 32)
        tensor(0.7059, grad_fn=<_FusedBackward>)
    """

    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 1.0

    shown: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    def make_recipe(self) -> Recipe:
        coefficients = tversky_coefficients(self.alpha, self.beta)
        return overlap_recipe(self, *coefficients, exponent("gamma", self.gamma))


@declared
class FBetaLoss(OverlapLoss):
    r"""One minus F_beta, the asymmetric similarity loss (Hashemi et al. 2018, arXiv 1803.11078).

    .. math::
        F_\beta = \frac{(1 + \beta^2)\,TP}{(1 + \beta^2)\,TP + FP + \beta^2 FN}

    It is :class:`TverskyLoss` with alpha = 1/(1+beta^2) and beta = beta^2/(1+beta^2): beta > 1
    favours recall. The default 1.5 is the paper's best; no peer has this loss.

    Args:
        beta: weight of recall over precision, >= 0.
        gamma: exponent of the term.
        options: as in :class:`TverskyLoss`.

    Example:
        >>> import voxfuse
        >>> voxfuse.FBetaLoss(beta=2.0)
        FBetaLoss(beta=2.0)
    """

    beta: float = 1.5
    gamma: float = 1.0

    shown = ("beta",)

    def make_recipe(self) -> Recipe:
        square = number("beta", self.beta) ** 2
        coefficients = tversky_coefficients(1 / (1 + square), square / (1 + square))
        return overlap_recipe(self, *coefficients, exponent("gamma", self.gamma))


@declared
class FocalTverskyLoss(TverskyLoss):
    r"""Focal Tversky loss :math:`(1 - TI)^\gamma` (Abraham, Khan 2018, arXiv 1810.07842).

    :class:`TverskyLoss` with other defaults: alpha 0.3, beta 0.7 and gamma 0.75, the exponent of
    the authors' code (their text writes 1/gamma with gamma = 4/3). The slope at a perfect
    prediction is taken as 0; near one it is right, because 1 - TI is never a difference.

    Args:
        alpha, beta, gamma, options: as in :class:`TverskyLoss`.

    Example:
        >>> import voxfuse
        >>> voxfuse.FocalTverskyLoss()
        FocalTverskyLoss(alpha=0.3, beta=0.7, gamma=0.75)
    """

    alpha: float = 0.3
    beta: float = 0.7
    gamma: float = 0.75

    shown = ("alpha", "beta", "gamma")


@declared
class DiceLoss(OverlapLoss):
    r"""Soft Dice loss.

    .. math::
        loss = \mathrm{mean}_{b,c}\; 1 - \frac{2\,TP + s_n}{2\,TP + FP + FN + s_d}

    or, with ``squared``, over :math:`\sum p^2 + \sum g^2` (Milletari et al. 2016, V-Net). The
    defaults equal ``monai.losses.DiceLoss(softmax=True, to_onehot_y=True)``.

    Args:
        squared: sums of squares in the denominator.
        options: as in :class:`TverskyLoss`.

    Example:
        >>> import torch, voxfuse
        >>> probabilities = torch.tensor([[[0.75, 0.25]]])
        >>> loss = voxfuse.DiceLoss(activation="none", smooth_nr=0, smooth_dr=0)
        >>> loss(probabilities, torch.tensor([[[1, 0]]]))
        tensor(0.2500)
    """

    squared: bool = dataclasses.field(default=False, kw_only=True)

    def make_recipe(self) -> Recipe:
        return overlap_recipe(self, *dice_coefficients(self.squared))


@declared
class JaccardLoss(OverlapLoss):
    r"""Soft Jaccard (intersection over union) loss.

    .. math::
        loss = \mathrm{mean}_{b,c}\; 1 - \frac{TP + s_n}{TP + FP + FN + s_d}

    or, with ``squared``, over :math:`\sum p^2 + \sum g^2 - TP`. Equals
    ``monai.losses.TverskyLoss(alpha=1, beta=1)``, and ``monai.losses.DiceLoss(jaccard=True)``
    with half of its smoothing terms.

    Args:
        squared: sums of squares in the denominator.
        options: as in :class:`TverskyLoss`.

    Example:
        >>> import voxfuse
        >>> voxfuse.JaccardLoss(activation="sigmoid")
        JaccardLoss(activation='sigmoid')
    """

    squared: bool = dataclasses.field(default=False, kw_only=True)

    def make_recipe(self) -> Recipe:
        return overlap_recipe(self, *jaccard_coefficients(self.squared))


@declared
class GeneralizedDiceLoss(OverlapLoss):
    r"""Generalised Dice loss (Sudre et al. 2017, arXiv 1707.03237).

    .. math::
        loss = \mathrm{mean}_b\; 1 - \frac{2 \sum_c w_c TP_c + s_n}
            {\sum_c w_c (2\,TP_c + FP_c + FN_c) + s_d}, \qquad w_c = 1 / G_c^2

    with G the target volume. An absent class (infinite weight) takes the largest finite weight of
    its sample; where no class at all is present all weights are 1, so that false positives still
    cost. But for that the defaults equal ``monai.losses.GeneralizedDiceLoss``.

    Args:
        class_pooling: "square" 1/G^2, "simple" 1/G or "uniform" 1.
        options: as in :class:`TverskyLoss`; ``class_weight`` multiplies w, ``absent="ignore"``
            gives absent classes weight 0, and ``reduction="none"`` returns (B,).

    Example:
        >>> import voxfuse
        >>> voxfuse.GeneralizedDiceLoss("simple")
        GeneralizedDiceLoss(class_pooling='simple')
    """

    class_pooling: str = "square"

    shown = ("class_pooling",)

    def make_recipe(self) -> Recipe:
        if self.class_pooling == "none":
            raise ValueError("class_pooling: got 'none', expected 'uniform', 'simple' or 'square'")
        coefficients = dice_coefficients(False)
        return overlap_recipe(self, *coefficients, class_pooling=self.class_pooling)


@declared
class MCCLoss(OverlapLoss):
    r"""One minus the Matthews correlation of soft counts (Abhishek, Hamarneh 2021, ISBI).

    .. math::
        loss = \mathrm{mean}_{b,c}\; 1 - \frac{TP\,TN - FP\,FN + s_n}
            {\sqrt{(TP+FP)(TP+FN)(TN+FP)(TN+FN) + s_d}}

    with TN = W - TP - FP - FN and W the sum of the voxels' weights: the one loss here to which
    the voxels count that are neither predicted nor true. 0 is agreement, 1 chance, 2 the opposite.
    The defaults equal ``monai.losses.MCCLoss(softmax=True, to_onehot_y=True)``.

    Where a class fills a sample or is not in it, or its prediction does, the correlation is 0/0. It
    counts as chance, a term of 1 (1 - s_n / sqrt(s_d) with both smoothing terms), unless FP and FN
    are exactly 0: then the term is 0. An absent class thus adds a constant without a gradient,
    however few its false positives; ``absent="ignore"`` leaves it out. The slope at a root of 0
    and at a perfect prediction is taken as 0. Near a perfect prediction the loss keeps its
    relative precision: it is not computed as a difference from 1.

    Args:
        absent: as in :class:`TverskyLoss`, also for a class that fills the sample.
        log: not of this loss, whose correlation may be negative.
        options: as in :class:`TverskyLoss`.

    Example:
        >>> import torch, voxfuse
        >>> p = torch.tensor([[[0.75, 0.25, 0.25, 0.25]]])
        >>> voxfuse.MCCLoss(activation="none")(p, torch.tensor([[[1, 0, 0, 0]]])).round(decimals=4)
        tensor(0.5528)
    """

    _: dataclasses.KW_ONLY
    smooth_nr: float = 0.0

    def make_recipe(self) -> Recipe:
        if self.log:
            raise ValueError("log: got True, expected False; a correlation may be negative")
        recipe = overlap_recipe(self, (), ())
        assert recipe.ratio is not None
        recipe.ratio = MatthewsOptions(*recipe.ratio)
        return recipe
