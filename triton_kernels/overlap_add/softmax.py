"""Softmax and sigmoid of patches, evaluated in the type of the sums."""

import triton
import triton.language as tl

from voxfuse import contract
from voxfuse.triton_kernels.numerics import exponential, reciprocal, sigmoid_alone
from voxfuse.triton_kernels.overlap_add.views import (
    index_in,
    tile_of_patch,
    voxels_of,
    voxels_of_patch,
)

#: Channels that a softmax takes up together.
STEP = tl.constexpr(4)


@triton.jit
def exponentials(source, channels, step, base, mask, greatest, OPTIONS: tl.constexpr):
    """Of STEP channels from ``base`` on, of their distance to the greatest value up to them.

    Returns that value, by what to scale what came before, and the exponentials.
    """
    values = ()
    top = greatest
    channel = tl.zeros([1, 1], tl.int64) + base
    for c in tl.static_range(STEP):
        place = source + (channel + c) * step
        value = tl.load(place, mask=mask & (channel + c < channels), other=float("-inf"))
        value = value.to(OPTIONS.DTYPE)
        top = tl.where(value > top, value, top)
        values = values + (value,)
    # Channels of -infinity before the first number weigh nothing.
    shift = tl.where(top == float("-inf"), 0.0, top)
    result = ()
    for c in tl.static_range(STEP):
        result = result + (exponential(values[c] - shift),)
    return top, exponential(greatest - shift), result


@triton.jit
def softmax_of(source, channels, step, mask, OPTIONS: tl.constexpr):
    """The greatest value over the channels, and one over the sum of the exponentials."""
    greatest = tl.full([OPTIONS.HEIGHT, OPTIONS.WIDTH], float("-inf"), OPTIONS.DTYPE)
    total = tl.zeros([OPTIONS.HEIGHT, OPTIONS.WIDTH], OPTIONS.DTYPE)
    for base in range(0, channels, STEP):
        greatest, factor, e = exponentials(source, channels, step, base, mask, greatest, OPTIONS)
        total = total * factor
        for c in tl.static_range(STEP):
            total += e[c]
    return greatest, reciprocal(total)


@triton.jit
def activated(value, greatest, OPTIONS: tl.constexpr):
    """The value itself, its sigmoid, or the numerator of its softmax."""
    if OPTIONS.ACTIVATION == contract.Activation.sigmoid:
        value = sigmoid_alone(value)
    elif OPTIONS.ACTIVATION == contract.Activation.softmax:
        value = exponential(value - greatest)
    return value


@triton.jit
def normalise(patches, softmax, channels, extent, OPTIONS: tl.constexpr):
    """``softmax_of`` every voxel, (N, 2, *extent), of a tile of one slice of one patch."""
    patch, at = tile_of_patch(extent, OPTIONS)
    inside = (at.y < extent.y) & (at.x < extent.x)
    step = tl.zeros([1, 1], tl.int64) + patches.channel
    source = voxels_of_patch(patches, patch, at)
    greatest, inverse = softmax_of(source, channels, step, inside, OPTIONS)
    voxels = voxels_of(extent)
    place = softmax + 2 * patch * voxels + index_in(extent, at)
    tl.store(place, greatest, mask=inside)
    tl.store(place + voxels, inverse, mask=inside)


@triton.jit
def normalised(softmax, extent, patch, at, mask):
    """What ``normalise`` has stored of the voxels ``at`` of a patch."""
    voxels = voxels_of(extent)
    place = softmax + 2 * patch * voxels + index_in(extent, at)
    return tl.load(place, mask=mask, other=0.0), tl.load(place + voxels, mask=mask, other=0.0)
