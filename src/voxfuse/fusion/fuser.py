"""Streaming patch fusion: a ring of slices instead of a volume, results slab by slab."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from voxfuse.fusion._memory import readable_bytes, zeros
from voxfuse.fusion.grids import (
    Grid,
    Origins,
    checked_origins,
    factorised,
    plan_grid,
    weights_of,
)
from voxfuse.fusion.options import FusionOptions
from voxfuse.fusion.region import Box, Region, checked_region
from voxfuse.fusion.resampling import sink_of
from voxfuse.fusion.ring import HalfRing, Ring
from voxfuse.fusion.schedule import Schedule, chosen_axis
from voxfuse.fusion.sink import Destination
from voxfuse.fusion.windows import WindowLike
from voxfuse.ops import _checks
from voxfuse.reference.overlap_add import accumulation_dtype


@dataclass(frozen=True)
class FusionPlan:
    """What a fusion will take, known before it runs; ``print`` it.

    Bytes are those of the sums (``ring_bytes``, doubled for float64 patches), of the float64
    weight sums that only arbitrary origins and dense arrays need (``weight_bytes``), and of the
    result (``output_bytes``: with the dtype given, or float32 where the patches' dtype decides).
    """

    patches: int
    members: int
    stream_axis: int
    ring_shape: tuple[int, ...]
    ring_bytes: int
    weight_bytes: int
    output_shape: tuple[int, ...]
    output_bytes: int

    def __str__(self) -> str:
        times = f" x {self.members}" if self.members > 1 else ""
        return (
            f"{self.patches} patches{times} along axis {self.stream_axis}; "
            f"ring {self.ring_shape} {readable_bytes(self.ring_bytes)}, "
            f"weights {readable_bytes(self.weight_bytes)}, "
            f"output {self.output_shape} {readable_bytes(self.output_bytes)}"
        )


class PatchFuser:
    r"""Fuse overlapping patch predictions in a stream, in memory that does not grow with depth.

    Patches are added in the order of :attr:`origins`, along the axis that makes the ring of slices
    smallest. A slice is final as soon as no later patch reaches it: it is then turned into what
    ``output`` asks for, written to ``out``, and its place in the ring used again.

    .. math:: V(x) = \sum_i w(x - o_i) P_i(x - o_i) \Big/ \sum_i w(x - o_i)

    Args:
        volume_shape: extent of the volume, 1 to 3 axes.
        patch_size: extent of a patch, one number for all axes or one an axis.
        channels: channels of a prediction: classes, or features with ``head``.
        overlap, grid: the regular grid; see :func:`voxfuse.fusion.grids.plan_grid`.
        origins: patches elsewhere: an (N, n) integer tensor or array, a
            :class:`~voxfuse.fusion.grids.Grid`, or the starts along each axis; ``overlap`` and
            ``grid`` are then ignored.
        window: weights of a patch's voxels; see :func:`voxfuse.overlap_add`.
        output: "logits" (the weighted means as they are), "probabilities", "labels" (index of the
            greatest channel), "mask" (probability > ``threshold``), "foreground" (greatest
            probability of all channels but the background, channel 0; with "sigmoid" or one channel
            there is no background), "entropy" (in nats) or "regions" (the label ``regions[c]`` of
            the last channel c with probability > ``threshold``, or 0).
        activation: "sigmoid" or "softmax", which makes probabilities of predictions; "identity",
            where they are probabilities already; or "none". Probabilities, a mask, the foreground
            and the entropy need one of the first three.
        voting: "soft" (activate every patch, then average; the default) or "logit" (average, then
            activate; the default, and the only way, with ``head``). Soft voting activates patches
            as they are added, without a copy of them. With ``activation="none"`` both average
            predictions as they are.
        threshold: for "mask" and "regions"; None means 0.5.
        head: (weight (C, channels), bias (C,)) of the network's last, linear layer: features are
            fused, and the layer applied to finished slices only. Exact up to rounding, because the
            layer is linear and the weights sum to 1.
        members: predictions that every patch gets (flips, models of an ensemble); their mean
            counts.
        skip_origin: a function of an origin (tuple of integers); patches for which it is true are
            left out. It is asked once, here. The weights are then summed and divided by, whichever
            patches it leaves.
        fill: the result where no patch lies; labels and masks take integers that their dtype holds.
            0 with ``resample_to`` and "regions".
        stream_axis: "auto" or an axis.
        out: where the result goes: a tensor on any device, a NumPy array such as a memmap, any
            other array that boxes can be assigned to (:class:`voxfuse.fusion.arrays.Assignable`: a
            Zarr array, in whole chunks along the streaming axis), or a function
            ``out(slab, start, stop)`` called for every finished slab (a fresh tensor with channels,
            slices start to stop of ``stream_axis``). None allocates a tensor. From a GPU to the
            host slabs travel through pinned memory while the network goes on.
        dtype: of a result that is allocated here. Default: the patches' for floating results, the
            smallest of uint8, uint16 and int32 for labels, uint8 for a mask.
        device: of a result that is allocated here. Default: the patches'.
        accumulate: None (float32 sums), or torch.float16 or torch.bfloat16 for a ring of half the
            memory. Every addition is then rounded once: with n of them over a voxel (patches times
            members) the mean is off by at most ``n u max|P|`` beside float32's rounding, u = 2^-11
            for float16 (and n 2^-25: its smallest numbers), 2^-8 for bfloat16. Predictions beyond
            65504 overflow float16. Slower: see :class:`voxfuse.fusion.ring.HalfRing`.
        backend: "auto", "cpp", "cuda", "triton" or "reference"; see :func:`voxfuse.backends`.
        result_channels: channels of the logits, probabilities or mask that are kept, in this order;
            the others exist in the ring only.
        resample_to: extent of the result, where labels, a mask or regions are wanted at another
            resolution: that of :func:`voxfuse.resample_argmax` of all fused predictions (logits
            where these are averaged, and probabilities where patches are activated), bit for bit.
            Voxels under no patch have probability 0; where a mask or regions are decided by
            averaged logits, the logit -10000, so that the result is background wherever these have
            a share of more than a thousandth or so.
            Slices are resampled as soon as they are final; ``out`` and its ``start`` and ``stop``
            are those of the result. With ``out`` a view of a larger array, a crop is put back and
            its axes are turned in the same pass.
        resample_order: 1 (linear) or 0 (nearest), for all axes or one an axis.
        regions: the channels' labels, of output "regions".
        finite: whether an infinite fused prediction is an error (RuntimeError), with
            ``resample_to``.
        region: a tuple of slices, one an axis: the part of the volume that is fused, to the bits of
            cutting it from the result of the whole volume. Only the patches that reach into it are
            expected. Origins stay those in the whole volume; results have the region's extent, and
            slices are counted from its first.

    A fuser can be copied in the middle of its work, by pickle, ``copy.deepcopy`` or ``torch.save``:
    the copy has a result of its own (of ``out`` too) and goes on to the same bits;
    :meth:`batches` yields what it lacks. One that writes to a memory-mapped file refuses, as does
    ``copy.copy``.

    Sums are float32 (float64 for float64 patches) in the order in which patches are added, so that
    the bits do not depend on how they are distributed over batches. A voxel under one patch gets
    its value exactly. Results with one channel (labels, foreground, entropy) have shape
    (\*volume), others (C, \*volume).

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: shapes or options do not fit.

    Example:
        >>> import torch, voxfuse
        >>> fuser = voxfuse.PatchFuser((40, 32, 32), (16, 16, 16), 3, output="labels")
        >>> for origins in fuser.batches(4):
        ...     fuser.add(torch.rand(len(origins), 3, 16, 16, 16), origins)
        >>> fuser.result().shape, fuser.result().dtype
        (torch.Size([40, 32, 32]), torch.uint8)
    """

    def __init__(
        self,
        volume_shape: Sequence[int],
        patch_size: int | Sequence[int],
        channels: int,
        *,
        overlap: float | Sequence[float] = 0.5,
        grid: str = "shifted",
        origins: Origins | None = None,
        window: WindowLike = "bspline",
        output: str = "logits",
        activation: str = "none",
        voting: str | None = None,
        threshold: float | None = None,
        head: tuple[Tensor, Tensor] | None = None,
        members: int = 1,
        skip_origin: Callable[[tuple[int, ...]], bool] | None = None,
        fill: float = 0.0,
        stream_axis: str | int = "auto",
        out: Destination | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        accumulate: torch.dtype | None = None,
        backend: str = "auto",
        result_channels: Sequence[int] | None = None,
        resample_to: Sequence[int] | None = None,
        resample_order: int | Sequence[int] = 1,
        regions: Sequence[int] | None = None,
        finite: bool = False,
        region: Region | None = None,
    ) -> None:
        self.volume_shape = _checks.integers("volume_shape", volume_shape)
        if isinstance(patch_size, int):
            patch_size = (patch_size,) * len(self.volume_shape)
        self.patch_size = _checks.integers("patch_size", patch_size)
        options = FusionOptions(
            channels=channels,
            output=output,
            activation=activation,
            voting=voting,
            threshold=threshold,
            head=head,
            members=members,
            fill=fill,
            dtype=dtype,
            accumulate=accumulate,
            backend=backend,
            result_channels=result_channels,
            resample_to=resample_to,
            resample_order=resample_order,
            regions=regions,
            finite=finite,
        )
        self.channels, self.members, self.options = channels, members, options
        shapes = self.volume_shape, self.patch_size
        self._box = checked_region(region, self.volume_shape)
        self._part = region is not None
        if self._part and options.resample_to is not None:
            raise ValueError("region: got one with resample_to, expected one of the two")
        # Checks the shapes in any case.
        regular = plan_grid(*shapes, overlap if origins is None else 0.5, grid)
        places = regular if origins is None else checked_origins(origins, *shapes)
        if isinstance(places, Grid) and (origins is None or isinstance(origins, Grid)):
            places = places.distinct()
        kept, table = _reaching(places, self._box, self.patch_size)
        whole: Grid | None = None
        if skip_origin is not None:
            # Which of all patches are left decides nothing here: a part could not know of it.
            left = [not skip_origin(tuple(origin)) for origin in table.tolist()]
            kept, table = kept[left], table[left]
        elif isinstance(places, Grid):
            whole = places.rising()
        else:
            whole = factorised(places, *shapes)
        axis = chosen_axis(stream_axis, *shapes)
        self._weights = weights_of(table, window, self.patch_size, whole)
        # Half accumulators take the sum of the weights.
        rounded = bool(self._weights.floor) and accumulate is not None
        if self._weights.normalised and (not self._weights.covering or rounded):
            self._weights = weights_of(table, window, self.patch_size, None)
        #: What sums are kept of. Along the last axis weights with a floor are rounded as all that
        #: lies there says.
        self._summed = self._box
        last = len(self.volume_shape) - 1
        if self._weights.floor and axis != last:
            low, high = self._box.low[:last], self._box.high[:last]
            self._summed = Box((*low, 0), (*high, self.volume_shape[last]))
        self._schedule = Schedule(table, *shapes, axis, members, self._summed)
        self._weights = self._weights.ordered(self._schedule.order)
        self._weights = self._weights.within(self._summed.low, self._summed.high, axis)
        #: (N,) int64 indices of the given origins, or the grid's, in the order of :attr:`origins`:
        #: what another program predicted in its own order is added as ``predictions[fuser.order]``.
        self.order = kept[self._schedule.order]
        self._ring: Ring | None = None
        self._sink = sink_of(options, self._box.shape, axis, out, device)

    def __len__(self) -> int:
        return len(self.origins)

    @property
    def origins(self) -> Tensor:
        """(N, n) int64 first voxels of the patches, in the order in which they are expected."""
        return self._schedule.origins

    @property
    def stream_axis(self) -> int:
        """The axis along which the ring moves."""
        return self._schedule.axis

    @property
    def finished(self) -> int:
        """Slices of the volume before this one, along :attr:`stream_axis`, are final and written.

        With ``resample_to`` what is written are the slices of the result that need no others.
        """
        self.flush()
        return self._schedule.front

    def plan(self) -> FusionPlan:
        """Say what the fusion will take."""
        options, ring_shape, shape = self.options, self._ring_shape(), self._sink.shape
        return FusionPlan(
            patches=len(self),
            members=self.members,
            stream_axis=self.stream_axis,
            ring_shape=ring_shape,
            ring_bytes=(2 if options.accumulate else 4) * math.prod(ring_shape),
            weight_bytes=0 if self._weights.normalised else 8 * math.prod(ring_shape[1:]),
            output_shape=shape,
            output_bytes=options.result_dtype(torch.float32).itemsize * math.prod(shape),
        )

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the origins in streaming order, ``size`` at a time.

        Patches that had all their predictions when the iteration began are left out.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size: got {size!r}, expected an integer >= 1")
        return self._batches(size)

    def _batches(self, size: int) -> Iterator[Tensor]:
        lacking = self._schedule.lacking()
        for first in range(0, len(lacking), size):
            yield self.origins[lacking[first : first + size]]

    def add(
        self,
        patches: Tensor,
        origins: Tensor | NDArray[Any] | Sequence[Sequence[int]] | None = None,
        *,
        flip: Sequence[int] = (),
    ) -> None:
        r"""Add predictions of patches.

        Args:
            patches: (N, channels, \*patch_size) float32, float16, bfloat16 or float64, of the same
                dtype and device in every call.
            origins: (N, n) first voxels, each one of :attr:`origins`, in any order that keeps to
                the ring: no patch reaches further than a patch's depth from the first slice that
                is not final. (Means of the accumulator's dtype on a grid are summed in the result
                itself, in any order.) None takes the next N of :attr:`origins` that lack
                predictions.
            flip: spatial axes along which these predictions are mirrored; they are turned back.

        Raises:
            TypeError: a wrong type or dtype.
            ValueError: a shape does not fit; an origin is not planned, was added before, or cannot
                be added yet. Nothing of the batch has been added then.
        """
        self._push([self._prepared(patches, flip)], origins)

    def add_members(
        self,
        predictions: Sequence[tuple[Tensor, Sequence[int]]],
        origins: Tensor | NDArray[Any] | Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Add all ``members`` predictions of a batch of patches: pairs of (patches, flip).

        As that many calls of :meth:`add` for each patch, but a batch may cross rows of patches.
        Every patch gets all its predictions before the next, so that the bits do not depend on the
        batches; flipped ones are turned back as they are read.
        """
        if len(predictions) != self.members:
            raise ValueError(f"predictions: are {len(predictions)}, expected {self.members}")
        self._push([self._prepared(*prediction) for prediction in predictions], origins)

    def flush(self) -> None:
        """Wait for finished slabs that are on their way from a GPU to a result on the host.

        Reading :attr:`finished` and :meth:`result` do it too. Where a network fails in a loop of
        your own, it makes sure that all final slices are in ``out``.
        """
        self._sink.flush()

    def result(self) -> Any:
        """Return the result (``out`` where one was given), or None with a callback.

        Raises:
            RuntimeError: patches are missing; it says how many and the first of them.
        """
        self._schedule.check_complete()
        if self._ring is None and self._schedule.front < self._schedule.extent:
            # Every patch was left out.
            self._open(torch.empty(0, self.channels, *self.patch_size))
        self.flush()
        return self._sink.returned

    def __copy__(self) -> PatchFuser:
        raise TypeError(
            "PatchFuser: two shallow copies would add to the same sums; use copy.deepcopy"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._ring is not None and self._ring.in_place:
            assert self._sink.result is not None
            self._ring.sums = self._sink.result

    def _prepared(self, patches: Tensor, flip: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Check patches and the axes of a flip."""
        patches = _checks.require_tensor("patches", patches).detach()
        expected = (self.channels, *self.patch_size)
        if tuple(patches.shape[1:]) != expected:
            listed = ", ".join(str(size) for size in expected)
            raise ValueError(f"patches: got shape {tuple(patches.shape)}, expected (N, {listed})")
        if patches.dtype not in _checks.LOGIT_DTYPES:
            raise TypeError(
                f"patches: got {_checks.describe(patches)}, expected float32, float16, bfloat16 or "
                "float64"
            )
        axes = tuple(sorted({int(axis) for axis in flip}))
        if axes and not 0 <= axes[0] <= axes[-1] < len(self.patch_size):
            raise ValueError(f"flip: got {axes}, expected axes in [0, {len(self.patch_size)})")
        return patches, axes

    def _push(self, predictions: list[tuple[Tensor, tuple[int, ...]]], origins: Any) -> None:
        schedule, times = self._schedule, len(predictions)
        indices = schedule.indices(origins, predictions[0][0].shape[0], times)
        for patches, _ in predictions:
            ring = self._open(patches)
        segments = schedule.segments(indices, times, ring.depth)
        self._sink.collect()
        for segment in segments:
            # With several predictions patch by patch: sums follow the order of the patches.
            size = segment.stop - segment.start
            step = size if times == 1 else 1
            for low in range(segment.start, segment.stop, max(step, 1)):
                part = slice(low, low + step)
                for patches, flip in predictions:
                    ring.add(patches[part], indices[part], flip)
            schedule.done(indices[segment], times)
            self._advance(ring)

    def _open(self, patches: Tensor) -> Ring:
        """Allocate the ring and the result at the first patches."""
        dtype, device, ring = accumulation_dtype(patches.dtype), patches.device, self._ring
        if ring is not None:
            if (ring.dtype, ring.sums.device) != (dtype, device):
                raise ValueError(
                    f"patches: got {_checks.describe(patches)}, but those before went to "
                    f"{str(ring.dtype).removeprefix('torch.')} sums on {ring.sums.device}"
                )
            return ring
        self._sink.open(patches)
        result, tables = self._sink.result, (self._schedule, self._weights, self.options, dtype)
        if (
            result is not None
            and (result.dtype, result.device) == (dtype, device)
            and result.is_contiguous()
            and self.options.sums_are_result
            and self._weights.normalised
            and not self._part  # others may have written beside it already
        ):
            self._ring = Ring(result.zero_(), *tables, in_place=True)
            return self._ring
        kind = Ring if self.options.accumulate is None else HalfRing
        sums = zeros(self._ring_shape(), self.options.accumulate or dtype, device)
        self._ring = kind(sums, *tables)
        # Slices before the first patch are final already, and their slots are needed.
        self._advance(self._ring)
        return self._ring

    def _advance(self, ring: Ring) -> None:
        """Write the slices that no patch to come reaches, and move the ring on."""
        first = self._box.low[self.stream_axis]

        def finished(slab: Tensor, start: int, stop: int) -> None:
            """Make the part of final slices that is asked for."""
            if self._summed == self._box:
                ring.finish(slab, start + first, stop + first)
                return
            wide = slab.new_empty((*slab.shape[:-1], self._summed.shape[-1]))
            ring.finish(wide, start + first, stop + first)
            slab.copy_(wide[..., self._box.low[-1] : self._box.high[-1]])

        for start, stop in self._schedule.final(ring.depth):
            if not ring.in_place:
                self._sink.write(start - first, stop - first, ring.sums.device, finished)
        ring.weigh()

    def _ring_shape(self) -> tuple[int, ...]:
        axis, volume = self.stream_axis, self._summed.shape
        depth = min(self.patch_size[axis], volume[axis])
        return (self.channels, *volume[:axis], depth, *volume[axis + 1 :])


def _reaching(places: Grid | Tensor, box: Box, patch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Numbers and origins of the patches that reach into a part of the volume."""
    if isinstance(places, Grid):
        return box.patches_of(places)
    kept = box.reaching(places, patch)
    return kept, places[kept]
