"""The volume of a sliding window with what lies around it, and the patches cut from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxfuse.fusion._memory import joined
from voxfuse.fusion.arrays import Sliceable, Sliced, readable
from voxfuse.fusion.grids import RULES, Grid, grid_starts
from voxfuse.fusion.region import Box, Region, checked_region
from voxfuse.fusion.schedule import chosen_axis
from voxfuse.ops import _checks

PADDING_MODES = ("constant", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Placement:
    """Where an output's patches lie: those of ``grid`` at int64 ``origins`` (N, n)."""

    grid: Grid
    origins: Tensor
    stream_axis: int
    #: Voxels of padding at both ends of each axis.
    before: list[int]
    after: list[int]
    #: Whether patches of the grid were skipped.
    skipped: bool = False
    #: The part of the volume that is fused; None is all of it.
    box: Box | None = None

    @property
    def extent(self) -> tuple[int, ...]:
        """Extent of the whole volume."""
        return self.grid.volume_shape

    @property
    def patch(self) -> tuple[int, ...]:
        """Extent of a patch."""
        return self.grid.patch_shape

    def scaled(self, patch: tuple[int, ...]) -> Placement:
        """The same for patches of another resolution.

        As MONAI: coordinates count from where the padding begins and are rounded down; then the
        padding is cut off.
        """
        if patch == self.patch:
            return self
        if self.box is not None:
            raise ValueError(
                f"region: got one, but the predictor makes patches of {patch} voxels of those of "
                f"{self.patch}; expected the same resolution"
            )
        before, after = self.before, self.after
        scale = [new / old for new, old in zip(patch, self.patch, strict=True)]
        low = [round(b * s) for b, s in zip(before, scale, strict=True)]
        extent = tuple(
            round((b + e) * s) - first if b or a else int(e * s)
            for b, e, a, s, first in zip(before, self.extent, after, scale, low, strict=True)
        )
        moved = (self.origins.numpy() + np.array(before)) * np.array(scale)
        origins = torch.from_numpy(moved.astype(np.int64)) - torch.tensor(low)
        starts = tuple(
            tuple(int((start + b) * s) - first for start in axis)
            for axis, b, s, first in zip(self.grid.starts, before, scale, low, strict=True)
        )
        return replace(self, grid=Grid(extent, patch, starts), origins=origins)


class Batch(NamedTuple):
    """Patches (b, channels, \\*roi), the same of the condition, and their slices."""

    patches: Tensor
    condition: Tensor | None
    slices: list[list[slice]]


class PaddedVolume:
    """What patches are cut from; see :func:`voxfuse.sliding_window_inference` for the arguments.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: shapes or options do not fit.
    """

    def __init__(
        self,
        inputs: Tensor | Sliceable,
        roi_size: int | Sequence[int | None],
        overlap: float | Sequence[float],
        grid: str,
        padding_mode: str | None,
        cval: float,
        condition: Tensor | Sliceable | None,
    ) -> None:
        self.meta = inputs if hasattr(inputs, "copy_meta_from") else None
        self.source = volume = readable("inputs", inputs)
        if not 3 <= volume.ndim <= 6 or 0 in volume.shape:
            raise ValueError(
                f"inputs: got shape {tuple(volume.shape)}, expected (B, channels, *spatial) with "
                "1 to 4 spatial axes, none of them empty"
            )
        self.samples, self.spatial = volume.shape[0], tuple(volume.shape[2:])
        self.roi = _roi(roi_size, self.spatial)
        if grid not in RULES:
            listed = ", ".join(repr(name) for name in RULES)
            raise ValueError(f"grid: got {grid!r}, expected one of {listed}")
        # MONAI's enumerations of modes are strings too.
        padding = str(getattr(padding_mode, "value", padding_mode) or "")
        padding = padding or ("reflect" if grid == "half_patch" else "constant")
        if padding not in PADDING_MODES:
            listed = ", ".join(repr(name) for name in PADDING_MODES)
            raise ValueError(f"padding_mode: got {padding!r}, expected one of {listed}")
        self._padding, self._cval = padding, cval
        if condition is not None:
            condition = readable("condition", condition)
            if (condition.shape[0], *condition.shape[2:]) != (self.samples, *self.spatial):
                raise ValueError(
                    f"condition: got shape {tuple(condition.shape)}, expected that of inputs, "
                    f"{tuple(volume.shape)}"
                )
        self.condition = condition
        starts = grid_starts(self.spatial, self.roi, overlap, grid)
        #: The patches of the whole volume.
        self.grid = Grid(self.spatial, self.roi, starts).distinct()
        #: Voxels of padding at both ends of each axis.
        self._before = [max(-min(axis), 0) for axis in starts]
        self._after = [
            max(max(axis) + size - extent, 0)
            for axis, size, extent in zip(starts, self.roi, self.spatial, strict=True)
        ]
        if padding == "constant" and any((*self._before, *self._after)):
            _checks.require_held("cval", cval, volume.dtype)

    def placement(
        self,
        stream_axis: str | int,
        skip: Callable[[Tensor], bool] | None = None,
        skip_origin: Callable[[tuple[int, ...]], bool] | None = None,
        region: Region | None = None,
    ) -> Placement:
        """Where the patches are that reach into the region and are not skipped, in order."""
        box = checked_region(region, self.spatial)
        table = box.patches_of(self.grid)[1].numpy()
        if skip_origin is not None:
            table = table[[not skip_origin(tuple(origin)) for origin in table.tolist()]]
            self._check_any("skip_origin", table, region)
        if skip is not None:
            if self.samples != 1:
                raise ValueError(f"skip: got a function and {self.samples} samples, expected one")
            skipped = [skip(self._patch(self.source, 0, origin)) for origin in table.tolist()]
            table = table[np.logical_not(np.array(skipped, bool))]
            self._check_any("skip", table, region)
        axis = chosen_axis(stream_axis, self.spatial, self.roi)
        origins = torch.from_numpy(table[np.argsort(table[:, axis], kind="stable")])
        return Placement(
            self.grid,
            origins,
            axis,
            self._before,
            self._after,
            skip is not None or skip_origin is not None,
            None if region is None else box,
        )

    def _check_any(self, name: str, table: NDArray[np.int64], region: Region | None) -> None:
        """Raise ValueError if every patch of the whole volume is skipped."""
        if len(table) == 0 and region is None:
            raise ValueError(f"{name}: is true for every patch, so that nothing was predicted")

    def cut(self, places: list[tuple[int, list[int]]], device: torch.device) -> Batch:
        """Cut patches at (sample, origin)."""
        sources = [self.source] if self.condition is None else [self.source, self.condition]
        cuts = [
            joined([self._patch(source, *place) for place in places]).to(device)
            for source in sources
        ]
        slices = [self._slices(*place) for place in places]
        return Batch(cuts[0], cuts[1] if len(cuts) > 1 else None, slices)

    def _slices(self, sample: int, origin: Sequence[int]) -> list[slice]:
        """Where a patch lies in the padded volume, as MONAI tells its predictors."""
        place = [slice(sample, sample + 1), slice(None)]
        for start, low, size in zip(origin, self._before, self.roi, strict=True):
            place.append(slice(start + low, start + low + size))
        return place

    def _patch(self, source: Tensor | Sliced, sample: int, origin: Sequence[int]) -> Tensor:
        """Cut one patch (1, channels, *roi), filling what lies outside the volume."""
        axes = list(zip(origin, self.roi, self.spatial, strict=True))
        inside = [slice(max(low, 0), min(low + size, extent)) for low, size, extent in axes]
        if all(s.stop - s.start == size for s, size in zip(inside, self.roi, strict=True)):
            return source[(slice(sample, sample + 1), slice(None), *inside)]
        if self._padding == "constant":
            margins: list[int] = []
            for s, (low, size, _) in reversed(list(zip(inside, axes, strict=True))):
                margins += [s.start - low, low + size - s.stop]
            block = source[(slice(sample, sample + 1), slice(None), *inside)]
            return torch.nn.functional.pad(block, margins, value=self._cval)
        coordinates = [
            _inside(torch.arange(low, low + size), extent, self._padding)
            for low, size, extent in axes
        ]
        return _gathered(source, [slice(sample, sample + 1), slice(None)], coordinates)


def _gathered(source: Tensor | Sliced, key: list[slice], coordinates: list[Tensor]) -> Tensor:
    """The voxels at the product of the axes' coordinates, of no more than the box around them.

    Coordinates that jump, as a circular volume's do from its end to its beginning, are read apart.
    """
    axis = len(key) - 2
    if axis == len(coordinates):
        block = source[tuple(key)]
        for a, at in enumerate(coordinates):
            block = block.index_select(2 + a, (at - key[2 + a].start).to(block.device))
        return block
    at = coordinates[axis]
    jumps = ((at[1:] - at[:-1]).abs() > 1).nonzero()[:, 0] + 1
    parts = []
    for part in torch.tensor_split(at, jumps):
        others = [*coordinates[:axis], part, *coordinates[axis + 1 :]]
        near = slice(int(part.min()), int(part.max()) + 1)
        parts.append(_gathered(source, [*key, near], others))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2 + axis)


def _inside(coordinates: Tensor, extent: int, padding: str) -> Tensor:
    """Coordinates whose values stand for those outside [0, extent), however far outside."""
    if padding == "circular":
        return coordinates % extent
    if padding == "replicate" or extent == 1:
        return coordinates.clamp(0, extent - 1)
    period = 2 * (extent - 1)
    folded = coordinates % period
    return torch.minimum(folded, period - folded)


def _roi(roi_size: int | Sequence[int | None], spatial: tuple[int, ...]) -> tuple[int, ...]:
    sizes = tuple(roi_size) if isinstance(roi_size, Sequence) else (roi_size,) * len(spatial)
    if len(sizes) != len(spatial):
        raise ValueError(
            f"roi_size: got {tuple(sizes)}, expected one number or {len(spatial)}, to go with a "
            f"volume of {spatial}"
        )
    chosen = [0 if size is None else size for size in sizes]
    if any(isinstance(size, bool) or not isinstance(size, (int, np.integer)) for size in chosen):
        raise TypeError(f"roi_size: got {roi_size!r}, expected integers")
    return tuple(
        int(size) if size > 0 else extent for size, extent in zip(chosen, spatial, strict=True)
    )
