"""Volumes larger than memory: Zarr in and out, box by box, by any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxfuse._files import make_folder
from voxfuse.fusion._memory import readable_bytes
from voxfuse.fusion.batches import held_by_probe
from voxfuse.fusion.options import ABSENT_LOGIT
from voxfuse.inference.models import Network, is_network
from voxfuse.inference.plan import parts_of, time_of
from voxfuse.inference.reading import header_of
from voxfuse.inference.request import (
    Probe,
    Request,
    activation_of,
    batch_of,
    check_decision,
    classes_of,
    network_of,
    patch_of,
    prediction_of,
    probed,
)
from voxfuse.inference.results import Form, unit_for
from voxfuse.inference.segmenters import MEMBERS
from voxfuse.scale import Job, Plan, Source, open_source
from voxfuse.scale.manifest import MANIFEST, Folder
from voxfuse.training.config import PredictionOptions
from voxfuse.training.volumes import TOLERANCE

_SMALLER = "take a smaller --batch or --patch"
#: What a --foreground that is no number is called.
_VOLUME = "a volume"
#: Axes of a volume that names none.
_UNNAMED = ("z", "y", "x")
#: Options of studies, which volumes in boxes do not have.
_REFUSED = ("orientation", "spacing", "clip", "mask", "format")


@dataclass(frozen=True)
class Cost:
    """Of a volume in boxes."""

    plan: Plan
    memory: dict[str, int]  #: bytes of a process by part
    batch: int  #: patches a call
    calls: int  #: of the network
    seconds: float  #: of one

    def lines(self, limit: int, workers: int = 1) -> list[str]:
        """For people."""
        taken = f"{readable_bytes(sum(self.memory.values()))} of {readable_bytes(limit)}"
        each = f", for each of {workers} processes" if workers > 1 else ""
        alone = f", with a core for each of {workers} processes" if workers > 1 else ""
        return [
            str(self.plan),
            f"memory   {taken}{each}: {parts_of(self.memory)}",
            f"calls    {self.calls} of {self.batch} patches",
            f"time     {time_of(self.calls / workers, self.seconds)}{alone}",
        ]

    def check(self, limit: int, workers: int | None = None) -> None:
        """Raise where a machine has too little memory for one process, or for so many workers.

        Raises:
            MemoryError: the message has the parts, and the option to change.
        """
        each = sum(self.memory.values())
        # The process that started workers has a network too.
        whole = each if workers is None else workers * each + each - self.plan.memory
        if whole > limit:
            several = "" if workers is None else f"{workers} workers of "
            fewer = "" if workers is None else "take fewer --workers, or "
            raise MemoryError(
                f"--memory-limit: {readable_bytes(whole)} would not fit {readable_bytes(limit)} "
                f"({several}{parts_of(self.memory)}); {fewer}{_SMALLER}"
            )

    def check_worker(self, limit: int) -> None:
        """The same of a worker that was started by another program.

        Raises:
            MemoryError: as before.
        """
        each = sum(self.memory.values())
        if each > limit:
            raise MemoryError(
                f"--scheduler: {readable_bytes(each)} ({parts_of(self.memory)}) would not fit "
                f"a worker, which has {readable_bytes(limit)}; {_SMALLER}, "
                "or workers with more memory"
            )


@dataclass(frozen=True)
class VolumeJob:
    """A job of :mod:`voxfuse.scale`, and the folder that its processes share.

    Until :meth:`create` its result may be an array of nothing, to plan with.
    """

    job: Job
    folder: Path
    skip_origin: Callable[[tuple[int, ...]], bool] | None
    skipping: str | None  #: which patches that are, where --foreground is given
    by_volume: bool  #: whether --foreground is a volume, which its name does not tell for sure
    batch: int  #: patches a call
    members: int  #: predictions of a patch
    first: Probe  #: the call that looked at the network
    probe: Callable[[], Probe]
    _output: Path
    _there: bool  #: whether the job has it
    _form: Form
    _make: Callable[[Any], Job]

    @property
    def is_prepared(self) -> bool:
        """Whether there is a manifest."""
        return (self.folder / MANIFEST).is_file()

    def create(self) -> VolumeJob:
        """The job with its output, which is made where it is not there."""
        if self._there:
            return self
        make_folder(self.folder)  # before the output, which is thereby known to be of this command
        if not self._output.exists():  # as another process may have made it since
            self._form.create(self._output, self.folder)
        return replace(self, job=self._make(self._form.open(self._output)), _there=True)

    def prepare(self) -> Plan:
        """Write the manifest, once; every process reads it."""
        return self.job.prepare(self.folder, skip_origin=self.skip_origin, skipping=self.skipping)

    def check_foreground(self) -> None:
        """Raise where the manifest was made with another ``--foreground`` than the one given.

        Raises:
            ValueError: with both.
        """
        before = (Folder(self.folder).read() or {}).get("skipping")
        if self.skipping not in (None, before):
            raise ValueError(
                f"--foreground: got {self.skipping}, but {self.folder} was prepared with "
                f"{before or 'none'}; leave it out to go on, or take another --output"
            )
        skip = self.skip_origin if self.by_volume else None
        if skip is not None and not self.job.leaves_out(self.folder, skip):
            raise ValueError(
                f"--foreground: is above 0 in other patches than when {self.folder} was prepared; "
                "leave it out to go on, or take another --output"
            )

    def cost(self, plan: Plan, measured: bool = False) -> Cost:
        """What the boxes of a plan take; ``measured``: in seconds as well, by another call."""
        return Cost(
            replace(plan, written=self._form.written),
            {"process": self.first.process, "network": self.first.network, "box": plan.memory},
            self.batch,
            sum(-(-patches // self.batch) for patches in plan.patches) * self.members,
            self.probe().seconds if measured else 0.0,
        )


def open_volume(
    request: Request, foreground: str | None = None, memory: int = 1 << 30, shards: int = 1
) -> VolumeJob:
    """The job of ``--input`` and ``--output``, of what is there already.

    Args:
        request: see :class:`voxfuse.inference.request.Request`.
        foreground: a number, above which a patch has to have a voxel to be predicted; or a volume
            of the same extent with a voxel above 0 there, whose axes are matched by their names.
        memory: bytes that a box may take beside the network and its predictions.
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
    check_decision(request)
    source = _source(request.input[0])
    network = network_of(request)
    patch = patch_of(request.patch, network)
    batch = batch_of(request.batch, network)
    spatial = tuple(int(n) for n in source.shape[-3:])
    channels = int(source.shape[0]) if len(source.shape) == 4 else 1
    patches = torch.zeros(batch, channels, *patch)
    classes, first = classes_of(network, patches)
    activation = activation_of(request, classes)
    regions = None if request.regions is None else tuple(request.regions)
    form = Form(
        source,
        spatial,
        unit_for(spatial, shards),
        classes,
        regions,
        prediction.threshold,
        request.probabilities,
        # Sigmoids of large logits are all 1, of which the greatest is none.
        network.head is not None and classes > 1 and regions is None and activation == "sigmoid",
    )
    mask = classes == 1 and not form.decides
    output = "mask" if mask else "labels"
    if form.decides:
        output = "logits" if form.logits else "probabilities"
    decided = {"labels": form.said()} if form.decides else {}
    returned = classes if network.head is None else network.head[0].shape[1]
    members = MEMBERS[prediction.orientations]
    predictions = 4 * returned * math.prod(patch) * members * held_by_probe(batch)
    skipping, skip = None, None
    if foreground is not None:
        skipping, skip = _background(foreground, source, patch, spatial)

    def make(out: Any) -> Job:
        return Job(
            source,
            out,
            patch,
            _finite(network),
            batch,
            models={"network": network.digest, **decided},
            normalisation="zscore" if request.normalize == "zscore" else None,
            memory=memory + predictions,
            shards=shards,
            output=output,
            activation="none" if output == "logits" else activation,
            fill=ABSENT_LOGIT if output == "logits" else 0.0,
            threshold=prediction.threshold if mask else None,
            overlap=prediction.overlap,
            window=prediction.window,
            grid=prediction.grid,
            tta=None if prediction.orientations == "none" else prediction.orientations,
            head=network.head,
            sw_device=network.device,
            device=network.device,
        )

    there = request.output.exists()
    return VolumeJob(
        make(form.open(request.output) if there else form.planned()),
        folder,
        skip,
        skipping,
        skipping is not None and skipping.startswith(_VOLUME),
        batch,
        members,
        first,
        lambda: probed(network, patches)[1],
        request.output,
        there,
        form,
        make,
    )


def settle(
    request: Request,
    check: Callable[[Cost], object],
    foreground: str | None = None,
    shards: int = 1,
    again: bool = False,
) -> tuple[VolumeJob, Cost]:
    """The job with its output and its plan, made where they are not there.

    Args:
        request, foreground, shards: see :func:`open_volume`.
        check: raises for what is too much, before anything is made.
        again: compare with the plan that is there as if it were made now; else it is taken as it
            is, for whatever number of processes it was made.
    """
    volume = open_volume(request, foreground, shards=shards)
    done = volume.is_prepared and not again
    if done:
        volume.check_foreground()
    cost = volume.cost(volume.job.plan(volume.folder if done else None))
    check(cost)
    if not done:
        volume = volume.create()
        cost = volume.cost(volume.prepare())
        check(cost)
    return volume, cost


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
        # Of two numbers, as isfinite() makes copies.
        if not bool(torch.isfinite(torch.stack(result.aminmax())).all()):
            raise RuntimeError("the network's predictions are not finite")
        return result

    return predicted


def _background(
    foreground: str, source: Any, patch: tuple[int, ...], shape: Sequence[int]
) -> tuple[str, Callable[[tuple[int, ...]], bool]]:
    """Which patches have nothing to predict, in words, and whether one has, by its origin."""
    places = [0, 1, 2]
    try:
        level, looked_at = float(foreground), source
        said = str(level)
        if not math.isfinite(level):
            raise ValueError
    except ValueError:
        if not Path(foreground).exists():
            raise ValueError(
                f"--foreground: got {foreground!r}, expected a finite number or a volume"
            ) from None
        level, looked_at = 0.0, open_source(foreground)
        said = f"{_VOLUME} ({looked_at.fingerprint()[:16]})"
        places = _matching(source, looked_at)
        expected = tuple(shape[place] for place in places)
        if tuple(looked_at.shape[-3:]) != expected:
            axes = ", ".join(_names(looked_at) or _UNNAMED)
            raise ValueError(
                f"--foreground: has extent {tuple(looked_at.shape[-3:])} ({axes}), expected "
                f"{expected}"
            ) from None
        if source.affine is not None and looked_at.affine is not None:
            gap = float(np.abs(source.affine - looked_at.affine).max())
            if not gap <= TOLERANCE:
                raise ValueError(
                    "--foreground: lies elsewhere than the volume: their affines differ by up to "
                    f"{gap:g} mm, expected at most {TOLERANCE:g}"
                ) from None

    def empty(origin: tuple[int, ...]) -> bool:
        key = tuple(
            slice(max(start, 0), min(start + size, extent))
            for start, size, extent in zip(origin, patch, shape, strict=True)
        )
        lead = (slice(None),) * (len(looked_at.shape) - 3)
        own = (key[place] for place in places)
        return not bool((np.asarray(looked_at[(*lead, *own)]) > level).any())

    return said, empty


def _matching(source: Source, mask: Source) -> list[int]:
    """Of each of a mask's axes, which of the volume's it is.

    Names that a file lacks are z, y, x, as :func:`open_source` says; beside others its axes are
    taken in their order.
    """
    wanted, names = _names(source), _names(mask)
    volume, other = wanted or _UNNAMED, names or _UNNAMED
    if sorted(volume) == sorted(other):
        return [volume.index(name) for name in other]
    if wanted and names:
        raise ValueError(
            f"--foreground: has axes {', '.join(names)}, expected those of the volume, "
            f"{', '.join(wanted)}, in any order"
        )
    return [0, 1, 2]


def _names(source: Source) -> tuple[str, ...] | None:
    """Of the last three axes, as the file names them; None if it does not."""
    names = source.axes if source.space is None else source.space.axes
    found = [name.lower() for name in ("", *(names or ()))][-3:]
    return tuple(found) if len(set(found)) == 3 else None


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
