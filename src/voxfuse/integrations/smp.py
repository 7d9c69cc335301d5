"""segmentation-models-pytorch's losses on the fused operators, for any number of spatial axes.

    from voxfuse.integrations.smp import TverskyLoss  # instead of smp.losses

Signatures and semantics are those of the installed smp, 0.5 or 0.6 (without one, of 0.6). Version
0.6 has ``class_weights``, moved arguments of ``FocalLoss`` and ``JaccardLoss``, and takes the mean
over the classes in the focal loss where 0.5 adds them up. Labels are read in the dtype they come
in. What the kernels cannot do (a focal loss of soft targets, ``normalized``,
``reduced_threshold``, ``reduction="none"``) is computed by PyTorch. ``docs/differences.md`` says
where the numbers and errors differ.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.loss import _Loss

from voxfuse.contract import Absent, Activation, Normaliser, Overlap, RatioOptions, Reduction
from voxfuse.integrations.lowering import (
    LabelError,
    Voxels,
    from_sums,
    fused_loss,
    ignored,
    is_binary,
    plain,
    ratio_of,
    requires_grad,
    sums,
)
from voxfuse.losses.declared import Declared, declared
from voxfuse.losses.functional import lovasz_hinge_loss, lovasz_softmax_loss
from voxfuse.losses.options import refuse_gradients
from voxfuse.losses.plan import Likelihood, class_weights

__all__ = ["DiceLoss", "FocalLoss", "JaccardLoss", "LovaszLoss", "TverskyLoss"]

BINARY_MODE = "binary"
MULTICLASS_MODE = "multiclass"
MULTILABEL_MODE = "multilabel"
MODES = {BINARY_MODE, MULTICLASS_MODE, MULTILABEL_MODE}


def _installed() -> tuple[int, ...]:
    """Major and minor version of the installed smp, or the newest that is known."""
    try:
        version = importlib.metadata.version("segmentation-models-pytorch")
    except importlib.metadata.PackageNotFoundError:
        return (0, 6)
    return tuple(int(part) for part in version.split(".")[:2])


CPU = torch.device("cpu")
SINCE_06 = _installed() >= (0, 6)


def _predictions(y_pred: Tensor) -> Tensor:
    y_pred = plain(y_pred)
    return y_pred if y_pred.is_floating_point() else y_pred.float()


def _check_layout(y_pred: Tensor, y_true: Tensor, channels: bool) -> None:
    """Raise unless both hold the same voxels in the same order, possibly flattened.

    smp compares how many there are, and so takes transposed images and channels that come last.
    """
    if y_true.shape == y_pred.shape or y_true.shape == y_pred.shape[:1] + y_pred.shape[2:]:
        return
    if torch.compiler.is_compiling():
        return
    predicted = y_pred.shape if channels else y_pred.shape[:1] + y_pred.shape[2:]
    ends, own = (set(itertools.accumulate(x, operator.mul)) for x in (predicted, y_true.shape))
    # Joining neighbouring axes takes ends away and moves none.
    same_order = own <= ends | {1} or (y_pred.ndim <= 3 and ends <= own | {1})
    same_batch = y_true.ndim < 2 or y_true.shape[0] == y_pred.shape[0]
    if y_true.numel() == math.prod(predicted) and not (same_order and same_batch):
        raise ValueError(
            f"y_true: got shape {tuple(y_true.shape)}, expected {tuple(predicted)} to go with "
            f"y_pred of shape {tuple(y_pred.shape)}; it has as many voxels in another order"
        )


def _excluding(target: Tensor, ignore_index: int | None) -> tuple[Tensor | None, int | None]:
    """Weight and ignore_index for the operator, which truncates floats of a single channel."""
    if ignore_index == 0 and target.is_floating_point():
        return target != 0, None
    return None, ignore_index


def _kept(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else values[kept]


class _Moded(Declared, _Loss):
    mode: str
    ignore_index: int | None = None
    class_weights: Any = None

    def set_up(self, *args: Any, **options: Any) -> None:
        assert options["mode"] in MODES
        self.reduction = "mean"
        super().set_up(**options)
        if self.class_weights is None:
            return
        if self.mode == BINARY_MODE:
            raise ValueError("class_weights are not supported with mode=binary")
        self.class_weights = torch.as_tensor(self.class_weights, dtype=torch.float64)

    def _class_weights(self, channels: int, chosen: Tensor | None = None) -> Tensor | None:
        """The weights of the chosen classes as shares of 1; one class may be chosen twice."""
        if self.class_weights is None:
            return None
        weight = class_weights("class_weights", self.class_weights.cpu(), channels, CPU)
        assert weight is not None
        weight = weight if chosen is None else weight[chosen]
        total = weight.sum()
        if not torch.compiler.is_compiling() and total == 0:
            raise ValueError(f"class_weights: those of the classes add up to 0: {weight.tolist()}")
        return weight / total


class _OverlapLoss(_Moded):
    """Tversky, Dice and Jaccard, pooled over the batch, with min(p, g) for p g as in smp."""

    alpha: float = 0.5
    beta: float = 0.5
    classes: Any
    log_loss: bool
    from_logits: bool
    smooth: float
    eps: float

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "gamma":  # which is PyTorch's, after the operator
            refuse_gradients(name, value)
        super().__setattr__(name, value)

    def set_up(self, *args: Any, **options: Any) -> None:
        super().set_up(**options)
        if self.classes is not None:
            assert self.mode != BINARY_MODE, "Masking classes is not supported with mode=binary"
            if isinstance(self.classes, (list, tuple, np.ndarray, Tensor)):
                self.classes = torch.as_tensor(self.classes).to(torch.long)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Return the loss.

        Args:
            y_pred: (N, C, *spatial), logits unless ``from_logits`` is off.
            y_true: (N, *spatial); (N, C, *spatial) in mode "multilabel".
        """
        assert y_true.size(0) == y_pred.size(0)
        y_pred, y_true = _predictions(y_pred), plain(y_true)
        _check_layout(y_pred, y_true, self.mode != MULTICLASS_MODE)
        multiclass = self.mode == MULTICLASS_MODE
        activation = Activation.none
        if self.from_logits:
            activation = Activation.softmax if multiclass else Activation.sigmoid
        if multiclass:
            return self._aggregate(self._multiclass(y_pred, y_true, activation))
        samples, channels = y_pred.shape[0], y_pred.shape[1] if self.mode != BINARY_MODE else 1
        input = y_pred.reshape(samples, channels, -1)
        target = y_true.reshape(samples, channels, -1)
        input = self._aligned(input, target)
        return self._aggregate(self._channels(input, target, activation))

    def _multiclass(self, y_pred: Tensor, y_true: Tensor, activation: int) -> Tensor:
        samples, classes = y_pred.shape[:2]
        input = y_pred.unsqueeze(-1) if y_pred.ndim == 2 else y_pred.flatten(2)
        labels = y_true.reshape(samples, -1)
        input = self._aligned(input, labels.unsqueeze(1))
        if classes == 1:
            return self._one_class(input, labels, activation)
        voxels = Voxels(input, labels, None, activation, Overlap.min, self.ignore_index)
        return fused_loss(voxels, self._ratio(), class_weight=self._shares(classes))

    def _one_class(self, input: Tensor, labels: Tensor, activation: int) -> Tensor:
        """A softmax over one class is 1 everywhere."""
        if activation == Activation.softmax:
            input = input.softmax(1)
        valid = None if self.ignore_index is None else labels != self.ignore_index
        foreground = labels == 0
        if input.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ~foreground if valid is None else ~foreground & valid
            if bool(wrong.any()):
                raise LabelError(f"target: label {int(labels[wrong][0])} is outside [0, 1)")
        voxels = Voxels(input, foreground.unsqueeze(1), valid, Activation.none, Overlap.min)
        return fused_loss(voxels, self._ratio(), class_weight=self._shares(1))

    def _channels(self, input: Tensor, target: Tensor, activation: int) -> Tensor:
        """(N, C, V) predictions and targets, every channel with its own ignored voxels."""
        samples, channels, count = input.shape
        ratio, shares = self._ratio(), self._shares(channels)
        if channels > 1 and self.ignore_index is None:
            voxels = Voxels(input, target, None, activation, Overlap.min)
            return fused_loss(voxels, ratio, class_weight=shares)
        rows = (samples * channels, 1, count)
        weight, ignore_index = _excluding(target, self.ignore_index)
        if weight is not None:
            weight = weight.reshape(rows)
        voxels = Voxels(
            input.reshape(rows), target.reshape(rows), weight, activation, Overlap.min, ignore_index
        )
        if channels == 1:
            return fused_loss(voxels, ratio, class_weight=shares)
        stats = sums(voxels, full=False)
        pooled = stats.reshape(samples, channels, -1)
        return from_sums(pooled, Voxels(input, target), ratio, None, shares)

    def _aligned(self, input: Tensor, target: Tensor) -> Tensor:
        """The predictions of the target's size, which smp's mask may broadcast."""
        if self.ignore_index is not None and input.shape[::2] != target.shape[::2]:
            mask = (target.shape[0], 1, target.shape[2])
            input = input.expand(torch.broadcast_shapes(input.shape, mask))
        assert input.shape[::2] == target.shape[::2]
        return input

    def _ratio(self) -> RatioOptions:
        weighted = isinstance(self.classes, Tensor) or self.class_weights is not None
        return ratio_of(
            (1.0,),
            (1.0, float(self.alpha), float(self.beta)),
            float(self.smooth),
            float(self.smooth),
            float(self.eps),
            log=bool(self.log_loss),
            batch=True,
            absent=Absent.zero,
            reduction=Reduction.sum if weighted else Reduction.mean,
        )

    def _shares(self, channels: int) -> Tensor | None:
        """The weights that make a sum ``loss[classes].mean()``; a class may be chosen twice."""
        if not isinstance(self.classes, Tensor):
            return self._class_weights(channels)
        chosen = self.classes.cpu()
        weight = torch.zeros(channels, dtype=torch.float64)
        share = self._class_weights(channels, chosen)
        if share is None:
            share = torch.full(chosen.shape, 1 / max(chosen.numel(), 1), dtype=torch.float64)
        return weight.index_put((chosen,), share, accumulate=True)

    def _aggregate(self, loss: Tensor) -> Tensor:
        return loss


@declared
class DiceLoss(_OverlapLoss):
    r"""smp's DiceLoss in one pass over the voxels.

    .. math::
        loss = \mathrm{mean}_c\; [G_c > 0] \Bigl(1 - \frac{TP + s}
            {\max(TP + FP / 2 + FN / 2 + s,\; \epsilon)}\Bigr)

    or the negative logarithm of the ratio with ``log_loss``. Classes without a voxel in the target
    count as 0. ``class_weights`` (smp 0.6) make of the mean a weighted one, with weights that need
    not add up to 1.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.smp import DiceLoss
        >>> DiceLoss("binary")(torch.zeros(1, 1, 8, 8), torch.ones(1, 8, 8, dtype=torch.long))
        tensor(0.3333)
    """

    mode: str
    classes: list[int] | None = None
    log_loss: bool = False
    from_logits: bool = True
    smooth: float = 0.0
    ignore_index: int | None = None
    eps: float = 1e-7
    if SINCE_06:
        class_weights: list[float] | None = None


@declared
class TverskyLoss(DiceLoss):
    r"""smp's TverskyLoss in one pass over the voxels: :class:`DiceLoss` with alpha and beta.

    .. math::
        loss = \Bigl(\mathrm{mean}_c\; [G_c > 0] \Bigl(1 - \frac{TP + s}
            {\max(TP + \alpha FP + \beta FN + s,\; \epsilon)}\Bigr)\Bigr)^\gamma

    Example:
        >>> import torch
        >>> from voxfuse.integrations.smp import TverskyLoss
        >>> loss = TverskyLoss("binary", alpha=0.3, beta=0.7)
        >>> loss(torch.zeros(1, 1, 8, 8), torch.ones(1, 8, 8, dtype=torch.long))
        tensor(0.4118)
    """

    mode: str
    classes: list[int] | None = None
    log_loss: bool = False
    from_logits: bool = True
    smooth: float = 0.0
    ignore_index: int | None = None
    eps: float = 1e-7
    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 1.0
    if SINCE_06:
        class_weights: list[float] | None = None

    def _aggregate(self, loss: Tensor) -> Tensor:
        if self.gamma == 1:
            return loss
        flat = loss == 0
        result: Tensor = (loss.masked_fill(flat, 1) ** self.gamma).masked_fill(flat, 0)
        return result


@declared
class JaccardLoss(_OverlapLoss):
    """smp's JaccardLoss in one pass over the voxels: :class:`TverskyLoss` with alpha = beta = 1.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.smp import JaccardLoss
        >>> JaccardLoss("binary")(torch.zeros(1, 1, 8, 8), torch.ones(1, 8, 8, dtype=torch.long))
        tensor(0.5000)
    """

    alpha = 1.0
    beta = 1.0

    mode: str
    classes: list[int] | None = None
    log_loss: bool = False
    from_logits: bool = True
    smooth: float = 0.0
    if SINCE_06:
        ignore_index: int | None = None
    eps: float = 1e-7
    if SINCE_06:
        class_weights: list[float] | None = None


@declared
class FocalLoss(_Moded):
    r"""smp's FocalLoss in one pass over the voxels.

    .. math::
        loss = \mathrm{mean}\; \alpha\, g\, (1-p)^\gamma (-\log p)
            + (1-\alpha)(1-g)\, p^\gamma (-\log(1-p))

    with p the sigmoid of every channel's logit; in mode "multiclass" the classes' means are
    averaged, with ``class_weights`` where there are any (smp 0.5: added up); a voxel whose label
    has no class is in none of them (on a GPU it counts as ignored). ``from_logits=False`` (smp
    0.6) reads probabilities, and makes p of their logits, in mode "multiclass" of their logarithms.
    Soft targets, ``normalized``, ``reduced_threshold`` and reductions other than "mean", "sum" and
    "batchwise_mean" are computed by PyTorch.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.smp import FocalLoss
        >>> FocalLoss("binary")(torch.zeros(1, 1, 8, 8), torch.ones(1, 8, 8))
        tensor(0.1733)
    """

    mode: str
    alpha: float | None = None
    gamma: float | None = 2.0
    ignore_index: int | None = None
    if SINCE_06:
        from_logits: bool = True
        eps: float = 1e-7
    reduction: Any = "mean"
    normalized: bool = False
    reduced_threshold: float | None = None
    if SINCE_06:
        class_weights: list[float] | None = None

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Return the loss of logits (N, C, *spatial) and targets as in :class:`DiceLoss`."""
        y_pred, y_true = _predictions(y_pred), plain(y_true)
        _check_layout(y_pred, y_true, self.mode != MULTICLASS_MODE)
        if SINCE_06 and not self.from_logits:
            y_pred = self._logits(y_pred)
        if self.mode == MULTICLASS_MODE:
            return self._multiclass(y_pred, y_true)
        if SINCE_06 and self.mode == MULTILABEL_MODE:
            return self._multilabel(y_pred, y_true)
        self._check_sizes(torch.Size([y_pred.numel()]), torch.Size([y_true.numel()]))
        return self._flat(y_pred.reshape(1, 1, -1), y_true.reshape(1, 1, -1))

    def _logits(self, probabilities: Tensor) -> Tensor:
        """What smp takes for logits of probabilities, in float32 at least."""
        if probabilities.dtype in (torch.float16, torch.bfloat16):
            probabilities = probabilities.float()
        p = probabilities.clamp(self.eps, 1 - self.eps)
        return p.log() if self.mode == MULTICLASS_MODE else (p / (1 - p)).log()

    def _flat(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of one channel (N, 1, V), or of several that count as one."""
        weight, ignore_index = _excluding(target, self.ignore_index)
        if not self._readable(target):
            return self._composed(input.flatten(), target.flatten())
        voxels = Voxels(input, target, weight, Activation.sigmoid, ignore_index=ignore_index)
        return fused_loss(voxels, None, self._likelihood())

    def _readable(self, target: Tensor) -> bool:
        # Between 0 and 1 smp's formula is not the sum of the two terms.
        linear = self.gamma == 0 and self.alpha is None
        return self._fused() and (linear or is_binary(target, self.ignore_index))

    def _multilabel(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """smp 0.6: the mean of the classes' losses."""
        samples, classes = y_pred.shape[:2]
        self._check_sizes(*(x.shape[:1] + x.shape[2:] for x in (y_pred, y_true)))
        if y_true.shape[1] != classes:
            raise IndexError(f"y_true: got {y_true.shape[1]} channels, expected {classes}")
        over_batch = self.reduction == "batchwise_mean" and self.ignore_index is None
        if over_batch or not self._readable(y_true):
            return self._class_by_class(y_pred, y_true)
        input, target = (x.reshape(samples, classes, -1) for x in (y_pred, y_true))
        if self.ignore_index is None:
            voxels = Voxels(input, target, None, Activation.sigmoid)
            return fused_loss(voxels, None, self._likelihood(classes))
        # Each class has voxels of its own that are ignored, and so a mean of its own.
        channels = zip(input.split(1, 1), target.split(1, 1), strict=True)
        return self._over_classes([self._flat(x, g) for x, g in channels])

    def _multiclass(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        single = torch.Size((y_pred.shape[0], *y_pred.shape[2:]))
        self._check_sizes(single, y_true.shape)
        classes = y_pred.shape[1]
        # Without ignored voxels smp sums over the batch only here.
        over_batch = self.reduction == "batchwise_mean" and self.ignore_index is None
        if over_batch or not self._fused():
            return self._class_by_class(y_pred, y_true)
        target, weight, ignore_index = y_true, None, self.ignore_index
        if classes == 1:
            # A single channel's target is the indicator of its class.
            target = y_true == 0
            weight = None if ignore_index is None else y_true != ignore_index
            ignore_index = None
        voxels = Voxels(y_pred, target, weight, Activation.sigmoid, ignore_index=ignore_index)
        try:
            return fused_loss(voxels, None, self._likelihood(classes))
        except LabelError:  # to smp a voxel that is of no class
            return self._class_by_class(y_pred, y_true)

    def _check_sizes(self, predicted: torch.Size, actual: torch.Size) -> None:
        if predicted == actual:
            return
        if self.ignore_index is not None:
            raise IndexError(
                f"The shape of the mask {list(actual)} does not match the shape of the indexed "
                f"tensor {list(predicted)}"
            )
        raise ValueError(f"Target size ({actual}) must be the same as input size ({predicted})")

    def _fused(self) -> bool:
        return (
            self.reduction in ("mean", "sum", "batchwise_mean")
            and not self.normalized
            and self.reduced_threshold is None
            and self.gamma is not None
            and 0 <= self.gamma < math.inf
            and not requires_grad(self.alpha, self.gamma)
        )

    def _likelihood(self, classes: int | None = None) -> Likelihood:
        """Of one channel, or of the classes as they are summed up."""
        assert self.gamma is not None
        on, off = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
        normaliser = Normaliser.voxels if self.reduction == "mean" else Normaliser.one
        likelihood = Likelihood(Activation.sigmoid, on, off, normaliser, self.gamma)
        if classes is None or not SINCE_06:
            return likelihood
        share = self._class_weights(classes)
        if share is None:
            return likelihood.scaled(1 / classes)
        return likelihood._replace(on_weight=share, off_weight=share)

    def _class_by_class(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        losses = []
        for c in range(y_pred.shape[1]):
            target = y_true == c if self.mode == MULTICLASS_MODE else y_true[:, c]
            labels = y_true if self.mode == MULTICLASS_MODE else target
            kept = None if self.ignore_index is None else labels != self.ignore_index
            losses.append(self._voxelwise(*(_kept(x, kept) for x in (y_pred[:, c], target))))
        return self._over_classes(losses)

    def _over_classes(self, losses: list[Tensor]) -> Tensor:
        if not SINCE_06:
            return torch.stack(losses).sum(0)
        share = self._class_weights(len(losses))
        means = torch.stack([loss.mean() for loss in losses])
        return means.mean() if share is None else (means * share.to(means)).sum()

    def _composed(self, input: Tensor, target: Tensor) -> Tensor:
        kept = None if self.ignore_index is None else target != self.ignore_index
        return self._voxelwise(_kept(input, kept), _kept(target, kept))

    def _voxelwise(self, input: Tensor, target: Tensor) -> Tensor:
        """Voxel by voxel in PyTorch."""
        if input.dtype in (torch.float16, torch.bfloat16):
            input = input.float()
        g = target.to(input.dtype)
        entropy = F.binary_cross_entropy_with_logits(input, g, reduction="none")
        missed = -torch.expm1(-entropy)
        gamma: Any = self.gamma
        if self.reduced_threshold is None:
            focus = missed**gamma
        else:
            focus = (missed / self.reduced_threshold) ** gamma
            focus = focus.masked_fill(1 - missed < self.reduced_threshold, 1)
        loss = focus * entropy
        if self.alpha is not None:
            loss = loss * (self.alpha * g + (1 - self.alpha) * (1 - g))
        if self.normalized:
            loss = loss / focus.sum().clamp_min(1e-6)
        if self.reduction == "mean":
            loss = loss.mean()
        elif self.reduction == "sum":
            loss = loss.sum()
        elif self.reduction == "batchwise_mean":
            loss = loss.sum(0)
        result: Tensor = loss
        return result


@declared
class LovaszLoss(_Moded):
    """smp's LovaszLoss: the Lovász hinge, or the Lovász softmax of the classes present.

    One class is sorted at a time; see :class:`voxfuse.LovaszLoss`. ``from_logits`` changes nothing,
    as in smp.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.smp import LovaszLoss
        >>> LovaszLoss("binary")(torch.zeros(1, 1, 8, 8), torch.ones(1, 8, 8))
        tensor(1.)
    """

    mode: str
    per_image: bool = False
    ignore_index: int | None = None
    from_logits: bool = True

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Return the loss of logits (N, C, *spatial) and targets as in :class:`DiceLoss`."""
        y_pred, y_true = _predictions(y_pred), plain(y_true)
        _check_layout(y_pred, y_true, self.mode != MULTICLASS_MODE)
        if self.mode == MULTICLASS_MODE:
            if y_true.ndim < y_pred.ndim or y_true.shape[1] != 1 or y_pred.shape[1] == 1:
                y_true = y_true.reshape(y_pred.shape[0], *y_pred.shape[2:])
            ignore_index = ignored(Voxels(y_pred, y_true, ignore_index=self.ignore_index))
            return lovasz_softmax_loss(
                y_pred, y_true, per_image=self.per_image, ignore_index=ignore_index
            )
        images = y_pred.shape[0] if self.per_image else 1
        input, target = y_pred.reshape(images, 1, -1), y_true.reshape(images, 1, -1)
        weight, ignore_index = _excluding(target, self.ignore_index)
        ignore_index = ignored(Voxels(input, target, weight, ignore_index=ignore_index))
        return lovasz_hinge_loss(
            input, target, weight, per_image=self.per_image, ignore_index=ignore_index
        )
