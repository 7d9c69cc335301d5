"""The soft confusion of a linear head: wrapper, fakes, autograd and autocast."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from voxfuse.contract import CORE, FULL, Activation, Overlap
from voxfuse.ops import _checks, _registry
from voxfuse.ops.soft_confusion import (
    check_annotated,
    check_focal_classes,
    check_inputs,
    check_unlabelled,
    options_of,
    validate_range,
)

#: Bytes of logits that may exist at one time, unless the caller says otherwise.
CHUNK_BYTES = 64 << 20


def head_confusion(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    activation: str = "softmax",
    likelihood: str | None = None,
    overlap: str = "product",
    ignore_index: int | None = None,
    gamma: float = 0.0,
    focal_classes: int | None = None,
    full: bool = False,
    annotated: Tensor | None = None,
    unlabelled: str = "exclude",
    chunk_bytes: int = CHUNK_BYTES,
    backend: str = "auto",
) -> Tensor:
    r"""The sums of :func:`voxfuse.soft_confusion` for the logits of a linear head, without them.

    .. math:: z_{bcv} = \sum_k weight_{ck} features_{bkv} + bias_c, \qquad
        result = soft\_confusion(z, target)

    A chunk of logits is computed, reduced and thrown away, in the backward pass once more; the
    (B, C, \*spatial) logits and their gradient never exist. With many classes they are most of the
    memory of training. Products are accumulated in float32 (float64 for float64), and half
    precision logits are not rounded in between.

    Args:
        features: input of the last layer, (B, K, \*spatial), float32, float16, bfloat16 or
            float64; any strides.
        weight: the last layer's weight, (C, K) or as a convolution keeps it (C, K, 1, 1, 1); of
            the features' dtype.
        bias: (C,) or None.
        target: labels or dense target for C classes, see :func:`voxfuse.soft_confusion`.
        mask: mask or voxel weights (B, \*spatial) or (B, 1, \*spatial).
        activation, likelihood, overlap, ignore_index, gamma, focal_classes, full: see
            :func:`voxfuse.soft_confusion`.
        annotated, unlabelled: see :func:`voxfuse.soft_confusion`.
        chunk_bytes: most bytes of logits that exist at one time.
        backend: "auto", "cpp", "triton" or "reference"; see :func:`voxfuse.backends`.

    Returns:
        float64 tensor (B, C, 4), or (B, C, 8) with ``full``. Differentiable in features, weight
        and bias; their gradients do not depend on the number of threads.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices or options do not fit, or (on the CPU) a label is
            outside [0, C) or no integer; the first one is named, and its place. On a GPU such a
            voxel counts as ignored; set ``VOXFUSE_VALIDATE=1`` to check.

    Example:
        >>> import torch, voxfuse
        >>> head = torch.nn.Conv3d(8, 3, 1)
        >>> features, labels = torch.randn(1, 8, 4, 4, 4), torch.randint(0, 3, (1, 4, 4, 4))
        >>> sums = voxfuse.head_confusion(features, head.weight, head.bias, labels)
        >>> torch.allclose(sums, voxfuse.soft_confusion(head(features), labels), rtol=1e-4)
        True
    """
    features = _checks.require_tensor("features", features)
    weight = _checks.require_tensor("weight", weight)
    target = _checks.require_tensor("target", target)
    if bias is not None:
        bias = _checks.require_tensor("bias", bias)
    if mask is not None:
        mask = _checks.require_tensor("mask", mask)
    activation_code = _checks.choice("activation", activation, Activation)
    likelihood_code = (
        activation_code
        if likelihood is None
        else _checks.choice("likelihood", likelihood, Activation)
    )
    overlap_code = _checks.choice("overlap", overlap, Overlap)
    ignore_index = _checks.ignored_label(ignore_index)
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma: got {gamma}, expected a finite number >= 0")
    check_focal_classes(focal_classes)
    weight = check_head(features, weight, bias, target, mask, ignore_index, chunk_bytes)
    unlabelled_code = check_unlabelled(unlabelled, activation_code, likelihood_code)
    if annotated is not None:
        annotated = check_annotated(annotated, features, weight.shape[0], unlabelled_code)
    validate_range(
        features, target, mask, ignore_index, annotated, unlabelled_code, weight.shape[0]
    )
    operators = _registry.namespace_of(backend, features.device)
    try:
        result: Tensor = operators.head_confusion(
            features,
            weight,
            bias,
            target,
            mask,
            activation_code,
            likelihood_code,
            overlap_code,
            ignore_index,
            float(gamma),
            full,
            chunk_bytes,
            focal_classes,
            unlabelled_code,
            annotated,
        )
    except RuntimeError as error:
        _checks.reraise(error, target, ignore_index)
    return result


def check_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    ignore_index: int | None,
    chunk_bytes: int,
) -> Tensor:
    """Raise TypeError or ValueError unless the arguments fit; return the weight as (C, K)."""
    if features.dtype not in _checks.LOGIT_DTYPES:
        raise TypeError(
            f"features: got {_checks.describe(features)}, expected float32, float16, bfloat16 or "
            "float64"
        )
    if features.ndim < 2 or features.shape[1] == 0:
        raise ValueError(
            f"features: got shape {tuple(features.shape)}, expected (B, K, *spatial) with K >= 1"
        )
    channels = features.shape[1]
    if (
        weight.ndim < 2
        or weight.shape[0] == 0
        or weight.shape[1] != channels
        or any(extent != 1 for extent in weight.shape[2:])
    ):
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected (C, {channels}), with C >= 1 and "
            f"possibly further axes of 1, to go with features of shape {tuple(features.shape)}"
        )
    if weight.ndim > 2:
        weight = weight.flatten(1)
    classes = weight.shape[0]
    if bias is not None and tuple(bias.shape) != (classes,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected ({classes},)")
    # Under autocast the operator itself brings the three to one dtype; float64 stays.
    autocast = torch.is_autocast_enabled(features.device.type)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        kept = not autocast or torch.float64 in (tensor.dtype, features.dtype)
        if not tensor.is_floating_point() or (tensor.dtype != features.dtype and kept):
            raise TypeError(
                f"{name}: got {_checks.describe(tensor)}, expected the features' dtype "
                f"{str(features.dtype).removeprefix('torch.')}"
            )
        if tensor.device != features.device:
            raise ValueError(f"{name}: is on {tensor.device}, but features is on {features.device}")
    if not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: got {chunk_bytes!r}, expected an int >= 1")
    logits = features[:, :1].expand(features.shape[0], classes, *features.shape[2:])
    check_inputs(logits, target, mask, ignore_index)
    return weight


def _fake(x: Any) -> Tensor:
    shape = (x.features.shape[0], x.weight.shape[0], FULL if x.full else CORE)
    result: Tensor = x.features.new_empty(shape, dtype=torch.float64)
    return result


def _fake_backward(x: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_bias = x.need_head and x.bias is not None
    return (
        torch.empty_like(x.features) if x.need_features else x.features.new_empty(0),
        x.weight.new_empty(x.weight.shape if x.need_head else 0),
        x.weight.new_empty(x.weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx: Any, x: Any, output: Tensor) -> None:
    ctx.save_for_backward(x.features, x.weight, x.bias, x.target, x.voxel_weight, x.annotated)
    ctx.options = {**options_of(x)._asdict(), "chunk_bytes": x.chunk_bytes}


def _backward(operators: Any, ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    needed = ctx.needs_input_grad[:3]
    *saved, annotated = ctx.saved_tensors
    gradients = operators.head_confusion_backward(
        grad.contiguous(),
        *saved,
        **ctx.options,
        annotated=annotated,
        need_features=needed[0],
        need_head=needed[1] or needed[2],
    )
    named = zip(("features", "weight", "bias"), gradients, needed, strict=True)
    return {name: gradient for name, gradient, need in named if need}


_registry.register("head_confusion", _fake, stem="head_confusion")
_registry.register("head_confusion_backward", _fake_backward, stem="head_confusion")
_registry.register_autograd("head_confusion", _setup_context, _backward)
_registry.register_no_double_backward(
    "head_confusion_backward",
    "second derivatives of the overlap losses are not implemented",
)
# The features and the head: targets and voxel weights keep their dtype.
_registry.register_autocast("head_confusion", 3)
