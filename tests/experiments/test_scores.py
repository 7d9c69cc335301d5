"""Scores over thresholds against direct counting, and tuning that leaves the subject out."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from voxfuse.experiments import trained
from voxfuse.experiments.scores import (
    CHOICES,
    Curve,
    by_size,
    curve,
    leave_one_out,
    row,
    tuned_threshold,
)
from voxfuse.training.evaluation import rows_of, thresholds
from voxfuse.training.volumes import Volume


@pytest.fixture(scope="module")
def case():
    random = np.random.default_rng(0)
    truth = random.random((12, 13, 14)) < 0.1
    noise = random.standard_normal(truth.shape)
    p = 1 / (1 + np.exp(-(2.5 * truth + noise - 2))).astype(np.float32)
    p.flat[:45] = thresholds()  # ties with the thresholds
    return p, truth, random.random(truth.shape) < 0.7


def test_a_curve_counts_as_the_runs_test_does(case):
    p, truth, mask = case
    found = curve(p, truth)
    for expected in rows_of("a", "constant", p, truth):
        got = row(found, expected["threshold"])
        assert {k: got[k] for k in ("dice", "recall", "precision")} == {
            k: expected[k] for k in ("dice", "recall", "precision")
        }
    inside = row(curve(p, truth, mask), 0.4)
    called = (p >= np.float32(0.4))[mask]
    tp, fp, fn = (called & truth[mask]).sum(), (called & ~truth[mask]).sum(), 0
    fn = truth[mask].sum() - tp
    assert (inside["tp"], inside["fp"], inside["fn"]) == (tp, fp, fn)
    assert inside["f2"] == pytest.approx(5 * tp / (5 * tp + 4 * fn + fp))
    assert inside["ap"] == pytest.approx(average_precision_score(truth[mask], p[mask]))


def peaked(level, top=100):
    """A subject whose Dice is greatest at one threshold."""
    levels = thresholds()
    tp = np.where(np.isclose(levels, level), top, top // 2)
    return Curve(levels, tp, np.zeros_like(tp), top - tp, 1000, 1.0)


def test_thresholds_are_tuned_without_the_subject():
    assert tuned_threshold([peaked(0.3)]) == pytest.approx(0.3)
    assert tuned_threshold([peaked(0.3), peaked(0.3), peaked(0.7)]) == pytest.approx(0.3)
    # As good at two: the one nearer to 0.5.
    assert tuned_threshold([peaked(0.2), peaked(0.6)]) == pytest.approx(0.6)
    curves = {"a": peaked(0.2), "b": peaked(0.8), "c": peaked(0.8), "c2": peaked(0.2)}
    patients = {"a": "a", "b": "b", "c": "c", "c2": "c"}
    rows = leave_one_out(curves, patients)
    assert [r["threshold"] for r in rows[:3]] == list(CHOICES)
    level = {(r["subject"], r["threshold"]): r["level"] for r in rows}
    assert all(level[name, "0.5"] == 0.5 for name in curves)
    assert level["a", "tuned-dice"] == pytest.approx(0.8)
    assert level["b", "tuned-f2"] == pytest.approx(0.2)
    # c's other scan is the same patient: between a and b, as near to 0.5, the lower one.
    assert level["c", "tuned-dice"] == level["c2", "tuned-dice"]
    # A patient with three scans counts as one.
    scans = [peaked(0.2)] * 3 + [peaked(0.6)]
    assert tuned_threshold(scans, patients=["a", "a", "a", "b"]) == pytest.approx(0.6)
    assert tuned_threshold(scans) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="curves: got none"):
        leave_one_out({"c": peaked(0.2), "c2": peaked(0.3)}, patients)
    with pytest.raises(ValueError, match="different thresholds"):
        tuned_threshold([peaked(0.2), curve(np.float32([0.5]), np.array([True]), at=[0.5])])


def test_lesions_by_size():
    truth = np.zeros((20, 20, 20), bool)
    truth[1, 1, 1] = truth[5, 5, 5] = True
    truth[10:14, 10:14, 10:14] = True
    prediction = np.zeros_like(truth)
    prediction[1, 1, 1] = prediction[10, 10, 10] = prediction[18, 18, 18] = True
    strata = {part["size"]: part for part in by_size(prediction, truth)}
    assert strata["< 10"] == {
        "size": "< 10", "lesions": 2, "found": 1, "predicted": 3, "false": 1
    }  # fmt: skip
    assert (strata["50 to 500"]["lesions"], strata["50 to 500"]["found"]) == (1, 1)


def test_the_greatest_probability_decides_where_no_threshold_does(monkeypatch):
    """0.5 of three probabilities may be nobody's."""
    label = np.zeros((2, 2, 2), np.uint8)
    label[0, 0], label[0, 1] = 1, 2
    chances = np.full((2, 2, 2, 2), 0.1, np.float32)
    chances[0, 0, 0] = 0.46  # more than the 0.1 of the second and the 0.44 of the background
    chances[1, 0, 1] = 0.9
    volume = Volume("a", label[None].astype(np.float32), label < 9, label, None)
    monkeypatch.setattr(trained, "predicted", lambda model, volume: chances)
    run = {"task": "two-class", "loss": "dice", "seed": 0, "fold": 0}
    volumes = {"validation": [volume, volume], "test": [volume]}
    rows = trained.scored(run, ("one", "two"), volumes, None)
    recall = {
        (row["structure"], row["threshold"]): row["recall"]
        for row in rows
        if row["split"] == "test"
    }
    assert recall["one", "0.5"] == 0
    assert recall["one", "argmax"] == recall["two", "argmax"] == recall["two", "0.5"] == 1
    (mean,) = (
        row
        for row in rows
        if (row["split"], row["structure"], row["threshold"]) == ("validation", "two", "argmax")
    )
    assert (mean["tp"], mean["level"], mean["dice"]) == (4, None, 1)
    assert all(set(row) == set(trained.COLUMNS) for row in rows)
    one = trained.scored(run, ("one",), volumes, None)
    assert {row["threshold"] for row in one} == set(CHOICES)
