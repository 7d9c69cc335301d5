"""Weighted addition of overlapping patches in plain PyTorch: the truth for every kernel.

Patch i lies at origin o_i and has the weight w_i; parts outside the volume are clipped::

    V(x) = sum_i w_i(x - o_i) P_i(x - o_i)

added in patch order at every voxel, in float32 for half and float32 patches and in float64 for
float64 patches. The weights come in float64, in one of two forms: one (k_a, patch_a) tensor an
axis, of which patch i uses row ``rows[i, a]`` (their product is the weight), or a single dense
(1, \\*patch) window. Without ``total`` they are used as they are, rounded to the accumulation type
an axis (on a grid they are a partition of unity). With ``total``, a float64 volume holding
``sum_i w_i(x - o_i)``, the weight is ``w_i / total`` divided in float64, 0 where the total is 0.

On a grid the weights may have a lower bound: ``max(product, floor)`` divided by the sum of the same
over all patches of the grid, which is no product of the axes. It comes in factors: one table
(m_a, extent) an axis, whose rows hold the weights of all patches over a coordinate, and a negative
number where there are fewer than m_a. Where the tables name no patch, the weight is 0.

With an activation, P_i is the softmax of the patch over its channels, or its sigmoid, evaluated in
the accumulation type; infinities and NaN mean what they mean to ``torch.softmax``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from voxfuse.contract import Activation


def patch_shape(weights: Sequence[Tensor], axes: int) -> tuple[int, ...]:
    """Extent of a patch, read from its weights: one (k, extent) tensor an axis, or a dense one."""
    if len(weights) == axes:
        return tuple(w.shape[1] for w in weights)
    return tuple(weights[0].shape[1:])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def checked_activation(activation: int) -> int:
    """The number of an activation, or ValueError."""
    if activation not in tuple(Activation):
        raise ValueError(
            f"activation: got {activation}, expected 0 (none), 1 (sigmoid) or 2 (softmax)"
        )
    return activation


def activated(block: Tensor, activation: int, axis: int) -> Tensor:
    """Probabilities of a block of patches in the accumulation type, softmax over ``axis``."""
    if activation == Activation.softmax:
        return block.softmax(axis)
    return block.sigmoid() if activation == Activation.sigmoid else block


class Part(NamedTuple):
    """A block of patch number ``patch`` and the block of the volume or ring that it falls on."""

    patch: int
    source: tuple[slice, ...]
    destination: tuple[slice, ...]


def _parts(
    origins: Tensor,
    patch: Sequence[int],
    extent: Sequence[int],
    ring_axis: int,
    start: int,
    stop: int,
) -> Iterator[Part]:
    """Yield the blocks of every patch that lie inside, in patch order.

    Along ``ring_axis`` coordinate x is kept if ``start <= x < stop`` and lies in slot
    ``x % extent[ring_axis]``, so that a patch may fall apart in two blocks.
    """
    for index, origin in enumerate(origins.tolist()):
        low = [max(o, 0) for o in origin]
        high = [min(o + p, e) for o, p, e in zip(origin, patch, extent, strict=True)]
        low[ring_axis] = max(origin[ring_axis], start)
        high[ring_axis] = min(origin[ring_axis] + patch[ring_axis], stop)
        if any(b <= a for a, b in zip(low, high, strict=True)):
            continue
        depth, first = extent[ring_axis], low[ring_axis]
        while first < high[ring_axis]:
            last = min(high[ring_axis], (first // depth + 1) * depth)
            source = [slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True)]
            source[ring_axis] = slice(first - origin[ring_axis], last - origin[ring_axis])
            destination = [slice(a, b) for a, b in zip(low, high, strict=True)]
            slot = first % depth
            destination[ring_axis] = slice(slot, slot + last - first)
            yield Part(index, tuple(source), tuple(destination))
            first = last


def _outer(vectors: Sequence[Tensor]) -> Tensor:
    """Product of one vector an axis, first axis first."""
    result = vectors[0]
    for vector in vectors[1:]:
        result = result.unsqueeze(-1) * vector
    return result


def _raised(
    part: Part,
    origin: Sequence[int],
    rows: Sequence[int],
    weights: Sequence[Tensor],
    cover: Sequence[Tensor],
    floor: float,
) -> Tensor:
    """Weight of every voxel of ``part`` over the sum of those of all patches."""
    own = _outer([w[k][s] for w, k, s in zip(weights, rows, part.source, strict=True)])
    places = [slice(s.start + o, s.stop + o) for s, o in zip(part.source, origin, strict=True)]
    over = [table[:, place].unbind() for table, place in zip(cover, places, strict=True)]
    sums = torch.zeros_like(own)
    for vectors in product(*over):
        present = _outer([(v >= 0).to(own.dtype) for v in vectors])
        sums += present * _outer(vectors).clamp(min=floor)
    return torch.where(sums == 0, 0.0, own.clamp(min=floor) / sums)


def _weight(
    part: Part,
    rows: Tensor,
    weights: Sequence[Tensor],
    total: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Weight of every voxel of ``part``, in ``dtype``."""
    if len(weights) == len(part.source):
        vectors = [
            w[row][s]
            for w, row, s in zip(weights, rows[part.patch].tolist(), part.source, strict=True)
        ]
    else:
        vectors = [weights[0][0][part.source]]
    if total is None:
        return _outer([v.to(dtype) for v in vectors])
    sums = total[part.destination]
    return torch.where(sums == 0, 0.0, _outer(vectors) / sums).to(dtype)


def _add(
    accumulator: Tensor,
    patches: Tensor,
    origins: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    total: Tensor | None,
    ring_axis: int,
    start: int,
    stop: int,
    floor: float = 0.0,
    activation: int = Activation.none,
    cover: Sequence[Tensor] = (),
    turned: Sequence[int] = (),
) -> None:
    checked_activation(activation)
    weights, cover = ([w.to(accumulator.device) for w in x] for x in (weights, cover))
    extent = accumulator.shape[1:]
    for part in _parts(origins, patches.shape[2:], extent, ring_axis, start, stop):
        if floor > 0:
            place = origins[part.patch].tolist(), rows[part.patch].tolist()
            weight = _raised(part, *place, weights, cover, floor).to(accumulator.dtype)
        else:
            weight = _weight(part, rows, weights, total, accumulator.dtype)
        patch = activated(patches[part.patch].to(accumulator.dtype), activation, 0)
        patch = patch.flip(tuple(turned)) if turned else patch
        block = patch[(slice(None), *part.source)]
        accumulator[(slice(None), *part.destination)] += weight * block


def overlap_add(
    patches: Tensor,
    origins: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    total: Tensor | None,
    volume_shape: Sequence[int],
    activation: int = Activation.none,
) -> Tensor:
    """Return the fused volume (C, \\*volume) in the patches' dtype; uncovered voxels are 0."""
    volume = torch.zeros(
        (patches.shape[1], *volume_shape),
        dtype=accumulation_dtype(patches.dtype),
        device=patches.device,
    )
    place = 0, 0, volume_shape[0]
    _add(volume, patches, origins, rows, weights, total, *place, activation=activation)
    return volume.to(patches.dtype)


def overlap_add_backward(
    grad: Tensor,
    origins: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    total: Tensor | None,
    patches: Tensor | None = None,
    activation: int = Activation.none,
) -> Tensor:
    """Return the gradient (N, C, \\*patch) of the patches, 0 outside the volume.

    It is ``a = w_i(t) grad(o_i + t)`` without an activation, ``p_c (a_c - sum_k p_k a_k)`` with
    softmax and ``p (1 - p) a`` with sigmoid, where p are the probabilities of ``patches``.
    """
    checked_activation(activation)
    volume_shape = grad.shape[1:]
    patch = patch_shape(weights, len(volume_shape))
    dtype = accumulation_dtype(grad.dtype)
    result = grad.new_zeros((origins.shape[0], grad.shape[0], *patch))
    weights = [w.to(grad.device) for w in weights]
    for part in _parts(origins, patch, volume_shape, 0, 0, volume_shape[0]):
        weight = _weight(part, rows, weights, total, dtype)
        block = weight * grad[(slice(None), *part.destination)].to(dtype)
        place = (slice(None), *part.source)
        if activation != Activation.none:
            if patches is None:
                raise ValueError("patches: got None, expected the patches that were activated")
            z = patches[part.patch][place].to(dtype)
            if activation == Activation.softmax:
                p = activated(z, activation, 0)
                block = p * (block - (p * block).sum(0))
            else:
                block = z.sigmoid() * (-z).sigmoid() * block
        result[part.patch][place] = block.to(grad.dtype)
    return result


def overlap_add_(
    ring: Tensor,
    patches: Tensor,
    origins: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    total: Tensor | None,
    ring_axis: int,
    start: int,
    stop: int,
    flip: int = 0,
    floor: float = 0.0,
    activation: int = Activation.none,
    cover: Sequence[Tensor] | None = None,
) -> None:
    """Add patches into ``ring`` (C, \\*extent), which holds ``start <= x < stop`` of one axis.

    Coordinate x of spatial axis ``ring_axis`` lives in slot ``x % extent[ring_axis]``; parts of
    patches outside [start, stop) are left out. ``total`` has the ring's spatial layout. Patches are
    mirrored along axis a where bit a of ``flip`` is set, and turned back: voxel t of the patch is
    ``patch[size - 1 - t]``. With ``floor`` > 0 ``cover`` has a table an axis of all patches'
    weights, and there is no ``total``.
    """
    turned = [1 + axis for axis in range(patches.ndim - 2) if flip >> axis & 1]
    place = ring_axis, start, stop
    tables = (origins, rows, weights, total)
    _add(ring, patches, *tables, *place, floor, activation, cover or (), turned)


def overlap_weights_(
    total: Tensor,
    origins: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    ring_axis: int,
    start: int,
    stop: int,
) -> None:
    """Add every patch's weights into the float64 ``total`` (\\*extent), laid out as a ring."""
    weights = [w.to(total.device) for w in weights]
    patch = patch_shape(weights, total.ndim)
    for part in _parts(origins, patch, total.shape, ring_axis, start, stop):
        total[part.destination] += _weight(part, rows, weights, None, torch.float64)
