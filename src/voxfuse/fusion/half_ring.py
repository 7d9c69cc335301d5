"""A ring of float16 or bfloat16 sums: half the memory, one rounding an addition.

The operators add in float32. A patch's part of the ring is widened, added to and rounded back, one
patch after the other, so that the bits do not depend on batches; finished slices are widened a few
at a time. It takes two more passes over a patch's voxels than a float32 ring, on every backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from voxfuse.ops.overlap_add import overlap_add_

#: What ``accumulate=`` accepts beside None.
ACCUMULATORS = (torch.float16, torch.bfloat16)


def slots(start: int, stop: int, depth: int) -> Iterator[tuple[int, int]]:
    """Consecutive slots (first, number) of a ring that hold the slices start to stop."""
    while start < stop:
        size = min(stop - start, depth - start % depth)
        yield start % depth, size
        start += size


def add_rounded(
    ring: Tensor,
    patches: Tensor,
    origins: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    *,
    total: Tensor | None,
    ring_axis: int,
    start: int,
    stop: int,
    members: int,
    dtype: torch.dtype,
    flip: Sequence[int],
    activation: str,
    backend: str,
) -> None:
    """As :func:`voxfuse.ops.overlap_add.overlap_add_`, of the patches over ``members``.

    The mean of the members is summed, not their sum, which might overflow float16: their weights
    are divided. ``dtype`` is that of the additions.
    """
    shares = [weights[0] / members, *weights[1:]]
    for index, origin in enumerate(origins.tolist()):
        low = [max(first, 0) for first in origin]
        high = [
            min(first + size, extent)
            for first, size, extent in zip(origin, patches.shape[2:], ring.shape[1:], strict=True)
        ]
        low[ring_axis] = max(origin[ring_axis], start)
        high[ring_axis] = min(origin[ring_axis] + patches.shape[2 + ring_axis], stop)
        if any(last <= first for first, last in zip(low, high, strict=True)):
            continue
        sums = widened(ring, low, high, ring_axis, dtype)
        overlap_add_(
            sums,
            patches[index : index + 1],
            origins[index : index + 1] - torch.tensor(low),
            rows[index : index + 1],
            shares,
            total=None if total is None else widened(total[None], low, high, ring_axis)[0],
            flip=flip,
            activation=activation,
            backend=backend,
        )
        for part, target in _parts(ring, low, high, ring_axis):
            target.copy_(sums.narrow(1 + ring_axis, *part))


def widened(
    ring: Tensor,
    low: Sequence[int],
    high: Sequence[int],
    ring_axis: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A contiguous copy of the box [low, high) of a ring, slices in their order."""
    shape = [last - first for first, last in zip(low, high, strict=True)]
    box = ring.new_empty((ring.shape[0], *shape), dtype=dtype)
    for part, source in _parts(ring, low, high, ring_axis):
        box.narrow(1 + ring_axis, *part).copy_(source)
    return box


def _parts(
    ring: Tensor, low: Sequence[int], high: Sequence[int], ring_axis: int
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Pieces of a box, in the box (first slice, number) and in the ring."""
    offset = 0
    for slot, size in slots(low[ring_axis], high[ring_axis], ring.shape[1 + ring_axis]):
        place = [slice(first, last) for first, last in zip(low, high, strict=True)]
        place[ring_axis] = slice(slot, slot + size)
        yield (offset, size), ring[(slice(None), *place)]
        offset += size
