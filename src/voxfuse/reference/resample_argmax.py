"""Interpolation of channels and a decision between them, in plain PyTorch: the kernels' truth.

Voxel k of a target axis is a mean of two neighbours of the source::

    v[k] = lower[k] u[index[k]] + upper[k] u[index[k] + 1]        u[index[k]] where upper[k] = 0

axis after axis, the first one first, in float32. Of the channels' values at a voxel the index of
the greatest is kept, or ``v >= least``, or the label of the last channel for which that is true.
"""

from __future__ import annotations

import torch
from torch import Tensor

from voxfuse.contract import Resampled

#: Elements at the target's size that exist at a time.
_BLOCK = 1 << 24


def resample_argmax(
    out: Tensor,
    input: Tensor,
    index: list[Tensor],
    weight: list[Tensor],
    kept: int,
    least: float,
    regions: list[int],
    round_to_half: bool,
) -> None:
    """Write the result into ``out``, a few slices of the target at a time."""
    slices = index[0].numel()
    size = input.shape[0]
    for places in index[1:]:
        size *= places.numel()
    step = max(_BLOCK // max(size, 1), 1)
    for first in range(0, slices, step):
        last = min(first + step, slices)
        values = interpolated(
            input,
            [index[0][first:last], *index[1:]],
            [weight[0][:, first:last], *weight[1:]],
        )
        if round_to_half:
            values = values.half().float()
        out[:, first:last] = _kept(values, kept, least, regions)


def interpolated(input: Tensor, index: list[Tensor], weight: list[Tensor]) -> Tensor:
    """The values (C, \\*target) in float32 (float64 with weights of that)."""
    exact = torch.float64 if weight[0].dtype == torch.float64 else torch.float32
    values = input
    for axis, (places, (lower, upper)) in enumerate(zip(index, weight, strict=True), 1):
        shape = [-1 if a == axis else 1 for a in range(input.ndim)]
        first = values.index_select(axis, places).to(exact)
        if not bool(upper.any()):
            values = first
            continue
        second = values.index_select(axis, (places + 1).clamp(max=values.shape[axis] - 1))
        both = first * lower.view(shape) + second.to(exact) * upper.view(shape)
        # What is not read does not count, infinite or NaN.
        values = torch.where(upper.view(shape) == 0, first, both)
    return values


def _kept(values: Tensor, kept: int, least: float, regions: list[int]) -> Tensor:
    if kept == Resampled.labels:
        return values.argmax(0, keepdim=True)
    if kept == Resampled.values:
        return values
    chosen = values >= least
    if kept == Resampled.mask:
        return chosen
    labels = torch.zeros(1, *values.shape[1:], dtype=torch.int64, device=values.device)
    for label, where in zip(regions, chosen, strict=True):
        labels[0][where] = label
    return labels
