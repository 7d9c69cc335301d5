"""The ratio loss operator, epilogue of every overlap loss: wrapper, fakes and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from voxfuse.contract import CORE, FULL, Absent, ClassPooling, Normaliser, Reduction
from voxfuse.ops import _checks, _registry


def ratio_loss(
    stats: Tensor,
    *,
    numerator: Sequence[float] = (1.0,),
    denominator: Sequence[float] = (1.0, 0.5, 0.5),
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    min_denominator: float = 0.0,
    exponent: float = 1.0,
    exponent_from: int = 0,
    log: bool = False,
    class_weight: Tensor | None = None,
    first_class: int = 0,
    batch: bool = False,
    class_pooling: str = "none",
    absent: str = "keep",
    reduction: str = "mean",
    ratio_scale: float = 1.0,
    nll_weight: Tensor | None = None,
    off_weight: Tensor | None = None,
    nll_scale: float = 0.0,
    off_scale: float = 0.0,
    normaliser: str = "one",
    double_loss: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Turn the sums of :func:`voxfuse.soft_confusion` into a loss, in one small launch.

    For every sample (or for the pooled batch) and class, with s the sums of that row,

    .. math::
        N = \sum_k num_k s_k + s_n, \qquad D = \max(\sum_k den_k s_k + s_d, D_{min}), \qquad
        term = (1 - N/D)^{exponent} \text{ or } -\log(N/D)

    and loss = ratio_scale * (sum or mean of the terms) + (nll_scale * sum of w NLL + off_scale *
    sum of w' OFF) / normaliser. Everything is evaluated in float64 and ``1 - N/D`` without a
    subtraction of nearly equal numbers. Two empty sets without smoothing (0/0) agree: term 0.

    Args:
        stats: float64 (B, C, 4) or (B, C, 8), the order of :func:`voxfuse.soft_confusion`.
        numerator, denominator: coefficients of the sums; shorter lists are padded with 0.
        smooth_nr, smooth_dr: added to the numerator and to the denominator.
        min_denominator: smallest D and, with ``log``, smallest N/D; below it the slope is 0.
        exponent: power of the term, > 0; its slope at 0 is 0. Ignored with ``log``.
        exponent_from: classes before this one have the exponent 1; 0 without ``class_pooling``
            "none".
        log: use the negative logarithm of the ratio.
        class_weight: (C - first_class,), multiplies the terms; or (B, C - first_class), multiplies
            a class's term in that sample. A weight of 0 there means not annotated: with ``batch``
            the sample is left out of the class's pooled sums, whose term has the mean of the other
            weights; and for ``absent`` the class has no target volume in that sample.
        first_class: 1 leaves the background out of the terms.
        batch: sum over the samples before the ratio.
        class_pooling: "none"; or sum N and D over the classes before the ratio (generalised Dice)
            with weights "uniform" 1, "simple" 1/G or "square" 1/G^2, where G = TP + FN. An
            infinite weight becomes the largest finite one of its row, or 1 where there is none.
        absent: classes without any target volume: "keep" them; "ignore" (left out of the sum and
            of the mean's count); "zero" (term 0, counted). With ``class_pooling`` "ignore" leaves
            them out of the sums, and rows with no class at all count as absent.
        reduction: "none", "mean" or "sum" over the terms.
        ratio_scale: factor of the terms; 0 leaves them out.
        nll_weight, off_weight: (C,), weights of the classes in NLL and OFF.
        nll_scale, off_scale: factors of the log-likelihood; 0 leaves it out.
        normaliser: divisor of the log-likelihood: "one"; "target", the sum of nll_weight (TP+FN)
            as in a weighted cross-entropy; "volume", the sum of TP+FN; "voxels", the sum of W of
            one class; "elements", the sum of W. Where it is 0 the log-likelihood is 0.
        double_loss: return float64 instead of float32.
        backend: "auto", "cpp", "cuda", "triton" or "reference".

    Returns:
        the loss: a scalar, or with ``reduction="none"`` (B, C'), (C',) with ``batch``, and without
        the class axis with ``class_pooling``, where C' = C - first_class. Differentiable in
        ``stats`` as a loss is in its predictions: what is of the target and the mask alone, G in
        the weights of ``class_pooling`` and every normaliser, counts as constant.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or options do not fit.

    Example:
        >>> import torch, voxfuse
        >>> from voxfuse.ops.ratio_loss import ratio_loss
        >>> stats = torch.tensor([[[6.0, 2.0, 2.0, 0.0]]], dtype=torch.float64)  # TP, FP, FN, NLL
        >>> ratio_loss(stats).round(decimals=4)  # 1 - Dice = 1 - 6 / 8
        tensor(0.2500)
    """
    stats = _checks.require_tensor("stats", stats)
    if stats.dtype != torch.float64:
        raise TypeError(f"stats: got {_checks.describe(stats)}, expected float64")
    if stats.ndim != 3 or stats.shape[2] not in (CORE, FULL):
        raise ValueError(f"stats: got shape {tuple(stats.shape)}, expected (B, C, 4) or (B, C, 8)")
    classes, width = stats.shape[1:]
    if not 0 <= first_class < max(classes, 1):
        raise ValueError(f"first_class: got {first_class}, expected 0 to {classes - 1}")
    for name, coefficients in (("numerator", numerator), ("denominator", denominator)):
        if len(coefficients) > width:
            raise ValueError(f"{name}: got {len(coefficients)} numbers for {width} sums")
    if not exponent > 0:
        raise ValueError(f"exponent: got {exponent}, expected a number > 0")
    if exponent_from < 0 or (exponent_from > 0 and class_pooling != "none"):
        allowed = "an int >= 0" if exponent_from < 0 else "0 with pooled classes"
        raise ValueError(f"exponent_from: got {exponent_from}, expected {allowed}")
    class_weight = _weights("class_weight", class_weight, classes - first_class, stats, True)
    nll_weight = _weights("nll_weight", nll_weight, classes, stats)
    off_weight = _weights("off_weight", off_weight, classes, stats)
    reduction_code = _checks.choice("reduction", reduction, Reduction)
    normaliser_code = _checks.choice("normaliser", normaliser, Normaliser)
    check_likelihood(width, reduction_code, nll_scale, off_scale, normaliser_code)
    operators = _registry.namespace_of(backend, stats.device)
    try:
        loss, _ = operators.ratio_loss(
            stats,
            [float(x) for x in numerator],
            [float(x) for x in denominator],
            float(smooth_nr),
            float(smooth_dr),
            float(min_denominator),
            float(exponent),
            log,
            class_weight,
            first_class,
            batch,
            _checks.choice("class_pooling", class_pooling, ClassPooling),
            _checks.choice("absent", absent, Absent),
            reduction_code,
            float(ratio_scale),
            nll_weight,
            off_weight,
            float(nll_scale),
            float(off_scale),
            normaliser_code,
            double_loss,
            exponent_from,
        )
    except RuntimeError as error:
        _checks.reraise(error)
    result: Tensor = loss
    return result


def check_likelihood(
    width: int, reduction: int, nll_scale: float, off_scale: float, normaliser: int
) -> None:
    """Raise unless the sums that the log-likelihood needs are there."""
    if reduction == Reduction.none and (nll_scale != 0 or off_scale != 0):
        raise ValueError("reduction: 'none' cannot be combined with a log-likelihood term")
    needs_full = off_scale != 0 or normaliser in (Normaliser.voxels, Normaliser.elements)
    if needs_full and width != FULL:
        raise ValueError(
            f"stats: got {width} sums a class, but off_scale and the normalisers 'voxels' and "
            "'elements' need all 8 (soft_confusion with full=True)"
        )


def _weights(
    name: str, weights: Tensor | None, length: int, stats: Tensor, by_sample: bool = False
) -> Tensor | None:
    if weights is None:
        return None
    weights = _checks.require_tensor(name, weights)
    forms = [(length,), (stats.shape[0], length)][: 2 if by_sample else 1]
    if tuple(weights.shape) not in forms:
        expected = " or ".join(map(str, forms))
        raise ValueError(f"{name}: got shape {tuple(weights.shape)}, expected {expected}")
    if weights.requires_grad:
        raise ValueError(f"{name}: requires grad, but no gradient flows to it; detach it")
    if weights.device != stats.device:
        raise ValueError(f"{name}: is on {weights.device}, but stats is on {stats.device}")
    return weights.to(torch.float64).contiguous()


def _fake(x: Any) -> tuple[Tensor, Tensor]:
    samples, classes, _ = x.stats.shape
    shape: list[Any] = []
    if x.reduction == Reduction.none:
        if not x.batch:
            shape.append(samples)
        if x.class_pooling == ClassPooling.none:
            shape.append(classes - x.first_class)
    dtype = torch.float64 if x.double_loss else torch.float32
    return x.stats.new_empty(shape, dtype=dtype), x.stats.new_empty(x.stats.shape)


def _fake_backward(x: Any) -> Tensor:
    result: Tensor = x.cotangents.new_empty(x.cotangents.shape)
    return result


def _setup_context(ctx: Any, x: Any, output: tuple[Tensor, Tensor]) -> None:
    save_slopes(ctx, x, output, x.class_pooling)


def save_slopes(ctx: Any, x: Any, output: tuple[Tensor, Tensor], class_pooling: int) -> None:
    """What :func:`slopes_backward` needs of a loss of sums, whose slopes are its second output."""
    cotangents = output[1]
    ctx.mark_non_differentiable(cotangents)
    ctx.save_for_backward(x.stats, cotangents)
    ctx.rows = (x.first_class, x.batch, class_pooling)


class _OnceDifferentiable(torch.autograd.Function):
    """Pass a gradient on as a function of its origin that refuses to be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, origin: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Nothing is needed: there is no derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "create_graph: the overlap losses cannot be differentiated twice; second derivatives "
            "are not implemented"
        )


def once_differentiable(gradient: Tensor, origin: Tensor) -> Tensor:
    """Make a second differentiation of ``gradient`` with respect to ``origin`` an error.

    Under ``create_graph=True`` a gradient computed outside of autograd would otherwise count as a
    constant, and nothing would say so.
    """
    if not torch.is_grad_enabled():
        return gradient
    result: Tensor = _OnceDifferentiable.apply(gradient, origin)  # type: ignore[no-untyped-call]
    return result


def slopes_backward(
    operators: Any, ctx: Any, grad_loss: Tensor, grad_cotangents: Tensor | None
) -> dict[str, Tensor]:
    """The gradient of the sums: the slopes times that of the loss."""
    if not ctx.needs_input_grad[0]:
        return {}
    stats, cotangents = ctx.saved_tensors
    slopes = once_differentiable(cotangents, stats)
    return {"stats": operators.ratio_loss_backward(grad_loss, slopes, *ctx.rows)}


_registry.register("ratio_loss", _fake, stem="ratio_loss")
_registry.register("ratio_loss_backward", _fake_backward, stem="ratio_loss")
_registry.register_autograd("ratio_loss", _setup_context, slopes_backward)
_registry.register_no_double_backward(
    "ratio_loss_backward",
    "second derivatives of the overlap losses are not implemented",
)
