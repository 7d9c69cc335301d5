"""Masks and probabilities in files: found, paired by name, and compared by grid."""

from __future__ import annotations

import difflib
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse.metrics._arrays import Floats, optional

#: NIfTI's code of an extension that is a comment.
COMMENT = 6
#: Endings of the files that are looked for in folders; nibabel reads them, in capitals too.
ENDINGS = (".nii.gz", ".nii", ".mgz", ".mgh")
#: NIfTI's codes of a meter and a micron, in mm; a file without a unit is taken for one in mm.
UNITS = {1: 1000.0, 3: 0.001}
#: Voxels by which a place between two voxels may be off, as affines are rounded.
BETWEEN = 1e-3


class GridError(ValueError):
    """Two images that should lie on one grid do not."""


@dataclass(frozen=True)
class Scan:
    """A volume (\\*spatial) or (\\*spatial, C), and where its voxels are in mm."""

    array: NDArray[Any]
    affine: Floats
    path: Path
    channels: tuple[int, ...] | None = None  #: the label of each, 0 the background; None: unknown
    regions: bool = False  #: channels hold voxels of later ones too

    @property
    def shape(self) -> tuple[int, ...]:
        """The extents of the three spatial axes."""
        return self.array.shape[:3]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel sizes in mm."""
        sizes = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return float(sizes[0]), float(sizes[1]), float(sizes[2])


def load_scan(path: str | Path) -> Scan:
    """Read a NIfTI or MGH file by nibabel.

    Raises:
        ValueError: the file cannot be read, has fewer than three axes, complex numbers or colours,
            or an affine with a number that is not finite or voxels without extent.
        ModuleNotFoundError: nibabel is not installed.
    """
    return _load(path, lambda image: np.asanyarray(image.dataobj))


def load_header(path: str | Path) -> Scan:
    """The same without reading the voxels: zeros, which take no memory, stand for them."""
    return _load(
        path, lambda image: np.broadcast_to(np.zeros((), image.get_data_dtype()), image.shape)
    )


def _load(path: str | Path, voxels: Callable[[Any], NDArray[Any]]) -> Scan:
    nibabel = optional("nibabel", f"Reading {path}")
    try:
        image = nibabel.load(path)
        array = voxels(image)
    except Exception as error:  # of many kinds, nibabel's own among them
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if array.dtype.kind not in "buif":
        raise ValueError(f"{path}: got voxels of dtype {array.dtype}, expected real numbers")
    if array.ndim < 3:
        raise ValueError(f"{path}: got {array.ndim} axes, expected three spatial ones")
    array = array.reshape(array.shape[:3] + tuple(n for n in array.shape[3:] if n != 1))
    if array.ndim > 4:
        raise ValueError(f"{path}: got shape {array.shape}, expected (x, y, z) or (x, y, z, C)")
    affine = affine_in_mm(image)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and (sizes > 0).all()):
        raise ValueError(
            f"{path}: got an affine with voxels of {_times(sizes)} mm, expected finite numbers and "
            "sizes above 0"
        )
    said = np.abs(image.header.get_zooms()[:3]) * unit_in_mm(image)
    if (np.abs(sizes - said) > 0.01 * sizes).any():
        warnings.warn(
            f"{path}: its affine has voxels of {_times(sizes)} mm, which are taken, but its header "
            f"says {_times(said)} mm",
            stacklevel=2,
        )
    return Scan(array, affine, Path(path), *_channels_said(image.header))


def unit_in_mm(image: Any) -> float:
    """How many mm the unit of a nibabel image has, in which its affine and its sizes are."""
    if not isinstance(image, optional("nibabel", "Reading images").Nifti1Pair):
        return 1.0
    return UNITS.get(int(image.header["xyzt_units"]) & 7, 1.0)


def affine_in_mm(image: Any) -> Floats:
    """The affine of a nibabel image, in mm whatever the unit of its header."""
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3] *= unit_in_mm(image)
    return affine


def probabilities_of(path: Path) -> Path:
    """The file of a segmentation's probabilities, as ``voxfuse predict`` calls it."""
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    return path.with_name(f"{stem}_probabilities.nii.gz")


def channels_comment(channels: Sequence[int], regions: bool = False) -> str:
    """What a NIfTI comment says of the channels of probabilities; :func:`load_scan` reads it.

    Args:
        channels: the label of each, 0 for the background.
        regions: they are decided one by one, later ones on top.
    """
    return json.dumps({"voxfuse": {"channels": list(channels), "regions": regions}})


def _channels_said(header: Any) -> tuple[tuple[int, ...] | None, bool]:
    for extension in getattr(header, "extensions", ()):
        content = extension.get_content()
        if extension.get_code() != COMMENT or not isinstance(content, bytes):
            continue
        try:
            said = json.loads(content.rstrip(b"\0"))["voxfuse"]
            return tuple(int(label) for label in said["channels"]), bool(said["regions"])
        except (ValueError, TypeError, KeyError):  # somebody else's comment
            continue
    return None, False


def find_scans(path: str | Path, pattern: str | None = None) -> dict[str, Path]:
    """The files of a folder, by subject; of a file, that one.

    Args:
        path: a folder, or one file.
        pattern: where a subject's file lies below the folder, ``{}`` standing for the subject:
            ``"{}/lesions.nii.gz"``. Default: every image; the subject is its path without the
            ending. Hidden files, such as ``._a.nii.gz`` of macOS, are none.

    Links to files and folders are followed. Names are in Unicode's composed form (NFC), so that one
    that macOS has decomposed is the same.

    Raises:
        FileNotFoundError: no such path, no image in it, or a link to nothing.
        ValueError: the pattern has no ``{}``, or a ``*``, which means nothing there; two files are
            one subject's; a name is not UTF-8, so that no table can hold it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if path.is_file():
        return {_without_ending(composed(as_text(path).name)): path}
    if pattern is not None and pattern.count("{}") != 1:
        raise ValueError(f"pattern: got {pattern!r}, expected one {{}} for the subject's name")
    if pattern is not None and "*" in pattern:
        raise ValueError(f"pattern: got {pattern!r}, expected {{}}, and names of files as they are")
    pattern = None if pattern is None else composed(pattern)
    parts = None if pattern is None else pattern.split("/")
    found: dict[str, Path] = {}
    for file in _files_below(path, parts):
        name = composed(file.relative_to(path).as_posix())
        if pattern is None:
            if not is_image(file):
                continue
            subject = _without_ending(name)
        else:
            before, after = pattern.split("{}")
            subject = name[len(before) : len(name) - len(after)]
        as_text(file)
        if subject in found:
            raise ValueError(f"{path}: {found[subject].name} and {file.name} are both {subject}")
        found[subject] = file
    if not found:
        looked_for = pattern.replace("{}", "*") if pattern else ", ".join("*" + e for e in ENDINGS)
        raise FileNotFoundError(f"{path}: there is no file {looked_for}")
    return found


def _files_below(
    folder: Path, parts: Sequence[str] | None, above: tuple[str, ...] = ()
) -> Iterator[Path]:
    """Files in a folder and those below that are not hidden, or whose path is of these parts."""
    here = os.path.realpath(folder)
    if here in above:  # a link to a folder that it lies in
        return
    try:
        inside = sorted(folder.iterdir())
    except PermissionError:
        if not above:
            raise
        warnings.warn(f"{folder}: left out, as it may not be read", stacklevel=3)
        return
    for path in inside:
        if parts is None:
            wanted, deeper = not path.name.startswith("."), True
        else:
            before, braces, after = parts[0].partition("{}")
            # A subject's name is no hidden one.
            name = f"{re.escape(before)}{'[^.][^/]*' if braces else ''}{re.escape(after)}"
            wanted, deeper = re.fullmatch(name, composed(path.name)) is not None, len(parts) > 1
        if not wanted:
            continue
        if path.is_symlink() and not path.exists():
            target = os.readlink(path)
            # What git-annex has not fetched is a file, which another name may tell is no scan.
            is_file = "annex/objects" in target
            if (is_image(path) or not is_file) if parts is None else not (deeper and is_file):
                raise FileNotFoundError(f"{path}: is a link to {target}, which is not there")
            continue
        if path.is_dir() and deeper:
            yield from _files_below(path, None if parts is None else parts[1:], (*above, here))
        elif path.is_file() and (parts is None or not deeper):
            yield path


def as_text(path: Path) -> Path:
    """The path, whose name is UTF-8.

    Raises:
        ValueError: it is not.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"got the name {str(path)!r}, expected one in UTF-8") from None
    return path


def composed(name: str) -> str:
    """A name in Unicode's composed form."""
    return unicodedata.normalize("NFC", name)


def is_image(path: Path) -> bool:
    """Whether a file's name ends as those that nibabel reads."""
    return path.name.lower().endswith(ENDINGS)


def _without_ending(name: str) -> str:
    for ending in ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def pair_scans(
    predictions: dict[str, Path], truths: dict[str, Path]
) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Pair files of the same subject.

    Returns:
        The pairs, and the subjects that have a prediction and no truth.

    Raises:
        FileNotFoundError: subjects without a prediction. Leaving them out would reward a method for
            the subjects on which it failed.
    """
    missing = [subject for subject in truths if subject not in predictions]
    extra = [subject for subject in predictions if subject not in truths]
    if missing:
        named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
        near = difflib.get_close_matches(missing[0], extra or list(predictions), 1, 0.0)
        raise FileNotFoundError(
            f"no prediction for {len(missing)} of {len(truths)} subjects: {named} "
            f"(a prediction's name is, for instance, {near[0]}; files are matched by their names "
            "without the ending: --prediction-pattern and --truth-pattern say which part counts)"
        )
    return {subject: (predictions[subject], truths[subject]) for subject in truths}, extra


def on_grid_of(scan: Scan, truth: Scan, resample: bool = False) -> Scan:
    """The scan on the truth's grid: as it is, or by the nearest voxel.

    Args:
        scan, truth: see :func:`load_scan`.
        resample: look up the voxel nearest to each voxel of the truth, of two the one of lower
            index; 0 outside. Labels stay labels.

    Raises:
        GridError: shapes or affines differ, and ``resample`` is False.
    """
    gap = float(np.abs(scan.affine - truth.affine).max())
    if scan.shape == truth.shape and gap <= 1e-3:
        return scan
    if not resample:
        if scan.shape != truth.shape:
            what = f"has shape {scan.shape}, the truth {truth.path} has {truth.shape}"
        else:
            what = (
                f"lies elsewhere than the truth {truth.path}: their affines differ by up to {gap:g}"
                f" (voxels {_sizes(scan)} and {_sizes(truth)} mm, first voxel at"
                f" {_corner(scan)} and {_corner(truth)} mm)"
            )
        raise GridError(f"{scan.path} {what}; --resample takes the nearest voxels")
    forward = np.linalg.inv(scan.affine) @ truth.affine
    out: NDArray[Any] = np.zeros(truth.shape + scan.array.shape[3:], scan.array.dtype)
    x, y, z = (np.arange(n, dtype=np.float64) for n in truth.shape)
    half = 0.5 - BETWEEN  # a whole 0.5, or rounding to even, would take some voxels twice
    for k in z:  # slice by slice: positions of a whole volume would be several times its size
        place = [
            np.floor(row[0] * x[:, None] + row[1] * y + row[2] * k + row[3] + half).astype(np.int64)
            for row in forward[:3]
        ]
        inside = np.ones(place[0].shape, bool)
        for index, extent in zip(place, scan.shape, strict=True):
            inside &= (index >= 0) & (index < extent)
        slab = out[:, :, int(k)]
        slab[inside] = scan.array[tuple(index[inside] for index in place)]
    return replace(scan, array=out, affine=truth.affine)


def _sizes(scan: Scan) -> str:
    return _times(scan.spacing)


def _times(sizes: Sequence[float] | Floats) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)


def _corner(scan: Scan) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in scan.affine[:3, 3]) + ")"
