"""The memory of a training step above the logits, the labels and the gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.losses import memory

MIB = memory.MIB

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the high-water mark of the resident set cannot be reset here",
)


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Measured in a fresh process, whose allocator no other test has filled."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.losses.memory"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured: dict[str, int] = json.loads(done.stdout)
    return measured


@pytest.mark.parametrize("name", memory.FUSED)
def test_a_fused_loss_takes_at_most_one_mebibyte(peaks, name):
    assert peaks[name] <= MIB


@pytest.mark.parametrize("types", memory.TYPES)
def test_no_type_of_labels_or_weights_costs_a_volume(peaks, types):
    assert peaks[memory.name_of(*types)] <= MIB


@pytest.mark.parametrize("name", ["cross-entropy, no reduction", "focal, no reduction"])
def test_a_map_takes_the_volumes_that_it_and_its_gradient_are(peaks, name):
    """The map, the gradient that comes back to it, and some ten temporaries of a block each.

    Which freed blocks the allocator still holds differs from run to run by several of them.
    """
    assert peaks[name] <= 2 * 4 * memory.VOXELS + 7 * MIB


def test_top_k_takes_one_volume_and_what_chooses(peaks):
    """One float a voxel, one byte a voxel for the choice, 12 bytes for each of the 10 % chosen."""
    assert peaks["top k"] <= (4 + 1 + 1.2) * memory.VOXELS + 4 * MIB


@pytest.mark.parametrize("name", ["lovasz", "lovasz hinge"])
def test_a_sort_takes_at_most_48_bytes_a_voxel(peaks, name):
    assert peaks[name] <= 48 * memory.VOXELS


def test_a_hidden_volume_would_show():
    """The method sees one channel of bytes, kept for a moment inside the step."""
    code = (
        "import torch\n"
        "from tests.losses import memory as m\n"
        "import voxfuse\n"
        "logits = torch.zeros(m.SHAPE, requires_grad=True)\n"
        "labels = torch.zeros(1, *m.SHAPE[2:], dtype=torch.uint8)\n"
        "plain = voxfuse.DiceLoss()\n"
        "def hides_one(z, y):\n"
        "    loss = plain(z, y)\n"
        "    loss.hidden = torch.ones(y.shape, dtype=torch.uint8)\n"
        "    return loss\n"
        "print(m.extra_bytes(hides_one, logits, labels))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > MIB
