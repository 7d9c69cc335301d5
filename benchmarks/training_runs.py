"""What runs of ``voxfuse train`` reached: a table of their test.csv, and the numbers as JSON.

    python -m benchmarks.training_runs RUN... --json benchmarks/results/cpu/ms_lesions.json

The runs are of one configuration and several seeds. Dice, recall and precision at 0.5, a subject a
row; seconds are those of training alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

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
        "seconds": float(last["seconds"]),
        "last_loss": float(last["loss"]),
        "window": rows[0]["window"],
        "scores": scores,
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    options = parser.parse_args()
    results = [result_of(run) for run in options.runs]
    print(table(results))
    seconds = ", ".join(f"{result['seconds']:.0f}" for result in results)
    print(f"\n{results[0]['steps']} steps in {seconds} s")
    if options.json is not None:
        found = {"machine": harness.machine(torch.device("cpu")), "runs": results}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
