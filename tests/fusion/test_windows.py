"""Windows: against scipy, MONAI, TorchIO's formula and the papers; C++ against NumPy."""

from __future__ import annotations

import importlib

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy.interpolate import BSpline
from scipy.ndimage import gaussian_filter

import voxfuse
from voxfuse.fusion import windows
from voxfuse.integrations import monai
from voxfuse.reference import windows as numpy_twin

SIZES = (1, 2, 3, 5, 16, 33, 128)
ALL_NAMES = windows.NAMES


def compiled():
    try:
        return importlib.import_module("voxfuse._host")
    except ImportError:
        pytest.skip("voxfuse._host is not built")


@pytest.mark.parametrize("order", range(10))
@pytest.mark.parametrize("size", SIZES)
def test_bspline_is_scipys_at_voxel_centres(size, order):
    knots = np.arange(order + 2) * size / (order + 1)
    expected = BSpline.basis_element(knots, extrapolate=False)(np.arange(size) + 0.5)
    actual = voxfuse.bspline_window(size, order).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)
    assert (actual > 0).all()
    assert (actual == actual[::-1]).all()


def test_bspline_tail_keeps_its_relative_accuracy():
    # At the first voxel centre B_n(u) = u^n / n! exactly, however small.
    u = 8 * 0.5 / 128
    expected = u**7 / 5040
    assert voxfuse.bspline_window(128, 7)[0] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("order", range(1, 10))
def test_effective_width_follows_the_order(order):
    w = voxfuse.bspline_window(1000, order).numpy()
    x = np.arange(1000) - 499.5
    sigma = np.sqrt((w * x * x).sum() / w.sum()) / 1000
    assert sigma == pytest.approx(1 / np.sqrt(12 * (order + 1)), rel=1e-4)


def test_default_order_is_five():
    assert torch.equal(voxfuse.bspline_window(17), voxfuse.bspline_window(17, order=5))


@pytest.mark.parametrize("size", SIZES)
def test_hashemi_is_the_quadratic_spline_of_the_paper(size):
    x = np.arange(size) + 0.5
    spline = BSpline.basis_element(np.array([0, 0.25, 0.75, 1]) * size, extrapolate=False)(x)
    actual = windows.hashemi_window(size).numpy()
    np.testing.assert_allclose(actual, 1.5 * spline, rtol=0, atol=1e-12)
    t = 1 - np.abs(2 * x / size - 1)
    closed = np.where(t <= 0.5, 2 * t**2, 1 - 2 * (1 - t) ** 2)
    np.testing.assert_allclose(actual, closed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [5, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_weight_above_a_floor_is_0_in_another_dtype(order, dtype):
    window = voxfuse.bspline_window((96, 96, 96), order)
    raised = voxfuse.bspline_window((96, 96, 96), order, floor=1e-3)
    assert torch.equal(raised, window.clamp(min=1e-3))
    assert (raised.to(dtype) > 0).all()
    if order == 9 or dtype == torch.float16:
        assert (window.to(dtype) == 0).any()


@pytest.mark.parametrize("floor", [-0.1, 0.75, float("nan"), float("inf")])
def test_a_floor_leaves_a_window(floor):
    with pytest.raises(ValueError, match=f"floor: got {floor}, .* less than the greatest weight, "):
        voxfuse.bspline_window(4, 1, floor=floor)


def test_hashemi_is_a_partition_of_unity_at_half_a_patch():
    w = windows.hashemi_window(32)
    np.testing.assert_allclose(w[:16] + w[16:], 1, rtol=1e-14)


@pytest.mark.parametrize("shape", [(8,), (9, 12), (16, 7, 10)])
def test_monai_gaussian_is_monais_importance_map(shape):
    monai = pytest.importorskip("monai.data.utils")
    expected = monai.compute_importance_map(shape, mode="gaussian", sigma_scale=0.125)
    actual = windows.monai_gaussian_window(shape)
    torch.testing.assert_close(actual.float(), torch.as_tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(8,), (9, 12), (16, 7, 10)])
def test_nnunet_gaussian_is_the_filtered_delta(shape):
    delta = np.zeros(shape)
    delta[tuple(n // 2 for n in shape)] = 1
    expected = gaussian_filter(delta, [n / 8 for n in shape], 0, mode="constant", cval=0)
    actual = windows.nnunet_gaussian_window(shape).numpy()
    inside = expected > 0
    ratio = actual[inside] / expected[inside]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-10)
    assert (actual > 0).all()


def test_hann_is_torchs_without_the_ends():
    expected = torch.hann_window(12, periodic=False, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(windows.hann_window(10), expected, rtol=1e-13, atol=1e-15)


def test_several_sizes_give_the_product():
    w = voxfuse.bspline_window((4, 6, 5), 3)
    a, b, c = (voxfuse.bspline_window(n, 3) for n in (4, 6, 5))
    torch.testing.assert_close(w, torch.einsum("i,j,k->ijk", a, b, c), rtol=1e-15, atol=0)


@hypothesis.given(size=st.integers(1, 200), order=st.integers(0, 9))
def test_compiled_windows_equal_the_numpy_ones(size, order):
    host = compiled()
    close = dict(rtol=1e-14, atol=0)
    np.testing.assert_allclose(host.bspline(size, order), numpy_twin.bspline(size, order), **close)
    np.testing.assert_allclose(host.hashemi(size), numpy_twin.hashemi(size), **close)
    np.testing.assert_allclose(host.hann(size), numpy_twin.hann(size), **close)
    arguments = (size, (size - 1) / 2, size / 8)
    np.testing.assert_allclose(host.gaussian(*arguments), numpy_twin.gaussian(*arguments), **close)


@pytest.mark.parametrize("name", ALL_NAMES)
@pytest.mark.parametrize("shape", [(7,), (8, 5), (4, 1, 6)])
def test_every_name_gives_positive_weights_of_the_patch(name, shape):
    vectors = windows.resolve_window(name, shape)
    if len(vectors) == len(shape):
        assert [v.shape for v in vectors] == [(n,) for n in shape]
    else:
        assert vectors[0].shape == shape
    assert all((v > 0).all() for v in vectors)


def test_arrays_are_taken_dense_or_an_axis():
    dense = np.ones((3, 4), dtype=np.float32)
    assert len(windows.resolve_window(dense, (3, 4))) == 1
    assert len(windows.resolve_window(torch.ones(3, 4), (3, 4))) == 1
    assert len(windows.resolve_window([np.ones(3), [1, 2, 2, 1]], (3, 4))) == 2


@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        ("bspline10", ValueError, "window: got 'bspline10', expected one of 'bspline', "),
        (np.ones((4, 3)), ValueError, "window: got shape (4, 3), expected (3, 4), or one"),
        ([np.ones(3)], ValueError, "window: got shape (3,), expected (3, 4), or one vector"),
        (-np.ones((3, 4)), ValueError, "window: weights must be finite, >= 0 and not all 0"),
        (np.zeros((3, 4)), ValueError, "window: weights must be finite, >= 0 and not all 0"),
        (np.full((3, 4), np.nan), ValueError, "window: weights must be finite, >= 0"),
        (3.5, TypeError, "window: got float, expected a name, an array of the patch's shape"),
        ([["a", "b", "c"], [1, 1, 1, 1]], TypeError, "expected real numbers"),
        (np.ones((3, 4)) + 1j, TypeError, "expected real numbers"),
        (torch.ones(3, 4) + 1j, TypeError, "expected real numbers"),
    ],
)
def test_bad_windows(window, error, message):
    with pytest.raises(error) as caught:
        windows.resolve_window(window, (3, 4))
    assert message in str(caught.value)


def test_a_window_that_is_to_be_learned_is_an_error_where_no_gradient_would_reach_it():
    patches, window = torch.rand(2, 1, 4), torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="window: requires grad, but no gradient flows to it"):
        voxfuse.overlap_add(patches, [[0, 2]], (6,), [window])
    volume, net = torch.rand(1, 1, 6), torch.nn.Identity()
    infer = monai.sliding_window_inference
    with pytest.raises(ValueError, match="roi_weight_map: requires grad, but no gradient flows"):
        infer(volume, (4,), 1, net, roi_weight_map=window)
    with torch.no_grad():
        result = infer(volume, (4,), 1, net, roi_weight_map=window)
    torch.testing.assert_close(result, volume)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "size: got 0, expected at least 1"),
        ((2.5,), TypeError, "size: got 2.5, expected an integer or one integer an axis"),
        (((),), ValueError, "size: got no axis, expected at least one"),
        ((8, 10), ValueError, "order: got 10, expected 0 to 9"),
        ((8, -1), ValueError, "order: got -1, expected 0 to 9"),
        ((8, 1.0), TypeError, "order: got 1.0, expected an integer from 0 to 9"),
    ],
)
def test_bad_bspline_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        voxfuse.bspline_window(*arguments)
    assert str(caught.value) == message


def test_bad_sigma():
    with pytest.raises(ValueError, match="sigma_scale: got 0, expected a finite number > 0"):
        windows.gaussian_window(8, 0)
