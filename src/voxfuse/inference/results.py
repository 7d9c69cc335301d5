"""What boxes of a volume become on the disk: a label image, and an image of probabilities."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from voxfuse._files import move_folder
from voxfuse.scale import Source, create_destination, open_destination
from voxfuse.scale.destinations import blocks_of

#: The label image of an output.
NAME = "segmentation"


@dataclass(frozen=True)
class Form:
    """Labels under ``labels/segmentation`` of a group, whose image are probabilities, if wanted.

    Labels alone are decided by the fusion. With probabilities, and of regions, it gives the
    probabilities of all classes, or their logits, by which labels are decided here.
    """

    source: Source
    shape: tuple[int, ...]  #: (\\*spatial)
    unit: tuple[int, ...]  #: extents of a file
    classes: int
    regions: tuple[int, ...] | None  #: values, later ones on top
    threshold: float
    probabilities: bool
    logits: bool = False  #: whether the fusion gives logits, of which a sigmoid is written

    @property
    def decides(self) -> bool:
        """Whether labels are decided here."""
        return self.probabilities or self.regions is not None

    @property
    def background(self) -> int:
        """Channels of the background, which are no image of their own."""
        return int(self.classes > 1 and self.regions is None)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of labels."""
        greatest = max(self.regions) if self.regions else self.classes - 1
        return np.min_scalar_type(max(greatest, 1))

    @property
    def written(self) -> int:
        """Bytes of the result."""
        channels = (self.classes - self.background) * self.probabilities
        return math.prod(self.shape) * (self.dtype.itemsize + channels)

    def said(self) -> str:
        """What labels depend on, for the manifest of a job that gives probabilities."""
        return f"regions {self.regions}, above {self.threshold}, {self.probabilities}"

    def planned(self) -> Any:
        """Stands for a result that is not made yet."""
        return self._of(_Nothing(self.shape, self.dtype, self.unit), None)

    def create(self, path: Path, beside: Path) -> None:
        """Make the result, in one moment: what is at ``path`` is whole, and the first that was.

        Args:
            path: of the group.
            beside: a folder of the same file system, to make it in.
        """
        with tempfile.TemporaryDirectory(prefix="making-", dir=beside) as made:
            self._create(Path(made) / path.name)
            move_folder(Path(made) / path.name, path)

    def _create(self, path: Path) -> None:
        if self.probabilities:
            create_destination(
                str(path),
                (self.classes - self.background, *self.shape),
                np.uint8,
                kind="image",
                name="probabilities",
                like=self.source,
                shards=self.unit,
                probabilities=True,
            )
        create_destination(
            str(path),
            self.shape,
            self.dtype,
            kind="labels",
            name=NAME,
            like=self.source,
            shards=self.unit,
        )

    def open(self, path: Path) -> Any:
        """The result that is there.

        Raises:
            FileNotFoundError: it is another one, without labels or without probabilities.
        """
        try:
            labels = open_destination(str(path), labels=NAME)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"--output: {path} has no labels/{NAME} of a volume in boxes; expected another "
                f"place, or remove it and {path}.job to begin anew"
            ) from None
        if not self.probabilities:
            return self._of(labels, None)
        try:
            return self._of(labels, open_destination(str(path)))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"--probabilities: {path} was prepared without; leave it out to go on, or take "
                "another --output"
            ) from None

    def _of(self, labels: Any, image: Any) -> Any:
        return Decided(self, labels, image) if self.decides else labels

    def labels(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """(\\*spatial) of probabilities or logits (C, \\*spatial)."""
        labels = np.zeros(values.shape[1:], self.dtype)
        if self.background:
            for k in range(len(labels)):  # as argmax copies what it is given
                labels[k] = values[:, k].argmax(0)
            return labels
        for value, channel in zip(self.regions or (1,), values, strict=True):
            labels[channel > self.threshold] = value
        return labels


class Decided:
    """Takes what labels are made of (C, \\*spatial); writes them and, if wanted, probabilities."""

    def __init__(self, form: Form, labels: Any, image: Any) -> None:
        self.form, self.behind, self.image = form, labels, image
        self.shape = (form.classes, *form.shape)
        self.dtype = np.dtype(np.float32)
        self.unit = (form.classes, *labels.unit)

    def __setitem__(self, key: tuple[slice, ...], values: Any) -> None:
        fused = np.asarray(values)
        self.behind[key[1:]] = self.form.labels(fused)
        if self.image is not None:
            above = fused[self.form.background :]
            if self.form.logits:
                above = torch.from_numpy(above).sigmoid().numpy()
            self.image[(slice(0, len(above)), *key[1:])] = above

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[Any]:
        """What is there, for a comparison with what was written: labels, whatever the channel."""
        found: NDArray[Any] = np.asarray(self.behind[key[1:]])[None]
        return found

    def written(self, place: tuple[slice, ...]) -> bool:
        """Whether every shard of a place is there, of labels and of probabilities."""
        image, spatial = self.image, place[1:]
        return bool(self.behind.written(spatial)) and (
            image is None or bool(image.written((slice(0, image.shape[0]), *spatial)))
        )

    def flush(self) -> None:
        """Have everything on the disk."""
        for each in (self.behind, self.image):
            if each is not None:
                each.flush()


@dataclass(frozen=True)
class _Nothing:
    """An array without voxels."""

    shape: Sequence[int]
    dtype: Any
    unit: tuple[int, ...]

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("the output is not made yet")


def unit_for(shape: Sequence[int], shards: int) -> tuple[int, ...]:
    """Extents of the files of a result: boxes are whole ones, of which there have to be enough."""
    chunk, unit = blocks_of(None, None, shape)
    while shards > 1 and math.prod(-(-n // u) for n, u in zip(shape, unit, strict=True)) < (
        2 * shards
    ):
        smaller = tuple(max(u // c // 2, 1) * c for u, c in zip(unit, chunk, strict=True))
        if smaller == unit:
            break
        unit = smaller
    return unit
