"""What the adapters share: one pass over the voxels and the small epilogue behind it.

An adapter translates its peer's options into :class:`Voxels` (what is read, and how),
:class:`Ratio` and :class:`Likelihood` (what becomes of the sums).
"""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from voxfuse.contract import Absent, Activation, ClassPooling, Normaliser, Overlap, Reduction, Sum
from voxfuse.losses._engine import Weights, class_weights, run
from voxfuse.losses._ranks import Ranks, sum_over_ranks
from voxfuse.losses._recipe import Plan
from voxfuse.ops import _checks
from voxfuse.ops.ratio_loss import ratio_loss
from voxfuse.ops.soft_confusion import soft_confusion

#: Columns of the sums.
TP, FP, FN, NLL, OFF, P2, G2, W = Sum

#: No clamp on the denominator, which predictions below 0 can make negative.
LOWEST = -sys.float_info.max

#: Elements of a float target looked at in one go.
_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 22}


class LabelError(ValueError, RuntimeError, IndexError):
    """A label that no class has.

    A RuntimeError where the peers' one-hot encoding fails, an IndexError where PyTorch's
    cross-entropy does.
    """


class Voxels(NamedTuple):
    """The arguments of the pass over the voxels."""

    input: Tensor
    target: Tensor
    weight: Tensor | None = None
    activation: str = "none"
    overlap: str = "product"
    ignore_index: int | None = None
    #: Activation of the zeros that a mask puts in the place of the values and the target of the
    #: voxels of weight 0; None where such voxels do not count at all.
    blank: str | None = None


class Ratio(NamedTuple):
    """``scale`` times the reduced terms ``1 - N/D``, or ``-log(N/D)``."""

    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    smooth_nr: float
    smooth_dr: float
    min_denominator: float = LOWEST
    log: bool = False
    class_weight: Tensor | None = None
    first_class: int = 0
    batch: bool = False
    class_pooling: str = "none"
    absent: str = "keep"
    reduction: str = "mean"
    scale: float = 1.0


class Likelihood(NamedTuple):
    """``(on NLL + off OFF) / (normaliser divisor)`` with weights of the classes."""

    activation: str
    on: float
    off: float
    normaliser: str
    gamma: float = 0.0
    on_weight: Tensor | None = None
    off_weight: Tensor | None = None
    #: A number of voxels, of which a compiler knows only the symbol.
    divisor: int = 1

    def scaled(self, factor: float) -> Likelihood:
        return self._replace(on=factor * self.on, off=factor * self.off)


_NO_RATIO = Ratio((), (), 0.0, 0.0, reduction="sum", scale=0.0, batch=True)


def plain(tensor: Tensor) -> Tensor:
    """Strip a MetaTensor, whose dispatch costs more than a small loss."""
    return tensor if type(tensor) is Tensor else _checks.plain(tensor)


def fused_loss(
    voxels: Voxels,
    ratio: Ratio | None = None,
    likelihood: Likelihood | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Return the loss from one pass over the voxels.

    ``ranks`` share the sums of the ratio; the likelihood stays that of this rank.
    """
    if likelihood is not None and not torch.compiler.is_compiling():
        likelihood = likelihood.scaled(1 / likelihood.divisor)._replace(divisor=1)
    full = _needs_all_sums(voxels, ratio, likelihood)
    symbolic = likelihood is not None and likelihood.divisor != 1
    if voxels.blank is not None or ranks is not None or symbolic:
        return from_sums(sums(voxels, likelihood, full), voxels, ratio, likelihood, ranks)
    input = voxels.input
    classes, device = input.shape[1], input.device
    terms = ratio or _NO_RATIO
    plan = Plan(
        (
            Activation[voxels.activation],
            Activation[likelihood.activation if likelihood else voxels.activation],
            Overlap[voxels.overlap],
            ignored(voxels),
            float(likelihood.gamma) if likelihood else 0.0,
            full,
        ),
        (
            list(terms.numerator),
            list(terms.denominator),
            terms.smooth_nr,
            terms.smooth_dr,
            terms.min_denominator,
            1.0,
            terms.log,
        ),
        (
            terms.first_class,
            bool(terms.batch),
            ClassPooling[terms.class_pooling],
            Absent[terms.absent],
            Reduction[terms.reduction],
            float(terms.scale),
        ),
        (likelihood.on, likelihood.off, Normaliser[likelihood.normaliser])
        if likelihood
        else (0.0, 0.0, Normaliser.one),
    )
    weights = Weights(
        _double(terms.class_weight, classes - terms.first_class, device),
        _double(likelihood.on_weight, classes, device) if likelihood else None,
        _double(likelihood.off_weight, classes, device) if likelihood else None,
    )
    arguments = (plan, input, readable(voxels), _readable_weight(voxels.weight), weights)
    if torch.compiler.is_compiling():
        return run(*arguments)
    try:
        return run(*arguments)
    except ValueError as error:
        reraise(error)


def sums(voxels: Voxels, likelihood: Likelihood | None = None, full: bool = True) -> Tensor:
    """Return the float64 sums (B, C, 4 or 8) with autograd."""
    weight = _readable_weight(voxels.weight)
    options: dict[str, Any] = {
        "likelihood": likelihood.activation if likelihood else None,
        "overlap": voxels.overlap,
        "ignore_index": ignored(voxels),
        "gamma": likelihood.gamma if likelihood else 0.0,
        "full": full,
    }
    try:
        stats = soft_confusion(
            voxels.input, readable(voxels), weight=weight, activation=voxels.activation, **options
        )
    except ValueError as error:
        if torch.compiler.is_compiling():
            raise
        reraise(error)
    if voxels.blank is None:
        return stats
    # A blanked voxel is one of zeros: its sums are known, and no gradient reaches its logits.
    classes = voxels.input.shape[1]
    zeros = voxels.input.new_zeros(1, classes, 1)
    target = torch.zeros(1, classes if _is_dense(voxels) else 1, 1, device=zeros.device)
    one = soft_confusion(zeros, target, activation=voxels.blank, **options)
    blank = math.prod(voxels.input.shape[2:]) - stats[:, :1, W:].detach()
    return stats + blank * one


def from_sums(
    stats: Tensor,
    voxels: Voxels,
    ratio: Ratio | None,
    likelihood: Likelihood | None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Both terms by the operator's own autograd, each from the sums it is about."""
    double = voxels.input.dtype == torch.float64
    classes = voxels.input.shape[1]
    loss: Tensor | None = None
    if ratio is not None:
        shared = stats if ranks is None else sum_over_ranks(stats, True, ranks)
        options = ratio._asdict()
        options["ratio_scale"] = options.pop("scale")
        options["class_weight"] = _double(
            ratio.class_weight, classes - ratio.first_class, stats.device
        )
        loss = ratio_loss(shared, **options, double_loss=double)
    if likelihood is not None:
        term = ratio_loss(
            stats,
            reduction="sum",
            ratio_scale=0.0,
            nll_weight=_double(likelihood.on_weight, classes, stats.device),
            off_weight=_double(likelihood.off_weight, classes, stats.device),
            nll_scale=likelihood.on,
            off_scale=likelihood.off,
            normaliser=likelihood.normaliser,
            double_loss=double,
        )
        term = term / likelihood.divisor
        loss = term if loss is None else loss + term
    assert loss is not None
    return loss


def _needs_all_sums(voxels: Voxels, ratio: Ratio | None, likelihood: Likelihood | None) -> bool:
    if voxels.blank is not None:
        return True
    if likelihood and (likelihood.off != 0 or likelihood.normaliser in ("voxels", "elements")):
        return True
    return ratio is not None and len(ratio.denominator) > 4


def _double(weight: Tensor | None, length: int, device: torch.device) -> Tensor | None:
    return class_weights("weight", weight, length, device)


def _is_dense(voxels: Voxels) -> bool:
    input, target = voxels.input, voxels.target
    return input.shape[1] == 1 or (target.ndim == input.ndim and target.shape[1] == input.shape[1])


_LABELS = (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.half, torch.float)


def activated(input: Tensor, activation: str) -> Tensor:
    if activation == "sigmoid":
        return input.sigmoid()
    return input.softmax(1) if activation == "softmax" else input


def ignored(voxels: Voxels) -> int | None:
    """``ignore_index`` compared in the target's type, as the peers do: -1 is 255 to a byte."""
    index = voxels.ignore_index
    if index is None:
        return None
    if isinstance(index, numbers.Real) and float(index).is_integer():
        index = int(index)  # NumPy's integers and 1.0 too
    if voxels.target.dtype == torch.uint8 and isinstance(index, int) and -256 <= index < 0:
        index += 256
    return index


def readable(voxels: Voxels) -> Tensor:
    """The target in a type that the operator reads; the usual ones are left alone."""
    target = voxels.target
    if target.dtype in _LABELS:
        if target.dtype.is_floating_point or target.dtype in (torch.bool, torch.uint8):
            return target
        # Dense integers: a byte could not hold every value.
        dense = _is_dense(voxels) and voxels.input.shape[1] > 1
        return target.to(torch.float32) if dense else target
    if _is_dense(voxels):
        floats = (torch.bfloat16, torch.float64)
        return target if target.dtype in floats else target.to(torch.float32)
    return target.to(torch.int64)


def _readable_weight(weight: Tensor | None) -> Tensor | None:
    if weight is None or weight.dtype == torch.bool or weight.is_floating_point():
        return weight
    return weight.to(torch.float32)


def reraise(error: ValueError) -> NoReturn:
    """Raise a complaint about a label as the error that the peers have for it."""
    if str(error).startswith("target: label"):
        raise LabelError(str(error)) from None
    raise error


def is_binary(tensor: Tensor, or_else: float | None = None) -> bool:
    """Whether ``tensor`` is known to hold nothing but 0, 1 and the number ``or_else``.

    Float tensors are looked at, a block at a time, which synchronises with a GPU; where that is
    not possible (under a compiler or while a CUDA graph is captured) the answer is no.
    """
    if not tensor.is_floating_point():
        return True
    if torch.compiler.is_compiling():
        return False
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    wrong = torch.zeros((), dtype=torch.bool, device=tensor.device)
    for block in tensor.detach().reshape(-1).split(_BLOCK.get(tensor.device.type, 1 << 22)):
        found = (block != 0) & (block != 1)
        if or_else is not None:
            found &= block != or_else
        wrong |= found.any()
        if not tensor.is_cuda and wrong:
            return False
    return not bool(wrong)
