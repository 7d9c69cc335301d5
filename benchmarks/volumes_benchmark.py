"""A volume in Zarr, more than is ever in memory, to labels in Zarr: time by stage, memory by depth.

    python -m benchmarks.volumes_benchmark --depth 256 512 1024 --json FILE

A generated uint8 volume (depth, 512, 512) in chunks of 64 is predicted by a small network
(Conv3d(1, 8, 3), ReLU, Conv3d(8, 4, 3)) in patches of 96 with overlap 0.5, four at a time, and its
labels written in shards, by a ``voxfuse.scale.Job`` as its users run it: with the plan's own boxes.
Every run is a process of its own. Its seconds are split into the network, reading (decompression
included), writing (compression and the disk included) and the rest: cutting, fusion, what a job
keeps; once by the clock, and once in seconds of processors, which other programs on the machine
hardly change. Its peak is the resident memory above what was there when the network had been made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import harness
from benchmarks.nnunet_benchmark import Clock

EDGE, PATCH, OVERLAP, BATCH, CHUNK = 512, 96, 0.5, 4, 64


def write_volume(folder: Path, depth: int) -> None:
    """Blobs of 16 voxels with noise, 64 slices at a time."""
    import zarr

    random = np.random.default_rng(0)
    array = zarr.create_array(
        folder, shape=(depth, EDGE, EDGE), chunks=(CHUNK,) * 3, dtype="uint8", overwrite=True
    )
    for first in range(0, depth, CHUNK):
        blobs = random.integers(0, 200, (CHUNK // 16, EDGE // 16, EDGE // 16), dtype=np.uint8)
        slab = np.kron(blobs, np.ones((16, 16, 16), np.uint8))
        array[first : first + CHUNK] = slab + random.integers(0, 8, slab.shape, dtype=np.uint8)


def run(folder: Path, depth: int) -> dict[str, Any]:
    """Predict one volume; seconds by stage, peak memory, and that every shard is whole."""
    from voxfuse.scale import Job, Source, ZarrDestination, create_destination, open_source

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv3d(8, 4, 3, padding=1)
    ).eval()
    before = harness.status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    source = open_source(folder / "volume.zarr")
    labels = create_destination(folder / "labels.zarr", source.shape[1:], np.uint8, overwrite=True)
    options = {"overlap": OVERLAP, "output": "labels", "stream_axis": 0}
    job = Job(source, labels, (PATCH,) * 3, network, BATCH, **options)
    started = time.perf_counter()
    plan = job.prepare(folder / "job")
    prepared = time.perf_counter() - started
    wall, processor = Clock(), Clock(time.process_time)
    call = wall.timed("rest", processor.timed("rest", job.run))
    with contextlib.ExitStack() as stack:
        for clock in (processor, wall):
            stack.enter_context(clock.patched("network", nn.Sequential, "forward"))
            stack.enter_context(clock.patched("reading", Source, "__getitem__"))
            stack.enter_context(clock.patched("writing", ZarrDestination, "__setitem__"))
        call(folder / "job")
    peak = harness.status_bytes("VmHWM") - before
    assert job.remaining(folder / "job") == []
    labels.check()
    return {
        "depth": depth,
        "boxes": len(plan),
        "patches": sum(plan.patches),
        "extra_patches": plan.extra,
        "planned_bytes": plan.memory,
        "peak_bytes": peak,
        "cached_bytes": source.most_cached_bytes,
        "prepare_seconds": prepared,
        "seconds": wall.seconds,
        "processor_seconds": processor.seconds,
        "share_beside_network_and_reading": _share(wall.seconds),
        "processor_share_beside_network_and_reading": _share(processor.seconds),
    }


def _share(seconds: dict[str, float]) -> float:
    return (seconds["writing"] + seconds["rest"]) / sum(seconds.values())


def in_a_process(folder: Path, depth: int) -> dict[str, Any]:
    """The same in a process of its own, with a volume that is made before and removed after it."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        write_volume(Path(made) / "volume.zarr", depth)
        job = json.dumps([made, depth])
        command = [sys.executable, "-m", "benchmarks.volumes_benchmark", "--run", job]
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    times = ", ".join(f"{name} {value:.1f} s" for name, value in found["seconds"].items())
    share = found["share_beside_network_and_reading"]
    print(f"depth {depth}: {times}; {share:.1%}; {found['peak_bytes'] / 2**20:.0f} MiB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", nargs="+", type=int, default=[256], help="slices of 512 x 512")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where runs are added, by depth")
    parser.add_argument("--folder", type=Path, help="where volumes are; default the system's")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        folder, depth = json.loads(options.run)
        print(json.dumps(run(Path(folder), depth)))
        return
    found: dict[str, Any] = {
        "benchmark": "volumes",
        "edge": EDGE,
        "patch": PATCH,
        "overlap": OVERLAP,
        "batch": BATCH,
        "runs": [],
    }
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    for depth in options.depth:
        made = in_a_process(options.folder or Path(tempfile.gettempdir()), depth)
        kept = [each for each in found["runs"] if each["depth"] != depth]
        found["runs"] = sorted([*kept, made], key=lambda each: each["depth"])
        found["machine"] = harness.machine(torch.device("cpu"))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
