"""PatchFuser: the truth, bits, memory, outputs, order, faults, heads, flips and bad input."""

from __future__ import annotations

import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import voxfuse
from voxfuse import _library
from voxfuse.fusion import windows
from voxfuse.fusion.grids import plan_grid
from voxfuse.fusion.orientations import flips

ULPS = 8 * 2**-23


def predictions(fuser, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(fuser), fuser.channels, *fuser.patch_size)
    return torch.randn(shape, generator=generator).to(dtype)


def run(fuser, patches, size=3):
    for first in range(0, len(fuser), size):
        fuser.add(patches[first : first + size], fuser.origins[first : first + size])
    return fuser.result()


def truth(fuser, patches, window="bspline"):
    """The weighted mean in float64, voxel by voxel."""
    vectors = windows.resolve_window(window, fuser.patch_size)
    weight = torch.from_numpy(vectors[0])
    for vector in vectors[1:]:
        weight = weight.unsqueeze(-1) * torch.from_numpy(vector)
    margin = [(p + 3, p + 3) for p in fuser.patch_size]
    padded = [v + 2 * (p + 3) for v, p in zip(fuser.volume_shape, fuser.patch_size, strict=True)]
    sums = torch.zeros(fuser.channels, *padded, dtype=torch.float64)
    total = torch.zeros(padded, dtype=torch.float64)
    for patch, origin in zip(patches, fuser.origins.tolist(), strict=True):
        place = tuple(
            slice(o + m[0], o + m[0] + p)
            for o, m, p in zip(origin, margin, fuser.patch_size, strict=True)
        )
        sums[(slice(None), *place)] += weight * patch.double()
        total[place] += weight
    inside = tuple(slice(m[0], m[0] + v) for m, v in zip(margin, fuser.volume_shape, strict=True))
    sums, total = sums[(slice(None), *inside)], total[inside]
    return torch.where(total == 0, 0.0, sums / total)


def test_one_number_is_the_patch_size_of_every_axis():
    assert voxfuse.PatchFuser((20, 18), 8, 2).patch_size == (8, 8)
    cube, number = (voxfuse.PatchFuser((20, 18, 16), size, 2) for size in ((8, 8, 8), 8))
    assert torch.equal(cube.origins, number.origins)


@hypothesis.given(data=st.data())
def test_logits_are_the_weighted_mean(data):
    axes = data.draw(st.integers(1, 3))
    volume = data.draw(st.lists(st.integers(1, 14), min_size=axes, max_size=axes))
    patch = data.draw(st.lists(st.integers(1, 9), min_size=axes, max_size=axes))
    window = data.draw(st.sampled_from(["bspline", "constant", "monai_gaussian", "hann"]))
    origins = None
    if data.draw(st.booleans()):
        reach = zip(volume, patch, strict=True)
        origin = st.tuples(*[st.integers(max(-3, 1 - p), v - 1) for v, p in reach])
        origins = torch.tensor(data.draw(st.lists(origin, min_size=1, max_size=9, unique=True)))
    elif data.draw(st.booleans()):
        origins = plan_grid(volume, patch, 0.5, "half_patch")
    axis = data.draw(st.sampled_from(["auto", *range(axes)]))
    in_ring = data.draw(st.booleans())
    out = torch.full((2, *volume), float("nan"), dtype=torch.float64 if in_ring else torch.float32)
    fuser = voxfuse.PatchFuser(
        volume, patch, 2, origins=origins, window=window, stream_axis=axis, out=out
    )
    patches = predictions(fuser)
    result = run(fuser, patches, data.draw(st.integers(1, 7)))
    assert result is out
    torch.testing.assert_close(result.double(), truth(fuser, patches, window), rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("window", ["bspline", "monai_gaussian"])
@pytest.mark.parametrize("output", ["logits", "probabilities", "labels", "entropy"])
def test_bits_do_not_depend_on_batches_or_threads(window, output):
    results = []
    threads = torch.get_num_threads()
    activation = "none" if output == "logits" else "softmax"
    try:
        for size, count in ((1, 1), (2, 2), (7, 3), (1000, 1)):
            torch.set_num_threads(count)
            fuser = voxfuse.PatchFuser(
                (30, 21, 14), (12, 12, 12), 3, window=window, output=output, activation=activation
            )
            results.append(run(fuser, predictions(fuser), size))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("window", ["bspline", "monai_gaussian", "gaussian", "bspline9"])
def test_constants_come_back_and_single_voxels_exactly(window, dtype):
    value = torch.tensor(1.7).to(dtype)
    for output in ("logits", "probabilities"):
        fuser = voxfuse.PatchFuser(
            (20, 33, 9),
            (8, 16, 9),
            2,
            window=window,
            output=output,
            activation="none" if output == "logits" else "identity",
        )
        patches = value.expand(len(fuser), 2, 8, 16, 9).contiguous()
        result = run(fuser, patches)
        rounding = max(torch.finfo(dtype).eps, ULPS)
        assert result.dtype == dtype
        assert ((result.double() - value.double()).abs() <= rounding * value.double()).all()
        assert torch.equal(result[:, 0, 0], patches[0, :, 0, 0])


@pytest.mark.parametrize("voting", ["soft", "logit"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_outputs_are_those_of_the_fused_volume(activation, voting):
    def activate(x, axis):
        return x.softmax(axis) if activation == "softmax" else x.sigmoid()

    options = {"activation": activation, "voting": voting}
    volume, patch = (21, 18, 17), (10, 8, 8)

    def fused(output):
        threshold = 0.4 if output == "mask" else None
        fuser = voxfuse.PatchFuser(volume, patch, 4, output=output, threshold=threshold, **options)
        return run(fuser, predictions(fuser))

    fuser = voxfuse.PatchFuser(volume, patch, 4, stream_axis=fused_axis(volume, patch))
    patches = predictions(fuser)
    mean = truth(fuser, activate(patches.double(), 1) if voting == "soft" else patches)
    probabilities = mean if voting == "soft" else activate(mean, 0)
    torch.testing.assert_close(fused("probabilities").double(), probabilities, rtol=1e-5, atol=1e-6)
    assert (fused("labels") != mean.argmax(0)).sum() <= 2
    assert fused("labels").dtype == torch.uint8
    assert (fused("mask") != (probabilities > 0.4)).sum() <= 2
    first = 1 if activation == "softmax" else 0
    torch.testing.assert_close(
        fused("foreground").double(), probabilities[first:].amax(0), rtol=1e-5, atol=1e-6
    )
    p = probabilities
    entropy = -torch.xlogy(p, p)
    if activation == "sigmoid":
        entropy = entropy - torch.xlogy(1 - p, 1 - p)
    torch.testing.assert_close(fused("entropy").double(), entropy.sum(0), rtol=1e-5, atol=1e-5)


def fused_axis(volume, patch):
    return voxfuse.PatchFuser(volume, patch, 1).stream_axis


@pytest.mark.parametrize("classes", [5, 117, 300])
def test_a_head_on_fused_features_is_the_fused_logits(classes):
    torch.manual_seed(0)
    weight, bias = torch.randn(classes, 6), torch.randn(classes)
    options = {"volume_shape": (20, 16, 18), "patch_size": (8, 8, 8)}
    features = voxfuse.PatchFuser(channels=6, head=(weight, bias), **options)
    patches = predictions(features)
    logits = torch.einsum("ck,nkzyx->nczyx", weight, patches) + bias.view(-1, 1, 1, 1)
    plain = voxfuse.PatchFuser(channels=classes, **options)
    torch.testing.assert_close(run(features, patches), run(plain, logits), rtol=1e-5, atol=2e-5)
    labels = voxfuse.PatchFuser(channels=6, head=(weight, bias), output="labels", **options)
    expected = voxfuse.PatchFuser(channels=classes, output="labels", **options)
    actual, expected = run(labels, patches), run(expected, logits)
    assert actual.dtype == (torch.uint8 if classes <= 256 else torch.uint16)
    assert (actual.int() != expected.int()).float().mean() < 1e-3
    assert labels.plan().ring_bytes < plain.plan().ring_bytes or classes < 6


@pytest.mark.parametrize("long", [0, 1, 2])
def test_planned_memory_does_not_grow_with_depth(long):
    def plan(depth):
        shape = [256, 256]
        shape.insert(long, depth)
        return voxfuse.PatchFuser(shape, (96, 96, 96), 117, output="labels").plan()

    short, tall = plan(300), plan(1024)
    assert tall.stream_axis == long
    assert short.ring_bytes == tall.ring_bytes == 117 * 96 * 256 * 256 * 4
    assert tall.weight_bytes == 0
    assert tall.output_bytes == 256 * 256 * 1024


def most_allocated(call) -> int:
    """Bytes of tensors alive at a time at most, of those that ``call`` makes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    alive = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_soft_voting_makes_no_copy_of_the_patches(dtype, activation):
    """What is allocated beyond the ring and the labels is a small part of a batch of patches."""
    options = {"output": "foreground", "activation": activation, "stream_axis": 0}
    fuser = voxfuse.PatchFuser((16, 48, 48), (16, 32, 32), 6, **options)
    patches = torch.randn(4, 6, 16, 32, 32).to(dtype)
    most = most_allocated(lambda: fuser.add(patches))
    plan = fuser.plan()
    size = patches.numel() * patches.itemsize
    result = math.prod(plan.output_shape) * dtype.itemsize
    assert plan.ring_bytes <= most <= plan.ring_bytes + result + size // 20
    fuser.result()


@pytest.mark.parametrize("window", ["bspline", "monai_gaussian"])
def test_allocated_memory_does_not_grow_with_depth(window):
    """What PyTorch allocates beyond the result: the ring (and weight sums), once."""

    def peak(depth):
        fuser = voxfuse.PatchFuser((24, 24, depth), (8, 8, 8), 5, window=window, output="labels")

        def fuse():
            patches = torch.ones(1, 5, 8, 8, 8)
            for origins in fuser.batches(1):
                fuser.add(patches, origins)
            fuser.result()

        return most_allocated(fuse) - 24 * 24 * depth, fuser.plan()

    (short, plan), (tall, _) = peak(32), peak(128)
    # Origins (N, 3) and rows (N, 3), int64, and their temporaries are the only thing that grows.
    tables = 12 * 8 * (128 // 4 * 25)
    assert tall <= short + tables
    assert short <= plan.ring_bytes + plan.weight_bytes + 4 * 5 * 8**3 + tables


def test_memmap_callback_and_tensor_hold_the_same(tmp_path):
    def fuse(**options):
        fuser = voxfuse.PatchFuser(
            (40, 12, 13), (8, 8, 8), 3, output="labels", stream_axis=0, **options
        )
        return run(fuser, predictions(fuser))

    expected = fuse()
    memmap = np.lib.format.open_memmap(
        tmp_path / "labels.npy", mode="w+", dtype=np.uint8, shape=(40, 12, 13)
    )
    assert fuse(out=memmap) is memmap
    memmap.flush()
    assert np.array_equal(np.load(tmp_path / "labels.npy"), expected.numpy())
    slabs = []
    assert fuse(out=lambda slab, start, stop: slabs.append((start, stop, slab))) is None
    assert [stop for _, stop, _ in slabs[:-1]] == [start for start, _, _ in slabs[1:]]
    assert torch.equal(torch.cat([slab[0] for *_, slab in slabs]), expected)
    channel = torch.empty(1, 40, 12, 13, dtype=torch.uint8)
    assert torch.equal(fuse(out=channel)[0], expected)


def test_slabs_are_written_as_soon_as_they_are_final():
    out = np.full((32, 8, 8), 200, np.uint8)
    fuser = voxfuse.PatchFuser((32, 8, 8), (8, 8, 8), 2, output="labels", out=out)
    assert fuser.finished == 0
    for number, origins in enumerate(fuser.batches(1), 1):
        fuser.add(torch.randn(1, 2, 8, 8, 8), origins)
        final = 4 * number if number < len(fuser) else 32
        assert fuser.finished == final
        assert (out[:final] < 2).all()
        assert (out[final:] == 200).all()
        with (
            pytest.raises(RuntimeError, match="patches are missing")
            if final < 32
            else (pytest.MonkeyPatch.context())
        ):
            fuser.result()


def test_any_order_within_the_ring():
    fuser = voxfuse.PatchFuser((20, 16, 16), (8, 8, 8), 2, stream_axis=0)
    rows = fuser.origins[:, 0].tolist()
    patches = predictions(fuser)
    expected = truth(fuser, patches)
    for start in sorted(set(rows)):
        members = [i for i, row in enumerate(rows) if row == start][::-1]
        fuser.add(patches[members], fuser.origins[members])
    torch.testing.assert_close(fuser.result().double(), expected, rtol=1e-6, atol=2e-6)


def test_every_patch_has_a_voxel_in_the_volume():
    """Swapped axes, a wrong spacing: parts of the volume would silently have no prediction."""
    sizes, patch = (40, 12, 12), (8, 8, 8)
    wrong = torch.tensor([[0, 0, 32], [0, 0, 0], [0, 0, 12]])
    named = r"origins: the patch at \(0, 0, 32\), of \(8, 8, 8\) voxels, has none in the volume"
    more = r" \(40, 12, 12\) \(2 of 3 patches\)"
    hint = "; with the axes in reverse order all have some"
    for origins, message in (
        (wrong, named + more + hint),
        (torch.tensor([[-8, 0, 0]]), r"the patch at \(-8, 0, 0\).*\(1 of 1 patches\)$"),
        ([[0, 40], [0], [0]], r"the patch at \(40, 0, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            voxfuse.PatchFuser(sizes, patch, 2, origins=origins)
    with pytest.raises(ValueError, match=named):
        voxfuse.overlap_add(torch.zeros(3, 1, *patch), wrong, sizes)
    assert len(voxfuse.PatchFuser(sizes, patch, 2, origins=[[-7, 39], [0], [0]])) == 2


@hypothesis.given(
    extent=st.integers(1, 70),
    patch=st.integers(1, 50),
    overlap=st.floats(0, 1, exclude_max=True),
    rule=st.sampled_from(["shifted", "even", "half_patch"]),
)
def test_every_patch_of_a_grid_has_a_voxel_in_the_volume(extent, patch, overlap, rule):
    (starts,) = plan_grid(
        (extent,), (patch,), 0.5 if rule == "half_patch" else overlap, rule
    ).starts
    assert all(-patch < start < extent for start in starts)


def test_wrong_origins_are_named():
    fuser = voxfuse.PatchFuser((24, 8, 8), (8, 8, 8), 2, output="labels", stream_axis=0)
    patch = torch.zeros(1, 2, 8, 8, 8)
    with pytest.raises(ValueError, match=r"origins: \(1, 0, 0\) is none of the 5 planned patches"):
        fuser.add(patch, [[1, 0, 0]])
    with pytest.raises(ValueError, match=r"\(8, 0, 0\) cannot be added yet.*\(0, 0, 0\) has come"):
        fuser.add(patch, [[8, 0, 0]])
    with pytest.raises(ValueError, match=r"origins: \(0, 0, 0\) is added again"):
        fuser.add(torch.cat([patch, patch]), [[0, 0, 0], [0, 0, 0]])
    fuser.add(patch, [[0, 0, 0]])
    with pytest.raises(ValueError, match=r"origins: \(0, 0, 0\) is added again; .* comes once"):
        fuser.add(patch, [[0, 0, 0]])
    with pytest.raises(RuntimeError, match=r"4 of 5 patches are missing, the first at \(4, 0, 0\)"):
        fuser.result()
    with pytest.raises(ValueError, match="only 4 are to come"):
        fuser.add(torch.zeros(5, 2, 8, 8, 8))
    fuser.add(torch.zeros(4, 2, 8, 8, 8))
    assert fuser.result().shape == (24, 8, 8)


@pytest.mark.parametrize("tta", ["mirror", "rotations", [(), (0,), (0, 2)]])
@pytest.mark.parametrize("window", ["bspline", "monai_gaussian"])
def test_flipped_predictions_are_turned_back_and_averaged(tta, window):
    turns = flips(tta, 3)
    fuser = voxfuse.PatchFuser((12, 9, 10), (6, 6, 6), 2, window=window, members=len(turns))
    patches = predictions(fuser)
    for i in range(len(fuser)):
        for turn in turns:
            axes = [axis + 2 for axis in turn]
            fuser.add(patches[i : i + 1].flip(axes), fuser.origins[i : i + 1], flip=turn)
    expected = truth(fuser, patches, window)
    torch.testing.assert_close(fuser.result().double(), expected, rtol=1e-6, atol=2e-6)


def test_a_constant_survives_any_number_of_members():
    for members in (2, 3, 5):
        fuser = voxfuse.PatchFuser((12, 9), (6, 6), 1, members=members)
        patches = torch.full((len(fuser), 1, 6, 6), 0.3)
        for i in range(len(fuser)):
            for _ in range(members):
                fuser.add(patches[i : i + 1], fuser.origins[i : i + 1])
        assert ((fuser.result() - 0.3).abs() <= ULPS * 0.3).all()


def test_skipped_patches_leave_the_fill_value():
    def skip(origin):
        return origin[0] >= 8

    fuser = voxfuse.PatchFuser(
        (24, 8, 8), (8, 8, 8), 3, skip_origin=skip, fill=2, output="labels", stream_axis=0
    )
    assert len(fuser) == 2
    patches = torch.zeros(2, 3, 8, 8, 8)
    patches[:, 1] = 1
    fuser.add(patches)
    result = fuser.result()
    assert (result[:12] == 1).all()
    assert (result[12:] == 2).all()
    nothing = voxfuse.PatchFuser((24, 8, 8), (8, 8, 8), 3, skip_origin=lambda origin: True, fill=7)
    assert torch.equal(nothing.result(), torch.full((3, 24, 8, 8), 7.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "votes"}, "output: got 'votes'"),
        ({"activation": "relu"}, "activation: got 'relu'"),
        ({"voting": "hard"}, "voting: got 'hard'"),
        ({"channels": 0}, "channels: got 0"),
        ({"members": 0}, "members: got 0"),
        ({"stream_axis": 3}, "stream_axis: got 3"),
        ({"output": "labels", "channels": 1}, "output: 'labels' of one channel"),
        ({"activation": "softmax"}, "use 'probabilities'"),
        ({"threshold": math.nan, "output": "mask", "activation": "sigmoid"}, "threshold: got nan"),
        ({"threshold": 0.5}, "threshold: got 0.5 with output 'logits', expected None; it is of"),
        ({"output": "labels", "fill": -1}, "fill: got -1, expected an integer from 0 to 255"),
        ({"output": "labels", "fill": 1.5}, "fill: got 1.5, expected an integer from 0 to 255"),
        ({"output": "labels", "fill": math.nan}, "fill: got nan, expected an integer"),
        ({"dtype": torch.float16, "fill": 1e5}, "fill: got 100000.0, expected a number of at most"),
        ({"out": torch.zeros(2, 9, 9, 9).half(), "fill": 1e5}, "fill: got 100000.0, expected a"),
        ({"head": (torch.zeros(3, 5), None)}, "head: got weight"),
        ({"out": torch.zeros(1)}, "out: got shape"),
        ({"origins": [[0]]}, "origins: got starts along 1 axes"),
        (
            {"origins": [[0, 0, 0], [4, 0, 0]]},
            "origins: got a list of 2 lists of 3 integers; .* torch.tensor(origins",
        ),
        (
            {"origins": [[0, 0, 0], [4, 0, 0], [5, 0, 0]]},
            "origins: got a list of 3 lists of 3 integers; .* torch.tensor(origins",
        ),
        ({"patch_size": (4, 4)}, "patch_shape: got"),
    ],
)
def test_bad_options_are_named(change, message):
    options = {"volume_shape": (9, 9, 9), "patch_size": (4, 4, 4), "channels": 2}
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        voxfuse.PatchFuser(**{**options, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"volume_shape": (9.7, 9, 9)},
        {"patch_size": (4, 4.5, 4)},
        {"origins": [[0, 4.9], [0], [0]]},
        {"origins": torch.zeros(1, 3)},
        {"result_channels": [False, True]},
    ],
)
def test_places_that_are_no_integers_are_not_rounded(change):
    options = {"volume_shape": (9, 9, 9), "patch_size": (4, 4, 4), "channels": 2}
    with pytest.raises(TypeError, match=rf"{next(iter(change))}: got .*, expected integers"):
        voxfuse.PatchFuser(**{**options, **change})


@pytest.mark.parametrize("output", ["logits", "foreground"])
def test_a_floating_result_in_a_tensor_of_integers_is_an_error_at_once(output):
    activation = "none" if output == "logits" else "softmax"
    out = torch.zeros(2 if output == "logits" else 1, 9, 9, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"out: got int64 .*, expected float32, float16, bfloat16"):
        voxfuse.PatchFuser((9, 9), 4, 2, output=output, activation=activation, out=out)


@pytest.mark.parametrize("output", ["probabilities", "mask", "foreground", "entropy"])
def test_logits_are_not_handed_out_as_probabilities(output):
    message = f"activation: got 'none' with output {output!r}, which needs probabilities"
    with pytest.raises(ValueError, match=message):
        voxfuse.PatchFuser((9, 9), 4, 2, output=output)


@pytest.mark.parametrize("voting", ["soft", "logit"])
@pytest.mark.parametrize("output", ["probabilities", "mask", "foreground", "entropy"])
def test_predictions_that_are_probabilities_stay_what_they_are(output, voting):
    options = {"output": output, "voting": voting}
    given = voxfuse.PatchFuser((9, 9), 4, 3, activation="identity", **options)
    patches = predictions(given)
    options = {"output": output, "voting": "soft", "activation": "softmax"}
    expected = run(voxfuse.PatchFuser((9, 9), 4, 3, **options), patches)
    torch.testing.assert_close(run(given, patches.softmax(1)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("members", [1, 2])
def test_batches_and_patches_without_origins_go_on_where_patches_lack(members):
    fuser = voxfuse.PatchFuser((20, 16, 8), 8, 2, stream_axis=0, members=members)
    patches = predictions(fuser)
    for _ in range(members):
        fuser.add(patches[1:3], fuser.origins[1:3])
    for _ in range(members - 1):
        fuser.add(patches[:1], fuser.origins[:1])
    rest = [i for i in range(len(fuser)) if i not in (1, 2)]
    batches = list(fuser.batches(2))
    assert [len(origins) for origins in batches[:-1]] == [2] * (len(batches) - 1)
    assert torch.equal(torch.cat(batches), fuser.origins[rest])
    fuser.add(patches[:1])
    for i in rest[1:]:
        for _ in range(members):
            fuser.add(patches[i : i + 1])
    assert list(fuser.batches(2)) == []
    torch.testing.assert_close(fuser.result().double(), truth(fuser, patches), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_batches_of_no_patches_are_an_error(size):
    with pytest.raises(ValueError, match=f"size: got {size}, expected an integer >= 1"):
        voxfuse.PatchFuser((9, 9), 4, 2).batches(size)


def test_bad_patches_are_named():
    fuser = voxfuse.PatchFuser((9, 9), (4, 4), 2)
    with pytest.raises(ValueError, match=r"patches: got shape \(1, 3, 4, 4\)"):
        fuser.add(torch.zeros(1, 3, 4, 4))
    with pytest.raises(TypeError, match="patches: got int64"):
        fuser.add(torch.zeros(1, 2, 4, 4, dtype=torch.int64))
    fuser.add(torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="those before went to float32 sums"):
        fuser.add(torch.zeros(1, 2, 4, 4, dtype=torch.float64))


@pytest.mark.skipif(not _library.defines_operators(), reason="the C++ library is not built")
@pytest.mark.parametrize("output", ["labels", "probabilities", "entropy"])
def test_backends_agree(output):
    results = []
    for backend in ("cpp", "reference"):
        fuser = voxfuse.PatchFuser(
            (20, 12, 9), (8, 8, 8), 3, output=output, activation="softmax", backend=backend
        )
        results.append(run(fuser, predictions(fuser)).double())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(1, 20, 8, 8).expand(3, 20, 8, 8),
        torch.zeros(3, 20, 1, 8).expand(3, 20, 8, 8),
        torch.zeros(3 * 20 * 64).as_strided((3, 20, 8, 8), (20 * 64, 64, 7, 1)),
        np.lib.stride_tricks.as_strided(
            np.zeros((20, 8, 8), np.float32), (3, 20, 8, 8), (0, 256, 32, 4)
        ),
    ],
)
def test_a_result_whose_voxels_share_memory_is_an_error(out):
    with pytest.raises(ValueError, match="out: got strides .* share one place in memory"):
        voxfuse.PatchFuser((20, 8, 8), 8, 3, out=out)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(20, 8, 8, 3).permute(3, 0, 1, 2),
        torch.zeros(6, 40, 8, 9)[::2, 1::2, :, :8],
        torch.zeros(8, 20, 8, 3).transpose(0, 3),
    ],
)
def test_a_result_in_any_layout_gets_the_same_values(out):
    wanted = voxfuse.PatchFuser((20, 8, 8), 8, 3)
    fuser = voxfuse.PatchFuser((20, 8, 8), 8, 3, out=out)
    patches = predictions(fuser)
    assert run(fuser, patches) is out
    torch.testing.assert_close(out, run(wanted, patches), rtol=1e-6, atol=1e-6)


def test_order_says_which_of_anothers_predictions_come_next():
    """Patches at origins in any order, some of them left out."""
    generator = torch.Generator().manual_seed(0)
    origins = plan_grid((20, 12, 8), (8, 8, 8)).origins
    origins = origins[torch.randperm(len(origins), generator=generator)]
    predictions = torch.rand(len(origins), 2, 8, 8, 8, generator=generator)
    fuser = voxfuse.PatchFuser((20, 12, 8), 8, 2, origins=origins)
    assert torch.equal(origins[fuser.order], fuser.origins)
    fuser.add(predictions[fuser.order])
    expected = voxfuse.overlap_add(predictions[fuser.order], fuser.origins, (20, 12, 8))
    torch.testing.assert_close(fuser.result(), expected)
    fewer = voxfuse.PatchFuser(
        (20, 12, 8), 8, 2, origins=origins, skip_origin=lambda origin: origin[1] == 4
    )
    assert torch.equal(origins[fewer.order], fewer.origins)
    assert fewer.order.tolist() == [i for i in fuser.order.tolist() if origins[i, 1] != 4]
