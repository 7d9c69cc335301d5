"""Where results go that do not fit into memory: Zarr, OME-Zarr images and labels, in shards."""

from __future__ import annotations

import errno
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse._files import unfinished
from voxfuse.metrics._arrays import as_probabilities
from voxfuse.scale._optional import zarr
from voxfuse.scale.chunk_cache import Slices, blocks, within
from voxfuse.scale.layout import KINDS, Layout, synced
from voxfuse.scale.ome_zarr import Space
from voxfuse.scale.sources import Source, plain_slices
from voxfuse.scale.stores import DamagedError, decoded, insisting, local_path, writing

#: Spatial extents of chunks and shards where no others are given, by the number of axes.
CHUNKS = {1: 1 << 16, 2: 512, 3: 64}
SHARDS = {1: 1 << 20, 2: 4096, 3: 256}

LOST = "shards that were written before are whole: go on from there, nothing of them is lost"


class ZarrDestination:
    r"""An array of Zarr that is written shard by shard, each whole and by one writer.

    Made by :func:`create_destination` and :func:`open_destination`. ``destination[key] = values``
    takes a slice for every axis that begins and ends where shards do, or at the end of the array.
    On a file system a shard is written beside its place, onto the disk, and then renamed; other
    stores have it whole or not at all. Every chunk and every shard's index has a crc32c.
    """

    def __init__(self, store: Any, path: str, where: str) -> None:
        package = zarr(f"Writing {where}")
        from voxfuse.scale._synced_store import ForWriting

        self.where = where
        self._store, self._path = store, path
        #: zarr's array, to read from.
        self.array = package.open_array(store, path=path, mode="r", zarr_format=3)
        # See fusion.arrays.behind.
        self.behind = self.array
        self._writer: Any = None
        if not store.read_only:
            # Chunks of nothing but the fill value are written too: a shard that is not there has
            # not been written.
            writer = package.open_array(ForWriting(store), path=path, mode="r+", zarr_format=3)
            self._writer = writer.with_config({"write_empty_chunks": True})
        self.shape: tuple[int, ...] = tuple(self.array.shape)
        self.ndim = len(self.shape)
        #: Extents of what has to be written whole.
        self.unit: tuple[int, ...] = tuple(self.array.shards or self.array.chunks)
        self._probabilities = bool(self.array.attrs.get("voxfuse", {}).get("probabilities"))
        stored = np.dtype(self.array.dtype)
        #: Of the values that are given; probabilities may be stored in another.
        self.dtype = np.dtype(np.float32) if self._probabilities else stored

    def __setitem__(self, key: Any, values: Any) -> None:
        place = plain_slices("key", key, self.shape)
        for slices, unit, extent in zip(place, self.unit, self.shape, strict=True):
            if slices.start % unit or (slices.stop % unit and slices.stop != extent):
                raise ValueError(
                    f"key: got {slices}, expected whole shards of {self.unit} voxels: from and to "
                    f"multiples of {unit}, or {extent}"
                )
        array = np.asarray(values)
        shape = tuple(each.stop - each.start for each in place)
        if array.shape != shape:
            raise ValueError(f"values: got shape {array.shape}, expected {shape}")
        if array.dtype != self.dtype:
            raise TypeError(f"values: got dtype {array.dtype}, expected {self.dtype}")
        if self._writer is None:
            raise PermissionError(errno.EROFS, f"{self.where}: is opened read-only")
        for shard in self.shards(place):
            self._write(shard, array[within(shard, place)])

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """What has been written, and the fill value elsewhere; checksums are compared.

        Raises:
            DamagedError: a shard is not whole.
        """
        place = plain_slices("key", key, self.shape)
        what = f"{self.where}: {_named(place)}"
        for shard in self.shards(place):
            if self._size(shard) == 0:  # which zarr takes for one that was never written
                raise DamagedError(f"{what}: what is stored is not whole: a shard has no bytes")
        stored = insisting(lambda: decoded(lambda: np.asarray(self.array[place]), what), what)
        if self._probabilities:
            return stored.astype(np.float32) / np.float32(255)
        return stored

    def shards(self, place: Slices | None = None) -> Iterator[Slices]:
        """The shards of a place, or of the whole array, in C order."""
        place = tuple(slice(0, n) for n in self.shape) if place is None else place
        return blocks(place, self.unit, self.shape)

    def written(self, place: Slices) -> bool:
        """Whether every shard of a place is there; those of nothing but the fill value are too."""
        return all(map(self._size, self.shards(place)))

    def check(self, key: Any = None) -> None:
        """Read every shard of a place (None: all), and compare the checksums.

        Raises:
            DamagedError: one is not there, or not whole.
        """
        place = None if key is None else plain_slices("key", key, self.shape)
        for shard in self.shards(place):
            self.check_written(shard)
            self[shard]

    def check_written(self, place: Slices) -> None:
        """Raise DamagedError if a shard of a place is not there."""
        for shard in self.shards(place):
            if not self.written(shard):
                raise DamagedError(f"{self.where}: {_named(shard)}: the shard is not there")

    def flush(self) -> None:
        """Nothing: what was written is on the disk, or in the store, when the writing returns."""

    def sweep(self) -> None:
        """Remove what writers that were killed have left; call it when no other one is at work."""
        root = getattr(self._store, "root", None)
        if root is not None:
            for folder in [root / self._path, *(root / self._path).rglob("*/")]:
                for left in unfinished(folder):
                    left.unlink(missing_ok=True)

    def __repr__(self) -> str:
        return f"ZarrDestination({self.where!r}, shape={self.shape}, dtype={self.dtype})"

    def __reduce__(self) -> Any:
        return ZarrDestination, (self._store, self._path, self.where)

    def _write(self, shard: Slices, values: NDArray[Any]) -> None:
        if self._probabilities:
            values = _in_255ths(values, f"{self.where}: {_named(shard)}")

        def write() -> None:
            self._writer[shard] = values

        insisting(write, f"{self.where}: writing {_named(shard)} ({values.nbytes} bytes)", LOST)

    def _size(self, shard: Slices) -> int | None:
        """Bytes of a shard, None if there is none."""
        index = tuple(each.start // unit for each, unit in zip(shard, self.unit, strict=True))
        key = f"{self._path}/{self.array.metadata.encode_chunk_key(index)}".lstrip("/")
        try:
            size = insisting(lambda: synced(self._store.getsize(key)), f"{self.where}: {key}")
        except FileNotFoundError:
            return None
        return int(size)


def create_destination(
    where: Any,
    shape: Sequence[int],
    dtype: Any,
    *,
    kind: str = "array",
    name: str = "prediction",
    like: Source | Space | None = None,
    chunks: int | Sequence[int] | None = None,
    shards: int | Sequence[int] | None = None,
    fill: float = 0,
    probabilities: bool = False,
    colors: Mapping[int, Sequence[int]] | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> ZarrDestination:
    r"""Create an array of Zarr 3 that a result goes to, shard by shard.

    Results may go to anything else with ``shape``, ``dtype`` and slice assignment, such as a memmap
    or a dataset of h5py, without this function.

    Args:
        where: a folder, a URL of fsspec or a store of zarr. For labels that of the image, or of a
            group that is made for them.
        shape: (\*spatial) or (C, \*spatial).
        dtype: any type of numbers that Zarr has.
        kind: "array", a plain array; "image", a group that is an OME-Zarr 0.5 image; or "labels",
            one of its label images, under ``labels/NAME``. Coarser levels are made afterwards, by
            :func:`build_pyramid`.
        name: of the label image, or of the image.
        like: where the voxels lie: a source, or a :class:`Space`. Default for labels: as the image
            they are made for; else voxels of size 1.
        chunks: spatial extents of the chunks, which are compressed one by one and are what a viewer
            reads; default 64.
        shards: spatial extents of the shards, files of many chunks, multiples of theirs; default
            256. What is in memory when one is written grows with them, and the number of files
            shrinks. Channels have shards of their own.
        fill: value of shards that are not written, as it is stored.
        probabilities: values in [0, 1] are given as float32 and stored as uint8, the nearest
            multiple of 1/255; ``dtype`` is then uint8.
        colors: (red, green, blue, alpha), each 0 to 255, by label.
        overwrite: replace what is there, a label image's colours among it.
        storage_options: of fsspec, with a URL.

    Raises:
        FileExistsError: there is something already.
        ValueError, TypeError: an argument does not fit.
        OSError: the place cannot be written to.
        ImportError: zarr is not installed.

    Example:
        >>> import numpy as np, voxfuse.scale, zarr
        >>> store = zarr.storage.MemoryStore()
        >>> labels = voxfuse.scale.create_destination(store, (40, 30, 20), np.uint8, chunks=16)
        >>> labels.unit
        (48, 32, 32)
        >>> labels[0:40, 0:30, 0:20] = np.ones((40, 30, 20), np.uint8)
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
    if not isinstance(name, str) or not name or set(name) & set("/\\") or name[0] in "._":
        raise ValueError(
            f"name: got {name!r}, expected a name without / that begins with no . or _"
        )
    extents, stored = tuple(int(extent) for extent in shape), np.dtype(dtype)
    if not 1 <= len(extents) <= 4 or min(extents) < 1:
        raise ValueError(
            f"shape: got {extents}, expected (*spatial) or (C, *spatial), none of them 0"
        )
    if stored.kind not in ("ui" if kind == "labels" else "buif"):
        expected = "integers for labels" if kind == "labels" else "booleans or real numbers"
        raise TypeError(f"dtype: got {stored}, expected {expected}")
    if probabilities and stored != np.uint8:
        raise TypeError(f"dtype: got {stored} for probabilities, expected uint8")
    with np.errstate(invalid="ignore"):
        if stored.kind != "f" and np.asarray(fill).astype(stored) != fill:
            raise ValueError(f"fill: got {fill!r}, expected a value that {stored} has")
    if colors is not None and kind != "labels":
        raise ValueError(f"colors: got some for kind {kind!r}, expected kind 'labels'")
    for label, color in (colors or {}).items():
        if len(color) != 4 or not all(0 <= part <= 255 for part in color):
            raise ValueError(
                f"colors: got {tuple(color)} for label {label}, expected four numbers, 0 to 255"
            )
    layout = Layout(writing(where, storage_options), str(local_path(where) or where), kind, name)
    if layout.store.read_only:
        raise PermissionError(errno.EROFS, f"{layout.where}: is a store that is read-only")
    layout.check_parent()
    space = _space(like, layout, extents)
    channels = len(extents) - len(space.axes)
    chunk, shard = blocks_of(chunks, shards, extents[channels:])

    begun = False

    def create() -> None:
        nonlocal begun
        if overwrite or begun:  # what an attempt that failed has left
            layout.clear()
        begun = True
        layout.create_groups()
        layout.create_array(
            "0",
            extents,
            stored,
            chunks=(1,) * channels + chunk,
            shards=(1,) * channels + shard,
            fill=fill,
            axes=("c",) * channels + space.axes,
            attributes={"voxfuse": {"probabilities": True}} if probabilities else {},
        )
        layout.describe(bool(channels), [("0", space)], colors=colors or {})

    def free() -> None:
        if not overwrite:
            layout.check_free()

    insisting(free, layout.shown())
    insisting(create, f"{layout.shown()}: creating it")
    return ZarrDestination(layout.store, layout.path(), layout.shown())


def open_destination(
    where: Any,
    *,
    labels: str | None = None,
    level: str = "0",
    storage_options: Mapping[str, Any] | None = None,
) -> ZarrDestination:
    """Open what :func:`create_destination` made, in another process or to go on with it.

    Args:
        where, storage_options: as there.
        labels: the name of a label image; None opens an array, or the image.
        level: the path of the array in an image.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not of Zarr 3, or an image without its metadata, as of a process that was
            killed while it made it.
    """
    store = writing(where, storage_options)
    shown = str(local_path(where) or where)
    layout = Layout(store, shown, "image" if labels is None else "labels", labels or "")
    node = layout.node(layout.group)
    if node is not None and hasattr(node, "chunks"):
        layout = Layout(store, shown, "array", "")
    else:
        node = layout.node(layout.path(level))
    if node is None or not hasattr(node, "chunks"):
        raise FileNotFoundError(errno.ENOENT, "there is no Zarr array", layout.shown(level))
    if node.metadata.zarr_format != 3:
        raise ValueError(f"{layout.shown(level)}: is of Zarr format 2, expected 3")
    if layout.kind != "array" and layout.image(layout.group) is None:
        raise ValueError(
            f"{layout.shown(level)}: is of an image without OME-Zarr's metadata, which was not "
            "made to the end; create_destination(..., overwrite=True) makes it again"
        )
    return ZarrDestination(store, layout.path(level), layout.shown(level))


def _space(like: Source | Space | None, layout: Layout, shape: tuple[int, ...]) -> Space:
    """Where a result's voxels lie, its axes those of the shape."""
    found: Space | None = like if isinstance(like, Space) else None
    expected: tuple[int, ...] | None = None
    if isinstance(like, Source):
        found, expected = like.space, like.shape[1:]
        if like.elsewhere is not None and layout.kind != "array":
            warnings.warn(
                f"like: {like.name}: {like.elsewhere}; the result has its voxels' sizes, from 0 on",
                stacklevel=3,
            )
    elif like is not None and found is None:
        raise TypeError(f"like: got {type(like).__name__}, expected a Source or a Space")
    elif like is None and layout.kind == "labels":
        image = layout.image("")
        if image is not None:
            array = layout.node(image.levels[0].path)
            at = [k for k, axis in enumerate(image.axes) if axis.kind == "space"]
            found, expected = image.space(image.levels[0]), tuple(array.shape[k] for k in at)
    if found is None:
        count = len(expected or shape[-3:])
        letters = tuple("zyx"[3 - count :])
        found = Space(letters, (1.0,) * count, (0.0,) * count, (None,) * count)
    count = len(found.axes)
    if len(shape) - count not in (0, 1) or (expected and shape[len(shape) - count :] != expected):
        volume = ", ".join(map(str, expected or found.axes))
        raise ValueError(
            f"shape: got {shape}, expected ({volume}), as the volume that the result is of, or "
            "this after an axis of channels"
        )
    if layout.kind != "array" and count < 2:
        raise ValueError(f"shape: got {shape}, expected two spatial axes or more for OME-Zarr")
    return found


def blocks_of(
    chunks: int | Sequence[int] | None, shards: int | Sequence[int] | None, shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Spatial extents of chunks and shards, none larger than the volume makes necessary."""
    chunk = _extents("chunks", CHUNKS[len(shape)] if chunks is None else chunks, shape)
    chunk = [min(c, n) for c, n in zip(chunk, shape, strict=True)]
    shard = _extents("shards", SHARDS[len(shape)] if shards is None else shards, shape)
    if shards is None:
        shard = [max(s // c, 1) * c for s, c in zip(shard, chunk, strict=True)]
    whole = [math.ceil(n / c) * c for n, c in zip(shape, chunk, strict=True)]
    shard = [min(s, n) for s, n in zip(shard, whole, strict=True)]
    if any(s % c for s, c in zip(shard, chunk, strict=True)):
        raise ValueError(f"shards: got {shards}, expected multiples of the chunks, {tuple(chunk)}")
    return tuple(chunk), tuple(shard)


def _extents(argument: str, given: int | Sequence[int], shape: Sequence[int]) -> list[int]:
    values = list(given) if isinstance(given, Sequence) else [given] * len(shape)
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    if len(values) != len(shape) or not whole or min(values) < 1:
        raise ValueError(
            f"{argument}: got {given!r}, expected a positive integer, or one a spatial axis, "
            f"{len(shape)}"
        )
    return values


def _in_255ths(values: NDArray[Any], what: str) -> NDArray[np.uint8]:
    """Probabilities as uint8."""
    scaled = as_probabilities(values, what) * np.float32(255)
    return np.rint(scaled, out=scaled).astype(np.uint8)


def _named(place: Slices) -> str:
    return "voxels [" + ", ".join(f"{each.start}:{each.stop}" for each in place) + "]"
