"""Channels interpolated to another grid and decided between, in one pass.

A program owns BLOCK target voxels of one slice and walks through the channels. A voxel is a mean of
means: between two slices, two rows, two columns, in this order. What is decided of it so far stays
in registers.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from voxfuse import contract
from voxfuse.contract import Resampled
from voxfuse.triton_kernels.launches import LAUNCH_OPTIONS, device_guard
from voxfuse.triton_kernels.views import constexprs

#: Target voxels and warps of a program.
BLOCK = 256
WARPS = 4


class Options(NamedTuple):
    """What the kernel is compiled for."""

    KEPT: int
    HALF: bool  # values are rounded to float16 before anything is decided
    BLOCK: int = BLOCK


class Axis(NamedTuple):
    """One axis; one that the input lacks has neither tables nor a second voxel."""

    index: Any  # int64 (target,)
    weight: Any  # float32 (2, target)
    source: Any
    target: Any
    stride: Any


class Volume(NamedTuple):
    """Input and its axes, the result, and the label of every channel where there are regions."""

    input: Any
    out: Any
    regions: Any
    channels: Any
    channel: Any  # stride
    z: Axis
    y: Axis
    x: Axis


@triton.jit
def _neighbours(axis, k, inside):
    """Where target voxel k's lower source voxel lies, and the two weights."""
    if axis.index is None:
        lower = k.to(tl.int64) * 0
        w1 = (k * 0).to(tl.float32)
        w0 = w1 + 1
    else:
        end = axis.source - 1
        # A table from elsewhere must not lead outside.
        lower = tl.load(axis.index + k, mask=inside, other=0)
        lower = tl.minimum(tl.maximum(lower, 0), end)
        w0 = tl.load(axis.weight + k, mask=inside, other=0)
        w1 = tl.load(axis.weight + axis.target + k, mask=inside, other=0)
        w1 = tl.where(lower < end, w1, 0.0)
    return lower * axis.stride, w0, w1


@triton.jit
def _mean(lower, upper, w0, w1):
    """With an upper weight of 0 it is the lower one as it is, whatever the other."""
    return tl.where(w1 == 0, lower, tl.fma(upper, w1, lower * w0))


@triton.jit
def _between_slices(volume, pointer, inside, z0, z1):
    value = tl.load(pointer, mask=inside, other=0).to(tl.float32)
    if z1 != 0:
        upper = tl.load(pointer + volume.z.stride, mask=inside, other=0).to(tl.float32)
        value = tl.fma(upper, z1, value * z0)
    return value


@triton.jit
def _between_rows(volume, pointer, inside, z0, z1, y0, y1):
    value = _between_slices(volume, pointer, inside, z0, z1)
    if volume.y.index is not None:
        upper = _between_slices(volume, pointer + volume.y.stride, inside & (y1 != 0), z0, z1)
        value = _mean(value, upper, y0, y1)
    return value


@triton.jit
def resample(volume, least: tl.float32, blocks, OPTIONS: tl.constexpr):
    """BLOCK voxels of one target slice."""
    O: tl.constexpr = OPTIONS
    program = tl.program_id(0)
    slice = (program // blocks).to(tl.int64)
    plane = (tl.full([], 0, tl.int64) + volume.y.target) * volume.x.target
    voxel = (program % blocks).to(tl.int64) * O.BLOCK + tl.arange(0, O.BLOCK)
    inside = voxel < plane
    z, z0, z1 = _neighbours(volume.z, slice, slice < volume.z.target)
    y, y0, y1 = _neighbours(volume.y, voxel // volume.x.target, inside)
    x, x0, x1 = _neighbours(volume.x, voxel % volume.x.target, inside)
    corner = z + y + x
    pair = inside & (x1 != 0)
    out = volume.out + slice * plane + voxel
    kind = volume.out.dtype.element_ty
    channel = volume.input

    most = tl.full([O.BLOCK], 0, tl.float32)
    label = tl.full([O.BLOCK], 0, tl.int64 if O.KEPT == contract.Resampled.regions else tl.int32)
    for c in range(0, volume.channels):
        pointer = channel + corner
        left = _between_rows(volume, pointer, inside, z0, z1, y0, y1)
        right = _between_rows(volume, pointer + volume.x.stride, pair, z0, z1, y0, y1)
        value = _mean(left, right, x0, x1)
        if O.HALF:
            value = value.to(tl.float16).to(tl.float32)
        if O.KEPT == contract.Resampled.labels:
            # The first NaN is the greatest.
            greater = (value > most) | ((value != value) & (most == most)) | (c == 0)
            most = tl.where(greater, value, most)
            label = tl.where(greater, c, label)
        elif O.KEPT == contract.Resampled.regions:
            label = tl.where(value >= least, tl.load(volume.regions + c), label)
        else:
            own = value if O.KEPT == contract.Resampled.values else value >= least
            tl.store(out, own.to(kind), mask=inside)
            out += volume.z.target * plane
        channel += volume.channel
    if O.KEPT == contract.Resampled.labels or O.KEPT == contract.Resampled.regions:
        tl.store(out, label.to(kind), mask=inside)


# --- launches ------------------------------------------------------------------------------------


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Types that a kernel writes the bits of."""
    kinds = {torch.bool: torch.uint8, torch.uint16: torch.int16}
    return tensor.view(kinds.get(tensor.dtype, tensor.dtype))


def resample_argmax(
    out: torch.Tensor,
    input: torch.Tensor,
    index: list[torch.Tensor],
    weight: list[torch.Tensor],
    kept: int,
    least: float,
    regions: list[int],
    round_to_half: bool,
) -> None:
    """Write the result into ``out``."""
    if out.numel() == 0:
        return
    tables = zip(index, weight, input.shape[1:], out.shape[1:], input.stride()[1:], strict=True)
    axes = [Axis(None, None, 1, 1, 0)] * (4 - input.ndim) + [Axis(*table) for table in tables]
    labels = None
    if kept == Resampled.regions:
        # Filled one by one: a copy from the host would be waited for.
        labels = torch.empty(len(regions), dtype=torch.int64, device=input.device)
        for place, label in zip(labels, regions, strict=True):
            place.fill_(label)
    if input.dtype == torch.bool:
        input = input.view(torch.uint8)
    blocks = triton.cdiv(axes[1].target * axes[2].target, BLOCK)
    programs = axes[0].target * blocks
    volume = Volume(input, _bits(out), labels, input.shape[0], input.stride(0), *axes)
    with device_guard(input):
        resample[(programs,)](
            volume,
            least,
            blocks,
            constexprs(Options(kept, round_to_half)),
            num_warps=WARPS,
            **LAUNCH_OPTIONS,
        )
