"""Lesion-wise metrics: hand-computed cases of every rule, parity, and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxfuse import metrics
from voxfuse.metrics.study import Options, score_subject


def line(text):
    """A row of voxels from a drawing: ``##.#``."""
    return np.array([[[character == "#" for character in text]]])


def rates(prediction, truth, rule="isbi", spacing=1.0):
    match = metrics.match_lesions(line(prediction), line(truth), spacing, rule)
    return match.sensitivity, match.precision


# --- Connectivity ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "components"),
    [
        ((1, 0, 0), {6: 1, 18: 1, 26: 1}),  # a face
        ((1, 1, 0), {6: 2, 18: 1, 26: 1}),  # an edge
        ((1, 1, 1), {6: 2, 18: 2, 26: 1}),  # a corner
        ((2, 0, 0), {6: 2, 18: 2, 26: 2}),  # apart
    ],
)
def test_touching_voxels_are_one_lesion_by_face_edge_or_corner(second, components):
    mask = np.zeros((3, 3, 3), bool)
    mask[0, 0, 0] = mask[second] = True
    for connectivity, count in components.items():
        _, volumes = metrics.label_lesions(mask, connectivity)
        assert volumes.size == count


def test_the_rules_differ_in_what_one_lesion_is():
    """Two truths that share a corner, of which one is found."""
    truth = np.zeros((4, 4, 4), bool)
    truth[:2, :2, :2] = truth[2:, 2:, 2:] = True
    prediction = np.zeros_like(truth)
    prediction[:2, :2, :2] = True
    found = {rule: metrics.match_lesions(prediction, truth, 1.0, rule) for rule in metrics.RULES}
    assert [found[rule].detected.tolist() for rule in ("isbi", "msseg", "wmh")] == [
        [True, False],
        [True, False],
        [True],
    ]


def test_lesions_have_volumes_in_cubic_millimetres():
    _, volumes = metrics.label_lesions(line("##..#"), 18, spacing=(0.5, 0.5, 3.0))
    assert volumes.tolist() == [1.5, 0.75]


def test_voxel_sizes_decide_what_is_too_small():
    """Two voxels: 2 mm3 are dropped by MSSEG's rule, 4 mm3 are not. 3 mm3 are, too."""
    match = metrics.match_lesions(line("##"), line("##"), 1.0, "msseg")
    assert match.detected.size == match.matching.size == 0
    match = metrics.match_lesions(line("##"), line("##"), (1, 1, 2), "msseg")
    assert match.detected.tolist() == [True]
    assert metrics.match_lesions(line("###"), line("###"), 1.0, "msseg").detected.size == 0
    # 0.3 * 0.1 * 100 is a little more than 3 in floating point.
    assert metrics.match_lesions(line("#"), line("#"), (0.3, 0.1, 100), "msseg").detected.size == 0


@pytest.mark.parametrize("share", [1 - 1e-6, 1, 1 + 1e-6])
def test_rounding_of_voxel_sizes_does_not_decide_what_is_too_small(share):
    """Three voxels are of 3 mm3 or less, ten of 10 mm3 or more, as read from a float32 affine."""
    three, four, ten = (line(f"{'#' * count:.<10}") for count in (3, 4, 10))
    assert metrics.match_lesions(three, three, share, "msseg").detected.size == 0
    assert metrics.match_lesions(four, four, share, "msseg").detected.size == 1
    assert not metrics.remove_small_lesions(ten, 10, share).any()
    strata = dict(metrics.match_lesions(ten, three, share).by_size([3, 10]))
    assert strata["3 to 10"].detected.size == strata[">= 10"].matching.size == 1


# --- One shared voxel: ISBI 2015 and WMH 2017 -----------------------------------------------------


@pytest.mark.parametrize("rule", ["isbi", "wmh"])
@pytest.mark.parametrize(
    ("prediction", "truth", "sensitivity", "precision"),
    [
        ("####......", "####......", 1.0, 1.0),  # the same
        ("...####...", "####......", 1.0, 1.0),  # one shared voxel is enough
        ("....####..", "####......", 0.0, 0.0),  # touching is not
        ("##########", "##......##", 1.0, 1.0),  # one prediction over two lesions
        ("##....##..", "########..", 1.0, 1.0),  # a lesion split in two
        ("##..##....", "##.......#", 0.5, 0.5),  # one missed, one false
    ],
)
def test_one_shared_voxel_detects(rule, prediction, truth, sensitivity, precision):
    assert rates(prediction, truth, rule) == (sensitivity, precision)


# --- Coverage: MSSEG 2016 -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "truth", "sensitivity", "precision"),
    [
        # 4 of 10 voxels, nothing outside.
        ("####......", "##########", 1.0, 1.0),
        # 1 of 10 covered: 10 % is not more than 10 %. The predicted lesion that covers it has 1 of
        # 4 voxels covered, but the truth over it lies to 90 % outside all predictions.
        ("#########............####", "............##########...", 0.0, 0.0),
        # One prediction over two lesions: no part outside both exceeds 70 %.
        ("##########", "####..####", 1.0, 1.0),
        # A lesion split in two: both halves lie inside.
        ("####..####", "##########", 1.0, 1.0),
        # 3 of 4 true voxels covered, but 7 of the prediction's 10 outside: 70 % is not above beta.
        ("##########....", "###.......####", 0.0, 0.0),
        (".##########...", "####..........", 1.0, 1.0),
        # 8 of 11 outside is: the lesion is not detected. Its roles swapped: 3 of 11 covered, and
        # the truth lies to 1/4 outside.
        (".###########..", "####..........", 0.0, 1.0),
    ],
)
def test_coverage_rule_by_hand(prediction, truth, sensitivity, precision):
    assert rates(prediction, truth, "msseg") == (sensitivity, precision)


def test_coverage_needs_more_than_a_tenth():
    truth = "#" * 40
    assert rates("####" + "." * 36, truth, "msseg") == (0.0, 0.0)
    assert rates("#####" + "." * 35, truth, "msseg")[0] == 1.0


def test_gamma_stops_before_a_small_overlapping_prediction_that_lies_outside():
    """10 true voxels; A covers 6 of them from inside, B 1 with 9 outside (90 % > beta).

    A explains 6/7 = 86 % of what is covered: enough at gamma 65 %, so that B is never looked at.
    At gamma 90 % it is, and the lesion is lost.
    """
    truth = "##########........."
    prediction = "######...##########"
    assert rates(prediction, truth, "msseg")[0] == 1.0
    strict = metrics.LesionRule("strict", 6, 3.0, "coverage", gamma=0.9)
    assert rates(prediction, truth, strict)[0] == 0.0


def test_small_true_lesions_count_as_outside_once_they_are_dropped():
    """The prediction lies on a true lesion of 3 mm3, which the rule drops: it is a false one."""
    match = metrics.match_lesions(line("#####..."), line("###....."), 1.0, "msseg")
    assert (match.detected.size, match.matching.tolist()) == (0, [False])


# --- Empty masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", sorted(metrics.RULES))
def test_policy_for_empty_masks_is_the_table_s(rule):
    some, none = line("#####"), line(".....")
    for prediction, truth, column in (
        (some, none, "empty_truth"),
        (none, some, "empty_prediction"),
        (none, none, "both_empty"),
    ):
        values = metrics.match_lesions(prediction, truth, 1.0, rule).values
        for name, value in values.items():
            expected = getattr(metrics.METRICS[name], column)
            if expected is not None:
                np.testing.assert_equal(value, expected, err_msg=f"{name}, {column}")
    assert metrics.match_lesions(some, none, 1.0, rule).values["lesions_false_ml"] == 0.005


# --- Scores, strata, curves -----------------------------------------------------------------------


def test_isbi_score_by_hand():
    assert metrics.isbi_score(0.5, 0.7, 0.2, 0.6, 0.8) == pytest.approx(0.7)
    assert metrics.isbi_score(1, 1, 0, 1, 1) == 1
    assert metrics.isbi_score(0, math.nan, math.nan, 0, 1) == 0.25  # nothing predicted
    assert metrics.isbi_score(1, math.nan, math.nan, math.nan, 1) == 1  # nothing there, either
    assert math.isnan(metrics.isbi_score(1, 1, 0, 1, math.nan))


def test_strata_hold_their_lower_bound():
    match = metrics.LesionMatch(
        np.array([9.9, 10.0, 50.0, 500.0, 501.0]),
        np.array([True, False, True, True, False]),
        np.array([5.0, 700.0]),
        np.array([False, True]),
    )
    strata = dict(match.by_size())
    assert list(strata) == ["< 10", "10 to 50", "50 to 500", ">= 500"]
    assert [part.detected.tolist() for part in strata.values()] == [[1], [0], [1], [1, 0]]
    assert strata["< 10"].precision == 0.0
    assert strata[">= 500"].f1 == pytest.approx(2 / 3)


def test_a_lesion_found_by_one_of_another_stratum_is_found():
    """A lesion of 64 mm3, predicted with 48; the policy for empty masks is for whole subjects."""
    truth, prediction = np.zeros((2, 8, 8, 8), bool)
    truth[2:6, 2:6, 2:6] = prediction[2:6, 2:6, 2:5] = True
    strata = dict(metrics.match_lesions(prediction, truth).by_size())
    rates = [
        [part.sensitivity, part.precision, part.false_discovery_rate, part.f1]
        for part in strata.values()
    ]
    nan = np.nan
    nothing = [nan] * 4
    np.testing.assert_equal(rates, [nothing, [nan, 1, 0, nan], [1, nan, nan, nan], nothing])
    missed = dict(metrics.match_lesions(prediction & False, truth).by_size())["50 to 500"]
    assert missed.sensitivity == 0
    np.testing.assert_equal(missed.f1, nan)


def test_strata_are_a_partition():
    rng = np.random.default_rng(0)
    prediction, truth = rng.random((2, 20, 20, 20)) < 0.1
    match = metrics.match_lesions(prediction, truth)
    parts = [part for _, part in match.by_size([2, 4])]
    whole = sum(parts, metrics.LesionMatch.none())
    assert sorted(whole.truth_volumes) == sorted(match.truth_volumes)
    assert whole.values == pytest.approx(match.values)


def test_free_response_by_hand():
    """Two subjects, three lesions; at 0.5 one is found with one false, at 0.2 all with three."""
    p = [np.array([[[0.9, 0, 0.3, 0, 0.6, 0, 0.2]]]), np.array([[[0.3, 0, 0.2, 0, 0, 0, 0.0]]])]
    g = [line("#.#...."), line("#......")]
    curve = metrics.free_response(p, g, [1.0, 1.0], thresholds=[0.2, 0.5, 0.95])
    assert curve.sensitivity.tolist() == [1, 1 / 3, 0]
    assert curve.false_lesions.tolist() == [1.5, 0.5, 0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_free_response_reaches_a_threshold_in_its_own_dtype(dtype):
    """0.7 in float32 is less than in float64; in float16, 0.9 is."""
    p = np.zeros((1, 1, 8), dtype)
    p[0, 0, 1], p[0, 0, 5] = 0.7, 0.9
    curve = metrics.free_response([p], [p > 0], [1.0], thresholds=[0.7, 0.9])
    assert curve.sensitivity.tolist() == [1.0, 0.5]
    options = Options(threshold=np.float64(0.7))
    assert score_subject(p, p > 0, 1.0, options).values["dice"] == 1.0


def test_minimum_size_is_tuned_on_the_subjects_given():
    truth = [line("####......"), line("..####....")]
    prediction = [line("####.##.#."), line("..####..##")]
    tuned = metrics.tune_minimum_volume(prediction, truth, [1.0, 1.0], candidates=[0, 1, 2, 4])
    assert tuned.volume == 2.0
    assert tuned.scores == pytest.approx(((0.5 + 2 / 3) / 2, (2 / 3 + 2 / 3) / 2, 1.0, 0.0))
    kept = metrics.remove_small_lesions(prediction[0], tuned.volume)
    assert np.array_equal(kept, truth[0])


def test_ignored_voxels_are_in_neither_mask():
    match = metrics.match_lesions(line("##.##"), line("##..."), ignore=line("...##"))
    assert match.matching.tolist() == [True]


# --- Parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_parity_with_lesion_metrics(seed):
    """26-connected, any overlap: its ltpr and lfdr are those of ``wmh``'s rule."""
    lesion_metrics = pytest.importorskip("lesion_metrics.metrics", reason="an oracle of this test")
    rng = np.random.default_rng(seed)
    prediction, truth = rng.random((2, 12, 12, 12)) < 0.02
    match = metrics.match_lesions(prediction, truth, 1.0, "wmh")
    counts = metrics.voxel_counts(prediction, truth)
    assert match.sensitivity == pytest.approx(lesion_metrics.ltpr(prediction, truth))
    assert match.false_discovery_rate == pytest.approx(lesion_metrics.lfdr(prediction, truth))
    assert counts.dice == pytest.approx(lesion_metrics.dice(prediction, truth))
    # It leaves the correlation out and makes up for it by 4/3.
    score = metrics.isbi_score(
        counts.dice, counts.precision, match.false_discovery_rate, match.sensitivity, 0.0
    )
    assert score * 4 / 3 == pytest.approx(lesion_metrics.isbi15_score(prediction, truth))


# --- Properties -----------------------------------------------------------------------------------

MASKS = st.integers(0, 2**32 - 1).flatmap(
    lambda seed: st.sampled_from([0.02, 0.1, 0.3]).map(
        lambda share: np.random.default_rng(seed).random((2, 7, 8, 9)) < share
    )
)


@given(MASKS, st.sampled_from(sorted(metrics.RULES)))
def test_swapping_roles_swaps_sensitivity_and_precision(masks, rule):
    forth = metrics.match_lesions(masks[0], masks[1], (1, 2, 0.5), rule)
    back = metrics.match_lesions(masks[1], masks[0], (1, 2, 0.5), rule)
    assert forth.detected.tolist() == back.matching.tolist()
    np.testing.assert_equal(forth.sensitivity, back.precision)
    np.testing.assert_equal(forth.f1, back.f1)


@given(MASKS, st.sampled_from(["isbi", "wmh"]))
def test_growing_a_prediction_never_lowers_detection(masks, rule):
    before = metrics.match_lesions(masks[0], masks[1], 1.0, rule)
    after = metrics.match_lesions(masks[0] | np.roll(masks[0], 1, 0), masks[1], 1.0, rule)
    assert (after.detected >= before.detected).all()


@given(MASKS, st.sampled_from(sorted(metrics.RULES)), st.integers(1, 4))
def test_growing_a_true_lesion_with_its_prediction_never_lowers_its_detection(masks, rule, size):
    """A slab away from all others grows in both masks: it stays detected, the others as found."""
    prediction, truth = (np.pad(mask, ((0, 8), (0, 0), (0, 0))) for mask in masks)
    results = []
    for thickness in (size, size + 1):
        for mask in (prediction, truth):
            mask[9 : 9 + thickness] = True
        match = metrics.match_lesions(prediction, truth, 1.0, rule)
        assert match.truth_numbers is not None
        results.append((match.detected[match.truth_numbers[9, 0, 0] - 1], match.detected.sum()))
    assert results[0][0]
    assert results[0] == results[1]


@given(MASKS, st.sampled_from(sorted(metrics.RULES)))
def test_a_mask_against_itself_is_perfect(masks, rule):
    match = metrics.match_lesions(masks[0], masks[0], 2.0, rule)
    assert match.detected.all()
    assert match.matching.all()


@given(MASKS, st.sampled_from(sorted(metrics.RULES)))
def test_flips_and_rotations_change_nothing(masks, rule):
    match = metrics.match_lesions(masks[0], masks[1], 1.0, rule)
    turned = [np.rot90(mask[::-1], axes=(0, 2)) for mask in masks]
    other = metrics.match_lesions(turned[0], turned[1], 1.0, rule)
    np.testing.assert_equal(match.values, other.values)


# --- Errors ---------------------------------------------------------------------------------------


def test_errors_name_the_argument():
    mask = line("##.")
    with pytest.raises(ValueError, match=r"prediction: got shape \(1, 1, 2\)"):
        metrics.match_lesions(line("##"), mask)
    with pytest.raises(ValueError, match=r"rule: got 'miccai', expected .* isbi, msseg, wmh"):
        metrics.match_lesions(mask, mask, rule="miccai")
    with pytest.raises(ValueError, match="truth: got values such as 2"):
        metrics.match_lesions(mask, mask * 2)
    with pytest.raises(ValueError, match=r"spacing: got \(1, 1\)"):
        metrics.match_lesions(mask, mask, (1, 1))
    with pytest.raises(ValueError, match="spacing"):
        metrics.match_lesions(mask, mask, -1)
    with pytest.raises(ValueError, match="connectivity: got 8"):
        metrics.label_lesions(mask, 8)
    with pytest.raises(ValueError, match="alpha: got 10"):
        metrics.LesionRule("percent", 6, matching="coverage", alpha=10)
    with pytest.raises(ValueError, match="edges"):
        metrics.match_lesions(mask, mask).by_size([10, 5])
    with pytest.raises(TypeError, match="truth: got dtype"):
        metrics.match_lesions(mask, np.array([["a"]]))
