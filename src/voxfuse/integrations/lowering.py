"""What the adapters share: their peers' options become the plan of the losses.

An adapter says what is read, and how (:class:`Voxels`), and what becomes of the sums: a ratio and a
``Likelihood``, the parts of every plan.
"""

from __future__ import annotations

import functools
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from voxfuse._ranks import Ranks, sum_over_ranks
from voxfuse.contract import (
    Absent,
    Activation,
    ClassPooling,
    Overlap,
    RatioOptions,
    Reduction,
    Sum,
)
from voxfuse.losses import engine
from voxfuse.losses.plan import Likelihood, Plan, TermWeights, class_weights, plan_of
from voxfuse.ops import _checks
from voxfuse.ops.soft_confusion import is_dense

#: Elements of a float target looked at in one go.
_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 22}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class LabelError(ValueError, RuntimeError, IndexError):
    """A label that no class has.

    A RuntimeError where the peers' one-hot encoding fails, an IndexError where PyTorch's
    cross-entropy does.
    """


def with_peers_errors(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Raise a complaint about a label as the error that the peers have for it."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        try:
            return function(*args, **options)
        except ValueError as error:
            if torch.compiler.is_compiling() or not str(error).startswith("target: label"):
                raise
            raise LabelError(str(error)) from None

    return call


class Voxels(NamedTuple):
    """The arguments of the pass over the voxels."""

    input: Tensor
    target: Tensor
    weight: Tensor | None = None
    activation: int = Activation.none
    overlap: int = Overlap.product
    ignore_index: int | None = None
    #: Activation of the zeros that a mask puts for the values and the target of the
    #: voxels of weight 0; None where such voxels do not count at all.
    blank: int | None = None

    def plan(self, ratio: RatioOptions | None, likelihood: Likelihood | None) -> Plan:
        return plan_of(self.activation, self.overlap, ignored(self), ratio, likelihood)


def ratio_of(
    numerator: Sequence[float],
    denominator: Sequence[float],
    smooth_nr: float,
    smooth_dr: float,
    # No clamp on the denominator, which predictions below 0 can make negative.
    min_denominator: float = -sys.float_info.max,
    *,
    reduction: int = Reduction.mean,
    class_pooling: int = ClassPooling.none,
    absent: int = Absent.keep,
    **options: Any,
) -> RatioOptions:
    """The mean of ``1 - N/D``, unless ``options`` say otherwise."""
    return RatioOptions(
        list(numerator),
        list(denominator),
        smooth_nr,
        smooth_dr,
        min_denominator,
        reduction=int(reduction),
        class_pooling=int(class_pooling),
        absent=int(absent),
        ratio_scale=1.0,
        **options,
    )


def smoothed_cross_entropy(
    smoothing: float, classes: int, normaliser: int, weight: Tensor | None
) -> Likelihood:
    """PyTorch's ``cross_entropy`` with ``label_smoothing`` and weights of the classes."""
    off = smoothing / classes
    on = 1 - smoothing + off
    off_weight = weight if off else None
    return Likelihood(
        Activation.softmax, on, off, normaliser, on_weight=weight, off_weight=off_weight
    )


def plain(tensor: Tensor) -> Tensor:
    """Strip a MetaTensor, whose dispatch costs more than a small loss."""
    return tensor if type(tensor) is Tensor else _checks.plain(tensor)


def requires_grad(*numbers: Any) -> bool:
    """Whether one of a loss's numbers is learnt: then PyTorch has to compute with it."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in numbers)


@with_peers_errors
def fused_loss(
    voxels: Voxels,
    ratio: RatioOptions | None = None,
    likelihood: Likelihood | None = None,
    class_weight: Tensor | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Return the loss from one pass over the voxels.

    ``ranks`` share the sums of the ratio; the likelihood stays that of this rank.
    """
    if likelihood is not None and not torch.compiler.is_compiling():
        likelihood = likelihood.scaled(1 / likelihood.divisor)._replace(divisor=1)
    symbolic = likelihood is not None and likelihood.divisor != 1
    plan = voxels.plan(ratio, likelihood)
    if voxels.blank is not None or ranks is not None or symbolic:
        stats = sums(voxels, likelihood, plan.full)
        return from_sums(stats, voxels, ratio, likelihood, class_weight, ranks)
    weights = _weights(voxels, ratio, likelihood, class_weight)
    return engine.run(plan, voxels.input, voxels.target, voxels.weight, weights)


@with_peers_errors
def sums(voxels: Voxels, likelihood: Likelihood | None = None, full: bool = True) -> Tensor:
    """Return the float64 sums (B, C, 4 or 8) with autograd."""
    plan = voxels.plan(None, likelihood)._replace(full=full or voxels.blank is not None)
    stats = engine.sums(plan, voxels.input, voxels.target, voxels.weight)
    if voxels.blank is None:
        return stats
    # A blanked voxel is one of zeros: its sums are known, and no gradient reaches its logits.
    classes = voxels.input.shape[1]
    zeros = voxels.input.new_zeros(1, classes, 1)
    dense = is_dense(voxels.input, voxels.target)
    target = torch.zeros(1, classes if dense else 1, 1, device=zeros.device)
    one = engine.sums(
        voxels._replace(activation=voxels.blank).plan(None, likelihood)._replace(full=True),
        zeros,
        target,
    )
    blank = math.prod(voxels.input.shape[2:]) - stats[:, :1, Sum.W :].detach()
    return stats + blank * one


def from_sums(
    stats: Tensor,
    voxels: Voxels,
    ratio: RatioOptions | None,
    likelihood: Likelihood | None,
    class_weight: Tensor | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Both terms by the operator's own autograd, each from the sums it is about."""
    double = voxels.input.dtype == torch.float64
    weights = _weights(voxels, ratio, likelihood, class_weight)
    loss: Tensor | None = None
    if ratio is not None:
        shared = stats if ranks is None else sum_over_ranks(stats, True, ranks)
        loss = engine.loss_of_sums(voxels.plan(ratio, None), shared, weights, double)
    if likelihood is not None:
        term = engine.loss_of_sums(voxels.plan(None, likelihood), stats, weights, double)
        term = term / likelihood.divisor
        loss = term if loss is None else loss + term
    assert loss is not None
    return loss


def _weights(
    voxels: Voxels,
    ratio: RatioOptions | None,
    likelihood: Likelihood | None,
    class_weight: Tensor | None,
) -> TermWeights:
    classes = voxels.input.shape[1]
    first_class = ratio.first_class if ratio else 0
    on, off = (likelihood.on_weight, likelihood.off_weight) if likelihood else (None, None)
    parts = ((class_weight, classes - first_class), (on, classes), (off, classes))
    device = voxels.input.device
    return TermWeights(*(class_weights("weight", x, length, device) for x, length in parts))


def activated(input: Tensor, activation: int) -> Tensor:
    if activation == Activation.sigmoid:
        return input.sigmoid()
    return input.softmax(1) if activation == Activation.softmax else input


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


def whole_labels(target: Tensor) -> Tensor:
    """The labels as int64; elsewhere than on the CPU one that is no integer is no class."""
    labels = target.to(torch.int64)
    if not target.is_floating_point():
        return labels
    whole = labels == target
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(whole, labels, -1)
    if not bool(whole.all()):
        place = tuple((~whole).nonzero()[0].tolist())
        raise LabelError(
            f"target: label {float(target[place]):.9g} is no integer, first at "
            f"target[{', '.join(map(str, place))}]"
        )
    return labels


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
