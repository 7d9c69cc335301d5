"""What a lesion looks like: contrast to white matter, texture and a soft edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse.metrics._arrays import optional
from voxfuse.training.simulation.hosts import Host
from voxfuse.training.simulation.shapes import CONFLUENT, smooth_noise

Array = NDArray[Any]

#: The standard normal distribution's 90th percentile.
_TENTH = 1.2816


@dataclass(frozen=True)
class Contrast:
    """Lesion over white matter: 10, 50 and 90 % of its distribution over voxels, before the edge.

    Quantiles between them are those of two half normals, and two deviations are the most.
    """

    low: float
    median: float
    high: float

    def of(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """The contrast at standard normal ``z``."""
        sides = np.where(z > 0, self.high - self.median, self.median - self.low) / _TENTH
        return np.maximum(self.median + np.clip(z, -2, 2) * sides, 0.1)


#: Share of the variance of contrast that is a lesion's own: of focal ones and of confluent ones. In
#: three patients it is 12 to 44 % (mean 25) of 100 mm3 to 1 ml, and 3, 9 and 14 % from 1 ml on.
OWN = (0.3, 0.1)

#: What is drawn, so that behind the soft edge voxels of lesions have the measured contrasts.
CONTRASTS: dict[str, Contrast] = {
    "flair": Contrast(1.24, 1.435, 1.63),
    "t1": Contrast(0.412, 0.713, 0.95),
    "t2": Contrast(1.39, 1.93, 2.655),
}


def paint(
    images: Mapping[str, NDArray[np.float32]],
    lesion: NDArray[np.bool_],
    box: tuple[slice, ...],
    host: Host,
    contrasts: Mapping[str, Contrast],
    edge: float,
    random: np.random.Generator,
) -> None:
    """Put a lesion's intensities into ``images``, which have the extent of the host's box.

    With x the image, w white matter's level, c the contrast, and a the mask smoothed by ``edge`` mm
    (over the root of its greatest value: what is smaller than the edge would else be invisible)::

        x + a (w c + r / 2 - x),     r = x - w, within two deviations of white matter's

    So half of the noise and shading of white matter stays in the lesion. c is a function of a
    standard normal field. Of its variance 40 % goes with the depth in the lesion (of 30 voxels and
    more; the core differs most), :data:`OWN` is the lesion's own and the rest is a texture of 2.5
    mm. A half of lesion and texture is common to all modalities; those darker than white matter
    have all signs turned.

    Args:
        images: written to.
        lesion: mask within ``box``, a box with margins for the edge.
    """
    ndimage, special = (optional(f"scipy.{x}", "Simulation") for x in ("ndimage", "special"))
    alpha = ndimage.gaussian_filter(lesion.astype(np.float32), edge / host.spacing)
    alpha /= np.sqrt(alpha.max())
    alpha[host.lesions[host.box][box]] = 0
    width = np.maximum(2.5 / host.spacing, 0.5)
    depth = np.zeros(lesion.shape)
    count = int(lesion.sum())
    if count >= 30:
        core = ndimage.gaussian_filter(lesion.astype(np.float32), 2 / host.spacing)[lesion]
        depth[lesion] = special.ndtri((np.argsort(np.argsort(core)) + 0.5) / count)

    own = OWN[count * float(host.spacing.prod()) >= CONFLUENT]

    def field() -> NDArray[np.float64]:
        texture = np.sqrt(0.6 - own) * smooth_noise(lesion.shape, width, random)
        z: NDArray[np.float64] = np.sqrt(own) * random.standard_normal() + texture
        return z

    common = field()
    for name, image in images.items():
        contrast, level = contrasts[name], host.levels[name]
        z = np.sqrt(0.4) * depth + np.sqrt(0.5) * (common + field())
        z *= 1 if contrast.median > 1 else -1
        x = image[box]
        spread = 2 * host.deviations[name]
        rest = np.clip(x - level, -spread, spread)
        x += (alpha * (level * contrast.of(z) + rest / 2 - x)).astype(np.float32)
