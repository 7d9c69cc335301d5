"""Options that losses share, and their validation.

What they mean is said once, in :class:`voxfuse.TverskyLoss`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from voxfuse.contract import Activation, Code, Reduction
from voxfuse.ops import _checks, _registry

ClassWeights = Tensor | Sequence[float] | Sequence[Sequence[float]] | float | None

#: Weights of the classes that a loss may have; buffers of the modules.
WEIGHT_NAMES = ("class_weight", "likelihood_weight", "pos_weight")


#: MONAI's arguments that have another name here: ours, one of which a loss may have, or what to do.
MONAI_NAMES: dict[str, tuple[str, ...] | str] = {
    "sigmoid": "activation='sigmoid' here",
    "softmax": "activation='softmax' here, the default",
    "use_softmax": "activation='softmax' here, the default",
    "other_act": "activation='none' here, and the function applied before the call",
    "to_onehot_y": "not needed: labels are read as they are, a dense target by its shape",
    "squared_pred": ("squared",),
    "jaccard": "voxfuse.JaccardLoss here, and in a compound a Tversky term with alpha = beta = 1",
    "soft_label": "overlap='min' here",
    "w_type": ("class_pooling",),
    "lambda_dice": ("lambda_tversky",),
    "gamma": ("focal_gamma",),
    "alpha": ("focal_alpha",),
}


#: Those of them that a loss with no option of that meaning does not have.
ELSEWHERE = {
    "w_type": "class_pooling= of voxfuse.GeneralizedDiceLoss",
    "gamma": "an option of voxfuse.FocalLoss and voxfuse.TverskyLoss",
    "alpha": "an option of voxfuse.FocalLoss and voxfuse.TverskyLoss",
}


def monai_hint(name: str, options: Container[str]) -> str | None:
    """What MONAI's argument ``name`` is called in a loss of ours with these ``options``."""
    if name == "weight":
        voxels = "; weights of voxels are mask= in the call"
        if "likelihood_weight" not in options:
            return "weights of the classes are class_weight=" + voxels
        return (
            "MONAI's one weight is two here: class_weight= in the overlap term (without the "
            "background's where include_background=False) and likelihood_weight= in the likelihood"
            + voxels
        )
    ours = MONAI_NAMES.get(name, ())
    if isinstance(ours, tuple):
        ours = "".join(f"{x}= here" for x in ours if x in options) or ELSEWHERE.get(name, "")
    return f"MONAI's {name} is {ours}" if ours else None


def refuse_arguments(loss: object, named: Iterable[str]) -> None:
    """Raise TypeError for the first of what the call of a loss does not take."""
    for name in named:
        hint = ""
        if name in ("weight", "voxel_weight"):
            hint = "; weights of voxels are mask=, weights of classes an option of the loss"
        raise TypeError(f"{name}: not an argument of the call of {type(loss).__name__}{hint}")


def weights_of(name: str, given: ClassWeights) -> Tensor | None:
    """The weights ``given`` as a tensor.

    Raises:
        ValueError: one is negative or not finite. On the CPU: looking elsewhere would wait.
    """
    if given is None:
        return None
    weights = given
    if not isinstance(weights, Tensor):
        weights = torch.as_tensor(weights, dtype=torch.float64)
    traced = torch.compiler.is_compiling() or _registry.functorch_active()
    values = weights if traced else _checks.plain(weights).detach()
    if traced or type(values) is not Tensor or values.device.type != "cpu":
        return weights
    values = values.to(torch.float64)
    fits = (values >= 0) & (values < math.inf)
    if not bool(fits.all()):
        wrong = values[~fits][0].item()
        raise ValueError(f"{name}: got {wrong:g}, expected finite numbers >= 0")
    return weights


@dataclass(kw_only=True, eq=False, repr=False)
class OverlapOptions:
    """Of every loss with a ratio of sums."""

    activation: str = "softmax"
    include_background: bool = True
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    batch: bool = False
    reduction: str = "mean"
    ignore_index: int | None = None
    absent: str = "keep"
    log: bool = False
    overlap: str = "product"
    unlabelled: str = "exclude"


class LikelihoodOptions(NamedTuple):
    """``scale`` times a cross-entropy or focal loss, as validated by :func:`likelihood_options`.

    A mean is over the voxels, each with its class's weight ("weighted", PyTorch's cross-entropy),
    over the "voxels", or over the "elements" (voxels x classes, MONAI's focal loss). A sigmoid
    likelihood has a term for every element, so its mean is always over the elements.
    """

    activation: int
    scale: float
    gamma: float
    alpha: float | tuple[float, ...] | None
    label_smoothing: float
    include_background: bool
    reduction: int
    mean: str = "weighted"
    top_percent: float | None = None
    focal_classes: int | None = None


def likelihood_options(
    activation: str,
    *,
    scale: float = 1.0,
    gamma: float = 0.0,
    alpha: float | Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    include_background: bool = True,
    reduction: str = "mean",
    mean: str = "weighted",
    top_percent: float | None = None,
    focal_classes: int | None = None,
) -> LikelihoodOptions:
    code = _checks.choice("activation", activation, Activation)
    if label_smoothing and code != Activation.softmax:
        raise ValueError(
            "label_smoothing: needs a softmax cross-entropy; with a sigmoid pass the smoothed "
            "target g (1 - s) + s/2, dense"
        )
    return LikelihoodOptions(
        code,
        scale,
        number("gamma", gamma, 0.0),
        _balance(alpha, code),
        number("label_smoothing", label_smoothing, 0.0, 1.0),
        bool(include_background),
        reduction_code(reduction, allow_none=top_percent is None),
        mean,
        top_percent,
        focal_classes,
    )


def _balance(
    alpha: float | Sequence[float] | None, activation: int
) -> float | tuple[float, ...] | None:
    """One number in [0, 1], or (not for a sigmoid) one >= 0 for every class."""
    if alpha is None:
        return None
    refuse_gradients("alpha", alpha)
    values = alpha.tolist() if isinstance(alpha, (Tensor, np.ndarray)) else alpha
    if not isinstance(values, Sequence) or isinstance(values, str):
        return number("alpha", values, 0.0, 1.0)
    if activation == Activation.sigmoid:
        raise ValueError(
            f"alpha: got {list(values)}, expected one number in [0, 1]; one for every class needs "
            "a softmax"
        )
    return tuple(number("alpha", value) for value in values)


def refuse_gradients(name: str, value: object) -> None:
    """Raise for a number that is to be learnt: it becomes an argument of a kernel."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name}: requires grad, but no gradient flows to it; detach it")


def check_flag(name: str, value: object, default: object) -> None:
    """Raise for what is neither True nor False, where the ``default`` is; "no" would be True."""
    optional = name == "likelihood_include_background"
    if not (isinstance(default, bool) or optional) or isinstance(value, (bool, np.bool_)):
        return
    if not (optional and value is None):
        raise TypeError(f"{name}: got {_checks.given(value)}, expected True or False")


def held(name: str, value: Any, default: Any) -> Any:
    """``value`` as a number or a tuple, which no later change of what was given changes."""
    if isinstance(value, (list, tuple)):
        return tuple(held(name, item, default) for item in value)
    refuse_gradients(name, value)
    if not isinstance(value, (Tensor, np.ndarray)):
        return value
    one = isinstance(default, (int, float))
    if value.ndim == 0 or (one and math.prod(value.shape) == 1):
        return value.item()
    return value if one or value.ndim > 1 else tuple(value.tolist())


def number(
    name: str, value: float, low: float = 0.0, high: float = math.inf, *, above: bool = False
) -> float:
    """Return ``value`` as a float in [low, high], or ``above`` low; else raise naming it."""
    refuse_gradients(name, value)
    try:
        several = isinstance(value, Tensor) and value.numel() != 1
        if several or isinstance(value, (bool, np.bool_)):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {_checks.given(value)}, expected a number") from None
    if not (low <= result <= high and math.isfinite(result)) or (above and result == low):
        allowed = f"{'>' if above else '>='} {low:g}"
        if high != math.inf:
            allowed = f"in {'(' if above else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name}: got {value}, expected a finite number {allowed}")
    return result


def exponent(name: str, value: float) -> float:
    return number(name, value, above=True)


def reduction_code(value: str, allow_none: bool = True) -> int:
    if allow_none:
        return _checks.choice("reduction", value, Reduction)
    reduced: dict[str, Code] = {x.name: x for x in Reduction if x != Reduction.none}
    return _checks.choice("reduction", value, reduced)
