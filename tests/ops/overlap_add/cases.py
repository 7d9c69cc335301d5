"""What tests of fusing activated patches share: the activations, and what rounding scales with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from voxfuse.contract import Activation
from voxfuse.reference.overlap_add import activated

#: Channel counts: one, in registers on a GPU (also by a part of a group), and kept beside.
CHANNELS = (1, 2, 3, 5, 9, 13)


def gradient_scale(patches: Tensor, weighted: Tensor, activation: int) -> Tensor:
    """Magnitude of the terms of the patches' gradient, given the weighted gradient of the sum.

    Softmax: ``p_c (|a_c| + sum_k p_k |a_k|)``, whose two terms may cancel.
    """
    weighted = weighted.double().abs()
    if activation == Activation.none:
        return weighted
    p = activated(patches.double(), activation, 1)
    if activation == Activation.softmax:
        return p * (weighted + (p * weighted).sum(1, keepdim=True))
    return p * (1 - p) * weighted


def special_patches(dtype: torch.dtype, channels: int) -> Tensor:
    """One patch (1, channels, 9): a voxel of everything that a softmax treats in a way of its own.

    Infinities among numbers, alone and of both signs, NaN, and logits far apart.
    """
    inf, nan = math.inf, math.nan
    large = torch.finfo(dtype).max / 2
    patches = torch.linspace(-1, 1, 9 * channels, dtype=torch.float64).reshape(1, channels, 9)
    patches[0, 0, 0] = inf
    patches[0, 0, 1] = -inf
    patches[0, :, 2] = -inf
    patches[0, 0, 3] = nan
    patches[0, 0, 4] = large
    patches[0, 0, 5] = -large
    patches[0, :-1, 6] = -inf
    patches[0, -1, 7] = nan
    patches[0, :, 7] = torch.where(patches[0, :, 7].isnan(), nan, -inf)
    return patches.to(dtype)
