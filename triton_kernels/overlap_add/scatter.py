"""Gradients: every voxel of a patch reads what it has gone to."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from voxfuse import contract
from voxfuse.triton_kernels.numerics import reciprocal, sigmoid
from voxfuse.triton_kernels.overlap_add.softmax import STEP, activated, exponentials
from voxfuse.triton_kernels.overlap_add.views import (
    Axes,
    contained,
    index_in,
    origin,
    tile_of_patch,
    voxels_of,
    voxels_of_patch,
)
from voxfuse.triton_kernels.overlap_add.weights import weights_of


class _Target(NamedTuple):
    """The voxels of a patch that a program writes."""

    patch: Any
    at: Axes
    written: Any  # which of them there are
    inside: Any  # which are in the volume,
    place: Any  # where in it,
    weight: Any  # and their weights


@triton.jit
def _target(placed, total, size, OPTIONS: tl.constexpr):
    """The program's tile of one slice of one patch."""
    patch, at = tile_of_patch(placed.extent, OPTIONS)
    to_z = at.z + origin(placed, patch, 0, OPTIONS)
    to_y = at.y + origin(placed, patch, 1, OPTIONS)
    to_x = at.x + origin(placed, patch, 2, OPTIONS)
    to = Axes(to_z, to_y, to_x)
    written = (at.y < placed.extent.y) & (at.x < placed.extent.x)
    inside = contained(size, to, written)
    place = index_in(size, to)
    sums = tl.full([1, 1], 1.0, tl.float64)
    if total is not None:
        sums = tl.load(total + place, mask=inside, other=0.0)
    weight = weights_of(placed, patch, at, inside, sums, 0.0, total is None, OPTIONS)
    return _Target(patch, at, written, inside, place, weight)


@triton.jit
def scatter(grad, result, placed, total, channels, size, OPTIONS: tl.constexpr):
    """Gradient (N, C, *extent) of the patches at a tile: ``w_i(t) grad(o_i + t)``."""
    channel = tl.program_id(1).to(tl.int64) * OPTIONS.CHANNELS + tl.zeros([1, 1], tl.int64)
    target = _target(placed, total, size, OPTIONS)
    volume, voxels = voxels_of(size), voxels_of(placed.extent)
    place = index_in(placed.extent, target.at)
    for c in tl.static_range(OPTIONS.CHANNELS):
        here = channel + c < channels
        source = grad + (channel + c) * volume + target.place
        value = tl.load(source, mask=target.inside & here, other=0.0).to(OPTIONS.DTYPE)
        value = tl.where(target.inside, target.weight * value, 0.0).to(result.dtype.element_ty)
        to = result + (target.patch * channels + channel + c) * voxels + place
        tl.store(to, value, mask=target.written & here)


@triton.jit
def scatter_activated(grad, patches, result, placed, total, channels, size, OPTIONS: tl.constexpr):
    """As ``scatter``, of activated patches and in all channels: with the probabilities p of the
    patch and its weighted gradient a, ``p_c (a_c - sum_k p_k a_k)`` or ``p (1 - p) a``.
    """
    target = _target(placed, total, size, OPTIONS)
    inside, weight = target.inside, target.weight
    volume, voxels = voxels_of(size), voxels_of(placed.extent)
    step = tl.zeros([1, 1], tl.int64) + patches.channel
    source = voxels_of_patch(patches, target.patch, target.at)
    slopes = grad + target.place
    place = result + target.patch * channels * voxels + index_in(placed.extent, target.at)
    greatest = tl.full([OPTIONS.HEIGHT, OPTIONS.WIDTH], float("-inf"), OPTIONS.DTYPE)
    mean = tl.zeros([OPTIONS.HEIGHT, OPTIONS.WIDTH], OPTIONS.DTYPE)  # sum_k p_k g_k
    if OPTIONS.ACTIVATION == contract.Activation.softmax:
        number = tl.zeros([OPTIONS.HEIGHT, OPTIONS.WIDTH], OPTIONS.DTYPE)
        for base in range(0, channels, STEP):
            greatest, factor, e = exponentials(
                source, channels, step, base, inside, greatest, OPTIONS
            )
            number = number * factor
            mean = mean * factor
            channel = tl.zeros([1, 1], tl.int64) + base
            for c in tl.static_range(STEP):
                here = inside & (channel + c < channels)
                slope = tl.load(slopes + (channel + c) * volume, mask=here, other=0.0)
                number += e[c]
                mean += e[c] * slope.to(OPTIONS.DTYPE)
        inverse = reciprocal(number)
        mean = mean * inverse
        weight = weight * inverse
    for base in range(0, channels, STEP):
        channel = tl.zeros([1, 1], tl.int64) + base
        for c in tl.static_range(STEP):
            here = channel + c < channels
            value = tl.load(source + (channel + c) * step, mask=inside & here, other=0.0)
            slope = tl.load(slopes + (channel + c) * volume, mask=inside & here, other=0.0)
            value, slope = value.to(OPTIONS.DTYPE), slope.to(OPTIONS.DTYPE)
            if OPTIONS.ACTIVATION == contract.Activation.softmax:
                value = weight * activated(value, greatest, OPTIONS) * (slope - mean)
            else:
                p, rest, _ = sigmoid(value)
                value = weight * (p * rest) * slope
            value = tl.where(inside, value, 0.0).to(result.dtype.element_ty)
            tl.store(place + (channel + c) * voxels, value, mask=target.written & here)
