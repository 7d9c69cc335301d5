"""resample_argmax's Triton kernel: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.ops.resample_argmax.cases import ResampleCase, arguments, check, random_case

pytest.importorskip("triton", reason="the package triton is not installed")

pytestmark = pytest.mark.filterwarnings(
    # NumPy, which computes in the interpreter's place of a GPU, warns of NaN and infinities.
    "ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(case: ResampleCase) -> None:
    check(case, torch.ops.voxfuse_triton.resample_argmax, DEVICE)


@pytest.mark.parametrize("part", range(2))
def test_random_calls(part):
    for seed in range(3000 + part, 3100, 2):
        run(random_case(seed, most=8))


def test_several_blocks_of_a_slice():
    for mode in ("labels", "mask", "regions"):
        case = ResampleCase(mode, source=(2, 9, 30), target=(3, 13, 50))
        run(case)
        run(dataclasses.replace(case, order=(0, 1, 1), special=True))


def test_a_table_that_points_outside_reads_within():
    """Without waiting for the device it cannot be refused."""
    input = torch.arange(3.0, device=DEVICE)[None]
    index = torch.tensor([-7, 2, 9, 1], device=DEVICE)
    weight = torch.tensor([[1.0, 0.5, 0.5, 0.5], [0.0, 0.5, 0.5, 0.5]], device=DEVICE)
    out = torch.zeros(1, 4, device=DEVICE)
    operator = torch.ops.voxfuse_triton.resample_argmax
    operator(out, input, [index], [weight], 3, 0.0, [], False)
    assert out.tolist() == [[0.0, 2.0, 2.0, 1.5]]


@pytest.mark.skipif(DEVICE == "cuda", reason="the property is the wrapper's, not the device's")
def test_opcheck():
    given = arguments(ResampleCase("regions"))
    torch.library.opcheck(torch.ops.voxfuse_triton.resample_argmax.default, given)
