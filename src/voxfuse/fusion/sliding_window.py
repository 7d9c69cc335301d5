"""Inference patch by patch over a volume that the network cannot take at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voxfuse.fusion.accumulators import Accumulator, Results, Streamed, accumulator
from voxfuse.fusion.arrays import Sliceable, in_common
from voxfuse.fusion.batches import Batches, cut_into
from voxfuse.fusion.heads import HeadLike
from voxfuse.fusion.importance import Importance, importance, resized
from voxfuse.fusion.network import Member, Network, Predictor, flat
from voxfuse.fusion.options import FusionOptions, checked_channels
from voxfuse.fusion.orientations import Augmentation
from voxfuse.fusion.padded_volume import PaddedVolume, Placement
from voxfuse.fusion.region import Region
from voxfuse.fusion.sink import is_function
from voxfuse.fusion.windows import WindowLike
from voxfuse.ops import _checks


def sliding_window_inference(
    inputs: Tensor | Sliceable,
    roi_size: int | Sequence[int | None],
    sw_batch_size: int,
    predictor: Predictor | Sequence[Predictor],
    overlap: float | Sequence[float] = 0.5,
    mode: str | None = None,
    sigma_scale: float | Sequence[float] = 0.125,
    padding_mode: str | None = None,
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
    window: WindowLike | None = None,
    output: str = "logits",
    out: Any = None,
    tta: Augmentation = None,
    head: HeadLike = None,
    activation: str = "none",
    voting: str | None = None,
    threshold: float | None = None,
    grid: str = "shifted",
    skip: Callable[[Tensor], bool] | None = None,
    skip_origin: Callable[[tuple[int, ...]], bool] | None = None,
    fill: float = 0.0,
    stream_axis: str | int = "auto",
    accumulate: torch.dtype | None = None,
    backend: str = "auto",
    channels: Sequence[int] | None = None,
    resample_to: Sequence[int] | None = None,
    resample_order: int | Sequence[int] = 1,
    regions: Sequence[int] | None = None,
    region: Region | None = None,
    pad_batches: bool | None = None,
    **kwargs: Any,
) -> Any:
    r"""Predict overlapping patches of a volume and fuse them into one prediction.

    Positional arguments and their order are those of MONAI's function; the defaults of ``overlap``
    and of the window are not (:mod:`voxfuse.integrations.monai` has MONAI's).

    Patches are predicted ``sw_batch_size`` at a time and added at once: besides the result, only
    one batch of predictions is alive, and a ring of slices (see :class:`voxfuse.PatchFuser`) where
    the result is not simply the mean of the predictions. With ``output="labels"`` and the like the
    memory of the fusion does not grow with the depth of the volume. Runs without gradients; for a
    differentiable fusion use :func:`voxfuse.integrations.monai.sliding_window_inference`, or
    collect the predictions and call :func:`voxfuse.overlap_add`.

    Four spatial axes, weights that differ by channel, ``process_fn`` and outputs at a resolution at
    which patches fall on the same place are added by PyTorch, in a volume of all channels for each
    sample: the same options, without the savings.

    Args:
        inputs: (B, channels, \*spatial) with 1 to 4 spatial axes, any dtype the predictor takes. A
            MetaTensor of MONAI gives MetaTensors with its affine. Or any other array of that shape
            that can be sliced (:class:`voxfuse.fusion.arrays.Sliceable`: NumPy, a memmap, Zarr,
            Dask), which is read patch by patch, and never whole.
        roi_size: extent of a patch, one number for all axes or one an axis; None or a number below
            1 means the volume's own extent. Where it exceeds the volume, the volume is padded on
            both sides.
        sw_batch_size: patches a call of the predictor; the result does not depend on it.
        predictor: maps (b, channels, \*roi_size) to (b, C, \*size) of a floating dtype, or to a
            tuple or dict of such tensors; where size is not roi_size, the output has another
            resolution. A list of predictors is an ensemble, whose mean counts.
            It may change the patches it is given. One that returns the same memory at every call
            has to clone it where flips are averaged (ValueError otherwise).
        overlap: part of a patch that it shares with the next, in [0, 1), one number or one an axis.
        mode: MONAI's windows, "constant" or "gaussian", in place of ``window``.
        sigma_scale: standard deviation over extent of the Gaussian of ``mode``.
        padding_mode: what lies outside the volume: "constant" (``cval``), "reflect", "replicate"
            or "circular"; None means "reflect" with ``grid="half_patch"``, else "constant".
        cval: value of constant padding.
        sw_device: where the predictor runs; None means where the volume is.
        device: where the predictions are added; None means where the volume is.
        progress: show a progress bar (needs the package tqdm).
        roi_weight_map: weights of a patch's voxels (\*roi_size), or (1, C, \*roi_size), in place of
            ``window`` and before ``mode``.
        process_fn: a function of (predictions, batch, weights) that returns predictions and the
            weights for them, (\*roi_size) or (1, C, \*roi_size); see MONAI. It is given weights of
            the volume's dtype (float32 for integers), at least that dtype's smallest normal number
            where they are not 0. With ``tta`` it is given the predictions turned back.
        buffer_steps, buffer_dim: checked, and without effect: predictions are added where the
            result is.
        with_coord: give the predictor a second argument, for every patch of the batch its slices of
            the (padded) volume.
        args, kwargs: passed on to the predictor; a tensor ``condition`` of the shape of ``inputs``
            is cut into the same patches.
        window: weights of a patch's voxels; see :func:`voxfuse.overlap_add`. Default "bspline".
        output, activation, voting, threshold, fill, stream_axis, accumulate: what is made of the
            fused predictions; see :class:`voxfuse.PatchFuser`.
        out: where the result goes: a tensor or NumPy array (a memmap, say) of the result's shape
            (for one sample also without its first axis, for one channel also without both), or for
            one sample a function of (slab, start, stop), or any other array of the shape without
            the samples that can be assigned to (:class:`voxfuse.fusion.arrays.Assignable`: Zarr),
            in whole chunks along the streaming axis. For several outputs a tuple or dict.
        tta: test-time augmentation by flips: "mirror", "rotations" or a list of tuples of axes; see
            :func:`voxfuse.fusion.orientations.flips`. The mean of the predictions counts.
        head: (weight (C, K), bias (C,)) of the network's last, linear layer, when the predictor
            returns the K features before it; for several predictors a list, one each. Where all
            features together are fewer than the classes, and logits are averaged, they are fused in
            place of the classes and the layer applied slab by slab: the same up to rounding, in
            K/C of the memory. Otherwise the layer is applied to every patch. The default of
            ``voting`` is then "logit".
        grid: "shifted" (MONAI's rule), "even" (nnU-Net's) or "half_patch" (Hashemi et al. 2018);
            see :func:`voxfuse.fusion.grids.plan_grid`.
        skip: a function of a patch (1, channels, \*roi_size), cut from the padded volume: where it
            is true the patch is not predicted. Voxels under no patch get ``fill``. One sample.
        skip_origin: the same of a patch's origin (tuple of integers), as
            :class:`voxfuse.PatchFuser` takes it; of every sample. With either of the two the
            weights are summed and divided by, whichever patches it leaves.
        backend: backend of the fusion; see :func:`voxfuse.backends`.
        channels: channels of the logits, probabilities or mask that the result has, in this order;
            the others exist in the ring only, where the engine takes the patches.
        region: a tuple of slices, one a spatial axis: the part of the volume that is computed, to
            the bits of cutting it from the whole result (with ``pad_batches=True``). Only patches
            that reach into it are predicted; the result, and ``out``, have its extent.
        pad_batches: whether the predictor is given full batches only, patches being repeated where
            they are fewer, so that its bits do not depend on how many are left. First a batch is
            tried, and two of its patches in batches of their own: patches are predicted one by one,
            with a warning, if bits depend on the place in a batch or the others there. None: with
            ``region``.
        resample_to, resample_order, regions: labels, a mask or regions at another resolution than
            the volume's, with no array of all channels; see :class:`voxfuse.PatchFuser`.

    Returns:
        (B, C, \*spatial) in the predictions' dtype, accumulated in float32 (float64 for float64);
        labels, foreground and entropy (B, 1, \*spatial); ``out`` where it was given, None for a
        function; a tuple or dict of these if the predictor returns one. If the predictor raises,
        the slices of ``out`` that are final are intact.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or options do not fit, or a prediction has another shape than the first.

    Example:
        >>> import torch, voxfuse
        >>> volume = torch.rand(1, 1, 40, 30, 20)
        >>> double = lambda patch: 2 * patch
        >>> result = voxfuse.sliding_window_inference(volume, (16, 16, 16), 4, double)
        >>> torch.allclose(result, 2 * volume)
        True
    """
    if window is not None and (mode is not None or roi_weight_map is not None):
        other = "mode" if mode is not None else "roi_weight_map"
        raise ValueError(f"{other}: got one beside window, expected one of the two")
    with torch.no_grad():
        settings = Settings(
            overlap=overlap,
            mode=mode,
            sigma_scale=sigma_scale,
            padding_mode=padding_mode,
            cval=cval,
            sw_device=sw_device,
            device=device,
            roi_weight_map=roi_weight_map,
            process_fn=process_fn,
            with_coord=with_coord,
            window=window,
            output=output,
            tta=tta,
            head=head,
            activation=activation,
            voting=voting,
            threshold=threshold,
            grid=grid,
            fill=fill,
            accumulate=accumulate,
            backend=backend,
            channels=channels,
            resample_to=resample_to,
            resample_order=resample_order,
            regions=regions,
        )
        volume, network, weights, options = settings.of(inputs, roi_size, predictor, args, kwargs)
        check_buffer(buffer_steps, buffer_dim, len(volume.spatial))
        placement = volume.placement(stream_axis, skip, skip_origin, region)
        padded = region is not None if pad_batches is None else pad_batches
        batches = Batches(volume, network, weights, sw_batch_size, padded=padded)
        batches.settle([(0, origin) for origin in placement.origins.tolist()])
        return infer(volume, placement, network, batches, options, out, progress)


@dataclass(frozen=True)
class Settings:
    """The options of a sliding window that say what is computed, and not of what or where."""

    overlap: float | Sequence[float] = 0.5
    mode: str | None = None
    sigma_scale: float | Sequence[float] = 0.125
    padding_mode: str | None = None
    cval: float = 0.0
    sw_device: torch.device | str | None = None
    device: torch.device | str | None = None
    roi_weight_map: Tensor | None = None
    process_fn: Callable[..., Any] | None = None
    with_coord: bool = False
    window: WindowLike | None = None
    output: str = "logits"
    tta: Augmentation = None
    head: HeadLike = None
    activation: str = "none"
    voting: str | None = None
    threshold: float | None = None
    grid: str = "shifted"
    fill: float = 0.0
    accumulate: torch.dtype | None = None
    backend: str = "auto"
    channels: Sequence[int] | None = None
    resample_to: Sequence[int] | None = None
    resample_order: int | Sequence[int] = 1
    regions: Sequence[int] | None = None

    def of(
        self,
        inputs: Tensor | Sliceable,
        roi_size: int | Sequence[int | None],
        predictor: Predictor | Sequence[Predictor],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[PaddedVolume, Network, Importance, FusionOptions]:
        """The parts of the sliding window over a volume."""
        kwargs = kwargs or {}
        volume = PaddedVolume(
            inputs,
            roi_size,
            self.overlap,
            self.grid,
            self.padding_mode,
            self.cval,
            kwargs.get("condition"),
        )
        network = Network(
            predictor,
            volume,
            args,
            kwargs,
            tta=self.tta,
            head=self.head,
            activation=self.activation,
            voting=self.voting,
            process_fn=self.process_fn,
            with_coord=self.with_coord,
            sw_device=self.sw_device,
            device=self.device,
        )
        options = FusionOptions(
            network.heads.classes,
            self.output,
            self.activation,
            network.heads.voting,
            self.threshold,
            members=network.members,
            fill=self.fill,
            accumulate=self.accumulate,
            backend=self.backend,
            resample_to=self.resample_to,
            resample_order=self.resample_order,
            regions=self.regions,
        )
        if self.channels is not None:
            given = ("channels", self.channels, self.output, network.heads.classes)
            options = replace(options, result_channels=checked_channels(*given))
        bare = self.window is None and self.mode is None and self.roi_weight_map is None
        window = "bspline" if bare else self.window
        weights = importance(volume.roi, window, self.mode, self.sigma_scale, self.roi_weight_map)
        return volume, network, weights, options


def infer(
    volume: PaddedVolume,
    placement: Placement,
    network: Network,
    batches: Batches,
    options: FusionOptions,
    out: Any,
    progress: bool,
) -> Any:
    """Predict the patches of a volume batch by batch, with gradients, and fuse them."""
    _check_one_sample(out, volume.samples)
    check_apart(out, inputs=volume.source, condition=volume.condition)
    outputs = Outputs(options, placement, network, volume.samples, out)
    origins = placement.origins.tolist()
    if not origins:
        # What the results are like, the network has to say all the same.
        outputs.finish(*batches.predict([(0, [axis[0] for axis in placement.grid.starts])]))
        return outputs.packed(volume.meta)
    try:
        for items in cut_into(volume.samples * len(origins), batches.size, progress):
            places = [(item // len(origins), origins[item % len(origins)]) for item in items]
            outputs.add(*batches.predict(places), items)
    finally:
        outputs.flush()
    return outputs.packed(volume.meta)


def check_buffer(buffer_steps: int | None, buffer_dim: int, axes: int) -> None:
    """Raise ValueError for an axis that MONAI's buffers could not have either."""
    if buffer_steps is not None and buffer_steps > 0 and not -axes <= buffer_dim <= axes:
        raise ValueError(f"buffer_dim: got {buffer_dim}, expected {-axes} to {axes}")


class Outputs:
    """An accumulator an output of the network, made when the first predictions are there."""

    def __init__(
        self, options: FusionOptions, placement: Placement, network: Network, samples: int, out: Any
    ) -> None:
        self._options, self._placement, self._network = options, placement, network
        self._samples, self._out = samples, out
        self._accumulators: list[Accumulator] = []
        self._kinds: list[tuple[Any, ...]] = []
        self._keys: list[Any] | None = None

    def add(self, members: list[Member], weights: Importance, items: range) -> None:
        """Add the predictions of the patches ``items``."""
        if not self._accumulators:
            self._begin(members[0], weights)
        for _, keys, tensors in members:
            if keys != self._keys or [_kind(tensor) for tensor in tensors] != self._kinds:
                got = ", ".join(_checks.describe(tensor) for tensor in tensors)
                raise ValueError(f"predictor: returned {got}, but before {_listed(self._kinds)}")
        for number, kind in enumerate(self._kinds):
            # As MONAI: from those of the output before.
            weights = resized(weights, kind[2:])
            predictions = [(tensors[number], turn) for turn, _, tensors in members]
            self._accumulators[number].add(predictions, items, weights)

    def finish(self, members: list[Member], weights: Importance) -> None:
        """Make the results of a sample without patches; ``members`` say what there would be."""
        self._begin(members[0], weights)
        for each in self._accumulators:
            assert isinstance(each, Streamed)
            each.finish(self._samples)

    def flush(self) -> None:
        """Have finished slabs where the caller wants them."""
        for each in self._accumulators:
            each.flush()

    def packed(self, meta: Any) -> Any:
        """The results as the network returns its predictions, MetaTensors where ``meta`` is one."""
        results = [each.results.everything for each in self._accumulators]
        if meta is not None and self._out is None:
            box = self._placement.box
            where = self._options.resample_to, None if box is None else box.low
            results = [_like(result, meta, *where) for result in results]
        if self._keys is not None:
            return dict(zip(self._keys, results, strict=True))
        return results[0] if len(results) == 1 else tuple(results)

    def _begin(self, member: Member, weights: Importance) -> None:
        _, self._keys, tensors = member
        heads = self._network.heads
        if heads.classes is not None and len(tensors) != 1:
            raise ValueError(f"head: got one for {len(tensors)} outputs, expected one output")
        outs = _destinations(self._out, self._keys, len(tensors))
        for each in outs:
            _check_one_sample(each, self._samples)
        self._kinds = [_kind(tensor) for tensor in tensors]
        chosen = self._options.result_channels
        for tensor, out in zip(tensors, outs, strict=True):
            patch = tuple(tensor.shape[2:])
            weights = resized(weights, patch)
            if chosen is not None:
                checked_channels(
                    "channels", chosen, self._options.output, heads.classes or tensor.shape[1]
                )
            self._accumulators.append(
                accumulator(
                    self._options.of(tensor.shape[1], heads.merged, heads.kind or tensor.dtype),
                    self._placement.scaled(patch),
                    weights,
                    tensor,
                    Results(self._samples, len(patch), out),
                    changing=self._network.process_fn is not None,
                )
            )


def _destinations(out: Any, keys: list[Any] | None, count: int) -> list[Any]:
    """Where each output goes."""
    if out is None:
        return [None] * count
    if keys is not None:
        if isinstance(out, Mapping) and sorted(out) == keys:
            return [out[key] for key in keys]
        raise ValueError(f"out: got {type(out).__name__}, expected a dict with the keys {keys}")
    if isinstance(out, (tuple, list)) and len(out) == count:
        return list(out)
    if count == 1:
        return [out]
    raise ValueError(f"out: got {type(out).__name__}, expected a tuple for {count} outputs")


def _check_one_sample(out: Any, samples: int) -> None:
    """Raise ValueError for a destination that takes one sample if there are several."""
    one = is_function(out) or not isinstance(out, (Tensor, np.ndarray, Sequence, Mapping))
    if out is not None and one and samples != 1:
        kind = "a function" if is_function(out) else type(out).__name__
        raise ValueError(f"out: got {kind} and {samples} samples, expected one")


def check_apart(out: Any, **inputs: Any) -> None:
    """Raise ValueError if results would be written over what is still to be read."""
    for each in flat(out)[1]:
        for name, source in inputs.items():
            if in_common(each, source):
                raise ValueError(
                    f"out: shares memory with {name}, which would be overwritten while it is read"
                )


def _kind(prediction: Tensor) -> tuple[Any, ...]:
    """What has to stay the same from call to call: dtype, channels and extent."""
    return (prediction.dtype, *prediction.shape[1:])


def _listed(kinds: list[tuple[Any, ...]]) -> str:
    return ", ".join(f"{kind[1]} channels {kind[2:]} of {kind[0]}" for kind in kinds)


def _like(
    result: Tensor, meta: Any, resized: Sequence[int] | None, low: Sequence[int] | None
) -> Any:
    """A MetaTensor with what ``meta`` knows, its affine that of the result's voxels."""
    wrapped = type(meta)(result)
    wrapped.copy_meta_from(meta, copy_attr=False)
    wrapped.meta = dict(meta.meta)  # its own, for an affine of its own
    if low is not None:
        affine = wrapped.affine.clone()
        for axis, first in enumerate(low):
            affine[:, -1] += affine[:, axis] * first
        wrapped.affine = affine
    if resized is not None:
        affine = wrapped.affine.clone()
        for axis, (n, m) in enumerate(zip(meta.shape[2:], resized, strict=True)):
            # Voxel k lies at (n / m) (k + 1/2) - 1/2.
            affine[:, -1] += affine[:, axis] * ((n / m - 1) / 2)
            affine[:, axis] *= n / m
        wrapped.affine = affine
    return wrapped
