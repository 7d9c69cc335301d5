"""Finalisation of a ring's slices: the C++ kernel against the reference, and what it promises."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tests.ops.finalize_slab.cases import MODES, SlabCase, check, finalized
from voxfuse import _library
from voxfuse.ops.finalize_slab import finalize_slab

compiled = pytest.mark.skipif(
    not _library.defines_operators(), reason="the compiled CPU library is not built"
)


@compiled
@hypothesis.given(data=st.data())
def test_the_kernel_equals_the_reference(data):
    extent = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    axis = data.draw(st.integers(0, len(extent) - 1))
    start = data.draw(st.integers(0, 20))
    stop = start + data.draw(st.integers(0, extent[axis]))
    channels = data.draw(st.integers(1, 9))
    mode = data.draw(st.sampled_from(list(MODES)))
    activation = data.draw(st.sampled_from(["identity", "sigmoid", "softmax"]))
    applied = data.draw(st.booleans())
    head = data.draw(st.booleans())
    real = data.draw(st.sampled_from([torch.float32, torch.float64]))
    dtype = data.draw(st.sampled_from([real, torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ring = torch.randn(channels, *extent, generator=generator, dtype=real)
    if mode == "entropy" and (applied or activation == "identity"):
        ring = ring.softmax(0) if activation != "sigmoid" else ring.sigmoid()
        head = False
    options = {
        "activation": activation,
        "applied": applied,
        "divisor": data.draw(st.sampled_from([1, 2])) if mode != "entropy" else 1,
        "clear": data.draw(st.booleans()),
        "threshold": 0.3,
    }
    classes = channels
    if head:
        classes = data.draw(st.integers(1, 11))
        options["weight"] = torch.randn(classes, channels, generator=generator, dtype=real)
        options["bias"] = torch.randn(classes, generator=generator, dtype=real)
    if data.draw(st.booleans()):
        options["total"] = (torch.rand(extent, generator=generator) > 0.3).double()
        options["fill"] = 1
    arguments = (ring, mode, axis, start, stop, classes, dtype)
    expected, expected_ring = finalized("reference", *arguments, **options)
    actual, actual_ring = finalized("cpp", *arguments, **options)
    assert torch.equal(actual_ring, expected_ring)
    if mode in ("labels", "mask"):
        if head or (activation != "identity" and not applied and mode == "mask"):
            # Values a rounding apart may fall on either side.
            assert (actual != expected).float().mean() <= 0.05 if actual.numel() > 50 else True
        else:
            assert torch.equal(actual, expected)
    else:
        rounding = torch.finfo(dtype).eps
        precision = max(rounding, 16 * torch.finfo(real).eps)
        torch.testing.assert_close(actual, expected, rtol=precision, atol=2 * precision)


@compiled
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64]
)
def test_labels_are_those_of_argmax_ties_and_nan_included(dtype):
    ring = torch.randint(0, 3, (70, 5, 41)).float()
    ring[11, 2, 3:20] = float("nan")
    ring[30, 2, 5:9] = float("nan")
    out = torch.empty(1, 5, 41, dtype=dtype)
    finalize_slab(ring, out, "labels")
    assert torch.equal(out.to(torch.int64), ring.argmax(0, keepdim=True))


@compiled
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("fill", [0.0, 0.5, 1.0, 2.0])
def test_a_mask_is_0_or_1_uncovered_voxels_included(dtype, fill):
    check(SlabCase("mask", dtype=dtype, total=True, fill=fill), torch.ops.voxfuse.finalize_slab)


@compiled
@pytest.mark.parametrize("fill", [-1.0, 9.0])
def test_the_fill_of_labels_is_an_integer_of_their_type(fill):
    for dtype in (torch.uint8, torch.int16, torch.int64):
        case = SlabCase("labels", dtype=dtype, total=True, fill=fill)
        check(case, torch.ops.voxfuse.finalize_slab)


@compiled
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slab_is_written_into_its_place_of_a_volume(axis):
    extent = [4, 5, 6]
    ring = torch.randn(3, *extent)
    shape = list(extent)
    shape[axis] = 20
    volume = torch.full((3, *shape), 7.0)
    place = volume.narrow(1 + axis, 9, 3)
    finalize_slab(ring, place, ring_axis=axis, start=9, stop=12)
    slots = [x % extent[axis] for x in range(9, 12)]
    assert torch.equal(place, ring.index_select(1 + axis, torch.tensor(slots)))
    assert (volume == 7).sum() == volume.numel() - place.numel()


@compiled
def test_bits_do_not_depend_on_the_number_of_threads():
    ring = torch.randn(7, 6, 61, 47)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = torch.empty_like(ring)
            results.append(finalize_slab(ring, out, activation="softmax"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@compiled
def test_passes_opcheck():
    ring = torch.randn(3, 4, 5)
    arguments = (ring, torch.empty(1, 2, 5), None, None, None, 0, 3, 5, 2, False, 4)
    torch.library.opcheck(torch.ops.voxfuse.finalize_slab, (*arguments, 1.0, 0.5, 0.0, False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "votes"}, "mode: got 'votes'"),
        ({"activation": "relu"}, "activation: got 'relu'"),
        ({"ring_axis": 2}, "ring_axis: got 2"),
        ({"start": 1, "stop": 9}, "start, stop: got 1, 9"),
        ({"out": torch.empty(2, 4, 5)}, "out: got shape"),
        ({"divisor": 0}, "divisor: got 0"),
        ({"threshold": math.nan}, "threshold: got nan"),
        (
            {"fill": 1e5, "out": torch.empty(3, 4, 5).half()},
            "fill: got 100000.0, expected a number",
        ),
        ({"weight": torch.empty(2, 3)}, "weight: given without bias"),
        ({"bias": torch.empty(3)}, "bias: given without weight"),
        ({"total": torch.ones(4, 5)}, "total: got float32"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"ring": torch.randn(3, 4, 5), "out": torch.empty(3, 4, 5), "mode": "values"}
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        finalize_slab(**{**arguments, **change})


def test_labels_that_do_not_fit_the_type_are_refused():
    with pytest.raises(ValueError, match="does not hold the labels of 300 classes"):
        finalize_slab(torch.randn(300, 4), torch.empty(1, 4, dtype=torch.uint8), "labels")
    with pytest.raises(TypeError, match="out: got float32"):
        finalize_slab(torch.randn(3, 4), torch.empty(1, 4), "labels")


@pytest.mark.parametrize("mode", ["mask", "foreground", "entropy"])
def test_what_is_made_of_probabilities_is_not_made_of_logits(mode):
    ring, out = torch.rand(3, 4, 5), torch.empty(3 if mode == "mask" else 1, 4, 5)
    out = out.bool() if mode == "mask" else out
    with pytest.raises(ValueError, match=f"activation: got 'none' with mode '{mode}'"):
        finalize_slab(ring, out, mode)
    given = finalize_slab(ring, out.clone(), mode, activation="identity")
    assert torch.equal(given, finalize_slab(ring, out.clone(), mode, applied=True))


@pytest.mark.parametrize(("mode", "fill"), [("labels", -1), ("labels", 300), ("mask", 2)])
def test_a_fill_that_the_result_cannot_hold_is_an_error(mode, fill):
    dtype = torch.uint8 if mode == "labels" else torch.bool
    out = torch.empty(1 if mode == "labels" else 3, 4, 5, dtype=dtype)
    with pytest.raises(ValueError, match=f"fill: got {fill}, expected an integer from 0 to "):
        finalize_slab(torch.rand(3, 4, 5), out, mode, activation="softmax", fill=fill)
