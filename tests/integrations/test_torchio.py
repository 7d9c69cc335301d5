"""The aggregators for TorchIO against the installed TorchIO, and against the formula."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

torchio = pytest.importorskip("torchio")

from voxfuse.integrations.torchio import GridAggregator, PatchAggregator  # noqa: E402

SECOND = hasattr(torchio, "PatchAggregator")
first_only = pytest.mark.skipif(SECOND, reason="TorchIO 2 has no GridAggregator")


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


@first_only
@pytest.mark.parametrize("mode", ["crop", "average", "hann"])
@pytest.mark.parametrize("padding", [None, "reflect"])
@pytest.mark.parametrize("overlap", [0, 4, (2, 6, 4)])
def test_equals_torchio(mode, padding, overlap):
    sampler = make_sampler(overlap=overlap, padding=padding)
    expected = aggregate(torchio.GridAggregator(sampler, mode), sampler, noisy)
    actual = aggregate(GridAggregator(sampler, mode), sampler, noisy)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@first_only
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


@first_only
def test_crops_of_a_coarser_prediction_as_in_torchio():
    def predict(data):
        return torch.nn.functional.avg_pool3d(data, 2)

    sampler = make_sampler((16, 24, 16), 8, 0)
    expected = aggregate(torchio.GridAggregator(sampler, "crop", 2), sampler, predict)
    actual = aggregate(GridAggregator(sampler, "crop", 2), sampler, predict)
    assert torch.equal(actual, expected)


@first_only
@pytest.mark.parametrize("mode", ["average", "hann", "bspline"])
def test_a_coarser_prediction_is_averaged(mode):
    sampler = make_sampler((16, 24, 16), 8, 4)
    actual = aggregate(
        GridAggregator(sampler, mode, 2), sampler, lambda d: torch.nn.functional.avg_pool3d(d, 2)
    )
    expected = torch.nn.functional.avg_pool3d(sampler.subject["image"].data[None], 2)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@first_only
@pytest.mark.parametrize("mode", ["average", "hann", "bspline"])
def test_labels_are_those_of_the_dense_result(mode):
    sampler = make_sampler()
    dense = aggregate(GridAggregator(sampler, mode), sampler, noisy)
    labels = aggregate(GridAggregator(sampler, mode, output="labels"), sampler, noisy)
    assert labels.shape == (1, 20, 17, 14)
    assert labels.dtype == torch.uint8
    assert (labels != dense.argmax(0, keepdim=True)).float().mean() < 1e-3


@first_only
def test_dense_results_take_patches_in_any_order():
    sampler = make_sampler()
    aggregator = GridAggregator(sampler, "bspline")
    for batch, locations in list(batches(sampler, lambda d: d))[::-1]:
        aggregator.add_batch(batch, locations)
    expected = sampler.subject["image"].data
    torch.testing.assert_close(aggregator.get_output_tensor(), expected, rtol=1e-6, atol=1e-6)


@first_only
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


# --- TorchIO 2 -----------------------------------------------------------------------------------


@dataclass
class Location:
    """TorchIO's PatchLocation, which TorchIO 1 has not."""

    index: tuple[int, int, int]
    size: tuple[int, int, int]


def grid(shape, patch=8, step=4, make=Location):
    starts = [sorted({*range(0, n - patch + 1, step), n - patch}) for n in shape]
    return [make(origin, (patch,) * 3) for origin in itertools.product(*starts)]


def fill(aggregator, volume, locations, size=3):
    """Add what a network that changes nothing makes of the volume (C, ...)."""
    for first in range(0, len(locations), size):
        some = locations[first : first + size]
        aggregator.add_batch(torch.stack([volume[(slice(None), *box(x))] for x in some]), some)
    return aggregator


def box(location):
    corners = zip(location.index, location.size, strict=True)
    return tuple(slice(first, first + n) for first, n in corners)


VOLUME = noisy(torch.rand(1, 1, 20, 17, 14, generator=torch.Generator().manual_seed(1)))[0]


@pytest.mark.parametrize("mode", ["crop", "average", "hann", "bspline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_network_that_changes_nothing_gives_the_volume_back(mode, dtype):
    volume = VOLUME.to(dtype)
    result = fill(PatchAggregator((20, 17, 14), mode, 4), volume, grid((20, 17, 14))).get_output()
    assert result.dtype == dtype
    torch.testing.assert_close(result, volume)


def test_a_volume_of_ones_stays_one_under_hann():
    """TorchIO 2.0.0a2: 0.0016 in the corners, whose weights add up to less than 1."""
    ones = torch.ones(1, 16, 16, 16)
    result = fill(PatchAggregator((16, 16, 16), "hann", 4), ones, grid((16, 16, 16))).get_output()
    torch.testing.assert_close(result, ones)


def test_patches_that_differ_are_weighted():
    """Two patches of 8 that overlap by 4: the formula, with TorchIO's Hann window."""
    places = [Location((0, 0, 0), (8, 8, 8)), Location((4, 0, 0), (8, 8, 8))]
    patches = torch.rand(2, 1, 8, 8, 8, dtype=torch.float64)
    aggregator = PatchAggregator((12, 8, 8), "hann", 4)
    aggregator.add_batch({"p": patches}, places)
    window = torch.hann_window(10, periodic=False, dtype=torch.float64)[1:-1]
    sums, total = torch.zeros(12, 8, 8).double(), torch.zeros(12, 1, 1).double()
    for first, patch in zip((0, 4), patches[:, 0], strict=True):
        sums[first : first + 8] += window[:, None, None] * patch
        total[first : first + 8] += window[:, None, None]
    torch.testing.assert_close(aggregator.get_output("p")[0], sums / total)


@pytest.mark.parametrize("mode", ["average", "bspline"])
def test_labels_of_locations_are_those_of_the_dense_result(mode):
    places = grid((20, 17, 14))
    dense = fill(PatchAggregator((20, 17, 14), mode), VOLUME, places).get_output()
    streamed = PatchAggregator((20, 17, 14), mode, output="labels", locations=places)
    labels = fill(streamed, VOLUME, places).get_output()
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), dense.argmax(0, keepdim=True))


@pytest.mark.parametrize("output", ["dense", "labels"])
def test_locations_that_are_missing_are_named(output):
    places = grid((20, 17, 14))
    aggregator = PatchAggregator((20, 17, 14), "hann", output=output, locations=places)
    fill(aggregator, VOLUME, places[:-1])
    missing = rf"1 of {len(places)} patches are missing, the first at \({places[-1].index[0]}, "
    with pytest.raises(RuntimeError, match=missing):
        aggregator.get_output()
    fill(aggregator, VOLUME, places[-1:])
    assert aggregator.get_output().any()


def test_a_coarser_prediction_and_several_by_name():
    places = grid((16, 24, 16), step=8)
    volume = torch.rand(2, 16, 24, 16)
    coarse = torch.nn.functional.avg_pool3d(volume[None], 2)[0]
    for mode in ("crop", "average", "hann"):
        aggregator = PatchAggregator((16, 24, 16), mode, 0, (8, 12, 8))
        for place in places:
            patch = volume[(slice(None), *box(place))][None]
            half = torch.nn.functional.avg_pool3d(patch, 2)
            aggregator.add_batch({"mean": half, "twice": 2 * half[:, :1]}, [place])
        torch.testing.assert_close(aggregator.get_output("mean"), coarse)
        torch.testing.assert_close(aggregator.get_output("twice"), 2 * coarse[:1])
        with pytest.raises(KeyError, match=r"No output for key None. Available: \['mean', 'twice'"):
            aggregator.get_output()


def test_integers_are_averaged_and_cropped_as_they_are():
    places = [Location((0, 0, 0), (2, 2, 2)), Location((0, 0, 1), (2, 2, 2))]
    patches = torch.stack([torch.full((1, 2, 2, 2), 1), torch.full((1, 2, 2, 2), 4)])
    for mode, expected in (("average", [1.0, 2.5, 4.0]), ("crop", [1, 4, 4])):
        aggregator = PatchAggregator((2, 2, 3), mode)
        aggregator.add_batch(patches, places)
        assert aggregator.get_output()[0, 0, 0].tolist() == expected


def test_bad_input_of_a_patch_aggregator_is_named():
    with pytest.raises(ValueError, match="overlap_mode: got 'median'"):
        PatchAggregator((8, 8, 8), "median")
    with pytest.raises(ValueError, match="output: 'labels' needs locations="):
        PatchAggregator((8, 8, 8), "hann", output="labels")
    aggregator = PatchAggregator((8, 8, 8), "hann")
    patch, place = torch.rand(1, 1, 4, 4, 4), Location((0, 0, 0), (4, 4, 4))
    with pytest.raises(RuntimeError, match=r"batch: got patches of \(4, 4, 4\)"):
        aggregator.add_batch(patch, [Location((0, 0, 0), (8, 8, 8))])
    with pytest.raises(ValueError, match="locations: got 2 for 1 patches"):
        aggregator.add_batch(patch, [place, place])
    with pytest.raises(ValueError, match=r"locations: \(5, 0, 0\) of size \(4, 4, 4\) reaches out"):
        aggregator.add_batch(patch, [Location((5, 0, 0), (4, 4, 4))])
    aggregator.add_batch(patch, [place])
    with pytest.raises(ValueError, match="batch: got 2 channels, expected 1 as before"):
        aggregator.add_batch(patch.expand(1, 2, 4, 4, 4), [place])


@pytest.mark.skipif(not SECOND, reason="TorchIO 2 is not installed")
@pytest.mark.parametrize("mode", ["crop", "average", "hann"])
@pytest.mark.parametrize("output_shape", [None, (10, 8, 7)])
def test_equals_torchio_2(mode, output_shape):
    from torchio.data.patch import PatchLocation

    places = grid((20, 16, 14), make=PatchLocation)
    predictions = torch.rand(len(places), 2, *(4 if output_shape else 8,) * 3)
    results = []
    for kind in (PatchAggregator, torchio.PatchAggregator):
        aggregator = kind((20, 16, 14), mode, 4, output_shape)
        for prediction, place in zip(predictions, places, strict=True):
            aggregator.add_batch(prediction[None], [place])
        results.append(aggregator.get_output())
    ours, theirs = results
    if mode == "hann":
        counted = torchio.PatchAggregator((20, 16, 14), mode, 4, output_shape)
        for place in places:
            counted.add_batch(torch.ones_like(predictions[:1]), [place])
        # What its clamp leaves alone.
        kept = counted._counts["__default__"][:1].expand_as(ours) >= 1
        assert kept.any()
        ours, theirs = ours[kept], theirs[kept]
    torch.testing.assert_close(ours, theirs)
