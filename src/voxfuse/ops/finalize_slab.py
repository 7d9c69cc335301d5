"""The operator that turns finished slices of a ring into labels, probabilities and the like."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from voxfuse.contract import Activation, Finish
from voxfuse.ops import _checks, _registry

#: "identity" says that the values are probabilities already.
ACTIVATIONS = {**Activation.__members__, "identity": Activation.none}
#: What can only be made of probabilities.
_OF_PROBABILITIES = ("mask", "foreground", "entropy")

_LABEL_DTYPES = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)


def finalize_slab(
    ring: Tensor,
    out: Tensor,
    mode: str = "values",
    *,
    ring_axis: int = 0,
    start: int = 0,
    stop: int | None = None,
    activation: str = "none",
    applied: bool = False,
    divisor: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    total: Tensor | None = None,
    threshold: float = 0.5,
    fill: float = 0.0,
    clear: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Turn slices of a ring of sums into a result, in one pass and with no copy of the slab.

    With f = ring / divisor, z = weight f + bias (z = f without a head) and p = activation(z), the
    result at a voxel is, by ``mode``:

    - "values": p, all channels;
    - "labels": the index of the greatest channel, ties to the lower index, a NaN before everything
      (as ``torch.argmax``); the activation keeps the order and is not computed;
    - "mask": ``p > threshold``, all channels;
    - "foreground": the greatest p of all channels but channel 0 (of all channels with "sigmoid", or
      of the only one);
    - "entropy": ``-sum p log p`` in nats over the channels; with "sigmoid", or one channel, the sum
      of the channels' binary entropies ``-p log p - (1-p) log(1-p)``.

    Args:
        ring: (K, \*extent) contiguous float32 or float64; axis ``ring_axis`` of extent holds
            coordinate x in slot ``x % extent[ring_axis]``, as in
            :func:`voxfuse.ops.overlap_add.overlap_add_`.
        out: (C, \*slab) for values and mask, else (1, \*slab); the slab has ``stop - start`` slices
            of the ring's axis. Floating; for labels uint8, uint16, int16, int32 or int64; for a
            mask bool or uint8. May be slices of a contiguous tensor along the ring's axis; other
            layouts are copied once.
        ring_axis, start, stop: the slices; ``stop`` defaults to ``start`` plus the number of slots.
        activation: "none", "sigmoid", "softmax" (over the channels), or "identity": the values are
            probabilities. A mask, the foreground and the entropy need probabilities.
        applied: p = z: the patches went through the activation before they were added.
        divisor: predictions that every patch was added with.
        weight, bias: head (C, K) and (C,) of the ring's dtype.
        total: float64 (\*extent), 0 where no patch lies, where the result becomes ``fill``, which
            ``out`` must be able to hold.
        clear: leave zeros in the ring's slices that were read.
        backend: "auto", "cpp", "cuda", "triton" or "reference".

    Returns:
        ``out``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices or options do not fit.

    Example:
        >>> import torch
        >>> from voxfuse.ops.finalize_slab import finalize_slab
        >>> ring = torch.tensor([[0.0, 2.0, 1.0], [1.0, 2.0, 0.0]])
        >>> finalize_slab(ring, torch.empty(1, 3, dtype=torch.uint8), "labels")
        tensor([[1, 0, 0]], dtype=torch.uint8)
    """
    ring = _checks.require_tensor("ring", ring)
    out = _checks.require_tensor("out", out)
    number = _checks.choice("mode", mode, Finish)
    kind = _checks.choice("activation", activation, ACTIVATIONS)
    if mode in _OF_PROBABILITIES and activation == "none" and not applied:
        raise ValueError(
            f"activation: got 'none' with mode {mode!r}, which needs probabilities; use 'softmax' "
            "or 'sigmoid', or 'identity' where the ring holds probabilities"
        )
    if ring.dtype not in (torch.float32, torch.float64) or ring.ndim < 2 or ring.shape[0] < 1:
        raise TypeError(
            f"ring: got {_checks.describe(ring)}, expected float32 or float64 (C, *extent), C >= 1"
        )
    if not ring.is_contiguous():
        raise ValueError(f"ring: strides {ring.stride()}, expected a contiguous tensor")
    extent = tuple(ring.shape[1:])
    if not 0 <= ring_axis < len(extent):
        raise ValueError(f"ring_axis: got {ring_axis}, expected 0 <= ring_axis < {len(extent)}")
    stop = start + extent[ring_axis] if stop is None else stop
    if not 0 <= start <= stop <= start + extent[ring_axis]:
        raise ValueError(
            f"start, stop: got {start}, {stop}, expected 0 <= start <= stop <= start + "
            f"{extent[ring_axis]}, the slots of ring"
        )
    classes = _check_head(ring, weight, bias)
    slab = [stop - start if axis == ring_axis else size for axis, size in enumerate(extent)]
    expected = (classes if mode in ("values", "mask") else 1, *slab)
    if tuple(out.shape) != expected:
        raise ValueError(f"out: got shape {tuple(out.shape)}, expected {expected}")
    check_out(out, mode, classes)
    if out.device != ring.device:
        raise ValueError(f"out: is on {out.device}, but ring is on {ring.device}")
    check_threshold(threshold)
    _checks.require_held("fill", fill, out.dtype)
    if not divisor > 0:
        raise ValueError(f"divisor: got {divisor}, expected a number > 0")
    if total is not None:
        total = _checks.require_tensor("total", total)
        if total.dtype != torch.float64 or tuple(total.shape) != extent:
            raise ValueError(f"total: got {_checks.describe(total)}, expected float64 {extent}")
        if total.device != ring.device:
            raise ValueError(f"total: is on {total.device}, but ring is on {ring.device}")
    operators = _registry.namespace_of(backend, ring.device)
    target = (
        out
        if _is_slab_of_contiguous(out, ring_axis)
        else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    try:
        operators.finalize_slab(
            ring,
            target,
            total,
            weight,
            bias,
            ring_axis,
            start,
            stop,
            kind,
            applied,
            number,
            float(divisor),
            float(threshold),
            float(fill),
            clear,
        )
    except RuntimeError as error:
        _checks.reraise(error)
    return out if target is out else out.copy_(target)


def check_threshold(threshold: float) -> None:
    """Raise for a threshold to which nothing compares."""
    try:
        comparable = not math.isnan(threshold)
    except TypeError:
        raise TypeError(f"threshold: got {threshold!r}, expected a number") from None
    if not comparable:
        raise ValueError(f"threshold: got {threshold}, expected a number")


def _check_head(ring: Tensor, weight: Tensor | None, bias: Tensor | None) -> int:
    """Check the head and return the number of classes."""
    if weight is None:
        if bias is not None:
            raise ValueError("bias: given without weight")
        return ring.shape[0]
    if bias is None:
        raise ValueError("weight: given without bias")
    for name, tensor, shape in (
        ("weight", weight, ("C", ring.shape[0])),
        ("bias", bias, (weight.shape[0],)),
    ):
        fits = tensor.ndim == len(shape) and tensor.shape[-1] == shape[-1]
        if not fits or tensor.dtype != ring.dtype or tensor.device != ring.device:
            listed = ", ".join(str(size) for size in shape)
            raise ValueError(
                f"{name}: got {_checks.describe(tensor)}, expected ({listed}), like "
                f"{_checks.describe(ring)}"
            )
    return weight.shape[0]


def check_out(out: Tensor, mode: str, classes: int) -> None:
    """Raise for a result whose dtype does not hold what a mode makes."""
    if mode == "labels":
        allowed: tuple[torch.dtype, ...] = _LABEL_DTYPES
        if out.dtype in allowed and classes - 1 > torch.iinfo(out.dtype).max:
            raise ValueError(f"out: {out.dtype} does not hold the labels of {classes} classes")
    elif mode == "mask":
        allowed = (torch.bool, torch.uint8)
    else:
        allowed = _checks.LOGIT_DTYPES
    if out.dtype not in allowed:
        listed = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"out: got {_checks.describe(out)}, expected {listed}")


def _is_slab_of_contiguous(out: Tensor, ring_axis: int) -> bool:
    """Whether each of (axes before, the ring's axis and after) is dense in memory."""
    expected = 1
    for axis in range(out.ndim - 1, ring_axis, -1):
        if out.shape[axis] != 1 and out.stride(axis) != expected:
            return False
        expected *= out.shape[axis]
    expected = 0
    for axis in range(ring_axis, 0, -1):
        if out.shape[axis] == 1:
            continue
        if expected and out.stride(axis) != expected:
            return False
        expected = (expected or out.stride(axis)) * out.shape[axis]
    return True


_registry.register("finalize_slab", lambda x: None, stem="finalize_slab")
