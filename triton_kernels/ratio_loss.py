"""The ratio loss: one program turns the statistics into the loss and its slopes.

The statistics are a few kilobytes, so that the kernel is all latency: a tile of rows (samples, or
the pooled batch) and all classes is held in registers, in float64, and everything that follows
is elementwise or a sum over the tile. More rows than fit are walked over in order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from voxfuse import contract
from voxfuse.contract import Reduction
from voxfuse.triton_kernels.launches import LAUNCH_OPTIONS, device_guard, power_of_two
from voxfuse.triton_kernels.numerics import log_of_sum
from voxfuse.triton_kernels.views import constexprs

#: Numbers in a tile, as long as there are fewer classes.
TILE = 1024
#: Elements and warps of a program of the backward pass.
BLOCK = 1024
WARPS = 4


class Shape(NamedTuple):
    """Sizes of the statistics (samples, classes, SUMS) and of the loss.

    ``rows`` is 1 where the batch is pooled; ``exponent_from`` the first class whose term is raised
    to the exponent.
    """

    samples: Any
    rows: Any
    classes: Any
    first_class: Any
    terms: Any
    exponent_from: Any


class TermWeights(NamedTuple):
    """Weights of the classes, or None: of the terms, the likelihood and that of the negatives."""

    terms: Any
    nll: Any
    off: Any


class Options(NamedTuple):
    """What the forward kernel is compiled for."""

    SUMS: int
    RATIO: bool
    NLL: bool
    OFF: bool
    BATCH: bool
    BY_SAMPLE: bool  # a class weight for every sample
    POOLING: int
    ABSENT: int
    REDUCTION: int
    NORMALISER: int
    LOG: bool
    LINEAR: bool
    MIXED: bool  # linear up to exponent_from
    ROWS: int  # of a tile
    CLASSES: int


class Numbers(NamedTuple):
    """The scalars of the loss. They are float64, and would be float32 in a tuple from the host."""

    numerator: Any
    denominator: Any
    smooth_nr: Any
    smooth_dr: Any
    min_denominator: Any
    exponent: Any
    ratio_scale: Any
    nll_scale: Any
    off_scale: Any


@triton.jit
def _constant(x):
    return tl.full([1, 1], x, tl.float64)


@triton.jit
def _over_tile(x):
    """Sum of a tile."""
    return tl.sum(tl.sum(x, axis=1, keep_dims=True), axis=0, keep_dims=True)


@triton.jit
def _rows_from(start, OPTIONS: tl.constexpr):
    return (start + tl.arange(0, OPTIONS.ROWS))[:, None].to(tl.int64)


@triton.jit
def _load_sum(stats, k: tl.constexpr, row, column, rows, shape, POOLED: tl.constexpr, OPTIONS):
    """Sum k of a tile of rows and classes; a row is a sample, or where POOLED all of them."""
    place = stats + (row * shape.classes + column) * OPTIONS.SUMS + k
    mask = (row < rows) & (column < shape.classes)
    if POOLED:
        result = tl.zeros([OPTIONS.ROWS, OPTIONS.CLASSES], tl.float64)
        for sample in range(shape.samples):
            result += tl.load(place + sample * shape.classes * OPTIONS.SUMS, mask=mask, other=0.0)
    else:
        result = tl.load(place, mask=mask, other=0.0)
    return result


@triton.jit
def _load_class_weight(class_weight, sample, column, shape, OPTIONS):
    """Weights of the terms, of one sample or of a tile of them."""
    mask = (column >= shape.first_class) & (column < shape.classes)
    place = class_weight + (column - shape.first_class)
    if OPTIONS.BY_SAMPLE:
        place += sample * (shape.classes - shape.first_class)
        if not OPTIONS.BATCH:
            mask = mask & (sample < shape.samples)
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def _row_weight(class_weight, row, column, shape, OPTIONS):
    """Weights of a tile's terms: of a pooled batch the mean of the weights other than 0."""
    if class_weight is None:
        result = tl.full([1, OPTIONS.CLASSES], 1.0, tl.float64)
    elif OPTIONS.BATCH and OPTIONS.BY_SAMPLE:
        result = tl.zeros([1, OPTIONS.CLASSES], tl.float64)
        count = tl.zeros([1, OPTIONS.CLASSES], tl.float64)
        for sample in range(shape.samples):
            weight = _load_class_weight(class_weight, sample, column, shape, OPTIONS)
            result += weight
            count += tl.where(weight != 0, 1.0, 0.0)
        result = result / tl.maximum(count, 1.0)
    else:
        result = _load_class_weight(class_weight, row, column, shape, OPTIONS)
    return result


@triton.jit
def _load_row(stats, class_weight, k: tl.constexpr, row, column, shape, OPTIONS):
    """Sum k of a tile of rows, each a sample or the annotated ones of all."""
    if OPTIONS.BATCH and OPTIONS.BY_SAMPLE:
        result = tl.zeros([1, OPTIONS.CLASSES], tl.float64)
        for sample in range(shape.samples):
            weight = _load_class_weight(class_weight, sample, column, shape, OPTIONS)
            place = stats + (sample * shape.classes + column) * OPTIONS.SUMS + k
            part = tl.load(place, mask=column < shape.classes, other=0.0)
            result += tl.where(weight != 0, part, 0.0)
    else:
        result = _load_sum(stats, k, row, column, shape.rows, shape, OPTIONS.BATCH, OPTIONS)
    return result


@triton.jit
def _multiply(coefficient, x):
    """Their product; a sum with coefficient 0 is not looked at."""
    return tl.where(coefficient == 0, 0.0, coefficient * x)


@triton.jit
def _load_weight(weight, column, mask):
    result = tl.full([1, column.shape[1]], 1.0, tl.float64)
    if weight is not None:
        result = tl.load(weight + column, mask=mask, other=0.0)
    return result


@triton.jit
def _count_terms(stats, class_weight, column, valid, shape, OPTIONS: tl.constexpr):
    """How many terms there are; where absent classes are ignored, of the others."""
    count = tl.zeros([1, 1], tl.float64) + shape.terms
    if OPTIONS.ABSENT == contract.Absent.ignore:
        count = tl.zeros([1, 1], tl.float64)
        for start in range(0, shape.rows, OPTIONS.ROWS):
            row = _rows_from(start, OPTIONS)
            inside = (row < shape.rows) & valid
            tp = _load_row(stats, class_weight, contract.Sum.TP, row, column, shape, OPTIONS)
            fn = _load_row(stats, class_weight, contract.Sum.FN, row, column, shape, OPTIONS)
            has_class = (tp + fn != 0) & inside
            if OPTIONS.BY_SAMPLE:
                weight = _row_weight(class_weight, row, column, shape, OPTIONS)
                has_class = has_class & (weight != 0)
            present = tl.where(has_class, 1.0, 0.0)
            if OPTIONS.POOLING:
                present = tl.max(present, axis=1, keep_dims=True)
            count += _over_tile(present)
    return count.to(tl.float64)


@triton.jit
def _likelihood(stats, on, off, column, shape, numbers, OPTIONS: tl.constexpr):
    """The likelihood terms, and one over what they are divided by; 0 where that is 0."""
    by_voxels: tl.constexpr = OPTIONS.NORMALISER == contract.Normaliser.voxels
    total = tl.zeros([1, 1], tl.float64)
    divisor = tl.zeros([1, 1], tl.float64)
    for start in range(0, shape.samples, OPTIONS.ROWS):
        row = _rows_from(start, OPTIONS)
        inside = (row < shape.samples) & (column < shape.classes)
        part = tl.zeros([OPTIONS.ROWS, OPTIONS.CLASSES], tl.float64)
        if OPTIONS.NLL:
            x = _load_sum(
                stats, contract.Sum.NLL, row, column, shape.samples, shape, False, OPTIONS
            )
            part += tl.where(on == 0, 0.0, _constant(numbers.nll_scale) * on * x)
        if OPTIONS.OFF:
            x = _load_sum(
                stats, contract.Sum.OFF, row, column, shape.samples, shape, False, OPTIONS
            )
            part += tl.where(off == 0, 0.0, _constant(numbers.off_scale) * off * x)
        total += _over_tile(part)
        if by_voxels or OPTIONS.NORMALISER == contract.Normaliser.elements:
            size = _load_sum(
                stats, contract.Sum.W, row, column, shape.samples, shape, False, OPTIONS
            )
            if by_voxels:
                inside = inside & (column == 0)
        else:
            size = _load_sum(
                stats, contract.Sum.TP, row, column, shape.samples, shape, False, OPTIONS
            )
            size += _load_sum(
                stats, contract.Sum.FN, row, column, shape.samples, shape, False, OPTIONS
            )
            if OPTIONS.NORMALISER == contract.Normaliser.target:
                size = size * on
        divisor += _over_tile(tl.where(inside, size, 0.0))
    if OPTIONS.NORMALISER == contract.Normaliser.one:
        divisor = tl.full([1, 1], 1.0, tl.float64)
    nothing = divisor == 0
    divisor = tl.where(nothing, 1.0, divisor)
    scale = tl.where(nothing, 0.0, 1.0 / divisor)
    return tl.where(nothing, 0.0, total / divisor), scale


@triton.jit
def _pooling_weights(volume, present, inside, OPTIONS: tl.constexpr):
    """Weights of the classes in the generalised Dice loss, without the class weights."""
    if OPTIONS.POOLING == contract.ClassPooling.uniform:
        weights = volume * 0.0 + 1.0
    else:
        base = volume if OPTIONS.POOLING == contract.ClassPooling.simple else volume * volume
        infinite = tl.abs(1.0 / base) == float("inf")
        weights = tl.where(infinite, 0.0, 1.0 / base)
        largest = tl.max(tl.where(inside, weights, 0.0), axis=1, keep_dims=True)
        largest = tl.where(largest == 0, 1.0, largest)
        weights = tl.where(infinite, largest, weights)
    if OPTIONS.ABSENT == contract.Absent.ignore:
        weights = tl.where(present, weights, 0.0)
    return weights


@triton.jit
def _terms(misses, hits, size, numbers, LOG: tl.constexpr, LINEAR: tl.constexpr):
    """The terms and their slopes: d term / d s_k = a (den_k - num_k) + b den_k."""
    smooth_nr, smooth_dr = _constant(numbers.smooth_nr), _constant(numbers.smooth_dr)
    least, exponent = _constant(numbers.min_denominator), _constant(numbers.exponent)
    n = hits + smooth_nr
    d = size + smooth_dr
    clamped = d < least
    d = tl.where(clamped, least, d)
    empty = d == 0
    d = tl.where(empty, 1.0, d)
    index = tl.where(clamped, d - n, misses + (smooth_dr - smooth_nr)) / d
    index = tl.where(empty, 0.0, index)
    if LOG:
        ratio = n / d
        floored = ratio < least
        small = -log_of_sum(1.0, -index, 1.0 - index)
        large = -tl.log(tl.where(floored, least, ratio))
        value = tl.where((index < 0.5) & (floored == 0), small, large)
        a = tl.where(empty | floored, 0.0, 1.0 / n)
    elif LINEAR:
        value = index
        a = tl.where(empty, 0.0, 1.0 / d)
    else:
        flat = index <= 0
        logarithm = tl.log(tl.where(flat, 1.0, index))
        value = tl.where(flat, 0.0, tl.exp(exponent * logarithm))
        a = tl.where(flat, 0.0, exponent * tl.exp((exponent - 1.0) * logarithm) / d)
    return value, a, tl.where(clamped, -a, -index * a)


@triton.jit
def _ratio(stats, class_weight, row, column, inside, scale, shape, numbers, OPTIONS: tl.constexpr):
    """Values of the terms of a tile and slopes as of ``_terms``, times ``scale``; what the classes
    weigh in a slope where they are pooled.
    """
    hits = tl.zeros([OPTIONS.ROWS, OPTIONS.CLASSES], tl.float64)
    size = tl.zeros([OPTIONS.ROWS, OPTIONS.CLASSES], tl.float64)
    misses = tl.zeros([OPTIONS.ROWS, OPTIONS.CLASSES], tl.float64)
    volume = tl.zeros([OPTIONS.ROWS, OPTIONS.CLASSES], tl.float64)
    for k in tl.static_range(OPTIONS.SUMS):
        x = _load_row(stats, class_weight, k, row, column, shape, OPTIONS)
        n, d = _constant(numbers.numerator[k]), _constant(numbers.denominator[k])
        hits += _multiply(n, x)
        size += _multiply(d, x)
        misses += _multiply(d - n, x)
        if k == contract.Sum.TP or k == contract.Sum.FN:
            volume += x
    present = volume != 0
    pooling = tl.full([1, 1], 1.0, tl.float64)
    if OPTIONS.POOLING:
        weight = _row_weight(class_weight, row, column, shape, OPTIONS)
        if OPTIONS.BY_SAMPLE:
            present = present & (weight != 0)
        pooling = _pooling_weights(volume, present, inside, OPTIONS) * weight
        hits = tl.sum(tl.where(inside, pooling * hits, 0.0), axis=1, keep_dims=True)
        size = tl.sum(tl.where(inside, pooling * size, 0.0), axis=1, keep_dims=True)
        misses = tl.sum(tl.where(inside, pooling * misses, 0.0), axis=1, keep_dims=True)
        anything = tl.where(present & inside, 1.0, 0.0)
        present = tl.max(anything, axis=1, keep_dims=True) != 0
    value, a, b = _terms(misses, hits, size, numbers, OPTIONS.LOG, OPTIONS.LINEAR)
    if OPTIONS.MIXED:
        flat_value, flat_a, flat_b = _terms(misses, hits, size, numbers, OPTIONS.LOG, True)
        plain = column < shape.exponent_from
        value = tl.where(plain, flat_value, value)
        a, b = tl.where(plain, flat_a, a), tl.where(plain, flat_b, b)
    if class_weight is not None and not OPTIONS.POOLING:
        weight = _row_weight(class_weight, row, column, shape, OPTIONS)
        if OPTIONS.BY_SAMPLE:
            present = present & (weight != 0)
        value, a, b = value * weight, a * weight, b * weight
    if OPTIONS.ABSENT != contract.Absent.keep:
        value = tl.where(present, value, 0.0)
        a = tl.where(present, a, 0.0)
        b = tl.where(present, b, 0.0)
    return value * scale, a * scale, b * scale, pooling


@triton.jit
def forward(
    stats,
    weights,
    loss,
    cotangents,
    shape,
    n0: tl.float64,
    n1: tl.float64,
    n2: tl.float64,
    n3: tl.float64,
    n4: tl.float64,
    n5: tl.float64,
    n6: tl.float64,
    n7: tl.float64,
    d0: tl.float64,
    d1: tl.float64,
    d2: tl.float64,
    d3: tl.float64,
    d4: tl.float64,
    d5: tl.float64,
    d6: tl.float64,
    d7: tl.float64,
    smooth_nr: tl.float64,
    smooth_dr: tl.float64,
    min_denominator: tl.float64,
    exponent: tl.float64,
    ratio_scale: tl.float64,
    nll_scale: tl.float64,
    off_scale: tl.float64,
    OPTIONS: tl.constexpr,
):
    """The loss of all rows, and its derivative at the statistics."""
    numbers = Numbers(
        (n0, n1, n2, n3, n4, n5, n6, n7),
        (d0, d1, d2, d3, d4, d5, d6, d7),
        smooth_nr,
        smooth_dr,
        min_denominator,
        exponent,
        ratio_scale,
        nll_scale,
        off_scale,
    )
    column = tl.arange(0, OPTIONS.CLASSES)[None, :].to(tl.int64)
    valid = (column >= shape.first_class) & (column < shape.classes)
    unreduced: tl.constexpr = OPTIONS.REDUCTION == contract.Reduction.none

    scale = _constant(ratio_scale)
    if OPTIONS.RATIO and OPTIONS.REDUCTION == contract.Reduction.mean:
        scale = scale / tl.maximum(
            _count_terms(stats, weights.terms, column, valid, shape, OPTIONS), 1.0
        )
    total = tl.zeros([1, 1], tl.float64)
    likelihood_scale = tl.zeros([1, 1], tl.float64)
    # Weights are read where they are used: kept over a division, they take registers from sm_80.
    if OPTIONS.NLL or OPTIONS.OFF:
        on = _load_weight(weights.nll, column, column < shape.classes)
        off = _load_weight(weights.off, column, column < shape.classes)
        total, likelihood_scale = _likelihood(stats, on, off, column, shape, numbers, OPTIONS)

    for start in range(0, shape.rows, OPTIONS.ROWS):
        row = _rows_from(start, OPTIONS)
        inside = (row < shape.rows) & valid
        a = tl.zeros([OPTIONS.ROWS, OPTIONS.CLASSES], tl.float64)
        b = tl.zeros([OPTIONS.ROWS, OPTIONS.CLASSES], tl.float64)
        if OPTIONS.RATIO:
            value, a, b, pooling = _ratio(
                stats, weights.terms, row, column, inside, scale, shape, numbers, OPTIONS
            )
            place, mask = row, row < shape.rows
            if not OPTIONS.POOLING:
                place = row * (shape.classes - shape.first_class) + (column - shape.first_class)
                mask = inside
            if unreduced:
                tl.store(loss + place, value.to(loss.dtype.element_ty), mask=mask)
            else:
                total += _over_tile(tl.where(mask, value, 0.0))
            a = tl.where(inside, a * pooling, 0.0)
            b = tl.where(inside, b * pooling, 0.0)
        for k in tl.static_range(OPTIONS.SUMS):
            n, d = _constant(numbers.numerator[k]), _constant(numbers.denominator[k])
            slope = a * (d - n) + b * d
            likelihood = tl.zeros([1, 1], tl.float64)
            if k == contract.Sum.NLL and OPTIONS.NLL:
                weight = _load_weight(weights.nll, column, column < shape.classes)
                likelihood = _constant(nll_scale) * weight * likelihood_scale
                slope += likelihood
            if k == contract.Sum.OFF and OPTIONS.OFF:
                weight = _load_weight(weights.off, column, column < shape.classes)
                likelihood = _constant(off_scale) * weight * likelihood_scale
                slope += likelihood
            place = cotangents + (row * shape.classes + column) * OPTIONS.SUMS + k
            mask = (row < shape.rows) & (column < shape.classes)
            if OPTIONS.BATCH:
                for sample in range(shape.samples):
                    own = slope
                    if OPTIONS.BY_SAMPLE:
                        weight = _load_class_weight(weights.terms, sample, column, shape, OPTIONS)
                        own = tl.where(valid & (weight == 0), likelihood, slope)
                    tl.store(place + sample * shape.classes * OPTIONS.SUMS, own, mask=mask)
            else:
                tl.store(place, slope, mask=mask)
    if not unreduced:
        here = tl.zeros([1, 1], tl.int32)
        tl.store(loss + here, total.to(loss.dtype.element_ty))
    elif not OPTIONS.RATIO:
        for start in range(0, shape.terms, OPTIONS.CLASSES):
            place = start + column
            nothing = tl.zeros([1, OPTIONS.CLASSES], tl.float32)
            tl.store(loss + place, nothing, mask=place < shape.terms)


@triton.jit
def backward(
    grad_loss,
    cotangents,
    result,
    size,
    classes,
    first_class,
    grad_b,
    grad_c,
    SUMS: tl.constexpr,
    BY_CLASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``grad_loss`` times ``cotangents``."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    sample = i // (classes * SUMS)
    column = (i // SUMS) % classes - first_class
    place = grad_loss + sample * grad_b
    used = inside
    if BY_CLASS:
        place += column * grad_c
        used = inside & (column >= 0)
    grad = tl.load(place, mask=used, other=0.0).to(tl.float64)
    slope = tl.load(cotangents + i, mask=inside, other=0.0)
    tl.store(result + i, grad * slope, mask=inside)


# --- launches ------------------------------------------------------------------------------------


def tile_shape(rows: int, classes: int) -> tuple[int, int]:
    """Rows and classes of a tile."""
    columns = power_of_two(classes)
    return min(power_of_two(rows), max(1, TILE // columns)), columns


def _coefficients(values: list[float]) -> tuple[float, ...]:
    return (*map(float, values), *[0.0] * (8 - len(values)))


def ratio_loss(
    stats: torch.Tensor,
    numerator: list[float],
    denominator: list[float],
    smooth_nr: float,
    smooth_dr: float,
    min_denominator: float,
    exponent: float,
    log: bool,
    class_weight: torch.Tensor | None,
    first_class: int,
    batch: bool,
    class_pooling: int,
    absent: int,
    reduction: int,
    ratio_scale: float,
    nll_weight: torch.Tensor | None,
    off_weight: torch.Tensor | None,
    nll_scale: float,
    off_scale: float,
    normaliser: int,
    double_loss: bool,
    exponent_from: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and its derivative at ``stats``; see voxfuse.ops.ratio_loss."""
    samples, classes, sums = stats.shape
    rows = 1 if batch else samples
    unreduced = reduction == Reduction.none
    shape: tuple[int, ...] = ()
    if unreduced:
        shape = () if batch else (samples,)
        shape = shape if class_pooling else (*shape, classes - first_class)
    dtype = torch.float64 if double_loss else torch.float32
    loss = torch.empty(shape, dtype=dtype, device=stats.device)
    cotangents = torch.empty(stats.shape, dtype=torch.float64, device=stats.device)
    weights = (
        None if w is None else w.to(torch.float64).contiguous()
        for w in (class_weight, nll_weight, off_weight)
    )
    terms = rows if class_pooling else rows * (classes - first_class)
    scalars = (smooth_nr, smooth_dr, min_denominator, exponent, ratio_scale, nll_scale, off_scale)
    options = Options(
        SUMS=sums,
        RATIO=ratio_scale != 0,
        NLL=nll_scale != 0 and not unreduced,
        OFF=off_scale != 0 and not unreduced,
        BATCH=batch,
        BY_SAMPLE=class_weight is not None and class_weight.ndim == 2,
        POOLING=class_pooling,
        ABSENT=absent,
        REDUCTION=reduction,
        NORMALISER=normaliser,
        LOG=log,
        LINEAR=exponent == 1,
        MIXED=exponent_from > 0 and exponent != 1,
        **dict(zip(("ROWS", "CLASSES"), tile_shape(rows, classes), strict=True)),
    )
    with device_guard(stats):
        forward[(1,)](
            stats.contiguous(),
            TermWeights(*weights),
            loss,
            cotangents,
            Shape(samples, rows, classes, first_class, terms, exponent_from),
            *_coefficients(numerator),
            *_coefficients(denominator),
            *map(float, scalars),
            constexprs(options),
            num_warps=WARPS,
            **LAUNCH_OPTIONS,
        )
    return loss, cotangents


def ratio_loss_backward(
    grad_loss: torch.Tensor,
    cotangents: torch.Tensor,
    first_class: int,
    batch: bool,
    class_pooling: int,
) -> torch.Tensor:
    """Return ``grad_loss`` times ``cotangents``, with the loss's axes aligned to (B, C)."""
    result = torch.empty(cotangents.shape, dtype=torch.float64, device=cotangents.device)
    if result.numel() == 0:
        return result
    by_class = grad_loss.ndim > 0 and not class_pooling
    strides = grad_loss.stride()
    with device_guard(cotangents):
        backward[(triton.cdiv(result.numel(), BLOCK),)](
            grad_loss,
            cotangents.contiguous(),
            result,
            result.numel(),
            cotangents.shape[1],
            first_class,
            strides[0] if grad_loss.ndim > 0 and not batch else 0,
            strides[-1] if by_class else 0,
            SUMS=cotangents.shape[2],
            BY_CLASS=by_class,
            BLOCK=BLOCK,
            num_warps=WARPS,
            **LAUNCH_OPTIONS,
        )
    return result
