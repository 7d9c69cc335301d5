"""Intervals cover what they say, and tests are scipy's where scipy has them."""

import itertools
from collections import Counter

import numpy as np
import pytest
import scipy.stats

from voxfuse.experiments import statistics


def simulated(random, seeds, patients, of_seed):
    """Differences whose true mean is 0: an error of the seed, of the patient, and of both."""
    return (
        of_seed * random.standard_normal((seeds, 1))
        + random.standard_normal((1, patients))
        + 0.5 * random.standard_normal((seeds, patients))
    )


def coverage(interval, seeds, of_seed, trials=300):
    random = np.random.default_rng(1)
    inside = 0
    for k in range(trials):
        low, high = interval(simulated(random, seeds, 90, of_seed), k)
        inside += low <= 0 <= high
    return inside / trials


def crossed(values, k):
    interval = statistics.crossed_bootstrap(values, replicates=500, seed=k)
    return interval.low, interval.high


def nested(values, k, replicates=500):
    """Seeds drawn anew within every patient."""
    random = np.random.default_rng(k)
    seeds, patients = values.shape
    column = random.integers(patients, size=(replicates, patients))
    drawn = values[random.integers(seeds, size=column.shape), column].mean(1)
    return np.quantile(drawn, [0.025, 0.975])


def test_the_crossed_bootstrap_covers_where_the_nested_one_does_not():
    # Binomial standard errors of 300 trials: 0.027 at 0.68, 0.019 at 0.87.
    of_seed = 0.36
    assert coverage(nested, 3, of_seed) == pytest.approx(0.68, abs=0.05)
    three, five = coverage(crossed, 3, of_seed), coverage(crossed, 5, of_seed)
    assert three == pytest.approx(0.87, abs=0.05)
    assert three < five
    assert five == pytest.approx(0.91, abs=0.04)


def test_the_crossed_bootstrap_draws_rows_and_columns():
    """The frequencies of all means of two seeds and three patients, by enumeration."""
    values = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    exact = Counter(
        round(values[np.ix_(rows, columns)].mean(), 9)
        for rows in itertools.product(range(2), repeat=2)
        for columns in itertools.product(range(3), repeat=3)
    )
    replicates = 20_000
    found = Counter(np.round(statistics.bootstrap_means(values, replicates=replicates), 9).tolist())
    assert set(found) == set(exact)
    for mean, ways in exact.items():
        share = ways / 108
        error = np.sqrt(share * (1 - share) / replicates)
        assert abs(found[mean] / replicates - share) < 4 * error


def test_subjects_of_one_cluster_are_drawn_together():
    values = np.array([[1.0, 1.0, -1.0, -1.0, 0.0]])
    clusters = ["a", "a", "b", "b", "c"]
    means = statistics.bootstrap_means(values, clusters=clusters, replicates=2000)
    # Three draws of heads: (2 a - 2 b) / (2 a + 2 b + c).
    allowed = {
        (2 * a - 2 * b) / (2 * a + 2 * b + (3 - a - b)) for a in range(4) for b in range(4 - a)
    }
    assert {round(x, 9) for x in means} == {round(x, 9) for x in allowed}
    with pytest.raises(ValueError, match="clusters: got 2, expected 5"):
        statistics.crossed_bootstrap(values, clusters=["a", "b"])


def test_p_values_are_uniform_without_a_difference():
    """One seed and many patients: of true nulls 5 % have a p-value below 5 %."""
    random = np.random.default_rng(3)
    p = [
        statistics.crossed_bootstrap(random.standard_normal((1, 40)), replicates=400, seed=k).p
        for k in range(400)
    ]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.055, abs=0.03)
    assert statistics.crossed_bootstrap([[0.1, 0.2, 0.1]], replicates=999).p == 2 / 1000


def test_few_patients_is_students_interval():
    values = np.random.default_rng(0).standard_normal((3, 6)) + 0.4
    found = statistics.few_patients(values)
    peer = scipy.stats.ttest_1samp(values.mean(0), 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((peer.low, peer.high))
    assert found.seed_sd == pytest.approx(np.std(values.mean(1), ddof=1))
    assert found.positive == (values.mean(0) > 0).sum()
    assert found.positive + found.negative == found.patients == 6
    assert np.isnan(found.p)
    with pytest.raises(ValueError, match="got 1 patient, expected two"):
        statistics.few_patients([[1.0], [2.0]])


def test_holm_keeps_the_chance_of_any_false_claim():
    # Holm 1979's steps: 0.01 x 4, 0.015 x 3, then never less than before.
    given = {"d": 0.9, "a": 0.01, "b": 0.015, "c": 0.02}
    found = statistics.holm(given)
    assert list(found) == list(given)
    assert found == pytest.approx({"a": 0.04, "b": 0.045, "c": 0.045, "d": 0.9})
    p = np.random.default_rng(0).random((2000, 5))
    any_false = [min(statistics.holm(dict(enumerate(row))).values()) <= 0.05 for row in p]
    assert np.mean(any_false) == pytest.approx(0.05, abs=0.015)
    with pytest.raises(ValueError, match="got 1.5 of x"):
        statistics.holm({"x": 1.5})


def test_rising_is_scipys_page():
    values = np.random.default_rng(0).random((5, 4)) + np.arange(4) / 5
    found, peer = statistics.rising(values), scipy.stats.page_trend_test(values)
    assert (found.statistic, found.p) == (peer.statistic, peer.pvalue)
    steady = np.tile([1.0, 2.0, 3.0, 4.0], (5, 1))
    assert statistics.rising(steady).rising == 5
    assert statistics.rising(-steady).p > 0.99
    with pytest.raises(ValueError, match="expected \\(blocks, settings\\)"):
        statistics.rising([[1.0, 2.0, 3.0]])
    settings = np.random.default_rng(0).random((4, 5, 7))
    blocks = statistics.over_seeds(settings)
    assert blocks.shape == (5, 4)
    assert blocks[2, 3] == pytest.approx(settings[3, 2].mean())


def test_equivalence_is_an_interval_inside_the_margin():
    random = np.random.default_rng(0)
    narrow = 0.002 + 0.01 * random.standard_normal((5, 90))
    assert statistics.equivalent(narrow)
    assert not statistics.equivalent(narrow + 0.009)
    assert not statistics.equivalent(narrow * 10)
    inner = statistics.crossed_bootstrap(narrow, level=0.9)
    assert statistics.equivalent(narrow, max(-inner.low, inner.high) + 1e-9)
    assert not statistics.equivalent(narrow, max(-inner.low, inner.high))


def test_values_that_are_no_table_are_errors():
    for values in ([1.0, 2.0], [[]], [[np.nan, 1.0]]):
        with pytest.raises(ValueError, match="values: got"):
            statistics.crossed_bootstrap(values)
    with pytest.raises(ValueError, match="level: got 95"):
        statistics.crossed_bootstrap([[1.0, 2.0]], level=95)
