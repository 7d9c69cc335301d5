"""The epilogue of every overlap loss in plain PyTorch: from the sums to the loss and its slopes.

For a sample (or the pooled batch) and a class with sums s::

    N = numerator . s + smooth_nr        D = max(denominator . s + smooth_dr, min_denominator)
    I = 1 - N / D                        term = I ** exponent    or    -log(N / D)

Classes before ``exponent_from`` have the exponent 1.

``1 - N/D`` is evaluated as ``((denominator - numerator) . s + smooth_dr - smooth_nr) / D``, so that
a nearly perfect prediction keeps its small loss to full relative precision. The derivatives are
written out because the kernels return them together with the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from voxfuse.contract import Absent, ClassPooling, Normaliser, Reduction, Sum


class Terms(NamedTuple):
    """Terms of the loss and their slopes: d term / d s_k = a (den_k - num_k) + b den_k."""

    value: Tensor
    a: Tensor
    b: Tensor


def ratio_loss(
    stats: Tensor,
    numerator: Sequence[float],
    denominator: Sequence[float],
    smooth_nr: float,
    smooth_dr: float,
    min_denominator: float,
    exponent: float,
    log: bool,
    class_weight: Tensor | None,
    first_class: int,
    batch: bool,
    class_pooling: int,
    absent: int,
    reduction: int,
    ratio_scale: float,
    nll_weight: Tensor | None,
    off_weight: Tensor | None,
    nll_scale: float,
    off_scale: float,
    normaliser: int,
    double_loss: bool,
    exponent_from: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the loss and its derivative at ``stats`` (B, C, S), both from float64 arithmetic."""
    cotangents = torch.zeros_like(stats)
    rows, class_weight, annotated = rows_of(stats, class_weight, first_class, batch)
    loss = rows.new_zeros(
        _loss_shape(rows, batch, class_pooling) if reduction == Reduction.none else ()
    )
    if ratio_scale != 0:
        num, den = (_padded(x, stats.shape[2]) for x in (numerator, denominator))
        volume = rows[..., Sum.TP] + rows[..., Sum.FN]
        present = volume != 0
        if class_weight is not None and annotated is not None:
            present = present & (class_weight != 0)
        misses = _combine(rows, [d - n for n, d in zip(num, den, strict=True)])
        hits, size = _combine(rows, num), _combine(rows, den)
        pooling = None
        if class_pooling != ClassPooling.none:
            pooling = _pooling_weights(volume, present, class_pooling, absent)
            if class_weight is not None:
                pooling = pooling * class_weight
            misses, hits, size = ((pooling * x).sum(1, keepdim=True) for x in (misses, hits, size))
            present = present.any(1, keepdim=True)
        smoothing = (smooth_nr, smooth_dr, min_denominator)
        terms = _terms(misses, hits, size, *smoothing, exponent, log)
        plain = max(exponent_from - first_class, 0)
        if plain and pooling is None:
            linear = _terms(misses, hits, size, *smoothing, 1.0, log)
            index = torch.arange(rows.shape[1], device=rows.device)
            terms = Terms(
                *(torch.where(index < plain, x, y) for x, y in zip(linear, terms, strict=True))
            )
        if class_weight is not None and pooling is None:
            terms = Terms(*(x * class_weight for x in terms))
        if absent != Absent.keep:
            terms = Terms(*(x.masked_fill(~present, 0) for x in terms))

        scale: float | Tensor = ratio_scale
        if reduction == Reduction.mean:
            counted = present if absent == Absent.ignore else torch.ones_like(present)
            scale = ratio_scale / counted.sum().clamp(min=1).to(torch.float64)
        value = scale * terms.value
        loss = value.reshape(loss.shape) if reduction == Reduction.none else value.sum()
        slopes = torch.stack(
            [terms.a * (d - n) + terms.b * d for n, d in zip(num, den, strict=True)], -1
        )
        if pooling is not None:
            slopes = slopes * pooling.unsqueeze(-1)
        cotangents[:, first_class:] = scale * slopes
        if annotated is not None and batch:
            cotangents[:, first_class:].masked_fill_(~annotated.unsqueeze(-1), 0)

    weights = (nll_weight, off_weight)
    scales = (nll_scale, off_scale)
    if reduction != Reduction.none and scales != (0, 0):
        loss = loss + _likelihood(stats, weights, scales, normaliser, cotangents)
    return loss.to(torch.float64 if double_loss else torch.float32), cotangents


def _loss_shape(rows: Tensor, batch: bool, class_pooling: int) -> tuple[int, ...]:
    """Shape of the loss without a reduction."""
    shape = () if batch else (rows.shape[0],)
    return shape if class_pooling != ClassPooling.none else (*shape, rows.shape[1])


def rows_of(
    stats: Tensor, class_weight: Tensor | None, first_class: int, batch: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sums of the rows (samples, or the pooled batch) and the classes' weights in them.

    With a weight for every sample and class also where that is not 0, which is what counts as
    annotated and is pooled; the weight of a pooled class is the mean over its annotated samples.
    """
    rows, annotated = stats[:, first_class:], None
    if class_weight is not None and class_weight.ndim == 2:
        annotated = class_weight != 0
        if batch:
            rows = rows.masked_fill(~annotated.unsqueeze(-1), 0)
            count = annotated.sum(0, keepdim=True).clamp(min=1)
            class_weight = class_weight.sum(0, keepdim=True) / count
    return rows.sum(0, keepdim=True) if batch else rows, class_weight, annotated


def _padded(coefficients: Sequence[float], length: int) -> list[float]:
    return [*coefficients, *[0.0] * (length - len(coefficients))]


def _combine(rows: Tensor, coefficients: Sequence[float]) -> Tensor:
    """``coefficients . s`` for every row and class; sums with coefficient 0 are not looked at."""
    result = torch.zeros_like(rows[..., 0])
    for k, coefficient in enumerate(coefficients):
        if coefficient != 0:
            result = result + coefficient * rows[..., k]
    return result


def _pooling_weights(volume: Tensor, present: Tensor, kind: int, absent: int) -> Tensor:
    """Weights of the classes in the generalised Dice loss (Sudre et al. 2017)."""
    if kind == ClassPooling.uniform:
        weights = torch.ones_like(volume)
    else:
        weights = 1 / (volume if kind == ClassPooling.simple else volume * volume)
    infinite = weights.isinf()
    largest = weights.masked_fill(infinite, 0).amax(1, keepdim=True)
    # A row without any target volume has no finite weight to borrow.
    largest = torch.where(largest == 0, torch.ones_like(largest), largest)
    weights = torch.where(infinite, largest, weights)
    return weights.masked_fill(~present, 0) if absent == Absent.ignore else weights


def _terms(
    misses: Tensor,
    hits: Tensor,
    size: Tensor,
    smooth_nr: float,
    smooth_dr: float,
    min_denominator: float,
    exponent: float,
    log: bool,
) -> Terms:
    """The terms from ``misses = D - N``, ``hits = N`` and ``size = D``, all without smoothing."""
    n = hits + smooth_nr
    d = size + smooth_dr
    clamped = d < min_denominator
    d = d.masked_fill(clamped, min_denominator)
    # Two empty sets and no smoothing: 0 / 0 agrees perfectly.
    empty = d == 0
    d = d.masked_fill(empty, 1)
    index = torch.where(clamped, d - n, misses + (smooth_dr - smooth_nr)) / d
    index = index.masked_fill(empty, 0)
    if log:
        ratio = n / d
        floored = ratio < min_denominator
        value = torch.where(
            (index < 0.5) & ~floored,
            -torch.log1p(-index),
            -ratio.clamp(min=min_denominator).log(),
        )
        a = (1 / n).masked_fill(empty | floored, 0)
    elif exponent == 1:
        value = index
        a = (1 / d).masked_fill(empty, 0)
    else:
        # The slope of I ** exponent at I = 0 is taken as 0, for exponents below 1 too.
        flat = index <= 0
        positive = index.masked_fill(flat, 1)
        value = (positive**exponent).masked_fill(flat, 0)
        a = (exponent * positive ** (exponent - 1) / d).masked_fill(flat, 0)
    # d (1 - N/D) = (dD - dN - (1 - N/D) dD) / D, and just -dN / D where D is clamped.
    return Terms(value, a, torch.where(clamped, -a, -index * a))


def _likelihood(
    stats: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    scales: tuple[float, float],
    normaliser: int,
    cotangents: Tensor,
) -> Tensor:
    """The weighted log-likelihood over its normaliser; adds its slopes to ``cotangents``."""
    divisor = _divisor(stats, weights[0], normaliser)
    empty = divisor == 0
    divisor = divisor.masked_fill(empty, 1)
    total = stats.new_zeros(())
    for column, weight, scale in zip((Sum.NLL, Sum.OFF), weights, scales, strict=True):
        if scale == 0:
            continue
        w = stats.new_ones(stats.shape[1]) if weight is None else weight
        # A class of weight 0 is left out, however large its sum.
        total = total + scale * (w * stats[..., column].masked_fill(w == 0, 0)).sum()
        cotangents[..., column] += (scale * w / divisor).masked_fill(empty, 0)
    return (total / divisor).masked_fill(empty, 0)


def _divisor(stats: Tensor, nll_weight: Tensor | None, normaliser: int) -> Tensor:
    """What the log-likelihood is divided by; treated as a constant by the derivative."""
    if normaliser == Normaliser.one:
        return stats.new_ones(())
    if normaliser == Normaliser.voxels:
        return stats[:, 0, Sum.W].sum()
    if normaliser == Normaliser.elements:
        return stats[..., Sum.W].sum()
    volume = stats[..., Sum.TP] + stats[..., Sum.FN]
    if normaliser == Normaliser.target and nll_weight is not None:
        volume = volume * nll_weight
    return volume.sum()


def ratio_loss_backward(
    grad_loss: Tensor, cotangents: Tensor, first_class: int, batch: bool, class_pooling: int
) -> Tensor:
    """Return ``grad_loss`` times ``cotangents``, with the loss's axes aligned to (B, C)."""
    grad = grad_loss.to(torch.float64)
    if grad.ndim == 0:
        return grad * cotangents
    if class_pooling != ClassPooling.none:
        return grad[:, None, None] * cotangents
    grad = torch.nn.functional.pad(grad, (first_class, 0))
    return grad.unsqueeze(-1) * cotangents
