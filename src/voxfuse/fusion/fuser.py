"""Streaming patch fusion: a ring of slices instead of a volume, results slab by slab."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxfuse.fusion._memory import empty, overlaps_itself, zeros
from voxfuse.fusion.delivery import Delivery
from voxfuse.fusion.grids import Grid, plan_grid, weights_for_origins
from voxfuse.fusion.half_ring import ACCUMULATORS, add_rounded, slots, widened
from voxfuse.fusion.windows import WindowLike
from voxfuse.ops import _checks
from voxfuse.ops.finalize_slab import ACTIVATIONS, check_threshold, finalize_slab
from voxfuse.ops.overlap_add import overlap_add_, overlap_weights_
from voxfuse.reference.overlap_add import accumulation_dtype

#: What comes out, and what it is called by the finalisation.
OUTPUTS = {
    "logits": "values",
    "probabilities": "values",
    "labels": "labels",
    "mask": "mask",
    "foreground": "foreground",
    "entropy": "entropy",
}
VOTINGS = ("soft", "logit")

#: Where a result goes: a tensor, a NumPy array (a memmap, say), or a function of
#: (slab, start, stop) that is called once for every finished slab.
Destination = Tensor | NDArray[Any] | Callable[[Tensor, int, int], object]


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
            f"ring {self.ring_shape} {_readable(self.ring_bytes)}, "
            f"weights {_readable(self.weight_bytes)}, "
            f"output {self.output_shape} {_readable(self.output_bytes)}"
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
            there is no background) or "entropy" (in nats).
        activation: "sigmoid" or "softmax", which makes probabilities of predictions; "identity",
            where they are probabilities already; or "none". Probabilities, a mask, the foreground
            and the entropy need one of the first three.
        voting: "soft" (activate every patch, then average; the default) or "logit" (average, then
            activate; the default, and the only way, with ``head``). Soft voting activates patches
            as they are added, without a copy of them. With ``activation="none"`` both average
            predictions as they are.
        threshold: for "mask".
        head: (weight (C, channels), bias (C,)) of the network's last, linear layer: features are
            fused, and the layer applied to finished slices only. Exact up to rounding, because the
            layer is linear and the weights sum to 1.
        members: predictions that every patch gets (flips, models of an ensemble); their mean
            counts.
        skip: a function of an origin (tuple of integers); patches for which it is true are left
            out. It is asked once, here.
        fill: the result where no patch lies; labels and masks take integers that their dtype holds.
        stream_axis: "auto" or an axis.
        out: where the result goes: a tensor on any device, a NumPy array such as a memmap, or a
            function ``out(slab, start, stop)`` called for every finished slab (a fresh tensor with
            channels, slices start to stop of ``stream_axis``). None allocates a tensor. From a GPU
            to the host slabs travel through pinned memory while the network goes on.
        dtype: of a result that is allocated here. Default: the patches' for floating results, the
            smallest of uint8, uint16 and int32 for labels, uint8 for a mask.
        device: of a result that is allocated here. Default: the patches'.
        accumulate: None (float32 sums), or torch.float16 or torch.bfloat16 for a ring of half the
            memory. Every addition is then rounded once: with n of them over a voxel (patches times
            members) the mean is off by at most ``n u max|P|`` beside float32's rounding, u = 2^-11
            for float16 (and n 2^-25: its smallest numbers), 2^-8 for bfloat16. Predictions beyond
            65504 overflow float16. Slower: see :mod:`voxfuse.fusion.half_ring`.
        backend: "auto", "cpp", "cuda", "triton" or "reference"; see :func:`voxfuse.backends`.

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
        origins: Tensor | NDArray[Any] | Grid | Sequence[Sequence[int]] | None = None,
        window: WindowLike = "bspline",
        output: str = "logits",
        activation: str = "none",
        voting: str | None = None,
        threshold: float = 0.5,
        head: tuple[Tensor, Tensor] | None = None,
        members: int = 1,
        skip: Callable[[tuple[int, ...]], bool] | None = None,
        fill: float = 0.0,
        stream_axis: str | int = "auto",
        out: Destination | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        accumulate: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        if accumulate is not None and accumulate not in ACCUMULATORS:
            raise ValueError(
                f"accumulate: got {accumulate}, expected None, torch.float16 or torch.bfloat16"
            )
        self.accumulate = accumulate
        self.volume_shape = _checks.integers("volume_shape", volume_shape)
        if isinstance(patch_size, int):
            patch_size = (patch_size,) * len(self.volume_shape)
        self.patch_size = _checks.integers("patch_size", patch_size)
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels: got {channels!r}, expected an integer >= 1")
        if isinstance(members, bool) or not isinstance(members, int) or members < 1:
            raise ValueError(f"members: got {members!r}, expected an integer >= 1")
        self.channels = channels
        self.members = members
        self.output = output
        self.activation = activation
        self.threshold = threshold
        self.fill = fill
        self.backend = backend
        self._head = checked_head(head, channels)
        self.classes = channels if self._head is None else self._head[0].shape[0]
        self.voting = checked_voting(voting, self._head is not None)
        self._check_output()
        # What the operators compute.
        self._activation = "none" if activation == "identity" else activation

        table = _origins(self.volume_shape, self.patch_size, overlap, grid, origins)
        if skip is not None:
            kept = [i for i, origin in enumerate(table.tolist()) if not skip(tuple(origin))]
            table = table[kept]
        self.stream_axis = chosen_axis(stream_axis, self.volume_shape, self.patch_size)
        axis = self.stream_axis
        order = torch.argsort(table[:, axis], stable=True)
        #: (N, n) int64 first voxels of the patches, in the order in which they are expected.
        self.origins = table[order].contiguous()
        weights = weights_for_origins(self.origins, window, self.volume_shape, self.patch_size)
        # Half accumulators take the sum of the weights.
        rounded = bool(weights.floor) and accumulate is not None
        if weights.normalised and (not weights.covering or rounded):
            weights = weights_for_origins(
                self.origins, window, self.volume_shape, self.patch_size, normalise=False
            )
        self._rows, self._weights = weights.rows, weights.weights
        self._normalised = weights.normalised
        self._floor, self._cover = weights.floor, weights.cover

        extent = self.volume_shape[axis]
        self._depth = min(self.patch_size[axis], extent)
        self._index = {tuple(origin): i for i, origin in enumerate(self.origins.tolist())}
        if len(self._index) != len(self.origins):
            twice = Counter(map(tuple, self.origins.tolist())).most_common(1)[0][0]
            raise ValueError(f"origins: {twice} occurs more than once")
        starts = self.origins[:, axis]
        # A row of patches shares a start along the stream axis.
        values, row_of, counts = torch.unique(starts, return_inverse=True, return_counts=True)
        self._row_of: list[int] = row_of.tolist()
        self._bounds: list[tuple[int, int]] = [
            (min(max(s, 0), extent), min(max(s + self.patch_size[axis], 0), extent))
            for s in map(int, values.tolist())
        ]
        self._left = [count * members for count in counts.tolist()]
        self._added = [0] * len(self.origins)
        self._base = self._first_open(self._left)
        self._front = 0
        self._weighed = 0
        self._cursor = 0
        self._dtype = dtype
        self._device = None if device is None else torch.device(device)
        self._callback = out if callable(out) and not isinstance(out, Tensor) else None
        self._result: Tensor | None = None
        self._returned: Any = None
        self._ring: Tensor | None = None
        self._sums = torch.float32
        self._kind: torch.dtype | None = None
        self._total: Tensor | None = None
        self._in_place = False
        self._delivery = Delivery()
        if out is not None and self._callback is None:
            self._take(out)
        else:
            _checks.require_held("fill", self.fill, self._result_dtype(torch.float32))

    def __len__(self) -> int:
        return len(self.origins)

    @property
    def finished(self) -> int:
        """Slices before this one, along :attr:`stream_axis`, are final and written."""
        self.flush()
        return self._front

    def plan(self) -> FusionPlan:
        """Say what the fusion will take."""
        ring_shape = (self.channels, *self._ring_extent())
        size = self._result_dtype(torch.float32).itemsize
        shape = self._result_shape()
        return FusionPlan(
            patches=len(self.origins),
            members=self.members,
            stream_axis=self.stream_axis,
            ring_shape=ring_shape,
            ring_bytes=(2 if self.accumulate else 4) * math.prod(ring_shape),
            weight_bytes=0 if self._normalised else 8 * math.prod(ring_shape[1:]),
            output_shape=shape,
            output_bytes=size * math.prod(shape),
        )

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the origins in streaming order, ``size`` at a time.

        Patches that had all their predictions when the iteration began are left out.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size: got {size!r}, expected an integer >= 1")
        return self._batches(size)

    def _batches(self, size: int) -> Iterator[Tensor]:
        lacking = [i for i, count in enumerate(self._added) if count < self.members]
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
        if self._kind is None:
            self._kind = patches.dtype
        axes = tuple(sorted({int(axis) for axis in flip}))
        if axes and not 0 <= axes[0] <= axes[-1] < len(self.patch_size):
            raise ValueError(f"flip: got {axes}, expected axes in [0, {len(self.patch_size)})")
        return patches, axes

    def _push(self, predictions: list[tuple[Tensor, tuple[int, ...]]], origins: Any) -> None:
        times = len(predictions)
        indices = self._indices(origins, predictions[0][0].shape[0], times)
        for patches, _ in predictions:
            ring = self._open(patches)
        segments = self._segments(indices, times)
        self._delivery.collect()
        for first, last, left in segments:
            # With several predictions patch by patch: sums follow the order of the patches.
            step = last - first if times == 1 else 1
            for low in range(first, last, max(step, 1)):
                for patches, flip in predictions:
                    part = slice(low, low + step)
                    self._add(ring, patches[part], indices[part], flip)
            for index in indices[first:last]:
                self._added[index] += times
            self._left = left
            self._advance()

    def flush(self) -> None:
        """Wait for finished slabs that are on their way from a GPU to a result on the host.

        Reading :attr:`finished` and :meth:`result` do it too. Where a network fails in a loop of
        your own, it makes sure that all final slices are in ``out``.
        """
        self._delivery.flush()

    def result(self) -> Any:
        """Return the result (``out`` where one was given), or None with a callback.

        Raises:
            RuntimeError: patches are missing; it says how many and the first of them.
        """
        missing = [i for i, count in enumerate(self._added) if count < self.members]
        if missing:
            first = tuple(self.origins[missing[0]].tolist())
            raise RuntimeError(
                f"{len(missing)} of {len(self._added)} patches are missing, the first at {first}; "
                f"slices before {self._front} of axis {self.stream_axis} are final"
            )
        if self._ring is None and self._front < self.volume_shape[self.stream_axis]:
            # Every patch was left out.
            self._open(torch.empty(0, self.channels, *self.patch_size))
        self.flush()
        return self._returned

    def result_layout(self, patches: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape, with its channel axis, and dtype of the result of patches of a dtype."""
        channels = self.classes if self._all_channels() else 1
        return (channels, *self.volume_shape), self._result_dtype(patches)

    def send_to(self, fresh: Tensor) -> None:
        """Write the result into ``fresh``, of :meth:`result_layout`, whatever it holds."""
        self._take(fresh)

    # --- copies in the middle of the work ------------------------------------------------------

    def __copy__(self) -> PatchFuser:
        raise TypeError(
            "PatchFuser: two shallow copies would add to the same sums; use copy.deepcopy"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but views of the result, which pickle would tear from it."""
        if _is_mapped(self._returned):
            raise TypeError(
                "PatchFuser: its result goes to a memory-mapped file, which a copy would write to "
                "as well; use out=None, or an array in memory, and write result() to the file"
            )
        self.flush()
        state = self.__dict__ | {"_result": None, "_delivery": None}
        if self._in_place:
            state["_ring"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._delivery = Delivery()
        if self._returned is not None:
            self._take(self._returned)
        if self._in_place:
            self._ring = self._result

    # --- what is asked for --------------------------------------------------------------------

    def _check_output(self) -> None:
        if self.output not in OUTPUTS:
            listed = ", ".join(repr(name) for name in OUTPUTS)
            raise ValueError(f"output: got {self.output!r}, expected one of {listed}")
        _checks.choice("activation", self.activation, ACTIVATIONS)
        check_threshold(self.threshold)
        if self.output not in ("logits", "labels") and self.activation == "none":
            raise ValueError(
                f"activation: got 'none' with output {self.output!r}, which needs probabilities; "
                "use 'softmax' or 'sigmoid', or 'identity' where predictions are probabilities"
            )
        unactivated = self.activation in ("none", "identity")
        if self._head is not None and self.voting == "soft" and not unactivated:
            raise ValueError("voting: got 'soft', expected 'logit' with head")
        if self.output == "labels" and self.classes == 1:
            raise ValueError("output: 'labels' of one channel are all 0; use 'mask'")
        if self.output == "logits" and self.activation != "none":
            raise ValueError(
                f"activation: got {self.activation!r} with output 'logits'; use 'probabilities'"
            )

    def _ring_extent(self) -> tuple[int, ...]:
        extent = list(self.volume_shape)
        extent[self.stream_axis] = self._depth
        return tuple(extent)

    def _all_channels(self) -> bool:
        return OUTPUTS[self.output] in ("values", "mask")

    def _result_shape(self) -> tuple[int, ...]:
        return (self.classes, *self.volume_shape) if self._all_channels() else self.volume_shape

    def _result_dtype(self, patches: torch.dtype) -> torch.dtype:
        return self._dtype or result_dtype(self.output, self.classes, patches)

    # --- memory -------------------------------------------------------------------------------

    def _take(self, out: Any) -> None:
        """Check the caller's tensor or array and keep it with a channel axis."""
        self._returned = out
        if isinstance(out, np.ndarray):
            if not out.flags.writeable:
                raise ValueError("out: the array is not writeable")
            tensor = torch.from_numpy(out)
        elif isinstance(out, Tensor):
            tensor = _checks.plain(out)
        else:
            raise TypeError(
                f"out: got {type(out).__name__}, expected a tensor, a NumPy array or a function"
            )
        _checks.require_held("fill", self.fill, tensor.dtype)
        shape = self._result_shape()
        allowed = [shape]
        if shape in (self.volume_shape, (1, *self.volume_shape)):
            allowed = [self.volume_shape, (1, *self.volume_shape)]
        if tuple(tensor.shape) not in allowed:
            raise ValueError(f"out: got shape {tuple(tensor.shape)}, expected {shape}")
        if overlaps_itself(tensor):
            raise ValueError(
                f"out: got strides {tensor.stride()} for shape {tuple(tensor.shape)}, of which "
                "several voxels share one place in memory"
            )
        self._result = (
            tensor.reshape(-1, *self.volume_shape)
            if tensor.ndim == len(self.volume_shape) + 1
            else tensor.unsqueeze(0)
        )
        if self._result.data_ptr() != tensor.data_ptr():
            raise ValueError("out: expected a tensor whose channel axis needs no copy")

    def _open(self, patches: Tensor) -> Tensor:
        """Allocate the ring and the result at the first patch."""
        sums = accumulation_dtype(patches.dtype)
        if self._ring is not None:
            if (self._sums, self._ring.device) != (sums, patches.device):
                raise ValueError(
                    f"patches: got {_checks.describe(patches)}, but those before went to "
                    f"{str(self._sums).removeprefix('torch.')} sums on {self._ring.device}"
                )
            return self._ring
        self._sums = sums
        if self._result is None and self._callback is None:
            self._returned = empty(
                self._result_shape(),
                self._result_dtype(self._kind or patches.dtype),
                self._device or patches.device,
            )
            self._result = self._returned if self._all_channels() else self._returned.unsqueeze(0)
        result = self._result
        # Plain means of the accumulator's own type need no ring: their sums grow in the result.
        self._in_place = (
            result is not None
            and result.dtype == sums
            and result.device == patches.device
            and result.is_contiguous()
            and OUTPUTS[self.output] == "values"
            and (self._activation == "none" or self.voting == "soft")
            and self._head is None
            and self.members == 1
            and self._normalised
            and self.accumulate is None
        )
        device = patches.device
        self._weights = [w.to(device) for w in self._weights]
        self._cover = [table.to(device) for table in self._cover]
        if self._in_place:
            assert result is not None
            self._ring = result.zero_()
            return result
        extent = self._ring_extent()
        self._ring = zeros((self.channels, *extent), self.accumulate or sums, device)
        if not self._normalised:
            self._total = zeros(extent, torch.float64, device)
        if self._head is not None:
            weight, bias = self._head
            self._head = (weight.to(device, sums), bias.to(device, sums))
        # Slices before the first patch are final already, and their slots are needed.
        self._advance()
        return self._ring

    # --- the stream ---------------------------------------------------------------------------

    def _indices(self, origins: Any, count: int, times: int) -> list[int]:
        if origins is None:
            while self._cursor < len(self._added) and self._added[self._cursor] >= self.members:
                self._cursor += 1
            coming = range(self._cursor, len(self._added))
            lacking = (i for i in coming if self._added[i] < self.members)
            indices = list(islice(lacking, count))
            if len(indices) < count:
                raise ValueError(f"patches: are {count}, but only {len(indices)} are to come")
        else:
            table = torch.as_tensor(origins)
            if table.ndim != 2 or tuple(table.shape) != (count, len(self.volume_shape)):
                raise ValueError(
                    f"origins: got shape {tuple(table.shape)}, expected "
                    f"({count}, {len(self.volume_shape)})"
                )
            indices = []
            for origin in map(tuple, table.tolist()):
                if origin not in self._index:
                    raise ValueError(
                        f"origins: {origin} is none of the {len(self)} planned patches"
                    )
                indices.append(self._index[origin])
        for index, often in Counter(indices).items():
            if self._added[index] + often * times > self.members:
                origin = tuple(self.origins[index].tolist())
                limit = "once" if self.members == 1 else f"{self.members} times"
                raise ValueError(f"origins: {origin} is added again; each patch comes {limit}")
        return indices

    def _first_open(self, left: list[int]) -> int:
        """Where the first row begins that lacks patches: slices before it are final."""
        for (start, _), count in zip(self._bounds, left, strict=True):
            if count:
                return start
        return self.volume_shape[self.stream_axis]

    def _segments(self, indices: list[int], times: int) -> list[tuple[int, int, list[int]]]:
        """Cut a batch where the ring has to move on: (first, last, patches left in each row)."""
        segments = []
        left, base, first = list(self._left), self._base, 0
        if self._in_place:
            for index in indices:
                left[self._row_of[index]] -= times
            return [(0, len(indices), left)]
        for position, index in enumerate(indices):
            row = self._row_of[index]
            stop = self._bounds[row][1]
            if stop > base + self._depth:
                segments.append((first, position, list(left)))
                first, base = position, self._first_open(left)
                if stop > base + self._depth:
                    origin = tuple(self.origins[index].tolist())
                    missing = tuple(
                        self.origins[self._first_missing(indices[:position], times)].tolist()
                    )
                    raise ValueError(
                        f"origins: {origin} cannot be added yet: the ring holds slices {base} to "
                        f"{base + self._depth} of axis {self.stream_axis} until the patch at "
                        f"{missing} has come"
                    )
            left[row] -= times
        segments.append((first, len(indices), left))
        return segments

    def _first_missing(self, pending: list[int], times: int) -> int:
        coming = Counter(pending)
        return next(i for i, n in enumerate(self._added) if n + coming[i] * times < self.members)

    def _add(
        self, ring: Tensor, patches: Tensor, indices: list[int], flip: tuple[int, ...]
    ) -> None:
        extent = self.volume_shape[self.stream_axis]
        start = 0 if self._in_place else self._base
        arguments: dict[str, Any] = {
            "total": self._total,
            "ring_axis": self.stream_axis,
            "start": start,
            "stop": extent if self._in_place else min(start + self._depth, extent),
            "flip": flip,
            "activation": self._activation if self.voting == "soft" else "none",
            "backend": self.backend,
        }
        tables = self.origins[indices], self._rows[indices], self._weights
        if self.accumulate is None:
            arguments |= {"floor": self._floor, "cover": self._cover}
            overlap_add_(ring, patches, *tables, **arguments)
        else:
            arguments |= {"members": self.members, "dtype": self._sums}
            add_rounded(ring, patches, *tables, **arguments)

    def _advance(self) -> None:
        """Write the slices that no patch to come reaches, and move the ring on."""
        self._base = self._first_open(self._left)
        while self._front < self._base:
            stop = min(self._base, self._front + self._depth)
            self._finish(self._front, stop)
            self._front = stop
        if self._total is not None:
            self._weigh()

    def _is_direct(self, place: Tensor, ring: Tensor) -> bool:
        """Whether slices are finalised right where the result is."""
        return place.device == ring.device

    def _finish(self, start: int, stop: int) -> None:
        if self._in_place:
            return
        assert self._ring is not None
        ring, axis = self._ring, self.stream_axis
        place = None if self._result is None else self._result.narrow(1 + axis, start, stop - start)
        slab = place
        if place is None or not self._is_direct(place, ring):
            shape = list(self.volume_shape)
            shape[axis] = stop - start
            channels = self.classes if self._all_channels() else 1
            dtype = self._result_dtype(self._kind or ring.dtype) if place is None else place.dtype
            slab = torch.empty((channels, *shape), dtype=dtype, device=ring.device)
        assert slab is not None
        if self.accumulate is None:
            self._finalise(ring, self._total, slab, start, stop)
        else:
            self._finalise_rounded(ring, slab, start, stop)
        if self._total is not None:
            for slot, size in slots(start, stop, self._depth):
                self._total.narrow(axis, slot, size).zero_()
        if self._callback is not None:
            self._callback(slab, start, stop)
        elif slab is not place:
            assert place is not None
            self._delivery.send(slab, place)

    def _finalise(
        self, ring: Tensor, total: Tensor | None, slab: Tensor, start: int, stop: int
    ) -> None:
        weight, bias = (None, None) if self._head is None else self._head
        finalize_slab(
            ring,
            slab,
            OUTPUTS[self.output],
            ring_axis=self.stream_axis,
            start=start,
            stop=stop,
            activation=self.activation,
            applied=self.voting == "soft",
            divisor=self.members if self.accumulate is None else 1,
            weight=weight,
            bias=bias,
            total=total,
            threshold=self.threshold,
            fill=self.fill,
            clear=True,
            backend=self.backend,
        )

    def _finalise_rounded(self, ring: Tensor, slab: Tensor, start: int, stop: int) -> None:
        """Widen a sixteenth of the ring at a time."""
        axis, block = self.stream_axis, max(self._depth // 16, 1)
        low, high = [0] * len(self.volume_shape), list(self.volume_shape)
        for first in range(start, stop, block):
            last = min(first + block, stop)
            low[axis], high[axis] = first, last
            sums = widened(ring, low, high, axis, self._sums)
            total = None if self._total is None else widened(self._total[None], low, high, axis)[0]
            part = slab.narrow(1 + axis, first - start, last - first)
            self._finalise(sums, total, part, 0, last - first)
        for slot, size in slots(start, stop, self._depth):
            ring.narrow(1 + axis, slot, size).zero_()

    def _weigh(self) -> None:
        """Sum the weights over the slices that the ring has come to hold."""
        assert self._total is not None
        axis = self.stream_axis
        start = max(self._weighed, self._base)
        stop = min(self._base + self._depth, self.volume_shape[axis])
        self._weighed = max(start, stop)
        if start >= stop:
            return
        first = self.origins[:, axis]
        near = (first < stop) & (first + self.patch_size[axis] > start)
        overlap_weights_(
            self._total,
            self.origins[near],
            self._rows[near],
            self._weights,
            ring_axis=axis,
            start=start,
            stop=stop,
            backend=self.backend,
        )


def _is_mapped(out: Any) -> bool:
    """Whether an array's memory is a file's."""
    while isinstance(out, np.ndarray):
        if isinstance(out, np.memmap):
            return True
        out = out.base
    return False


def chosen_axis(stream_axis: str | int, volume: Sequence[int], patch: Sequence[int]) -> int:
    """The axis to stream along: the given one, or that with the smallest ring."""
    if stream_axis == "auto":
        return min(range(len(volume)), key=lambda a: min(patch[a], volume[a]) / volume[a])
    if not isinstance(stream_axis, int) or not 0 <= stream_axis < len(volume):
        raise ValueError(
            f"stream_axis: got {stream_axis!r}, expected 'auto' or 0 to {len(volume) - 1}"
        )
    return stream_axis


def result_dtype(output: str, classes: int, patches: torch.dtype) -> torch.dtype:
    """The dtype of a result of patches of a dtype, where the caller wants no other."""
    if output == "labels":
        for dtype in (torch.uint8, torch.uint16):
            if classes - 1 <= torch.iinfo(dtype).max:
                return dtype
        return torch.int32
    return torch.uint8 if output == "mask" else patches


def checked_voting(voting: str | None, head: bool) -> str:
    if voting is None:
        return "logit" if head else "soft"
    if voting not in VOTINGS:
        listed = ", ".join(repr(name) for name in VOTINGS)
        raise ValueError(f"voting: got {voting!r}, expected one of {listed}")
    return voting


def checked_head(head: tuple[Tensor, Tensor] | None, channels: int) -> tuple[Tensor, Tensor] | None:
    """Check the head; the kernel of a convolution of extent 1 loses its spatial axes."""
    if head is None:
        return None
    if not isinstance(head, Sequence) or len(head) != 2:
        raise TypeError(f"head: got {type(head).__name__}, expected (weight, bias)")
    weight = _checks.require_tensor("head's weight", head[0]).detach()
    bias = head[1]
    if weight.ndim < 2 or math.prod(weight.shape[2:]) != 1 or weight.shape[1] != channels:
        raise ValueError(f"head: got weight {tuple(weight.shape)}, expected (C, {channels})")
    weight = weight.reshape(weight.shape[:2])
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    bias = _checks.require_tensor("head's bias", bias).detach()
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"head: got bias {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    return weight, bias


def _origins(
    volume: tuple[int, ...],
    patch: tuple[int, ...],
    overlap: float | Sequence[float],
    rule: str,
    origins: Tensor | NDArray[Any] | Grid | Sequence[Sequence[int]] | None,
) -> Tensor:
    # Checks the shapes in any case.
    regular = plan_grid(volume, patch, overlap if origins is None else 0.5, rule)
    if origins is None:
        return _once(regular).origins
    if isinstance(origins, Grid):
        if (origins.volume_shape, origins.patch_shape) != (volume, patch):
            raise ValueError(
                f"origins: got a grid of {origins.patch_shape} patches over a volume "
                f"{origins.volume_shape}, expected {patch} over {volume}"
            )
        return _once(origins).origins
    if isinstance(origins, (Tensor, np.ndarray)):
        table = torch.as_tensor(origins).detach()
        if table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
            raise TypeError(f"origins: got {_checks.describe(table)}, expected integers")
        if table.ndim != 2 or table.shape[1] != len(patch):
            raise ValueError(f"origins: got shape {tuple(table.shape)}, expected (N, {len(patch)})")
        return table.to("cpu", torch.int64)
    if len(origins) != len(patch):
        raise ValueError(f"origins: got starts along {len(origins)} axes, expected {len(patch)}")
    return Grid(volume, patch, tuple(_checks.integers("origins", axis) for axis in origins)).origins


def _once(grid: Grid) -> Grid:
    """Leave out starts that occur again, as those of steps below one voxel do."""
    starts = tuple(tuple(dict.fromkeys(axis)) for axis in grid.starts)
    return Grid(grid.volume_shape, grid.patch_shape, starts)


def _readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
