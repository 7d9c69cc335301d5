"""What the voxels of a patch weigh."""

import triton
import triton.language as tl

from voxfuse.triton_kernels.overlap_add.views import index_in


@triton.jit
def _factor(placed, patch, at, axis: tl.constexpr, NORMALISED, OPTIONS: tl.constexpr):
    """What an axis contributes; rows of its table that do not exist are the nearest one."""
    row = tl.load(placed.rows + patch * OPTIONS.AXES + (axis + OPTIONS.AXES - 3))
    row = tl.minimum(tl.maximum(row, 0), placed.lengths[axis] - 1)
    place = placed.tables[axis] + row * placed.extent[axis] + at[axis]
    factor = tl.load(place, mask=(at[axis] >= 0) & (at[axis] < placed.extent[axis]), other=0.0)
    return factor.to(OPTIONS.DTYPE) if NORMALISED else factor


@triton.jit
def weights_of(
    placed, patch, at, inside, sums, least, NORMALISED: tl.constexpr, OPTIONS: tl.constexpr
):
    """Weights of the voxels ``at`` of a patch, in DTYPE.

    With NORMALISED the factors are rounded to DTYPE one by one; otherwise their float64 product,
    if it is not below ``least``, is divided by ``sums``.
    """
    extent = placed.extent
    if OPTIONS.DENSE:
        place = placed.tables.x + index_in(extent, at)
        weight = tl.load(place, mask=inside, other=0.0)
        if NORMALISED:
            weight = weight.to(OPTIONS.DTYPE)
    else:
        weight = _factor(placed, patch, at, 2, NORMALISED, OPTIONS)
        if OPTIONS.AXES > 1:
            factor = _factor(placed, patch, at, 1, NORMALISED, OPTIONS)
            if OPTIONS.AXES > 2:
                factor = _factor(placed, patch, at, 0, NORMALISED, OPTIONS) * factor
            weight = factor * weight
    if not NORMALISED:
        weight = tl.where(weight < least, least, weight)
        weight = tl.where(sums == 0, 0.0, weight / tl.where(sums == 0, 1.0, sums))
        weight = weight.to(OPTIONS.DTYPE)
    return weight


@triton.jit
def _all_weights(floor, k, at, inside, axis: tl.constexpr, OPTIONS: tl.constexpr):
    """The k-th weight of the patches over coordinates of an axis; -1 where there are fewer."""
    if axis + OPTIONS.AXES >= 3:
        place = floor.tables[axis] + k * floor.sizes[axis] + at[axis]
        result = tl.load(place, mask=inside[axis], other=-1.0)
    else:
        result = tl.where(inside[axis], 1.0, -1.0).to(tl.float64)
    return result


@triton.jit
def sums_with_floor(floor, least, at, inside, OPTIONS: tl.constexpr):
    """Sums over all patches of their weights, which are at least ``least``.

    ``inside`` has for each axis which coordinates there are.
    """
    sums = tl.zeros([OPTIONS.HEIGHT, OPTIONS.WIDTH], tl.float64)
    for k in range(0, floor.counts.z):
        z = _all_weights(floor, k, at, inside, 0, OPTIONS)
        for j in range(0, floor.counts.y):
            y = _all_weights(floor, j, at, inside, 1, OPTIONS)
            for i in range(0, floor.counts.x):
                x = _all_weights(floor, i, at, inside, 2, OPTIONS)
                over = (z >= 0) & (y >= 0) & (x >= 0)
                sums += tl.where(over, tl.maximum(z * y * x, least), 0.0)
    return sums
