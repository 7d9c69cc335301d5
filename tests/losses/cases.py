"""The losses and inputs that their tests share."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

import voxfuse

MODULES = {
    "tversky": lambda **k: voxfuse.TverskyLoss(0.3, 0.7, **k),
    "fbeta": lambda **k: voxfuse.FBetaLoss(2.0, **k),
    "focal tversky": lambda **k: voxfuse.FocalTverskyLoss(**k),
    "dice": lambda **k: voxfuse.DiceLoss(**k),
    "dice squared": lambda **k: voxfuse.DiceLoss(squared=True, **k),
    "jaccard": lambda **k: voxfuse.JaccardLoss(**k),
    "generalised dice": lambda **k: voxfuse.GeneralizedDiceLoss(**k),
    "mcc": lambda **k: voxfuse.MCCLoss(**k),
    "cross-entropy": lambda **k: voxfuse.CrossEntropyLoss(**k),
    "bce": lambda **k: voxfuse.BCELoss(**{n: v for n, v in k.items() if n != "activation"}),
    "focal": lambda **k: voxfuse.FocalLoss(**k),
    "top k": lambda **k: voxfuse.TopKLoss(**k),
    "tversky + ce": lambda **k: voxfuse.TverskyCELoss(0.3, 0.7, **k),
    "dice + ce": lambda **k: voxfuse.DiceCELoss(**k),
    "tversky + focal": lambda **k: voxfuse.TverskyFocalLoss(**k),
    "dice + focal": lambda **k: voxfuse.DiceFocalLoss(**k),
    "unified focal": lambda **k: voxfuse.UnifiedFocalLoss(**k),
    "lovasz": lambda **k: voxfuse.LovaszLoss(**k),
    "hinge": lambda **k: voxfuse.LovaszHingeLoss(
        **{n: v for n, v in k.items() if n != "activation"}
    ),
}
everyone = pytest.mark.parametrize("name", MODULES)


def batch(classes: int = 3, spatial: tuple[int, ...] = (5, 4, 3), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, classes, *spatial, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (2, *spatial), generator=generator)
    return logits.to(dtype), labels


def counts(logits: Tensor, labels: Tensor, weight: Tensor | float = 1.0) -> tuple[Tensor, ...]:
    """TP, FP, FN (B, C) of a softmax in float64."""
    p = logits.double().softmax(1).flatten(2)
    g = F.one_hot(labels.flatten(1), logits.shape[1]).movedim(-1, 1).double()
    w = torch.as_tensor(weight, dtype=torch.float64)
    return tuple((w * x).sum(-1) for x in (p * g, p * (1 - g), (1 - p) * g))


def finite(name: str, logits: Tensor, labels: Tensor, weight: Tensor | None = None, **options):
    """Check that loss and gradient are finite and return them."""
    leaf = logits.clone().requires_grad_()
    loss = MODULES[name](**options)(leaf, labels, weight)
    loss.backward()
    assert bool(loss.isfinite()), f"{name}: {loss}"
    assert bool(leaf.grad.isfinite().all()), name
    return float(loss.detach()), leaf.grad


def module_of(function):
    modules = {name.lower(): getattr(voxfuse, name) for name in voxfuse.losses.__all__}
    return modules[function.replace("_", "").replace("lovaszsoftmax", "lovasz")]


BY_VOXEL = {
    "cross-entropy map": lambda: voxfuse.CrossEntropyLoss(reduction="none"),
    "focal map": lambda: voxfuse.FocalLoss(reduction="none", activation="sigmoid", alpha=0.3),
}
EVERY_LOSS = {
    **MODULES,
    **BY_VOXEL,
    "deep supervision": lambda: voxfuse.DeepSupervisionLoss(voxfuse.DiceCELoss()),
}
every_loss = pytest.mark.parametrize("name", EVERY_LOSS)
