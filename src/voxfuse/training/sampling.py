"""Which patches a step has. Every random number is a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxfuse.training.config import SamplingOptions
from voxfuse.training.dataset import IGNORED
from voxfuse.training.volumes import Volume

#: What a step's numbers are for: each purpose has a stream of its own.
SAMPLING, AUGMENTATION, NETWORK = range(3)


def generator(seed: int, step: int, purpose: int) -> np.random.Generator:
    """Random numbers of a step, whatever was drawn before it."""
    return np.random.default_rng([seed, step, purpose])


@dataclass
class Patch:
    """A part of a subject, (C, \\*patch) and (\\*patch)."""

    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Place:
    """Where a patch lies."""

    subject: str
    origin: tuple[int, ...]
    relaxed: bool = False  #: fewer lesion voxels than were asked for


class Sampler:
    """Draws the patches of a step from subjects in memory.

    A patient is drawn with equal probability, then one of their scans, then the place:

    - "balanced": of the patches of all steps the share ``foreground`` lies about a voxel of a
      class, each class of the subject with equal probability; the others about one of the mask.
    - "lesions" (Hashemi et al. 2018): about a lesion voxel; accepted if the central half along each
      axis has ``minimum_voxels`` lesion voxels, ``relaxed_voxels`` from step ``relax_after`` on;
      else drawn again, ``draws`` times at most, after which the patch with most is taken and called
      relaxed. Subjects with fewer than ``minimum_subject_voxels`` (``relaxed_subject_voxels``) are
      left out, but for those without a lesion: their patches are uniform.
    - "uniform": about a voxel of the mask.

    The voxel lies off the patch's centre by up to ``jitter`` of its extent, and the patch is moved
    into the volume. Smaller volumes are padded with background. Ignored voxels are no lesion, and
    no patch lies about one.

    Args:
        volumes: with labels; by subject.
        options: the section ``[sampling]``.
        groups: of each subject, its patient.
        seed: see :func:`generator`.

    Raises:
        ValueError: no subject has what is asked for.
    """

    def __init__(
        self,
        volumes: Mapping[str, Volume],
        options: SamplingOptions,
        groups: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        self.options = options
        self.seed = seed
        self.patch = tuple(options.patch)
        self.volumes = {name: _padded(volume, self.patch) for name, volume in volumes.items()}
        self.inside: dict[str, NDArray[np.int64]] = {}
        self.classes: dict[str, list[NDArray[np.int64]]] = {}
        for name, volume in self.volumes.items():
            assert volume.label is not None
            label = volume.label.ravel()
            foreground = np.flatnonzero((label > 0) & (label != IGNORED))
            kinds = label[foreground]
            self.inside[name] = np.flatnonzero(volume.mask.ravel() & (label != IGNORED))
            self.classes[name] = [foreground[kinds == c] for c in np.unique(kinds)]
        if options.method != "uniform" and not any(self.classes.values()):
            raise ValueError(
                f"sampling.method: got {options.method!r}, but no training subject has a voxel of "
                "a lesion or other foreground; 'uniform' needs none"
            )
        self.groups = {name: (groups or {}).get(name) or name for name in volumes}
        self.patients = self._patients(options.minimum_subject_voxels)
        self.later_patients = self._patients(options.relaxed_subject_voxels)

    def _patients(self, least: int) -> list[list[str]]:
        """The scans of every patient; for "lesions", of ``least`` lesion voxels or none at all."""
        scans: dict[str, list[str]] = {}
        enough = False
        for name in self.volumes:
            lesion = sum(voxels.size for voxels in self.classes[name])
            if self.options.method != "lesions" or lesion == 0 or lesion >= least:
                scans.setdefault(self.groups[name], []).append(name)
                enough = enough or lesion > 0
        if self.options.method == "lesions" and not enough:
            raise ValueError(
                f"sampling.method: got 'lesions', but no training subject has {least} lesion "
                "voxels (minimum_subject_voxels, relaxed_subject_voxels)"
            )
        return list(scans.values())

    def places(self, step: int) -> list[Place]:
        """Where the patches of a step lie."""
        random = generator(self.seed, step, SAMPLING)
        relaxed = step >= self.options.relax_subjects_after
        patients = self.later_patients if relaxed else self.patients
        found = []
        for k in range(self.options.batch):
            scans = patients[random.integers(len(patients))]
            name = scans[random.integers(len(scans))]
            found.append(self._place(name, step, k, random))
        return found

    def _place(self, name: str, step: int, k: int, random: np.random.Generator) -> Place:
        options, classes = self.options, self.classes[name]
        if options.method == "lesions" and classes:
            return self._about_lesions(name, step, random)
        voxels = self.inside[name]
        if options.method == "balanced" and classes:
            number = step * options.batch + k
            if _count(number + 1, options.foreground) > _count(number, options.foreground):
                voxels = classes[random.integers(len(classes))]
        return Place(name, self._origin(name, voxels[random.integers(voxels.size)], random))

    def _origin(self, name: str, voxel: int, random: np.random.Generator) -> tuple[int, ...]:
        """A patch about a voxel, moved by the jitter and into the volume."""
        shape = self.volumes[name].mask.shape
        centre = np.unravel_index(voxel, shape)
        origin = []
        for c, n, extent in zip(centre, self.patch, shape, strict=True):
            jitter = round(self.options.jitter * n)
            start = int(c) - n // 2 + int(random.integers(-jitter, jitter + 1))
            start = min(max(start, int(c) - n + 1), int(c))  # half the extent, rounded, is beyond
            origin.append(min(max(start, 0), extent - n))
        return tuple(origin)

    def _about_lesions(self, name: str, step: int, random: np.random.Generator) -> Place:
        options, label = self.options, self.volumes[name].label
        assert label is not None
        late = step >= options.relax_after
        least = options.relaxed_voxels if late else options.minimum_voxels
        voxels = np.concatenate(self.classes[name])
        best: tuple[int, ...] = ()
        most = -1
        for _ in range(options.draws):
            origin = self._origin(name, voxels[random.integers(voxels.size)], random)
            central = tuple(
                slice(o + n // 4, o + n // 4 + max(n // 2, 1))
                for o, n in zip(origin, self.patch, strict=True)
            )
            part = label[central]
            count = int(np.count_nonzero((part > 0) & (part != IGNORED)))
            if count > most:
                best, most = origin, count
            if count >= least:
                break
        return Place(name, best, most < least)

    def cut(self, place: Place) -> Patch:
        """The patch at a place: views of the volume, that cannot be written to."""
        volume = self.volumes[place.subject]
        assert volume.label is not None
        part = tuple(slice(o, o + n) for o, n in zip(place.origin, self.patch, strict=True))
        patch = Patch(volume.image[(slice(None), *part)], volume.label[part], volume.mask[part])
        for array in (patch.image, patch.label, patch.mask):
            array.flags.writeable = False
        return patch

    def patches(self, step: int) -> Iterator[tuple[Place, Patch]]:
        """The patches of a step, and where they lie."""
        for place in self.places(step):
            yield place, self.cut(place)


def _count(patches: int, share: float) -> int:
    """How many of the first patches lie about a class."""
    return int(np.floor(patches * share + 1e-9))


def _padded(volume: Volume, patch: Sequence[int]) -> Volume:
    """The volume with background around it where a patch is larger."""
    lacking = [max(0, n - extent) for n, extent in zip(patch, volume.mask.shape, strict=True)]
    if not any(lacking):
        return volume
    widths = [(lack // 2, lack - lack // 2) for lack in lacking]
    label = None if volume.label is None else np.pad(volume.label, widths)
    image = np.pad(volume.image, [(0, 0), *widths])
    return Volume(volume.name, image, np.pad(volume.mask, widths), label, volume.placement)
