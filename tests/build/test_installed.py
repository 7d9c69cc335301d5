"""What others build upon: types seen from outside, a bundle of MONAI's, an exported network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import voxfuse

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """\
import torch
import voxfuse

logits, labels = torch.zeros(1, 2, 8), torch.zeros(1, 1, 8)
loss = voxfuse.TverskyLoss(alpha=0.3, beta=0.7)
reveal_type(loss(logits, labels))  # Tensor
reveal_type(loss(logits, labels, return_sums=True)[1].dice())  # Tensor
reveal_type(voxfuse.functional.dice_ce_loss(logits, labels))  # Tensor
voxfuse.TverskyLoss(alpah=0.3)  # error: "alpah" .* did you mean "alpha"
voxfuse.TverskyLoss(alpha="large")  # error: incompatible type "str"; expected "float"
loss(logits, labels, wieght=labels)  # error: No overload variant
voxfuse.functional.tversky_loss(logits, labels, gama=2.0)  # error: "gama" .* did you mean "gamma"
"""


def test_a_users_type_checker_knows_losses_and_their_options(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-color-output", "--cache-dir", "cache", script.name],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said: dict[int, str] = {}
    for found in re.finditer(r"^script\.py:(\d+): (?:error|note): (.*)$", run.stdout, re.MULTILINE):
        said[int(found[1])] = said.get(int(found[1]), "") + found[2]
    for number, line in enumerate(SCRIPT.splitlines(), 1):
        _, _, expected = line.partition("  # ")
        message = re.sub(r"\b(torch\._tensor|voxfuse[\w.]*)\.", "", said.get(number, ""))
        if expected.startswith("error: "):
            assert re.search(expected.removeprefix("error: "), message), (line, run.stdout)
        elif expected:
            assert message == f'Revealed type is "{expected}"', (line, run.stdout)
        else:
            assert not message, (line, run.stdout)


STEP = [
    "$@optimizer.zero_grad()",
    "$@loss(@network(@image), @label).backward()",
    "$@optimizer.step()",
]
BUNDLE = {
    "imports": ["$import torch"],
    "image": "$torch.rand(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))",
    "label": "$(@image > 0.5).long()",
    "network": {
        "_target_": "torch.nn.Conv3d",
        "in_channels": 1,
        "out_channels": 2,
        "kernel_size": 1,
    },
    "loss": {"_target_": "voxfuse.TverskyLoss", "alpha": 0.3, "beta": 0.7},
    "optimizer": {"_target_": "torch.optim.Adam", "params": "$@network.parameters()", "lr": 0.2},
    "inferer": {
        "_target_": "voxfuse.integrations.monai.SlidingWindowInferer",
        "roi_size": [8, 8, 8],
        "mode": "gaussian",
    },
    "training": [
        "$@loss(@network(@image), @label).item()",
        *STEP * 15,
        "$@loss(@inferer(@image, @network), @label).item()",
        "$type(@loss)",
    ],
}


def test_a_bundle_of_monais_trains_and_infers(tmp_path):
    bundle = pytest.importorskip("monai.bundle", reason="MONAI is not installed")
    file = tmp_path / "train.json"
    file.write_text(json.dumps(BUNDLE))
    torch.manual_seed(0)
    workflow = bundle.ConfigWorkflow(
        config_file=str(file), workflow_type="train", run_id="training", logging_file=False
    )
    workflow.initialize()
    before, *_, after, kind = workflow.run()
    assert kind is voxfuse.TverskyLoss
    assert after < 0.8 * before


def test_the_exported_network_predicts_what_the_network_does():
    pytest.importorskip("nibabel", reason="needs the extra demo: nibabel")
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "exported_network.py"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert re.search(r"^torch\.export: .* [1-9]\d{4,} voxels of brain", run.stdout, re.MULTILINE)


def test_the_citation_is_of_this_version_and_of_the_papers_that_the_readme_names():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {voxfuse.__version__}\n" in text
    papers = set(re.findall(r"https://arxiv\.org/abs/[\d.]+", text))
    assert len(papers) == 3
    named = re.findall(r"https://arxiv\.org/abs/[\d.]+", (ROOT / "README.md").read_text())
    assert papers == set(named)


def test_a_build_says_in_a_line_what_is_missing(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "CXX"}
    environment |= {"PATH": str(tmp_path), "VOXFUSE_BUILD": "1"}

    def last_line() -> str:
        run = subprocess.run(
            [sys.executable, "setup.py", "build_ext"],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode != 0
        return run.stderr.splitlines()[-1]

    assert re.search("CMake was not found.*or set VOXFUSE_BUILD=0", last_line())
    (tmp_path / "cmake").touch(mode=0o755)
    assert re.search(r"no C\+\+ compiler was found \(c\+\+ or g\+\+ or clang\+\+\)", last_line())
    environment["CXX"] = "icpx -O2"
    assert "no C++ compiler was found (icpx)" in last_line()
