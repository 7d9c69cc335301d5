"""A job in a process of its own, to be killed: ``python -m tests.scale.killed 60``.

Kills a job that many times at random moments, has it done in the end, and compares the bits.
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

from voxfuse.scale import Job

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


def job(path, seconds):
    """The job on a file of labels."""
    mode = "r+" if Path(path).exists() else "w+"
    out = np.memmap(path, np.uint8, mode, shape=SHAPE)
    return Job(
        volume(), out, ROI, Slow(seconds), 4, box=BOX, output="labels", normalisation="zscore"
    )


def work(folder, seconds):
    """Do what is left of it; the parent kills this."""
    torch.set_num_threads(1)
    each = job(Path(folder) / "labels", seconds)
    (Path(folder) / "begun").write_text(str(os.getpid()))
    each.run(folder)


def interrupted(folder, kills, seconds, seed):
    """Kill the job up to ``kills`` times at random moments, then let it end.

    Returns how many boxes were done after each.
    """
    draw, seen = random.Random(seed), []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["voxfuse.scale"])
    begun = Path(folder) / "begun"
    for _ in range(kills):
        begun.unlink(missing_ok=True)
        process = context.Process(target=work, args=(str(folder), seconds))
        process.start()
        while not begun.exists() and process.is_alive():
            time.sleep(0.002)
        # A box takes some 15 calls.
        time.sleep(draw.uniform(0, 90 * seconds))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        done = len(list((Path(folder) / "done").glob("[0-9]*.json")))
        if done == SHAPE[0] // BOX[0]:
            break  # it ended by itself, or might have
        seen.append(done)
    process = context.Process(target=work, args=(str(folder), 0.0))
    process.start()
    process.join()
    assert process.exitcode == 0
    return seen


def result_of_one_box(folder):
    """What a single process makes of it."""
    expected = np.zeros(SHAPE, np.uint8)
    whole = Job(volume(), expected, ROI, Slow(0.0), 4, box=SHAPE, **OPTIONS)
    whole.prepare(folder)
    whole.run(folder)
    return expected


def main(kills):
    with tempfile.TemporaryDirectory() as folder:
        expected = result_of_one_box(Path(folder) / "whole")
        equal, rounds, total = True, 0, 0
        while total < kills:
            place = Path(folder) / str(rounds)
            place.mkdir()
            job(place / "labels", 0.0).prepare(place)
            seen = interrupted(place, min(12, kills - total), 0.01, rounds)
            total, rounds = total + len(seen), rounds + 1
            result = np.fromfile(place / "labels", np.uint8).reshape(SHAPE)
            equal = equal and np.array_equal(result, expected)
            print(json.dumps({"killed": total, "boxes_done": seen, "equal": bool(equal)}))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
