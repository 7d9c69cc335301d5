"""Coarser levels of an OME-Zarr image: labels by majority, other values by their mean."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse.scale.chunk_cache import blocks, within
from voxfuse.scale.destinations import ZarrDestination, blocks_of
from voxfuse.scale.layout import Layout, synced
from voxfuse.scale.ome_zarr import Multiscale
from voxfuse.scale.stores import insisting, local_path, writing

Array = NDArray[Any]

#: Levels are added until no spatial axis is longer, where no number is given.
COARSEST = 256


def majority(labels: Array, factors: Sequence[int]) -> Array:
    """The most frequent label of every block of ``factors`` voxels.

    Of labels that are equally frequent the lowest but 0 is taken, so that thin structures stay. At
    the end of an axis blocks have the voxels that are left.

    Example:
        >>> import numpy as np
        >>> from voxfuse.scale.pyramid import majority
        >>> majority(np.array([[0, 2, 2, 1, 0], [2, 0, 1, 1, 0]]), (2, 2))
        array([[2, 1, 0]])
    """
    return _reduced(labels, factors, _most_frequent)


def mean(values: Array, factors: Sequence[int]) -> Array:
    """The mean of every block of ``factors`` voxels, of integers the nearest one (of two the even).

    At the end of an axis blocks have the voxels that are left.
    """

    def combine(blocks: Array) -> Array:
        means: Array = blocks.mean(axis=0, dtype=np.float64)
        return means if values.dtype.kind == "f" else np.rint(means)

    return _reduced(values, factors, combine)


METHODS: dict[str, Callable[[Array, Sequence[int]], Array]] = {"majority": majority, "mean": mean}


def build_pyramid(
    where: Any,
    *,
    labels: str | None = None,
    factors: Sequence[Sequence[int]] | None = None,
    method: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> list[str]:
    r"""Make the coarser levels of an OME-Zarr 0.5 image or label image, from its finest.

    A pass of its own, after the finest level is complete. A shard of the result is in memory at a
    time, and what a chunk of it is made of. A level appears in the metadata when it is complete,
    with the translation of its first voxel's centre: that of the block that it is made of.

    Args:
        where, storage_options: as for :func:`create_destination`.
        labels: the name of the label image; None means the image itself.
        factors: for every level the spatial factors to the one before, such as (1, 2, 2) for voxels
            thick along the first axis. Default for labels of an image: its levels, as OME-Zarr asks
            for; else halving the axes whose voxels are less than twice the finest, until no axis
            exceeds 256.
        method: "majority" (of labels, the default for these) or "mean".
        resume: go on with shards that are there. They have to be of the same finest level, which is
            not checked; False begins again.
        overwrite: replace coarser levels of others' making, too.

    Returns:
        The paths of the levels, the finest first.

    Raises:
        FileNotFoundError: there is no such image.
        FileExistsError: there are coarser levels that this function did not make.
        ValueError: arguments do not fit, shards of other factors are there, or the image has an
            axis of time, or others than [channels,] space.
        DamagedError: a shard of the finest level is not there, or not whole.
        OSError: the store failed; what was written stays, for ``resume=True``.
    """
    store = writing(where, storage_options)
    shown = str(local_path(where) or where)
    layout = Layout(store, shown, "image" if labels is None else "labels", labels or "")
    image = layout.image(layout.group)
    if image is None:
        missing = "there is no OME-Zarr image"
        raise FileNotFoundError(errno.ENOENT, missing, f"{shown}/{layout.group}".rstrip("/"))
    if layout.node(layout.group).metadata.zarr_format != 3:
        raise ValueError(f"{shown}: is of Zarr format 2 (OME-Zarr 0.4), expected 3")
    if labels is None:
        name = layout.node("").attrs["ome"]["multiscales"][0].get("name") or ""
        layout = Layout(store, shown, "image", name)
    kinds = [axis.kind for axis in image.axes]
    if kinds[kinds.count("channel") :] != ["space"] * kinds.count("space"):
        raise ValueError(f"{layout.shown('')}: has axes of {kinds}, expected [channel,] space")
    finest = image.levels[0]
    source = ZarrDestination(store, layout.path(finest.path), layout.shown(finest.path))
    if method is None:
        method = "mean" if labels is None else "majority"
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected 'majority' or 'mean'")
    if method == "majority" and source.dtype.kind not in "bui":
        raise ValueError(f"method: got 'majority' for {source.dtype}, expected integers")
    if len(source.shape) != len(kinds):
        raise ValueError(
            f"{source.where}: has {len(source.shape)} axes, but its metadata names {len(kinds)}"
        )
    space = image.space(finest)
    channels = len(source.shape) - len(space.axes)
    extents = source.shape[channels:]
    steps = _steps(factors, image, layout, extents)
    # All that may be refused is by now, or here: before anything is removed.
    source.check_written(tuple(slice(0, extent) for extent in source.shape))
    if not resume:
        kept = [level.path for level in image.levels[1:]]
        paths = dict.fromkeys([*kept, *(str(number + 1) for number in range(len(steps)))])
        for path in paths if not overwrite else ():
            node = layout.node(layout.path(path))
            if node is not None and "pyramid" not in node.attrs.get("voxfuse", {}):
                raise FileExistsError(
                    errno.EEXIST,
                    "there is something that build_pyramid did not make; overwrite=True "
                    "replaces it",
                    layout.shown(path),
                )
        layout.describe(bool(channels), [(finest.path, space)])
        for path in paths:
            insisting(lambda: synced(store.delete_dir(layout.path(path))), layout.shown(path))  # noqa: B023
    done = [(finest.path, space)]
    for number, (step, extent) in enumerate(steps, 1):
        space = space.coarser(step)
        names = ("c",) * channels + space.axes
        target = _level(layout, str(number), source, step, extent, method, resume, names)
        _fill(source, target, (1,) * channels + step, METHODS[method])
        done.append((str(number), space))
        layout.describe(bool(channels), done, method)
        source = target
    return [path for path, _ in done]


def _steps(
    factors: Sequence[Sequence[int]] | None,
    image: Multiscale,
    layout: Layout,
    extents: tuple[int, ...],
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For every level its factors to the one before, and its spatial extents."""
    steps = []
    if factors is not None:
        for given in factors:
            step = tuple(given)
            integral = all(isinstance(f, int) and not isinstance(f, bool) for f in step)
            if len(step) != len(extents) or not integral or min(step) < 1 or max(step) == 1:
                raise ValueError(
                    f"factors: got {given!r}, expected {len(extents)} integers, one of them above 1"
                )
            extents = _ceiling(extents, step)
            steps.append((step, extents))
        return steps
    parent = layout.image("") if layout.kind == "labels" else None
    if parent is not None:
        return _steps_of(parent, layout, extents)
    space = image.space(image.levels[0])
    while max(extents) > COARSEST:
        sizes = [s if n > 1 else np.inf for s, n in zip(space.scale, extents, strict=True)]
        step = tuple(2 if size < 2 * min(sizes) else 1 for size in sizes)
        space, extents = space.coarser(step), _ceiling(extents, step)
        steps.append((step, extents))
    return steps


def _steps_of(
    image: Multiscale, layout: Layout, extents: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The levels of an image from the one on that has these extents."""
    at = [k for k, axis in enumerate(image.axes) if axis.kind == "space"]
    shapes = []
    for level in image.levels:
        node = layout.node(level.path)
        if node is None or not hasattr(node, "chunks"):
            raise ValueError(
                f"{layout.where}: its metadata names the level {level.path!r}, which is not there; "
                "give the factors"
            )
        shapes.append(tuple(node.shape[k] for k in at))
    if extents not in shapes:
        raise ValueError(
            f"factors: {layout.where} has no level of {extents} voxels, whose pyramid would be "
            "followed; give the factors"
        )
    first = shapes.index(extents)
    steps = []
    for number in range(first + 1, len(shapes)):
        before, after = (image.space(image.levels[k]).scale for k in (number - 1, number))
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        step = tuple(max(round(ratio), 1) for ratio in ratios)
        fitting = all(
            m in (n // f, -(-n // f)) and abs(ratio / f - 1) < 0.05
            for n, m, f, ratio in zip(shapes[number - 1], shapes[number], step, ratios, strict=True)
        )
        if not fitting:
            raise ValueError(
                f"factors: level {number} of {layout.where} has {shapes[number]} voxels, "
                f"{[round(r, 3) for r in ratios]} times those of level {number - 1}, which are no "
                "whole blocks; give the factors"
            )
        steps.append((step, shapes[number]))
    return steps


def _level(
    layout: Layout,
    path: str,
    finer: ZarrDestination,
    step: tuple[int, ...],
    extent: tuple[int, ...],
    method: str,
    resume: bool,
    names: tuple[str, ...],
) -> ZarrDestination:
    """The array of a level, created, or gone on with."""
    channels = len(finer.shape) - len(extent)
    made = {"factors": list(step), "method": method, "finer": list(finer.shape)}
    node = layout.node(layout.path(path)) if resume else None
    if node is not None:
        begun = node.attrs.get("voxfuse", {}).get("pyramid")
        if begun != made or tuple(node.shape[channels:]) != extent:
            raise ValueError(
                f"resume: {layout.shown(path)} was begun as {begun}, now it would be {made}; "
                "resume=False begins again"
            )
        return ZarrDestination(layout.store, layout.path(path), layout.shown(path))
    chunks, shards = blocks_of(finer.array.chunks[channels:], finer.unit[channels:], extent)

    def create() -> None:
        layout.create_array(
            path,
            (*finer.shape[:channels], *extent),
            finer.array.dtype,
            chunks=(1,) * channels + chunks,
            shards=(1,) * channels + shards,
            fill=finer.array.fill_value,
            axes=names,
            attributes={"voxfuse": dict(finer.array.attrs.get("voxfuse", {})) | {"pyramid": made}},
        )

    insisting(create, f"{layout.shown(path)}: creating it")
    return ZarrDestination(layout.store, layout.path(path), layout.shown(path))


def _fill(
    finer: ZarrDestination,
    target: ZarrDestination,
    step: Sequence[int],
    reduce: Callable[[Array, Sequence[int]], Array],
) -> None:
    """Write the shards of a level that are not there, chunk by chunk of what they are made of."""
    for shard in target.shards():
        if target.written(shard):
            continue
        result = np.empty([each.stop - each.start for each in shard], target.dtype)
        for chunk in blocks(shard, target.array.chunks, target.shape):
            fine = tuple(
                slice(each.start * f, min(each.stop * f, extent))
                for each, f, extent in zip(chunk, step, finer.shape, strict=True)
            )
            finer.check_written(fine)
            result[within(chunk, shard)] = reduce(finer[fine], step)
        target[shard] = result


def _ceiling(extents: Sequence[int], step: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // f) for n, f in zip(extents, step, strict=True))


def _reduced(values: Array, factors: Sequence[int], combine: Callable[[Array], Array]) -> Array:
    """What ``combine`` makes of (voxels of a block, blocks), for every block.

    Whole blocks and those that are cut off at the end of axes have their own shapes.
    """
    result = np.empty(_ceiling(values.shape, factors), values.dtype)
    parts = []
    for extent, factor in zip(values.shape, factors, strict=True):
        whole = extent // factor
        here = [(slice(0, whole * factor), slice(0, whole), factor)] if whole else []
        if extent % factor:
            here.append((slice(whole * factor, extent), slice(whole, whole + 1), extent % factor))
        parts.append(here)
    for part in product(*parts):
        source, target, block = zip(*part, strict=True)
        counts = [each.stop - each.start for each in target]
        split = values[source].reshape(
            [n for pair in zip(counts, block, strict=True) for n in pair]
        )
        axes = range(len(block))
        blocks = split.transpose([2 * k + 1 for k in axes] + [2 * k for k in axes])
        result[target] = combine(blocks.reshape(int(np.prod(block)), -1)).reshape(counts)
    return result


def _most_frequent(blocks: Array) -> Array:
    """The most frequent of each column; of several the lowest but 0."""
    result: Array = blocks[0].copy()
    mixed = np.flatnonzero((blocks != result).any(axis=0))
    columns = blocks[:, mixed]
    best = columns[0].copy()
    most = np.zeros(len(mixed), np.int64)
    for labels in columns:
        count = (columns == labels).sum(axis=0)
        preferred = (labels != 0) & ((best == 0) | (labels < best))
        better = (count > most) | ((count == most) & preferred)
        best[better], most[better] = labels[better], count[better]
    result[mixed] = best
    return result
