"""Counts of right and wrong voxels in plain PyTorch: the truth that every kernel is measured by.

For sample b and class c, over the voxels that count, with prediction p and target g of 0 or 1::

    TP = sum p g      FP = sum p (1 - g)      FN = sum (1 - p) g      TN = sum (1 - p) (1 - g)

Written to be read; it materialises what the kernels never do.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct

import torch
from torch import Tensor

from voxfuse.contract import Activation, Decision
from voxfuse.reference.soft_confusion import check_labels, classes_of, is_dense


def hard_confusion(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    decision: int,
    least: float,
    num_classes: int | None,
    ignore_index: int | None,
) -> Tensor:
    """Return (B, C, 4) int64: TP, FP, FN and TN of every sample and class.

    With ``Decision.threshold`` a class is predicted where its logit, as float32, is at or above
    ``least``; see :func:`least_above`.
    """
    classes = input.shape[1] if num_classes is None else num_classes
    counted, g = _truth(input, target, mask, decision, classes, ignore_index)
    index = torch.arange(classes, device=input.device).reshape(1, classes, 1)
    if decision == Decision.threshold:
        p = _voxels(input, classes).to(torch.float32) >= least
    elif decision == Decision.argmax:
        p = _voxels(input, classes).argmax(1, keepdim=True) == index
    else:
        check_labels(input, classes, None, counted, name="input")
        predicted, known = classes_of(_voxels(input, 1), classes, None)
        counted, p = counted & known, predicted == index
    terms = (p & g, p & ~g, ~p & g, ~p & ~g)
    return torch.stack([(term & counted).sum(-1) for term in terms], -1)


def _truth(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    decision: int,
    classes: int,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    """Which voxels count, (B, 1 or C, V), and which of them are of a class, (B, C, V)."""
    if decision != Decision.labels and is_dense(input, target):
        # A value a class: 0, 1 or the ignored one, which leaves the voxel out for that class.
        check_labels(target, 2, ignore_index)
        value, counted = classes_of(_voxels(target, classes), 2, ignore_index)
        g = value == 1
    else:
        check_labels(target, classes, ignore_index)
        labels, counted = classes_of(_voxels(target, 1), classes, ignore_index)
        g = labels == torch.arange(classes, device=input.device).reshape(1, classes, 1)
    if mask is not None:
        counted = counted & (_voxels(mask, 1) != 0)
    return counted, g


def _voxels(tensor: Tensor, channels: int) -> Tensor:
    """(B, channels, V) of (B, *spatial), (B, 1, *spatial) or (B, C, *spatial)."""
    # An extent of -1 is ambiguous where there are no samples.
    return tensor.reshape(tensor.shape[0], channels, math.prod(tensor.shape[1:]) // channels)


def least_above(activation: int, threshold: float) -> float:
    """The least float32 logit whose activation is above ``threshold``, NaN if there is none.

    The activation is computed, and rounded to float32, as the threshold is: of a sigmoid's true
    value, so that the bound does not depend on a library. ``torch.sigmoid`` in float32 may err by
    a unit in the last place; where it does right at the threshold, it differs.
    """
    return _least_above(activation, threshold)


# A compiler takes the bound as the constant that it is.
least_above._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _least_above(activation: int, threshold: float) -> float:
    level = _float32(threshold)

    def above(ordinal: int) -> bool:
        x = _float_at(ordinal)
        return (_float32(_sigmoid(x)) if activation == Activation.sigmoid else x) > level

    low, high = -_ORDINAL_OF_INFINITY, _ORDINAL_OF_INFINITY
    if not above(high):
        return math.nan
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if above(middle) else (middle + 1, high)
    return _float_at(low)


#: The place of infinity among all float32, 0 being 0; that of -x is minus that of x.
_ORDINAL_OF_INFINITY = 0x7F800000


def _float_at(ordinal: int) -> float:
    (x,) = struct.unpack("<f", struct.pack("<I", abs(ordinal)))
    return float(math.copysign(x, ordinal))


def _float32(x: float) -> float:
    """``x`` rounded to float32; beyond its largest number, infinity."""
    return ctypes.c_float(x).value


def _sigmoid(x: float) -> float:
    e = math.exp(-abs(x))
    return (e if x < 0 else 1.0) / (1 + e)
