"""Phantoms for the tests of training."""

from __future__ import annotations

import pytest

nibabel = pytest.importorskip("nibabel", reason="scans are NIfTI files")


@pytest.fixture(scope="session")
def heads(tmp_path_factory):
    """Three phantoms: a, b and c."""
    from tests.training.phantom import write_heads

    return write_heads(tmp_path_factory.mktemp("heads"), ["a", "b", "c"])
