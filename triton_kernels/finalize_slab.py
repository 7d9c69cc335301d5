"""Finalisation of a ring's slices: one pass over the channels of every voxel.

A program owns a block of voxels and walks through their classes, TILE at a time. It keeps of every
voxel the greatest value, its index, ``sum e`` and ``sum e (z - max)`` with ``e = exp(z - max)``;
the sums are scaled whenever the greatest value grows. Only the probabilities of a softmax over more
classes than a tile are walked twice, so that the second walk may find the block in cache. Nothing
is allocated.

Around the ring's axis a ring is (channels, outer, depth, inner), and (depth, inner) is walked as
one axis of length ``turn`` that the slab enters at ``first``. Where it wraps around, a new block
begins, so that the voxels of a block are neighbours in memory.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from voxfuse import contract
from voxfuse.contract import Activation, Finish
from voxfuse.triton_kernels.launches import LAUNCH_OPTIONS, device_guard, power_of_two
from voxfuse.triton_kernels.numerics import exponential, log_of_sum, reciprocal, sigmoid_alone
from voxfuse.triton_kernels.views import constexprs

#: Classes that a program holds in registers at once.
TILE = 8
#: Voxels and warps of a program: 16 bytes of float32 a thread.
BLOCK = 512
WARPS = 4


class Tensors(NamedTuple):
    """The ring, what is written, the sums of weights, and a linear layer from channels to classes.

    The last three may be None; all but ``out`` are contiguous.
    """

    ring: Any
    out: Any
    total: Any
    weight: Any
    bias: Any


class Slab(NamedTuple):
    """A ring as (channels, outer, turn): where on the turn the slab's ``voxels`` begin, and how
    many lie before it wraps around; strides of what is written, in elements.
    """

    outer: Any
    turn: Any
    first: Any
    before: Any
    voxels: Any
    out_channel: Any
    out_outer: Any


class Options(NamedTuple):
    """What the kernel is compiled for."""

    MODE: int
    ACTIVATION: int
    BINARY: bool  # every channel is a probability of its own
    DIVIDE: bool
    CLEAR: bool
    DTYPE: tl.dtype
    SINGLE: bool  # TILE holds all classes
    TILE: int
    WIDTH: int
    BLOCK: int = BLOCK


class Voxels(NamedTuple):
    """A program's voxels: where in a channel of the ring and of what is written, which of them
    there are, and which of those patches cover (None: all); a channel's stride in the ring.
    """

    source: Any
    target: Any
    stride: Any
    inside: Any
    covered: Any


class Kept(NamedTuple):
    """What is kept of every voxel: the greatest value and its class, and the sums."""

    best: Any
    where: Any
    shift: Any
    sums: Any
    products: Any


@triton.jit
def _feature(ring, k, voxels, mask, divisor, OPTIONS: tl.constexpr):
    """Channel ``k`` of the ring over the divisor."""
    value = tl.load(ring + k * voxels.stride + voxels.source, mask=mask, other=0.0)
    if OPTIONS.DIVIDE:
        # Rounded correctly: a tie stays a tie.
        if OPTIONS.DTYPE == tl.float32:
            value = tl.div_rn(value, tl.full(value.shape, divisor, OPTIONS.DTYPE))
        else:
            value = value / tl.full(value.shape, divisor, OPTIONS.DTYPE)
    return value


@triton.jit
def _values(tensors, base, channels, classes, voxels, divisor, OPTIONS: tl.constexpr):
    """The values ``z`` of TILE classes from ``base`` on; what is not a class is 0."""
    values = ()
    if tensors.weight is None:
        for c in tl.static_range(OPTIONS.TILE):
            mask = voxels.inside & (base + c < classes)
            values = values + (_feature(tensors.ring, base + c, voxels, mask, divisor, OPTIONS),)
    else:
        for c in tl.static_range(OPTIONS.TILE):
            offset = tl.load(tensors.bias + base + c, mask=base + c < classes, other=0.0)
            values = values + (tl.zeros([OPTIONS.BLOCK], OPTIONS.DTYPE) + offset,)
        for k in range(channels):
            value = _feature(tensors.ring, k, voxels, voxels.inside, divisor, OPTIONS)
            new = ()
            row = tensors.weight + base * channels + k
            for c in tl.static_range(OPTIONS.TILE):
                factor = tl.load(row + c * channels, mask=base + c < classes, other=0.0)
                new = new + (values[c] + factor * value,)
            values = new
    return values


@triton.jit
def _surprise(p):
    """``-p log p``, 0 at 0."""
    return tl.where(p == 0, 0.0, -p * tl.log(p))


@triton.jit
def _entropy(z, OPTIONS: tl.constexpr):
    """What a class contributes where it is no softmax."""
    if OPTIONS.ACTIVATION == contract.Activation.sigmoid:
        distance = tl.abs(z)
        e = exponential(-distance)
        rest = tl.where(e == 0, 0.0, distance * e)
        result = log_of_sum(1.0, e, 1.0 + e) + rest * reciprocal(1.0 + e)
    else:
        result = _surprise(z)
        if OPTIONS.BINARY:
            result += _surprise(1.0 - z)
    return result


@triton.jit
def _store(out, place, value, voxels, fill, mask):
    element = out.dtype.element_ty
    if not element.is_int() and element != tl.float64:
        value = value.to(tl.float32)
    value = value.to(element)
    if voxels.covered is not None:
        if element.is_int():
            other = tl.full([1], fill, tl.float64).to(tl.int64)
        else:
            other = tl.full([1], fill, tl.float32)
        value = tl.where(voxels.covered, value, other.to(element))
    tl.store(out + place, value, mask=mask)


@triton.jit
def _take(kept, values, base, classes, OPTIONS: tl.constexpr):
    """What is kept of every voxel after TILE more classes."""
    best, where, shift, sums, products = kept
    entropy: tl.constexpr = OPTIONS.MODE == contract.Finish.entropy
    foreground: tl.constexpr = OPTIONS.MODE == contract.Finish.foreground
    if OPTIONS.ACTIVATION == contract.Activation.softmax:
        greatest = tl.full([OPTIONS.BLOCK], -float("inf"), OPTIONS.DTYPE)
        for c in tl.static_range(OPTIONS.TILE):
            z = tl.where(base + c < classes, values[c], -float("inf"))
            greatest = tl.maximum(greatest, z)
        greatest = tl.maximum(greatest, tl.where(sums == 0, -float("inf"), shift))
        # Before anything finite there is nothing to scale; infinity - infinity is no number.
        greatest = tl.where(greatest == -float("inf"), 0.0, greatest)
        step = shift - greatest
        scale = exponential(step)
        if entropy:
            products = tl.where(sums == 0, 0.0, scale * (products + step * sums))
        sums = tl.where(sums == 0, 0.0, scale * sums)
        shift = greatest
        for c in tl.static_range(OPTIONS.TILE):
            gap = values[c] - shift
            e = tl.where(base + c < classes, exponential(gap), 0.0)
            sums += e
            if entropy:
                products += tl.where(e == 0, 0.0, e * gap)
    elif entropy:
        for c in tl.static_range(OPTIONS.TILE):
            sums += tl.where(base + c < classes, _entropy(values[c], OPTIONS), 0.0)
    if foreground or OPTIONS.MODE == contract.Finish.labels:
        for c in tl.static_range(OPTIONS.TILE):
            z = values[c]
            better = ((z > best) | ((z != z) & (best == best))) & (base + c < classes)
            if foreground and not OPTIONS.BINARY:
                better = better & (base + c > 0)
            best = tl.where(better, z, best)
            where = tl.where(better, (base + c).to(tl.int32), where)
    return Kept(best, where, shift, sums, products)


@triton.jit
def _probability(z, kept, OPTIONS: tl.constexpr):
    """The activated value."""
    if OPTIONS.ACTIVATION == contract.Activation.sigmoid:
        z = sigmoid_alone(z)
    elif OPTIONS.ACTIVATION == contract.Activation.softmax:
        z = exponential(z - kept.shift) / kept.sums
    return z


@triton.jit
def _write_classes(
    out, stride, values, base, classes, voxels, kept, threshold, fill, OPTIONS: tl.constexpr
):
    """Write the values or the mask of TILE classes."""
    for c in tl.static_range(OPTIONS.TILE):
        p = _probability(values[c], kept, OPTIONS)
        if OPTIONS.MODE == contract.Finish.mask:
            p = p > tl.full([1], threshold, OPTIONS.DTYPE)
        place = (base + c) * stride + voxels.target
        _store(out, place, p, voxels, fill, voxels.inside & (base + c < classes))


@triton.jit
def finalize(
    tensors,
    channels,
    classes,
    slab,
    divisor: tl.float64,
    threshold: tl.float64,
    fill: tl.float64,
    OPTIONS: tl.constexpr,
):
    """BLOCK / WIDTH outer indices by WIDTH voxels of the slab."""
    out = tensors.out
    WIDTH: tl.constexpr = OPTIONS.WIDTH
    blocks_before = tl.cdiv(slab.before, WIDTH)
    blocks = blocks_before + tl.cdiv(slab.voxels - slab.before, WIDTH)
    program = tl.program_id(0)
    block = (program % blocks).to(tl.int64)
    wrapped = block >= blocks_before
    index = tl.arange(0, OPTIONS.BLOCK)
    row = (program // blocks).to(tl.int64) * (OPTIONS.BLOCK // WIDTH) + index // WIDTH
    start = tl.where(wrapped, block - blocks_before, block) * WIDTH
    column = start + index % WIDTH
    after = slab.voxels - slab.before
    inside = (row < slab.outer) & (column < tl.where(wrapped, after, slab.before))
    source = row * slab.turn + tl.where(wrapped, 0, slab.first) + column
    target = row * slab.out_outer + tl.where(wrapped, slab.before, 0) + column
    stride = tl.cast(slab.turn, tl.int64) * slab.outer
    covered = None
    if tensors.total is not None:
        covered = tl.load(tensors.total + source, mask=inside, other=0.0) != 0
    voxels = Voxels(source, target, stride, inside, covered)

    zeros = tl.zeros([OPTIONS.BLOCK], OPTIONS.DTYPE)
    lowest = tl.full([OPTIONS.BLOCK], -float("inf"), OPTIONS.DTYPE)
    kept = Kept(lowest, tl.zeros([OPTIONS.BLOCK], tl.int32), zeros, zeros, zeros)
    zero = tl.zeros([1], tl.int64)
    softmax: tl.constexpr = OPTIONS.ACTIVATION == contract.Activation.softmax
    by_class: tl.constexpr = (
        OPTIONS.MODE == contract.Finish.values or OPTIONS.MODE == contract.Finish.mask
    )
    if OPTIONS.SINGLE:
        values = _values(tensors, zero, channels, classes, voxels, divisor, OPTIONS)
        kept = _take(kept, values, zero, classes, OPTIONS)
        if by_class:
            _write_classes(
                out, slab.out_channel, values, zero, classes, voxels, kept, threshold, fill, OPTIONS
            )
    else:
        # The probabilities of a softmax need the sum over all classes first.
        if (not by_class) or softmax:
            for begin in range(0, classes, OPTIONS.TILE):
                base = zero + begin
                part = _values(tensors, base, channels, classes, voxels, divisor, OPTIONS)
                kept = _take(kept, part, base, classes, OPTIONS)
        if by_class:
            for begin in range(0, classes, OPTIONS.TILE):
                base = zero + begin
                part = _values(tensors, base, channels, classes, voxels, divisor, OPTIONS)
                _write_classes(
                    out,
                    slab.out_channel,
                    part,
                    base,
                    classes,
                    voxels,
                    kept,
                    threshold,
                    fill,
                    OPTIONS,
                )

    if OPTIONS.MODE == contract.Finish.labels:
        _store(out, target, kept.where, voxels, fill, inside)
    elif OPTIONS.MODE == contract.Finish.foreground:
        best = _probability(kept.best, kept, OPTIONS)
        _store(out, target, best, voxels, fill, inside)
    elif OPTIONS.MODE == contract.Finish.entropy:
        entropy = kept.sums
        if softmax:
            entropy = tl.log(entropy) - kept.products / entropy
        _store(out, target, entropy, voxels, fill, inside)

    if OPTIONS.CLEAR:
        # Another thread of the program may still have to read.
        tl.debug_barrier()
        for k in range(channels):
            tl.store(tensors.ring + (zero + k) * stride + source, zeros, mask=inside)


# --- launches ------------------------------------------------------------------------------------


def options_for(
    mode: int,
    activation: int,
    binary: bool,
    divide: bool,
    clear: bool,
    dtype: torch.dtype,
    classes: int,
    voxels: int,
) -> Options:
    """What a launch for so many classes and voxels compiles; ``dtype`` is the ring's."""
    accumulation = tl.float64 if dtype == torch.float64 else tl.float32
    tile, width = min(power_of_two(classes), TILE), min(power_of_two(voxels), BLOCK)
    return Options(
        mode, activation, binary, divide, clear, accumulation, classes <= tile, tile, width
    )


def finalize_slab(
    ring: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    ring_axis: int,
    start: int,
    stop: int,
    activation: int,
    applied: bool,
    mode: int,
    divisor: float,
    threshold: float,
    fill: float,
    clear: bool,
) -> None:
    """Write the slab into ``out`` and, if ``clear``, zeros into the ring where it was."""
    if out.numel() == 0:
        return
    channels, *extent = ring.shape
    classes = channels if weight is None else weight.shape[0]
    inner, outer = math.prod(extent[ring_axis + 1 :]), math.prod(extent[:ring_axis])
    depth = extent[ring_axis]
    turn, first, voxels = depth * inner, start % depth * inner, (stop - start) * inner
    before = min(voxels, turn - first)
    walked = (outer, turn, first, before, voxels)
    if out.dtype == torch.bool:
        out = out.view(torch.uint8)
    given = (None if x is None else x.contiguous() for x in (total, weight, bias))
    options = options_for(
        mode,
        Activation.none if applied or mode == Finish.labels else activation,
        activation == Activation.sigmoid or classes == 1,
        divisor != 1,
        clear,
        ring.dtype,
        classes,
        voxels,
    )
    columns = triton.cdiv(before, options.WIDTH) + triton.cdiv(voxels - before, options.WIDTH)
    programs = columns * triton.cdiv(outer, options.BLOCK // options.WIDTH)
    with device_guard(ring):
        finalize[(programs,)](
            Tensors(ring, out, *given),
            channels,
            classes,
            Slab(*walked, out.stride(0), _outer_stride(out, ring_axis)),
            float(divisor),
            float(threshold),
            float(fill != 0) if mode == Finish.mask else float(fill),
            constexprs(options),
            num_warps=WARPS,
            **LAUNCH_OPTIONS,
        )


def _outer_stride(out: torch.Tensor, ring_axis: int) -> int:
    """Stride of the axes before the ring's, walked as one."""
    for axis in range(ring_axis, 0, -1):
        if out.shape[axis] != 1:
            return out.stride(axis)
    return 0
