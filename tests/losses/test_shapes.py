"""Targets and weights that do not fit the outputs: taken as what they are, or an error."""

from __future__ import annotations

import itertools
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import voxfuse
from voxfuse.integrations import nnunet, smp, torchio

SIZE = (4, 6, 5)


def problem(outputs=2, classes=2, size=SIZE, batch=2):
    logits = torch.randn(batch, outputs, classes, *size)
    labels = torch.randint(0, max(classes, 2), (batch, 1, *size), dtype=torch.uint8)
    return logits, labels


def one_hot(labels, classes):
    return nn.functional.one_hot(labels[:, 0].long(), classes).movedim(-1, 1)


# --- Stacked outputs of a deeply supervised network ----------------------------------------------


@pytest.mark.parametrize(("outputs", "classes"), [(2, 2), (3, 2), (2, 3), (1, 4), (3, 3)])
@pytest.mark.parametrize("size", [(6,), (4, 6), SIZE])
@pytest.mark.parametrize("channel", [True, False])
def test_a_stack_of_outputs_is_the_list_of_its_parts(outputs, classes, size, channel):
    logits, labels = problem(outputs, classes, size)
    if not channel:
        labels = labels[:, 0]
    loss = voxfuse.DeepSupervisionLoss(voxfuse.DiceCELoss())
    inner = voxfuse.DiceCELoss()
    expected = sum(0.5**i * inner(x, labels) for i, x in enumerate(logits.unbind(1)))
    torch.testing.assert_close(loss(logits, labels), expected, rtol=1e-6, atol=0)
    assert torch.equal(loss(logits, labels), loss(logits.unbind(1), labels))


def test_a_stack_is_no_batch_of_classes():
    """The stack of two outputs and two classes that was read as two classes of a volume."""
    torch.manual_seed(0)
    logits = torch.zeros(1, 2, 2, 16, 16, 16)
    labels = torch.ones(1, 1, 16, 16, 16, dtype=torch.uint8)
    loss = voxfuse.DeepSupervisionLoss(voxfuse.CrossEntropyLoss())
    assert math.isclose(float(loss(logits, labels)), 1.5 * math.log(2), rel_tol=1e-6)


def test_a_stack_with_a_dense_target_of_three_axes_must_be_named():
    """It could be two classes of four spatial axes, the first of them two long."""
    logits, labels = problem()
    target = one_hot(labels, 2)
    loss = voxfuse.DeepSupervisionLoss(voxfuse.DiceLoss())
    with pytest.raises(ValueError, match=r"one tensor .* \[input\] .* input.unbind\(1\)"):
        loss(logits, target.to(torch.uint8))
    torch.testing.assert_close(
        loss(logits.unbind(1), target.float()), loss(logits.unbind(1), labels)
    )
    # Four spatial axes, said so.
    assert torch.equal(
        loss([logits], target.to(torch.uint8)), voxfuse.DiceLoss()(logits, target.to(torch.uint8))
    )


@pytest.mark.parametrize("kind", ["one channel", "float one-hot", "one-hot with ignored voxels"])
def test_a_stack_in_two_axes_must_be_named_where_it_may_be_a_volume(kind):
    logits, labels = problem(3, 1 if kind == "one channel" else 2, (6, 5))
    target = labels
    if kind == "float one-hot":
        target = one_hot(labels, 2).float()
    elif kind == "one-hot with ignored voxels":
        target = one_hot(labels, 3).to(torch.uint8)
    with pytest.raises(ValueError, match="input: got one tensor"):
        voxfuse.DeepSupervisionLoss(voxfuse.BCELoss())(logits, target)


@pytest.mark.parametrize("channel", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_one_output_is_still_one_output(channel, dtype):
    logits, labels = problem(1, 3)
    logits, labels = logits[:, 0], labels.to(dtype)
    if not channel:
        labels = labels[:, 0]
    loss = voxfuse.DeepSupervisionLoss(voxfuse.DiceLoss())
    assert torch.equal(loss(logits, labels), voxfuse.DiceLoss()(logits, labels))
    assert torch.equal(loss([logits], labels), voxfuse.DiceLoss()(logits, labels))


def test_a_stack_takes_a_list_of_targets_and_voxel_weights():
    logits, labels = problem()
    weight = torch.rand(2, 1, *SIZE)
    loss = voxfuse.DeepSupervisionLoss(voxfuse.DiceLoss(), "same")
    expected = sum(voxfuse.DiceLoss()(x, labels, weight) for x in logits.unbind(1))
    torch.testing.assert_close(loss(logits, [labels, labels], weight), expected)


def test_the_stack_of_monais_network():
    nets = pytest.importorskip("monai.networks.nets")
    losses = pytest.importorskip("monai.losses")
    net = nets.DynUNet(
        3, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 4, 4], deep_supervision=True
    )
    image, labels = torch.randn(1, 1, 16, 16, 16), torch.randint(0, 2, (1, 1, 16, 16, 16))
    stack = net.train()(image)
    peer = losses.DeepSupervisionLoss(losses.DiceCELoss(softmax=True, to_onehot_y=True))
    torch.testing.assert_close(
        voxfuse.DeepSupervisionLoss(voxfuse.DiceCELoss(smooth_nr=1e-5, smooth_dr=1e-5))(
            stack, labels
        ),
        peer(list(stack.unbind(1)), labels),
        rtol=1e-5,
        atol=1e-6,
    )


# --- Nothing is sampled up, or onto other axes ---------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 4, 6, 4),
        (2, 1, 2, 3, 2),
        (2, 6, 4, 4),
        (1, 1, 4, 6, 5),
        (2, 6, 5),
        (2, 1, 1, 4, 6, 5),
    ],
    ids=["up", "up by two", "up without a channel", "other batch", "an axis less", "an axis more"],
)
def test_targets_and_masks_are_never_sampled_up_or_onto_other_axes(shape):
    outputs = [torch.randn(2, 3, *SIZE), torch.randn(2, 3, 2, 3, 2)]
    loss = voxfuse.DeepSupervisionLoss(voxfuse.DiceLoss())
    labels = torch.zeros(2, *SIZE, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"target: got shape .* nothing is sampled up"):
        loss(outputs, torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"target: got shape"):
        loss(outputs, [torch.zeros(shape, dtype=torch.uint8), labels])
    with pytest.raises(ValueError, match=r"mask: got shape .* nothing is sampled up"):
        loss(outputs, labels, torch.ones(shape))


def test_targets_coarse_first_are_an_error():
    outputs = [torch.randn(2, 3, *SIZE), torch.randn(2, 3, 2, 3, 2)]
    targets = [torch.zeros(2, 1, *x.shape[2:], dtype=torch.uint8) for x in outputs]
    with pytest.raises(ValueError, match="target: got shape"):
        voxfuse.DeepSupervisionLoss(voxfuse.DiceLoss())(outputs, targets[::-1])


@pytest.mark.parametrize("shape", [(1, 1, 2, 4, 4), (1, 4, 4), (1, 1, 1, 4, 4, 4)])
def test_a_fused_head_samples_nothing_up(shape):
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 3, 1))
    fused = voxfuse.fuse_head(network, voxfuse.DiceLoss())
    image, labels = torch.randn(1, 1, 4, 4, 4), torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="target: got shape"):
        fused(image, torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="mask: got shape"):
        fused(image, labels, torch.ones(shape))


def test_weights_that_add_up_to_nothing_are_not_normalized():
    loss = voxfuse.DeepSupervisionLoss(voxfuse.DiceLoss(), [0, 0], normalize=True)
    with pytest.raises(ValueError, match="weights: got .* add up to 0"):
        loss([torch.randn(1, 2, 4)] * 2, torch.zeros(1, 4, dtype=torch.uint8))


# --- Plain losses --------------------------------------------------------------------------------

PLAIN = [
    voxfuse.DiceCELoss(),
    voxfuse.CrossEntropyLoss(reduction="none"),
    voxfuse.TopKLoss(),
    voxfuse.LovaszLoss(),
    voxfuse.BCELoss(),
]


@pytest.mark.parametrize("loss", PLAIN, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("channel", [True, False])
def test_a_plain_loss_says_that_its_input_looks_like_stacked_outputs(loss, channel):
    logits, labels = problem(3, 2)
    with pytest.raises(ValueError, match="target: got shape .* 3 outputs with 2 classes.*Deep"):
        loss(logits, labels if channel else labels[:, 0])


@pytest.mark.parametrize("loss", PLAIN, ids=lambda loss: type(loss).__name__)
def test_a_plain_loss_given_a_list_names_the_loss_for_it(loss):
    logits, labels = problem(3, 2)
    with pytest.raises(TypeError, match="input: .*DeepSupervisionLoss"):
        loss(list(logits.unbind(1)), labels)


@pytest.mark.parametrize(
    ("loss", "classes"),
    [(loss, classes) for loss in PLAIN for classes in (2, 4)] + [(voxfuse.BCELoss(), 1)],
    ids=lambda x: x if isinstance(x, int) else type(x).__name__,
)
def test_companions_of_a_plain_loss_are_never_broadcast(loss, classes):
    """One axis too many or too few, lengths of 1, and sizes equal to the batch or the classes."""
    size = (4, 2, 4)
    logits = torch.randn(2, classes, *size)
    labels = torch.zeros(2, *size, dtype=torch.uint8)
    wrong = [
        size,
        (1, *size),
        (1, 1, *size),
        (2, 1, 1, *size),
        (2, 2, 4),
        (2, 4, 2, 1),
        (2, 1, 4, 2, 1),
        (2, 1, 1, 2, 4),
        (2, 5, *size),
        (4, 2, 2, 4),
        (2, classes, 4, 2),
    ]
    for shape in wrong:
        with pytest.raises(ValueError, match="target: got shape"):
            loss(logits, torch.zeros(shape, dtype=torch.uint8))
        with pytest.raises(ValueError, match="mask: got shape"):
            loss(logits, labels, torch.ones(shape))
    if classes > 1:
        with pytest.raises(ValueError, match="mask: got shape"):
            loss(logits, labels, torch.ones(2, classes, *size))
    torch.testing.assert_close(loss(logits, labels), loss(logits, labels[:, None]))
    ones = torch.ones(2, 1, *size)
    torch.testing.assert_close(loss(logits, labels, ones), loss(logits, labels, ones[:, 0]))


# --- Adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dice", [nnunet.SoftDiceLoss, nnunet.MemoryEfficientSoftDiceLoss])
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 2, 3), (1, 1, 4, 6), (2, 2, 4, 6), (2, 4, 3), (2, 1, 1, 4, 6), (2, 4, 4, 6)],
)
def test_nnunets_dice_scatters_no_target_of_another_shape(dice, shape):
    """nnU-Net's one-hot encoding takes every target that is no larger."""
    loss = dice(nnunet.softmax_helper_dim1, ddp=False)
    with pytest.raises(ValueError, match="gt: got shape"):
        loss(torch.randn(2, 3, 4, 6), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(2, 4, 6), (4, 6), (2, 1, 4, 1), (3, 4, 6), (2, 2, 4, 6)])
def test_nnunets_mask_is_not_broadcast(shape):
    x, y = torch.randn(2, 3, 4, 6).softmax(1), torch.zeros(2, 1, 4, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="mask: got shape"):
        nnunet.get_tp_fp_fn_tn(x, y, mask=torch.ones(shape))


@pytest.mark.parametrize(
    "loss",
    [
        nnunet.TopKLoss(k=50),
        nnunet.DC_and_CE_loss({"ddp": False}, {}),
        nnunet.DC_and_topk_loss({"ddp": False}, {"k": 50}),
    ],
    ids=lambda loss: type(loss).__name__,
)
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 4, 4, 6), (2, 1, 1, 4, 6)])
def test_nnunets_first_channel_of_a_dense_target_is_not_taken_for_labels(loss, shape):
    with pytest.raises(ValueError, match="target: got shape"):
        loss(torch.randn(2, 3, 4, 6), torch.zeros(shape, dtype=torch.int64))


SMP = ["DiceLoss", "TverskyLoss", "JaccardLoss", "FocalLoss", "LovaszLoss"]


@pytest.mark.parametrize("name", SMP)
@pytest.mark.parametrize(
    ("mode", "predicted", "shape"),
    [
        ("binary", (2, 1, 4, 6), (2, 1, 6, 4)),
        ("binary", (2, 1, 4, 6), (2, 6, 4)),
        ("multilabel", (2, 3, 4, 6), (2, 4, 6, 3)),
        ("multilabel", (2, 3, 4, 6), (2, 3, 6, 4)),
        ("multiclass", (2, 3, 4, 6), (2, 6, 4)),
    ],
)
def test_as_many_voxels_in_another_order_are_no_target(name, mode, predicted, shape):
    """smp counts voxels: images transposed, and channels that come last, pass."""
    dtype = torch.int64 if mode == "multiclass" else torch.float32
    with pytest.raises(ValueError, match=r"y_true|Target size"):
        getattr(smp, name)(mode)(torch.randn(predicted), torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("name", SMP)
def test_targets_may_be_flattened_and_have_axes_of_one(name):
    logits, target = torch.randn(2, 1, 4, 6), torch.randint(0, 2, (2, 4, 6)).float()
    loss = getattr(smp, name)("binary")
    expected = loss(logits, target)
    for same in (target[:, None], target[..., None], target.flatten(1)):
        assert torch.equal(loss(logits, same), expected)


def test_torchios_crops_have_one_number_of_channels():
    sampler = SimpleNamespace(
        padding_mode=None,
        patch_overlap=(0, 0, 0),
        subject=SimpleNamespace(spatial_shape=(4, 4, 4)),
        locations=np.array([[0, 0, 0, 4, 4, 2], [0, 0, 2, 4, 4, 4]]),
    )
    aggregator = torchio.GridAggregator(sampler)
    places = torch.tensor(sampler.locations)
    aggregator.add_batch(torch.ones(1, 3, 4, 4, 2), places[:1])
    with pytest.raises(ValueError, match="batch_tensor: got 1 channels, expected 3"):
        aggregator.add_batch(torch.ones(1, 1, 4, 4, 2), places[1:])
    with pytest.raises(ValueError, match="locations: got 2 for 1 patches"):
        aggregator.add_batch(torch.ones(1, 3, 4, 4, 2), places)


# --- Down to a coarser output -------------------------------------------------------------------


def survivors(labels, size, classes, ignore_index=None, mask=None):
    """``downsample="max"`` by its definition, a voxel at a time."""
    axes = labels.ndim - len(size)
    own = labels.shape[axes:]
    result = labels.new_zeros((*labels.shape[:axes], *size))
    counted = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask != 0
    for b in range(labels.shape[0]):
        keep = counted[b] & (labels[b] != ignore_index) if ignore_index is not None else counted[b]
        counts = [int(((labels[b] == c) & keep).sum()) for c in range(classes)]
        for place in itertools.product(*map(range, size)):
            window = tuple(
                slice(i * n // m, -(-(i + 1) * n // m))
                for i, n, m in zip(place, own, size, strict=True)
            )
            seen = labels[(b, ..., *window)][keep[(..., *window)]].tolist()
            ignored = 0 if ignore_index is None else ignore_index
            rarest = min(seen, key=lambda c: (counts[int(c)], -c), default=ignored)
            result[(b, ..., *place)] = rarest
    return result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("size", [(2, 3, 2), (3, 4, 3), (4, 6, 5), (1, 1, 1)])
def test_the_rarest_class_survives_max_pooling(size, ignore_index, dtype):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 8, (2, 4, 6, 5), generator=generator).clamp(max=3).to(dtype)
    if ignore_index is not None and dtype != torch.int16:
        labels[torch.rand(labels.shape, generator=generator) < 0.5] = ignore_index
    mask = torch.rand(labels.shape, generator=generator) < 0.7
    loss = voxfuse.DeepSupervisionLoss(
        voxfuse.DiceLoss(ignore_index=ignore_index), downsample="max"
    )
    output = torch.randn(2, 4, *size)
    for given, own_mask in ((labels, None), (labels, mask), (labels[:, None], mask)):
        pooled, coarse = loss.at_level(given, own_mask, output)
        if own_mask is not None and own_mask.ndim < given.ndim:
            own_mask = own_mask[:, None]
        whole = list(size) == [4, 6, 5]  # nothing to bring down
        expected = given if whole else survivors(given, size, 4, ignore_index, own_mask)
        assert pooled.dtype == dtype
        assert torch.equal(pooled, expected)
        if own_mask is not None and not whole:
            covered = nn.functional.adaptive_max_pool3d(mask.float(), size)
            assert torch.equal(coarse.reshape(covered.shape), covered == 1)


def test_a_lesion_of_one_voxel_survives_max_and_not_nearest():
    labels = torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8)
    labels[0, 0, 1, 2, 5] = 1
    outputs = [torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 2, 4, 4, 4)]
    for downsample, lesion in (("nearest", 0), ("max", 1)):
        loss = voxfuse.DeepSupervisionLoss(voxfuse.DiceLoss(), "same", downsample=downsample)
        coarse, _ = loss.at_level(labels, None, outputs[1])
        assert int(coarse.sum()) == lesion
        expected = voxfuse.DiceLoss()(outputs[0], labels) + voxfuse.DiceLoss()(outputs[1], coarse)
        torch.testing.assert_close(loss(outputs, labels), expected)
        assert ("downsample='max'" in repr(loss)) == (downsample == "max")


def test_voxels_that_the_mask_leaves_out_of_a_coarse_one_are_no_wrong_labels():
    labels = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    outputs = [torch.randn(1, 2, 8, 8), torch.randn(1, 2, 4, 4)]
    loss = voxfuse.DeepSupervisionLoss(voxfuse.DiceLoss(), downsample="max")
    expected = loss([x[..., x.shape[-1] // 2 :] for x in outputs], labels[..., 4:])
    torch.testing.assert_close(loss(outputs, labels, mask), expected)


def test_max_pooling_of_dense_targets_and_of_one_class():
    dense = torch.rand(2, 3, 5, 6)
    loss = voxfuse.DeepSupervisionLoss(voxfuse.BCELoss(), downsample="max")
    pooled, _ = loss.at_level(dense, None, torch.randn(2, 3, 2, 4))
    expected = nn.functional.adaptive_max_pool2d(dense, (2, 4))
    assert torch.equal(pooled, expected)
    for dtype in (
        torch.int8,
        torch.uint16,
        torch.uint64,
        torch.float64,
        torch.bfloat16,
        torch.bool,
    ):
        pooled, _ = loss.at_level((dense > 0.9).to(dtype), None, torch.randn(2, 3, 2, 4))
        assert torch.equal(pooled, (expected > 0.9).to(dtype))
    indicator = torch.tensor([[[0, 1, 255, 0, 255, 255]]])
    loss = voxfuse.DeepSupervisionLoss(
        voxfuse.TverskyLoss(activation="sigmoid", ignore_index=255), downsample="max"
    )
    pooled, _ = loss.at_level(indicator, None, torch.randn(1, 1, 3))
    assert pooled.tolist() == [[[1, 0, 255]]]
    pooled, coarse = loss.at_level(indicator, indicator == 0, torch.randn(1, 1, 3))
    assert pooled.tolist() == [[[0, 0, 255]]]
    assert coarse.tolist() == [[[True, True, False]]]


IGNORING = {
    "a head's": lambda: voxfuse.HeadLoss(voxfuse.DiceCELoss(ignore_index=255)),
    "nnU-Net's": lambda: nnunet.DC_and_CE_loss({"ddp": False}, {}, ignore_label=255),
    "a partial": lambda: partial(voxfuse.functional.dice_ce_loss, ignore_index=255),
}


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("name", IGNORING)
def test_max_pooling_finds_the_label_to_ignore(name, classes):
    """Beside it the lesion survives; what is left without one keeps it."""
    loss = voxfuse.DeepSupervisionLoss(IGNORING[name](), downsample="max")
    labels = torch.tensor([[[0, 1, 1, 255, 255, 255, 0, 0]]])
    pooled, _ = loss.at_level(labels, None, torch.randn(1, classes, 4))
    assert pooled.tolist() == [[[1, 1, 255, 0]]]


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_max_pooling_does_not_let_a_label_win_that_nobody_told_it_to_ignore(classes, dtype):
    def loss(*arguments):
        return voxfuse.BCELoss(ignore_index=255)(*arguments)

    labels = torch.tensor([[[0, 1, 1, 255, 0, 0]]]).to(dtype)
    deep = voxfuse.DeepSupervisionLoss(loss, downsample="max")
    message = r"label 255 is outside \[0, 2\).*finds the label to ignore as the attribute"
    with pytest.raises(ValueError, match=message):
        deep.at_level(labels, None, torch.randn(1, classes, 3))
    loss.ignore_index = 255
    pooled, _ = deep.at_level(labels, None, torch.randn(1, classes, 3))
    assert pooled.tolist() == [[[1, 1, 0]]]
    del loss.ignore_index
    if classes == 1:  # masked out, it is nobody's
        pooled, _ = deep.at_level(labels, labels != 255, torch.randn(1, 1, 3))
        assert pooled.tolist() == [[[1, 1, 0]]]


@pytest.mark.parametrize("regions", [1, 2])
def test_max_pooling_keeps_the_channel_of_what_nnunet_leaves_out(regions):
    first = [0, 1, 1, 1, 0, 0, 0, 0]
    left_out = [0, 0, 1, 1, 1, 0, 0, 0]
    target = torch.tensor([[first, *[[0] * 8] * (regions - 1), left_out]]).bool()
    deep = voxfuse.DeepSupervisionLoss(
        nnunet.DC_and_BCE_loss({}, {"ddp": False}, use_ignore_label=True), downsample="max"
    )
    pooled, _ = deep.at_level(target, None, torch.randn(1, regions, 4))
    assert pooled.dtype == torch.bool
    assert pooled[0, [0, -1]].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


def test_max_pooling_compiles_and_serves_fused_heads():
    torch._dynamo.reset()
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (1, 1, 8, 8, 8), dtype=torch.uint8)
    outputs = [torch.randn(1, 3, 8, 8, 8), torch.randn(1, 3, 3, 4, 4)]
    loss = voxfuse.DeepSupervisionLoss(voxfuse.DiceLoss(), downsample="max")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(outputs, labels), loss(outputs, labels))
    network = nn.Sequential(nn.Conv3d(1, 4, 2, stride=2), nn.Conv3d(4, 3, 1))
    image = torch.randn(1, 1, 8, 8, 8)
    expected = loss([network(image)], labels)
    torch.testing.assert_close(voxfuse.fuse_head(network, loss)(image, labels), expected)


def test_max_pooling_names_labels_that_are_no_class():
    loss = voxfuse.DeepSupervisionLoss(voxfuse.DiceLoss(), downsample="max")
    labels = torch.zeros(1, 8, dtype=torch.int64)
    labels[0, 5] = 7
    with pytest.raises(ValueError, match=r"target: label 7 is outside \[0, 2\), first at target"):
        loss([torch.randn(1, 2, 4)], labels)
    with pytest.raises(ValueError, match="mask: got shape .* expected the voxels of the target"):
        loss([torch.randn(1, 2, 4)], labels.clamp(max=1), torch.ones(1, 6))
    with pytest.raises(ValueError, match="downsample: got 'min', expected one of 'nearest', 'max'"):
        voxfuse.DeepSupervisionLoss(voxfuse.DiceLoss(), downsample="min")
