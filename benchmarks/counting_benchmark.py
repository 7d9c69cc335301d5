"""Time and memory of counting right and wrong voxels, beside reading the logits once.

    python -m benchmarks.counting_benchmark --json benchmarks/results/cpu/counting.json

The counts of each way are compared before they are timed; all run interleaved in one process, on
one thread, with cold caches (benchmarks/harness.py).
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import voxfuse
from benchmarks import harness

SHAPES = ((1, 4, 128, 128, 128), (1, 117, 96, 96, 96))

#: Times of reading the logits once, and bytes above the inputs, that counting may take.
BARS = {"times_of_reading": 4.0, "peak_bytes": 1 << 20}


def monai(logits: Tensor, labels: Tensor) -> Tensor:
    """The Dice of every class by MONAI's DiceMetric, whose counts are one-hot volumes."""
    from monai.metrics import DiceMetric
    from monai.networks import one_hot

    classes = logits.shape[1]
    predicted = one_hot(logits.argmax(1, keepdim=True), classes)
    dice: Tensor = DiceMetric(reduction="none")(predicted, one_hot(labels, classes))
    return dice


def nnunet(logits: Tensor, labels: Tensor) -> Tensor:
    """The same from the counts of nnU-Net's validation_step."""
    from nnunetv2.training.loss.dice import get_tp_fp_fn_tn

    segmentation = logits.argmax(1)[:, None]
    predicted = torch.zeros(logits.shape, dtype=torch.float16).scatter_(1, segmentation, 1)
    axes = list(range(2, logits.ndim))
    tp, fp, fn, _ = get_tp_fp_fn_tn(predicted, labels.long(), axes=axes)
    return 2 * tp / (2 * tp + fp + fn)


def ours(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    tp, fp, fn, _ = voxfuse.hard_confusion(logits, labels, **options).unbind(-1)
    return 2 * tp / (2 * tp + fp + fn)


def measure(shape: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    labels = torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), generator=generator)
    labels = labels.to(torch.uint8)
    predicted = logits.argmax(1, keepdim=True).to(torch.uint8)
    ways: dict[str, Callable[[], Any]] = {
        "reading": logits.sum,
        "voxfuse, argmax": functools.partial(ours, logits, labels),
        "voxfuse, argmax, labels of 64 bits": functools.partial(ours, logits, labels.long()),
        "voxfuse, threshold": functools.partial(ours, logits, labels, mode="threshold"),
        "voxfuse, predicted labels": functools.partial(
            ours, predicted, labels, mode="labels", num_classes=shape[1]
        ),
        "MONAI DiceMetric": functools.partial(monai, logits, labels),
        "nnU-Net": functools.partial(nnunet, logits, labels),
    }
    expected = ours(logits, labels)
    for name in ("voxfuse, predicted labels", "MONAI DiceMetric", "nnU-Net"):
        torch.testing.assert_close(ways[name]().float(), expected, rtol=1e-2, atol=1e-3)

    cpu = torch.device("cpu")
    fast = {name: way for name, way in ways.items() if name == "reading" or "voxfuse" in name}
    timings = harness.interleave(fast, harness.Clock(cpu), rounds)
    slow = {name: way for name, way in ways.items() if name not in fast}
    timings |= harness.interleave(slow, harness.Clock(cpu), 1)
    reading = timings["reading"].summary()["min_ms"]
    rows = []
    for name, way in ways.items():
        row = {"shape": list(shape), "way": name, **timings[name].summary()}
        row["times_of_reading"] = row["min_ms"] / reading
        row["peak_bytes"] = harness.peak_extra_bytes(way, cpu, warm=int(name in fast))
        rows.append(row)
        held = "voxfuse" in name and any(row[key] > bar for key, bar in BARS.items())
        print(
            f"{'x'.join(map(str, shape)):20} {name:36} {row['min_ms']:9.2f} ms "
            f"{row['times_of_reading']:6.1f} x {row['peak_bytes'] / 2**20:8.1f} MiB"
            f"{'  over the bar' if held else ''}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for shape in SHAPES for row in measure(shape, options.rounds)]
    if options.json:
        found = {"machine": harness.machine(torch.device("cpu")), "bars": BARS, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
