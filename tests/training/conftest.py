"""Phantoms for the tests of training, and where real scans are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

nibabel = pytest.importorskip("nibabel", reason="scans are NIfTI files")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def heads(tmp_path_factory):
    """Three phantoms: a, b and c."""
    from tests.training.phantom import write_heads

    return write_heads(tmp_path_factory.mktemp("heads"), ["a", "b", "c"])


@pytest.fixture
def ms_lesions():
    """The folder of MS lesions: below VOXFUSE_DATA, or ../shared/data beside the project."""
    folder = Path(os.environ.get("VOXFUSE_DATA", ROOT.parent / "shared" / "data")) / "ms_lesions"
    if not folder.is_dir():
        pytest.skip(f"there are no scans in {folder}: set VOXFUSE_DATA to the folder above")
    return folder
