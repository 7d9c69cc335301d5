"""Argument checks shared by the operators' wrappers: one place, one wording."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from voxfuse.contract import VALUE_ERROR, Code
from voxfuse.reference.soft_confusion import outside

LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
)
#: What labels, dense targets, weights and masks may be: every real type that PyTorch computes with.
NUMBER_DTYPES = (*INTEGER_DTYPES, *LOGIT_DTYPES)


def plain(tensor: Tensor) -> Tensor:
    """Strip a ``__torch_function__`` subclass such as MONAI's MetaTensor, keeping the graph.

    Such a subclass triples the cost of every dispatch. Subclasses that work below dispatch
    (FakeTensor, DTensor) and parameters are left alone.
    """
    kind = type(tensor)
    if (
        kind is Tensor
        or kind is torch.nn.Parameter
        or kind.__torch_function__ is torch._C._disabled_torch_function_impl
        or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    ):
        return tensor
    return tensor.as_subclass(Tensor)


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device of a tensor, for error messages; of what is planned no device."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    where = "" if tensor.is_meta else f" on {tensor.device}"
    return f"{dtype} of shape {tuple(tensor.shape)}{where}"


def given(value: object) -> str:
    """An option as it was given, for error messages, which never show what a tensor holds."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def require_tensor(name: str, value: object) -> Tensor:
    """Return ``value`` as a plain tensor or raise TypeError."""
    if not isinstance(value, Tensor):
        more = "; use torch.from_numpy" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}{more}")
    refuse_forward_mode(value)
    return plain(value)


def require_numbers(name: str, tensor: Tensor, classes: int = 0) -> None:
    """Raise TypeError unless the kernels read elements of this type, and as labels of so many
    classes exactly: an integer type cannot hold a wrong one."""
    if tensor.dtype not in NUMBER_DTYPES:
        listed = ", ".join(str(dtype).removeprefix("torch.") for dtype in NUMBER_DTYPES)
        raise TypeError(f"{name}: got {describe(tensor)}, expected {listed}")
    if tensor.is_floating_point():
        most = int(2 / torch.finfo(tensor.dtype).eps)
        if classes > most + 1:
            raise TypeError(
                f"{name}: got {describe(tensor)}, which holds integers up to {most} only, for "
                f"{classes} classes; use an integer type"
            )


def require_logits(input: object, advice: str = "call voxfuse.DeepSupervisionLoss") -> Tensor:
    """``input`` as a plain tensor; a list of them is what a deeply supervised network returns."""
    if isinstance(input, (list, tuple)):
        raise TypeError(
            f"input: expected a torch.Tensor, got a {type(input).__name__} of {len(input)}; for "
            f"the outputs of a deeply supervised network {advice}"
        )
    return require_tensor("input", input)


FORWARD_MODE = (
    "voxfuse: forward-mode derivatives (torch.func.jvp, dual numbers) are not implemented; use "
    "torch.func.grad or torch.autograd"
)


def refuse_forward_mode(tensor: Tensor) -> None:
    """Raise if ``tensor`` carries a tangent, which an operator would drop as if it were 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError(FORWARD_MODE)


def choice(name: str, value: str, allowed: type[Code] | Mapping[str, int]) -> int:
    """Translate an option's name to the number that travels through the schema."""
    try:
        return int(allowed[value])
    except (KeyError, TypeError):
        names = allowed.__members__ if isinstance(allowed, type) else allowed
        listed = ", ".join(repr(key) for key in names)
        raise ValueError(f"{name}: got {given(value)}, expected one of {listed}") from None


def only_with(mode: str, modes: Sequence[str], **options: object) -> None:
    """Raise for an option that has no effect in ``mode``; None is one that was not given."""
    for name, value in options.items():
        if value is not None and mode not in modes:
            listed = " and ".join(repr(x) for x in modes)
            raise ValueError(
                f"{name}: got {given(value)} with mode {mode!r}, expected None; it is of {listed}"
            )


def ignored_label(value: object) -> int | None:
    """``ignore_index`` as an operator takes it; NumPy's integers are integers too."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"ignore_index: got {given(value)}, expected an int or None")
    return int(value)


def integers(name: str, values: Sequence[Any]) -> tuple[int, ...]:
    """Return ``values`` as integers; booleans, and what would have to be rounded, are errors."""
    try:
        items = tuple(values)
    except TypeError:
        raise TypeError(f"{name}: got {values!r}, expected a sequence of integers") from None
    try:
        if not any(isinstance(value, bool) for value in items):
            return tuple(operator.index(value) for value in items)
    except TypeError:
        pass
    raise TypeError(f"{name}: got {values!r}, expected integers")


def require_held(name: str, value: float, dtype: torch.dtype) -> None:
    """Raise unless ``dtype`` holds ``value``: whole and in range for integers, no overflow."""
    if dtype.is_floating_point:
        most = torch.finfo(dtype).max
        if not math.isfinite(value) or abs(value) <= most:
            return
        expected = f"a number of at most {most:g} in size"
    else:
        low, high = (0, 1) if dtype == torch.bool else _range(dtype)
        if low <= value <= high and float(value).is_integer():
            return
        expected = f"an integer from {low} to {high}"
    given = str(dtype).removeprefix("torch.")
    raise ValueError(f"{name}: got {value}, expected {expected}, for {given}")


def _range(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max


def _not_held(ignore_index: int | None, dtype: torch.dtype) -> str:
    """What to add to a complaint about a label, if none of this type can be the ignored one."""
    if ignore_index is None:
        return ""
    if dtype.is_floating_point:
        held = torch.tensor(ignore_index, dtype=torch.float64).to(dtype).item() == ignore_index
    else:
        low, high = (0, 1) if dtype == torch.bool else _range(dtype)
        held = low <= ignore_index <= high
    name = str(dtype).removeprefix("torch.")
    return "" if held else f"; {name} labels cannot hold ignore_index {ignore_index}"


def range_hint(target: Tensor, ignore_index: int | None) -> str:
    """What to add to a complaint about a dense target's value, from all values outside [0, 1]."""
    values = target.detach().to(torch.float64)
    values = values[outside(values)]
    if ignore_index is not None:
        values = values[values != ignore_index]
    if not values.numel():
        return ""
    low, high = float(values.min()), float(values.max())
    if low == high and low.is_integer():
        hint = (
            f"; if {low:g} marks voxels to ignore, pass ignore_index={low:g} (one class) or a mask"
        )
        return hint + ("; if it is the foreground, divide by it" if low > 0 else "")
    if low >= -0.5 and high <= 1.5:
        return "; if it was interpolated, clamp it to [0, 1]"
    if low >= 0 and bool((values == values.round()).all()):
        return "; labels need an input with a channel for every class, and a grey image a division"
    return "; if these are logits, input and target have changed places"


def reraise(
    error: RuntimeError, target: Tensor | None = None, ignore_index: int | None = None
) -> NoReturn:
    """Raise a kernel's complaint about a value in the data as the ValueError it is."""
    _, tag, message = str(error).partition(VALUE_ERROR)
    if tag:
        message = message.split("\n")[0]
        if target is not None and message.startswith("target: label"):
            message += _not_held(ignore_index, target.dtype)
        if target is not None and message.startswith("target: value"):
            message += range_hint(target, ignore_index)
        raise ValueError(message) from None
    raise error
