"""Losses on the hippocampi of 200 subjects: what they find, at one half and at tuned thresholds."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from voxfuse._files import write_text, write_whole
from voxfuse.experiments.experiment import Experiment, Finished, Place, Run
from voxfuse.experiments.results import Row
from voxfuse.experiments.scores import ARGMAX, CHOICES
from voxfuse.experiments.tables import (
    AGAINST,
    GLOSSARY,
    Scores,
    beta_chart,
    differences,
    done,
    levels,
    lost,
    means,
    tuning,
)
from voxfuse.experiments.trained import BETAS, COLUMNS, KEY, LOSSES, scored, trained
from voxfuse.metrics._arrays import optional
from voxfuse.training.config import Config, LossOptions, parse
from voxfuse.training.dataset import find_dataset
from voxfuse.training.volumes import check_subjects

#: Structures of a task, by the values that its labels have.
TASKS = {"binary": ("hippocampus",), "two-class": ("anterior", "posterior")}
#: How many subjects are trained on, tuned on and tested on.
PARTS = {"training": 80, "validation": 30, "test": 90}
SEEDS = range(5)
#: In the order in which they are done, and cut from the end if they must be.
PRIMARY = ("cross-entropy", "dice", "dice-ce", *(f"tversky-{beta}" for beta in BETAS))
FURTHER = ("weighted-ce", "focal", "jaccard", "generalised-dice", "lovasz")
#: Of the training voxels, that are background, anterior and posterior.
SHARES = (0.948, 0.027, 0.025)


def runs(quick: bool) -> list[Run]:
    """The binary task before the other, a seed's losses before the next seed: pairs are whole."""
    if quick:
        return [_run("binary", loss, 0) for loss in ("cross-entropy", "dice", "tversky-0.9")]
    primary = [_run(task, loss, seed) for task in TASKS for seed in SEEDS for loss in PRIMARY]
    return primary + [_run("two-class", loss, seed) for seed in SEEDS for loss in FURTHER]


def _run(task: str, loss: str, seed: int) -> Run:
    return {"task": task, "loss": loss, "seed": seed, "fold": 0}


def parts(subjects: Sequence[str]) -> dict[str, list[str]]:
    """Who is trained on, tuned on and tested on: the subjects by the SHA-256 of their names.

    Raises:
        ValueError: there are not as many as expected.
    """
    if len(subjects) != sum(PARTS.values()):
        raise ValueError(f"--data: got {len(subjects)} hippocampi, expected {sum(PARTS.values())}")
    order = sorted(subjects, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    found, start = {}, 0
    for part, count in PARTS.items():
        found[part] = sorted(order[start : start + count])
        start += count
    return found


def configuration(run: Run, training: Sequence[str], quick: bool) -> Config:
    """What a run trains; runs of a seed share its weights at the start and its patches."""
    config = parse(
        {
            "data": {"mask": "all", "training": list(training)},
            "sampling": {"method": "uniform", "patch": [32, 48, 32], "batch": 2},
            "augmentation": {"flips": "none"},
            "network": {"name": "unet", "features": [4, 8] if quick else [8, 16, 32]},
            "optimiser": {"learning_rate": 1e-3},
            "training": {
                "steps": 60 if quick else 1500, "seed": run["seed"], "threads": 1,
                "checkpoint_every": 250, "log_every": 50, "device": "cpu",
            },
        }
    )  # fmt: skip
    loss = LOSSES[run["loss"]]
    if run["loss"] == "weighted-ce":
        weights = [round(1 / (len(SHARES) * share), 3) for share in SHARES]
        loss = LossOptions(loss.name, {"class_weight": weights})
    return replace(config, loss=loss)


def prepared(place: Place, task: str) -> Path:
    """A folder with a ``dataset.json`` of the task; labels of the whole hippocampus are made."""
    source = (place.data / "hippocampus").resolve()
    names = sorted(path.name for path in (source / "images").glob("*.nii.gz"))
    folder = (place.work / "losses" / "data" / task).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    labels = source / "labels"
    if task == "binary":
        for name in names:
            _write_whole_hippocampus(labels / name, folder / name)
        labels = folder
    content = {
        "channel_names": {"0": "t1"},
        "labels": {"background": 0, **{name: k + 1 for k, name in enumerate(TASKS[task])}},
        "training": [
            {"image": str(source / "images" / name), "label": str(labels / name)} for name in names
        ],
    }
    write_text(folder / "dataset.json", json.dumps(content))
    return folder


def _write_whole_hippocampus(path: Path, made: Path) -> None:
    if not made.is_file():
        nibabel = optional("nibabel", "Reading hippocampi")
        scan = nibabel.load(path)
        both = (np.asarray(scan.dataobj) > 0).astype(np.uint8)
        content = gzip.compress(nibabel.Nifti1Image(both, scan.affine).to_bytes())
        write_whole(made, lambda file: file.write(content))


def rows(run: Run, place: Place) -> list[Row]:
    """Train a run's network and score the test subjects."""
    folder = prepared(place, run["task"])
    everyone = sorted(find_dataset(folder, Config().data).subjects)
    lists = parts(everyone)
    if place.quick:
        lists = {part: names[:8] for part, names in lists.items()}
    config = configuration(run, lists["training"], place.quick)
    model = trained(config, folder, place.work / "losses" / "runs" / EXPERIMENT.named(run))
    dataset = find_dataset(folder, config.data)
    volumes = {}
    for part in ("validation", "test"):
        subjects = [dataset.subjects[name] for name in lists[part]]
        found = check_subjects(subjects, config.data, dataset.labels, lists[part])
        volumes[part] = list(found.values())
    return scored(run, TASKS[run["task"]], volumes, model)


def pages(finished: Finished) -> dict[str, str]:
    """Means of every loss, differences to Dice loss and to cross-entropy, what beta does."""
    text = [
        "# Losses on hippocampi",
        done(finished, "voxfuse experiment losses"),
        "What was asked, of whom and how, is in the [protocol](../protocol.md). Scores are means "
        "over seeds and 90 test subjects; differences are within seed and subject, with 95 % "
        "intervals of a bootstrap that draws seeds and subjects. Of five seeds such an interval "
        "covers between 84 %, where seeds alone differ, and 95 %. In the two-class task a "
        'subject\'s score is the mean of both structures, and "argmax" takes the class of greatest '
        "probability, as networks of several classes are used.",
        GLOSSARY,
    ]
    charts = {}
    for task in TASKS:
        scores = Scores(finished.rows, task)
        if not scores.losses:
            continue
        several = len(TASKS[task]) > 1
        text += [
            f"## {task.capitalize()}",
            means(scores, (*CHOICES, ARGMAX) if several else CHOICES),
        ]
        text += [
            f"At 0.5 nothing of the {structure} is found in any test subject by "
            f"{len(seeds)} of {len(scores.seeds(loss))} networks of {loss} "
            f"(seed {', '.join(map(str, seeds))})."
            for (loss, structure), seeds in lost(finished.rows, task).items()
        ]
        for against in AGAINST:
            if scores.seeds(against):
                text.append(differences(scores, against))
        text += [
            "What tuning does to a loss, and the thresholds that it chose, one a network and "
            "structure: the median, and from which to which.",
            tuning(scores), levels(scores, finished.rows, task, TASKS[task]),
        ]  # fmt: skip
        name, chart = f"beta_{task}.svg", beta_chart(scores)
        if chart:
            charts[name] = chart
            text.append(f"![What beta does in the {task} task]({name})")
    return {"README.md": "\n\n".join(filter(None, text)) + "\n", **charts}


EXPERIMENT = Experiment(
    name="losses",
    title="Losses on the hippocampi of 200 subjects",
    key=KEY,
    columns=COLUMNS,
    runs=runs,
    rows=rows,
    pages=pages,
)
