"""Sliding windows on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import voxfuse
from tests.ops.gpu import DEVICE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("host", [False, True], ids=["stays", "to the host"])
@pytest.mark.parametrize("output", ["logits", "probabilities", "labels"])
def test_a_sliding_window(output, host, gpu_backend):
    """Patches predicted on the GPU; finished slabs stay there or reach the host behind the rest."""
    volume = torch.rand(1, 1, 70, 40, 36, generator=torch.Generator().manual_seed(0))

    def network(patches: Tensor) -> Tensor:
        return torch.cat([patches, 1 - patches, 2 * patches * patches], 1)

    options = {"output": output, "tta": [(), (0, 2), (1,)]}
    options |= {} if output == "logits" else {"activation": "softmax", "voting": "logit"}
    if output == "probabilities":
        options["mode"] = "gaussian"  # clamped as MONAI's, so that its sums are formed on the way
    arguments = ((16, 16, 16), 3, network, 0.5)
    expected = voxfuse.sliding_window_inference(volume, *arguments, backend="reference", **options)
    if host:
        options["out"] = torch.empty_like(expected)
    actual = voxfuse.sliding_window_inference(
        volume.to(DEVICE), *arguments, backend=gpu_backend, **options
    )
    assert actual.device.type == ("cpu" if host else DEVICE.type)
    if output == "labels":  # two values a rounding apart may change places
        assert (actual.cpu() != expected).sum() <= 2
    else:
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 2])
def test_labels_of_another_resolution_reach_the_host(axis, gpu_backend):
    """Slices are resampled where they are, and labels alone leave, turned in the host's array."""
    volume = torch.rand(1, 1, 40, 30, 36, generator=torch.Generator().manual_seed(0))
    native = torch.zeros(72, 55, 90, dtype=torch.uint8)

    def network(patches: Tensor) -> Tensor:
        return torch.cat([patches, 1 - patches, 2 * patches * patches], 1)

    arguments, options = ((16, 16, 16), 3, network, 0.5), {"stream_axis": axis}
    fused = voxfuse.sliding_window_inference(volume, *arguments, backend="reference", **options)
    expected = voxfuse.resample_argmax(fused[0], (90, 55, 72), backend="reference")
    voxfuse.sliding_window_inference(
        volume.to(DEVICE),
        *arguments,
        backend=gpu_backend,
        output="labels",
        resample_to=(90, 55, 72),
        out=native.permute(2, 1, 0),
        **options,
    )
    # Two values a rounding apart may change places.
    assert (native.permute(2, 1, 0) != expected).sum() <= 4
