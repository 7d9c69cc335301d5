"""What the Triton kernels share: strides of a voxel axis, launches and scalar mathematics."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

#: Elements a program reads in one 16-byte load.
VECTOR_BYTES = 16

#: Largest voxel stride; within a block of voxels offsets have 32 bits.
MAX_VOXEL_STRIDE = 1 << 20

#: Options of every launch. Fused multiply-adds are asked for because Triton 3.10 turns their
#: default off; the results of the kernels should not depend on the version.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


def most_registers(number):
    """Launch options that let a thread have ``number`` registers on an NVIDIA GPU.

    Left alone, the assembler takes fewer, for more threads at a time, and keeps words in memory.
    """
    return {} if torch.version.cuda is None else {"maxnreg": number}


def device_guard(tensor):
    """Context in which Triton launches on ``tensor``'s device."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "xpu":
        return torch.xpu.device(tensor.device)
    return nullcontext()


def collapsed_stride(shape, strides):
    """Stride of the axis that ``shape`` and ``strides`` collapse to, or None if they do not."""
    stride, extent = None, 1
    for size, step in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != stride * extent:
            return None
        extent *= size
    return 1 if stride is None else stride


def strides_of(tensor, classes=True):
    """The (batch, class, voxel) strides of ``tensor``, or None if its voxels have no one stride.

    ``classes`` says whether ``tensor`` has a class axis. Spatial axes collapse to one if each
    stride is the next axis's stride times its size.
    """
    first = 2 if classes else 1
    voxel = collapsed_stride(tensor.shape[first:], tensor.stride()[first:])
    if voxel is None or voxel > MAX_VOXEL_STRIDE:
        return None
    return tensor.stride(0), tensor.stride(1) if classes else 0, voxel


def flatten(tensor, classes):
    """Return ``tensor``, or where it has to be a contiguous copy, with its ``strides_of``."""
    if tensor.dtype == torch.bool:
        tensor = tensor.view(torch.uint8)
    strides = strides_of(tensor, classes)
    if strides is None:
        tensor = tensor.contiguous()
        strides = strides_of(tensor, classes)
    return tensor, strides


def power_of_two(n):
    """Smallest power of two that is at least ``n``."""
    return triton.next_power_of_2(max(n, 1))


@triton.jit
def exponential(x, DTYPE: tl.constexpr):
    """``exp(x)``. In float32 as a power of 2, which is one instruction on a GPU."""
    if DTYPE == tl.float32:
        result = tl.exp2(x * 1.4426950408889634)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def reciprocal(x, DTYPE: tl.constexpr):
    """``1 / x`` for 1 <= x < 1e30. The square of a reciprocal root takes two instructions on a GPU
    in float32, the division nine.
    """
    if DTYPE == tl.float32:
        root = tl.rsqrt(x)
        result = root * root
    else:
        result = 1.0 / x
    return result


@triton.jit
def log_one_plus(x, DTYPE: tl.constexpr):
    """``log(1 + x)`` for 0 <= x <= 1 to 1.5 units in the last place in float32."""
    if DTYPE == tl.float32:
        # Relative minimax polynomial of log1p(x) / x: no special function unit, no branch.
        y = 0.005232690833508968 * x - 0.029505228623747826
        y = y * x + 0.07822594791650772
        y = y * x - 0.13663245737552643
        y = y * x + 0.19106008112430573
        y = y * x - 0.2484298199415207
        y = y * x + 0.3331909775733948
        y = y * x - 0.4999949336051941
        y = y * x + 0.9999999403953552
        result = y * x
    else:
        result = log_of_sum(1.0, x, 1.0 + x, DTYPE)
    return result


@triton.jit
def log_of_sum(a, b, total, DTYPE: tl.constexpr):
    """``log(a + b)`` given the rounded ``total`` >= 1; accurate near 1 to relative precision."""
    return tl.log(total) + (b - (total - a)) * reciprocal(total, DTYPE)


@triton.jit
def power(base, exponent, inverse, GAMMA: tl.constexpr, DTYPE: tl.constexpr):
    """``base ** gamma``, or ``base ** (gamma - 1)`` with ``inverse``, for base > 0 or gamma > 0."""
    if GAMMA == 2:
        result = base if inverse else base * base
    elif GAMMA == 1:
        result = tl.full([1, 1], 1.0, DTYPE) if inverse else base
    else:
        n = tl.full([1, 1], exponent, DTYPE)
        n = n - 1.0 if inverse else n
        result = tl.exp2(n * tl.log2(base))
    return result


@triton.jit
def stack(xs, LEVELS: tl.constexpr):
    """Join a tuple of 2 ** LEVELS tensors of one shape along a new last axis (kept factorised)."""
    for level in tl.static_range(LEVELS):
        ys = ()
        for i in tl.static_range(1 << (LEVELS - 1 - level)):
            ys = ys + (tl.join(xs[i], xs[i + (1 << (LEVELS - 1 - level))]),)
        xs = ys
    return xs[0]
