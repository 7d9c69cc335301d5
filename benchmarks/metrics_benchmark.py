"""Seconds and peak memory of all metrics of a scan, on one core.

    python -m benchmarks.metrics_benchmark FOLDER... --json benchmarks/results/cpu/metrics.json

Each argument is a lesion mask, or a folder with masks ``*/lesions.nii.gz``. What is scored is a
rater's likeness of it: moved by a voxel, dilated, every fifth lesion left out. Every scan has a
process of its own, whose peak memory is the interpreter's, the mask's, and that of the metrics.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from voxfuse import metrics
from voxfuse.metrics import files, study

#: Seconds and bytes that a scan may take.
BARS = {"seconds": 3.0, "peak_bytes": 1 << 30}


def likeness(truth: Any) -> Any:
    """The mask as another rater might have drawn it."""
    from scipy import ndimage

    numbers, volumes = metrics.label_lesions(truth, 18)
    kept = (numbers > 0) & (numbers % 5 != 0) if volumes.size > 1 else truth
    return ndimage.binary_dilation(np.roll(kept, 1, axis=0))


def measure(path: Path, outline: str) -> dict[str, Any]:
    """Score one scan by every rule: the best of three times, and the process's peak."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    scan = files.load_scan(path)
    truth = scan.array > 0
    prediction = likeness(truth)
    options = study.Options(rules=tuple(metrics.RULES.values()), outline=outline)  # type: ignore[arg-type]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        scores = study.score_subject(prediction, truth, scan.spacing, options)
        seconds.append(time.perf_counter() - started)
    return {
        "scan": path.parent.name,
        "shape": list(truth.shape),
        "surface": outline,
        "true_lesions": scores.values["isbi.lesions_truth"],
        "seconds": min(seconds),
        "peak_bytes": harness.status_bytes("VmHWM"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements")
    options = parser.parse_args()
    masks = [
        mask
        for path in options.paths
        for mask in (sorted(path.glob("*/lesions.nii.gz")) if path.is_dir() else [path])
    ]
    if not masks:
        parser.error(f"no lesions.nii.gz in {', '.join(map(str, options.paths))}")
    rows = []
    context = multiprocessing.get_context("spawn")
    for outline in ("voxels", "areas"):
        for mask in masks:
            with context.Pool(1) as pool:
                row = pool.apply(measure, (mask, outline))
            rows.append(row)
            met = all(row[name] <= bar for name, bar in BARS.items())
            print(
                f"{row['scan']:14} {row['surface']:6} {row['true_lesions']:4.0f} lesions "
                f"{row['seconds']:5.2f} s {row['peak_bytes'] / 2**20:5.0f} MiB "
                f"{'' if met else 'over the bar'}",
                flush=True,
            )
    if options.json:
        found = {"machine": harness.machine(torch.device("cpu")), "bars": BARS, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
