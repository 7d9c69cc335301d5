"""What `losses` and `lesions` share: losses by name, a run's training, its predictions' rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse.experiments.experiment import Run
from voxfuse.experiments.results import Row
from voxfuse.experiments.scores import (
    ARGMAX,
    CHOICES,
    TUNED,
    Curve,
    curve,
    row,
    row_of_mask,
    tuned_threshold,
)
from voxfuse.training.config import Config, LossOptions
from voxfuse.training.predict import Model, decided, foreground_probabilities, load_model
from voxfuse.training.trainer import Trainer
from voxfuse.training.volumes import Volume

#: Of results.csv: what a run is ...
KEY = ("task", "loss", "seed", "fold")
#: ... and what is known of its predictions.
COLUMNS = (
    *("task", "loss", "beta", "seed", "fold", "split", "subject", "structure"),
    *("threshold", "level", "tp", "fp", "fn", "recall", "precision", "dice", "f2", "ap"),
)

BETAS = (0.6, 0.7, 0.8, 0.9)
_OVERLAP: dict[str, Any] = {"include_background": False}

#: Losses by the name that results have. Overlap is of the foreground, as in the papers; the
#: cross-entropy is of every voxel. Generalised Dice and Lovasz count the background, as they were
#: published. With alpha = 1/4, focal loss weighs foreground and background as Hashemi et al. 2018.
LOSSES: Mapping[str, LossOptions] = {
    "cross-entropy": LossOptions("CrossEntropyLoss"),
    "dice": LossOptions("DiceLoss", _OVERLAP),
    "dice-ce": LossOptions("DiceCELoss", _OVERLAP),
    **{
        f"tversky-{beta}": LossOptions(
            "TverskyLoss", {"alpha": round(1 - beta, 1), "beta": beta, **_OVERLAP}
        )
        for beta in BETAS
    },
    "weighted-ce": LossOptions("CrossEntropyLoss"),
    "focal": LossOptions("FocalLoss", {"gamma": 2.0, "alpha": 0.25}),
    "jaccard": LossOptions("JaccardLoss", _OVERLAP),
    "generalised-dice": LossOptions("GeneralizedDiceLoss"),
    "lovasz": LossOptions("LovaszLoss"),
}


def beta_of(loss: str) -> float | None:
    """The weight of false negatives, where the loss has one: Dice is Tversky at one half."""
    return 0.5 if loss == "dice" else float(loss[8:]) if loss.startswith("tversky-") else None


def trained(config: Config, data: Path, folder: Path) -> Model:
    """The network of a run, trained from where the folder has it to the last step.

    There is no validation during training: what it would choose by (Dice at one half) is one of
    the things compared.
    """
    Trainer(config, data, folder, say=lambda line: None).fit()
    return load_model(folder, "cpu")


def predicted(model: Model, volume: Volume) -> NDArray[np.float32]:
    """Probabilities of the classes above the background where the volume's label is.

    That is the network's grid; :meth:`Model.of_volume` goes back to the scan's own.
    """
    config = model.config
    patch = tuple(config.sampling.patch)
    return foreground_probabilities(model.network, volume, config.prediction, patch)


def scored(
    run: Run,
    structures: Sequence[str],
    volumes: Mapping[str, Sequence[Volume]],
    model: Model,
) -> list[Row]:
    """A row a test subject, structure and threshold: one half, and those tuned on validation.

    Of several structures, the class of greatest probability too.

    Args:
        run: its key.
        structures: names of the classes above the background.
        volumes: "validation" and "test".
        model: of the run.
    """
    curves: dict[tuple[str, str], list[tuple[str, Curve]]] = {}
    by_argmax: dict[tuple[str, str], list[Row]] = {}
    for split, those in volumes.items():
        for volume in those:
            probabilities = predicted(model, volume)
            classes = decided(probabilities, 0.5, volume.mask)
            assert volume.label is not None
            for c, structure in enumerate(structures):
                truth = volume.label == c + 1
                of_it = curve(probabilities[c], truth)
                curves.setdefault((split, structure), []).append((volume.name, of_it))
                decision = row_of_mask(of_it, classes == c + 1, truth)
                by_argmax.setdefault((split, structure), []).append(decision)
    rows: list[Row] = []
    for structure in structures:
        validation = [found for _, found in curves["validation", structure]]
        levels = {"0.5": 0.5, **{way: tuned_threshold(validation, TUNED[way]) for way in TUNED}}
        for way in CHOICES if len(structures) == 1 else (*CHOICES, ARGMAX):
            known = {**run, "beta": beta_of(run["loss"]), "structure": structure, "threshold": way}
            for split in ("validation", "test"):
                named = curves[split, structure]
                found = by_argmax[split, structure]
                if way != ARGMAX:
                    found = [row(of_it, levels[way]) for _, of_it in named]
                if split == "test":
                    for (subject, _), line in zip(named, found, strict=True):
                        rows.append({**known, "split": split, "subject": subject, **line})
                else:
                    rows.append({**known, "split": split, "subject": "mean", **_mean(found)})
    return rows


def _mean(found: Sequence[Row]) -> Row:
    """Of subjects: sums of counts, means of scores."""
    counts = {name: sum(line[name] for line in found) for name in ("tp", "fp", "fn")}
    level = found[0]["level"]
    scores = [name for name in found[0] if name not in (*counts, "level")]
    means = {name: float(np.mean([line[name] for line in found])) for name in scores}
    return {"level": level, **counts, **means}
