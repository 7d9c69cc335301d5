"""Weights of a patch's voxels in a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from voxfuse.fusion.windows import (
    WindowLike,
    monai_gaussian,
    raised_window,
    refuse_gradient,
    resolve_window,
)
from voxfuse.ops import _checks

MODES = ("constant", "gaussian")


@dataclass(frozen=True)
class Importance:
    """Weights of a patch's voxels, float64.

    ``factors`` are a vector an axis, of whose product no weight is below ``floor``; or one tensor
    (\\*patch) or, where weights differ by channel, (1, C, \\*patch).
    """

    factors: list[Tensor]
    floor: float = 0.0


def importance(
    roi: tuple[int, ...],
    window: WindowLike | None,
    mode: str | None,
    sigma_scale: float | Sequence[float],
    given: Tensor | None,
) -> Importance:
    """The weights of a patch's voxels."""
    if window is not None:
        raised = raised_window(window, roi)
        vectors = resolve_window(window, roi) if raised is None else raised.vectors
        floor = 0.0 if raised is None else raised.floor
        return Importance([torch.from_numpy(vector) for vector in vectors], floor)
    everywhere = Importance([torch.ones(size, dtype=torch.float64) for size in roi])
    if given is not None:
        weight = _checks.plain(torch.as_tensor(given))
        refuse_gradient("roi_weight_map", weight)
        weight = weight.detach()
        if weight.is_complex():
            raise TypeError(
                f"roi_weight_map: got {_checks.describe(weight)}, expected real numbers"
            )
        weight = weight.to("cpu", torch.float64)
        axes = len(roi)
        lead = tuple(weight.shape[: max(weight.ndim - axes, 0)])
        if (
            tuple(weight.shape[len(lead) :]) != roi
            or (len(lead) not in (0, 1, 2))
            or lead[:-1] not in ((), (1,))
        ):
            raise ValueError(
                f"roi_weight_map: got shape {tuple(weight.shape)}, expected {roi}, or that after "
                "(1, C)"
            )
        valid = bool((weight >= 0).all()) and bool(weight.isfinite().all())
        if not valid or not bool(weight.any()):
            raise ValueError("roi_weight_map: weights must be finite, >= 0 and not all 0")
        if all(size == 1 for size in lead):
            weight = weight.reshape(roi)
        constant = weight.ndim == axes and bool((weight == weight.reshape(-1)[0]).all())
        return everywhere if constant else Importance([weight])
    mode = str(getattr(mode, "value", mode))
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected 'constant' or 'gaussian'")
    if mode == "constant":
        return everywhere
    sigmas = tuple(sigma_scale) if isinstance(sigma_scale, Sequence) else (sigma_scale,) * len(roi)
    if len(sigmas) != len(roi):
        raise ValueError(f"sigma_scale: got {sigmas}, expected one number or {len(roi)}")
    gaussian = monai_gaussian(roi, sigmas)
    if len(roi) == 1:
        return Importance([torch.from_numpy(gaussian.dense())])
    return Importance([torch.from_numpy(vector) for vector in gaussian.vectors], gaussian.floor)


def held(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights in the dtype of a volume, none of which becomes 0 by that."""
    if not dtype.is_floating_point:
        dtype = torch.float32
    least = torch.finfo(dtype).tiny
    return torch.where(weight == 0, weight, weight.clamp(min=least)).to(dtype)


def processed(weight: object, roi: tuple[int, ...]) -> Tensor:
    """The weights that ``process_fn`` returned, float64 on the CPU."""
    weight = _checks.require_tensor("process_fn's weights", weight)
    lead = tuple(weight.shape[: max(weight.ndim - len(roi), 0)])
    if weight.ndim < len(roi) or len(lead) > 2 or lead[:-1] not in ((), (1,)):
        raise ValueError(
            f"process_fn: returned weights of shape {tuple(weight.shape)}, expected {roi}, or that "
            "after (1, C)"
        )
    return weight.detach().to("cpu", torch.float64)


def dense(importance: Importance) -> Tensor:
    """The weights as one tensor."""
    weight = importance.factors[0]
    for vector in importance.factors[1:]:
        weight = weight.unsqueeze(-1) * vector
    return weight.clamp(min=importance.floor) if importance.floor else weight


def resized(importance: Importance, patch: tuple[int, ...]) -> Importance:
    """The weights of an output of another resolution: the nearest, as MONAI takes them."""
    axes, factors = len(patch), importance.factors
    if len(factors) == axes:
        vectors = [_nearest(vector, -1, size) for vector, size in zip(factors, patch, strict=True)]
        return Importance(vectors, importance.floor)
    weight = factors[0]
    for axis, size in enumerate(patch):
        weight = _nearest(weight, axis - axes, size)
    return Importance([weight])


def _nearest(weight: Tensor, axis: int, size: int) -> Tensor:
    if weight.shape[axis] == size:
        return weight
    index = torch.arange(weight.shape[axis], dtype=torch.float64)[None, None]
    index = torch.nn.functional.interpolate(index, size, mode="nearest-exact")[0, 0].long()
    return weight.index_select(axis, index.to(weight.device))
