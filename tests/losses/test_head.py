"""Losses from the features before the last layer, and networks fused with their loss."""

from __future__ import annotations

import copy
import inspect
import io
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import voxfuse
from tests.ranks import launch
from voxfuse.ops.head_confusion import CHUNK_BYTES

CLASSES, CHANNELS = 5, 4
FAMILY = {
    "tversky": lambda: voxfuse.TverskyLoss(0.3, 0.7),
    "tversky weights": lambda: voxfuse.TverskyLoss(class_weight=[1.0, 2.0, 0.0, 0.5, 3.0]),
    "tversky terms": lambda: voxfuse.TverskyLoss(reduction="none", include_background=False),
    "focal tversky": lambda: voxfuse.FocalTverskyLoss(),
    "squared dice": lambda: voxfuse.DiceLoss(squared=True, batch=True),
    "jaccard": lambda: voxfuse.JaccardLoss(ignore_index=2),
    "f-beta": lambda: voxfuse.FBetaLoss(2.0),
    "generalised dice": lambda: voxfuse.GeneralizedDiceLoss(),
    "cross-entropy": lambda: voxfuse.CrossEntropyLoss(label_smoothing=0.1),
    "bce": lambda: voxfuse.BCELoss(),
    "focal": lambda: voxfuse.FocalLoss(activation="sigmoid", gamma=1.5),
    "dice + ce": lambda: voxfuse.DiceCELoss(ignore_index=1),
    "dice + focal": lambda: voxfuse.DiceFocalLoss(),
    "tversky + focal": lambda: voxfuse.TverskyFocalLoss(focal_activation="sigmoid"),
    "unified focal": lambda: voxfuse.UnifiedFocalLoss(),
}


def head_and_features(dtype: torch.dtype = torch.float64) -> tuple[nn.Conv3d, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Conv3d(CHANNELS, CLASSES, 1, dtype=dtype)
    return head, torch.randn(2, CHANNELS, 6, 5, 4, dtype=dtype, requires_grad=True)


def labels_for(*size: int, classes: int = CLASSES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, classes, (2, 1, *size), generator=generator)


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    cotangent = torch.arange(1.0, 1 + loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return torch.autograd.grad(loss, inputs, cotangent)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", FAMILY)
def test_every_loss_made_of_sums_equals_the_unfused_one(name, backend):
    loss = FAMILY[name]()
    loss.backend = backend
    head, features = head_and_features()
    labels = labels_for(6, 5, 4)
    weight = torch.rand(2, 6, 5, 4)
    inputs = (features, head.weight, head.bias)
    fused = voxfuse.head_loss(loss, features, head.weight, head.bias, labels, weight)
    expected = loss(head(features), labels, weight)
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=0)
    for a, b in zip(gradients(fused, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12 * b.abs().max().item())


def test_the_modules_are_their_losses():
    head, features = head_and_features(torch.float32)
    labels = labels_for(6, 5, 4)
    call = (features, head.weight, head.bias, labels)
    tversky = voxfuse.HeadTverskyLoss(0.2, 0.8, 0.75, batch=True, chunk_bytes=1000)
    dice = voxfuse.HeadDiceCELoss(1.0, 0.5, include_background=False)
    plain = (
        voxfuse.TverskyLoss(0.2, 0.8, 0.75, batch=True),
        voxfuse.DiceCELoss(1.0, 0.5, include_background=False),
    )
    for fused, loss in zip((tversky, dice), plain, strict=True):
        assert {name: getattr(fused, name) for name in loss.defaults} == {
            name: getattr(loss, name) for name in loss.defaults
        }
        with pytest.raises(TypeError, match=f"alfa: not an option of {type(fused).__name__}"):
            type(fused)(alfa=0.3)
        torch.testing.assert_close(fused(*call), voxfuse.head_loss(loss, *call))
        torch.testing.assert_close(fused(*call), loss(head(features), labels))
        assert fused(*call).dtype == torch.float32


@pytest.mark.parametrize("name", ["TverskyLoss", "DiceCELoss"])
def test_the_modules_have_the_options_of_their_losses(name):
    """And one more; a type checker sees the same, in test_modules.py."""
    own = dict(inspect.signature(getattr(voxfuse, "Head" + name)).parameters)
    chunk_bytes = own.pop("chunk_bytes")
    assert (chunk_bytes.kind, chunk_bytes.default) == (chunk_bytes.KEYWORD_ONLY, CHUNK_BYTES)
    assert own == dict(inspect.signature(getattr(voxfuse, name)).parameters)


def test_dense_targets_and_one_class():
    head, features = head_and_features()
    target = torch.rand(2, CLASSES, 6, 5, 4)
    loss = voxfuse.BCELoss()
    fused = voxfuse.head_loss(loss, features, head.weight, head.bias, target)
    torch.testing.assert_close(fused, loss(head(features), target), rtol=1e-12, atol=0)
    one = nn.Conv3d(CHANNELS, 1, 1, bias=False, dtype=torch.float64)
    foreground = torch.randint(0, 2, (2, 1, 6, 5, 4))
    loss = voxfuse.TverskyLoss(activation="sigmoid")
    fused = voxfuse.head_loss(loss, features, one.weight, None, foreground)
    torch.testing.assert_close(fused, loss(one(features), foreground), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "loss",
    [
        voxfuse.LovaszLoss(),
        voxfuse.CrossEntropyLoss(reduction="none"),
        nn.CrossEntropyLoss(),
        "dice",
    ],
    ids=["lovasz", "by voxel", "torch's", "a string"],
)
def test_losses_that_are_not_made_of_sums_are_refused(loss):
    head, features = head_and_features()
    with pytest.raises(TypeError, match="made of sums over the voxels"):
        voxfuse.head_loss(loss, features, head.weight, head.bias, labels_for(6, 5, 4))
    with pytest.raises(TypeError, match="made of sums over the voxels|expected a loss to call"):
        voxfuse.fuse_head(nn.Sequential(head), loss)


# --- Networks -------------------------------------------------------------------------------------


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1), nn.InstanceNorm3d(6), nn.ReLU(), nn.Conv3d(6, CLASSES, 1)
    )


class SmallUNet(nn.Module):
    """Two resolutions; with ``heads`` one output a resolution, as nnU-Net's PlainConvUNet."""

    def __init__(self, classes: int, heads: bool = False, width: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.down = nn.Conv3d(1, width, 3, padding=1)
        self.bottom = nn.Conv3d(width, 2 * width, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose3d(2 * width, width, 2, stride=2)
        self.merge = nn.Conv3d(2 * width, width, 3, padding=1)
        self.seg_layers = nn.ModuleList(
            [nn.Conv3d(2 * width, classes, 1), nn.Conv3d(width, classes, 1)]
        )

    def forward(self, x):
        fine = F.leaky_relu(self.down(x))
        coarse = F.leaky_relu(self.bottom(fine))
        y = F.leaky_relu(self.merge(torch.cat([self.up(coarse), fine], 1)))
        if not self.heads:
            return self.seg_layers[-1](y)
        return [self.seg_layers[-1](y), self.seg_layers[0](coarse)]


def assert_fused_equals_unfused(model, loss, size, head=None, classes=CLASSES):
    """Loss, every parameter's gradient, logits and state_dict."""
    twin = copy.deepcopy(model)
    keys = list(model.state_dict())
    fused = voxfuse.fuse_head(model, loss, head=head)
    assert list(fused.state_dict()) == keys
    fused.load_state_dict(twin.state_dict())
    twin.load_state_dict(fused.state_dict())
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(2, 1, *size, generator=generator)
    labels = labels_for(*size, classes=classes)
    actual, expected = fused(image, labels), loss(twin(image), labels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    actual.backward()
    expected.backward()
    # Of the whole network: a bias before a normalisation has a gradient of nothing but rounding.
    largest = max(p.grad.abs().max().item() for p in twin.parameters() if p.grad is not None)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * largest)
    logits, plain = fused(image), twin(image)
    torch.testing.assert_close(logits, plain, rtol=0, atol=0)
    torch.testing.assert_close(model(image), plain, rtol=0, atol=0)
    return fused


def test_a_sequential():
    fused = assert_fused_equals_unfused(sequential(), voxfuse.DiceCELoss(), (6, 5, 4))
    assert isinstance(fused.model[-1], nn.Conv3d)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_other_dimensions(dimensions):
    convolution = (nn.Conv1d, nn.Conv2d)[dimensions - 1]
    model = nn.Sequential(convolution(1, 4, 3, padding=1), nn.ReLU(), convolution(4, CLASSES, 1))
    assert_fused_equals_unfused(model, voxfuse.TverskyLoss(), (9,) * dimensions)


@pytest.mark.parametrize(
    "make",
    [
        lambda nets: nets.SegResNet(init_filters=8, in_channels=1, out_channels=CLASSES),
        lambda nets: nets.DynUNet(3, 1, CLASSES, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 4, 4]),
        lambda nets: nets.BasicUNet(3, 1, CLASSES, (4,) * 6, norm="batch"),
        lambda nets: nets.AttentionUnet(3, 1, CLASSES, (4, 4), (2,)),
    ],
    ids=["SegResNet", "DynUNet", "BasicUNet", "AttentionUnet"],
)
def test_monai_networks(make):
    nets = pytest.importorskip("monai.networks.nets", reason="needs the extra monai")
    torch.manual_seed(0)
    # Attention's batch normalisation is frozen: logits after a training step would differ.
    model = make(nets).eval()
    assert_fused_equals_unfused(model, voxfuse.DiceCELoss(), (16, 16, 16))


def test_monai_networks_that_cannot_be_fused_say_why():
    nets = pytest.importorskip("monai.networks.nets", reason="needs the extra monai")
    unet = nets.UNet(3, 1, CLASSES, (4, 8), (2,), num_res_units=1)
    with pytest.raises(ValueError, match=r"last convolution of UNet, .* has a kernel of \(3, 3, 3"):
        voxfuse.fuse_head(unet, voxfuse.DiceCELoss())
    deep = nets.DynUNet(
        3, 1, CLASSES, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 4, 4], deep_supervision=True
    )
    fused = voxfuse.fuse_head(deep, voxfuse.DiceCELoss(), head="output_block.conv.conv")
    image, labels = torch.randn(2, 1, 8, 8, 8), labels_for(8, 8, 8)
    # It resamples its outputs and stacks them.
    with pytest.raises(ValueError, match="DynUNet does something to the output of output_block"):
        fused(image, labels)
    expected = voxfuse.DiceCELoss()(fused.eval()(image), labels)
    torch.testing.assert_close(fused(image, labels), expected, rtol=1e-5, atol=0)


AFTER_THE_HEAD = {
    "scales it": lambda y: 2 * y,
    "softmax": lambda y: y.softmax(1),
    "resamples it": lambda y: F.interpolate(y, scale_factor=2),
    "overwrites it": lambda y: y.relu_(),
    "looks at its axes": lambda y: y if len(y.shape) == 5 else y[0, 0],
    "unpacks its shape": lambda y: next(y for _, _, *_ in [y.shape]),
    "stacks it": lambda y: torch.stack([y, y], 1),
    "puts it into a dict": lambda y: {"out": y},
    "returns nothing": lambda y: None,
    "returns something else too": lambda y: (y, y.detach()),
}


@pytest.mark.parametrize("after", AFTER_THE_HEAD)
def test_a_network_that_goes_on_after_its_head_is_refused(after):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv3d(1, CLASSES, 1)

        def forward(self, x):
            return AFTER_THE_HEAD[after](self.last(x))

    fused = voxfuse.fuse_head(Network(), voxfuse.DiceCELoss())
    image, labels = torch.randn(2, 1, 4, 4, 4), labels_for(4, 4, 4)
    message = "Network does something to the output of last before it returns it; only a last layer"
    with pytest.raises(ValueError, match=message):
        fused(image, labels)
    assert fused.model.last(image).shape == (2, CLASSES, 4, 4, 4)


class OneHead(nn.Module):
    """A network that does ``use`` with its head and the features."""

    def __init__(self, use):
        super().__init__()
        self.body = nn.Conv3d(1, 6, 3, padding=1)
        self.head = nn.Conv3d(6, CLASSES, 1)
        self.use = use

    def forward(self, x):
        return self.use(self.head, F.relu(self.body(x)))


INSIDE = {
    "gates by it": lambda head, f: head(f * head(f).sigmoid().sum()),
    "gates by it and returns it": lambda head, f: (lambda y: [head(f * y.mean()), y])(head(f)),
    "multiplies with it": lambda head, f: head(torch.mul(f, other=head(f))),
    "reads its value": lambda head, f: head(f * head(f).max().item()),
}
UNCHANGED = {
    "discards one": lambda head, f: (head(f), head(f.relu()))[1],
    "casts to what it is": lambda head, f: F.dropout(head(f).float().contiguous(), 0.5, False),
    "asks": lambda head, f: (lambda y: y.to(f.dtype) if y.is_floating_point() else None)(head(f)),
}


@pytest.mark.parametrize("use", INSIDE)
def test_a_network_that_uses_its_logits_inside_is_refused(use):
    fused = voxfuse.fuse_head(OneHead(INSIDE[use]), voxfuse.DiceCELoss())
    with pytest.raises(ValueError, match="OneHead does something to the output of head before"):
        fused(torch.randn(2, 1, 4, 4, 4), labels_for(4, 4, 4))


@pytest.mark.parametrize("use", UNCHANGED)
def test_a_network_may_do_what_changes_nothing(use):
    assert_fused_equals_unfused(OneHead(UNCHANGED[use]), voxfuse.DiceCELoss(), (6, 5, 4))
    fused = voxfuse.fuse_head(OneHead(UNCHANGED[use]), voxfuse.DiceCELoss())
    with torch.inference_mode():
        value = fused(torch.randn(2, 1, 4, 4, 4), labels_for(4, 4, 4))
    assert type(value) is torch.Tensor


@pytest.mark.parametrize("after", [lambda y: y / 2, torch.relu, lambda y: [y, y.sigmoid()]])
def test_a_compiled_network_that_goes_on_after_its_head_is_refused(after):
    torch._dynamo.reset()
    network = OneHead(lambda head, f: after(head(f)))
    step = torch.compile(voxfuse.fuse_head(network, voxfuse.DiceCELoss()), backend="eager")
    with pytest.raises(ValueError, match="OneHead does something to the output of head before"):
        step(torch.randn(2, 1, 4, 4, 4), labels_for(4, 4, 4))


def test_targets_of_heads_of_one_resolution_cannot_be_told_apart():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Conv3d(1, CLASSES, 1) for _ in "ab"])

        def forward(self, x):
            return [head(x) for head in self.heads]

    loss = voxfuse.DeepSupervisionLoss(voxfuse.DiceCELoss(), "same")
    fused = voxfuse.fuse_head(Network(), loss)
    image, labels = torch.randn(2, 1, 4, 4, 4), labels_for(4, 4, 4)
    expected = loss(fused(image), labels)
    torch.testing.assert_close(fused(image, labels), expected)
    torch.testing.assert_close(fused(image, [labels, labels]), expected)
    with pytest.raises(ValueError, match=r"target: 2 of \[.* have the resolution \(4, 4, 4\)"):
        fused(image, [labels, labels.flip(2)])


def test_another_loss_takes_effect_at_the_next_call():
    fused = voxfuse.fuse_head(sequential(), voxfuse.DiceLoss())
    image, labels = torch.randn(2, 1, 4, 4, 4), labels_for(4, 4, 4)
    for loss in (voxfuse.CrossEntropyLoss(), voxfuse.DeepSupervisionLoss(voxfuse.BCELoss(), [2])):
        fused.loss = loss
        torch.testing.assert_close(fused(image, labels), loss(fused(image), labels))
    fused.loss = voxfuse.LovaszLoss()
    with pytest.raises(TypeError, match="made of sums over the voxels"):
        fused(image, labels)


def test_an_error_of_the_network_before_its_head_is_its_own():
    fused = voxfuse.fuse_head(sequential(), voxfuse.DiceCELoss())
    with pytest.raises(RuntimeError, match=r"expected input\[2, 3, 4, 4, 4\] to have 1 channels"):
        fused(torch.randn(2, 3, 4, 4, 4), labels_for(4, 4, 4))


def test_unfuse_gives_the_network_back():
    network = sequential()
    fused = voxfuse.fuse_head(network, voxfuse.DiceCELoss())
    image, labels = torch.randn(2, 1, 4, 4, 4), labels_for(4, 4, 4)
    expected = fused(image, labels)
    assert fused.unfuse() is network
    assert type(network[-1]) is nn.Conv3d
    torch.testing.assert_close(voxfuse.DiceCELoss()(network(image), labels), expected)
    with pytest.raises(RuntimeError, match="head: '3' was unfused; call fuse_head again"):
        fused(image, labels)
    again = voxfuse.fuse_head(network, voxfuse.DiceCELoss())
    assert torch.equal(again(image, labels), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_fused_network_is_saved_whole_and_scripted_as_before():
    network = sequential().eval()
    image = torch.randn(2, 1, 4, 4, 4)
    expected = network(image)
    fused = voxfuse.fuse_head(network, voxfuse.DiceCELoss())
    fused(image, labels_for(4, 4, 4))
    file = io.BytesIO()
    torch.save(network, file)
    assert b"voxfuse" not in file.getvalue()  # a machine without it can load the file
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded[-1]) is nn.Conv3d
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(network), file)
    file.seek(0)
    for other in (loaded, torch.jit.load(file), copy.deepcopy(network)):
        assert torch.equal(other(image), expected)


def test_a_function_of_the_sums_is_a_loss():
    """Of a fused network, a head and logits: the batch's Dice loss, written by hand."""

    def by_hand(sums):
        return 1 - sums.pooled().dice().mean()

    network, twin = sequential(), sequential()
    fused = voxfuse.fuse_head(network, by_hand)
    image, labels = torch.randn(2, 1, 6, 5, 4), labels_for(6, 5, 4)
    loss = voxfuse.DiceLoss(batch=True, smooth_nr=0.0, smooth_dr=0.0)
    actual, expected = fused(image, labels), loss(twin(image), labels)
    torch.testing.assert_close(actual, expected)
    actual.backward()
    expected.backward()
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)
    options = {"activation": "sigmoid", "ignore_index": 2}
    logits, head = twin(image), twin[-1]
    mine = voxfuse.SumsLoss(by_hand, **options)
    loss = voxfuse.DiceLoss(batch=True, smooth_nr=0.0, smooth_dr=0.0, **options)
    torch.testing.assert_close(mine(logits, labels), loss(logits, labels))
    torch.testing.assert_close(
        voxfuse.head_loss(mine, twin[:-1](image), head.weight, head.bias, labels),
        loss(logits, labels),
    )
    with pytest.raises(TypeError, match="function: got 3, expected a function of the sums"):
        voxfuse.SumsLoss(3)
    with pytest.raises(ValueError, match="class_weight: not of this loss"):
        voxfuse.SumsLoss(by_hand, class_weight=[1.0])
    with pytest.raises(TypeError, match="function: SumsLoss needs it"):
        voxfuse.SumsLoss()


def plain_conv_unet(deep_supervision: bool) -> nn.Module:
    unet = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet",
        reason="needs dynamic-network-architectures, nnU-Net's networks",
    )
    torch.manual_seed(0)
    return unet.PlainConvUNet(
        1,
        3,
        (4, 8, 8),
        nn.Conv3d,
        3,
        [1, 2, 2],
        1,
        CLASSES,
        1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        nonlin=nn.LeakyReLU,
        deep_supervision=deep_supervision,
    )


@pytest.mark.parametrize("network", ["same structure", "PlainConvUNet"])
@pytest.mark.parametrize("weights", ["exp", [1.0, 0.5], [1.0, 0.0]])
def test_deep_supervision_as_in_nnunet(network, weights):
    torch.manual_seed(0)
    loss = voxfuse.DeepSupervisionLoss(voxfuse.DiceCELoss(), weights, normalize=True)
    if network == "PlainConvUNet":
        model: nn.Module = plain_conv_unet(True)
    else:
        model = SmallUNet(CLASSES, heads=True)
    twin = copy.deepcopy(model)
    fused = assert_fused_equals_unfused(model, loss, (8, 8, 8))
    assert len(fused.heads) == 2
    # One target an output, in the outputs' order.
    image, fine = torch.randn(2, 1, 8, 8, 8), labels_for(8, 8, 8)
    targets = [fine, fine[..., ::2, ::2, ::2]]
    torch.testing.assert_close(fused(image, targets), loss(twin(image), targets), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"target: none of \[.*\] has the resolution \(4, 4, 4\)"):
        fused(image, [fine])


def test_deep_supervision_switched_off_uses_the_last_head_alone():
    model = SmallUNet(CLASSES, heads=True)
    fused = voxfuse.fuse_head(model, voxfuse.DiceCELoss())
    model.heads = False
    image, labels = torch.randn(2, 1, 8, 8, 8), labels_for(8, 8, 8)
    expected = voxfuse.DiceCELoss()(model(image), labels)
    torch.testing.assert_close(fused(image, labels), expected, rtol=1e-5, atol=0)


def test_voxel_weights_and_a_named_head():
    model = SmallUNet(CLASSES)
    loss = voxfuse.DiceCELoss()
    fused = voxfuse.fuse_head(model, loss, head="seg_layers.1")
    image, labels = torch.randn(2, 1, 8, 8, 8), labels_for(8, 8, 8)
    weight = torch.rand(2, 1, 8, 8, 8)
    expected = loss(model(image), labels, weight)
    torch.testing.assert_close(fused(image, labels, weight), expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"head: SmallUNet has no module 'last'"):
        voxfuse.fuse_head(model, loss, head="last")
    with pytest.raises(ValueError, match=r"head: 'merge' has a kernel of \(3, 3, 3\)"):
        voxfuse.fuse_head(model, loss, head="merge")
    with pytest.raises(ValueError, match="head: seg_layers.0 did not take part"):
        voxfuse.fuse_head(model, loss, head="seg_layers.0")(image, labels)
    with pytest.raises(ValueError, match="Linear has no convolution"):
        voxfuse.fuse_head(nn.Linear(2, 3), loss)


def test_state_inside_a_larger_module_and_with_a_weighted_loss():
    loss = voxfuse.TverskyLoss(class_weight=[1.0, 2.0, 3.0, 4.0, 5.0])
    keys = [f"net.{key}" for key in sequential().state_dict()]
    outer = nn.ModuleDict({"net": voxfuse.fuse_head(sequential(), loss)})
    assert list(outer.state_dict()) == keys
    plain = nn.ModuleDict({"net": sequential()})
    outer.load_state_dict(plain.state_dict())
    plain.load_state_dict(outer.state_dict())
    missing = plain.state_dict()
    del missing["net.0.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.bias"):
        outer.load_state_dict(missing)


def test_state_under_the_names_of_the_parameters():
    """As a moving average keeps it; with a network whose own names begin with model. as well."""
    for wrap in (lambda x: x, lambda x: nn.ModuleDict({"model": x, "loss": nn.PReLU()})):
        trained, fresh = (wrap(sequential()) for _ in "ab")
        loss = voxfuse.TverskyLoss(class_weight=[1.0, 2.0, 3.0, 4.0, 5.0])
        heads = [next(n for n, m in trained.named_modules() if n.endswith("3"))]
        fused, other = (voxfuse.fuse_head(x, loss, head=heads) for x in (trained, fresh))
        with torch.no_grad():
            for parameter in fused.parameters():
                parameter.normal_()
        average = {name: x.clone() for name, x in fused.named_parameters()}
        assert next(iter(average)).startswith("model.")
        for state in (average, trained.state_dict(), fused.state_dict()):
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.zero_()
            other.load_state_dict(state)
            for a, b in zip(other.parameters(), fused.parameters(), strict=True):
                assert torch.equal(a, b)


def test_the_state_holds_what_is_trained_of_a_loss():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, sums):
            return self.w * (1 - sums.dice().mean())

    fused, other = (voxfuse.fuse_head(sequential(), voxfuse.SumsLoss(Weighted())) for _ in "ab")
    with torch.no_grad():
        fused.loss.function.w.fill_(3.0)
    outer = nn.ModuleDict({"net": other})
    outer.load_state_dict(nn.ModuleDict({"net": fused}).state_dict())
    assert other.loss.function.w.item() == 3
    with pytest.raises(RuntimeError, match=r"Missing key.*loss\.function\.w"):
        other.load_state_dict(sequential().state_dict())


def test_one_call_at_a_time():
    """Another thread's would get a loss for logits, or have its loss taken away."""
    image, labels = torch.randn(2, 1, 4, 4, 4), labels_for(4, 4, 4)
    found = []

    def meanwhile(head, f):
        for target in (None, labels):
            if len(found) < 2:
                with pytest.raises(RuntimeError, match="a call of this network is under way"):
                    fused(image, target)
                found.append(target)
        return head(f)

    fused = voxfuse.fuse_head(OneHead(meanwhile), voxfuse.DiceCELoss())
    fused(image, labels)
    assert len(found) == 2


def test_a_fused_network_is_copied_and_pickled():
    fused = voxfuse.fuse_head(sequential(), voxfuse.DiceCELoss())
    image, labels = torch.randn(2, 1, 4, 4, 4), labels_for(4, 4, 4)
    expected = fused(image, labels)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for other in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert torch.equal(other(image, labels), expected)
        other(image, labels).backward()
    assert all(p.grad is None for p in fused.parameters())


def test_an_error_inside_the_network_leaves_it_usable():
    fused = voxfuse.fuse_head(sequential(), voxfuse.DiceCELoss())
    image = torch.randn(2, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="target: label 99"):
        fused(image, torch.full((2, 1, 4, 4, 4), 99))
    assert fused(image).shape == (2, CLASSES, 4, 4, 4)


# --- In training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [False, True])
def test_compiles_as_one_graph(heads):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = SmallUNet(CLASSES, heads=heads)
    eager, compiled = (voxfuse.fuse_head(copy.deepcopy(model), voxfuse.DiceCELoss()) for _ in "ab")
    image, labels = torch.randn(2, 1, 8, 8, 8), labels_for(8, 8, 8)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for fused in (eager, step):
        fused(image, labels).backward()
    torch.testing.assert_close(step(image, labels), eager(image, labels))
    for a, b in zip(compiled.parameters(), eager.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(compiled(image), eager(image), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_the_whole(reentrant):
    plain, recomputed = (voxfuse.fuse_head(sequential(), voxfuse.DiceCELoss()) for _ in "ab")
    image, labels = torch.randn(2, 1, 6, 6, 6, requires_grad=True), labels_for(6, 6, 6)
    plain(image, labels).backward()
    checkpoint(recomputed, image, labels, use_reentrant=reentrant).backward()
    for a, b in zip(recomputed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_autocast_keeps_a_float32_loss_and_float32_gradients():
    fused = voxfuse.fuse_head(sequential(), voxfuse.DiceCELoss())
    image, labels = torch.randn(2, 1, 6, 6, 6), labels_for(6, 6, 6)
    exact = fused(image, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused(image, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in fused.parameters())


def ranks_equal_one_process(rank: int, world: int) -> None:
    """DDP, and FSDP2 with every layer (the head too) sharded, before and after fusing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    generator = torch.Generator().manual_seed(0)
    image, labels = torch.randn(2, 1, 4, 4, 4, generator=generator), labels_for(4, 4, 4)
    whole = voxfuse.fuse_head(sequential(), voxfuse.TverskyLoss(0.3, 0.7, batch=True))
    expected = whole(image, labels)
    expected.backward()
    loss = voxfuse.TverskyLoss(0.3, 0.7, batch=True, process_group="world", ddp_average=True)
    mesh = init_device_mesh("cpu", (world,))

    def shard(layers: nn.Sequential) -> nn.Sequential:
        for layer in layers:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        return layers

    networks = {
        "DDP": nn.parallel.DistributedDataParallel(voxfuse.fuse_head(sequential(), loss)),
        "sharded, fused": voxfuse.fuse_head(shard(sequential()), loss),
    }
    fused = voxfuse.fuse_head(sequential(), loss)
    shard(fused.model)
    networks["fused, sharded"] = fully_shard(fused, mesh=mesh)
    for name, network in networks.items():
        own = slice(rank, rank + 1)
        value = network(image[own], labels[own])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0, msg=name)
        value.backward()
        for mine, one in zip(network.parameters(), whole.parameters(), strict=True):
            full = mine.grad if name == "DDP" else mine.grad.full_tensor()
            torch.testing.assert_close(full, one.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch is built without gloo"
)
def test_ranks_equal_one_process(tmp_path):
    launch(2, tmp_path, (ranks_equal_one_process,))


HEAD_MR = Path(__file__).resolve().parents[2] / "data" / "head_mr"


def test_a_training_run_on_116_regions_is_the_same_fused_and_unfused():
    """50 steps from one seed: fused and unfused drift apart no further than two unfused runs of
    different precision do, in float32 and, scaled by the units of rounding, in float64."""
    nibabel = pytest.importorskip("nibabel", reason="needs the extra demo: nibabel")
    image, regions = (
        torch.from_numpy(nibabel.load(HEAD_MR / name).get_fdata(dtype="float32"))
        for name in ("ch2.nii.gz", "aal.nii.gz")
    )
    generator = torch.Generator().manual_seed(0)
    size = 16
    corners = [
        [int(torch.randint(30, n - 30 - size, (), generator=generator)) for n in image.shape]
        for _ in range(50)
    ]

    def curve(dtype: torch.dtype, fuse: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = SmallUNet(117).to(dtype)
        loss = voxfuse.DiceCELoss(batch=True)
        step = voxfuse.fuse_head(model, loss) if fuse else lambda x, y: loss(model(x), y)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        losses = []
        for corner in corners:
            window = tuple(slice(start, start + size) for start in corner)
            value = step(image[window][None, None].to(dtype) / 255, regions[window][None, None])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.detach().double())
        return torch.stack(losses)

    truth = curve(torch.float64, False)
    assert truth[-10:].mean() < 0.95 * truth[:10].mean()  # it learns
    exact = curve(torch.float64, True)
    # How far two unfused runs come apart for rounding alone, in float32 units of rounding.
    eps = torch.finfo(torch.float32).eps
    drift = (curve(torch.float32, False) - truth).abs().max() / eps
    allowed = 2 * drift + math.sqrt(len(truth)) * truth.max()
    assert (curve(torch.float32, True) - truth).abs().max() <= allowed * eps
    assert (exact - truth).abs().max() <= allowed * torch.finfo(torch.float64).eps


def test_autocast_leaves_float64_and_so_its_complaint_is_of_what_was_given():
    features, labels = torch.randn(1, 4, 8, dtype=torch.float64), torch.zeros(1, 8).long()
    message = r"weight: got float32 of shape \(3, 4\) .*, expected the features' dtype float64"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=message):
        voxfuse.HeadDiceCELoss()(features, torch.randn(3, 4), None, labels)
