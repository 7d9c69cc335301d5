"""The hard confusion operator: wrapper and fakes. Integers have no gradient."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from voxfuse.contract import VALUE_ERROR, Activation, Decision
from voxfuse.ops import _checks, _registry
from voxfuse.ops.finalize_slab import check_threshold
from voxfuse.ops.soft_confusion import check_companion, is_dense, validate_labels
from voxfuse.reference.hard_confusion import least_above


def hard_confusion(
    input: Tensor,
    target: Tensor,
    mode: str = "argmax",
    *,
    mask: Tensor | None = None,
    activation: str | None = None,
    threshold: float | None = None,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""True positives, false positives, false negatives and true negatives in one pass.

    With p the prediction and g the target, both 0 or 1, over the voxels v that count, for every
    sample b and class c:

    .. math::
        TP = \sum_v p g, \quad FP = \sum_v p (1-g), \quad FN = \sum_v (1-p) g, \quad
        TN = \sum_v (1-p) (1-g)

    Every overlap metric is a function of these counts; :class:`voxfuse.metrics.SegmentationScores`
    collects and reports them. No argmax, mask or one-hot volume is made.

    Args:
        input: logits (B, C, \*spatial) in float32, float16, bfloat16 or float64; with
            ``mode="labels"`` predicted labels (B, \*spatial) or (B, 1, \*spatial), of the types
            that a target may have.
        target: labels (B, \*spatial) or (B, 1, \*spatial); or, but for ``mode="labels"``, a value
            0 or 1 a class (B, C, \*spatial), where classes may overlap. Of any integer type or
            bool, or integers held in a floating type.
        mode: what is predicted:

            - "argmax": the class with the greatest logit, ties to the lowest class; a NaN is
              greater than all, the first one wins (as ``torch.argmax``);
            - "threshold": every class with ``activation(logit) > threshold``, in float32, strictly
              as nnU-Net compares (MONAI and segmentation-models-pytorch: >=); NaN is not above;
            - "labels": ``input``.
        mask: (B, \*spatial) or (B, 1, \*spatial) of any type; a voxel counts where it is not 0.
        activation: of ``mode="threshold"``: "sigmoid" (None means it) or "none".
        threshold: of ``mode="threshold"``, None means 0.5; compared with the activation's true
            value rounded to float32, on every backend alike:
            :func:`voxfuse.reference.hard_confusion.least_above`.
        num_classes: C; required for ``mode="labels"``.
        ignore_index: voxels with this label do not count; of a dense target, for the classes that
            have it.
        backend: "auto", "cpp", "cuda", "triton" or "reference"; see :func:`voxfuse.backends`.

    Returns:
        int64 tensor (B, C, 4): TP, FP, FN, TN. It has no gradient.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices or options do not fit, or (on the CPU) a label is outside [0, C)
            or no integer, or a dense target neither 0 nor 1; the first one is named, and its place.
            On a GPU such a voxel does not count; set ``VOXFUSE_VALIDATE=1`` to check.

    Example:
        >>> import torch, voxfuse
        >>> logits = torch.tensor([[[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]]])  # 2 classes, 3 voxels
        >>> voxfuse.hard_confusion(logits, torch.tensor([[0, 1, 0]]))
        tensor([[[1, 0, 1, 1],
                 [1, 1, 0, 1]]])
    """
    labels = mode == "labels"
    input = (
        _checks.require_tensor("input", input)
        if labels
        else _checks.require_logits(input, "pass the finest, outputs[0]")
    ).detach()
    target = _checks.require_tensor("target", target).detach()
    if mask is not None:
        mask = _checks.require_tensor("mask", mask).detach()
    decision, least = check_options(mode, activation, threshold, num_classes)
    ignore_index = _checks.ignored_label(ignore_index)
    if labels:
        assert num_classes is not None
        _check_labels(input, target, mask, num_classes)
    else:
        _check_logits(input, target, mask, num_classes, mode)
        num_classes = None
    operators = _registry.namespace_of(backend, input.device)
    _validate(input, target, decision, num_classes, ignore_index)
    arguments = (input, target, mask, decision, least, num_classes, ignore_index)
    try:
        result: Tensor = operators.hard_confusion(*arguments)
    except RuntimeError as error:
        if VALUE_ERROR in str(error):
            _raise_complaint(arguments)
        raise
    return result


def check_options(
    mode: str, activation: str | None, threshold: float | None, num_classes: int | None
) -> tuple[int, float]:
    """Check what needs no tensor; return the mode's number and the least logit above."""
    decision = _checks.choice("mode", mode, Decision)
    _checks.only_with(mode, ("threshold",), activation=activation, threshold=threshold)
    least = 0.0
    if decision == Decision.threshold:
        threshold = 0.5 if threshold is None else threshold
        check_threshold(threshold)
        least = least_above(_activation_of(activation or "sigmoid"), float(threshold))
    if num_classes is None:
        if decision == Decision.labels:
            raise ValueError(
                "num_classes: got None, expected the number of classes with mode 'labels'"
            )
    elif not isinstance(num_classes, int) or isinstance(num_classes, bool):
        raise TypeError(f"num_classes: got {num_classes!r}, expected an int")
    elif num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes}, expected an int >= 1")
    return decision, least


def _raise_complaint(arguments: tuple[Any, ...]) -> None:
    """Raise what the reference has to say about a label: it knows which one, and where."""
    try:
        torch.ops.voxfuse_reference.hard_confusion(*arguments)
    except RuntimeError as error:
        _checks.reraise(error)


def _activation_of(activation: str) -> int:
    code = _checks.choice("activation", activation, Activation)
    if code == Activation.softmax:
        raise ValueError(
            "activation: got 'softmax' with mode 'threshold', expected 'sigmoid' or 'none': a "
            "softmax depends on the logits of all classes; call softmax first"
        )
    return code


def _check_logits(
    input: Tensor, target: Tensor, mask: Tensor | None, num_classes: int | None, mode: str
) -> None:
    if input.dtype not in _checks.LOGIT_DTYPES:
        hint = "; of labels, mode='labels'" if input.dtype in _checks.INTEGER_DTYPES else ""
        raise TypeError(
            f"input: got {_checks.describe(input)}, expected float32, float16, bfloat16 or float64"
            + hint
        )
    if input.ndim < 2 or input.shape[1] == 0:
        raise ValueError(
            f"input: got shape {tuple(input.shape)}, expected (B, C, *spatial) with C >= 1"
        )
    classes = input.shape[1]
    if num_classes is not None and num_classes != classes:
        raise ValueError(f"num_classes: got {num_classes}, but input has {classes} classes")
    if mode == "argmax" and classes == 1:
        raise ValueError(
            f"input: got one class, {tuple(input.shape)}, with mode 'argmax', which always "
            "predicts it; use mode='threshold'"
        )
    check_companion("target", target, input, (1, classes))
    _checks.require_numbers("target", target, 2 if is_dense(input, target) else classes)
    if mask is not None:
        check_companion("mask", mask, input, (1,))
        _checks.require_numbers("mask", mask, 1)


def _check_labels(input: Tensor, target: Tensor, mask: Tensor | None, num_classes: int) -> None:
    if input.ndim < 1:
        raise ValueError(f"input: got shape {tuple(input.shape)}, expected (B, *spatial)")
    shape = _without_channel(input, target)
    for name, tensor in (("target", target), ("mask", mask)):
        if tensor is None:
            continue
        if list(tensor.shape) not in ([input.shape[0], *shape], [input.shape[0], 1, *shape]):
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {(input.shape[0], *shape)} or "
                f"{(input.shape[0], 1, *shape)} to go with input of shape {tuple(input.shape)}"
            )
        if tensor.device != input.device:
            raise ValueError(f"{name}: is on {tensor.device}, but input is on {input.device}")
    _checks.require_numbers("input", input, num_classes)
    _checks.require_numbers("target", target, num_classes)
    if mask is not None:
        _checks.require_numbers("mask", mask, 1)


def _without_channel(input: Tensor, target: Tensor) -> list[int]:
    """The spatial extent of labels whose second axis, of length 1, may be a channel."""
    shape = list(input.shape[1:])
    if input.ndim > 1 and shape[0] == 1 and list(target.shape[1:]) not in (shape, [1, *shape]):
        return shape[1:]
    return shape


def _validate(
    input: Tensor, target: Tensor, decision: int, num_classes: int | None, ignore_index: int | None
) -> None:
    """On a GPU, on demand, the checks that a kernel makes on the CPU."""
    if (
        input.device.type == "cpu"
        or os.environ.get("VOXFUSE_VALIDATE", "0") != "1"
        or torch.compiler.is_compiling()
    ):
        return
    classes = input.shape[1] if num_classes is None else num_classes
    dense = decision != Decision.labels and is_dense(input, target)
    validate_labels(target, 2 if dense else classes, ignore_index)


def _fake(x: Any) -> Tensor:
    classes = x.input.shape[1] if x.num_classes is None else x.num_classes
    result: Tensor = x.input.new_empty((x.input.shape[0], classes, 4), dtype=torch.int64)
    return result


_registry.register("hard_confusion", _fake, stem="hard_confusion", vmap=_registry.fold_into_batch)
