"""A subject's arrays: read, checked, in one orientation and spacing, normalised; and back."""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from voxfuse import resample_argmax
from voxfuse._files import write_whole
from voxfuse.metrics._arrays import optional
from voxfuse.metrics.files import COMMENT, Scan, load_scan
from voxfuse.training.config import DataOptions
from voxfuse.training.dataset import (
    IGNORED,
    DataError,
    Subject,
    check_classes,
    name_of,
    near_files,
)

Array = NDArray[Any]

#: Share of the labelled voxels outside the mask from which on it is said.
MUCH_OUTSIDE = 0.01

#: Affines that differ by no more, in mm, are the same grid.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Placement:
    """How a scan's own grid was left, so that a prediction gets back to it."""

    affine: NDArray[np.float64]  #: of the scan as it lies in its file
    shape: tuple[int, ...]
    turned: tuple[tuple[int, int], ...]  #: of every axis: where it goes, and whether it is flipped
    turned_shape: tuple[int, ...]
    path: Path  #: of the first image, whose header a prediction takes


@dataclass(frozen=True)
class Volume:
    """A subject as the network sees it."""

    name: str
    image: NDArray[np.float32]  #: (C, \*spatial), normalised inside the mask, 0 outside
    mask: NDArray[np.bool_]  #: (\*spatial)
    label: NDArray[np.uint8] | None  #: (\*spatial), classes in the order of values, or IGNORED
    placement: Placement
    own_mask: NDArray[np.bool_] | None = None  #: the mask on the scan's own grid


def load_volume(
    subject: Subject,
    options: DataOptions,
    labels: dict[str, int] | None = None,
    read: Callable[[Path], Scan] = load_scan,
    ignored: int | None = None,
) -> Volume:
    """Read a subject, check it, and bring it to the network's grid and intensities.

    Args:
        subject: its files.
        options: the section ``[data]``.
        labels: names and values; None leaves the label unread.
        read: reads an image or a mask; see :func:`voxfuse.metrics.files.load_scan`.
        ignored: value of the voxels that nobody has judged: they are ``IGNORED`` in the label.

    Raises:
        DataError: a file is missing or cannot be read; shapes or affines differ within the subject;
            NaN or infinity in an image; a label of unknown value; a mask without a voxel; a
            modality that is constant inside the mask; a label that lies outside the mask, all of it
            (a part of 1 % or more is a warning); one that is ignored in the whole mask; more than
            255 classes. An empty label is allowed.
        ModuleNotFoundError: nibabel is not installed.
    """
    images, placement = _images(subject, read)
    placement = oriented(placement, options.orientation)
    mask = _mask(subject, images, options, placement, read)
    label = None
    if labels is not None:
        check_classes(labels)
        if subject.label is None:
            raise DataError(f"{subject.name}: has no label file beside {subject.images[0]}")
        scan = _read(subject, subject.label, placement, read)
        label = _classes(subject, scan.array, labels, ignored)
        if (label[mask] == IGNORED).all():
            raise DataError(
                f"{subject.name}: {subject.label} is {ignored}, which is ignored, in the whole mask"
            )

    def turned(array: Array) -> Array:
        return turn(array, placement.turned)

    labelled = None if label is None else (label > 0) & (label != IGNORED)
    if labelled is not None and labelled.any():
        outside = float(np.mean(~mask[labelled]))
        problem = (
            f"{subject.name}: {outside:.1%} of the labelled voxels of {subject.label} lie outside "
            f"the mask (data.mask = {options.mask!r}; 'all' is the whole scan), where nothing is "
            "predicted"
        )
        if outside == 1:
            raise DataError(problem)
        if outside >= MUCH_OUTSIDE:
            warnings.warn(problem, stacklevel=2)
    own_mask = mask
    image, mask = np.stack([turned(x) for x in images]), turned(mask)
    label = None if label is None else turned(label)
    shape = resampled_shape(placement, options.spacing)
    if shape != placement.turned_shape:
        image = interpolate(image, shape)
        mask = _nearest_class(mask.astype(np.uint8), 2, shape).astype(bool)
        if label is not None and labels is not None:
            last = len(labels)  # of the ignored voxels, which are a class as well
            label = _nearest_class(np.where(label == IGNORED, last, label), last + 1, shape)
            label[label == last] = IGNORED
        if not mask.any():
            raise DataError(f"{subject.name}: the mask has no voxel left at {options.spacing} mm")
    for k, channel in enumerate(image):
        path = subject.images[k if len(subject.images) > 1 else 0]
        image[k] = normalised(f"{subject.name}: {path}", channel, mask, options)
    return Volume(subject.name, np.ascontiguousarray(image), mask, label, placement, own_mask)


def check_subjects(
    subjects: Iterable[Subject],
    options: DataOptions,
    labels: dict[str, int],
    keep: Sequence[str],
    ignored: int | None = None,
    images: Sequence[str] = (),
) -> dict[str, Volume]:
    """Load every subject, and keep those named; of all errors make one.

    Args:
        subjects, options, labels, ignored: see :func:`load_volume`.
        keep: names of subjects.
        images: the modalities; empty: any number of them.

    Raises:
        DataError: the first ten of what :func:`load_volume` raises, and of another number of
            modalities, a line each.
    """
    volumes: dict[str, Volume] = {}
    problems: list[str] = []
    for subject in subjects:
        try:
            volume = load_volume(subject, options, labels, ignored=ignored)
        except DataError as error:
            problems.append(str(error))
            continue
        if images and len(volume.image) != len(images):
            problems.append(
                f"{subject.name}: {volume.placement.path} has {len(volume.image)} channels, "
                f"expected {len(images)}: {', '.join(images)}"
            )
        elif subject.name in keep:
            volumes[subject.name] = volume
    if problems:
        more = f"\n... and {len(problems) - 10} more" if problems[10:] else ""
        raise DataError("\n".join(problems[:10]) + more)
    return volumes


def _read(
    subject: Subject, path: Path, like: Placement | None, read: Callable[[Path], Scan]
) -> Scan:
    if not path.exists():
        near = near_files(path.parent, [name_of(path)]) if path.parent.is_dir() else []
        # Not which: a status hides the names of files that were looked for, not of others.
        spelt = "; there is one in another spelling" if set(near) - {path} else ""
        raise DataError(f"{subject.name}: {path} is missing{spelt}")
    try:
        scan = read(path)
    except ValueError as error:
        raise DataError(f"{subject.name}: {error}") from None
    if like is not None:
        if scan.shape != like.shape:
            raise DataError(
                f"{subject.name}: {path} has shape {scan.shape}, but {like.path} has {like.shape}; "
                "the files of a subject have to lie on one grid"
            )
        gap = float(np.abs(scan.affine - like.affine).max())
        if not gap <= TOLERANCE:
            raise DataError(
                f"{subject.name}: {path} lies elsewhere than {like.path}: their affines differ by "
                f"up to {gap:g} mm, expected at most {TOLERANCE:g}"
            )
    return scan


def _images(subject: Subject, read: Callable[[Path], Scan]) -> tuple[list[Array], Placement]:
    """The modalities as float32, and where they lie."""
    arrays: list[Array] = []
    placement: Placement | None = None
    for path in subject.images:
        scan = _read(subject, path, placement, read)
        array = np.asarray(scan.array, np.float32)
        if array.ndim == 4 and len(subject.images) > 1:
            raise DataError(
                f"{subject.name}: {path} has shape {array.shape}, expected one modality (x, y, z)"
            )
        if not np.isfinite(array).all():
            where = tuple(int(k) for k in np.argwhere(~np.isfinite(array))[0])
            raise DataError(
                f"{subject.name}: {path} is {array[where]} at {where}, expected finite numbers"
            )
        arrays += [array] if array.ndim == 3 else list(np.moveaxis(array, 3, 0))
        placement = placement or placement_of(scan, path)
    assert placement is not None
    return arrays, placement


def placement_of(scan: Scan, path: Path) -> Placement:
    """Of a scan as it lies in its file."""
    still = tuple((axis, 1) for axis in range(3))
    return Placement(scan.affine, scan.shape, still, scan.shape, path)


def _mask(
    subject: Subject,
    images: Sequence[Array],
    options: DataOptions,
    placement: Placement,
    read: Callable[[Path], Scan],
) -> NDArray[np.bool_]:
    if options.mask == "all":
        return np.ones(placement.shape, bool)
    if options.mask == "positive":
        mask: NDArray[np.bool_] = images[0] > 0
        path = subject.images[0]
    else:
        if subject.mask is None:
            raise DataError(f"{subject.name}: has no file {options.mask} (data.mask)")
        path = subject.mask
        mask = _read(subject, path, placement, read).array > 0
        if mask.ndim != 3:
            raise DataError(f"{subject.name}: {path} has {mask.ndim} axes, expected a mask of 3")
    if not mask.any():
        raise DataError(f"{subject.name}: {path} has no voxel above 0 for the mask (data.mask)")
    return mask


def _classes(
    subject: Subject, array: Array, labels: dict[str, int], ignored: int | None
) -> NDArray[np.uint8]:
    """Values of labels to classes 0, 1, ..., and to IGNORED."""
    values = sorted(labels.values())
    left_out = np.zeros(array.shape, bool)
    if ignored is not None:
        left_out = np.isclose(array, ignored, rtol=0, atol=1e-3)
        array = np.where(left_out, 0, array)
    if array.ndim != 3:
        raise DataError(
            f"{subject.name}: {subject.label} has shape {array.shape}, expected (x, y, z)"
        )
    found = np.unique(array)
    unknown = found[~np.isclose(found[:, None], values, rtol=0, atol=1e-3).any(1)]
    if unknown.size:
        known = ", ".join(f"{name} = {value}" for name, value in labels.items())
        shown = ", ".join(f"{value:g}" for value in unknown[:5].astype(float))
        raise DataError(
            f"{subject.name}: {subject.label} has the value {shown}, expected {known} (data.labels)"
        )
    places = np.searchsorted(np.asarray(values), np.rint(array))
    result: NDArray[np.uint8] = np.where(left_out, IGNORED, places).astype(np.uint8)
    return result


def normalised(
    what: str, channel: Array, mask: NDArray[np.bool_], options: DataOptions
) -> NDArray[np.float32]:
    """A modality as ``[data]`` wants it inside the mask, 0 outside; ``what`` is named in errors."""
    inside = channel[mask].astype(np.float64)
    low, high = options.clip
    if low > 0 or high < 100:
        inside = np.clip(inside, *np.percentile(inside, [low, high]))
    if options.normalisation != "none":
        start, width = inside.min(), float(np.ptp(inside))
        if width == 0:
            raise DataError(f"{what} is {start:g} everywhere inside the mask")
        if options.normalisation == "zscore":
            start, width = inside.mean(), float(inside.std())
        elif options.normalisation == "robust":
            start = np.median(inside)
            width = 1.4826 * float(np.median(np.abs(inside - start)))
            if width == 0:
                raise DataError(
                    f"{what} is {start:g} in half of the mask, which leaves no deviation"
                )
        inside = (inside - start) / width
    result = np.zeros(channel.shape, np.float32)
    result[mask] = inside
    return result


# --- Grids ----------------------------------------------------------------------------------------


def oriented(placement: Placement, orientation: str) -> Placement:
    """The same with its axes turned to ``orientation`` (nibabel's names, such as RAS)."""
    if not orientation:
        return placement
    orientations = optional("nibabel.orientations", "Orientation")
    transform = orientations.ornt_transform(
        orientations.io_orientation(placement.affine), orientations.axcodes2ornt(orientation)
    )
    turned = tuple((int(axis), int(flip)) for axis, flip in transform)
    shape = [0, 0, 0]
    for own, (axis, _) in enumerate(turned):
        shape[axis] = placement.shape[own]
    return Placement(placement.affine, placement.shape, turned, tuple(shape), placement.path)


def turn(array: Array, turned: Sequence[tuple[int, int]]) -> Array:
    """Axes of (x, y, z) moved and flipped, as nibabel's ``apply_orientation``."""
    flipped = array[tuple(slice(None, None, flip) for _, flip in turned)]
    order = [own for _, own in sorted((axis, own) for own, (axis, _) in enumerate(turned))]
    return np.ascontiguousarray(flipped.transpose(order))


def turn_back(array: Array, turned: Sequence[tuple[int, int]]) -> Array:
    """What :func:`turn` undoes."""
    back = array.transpose([axis for axis, _ in turned])
    return np.ascontiguousarray(back[tuple(slice(None, None, flip) for _, flip in turned)])


def resampled_shape(placement: Placement, spacing: Sequence[float]) -> tuple[int, ...]:
    """Extent after resampling to ``spacing``; sizes within a thousandth stay as they are."""
    if not spacing:
        return placement.turned_shape
    own = np.sqrt((placement.affine[:3, :3] ** 2).sum(0))
    sizes = [0.0] * 3
    for k, (axis, _) in enumerate(placement.turned):
        sizes[axis] = float(own[k])
    return tuple(
        n if abs(size / wanted - 1) < 1e-3 else max(1, round(n * size / wanted))
        for n, size, wanted in zip(placement.turned_shape, sizes, spacing, strict=True)
    )


def interpolate(channels: Array, shape: Sequence[int]) -> NDArray[np.float32]:
    """Channels (C, x, y, z) linearly at another extent: voxel k at (n/m)(k + 1/2) - 1/2."""
    tensor = torch.from_numpy(np.ascontiguousarray(channels, np.float32))[None]
    resampled = torch.nn.functional.interpolate(tensor, tuple(shape), mode="trilinear")
    result: NDArray[np.float32] = resampled[0].numpy()
    return result


def _nearest_class(label: NDArray[np.uint8], classes: int, shape: Sequence[int]) -> Array:
    """The greatest of the linearly interpolated classes, at another extent."""
    indicators = torch.from_numpy(np.stack([label == c for c in range(classes)])).float()
    result: Array = resample_argmax(indicators, tuple(shape)).numpy()
    return result.astype(np.uint8)


def on_own_grid(probabilities: Array, placement: Placement) -> NDArray[np.float32]:
    """Channels (C, \\*spatial) on the network's grid, put back on the scan's own."""
    if probabilities.shape[1:] != placement.turned_shape:
        probabilities = interpolate(probabilities, placement.turned_shape)
    return np.stack([turn_back(x, placement.turned) for x in probabilities]).astype(
        np.float32, copy=False
    )


def save_like(array: Array, placement: Placement, path: Path, comment: str = "") -> None:
    """Write (x, y, z) or (x, y, z, C) as NIfTI where the scan lies, with its affine and codes.

    A file that is there has its old content until the new one is whole. A comment becomes an
    extension of the header.
    """
    nibabel = optional("nibabel", f"Writing {path}")
    source = nibabel.load(placement.path) if placement.path.is_file() else None
    if not isinstance(source, nibabel.Nifti1Pair):
        source = None
    # The placement's is in mm, the source's in its header's unit.
    image = nibabel.Nifti1Image(array, source.affine if source else placement.affine)
    if comment:
        extension = nibabel.nifti1.Nifti1Extension(COMMENT, comment.encode())
        image.header.extensions.append(extension)
    if source:
        for form in ("sform", "qform"):
            affine, code = getattr(source, f"get_{form}")(coded=True)
            getattr(image, f"set_{form}")(affine, int(code))
        image.header["xyzt_units"] = source.header["xyzt_units"]

    def write(file: BinaryIO) -> None:
        if path.name.endswith(".gz"):
            with gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
                image.to_file_map({"image": nibabel.FileHolder(fileobj=packed)})
        else:
            image.to_file_map({"image": nibabel.FileHolder(fileobj=file)})

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)
