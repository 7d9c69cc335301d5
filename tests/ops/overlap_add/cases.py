"""Patches for overlap_add's tests of all backends, and what rounding scales with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.accuracy import assert_accurate
from voxfuse import _library
from voxfuse.contract import Activation
from voxfuse.ops import overlap_add as ops
from voxfuse.reference.overlap_add import activated

ALL = (torch.ops.voxfuse, torch.ops.voxfuse_reference)
needs_library = pytest.mark.skipif(
    not _library.defines_operators(), reason="the compiled CPU library is not built"
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

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


@dataclass
class FusionArguments:
    """Arguments of the operators, with a volume of weight sums on the general path."""

    patches: Tensor
    origins: Tensor
    rows: Tensor
    weights: list[Tensor]
    total: Tensor | None
    volume: tuple[int, ...]
    activation: int = 0

    def forward(self, namespace=torch.ops.voxfuse, patches=None) -> Tensor:
        patches = self.patches if patches is None else patches
        return namespace.overlap_add(
            patches,
            self.origins,
            self.rows,
            self.weights,
            self.total,
            list(self.volume),
            self.activation,
        )

    def backward(self, grad, namespace=torch.ops.voxfuse) -> Tensor:
        return namespace.overlap_add_backward(
            grad,
            self.origins,
            self.rows,
            self.weights,
            self.total,
            self.patches.to(grad.dtype) if self.activation else None,
            self.activation,
        )


def make_case(
    volume,
    patch,
    count,
    *,
    channels=2,
    dtype=torch.float32,
    dense=False,
    general=False,
    activation=0,
    seed=0,
) -> FusionArguments:
    """Random patches at random origins, some of them partly or wholly outside the volume."""
    generator = torch.Generator().manual_seed(seed)
    axes = len(volume)
    origins = torch.stack(
        [
            torch.randint(-p - 1, v + 2, (count,), generator=generator)
            for v, p in zip(volume, patch, strict=True)
        ],
        1,
    )
    rows = torch.randint(0, 3, (count, axes), generator=generator)
    if dense and axes > 1:
        weights = [torch.rand(1, *patch, dtype=torch.float64, generator=generator) + 0.01]
    else:
        weights = [torch.rand(3, p, dtype=torch.float64, generator=generator) + 0.01 for p in patch]
    total = None
    if general:
        total = torch.zeros(volume, dtype=torch.float64)
        ops.overlap_weights_(total, origins, rows, weights, backend="reference")
    patches = torch.randn(count, channels, *patch, generator=generator).to(dtype)
    return FusionArguments(patches, origins, rows, weights, total, tuple(volume), activation)


def fusion_case(
    patch: tuple[int, ...], volume: tuple[int, ...], count: int, channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """Patches at random origins, some partly or wholly outside; separable tables, a window."""
    generator = torch.Generator().manual_seed(count + sum(patch))
    axes = len(patch)
    patches = torch.randn(count, channels, *patch, generator=generator, dtype=torch.float64)
    low = torch.tensor([-p for p in patch])
    high = torch.tensor([v + 1 for v in volume])
    origins = low + (torch.rand(count, axes, generator=generator) * (high - low)).long()
    if count > 2:
        origins[0] = 0
        origins[1] = 2**40
        origins[2] = -(2**62)
    rows = torch.randint(0, 3, (count, axes), generator=generator)
    tables = [torch.rand(3, p, generator=generator, dtype=torch.float64) + 0.1 for p in patch]
    window = torch.rand(1, *patch, generator=generator, dtype=torch.float64) + 0.1
    return patches.to(dtype), origins, rows, tables, window


def assert_fused(
    actual: Tensor, run: Callable[[Tensor], Tensor], patches: Tensor, dtype: torch.dtype, what: str
) -> None:
    """``run`` fuses patches of a given type with the reference."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    truth, plain = run(patches.double()), run(patches.to(compute))
    size = run(patches.double().abs())
    # Every product and every addition rounds once; at most some tens of patches overlap. The
    # result is rounded once more to a half type.
    allowance = 2 if dtype == compute else 1
    assert_accurate(
        actual, plain.to(dtype), truth, scale=size, dtype=dtype, allowance=allowance, what=what
    )
