"""Subjects pooled, methods compared, and the policies that the tables print."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from voxfuse import metrics
from voxfuse.metrics import study
from voxfuse.metrics.lesions import RULES

EVERY_RULE = study.Options(rules=tuple(RULES.values()))


def cube(start, size=4, shape=(14, 14, 14)):
    mask = np.zeros(shape, bool)
    mask[start : start + size, 2 : 2 + size, 3 : 3 + size] = True
    return mask


def test_a_subject_has_every_metric_of_its_rules():
    one = study.score_subject(cube(3), cube(4), (1, 1, 2), EVERY_RULE)
    names = {column.rpartition(".")[2] for column in one.values}
    # The score needs other subjects, average precision probabilities.
    assert set(metrics.METRICS) - names == {"isbi_score", "average_precision"}
    assert one.values["dice"] == 0.75
    assert one.values["truth_ml"] == pytest.approx(0.128)
    assert one.values["msseg.lesion_f1"] == 1
    assert one.values["wmh.wmh_hd95"] == 1


@pytest.mark.parametrize("column", ["empty_truth", "empty_prediction", "both_empty"])
def test_every_metric_keeps_to_its_policy_for_empty_masks(column):
    none = np.zeros((14, 14, 14), bool)
    prediction = cube(3) if column == "empty_truth" else none
    truth = cube(3) if column == "empty_prediction" else none
    scored = study.score_subject(prediction.astype(np.float32), truth, 1.0, EVERY_RULE)
    checked = set()
    for name, value in study.pool([scored]).scores[0].values.items():
        definition = metrics.METRICS[name.rpartition(".")[2]]
        expected = getattr(definition, column)
        if expected is not None:
            np.testing.assert_equal(value, expected, err_msg=name)
            checked.add(definition.name)
    assert {"dice", "hd95", "wmh_hd95", "lesion_f1", "lesion_false_discovery_rate"} <= checked


def test_undefined_values_are_left_out_of_means_and_counted():
    none = np.zeros((14, 14, 14), bool)
    rows = [
        study.score_subject(cube(3), cube(3), subject="a"),
        study.score_subject(cube(3), none, subject="b"),
    ]
    columns = study.pool(rows).columns
    assert (columns["sensitivity"].mean, columns["sensitivity"].subjects) == (1.0, 1)
    assert (columns["dice"].mean, columns["dice"].subjects) == (0.5, 2)
    assert columns["dice"].pooled == pytest.approx(2 / 3)


def test_isbi_score_joins_where_there_are_several_subjects():
    rows = [
        study.score_subject(cube(3, size), cube(3, size), subject=str(size)) for size in (2, 3, 4)
    ]
    assert [one.values["isbi.isbi_score"] for one in study.pool(rows).scores] == pytest.approx(
        [1, 1, 1]
    )
    alone = study.pool(rows[:1])
    assert math.isnan(alone.scores[0].values["isbi.isbi_score"])


def test_paired_differences_with_t_interval_by_hand():
    """Differences in Dice 0.1, 0.2, 0.3: mean 0.2, sd 0.1, and t(2, 97.5 %) = 4.3027."""
    first, second = [], []
    for subject, gain in enumerate((0.1, 0.2, 0.3)):
        row = study.score_subject(cube(3), cube(4), subject=str(subject))
        for value, rows in ((0.5 + gain, first), (0.5, second)):
            values = {**row.values, "dice": value, "volume_difference_ml": 10 * (0.6 - value)}
            rows.append(study.replace(row, values=values))
    compared = {one.column: one for one in study.compare(study.pool(first), study.pool(second))}
    dice = compared["dice"]
    assert dice.difference == pytest.approx(0.2)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert (dice.low, dice.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert (dice.count("first"), dice.count("second"), dice.count("tie")) == (3, 0, 0)
    assert compared["jaccard"].count("tie") == 3
    # Differences of volumes are judged by magnitude: 0, 1, 2 against 1, 1, 1.
    assert list(compared["volume_difference_ml"].winners.values()) == ["first", "tie", "second"]
    assert "truth_ml" not in compared


def test_comparing_other_subjects_is_an_error():
    a, b = (study.pool([study.score_subject(cube(3), cube(3), subject=s)]) for s in "ab")
    with pytest.raises(ValueError, match=r"second: .*differing: \['a'\]"):
        study.compare(a, b)


def test_importing_metrics_imports_no_optional_package():
    code = (
        "import sys, voxfuse.metrics, voxfuse.metrics.study, voxfuse.cli\n"
        "found = {'scipy', 'nibabel', 'monai', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not found, found\n"
        "sys.modules['scipy'] = None\n"
        "try: voxfuse.metrics.match_lesions([[1]], [[1]])\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "Finding lesions needs scipy: pip install scipy" in ended.stdout


@pytest.mark.data
def test_a_rater_s_mask_of_real_lesions(ms_lesions):
    """Lesions removed are missed; the others, dilated and shifted by a voxel, are found."""
    nibabel = pytest.importorskip("nibabel")
    ndimage = pytest.importorskip("scipy.ndimage")
    for subject in ("lesjak07", "mslessegP18-1"):
        image = nibabel.load(ms_lesions / subject / "lesions.nii.gz")
        truth = np.asarray(image.dataobj) > 0
        numbers, volumes = metrics.label_lesions(truth, 18)
        removed = np.arange(1, volumes.size + 1)[::3]
        grown = ndimage.binary_dilation(truth & ~np.isin(numbers, removed))
        prediction = np.roll(grown, 1, 0)
        one = study.score_subject(
            prediction, truth, image.header.get_zooms(), EVERY_RULE, subject=subject
        )
        match = one.matches["isbi"]
        left = np.ones(volumes.size, bool)
        left[::3] = False
        assert match.detected[left].all()
        shared = np.unique(numbers[prediction])
        assert match.detected.sum() == (shared > 0).sum()
        assert one.values["hd95"] > 1
        assert 0 < one.values["dice"] < 1


def test_what_is_ignored_does_not_make_a_small_lesion_large():
    """A lesion of 2 voxels beside 4 ignored ones is as small in the score as in the tuning."""
    prediction, ignore = np.zeros((14, 14, 14), bool), np.zeros((14, 14, 14), bool)
    prediction[3, 3, 3:9] = ignore[3, 3, 5:9] = True
    options = study.Options(minimum_volume=2.0)
    one = study.score_subject(prediction, cube(8), 1.0, options, ignore=ignore)
    assert one.counts.prediction == 0
