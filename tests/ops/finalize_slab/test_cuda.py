"""finalize_slab's CUDA kernel, emulated on the host under sanitizers, against the reference."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.emulation import emulator
from tests.ops.finalize_slab import cases
from tests.ops.finalize_slab.cases import FLOATS, SlabCase

pytestmark = [emulator.NEEDED, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def finalize_slab() -> Iterator[Callable[..., None]]:
    operators = emulator.FinalizeSlab()
    yield operators.finalize_slab
    operators.close()


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("special", [False, True])
def test_finalize_modes_and_activations(finalize_slab, mode, activation, special):
    for channels, applied, real in itertools.product(
        (1, 2, 8, 21), (False, True), (torch.float32, torch.float64)
    ):
        case = SlabCase(mode, activation, channels, applied=applied, real=real, special=special)
        cases.check(case, finalize_slab)
        whole = dataclasses.replace(case, extent=(4, 6, 32), total=not special, fill=1)
        cases.check(whole, finalize_slab)


@pytest.mark.parametrize("mode", ["values", "labels", "mask", "foreground"])
def test_finalize_with_a_head(finalize_slab, mode):
    for activation, classes in itertools.product(cases.ACTIVATIONS, (1, 4, 19)):
        case = SlabCase(mode, activation, channels=6, classes=classes, divisor=3.0, total=True)
        cases.check(case, finalize_slab)
        cases.check(dataclasses.replace(case, real=torch.float64), finalize_slab)


def test_finalize_results_of_any_type(finalize_slab):
    for dtype in cases.INTEGERS:
        case = SlabCase("labels", channels=70, dtype=dtype, total=True, fill=9)
        cases.check(case, finalize_slab)
    for dtype, fill in itertools.product((torch.bool, torch.uint8), (0.0, 0.5, 2.0)):
        cases.check(SlabCase("mask", dtype=dtype, total=True, fill=fill), finalize_slab)
    for dtype, mode in itertools.product(FLOATS, ("values", "foreground", "entropy")):
        for real in (torch.float32, torch.float64):
            case = SlabCase(mode, "softmax", dtype=dtype, real=real, total=True, fill=0.25)
            cases.check(case, finalize_slab)


@pytest.mark.parametrize("ring_axis", [0, 1, 2])
def test_finalize_any_axis_and_place_of_the_ring(finalize_slab, ring_axis):
    for start, slices in ((0, 3), (1, 3), (5, 2), (7, 1), (4, 0)):
        for mode, extent in itertools.product(("labels", "values"), ((3, 5, 4), (3, 13, 41))):
            case = SlabCase(mode, extent=extent, ring_axis=ring_axis, start=start, slices=slices)
            case = dataclasses.replace(case, into_volume=slices > 0, clear=slices != 2)
            cases.check(case, finalize_slab)
            cases.check(dataclasses.replace(case, total=True, fill=3), finalize_slab)
