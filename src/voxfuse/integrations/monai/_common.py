"""MONAI's options and the habits that its losses share: warnings, errors, ignored voxels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from voxfuse.integrations.lowering import is_binary, plain, whole_labels
from voxfuse.losses.declared import Declared

CustomActivation = Callable[[Tensor], Tensor]
ClassWeight = Sequence[float] | float | int | Tensor | None


class LossReduction(str, Enum):
    NONE = "none"
    MEAN = "mean"
    SUM = "sum"


class DiceCEReduction(str, Enum):
    MEAN = "mean"
    SUM = "sum"


class Weight(str, Enum):
    SQUARE = "square"
    SIMPLE = "simple"
    UNIFORM = "uniform"


Option = TypeVar("Option", bound=Enum)


def look_up(value: Any, options: type[Option]) -> Option:
    """Return the option called ``value``, surrounding blanks aside."""
    try:
        return options(value.strip() if isinstance(value, str) else value)
    except ValueError:
        allowed = {option.value for option in options}
        raise ValueError(
            f"Unsupported option '{value}', Available options are {allowed}.\n"
        ) from None


def reduction_of(loss: _Loss) -> str:
    if loss.reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"Unsupported reduction: {loss.reduction}, available options are "
            '["mean", "sum", "none"].'
        )
    return str(loss.reduction)


def check_activation(sigmoid: bool, softmax: bool, other_act: CustomActivation | None) -> None:
    if other_act is not None and not callable(other_act):
        raise TypeError(f"other_act must be None or callable but is {type(other_act).__name__}.")
    if int(sigmoid) + int(softmax) + int(other_act is not None) > 1:
        raise ValueError(
            "Incompatible values: more than 1 of [sigmoid=True, softmax=True, other_act is not "
            "None]."
        )


def as_weight(weight: ClassWeight) -> Tensor | None:
    """MONAI's ``torch.as_tensor``, but numbers are not rounded to a half default dtype."""
    if weight is None or isinstance(weight, Tensor):
        return weight
    made = torch.as_tensor(weight)
    if made.dtype in (torch.float16, torch.bfloat16):
        made = torch.as_tensor(weight, dtype=torch.float32)
    return made


def warn_ignored(option: str) -> None:
    warnings.warn(f"single channel prediction, `{option}` ignored.", stacklevel=3)


def as_predictions(input: Tensor) -> Tensor:
    """A plain tensor of a floating dtype."""
    input = plain(input)
    return input if input.is_floating_point() else input.float()


def as_index_labels(target: Tensor) -> Tensor:
    """Labels (B, 1, *spatial), as MONAI's one-hot encoding wants them."""
    if target.ndim < 2:
        target = target.reshape(-1, 1)
    if target.shape[1] != 1:
        raise AssertionError("labels should have a channel with length equal to one.")
    return target


def one_hot(labels: Tensor, classes: int) -> Tensor:
    shape = (labels.shape[0], classes, *labels.shape[2:])
    encoded = torch.zeros(shape, device=labels.device)
    return encoded.scatter_(1, whole_labels(labels), 1)


def ignore_mask(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """(B, 1, *spatial), 1 where a voxel counts; ``target`` as it came in.

    With one value a class, the ignored voxels are those of the class ``ignore_index``, or those
    without any class where ``ignore_index`` is none of them.
    """
    if ignore_index is None:
        return None
    if target.shape[1] == 1:
        return (target != ignore_index).float()
    if 0 <= ignore_index < target.shape[1]:
        ignored = target[:, ignore_index : ignore_index + 1]
        return 1 - (ignored if ignored.is_floating_point() else ignored.float())
    return (target.sum(1, keepdim=True) > 0).float()


def exclusion(
    target: Tensor, labels: bool, ignore_index: int
) -> tuple[Tensor | None, int | None, bool]:
    """Weight and ignore_index for the operator, and whether they express MONAI's mask."""
    if labels:
        return None, ignore_index, True
    if target.shape[1] == 1:
        # The operator truncates a float target: everything below 1 would be 0.
        if ignore_index == 0 and target.is_floating_point():
            return target != 0, None, True
        return None, ignore_index, True
    if 0 <= ignore_index < target.shape[1]:
        ignored = target[:, ignore_index : ignore_index + 1]
        return (ignored == 0, None, True) if is_binary(ignored) else (None, None, False)
    return target.any(1, keepdim=True), None, True


def check_pair(input: Tensor, target: Tensor) -> None:
    """What MONAI's compound losses check first."""
    if input.dim() != target.dim():
        raise ValueError(
            "the number of dimensions for input and target should be the same, "
            f"got shape {input.shape} (nb dims: {len(input.shape)}) and {target.shape} "
            f"(nb dims: {len(target.shape)}). "
            "if target is not one-hot encoded, please provide a tensor with shape B1H[WD]."
        )
    if target.shape[1] != 1 and target.shape[1] != input.shape[1]:
        raise ValueError(
            "number of channels for target is neither 1 (without one-hot encoding) nor the same as "
            f"input, got shape {input.shape} and {target.shape}."
        )


def refuse_others(loss: object, named: Iterable[str]) -> None:
    """Raise TypeError for the first argument of a call that MONAI's losses do not take."""
    for name in named:
        raise TypeError(
            f"{name}: not an argument of the call of {type(loss).__name__}, which takes what "
            "MONAI's does; return_sums= and annotated= are of voxfuse's own losses"
        )


class FusedLoss(Declared, _Loss):
    """A loss of this package; ``_forward`` takes a mask of voxels to blank as well."""

    class_weight: Tensor | None
    _nonnegative: tuple[int, int] | None = None

    def forward(self, input: Tensor, target: Tensor, **others: Any) -> Tensor:
        """Return the loss.

        Args:
            input: B x N x spatial; logits where the loss has an activation, else predictions.
            target: B x N x spatial, or labels B x 1 x spatial with ``to_onehot_y``.
        """
        refuse_others(self, others)
        return self._forward(input, target, None)

    def _forward(self, input: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _takes_mask(self) -> bool:
        """Whether ``_forward`` may get a mask of zeros and ones instead of masked tensors."""
        return False

    def _check_nonnegative(self, weight: Tensor, message: str) -> None:
        """Raise for a negative weight; looks at a weight once, for that may synchronise."""
        if torch.compiler.is_compiling():
            return
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        version = (weight.data_ptr(), weight._version)
        if version != self._nonnegative:
            if bool((weight < 0).any()):
                raise ValueError(message)
            self._nonnegative = version
