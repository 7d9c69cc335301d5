"""Small volumes and stores for the tests of scale, which are skipped where there is no zarr."""

from __future__ import annotations

import numpy as np
import pytest

zarr = pytest.importorskip("zarr", reason="zarr is not installed", minversion="3")

SHAPE = (21, 18, 13)


def values_of(shape=SHAPE, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def whole(source):
    return source[tuple(slice(0, n) for n in source.shape)]


def ome_image(store, array, version, axes="tczyx", scale=(1, 1, 2.0, 0.5, 0.5)):
    """An image of two levels, written by hand as the specification says."""
    group = zarr.create_group(store, zarr_format=2 if version == "0.4" else 3)
    kinds = {"t": "time", "c": "channel"}
    datasets = []
    for level, step in enumerate((1, 2)):
        stride = tuple(slice(None, None, 1 if axis in "tc" else step) for axis in axes)
        data = array[stride]
        chunks = tuple(1 if a in "tc" else 8 for a in axes)
        names = {} if version == "0.4" else {"dimension_names": list(axes)}
        group.create_array(str(level), data=data, chunks=chunks, **names)
        factors = [s * (1 if a in "tc" else step) for s, a in zip(scale, axes, strict=True)]
        moved = [0.25 if a == "z" else 0.0 for a in axes]
        steps = [{"type": "scale", "scale": factors}, {"type": "translation", "translation": moved}]
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    described = {
        "name": "image",
        "axes": [{"name": a, "type": kinds.get(a, "space")} for a in axes],
        "datasets": datasets,
        # Of all levels, after theirs.
        "coordinateTransformations": [
            {"type": "scale", "scale": [3.0 if a == "z" else 1.0 for a in axes]}
        ],
    }
    for axis in described["axes"]:
        if axis["type"] == "space":
            axis["unit"] = "micrometer"
    if version == "0.4":
        group.attrs["multiscales"] = [described | {"version": "0.4"}]
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [described]}
    return group


class Failing(zarr.storage.WrapperStore):
    """A store whose next reads or writes of data fail."""

    def __init__(self, store, error=None, times=0):
        super().__init__(store)
        self.error, self.times = error, times

    def _with_store(self, store):
        made = type(self)(store, self.error, self.times)
        made.__dict__.update({k: v for k, v in self.__dict__.items() if k != "_store"})
        return made

    def fail(self, key):
        if self.times and not key.endswith("zarr.json"):
            self.times -= 1
            raise self.error

    async def get(self, key, *args, **kwargs):
        self.fail(key)
        return await super().get(key, *args, **kwargs)

    async def set(self, key, *args, **kwargs):
        self.fail(key)
        await super().set(key, *args, **kwargs)
