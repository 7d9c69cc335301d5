"""Soft confusion sums and their gradient, fused.

Layout of the work. A *tile* is BLOCK voxels of all classes, held in registers as a tuple of
TILES blocks of (CLASSES, BLOCK) numbers: up to 16 classes one block a class (no padding, no
exchange between threads), up to 256 classes in blocks of one class a warp. Beyond that the
*online* kernels walk over the class blocks and read the logits again (from the cache) instead of
keeping them.

Reduction. A *chunk* is a fixed number of consecutive tiles; it is summed in float32 (float64 for
float64 logits). A program adds its chunks in float64, in order, and writes one row of partial sums;
the programs that come last add up the rows, in an order that does not depend on which they are (see
reduction). All of it is fixed by the shape alone, so the bits depend neither on the number of
multiprocessors nor on their timing.

Launch parameters come from a table that depends on the shape and the dtype only: another block
shape is another order of summation, that is other bits of the sums.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from voxfuse.contract import CORE, FULL, Activation, Overlap, TargetKind
from voxfuse.triton_kernels.launches import (
    LAUNCH_OPTIONS,
    VECTOR_BYTES,
    device_guard,
    most_registers,
    power_of_two,
)
from voxfuse.triton_kernels.numerics import (
    NAN,
    at_most_finite,
    exponential,
    finite,
    log_of_sum,
    log_one_plus,
    power,
    reciprocal,
)
from voxfuse.triton_kernels.reduction import Rows, finish_rows, row_of_program, stack
from voxfuse.triton_kernels.views import view_in_place, view_of

#: Most classes with one register block a class; half as many in float64.
FEW_CLASSES = 16
#: Most classes of which a tile fits in registers with labels and softmax; three quarters of that in
#: the backward pass.
RESIDENT_CLASSES = 256
#: Classes in a block of the online kernels.
CLASS_BLOCK = 32
#: Most bytes of partial sums, and with the online kernels.
WORKSPACE_BYTES = 1 << 20
ONLINE_WORKSPACE_BYTES = 8 << 20
#: Most programs that reduce one sample. Enough to fill any GPU several times over.
MAX_SLOTS = 31 * 132
#: Programs come in multiples of this where there are so many: the multiprocessors of the H200,
#: which then finish together. On another GPU the bits are the same and the last round less even.
SLOT_MULTIPLE = 132
#: Tiles of a volume above which chunks grow.
TILES_TO_FILL = 2048
#: Most samples a launch takes.
MAX_SAMPLES = 65535
#: Registers that a thread may take, and that the threads of a program may take together.
REGISTERS, REGISTERS_A_PROGRAM = 255, 1 << 16
#: Most tiles in a chunk: so many float32 additions follow each other in a thread.
MAX_TILES = 16
#: Most tiles that a program of the backward pass walks over.
TILES_A_PROGRAM = 8

NONE: tl.constexpr = tl.constexpr(int(Activation.none))
SIGMOID: tl.constexpr = tl.constexpr(int(Activation.sigmoid))
SOFTMAX: tl.constexpr = tl.constexpr(int(Activation.softmax))
LABELS: tl.constexpr = tl.constexpr(int(TargetKind.labels))
DENSE: tl.constexpr = tl.constexpr(int(TargetKind.dense))
INDICATOR: tl.constexpr = tl.constexpr(int(TargetKind.indicator))
BINARY: tl.constexpr = tl.constexpr(int(TargetKind.binary))


# --- reading -------------------------------------------------------------------------------------


@triton.jit
def _inside(start, voxels, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Which voxels of the tile at ``start`` exist, (1, BLOCK)."""
    if EVEN:
        result = tl.full([1, BLOCK], True, tl.int1)
    else:
        rest = tl.minimum(voxels - start, BLOCK).to(tl.int32)
        result = tl.arange(0, BLOCK)[None, :] < rest
    return result


@triton.jit
def _class_index(first, CLASSES: tl.constexpr):
    """Indices of a block of classes, (CLASSES, 1)."""
    return (first + tl.arange(0, CLASSES))[:, None]


@triton.jit
def _load_values(
    pointer, index, stride_c, offset, inside, classes, PADDED: tl.constexpr, DTYPE: tl.constexpr
):
    """Load a (CLASSES, BLOCK) block and convert it to the compute type."""
    mask = inside & (index < classes) if PADDED else inside
    return tl.load(pointer + index.to(tl.int64) * stride_c + offset, mask=mask, other=0).to(DTYPE)


@triton.jit
def _softmax_logits(zs, classes, TILES: tl.constexpr, CLASSES: tl.constexpr, DTYPE: tl.constexpr):
    """Finite logits; classes that only pad a block get probability 0."""
    result = ()
    for t in tl.static_range(TILES):
        z = finite(zs[t])
        if CLASSES > 1 and t == TILES - 1:
            z = tl.where(_class_index(t * CLASSES, CLASSES) < classes, z, float("-inf"))
        result = result + (z,)
    return result


@triton.jit
def _load_voxels(
    target,
    target_offset,
    weight,
    weight_offset,
    inside,
    classes,
    ignore,
    TARGET: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return (label, target value, weight, included), each (1, BLOCK).

    Labels of excluded voxels are -1, so that no class matches them: ignored, out of range, not
    whole, of weight 0 or past the end.
    """
    included = inside
    label = tl.full([1, 1], -1, tl.int32)
    value = tl.full([1, 1], 0.0, DTYPE)
    w = tl.full([1, 1], 1.0, DTYPE)
    if weight is not None:
        w = tl.load(weight + weight_offset, mask=inside, other=0).to(DTYPE)
        included = included & (w != 0)
    if TARGET == LABELS:
        raw = tl.load(target + target_offset, mask=inside, other=0)
        if raw.dtype.is_floating():
            number = raw if raw.dtype == tl.float64 else raw.to(tl.float32)
            # No class has a label that is not whole, and none has NaN.
            included = included & (number >= 0) & (number < classes)
            included = included & (number == tl.floor(number))
        elif raw.dtype == tl.int64:
            number = raw
            included = included & (number >= 0) & (number < classes)
        else:
            number = raw.to(tl.int32)
            included = included & (number >= 0) & (number < classes)
        if HAS_IGNORE:
            included = included & (tl.where(included, number, 0).to(tl.int32) != ignore)
        label = tl.where(included, number, -1).to(tl.int32)
    elif TARGET != DENSE:
        raw = tl.load(target + target_offset, mask=inside, other=0)
        if HAS_IGNORE:
            included = included & (raw.to(tl.int64) != ignore)
        if TARGET == BINARY:
            included = included & ((raw == 0) | (raw == 1))
        value = raw.to(DTYPE)
    return label, value, w, included


@triton.jit
def _load_target(
    target,
    index,
    stride_c,
    offset,
    included,
    classes,
    label,
    value,
    TARGET: tl.constexpr,
    PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The target g of a block of classes."""
    if TARGET == LABELS:
        g = tl.where(label == index, 1.0, 0.0).to(DTYPE)
    elif TARGET == DENSE:
        g = _load_values(target, index, stride_c, offset, included, classes, PADDED, DTYPE)
    else:
        g = value
    return g


# --- probabilities -------------------------------------------------------------------------------


@triton.jit
def _softmax_state(zs, TILES: tl.constexpr, CLASSES: tl.constexpr, DTYPE: tl.constexpr):
    """Largest logit; sum of exp(z - largest) over the others; how many are the largest."""
    m = zs[0]
    for t in tl.static_range(1, TILES):
        m = tl.maximum(m, zs[t])
    if CLASSES > 1:
        m = tl.max(m, axis=0, keep_dims=True)
    rest = tl.full([1, 1], 0.0, DTYPE)
    count = tl.full([1, 1], 0.0, DTYPE)
    for t in tl.static_range(TILES):
        d = zs[t] - m
        rest = rest + tl.where(d == 0, 0.0, exponential(d))
        count = count + tl.where(d == 0, 1.0, 0.0)
    if CLASSES > 1:
        rest = tl.sum(rest, axis=0, keep_dims=True)
        count = tl.sum(count, axis=0, keep_dims=True)
    return m, rest, count


@triton.jit
def _probability(z, m, rest, count, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """Return p, 1 - p, -log p and -log(1 - p), none of them a difference of near numbers.

    (With softmax the last one is not needed and not valid.)
    """
    if ACTIVATION == SOFTMAX:
        d = finite(z) - m
        e = exponential(d)
        total = rest + count
        scale = reciprocal(total)
        p = e * scale
        # Only a class with the largest logit can have more than half of the total.
        complement = tl.where(d == 0, rest + (count - 1.0), total - e) * scale
        minus_log = log_of_sum(1.0, rest + (count - 1.0), total) - d
        minus_log_complement = minus_log
    elif ACTIVATION == SIGMOID:
        z = finite(z)
        e = exponential(-tl.abs(z))
        high = reciprocal(1.0 + e)
        low = e * high
        p = tl.where(z > 0, high, low)
        complement = tl.where(z > 0, low, high)
        logarithm = log_one_plus(e)
        minus_log = logarithm + tl.maximum(-z, 0.0)
        minus_log_complement = logarithm + tl.maximum(z, 0.0)
    else:
        p = z
        complement = 1.0 - z
        minus_log = -tl.log(p)
        minus_log_complement = -tl.log(complement)
    return p, complement, minus_log, minus_log_complement


@triton.jit
def _two_classes(z0, z1, label, DTYPE: tl.constexpr):
    """Softmax of two classes with one exponential.

    Return p of the label, p of the other class, and e and the gap in
    ``-log p = log(1 + e) + gap``.
    """
    # Equal infinities differ by nothing; NaN is equal to nothing and stays.
    d = tl.where(z0 == z1, 0.0, z1 - z0)
    distance = at_most_finite(tl.abs(d))
    e = exponential(-distance)
    high = reciprocal(1.0 + e)
    low = e * high
    right = (d > 0) == (label == 1)
    p = tl.where(right, high, low)
    other = tl.where(right, low, high)
    return p, other, e, tl.where(right, 0.0, distance)


@triton.jit
def _modulated(
    p,
    complement,
    minus_log,
    gamma,
    c,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``(1-p)^gamma (-log p)`` of the classes ``c``, where 0 times infinity is 0.

    Only the first FOCAL classes have the exponent gamma (-1: all).
    """
    result = minus_log
    if GAMMA != 0:
        factor = power(complement, gamma, False, GAMMA)
        result = tl.where(factor == 0, 0.0, factor * minus_log)
        if FOCAL >= 0:
            result = tl.where(c < FOCAL, result, minus_log)
    return result


@triton.jit
def _slope(
    p,
    complement,
    minus_log,
    gamma,
    c,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``q = gamma p (1-p)^(gamma-1) log p - (1-p)^gamma``, 0 in the limit p = 1.

    -1 for the classes ``c`` from FOCAL on, whose exponent is 0.
    """
    if GAMMA == 0:
        result = tl.full([1, 1], -1.0, DTYPE)
    else:
        sure = complement == 0
        base = tl.where(sure, 1.0, complement)
        factor = power(base, gamma, True, GAMMA)
        n = tl.full([1, 1], gamma, DTYPE)
        drift = tl.where(p == 0, 0.0, p * minus_log)
        result = tl.where(sure, 0.0, -factor * (n * drift + base))
        if FOCAL >= 0:
            result = tl.where(c < FOCAL, result, -1.0)
    return result


@triton.jit
def _missed(p, complement, g):
    """``g - p``, of which nothing is lost where p is almost 1."""
    return tl.where(g >= 0.5, complement - (1.0 - g), g - p)


# --- forward -------------------------------------------------------------------------------------


@triton.jit
def _fold(
    x,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """Add the FOLD voxels that a thread holds of each class."""
    if FOLD == 1:
        result = x
    elif CONTIGUOUS:
        result = tl.sum(tl.reshape(x, [CLASSES, BLOCK // FOLD, FOLD]), axis=2)
    else:
        result = tl.sum(tl.reshape(x, [CLASSES, FOLD, BLOCK // FOLD]), axis=1)
    return result


@triton.jit
def _add_where(
    total,
    mask,
    x,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """Add ``x`` where ``mask``, so that not even NaN enters from elsewhere."""
    if FOLD == 1:
        # This form becomes one predicated addition.
        result = tl.where(mask, total + x, total)
    else:
        result = total + _fold(tl.where(mask, x, 0.0), CLASSES, BLOCK, FOLD, CONTIGUOUS)
    return result


@triton.jit
def _terms(
    z,
    m,
    rest,
    count,
    g,
    gamma,
    index,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    MIN: tl.constexpr,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    FULL: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The summands of a block of classes, without the voxel weight, in the result's order."""
    p, complement, minus_log, minus_log_complement = _probability(
        z, m, rest, count, ACTIVATION, DTYPE
    )
    r, r_complement = p, complement
    if LIKELIHOOD != ACTIVATION:
        r, r_complement, minus_log, minus_log_complement = _probability(
            z, m, rest, count, LIKELIHOOD, DTYPE
        )
    if MIN:
        tp = tl.minimum(p, g, propagate_nan=NAN)
        fp = tl.maximum(p - g, 0.0, propagate_nan=NAN)
        fn = tl.maximum(_missed(p, complement, g), 0.0, propagate_nan=NAN)
    else:
        tp = p * g
        fp = p * (1.0 - g)
        fn = complement * g
    nll = g * _modulated(r, r_complement, minus_log, gamma, index, GAMMA, FOCAL, DTYPE)
    nll = tl.where(g == 0, 0.0, nll)
    if FULL:
        if LIKELIHOOD == SOFTMAX:
            off = (1.0 - g) * minus_log
        else:
            off = (1.0 - g) * _modulated(
                r_complement, r, minus_log_complement, gamma, index, GAMMA, FOCAL, DTYPE
            )
        off = tl.where(g == 1, 0.0, off)
        terms = (tp, fp, fn, nll, off, p * p, g * g, tl.full([1, 1], 1.0, DTYPE))
    else:
        terms = (tp, fp, fn, nll)
    return terms


@triton.jit(do_not_specialize=["group"])
def _forward_resident(
    input,
    target,
    weight,
    rows,
    group,
    voxels,
    classes,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    weight_b,
    weight_v,
    tiles_a_chunk,
    chunks,
    ignore,
    gamma: tl.float64,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    MIN: tl.constexpr,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    FULL: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    TWO: tl.constexpr,
    FAST: tl.constexpr,
    LOGS: tl.constexpr,
    TILES: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    EVEN: tl.constexpr,
    SUMS: tl.constexpr,
    LEVELS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Partial sums of one program's chunks into partial[slot, sample, class, sum].

    SUMS is the number of accumulators a class block: the statistics, except that for two classes
    one class's false positive is the other's false negative, and that with LOGS the sum of the
    logarithms of softmax's totals is kept as their product, one logarithm a chunk.
    """
    slot = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    slots = tl.num_programs(0)
    STATS: tl.constexpr = 8 if FULL else 4
    input += sample * input_b
    target += sample * target_b
    if weight is not None:
        weight += sample * weight_b

    column = tl.arange(0, 1 << LEVELS)[None, :]
    row = (column // STATS) * CLASSES + tl.arange(0, CLASSES)[:, None]
    place = row_of_program(rows, classes * STATS) + row * STATS + column % STATS
    for chunk in range(slot, chunks, slots):
        sums = ()
        for _ in tl.static_range(TILES * SUMS):
            sums = sums + (tl.zeros([CLASSES, BLOCK // FOLD], DTYPE),)
        first = chunk * tiles_a_chunk * BLOCK
        last = tl.minimum(first + tiles_a_chunk * BLOCK, voxels)
        for start in range(first, last, BLOCK):
            lane = tl.arange(0, BLOCK)[None, :]
            inside = _inside(start, voxels, BLOCK, EVEN)
            offset = start * input_v + lane * input_v
            target_offset = start * target_v + lane * target_v
            label, value, w, included = _load_voxels(
                target,
                target_offset,
                weight,
                start * weight_v + lane * weight_v,
                inside,
                classes,
                ignore,
                TARGET,
                HAS_IGNORE,
                DTYPE,
            )
            zs = ()
            if TWO:
                for t in tl.static_range(2):
                    zs = zs + (tl.load(input + t * input_c + offset, mask=inside, other=0),)
                p, other, e, gap = _two_classes(zs[0].to(DTYPE), zs[1].to(DTYPE), label, DTYPE)
                if not LOGS:
                    gap = _modulated(
                        p, other, log_one_plus(e) + gap, gamma, label, GAMMA, FOCAL, DTYPE
                    )
                if weight is not None:
                    p, other, gap = p * w, other * w, gap * w
                new = ()
                for t in tl.static_range(2):
                    mask = label == t
                    new = new + (
                        _add_where(sums[SUMS * t], mask, p, 1, BLOCK, FOLD, CONTIGUOUS),
                        _add_where(sums[SUMS * t + 1], mask, other, 1, BLOCK, FOLD, CONTIGUOUS),
                        _add_where(sums[SUMS * t + 2], mask, gap, 1, BLOCK, FOLD, CONTIGUOUS),
                    )
                    if LOGS:
                        new = new + (_multiply_where(sums[SUMS * t + 3], mask, e),)
                sums = new
            else:
                for t in tl.static_range(TILES):
                    index = _class_index(t * CLASSES, CLASSES)
                    z = _load_values(
                        input,
                        index,
                        input_c,
                        offset,
                        inside,
                        classes,
                        CLASSES > 1 and t == TILES - 1,
                        DTYPE,
                    )
                    zs = zs + (z,)
                if FAST:
                    sums = _add_label_terms(
                        sums,
                        zs,
                        label,
                        w,
                        classes,
                        weight is not None,
                        gamma,
                        GAMMA,
                        FOCAL,
                        LOGS,
                        SUMS,
                        TILES,
                        CLASSES,
                        BLOCK,
                        FOLD,
                        CONTIGUOUS,
                        DTYPE,
                    )
                else:
                    m = tl.full([1, 1], 0.0, DTYPE)
                    rest, count = m, m
                    if ACTIVATION == SOFTMAX or LIKELIHOOD == SOFTMAX:
                        finite = _softmax_logits(zs, classes, TILES, CLASSES, DTYPE)
                        m, rest, count = _softmax_state(finite, TILES, CLASSES, DTYPE)
                    new = ()
                    for t in tl.static_range(TILES):
                        index = _class_index(t * CLASSES, CLASSES)
                        g = _load_target(
                            target,
                            index,
                            target_c,
                            target_offset,
                            included,
                            classes,
                            label,
                            value,
                            TARGET,
                            CLASSES > 1 and t == TILES - 1,
                            DTYPE,
                        )
                        terms = _terms(
                            zs[t],
                            m,
                            rest,
                            count,
                            g,
                            gamma,
                            index,
                            ACTIVATION,
                            LIKELIHOOD,
                            MIN,
                            GAMMA,
                            FOCAL,
                            FULL,
                            DTYPE,
                        )
                        for s in tl.static_range(STATS):
                            new = new + (
                                _add_where(
                                    sums[t * STATS + s],
                                    included,
                                    tl.broadcast_to(terms[s] * w, [CLASSES, BLOCK]),
                                    CLASSES,
                                    BLOCK,
                                    FOLD,
                                    CONTIGUOUS,
                                ),
                            )
                    sums = new
        if LOGS:
            sums = _take_logarithms(sums, TILES, SUMS, DTYPE)
        if TWO:
            p0, other0, nll0, p1, other1, nll1 = sums
            sums = (p0, other1, other0, nll0, p1, other0, other1, nll1)
        elif TILES * STATS < (1 << LEVELS):
            for _ in tl.static_range((1 << LEVELS) - TILES * STATS):
                sums = sums + (tl.zeros([CLASSES, BLOCK // FOLD], DTYPE),)
        table = tl.reshape(stack(sums, LEVELS), [CLASSES, BLOCK // FOLD, 1 << LEVELS])
        # The float64 sums live in memory: in registers, every thread would hold all of them.
        later = tl.full([1, 1], chunk, tl.int64) >= slots
        before = tl.load(place, mask=(row < classes) & later, other=0.0)
        tl.store(place, before + tl.sum(table, axis=1).to(tl.float64), mask=row < classes)
        tl.debug_barrier()
    finish_rows(rows, classes * STATS, group, ROWS)


@triton.jit
def _multiply_where(product, mask, x):
    """``product`` is P - 1; return P (1 + x) - 1 where ``mask``, without losing small x."""
    return tl.where(mask, product + (product * x + x), product)


@triton.jit
def _take_logarithms(sums, TILES: tl.constexpr, SUMS: tl.constexpr, DTYPE: tl.constexpr):
    """Add the logarithm of each class's product, its last accumulator, to the one before."""
    result = ()
    for t in tl.static_range(TILES):
        product = sums[t * SUMS + SUMS - 1]
        logarithm = log_of_sum(1.0, product, 1.0 + product)
        for s in tl.static_range(SUMS - 2):
            result = result + (sums[t * SUMS + s],)
        result = result + (sums[t * SUMS + SUMS - 2] + logarithm,)
    return result


@triton.jit
def _gaps_to_largest(zs, classes, TILES: tl.constexpr, CLASSES: tl.constexpr, DTYPE: tl.constexpr):
    """Return ``z - largest`` of every class, never NaN, and something NaN if a logit is NaN.

    Infinite logits count as the limit of ever larger ones. Classes that only pad the last block
    have a gap of infinity.
    """
    if CLASSES > 1:
        valid = _class_index((TILES - 1) * CLASSES, CLASSES) < classes
        m = tl.where(valid, zs[TILES - 1], float("-inf"))
        for t in tl.static_range(TILES - 1):
            m = tl.maximum(m, zs[t], propagate_nan=NAN)
    else:
        m = zs[0]
        for t in tl.static_range(1, TILES):
            m = tl.maximum(m, zs[t], propagate_nan=NAN)
    if CLASSES > 1:
        broken = tl.max(tl.where(m == m, 0.0, 1.0), axis=0, keep_dims=True)
        m = tl.max(m, axis=0, keep_dims=True)
        m = tl.where(broken == 0, m, float("nan"))
    gaps = ()
    for t in tl.static_range(TILES):
        # The minimum of 0 and NaN is 0: infinity less infinity counts as no gap.
        gap = tl.minimum(zs[t] - m, 0.0)
        if CLASSES > 1 and t == TILES - 1:
            gap = tl.where(valid, gap, float("-inf"))
        gaps = gaps + (gap,)
    return gaps, m


@triton.jit
def _add_label_terms(
    sums,
    zs,
    label,
    w,
    classes,
    WEIGHTED: tl.constexpr,
    gamma,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    LOGS: tl.constexpr,
    SUMS: tl.constexpr,
    TILES: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Labels with softmax throughout: all but FP is a property of the label's class alone."""
    gaps, m = _gaps_to_largest(zs, classes, TILES, CLASSES, DTYPE)
    es = ()
    d_label = tl.full([1, 1], 0.0, DTYPE)
    others = tl.full([1, 1], 0.0, DTYPE)
    for t in tl.static_range(TILES):
        hit = label == _class_index(t * CLASSES, CLASSES)
        e = exponential(gaps[t])
        es = es + (e,)
        if CLASSES > 1:
            d_label = d_label + tl.where(hit, gaps[t], 0.0)
            others = others + tl.where(hit, 0.0, e)
        else:
            d_label = tl.where(hit, gaps[t], d_label)
            others = others + tl.where(hit, 0.0, e)
    if CLASSES > 1:
        d_label = tl.sum(d_label, axis=0, keep_dims=True)
        others = tl.sum(others, axis=0, keep_dims=True)
    d_label = tl.where(m == m, d_label, m)
    e_label = exponential(d_label)
    total = e_label + others
    scale = reciprocal(total)
    p = e_label * scale
    other = others * scale
    nll = at_most_finite(-d_label)
    if not LOGS:
        # Where e_label is the smaller of the two, log(total) is not small.
        nll = nll + log_of_sum(e_label, others, total)
        nll = _modulated(p, other, nll, gamma, label, GAMMA, FOCAL, DTYPE)
    if WEIGHTED:
        scale, p, other, nll = scale * w, p * w, other * w, nll * w
    scale = tl.where(label >= 0, scale, 0.0)
    new = ()
    for t in tl.static_range(TILES):
        index = _class_index(t * CLASSES, CLASSES)
        hit = label == index
        # No e is NaN, so that a scale of 0 keeps excluded voxels out.
        wrong = tl.where(hit, 0.0, es[t]) * scale
        if FOLD == 1:
            fp = sums[SUMS * t + 1] + wrong
        else:
            fp = sums[SUMS * t + 1] + _fold(wrong, CLASSES, BLOCK, FOLD, CONTIGUOUS)
        new = new + (
            _add_where(sums[SUMS * t], hit, p, CLASSES, BLOCK, FOLD, CONTIGUOUS),
            fp,
            _add_where(sums[SUMS * t + 2], hit, other, CLASSES, BLOCK, FOLD, CONTIGUOUS),
            _add_where(sums[SUMS * t + 3], hit, nll, CLASSES, BLOCK, FOLD, CONTIGUOUS),
        )
        if LOGS:
            new = new + (_multiply_where(sums[SUMS * t + 4], hit, others + (e_label - 1.0)),)
    return new


@triton.jit(do_not_specialize=["group"])
def _forward_online(
    input,
    target,
    weight,
    rows,
    group,
    voxels,
    classes,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    weight_b,
    weight_v,
    tiles,
    ignore,
    gamma: tl.float64,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    MIN: tl.constexpr,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    FULL: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Any number of classes: each program adds its tiles, in order, into its own partial sums.

    They lie in memory, partial[slot, sample, class, sum]; no other program touches them.
    """
    slot = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    slots = tl.num_programs(0)
    STATS: tl.constexpr = 8 if FULL else 4
    LEVELS: tl.constexpr = 3 if FULL else 2
    input += sample * input_b
    target += sample * target_b
    if weight is not None:
        weight += sample * weight_b
    column = tl.arange(0, STATS)[None, :]
    own = row_of_program(rows, classes * STATS)

    for tile in range(slot, tiles, slots):
        start = tile * BLOCK
        lane = tl.arange(0, BLOCK)[None, :]
        inside = _inside(start, voxels, BLOCK, EVEN)
        offset = start * input_v + lane * input_v
        target_offset = start * target_v + lane * target_v
        label, value, w, included = _load_voxels(
            target,
            target_offset,
            weight,
            start * weight_v + lane * weight_v,
            inside,
            classes,
            ignore,
            TARGET,
            HAS_IGNORE,
            DTYPE,
        )
        m, rest, count, _ = _online_state(
            input,
            offset,
            input_c,
            inside,
            classes,
            ACTIVATION,
            LIKELIHOOD,
            False,
            CLASSES,
            BLOCK,
            DTYPE,
        )
        for c in range(0, classes, CLASSES):
            index = _class_index(c, CLASSES)
            z = _load_values(input, index, input_c, offset, inside, classes, True, DTYPE)
            g = _load_target(
                target,
                index,
                target_c,
                target_offset,
                included,
                classes,
                label,
                value,
                TARGET,
                True,
                DTYPE,
            )
            terms = _terms(
                z,
                m,
                rest,
                count,
                g,
                gamma,
                index,
                ACTIVATION,
                LIKELIHOOD,
                MIN,
                GAMMA,
                FOCAL,
                FULL,
                DTYPE,
            )
            sums = ()
            for s in tl.static_range(STATS):
                wide = tl.broadcast_to(terms[s] * w, [CLASSES, BLOCK])
                sums = sums + (tl.where(included, wide, 0.0),)
            table = tl.reshape(stack(sums, LEVELS), [CLASSES, BLOCK, STATS])
            place = own + index.to(tl.int64) * STATS + column
            mask = (index < classes) & (column < STATS)
            # The first tile overwrites what the memory held.
            later = tl.full([1, 1], tile, tl.int64) >= slots
            before = tl.load(place, mask=mask & later, other=0.0)
            tl.store(place, before + tl.sum(table, axis=1).to(tl.float64), mask=mask)
        # Other threads of this program may read these sums at the next tile.
        tl.debug_barrier()
    finish_rows(rows, classes * STATS, group, ROWS)


@triton.jit
def _online_state(
    input,
    offset,
    input_c,
    inside,
    classes,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    FIND: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``_softmax_state`` of voxels whose classes are read block by block.

    With FIND also a class with the largest logit; 0 without, or if no logit is a number.
    """
    m = tl.full([1, BLOCK], float("-inf"), DTYPE)
    rest = tl.full([1, BLOCK], 0.0, DTYPE)
    count = tl.full([1, BLOCK], 0.0, DTYPE)
    largest = tl.full([1, BLOCK], 0, tl.int32)
    if ACTIVATION == SOFTMAX or LIKELIHOOD == SOFTMAX:
        for c in range(0, classes, CLASSES):
            index = _class_index(c, CLASSES)
            z = _load_values(input, index, input_c, offset, inside, classes, True, DTYPE)
            z = tl.where(index < classes, finite(z), float("-inf"))
            new = tl.maximum(m, tl.max(z, axis=0, keep_dims=True))
            d = z - new
            # What was the largest so far may now belong to the others.
            shrunk = tl.where(m == new, 1.0, exponential(m - new))
            moved = tl.where(m == new, 0.0, count * shrunk)
            rest = rest * shrunk + moved
            count = tl.where(m == new, count, 0.0)
            if FIND:
                found = tl.max(tl.where(d == 0, index, 0), axis=0, keep_dims=True)
                largest = tl.where(m == new, largest, found)
            rest += tl.sum(tl.where(d == 0, 0.0, exponential(d)), axis=0, keep_dims=True)
            count += tl.sum(tl.where(d == 0, 1.0, 0.0), axis=0, keep_dims=True)
            m = new
    return m, rest, count, largest


# --- backward ------------------------------------------------------------------------------------


@triton.jit
def _load_cotangents(
    grad, index, classes, SUMS: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr
):
    """(t - n, f, l, o, s) of a block of classes: the cotangents of TP less FN, FP, NLL, OFF, P2."""
    place = grad + index.to(tl.int64) * SUMS
    mask = index < classes if PADDED else index >= 0
    f = tl.load(place + 1, mask=mask, other=0.0)
    n = tl.load(place + 2, mask=mask, other=0.0)
    hit = tl.load(place, mask=mask, other=0.0) - n
    nll = tl.load(place + 3, mask=mask, other=0.0)
    if SUMS == 8:
        o = tl.load(place + 4, mask=mask, other=0.0)
        s = tl.load(place + 5, mask=mask, other=0.0)
        result = (hit.to(DTYPE), f.to(DTYPE), nll.to(DTYPE), o.to(DTYPE), (2.0 * s).to(DTYPE))
    else:
        result = (hit.to(DTYPE), f.to(DTYPE), nll.to(DTYPE))
    return result


@triton.jit
def _overlap_share(p, complement, g, MIN: tl.constexpr):
    """a in h = a hit + (1 - a) f, the slope of the overlap at p."""
    if MIN:
        missed = _missed(p, complement, g)
        share = tl.where(missed > 0, 1.0, tl.where(missed < 0, 0.0, 0.5))
        share = tl.where(missed == missed, share, missed)
    else:
        share = g
    return share


@triton.jit
def _parts_of_largest(
    rest,
    count,
    g,
    cotangents,
    MIN: tl.constexpr,
    TARGET: tl.constexpr,
    SUMS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What h of a class with the largest logit is made of, from its target and cotangents.

    (a, hit, f, slope of P2) for a dense target; else (h without P2, 0, 0, slope of P2).
    """
    scale = reciprocal(rest + count)
    a = _overlap_share(scale, (rest + (count - 1.0)) * scale, g, MIN)
    zero = tl.full([1, 1], 0.0, DTYPE)
    square = scale * cotangents[4] if SUMS == 8 else zero
    if TARGET == DENSE:
        parts = (a, cotangents[0], cotangents[1], square)
    else:
        parts = (a * cotangents[0] + (1.0 - a) * cotangents[1], zero, zero, square)
    return parts


@triton.jit
def _less_that_of_largest(p, a, cotangents, best, TARGET: tl.constexpr, SUMS: tl.constexpr):
    """h less that of the class with the largest logit, whose ``_parts_of_largest`` are ``best``.

    Of a dense target, nothing is multiplied before the difference is formed: of what the two
    classes share of hit and of f, and of what one has as hit and the other as f.
    """
    hit, f = cotangents[0], cotangents[1]
    if TARGET == DENSE:
        h = tl.minimum(a, best[0]) * (hit - best[1])
        h = h + (1.0 - tl.maximum(a, best[0])) * (f - best[2])
        h = h + tl.maximum(a - best[0], 0.0, propagate_nan=NAN) * (hit - best[2])
        h = h + tl.maximum(best[0] - a, 0.0, propagate_nan=NAN) * (f - best[1])
    else:
        h = (a * hit + (1.0 - a) * f) - best[0]
    if SUMS == 8:
        h = h + (p * cotangents[4] - best[3])
    return h


@triton.jit
def _slopes(
    z,
    m,
    rest,
    count,
    g,
    cotangents,
    best,
    gamma,
    index,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    MIN: tl.constexpr,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    TARGET: tl.constexpr,
    SUMS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return (p, h, r, u, direct) of a block of classes.

    h is the slope at p, with softmax less that of the class with the largest logit, whose parts are
    ``best``; u is the softmax likelihood's slope before its share over the classes, and
    direct the part of the gradient that needs no other class.
    """
    nll = cotangents[2]
    p, complement, minus_log, minus_log_complement = _probability(
        z, m, rest, count, ACTIVATION, DTYPE
    )
    a = _overlap_share(p, complement, g, MIN)
    if ACTIVATION == SOFTMAX:
        h = _less_that_of_largest(p, a, cotangents, best, TARGET, SUMS)
    else:
        h = a * cotangents[0] + (1.0 - a) * cotangents[1]
        if SUMS == 8:
            h = h + p * cotangents[4]
    if ACTIVATION == SIGMOID:
        direct = p * complement * h
    elif ACTIVATION == NONE:
        direct = h + 0.0 * z
    else:
        direct = 0.0 * p

    r, r_complement = p, complement
    if LIKELIHOOD != ACTIVATION:
        r, r_complement, minus_log, minus_log_complement = _probability(
            z, m, rest, count, LIKELIHOOD, DTYPE
        )
    q = _slope(r, r_complement, minus_log, gamma, index, GAMMA, FOCAL, DTYPE)
    u = nll * g * q
    if LIKELIHOOD == SOFTMAX:
        if SUMS == 8:
            u = u - cotangents[3] * (1.0 - g)
        # Together with the other classes' share this is u - r sum u without its cancellation.
        direct = direct + u * r_complement
    else:
        chain = r_complement if LIKELIHOOD == SIGMOID else 1.0 / r
        # Without a cotangent there is no slope, not even an infinite one (r = 0).
        direct = direct + tl.where(nll * g == 0, 0.0, u * chain)
        if SUMS == 8:
            q = _slope(r_complement, r, minus_log_complement, gamma, index, GAMMA, FOCAL, DTYPE)
            chain = r if LIKELIHOOD == SIGMOID else 1.0 / r_complement
            off = cotangents[3] * (1.0 - g)
            direct = direct - tl.where(off == 0, 0.0, off * q * chain)
    return p, h, r, u, direct


@triton.jit
def _backward_resident(
    grad,
    input,
    target,
    weight,
    output,
    voxels,
    classes,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    weight_b,
    weight_v,
    output_b,
    output_c,
    output_v,
    tiles_a_program,
    ignore,
    gamma: tl.float64,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    MIN: tl.constexpr,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    TWO: tl.constexpr,
    FAST: tl.constexpr,
    TILES: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    SUMS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Gradient of the tiles of one program."""
    sample = tl.program_id(1).to(tl.int64)
    grad += sample * classes * SUMS
    input += sample * input_b
    target += sample * target_b
    output += sample * output_b
    if weight is not None:
        weight += sample * weight_b
    cotangents = ()
    for t in tl.static_range(TILES):
        index = _class_index(t * CLASSES, CLASSES)
        cotangents = cotangents + (
            _load_cotangents(grad, index, classes, SUMS, CLASSES > 1 and t == TILES - 1, DTYPE),
        )

    first = tl.program_id(0).to(tl.int64) * tiles_a_program * BLOCK
    last = tl.minimum(first + tiles_a_program * BLOCK, voxels)
    for start in range(first, last, BLOCK):
        lane = tl.arange(0, BLOCK)[None, :]
        inside = _inside(start, voxels, BLOCK, EVEN)
        offset = start * input_v + lane * input_v
        target_offset = start * target_v + lane * target_v
        label, value, w, included = _load_voxels(
            target,
            target_offset,
            weight,
            start * weight_v + lane * weight_v,
            inside,
            classes,
            ignore,
            TARGET,
            HAS_IGNORE,
            DTYPE,
        )
        zs = ()
        for t in tl.static_range(TILES):
            index = _class_index(t * CLASSES, CLASSES)
            z = _load_values(
                input,
                index,
                input_c,
                offset,
                inside,
                classes,
                CLASSES > 1 and t == TILES - 1,
                DTYPE,
            )
            zs = zs + (z,)
        WEIGHTED: tl.constexpr = weight is not None
        if TWO:
            results = _two_class_gradient(
                zs, label, w, cotangents, WEIGHTED, gamma, GAMMA, FOCAL, DTYPE
            )
        elif FAST:
            results = _label_gradient(
                grad,
                zs,
                label,
                w,
                cotangents,
                classes,
                WEIGHTED,
                gamma,
                GAMMA,
                FOCAL,
                TILES,
                CLASSES,
                DTYPE,
            )
        else:
            m = tl.full([1, 1], 0.0, DTYPE)
            rest, count = m, m
            if ACTIVATION == SOFTMAX or LIKELIHOOD == SOFTMAX:
                finite = _softmax_logits(zs, classes, TILES, CLASSES, DTYPE)
                m, rest, count = _softmax_state(finite, TILES, CLASSES, DTYPE)
            gs = ()
            for t in tl.static_range(TILES):
                index = _class_index(t * CLASSES, CLASSES)
                g = _load_target(
                    target,
                    index,
                    target_c,
                    target_offset,
                    included,
                    classes,
                    label,
                    value,
                    TARGET,
                    CLASSES > 1 and t == TILES - 1,
                    DTYPE,
                )
                gs = gs + (g,)
            zero = tl.full([1, 1], 0.0, DTYPE)
            mean, top, low = zero, zero, zero
            best = (zero, zero, zero, zero)
            if ACTIVATION == SOFTMAX:
                for t in tl.static_range(TILES):
                    largest = _is_largest(zs[t], m, DTYPE)
                    if CLASSES > 1 and t == TILES - 1:
                        largest = largest & (_class_index(t * CLASSES, CLASSES) < classes)
                    parts = _parts_of_largest(
                        rest, count, gs[t], cotangents[t], MIN, TARGET, SUMS, DTYPE
                    )
                    best = _choose(best, parts, largest, t == 0, CLASSES)
                if CLASSES > 1:
                    best = _greatest(best)
            for t in tl.static_range(TILES):
                index = _class_index(t * CLASSES, CLASSES)
                p, h, r, u, direct = _slopes(
                    zs[t],
                    m,
                    rest,
                    count,
                    gs[t],
                    cotangents[t],
                    best,
                    gamma,
                    index,
                    ACTIVATION,
                    LIKELIHOOD,
                    MIN,
                    GAMMA,
                    FOCAL,
                    TARGET,
                    SUMS,
                    DTYPE,
                )
                shares = _shares(
                    zs[t],
                    m,
                    p,
                    h,
                    u,
                    index < classes,
                    ACTIVATION,
                    LIKELIHOOD,
                    CLASSES > 1 and t == TILES - 1,
                    DTYPE,
                )
                mean, top, low = mean + shares[0], top + shares[1], low + shares[2]
            if CLASSES > 1:
                if ACTIVATION == SOFTMAX:
                    mean = tl.sum(mean, axis=0, keep_dims=True)
                if LIKELIHOOD == SOFTMAX:
                    top = tl.sum(top, axis=0, keep_dims=True)
                    low = tl.sum(low, axis=0, keep_dims=True)
            results = ()
            for t in tl.static_range(TILES):
                index = _class_index(t * CLASSES, CLASSES)
                p, h, r, u, direct = _slopes(
                    zs[t],
                    m,
                    rest,
                    count,
                    gs[t],
                    cotangents[t],
                    best,
                    gamma,
                    index,
                    ACTIVATION,
                    LIKELIHOOD,
                    MIN,
                    GAMMA,
                    FOCAL,
                    TARGET,
                    SUMS,
                    DTYPE,
                )
                result = _combine(
                    zs[t],
                    m,
                    p,
                    h,
                    r,
                    u,
                    direct,
                    mean,
                    top,
                    low,
                    ACTIVATION,
                    LIKELIHOOD,
                    DTYPE,
                )
                results = results + (tl.where(included, result * w, 0.0),)
        for t in tl.static_range(TILES):
            index = _class_index(t * CLASSES, CLASSES)
            result = tl.broadcast_to(results[t], [CLASSES, BLOCK]).to(output.dtype.element_ty)
            place = output + index.to(tl.int64) * output_c + start * output_v + lane * output_v
            tl.store(
                place,
                result,
                mask=inside & (index < classes) if CLASSES > 1 and t == TILES - 1 else inside,
            )


@triton.jit
def _is_largest(z, m, DTYPE: tl.constexpr):
    """Whether a class has its voxel's largest logit ``m``."""
    return finite(z) - m == 0


@triton.jit
def _choose(best, parts, largest, FIRST: tl.constexpr, CLASSES: tl.constexpr):
    """``best`` with the ``parts`` of a block's class with the largest logit, if it has one.

    Of several classes with it, any, and any mixture of their parts, serves.
    """
    result = ()
    for i in tl.static_range(4):
        if CLASSES > 1:
            part = tl.where(largest, parts[i], float("-inf"))
            result = result + (part if FIRST else tl.maximum(best[i], part),)
        else:
            result = result + (tl.where(largest, parts[i], best[i]),)
    return result


@triton.jit
def _greatest(parts):
    """The parts of a block's class with the largest logit from those of all of its rows."""
    result = ()
    for i in tl.static_range(4):
        result = result + (tl.max(parts[i], axis=0, keep_dims=True),)
    return result


@triton.jit
def _shares(
    z,
    m,
    p,
    h,
    u,
    valid,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What the softmax of every class needs of this block, to be added up over the classes.

    p h, and u of the classes with the largest logit and of the others. As h is measured from the
    largest logit's, it is 0 where p is not small, so that nothing cancels, neither where a
    prediction is nearly perfect nor where it is sure and wrong.
    """
    mean = tl.full([1, 1], 0.0, DTYPE)
    top, low = mean, mean
    if ACTIVATION == SOFTMAX:
        mean = p * h
        if PADDED:
            mean = tl.where(valid, mean, 0.0)
    if LIKELIHOOD == SOFTMAX:
        largest = _is_largest(z, m, DTYPE)
        top = tl.where(largest, u, 0.0)
        low = tl.where(largest, 0.0, u)
        if PADDED:
            top = tl.where(valid, top, 0.0)
            low = tl.where(valid, low, 0.0)
    return mean, top, low


@triton.jit
def _combine(
    z,
    m,
    p,
    h,
    r,
    u,
    direct,
    mean,
    top,
    low,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The gradient of a block of classes, without the voxel weight."""
    result = direct
    if ACTIVATION == SOFTMAX:
        result = result + p * (h - mean)
    if LIKELIHOOD == SOFTMAX:
        # u of the other classes. Of a class that is almost certain it must not be a difference.
        largest = _is_largest(z, m, DTYPE)
        result = result - r * tl.where(largest, low + (top - u), top + (low - u))
    return result


@triton.jit
def _two_class_gradient(
    zs,
    label,
    w,
    cotangents,
    WEIGHTED: tl.constexpr,
    gamma,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Two classes, labels: the gradient of one class is minus the other's."""
    p, other, e, gap = _two_classes(zs[0], zs[1], label, DTYPE)
    first = label == 0
    hit = tl.where(first, cotangents[0][0] - cotangents[1][1], cotangents[1][0] - cotangents[0][1])
    nll = tl.where(first, cotangents[0][2], cotangents[1][2])
    q = _slope(p, other, log_one_plus(e) + gap, gamma, label, GAMMA, FOCAL, DTYPE)
    of_label = other * (p * hit + nll * q)
    if WEIGHTED:
        of_label = of_label * w
    of_label = tl.where(label >= 0, of_label, 0.0)
    of_first = tl.where(first, of_label, -of_label)
    return (of_first, -of_first)


@triton.jit
def _label_gradient(
    grad,
    zs,
    label,
    w,
    cotangents,
    classes,
    WEIGHTED: tl.constexpr,
    gamma,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    TILES: tl.constexpr,
    CLASSES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Labels with softmax throughout."""
    gaps, m = _gaps_to_largest(zs, classes, TILES, CLASSES, DTYPE)
    zero = tl.full([1, 1], 0.0, DTYPE)
    best, nll, d_label, e_label, others = zero, zero, zero, zero, zero
    es = ()
    for t in tl.static_range(TILES):
        index = _class_index(t * CLASSES, CLASSES)
        hit = label == index
        h = tl.where(hit, cotangents[t][0], cotangents[t][1])
        e = exponential(gaps[t])
        es = es + (e,)
        others = others + tl.where(hit, 0.0, e)
        largest = gaps[t] == 0
        if CLASSES > 1:
            h = tl.where(largest, h, float("-inf"))
            best = h if t == 0 else tl.maximum(best, h)
            e_label = e_label + tl.where(hit, e, 0.0)
        else:
            best = tl.where(largest, h, best)
            nll = tl.where(hit, cotangents[t][2], nll)
            e_label = tl.where(hit, e, e_label)
        if GAMMA != 0:
            d_label = d_label + tl.where(hit, gaps[t], 0.0)
    if CLASSES > 1:
        best = tl.max(best, axis=0, keep_dims=True)
        # Read again, one a voxel: of all classes they would take registers.
        nll = tl.load(grad + label.to(tl.int64) * 4 + 3, mask=label >= 0, other=0.0).to(DTYPE)
        e_label = tl.sum(e_label, axis=0, keep_dims=True)
        others = tl.sum(others, axis=0, keep_dims=True)
        if GAMMA != 0:
            d_label = tl.sum(d_label, axis=0, keep_dims=True)
    total = e_label + others
    scale = reciprocal(total)
    # h is measured from a most probable class's, as in _shares; the label's own part of the
    # likelihood is its slope times 1 - p.
    low = zero
    for t in tl.static_range(TILES):
        hit = label == _class_index(t * CLASSES, CLASSES)
        low = low + es[t] * (tl.where(hit, cotangents[t][0], cotangents[t][1]) - best)
    if CLASSES > 1:
        low = tl.sum(low, axis=0, keep_dims=True)
    slope = -nll
    if GAMMA != 0:
        minus_log = log_of_sum(e_label, others, total) + at_most_finite(-d_label)
        slope = nll * _slope(
            e_label * scale, others * scale, minus_log, gamma, label, GAMMA, FOCAL, DTYPE
        )
    mean = low * scale
    included = label >= 0
    scale = tl.where(included, tl.where(m == m, scale, m), 0.0)
    if WEIGHTED:
        scale = scale * w
    of_label = slope * (others * scale)
    results = ()
    for t in tl.static_range(TILES):
        hit = label == _class_index(t * CLASSES, CLASSES)
        near = tl.where(hit, cotangents[t][0], cotangents[t][1]) - best
        near = tl.where(hit, near - mean, near - (mean + slope))
        result = (es[t] * scale) * near + tl.where(hit, of_label, 0.0)
        results = results + (result,)
    return results


@triton.jit
def _backward_online(
    grad,
    input,
    target,
    weight,
    output,
    voxels,
    classes,
    input_b,
    input_c,
    input_v,
    target_b,
    target_c,
    target_v,
    weight_b,
    weight_v,
    output_b,
    output_c,
    output_v,
    tiles_a_program,
    ignore,
    gamma: tl.float64,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    MIN: tl.constexpr,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    SUMS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Gradient for any number of classes: the class blocks are read up to three times."""
    sample = tl.program_id(1).to(tl.int64)
    grad += sample * classes * SUMS
    input += sample * input_b
    target += sample * target_b
    output += sample * output_b
    if weight is not None:
        weight += sample * weight_b
    first = tl.program_id(0).to(tl.int64) * tiles_a_program * BLOCK
    last = tl.minimum(first + tiles_a_program * BLOCK, voxels)
    for start in range(first, last, BLOCK):
        lane = tl.arange(0, BLOCK)[None, :]
        inside = _inside(start, voxels, BLOCK, EVEN)
        offset = start * input_v + lane * input_v
        target_offset = start * target_v + lane * target_v
        label, value, w, included = _load_voxels(
            target,
            target_offset,
            weight,
            start * weight_v + lane * weight_v,
            inside,
            classes,
            ignore,
            TARGET,
            HAS_IGNORE,
            DTYPE,
        )
        m, rest, count, largest = _online_state(
            input,
            offset,
            input_c,
            inside,
            classes,
            ACTIVATION,
            LIKELIHOOD,
            ACTIVATION == SOFTMAX,
            CLASSES,
            BLOCK,
            DTYPE,
        )
        zero = tl.full([1, 1], 0.0, DTYPE)
        best = (zero, zero, zero, zero)
        mean = tl.full([1, BLOCK], 0.0, DTYPE)
        top = tl.full([1, BLOCK], 0.0, DTYPE)
        low = tl.full([1, BLOCK], 0.0, DTYPE)
        if ACTIVATION == SOFTMAX:
            best = _parts_of_largest(
                rest,
                count,
                _load_target(
                    target,
                    largest,
                    target_c,
                    target_offset,
                    included,
                    classes,
                    label,
                    value,
                    TARGET,
                    False,
                    DTYPE,
                ),
                _load_cotangents(grad, largest, classes, SUMS, False, DTYPE),
                MIN,
                TARGET,
                SUMS,
                DTYPE,
            )
        if ACTIVATION == SOFTMAX or LIKELIHOOD == SOFTMAX:
            for c in range(0, classes, CLASSES):
                index = _class_index(c, CLASSES)
                z = _load_values(input, index, input_c, offset, inside, classes, True, DTYPE)
                g = _load_target(
                    target,
                    index,
                    target_c,
                    target_offset,
                    included,
                    classes,
                    label,
                    value,
                    TARGET,
                    True,
                    DTYPE,
                )
                cotangents = _load_cotangents(grad, index, classes, SUMS, True, DTYPE)
                p, h, r, u, direct = _slopes(
                    z,
                    m,
                    rest,
                    count,
                    g,
                    cotangents,
                    best,
                    gamma,
                    index,
                    ACTIVATION,
                    LIKELIHOOD,
                    MIN,
                    GAMMA,
                    FOCAL,
                    TARGET,
                    SUMS,
                    DTYPE,
                )
                shares = _shares(
                    z, m, p, h, u, index < classes, ACTIVATION, LIKELIHOOD, True, DTYPE
                )
                if ACTIVATION == SOFTMAX:
                    mean += tl.sum(shares[0], axis=0, keep_dims=True)
                if LIKELIHOOD == SOFTMAX:
                    top += tl.sum(shares[1], axis=0, keep_dims=True)
                    low += tl.sum(shares[2], axis=0, keep_dims=True)
        for c in range(0, classes, CLASSES):
            index = _class_index(c, CLASSES)
            z = _load_values(input, index, input_c, offset, inside, classes, True, DTYPE)
            g = _load_target(
                target,
                index,
                target_c,
                target_offset,
                included,
                classes,
                label,
                value,
                TARGET,
                True,
                DTYPE,
            )
            cotangents = _load_cotangents(grad, index, classes, SUMS, True, DTYPE)
            p, h, r, u, direct = _slopes(
                z,
                m,
                rest,
                count,
                g,
                cotangents,
                best,
                gamma,
                index,
                ACTIVATION,
                LIKELIHOOD,
                MIN,
                GAMMA,
                FOCAL,
                TARGET,
                SUMS,
                DTYPE,
            )
            result = _combine(
                z,
                m,
                p,
                h,
                r,
                u,
                direct,
                mean,
                top,
                low,
                ACTIVATION,
                LIKELIHOOD,
                DTYPE,
            )
            result = tl.where(included, result * w, 0.0).to(output.dtype.element_ty)
            place = output + index.to(tl.int64) * output_c + start * output_v + lane * output_v
            tl.store(place, result, mask=inside & (index < classes))


# --- launches ------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What the choice of kernel and block shapes depends on."""

    dtype: torch.dtype
    batch: int
    classes: int
    voxels: int
    target_kind: int
    activation: int
    likelihood: int
    overlap: int
    has_ignore: bool
    has_weight: bool
    gamma: float
    sums: int
    contiguous: bool
    focal: int = -1  # classes with the exponent gamma; -1: all


class Plan(NamedTuple):
    """A kernel with its compile-time parameters."""

    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    #: Registers that a thread may take on an NVIDIA GPU; None: as many as the assembler likes.
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Options of the launch."""
        limit = {} if self.registers is None else most_registers(self.registers)
        return {"num_warps": self.num_warps, **LAUNCH_OPTIONS, **limit}


def _labels_only(problem: Problem) -> bool:
    return (
        problem.target_kind == TargetKind.labels
        and problem.activation == problem.likelihood == Activation.softmax
        and problem.overlap == Overlap.product
        and problem.sums == CORE
    )


def _is_online(problem: Problem, backward: bool) -> bool:
    """Whether the classes are too many for a tile of them to be kept in registers."""
    if problem.dtype == torch.float64:
        most = RESIDENT_CLASSES // 4 if _labels_only(problem) else FEW_CLASSES // 4
    elif _labels_only(problem):
        most = RESIDENT_CLASSES * 3 // 4 if backward else RESIDENT_CLASSES
    else:
        most = RESIDENT_CLASSES * (5 if backward else 6) // 16
    return problem.classes > most


def _block_shape(problem: Problem, backward: bool) -> tuple[int, int, bool]:
    """Warps, voxels a thread, and whether every thread holds all classes of its voxels."""
    itemsize = problem.dtype.itemsize
    if _is_online(problem, backward):
        most = 1 if problem.dtype == torch.float64 and not _labels_only(problem) else 4
        return 4, min(most, VECTOR_BYTES // itemsize), False
    few = problem.classes <= FEW_CLASSES // (2 if problem.dtype == torch.float64 else 1)
    labels_only = _labels_only(problem)
    most = _voxels_a_thread(problem, labels_only, backward)
    # Beyond FEW_CLASSES every warp has one class of each block.
    return (
        4 if few else _warps(problem, labels_only),
        min(VECTOR_BYTES // itemsize, most),
        few,
    )


def plan(problem: Problem, backward: bool) -> Plan:
    """Choose the kernel and its block shapes, from the shape and the dtype alone."""
    classes = problem.classes
    labels_only = _labels_only(problem)
    num_warps, vector, few = _block_shape(problem, backward)
    constants: dict[str, Any] = {
        "ACTIVATION": problem.activation,
        "LIKELIHOOD": problem.likelihood,
        "MIN": problem.overlap == Overlap.min,
        "GAMMA": int(problem.gamma) if problem.gamma in (0, 1, 2) else 3,
        "FOCAL": problem.focal,
        "TARGET": problem.target_kind,
        "HAS_IGNORE": problem.has_ignore,
        "DTYPE": tl.float64 if problem.dtype == torch.float64 else tl.float32,
    }
    if backward:
        constants["SUMS"] = problem.sums
    else:
        constants["FULL"] = problem.sums == FULL
    if _is_online(problem, backward):
        kernel = _backward_online if backward else _forward_online
        block = 16 * vector
        constants |= {"CLASSES": CLASS_BLOCK, "BLOCK": block}
        constants["EVEN"] = problem.voxels % block == 0
        return Plan(kernel, constants, num_warps, _registers(num_warps))

    two = labels_only and classes == 2
    # In the commonest cases the assembler takes what it needs by itself.
    common = labels_only and problem.contiguous and problem.dtype != torch.float64
    registers = None if common else _registers(num_warps)
    block_classes = 1 if few else num_warps
    tiles = triton.cdiv(classes, block_classes)
    block = 32 * vector * (num_warps if few else 1)
    constants |= {
        "TWO": two,
        "FAST": labels_only and not two,
        "TILES": tiles,
        "CLASSES": block_classes,
        "BLOCK": block,
        "EVEN": problem.voxels % block == 0,
    }
    if backward:
        return Plan(_backward_resident, constants, num_warps, registers)
    # Voxels of a class that lie in one thread are added up before they are accumulated, unless
    # there are registers enough to keep them apart, which saves selections.
    sums = 3 if two else problem.sums
    apart = tiles * sums * vector <= 64 or not (few or problem.contiguous)
    logs = few and labels_only and apart and not problem.has_weight and problem.gamma == 0
    constants |= {
        "LOGS": logs,
        "FOLD": 1 if apart else vector,
        "CONTIGUOUS": problem.contiguous,
        "SUMS": sums + 1 if logs else sums,
        "LEVELS": 3 if two else power_of_two(tiles * sums).bit_length() - 1,
    }
    return Plan(_forward_resident, constants, num_warps, registers)


def _registers(num_warps: int) -> int:
    """Registers that a thread may take where the assembler, left alone, would take fewer."""
    return min(REGISTERS, REGISTERS_A_PROGRAM // (32 * num_warps))


def _warps(problem: Problem, labels_only: bool) -> int:
    """Warps of a program, and classes of a block, for more than FEW_CLASSES.

    Few warps that hold many classes each: what a thread needs beside its classes it needs once.
    """
    warps = 4 if problem.classes <= 64 else 8
    wide = problem.dtype == torch.float64 or not labels_only
    return 2 * warps if wide else warps


def _voxels_a_thread(problem: Problem, labels_only: bool, backward: bool) -> int:
    """Most voxels of all its classes that a thread has registers for (read off the compiler)."""
    classes, double = problem.classes, problem.dtype == torch.float64
    if classes <= 2:
        most = 8 if labels_only else 4
    elif classes <= (8 if backward and labels_only else 4):
        most = 4
    elif classes <= 8:
        most = 2
    elif not labels_only or classes > 128:
        most = 1
    else:
        most = 2 if problem.contiguous or classes > FEW_CLASSES else 1
    if classes > 2 and (problem.sums == FULL or (backward and not labels_only)):
        most = max(1, most // 2)
    if double and classes > (8 if backward and labels_only else 4 if labels_only else 2):
        most = 1
    return most


def reduction_shape(problem: Problem, chosen: Plan) -> tuple[int, int, int]:
    """Return (tiles a chunk, chunks a sample, slots a sample): who adds what to what."""
    tiles = triton.cdiv(problem.voxels, chosen.constants["BLOCK"])
    online = chosen.kernel is _forward_online
    tiles_a_chunk = 1
    while not online and tiles_a_chunk < MAX_TILES:
        if tiles * problem.batch < TILES_TO_FILL * tiles_a_chunk:
            break
        tiles_a_chunk *= 2
    chunks = triton.cdiv(tiles, tiles_a_chunk)
    allowed = ONLINE_WORKSPACE_BYTES if online else WORKSPACE_BYTES
    slots = allowed // (problem.batch * problem.classes * problem.sums * 8)
    slots = max(1, min(chunks, MAX_SLOTS, slots))
    if slots < chunks and slots > SLOT_MULTIPLE:
        slots -= slots % SLOT_MULTIPLE
    # The same number of chunks for every slot, but for the last round.
    return tiles_a_chunk, chunks, triton.cdiv(chunks, triton.cdiv(chunks, slots))


def _describe(
    input: torch.Tensor,
    target: torch.Tensor,
    activation: int,
    likelihood: int,
    overlap: int,
    ignore_index: int | None,
    has_weight: bool,
    gamma: float,
    sums: int,
    contiguous: bool,
    focal_classes: int | None,
) -> Problem:
    batch, classes = input.shape[:2]
    voxels = math.prod(input.shape[2:])
    if classes > 1:
        dense = target.ndim == input.ndim and target.shape[1] == classes
        kind = TargetKind.dense if dense else TargetKind.labels
        # A label outside [0, C) is excluded anyway.
        has_ignore = ignore_index is not None and 0 <= ignore_index < classes
    else:
        strict = not target.is_floating_point() and target.dtype != torch.bool
        kind = TargetKind.binary if strict else TargetKind.indicator
        has_ignore = ignore_index is not None
    return Problem(
        input.dtype,
        batch,
        classes,
        voxels,
        kind,
        activation,
        likelihood,
        overlap,
        has_ignore,
        has_weight,
        gamma,
        sums,
        contiguous,
        -1 if focal_classes is None else focal_classes,
    )


def _flatten_all(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[int, ...]]:
    """The three tensors, and their strides in the order of the kernels' parameters."""
    axes = input.ndim
    flat, *input_strides = view_of(input)
    flat_target, *target_strides = view_of(target, channels=target.ndim == axes)
    weight_strides = [0, 0, 0]
    if weight is not None:
        weight, *weight_strides = view_of(weight, channels=weight.ndim == axes)
    strides = (*input_strides, *target_strides, weight_strides[0], weight_strides[2])
    return flat, flat_target, weight, strides


def _split(*tensors: torch.Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Parts of at most MAX_SAMPLES samples of every tensor."""
    batch = next(len(x) for x in tensors if x is not None)
    for start in range(0, batch, MAX_SAMPLES):
        part = slice(start, start + MAX_SAMPLES)
        yield tuple(None if x is None else x[part] for x in tensors)


def soft_confusion(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    activation: int,
    likelihood: int,
    overlap: int,
    ignore_index: int | None,
    gamma: float,
    full: bool,
    focal_classes: int | None = None,
) -> torch.Tensor:
    """Return (B, C, 4) or, with ``full``, (B, C, 8) float64 sums; see voxfuse.soft_confusion."""
    sums = FULL if full else CORE
    shape = (*input.shape[:2], sums)
    if input.numel() == 0:
        return torch.zeros(shape, dtype=torch.float64, device=input.device)
    if shape[0] > MAX_SAMPLES:
        options = (activation, likelihood, overlap, ignore_index, gamma, full, focal_classes)
        parts = _split(input, target, weight)
        return torch.cat([soft_confusion(*part, *options) for part in parts])
    flat, flat_target, flat_weight, strides = _flatten_all(input, target, weight)
    problem = _describe(
        input,
        target,
        activation,
        likelihood,
        overlap,
        ignore_index,
        weight is not None,
        gamma,
        sums,
        strides[2] == 1,
        focal_classes,
    )
    result = torch.empty(shape, dtype=torch.float64, device=input.device)
    chosen = plan(problem, backward=False)
    tiles_a_chunk, chunks, slots = reduction_shape(problem, chosen)
    work = (chunks,) if chosen.kernel is _forward_online else (tiles_a_chunk, chunks)
    with device_guard(input):
        rows = Rows(result, slots, chosen.num_warps)
        chosen.kernel[(slots, problem.batch)](
            flat,
            flat_target,
            flat_weight,
            rows.views,
            rows.group,
            problem.voxels,
            problem.classes,
            *strides,
            *work,
            ignore_index if problem.has_ignore else 0,
            gamma,
            **chosen.constants,
            ROWS=rows.shape,
            **chosen.options,
        )
        rows.finish()
    return result


def soft_confusion_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    activation: int,
    likelihood: int,
    overlap: int,
    ignore_index: int | None,
    gamma: float,
    focal_classes: int | None = None,
) -> torch.Tensor:
    """Return the gradient at ``input``, in its dtype and layout."""
    gradient = torch.empty_like(input)
    if input.numel() == 0:
        return gradient
    if input.shape[0] > MAX_SAMPLES:
        options = (activation, likelihood, overlap, ignore_index, gamma, focal_classes)
        for part, output in zip(
            _split(grad, input, target, weight), gradient.split(MAX_SAMPLES), strict=True
        ):
            output.copy_(soft_confusion_backward(*part, *options))
        return gradient
    flat, flat_target, flat_weight, strides = _flatten_all(input, target, weight)
    view = view_in_place(gradient)
    if view is None:
        view = view_of(torch.empty(input.shape, dtype=input.dtype, device=input.device))
    output, *output_strides = view
    sums = grad.shape[2]
    problem = _describe(
        input,
        target,
        activation,
        likelihood,
        overlap,
        ignore_index,
        weight is not None,
        gamma,
        sums,
        strides[2] == 1,
        focal_classes,
    )
    chosen = plan(problem, backward=True)
    tiles = triton.cdiv(problem.voxels, chosen.constants["BLOCK"])
    # Several tiles a program share the reading of the cotangents.
    tiles_a_program = max(1, min(TILES_A_PROGRAM, tiles * problem.batch // TILES_TO_FILL))
    with device_guard(input):
        chosen.kernel[(triton.cdiv(tiles, tiles_a_program), problem.batch)](
            grad.contiguous(),
            flat,
            flat_target,
            flat_weight,
            output,
            problem.voxels,
            problem.classes,
            *strides,
            *output_strides,
            tiles_a_program,
            ignore_index if problem.has_ignore else 0,
            gamma,
            **chosen.constants,
            **chosen.options,
        )
    if output is not gradient:
        gradient.copy_(output)
    return gradient
