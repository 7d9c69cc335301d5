"""Seeded random calls of fourteen losses; random_calls.py runs as many as asked for."""

from __future__ import annotations

import pytest

from tests.losses import random_calls
from tests.losses.random_calls import LOSSES, complaint, is_rounding
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


@needs_library
def test_what_one_voxel_loses_is_told_from_a_fault(monkeypatch):
    """A cancelling voxel's error is plain float32's beside it; 1e-4 of any gradient is not."""
    assert complaint(54096) is not None
    assert is_rounding(54096)
    right = random_calls.value_and_gradient

    def faulty(backend, *arguments):
        value, gradient = right(backend, *arguments)
        return value, gradient * 1.0001 if backend == "auto" else gradient

    monkeypatch.setattr(random_calls, "value_and_gradient", faulty)
    assert all(complaint(seed) is not None for seed in range(len(LOSSES)))
    assert not any(is_rounding(seed) for seed in range(len(LOSSES)))
