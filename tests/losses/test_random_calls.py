"""Seeded random calls of fourteen losses; random_calls.py runs as many as asked for."""

from __future__ import annotations

import pytest

from tests.losses.random_calls import LOSSES, complaint
from voxfuse import _library

needs_library = pytest.mark.skipif(
    not _library.defines_operators(), reason="the compiled CPU library is not built"
)


@needs_library
@pytest.mark.parametrize("index", range(len(LOSSES)), ids=LOSSES)
def test_random_calls_agree_with_the_reference(index):
    found = {seed: complaint(seed) for seed in range(index, 60 * len(LOSSES), len(LOSSES))}
    assert not {seed: text for seed, text in found.items() if text is not None}


@needs_library
def test_a_certain_class_with_almost_all_of_a_soft_target():
    """Its likelihood's gradient is what the others' shares leave, never a difference from 1."""
    assert complaint(2653) is None
