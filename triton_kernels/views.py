"""Tensors and options as the kernels take them: tuples with names, whose fields Triton knows."""

import functools
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

#: Largest voxel stride; within a block of voxels offsets have 32 bits.
MAX_VOXEL_STRIDE = 1 << 20

Options = TypeVar("Options", bound=tuple[Any, ...])


class View(NamedTuple):
    """A tensor whose spatial axes are one axis of voxels, and its strides in elements.

    A tensor without channels has ``channel`` 0. On the host ``pointer`` is the tensor.
    """

    pointer: Any
    batch: Any
    channel: Any
    voxel: Any


@triton.jit
def of_sample(x, sample):
    """The view ``x`` of one sample."""
    return View(x.pointer + sample * x.batch, x.batch, x.channel, x.voxel)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return not isinstance(of_sample, triton.JITFunction)


@functools.lru_cache(maxsize=1024, typed=True)
def constexprs(options: Options) -> Options:
    """The tuple ``options`` with fields that kernels know at compile time.

    It belongs to a parameter that is a ``tl.constexpr``: Triton 3.6 knows plain fields of such a
    tuple in most places, but not in a shape. The interpreter knows plain fields alone.
    """
    if interpreting():
        return options
    return type(options)(*map(tl.constexpr, options))  # type: ignore[call-arg]


def collapsed_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
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


def view_in_place(tensor: torch.Tensor, channels: bool = True) -> View | None:
    """``tensor`` as a view, or None if its voxels have no one stride.

    ``channels`` says whether ``tensor`` has a channel axis. Spatial axes collapse to one if each
    stride is the next axis's stride times its size.
    """
    first = 2 if channels else 1
    voxel = collapsed_stride(tensor.shape[first:], tensor.stride()[first:])
    if voxel is None or voxel > MAX_VOXEL_STRIDE:
        return None
    return View(tensor, tensor.stride(0), tensor.stride(1) if channels else 0, voxel)


def view_of(tensor: torch.Tensor, channels: bool = True) -> View:
    """``tensor`` as a view, of a contiguous copy where its voxels have no one stride."""
    if tensor.dtype == torch.bool:
        tensor = tensor.view(torch.uint8)
    view = view_in_place(tensor, channels) or view_in_place(tensor.contiguous(), channels)
    assert view is not None
    return view
