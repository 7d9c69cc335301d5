"""Large tensors whose first touch is cheap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
