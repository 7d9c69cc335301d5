"""Soft confusion sums and their gradient, fused.

Layout of the work. A *tile* is BLOCK voxels of all classes, held in registers as a tuple of
TILES blocks of (CLASSES, BLOCK) numbers: up to 16 classes one block a class (no padding, no
exchange between threads), up to 256 classes in blocks of 32. Beyond that the *online* kernels
walk over the class blocks and read the logits again (from the cache) instead of keeping them.

Reduction. A *chunk* is a fixed number of consecutive tiles; it is summed in float32 (float64 for
float64 logits). A program adds its chunks in float64, in order, and writes one partial sum; the
chunks of a program are fixed by the shape alone, so the bits depend neither on the number of
multiprocessors nor on their timing. A second kernel adds the partial sums. No atomics.

Launch parameters come from a table that depends on the shape and the dtype only. They are not
tuned at run time: another block shape is another order of summation, that is other bits.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from voxfuse.triton_kernels._common import (
    LAUNCH_OPTIONS,
    VECTOR_BYTES,
    device_guard,
    flatten,
    log_of_sum,
    log_one_plus,
    power,
    power_of_two,
    stack,
    strides_of,
)

#: Most classes with one register block a class.
FEW_CLASSES = 16
#: Most classes of which a tile fits in registers.
RESIDENT_CLASSES = 256
#: Classes in a block when there are more than FEW_CLASSES.
CLASS_BLOCK = 32
#: Most bytes of partial sums (up to RESIDENT_CLASSES classes; eight times as many beyond).
WORKSPACE_BYTES = 1 << 20
#: Most programs that reduce one sample. Enough to fill any GPU several times over.
MAX_SLOTS = 4096
#: Most tiles in a chunk: so many float32 additions follow each other in a thread.
MAX_TILES = 16

_LABELS, _DENSE, _INDICATOR, _BINARY = 0, 1, 2, 3

NONE: tl.constexpr = tl.constexpr(0)
SIGMOID: tl.constexpr = tl.constexpr(1)
SOFTMAX: tl.constexpr = tl.constexpr(2)
LABELS: tl.constexpr = tl.constexpr(_LABELS)
DENSE: tl.constexpr = tl.constexpr(_DENSE)
INDICATOR: tl.constexpr = tl.constexpr(_INDICATOR)
BINARY: tl.constexpr = tl.constexpr(_BINARY)
NAN: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


# --- reading -------------------------------------------------------------------------------------


@triton.jit
def _finite(z, DTYPE: tl.constexpr):
    """Treat +-inf as the limit of ever larger logits; NaN stays."""
    top = 3.4028234663852886e38 if DTYPE == tl.float32 else 1.7976931348623157e308
    return tl.minimum(tl.maximum(z, -top, propagate_nan=NAN), top, propagate_nan=NAN)


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
    """Indices of a block of classes, (CLASSES, 1) int64."""
    return (first + tl.arange(0, CLASSES).to(tl.int64))[:, None]


@triton.jit
def _load_values(
    pointer, index, stride_c, offset, inside, classes, PADDED: tl.constexpr, DTYPE: tl.constexpr
):
    """Load a (CLASSES, BLOCK) block and convert it to the compute type."""
    mask = inside & (index < classes) if PADDED else inside
    return tl.load(pointer + index * stride_c + offset, mask=mask, other=0).to(DTYPE)


@triton.jit
def _softmax_logits(zs, classes, TILES: tl.constexpr, CLASSES: tl.constexpr, DTYPE: tl.constexpr):
    """Finite logits; classes that only pad a block get probability 0."""
    result = ()
    for t in tl.static_range(TILES):
        z = _finite(zs[t], DTYPE)
        if CLASSES > 1:
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

    Labels of excluded voxels are -1, so that no class matches them: ignored, out of range, of
    weight 0 or past the end.
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
            # Truncation towards zero makes the labels of (-1, 0) class 0.
            number = raw.to(tl.float32)
            included = included & (number > -1.0) & (number < classes)
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
        rest = rest + tl.where(d == 0, 0.0, tl.exp(d))
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
        d = _finite(z, DTYPE) - m
        e = tl.exp(d)
        total = rest + count
        scale = 1.0 / total
        p = e * scale
        # Only a class with the largest logit can have more than half of the total.
        complement = tl.where(d == 0, rest + (count - 1.0), total - e) * scale
        minus_log = log_of_sum(1.0, rest + (count - 1.0), total) - d
        minus_log_complement = minus_log
    elif ACTIVATION == SIGMOID:
        z = _finite(z, DTYPE)
        e = tl.exp(-tl.abs(z))
        high = 1.0 / (1.0 + e)
        low = e * high
        p = tl.where(z > 0, high, low)
        complement = tl.where(z > 0, low, high)
        logarithm = log_one_plus(e, DTYPE)
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
    """Softmax of two classes with one exponential: p of the label, p of the other, -log p."""
    # Equal infinities differ by nothing; NaN is equal to nothing and stays.
    d = tl.where(z0 == z1, 0.0, z1 - z0)
    distance = tl.abs(d)
    e = tl.exp(-distance)
    high = 1.0 / (1.0 + e)
    low = e * high
    right = (d > 0) == (label == 1)
    p = tl.where(right, high, low)
    other = tl.where(right, low, high)
    minus_log = log_one_plus(e, DTYPE) + tl.where(right, 0.0, distance)
    minus_log = _finite(minus_log, DTYPE)
    return p, other, minus_log


@triton.jit
def _modulated(p, complement, minus_log, gamma, GAMMA: tl.constexpr, DTYPE: tl.constexpr):
    """``(1-p)^gamma (-log p)``, where 0 times infinity is 0."""
    result = minus_log
    if GAMMA != 0:
        factor = power(complement, gamma, False, GAMMA, DTYPE)
        result = tl.where(factor == 0, 0.0, factor * minus_log)
    return result


@triton.jit
def _slope(p, complement, minus_log, gamma, GAMMA: tl.constexpr, DTYPE: tl.constexpr):
    """``q = gamma p (1-p)^(gamma-1) log p - (1-p)^gamma``, 0 in the limit p = 1."""
    if GAMMA == 0:
        result = tl.full([1, 1], -1.0, DTYPE)
    else:
        sure = complement == 0
        base = tl.where(sure, 1.0, complement)
        factor = power(base, gamma, True, GAMMA, DTYPE)
        n = tl.full([1, 1], gamma, DTYPE)
        drift = tl.where(p == 0, 0.0, p * minus_log)
        result = tl.where(sure, 0.0, -factor * (n * drift + base))
    return result


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
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    MIN: tl.constexpr,
    GAMMA: tl.constexpr,
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
        fn = tl.maximum(g - p, 0.0, propagate_nan=NAN)
    else:
        tp = p * g
        fp = p * (1.0 - g)
        fn = complement * g
    nll = g * _modulated(r, r_complement, minus_log, gamma, GAMMA, DTYPE)
    nll = tl.where(g == 0, 0.0, nll)
    if FULL:
        if LIKELIHOOD == SOFTMAX:
            off = (1.0 - g) * minus_log
        else:
            off = (1.0 - g) * _modulated(r_complement, r, minus_log_complement, gamma, GAMMA, DTYPE)
        off = tl.where(g == 1, 0.0, off)
        return (tp, fp, fn, nll, off, p * p, g * g, tl.full([1, 1], 1.0, DTYPE))
    return (tp, fp, fn, nll)


@triton.jit
def _forward_resident(
    input,
    target,
    weight,
    partial,
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
    FULL: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    TWO: tl.constexpr,
    FAST: tl.constexpr,
    TILES: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    EVEN: tl.constexpr,
    SUMS: tl.constexpr,
    LEVELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Partial sums of one program's chunks into partial[slot, sample, class, sum].

    SUMS is the number of accumulators a class block: the statistics, except for two classes, where
    3 a class are enough (one class's false positive is the other's false negative).
    """
    slot = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    slots = tl.num_programs(0)
    samples = tl.num_programs(1)
    PADDED: tl.constexpr = CLASSES > 1
    STATS: tl.constexpr = 8 if FULL else 4
    input += sample * input_b
    target += sample * target_b
    if weight is not None:
        weight += sample * weight_b

    column = tl.arange(0, 1 << LEVELS)[None, :]
    row = (column // STATS) * CLASSES + tl.arange(0, CLASSES)[:, None]
    place = partial + (slot * samples + sample) * classes * STATS + row * STATS + column % STATS
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
                p, other, nll = _two_classes(zs[0].to(DTYPE), zs[1].to(DTYPE), label, DTYPE)
                nll = _modulated(p, other, nll, gamma, GAMMA, DTYPE)
                if weight is not None:
                    p, other, nll = p * w, other * w, nll * w
                new = ()
                for t in tl.static_range(2):
                    new = new + (
                        _add_where(sums[3 * t], label == t, p, 1, BLOCK, FOLD, CONTIGUOUS),
                        _add_where(sums[3 * t + 1], label == t, other, 1, BLOCK, FOLD, CONTIGUOUS),
                        _add_where(sums[3 * t + 2], label == t, nll, 1, BLOCK, FOLD, CONTIGUOUS),
                    )
                sums = new
            else:
                for t in tl.static_range(TILES):
                    index = _class_index(t * CLASSES, CLASSES)
                    z = _load_values(input, index, input_c, offset, inside, classes, PADDED, DTYPE)
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
                            PADDED,
                            DTYPE,
                        )
                        terms = _terms(
                            zs[t],
                            m,
                            rest,
                            count,
                            g,
                            gamma,
                            ACTIVATION,
                            LIKELIHOOD,
                            MIN,
                            GAMMA,
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
        if TWO:
            p0, other0, nll0, p1, other1, nll1 = sums
            sums = (p0, other1, other0, nll0, p1, other0, other1, nll1)
        elif TILES * SUMS < (1 << LEVELS):
            for _ in tl.static_range((1 << LEVELS) - TILES * SUMS):
                sums = sums + (tl.zeros([CLASSES, BLOCK // FOLD], DTYPE),)
        table = tl.reshape(stack(sums, LEVELS), [CLASSES, BLOCK // FOLD, 1 << LEVELS])
        # The float64 sums live in memory: in registers, every thread would hold all of them.
        later = tl.full([1, 1], chunk, tl.int64) >= slots
        before = tl.load(place, mask=(row < classes) & later, other=0.0)
        tl.store(place, before + tl.sum(table, axis=1).to(tl.float64), mask=row < classes)
        tl.debug_barrier()


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
    TILES: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Labels with softmax throughout: all but FP is a property of the label's class alone."""
    zs = _softmax_logits(zs, classes, TILES, CLASSES, DTYPE)
    m = zs[0]
    for t in tl.static_range(1, TILES):
        m = tl.maximum(m, zs[t])
    if CLASSES > 1:
        m = tl.max(m, axis=0, keep_dims=True)
    es = ()
    d_label = tl.full([1, 1], 0.0, DTYPE)
    others = tl.full([1, 1], 0.0, DTYPE)
    for t in tl.static_range(TILES):
        hit = label == _class_index(t * CLASSES, CLASSES)
        d = zs[t] - m
        e = tl.exp(d)
        es = es + (e,)
        if CLASSES > 1:
            d_label = d_label + tl.where(hit, d, 0.0)
            others = others + tl.where(hit, 0.0, e)
        else:
            d_label = tl.where(hit, d, d_label)
            others = tl.where(hit, others, others + e)
    if CLASSES > 1:
        d_label = tl.sum(d_label, axis=0, keep_dims=True)
        others = tl.sum(others, axis=0, keep_dims=True)
    e_label = tl.exp(d_label)
    total = e_label + others
    scale = 1.0 / total
    p = e_label * scale
    other = others * scale
    # The larger of e_label and others need not be e_label, but then log(total) is not small.
    nll = log_of_sum(e_label, others, total) - d_label
    nll = _modulated(p, other, nll, gamma, GAMMA, DTYPE)
    if WEIGHTED:
        scale, p, other, nll = scale * w, p * w, other * w, nll * w
    included = label >= 0
    new = ()
    for t in tl.static_range(TILES):
        index = _class_index(t * CLASSES, CLASSES)
        hit = label == index
        miss = (label != index) & included
        new = new + (
            _add_where(sums[4 * t], hit, p, CLASSES, BLOCK, FOLD, CONTIGUOUS),
            _add_where(sums[4 * t + 1], miss, es[t] * scale, CLASSES, BLOCK, FOLD, CONTIGUOUS),
            _add_where(sums[4 * t + 2], hit, other, CLASSES, BLOCK, FOLD, CONTIGUOUS),
            _add_where(sums[4 * t + 3], hit, nll, CLASSES, BLOCK, FOLD, CONTIGUOUS),
        )
    return new


@triton.jit
def _forward_online(
    input,
    target,
    weight,
    partial,
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
    FULL: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Any number of classes: each program adds its tiles, in order, into its own partial sums.

    They lie in memory, partial[slot, sample, class, sum]; no other program touches them.
    """
    slot = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    slots = tl.num_programs(0)
    samples = tl.num_programs(1)
    STATS: tl.constexpr = 8 if FULL else 4
    LEVELS: tl.constexpr = 3 if FULL else 2
    input += sample * input_b
    target += sample * target_b
    if weight is not None:
        weight += sample * weight_b
    column = tl.arange(0, STATS)[None, :]
    partial += (slot * samples + sample) * classes * STATS

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
        m, rest, count = _online_state(
            input, offset, input_c, inside, classes, ACTIVATION, LIKELIHOOD, CLASSES, BLOCK, DTYPE
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
                z, m, rest, count, g, gamma, ACTIVATION, LIKELIHOOD, MIN, GAMMA, FULL, DTYPE
            )
            sums = ()
            for s in tl.static_range(STATS):
                wide = tl.broadcast_to(terms[s] * w, [CLASSES, BLOCK])
                sums = sums + (tl.where(included, wide, 0.0),)
            table = tl.reshape(stack(sums, LEVELS), [CLASSES, BLOCK, STATS])
            place = partial + index * STATS + column
            mask = (index < classes) & (column < STATS)
            # The first tile overwrites what the memory held.
            later = tl.full([1, 1], tile, tl.int64) >= slots
            before = tl.load(place, mask=mask & later, other=0.0)
            tl.store(place, before + tl.sum(table, axis=1).to(tl.float64), mask=mask)
        # Other threads of this program may read these sums at the next tile.
        tl.debug_barrier()


@triton.jit
def _online_state(
    input,
    offset,
    input_c,
    inside,
    classes,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``_softmax_state`` of voxels whose classes are read block by block."""
    m = tl.full([1, BLOCK], float("-inf"), DTYPE)
    rest = tl.full([1, BLOCK], 0.0, DTYPE)
    count = tl.full([1, BLOCK], 0.0, DTYPE)
    if ACTIVATION == SOFTMAX or LIKELIHOOD == SOFTMAX:
        for c in range(0, classes, CLASSES):
            index = _class_index(c, CLASSES)
            z = _load_values(input, index, input_c, offset, inside, classes, True, DTYPE)
            z = tl.where(index < classes, _finite(z, DTYPE), float("-inf"))
            new = tl.maximum(m, tl.max(z, axis=0, keep_dims=True))
            d = z - new
            # What was the largest so far may now belong to the others.
            shrunk = tl.where(m == new, 1.0, tl.exp(m - new))
            moved = tl.where(m == new, 0.0, count * shrunk)
            rest = rest * shrunk + moved
            count = tl.where(m == new, count, 0.0)
            rest += tl.sum(tl.where(d == 0, 0.0, tl.exp(d)), axis=0, keep_dims=True)
            count += tl.sum(tl.where(d == 0, 1.0, 0.0), axis=0, keep_dims=True)
            m = new
    return m, rest, count


@triton.jit
def _finish(partial, result, slots, size, BLOCK: tl.constexpr):
    """result[i] = sum over the slots of partial[slot, i], one output a program."""
    i = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        sums += tl.load(partial + slot.to(tl.int64) * size + i, mask=slot < slots, other=0.0)
    tl.store(result + i, tl.sum(sums, axis=0))


# --- backward ------------------------------------------------------------------------------------


@triton.jit
def _load_cotangents(
    grad, index, classes, SUMS: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr
):
    """(t - n, f, l, o, s) of a block of classes: the cotangents of TP less FN, FP, NLL, OFF, P2."""
    place = grad + index * SUMS
    mask = index < classes if PADDED else index >= 0
    f = tl.load(place + 1, mask=mask, other=0.0)
    n = tl.load(place + 2, mask=mask, other=0.0)
    hit = tl.load(place, mask=mask, other=0.0) - n
    nll = tl.load(place + 3, mask=mask, other=0.0)
    if SUMS == 8:
        o = tl.load(place + 4, mask=mask, other=0.0)
        s = tl.load(place + 5, mask=mask, other=0.0)
        return (hit.to(DTYPE), f.to(DTYPE), nll.to(DTYPE), o.to(DTYPE), (2.0 * s).to(DTYPE))
    return (hit.to(DTYPE), f.to(DTYPE), nll.to(DTYPE))


@triton.jit
def _slopes(
    z,
    m,
    rest,
    count,
    g,
    cotangents,
    gamma,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    MIN: tl.constexpr,
    GAMMA: tl.constexpr,
    SUMS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return (p, h, r, u, direct) of a block of classes.

    h is the slope at p, u the softmax likelihood's slope before its share over the classes, and
    direct the part of the gradient that needs no other class.
    """
    hit, f, nll = cotangents[0], cotangents[1], cotangents[2]
    p, complement, minus_log, minus_log_complement = _probability(
        z, m, rest, count, ACTIVATION, DTYPE
    )
    if MIN:
        a = tl.where(p < g, 1.0, tl.where(p > g, 0.0, 0.5))
        h = tl.where(p == p, a * hit + (1.0 - a) * f, p)
    else:
        h = g * hit + (1.0 - g) * f
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
    q = _slope(r, r_complement, minus_log, gamma, GAMMA, DTYPE)
    u = nll * g * q
    if LIKELIHOOD == SOFTMAX:
        if SUMS == 8:
            u = u - cotangents[3] * (1.0 - g)
    else:
        chain = r_complement if LIKELIHOOD == SIGMOID else 1.0 / r
        # Without a cotangent there is no slope, not even an infinite one (r = 0).
        direct = direct + tl.where(nll * g == 0, 0.0, u * chain)
        if SUMS == 8:
            q = _slope(r_complement, r, minus_log_complement, gamma, GAMMA, DTYPE)
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
    PADDED: tl.constexpr = CLASSES > 1
    grad += sample * classes * SUMS
    input += sample * input_b
    target += sample * target_b
    output += sample * output_b
    if weight is not None:
        weight += sample * weight_b
    cotangents = ()
    for t in tl.static_range(TILES):
        index = _class_index(t * CLASSES, CLASSES)
        cotangents = cotangents + (_load_cotangents(grad, index, classes, SUMS, PADDED, DTYPE),)

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
            z = _load_values(input, index, input_c, offset, inside, classes, PADDED, DTYPE)
            zs = zs + (z,)
        if TWO:
            results = _two_class_gradient(zs, label, cotangents, gamma, GAMMA, DTYPE)
        elif FAST:
            results = _label_gradient(
                zs, label, cotangents, classes, gamma, GAMMA, TILES, CLASSES, DTYPE
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
                    PADDED,
                    DTYPE,
                )
                gs = gs + (g,)
            top, low, share = m, m, m
            for t in tl.static_range(TILES):
                index = _class_index(t * CLASSES, CLASSES)
                p, h, r, u, direct = _slopes(
                    zs[t],
                    m,
                    rest,
                    count,
                    gs[t],
                    cotangents[t],
                    gamma,
                    ACTIVATION,
                    LIKELIHOOD,
                    MIN,
                    GAMMA,
                    SUMS,
                    DTYPE,
                )
                a, b, c = _shares(
                    zs[t], m, p, h, u, index < classes, ACTIVATION, LIKELIHOOD, CLASSES, DTYPE
                )
                if t == 0:
                    top, low, share = a, b, c
                else:
                    top, low, share = top + a, low + b, share + c
            results = ()
            for t in tl.static_range(TILES):
                p, h, r, u, direct = _slopes(
                    zs[t],
                    m,
                    rest,
                    count,
                    gs[t],
                    cotangents[t],
                    gamma,
                    ACTIVATION,
                    LIKELIHOOD,
                    MIN,
                    GAMMA,
                    SUMS,
                    DTYPE,
                )
                results = results + (
                    _combine(
                        p, h, r, u, direct, top, low, share, rest, count, ACTIVATION, LIKELIHOOD
                    ),
                )
        for t in tl.static_range(TILES):
            index = _class_index(t * CLASSES, CLASSES)
            result = results[t]
            if weight is not None:
                result = result * w
            result = tl.where(included, result, 0.0).to(output.dtype.element_ty)
            place = output + index * output_c + start * output_v + lane * output_v
            tl.store(place, result, mask=inside & (index < classes) if PADDED else inside)


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
    CLASSES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What the softmax of every class needs of this block, (1, BLOCK) each.

    The sum of h over the classes with the largest logit, the sum of p h over all others, and the
    sum of u.
    """
    top = tl.full([1, 1], 0.0, DTYPE)
    low, share = top, top
    if ACTIVATION == SOFTMAX:
        d = _finite(z, DTYPE) - m
        top = tl.where(d == 0, h, 0.0)
        low = tl.where(d == 0, 0.0, p * h)
        if CLASSES > 1:
            top = tl.sum(tl.where(valid, top, 0.0), axis=0, keep_dims=True)
            low = tl.sum(tl.where(valid, low, 0.0), axis=0, keep_dims=True)
    if LIKELIHOOD == SOFTMAX:
        share = u
        if CLASSES > 1:
            share = tl.sum(tl.where(valid, u, 0.0), axis=0, keep_dims=True)
    return top, low, share


@triton.jit
def _combine(
    p,
    h,
    r,
    u,
    direct,
    top,
    low,
    share,
    rest,
    count,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
):
    """The gradient of a block of classes, without the voxel weight."""
    result = direct
    if ACTIVATION == SOFTMAX:
        # p (h - sum p h) with h measured from the most probable class's, so that the gradient of
        # a nearly perfect prediction is not a difference of large numbers.
        best = top / count
        mean = low - best * (rest / (rest + count))
        result = result + p * ((h - best) - mean)
    if LIKELIHOOD == SOFTMAX:
        result = result + (u - r * share)
    return result


@triton.jit
def _two_class_gradient(zs, label, cotangents, gamma, GAMMA: tl.constexpr, DTYPE: tl.constexpr):
    """Two classes, labels: the gradient of one class is minus the other's."""
    p, other, minus_log = _two_classes(zs[0], zs[1], label, DTYPE)
    first = label == 0
    hit = tl.where(first, cotangents[0][0] - cotangents[1][1], cotangents[1][0] - cotangents[0][1])
    nll = tl.where(first, cotangents[0][2], cotangents[1][2])
    q = _slope(p, other, minus_log, gamma, GAMMA, DTYPE)
    of_label = other * (p * hit + nll * q)
    of_first = tl.where(first, of_label, -of_label)
    return (of_first, -of_first)


@triton.jit
def _label_gradient(
    zs,
    label,
    cotangents,
    classes,
    gamma,
    GAMMA: tl.constexpr,
    TILES: tl.constexpr,
    CLASSES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Labels with softmax throughout."""
    finite = _softmax_logits(zs, classes, TILES, CLASSES, DTYPE)
    m = finite[0]
    for t in tl.static_range(1, TILES):
        m = tl.maximum(m, finite[t])
    if CLASSES > 1:
        m = tl.max(m, axis=0, keep_dims=True)
    zero = tl.full([1, 1], 0.0, DTYPE)
    rest, count, top, low, nll = zero, zero, zero, zero, zero
    d_label, others = zero, zero
    es = ()
    for t in tl.static_range(TILES):
        index = _class_index(t * CLASSES, CLASSES)
        hit = label == index
        h = tl.where(hit, cotangents[t][0], cotangents[t][1])
        d = finite[t] - m
        e = tl.exp(d)
        es = es + (e,)
        largest = d == 0
        if CLASSES > 1:
            largest = largest & (index < classes)
        rest = rest + tl.where(largest, 0.0, e)
        count = count + tl.where(largest, 1.0, 0.0)
        top = top + tl.where(largest, h, 0.0)
        low = low + tl.where(largest, 0.0, e * h)
        nll = nll + tl.where(hit, cotangents[t][2], 0.0)
        if GAMMA != 0:
            d_label = d_label + tl.where(hit, d, 0.0)
            others = others + tl.where(hit, 0.0, e)
    if CLASSES > 1:
        rest = tl.sum(rest, axis=0, keep_dims=True)
        count = tl.sum(count, axis=0, keep_dims=True)
        top = tl.sum(top, axis=0, keep_dims=True)
        low = tl.sum(low, axis=0, keep_dims=True)
        nll = tl.sum(nll, axis=0, keep_dims=True)
        if GAMMA != 0:
            d_label = tl.sum(d_label, axis=0, keep_dims=True)
            others = tl.sum(others, axis=0, keep_dims=True)
    total = rest + count
    scale = 1.0 / total
    best = top / count
    mean = (low - best * rest) * scale
    slope = -nll
    if GAMMA != 0:
        e_label = tl.exp(d_label)
        minus_log = log_of_sum(e_label, others, total) - d_label
        slope = nll * _slope(e_label * scale, others * scale, minus_log, gamma, GAMMA, DTYPE)
    results = ()
    for t in tl.static_range(TILES):
        hit = label == _class_index(t * CLASSES, CLASSES)
        p = es[t] * scale
        near = tl.where(hit, cotangents[t][0], cotangents[t][1]) - best
        direct = tl.where(hit, slope, 0.0)
        results = results + (p * (near - mean) + (direct - p * slope),)
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
        m, rest, count = _online_state(
            input, offset, input_c, inside, classes, ACTIVATION, LIKELIHOOD, CLASSES, BLOCK, DTYPE
        )
        top = tl.full([1, BLOCK], 0.0, DTYPE)
        low = tl.full([1, BLOCK], 0.0, DTYPE)
        share = tl.full([1, BLOCK], 0.0, DTYPE)
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
                    gamma,
                    ACTIVATION,
                    LIKELIHOOD,
                    MIN,
                    GAMMA,
                    SUMS,
                    DTYPE,
                )
                shares = _shares(
                    z, m, p, h, u, index < classes, ACTIVATION, LIKELIHOOD, CLASSES, DTYPE
                )
                top += shares[0]
                low += shares[1]
                share += shares[2]
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
                gamma,
                ACTIVATION,
                LIKELIHOOD,
                MIN,
                GAMMA,
                SUMS,
                DTYPE,
            )
            result = _combine(
                p, h, r, u, direct, top, low, share, rest, count, ACTIVATION, LIKELIHOOD
            )
            result = tl.where(included, result * w, 0.0).to(output.dtype.element_ty)
            place = output + index * output_c + start * output_v + lane * output_v
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
    gamma: float
    sums: int
    contiguous: bool


class Plan(NamedTuple):
    """A kernel with its compile-time parameters."""

    kernel: Any
    constants: dict[str, Any]
    num_warps: int


def plan(problem: Problem, backward: bool) -> Plan:
    """Choose the kernel and its block shapes, from the shape and the dtype alone."""
    classes, itemsize = problem.classes, problem.dtype.itemsize
    labels_only = (
        problem.target_kind == _LABELS
        and problem.activation == problem.likelihood == 2
        and problem.overlap == 0
        and problem.sums == 4
    )
    vector = VECTOR_BYTES // itemsize
    num_warps = 4
    constants: dict[str, Any] = {
        "ACTIVATION": problem.activation,
        "LIKELIHOOD": problem.likelihood,
        "MIN": problem.overlap == 1,
        "GAMMA": int(problem.gamma) if problem.gamma in (0, 1, 2) else 3,
        "TARGET": problem.target_kind,
        "HAS_IGNORE": problem.has_ignore,
        "DTYPE": tl.float64 if problem.dtype == torch.float64 else tl.float32,
    }
    if backward:
        constants["SUMS"] = problem.sums
    else:
        constants["FULL"] = problem.sums == 8
    if classes > RESIDENT_CLASSES:
        kernel = _backward_online if backward else _forward_online
        block = 16 * vector
        constants |= {"CLASSES": CLASS_BLOCK, "BLOCK": block}
        constants["EVEN"] = problem.voxels % block == 0
        return Plan(kernel, constants, num_warps)

    few = classes <= FEW_CLASSES
    two = labels_only and classes == 2
    if few:
        # Registers that hold the logits of a thread's voxels.
        room = 64 if labels_only else 32
        while vector > 1 and vector * power_of_two(classes) > room:
            vector //= 2
        vector = min(vector, 8 if classes <= 2 else 4)
        block, tiles, block_classes = 32 * num_warps * vector, classes, 1
    else:
        num_warps = 4 if classes <= 64 else 8
        block, block_classes = 32 if itemsize == 8 else 64, CLASS_BLOCK
        tiles = triton.cdiv(classes, CLASS_BLOCK)
    constants |= {
        "TWO": two,
        "FAST": labels_only and not two,
        "TILES": tiles,
        "CLASSES": block_classes,
        "BLOCK": block,
        "EVEN": problem.voxels % block == 0,
    }
    if backward:
        return Plan(_backward_resident, constants, num_warps)
    sums = 3 if two else problem.sums
    # Voxels of a class that lie in one thread are added up before they are accumulated, unless
    # there are registers enough to keep them apart, which saves selections.
    if few:
        fold = 1 if tiles * sums * vector <= 32 else vector
    elif problem.contiguous:
        fold = vector
    else:
        fold = max(1, block * (CLASS_BLOCK // vector) // (32 * num_warps))
    constants |= {
        "FOLD": fold,
        "CONTIGUOUS": problem.contiguous,
        "SUMS": sums,
        "LEVELS": 3 if two else power_of_two(tiles * sums).bit_length() - 1,
    }
    return Plan(_forward_resident, constants, num_warps)


def reduction_shape(problem: Problem, block: int) -> tuple[int, int, int]:
    """Return (tiles a chunk, chunks a sample, slots a sample): who adds what to what."""
    tiles = triton.cdiv(problem.voxels, block)
    tiles_a_chunk = 1
    if problem.classes <= RESIDENT_CLASSES:
        while tiles_a_chunk < MAX_TILES and tiles * problem.batch >= 4096 * tiles_a_chunk:
            tiles_a_chunk *= 2
    chunks = triton.cdiv(tiles, tiles_a_chunk)
    allowed = WORKSPACE_BYTES * (1 if problem.classes <= RESIDENT_CLASSES else 8)
    slots = allowed // (problem.batch * problem.classes * problem.sums * 8)
    slots = max(1, min(chunks, MAX_SLOTS, slots))
    # The same number of chunks for every slot, but for the last round.
    return tiles_a_chunk, chunks, triton.cdiv(chunks, triton.cdiv(chunks, slots))


def _describe(
    input: torch.Tensor,
    target: torch.Tensor,
    activation: int,
    likelihood: int,
    overlap: int,
    ignore_index: int | None,
    gamma: float,
    sums: int,
    contiguous: bool,
) -> Problem:
    batch, classes = input.shape[:2]
    voxels = math.prod(input.shape[2:])
    if classes > 1:
        dense = target.ndim == input.ndim and target.shape[1] == classes
        kind = _DENSE if dense else _LABELS
        # A label outside [0, C) is excluded anyway.
        has_ignore = ignore_index is not None and 0 <= ignore_index < classes
    else:
        strict = not target.is_floating_point() and target.dtype != torch.bool
        kind = _BINARY if strict else _INDICATOR
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
        gamma,
        sums,
        contiguous,
    )


def _flatten_all(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[int, ...]]:
    """The three tensors, and their strides in the order of the kernels' parameters."""
    axes = input.ndim
    flat, input_strides = flatten(input, classes=True)
    flat_target, target_strides = flatten(target, classes=target.ndim == axes)
    weight_strides = (0, 0, 0)
    if weight is not None:
        weight, weight_strides = flatten(weight, classes=weight.ndim == axes)
    strides = (*input_strides, *target_strides, weight_strides[0], weight_strides[2])
    return flat, flat_target, weight, strides


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
) -> torch.Tensor:
    """Return (B, C, 4) or, with ``full``, (B, C, 8) float64 sums; see voxfuse.soft_confusion."""
    sums = 8 if full else 4
    shape = (*input.shape[:2], sums)
    if input.numel() == 0:
        return torch.zeros(shape, dtype=torch.float64, device=input.device)
    flat, flat_target, flat_weight, strides = _flatten_all(input, target, weight)
    problem = _describe(
        input,
        target,
        activation,
        likelihood,
        overlap,
        ignore_index,
        gamma,
        sums,
        strides[2] == 1,
    )
    chosen = plan(problem, backward=False)
    tiles_a_chunk, chunks, slots = reduction_shape(problem, chosen.constants["BLOCK"])
    online = problem.classes > RESIDENT_CLASSES
    work = (chunks,) if online else (tiles_a_chunk, chunks)
    result = torch.empty(shape, dtype=torch.float64, device=input.device)
    partial = result
    if slots > 1:
        partial = torch.empty(result.numel() * slots, dtype=torch.float64, device=input.device)
    with device_guard(input):
        chosen.kernel[(slots, problem.batch)](
            flat,
            flat_target,
            flat_weight,
            partial,
            problem.voxels,
            problem.classes,
            *strides,
            *work,
            ignore_index if problem.has_ignore else 0,
            gamma,
            **chosen.constants,
            num_warps=chosen.num_warps,
            **LAUNCH_OPTIONS,
        )
        if slots > 1:
            _finish[(result.numel(),)](
                partial,
                result,
                slots,
                result.numel(),
                BLOCK=min(power_of_two(slots), 1024),
                num_warps=4,
                **LAUNCH_OPTIONS,
            )
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
) -> torch.Tensor:
    """Return the gradient at ``input``, in its dtype and layout."""
    gradient = torch.empty_like(input)
    if input.numel() == 0:
        return gradient
    flat, flat_target, flat_weight, strides = _flatten_all(input, target, weight)
    output, output_strides = gradient, strides_of(gradient)
    if output_strides is None:
        output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
        output_strides = strides_of(output)
    sums = grad.shape[2]
    problem = _describe(
        input,
        target,
        activation,
        likelihood,
        overlap,
        ignore_index,
        gamma,
        sums,
        strides[2] == 1,
    )
    chosen = plan(problem, backward=True)
    tiles = triton.cdiv(problem.voxels, chosen.constants["BLOCK"])
    # Several tiles a program share the reading of the cotangents.
    tiles_a_program = 8 if tiles * problem.batch >= 1 << 15 else 1
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
            num_warps=chosen.num_warps,
            **LAUNCH_OPTIONS,
        )
    if output is not gradient:
        gradient.copy_(output)
    return gradient
