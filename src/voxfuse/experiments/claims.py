"""One table of all claims: what was measured, the verdict, and what to take from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxfuse._files import write_text
from voxfuse.experiments import bounds, fusion_page
from voxfuse.experiments.results import read_rows
from voxfuse.experiments.scores import ARGMAX
from voxfuse.experiments.statistics import (
    MARGIN,
    FewPatients,
    Interval,
    bootstrap_means,
    crossed_bootstrap,
    few_patients,
    holm,
    over_seeds,
    rising,
)
from voxfuse.experiments.tables import Scores, lost, markdown, patient_of
from voxfuse.experiments.verdicts import FEW, NOT, ONLY, SHOWN, WAITING, of_few

Floats = NDArray[np.float64]
Rows = Sequence[Mapping[str, str]]

#: Chance of any false claim among those of `losses`, at tuned thresholds and again at 0.5.
LEVEL = 0.05
#: Seeds and test subjects (patients) that a verdict needs: those of the protocol.
SEEDS = {"losses": 5, "lesions": 3}
SUBJECTS = {"losses": 90, "lesions": 6}

#: By growing weight of missed voxels.
BY_BETA = ("dice", "tversky-0.6", "tversky-0.7", "tversky-0.8", "tversky-0.9")


@dataclass(frozen=True)
class Statement:
    """A claim, and what a practitioner should take from each verdict on it."""

    name: str
    text: str
    source: str
    experiment: str
    advice: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    statement: Statement
    measured: str
    verdict: str
    tuned: FewPatients | None = None  #: the primary endpoint, of few patients
    small: bool = False  #: whether what was found is a difference that nobody would act on
    aside: str = ""  #: what it costs

    @property
    def advice(self) -> str:
        """What a practitioner should take from it."""
        few = "Nothing: six patients cannot tell"
        if self.tuned and self.tuned.patients in (self.tuned.positive, self.tuned.negative):
            few += f", though all are {'above' if self.tuned.positive else 'below'} 0"
        otherwise = {FEW: f"{few}.", WAITING: "Nothing yet."}
        advice = self.statement.advice.get(self.verdict) or otherwise[self.verdict]
        worse = self.verdict == ONLY and self.tuned is not None and self.tuned.sign < 0
        less = f" But a gain of less than {MARGIN} is hardly worth a change."
        return (
            advice + " At tuned thresholds it is a loss." * worse + less * self.small + self.aside
        )


@dataclass(frozen=True)
class Evidence:
    """A primary endpoint at one way of choosing thresholds."""

    text: str
    p: float
    holds: bool = True  #: the effect has the claim's direction
    small: bool = False  #: the interval lies inside +- :data:`MARGIN`


def _statement(name: str, text: str, source: str, experiment: str, *advice: str) -> Statement:
    return Statement(
        name, text, source, experiment, dict(zip((SHOWN, ONLY, NOT), advice, strict=False))
    )


EELBODE, SALEHI, HASHEMI = "Eelbode et al. 2020", "Salehi et al. 2017", "Hashemi et al. 2018"

LOSSES = (
    _statement(
        "L1", "Dice loss beats cross-entropy on Dice", f"{EELBODE}, {SALEHI}", "losses",
        "Train with Dice where Dice is what counts.",
        "Take Dice for the threshold 0.5; at tuned ones no gain was shown.",
        "Dice loss was not shown to be better.",
    ),
    _statement(
        "L2", "... with several classes too", EELBODE, "losses",
        "Train several classes with Dice where Dice is what counts.",
        "Take Dice for several classes at the threshold 0.5; at tuned ones no gain was shown.",
        "For several classes, Dice loss was not shown to be better.",
    ),
    _statement(
        "L3", "Recall rises with beta", f"{SALEHI}, {HASHEMI}", "losses",
        "Expect more recall of more beta, at the threshold best for Dice too. Whether a lower "
        "threshold does the same was not asked.",
        "Beta moves recall at the threshold 0.5; at one tuned for Dice no trend was shown.",
        "Recall was not shown to rise with beta.",
    ),
    _statement(
        "L4", "The best F2 is off one half", f"{SALEHI}, {HASHEMI}", "losses",
        "Where a missed voxel costs more, tune the threshold for the F2 score, and choose beta by "
        "it.",
        "Choose beta by validation F2 for the threshold 0.5; at tuned ones no gain was shown.",
        "Leave beta at one half, and tune the threshold for F2.",
    ),
    _statement(
        "L5", "Dice and Jaccard losses are alike", EELBODE, "losses",
        "Choose either.", "Choose either, at 0.5.", "They were not shown to be alike.",
    ),
)  # fmt: skip

LESIONS = (
    _statement(
        "M1", "Dice loss beats cross-entropy on Dice", SALEHI, "lesions",
        "Train with Dice on MS lesions.",
        "Take Dice for the threshold 0.5; at tuned ones a gain was not shown.",
        "Dice loss was worse on MS lesions.",
    ),
    _statement(
        "M2", "Recall rises with beta", f"{SALEHI}, {HASHEMI}", "lesions",
        "Expect more recall of more beta, at the threshold best for Dice too. Whether a lower "
        "threshold does the same was not asked.",
        "Beta moves recall at the threshold 0.5; at one tuned for Dice that was not shown.",
        "More beta gave less recall.",
    ),
    _statement(
        "M3", "The best F2 is off one half", HASHEMI, "lesions",
        "Where a missed lesion costs more, take beta 0.7.",
        "Take beta 0.7 for F2 at the threshold 0.5; at tuned ones a gain was not shown.",
        "Leave beta at one half: 0.7 was worse.",
    ),
)  # fmt: skip

_WINDOWS = {
    "F1": (
        "Weigh patches by a window that falls off to their faces.",
        "Weigh patches so for the threshold 0.5; at tuned ones a gain was not shown.",
        "Uniform voting was better than the window.",
    ),
    "F2": (
        "Let patches overlap by half.",
        "Let patches overlap by half for the threshold 0.5; at tuned ones a gain was not shown.",
        "Overlap was a loss in Dice.",
    ),
    "F3": (
        "Prefer a spline to the Gaussian of its width.",
        "Prefer the spline for the threshold 0.5; at tuned ones a gain was not shown.",
        "Prefer a Gaussian to the spline of its width.",
    ),
    "F4": (
        "Expect a patch's outer voxels to be worse; whether a window helps is the claim F1.",
        "Expect worse outer voxels at the threshold 0.5; at tuned ones that was not shown.",
        "A patch's outer voxels were better than its inner ones.",
    ),
    "F5": (
        "Predict with an overlap of 0.75 if eight times the work is worth it.",
        "A gain at the threshold 0.5, for eight times the work; at tuned ones none was shown.",
        "An overlap of a half was better.",
    ),
    "F6": (
        "Expect steps at patches' faces from uniform voting, none from a spline.",
        "",
        "Uniform voting leaves no seams.",
    ),
}
FUSION = {
    claim.name: _statement(claim.name, claim.text, claim.source, "fusion", *_WINDOWS[claim.name])
    for claim in fusion_page.CLAIMS
}

BOUNDS = (
    _statement(
        "B1", "Dice and Jaccard rank alike and lie at most 3 - 2 sqrt(2) apart", EELBODE, "bounds",
        "Judge by either: the order of two predictions is the same.", "", "The bound is wrong.",
    ),
    _statement(
        "B2", "The Tversky index of alpha + beta = 1 approximates Dice, worse away from one half",
        EELBODE, "bounds",
        "The further beta is from one half, the less does training it train Dice.", "",
        "The bound is wrong.",
    ),
    _statement(
        "B3", "No bound holds between Dice and a weighted Hamming distance", EELBODE, "bounds",
        "No class weight makes a count of wrong voxels, which weighted cross-entropy stands for, "
        "stand for Dice.", "",
        "It was not shown to grow.",
    ),
)  # fmt: skip


# --- Losses ---------------------------------------------------------------------------------------


def _scores(rows: Rows, task: str, split: str = "test") -> Scores:
    whole = [row for row in rows if not row["structure"].startswith("lesions ")]
    patients = {row["subject"]: patient_of(row) for row in whole}
    return Scores(whole, task, patients if task == "lesion" else None, split)


def _missing(scores: Scores, losses: Sequence[str], experiment: str) -> str:
    """What a verdict on these losses lacks; nothing where it may be given."""
    need = SEEDS[experiment]
    subjects = {subject for of in scores.found.values() for _, subject in of}
    there = [loss for loss in losses if loss in scores.losses]
    whole = len(there) == len(losses) and len(subjects) == SUBJECTS[experiment]
    seeds = len(scores.seeds(*losses)) if whole else 0
    return "" if seeds >= need else f"{seeds} of {need} seeds so far"


def _difference(scores: Scores, loss: str, other: str, way: str, score: str) -> Evidence:
    values = scores.difference(loss, other, way, score)
    interval = crossed_bootstrap(values)
    seeds = values.mean(1)
    text = f"{score} {interval}, {int((seeds > 0).sum())} of {seeds.size} seeds above 0"
    return Evidence(text, interval.p, interval.mean > 0, _small(interval))


def _small(interval: Interval) -> bool:
    """Whether it lies where nobody would act."""
    return bool(interval.low > -MARGIN and interval.high < MARGIN)


def _trend(scores: Scores, way: str) -> Evidence:
    seeds = scores.seeds(*BY_BETA)
    table = np.stack([scores.values(loss, way, "recall", seeds) for loss in BY_BETA])
    trend = rising(over_seeds(table))
    ends = [f"{table[k].mean():.3f}" for k in (0, -1)]
    text = f"recall {' to '.join(ends)}, rising at every step in {trend.rising} of {trend.blocks}"
    return Evidence(f"{text} seeds, p {trend.p:.2g}", trend.p)


def _best(validation: Scores, way: str) -> str:
    """The loss of the beta of best validation F2."""
    means = {loss: float(validation.values(loss, way, "f2").mean()) for loss in BY_BETA}
    return max(BY_BETA, key=lambda loss: means[loss])


def _as_good(scores: Scores, best: str) -> str:
    """Losses without a beta over which the best F2 is no gain, which is exploratory."""
    others = [
        other
        for other in ("cross-entropy", "dice-ce")
        if scores.seeds(best, other)
        and crossed_bootstrap(scores.difference(best, other, "tuned-f2", "f2")).sign <= 0
    ]
    if best == "dice" or not others:
        return ""
    return f" Over {' and '.join(others)}, tuned for F2 too, no gain was shown (exploratory)."


def _best_beta(scores: Scores, validation: Scores, way: str) -> Evidence:
    best = _best(validation, way)
    if best == "dice":
        return Evidence("best at one half", 1.0, False)
    found = _difference(scores, best, "dice", way, "f2")
    return replace(found, text=f"{best}: {found.text}")


def _beside(
    scores: Scores, loss: str, other: str, at: Callable[[str], Evidence], more: str = ""
) -> Endpoint:
    """An endpoint with the same difference where no threshold decides, which is exploratory."""
    precision = crossed_bootstrap(scores.difference(loss, other, "0.5", "ap"))
    text = f"{more}; AP {precision}"
    if (other, ARGMAX) in scores.found:
        by_class = crossed_bootstrap(scores.difference(loss, other, ARGMAX, "dice"))
        text = f"{more}; by argmax: dice {by_class}; AP {precision}"
    lower = f" The average precision of {loss} is lower than that of {other}."
    aside = lower if precision.sign < 0 else ""
    return Endpoint(at, text, aside)


def _lost(rows: Rows, losses: Sequence[str]) -> str:
    """Networks whose 0.5 is of no use, which a mean over seeds does not say."""
    return "".join(
        f"; at 0.5 {loss} finds nothing of the {structure} in {len(seeds)} seed"
        f"{'s' * (len(seeds) > 1)}"
        for (loss, structure), seeds in lost(rows, "two-class").items()
        if loss in losses
    )


def _alike(scores: Scores, way: str) -> Evidence:
    values = scores.difference("jaccard", "dice", way, "dice")
    means = bootstrap_means(values)
    beyond = max(int((means <= -MARGIN).sum()), int((means >= MARGIN).sum()))
    interval = crossed_bootstrap(values, level=0.9)
    return Evidence(f"Dice {interval}, 90 %", (beyond + 1) / (means.size + 1))


@dataclass(frozen=True)
class Endpoint:
    """A claim's primary endpoint, by the way of choosing thresholds, and what is told besides."""

    at: Callable[[str], Evidence]
    besides: str = ""
    aside: str = ""  #: to what is advised where it holds


def _endpoints(rows: Rows) -> dict[str, Endpoint | str]:
    """Of every claim of `losses`, or what is not there yet."""
    binary, classes = (_scores(rows, task) for task in ("binary", "two-class"))
    validation = _scores(rows, "binary", "validation")
    compared = ("dice", "cross-entropy")

    def of(scores: Scores, losses: Sequence[str], found: Callable[[], Endpoint]) -> Endpoint | str:
        return _missing(scores, losses, "losses") or found()

    def pair(scores: Scores, more: str = "") -> Endpoint:
        return _beside(
            scores, *compared, lambda way: _difference(scores, *compared, way, "dice"), more
        )

    def f2(way: str) -> Evidence:
        return _best_beta(binary, validation, "tuned-f2" if way != "0.5" else way)

    return {
        "L1": of(binary, compared, lambda: pair(binary)),
        "L2": of(classes, compared, lambda: pair(classes, _lost(rows, compared))),
        "L3": of(binary, BY_BETA, lambda: Endpoint(lambda way: _trend(binary, way))),
        "L4": of(
            binary,
            BY_BETA,
            lambda: Endpoint(f2, aside=_as_good(binary, _best(validation, "tuned-f2"))),
        ),
        "L5": of(
            classes,
            ("dice", "jaccard"),
            lambda: _beside(classes, "jaccard", "dice", lambda way: _alike(classes, way)),
        ),
    }


def judged(tuned: Mapping[str, Evidence], half: Mapping[str, Evidence]) -> dict[str, str]:
    """Verdicts after Holm over all primary endpoints, those that are not there yet with p = 1."""

    def holding(found: Mapping[str, Evidence]) -> dict[str, bool]:
        p = {x.name: found[x.name].p if x.name in found else 1.0 for x in LOSSES}
        adjusted = holm(p)
        return {name: adjusted[name] < LEVEL and found[name].holds for name in found}

    at_tuned, at_half = holding(tuned), holding(half)
    return {name: SHOWN if at_tuned[name] else ONLY if at_half[name] else NOT for name in tuned}


def of_losses(rows: Rows) -> list[Line]:
    """The claims L1 to L5."""
    endpoints = _endpoints(rows)
    ready = {name: found for name, found in endpoints.items() if not isinstance(found, str)}
    tuned = {name: found.at("tuned-dice") for name, found in ready.items()}
    half = {name: found.at("0.5") for name, found in ready.items()}
    verdicts = judged(tuned, half)
    lines = []
    for statement in LOSSES:
        name = statement.name
        if name in verdicts:
            measured = f"tuned: {tuned[name].text}; at 0.5: {half[name].text}{ready[name].besides}"
            found = {SHOWN: tuned, ONLY: half}.get(verdicts[name], {})
            small = name in found and found[name].small
            aside = ready[name].aside * (verdicts[name] in (SHOWN, ONLY))
            lines.append(Line(statement, measured, verdicts[name], small=small, aside=aside))
        else:
            lines.append(Line(statement, str(endpoints[name]), WAITING))
    return lines


def of_lesions(rows: Rows) -> list[Line]:
    """The claims M1 to M3."""
    scores = _scores(rows, "lesion")
    asked = (
        ("dice", "cross-entropy", "tuned-dice", "dice"),
        ("tversky-0.9", "dice", "tuned-dice", "recall"),
        ("tversky-0.7", "dice", "tuned-f2", "f2"),
    )
    lines = []
    for statement, (loss, other, way, score) in zip(LESIONS, asked, strict=True):
        missing = _missing(scores, (loss, other), "lesions")
        if missing:
            lines.append(Line(statement, missing, WAITING))
            continue
        tuned, half = (
            few_patients(scores.difference(loss, other, choice, score)) for choice in (way, "0.5")
        )
        precision = few_patients(scores.difference(loss, other, "0.5", "ap"))
        measured = (
            f"{score}, tuned: {tuned}, {_by_fold(rows, scores, (loss, other, way, score))}; "
            f"at 0.5: {half}; AP: {precision}"
        )
        lines.append(_few(statement, measured, tuned, half))
    return lines


def _by_fold(rows: Rows, scores: Scores, compared: tuple[str, str, str, str]) -> str:
    """The difference in each fold, whose patients share their networks."""
    means = scores.difference(*compared).mean(0)
    tested = [row for row in rows if (row["task"], row["split"]) == ("lesion", "test")]
    folds = {patient_of(row): row["fold"] for row in tested}
    parts: dict[str, list[float]] = {}
    for patient, value in zip(sorted(folds), means, strict=True):
        parts.setdefault(folds[patient], []).append(float(value))
    return "folds " + " and ".join(f"{np.mean(parts[fold]):+.3f}" for fold in sorted(parts))


def _few(statement: Statement, measured: str, tuned: FewPatients, half: FewPatients) -> Line:
    verdict = of_few(tuned, half)
    found = {SHOWN: tuned, ONLY: half}.get(verdict)
    return Line(statement, measured, verdict, tuned, found is not None and _small(found))


def of_fusion(rows: Rows) -> list[Line]:
    """The claims F1 to F6."""
    found = fusion_page.Rows(rows)
    lines = []
    for claim in fusion_page.CLAIMS:
        if fusion_page.verdict_of(found, claim) == WAITING:
            measured = f"{len(found.seeds)} of {len(fusion_page.SEEDS)} seeds so far"
            lines.append(Line(FUSION[claim.name], measured, WAITING))
            continue
        tuned, half = fusion_page.intervals(found, claim)
        precision = fusion_page.precision_of(found, claim)
        measured = f"{claim.score}, tuned: {tuned}; at 0.5: {half}; AP: {precision}"
        if claim.score == "seam":
            measured = f"{claim.score}: {tuned}"
        lines.append(_few(FUSION[claim.name], measured, tuned, half))
    return lines


def of_bounds(rows: Rows) -> list[Line]:
    """The claims B1 to B3."""
    jaccard = [row for row in rows if row["measure"] == "jaccard"]
    tversky = [row for row in rows if row["measure"] == "tversky"]
    hamming = [row for row in rows if row["measure"] == "hamming"]
    if not (jaccard and tversky and hamming):
        return [Line(statement, "", WAITING) for statement in BOUNDS]

    def wrong(those: Rows) -> int:
        return sum(int(row["violations"]) for row in those)

    gaps = [float(row["gap"]) for row in sorted(tversky, key=lambda r: -float(r["parameter"]))]
    by_weight: dict[str, list[tuple[int, float]]] = {}
    for row in hamming:
        by_weight.setdefault(row["parameter"], []).append((int(row["voxels"]), float(row["gap"])))
    growing = [[gap for _, gap in sorted(those)] for those in by_weight.values()]
    rises = all(gap > before for those in growing for before, gap in itertools.pairwise(those))
    counts = int(jaccard[0]["counts"])
    measured = (
        f"all {counts:,} counts of up to {jaccard[0]['voxels']} voxels: {wrong(jaccard)} "
        f"violations, at most {float(jaccard[0]['gap']):.4f} apart, bound "
        f"{bounds.closed_gap('jaccard'):.4f}",
        f"the same counts, alpha 0.5 to 0.1: {wrong(tversky)} violations, at most "
        f"{', '.join(f'{gap:.3f}' for gap in gaps)} from Dice",
        f"up to {max(int(row['voxels']) for row in hamming):,} voxels: the difference rises to "
        f"{min(those[-1] for those in growing):.4f} or more, whatever the weight",
    )
    holds = (wrong(jaccard) == 0, wrong(tversky) == 0 and gaps == sorted(gaps), rises)
    return [
        Line(statement, text, SHOWN if held else NOT)
        for statement, text, held in zip(BOUNDS, measured, holds, strict=True)
    ]


#: In the order of the table.
SECTIONS: Mapping[str, Callable[[Rows], list[Line]]] = {
    "losses": of_losses,
    "lesions": of_lesions,
    "fusion": of_fusion,
    "bounds": of_bounds,
}


def lines(results: Path) -> list[Line]:
    """Every claim, from the rows that there are.

    Args:
        results: the folder above every experiment's results.
    """
    return [
        line
        for name, made in SECTIONS.items()
        for line in made(read_rows(results / name / "results.csv"))
    ]


def page(results: Path) -> str:
    """The table."""
    head = ("claim", "source", "what was measured", "verdict", "what to take from it")
    table = []
    for line in lines(results):
        what = line.statement
        linked = what.experiment
        if (results / what.experiment / "README.md").is_file():
            linked = f"[{linked}]({linked}/README.md)"
        measured = f"{linked}: {line.measured}" if line.measured else linked
        table.append(
            [f"{what.name} {what.text}", what.source, measured, f"**{line.verdict}**", line.advice]
        )
    text = [
        "# What the papers claim, measured",
        "Differences of means, with 95 % intervals, of primary endpoints that were written down "
        "beforehand: those of L and M in the [protocol](protocol.md), those of F on [their "
        "page](fusion/README.md). B are exact counts, without intervals. A claim has a verdict "
        "when all of its seeds are done. This page is made from the rows: "
        "`voxfuse experiment NAME --page`. What follows from it and from the experiments' pages: "
        "[which loss, beta and threshold](../choosing_a_loss.md#what-was-measured), [which window "
        "and overlap](../fusion.md#which-window-which-overlap).",
        markdown(head, table),
        f"Verdicts: *{SHOWN}*, at tuned thresholds; *{ONLY}*, and not at tuned ones; *{NOT}*; "
        f"*{FEW}*; *{WAITING}*. Of L the primary endpoints decide after Holm over all five, at 5 % "
        "(two-sided; of L3 Page's trend over the seeds, one-sided; of L5 a 90 % interval inside "
        f"+-{MARGIN}), once at tuned thresholds and once at 0.5; *{NOT}* says no more than that. "
        "Of M and F Student's interval over six patients decides: on one side of 0, without a "
        f"correction for several claims, *{NOT}* where that is the other side, *{FEW}* where it "
        "has both signs. Patients of a fold share their networks, so that it covers less than 95 % "
        "where these differ; so does the bootstrap over five seeds, of L. What is told beside "
        "tuned and 0.5 decides nothing.",
        '"Tuned" thresholds are chosen without the subject that is judged: for the F2 score in L4 '
        "and M3, for Dice elsewhere. f2 is the F-beta score with its own beta of 2, by which a "
        "missed voxel costs four times a false one; AP is the average precision, which has no "
        "threshold; off one half means that the Tversky loss does best at another beta than Dice "
        "loss's 0.5. seed sd is the standard deviation between seeds, folds are the two halves of "
        "the patients.",
    ]  # fmt: skip
    return "\n\n".join(text) + "\n"


def write_page(results: Path) -> None:
    """Make ``README.md`` of the folder of results anew."""
    write_text(results / "README.md", page(results))
