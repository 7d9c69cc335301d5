"""Volumes larger than memory: Zarr in and out, box by box, by any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxfuse._files import make_folder
from voxfuse.inference.models import Network, is_network
from voxfuse.inference.reading import header_of
from voxfuse.inference.request import (
    Request,
    activation_of,
    batch_of,
    classes_of,
    network_of,
    patch_of,
    prediction_of,
)
from voxfuse.scale import Job, Plan, Source, create_destination, open_destination, open_source
from voxfuse.scale.manifest import MANIFEST
from voxfuse.training.config import PredictionOptions

#: Label image of an output.
NAME = "segmentation"
#: Options of studies, which volumes in boxes do not have.
_REFUSED = ("orientation", "spacing", "clip", "mask", "probabilities", "regions", "format")


@dataclass(frozen=True)
class VolumeJob:
    """A job of :mod:`voxfuse.scale`, and the folder that its processes share."""

    job: Job
    folder: Path
    skip_origin: Callable[[tuple[int, ...]], bool] | None

    @property
    def is_prepared(self) -> bool:
        """Whether there is a manifest."""
        return (self.folder / MANIFEST).is_file()

    def prepare(self) -> Plan:
        """Write the manifest, once; every process reads it."""
        return self.job.prepare(self.folder, skip_origin=self.skip_origin)


def open_volume(
    request: Request,
    foreground: str | None = None,
    memory: int = 1 << 30,
    create: bool = True,
    shards: int = 1,
) -> VolumeJob:
    """The job of ``--input`` and ``--output``; the output is made where it is not there.

    Args:
        request: see :class:`voxfuse.inference.request.Request`.
        foreground: a number, above which a patch has to have a voxel to be predicted; or a volume
            of the same extent with a voxel above 0 there.
        memory: bytes that a box may take beside the network.
        create: make the output where it is not there; else it is an array in memory, to plan with.
        shards: how many processes the plan reckons with.

    Raises:
        ValueError: options do not fit.
    """
    for name in _REFUSED:
        if getattr(request, name) not in (None, False):
            raise ValueError(f"--{name}: is for studies, which are predicted in one piece")
    if len(request.input) != 1:
        raise ValueError(f"--input: got {len(request.input)} volumes, expected one")
    if not request.output.name.endswith(".zarr"):
        raise ValueError(f"--output: got {request.output}, expected a name ending in .zarr")
    if request.normalize not in (None, "none", "zscore"):
        raise ValueError(
            f"--normalize: got {request.normalize!r}, expected none or zscore for a volume in boxes"
        )
    if not request.input[0].exists():
        raise FileNotFoundError(f"--input: there is no {request.input[0]}")
    if not is_network(request.model):
        raise ValueError(
            f"--model: got {request.model}, expected FILE.pt2 or MODULE:ATTR for a volume in "
            "boxes; a run of voxfuse train predicts studies"
        )
    folder = request.output.with_name(f"{request.output.name}.job")
    _check_output(request.output, folder)
    prediction = prediction_of(request, PredictionOptions(batch=1))
    source = _source(request.input[0])
    network = network_of(request)
    patch = patch_of(request.patch, network)
    batch = batch_of(request.batch, network)
    spatial = tuple(int(n) for n in source.shape[-3:])
    channels = int(source.shape[0]) if len(source.shape) == 4 else 1
    classes, _ = classes_of(network, torch.zeros(batch, channels, *patch))
    activation = activation_of(request, classes)
    mask = classes == 1
    skip = None if foreground is None else _background(foreground, source, patch, spatial)
    if create:  # before the output, which is thereby known to be one of this command
        make_folder(folder)
    out = _destination(request.output, spatial, classes, source, create)
    job = Job(
        source,
        out,
        patch,
        _finite(network),
        batch,
        models={"network": network.digest},
        normalisation="zscore" if request.normalize == "zscore" else None,
        memory=memory,
        shards=shards,
        output="mask" if mask else "labels",
        activation=activation,
        threshold=prediction.threshold if mask else None,
        overlap=prediction.overlap,
        window=prediction.window,
        grid=prediction.grid,
        tta=None if prediction.orientations == "none" else prediction.orientations,
        head=network.head,
        sw_device=network.device,
        device=network.device,
    )
    return VolumeJob(job, folder, skip)


def _check_output(output: Path, folder: Path) -> None:
    """Raise where boxes would be written over what is another's, or are done but not there."""
    if output.exists() and not folder.is_dir():
        raise FileExistsError(
            f"--output: {output} exists, but no {folder} of a volume in boxes; expected another "
            "place"
        )
    if not output.exists() and (folder / MANIFEST).exists():
        raise FileExistsError(
            f"--output: there is no {output}, but {folder} says which of its boxes are done; "
            "remove that folder to begin anew"
        )


def _source(path: Path) -> Source:
    """The volume; NIfTI's fourth axis has channels, as in studies."""
    channels = path.name.endswith((".nii", ".nii.gz")) and header_of(path).axes == 4
    return open_source(str(path), axes="xyzc" if channels else None)


def _finite(network: Network) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network, which raises for predictions that no label could be made of."""

    def predicted(patches: torch.Tensor) -> torch.Tensor:
        result = network(patches)
        if not bool(torch.isfinite(result).all()):
            raise RuntimeError("the network's predictions are not finite")
        return result

    return predicted


def _destination(
    path: Path, shape: tuple[int, ...], classes: int, source: Any, create: bool
) -> Any:
    dtype = np.uint8 if classes <= 256 else np.uint16
    if not path.exists() and create:
        return create_destination(str(path), shape, dtype, kind="labels", name=NAME, like=source)
    if path.exists():
        return open_destination(str(path), labels=NAME)
    return np.broadcast_to(np.zeros((), dtype), shape)


def _background(
    foreground: str, source: Any, patch: tuple[int, ...], shape: Sequence[int]
) -> Callable[[tuple[int, ...]], bool]:
    """Whether a patch has nothing to predict, by its origin."""
    try:
        level, looked_at = float(foreground), source
        if not math.isfinite(level):
            raise ValueError
    except ValueError:
        if not Path(foreground).exists():
            raise ValueError(
                f"--foreground: got {foreground!r}, expected a finite number or a volume"
            ) from None
        level, looked_at = 0.0, open_source(foreground)
        if tuple(looked_at.shape[-3:]) != tuple(shape):
            raise ValueError(
                f"--foreground: has extent {tuple(looked_at.shape[-3:])}, expected {tuple(shape)}"
            ) from None

    def empty(origin: tuple[int, ...]) -> bool:
        key = tuple(
            slice(max(start, 0), min(start + size, extent))
            for start, size, extent in zip(origin, patch, shape, strict=True)
        )
        lead = (slice(None),) * (len(looked_at.shape) - 3)
        return not bool((np.asarray(looked_at[(*lead, *key)]) > level).any())

    return empty


def parse_shard(text: str) -> tuple[int, int]:
    """``I/N``: the I-th of N parts, counted from 0.

    Raises:
        ValueError: anything else.

    Example:
        >>> from voxfuse.inference.volumes import parse_shard
        >>> parse_shard("3/8")
        (3, 8)
    """
    try:
        index, count = (int(x) for x in text.split("/"))
    except ValueError:
        index = count = -1
    if not 0 <= index < count:
        raise ValueError(f"--shard: got {text!r}, expected I/N with 0 <= I < N")
    return index, count
