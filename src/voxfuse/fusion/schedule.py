"""In which order patches are expected, and which slices are final when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from voxfuse.fusion.region import Box


class Schedule:
    """Patches in streaming order: along ``axis``, those with the same start there being a row.

    Slices before the first row that lacks predictions are final, as no patch to come reaches them.

    Args:
        origins: (N, n) int64 first voxels, in any order.
        volume: extent of the volume.
        patch: extent of a patch.
        axis: the axis to stream along.
        members: predictions that every patch gets.
        box: the part of the volume that is fused; None is all of it.

    Raises:
        ValueError: an origin occurs twice.
    """

    def __init__(
        self,
        origins: Tensor,
        volume: Sequence[int],
        patch: Sequence[int],
        axis: int,
        members: int,
        box: Box | None = None,
    ) -> None:
        first, self.extent = (0, volume[axis]) if box is None else (box.low[axis], box.high[axis])
        self.axis, self._members = axis, members
        self.reach = patch[axis]
        #: (N,) indices of the given origins, in the order in which they are expected.
        self.order = torch.argsort(origins[:, axis], stable=True)
        #: (N, n) int64 first voxels of the patches, in the order in which they are expected.
        self.origins = origins[self.order].contiguous()
        #: The same counted from where the part begins, but for the streaming axis.
        self.places = self.origins
        if box is not None:
            shift = [0 if a == axis else low for a, low in enumerate(box.low)]
            self.places = self.origins - torch.tensor(shift)
        table = list(map(tuple, self.origins.tolist()))
        self._index = {origin: i for i, origin in enumerate(table)}
        if len(self._index) != len(table):
            twice = Counter(table).most_common(1)[0][0]
            raise ValueError(
                f"origins: {twice} occurs more than once; where a patch gets several predictions "
                "(flips, models of an ensemble), give its origin once and members= their number"
            )
        starts, rows, counts = torch.unique(
            self.places[:, axis], return_inverse=True, return_counts=True
        )
        self._row_of: list[int] = rows.tolist()
        self._starts: list[int] = starts.clamp(first, self.extent).tolist()
        self._stops: list[int] = (starts + self.reach).clamp(first, self.extent).tolist()
        #: Predictions that each row lacks, and those that each patch has.
        self._left = [count * members for count in counts.tolist()]
        self._added = [0] * len(table)
        self._cursor = 0
        #: The first slice that is not final, and the first that was not handed out as final.
        self.base = self._first_open(self._left)
        self.front = first

    def lacking(self) -> list[int]:
        """Patches that have not had all their predictions."""
        return [i for i, count in enumerate(self._added) if count < self._members]

    def indices(self, origins: Any, count: int, times: int) -> list[int]:
        """The patches at ``origins``, or the next ``count``, of which ``times`` predictions come.

        Raises:
            ValueError: there are none such, or they have had their predictions.
        """
        if origins is None:
            return self._next(count, times)
        table = torch.as_tensor(origins)
        if table.ndim != 2 or tuple(table.shape) != (count, self.origins.shape[1]):
            raise ValueError(
                f"origins: got shape {tuple(table.shape)}, expected "
                f"({count}, {self.origins.shape[1]})"
            )
        indices = []
        for origin in map(tuple, table.tolist()):
            if origin not in self._index:
                raise ValueError(
                    f"origins: {origin} is none of the {len(self._added)} planned patches"
                )
            indices.append(self._index[origin])
        return self._checked(indices, times)

    def segments(self, indices: list[int], times: int, depth: int) -> list[slice]:
        """Cut a batch where a ring of ``depth`` slices has to move on.

        Raises:
            ValueError: a patch reaches beyond the ring, and others have to come first.
        """
        segments = []
        left, base, first = list(self._left), self.base, 0
        for position, index in enumerate(indices):
            row = self._row_of[index]
            if self._stops[row] > base + depth:
                segments.append(slice(first, position))
                first, base = position, self._first_open(left)
                if self._stops[row] > base + depth:
                    raise ValueError(
                        f"origins: {self._origin(index)} cannot be added yet: the ring holds "
                        f"slices {base} to {base + depth} of axis {self.axis} until the patch at "
                        f"{self._origin(self._first_missing(indices[:position], times))} has come"
                    )
            left[row] -= times
        return [*segments, slice(first, len(indices))]

    def done(self, indices: list[int], times: int) -> None:
        """Count ``times`` predictions of each of the patches."""
        for index in indices:
            self._added[index] += times
            self._left[self._row_of[index]] -= times
        self.base = self._first_open(self._left)

    def final(self, depth: int) -> Iterator[tuple[int, int]]:
        """Slices (start, stop) that have become final, at most ``depth`` at a time."""
        while self.front < self.base:
            stop = min(self.base, self.front + depth)
            yield self.front, stop
            self.front = stop

    def check_complete(self) -> None:
        """Raise RuntimeError if patches are missing."""
        missing = self.lacking()
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self._added)} patches are missing, the first at "
                f"{self._origin(missing[0])}; slices before {self.front} of axis {self.axis} are "
                "final"
            )

    def _next(self, count: int, times: int) -> list[int]:
        while self._cursor < len(self._added) and self._added[self._cursor] >= self._members:
            self._cursor += 1
        coming = range(self._cursor, len(self._added))
        indices = list(islice((i for i in coming if self._added[i] < self._members), count))
        if len(indices) < count:
            raise ValueError(f"patches: are {count}, but only {len(indices)} are to come")
        return self._checked(indices, times)

    def _checked(self, indices: list[int], times: int) -> list[int]:
        for index, often in Counter(indices).items():
            if self._added[index] + often * times > self._members:
                limit = "once" if self._members == 1 else f"{self._members} times"
                raise ValueError(
                    f"origins: {self._origin(index)} is added again; each patch comes {limit}"
                )
        return indices

    def _first_open(self, left: list[int]) -> int:
        rows = zip(self._starts, left, strict=True)
        return next((start for start, count in rows if count), self.extent)

    def _first_missing(self, pending: list[int], times: int) -> int:
        coming = Counter(pending)
        return next(i for i, n in enumerate(self._added) if n + coming[i] * times < self._members)

    def _origin(self, index: int) -> tuple[int, ...]:
        return tuple(self.origins[index].tolist())


def chosen_axis(stream_axis: str | int, volume: Sequence[int], patch: Sequence[int]) -> int:
    """The axis to stream along: the given one, or that with the smallest ring."""
    if stream_axis == "auto":
        return min(range(len(volume)), key=lambda a: min(patch[a], volume[a]) / volume[a])
    if not isinstance(stream_axis, int) or not 0 <= stream_axis < len(volume):
        raise ValueError(
            f"stream_axis: got {stream_axis!r}, expected 'auto' or 0 to {len(volume) - 1}"
        )
    return stream_axis
