"""Results at another resolution: resample_argmax of the whole fused volume, bit for bit."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

import voxfuse
from tests.fusion.test_patch_fuser import most_allocated

SHAPE, PATCH = (21, 18, 20), (8, 9, 7)
UP, MIXED = (47, 40, 33), (13, 18, 41)


def network(channels, seed=0):
    """A random convolution; its last layer apart, and both together."""
    generator = torch.Generator().manual_seed(seed)
    body = torch.randn(4, 1, 3, 3, 3, generator=generator)
    weight = torch.randn(channels, 4, generator=generator)
    bias = torch.randn(channels, generator=generator)

    def features(x):
        return torch.nn.functional.conv3d(x, body, padding=1).relu()

    def logits(x):
        out = torch.einsum("ck,bk...->bc...", weight, features(x))
        return out + bias[:, None, None, None]

    return logits, features, (weight, bias)


@pytest.fixture(scope="module")
def volume():
    return torch.randn(1, 1, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("target", "order"), [(UP, 1), (MIXED, (0, 1, 1)), (SHAPE, 1)])
def test_labels_are_those_of_the_resampled_volume(volume, axis, target, order):
    logits, features, head = network(5)
    common = {"stream_axis": axis, "overlap": 0.4}
    kept = {"resample_to": target, "resample_order": order}
    for predictor, options in (
        (logits, {}),
        (logits, {"tta": "mirror"}),
        (features, {"head": head}),
        (logits, {"accumulate": torch.float16}),
        (logits, {"activation": "softmax"}),
        (logits, {"window": "monai_gaussian"}),
    ):
        whole = "probabilities" if options.get("activation") else "logits"
        fused = voxfuse.sliding_window_inference(
            volume, PATCH, 3, predictor, output=whole, **common, **options
        )
        got = voxfuse.sliding_window_inference(
            volume, PATCH, 3, predictor, output="labels", **common, **options, **kept
        )
        assert got.shape == (1, 1, *target)
        assert torch.equal(got[0, 0], voxfuse.resample_argmax(fused[0], target, order=order))


@pytest.mark.parametrize(("activation", "voting"), [("sigmoid", "soft"), ("sigmoid", "logit")])
@pytest.mark.parametrize("axis", [0, 2])
def test_masks_and_regions_are_those_of_the_resampled_volume(volume, axis, activation, voting):
    logits, _, _ = network(3)
    common = {"stream_axis": axis, "voting": voting}
    whole = {"output": "logits"} if voting == "logit" else {"output": "probabilities"}
    fused = voxfuse.sliding_window_inference(
        volume,
        PATCH,
        3,
        logits,
        activation=activation if voting == "soft" else "none",
        **whole,
        **common,
    )[0]
    decided = {"activation": "sigmoid" if voting == "logit" else "none", "threshold": 0.8}
    common |= {"activation": activation, "threshold": 0.8, "resample_to": UP}
    mask = voxfuse.sliding_window_inference(volume, PATCH, 3, logits, output="mask", **common)[0]
    assert mask.dtype == torch.uint8
    expected = voxfuse.resample_argmax(fused, UP, "mask", **decided)
    assert torch.equal(mask.bool(), expected)
    assert 0 < mask.float().mean() < 1
    some = voxfuse.sliding_window_inference(
        volume, PATCH, 3, logits, output="mask", channels=[2, 0], **common
    )
    assert torch.equal(some[0], mask[[2, 0]])
    regions = {"output": "regions", "regions": (2, 1, 300)}
    got = voxfuse.sliding_window_inference(volume, PATCH, 3, logits, **regions, **common)
    assert got.dtype == torch.uint16
    expected = voxfuse.resample_argmax(fused, UP, "regions", regions=(2, 1, 300), **decided)
    assert torch.equal(got[0, 0].int(), expected.int())
    assert len(got.int().unique()) == 4


def test_regions_need_no_other_resolution(volume):
    logits, _, _ = network(2)
    options = {"activation": "sigmoid", "voting": "logit"}
    mask = voxfuse.sliding_window_inference(volume, PATCH, 3, logits, output="mask", **options)
    got = voxfuse.sliding_window_inference(
        volume, PATCH, 3, logits, output="regions", regions=(1, 2), **options
    )
    assert torch.equal(got[:, 0], torch.where(mask[:, 1] > 0, 2, mask[:, 0]))


@pytest.mark.parametrize("weights", [None, torch.ones(1, 2, *PATCH)])  # the latter by PyTorch
@pytest.mark.parametrize("voting", ["soft", "logit"])
def test_what_no_patch_covers_is_background(volume, voting, weights):
    logits, features, head = network(2)
    kept = torch.zeros(SHAPE)
    kept[:, :9] = 1
    left = {"skip_origin": lambda origin: origin[1] > 0}
    common = {"overlap": 0, "activation": "sigmoid", "threshold": 0.3, "voting": voting}
    for output, regions in ("mask", None), ("regions", (1, 2)):
        run = functools.partial(
            voxfuse.sliding_window_inference,
            volume,
            PATCH,
            3,
            output=output,
            regions=regions,
            roi_weight_map=weights,
            **common,
        )
        whole = run(logits)
        assert whole[..., 9:, :].any()
        assert torch.equal(run(logits, **left), whole * kept.to(torch.uint8))
        for target in UP, MIXED:
            share = torch.nn.functional.interpolate(kept[None, None], target, mode="trilinear")
            share = share[0, 0]
            got = run(logits, resample_to=target, **left)[0]
            assert got.any()
            assert torch.equal(
                got[:, share == 1], run(logits, resample_to=target)[0][:, share == 1]
            )
            assert not got[:, share == 0].any()
            if voting == "logit":
                assert not got[:, share < 0.99].any()
        if voting == "logit" and weights is None:
            assert not run(features, head=head, **left)[..., 9:, :].any()


@pytest.mark.parametrize("extent", [(30,), (25, 12)])
def test_one_and_two_axes(extent):
    fuser = {"volume_shape": extent, "patch_size": 8, "channels": 3, "overlap": 0.5}
    target = tuple(2 * size + 1 for size in extent)
    whole, labels = (
        voxfuse.PatchFuser(**fuser, stream_axis=0, output="logits"),
        voxfuse.PatchFuser(**fuser, stream_axis=0, output="labels", resample_to=target),
    )
    patches = torch.randn(len(whole), 3, *[8] * len(extent))
    for each in whole, labels:
        each.add(patches)
    assert torch.equal(labels.result(), voxfuse.resample_argmax(whole.result(), target))


def test_weights_by_channel_are_resampled_too(volume):
    logits, _, _ = network(3)
    weights = torch.rand(1, 3, *PATCH, generator=torch.Generator().manual_seed(2)) + 0.1
    common = {"roi_weight_map": weights}
    fused = voxfuse.sliding_window_inference(volume, PATCH, 3, logits, **common)
    got = voxfuse.sliding_window_inference(
        volume, PATCH, 3, logits, output="labels", resample_to=UP, **common
    )
    assert torch.equal(got[0, 0], voxfuse.resample_argmax(fused[0], UP))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_crop_is_put_back_and_turned_in_the_callers_array(volume, axis):
    """Into a view of a larger array with its axes in another order, and of a wider type."""
    logits, _, _ = network(4)
    common = {"output": "labels", "resample_to": UP, "stream_axis": axis}
    expected = voxfuse.sliding_window_inference(volume, PATCH, 3, logits, **common)[0, 0].numpy()
    for order in itertools.permutations(range(3)):
        native = np.full([UP[a] + 4 for a in order], 9, np.uint16)
        # Axis a of the view is the native axis where `order` has a.
        view = native.transpose(np.argsort(order))[2:-2, 1:-3, 3:-1]
        result = voxfuse.sliding_window_inference(volume, PATCH, 3, logits, out=view, **common)
        assert result is view
        assert np.array_equal(view, expected)
        assert (native == 9).sum() == native.size - view.size


def test_slices_come_as_soon_as_those_that_they_need_are_final(volume):
    """A function of slabs gets each slice of the result once, in order, before the last patch."""
    logits, _, _ = network(3)
    slabs, seen = [], []

    def predictor(x):
        seen.append(sum(slab.shape[1] for slab, _, _ in slabs))
        return logits(x)

    common = {"output": "labels", "resample_to": UP, "stream_axis": 0}
    voxfuse.sliding_window_inference(
        volume, PATCH, 1, predictor, out=lambda *slab: slabs.append(slab), **common
    )
    assert [start for _, start, _ in slabs] == [0, *[stop for _, _, stop in slabs[:-1]]]
    whole = torch.cat([slab for slab, _, _ in slabs], 1)
    assert torch.equal(
        whole, voxfuse.sliding_window_inference(volume, PATCH, 3, logits, **common)[0]
    )
    assert 0 < seen[len(seen) // 2] < seen[-1] < UP[0]


@pytest.mark.parametrize("axis", [0, 2])
def test_memory_does_not_grow_with_depth(axis):
    """What is allocated is a ring, a block of slices and the labels: no channels of the volume."""
    most = {}
    for depth in (64, 160):
        shape = [60, 60, 60]
        shape[axis] = depth
        target = [2 * size for size in shape]
        out = torch.empty(target, dtype=torch.uint8)

        def call(shape=shape, target=target, out=out):
            fuser = voxfuse.PatchFuser(
                shape, 16, 20, output="labels", resample_to=target, out=out, stream_axis=axis
            )
            for origins in fuser.batches(2):
                fuser.add(torch.ones(len(origins), 20, 16, 16, 16), origins)
            fuser.result()

        most[depth] = most_allocated(call)
    assert most[160] < 1.05 * most[64]


def test_infinite_predictions_are_an_error_on_request():
    fuser = {"volume_shape": (20, 9), "patch_size": 8, "channels": 2, "output": "labels"}
    patches = torch.zeros(6, 2, 8, 8)
    patches[2, 1, 0, 0] = torch.inf
    kept = voxfuse.PatchFuser(**fuser, resample_to=(40, 18), overlap=0)
    kept.add(patches)
    assert kept.result().max() == 1
    checked = voxfuse.PatchFuser(**fuser, resample_to=(40, 18), overlap=0, finite=True)
    with pytest.raises(RuntimeError, match="infinite in slices"):
        checked.add(patches)
    patches[2, 1, 0, 0] = torch.nan  # as it is, which nnU-Net lets through
    fine = voxfuse.PatchFuser(**fuser, resample_to=(40, 18), overlap=0, finite=True)
    fine.add(patches)


BAD = [
    ({"output": "logits"}, ValueError, "resample_to: given with output 'logits'"),
    ({"resample_to": (4, 4)}, ValueError, "resample_to: got .* expected 3 numbers >= 1"),
    ({"resample_to": (4, 0, 4)}, ValueError, "resample_to: got"),
    ({"resample_order": 2}, ValueError, "resample_order: got 2"),
    ({"resample_order": (1, 0)}, ValueError, "resample_order: got"),
    ({"fill": 1}, ValueError, "fill: got 1 with resample_to"),
    ({"regions": (1, 2, 3)}, ValueError, "regions: given with mode 'labels'"),
    ({"output": "regions", "activation": "sigmoid"}, ValueError, "needs the label of every"),
    (
        {"output": "regions", "activation": "sigmoid", "regions": (1, 2)},
        ValueError,
        "regions: got .* expected 3 numbers",
    ),
    (
        {"output": "mask", "activation": "softmax", "voting": "logit"},
        ValueError,
        "activation: got 'softmax' of averaged logits",
    ),
    ({"out": np.zeros((9, 9, 9), np.float32)}, TypeError, "out: got torch.float32, expected one"),
    ({"finite": True, "resample_to": None}, ValueError, "finite: given without resample_to"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_options_are_named(change, kind, message):
    options = {"output": "labels", "resample_to": (9, 9, 9)} | change
    with pytest.raises(kind, match=message):
        voxfuse.PatchFuser((8, 8, 8), 4, 3, **options)


def test_a_metatensor_gets_the_affine_of_the_results_voxels(volume):
    data = pytest.importorskip("monai.data")
    affine = torch.tensor([[0, 2.0, 0, 5], [1, 0, 0, -3], [0, 0, 4, 7], [0, 0, 0, 1]]).double()
    tensor = data.MetaTensor(volume, affine=affine)
    logits, _, _ = network(3)
    result = voxfuse.sliding_window_inference(
        tensor, PATCH, 3, logits, output="labels", resample_to=UP
    )
    # Corners of the field of view stay where they are.
    for corner in itertools.product((0, 1), repeat=3):
        ends = [
            torch.tensor([c * n - 0.5 for c, n in zip(corner, shape, strict=True)] + [1.0]).double()
            for shape in (SHAPE, UP)
        ]
        assert torch.allclose(affine @ ends[0], result.affine.double() @ ends[1])
