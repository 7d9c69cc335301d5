"""Channels interpolated to another grid, of which only the decision between them is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from voxfuse.contract import Activation, Resampled
from voxfuse.ops import _checks, _registry
from voxfuse.ops.finalize_slab import check_threshold
from voxfuse.reference.hard_confusion import least_above

LABEL_DTYPES = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)


def axis_table(
    source: int,
    target: int,
    order: int = 1,
    *,
    align_corners: bool = False,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Where the voxels of a target axis lie in the source, and what its neighbours there weigh.

    .. math::
        x_k = \frac{n}{m} (k + \tfrac12) - \tfrac12 \quad\text{clipped to } [0, n-1],
        \qquad x_k = k \frac{n-1}{m-1} \text{ with } \mathtt{align\_corners}

    in float64: the positions of ``skimage.transform.resize(mode="edge")`` and of
    ``scipy.ndimage.map_coordinates(mode="nearest")`` as nnU-Net calls them, and of
    ``torch.nn.functional.interpolate``. Order 1 weighs the two neighbours by
    1 - (x - floor x) and x - floor x, each rounded once to float32; order 0 takes
    floor(x + 0.5). An axis that keeps its size is not computed with. On a GPU the tables are made
    there, with the same bits: nothing waits for a copy.

    Returns:
        int64 (m,) indices of the lower neighbour, and float32 (2, m) weights of the lower and the
        upper one; an upper weight of 0 means that the lower voxel is taken as it is.

    Example:
        >>> from voxfuse.ops.resample_argmax import axis_table
        >>> index, weight = axis_table(2, 4)
        >>> index, weight[1]
        (tensor([0, 0, 0, 1]), tensor([0.0000, 0.2500, 0.7500, 0.0000]))
    """
    one_voxel = torch.zeros(2, target, device=device)
    one_voxel[0] = 1
    if source == target:
        return torch.arange(target, device=device), one_voxel
    k = torch.arange(target, dtype=torch.float64, device=device)
    if align_corners:
        x = k * ((source - 1) / (target - 1)) if target > 1 else torch.zeros_like(k)
    else:
        x = (source / target) * (k + 0.5) - 0.5
    x = x.clamp(0, source - 1)
    if order == 0:
        return torch.floor(x + 0.5).long(), one_voxel
    index = torch.floor(x)
    upper = x - index
    weight = torch.stack([1 - upper, upper]).float()
    # At the last voxel there is no upper neighbour, and x - floor x is 0.
    return index.long(), weight


def resample_argmax(
    input: Tensor,
    size: Sequence[int],
    mode: str = "labels",
    *,
    order: int | Sequence[int] = 1,
    align_corners: bool = False,
    activation: str | None = None,
    threshold: float | None = None,
    regions: Sequence[int] | None = None,
    round_to_half: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Interpolate (C, \*spatial) to another size and decide between the channels, in one pass.

    With v the channels' interpolated values (:func:`axis_table`), by ``mode``:

    - "labels": the index of the greatest v, ties to the lower channel; a NaN is greater than all,
      the first one wins, as in ``torch.argmax``;
    - "mask": ``activation(v) > threshold``, for every channel;
    - "regions": the label ``regions[c]`` of the last channel c for which that is true, or 0:
      nnU-Net's ``regions_class_order``;
    - "values": v, of a single channel.

    No array of C channels at the target's size is made: what is alive at a time is a few rows.

    Args:
        input: (C, \*spatial) with 1 to 3 axes; logits, or any other numbers. Computed in float32.
        size: extent of the result, one number an axis.
        order: 1 (linear) or 0 (nearest), for all axes or one an axis. ``(0, 1, 1)`` is nnU-Net's
            separate treatment of a coarse first axis with ``order_z=0``.
        align_corners: the corners' centres fall on each other, as in PyTorch.
        activation, threshold: of "mask" and "regions"; "sigmoid" (None means it) or "none", and 0.5
            unless given. Compared as in :func:`voxfuse.hard_confusion`.
        regions: the channels' labels, in their order.
        round_to_half: round v to float16 first, as a resampling of float16 logits that returns
            float16 does.
        dtype: of labels: uint8, uint16, int16, int32 or int64; by default the first of these that
            holds them, as the sliding window's.
        out: where the result goes instead: contiguous, of the result's shape.
        backend: "auto", "cpp", "cuda", "triton" or "reference"; see :func:`voxfuse.backends`.

    Returns:
        (\*size) labels; (C, \*size) bool for a mask; (\*size) float32 values. It has no gradient.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices or options do not fit, or ``input`` requires a gradient.

    Example:
        >>> import torch, voxfuse
        >>> logits = torch.tensor([[4.0, 0.0], [1.0, 2.0]])  # 2 classes, 2 voxels
        >>> voxfuse.resample_argmax(logits, (4,))
        tensor([0, 0, 1, 1], dtype=torch.uint8)
    """
    input = _checks.require_tensor("input", input)
    _checks.choice("mode", mode, Resampled)
    if torch.is_grad_enabled() and input.requires_grad:
        raise ValueError("input: requires grad, but a decision has none; detach it")
    input = input.detach()
    if input.dtype not in _checks.NUMBER_DTYPES or not 2 <= input.ndim <= 4 or input.shape[0] < 1:
        hint = ", without the batch axis" if input.ndim > 4 else ""
        raise TypeError(
            f"input: got {_checks.describe(input)}, expected numbers (C, *spatial) with 1 to 3 "
            f"axes, C >= 1{hint}"
        )
    channels, *source = input.shape
    target = _checks.integers("size", size)
    if len(target) != len(source) or min(target) < 1:
        batch = input.shape[0] == 1 and len(target) == len(source) - 1
        hint = f"; input {tuple(input.shape)} is to be without the batch axis" if batch else ""
        raise ValueError(f"size: got {target}, expected {len(source)} numbers >= 1{hint}")
    if min(source) < 1:
        raise ValueError(f"input: got shape {tuple(input.shape)}, which has no voxels")
    orders = tuple(order) if isinstance(order, Iterable) else (order,) * len(source)
    if len(orders) != len(source) or not set(orders) <= {0, 1}:
        raise ValueError(f"order: got {order!r}, expected 0 or 1, for all axes or one an axis")
    chosen = decision(mode, channels, activation, threshold, regions)
    most = max([*chosen.regions, channels - 1])
    result = _result(input, (channels, *target), mode, most, dtype, out)
    tables = [
        axis_table(n, m, how, align_corners=align_corners, device=input.device)
        for n, m, how in zip(source, target, orders, strict=True)
    ]
    decide(
        result if mode == "mask" else result.unsqueeze(0),
        input,
        tables,
        chosen,
        round_to_half=round_to_half,
        backend=backend,
    )
    return result


class Decision(NamedTuple):
    """What is kept of a voxel's interpolated channels, as the operator takes it."""

    kept: Resampled
    least: float
    regions: list[int]


def decision(
    mode: str,
    channels: int,
    activation: str | None = None,
    threshold: float | None = None,
    regions: Sequence[int] | None = None,
) -> Decision:
    """Check what :func:`resample_argmax` is to make of some channels."""
    kept = Resampled(_checks.choice("mode", mode, Resampled))
    if mode == "labels" and channels == 1:
        raise ValueError("mode: 'labels' of one channel are all 0; use 'mask'")
    if mode == "values" and channels != 1:
        raise ValueError(f"mode: got 'values' of {channels} channels, expected a single one")
    least = 0.0
    _checks.only_with(mode, ("mask", "regions"), activation=activation, threshold=threshold)
    if mode in ("mask", "regions"):
        activation = "sigmoid" if activation is None else activation
        threshold = 0.5 if threshold is None else threshold
        check_threshold(threshold)
        if activation not in ("sigmoid", "none"):
            raise ValueError(f"activation: got {activation!r}, expected 'sigmoid' or 'none'")
        least = least_above(int(Activation[activation]), float(threshold))
    return Decision(kept, least, check_regions(regions, mode, channels))


def decide(
    out: Tensor,
    input: Tensor,
    tables: Sequence[tuple[Tensor, Tensor]],
    chosen: Decision,
    *,
    round_to_half: bool = False,
    backend: str = "auto",
) -> None:
    """The operator by tables of its axes (:func:`axis_table`), which may be parts of those.

    ``out`` is contiguous (channels or 1, spatial), of a dtype that :func:`resample_argmax` returns.
    """
    operators = _registry.namespace_of(backend, input.device)
    operators.resample_argmax(
        out,
        input,
        [index for index, _ in tables],
        [weight for _, weight in tables],
        *chosen,
        round_to_half,
    )


def check_regions(regions: Sequence[int] | None, mode: str, channels: int) -> list[int]:
    """The labels of regions, which that mode needs and no other takes."""
    if mode != "regions":
        if regions is not None:
            raise ValueError(f"regions: given with mode {mode!r}, expected None")
        return []
    if regions is None:
        raise ValueError("regions: mode 'regions' needs the label of every channel")
    labels = list(_checks.integers("regions", regions))
    if len(labels) != channels or min(labels) < 0 or max(labels) >= 2**31:
        raise ValueError(
            f"regions: got {labels}, expected {channels} numbers of 0 to 2147483647, one a channel"
        )
    return labels


def _result(
    input: Tensor,
    shape: tuple[int, ...],
    mode: str,
    most: int,
    dtype: torch.dtype | None,
    out: Tensor | None,
) -> Tensor:
    """Where the result goes, checked or made."""
    shape = shape if mode == "mask" else shape[1:]
    fixed = {"mask": torch.bool, "values": torch.float32}.get(mode)
    if fixed is not None:
        allowed: tuple[torch.dtype, ...] = (fixed,)
    else:
        allowed = tuple(x for x in LABEL_DTYPES if torch.iinfo(x).max >= most)
    dtype = dtype or (out.dtype if out is not None else allowed[0])
    if dtype not in allowed:
        listed = ", ".join(str(x).removeprefix("torch.") for x in allowed)
        raise TypeError(
            f"dtype: got {dtype}, expected {listed} for mode {mode!r}"
            + ("" if fixed is not None else f" and labels up to {most}")
        )
    if out is None:
        return torch.empty(shape, dtype=dtype, device=input.device)
    out = _checks.require_tensor("out", out)
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != input.device:
        raise ValueError(
            f"out: got {_checks.describe(out)}, expected {dtype} of shape {shape} on {input.device}"
        )
    if not out.is_contiguous():
        raise ValueError(f"out: strides {out.stride()}, expected a contiguous tensor")
    return out


_registry.register("resample_argmax", lambda x: None, stem="resample_argmax")
