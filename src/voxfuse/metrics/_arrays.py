"""Checks of masks, probabilities and voxel sizes; optional packages on demand."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse.contract import TARGET_ROOM

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]

#: Share by which lengths and volumes may be off: affines are float32, direction cosines of DICOM
#: have 6 digits.
ROUNDING = 1e-5


def optional(module: str, purpose: str) -> Any:
    """Import a module of an optional package, or say what it is needed for.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"{purpose} needs {package}: pip install {package} (or voxfuse[metrics])",
            name=package,
        ) from None


def as_array(name: str, values: Any) -> NDArray[Any]:
    """A NumPy array of what may be a tensor, on any device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if "bfloat16" in str(values.dtype):  # which NumPy does not have
            values = values.float()
    array = np.asarray(values)
    if array.dtype.kind not in "buif":
        raise TypeError(f"{name}: got dtype {array.dtype}, expected booleans or numbers")
    if array.ndim == 0:
        raise ValueError(f"{name}: got a number, expected an array with spatial axes")
    return array


def as_mask(name: str, values: Any) -> Mask:
    """A boolean array; other dtypes may hold 0 and 1 only."""
    array = as_array(name, values)
    if array.dtype == np.bool_:
        return array
    mask: Mask = array == 1
    if not np.array_equal(mask, array != 0):
        found = np.unique(array[~mask & (array != 0)])[:4]
        raise ValueError(
            f"{name}: got values such as {', '.join(str(value) for value in found)}, expected a "
            "mask of 0 and 1 (of a label map, labels == 1; of probabilities, p >= 0.5)"
        )
    return mask


def as_pair(prediction: Any, truth: Any, ignore: Any = None) -> tuple[Mask, Mask]:
    """Prediction and truth as masks of one shape, without the voxels to ignore."""
    masks = as_mask("prediction", prediction), as_mask("truth", truth)
    same_shape("prediction", masks[0], masks[1])
    if ignore is None:
        return masks
    kept = ~as_mask("ignore", ignore)
    same_shape("ignore", kept, masks[1])
    return masks[0] & kept, masks[1] & kept


def same_shape(name: str, array: NDArray[Any], truth: NDArray[Any]) -> None:
    if array.shape != truth.shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected that of truth, {truth.shape}")


def as_probabilities(probabilities: Any, name: str = "probabilities") -> NDArray[Any]:
    """Numbers in [0, 1]; what rounding has put beside, as a fused mean of ones, is 0 or 1."""
    array = as_array(name, probabilities)
    if array.dtype.kind != "f":
        raise TypeError(
            f"{name}: got dtype {array.dtype}, expected floating-point numbers in [0, 1]"
        )
    if not array.size:
        return array
    low, high = array.min(), array.max()
    if not (low >= -TARGET_ROOM and high <= 1 + TARGET_ROOM):  # NaN fails both
        raise ValueError(
            f"{name}: got values from {low:g} to {high:g}, expected probabilities in [0, 1] "
            "without NaN (logits need a sigmoid or softmax first)"
        )
    return array if low >= 0 and high <= 1 else array.clip(0, 1)


def as_spacing(spacing: float | Sequence[float], dimensions: int) -> Floats:
    """Voxel size in mm, one number an axis."""
    sizes = np.atleast_1d(np.asarray(spacing, dtype=np.float64))
    if sizes.shape == (1,):
        sizes = np.repeat(sizes, dimensions)
    if sizes.shape != (dimensions,) or not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError(
            f"spacing: got {spacing!r}, expected {dimensions} positive voxel sizes in mm, one an "
            "axis, or one for all"
        )
    return sizes


def bounding_box(*masks: Mask) -> tuple[slice, ...]:
    """The smallest box around the voxels of all masks; slices of length 0 if there are none."""
    box = []
    for axis in range(masks[0].ndim):
        others = tuple(other for other in range(masks[0].ndim) if other != axis)
        occupied = masks[0].any(axis=others)
        for mask in masks[1:]:
            occupied = occupied | mask.any(axis=others)
        found = np.flatnonzero(occupied)
        box.append(slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0))
    return tuple(box)
