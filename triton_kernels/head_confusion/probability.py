"""Labels with softmax: what a tile's logits say of the label's class."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from voxfuse.triton_kernels.numerics import finite
from voxfuse.triton_kernels.soft_confusion.load import class_index


class LabelSoftmax(NamedTuple):
    """exp(z - largest) and whether it is the label's, (CLASSES, BLOCK); of the label's class
    z - largest, its exponential, the sum over the others and over all, (1, BLOCK).
    """

    e: Any
    hit: Any
    d_label: Any
    e_label: Any
    others: Any
    total: Any


@triton.jit
def softmax_by_label(z, label, classes, O: tl.constexpr):
    """The ``LabelSoftmax`` of a tile's logits."""
    index = class_index(0, O)
    z = tl.where(index < classes, finite(z), float("-inf"))
    d = z - tl.max(z, axis=0, keep_dims=True)
    e = tl.exp(d)
    hit = label == index
    d_label = tl.sum(tl.where(hit, d, 0.0), axis=0, keep_dims=True)
    others = tl.sum(tl.where(hit, 0.0, e), axis=0, keep_dims=True)
    e_label = tl.exp(d_label)
    return LabelSoftmax(e, hit, d_label, e_label, others, e_label + others)


@triton.jit
def minus_log_of_label(s):
    """-log of the label's probability; accurate near 1 to relative precision."""
    rest = (s.others - (s.total - s.e_label)) / s.total
    return tl.log(s.total) + rest - s.d_label
