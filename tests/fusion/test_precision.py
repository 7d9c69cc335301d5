"""How exact the fusion is, by bounds that follow from the arithmetic; and half-precision sums."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import voxfuse
from voxfuse.fusion import windows

HALVES = (torch.float16, torch.bfloat16)


def unit_roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def least(dtype):
    """Half the distance of the smallest numbers."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


def fused_with_truth(fuser, patches, window, size=3):
    """The result, and in float64 the mean, the mean of |P|, max |P| and how many patches."""
    for first in range(0, len(fuser), size):
        fuser.add(patches[first : first + size], fuser.origins[first : first + size])
    vectors = [torch.from_numpy(v) for v in windows.resolve_window(window, fuser.patch_size)]
    if len(vectors) == len(fuser.patch_size):
        weight = vectors[0]
        for vector in vectors[1:]:
            weight = weight.unsqueeze(-1) * vector
    else:
        weight = vectors[0]
    shape = (fuser.channels, *fuser.volume_shape)
    mean, size_of, largest = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    total, count = (torch.zeros(fuser.volume_shape, dtype=torch.float64) for _ in range(2))
    for patch, origin in zip(patches.double(), fuser.origins.tolist(), strict=True):
        inside = [
            slice(max(o, 0), min(o + p, v))
            for o, p, v in zip(origin, fuser.patch_size, fuser.volume_shape, strict=True)
        ]
        part = tuple(slice(s.start - o, s.stop - o) for s, o in zip(inside, origin, strict=True))
        box = (slice(None), *inside)
        mean[box] += weight[part] * patch[(slice(None), *part)]
        size_of[box] += weight[part] * patch[(slice(None), *part)].abs()
        largest[box] = torch.maximum(largest[box], patch[(slice(None), *part)].abs())
        total[tuple(inside)] += weight[part]
        count[tuple(inside)] += 1
    return fuser.result(), mean / total, size_of / total, largest, count


def drawn_fuser(data, **options):
    axes = data.draw(st.integers(1, 3))
    volume = data.draw(st.lists(st.integers(1, 16), min_size=axes, max_size=axes))
    patch = data.draw(st.lists(st.integers(1, 9), min_size=axes, max_size=axes))
    window = data.draw(st.sampled_from(["bspline", "constant", "monai_gaussian", "hann"]))
    overlap = data.draw(st.floats(0, 0.8))
    axis = data.draw(st.sampled_from(["auto", *range(axes)]))
    fuser = voxfuse.PatchFuser(
        volume, patch, 2, overlap=overlap, window=window, stream_axis=axis, **options
    )
    dtype = data.draw(st.sampled_from([torch.float32, *HALVES, torch.float64]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    patches = 8 * torch.randn(len(fuser), 2, *patch, generator=generator, dtype=torch.float64)
    return fuser, patches.to(dtype), window


@hypothesis.given(data=st.data())
def test_float64_agrees_within_rounding_for_any_overlap(data):
    """Twelve roundings for the weights and products, one a term; one patch alone is exact."""
    fuser, patches, window = drawn_fuser(data)
    result, mean, size, largest, count = fused_with_truth(fuser, patches, window)
    assert result.dtype == patches.dtype
    u = 2**-53 if patches.dtype == torch.float64 else 2**-24
    # float64's truth has roundings of its own, as many again.
    factor = 2 if patches.dtype == torch.float64 else 1
    sums = (factor * (count + 12) * u) * size
    final = unit_roundoff(patches.dtype) * (mean.abs() + sums) + least(patches.dtype)
    assert ((result.double() - mean).abs() <= sums + final).all()
    alone = (count == 1).expand_as(mean)
    assert torch.equal(result.double()[alone], torch.copysign(largest, mean)[alone])


@pytest.mark.parametrize("accumulate", HALVES)
@hypothesis.given(data=st.data())
def test_half_precision_sums_keep_to_their_bound(accumulate, data):
    members = data.draw(st.integers(1, 2))
    dtype = torch.float64
    fuser, patches, window = drawn_fuser(data, accumulate=accumulate, members=members, dtype=dtype)
    for first in range(0, len(fuser), 2) if members == 2 else ():
        part = slice(first, first + 2)
        fuser.add_members([(patches[part], ()), (patches[part], ())], fuser.origins[part])
    if members == 2:
        fuser_of_truth = voxfuse.PatchFuser(
            fuser.volume_shape,
            fuser.patch_size,
            2,
            origins=fuser.origins,
            window=window,
            stream_axis=fuser.stream_axis,
        )
        _, mean, _, largest, count = fused_with_truth(fuser_of_truth, patches, window)
        result = fuser.result()
    else:
        result, mean, _, largest, count = fused_with_truth(fuser, patches, window)
    # One rounding an addition, of sums that are at most max |P| (and a little, by rounding).
    u = unit_roundoff(accumulate)
    additions = count * members
    rounding = additions * u * largest * (1 + u) ** int(additions.max())
    float32 = (additions + 12) * 2**-24 * largest
    bound = rounding + float32 + additions * least(accumulate)
    assert result.dtype == dtype
    assert ((result - mean).abs() <= bound).all()


@pytest.mark.parametrize("accumulate", HALVES)
@pytest.mark.parametrize("window", ["bspline", "monai_gaussian"])
def test_half_precision_sums_do_not_depend_on_batches(accumulate, window):
    results = []
    for size in (1, 3, 1000):
        fuser = voxfuse.PatchFuser(
            (30, 21, 14), (12, 12, 12), 3, window=window, output="probabilities",
            activation="softmax", voting="logit", accumulate=accumulate,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        patches = torch.randn(len(fuser), 3, 12, 12, 12, generator=generator)
        results.append(fused_with_truth(fuser, patches, window, size)[0])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_half_precision_sums_give_the_same_labels_in_half_the_ring(axis):
    torch.manual_seed(0)
    volume = torch.rand(2, 1, 30, 22, 18)

    def predictor(patch):
        return torch.cat([patch, 1 - patch, patch * 0.5 + 0.3], 1)

    options = {"output": "labels", "stream_axis": axis, "tta": "rotations", "window": "hann"}
    exact = voxfuse.sliding_window_inference(volume, 12, 3, predictor, **options)
    half = voxfuse.sliding_window_inference(
        volume, 12, 3, predictor, accumulate=torch.float16, **options
    )
    assert (half != exact).float().mean() < 5e-3
    ring = [
        voxfuse.PatchFuser((30, 22, 18), 12, 3, output="labels", accumulate=a).plan().ring_bytes
        for a in (None, torch.float16)
    ]
    assert ring[1] * 2 == ring[0]


@pytest.mark.parametrize("accumulate", HALVES)
def test_members_do_not_overflow(accumulate):
    """Each is within float16's range, their sum is not."""
    fuser = voxfuse.PatchFuser((12, 9), (6, 6), 1, members=4, accumulate=accumulate)
    patches = torch.full((len(fuser), 1, 6, 6), 60000.0)
    fuser.add_members([(patches, ())] * 4)
    assert ((fuser.result() - 60000).abs() <= 60000 * 16 * unit_roundoff(accumulate)).all()


def test_four_axes_take_half_precision_sums():
    volume = torch.rand(1, 1, 6, 5, 4, 4)
    result = voxfuse.sliding_window_inference(
        volume, 3, 2, lambda x: 2 * x, accumulate=torch.bfloat16
    )
    assert ((result - 2 * volume).abs() <= 2 * 2 * 16 * 2**-9).all()
    assert not torch.equal(result, 2 * volume)


def test_a_wrong_accumulator_is_named():
    with pytest.raises(ValueError, match=r"accumulate: got torch.float64, expected None"):
        voxfuse.PatchFuser((9, 9), (4, 4), 2, accumulate=torch.float64)
