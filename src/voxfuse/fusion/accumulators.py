"""Where a sliding window's predictions go: one accumulator an output of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from voxfuse.contract import Activation
from voxfuse.fusion._memory import empty, zeros
from voxfuse.fusion.fuser import PatchFuser
from voxfuse.fusion.importance import Importance, dense
from voxfuse.fusion.options import FusionOptions
from voxfuse.fusion.orientations import turned
from voxfuse.fusion.padded_volume import Placement
from voxfuse.fusion.resampling import sink_of
from voxfuse.fusion.sink import Destination, Sink, is_function
from voxfuse.fusion.windows import Raised
from voxfuse.ops.finalize_slab import finalize_slab
from voxfuse.reference.overlap_add import accumulation_dtype, activated

#: Predictions of the same patches: pairs of (batch, axes along which it is mirrored).
Predictions = Sequence[tuple[Tensor, tuple[int, ...]]]


class Results:
    """The results of all samples in one tensor, or where the caller wants them."""

    def __init__(self, samples: int, axes: int, out: Destination | None) -> None:
        self._samples, self._axes, self._out = samples, axes, out
        self.everything: Any = None if is_function(out) else out

    def place(
        self, sample: int, options: FusionOptions, extent: Sequence[int], device: torch.device
    ) -> Any:
        """Where a sample goes: where the caller said, or memory of all samples."""
        out = self._out
        if out is None:
            if self.everything is None:
                shape = (self._samples, *options.result_shape(extent))
                self.everything = empty(shape, options.result_dtype(torch.float32), device)
            return self.everything[sample]
        if not isinstance(out, (Tensor, np.ndarray)):
            return out
        several = out.ndim == self._axes + 2
        if (out.shape[0] if several else 1) != self._samples:
            raise ValueError(f"out: got shape {tuple(out.shape)}, expected {self._samples} samples")
        return out[sample] if several else out


@dataclass(eq=False)
class _Accumulator:
    """What an output's predictions are added to; it has no copy in the middle of its work.

    ``device`` is that of the sums, ``importance`` the weights of the first patches.
    """

    options: FusionOptions
    placement: Placement
    importance: Importance
    device: torch.device
    results: Results

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: cannot be copied in the middle of its work; pickle a "
            "voxfuse.PatchFuser instead"
        )


@dataclass(eq=False)
class Streamed(_Accumulator):
    """Patches in the engine: sample by sample through a :class:`voxfuse.PatchFuser`."""

    def __post_init__(self) -> None:
        placement, importance = self.placement, self.importance
        factors = importance.factors
        separable = len(factors) == len(placement.patch)
        self._window: Any = factors if separable else factors[0].reshape(placement.patch)
        if importance.floor:
            self._window = Raised([vector.numpy() for vector in factors], importance.floor)
        self._fuser: PatchFuser | None = None

    def add(self, predictions: Predictions, items: range, importance: Importance) -> None:
        """Add the predictions of the patches ``items``, which count on from sample to sample."""
        origins, count = self.placement.origins, len(self.placement.origins)
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

    def finish(self, samples: int) -> None:
        """Make the results of samples of which no patch is to come."""
        for sample in range(samples):
            self._started(sample).result()

    def _started(self, sample: int) -> PatchFuser:
        options, placement = self.options, self.placement
        kept = set(map(tuple, placement.origins.tolist())) if placement.skipped else None
        box = placement.box
        extent = placement.extent if box is None else box.shape
        return PatchFuser(
            placement.extent,
            placement.patch,
            origins=placement.grid,
            skip_origin=None if kept is None else lambda origin: origin not in kept,
            window=self._window,
            stream_axis=placement.stream_axis,
            out=self.results.place(sample, options, extent, self.device),
            region=None if box is None else box.slices,
            **vars(options),
        )


@dataclass(eq=False)
class Composed(_Accumulator):
    """Patches added by PyTorch, one sample's sums at a time: what the engine cannot take.

    That is four spatial axes, weights that differ by channel or from call to call, patches at the
    same place twice, and predictions that require a gradient. Every weight is divided by the sum
    of the weights over its voxel before the addition.
    """

    def __post_init__(self) -> None:
        placement, importance = self.placement, self.importance
        weight = self._with_channels(importance)
        self._total = zeros((weight.shape[0], *placement.extent), torch.float64, "cpu")
        for index in range(len(placement.origins)):
            box, part = self._boxes(index)
            self._total[box] += weight[part]
        self._sums: Tensor | None = None
        self._sink: Sink | None = None
        self._exact = torch.float32  # of the additions

    def add(self, predictions: Predictions, items: range, importance: Importance) -> None:
        """Add the predictions of the patches ``items``, which count on from sample to sample."""
        options, extent, axis = self.options, self.placement.extent, self.placement.stream_axis
        weight = self._with_channels(importance)
        for position, item in enumerate(items):
            sample, index = divmod(item, len(self.placement.origins))
            if self._sink is None or self._sums is None:
                place = self.results.place(sample, options, extent, self.device)
                self._sink = sink_of(options, extent, axis, place, None)
                self._exact = accumulation_dtype(predictions[0][0].dtype)
                shape = (predictions[0][0].shape[1], *extent)
                self._sums = zeros(shape, options.accumulate or self._exact, self.device)
            box, part = self._boxes(index)
            total = self._total[box]
            share = torch.where(total == 0, 0.0, weight[part] / total)
            share = share.to(self.device, self._exact)
            for prediction, turn in predictions:
                patch = turned(prediction[position : position + 1], turn)
                block = patch[0][part].to(self._exact)
                term = share * activated(block, Activation[options.patch_activation], 0)
                if options.accumulate is None:
                    self._sums[box] += term
                else:
                    self._sums[box] = self._sums[box].to(self._exact) + term / options.members
            if index == len(self.placement.origins) - 1:
                self._sink.write(0, extent[axis], self.device, self._finish)
                self._sink.flush()
                self._sink = self._sums = None

    def flush(self) -> None:
        """Nothing is under way: samples are written when they are complete."""

    def _boxes(self, index: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where patch ``index`` lies in the volume, and which part of it does."""
        box, part = [slice(None)], [slice(None)]
        placement = self.placement
        origin = placement.origins[index].tolist()
        for start, size, extent in zip(origin, placement.patch, placement.extent, strict=True):
            first, last = max(start, 0), min(start + size, extent)
            box.append(slice(first, max(first, last)))
            part.append(slice(first - start, max(first, last) - start))
        return tuple(box), tuple(part)

    def _finish(self, slab: Tensor, start: int, stop: int) -> None:
        """Make the result of slices of a sample, which are all final."""
        assert self._sums is not None
        options, part = self.options, (1 + self.placement.stream_axis, start, stop - start)
        sums = self._sums.narrow(*part).to(self._exact)
        uncovered = (self._total.narrow(*part) == 0).all(0).to(sums.device)
        if options.output == "logits" and options.head is None:
            # Only this one carries a gradient.
            mean = (sums / options.divisor if options.divisor > 1 else sums).to(slab.dtype)
            if uncovered.any():
                mean = torch.where(uncovered, torch.tensor(options.fill).to(mean), mean)
        else:
            mean = sums.new_empty((slab.shape[0], uncovered.numel()), dtype=slab.dtype)
            weight, bias = options.head or (None, None)
            finalize_slab(
                sums.detach().flatten(1),
                mean,
                options.finish,
                activation=options.final_activation,
                applied=options.voting == "soft",
                divisor=options.divisor,
                weight=None if weight is None else weight.to(sums),
                bias=None if bias is None else bias.to(sums),
                total=(~uncovered).flatten().double(),
                threshold=options.bound,
                fill=options.finished_fill,
                backend=options.backend,
            )
        slab.copy_(mean.reshape(slab.shape))

    def _with_channels(self, importance: Importance) -> Tensor:
        """The weights as (1 or C, \\*patch)."""
        weight, axes = dense(importance), len(self.placement.patch)
        weight = weight.reshape(-1, *weight.shape[weight.ndim - axes :])
        if weight.shape[0] not in (1, self.options.channels):
            raise ValueError(
                f"roi_weight_map, process_fn: got weights of {weight.shape[0]} channels, expected "
                f"1 or the predictor's {self.options.channels}"
            )
        return weight


Accumulator = Streamed | Composed


def accumulator(
    options: FusionOptions,
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
    reasons = {
        "process_fn": changing,
        "four spatial axes": len(placement.patch) > 3,
        "weights that differ by channel": importance.factors[0].ndim > len(placement.patch),
        "a gradient": torch.is_grad_enabled() and prediction.requires_grad,
        "patches at one place": len(torch.unique(origins, dim=0)) != len(origins),
    }
    composed = [reason for reason, holds in reasons.items() if holds]
    if composed and placement.box is not None:
        raise ValueError(
            f"region: got one with {' and '.join(composed)}, where only the whole volume is fused"
        )
    kind = Composed if composed else Streamed
    return kind(options, placement, importance, prediction.device, results)
