"""Distances between the surfaces of two masks, in mm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from voxfuse.metrics._arrays import (
    ROUNDING,
    Floats,
    Mask,
    as_pair,
    as_spacing,
    bounding_box,
    optional,
)
from voxfuse.metrics.definitions import METRICS


@dataclass(frozen=True)
class SurfaceDistances:
    """From each element of one surface the distance to the other surface, in mm, and its weight.

    The weights are 1 (an element is a voxel) or areas in mm2.
    """

    prediction_to_truth: Floats
    truth_to_prediction: Floats
    prediction_areas: Floats | None = None
    truth_areas: Floats | None = None

    def _settled(self, name: str) -> float | None:
        return METRICS[name].value_if_empty(
            self.truth_to_prediction.size == 0, self.prediction_to_truth.size == 0
        )

    def hausdorff(self, percentile: float = 95.0) -> float:
        """The larger of the two directed percentiles; 100 is the Hausdorff distance.

        Without areas the percentile interpolates (MONAI's and WMH 2017's); with areas it is the
        first distance that so much of the surface does not exceed (surface-distance's).
        """
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile: got {percentile}, expected 0 to 100")
        settled = self._settled("hd95")
        if settled is not None:
            return settled
        return max(
            _percentile(self.prediction_to_truth, self.prediction_areas, percentile),
            _percentile(self.truth_to_prediction, self.truth_areas, percentile),
        )

    def average(self) -> float:
        """The mean distance over both surfaces together (ASSD)."""
        settled = self._settled("assd")
        if settled is not None:
            return settled
        distances, areas = self._both()
        return float(distances @ areas / areas.sum())

    def surface_dice(self, tolerance: float = 1.0) -> float:
        """The share of both surfaces that lies within ``tolerance`` mm of the other (NSD).

        A distance that exceeds it by a hundred-thousandth or less is within: voxels of 1 mm read
        from a rotated affine may be of 1.00000003.
        """
        if not tolerance >= 0:
            raise ValueError(f"tolerance: got {tolerance}, expected 0 or more mm")
        settled = self._settled("surface_dice")
        if settled is not None:
            return settled
        distances, areas = self._both()
        return float(areas[distances <= tolerance * (1 + ROUNDING)].sum() / areas.sum())

    def _both(self) -> tuple[Floats, Floats]:
        distances = np.concatenate([self.prediction_to_truth, self.truth_to_prediction])
        if self.prediction_areas is None or self.truth_areas is None:
            return distances, np.ones_like(distances)
        return distances, np.concatenate([self.prediction_areas, self.truth_areas])


def _percentile(distances: Floats, areas: Floats | None, percentile: float) -> float:
    if areas is None:
        return float(np.percentile(distances, percentile))
    order = np.argsort(distances, kind="stable")
    share = np.cumsum(areas[order]) / areas.sum()
    element = min(int(np.searchsorted(share, percentile / 100)), distances.size - 1)
    return float(distances[order][element])


def surface_distances(
    prediction: Any,
    truth: Any,
    spacing: float | Sequence[float] = 1.0,
    *,
    outline: Literal["voxels", "slices", "areas"] = "voxels",
    slice_axis: int = -1,
    ignore: Any = None,
) -> SurfaceDistances:
    """Measure between two surfaces.

    Args:
        prediction, truth: masks (\\*spatial) of one shape.
        spacing: voxel size in mm.
        outline: what the surface is.

            - ``"voxels"``: voxels of the mask with a face towards the outside, as MONAI takes them.
              A single slice, (x, y, 1), is taken for the plane (x, y): above and below it is no
              outside.
            - ``"slices"``: voxels with a neighbour outside among the eight in their slice; the end
              of the image is no outside. WMH 2017's.
            - ``"areas"``: the elements between 2 x 2 x 2 voxels, weighted by their areas; the
              definition of DeepMind's surface-distance, by MONAI's tables. 3D only, and a single
              slice has its areas above and below; needs MONAI.
        slice_axis: the axis across slices, for ``"slices"``; the last one in files read by nibabel.
        ignore: mask of voxels that are taken out of both.

    Raises:
        TypeError, ValueError: no masks, another shape, an unknown outline.
        ModuleNotFoundError: scipy, or for ``"areas"`` MONAI, is not installed.

    >>> distances = surface_distances([[0, 1, 0, 0]], [[0, 0, 0, 1]], spacing=(1, 3))
    >>> distances.hausdorff(), distances.average(), distances.surface_dice(tolerance=5)
    (6.0, 6.0, 0.0)
    """
    prediction, truth = as_pair(prediction, truth, ignore)
    sizes = as_spacing(spacing, truth.ndim)
    if outline not in ("voxels", "slices", "areas"):
        raise ValueError(f"outline: got {outline!r}, expected 'voxels', 'slices' or 'areas'")
    if outline == "slices":
        if not -truth.ndim <= slice_axis < truth.ndim or truth.ndim < 2:
            raise ValueError(f"slice_axis: got {slice_axis}, expected an axis of {truth.ndim}")
        surfaces = [_slice_outline(mask, slice_axis % truth.ndim) for mask in (prediction, truth)]
        return _measured(surfaces[0], surfaces[1], sizes)
    if outline == "voxels":
        plane = [axis for axis, n in enumerate(truth.shape) if n != 1]
        if len(plane) > 1:
            prediction, truth, sizes = prediction.squeeze(), truth.squeeze(), sizes[plane]
    box = bounding_box(prediction, truth)
    prediction, truth = prediction[box], truth[box]
    if outline == "voxels":
        return _measured(_face_outline(prediction), _face_outline(truth), sizes)
    return _by_areas(prediction, truth, sizes)


def _face_outline(mask: Mask) -> Mask:
    padded = np.pad(mask, 1)
    inside = mask.copy()
    centre = tuple(slice(1, -1) for _ in mask.shape)
    for axis in range(mask.ndim):
        for side in (slice(0, -2), slice(2, None)):
            inside &= padded[(*centre[:axis], side, *centre[axis + 1 :])]
    return mask & ~inside


def _slice_outline(mask: Mask, slice_axis: int) -> Mask:
    planes = [axis for axis in range(mask.ndim) if axis != slice_axis]
    inside = mask
    for axis in planes:
        # A square is a line after a line. Beyond the image counts as inside.
        width = [(1, 1) if axis == other else (0, 0) for other in range(mask.ndim)]
        padded = np.moveaxis(np.pad(inside, width, constant_values=True), axis, 0)
        line = padded[:-2] & padded[1:-1] & padded[2:]
        inside = np.moveaxis(line, 0, axis)
    return mask & ~inside


def _measured(
    prediction: Mask,
    truth: Mask,
    sizes: Floats,
    prediction_areas: Floats | None = None,
    truth_areas: Floats | None = None,
) -> SurfaceDistances:
    points = [np.argwhere(surface) * sizes for surface in (prediction, truth)]
    if points[0].size == 0 or points[1].size == 0:
        nowhere = [np.full(len(own), np.inf) for own in points]
        return SurfaceDistances(nowhere[0], nowhere[1], prediction_areas, truth_areas)
    tree = optional("scipy.spatial", "Surface distances").cKDTree
    there: Floats = tree(points[1]).query(points[0])[0]
    back: Floats = tree(points[0]).query(points[1])[0]
    return SurfaceDistances(there, back, prediction_areas, truth_areas)


def _by_areas(prediction: Mask, truth: Mask, sizes: Floats) -> SurfaceDistances:
    if truth.ndim != 3:
        raise ValueError(f"outline: 'areas' is for 3 spatial axes, got {truth.ndim}")
    utils = optional("monai.metrics.utils", "Surfaces with areas")
    table, kernel = utils.get_code_to_measure_table(sizes.tolist(), device=None)
    del kernel
    surfaces, areas = [], []
    for mask in (prediction, truth):
        codes = _corner_codes(mask)
        surface = (codes != 0) & (codes != 255)
        surfaces.append(surface)
        areas.append(np.asarray(table, dtype=np.float64)[codes[surface]])
    return _measured(surfaces[0], surfaces[1], sizes, areas[0], areas[1])


def _corner_codes(mask: Mask) -> Any:
    """At each corner between voxels, which of the 2 x 2 x 2 around it are in the mask."""
    padded = np.pad(mask, 1).astype(np.uint8)
    codes = np.zeros(tuple(n + 1 for n in mask.shape), np.uint8)
    for bit in range(8):
        offset = ((bit >> 2) & 1, (bit >> 1) & 1, bit & 1)
        window = tuple(slice(o, o + n) for o, n in zip(offset, codes.shape, strict=True))
        codes |= padded[window] << (7 - bit)
    return codes
