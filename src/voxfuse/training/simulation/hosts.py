"""A head that lesions are put into: its white matter, its ventricles, and what has no lesion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse.metrics._arrays import as_mask, as_spacing, bounding_box, optional

Array = NDArray[Any]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

#: T1 is smoothed by so much, in mm, before it is cut at the levels of :func:`find_tissue`.
SMOOTHING = 0.7
#: Share of a brain's voxels that may be below 0, by more than this share of white matter's level: a
#: spline's overshoots are less, z-scores more.
NEGATIVE, BELOW = 0.1, 0.05


@dataclass(frozen=True)
class Host:
    """What a simulation has to know of a head; made once by :meth:`of`, for any number of seeds.

    Arrays have the extent of the brain's bounding box, ``box``.
    """

    images: dict[str, Array]  #: as they were given, whole
    lesions: Mask  #: real ones, whole
    box: tuple[slice, ...]
    spacing: NDArray[np.float64]  #: mm
    brain_volume: float  #: mm3
    levels: dict[str, float]  #: of white matter, a modality
    deviations: dict[str, float]  #: of white matter, a modality
    white: Mask  #: white matter that a lesion may fill
    wall: Mask  #: between the ventricles and white matter: a lesion may fill it too
    to_ventricles: Floats  #: mm

    @classmethod
    def of(
        cls,
        images: Mapping[str, Array],
        brain: Array | None = None,
        lesions: Array | None = None,
        spacing: float | Sequence[float] = 1.0,
    ) -> Host:
        """Look at a head.

        Args:
            images: modalities of one extent (x, y, z), ``t1`` among them, in the scanner's
                intensities: lesions are multiples of white matter's, as
                :data:`~voxfuse.training.simulation.CONTRASTS` says.
            brain: mask of the brain; default: T1 > 0. Holes in it are filled.
            lesions: mask of the lesions that the head really has; default: none.
            spacing: voxel size in mm.

        Raises:
            ValueError: there is no ``t1``, shapes differ, the brain has no white matter, or a
                modality is no scanner's: its white matter is not above 0, or much of the brain
                below.
            ModuleNotFoundError: scipy is not installed.
        """
        ndimage = optional("scipy.ndimage", "Simulation")
        if "t1" not in images:
            raise ValueError(f"images: got {', '.join(images) or 'none'}, expected t1 among them")
        sizes = as_spacing(spacing, 3)
        for name, image in images.items():
            if image.shape != images["t1"].shape or image.ndim != 3:
                raise ValueError(
                    f"images: got shape {image.shape} of {name}, expected (x, y, z) and that of "
                    f"t1, {images['t1'].shape}"
                )
        inside = images["t1"] > 0 if brain is None else as_mask("brain", brain)
        real = (
            np.zeros(inside.shape, bool) if lesions is None else as_mask("lesions", lesions).copy()
        )
        for what, mask in (("brain", inside), ("lesions", real)):
            if mask.shape != images["t1"].shape:
                raise ValueError(
                    f"{what}: got shape {mask.shape}, expected that of t1, {images['t1'].shape}"
                )
        inside = ndimage.binary_fill_holes(inside)
        if not inside.any():
            raise ValueError("brain: has no voxel")
        box = bounding_box(inside)
        inner, t1 = inside[box], np.asarray(images["t1"][box], np.float32)
        free = inner & ~ndimage.binary_dilation(real[box], np.ones((3, 3, 3)))
        level, deviation = white_mode(t1[free])
        check_level("t1", level, t1[inner])
        white, wall, to_ventricles = find_tissue(t1, inner, level, deviation, sizes)
        white, wall = white & free, wall & free
        if not white.any():
            raise ValueError("images: found no white matter without lesions in t1")
        levels, deviations = {}, {}
        for name, image in images.items():
            values = np.asarray(image[box][white], np.float64)
            levels[name] = float(np.median(values))
            check_level(name, levels[name], image[box][inner])
            deviations[name] = float(values.std())
        return cls(
            dict(images), real, box, sizes, float(inside.sum() * sizes.prod()), levels, deviations,
            white, wall, to_ventricles,
        )  # fmt: skip


def check_level(name: str, level: float, brain: Array) -> None:
    """Raise for intensities of which a lesion's cannot be multiples.

    Args:
        name: of the modality.
        level: of white matter.
        brain: its voxels.

    Raises:
        ValueError: they are normalised, as it seems.
    """
    below = float(np.mean(brain < -BELOW * abs(level)))
    if level > 0 and below <= NEGATIVE:
        return
    found = f"white matter of {level:.3g}" if level <= 0 else f"{below:.0%} of the brain below 0"
    raise ValueError(
        f"images: {name} has {found}, expected the scanner's intensities, above 0, and no z-scores "
        "or the like: lesions are multiples of white matter's"
    )


def white_mode(values: Array) -> tuple[float, float]:
    """The upper mode of T1 in a brain, and the deviation of a Gaussian of that upper flank.

    The mode is the highest intensity at which the histogram (256 bins up to the 99.9th percentile,
    smoothed by three) has a peak of at least a fifth of its greatest. The lower flank is grey
    matter's; so the deviation is that of the upper one: its half width at half height / 1.177.
    """
    ndimage = optional("scipy.ndimage", "Simulation")
    values = values[values > 0]
    if values.size < 100:
        raise ValueError(f"brain: got {values.size} voxels with t1 > 0, expected a brain")
    top = float(np.percentile(values, 99.9)) * 1.1
    counts, edges = np.histogram(values, 256, (0.0, top))
    smooth = ndimage.gaussian_filter1d(counts.astype(np.float64), 3)
    peaks = 1 + np.flatnonzero((smooth[1:-1] > smooth[:-2]) & (smooth[1:-1] >= smooth[2:]))
    peaks = peaks[(peaks > 20) & (smooth[peaks] >= 0.2 * smooth[20:].max())]
    if not peaks.size:
        raise ValueError("images: t1 has no mode inside the brain")
    peak = int(peaks[-1])
    below = np.flatnonzero(smooth[peak:] < smooth[peak] / 2)
    width = int(below[0]) if below.size else 256 - peak
    step = float(edges[1] - edges[0])
    return (peak + 0.5) * step, width * step / 1.177


def find_tissue(
    t1: Floats, brain: Mask, level: float, deviation: float, spacing: NDArray[np.float64]
) -> tuple[Mask, Mask, Floats]:
    """White matter, the ventricles' wall, and the distance to the ventricles in mm.

    - *White matter*: smoothed T1 above what parts white from grey (Otsu's threshold between 0.6 and
      1.25 of white matter's mode, but no less than 1.25 deviations below it) and below 1.25 of the
      mode, holes of a voxel closed, 3 mm and more below the brain's surface, in pieces of 1 ml and
      more.
    - *Ventricles*: smoothed T1 below half of white matter's (cerebrospinal fluid), more than 12 mm
      below the surface, opened by a cube of three voxels, which fissures do not pass. Of its pieces
      of 0.3 ml and more, those whose centre lies within 35 mm of that of the brain; if there is
      none, the brain's centre stands for them.
    - *Wall*: what lies within 2 mm of ventricles and of white matter, and is not fluid.
    """
    ndimage = optional("scipy.ndimage", "Simulation")
    smooth = ndimage.gaussian_filter(t1, SMOOTHING / spacing)
    depth = ndimage.distance_transform_edt(brain, spacing)
    tissue = smooth[brain & (smooth > 0.6 * level) & (smooth < 1.25 * level)]
    least = max(_otsu(tissue), level - 1.25 * deviation)
    inner = ndimage.binary_closing((smooth >= least) & (smooth <= 1.25 * level), np.ones((3, 3, 3)))
    inner &= (depth >= 3) & (smooth >= 0.6 * level)
    white = _pieces(inner, 1000 / spacing.prod())
    fluid = ndimage.binary_opening((smooth < 0.5 * level) & (depth > 12), np.ones((3, 3, 3)))
    deep, count = ndimage.label(_pieces(fluid, 300 / spacing.prod()))
    centre = np.asarray(ndimage.center_of_mass(brain))
    ventricles = np.zeros(brain.shape, bool)
    for k, place in enumerate(ndimage.center_of_mass(deep > 0, deep, range(1, count + 1)), 1):
        if np.linalg.norm((np.asarray(place) - centre) * spacing) <= 35:
            ventricles |= deep == k
    if not ventricles.any():
        ventricles[tuple(np.rint(centre).astype(int))] = True
    far = ndimage.distance_transform_edt(~ventricles, spacing).astype(np.float32)
    wall = brain & (far <= 2) & (smooth >= 0.6 * level)
    wall &= ndimage.binary_dilation(white, iterations=max(1, round(2 / float(spacing.min()))))
    return white, wall, far


def _otsu(values: Array) -> float:
    """The threshold between two classes that differ most: of greatest variance between them."""
    counts, edges = np.histogram(values, 128)
    middle = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    sums = np.cumsum(counts * middle)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(middle[np.nanargmax(between)])


def _pieces(mask: Mask, least: float) -> Mask:
    """The components of a mask that have at least so many voxels."""
    ndimage = optional("scipy.ndimage", "Simulation")
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept: Mask = (sizes >= least)[labels]
    return kept
