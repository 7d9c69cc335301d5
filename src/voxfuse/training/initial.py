"""A first configuration for a folder: every default, and what the files say."""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from voxfuse.metrics.files import is_image, load_scan
from voxfuse.training.config import IGNORE, Config, DataOptions
from voxfuse.training.dataset import (
    DataError,
    file_of,
    find_dataset,
    name_of,
    patients_of,
    read_table,
)
from voxfuse.training.volumes import oriented, placement_of

#: What a file of labels is called, as a part of its name.
LABEL_NAMES = ("lesion", "label", "seg", "consensus", "truth", "mask")

#: Values that a file of labels has at most.
MOST_LABELS = 64


def initial_config(folder: str | Path) -> Config:
    """The configuration that fits a folder: modalities, labels, patients, a patch.

    In a folder of subjects, the files that all of them have are modalities, but for the one that is
    named as labels are ("lesion", "label", "seg", "consensus", "truth" or "mask" in its name). A
    table with columns subject and patient is taken for the patients. The patch is 32^3, or as much
    of the smallest scan as the network's coarsest level allows.

    Args:
        folder: where the data lie; see :func:`voxfuse.training.dataset.find_dataset`.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        DataError: no file is named as labels are, or it has no labels; a table of patients lacks
            subjects or patients.
    """
    folder = Path(folder)
    options = DataOptions()
    if not (folder / "dataset.json").is_file():
        if not folder.is_dir():
            raise FileNotFoundError(f"--init: {folder} is no folder")
        _look_into(folder, options)
    dataset = find_dataset(folder, options)
    options.images, options.labels = list(dataset.images), dict(dataset.labels)
    if dataset.ignored is not None:
        options.labels[IGNORE] = dataset.ignored
    subjects = list(dataset.subjects.values())
    patients = {subject.group or subject.name for subject in subjects}
    if len(patients) > 4 and not any(dataset.given.get(x) for x in ("validation", "test")):
        options.validation_share = 0.2
    config = Config(data=options)
    shapes = []
    whole = [subject for subject in subjects if subject.images[0].exists()]
    for subject in (whole or subjects)[:20]:  # what others lack is said when they are read
        scan = load_scan(subject.images[0])
        shapes.append(oriented(placement_of(scan, scan.path), options.orientation).turned_shape)
        # Air in CT, half of a scan of mean 0: "positive" would be no body. A spline's overshoots
        # at the edge of a brain are less.
        if scan.array.min() < -0.05 * scan.array.max():
            options.mask = "all"
    smallest = np.min(shapes, axis=0)
    config.sampling.patch = [max(16, min(32, int(n) // 8 * 8)) for n in smallest]
    config.network.options = {"features": [8, 16, 32, 64]}
    config.loss.options = {"batch": True, "include_background": False}
    return config


def _look_into(folder: Path, options: DataOptions) -> None:
    """Modalities, labels and patients of a folder of subjects."""
    found: Counter[str] = Counter()
    places = sorted(path for path in folder.iterdir() if path.is_dir())
    held: dict[str, set[str]] = {}
    for place in places:
        names = (name_of(path) for path in place.iterdir() if is_image(path))
        # BraTS_001/BraTS_001_flair.nii.gz is flair.
        held[place.name] = {
            name[len(place.name) + 1 :]
            if name.startswith((f"{place.name}_", f"{place.name}-"))
            else name
            for name in names
        }
        found.update(held[place.name])
    if not found:
        raise FileNotFoundError(
            f"--init: {folder} has no subfolders with images, and no dataset.json"
        )
    label = _label_of(folder, found)
    subjects = [name for name, names in held.items() if label in names]
    scanned = sum(1 for names in held.values() if names)
    if 2 * len(subjects) < scanned:
        raise DataError(
            f"--init: {label}, which is named as labels are, is in {len(subjects)} of {scanned} "
            f"folders of {folder}; expected the same file names in each, such as flair.nii.gz (or "
            "FOLDER_flair.nii.gz in FOLDER)"
        )
    common = set.intersection(*(held[name] for name in subjects)) - {label}
    images = sorted(x for x in common if not any(name in x.lower() for name in LABEL_NAMES))
    images = [x for x in images if x.lower() not in ("brain", "brainmask", "brain_mask")]
    if not images:
        raise DataError(f"--init: the subjects of {folder} have no modality in common")
    if "flair" in images:  # the mask of FLAIR is the most usual one
        images = ["flair", *(x for x in images if x != "flair")]
    options.images, options.label = images, label
    options.labels = _values(folder, label, subjects)
    options.groups = _patients(folder, subjects)


def _label_of(folder: Path, found: Counter[str]) -> str:
    for part in LABEL_NAMES:
        names = [name for name, _ in found.most_common() if part in name.lower()]
        names = [name for name in names if "brain" not in name.lower()]
        if names:
            return names[0]
    listed = ", ".join(sorted(found)[:6])
    raise DataError(
        f"--init: {folder} has files {listed}, none of which is named as labels are "
        f"({', '.join(LABEL_NAMES)})"
    )


def _values(folder: Path, label: str, subjects: Sequence[str]) -> dict[str, int]:
    """The values of the labels of the first subjects, named by number; one is the lesion."""
    values: set[int] = {0}
    for subject in subjects[:20]:
        path = file_of(folder / subject, label)
        assert path is not None
        array = load_scan(path).array
        found = np.unique(array)
        if found.size > MOST_LABELS or not np.allclose(found, np.rint(found), atol=1e-3):
            raise DataError(f"{subject}: {path} has {found.size} values, expected whole labels")
        values |= {int(value) for value in np.rint(found)}
    if len(values) == 2:
        return {"background": 0, "lesion": max(values)}
    return {"background" if v == 0 else f"label_{v}": v for v in sorted(values)}


def _patients(folder: Path, subjects: Sequence[str]) -> str:
    for path in sorted(folder.glob("*.csv")):
        try:
            rows = read_table(path)
        except (ValueError, csv.Error) as error:
            warnings.warn(f"--init: {path} was not read: {error}", stacklevel=4)
            continue
        columns = set(rows[0]) if rows else set()
        if {"subject", "patient"} <= columns:
            missing = sorted(set(subjects) - set(patients_of(path, "--init")))
            if missing:
                raise DataError(
                    f"--init: {path} has columns subject and patient, but no row of "
                    f"{', '.join(missing[:5])}{', ...' if missing[5:] else ''}"
                )
            return path.name
        if all(name in " ".join(columns).lower() for name in ("subject", "patient")):
            warnings.warn(
                f"--init: {path} was not read: got the columns {', '.join(rows[0])}, expected "
                "subject and patient, with a comma between",
                stacklevel=4,
            )
    return ""
