"""Windows that weight a patch when overlapping patches are added."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxfuse.fusion._host import host
from voxfuse.ops import _checks

Vector = NDArray[np.float64]

#: The highest degree of B-spline on offer.
MAX_ORDER = 9


def bspline_window(size: int | Sequence[int], order: int = 5, *, floor: float = 0.0) -> Tensor:
    r"""Centred cardinal B-spline of degree ``order`` on uniform knots stretched over the patch.

    .. math:: w(t) = B_n\!\left(\tfrac{n + 1}{N} (t + \tfrac12)\right), \quad t = 0 \dots N-1

    sampled at voxel centres, so that it is never 0. Its standard deviation is
    :math:`N / \sqrt{12 (n+1)}`: the order sets the effective width. Order 5 (0.118 N) is close to
    the usual Gaussian of 0.125 N, with compact support.

    Args:
        size: patch extent in voxels, or one extent an axis for the product of the axes' windows.
        order: degree, 0 (constant) to 9.
        floor: no weight of the result is less: ``max(w, floor)``. Corners of a product are tiny
            (1.8e-42 of the peak at order 7 and 128^3), which voxfuse's float64 weights take but
            other dtypes turn to 0. Whoever casts the window, as MONAI does with a
            ``roi_weight_map``, needs a floor: 1e-3 is MONAI's own, and suits float16 too.

    Returns:
        float64 tensor of shape (size,) or ``size``.

    Raises:
        TypeError: ``size`` or ``order`` is no integer.
        ValueError: ``size`` is below 1, ``order`` outside 0 to 9, or ``floor`` negative or not less
            than the greatest weight.

    Example:
        >>> import voxfuse
        >>> voxfuse.bspline_window(4, order=1)
        tensor([0.2500, 0.7500, 0.7500, 0.2500], dtype=torch.float64)
    """
    window = _window(size, lambda n: _bspline(n, order))
    peak = float(window.max())
    if not 0 <= floor < peak:
        raise ValueError(
            f"floor: got {floor}, expected a number >= 0 and less than the greatest weight, "
            f"{peak:.4g}"
        )
    return window.clamp(min=floor) if floor else window


def hashemi_window(size: int | Sequence[int]) -> Tensor:
    """Quadratic B-spline on the knots {0, N/4, 3N/4, N}, peak 1 (Hashemi et al. 2018).

    With t the triangular window in (0, 1]: ``2 t^2`` for t <= 1/2, ``1 - 2 (1 - t)^2`` above; a
    partition of unity at steps of N/2. Arguments, result and errors as for
    :func:`bspline_window`.
    """
    return _window(size, host.hashemi)


def gaussian_window(size: int | Sequence[int], sigma_scale: float = 0.125) -> Tensor:
    """Gaussian of standard deviation ``sigma_scale * size`` about the patch's centre.

    MONAI's importance map without its lower clamp, which :func:`monai_gaussian_window` has.
    Arguments, result and errors as for :func:`bspline_window`.
    """
    return _window(size, lambda n: _gaussian(n, sigma_scale))


def nnunet_gaussian_window(size: int | Sequence[int], sigma_scale: float = 0.125) -> Tensor:
    """nnU-Net's Gaussian: about voxel ``size // 2``, cut at four standard deviations.

    Voxels beyond the cut get the smallest weight inside it. nnU-Net rounds the same window to
    float16, where 0.4 % of it underflow at 128^3; here it stays float64. Arguments, result and
    errors as for :func:`bspline_window`.
    """
    return _window(size, lambda n: _nnunet_gaussian(n, sigma_scale))


def hann_window(size: int | Sequence[int]) -> Tensor:
    """``sin^2(pi (t + 1) / (N + 1))``: a Hann window without its zero ends, as TorchIO's.

    Arguments, result and errors as for :func:`bspline_window`.
    """
    return _window(size, host.hann)


def monai_gaussian_window(size: Sequence[int], sigma_scale: float = 0.125) -> Tensor:
    """MONAI's importance map: the Gaussian product, clamped below at max(its minimum, 1e-3).

    The clamp makes it no product of the axes' windows: fusing with it at positions that are no grid
    keeps a volume of weight sums.

    Args:
        size: one extent an axis.
        sigma_scale: standard deviation over extent.

    Returns:
        float64 tensor of shape ``size``.
    """
    return torch.from_numpy(monai_gaussian(size, [sigma_scale] * len(size)).dense())


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"size: got {value!r}, expected an integer or one integer an axis")
    if value < 1:
        raise ValueError(f"size: got {value}, expected at least 1")
    return int(value)


def _window(size: int | Sequence[int], vector: Callable[[int], Vector]) -> Tensor:
    if isinstance(size, Sequence) and not isinstance(size, str):
        sizes = [_size(n) for n in size]
        if not sizes:
            raise ValueError("size: got no axis, expected at least one")
        result = torch.from_numpy(vector(sizes[0]))
        for n in sizes[1:]:
            result = result.unsqueeze(-1) * torch.from_numpy(vector(n))
        return result
    return torch.from_numpy(vector(_size(size)))


def _bspline(size: int, order: int) -> Vector:
    if isinstance(order, bool) or not isinstance(order, int):
        raise TypeError(f"order: got {order!r}, expected an integer from 0 to {MAX_ORDER}")
    if not 0 <= order <= MAX_ORDER:
        raise ValueError(f"order: got {order}, expected 0 to {MAX_ORDER}")
    result: Vector = host.bspline(size, order)
    return result


def _check_sigma(sigma_scale: float) -> None:
    if not (sigma_scale > 0 and math.isfinite(sigma_scale)):
        raise ValueError(f"sigma_scale: got {sigma_scale}, expected a finite number > 0")


def _gaussian(size: int, sigma_scale: float) -> Vector:
    _check_sigma(sigma_scale)
    result: Vector = host.gaussian(size, (size - 1) / 2, sigma_scale * size)
    return result


def _nnunet_gaussian(size: int, sigma_scale: float) -> Vector:
    _check_sigma(sigma_scale)
    sigma = sigma_scale * size
    result: Vector = host.gaussian(size, float(size // 2), sigma)
    inside = np.abs(np.arange(size) - size // 2) <= int(4 * sigma + 0.5)
    return np.where(inside, result, np.min(result[inside]))


_SEPARABLE: dict[str, Callable[[int], Vector]] = {
    "bspline": lambda n: _bspline(n, 5),
    **{f"bspline{k}": lambda n, k=k: _bspline(n, k) for k in range(MAX_ORDER + 1)},  # type: ignore[misc]
    "hashemi": lambda n: host.hashemi(n),
    "gaussian": lambda n: _gaussian(n, 0.125),
    "nnunet_gaussian": lambda n: _nnunet_gaussian(n, 0.125),
    "hann": lambda n: host.hann(n),
    "constant": lambda n: np.ones(n),
}


@dataclass(frozen=True)
class Raised:
    """The product of one float64 vector an axis, and ``floor`` wherever it would be less."""

    vectors: list[Vector]
    floor: float

    def dense(self) -> Vector:
        """The weights of all voxels of a patch."""
        product = self.vectors[0]
        for vector in self.vectors[1:]:
            product = product[..., None] * vector
        return np.maximum(product, self.floor)


#: The least weight of MONAI's Gaussian.
LEAST_WEIGHT = 1e-3


def monai_gaussian(size: Sequence[int], sigma_scale: Sequence[float]) -> Raised:
    """:func:`monai_gaussian_window` in factors, one ``sigma_scale`` an axis."""
    if len(size) == 0:
        raise ValueError("size: got no axis, expected at least one")
    vectors = [_gaussian(_size(n), s) for n, s in zip(size, sigma_scale, strict=True)]
    least = math.prod(float(vector.min()) for vector in vectors)
    return Raised(vectors, max(least, LEAST_WEIGHT))


_RAISED: dict[str, Callable[[Sequence[int]], Raised]] = {
    "monai_gaussian": lambda size: monai_gaussian(size, [0.125] * len(size))
}

#: What ``window=`` accepts by name.
NAMES = (*_SEPARABLE, *_RAISED)

#: What ``window=`` accepts: a name, a dense array of the patch's shape, one vector an axis, or
#: those with a floor.
WindowLike = str | Tensor | NDArray[Any] | Sequence[Any] | Raised


def raised_window(window: WindowLike, patch: Sequence[int]) -> Raised | None:
    """The window of a patch in factors and floor, if it is such a one of several axes."""
    if isinstance(window, str) and window in _RAISED:
        window = _RAISED[window](tuple(patch))
    return window if isinstance(window, Raised) and len(window.vectors) > 1 else None


def resolve_window(window: WindowLike, patch: Sequence[int]) -> list[Vector]:
    """Return the float64 window of a patch: one vector an axis, or a single dense array.

    Raises:
        TypeError: ``window`` is neither a name nor arrays of real numbers.
        ValueError: unknown name, wrong shape, or weights that are negative, not finite or all 0.
    """
    patch = tuple(patch)
    if isinstance(window, Raised):
        window = window.dense()
    if isinstance(window, str):
        if window in _SEPARABLE:
            return [_SEPARABLE[window](size) for size in patch]
        if window in _RAISED:
            return [_RAISED[window](patch).dense()]
        listed = ", ".join(repr(name) for name in NAMES)
        raise ValueError(f"window: got {window!r}, expected one of {listed}, or arrays")
    if isinstance(window, (Tensor, np.ndarray)):
        vectors = [_real(window)]
        fits = vectors[0].shape == patch
    elif isinstance(window, Sequence):
        vectors = [_real(vector) for vector in window]
        fits = [vector.shape for vector in vectors] == [(size,) for size in patch]
    else:
        raise TypeError(
            f"window: got {type(window).__name__}, expected a name, an array of the patch's shape, "
            "or one vector an axis"
        )
    if not fits:
        got = [vector.shape for vector in vectors]
        raise ValueError(
            f"window: got shape {got[0] if len(got) == 1 else got}, expected {patch}, or one "
            f"vector an axis: {[(size,) for size in patch]}"
        )
    for vector in vectors:
        if not np.isfinite(vector).all() or (vector < 0).any() or not vector.any():
            raise ValueError("window: weights must be finite, >= 0 and not all 0")
    return vectors


def refuse_gradient(name: str, weights: Tensor) -> None:
    """Raise ValueError where a gradient would be expected that weights of patches do not have."""
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires grad, but no gradient flows to it; detach it")


def _real(values: Any) -> Vector:
    if isinstance(values, Tensor):
        if values.is_complex():
            raise TypeError(f"window: got {_checks.describe(values)}, expected real numbers")
        refuse_gradient("window", values)
        values = values.detach().to("cpu", torch.float64).numpy()
    try:
        if np.iscomplexobj(values):
            raise TypeError("complex numbers")
        return np.ascontiguousarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"window: got {values!r}, expected real numbers") from None
