"""Where a sliding window's predictions go: one accumulator an output of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from voxfuse.contract import Activation
from voxfuse.fusion._memory import empty, zeros
from voxfuse.fusion.fuser import OUTPUTS, Destination, PatchFuser, result_dtype
from voxfuse.fusion.orientations import turned
from voxfuse.fusion.windows import Raised
from voxfuse.ops import _checks
from voxfuse.ops.finalize_slab import finalize_slab
from voxfuse.reference.overlap_add import accumulation_dtype, activated

#: Predictions of the same patches: pairs of (batch, axes along which it is mirrored).
Predictions = Sequence[tuple[Tensor, tuple[int, ...]]]


@dataclass(frozen=True)
class Importance:
    """Weights of a patch's voxels, float64.

    ``factors`` are a vector an axis, of whose product no weight is below ``floor``; or one tensor
    (\\*patch) or, where weights differ by channel, (1, C, \\*patch).
    """

    factors: list[Tensor]
    floor: float = 0.0


@dataclass(frozen=True)
class Placement:
    """Where an output's patches lie: int64 ``origins`` (N, n) in a volume of ``extent``."""

    extent: tuple[int, ...]
    patch: tuple[int, ...]
    origins: Tensor

    def scaled(
        self, patch: tuple[int, ...], before: Sequence[int], after: Sequence[int]
    ) -> Placement:
        """The same for patches of another resolution.

        As MONAI: coordinates count from where the padding begins (``before`` voxels outside, and
        ``after`` at the other end) and are rounded down; then the padding is cut off.
        """
        if patch == self.patch:
            return self
        scale = [new / old for new, old in zip(patch, self.patch, strict=True)]
        low = [round(b * s) for b, s in zip(before, scale, strict=True)]
        extent = tuple(
            round((b + e) * s) - first if b or a else int(e * s)
            for b, e, a, s, first in zip(before, self.extent, after, scale, low, strict=True)
        )
        moved = (self.origins.numpy() + np.array(before)) * np.array(scale)
        origins = torch.from_numpy(moved.astype(np.int64)) - torch.tensor(low)
        return Placement(extent, patch, origins)


@dataclass(frozen=True)
class Wish:
    """What is made of the predictions; see :class:`voxfuse.PatchFuser`.

    ``dtype`` is that of floating results, ``head`` a layer that comes after the fusion.
    """

    output: str
    activation: str
    voting: str
    threshold: float
    fill: float
    stream_axis: int
    members: int
    backend: str
    samples: int
    dtype: torch.dtype
    head: tuple[Tensor, Tensor] | None
    accumulate: torch.dtype | None

    def allocated_dtype(self) -> torch.dtype | None:
        """The dtype to ask a fuser for: None where the output decides."""
        return None if OUTPUTS[self.output] in ("labels", "mask") else self.dtype


class Results:
    """The results of all samples in one tensor, or where the caller wants them."""

    def __init__(self, samples: int, axes: int, out: Destination | None) -> None:
        self._samples, self._axes, self._out = samples, axes, out
        self.everything: Any = None if callable(out) and not isinstance(out, Tensor) else out

    def place(self, sample: int) -> Any:
        """Where a sample goes, if the caller said so."""
        out = self._out
        if not isinstance(out, (Tensor, np.ndarray)):
            return out
        if out.ndim == self._axes + 2:
            if out.shape[0] != self._samples:
                raise ValueError(
                    f"out: got shape {tuple(out.shape)}, expected {self._samples} samples"
                )
            return out[sample]
        if self._samples != 1:
            raise ValueError(f"out: got shape {tuple(out.shape)}, expected {self._samples} samples")
        return out

    def allocate(
        self, sample: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """Memory for a sample's result of ``shape``, with channels, if the caller gave none."""
        if self._out is not None:
            return None
        if self.everything is None:
            self.everything = empty((self._samples, *shape), dtype, device)
        result: Tensor = self.everything[sample]
        return result


class _Accumulator:
    """What has no copy in the middle of its work."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: cannot be copied in the middle of its work; pickle a "
            "voxfuse.PatchFuser instead"
        )


class Streamed(_Accumulator):
    """Patches in the engine: sample by sample through a :class:`voxfuse.PatchFuser`."""

    def __init__(
        self,
        wish: Wish,
        placement: Placement,
        importance: Importance,
        channels: int,
        device: torch.device,
        results: Results,
    ) -> None:
        self._wish, self._placement, self._channels = wish, placement, channels
        self._device, self.results = device, results
        factors = importance.factors
        separable = len(factors) == len(placement.patch)
        self._window: Any = factors if separable else factors[0].reshape(placement.patch)
        if importance.floor:
            self._window = Raised([vector.numpy() for vector in factors], importance.floor)
        self._fuser: PatchFuser | None = None

    def add(self, predictions: Predictions, items: range, importance: Importance) -> None:
        """Add the predictions of the patches ``items``, which count on from sample to sample."""
        origins, count = self._placement.origins, len(self._placement.origins)
        done = 0
        while done < len(items):
            sample, patch = divmod(items[done], count)
            size = min(len(items) - done, count - patch)
            if self._fuser is None:
                self._fuser = self._started(sample)
            self._fuser.add_members(
                [(prediction[done : done + size], turn) for prediction, turn in predictions],
                origins[patch : patch + size],
            )
            if patch + size == count:
                self._fuser.result()
                self._fuser = None
            done += size

    def flush(self) -> None:
        """Have finished slabs where the caller wants them."""
        if self._fuser is not None:
            self._fuser.flush()

    def _started(self, sample: int) -> PatchFuser:
        wish, placement = self._wish, self._placement
        fuser = PatchFuser(
            placement.extent,
            placement.patch,
            self._channels,
            origins=placement.origins,
            window=self._window,
            output=wish.output,
            activation=wish.activation,
            voting=wish.voting,
            threshold=wish.threshold,
            head=wish.head,
            members=wish.members,
            fill=wish.fill,
            stream_axis=wish.stream_axis,
            out=self.results.place(sample),
            dtype=wish.allocated_dtype(),
            accumulate=wish.accumulate,
            backend=wish.backend,
        )
        shape, dtype = fuser.result_layout(wish.dtype)
        fresh = self.results.allocate(sample, shape, dtype, self._device)
        if fresh is not None:
            fuser.send_to(fresh)
        return fuser


class Composed(_Accumulator):
    """Patches added by PyTorch, one sample's sums at a time: what the engine cannot take.

    That is four spatial axes, weights that differ by channel or from call to call, patches at the
    same place twice, and predictions that require a gradient. Every weight is divided by the sum
    of the weights over its voxel before the addition.
    """

    def __init__(
        self,
        wish: Wish,
        placement: Placement,
        importance: Importance,
        channels: int,
        device: torch.device,
        results: Results,
    ) -> None:
        self._wish, self._placement, self._channels = wish, placement, channels
        self._device, self.results = device, results
        axes = len(placement.patch)
        weight = _with_channels(importance, axes, channels)
        self._total = zeros((weight.shape[0], *placement.extent), torch.float64, "cpu")
        for index in range(len(placement.origins)):
            box, part = self._boxes(index)
            self._total[box] += weight[part]
        self._sums: Tensor | None = None
        self._exact = torch.float32  # of the additions

    def add(self, predictions: Predictions, items: range, importance: Importance) -> None:
        """Add the predictions of the patches ``items``, which count on from sample to sample."""
        count = len(self._placement.origins)
        weight = _with_channels(importance, len(self._placement.patch), self._channels)
        for position, item in enumerate(items):
            sample, index = divmod(item, count)
            if self._sums is None:
                shape = (self._channels, *self._placement.extent)
                self._exact = accumulation_dtype(predictions[0][0].dtype)
                self._sums = zeros(shape, self._wish.accumulate or self._exact, self._device)
            box, part = self._boxes(index)
            total = self._total[box]
            share = torch.where(total == 0, 0.0, weight[part] / total)
            share = share.to(self._device, self._exact)
            for prediction, turn in predictions:
                patch = turned(prediction[position : position + 1], turn)
                block = patch[0][part].to(self._exact)
                if self._wish.voting == "soft" and self._wish.activation != "identity":
                    block = activated(block, Activation[self._wish.activation], 0)
                term = share * block
                if self._wish.accumulate is None:
                    self._sums[box] += term
                else:
                    self._sums[box] = self._sums[box].to(self._exact) + term / self._wish.members
            if index == count - 1:
                self._finish(sample, self._sums.to(self._exact))
                self._sums = None

    def flush(self) -> None:
        """Nothing is under way: samples are written when they are complete."""

    def _boxes(self, index: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where patch ``index`` lies in the volume, and which part of it does."""
        box, part = [slice(None)], [slice(None)]
        placement = self._placement
        origin = placement.origins[index].tolist()
        for start, size, extent in zip(origin, placement.patch, placement.extent, strict=True):
            first, last = max(start, 0), min(start + size, extent)
            box.append(slice(first, max(first, last)))
            part.append(slice(first - start, max(first, last) - start))
        return tuple(box), tuple(part)

    def _finish(self, sample: int, sums: Tensor) -> None:
        wish, extent = self._wish, self._placement.extent
        divisor = wish.members if wish.accumulate is None else 1
        uncovered = (self._total == 0).all(0).to(sums.device)
        classes = self._channels if wish.head is None else wish.head[0].shape[0]
        dtype = wish.allocated_dtype() or result_dtype(wish.output, classes, wish.dtype)
        place = self._target(sample)
        if place is not None:
            dtype = place.dtype
        if wish.output == "logits" and wish.head is None:
            # Only this one carries a gradient.
            slab = (sums / divisor if divisor > 1 else sums).to(dtype)
            if uncovered.any():
                slab = torch.where(uncovered, torch.tensor(wish.fill).to(slab), slab)
        else:
            channels = classes if OUTPUTS[wish.output] in ("values", "mask") else 1
            slab = sums.new_empty((channels, uncovered.numel()), dtype=dtype)
            weight, bias = (None, None) if wish.head is None else wish.head
            finalize_slab(
                sums.detach().flatten(1),
                slab,
                OUTPUTS[wish.output],
                activation=wish.activation,
                applied=wish.voting == "soft",
                divisor=divisor,
                weight=None if weight is None else weight.to(sums),
                bias=None if bias is None else bias.to(sums),
                total=(~uncovered).flatten().double(),
                threshold=wish.threshold,
                fill=wish.fill,
                backend=wish.backend,
            )
            slab = slab.reshape(-1, *extent)
        self._deliver(sample, slab, place)

    def _target(self, sample: int) -> Tensor | None:
        """The tensor that the caller wants a sample's result in, if it is to be one."""
        place = self.results.place(sample)
        if place is None or (callable(place) and not isinstance(place, Tensor)):
            return None
        target = torch.from_numpy(place) if isinstance(place, np.ndarray) else place
        if not isinstance(target, Tensor):
            raise TypeError(
                f"out: got {type(place).__name__}, expected a tensor, a NumPy array or a function"
            )
        if OUTPUTS[self._wish.output] == "values" and target.dtype not in _checks.LOGIT_DTYPES:
            raise TypeError(
                f"out: got {_checks.describe(target)}, expected float32, float16, bfloat16, float64"
            )
        return _checks.plain(target)

    def _deliver(self, sample: int, slab: Tensor, target: Tensor | None) -> None:
        fresh = self.results.allocate(sample, slab.shape, slab.dtype, self._device)
        if fresh is not None:
            fresh.copy_(slab)
            return
        if target is None:
            self.results.place(sample)(slab, 0, self._placement.extent[0])
            return
        shapes = [tuple(slab.shape), tuple(slab.shape[1:])][: 2 if slab.shape[0] == 1 else 1]
        if tuple(target.shape) not in shapes:
            raise ValueError(f"out: got shape {tuple(target.shape)}, expected {shapes[-1]}")
        target.copy_(slab.reshape(target.shape))


Accumulator = Streamed | Composed


def accumulator(
    wish: Wish,
    placement: Placement,
    importance: Importance,
    prediction: Tensor,
    results: Results,
    *,
    changing: bool,
) -> Accumulator:
    """The engine where it can take the patches, else the composed way.

    Args:
        prediction: the first one, on the device of the sums.
        changing: whether the weights may be others at the next call.
    """
    origins = placement.origins
    composed = (
        changing
        or len(placement.patch) > 3
        or importance.factors[0].ndim > len(placement.patch)
        or (torch.is_grad_enabled() and prediction.requires_grad)
        or len(torch.unique(origins, dim=0)) != len(origins)
    )
    kind = Composed if composed else Streamed
    return kind(wish, placement, importance, prediction.shape[1], prediction.device, results)


def with_dtype(wish: Wish, dtype: torch.dtype) -> Wish:
    """The same wish for floating results of ``dtype``."""
    return replace(wish, dtype=dtype)


def _with_channels(importance: Importance, axes: int, channels: int) -> Tensor:
    """The weights as (1 or C, \\*patch)."""
    weight = dense(importance)
    weight = weight.reshape(-1, *weight.shape[weight.ndim - axes :])
    if weight.shape[0] not in (1, channels):
        raise ValueError(
            f"roi_weight_map, process_fn: got weights of {weight.shape[0]} channels, expected 1 or "
            f"the predictor's {channels}"
        )
    return weight


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
