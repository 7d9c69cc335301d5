"""Inference patch by patch over a volume that the network cannot take at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from voxfuse.fusion.grids import RULES, Grid, Tables, plan_grid
from voxfuse.fusion.windows import WindowLike
from voxfuse.ops import _checks
from voxfuse.ops.overlap_add import overlap_add_
from voxfuse.reference.overlap_add import accumulation_dtype

PADDING_MODES = ("constant", "reflect", "replicate", "circular")


def sliding_window_inference(
    volume: Tensor,
    roi_size: int | Sequence[int],
    predictor: Callable[[Tensor], Tensor],
    overlap: float | Sequence[float] = 0.5,
    window: WindowLike = "bspline",
    sw_batch_size: int = 1,
    *,
    grid: str = "shifted",
    padding_mode: str | None = None,
    cval: float = 0.0,
    sw_device: torch.device | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Predict overlapping patches of a volume and fuse them into one prediction.

    Patches are predicted ``sw_batch_size`` at a time and added at once: besides the result, only
    one batch of predictions is alive. Runs without gradients; for a differentiable fusion collect
    the predictions and call :func:`voxfuse.overlap_add`.

    Args:
        volume: (B, channels, \*spatial) with 1 to 3 spatial axes, any dtype the predictor takes.
        roi_size: extent of a patch, one number for all axes or one an axis; a number below 1 means
            the volume's own extent. Where it exceeds the volume, the volume is padded on both
            sides.
        predictor: maps (b, channels, \*roi_size) to (b, C, \*roi_size) of a floating dtype.
        overlap: part of a patch that it shares with the next, in [0, 1), one number or one an axis.
        window: weights of a patch's voxels; see :func:`voxfuse.overlap_add`.
        sw_batch_size: patches a call of the predictor; the result does not depend on it.
        grid: "shifted" (MONAI's rule), "even" (nnU-Net's) or "half_patch" (Hashemi et al. 2018);
            see :func:`voxfuse.fusion.grids.plan_grid`.
        padding_mode: what lies outside the volume: "constant" (``cval``), "reflect", "replicate"
            or "circular"; None means "reflect" with ``grid="half_patch"``, else "constant".
        cval: value of constant padding.
        sw_device: where the predictor runs; None means where the volume is.
        device: where the predictions are added; None means where the volume is.
        progress: show a progress bar (needs the package tqdm).
        backend: backend of the fusion; see :func:`voxfuse.backends`.

    Returns:
        (B, C, \*spatial) in the predictions' dtype, accumulated in float32 (float64 for float64).

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or options do not fit, or the predictor returns another shape.

    Example:
        >>> import torch, voxfuse
        >>> volume = torch.rand(1, 1, 40, 30, 20)
        >>> double = lambda patch: 2 * patch
        >>> result = voxfuse.sliding_window_inference(volume, (16, 16, 16), double)
        >>> torch.allclose(result, 2 * volume)
        True
    """
    volume = _checks.require_tensor("volume", volume)
    if not 3 <= volume.ndim <= 5 or 0 in volume.shape:
        raise ValueError(
            f"volume: got shape {tuple(volume.shape)}, expected (B, channels, *spatial) with 1 to "
            "3 spatial axes, none of them empty"
        )
    spatial = tuple(volume.shape[2:])
    roi = _roi(roi_size, spatial)
    if not callable(predictor):
        raise TypeError(f"predictor: got {type(predictor).__name__}, expected a callable")
    if isinstance(sw_batch_size, bool) or not isinstance(sw_batch_size, int) or sw_batch_size < 1:
        raise ValueError(f"sw_batch_size: got {sw_batch_size!r}, expected an integer >= 1")
    if grid not in RULES:
        listed = ", ".join(repr(name) for name in RULES)
        raise ValueError(f"grid: got {grid!r}, expected one of {listed}")
    padding = padding_mode or ("reflect" if grid == "half_patch" else "constant")
    if padding not in PADDING_MODES:
        listed = ", ".join(repr(name) for name in PADDING_MODES)
        raise ValueError(f"padding_mode: got {padding!r}, expected one of {listed}")

    plan = plan_grid(spatial, roi, overlap, grid)
    place = torch.device(device) if device is not None else volume.device
    network_place = torch.device(sw_device) if sw_device is not None else volume.device
    tables = _moved(plan.tables(window), place)
    origins = plan.origins.tolist()
    count = len(plan)
    result: Tensor | None = None
    dtype = torch.float32
    with torch.no_grad():
        for first in _batches(volume.shape[0] * count, sw_batch_size, progress):
            items = range(first, min(first + sw_batch_size, volume.shape[0] * count))
            batch = _join(
                [
                    _patch(volume, item // count, origins[item % count], roi, padding, cval)
                    for item in items
                ]
            )
            prediction = _prediction(predictor(batch.to(network_place)), len(items), plan)
            prediction = prediction.to(place)
            if result is None:
                dtype = prediction.dtype
                result = torch.zeros(
                    (volume.shape[0], prediction.shape[1], *spatial),
                    dtype=accumulation_dtype(dtype),
                    device=place,
                )
            elif (prediction.dtype, prediction.shape[1]) != (dtype, result.shape[1]):
                raise ValueError(
                    f"predictor: returned {_checks.describe(prediction)}, but before "
                    f"{result.shape[1]} channels of {dtype}"
                )
            _add(result, prediction, items, tables, count, backend)
    assert result is not None
    return result.to(dtype)


def _add(
    result: Tensor, prediction: Tensor, items: range, tables: Tables, count: int, backend: str
) -> None:
    """Add a batch of predictions, which may belong to several samples."""
    done = 0
    while done < len(items):
        sample, patch = divmod(items[done], count)
        size = min(len(items) - done, count - patch)
        overlap_add_(
            result[sample],
            prediction[done : done + size],
            tables.origins[patch : patch + size],
            tables.rows[patch : patch + size],
            tables.weights,
            total=tables.total,
            backend=backend,
        )
        done += size


def _moved(tables: Tables, device: torch.device) -> Tables:
    """Move the weights to ``device`` once; indices stay on the CPU, where they can be checked."""
    return Tables(
        tables.origins,
        tables.rows,
        [w.to(device) for w in tables.weights],
        None if tables.total is None else tables.total.to(device),
    )


def _roi(roi_size: int | Sequence[int], spatial: tuple[int, ...]) -> tuple[int, ...]:
    sizes = tuple(roi_size) if isinstance(roi_size, Sequence) else (roi_size,) * len(spatial)
    if len(sizes) != len(spatial):
        raise ValueError(
            f"roi_size: got {tuple(sizes)}, expected one number or {len(spatial)}, to go with a "
            f"volume of {spatial}"
        )
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise TypeError(f"roi_size: got {roi_size!r}, expected integers")
    return tuple(size if size > 0 else extent for size, extent in zip(sizes, spatial, strict=True))


def _batches(total: int, size: int, progress: bool) -> Iterable[int]:
    steps = range(0, total, size)
    if not progress:
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise RuntimeError("progress: needs the package tqdm (pip install tqdm)") from None
    bar: Iterable[int] = tqdm(steps, unit="batch")
    return bar


def _join(patches: list[Tensor]) -> Tensor:
    return patches[0] if len(patches) == 1 else torch.cat(patches)


def _prediction(prediction: object, size: int, plan: Grid) -> Tensor:
    prediction = _checks.require_tensor("predictor's result", prediction)
    expected = (size, "C", *plan.patch_shape)
    shape = tuple(prediction.shape)
    if (
        len(shape) != len(expected)
        or shape[0] != size
        or shape[1] < 1
        or shape[2:] != plan.patch_shape
    ):
        listed = ", ".join(str(extent) for extent in expected)
        raise ValueError(f"predictor: returned shape {shape}, expected ({listed})")
    if prediction.dtype not in _checks.LOGIT_DTYPES:
        raise TypeError(
            f"predictor: returned {_checks.describe(prediction)}, expected float32, float16, "
            "bfloat16 or float64"
        )
    return prediction


def _patch(
    volume: Tensor, sample: int, origin: list[int], roi: tuple[int, ...], padding: str, cval: float
) -> Tensor:
    """Cut one patch (1, channels, *roi), filling what lies outside the volume."""
    spatial = volume.shape[2:]
    inside = [
        slice(max(start, 0), min(start + size, extent))
        for start, size, extent in zip(origin, roi, spatial, strict=True)
    ]
    if all(s.stop - s.start == size for s, size in zip(inside, roi, strict=True)):
        return volume[(slice(sample, sample + 1), slice(None), *inside)]
    if padding == "constant":
        margins: list[int] = []
        for s, start, size in reversed(list(zip(inside, origin, roi, strict=True))):
            margins += [s.start - start, start + size - s.stop]
        block = volume[(slice(sample, sample + 1), slice(None), *inside)]
        return torch.nn.functional.pad(block, margins, value=cval)
    patch = volume[sample : sample + 1]
    for axis, (start, size, extent) in enumerate(zip(origin, roi, spatial, strict=True)):
        coordinates = _inside(torch.arange(start, start + size), extent, padding)
        patch = patch.index_select(2 + axis, coordinates.to(volume.device))
    return patch


def _inside(coordinates: Tensor, extent: int, padding: str) -> Tensor:
    """Coordinates whose values stand for those outside [0, extent), however far outside."""
    if padding == "circular":
        return coordinates % extent
    if padding == "replicate" or extent == 1:
        return coordinates.clamp(0, extent - 1)
    period = 2 * (extent - 1)
    folded = coordinates % period
    return torch.minimum(folded, period - folded)
