"""Studies: which files they are of, and reading them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxfuse.inference.dicom import is_series, load_series, read_series
from voxfuse.metrics._arrays import optional
from voxfuse.metrics.files import ENDINGS, Scan, affine_in_mm, is_image, load_scan
from voxfuse.training.dataset import Subject, file_named, images_in, name_of, numbered, say_left_out


def read_scan(path: Path) -> Scan:
    """Read an image: a file, or the folder of a DICOM series.

    Raises:
        ValueError: it cannot be read.
    """
    return read_series(path) if path.is_dir() else load_scan(path)


def find_studies(channels: Sequence[Path], mask: str = "all") -> list[Subject]:
    """The studies that ``voxfuse predict --input`` names, for a network of any kind.

    Args:
        channels: a file or DICOM series a channel; or a folder a channel, with files or series of
            the same names; or one folder of a file or series a study, or of files
            ``STUDY_0000.nii.gz`` as nnU-Net names them: numbers are channels where those of the
            folder are 0, 1, ... without a gap, else parts of names.
        mask: a file of this name without the ending lies beside the first channel, unless it is
            "all" or "positive".

    A channel that a study lacks is the path where it was looked for, so that reading it names it.

    Raises:
        FileNotFoundError: no such path, or nothing there.
        ValueError: files and folders together, or two files of one channel.
    """
    for path in channels:
        if not path.exists():
            raise FileNotFoundError(f"--input: there is no {path}")
    folders = [path for path in channels if path.is_dir() and not is_series(path)]
    if not folders:
        name, number = numbered(channels[0])
        return [_study(name_of(channels[0]) if number else name, channels, mask)]
    if len(folders) < len(channels):
        other = next(path for path in channels if path not in folders)
        raise ValueError(
            f"--input: got the folder {folders[0]} and the file {other}, expected files or folders"
        )
    found = [_in_folder(folder, mask) for folder in folders]
    studies = []
    for name in dict.fromkeys(name for each in found for name in each):
        images: list[Path] = []
        for folder, each in zip(folders, found, strict=True):
            images += each.get(name, [folder / f"{name}.nii.gz"])
        studies.append(_study(name, images, mask))
    _check_masks(studies, mask)
    return studies


def _check_masks(studies: Sequence[Subject], mask: str) -> None:
    """Raise where one file is the mask of several studies, most of which are not of it."""
    seen: dict[Path, str] = {}
    for study in studies:
        if study.mask is not None and seen.setdefault(study.mask, study.name) != study.name:
            raise ValueError(
                f"--mask: got {mask!r}, which is one file, {study.mask}, for {seen[study.mask]} "
                f"and {study.name}, expected all or positive, or one study"
            )


def _study(name: str, images: Sequence[Path], mask: str) -> Subject:
    outline = None
    if mask not in ("all", "positive"):
        outline = file_named(images[0].parent, mask)
    return Subject(name, tuple(images), None, outline)


def _has_images(folder: Path) -> bool:
    """Whether a folder has images or series, and is no ``--output``."""
    if (folder / "status").is_dir():
        return False
    return bool(images_in(folder)) or any(map(is_series, folder.iterdir()))


def _in_folder(folder: Path, mask: str) -> dict[str, list[Path]]:
    """The files of every study in a folder, in the channels' order; of others it is said."""
    paths: list[Path] = []
    others: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (mask not in ("all", "positive") and name_of(path) == mask):
            continue
        # A link to what is not there, as of git-annex, is a study that fails.
        if (is_image(path) and not path.is_dir()) or is_series(path):
            paths.append(path)
        elif path.is_dir() and _has_images(path):
            others.append(path.name)
    if paths:
        say_left_out(folder, others, "folders of images beside studies")
    numbers = {number for _, number in map(numbered, paths) if number is not None}
    channels = numbers == set(range(len(numbers)))  # else years, or numbers of patients
    found: dict[str, dict[int, Path]] = {}
    for path in paths:
        name, number = numbered(path) if channels else (name_of(path), None)
        other = found.setdefault(name, {}).setdefault(number or 0, path)
        if other != path:
            raise ValueError(f"--input: {other.name} and {path.name} in {folder} are both {name}")
    if not found:
        looked_for = ", ".join(f"*{ending}" for ending in ENDINGS)
        raise FileNotFoundError(f"--input: {folder} has no images ({looked_for}, DICOM series)")
    wanted = sorted({number for numbers in found.values() for number in numbers})
    return {
        name: [numbers.get(k, folder / f"{name}_{k:04d}.nii.gz") for k in wanted]
        for name, numbers in found.items()
    }


@dataclass(frozen=True)
class Header:
    """An image without its voxels."""

    shape: tuple[int, ...]  #: (x, y, z)
    channels: int
    affine: NDArray[np.float64]
    itemsize: int  #: bytes of a voxel in the file
    axes: int = 3  #: of the file


def header_of(path: Path) -> Header:
    """The header of an image.

    Raises:
        ValueError: it cannot be read.
    """
    if path.is_dir():
        series = load_series(path, pixels=False)
        return Header(series.shape, 1, series.affine, series.itemsize)
    nibabel = optional("nibabel", f"Reading {path}")
    try:
        image = nibabel.load(path)
        shape, itemsize = image.shape, int(image.get_data_dtype().itemsize)
    except Exception as error:  # of many kinds
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if len(shape) < 3:
        raise ValueError(f"{path}: got {len(shape)} axes, expected three spatial ones")
    extra = [int(n) for n in shape[3:] if n != 1]
    affine = affine_in_mm(image)
    channels = extra[0] if extra else 1
    return Header(tuple(int(n) for n in shape[:3]), channels, affine, itemsize, len(shape))
