"""What is asked for: options of the command, checked together before anything is read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxfuse.fusion.options import FusionOptions
from voxfuse.inference.dicom import is_series, write_segmentation
from voxfuse.inference.models import Network, is_network, load_network
from voxfuse.inference.night import STATUS, SUMMARY, Target
from voxfuse.inference.reading import find_studies, header_of
from voxfuse.inference.segmenters import (
    NetworkOptions,
    NetworkSegmenter,
    RunSegmenter,
    Segmentation,
    Segmenter,
)
from voxfuse.metrics.files import channels_comment, is_image, probabilities_of
from voxfuse.training.config import Config, ConfigError, DataOptions, PredictionOptions, parse
from voxfuse.training.dataset import (
    Subject,
    check_order,
    files_named,
    find_inputs,
    names_of,
    with_name,
)
from voxfuse.training.predict import load_model
from voxfuse.training.volumes import Placement, save_like

#: What a user may take for a format that is written; without this it would become a folder.
_NOT_WRITTEN = (
    ".mgz", ".mgh", ".mha", ".mhd", ".nrrd", ".img", ".hdr", ".gz", ".nii", ".dcm", ".tif",
    ".tiff", ".png", ".npz",
)  # fmt: skip
_ENDINGS = (".nii", ".nii.gz")
#: What is read in parts.
_SOURCES = (".zarr", ".zarr.zip", ".npy")

#: Keys of a configuration, and the options that they are here.
_OPTIONS = {
    "data.normalisation": "--normalize",
    "data.orientation": "--orientation",
    "data.spacing": "--spacing",
    "data.clip": "--clip",
    "data.mask": "--mask",
    "prediction.": "--",
}
#: Options of networks that a run's configuration has.
_OF_NETWORKS = (
    "patch", "activation", "regions", "head", "orientation", "spacing", "normalize", "clip",
    "mask", "labels", "model_id",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """The options of ``voxfuse predict``; see its help, and ``docs/predict.md``."""

    model: str
    input: Sequence[Path]
    output: Path
    patch: Sequence[int] | None = None
    overlap: float | None = None
    window: str | None = None
    grid: str | None = None
    orientations: str | None = None
    batch: int | None = None
    threshold: float | None = None
    activation: str | None = None
    labels: bool = False
    regions: Sequence[int] | None = None
    head: str | None = None
    orientation: str | None = None
    spacing: Sequence[float] | None = None
    normalize: str | None = None
    clip: Sequence[float] | None = None
    mask: str | None = None
    probabilities: bool = False
    trust_model: bool = False
    model_id: str | None = None
    device: str = "auto"
    format: str | None = None
    skip_existing: bool = False
    overwrite: bool = False


def is_volume(request: Request) -> bool:
    """Whether a volume is to be predicted in boxes."""
    names = [path.name.rstrip("/") for path in (*request.input, request.output)]
    return any(name.endswith(_SOURCES) for name in names)


@dataclass(frozen=True)
class Probe:
    """What one call of the network showed."""

    seconds: float
    process: int  #: bytes of this process before it
    network: int  #: bytes that it took besides, at most


@dataclass(frozen=True)
class Job:
    """Studies, where their segmentations go, and what makes them."""

    segmenter: Segmenter
    studies: list[Subject]
    targets: list[Target]
    to_folder: bool
    probabilities: bool
    first: Probe  #: the call that looked at the network
    probe: Callable[[], Probe]
    regions: tuple[int, ...] | None = None  #: the value of each channel, if they are regions

    def calls(self, shape: tuple[int, ...]) -> int:
        """Calls of the network for a volume of this extent, at most."""
        segmenter = self.segmenter
        return -(-segmenter.patches(shape) // segmenter.batch) * segmenter.members

    def write(self, segmentation: Segmentation, placement: Placement, target: Target) -> None:
        """Write a segmentation as files that are whole when they appear."""
        if target.path.name.endswith(".dcm"):
            digest = str(self.segmenter.about["model"]["digest"])
            values = self.segmenter.values
            write_segmentation(segmentation.labels, placement.path, target.path, digest, values)
            return
        if target.beside is not None and segmentation.probabilities is not None:
            channels = np.moveaxis(segmentation.probabilities, 0, -1)
            channels = channels[..., 0] if channels.shape[-1] == 1 else channels
            said = channels_comment(self.regions or self.segmenter.values, bool(self.regions))
            save_like(channels, placement, target.beside, said)
        save_like(segmentation.labels, placement, target.path)


def prepare(request: Request) -> Job:
    """Load the model, find the studies and their places.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: options do not fit each other, the model or the studies.
        RuntimeError: the network does not take patches as they would be.
    """
    request = dataclasses.replace(request, input=[with_name(path) for path in request.input])
    if is_network(request.model):
        return _of_network(request)
    return _of_run(request)


def _of_run(request: Request) -> Job:
    model = load_model(request.model, request.device, trust=request.trust_model)
    for name in _OF_NETWORKS:
        if getattr(request, name) not in (None, False):
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: is for networks; a run's configuration has its own")
    if request.threshold is not None and len(model.labels) > 2:
        raise ValueError("--threshold: is for one foreground label; of several the greatest wins")
    options = prediction_of(request, model.config.prediction)
    _check_output(request)
    if all(is_series(path) or _has_series(path) for path in request.input):
        check_order(request.input, model.images, model.channels)
        studies = find_studies(request.input, model.config.data.mask)
    else:
        studies = find_inputs(
            request.input, model.images, model.config.data, model.channels, model.unused_channels
        )
    label = model.config.data.label
    places = [study.images[0].parent for study in studies] if label else []
    truths = [path for x in places for name in names_of(x, label) for path in files_named(x, name)]
    targets, to_folder = _targets(request, studies, truths)
    segmenter = RunSegmenter(model, Path(request.model), options, request.probabilities)

    def probe() -> Probe:
        device = next(model.network.parameters()).device
        patches = torch.zeros(options.batch, len(model.images), *segmenter.patch, device=device)
        return probed(model.network, patches)[1]

    return Job(segmenter, studies, targets, to_folder, request.probabilities, probe(), probe)


def _has_series(folder: Path) -> bool:
    """Whether a folder is a batch of DICOM series."""
    if not folder.is_dir():
        return False
    inside = list(folder.iterdir())
    folders = [path for path in inside if path.is_dir()]
    images = any(map(is_image, inside))
    return bool(folders) and not images and all(is_series(path) for path in folders)


def _of_network(request: Request) -> Job:
    prediction = prediction_of(request, PredictionOptions(batch=1))
    data, intensities = _data(request)
    regions = request.regions
    check_decision(request)
    _check_output(request)
    studies = find_studies(request.input, data.mask)
    targets, to_folder = _targets(request, studies, [])
    network = network_of(request)
    patch = patch_of(request.patch, network)
    prediction = dataclasses.replace(prediction, batch=batch_of(request.batch, network))
    channels = _channels(studies)
    if network.inputs not in (None, channels):
        raise ValueError(
            f"--input: got {channels} channels, but the network takes {network.inputs}"
            f"{_files_of(studies[0])}"
        )
    patches = torch.zeros(prediction.batch, channels, *patch)
    try:
        classes, first = classes_of(network, patches)
    except RuntimeError as error:
        raise RuntimeError(f"{error}{_files_of(studies[0])}") from error
    activation = activation_of(request, classes)
    # What the fusion refuses, it refuses now.
    output = "regions" if regions else "mask" if classes == 1 else "labels"
    FusionOptions(
        classes,
        output,
        "identity" if activation == "none" and output != "labels" else activation,
        "logit" if network.head is not None else None,
        regions=None if regions is None else tuple(regions),
    )
    options = NetworkOptions(
        patch,
        data,
        prediction,
        classes,
        activation,
        None if regions is None else tuple(regions),
        intensities,
        request.probabilities,
    )
    segmenter = NetworkSegmenter(network, options)
    return Job(
        segmenter,
        studies,
        targets,
        to_folder,
        request.probabilities,
        first,
        lambda: probed(network, patches)[1],
        options.regions,
    )


# --- Options --------------------------------------------------------------------------------------


def prediction_of(request: Request, defaults: PredictionOptions) -> PredictionOptions:
    """The section ``[prediction]`` with the options in it."""
    names = ("threshold", "window", "overlap", "grid", "orientations", "batch")
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    return _parsed({"prediction": {**vars(defaults), **given}}).prediction


def _data(request: Request) -> tuple[DataOptions, tuple[float, float] | None]:
    """The section ``[data]`` that options make, and what intensities become 0 and 1."""
    normalize = request.normalize or "none"
    intensities = None
    if ":" in normalize:
        try:
            low, high = (float(x) for x in normalize.split(":"))
        except ValueError:
            low = high = 0.0
        if not -np.inf < low < high < np.inf:
            raise ValueError(f"--normalize: got {normalize!r}, expected LOW:HIGH, LOW below HIGH")
        intensities, normalize = (low, high), "none"
    given = {
        "mask": request.mask,
        "orientation": request.orientation,
        "spacing": None if request.spacing is None else _three("spacing", request.spacing),
        "clip": None if request.clip is None else list(request.clip),
    }
    keys = {name: value for name, value in given.items() if value is not None}
    data = _parsed({"data": {"mask": "all", "normalisation": normalize, **keys}}).data
    if intensities is not None and data.clip != [0, 100]:
        raise ValueError("--clip: got one beside --normalize LOW:HIGH, which clips")
    return data, intensities


def _parsed(sections: dict[str, dict[str, Any]]) -> Config:
    """The configuration, with errors that name options."""
    try:
        return parse(sections)
    except ConfigError as error:
        text = str(error)
        for key, option in _OPTIONS.items():
            text = re.sub(rf"^{re.escape(key)}", option, text)
        raise ValueError(text) from None


def _three(name: str, given: Sequence[Any]) -> list[Any]:
    if len(given) not in (1, 3):
        raise ValueError(f"--{name}: got {len(given)} numbers, expected 1 or 3")
    return list(given) * (3 // len(given))


def network_of(request: Request) -> Network:
    """The network that ``--model`` names."""
    return load_network(
        request.model,
        request.device,
        trust=request.trust_model,
        identity=request.model_id,
        head=request.head,
    )


def patch_of(given: Sequence[int] | None, network: Network) -> tuple[int, ...]:
    """The extent of a patch: what is asked for, or an export's own."""
    fixed = network.patch or (None,) * 3
    if given is None:
        if None in fixed:
            raise ValueError("--patch: is needed: the extent of what the network is given at once")
        return tuple(n for n in fixed if n is not None)
    patch = tuple(_three("patch", given))
    if min(patch) < 1:
        raise ValueError(f"--patch: got {list(patch)}, expected numbers >= 1")
    if any(n not in (None, p) for n, p in zip(fixed, patch, strict=True)):
        expected = ", ".join("any" if n is None else str(n) for n in fixed)
        raise ValueError(f"--patch: got {list(patch)}, but the export takes {expected}")
    return patch


def batch_of(given: int | None, network: Network) -> int:
    """Patches a call, which an export may limit."""
    least, most = network.batch
    if given is None:
        return max(1, least)
    if most is not None and given > most:
        raise ValueError(f"--batch: got {given}, but the export takes {most} at most")
    return given


def check_decision(request: Request) -> None:
    """Raise for ``--activation`` and ``--regions`` that no network has."""
    activation, regions = request.activation, request.regions
    if activation not in (None, "softmax", "sigmoid", "identity", "none"):
        raise ValueError(
            f"--activation: got {activation!r}, expected softmax, sigmoid, identity (predictions "
            "are probabilities) or none (labels by the greatest)"
        )
    if regions is not None and (request.labels or min(regions) < 1):
        raise ValueError(f"--regions: got {list(regions)}, expected values >= 1, without --labels")


def activation_of(request: Request, classes: int) -> str:
    """What turns a prediction into probabilities, checked with the rest."""
    regions = request.regions
    if regions is not None and len(regions) != classes:
        raise ValueError(
            f"--regions: got {len(regions)} values for {classes} channels, expected one a channel"
        )
    if request.labels and classes == 1:
        raise ValueError(
            "--labels: the network has one channel, whose mask is written; leave --labels out"
        )
    several = classes > 1 and regions is None
    if request.threshold is not None and several:
        raise ValueError(
            "--threshold: is for one channel or --regions; of labels the greatest wins"
        )
    activation = request.activation or ("softmax" if several else "sigmoid")
    if activation == "softmax" and classes == 1:
        raise ValueError("--activation: got softmax for one channel, expected sigmoid or identity")
    if activation == "none" and (request.probabilities or not several):
        raise ValueError(
            "--activation: got none, which goes with labels alone; identity says that predictions "
            "are probabilities"
        )
    return activation


# --- What the network does ------------------------------------------------------------------------


def _channels(studies: Sequence[Subject]) -> int:
    """Of the first study that can be looked at."""
    for study in studies:
        if len(study.images) > 1:
            return len(study.images)
        with contextlib.suppress(Exception):  # reading it later says what is wrong
            return header_of(study.images[0]).channels
    return 1


def _files_of(study: Subject) -> str:
    """Which files were taken for the channels of a study, where there are several."""
    names = [path.name for path in study.images]
    if len(names) == 1:
        return ""
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"; the channels of {study.name} are {len(names)} files: {shown}"


def classes_of(network: Network, patches: torch.Tensor) -> tuple[int, Probe]:
    """Channels of a prediction, by one call."""
    try:
        result, probe = probed(network, patches)
    except MemoryError:
        raise
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"--model: the network does not take patches {tuple(patches.shape)} (batch, channels, "
            f"--patch): {why}"
        ) from error
    if not isinstance(result, torch.Tensor) or result.ndim != 5:
        shape = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise ValueError(
            f"--model: the network returned {shape}, expected (batch, classes, x, y, z)"
        )
    if result.shape[2:] != patches.shape[2:]:
        raise ValueError(
            f"--model: the network returned {tuple(result.shape)} of patches "
            f"{tuple(patches.shape)}, expected their extent"
        )
    channels = int(result.shape[1])
    if network.head is None:
        return channels, probe
    classes, features = network.head[0].shape
    if features != channels:
        raise ValueError(f"--head: takes {features} features, but the network returns {channels}")
    if network.whole is not None:
        _check_last(network, patches)
    return int(classes), probe


def _check_last(network: Network, patches: torch.Tensor) -> None:
    """Raise where the layer that was taken off is not the last."""
    given = torch.randn(patches[:1].shape, generator=torch.Generator().manual_seed(0))
    assert network.head is not None
    assert network.whole is not None
    with torch.no_grad():
        weight, bias = (part.cpu().double() for part in network.head)
        features, expected = network(given).cpu().double(), network.whole(given).cpu().double()
    found = torch.einsum("ck,bkxyz->bcxyz", weight, features) + bias.reshape(-1, 1, 1, 1)
    # Predictions that are not finite are refused later, and TF32 rounds.
    if found.shape != expected.shape or (found - expected).abs().max() > 0.02 * (
        expected.abs().max()
    ):
        raise ValueError(
            "--head: is not the network's last layer: applied to what the others return, it gives "
            "another prediction than the network, so that something follows it"
        )


def probed(network: Callable[[torch.Tensor], Any], patches: torch.Tensor) -> tuple[Any, Probe]:
    """What a call returns, and its time and memory.

    Raises:
        MemoryError: it does not fit the GPU.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is no network's
    resting = _resident("VmRSS")
    begun = time.perf_counter()
    try:
        with torch.no_grad():
            result = network(patches)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryError(
            f"one call of the network does not fit the GPU: {str(error).splitlines()[0]}; smaller "
            "--batch or --patch"
        ) from None
    seconds = time.perf_counter() - begun
    return result, Probe(seconds, resting, max(_resident("VmHWM") - resting, 0))


def _resident(key: str) -> int:
    """Bytes of this process's memory; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


# --- Places ---------------------------------------------------------------------------------------


def _check_output(request: Request) -> None:
    output, kind = request.output, request.format
    if kind not in (None, "nifti", "dicom"):
        raise ValueError(f"--format: got {kind!r}, expected nifti or dicom")
    if output.name.endswith(".dcm") or kind == "dicom":
        if request.probabilities:
            raise ValueError("--probabilities: is not written as DICOM-SEG")
        if kind == "nifti" or output.name.endswith(_ENDINGS):
            raise ValueError(f"--format: got {kind}, but --output {output}")
        return
    if output.name.lower().endswith(_NOT_WRITTEN) and not output.name.endswith(_ENDINGS):
        raise ValueError(f"--output: got {output}, expected a folder or a file .nii.gz or .nii")


def _targets(
    request: Request, studies: Sequence[Subject], truths: Sequence[Path]
) -> tuple[list[Target], bool]:
    """Where segmentations go, none of them over what is read or over another."""
    output = request.output
    one_file = output.name.endswith((*_ENDINGS, ".dcm"))
    dicom = output.name.endswith(".dcm") or request.format == "dicom"
    if dicom:
        plain = next((s for s in studies if not is_series(s.images[0])), None)
        if plain is not None:
            raise ValueError(
                f"--output: DICOM-SEG is of DICOM series, but {plain.images[0]} is none"
            )
    if one_file and len(studies) > 1:
        raise ValueError(f"--output: got {output} for {len(studies)} subjects, expected a folder")

    def beside(path: Path) -> Path | None:
        return probabilities_of(path) if request.probabilities else None

    if one_file:
        targets = [Target(output, beside(output))]
    else:
        targets = []
        for study in studies:
            path = output / f"{study.name}{'.dcm' if dicom else '.nii.gz'}"
            status = output / STATUS / f"{study.name}.json"
            targets.append(Target(path, beside(path), status))
    kept = {path.resolve() for path in truths}
    for study in studies:
        kept |= {p.resolve() for p in (*study.images, study.mask) if p is not None}
    made: set[Path] = set()
    for path in [p for target in targets for p in (target.path, target.beside) if p is not None]:
        if {path.resolve(), path.resolve().parent} & kept:  # a series is its folder
            raise ValueError(
                f"--output: {path} is an image, mask or label of a subject, expected another place"
            )
        if path in made:
            raise ValueError(f"--output: two of the subjects would be written to {path}")
        made.add(path)
    if one_file and request.skip_existing:
        raise ValueError(
            f"--skip-existing: got --output {output}, expected a folder, whose statuses tell what "
            "a file is of"
        )
    if not request.overwrite:
        _check_ours(request, targets, not one_file)
    return targets, not one_file


def _check_ours(request: Request, targets: Sequence[Target], to_folder: bool) -> None:
    """Raise where a file would be replaced that is not as this command wrote it."""
    foreign: list[Path] = []
    for target in targets:
        unknown = target.status is None or not target.status.is_file()
        if not (request.skip_existing and target.exists and unknown):  # else it is kept
            foreign += target.foreign()
    summary = request.output / SUMMARY
    if to_folder and summary.exists():
        try:
            ours = "network_seconds" in json.loads(summary.read_text("utf-8"))
        except (OSError, ValueError, TypeError):
            ours = False
        foreign += [] if ours else [summary]
    if foreign:
        more = f", as {len(foreign) - 1} more of the files there" if len(foreign) > 1 else ""
        why = "is not as the status tells that this command wrote it" if to_folder else "exists"
        raise FileExistsError(
            f"--output: {foreign[0]} {why}{more}; expected another place, or --overwrite"
        )
