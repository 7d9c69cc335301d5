"""The sliding window for MONAI against the installed MONAI, over all of its options."""

from __future__ import annotations

import inspect

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

inferers = pytest.importorskip("monai.inferers")
from monai.data import MetaTensor  # noqa: E402

import voxfuse  # noqa: E402
from voxfuse.integrations import monai as fused  # noqa: E402


def drawn_options(data, axes):
    """Options that mean the same to both, and whether the weights change from call to call."""
    share = st.sampled_from([0, 0.25, 0.5])
    several = st.lists(share, min_size=axes, max_size=axes)
    options = {
        "overlap": data.draw(st.one_of(share, several, st.just(0.6))),
        "mode": data.draw(st.sampled_from(["constant", "gaussian"])),
        "sigma_scale": data.draw(st.sampled_from([0.125, 0.3, [0.2] * axes])),
        "cval": data.draw(st.sampled_from([0.0, 1.5])),
        "sw_device": data.draw(st.sampled_from([None, "cpu"])),
        "device": data.draw(st.sampled_from([None, "cpu"])),
        "with_coord": data.draw(st.booleans()),
    }
    if axes < 4 and data.draw(st.booleans()):
        options |= {"padding_mode": "replicate", "cval": 0.0}
    return options


class Network:
    """A predictor with every liberty that MONAI gives one; it counts its calls."""

    def __init__(self, kind, scales):
        self.kind, self.scales = kind, scales

    def __call__(self, patch, *more, factor, condition=None):
        axes = patch.ndim - 2
        first = torch.linspace(0, factor, patch.shape[2]).view(-1, *[1] * (axes - 1))
        result = torch.cat([patch * first, patch[:, :1] - first], 1)
        if condition is not None:
            result = result + condition[:, :1]
        for windows in more:
            starts = [window[2].start for window in windows]
            result = result + 0.01 * torch.tensor(starts).view(-1, 1, *[1] * axes)
        outputs = [self.at(result, scale) for scale in self.scales]
        if self.kind is dict:
            named = [(f"output{i}", each) for i, each in enumerate(outputs)]
            return dict(reversed(named))
        return outputs[0] if self.kind is None else self.kind(outputs)

    @staticmethod
    def at(result, scale):
        result = result.clone()  # MONAI multiplies in place
        for axis in range(2, result.ndim):
            if scale == 2:
                result = result.repeat_interleave(2, axis)
            elif scale == 0.5:
                halves = result.unflatten(axis, (-1, 2))
                result = halves.mean(axis + 1)
        return result


def compare(actual, expected, dtype=torch.float32):
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, torch.Tensor):
        actual, expected = [actual], [expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("function", ["drop-in", "voxfuse"])
@hypothesis.settings(max_examples=150)
@hypothesis.given(data=st.data())
def test_equals_monai(function, data):
    axes = data.draw(st.integers(1, 4))
    # Coarser and finer outputs have whole coordinates where extents are multiples of 4.
    kind = data.draw(st.sampled_from([None, None, tuple, list, dict]))
    step = 4 if kind is not None and axes < 4 else 1
    largest = 20 if axes < 3 else 12 if axes < 4 else 5
    size = st.integers(1 if step > 1 else 2, largest // step).map(lambda n: n * step)
    image = data.draw(st.lists(size, min_size=axes, max_size=axes))
    roi = data.draw(
        st.one_of(
            size,
            st.lists(st.one_of(size, st.sampled_from([-1, None])), min_size=axes, max_size=axes),
        )
    )
    options = drawn_options(data, axes)
    if step > 1:
        options["overlap"] = data.draw(st.sampled_from([0, 0.5]))
    scales = [1]
    if kind is not None:
        scale = st.sampled_from([0.5, 1, 2] if axes < 4 else [1])
        # MONAI fails at an output of the patch's extent after one of another.
        scales = data.draw(st.lists(scale, min_size=1, max_size=3))
        scales.sort(key=lambda scale: scale != 1)
    torch.manual_seed(0)
    inputs = torch.rand(data.draw(st.integers(1, 3)), 2, *image)
    if data.draw(st.booleans()):
        options["condition"] = torch.rand_like(inputs)
    batch = data.draw(st.integers(1, 4))
    extent = [
        n if r is None or r < 1 else r
        for r, n in zip(roi if isinstance(roi, list) else [roi] * axes, image, strict=True)
    ]
    if data.draw(st.booleans()):
        options["roi_weight_map"] = torch.rand(extent) + 0.1
    calls = []
    if scales == [1]:
        if data.draw(st.booleans()):
            options["buffer_steps"] = data.draw(st.integers(0, 3))
            options["buffer_dim"] = data.draw(st.integers(-axes, axes - 1))
        elif data.draw(st.booleans()):

            def process(outputs, patch, weight):
                calls.append(1)
                return [2 * each for each in outputs], weight * len(calls) + 0.1

            options["process_fn"] = process
    predictor = Network(kind, scales)
    expected = inferers.sliding_window_inference(
        inputs, roi, batch, predictor, factor=2.0, **options
    )
    calls.clear()
    if function == "drop-in":
        actual = fused.sliding_window_inference(
            inputs, roi, batch, predictor, factor=2.0, **options
        )
    else:
        actual = voxfuse.sliding_window_inference(
            inputs, roi, batch, predictor, factor=2.0, stream_axis=0, **options
        )
    compare(actual, expected)


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


@pytest.mark.parametrize("axes", [2, 3])
def test_a_network_gives_the_same_labels(axes):
    """Ten classes, two samples, three input channels."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    net = nets.UNet(axes, 3, 10, (4, 8), (2,)).eval()
    inputs = torch.rand(2, 3, *(32, 24, 24)[:axes])
    with torch.no_grad():
        actual, expected = both(inputs, (16,) * axes, 4, net, 0.5, "gaussian")
        labels = [
            function(inputs, (16,) * axes, 4, net, 0.5, "gaussian", output="labels")
            for function in (fused.sliding_window_inference, voxfuse.sliding_window_inference)
        ]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    for each in labels:
        assert torch.equal(each, expected.argmax(1, keepdim=True).to(torch.uint8))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"roi_size: got \(4, 4, 4\), expected one number"):
        fused.sliding_window_inference(torch.rand(1, 1, 8, 8), (4, 4, 4), 1, lambda x: x)
    with pytest.raises(ValueError, match="overlap: got 1.0"):
        fused.sliding_window_inference(torch.rand(1, 1, 8), (4,), 1, lambda x: x, 1.0)
    with pytest.raises(ValueError, match="mode: got 'cubic'"):
        fused.sliding_window_inference(torch.rand(1, 1, 8), (4,), 1, lambda x: x, mode="cubic")
    with pytest.raises(ValueError, match="buffer_dim: got 7"):
        fused.sliding_window_inference(
            torch.rand(1, 1, 8), (4,), 1, lambda x: x, buffer_steps=1, buffer_dim=7
        )


def test_arguments_by_position_are_those_of_monai():
    names = list(inspect.signature(inferers.sliding_window_inference).parameters)
    for function in (fused.sliding_window_inference, voxfuse.sliding_window_inference):
        assert list(inspect.signature(function).parameters)[: len(names) - 1] == names[:-1]
    theirs = inspect.signature(inferers.sliding_window_inference).parameters
    for name, ours in inspect.signature(fused.sliding_window_inference).parameters.items():
        if name in theirs and theirs[name].default is not inspect.Parameter.empty:
            assert ours.default == theirs[name].default


@pytest.mark.parametrize("call", ["function", "inferer", "adapt"])
def test_options_beyond_monai(call, tmp_path):
    torch.manual_seed(0)
    volume = torch.rand(1, 1, 24, 20, 18)
    features, last = torch.nn.Conv3d(1, 3, 3, padding=1).eval(), torch.nn.Conv3d(3, 7, 1)
    options = {"window": "hann", "output": "labels", "tta": "rotations"}
    options["head"] = (last.weight, last.bias)
    expected = voxfuse.sliding_window_inference(volume, 12, 2, features, 0.5, **options)
    out = np.memmap(tmp_path / "labels", np.uint8, "w+", shape=(24, 20, 18))
    if call == "function":
        actual = fused.sliding_window_inference(volume, 12, 2, features, 0.5, out=out, **options)
    else:
        kind = fused.SlidingWindowInferer if call == "inferer" else fused.SlidingWindowInfererAdapt
        inferer = kind((12, 12, 12), 2, 0.5, **options)
        assert isinstance(inferer, inferers.Inferer)
        actual = inferer(volume, features, out=out)
    assert actual is out
    assert np.array_equal(out, expected[0, 0].numpy())


def test_labels_of_a_metatensor_keep_its_affine():
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    inputs = MetaTensor(torch.rand(1, 1, 20, 18, 16), affine=affine)

    def predictor(patch):
        assert type(patch) is torch.Tensor
        return {"a": torch.cat([patch, 1 - patch], 1), "b": torch.cat([patch, patch.sin()], 1)}

    for function in (fused.sliding_window_inference, voxfuse.sliding_window_inference):
        result = function(inputs, 8, 2, predictor, output="labels")
        for labels in result.values():
            assert isinstance(labels, MetaTensor)
            assert labels.dtype == torch.uint8
            assert torch.equal(labels.affine, affine)


@pytest.mark.parametrize(("order", "dtype"), [(5, torch.float16), (9, torch.float32)])
def test_a_spline_with_a_floor_weights_monais_own_window(order, dtype):
    volume = torch.rand(1, 1, 96, 96, 96).to(dtype)

    def mean(floor):
        window = voxfuse.bspline_window((64, 64, 64), order, floor=floor)
        return inferers.sliding_window_inference(
            volume, 64, 4, lambda x: x, 0.5, roi_weight_map=window
        )

    # MONAI's sums are of the volume's dtype.
    torch.testing.assert_close(mean(1e-3), volume, rtol=0.01, atol=1e-4)
    assert mean(0.0).isnan().any()
