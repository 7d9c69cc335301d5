"""Surface distances: by hand, and against MONAI, surface-distance and SimpleITK."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from voxfuse import metrics

SPACING = (0.8, 1.0, 3.0)


def blobs(seed, shape=(14, 15, 12)):
    """Two smooth masks that overlap in part."""
    rng = np.random.default_rng(seed)
    field = rng.random((2, *shape))
    for axis in (1, 2, 3):
        field = field + np.roll(field, 1, axis) + np.roll(field, -1, axis)
    middle = np.median(field)
    masks = field > middle * 1.05
    return masks[0], masks[1]


def test_distances_by_hand():
    """Two voxels against one, 3 mm apart along the second axis, 4 along the third."""
    prediction, truth = np.zeros((2, 1, 4, 6), bool)
    prediction[0, 0, 0] = truth[0, 0, 0] = truth[0, 3, 2] = True
    distances = metrics.surface_distances(prediction, truth, (1, 1, 2))
    assert distances.prediction_to_truth.tolist() == [0]
    assert sorted(distances.truth_to_prediction) == [0, 5]
    assert distances.hausdorff(100) == 5
    assert distances.hausdorff(95) == pytest.approx(4.75)
    assert distances.average() == pytest.approx(5 / 3)
    assert distances.surface_dice(4.9) == pytest.approx(2 / 3)
    assert distances.surface_dice(5) == 1


def test_the_inside_of_a_mask_is_no_surface():
    cube = np.zeros((7, 7, 7), bool)
    cube[1:6, 1:6, 1:6] = True
    assert metrics.surface_distances(cube, cube).truth_to_prediction.size == 125 - 27
    # In each of 5 slices, the ring of 16; the end slices are no surface of their own.
    slices = metrics.surface_distances(cube, cube, outline="slices")
    assert slices.truth_to_prediction.size == 5 * 16


@pytest.mark.parametrize("axis", range(3))
def test_a_single_slice_is_measured_as_a_plane(axis):
    """Else every voxel would be one of the surface, those above and below being outside."""
    prediction, truth = blobs(1)[0][..., 6], blobs(2)[0][..., 6]
    plane = metrics.surface_distances(prediction, truth, (0.8, 1.2))
    masks = [np.expand_dims(mask, axis) for mask in (prediction, truth)]
    single = metrics.surface_distances(*masks, np.insert((0.8, 1.2), axis, 5))
    assert 0 < len(plane.truth_to_prediction) < truth.sum()
    np.testing.assert_array_equal(single.truth_to_prediction, plane.truth_to_prediction)
    np.testing.assert_array_equal(single.prediction_to_truth, plane.prediction_to_truth)


@pytest.mark.parametrize("outline", ["voxels", "slices", "areas"])
def test_policy_for_empty_masks_is_the_table_s(outline):
    if outline == "areas":
        pytest.importorskip("monai", reason="the areas are MONAI's")
    some, none = np.ones((3, 3, 3), bool), np.zeros((3, 3, 3), bool)
    for prediction, truth, column in (
        (some, none, "empty_truth"),
        (none, some, "empty_prediction"),
        (none, none, "both_empty"),
    ):
        distances = metrics.surface_distances(prediction, truth, outline=outline)
        if outline == "slices":  # a full image has no outline in its slices
            continue
        found = distances.hausdorff(), distances.average(), distances.surface_dice(1)
        names = ("hd95", "assd", "surface_dice")
        expected = [getattr(metrics.METRICS[name], column) for name in names]
        np.testing.assert_equal(list(found), expected)
    assert math.isnan(metrics.METRICS["hd95"].empty_prediction)


@pytest.mark.parametrize("seed", range(4))
def test_parity_with_monai(seed):
    monai = pytest.importorskip("monai.metrics", reason="an oracle of this test")
    prediction, truth = blobs(seed)
    distances = metrics.surface_distances(prediction, truth, SPACING)
    p, g = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth))
    options = dict(include_background=True, spacing=SPACING)
    hausdorff = monai.compute_hausdorff_distance(p, g, percentile=95, **options).item()
    average = monai.compute_average_surface_distance(p, g, symmetric=True, **options).item()
    dice = monai.compute_surface_dice(p, g, [1.0], **options).item()
    # MONAI hands out float32.
    assert distances.hausdorff() == pytest.approx(hausdorff, rel=1e-6)
    assert distances.average() == pytest.approx(average, rel=1e-6)
    assert distances.surface_dice(1.0) == pytest.approx(dice, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING])
def test_areas_are_those_of_surface_distance(seed, spacing):
    pytest.importorskip("monai", reason="the areas are MONAI's")
    oracle = pytest.importorskip("surface_distance", reason="an oracle of this test")
    prediction, truth = blobs(seed)
    ours = metrics.surface_distances(prediction, truth, spacing, outline="areas")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # scipy's old names
        theirs = oracle.compute_surface_distances(truth, prediction, spacing)
    both = np.concatenate([theirs["distances_gt_to_pred"], theirs["distances_pred_to_gt"]])
    areas = np.concatenate([theirs["surfel_areas_gt"], theirs["surfel_areas_pred"]])
    # MONAI's table of areas is float32.
    assert ours.average() == pytest.approx(both @ areas / areas.sum(), rel=1e-6)
    assert ours.hausdorff() == pytest.approx(oracle.compute_robust_hausdorff(theirs, 95))
    dice = oracle.compute_surface_dice_at_tolerance(theirs, 1.0)
    assert ours.surface_dice(1.0) == pytest.approx(dice, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_slices_are_those_of_the_wmh_challenge(seed):
    """Its outline: the mask without its erosion by (1, 1, 0) in SimpleITK."""
    sitk = pytest.importorskip("SimpleITK", reason="an oracle of this test")
    spatial = pytest.importorskip("scipy.spatial")
    masks = blobs(seed)
    points = []
    for mask in masks:
        image = sitk.GetImageFromArray(mask.transpose(2, 1, 0).astype(np.uint8))  # z, y, x
        outline = sitk.Subtract(image, sitk.BinaryErode(image, (1, 1, 0)))
        voxels = np.argwhere(sitk.GetArrayFromImage(outline).transpose(2, 1, 0))
        points.append(voxels * SPACING)
    there = spatial.KDTree(points[1]).query(points[0])[0]
    back = spatial.KDTree(points[0]).query(points[1])[0]
    distances = metrics.surface_distances(masks[0], masks[1], SPACING, outline="slices")
    assert distances.truth_to_prediction.size == len(points[1])
    expected = max(np.percentile(there, 95), np.percentile(back, 95))
    assert distances.hausdorff() == pytest.approx(expected)


@given(st.integers(0, 10**6), st.floats(0.2, 5))
def test_distances_are_symmetric_and_scale_with_the_voxels(seed, scale):
    prediction, truth = blobs(seed, (6, 7, 8))
    one = metrics.surface_distances(prediction, truth, SPACING)
    other = metrics.surface_distances(truth, prediction, np.multiply(SPACING, scale))
    assert other.hausdorff() == pytest.approx(scale * one.hausdorff())
    assert other.average() == pytest.approx(scale * one.average())


def test_a_shift_by_a_voxel_is_seen_as_its_size():
    mask = np.zeros((9, 9, 9), bool)
    mask[2:6, 2:6, 2:6] = True
    for axis, size in enumerate(SPACING):
        moved = metrics.surface_distances(np.roll(mask, 1, axis), mask, SPACING)
        assert moved.hausdorff(100) == pytest.approx(size)
        assert moved.surface_dice(size) == 1


@pytest.mark.parametrize("outline", ["voxels", "areas"])
@pytest.mark.parametrize("size", [1.0, np.nextafter(np.float32(1), 2), np.float32(1.2)])
def test_rounding_of_voxel_sizes_does_not_decide_what_is_within_the_tolerance(outline, size):
    """A layer of voxels more, at their size to six digits: all of it is within."""
    if outline == "areas":
        pytest.importorskip("monai", reason="the areas are MONAI's")
    truth, prediction = np.zeros((2, 9, 9, 9), bool)
    truth[3:6, 3:6, 3:6] = prediction[3:7, 3:6, 3:6] = True
    distances = metrics.surface_distances(prediction, truth, float(size), outline=outline)
    assert distances.surface_dice(round(float(size), 5)) == 1
    assert distances.surface_dice(0.999 * size) < 1


def test_errors_name_the_argument():
    mask = np.ones((2, 2))
    with pytest.raises(ValueError, match="outline: got 'mesh'"):
        metrics.surface_distances(mask, mask, outline="mesh")
    with pytest.raises(ValueError, match="3 spatial axes, got 2"):
        metrics.surface_distances(mask, mask, outline="areas")
    with pytest.raises(ValueError, match="slice_axis: got 5"):
        metrics.surface_distances(mask, mask, outline="slices", slice_axis=5)
    with pytest.raises(ValueError, match="tolerance: got -1"):
        metrics.surface_distances(mask, mask).surface_dice(-1)
    with pytest.raises(ValueError, match="percentile: got 120"):
        metrics.surface_distances(mask, mask).hausdorff(120)
