"""What `fusion` asks, and its page: from rows to tables and charts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from voxfuse.experiments.experiment import Finished
from voxfuse.experiments.statistics import FewPatients, Interval, few_patients
from voxfuse.experiments.tables import done, markdown, standalone
from voxfuse.experiments.verdicts import WAITING, of_few
from voxfuse.metrics.report.charts import Series, xy_chart

Floats = NDArray[np.float64]
Row = Mapping[str, str]

TITLE = "Windows and overlaps on patients with MS lesions"

#: The subjects that a fold tests; it is trained on the other fold's.
TEST = (
    ("lesjak19", "lesjak07", "mslessegP18-1"),
    ("lesjak26", "mslessegP14-1", "mslessegP39-1"),
)
PATIENTS = tuple(name for names in TEST for name in names)
SEEDS = (0, 1, 2)

KEY = ("fold", "seed")
COLUMNS = (
    *KEY,
    *("subject", "overlap", "voting", "window", "width", "depth", "threshold", "level"),
    *("tp", "fp", "fn", "recall", "precision", "dice", "f2", "ap", "error", "face", "mid"),
)

#: The library's default window, and the papers'.
SPLINE, HASHEMI = "bspline5", "hashemi"


@dataclass(frozen=True)
class Claim:
    """A claim and its primary endpoint: ``better`` less ``worse`` is above 0."""

    name: str
    text: str
    source: str
    endpoint: str
    tuning: str  #: what tuning the threshold should do to it
    score: str
    better: Mapping[str, str]
    worse: Mapping[str, str]


def _at(window: str, overlap: str, **further: str) -> dict[str, str]:
    return {"window": window, "overlap": overlap, "voting": "soft", "depth": "", **further}


CLAIMS = (
    Claim(
        "F1",
        "Fusion by a spline window beats uniform voting",
        "Hashemi et al. 2018",
        "Dice: B-spline of order 5 less uniform, overlap 0.5, probabilities averaged",
        "little: both windows average the same probabilities",
        "dice",
        _at(SPLINE, "0.5"),
        _at("uniform", "0.5"),
    ),
    Claim(
        "F2",
        "Overlapping patches beat patches side by side",
        "Hashemi et al. 2018",
        "Dice: B-spline of order 5 at overlap 0.5 less no overlap",
        "shrink it: means of several predictions are less extreme, which moves the best threshold",
        "dice",
        _at(SPLINE, "0.5"),
        _at("none", "0"),
    ),
    Claim(
        "F3",
        "A spline does better than a Gaussian of the same effective width",
        "Hashemi et al. 2018 chose the spline",
        "Dice: B-spline of order 5 less the Gaussian of its width, overlap 0.5",
        "nothing",
        "dice",
        _at(SPLINE, "0.5"),
        _at("gaussian", "0.5", width=SPLINE),
    ),
    Claim(
        "F4",
        "Predictions near a patch's face are worse than further inside",
        "Hashemi et al. 2018",
        "Dice of single patches' voxels: 8 voxels from the patch's own nearest face less 0 voxels",
        "shrink it, if probabilities near a face are only too low or too high",
        "dice",
        _at("none", "0.75", depth="8"),
        _at("none", "0.75", depth="0"),
    ),
    Claim(
        "F5",
        "An overlap of 0.75 beats one of 0.5",
        "common practice",
        "Dice: B-spline of order 5 at overlap 0.75 less 0.5",
        "nothing",
        "dice",
        _at(SPLINE, "0.75"),
        _at(SPLINE, "0.5"),
    ),
    Claim(
        "F6",
        "Uniform voting leaves seams that a spline window does not",
        "Hashemi et al. 2018",
        "jump of p across planes of patches' faces over that midway between: uniform less B-spline "
        "of order 5, overlap 0.5",
        "nothing: it has no threshold",
        "seam",
        _at("uniform", "0.5"),
        _at(SPLINE, "0.5"),
    ),
)

PROTOCOL = f"""\
Written before the first full run; what is not named here is exploratory.

- *Data*: six scans of six patients with MS lesions, FLAIR and T1 at 1 mm, in two folds by patient:
  one trains, the other is tested. Everything is counted inside the brain.
- *Networks*: those of `examples/ms_lesions.toml` (U-Net of 8 to 64 features, 32^3 patches, Dice
  with cross-entropy, 800 steps), seeds 0, 1 and 2 in both folds. No test-time flips.
- *Patches*: every scan's patches are predicted once at an overlap of 0.75 and kept as float16;
  those of the overlaps 0.5, 0.25 and 0 are among them. "None" puts patches side by side.
- *Effective width* of a window: the standard deviation of its weights along an axis about the
  patch's centre, as sampled, over the patch's extent. Windows of different shapes are compared at
  equal width: a Gaussian is given the sigma at which its sampled, cut weights have it; Hashemi's
  window is stretched over less than the patch.
- *Thresholds*: 0.5; and of 45 from 1e-4 to 1 - 1e-4 the one of greatest mean Dice, or F2, over the
  fold's other two test patients, for each network and each setting.
- *Unit*: the patient, as a mean over three seeds. Student's 95 % interval over six patients, the
  standard deviation between seeds, and the signs; no p-values.
- *Seams*: `|p(x) - p(x - 1)|` over the planes at which any patch begins or ends, over the same
  midway between two such planes. 1 is no seam.

| claim | source | primary endpoint, at tuned thresholds | what tuning should do |
|---|---|---|---|
{chr(10).join(f"| {c.name} {c.text} | {c.source} | {c.endpoint} | {c.tuning} |" for c in CLAIMS)}

*Shown*: the interval at tuned thresholds lies above 0. *Only at 0.5*: that one does not, the one at
0.5 does. *Not shown*: it lies below 0. *Too few patients to say*: it has both signs.
"""


class Rows:
    """Rows as arrays (seeds, patients), of the seeds that both folds have."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = [_with_seam(row) for row in rows]
        folds: dict[int, set[str]] = {}
        for row in self.rows:
            folds.setdefault(int(row["seed"]), set()).add(row["fold"])
        self.seeds = sorted(seed for seed, of in folds.items() if len(of) == len(TEST))
        self._widths = {row["window"]: row["width"] for row in self.rows if row["window"] == SPLINE}
        self._found: dict[tuple[str, ...], dict[tuple[int, str], Row]] = {}
        for row in self.rows:
            cell = int(row["seed"]), row["subject"]
            self._found.setdefault(self._named(row), {})[cell] = row

    @staticmethod
    def _named(row: Row) -> tuple[str, ...]:
        names = ("overlap", "voting", "window", "width", "depth", "threshold")
        return tuple(row[name] for name in names)

    def widths(self, window: str, overlap: str, voting: str = "soft") -> list[str]:
        """The widths that a window was measured at, ascending."""
        of = {
            row["width"]
            for row in self.rows
            if (row["window"], row["overlap"], row["voting"]) == (window, overlap, voting)
        }
        return sorted(of, key=float)

    def own_width(self, window: str) -> str:
        """The width of a window that has one; of Hashemi's the widest."""
        return max((row["width"] for row in self.rows if row["window"] == window), key=float)

    def values(self, where: Mapping[str, str], threshold: str, score: str) -> Floats:
        """(seeds, patients) of a setting; a width may be that of a window by its name."""
        asked = {"threshold": threshold, **where}
        if "width" not in asked:
            asked["width"] = "" if asked["window"] == "none" else self.own_width(asked["window"])
        elif asked["width"].isidentifier():
            asked["width"] = self.own_width(asked["width"])
        of = self._found[self._named(asked)]
        return np.array(
            [[float(of[seed, name][score]) for name in PATIENTS] for seed in self.seeds]
        )

    def difference(self, claim: Claim, threshold: str, score: str = "") -> Floats:
        """Of a claim's two settings, in its own score or another."""
        score = score or claim.score
        better = self.values(claim.better, threshold, score)
        return better - self.values(claim.worse, threshold, score)


def _with_seam(row: Row) -> Row:
    face, mid = row["face"], row["mid"]
    seam = float(face) / float(mid) if face and mid and float(mid) > 0 else float("nan")
    return {**row, "seam": repr(seam)}


def intervals(rows: Rows, claim: Claim) -> tuple[FewPatients, FewPatients]:
    """A claim's at tuned thresholds and at 0.5."""
    tuned, half = (few_patients(rows.difference(claim, way)) for way in ("tuned-dice", "0.5"))
    return tuned, half


def verdict_of(rows: Rows, claim: Claim) -> str:
    """As the protocol says, when all of its seeds are done."""
    if len(rows.seeds) < len(SEEDS):
        return WAITING
    return of_few(*intervals(rows, claim))


def receptive_field(levels: int, at: int = 0) -> tuple[int, int]:
    """First and last voxel of the input that an output voxel of ``UNet`` depends on, an axis.

    Two 3^3 convolutions a level, pooling and transposed convolutions of 2; without what the
    normalisation sees, which is the whole patch.
    """

    def encoded(level: int, low: int, high: int) -> tuple[int, int]:
        low, high = low - 2, high + 2
        return (low, high) if level == 0 else encoded(level - 1, 2 * low, 2 * high + 1)

    def decoded(level: int, low: int, high: int) -> tuple[int, int]:
        if level == levels - 1:
            return encoded(level, low, high)
        low, high = low - 2, high + 2
        skipped, coarse = encoded(level, low, high), decoded(level + 1, low // 2, high // 2)
        return min(skipped[0], coarse[0]), max(skipped[1], coarse[1])

    return decoded(0, at, at)


def widest_field(levels: int = 4) -> int:
    """Extent of the receptive field, at the voxel where it is widest."""
    reaches = [receptive_field(levels, at) for at in range(2 ** (levels - 1))]
    return max(high - low + 1 for low, high in reaches)


def _short(values: Floats) -> str:
    """An interval without what stands beside it."""
    return Interval.__str__(few_patients(values))


def precision_of(rows: Rows, claim: Claim) -> str:
    """The interval of the average precision, which voxels without any lesion do not have."""
    values = rows.difference(claim, "0.5", "ap")
    return str(few_patients(values)) if np.isfinite(values).all() else "not defined for all"


def _mean(rows: Rows, where: Mapping[str, str], threshold: str, score: str) -> str:
    return f"{np.nanmean(rows.values(where, threshold, score)):.3f}"


def _range(rows: Rows, window: str) -> str:
    """From which to which the thresholds go that are tuned for Dice."""
    chosen = rows.values(_at(window, "0.5"), "tuned-dice", "level")
    return f"{chosen.min():.4g} to {chosen.max():.4g}"


def _by_window(rows: Rows, overlaps: Sequence[str], threshold: str, score: str) -> str:
    """A line a window of its own width, a column an overlap."""
    windows = ["uniform", *sorted({r["window"] for r in rows.rows if "bspline" in r["window"]})]
    lines = [["none", "", _mean(rows, _at("none", "0"), threshold, score), *[""] * len(overlaps)]]
    for window in [*windows, HASHEMI]:
        width = rows.own_width(window)
        cells = [_mean(rows, _at(window, overlap), threshold, score) for overlap in overlaps]
        lines.append([window, f"{float(width):.3f}", "", *cells])
    head = ["window", "width", "side by side", *(f"overlap {o}" for o in overlaps)]
    return markdown(head, lines)


def _at_equal_width(rows: Rows, overlap: str, ways: Sequence[str]) -> str:
    """Every window that has a Gaussian of its width: the difference in Dice."""
    lines = []
    windows = sorted({r["window"] for r in rows.rows if "bspline" in r["window"]})
    for window in [*windows, HASHEMI]:
        width = rows.own_width(window)
        other = _at("gaussian", overlap, width=width)
        cells = [
            _short(rows.values(_at(window, overlap), way, "dice")
                   - rows.values(other, way, "dice"))
            for way in ways
        ]  # fmt: skip
        lines.append([window, f"{float(width):.3f}", *cells])
    return markdown(["window less Gaussian", "width", *(f"Dice, {way}" for way in ways)], lines)


def _over_width(rows: Rows, overlap: str) -> str:
    series = []
    for name in ("gaussian", HASHEMI, "splines", "uniform"):
        windows = (
            sorted({r["window"] for r in rows.rows if "bspline" in r["window"]})
            if name == "splines"
            else [name]
        )
        points = sorted(
            (float(width), float(np.mean(rows.values(
                _at(window, overlap, width=width), "tuned-dice", "dice"))))
            for window in windows
            for width in rows.widths(window, overlap)
        )  # fmt: skip
        x, y = zip(*points, strict=True)
        line = name in ("gaussian", HASHEMI)
        series.append(Series(name, x, y, [f"{a:.3f}" for a in x], line=line, dots=not line))
    return _chart(series, "effective width", f"Dice, tuned, overlap {overlap}")


def _chart(series: Sequence[Series], x: str, y: str) -> str:
    values = [value for one in series for value in one.y]
    room = 0.05 * (max(values) - min(values)) or 0.01
    reach = (min(values) - room, max(values) + room)
    return standalone(xy_chart(series, x, y, y_range=reach), [one.name for one in series])


def _over_depth(rows: Rows) -> str:
    depths = sorted({row["depth"] for row in rows.rows if row["depth"]}, key=int)
    series = [
        Series(
            way,
            [float(depth) for depth in depths],
            [
                float(np.mean(rows.values(_at("none", "0.75", depth=depth), way, "dice")))
                for depth in depths
            ],
            depths,
            dots=True,
        )
        for way in ("0.5", "tuned-dice")
    ]
    return _chart(series, "voxels from the patch's own nearest face", "Dice of single patches")


def _depth_table(rows: Rows) -> str:
    depths = sorted({row["depth"] for row in rows.rows if row["depth"]}, key=int)
    scores: list[tuple[str, Callable[[str], str]]] = [
        (
            f"{score}, {way}" if way else score,
            partial(lambda d, w, s: _mean(rows, _at("none", "0.75", depth=d), w, s),
                    w=way or "0.5", s=score),
        )
        for score, way in (("dice", "0.5"), ("dice", "tuned-dice"), ("recall", "0.5"),
                           ("precision", "0.5"), ("ap", ""))
    ]  # fmt: skip
    errors = [
        f"{1000 * np.mean(rows.values(_at('none', '0.75', depth=d), '0.5', 'error')):.2f}"
        for d in depths
    ]
    lines = [[d, *(of(d) for _, of in scores), e] for d, e in zip(depths, errors, strict=True)]
    return markdown(["depth", *(name for name, _ in scores), "1000 x mean |p - g|"], lines)


def _seams(rows: Rows, overlaps: Sequence[str]) -> str:
    lines = []
    for window in ("uniform", "bspline1", SPLINE, HASHEMI):
        cells = [_mean(rows, _at(window, overlap), "0.5", "seam") for overlap in overlaps]
        lines.append([window, "", *cells])
    lines.insert(0, ["none", _mean(rows, _at("none", "0"), "0.5", "seam"), *[""] * len(overlaps)])
    return markdown(["window", "side by side", *(f"overlap {o}" for o in overlaps)], lines)


def _votes(rows: Rows, overlaps: Sequence[str]) -> str:
    lines = []
    for window in ("uniform", SPLINE, HASHEMI):
        for overlap in overlaps:
            cells = []
            for way, score in (("0.5", "dice"), ("tuned-dice", "dice"), ("0.5", "ap")):
                logit = {**_at(window, overlap), "voting": "logit"}
                gap = rows.values(logit, way, score) - rows.values(_at(window, overlap), way, score)
                cells.append(_short(gap))
            lines.append([window, overlap, *cells])
    head = ["logits less probabilities", "overlap", "Dice, 0.5", "Dice, tuned", "AP"]
    return markdown(head, lines)


def pages(finished: Finished) -> dict[str, str]:
    """The protocol, and what was found as far as it was run."""
    text = [f"# {TITLE}", "## Protocol", PROTOCOL.rstrip()]
    rows = Rows(finished.rows)
    if not rows.seeds:
        found = done(finished, "voxfuse experiment fusion") if finished.runs else "Not yet run."
        text += ["## Results", f"{found} No seed has both folds yet."]
        return {"README.md": "\n\n".join(text) + "\n"}
    overlaps = sorted({r["overlap"] for r in rows.rows if r["window"] == SPLINE}, key=float)
    lines = []
    for claim in CLAIMS:
        tuned, half = intervals(rows, claim)
        verdict = verdict_of(rows, claim)
        at_half = "" if claim.score == "seam" else str(half)  # a seam has no threshold
        lines.append(
            [f"{claim.name} {claim.text}", str(tuned), at_half, precision_of(rows, claim), verdict]
        )
    text += [
        "## Results",
        done(finished, "voxfuse experiment fusion")
        + " The training of the networks, 800 steps each, came before and is not in it.",
        f"Seeds with both folds: {', '.join(map(str, rows.seeds))}. Scores are means over them and "
        "six patients; intervals are as the protocol says.",
        markdown(["claim", "at tuned thresholds", "at 0.5", "AP", "verdict"], lines),
        f"The network's receptive field is {widest_field()} voxels an axis, without what its "
        "normalisation sees, and its patch has 32: every prediction lacks some of its "
        "surroundings, those at a face half of them. A voxel at the centre has 16 to either side.",
        "### Windows and overlaps",
        'uniform is `window="constant"`, bspline5 the default, none is patches side by side, '
        "`overlap=0`; the others are options by these names. Chosen on two patients, thresholds "
        f"lie far apart: at overlap 0.5 {_range(rows, SPLINE)} of bspline5, "
        f"{_range(rows, 'uniform')} of uniform. Where Dice is lower than at 0.5, "
        "networks did worse with them.",
        "Dice at tuned thresholds:",
        _by_window(rows, overlaps, "tuned-dice", "dice"),
        "Dice at 0.5:",
        _by_window(rows, overlaps, "0.5", "dice"),
        "F2 at tuned thresholds:",
        _by_window(rows, overlaps, "tuned-f2", "f2"),
        "Average precision:",
        _by_window(rows, overlaps, "0.5", "ap"),
        "### Shapes at equal width",
        "At overlap 0.5:",
        _at_equal_width(rows, "0.5", ("tuned-dice", "0.5")),
        "At overlap 0.75:",
        _at_equal_width(rows, "0.75", ("tuned-dice", "0.5")),
        "![Dice over the effective width](width.svg)",
        "### Single patches by depth",
        "Voxels of all patches at an overlap of 0.75 before they are put together, by how many "
        "voxels lie between them and the nearest face of their own patch.",
        _depth_table(rows),
        "![Dice by depth](depth.svg)",
        "### Seams",
        "The jump of p across planes of patches' faces over that midway between them:",
        _seams(rows, overlaps),
        "### Logits or probabilities",
        _votes(rows, overlaps),
    ]
    charts = {"width.svg": _over_width(rows, "0.5"), "depth.svg": _over_depth(rows)}
    return {"README.md": "\n\n".join(text) + "\n", **charts}
