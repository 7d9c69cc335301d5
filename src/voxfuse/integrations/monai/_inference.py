"""MONAI's sliding window on the streaming patch fusion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from voxfuse.fusion._host import host
from voxfuse.fusion._memory import zeros
from voxfuse.fusion.fuser import PatchFuser
from voxfuse.fusion.windows import gaussian_window
from voxfuse.ops import _checks

#: The least weight of MONAI's Gaussian.
_LEAST_WEIGHT = 1e-3


def sliding_window_inference(
    inputs: Tensor,
    roi_size: Sequence[int] | int,
    sw_batch_size: int,
    predictor: Callable[..., Any],
    overlap: Sequence[float] | float = 0.25,
    mode: str = "constant",
    sigma_scale: Sequence[float] | float = 0.125,
    padding_mode: str = "constant",
    cval: float = 0.0,
    sw_device: torch.device | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    roi_weight_map: Tensor | None = None,
    process_fn: Callable[..., Any] | None = None,
    buffer_steps: int | None = None,
    buffer_dim: int = -1,
    with_coord: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``monai.inferers.sliding_window_inference``, argument by argument (MONAI 1.6), fused here.

    The weighted means are those of MONAI up to rounding; sums are float32 (float64) whatever the
    dtype of ``inputs``, which the result has. ``buffer_steps`` is accepted and has no effect:
    patches are added where the result is. ``process_fn``, four spatial axes, weights by channel and
    predictions that require a gradient are added by PyTorch, as MONAI does.

    Raises:
        ValueError: shapes or options do not fit.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import sliding_window_inference
        >>> volume = torch.rand(1, 1, 40, 30, 20)
        >>> result = sliding_window_inference(volume, (16, 16, 16), 4, lambda x: 2 * x, 0.5)
        >>> torch.allclose(result, 2 * volume)
        True
    """
    axes = inputs.ndim - 2
    if isinstance(roi_size, Sequence) and len(roi_size) != axes:
        raise ValueError(
            f"inputs: got shape {tuple(inputs.shape)}, expected (B, C) and {len(roi_size)} spatial "
            f"axes, to go with roi_size {tuple(roi_size)}"
        )
    if buffer_steps is not None and buffer_steps > 0 and not -axes <= buffer_dim <= axes:
        raise ValueError(f"buffer_dim: got {buffer_dim}, expected {-axes} to {axes}")
    shares = _per_axis(overlap, axes)
    if not all(0 <= share < 1 for share in shares):
        raise ValueError(f"overlap: got {overlap}, expected numbers in [0, 1)")
    place = torch.device(device or inputs.device)
    network_place = torch.device(sw_device or inputs.device)
    condition = kwargs.pop("condition", None)
    meta = inputs if hasattr(inputs, "copy_meta_from") else None
    volume = _checks.plain(inputs)

    image = tuple(volume.shape[2:])
    wanted = tuple(roi_size) if isinstance(roi_size, Sequence) else (roi_size,) * axes
    roi = tuple(
        int(size) if size and size > 0 else extent
        for size, extent in zip(wanted, image, strict=True)
    )
    before = [max(size - extent, 0) // 2 for size, extent in zip(roi, image, strict=True)]
    margins: list[int] = []
    for size, extent, low in reversed(list(zip(roi, image, before, strict=True))):
        margins += [low, max(size - extent, 0) - low]
    if any(margins):
        options: dict[str, Any] = {"mode": str(getattr(padding_mode, "value", padding_mode))}
        options["value"] = cval
        volume = F.pad(volume, margins, **options)
        condition = None if condition is None else F.pad(condition, margins, **options)
    padded = tuple(volume.shape[2:])
    starts = [host.shifted_starts(*axis) for axis in zip(padded, roi, shares, strict=True)]
    origins = np.stack([grid.ravel() for grid in np.meshgrid(*starts, indexing="ij")], 1)
    count = len(origins)

    weight = _importance(roi, str(getattr(mode, "value", mode)), sigma_scale, roi_weight_map)
    accumulators: list[_Accumulator] = []
    keys: list[Any] | None = None
    total = count * volume.shape[0]
    for first in _steps(total, sw_batch_size, progress):
        items = range(first, min(first + sw_batch_size, total))
        windows = [
            [
                slice(i // count, i // count + 1),
                slice(None),
                *(slice(int(o), int(o) + r) for o, r in zip(origins[i % count], roi, strict=True)),
            ]
            for i in items
        ]
        batch = _cut(volume, windows).to(network_place)
        if condition is not None:
            kwargs["condition"] = _cut(condition, windows).to(network_place)
        coordinates = (windows,) if with_coord else ()
        keys, outputs = _flat(predictor(batch, *coordinates, *args, **kwargs))
        used = weight
        if process_fn is not None:
            importance = weight.to(network_place, volume.dtype)
            outputs, used = process_fn(outputs, batch, importance)
        for number, prediction in enumerate(outputs):
            prediction = _checks.require_tensor("predictor's result", prediction)
            used = _resized(used, tuple(prediction.shape[2:]))
            if number == len(accumulators):
                accumulators.append(
                    _Accumulator(
                        prediction,
                        used,
                        origins,
                        roi,
                        padded,
                        (volume.shape[0], volume.dtype, place),
                        composed=process_fn is not None,
                    )
                )
            accumulators[number].add(prediction.to(place), items, used)
    results = [accumulator.result() for accumulator in accumulators]
    if any(margins):
        results = [_crop(result, roi, before, image) for result in results]
    if meta is not None:
        results = [_like(result, meta, place) for result in results]
    if keys is not None:
        return dict(zip(keys, results, strict=True))
    return results[0] if len(results) == 1 else tuple(results)


class _Accumulator:
    """One output of the predictor, for every sample."""

    def __init__(
        self,
        prediction: Tensor,
        weight: Tensor,
        origins: np.ndarray[Any, Any],
        roi: tuple[int, ...],
        padded: tuple[int, ...],
        place: tuple[int, torch.dtype, torch.device],
        composed: bool,
    ) -> None:
        samples, dtype, device = place
        self.channels = prediction.shape[1]
        self.patch = tuple(prediction.shape[2:])
        scale = [size / extent for size, extent in zip(self.patch, roi, strict=True)]
        self.extent = tuple(int(e * s) for e, s in zip(padded, scale, strict=True))
        # As MONAI: the origins of a coarser or finer output are rounded down.
        self.origins = torch.from_numpy((origins * np.array(scale)).astype(np.int64))
        self.count = len(origins)
        self.composed = (
            composed
            or not 1 <= len(roi) <= 3
            or weight.numel() != torch.Size(weight.shape[-len(roi) :]).numel()
            or (torch.is_grad_enabled() and prediction.requires_grad)
            or len({tuple(origin) for origin in self.origins.tolist()}) != self.count
        )
        floating = dtype if dtype in _checks.LOGIT_DTYPES else prediction.dtype
        shape = (samples, self.channels, *self.extent)
        self.sums = zeros(shape, floating, device)
        self.window = weight
        self.fuser: PatchFuser | None = None
        if self.composed:
            self.weights = zeros((1, 1, *self.extent), floating, device)
            for origin in self.origins.tolist():
                self.weights[self._box(origin)] += _with_lead(weight, len(roi)).to(self.weights)

    def _box(self, origin: Sequence[int]) -> tuple[slice, ...]:
        box = [slice(o, o + p) for o, p in zip(origin, self.patch, strict=True)]
        return (slice(None), slice(None), *box)

    def add(self, prediction: Tensor, items: range, weight: Tensor) -> None:
        if self.composed:
            weighted = prediction * _with_lead(weight, len(self.patch)).to(prediction)
            for item, patch in zip(items, weighted, strict=True):
                sample, index = divmod(item, self.count)
                box = self._box(self.origins[index].tolist())[1:]
                self.sums[sample][box] += patch
            return
        if prediction.dtype not in _checks.LOGIT_DTYPES:
            prediction = prediction.to(torch.float32)
        done = 0
        while done < len(items):
            sample, index = divmod(items[done], self.count)
            size = min(len(items) - done, self.count - index)
            if self.fuser is None:
                constant = bool((self.window == self.window.reshape(-1)[0]).all())
                self.fuser = PatchFuser(
                    self.extent,
                    self.patch,
                    self.channels,
                    origins=self.origins,
                    window="constant" if constant else self.window.reshape(self.patch),
                    stream_axis=0,
                )
                self.fuser.send_to(self.sums[sample])
            self.fuser.add(prediction[done : done + size], self.origins[index : index + size])
            if index + size == self.count:
                self.fuser = None
            done += size

    def result(self) -> Tensor:
        return self.sums / self.weights if self.composed else self.sums


def _importance(
    roi: tuple[int, ...],
    mode: str,
    sigma_scale: Sequence[float] | float,
    given: Tensor | None,
) -> Tensor:
    """The weights of a window in float64."""
    if mode not in ("constant", "gaussian"):
        raise ValueError(f"mode: got {mode!r}, expected 'constant' or 'gaussian'")
    if given is not None:
        weight = torch.as_tensor(given).detach().to("cpu", torch.float64)
        return _checks.plain(weight)
    if mode == "constant":
        return torch.ones(roi, dtype=torch.float64)
    result = torch.ones((), dtype=torch.float64)
    for size, sigma in zip(roi, _per_axis(sigma_scale, len(roi)), strict=True):
        result = result.unsqueeze(-1) * gaussian_window(size, sigma)
    return result.clamp(min=max(float(result.min()), _LEAST_WEIGHT))


def _with_lead(weight: Tensor, axes: int) -> Tensor:
    return weight[None, None] if weight.ndim == axes else weight


def _resized(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weights of an output of another resolution: nearest, as MONAI."""
    if tuple(weight.shape[-len(shape) :]) == shape:
        return weight
    return F.interpolate(_with_lead(weight, len(shape)), shape, mode="nearest-exact")


def _per_axis(value: Sequence[float] | float, axes: int) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"got {values}, expected one number or {axes}")
    return values


def _cut(volume: Tensor, windows: Sequence[Sequence[slice]]) -> Tensor:
    if len(windows) == 1:
        return volume[tuple(windows[0])]
    return torch.cat([volume[tuple(window)] for window in windows])


def _flat(outputs: Any) -> tuple[list[Any] | None, Sequence[Tensor]]:
    if isinstance(outputs, Tensor):
        return None, (outputs,)
    if isinstance(outputs, Mapping):
        keys = sorted(outputs.keys())
        return keys, tuple(outputs[key] for key in keys)
    return None, tuple(outputs)


def _steps(total: int, size: int, progress: bool) -> Iterable[int]:
    steps = range(0, total, size)
    if not progress:
        return steps
    from tqdm.auto import tqdm

    bar: Iterable[int] = tqdm(steps)
    return bar


def _crop(
    result: Tensor, roi: tuple[int, ...], before: list[int], image: tuple[int, ...]
) -> Tensor:
    """Leave out what lies over the padding; sizes in voxels of the output, as MONAI finds them."""
    scale = [extent / size for extent, size in zip(result.shape[2:], roi, strict=True)]
    box = [
        slice(round(low * s), round((low + extent) * s))
        for low, extent, s in zip(before, image, scale, strict=True)
    ]
    return result[(slice(None), slice(None), *box)]


def _like(result: Tensor, meta: Any, device: torch.device) -> Any:
    """A MetaTensor with the affine and what else ``meta`` knows."""
    kind = type(meta)
    wrapped = kind(result.to(device))
    wrapped.copy_meta_from(meta, copy_attr=False)
    return wrapped
