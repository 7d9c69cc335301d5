"""Results at another resolution: finished slices are interpolated and decided as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from voxfuse.fusion._memory import zeros
from voxfuse.fusion.options import FusionOptions
from voxfuse.fusion.sink import Destination, Sink
from voxfuse.ops.resample_argmax import LABEL_DTYPES, axis_table, decide, decision

#: Bytes of the values that are interpolated at once, as far as whole slices allow.
_BLOCK = 1 << 23
#: Slices at once, at least, where they are the kernel's rows, columns of its rows, or more.
_FEWEST = {1: 16, 2: 4}
#: Result slices that are written together, where single ones would be one element in a cache line.
_GATHERED = 64


def sink_of(
    options: FusionOptions,
    volume: tuple[int, ...],
    axis: int,
    out: Destination | None,
    device: torch.device | str | None,
) -> Sink:
    """Where a fusion's result goes, at the volume's resolution or another."""
    kind = ResamplingSink if options.resamples else Sink
    return kind(options, volume, axis, out, device)


class ResamplingSink(Sink):
    """A sink that resamples finished slices, and keeps of them the last.

    A slice of the result needs two of the volume, or one; it is made when these are there. Alive
    are a block of a few slices of all channels, and the result's slices that are not written yet.

    Raises:
        ValueError: ``resample_to`` or ``resample_order`` does not go with the volume.
        TypeError: ``out`` does not hold the labels.
    """

    def __init__(
        self,
        options: FusionOptions,
        volume: tuple[int, ...],
        axis: int,
        out: Destination | None,
        device: torch.device | str | None,
    ) -> None:
        target = tuple(options.resample_to or volume)
        if len(target) != len(volume) or min(target) < 1 or len(volume) > 3:
            raise ValueError(
                f"resample_to: got {target}, expected {len(volume)} numbers >= 1"
                if len(volume) <= 3
                else f"resample_to, regions: got {len(volume)} axes, expected 1 to 3"
            )
        order = options.resample_order
        orders = tuple(order) if isinstance(order, Iterable) else (order,) * len(volume)
        if len(orders) != len(volume):
            raise ValueError(
                f"resample_order: got {order!r}, expected 0 or 1, for all axes or one an axis"
            )
        super().__init__(options, volume, axis, out, device)
        self._axes = list(zip(volume, target, orders, strict=True))
        index, weight = axis_table(*self._axes[axis])
        #: How many of the volume's slices each of the result's needs.
        self._needs = index + 1 + (weight[1] != 0)
        #: The same tables of every axis, where the values are.
        self._tables: list[tuple[Tensor, Tensor]] = []
        assert options.classes is not None
        self._chosen = decision(
            options.output,
            len(options.result_channels or range(options.classes)),
            *options.decided_by,
            options.regions,
        )
        #: Finished slices behind the last one before them, with the channel axis.
        self._values: Tensor | None = None
        #: Slices of the result that are made, and those of them that are not written.
        self._made = 0
        self._pending: list[Tensor] = []

    def write(
        self,
        start: int,
        stop: int,
        device: torch.device,
        make: Callable[[Tensor, int, int], object],
    ) -> None:
        """Have ``make(slab, start, stop)`` fill final slices on ``device``, and resample them."""
        axis = 1 + self._axis
        values = self._block(device)
        block = values.shape[axis] - 1
        for first in range(start, stop, block):
            last = min(first + block, stop)
            make(values.narrow(axis, 1, last - first), first, last)
            if self._options.finite:
                self._check_finite(values, first, last)
            made = int(torch.searchsorted(self._needs, last, right=True))
            if made > self._made:
                self._resample(values, first - 1, made)
            values.narrow(axis, 0, 1).copy_(values.narrow(axis, last - first, 1))

    def flush(self) -> None:
        self._write_pending()
        super().flush()

    def _block(self, device: torch.device) -> Tensor:
        if self._values is None:
            shape = list(self._options.finished_shape(self._volume))
            slices, shape[1 + self._axis] = shape[1 + self._axis], 1
            fewest = _FEWEST.get(len(self._volume) - self._axis, 1)
            block = max(_BLOCK // (4 * math.prod(shape)), fewest)
            shape[1 + self._axis] = 1 + min(block, slices)
            # Zeros, because the check for infinite values reads all of it.
            self._values = zeros(shape, torch.float32, device)
            self._tables = [axis_table(*each, device=device) for each in self._axes]
        return self._values

    def _resample(self, values: Tensor, before: int, made: int) -> None:
        """Make the result's slices up to ``made`` of values whose first slice is ``before``."""
        axis, options = self._axis, self._options
        tables = list(self._tables)
        index, weight = (table[..., self._made : made] for table in tables[axis])
        tables[axis] = (index - before).contiguous(), weight.contiguous()
        if options.result_channels is not None:
            values = values[list(options.result_channels)]
        shape = [len(values) if options.mode == "mask" else 1]
        shape += [index.numel() for index, _ in tables]
        dtype = self._dtype if self.result is None else self.result.dtype
        decided = torch.empty(shape, dtype=dtype, device=values.device)
        written = decided.view(torch.bool) if options.mode == "mask" else decided
        decide(written, values, tables, self._chosen, backend=options.backend)
        start, self._made = self._made, made
        if self._function is not None:
            self._function(decided, start, made)
            return
        if made - start + self._pending_slices() > _GATHERED:
            self._write_pending(start)
        self._pending.append(decided)
        if not self._gathers() or self._pending_slices() >= _GATHERED:
            self._write_pending()

    def _gathers(self) -> bool:
        """Whether neighbours in the result's memory lie in different slices."""
        assert self.result is not None
        strides = self.result.stride()
        wide = [step for step, size in zip(strides, self.result.shape, strict=True) if size > 1]
        return strides[1 + self._axis] <= min(wide, default=0)

    def _pending_slices(self) -> int:
        return sum(slab.shape[1 + self._axis] for slab in self._pending)

    def _write_pending(self, stop: int | None = None) -> None:
        """Write the slices that were kept, which end at ``stop``."""
        if not self._pending:
            return
        assert self.result is not None
        axis, count = 1 + self._axis, self._pending_slices()
        stop = self._made if stop is None else stop
        slab = self._pending[0] if len(self._pending) == 1 else torch.cat(self._pending, axis)
        self._pending.clear()
        self._delivery.send(slab, self.result.narrow(axis, stop - count, count))

    def _check_finite(self, values: Tensor, start: int, stop: int) -> None:
        # One pass without a copy says whether there is any to look for.
        if not bool(torch.stack(torch.aminmax(values)).isfinite().all()) and bool(
            values.isinf().any()
        ):
            raise RuntimeError(
                f"predictions: infinite in slices {start} to {stop} of axis {self._axis}"
            )

    def _take(self, out: Any) -> None:
        super()._take(out)
        dtype, options = self._dtype if self.result is None else self.result.dtype, self._options
        if options.mode == "mask":
            if dtype not in (torch.bool, torch.uint8):
                raise TypeError(f"out: got {dtype}, expected torch.bool or torch.uint8 for a mask")
            return
        held = [kind for kind in LABEL_DTYPES if torch.iinfo(kind).max >= options.greatest_label]
        if dtype not in held:
            raise TypeError(
                f"out: got {dtype}, expected one of {', '.join(map(str, held))} for labels up to "
                f"{options.greatest_label}"
            )
