"""Real scans for the tests that carry the marker ``data``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ms_lesions():
    """The folder of MS lesions: below VOXFUSE_DATA, or ../shared/data beside the project."""
    folder = Path(os.environ.get("VOXFUSE_DATA", ROOT.parent / "shared" / "data")) / "ms_lesions"
    if not folder.is_dir():
        pytest.skip(f"there are no scans in {folder}: set VOXFUSE_DATA to the folder above")
    return folder
