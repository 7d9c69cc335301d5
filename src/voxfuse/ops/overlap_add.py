"""The patch fusion operators: wrappers with their checks, fakes and autograd.

These wrappers take the tables that the kernels read. :func:`voxfuse.overlap_add` makes the tables
from windows and origins.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from voxfuse.contract import Activation
from voxfuse.ops import _checks, _registry
from voxfuse.reference.overlap_add import accumulation_dtype, patch_shape


def overlap_add(
    patches: Tensor,
    origins: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    volume_shape: Sequence[int],
    *,
    total: Tensor | None = None,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    r"""Fuse weighted patches: ``V(x) = sum_i w_i(x - o_i) P_i(x - o_i)``.

    Args:
        patches: (N, C, \*patch), 1 to 3 spatial axes; float32, float16, bfloat16 or float64.
        origins: (N, n) int64 coordinates of the patches' first voxels; parts outside the volume
            are left out.
        rows: (N, n) int64: patch i is weighted by row ``rows[i, a]`` of ``weights[a]``; ignored
            with a dense window.
        weights: one float64 (k, patch_a) tensor an axis, or a single dense (1, \*patch) tensor.
            Without ``total`` they must already sum to 1 wherever patches overlap.
        volume_shape: extent of the result.
        total: float64 (\*volume) sum of all patches' weights, as :func:`overlap_weights_` makes
            it; each weight is divided by it in float64.
        activation: "none", "softmax" over the channels or "sigmoid": what is made of a patch before
            it is weighted, in the accumulation's dtype.
        backend: "auto", "cpp", "cuda", "triton" or "reference".

    Returns:
        (C, \*volume) in the patches' dtype, accumulated in float32 (float64 for float64 patches)
        in patch order; uncovered voxels are 0. Differentiable in ``patches``; with an activation
        they are kept for the backward pass, which activates them again.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices or values do not fit.

    Example:
        >>> import torch
        >>> from voxfuse.ops.overlap_add import overlap_add
        >>> halves = torch.tensor([[[1.0, 1.0]], [[3.0, 3.0]]])
        >>> weights = [torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)]
        >>> overlap_add(halves, torch.tensor([[0], [1]]), torch.tensor([[0], [1]]), weights, [3])
        tensor([[1., 2., 3.]])
    """
    patches = _checks.require_tensor("patches", patches)
    activation_code = _checks.choice("activation", activation, Activation)
    origins, rows, weights, total = _check(
        patches, origins, rows, weights, total, volume_shape, ring_axis=None
    )
    operators = _registry.namespace_of(backend, patches.device)
    try:
        result: Tensor = operators.overlap_add(
            patches, origins, rows, weights, total, list(volume_shape), activation_code
        )
    except RuntimeError as error:
        _checks.reraise(error)
    return result


def overlap_add_(
    ring: Tensor,
    patches: Tensor,
    origins: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    *,
    total: Tensor | None = None,
    ring_axis: int = 0,
    start: int = 0,
    stop: int | None = None,
    flip: Sequence[int] = (),
    floor: float = 0.0,
    cover: Sequence[Tensor] = (),
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    r"""Add weighted patches into ``ring``, a window of consecutive slices of a larger volume.

    Spatial axis ``ring_axis`` of the ring holds the coordinates ``start <= x < stop`` of the
    volume, x in slot ``x % ring.shape[1 + ring_axis]``; the other axes are the volume's. Parts of
    patches outside are left out. With the defaults the ring is simply the volume. Every voxel
    receives its patches one after the other, so the bits do not depend on how patches are
    distributed over calls.

    Args:
        ring: (C, \*extent), float64 for float64 patches and otherwise float32, contiguous.
        patches, origins, rows, weights, activation, backend: as for :func:`overlap_add`.
        total: as for :func:`overlap_add`, with the ring's spatial shape and slots.
        ring_axis: spatial axis along which the ring moves.
        start, stop: coordinates that the ring holds; at most as many as it has slots. ``stop``
            defaults to ``start`` plus the number of slots.
        flip: spatial axes along which the patches are mirrored; they are turned back as they are
            read.
        floor: with a number > 0 the weight of a voxel is ``max(product, floor)`` of the product of
            its rows of ``weights``, divided in float64 by the sum of the same over all patches of a
            grid. That sum is no product of axes, and is formed from ``cover`` on the fly.
        cover: with ``floor``, one float64 (m, volume_a) tensor an axis, which says for every
            coordinate what all patches over it weigh along the axis, and a negative number where
            they are fewer than m. A patch weighs 0 where they name none.

    Returns:
        ``ring``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices or values do not fit, or a gradient would be lost.
    """
    patches = _checks.require_tensor("patches", patches)
    ring = _checks.require_tensor("ring", ring)
    if torch.is_grad_enabled() and (patches.requires_grad or ring.requires_grad):
        raise ValueError("patches: require grad, but overlap_add_ has none; use overlap_add")
    if ring.dtype != accumulation_dtype(patches.dtype):
        raise TypeError(
            f"ring: got {_checks.describe(ring)}, expected "
            f"{str(accumulation_dtype(patches.dtype)).removeprefix('torch.')} for patches of dtype "
            f"{str(patches.dtype).removeprefix('torch.')}"
        )
    if ring.ndim != patches.ndim - 1 or ring.shape[0] != patches.shape[1]:
        raise ValueError(
            f"ring: got shape {tuple(ring.shape)}, expected (C, *extent) to go with patches of "
            f"shape {tuple(patches.shape)}"
        )
    if ring.device != patches.device:
        raise ValueError(f"ring: is on {ring.device}, but patches are on {patches.device}")
    stop = _check_ring("ring", ring, tuple(ring.shape[1:]), ring_axis, start, stop)
    origins, rows, weights, total = _check(
        patches, origins, rows, weights, total, ring.shape[1:], ring_axis
    )
    axes = ring.ndim - 1
    if not set(flip) <= set(range(axes)) or len(set(flip)) != len(flip):
        raise ValueError(f"flip: got {tuple(flip)}, expected axes in [0, {axes}), each once")
    covered = list(ring.shape[1:])
    covered[ring_axis] = stop
    if floor or cover:
        cover = _check_cover(cover, floor, total, covered, ring_axis, ring.device)
    activation_code = _checks.choice("activation", activation, Activation)
    operators = _registry.namespace_of(backend, patches.device)
    try:
        operators.overlap_add_(
            ring,
            patches,
            origins,
            rows,
            weights,
            total,
            ring_axis,
            start,
            stop,
            sum(1 << int(axis) for axis in flip),
            float(floor),
            activation_code,
            cover or None,
        )
    except RuntimeError as error:
        _checks.reraise(error)
    return ring


def overlap_weights_(
    total: Tensor,
    origins: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    *,
    ring_axis: int = 0,
    start: int = 0,
    stop: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Add the weights of every patch into ``total``: ``W(x) += sum_i w_i(x - o_i)``.

    Args:
        total: float64 (\*extent), contiguous; a volume or a ring as in :func:`overlap_add_`.
        origins, rows, weights, ring_axis, start, stop, backend: as for :func:`overlap_add_`.

    Returns:
        ``total``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices or values do not fit.
    """
    total = _checks.require_tensor("total", total)
    if total.dtype != torch.float64 or not 1 <= total.ndim <= 3:
        raise TypeError(f"total: got {_checks.describe(total)}, expected float64 of 1 to 3 axes")
    stop = _check_ring("total", total, tuple(total.shape), ring_axis, start, stop)
    origins, rows, weights = _check_tables(
        origins, rows, weights, total.ndim, None, total.device, "total"
    )
    operators = _registry.namespace_of(backend, total.device)
    try:
        operators.overlap_weights_(total, origins, rows, weights, ring_axis, start, stop)
    except RuntimeError as error:
        _checks.reraise(error)
    return total


def _check_cover(
    cover: Sequence[Tensor],
    floor: float,
    total: Tensor | None,
    covered: Sequence[int],
    ring_axis: int,
    device: torch.device,
) -> list[Tensor]:
    """Check the tables of all patches' weights and return them on ``device``."""
    if not (math.isfinite(floor) and floor > 0):
        raise ValueError(f"floor: got {floor}, expected a finite number > 0 with cover")
    if total is not None:
        raise ValueError("total: got one beside floor, expected one of the two")
    tables = [_checks.require_tensor("cover", table) for table in cover]
    shapes = [tuple(table.shape) for table in tables]
    fits = len(tables) == len(covered) and all(len(shape) == 2 for shape in shapes)
    for axis, size in enumerate(covered if fits else ()):
        reached = shapes[axis][1]
        fits = fits and (reached >= size if axis == ring_axis else reached == size)
    if not fits:
        raise ValueError(
            f"cover: got shapes {shapes}, expected one (m, extent) tensor an axis, for the "
            f"coordinates up to {tuple(covered)}"
        )
    for table in tables:
        if table.dtype != torch.float64:
            raise TypeError(f"cover: got {_checks.describe(table)}, expected float64")
        if table.device != device and table.device.type != "cpu":
            raise ValueError(f"cover: is on {table.device}, expected the CPU or {device}")
    return [table.to(device, non_blocking=True) for table in tables]


def _check_ring(
    name: str,
    tensor: Tensor,
    extent: tuple[int, ...],
    ring_axis: int,
    start: int,
    stop: int | None,
) -> int:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()}, expected a contiguous tensor")
    if not 0 <= ring_axis < len(extent):
        raise ValueError(f"ring_axis: got {ring_axis}, expected 0 <= ring_axis < {len(extent)}")
    depth = extent[ring_axis]
    stop = start + depth if stop is None else stop
    if not 0 <= start <= stop <= start + depth:
        raise ValueError(
            f"start, stop: got {start}, {stop}, expected 0 <= start <= stop <= start + {depth}, "
            f"the slots of {name}"
        )
    return stop


def _check(
    patches: Tensor,
    origins: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    total: Tensor | None,
    extent: Sequence[int],
    ring_axis: int | None,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    if patches.dtype not in _checks.LOGIT_DTYPES:
        raise TypeError(
            f"patches: got {_checks.describe(patches)}, expected float32, float16, bfloat16 or "
            "float64"
        )
    if not 3 <= patches.ndim <= 5:
        raise ValueError(
            f"patches: got shape {tuple(patches.shape)}, expected (N, C, *patch) with 1 to 3 "
            "spatial axes"
        )
    axes = patches.ndim - 2
    if len(extent) != axes or any(size < 0 for size in extent):
        raise ValueError(
            f"volume_shape: got {tuple(extent)}, expected {axes} sizes >= 0 to go with patches of "
            f"shape {tuple(patches.shape)}"
        )
    origins, rows, weights = _check_tables(
        origins, rows, weights, axes, patches, patches.device, "patches"
    )
    if total is not None:
        total = _checks.require_tensor("total", total)
        if total.dtype != torch.float64:
            raise TypeError(f"total: got {_checks.describe(total)}, expected float64")
        if tuple(total.shape) != tuple(extent):
            raise ValueError(f"total: got shape {tuple(total.shape)}, expected {tuple(extent)}")
        if total.device != patches.device:
            raise ValueError(f"total: is on {total.device}, but patches are on {patches.device}")
        if total.requires_grad:
            raise ValueError("total: requires grad, but no gradient flows to it; detach it")
    return origins, rows, weights, total


def _check_tables(
    origins: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    axes: int,
    patches: Tensor | None,
    device: torch.device,
    partner: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Check origins, rows and weights and return them on ``device``."""
    origins = _checks.require_tensor("origins", origins)
    rows = _checks.require_tensor("rows", rows)
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"weights: expected a list of tensors, got {type(weights).__name__}")
    weights = [_checks.require_tensor("weights", w) for w in weights]
    count = origins.shape[0] if patches is None and origins.ndim == 2 else None
    count = patches.shape[0] if patches is not None else count
    for name, table in (("origins", origins), ("rows", rows)):
        if table.dtype != torch.int64:
            raise TypeError(f"{name}: got {_checks.describe(table)}, expected int64")
        if table.ndim != 2 or table.shape[0] != count or table.shape[1] != axes:
            shape = f"({'N' if count is None else count}, {axes})"
            raise ValueError(f"{name}: got shape {tuple(table.shape)}, expected {shape}")
    separable = len(weights) == axes
    patch = None if patches is None else tuple(patches.shape[2:])
    _check_weights(weights, axes, patch)
    for name, table in (("origins", origins), ("rows", rows), *(("weights", w) for w in weights)):
        if table.device != device and table.device.type != "cpu":
            raise ValueError(
                f"{name}: is on {table.device}, expected the CPU or {device}, where {partner} is"
            )
    validate = rows.device.type == "cpu" or os.environ.get("VOXFUSE_VALIDATE", "0") == "1"
    if separable and validate:
        _check_rows(rows, weights)
    return (
        origins.to(device, non_blocking=True),
        rows.to(device, non_blocking=True),
        [w.to(device, non_blocking=True) for w in weights],
    )


def _check_weights(weights: list[Tensor], axes: int, patch: tuple[int, ...] | None) -> None:
    for w in weights:
        if w.dtype != torch.float64:
            raise TypeError(f"weights: got {_checks.describe(w)}, expected float64")
        if w.requires_grad:
            raise ValueError("weights: require grad, but no gradient flows to them; detach them")
    shapes = [tuple(w.shape) for w in weights]
    separable = len(weights) == axes and all(len(shape) == 2 for shape in shapes)
    dense = len(weights) == 1 and len(shapes[0]) == axes + 1 and shapes[0][0] == 1
    fits = separable or dense
    if fits and patch is not None:
        fits = patch_shape(weights, axes) == patch
    if not fits:
        expected = "one (k, extent) tensor an axis, or one dense (1, *patch) tensor"
        if patch is not None:
            expected = ", ".join(f"(k, {size})" for size in patch) + f", or one dense {(1, *patch)}"
        raise ValueError(f"weights: got shapes {shapes}, expected {expected}")


def _check_rows(rows: Tensor, weights: list[Tensor]) -> None:
    if torch.compiler.is_compiling() or rows.numel() == 0 or len(weights) != rows.shape[1]:
        return
    low, high = rows.amin(0).tolist(), rows.amax(0).tolist()
    for axis, w in enumerate(weights):
        if low[axis] < 0 or high[axis] >= w.shape[0]:
            wrong = low[axis] if low[axis] < 0 else high[axis]
            raise ValueError(rows_error(wrong, axis, w.shape[0]))


def rows_error(row: int, axis: int, count: int) -> str:
    """The message for a row that the weights of an axis do not have; the same on every backend."""
    return f"rows: {row} on axis {axis} is outside [0, {count}), the rows of weights[{axis}]"


def _fake(x: Any) -> Tensor:
    result: Tensor = x.patches.new_empty((x.patches.shape[1], *x.volume_shape))
    return result


def _fake_backward(x: Any) -> Tensor:
    patch = patch_shape(x.weights, x.grad.ndim - 1)
    result: Tensor = x.grad.new_empty((x.origins.shape[0], x.grad.shape[0], *patch))
    return result


def _setup_context(ctx: Any, x: Any, output: Tensor) -> None:
    # Linear without an activation: nothing of the patches is needed.
    patches = x.patches if x.activation else None
    ctx.save_for_backward(patches, x.origins, x.rows, x.total, *x.weights)
    ctx.activation = x.activation


def _backward(operators: Any, ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    if not ctx.needs_input_grad[0]:
        return {}
    patches, origins, rows, total, *weights = ctx.saved_tensors
    gradient = operators.overlap_add_backward(
        grad.contiguous(), origins, rows, weights, total, patches, ctx.activation
    )
    return {"patches": gradient}


def _setup_double_context(ctx: Any, x: Any, output: Tensor) -> None:
    ctx.save_for_backward(x.origins, x.rows, x.total, *x.weights)
    ctx.volume_shape = list(x.grad.shape[1:])
    ctx.activation = x.activation


def _double_backward(operators: Any, ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    if ctx.activation:
        raise RuntimeError(
            "overlap_add_backward cannot be differentiated again with an activation: activate the "
            "patches before overlap_add instead"
        )
    if not ctx.needs_input_grad[0]:
        return {}
    # The forward is linear in the patches, so that the adjoint of its adjoint is itself.
    origins, rows, total, *weights = ctx.saved_tensors
    gradient = operators.overlap_add(
        grad.contiguous(), origins, rows, weights, total, ctx.volume_shape
    )
    return {"grad": gradient}


for _name, _made in (
    ("overlap_add", _fake),
    ("overlap_add_backward", _fake_backward),
    ("overlap_add_", lambda x: None),
    ("overlap_weights_", lambda x: None),
):
    _registry.register(_name, _made, stem="overlap_add")
_registry.register_autograd("overlap_add", _setup_context, _backward)
_registry.register_autograd("overlap_add_backward", _setup_double_context, _double_backward)
