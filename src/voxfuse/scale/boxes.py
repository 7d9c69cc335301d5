"""How a volume is cut into boxes, and the boxes into shards: what it costs, said beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from voxfuse.fusion._memory import readable_bytes
from voxfuse.fusion.grids import Grid
from voxfuse.fusion.region import Box

#: Patches that a box has along the streaming axis, about, where nothing else is asked for: a cut
#: that patches reach over in one row costs 5 % then.
ROWS = 20

#: Bytes that a box of some extents takes.
Memory = Callable[[Sequence[int]], int]


@dataclass(frozen=True)
class Plan:
    """The boxes of a volume, and what they cost; ``print`` it.

    ``patches`` are those that are predicted in each box, ``whole`` those of the volume, ``memory``
    the bytes of the largest box (sums, weights, finished slices, source, and a batch with what all
    members predict of it; not the network's own), ``written`` the bytes of the result.
    """

    boxes: tuple[Box, ...]
    patches: tuple[int, ...]
    whole: int
    memory: int
    written: int
    shards: int = 1

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def extra(self) -> float:
        """Predictions more than those of the whole volume at once, as a part of these."""
        return sum(self.patches) / max(self.whole, 1) - 1

    def shard(self, index: int, count: int) -> range:
        """The boxes of shard ``index`` of ``count``: neighbours, about as many patches as others.

        Raises:
            ValueError: there is no such shard.
        """
        whole = isinstance(index, (int, np.integer)) and isinstance(count, (int, np.integer))
        if not whole or not 0 <= index < count:
            raise ValueError(f"shard: got ({index}, {count}), expected (i, n) with 0 <= i < n")
        bounds = _balanced([max(work, 1) for work in self.patches], count)
        return range(bounds[index], bounds[index + 1])

    def __str__(self) -> str:
        extents = {box.shape for box in self.boxes}
        largest = max(extents, key=math.prod)
        shares = [
            sum(self.patches[k] for k in self.shard(i, self.shards)) for i in range(self.shards)
        ]
        lines = [
            f"{len(self)} box{'es' * (len(self) > 1)} of at most "
            f"{' x '.join(map(str, largest))} voxels",
            f"{sum(self.patches)} patches, {self.extra:.1%} more than the {self.whole} of the "
            "whole volume",
            f"{readable_bytes(self.memory)} a process beside the network, "
            f"{readable_bytes(self.written)} to write",
        ]
        if self.shards > 1:
            lines.append(f"{self.shards} shards of {min(shares)} to {max(shares)} patches")
        return "\n".join(lines)


def plan_boxes(
    grid: Grid,
    unit: Sequence[int],
    axis: int,
    memory: Memory,
    written: int,
    *,
    extents: Sequence[int] | None = None,
    shards: int = 1,
    most: int = 1 << 30,
    kept: NDArray[np.bool_] | None = None,
    uncut: Sequence[int] = (),
) -> Plan:
    """Cut a volume into boxes of whole units of the destination.

    Args:
        grid: the volume's patches.
        unit: extents of what is written whole.
        axis: the streaming axis.
        memory: bytes that a box of given extents takes.
        written: bytes of the result.
        extents: of a box, rounded up to whole units. None: slabs along the streaming axis, of
            about 20 patches; where they take more than ``most`` bytes, the other axes are cut as
            well. Cuts are then moved to where few patches reach over them, and so that boxes have
            about as many patches.
        shards: how many processes there will be, at least.
        most: bytes for a box, where ``extents`` are not given.
        kept: (patches,) in the grid's order, which of them are predicted; None: all.
        uncut: axes of which cuts save no memory.

    Raises:
        ValueError: ``extents`` do not fit, or no sensible box takes as little as ``most``.
    """
    volume, axes = grid.volume_shape, range(len(grid.volume_shape))
    present = np.ones([len(s) for s in grid.starts], bool)
    if kept is not None:
        present = kept.reshape(present.shape)
    if extents is not None:
        whole = isinstance(extents, Sequence) and all(
            isinstance(extent, (int, np.integer)) for extent in extents
        )
        if not whole or len(extents) != len(volume) or min(extents) < 1:
            raise ValueError(f"box: got {extents!r}, expected {len(volume)} integers >= 1")
        sizes = [-(-size // u) * u for size, u in zip(extents, unit, strict=True)]
        cuts = [
            [*range(0, extent, size), extent] for extent, size in zip(volume, sizes, strict=True)
        ]
    else:
        cuts = _fitting(grid, unit, axis, memory, shards, most, present, uncut)
    boxes, counts = [], []
    for bounds in product(*(list(pairwise(cut)) for cut in cuts)):
        box = Box(tuple(low for low, _ in bounds), tuple(high for _, high in bounds))
        reached = [box.reached(grid.starts[a], grid.patch_shape[a], a) for a in axes]
        boxes.append(box)
        counts.append(int(present[np.ix_(*reached)].sum()))
    largest = max(memory(shape) for shape in {box.shape for box in boxes})
    return Plan(tuple(boxes), tuple(counts), int(present.sum()), largest, written, shards)


def _fitting(
    grid: Grid,
    unit: Sequence[int],
    axis: int,
    memory: Memory,
    shards: int,
    most: int,
    present: NDArray[np.bool_],
    uncut: Sequence[int],
) -> list[list[int]]:
    """Where each axis is cut, so that boxes take no more than ``most`` bytes."""
    volume, axes = grid.volume_shape, range(len(grid.volume_shape))
    units = [-(-extent // u) for extent, u in zip(volume, unit, strict=True)]
    rows = [present.sum(tuple(b for b in axes if b != a)).astype(float) for a in axes]
    parts = [1] * len(volume)
    while True:
        across = math.prod(parts[a] for a in axes if a != axis)
        wanted = max(round(len(grid.starts[axis]) / ROWS), -(-shards // across), 1)
        parts[axis] = min(wanted, units[axis])
        several = across * parts[axis] > shards
        cuts = [_cuts(grid, a, parts[a], unit[a], rows[a], several) for a in axes]
        sizes = [max(high - low for low, high in pairwise(cut)) for cut in cuts]
        taken = memory(sizes)
        if taken <= most:
            return cuts
        # Smaller boxes than of two patches predict everything several times.
        others = [
            a
            for a in axes
            if a not in (axis, *uncut)
            and parts[a] < units[a]
            and sizes[a] >= 2 * grid.patch_shape[a]
        ]
        if not others:
            raise ValueError(
                f"memory: got {most}, but a box of {tuple(sizes)} voxels takes {taken} bytes; "
                "allow that much, or give box="
            )
        parts[max(others, key=lambda a: sizes[a] / grid.patch_shape[a])] += 1


def _cuts(
    grid: Grid, axis: int, parts: int, unit: int, rows: NDArray[np.float64], several: bool
) -> list[int]:
    """Where an axis is cut: by the patches on both sides, and by those that reach over a cut."""
    extent, size = grid.volume_shape[axis], grid.patch_shape[axis]
    if parts == 1:
        return [0, extent]
    starts, rows = np.array(grid.starts[axis]), rows + 1e-9
    step = max(float(np.diff(starts).max(initial=1)), 1.0)
    # Work up to a coordinate, a row's being spread evenly over a step about its middle.
    edges = np.concatenate([[0.0], np.clip(starts[:-1] + size / 2 + step / 2, 0, extent), [extent]])
    done = np.concatenate([[0.0], np.cumsum(rows)])
    candidates = np.arange(unit, extent, unit)
    work = np.interp(candidates, edges, done)
    over = (starts < candidates[:, None]) & (starts + size > candidates[:, None])
    crossing = (over * rows).sum(1)
    # Where there are several boxes a shard, shards are balanced by their number.
    share, weight = done[-1] / parts, 0.25 if several else 1.0
    cuts = [0]
    for k in range(1, parts):
        cost = crossing + weight * np.abs(work - k * share)
        allowed = (candidates > cuts[-1]) & (np.abs(work - k * share) <= share / 2)
        if allowed.any():
            cuts.append(int(candidates[allowed][cost[allowed].argmin()]))
    return [*cuts, extent]


def _balanced(work: Sequence[int], count: int) -> list[int]:
    """Bounds of ``count`` runs of neighbours of which the greatest sum is as small as can be."""
    low, high = max(work), sum(work)
    while low < high:
        middle = (low + high) // 2
        if len(_runs(work, middle)) - 1 <= count:
            high = middle
        else:
            low = middle + 1
    bounds = _runs(work, low)
    return bounds + [len(work)] * (count + 1 - len(bounds))


def _runs(work: Sequence[int], most: int) -> list[int]:
    bounds, total = [0], 0
    for k, each in enumerate(work):
        if total + each > most:
            bounds.append(k)
            total = 0
        total += each
    return [*bounds, len(work)]
