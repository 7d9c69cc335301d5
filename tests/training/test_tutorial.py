"""The tutorial from a folder to a report: its commands, as they stand on the page."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import nibabel
import numpy as np
import pytest

from voxfuse import cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/tutorials/lesions_to_report.md"

pytestmark = pytest.mark.usefixtures("one_thread")

#: A run of seconds; all else is the page's.
REDUCED = ["training.steps=4", "network.features=[4, 8]", "training.threads=1"]


def commands(page):
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in re.findall(r"^\$ (.*)$", block.replace("\\\n", " "), re.M):
            yield shlex.split(line, comments=True)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """What the commands find in a clone, the head with every third voxel."""
    head = nibabel.load(ROOT / "data/head_mr/ch2bet.nii.gz")
    coarse = nibabel.Nifti1Image(
        np.asarray(head.dataobj)[::3, ::3, ::3], head.affine @ np.diag([3, 3, 3, 1])
    )
    (tmp_path / "data/head_mr").mkdir(parents=True)
    nibabel.save(coarse, tmp_path / "data/head_mr/ch2bet.nii.gz")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_page_run_in_order(clone, capsys):
    done = []
    for program, *arguments in commands(PAGE):
        if program == "pip":
            continue
        assert program == "voxfuse"
        if arguments[0] == "train":
            arguments += [x for setting in REDUCED for x in ("--set", setting)]
        assert cli.main(arguments) == 0, (arguments, capsys.readouterr().err)
        done.append(arguments[0])
    assert done == ["simulate", "train", "simulate", "predict", "evaluate"]

    with (clone / "run/test.csv").open() as file:
        tested = {row["subject"] for row in csv.DictReader(file)}
    assert tested == {"ch2bet-sim0-010", "ch2bet-sim0-011"}
    new = sorted(path.name for path in (clone / "new").iterdir() if path.is_dir())
    assert len(new) == 3
    found = sorted(path.name for path in (clone / "predictions").glob("*.nii.gz"))
    assert found == [f"{name}.nii.gz" for name in new]
    results = json.loads((clone / "report/results.json").read_text())
    assert [row["subject"] for row in results["subjects"]] == new
    assert "<img" in (clone / "report/report.html").read_text()
