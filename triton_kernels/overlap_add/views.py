"""What the kernels of overlap_add take, and where in it a program works.

Volumes and patches of one or two axes have leading axes of extent 1.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Axes(NamedTuple):
    """One thing for each of the three axes."""

    z: Any
    y: Any
    x: Any


class Patches(NamedTuple):
    """Patches (N, C, *extent), and the strides of their axes in elements."""

    pointer: Any
    patch: Any
    channel: Any
    voxel: Axes


class Placement(NamedTuple):
    """Where patches lie, their extent and what their voxels weigh.

    ``origins`` and ``rows`` are (N, axes). A table (length, extent) of weights belongs to each
    axis, of which a patch takes one row; or one table of all voxels, in ``tables.x``, to all axes.
    """

    origins: Any
    rows: Any
    extent: Axes
    tables: Axes
    lengths: Axes


class Floor(NamedTuple):
    """Weights are at least ``least``, and divided by their sum over all patches, which a table
    (count, size) for each axis gives: every weight over a coordinate; -1 where there are fewer.
    """

    least: Any
    tables: Axes
    counts: Axes
    sizes: Axes


class Ring(NamedTuple):
    """The coordinates [start, stop) of an axis, of which ``start`` lies in the slot ``first``."""

    start: Any
    stop: Any
    first: Any


class Options(NamedTuple):
    """What a kernel is compiled for."""

    HEIGHT: int  # of a tile
    WIDTH: int
    DTYPE: tl.dtype  # of the sums
    ORIGINS: int  # that are compared with a tile at once
    AXES: int = 3
    DENSE: bool = False  # one table of weights
    RING: int = -1  # the axis along which the output is a ring that is added to; -1: none
    CHANNELS: int = 1  # that a program takes up together
    ACTIVATION: int = 0


@triton.jit
def voxels_of(size):
    """How many voxels there are, in 64 bits."""
    return tl.full([1, 1], 1, tl.int64) * size.z * size.y * size.x


@triton.jit
def index_in(size, at):
    """Where the voxels ``at`` lie in a contiguous volume."""
    return (at.z.to(tl.int64) * size.y + at.y) * size.x + at.x


@triton.jit
def contained(size, at, mask):
    """Which of the voxels ``at``, of those in ``mask``, a volume has."""
    inside = (at.y >= 0) & (at.y < size.y) & (at.x >= 0) & (at.x < size.x)
    return inside & mask & (at.z >= 0) & (at.z < size.z)


@triton.jit
def own_tile(size, OPTIONS: tl.constexpr):
    """The program's tile: the number of its slice, and y and x of its voxels."""
    tiles_y, tiles_x = tl.cdiv(size.y, OPTIONS.HEIGHT), tl.cdiv(size.x, OPTIONS.WIDTH)
    tile = tl.program_id(0)
    x = (tile % tiles_x) * OPTIONS.WIDTH + tl.arange(0, OPTIONS.WIDTH)[None, :]
    y = ((tile // tiles_x) % tiles_y) * OPTIONS.HEIGHT + tl.arange(0, OPTIONS.HEIGHT)[:, None]
    return tile // tiles_x // tiles_y, y, x


@triton.jit
def tile_of_patch(extent, OPTIONS: tl.constexpr):
    """As ``own_tile``, of slices of patches: the patch and its voxels."""
    slice, y, x = own_tile(extent, OPTIONS)
    z = slice % extent.z + tl.zeros([1, 1], tl.int32)
    return (slice // extent.z).to(tl.int64), Axes(z, y, x)


@triton.jit
def voxels_of_patch(patches, patch, at):
    """Pointers to the voxels ``at`` of a patch, first channel."""
    strides = patches.voxel
    source = patches.pointer + patch * patches.patch
    offset = at.z.to(tl.int64) * strides.z + at.y.to(tl.int64) * strides.y
    return source + (offset + at.x.to(tl.int64) * strides.x)


@triton.jit
def origin(placed, patch, axis: tl.constexpr, OPTIONS: tl.constexpr):
    """Where a patch begins along an axis."""
    if axis + OPTIONS.AXES >= 3:
        result = tl.load(placed.origins + patch * OPTIONS.AXES + (axis + OPTIONS.AXES - 3))
    else:
        result = patch * 0
    return result


@triton.jit
def touching(placed, patch, count, low, high, OPTIONS: tl.constexpr):
    """Which of several patches have a part in the box from ``low`` to ``high``."""
    hit = patch < count
    for axis in tl.static_range(3 - OPTIONS.AXES, 3):
        place = placed.origins + patch * OPTIONS.AXES + (axis + OPTIONS.AXES - 3)
        first = tl.load(place, mask=patch < count, other=0)
        hit = hit & ((first <= high[axis]) & (first + placed.extent[axis] > low[axis]))
    return hit
