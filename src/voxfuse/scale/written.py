"""What was written of a box: a few voxels that its marker keeps, and that the result must have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from voxfuse.fusion.arrays import Assignable, Part
from voxfuse.scale.manifest import digest_of
from voxfuse.scale.stores import DamagedError

#: Voxels along the last axis that are compared.
_ROW = 64


class Remembered(Part):
    """A box of a result that remembers its first voxel that is not 0: an emptied one lacks it."""

    def __init__(self, out: Assignable, low: Sequence[int], shape: Sequence[int]) -> None:
        super().__init__(out, low, shape)
        self._voxel: tuple[int, ...] | None = None

    def __setitem__(self, key: tuple[slice, ...], value: Any) -> None:
        super().__setitem__(key, value)
        found = value != 0 if self._voxel is None else None
        if found is not None and found.any():
            inside = np.unravel_index(int(found.argmax()), value.shape)
            self._voxel = tuple(
                int(low + part.start + k)
                for low, part, k in zip(self._low, key, inside, strict=True)
            )

    def sample(self) -> dict[str, Any] | None:
        """Where a few voxels lie and the digest of what is there now; None: it cannot be read."""
        if not hasattr(self.behind, "__getitem__"):
            return None
        voxel = self._low if self._voxel is None else self._voxel
        stop = self._low[-1] + self.shape[-1]
        return {"voxel": list(voxel), "sha256": _row(self.behind, voxel, stop)}


def is_there(out: Any, place: tuple[slice, ...], sample: dict[str, Any] | None) -> bool:
    """Whether a result still has what was written to a place: every shard, and the sample."""
    try:
        written = getattr(out, "written", None)
        if callable(written) and not written(place):
            return False
        if sample is None or not hasattr(out, "__getitem__"):
            return True
        return bool(_row(out, sample["voxel"], place[-1].stop) == sample["sha256"])
    except DamagedError:
        return False


def _row(out: Any, voxel: Sequence[int], stop: int) -> str:
    first, last = voxel[:-1], voxel[-1]
    key = (*(slice(k, k + 1) for k in first), slice(last, min(last + _ROW, stop)))
    return digest_of(np.asarray(out[key]))
