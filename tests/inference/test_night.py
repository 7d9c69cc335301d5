"""Forty studies in a night: what fails is named and stops nothing, and nobody waits for files."""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.inference.test_studies import intensities, predict, read, write
from voxfuse.inference.models import Network
from voxfuse.inference.night import Night, Target
from voxfuse.inference.segmenters import NetworkOptions, NetworkSegmenter
from voxfuse.training.config import DataOptions, PredictionOptions
from voxfuse.training.dataset import Subject

COUNT = 40
SPOILT = {"s07": "corrupt", "s19": "shape", "s31": "nan"}
OPTIONS = ["--patch", 16]


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A folder of 40 studies of mixed sizes in two channels, three of them spoilt."""
    folder = tmp_path_factory.mktemp("night")
    for k in range(COUNT):
        name = f"s{k:02d}"
        shape = (16 + k % 5, 17 + k % 7, 14 + k % 3)
        first, second = intensities(shape, k) * 0, intensities(shape, k)
        if SPOILT.get(name) == "shape":
            second = second[1:]
        if SPOILT.get(name) == "nan":
            second[3, 4, 5] = np.nan
        write(folder / f"{name}_0000.nii.gz", first)
        path = write(folder / f"{name}_0001.nii.gz", second)
        if SPOILT.get(name) == "corrupt":
            path.write_bytes(path.read_bytes()[:-300])
    return folder


def states(out):
    return {name: s["state"] for name, s in json.loads((out / "summary.json").read_text())[
        "studies"
    ].items()}  # fmt: skip


def test_forty_studies_of_which_three_are_spoilt(studies, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict("of_two_channels", studies, out, *OPTIONS) == 3
    printed = capsys.readouterr()
    listed = printed.err[printed.err.index("3 of 40 failed:") :].splitlines()[1:]
    assert len(listed) == 3
    for line, expected in zip(
        listed,
        [
            r"  s07: s07: .*s07_0001.nii.gz: cannot be read",
            r"  s19: s19: .* has shape \(19, 22, 15\), but .* has \(20, 22, 15\)",
            r"  s31: s31: .*s31_0001.nii.gz is nan at \(3, 4, 5\), expected finite numbers",
        ],
        strict=True,
    ):
        assert re.match(expected, line), line
    assert "left" in printed.out.splitlines()[0]
    assert "left" not in printed.out.splitlines()[COUNT - 1]
    written = sorted(path.name for path in out.glob("*.nii.gz"))
    assert written == [f"s{k:02d}.nii.gz" for k in range(COUNT) if f"s{k:02d}" not in SPOILT]
    for k in (0, 8, 39):
        expected = intensities((16 + k % 5, 17 + k % 7, 14 + k % 3), k)
        assert np.array_equal(read(out / f"s{k:02d}.nii.gz"), expected)
    assert not list(out.rglob("*.part"))
    assert sum(state == "done" for state in states(out).values()) == 37

    done = json.loads((out / "status/s08.json").read_text())
    assert done["state"] == "done"
    assert set(done["seconds"]) == {"read", "predict", "network", "write"}
    assert {"voxfuse", "torch", "numpy", "python"} <= set(done["versions"])
    assert len(done["inputs"]) == 2
    assert done["shape"] == [19, 18, 16]
    assert sum(done["voxels"].values()) == 19 * 18 * 16
    failed = (out / "status/s31.json").read_text()
    assert "is nan at (3, 4, 5)" in failed
    for path in (out / "status").iterdir():  # a name may be a patient's
        assert path.stem not in path.read_text()

    # Another night does what is missing, or what would be another's.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    (out / "s03.nii.gz").unlink()
    assert predict("of_two_channels", studies, out, *OPTIONS, "--skip-existing") == 3
    after = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert [path.name for path in after if after[path] != before[path]] == ["s03.nii.gz"]
    assert sum(state == "kept" for state in states(out).values()) == 36
    assert predict("of_two_channels", studies, out, "--patch", 15, "--skip-existing") == 3
    assert sum(state == "kept" for state in states(out).values()) == 0


class Paced:
    """A night of one-patch studies, whose reading, predicting and writing a test holds up."""

    def __init__(self, folder, count, **options):
        self.studies = [
            Subject(f"t{k}", (write(folder / f"t{k}.nii.gz", intensities((16,) * 3, k)),), None)
            for k in range(count)
        ]
        self.targets = [Target(folder / f"out/t{k}.nii.gz") for k in range(count)]
        self.read = [threading.Event() for _ in range(count)]
        self.written = [threading.Event() for _ in range(count)]
        self.number = -1  # of the study that is predicted
        network = Network(self.predict, torch.device("cpu"), "module", "paced")
        data = DataOptions(mask="all", normalisation="none")
        chosen = NetworkOptions((16,) * 3, data, PredictionOptions(batch=1), 1, "sigmoid")
        self.segmenter = NetworkSegmenter(network, chosen)
        own = self.segmenter.read

        def reading(study):
            volume = own(study)
            self.when_read(int(study.name[1:]))
            return volume

        self.segmenter.read = reading
        self.night = Night(self.segmenter, self.write, **options)

    def when_read(self, k):
        self.read[k].set()

    def predict(self, patches):
        self.number += 1
        self.when_predicted(self.number)
        return patches - 0.5

    def when_predicted(self, k):
        pass

    def write(self, segmentation, placement, target):
        k = [own.path.name for own in self.targets].index(target.path.name)
        self.when_written(k)
        target.path.write_bytes(b"written")
        self.written[k].set()

    def when_written(self, k):
        pass

    def run(self):
        return {o.name: o for o in self.night.run(self.studies, self.targets)}


def test_the_next_study_is_read_and_the_last_written_while_one_is_predicted(tmp_path):
    paced = Paced(tmp_path, 5)

    def when_predicted(k):
        """Neither comes if nobody reads or writes meanwhile."""
        assert k == 4 or paced.read[k + 1].wait(20)
        assert k == 0 or paced.written[k - 1].wait(20)

    paced.when_predicted = when_predicted
    outcomes = paced.run()
    assert [o.state for o in outcomes.values()] == ["done"] * 5, outcomes


@pytest.mark.parametrize("part", ["read", "predicted", "written"])
def test_a_study_that_takes_too_long_has_failed_and_the_others_are_done(tmp_path, part):
    paced = Paced(tmp_path, 4, timeout=0.4)
    forever = threading.Event()

    def hold_up(k):
        if k == 1:
            # A call of the network is not interrupted: the next one does not begin.
            forever.wait(1.0 if part == "predicted" else None)
        if part == "read":
            paced.read[k].set()

    setattr(paced, f"when_{part}", hold_up)
    if part == "predicted":
        paced.studies[1] = Subject(
            "t1", (write(tmp_path / "t1.nii.gz", intensities((16, 16, 40))),), None
        )
        numbers = iter([0, 1, 2, 3])
        paced.when_predicted = lambda _: hold_up(next(numbers))
    paced.targets[1] = replace(paced.targets[1], status=tmp_path / "out/status/t1.json")
    earlier = paced.targets[1].path
    earlier.parent.mkdir()
    earlier.write_bytes(b"of another night")
    outcomes = paced.run()
    forever.set()
    if part == "written":  # what comes too late takes no place
        assert paced.written[1].wait(20)
        for _ in range(200):
            if not list(earlier.parent.glob(".t1*")):
                break
            time.sleep(0.05)
    assert not list(earlier.parent.glob(".*"))
    assert earlier.read_bytes() == b"of another night"
    assert json.loads(paced.targets[1].status.read_text())["state"] == "failed"
    assert {n: o.state for n, o in outcomes.items()} == {
        "t0": "done", "t1": "failed", "t2": "done", "t3": "done",
    }  # fmt: skip
    assert outcomes["t1"].error == "took longer than --timeout allows"


def test_names_that_are_one_file_are_one_study(tmp_path):
    """As A and a are on some file systems; also of processes that began at the same time."""
    paced = Paced(tmp_path, 3, overwrite=True)
    paced.targets[1] = replace(paced.targets[0])
    outcomes = paced.run()
    assert [o.state for o in outcomes.values()] == ["done", "failed", "done"]
    assert "t0.nii.gz is another study's of this batch" in outcomes["t1"].error

    (tmp_path / "again").mkdir()
    late = Paced(tmp_path / "again", 1)
    late.targets[0] = replace(late.targets[0], status=tmp_path / "again/out/status/t0.json")

    def when_predicted(_):
        late.targets[0].status.parent.mkdir(parents=True)
        late.targets[0].path.write_bytes(b"another's")
        late.targets[0].status.write_text('{"state": "done", "inputs": ["sha256:0"]}')

    late.when_predicted = when_predicted
    assert late.run()["t0"].refused
    assert late.targets[0].path.read_bytes() == b"another's"
    assert json.loads(late.targets[0].status.read_text())["state"] == "done"


def test_a_network_that_is_not_finite_fails_the_study(tmp_path, capsys):
    write(tmp_path / "in/a.nii.gz", intensities())
    assert predict("not_finite", tmp_path / "in", tmp_path / "out", *OPTIONS) == 1
    assert "the network's predictions are not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.nii.gz"))
    assert json.loads((tmp_path / "out/status/a.json").read_text())["state"] == "failed"


def test_quiet_says_nothing_but_failures(studies, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    for name in ("s06", "s07"):
        for channel in (0, 1):
            (few / f"{name}_{channel:04d}.nii.gz").symlink_to(
                studies / f"{name}_{channel:04d}.nii.gz"
            )
    assert predict("of_two_channels", few, tmp_path / "out", *OPTIONS, "--quiet") == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 2
