"""Where lesions go, and which voxels they fill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse.metrics._arrays import optional
from voxfuse.training.simulation.appearance import CONTRASTS, Contrast, paint
from voxfuse.training.simulation.hosts import Host
from voxfuse.training.simulation.shapes import RandomShapes, Shape, Shapes

Mask = NDArray[np.bool_]
Box = tuple[slice, ...]

#: Places that are tried for a lesion before it is left out.
TRIES = 12


@dataclass(frozen=True)
class SimulationOptions:
    """How many lesions, where, and how they look."""

    count: tuple[float, float] = (
        4.16,
        0.93,
    )  #: mean and deviation of the logarithm of their number
    most: int = 400
    confluent: tuple[int, int] = (1, 3)  #: least and most of 1 ml and more, at the ventricles
    reach: float = (
        15.0  #: mm: a focal one at distance d of the ventricles has weight exp(-d / reach)
    )
    edge: float = 0.7  #: mm: deviation of the Gaussian that the edge is smoothed by
    contrasts: Mapping[str, Contrast] = field(default_factory=lambda: CONTRASTS)


@dataclass(frozen=True)
class Simulated:
    """A head with more lesions than it had."""

    images: dict[str, NDArray[Any]]  #: float32, of the host's extent
    lesions: Mask  #: real and simulated ones
    simulated: Mask  #: the simulated ones alone
    drawn: int  #: lesions that were drawn
    placed: int  #: those that found a place


def simulate(
    host: Host,
    shapes: Shapes | None = None,
    seed: int | tuple[int, ...] = 0,
    options: SimulationOptions | None = None,
) -> Simulated:
    """Put lesions into a head.

    No lesion touches another, simulated or real (18-connected), so that each that was drawn is one
    component of the mask, of the volume that was drawn. The largest are placed first; one that
    finds no place in twelve tries is left out.

    Args:
        host: the head; its arrays are not written to.
        shapes: a :class:`MaskShapes`, or the :class:`RandomShapes` that None stands for.
        seed: of every random number: a number or several, such as seed, subject and epoch.
        options: see :class:`SimulationOptions`.

    Raises:
        ValueError: a modality has no contrast.

    Example:
        >>> import numpy as np
        >>> from voxfuse.training.simulation import Host, simulate
        >>> grid = np.indices((48, 48, 48)) - 24
        >>> radius = np.sqrt((grid**2).sum(0))
        >>> head = np.where(radius < 22, 60.0, 0) + np.where(radius < 19, 50.0, 0)
        >>> noise = np.random.default_rng(0).normal(0, 3, head.shape)
        >>> made = simulate(Host.of({"t1": np.where(head > 0, head + noise, 0)}), seed=1)
        >>> made.placed <= made.drawn
        True
    """
    options = options or SimulationOptions()
    for name in host.images:
        if name not in options.contrasts:
            raise ValueError(
                f"contrasts: there is none of {name}, only of {', '.join(options.contrasts)}"
            )
    random = np.random.default_rng(seed)
    least, most = options.confluent
    confluent = int(random.integers(least, most + 1))
    count = int(np.clip(np.rint(np.exp(random.normal(*options.count))), confluent, options.most))
    drawn = (shapes or RandomShapes()).draw(random, count, confluent, host.brain_volume)
    order = sorted(range(count), key=lambda k: -drawn[k].volume)
    images = {name: np.array(x, np.float32) for name, x in host.images.items()}
    inner = {name: image[host.box] for name, image in images.items()}
    sites = _Sites(host, options.reach)
    placed = 0
    for k in order:
        found = sites.place(drawn[k], k < confluent, random)
        if found is not None:
            paint(inner, *found, host, options.contrasts, options.edge, random)
            placed += 1
    simulated = np.zeros(host.lesions.shape, bool)
    simulated[host.box] = sites.lesions
    return Simulated(images, host.lesions | simulated, simulated, count, placed)


class _Sites:
    """What is still free in a host."""

    def __init__(self, host: Host, reach: float) -> None:
        self.host = host
        self.free = host.white | host.wall
        self.lesions = np.zeros(self.free.shape, bool)
        places = np.flatnonzero(host.white)
        weights = np.cumsum(np.exp(-host.to_ventricles.reshape(-1)[places] / reach))
        self.focal = places, weights / weights[-1]
        near = np.flatnonzero(self.free & (host.to_ventricles <= 5))
        if not near.size:
            near = places[np.argsort(host.to_ventricles.reshape(-1)[places])[:1000]]
        self.periventricular = near, np.arange(1, near.size + 1) / near.size

    def place(
        self, shape: Shape, confluent: bool, random: np.random.Generator
    ) -> tuple[Mask, Box] | None:
        """A lesion of that shape as a mask in a box, no longer free; None if there is no place."""
        voxels = max(1, round(shape.volume / float(self.host.spacing.prod())))
        places, cumulative = self.periventricular if confluent else self.focal
        for _ in range(TRIES):
            chosen = int(places[np.searchsorted(cumulative, random.random())])
            seed = np.array(np.unravel_index(chosen, self.free.shape))
            if not self.free[tuple(seed)]:
                continue
            reach = np.ceil(shape.reach / self.host.spacing).astype(int) + 2
            low, high = np.maximum(seed - reach, 0), np.minimum(seed + reach + 1, self.free.shape)
            box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
            free = self.free[box]
            if free.sum() < voxels:
                continue
            offsets = np.stack(
                np.meshgrid(
                    *((np.arange(a, b) - s) * size for a, b, s, size in
                      zip(low, high, seed, self.host.spacing, strict=True)),
                    indexing="ij",
                )
            )  # fmt: skip
            score = shape.score(offsets, random, self.host.to_ventricles[box], self._outwards(seed))
            lesion = grow(score, free, tuple(seed - low), voxels)
            if lesion is not None:
                return self._take(lesion, box)
        return None

    def _outwards(self, seed: NDArray[np.int64]) -> NDArray[np.float64]:
        """The unit gradient of the distance to the ventricles."""
        far = self.host.to_ventricles
        slope = np.zeros(3)
        for axis in range(3):
            ends = []
            for step in (2, -2):
                place = seed.copy()
                place[axis] = np.clip(place[axis] + step, 0, far.shape[axis] - 1)
                ends.append(float(far[tuple(place)]))
            slope[axis] = (ends[0] - ends[1]) / self.host.spacing[axis]
        norm = float(np.linalg.norm(slope))
        return slope / norm if norm > 0 else np.array([0.0, 0.0, 1.0])

    def _take(self, lesion: Mask, box: Box) -> tuple[Mask, Box]:
        """Mark a lesion and its neighbours; return it in the smallest box with a margin of 4."""
        ndimage = optional("scipy.ndimage", "Simulation")
        (found,) = ndimage.find_objects(lesion.astype(np.uint8))
        tight = []
        for outer, inner, extent in zip(box, found, self.free.shape, strict=True):
            start = max(outer.start + inner.start - 4, 0)
            tight.append(slice(start, min(outer.start + inner.stop + 4, extent)))
        whole = np.zeros(tuple(s.stop - s.start for s in tight), bool)
        target = tuple(
            slice(o.start + f.start - t.start, o.start + f.stop - t.start)
            for o, f, t in zip(box, found, tight, strict=True)
        )
        whole[target] = lesion[found]
        region = tuple(tight)
        self.lesions[region] |= whole
        self.free[region] &= ~ndimage.binary_dilation(whole, np.ones((3, 3, 3)))
        return whole, region


def grow(score: NDArray[np.float64], free: Mask, seed: tuple[int, ...], voxels: int) -> Mask | None:
    """The free voxels of greatest score that hang together with ``seed``, about ``voxels`` of them.

    Up to 12 voxels exactly so many, beyond that within 4 %; None if it does not come out so.
    """
    ndimage = optional("scipy.ndimage", "Simulation")
    places = np.flatnonzero(free)
    order = np.argsort(-score.ravel()[places], kind="stable")
    ranks = np.full(free.size, free.size)
    ranks[places[order]] = np.arange(1, places.size + 1)
    rank = ranks.reshape(free.shape)
    rank[seed] = 0
    low, high = voxels, places.size  # so many of the greatest are looked at
    taken = voxels
    allowed = 0 if voxels <= 12 else max(1, int(0.04 * voxels))
    structure = ndimage.generate_binary_structure(3, 2)
    for _ in range(12):
        labels, _ = ndimage.label(rank <= taken, structure)
        lesion: Mask = labels == labels[seed]
        size = int(lesion.sum())
        if abs(size - voxels) <= allowed:
            return lesion
        low, high = (taken + 1, high) if size < voxels else (low, taken - 1)
        if low > high:
            return None
        # What else hangs together is mostly a share of what is taken.
        taken = min(max(low, round(taken * voxels / size)), high)
    return None
