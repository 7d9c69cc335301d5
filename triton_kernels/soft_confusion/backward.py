"""The gradient of tiles."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from voxfuse.triton_kernels.numerics import (
    NAN,
    at_most_finite,
    exponential,
    finite,
    log_of_sum,
    log_one_plus,
    reciprocal,
)
from voxfuse.triton_kernels.soft_confusion.load import (
    class_index,
    load_block,
    load_cotangents,
    load_cotangents_block,
    load_kept,
    load_logits,
    load_merged,
    load_target,
    load_target_block,
    load_values,
    load_voxels,
    named,
    padded,
    store_values,
    tile_at,
)
from voxfuse.triton_kernels.soft_confusion.options import (
    BY_LABEL,
    DENSE,
    NONE,
    SIGMOID,
    SOFTMAX,
    TWO_CLASSES,
)
from voxfuse.triton_kernels.soft_confusion.probability import (
    gaps_to_largest,
    is_largest,
    missed,
    modulated_slope,
    probability,
    softmax_of,
    softmax_of_two,
    softmax_online,
)
from voxfuse.triton_kernels.views import of_sample


class Slopes(NamedTuple):
    """Of a block of classes.

    ``h`` is the slope at p, with softmax less that of the class with the largest logit; ``u`` is
    the softmax likelihood's slope, at r, before its share over the classes, and ``direct`` the part
    of the gradient that needs no other class.
    """

    p: Any
    h: Any
    r: Any
    u: Any
    direct: Any


class Shares(NamedTuple):
    """What the softmax of every class needs of all classes of its voxel.

    The sum of p h, and of u of the classes with the largest logit and of the others. As h is
    measured from the largest logit's, it is 0 where p is not small, so that nothing cancels,
    neither where a prediction is nearly perfect nor where it is sure and wrong.
    """

    mean: Any
    top: Any
    low: Any


@triton.jit
def _overlap_share(p, complement, g, O: tl.constexpr):
    """a in h = a hit + (1 - a) f, the slope of the overlap at p."""
    if O.MIN:
        m = missed(p, complement, g)
        share = tl.where(m > 0, 1.0, tl.where(m < 0, 0.0, 0.5))
        share = tl.where(m == m, share, m)
    else:
        share = g
    return share


@triton.jit
def parts_of_largest(softmax, g, cotangents, O: tl.constexpr):
    """What h of a class with the largest logit is made of, from its target and cotangents.

    (a, hit, f, slope of P2) for a dense target; else (h without P2, 0, 0, slope of P2).
    """
    scale = reciprocal(softmax.rest + softmax.count)
    a = _overlap_share(scale, (softmax.rest + (softmax.count - 1.0)) * scale, g, O)
    zero = tl.full([1, 1], 0.0, O.DTYPE)
    square = scale * cotangents.square if O.STATS == 8 else zero
    if O.TARGET == DENSE:
        parts = (a, cotangents.hit, cotangents.fp, square)
    else:
        parts = (a * cotangents.hit + (1.0 - a) * cotangents.fp, zero, zero, square)
    return parts


@triton.jit
def no_parts(O: tl.constexpr):
    """Parts where there is no softmax."""
    zero = tl.full([1, 1], 0.0, O.DTYPE)
    return (zero, zero, zero, zero)


@triton.jit
def choose_parts(best, parts, largest, FIRST: tl.constexpr, O: tl.constexpr):
    """``best`` with the ``parts`` of a block's class with the largest logit, if it has one.

    Of several classes with it, any, and any mixture of their parts, serves.
    """
    result = ()
    for i in tl.static_range(4):
        if O.CLASSES > 1:
            part = tl.where(largest, parts[i], float("-inf"))
            result = result + (part if FIRST else tl.maximum(best[i], part),)
        else:
            result = result + (tl.where(largest, parts[i], best[i]),)
    return result


@triton.jit
def greatest_parts(parts):
    """The parts of a block's class with the largest logit from those of all of its rows."""
    result = ()
    for i in tl.static_range(4):
        result = result + (tl.max(parts[i], axis=0, keep_dims=True),)
    return result


@triton.jit
def _less_that_of_largest(p, a, cotangents, best, O: tl.constexpr):
    """h less that of the class with the largest logit, whose ``parts_of_largest`` are ``best``.

    Of a dense target, nothing is multiplied before the difference is formed: of what the two
    classes share of hit and of f, and of what one has as hit and the other as f.
    """
    hit, f = cotangents.hit, cotangents.fp
    if O.TARGET == DENSE:
        h = tl.minimum(a, best[0]) * (hit - best[1])
        h = h + (1.0 - tl.maximum(a, best[0])) * (f - best[2])
        h = h + tl.maximum(a - best[0], 0.0, propagate_nan=NAN) * (hit - best[2])
        h = h + tl.maximum(best[0] - a, 0.0, propagate_nan=NAN) * (f - best[1])
    else:
        h = (a * hit + (1.0 - a) * f) - best[0]
    if O.STATS == 8:
        h = h + (p * cotangents.square - best[3])
    return h


@triton.jit
def slopes_of(z, softmax, g, cotangents, best, gamma, index, O: tl.constexpr):
    """The ``Slopes`` of a block of classes; ``best`` are the parts of the largest logit's class."""
    p, complement, minus_log, minus_log_complement = probability(z, softmax, O.ACTIVATION)
    a = _overlap_share(p, complement, g, O)
    if O.ACTIVATION == SOFTMAX:
        h = _less_that_of_largest(p, a, cotangents, best, O)
    else:
        h = a * cotangents.hit + (1.0 - a) * cotangents.fp
        if O.STATS == 8:
            h = h + p * cotangents.square
    if O.ACTIVATION == SIGMOID:
        direct = p * complement * h
    elif O.ACTIVATION == NONE:
        direct = h + 0.0 * z
    else:
        direct = 0.0 * p

    r, r_complement = p, complement
    if O.LIKELIHOOD != O.ACTIVATION:
        r, r_complement, minus_log, minus_log_complement = probability(z, softmax, O.LIKELIHOOD)
    q = modulated_slope(r, r_complement, minus_log, gamma, index, O)
    u = cotangents.nll * g * q
    if O.LIKELIHOOD == SOFTMAX:
        if O.STATS == 8:
            u = u - cotangents.off * (1.0 - g)
        # Together with the other classes' share this is u - r sum u without its cancellation.
        direct = direct + u * r_complement
    else:
        chain = r_complement if O.LIKELIHOOD == SIGMOID else 1.0 / r
        # Without a cotangent there is no slope, not even an infinite one (r = 0).
        direct = direct + tl.where(cotangents.nll * g == 0, 0.0, u * chain)
        if O.STATS == 8:
            q = modulated_slope(r_complement, r, minus_log_complement, gamma, index, O)
            chain = r if O.LIKELIHOOD == SIGMOID else 1.0 / r_complement
            off = cotangents.off * (1.0 - g)
            direct = direct - tl.where(off == 0, 0.0, off * q * chain)
    return Slopes(p, h, r, u, direct)


@triton.jit
def shares_of(z, softmax, slopes, valid, PADDED: tl.constexpr, O: tl.constexpr):
    """What a block of classes adds to the ``Shares``, class by class."""
    mean = tl.full([1, 1], 0.0, O.DTYPE)
    top, low = mean, mean
    if O.ACTIVATION == SOFTMAX:
        mean = slopes.p * slopes.h
        if PADDED:
            mean = tl.where(valid, mean, 0.0)
    if O.LIKELIHOOD == SOFTMAX:
        largest = is_largest(z, softmax)
        top = tl.where(largest, slopes.u, 0.0)
        low = tl.where(largest, 0.0, slopes.u)
        if PADDED:
            top = tl.where(valid, top, 0.0)
            low = tl.where(valid, low, 0.0)
    return Shares(mean, top, low)


@triton.jit
def sum_of_shares(shares, O: tl.constexpr):
    """The ``Shares`` summed over a block's classes."""
    mean, top, low = shares
    if O.CLASSES > 1:
        if O.ACTIVATION == SOFTMAX:
            mean = tl.sum(mean, axis=0, keep_dims=True)
        if O.LIKELIHOOD == SOFTMAX:
            top = tl.sum(top, axis=0, keep_dims=True)
            low = tl.sum(low, axis=0, keep_dims=True)
    return Shares(mean, top, low)


@triton.jit
def combine(z, softmax, slopes, shares, O: tl.constexpr):
    """The gradient of a block of classes, without the voxel weight."""
    result = slopes.direct
    if O.ACTIVATION == SOFTMAX:
        result = result + slopes.p * (slopes.h - shares.mean)
    if O.LIKELIHOOD == SOFTMAX:
        # u of the other classes. Of a class that is almost certain it must not be a difference.
        top, low, u = shares.top, shares.low, slopes.u
        others = tl.where(is_largest(z, softmax), low + (top - u), top + (low - u))
        result = result - slopes.r * others
    return result


@triton.jit
def gradient(zs, target, tile, voxels, cotangents, classes, gamma, O: tl.constexpr):
    """The gradient of a tile of any problem; 0 at voxels that are left out."""
    softmax = softmax_of(zs, classes, O)
    gs = ()
    best = no_parts(O)
    for t in tl.static_range(O.TILES):
        index = class_index(t * O.CLASSES, O)
        gs = gs + (load_target(target, index, tile, voxels, classes, padded(t, O), O),)
    if O.ACTIVATION == SOFTMAX:
        for t in tl.static_range(O.TILES):
            largest = is_largest(zs[t], softmax)
            if O.CLASSES > 1 and t == O.TILES - 1:
                largest = largest & (class_index(t * O.CLASSES, O) < classes)
            parts = parts_of_largest(softmax, gs[t], named(cotangents[t]), O)
            best = choose_parts(best, parts, largest, t == 0, O)
        if O.CLASSES > 1:
            best = greatest_parts(best)
    mean = tl.full([1, 1], 0.0, O.DTYPE)
    top, low = mean, mean
    for t in tl.static_range(O.TILES):
        index = class_index(t * O.CLASSES, O)
        own = named(cotangents[t])
        slopes = slopes_of(zs[t], softmax, gs[t], own, best, gamma, index, O)
        new = shares_of(zs[t], softmax, slopes, index < classes, padded(t, O), O)
        mean, top, low = mean + new.mean, top + new.top, low + new.low
    shares = sum_of_shares(Shares(mean, top, low), O)
    results = ()
    for t in tl.static_range(O.TILES):
        index = class_index(t * O.CLASSES, O)
        own = named(cotangents[t])
        slopes = slopes_of(zs[t], softmax, gs[t], own, best, gamma, index, O)
        result = combine(zs[t], softmax, slopes, shares, O)
        results = results + (tl.where(voxels.included, result * voxels.weight, 0.0),)
    return results


@triton.jit
def _gradient_of_two(zs, label, w, cotangents, gamma, O: tl.constexpr):
    """Two classes, labels with softmax: the gradient of one class is minus the other's."""
    p, other, e, gap = softmax_of_two(zs[0], zs[1], label)
    a, b = named(cotangents[0]), named(cotangents[1])
    first = label == 0
    hit = tl.where(first, a.hit - b.fp, b.hit - a.fp)
    nll = tl.where(first, a.nll, b.nll)
    q = modulated_slope(p, other, log_one_plus(e) + gap, gamma, label, O)
    of_label = other * (p * hit + nll * q) * w
    of_label = tl.where(label >= 0, of_label, 0.0)
    of_first = tl.where(first, of_label, -of_label)
    return (of_first, -of_first)


@triton.jit
def _gradient_by_label(grad, zs, label, w, cotangents, classes, gamma, O: tl.constexpr):
    """Labels with softmax throughout."""
    gaps, m = gaps_to_largest(zs, classes, O)
    zero = tl.full([1, 1], 0.0, O.DTYPE)
    best, nll, d_label, e_label, others = zero, zero, zero, zero, zero
    es = ()
    for t in tl.static_range(O.TILES):
        hit = label == class_index(t * O.CLASSES, O)
        own = named(cotangents[t])
        h = tl.where(hit, own.hit, own.fp)
        e = exponential(gaps[t])
        es = es + (e,)
        others = others + tl.where(hit, 0.0, e)
        largest = gaps[t] == 0
        if O.CLASSES > 1:
            h = tl.where(largest, h, float("-inf"))
            best = h if t == 0 else tl.maximum(best, h)
            e_label = e_label + tl.where(hit, e, 0.0)
        else:
            best = tl.where(largest, h, best)
            nll = tl.where(hit, own.nll, nll)
            e_label = tl.where(hit, e, e_label)
        if O.GAMMA != 0:
            d_label = d_label + tl.where(hit, gaps[t], 0.0)
    if O.CLASSES > 1:
        best = tl.max(best, axis=0, keep_dims=True)
        # Read again, one a voxel: of all classes they would take registers.
        nll = tl.load(grad + label.to(tl.int64) * 4 + 3, mask=label >= 0, other=0.0).to(O.DTYPE)
        e_label = tl.sum(e_label, axis=0, keep_dims=True)
        others = tl.sum(others, axis=0, keep_dims=True)
        if O.GAMMA != 0:
            d_label = tl.sum(d_label, axis=0, keep_dims=True)
    total = e_label + others
    scale = reciprocal(total)
    # h is measured from a most probable class's, as in Shares; the label's own part of the
    # likelihood is its slope times 1 - p.
    low = zero
    for t in tl.static_range(O.TILES):
        hit = label == class_index(t * O.CLASSES, O)
        own = named(cotangents[t])
        low = low + es[t] * (tl.where(hit, own.hit, own.fp) - best)
    if O.CLASSES > 1:
        low = tl.sum(low, axis=0, keep_dims=True)
    slope = -nll
    if O.GAMMA != 0:
        minus_log = log_of_sum(e_label, others, total) + at_most_finite(-d_label)
        p, complement = e_label * scale, others * scale
        slope = nll * modulated_slope(p, complement, minus_log, gamma, label, O)
    mean = low * scale
    scale = tl.where(label >= 0, tl.where(m == m, scale, m), 0.0) * w
    of_label = slope * (others * scale)
    results = ()
    for t in tl.static_range(O.TILES):
        hit = label == class_index(t * O.CLASSES, O)
        own = named(cotangents[t])
        near = tl.where(hit, own.hit, own.fp) - best
        near = tl.where(hit, near - mean, near - (mean + slope))
        results = results + ((es[t] * scale) * near + tl.where(hit, of_label, 0.0),)
    return results


@triton.jit
def backward_resident(
    grad,
    input,
    target,
    weight,
    annotated,
    output,
    voxels,
    classes,
    tiles_a_program,
    ignore,
    gamma: tl.float64,
    O: tl.constexpr,
):
    """Gradient of the tiles of one program."""
    sample = tl.program_id(1).to(tl.int64)
    grad += sample * classes * O.STATS
    input, target = of_sample(input, sample), of_sample(target, sample)
    output = of_sample(output, sample)
    if weight is not None:
        weight = of_sample(weight, sample)
    cotangents = ()
    for t in tl.static_range(O.TILES):
        # Of one class numbers and not tensors: Triton's compiler takes far longer for these.
        number = tl.full([], t, tl.int32)
        block = number if O.CLASSES == 1 else class_index(t * O.CLASSES, O)
        cotangents = cotangents + (load_cotangents(grad, block, classes, padded(t, O), O),)
    first = tl.program_id(0).to(tl.int64) * tiles_a_program * O.BLOCK
    last = tl.minimum(first + tiles_a_program * O.BLOCK, voxels)
    for start in range(first, last, O.BLOCK):
        tile = tile_at(start, voxels, O)
        own = load_voxels(target, weight, annotated, tile, classes, ignore, O)
        zs = load_logits(input, tile, classes, O)
        if O.PATH == TWO_CLASSES:
            results = _gradient_of_two(zs, own.label, own.weight, cotangents, gamma, O)
        elif O.PATH == BY_LABEL:
            results = _gradient_by_label(
                grad, zs, own.label, own.weight, cotangents, classes, gamma, O
            )
        else:
            results = gradient(zs, target, tile, own, cotangents, classes, gamma, O)
        for t in tl.static_range(O.TILES):
            index = class_index(t * O.CLASSES, O)
            result = tl.broadcast_to(results[t], [O.CLASSES, O.BLOCK])
            mask = tile.inside & (index < classes) if padded(t, O) else tile.inside
            store_values(output, index, tile, result, mask)


@triton.jit
def backward_online(
    grad,
    input,
    target,
    weight,
    annotated,
    output,
    voxels,
    classes,
    tiles_a_program,
    ignore,
    gamma: tl.float64,
    O: tl.constexpr,
):
    """Gradient for any number of classes: the class blocks are read up to three times."""
    sample = tl.program_id(1).to(tl.int64)
    grad += sample * classes * O.STATS
    input, target = of_sample(input, sample), of_sample(target, sample)
    output = of_sample(output, sample)
    if weight is not None:
        weight = of_sample(weight, sample)
    if O.PARTIAL:
        annotated += sample * classes
    first = tl.program_id(0).to(tl.int64) * tiles_a_program * O.BLOCK
    last = tl.minimum(first + tiles_a_program * O.BLOCK, voxels)
    for start in range(first, last, O.BLOCK):
        tile = tile_at(start, voxels, O)
        own = load_voxels(target, weight, annotated, tile, classes, ignore, O)
        merged = load_merged(input, target, annotated, tile, own, classes, O)
        softmax, largest = softmax_online(
            input, annotated, merged, tile, classes, O.ACTIVATION == SOFTMAX, O
        )
        best = no_parts(O)
        mean = tl.full([1, O.BLOCK], 0.0, O.DTYPE)
        top, low = mean, mean
        if O.ACTIVATION == SOFTMAX:
            best = parts_of_largest(
                softmax,
                load_target_block(target, annotated, merged, largest, tile, own, classes, False, O),
                load_cotangents_block(grad, annotated, largest, classes, False, O),
                O,
            )
        if O.ACTIVATION == SOFTMAX or O.LIKELIHOOD == SOFTMAX:
            for c in range(0, classes, O.CLASSES):
                index = class_index(c, O)
                z = load_block(input, annotated, merged, index, tile, classes, O)
                g = load_target_block(target, annotated, merged, index, tile, own, classes, True, O)
                cotangents = load_cotangents_block(grad, annotated, index, classes, True, O)
                slopes = slopes_of(z, softmax, g, cotangents, best, gamma, index, O)
                new = shares_of(z, softmax, slopes, index < classes, True, O)
                new = sum_of_shares(new, O)
                mean, top, low = mean + new.mean, top + new.top, low + new.low
        shares = Shares(mean, top, low)
        background = tl.full([1, O.BLOCK], 0.0, O.DTYPE)
        for c in range(0, classes, O.CLASSES):
            index = class_index(c, O)
            z = load_block(input, annotated, merged, index, tile, classes, O)
            g = load_target_block(target, annotated, merged, index, tile, own, classes, True, O)
            cotangents = load_cotangents_block(grad, annotated, index, classes, True, O)
            slopes = slopes_of(z, softmax, g, cotangents, best, gamma, index, O)
            result = combine(z, softmax, slopes, shares, O)
            result = tl.where(own.included, result * own.weight, 0.0)
            if O.PARTIAL:
                kept = load_kept(annotated, index, classes, O)
                if O.MERGE:
                    # Of what the background's logit gets, every merged one has its share.
                    whole = tl.sum(tl.where(index == 0, result, 0.0), axis=0, keep_dims=True)
                    background = tl.where(c == 0, whole, background)
                    z = finite(load_values(input, index, tile, tile.inside, classes, True, O))
                    share = background * exponential(z - merged.largest) / merged.total
                    share = tl.where(background == 0, 0.0, share)
                    result = tl.where(kept & (index > 0), result, share)
                else:
                    result = tl.where(kept, result, 0.0)
            store_values(output, index, tile, result, tile.inside & (index < classes))
