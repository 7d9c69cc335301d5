"""Fusion objects under pickle, deepcopy and torch.save in the middle of their work.

A copy goes on to the same bits, or the attempt is an error that says what to do.
"""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch

import voxfuse
from voxfuse.fusion.accumulators import Results, accumulator
from voxfuse.fusion.delivery import Delivery
from voxfuse.fusion.grids import plan_grid
from voxfuse.fusion.heads import Heads
from voxfuse.fusion.importance import Importance
from voxfuse.fusion.options import FusionOptions
from voxfuse.fusion.padded_volume import Placement
from voxfuse.fusion.sink import Sink
from voxfuse.fusion.windows import monai_gaussian

SHAPE, PATCH = (40, 17, 16), (12, 8, 8)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


copies = pytest.mark.parametrize("copied", [pickled, copy.deepcopy, saved])


def patches_of(fuser):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(fuser), fuser.channels, *fuser.patch_size, generator=generator)


def finish(fuser, patches):
    """Add what is lacking, and return the result."""
    index = {tuple(origin): i for i, origin in enumerate(fuser.origins.tolist())}
    for origins in fuser.batches(2):
        chosen = [index[tuple(origin)] for origin in origins.tolist()]
        fuser.add_members([(patches[chosen], ())] * fuser.members, origins)
    return fuser.result()


OPTIONS = {
    "sums in the result": {},
    "a ring": {"output": "labels"},
    "all channels of a ring": {"output": "probabilities", "activation": "softmax"},
    "general weights": {"output": "labels", "origins": torch.tensor([[0, 0, 0], [7, 3, 2]])},
    "a clamped window": {"output": "entropy", "activation": "softmax", "window": "monai_gaussian"},
    "a half ring": {"accumulate": torch.float16},
    "members": {"members": 2},
    "a head": {"output": "labels", "head": (torch.randn(5, 3), torch.randn(5))},
    "float16 results": {"dtype": torch.float16},
    "skipped patches": {"skip_origin": lambda origin: origin[1] == 4, "fill": 7.0},
    "into a tensor": {"out": lambda: torch.full((3, *SHAPE), float("nan"))},
    "into a part of a tensor": {"out": lambda: torch.zeros(6, *SHAPE)[::2]},
    "labels into an array": {"output": "labels", "out": lambda: np.full(SHAPE, 9, np.uint8)},
    "labels of another resolution": {"output": "labels", "resample_to": (70, 20, 15)},
    "and in another order of axes": {
        "output": "labels",
        "resample_to": (70, 20, 15),
        "out": lambda: np.full((15, 20, 70), 9, np.uint8).T,
    },
}


@copies
@pytest.mark.parametrize("added", [0, 5, 11])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_copy_goes_on_to_the_same_bits(options, added, copied):
    def started():
        chosen = {k: v() if k == "out" else v for k, v in options.items()}
        return voxfuse.PatchFuser(SHAPE, PATCH, 3, **chosen)

    patches = patches_of(started())
    expected = torch.as_tensor(finish(started(), patches))
    original = started()
    for i in range(min(added, len(original) - 1)):
        for _ in range(original.members):
            original.add(patches[i : i + 1], original.origins[i : i + 1])
    twin = copied(original)
    # The copy first: what it adds must not reach the original.
    assert twin.finished == original.finished
    assert torch.equal(torch.as_tensor(finish(twin, patches)), expected)
    result = finish(original, patches)
    assert torch.equal(torch.as_tensor(result), expected)
    again = copied(original)
    assert torch.equal(torch.as_tensor(again.result()), expected)
    assert twin.result() is not result


SLABS = []


def keep(slab, start, stop):
    SLABS.append((start, stop, slab))


@copies
def test_a_copy_hands_the_slabs_that_are_left_to_the_function(copied):
    fuser = voxfuse.PatchFuser(SHAPE, PATCH, 3, output="labels", stream_axis=0, out=keep)
    patches = patches_of(fuser)
    direct = voxfuse.PatchFuser(SHAPE, PATCH, 3, output="labels", stream_axis=0)
    expected = finish(direct, patches)
    SLABS.clear()
    half = len(fuser) // 2
    fuser.add(patches[:half])
    first = list(SLABS)
    twin = copied(fuser)
    for each in (fuser, twin):
        del SLABS[len(first) :]
        assert finish(each, patches) is None
        assert torch.equal(torch.cat([slab[0] for *_, slab in SLABS]), expected)


@copies
@pytest.mark.parametrize("view", [lambda a: a, np.asarray, lambda a: a[:]])
def test_a_fuser_into_a_memory_mapped_file_refuses(copied, view, tmp_path):
    out = np.memmap(tmp_path / "labels", np.uint8, "w+", shape=SHAPE)
    fuser = voxfuse.PatchFuser(SHAPE, PATCH, 3, output="labels", out=view(out))
    with pytest.raises(TypeError, match="memory-mapped file, .* use out=None, or an array in mem"):
        copied(fuser)


def test_a_shallow_copy_refuses():
    with pytest.raises(TypeError, match="would add to the same sums; use copy.deepcopy"):
        copy.copy(voxfuse.PatchFuser(SHAPE, PATCH, 3))


class Late:
    """A transfer whose copies take place when somebody waits."""

    def allocate(self, size):
        return torch.zeros(size, dtype=torch.uint8)

    def start(self, slab, staging):
        class Ticket:
            def query(self):
                return False

            def synchronize(self):
                staging.copy_(slab)

        return Ticket()


@copies
def test_slabs_on_their_way_are_in_the_copy(copied, monkeypatch):
    monkeypatch.setattr("voxfuse.fusion.sink.Delivery", lambda: Delivery(Late()))
    monkeypatch.setattr(Sink, "_is_direct", lambda self, place, device: False)
    fuser = voxfuse.PatchFuser(SHAPE, PATCH, 3, output="labels", stream_axis=0)
    patches = patches_of(fuser)
    expected = finish(voxfuse.PatchFuser(SHAPE, PATCH, 3, output="labels", stream_axis=0), patches)
    fuser.add(patches[: len(fuser) // 2])
    assert torch.equal(finish(copied(fuser), patches), expected)
    assert torch.equal(finish(fuser, patches), expected)


@copies
def test_a_delivery_refuses(copied):
    with pytest.raises(TypeError, match="Delivery: what is under way cannot be copied"):
        copied(Delivery())


@copies
@pytest.mark.parametrize("changing", [False, True])
def test_accumulators_refuse(copied, changing):
    grid = plan_grid((8, 8), (4, 4))
    options = FusionOptions(2, dtype=torch.float32)
    importance = Importance([torch.ones(4, dtype=torch.float64)] * 2)
    placement = Placement(grid, grid.origins, 0, [0, 0], [0, 0])
    prediction = torch.ones(1, 2, 4, 4)
    each = accumulator(
        options, placement, importance, prediction, Results(1, 2, None), changing=changing
    )
    each.add([(prediction, ())], range(1), importance)
    with pytest.raises(TypeError, match="cannot be copied in the middle of its work"):
        copied(each)


@copies
def test_grids_windows_plans_and_heads_are_copied_whole(copied):
    grid = plan_grid((20, 9), (8, 4), 0.25)
    assert copied(grid) == grid
    plan = voxfuse.PatchFuser(SHAPE, PATCH, 3).plan()
    assert copied(plan) == plan
    window = monai_gaussian((8, 4), (0.125, 0.2))
    assert np.array_equal(copied(window).dense(), window.dense())
    patches = torch.randn(len(grid), 2, 8, 4)
    for weights in ("bspline", window):
        expected = voxfuse.overlap_add(patches, grid, (20, 9), weights)
        actual = voxfuse.overlap_add(patches, copied(grid), (20, 9), copied(weights))
        assert torch.equal(actual, expected)
    heads = Heads((torch.randn(5, 2), torch.randn(5)), 1, "none", None)
    assert torch.equal(copied(heads).apply(0, patches), heads.apply(0, patches))


@copies
@pytest.mark.parametrize("output", ["dense", "labels"])
@pytest.mark.parametrize("mode", ["crop", "average", "bspline"])
def test_torchios_aggregator_goes_on_to_the_same_bits(copied, mode, output):
    torchio = pytest.importorskip("torchio")
    from voxfuse.integrations.torchio import GridAggregator

    if (mode, output) == ("crop", "labels"):
        with pytest.raises(ValueError, match="overlap_mode 'crop'"):
            GridAggregator(None, mode, output=output)
        return
    volume = torch.rand(1, 20, 17, 16)
    sampler = torchio.GridSampler(torchio.Subject(image=torchio.ScalarImage(tensor=volume)), 8, 4)
    places = torch.as_tensor(np.asarray(sampler.locations))
    patches = torch.randn(len(places), 3, 8, 8, 8)
    results = []
    for cut in (0, 3, len(places)):
        aggregator = GridAggregator(sampler, mode, output=output)
        for i, (patch, place) in enumerate(zip(patches, places, strict=True)):
            if i == cut:
                aggregator = copied(aggregator)
            aggregator.add_batch(patch[None], place[None])
        results.append(copied(aggregator).get_output_tensor())
    assert all(torch.equal(result, results[0]) for result in results)


@copies
@pytest.mark.parametrize("name", ["SlidingWindowInferer", "SlidingWindowInfererAdapt"])
def test_monais_inferers_are_copied_with_their_options(copied, name):
    pytest.importorskip("monai")
    from voxfuse.integrations import monai as fused

    layer = torch.nn.Conv3d(2, 5, 1)
    inferer = getattr(fused, name)(
        (8, 8, 8), 2, 0.5, window="hann", output="labels", head=(layer.weight, layer.bias)
    )
    volume = torch.rand(1, 1, 12, 12, 12)

    def network(patch):
        return torch.cat([patch, patch.sin()], 1)

    with torch.no_grad():
        expected = inferer(volume, network)
        assert torch.equal(copied(inferer)(volume, network), expected)
