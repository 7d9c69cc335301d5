"""Voxel-wise metrics and curves of probabilities: by hand, and against scikit-learn and MONAI."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from voxfuse import metrics


def test_counts_and_metrics_by_hand():
    prediction = np.array([[1, 1, 1, 0, 0, 0, 0, 0, 0, 0]])
    truth = np.array([[1, 1, 0, 1, 1, 0, 0, 0, 0, 0]])
    counts = metrics.voxel_counts(prediction, truth)
    assert counts == metrics.VoxelCounts(2, 1, 2, 5)
    assert counts.dice == pytest.approx(4 / 7)
    assert counts.jaccard == pytest.approx(2 / 5)
    assert counts.sensitivity == pytest.approx(1 / 2)
    assert counts.precision == pytest.approx(2 / 3)
    assert counts.specificity == pytest.approx(5 / 6)
    assert counts.npv == pytest.approx(5 / 7)
    assert counts.f_beta(2) == pytest.approx(10 / 19)  # 5 TP / (5 TP + 4 FN + FP)


def test_tensors_are_masks_too_and_ignored_voxels_count_as_nothing():
    prediction, truth = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[True, False, True, False]])
    assert metrics.voxel_counts(prediction, truth) == metrics.VoxelCounts(1, 1, 1, 1)
    ignore = torch.tensor([[0, 1, 0, 0]])
    assert metrics.voxel_counts(prediction, truth, ignore=ignore) == metrics.VoxelCounts(1, 0, 1, 1)


@pytest.mark.parametrize(
    ("counts", "column"),
    [
        (metrics.VoxelCounts(0, 3, 0, 5), "empty_truth"),
        (metrics.VoxelCounts(0, 0, 3, 5), "empty_prediction"),
        (metrics.VoxelCounts(0, 0, 0, 8), "both_empty"),
    ],
)
def test_policy_for_empty_masks_is_the_table_s(counts, column):
    values = {
        name: getattr(counts, name)
        for name in ("dice", "jaccard", "sensitivity", "precision", "specificity", "npv")
    }
    values |= {"f2": counts.f_beta(2), **metrics.volume_metrics(counts, 1.0)}
    for name, value in values.items():
        expected = getattr(metrics.METRICS[name], column)
        if expected is not None:
            np.testing.assert_equal(value, expected, err_msg=name)


def test_volumes_by_hand():
    values = metrics.volume_metrics(metrics.VoxelCounts(100, 50, 100, 0), (0.5, 2, 3))
    assert values == pytest.approx(
        {
            "truth_ml": 0.6,
            "prediction_ml": 0.45,
            "volume_difference_ml": -0.15,
            "relative_volume_difference": -0.25,
            "absolute_volume_difference": 0.25,
        }
    )


def test_correlation_is_pearson_s():
    a, b = np.random.default_rng(1).random((2, 9))
    assert metrics.correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert math.isnan(metrics.correlation([1.0], [1.0]))
    assert math.isnan(metrics.correlation([1.0, 1.0], [1.0, 2.0]))
    assert math.isnan(metrics.correlation([0.1] * 3, [0.1] * 3))  # whose mean is not 0.1


def test_parity_with_monai_and_scikit_learn():
    confusion = pytest.importorskip("monai.metrics", reason="an oracle of this test")
    sklearn = pytest.importorskip("sklearn.metrics", reason="an oracle of this test")
    prediction, truth = np.random.default_rng(2).random((2, 9, 9, 9)) < 0.3
    counts = metrics.voxel_counts(prediction, truth)
    p, g = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth))
    matrix = confusion.get_confusion_matrix(p, g)
    for name, ours in (
        ("sensitivity", counts.sensitivity),
        ("specificity", counts.specificity),
        ("precision", counts.precision),
        ("negative predictive value", counts.npv),
        ("threat score", counts.jaccard),
        ("f1 score", counts.dice),
    ):
        theirs = confusion.compute_confusion_matrix_metric(name, matrix).item()
        assert ours == pytest.approx(theirs, rel=1e-6), name
    assert counts.dice == pytest.approx(confusion.compute_dice(p, g).item(), rel=1e-6)
    flat = truth.ravel(), prediction.ravel()
    assert counts.f_beta(2) == pytest.approx(sklearn.fbeta_score(*flat, beta=2))


@given(st.integers(0, 2**32 - 1))
def test_swapping_roles_swaps_sensitivity_and_precision(seed):
    a, b = np.random.default_rng(seed).random((2, 3, 4)) < 0.3
    forth, back = metrics.voxel_counts(a, b), metrics.voxel_counts(b, a)
    np.testing.assert_equal(forth.sensitivity, back.precision)
    np.testing.assert_equal(forth.dice, back.dice)


# --- Curves ---------------------------------------------------------------------------------------


def drawn(seed, levels=50, size=400):
    rng = np.random.default_rng(seed)
    truth = rng.random(size) < 0.2
    p = np.clip(rng.normal(0.35 + 0.3 * truth, 0.2), 0, 1)
    return (np.round(p * levels) / levels).astype(np.float32), truth


@pytest.mark.parametrize("seed", range(4))
def test_precision_recall_is_scikit_learn_s(seed):
    sklearn = pytest.importorskip("sklearn.metrics", reason="an oracle of this test")
    p, truth = drawn(seed)
    counts = metrics.score_counts(p, truth)
    precision, recall, thresholds = sklearn.precision_recall_curve(truth, p)
    curve = counts.precision_recall()
    np.testing.assert_allclose(curve.thresholds, thresholds[::-1])
    np.testing.assert_allclose(curve.precision, precision[-2::-1])
    np.testing.assert_allclose(curve.recall, recall[-2::-1])
    assert counts.average_precision() == pytest.approx(sklearn.average_precision_score(truth, p))


def test_what_rounding_has_put_beside_0_and_1_counts_as_that():
    """A weighted mean of ones, as fusion computes it, is 1 give or take an ulp."""
    p = np.float32([np.nextafter(np.float32(1), np.float32(2)), 1, 0.5, -1e-9])
    counts = metrics.score_counts(p, [1, 1, 0, 0])
    assert counts.thresholds.tolist() == [0, 0.5, 1]
    assert counts.positives.tolist() == [0, 0, 2]
    assert metrics.score_counts(p, [1, 1, 0, 0], bins=4).positives.tolist() == [0, 0, 0, 2]
    for beyond in (1.01, -0.01, np.nan):
        with pytest.raises(ValueError, match=r"^probabilities: got values from .* expected prob"):
            metrics.score_counts([0.5, beyond], [1, 0])


def test_a_histogram_is_exact_for_the_rounded_probabilities():
    p, truth = drawn(7, levels=10**6)
    counts = metrics.score_counts(p, truth, bins=64)
    rounded = np.minimum(np.floor(p * np.float32(64)), 63) / 64
    exact = metrics.score_counts(rounded, truth)
    assert counts.average_precision() == exact.average_precision()
    np.testing.assert_array_equal(counts.f_beta(2)[1], exact.f_beta(2)[1])


def test_counts_of_subjects_add_up_to_those_of_all_voxels():
    p, truth = drawn(3)
    whole = metrics.score_counts(p, truth)
    halves = metrics.score_counts(p[:150], truth[:150]) + metrics.score_counts(p[150:], truth[150:])
    np.testing.assert_array_equal(whole.positives, halves.positives)
    assert whole.average_precision() == halves.average_precision()


def test_f_beta_over_thresholds_is_that_of_the_masks():
    p, truth = drawn(4)
    thresholds, values = metrics.score_counts(p, truth).f_beta(1.5)
    for threshold, value in list(zip(thresholds, values, strict=True))[::7]:
        mask = p >= np.float32(threshold)
        assert value == pytest.approx(metrics.voxel_counts(mask, truth).f_beta(1.5))


def test_reliability_by_hand():
    p = np.array([0.05, 0.15, 0.15, 0.9, 1.0])
    truth = np.array([0, 0, 1, 1, 1])
    curve = metrics.score_counts(p, truth).reliability(10)
    assert curve.voxels.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    np.testing.assert_allclose(curve.observed[[0, 1, 9]], [0, 0.5, 1])
    np.testing.assert_allclose(curve.predicted[[0, 1, 9]], [0.05, 0.15, 0.95])
    assert curve.calibration_error == pytest.approx((0.05 + 2 * 0.35 + 2 * 0.05) / 5)
    # A bin holds its lower bound, though 0.29 * 100 < 29.
    bounds = metrics.score_counts(np.arange(100) / 100, np.ones(100, bool))
    assert bounds.reliability(100).voxels.tolist() == [1] * 100


def test_average_precision_of_an_empty_truth_is_undefined():
    assert math.isnan(metrics.score_counts(np.array([0.2, 0.4]), [0, 0]).average_precision())
    # Nothing predicted: the only threshold calls everything, and precision is the prevalence.
    assert metrics.score_counts(np.zeros(4), [1, 0, 0, 0]).average_precision() == 0.25


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"probabilities: got values from -1 to 3.*logits"):
        metrics.score_counts(np.array([-1.0, 3.0]), [0, 1])
    with pytest.raises(ValueError, match="NaN"):
        metrics.score_counts(np.array([0.1, np.nan]), [0, 1])
    with pytest.raises(TypeError, match="probabilities: got dtype int64"):
        metrics.score_counts(np.array([0, 1]), [0, 1])
    with pytest.raises(ValueError, match="bins"):
        metrics.score_counts(np.array([0.1]), [0], bins=4) + metrics.score_counts(
            np.array([0.1]), [0]
        )
    with pytest.raises(ValueError, match="beta: got 0"):
        metrics.VoxelCounts(1, 1, 1, 1).f_beta(0)
