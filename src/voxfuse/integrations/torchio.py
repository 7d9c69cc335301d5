"""TorchIO's aggregators on the patch fusion; TorchIO itself is not imported.

    from voxfuse.integrations.torchio import GridAggregator  # TorchIO 1
    from voxfuse.integrations.torchio import PatchAggregator  # TorchIO 2

Semantics are those of TorchIO 1.2 and 2.0.0a2; ``docs/differences.md`` says where the numbers
differ. "bspline" is a further overlap mode, and ``output="labels"`` keeps no (C, V) volume.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from voxfuse.fusion.fuser import PatchFuser
from voxfuse.fusion.windows import resolve_window
from voxfuse.ops import _checks
from voxfuse.ops.overlap_add import overlap_add_, overlap_weights_
from voxfuse.reference.overlap_add import accumulation_dtype

MODES = ("crop", "average", "hann", "bspline")


def _check_options(overlap_mode: str, output: str) -> None:
    if overlap_mode not in MODES:
        listed = ", ".join(repr(mode) for mode in MODES)
        raise ValueError(f"overlap_mode: got {overlap_mode!r}, expected one of {listed}")
    if output not in ("dense", "labels"):
        raise ValueError(f"output: got {output!r}, expected 'dense' or 'labels'")
    if output == "labels" and overlap_mode == "crop":
        raise ValueError("output: 'labels' of overlap_mode 'crop'; take the argmax of a patch")


def _window(overlap_mode: str) -> str:
    return "constant" if overlap_mode == "average" else overlap_mode


def _floating(batch: Tensor) -> Tensor:
    """Integers are averaged to floats, as true division does."""
    return batch if batch.is_floating_point() else batch.to(torch.get_default_dtype())


def _check_shapes(name: str, batch: Tensor, sizes: Sequence[Sequence[int]]) -> None:
    if len(batch) != len(sizes):
        raise ValueError(f"locations: got {len(sizes)} for {len(batch)} patches")
    shapes = {tuple(size) for size in sizes}
    if shapes - {tuple(batch.shape[2:])}:
        raise RuntimeError(
            f"{name}: got patches of {tuple(batch.shape[2:])}, expected {shapes}, the "
            "shapes of the locations"
        )


class GridAggregator:
    r"""Put a volume together from the predictions of a ``torchio.GridSampler``'s patches.

    Args:
        sampler: the sampler that the patches come from.
        overlap_mode: "crop" (half of the overlap is cut off each patch), "average" (equal weights),
            "hann" or "bspline" (weights fall off towards the patch's borders: the B-spline of order
            5 of :func:`voxfuse.bspline_window`).
        downsampling_factor: voxels of the input a voxel of the prediction, along each axis.
        output: "dense" (C, \*volume), as TorchIO; or "labels": the index of the greatest channel,
            (1, \*volume) uint8 (uint16 from 257 channels on), in a memory of a few slices of C
            channels. Labels need the patches in the sampler's order and cannot be taken of crops.

    Raises:
        ValueError: an unknown mode or output.

    Example:
        >>> import torch
        >>> import torchio  # doctest: +SKIP
        >>> sampler = torchio.GridSampler(subject, 64, 16)  # doctest: +SKIP
        >>> aggregator = GridAggregator(sampler, "bspline", output="labels")  # doctest: +SKIP
    """

    def __init__(
        self,
        sampler: Any,
        overlap_mode: str = "crop",
        downsampling_factor: int = 1,
        *,
        output: str = "dense",
    ) -> None:
        _check_options(overlap_mode, output)
        factor = downsampling_factor
        self.overlap_mode = overlap_mode
        self.output = output
        self.volume_padded = sampler.padding_mode is not None
        self.patch_overlap = np.asarray(sampler.patch_overlap)
        self.spatial_shape = tuple(int(size) // factor for size in sampler.subject.spatial_shape)
        self._factor = factor
        self._locations = np.asarray(sampler.locations) // factor
        self._volume: Tensor | None = None
        self._fuser: PatchFuser | None = None
        self._dtype = torch.float32

    def add_batch(self, batch_tensor: Tensor, locations: Tensor) -> None:
        """Add predictions (B, C, \\*patch) at ``locations`` (B, 6): first and last corners.

        Raises:
            RuntimeError: the patches' shape is not that of their locations.
            ValueError: a location is none of the sampler's, or was added before.
        """
        batch = _checks.require_tensor("batch_tensor", batch_tensor).detach().cpu()
        places = np.asarray(locations.cpu()) // self._factor
        _check_shapes("batch_tensor", batch, (places[:, 3:] - places[:, :3]).tolist())
        if self.overlap_mode == "crop":
            self._copy(batch, places)
        else:
            self._fuse(batch, places)

    def get_output_tensor(self) -> Tensor:
        """Return the volume.

        Raises:
            RuntimeError: no patches were added, or (unless "crop") some are missing.
        """
        if self.overlap_mode == "crop":
            if self._volume is None:
                raise RuntimeError("no patches were added")
            result = self._volume
            if result.dtype == torch.int64:
                warnings.warn(
                    "Medical image frameworks such as ITK do not support int64. Casting to int32",
                    RuntimeWarning,
                    stacklevel=2,
                )
                result = result.to(torch.int32)
        else:
            if self._fuser is None:
                raise RuntimeError("no patches were added")
            result = self._fuser.result()
            if self.output == "dense":
                result = result.to(self._dtype)
        result = result.unsqueeze(0) if result.ndim == 3 else result
        if self.volume_padded:
            border = (self.patch_overlap // 2).tolist()
            box = [slice(b, size - b) for b, size in zip(border, result.shape[1:], strict=True)]
            result = result[(slice(None), *box)]
        return result

    def _copy(self, batch: Tensor, places: np.ndarray[Any, Any]) -> None:
        if self._volume is None:
            self._volume = batch.new_zeros((batch.shape[1], *self.spatial_shape))
        elif batch.shape[1] != self._volume.shape[0]:
            raise ValueError(
                f"batch_tensor: got {batch.shape[1]} channels, expected {self._volume.shape[0]} as "
                "before"
            )
        half = self.patch_overlap // 2
        for patch, place in zip(batch, places, strict=True):
            first, last = place[:3], place[3:]
            inner = np.ones(3, bool)
            low = half * (inner if self.volume_padded else first > 0)
            high = half * (inner if self.volume_padded else last != self.spatial_shape)
            size = last - first
            box = [slice(a, n - b) for a, b, n in zip(low, high, size, strict=True)]
            target = [slice(a, b) for a, b in zip(first + low, last - high, strict=True)]
            self._volume[(slice(None), *target)] = patch[(slice(None), *box)]

    def _fuse(self, batch: Tensor, places: np.ndarray[Any, Any]) -> None:
        batch = _floating(batch)
        self._dtype = batch.dtype
        if self.output == "dense" and batch.dtype != torch.float64:
            batch = batch.to(torch.float32)
        if self._fuser is None:
            patch = tuple(batch.shape[2:])
            # TorchIO hands out patches along the first axis first. Dense results take any order:
            # their sums grow in the result itself.
            self._fuser = PatchFuser(
                self.spatial_shape,
                patch,
                batch.shape[1],
                origins=np.unique(self._locations[:, :3], axis=0),
                window=_window(self.overlap_mode),
                output="logits" if self.output == "dense" else "labels",
                stream_axis=0,
            )
        self._fuser.add(batch, places[:, :3])


class Location(Protocol):
    """TorchIO's ``PatchLocation``: a patch's first corner and its size, in voxels."""

    @property
    def index(self) -> tuple[int, int, int]: ...

    @property
    def size(self) -> tuple[int, int, int]: ...


class PatchAggregator:
    r"""Put volumes together from predictions of patches at ``PatchLocation`` s.

    Args:
        spatial_shape: extent of the volume that the locations are in.
        overlap_mode: as for :class:`GridAggregator`.
        patch_overlap: voxels by which patches overlap, of which "crop" cuts half off.
        output_shape: extent of a prediction of the volume, where it is another.
        output: "dense" (C, \*volume), or "labels": the index of the greatest channel, (1, \*volume)
            uint8 (uint16 from 257 channels on), in a memory of a few slices of C channels. Labels
            need ``locations``, and patches in their order.
        locations: all there will be, a ``GridSampler``'s ``locations``: a result that lacks some is
            an error.

    Raises:
        ValueError: an unknown mode or output, or labels without ``locations``.

    Example:
        >>> import torch
        >>> import torchio  # doctest: +SKIP
        >>> sampler = torchio.GridSampler(subject, 64, 16)  # doctest: +SKIP
        >>> aggregator = PatchAggregator(subject.spatial_shape, "bspline")  # doctest: +SKIP
        >>> aggregator.add_batch(model(batch), locations)  # doctest: +SKIP
        >>> aggregator.get_output()  # doctest: +SKIP
    """

    def __init__(
        self,
        spatial_shape: Sequence[int],
        overlap_mode: str = "crop",
        patch_overlap: int | Sequence[int] = 0,
        output_shape: Sequence[int] | None = None,
        *,
        output: str = "dense",
        locations: Sequence[Location] | None = None,
    ) -> None:
        _check_options(overlap_mode, output)
        if output == "labels" and locations is None:
            raise ValueError("output: 'labels' needs locations=, all that there will be")
        self.input_spatial_shape = tuple(int(n) for n in spatial_shape)
        self.spatial_shape = tuple(int(n) for n in output_shape or spatial_shape)
        self.overlap_mode, self.output = overlap_mode, output
        overlap = (patch_overlap,) * 3 if isinstance(patch_overlap, int) else tuple(patch_overlap)
        self.patch_overlap = overlap
        pairs = zip(self.spatial_shape, self.input_spatial_shape, strict=True)
        self._scale = tuple(a / b for a, b in pairs)
        self._locations = locations
        self._parts: dict[str | None, _Crops | _Sums | _Labels] = {}
        self._added: dict[str | None, set[tuple[int, ...]]] = {}

    def add_batch(
        self, batch: Tensor | Mapping[str, Tensor], locations: Sequence[Location]
    ) -> None:
        """Add predictions (B, C, \\*patch), or several of them by name, at B locations.

        Raises:
            RuntimeError: the patches' shape is not that of their locations.
            ValueError: a location reaches out of the volume, or the channels are not as before.
        """
        named = {None: batch} if isinstance(batch, Tensor) else batch
        places = self._scaled(locations)
        for first, size in places:
            ends = zip(first, size, self.spatial_shape, strict=True)
            if not all(a >= 0 and a + n <= extent for a, n, extent in ends):
                raise ValueError(
                    f"locations: {tuple(first)} of size {tuple(size)} reaches out of the volume of "
                    f"{self.spatial_shape}"
                )
        for key, tensor in named.items():
            name = "batch" if key is None else f"batch[{key!r}]"
            patches = _checks.require_tensor(name, tensor).detach().cpu()
            _check_shapes(name, patches, [size for _, size in places])
            if key not in self._parts:
                self._parts[key] = self._part(patches)
            part = self._parts[key]
            if patches.shape[1] != part.channels:
                raise ValueError(
                    f"{name}: got {patches.shape[1]} channels, expected {part.channels} as before"
                )
            part.add(patches, torch.tensor([first for first, _ in places]))
            self._added.setdefault(key, set()).update(tuple(first) for first, _ in places)

    def get_output(self, key: str | None = None) -> Tensor:
        """Return a volume (C, \\*volume), the one of ``key`` where predictions came by name.

        Raises:
            KeyError: nothing was added under ``key``.
            RuntimeError: some of ``locations`` are missing.
        """
        if key not in self._parts:
            available = [name for name in self._parts if name is not None]
            raise KeyError(f"No output for key {key!r}. Available: {available}")
        if self._locations is not None:
            expected = {tuple(first) for first, _ in self._scaled(self._locations)}
            if missing := expected - self._added[key]:
                raise RuntimeError(
                    f"{len(missing)} of {len(expected)} patches are missing, the first at "
                    f"{min(missing)}"
                )
        return self._parts[key].result()

    def _scaled(self, locations: Sequence[Location]) -> list[tuple[list[int], list[int]]]:
        def scaled(values: Sequence[int]) -> list[int]:
            return [round(x * factor) for x, factor in zip(values, self._scale, strict=True)]

        return [(scaled(location.index), scaled(location.size)) for location in locations]

    def _part(self, patches: Tensor) -> _Crops | _Sums | _Labels:
        if self.overlap_mode == "crop":
            scaled = zip(self.patch_overlap, self._scale, strict=True)
            half = [round(overlap * factor) // 2 for overlap, factor in scaled]
            return _Crops(patches, self.spatial_shape, half)
        window = _window(self.overlap_mode)
        if self._locations is None or self.output == "dense":
            return _Sums(patches, self.spatial_shape, window)
        places = self._scaled(self._locations)
        return _Labels(patches, self.spatial_shape, window, [first for first, _ in places])


class _Crops:
    """The middles of patches, later ones over earlier ones."""

    def __init__(self, patches: Tensor, extent: Sequence[int], half: Sequence[int]) -> None:
        self.channels = patches.shape[1]
        self._volume = patches.new_zeros((self.channels, *extent))
        self._extent, self._half = extent, half

    def add(self, patches: Tensor, origins: Tensor) -> None:
        for patch, origin in zip(patches, origins.tolist(), strict=True):
            box, target = [slice(None)], [slice(None)]
            axes = zip(origin, patch.shape[1:], self._extent, self._half, strict=True)
            for first, size, extent, half in axes:
                low = half if first > 0 else 0
                high = size - (half if first + size < extent else 0)
                box.append(slice(low, high))
                target.append(slice(first + low, first + high))
            self._volume[tuple(target)] = patch[tuple(box)]

    def result(self) -> Tensor:
        return self._volume


class _Sums:
    """Weighted sums of patches at places that nobody names beforehand."""

    def __init__(self, patches: Tensor, extent: Sequence[int], window: str) -> None:
        self.channels, self._window = patches.shape[1], window
        self._dtype = _floating(patches).dtype
        exact = accumulation_dtype(self._dtype)
        self._sums = torch.zeros((self.channels, *extent), dtype=exact)
        self._total = torch.zeros(tuple(extent), dtype=torch.float64)

    def add(self, patches: Tensor, origins: Tensor) -> None:
        vectors = resolve_window(self._window, patches.shape[2:])
        weights = [torch.as_tensor(vector, dtype=torch.float64)[None] for vector in vectors]
        rows = torch.zeros_like(origins)
        overlap_add_(self._sums, _floating(patches).to(self._sums), origins, rows, weights)
        overlap_weights_(self._total, origins, rows, weights)

    def result(self) -> Tensor:
        """The means; 0 where no patch lies."""
        total = torch.where(self._total == 0, 1.0, self._total)
        return (self._sums / total.to(self._sums)).to(self._dtype)


class _Labels:
    """The greatest channel of slices that are final."""

    def __init__(
        self, patches: Tensor, extent: Sequence[int], window: str, origins: list[list[int]]
    ) -> None:
        self.channels = patches.shape[1]
        self._fuser = PatchFuser(
            extent,
            tuple(patches.shape[2:]),
            self.channels,
            origins=np.unique(origins, axis=0),
            window=window,
            output="labels",
            stream_axis=0,
        )

    def add(self, patches: Tensor, origins: Tensor) -> None:
        self._fuser.add(_floating(patches), origins)

    def result(self) -> Tensor:
        result: Tensor = self._fuser.result()
        return result[None]
