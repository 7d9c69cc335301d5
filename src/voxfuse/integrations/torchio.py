"""TorchIO's grid aggregator on the streaming patch fusion; TorchIO itself is not imported.

    from voxfuse.integrations.torchio import GridAggregator  # instead of torchio.GridAggregator

Semantics are those of TorchIO 1.2. What differs: floating predictions are summed in float32
(float64) and the result has their dtype; "bspline" is a further overlap mode; ``output="labels"``
keeps no (C, V) volume.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voxfuse.fusion.fuser import PatchFuser
from voxfuse.ops import _checks

MODES = ("crop", "average", "hann", "bspline")


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
        if overlap_mode not in MODES:
            listed = ", ".join(repr(mode) for mode in MODES)
            raise ValueError(f"overlap_mode: got {overlap_mode!r}, expected one of {listed}")
        if output not in ("dense", "labels"):
            raise ValueError(f"output: got {output!r}, expected 'dense' or 'labels'")
        if output == "labels" and overlap_mode == "crop":
            raise ValueError("output: 'labels' of overlap_mode 'crop'; take the argmax of a patch")
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
        shapes = {tuple(shape) for shape in (places[:, 3:] - places[:, :3]).tolist()}
        if shapes != {tuple(batch.shape[2:])}:
            raise RuntimeError(
                f"batch_tensor: got patches of {tuple(batch.shape[2:])}, expected {shapes}, the "
                "shapes of the locations"
            )
        if len(batch) != len(places):
            raise ValueError(f"locations: got {len(places)} for {len(batch)} patches")
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
        if not batch.is_floating_point():
            # Integers are averaged to floats, as true division does.
            batch = batch.to(torch.get_default_dtype())
        self._dtype = batch.dtype
        if self.output == "dense" and batch.dtype != torch.float64:
            batch = batch.to(torch.float32)
        if self._fuser is None:
            patch = tuple(batch.shape[2:])
            window: Any = "constant" if self.overlap_mode == "average" else self.overlap_mode
            # TorchIO hands out patches along the first axis first. Dense results take any order:
            # their sums grow in the result itself.
            self._fuser = PatchFuser(
                self.spatial_shape,
                patch,
                batch.shape[1],
                origins=np.unique(self._locations[:, :3], axis=0),
                window=window,
                output="logits" if self.output == "dense" else "labels",
                stream_axis=0,
            )
        self._fuser.add(batch, places[:, :3])
