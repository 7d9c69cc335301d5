"""``voxfuse evaluate``: predictions against truths, as tables and a page."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DESCRIPTION = """\
Compare predictions with truths: voxels, lesions by the rules of ISBI 2015, MSSEG 2016 and WMH 2017,
surfaces in mm. Files are matched by name, unless both are given as files. Without --out the summary
is printed; with it, DIR holds subjects.csv, pooled.csv, lesions.csv, compare.csv (with --compare),
summary.md, results.json and report.html.
"""

#: Of options whose default is None, so that it is seen whether they are given.
_DEFAULTS = {"threshold": 0.5, "bins": 1000, "tolerance": 1.0, "minimum_volume": 0.0}
#: Options that have no effect without another.
_NEEDS = {
    "threshold": "probabilities",
    "bins": "probabilities",
    "channels": "probabilities",
    "images": "out",
    "image_pattern": "images",
}
_REGIONS = (
    "channels are regions: each is scored against the voxels of its own label, without those of "
    "regions on top of it"
)


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "evaluate", help="score predictions against truths, by the challenges' rules",
        description=DESCRIPTION,
    )  # fmt: skip
    parser.add_argument("predictions", type=Path, help="a file, or a folder of one a subject")
    parser.add_argument("truth", type=Path, help="a file, or a folder of one a subject")
    parser.add_argument(
        "--probabilities", action="store_true",
        help="predictions are probabilities, (x, y, z) or (x, y, z, C); files of voxfuse predict "
        "say which labels their channels are; in others they are those of --labels, in that order, "
        "after the background's where the sum is 1",
    )  # fmt: skip
    parser.add_argument(
        "--channels", nargs="+", type=int, metavar="N",
        help="the label of each channel of probabilities, 0 the background's; goes before what "
        "files say",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, help="p >= threshold is predicted (default: 0.5)"
    )
    parser.add_argument(
        "--rule", nargs="+", default=["isbi"], choices=["isbi", "msseg", "wmh"], metavar="RULE",
        help="of the lesion-wise metrics: isbi, msseg, wmh, or several (default: isbi)",
    )  # fmt: skip
    parser.add_argument(
        "--labels", nargs="+", type=int, metavar="N",
        help="score each of these labels (default: everything above 0 as one)",
    )  # fmt: skip
    parser.add_argument(
        "--ignore-label", type=int, metavar="N",
        help="label of the truth whose voxels count as nothing (with --rule wmh alone: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--compare", type=Path, metavar="OTHER", help="another method's predictions, side by side"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where tables and page are written")
    parser.add_argument(
        "--images", type=Path, metavar="PATH", help="images to show below the page's misses"
    )
    parser.add_argument(
        "--resample", action="store_true",
        help="bring predictions onto the truth's grid, by the nearest voxel",
    )  # fmt: skip
    parser.add_argument(
        "--minimum-volume", type=float, metavar="MM3",
        help="remove predicted lesions of so much or less first",
    )  # fmt: skip
    parser.add_argument(
        "--tune-on", nargs="+", metavar="SUBJECT",
        help="choose the minimum volume on these subjects, and score the others",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, metavar="MM", help="of the surface Dice (default: 1)"
    )
    parser.add_argument(
        "--surface", choices=["voxels", "areas", "none"], default="voxels",
        help="between surface voxels (MONAI's), weighted by areas (surface-distance's), or none",
    )  # fmt: skip
    parser.add_argument(
        "--size-edges", nargs="+", type=float, default=[10, 50, 500], metavar="MM3",
        help="bounds of the lesion sizes (default: 10 50 500)",
    )  # fmt: skip
    parser.add_argument(
        "--bins", type=int,
        help="probabilities are rounded down to 1/BINS for the curves; 0 is exact (default: 1000)",
    )  # fmt: skip
    for side in ("prediction", "truth", "image"):
        parser.add_argument(
            f"--{side}-pattern", metavar="PATTERN",
            help=f"where a subject's {side} lies, such as '{{}}/lesions.nii.gz'",
        )  # fmt: skip
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    try:
        return _Evaluation(options).run()
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"voxfuse evaluate: {error}", file=sys.stderr)
        return 1


class _Evaluation:
    """The files, and what is wanted of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        # Imported here: no other command needs them.
        from voxfuse.metrics import files, report, study
        from voxfuse.metrics.lesions import as_edges, as_rule

        _refuse_without_effect(options)
        for name, value in _DEFAULTS.items():
            if getattr(options, name) is None:
                setattr(options, name, value)
        if not 0 <= options.threshold <= 1:
            raise ValueError(f"--threshold: got {options.threshold}, expected 0 to 1")
        if options.bins and (options.bins < 10 or options.bins % 10):
            raise ValueError(f"--bins: got {options.bins}, expected 0 or a multiple of 10")
        if not options.tolerance >= 0 or not options.minimum_volume >= 0:
            raise ValueError("--tolerance, --minimum-volume: expected 0 or more")
        as_edges(options.size_edges, "--size-edges")
        if options.tune_on and options.labels and len(options.labels) > 1:
            raise ValueError("--tune-on: expected one label in --labels")
        for name in ("labels", "channels"):
            given = getattr(options, name) or []
            if len(set(given)) < len(given):
                raise ValueError(f"--{name}: got {_listed(given)}, expected each once")
        if options.ignore_label is not None and options.ignore_label in (options.labels or []):
            raise ValueError(
                f"--ignore-label: got {options.ignore_label}, which --labels asks to score"
            )
        if options.out is not None and options.out.exists() and not options.out.is_dir():
            raise ValueError(f"--out: {options.out} is a file, expected a folder")
        self.files, self.study, self.report = files, study, report
        self.options = options
        if options.tune_on:
            options.tune_on = [files.composed(subject) for subject in options.tune_on]
        self.wanted = study.Options(
            rules=tuple(as_rule(rule) for rule in dict.fromkeys(options.rule)),
            tolerance=options.tolerance,
            outline=None if options.surface == "none" else options.surface,
            threshold=options.threshold,
            bins=options.bins or None,
            minimum_volume=options.minimum_volume,
        )
        self.others = self.wanted  # of the method that is compared
        self.names = _names(options.predictions, options.compare)
        for name in (*self.names, options.out or ""):
            files.as_text(Path(name))
        self.ignore = options.ignore_label
        if self.ignore is None and options.rule == ["wmh"] and 2 not in (options.labels or []):
            self.ignore = 2
        self.truths = files.find_scans(options.truth, options.truth_pattern)
        self.notes: list[str] = []
        self.pairs = self._pairs(options.predictions)
        self.other = self._pairs(options.compare) if options.compare else {}
        self.images = (
            files.find_scans(options.images, options.image_pattern) if options.images else {}
        )
        self.misses: list[Any] = []
        self.seen: set[int] = set()
        self.masks: dict[str, None] = {}  # files of probabilities that look like masks

    def _pairs(self, predictions: Path) -> dict[str, tuple[Path, Path]]:
        found = self.files.find_scans(predictions, self.options.prediction_pattern)
        if predictions.is_file() and self.options.truth.is_file():  # whatever their names
            ((subject, truth),) = self.truths.items()
            return {subject: (predictions, truth)}
        pairs, extra = self.files.pair_scans(found, self.truths)
        if extra:
            names = ", ".join(extra[:5]) + (", ..." if extra[5:] else "")
            self._note(f"{predictions}: {len(extra)} predictions have no truth: {names}")
        return pairs

    def _note(self, note: str) -> None:
        """Say it now, and on the page."""
        self.notes.append(note)
        print(f"voxfuse evaluate: {note}", file=sys.stderr)

    def run(self) -> int:
        """Score, print or write; return the exit status."""
        from voxfuse import __version__
        from voxfuse._files import check_writable

        self._check_headers()
        if self.options.out is not None:
            check_writable(self.options.out, "--out")
        if self.options.tune_on:
            self._tune()
        if self.ignore is not None:
            self.notes.append(f"voxels of label {self.ignore} in the truth count as nothing")
        if self.options.probabilities and (
            self.wanted.minimum_volume or self.others.minimum_volume
        ):
            self.notes.append(
                "average precision and the curves of voxels over thresholds are of all "
                "probabilities: small lesions are not removed there"
            )
        misses = self.options.out is not None
        studies = self._studies(self.pairs, self.wanted, with_misses=misses)
        unseen = [label for label in self.options.labels or [] if label not in self.seen]
        if unseen:
            self._note(f"no truth has a voxel of label {', '.join(map(str, unseen))}")
        others = self._studies(self.other, self.others) if self.other else []
        if self.masks:
            named = ", ".join([*self.masks][:3]) + (", ..." if len(self.masks) > 3 else "")
            self._note(
                f"--probabilities: {len(self.masks)} files hold 0 and 1 only, as masks do, so that "
                f"their curves have one point: {named}"
            )
        comparisons = {
            ours.label: self.study.compare(ours, theirs)
            for ours, theirs in zip(studies, others, strict=False)
        }
        name, other = self.names
        tuned_apart = bool(self.other) and self.others != self.wanted
        self.misses.sort(key=lambda miss: -miss.volume)
        found = self.report.Report(
            name=name,
            studies=studies,
            options=self.wanted,
            size_edges=self.options.size_edges,
            other_name=other,
            other_minimum_volume=self.others.minimum_volume if tuned_apart else None,
            comparisons=comparisons,
            misses=self.misses[:12],
            notes=self.notes,
            version=__version__,
        )
        folder = self.options.out
        if folder is None:
            print(self.report.markdown(found), end="")
            return 0
        written = self.report.write_tables(found, folder)
        page = folder / "report.html"
        page.write_text(self.report.html_page(found), encoding="utf-8")
        for study in studies:
            dice = study.columns["dice"]
            print(f"{study.label}: Dice {dice.mean:.3f} over {dice.subjects} subjects")
        print(f"wrote {', '.join(path.name for path in [*written, page])} to {folder}")
        return 0

    def _studies(
        self, pairs: dict[str, tuple[Path, Path]], wanted: Any, with_misses: bool = False
    ) -> list[Any]:
        by_label: dict[str, list[Any]] = {}
        for done, (subject, (prediction, truth)) in enumerate(pairs.items(), 1):
            if sys.stderr.isatty():
                print(f"\r{done}/{len(pairs)} {subject}\x1b[K", end="", file=sys.stderr)
            for label, one in self._subject(subject, prediction, truth, wanted, with_misses):
                by_label.setdefault(label, []).append(one)
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
        return [self.study.pool(scores) for scores in by_label.values()]

    def _check_headers(self) -> None:
        """Raise for what would end the run when the last subject's turn comes."""
        for subject, (prediction, truth) in self.pairs.items():
            true = self._load(truth, voxels=False)
            self._aligned(self._load(prediction, voxels=False), true, voxels=False)
            if self.other:
                other = self._load(self.other[subject][0], voxels=False)
                self._aligned(other, true, voxels=False)
            if subject not in (self.options.tune_on or []):
                self._image(subject, true, voxels=False)

    def _load(self, path: Path, voxels: bool = True) -> Any:
        """A file's scan; what its header contradicts becomes a note."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            scan = (self.files.load_scan if voxels else self.files.load_header)(path)
        for note in (str(one.message) for one in caught):
            if note not in self.notes:
                self._note(note)
        return scan

    def _read(self, prediction: Path, truth: Path) -> tuple[Any, Any]:
        true, predicted = self._load(truth), self._load(prediction)
        if self.options.probabilities:
            predicted = replace(predicted, channels=self._channels(predicted))
            if predicted.array.max() == 1 and np.isin(predicted.array, (0, 1)).all():
                self.masks[str(prediction)] = None
        return self._aligned(predicted, true), true

    def _aligned(self, predicted: Any, true: Any, voxels: bool = True) -> Any:
        """The prediction on the truth's grid."""
        if true.array.ndim != 3:
            raise ValueError(
                f"{true.path}: got shape {true.array.shape}, expected a mask (x, y, z)"
            )
        if predicted.array.ndim != 3 and not self.options.probabilities:
            raise ValueError(
                f"{predicted.path}: got shape {predicted.array.shape}, expected a mask (x, y, z); "
                "--probabilities takes channels"
            )
        return self._on_grid_of(true, predicted, voxels)

    def _on_grid_of(self, true: Any, scan: Any, voxels: bool = True) -> Any:
        if self.options.resample and not voxels:  # any grid will do
            return scan
        return self.files.on_grid_of(scan, true, self.options.resample)

    def _channels(self, scan: Any) -> tuple[int, ...] | None:
        """The label of each channel of probabilities; None for one volume that does not say."""
        array, labels = scan.array, self.options.labels or []
        if array.dtype.kind in "bui":  # scaled ones are read as floating-point numbers
            raise ValueError(
                f"{scan.path}: got whole numbers ({array.dtype} without a scale), expected "
                f"probabilities{_beside(scan.path)}"
            )
        count = array.shape[3] if array.ndim == 4 else 1
        known = tuple(self.options.channels or scan.channels or ())
        if known and len(known) != count:
            who = "--channels" if self.options.channels else "its header"
            raise ValueError(
                f"{scan.path}: got {count} channels, but {who} says {len(known)}: {_listed(known)}"
            )
        if scan.regions and count > 1 and _REGIONS not in self.notes:
            self._note(_REGIONS)
        if known or count == 1:
            return known or None
        # That a file has the background's channel is seen, not taken for granted: voxfuse predict
        # leaves it out, and every label would be scored by its neighbour's channel.
        sums = array.sum(axis=3, dtype=np.float32)
        low, high = float(sums.min()), float(sums.max())
        background = 0.95 <= low <= high <= 1.05
        if background and not labels and count == 2:
            return 0, 1
        expected = (0, *labels) if background and 0 not in labels else tuple(labels)
        if len(expected) == count:
            return expected
        with_it = "with" if background else "without"
        asked = f"--labels {_listed(labels)}" if labels else "no --labels"
        raise ValueError(
            f"{scan.path}: got {count} channels {with_it} a background (their sum is {low:.3g} to "
            f"{high:.3g}) and {asked}, expected a channel a label; --channels says which label "
            "each is, 0 the background"
        )

    def _masks(self, prediction: Path, truth: Path) -> Any:
        """Label, prediction, truth and what to ignore, of each label; and the truth's scan."""
        predicted, true = self._read(prediction, truth)
        whole = _labels(true, "expected whole numbers")
        ignore = None if self.ignore is None else whole == self.ignore
        for label in self.options.labels or [None]:
            g = whole == label if label is not None else whole > 0
            if label is not None and g.any():
                self.seen.add(label)
            if ignore is not None:
                g &= ~ignore
            p = self._predicted(predicted, label)
            yield "foreground" if label is None else str(label), p, g, ignore, true

    def _predicted(self, scan: Any, label: int | None) -> Any:
        from voxfuse.metrics._arrays import as_probabilities

        array = scan.array
        if not self.options.probabilities:
            whole = _labels(scan, "expected whole numbers; --probabilities takes others")
            return whole == label if label is not None else whole > 0
        if scan.channels is None and len(self.options.labels or []) > 1:
            raise ValueError(f"{scan.path}: got one volume, expected a channel for each label")
        if scan.channels is not None:
            places = [
                place
                for place, value in enumerate(scan.channels)
                if (value != 0 if label is None else value == label)
            ]
            if len(places) != 1:
                raise ValueError(
                    f"{scan.path}: got channels of the labels {_listed(scan.channels)}, expected "
                    + ("--labels" if label is None else f"one of label {label}")
                )
            array = array[..., places[0]] if array.ndim == 4 else array
        return as_probabilities(np.asarray(array, np.float32), str(scan.path))

    def _subject(
        self, subject: str, prediction: Path, truth: Path, wanted: Any, with_misses: bool
    ) -> Any:
        from voxfuse.metrics.lesions import remove_small_lesions

        for label, p, g, ignore, scan in self._masks(prediction, truth):
            one = self.study.score_subject(
                p, g, scan.spacing, wanted, subject=subject, label=label, ignore=ignore
            )
            if with_misses and wanted.rules:
                rule = wanted.rules[0]
                shown = p >= wanted.threshold if p.dtype != np.bool_ else p
                if ignore is not None:
                    shown = shown & ~ignore
                if wanted.minimum_volume:
                    shown = remove_small_lesions(
                        shown, wanted.minimum_volume, scan.spacing, rule.connectivity
                    )
                self.misses += self.report.find_misses(
                    shown, g, one.matches[rule.name], scan.affine, subject=subject, label=label,
                    image=self._image(subject, scan),
                )  # fmt: skip
            yield label, self.study.without_volumes(one)

    def _image(self, subject: str, truth: Any, voxels: bool = True) -> Any:
        if not self.images:
            return None
        both_files = self.options.images.is_file() and self.options.truth.is_file()
        if subject not in self.images and not both_files:
            raise FileNotFoundError(
                f"--images: there is none for {subject}; --image-pattern says where they lie, "
                "such as '{}/t1.nii.gz'"
            )
        path = self.images.get(subject) or next(iter(self.images.values()))
        image = self._on_grid_of(truth, self._load(path, voxels), voxels)
        if image.array.ndim != 3:
            raise ValueError(f"{path}: got shape {image.array.shape}, expected (x, y, z)")
        return image.array

    def _tune(self) -> None:
        """Choose the minimum volume of each method on its own predictions."""
        subjects = self.options.tune_on
        unknown = [subject for subject in subjects if subject not in self.pairs]
        if unknown or len(subjects) >= len(self.pairs):
            raise ValueError(
                f"--tune-on: got {', '.join(unknown or subjects)}, expected some, not all, of "
                f"{', '.join(self.pairs)}"
            )
        self.wanted = self._tuned(self.pairs, self.names[0])
        self.others = self._tuned(self.other, self.names[1]) if self.other else self.wanted

    def _tuned(self, pairs: dict[str, tuple[Path, Path]], method: str) -> Any:
        from voxfuse.metrics.lesions import tune_minimum_volume

        masks: list[tuple[Any, Any, Any]] = []
        for subject in dict.fromkeys(self.options.tune_on):
            for _, p, g, ignore, scan in self._masks(*pairs.pop(subject)):
                mask = p >= self.wanted.threshold if p.dtype != np.bool_ else p
                masks.append((mask if ignore is None else mask & ~ignore, g, scan.spacing))
        predictions, truths, spacings = zip(*masks, strict=True)
        rule = self.wanted.rules[0]
        tuned = tune_minimum_volume(predictions, truths, spacings, rule=rule)
        of_whom = f" of {method}" if self.other else ""
        self.notes.append(
            f"minimum volume{of_whom} {tuned.volume:g} mm3, best for lesion F1 ({rule.name}) on "
            f"{', '.join(self.options.tune_on)}, which are not scored"
        )
        return replace(self.wanted, minimum_volume=tuned.volume)


def _refuse_without_effect(options: argparse.Namespace) -> None:
    """Raise for an option that others leave without effect."""
    given = vars(options)
    for name, needed in _NEEDS.items():
        if given[name] is not None and not given[needed]:
            raise ValueError(f"--{name.replace('_', '-')}: is for --{needed}")
    if options.tune_on and options.minimum_volume is not None:
        raise ValueError("--minimum-volume: got one beside --tune-on, which chooses it")
    if options.tolerance is not None and options.surface == "none":
        raise ValueError("--tolerance: got one beside --surface none, which has no surface Dice")
    sides = {
        "prediction": (options.predictions, options.compare),
        "truth": (options.truth,),
        "image": (options.images,),
    }
    for side, paths in sides.items():
        if given[f"{side}_pattern"] is not None and all(p is None or p.is_file() for p in paths):
            raise ValueError(f"--{side}-pattern: is for folders, but {paths[0]} is a file")


def _labels(scan: Any, expected: str) -> NDArray[Any]:
    """A file's labels, whole numbers to 0.001."""
    array = scan.array
    if array.dtype.kind in "bui":
        return array  # type: ignore[no-any-return]
    whole = np.rint(array)
    wrong = ~np.isfinite(array)
    if wrong.any():
        expected = "expected a label"
    else:
        wrong = np.abs(array - whole) > 1e-3
    if wrong.any():
        place = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(f"{scan.path}: got {array[place]!s} at voxel {place}, {expected}")
    return whole  # type: ignore[no-any-return]


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _beside(path: Path) -> str:
    """Where the probabilities of a mask lie, if voxfuse predict wrote them there."""
    from voxfuse.metrics.files import probabilities_of

    probabilities = probabilities_of(path)
    if not probabilities.is_file():
        return ""
    return (
        f"; beside it lies {probabilities.name}: of folders, "
        "--prediction-pattern '{}_probabilities.nii.gz' takes those"
    )


def _names(predictions: Path, other: Path | None) -> tuple[str, str]:
    """What the two methods are called: as much of their paths as tells them apart."""
    first = predictions.resolve()
    if other is None:
        return first.name, ""
    second = other.resolve()
    for parts in range(1, max(len(first.parts), len(second.parts))):
        names = ["/".join(path.parts[-parts:]) for path in (first, second)]
        if names[0] != names[1]:
            return names[0], names[1]
    return str(predictions), str(other)
