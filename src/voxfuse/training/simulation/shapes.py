"""Shapes of lesions: from a random model, or from masks of real ones.

A shape is a volume and a *score*, a function of the position in mm about the lesion's centre: a
lesion fills the voxels of greatest score that are free, so many that it has its volume. So it gives
way to grey matter, to other lesions and to the grid, while its volume stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from voxfuse.metrics._arrays import as_mask, as_spacing, bounding_box, optional
from voxfuse.metrics.files import find_scans, load_scan
from voxfuse.training.volumes import oriented, placement_of, turn

Array = NDArray[Any]
Floats = NDArray[np.float64]

#: mm3: the least that is a lesion, and the least that is a confluent one.
SMALLEST, CONFLUENT = 2.5, 1000.0

#: mm3: mean volume of the brains that the measured masks are of (1,135, 1,099 and 1,123 ml).
BRAIN_OF_MASKS = 1.12e6


class Shape(Protocol):
    """A lesion that has no place yet."""

    @property
    def volume(self) -> float:
        """mm3."""
        ...

    @property
    def reach(self) -> float:
        """mm: nothing farther from the centre is looked at."""
        ...

    def score(
        self, offsets: Floats, random: np.random.Generator, far: Array, outwards: Floats
    ) -> Floats:
        """Greater where the lesion rather is.

        Args:
            offsets: (3, \\*spatial), positions about the centre, in mm, on a grid.
            random: draws the deformation.
            far: (\\*spatial), the distance to the ventricles in mm.
            outwards: (3,), the unit vector away from the ventricles at the centre.
        """
        ...


class Shapes(Protocol):
    """A source of shapes."""

    def draw(
        self, random: np.random.Generator, count: int, confluent: int, brain_volume: float
    ) -> list[Shape]:
        """So many shapes, the confluent ones first, for a brain of so many mm3."""
        ...


def radius(volume: float) -> float:
    """Of the ball of that volume."""
    return float((0.75 * volume / np.pi) ** (1 / 3))


def smooth_noise(
    shape: Sequence[int], sigma: Floats, random: np.random.Generator
) -> NDArray[np.float64]:
    """Gaussian noise of mean 0 and deviation 1, smoothed by ``sigma`` voxels an axis.

    What is smoother than two voxels is made on a coarser grid, on which it has two, and
    interpolated (linearly, which takes up to a tenth of the variance).
    """
    ndimage = optional("scipy.ndimage", "Simulation")
    factors = np.maximum(np.asarray(sigma) / 2, 1)
    coarse = [n if f == 1 else int(np.ceil(n / f)) + 1 for n, f in zip(shape, factors, strict=True)]
    noise = random.standard_normal(coarse, dtype=np.float32)
    for axis, width in enumerate(sigma / factors):
        noise = ndimage.gaussian_filter1d(noise, width, axis, mode="wrap", truncate=3)
        taps = np.exp(-0.5 * (np.arange(-round(3 * width), round(3 * width) + 1) / width) ** 2)
        noise /= np.sqrt((taps**2).sum()) / taps.sum()
    if (factors > 1).any():
        noise = ndimage.affine_transform(
            noise, 1 / factors, output_shape=tuple(shape), order=1, mode="nearest"
        )
    return noise.astype(np.float64)


def rotation(random: np.random.Generator) -> Floats:
    """A uniformly drawn rotation matrix."""
    q, r = np.linalg.qr(random.standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    if np.linalg.det(q) < 0:
        q[:, 0] *= -1
    return np.asarray(q, np.float64)


def _step(offsets: Floats) -> Floats:
    """The grid's voxel size."""
    return np.array([abs(float(np.diff(offsets[k], axis=k).flat[0])) for k in range(3)], np.float64)


# --- Random ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomShape:
    """An ellipsoid whose radius is perturbed by smooth noise; confluent ones hug the ventricles."""

    volume: float
    axes: tuple[float, float, float]  #: longest first, of product 1
    confluent: bool

    @property
    def reach(self) -> float:
        return 1.5 * self.axes[0] * radius(self.volume) + 3

    def score(
        self, offsets: Floats, random: np.random.Generator, far: Array, outwards: Floats
    ) -> Floats:
        size = radius(self.volume)
        turn = rotation(random)
        # Small lesions beside the ventricles lie along the veins, that is away from them (Dawson's
        # fingers); confluent ones are caps: along them.
        first = outwards if not self.confluent else np.cross(outwards, turn[0])
        axes = np.linalg.qr(np.stack([first, turn[1], turn[2]], axis=1))[0].T
        scaled = np.tensordot(axes, offsets, 1) / (size * np.reshape(self.axes, (3, 1, 1, 1)))
        distance = np.sqrt((scaled**2).sum(0)) + 1e-3
        width = np.maximum(0.35 * size, 0.8) / _step(offsets)
        noise = smooth_noise(distance.shape, width, random)
        result: Floats = -np.log(distance) + (0.3 if self.confluent else 0.2) * noise
        if self.confluent:
            result -= 1.5 * far / size
        return result


@dataclass(frozen=True)
class RandomShapes:
    """The random model of shapes and of their volumes, fitted to the measured ones.

    ln v of focal lesions is normal, cut at 2.5 mm3 and 1 ml; v of confluent ones has Pareto's
    distribution, cut at 1 ml and 47 ml. Together their tail is heavier than a log-normal one's. The
    confluent ones of a head are drawn one from each of as many equally probable ranges.

    Volumes are in mm3 as measured, whatever the size of the head.

    Example:
        >>> import numpy as np
        >>> from voxfuse.training.simulation import RandomShapes
        >>> shapes = RandomShapes().draw(np.random.default_rng(0), 100, 2, brain_volume=1.1e6)
        >>> len(shapes), [round(shape.volume) for shape in shapes[:4]]
        (100, [1246, 2924, 19, 7])
    """

    focal: tuple[float, float] = (2.794, 1.521)  #: mean and deviation of ln v before the cuts
    exponent: float = 0.584  #: of Pareto's distribution: P(V > v) ~ v ** -exponent
    largest: float = 47_000.0  #: mm3

    def draw(
        self, random: np.random.Generator, count: int, confluent: int, brain_volume: float
    ) -> list[Shape]:
        """See :class:`Shapes`."""
        del brain_volume
        share = (random.permutation(confluent) + random.random(confluent)) / max(confluent, 1)
        end = 1 - (CONFLUENT / self.largest) ** self.exponent
        volumes = list(CONFLUENT * (1 - share * end) ** (-1 / self.exponent))
        while len(volumes) < count:
            volume = float(np.exp(random.normal(*self.focal)))
            if SMALLEST <= volume < CONFLUENT:
                volumes.append(volume)
        shapes: list[Shape] = []
        for k, volume in enumerate(volumes):
            ratios = np.exp(random.normal(0, 0.45 if k < confluent else 0.3, 3))
            ratios = np.sort(ratios / np.prod(ratios) ** (1 / 3))[::-1]
            axes = (float(ratios[0]), float(ratios[1]), float(ratios[2]))
            shapes.append(RandomShape(float(volume), axes, k < confluent))
        return shapes


# --- Real -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """A lesion of a mask: signed depth (mm, positive inside) on a grid about its deepest voxel."""

    depth: NDArray[np.float32]
    centre: NDArray[np.float64]  #: voxel
    spacing: NDArray[np.float64]  #: mm
    volume: float  #: mm3
    reach: float  #: mm


@dataclass(frozen=True)
class MaskShape:
    """A template, turned, stretched, bent and scaled."""

    template: Template
    volume: float
    scale: float

    @property
    def reach(self) -> float:
        return 1.25 * self.scale * self.template.reach + 3

    def score(
        self, offsets: Floats, random: np.random.Generator, far: Array, outwards: Floats
    ) -> Floats:
        del far, outwards
        ndimage = optional("scipy.ndimage", "Simulation")
        template, size = self.template, radius(self.volume)
        whole = offsets.shape[1:]
        step = 1 + (np.prod(whole) > 50_000) + (np.prod(whole) > 1_000_000)
        offsets = offsets[:, ::step, ::step, ::step]  # of a large lesion few voxels say enough
        if self.volume < CONFLUENT:
            turn = rotation(random)
        else:  # left and right may be swapped; otherwise it fits its place as it lies
            angles = np.deg2rad(random.uniform(-15, 15, 3))
            turn = np.diag([random.choice([-1.0, 1.0]), 1.0, 1.0])
            for k, angle in enumerate(angles):
                plane = np.eye(3)
                i, j = (k + 1) % 3, (k + 2) % 3
                plane[[i, j, i, j], [i, j, j, i]] = np.cos([angle, angle, 0, 0])
                plane[i, j], plane[j, i] = -np.sin(angle), np.sin(angle)
                turn = plane @ turn
        stretch = np.exp(random.normal(0, 0.1, 3))
        turn = np.diag(stretch / np.prod(stretch) ** (1 / 3)) @ turn
        place = np.tensordot(turn / self.scale, offsets, 1)
        width = np.maximum(0.5 * size, 1.0) / _step(offsets)
        for axis in range(3):
            place[axis] += 0.15 * size / self.scale * smooth_noise(place.shape[1:], width, random)
        index = place / template.spacing.reshape(3, 1, 1, 1) + template.centre.reshape(3, 1, 1, 1)
        top = np.reshape(template.depth.shape, (3, 1, 1, 1)) - 1.0
        inside = np.clip(index, 0, top)
        beyond = (index - inside) * template.spacing.reshape(3, 1, 1, 1)
        result: Floats = ndimage.map_coordinates(template.depth, inside, order=1, mode="nearest")
        result = result - np.sqrt((beyond**2).sum(0))
        if result.shape != whole:
            result = ndimage.affine_transform(
                result, np.full(3, 1 / step), output_shape=whole, order=1, mode="nearest"
            )
        return result


@dataclass(frozen=True)
class MaskShapes:
    """Lesions of real masks: each 18-connected component of 3 mm3 and more is a template.

    Focal ones and confluent ones (1 ml and more) are drawn alike among those of all masks; the
    confluent ones of a head one from each of as many ranges of their volumes.

    Args:
        templates: see :meth:`from_folder`.
        brain_volume: of the heads that the masks are of, mm3. A lesion's volume is scaled by that
            of the host over it.
    """

    templates: tuple[Template, ...]
    brain_volume: float = BRAIN_OF_MASKS
    _focal: tuple[Template, ...] = field(init=False, repr=False)
    _confluent: tuple[Template, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ordered = sorted(self.templates, key=lambda template: template.volume)
        focal = tuple(t for t in ordered if t.volume < CONFLUENT)
        if not focal:
            raise ValueError("templates: got no lesion below 1 ml, expected some")
        confluent = tuple(t for t in ordered if t.volume >= CONFLUENT)
        object.__setattr__(self, "_focal", focal)
        object.__setattr__(self, "_confluent", confluent or focal[-max(1, len(focal) // 20) :])

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        brain_volume: float = BRAIN_OF_MASKS,
        leave_out: Sequence[str] = (),
        pattern: str | None = None,
    ) -> MaskShapes:
        """Read masks.

        Args:
            folder: of NIfTI files, a mask each.
            brain_volume: see the class.
            leave_out: names (of the file, without the ending) that are not read: of patients who
                are validated or tested.
            pattern: where a subject's mask lies, such as ``"{}/lesions.nii.gz"``; default: every
                image of the folder is one.

        Raises:
            FileNotFoundError: no such folder, or no mask in it.
            ValueError: a file cannot be read, or is no mask of 0 and 1; a name to leave out is not
                there.
        """
        found = find_scans(folder, pattern)
        for name in leave_out:
            if name not in found:
                raise ValueError(f"leave_out: got {name}, expected some of {', '.join(found)}")
        templates: list[Template] = []
        for name, path in found.items():
            if name in leave_out:
                continue
            scan = load_scan(path)
            if scan.array.ndim != 3:
                raise ValueError(f"{path}: got shape {scan.array.shape}, expected (x, y, z)")
            try:
                mask = as_mask("mask", scan.array)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: {error}") from None
            turned = oriented(placement_of(scan, path), "RAS").turned
            sizes = [size for _, size in sorted(zip(turned, scan.spacing, strict=True))]
            templates += templates_of(turn(mask, turned), sizes)
        return cls(tuple(templates), brain_volume)

    def draw(
        self, random: np.random.Generator, count: int, confluent: int, brain_volume: float
    ) -> list[Shape]:
        """See :class:`Shapes`."""
        ratio = brain_volume / self.brain_volume
        share = (random.permutation(confluent) + random.random(confluent)) / max(confluent, 1)
        chosen = [self._confluent[int(u * len(self._confluent))] for u in share]
        for place in random.integers(len(self._focal), size=count - confluent):
            chosen.append(self._focal[place])
        return [MaskShape(t, t.volume * ratio, float(np.cbrt(ratio))) for t in chosen]


def templates_of(mask: Array, spacing: float | Sequence[float] = 1.0) -> list[Template]:
    """The lesions of a mask as templates."""
    ndimage = optional("scipy.ndimage", "Simulation")
    sizes = as_spacing(spacing, 3)
    mask = mask[bounding_box(mask)]
    if not mask.size:
        return []
    labels, _ = ndimage.label(mask, ndimage.generate_binary_structure(3, 2))
    found = []
    for k, box in enumerate(ndimage.find_objects(labels), 1):
        lesion = np.pad(labels[box] == k, 2)
        volume = float(lesion.sum() * sizes.prod())
        if volume < SMALLEST:
            continue
        depth = ndimage.distance_transform_edt(lesion, sizes)
        depth -= ndimage.distance_transform_edt(~lesion, sizes)
        centre = np.asarray(np.unravel_index(int(depth.argmax()), depth.shape), np.float64)
        places = (np.argwhere(lesion) - centre) * sizes
        reach = float(np.sqrt((places**2).sum(1)).max())
        found.append(Template(depth.astype(np.float32), centre, sizes, volume, reach))
    return found
