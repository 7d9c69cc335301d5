"""The sliding window for MONAI against the installed MONAI, over all of its options."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

inferers = pytest.importorskip("monai.inferers")
from monai.data import MetaTensor  # noqa: E402

from voxfuse.integrations import monai as fused  # noqa: E402


@hypothesis.settings(max_examples=40)
@hypothesis.given(data=st.data())
def test_equals_monai(data):
    axes = data.draw(st.integers(1, 4))
    largest = 18 if axes < 4 else 6
    image = data.draw(st.lists(st.integers(2, largest), min_size=axes, max_size=axes))
    roi = data.draw(st.lists(st.integers(-1, largest), min_size=axes, max_size=axes))
    share = st.sampled_from([0, 0.25, 0.5, 0.6])
    options = {
        "overlap": data.draw(st.one_of(share, st.lists(share, min_size=axes, max_size=axes))),
        "mode": data.draw(st.sampled_from(["constant", "gaussian"])),
        "sigma_scale": data.draw(st.sampled_from([0.125, 0.3, [0.2] * axes])),
        "cval": data.draw(st.sampled_from([0.0, 1.5])),
    }
    if axes < 4 and data.draw(st.booleans()):
        options["padding_mode"] = "replicate"
    torch.manual_seed(0)
    inputs = torch.rand(data.draw(st.integers(1, 3)), 2, *image)
    size = data.draw(st.integers(1, 4))

    def predictor(patch):
        first = torch.linspace(0, 1, patch.shape[2]).view(-1, *[1] * (axes - 1))
        return torch.cat([patch * first, patch[:, :1] - first], 1)

    expected = inferers.sliding_window_inference(inputs, roi, size, predictor, **options)
    actual = fused.sliding_window_inference(inputs, roi, size, predictor, **options)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


def both(inputs, *args, **kwargs):
    expected = inferers.sliding_window_inference(inputs, *args, **kwargs)
    actual = fused.sliding_window_inference(inputs, *args, **kwargs)
    return actual, expected


@pytest.mark.parametrize("kind", [tuple, dict])
@pytest.mark.parametrize("mode", ["constant", "gaussian"])
def test_several_outputs_of_several_resolutions(kind, mode):
    inputs = torch.rand(2, 1, 40, 36, 20)

    def predictor(patch):
        coarse = torch.nn.functional.avg_pool3d(patch, 2)
        fine = torch.nn.functional.interpolate(patch, scale_factor=2)
        outputs = {"a": patch, "b": coarse, "c": fine}
        return outputs if kind is dict else tuple(outputs.values())

    actual, expected = both(inputs, (16, 16, 16), 3, predictor, 0.5, mode)
    assert type(actual) is type(expected)
    pairs = zip(
        actual.values() if kind is dict else actual,
        expected.values() if kind is dict else expected,
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_a_coarser_output_of_a_volume_that_is_padded():
    inputs = torch.rand(1, 1, 12, 24)
    actual, expected = both(inputs, (16, 16), 2, lambda x: torch.nn.functional.avg_pool2d(x, 2))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


def test_coordinates_arguments_and_conditions_reach_the_predictor():
    inputs, condition = torch.rand(2, 1, 20, 18), torch.rand(2, 1, 20, 18)
    seen = []

    def predictor(patch, windows, factor, *, condition, shift):
        seen.append(windows)
        return factor * patch + condition + shift

    arguments = (inputs, 8, 3, predictor, 0.5, "gaussian", 0.125, "constant", 0.0, None, None)
    more = (False, None, None, None, -1, True, 3.0)
    expected = inferers.sliding_window_inference(*arguments, *more, condition=condition, shift=1)
    theirs, seen = seen, []
    actual = fused.sliding_window_inference(*arguments, *more, condition=condition, shift=1)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    assert seen == theirs


def test_weights_by_window_and_of_the_caller():
    inputs = torch.rand(1, 1, 20, 18)
    given = torch.rand(8, 8) + 0.1
    actual, expected = both(inputs, (8, 8), 2, lambda x: x * given, roi_weight_map=given)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)

    def process(outputs, patch, weight):
        return tuple(2 * output for output in outputs), weight * 1.0

    actual, expected = both(inputs, (8, 8), 2, lambda x: x, 0.5, "gaussian", process_fn=process)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_buffering_changes_nothing(steps):
    inputs = torch.rand(2, 1, 30, 20)
    actual, expected = both(
        inputs, (8, 8), 2, lambda x: x * x, 0.5, "gaussian", buffer_steps=steps, buffer_dim=0
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


def test_half_precision_is_summed_in_float32():
    inputs = torch.rand(1, 1, 40, 40).half()
    actual = fused.sliding_window_inference(inputs, 16, 4, lambda x: x, 0.5, "gaussian")
    assert actual.dtype == torch.float16
    assert torch.equal(actual, inputs)


def test_gradients_flow_as_in_monai():
    weights = []
    for function in (fused.sliding_window_inference, inferers.sliding_window_inference):
        torch.manual_seed(0)
        net = torch.nn.Conv2d(1, 1, 3, padding=1)
        function(torch.ones(1, 1, 20, 20), 8, 4, net).square().sum().backward()
        weights.append(net.weight.grad)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-4)


def test_a_metatensor_stays_one():
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    inputs = MetaTensor(torch.rand(1, 1, 20, 18, 16), affine=affine, meta={"name": "head"})
    actual, expected = both(inputs, (8, 8, 8), 2, lambda x: 2 * x)
    assert isinstance(actual, MetaTensor)
    assert torch.equal(actual.affine, expected.affine)
    assert actual.meta["name"] == expected.meta["name"] == "head"
    torch.testing.assert_close(actual.as_tensor(), expected.as_tensor(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["SlidingWindowInferer", "SlidingWindowInfererAdapt"])
@pytest.mark.parametrize("cached", [False, True])
def test_inferers_are_those_of_monai(name, cached):
    inputs = torch.rand(1, 1, 30, 20, 18)
    options = {
        "roi_size": (16, 16, 16),
        "sw_batch_size": 2,
        "overlap": 0.5,
        "mode": "gaussian",
        "cache_roi_weight_map": cached,
    }
    ours, theirs = getattr(fused, name)(**options), getattr(inferers, name)(**options)
    assert isinstance(ours, getattr(inferers, name))
    torch.testing.assert_close(
        ours(inputs, lambda x: x.sin()), theirs(inputs, lambda x: x.sin()), rtol=1e-5, atol=2e-6
    )


def test_a_network_gives_the_same_labels():
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    net = nets.UNet(3, 1, 10, (4, 8), (2,)).eval()
    inputs = torch.rand(1, 1, 32, 24, 24)
    with torch.no_grad():
        actual, expected = both(inputs, (16, 16, 16), 4, net, 0.5, "gaussian")
    assert torch.equal(actual.argmax(1), expected.argmax(1))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="expected .B, C. and 3 spatial axes"):
        fused.sliding_window_inference(torch.rand(1, 1, 8, 8), (4, 4, 4), 1, lambda x: x)
    with pytest.raises(ValueError, match="overlap: got 1.0"):
        fused.sliding_window_inference(torch.rand(1, 1, 8), (4,), 1, lambda x: x, 1.0)
    with pytest.raises(ValueError, match="mode: got 'cubic'"):
        fused.sliding_window_inference(torch.rand(1, 1, 8), (4,), 1, lambda x: x, mode="cubic")
    with pytest.raises(ValueError, match="buffer_dim: got 7"):
        fused.sliding_window_inference(
            torch.rand(1, 1, 8), (4,), 1, lambda x: x, buffer_steps=1, buffer_dim=7
        )
