"""What makes a segmentation of a study: a run of ``voxfuse train``, or any network."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxfuse import resample_argmax
from voxfuse.fusion.grids import plan_grid
from voxfuse.fusion.options import ABSENT_LOGIT
from voxfuse.inference.models import Network, digest_of_file
from voxfuse.inference.reading import read_scan
from voxfuse.scale.manifest import digest_of
from voxfuse.training.config import DataOptions, PredictionOptions
from voxfuse.training.dataset import Subject
from voxfuse.training.predict import MODEL, Model, fuse_in_mask
from voxfuse.training.volumes import Volume, load_volume, on_own_grid, turn_back

Array = NDArray[Any]


_BOUNDED = (
    "all of the network's predictions lie between 0 and 1: if they are probabilities already, "
    "--activation identity is right, not {}"
)


class Overdue(TimeoutError):
    """A study takes longer than it may."""


@dataclass
class Watch:
    """Looks on while the network works: counts calls, keeps their time, and ends what is late."""

    deadline: float | None = None  #: of time.monotonic()
    called: Callable[[int], object] | None = None  #: given the number of calls so far
    calls: int = 0
    seconds: float = 0.0

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call of the network."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise Overdue("took longer than --timeout allows")
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.calls += 1
            self.seconds += time.perf_counter() - begun
        if self.called is not None:
            self.called(self.calls)


@dataclass(frozen=True)
class Segmentation:
    """Of a study, on its own grid."""

    labels: Array  #: (x, y, z) uint8, uint16 or more
    probabilities: NDArray[np.float32] | None  #: (C, x, y, z), the classes above the background
    note: str = ""  #: what looks wrong


class Segmenter(Protocol):
    """What a batch of studies needs."""

    about: dict[str, Any]  #: model and options, for a status
    data: DataOptions
    patch: tuple[int, ...]
    overlap: float
    batch: int  #: patches a call
    members: int  #: predictions of a patch
    classes: int
    channels_written: int  #: of probabilities
    values: tuple[int, ...]  #: of labels above the background
    fuses_probabilities: bool  #: of all classes, on a whole grid

    def read(self, study: Subject) -> Volume:
        """Files to arrays as the network takes them."""

    def predict(self, volume: Volume, watch: Watch) -> Segmentation:
        """Arrays to a segmentation on the study's own grid."""

    def patches(self, shape: tuple[int, ...]) -> int:
        """Patches of a volume of this extent, at most."""


#: Predictions of a patch that are averaged.
MEMBERS = {"none": 1, "rotations": 4, "mirror": 8}


def _patches(shape: tuple[int, ...], patch: tuple[int, ...], options: PredictionOptions) -> int:
    larger = tuple(max(n, p) for n, p in zip(shape, patch, strict=True))
    grid = plan_grid(larger, patch, options.overlap, options.grid)
    return len(grid.distinct())


@dataclass
class RunSegmenter:
    """A run of ``voxfuse train``, with its own configuration."""

    model: Model
    path: Path
    options: PredictionOptions
    probabilities: bool = False
    about: dict[str, Any] = field(init=False)
    fuses_probabilities = True

    def __post_init__(self) -> None:
        file = self.path / MODEL if self.path.is_dir() else self.path
        model = {"kind": "run", "digest": digest_of_file(file), "step": self.model.step}
        self.about = {"model": model, "options": dataclasses.asdict(self.options)}
        self.data = self.model.config.data
        self.patch: tuple[int, ...] = tuple(self.model.config.sampling.patch)
        self.overlap, self.batch = self.options.overlap, self.options.batch
        self.members = MEMBERS[self.options.orientations]
        self.classes = len(self.model.labels)
        self.channels_written = self.classes - 1 if self.probabilities else 0
        self.values = tuple(sorted(v for v in self.model.labels.values() if v > 0))

    def read(self, study: Subject) -> Volume:
        """See :class:`Segmenter`."""
        return self.model.volume(study, read_scan)

    def predict(self, volume: Volume, watch: Watch) -> Segmentation:
        """See :class:`Segmenter`."""
        with _watched(self.model.network, watch):
            probabilities = self.model.of_volume(volume, self.options)
        labels = self.model.decided(probabilities, volume, self.options)
        return Segmentation(labels, probabilities if self.probabilities else None)

    def patches(self, shape: tuple[int, ...]) -> int:
        """See :class:`Segmenter`."""
        return _patches(shape, self.patch, self.options)


@contextmanager
def _watched(network: torch.nn.Module, watch: Watch) -> Iterator[None]:
    """Every call of a module is one of the watch's."""
    running: list[Any] = []

    def begin(*_: Any) -> None:
        running.append(watch.call())
        running[-1].__enter__()

    def end(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    hooks = [network.register_forward_pre_hook(begin), network.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class NetworkOptions:
    """How any network becomes a segmentation of a study."""

    patch: tuple[int, ...]
    data: DataOptions
    prediction: PredictionOptions
    classes: int  #: channels of a prediction, after the head
    activation: str  #: "softmax", "sigmoid", "identity" or "none"
    regions: tuple[int, ...] | None = None  #: the value of each channel, later ones on top
    intensities: tuple[float, float] | None = None  #: what becomes 0 and 1
    probabilities: bool = False


class NetworkSegmenter:
    """Any network, in patches, by :func:`voxfuse.sliding_window_inference`."""

    def __init__(self, network: Network, options: NetworkOptions) -> None:
        self.network, self.options = network, options
        self.data, self.patch, self.classes = options.data, options.patch, options.classes
        self.overlap, self.batch = options.prediction.overlap, options.prediction.batch
        self.fuses_probabilities = options.probabilities
        background = options.classes > 1 and options.regions is None
        self.channels_written = (options.classes - background) * options.probabilities
        self.members = MEMBERS[options.prediction.orientations]
        self.values = tuple(sorted(set(options.regions or range(1, max(options.classes, 2)))))
        self._bounded = True
        shown = dataclasses.asdict(options)
        for name in (
            "labels",
            "training",
            "validation",
            "validation_share",
            "test",
            "images",
            "label",
            "groups",
        ):
            shown["data"].pop(name)  # of the training, and names of subjects
        model = {"kind": network.kind, "digest": network.digest}
        if network.head is not None:
            model["head"] = " ".join(digest_of(part) for part in network.head)
        self.about = {"model": model, "options": shown}

    def read(self, study: Subject) -> Volume:
        """See :class:`Segmenter`."""
        volume = load_volume(study, self.options.data, read=read_scan)
        expected = self.network.inputs
        if expected is not None and volume.image.shape[0] != expected:
            raise ValueError(
                f"{study.name}: got {volume.image.shape[0]} channels, but the network takes "
                f"{expected}"
            )
        if self.options.intensities is not None:
            low, high = self.options.intensities
            np.clip((volume.image - low) / (high - low), 0, 1, out=volume.image)
            volume.image[:, ~volume.mask] = 0
        return volume

    def predict(self, volume: Volume, watch: Watch) -> Segmentation:
        """See :class:`Segmenter`."""
        options, placement = self.options, volume.placement
        fused, self._bounded = None, options.activation in ("softmax", "sigmoid")
        if options.probabilities:
            # What is averaged decides, as without them: logits behind a head. A mask on the
            # network's grid is one of probabilities in any case.
            late = self.network.head is not None and options.activation in ("softmax", "sigmoid")
            if options.regions is None and options.classes == 1:
                late &= placement.turned_shape != volume.mask.shape
            fused = self._fused(volume, watch, "logits" if late else "probabilities", None)
            decided = self._decided(fused, placement.turned_shape, late)
            if late:
                _activate(fused, options.activation)
        elif options.regions is not None:
            decided = self._fused(volume, watch, "regions", placement.turned_shape)
        else:
            output = "mask" if options.classes == 1 else "labels"
            decided = self._fused(volume, watch, output, placement.turned_shape)
        labels = turn_back(decided[0].numpy(), placement.turned)
        labels = labels.astype(np.uint8) if labels.dtype == np.bool_ else labels
        assert volume.own_mask is not None
        labels[~volume.own_mask] = 0
        note = _BOUNDED.format(options.activation) if self._bounded and watch.calls else ""
        if fused is None:
            return Segmentation(labels, None, note)
        background = options.classes > 1 and options.regions is None
        channels = fused[1:] if background else fused
        channels[:, ~torch.from_numpy(volume.mask)] = 0
        probabilities = on_own_grid(channels.numpy(), placement)
        probabilities[:, ~volume.own_mask] = 0
        return Segmentation(labels, probabilities, note)

    def patches(self, shape: tuple[int, ...]) -> int:
        """See :class:`Segmenter`."""
        return _patches(shape, self.options.patch, self.options.prediction)

    def _fused(
        self, volume: Volume, watch: Watch, output: str, shape: tuple[int, ...] | None
    ) -> Tensor:
        """(C or 1, \\*spatial) on the network's grid, or decided at ``shape``."""
        options, wanted = self.options, self.options.prediction

        def predicted(patches: Tensor) -> Tensor:
            with watch.call():
                result = self.network(patches)
                if not bool(torch.isfinite(result).all()):  # waits for a GPU too
                    raise RuntimeError("the network's predictions are not finite")
                if self._bounded:  # logits are not, by the first call
                    low, high = result.aminmax()
                    self._bounded = (
                        self.network.head is None and 0 <= float(low) <= float(high) <= 1
                    )
            return result

        activation, fill, out = options.activation, 0.0, None
        if activation == "none" and output != "labels":
            activation = "identity"
        device = self.network.device
        if output == "logits":
            activation = "none"
            fill = ABSENT_LOGIT if self._decides_by_threshold else 0.0
            # As where labels alone are decided, not rounded to the features' dtype.
            whole = (1, options.classes, *volume.mask.shape)
            out = torch.empty(whole, dtype=torch.float32, device=device)
        fused = fuse_in_mask(
            predicted,
            volume,
            options.patch,
            wanted,
            output=output,
            activation=activation,
            head=self.network.head,
            threshold=wanted.threshold if output in ("mask", "regions") else None,
            regions=options.regions if output == "regions" else None,
            resample_to=shape if shape is not None and shape != volume.mask.shape else None,
            fill=fill,
            out=out,
            sw_device=device,
            device=device,
        )
        return fused.cpu()

    @property
    def _decides_by_threshold(self) -> bool:
        return self.options.regions is not None or self.options.classes == 1

    def _decided(self, fused: Tensor, shape: tuple[int, ...], logits: bool) -> Tensor:
        """Labels of fused probabilities or logits at ``shape``, as the fusion itself decides."""
        options = self.options
        if not self._decides_by_threshold:
            return resample_argmax(fused, shape)[None]
        labels = resample_argmax(
            fused,
            shape,
            mode="mask" if options.regions is None else "regions",
            activation="sigmoid" if logits else "none",
            threshold=options.prediction.threshold,
            regions=options.regions,
        )
        return labels if options.regions is None else labels[None]


def _activate(logits: Tensor, activation: str) -> None:
    """Turn logits (C, \\*spatial) into probabilities where they are, slice by slice."""
    for place in range(logits.shape[1]):
        values = logits[:, place]
        values.copy_(values.softmax(0) if activation == "softmax" else values.sigmoid())
