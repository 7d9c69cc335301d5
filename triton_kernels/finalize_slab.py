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

import torch
import triton
import triton.language as tl

from voxfuse.contract import Activation, Finish
from voxfuse.triton_kernels.launches import LAUNCH_OPTIONS, device_guard, power_of_two
from voxfuse.triton_kernels.numerics import exponential, log_of_sum, reciprocal

VALUES: tl.constexpr = tl.constexpr(int(Finish.values))
LABELS: tl.constexpr = tl.constexpr(int(Finish.labels))
MASK: tl.constexpr = tl.constexpr(int(Finish.mask))
FOREGROUND: tl.constexpr = tl.constexpr(int(Finish.foreground))
ENTROPY: tl.constexpr = tl.constexpr(int(Finish.entropy))
SIGMOID: tl.constexpr = tl.constexpr(int(Activation.sigmoid))
SOFTMAX: tl.constexpr = tl.constexpr(int(Activation.softmax))

#: Classes that a program holds in registers at once.
TILE = 8
#: Voxels and warps of a program: 16 bytes of float32 a thread.
BLOCK = 512
WARPS = 4


@triton.jit
def _features(ring, k, place, inside, stride, divisor, DIVIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Channel ``k`` of the ring over the divisor."""
    value = tl.load(ring + k * stride + place, mask=inside, other=0.0)
    if DIVIDE:
        # Rounded correctly: a tie stays a tie.
        if DTYPE == tl.float32:
            value = tl.div_rn(value, tl.full(value.shape, divisor, DTYPE))
        else:
            value = value / tl.full(value.shape, divisor, DTYPE)
    return value


@triton.jit
def _tile(
    ring,
    weight,
    bias,
    base,
    place,
    inside,
    channels,
    classes,
    stride,
    divisor,
    DIVIDE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The values ``z`` of TILE classes from ``base`` on; what is not a class is 0."""
    values = ()
    if weight is None:
        for c in tl.static_range(TILE):
            mask = inside & (base + c < classes)
            value = _features(ring, base + c, place, mask, stride, divisor, DIVIDE, DTYPE)
            values = values + (value,)
    else:
        for c in tl.static_range(TILE):
            offset = tl.load(bias + base + c, mask=base + c < classes, other=0.0)
            values = values + (tl.zeros([BLOCK], DTYPE) + offset,)
        for k in range(channels):
            value = _features(ring, k, place, inside, stride, divisor, DIVIDE, DTYPE)
            new = ()
            row = weight + base * channels + k
            for c in tl.static_range(TILE):
                factor = tl.load(row + c * channels, mask=base + c < classes, other=0.0)
                new = new + (values[c] + factor * value,)
            values = new
    return values


@triton.jit
def _sigmoid(z, DTYPE: tl.constexpr):
    e = exponential(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) * reciprocal(1.0 + e)


@triton.jit
def _surprise(p):
    """``-p log p``, 0 at 0."""
    return tl.where(p == 0, 0.0, -p * tl.log(p))


@triton.jit
def _store(out, place, value, covered, fill, mask, TOTAL: tl.constexpr):
    element = out.dtype.element_ty
    if not element.is_int() and element != tl.float64:
        value = value.to(tl.float32)
    value = value.to(element)
    if TOTAL:
        if element.is_int():
            other = tl.full([1], fill, tl.float64).to(tl.int64)
        else:
            other = tl.full([1], fill, tl.float32)
        value = tl.where(covered, value, other.to(element))
    tl.store(out + place, value, mask=mask)


@triton.jit
def _take(
    values,
    base,
    classes,
    best,
    where,
    shift,
    sums,
    products,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BINARY: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What is kept of every voxel after TILE more classes."""
    if ACTIVATION == SOFTMAX:
        greatest = tl.full([BLOCK], -float("inf"), DTYPE)
        for c in tl.static_range(TILE):
            z = tl.where(base + c < classes, values[c], -float("inf"))
            greatest = tl.maximum(greatest, z)
        greatest = tl.maximum(greatest, tl.where(sums == 0, -float("inf"), shift))
        # Before anything finite there is nothing to scale; infinity - infinity is no number.
        greatest = tl.where(greatest == -float("inf"), 0.0, greatest)
        step = shift - greatest
        scale = exponential(step)
        if MODE == ENTROPY:
            products = tl.where(sums == 0, 0.0, scale * (products + step * sums))
        sums = tl.where(sums == 0, 0.0, scale * sums)
        shift = greatest
        for c in tl.static_range(TILE):
            gap = values[c] - shift
            e = tl.where(base + c < classes, exponential(gap), 0.0)
            sums += e
            if MODE == ENTROPY:
                products += tl.where(e == 0, 0.0, e * gap)
    elif MODE == ENTROPY:
        for c in tl.static_range(TILE):
            z = values[c]
            if ACTIVATION == SIGMOID:
                distance = tl.abs(z)
                e = exponential(-distance)
                rest = tl.where(e == 0, 0.0, distance * e)
                entropy = log_of_sum(1.0, e, 1.0 + e) + rest * reciprocal(1.0 + e)
            else:
                entropy = _surprise(z)
                if BINARY:
                    entropy += _surprise(1.0 - z)
            sums += tl.where(base + c < classes, entropy, 0.0)
    if MODE == LABELS or MODE == FOREGROUND:
        for c in tl.static_range(TILE):
            z = values[c]
            better = ((z > best) | ((z != z) & (best == best))) & (base + c < classes)
            if MODE == FOREGROUND and not BINARY:
                better = better & (base + c > 0)
            best = tl.where(better, z, best)
            where = tl.where(better, (base + c).to(tl.int32), where)
    return best, where, shift, sums, products


@triton.jit
def _write_classes(
    out,
    values,
    base,
    classes,
    out_channel,
    target,
    inside,
    covered,
    shift,
    sums,
    threshold,
    fill,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TOTAL: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write the values or the mask of TILE classes."""
    for c in tl.static_range(TILE):
        p = values[c]
        if ACTIVATION == SIGMOID:
            p = _sigmoid(p, DTYPE)
        elif ACTIVATION == SOFTMAX:
            p = exponential(p - shift) / sums
        if MODE == MASK:
            p = p > tl.full([1], threshold, DTYPE)
        place = (base + c) * out_channel + target
        _store(out, place, p, covered, fill, inside & (base + c < classes), TOTAL)


@triton.jit
def _finalize(
    ring,
    out,
    total,
    weight,
    bias,
    channels,
    classes,
    outer,
    turn,
    first,
    before,
    voxels,
    out_channel,
    out_outer,
    divisor: tl.float64,
    threshold: tl.float64,
    fill: tl.float64,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BINARY: tl.constexpr,
    DIVIDE: tl.constexpr,
    CLEAR: tl.constexpr,
    SINGLE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """BLOCK / WIDTH outer indices by WIDTH voxels; ``before`` voxels lie before the wrap.

    BINARY: every channel is a probability of its own. SINGLE: TILE holds all classes.
    """
    blocks_before = tl.cdiv(before, WIDTH)
    blocks = blocks_before + tl.cdiv(voxels - before, WIDTH)
    program = tl.program_id(0)
    block = (program % blocks).to(tl.int64)
    wrapped = block >= blocks_before
    index = tl.arange(0, BLOCK)
    row = (program // blocks).to(tl.int64) * (BLOCK // WIDTH) + index // WIDTH
    start = tl.where(wrapped, block - blocks_before, block) * WIDTH
    column = start + index % WIDTH
    inside = (row < outer) & (column < tl.where(wrapped, voxels - before, before))
    place = row * turn + tl.where(wrapped, 0, first) + column
    target = row * out_outer + tl.where(wrapped, before, 0) + column
    stride = tl.cast(turn, tl.int64) * outer

    covered = inside
    if total is not None:
        covered = tl.load(total + place, mask=inside, other=0.0) != 0
    best = tl.full([BLOCK], -float("inf"), DTYPE)
    where = tl.zeros([BLOCK], tl.int32)
    shift = tl.zeros([BLOCK], DTYPE)
    sums = tl.zeros([BLOCK], DTYPE)
    products = tl.zeros([BLOCK], DTYPE)
    zero = tl.zeros([1], tl.int64)
    by_class: tl.constexpr = MODE == VALUES or MODE == MASK
    if SINGLE:
        values = _tile(
            ring,
            weight,
            bias,
            zero,
            place,
            inside,
            channels,
            classes,
            stride,
            divisor,
            DIVIDE,
            TILE,
            BLOCK,
            DTYPE,
        )
        best, where, shift, sums, products = _take(
            values,
            zero,
            classes,
            best,
            where,
            shift,
            sums,
            products,
            MODE,
            ACTIVATION,
            BINARY,
            TILE,
            BLOCK,
            DTYPE,
        )
        if by_class:
            _write_classes(
                out,
                values,
                zero,
                classes,
                out_channel,
                target,
                inside,
                covered,
                shift,
                sums,
                threshold,
                fill,
                MODE,
                ACTIVATION,
                total is not None,
                TILE,
                DTYPE,
            )
    else:
        # The probabilities of a softmax need the sum over all classes first.
        if (not by_class) or ACTIVATION == SOFTMAX:
            for begin in range(0, classes, TILE):
                part = _tile(
                    ring,
                    weight,
                    bias,
                    zero + begin,
                    place,
                    inside,
                    channels,
                    classes,
                    stride,
                    divisor,
                    DIVIDE,
                    TILE,
                    BLOCK,
                    DTYPE,
                )
                best, where, shift, sums, products = _take(
                    part,
                    zero + begin,
                    classes,
                    best,
                    where,
                    shift,
                    sums,
                    products,
                    MODE,
                    ACTIVATION,
                    BINARY,
                    TILE,
                    BLOCK,
                    DTYPE,
                )
        if by_class:
            for begin in range(0, classes, TILE):
                part = _tile(
                    ring,
                    weight,
                    bias,
                    zero + begin,
                    place,
                    inside,
                    channels,
                    classes,
                    stride,
                    divisor,
                    DIVIDE,
                    TILE,
                    BLOCK,
                    DTYPE,
                )
                _write_classes(
                    out,
                    part,
                    zero + begin,
                    classes,
                    out_channel,
                    target,
                    inside,
                    covered,
                    shift,
                    sums,
                    threshold,
                    fill,
                    MODE,
                    ACTIVATION,
                    total is not None,
                    TILE,
                    DTYPE,
                )

    if MODE == LABELS:
        _store(out, target, where, covered, fill, inside, total is not None)
    elif MODE == FOREGROUND:
        if ACTIVATION == SIGMOID:
            best = _sigmoid(best, DTYPE)
        elif ACTIVATION == SOFTMAX:
            best = exponential(best - shift) / sums
        _store(out, target, best, covered, fill, inside, total is not None)
    elif MODE == ENTROPY:
        if ACTIVATION == SOFTMAX:
            sums = tl.log(sums) - products / sums
        _store(out, target, sums, covered, fill, inside, total is not None)

    if CLEAR:
        # Another thread of the program may still have to read.
        tl.debug_barrier()
        nothing = tl.zeros([BLOCK], DTYPE)
        for k in range(channels):
            tl.store(ring + (zero + k) * stride + place, nothing, mask=inside)


# --- launches ------------------------------------------------------------------------------------


def tiles(classes: int, voxels: int) -> dict[str, int | bool]:
    """Classes and voxels of a program, as compile-time values of the kernel."""
    tile = min(power_of_two(classes), TILE)
    return {
        "SINGLE": classes <= tile,
        "TILE": tile,
        "WIDTH": min(power_of_two(voxels), BLOCK),
        "BLOCK": BLOCK,
    }


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
    channels = ring.shape[0]
    classes = channels if weight is None else weight.shape[0]
    depth = ring.shape[1 + ring_axis]
    inner, outer = 1, 1
    for axis, size in enumerate(ring.shape[1:]):
        if axis > ring_axis:
            inner *= size
        elif axis < ring_axis:
            outer *= size
    turn, first, voxels = depth * inner, start % depth * inner, (stop - start) * inner
    before = min(voxels, turn - first)
    if out.dtype == torch.bool:
        out = out.view(torch.uint8)
    total, weight, bias = (None if x is None else x.contiguous() for x in (total, weight, bias))
    kept = 0 if applied or mode == LABELS.value else activation
    constants = tiles(classes, voxels)
    width, block = constants["WIDTH"], constants["BLOCK"]
    columns = triton.cdiv(before, width) + triton.cdiv(voxels - before, width)
    with device_guard(ring):
        _finalize[(columns * triton.cdiv(outer, block // width),)](
            ring,
            out,
            total,
            weight,
            bias,
            channels,
            classes,
            outer,
            turn,
            first,
            before,
            voxels,
            out.stride(0),
            _outer_stride(out, ring_axis),
            float(divisor),
            float(threshold),
            float(fill != 0) if mode == MASK.value else float(fill),
            MODE=mode,
            ACTIVATION=kept,
            BINARY=activation == SIGMOID.value or classes == 1,
            DIVIDE=divisor != 1,
            CLEAR=clear,
            DTYPE=tl.float64 if ring.dtype == torch.float64 else tl.float32,
            num_warps=WARPS,
            **constants,
            **LAUNCH_OPTIONS,
        )


def _outer_stride(out: torch.Tensor, ring_axis: int) -> int:
    """Stride of the axes before the ring's, walked as one."""
    for axis in range(ring_axis, 0, -1):
        if out.shape[axis] != 1:
            return out.stride(axis)
    return 0
