"""The losses inside real training: precision, scale, checkpointing, export, FSDP."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import voxfuse
from tests.ranks import launch

#: Every loss of the package.
LOSSES = {
    "tversky": lambda **k: voxfuse.TverskyLoss(0.3, 0.7, **k),
    "fbeta": lambda **k: voxfuse.FBetaLoss(**k),
    "focal tversky": lambda **k: voxfuse.FocalTverskyLoss(**k),
    "dice": lambda **k: voxfuse.DiceLoss(squared=True, **k),
    "jaccard": lambda **k: voxfuse.JaccardLoss(**k),
    "generalised dice": lambda **k: voxfuse.GeneralizedDiceLoss(**k),
    "log dice": lambda **k: voxfuse.DiceLoss(log=True, **k),
    "cross-entropy": lambda **k: voxfuse.CrossEntropyLoss(class_weight=[1.0, 2.0, 3.0], **k),
    "bce": lambda **k: voxfuse.BCELoss(**k),
    "focal": lambda **k: voxfuse.FocalLoss(**k),
    "top k": lambda **k: voxfuse.TopKLoss(20.0, **k),
    "dice + ce": lambda **k: voxfuse.DiceCELoss(**k),
    "tversky + ce": lambda **k: voxfuse.TverskyCELoss(**k),
    "tversky + focal": lambda **k: voxfuse.TverskyFocalLoss(**k),
    "dice + focal": lambda **k: voxfuse.DiceFocalLoss(**k),
    "unified focal": lambda **k: voxfuse.UnifiedFocalLoss(**k),
    "lovasz": lambda **k: voxfuse.LovaszLoss(**k),
    "lovasz hinge": lambda **k: voxfuse.LovaszHingeLoss(**k),
    "deep supervision": lambda **k: voxfuse.DeepSupervisionLoss(voxfuse.DiceCELoss(**k)),
}
#: Those whose sums are pooled over the batch only where asked for.
POOLED = {
    "tversky", "fbeta", "focal tversky", "dice", "jaccard", "generalised dice", "log dice",
    "dice + ce", "tversky + ce", "tversky + focal", "dice + focal", "unified focal",
    "deep supervision",
}  # fmt: skip


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(4, 3, 1)
    )


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 1, size, size, size, generator=generator)
    return image, torch.randint(0, 3, (2, 1, size, size, size), generator=generator)


def gradients(net: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", LOSSES)
def test_activation_checkpointing_gives_the_same_gradients(name):
    loss = LOSSES[name]()
    image, labels = batch()
    plain, recomputed = network(), network()
    loss(plain(image), labels).backward()
    value = checkpoint(lambda x: loss(recomputed(x), labels), image, use_reentrant=False)
    value.backward()
    for a, b in zip(gradients(plain), gradients(recomputed), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_inference_mode_and_no_grad_give_the_value(name):
    loss = LOSSES[name]()
    image, labels = batch()
    net = network()
    expected = loss(net(image), labels)
    with torch.inference_mode():
        torch.testing.assert_close(loss(net(image), labels), expected.detach())
    with torch.no_grad():
        assert not loss(net(image), labels).requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_hands_over_half_logits_and_gets_a_float32_loss(name):
    loss = LOSSES[name]()
    image, labels = batch()
    net = network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net(image)
        value = loss(logits, labels)
    assert logits.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    value.backward()
    truth = loss(logits.detach().double(), labels)
    assert value.item() == pytest.approx(truth.item(), rel=1e-5)


class Trained(torch.nn.Module):
    """A network with its loss inside, as it is exported."""

    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.loss = network(), loss

    def forward(self, image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(self.network(image), labels)


@pytest.mark.parametrize("name", LOSSES)
def test_a_network_with_its_loss_exports_for_any_size(name):
    module = Trained(LOSSES[name]())
    samples, extent = torch.export.Dim("samples", min=1), torch.export.Dim("extent", min=2)
    axes = {0: samples, 2: extent, 3: extent, 4: extent}
    program = torch.export.export(module, batch(), dynamic_shapes=(axes, axes))
    image, labels = batch(9)
    image, labels = image.repeat(3, 1, 1, 1, 1)[:5], labels.repeat(3, 1, 1, 1, 1)[:5]
    torch.testing.assert_close(
        program.module()(image, labels), module(image, labels), rtol=0, atol=0
    )


def test_pure_float16_keeps_its_accuracy_at_256_cubed():
    """Summed in half precision this loss would overflow; the gradient, scaled as a GradScaler
    does, must be the float64 one to a rounding of float16."""
    shape = (1, 2, 256, 256, 256)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).half()
    labels = (torch.rand(1, 1, 256, 256, 256, generator=generator) < 0.01).to(torch.uint8)
    loss = voxfuse.TverskyLoss(0.3, 0.7)
    scale = 2.0**16
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, labels)
    (value * scale).backward()
    exact = logits.double().requires_grad_()
    true_value = loss(exact, labels)
    (true_value * scale).backward()
    assert abs(value.item() - true_value.item()) < 1e-3
    rounding = exact.grad.abs() * 2.0**-10 + 2.0**-24
    assert bool(((leaf.grad.double() - exact.grad).abs() <= rounding).all())


def test_more_elements_than_32_bits_can_index():
    """2^31 + 2^21 half-precision logits that cost no memory: untouched pages read as zero."""
    voxels = 2**30 + 2**20
    with mmap.mmap(-1, 2 * 2 * voxels) as held:
        logits = torch.frombuffer(held, dtype=torch.float16).reshape(1, 2, voxels)
        logits[0, 1, -1] = 4.0  # element 2^31 + 2^21 - 1
        labels = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, 1, voxels)
        sums = voxfuse.soft_confusion(logits, labels)
        p = torch.tensor([0.0, 4.0], dtype=torch.float64).softmax(0)
        expected = torch.tensor([0.5 * (voxels - 1) + p[0], 0.0], dtype=torch.float64)
        torch.testing.assert_close(sums[0, :, 0], expected, rtol=1e-9, atol=0)
        false_positives = 0.5 * (voxels - 1) + p[1]
        torch.testing.assert_close(sums[0, 1, 1], false_positives, rtol=1e-9, atol=0)

        # The gradient of a thin slice at the far end, through strides that reach over all of it.
        far = logits[:, :, -4096:].requires_grad_()
        assert far.stride(1) == voxels
        voxfuse.soft_confusion(far, labels[:, :, -4096:])[0, 1, 1].backward()
        near = logits[:, :, -4096:].detach().clone().requires_grad_()
        voxfuse.soft_confusion(near, labels[:, :, -4096:])[0, 1, 1].backward()
        assert torch.equal(far.grad, near.grad)
        del far, near, logits, sums


def fsdp_equals_one_process(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    image, labels = batch()
    mesh = init_device_mesh("cpu", (world,))
    sharded = network()
    for layer in sharded:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for name, make in LOSSES.items():
        pooled = {"batch": True} if name in POOLED else {}
        reference = network()
        make(**pooled)(reference(image), labels).backward()
        loss = make(process_group="world", ddp_average=True, **pooled)
        sharded.zero_grad()
        loss(sharded(image[rank : rank + 1]), labels[rank : rank + 1]).backward()
        for own, whole in zip(sharded.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(
                own.grad.full_tensor(), whole.grad, rtol=1e-4, atol=1e-6, msg=name
            )


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch is built without gloo"
)
def test_fsdp2_gradients_equal_one_process(tmp_path):
    launch(2, tmp_path, (fsdp_equals_one_process,))


def test_the_lightning_example_learns_in_bf16_mixed_precision():
    pytest.importorskip("lightning", reason="needs the package lightning")
    pytest.importorskip("nibabel", reason="needs the extra demo: nibabel")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    import lightning_bf16

    history = lightning_bf16.main(["--steps", "40"])
    assert len(history) == 40
    assert sum(history[-10:]) < 0.8 * sum(history[:10])
