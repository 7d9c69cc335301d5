"""Rows of results.csv as arrays (seeds, subjects), and as tables of a page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from voxfuse.experiments.experiment import Finished
from voxfuse.experiments.scores import ARGMAX, CHOICES, SCORES, TUNED
from voxfuse.experiments.statistics import Interval, crossed_bootstrap
from voxfuse.experiments.trained import BETAS, LOSSES
from voxfuse.metrics.report.charts import HEIGHT, LEFT, PALETTE, WIDTH, Series, xy_chart
from voxfuse.training.evaluation import thresholds

Floats = NDArray[np.float64]

#: Of a chart that stands alone, which on a dark page needs its own ground.
STYLE = (
    "svg{background:#fff} text{font:12px sans-serif} .grid{stroke:#ddd} .axis{stroke:#444} "
    ".line{fill:none;stroke-width:2}"
)


#: What every loss is compared with: the papers' two, and what most networks are trained with.
AGAINST = ("dice", "cross-entropy", "dice-ce")

#: Of the thresholds among which one is chosen: the best may lie beyond.
ENDS = (min(thresholds()), max(thresholds()))

#: What the tables' words mean.
GLOSSARY = (
    '"tuned-dice" and "tuned-f2" are the thresholds at which the mean Dice, or F2, of the tuning '
    "subjects is greatest; AP is the average precision, which has no threshold. dice-ce is Dice "
    "loss + cross-entropy, tversky-B the Tversky loss with beta = B and alpha = 1 - B. Primary "
    "endpoints are named in the protocol; all other differences are exploratory, and no interval "
    "is corrected for their number."
)


def patient_of(row: Mapping[str, str]) -> str:
    """Whose scan a row's is, of subjects with a number a scan."""
    return row["subject"].rsplit("-", 1)[0]


class Scores:
    """Scores of finished runs, each the mean over the structures of a subject.

    Args:
        rows: of results.csv.
        task: of these alone.
        groups: of every subject, whom the scores are averaged over (scans of one patient); None is
            every subject on its own.
        split: "test", or "validation" for the mean of those subjects.
        structures: of these alone; None is all.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, str]],
        task: str,
        groups: Mapping[str, str] | None = None,
        split: str = "test",
        structures: Sequence[str] | None = None,
    ) -> None:
        names = (*SCORES, "ap")
        found: dict[tuple[str, str], dict[tuple[int, str], list[list[float]]]] = {}
        for row in rows:
            if row["task"] != task or row["split"] != split:
                continue
            if structures is not None and row["structure"] not in structures:
                continue
            subject = row["subject"] if groups is None else groups[row["subject"]]
            of = found.setdefault((row["loss"], row["threshold"]), {})
            values = [float(row[name] or "nan") for name in names]
            of.setdefault((int(row["seed"]), subject), []).append(values)
        self.names = names
        #: By loss and threshold, then by seed and subject, the scores.
        self.found = {
            way: {cell: np.mean(values, 0) for cell, values in of.items()}
            for way, of in found.items()
        }
        there = {loss for loss, _ in self.found}
        self.losses = [loss for loss in LOSSES if loss in there]  # as declared, not as done

    def seeds(self, *losses: str) -> list[int]:
        """Seeds that all of these losses have, with every fold of theirs."""
        subjects = {subject for of in self.found.values() for _, subject in of}

        def whole(loss: str) -> set[int]:
            cells = self.found.get((loss, "0.5"), {})
            seeds = {seed for seed, _ in cells}
            return {seed for seed in seeds if all((seed, one) in cells for one in subjects)}

        return sorted(set.intersection(*map(whole, losses)))

    def values(
        self, loss: str, threshold: str, score: str, seeds: Sequence[int] | None = None
    ) -> Floats:
        """(seeds, subjects), subjects in the order of their names."""
        of = self.found[loss, threshold]
        subjects = sorted({subject for _, subject in of})
        place = self.names.index(score)
        chosen = self.seeds(loss) if seeds is None else seeds
        return np.array([[of[seed, subject][place] for subject in subjects] for seed in chosen])

    def difference(self, loss: str, other: str, threshold: str, score: str) -> Floats:
        """``loss`` less ``other``, (seeds that both have, subjects)."""
        seeds = self.seeds(loss, other)
        one, two = (self.values(name, threshold, score, seeds) for name in (loss, other))
        return one - two


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table.

    Example:
        >>> from voxfuse.experiments.tables import markdown
        >>> print(markdown(["loss", "dice"], [["dice", "0.9"]]))
        | loss | dice |
        |---|---|
        | dice | 0.9 |
    """
    words = [[cell.replace("|", "\\|") for cell in line] for line in (head, *lines)]
    every = [words[0], ["---"] * len(head), *words[1:]]
    rows = ["|" + "|".join(line) + "|" if line is every[1] else f"| {' | '.join(line)} |"
            for line in every]  # fmt: skip
    return "\n".join(rows)


def means(scores: Scores, ways: Sequence[str] = CHOICES) -> str:
    """A line a loss: the mean over seeds and subjects at each way to a threshold.

    F2 is left out where the threshold was tuned for Dice.
    """
    columns = [(name, way) for way in ways for name in SCORES if (name, way[-4:]) != ("f2", "dice")]
    lines = []
    for loss in scores.losses:
        seeds = scores.seeds(loss)
        if seeds:
            every = [scores.values(loss, way, name) for name, way in [*columns, ("ap", "0.5")]]
            lines.append([loss, str(len(seeds)), *map(_mean, every)])
    head = [f"{name}, {way}" for name, way in columns]
    return markdown(["loss", "seeds", *head, "AP"], lines)


def _mean(values: Floats) -> str:
    """... and of how many, where some are undefined (the precision of nothing)."""
    there = int(np.isfinite(values).sum())
    if there == values.size:
        return f"{values.mean():.3f}"
    return f"{np.nanmean(values):.3f} ({there} of {values.size})" if there else "-"


def lost(rows: Iterable[Mapping[str, str]], task: str) -> dict[tuple[str, str], list[int]]:
    """Seeds whose network finds nothing of a structure at 0.5, in any test subject.

    By loss and structure.
    """
    found: dict[tuple[str, str, int], bool] = {}
    for row in rows:
        if (row["task"], row["split"], row["threshold"]) == (task, "test", "0.5"):
            cell = row["loss"], row["structure"], int(row["seed"])
            found[cell] = found.get(cell, False) or float(row["recall"] or 0) > 0
    seeds: dict[tuple[str, str], list[int]] = {}
    for (loss, structure, seed), any_found in sorted(found.items()):
        if not any_found:
            seeds.setdefault((loss, structure), []).append(seed)
    return seeds


def differences(
    scores: Scores,
    against: str,
    interval: Callable[[Floats], Interval] = crossed_bootstrap,
) -> str:
    """A line a loss: its difference to another at 0.5 and tuned, with the interval.

    Empty where no other loss is done.
    """
    wanted = [("0.5", "dice"), ("tuned-dice", "dice"), ("tuned-dice", "recall"), ("0.5", "f2"),
              ("tuned-f2", "f2"), ("0.5", "ap")]  # fmt: skip
    if (against, ARGMAX) in scores.found:
        wanted.insert(1, (ARGMAX, "dice"))
    lines = []
    for loss in scores.losses:
        if loss == against or not scores.seeds(loss, against):
            continue
        cells = [str(interval(scores.difference(loss, against, way, name))) for way, name in wanted]
        lines.append([loss, str(len(scores.seeds(loss, against))), *cells])
    head = [f"{name}, {way}" if name != "ap" else "AP" for way, name in wanted]
    return markdown([f"loss less {against}", "seeds", *head], lines) if lines else ""


def tuning(
    scores: Scores,
    ways: Mapping[str, str] = TUNED,
    interval: Callable[[Floats], Interval] = crossed_bootstrap,
) -> str:
    """A line a loss: the score at the thresholds that were tuned for it, less that at 0.5."""
    lines = []
    for loss in filter(scores.seeds, scores.losses):
        gains = [
            scores.values(loss, way, name) - scores.values(loss, "0.5", name)
            for way, name in ways.items()
        ]
        lines.append([loss, str(len(scores.seeds(loss))), *(str(interval(gain)) for gain in gains)])
    head = [f"{name}, {way} less 0.5" for way, name in ways.items()]
    return markdown(["loss", "seeds", *head], lines)


def levels(
    scores: Scores,
    rows: Iterable[Mapping[str, str]],
    task: str,
    structures: Sequence[str],
    ways: Sequence[str] = tuple(TUNED),
    of: Callable[[Mapping[str, str]], str] = lambda row: "",
) -> str:
    """A line a loss: the median of the thresholds that were chosen, and their range.

    Args:
        scores: of these rows, which say what seeds are whole.
        rows, task, structures: as :class:`Scores` takes them.
        ways: of choosing.
        of: of a row, for whom its threshold was chosen, where a run has several.
    """
    found: dict[tuple[str, str], dict[tuple[str, ...], float]] = {}
    whole = {loss: {str(seed) for seed in scores.seeds(loss)} for loss in scores.losses}
    for row in rows:
        if (row["task"], row["split"]) != (task, "test") or row["structure"] not in structures:
            continue
        if row["seed"] in whole[row["loss"]]:
            cell = row["seed"], row["fold"], row["structure"], of(row)
            found.setdefault((row["loss"], row["threshold"]), {})[cell] = float(row["level"] or 0.5)

    def said(chosen: Iterable[float]) -> str:
        every = np.array(list(chosen))
        low, middle, high = np.quantile(every, [0, 0.5, 1])
        at_end = int(((every <= ENDS[0]) | (every >= ENDS[1])).sum())
        ends = f", {at_end} of {every.size} an end of the range" * (at_end > 0)
        return f"{middle:.4g} ({low:.4g} to {high:.4g}){ends}"

    lines = [
        [loss, *(said(found[loss, way].values()) for way in ways)]
        for loss in LOSSES
        if all((loss, way) in found for way in ways)
    ]
    return markdown(["loss", *ways], lines) if lines else ""


def done(finished: Finished, command: str) -> str:
    """What a page is made from, what it took, and of which losses there is none."""
    there = {run.get("loss") for run in finished.runs}
    losses = dict.fromkeys(run["loss"] for run in finished.declared if "loss" in run)
    named = ", ".join(loss for loss in losses if loss not in there)
    without = f" Not done: {named}." if named and there else ""
    return (
        f"{len(finished.runs)} of {len(finished.declared)} runs are done, in {finished.hours:.1f} "
        f"hours of one core: `{command}`. A run that was interrupted counts from where it went on."
        f"{without}"
    )


def beta_chart(scores: Scores) -> str:
    """Recall and precision over beta, at 0.5 and at the threshold tuned for Dice, as SVG.

    Of the seeds that all of them have. Empty where no loss that has a beta is done.
    """
    betas = {0.5: "dice", **{beta: f"tversky-{beta}" for beta in BETAS}}
    there = {beta: loss for beta, loss in betas.items() if scores.seeds(loss)}
    seeds = scores.seeds(*there.values()) if there else []
    if not seeds:
        return ""
    series = [
        Series(
            f"{name}, {way}",
            list(there),
            [float(np.nanmean(scores.values(loss, way, name, seeds))) for loss in there.values()],
            list(there.values()),
            dots=True,
        )
        for name in ("recall", "precision")
        for way in CHOICES[:2]
    ]
    values = [y for one in series for y in one.y]
    low = float(np.floor(min(values) * 20)) / 20
    reach = (low, max(float(np.ceil(max(values) * 20)) / 20, low + 0.05))
    chart = xy_chart(series, "beta", "mean", x_range=(0.45, 0.95), y_range=reach)
    return standalone(chart, [one.name for one in series])


def standalone(chart: str, names: Sequence[str]) -> str:
    """A chart of the evaluation's page as a file of its own, its legend in it."""
    drawing = chart[: chart.index("</svg>")]
    start = drawing.index(">") + 1
    legend = "".join(
        f'<text class="tick" x="{LEFT + 8}" y="{HEIGHT + 14 * k}" fill="{colour}">'
        f"{escape(name)}</text>"
        for k, (name, colour) in enumerate(zip(names, itertools.cycle(PALETTE), strict=False))
    )
    room = HEIGHT + 14 * len(names)
    head = drawing[:start].replace(
        f'viewBox="0 0 {WIDTH} {HEIGHT}"',
        f'xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" viewBox="0 0 {WIDTH} {room}"',
    )
    return f"{head}<style>{STYLE}</style>{drawing[start:]}{legend}</svg>\n"
