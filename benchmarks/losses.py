"""The loss benchmarks' inputs, and every implementation of the same Tversky or Dice+CE loss.

A competitor is a function of (logits, labels) that returns a scalar loss. Labels arrive as uint8
(B, 1, *spatial), as a loader hands them over; a competitor that needs another type converts them
inside its call, as a training script would have to.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ALPHA, BETA, SMOOTH = 0.3, 0.7, 1e-5

Loss = Callable[[Tensor, Tensor], Tensor]


def blocky_labels(
    batch: int, classes: int, spatial: Sequence[int], generator: torch.Generator
) -> Tensor:
    """Labels (B, 1, *spatial) in blocks of 8 voxels an axis, about as coherent as anatomy."""
    coarse = [-(-n // 8) for n in spatial]
    labels = torch.randint(
        0, classes, (batch, 1, *coarse), generator=generator, device=generator.device
    ).to(torch.uint8 if classes <= 256 else torch.int16)
    for axis, extent in enumerate(spatial, 2):
        labels = labels.repeat_interleave(8, axis).narrow(axis, 0, extent)
    return labels.contiguous()


def draw(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits that favour blocky labels, made on the device."""
    generator = torch.Generator(device).manual_seed(0)
    batch, classes, *spatial = shape
    labels = blocky_labels(batch, classes, spatial, generator)
    logits = torch.empty(tuple(shape), dtype=dtype, device=device)
    for c, plane in enumerate(logits.unbind(1)):
        plane.normal_(generator=generator).add_((labels[:, 0] == c).to(dtype), alpha=2.0)
    return logits, labels


def value_and_gradient(loss: Loss, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, labels)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def step(loss: Loss, leaf: Tensor, labels: Tensor) -> Callable[[], Any]:
    """A call that computes the loss and its gradient, which it allocates."""

    def call() -> Any:
        leaf.grad = None
        loss(leaf, labels).backward()
        gradient, leaf.grad = leaf.grad, None
        return gradient

    return call


def in_float32(loss: Loss) -> Loss:
    """What autocast does for a loss of half-precision logits."""
    return lambda logits, labels: loss(logits.float(), labels)


def own_loss(backend: str = "auto") -> Any:
    import voxfuse

    return voxfuse.TverskyLoss(
        alpha=ALPHA, beta=BETA, smooth_nr=SMOOTH, smooth_dr=SMOOTH, backend=backend
    )


def plain_one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    """Tversky in plain PyTorch, by one-hot encoding."""
    p = logits.softmax(1)
    g = torch.zeros_like(p).scatter_(1, labels.long(), 1)
    return _tversky(p, g)


def plain_comparison(logits: Tensor, labels: Tensor) -> Tensor:
    """Tversky in plain PyTorch with ``labels == arange(C)``, the form that compiles best."""
    p = logits.softmax(1)
    shape = (1, logits.shape[1]) + (1,) * (logits.ndim - 2)
    index = torch.arange(logits.shape[1], device=logits.device, dtype=labels.dtype).reshape(shape)
    g = (labels == index).to(p.dtype)
    return _tversky(p, g)


def plain_unbind(logits: Tensor, labels: Tensor) -> Tensor:
    """Tversky in plain PyTorch, class by class."""
    p = logits.softmax(1)
    axes = tuple(range(1, logits.ndim - 1))
    total = logits.new_zeros(())
    for c, pc in enumerate(p.unbind(1)):
        g = labels[:, 0] == c
        tp = torch.where(g, pc, 0).sum(axes)
        fp = torch.where(g, 0, pc).sum(axes)
        fn = torch.where(g, 1 - pc, 0).sum(axes)
        total = total + (1 - (tp + SMOOTH) / (tp + ALPHA * fp + BETA * fn + SMOOTH)).mean()
    return total / logits.shape[1]


def _tversky(p: Tensor, g: Tensor) -> Tensor:
    axes = tuple(range(2, p.ndim))
    tp = (p * g).sum(axes)
    fp = (p * (1 - g)).sum(axes)
    fn = ((1 - p) * g).sum(axes)
    return (1 - (tp + SMOOTH) / (tp + ALPHA * fp + BETA * fn + SMOOTH)).mean()


def tversky_peers(
    wanted: set[str],
    forms: Sequence[str] = ("one-hot", "comparison", "unbind", "nnunet"),
    **options: Any,
) -> tuple[dict[str, Loss], dict[str, str]]:
    """The peers' Tversky losses, and why a wanted one is missing.

    Args:
        wanted: of "reference", "monai", "nnunet", "exacta" and "compile".
        forms: what is compiled: plain PyTorch in one of its forms, or nnU-Net's Dice.
        options: of ``torch.compile``.
    """
    eager = {"one-hot": plain_one_hot, "comparison": plain_comparison, "unbind": plain_unbind}
    found: dict[str, Loss] = {}
    missing: dict[str, str] = {}
    if "reference" in wanted:
        found["plain"] = plain_one_hot
    if importlib.util.find_spec("monai") is None:
        missing["monai"] = "the package monai is not installed"
    elif "monai" in wanted:
        from monai.losses import TverskyLoss

        found["monai"] = TverskyLoss(
            softmax=True, to_onehot_y=True, alpha=ALPHA, beta=BETA, smooth_nr=SMOOTH,
            smooth_dr=SMOOTH,
        )  # fmt: skip
    if "exacta" in wanted:
        if importlib.util.find_spec("exacta") is None:
            missing["exacta"] = "the package exacta is not installed"
        else:
            found["exacta"] = _exacta_tversky()
    if importlib.util.find_spec("nnunetv2") is None:
        missing["nnunet"] = "the package nnunetv2 is not installed"
    else:
        eager["nnunet"] = _nnunet_dice()
        if "nnunet" in wanted:
            found["nnunet"] = eager["nnunet"]
    if "compile" in wanted:
        torch._dynamo.config.cache_size_limit = 64
        for form in (form for form in forms if form in eager):
            found[f"compile-{form}"] = torch.compile(in_float32(eager[form]), **options)
    else:
        missing["compile"] = "not asked for"
    return found, missing


def _exacta_tversky() -> Loss:
    """exacta's Tversky loss: Triton on a GPU, PyTorch on the CPU. Its labels have no channel."""
    from exacta.losses import TverskyLoss

    loss = TverskyLoss(alpha=ALPHA, beta=BETA, smooth=SMOOTH)
    return lambda logits, labels: loss(logits, labels[:, 0])


def _nnunet_dice() -> Loss:
    """nnU-Net's memory-efficient soft Dice (alpha = beta = 1/2: the same sums to read)."""
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    from nnunetv2.utilities.helpers import softmax_helper_dim1

    loss: Loss = MemoryEfficientSoftDiceLoss(
        apply_nonlin=softmax_helper_dim1, batch_dice=False, do_bg=True, smooth=SMOOTH, ddp=False
    )
    return loss


def compound_competitors(wanted: set[str]) -> tuple[dict[str, Loss], dict[str, str]]:
    """Return the competitors for Dice + cross-entropy."""
    import voxfuse

    found: dict[str, Loss] = {"voxfuse DiceCE": voxfuse.DiceCELoss()}
    missing: dict[str, str] = {}
    if "monai" in wanted:
        if importlib.util.find_spec("monai") is None:
            missing["monai"] = "the package monai is not installed"
        else:
            from monai.losses import DiceCELoss

            found["monai DiceCE"] = DiceCELoss(softmax=True, to_onehot_y=True)
    return found, missing


def is_tversky(name: str) -> bool:
    """Whether competitor ``name`` computes the Tversky loss itself (and not nnU-Net's Dice)."""
    return "nnunet" not in name
