"""``voxfuse tune``: the launch configurations of the Triton kernels, measured."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from typing import Any

import torch

from voxfuse import tuning


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected batch, classes and extents, such as 1,4,128,128,128"
        ) from None


def _tune(options: argparse.Namespace) -> int:
    if options.clear:
        removed = tuning.clear()
        print(f"removed {removed}" if removed else "there was nothing to clear")
        return 0
    dtypes = [getattr(torch, name) for name in options.dtypes]
    try:
        measured = tuning.tune(
            options.shapes,
            dtypes,
            operators=options.operators,
            device=options.device,
            seconds=options.seconds,
        )
    except (RuntimeError, ValueError) as error:
        print(f"voxfuse tune: {error}", file=sys.stderr)
        return 1
    if options.json:
        rows = [{**dataclasses.asdict(one), "speedup": one.speedup} for one in measured]
        json.dump(rows, sys.stdout, indent=2)
        print()
        return 0
    for one in measured:
        print(one)
    changed = sum(one.chosen != 0 for one in measured)
    print(f"{len(measured)} launches measured, {changed} not the default any more")
    return 0


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "tune",
        help="measure the Triton kernels' launch configurations on this GPU and keep the fastest",
        description="Measure the Triton kernels' launch configurations on this GPU and keep the "
        "fastest. The last bits of sums may differ from those before; --clear undoes it.",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        metavar="B,C,D,H,W",
        help="logits (default: the benchmarks' shapes that fit into the memory)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "float16", "bfloat16", "float64"],
        metavar="DTYPE",
        help="of the logits (default: float32 bfloat16)",
    )
    names = ["soft_confusion", "overlap_add", "finalize_slab"]
    parser.add_argument(
        "--operators",
        nargs="+",
        default=names,
        choices=names,
        metavar="NAME",
        help=f"default: {' '.join(names)}",
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="begin no further shape after so many (default: no limit)",
    )
    parser.add_argument("--clear", action="store_true", help="forget what was measured")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_tune)
