"""Sliding-window inference with several networks, and with the last layer given apart as a head."""

from __future__ import annotations

import pytest
import torch

import voxfuse


def test_an_ensemble_is_the_mean_of_its_models():
    volume = torch.rand(1, 1, 20, 20)
    models = [lambda x: x, lambda x: 2 * x, lambda x: 6 * x]
    result = voxfuse.sliding_window_inference(volume, 8, 3, models)
    torch.testing.assert_close(result, 3 * volume)


def rings(monkeypatch):
    """Channels of every ring that is allocated."""
    channels = []
    original = voxfuse.PatchFuser._open

    def opened(self, patches):
        channels.append(self.channels)
        return original(self, patches)

    monkeypatch.setattr(voxfuse.PatchFuser, "_open", opened)
    return channels


@pytest.mark.parametrize("classes", [3, 4, 9])
@pytest.mark.parametrize("output", ["labels", "logits", "probabilities"])
@pytest.mark.parametrize("voting", [None, "soft"])
def test_a_head_gives_what_the_logits_give(classes, output, voting, monkeypatch):
    torch.manual_seed(0)
    volume = torch.rand(1, 2, 24, 20, 16)
    features = torch.nn.Conv3d(2, 4, 3, padding=1)
    head = torch.nn.Conv3d(4, classes, 1)
    options = {"output": output, "voting": voting or "logit"}
    options["activation"] = "softmax" if output == "probabilities" else "none"
    expected = voxfuse.sliding_window_inference(
        volume, 12, 4, lambda x: head(features(x)), **options
    )
    channels = rings(monkeypatch)
    actual = voxfuse.sliding_window_inference(
        volume, 12, 4, features, head=(head.weight, head.bias), **options | {"voting": voting}
    )
    if output == "labels":
        assert (actual != expected).float().mean() < 1e-3
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    # Fewer features than classes are fused themselves, where logits are averaged.
    late = classes > 4 and not (voting == "soft" and output == "probabilities")
    assert set(channels) == {4 if late else classes}


@pytest.mark.parametrize("classes", [5, 12])
def test_an_ensemble_has_a_head_each(classes, monkeypatch):
    torch.manual_seed(0)
    volume = torch.rand(2, 1, 20, 18)
    bodies = [torch.nn.Conv2d(1, features, 3, padding=1) for features in (3, 4)]
    heads = [torch.nn.Conv2d(body.out_channels, classes, 1) for body in bodies]
    pairs = list(zip(bodies, heads, strict=True))
    whole = [lambda x, b=body, h=head: h(b(x)) for body, head in pairs]
    expected = voxfuse.sliding_window_inference(volume, 8, 3, whole, tta="mirror")
    channels = rings(monkeypatch)
    actual = voxfuse.sliding_window_inference(
        volume, 8, 3, bodies, tta="mirror", head=[(h.weight, h.bias) for h in heads]
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert set(channels) == {7 if classes == 12 else 5}


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (
            (torch.zeros(3, 2), torch.zeros(2)),
            ValueError,
            r"head: got bias \(2,\), expected \(3,\)",
        ),
        ((torch.zeros(3), torch.zeros(3)), TypeError, r"head: expected \(weight"),
        ([], TypeError, "head: got list"),
        ((torch.zeros(3, 2), None), ValueError, "returned 1 channels, but head takes 2"),
        ([(torch.zeros(3, 1), None)] * 2, ValueError, "head: got 2 for 1 predictors"),
    ],
)
def test_bad_heads_are_named(head, error, message):
    with pytest.raises(error, match=message):
        voxfuse.sliding_window_inference(torch.rand(1, 1, 8), 4, 1, lambda x: x, head=head)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 9])
def test_half_precision_features_give_results_of_their_dtype(dtype, classes):
    head = (torch.randn(classes, 3), torch.randn(classes))
    result = voxfuse.sliding_window_inference(
        torch.rand(1, 3, 12, 10), 6, 2, lambda x: x.to(dtype), head=head
    )
    assert result.dtype == dtype
    assert result.shape == (1, classes, 12, 10)
