"""Parts of a volume: the bits of cutting them from the whole, from and into arrays of any kind."""

from __future__ import annotations

import itertools
import random
import warnings

import numpy as np
import pytest
import torch

import voxfuse
from voxfuse.fusion import windows
from voxfuse.fusion.grids import plan_grid
from voxfuse.fusion.region import Box, checked_region

OUTPUTS = [
    {},
    {"output": "labels"},
    {"output": "labels", "activation": "softmax"},
    {"output": "probabilities", "activation": "softmax", "voting": "logit"},
    {"output": "mask", "activation": "sigmoid", "channels": [2, 0]},
    {"output": "entropy", "activation": "softmax"},
]


class Array:
    """Sliced and assigned like an array, and nothing else; counts what it is asked for."""

    def __init__(self, array, unit=None):
        self.array, self.keys = array, []
        self.shape, self.dtype = array.shape, array.dtype
        if unit is not None:
            self.unit = unit

    def _checked(self, key):
        assert isinstance(key, tuple)
        assert len(key) == len(self.shape)
        for part, size in zip(key, self.shape, strict=True):
            assert part.step is None
            assert 0 <= part.start < part.stop <= size
        self.keys.append(key)
        return key

    def __getitem__(self, key):
        return self.array[self._checked(key)]

    def __setitem__(self, key, value):
        assert isinstance(value, np.ndarray)
        assert value.dtype == self.dtype
        assert value.flags.c_contiguous
        assert value.shape == self.array[self._checked(key)].shape
        self.array[key] = value


def network(scale):
    """Of any number of axes; a prediction depends on the place within the patch."""

    def predicted(patches):
        ramp = torch.arange(patches[0].numel(), dtype=torch.float32).reshape(patches[0].shape)
        x = patches.float() * scale + (ramp * 0.37).sin()
        return torch.cat([x, (3 * x).cos(), x * x - 0.4], 1)

    return predicted


def random_call(seed):
    """A volume and the arguments of a sliding window over it."""
    draw = random.Random(seed)
    axes = draw.choice([1, 2, 3, 3])
    spatial = [draw.randint(5, 26 if axes < 3 else 15) for _ in range(axes)]
    roi = [draw.randint(4, 9) for _ in range(axes)]
    generator = torch.Generator().manual_seed(seed)
    volume = torch.rand(1, 1, *spatial, generator=generator)
    options = dict(draw.choice(OUTPUTS))
    options["grid"] = draw.choice(["shifted", "even", "half_patch"])
    options["overlap"] = 0.5
    if options["grid"] != "half_patch":
        options["overlap"] = [draw.choice([0.0, 0.25, 0.5, 0.6]) for _ in range(axes)]
    window = draw.choice([*windows.NAMES, "dense", "mode", "monai_gaussian"])
    if window == "mode":
        options["mode"] = "gaussian"
    elif window == "dense":
        options["window"] = torch.rand(roi, generator=generator) + 0.1
    else:
        options["window"] = window
    options["padding_mode"] = draw.choice(["constant", "reflect", "replicate", "circular"])
    options["stream_axis"] = draw.choice(["auto", *range(axes)])
    options["tta"] = draw.choice([None, None, "mirror", [(0,)]])
    predictor = network(1.0)
    if draw.random() < 0.3:
        predictor = [network(1.0), network(0.7)]
    elif "activation" not in options and draw.random() < 0.5:
        options["head"] = (
            torch.randn(5, 3, generator=generator),
            torch.randn(5, generator=generator),
        )
    if draw.random() < 0.3:
        greatest = volume.max()  # a patch with it is left

        def skip(patch):
            return bool(patch.flatten()[patch.numel() // 2] < 0.5 and patch.max() < greatest)

        options["skip"] = skip
        options["fill"] = 1
    if draw.random() < 0.2:
        options["accumulate"] = torch.bfloat16
    return draw, volume, roi, predictor, options


def random_boxes(draw, spatial):
    """The volume cut at random, in random order."""
    bounds = []
    for extent in spatial:
        inner = draw.sample(range(1, extent), min(draw.randint(0, 2), extent - 1))
        bounds.append(list(itertools.pairwise([0, *sorted(inner), extent])))
    boxes = [tuple(slice(*pair) for pair in each) for each in itertools.product(*bounds)]
    draw.shuffle(boxes)
    return boxes


@pytest.mark.parametrize("seed", range(46))
def test_any_cut_in_any_order_gives_the_bits_of_the_whole(seed):
    draw, volume, roi, predictor, options = random_call(seed)
    whole = voxfuse.sliding_window_inference(volume, roi, 3, predictor, **options)
    parts = torch.full_like(whole, 99)
    sliced = Array(volume.numpy())
    boxes = random_boxes(draw, volume.shape[2:])
    for number, box in enumerate([*boxes, boxes[0]]):  # one of them twice
        place = parts[(..., *box)]
        kind = number % 3
        source = sliced if kind else volume
        if kind == 2:
            unit = tuple(draw.randint(1, 5) for _ in place[0].shape)
            out = Array(place[0].numpy(), unit)
        else:
            out = place if kind == 0 else None
        part = voxfuse.sliding_window_inference(
            source, roi, draw.randint(1, 4), predictor, region=box, out=out, **options
        )
        if kind == 1:
            place.copy_(part)
    assert torch.equal(parts.view(torch.uint8), whole.view(torch.uint8))
    limit = np.prod([2 * size for size in roi])
    assert all(np.prod([s.stop - s.start for s in key]) <= limit for key in sliced.keys)


def test_only_patches_that_reach_into_the_region_are_predicted():
    volume = torch.rand(1, 1, 64, 16, 16)
    seen = []

    def predictor(patches, places):
        seen.extend((place[2].start, place[3].start) for place in places)
        return patches

    voxfuse.sliding_window_inference(
        volume, 8, 1, predictor, with_coord=True, region=(slice(20, 24), slice(0, 8), slice(0, 8))
    )
    assert {x for x, _ in seen} == {16, 20}
    assert {y for _, y in seen} == {0, 4}


def test_a_region_without_patches_is_filled():
    volume = torch.rand(2, 1, 32, 8, 8)
    options = {"output": "labels", "skip_origin": lambda origin: origin[0] < 16, "fill": 7}
    whole = voxfuse.sliding_window_inference(volume, 8, 2, network(1), **options)
    region = (slice(2, 9), slice(0, 8), slice(3, 8))
    part = voxfuse.sliding_window_inference(volume, 8, 2, network(1), region=region, **options)
    assert torch.equal(part, whole[(..., *region)])
    assert (part == 7).all()


def test_a_grid_is_not_made_for_the_whole_volume():
    """9 million patches and more: a box has its own."""
    grid = plan_grid((10_000, 10_000, 10_000), (96, 96, 96))
    assert len(grid) == 208**3
    fuser = voxfuse.PatchFuser(
        (10_000, 10_000, 10_000),
        96,
        2,
        output="labels",
        region=(slice(960, 1056), slice(0, 96), slice(9_900, 10_000)),
    )
    assert len(fuser) == 3 * 2 * 3
    assert fuser.origins[0].tolist() == [912, 0, 9_840]


def test_a_fuser_of_a_region_speaks_of_the_volume():
    fuser = voxfuse.PatchFuser((32, 8), (8, 8), 1, region=(slice(10, 20), slice(0, 8)))
    assert fuser.origins[:, 0].tolist() == [4, 8, 12, 16]
    with pytest.raises(ValueError, match=r"origins: \(0, 0\) is none of the 4 planned patches"):
        fuser.add(torch.ones(1, 1, 8, 8), [[0, 0]])
    with pytest.raises(RuntimeError, match="slices before 10 of axis 0 are final"):
        fuser.result()
    fuser.add(torch.ones(4, 1, 8, 8))
    assert torch.equal(fuser.result(), torch.ones(1, 10, 8))


def test_full_batches_give_the_same_bits_however_many_patches_are_left():
    """oneDNN takes another kernel for one patch than for several."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv3d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv3d(8, 4, 3))
    net = torch.nn.Sequential(torch.nn.ConstantPad3d(2, 0.0), net).eval()
    sizes = set()

    def predictor(patches):
        sizes.add(len(patches))
        return net(patches)

    volume = torch.rand(1, 1, 40, 20, 16)
    whole = voxfuse.sliding_window_inference(volume, 16, 4, predictor, pad_batches=True)
    for low, high in [(0, 13), (13, 14), (14, 40)]:
        region = (slice(low, high), slice(0, 20), slice(0, 16))
        part = voxfuse.sliding_window_inference(volume, 16, 4, predictor, region=region)
        assert torch.equal(part, whole[:, :, low:high])
    assert sizes == {4}


BY_BATCH = {
    "place": lambda x: x + torch.arange(len(x)).reshape(-1, 1, 1),
    "mean": lambda x: x - x.mean(),
    "largest": lambda x: x - x.amax(),
    "smallest": lambda x: x - x.amin(),
}


@pytest.mark.parametrize("largest", [0, 9, 20, 29])
@pytest.mark.parametrize("kind", BY_BATCH)
def test_patches_whose_bits_depend_on_their_batch_are_predicted_one_by_one(kind, largest):
    predictor = BY_BATCH[kind]
    volume = torch.rand(1, 1, 30)
    volume[..., largest], volume[..., 29 - largest] = 2, -1
    options = {"roi_size": 8, "predictor": predictor, "pad_batches": True}
    for size in (2, 4):
        with pytest.warns(UserWarning, match=f"other bits at another place of a batch of {size}"):
            result = voxfuse.sliding_window_inference(volume, sw_batch_size=size, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            alone = voxfuse.sliding_window_inference(volume, sw_batch_size=1, **options)
        assert torch.equal(result, alone)


@pytest.mark.parametrize("unit", [1, 3, 8, 100])
def test_destinations_are_given_whole_units(unit):
    volume = torch.rand(1, 1, 30, 9)
    expected = voxfuse.sliding_window_inference(
        volume, 8, 2, network(1), output="labels", stream_axis=0
    )
    out = Array(np.zeros((30, 9), np.int16), (unit, 4))
    returned = voxfuse.sliding_window_inference(
        volume, 8, 2, network(1), output="labels", stream_axis=0, out=out
    )
    assert returned is out
    assert np.array_equal(out.array, expected[0, 0].numpy())
    bounds = [(key[0].start, key[0].stop) for key in out.keys]
    assert [low for low, _ in bounds] == [0, *(high for _, high in bounds[:-1])]
    assert all(low % unit == 0 and (high % unit == 0 or high == 30) for low, high in bounds)


@pytest.mark.parametrize("dtype", [">i2", "<u2", "u1", ">f4"])
def test_sources_of_any_dtype_and_byte_order(dtype):
    array = np.arange(240).reshape(1, 1, 24, 10).astype(dtype)
    seen = set()

    def predictor(patches):
        seen.add(patches.dtype)
        return patches.float()

    array.setflags(write=False)
    result = voxfuse.sliding_window_inference(array, 8, 1, predictor, window="constant")
    assert np.array_equal(result.numpy(), array.astype(np.float32))
    assert seen == {torch.from_numpy(np.empty(0, np.dtype(dtype).newbyteorder("="))).dtype}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"region": 3}, TypeError, "region: got 3, expected a tuple of slices"),
        ({"region": (slice(0, 4),)}, ValueError, "region: got 1 slices, expected 2"),
        ({"region": (slice(0, 4), slice(4, 4))}, ValueError, "expected slices 0 <= start < stop"),
        ({"region": (slice(0, 4), slice(0, 9))}, ValueError, "expected slices 0 <= start < stop"),
        ({"region": (slice(0, 4, 2), slice(0, 8))}, ValueError, "without steps"),
        ({"region": (slice(0.5, 4), slice(0, 8))}, TypeError, "region: got slice.* integers"),
        ({"resample_to": (4, 4), "output": "labels"}, ValueError, "region: got one with resample"),
        (
            {"process_fn": lambda p, batch, weights: (p, weights)},
            ValueError,
            r"process_fn: got one with full batches \(pad_b",
        ),
        ({"roi_weight_map": torch.rand(1, 3, 4, 4)}, ValueError, "region: .* differ by channel"),
        ({"predictor": lambda x: x[..., ::2, ::2]}, ValueError, "region: got one, but the pred"),
        ({"out": {}}, TypeError, "another array that boxes can be assigned to"),
        (
            {"out": Array(np.zeros((3, 4, 9), np.float32))},
            ValueError,
            r"out: got shape \(3, 4, 9\), expected \(3, 4, 8\)",
        ),
        (
            {"inputs": torch.rand(2, 1, 9, 8), "out": Array(np.zeros((3, 4, 8), np.float32))},
            ValueError,
            "out: got Array and 2 samples, expected one",
        ),
        ({"inputs": Array(np.zeros((1, 1, 9, 8), "M8[s]"))}, TypeError, "inputs: got dtype dat"),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {
        "inputs": torch.rand(1, 1, 9, 8),
        "roi_size": 4,
        "sw_batch_size": 1,
        "predictor": network(1),
        "region": (slice(0, 4), slice(0, 8)),
    }
    with pytest.raises(error, match=message):
        voxfuse.sliding_window_inference(**{**arguments, **changes})


def test_a_metatensor_of_a_region_lies_where_the_region_does():
    data = pytest.importorskip("monai.data", reason="monai is not installed")
    affine = torch.tensor([[0, 2.0, 0, 5], [1, 0, 0, -3], [0, 0, 4, 7], [0, 0, 0, 1]]).double()
    image = data.MetaTensor(torch.rand(1, 1, 9, 8, 7), affine=affine)
    region = (slice(3, 7), slice(0, 4), slice(2, 7))
    part = voxfuse.sliding_window_inference(image, 4, 1, network(1), region=region)
    for voxel in ((0, 0, 0), (3, 2, 1)):
        inside = torch.tensor([*voxel, 1.0]).double()
        within = torch.tensor([voxel[0] + 3, voxel[1], voxel[2] + 2, 1.0]).double()
        assert torch.equal(part.affine.double() @ inside, affine @ within)
    assert torch.equal(image.affine.double(), affine)


def test_regions_are_boxes():
    assert checked_region(None, (4, 5)) == Box((0, 0), (4, 5))
    box = checked_region((slice(None), slice(1, 3)), (4, 5))
    assert (box.shape, len(box), box.slices) == ((4, 2), 8, (slice(0, 4), slice(1, 3)))
