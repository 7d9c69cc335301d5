"""The ratio loss: one program turns the statistics into the loss and its slopes.

The statistics are a few kilobytes, so that the kernel is all latency: a tile of rows (samples, or
the pooled batch) and all classes is held in registers, in float64, and everything that follows
is elementwise or a sum over the tile. More rows than fit are walked over in order.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from voxfuse.contract import Absent, ClassPooling, Normaliser, Reduction, Sum
from voxfuse.triton_kernels.launches import LAUNCH_OPTIONS, device_guard, power_of_two
from voxfuse.triton_kernels.numerics import log_of_sum

#: Numbers in a tile, as long as there are fewer classes.
TILE = 1024

UNIFORM: tl.constexpr = tl.constexpr(int(ClassPooling.uniform))
SIMPLE: tl.constexpr = tl.constexpr(int(ClassPooling.simple))
KEEP: tl.constexpr = tl.constexpr(int(Absent.keep))
IGNORE: tl.constexpr = tl.constexpr(int(Absent.ignore))
SUM_TP: tl.constexpr = tl.constexpr(int(Sum.TP))
SUM_FN: tl.constexpr = tl.constexpr(int(Sum.FN))
SUM_NLL: tl.constexpr = tl.constexpr(int(Sum.NLL))
SUM_OFF: tl.constexpr = tl.constexpr(int(Sum.OFF))
SUM_W: tl.constexpr = tl.constexpr(int(Sum.W))
BY_ONE: tl.constexpr = tl.constexpr(int(Normaliser.one))
BY_TARGET: tl.constexpr = tl.constexpr(int(Normaliser.target))
BY_VOXELS: tl.constexpr = tl.constexpr(int(Normaliser.voxels))
BY_ELEMENTS: tl.constexpr = tl.constexpr(int(Normaliser.elements))


@triton.jit
def _constant(x):
    return tl.full([1, 1], x, tl.float64)


@triton.jit
def _load_sum(
    stats, k: tl.constexpr, row, column, samples, rows, classes, SUMS: tl.constexpr, BATCH
):
    """Sum k of a tile of rows and classes; a row is a sample, or with BATCH all of them."""
    place = stats + (row * classes + column) * SUMS + k
    mask = (row < rows) & (column < classes)
    if BATCH:
        result = tl.zeros([row.shape[0], column.shape[1]], tl.float64)
        for sample in range(samples):
            result += tl.load(place + sample * classes * SUMS, mask=mask, other=0.0)
    else:
        result = tl.load(place, mask=mask, other=0.0)
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
def _forward(
    stats,
    class_weight,
    nll_weight,
    off_weight,
    loss,
    cotangents,
    samples,
    rows,
    classes,
    first_class,
    terms,
    exponent_from,
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
    SUMS: tl.constexpr,
    RATIO: tl.constexpr,
    NLL: tl.constexpr,
    OFF: tl.constexpr,
    BATCH: tl.constexpr,
    POOLING: tl.constexpr,
    ABSENT: tl.constexpr,
    NO_REDUCTION: tl.constexpr,
    MEAN: tl.constexpr,
    NORMALISER: tl.constexpr,
    LOG: tl.constexpr,
    LINEAR: tl.constexpr,
    MIXED: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    column = tl.arange(0, CLASSES)[None, :].to(tl.int64)
    valid = (column >= first_class) & (column < classes)
    numerator = (n0, n1, n2, n3, n4, n5, n6, n7)
    denominator = (d0, d1, d2, d3, d4, d5, d6, d7)

    scale = _constant(ratio_scale)
    if RATIO and MEAN:
        count = tl.zeros([1, 1], tl.float64) + terms
        if ABSENT == IGNORE:
            count = tl.zeros([1, 1], tl.float64)
            for start in range(0, rows, ROWS):
                row = (start + tl.arange(0, ROWS))[:, None].to(tl.int64)
                tp = _load_sum(stats, SUM_TP, row, column, samples, rows, classes, SUMS, BATCH)
                fn = _load_sum(stats, SUM_FN, row, column, samples, rows, classes, SUMS, BATCH)
                present = tl.where((tp + fn != 0) & valid & (row < rows), 1.0, 0.0)
                if POOLING:
                    present = tl.max(present, axis=1, keep_dims=True)
                count += tl.sum(tl.sum(present, axis=1, keep_dims=True), axis=0, keep_dims=True)
        scale = scale / tl.maximum(count.to(tl.float64), 1.0)

    total = tl.zeros([1, 1], tl.float64)
    likelihood_scale = tl.zeros([1, 1], tl.float64)
    on = _load_weight(nll_weight, column, column < classes)
    off = _load_weight(off_weight, column, column < classes)
    if NLL or OFF:
        divisor = tl.zeros([1, 1], tl.float64)
        for start in range(0, samples, ROWS):
            row = (start + tl.arange(0, ROWS))[:, None].to(tl.int64)
            inside = (row < samples) & (column < classes)
            part = tl.zeros([ROWS, CLASSES], tl.float64)
            if NLL:
                x = _load_sum(stats, SUM_NLL, row, column, 1, samples, classes, SUMS, False)
                part += tl.where(on == 0, 0.0, _constant(nll_scale) * on * x)
            if OFF:
                x = _load_sum(stats, SUM_OFF, row, column, 1, samples, classes, SUMS, False)
                part += tl.where(off == 0, 0.0, _constant(off_scale) * off * x)
            total += tl.sum(tl.sum(part, axis=1, keep_dims=True), axis=0, keep_dims=True)
            if NORMALISER == BY_VOXELS or NORMALISER == BY_ELEMENTS:
                size = _load_sum(stats, SUM_W, row, column, 1, samples, classes, SUMS, False)
                if NORMALISER == BY_VOXELS:
                    inside = inside & (column == 0)
            else:
                size = _load_sum(stats, SUM_TP, row, column, 1, samples, classes, SUMS, False)
                size += _load_sum(stats, SUM_FN, row, column, 1, samples, classes, SUMS, False)
                if NORMALISER == BY_TARGET:
                    size = size * on
            size = tl.where(inside, size, 0.0)
            divisor += tl.sum(tl.sum(size, axis=1, keep_dims=True), axis=0, keep_dims=True)
        if NORMALISER == BY_ONE:
            divisor = tl.full([1, 1], 1.0, tl.float64)
        likelihood_scale = tl.where(divisor == 0, 0.0, 1.0 / tl.where(divisor == 0, 1.0, divisor))
        total = tl.where(divisor == 0, 0.0, total / tl.where(divisor == 0, 1.0, divisor))

    for start in range(0, rows, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None].to(tl.int64)
        inside = (row < rows) & valid
        a = tl.zeros([ROWS, CLASSES], tl.float64)
        b = tl.zeros([ROWS, CLASSES], tl.float64)
        if RATIO:
            hits = tl.zeros([ROWS, CLASSES], tl.float64)
            size = tl.zeros([ROWS, CLASSES], tl.float64)
            misses = tl.zeros([ROWS, CLASSES], tl.float64)
            volume = tl.zeros([ROWS, CLASSES], tl.float64)
            for k in tl.static_range(SUMS):
                x = _load_sum(stats, k, row, column, samples, rows, classes, SUMS, BATCH)
                n, d = _constant(numerator[k]), _constant(denominator[k])
                hits += _multiply(n, x)
                size += _multiply(d, x)
                misses += _multiply(d - n, x)
                if k == SUM_TP or k == SUM_FN:
                    volume += x
            present = volume != 0
            weight = tl.full([1, CLASSES], 1.0, tl.float64)
            if class_weight is not None:
                weight = tl.load(class_weight + (column - first_class), mask=valid, other=0.0)
            pooling = tl.full([1, 1], 1.0, tl.float64)
            if POOLING:
                pooling = _pooling_weights(volume, present, inside, POOLING, ABSENT) * weight
                hits = tl.sum(tl.where(inside, pooling * hits, 0.0), axis=1, keep_dims=True)
                size = tl.sum(tl.where(inside, pooling * size, 0.0), axis=1, keep_dims=True)
                misses = tl.sum(tl.where(inside, pooling * misses, 0.0), axis=1, keep_dims=True)
                anything = tl.where(present & inside, 1.0, 0.0)
                present = tl.max(anything, axis=1, keep_dims=True) != 0
            value, a, b = _terms(
                misses,
                hits,
                size,
                _constant(smooth_nr),
                _constant(smooth_dr),
                _constant(min_denominator),
                _constant(exponent),
                LOG,
                LINEAR,
            )
            if MIXED:
                flat_value, flat_a, flat_b = _terms(
                    misses,
                    hits,
                    size,
                    _constant(smooth_nr),
                    _constant(smooth_dr),
                    _constant(min_denominator),
                    _constant(exponent),
                    LOG,
                    True,
                )
                plain = column < exponent_from
                value = tl.where(plain, flat_value, value)
                a, b = tl.where(plain, flat_a, a), tl.where(plain, flat_b, b)
            if class_weight is not None and not POOLING:
                value, a, b = value * weight, a * weight, b * weight
            if ABSENT != KEEP:
                value = tl.where(present, value, 0.0)
                a = tl.where(present, a, 0.0)
                b = tl.where(present, b, 0.0)
            value, a, b = value * scale, a * scale, b * scale
            if NO_REDUCTION:
                if POOLING:
                    tl.store(loss + row, value.to(loss.dtype.element_ty), mask=row < rows)
                else:
                    place = loss + row * (classes - first_class) + (column - first_class)
                    tl.store(place, value.to(loss.dtype.element_ty), mask=inside)
            else:
                if POOLING:
                    value = tl.where(row < rows, value, 0.0)
                else:
                    value = tl.where(inside, value, 0.0)
                total += tl.sum(tl.sum(value, axis=1, keep_dims=True), axis=0, keep_dims=True)
            a = tl.where(inside, a * pooling, 0.0)
            b = tl.where(inside, b * pooling, 0.0)
        for k in tl.static_range(SUMS):
            n, d = _constant(numerator[k]), _constant(denominator[k])
            slope = a * (d - n) + b * d
            if k == SUM_NLL and NLL:
                slope += _constant(nll_scale) * on * likelihood_scale
            if k == SUM_OFF and OFF:
                slope += _constant(off_scale) * off * likelihood_scale
            place = cotangents + (row * classes + column) * SUMS + k
            mask = (row < rows) & (column < classes)
            if BATCH:
                for sample in range(samples):
                    tl.store(place + sample * classes * SUMS, slope, mask=mask)
            else:
                tl.store(place, slope, mask=mask)
    if not NO_REDUCTION:
        here = tl.zeros([1, 1], tl.int32)
        tl.store(loss + here, total.to(loss.dtype.element_ty))
    elif not RATIO:
        for start in range(0, terms, CLASSES):
            place = start + column
            tl.store(loss + place, tl.zeros([1, CLASSES], tl.float32), mask=place < terms)


@triton.jit
def _pooling_weights(volume, present, inside, POOLING: tl.constexpr, ABSENT: tl.constexpr):
    """Weights of the classes in the generalised Dice loss, without the class weights."""
    if POOLING == UNIFORM:
        weights = volume * 0.0 + 1.0
    else:
        base = volume if POOLING == SIMPLE else volume * volume
        infinite = tl.abs(1.0 / base) == float("inf")
        weights = tl.where(infinite, 0.0, 1.0 / base)
        largest = tl.max(tl.where(inside, weights, 0.0), axis=1, keep_dims=True)
        largest = tl.where(largest == 0, 1.0, largest)
        weights = tl.where(infinite, largest, weights)
    if ABSENT == IGNORE:
        weights = tl.where(present, weights, 0.0)
    return weights


@triton.jit
def _terms(
    misses,
    hits,
    size,
    smooth_nr,
    smooth_dr,
    min_denominator,
    exponent,
    LOG: tl.constexpr,
    LINEAR: tl.constexpr,
):
    """The terms and their slopes: d term / d s_k = a (den_k - num_k) + b den_k."""
    n = hits + smooth_nr
    d = size + smooth_dr
    clamped = d < min_denominator
    d = tl.where(clamped, min_denominator, d)
    empty = d == 0
    d = tl.where(empty, 1.0, d)
    index = tl.where(clamped, d - n, misses + (smooth_dr - smooth_nr)) / d
    index = tl.where(empty, 0.0, index)
    if LOG:
        ratio = n / d
        floored = ratio < min_denominator
        small = -log_of_sum(1.0, -index, 1.0 - index)
        large = -tl.log(tl.where(floored, min_denominator, ratio))
        value = tl.where((index < 0.5) & (floored == 0), small, large)
        a = tl.where(empty | floored, 0.0, 1.0 / n)
    elif LINEAR:
        value = index
        a = tl.where(empty, 0.0, 1.0 / d)
    else:
        flat = index <= 0
        positive = tl.where(flat, 1.0, index)
        logarithm = tl.log(positive)
        value = tl.where(flat, 0.0, tl.exp(exponent * logarithm))
        a = tl.where(flat, 0.0, exponent * tl.exp((exponent - 1.0) * logarithm) / d)
    return value, a, tl.where(clamped, -a, -index * a)


@triton.jit
def _backward(
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
    shape: tuple[int, ...] = ()
    if reduction == Reduction.none:
        shape = () if batch else (samples,)
        shape = shape if class_pooling else (*shape, classes - first_class)
    dtype = torch.float64 if double_loss else torch.float32
    loss = torch.empty(shape, dtype=dtype, device=stats.device)
    cotangents = torch.empty(stats.shape, dtype=torch.float64, device=stats.device)
    weights = [
        None if w is None else w.to(torch.float64).contiguous()
        for w in (class_weight, nll_weight, off_weight)
    ]
    with device_guard(stats):
        _forward[(1,)](
            stats.contiguous(),
            *weights,
            loss,
            cotangents,
            samples,
            rows,
            classes,
            first_class,
            rows if class_pooling else rows * (classes - first_class),
            exponent_from,
            *_coefficients(numerator),
            *_coefficients(denominator),
            float(smooth_nr),
            float(smooth_dr),
            float(min_denominator),
            float(exponent),
            float(ratio_scale),
            float(nll_scale),
            float(off_scale),
            **forward_constants(
                sums,
                rows,
                classes,
                ratio_scale != 0,
                nll_scale != 0 and reduction != Reduction.none,
                off_scale != 0 and reduction != Reduction.none,
                batch,
                class_pooling,
                absent,
                reduction,
                normaliser,
                log,
                exponent == 1,
                exponent_from > 0 and exponent != 1,
            ),
            num_warps=4,
            **LAUNCH_OPTIONS,
        )
    return loss, cotangents


def forward_constants(
    sums: int,
    rows: int,
    classes: int,
    ratio: bool,
    nll: bool,
    off: bool,
    batch: bool,
    pooling: int,
    absent: int,
    reduction: int,
    normaliser: int,
    log: bool,
    linear: bool,
    mixed: bool = False,
) -> dict[str, Any]:
    """The kernel's compile-time parameters."""
    block_classes = power_of_two(classes)
    return {
        "SUMS": sums,
        "RATIO": ratio,
        "NLL": nll,
        "OFF": off,
        "BATCH": batch,
        "POOLING": pooling,
        "ABSENT": absent,
        "NO_REDUCTION": reduction == Reduction.none,
        "MEAN": reduction == Reduction.mean,
        "NORMALISER": normaliser,
        "LOG": log,
        "LINEAR": linear,
        "MIXED": mixed,
        "ROWS": min(power_of_two(rows), max(1, TILE // block_classes)),
        "CLASSES": block_classes,
    }


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
    grad_b = strides[0] if grad_loss.ndim > 0 and not batch else 0
    grad_c = strides[-1] if by_class else 0
    block = 1024
    with device_guard(cotangents):
        _backward[(triton.cdiv(result.numel(), block),)](
            grad_loss,
            cotangents.contiguous(),
            result,
            result.numel(),
            cotangents.shape[1],
            first_class,
            grad_b,
            grad_c,
            SUMS=cotangents.shape[2],
            BY_CLASS=by_class,
            BLOCK=block,
            num_warps=4,
            **LAUNCH_OPTIONS,
        )
    return result
