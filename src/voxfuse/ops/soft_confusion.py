"""The soft confusion operator: wrapper, fakes and autograd."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from voxfuse.contract import CORE, FULL, Activation, ConfusionOptions, Overlap, Unlabelled
from voxfuse.ops import _checks, _registry
from voxfuse.reference import soft_confusion as reference
from voxfuse.reference.soft_confusion import is_dense as is_dense


def soft_confusion(
    input: Tensor,
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
    backend: str = "auto",
) -> Tensor:
    r"""Soft true positives, false positives, false negatives and log-likelihood in one pass.

    With p the prediction after ``activation``, r the probability after ``likelihood`` (the same
    activation unless given), g the target and w the mask or voxel weight, for every sample b and
    class c:

    .. math::
        TP = \sum_v w p g, \quad FP = \sum_v w p (1-g), \quad FN = \sum_v w (1-p) g, \quad
        NLL = \sum_v w g (1-r)^\gamma (-\log r)

    and with ``full`` also OFF (:math:`\sum w (1-g)(-\log r)` for a softmax likelihood, else
    :math:`\sum w (1-g) r^\gamma (-\log(1-r))`), P2 = :math:`\sum w p^2`,
    G2 = :math:`\sum w g^2` and W = :math:`\sum w`. Every overlap loss is a function of these sums
    (Salehi et al. 2017, arXiv 1706.05721; Hashemi et al. 2018, arXiv 1803.11078).

    With ``annotated``, U are the classes of a sample that are not annotated in it. Their sums are
    0 there, and with ``unlabelled``

    - "exclude" they leave the sample: :math:`p_u = 0`, and the softmax is over the others. Their
      logits are not read and get a gradient of exactly 0. A voxel with one of their labels is left
      out as if ignored; of a dense target their values are not read, and the voxel stays. With a
      sigmoid this is the loss of Ulrich et al. 2023 (MultiTalent, arXiv 2303.14444).
    - "background" they count as class 0: :math:`p'_0 = p_0 + \sum_{u \in U} p_u` and
      :math:`g'_0 = g_0 + \sum_{u \in U} g_u`, so that a label of theirs is background. A
      logit's gradient is :math:`dL/dz_u = p_u (h_0 - \sum_k p'_k h_k)` with
      :math:`h = dL/dp'`, the background's times its share of :math:`p'_0`. This is the
      marginal loss of Shi et al. 2021 (arXiv 2007.03868), and the target adaptive loss of Fang and
      Yan 2020 (PIPO-FAN, arXiv 2001.00208). (The exclusion loss of Shi et al. is another thing, a
      penalty on the overlap of U with the labels.)

    Args:
        input: logits, or probabilities with ``activation="none"``: (B, C, \*spatial) with any
            number of spatial axes; float32, float16, bfloat16 or float64; any strides.
        target: labels (B, \*spatial) or (B, 1, \*spatial), or dense (B, C, \*spatial); bool, any
            integer or floating type, read as it is. Labels of a floating type that cannot tell the
            classes apart (float16 beyond 2049, bfloat16 beyond 257) are an error. With C = 1 the
            target is the foreground indicator. Dense values lie in [0, 1], give or take 0.001.
        mask: mask or voxel weights (B, \*spatial) or (B, 1, \*spatial), of any of these types; a
            number, so that a mask of 0 and 255 weighs 255. A voxel of weight 0 contributes exactly
            0, even if its logits are NaN.
        activation: "softmax", "sigmoid" or "none".
        likelihood: activation behind NLL and OFF; None means the same as ``activation``.
        overlap: "product" (p g), or "min" (min(p, g) in place of p g).
        ignore_index: voxels with this label are left out.
        gamma: focal modulation of the log-likelihood, >= 0.
        focal_classes: how many classes, from the first on, gamma applies to; for the others it is
            0. None: all. 1 modulates the background alone (Yeung et al. 2022, arXiv 2102.04525).
        full: also return OFF, P2, G2 and W.
        annotated: which classes are annotated in which sample, bool (B, C); None: all.
        unlabelled: "exclude" the others (of a sample at least one is annotated), or count them as
            "background" (class 0, which is annotated; softmax only).
        backend: "auto", "cpp", "cuda", "triton" or "reference"; see :func:`voxfuse.backends`.

    Returns:
        float64 tensor (B, C, 4), or (B, C, 8) with ``full``. Differentiable in ``input``; nothing
        volume-sized is kept for the backward pass but ``input`` and ``target`` themselves.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices or options do not fit, or (on the CPU) a label is
            outside [0, C) or no integer, or a dense value outside [0, 1]; the first one that counts
            is named, and its place. On a GPU such a label counts as ignored, and such a value as
            what it is; set ``VOXFUSE_VALIDATE=1`` to check. A label is ignored for a sample
            that lacks the annotated class it needs: on a GPU it contributes 0 with "exclude", and
            its class 0 counts as annotated with "background".

    Example:
        >>> import torch, voxfuse
        >>> logits = torch.tensor([[[2.0, -1.0], [0.0, 3.0]]])  # 1 sample, 2 classes, 2 voxels
        >>> labels = torch.tensor([[0, 1]])
        >>> voxfuse.soft_confusion(logits, labels)[0, 1, :3].round(decimals=4)  # TP, FP, FN
        tensor([0.9820, 0.1192, 0.0180], dtype=torch.float64)

        Without class 2, softmax is over the first two; as background it would add to class 0:

        >>> logits, labels = torch.zeros(1, 3, 1), torch.zeros(1, 1, dtype=torch.long)
        >>> partial = {"annotated": torch.tensor([[True, True, False]])}
        >>> for unlabelled in ("exclude", "background"):
        ...     sums = voxfuse.soft_confusion(logits, labels, unlabelled=unlabelled, **partial)
        ...     print(sums[0, 0, 0].round(decimals=4))  # TP of the background
        tensor(0.5000, dtype=torch.float64)
        tensor(0.6667, dtype=torch.float64)
    """
    input = _checks.require_logits(input)
    target = _checks.require_tensor("target", target)
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
    check_inputs(input, target, mask, ignore_index)
    unlabelled_code = check_unlabelled(unlabelled, activation_code, likelihood_code)
    if annotated is not None:
        annotated = check_annotated(annotated, input, input.shape[1], unlabelled_code)
    validate_range(input, target, mask, ignore_index, annotated, unlabelled_code)
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma: got {gamma}, expected a finite number >= 0")
    check_focal_classes(focal_classes)
    operators = _registry.namespace_of(backend, input.device)
    try:
        result: Tensor = operators.soft_confusion(
            input,
            target,
            mask,
            activation_code,
            likelihood_code,
            overlap_code,
            ignore_index,
            float(gamma),
            full,
            focal_classes,
            unlabelled_code,
            annotated,
        )
    except RuntimeError as error:
        _checks.reraise(error, target, ignore_index)
    return result


def check_focal_classes(focal_classes: int | None) -> None:
    if focal_classes is None:
        return
    if not isinstance(focal_classes, int) or isinstance(focal_classes, bool):
        raise TypeError(f"focal_classes: got {focal_classes!r}, expected an int or None")
    if focal_classes < 0:
        raise ValueError(f"focal_classes: got {focal_classes}, expected an int >= 0 or None")


def check_unlabelled(unlabelled: str, *activations: int) -> int:
    """The code of ``unlabelled``; classes are merged only where a softmax gives them a sum of 1."""
    code = _checks.choice("unlabelled", unlabelled, Unlabelled)
    if code == Unlabelled.background and any(x != Activation.softmax for x in activations):
        raise ValueError(
            "unlabelled: got 'background', which needs a softmax; with another activation the "
            "classes do not know of each other, and 'exclude' leaves out those not annotated"
        )
    return code


def check_annotated(annotated: object, input: Tensor, classes: int, unlabelled: int) -> Tensor:
    """Return ``annotated`` (B, C) if it fits the samples of ``input``, else raise."""
    annotated = _checks.require_tensor("annotated", annotated)
    if annotated.dtype != torch.bool:
        raise TypeError(f"annotated: got {_checks.describe(annotated)}, expected bool")
    shape = (input.shape[0], classes)
    if tuple(annotated.shape) != shape:
        raise ValueError(
            f"annotated: got shape {tuple(annotated.shape)}, expected (B, C) = {shape}, whether "
            "a class is annotated in a sample"
        )
    if annotated.device != input.device:
        raise ValueError(f"annotated: is on {annotated.device}, but input is on {input.device}")
    if _validates(input):
        complaint = reference.annotated_complaint(annotated, unlabelled)
        if complaint is not None:
            raise ValueError(complaint)
    return annotated


def _validates(input: Tensor) -> bool:
    """Whether values are to be looked at that only a CPU looks at by itself."""
    return (
        input.device.type != "cpu"
        and os.environ.get("VOXFUSE_VALIDATE", "0") == "1"
        and not torch.compiler.is_compiling()
    )


def check_inputs(
    input: Tensor, target: Tensor, mask: Tensor | None, ignore_index: int | None
) -> None:
    """Raise TypeError or ValueError unless the arguments fit together."""
    if input.dtype not in _checks.LOGIT_DTYPES:
        raise TypeError(
            f"input: got {_checks.describe(input)}, expected float32, float16, bfloat16 or float64"
        )
    if input.ndim < 2 or input.shape[1] == 0:
        raise ValueError(
            f"input: got shape {tuple(input.shape)}, expected (B, C, *spatial) with C >= 1"
        )
    classes = input.shape[1]
    check_companion("target", target, input, (1, classes))
    if target.requires_grad:
        raise ValueError("target: requires grad, but no gradient flows to the target; detach it")
    dense = is_dense(input, target)
    _checks.require_numbers("target", target, 0 if dense else classes)
    ignore_index = _checks.ignored_label(ignore_index)
    if ignore_index is not None:
        if not -(2**63) <= ignore_index < 2**63:
            raise ValueError(f"ignore_index: got {ignore_index}, expected an int of 64 bits")
        if dense and classes > 1:
            raise ValueError(
                f"ignore_index: got {ignore_index} with a dense target {tuple(target.shape)}; it "
                "needs labels. Pass the mask of valid voxels as mask= instead"
            )
    if mask is not None:
        check_companion("mask", mask, input, (1,))
        _checks.require_numbers("mask", mask)
        if mask.requires_grad:
            raise ValueError("mask: requires grad, but no gradient flows to it; detach it")
    if _validates(input):
        if not dense:
            validate_labels(target, classes, ignore_index)
        elif classes == 1 and not target.is_floating_point():
            validate_labels(target, 2, ignore_index)


def check_companion(name: str, tensor: Tensor, input: Tensor, channels: tuple[int, ...]) -> None:
    """``tensor`` must be (B, *spatial), or (B, k, *spatial) with k in ``channels``."""
    batch, _, *spatial = input.shape
    shape = list(tensor.shape)
    fits = shape == [batch, *spatial] or any(shape == [batch, k, *spatial] for k in channels)
    if not fits:
        forms = [(batch, *spatial)] + [(batch, k, *spatial) for k in dict.fromkeys(channels)]
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected "
            + " or ".join(str(form) for form in forms)
            + f" to go with input of shape {tuple(input.shape)}"
            + (_hint(shape, input) if name == "target" else "")
        )
    if tensor.device != input.device:
        raise ValueError(f"{name}: is on {tensor.device}, but input is on {input.device}")


def _hint(shape: list[int], input: Tensor) -> str:
    """What ``input`` looks like beside a companion of ``shape``, if it is known."""
    if input.ndim < 4:
        return ""
    batch, outputs, classes, *spatial = input.shape
    if shape not in ([batch, *spatial], [batch, 1, *spatial]):
        return ""
    return (
        f". The input looks like a stack (B, S, C, *spatial) of {outputs} outputs with {classes} "
        "classes, as MONAI's DynUNet returns its deep supervision: call "
        "voxfuse.DeepSupervisionLoss, or the loss of each of input.unbind(1)"
    )


def validate_labels(target: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raise ValueError if a label is no class. Synchronises with the device."""
    complaint = reference.label_complaint(target, classes, ignore_index)
    if complaint is not None:
        raise ValueError(complaint)


def validate_range(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    ignore_index: int | None,
    annotated: Tensor | None = None,
    unlabelled: int = Unlabelled.exclude,
    classes: int | None = None,
) -> None:
    """On a GPU, on demand, the check of a dense target's values that a kernel makes on the CPU."""
    if _validates(input) and is_dense(input, target, classes):
        rest = (mask, ignore_index, annotated, unlabelled)
        require_range(target, classes or input.shape[1], *rest)


def require_range(
    target: Tensor, classes: int, mask: Tensor | None, ignore_index: int | None, *rest: Any
) -> None:
    """Raise ValueError if a dense value that counts is outside [0, 1]."""
    complaint = reference.range_complaint(target, classes, mask, ignore_index, *rest)
    if complaint is not None:
        raise ValueError(complaint + _checks.range_hint(target, ignore_index))


def _fake(x: Any) -> Tensor:
    shape = (x.input.shape[0], x.input.shape[1], FULL if x.full else CORE)
    result: Tensor = x.input.new_empty(shape, dtype=torch.float64)
    return result


def _fake_backward(x: Any) -> Tensor:
    return torch.empty_like(x.input)


def options_of(x: Any) -> ConfusionOptions:
    """The options among the arguments of an operator."""
    return ConfusionOptions(*(getattr(x, name) for name in ConfusionOptions._fields))


def _setup_context(ctx: Any, x: Any, output: Tensor) -> None:
    ctx.save_for_backward(x.input, x.target, x.weight, x.annotated)
    ctx.options = options_of(x)


def _backward(operators: Any, ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    if not ctx.needs_input_grad[0]:
        return {}
    *saved, annotated = ctx.saved_tensors
    gradient = operators.soft_confusion_backward(
        grad.contiguous(), *saved, *ctx.options, annotated=annotated
    )
    return {"input": gradient}


_registry.register("soft_confusion", _fake, stem="soft_confusion", vmap=_registry.fold_into_batch)
_registry.register(
    "soft_confusion_backward",
    _fake_backward,
    stem="soft_confusion",
    vmap=_registry.fold_into_batch,
)
_registry.register_autograd("soft_confusion", _setup_context, _backward)
_registry.register_no_double_backward(
    "soft_confusion_backward",
    "second derivatives of the overlap losses are not implemented",
)
