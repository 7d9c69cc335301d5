"""A job in a process of its own, to be killed: ``python -m tests.scale.killed zarr 60``.

Kills a job that many times at random moments, looks after each at what is there, has it done in the
end, and compares the bits.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from voxfuse.scale import Job, create_destination, open_destination

SHAPE, ROI = (72, 20, 18), (12, 10, 8)
BOX = (9, 20, 18)
OPTIONS = {"output": "labels", "normalisation": "zscore"}


def volume():
    return np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)


class Slow:
    """A network that takes a while, so that there is something to interrupt."""

    def __init__(self, seconds):
        self._seconds = seconds

    def __call__(self, patches):
        time.sleep(self._seconds)
        ramp = torch.arange(patches[0].numel()).reshape(patches[0].shape)
        x = patches / 100 + (ramp * 0.37).sin()
        return torch.cat([x, (3 * x).cos(), x * x - 0.4], 1)


def destination(path, kind):
    """Labels in a file, or in a Zarr array of six shards a box; made where they are not there."""
    if kind == "file":
        return np.memmap(path, np.uint8, "r+" if path.exists() else "w+", shape=SHAPE)
    if not path.exists():
        create_destination(path, SHAPE, np.uint8, chunks=3, shards=9)
    return open_destination(path)


def job(folder, kind, seconds):
    out = destination(Path(folder) / "labels", kind)
    return Job(volume(), out, ROI, Slow(seconds), 4, box=BOX, **OPTIONS)


def work(folder, kind, seconds):
    """Do what is left of it; the parent kills this."""
    torch.set_num_threads(1)
    each = job(folder, kind, seconds)
    (Path(folder) / "begun").write_text(str(os.getpid()))
    each.run(folder)


def markers(folder):
    return sorted(int(path.stem) for path in (folder / "done").glob("[0-9]*.json"))


def seen_after(folder, kind, expected):
    """Whether what is there is right, and what a kill has left of boxes that are not done."""
    done, begun, wrong, parts = markers(folder), 0, 0, 0
    out = destination(folder / "labels", kind)
    for number, low in enumerate(range(0, SHAPE[0], BOX[0])):
        place = (slice(low, low + BOX[0]), slice(0, SHAPE[1]), slice(0, SHAPE[2]))
        if kind == "file":
            wrong += number in done and not np.array_equal(out[place], expected[place])
            continue
        # A shard that is there is whole, and has the bits it will have in the end.
        there = [shard for shard in out.shards(place) if out.written(shard)]
        out_of = len(list(out.shards(place)))
        wrong += sum(not np.array_equal(out[shard], expected[shard]) for shard in there)
        wrong += number in done and len(there) < out_of
        begun += number not in done and bool(there)
    if kind == "zarr":
        parts = len(list((folder / "labels").rglob(".*.part")))
    return {"done": len(done), "begun": begun, "parts": parts, "wrong": int(wrong)}


def interrupted(folder, kind, kills, seconds, longest, seed, expected):
    """Kill the job up to ``kills`` times after at most ``longest`` seconds, then let it end.

    Returns what was seen after each.
    """
    draw, seen = random.Random(seed), []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["voxfuse.scale", "zarr"])
    begun = folder / "begun"
    for _ in range(kills):
        begun.unlink(missing_ok=True)
        process = context.Process(target=work, args=(str(folder), kind, seconds))
        process.start()
        while not begun.exists() and process.is_alive():
            time.sleep(0.002)
        time.sleep(draw.uniform(0, longest))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if len(markers(folder)) == SHAPE[0] // BOX[0]:
            break  # it ended by itself, or might have
        seen.append(seen_after(folder, kind, expected))
    process = context.Process(target=work, args=(str(folder), kind, 0.0))
    process.start()
    process.join()
    assert process.exitcode == 0
    return seen


def result_of(folder, kind):
    """What is there in the end, checksums compared, without what killed writers have left."""
    out = destination(folder / "labels", kind)
    if kind == "zarr":
        out.sweep()
        out.check()
        assert not list((folder / "labels").rglob(".*.part"))
    return np.array(out[tuple(slice(0, size) for size in SHAPE)])


def result_of_one_box(folder):
    """What a single process makes of it."""
    expected = np.zeros(SHAPE, np.uint8)
    whole = Job(volume(), expected, ROI, Slow(0.0), 4, box=SHAPE, **OPTIONS)
    whole.prepare(folder)
    whole.run(folder)
    return expected


def main(kind, kills):
    with tempfile.TemporaryDirectory() as folder:
        expected = result_of_one_box(Path(folder) / "whole")
        bad, rounds, total = 0, 0, 0
        while total < kills:
            place = Path(folder) / str(rounds)
            place.mkdir()
            job(place, kind, 0.0).prepare(place)
            # By turns most of the time goes to predictions and to writing.
            seconds, longest = ((0.01, 0.9), (0.0, 0.4))[rounds % 2]
            count = min(12, kills - total)
            seen = interrupted(place, kind, count, seconds, longest, rounds, expected)
            total, rounds = total + len(seen), rounds + 1
            different = int((result_of(place, kind) != expected).sum())
            bad += different + sum(each["wrong"] for each in seen)
            print(json.dumps({"killed": total, "seen": seen, "different": different}), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
