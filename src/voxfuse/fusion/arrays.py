"""Arrays that are no tensors and need not fit memory: sliced to be read, assigned to be written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from voxfuse.fusion._memory import empty, overlapping, span
from voxfuse.fusion.delivery import Delivery
from voxfuse.ops import _checks


@runtime_checkable
class Sliceable(Protocol):
    """What patches are read from: a Zarr or Dask array, a memmap, anything of this form.

    Keys are tuples of one slice an axis, ``0 <= start < stop <= extent``, without steps.
    """

    @property
    def shape(self) -> Sequence[int]:
        """Extent of every axis."""

    @property
    def dtype(self) -> Any:
        """NumPy's dtype, or a name of it."""

    def __getitem__(self, key: Any, /) -> Any:
        """A box, of the key's shape, that ``numpy.asarray`` takes."""


@runtime_checkable
class Assignable(Protocol):
    r"""What results are written to, shape (C, \*spatial), or (\*spatial) for one channel.

    Keys are as those of :class:`Sliceable`, and cover whole units along the streaming axis. Three
    attributes are looked for: ``unit``, the extents that are best written whole (else those of
    Zarr's ``shards`` or ``chunks``, else single slices); ``flush()``, after which everything is on
    the disk; and ``written(key)``, whether a box of whole units is still there.
    """

    @property
    def shape(self) -> Sequence[int]:
        """Extent of every axis."""

    @property
    def dtype(self) -> Any:
        """NumPy's dtype, or a name of it."""

    def __setitem__(self, key: Any, value: Any, /) -> None:
        """Write a box: a contiguous array of the key's shape and of this dtype."""


def unit_of(out: Any) -> tuple[int, ...]:
    """The extents of a destination that are best written whole."""
    for name in ("unit", "shards", "chunks"):
        unit = getattr(out, name, None)
        if unit is not None and all(isinstance(size, (int, np.integer)) for size in unit):
            return tuple(int(size) for size in unit)
    return (1,) * len(out.shape)


def torch_dtype(name: str, dtype: Any) -> torch.dtype:
    """PyTorch's name of a NumPy dtype.

    Raises:
        TypeError: it has none.
    """
    try:
        return torch.from_numpy(np.empty(0, np.dtype(dtype).newbyteorder("="))).dtype
    except TypeError:
        raise TypeError(f"{name}: got dtype {dtype}, expected one that PyTorch has") from None


class Sliced:
    r"""A sliceable array of shape (1, channels, \*spatial) read as a tensor of the CPU is."""

    def __init__(self, name: str, array: Sliceable) -> None:
        # What is read: see fusion.arrays.behind.
        self.behind = array
        self.shape = tuple(int(size) for size in array.shape)
        self.dtype = torch_dtype(name, array.dtype)
        self.device = torch.device("cpu")
        self.ndim = len(self.shape)

    def __getitem__(self, key: tuple[slice, ...]) -> Tensor:
        shape = tuple(part.indices(size) for part, size in zip(key, self.shape, strict=True))
        box = np.asarray(self.behind[tuple(slice(low, high) for low, high, _ in shape)])
        if box.shape != tuple(high - low for low, high, _ in shape):
            raise ValueError(
                f"inputs: a box of {tuple(high - low for low, high, _ in shape)} voxels came back "
                f"as {box.shape}"
            )
        # A copy of its own where the array's memory is not ours to write to.
        native = np.require(box, box.dtype.newbyteorder("="), ["C", "W"])
        return torch.from_numpy(native)


def readable(name: str, array: Any) -> Tensor | Sliced:
    """A tensor as it is, and anything else that can be sliced as if it were one.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(array, Tensor) or not isinstance(array, Sliceable):
        return _checks.require_tensor(name, array)
    return Sliced(name, array)


class Part:
    """A box of a destination as a destination of its own, whose keys count from the box."""

    def __init__(self, out: Assignable, low: Sequence[int], shape: Sequence[int]) -> None:
        # What is written to: see fusion.arrays.behind.
        self.behind, self._low = out, tuple(low)
        self.shape, self.dtype = tuple(shape), out.dtype
        self.unit = unit_of(out)

    def __setitem__(self, key: tuple[slice, ...], value: Any) -> None:
        self.behind[
            tuple(
                slice(low + part.start, low + part.stop)
                for low, part in zip(self._low, key, strict=True)
            )
        ] = value

    def flush(self) -> None:
        """Have everything on the disk."""
        flush(self.behind)


def behind(array: Any) -> Any:
    """What lies behind an array that reads or writes another, as those of voxfuse say."""
    while hasattr(array, "behind"):
        array = array.behind
    return array


def in_common(one: Any, other: Any) -> bool:
    """Whether two arrays have memory, or an array of a store, in common, as far as can be told."""
    one, other = behind(one), behind(other)
    if isinstance(one, (Tensor, np.ndarray)) and isinstance(other, (Tensor, np.ndarray)):
        return overlapping(span(one), span(other))
    places = [getattr(array, "store_path", None) for array in (one, other)]
    return None not in places and str(places[0]) == str(places[1])


def flush(out: Any) -> None:
    """Have on the disk what was written to a destination, if it says how."""
    while isinstance(out, np.ndarray) and not isinstance(out, np.memmap) and out.base is not None:
        out = out.base  # a view of a memmap
    if hasattr(out, "flush"):
        out.flush()


class Gathered:
    """Finished slabs put together to whole units of a destination, and written then.

    Args:
        out: the destination.
        axis: the axis of the volume that slabs are slices of.
        shape: of the result, with its channel axis.
    """

    def __init__(self, out: Assignable, axis: int, shape: Sequence[int]) -> None:
        self._out, self._axis, self._shape = out, 1 + axis, tuple(shape)
        self._bare = len(out.shape) < len(self._shape)
        self.dtype = torch_dtype("out", out.dtype)
        self._unit = max(unit_of(out)[axis if self._bare else 1 + axis], 1)
        self._buffer: Tensor | None = None
        self._delivery = Delivery()

    def __call__(self, slab: Tensor, start: int, stop: int) -> None:
        """Take the final slices ``start`` to ``stop``."""
        axis, first, extent = self._axis, start, self._shape[self._axis]
        while first < stop:
            begin = first - first % self._unit
            whole = stop if stop == extent else stop - stop % self._unit
            if begin == first < whole:
                # Units that are whole already go without a copy.
                self._write(slab.narrow(axis, first - start, whole - first), first, whole)
                first = whole
                continue
            end = min(begin + self._unit, extent)
            last = min(stop, end)
            if self._buffer is None:
                shape = list(self._shape)
                shape[axis] = min(self._unit, shape[axis])
                self._buffer = empty(shape, self.dtype, "cpu")
            place = self._buffer.narrow(axis, first - begin, last - first)
            self._delivery.send(slab.narrow(axis, first - start, last - first), place)
            if last == end:
                self._delivery.flush()
                self._write(self._buffer.narrow(axis, 0, end - begin), begin, end)
            first = last

    def _write(self, units: Tensor, begin: int, end: int) -> None:
        key = [slice(0, size) for size in self._shape]
        key[self._axis] = slice(begin, end)
        if self._bare:
            units, key = units[0], key[1:]
        self._out[tuple(key)] = units.to("cpu", self.dtype).contiguous().numpy()
