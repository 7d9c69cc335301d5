"""Reading a tile of features and making its logits."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from voxfuse.triton_kernels.soft_confusion.load import class_index, offset_of


class HeadOptions(NamedTuple):
    """Compile-time parameters of the kernels beside soft_confusion's."""

    CHANNELS: int  # features that are multiplied at once
    ONE_STEP: bool  # whether these are all
    OPERAND: Any  # what features and weight are multiplied as
    PRECISION: str  # of the products
    NEED_FEATURES: bool = True  # gradients that are asked for
    NEED_HEAD: bool = True


class Head(NamedTuple):
    """The weight (classes, channels) and the bias (classes), or None; on the host tensors."""

    weight: Any
    bias: Any


@triton.jit
def load_weight(weight, start, classes, channels, O: tl.constexpr, H: tl.constexpr):
    """The weight's columns from ``start`` on, (CLASSES, CHANNELS)."""
    index = tl.arange(0, O.CLASSES)[:, None]
    k = start + tl.arange(0, H.CHANNELS)[None, :]
    mask = (index < classes) & (k < channels)
    return tl.load(weight + index * channels + k, mask=mask, other=0.0)


@triton.jit
def load_features(features, start, tile, included, channels, H: tl.constexpr):
    """(CHANNELS, BLOCK) features, 0 where the voxel is excluded (its own may be NaN)."""
    k = start + tl.arange(0, H.CHANNELS)[:, None]
    place = features.pointer + k.to(tl.int64) * features.channel + offset_of(features, tile)
    return tl.load(place, mask=included & (k < channels), other=0.0)


@triton.jit
def logits_of(features, head, tile, included, classes, channels, O: tl.constexpr, H: tl.constexpr):
    """(CLASSES, BLOCK) float32 logits of a tile."""
    z = tl.zeros([O.CLASSES, O.BLOCK], tl.float32)
    if head.bias is not None:
        index = class_index(0, O)
        z += tl.load(head.bias + index, mask=index < classes, other=0.0).to(tl.float32)
    if H.ONE_STEP:
        w = load_weight(head.weight, 0, classes, channels, O, H).to(H.OPERAND)
        f = load_features(features, 0, tile, included, channels, H).to(H.OPERAND)
        z = tl.dot(w, f, z, input_precision=H.PRECISION)
    else:
        for k in range(0, channels, H.CHANNELS):
            w = load_weight(head.weight, k, classes, channels, O, H).to(H.OPERAND)
            f = load_features(features, k, tile, included, channels, H).to(H.OPERAND)
            z = tl.dot(w, f, z, input_precision=H.PRECISION)
    return z
