"""Parts of a volume: boxes of voxels, and which patches of a grid reach into one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voxfuse.fusion.grids import Grid

#: A part of a volume, one slice an axis.
Region = Sequence[slice]


@dataclass(frozen=True)
class Box:
    """The voxels ``low <= x < high``."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return tuple(high - low for low, high in zip(self.low, self.high, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The same as an index of the volume."""
        return tuple(slice(low, high) for low, high in zip(self.low, self.high, strict=True))

    def __len__(self) -> int:
        return math.prod(self.shape)

    def reached(self, starts: Sequence[int], size: int, axis: int) -> list[int]:
        """Which of the patches that start along an axis at ``starts`` have a voxel in the box."""
        low, high = self.low[axis], self.high[axis]
        return [k for k, start in enumerate(starts) if start < high and start + size > low]

    def patches_of(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """The grid's patches that reach into the box: their numbers (N,) and origins (N, n).

        Made of the axes' starts, so that it costs what the box has and not what the volume has.
        """
        axes = enumerate(zip(grid.starts, grid.patch_shape, strict=True))
        kept = [self.reached(starts, size, axis) for axis, (starts, size) in axes]
        part = Grid(
            grid.volume_shape,
            grid.patch_shape,
            tuple(
                tuple(starts[k] for k in indices)
                for starts, indices in zip(grid.starts, kept, strict=True)
            ),
        )
        mesh = np.meshgrid(*(np.array(indices, np.int64) for indices in kept), indexing="ij")
        counts = [len(starts) for starts in grid.starts]
        numbers = np.ravel_multi_index(tuple(mesh), counts).reshape(-1)
        return torch.from_numpy(numbers.astype(np.int64)), part.origins

    def reaching(self, origins: Tensor, patch: Sequence[int]) -> Tensor:
        """Numbers (N,) of the patches at ``origins`` that reach into the box."""
        before = origins < torch.tensor(self.high)
        behind = origins + torch.tensor(tuple(patch)) > torch.tensor(self.low)
        return (before & behind).all(1).nonzero()[:, 0]


def checked_region(region: Any, volume: Sequence[int]) -> Box:
    """The box of ``region=``; None is the whole volume.

    Raises:
        TypeError: it is no tuple of slices.
        ValueError: it has other axes than the volume, lies outside of it, is empty or has steps.
    """
    if region is None:
        return Box((0,) * len(volume), tuple(volume))
    if not isinstance(region, Sequence) or not all(isinstance(axis, slice) for axis in region):
        raise TypeError(f"region: got {region!r}, expected a tuple of slices, one an axis")
    if len(region) != len(volume):
        raise ValueError(f"region: got {len(region)} slices, expected {len(volume)}")
    low, high = [], []
    for axis, extent in zip(region, volume, strict=True):
        start = 0 if axis.start is None else axis.start
        stop = extent if axis.stop is None else axis.stop
        if any(isinstance(end, float) for end in (start, stop)):
            raise TypeError(f"region: got {axis}, expected integers")
        if axis.step not in (None, 1) or not 0 <= start < stop <= extent:
            raise ValueError(
                f"region: got {tuple(region)}, expected slices 0 <= start < stop <= extent of the "
                f"volume {tuple(volume)}, without steps"
            )
        low.append(int(start))
        high.append(int(stop))
    return Box(tuple(low), tuple(high))
