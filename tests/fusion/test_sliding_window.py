"""Sliding-window inference: identity, MONAI's numbers, memory, padding, bad input."""

from __future__ import annotations

import builtins
import math
import weakref

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import voxfuse
from voxfuse.fusion import windows

RULES = ("shifted", "even", "half_patch")


def twice(patch):
    return torch.cat([2 * patch, -patch], 1)


@hypothesis.given(
    spatial=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    roi=st.lists(st.integers(1, 24), min_size=3, max_size=3),
    batch=st.integers(1, 3),
    size=st.integers(1, 5),
    grid=st.sampled_from(RULES),
    window=st.sampled_from(windows.NAMES),
    padding=st.sampled_from([None, "reflect", "replicate", "circular"]),
)
def test_a_pointwise_predictor_gives_its_values_back(
    spatial, roi, batch, size, grid, window, padding
):
    generator = torch.Generator().manual_seed(len(spatial))
    volume = torch.rand(batch, 1, *spatial, generator=generator)
    result = voxfuse.sliding_window_inference(
        volume,
        roi[: len(spatial)],
        size,
        twice,
        0.5,
        window=window,
        grid=grid,
        padding_mode=padding,
    )
    torch.testing.assert_close(result, twice(volume), rtol=8 * 2**-23, atol=0)


@pytest.mark.parametrize("roi", [(16, 12, 10), (40, 12, 7)])
@pytest.mark.parametrize("overlap", [0.25, 0.5, (0.5, 0.25, 0.6)])
@pytest.mark.parametrize("window", ["constant", "monai_gaussian"])
def test_equals_monai(roi, overlap, window):
    inferers = pytest.importorskip("monai.inferers")
    torch.manual_seed(0)
    volume = torch.rand(2, 3, 33, 20, 17)
    net = torch.nn.Conv3d(3, 2, 3, padding=1)
    mode = "constant" if window == "constant" else "gaussian"
    with torch.no_grad():
        expected = inferers.sliding_window_inference(volume, roi, 2, net, overlap, mode=mode)
    actual = voxfuse.sliding_window_inference(volume, roi, 3, net, overlap, window=window)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_bits_do_not_depend_on_the_batch_size(dtype):
    torch.manual_seed(0)
    volume = torch.rand(2, 1, 30, 21, 14)
    noise = torch.rand(1, 3, 12, 12, 12)

    def predictor(patch):
        return (patch * noise).to(dtype)

    results = [
        voxfuse.sliding_window_inference(volume, 12, size, predictor, 0.5)
        for size in (1, 2, 7, 1000)
    ]
    assert results[0].dtype == dtype
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_only_one_batch_of_predictions_is_alive():
    alive = []
    most = 0

    def predictor(patch):
        nonlocal most
        result = patch.clone()
        alive.append(weakref.ref(result.untyped_storage()))
        most = max(most, sum(ref() is not None for ref in alive))
        return result

    voxfuse.sliding_window_inference(torch.rand(1, 1, 32, 32), 8, 1, predictor)
    assert most <= 2


def test_runs_without_gradients():
    net = torch.nn.Conv1d(1, 1, 3, padding=1)
    result = voxfuse.sliding_window_inference(torch.rand(1, 1, 20), 8, 1, net)
    assert not result.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("padding", ["constant", "reflect", "replicate", "circular"])
def test_patches_are_padded_as_torch_pads(padding):
    volume = torch.arange(6.0).reshape(1, 1, 6)
    seen = []

    def predictor(patch):
        seen.append(patch.clone())
        return patch

    voxfuse.sliding_window_inference(volume, 11, 1, predictor, padding_mode=padding, cval=9)
    value = {"value": 9} if padding == "constant" else {}
    expected = torch.nn.functional.pad(volume, (2, 3), mode=padding, **value)
    assert torch.equal(seen[0], expected)


def test_reflection_goes_as_far_as_needed():
    volume = torch.arange(3.0).reshape(1, 1, 3)
    seen = []

    def predictor(patch):
        seen.append(patch.clone())
        return patch

    voxfuse.sliding_window_inference(volume, 15, 1, predictor, padding_mode="reflect")
    assert np.array_equal(seen[0][0, 0].numpy(), np.pad(np.arange(3.0), 6, mode="reflect"))


def test_roi_below_one_means_the_volume():
    shapes = []

    def predictor(patch):
        shapes.append(tuple(patch.shape))
        return patch

    voxfuse.sliding_window_inference(torch.rand(1, 2, 9, 7), (0, 5), 1, predictor)
    assert set(shapes) == {(1, 2, 9, 5)}


def test_progress_says_what_is_missing(monkeypatch):
    original = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    with pytest.raises(RuntimeError, match="progress: needs the package tqdm"):
        voxfuse.sliding_window_inference(torch.rand(1, 1, 8), 4, 1, twice, progress=True)


def test_progress_shows_a_bar(capsys):
    pytest.importorskip("tqdm")
    voxfuse.sliding_window_inference(torch.rand(1, 1, 8), 4, 1, twice, progress=True)
    assert "batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inputs": [1]}, TypeError, "inputs: expected a torch.Tensor, got list"),
        (
            {"inputs": torch.rand(3, 4)},
            ValueError,
            "inputs: got shape (3, 4), expected (B, channels, *spatial) with 1 to 4 spatial axes, "
            "none of them empty",
        ),
        (
            {"roi_size": (4, 4, 4)},
            ValueError,
            "roi_size: got (4, 4, 4), expected one number or 2, to go with a volume of (9, 8)",
        ),
        ({"roi_size": 4.5}, TypeError, "roi_size: got 4.5, expected integers"),
        (
            {"predictor": 3},
            TypeError,
            "predictor: got int, expected a callable, or a list of them (it comes fourth, after "
            "sw_batch_size, as in MONAI)",
        ),
        ({"sw_batch_size": 0}, ValueError, "sw_batch_size: got 0, expected an integer >= 1"),
        (
            {"grid": "odd"},
            ValueError,
            "grid: got 'odd', expected one of 'shifted', 'even', 'half_patch'",
        ),
        (
            {"padding_mode": "mirror"},
            ValueError,
            "padding_mode: got 'mirror', expected one of 'constant', 'reflect', 'replicate', "
            "'circular'",
        ),
        ({"overlap": 1.0}, ValueError, "overlap: got 1.0, expected numbers in [0, 1), one or 2"),
        (
            {"predictor": lambda patch: patch[..., 0]},
            ValueError,
            "predictor: returned shape (1, 1, 4), expected (1, C, *patch) with 2 spatial axes",
        ),
        (
            {"predictor": lambda patch: patch.to(torch.complex64)},
            TypeError,
            "predictor: returned complex64 of shape (1, 1, 4, 4) on cpu, expected real numbers",
        ),
        (
            {"predictor": lambda patch: (patch, "features")},
            TypeError,
            "predictor's result: expected a torch.Tensor, got str",
        ),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {
        "inputs": torch.rand(1, 1, 9, 8),
        "roi_size": 4,
        "sw_batch_size": 1,
        "predictor": lambda x: x,
    }
    with pytest.raises(error) as caught:
        voxfuse.sliding_window_inference(**{**arguments, **changes})
    assert str(caught.value) == message


def test_a_predictor_that_changes_its_mind_is_an_error():
    calls = iter([1, 2])
    with pytest.raises(ValueError, match=r"predictor: returned .* but before 1 channels"):
        voxfuse.sliding_window_inference(
            torch.rand(1, 1, 8), 4, 1, lambda x: x.repeat(1, next(calls), 1)
        )


def test_every_patch_of_every_sample_is_predicted_once():
    count = 0

    def predictor(patch):
        nonlocal count
        count += len(patch)
        return patch

    voxfuse.sliding_window_inference(torch.rand(3, 1, 16, 16), 8, 4, predictor, 0.5)
    assert count == 3 * 9


@pytest.mark.parametrize("output", ["labels", "probabilities", "mask", "foreground", "entropy"])
@pytest.mark.parametrize("tta", [None, "mirror", "rotations"])
def test_outputs_and_flips(output, tta):
    """A predictor that does not care about directions gives the same under any flips."""
    torch.manual_seed(0)
    volume = torch.rand(2, 1, 21, 18, 14)

    def predictor(patch):
        return torch.cat([patch, 1 - patch, (3 * patch).sin()], 1)

    result = voxfuse.sliding_window_inference(
        volume,
        (8, 8, 8),
        5,
        predictor,
        0.5,
        output=output,
        activation="softmax",
        tta=tta,
    )
    p = predictor(volume).softmax(1)
    expected = {
        "labels": p.argmax(1, keepdim=True),
        "probabilities": p,
        "mask": p > 0.5,
        "foreground": p[:, 1:].amax(1, keepdim=True),
        "entropy": -torch.xlogy(p, p).sum(1, keepdim=True),
    }[output]
    assert result.shape == expected.shape
    if result.is_floating_point():
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    else:
        assert (result != expected).float().mean() < 1e-3


def test_flips_reach_the_predictor_and_are_undone():
    volume = torch.rand(1, 1, 12, 9)
    seen = []

    def predictor(patch):
        seen.append(patch)
        return patch

    result = voxfuse.sliding_window_inference(volume, (12, 9), 1, predictor, tta="mirror")
    assert torch.allclose(result, volume)
    expected = [volume, volume.flip(2), volume.flip(3), volume.flip(2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_outputs_by_name_go_where_the_caller_says():
    volume = torch.rand(1, 1, 20, 12)

    def predictor(patch):
        return {"twice": 2 * patch, "coarse": torch.nn.functional.avg_pool2d(patch, 2)}

    out = {"twice": torch.empty(20, 12), "coarse": np.empty((1, 1, 10, 6), np.float32)}
    result = voxfuse.sliding_window_inference(volume, (8, 4), 2, predictor, out=out)
    assert result["twice"] is out["twice"]
    torch.testing.assert_close(out["twice"], 2 * volume[0, 0])
    coarse = torch.nn.functional.avg_pool2d(volume, 2)
    torch.testing.assert_close(torch.from_numpy(out["coarse"]), coarse)
    with pytest.raises(ValueError, match=r"out: got ndarray, expected a dict with the keys"):
        voxfuse.sliding_window_inference(volume, (8, 4), 2, predictor, out=out["coarse"])
    with pytest.raises(ValueError, match="head: got one for 2 outputs"):
        voxfuse.sliding_window_inference(
            volume, (8, 4), 2, predictor, head=(torch.ones(2, 1), None)
        )


COMPOSED = {
    "weights by channel": {"roi_weight_map": torch.rand(1, 2, 6, 6) + 0.1},
    "process_fn": {"process_fn": lambda outputs, patch, weight: (outputs, weight)},
}


@pytest.mark.parametrize("way", COMPOSED)
@pytest.mark.parametrize("output", ["logits", "labels", "probabilities", "foreground", "mask"])
@pytest.mark.parametrize("tta", [None, "mirror"])
def test_the_composed_way_has_every_output(way, output, tta, tmp_path):
    volume = torch.rand(1, 1, 14, 11)
    activation = "none" if output == "logits" else "softmax"
    options = {"output": output, "activation": activation, "tta": tta}
    result = voxfuse.sliding_window_inference(volume, 6, 3, twice, **options, **COMPOSED[way])
    expected = voxfuse.sliding_window_inference(volume, 6, 3, twice, **options)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    out = np.empty(result.shape[1:], result.numpy().dtype)
    slabs = []
    for place in (out, lambda slab, start, stop: slabs.append((slab, start, stop))):
        voxfuse.sliding_window_inference(
            volume, 6, 3, twice, out=place, stream_axis=1, **options, **COMPOSED[way]
        )
    torch.testing.assert_close(torch.from_numpy(out), result[0])  # added in another order
    assert [bounds for _, *bounds in slabs] == [[0, 11]]
    assert np.array_equal(slabs[0][0].numpy(), out)


@pytest.mark.parametrize("axes", [2, 4])
@pytest.mark.parametrize("way", [{}, *COMPOSED.values()], ids=["the engine", *COMPOSED])
def test_labels_of_one_channel_are_an_error_on_every_way(way, axes):
    if way and axes == 4 and "process_fn" not in way:
        way = {"roi_weight_map": torch.rand(1, 1, 6, 6, 6, 6) + 0.1}
    volume = torch.rand(1, 1, *[8] * axes)
    with pytest.raises(ValueError, match="output: 'labels' of one channel are all 0; use 'mask'"):
        voxfuse.sliding_window_inference(volume, 6, 1, lambda x: x, output="labels", **way)


@pytest.mark.parametrize("way", COMPOSED)
def test_an_out_that_does_not_fit_the_composed_way_is_an_error_before_the_second_call(way):
    calls = []

    def predictor(patch):
        calls.append(patch)
        return twice(patch)

    volume, options = torch.rand(1, 1, 14, 11), COMPOSED[way]
    for out in (torch.zeros(2, 14, 12), torch.zeros(2, 1, 11).expand(2, 14, 11)):
        calls.clear()
        with pytest.raises(ValueError, match="out: got "):
            voxfuse.sliding_window_inference(volume, 6, 1, predictor, out=out, **options)
        assert len(calls) == 1


def test_four_axes_take_heads_and_leave_what_is_skipped():
    volume = torch.zeros(1, 1, 12, 4, 4, 4)
    volume[:, :, :4] = 1
    head = (torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0.5, 0.0, 0.0]))
    labels = voxfuse.sliding_window_inference(
        volume, 4, 1, lambda x: x, 0, output="labels", head=head, fill=7,
        skip=lambda patch: not patch.any(),
    )  # fmt: skip
    assert (labels[:, :, :4] == 2).all()
    assert (labels[:, :, 4:] == 7).all()


def test_a_fault_in_the_predictor_leaves_finished_slices():
    volume = torch.rand(1, 1, 40, 8, 8) + 1
    out = np.zeros((40, 8, 8), np.uint8)
    calls = 0

    def predictor(patch):
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("out of order")
        return torch.cat([torch.zeros_like(patch), patch], 1)

    with pytest.raises(RuntimeError, match="out of order"):
        voxfuse.sliding_window_inference(volume, 8, 1, predictor, output="labels", out=out)
    assert (out[:16] == 1).all()
    assert (out[16:] == 0).all()


def test_empty_patches_are_skipped():
    volume = torch.zeros(1, 1, 32, 8, 8)
    volume[:, :, :10] = 1
    predicted = []

    def predictor(patch):
        predicted.append(patch)
        return torch.cat([torch.zeros_like(patch), torch.ones_like(patch)], 1)

    result = voxfuse.sliding_window_inference(
        volume, 8, 1, predictor, output="labels", skip=lambda patch: not patch.any(), fill=5
    )
    assert len(predicted) == 3
    assert (result[:, :, :16] == 1).all()
    assert (result[:, :, 16:] == 5).all()


def test_results_go_where_the_caller_says(tmp_path):
    volume = torch.rand(2, 1, 30, 12, 10)
    options = {"output": "labels"}
    expected = voxfuse.sliding_window_inference(volume, 8, 7, twice, **options)
    memmap = np.memmap(tmp_path / "labels", np.uint8, "w+", shape=(2, 1, 30, 12, 10))
    assert voxfuse.sliding_window_inference(volume, 8, 7, twice, out=memmap, **options) is memmap
    assert np.array_equal(memmap, expected.numpy())
    slabs = []
    voxfuse.sliding_window_inference(
        volume[:1], 8, 7, twice, out=lambda slab, *bounds: slabs.append(slab), **options
    )
    assert torch.equal(torch.cat(slabs, 1), expected[0])
    with pytest.raises(ValueError, match="out: got a function and 2 samples"):
        voxfuse.sliding_window_inference(volume, 8, 7, twice, out=slabs.append, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_a_half_precision_volume_loses_no_voxel_to_the_weights_of_process_fn(dtype):
    volume = torch.ones(1, 1, 40, 40, 40).to(dtype)

    def process(outputs, batch, weight):
        assert weight.dtype == (torch.float16 if dtype == torch.float16 else torch.float32)
        assert (weight > 0).all()
        return outputs, weight

    result = voxfuse.sliding_window_inference(
        volume, 32, 2, lambda x: x.float(), process_fn=process, fill=-1
    )
    torch.testing.assert_close(result, torch.ones_like(result), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output": "probabilities"}, ValueError, "activation: got 'none' with output 'probabil"),
        ({"output": "entropy"}, ValueError, "activation: got 'none' with output 'entropy'"),
        ({"roi_weight_map": torch.zeros(8, 8)}, ValueError, "roi_weight_map: weights must be"),
        ({"roi_weight_map": torch.ones(8)}, ValueError, "roi_weight_map: got shape (8,)"),
        ({"roi_weight_map": torch.ones(1, 1, 1, 8, 8)}, ValueError, "roi_weight_map: got shape"),
        ({"roi_weight_map": torch.ones(8, 8) + 1j}, TypeError, "roi_weight_map: got complex64"),
        ({"roi_weight_map": torch.rand(1, 3, 8, 8)}, ValueError, "got weights of 3 channels"),
        ({"process_fn": lambda p, b, w: (p, w[0])}, ValueError, "process_fn: returned weights of"),
        ({"process_fn": lambda p, b, w: (p, w.expand(2, 1, 8, 8))}, ValueError, "process_fn: ret"),
        ({"process_fn": lambda p, b, w: (p, 1.0)}, TypeError, "process_fn's weights: expected a"),
        ({"threshold": math.nan}, ValueError, "threshold: got nan"),
    ],
)
def test_what_would_be_fitted_without_a_word_is_an_error(options, error, message):
    def predictor(patch):
        return torch.cat([patch, 1 - patch], 1)

    with pytest.raises(error) as caught:
        voxfuse.sliding_window_inference(torch.rand(1, 1, 12, 12), 8, 2, predictor, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("cval", [-1000, 0.5])
def test_padding_that_the_volume_cannot_hold_is_an_error(cval):
    def padded(roi):
        return voxfuse.sliding_window_inference(
            torch.ones(1, 1, 9, 9, dtype=torch.uint8), roi, 1, lambda x: x.float(), cval=cval
        )

    with pytest.raises(ValueError, match=f"cval: got {cval}, expected an integer from 0 to 255"):
        padded((16, 9))
    assert (padded((9, 6)) == 1).all()


@pytest.mark.parametrize("process", [None, lambda p, b, w: (p, w)])
@pytest.mark.parametrize(("output", "dtype"), [("logits", torch.int32), ("labels", torch.float32)])
def test_a_result_of_another_kind_is_not_converted(output, dtype, process):
    channels = 2 if output == "logits" else 1
    out = torch.zeros(1, channels, 12, 12, dtype=dtype)
    with pytest.raises(TypeError, match="out: got"):
        voxfuse.sliding_window_inference(
            torch.rand(1, 1, 12, 12),
            8,
            2,
            lambda x: torch.cat([x, 1 - x], 1),
            output=output,
            out=out,
            process_fn=process,
        )


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("tta", [None, "mirror"])
@pytest.mark.parametrize("networks", [1, 2])
@pytest.mark.parametrize("process", [None, lambda p, b, w: (tuple(x + b for x in p), w)])
def test_a_network_that_works_in_its_input_changes_nothing_else(size, tta, networks, process):
    def in_place(patch, condition):
        condition.add_(1)
        return patch.mul_(2) - condition

    def fused(predictor):
        given = [predictor] * networks if networks > 1 else predictor
        return voxfuse.sliding_window_inference(
            volume, 8, size, given, tta=tta, process_fn=process, condition=condition
        )

    volume, condition = torch.randn(2, 1, 12, 8), torch.randn(2, 1, 12, 8)
    before = volume.clone(), condition.clone()
    result = fused(in_place)
    assert torch.equal(volume, before[0])
    assert torch.equal(condition, before[1])
    assert torch.equal(result, fused(lambda patch, condition: patch * 2 - (condition + 1)))


def test_a_network_with_one_output_buffer_is_an_error_where_members_are_averaged():
    class Static:
        """As networks compiled ahead of time are: every call writes to the same memory."""

        def __init__(self):
            self.buffer = torch.empty(2, 2, 8, 8)

        def __call__(self, patch):
            self.buffer[: len(patch)] = twice(patch)
            return self.buffer[: len(patch)]

    volume = torch.randn(1, 1, 12, 12)
    fused = voxfuse.sliding_window_inference
    assert torch.equal(fused(volume, 8, 2, Static()), fused(volume, 8, 2, twice))
    for predictor, tta in ((Static(), "mirror"), ([Static()] * 2, None)):
        with pytest.raises(ValueError, match="predictor: returned memory that holds an earlier"):
            fused(volume, 8, 2, predictor, tta=tta)
    static = Static()
    with_clones = fused(volume, 8, 2, lambda patch: static(patch).clone(), tta="mirror")
    assert torch.equal(with_clones, fused(volume, 8, 2, twice, tta="mirror"))
    two = fused(volume, 8, 2, [Static(), Static()])
    assert torch.equal(two, fused(volume, 8, 2, [twice, twice]))


@pytest.mark.parametrize("kind", ["tensor", "array", "tuple", "condition"])
def test_a_result_over_the_input_is_an_error(kind):
    both = torch.randn(2, 1, 1, 12, 12)
    volume, other = both
    out = {
        "tensor": volume,
        "array": volume.numpy()[0, 0],
        "tuple": (other, volume),
        "condition": other,
    }[kind]
    condition = {"condition": other} if kind == "condition" else {}
    name = "condition" if kind == "condition" else "inputs"
    with pytest.raises(ValueError, match=f"out: shares memory with {name}"):
        voxfuse.sliding_window_inference(
            volume, 8, 2, lambda x, condition=0: x + condition, out=out, **condition
        )
    if not condition:  # inputs that are no tensors are read in the same way
        sliced = np.flip(volume.numpy(), 3)
        with pytest.raises(ValueError, match="out: shares memory with inputs"):
            voxfuse.sliding_window_inference(sliced, 8, 2, lambda x: x, out=out)
    result = voxfuse.sliding_window_inference(volume, 8, 2, lambda x: x, out=other)
    torch.testing.assert_close(result, volume)


def test_skip_takes_a_patch_and_skip_origin_an_origin():
    """skip_origin means the same in both calls, and serves several samples."""
    volume = torch.rand(2, 1, 24, 8, 8) + 1
    asked = []

    def first_half(origin):
        asked.append(origin)
        return origin[0] >= 12

    def network(x):
        return torch.cat([x, -x], 1)

    options = {"output": "labels", "fill": 1, "stream_axis": 0, "overlap": 0.5}
    labels = voxfuse.sliding_window_inference(
        volume, 8, 2, network, skip_origin=first_half, **options
    )
    assert set(asked) == {(z, 0, 0) for z in (0, 4, 8, 12, 16)}
    fuser = voxfuse.PatchFuser((24, 8, 8), 8, 2, skip_origin=first_half, **options)
    for origins in fuser.batches(1):
        z = int(origins[0, 0])
        fuser.add(network(volume[:1, :, z : z + 8]), origins)
    assert torch.equal(labels[0, 0], fuser.result())
    assert torch.equal(labels[0], labels[1])
    same = voxfuse.sliding_window_inference(
        volume[:1], 8, 2, network, skip=lambda patch: False, skip_origin=first_half, **options
    )
    assert torch.equal(same, labels[:1])
    with pytest.raises(ValueError, match="skip_origin: is true for every patch"):
        voxfuse.sliding_window_inference(volume, 8, 2, network, skip_origin=lambda origin: True)


@pytest.mark.parametrize("output", ["logits", "probabilities", "mask"])
@pytest.mark.parametrize("way", ["engine", "half a ring", "composed", "memmap"])
def test_some_channels_of_the_result(output, way, tmp_path):
    volume = torch.rand(2, 1, 20, 12, 8)
    mixed = torch.nn.Conv3d(1, 4, 3, padding=1)
    options = {"output": output, "activation": "none" if output == "logits" else "softmax"}
    options["accumulate"] = torch.float16 if way == "half a ring" else None
    if way == "composed":
        options["process_fn"] = lambda patch, image, weight: (patch, weight)
    with torch.no_grad():
        whole = voxfuse.sliding_window_inference(volume, 8, 2, mixed, **options)
        out = None
        if way == "memmap":
            kind = np.uint8 if output == "mask" else np.float32
            out = np.memmap(tmp_path / "some", kind, "w+", shape=(2, 2, 20, 12, 8))
        some = voxfuse.sliding_window_inference(
            volume, 8, 2, mixed, channels=[2, 0], out=out, **options
        )
    assert some.shape == (2, 2, 20, 12, 8)
    assert torch.equal(torch.as_tensor(some), whole[:, [2, 0]])


def test_channels_that_the_result_cannot_have():
    volume, network = torch.rand(1, 1, 8, 8, 8), torch.nn.Conv3d(1, 3, 1).eval()
    for channels, output, message in (
        ([3], "logits", r"channels: got \(3,\), expected channels in \[0, 3\)"),
        ([-1], "logits", r"channels: got \(-1,\), expected channels >= 0"),
        ([], "logits", r"channels: got \(\), expected channels >= 0"),
        ([1], "labels", "channels: got .* with output 'labels', which has one channel"),
    ):
        with pytest.raises(ValueError, match="^" + message), torch.no_grad():
            voxfuse.sliding_window_inference(
                volume, 8, 1, network, output=output, channels=channels
            )
    with pytest.raises(TypeError, match=r"result_channels: got \[1.5\], expected integers"):
        voxfuse.PatchFuser((8, 8, 8), 8, 3, result_channels=[1.5])
