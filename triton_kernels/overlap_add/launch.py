"""The launches: tensors to views, sizes to tiles."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from voxfuse.contract import Activation
from voxfuse.reference.overlap_add import checked_activation
from voxfuse.triton_kernels.launches import (
    LAUNCH_OPTIONS,
    device_guard,
    most_registers,
    power_of_two,
)
from voxfuse.triton_kernels.overlap_add.gather import gather
from voxfuse.triton_kernels.overlap_add.scatter import scatter, scatter_activated
from voxfuse.triton_kernels.overlap_add.softmax import normalise
from voxfuse.triton_kernels.overlap_add.views import (
    Axes,
    Floor,
    Options,
    Patches,
    Placement,
    Ring,
)
from voxfuse.triton_kernels.views import constexprs

#: Channels that a program adds up together; half as many in a ring, which takes more registers.
MAX_CHANNELS = 8
#: Voxels in a tile, and most of them along the last axis.
TILE = 512
MAX_WIDTH = 128
#: Origins that are compared with a tile at once.
ORIGINS = 128
#: Channels whose softmax is worked out anew. It decides on bits, and so depends on nothing else.
FEW = 8
#: Warps of every program, and registers that a thread of the gathering kernel may take.
WARPS = 4
REGISTERS = 128


class Tables(NamedTuple):
    """Origins, rows, weights and sums of weights as the operators take them."""

    origins: torch.Tensor
    rows: torch.Tensor
    weights: Sequence[torch.Tensor]
    total: torch.Tensor | None

    def dense(self, axes: int) -> bool:
        """Whether one table has the weights of all voxels, not one for each axis."""
        return not (len(self.weights) == axes and self.weights[0].ndim == 2)

    def patch_shape(self, axes: int) -> tuple[int, ...]:
        """Extent of the patches."""
        if self.dense(axes):
            return tuple(self.weights[0].shape[1:])
        return tuple(table.shape[1] for table in self.weights)

    def placement(self, patch_shape: Sequence[int], device: torch.device) -> Placement:
        """The view of all but ``total``."""
        tables = [table.to(device).contiguous() for table in self.weights]
        return Placement(
            self.origins.to(device).contiguous(),
            self.rows.to(device).contiguous(),
            _three(patch_shape),
            _three(tables, None),
            _three([table.shape[0] for table in tables]),
        )


def _three(values: Sequence[Any], missing: Any = 1) -> Axes:
    """One of ``values`` for each axis; ``missing`` for leading axes that are not there."""
    return Axes(*[missing] * (3 - len(values)), *values)


def channels_a_program(channels: int, ring: bool) -> int:
    """Channels that a program fuses at a time."""
    return min(power_of_two(channels), MAX_CHANNELS // 2 if ring else MAX_CHANNELS)


def tile_shape(height: int, width: int) -> tuple[int, int]:
    """Extent of a program's tile of a slice, long along the last axis."""
    block_x = min(power_of_two(width), MAX_WIDTH)
    return min(power_of_two(height), TILE // block_x), block_x


def options_for(dtype: torch.dtype, size: Axes, **options: Any) -> Options:
    """Options of a launch over slices of this size that computes for results of ``dtype``."""
    accumulation = tl.float64 if dtype == torch.float64 else tl.float32
    return Options(*tile_shape(size.y, size.x), accumulation, ORIGINS, **options)


def _tiles(size: Axes, options: Options) -> int:
    """Number of tiles of a volume."""
    return int(size.z * triton.cdiv(size.y, options.HEIGHT) * triton.cdiv(size.x, options.WIDTH))


def _patch_view(patches: torch.Tensor, axes: int, flip: int = 0) -> Patches:
    """The view of patches that are mirrored along the axes whose bits are set in ``flip``."""
    spatial = list(patches.stride()[2:])
    for axis in range(axes):
        if flip >> axis & 1 and patches.numel() > 0:
            # Read from the far end, backwards.
            patches = patches.narrow(2 + axis, patches.shape[2 + axis] - 1, 1)
            spatial[axis] = -spatial[axis]
    return Patches(patches, patches.stride(0), patches.stride(1), _three(spatial, 0))


def _normalised(
    patches: Patches, channels: int, extent: Axes, shape: Sequence[int]
) -> torch.Tensor:
    """What the softmax of many channels keeps, (N, 2, *patch), of patches turned back."""
    dtype = patches.pointer.dtype
    wide = torch.promote_types(dtype, torch.float32)
    softmax = torch.empty(shape, dtype=wide, device=patches.pointer.device)
    if softmax.numel() == 0:
        return softmax
    options = options_for(dtype, extent)
    tiles = shape[0] * _tiles(extent, options)
    with device_guard(softmax):
        normalise[(tiles,)](
            patches,
            softmax,
            channels,
            extent,
            constexprs(options),
            num_warps=WARPS,
            **LAUNCH_OPTIONS,
        )
    return softmax


def _add(
    output: torch.Tensor,
    patches: torch.Tensor | None,
    tables: Tables,
    patch_shape: Sequence[int],
    ring: tuple[int, int, int] | None = None,
    flip: int = 0,
    floor: Floor | None = None,
    activation: int = Activation.none,
) -> None:
    """Fuse ``patches`` (None: only the weights) into ``output`` (C, *extent), or add to a ring
    ``(axis, start, stop)``.
    """
    axes, count = output.ndim - 1, tables.origins.shape[0]
    if output.numel() == 0 or (ring is not None and count == 0):
        return
    channels, size = output.shape[0], _three(output.shape[1:])
    placed = tables.placement(patch_shape, output.device)
    view, softmax = Patches(None, 0, 0, Axes(0, 0, 0)), None
    if patches is not None:
        view = _patch_view(patches, axes, flip)
        if activation == Activation.softmax and channels > FEW:
            shape = (patches.shape[0], 2, *patch_shape)
            softmax = _normalised(view, channels, placed.extent, shape)
    held = Ring(0, 0, 0)
    if ring is not None:
        axis, start, stop = ring
        held = Ring(start, stop, start % output.shape[1 + axis])
    options = options_for(
        output.dtype,
        size,
        AXES=axes,
        DENSE=tables.dense(axes),
        RING=-1 if ring is None else ring[0] + 3 - axes,
        CHANNELS=channels_a_program(channels, ring is not None),
        ACTIVATION=activation,
    )
    grid = (_tiles(size, options), triton.cdiv(channels, options.CHANNELS))
    with device_guard(output):
        gather[grid](
            view,
            output,
            placed,
            None if tables.total is None else tables.total.contiguous(),
            floor or Floor(None, Axes(None, None, None), _three([]), _three([])),
            softmax,
            count,
            channels,
            size,
            held,
            constexprs(options),
            num_warps=WARPS,
            **most_registers(REGISTERS),
            **LAUNCH_OPTIONS,
        )


def overlap_add(
    patches: torch.Tensor,
    origins: torch.Tensor,
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    total: torch.Tensor | None,
    volume_shape: Sequence[int],
    activation: int = Activation.none,
) -> torch.Tensor:
    """Return the fused volume (C, \\*volume) in the patches' dtype; uncovered voxels are 0."""
    shape = (patches.shape[1], *volume_shape)
    volume = torch.empty(shape, dtype=patches.dtype, device=patches.device)
    tables = Tables(origins, rows, weights, total)
    _add(volume, patches, tables, patches.shape[2:], activation=checked_activation(activation))
    return volume


def overlap_add_(
    ring: torch.Tensor,
    patches: torch.Tensor,
    origins: torch.Tensor,
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    total: torch.Tensor | None,
    ring_axis: int,
    start: int,
    stop: int,
    flip: int = 0,
    floor: float = 0.0,
    activation: int = Activation.none,
    cover: Sequence[torch.Tensor] | None = None,
) -> None:
    """Add patches into ``ring``, which holds the coordinates [start, stop) of one axis."""
    least = None
    if cover and floor > 0:
        device = ring.device
        tables = [table.to(device).contiguous() for table in cover]
        least = Floor(
            # A number would reach the kernel as float32.
            torch.full((1,), floor, dtype=torch.float64, device=device),
            _three(tables, None),
            _three([table.shape[0] for table in tables]),
            _three([table.shape[1] for table in tables]),
        )
    place = (ring_axis, start, stop)
    activation = checked_activation(activation)
    rest = (patches.shape[2:], place, flip, least, activation)
    _add(ring, patches, Tables(origins, rows, weights, total), *rest)


def overlap_weights_(
    total: torch.Tensor,
    origins: torch.Tensor,
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    ring_axis: int,
    start: int,
    stop: int,
) -> None:
    """Add every patch's weights into the float64 ``total``, laid out as a ring."""
    tables = Tables(origins, rows, weights, None)
    place = (ring_axis, start, stop)
    _add(total.unsqueeze(0), None, tables, tables.patch_shape(total.ndim), place)


def overlap_add_backward(
    grad: torch.Tensor,
    origins: torch.Tensor,
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    total: torch.Tensor | None,
    patches: torch.Tensor | None = None,
    activation: int = Activation.none,
) -> torch.Tensor:
    """Return the gradient (N, C, \\*patch) of the patches, which an activation asks for."""
    axes, channels = grad.ndim - 1, grad.shape[0]
    tables = Tables(origins, rows, weights, total)
    shape = (origins.shape[0], channels, *tables.patch_shape(axes))
    result = torch.empty(shape, dtype=grad.dtype, device=grad.device)
    if result.numel() == 0:
        return result
    placed = tables.placement(shape[2:], grad.device)
    activated = checked_activation(activation) != Activation.none
    if activated and patches is None:
        raise ValueError("patches: got None, expected the patches that were activated")
    options = options_for(
        grad.dtype,
        placed.extent,
        AXES=axes,
        DENSE=tables.dense(axes),
        CHANNELS=1 if activated else channels_a_program(channels, ring=False),
        ACTIVATION=activation,
    )
    rest = (
        result,
        placed,
        None if total is None else total.contiguous(),
        channels,
        _three(grad.shape[1:]),
        constexprs(options),
    )
    tiles = shape[0] * _tiles(placed.extent, options)
    with device_guard(grad):
        if patches is not None and activated:
            view = _patch_view(patches, axes)
            scatter_activated[(tiles,)](
                grad.contiguous(), view, *rest, num_warps=WARPS, **LAUNCH_OPTIONS
            )
        else:
            blocks = triton.cdiv(channels, options.CHANNELS)
            scatter[(tiles, blocks)](grad.contiguous(), *rest, num_warps=WARPS, **LAUNCH_OPTIONS)
    return result
