"""What runs of ``voxfuse train`` reached: a table of their test.csv, and the numbers as JSON.

    python -m benchmarks.training_runs RUN... --json benchmarks/results/cpu/ms_lesions.json
    python -m benchmarks.training_runs RUN... --against RUN... --json FILE
    python -m benchmarks.training_runs RUN --curves --report REPORT --json FILE
    python -m benchmarks.training_runs RUN --slice T1 TRUTH PREDICTION --json FILE

The runs are of one configuration and several seeds. Dice, recall and precision at 0.5, a subject a
row; seconds are those of training alone. With ``--against``, runs of the same seeds with another
configuration: the differences of Dice, seed by seed, the first less the second. With ``--curves``
the loss over the steps and the scores over the thresholds besides, and with ``--report`` what
``voxfuse evaluate`` found of a run's predictions. With ``--slice`` the axial slice with most of a
truth, of an image and two masks.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import statistics
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from voxfuse.training.config import load


def result_of(run: Path) -> dict[str, Any]:
    """Seed, seconds and scores of one run."""
    with (run / "log.csv").open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    with (run / "test.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if float(row["threshold"]) == 0.5]
    scores = {
        row["subject"]: {name: float(row[name]) for name in ("dice", "recall", "precision")}
        for row in rows
    }
    config = load(run / "config.toml")
    return {
        "seed": config.training.seed,
        "steps": int(last["step"]),
        "simulate_every": config.augmentation.simulate_every,
        "seconds": float(last["seconds"]),
        "last_loss": float(last["loss"]),
        "window": rows[0]["window"],
        "scores": scores,
    }


def curves_of(run: Path) -> dict[str, Any]:
    """The loss over the steps, and dice, recall and precision of each subject over thresholds."""
    with (run / "log.csv").open(newline="", encoding="utf-8") as file:
        loss = [[int(row["step"]), float(row["loss"])] for row in csv.DictReader(file)]
    thresholds: dict[str, list[list[float]]] = {}
    with (run / "test.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            scores = [row[name] for name in ("threshold", "dice", "recall", "precision")]
            rounded = [float(f"{float(score):.4g}") for score in scores]
            thresholds.setdefault(row["subject"], []).append(rounded)
    return {"loss": loss, "thresholds": thresholds}


def report_of(folder: Path) -> dict[str, Any]:
    """Subjects and lesions by size, as a report has them, and which commit judged."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (rule,) = (rule["name"] for rule in found["options"]["rules"])
    counts = ("truth", "prediction", "missed", "false")
    subjects = {
        row["subject"]: {"dice": row["dice"], "truth_ml": row["truth_ml"]}
        | {f"lesions_{name}": int(row[f"{rule}.lesions_{name}"]) for name in counts}
        for row in found["subjects"]
    }
    with (folder / "lesions.csv").open(newline="", encoding="utf-8") as file:
        sizes = [
            {"mm3": row["volume_mm3"], "lesions_truth": int(row["lesions_truth"])}
            | {
                name: float(row[name]) if row[name] else None
                for name in ("sensitivity", "precision")
            }
            for row in csv.DictReader(file)
        ]
    return {"commit": harness.commit(), "rule": rule, "subjects": subjects, "sizes": sizes}


def slice_of(image: Path, truth: Path, prediction: Path) -> dict[str, Any]:
    """The brain's part of a slice: the image in 8 bits, with 1 for missed, 2 false, 3 found."""
    import nibabel

    t1, true, found = (np.asarray(nibabel.load(p).dataobj) for p in (image, truth, prediction))
    place = int((true > 0).sum((0, 1)).argmax())
    t1, true, found = t1[..., place], true[..., place] > 0, found[..., place] > 0
    brain = np.nonzero(t1 > 0)
    part = tuple(slice(axis.min(), axis.max() + 1) for axis in brain)
    planes = {"image": t1 * (255 / t1.max()), "masks": true + 2 * found}
    packed = {
        name: base64.b64encode(zlib.compress(plane[part].astype(np.uint8).tobytes(), 9)).decode()
        for name, plane in planes.items()
    }
    return {"subject": image.parent.name, "slice": place, "shape": t1[part].shape, **packed}


def table(results: list[dict[str, Any]]) -> str:
    """Dice by subject and seed, with their means, as Markdown."""
    seeds = [f"seed {result['seed']}" for result in results]
    lines = [f"| subject | {' | '.join(seeds)} | mean | recall | precision |"]
    lines.append("|" + "---|" * (len(seeds) + 4))
    for subject in results[0]["scores"]:
        found = [result["scores"][subject] for result in results]
        means = [statistics.fmean(x[name] for x in found) for name in found[0]]
        cells = [*(x["dice"] for x in found), *means]
        lines.append(f"| {subject} | {' | '.join(f'{x:.3f}' for x in cells)} |")
    return "\n".join(lines)


def paired(results: list[dict[str, Any]], against: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Dice by subject: that of each run less that of the other run of its seed."""
    seeds = [result["seed"] for result in results]
    others = [result["seed"] for result in against]
    if seeds != others:
        raise SystemExit(f"--against: got seeds {others}, expected {seeds}")
    return {
        subject: [
            a["scores"][subject]["dice"] - b["scores"][subject]["dice"]
            for a, b in zip(results, against, strict=True)
        ]
        for subject in results[0]["scores"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--against", nargs="+", type=Path, default=[], metavar="RUN")
    parser.add_argument("--curves", action="store_true", help="losses and thresholds as well")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="of voxfuse evaluate --out")
    parser.add_argument("--slice", nargs=3, type=Path, metavar=("T1", "TRUTH", "PREDICTION"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    options = parser.parse_args()
    results = [result_of(run) for run in options.runs]
    print(table(results))
    seconds = ", ".join(f"{result['seconds']:.0f}" for result in results)
    print(f"\n{results[0]['steps']} steps in {seconds} s")
    found: dict[str, Any] = {"machine": harness.machine(torch.device("cpu")), "runs": results}
    if options.curves:
        found["benchmark"] = "training"
        for result, run in zip(results, options.runs, strict=True):
            result["curves"] = curves_of(run)
    if options.slice is not None:
        found = {**found, "benchmark": "slice", **slice_of(*options.slice)}
    if options.report is not None:
        found["report"] = report_of(options.report)
    if options.against:
        found["against"] = [result_of(run) for run in options.against]
        found["differences"] = paired(results, found["against"])
        for subject, values in found["differences"].items():
            each = ", ".join(f"{value:+.3f}" for value in values)
            print(f"{subject}: {each}, mean {statistics.fmean(values):+.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
