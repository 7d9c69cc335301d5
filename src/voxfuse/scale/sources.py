"""Volumes to read patch by patch: Zarr, OME-Zarr, NIfTI, files and arrays of any kind."""

from __future__ import annotations

import gzip
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from voxfuse.metrics.files import affine_in_mm
from voxfuse.scale._optional import require
from voxfuse.scale.chunk_cache import ChunkCache, Slices, box_bytes, edges_of
from voxfuse.scale.manifest import fingerprint_of
from voxfuse.scale.ome_zarr import KINDS_BY_NAME, Axis, Multiscale, Space, multiscale_of
from voxfuse.scale.stores import DamagedError, decoded, insisting, local_path, reading

#: Bytes of chunks that a source keeps at most, where no other number is given.
CACHE_BYTES = 1 << 30

#: Axes of arrays that do not name theirs, by their number.
UNNAMED = {1: "x", 2: "yx", 3: "zyx", 4: "czyx", 5: "tczyx"}
UNNAMED_NIFTI = {1: "x", 2: "xy", 3: "xyz", 4: "xyzt", 5: "xyztc"}


class Source:
    r"""A volume (channels, \*spatial) that is sliced as an array is, and read as far as it is.

    Made by :func:`open_source`. ``source[key]`` takes a slice without a step for every axis and
    returns a NumPy array of this machine's byte order. Chunks that are compressed are kept for the
    next patches: see :meth:`start` and :meth:`cache_for`. A source that was opened from a path is
    opened again where it is unpickled.
    """

    #: Where the voxels lie, if the file says so.
    space: Space | None
    #: Why the voxels lie elsewhere than ``space`` says; None where they do not.
    elsewhere: str | None = None
    #: Of an array of Zarr 3 that names its axes: the spatial ones' ("" of one without).
    axes: tuple[str, ...] | None = None
    #: Of a NIfTI file, in mm.
    affine: NDArray[np.float64] | None = None

    def __init__(
        self,
        array: Any,
        *,
        name: str,
        order: str,
        channel: int | None = None,
        timepoint: int | None = None,
        space: Space | None = None,
        chunks: Sequence[int | Sequence[int]] | None = None,
        cache_bytes: int = CACHE_BYTES,
        value: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
        dtype: np.dtype[Any] | None = None,
    ) -> None:
        self.name, self.space = name, space
        stored = np.dtype(array.dtype)
        if stored.kind not in "buif":
            raise TypeError(f"{name}: has dtype {stored}, expected booleans or real numbers")
        # What is read: see fusion.arrays.behind.
        self.behind = array
        self._order, self._value = order, value
        #: The values' type.
        self.dtype = np.dtype(dtype or stored).newbyteorder("=")
        extents = dict(zip(order, array.shape, strict=True))
        if 0 in array.shape:
            raise ValueError(
                f"{name}: has shape {tuple(array.shape)}, expected no axis to be empty"
            )
        self._fixed = {"t": _chosen("timepoint", timepoint, extents.get("t"), name)}
        self._channels = _channels(channel, extents.get("c"), name)
        spatial = [extents[axis] for axis in order if axis not in "tc"]
        #: (channels, \*spatial).
        self.shape: tuple[int, ...] = (len(self._channels), *spatial)
        self.ndim = len(self.shape)
        self._cache: ChunkCache | None = None
        if chunks is not None:
            edges = edges_of(array.shape, chunks)
            largest = box_bytes(edges, [1] * len(edges), stored.itemsize)
            if largest > cache_bytes:
                raise ValueError(
                    f"cache_bytes: got {cache_bytes}, but a chunk of {name} has {largest} bytes; "
                    "give at least a few chunks, or store the volume in smaller ones"
                )
            self._cache = ChunkCache(self._stored, stored.newbyteorder("="), edges, cache_bytes)
        self._edges = None if chunks is None else edges
        self._reopen: tuple[Any, dict[str, Any]] | None = None

    @property
    def cache_bytes(self) -> int:
        """The most bytes of chunks that are kept; 0 where nothing is compressed."""
        return 0 if self._cache is None else self._cache.limit

    @property
    def most_cached_bytes(self) -> int:
        """The most bytes of chunks that have been kept."""
        return 0 if self._cache is None else self._cache.most_bytes

    @property
    def decompressed(self) -> int:
        """Chunks that were read, each as often as it was."""
        return 0 if self._cache is None else self._cache.decompressed

    def cache_for(self, extent: Sequence[int], patch: Sequence[int], axis: int) -> int:
        """Bytes of chunks that have to be kept so that each is decompressed once.

        Args:
            extent: spatial extent of the box that is read, with its patches' reach.
            patch: spatial extent of a patch.
            axis: the spatial axis along which patches follow each other; see :meth:`start`.
        """
        if self._edges is None:
            return 0
        box = list(extent)
        box[axis] = min(patch[axis], box[axis])
        sizes = dict(zip((a for a in self._order if a not in "tc"), box, strict=True))
        sizes |= {"t": 1, "c": len(self._channels)}
        itemsize: int = np.dtype(self.behind.dtype).itemsize
        return box_bytes(self._edges, [sizes[a] for a in self._order], itemsize)

    def start(self, axis: int | None) -> None:
        """Begin a box: forget all chunks.

        Args:
            axis: the spatial axis along which patches follow each other from now on. A chunk that
                ends before a read begins is forgotten at once, so that memory does not grow with
                the depth of the volume. None: chunks go when there is no room for others.
        """
        if self._cache is not None:
            spatial = [k for k, letter in enumerate(self._order) if letter not in "tc"]
            self._cache.start(None if axis is None else spatial[axis])

    def fingerprint(self) -> str:
        """A digest of shape, dtype, the chosen channels and timepoint, and samples of the values.

        It does not depend on where the volume lies, and it is no proof: it tells volumes apart.
        """
        return fingerprint_of(self, list(self._channels), self._fixed["t"])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> NDArray[Any]:
        slices = plain_slices("key", key, self.shape)
        channels = self._channels[slices[0]]
        inside = dict(zip((a for a in self._order if a not in "tc"), slices[1:], strict=True))
        inside["c"] = slice(channels.start, channels.stop)
        inside["t"] = slice(self._fixed["t"], self._fixed["t"] + 1)
        place = tuple(inside[axis] for axis in self._order)
        values = self._stored(place) if self._cache is None else self._cache.read(place)
        order = self._order
        if "t" in order:
            values, order = values.take(0, axis=order.index("t")), order.replace("t", "")
        values = np.moveaxis(values, order.index("c"), 0) if "c" in order else values[None]
        if self._value is not None:
            values = self._value(values)
        return values.astype(self.dtype, copy=False)

    def __repr__(self) -> str:
        return f"Source({self.name!r}, shape={self.shape}, dtype={self.dtype})"

    def __reduce__(self) -> Any:
        if self._reopen is None:
            return super().__reduce__()
        return _opened_again, self._reopen

    def _stored(self, place: Slices) -> NDArray[Any]:
        """Read voxels of the array as it is stored."""
        where = ", ".join(f"{s.start}:{s.stop}" for s in place)
        what = f"{self.name}: voxels [{where}] ({self._order})"
        values = insisting(lambda: decoded(lambda: _values(self.behind[place]), what), what)
        return values.astype(values.dtype.newbyteorder("="), copy=False)


def open_source(
    source: Any,
    *,
    level: int | str | None = None,
    channel: int | None = None,
    timepoint: int | None = None,
    axes: str | None = None,
    cache_bytes: int = CACHE_BYTES,
    storage_options: Mapping[str, Any] | None = None,
    scratch: str | Path | None = None,
) -> Source:
    r"""Open a volume to be read patch by patch, and never whole.

    Args:
        source: a path or URL (``s3://``, ``https://``, ``memory://`` and what else fsspec knows) of

            - a Zarr array, format 2 or 3, or a group that is an image of OME-Zarr 0.4 or 0.5; a zip
              file (.zip) of either
            - a .npy file
            - a NIfTI file. .nii is read where it lies; .nii.gz cannot be read at random and is
              decompressed once, into a file in ``scratch``, with a warning that says so

            or an object: an array or group of zarr, a memmap or any other NumPy array, a tensor, a
            Dask array, or anything with ``shape``, ``dtype`` and slicing (and ``chunks``, if it is
            compressed), such as a dataset of h5py.
        level: of an OME-Zarr image: a number, 0 the finest (the default), or an array's path.
        channel: one channel; None takes all.
        timepoint: needed where there are several.
        axes: names of the array's axes, a letter each, "c" the channels and "t" time. Default: what
            OME-Zarr says, or an array's names in Zarr 3 (c or channel, t or time); "xyz", "xyzt"
            and "xyztc" of NIfTI, whose fourth axis is time ("xyzc" where it has channels); else
            the last ones of "tczyx".
        cache_bytes: the most bytes of decompressed chunks that are kept.
        storage_options: of fsspec, with a URL.
        scratch: the folder for what .nii.gz decompresses to; default the system's.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: no such level, channel, timepoint or axes; a kind of file that is not known.
        TypeError: ``source`` is none of these, or not of numbers.
        ImportError: a package that is needed is not installed.

    Example:
        >>> import numpy as np, voxfuse.scale
        >>> source = voxfuse.scale.open_source(np.zeros((40, 30, 20), np.uint8))
        >>> source.shape, source[0:1, 8:16, 0:30, 5:6].shape
        ((1, 40, 30, 20), (1, 8, 30, 1))
    """
    if isinstance(source, Source):
        chosen = {"level": level, "channel": channel, "timepoint": timepoint, "axes": axes}
        for argument, value in chosen.items():
            if value is not None:
                raise ValueError(
                    f"{argument}: got {value!r} for a Source, which is opened already, expected "
                    "None; choose where it is opened"
                )
        return source
    given: dict[str, Any] = {"channel": channel, "timepoint": timepoint, "cache_bytes": cache_bytes}
    path = local_path(source)
    name = str(source) if path is not None or isinstance(source, str) else type(source).__name__
    if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int) or cache_bytes < 1:
        raise ValueError(f"cache_bytes: got {cache_bytes!r}, expected a positive integer")
    opened: Source
    if path is not None and path.suffix == ".npy":
        _no_level(level, name)
        if not path.is_file():
            raise FileNotFoundError(2, "there is no such file", str(path))
        array = np.load(path, mmap_mode="r")
        opened = Source(array, name=name, order=_order(axes, array, UNNAMED, name), **given)
    elif path is not None and path.name.lower().endswith((".nii", ".nii.gz")):
        _no_level(level, name)
        opened = _nifti(path, axes, scratch, given)
    elif path is not None or isinstance(source, str):
        if path is not None and path.is_file() and path.suffix != ".zip":
            raise ValueError(
                f"{path}: got a file, expected a folder of Zarr, or .zip, .npy, .nii or .nii.gz; "
                "open others yourself (numpy.memmap, h5py) and give what can be sliced"
            )
        opened = _zarr(reading(source, storage_options), name, level, axes, given)
    else:
        return _object(source, name, level, axes, given)
    arguments = {"level": level, "axes": axes, "storage_options": storage_options}
    opened._reopen = source, given | arguments | {"scratch": scratch}
    return opened


def _opened_again(source: Any, arguments: dict[str, Any]) -> Source:
    return open_source(source, **arguments)


def _object(source: Any, name: str, level: Any, axes: str | None, given: dict[str, Any]) -> Source:
    """A source of something that can be sliced, or of a group of zarr."""
    if hasattr(source, "metadata") and hasattr(source, "store_path"):
        return _zarr(source, str(source.store_path), level, axes, given)
    _no_level(level, name)
    if isinstance(source, torch.Tensor):
        if source.dtype == torch.bfloat16:
            raise TypeError(
                f"source: got a tensor of {source.dtype}, which NumPy does not have; give .float()"
            )
        source = source.detach().cpu().numpy()
    if not all(hasattr(source, what) for what in ("shape", "dtype", "__getitem__")):
        raise TypeError(
            f"source: got {name}, expected a path, a URL, or what has shape, dtype and slicing"
        )
    chunks = None if isinstance(source, np.ndarray) else getattr(source, "chunks", None)
    order = _order(axes, source, UNNAMED, name)
    return Source(source, name=name, order=order, chunks=chunks, **given)


def _zarr(node: Any, name: str, level: Any, axes: str | None, given: dict[str, Any]) -> Source:
    """A source of an array of zarr, or of an image of OME-Zarr."""
    if hasattr(node, "chunks"):
        if level is not None:
            raise ValueError(f"level: got {level!r}, but {name} is an array, not an OME-Zarr image")
        names = getattr(node.metadata, "dimension_names", None)
        order = _order(axes, node, UNNAMED, name)
        if axes is None and names:
            order = _order_named(names, order, name)
        array = Source(node, name=name, order=order, chunks=node.chunks, **given)
        if names:
            found = zip(order, names, strict=True)
            array.axes = tuple(each or "" for letter, each in found if letter not in "tc")
        return array
    attributes = dict(node.attrs)
    image = multiscale_of(attributes, name)
    if image is None:
        raise ValueError(f"{name}: {_why_no_image(node, attributes)}")
    chosen = image.level(0 if level is None else level, name)
    where = f"{name}/{chosen.path}"
    try:
        array = node[chosen.path]
    except KeyError:
        raise ValueError(
            f"{name}: its metadata names the level {chosen.path!r}, which is not there"
        ) from None
    _check_axes(image, array, where)
    if axes is not None:
        raise ValueError(f"axes: got {axes!r}, but {name} names its own: {image.order()!r}")
    return Source(
        array,
        name=where,
        order=image.order(),
        chunks=array.chunks,
        space=image.space(chosen),
        **given,
    )


def _check_axes(image: Multiscale, array: Any, where: str) -> None:
    order = image.order()
    names = [axis.name for axis in image.axes]
    if len(set(names)) != len(names):
        raise ValueError(f"{where}: has axes {', '.join(names)}, expected different names")
    if len(array.shape) != len(order):
        raise ValueError(
            f"{where}: has {len(array.shape)} axes, but its metadata names {len(order)}: {order!r}"
        )


def _why_no_image(group: Any, attributes: Mapping[str, Any]) -> str:
    """What a group is, if not an image, and what to open."""
    ome = attributes.get("ome", attributes)
    if "plate" in ome or "well" in ome:
        return "is a plate of OME-Zarr; open one of its images, such as ROW/COLUMN/FIELD"
    if "bioformats2raw.layout" in ome:
        return "has several images of OME-Zarr; open one of them, such as its group 0"
    if "labels" in ome:
        return f"has the label images {', '.join(map(str, ome['labels']))}; open one of them"
    inside = sorted(name for name, _ in group.members())
    listed = ", ".join(inside[:8]) + (", ..." if inside[8:] else "") or "nothing"
    return f"is a Zarr group without OME-Zarr's multiscales, with {listed} in it; open an array"


def _nifti(path: Path, axes: str | None, scratch: Any, given: dict[str, Any]) -> Source:
    """A source of a NIfTI file, which is mapped; .nii.gz is decompressed first."""
    nibabel = require("nibabel", f"Reading {path}", "nibabel")
    if not path.is_file():
        raise FileNotFoundError(2, "there is no such file", str(path))
    name, file = str(path), path
    with tempfile.TemporaryDirectory(dir=scratch, prefix="voxfuse.") as folder:
        if path.name.lower().endswith(".gz"):
            file = Path(folder) / path.name[: -len(".gz")]

            def decompress() -> None:
                with gzip.open(path) as packed, file.open("wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 20)

            what = f"{path}, decompressed to {folder}"
            insisting(lambda: decoded(decompress, what), what)
            warnings.warn(
                f"{path}: gzip cannot be read at random; decompressed once, to "
                f"{file.stat().st_size} bytes in {folder}, by every process that opens it: store "
                "a volume for several processes as .nii or Zarr",
                stacklevel=4,
            )
        try:
            image = nibabel.load(file)
            proxy = image.dataobj
            array = proxy.get_unscaled()
        except (nibabel.filebasedimages.ImageFileError, ValueError, OSError) as error:
            raise DamagedError(f"{path}: cannot be read: {error}") from error
    # The file is mapped: on Linux it lives on without its name until the array goes.
    while array.ndim > (len(axes) if isinstance(axes, str) else 3) and array.shape[-1] == 1:
        array = array[..., 0]
    order = _order(axes, array, UNNAMED_NIFTI, name)
    if axes is None and order == "xyzt" and given["timepoint"] is None:
        raise ValueError(
            f"timepoint: {name} has {array.shape[3]}, say which: 0 to {array.shape[3] - 1}; or "
            "axes='xyzc' if these are channels"
        )
    space, elsewhere = _space_of_nifti(image, order, array.shape)
    slope, intercept = proxy.slope, proxy.inter

    def value(stored: NDArray[Any]) -> NDArray[Any]:
        scaled: NDArray[Any] = np.asarray(stored, np.float64) * slope + intercept
        return scaled

    if (slope, intercept) != (1, 0):
        floats = np.dtype(np.float64 if array.dtype.itemsize > 4 else np.float32)
        given = given | {"value": value, "dtype": floats}
    source = Source(array, name=name, order=order, space=space, **given)
    source.elsewhere, source.affine = elsewhere, affine_in_mm(image)
    return source


def _space_of_nifti(image: Any, order: str, shape: Sequence[int]) -> tuple[Space, str | None]:
    """Where the voxels lie, and why not there, if it is so.

    OME-Zarr has sizes of voxels and a place along each axis of the array, and no turns.
    """
    at = [k for k, axis in enumerate(order[:3]) if axis not in "tc"]
    letters = tuple(order[k] for k in at)
    unit = {"mm": "millimeter", "micron": "micrometer", "meter": "meter"}
    units = (unit.get(image.header.get_xyzt_units()[0]),) * len(at)
    affine = np.asarray(image.affine, np.float64)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    placed = bool(int(image.header["sform_code"]) or int(image.header["qform_code"]))
    # By how much voxels lie beside the places that sizes and origin alone give them.
    beside = np.abs(affine[:3, :3] - np.diag(sizes))[:, at] @ [shape[k] - 1 for k in at]
    straight = bool((beside <= 0.01 * sizes.min()).all())
    origin = tuple(float(affine[k, 3]) if placed and straight else 0.0 for k in at)
    space = Space(letters, tuple(float(sizes[k]) for k in at), origin, units)
    if straight or not placed:
        return space, None
    return space, "its affine turns or mirrors axes, which OME-Zarr has no word for"


def plain_slices(argument: str, key: Any, shape: Sequence[int]) -> Slices:
    """A key as one slice without a step for each axis, inside the extents.

    Raises:
        TypeError, ValueError: it is none.
    """
    keys = key if isinstance(key, tuple) else (key,)
    if len(keys) != len(shape) or not all(isinstance(each, slice) for each in keys):
        raise TypeError(f"{argument}: got {key!r}, expected {len(shape)} slices")
    slices = []
    for each, extent in zip(keys, shape, strict=True):
        start = 0 if each.start is None else int(each.start)
        stop = extent if each.stop is None else int(each.stop)
        if each.step not in (None, 1) or not 0 <= start < stop <= extent:
            raise ValueError(f"{argument}: got {each}, expected 0 <= start < stop <= {extent}")
        slices.append(slice(start, stop))
    return tuple(slices)


def _values(values: Any) -> NDArray[Any]:
    """What slicing gave, as an array; Dask's is computed here, beside no other worker."""
    if hasattr(values, "__dask_graph__"):
        values = values.compute(scheduler="synchronous")
    result: NDArray[Any] = np.asarray(values)
    return result


def _order(axes: str | None, array: Any, unnamed: Mapping[int, str], name: str) -> str:
    """The letters of an array's axes."""
    count = len(array.shape)
    if axes is None:
        if count not in unnamed:
            raise ValueError(f"{name}: has {count} axes, expected 1 to {max(unnamed)}")
        return unnamed[count]
    if not isinstance(axes, str) or len(axes) != count or len(set(axes)) != len(axes):
        raise ValueError(f"axes: got {axes!r}, expected {count} different letters for {name}")
    if not 1 <= len(set(axes) - set("tc")) <= 3:
        raise ValueError(f"axes: got {axes!r}, expected 1 to 3 beside c (channels) and t (time)")
    return axes


def _order_named(names: Sequence[str | None], unnamed: str, name: str) -> str:
    """The letters of axes by their names, as of OME-Zarr without types.

    ``unnamed`` where names are not all there and different, or none is of time or channels.
    """
    given = [each for each in names if each]
    if len({*given}) < len(names):
        return unnamed
    kinds = [KINDS_BY_NAME.get(each.lower(), "space") for each in given]
    told = {*kinds} != {"space"}
    if told:
        clear = kinds.count("time") < 2 > kinds.count("channel") and 0 < kinds.count("space") < 4
    else:  # they may still tell that channels do not lie where there are none
        places = zip(unnamed, given, strict=True)
        clear = not any(axis in "tc" and each.lower() in {*"zyx"} for axis, each in places)
    if not clear:
        raise ValueError(
            f"axes: {name} calls its axes {', '.join(given)}, expected 1 to 3 beside c or channel, "
            "and t or time; say what they are, a letter each, as in axes='zyxc'"
        )
    if not told:
        return unnamed
    return Multiscale(tuple(map(Axis, given, kinds)), ()).order()


def _channels(channel: int | None, extent: int | None, name: str) -> range:
    if channel is None:
        return range(extent or 1)
    if extent is None:
        if channel == 0:
            return range(1)
        raise ValueError(f"channel: got {channel!r}, but {name} has no axis of channels")
    first = _chosen("channel", channel, extent, name)
    return range(first, first + 1)


def _chosen(argument: str, given: int | None, extent: int | None, name: str) -> int:
    """A place on an axis that the volume does not have; the only one by default."""
    if given is None:
        if extent is None or extent == 1:
            return 0
        raise ValueError(f"{argument}: {name} has {extent}, say which: 0 to {extent - 1}")
    if extent is None:
        raise ValueError(f"{argument}: got {given!r}, but {name} has no such axis")
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < extent:
        raise ValueError(f"{argument}: got {given!r}, expected 0 to {extent - 1} for {name}")
    return given


def _no_level(level: int | str | None, name: str) -> None:
    if level is not None:
        raise ValueError(f"level: got {level!r}, but {name} is not an OME-Zarr image")
