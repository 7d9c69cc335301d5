"""Patch fusion in gather form: every voxel sums the few patches over it, in patch order.

A program owns a tile of one slice of the volume (or ring) for a few channels. It looks for the
patches that touch its tile, a block of origins at a time, and adds them one after the other in
registers; then every voxel of the tile is written once. The weights of a patch are formed once
for all channels of the program. No atomics, so that the bits do not depend on anything but the
patches and their order.

The softmax of a patch needs the greatest value and the sum over the channels of each of its voxels.
Up to FEW channels a program works them out whenever it adds a patch, from what the caches hold of
it; with more they are two numbers a voxel, which a launch before works out.

Volumes of one or two axes have leading axes of extent 1.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from voxfuse.contract import Activation
from voxfuse.reference.overlap_add import checked_activation
from voxfuse.triton_kernels.launches import (
    LAUNCH_OPTIONS,
    device_guard,
    most_registers,
    power_of_two,
)
from voxfuse.triton_kernels.numerics import exponential, reciprocal

SIGMOID: tl.constexpr = tl.constexpr(int(Activation.sigmoid))
SOFTMAX: tl.constexpr = tl.constexpr(int(Activation.softmax))

#: Channels that a program adds up together; half as many in a ring, which takes more registers.
MAX_CHANNELS = 8
#: Voxels in a tile, and most of them along the last axis.
TILE = 512
MAX_WIDTH = 128
#: Origins that are compared with a tile at once.
ORIGINS = 128
#: Channels whose softmax is worked out anew. It decides on bits, and so depends on nothing else.
FEW = 8
#: Channels that a softmax takes up together.
STEP = 4
#: Registers that the gathering kernel may take.
REGISTERS = 128


@triton.jit
def _coordinates(slot, start, first_slot, extent, RING: tl.constexpr):
    """The coordinate that a ring holds in ``slot``: ``start`` lies in ``first_slot``."""
    if RING:
        result = start + slot - first_slot + tl.where(slot < first_slot, extent, 0)
    else:
        result = slot
    return result


@triton.jit
def _origin(origins, patch, axis: tl.constexpr, AXES: tl.constexpr):
    """Origin of a patch (or of several) along one of the three axes."""
    if axis + AXES >= 3:
        result = tl.load(origins + patch * AXES + (axis + AXES - 3))
    else:
        result = patch * 0
    return result


@triton.jit
def _touches(origins, patch, count, low, high, extent, axis: tl.constexpr, AXES: tl.constexpr):
    """Which patches have a part in [low, high] of one axis."""
    if axis + AXES >= 3:
        place = origins + patch * AXES + (axis + AXES - 3)
        origin = tl.load(place, mask=patch < count, other=0)
        result = (origin <= high) & (origin + extent > low)
    else:
        result = patch < count
    return result


@triton.jit
def _row_of(table, rows, patch, length, extent, axis: tl.constexpr, AXES: tl.constexpr):
    """Where the row of weights of a patch begins; rows that do not exist are the nearest one."""
    row = tl.load(rows + patch * AXES + (axis + AXES - 3))
    return table + tl.minimum(tl.maximum(row, 0), length - 1) * extent


@triton.jit
def _weights(
    table_z,
    table_y,
    table_x,
    rows,
    patch,
    z,
    y,
    x,
    inside,
    length_z,
    length_y,
    length_x,
    patch_z,
    patch_y,
    patch_x,
    sums,
    least,
    AXES: tl.constexpr,
    DENSE: tl.constexpr,
    NORMALISED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Weight of every voxel (z, y, x) of a patch, in DTYPE.

    With NORMALISED the factors are rounded to DTYPE one by one; otherwise their float64 product,
    if it is not below ``least``, is divided by ``sums``.
    """
    if DENSE:
        place = table_x + (z * patch_y + y) * patch_x + x
        weight = tl.load(place, mask=inside, other=0.0)
        if NORMALISED:
            weight = weight.to(DTYPE)
    else:
        row = _row_of(table_x, rows, patch, length_x, patch_x, 2, AXES)
        weight = tl.load(row + x, mask=(x >= 0) & (x < patch_x), other=0.0)
        if NORMALISED:
            weight = weight.to(DTYPE)
        if AXES > 1:
            row = _row_of(table_y, rows, patch, length_y, patch_y, 1, AXES)
            factor = tl.load(row + y, mask=(y >= 0) & (y < patch_y), other=0.0)
            if NORMALISED:
                factor = factor.to(DTYPE)
            if AXES > 2:
                row = _row_of(table_z, rows, patch, length_z, patch_z, 0, AXES)
                first = tl.load(row + z, mask=(z >= 0) & (z < patch_z), other=0.0)
                if NORMALISED:
                    first = first.to(DTYPE)
                factor = first * factor
            weight = factor * weight
    if not NORMALISED:
        weight = tl.where(weight < least, least, weight)
        weight = tl.where(sums == 0, 0.0, weight / tl.where(sums == 0, 1.0, sums)).to(DTYPE)
    return weight


@triton.jit
def _cover(table, k, x, inside, size, axis: tl.constexpr, AXES: tl.constexpr):
    """The k-th weight of all patches over the coordinates of an axis; -1 where there are fewer."""
    if axis + AXES >= 3:
        result = tl.load(table + k * size + x, mask=inside, other=-1.0)
    else:
        result = tl.where(inside, 1.0, -1.0).to(tl.float64)
    return result


@triton.jit
def _exponentials(source, channels, step, base, mask, greatest, STEP: tl.constexpr, DTYPE):
    """Of STEP channels from ``base`` on, of their distance to the greatest value up to them.

    Returns that value, by what to scale what came before, and the exponentials.
    """
    values = ()
    top = greatest
    channel = tl.zeros([1, 1], tl.int64) + base
    for c in tl.static_range(STEP):
        here = mask & (channel + c < channels)
        value = tl.load(source + (channel + c) * step, mask=here, other=float("-inf")).to(DTYPE)
        top = tl.where(value > top, value, top)
        values = values + (value,)
    # Channels of -infinity before the first number weigh nothing.
    shift = tl.where(top == float("-inf"), 0.0, top)
    factor = exponential(greatest - shift)
    result = ()
    for c in tl.static_range(STEP):
        result = result + (exponential(values[c] - shift),)
    return top, factor, result


@triton.jit
def _softmax(source, channels, step, mask, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STEP, DTYPE):
    """The greatest value over the channels, and one over the sum of the exponentials."""
    greatest = tl.full([HEIGHT, WIDTH], float("-inf"), DTYPE)
    total = tl.zeros([HEIGHT, WIDTH], DTYPE)
    for base in range(0, channels, STEP):
        greatest, factor, e = _exponentials(
            source, channels, step, base, mask, greatest, STEP, DTYPE
        )
        total = total * factor
        for c in tl.static_range(STEP):
            total += e[c]
    return greatest, reciprocal(total)


@triton.jit
def _probability(value, greatest, ACTIVATION: tl.constexpr, DTYPE):
    """The sigmoid, or the numerator of the softmax."""
    if ACTIVATION == SIGMOID:
        e = exponential(-tl.abs(value))
        value = tl.where(value < 0, e, 1.0) * reciprocal(1.0 + e)
    elif ACTIVATION == SOFTMAX:
        value = exponential(value - greatest)
    return value


@triton.jit
def _normalise(
    patches,
    softmax,
    channels,
    patch_z,
    patch_y,
    patch_x,
    patches_n,
    patches_c,
    patches_z,
    patches_y,
    patches_x,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``_softmax`` of every voxel, (N, 2, *patch), of a tile of one slice of one patch."""
    tiles_x = tl.cdiv(patch_x, WIDTH)
    tiles_y = tl.cdiv(patch_y, HEIGHT)
    tile = tl.program_id(0)
    x = (tile % tiles_x) * WIDTH + tl.arange(0, WIDTH)[None, :]
    y = ((tile // tiles_x) % tiles_y) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    z = (tile // tiles_x // tiles_y) % patch_z + tl.zeros([1, 1], tl.int64)
    patch = (tile // tiles_x // tiles_y // patch_z).to(tl.int64)
    inside = (y < patch_y) & (x < patch_x)
    source = patches + patch * patches_n + z * patches_z + y * patches_y + x * patches_x
    step = tl.zeros([1, 1], tl.int64) + patches_c
    greatest, inverse = _softmax(source, channels, step, inside, HEIGHT, WIDTH, STEP, DTYPE)
    extent = tl.full([1, 1], 1, tl.int64) * patch_z * patch_y * patch_x
    place = softmax + 2 * patch * extent + (z * patch_y + y) * patch_x + x
    tl.store(place, greatest, mask=inside)
    tl.store(place + extent, inverse, mask=inside)


@triton.jit
def _gather(
    patches,
    output,
    origins,
    rows,
    table_z,
    table_y,
    table_x,
    total,
    floor,
    cover_z,
    cover_y,
    cover_x,
    covers_z,
    covers_y,
    covers_x,
    cover_size_z,
    cover_size_y,
    cover_size_x,
    softmax,
    count,
    channels,
    size_z,
    size_y,
    size_x,
    patch_z,
    patch_y,
    patch_x,
    length_z,
    length_y,
    length_x,
    patches_n,
    patches_c,
    patches_z,
    patches_y,
    patches_x,
    start,
    stop,
    first_slot,
    AXES: tl.constexpr,
    DENSE: tl.constexpr,
    RING: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ORIGINS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sum the weighted patches over a tile (HEIGHT, WIDTH) of one slice.

    RING is the axis along which the output is a ring (-1: none). ADD adds to what is there. WEIGHTS
    sums the weights alone. With ``floor`` weights are at least that, and divided by their sums,
    which come from tables of the weights of all patches over a coordinate.
    sums the weights alone. ACTIVATION is 1 for the sigmoid of the patches, 2 for their softmax, of
    which ``softmax`` has what ``_normalise`` makes unless the channels are few.
    """
    tiles_x = tl.cdiv(size_x, WIDTH)
    tiles_y = tl.cdiv(size_y, HEIGHT)
    tile = tl.program_id(0)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.zeros([1, 1], tl.int64)
    slot_x = (tile % tiles_x) * WIDTH + tl.arange(0, WIDTH)[None, :]
    slot_y = ((tile // tiles_x) % tiles_y) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    slot_z = tile // tiles_x // tiles_y + tl.zeros([1, 1], tl.int32)
    x = _coordinates(slot_x, start, first_slot, size_x, RING == 2)
    y = _coordinates(slot_y, start, first_slot, size_y, RING == 1)
    z = _coordinates(slot_z, start, first_slot, size_z, RING == 0)
    inside_x = slot_x < size_x
    inside_y = slot_y < size_y
    inside_z = slot_z < size_z
    if RING == 2:
        inside_x = inside_x & (x < stop)
    elif RING == 1:
        inside_y = inside_y & (y < stop)
    elif RING == 0:
        inside_z = inside_z & (z < stop)
    inside = inside_x & inside_y & inside_z
    low_x = tl.min(tl.where(inside_x, x, size_x + stop))
    high_x = tl.max(tl.where(inside_x, x, -1))
    low_y = tl.min(tl.where(inside_y, y, size_y + stop))
    high_y = tl.max(tl.where(inside_y, y, -1))
    low_z = tl.min(z)
    high_z = tl.max(tl.where(inside_z, z, -1))

    place = (slot_z.to(tl.int64) * size_y + slot_y) * size_x + slot_x
    volume = tl.full([1, 1], 1, tl.int64) * size_z * size_y * size_x
    touched = count
    if ADD:
        touched = 0
        for base in range(0, count, ORIGINS):
            index = base + tl.arange(0, ORIGINS)
            hit = index < count
            hit = hit & _touches(origins, index, count, low_z, high_z, patch_z, 0, AXES)
            hit = hit & _touches(origins, index, count, low_y, high_y, patch_y, 1, AXES)
            hit = hit & _touches(origins, index, count, low_x, high_x, patch_x, 2, AXES)
            touched += tl.sum(hit.to(tl.int32))
    # What nothing is added to is neither read nor written.
    if (touched > 0) | (not ADD):
        sums = tl.full([1, 1], 1.0, tl.float64)
        if total is not None:
            sums = tl.load(total + place, mask=inside, other=0.0)
        least = 0.0
        if floor is not None:
            least = tl.load(floor)
            sums = tl.zeros([HEIGHT, WIDTH], tl.float64)
            for k in range(0, covers_z):
                along_z = _cover(cover_z, k, z, inside_z, cover_size_z, 0, AXES)
                for j in range(0, covers_y):
                    along_y = _cover(cover_y, j, y, inside_y, cover_size_y, 1, AXES)
                    outer = along_z * along_y
                    for i in range(0, covers_x):
                        across = _cover(cover_x, i, x, inside_x, cover_size_x, 2, AXES)
                        over = (along_z >= 0) & (along_y >= 0) & (across >= 0)
                        sums += tl.where(over, tl.maximum(outer * across, least), 0.0)
        values = ()
        for c in tl.static_range(CHANNELS):
            value = tl.zeros([HEIGHT, WIDTH], DTYPE)
            if ADD:
                mask = inside & (channel + c < channels)
                value = tl.load(output + (channel + c) * volume + place, mask=mask, other=0.0)
            values = values + (value.to(DTYPE),)
        for base in range(0, count, ORIGINS):
            index = base + tl.arange(0, ORIGINS)
            hit = index < count
            hit = hit & _touches(origins, index, count, low_z, high_z, patch_z, 0, AXES)
            hit = hit & _touches(origins, index, count, low_y, high_y, patch_y, 1, AXES)
            hit = hit & _touches(origins, index, count, low_x, high_x, patch_x, 2, AXES)
            patch = tl.min(tl.where(hit, index, count))
            while patch < count:
                here = patch.to(tl.int64)
                at_z = z - _origin(origins, here, 0, AXES)
                at_y = y - _origin(origins, here, 1, AXES)
                at_x = x - _origin(origins, here, 2, AXES)
                covered = (at_y >= 0) & (at_y < patch_y) & (at_x >= 0) & (at_x < patch_x)
                covered = covered & inside & (at_z >= 0) & (at_z < patch_z)
                weight = _weights(
                    table_z,
                    table_y,
                    table_x,
                    rows,
                    here,
                    at_z,
                    at_y,
                    at_x,
                    covered,
                    length_z,
                    length_y,
                    length_x,
                    patch_z,
                    patch_y,
                    patch_x,
                    sums,
                    least,
                    AXES,
                    DENSE,
                    (total is None) & (floor is None),
                    DTYPE,
                )
                if WEIGHTS:
                    values = (tl.where(covered, values[0] + weight, values[0]),)
                else:
                    source = patches + here * patches_n
                    source += at_z * patches_z + at_y * patches_y + at_x * patches_x
                    greatest = 0.0
                    if ACTIVATION == SOFTMAX:
                        if softmax is None:
                            step = tl.zeros([1, 1], tl.int64) + patches_c
                            greatest, inverse = _softmax(
                                source, channels, step, covered, HEIGHT, WIDTH, STEP, DTYPE
                            )
                        else:
                            extent = tl.full([1, 1], 1, tl.int64) * patch_z * patch_y * patch_x
                            known = softmax + 2 * here * extent
                            known += (at_z.to(tl.int64) * patch_y + at_y) * patch_x + at_x
                            greatest = tl.load(known, mask=covered, other=0.0)
                            inverse = tl.load(known + extent, mask=covered, other=0.0)
                        weight = weight * inverse
                    source += channel * patches_c
                    new = ()
                    for c in tl.static_range(CHANNELS):
                        mask = covered & (channel + c < channels)
                        value = tl.load(source + c * patches_c, mask=mask, other=0.0).to(DTYPE)
                        value = _probability(value, greatest, ACTIVATION, DTYPE)
                        new = new + (tl.where(mask, values[c] + weight * value, values[c]),)
                    values = new
                hit = hit & (index > patch)
                patch = tl.min(tl.where(hit, index, count))
        written = (slot_y < size_y) & (slot_x < size_x)
        if ADD:
            written = inside
        for c in tl.static_range(CHANNELS):
            mask = written & (channel + c < channels)
            value = values[c].to(output.dtype.element_ty)
            tl.store(output + (channel + c) * volume + place, value, mask=mask)


@triton.jit
def _own_tile(
    origins,
    rows,
    table_z,
    table_y,
    table_x,
    total,
    size_z,
    size_y,
    size_x,
    patch_z,
    patch_y,
    patch_x,
    length_z,
    length_y,
    length_x,
    AXES: tl.constexpr,
    DENSE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The tile of one slice of one patch that a program of the backward pass writes: its patch,
    voxels (z, y, x), which of them exist and which are in the volume, where, and their weights.
    """
    tiles_x = tl.cdiv(patch_x, WIDTH)
    tiles_y = tl.cdiv(patch_y, HEIGHT)
    tile = tl.program_id(0)
    x = (tile % tiles_x) * WIDTH + tl.arange(0, WIDTH)[None, :]
    y = ((tile // tiles_x) % tiles_y) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    z = (tile // tiles_x // tiles_y) % patch_z + tl.zeros([1, 1], tl.int32)
    patch = (tile // tiles_x // tiles_y // patch_z).to(tl.int64)
    to_z = z + _origin(origins, patch, 0, AXES)
    to_y = y + _origin(origins, patch, 1, AXES)
    to_x = x + _origin(origins, patch, 2, AXES)
    written = (y < patch_y) & (x < patch_x)
    inside = written & (to_y >= 0) & (to_y < size_y) & (to_x >= 0) & (to_x < size_x)
    inside = inside & (to_z >= 0) & (to_z < size_z)
    from_place = (to_z.to(tl.int64) * size_y + to_y) * size_x + to_x
    sums = tl.full([1, 1], 1.0, tl.float64)
    if total is not None:
        sums = tl.load(total + from_place, mask=inside, other=0.0)
    weight = _weights(
        table_z,
        table_y,
        table_x,
        rows,
        patch,
        z,
        y,
        x,
        inside,
        length_z,
        length_y,
        length_x,
        patch_z,
        patch_y,
        patch_x,
        sums,
        0.0,
        AXES,
        DENSE,
        total is None,
        DTYPE,
    )
    return patch, z, y, x, written, inside, from_place, weight


@triton.jit
def _scatter(
    grad,
    result,
    origins,
    rows,
    table_z,
    table_y,
    table_x,
    total,
    channels,
    size_z,
    size_y,
    size_x,
    patch_z,
    patch_y,
    patch_x,
    length_z,
    length_y,
    length_x,
    AXES: tl.constexpr,
    DENSE: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Gradient of a tile (HEIGHT, WIDTH) of one slice of one patch: ``w_i(t) grad(o_i + t)``."""
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.zeros([1, 1], tl.int64)
    patch, z, y, x, written, inside, from_place, weight = _own_tile(
        origins,
        rows,
        table_z,
        table_y,
        table_x,
        total,
        size_z,
        size_y,
        size_x,
        patch_z,
        patch_y,
        patch_x,
        length_z,
        length_y,
        length_x,
        AXES,
        DENSE,
        HEIGHT,
        WIDTH,
        DTYPE,
    )
    volume = tl.full([1, 1], 1, tl.int64) * size_z * size_y * size_x
    extent = tl.full([1, 1], 1, tl.int64) * patch_z * patch_y * patch_x
    place = (z.to(tl.int64) * patch_y + y) * patch_x + x
    for c in tl.static_range(CHANNELS):
        here = channel + c < channels
        value = tl.load(grad + (channel + c) * volume + from_place, mask=inside & here, other=0.0)
        value = tl.where(inside, weight * value.to(DTYPE), 0.0).to(result.dtype.element_ty)
        tl.store(result + (patch * channels + channel + c) * extent + place, value, written & here)


@triton.jit
def _scatter_activated(
    grad,
    patches,
    result,
    origins,
    rows,
    table_z,
    table_y,
    table_x,
    total,
    channels,
    size_z,
    size_y,
    size_x,
    patch_z,
    patch_y,
    patch_x,
    length_z,
    length_y,
    length_x,
    patches_n,
    patches_c,
    patches_z,
    patches_y,
    patches_x,
    AXES: tl.constexpr,
    DENSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """As ``_scatter``, of activated patches and in all channels: with the probabilities p of the
    patch and its weighted gradient a, ``p_c (a_c - sum_k p_k a_k)`` or ``p (1 - p) a``.
    """
    patch, z, y, x, written, inside, from_place, weight = _own_tile(
        origins,
        rows,
        table_z,
        table_y,
        table_x,
        total,
        size_z,
        size_y,
        size_x,
        patch_z,
        patch_y,
        patch_x,
        length_z,
        length_y,
        length_x,
        AXES,
        DENSE,
        HEIGHT,
        WIDTH,
        DTYPE,
    )
    volume = tl.full([1, 1], 1, tl.int64) * size_z * size_y * size_x
    extent = tl.full([1, 1], 1, tl.int64) * patch_z * patch_y * patch_x
    step = tl.zeros([1, 1], tl.int64) + patches_c
    source = patches + patch * patches_n
    source += z.to(tl.int64) * patches_z + y.to(tl.int64) * patches_y + x.to(tl.int64) * patches_x
    slopes = grad + from_place
    place = result + patch * channels * extent + (z.to(tl.int64) * patch_y + y) * patch_x + x
    greatest = tl.full([HEIGHT, WIDTH], float("-inf"), DTYPE)
    mean = tl.zeros([HEIGHT, WIDTH], DTYPE)  # sum_k p_k g_k
    if ACTIVATION == SOFTMAX:
        number = tl.zeros([HEIGHT, WIDTH], DTYPE)
        for base in range(0, channels, STEP):
            greatest, factor, e = _exponentials(
                source, channels, step, base, inside, greatest, STEP, DTYPE
            )
            number = number * factor
            mean = mean * factor
            channel = tl.zeros([1, 1], tl.int64) + base
            for c in tl.static_range(STEP):
                here = inside & (channel + c < channels)
                slope = tl.load(slopes + (channel + c) * volume, mask=here, other=0.0).to(DTYPE)
                number += e[c]
                mean += e[c] * slope
        inverse = reciprocal(number)
        mean = mean * inverse
        weight = weight * inverse
    for base in range(0, channels, STEP):
        channel = tl.zeros([1, 1], tl.int64) + base
        for c in tl.static_range(STEP):
            here = channel + c < channels
            value = tl.load(source + (channel + c) * step, mask=inside & here, other=0.0).to(DTYPE)
            slope = tl.load(slopes + (channel + c) * volume, mask=inside & here, other=0.0)
            slope = slope.to(DTYPE)
            if ACTIVATION == SOFTMAX:
                value = weight * _probability(value, greatest, ACTIVATION, DTYPE) * (slope - mean)
            else:
                # p (1 - p), whichever of the two is the small one
                e = exponential(-tl.abs(value))
                inverse = reciprocal(1.0 + e)
                value = weight * (e * inverse * inverse) * slope
            value = tl.where(inside, value, 0.0).to(result.dtype.element_ty)
            tl.store(place + (channel + c) * extent, value, mask=written & here)


# --- launches ------------------------------------------------------------------------------------


def _three(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` with leading axes of extent 1."""
    return (*[1] * (3 - len(shape)), *shape)


def _tables(
    weights: Sequence[torch.Tensor], axes: int, device: torch.device
) -> tuple[list[torch.Tensor | None], tuple[int, ...], bool]:
    """The weights as (z, y, x) tables on ``device``, how many rows each has, and if it is dense."""
    dense = not (len(weights) == axes and weights[0].ndim == 2)
    on_device = [w.to(device).contiguous() for w in weights]
    tables: list[torch.Tensor | None] = [None] * (3 - len(on_device))
    lengths = [1] * (3 - len(on_device)) + [w.shape[0] for w in on_device]
    return [*tables, *on_device], tuple(lengths), dense


def _accumulation(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def channels_a_program(channels: int, ring: bool) -> int:
    """Channels that a program fuses at a time."""
    return min(power_of_two(channels), MAX_CHANNELS // 2 if ring else MAX_CHANNELS)


def tile_shape(height: int, width: int) -> tuple[int, int]:
    """Extent of a program's tile of a slice, long along the last axis."""
    block_x = min(power_of_two(width), MAX_WIDTH)
    return min(power_of_two(height), TILE // block_x), block_x


def _normalised(
    patches: torch.Tensor | None,
    channels: int,
    patch_shape: Sequence[int],
    strides: Sequence[int],
    activation: int,
) -> torch.Tensor | None:
    """What the softmax of many channels keeps: (N, 2, *patch), with ``strides`` turned back."""
    if patches is None or activation != Activation.softmax or channels <= FEW:
        return None
    shape = (patches.shape[0], 2, *patch_shape)
    wide = torch.promote_types(patches.dtype, torch.float32)
    softmax = torch.empty(shape, dtype=wide, device=patches.device)
    patch = _three(patch_shape)
    height, width = tile_shape(*patch[1:])
    tiles = shape[0] * patch[0] * triton.cdiv(patch[1], height) * triton.cdiv(patch[2], width)
    if softmax.numel() == 0:
        return softmax
    with device_guard(patches):
        _normalise[(tiles,)](
            patches,
            softmax,
            channels,
            *patch,
            *strides,
            HEIGHT=height,
            WIDTH=width,
            STEP=STEP,
            DTYPE=_accumulation(patches.dtype),
            num_warps=4,
            **LAUNCH_OPTIONS,
        )
    return softmax


def _add(
    output: torch.Tensor,
    patches: torch.Tensor | None,
    origins: torch.Tensor,
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    total: torch.Tensor | None,
    patch_shape: Sequence[int],
    ring: tuple[int, int, int] | None,
    flip: int = 0,
    floor: float = 0.0,
    activation: int = Activation.none,
    cover: Sequence[torch.Tensor] = (),
) -> None:
    """Fuse ``patches`` (None: only the weights) into ``output`` (C, *extent), or add to a ring."""
    axes = output.ndim - 1
    device = output.device
    channels, size = output.shape[0], _three(output.shape[1:])
    if output.numel() == 0 or (ring is not None and origins.shape[0] == 0):
        return
    least, overs, covers, cover_sizes = None, [None] * 3, [1] * 3, [1] * 3
    if floor > 0:
        # A number would reach the kernel as float32.
        least = torch.full((1,), floor, dtype=torch.float64, device=device)
        for axis, table in enumerate(cover, 3 - axes):
            overs[axis] = table.to(device).contiguous()
            covers[axis], cover_sizes[axis] = table.shape
    tables, lengths, dense = _tables(weights, axes, device)
    ring_axis, start, stop = (-1, 0, 0) if ring is None else ring
    extent = _three(patch_shape)
    strides = (0, 0, 0, 0, 0)
    if patches is not None:
        spatial = list(patches.stride()[2:])
        for axis in range(axes):
            if flip >> axis & 1 and patches.numel() > 0:
                # Read from the far end, backwards.
                patches = patches.narrow(2 + axis, patches.shape[2 + axis] - 1, 1)
                spatial[axis] = -spatial[axis]
        strides = (patches.stride(0), patches.stride(1), *[0] * (3 - axes), *spatial)
    softmax = _normalised(patches, channels, patch_shape, strides, activation)
    origins, rows = origins.to(device).contiguous(), rows.to(device).contiguous()
    together = channels_a_program(channels, ring is not None)
    height, width = tile_shape(*size[1:])
    tiles = size[0] * triton.cdiv(size[1], height) * triton.cdiv(size[2], width)
    with device_guard(output):
        _gather[(tiles, triton.cdiv(channels, together))](
            patches,
            output,
            origins,
            rows,
            *tables,
            total,
            least,
            *overs,
            *covers,
            *cover_sizes,
            softmax,
            origins.shape[0],
            channels,
            *size,
            *extent,
            *lengths,
            *strides,
            start,
            stop,
            start % output.shape[1 + ring_axis] if ring_axis >= 0 else 0,
            AXES=axes,
            DENSE=dense,
            RING=ring_axis + 3 - axes if ring_axis >= 0 else -1,
            ADD=ring is not None,
            WEIGHTS=patches is None,
            ACTIVATION=activation,
            STEP=STEP,
            CHANNELS=together,
            HEIGHT=height,
            WIDTH=width,
            ORIGINS=ORIGINS,
            DTYPE=_accumulation(output.dtype),
            num_warps=4,
            **most_registers(REGISTERS),
            **LAUNCH_OPTIONS,
        )


def overlap_add(
    patches: torch.Tensor,
    origins: torch.Tensor,
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    total: torch.Tensor | None,
    volume_shape: Sequence[int],
    activation: int = Activation.none,
) -> torch.Tensor:
    """Return the fused volume (C, \\*volume) in the patches' dtype; uncovered voxels are 0."""
    shape = (patches.shape[1], *volume_shape)
    volume = torch.empty(shape, dtype=patches.dtype, device=patches.device)
    total = None if total is None else total.contiguous()
    tables = (origins, rows, weights, total, patches.shape[2:])
    _add(volume, patches, *tables, None, activation=checked_activation(activation))
    return volume


def overlap_add_(
    ring: torch.Tensor,
    patches: torch.Tensor,
    origins: torch.Tensor,
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    total: torch.Tensor | None,
    ring_axis: int,
    start: int,
    stop: int,
    flip: int = 0,
    floor: float = 0.0,
    activation: int = Activation.none,
    cover: Sequence[torch.Tensor] | None = None,
) -> None:
    """Add patches into ``ring``, which holds the coordinates [start, stop) of one axis."""
    place = (ring_axis, start, stop)
    total = None if total is None else total.contiguous()
    tables = (origins, rows, weights, total, patches.shape[2:])
    _add(ring, patches, *tables, place, flip, floor, checked_activation(activation), cover or ())


def overlap_weights_(
    total: torch.Tensor,
    origins: torch.Tensor,
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    ring_axis: int,
    start: int,
    stop: int,
) -> None:
    """Add every patch's weights into the float64 ``total``, laid out as a ring."""
    place = (ring_axis, start, stop)
    patch_shape = _patch_shape(weights, total.ndim)
    _add(total.unsqueeze(0), None, origins, rows, weights, None, patch_shape, place)


def _patch_shape(weights: Sequence[torch.Tensor], axes: int) -> tuple[int, ...]:
    separable = len(weights) == axes and weights[0].ndim == 2
    return tuple(w.shape[1] for w in weights) if separable else tuple(weights[0].shape[1:])


def overlap_add_backward(
    grad: torch.Tensor,
    origins: torch.Tensor,
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    total: torch.Tensor | None,
    patches: torch.Tensor | None = None,
    activation: int = Activation.none,
) -> torch.Tensor:
    """Return the gradient (N, C, \\*patch) of the patches, which an activation asks for."""
    axes = grad.ndim - 1
    channels, size = grad.shape[0], _three(grad.shape[1:])
    patch_shape = _patch_shape(weights, axes)
    shape = (origins.shape[0], channels, *patch_shape)
    result = torch.empty(shape, dtype=grad.dtype, device=grad.device)
    if result.numel() == 0:
        return result
    tables, lengths, dense = _tables(weights, axes, grad.device)
    patch = _three(patch_shape)
    grad, total = grad.contiguous(), None if total is None else total.contiguous()
    origins = origins.to(grad.device).contiguous()
    rows = rows.to(grad.device).contiguous()
    if checked_activation(activation):
        if patches is None:
            raise ValueError("patches: got None, expected the patches that were activated")
        height, width = tile_shape(*patch[1:])
        tiles = shape[0] * patch[0] * triton.cdiv(patch[1], height) * triton.cdiv(patch[2], width)
        with device_guard(grad):
            _scatter_activated[(tiles,)](
                grad,
                patches,
                result,
                origins,
                rows,
                *tables,
                total,
                channels,
                *size,
                *patch,
                *lengths,
                patches.stride(0),
                patches.stride(1),
                *[0] * (3 - axes),
                *patches.stride()[2:],
                AXES=axes,
                DENSE=dense,
                ACTIVATION=activation,
                HEIGHT=height,
                WIDTH=width,
                STEP=STEP,
                DTYPE=_accumulation(grad.dtype),
                num_warps=4,
                **LAUNCH_OPTIONS,
            )
        return result
    together = channels_a_program(channels, ring=False)
    height, width = tile_shape(*patch[1:])
    tiles = shape[0] * patch[0] * triton.cdiv(patch[1], height) * triton.cdiv(patch[2], width)
    with device_guard(grad):
        _scatter[(tiles, triton.cdiv(channels, together))](
            grad,
            result,
            origins,
            rows,
            *tables,
            total,
            channels,
            *size,
            *patch,
            *lengths,
            AXES=axes,
            DENSE=dense,
            CHANNELS=together,
            HEIGHT=height,
            WIDTH=width,
            DTYPE=_accumulation(grad.dtype),
            num_warps=4,
            **LAUNCH_OPTIONS,
        )
    return result
