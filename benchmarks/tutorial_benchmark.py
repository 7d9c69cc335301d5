"""What docs/tutorials/monai_training.md shows: its curves over more steps, and memory of its loss.

python -m benchmarks.tutorial_benchmark --json benchmarks/results/cpu/monai_training.json

The page's own code trains, with MONAI's DiceCELoss and with ours. Memory is that of its network on
larger patches: the highest during a training step, above what was in use before it, and during
the loss and its gradient alone, above logits and gradient; the least of three measurements each,
as what else the process does can only add to it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai
import torch

from benchmarks import harness, losses, step_benchmark
from voxfuse.integrations.monai import DiceCELoss

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/tutorials/monai_training.md"


def code_of_the_page() -> dict[str, Any]:
    """What its first two blocks define, which train with MONAI's loss."""
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)[:2]:
        exec(compile(block, str(PAGE), "exec"), namespace)
    return namespace


def least_peak(function: Callable[[], Any]) -> int:
    return min(harness.peak_extra_bytes(function, torch.device("cpu")) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--edges", type=int, nargs="+", default=[96, 128, 160])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    options = parser.parse_args()
    page, device = code_of_the_page(), torch.device("cpu")
    compared = {
        "monai": monai.losses.DiceCELoss(**page["options"]),
        "voxfuse": DiceCELoss(**page["options"]),
    }
    curves = {name: page["train"](loss, options.steps) for name, loss in compared.items()}
    network, memory = page["make_network"](), []
    for edge in options.edges:
        logits, labels = losses.draw((1, 3, *[edge] * 3), torch.float32, device)
        image = torch.randn(1, 1, *[edge] * 3)
        leaf = logits.requires_grad_()
        row: dict[str, Any] = {"edge": edge, "step_bytes": {}, "loss_bytes": {}}
        for name, loss in compared.items():
            step = step_benchmark.step(network, loss, image, labels)
            alone = losses.step(loss, leaf, labels)
            row["step_bytes"][name] = least_peak(step)
            row["loss_bytes"][name] = least_peak(alone) - logits.nbytes
        print(row)
        memory.append(row)
    found = {
        "benchmark": "tutorial",
        "machine": harness.machine(device),
        "curves": {name: [float(f"{x:.7g}") for x in curve] for name, curve in curves.items()},
        "memory": memory,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
