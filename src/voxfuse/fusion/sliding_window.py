"""Inference patch by patch over a volume that the network cannot take at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voxfuse.fusion._memory import joined, overlapping, span
from voxfuse.fusion.accumulators import (
    Accumulator,
    Importance,
    Placement,
    Results,
    accumulator,
    dense,
    resized,
)
from voxfuse.fusion.grids import RULES, grid_starts
from voxfuse.fusion.heads import HeadLike, Heads
from voxfuse.fusion.options import FusionOptions
from voxfuse.fusion.orientations import Augmentation, flips, turned
from voxfuse.fusion.schedule import chosen_axis
from voxfuse.fusion.windows import WindowLike, monai_gaussian, raised_window, resolve_window
from voxfuse.ops import _checks

#: What a network returns: one prediction, several, or several by name.
Predictor = Callable[..., Tensor | Sequence[Tensor] | Mapping[Any, Tensor]]

PADDING_MODES = ("constant", "reflect", "replicate", "circular")
MODES = ("constant", "gaussian")


def sliding_window_inference(
    inputs: Tensor,
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
    threshold: float = 0.5,
    grid: str = "shifted",
    skip: Callable[[Tensor], bool] | None = None,
    fill: float = 0.0,
    stream_axis: str | int = "auto",
    accumulate: torch.dtype | None = None,
    backend: str = "auto",
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
            MetaTensor of MONAI gives MetaTensors with its affine.
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
            one sample a function of (slab, start, stop). For several outputs a tuple or dict.
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
        backend: backend of the fusion; see :func:`voxfuse.backends`.

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
    if window is None and mode is None and roi_weight_map is None:
        window = "bspline"
    with torch.no_grad():
        return infer(
            inputs,
            roi_size,
            sw_batch_size,
            predictor,
            overlap,
            window,
            mode,
            sigma_scale,
            padding_mode,
            cval,
            sw_device,
            device,
            progress,
            roi_weight_map,
            process_fn,
            buffer_steps,
            buffer_dim,
            with_coord,
            args,
            kwargs,
            output=output,
            out=out,
            tta=tta,
            head=head,
            activation=activation,
            voting=voting,
            threshold=threshold,
            grid=grid,
            skip=skip,
            fill=fill,
            stream_axis=stream_axis,
            accumulate=accumulate,
            backend=backend,
        )


def infer(
    inputs: Tensor,
    roi_size: int | Sequence[int | None],
    sw_batch_size: int,
    predictor: Predictor | Sequence[Predictor],
    overlap: float | Sequence[float],
    window: WindowLike | None,
    mode: str | None,
    sigma_scale: float | Sequence[float],
    padding_mode: str | None,
    cval: float,
    sw_device: torch.device | str | None,
    device: torch.device | str | None,
    progress: bool,
    roi_weight_map: Tensor | None,
    process_fn: Callable[..., Any] | None,
    buffer_steps: int | None,
    buffer_dim: int,
    with_coord: bool,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    output: str = "logits",
    out: Any = None,
    tta: Augmentation = None,
    head: HeadLike = None,
    activation: str = "none",
    voting: str | None = None,
    threshold: float = 0.5,
    grid: str = "shifted",
    skip: Callable[[Tensor], bool] | None = None,
    fill: float = 0.0,
    stream_axis: str | int = "auto",
    accumulate: torch.dtype | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> Any:
    """:func:`sliding_window_inference` without defaults of its own, with gradients.

    ``window`` goes before ``roi_weight_map``, and both before ``mode``. ``dtype`` is that of
    floating results (default: the predictions').
    """
    meta = inputs if hasattr(inputs, "copy_meta_from") else None
    volume = _checks.require_tensor("inputs", inputs)
    if not 3 <= volume.ndim <= 6 or 0 in volume.shape:
        raise ValueError(
            f"inputs: got shape {tuple(volume.shape)}, expected (B, channels, *spatial) with 1 to "
            "4 spatial axes, none of them empty"
        )
    samples, spatial = volume.shape[0], tuple(volume.shape[2:])
    axes = len(spatial)
    roi = _roi(roi_size, spatial)
    if isinstance(sw_batch_size, bool) or not isinstance(sw_batch_size, int) or sw_batch_size < 1:
        raise ValueError(f"sw_batch_size: got {sw_batch_size!r}, expected an integer >= 1")
    predictors = _predictors(predictor)
    if grid not in RULES:
        listed = ", ".join(repr(name) for name in RULES)
        raise ValueError(f"grid: got {grid!r}, expected one of {listed}")
    # MONAI's enumerations of modes are strings too.
    padding = str(getattr(padding_mode, "value", padding_mode) or "")
    padding = padding or ("reflect" if grid == "half_patch" else "constant")
    if padding not in PADDING_MODES:
        listed = ", ".join(repr(name) for name in PADDING_MODES)
        raise ValueError(f"padding_mode: got {padding!r}, expected one of {listed}")
    if buffer_steps is not None and buffer_steps > 0 and not -axes <= buffer_dim <= axes:
        raise ValueError(f"buffer_dim: got {buffer_dim}, expected {-axes} to {axes}")
    if (skip is not None or callable(out)) and samples != 1:
        name = "skip" if skip is not None else "out"
        raise ValueError(f"{name}: got a function and {samples} samples, expected one")
    turns = flips(tta, axes)
    heads = Heads(head, len(predictors), activation, voting)
    importance = _importance(roi, window, mode, sigma_scale, roi_weight_map)
    place = torch.device(device) if device is not None else volume.device
    network_place = torch.device(sw_device) if sw_device is not None else volume.device
    # Bad options are errors before anything is predicted.
    options = FusionOptions(
        heads.classes,
        output,
        activation,
        heads.voting,
        threshold,
        members=len(turns) * (1 if heads.late else len(predictors)),
        fill=fill,
        dtype=dtype,
        accumulate=accumulate,
        backend=backend,
    )
    condition = kwargs.get("condition")
    if condition is not None:
        condition = _checks.require_tensor("condition", condition)
        if tuple(condition.shape[2:]) != spatial or condition.shape[0] != samples:
            raise ValueError(
                f"condition: got shape {tuple(condition.shape)}, expected that of inputs, "
                f"{tuple(volume.shape)}"
            )

    def cut(source: Tensor, sample: int, origin: Sequence[int]) -> Tensor:
        return _patch(source, sample, list(origin), roi, padding, cval)

    starts = [tuple(dict.fromkeys(s)) for s in grid_starts(spatial, roi, overlap, grid)]
    before = [max(-min(axis), 0) for axis in starts]
    after = [
        max(max(axis) + size - extent, 0)
        for axis, size, extent in zip(starts, roi, spatial, strict=True)
    ]
    if padding == "constant" and any((*before, *after)):
        _checks.require_held("cval", cval, volume.dtype)
    table = np.array(list(product(*starts)), np.int64)
    if skip is not None:
        table = table[[not skip(cut(volume, 0, origin)) for origin in table.tolist()]]
        if len(table) == 0:
            raise ValueError("skip: is true for every patch, so that nothing was predicted")
    axis = chosen_axis(stream_axis, spatial, roi)
    table = table[np.argsort(table[:, axis], kind="stable")]
    origins, count = table.tolist(), len(table)
    placement = Placement(spatial, roi, torch.from_numpy(table), axis)
    _check_apart(out, inputs=volume, condition=condition)
    outputs = _Outputs(
        options, placement, (before, after), heads, samples, out, process_fn is not None
    )

    def predicted(items: range) -> tuple[list[_Member], Importance]:
        """The predictions of a batch to average, and their weights."""
        places = [(item // count, origins[item % count]) for item in items]
        batch = joined([cut(volume, *where) for where in places]).to(network_place)
        extras = dict(kwargs)
        if condition is not None:
            cuts = joined([cut(condition, *where) for where in places])
            extras["condition"] = cuts.to(network_place)
        coordinates = ([_slices(*where, before, roi) for where in places],) if with_coord else ()
        members: list[_Member] = []
        weights = importance
        # Joined patches are a copy that one call may do with as it likes.
        alone = len(places) > 1 and len(turns) * len(predictors) == 1 and process_fn is None
        for turn in turns:
            view, named = turned(batch, turn), dict(extras)
            if condition is not None:
                named["condition"] = turned(extras["condition"], turn)
            returned: list[list[Tensor]] = []
            for number, predict in enumerate(predictors):
                # A network that works in its input changes no other's, nor the volume.
                given, own = (view if alone else view.clone()), dict(named)
                if condition is not None and not alone:
                    own["condition"] = named["condition"].clone()
                keys, tensors = _flat(predict(given, *coordinates, *args, **own))
                _check_kept(tensors, chain(*(m[2] for m in members), *returned))
                if process_fn is not None:
                    weight = _held(dense(importance), volume.dtype).to(network_place)
                    tensors = [turned(tensor, turn) for tensor in tensors]
                    tensors, processed = process_fn(tuple(tensors), batch, weight)
                    tensors = [turned(tensor, turn) for tensor in tensors]
                    weights = Importance([_processed(processed, roi)])
                tensors = [_prediction(t, len(items), axes).to(place) for t in tensors]
                returned.append([heads.apply(number, tensor) for tensor in tensors])
            members += [(turn, keys, tensors) for tensors in heads.joined(returned)]
        return members, weights

    try:
        for first in _batches(samples * count, sw_batch_size, progress):
            items = range(first, min(first + sw_batch_size, samples * count))
            outputs.add(*predicted(items), items)
    finally:
        outputs.flush()
    return outputs.packed(meta)


#: How the patches were mirrored, the names of a network's outputs, and the outputs.
_Member = tuple[tuple[int, ...], list[Any] | None, list[Tensor]]


class _Outputs:
    """An accumulator an output of the network, made when the first predictions are there."""

    def __init__(
        self,
        options: FusionOptions,
        placement: Placement,
        margins: tuple[list[int], list[int]],
        heads: Heads,
        samples: int,
        out: Any,
        changing: bool,
    ) -> None:
        self._options, self._placement, self._margins = options, placement, margins
        self._heads, self._samples, self._out, self._changing = heads, samples, out, changing
        self._accumulators: list[Accumulator] = []
        self._kinds: list[tuple[Any, ...]] = []
        self._keys: list[Any] | None = None

    def add(self, members: list[_Member], weights: Importance, items: range) -> None:
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

    def flush(self) -> None:
        """Have finished slabs where the caller wants them."""
        for each in self._accumulators:
            each.flush()

    def packed(self, meta: Any) -> Any:
        """The results as the network returns its predictions, MetaTensors where ``meta`` is one."""
        results = [each.results.everything for each in self._accumulators]
        if meta is not None and self._out is None:
            results = [_like(result, meta) for result in results]
        if self._keys is not None:
            return dict(zip(self._keys, results, strict=True))
        return results[0] if len(results) == 1 else tuple(results)

    def _begin(self, member: _Member, weights: Importance) -> None:
        _, self._keys, tensors = member
        if self._heads.classes is not None and len(tensors) != 1:
            raise ValueError(f"head: got one for {len(tensors)} outputs, expected one output")
        outs = _destinations(self._out, self._keys, len(tensors))
        if any(callable(out) for out in outs) and self._samples != 1:
            raise ValueError(f"out: got functions and {self._samples} samples, expected one sample")
        self._kinds = [_kind(tensor) for tensor in tensors]
        for tensor, out in zip(tensors, outs, strict=True):
            patch = tuple(tensor.shape[2:])
            weights = resized(weights, patch)
            self._accumulators.append(
                accumulator(
                    self._options.of(
                        tensor.shape[1], self._heads.merged, self._heads.kind or tensor.dtype
                    ),
                    self._placement.scaled(patch, *self._margins),
                    weights,
                    tensor,
                    Results(self._samples, len(patch), out),
                    changing=self._changing,
                )
            )


def _predictors(predictor: Predictor | Sequence[Predictor]) -> list[Predictor]:
    if callable(predictor):
        return [predictor]
    if isinstance(predictor, Sequence) and predictor and all(map(callable, predictor)):
        return list(predictor)
    raise TypeError(
        f"predictor: got {type(predictor).__name__}, expected a callable, or a list of them (it "
        "comes fourth, after sw_batch_size, as in MONAI)"
    )


def _roi(roi_size: int | Sequence[int | None], spatial: tuple[int, ...]) -> tuple[int, ...]:
    sizes = tuple(roi_size) if isinstance(roi_size, Sequence) else (roi_size,) * len(spatial)
    if len(sizes) != len(spatial):
        raise ValueError(
            f"roi_size: got {tuple(sizes)}, expected one number or {len(spatial)}, to go with a "
            f"volume of {spatial}"
        )
    chosen = [0 if size is None else size for size in sizes]
    if any(isinstance(size, bool) or not isinstance(size, (int, np.integer)) for size in chosen):
        raise TypeError(f"roi_size: got {roi_size!r}, expected integers")
    return tuple(
        int(size) if size > 0 else extent for size, extent in zip(chosen, spatial, strict=True)
    )


def _importance(
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
        weight = _checks.plain(torch.as_tensor(given)).detach()
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


def _held(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights in the dtype of a volume, none of which becomes 0 by that."""
    if not dtype.is_floating_point:
        dtype = torch.float32
    least = torch.finfo(dtype).tiny
    return torch.where(weight == 0, weight, weight.clamp(min=least)).to(dtype)


def _processed(weight: object, roi: tuple[int, ...]) -> Tensor:
    """The weights that ``process_fn`` returned, float64 on the CPU."""
    weight = _checks.require_tensor("process_fn's weights", weight)
    lead = tuple(weight.shape[: max(weight.ndim - len(roi), 0)])
    if weight.ndim < len(roi) or len(lead) > 2 or lead[:-1] not in ((), (1,)):
        raise ValueError(
            f"process_fn: returned weights of shape {tuple(weight.shape)}, expected {roi}, or that "
            "after (1, C)"
        )
    return weight.detach().to("cpu", torch.float64)


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


def _slices(
    sample: int, origin: Sequence[int], before: Sequence[int], roi: Sequence[int]
) -> list[slice]:
    """Where a patch lies in the padded volume, as MONAI tells its predictors."""
    place = [slice(sample, sample + 1), slice(None)]
    for start, low, size in zip(origin, before, roi, strict=True):
        place.append(slice(start + low, start + low + size))
    return place


def _flat(outputs: Any) -> tuple[list[Any] | None, list[Any]]:
    """The outputs of a network one by one, and their names if they have any, in MONAI's order."""
    if isinstance(outputs, Mapping):
        keys = sorted(outputs)
        return keys, [outputs[key] for key in keys]
    if isinstance(outputs, (tuple, list)):
        return None, list(outputs)
    return None, [outputs]


def _prediction(prediction: object, size: int, axes: int) -> Tensor:
    prediction = _checks.require_tensor("predictor's result", prediction)
    shape = tuple(prediction.shape)
    if len(shape) != axes + 2 or shape[0] != size or 0 in shape:
        raise ValueError(
            f"predictor: returned shape {shape}, expected ({size}, C, *patch) with {axes} spatial "
            "axes"
        )
    if prediction.is_complex():
        raise TypeError(
            f"predictor: returned {_checks.describe(prediction)}, expected real numbers"
        )
    return prediction if prediction.is_floating_point() else prediction.to(torch.float32)


def _check_kept(tensors: Sequence[object], kept: Iterable[Tensor]) -> None:
    """Raise ValueError if a prediction lies where one that is still to be added does."""
    spans = [span(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
    if any(overlapping(span(earlier), each) for earlier in kept for each in spans):
        raise ValueError(
            "predictor: returned memory that holds an earlier prediction of the same patches, "
            "which is overwritten by that; return a copy (.clone())"
        )


def _check_apart(out: Any, **inputs: Tensor | None) -> None:
    """Raise ValueError if results would be written over what is still to be read."""
    for each in _flat(out)[1]:
        if isinstance(each, np.ndarray) and each.flags.writeable and min(each.strides) >= 0:
            each = torch.from_numpy(each)
        for name, tensor in inputs.items():
            if (
                isinstance(each, Tensor)
                and tensor is not None
                and overlapping(span(each), span(tensor))
            ):
                raise ValueError(
                    f"out: shares memory with {name}, which would be overwritten while it is read"
                )


def _kind(prediction: Tensor) -> tuple[Any, ...]:
    """What has to stay the same from call to call: dtype, channels and extent."""
    return (prediction.dtype, *prediction.shape[1:])


def _listed(kinds: list[tuple[Any, ...]]) -> str:
    return ", ".join(f"{kind[1]} channels {kind[2:]} of {kind[0]}" for kind in kinds)


def _like(result: Tensor, meta: Any) -> Any:
    """A MetaTensor with the affine and what else ``meta`` knows."""
    wrapped = type(meta)(result)
    wrapped.copy_meta_from(meta, copy_attr=False)
    return wrapped


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
