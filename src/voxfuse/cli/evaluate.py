"""``voxfuse evaluate``: predictions against truths, as tables and a page."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

DESCRIPTION = """\
Compare predictions with truths: voxels, lesions by the rules of ISBI 2015, MSSEG 2016 and WMH 2017,
surfaces in mm. Files are matched by name. Without --out the summary is printed; with it, DIR holds
subjects.csv, pooled.csv, lesions.csv, summary.md, results.json and report.html.
"""


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
        help="predictions are probabilities (x, y, z), or (x, y, z, C) with a channel a label",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="p >= threshold is predicted (default: 0.5)"
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
        "--minimum-volume", type=float, default=0.0, metavar="MM3",
        help="remove predicted lesions of so much or less first",
    )  # fmt: skip
    parser.add_argument(
        "--tune-on", nargs="+", metavar="SUBJECT",
        help="choose the minimum volume on these subjects, and score the others",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1.0,
        metavar="MM",
        help="of the surface Dice (default: 1)",
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
        "--bins", type=int, default=1000,
        help="probabilities are rounded down to 1/BINS for the curves; 0 is exact (default: 1000)",
    )  # fmt: skip
    for side in ("prediction", "truth", "image"):
        parser.add_argument(
            f"--{side}-pattern", metavar="GLOB",
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
        from voxfuse.metrics.lesions import as_rule

        if not 0 <= options.threshold <= 1:
            raise ValueError(f"--threshold: got {options.threshold}, expected 0 to 1")
        if options.bins and (options.bins < 10 or options.bins % 10):
            raise ValueError(f"--bins: got {options.bins}, expected 0 or a multiple of 10")
        if not options.tolerance >= 0 or not options.minimum_volume >= 0:
            raise ValueError("--tolerance, --minimum-volume: expected 0 or more")
        if options.tune_on and options.labels and len(options.labels) > 1:
            raise ValueError("--tune-on: expected one label in --labels")
        if options.out is not None and options.out.exists() and not options.out.is_dir():
            raise ValueError(f"--out: {options.out} is a file, expected a folder")
        self.files, self.study, self.report = files, study, report
        self.options = options
        self.wanted = study.Options(
            rules=tuple(as_rule(rule) for rule in dict.fromkeys(options.rule)),
            tolerance=options.tolerance,
            outline=None if options.surface == "none" else options.surface,
            threshold=options.threshold,
            bins=options.bins or None,
            minimum_volume=options.minimum_volume,
        )
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

    def _pairs(self, predictions: Path) -> dict[str, tuple[Path, Path]]:
        found = self.files.find_scans(predictions, self.options.prediction_pattern)
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

        if self.options.tune_on:
            self._tune()
        if self.ignore is not None:
            self.notes.append(f"voxels of label {self.ignore} in the truth count as nothing")
        studies = self._studies(self.pairs, with_misses=self.options.out is not None)
        unseen = [label for label in self.options.labels or [] if label not in self.seen]
        if unseen:
            self._note(f"no truth has a voxel of label {', '.join(map(str, unseen))}")
        others = self._studies(self.other) if self.other else []
        comparisons = {
            ours.label: self.study.compare(ours, theirs)
            for ours, theirs in zip(studies, others, strict=False)
        }
        name, other = _names(self.options.predictions, self.options.compare)
        self.misses.sort(key=lambda miss: -miss.volume)
        found = self.report.Report(
            name=name,
            studies=studies,
            options=self.wanted,
            size_edges=self.options.size_edges,
            other_name=other,
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

    def _studies(self, pairs: dict[str, tuple[Path, Path]], with_misses: bool = False) -> list[Any]:
        by_label: dict[str, list[Any]] = {}
        for done, (subject, (prediction, truth)) in enumerate(pairs.items(), 1):
            if sys.stderr.isatty():
                print(f"\r{done}/{len(pairs)} {subject}\x1b[K", end="", file=sys.stderr)
            for label, one in self._subject(subject, prediction, truth, with_misses):
                by_label.setdefault(label, []).append(one)
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
        return [self.study.pool(scores) for scores in by_label.values()]

    def _read(self, prediction: Path, truth: Path) -> tuple[Any, Any]:
        true = self.files.load_scan(truth)
        if true.array.ndim != 3:
            raise ValueError(f"{truth}: got shape {true.array.shape}, expected a mask (x, y, z)")
        predicted = self.files.load_scan(prediction)
        return self.files.on_grid_of(predicted, true, self.options.resample), true

    def _masks(self, prediction: Path, truth: Path) -> Any:
        """Label, prediction, truth and what to ignore, of each label; and the truth's scan."""
        predicted, true = self._read(prediction, truth)
        whole = np.rint(true.array)
        if not np.allclose(true.array, whole, atol=1e-3):
            raise ValueError(f"{truth}: got numbers that are no labels, expected whole ones")
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
            if array.ndim != 3:
                raise ValueError(
                    f"{scan.path}: got shape {array.shape}, expected a mask (x, y, z); "
                    "--probabilities takes channels"
                )
            whole = np.rint(array)
            if not np.allclose(array, whole, atol=1e-3):
                raise ValueError(
                    f"{scan.path}: got numbers that are no labels; --probabilities takes those"
                )
            return whole == label if label is not None else whole > 0
        if array.ndim == 4:
            channel = 1 if label is None else label
            if label is None and array.shape[3] != 2:
                raise ValueError(f"{scan.path}: got {array.shape[3]} channels, expected --labels")
            if channel >= array.shape[3]:
                raise ValueError(f"{scan.path}: got {array.shape[3]} channels, no label {label}")
            array = array[..., channel]
        elif self.options.labels and len(self.options.labels) > 1:
            raise ValueError(f"{scan.path}: got one volume, expected a channel for each label")
        return as_probabilities(np.asarray(array, np.float32), str(scan.path))

    def _subject(self, subject: str, prediction: Path, truth: Path, with_misses: bool) -> Any:
        from voxfuse.metrics.lesions import remove_small_lesions

        for label, p, g, ignore, scan in self._masks(prediction, truth):
            one = self.study.score_subject(
                p, g, scan.spacing, self.wanted, subject=subject, label=label, ignore=ignore
            )
            if with_misses and self.wanted.rules:
                rule = self.wanted.rules[0]
                shown = p >= self.wanted.threshold if p.dtype != np.bool_ else p
                if ignore is not None:
                    shown = shown & ~ignore
                if self.wanted.minimum_volume:
                    shown = remove_small_lesions(
                        shown, self.wanted.minimum_volume, scan.spacing, rule.connectivity
                    )
                self.misses += self.report.find_misses(
                    shown, g, one.matches[rule.name], scan.affine, subject=subject, label=label,
                    image=self._image(subject, scan),
                )  # fmt: skip
            yield label, self.study.without_volumes(one)

    def _image(self, subject: str, truth: Any) -> Any:
        if not self.images:
            return None
        if subject not in self.images and len(self.images) + len(self.truths) > 2:
            raise FileNotFoundError(
                f"--images: there is none for {subject}; --image-pattern says where they lie, "
                "such as '{}/t1.nii.gz'"
            )
        path = self.images.get(subject) or next(iter(self.images.values()))
        image = self.files.on_grid_of(self.files.load_scan(path), truth, self.options.resample)
        if image.array.ndim != 3:
            raise ValueError(f"{path}: got shape {image.array.shape}, expected (x, y, z)")
        return image.array

    def _tune(self) -> None:
        from voxfuse.metrics.lesions import tune_minimum_volume

        subjects = self.options.tune_on
        unknown = [subject for subject in subjects if subject not in self.pairs]
        if unknown or len(subjects) >= len(self.pairs):
            raise ValueError(
                f"--tune-on: got {', '.join(unknown or subjects)}, expected some, not all, of "
                f"{', '.join(self.pairs)}"
            )
        masks: list[tuple[Any, Any, Any]] = []
        for subject in subjects:
            for _, p, g, ignore, scan in self._masks(*self.pairs[subject]):
                mask = p >= self.wanted.threshold if p.dtype != np.bool_ else p
                masks.append((mask if ignore is None else mask & ~ignore, g, scan.spacing))
        predictions, truths, spacings = zip(*masks, strict=True)
        tuned = tune_minimum_volume(predictions, truths, spacings, rule=self.wanted.rules[0])
        self.wanted = replace(self.wanted, minimum_volume=tuned.volume)
        self.notes.append(
            f"minimum volume {tuned.volume:g} mm3, best for lesion F1 "
            f"({self.wanted.rules[0].name}) on {', '.join(subjects)}, which are not scored"
        )
        for pairs in (self.pairs, self.other):
            for subject in subjects:
                pairs.pop(subject, None)


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
