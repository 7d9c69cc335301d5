"""The sums of tiles."""

import triton
import triton.language as tl

from voxfuse.triton_kernels.numerics import (
    NAN,
    at_most_finite,
    exponential,
    log_of_sum,
    log_one_plus,
    reciprocal,
)
from voxfuse.triton_kernels.reduction import finish_rows, row_of_program, stack
from voxfuse.triton_kernels.soft_confusion.load import (
    class_index,
    load_block,
    load_kept,
    load_logits,
    load_merged,
    load_target,
    load_target_block,
    load_voxels,
    padded,
    tile_at,
)
from voxfuse.triton_kernels.soft_confusion.options import BY_LABEL, SOFTMAX, TWO_CLASSES
from voxfuse.triton_kernels.soft_confusion.probability import (
    gaps_to_largest,
    missed,
    modulated,
    probability,
    softmax_of,
    softmax_of_two,
    softmax_online,
)
from voxfuse.triton_kernels.views import of_sample


@triton.jit
def _fold(x, O: tl.constexpr):
    """Add the FOLD voxels that a thread holds of each class."""
    if O.FOLD == 1:
        result = x
    elif O.CONTIGUOUS:
        result = tl.sum(tl.reshape(x, [O.CLASSES, O.BLOCK // O.FOLD, O.FOLD]), axis=2)
    else:
        result = tl.sum(tl.reshape(x, [O.CLASSES, O.FOLD, O.BLOCK // O.FOLD]), axis=1)
    return result


@triton.jit
def _add_where(total, mask, x, O: tl.constexpr):
    """Add ``x`` where ``mask``, so that not even NaN enters from elsewhere."""
    if O.FOLD == 1:
        # This form becomes one predicated addition.
        result = tl.where(mask, total + x, total)
    else:
        result = total + _fold(tl.where(mask, x, 0.0), O)
    return result


@triton.jit
def _multiply_where(product, mask, x):
    """``product`` is P - 1; return P (1 + x) - 1 where ``mask``, without losing small x."""
    return tl.where(mask, product + (product * x + x), product)


@triton.jit
def _take_logarithms(sums, O: tl.constexpr):
    """Add the logarithm of each class's product, its last accumulator, to the one before."""
    result = ()
    for t in tl.static_range(O.TILES):
        product = sums[t * O.SUMS + O.SUMS - 1]
        logarithm = log_of_sum(1.0, product, 1.0 + product)
        for s in tl.static_range(O.SUMS - 2):
            result = result + (sums[t * O.SUMS + s],)
        result = result + (sums[t * O.SUMS + O.SUMS - 2] + logarithm,)
    return result


@triton.jit
def confusion_terms(z, softmax, g, gamma, index, O: tl.constexpr):
    """The summands of a block of classes, without the voxel weight, in the result's order."""
    p, complement, minus_log, minus_log_complement = probability(z, softmax, O.ACTIVATION)
    r, r_complement = p, complement
    if O.LIKELIHOOD != O.ACTIVATION:
        r, r_complement, minus_log, minus_log_complement = probability(z, softmax, O.LIKELIHOOD)
    if O.MIN:
        tp = tl.minimum(p, g, propagate_nan=NAN)
        fp = tl.maximum(p - g, 0.0, propagate_nan=NAN)
        fn = tl.maximum(missed(p, complement, g), 0.0, propagate_nan=NAN)
    else:
        tp = p * g
        fp = p * (1.0 - g)
        fn = complement * g
    nll = g * modulated(r_complement, minus_log, gamma, index, O)
    nll = tl.where(g == 0, 0.0, nll)
    if O.STATS == 8:
        if O.LIKELIHOOD == SOFTMAX:
            off = (1.0 - g) * minus_log
        else:
            off = (1.0 - g) * modulated(r, minus_log_complement, gamma, index, O)
        off = tl.where(g == 1, 0.0, off)
        terms = (tp, fp, fn, nll, off, p * p, g * g, tl.full([1, 1], 1.0, O.DTYPE))
    else:
        terms = (tp, fp, fn, nll)
    return terms


@triton.jit
def _add_terms(sums, zs, target, tile, voxels, classes, gamma, O: tl.constexpr):
    """Add a tile of any problem."""
    softmax = softmax_of(zs, classes, O)
    result = ()
    for t in tl.static_range(O.TILES):
        index = class_index(t * O.CLASSES, O)
        g = load_target(target, index, tile, voxels, classes, padded(t, O), O)
        terms = confusion_terms(zs[t], softmax, g, gamma, index, O)
        for s in tl.static_range(O.STATS):
            x = tl.broadcast_to(terms[s] * voxels.weight, [O.CLASSES, O.BLOCK])
            result = result + (_add_where(sums[t * O.STATS + s], voxels.included, x, O),)
    return result


@triton.jit
def _add_two_classes(sums, zs, label, w, gamma, O: tl.constexpr):
    """Add a tile of two classes, labels with softmax."""
    p, other, e, gap = softmax_of_two(zs[0], zs[1], label)
    if not O.LOGS:
        gap = modulated(other, log_one_plus(e) + gap, gamma, label, O)
    p, other, gap = p * w, other * w, gap * w
    result = ()
    for t in tl.static_range(2):
        hit = label == t
        result = result + (
            _add_where(sums[O.SUMS * t], hit, p, O),
            _add_where(sums[O.SUMS * t + 1], hit, other, O),
            _add_where(sums[O.SUMS * t + 2], hit, gap, O),
        )
        if O.LOGS:
            result = result + (_multiply_where(sums[O.SUMS * t + 3], hit, e),)
    return result


@triton.jit
def _add_by_label(sums, zs, label, w, classes, gamma, O: tl.constexpr):
    """Add a tile of labels with softmax: all but FP is a property of the label's class alone."""
    gaps, m = gaps_to_largest(zs, classes, O)
    es = ()
    d_label = tl.full([1, 1], 0.0, O.DTYPE)
    others = tl.full([1, 1], 0.0, O.DTYPE)
    for t in tl.static_range(O.TILES):
        hit = label == class_index(t * O.CLASSES, O)
        e = exponential(gaps[t])
        es = es + (e,)
        if O.CLASSES > 1:
            d_label = d_label + tl.where(hit, gaps[t], 0.0)
        else:
            d_label = tl.where(hit, gaps[t], d_label)
        others = others + tl.where(hit, 0.0, e)
    if O.CLASSES > 1:
        d_label = tl.sum(d_label, axis=0, keep_dims=True)
        others = tl.sum(others, axis=0, keep_dims=True)
    d_label = tl.where(m == m, d_label, m)
    e_label = exponential(d_label)
    total = e_label + others
    scale = reciprocal(total)
    p = e_label * scale
    other = others * scale
    nll = at_most_finite(-d_label)
    if not O.LOGS:
        # Where e_label is the smaller of the two, log(total) is not small.
        nll = nll + log_of_sum(e_label, others, total)
        nll = modulated(other, nll, gamma, label, O)
    scale, p, other, nll = scale * w, p * w, other * w, nll * w
    scale = tl.where(label >= 0, scale, 0.0)
    result = ()
    for t in tl.static_range(O.TILES):
        hit = label == class_index(t * O.CLASSES, O)
        # No e is NaN, so that a scale of 0 keeps excluded voxels out.
        wrong = tl.where(hit, 0.0, es[t]) * scale
        result = result + (
            _add_where(sums[O.SUMS * t], hit, p, O),
            sums[O.SUMS * t + 1] + _fold(wrong, O),
            _add_where(sums[O.SUMS * t + 2], hit, other, O),
            _add_where(sums[O.SUMS * t + 3], hit, nll, O),
        )
        if O.LOGS:
            x = others + (e_label - 1.0)
            result = result + (_multiply_where(sums[O.SUMS * t + 4], hit, x),)
    return result


@triton.jit(do_not_specialize=["group"])
def forward_resident(
    input,
    target,
    weight,
    annotated,
    rows,
    group,
    voxels,
    classes,
    tiles_a_chunk,
    chunks,
    ignore,
    gamma: tl.float64,
    O: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Partial sums of one program's chunks into its row, (class, sum).

    O.SUMS is the number of accumulators a class block: the statistics, except that for two classes
    one class's false positive is the other's false negative, and that with O.LOGS the sum of the
    logarithms of softmax's totals is kept as their product, one logarithm a chunk.
    """
    slot = tl.program_id(0).to(tl.int64)
    slots = tl.num_programs(0)
    sample = tl.program_id(1).to(tl.int64)
    input, target = of_sample(input, sample), of_sample(target, sample)
    if weight is not None:
        weight = of_sample(weight, sample)
    column = tl.arange(0, O.COLUMNS)[None, :]
    row = (column // O.STATS) * O.CLASSES + tl.arange(0, O.CLASSES)[:, None]
    place = row_of_program(rows, classes * O.STATS) + row * O.STATS + column % O.STATS
    for chunk in range(slot, chunks, slots):
        sums = ()
        for _ in tl.static_range(O.TILES * O.SUMS):
            sums = sums + (tl.zeros([O.CLASSES, O.BLOCK // O.FOLD], O.DTYPE),)
        first = chunk * tiles_a_chunk * O.BLOCK
        last = tl.minimum(first + tiles_a_chunk * O.BLOCK, voxels)
        for start in range(first, last, O.BLOCK):
            tile = tile_at(start, voxels, O)
            own = load_voxels(target, weight, annotated, tile, classes, ignore, O)
            zs = load_logits(input, tile, classes, O)
            if O.PATH == TWO_CLASSES:
                sums = _add_two_classes(sums, zs, own.label, own.weight, gamma, O)
            elif O.PATH == BY_LABEL:
                sums = _add_by_label(sums, zs, own.label, own.weight, classes, gamma, O)
            else:
                sums = _add_terms(sums, zs, target, tile, own, classes, gamma, O)
        if O.LOGS:
            sums = _take_logarithms(sums, O)
        if O.PATH == TWO_CLASSES:
            p0, other0, nll0, p1, other1, nll1 = sums
            sums = (p0, other1, other0, nll0, p1, other0, other1, nll1)
        else:
            for _ in tl.static_range(O.COLUMNS - O.TILES * O.STATS):
                sums = sums + (tl.zeros([O.CLASSES, O.BLOCK // O.FOLD], O.DTYPE),)
        table = tl.reshape(stack(sums, O.LEVELS), [O.CLASSES, O.BLOCK // O.FOLD, O.COLUMNS])
        # The float64 sums live in memory: in registers, every thread would hold all of them.
        later = tl.full([1, 1], chunk, tl.int64) >= slots
        before = tl.load(place, mask=(row < classes) & later, other=0.0)
        tl.store(place, before + tl.sum(table, axis=1).to(tl.float64), mask=row < classes)
        tl.debug_barrier()
    finish_rows(rows, classes * O.STATS, group, ROWS)


@triton.jit(do_not_specialize=["group"])
def forward_online(
    input,
    target,
    weight,
    annotated,
    rows,
    group,
    voxels,
    classes,
    tiles,
    ignore,
    gamma: tl.float64,
    O: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Any number of classes: each program adds its tiles, in order, into its own row.

    It lies in memory, (class, sum); no other program touches it.
    """
    slot = tl.program_id(0).to(tl.int64)
    slots = tl.num_programs(0)
    sample = tl.program_id(1).to(tl.int64)
    input, target = of_sample(input, sample), of_sample(target, sample)
    if weight is not None:
        weight = of_sample(weight, sample)
    if O.PARTIAL:
        annotated += sample * classes
    column = tl.arange(0, O.STATS)[None, :]
    row = row_of_program(rows, classes * O.STATS)
    for number in range(slot, tiles, slots):
        tile = tile_at(number * O.BLOCK, voxels, O)
        own = load_voxels(target, weight, annotated, tile, classes, ignore, O)
        merged = load_merged(input, target, annotated, tile, own, classes, O)
        softmax, _ = softmax_online(input, annotated, merged, tile, classes, False, O)
        for c in range(0, classes, O.CLASSES):
            index = class_index(c, O)
            z = load_block(input, annotated, merged, index, tile, classes, O)
            g = load_target_block(target, annotated, merged, index, tile, own, classes, True, O)
            terms = confusion_terms(z, softmax, g, gamma, index, O)
            counted = own.included
            if O.PARTIAL:
                counted = counted & load_kept(annotated, index, classes, O)
            sums = ()
            for s in tl.static_range(O.STATS):
                x = tl.broadcast_to(terms[s] * own.weight, [O.CLASSES, O.BLOCK])
                sums = sums + (tl.where(counted, x, 0.0),)
            table = tl.reshape(stack(sums, O.LEVELS), [O.CLASSES, O.BLOCK, O.STATS])
            place = row + index.to(tl.int64) * O.STATS + column
            mask = (index < classes) & (column < O.STATS)
            # The first tile overwrites what the memory held.
            later = tl.full([1, 1], number, tl.int64) >= slots
            before = tl.load(place, mask=mask & later, other=0.0)
            tl.store(place, before + tl.sum(table, axis=1).to(tl.float64), mask=mask)
        # Other threads of this program may read these sums at the next tile.
        tl.debug_barrier()
    finish_rows(rows, classes * O.STATS, group, ROWS)
