"""Targets at a coarser resolution in which what is small survives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from voxfuse.reference.soft_confusion import classes_of, is_ignored, label_complaint


def _ordered(tensor: Tensor) -> Tensor:
    """In a type that PyTorch orders."""
    wide = tensor.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return tensor.to(torch.int64) if wide else tensor


def pool_max(tensor: Tensor, size: Sequence[int]) -> Tensor:
    """Maximum over the voxels that each of ``size`` voxels covers, along the trailing axes.

    Voxel i of m covers floor(i n / m) to ceil((i + 1) n / m) of n, as in
    ``torch.nn.AdaptiveMaxPool3d``. Any number of axes, any type; along one axis after the other.
    """
    kind, tensor = tensor.dtype, _ordered(tensor)
    for axis, length in zip(range(-len(size), 0), size, strict=True):
        own = tensor.shape[axis]
        if own == length:
            continue
        if own % length == 0:
            tensor = tensor.unflatten(axis, (length, own // length)).amax(axis)
            continue
        voxel = torch.arange(length, device=tensor.device)
        first = voxel * own // length
        last = -(-(voxel + 1) * own // length) - 1
        result = tensor.index_select(axis, first)
        for step in range(1, -(-own // length) + 1):
            covered = torch.minimum(first + step, last)
            result = torch.maximum(result, tensor.index_select(axis, covered))
        tensor = result
    return tensor.to(kind)


def pool_labels(
    labels: Tensor, size: Sequence[int], classes: int, ignore_index: int | None, mask: Tensor | None
) -> Tensor:
    r"""Of the classes that a coarse voxel covers the rarest in the sample, in the labels' own type.

    Ties go to the higher class. A voxel is ignored if all that it covers are ignored or masked out;
    a label that is neither a class nor ignored wins, so that the loss finds it.

    Args:
        labels: (B, [1,] \*spatial).
        mask: as ``labels``; voxels of 0 do not count.
    """
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        complaint = label_complaint(labels, classes, ignore_index)
        if complaint is not None:
            raise ValueError(complaint)
    index, known = classes_of(labels, classes, ignore_index)
    left_out = torch.zeros_like(known)
    if ignore_index is not None:
        left_out = is_ignored(labels, ignore_index)
    if mask is not None:
        left_out = left_out | (mask == 0)
    # Behind the classes: the wrong labels, and those left out.
    index = index.masked_fill(~known, classes).masked_fill(left_out, classes + 1).flatten(1)
    counts = torch.zeros(index.shape[0], classes + 2, dtype=torch.int64, device=index.device)
    counts.scatter_add_(1, index, torch.ones_like(index))
    order = torch.sort(counts[:, :classes], stable=True, dim=1, descending=True).indices
    # Ranks from 1 on, the rarest last; 0 is left out.
    rank = torch.zeros_like(counts)
    ranks = torch.arange(1, classes + 1, device=index.device).expand_as(order)
    rank.scatter_(1, order, ranks)
    rank[:, classes] = classes + 1
    ranked = rank.gather(1, index).reshape(labels.shape)
    pooled = pool_max(ranked.to(torch.int16 if classes < 2**15 - 1 else torch.int64), size)
    # Without a label to ignore only the mask leaves voxels out, and theirs is any class.
    ignored = 0 if ignore_index is None else ignore_index
    ends = torch.tensor([ignored, classes], device=index.device).expand(index.shape[0], 2)
    label = torch.cat([ends[:, :1], order, ends[:, 1:]], 1)
    result = label.gather(1, pooled.flatten(1).to(torch.int64)).reshape(pooled.shape)
    return result.to(labels.dtype)


def pool_one_class(
    target: Tensor, size: Sequence[int], ignore_index: int | None, mask: Tensor | None
) -> Tensor:
    r"""The maximum of an indicator (B, [1,] \*spatial), which an unknown label would win."""
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        counted = None if mask is None else mask != 0
        # Soft values are the loss's to judge.
        if not target.is_floating_point() or bool((target == target.round()).all()):
            complaint = label_complaint(target, 2, ignore_index, counted)
            if complaint is not None:
                raise ValueError(complaint)
    return pool_dense(target, size, ignore_index, mask)


def pool_regions(target: Tensor, size: Sequence[int], mask: Tensor | None) -> Tensor:
    r"""nnU-Net's regions (B, C + 1, \*spatial), of which the last channel is 1 where voxels are
    left out: the maximum of the others over the rest. Left out is what covers none of the rest."""
    counted = target[:, -1:] != 1
    within = counted if mask is None else counted & (mask != 0)
    regions = pool_dense(target[:, :-1], size, None, within)
    return torch.cat([regions, (~pool_max(counted, size)).to(target.dtype)], 1)


def pool_dense(
    target: Tensor, size: Sequence[int], ignore_index: int | None, mask: Tensor | None
) -> Tensor:
    r"""The maximum of every channel (B, C, \*spatial) over the voxels that count."""
    left_out = torch.zeros((), dtype=torch.bool, device=target.device)
    if ignore_index is not None:  # of one class, whose indicator has it
        left_out = is_ignored(target, ignore_index)
    if mask is not None:
        left_out = left_out | (mask == 0)
    pooled = pool_max(_ordered(target).masked_fill(left_out, 0), size)
    if ignore_index is not None:
        pooled = pooled.masked_fill(~pool_max(~left_out, size), ignore_index)
    return pooled.to(target.dtype)
