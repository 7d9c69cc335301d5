"""A folder of heads that no intensity threshold segments: lesions are known by two modalities."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np


def write_head(
    folder: Path,
    name: str,
    seed: int,
    shape: tuple[int, ...] = (40, 44, 36),
    lesions: int = 8,
    affine: np.ndarray | None = None,
) -> None:
    """Write flair, t1 and lesions. Lesions are bright in FLAIR and dark in T1; others either."""
    random = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    brain = sum(x**2 for x in grid) < 0.9
    inner = np.argwhere(sum(x**2 for x in grid) < 0.55)

    def blobs(count: int) -> np.ndarray:
        mask = np.zeros(shape, bool)
        places = np.indices(shape)
        for centre in inner[random.integers(len(inner), size=count)]:
            squared = sum((p - c) ** 2 for p, c in zip(places, centre, strict=True))
            mask |= squared < random.uniform(1.5, 3) ** 2
        return mask

    bright, dark, lesion = blobs(2 * lesions), blobs(2 * lesions), blobs(lesions)
    flair = 100 + 10 * random.standard_normal(shape) + 40 * ((bright & ~dark) | lesion)
    t1 = 150 + 10 * random.standard_normal(shape) - 40 * ((dark & ~bright) | lesion)
    (folder / name).mkdir(parents=True)
    affine = np.diag([1.0, 1.0, 1.0, 1.0]) if affine is None else affine
    for file, array in {
        "flair": np.where(brain, flair, 0).astype(np.float32),
        "t1": np.where(brain, t1, 0).astype(np.float32),
        "lesions": (lesion & brain & ~(bright ^ dark)).astype(np.uint8),
    }.items():
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / name / f"{file}.nii.gz")


def write_heads(folder: Path, names: list[str], **options: object) -> Path:
    """A folder of several."""
    for seed, name in enumerate(names):
        write_head(folder, name, seed, **options)
    return folder


#: A configuration for them that trains in seconds.
SECTIONS: dict[str, dict[str, object]] = {
    "data": {
        "images": ["flair", "t1"],
        "label": "lesions",
        "labels": {"background": 0, "lesion": 1},
        "test": ["c"],
    },
    "sampling": {"patch": [16, 16, 16], "batch": 2},
    "network": {"features": [4, 8]},
    "training": {"steps": 12, "log_every": 3, "checkpoint_every": 5, "threads": 1},
    "prediction": {"batch": 16},
}
