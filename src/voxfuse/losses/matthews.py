"""The Matthews correlation of the sums, in PyTorch behind an operator: the root of a product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from voxfuse.contract import Absent, ClassPooling, RatioOptions, Reduction, Sum
from voxfuse.ops import _registry
from voxfuse.ops.ratio_loss import save_slopes, slopes_backward
from voxfuse.reference.ratio_loss import rows_of

#: A target whose volume and sum of squares differ by no more is one of zeros and ones.
HARD = 2.0**-18
#: Rounding of TN, a difference, relative to what it is a part of.
ROUNDING = 2.0**-16


class MatthewsOptions(RatioOptions):
    """A Matthews correlation in place of a ratio: its smoothing, and how its terms are reduced."""

    __slots__ = ()


def matthews_loss(
    stats: Tensor,
    class_weight: Tensor | None,
    smooth_nr: float,
    smooth_dr: float,
    first_class: int,
    batch: bool,
    absent: int,
    reduction: int,
    double_loss: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss of the eight sums (B, C, 8) and its derivative there, in float64."""
    rows, class_weight, annotated = rows_of(stats, class_weight, first_class, batch)
    tp, fp, fn = (rows[..., k] for k in (Sum.TP, Sum.FP, Sum.FN))
    actual, squares = tp + fn, rows[..., Sum.G2]
    # Ones are added up without a rounding, which would be all of TN where hardly a voxel is
    # outside of the class.
    hard = (actual - squares).abs() <= HARD * squares
    others = rows[..., Sum.W] - torch.where(hard, squares, actual)
    tn = others - fp
    tn = tn.masked_fill((tn < 0) & (tn > -ROUNDING * others), 0)
    others = tn + fp
    predicted, rest = tp + fp, tn + fn

    square = predicted * rest * actual * others + smooth_dr
    flat = square == 0
    root = square.masked_fill(flat, 1).sqrt()
    numerator = (tp * tn - fp * fn + smooth_nr).masked_fill(flat, 0)
    correlation = numerator / root
    # 1 - n / r = (r^2 - n^2) / (r (r + n)), and r^2 - n^2 is a sum of products of the counts.
    hits, misses = tp * tn, fp * fn
    gap = 4 * hits * misses + (hits + misses) * (tp + tn) * (fp + fn)
    gap = gap + misses * (tp * tp + tn * tn) + hits * (fp * fp + fn * fn)
    gap = gap + smooth_dr - smooth_nr * (2 * (hits - misses) + smooth_nr)
    near = gap / (root * (root + numerator.clamp(min=0)))
    terms = torch.where((numerator > 0) & ~flat, near, 1 - correlation)

    # n = TP others - FP actual, in which only TP, FP and FN depend on the prediction.
    half = correlation * actual * others / (2 * root * root)
    slopes = torch.zeros_like(rows)
    slopes[..., Sum.TP] = half * rest - others / root
    slopes[..., Sum.FP] = half * (rest - predicted) + actual / root
    slopes[..., Sum.FN] = half * predicted

    perfect = (fp == 0) & (fn == 0)
    terms = terms.masked_fill(perfect, 0)
    slopes = slopes.masked_fill((perfect | flat).unsqueeze(-1), 0)
    defined = (actual != 0) & (others != 0)
    if class_weight is not None and annotated is not None:
        defined = defined & (class_weight != 0)
    if absent != Absent.keep:
        terms = terms.masked_fill(~defined, 0)
        slopes = slopes.masked_fill(~defined.unsqueeze(-1), 0)
    if class_weight is not None:
        terms, slopes = terms * class_weight, slopes * class_weight.unsqueeze(-1)
    if reduction == Reduction.mean:
        counted = defined if absent == Absent.ignore else torch.ones_like(defined)
        count = counted.sum().clamp(min=1)
        terms, slopes = terms / count, slopes / count
    cotangents = torch.zeros_like(stats)
    cotangents[:, first_class:] = slopes
    if annotated is not None:
        cotangents[:, first_class:].masked_fill_(~annotated.unsqueeze(-1), 0)
    if reduction != Reduction.none:
        terms = terms.sum()
    elif batch:
        terms = terms[0].clone()
    return terms.to(torch.float64 if double_loss else torch.float32), cotangents


def _fake(x: Any) -> tuple[Tensor, Tensor]:
    samples, classes, _ = x.stats.shape
    shape: list[Any] = []
    if x.reduction == Reduction.none:
        shape = [classes - x.first_class] if x.batch else [samples, classes - x.first_class]
    dtype = torch.float64 if x.double_loss else torch.float32
    return x.stats.new_empty(shape, dtype=dtype), x.stats.new_empty(x.stats.shape)


def _setup_context(ctx: Any, x: Any, output: tuple[Tensor, Tensor]) -> None:
    save_slopes(ctx, x, output, ClassPooling.none)


_registry.register_composed(
    "matthews_loss",
    "(Tensor stats, Tensor? class_weight, float smooth_nr, float smooth_dr, int first_class, "
    "bool batch, int absent, int reduction, bool double_loss) -> (Tensor loss, Tensor cotangents)",
    matthews_loss,
    _fake,
)
_registry.register_autograd("matthews_loss", _setup_context, slopes_backward)
