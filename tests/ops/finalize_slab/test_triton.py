"""finalize_slab's Triton kernel: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import pytest
import torch

from tests.ops.finalize_slab.cases import ACTIVATIONS, FLOATS, INTEGERS, MODES, SlabCase, check
from voxfuse.ops.finalize_slab import finalize_slab

pytest.importorskip("triton", reason="the package triton is not installed")
from voxfuse.triton_kernels import finalize_slab as kernels

pytestmark = pytest.mark.filterwarnings(
    # NumPy, which computes in the interpreter's place of a GPU, warns of infinities.
    "ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(case: SlabCase) -> None:
    check(case, torch.ops.voxfuse_triton.finalize_slab, DEVICE)


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_modes_and_activations(mode, activation, applied):
    for channels, real in ((1, torch.float32), (5, torch.float32), (21, torch.float64)):
        run(SlabCase(mode, activation, channels, applied=applied, real=real))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", ["values", "labels", "mask", "foreground"])
def test_head(mode, activation):
    for classes in (1, 4, 19):
        run(SlabCase(mode, activation, channels=6, classes=classes, divisor=3.0, total=True))
    run(SlabCase("entropy", "softmax", channels=6, classes=19))
    run(SlabCase("entropy", "sigmoid", channels=2, classes=3, real=torch.float64))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", ["values", "foreground", "entropy"])
def test_floating_results(mode, dtype):
    run(SlabCase(mode, "softmax", dtype=dtype, total=True, fill=0.25))
    run(SlabCase(mode, "softmax", dtype=dtype, real=torch.float64))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_type(dtype):
    run(SlabCase("labels", channels=70, dtype=dtype, total=True, fill=9))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("fill", [0.0, 0.5, 1.0, 2.0])
def test_masks_are_0_or_1_uncovered_voxels_included(dtype, fill):
    run(SlabCase("mask", dtype=dtype, total=True, fill=fill))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", ["values", "labels", "mask", "foreground", "entropy"])
def test_nan_infinity_and_ties(mode, activation):
    for channels in (1, 2, 8, 20):
        run(SlabCase(mode, activation, channels, extent=(4, 9, 10), special=True))


@pytest.mark.parametrize("divisor", [1.0, 3.0, 0.1])
@pytest.mark.parametrize("clear", [False, True])
def test_divisor_and_clearing(divisor, clear):
    for real in (torch.float32, torch.float64):
        for mode in MODES:
            run(SlabCase(mode, "none", 11, divisor=divisor, clear=clear, real=real))


@pytest.mark.parametrize("ring_axis", [0, 1, 2])
def test_any_axis_and_place_of_the_ring(ring_axis):
    for start, slices in ((0, 3), (1, 3), (5, 2), (7, 1), (4, 0)):
        for mode in ("labels", "values"):
            place = dict(ring_axis=ring_axis, start=start, slices=slices, into_volume=slices > 0)
            run(SlabCase(mode, extent=(3, 5, 4), total=True, fill=3, **place))
            run(SlabCase(mode, "softmax", 20, extent=(3, 33, 41), **place))


@pytest.mark.parametrize("extent", [(5,), (1100,), (4, 700)])
def test_any_number_of_axes_and_several_blocks(extent):
    slices = extent[0] - 1
    run(SlabCase("labels", extent=extent, start=3, slices=slices))
    run(SlabCase("entropy", "softmax", 20, extent=extent, start=3, slices=slices))


def test_infinite_logits_of_a_whole_block_of_classes_are_probabilities_of_0():
    ring = torch.full((20, 6), -float("inf"))
    ring[17] = 2.0
    ring[18] = 1.0
    out = torch.empty_like(ring, device=DEVICE)
    finalize_slab(ring.to(DEVICE), out, activation="softmax", backend="triton")
    torch.testing.assert_close(out.cpu(), ring.softmax(0))
    assert kernels.TILE < 17


def test_the_same_bits_in_every_run():
    ring = torch.randn(20, 5, 60, device=DEVICE)
    out = [torch.empty_like(ring) for _ in range(2)]
    for o in out:
        finalize_slab(ring, o, activation="softmax", backend="triton")
    assert torch.equal(*out)


@pytest.mark.skipif(DEVICE == "cuda", reason="the property is the wrapper's, not the device's")
def test_opcheck():
    ring = torch.randn(3, 4, 5)
    arguments = (ring, torch.empty(1, 2, 5), None, None, None, 0, 3, 5, 2, False, 4)
    operator = torch.ops.voxfuse_triton.finalize_slab.default
    torch.library.opcheck(operator, (*arguments, 1.0, 0.5, 0.0, False))
