"""Large tensors whose first touch is cheap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxfuse.fusion._host import host


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """As ``torch.empty``, on huge pages where the system has them.

    Page by page of 4 KiB, the first touch of a volume takes longer than fusing patches into it.
    """
    result = torch.empty(tuple(shape), dtype=dtype, device=device)
    advise = getattr(host, "advise_huge_pages", None)
    if advise is not None and result.device.type == "cpu":
        advise(result.data_ptr(), result.numel() * result.element_size())
    return result


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """As ``torch.zeros``, on huge pages where the system has them."""
    return empty(shape, dtype, device).zero_()


def joined(patches: Sequence[Tensor]) -> Tensor:
    """As ``torch.cat``; one tensor is returned as it is."""
    if len(patches) == 1:
        return patches[0]
    first = patches[0]
    same = all(patch.dtype == first.dtype for patch in patches)
    if first.device.type != "cpu" or not same or first.requires_grad:
        return torch.cat(list(patches))
    shape = (sum(patch.shape[0] for patch in patches), *first.shape[1:])
    return torch.cat(list(patches), out=empty(shape, first.dtype, first.device))


#: Device, first byte and the byte after the last.
Span = tuple[torch.device, int, int]


def span(tensor: Tensor | NDArray[Any]) -> Span:
    """The memory between the first and the last element of a tensor or a NumPy array."""
    if isinstance(tensor, np.ndarray):
        first, size = tensor.__array_interface__["data"][0], tensor.itemsize
        steps = [(n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True)]
        last = first + sum(step for step in steps if step > 0) + (size if tensor.size else 0)
        return torch.device("cpu"), first + sum(step for step in steps if step < 0), last
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return tensor.device, 0, 0
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return tensor.device, first, first + (reach + 1) * tensor.element_size()


def overlapping(one: Span, other: Span) -> bool:
    """Whether two spans have bytes in common."""
    return one[0] == other[0] and max(one[1], other[1]) < min(one[2], other[2])


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements lie at one place, or strides are such that they might."""
    reach = 0
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    for size, step in sorted(axes, key=lambda axis: axis[1]):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False


def readable_bytes(size: float) -> str:
    """Bytes for people, in powers of 1000.

    Example:
        >>> from voxfuse.fusion._memory import readable_bytes
        >>> readable_bytes(64e9), readable_bytes(999_499), readable_bytes(999_700)
        ('64 GB', '999 kB', '1 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:  # three digits would round to 1e+03
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
