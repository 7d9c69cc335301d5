"""Soft confusion of a linear head's logits, chunk by chunk: the logits never exist as a whole.

The head is ``logits = weight @ features + bias`` at every voxel. A chunk of voxels is multiplied
out, reduced by :mod:`voxfuse.reference.soft_confusion` and thrown away; the backward pass does it
again and, from the chunk's logit gradient dz, adds up::

    d features = weight^T dz        d weight = sum_v dz features^T        d bias = sum_v dz
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from voxfuse.contract import CORE, FULL, Unlabelled
from voxfuse.reference import soft_confusion as reference


class Chunk(NamedTuple):
    """Some voxels of one sample, every tensor with a batch axis of 1 and one voxel axis."""

    sample: int
    voxels: slice
    features: Tensor
    logits: Tensor
    target: Tensor
    voxel_weight: Tensor | None
    included: Tensor


def chunk_voxels(classes: int, channels: int, itemsize: int, chunk_bytes: int) -> int:
    """Voxels whose logits and features together take at most ``chunk_bytes``, at least one."""
    return max(1, chunk_bytes // ((classes + channels) * itemsize))


def chunks(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    voxel_weight: Tensor | None,
    ignore_index: int | None,
    chunk_bytes: int,
    unlabelled: int,
    annotated: Tensor | None,
) -> Iterator[Chunk]:
    """Walk over the samples' voxels; features of excluded voxels come as 0."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    batch, channels = features.shape[:2]
    classes = weight.shape[0]
    matrix = weight.to(dtype)
    offset = None if bias is None else bias.to(dtype).unsqueeze(1)
    flat = features.flatten(2) if features.ndim > 2 else features.unsqueeze(2)
    dense = reference.is_dense(features, target, classes)
    if not dense:
        reference.check_labels(target, classes, ignore_index)  # whole, to know the place
    companions = [
        None if x is None else x.reshape(batch, k, flat.shape[2])
        for x, k in ((target, classes if dense else 1), (voxel_weight, 1))
    ]
    step = chunk_voxels(classes, channels, dtype.itemsize, chunk_bytes)
    for sample in range(batch):
        for start in range(0, flat.shape[2], step):
            part = slice(start, start + step)
            g, w = (None if x is None else x[sample : sample + 1, :, part] for x in companions)
            assert g is not None
            included = torch.ones_like(g[:, :1], dtype=torch.bool)
            if w is not None:
                included = w != 0
            if ignore_index is not None:
                included = included & ~reference.is_ignored(g[:, :1], ignore_index)
            if not dense:
                labels, known = reference.classes_of(g, classes, ignore_index)
                if annotated is not None and unlabelled == Unlabelled.exclude:
                    known = known & annotated[sample][labels.clamp(0, classes - 1)]
                included = included & known
            f = flat[sample, :, part].to(dtype).masked_fill(~included[0], 0)
            z = matrix @ f if offset is None else torch.addmm(offset, matrix, f)
            yield Chunk(sample, part, f, z.unsqueeze(0), g, w, included)


def head_confusion(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    voxel_weight: Tensor | None,
    activation: int,
    likelihood: int,
    overlap: int,
    ignore_index: int | None,
    gamma: float,
    full: bool,
    chunk_bytes: int,
    focal_classes: int | None = None,
    unlabelled: int = Unlabelled.exclude,
    annotated: Tensor | None = None,
    *,
    confusion: Callable[..., Tensor] = reference.soft_confusion,
) -> Tensor:
    """Return the (B, C, 4 or 8) float64 sums of ``soft_confusion`` at the head's logits.

    ``confusion`` reduces a chunk; a faster backend may pass its own.
    """
    shape = (features.shape[0], weight.shape[0], FULL if full else CORE)
    sums = torch.zeros(shape, dtype=torch.float64, device=features.device)
    options = (activation, likelihood, overlap, ignore_index, gamma)
    tensors = (features, weight, bias, target, voxel_weight)
    if annotated is not None:
        reference.check_annotated(annotated, unlabelled)
    classes = weight.shape[0]
    if reference.is_dense(features, target, classes):
        # Whole, to know the place.
        reference.check_range(target, classes, voxel_weight, ignore_index, annotated, unlabelled)
    for chunk in chunks(*tensors, ignore_index, chunk_bytes, unlabelled, annotated):
        rest = (*options, full, focal_classes, unlabelled, _of_sample(annotated, chunk), True)
        g, w = _labels(chunk, weight), chunk.voxel_weight
        sums[chunk.sample] += confusion(chunk.logits, g, w, *rest)[0]
    return sums


def head_confusion_backward(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    voxel_weight: Tensor | None,
    activation: int,
    likelihood: int,
    overlap: int,
    ignore_index: int | None,
    gamma: float,
    chunk_bytes: int,
    need_features: bool,
    need_head: bool,
    focal_classes: int | None = None,
    unlabelled: int = Unlabelled.exclude,
    annotated: Tensor | None = None,
    *,
    confusion_backward: Callable[..., Tensor] = reference.soft_confusion_backward,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients at features, weight and bias; empty ones for what is not needed."""
    weight_sum = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    bias_sum = weight_sum.new_zeros(weight.shape[0])
    result = torch.empty_like(features) if need_features else features.new_empty(0)
    options = (activation, likelihood, overlap, ignore_index, gamma)
    matrix = None
    gradient = None
    if need_features:
        # Written through a contiguous view of the voxel axes; laid out like features at the end.
        gradient = features.new_empty((*features.shape[:2], math.prod(features.shape[2:])))
    tensors = (features, weight, bias, target, voxel_weight)
    if annotated is not None:
        reference.check_annotated(annotated, unlabelled)
    for chunk in chunks(*tensors, ignore_index, chunk_bytes, unlabelled, annotated):
        cotangent = grad[chunk.sample : chunk.sample + 1]
        rest = (*options, focal_classes, unlabelled, _of_sample(annotated, chunk))
        g, w = _labels(chunk, weight), chunk.voxel_weight
        dz = confusion_backward(cotangent, chunk.logits, g, w, *rest)[0]
        if gradient is not None:
            if matrix is None:
                matrix = weight.to(dz.dtype).t()
            df = (matrix @ dz).masked_fill(~chunk.included[0], 0)
            gradient[chunk.sample, :, chunk.voxels] = df.to(features.dtype)
        if need_head:
            weight_sum += dz @ chunk.features.t()
            bias_sum += dz.sum(1)
    if gradient is not None:
        result.copy_(gradient.reshape(features.shape))
    if not need_head:
        return result, weight.new_empty(0), weight.new_empty(0)
    return (
        result,
        weight_sum.to(weight.dtype),
        weight.new_empty(0) if bias is None else bias_sum.to(bias.dtype),
    )


def _of_sample(annotated: Tensor | None, chunk: Chunk) -> Tensor | None:
    return None if annotated is None else annotated[chunk.sample : chunk.sample + 1]


def _labels(chunk: Chunk, weight: Tensor) -> Tensor:
    """The chunk's target as soft_confusion takes it: dense, or labels without a channel."""
    return chunk.target if chunk.target.shape[1] == weight.shape[0] else chunk.target[:, 0]
