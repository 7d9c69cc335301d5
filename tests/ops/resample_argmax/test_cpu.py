"""Channels resampled with a decision between them: positions, the kernel, what is promised."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import scipy.ndimage
import skimage.transform
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import voxfuse
from benchmarks.resample_benchmark import Case, nnunet
from benchmarks.resample_benchmark import check as check_labels
from tests.ops.resample_argmax.cases import check, random_case
from voxfuse import _library
from voxfuse.ops.resample_argmax import axis_table
from voxfuse.reference.resample_argmax import interpolated

compiled = pytest.mark.skipif(
    not _library.defines_operators(), reason="the compiled CPU library is not built"
)
SIZES = st.integers(1, 40)


def tables(source, target, order):
    pairs = [axis_table(*sizes) for sizes in zip(source, target, order, strict=True)]
    return [index for index, _ in pairs], [weight for _, weight in pairs]


# --- Positions -----------------------------------------------------------------------------------


@hypothesis.given(source=st.tuples(SIZES, SIZES), target=st.tuples(SIZES, SIZES))
def test_order_1_has_the_positions_of_scikit_image(source, target):
    image = np.random.default_rng(0).standard_normal(source)
    expected = skimage.transform.resize(image, target, 1, mode="edge", anti_aliasing=False)
    index, weight = tables(source, target, (1, 1))
    # The weights are rounded to float32, the positions are not.
    actual = interpolated(torch.from_numpy(image)[None], index, [w.double() for w in weight])[0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=8 * 2**-24)


def test_order_0_has_the_positions_of_map_coordinates_as_nnunet_calls_it():
    for source in range(1, 60):
        row = np.arange(source, dtype=np.float64)
        for target in range(1, 60, 3):
            places = (source / target) * (np.arange(target) + 0.5) - 0.5
            expected = scipy.ndimage.map_coordinates(row, [places], order=0, mode="nearest")
            index, weight = axis_table(source, target, 0)
            assert index.tolist() == expected.astype(int).tolist(), (source, target)
            assert not weight[1].any()


@pytest.mark.parametrize("align_corners", [False, True])
@hypothesis.given(source=SIZES, target=SIZES)
def test_linear_positions_are_torchs_too(source, target, align_corners):
    row = torch.randn(1, 1, source, dtype=torch.float64)
    expected = F.interpolate(row, target, mode="linear", align_corners=align_corners)[0]
    index, weight = axis_table(source, target, align_corners=align_corners)
    actual = interpolated(row[0], [index], [weight.double()])
    torch.testing.assert_close(actual, expected, rtol=0, atol=8 * 2**-24)


@hypothesis.given(source=SIZES, target=SIZES, order=st.integers(0, 1), corners=st.booleans())
def test_no_voxel_outside_of_the_source_is_read(source, target, order, corners):
    index, (lower, upper) = axis_table(source, target, order, align_corners=corners)
    assert (index >= 0).all()
    assert (index + (upper != 0) < source).all()
    torch.testing.assert_close(lower + upper, torch.ones(target), rtol=0, atol=2**-24)


# --- The kernel ----------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("part", range(2))
def test_random_calls(part):
    for seed in range(part, 400, 2):
        check(random_case(seed), torch.ops.voxfuse.resample_argmax)


@compiled
@pytest.mark.parametrize("order", [(1, 1, 1), (0, 1, 1)])
def test_labels_are_nnunets_but_for_ties(order):
    """Where a label differs, the float64 values of the two are equal within float32's rounding."""
    case = Case(9, (10, 24, 22), (24, 37, 41), order)
    # Steps of 1/4: ties of values, and means that are as good as equal, occur.
    logits = (8 * torch.randn(case.classes, *case.source)).round() / 4
    labels = voxfuse.resample_argmax(logits, case.target, order=order, backend="cpp")
    found = check_labels(logits, labels.long(), nnunet(logits, case).long(), case)
    assert found["differ"] < 0.01 * labels.numel()


@compiled
def test_same_bits_for_any_number_of_threads_and_instruction_set():
    input = torch.randn(5, 17, 19, 23)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(voxfuse.resample_argmax(input, (31, 40, 50)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=compiled)])
class TestPromises:
    def test_an_unchanged_size_is_argmax(self, backend):
        input = torch.randn(4, 5, 6, 33)
        input[2, 1, 2, 3] = float("nan")
        input[3, 1, 2, 3] = float("nan")
        input[1, 0, 0, 0] = float("inf")
        labels = voxfuse.resample_argmax(input, input.shape[1:], backend=backend)
        assert torch.equal(labels.long(), input.argmax(0))

    def test_ties_go_to_the_lower_channel(self, backend):
        labels = voxfuse.resample_argmax(torch.ones(3, 4, 4), (9, 9), backend=backend)
        assert not labels.any()

    def test_the_neighbour_of_a_nan_that_is_not_read_stays(self, backend):
        """Order 0, and the clipped ends of order 1, take a voxel as it is."""
        input = torch.tensor([[1.0, float("nan")], [2.0, float("inf")]])
        nearest = voxfuse.resample_argmax(input, (4,), order=0, backend=backend)
        assert nearest.tolist() == [1, 1, 0, 0]
        linear = voxfuse.resample_argmax(input, (4,), backend=backend)
        assert linear.tolist() == [1, 0, 0, 0]

    def test_later_regions_overwrite_earlier_ones(self, backend):
        """nnU-Net's regions_class_order: whole tumour, core, enhancing."""
        input = 9.0 * torch.tensor([[1.0, 1, 1, -1], [-1, 1, 1, -1], [-1, -1, 1, 1]])
        labels = voxfuse.resample_argmax(input, (4,), "regions", regions=(2, 1, 3), backend=backend)
        assert labels.tolist() == [2, 1, 3, 3]

    def test_a_mask_is_strictly_above_the_threshold(self, backend):
        input = torch.tensor([[0.0, 1e-9, 1e-6, -1.0, float("nan")]])
        mask = voxfuse.resample_argmax(input, (5,), "mask", backend=backend)
        assert mask.tolist() == [[False, False, True, False, False]]
        plain = voxfuse.resample_argmax(
            input, (5,), "mask", activation="none", threshold=0.0, backend=backend
        )
        assert plain.tolist() == [[False, True, True, False, False]]

    def test_rounding_to_half_makes_ties(self, backend):
        input = torch.tensor([[1.0], [1.0001]])
        assert voxfuse.resample_argmax(input, (1,), backend=backend).item() == 1
        rounded = voxfuse.resample_argmax(input, (1,), round_to_half=True, backend=backend)
        assert rounded.item() == 0

    def test_labels_have_the_smallest_dtype_that_holds_them(self, backend):
        input = torch.zeros(300, 2)
        input[299] = 1
        labels = voxfuse.resample_argmax(input, (3,), backend=backend)
        assert labels.dtype == torch.uint16
        assert labels.tolist() == [299] * 3
        many = voxfuse.resample_argmax(
            input[-2:], (3,), "regions", regions=(1, 65535), backend=backend
        )
        assert (many.dtype, many.tolist()) == (torch.uint16, [65535] * 3)
        out = torch.zeros(3, dtype=torch.int64)
        assert voxfuse.resample_argmax(input, (3,), out=out, backend=backend) is out
        assert out.tolist() == [299] * 3


def test_bad_input_is_named():
    input = torch.zeros(2, 4, 4)
    call = voxfuse.resample_argmax
    with pytest.raises(ValueError, match="input: requires grad"):
        call(input.clone().requires_grad_(), (4, 4))
    with pytest.raises(TypeError, match="input: got complex64"):
        call(input.to(torch.complex64), (4, 4))
    with pytest.raises(ValueError, match=r"size: got \(4,\), expected 2 numbers"):
        call(input, (4,))
    with pytest.raises(ValueError, match=r"size: got \(0, 4\)"):
        call(input, (0, 4))
    with pytest.raises(TypeError, match="size: got 4, expected a sequence of integers"):
        call(input, 4)
    with pytest.raises(
        ValueError, match=r"size: got .*; input \(1, 4, 4\) is to be without the batch"
    ):
        call(input[:1], (4,))
    with pytest.raises(TypeError, match="input: got .*, without the batch axis"):
        call(input[None, None], (4, 4, 4))
    with pytest.raises(ValueError, match="mode: 'labels' of one channel are all 0; use 'mask'"):
        call(input[:1], (4, 4))
    for order in (3, "trilinear", 0.5):
        with pytest.raises(ValueError, match=f"order: got {order!r}, expected 0 or 1"):
            call(input, (4, 4), order=order)
    with pytest.raises(ValueError, match="mode: got 'values' of 2 channels"):
        call(input, (4, 4), "values")
    with pytest.raises(ValueError, match="regions: mode 'regions' needs"):
        call(input, (4, 4), "regions")
    with pytest.raises(ValueError, match="regions: got"):
        call(input, (4, 4), "regions", regions=(1,))
    with pytest.raises(ValueError, match="regions: got .*, expected 2 numbers of 0 to 2147483647"):
        call(input, (4, 4), "regions", regions=(1, 2**31), dtype=torch.int64)
    with pytest.raises(TypeError, match="dtype: got torch.uint8, expected uint16, int16, int32"):
        call(input, (4, 4), "regions", regions=(1, 256), dtype=torch.uint8)
    with pytest.raises(ValueError, match="out: got"):
        call(input, (4, 4), out=torch.zeros(4, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="activation: got 'softmax'"):
        call(input, (4, 4), "mask", activation="softmax")
    with pytest.raises(
        ValueError,
        match="activation: got 'none' with mode 'labels', expected None; it is",
    ):
        call(input, (4, 4), activation="none")
    with pytest.raises(ValueError, match="threshold: got 0.5 with mode 'values', .* and 'regions'"):
        call(input[:1], (4, 4), "values", threshold=0.5)


@compiled
def test_a_table_that_points_outside_is_refused_by_the_operator_itself():
    out, input = torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(2, 3)
    index, weight = torch.tensor([0, 3]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    with pytest.raises(RuntimeError, match="index: got 3, outside of the 3 voxels"):
        torch.ops.voxfuse.resample_argmax(out, input, [index], [weight], 0, 0.0, [], False)
