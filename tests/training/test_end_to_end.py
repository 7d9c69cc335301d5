"""From a folder to a segmentation, by the commands: it beats every threshold of an intensity."""

from __future__ import annotations

import csv

import nibabel
import numpy as np
import pytest

from tests.training.phantom import SECTIONS, write_heads
from voxfuse import cli
from voxfuse.training.config import parse, to_toml

TRAINED, TESTED = ["a", "b", "c", "d"], ["e", "f"]


def array(folder, subject, name):
    return nibabel.load(folder / subject / f"{name}.nii.gz").get_fdata()


def dice(predicted, truth):
    return 2 * np.count_nonzero(predicted & truth) / (predicted.sum() + truth.sum())


def best_threshold(folder):
    """Mean Dice of the tested subjects by the modality, side and level that are best on the others.

    Levels are percentiles of each brain, so that they hold for all of them.
    """

    def scores(subjects, name, side, percentile):
        found = []
        for subject in subjects:
            values, truth = array(folder, subject, name), array(folder, subject, "lesions") > 0
            inside = values > 0
            level = np.percentile(values[inside], percentile)
            found.append(dice(inside & (side * values > side * level), truth))
        return np.mean(found)

    choices = [
        (name, side, percentile)
        for name in ("flair", "t1")
        for side in (1, -1)
        for percentile in np.arange(0.5, 100, 1.0)
    ]
    best = max(choices, key=lambda choice: scores(TRAINED, *choice))
    return scores(TESTED, *best)


@pytest.mark.usefixtures("one_thread")
def test_a_trained_run_beats_the_best_threshold_and_monai_agrees_on_its_dice(tmp_path):
    heads = write_heads(tmp_path / "heads", [*TRAINED, *TESTED])
    sections = {name: dict(keys) for name, keys in SECTIONS.items()}
    sections["data"]["test"] = TESTED
    sections["sampling"] = {"patch": [16, 16, 16], "batch": 4}
    sections["network"] = {"features": [8, 16]}
    sections["loss"] = {"name": "DiceCELoss", "batch": True, "include_background": False}
    sections["optimiser"] = {"learning_rate": 5e-3}
    sections["training"] = {"steps": 100, "threads": 1}
    (tmp_path / "config.toml").write_text(to_toml(parse(sections)))
    run, out = str(tmp_path / "run"), tmp_path / "out"
    command = ["train", str(tmp_path / "config.toml"), "--data", str(heads), "--out", run]
    assert cli.main(command) == 0
    assert cli.main(["predict", "--model", run, "--input", str(heads), "--output", str(out)]) == 0
    with (tmp_path / "run/test.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if float(row["threshold"]) == 0.5]
    reported = {row["subject"]: float(row["dice"]) for row in rows}
    masks = {x: nibabel.load(out / f"{x}.nii.gz").get_fdata() > 0 for x in TESTED}
    truths = {x: array(heads, x, "lesions") > 0 for x in TESTED}
    for subject in TESTED:
        assert reported[subject] == pytest.approx(dice(masks[subject], truths[subject]), abs=1e-12)
    threshold = best_threshold(heads)
    assert threshold > 0.25  # it is no straw man
    assert np.mean(list(reported.values())) >= threshold + 0.15

    metrics = pytest.importorskip("monai.metrics", reason="its Dice is compared with test.csv")
    torch = pytest.importorskip("torch")
    for subject in TESTED:
        p, g = (torch.from_numpy(x)[None, None].float() for x in (masks[subject], truths[subject]))
        theirs = float(metrics.DiceMetric()(p, g))
        assert abs(reported[subject] - theirs) < 1e-6
