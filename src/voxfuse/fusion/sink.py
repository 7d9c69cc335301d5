"""Where results go: memory, the caller's array of whatever kind, or a function of slabs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxfuse.fusion._memory import empty, overlaps_itself
from voxfuse.fusion.arrays import Assignable, Gathered
from voxfuse.fusion.delivery import Delivery
from voxfuse.fusion.options import FusionOptions
from voxfuse.ops import _checks

#: Where a result goes: a tensor, a NumPy array (a memmap, say), anything else that boxes can be
#: assigned to (a Zarr array), or a function of (slab, start, stop) that is called once for every
#: finished slab.
Destination = Tensor | NDArray[Any] | Assignable | Callable[[Tensor, int, int], object]


class Sink:
    """The result of a fusion, and how finished slabs get there.

    Args:
        options: say the result's channels and dtype.
        volume: extent of the volume.
        axis: the axis that slabs are slices of.
        out, device: see :class:`voxfuse.PatchFuser`.

    Raises:
        TypeError: ``out`` is none of them.
        ValueError: its shape or layout does not fit, or it does not hold the fill value.
    """

    def __init__(
        self,
        options: FusionOptions,
        volume: tuple[int, ...],
        axis: int,
        out: Destination | None,
        device: torch.device | str | None,
    ) -> None:
        self._options, self._volume, self._axis = options, volume, axis
        self._device = None if device is None else torch.device(device)
        self._function: Callable[[Tensor, int, int], object] | None = None
        if is_function(out):
            self._function = out
        self._gathered: Gathered | None = None
        self._dtype = options.result_dtype(torch.float32)
        self._delivery = Delivery()
        #: What the caller gets, and the same with a channel axis.
        self.returned: Any = None
        self.result: Tensor | None = None
        if out is not None and self._function is None:
            self._take(out)
        else:
            _checks.require_held("fill", options.fill, self._dtype)

    def open(self, patches: Tensor) -> None:
        """Allocate the result at the first patches, unless the caller said where it goes."""
        if self._gathered is not None:
            return
        self._dtype = self._options.result_dtype(patches.dtype)
        if self.result is None and self._function is None:
            self._take(empty(self.shape, self._dtype, self._device or patches.device))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result, without an axis of one channel that it need not have."""
        shape = self._options.result_shape(self._volume)
        return shape if self._options.mode in ("values", "mask") else shape[1:]

    def write(
        self,
        start: int,
        stop: int,
        device: torch.device,
        make: Callable[[Tensor, int, int], object],
    ) -> None:
        """Have ``make(slab, start, stop)`` fill final slices on ``device``, and hand them on."""
        place = None
        if self.result is not None:
            place = self.result.narrow(1 + self._axis, start, stop - start)
        chosen = self._options.result_channels
        direct = None if place is None or not self._is_direct(place, device) else place
        if direct is not None and chosen is None:
            make(direct, start, stop)
            return
        shape = list(self._options.finished_shape(self._volume))
        shape[1 + self._axis] = stop - start
        dtype = self._dtype if place is None else place.dtype
        slab = torch.empty(shape, dtype=dtype, device=device)
        make(slab, start, stop)
        if chosen is not None:
            slab = slab[list(chosen)]
        if direct is not None:
            direct.copy_(slab)
        elif place is not None:
            self._delivery.send(slab, place)
        elif self._function is not None:
            self._function(slab, start, stop)

    def collect(self) -> None:
        """Write slabs that have arrived from a GPU, without waiting."""
        self._delivery.collect()

    def flush(self) -> None:
        """Wait for slabs that are on their way from a GPU."""
        self._delivery.flush()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but views of the result, which pickle would tear from it."""
        if self._gathered is not None or _is_mapped(self.returned):
            kind = "an array of another kind" if self._gathered else "a memory-mapped file"
            raise TypeError(
                f"PatchFuser: its result goes to {kind}, which a copy would write to "
                "as well; use out=None, or an array in memory, and write result() to the file"
            )
        self.flush()
        return self.__dict__ | {"result": None, "_delivery": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._delivery = Delivery()
        if self.returned is not None:
            self._take(self.returned)

    def _is_direct(self, place: Tensor, device: torch.device) -> bool:
        """Whether slices are finalised right where the result is."""
        return place.device == device

    def _take(self, out: Any) -> None:
        """Check a tensor or array and keep it with a channel axis."""
        self.returned = out
        gathered: Gathered | None = None
        full = self._options.result_shape(self._volume)
        if isinstance(out, np.ndarray):
            if not out.flags.writeable:
                raise ValueError("out: the array is not writeable")
            tensor = torch.from_numpy(out)
        elif isinstance(out, Tensor):
            tensor = _checks.plain(out)
        elif isinstance(out, Assignable):
            gathered = Gathered(out, self._axis, full)
            # What the checks below ask for, without memory.
            tensor = torch.empty(tuple(out.shape), dtype=gathered.dtype, device="meta")
        else:
            raise TypeError(
                f"out: got {type(out).__name__}, expected a tensor, a NumPy array, another array "
                "that boxes can be assigned to, or a function"
            )
        integral = self._options.mode in ("labels", "mask")
        if not integral and tensor.dtype not in _checks.LOGIT_DTYPES:
            raise TypeError(
                f"out: got {_checks.describe(tensor)}, expected float32, float16, bfloat16, float64"
            )
        _checks.require_held("fill", self._options.fill, tensor.dtype)
        if tuple(tensor.shape) not in ([full, full[1:]] if full[0] == 1 else [full]):
            raise ValueError(f"out: got shape {tuple(tensor.shape)}, expected {self.shape}")
        if overlaps_itself(tensor):
            raise ValueError(
                f"out: got strides {tensor.stride()} for shape {tuple(tensor.shape)}, of which "
                "several voxels share one place in memory"
            )
        if gathered is not None:
            self._gathered = self._function = gathered
            self._dtype = gathered.dtype
            return
        self.result = tensor if tensor.ndim == len(full) else tensor.unsqueeze(0)


def is_function(out: object) -> TypeGuard[Callable[[Tensor, int, int], object]]:
    """Whether a destination is a function of slabs."""
    return callable(out) and not isinstance(out, (Tensor, Assignable))


def _is_mapped(out: Any) -> bool:
    """Whether an array's memory is a file's."""
    while isinstance(out, np.ndarray):
        if isinstance(out, np.memmap):
            return True
        out = out.base
    return False
