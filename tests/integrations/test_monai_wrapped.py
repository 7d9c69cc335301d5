"""MONAI's losses with habits of their own: unified focal, deep supervision; which are replaced."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor, nn

from tests.integrations.monai_cases import LENIENT, flag, peer, reductions, with_ignored
from tests.integrations.parity import Passes, assert_compiles_for_any_size, assert_parity
from voxfuse.integrations import monai as ours

create_ignore_mask = pytest.importorskip("monai.metrics.utils").create_ignore_mask

# --- Asymmetric unified focal loss ---------------------------------------------------------------


def unified(**options):
    """Both makers of the loss."""
    return (
        lambda: ours.AsymmetricUnifiedFocalLoss(**copy.deepcopy(options)),
        lambda: peer.AsymmetricUnifiedFocalLoss(**copy.deepcopy(options)),
    )


@st.composite
def probabilities_and_targets(draw):
    """Probabilities, some of them 0 and 1, and labels, one-hot, soft or misshapen targets."""
    channels = draw(st.sampled_from([1, 2, 2, 2, 3]))
    spatial = tuple(draw(st.lists(st.integers(2, 4), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = (draw(st.integers(1, 2)), channels, *spatial)
    p = torch.rand(shape, generator=generator, dtype=torch.float64)
    p = p.where(p < 0.95, 1).where(p > 0.05, 0).to(dtype)
    kind = draw(st.sampled_from(["labels", "labels", "hard", "soft", "wrong"]))
    single = (shape[0], 1, *spatial)
    if kind == "labels":
        target = torch.randint(0, 2, single, generator=generator)
        # Not bytes, beside one channel: MONAI's minus makes 255 of 1.
        kinds = [torch.float32, torch.int64, torch.uint8 if channels > 1 else torch.int16]
        target = target.to(draw(st.sampled_from(kinds)))
    elif kind == "wrong":
        target = torch.rand((*shape[:-1], shape[-1] + 1), generator=generator)
    else:
        target = torch.rand(shape, generator=generator)
        if kind == "hard":
            target = (target > 0.5).to(draw(st.sampled_from([torch.float32, torch.int64])))
    return p, target


@given(problem=probabilities_and_targets(), data=st.data())
@settings(max_examples=120)
def test_unified_focal(problem, data):
    p, target = problem
    ignored = data.draw(st.sampled_from([None, None, 0, 1, -1, 255]))
    options = data.draw(
        st.fixed_dictionaries(
            {
                "to_onehot_y": flag,
                "num_classes": st.sampled_from([2, 2, 2, 3]),
                "weight": st.sampled_from([0.0, 0.3, 0.5, 1.0]),
                "gamma": st.sampled_from([0.0, 0.2, 0.5, 1.0, 2.0]),
                "delta": st.sampled_from([0.3, 0.7]),
                "reduction": reductions,
            }
        )
    )
    if data.draw(st.integers(0, 5)):
        options["to_onehot_y"] = target.shape[1] == 1 < p.shape[1]
    target = with_ignored(target, ignored)
    if ignored is not None and target.shape[2:] == p.shape[2:]:
        # MONAI makes a false positive of 1e-7 of an ignored voxel, which must not be all there is.
        mask = create_ignore_mask(target, ignored)
        assume(bool((mask * (p > 0) * (p < 1)).flatten(1).any(1).all()))
    # MONAI makes float32 of labels.
    assert_parity(
        *unified(ignore_index=ignored, **options),
        p,
        target,
        dtype=torch.float32 if ignored is not None or target.dtype != p.dtype else p.dtype,
        lenient=(*LENIENT, "must match the size of tensor"),
    )


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("ignore_index", [None, 255])
def test_targets_of_every_type_are_read_as_numbers(channels, ignore_index):
    p, target = torch.rand(2, channels, 5, 4), torch.rand(2, channels, 5, 4) > 0.5
    loss = ours.AsymmetricUnifiedFocalLoss(ignore_index=ignore_index)
    expected = loss(p, target.float())
    for dtype in (torch.uint8, torch.bool, torch.int8, torch.uint16, torch.uint64, torch.bfloat16):
        assert torch.equal(loss(p, target.to(dtype)), expected)


def test_ignored_voxels_count_nothing_in_the_unified_focal_loss():
    """Even if there are no others: MONAI's clamp makes false positives of 1e-7 of them."""
    p, labels = torch.rand(1, 2, 5, 4), torch.full((1, 1, 5, 4), 7)
    loss = ours.AsymmetricUnifiedFocalLoss(to_onehot_y=True, ignore_index=7)
    assert loss(p, labels) == 0
    labels[..., 0] = 1
    p[..., 1:] = float("nan")
    assert bool(loss(p, labels).isfinite())


@pytest.mark.parametrize("largest", [2.0, 1.5])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_target_above_the_last_class_is_the_peers_error(channels, largest):
    p = torch.rand(1, channels, 4, 4)
    target = torch.zeros(1, channels, 4, 4)
    target[0, -1, 1, 1] = largest
    with pytest.raises(ValueError, match="Maximum class should be 1"):
        ours.AsymmetricUnifiedFocalLoss()(p, target)
    assert_parity(*unified(), p, target)


def test_the_unified_focal_loss_is_one_pass_beside_the_clamped_copy():
    p, labels = torch.rand(2, 2, 10, 10, 10), torch.randint(0, 2, (2, 1, 10, 10, 10))
    loss = ours.AsymmetricUnifiedFocalLoss(to_onehot_y=True)
    with Passes() as passes:
        loss(p, labels)
    (call,) = passes.seen
    assert call[1].data_ptr() == labels.data_ptr()
    assert passes.volumes == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_probabilities_are_taken_as_float32(dtype):
    p = torch.rand(1, 2, 6, 6, 6).where(torch.rand(1, 2, 6, 6, 6) > 0.1, 0).to(dtype)
    labels = torch.randint(0, 2, (1, 1, 6, 6, 6))
    loss = ours.AsymmetricUnifiedFocalLoss(to_onehot_y=True)
    value = loss(p, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(p.float(), labels), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"ignore_index": 7}, {"gamma": 2.0}])
def test_the_unified_focal_loss_compiles_for_any_size(options):
    def batch(samples: int, extent: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 2, (samples, 1, extent, extent + 1))
        return torch.rand(samples, 2, extent, extent + 1), labels

    loss = ours.AsymmetricUnifiedFocalLoss(to_onehot_y=True, **options)
    assert_compiles_for_any_size(loss, batch)


def test_the_unified_focal_loss_pickles_and_copies():
    p, labels = torch.rand(1, 2, 4, 4), torch.randint(0, 2, (1, 1, 4, 4))
    loss = ours.AsymmetricUnifiedFocalLoss(to_onehot_y=True, delta=0.6)
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert torch.equal(other(p, labels), loss(p, labels))


# --- Deep supervision ----------------------------------------------------------------------------

SIZES = ((8, 6, 5), (4, 3, 3), (2, 2, 1))


def outputs(channels: int = 3, dtype=torch.float32, sizes=SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, *x, generator=generator).to(dtype) for x in sizes]


def gradients(loss, inputs: list[Tensor], target: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(leaves, target)
    used = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), *(torch.zeros(()) if x is None else x for x in used)


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        ("exp", None),
        ("two", None),
        ("same", None),
        ("other", None),
        ("exp", [0.5, 0.25, 0.125, 9.0]),
        ("two", [0.5]),  # too few: the mode's
    ],
)
@pytest.mark.parametrize("inner", ["DiceCELoss", "TverskyLoss"])
def test_deep_supervision(mode, weights, inner):
    labels = torch.randint(0, 3, (2, 1, *SIZES[0])).float()
    options = {"softmax": True, "to_onehot_y": True}
    mine, theirs = (
        library.DeepSupervisionLoss(getattr(library, inner)(**options), mode, weights)
        for library in (ours, peer)
    )
    assert mine.get_weights(3) == theirs.get_weights(3)
    for found, wanted in zip(
        gradients(mine, outputs(), labels), gradients(theirs, outputs(), labels), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert mine.state_dict().keys() == theirs.state_dict().keys()


def test_deep_supervision_samples_up_and_takes_any_label_type():
    """MONAI's interpolation takes floats and bytes only."""
    labels = torch.randint(0, 3, (2, 1, *SIZES[1]))
    options = {"softmax": True, "to_onehot_y": True}
    loss = ours.DeepSupervisionLoss(ours.DiceLoss(**options))
    expected = peer.DeepSupervisionLoss(peer.DiceLoss(**options))(outputs(), labels.float())
    for dtype in (torch.int64, torch.int8, torch.uint8, torch.float64):
        torch.testing.assert_close(loss(outputs(), labels.to(dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_loss_gets_float32_as_in_the_peer(dtype):
    target = torch.rand(2, 3, *SIZES[0])
    mine, theirs = (x.DeepSupervisionLoss(nn.MSELoss()) for x in (ours, peer))
    torch.testing.assert_close(
        mine(outputs(dtype=dtype), target), theirs(outputs(dtype=dtype), target)
    )
    one = outputs(dtype=dtype)[0]
    torch.testing.assert_close(mine(one, target), theirs(one, target))


def test_what_deep_supervision_refuses():
    loss = ours.DeepSupervisionLoss(ours.DiceLoss(softmax=True, to_onehot_y=True))
    with pytest.raises(ValueError, match="input shouldn't be None"):
        loss(None, torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="target: got shape .* expected 5 axes"):
        loss(outputs(), torch.zeros(2, 1, 8, 6))
    assert loss([], torch.zeros(1, 1, 4, 4)) == 0


def test_deep_supervision_of_a_metatensor_compiles_for_any_size():
    def batch(samples: int, extent: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 3, (samples, 1, extent, extent + 1)).float()
        return torch.randn(samples, 3, extent, extent + 1), labels

    loss = ours.DeepSupervisionLoss(ours.DiceCELoss(softmax=True, to_onehot_y=True))

    def both(logits: Tensor, labels: Tensor) -> Tensor:
        return loss([logits, logits[..., ::2, ::2]], labels)

    assert_compiles_for_any_size(both, batch)
    meta = pytest.importorskip("monai.data").MetaTensor
    logits, labels = batch(2, 6)
    assert type(loss([meta(logits)], meta(labels))) is Tensor
    torch.testing.assert_close(
        loss([meta(logits), meta(logits[..., :3])], meta(labels)),
        loss([logits, logits[..., :3]], labels),
    )


# --- Which losses are replaced -------------------------------------------------------------------


def test_every_loss_of_the_peer_is_in_the_table():
    """Replaced under its own name, or not and why."""
    page = (Path(__file__).parents[2] / "docs/differences.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+Loss)`[^|]* \| (.+) \|$", page, re.MULTILINE))
    classes = {x for x in vars(peer).values() if isinstance(x, type) and issubclass(x, nn.Module)}
    assert sorted(rows) == sorted(x.__name__ for x in classes)
    replaced = set()
    for name, text in rows.items():
        replacement = f"`voxfuse.integrations.monai.{name}`"
        assert text.startswith((replacement, "no: ")), f"{name}: {text}"
        if text.startswith(replacement):
            replaced.add(name)
        for path in re.findall(r"`(voxfuse[\w.]+)`", text):
            module, _, member = path.rpartition(".")
            assert hasattr(importlib.import_module(module), member), f"{name}: {path}"
    assert replaced == {name for name in ours.__all__ if name.endswith("Loss")}
