"""Soft confusion counts in plain PyTorch: the truth that every kernel is measured against.

For sample b and class c, with voxel weight w, prediction p and target g::

    TP = sum w p g        FP = sum w p (1 - g)        FN = sum w (1 - p) g
    NLL = sum w g (1 - r)^gamma (-log r)

and, on request, OFF, P2, G2 and W (see :func:`soft_confusion`). Written to be read; it
materialises what the kernels never do. In float64 it is accurate to rounding even where a
prediction is almost perfect, because ``1 - p`` and ``-log p`` are never differences.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from voxfuse.contract import (
    CORE,
    FULL,
    TARGET_ROOM,
    VALUE_ERROR,
    Activation,
    Overlap,
    Sum,
    Unlabelled,
)

#: Values of a target that are looked at in one go.
_BLOCK = 1 << 18


class Probabilities(NamedTuple):
    """Probabilities, their complements and the negative logarithms of both."""

    p: Tensor
    complement: Tensor
    minus_log: Tensor
    minus_log_complement: Tensor


def _sum_of_others(p: Tensor) -> Tensor:
    """Return ``sum_{k != c} p_k`` for every class c (axis 1) without a subtraction."""
    zero = torch.zeros_like(p[:, :1])
    before = torch.cat([zero, p[:, :-1]], 1).cumsum(1)
    after = torch.cat([p[:, 1:], zero], 1).flip(1).cumsum(1).flip(1)
    return before + after


def probabilities(values: Tensor, activation: int, partial: Partial | None = None) -> Probabilities:
    """Apply ``activation`` to (B, C, V) values; classes that are left out have probability 0."""
    if partial is not None and activation != Activation.softmax:
        values = values.masked_fill(partial.left_out, 0.5)
    if activation == Activation.softmax:
        logits = finite(values)
        if partial is not None:
            logits = logits.masked_fill(partial.left_out, -math.inf)
        exponentials = (logits - logits.amax(1, keepdim=True)).exp()
        total = exponentials.sum(1, keepdim=True)
        p = exponentials / total
        complement = _sum_of_others(exponentials) / total
        # log1p of the complement keeps -log p accurate where p is close to 1.
        minus_log = torch.where(
            p > 0.5,
            -torch.log1p(-complement.clamp(max=0.5)),
            logits.amax(1, keepdim=True) - logits + total.log(),
        )
    elif activation == Activation.sigmoid:
        logits = finite(values)
        p, complement = logits.sigmoid(), (-logits).sigmoid()
        minus_log = _softplus(-logits)
        return Probabilities(p, complement, minus_log, _softplus(logits))
    else:
        p, complement = values, 1 - values
        minus_log = -p.log()
    return Probabilities(p, complement, minus_log, -complement.log())


def finite(logits: Tensor) -> Tensor:
    """Treat +-inf as the limit of ever larger logits; NaN stays."""
    limit = torch.finfo(logits.dtype).max
    return logits.clamp(-limit, limit)


def _softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + torch.log1p((-x.abs()).exp())


def _power(base: Tensor, exponent: float) -> Tensor:
    """``base ** exponent`` with ``0 ** 0 = 1`` and no gradient trouble at exponent 0."""
    return torch.ones_like(base) if exponent == 0 else base**exponent


def _product(factor: Tensor, value: Tensor) -> Tensor:
    """``factor * value`` where ``0 * inf`` (as in 0 log 0) is 0."""
    zero = factor == 0
    return torch.where(zero, torch.zeros_like(value), factor * value.masked_fill(zero, 0))


class Partial(NamedTuple):
    """Which classes leave which sample, and which of them make its background, both (B, C, 1)."""

    left_out: Tensor
    merged: Tensor


def partial_of(annotated: Tensor, unlabelled: int) -> Partial:
    """The classes that are not annotated leave; with "background", they are merged into class 0."""
    left_out = ~annotated.unsqueeze(-1)
    merged = left_out.clone()
    merged[:, 0] = True
    if unlabelled == Unlabelled.exclude:
        return Partial(left_out, torch.zeros_like(left_out))
    left_out[:, 0] = False
    return Partial(left_out, merged)


def check_annotated(annotated: Tensor, unlabelled: int) -> None:
    """Raise for a sample without a class that it needs, on the CPU."""
    if annotated.device.type != "cpu" or torch.compiler.is_compiling():
        return
    complaint = annotated_complaint(annotated, unlabelled)
    if complaint is not None:
        raise RuntimeError(VALUE_ERROR + complaint)


def annotated_complaint(annotated: Tensor, unlabelled: int) -> str | None:
    """What is wrong with the first sample that lacks a class; the same words on every backend."""
    background = unlabelled == Unlabelled.background
    lacking = ~(annotated[:, 0] if background else annotated.any(1))
    if not bool(lacking.any()):
        return None
    sample = int(lacking.nonzero()[0])
    if background:
        return (
            f"annotated: class 0 of sample {sample} is not annotated, but with "
            "unlabelled='background' the classes that are not annotated count as it"
        )
    return (
        f"annotated: no class of sample {sample} is annotated; leave it out, or give its voxels "
        "weight 0 and annotate any class"
    )


def without(values: Tensor, partial: Partial | None) -> Tensor:
    """(B, C, V) logits in which classes that are merged have become one, log-sum-exp."""
    if partial is None:
        return values
    theirs = finite(values).masked_fill(~partial.merged, -math.inf).logsumexp(1, keepdim=True)
    background = torch.where(partial.merged[:, :1], theirs, values[:, :1])
    return torch.cat([background, values[:, 1:]], 1)


def _merged_target(g: Tensor, partial: Partial) -> Tensor:
    """(B, C, V) targets in which the classes that are left out have none, or the background has
    what was theirs."""
    theirs = torch.where(partial.left_out & partial.merged, g, 0).sum(1, keepdim=True)
    g = g.masked_fill(partial.left_out, 0)
    return torch.cat([g[:, :1] + theirs, g[:, 1:]], 1)


def is_dense(input: Tensor, target: Tensor, classes: int | None = None) -> bool:
    """Whether ``target`` holds one value a class (or the foreground's indicator of one class)."""
    classes = input.shape[1] if classes is None else classes
    return classes == 1 or (target.ndim == input.ndim and target.shape[1] == classes)


class Voxels(NamedTuple):
    """(B, C, V) values and target and (B, 1, V) weight, with excluded voxels made harmless."""

    values: Tensor
    target: Tensor
    weight: Tensor
    included: Tensor


def voxels(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int | None,
    partial: Partial | None = None,
) -> Voxels:
    """Flatten the spatial axes, make labels one-hot, exclude ignored and zero-weight voxels.

    A label whose class is left out becomes the background, or excludes its voxel.
    """
    batch, classes = input.shape[:2]
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    count = math.prod(input.shape[2:])
    values = input.to(dtype).reshape(batch, classes, count)
    dense = is_dense(input, target)
    included = torch.ones(batch, 1, count, dtype=torch.bool, device=input.device)
    if dense:
        g = target.reshape(batch, classes, count)
        if ignore_index is not None:
            included = ~is_ignored(g[:, :1], ignore_index)
        if classes == 1 and not g.is_floating_point() and g.dtype != torch.bool:
            check_labels(target, 2, ignore_index)
            included = included & ((g == 0) | (g == 1))
        g = g.to(dtype)
    else:
        check_labels(target, classes, ignore_index)
        labels, included = classes_of(target.reshape(batch, 1, count), classes, ignore_index)
        index = torch.arange(classes, device=input.device).reshape(1, classes, 1)
        g = labels == index
        if partial is not None:
            included = included & ~(g & partial.left_out & ~partial.merged).any(1, keepdim=True)
        g = g.to(dtype)
    if partial is not None:
        g = _merged_target(g, partial)
    if weight is None:
        w = torch.ones(batch, 1, count, dtype=dtype, device=input.device)
    else:
        w = weight.reshape(batch, 1, count).to(dtype)
        included = included & (w != 0)
    return Voxels(
        values.masked_fill(~included, 0.5), g * included, w.masked_fill(~included, 0), included
    )


def classes_of(labels: Tensor, classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Labels as integers, and which of them are a class that is not ignored."""
    index = labels.to(torch.int64)
    known = (index >= 0) & (index < classes)
    if labels.is_floating_point():
        known = known & (index == labels)
    if ignore_index is not None:
        known = known & (index != ignore_index)
    return index, known


def is_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    # In a type that holds the index: a byte is no -1, 255.5 no 255, infinity no float16 beyond it.
    if labels.is_floating_point():
        return labels.to(torch.float64) == ignore_index
    wide = labels.to(torch.int64)
    # What of uint64 goes beyond int64 comes back as a negative number.
    beyond = wide < 0 if labels.dtype == torch.uint64 else wide.new_zeros((), dtype=torch.bool)
    return (wide == ignore_index) & ~beyond


def check_labels(
    target: Tensor,
    classes: int,
    ignore_index: int | None,
    included: Tensor | None = None,
    name: str = "target",
) -> None:
    """Raise for a label without a class on the CPU; elsewhere such voxels count as ignored."""
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        complaint = label_complaint(target, classes, ignore_index, included, name)
        if complaint is not None:
            raise RuntimeError(VALUE_ERROR + complaint)


def label_complaint(
    target: Tensor,
    classes: int,
    ignore_index: int | None,
    included: Tensor | None = None,
    name: str = "target",
) -> str | None:
    """What is wrong with the first label that is neither a class nor ignored, and where it stands;
    None if there is none (among ``included``). The same words on every backend."""
    wrong = ~classes_of(target, classes, ignore_index)[1]
    if ignore_index is not None:
        wrong &= ~is_ignored(target, ignore_index)
    if included is not None:
        wrong &= included.reshape(wrong.shape)
    if not bool(wrong.any()):
        return None
    place = tuple(wrong.nonzero()[0].tolist())
    value = target[place].item()
    where = f"first at {name}[{', '.join(map(str, place))}]"
    if not float(value).is_integer():
        return f"{name}: label {value:.9g} is no integer, {where}"
    label, allowed, hint = int(value), "", ""
    if name != "target":
        hint = "; ignore_index is of the target, mask= leaves voxels out"
    elif ignore_index is not None:
        allowed = f" or ignore_index {ignore_index}"
    elif label < 2**63 and bool((~wrong | (target == target[place])).all()):
        hint = f"; if {label} marks voxels to ignore, pass ignore_index={label}"
    return f"{name}: label {label} is outside [0, {classes}){allowed}, {where}{hint}"


def check_range(target: Tensor, classes: int, *rest: Any) -> None:
    """Raise for a dense value outside [0, 1] on the CPU, if it counts; ``rest`` and the words are
    those of :func:`range_complaint`."""
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        complaint = range_complaint(target, classes, *rest)
        if complaint is not None:
            raise RuntimeError(VALUE_ERROR + complaint)


def range_complaint(
    target: Tensor,
    classes: int,
    weight: Tensor | None,
    ignore_index: int | None,
    annotated: Tensor | None = None,
    unlabelled: int = Unlabelled.exclude,
) -> str | None:
    """What is wrong with the first value of a dense target that counts and is outside [0, 1], and
    where it stands; None if there is none. NaN is not outside."""
    if target.dtype == torch.bool:
        return None
    batch = target.shape[0]
    count = target.numel() // max(batch * classes, 1)
    values = target.reshape(batch, classes, count)
    weights = None if weight is None else weight.reshape(batch, count)
    for b, c in itertools.product(range(batch), range(classes)):
        if annotated is not None and unlabelled == Unlabelled.exclude and not annotated[b, c]:
            continue
        for start in range(0, count, _BLOCK):
            part = slice(start, start + _BLOCK)
            x = values[b, c, part]
            wrong = outside(x)
            if ignore_index is not None:
                wrong &= ~is_ignored(x, ignore_index)
            if weights is not None:
                wrong &= weights[b, part] != 0
            if not bool(wrong.any()):
                continue
            v = start + int(wrong.nonzero()[0])
            spatial = target.shape[2 if classes > 1 else 1 :]
            place = [b, *([c] if classes > 1 else []), *np.unravel_index(v, spatial)]
            return (
                f"target: value {values[b, c, v].item():.9g} is outside [0, 1] by more than "
                f"{TARGET_ROOM:g}, first at target[{', '.join(map(str, place))}]"
            )
    return None


def outside(values: Tensor) -> Tensor:
    """Where values of a dense target are outside [0, 1] by more than rounding explains."""
    values = values.to(torch.float64)
    return (values < -TARGET_ROOM) | (values > 1 + TARGET_ROOM)


def soft_confusion(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    activation: int,
    likelihood: int,
    overlap: int,
    ignore_index: int | None,
    gamma: float,
    full: bool,
    focal_classes: int | None = None,
    unlabelled: int = Unlabelled.exclude,
    annotated: Tensor | None = None,
    any_target: bool = False,
) -> Tensor:
    """Return (B, C, 4) or, with ``full``, (B, C, 8) float64 sums.

    The four further sums are OFF = ``sum w (1-g) (-log r)`` for a softmax likelihood and
    ``sum w (1-g) r^gamma (-log(1-r))`` otherwise, P2 = ``sum w p^2``, G2 = ``sum w g^2`` and
    W = ``sum w``. Of the classes, only the first ``focal_classes`` have the exponent gamma; the
    others have 0.

    The sums of a class that is not ``annotated`` (B, C) in a sample are 0. The values of a dense
    target have to be in [0, 1], unless ``any_target`` makes them numbers like any other.
    """
    partial = None
    if annotated is not None:
        check_annotated(annotated, unlabelled)
        partial = partial_of(annotated, unlabelled)
    values, g, w, _ = voxels(input, target, weight, ignore_index, partial)
    if not any_target and is_dense(input, target):
        check_range(target, input.shape[1], weight, ignore_index, annotated, unlabelled)
    values = without(values, partial)
    p, complement, _, _ = probabilities(values, activation, partial)
    r = probabilities(values, likelihood, partial)
    if overlap == Overlap.min:
        missed = _missed(p, complement, g)
        tp, fp, fn = torch.minimum(p, g), (-missed).clamp(min=0), missed.clamp(min=0)
    else:
        tp, fp, fn = p * g, p * (1 - g), complement * g
    nll = torch.where(
        _focal(p, focal_classes), _power(r.complement, gamma) * r.minus_log, r.minus_log
    )
    terms = [tp, fp, fn, _product(g, nll)]
    if full:
        if likelihood == Activation.softmax:
            off = _product(1 - g, r.minus_log)
        else:
            modulated = _power(r.p, gamma) * r.minus_log_complement
            off = torch.where(_focal(p, focal_classes), modulated, r.minus_log_complement)
            off = _product(1 - g, off)
        terms += [off, p * p, g * g, torch.ones_like(p)]
    if partial is not None:
        terms = [term.masked_fill(partial.left_out, 0) for term in terms]
    return torch.stack([_weighted_sum(w, term) for term in terms], -1)


def _focal(p: Tensor, focal_classes: int | None) -> Tensor:
    """Which classes, of (B, C, V), the likelihood modulates: (C, 1)."""
    classes = p.shape[1]
    index = torch.arange(classes, device=p.device).unsqueeze(-1)
    return index < (classes if focal_classes is None else focal_classes)


def _weighted_sum(weight: Tensor, term: Tensor) -> Tensor:
    # An infinite term (log of a zero probability) of an excluded voxel must not become NaN.
    return _product(weight.expand_as(term), term).sum(-1, dtype=torch.float64)


def soft_confusion_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    activation: int,
    likelihood: int,
    overlap: int,
    ignore_index: int | None,
    gamma: float,
    focal_classes: int | None = None,
    unlabelled: int = Unlabelled.exclude,
    annotated: Tensor | None = None,
) -> Tensor:
    """Return the gradient at ``input``, in its dtype and layout, from ``grad`` (B, C, 4 or 8)."""
    partial = None
    if annotated is not None:
        check_annotated(annotated, unlabelled)
        partial = partial_of(annotated, unlabelled)
        grad = grad.masked_fill(partial.left_out, 0)
    raw, g, w, included = voxels(input, target, weight, ignore_index, partial)
    values = without(raw, partial)
    cotangent = [x.unsqueeze(-1) for x in grad.to(values.dtype).unbind(-1)]
    t, f, n, nll = cotangent[:CORE]
    o, s = (cotangent[Sum.OFF], cotangent[Sum.P2]) if len(cotangent) == FULL else (None, None)
    p, complement, _, _ = probabilities(values, activation, partial)
    r = probabilities(values, likelihood, partial)

    a = _overlap_slope(p, complement, g) if overlap == Overlap.min else g
    if activation == Activation.softmax:
        best = p.argmax(1, keepdim=True)
        h = _less_that_of(best, a, t - n, f)
        if s is not None:
            h = h + 2 * (p * s - (p * s).gather(1, best))
        gradient = p * (h - (p * h).sum(1, keepdim=True))
    else:
        h = a * (t - n) + (1 - a) * f
        if s is not None:
            h = h + 2 * p * s
        gradient = p * complement * h if activation == Activation.sigmoid else h

    focal = _focal(p, focal_classes)
    q = torch.where(focal, _q(r, gamma), -1)
    if likelihood == Activation.softmax:
        u = nll * g * q
        if o is not None:
            u = u - o * (1 - g)
        # u_c - r_c sum_k u_k, without the cancellation in u_c (1 - r_c).
        gradient = gradient + u * r.complement - r.p * _sum_of_others(u)
    else:
        chain = r.complement if likelihood == Activation.sigmoid else 1 / r.p
        # Without a cotangent there is no slope, not even an infinite one (r = 0).
        gradient = gradient + _product(nll * g, q * chain)
        if o is not None:
            mirrored = Probabilities(r.complement, r.p, r.minus_log_complement, r.minus_log)
            chain = r.p if likelihood == Activation.sigmoid else 1 / r.complement
            slope = torch.where(focal, _q(mirrored, gamma), -1)
            gradient = gradient - _product(o * (1 - g), slope * chain)

    gradient = torch.where(included, w * gradient, torch.zeros_like(gradient))
    if partial is not None:
        # The background's logit is log-sum-exp of theirs: each has its share of the gradient.
        shares = finite(raw).masked_fill(~partial.merged, -math.inf).softmax(1)
        theirs = _product(gradient[:, :1].expand_as(shares), shares)
        gradient = torch.where(partial.merged, theirs, gradient.masked_fill(partial.left_out, 0))
    result = torch.empty_like(input)
    result.copy_(gradient.reshape(input.shape))
    return result


def _overlap_slope(p: Tensor, complement: Tensor, g: Tensor) -> Tensor:
    """The slope of ``min(p, g)`` in p: 1 below g, 0 above it, 1/2 at it."""
    return (1 + torch.sign(_missed(p, complement, g))) / 2


def _missed(p: Tensor, complement: Tensor, g: Tensor) -> Tensor:
    """``g - p``, from the complements where both are close to 1 and p may have rounded to it."""
    return torch.where(g >= 0.5, complement - (1 - g), g - p)


def _less_that_of(best: Tensor, a: Tensor, hit: Tensor, miss: Tensor) -> Tensor:
    """``h_c - h_best`` of ``h = a hit + (1 - a) miss``, for every class c.

    A softmax's gradient ``p_c (h_c - sum_k p_k h_k)`` does not change when a constant is taken off
    every h. Measured from the most probable class's, nothing large is left to cancel, as long as
    the difference is formed before anything is multiplied: of what the two classes share of ``hit``
    and of ``miss``, and of what one has as ``hit`` and the other as ``miss``.
    """
    hit, miss = hit.expand_as(a), miss.expand_as(a)
    a_best, hit_best, miss_best = (x.gather(1, best) for x in (a, hit, miss))
    return (
        torch.minimum(a, a_best) * (hit - hit_best)
        + (1 - torch.maximum(a, a_best)) * (miss - miss_best)
        + (a - a_best).clamp(min=0) * (hit - miss_best)
        + (a_best - a).clamp(min=0) * (miss - hit_best)
    )


def _q(r: Probabilities, gamma: float) -> Tensor:
    """``q = gamma r (1-r)^(gamma-1) log r - (1-r)^gamma``, r times d/dr of NLL's summand.

    A sigmoid's gradient is then ``dz = (cotangent of NLL) g q (1-r)``. For gamma > 0 it tends to 0
    as r tends to 1.
    """
    if gamma == 0:
        return -torch.ones_like(r.p)
    at_one = r.complement == 0
    complement = r.complement.masked_fill(at_one, 1)
    q = -gamma * _product(r.p, complement ** (gamma - 1) * r.minus_log) - complement**gamma
    return q.masked_fill(at_one, 0)
