"""Inference patch by patch over a volume that the network cannot take at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voxfuse.fusion.fuser import Destination, PatchFuser
from voxfuse.fusion.grids import RULES, plan_grid
from voxfuse.fusion.orientations import Augmentation, flips
from voxfuse.fusion.windows import WindowLike
from voxfuse.ops import _checks

Predictor = Callable[[Tensor], Tensor]

PADDING_MODES = ("constant", "reflect", "replicate", "circular")


def sliding_window_inference(
    volume: Tensor,
    roi_size: int | Sequence[int],
    predictor: Predictor | Sequence[Predictor],
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
    output: str = "logits",
    activation: str = "none",
    voting: str | None = None,
    threshold: float = 0.5,
    head: tuple[Tensor, Tensor] | None = None,
    tta: Augmentation = None,
    skip: Callable[[Tensor], bool] | None = None,
    fill: float = 0.0,
    stream_axis: str | int = "auto",
    out: Destination | None = None,
    backend: str = "auto",
) -> Any:
    r"""Predict overlapping patches of a volume and fuse them into one prediction.

    Patches are predicted ``sw_batch_size`` at a time and added at once: besides the result, only
    one batch of predictions is alive, and a ring of slices (see :class:`voxfuse.PatchFuser`) where
    the result is not simply the mean of the predictions. With ``output="labels"`` and the like the
    memory of the fusion does not grow with the depth of the volume. Runs without gradients; for a
    differentiable fusion collect the predictions and call :func:`voxfuse.overlap_add`.

    Args:
        volume: (B, channels, \*spatial) with 1 to 3 spatial axes, any dtype the predictor takes.
        roi_size: extent of a patch, one number for all axes or one an axis; a number below 1 means
            the volume's own extent. Where it exceeds the volume, the volume is padded on both
            sides.
        predictor: maps (b, channels, \*roi_size) to (b, C, \*roi_size) of a floating dtype. A list
            of predictors is an ensemble, whose mean counts.
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
        output, activation, voting, threshold, fill, stream_axis: what is made of the fused
            predictions; see :class:`voxfuse.PatchFuser`.
        head: (weight, bias) of the network's last, linear layer, when the predictor returns the
            features before it: the layer is applied to fused features, slab by slab. One predictor.
        tta: test-time augmentation by flips: "mirror", "rotations" or a list of tuples of axes; see
            :func:`voxfuse.fusion.orientations.flips`. The mean of the predictions counts.
        skip: a function of a patch (1, channels, \*roi_size), cut from the padded volume: where it
            is true the patch is not predicted. Voxels under no patch get ``fill``. One sample.
        out: where the result goes: a tensor or NumPy array (a memmap, say) of the result's shape
            (for one sample also without its first axis, for one channel also without both), or for
            one sample a function of (slab, start, stop).
        backend: backend of the fusion; see :func:`voxfuse.backends`.

    Returns:
        (B, C, \*spatial) in the predictions' dtype, accumulated in float32 (float64 for float64);
        labels, foreground and entropy (B, 1, \*spatial); ``out`` where it was given, None for a
        function. If the predictor raises, the slices of ``out`` that are final are intact.

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
    several = isinstance(predictor, Sequence) and len(predictor) > 0
    if not callable(predictor) and not (several and all(map(callable, predictor))):
        # MONAI's call has the batch size in its place.
        hint = " (it comes third; MONAI's order of arguments: voxfuse.integrations.monai)"
        raise TypeError(f"predictor: got {type(predictor).__name__}, expected a callable{hint}")
    if isinstance(sw_batch_size, bool) or not isinstance(sw_batch_size, int) or sw_batch_size < 1:
        raise ValueError(f"sw_batch_size: got {sw_batch_size!r}, expected an integer >= 1")
    if grid not in RULES:
        listed = ", ".join(repr(name) for name in RULES)
        raise ValueError(f"grid: got {grid!r}, expected one of {listed}")
    padding = padding_mode or ("reflect" if grid == "half_patch" else "constant")
    if padding not in PADDING_MODES:
        listed = ", ".join(repr(name) for name in PADDING_MODES)
        raise ValueError(f"padding_mode: got {padding!r}, expected one of {listed}")

    predictors = [predictor] if callable(predictor) else list(predictor)
    if head is not None and len(predictors) > 1:
        raise ValueError(
            "head: got one for several predictors, whose heads differ; fuse them apart"
        )
    turns = flips(tta, len(spatial))
    if (skip is not None or callable(out)) and volume.shape[0] != 1:
        name = "skip" if skip is not None else "out"
        raise ValueError(f"{name}: got a function and {volume.shape[0]} samples, expected one")
    place = torch.device(device) if device is not None else volume.device
    network_place = torch.device(sw_device) if sw_device is not None else volume.device

    def cut(sample: int, origin: Sequence[int]) -> Tensor:
        return _patch(volume, sample, list(origin), roi, padding, cval)

    regular = plan_grid(spatial, roi, overlap, grid)
    options: dict[str, Any] = {
        "window": window,
        "output": output,
        "activation": activation,
        "voting": voting,
        "threshold": threshold,
        "members": len(turns) * len(predictors),
        "fill": fill,
        "backend": backend,
    }
    # The order of the patches is needed before the first prediction says how many channels it has.
    channels = 2 if head is None else head[0].shape[1]
    skipped = None if skip is None else lambda origin: bool(skip(cut(0, origin)))
    order = PatchFuser(
        spatial,
        roi,
        channels,
        origins=regular,
        stream_axis=stream_axis,
        skip=skipped,
        head=head,
        **options,
    )
    options |= {"origins": order.origins, "stream_axis": order.stream_axis, "head": head}
    origins = order.origins.tolist()
    count = len(origins)
    results = _Results(volume.shape[0], out)
    fuser: PatchFuser | None = None
    kind: tuple[torch.dtype, int] | None = None
    with torch.no_grad():
        if count == 0:
            raise ValueError("skip: is true for every patch, so that nothing was predicted")
        for first in _batches(volume.shape[0] * count, sw_batch_size, progress):
            items = range(first, min(first + sw_batch_size, volume.shape[0] * count))
            batch = _join([cut(item // count, origins[item % count]) for item in items])
            batch = batch.to(network_place)
            predictions = []
            for turn in turns:
                axes = [axis + 2 for axis in turn]
                view = batch.flip(axes) if axes else batch
                for predict in predictors:
                    prediction = _prediction(predict(view), len(items), roi).to(place)
                    if kind is None:
                        kind = (prediction.dtype, prediction.shape[1])
                    elif (prediction.dtype, prediction.shape[1]) != kind:
                        raise ValueError(
                            f"predictor: returned {_checks.describe(prediction)}, but before "
                            f"{kind[1]} channels of {kind[0]}"
                        )
                    predictions.append((prediction, turn))
            assert kind is not None
            done = 0
            while done < len(items):
                sample, patch = divmod(items[done], count)
                size = min(len(items) - done, count - patch)
                if fuser is None:
                    fuser = PatchFuser(
                        spatial, roi, kind[1], out=results.place(sample, len(spatial)), **options
                    )
                    results.prepare(sample, fuser, kind[0], place)
                part = slice(done, done + size)
                fuser.add_members(
                    [(prediction[part], turn) for prediction, turn in predictions],
                    order.origins[patch : patch + size],
                )
                if patch + size == count:
                    fuser.result()
                    fuser = None
                done += size
    return results.everything


class _Results:
    """The result of every sample in one tensor, or where the caller wants it."""

    def __init__(self, samples: int, out: Destination | None) -> None:
        self.samples = samples
        self.everything: Any = None if callable(out) and not isinstance(out, Tensor) else out
        self._out = out

    def place(self, sample: int, axes: int) -> Any:
        """Where a sample goes, if the caller said so."""
        out = self._out
        if not isinstance(out, (Tensor, np.ndarray)):
            return out
        if out.ndim == axes + 2:
            if out.shape[0] != self.samples:
                raise ValueError(
                    f"out: got shape {tuple(out.shape)}, expected {self.samples} samples"
                )
            return out[sample]
        if self.samples != 1:
            raise ValueError(f"out: got shape {tuple(out.shape)}, expected {self.samples} samples")
        return out

    def prepare(
        self, sample: int, fuser: PatchFuser, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate the result of all samples, if the caller gave no place."""
        if self._out is not None:
            return
        if self.everything is None:
            self.everything = fuser.new_result(dtype, device, (self.samples,))
        fuser.send_to(self.everything[sample])


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


def _prediction(prediction: object, size: int, roi: tuple[int, ...]) -> Tensor:
    prediction = _checks.require_tensor("predictor's result", prediction)
    expected = (size, "C", *roi)
    shape = tuple(prediction.shape)
    if len(shape) != len(expected) or shape[0] != size or shape[1] < 1 or shape[2:] != roi:
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
