"""Where patches lie: regular grids over a volume, and the tables that the kernels read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxfuse.fusion._host import host
from voxfuse.fusion._memory import zeros
from voxfuse.fusion.windows import Vector, WindowLike, raised_window, resolve_window
from voxfuse.ops import _checks
from voxfuse.ops.overlap_add import overlap_weights_

RULES = ("shifted", "even", "half_patch")


@dataclass(frozen=True)
class Grid:
    """Patches at every combination of the axes' starts, the last axis running fastest.

    A start may be negative and a patch may stick out of the volume.
    """

    volume_shape: tuple[int, ...]
    patch_shape: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        axes = len(self.volume_shape)
        if not axes == len(self.patch_shape) == len(self.starts):
            raise ValueError(
                f"patch_shape, starts: are of {len(self.patch_shape)} and {len(self.starts)} axes, "
                f"expected {axes}, as volume_shape {self.volume_shape}"
            )

    def __len__(self) -> int:
        return math.prod(len(axis) for axis in self.starts)

    @property
    def origins(self) -> Tensor:
        """(N, n) int64 first voxels of the patches."""
        return _product([torch.tensor(axis, dtype=torch.int64) for axis in self.starts])

    @property
    def rows(self) -> Tensor:
        """(N, n) int64 index of each patch's start on each axis."""
        return _product([torch.arange(len(axis)) for axis in self.starts])

    @property
    def reaches(self) -> bool:
        """Whether every patch has a voxel in the volume."""
        axes = zip(self.starts, self.patch_shape, self.volume_shape, strict=True)
        return all(-size < start < extent for starts, size, extent in axes for start in starts)

    def distinct(self) -> Grid:
        """The same without starts that occur again, as those of steps below one voxel do."""
        return replace(self, starts=tuple(tuple(dict.fromkeys(axis)) for axis in self.starts))

    def rising(self) -> Grid:
        """The same patches with each axis' starts in rising order, each once."""
        return replace(self, starts=tuple(tuple(sorted(set(axis))) for axis in self.starts))

    def tables(self, window: WindowLike) -> Tables:
        """What the kernels need to fuse this grid's patches under ``window``."""
        vectors = resolve_window(window, self.patch_shape)
        if len(vectors) == len(self.patch_shape):
            return Tables(self.origins, self.rows, _partition(vectors, self), None)
        return tables_for_origins(self.origins, vectors[0], self.volume_shape, self.patch_shape)


@dataclass(frozen=True)
class Tables:
    """Arguments of the operators: CPU tensors as :func:`voxfuse.ops.overlap_add.overlap_add` takes.

    ``total`` is None when the weights are a partition of unity already.
    """

    origins: Tensor
    rows: Tensor
    weights: list[Tensor]
    total: Tensor | None


def plan_grid(
    volume_shape: Sequence[int],
    patch_shape: Sequence[int],
    overlap: float | Sequence[float] = 0.5,
    rule: str = "shifted",
) -> Grid:
    """Lay a regular grid of patches over a volume.

    Args:
        volume_shape: extent of the volume, 1 to 3 axes.
        patch_shape: extent of a patch; where it exceeds the volume the one patch is centred.
        overlap: part of a patch that it shares with the next, in [0, 1); one value an axis or one
            for all.
        rule: "shifted" (MONAI: steps of int(patch (1 - overlap)), the last patch shifted back
            inside), "even" (nnU-Net: the same number of patches evenly re-spread) or "half_patch"
            (Hashemi et al. 2018: steps of half a patch from half a patch before the volume to its
            end, so that every voxel lies in two patches an axis; ``overlap`` must be 0.5).

    Raises:
        ValueError: sizes, overlap or rule do not fit.

    Example:
        >>> from voxfuse.fusion.grids import plan_grid
        >>> plan_grid((10,), (4,), 0.25).starts, plan_grid((10,), (4,), 0.25, "even").starts
        (((0, 3, 6),), ((0, 3, 6),))
    """
    volume = _checks.integers("volume_shape", volume_shape)
    patch = _checks.integers("patch_shape", patch_shape)
    if not 1 <= len(volume) <= 3 or min(volume) < 1:
        raise ValueError(f"volume_shape: got {volume}, expected 1 to 3 sizes >= 1")
    if len(patch) != len(volume) or min(patch) < 1:
        raise ValueError(f"patch_shape: got {patch}, expected {len(volume)} sizes >= 1")
    return Grid(volume, patch, grid_starts(volume, patch, overlap, rule))


def grid_starts(
    volume: Sequence[int], patch: Sequence[int], overlap: float | Sequence[float], rule: str
) -> tuple[tuple[int, ...], ...]:
    """The starts along each of any number of axes; see :func:`plan_grid`."""
    shares = axis_overlaps(overlap, len(volume))
    if rule == "shifted":
        starts = [host.shifted_starts(*axis) for axis in zip(volume, patch, shares, strict=True)]
    elif rule == "even":
        starts = [host.even_starts(*axis) for axis in zip(volume, patch, shares, strict=True)]
    elif rule == "half_patch":
        if any(share != 0.5 for share in shares):
            raise ValueError(f"overlap: got {overlap}, expected 0.5 with rule 'half_patch'")
        starts = [host.half_patch_starts(*axis) for axis in zip(volume, patch, strict=True)]
    else:
        listed = ", ".join(repr(name) for name in RULES)
        raise ValueError(f"rule: got {rule!r}, expected one of {listed}")
    return tuple(tuple(axis) for axis in starts)


def axis_overlaps(overlap: float | Sequence[float], axes: int) -> tuple[float, ...]:
    """Return one overlap an axis, checked to lie in [0, 1)."""
    shares = tuple(overlap) if isinstance(overlap, Sequence) else (overlap,) * axes
    if len(shares) != axes or not all(0 <= share < 1 for share in shares):
        raise ValueError(f"overlap: got {overlap}, expected numbers in [0, 1), one or {axes}")
    return tuple(float(share) for share in shares)


#: Where patches are: (N, n) first voxels, a grid, or the starts along each axis, of which every
#: combination is a patch.
Origins = Tensor | NDArray[Any] | Grid | Sequence[Sequence[int]]


def checked_origins(
    origins: Origins,
    volume_shape: tuple[int, ...],
    patch_shape: tuple[int, ...],
    count: int | str = "N",
) -> Grid | Tensor:
    """Return a grid, or a table (``count``, n) of int64 on the CPU.

    Raises:
        TypeError: ``origins`` is none of the three, or has other numbers than integers.
        ValueError: its shape does not fit, the grid is another one's, or a patch has no voxel in
            the volume.
    """
    places = _as_places(origins, volume_shape, patch_shape, count)
    # No rule makes such a patch, whatever the sizes: it comes of wrong axes, spacing or padding.
    if isinstance(places, Grid) and places.reaches:
        return places
    table = places.origins if isinstance(places, Grid) else places
    outside = ~_reaches(table, volume_shape, patch_shape)
    if bool(outside.any()):
        first = int(outside.nonzero()[0])
        swapped = bool(_reaches(table.flip(1), volume_shape, patch_shape).all())
        raise ValueError(
            f"origins: the patch at {tuple(table[first].tolist())}, of {patch_shape} voxels, has "
            f"none in the volume {volume_shape} ({int(outside.sum())} of {len(table)} patches)"
            + ("; with the axes in reverse order all have some" if swapped else "")
        )
    return places


def _reaches(table: Tensor, volume_shape: Sequence[int], patch_shape: Sequence[int]) -> Tensor:
    """Whether each of the patches at ``table`` (N, n) has a voxel in the volume."""
    inside = (table < torch.tensor(volume_shape)) & (table > -torch.tensor(patch_shape))
    return inside.all(1)


def _as_places(
    origins: Origins,
    volume_shape: tuple[int, ...],
    patch_shape: tuple[int, ...],
    count: int | str,
) -> Grid | Tensor:
    axes = len(patch_shape)
    if isinstance(origins, Grid):
        if (origins.volume_shape, origins.patch_shape) != (volume_shape, patch_shape):
            raise ValueError(
                f"origins: got a grid of {origins.patch_shape} patches over a volume "
                f"{origins.volume_shape}, expected {patch_shape} over {volume_shape}"
            )
        return origins
    if isinstance(origins, (Tensor, np.ndarray)):
        table = torch.as_tensor(origins).detach()
        if table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
            raise TypeError(f"origins: got {_checks.describe(table)}, expected integers")
        if table.ndim != 2 or table.shape[1] != axes:
            raise ValueError(f"origins: got shape {tuple(table.shape)}, expected ({count}, {axes})")
        return table.to("cpu", torch.int64).contiguous()
    expected = f"a list of {axes} lists of integers, or an (N, {axes}) tensor of origins"
    if not isinstance(origins, Sequence) or isinstance(origins, str):
        raise TypeError(f"origins: got {type(origins).__name__}, expected {expected}")
    if _looks_like_origins(origins, axes):
        raise ValueError(
            f"origins: got a list of {len(origins)} lists of {axes} integers; a list of lists is "
            "the starts along each axis, so pass the origins of patches as a tensor, "
            "torch.tensor(origins)"
        )
    if len(origins) != axes:
        raise ValueError(f"origins: got starts along {len(origins)} axes, expected {expected}")
    starts = tuple(_checks.integers("origins", axis) for axis in origins)
    return Grid(volume_shape, patch_shape, starts)


def _looks_like_origins(origins: Sequence[Any], axes: int) -> bool:
    """Whether lists are places and not the starts along each axis, which rise."""
    if not origins or not all(isinstance(x, Sequence) and len(x) == axes for x in origins):
        return False
    rising = all(a < b for axis in origins for a, b in itertools.pairwise(axis))
    return len(origins) != axes or not rising


def tables_for_origins(
    origins: Tensor, window: WindowLike, volume_shape: Sequence[int], patch_shape: Sequence[int]
) -> Tables:
    """What the kernels need to fuse patches at ``origins`` (N, n) on the CPU, in that order.

    Origins that are a Cartesian product, in whatever order, take a grid's way and need no volume
    of weight sums.
    """
    table = weights_for_origins(origins, window, volume_shape, patch_shape)
    if table.floor:
        # Fusing all patches at once takes the window as it is.
        table = weights_for_origins(origins, window, volume_shape, patch_shape, normalise=False)
    if table.normalised:
        return Tables(origins, table.rows, table.weights, None)
    total = zeros(tuple(volume_shape), torch.float64, "cpu")
    overlap_weights_(total, origins, table.rows, table.weights)
    return Tables(origins, table.rows, table.weights, total)


@dataclass(frozen=True)
class PatchWeights:
    """Weights of patches at given origins, and whether they are a partition of unity already.

    ``covering``: patches lie over every voxel (known only for normalised weights). With ``floor``
    they become one when the patches are added; see :func:`voxfuse.ops.overlap_add.overlap_add_`.
    """

    rows: Tensor
    weights: list[Tensor]
    normalised: bool
    covering: bool = False
    floor: float = 0.0
    cover: list[Tensor] = field(default_factory=list)

    def ordered(self, order: Tensor) -> PatchWeights:
        """The same of the patches in another order."""
        return replace(self, rows=self.rows[order])

    def within(self, low: Sequence[int], high: Sequence[int], axis: int) -> PatchWeights:
        """The same where coordinates, but for those of ``axis``, count from ``low`` to ``high``."""
        cover = [
            table if a == axis else table[:, low[a] : high[a]].contiguous()
            for a, table in enumerate(self.cover)
        ]
        return replace(self, cover=cover)


def weights_for_origins(
    origins: Tensor,
    window: WindowLike,
    volume_shape: Sequence[int],
    patch_shape: Sequence[int],
    *,
    normalise: bool = True,
) -> PatchWeights:
    """Weights of patches at ``origins`` (N, n) on the CPU, in that order.

    They are normalised where the origins are a Cartesian product and the window is one of axes,
    with or without a floor, unless ``normalise`` is False.
    """
    grid = factorised(origins, volume_shape, patch_shape) if normalise else None
    return weights_of(origins, window, patch_shape, grid)


def weights_of(
    origins: Tensor, window: WindowLike, patch_shape: Sequence[int], grid: Grid | None
) -> PatchWeights:
    """Weights of the patches at ``origins`` (N, n) on the CPU: some of ``grid``'s, or of none.

    With a grid, and a window of axes, they are normalised over all of its patches, whichever of
    them are asked for.
    """
    raised = raised_window(window, patch_shape) if grid is not None else None
    if grid is not None and raised is not None:
        axes = list(zip(raised.vectors, grid.starts, grid.volume_shape, strict=True))
        return PatchWeights(
            torch.zeros_like(origins),
            [torch.from_numpy(vector).unsqueeze(0) for vector in raised.vectors],
            True,
            _covers(grid),
            raised.floor,
            [_cover(*axis) for axis in axes],
        )
    vectors = resolve_window(window, patch_shape)
    if grid is not None and len(vectors) == len(patch_shape):
        rows = [
            torch.searchsorted(torch.tensor(starts), origins[:, axis].contiguous())
            for axis, starts in enumerate(grid.starts)
        ]
        return PatchWeights(torch.stack(rows, 1), _partition(vectors, grid), True, _covers(grid))
    weights = [torch.from_numpy(vector).unsqueeze(0) for vector in vectors]
    return PatchWeights(torch.zeros_like(origins), weights, False)


def _covers(grid: Grid) -> bool:
    for starts, size, extent in zip(grid.starts, grid.patch_shape, grid.volume_shape, strict=True):
        reached = 0
        for start in sorted(starts):
            if start > reached:
                return False
            reached = max(reached, start + size)
        if reached < extent:
            return False
    return True


def _cover(vector: Vector, starts: Sequence[int], extent: int) -> Tensor:
    """What the patches over each coordinate of an axis weigh there: row k has the k-th of them."""
    starts = [start for start in starts if start < extent and start + len(vector) > 0]
    count = np.zeros(extent, np.int64)
    table = np.full((max(len(starts), 1), extent), -1.0)
    for start in starts:
        x = np.arange(max(start, 0), min(start + len(vector), extent))
        table[count[x], x] = vector[x - start]
        count[x] += 1
    return torch.from_numpy(np.ascontiguousarray(table[: max(int(count.max(initial=0)), 1)]))


def _partition(vectors: list[Vector], grid: Grid) -> list[Tensor]:
    return [
        torch.from_numpy(host.normalised_rows(vector, starts, extent))
        for vector, starts, extent in zip(vectors, grid.starts, grid.volume_shape, strict=True)
    ]


def factorised(
    origins: Tensor, volume_shape: Sequence[int], patch_shape: Sequence[int]
) -> Grid | None:
    """The grid, with rising starts, whose patches the origins are, each exactly once."""
    array: NDArray[np.int64] = origins.numpy()
    starts, rows = [], []
    for axis in range(array.shape[1]):
        values, inverse = np.unique(array[:, axis], return_inverse=True)
        starts.append(tuple(values.tolist()))
        rows.append(inverse.reshape(-1))
    counts = [len(axis) for axis in starts]
    if math.prod(counts) != len(array) or len(array) == 0:
        return None
    if len(np.unique(np.ravel_multi_index(tuple(rows), counts))) != len(array):
        return None
    return Grid(tuple(volume_shape), tuple(patch_shape), tuple(starts))


def _product(axes: list[Tensor]) -> Tensor:
    return torch.stack([axis.reshape(-1) for axis in torch.meshgrid(*axes, indexing="ij")], 1)
