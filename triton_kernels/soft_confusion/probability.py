"""Probabilities, likelihoods and their slopes, of classes in registers or read block by block."""

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
    power,
    reciprocal,
    sigmoid,
)
from voxfuse.triton_kernels.soft_confusion.load import class_index, load_block
from voxfuse.triton_kernels.soft_confusion.options import SIGMOID, SOFTMAX


class Softmax(NamedTuple):
    """Of every voxel the largest logit, the sum of exp(z - largest) over the classes that are
    smaller, and how many are the largest. Nothing where there is no softmax.
    """

    largest: Any
    rest: Any
    count: Any


class Probability(NamedTuple):
    """p, 1 - p, -log p and -log(1 - p), none of them a difference of near numbers.

    (With softmax the last one is not needed and not valid.)
    """

    p: Any
    complement: Any
    minus_log: Any
    minus_log_complement: Any


@triton.jit
def softmax_of(zs, classes, O: tl.constexpr):
    """The ``Softmax`` of classes in registers."""
    m = tl.full([1, 1], 0.0, O.DTYPE)
    rest, count = m, m
    if O.ACTIVATION == SOFTMAX or O.LIKELIHOOD == SOFTMAX:
        finite_zs = ()
        for t in tl.static_range(O.TILES):
            z = finite(zs[t])
            if O.CLASSES > 1 and t == O.TILES - 1:
                # Classes that only pad a block get probability 0.
                z = tl.where(class_index(t * O.CLASSES, O) < classes, z, float("-inf"))
            finite_zs = finite_zs + (z,)
            m = z if t == 0 else tl.maximum(m, z)
        if O.CLASSES > 1:
            m = tl.max(m, axis=0, keep_dims=True)
        for t in tl.static_range(O.TILES):
            d = finite_zs[t] - m
            rest = rest + tl.where(d == 0, 0.0, exponential(d))
            count = count + tl.where(d == 0, 1.0, 0.0)
        if O.CLASSES > 1:
            rest = tl.sum(rest, axis=0, keep_dims=True)
            count = tl.sum(count, axis=0, keep_dims=True)
    return Softmax(m, rest, count)


@triton.jit
def softmax_online(input, annotated, merged, tile, classes, FIND: tl.constexpr, O: tl.constexpr):
    """The ``Softmax`` of classes that are read block by block.

    With FIND also a class with the largest logit; 0 without, or if no logit is a number.
    """
    m = tl.full([1, O.BLOCK], float("-inf"), O.DTYPE)
    rest = tl.full([1, O.BLOCK], 0.0, O.DTYPE)
    count = tl.full([1, O.BLOCK], 0.0, O.DTYPE)
    place = tl.full([1, O.BLOCK], 0, tl.int32)
    if O.ACTIVATION == SOFTMAX or O.LIKELIHOOD == SOFTMAX:
        for c in range(0, classes, O.CLASSES):
            index = class_index(c, O)
            z = load_block(input, annotated, merged, index, tile, classes, O)
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
                place = tl.where(m == new, place, found)
            rest += tl.sum(tl.where(d == 0, 0.0, exponential(d)), axis=0, keep_dims=True)
            count += tl.sum(tl.where(d == 0, 1.0, 0.0), axis=0, keep_dims=True)
            m = new
    return Softmax(m, rest, count), place


@triton.jit
def is_largest(z, softmax):
    """Whether a class has its voxel's largest logit."""
    return finite(z) - softmax.largest == 0


@triton.jit
def probability(z, softmax, ACTIVATION: tl.constexpr):
    """The ``Probability`` of a block of classes with the logits ``z``."""
    if ACTIVATION == SOFTMAX:
        rest, count = softmax.rest, softmax.count
        d = finite(z) - softmax.largest
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
        p, complement, e = sigmoid(z)
        logarithm = log_one_plus(e)
        minus_log = logarithm + tl.maximum(-z, 0.0)
        minus_log_complement = logarithm + tl.maximum(z, 0.0)
    else:
        p = z
        complement = 1.0 - z
        minus_log = -tl.log(p)
        minus_log_complement = -tl.log(complement)
    return Probability(p, complement, minus_log, minus_log_complement)


@triton.jit
def softmax_of_two(z0, z1, label):
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
def gaps_to_largest(zs, classes, O: tl.constexpr):
    """Return ``z - largest`` of every class, never NaN, and something NaN if a logit is NaN.

    Infinite logits count as the limit of ever larger ones. Classes that only pad the last block
    have a gap of infinity.
    """
    if O.CLASSES > 1:
        valid = class_index((O.TILES - 1) * O.CLASSES, O) < classes
        m = tl.where(valid, zs[O.TILES - 1], float("-inf"))
        for t in tl.static_range(O.TILES - 1):
            m = tl.maximum(m, zs[t], propagate_nan=NAN)
        broken = tl.max(tl.where(m == m, 0.0, 1.0), axis=0, keep_dims=True)
        m = tl.max(m, axis=0, keep_dims=True)
        m = tl.where(broken == 0, m, float("nan"))
    else:
        m = zs[0]
        for t in tl.static_range(1, O.TILES):
            m = tl.maximum(m, zs[t], propagate_nan=NAN)
    gaps = ()
    for t in tl.static_range(O.TILES):
        # The minimum of 0 and NaN is 0: infinity less infinity counts as no gap.
        gap = tl.minimum(zs[t] - m, 0.0)
        if O.CLASSES > 1 and t == O.TILES - 1:
            gap = tl.where(valid, gap, float("-inf"))
        gaps = gaps + (gap,)
    return gaps, m


@triton.jit
def modulated(complement, minus_log, gamma, c, O: tl.constexpr):
    """``(1-p)^gamma (-log p)`` of the classes ``c``, where 0 times infinity is 0.

    Only the first FOCAL classes have the exponent gamma (-1: all).
    """
    result = minus_log
    if O.GAMMA != 0:
        factor = power(complement, gamma, False, O.GAMMA)
        result = tl.where(factor == 0, 0.0, factor * minus_log)
        if O.FOCAL >= 0:
            result = tl.where(c < O.FOCAL, result, minus_log)
    return result


@triton.jit
def modulated_slope(p, complement, minus_log, gamma, c, O: tl.constexpr):
    """``q = gamma p (1-p)^(gamma-1) log p - (1-p)^gamma``, 0 in the limit p = 1.

    -1 for the classes ``c`` from FOCAL on, whose exponent is 0.
    """
    if O.GAMMA == 0:
        result = tl.full([1, 1], -1.0, O.DTYPE)
    else:
        sure = complement == 0
        base = tl.where(sure, 1.0, complement)
        factor = power(base, gamma, True, O.GAMMA)
        n = tl.full([1, 1], gamma, O.DTYPE)
        drift = tl.where(p == 0, 0.0, p * minus_log)
        result = tl.where(sure, 0.0, -factor * (n * drift + base))
        if O.FOCAL >= 0:
            result = tl.where(c < O.FOCAL, result, -1.0)
    return result


@triton.jit
def missed(p, complement, g):
    """``g - p``, of which nothing is lost where p is almost 1."""
    return tl.where(g >= 0.5, complement - (1.0 - g), g - p)
