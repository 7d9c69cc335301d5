"""The aggregator for TorchIO against the installed TorchIO."""

from __future__ import annotations

import pytest
import torch

torchio = pytest.importorskip("torchio")

from voxfuse.integrations.torchio import GridAggregator  # noqa: E402


def make_sampler(shape=(20, 17, 14), patch=8, overlap=4, padding=None):
    generator = torch.Generator().manual_seed(0)
    image = torchio.ScalarImage(tensor=torch.rand(1, *shape, generator=generator))
    return torchio.GridSampler(torchio.Subject(image=image), patch, overlap, padding)


def batches(sampler, predict, size=3):
    patches = [sampler[i] for i in range(len(sampler))]
    for first in range(0, len(patches), size):
        some = patches[first : first + size]
        data = torch.stack([patch["image"].data for patch in some])
        yield predict(data), torch.stack([torch.as_tensor(p[torchio.LOCATION]) for p in some])


def aggregate(aggregator, sampler, predict):
    for batch, locations in batches(sampler, predict):
        aggregator.add_batch(batch, locations)
    return aggregator.get_output_tensor()


def noisy(data):
    ramp = torch.linspace(0, 1, data.shape[2]).view(-1, 1, 1)
    return torch.cat([data * ramp, 1 - data, data.sin()], 1)


@pytest.mark.parametrize("mode", ["crop", "average", "hann"])
@pytest.mark.parametrize("padding", [None, "reflect"])
@pytest.mark.parametrize("overlap", [0, 4, (2, 6, 4)])
def test_equals_torchio(mode, padding, overlap):
    sampler = make_sampler(overlap=overlap, padding=padding)
    expected = aggregate(torchio.GridAggregator(sampler, mode), sampler, noisy)
    actual = aggregate(GridAggregator(sampler, mode), sampler, noisy)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["crop", "average", "hann"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.filterwarnings("ignore:Medical image frameworks")
def test_integer_patches_as_in_torchio(mode, dtype):
    def predict(data):
        return (100 * noisy(data).abs()).to(dtype)

    sampler = make_sampler()
    actual = aggregate(GridAggregator(sampler, mode), sampler, predict)
    if dtype == torch.uint8 and mode != "crop":
        # TorchIO's sums of uint8 overflow.
        expected = aggregate(
            torchio.GridAggregator(sampler, mode), sampler, lambda d: predict(d).int()
        )
    else:
        expected = aggregate(torchio.GridAggregator(sampler, mode), sampler, predict)
    assert actual.dtype == expected.dtype or mode != "crop"
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, check_dtype=mode == "crop")


def test_crops_of_a_coarser_prediction_as_in_torchio():
    def predict(data):
        return torch.nn.functional.avg_pool3d(data, 2)

    sampler = make_sampler((16, 24, 16), 8, 0)
    expected = aggregate(torchio.GridAggregator(sampler, "crop", 2), sampler, predict)
    actual = aggregate(GridAggregator(sampler, "crop", 2), sampler, predict)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["average", "hann", "bspline"])
def test_a_coarser_prediction_is_averaged(mode):
    sampler = make_sampler((16, 24, 16), 8, 4)
    actual = aggregate(
        GridAggregator(sampler, mode, 2), sampler, lambda d: torch.nn.functional.avg_pool3d(d, 2)
    )
    expected = torch.nn.functional.avg_pool3d(sampler.subject["image"].data[None], 2)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["average", "hann", "bspline"])
def test_labels_are_those_of_the_dense_result(mode):
    sampler = make_sampler()
    dense = aggregate(GridAggregator(sampler, mode), sampler, noisy)
    labels = aggregate(GridAggregator(sampler, mode, output="labels"), sampler, noisy)
    assert labels.shape == (1, 20, 17, 14)
    assert labels.dtype == torch.uint8
    assert (labels != dense.argmax(0, keepdim=True)).float().mean() < 1e-3


def test_dense_results_take_patches_in_any_order():
    sampler = make_sampler()
    aggregator = GridAggregator(sampler, "bspline")
    for batch, locations in list(batches(sampler, lambda d: d))[::-1]:
        aggregator.add_batch(batch, locations)
    expected = sampler.subject["image"].data
    torch.testing.assert_close(aggregator.get_output_tensor(), expected, rtol=1e-6, atol=1e-6)


def test_bad_input_is_named():
    sampler = make_sampler()
    with pytest.raises(ValueError, match="overlap_mode: got 'median'"):
        GridAggregator(sampler, "median")
    with pytest.raises(ValueError, match="output: 'labels' of overlap_mode 'crop'"):
        GridAggregator(sampler, output="labels")
    with pytest.raises(RuntimeError, match="no patches were added"):
        GridAggregator(sampler).get_output_tensor()
    aggregator = GridAggregator(sampler, "hann")
    with pytest.raises(RuntimeError, match=r"batch_tensor: got patches of \(4, 4, 4\)"):
        aggregator.add_batch(torch.rand(1, 1, 4, 4, 4), torch.tensor([[0, 0, 0, 8, 8, 8]]))
    with pytest.raises(ValueError, match=r"origins: \(1, 0, 0\) is none of"):
        aggregator.add_batch(torch.rand(1, 1, 8, 8, 8), torch.tensor([[1, 0, 0, 9, 8, 8]]))
