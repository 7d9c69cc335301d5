"""Reading a head MR from NIfTI, the grids the demo computes on, and writing the mask back.

Every grid covers the same field of view, so that going from one to another is a plain
interpolation: the file's own voxels, the native 1 mm grid, and the 128x128x128 grid the network
was trained on. Arrays are in the order right, anterior, superior (x to the right, y to the front,
z upwards), whatever the order in the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from nibabel import orientations
from torch import Tensor

TRAINING_SHAPE = (128, 128, 128)


class ImageError(Exception):
    """The user's file cannot be used; the message says why and what would do."""


@dataclass(frozen=True)
class Grid:
    """One head on one grid. ``image`` and ``mask``: (x, y, z), scaled to [0, 1] and bool."""

    name: str
    image: Tensor
    mask: Tensor | None
    spacing: tuple[float, float, float]  # mm


@dataclass(frozen=True)
class Head:
    """A head MR as it lies in its file, and what is needed to write a mask beside it."""

    path: Path
    file: nibabel.Nifti1Image
    image: Tensor  # (x, y, z), right-anterior-superior, scaled to [0, 1]
    mask: Tensor | None
    spacing: tuple[float, float, float]
    notes: tuple[str, ...]  # what was done to the image, for the reader

    def native(self) -> Grid:
        """The grid of 1 mm voxels over the same field of view."""
        shape = tuple(
            max(1, round(size * step))
            for size, step in zip(self.image.shape, self.spacing, strict=True)
        )
        return _regrid(self, "native", shape)

    def training(self) -> Grid:
        """The 128x128x128 grid, which is what the network has learned from."""
        return _regrid(self.native(), "128", TRAINING_SHAPE)

    def save_mask(self, probability: Tensor, path: Path) -> None:
        """Write :func:`is_brain` as a mask on the file's own grid, with its affine."""
        mask = is_brain(resample(probability, tuple(self.image.shape)))
        array = mask.cpu().numpy().astype(np.uint8)
        here = orientations.axcodes2ornt(("R", "A", "S"))
        there = orientations.io_orientation(self.file.affine)
        array = orientations.apply_orientation(array, orientations.ornt_transform(here, there))
        header = self.file.header.copy()
        header.set_data_dtype(np.uint8)
        header.set_slope_inter(1, 0)
        header["cal_min"], header["cal_max"] = 0, 1
        header["descrip"] = b"brain mask"
        written = nibabel.Nifti1Image(array.reshape(self.file.shape), self.file.affine, header)
        nibabel.save(written, path)


def is_brain(probability: Tensor) -> Tensor:
    """Threshold at 0.5; a tie is no brain.

    Ties are not rare: where two patches contradict each other with certainty, the constant window
    gives exactly 0.5.
    """
    return probability > 0.5


def _regrid(source: Head | Grid, name: str, shape: tuple[int, ...]) -> Grid:
    spacing = [
        step * old / new
        for step, old, new in zip(source.spacing, source.image.shape, shape, strict=True)
    ]
    mask = source.mask
    return Grid(
        name,
        resample(source.image, shape),
        None if mask is None else resample(mask.float(), shape, nearest=True) > 0.5,
        (spacing[0], spacing[1], spacing[2]),
    )


def resample(volume: Tensor, shape: tuple[int, ...], *, nearest: bool = False) -> Tensor:
    """Interpolate (x, y, z) to ``shape`` over the same field of view."""
    if tuple(volume.shape) == tuple(shape):
        return volume
    if nearest:
        return F.interpolate(volume[None, None], size=shape, mode="nearest")[0, 0]
    return F.interpolate(volume[None, None], size=shape, mode="trilinear", align_corners=False)[
        0, 0
    ]


def read_head(image: Path, mask: Path | None = None, *, clip: bool) -> Head:
    """Read a 3D head MR, and the brain mask that goes with it if there is one.

    Args:
        image: NIfTI file (.nii or .nii.gz) with one 3D volume.
        mask: NIfTI file on the same grid; voxels > 0 are brain.
        clip: clip intensities at the 99.9th percentile before scaling them to [0, 1]. A few
            bright outliers would otherwise squeeze the rest of the range (one voxel at ten times
            the maximum costs this network 7 points of Dice).

    Raises:
        ImageError: the file is missing, is no NIfTI, or does not hold what is needed.
    """
    file, array, spacing = _read(image, "--image")
    notes: list[str] = []
    finite = np.isfinite(array)
    if not finite.all():
        notes.append(f"{int((~finite).sum())} voxels that are not finite were set to the minimum")
        if not finite.any():
            raise ImageError(f"--image: {image} has no finite voxel")
        array = np.where(finite, array, array[finite].min())
    low, high = float(array.min()), float(array.max())
    if clip:
        high = float(np.percentile(array, 99.9))
        notes.append(f"intensities clipped at their 99.9th percentile ({high:.6g})")
    if not high > low:
        raise ImageError(f"--image: {image} is constant ({low:.6g}); there is nothing to see in it")
    scaled = ((np.clip(array, low, high) - low) / (high - low)).astype(np.float32)
    brain = None
    if mask is not None:
        mask_file, mask_array, _ = _read(mask, "--mask")
        if mask_array.shape != array.shape:
            raise ImageError(
                f"--mask: {mask} has shape {_by(mask_array.shape)}, but the image "
                f"{_by(array.shape)}; both must lie on the same grid"
            )
        if not np.allclose(mask_file.affine, file.affine, atol=1e-2):
            raise ImageError(
                f"--mask: {mask} has another affine than the image; both must lie on the same grid"
            )
        if not (mask_array > 0).any():
            raise ImageError(f"--mask: {mask} is empty; brain voxels must be > 0")
        brain = torch.from_numpy(np.ascontiguousarray(mask_array > 0))
    if max(abs(step - 1) for step in spacing) > 0.01:
        notes.append(
            f"resampled from {_by(array.shape)} voxels of {_by(round(s, 3) for s in spacing)} mm "
            "to 1 mm (image trilinear, mask nearest)"
        )
    extent = [round(size * step) for size, step in zip(array.shape, spacing, strict=True)]
    if min(extent) < 32:
        raise ImageError(f"--image: {image} covers {_by(extent)} mm; a whole head is needed")
    tensor = torch.from_numpy(np.ascontiguousarray(scaled))
    return Head(image, file, tensor, brain, spacing, tuple(notes))


def _read(
    path: Path, option: str
) -> tuple[nibabel.Nifti1Image, np.ndarray, tuple[float, float, float]]:
    """Return the file, its array in right-anterior-superior order, and the voxel size in mm."""
    if not path.is_file():
        raise ImageError(f"{option}: there is no file {path}")
    try:
        file = nibabel.load(path)
        if not isinstance(file, nibabel.Nifti1Image | nibabel.Nifti2Image):
            raise ImageError(f"{option}: {path} is not a NIfTI file (.nii or .nii.gz)")
        stored = np.asarray(file.dataobj)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise ImageError(f"{option}: {path} cannot be read as NIfTI: {error}") from error
    volume = stored.reshape(stored.shape[:3]) if set(stored.shape[3:]) <= {1} else stored
    if volume.ndim != 3:
        raise ImageError(
            f"{option}: {path} has {stored.ndim} axes {_by(stored.shape)}, expected one 3D volume; "
            "extract one with, for example, nibabel.four_to_three"
        )
    if volume.dtype.kind not in "biuf":
        raise ImageError(f"{option}: {path} holds {stored.dtype}, expected one number a voxel")
    order = orientations.io_orientation(file.affine)
    if np.isnan(order).any():
        raise ImageError(f"{option}: {path} has an affine that maps an axis to nothing")
    upright = orientations.apply_orientation(volume.astype(np.float64), order)
    steps = np.linalg.norm(file.affine[:3, :3], axis=0)
    axes = np.argsort(order[:, 0])
    spacing = tuple(float(steps[axis]) for axis in axes)
    return file, upright, (spacing[0], spacing[1], spacing[2])


def _by(sizes: Iterable[float]) -> str:
    return "x".join(str(size) for size in sizes)
