"""resample_argmax on a GPU, against the reference and the CPU's bits."""

from __future__ import annotations

import pytest
import torch

import voxfuse
from tests.ops.gpu import DEVICE, synchronize
from tests.ops.resample_argmax.cases import ResampleCase, check, random_case
from voxfuse.ops.resample_argmax import axis_table

pytestmark = pytest.mark.gpu


def test_random_calls(gpu_operators):
    for seed in range(5000, 5300):
        check(random_case(seed), gpu_operators.resample_argmax, str(DEVICE))


@pytest.mark.parametrize("mode", ["labels", "mask", "regions"])
def test_many_blocks(gpu_operators, mode):
    for channels in (4, 117):
        case = ResampleCase(mode, channels, (30, 31, 32), (50, 61, 70))
        check(case, gpu_operators.resample_argmax, str(DEVICE))


def test_tables_have_the_bits_of_the_cpu():
    for source in range(1, 60):
        for target in range(1, 60, 3):
            for order, corners in ((0, False), (1, False), (1, True)):
                made = [
                    axis_table(source, target, order, align_corners=corners, device=device)
                    for device in (DEVICE, None)
                ]
                assert all(torch.equal(a.cpu(), b) for a, b in zip(*made, strict=True))


def test_nothing_waits_for_the_device(gpu_backend):
    input = torch.randn(3, 20, 21, 22, device=DEVICE)
    calls = [
        dict(mode="labels"),
        dict(mode="mask", threshold=0.3),
        dict(mode="regions", regions=(2, 1, 300)),
    ]

    def call():
        size = (30, 21, 40)
        return [voxfuse.resample_argmax(input, size, backend=gpu_backend, **x) for x in calls]

    expected = call()
    synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a.long(), b.long()) for a, b in zip(expected, again, strict=True))
