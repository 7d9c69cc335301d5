"""Losses on MS lesions of six patients, training enriched by lesions of others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse.experiments.experiment import Experiment, Finished, Place, Run
from voxfuse.experiments.results import Row
from voxfuse.experiments.scores import CHOICES, TUNED, by_size, curve, leave_one_out, row
from voxfuse.experiments.scores import tuned_threshold as tuned
from voxfuse.experiments.statistics import few_patients
from voxfuse.experiments.tables import (
    AGAINST,
    GLOSSARY,
    Scores,
    beta_chart,
    differences,
    done,
    levels,
    markdown,
    means,
    patient_of,
    tuning,
)
from voxfuse.experiments.trained import COLUMNS, KEY, LOSSES, beta_of, predicted, trained
from voxfuse.training.config import Config, LossOptions, parse
from voxfuse.training.dataset import find_dataset, read_table
from voxfuse.training.predict import Model
from voxfuse.training.simulation import MaskShapes
from voxfuse.training.simulation.files import find_hosts, write_simulated
from voxfuse.training.volumes import Volume, check_subjects

#: Patients of a fold, which is tested by networks that the other one has trained.
FOLDS = (
    ("lesjak07", "lesjak19", "mslessegP18"),
    ("lesjak26", "mslessegP14", "mslessegP39"),
)
SEEDS = range(3)
#: In the order in which they are done, and cut from the end if they must be.
PRIMARY = ("cross-entropy", "dice-ce", "dice", "tversky-0.7", "tversky-0.9")
FURTHER = ("focal", "weighted-ce", "tversky-0.6", "tversky-0.8")
#: Masks of patients who are among the scans, and those whose lesions the tuning heads get; the
#: lesions of all others enrich the training.
OWN = ("lesjak07", "lesjak19", "lesjak26")
TUNING = tuple(f"lesjak{k:02d}" for k in range(4, 31, 4))
#: Of the patches' voxels, that are lesion: inverse weights of the weighted cross-entropy.
SHARE = 0.03
#: Thresholds tuned on lesions that were transplanted into the training heads.
SEMIREAL = {"semireal-dice": "dice", "semireal-f2": "f2"}


def runs(quick: bool) -> list[Run]:
    """Both folds of a seed and loss after each other; the large network once, at the end."""
    if quick:
        return [_run(loss, 0, 0) for loss in ("cross-entropy", "tversky-0.9")]
    primary = [_run(loss, seed, fold) for seed in SEEDS for loss in PRIMARY for fold in (0, 1)]
    further = [_run(loss, seed, fold) for seed in SEEDS for loss in FURTHER for fold in (0, 1)]
    return [*primary, *further, {**_run("dice-ce", 0, 0), "task": "fc-densenet"}]


def _run(loss: str, seed: int, fold: int) -> Run:
    return {"task": "lesion", "loss": loss, "seed": seed, "fold": fold}


def configuration(run: Run, place: Place) -> Config:
    """What a run trains; runs of a seed and fold share initial weights, patches and lesions."""
    quick = place.quick
    training = ["lesjak26"] if quick else list(FOLDS[1 - run["fold"]])
    shapes = place.work / "lesions" / "data" / "masks"
    config = parse(
        {
            "data": {
                "images": ["flair", "t1"], "label": "lesions", "mask": "positive",
                "labels": {"background": 0, "lesion": 1}, "groups": "subjects.csv",
                "normalisation": "robust", "training": training,
            },
            "sampling": {"patch": [32, 32, 32], "batch": 4, "foreground": 0.5, "jitter": 0.375},
            "augmentation": {"simulate_every": 400, "simulate_shapes": str(shapes.resolve())},
            "network": {"name": "unet", "features": [4, 8] if quick else [8, 16, 32, 64]},
            "training": {
                "steps": 20 if quick else 2000, "seed": run["seed"], "threads": 1,
                "checkpoint_every": 200, "log_every": 50, "device": "cpu",
            },
            "prediction": {"overlap": 0.0 if quick else 0.5},
        }
    )  # fmt: skip
    if run["task"] == "fc-densenet":
        config = replace(
            config,
            sampling=replace(config.sampling, patch=[64, 64, 64], batch=2),
            network=replace(config.network, name="fc_densenet_compact", options={}),
            training=replace(config.training, steps=300, checkpoint_every=20, log_every=10),
        )
    loss = LOSSES[run["loss"]]
    options: dict[str, Any] = dict(loss.options)
    if "include_background" in options:
        options["batch"] = True  # a patch without a lesion has no ratio of its own
    if run["loss"] == "weighted-ce":
        options["class_weight"] = [round(0.5 / (1 - SHARE), 3), round(0.5 / SHARE, 3)]
    return replace(config, loss=LossOptions(loss.name, options))


def link_masks(place: Place) -> None:
    """A folder of the masks that enrich training: of nobody who is scanned or tuned on."""
    masks = sorted((place.data / "ms_lesions" / "masks_mni").resolve().glob("*.nii.gz"))

    def links(made: Path) -> None:
        for path in masks:
            if path.name.split(".")[0] not in (*OWN, *TUNING):
                (made / path.name).symlink_to(path)

    _folder(place.work / "lesions" / "data" / "masks", links)


def make_heads(place: Place, fold: int) -> Path:
    """A fold's training heads, one a patient, with transplanted lesions to tune on."""
    source = place.data / "ms_lesions"
    made = place.work / "lesions" / "data" / f"semireal{fold}"

    def heads(made: Path) -> None:
        scans = {line["patient"]: line["subject"] for line in _table(place)[::-1]}
        hosts = ["lesjak26"] if place.quick else [scans[name] for name in FOLDS[1 - fold]]
        found = find_hosts([source / host for host in hosts], ["t1", "flair"], "lesions")
        names = [path.name.split(".")[0] for path in (source / "masks_mni").glob("*.nii.gz")]
        left_out = [name for name in names if name not in TUNING]
        shapes = MaskShapes.from_folder(source / "masks_mni", leave_out=left_out)
        list(write_simulated(found, shapes, made, seed=fold))

    _folder(made, heads)
    return made


def _folder(path: Path, fill: Callable[[Path], None]) -> None:
    """A folder that is there whole or not at all, whoever makes it."""
    if path.is_dir():
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    fill(beside)
    try:
        beside.rename(path)
    except OSError:  # another process was first
        shutil.rmtree(beside)


def _table(place: Place) -> list[dict[str, str]]:
    return read_table(place.data / "ms_lesions" / "subjects.csv")


def rows(run: Run, place: Place) -> list[Row]:
    """Train a run's network and score the other fold's scans."""
    link_masks(place)
    heads_at = make_heads(place, run["fold"])
    config = configuration(run, place)
    model = trained(
        config, place.data / "ms_lesions", place.work / "lesions" / "runs" / EXPERIMENT.named(run)
    )
    patients = {line["subject"]: line["patient"] for line in _table(place)}
    tested = FOLDS[run["fold"]][: 2 if place.quick else None]
    scans = [name for name, patient in patients.items() if patient in tested]
    # Its table is of heads: a subject is no patient of its own there, and nobody is split.
    heads = _volumes(heads_at, replace(config, data=replace(config.data, groups="")), None)
    hosts = [head.name.rsplit("-sim", 1)[0] for head in heads]
    own = _volumes(place.data / "ms_lesions", config, hosts)
    # The network was trained on a host's own lesions: they count neither way.
    added = [(head, ~_lesions(host)) for head, host in zip(heads, own, strict=True)]
    return _scored(run, model, _volumes(place.data / "ms_lesions", config, scans), patients, added)


def _volumes(folder: Path, config: Config, names: list[str] | None) -> list[Volume]:
    dataset = find_dataset(folder, config.data)
    chosen = list(dataset.subjects) if names is None else names
    subjects = [dataset.subjects[name] for name in chosen]
    return list(check_subjects(subjects, config.data, dataset.labels, chosen).values())


def _scored(
    run: Run,
    model: Model,
    scans: list[Volume],
    patients: Mapping[str, str],
    heads: list[tuple[Volume, NDArray[np.bool_]]],
) -> list[Row]:
    """Rows of the lesion voxels, and of the lesions found and missed by size."""
    probabilities = {volume.name: predicted(model, volume)[0] for volume in scans}
    truths = {volume.name: _lesions(volume) for volume in scans}
    curves = {name: curve(probabilities[name], truths[name]) for name in probabilities}
    on_heads = [
        curve(predicted(model, volume)[0], _lesions(volume), counted) for volume, counted in heads
    ]
    scored = leave_one_out(curves, patients)
    for way, score in SEMIREAL.items():
        level = tuned(on_heads, score)
        scored += [
            {"subject": name, "threshold": way, **row(found, level)}
            for name, found in curves.items()
        ]
    known = {**run, "beta": beta_of(run["loss"]), "split": "test"}
    made: list[Row] = [{**known, "structure": "lesion", **line} for line in scored]
    for line in scored:
        if line["threshold"] in CHOICES:
            name, level = line["subject"], line["level"]
            called = probabilities[name] >= np.float32(level)
            made += [
                {**known, "subject": name, "threshold": line["threshold"], "level": level, **part}
                for part in _by_size(called, truths[name])
            ]
    return made


def _lesions(volume: Volume) -> NDArray[np.bool_]:
    assert volume.label is not None
    found: NDArray[np.bool_] = volume.label > 0
    return found


def _by_size(called: NDArray[np.bool_], truth: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Lesions in place of voxels: recall is the share found, precision that of true alarms."""
    parts = []
    for part in by_size(called, truth):
        tp, lesions, predictions = part["found"], part["lesions"], part["predicted"]
        parts.append({
            "structure": f"lesions {part['size']} mm3", "tp": tp, "fp": part["false"],
            "fn": lesions - tp, "recall": tp / lesions if lesions else None,
            "precision": 1 - part["false"] / predictions if predictions else None,
            "dice": None, "f2": None, "ap": None,
        })  # fmt: skip
    return parts


def pages(finished: Finished) -> dict[str, str]:
    """Means of every loss, differences to Dice loss and cross-entropy, lesions by size."""
    patients = {row["subject"]: patient_of(row) for row in finished.rows}
    scores = Scores(finished.rows, "lesion", patients, structures=("lesion",))
    text = [
        "# Losses on MS lesions",
        done(finished, "voxfuse experiment lesions"),
        "What was asked, of whom and how, is in the [protocol](../protocol.md). Three patients "
        "train a network that is tested on three others, and the other way round; their lesions "
        "are 0.8 to 73 ml. Scores are means over seeds and "
        f"{len(set(patients.values()))} patients (scans of a patient averaged); differences are "
        "within seed and patient: Student's 95 % interval over the patients, the standard "
        "deviation between seeds, the number of patients above 0. Patients of a fold share their "
        "networks: where these differ, such an interval covers less than 95 %. No p-values.",
        GLOSSARY,
    ]
    charts = {}
    if scores.losses:
        text += [
            "Thresholds are tuned on the fold's other patients:", means(scores),
            "... and on lesions of others, transplanted into the three heads that the network was "
            "trained on, whose own lesions count neither way:",
            means(scores, ("0.5", *SEMIREAL)),
        ]  # fmt: skip
        for against in AGAINST:
            if scores.seeds(against):
                text.append(differences(scores, against, few_patients))
        ways = {**TUNED, **SEMIREAL}
        chosen = levels(scores, finished.rows, "lesion", ("lesion",), tuple(ways), _tuned_for)
        text += [
            "What tuning does to a loss, and the thresholds that it chose, one a network and "
            "patient: the median, and from which to which. Chosen on two patients they lie far "
            "apart; where a mean is below 0, networks did worse with them than at 0.5.",
            tuning(scores, ways, few_patients), chosen,
        ]  # fmt: skip
        name, chart = "beta_lesion.svg", beta_chart(scores)
        if chart:
            charts[name] = chart
            text.append(f"![What beta does]({name})")
        text += ["## By size", _size_table(finished, scores)]
    cost = [run for run in finished.runs if run["task"] == "fc-densenet"]
    if cost:
        text.append(
            "The compact FC-DenseNet (64^3, batch 2, 300 steps, one fold, one seed) took "
            f"{float(cost[0]['seconds']) / 3600:.1f} hours of one core. No claim is made of it."
        )
    return {"README.md": "\n\n".join(filter(None, text)) + "\n", **charts}


def _tuned_for(row: Mapping[str, str]) -> str:
    """Whom a row's threshold was chosen for: those of heads are a network's, for all patients."""
    return patient_of(row) if row["threshold"] in TUNED else ""


def _size_table(finished: Finished, scores: Scores) -> str:
    """Of all lesions of a stratum in all scans and whole seeds: the share found, false alarms."""
    seeds = {loss: scores.seeds(loss) for loss in scores.losses}
    sums: dict[tuple[str, str, str], NDArray[np.int64]] = {}
    for line in finished.rows:
        of_whole = line["task"] == "lesion" and int(line["seed"]) in seeds[line["loss"]]
        if of_whole and line["structure"] != "lesion":
            cell = line["loss"], line["threshold"], line["structure"]
            counts = np.array([int(line[name]) for name in ("tp", "fp", "fn")])
            sums[cell] = sums.get(cell, 0) + counts
    sizes = list(dict.fromkeys(size for _, _, size in sums))
    ways = CHOICES[:2]
    lines = []
    for loss in filter(seeds.get, seeds):
        cells = [loss, str(len(seeds[loss]))]
        for way in ways:
            for size in sizes:
                tp, fp, fn = sums[loss, way, size]
                cells.append(f"{tp} of {tp + fn}, {fp} false")
        lines.append(cells)
    head = [f"{size[8:]}; {way}" for way in ways for size in sizes]
    return (
        "Lesions found of all, and predicted lesions that are none, by ISBI 2015's rule "
        "(18-connected, one shared voxel). A lesion counts once a seed, and in each scan of its "
        "patient.\n\n" + markdown(["loss", "seeds", *head], lines)
    )


EXPERIMENT = Experiment(
    name="lesions",
    title="Losses on MS lesions of six patients",
    key=KEY,
    columns=COLUMNS,
    runs=runs,
    rows=rows,
    pages=pages,
)
