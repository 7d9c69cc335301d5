"""Every voxel of the output sums the patches over it."""

import triton
import triton.language as tl

from voxfuse import contract
from voxfuse.triton_kernels.overlap_add.softmax import activated, normalised, softmax_of
from voxfuse.triton_kernels.overlap_add.views import (
    Axes,
    contained,
    index_in,
    origin,
    own_tile,
    touching,
    voxels_of,
    voxels_of_patch,
)
from voxfuse.triton_kernels.overlap_add.weights import sums_with_floor, weights_of


@triton.jit
def _coordinates(slot, extent, ring, axis: tl.constexpr, OPTIONS: tl.constexpr):
    """The coordinates that slots of an axis hold, and which of them there are."""
    at = slot
    inside = slot < extent
    if OPTIONS.RING == axis:
        at = ring.start + slot - ring.first + tl.where(slot < ring.first, extent, 0)
        inside = inside & (at < ring.stop)
    return at, inside


@triton.jit
def _ends(at, inside, beyond):
    """The first and the last coordinate; ``beyond`` and -1 where there are none."""
    return tl.min(tl.where(inside, at, beyond)), tl.max(tl.where(inside, at, -1))


@triton.jit
def _add_patch(
    values, patches, softmax, patch, at, covered, weight, channel, channels, extent, OPTIONS
):
    """``values`` of the channels from ``channel`` on, and what a patch adds to them."""
    source = voxels_of_patch(patches, patch, at)
    # Of 64 bits: a stride that has fewer comes as 32, and a multiple of it may need more.
    step = tl.zeros([1, 1], tl.int64) + patches.channel
    greatest = 0.0
    if OPTIONS.ACTIVATION == contract.Activation.softmax:
        if softmax is None:
            greatest, inverse = softmax_of(source, channels, step, covered, OPTIONS)
        else:
            greatest, inverse = normalised(softmax, extent, patch, at, covered)
        weight = weight * inverse
    source += channel * step
    new = ()
    for c in tl.static_range(OPTIONS.CHANNELS):
        mask = covered & (channel + c < channels)
        value = tl.load(source + c * step, mask=mask, other=0.0).to(OPTIONS.DTYPE)
        value = activated(value, greatest, OPTIONS)
        new = new + (tl.where(mask, values[c] + weight * value, values[c]),)
    return new


@triton.jit
def gather(
    patches,
    output,
    placed,
    total,
    floor,
    softmax,
    count,
    channels,
    size,
    ring,
    OPTIONS: tl.constexpr,
):
    """Sum ``count`` weighted patches over a tile of one slice of the output (C, *size).

    Without patches their weights alone are summed. ``total`` has the sums of weights that are not
    normalised. ``softmax`` is what ``normalise`` makes of patches of many channels.
    """
    slice, slot_y, slot_x = own_tile(size, OPTIONS)
    channel = tl.program_id(1).to(tl.int64) * OPTIONS.CHANNELS + tl.zeros([1, 1], tl.int64)
    slot = Axes(slice + tl.zeros([1, 1], tl.int32), slot_y, slot_x)
    x, inside_x = _coordinates(slot.x, size.x, ring, 2, OPTIONS)
    y, inside_y = _coordinates(slot.y, size.y, ring, 1, OPTIONS)
    z, inside_z = _coordinates(slot.z, size.z, ring, 0, OPTIONS)
    inside = inside_z & inside_y & inside_x
    low_x, high_x = _ends(x, inside_x, size.x + ring.stop)
    low_y, high_y = _ends(y, inside_y, size.y + ring.stop)
    low_z, high_z = _ends(z, inside_z, size.z + ring.stop)
    low, high = Axes(low_z, low_y, low_x), Axes(high_z, high_y, high_x)
    place, volume = index_in(size, slot), voxels_of(size)
    adding: tl.constexpr = OPTIONS.RING >= 0

    touched = count
    if adding:
        touched = 0
        for base in range(0, count, OPTIONS.ORIGINS):
            hit = touching(placed, base + tl.arange(0, OPTIONS.ORIGINS), count, low, high, OPTIONS)
            touched += tl.sum(hit.to(tl.int32))
    # What nothing is added to is neither read nor written.
    if (touched > 0) | (not adding):
        sums = tl.full([1, 1], 1.0, tl.float64)
        if total is not None:
            sums = tl.load(total + place, mask=inside, other=0.0)
        least = 0.0
        if floor.least is not None:
            least = tl.load(floor.least)
            within = Axes(inside_z, inside_y, inside_x)
            sums = sums_with_floor(floor, least, Axes(z, y, x), within, OPTIONS)
        values = ()
        for c in tl.static_range(OPTIONS.CHANNELS):
            value = tl.zeros([OPTIONS.HEIGHT, OPTIONS.WIDTH], OPTIONS.DTYPE)
            if adding:
                mask = inside & (channel + c < channels)
                value = tl.load(output + (channel + c) * volume + place, mask=mask, other=0.0)
            values = values + (value.to(OPTIONS.DTYPE),)
        for base in range(0, count, OPTIONS.ORIGINS):
            index = base + tl.arange(0, OPTIONS.ORIGINS)
            hit = touching(placed, index, count, low, high, OPTIONS)
            next = tl.min(tl.where(hit, index, count))
            while next < count:
                patch = next.to(tl.int64)
                at_z = z - origin(placed, patch, 0, OPTIONS)
                at_y = y - origin(placed, patch, 1, OPTIONS)
                at_x = x - origin(placed, patch, 2, OPTIONS)
                at = Axes(at_z, at_y, at_x)
                covered = contained(placed.extent, at, inside)
                known: tl.constexpr = total is None and floor.least is None
                weight = weights_of(placed, patch, at, covered, sums, least, known, OPTIONS)
                if patches.pointer is None:
                    values = (tl.where(covered, values[0] + weight, values[0]),)
                else:
                    values = _add_patch(
                        values,
                        patches,
                        softmax,
                        patch,
                        at,
                        covered,
                        weight,
                        channel,
                        channels,
                        placed.extent,
                        OPTIONS,
                    )
                hit = hit & (index > next)
                next = tl.min(tl.where(hit, index, count))
        written = inside if adding else (slot.y < size.y) & (slot.x < size.x)
        for c in tl.static_range(OPTIONS.CHANNELS):
            mask = written & (channel + c < channels)
            value = values[c].to(output.dtype.element_ty)
            tl.store(output + (channel + c) * volume + place, value, mask=mask)
