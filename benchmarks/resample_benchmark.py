"""Interpolating channels to another grid and deciding between them, against what is done today.

    python -m benchmarks.resample_benchmark --json benchmarks/results/cpu/resample.json

What is timed beside ours is checked: every label that differs from the peer's must be one
whose two values are equal within float32's rounding. The peers, once each: what nnU-Net's export
does (scikit-image and argmax, which is one thread's work and measured beside the first number of
threads), and plain PyTorch (``F.interpolate`` and argmax, a few slices of the
target at a time). The floor is what must be read and written: the logits once, the labels. On a CPU
with AVX-512, ours is measured with AVX2 as well, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import voxfuse
from benchmarks import harness
from voxfuse.ops.resample_argmax import axis_table
from voxfuse.reference.resample_argmax import interpolated

CPU = torch.device("cpu")


class Case(NamedTuple):
    classes: int
    source: tuple[int, int, int]
    target: tuple[int, int, int]
    order: tuple[int, int, int] = (1, 1, 1)
    peers: bool = True


CASES = (
    Case(117, (96, 96, 96), (160, 160, 160)),
    Case(4, (128, 128, 128), (512, 512, 512), peers=False),
    Case(4, (32, 256, 256), (160, 512, 512), (0, 1, 1), peers=False),
)
SMALL = (Case(5, (24, 24, 24), (40, 40, 40)),)


def nnunet(logits: Tensor, case: Case) -> Tensor:
    """What nnU-Net's export does with these orders, channel by channel, and argmax: scikit-image;
    where the first axis has order 0, scikit-image slice by slice and SciPy between slices.
    """
    from scipy.ndimage import map_coordinates
    from skimage.transform import resize

    options = {"mode": "edge", "anti_aliasing": False, "preserve_range": True}
    values = []
    for channel in logits.numpy():
        if case.order[0] == 1:
            values.append(resize(channel, case.target, 1, **options))
            continue
        planes = np.stack([resize(plane, case.target[1:], 1, **options) for plane in channel])
        places = np.mgrid[tuple(slice(0, n) for n in case.target)].astype(np.float64)
        places[0] = (case.source[0] / case.target[0]) * (places[0] + 0.5) - 0.5
        values.append(map_coordinates(planes, places, order=0, mode="nearest"))
    return torch.from_numpy(np.stack(values)).argmax(0)


def slabwise(logits: Tensor, case: Case, slices: int = 8) -> Tensor:
    """Plain PyTorch: the rows and columns of a few target slices, and their argmax."""
    index, weight = axis_table(case.source[0], case.target[0], case.order[0])
    labels = torch.empty(case.target, dtype=torch.uint8)
    for first in range(0, case.target[0], slices):
        part = slice(first, min(first + slices, case.target[0]))
        mixed = interpolated(logits, [index[part]], [weight[:, part]]).movedim(0, 1)
        planes = F.interpolate(mixed, case.target[1:], mode="bilinear", align_corners=False)
        labels[part] = planes.argmax(1)
    return labels


def check(logits: Tensor, ours: Tensor, theirs: Tensor, case: Case) -> dict[str, Any]:
    """How many labels differ, and the largest gap between the two values there, in float64."""
    where = (ours != theirs).nonzero()
    gap = 0.0
    tables = [axis_table(*x) for x in zip(case.source, case.target, case.order, strict=True)]
    for voxel in where.tolist():
        values = interpolated(
            logits,
            [index[k : k + 1] for (index, _), k in zip(tables, voxel, strict=True)],
            [w[:, k : k + 1].double() for (_, w), k in zip(tables, voxel, strict=True)],
        ).flatten()
        a, b = int(ours[tuple(voxel)]), int(theirs[tuple(voxel)])
        gap = max(gap, float((values[a] - values[b]).abs()))
    scale = float(logits.abs().max())
    if gap > 32 * 2**-24 * scale:
        raise AssertionError(f"a label differs where the values are {gap} apart")
    return {"differ": len(where), "largest_gap": gap}


def seconds(function: Callable[[], Any], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return best


def measure(case: Case, peers: dict[str, Callable[[Tensor, Case], Tensor]]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    # Blobs, as a network's: neighbours differ little, and every class wins somewhere.
    coarse = torch.randn(
        1, case.classes, *(max(n // 8, 2) for n in case.source), generator=generator
    )
    logits = 4 * F.interpolate(coarse, case.source, mode="trilinear")[0].contiguous()

    def ours() -> Tensor:
        return voxfuse.resample_argmax(logits, case.target, order=case.order)

    def floor() -> None:
        logits.sum()
        torch.empty(case.target, dtype=torch.uint8).fill_(1)

    found: dict[str, Any] = {
        "classes": case.classes,
        "source": list(case.source),
        "target": list(case.target),
        "order": list(case.order),
        "seconds": {"voxfuse": seconds(ours, 5), "read and write": seconds(floor, 5)},
        "peak_extra_bytes": harness.peak_extra_bytes(ours, CPU),
    }
    labels = ours().long()
    if case.peers and peers:
        found["checked"] = {}
        for name, function in peers.items():
            started = time.perf_counter()
            theirs = function(logits, case)
            found["seconds"][name] = time.perf_counter() - started
            found["checked"][name] = check(logits, labels, theirs.long(), case)
            del theirs
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--small", action="store_true", help="one small case, to see it run")
    parser.add_argument("--ours", action="store_true", help="no peers")
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        peers: dict[str, Callable[[Tensor, Case], Tensor]] = {"PyTorch": slabwise}
        if threads == options.threads[0]:
            peers["nnU-Net"] = nnunet
        for case in SMALL if options.small else CASES:
            row = {"threads": threads, **measure(case, {} if options.ours else peers)}
            rows.append(row)
            times = ", ".join(f"{name} {value:.3f} s" for name, value in row["seconds"].items())
            extra = row["peak_extra_bytes"] / 2**20
            print(
                f"{case.classes} x {case.source} -> {case.target}, {threads} threads: {times}; "
                f"{extra:.0f} MiB; {row.get('checked', '')}",
                flush=True,
            )
    if options.json:
        machine = harness.machine(CPU)
        if machine["cpu_capability"] == "avx512" and not options.ours:
            for row, lower in zip(rows, with_avx2(options), strict=True):
                row["seconds"]["voxfuse, AVX2"] = lower["seconds"]["voxfuse"]
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def with_avx2(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of ours alone, measured in a process that has AVX2 only."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks.resample_benchmark", "--ours"]
        command += ["--json", file.name, "--threads", *map(str, options.threads)]
        command += ["--small"] * options.small
        environment = {**os.environ, "VOXFUSE_CPU_CAPABILITY": "avx2"}
        subprocess.run(command, check=True, env=environment)
        rows: list[dict[str, Any]] = json.loads(Path(file.name).read_text())["rows"]
    return rows


if __name__ == "__main__":
    main()
