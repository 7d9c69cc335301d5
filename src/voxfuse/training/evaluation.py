"""RUN/test.csv: Dice, recall and precision of the test subjects over thresholds."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse._files import write_text
from voxfuse.metrics import VoxelCounts
from voxfuse.metrics.files import load_scan
from voxfuse.training.dataset import Subject
from voxfuse.training.predict import Model

COLUMNS = ("subject", "window", "threshold", "dice", "recall", "precision")


def thresholds(steps: int = 18) -> NDArray[np.float64]:
    """Thresholds spaced evenly in logits from 1e-4 to 1 - 1e-4, and 0.1 to 0.9, ascending.

    Example:
        >>> from voxfuse.training.evaluation import thresholds
        >>> found = thresholds()
        >>> len(found), float(found[0]), 0.5 in found, 0.1 in found
        (45, 0.0001, True, True)
    """
    top = np.log((1 - 1e-4) / 1e-4)
    logits = np.linspace(0, top, steps + 1)[1:]
    below = np.array([float(f"{p:.6g}") for p in 1 / (1 + np.exp(logits))])
    above = np.array([float(f"{p:.8g}") for p in 1 / (1 + np.exp(-logits))])
    return np.unique(np.concatenate([below, above, np.arange(1, 10) / 10]))


def rows_of(
    subject: str,
    window: str,
    probabilities: NDArray[np.float32],
    truth: NDArray[np.bool_],
    at: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """A row a threshold: scores of ``p >= threshold`` against a truth on the same grid.

    ``Dice = 2 TP / (2 TP + FP + FN)``, ``recall = TP / (TP + FN)``, ``precision = TP / (TP + FP)``;
    where a mask is empty they are what :data:`voxfuse.metrics.METRICS` says.
    """
    levels = thresholds() if at is None else np.sort(np.asarray(at, np.float64))
    # In float32, as `probabilities >= level` compares.
    reached = np.searchsorted(levels.astype(np.float32), probabilities.ravel(), side="right")
    totals = np.bincount(reached, minlength=levels.size + 1)
    trues = np.bincount(reached[truth.ravel()], minlength=levels.size + 1)
    rows = []
    for k, level in enumerate(levels):
        tp, called = int(trues[k + 1 :].sum()), int(totals[k + 1 :].sum())
        fp, fn = called - tp, int(trues.sum()) - tp
        tn = int(totals.sum()) - tp - fp - fn
        voxels = VoxelCounts(tp, fp, fn, tn)
        scores = (voxels.dice, voxels.sensitivity, voxels.precision)
        named = (subject, window, float(level), *scores)
        rows.append(dict(zip(COLUMNS, named, strict=True)))
    return rows


def rows_of_subjects(
    model: Model,
    subjects: Iterable[Subject],
    windows: Sequence[str] = (),
    ignored: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of every subject and window on the scans' own grids; with several labels, of each.

    Args:
        model: see :func:`voxfuse.training.predict.load_model`.
        subjects: with labels.
        windows: in place of the run's own.
        ignored: value of voxels that are in no score.
    """
    rows = []
    names = list(model.labels)
    for subject in subjects:
        assert subject.label is not None
        truth = np.rint(load_scan(subject.label).array)
        judged = np.ones(truth.shape, bool) if ignored is None else truth != ignored
        for window in windows or [model.config.prediction.window]:
            options = replace(model.config.prediction, window=window)
            probabilities, _ = model.probabilities(subject, options)
            for c, value in enumerate(model.values[1:]):
                for row in rows_of(
                    subject.name, window, probabilities[c][judged], truth[judged] == value
                ):
                    if len(names) > 2:
                        row["label"] = next(n for n, v in model.labels.items() if v == value)
                    rows.append(row)
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV, whole or not at all."""
    columns = [*COLUMNS, *(["label"] if rows and "label" in rows[0] else [])]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
