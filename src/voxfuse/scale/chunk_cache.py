"""Chunks of an array that is read patch by patch, each decompressed once while it is needed."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, product
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

Slices = tuple[slice, ...]
Index = tuple[int, ...]


def edges_of(shape: Sequence[int], chunks: Sequence[int | Sequence[int]]) -> list[list[int]]:
    """Where the chunks of every axis begin, and where the last one ends.

    Args:
        shape: extents.
        chunks: of every axis the extent of its chunks, or those of each of them.
    """
    edges = []
    for extent, chunk in zip(shape, chunks, strict=True):
        if isinstance(chunk, Sequence):
            edges.append([0, *accumulate(chunk)])
        else:
            edges.append([*range(0, extent, max(chunk, 1)), extent])
    return edges


def widest(edges: Sequence[int], extent: int) -> int:
    """The most voxels of an axis whose chunks a stretch of ``extent`` voxels touches."""
    most = 0
    for first, after in enumerate(edges[1:]):
        # No stretch that begins in this chunk reaches further than one from its last voxel.
        last = bisect_left(edges, min(after - 1 + extent, edges[-1]))
        most = max(most, edges[last] - edges[first])
    return most


class ChunkCache:
    """What is read of an array, in whole chunks that are kept in bounded memory.

    Args:
        read: returns the values of slices, one an axis, that begin and end where chunks do.
        dtype: theirs.
        edges: see :func:`edges_of`.
        limit: bytes of chunks that are kept at most; those used longest ago go first.

    Reads from several threads wait for each other.
    """

    def __init__(
        self,
        read: Callable[[Slices], NDArray[Any]],
        dtype: np.dtype[Any],
        edges: Sequence[Sequence[int]],
        limit: int,
    ) -> None:
        self._read, self._dtype, self._edges, self.limit = read, dtype, edges, limit
        self._chunks: OrderedDict[Index, NDArray[Any]] = OrderedDict()
        self._axis: int | None = None
        self._lock = Lock()
        #: Bytes of the chunks that are kept, and the most there have been.
        self.bytes = self.most_bytes = 0
        #: Chunks that were read, each as often as it was.
        self.decompressed = 0

    def start(self, axis: int | None) -> None:
        """Forget everything; of what is read along ``axis`` from now on, forget what lies behind.

        Behind a read are the chunks that end before it begins.
        """
        with self._lock:
            self._chunks.clear()
            self._axis, self.bytes = axis, 0

    def read(self, key: Slices) -> NDArray[Any]:
        """The values of slices, one an axis, 0 <= start < stop <= extent."""
        result = np.empty([each.stop - each.start for each in key], self._dtype)
        with self._lock:
            self._forget_behind(key)
            missing = []
            for index in product(*(_touched(*pair) for pair in zip(self._edges, key, strict=True))):
                chunk = self._chunks.get(index)
                if chunk is None:
                    missing.append(index)
                else:
                    self._chunks.move_to_end(index)
                    _copy(chunk, self._place(index, index), result, key)
            for first, last in _boxes(missing):
                place = self._place(first, last)
                values = self._read(place)
                _copy(values, place, result, key)
                self._keep(values, first, last)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Another process begins with no chunks."""
        counts = {"bytes": 0, "most_bytes": 0, "decompressed": 0}
        return self.__dict__ | counts | {"_chunks": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()

    def _place(self, first: Index, last: Index) -> Slices:
        """The voxels of a box of chunks, both ends included."""
        return tuple(
            slice(edges[low], edges[high + 1])
            for edges, low, high in zip(self._edges, first, last, strict=True)
        )

    def _keep(self, values: NDArray[Any], first: Index, last: Index) -> None:
        box = self._place(first, last)
        for index in _inside(first, last):
            self.decompressed += 1
            part = values[within(self._place(index, index), box)]
            if part.nbytes > self.limit:
                continue
            while self.bytes + part.nbytes > self.limit:
                self.bytes -= self._chunks.popitem(last=False)[1].nbytes
            # A view would keep the whole box of chunks alive.
            self._chunks[index] = part if part.size == values.size else part.copy()
            self.bytes += part.nbytes
            self.most_bytes = max(self.most_bytes, self.bytes)

    def _forget_behind(self, key: Slices) -> None:
        if self._axis is None:
            return
        axis, edges = self._axis, self._edges[self._axis]
        for index in [i for i in self._chunks if edges[i[axis] + 1] <= key[axis].start]:
            self.bytes -= self._chunks.pop(index).nbytes


def blocks(place: Slices, unit: Sequence[int], shape: Sequence[int]) -> Iterator[Slices]:
    """The blocks of an array of ``shape`` that a place touches, in C order."""
    starts = [
        range(s.start // size * size, s.stop, size) for s, size in zip(place, unit, strict=True)
    ]
    for corner in product(*starts):
        yield tuple(
            slice(low, min(low + size, extent))
            for low, size, extent in zip(corner, unit, shape, strict=True)
        )


def within(part: Slices, whole: Slices) -> Slices:
    """A part's slices, counted from where the whole begins."""
    return tuple(
        slice(each.start - outer.start, each.stop - outer.start)
        for each, outer in zip(part, whole, strict=True)
    )


def _touched(edges: Sequence[int], part: slice) -> range:
    """Which chunks of an axis a slice touches."""
    return range(bisect_right(edges, part.start) - 1, bisect_left(edges, part.stop))


def _inside(first: Sequence[int], last: Sequence[int]) -> Iterator[Index]:
    """The indices of a box, both ends included."""
    return product(*(range(low, high + 1) for low, high in zip(first, last, strict=True)))


def _copy(values: NDArray[Any], place: Slices, result: NDArray[Any], key: Slices) -> None:
    """Copy what ``values``, which lie at ``place``, have of the voxels of ``key``."""
    to, since = [], []
    for there, wanted in zip(place, key, strict=True):
        low, high = max(there.start, wanted.start), min(there.stop, wanted.stop)
        to.append(slice(low - wanted.start, high - wanted.start))
        since.append(slice(low - there.start, high - there.start))
    result[tuple(to)] = values[tuple(since)]


def _boxes(indices: Sequence[Index]) -> Iterator[tuple[Index, Index]]:
    """Disjoint boxes of just these indices, so that a store can fetch many chunks at once."""
    left = dict.fromkeys(indices)
    while left:
        first = next(iter(left))
        last = list(first)
        for axis in reversed(range(len(first))):
            while True:
                layer = [range(low, high + 1) for low, high in zip(first, last, strict=True)]
                layer[axis] = range(last[axis] + 1, last[axis] + 2)
                if not all(index in left for index in product(*layer)):
                    break
                last[axis] += 1
        for index in _inside(first, last):
            del left[index]
        yield first, tuple(last)


def box_bytes(edges: Sequence[Sequence[int]], extents: Sequence[int], itemsize: int) -> int:
    """The most bytes of whole chunks that a box of these extents touches, wherever it lies."""
    return itemsize * math.prod(widest(*pair) for pair in zip(edges, extents, strict=True))
