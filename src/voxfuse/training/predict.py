"""A trained run as a function of a subject's scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxfuse import sliding_window_inference
from voxfuse.metrics.files import Scan, load_scan
from voxfuse.training.checkpoints import restore
from voxfuse.training.config import Config, PredictionOptions, parse
from voxfuse.training.dataset import Subject
from voxfuse.training.networks import NETWORKS, make_network
from voxfuse.training.objective import Objective
from voxfuse.training.volumes import Volume, load_volume, on_own_grid

#: The file of a run's folder that predicts.
MODEL = "model.pt"


def device_of(name: str, what: str = "training.device") -> torch.device:
    """The device that a configuration names; "auto" is a GPU if there is one.

    Raises:
        ValueError: no such device, with ``what`` in the message.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{what}: got {name!r}, expected auto, cpu, cuda or cuda:N") from None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"{what}: got {name!r}, but PyTorch {torch.__version__} sees {gpus} GPUs")
    return device


def first_output(outputs: Any) -> Tensor:
    """The finest of what a network returns."""
    while not isinstance(outputs, Tensor):
        outputs = outputs[0]
    return outputs


def fuse_in_mask(
    predict: Callable[[Tensor], Tensor],
    volume: Volume,
    patch: tuple[int, ...],
    options: PredictionOptions,
    **fusion: Any,
) -> Tensor:
    """(C or 1, \\*spatial): fused predictions of the patches that have a voxel of the mask.

    Args:
        predict: takes (B, channels of the image, \\*patch).
        volume: see :func:`voxfuse.training.volumes.load_volume`.
        patch: extent of a patch.
        options: the section ``[prediction]``.
        fusion: further arguments of :func:`voxfuse.sliding_window_inference`.
    """
    image, skip = volume.image, None
    channels = len(image)
    if not volume.mask.all():
        # The mask travels as one channel more, so that it is cut and padded as the image is.
        image = np.concatenate([image, volume.mask[None]], dtype=np.float32)

        def skip(patches: Tensor) -> bool:
            return not bool(patches[:, channels:].any())

    fused: Tensor = sliding_window_inference(
        torch.from_numpy(image)[None],
        patch,
        options.batch,
        lambda patches: predict(patches[:, :channels]),
        overlap=options.overlap,
        window=options.window,
        grid=options.grid,
        tta=None if options.orientations == "none" else options.orientations,
        skip=skip,
        **fusion,
    )
    return fused[0]


def foreground_probabilities(
    network: nn.Module,
    volume: Volume,
    options: PredictionOptions,
    patch: tuple[int, ...],
    activation: str = "softmax",
) -> NDArray[np.float32]:
    """Fused probabilities of the classes above the background on the network's grid.

    Patches without a voxel of the mask are not predicted, and voxels outside it have probability 0.

    Args:
        network: in its evaluation mode.
        volume: see :func:`voxfuse.training.volumes.load_volume`.
        options: the section ``[prediction]``.
        patch: extent of a patch.
        activation: "softmax" or "sigmoid".

    Returns:
        (C - 1, \\*spatial) float32.

    Raises:
        RuntimeError: a probability is not finite.
    """
    device = next(network.parameters()).device

    def predicted(patches: Tensor) -> Tensor:
        images = patches.to(device, memory_format=torch.channels_last_3d)
        return first_output(network(images)).float().to(patches.device)

    fused = fuse_in_mask(
        predicted, volume, patch, options, output="probabilities", activation=activation
    )
    result: NDArray[np.float32] = fused[1:].numpy()
    if not np.isfinite(result).all():
        raise RuntimeError(f"{volume.name}: the network's probabilities are not finite")
    result[:, ~volume.mask] = 0
    return result


def decided(
    probabilities: NDArray[np.float32], threshold: float, mask: NDArray[np.bool_]
) -> NDArray[np.unsignedinteger[Any]]:
    """Classes of foreground probabilities (C - 1, \\*spatial): 0, the background, outside the mask.

    One foreground: 1 where ``p >= threshold``. More: the greatest of all, the background's being
    what they leave of 1; ties go to the lower class.
    """
    if probabilities.shape[0] == 1:
        one: NDArray[np.uint8] = ((probabilities[0] >= threshold) & mask).astype(np.uint8)
        return one
    background = 1 - probabilities.sum(0, keepdims=True)
    classes = np.concatenate([background, probabilities]).argmax(0)
    several: NDArray[np.unsignedinteger[Any]] = (
        classes.astype(np.min_scalar_type(len(probabilities))) * mask
    )
    return several


@dataclass
class Model:
    """What a run's folder predicts with."""

    config: Config
    images: tuple[str, ...]
    labels: dict[str, int]  #: name and value, the background first
    network: nn.Module
    step: int
    channels: tuple[int, ...] = ()  #: the modalities' numbers in nnU-Net's file names
    unused_channels: tuple[int, ...] | None = None  #: others' that the dataset.json had, if known

    @property
    def values(self) -> list[int]:
        """The labels' values, class by class."""
        return sorted(self.labels.values())

    def volume(self, subject: Subject, read: Callable[[Path], Scan] = load_scan) -> Volume:
        """A subject as the network sees it; a label is not looked at.

        Args:
            subject: its files.
            read: see :func:`voxfuse.training.volumes.load_volume`.

        Raises:
            DataError: the scans do not fit; see :func:`voxfuse.training.volumes.load_volume`.
        """
        volume = load_volume(subject, self.config.data, read=read)
        if volume.image.shape[0] != len(self.images):
            raise ValueError(
                f"{subject.name}: got {volume.image.shape[0]} modalities, expected "
                f"{', '.join(self.images)}"
            )
        return volume

    def probabilities(
        self, subject: Subject, options: PredictionOptions | None = None
    ) -> tuple[NDArray[np.float32], Volume]:
        """Of the classes above the background (C - 1, x, y, z) on the scan's own grid.

        Args:
            subject: its files; a label is not looked at.
            options: in place of the run's section ``[prediction]``.

        Raises:
            DataError: the scans do not fit; see :func:`voxfuse.training.volumes.load_volume`.
        """
        volume = self.volume(subject)
        return self.of_volume(volume, options), volume

    def of_volume(
        self, volume: Volume, options: PredictionOptions | None = None
    ) -> NDArray[np.float32]:
        """:meth:`probabilities` of scans that are in memory."""
        config = self.config
        fused = foreground_probabilities(
            self.network,
            volume,
            options or config.prediction,
            tuple(config.sampling.patch),
            Objective(config.loss).activation,
        )
        probabilities = on_own_grid(fused, volume.placement)
        assert volume.own_mask is not None
        probabilities[:, ~volume.own_mask] = 0  # interpolation reaches beyond it
        return probabilities

    def decided(
        self,
        probabilities: NDArray[np.float32],
        volume: Volume,
        options: PredictionOptions | None = None,
    ) -> NDArray[np.generic]:
        """Values of labels (x, y, z) on the scan's own grid, of probabilities there."""
        threshold = (options or self.config.prediction).threshold
        values = np.asarray(self.values)
        values = values.astype(np.min_scalar_type(int(values[-1])))
        assert volume.own_mask is not None
        labels: NDArray[np.generic] = values[decided(probabilities, threshold, volume.own_mask)]
        return labels

    def segmentation(
        self, subject: Subject, options: PredictionOptions | None = None
    ) -> tuple[NDArray[np.generic], NDArray[np.float32], Volume]:
        """Values of labels (x, y, z) on the scan's own grid; the probabilities, and the volume."""
        probabilities, volume = self.probabilities(subject, options)
        return self.decided(probabilities, volume, options), probabilities, volume


def load_model(run: str | Path, device: str = "auto", *, trust: bool = False) -> Model:
    """The model of a run's folder: the best by validation, or the last where there is none.

    Args:
        run: what ``voxfuse train --out`` wrote, or its ``model.pt``.
        device: as PyTorch names it; "auto" is a GPU if there is one.
        trust: make a network ``"package.module:Class"`` that the file names, by running that code.

    Raises:
        FileNotFoundError: no such run, or one that has no model yet.
        ValueError: a file that is no model, or names a network that is not trusted; or no such
            device.
    """
    path = Path(run)
    if path.is_dir():
        path = path / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"--model: there is no {path}; voxfuse train writes it")
    content = restore(path)
    if content.get("kind") != "patches":
        raise ValueError(f"{path}: got a model of kind {content.get('kind')!r}, expected 'patches'")
    missing = {"config", "images", "labels", "network", "step"} - set(content)
    if missing:
        raise ValueError(f"{path}: is no model: it has no {', '.join(sorted(missing))}")
    name = _config_of(content).network.name
    if not trust and name not in NETWORKS:
        raise ValueError(
            f"--model: {path} names the network {name!r}, a module that is imported and called, "
            "with your rights; --trust-model says that you know where it comes from"
        )
    return model_of(content, device)


def _ascending(labels: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(labels.items(), key=lambda label: label[1]))


def _config_of(content: Mapping[str, Any]) -> Config:
    """The configuration that a model was trained with.

    Older versions took labels in any order; their classes were in that of the values as well.
    """
    sections = dict(content["config"])
    data = dict(sections.get("data", {}))
    if "labels" in data:
        sections["data"] = {**data, "labels": _ascending(data["labels"])}
    return parse(sections)


def model_of(content: Mapping[str, Any], device: str = "auto") -> Model:
    """The model of a file's content."""
    config = _config_of(content)
    images, labels = tuple(content["images"]), _ascending(content["labels"])
    options = config.network
    place = device_of(device, "device")
    network = make_network(options.name, len(images), len(labels), options.options)
    network.load_state_dict(content["network"])
    network.eval().to(place, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    channels = tuple(content.get("channels", ()))
    # Files of older versions have no list of the others; there are none where all are trained on.
    others = content.get("unused_channels", None if config.data.images else ())
    unused = None if others is None else tuple(others)
    return Model(config, images, labels, network, content["step"], channels, unused)
