"""Windows and grids in NumPy: the twin of the compiled module ``voxfuse._host``.

Every function has the name, arguments and result of its compiled counterpart, and checks
nothing; :mod:`voxfuse.fusion` holds the public functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def _mirrored_centres(size: int) -> Vector:
    """Voxel centres, mirrored into the first half: windows are symmetric to the bit."""
    index = np.arange(size)
    return np.minimum(index, size - 1 - index) + 0.5


def bspline(size: int, order: int) -> Vector:
    """Cardinal B-spline of degree ``order`` on uniform knots stretched over the patch.

    The recursion ``B_d(u) = (u B_{d-1}(u) + (d + 1 - u) B_{d-1}(u - 1)) / d`` adds positive terms
    only, so the tails keep their relative accuracy.
    """
    u = _mirrored_centres(size) * (order + 1) / size
    interval = u.astype(np.int64)
    fraction = u - interval
    value = np.zeros((order + 2, size))  # value[j] = B_d(fraction + j); the last row stays 0
    value[0] = 1.0
    for degree in range(1, order + 1):
        for j in range(degree, -1, -1):
            left = (fraction + j) * value[j] if j < degree else 0.0
            right = (degree + 1 - j - fraction) * value[j - 1] if j > 0 else 0.0
            value[j] = (left + right) / degree
    result: Vector = value[np.minimum(interval, order + 1), np.arange(size)]
    return result


def hashemi(size: int) -> Vector:
    """Quadratic B-spline on the knots {0, N/4, 3N/4, N}, peak 1 (Hashemi et al. 2018)."""
    rise = 2.0 * _mirrored_centres(size) / size
    return np.where(rise <= 0.5, 2.0 * rise * rise, 1.0 - 2.0 * (1.0 - rise) * (1.0 - rise))


def gaussian(size: int, centre: float, sigma: float) -> Vector:
    """``exp(-x^2 / 2 sigma^2)`` with x measured from ``centre``."""
    x = (np.arange(size) - centre) / sigma
    result: Vector = np.exp(-0.5 * x * x)
    return result


def hann(size: int) -> Vector:
    """Hann window without its zero end points."""
    result: Vector = np.sin(np.pi * (_mirrored_centres(size) + 0.5) / (size + 1)) ** 2
    return result


def normalised_rows(window: Sequence[float] | Vector, starts: Sequence[int], extent: int) -> Vector:
    """Row i is ``w(t) / sum_j w(o_i + t - o_j)`` on [0, extent), 0 outside or where all are 0."""
    weights = np.asarray(window, dtype=np.float64)
    size = len(weights)
    total = np.zeros(extent)
    spans = [(max(0, -start), max(0, -start, min(size, extent - start))) for start in starts]
    for start, (first, last) in zip(starts, spans, strict=True):
        total[start + first : start + last] += weights[first:last]
    rows = np.zeros((len(starts), size))
    for row, start, (first, last) in zip(rows, starts, spans, strict=True):
        covered = total[start + first : start + last]
        np.divide(weights[first:last], covered, out=row[first:last], where=covered != 0)
    return rows


def shifted_starts(extent: int, patch: int, overlap: float) -> list[int]:
    """MONAI's rule: step int(patch (1 - overlap)), the last patch shifted back inside.

    A patch larger than the volume is centred on it.
    """
    if extent <= patch:
        return [-((patch - extent) // 2)]
    step = max(1, int(patch * (1.0 - overlap)))
    count = -(-(extent - patch) // step) + 1
    return [min(i * step, extent - patch) for i in range(count)]


def even_starts(extent: int, patch: int, overlap: float) -> list[int]:
    """nnU-Net's rule: as few patches as a step of patch (1 - overlap) allows, evenly re-spread."""
    if extent <= patch:
        return [-((patch - extent) // 2)]
    count = math.ceil((extent - patch) / (patch * (1.0 - overlap))) + 1
    step = (extent - patch) / (count - 1)
    return [round(step * i) for i in range(count)]


def half_patch_starts(extent: int, patch: int) -> list[int]:
    """The papers' grid: steps of half a patch, from half a patch before the volume to its end."""
    return list(range(-(patch // 2), extent, max(1, patch // 2)))
