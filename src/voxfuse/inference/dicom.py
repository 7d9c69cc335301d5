"""DICOM: a series as a scan, and a segmentation as DICOM-SEG."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from voxfuse._backends import versions
from voxfuse._files import write_whole
from voxfuse.metrics.files import Scan

#: What every slice has to say.
_NEEDED = (
    "Rows", "Columns", "BitsAllocated", "PixelSpacing", "ImageOrientationPatient",
    "ImagePositionPatient", "SeriesInstanceUID", "PhotometricInterpretation",
)  # fmt: skip
#: What a table of contents is, in its first lines (MediaStorageSOPClassUID).
_DIRECTORY = b"1.2.840.10008.1.3.10"
#: Endings of slices, where their names have one.
_ENDINGS = (".dcm", ".ima", ".dicom")
#: What slices of a series differ by in their names: numbers, or digests.
_NUMBER = re.compile(r"[0-9a-f]{8,}|\d+")
#: Files of a folder that are looked at before it is taken for no series.
_LOOKED_AT = 64
#: Positions, in mm, and direction cosines that differ by no more are the same.
_POSITION, _COSINE = 0.01, 1e-3
#: Slice gaps that differ by a smaller share are the same.
_GAP = 0.01


def _pydicom() -> Any:
    try:
        import pydicom
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'DICOM needs pydicom: pip install "voxfuse[dicom]"', name=error.name
        ) from None
    return pydicom


def is_series(path: Path) -> bool:
    """Whether a folder has DICOM files, or what is called so."""
    if not path.is_dir():
        return False
    files = [file for file in sorted(path.iterdir()) if not file.is_dir()]
    return any(_is_called_slice(file) or is_dicom(file) for file in files[:_LOOKED_AT])


def _is_called_slice(file: Path) -> bool:
    name = file.name.lower()
    return name.endswith(_ENDINGS) and not name.startswith(".")


def is_dicom(path: Path) -> bool:
    """Whether a file is of DICOM, but no medium's table of contents (DICOMDIR)."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(512)
    return head[128:132] == b"DICM" and _DIRECTORY not in head


def _damage(file: Path) -> str:
    """What is wrong with a file that is not of DICOM; "" of a medium's table of contents."""
    if not file.exists():
        return "is a link to a file that is not there"
    with file.open("rb") as opened:
        head = opened.read(132)
    if head[128:] == b"DICM":
        return ""
    if len(head) < 132:
        return "is cut off" if head else "is empty"
    return "lacks the preamble of DICOM, or is damaged"


@dataclass(frozen=True)
class Series:
    """Slices of one grid, in the order of their places."""

    slices: list[Any]  #: of pydicom
    affine: NDArray[np.float64]  #: of (column, row, slice) in RAS
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of a stored voxel."""
        return int(self.slices[0].BitsAllocated) // 8


def load_series(folder: Path, pixels: bool = True) -> Series:
    """The slices of a folder, checked to be all of a regular grid.

    Files beside them that are not named as slices are, and hidden ones, are left out, as is DICOM
    without images.

    Raises:
        ValueError: several series, or none; a slice that does not say where it lies; another
            grid or orientation among the slices; two in one place; one that is
            missing; a file that is named as a slice, but is empty, cut off or without DICOM's
            preamble; pixels that are no single grey value.
        ModuleNotFoundError: pydicom is not installed.
    """
    pydicom = _pydicom()
    slices: list[Any] = []
    forms: set[str] = set()  # of their names
    placeless: dict[str, Path] = {}  # an image of each series that lies nowhere
    imageless: dict[Path, str] = {}  # and what it is of
    others: list[Path] = []
    for file in sorted(folder.iterdir()):
        if file.is_dir() or file.name.startswith("."):
            continue
        if not is_dicom(file):
            others.append(file)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of values that do not matter here
                found = pydicom.dcmread(file, stop_before_pixels=not pixels)
        except Exception as error:  # of many kinds
            raise ValueError(f"{file}: cannot be read: {error}") from None
        if "ImagePositionPatient" in found and "Rows" in found:
            _check_slice(file, found)
            slices.append(found)
            forms.add(_form(file))
        elif int(found.get("NumberOfFrames", 1)) > 1:
            raise ValueError(f"{file}: has several frames, expected a file a slice")
        elif "Rows" in found:
            placeless.setdefault(str(found.get("SeriesInstanceUID")), file)
        else:
            imageless[file] = str(found.get("SOPClassUID", ""))
    damaged = {
        file: _damage(file) for file in others if _is_called_slice(file) or _form(file) in forms
    }
    kinds = {str(one.get("SOPClassUID", "")) for one in slices}
    for file, kind in imageless.items():
        if any(one.startswith(kind) for one in kinds):  # it may be cut off as well
            damaged[file] = "has no Rows and is cut off, or is no slice"
    for file, damage in damaged.items():
        if damage:
            raise ValueError(
                f"{file}: {damage}; expected a slice: copy it again, or move it out of the series"
            )
    if not slices:
        raise ValueError(f"{folder}: has no slices with a position (ImagePositionPatient)")
    count = len({str(s.SeriesInstanceUID) for s in slices})
    if count > 1:
        raise ValueError(f"{folder}: has slices of {count} series, expected one a folder")
    lost = placeless.get(str(slices[0].SeriesInstanceUID))
    if lost is not None:
        raise ValueError(f"{lost}: has no ImagePositionPatient, which other slices have")
    return _arranged(folder, slices)


def _form(file: Path) -> str:
    """A file's name without what the slices of a series differ by."""
    return _NUMBER.sub("0", file.name.lower())


def _check_slice(file: Path, one: Any) -> None:
    for name in _NEEDED:
        value = one.get(name)
        if value is None or (hasattr(value, "__len__") and not len(value)):
            raise ValueError(f"{file}: has no {name}")
    if "ModalityLUTSequence" in one:
        raise ValueError(
            f"{file}: has a table of values (ModalityLUTSequence), expected RescaleSlope and "
            "RescaleIntercept"
        )
    for name in ("RescaleSlope", "RescaleIntercept"):
        if name in one and one.get(name) is None:
            raise ValueError(f"{file}: has an empty {name}")


def _arranged(folder: Path, slices: list[Any]) -> Series:
    first = slices[0]
    for name, tolerance in (
        ("Rows", 0.0),
        ("Columns", 0.0),
        ("PixelSpacing", 1e-4),
        ("ImageOrientationPatient", _COSINE),
    ):
        values = np.array([np.atleast_1d(np.asarray(s[name].value, float)) for s in slices])
        if float(np.ptp(values, axis=0).max()) > tolerance:
            raise ValueError(f"{folder}: {name} differs between the slices of the series")
    if first.get("SamplesPerPixel", 1) != 1 or first.PhotometricInterpretation != "MONOCHROME2":
        raise ValueError(
            f"{folder}: got {first.PhotometricInterpretation}, expected grey values (MONOCHROME2)"
        )
    along_row, along_column = np.asarray(first.ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    positions = np.array([np.asarray(s.ImagePositionPatient, float) for s in slices])
    order = np.argsort(positions @ normal, kind="stable")
    slices, positions = [slices[k] for k in order], positions[order]
    depths = positions @ normal
    step = _step(folder, slices, depths)
    straight = positions[0] + (depths - depths[0])[:, None] * normal
    shift = float(np.linalg.norm(positions - straight, axis=1).max())
    if shift > max(_POSITION, 0.01 * step):
        raise ValueError(
            f"{folder}: slices are shifted by up to {shift:.3g} mm across their normal (a tilted "
            "gantry?), expected a regular grid"
        )
    rows, columns = (float(x) for x in first.PixelSpacing)
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1], lps[:3, 2] = along_row * columns, along_column * rows, normal * step
    lps[:3, 3] = positions[0]
    shape = (int(first.Columns), int(first.Rows), len(slices))
    return Series(slices, np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps, shape)


def _step(folder: Path, slices: Sequence[Any], depths: NDArray[np.float64]) -> float:
    """The distance between neighbours."""
    if len(slices) == 1:
        only = slices[0]
        return float(only.get("SpacingBetweenSlices") or only.get("SliceThickness") or 1.0)
    gaps = np.diff(depths)
    if gaps.min() < _POSITION:
        raise ValueError(f"{folder}: two slices lie in one place, {depths[gaps.argmin()]:.3f} mm")
    step = float(np.median(gaps))
    wide = int(gaps.argmax())
    if gaps[wide] > 1.5 * step or (len(gaps) == 2 and gaps.max() > 1.5 * gaps.min()):
        raise ValueError(
            f"{folder}: a slice is missing between {depths[wide]:.3f} and {depths[wide + 1]:.3f} "
            f"mm, where {gaps[wide]:.3f} mm lie between two, elsewhere {gaps.min():.3f}"
        )
    if float(np.abs(gaps - step).max()) > max(_GAP * step, _POSITION):
        raise ValueError(
            f"{folder}: slices lie {gaps.min():.3f} to {gaps.max():.3f} mm apart, expected one "
            "distance"
        )
    return float(depths[-1] - depths[0]) / (len(slices) - 1)


def read_series(folder: Path) -> Scan:
    """A series as a scan: (column, row, slice) float32, rescaled slice by slice, in RAS.

    Raises:
        ValueError: see :func:`load_series`; or pixels cannot be decoded.
    """
    series = load_series(folder)
    array = np.empty(series.shape, np.float32)
    for k, one in enumerate(series.slices):
        try:
            stored = one.pixel_array
        except Exception as error:  # of the decoder
            raise ValueError(f"{folder}: pixels cannot be decoded: {error}") from None
        slope = float(one.get("RescaleSlope", 1))
        array[:, :, k] = stored.T.astype(np.float64) * slope + float(one.get("RescaleIntercept", 0))
    return Scan(array, series.affine, folder)


def write_segmentation(
    labels: NDArray[Any], folder: Path, path: Path, digest: str, values: Sequence[int]
) -> None:
    """Write labels on a series's grid as DICOM-SEG, a segment a value, present or not.

    Args:
        labels: (column, row, slice), as :func:`read_series` has them.
        folder: the series.
        path: a file, which appears when it is whole.
        digest: of the model, for the description of the algorithm.
        values: of labels above the background, in the order of the segments.

    Raises:
        ValueError: see :func:`load_series`; labels of another shape.
        ModuleNotFoundError: highdicom is not installed.
    """
    try:
        import highdicom
        from pydicom.sr.codedict import codes
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'DICOM-SEG needs highdicom: pip install "voxfuse[dicom]"', name=error.name
        ) from None
    series = load_series(folder, pixels=False)
    if labels.shape != series.shape:
        raise ValueError(f"{folder}: has shape {series.shape}, but the labels {labels.shape}")
    for one in series.slices:  # which some scanners leave out
        if one.get("SliceThickness") is None:
            one.SliceThickness = f"{np.linalg.norm(series.affine[:3, 2]):.6g}"
    version = versions()["voxfuse"]
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=digest.removeprefix("sha256:")[:16],
        version=version,
        family=codes.DCM.ArtificialIntelligence,
    )
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=f"label {value}",
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, value in enumerate(values, 1)
    ]
    numbers = np.zeros(max(values) + 1, np.uint8 if len(values) < 256 else np.uint16)
    numbers[list(values)] = np.arange(1, len(values) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = highdicom.seg.Segmentation(
            source_images=series.slices,
            pixel_array=np.ascontiguousarray(numbers[labels].transpose(2, 1, 0)),
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=described,
            series_instance_uid=highdicom.UID(),
            series_number=1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="voxfuse",
            manufacturer_model_name="voxfuse predict",
            software_versions=version,
            device_serial_number="0",
        )

    def write(file: BinaryIO) -> None:
        made.save_as(file)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)
