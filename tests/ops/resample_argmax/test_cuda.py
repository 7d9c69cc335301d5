"""resample_argmax's CUDA kernel, emulated on the host under sanitizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.emulation import emulator
from tests.emulation.resample_argmax import ResampleArgmax
from tests.ops.resample_argmax.cases import ResampleCase, arguments, check, random_case
from voxfuse import _library
from voxfuse.contract import Resampled

pytestmark = [emulator.NEEDED, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def resample_argmax() -> Iterator[Callable[..., None]]:
    operators = ResampleArgmax()
    yield operators.resample_argmax
    operators.close()


@pytest.mark.parametrize("part", range(2))
def test_random_calls(resample_argmax, part):
    for seed in range(1000 + part, 1200, 2):
        check(random_case(seed, most=12), resample_argmax)


@pytest.mark.skipif(
    not _library.defines_operators() or torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="no compiled CPU library, or a CPU without fused multiply-adds",
)
def test_the_bits_of_the_cpu(resample_argmax):
    for seed in range(2000, 2150):
        case = random_case(seed, most=12)
        ours, theirs = arguments(case), arguments(case)
        resample_argmax(*ours)
        torch.ops.voxfuse.resample_argmax(*theirs)
        assert torch.equal(ours[0].nan_to_num(77), theirs[0].nan_to_num(77)), case


def test_several_blocks_and_rows_that_end_in_any_place(resample_argmax):
    for rows in range(1, 10):
        case = ResampleCase(source=(2, 3, 30), target=(3, rows, 50))
        check(case, resample_argmax)
        check(dataclasses.replace(case, mode="mask", source=(2, 9, 30)), resample_argmax)


def test_regions_of_more_channels_than_a_launch_has_labels_for(resample_argmax):
    case = ResampleCase("regions", 300, (2, 2), (3, 3), (1, 1), out_dtype=torch.int64)
    for seed in range(3):
        check(dataclasses.replace(case, seed=seed), resample_argmax)
    # Most regions are true somewhere: few are, in the first launch alone, in the second, in none.
    out, _, index, weight, kept, least, labels, half = arguments(case)
    input = torch.full((300, 2, 2), -1.0)
    input[3, 0, 0] = input[200, 1, 1] = 5.0
    resample_argmax(out, input, index, weight, kept, least, labels, half)
    assert out[0, 0, 0] == labels[3]
    assert out[0, 2, 2] == labels[200]
    assert out[0, 0, 2] == 0


def test_a_table_that_points_outside_reads_within(resample_argmax):
    """Without waiting for the device it cannot be refused."""
    input = torch.arange(3.0)[None]
    index = [torch.tensor([-7, 2, 9, 1])]
    weight = [torch.tensor([[1.0, 0.5, 0.5, 0.5], [0.0, 0.5, 0.5, 0.5]])]
    out = torch.zeros(1, 4)
    resample_argmax(out, input, index, weight, Resampled.values, 0.0, [], False)
    assert out.tolist() == [[0.0, 2.0, 2.0, 1.5]]
