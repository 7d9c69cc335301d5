r"""How far the metrics of overlap losses lie apart: over all confusion counts, and as predicted.

Eelbode et al. 2020 (arXiv 2010.13499): Dice D and Jaccard J rank alike and approximate each other;
so do Dice and the Tversky index T of alpha + beta = 1, the worse the further alpha lies from one
half; no bound exists for a weighted Hamming distance, which weighted cross-entropy stands for.

===================  ===============================================  ===========================
of                   ratio within                                     greatest difference
===================  ===============================================  ===========================
J, D                 (1 - D) / (1 - J) in [1/2, 1]                    3 - 2 sqrt(2)
T, D, alpha <= 1/2   T / D in [1 / (2 beta), 1 / (2 alpha)]           (1 - s) / (1 + s),
                                                                      s = sqrt(2 alpha)
===================  ===============================================  ===========================

Every inequality is checked in integers: with alpha = a/10, ``T = 10 TP / (10 TP + a FP + (10 - a)
FN)``, and what has a root in it is squared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse.experiments.experiment import Experiment, Finished, Place, Run
from voxfuse.experiments.results import read_rows
from voxfuse.experiments.tables import done, markdown, standalone
from voxfuse.metrics.report.charts import Series, xy_chart

Integers = NDArray[np.int64]
Counts = tuple[int, int, int]  #: TP, FP, FN

#: Tenths of alpha, and weights of a missed voxel in a Hamming distance; None is inverse shares.
ALPHAS = (5, 4, 3, 2, 1)
WEIGHTS = (1, 10, 100, None)
#: Experiments whose predictions are looked at.
PREDICTED = ("losses", "lesions")

KEY = ("measure", "parameter", "voxels")
COLUMNS = (
    *KEY,
    *("counts", "violations", "ratio_low", "ratio_high", "gap", "tp", "fp", "fn"),
)


def closed_gap(measure: str, alpha: float = 0.5) -> float:
    """The greatest difference to Dice.

    Example:
        >>> from voxfuse.experiments.bounds import closed_gap
        >>> round(closed_gap("jaccard"), 5), round(closed_gap("tversky", 0.1), 3)
        (0.17157, 0.382)
    """
    if measure == "jaccard":
        return 3 - 2 * math.sqrt(2)
    root = math.sqrt(2 * alpha)
    return (1 - root) / (1 + root)


def closed_ratio(measure: str, alpha: float = 0.5) -> tuple[float, float]:
    """The least and the greatest (1 - D) / (1 - J) or T / D."""
    return (0.5, 1.0) if measure == "jaccard" else (1 / (2 * (1 - alpha)), 1 / (2 * alpha))


# --- In integers ----------------------------------------------------------------------------------


def fractions_of(measure: str, a: int, tp: Integers, fp: Integers, fn: Integers) -> Any:
    """Numerator and denominator of the measure and of Dice."""
    dice = 2 * tp, 2 * tp + fp + fn
    if measure == "jaccard":
        return (tp, tp + fp + fn), dice
    return (10 * tp, 10 * tp + a * fp + (10 - a) * fn), dice


#: Of so many voxels, squares of ``q + p`` fit 64 bits: 10 (40 voxels^2)^2 < 2^63.
EXACT = 4000


def violations(measure: str, a: int, tp: Integers, fp: Integers, fn: Integers) -> int:
    """Of counts with TP > 0: how often an inequality of the module's docstring fails.

    ``p / q``, the difference, is at most ``(1 - s) / (1 + s)`` if ``s^2 (q + p)^2 <= (q - p)^2``,
    since p < q; and at most ``3 - 2 sqrt(2)`` if ``8 q^2 <= (3 q - p)^2``. For Jaccard, 2 - D has
    D's denominator, and ``J = D / (2 - D)`` is an equality of integers.
    """
    if int(tp.max()) + int(fp.max()) + int(fn.max()) > EXACT:
        tp, fp, fn = (counts.astype(object) for counts in (tp, fp, fn))
    (top, bottom), (dice_top, dice_bottom) = fractions_of(measure, a, tp, fp, fn)
    p = np.abs(top * dice_bottom - dice_top * bottom)
    q = bottom * dice_bottom
    if measure == "jaccard":
        wrong = top * (2 * dice_bottom - dice_top) != dice_top * bottom
        wrong |= 8 * q**2 > (3 * q - p) ** 2
        # (1 - D) / (1 - J) = ((FP + FN) / dice_bottom) / ((FP + FN) / bottom)
        wrong |= (2 * bottom < dice_bottom) | (bottom > dice_bottom)
        return int(wrong.sum())
    # T / D = 5 dice_bottom / bottom, between 5 / (10 - a) and 5 / a.
    wrong = ((10 - a) * dice_bottom < bottom) | (a * dice_bottom > bottom)
    wrong |= 2 * a * (q + p) ** 2 > 10 * (q - p) ** 2
    return int(wrong.sum())


def all_counts(voxels: int) -> Iterator[tuple[Integers, Integers, Integers]]:
    """All TP > 0, FP and FN of at most so many voxels, a TP at a time."""
    for tp in range(1, voxels + 1):
        fp, fn = np.indices((voxels - tp + 1,) * 2).reshape(2, -1)
        kept = fp + fn <= voxels - tp
        fp, fn = fp[kept].astype(np.int64), fn[kept].astype(np.int64)
        yield np.full_like(fp, tp), fp, fn


def extremes(
    measure: str, a: int, parts: Iterable[tuple[Integers, Integers, Integers]]
) -> dict[str, Any]:
    """The columns from ``counts`` on, over counts in parts."""
    total, wrong, low, high, gap = 0, 0, math.inf, -math.inf, -1.0
    place: Counts = (0, 0, 0)
    for tp, fp, fn in parts:
        kept = tp > 0
        tp, fp, fn = tp[kept], fp[kept], fn[kept]
        if not tp.size:
            continue
        total += tp.size
        wrong += violations(measure, a, tp, fp, fn)
        (top, bottom), (dice_top, dice_bottom) = fractions_of(measure, a, tp, fp, fn)
        index, dice = top / bottom, dice_top / dice_bottom
        ratio = bottom / dice_bottom if measure == "jaccard" else 5 * dice_bottom / bottom
        low, high = min(low, float(ratio.min())), max(high, float(ratio.max()))
        far = int(np.abs(index - dice).argmax())
        if abs(index[far] - dice[far]) > gap:
            gap = float(abs(index[far] - dice[far]))
            place = int(tp[far]), int(fp[far]), int(fn[far])
    return {
        "counts": total,
        "violations": wrong,
        "ratio_low": low,
        "ratio_high": high,
        "gap": gap,
        **dict(zip(("tp", "fp", "fn"), place, strict=True)),
    }


def hamming_gap(weight: int | None, counts: Counts, voxels: int) -> Fraction:
    """``(1 - D) - H``: H is what of the weighted voxels is wrong, so that 0 <= H <= 1.

    A missed voxel of the structure weighs ``weight``, a false one 1; None weighs both by the
    inverse of their share, so that H is the mean of the two error rates.
    """
    tp, fp, fn = counts
    positives, negatives = tp + fn, voxels - tp - fn
    dice_loss = Fraction(fp + fn, 2 * tp + fp + fn)
    if weight is None:
        return dice_loss - (Fraction(fn, positives) + Fraction(fp, negatives)) / 2
    return dice_loss - Fraction(fp + weight * fn, negatives + weight * positives)


def worst_hamming(weight: int | None, voxels: int) -> tuple[Fraction, Counts]:
    """The greatest gap of all counts with one true positive or more."""
    best, place = -math.inf, (1, 0, 0)
    for tp, fp, fn in all_counts(voxels):
        positives, negatives = tp + fn, voxels - tp - fn
        kept = negatives > 0
        tp, fp, fn, positives, negatives = (x[kept] for x in (tp, fp, fn, positives, negatives))
        if not tp.size:
            continue
        if weight is None:
            wrong = (fn / positives + fp / negatives) / 2
        else:
            wrong = (fp + weight * fn) / (negatives + weight * positives)
        gap = (fp + fn) / (2 * tp + fp + fn) - wrong
        far = int(gap.argmax())
        if gap[far] > best:
            best, place = float(gap[far]), (int(tp[far]), int(fp[far]), int(fn[far]))
    return hamming_gap(weight, place, voxels), place


def rows(run: Run, place: Place) -> list[dict[str, Any]]:
    """One: all counts of a measure and a number of voxels."""
    voxels, parameter = int(run["voxels"]), run["parameter"]
    if run["measure"] != "hamming":
        a = 5 if parameter is None else round(10 * float(parameter))
        return [{**run, **extremes(run["measure"], a, all_counts(voxels))}]
    weight = None if parameter == "inverse" else int(parameter)
    if voxels > LARGEST:  # one of all predictions is enough
        counts: Counts = (1, math.isqrt(voxels), 0)
        gap, number = hamming_gap(weight, counts, voxels), 1
    else:
        gap, counts = worst_hamming(weight, voxels)
        number = math.comb(voxels + 3, 3) - math.comb(voxels + 2, 2)
    found = {**run, **dict.fromkeys(COLUMNS[len(KEY) :]), "counts": number, "gap": float(gap)}
    return [{**found, **dict(zip(("tp", "fp", "fn"), counts, strict=True))}]


#: So many voxels are looked at in all counts; beyond, in one count that shows what it has to.
LARGEST = 300


def runs(quick: bool) -> list[Run]:
    """Jaccard, Tversky by alpha, and Hamming distances by weight and by the number of voxels."""
    voxels = 40 if quick else LARGEST
    made: list[Run] = [{"measure": "jaccard", "parameter": None, "voxels": voxels}]
    made += [{"measure": "tversky", "parameter": a / 10, "voxels": voxels} for a in ALPHAS]
    sizes = (10, 40, 10**6) if quick else (30, 100, 300, 10**4, 10**6, 10**8)
    for weight in WEIGHTS:
        name = "inverse" if weight is None else weight
        made += [{"measure": "hamming", "parameter": name, "voxels": n} for n in sizes]
    return made


# --- Predictions ----------------------------------------------------------------------------------


def discordant(top: Integers, bottom: Integers, others: NDArray[np.float64]) -> tuple[int, int]:
    """Pairs of predictions that Dice ``top / bottom`` orders strictly, and of those how many
    ``others`` (greater is better) orders the other way, or not at all."""
    dice = np.sign(top[:, None] * bottom[None] - top[None] * bottom[:, None])
    other = np.sign(others[:, None] - others[None])
    above = np.triu(dice != 0, 1)
    return int(above.sum()), int((above & (other != dice)).sum())


def _index(measure: str, a: int, tp: Integers, fp: Integers, fn: Integers) -> Any:
    if measure == "hamming":
        return -(fp + a * fn).astype(np.float64)
    (top, bottom), _ = fractions_of(measure, a, tp, fp, fn)
    return top / bottom


#: Measures that are compared with Dice on predictions: name, measure, parameter.
ORDERED = (
    ("Jaccard", "jaccard", 5),
    *((f"Tversky, alpha {a / 10}", "tversky", a) for a in ALPHAS[1:]),
    ("false + missed voxels", "hamming", 1),
    ("false + 10 x missed voxels", "hamming", 10),
)


def of_predictions(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """What :data:`ORDERED` do on the test subjects' predictions.

    Pairs are of predictions of one subject and structure, by any two losses, seeds or thresholds.
    Rows that count lesions in place of voxels are left out, and what is empty on both sides.
    """
    groups: dict[tuple[str, ...], set[Counts]] = {}
    predictions = 0
    for row in rows:
        if row["split"] == "test" and not row["structure"].startswith("lesions "):
            counts = int(row["tp"]), int(row["fp"]), int(row["fn"])
            if not any(counts):
                continue
            groups.setdefault((row["task"], row["subject"], row["structure"]), set()).add(counts)
            predictions += 1
    tables = [np.array(sorted(counts), np.int64).T for counts in groups.values()]
    if not tables:
        return []
    made = []
    for name, measure, a in ORDERED:
        pairs = other = 0
        for tp, fp, fn in tables:
            found = discordant(2 * tp, 2 * tp + fp + fn, _index(measure, a, tp, fp, fn))
            pairs, other = pairs + found[0], other + found[1]
        line = {"name": name, "predictions": predictions, "pairs": pairs, "discordant": other}
        if measure != "hamming":
            line |= extremes(measure, a, [(tp, fp, fn) for tp, fp, fn in tables])
            line["closed"] = closed_gap(measure, a / 10)
        made.append(line)
    return made


# --- The page -------------------------------------------------------------------------------------


def _measured(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    lines = []
    for row in rows:
        measure = row["measure"]
        if measure == "hamming":
            continue
        alpha = float(row["parameter"] or 0.5)
        closed, (low, high) = closed_gap(measure, alpha), closed_ratio(measure, alpha)
        lines.append(
            [
                "Jaccard" if measure == "jaccard" else f"Tversky, alpha {alpha:g}",
                row["counts"],
                row["violations"],
                f"{float(row['ratio_low']):.4f} to {float(row['ratio_high']):.4f}",
                f"{low:.4f} to {high:.4f}",
                f"{float(row['gap']):.4f}",
                f"{closed:.4f}",
                f"{row['tp']}, {row['fp']}, {row['fn']}",
            ]
        )
    return lines


def _hamming(rows: Sequence[Mapping[str, str]]) -> str:
    of = [row for row in rows if row["measure"] == "hamming"]
    sizes = sorted({int(row["voxels"]) for row in of})
    weights = list(dict.fromkeys(row["parameter"] for row in of))
    gaps = {(row["parameter"], int(row["voxels"])): float(row["gap"]) for row in of}
    lines = [
        [weight, *(f"{gaps[weight, n]:.4f}" if (weight, n) in gaps else "" for n in sizes)]
        for weight in weights
    ]
    return markdown(["weight of a missed voxel", *(f"{n:,} voxels" for n in sizes)], lines)


def _chart(rows: Sequence[Mapping[str, str]]) -> str:
    of = [row for row in rows if row["measure"] == "tversky"]
    alphas = np.linspace(0.02, 0.5, 49)
    series = [
        Series("closed form", list(alphas), [closed_gap("tversky", x) for x in alphas]),
        Series(
            "all counts",
            [float(row["parameter"]) for row in of],
            [float(row["gap"]) for row in of],
            [row["parameter"] for row in of],
            line=False,
            dots=True,
        ),
    ]
    chart = xy_chart(series, "alpha", "greatest |T - D|", x_range=(0.0, 0.5), y_range=(0.0, 0.7))
    return standalone(chart, [one.name for one in series])


def pages(finished: Finished) -> dict[str, str]:
    """Closed forms beside what was found."""
    text = [
        "# Bounds between the metrics",
        "What the overlap losses approximate each other by, after Eelbode et al. 2020, over all "
        "confusion counts and on the predictions of the other experiments. D is Dice, J Jaccard, T "
        "the Tversky index with beta = 1 - alpha.",
        done(finished, "voxfuse experiment bounds"),
    ]
    if not finished.rows:
        return {"README.md": "\n\n".join(text) + "\n"}
    voxels = max(int(r["voxels"]) for r in finished.rows if r["measure"] != "hamming")
    text += [
        "## All counts",
        f"All TP of 1 and more, FP and FN of at most {voxels} voxels together. Whether a bound "
        "holds is decided in integers. The ratio is (1 - D) / (1 - J), or T / D; the difference is "
        "to D.",
        markdown(
            ["metric", "counts", "violations", "ratio", "bound", "greatest difference", "bound",
             "at TP, FP, FN"],
            _measured(finished.rows),
        ),
        "![Greatest difference over alpha](tversky.svg)",
        "## A weighted Hamming distance has no bound",
        "H is the share of the weighted voxels that is wrong; \"inverse\" weighs structure and "
        "background by the inverse of their shares. The greatest (1 - D) - H, of all counts up to "
        f"{LARGEST} voxels and beyond of one prediction with a true voxel and sqrt(N) false "
        "ones: it goes to 1, whatever the weight.",
        _hamming(finished.rows),
        "## Predictions",
    ]  # fmt: skip
    for name in PREDICTED:
        lines = of_predictions(read_rows(finished.results / name / "results.csv"))
        if not lines:
            text.append(f"`{name}` has no rows yet.")
            continue
        text += [
            f"`{name}`: {lines[0]['predictions']} predictions. Pairs are of one subject and "
            "structure, ordered by Dice; of those, how many the other metric orders otherwise.",
            markdown(
                ["metric", "pairs", "ordered otherwise", "violations", "greatest difference",
                 "bound"],
                [
                    [
                        line["name"],
                        str(line["pairs"]),
                        f"{line['discordant'] / max(line['pairs'], 1):.2%}",
                        str(line.get("violations", "")),
                        f"{line['gap']:.4f}" if "gap" in line else "",
                        f"{line['closed']:.4f}" if "closed" in line else "none",
                    ]
                    for line in lines
                ],
            ),
        ]  # fmt: skip
    return {"README.md": "\n\n".join(text) + "\n", "tversky.svg": _chart(finished.rows)}


EXPERIMENT = Experiment(
    name="bounds",
    title="Bounds between the metrics",
    key=KEY,
    columns=COLUMNS,
    runs=runs,
    rows=rows,
    pages=pages,
)
