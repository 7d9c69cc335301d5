"""Simulation as augmentation: training volumes with other lesions every so many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from voxfuse.training.config import ConfigError, DataOptions
from voxfuse.training.dataset import Subject
from voxfuse.training.simulation.appearance import CONTRASTS
from voxfuse.training.simulation.files import host_of
from voxfuse.training.simulation.hosts import Host
from voxfuse.training.simulation.placement import simulate
from voxfuse.training.simulation.shapes import MaskShapes, RandomShapes, Shapes
from voxfuse.training.volumes import Volume, load_volume, normalised

#: What its random numbers are for; see :mod:`voxfuse.training.sampling`.
SIMULATION = 3


class Renewal:
    """Subjects as training sees them, with simulated lesions: a function of (seed, number).

    Args:
        subjects: those that are trained on.
        images: names of the modalities; t1, and flair or t2, in any case of letters.
        labels: names and values, a background and a lesion.
        data: the section ``[data]``.
        shapes: a folder of masks, or "none" for the random model.
        seed: the run's.

    Raises:
        ConfigError: other modalities or labels.
        ValueError: a subject without white matter, masks that cannot be read.
    """

    def __init__(
        self,
        subjects: Mapping[str, Subject],
        images: Sequence[str],
        labels: dict[str, int],
        data: DataOptions,
        shapes: str = "none",
        seed: int = 0,
    ) -> None:
        names = [image.lower() for image in images]
        known = set(names) <= set(CONTRASTS) and len(set(names)) == len(names)
        if "t1" not in names or not known:
            raise ConfigError(
                f"augmentation.simulate_every: got images {', '.join(images)}, expected t1 and any "
                f"of {', '.join(name for name in CONTRASTS if name != 't1')}, each once"
            )
        if len(labels) != 2:
            raise ConfigError(
                f"augmentation.simulate_every: got {len(labels)} labels, expected a background and "
                "a lesion"
            )
        self.data, self.seed = data, seed
        self.shapes: Shapes = RandomShapes()
        if shapes != "none":
            self.shapes = MaskShapes.from_folder(shapes)
        raw = replace(data, normalisation="none", clip=[0.0, 100.0])
        self.hosts: dict[str, tuple[Volume, Host]] = {}
        for name, subject in subjects.items():
            volume = load_volume(subject, raw, labels)
            try:
                self.hosts[name] = volume, host_of(volume, names)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def volumes(self, number: int) -> dict[str, Volume]:
        """Every subject with other lesions, normalised."""
        made = {}
        for k, (name, (volume, host)) in enumerate(self.hosts.items()):
            simulated = simulate(host, self.shapes, (self.seed, number, SIMULATION, k))
            image = np.stack([
                normalised(f"{name}: {modality}", channel, volume.mask, self.data)
                for modality, channel in simulated.images.items()
            ])  # fmt: skip
            made[name] = replace(volume, image=image, label=simulated.lesions.astype(np.uint8))
        return made
