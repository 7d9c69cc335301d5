"""The one rule by which a kernel's error is judged.

A kernel may be wrong by at most twice the error that plain PyTorch makes on the same computation at
the kernel's compute type, plus a rounding allowance derived from that type: ``allowance`` times the
machine epsilon times the size of what was added up. The truth is the reference in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a kernel computes in: float32 for the half types."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_accurate(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    scale: Tensor | float,
    dtype: torch.dtype,
    allowance: float,
    what: str = "",
) -> None:
    """Check ``actual`` against ``truth``, with ``plain`` as PyTorch's own attempt in ``dtype``.

    ``scale`` is the magnitude whose rounding is allowed (elementwise or one number).
    """
    actual, plain, truth = (x.detach().to(torch.float64).cpu() for x in (actual, plain, truth))
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, expected {truth.shape}"
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    error = torch.where(same, 0.0, (actual - truth).abs())
    reference_error = torch.nan_to_num((plain - truth).abs(), nan=0.0, posinf=0.0)
    if isinstance(scale, Tensor):
        scale = scale.detach().to(torch.float64).cpu()
    bound = 2 * reference_error.max() + allowance * torch.finfo(dtype).eps * scale
    excess = error - bound
    assert bool((error <= bound).all()), (
        f"{what}: error {error.flatten()[excess.argmax()]:.3e} exceeds the allowed "
        f"{(error - excess).flatten()[excess.argmax()]:.3e} "
        f"(plain PyTorch is off by {reference_error.max():.3e})"
    )
