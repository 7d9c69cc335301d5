"""Sums of weighted patches over the slices that are not final yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from voxfuse.fusion._memory import zeros
from voxfuse.fusion.grids import PatchWeights
from voxfuse.fusion.options import FusionOptions
from voxfuse.fusion.schedule import Schedule
from voxfuse.ops import _registry
from voxfuse.ops.finalize_slab import finalize_slab
from voxfuse.ops.overlap_add import overlap_add_, overlap_weights_


class Ring:
    r"""A ring of float32 or float64 sums, in which slice x of the stream has slot x modulo depth.

    Args:
        sums: zeros (channels, \*extent); as deep as the volume where they are the result itself.
        schedule: which slices the ring holds: from the first that is not final.
        weights: those of the schedule's patches.
        options: what is made of patches and of sums.
        dtype: of the additions.
        in_place: whether ``sums`` are the result itself.
    """

    def __init__(
        self,
        sums: Tensor,
        schedule: Schedule,
        weights: PatchWeights,
        options: FusionOptions,
        dtype: torch.dtype,
        *,
        in_place: bool = False,
    ) -> None:
        _registry.check_device(sums.device)
        self.sums, self.dtype, self.in_place = sums, dtype, in_place
        self.depth = sums.shape[1 + schedule.axis]
        self._schedule, self._options = schedule, options
        self._rows, self._floor = weights.rows, weights.floor
        self._weights = [vector.to(sums.device) for vector in weights.weights]
        self._cover = [table.to(sums.device) for table in weights.cover]
        #: Sums of the weights, where these are no partition of unity; and how far they go.
        self._total = (
            None if weights.normalised else zeros(sums.shape[1:], torch.float64, sums.device)
        )
        self._weighed = 0
        head = options.head or (None, None)
        self._head = [None if part is None else part.to(sums.device, dtype) for part in head]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but views of the result, which pickle would tear from it."""
        return self.__dict__ | ({"sums": None} if self.in_place else {})

    def add(self, patches: Tensor, indices: list[int], flip: Sequence[int]) -> None:
        """Add predictions of the schedule's patches ``indices``, mirrored along ``flip``."""
        schedule = self._schedule
        overlap_add_(
            self.sums,
            patches,
            schedule.places[indices],
            self._rows[indices],
            self._weights,
            total=self._total,
            ring_axis=schedule.axis,
            start=schedule.base,
            stop=self._stop(),
            flip=flip,
            floor=self._floor,
            cover=self._cover,
            activation=self._options.patch_activation,
            backend=self._options.backend,
        )

    def finish(self, slab: Tensor, start: int, stop: int) -> None:
        """Make the result of final slices, and free their slots."""
        self._finalise(self.sums, self._total, slab, start, stop)
        if self._total is not None:
            for slot, size in _slots(start, stop, self.depth):
                self._total.narrow(self._schedule.axis, slot, size).zero_()

    def weigh(self) -> None:
        """Sum the weights, where needed, over the slices that the ring has come to hold."""
        if self._total is None:
            return
        schedule, axis = self._schedule, self._schedule.axis
        start, stop = max(self._weighed, schedule.base), self._stop()
        self._weighed = max(start, stop)
        if start >= stop:
            return
        first = schedule.places[:, axis]
        near = (first < stop) & (first + self._schedule.reach > start)
        overlap_weights_(
            self._total,
            schedule.places[near],
            self._rows[near],
            self._weights,
            ring_axis=axis,
            start=start,
            stop=stop,
            backend=self._options.backend,
        )

    def _stop(self) -> int:
        return min(self._schedule.base + self.depth, self._schedule.extent)

    def _finalise(
        self, sums: Tensor, total: Tensor | None, slab: Tensor, start: int, stop: int
    ) -> None:
        options, (weight, bias) = self._options, self._head
        finalize_slab(
            sums,
            slab,
            options.finish,
            ring_axis=self._schedule.axis,
            start=start,
            stop=stop,
            activation=options.final_activation,
            applied=options.voting == "soft",
            divisor=options.divisor,
            weight=weight,
            bias=bias,
            total=total,
            threshold=options.bound,
            fill=options.finished_fill,
            clear=True,
            backend=options.backend,
        )


class HalfRing(Ring):
    """A ring of float16 or bfloat16 sums: half the memory, one rounding an addition.

    The operators add in float32. A patch's part of the ring is widened, added to and rounded back,
    one patch after the other, so that the bits do not depend on batches; finished slices are
    widened a few at a time. It takes two more passes over a patch's voxels than a float32 ring, on
    every backend.
    """

    def add(self, patches: Tensor, indices: list[int], flip: Sequence[int]) -> None:
        schedule, axis = self._schedule, self._schedule.axis
        # The mean of the members is summed, not their sum, which might overflow float16.
        shares = [self._weights[0] / self._options.members, *self._weights[1:]]
        for number, index in enumerate(indices):
            origin = schedule.places[index : index + 1]
            low = origin[0].tolist()
            high = [first + size for first, size in zip(low, patches.shape[2:], strict=True)]
            inside = [(0, size) for size in self.sums.shape[1:]]
            inside[axis] = schedule.base, self._stop()
            low = [max(x, first) for x, (first, _) in zip(low, inside, strict=True)]
            high = [min(x, last) for x, (_, last) in zip(high, inside, strict=True)]
            if any(last <= first for first, last in zip(low, high, strict=True)):
                continue
            sums, total = self._widened(low, high)
            overlap_add_(
                sums,
                patches[number : number + 1],
                origin - torch.tensor(low),
                self._rows[index : index + 1],
                shares,
                total=total,
                flip=flip,
                activation=self._options.patch_activation,
                backend=self._options.backend,
            )
            for part, target in self._parts(self.sums, low, high):
                target.copy_(sums.narrow(1 + axis, *part))

    def _finalise(
        self, sums: Tensor, total: Tensor | None, slab: Tensor, start: int, stop: int
    ) -> None:
        """Widen a sixteenth of the ring at a time."""
        axis, block = self._schedule.axis, max(self.depth // 16, 1)
        low, high = [0] * (sums.ndim - 1), list(sums.shape[1:])
        for first in range(start, stop, block):
            last = min(first + block, stop)
            low[axis], high[axis] = first, last
            part = slab.narrow(1 + axis, first - start, last - first)
            super()._finalise(*self._widened(low, high), part, 0, last - first)
        for slot, size in _slots(start, stop, self.depth):
            sums.narrow(1 + axis, slot, size).zero_()

    def _widened(self, low: list[int], high: list[int]) -> tuple[Tensor, Tensor | None]:
        """Contiguous copies of the box [low, high) of sums and total, slices in their order."""
        total = None if self._total is None else self._copied(self._total[None], low, high)[0]
        return self._copied(self.sums, low, high, self.dtype), total

    def _copied(
        self, ring: Tensor, low: list[int], high: list[int], dtype: torch.dtype | None = None
    ) -> Tensor:
        shape = [last - first for first, last in zip(low, high, strict=True)]
        box = ring.new_empty((ring.shape[0], *shape), dtype=dtype)
        for part, source in self._parts(ring, low, high):
            box.narrow(1 + self._schedule.axis, *part).copy_(source)
        return box

    def _parts(
        self, ring: Tensor, low: list[int], high: list[int]
    ) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Pieces of a box, in the box (first slice, number) and in the ring."""
        axis, offset = self._schedule.axis, 0
        for slot, size in _slots(low[axis], high[axis], self.depth):
            place = [slice(first, last) for first, last in zip(low, high, strict=True)]
            place[axis] = slice(slot, slot + size)
            yield (offset, size), ring[(slice(None), *place)]
            offset += size


def _slots(start: int, stop: int, depth: int) -> Iterator[tuple[int, int]]:
    """Consecutive slots (first, number) of a ring that hold the slices start to stop."""
    while start < stop:
        size = min(stop - start, depth - start % depth)
        yield start % depth, size
        start += size
