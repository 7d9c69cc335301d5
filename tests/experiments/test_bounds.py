"""Closed forms against brute force in fractions, and what a false bound would do."""

import math
from fractions import Fraction

import numpy as np
import pytest

from voxfuse.experiments import bounds
from voxfuse.experiments.experiment import Place, carry_out


def test_all_counts_are_all():
    found = {tuple(x) for part in bounds.all_counts(6) for x in np.stack(part, 1).tolist()}
    expected = {
        (tp, fp, fn)
        for tp in range(1, 7)
        for fp in range(7)
        for fn in range(7)
        if tp + fp + fn <= 6
    }
    assert found == expected
    assert len(found) == math.comb(9, 3) - math.comb(8, 2)


@pytest.mark.parametrize(("measure", "a"), [("jaccard", 5), ("tversky", 4), ("tversky", 1)])
def test_extremes_are_those_of_fractions(measure, a):
    found = bounds.extremes(measure, a, bounds.all_counts(12))
    gaps, ratios = [], []
    alpha, beta = (Fraction(1), Fraction(1)) if measure == "jaccard" else (
        Fraction(a, 10), 1 - Fraction(a, 10)
    )  # fmt: skip
    for part in bounds.all_counts(12):
        for tp, fp, fn in np.stack(part, 1).tolist():
            t, d = tp / (tp + alpha * fp + beta * fn), Fraction(2 * tp, 2 * tp + fp + fn)
            gaps.append(abs(t - d))
            if measure == "tversky":
                ratios.append(t / d)
            elif t < 1:
                ratios.append((1 - d) / (1 - t))
    assert found["counts"] == len(gaps)
    assert found["violations"] == 0
    assert found["gap"] == pytest.approx(float(max(gaps)), rel=1e-12)
    if measure == "jaccard":  # of a perfect prediction the ratio is not defined: its limit
        ratios.append(Fraction(1, 2))
    assert found["ratio_low"] == pytest.approx(float(min(ratios)))
    assert found["ratio_high"] == pytest.approx(float(max(ratios)))
    low, high = bounds.closed_ratio(measure, a / 10)
    assert low <= found["ratio_low"] <= found["ratio_high"] <= high
    assert found["gap"] <= bounds.closed_gap(measure, a / 10)


def test_suprema_are_reached_and_what_lies_beyond_is_a_violation():
    """The integers find a metric that is further from Dice than the bound of another alpha."""
    assert bounds.closed_gap("jaccard") == pytest.approx(0.17157, abs=1e-5)
    for a, absolute, relative in (
        (4, 0.056, 0.25),
        (3, 0.127, 0.667),
        (2, 0.225, 1.5),
        (1, 0.382, 4),
    ):
        assert bounds.closed_gap("tversky", a / 10) == pytest.approx(absolute, abs=5e-4)
        assert bounds.closed_ratio("tversky", a / 10)[1] - 1 == pytest.approx(relative, abs=5e-4)
        tp = np.arange(1, 500)
        line = [(np.full(2000, x), np.arange(2000), np.zeros(2000, np.int64)) for x in tp[::50]]
        found = bounds.extremes("tversky", a, line)
        assert found["gap"] == pytest.approx(bounds.closed_gap("tversky", a / 10), rel=1e-4)
        assert found["violations"] == 0
    one = np.array([1]), np.array([3]), np.array([0])
    assert bounds.violations("tversky", 1, *one) == 0
    # T at alpha 0.1 under the bound of 0.4: T - D = 1 / 1.3 - 2 / 5 is beyond 0.056.
    t, d = Fraction(10, 13), Fraction(2, 5)
    p, q = (t - d).numerator, (t - d).denominator
    assert 2 * 4 * (q + p) ** 2 > 10 * (q - p) ** 2
    # Counts that are none: more true positives than the denominators have.
    assert bounds.violations("tversky", 3, np.array([1]), np.array([-3]), np.array([0])) == 1
    assert bounds.violations("jaccard", 5, np.array([2]), np.array([-1]), np.array([0])) == 1


def test_a_weighted_hamming_distance_has_no_bound():
    for weight in bounds.WEIGHTS:
        small = bounds.worst_hamming(weight, 12)[0]
        every = [
            bounds.hamming_gap(weight, tuple(x), 12)
            for part in bounds.all_counts(12)
            for x in np.stack(part, 1).tolist()
            if x[0] + x[2] < 12
        ]
        assert small == max(every)
        last = 0.0
        for voxels in (10**3, 10**6, 10**9, 10**12):
            gap = float(bounds.hamming_gap(weight, (1, math.isqrt(voxels), 0), voxels))
            assert gap > last
            last = gap
        assert last > 1 - 1e-5


def predicted(rows):
    names = ("task", "subject", "structure", "split", "tp", "fp", "fn")
    return [dict(zip(names, map(str, row), strict=True)) for row in rows]


def test_predictions_of_a_subject_are_ordered():
    rows = predicted(
        [
            ("binary", "a", "s", "test", 10, 0, 10),  # Dice 0.667, J 0.5, T(0.1) 0.526
            ("binary", "a", "s", "test", 20, 30, 0),  # Dice 0.571, J 0.4, T(0.1) 0.870
            ("binary", "b", "s", "test", 5, 5, 5),
            ("binary", "mean", "s", "validation", 0, 1, 1),
        ]
    )
    lines = {line["name"]: line for line in bounds.of_predictions(rows)}
    assert lines["Jaccard"]["pairs"] == 1
    assert lines["Jaccard"]["discordant"] == 0
    assert lines["Jaccard"]["violations"] == 0
    assert lines["Tversky, alpha 0.1"]["discordant"] == 1
    assert lines["false + missed voxels"]["discordant"] == 0  # 10 and 30
    assert lines["false + 10 x missed voxels"]["discordant"] == 1  # 100 and 30
    assert lines["Jaccard"]["predictions"] == 3
    assert lines["Jaccard"]["gap"] == pytest.approx(2 / 3 - 0.5, abs=6e-3)
    assert bounds.of_predictions([]) == []


def test_counts_of_large_volumes_do_not_overflow_and_lesions_are_no_voxels():
    """Fourth powers of a head's counts do not fit 64 bits."""
    rows = predicted(
        [
            ("lesion", "a", "lesion", "test", 30_000, 7_000_000, 10_000),
            ("lesion", "a", "lesion", "test", 20_000, 5_000, 20_000),
            ("lesion", "a", "lesion", "test", 0, 0, 0),
            ("lesion", "a", "lesions below 10 mm3", "test", 3, 1, 2),
        ]
    )
    for line in bounds.of_predictions(rows):
        assert line["predictions"] == 2
        assert line.get("violations", 0) == 0


def test_a_quick_run_makes_its_page(tmp_path):
    place = Place(tmp_path, tmp_path / "work", tmp_path / "out", True, lambda line: None)
    carry_out(bounds.EXPERIMENT, place)
    page = (tmp_path / "out" / "bounds" / "README.md").read_text()
    assert f"| Tversky, alpha 0.1 | {math.comb(43, 3) - math.comb(42, 2)} | 0 |" in page
    assert "`losses` has no rows yet." in page
    found = bounds.EXPERIMENT.results(place).rows()
    assert all(row["violations"] in ("", "0") for row in found)
    gaps = [float(row["gap"]) for row in found if row["measure"] == "tversky"]
    assert gaps == sorted(gaps), "the further alpha is from one half, the worse"
