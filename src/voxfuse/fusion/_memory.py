"""Large, cleared tensors whose first touch is cheap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from voxfuse.fusion._host import host


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """As ``torch.zeros``, on huge pages where the system has them.

    Page by page of 4 KiB, the first touch of a volume takes longer than fusing patches into it.
    """
    result = torch.empty(tuple(shape), dtype=dtype, device=device)
    advise = getattr(host, "advise_huge_pages", None)
    if advise is not None and result.device.type == "cpu":
        advise(result.data_ptr(), result.numel() * result.element_size())
    return result.zero_()
