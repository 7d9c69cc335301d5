r"""What a difference between two ways is worth, when seeds and patients are few.

One network predicts every patient, so that seeds and patients are **crossed**: an error of a seed
is in all patients of it. Values are therefore arrays (seeds, patients), differences of two ways
that share the seed (initialisation and patches) and the patient. Drawing (seed, patient) pairs, or
seeds anew within each patient, takes an error of the seed for noise that averages out over
patients; :func:`crossed_bootstrap` draws one set of seeds and one set of patients a replicate.

======================  =========================================================================
question                function
======================  =========================================================================
how large, how sure     :func:`crossed_bootstrap`; of few patients :func:`few_patients`
of several claims       :func:`holm`
rises with a setting    :func:`rising`
makes no difference     :func:`equivalent`
======================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxfuse.metrics._arrays import optional

Floats = NDArray[np.float64]

#: Differences of Dice that nobody would act on.
MARGIN = 0.01


@dataclass(frozen=True)
class Interval:
    """A mean and the interval about it."""

    mean: float
    low: float
    high: float
    p: float = float("nan")  #: two-sided, of the mean being 0; NaN where none is given

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def _crossed(values: ArrayLike) -> Floats:
    table = np.asarray(values, np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"values: got shape {table.shape}, expected (seeds, patients)")
    if not np.isfinite(table).all():
        where = tuple(int(k) for k in np.argwhere(~np.isfinite(table))[0])
        raise ValueError(f"values: got {table[where]} at {where}, expected finite numbers")
    return table


def bootstrap_means(
    values: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    replicates: int = 10_000,
    seed: int = 0,
) -> Floats:
    """The mean of each replicate; see :func:`crossed_bootstrap`."""
    table = _crossed(values)
    seeds, patients = table.shape
    random = np.random.default_rng(seed)

    def counts(of: int) -> Floats:
        """How often each of ``of`` was drawn, a row a replicate."""
        return random.multinomial(of, np.full(of, 1 / of), replicates).astype(np.float64)

    of_seeds = counts(seeds)
    if clusters is None:
        of_patients = counts(patients)
    else:
        if len(clusters) != patients:
            raise ValueError(f"clusters: got {len(clusters)}, expected {patients}, one a patient")
        names = list(dict.fromkeys(clusters))
        of_patients = counts(len(names))[:, [names.index(name) for name in clusters]]
    totals = (of_seeds @ table * of_patients).sum(1)
    means: Floats = totals / (seeds * of_patients.sum(1))
    return means


def crossed_bootstrap(
    values: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    replicates: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The percentile interval of the mean of (seeds, patients), seeds crossed with patients.

    Each replicate draws one set of seeds and one set of patients, with replacement, and takes the
    mean over the rows and columns drawn. ``p`` is the smallest 1 - level at which the interval
    leaves 0 out, never below 2 / (replicates + 1).

    With few seeds the interval is too narrow, since the spread of S draws of S seeds is
    ``(S - 1) / S`` of theirs. Where seeds alone differ, 95 % are about 75 with three seeds and 84
    with five; where seeds and patients add as much to the variance of the mean, 90 and 94.

    Args:
        values: (seeds, patients), differences within a seed and a patient.
        clusters: of every patient, what it was made of; subjects of one cluster (simulated lesions
            in one head, scans of one patient) are drawn together.
        level: of the interval.
        replicates: how many.
        seed: of the draws.

    Raises:
        ValueError: another shape, a value that is not finite, a level outside (0, 1).

    Example:
        >>> from voxfuse.experiments.statistics import crossed_bootstrap
        >>> print(crossed_bootstrap([[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]]))
        +0.250 (+0.133 to +0.367)
    """
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, expected a number between 0 and 1")
    means = bootstrap_means(values, clusters=clusters, replicates=replicates, seed=seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (means.size + 1))
    return Interval(float(np.mean(_crossed(values))), float(low), float(high), p)


def equivalent(
    values: ArrayLike, margin: float = MARGIN, *, level: float = 0.9, **draws: Any
) -> bool:
    """Whether the crossed bootstrap's 90 % interval lies inside +- ``margin``.

    That is two one-sided tests at 5 %. A wide interval is not a small difference: False means that
    none was shown, either way.
    """
    if not margin > 0:
        raise ValueError(f"margin: got {margin}, expected a positive number")
    interval = crossed_bootstrap(values, level=level, **draws)
    return -margin < interval.low and interval.high < margin


@dataclass(frozen=True)
class FewPatients(Interval):
    """A t interval over patients, and what a reader needs to judge it."""

    seed_sd: float = float("nan")  #: of the means over patients, between seeds
    positive: int = 0  #: patients whose mean over seeds is above 0
    negative: int = 0
    patients: int = 0

    def __str__(self) -> str:
        spread = f"seed sd {self.seed_sd:.3f}" if np.isfinite(self.seed_sd) else "one seed"
        return f"{super().__str__()}, {spread}, {self.positive} of {self.patients} patients above 0"


def few_patients(values: ArrayLike, *, level: float = 0.95) -> FewPatients:
    """Student's interval over the patients' means, the sd between seeds, and the signs.

    For so few patients that a bootstrap of them means nothing, and a p-value neither: none is
    given. The interval has the patients' spread alone; the seeds' stands beside it.

    Example:
        >>> from voxfuse.experiments.statistics import few_patients
        >>> print(few_patients([[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]]))
        +0.250 (+0.002 to +0.498), seed sd 0.071, 3 of 3 patients above 0
    """
    table = _crossed(values)
    seeds, patients = table.shape
    if patients < 2:
        raise ValueError(f"values: got {patients} patient, expected two or more")
    of_patients, of_seeds = table.mean(0), table.mean(1)
    mean = float(of_patients.mean())
    quantile = float(optional("scipy.stats", "A t interval").t.ppf((1 + level) / 2, patients - 1))
    half = quantile * float(of_patients.std(ddof=1)) / np.sqrt(patients)
    return FewPatients(
        mean,
        mean - half,
        mean + half,
        seed_sd=float(of_seeds.std(ddof=1)) if seeds > 1 else float("nan"),
        positive=int((of_patients > 0).sum()),
        negative=int((of_patients < 0).sum()),
        patients=patients,
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values of several claims, in the given order.

    The k-th smallest of m is multiplied by m - k + 1, and none is below the one before it: whatever
    lies below 0.05 may be claimed, with at most 5 % chance of any false claim.

    Example:
        >>> from voxfuse.experiments.statistics import holm
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"p_values: got {p} of {name}, expected numbers from 0 to 1")
    adjusted: dict[str, float] = {}
    largest = 0.0
    for k, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - k) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


@dataclass(frozen=True)
class Trend:
    """Page's test of a rise."""

    statistic: float  #: Page's L
    p: float  #: one-sided, of a rise
    blocks: int
    rising: int  #: blocks that rise at every step


def rising(values: ArrayLike) -> Trend:
    """Page's trend test of values (blocks, settings): do they rise from setting to setting?

    Blocks have to be independent. Patients of one network are not, since a network that found
    little at one setting found little in all of them: give the seeds as blocks, each the mean over
    its patients (:func:`over_seeds`).

    Example:
        >>> from voxfuse.experiments.statistics import rising
        >>> rising([[0.1, 0.2, 0.3], [0.2, 0.3, 0.4], [0.1, 0.3, 0.2]])
        Trend(statistic=41.0, p=0.032407407407407406, blocks=3, rising=2)
    """
    table = np.asarray(values, np.float64)
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 3:
        raise ValueError(
            f"values: got shape {table.shape}, expected (blocks, settings), two and three or more"
        )
    result = optional("scipy.stats", "Page's trend test").page_trend_test(table)
    risen = int((np.diff(table, axis=1) > 0).all(1).sum())
    return Trend(float(result.statistic), float(result.pvalue), table.shape[0], risen)


def over_seeds(values: ArrayLike) -> Floats:
    """Values (settings, seeds, patients) as blocks of :func:`rising`: (seeds, settings)."""
    table = np.asarray(values, np.float64)
    if table.ndim != 3:
        raise ValueError(f"values: got shape {table.shape}, expected (settings, seeds, patients)")
    blocks: Floats = table.mean(2).T
    return blocks
