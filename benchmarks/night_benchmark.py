"""What a night's batch takes beside its network: reading the next study, writing the last one.

    python -m benchmarks.night_benchmark --json FILE

``voxfuse predict`` on 18 generated NIfTI files of about 96^3 voxels, one patch each, with a network
that sleeps for a second a call, so that what is measured is everything else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness

STUDIES, EDGE, SECONDS = 18, 96, 1.0


class Sleeping(nn.Module):
    """Takes its time; says no more than that intensities are above 1/2."""

    def forward(self, patches: Tensor) -> Tensor:
        """Two channels of (B, 1, \\*patch)."""
        time.sleep(SECONDS)
        return torch.cat([torch.zeros_like(patches), patches - 0.5], 1)


def main() -> None:
    from voxfuse import cli

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "in").mkdir()
        for k in range(STUDIES):
            scan = random.random((EDGE, EDGE + k % 9, EDGE), np.float32)
            nibabel.save(nibabel.Nifti1Image(scan, np.eye(4)), folder / f"in/study_{k:02}.nii.gz")
        (folder / "model.py").write_text(
            "from benchmarks.night_benchmark import Sleeping\nnetwork = Sleeping().eval()\n"
        )
        arguments = ["--input", f"{folder}/in", "--output", f"{folder}/out", "--device", "cpu"]
        patch = ["--patch", str(EDGE), "112", str(EDGE)]
        status = cli.main(["predict", "--model", f"{folder}/model.py:network", *arguments, *patch])
        assert status == 0
        summary = json.loads((folder / "out/summary.json").read_text())
    found = {
        "benchmark": "night",
        "studies": STUDIES,
        "edge": EDGE,
        "seconds": summary["seconds"],
        "network_seconds": summary["network_seconds"],
        "share": summary["network_seconds"] / summary["seconds"],
        "machine": harness.machine(torch.device("cpu")),
    }
    print(f"{found['share']:.1%} of {found['seconds']:.1f} s is the network's")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
