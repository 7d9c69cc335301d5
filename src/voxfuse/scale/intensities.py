"""What a network sees of a stored volume: floating numbers, normalised where asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse.fusion.arrays import Sliceable, torch_dtype

#: Voxels along each axis that statistics read at once.
_BLOCK = 256

#: Types of so few values that each is normalised once, for all voxels.
_SHORT = (np.dtype(np.uint8), np.dtype(np.uint16))

#: What intensities are brought to: as they are, mean 0 and standard deviation 1 of each channel, or
#: (means, standard deviations).
Normalisation = str | tuple[Sequence[float], Sequence[float]] | None


class Lifted:
    """A source with an axis of one sample, in floating numbers, normalised where asked for."""

    def __init__(self, source: Sliceable, axes: int, normalisation: Normalisation) -> None:
        shape = tuple(int(size) for size in source.shape)
        if len(shape) not in (axes, axes + 1):
            raise ValueError(
                f"source: got shape {shape}, expected {axes} spatial axes, with or without one of "
                "channels before them"
            )
        # What is read: see fusion.arrays.behind.
        self.behind, self._bare = source, len(shape) == axes
        self.shape = (1, 1, *shape) if self._bare else (1, *shape)
        given: np.dtype[Any] = np.dtype(source.dtype).newbyteorder("=")
        floating = given.kind == "f" and normalisation is None
        self.dtype = given if floating else np.dtype(np.float32)
        torch_dtype("source", given)
        self._normalisation = normalisation
        self._tables: dict[tuple[float, float, int], NDArray[Any]] = {}
        #: Means and standard deviations, once they are known.
        self.statistics: dict[str, list[float]] | None = None
        if isinstance(normalisation, str) and normalisation != "zscore":
            raise ValueError(
                f"normalisation: got {normalisation!r}, expected None, 'zscore' or (means, "
                "standard deviations)"
            )
        if normalisation is not None and not isinstance(normalisation, str):
            pair = isinstance(normalisation, Sequence) and len(normalisation) == 2
            parts = normalisation if pair else ((), ())
            mean, std = ([float(x) for x in np.atleast_1d(each)] for each in parts)
            finite = np.isfinite([*mean, *std]).all()
            if not len(mean) == len(std) == self.shape[1] or not finite or not min(std) > 0:
                raise ValueError(
                    f"normalisation: got {normalisation}, expected {self.shape[1]} means and as "
                    "many standard deviations > 0, all of them finite"
                )
            self.statistics = {"mean": mean, "std": std}

    @property
    def itemsize(self) -> int:
        return int(self.dtype.itemsize)

    def settle(self, known: dict[str, list[float]] | None) -> None:
        """Take the statistics that are known, or find them out."""
        if self._normalisation != "zscore":
            return
        if known is not None or self.statistics is None:
            self.statistics = known or _statistics(self)

    def stored(self, key: tuple[slice, ...]) -> NDArray[Any]:
        """Voxels as the source has them, with an axis of channels."""
        box = np.asarray(self.behind[key[2:] if self._bare else key[1:]])
        return box[None] if self._bare else box

    def _table(self, mean: float, std: float, dtype: np.dtype[Any]) -> NDArray[Any]:
        """What every value of a type of few becomes."""
        known = (mean, std, dtype.itemsize)
        if known not in self._tables:
            values = np.arange(1 << 8 * dtype.itemsize)
            self._tables[known] = ((values - mean) / std).astype(self.dtype)
        return self._tables[known]

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[Any]:
        box = self.stored(key)
        if self.statistics is None:
            return box.astype(self.dtype, copy=False)[None]
        result = np.empty((1, *box.shape), self.dtype)
        channels = range(*key[1].indices(self.shape[1]))
        for number, (channel, values) in enumerate(zip(channels, box, strict=True)):
            mean, std = (self.statistics[name][channel] for name in ("mean", "std"))
            if box.dtype in _SHORT:
                # Of so few values each is computed once.
                np.take(
                    self._table(mean, std, box.dtype), values, out=result[0, number], mode="clip"
                )
            else:
                result[0, number] = (values.astype(np.float64) - mean) / std
        return result


def _statistics(lifted: Lifted) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel, in float64, block by block in fixed order."""
    channels, *spatial = lifted.shape[1:]
    sums = np.zeros((2, channels))
    shift = np.zeros((channels, *(1,) * len(spatial)))
    for number, corner in enumerate(
        itertools.product(*(range(0, extent, _BLOCK) for extent in spatial))
    ):
        place = (
            slice(low, min(low + _BLOCK, extent))
            for low, extent in zip(corner, spatial, strict=True)
        )
        box = lifted.stored((slice(0, 1), slice(0, channels), *place)).astype(np.float64)
        if number == 0:
            # Squares of differences from something near the mean lose no digits.
            shift = box.mean(tuple(range(1, box.ndim)), keepdims=True)
        box -= shift
        sums += [box.reshape(channels, -1).sum(1), (box * box).reshape(channels, -1).sum(1)]
    mean, square = sums / math.prod(spatial)
    std = np.sqrt(np.maximum(square - mean * mean, 0))
    if not (np.isfinite(std).all() and (std > 0).all()):
        raise ValueError(
            f"normalisation: 'zscore' of standard deviations {std.tolist()}, expected finite "
            "numbers > 0"
        )
    return {"mean": (mean + shift.reshape(-1)).tolist(), "std": std.tolist()}
