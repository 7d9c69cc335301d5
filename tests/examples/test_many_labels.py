"""The example of many labels: its quick form runs and gives the map back."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nibabel", reason="needs the extra demo: nibabel")

ROOT = Path(__file__).resolve().parents[2]


def test_the_quick_form_gives_the_map_back():
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "many_labels.py", "--quick"],
        capture_output=True,
        text=True,
        check=True,
    )
    agree = [float(share) for share in re.findall(r"([\d.]+)% of the voxels", run.stdout)]
    assert len(agree) == 2
    assert min(agree) > 95
