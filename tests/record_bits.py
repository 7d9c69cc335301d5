"""Record what a fixed corpus of calls gives, to the last bit, and compare two records.

    python -m tests.record_bits before.json --keep before.pt
    python -m tests.record_bits after.json --compare before.json --keep before.pt

For a change that is to leave every result as it is. The corpus: the operators on the backends that
run here and on the emulated CUDA kernels, the public losses and every option of theirs, the fused
head, the adapters, sliding windows and the fuser, and texts of errors. Only public functions,
``torch.ops`` and ``tests/emulation`` are used, so that it outlives a rebuild of what is inside: to
record an older commit, copy this file into a checkout of it. Digests depend on the machine and are
not committed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor

import voxfuse
from voxfuse import functional

Result = tuple[str, Callable[[], Any]]
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def normal(seed: int, *shape: int) -> Tensor:
    """Numbers that depend on ``seed`` alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(seed: int, classes: int, *shape: int) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def confusion(operators: Any) -> Iterator[Result]:
    """Sums and gradient: classes, dtypes, layouts, targets and options."""
    kinds = {
        "": {},
        "channels last": {"layout": channels_last},
        "weighted": {"weighted": True},
        "ignored": {"ignore": 1},
        "focal": {"gamma": 2.0, "full": True},
        "focal background": {"gamma": 0.5, "focal": 1},
        "min": {"overlap": 1},
        "sigmoid": {"activation": 1, "dense": True, "full": True},
        "mixed": {"likelihood": 1, "dense": True},
    }
    for classes, (dtype, kind), (name, o) in itertools.product(
        (1, 2, 4, 20), DTYPES.items(), kinds.items()
    ):

        def call(
            classes: int = classes, kind: torch.dtype = kind, o: Any = o
        ) -> tuple[Tensor, ...]:
            shape = (2, classes, 5, 7, 6)
            input = o.get("layout", lambda x: x)((normal(1, *shape) * 3).to(kind))
            dense = o.get("dense") or classes == 1
            target = labels(2, 2, *shape).bool() if dense else labels(2, classes, 2, 1, 5, 7, 6)
            weight = normal(3, 2, 5, 7, 6).abs().float() if o.get("weighted") else None
            activation = o.get("activation", 2)
            likelihood = o.get("likelihood", activation)
            options = (activation, likelihood, o.get("overlap", 0), o.get("ignore"))
            rest = (o.get("gamma", 0.0),)
            focal = o.get("focal")
            full = o.get("full", False)
            sums = operators.soft_confusion(input, target, weight, *options, *rest, full, focal)
            grad = normal(4, *sums.shape)
            return sums, operators.soft_confusion_backward(
                grad, input, target, weight, *options, *rest, focal
            )

        yield f"soft_confusion {classes} {dtype} {name}", call


def head(operators: Any) -> Iterator[Result]:
    for classes, (dtype, kind) in itertools.product((2, 20), DTYPES.items()):

        def call(classes: int = classes, kind: torch.dtype = kind) -> tuple[Tensor, ...]:
            given = (normal(1, 2, 8, 5, 4, 6), normal(2, classes, 8), normal(3, classes))
            tensors = [x.to(kind) for x in given]
            target, options = labels(4, classes, 2, 5, 4, 6), (2, 2, 0, None, 0.0)
            sums = operators.head_confusion(*tensors, target, None, *options, True, 1 << 20)
            grad = normal(5, *sums.shape)
            return sums, *operators.head_confusion_backward(
                grad, *tensors, target, None, *options, 1 << 20, True, True
            )

        yield f"head_confusion {classes} {dtype}", call


def parameters(operator: Any) -> set[str]:
    """Names of the arguments of an operator of ``torch.ops`` or of the emulation."""
    if hasattr(operator, "default"):
        return {argument.name for argument in operator.default._schema.arguments}
    return set(inspect.signature(operator).parameters)


def fusion(operators: Any) -> Iterator[Result]:
    for channels, (dtype, kind), activation in itertools.product(
        (1, 3, 13), DTYPES.items(), (0, 1, 2)
    ):

        def call(
            channels: int = channels, kind: torch.dtype = kind, activation: int = activation
        ) -> tuple[Tensor, ...]:
            origins = torch.tensor([[0, 0, 0], [1, 2, 3], [2, 0, 5]])
            rows = torch.zeros_like(origins)
            weights = [normal(6, 1, n).abs() for n in (3, 4, 9)]
            patches = normal(7, 3, channels, 3, 4, 9).to(kind)
            tables, volume = (origins, rows, weights, None), [5, 6, 14]
            fused = operators.overlap_add(patches, *tables, volume, activation)
            grad = normal(8, channels, *volume).to(kind)
            gradient = operators.overlap_add_backward(grad, *tables, patches, activation)
            ring = torch.zeros(
                channels, *volume, dtype=torch.float64 if kind == torch.float64 else torch.float32
            )
            named = dict(patches=patches, origins=origins, rows=rows, weights=weights, total=None)
            place = dict(ring_axis=0, start=0, stop=5, flip=2)
            operators.overlap_add_(ring, **named, **place, activation=activation)
            return fused, gradient, ring

        yield f"overlap_add {channels} {dtype} {activation}", call

    for (dtype, kind), dense, axis in itertools.product(DTYPES.items(), (False, True), (0, 1, 2)):

        def general(
            kind: torch.dtype = kind, dense: bool = dense, axis: int = axis
        ) -> tuple[Tensor, ...]:
            """Divided by sums of weights, separable and dense; a ring that begins elsewhere."""
            origins, rows = labels(1, 12, 7, 3) - 3, labels(2, 1 if dense else 3, 7, 3)
            weights = [normal(6, 3, n).abs() + 0.1 for n in (3, 4, 9)]
            weights = [normal(6, 1, 3, 4, 9).abs() + 0.1] if dense else weights
            patches, volume = normal(7, 7, 3, 3, 4, 9).to(kind), [9, 10, 14]
            total = torch.zeros(volume, dtype=torch.float64)
            operators.overlap_weights_(total, origins, rows, weights, axis, 0, volume[axis])
            tables = (origins, rows, weights, total)
            fused = operators.overlap_add(patches, *tables, volume, 0)
            grad = normal(8, 3, *volume).to(kind)
            gradient = operators.overlap_add_backward(grad, *tables)
            wide = torch.float64 if kind == torch.float64 else torch.float32
            ring, start = torch.zeros(3, *volume, dtype=wide), 2
            named = dict(patches=patches, origins=origins, rows=rows, weights=weights, total=total)
            operators.overlap_add_(
                ring, **named, ring_axis=axis, start=start, stop=start + volume[axis]
            )
            return total, fused, gradient, ring

        yield f"overlap_add divided {dtype} {'dense' if dense else 'separable'} {axis}", general

    for (dtype, kind), activation in itertools.product(DTYPES.items(), (0, 2)):

        def floored(kind: torch.dtype = kind, activation: int = activation) -> Tensor:
            """A product of axes with a lower bound, whose cover is a table an axis."""
            origins = torch.tensor([[0, 0, 0], [2, 2, 5]])
            weights = [normal(6, 1, n).abs() for n in (3, 4, 9)]
            cover = [normal(9, 2, n).abs() + 1 for n in (5, 6, 14)]
            split = "cover" in parameters(operators.overlap_add_)
            tables = {"weights": weights, "cover": cover} if split else {"weights": weights + cover}
            ring = torch.zeros(
                3, 5, 6, 14, dtype=torch.float64 if kind == torch.float64 else torch.float32
            )
            named = dict(patches=normal(7, 2, 3, 3, 4, 9).to(kind), origins=origins, total=None)
            place = dict(ring_axis=0, start=0, stop=5, floor=0.3, activation=activation)
            operators.overlap_add_(ring, rows=torch.zeros_like(origins), **named, **tables, **place)
            return ring

        yield f"overlap_add floor {dtype} {activation}", floored


#: The schema of ratio_loss after the statistics, with its defaults.
RATIO = dict(
    numerator=[1.0],
    denominator=[1.0, 0.3, 0.7],
    smooth_nr=1e-5,
    smooth_dr=1e-5,
    min_denominator=0.0,
    exponent=1.0,
    log=False,
    class_weight=None,
    first_class=0,
    batch=False,
    class_pooling=0,
    absent=0,
    reduction=1,
    ratio_scale=1.0,
    nll_weight=None,
    off_weight=None,
    nll_scale=0.0,
    off_scale=0.0,
    normaliser=0,
    double_loss=True,
    exponent_from=0,
)


def ratio(operators: Any) -> Iterator[Result]:
    weight = torch.tensor([1.0, 0.5, 2.0, 0.25], dtype=torch.float64)
    likelihood = dict(nll_scale=0.7, off_scale=0.2, nll_weight=weight, off_weight=weight)
    kinds: dict[str, dict[str, Any]] = {
        "": {},
        "float32": {"double_loss": False},
        "squares": {"numerator": [2.0], "denominator": [0.0] * 5 + [1.0, 1.0]},
        "focal": {"exponent": 0.75, "class_weight": weight},
        "focal from 2": {"exponent": 2.0, "exponent_from": 2},
        "log": {"log": True, "min_denominator": 1e-7},
        "batch": {"batch": True, "first_class": 1, "class_weight": weight[1:]},
        "clamped": {"min_denominator": 15.0, "smooth_nr": 0.0, "smooth_dr": 0.0},
        "scaled": {"ratio_scale": 0.0, **likelihood},
    }
    kinds |= {f"pooling {k}": {"class_pooling": k, "class_weight": weight} for k in (1, 2, 3)}
    kinds |= {f"absent {k}": {"absent": k, "smooth_nr": 0.0, "smooth_dr": 0.0} for k in (0, 1, 2)}
    kinds |= {f"reduction {k}": {"reduction": k, "first_class": 1} for k in (0, 2)}
    kinds |= {f"normaliser {k}": {"normaliser": k, **likelihood} for k in range(5)}
    for name, options in kinds.items():

        def call(options: dict[str, Any] = options) -> tuple[Tensor, ...]:
            stats = normal(1, 3, 4, 8).abs() * 10
            stats[0, 1, :3], stats[2, 3, 1:3] = 0, 0  # an absent class, and a perfect one
            case = RATIO | options
            loss, slopes = operators.ratio_loss(stats, *case.values())
            grad = normal(2, *loss.shape).to(loss.dtype)
            where = (case["first_class"], case["batch"], case["class_pooling"])
            return loss, slopes, operators.ratio_loss_backward(grad, slopes, *where)

        yield f"ratio_loss {name}", call


def slabs(operators: Any) -> Iterator[Result]:
    """finalize_slab: values, labels, mask, foreground, entropy of a ring of either type."""
    types = {1: torch.uint8, 2: torch.bool}
    kinds = {
        "": {},
        "applied": {"applied": True},
        "divided": {"total": True, "fill": 0.25, "divisor": 3.0},
        "head": {"head": True},
        "kept": {"clear": False, "axis": 1},
        "half": {"dtype": torch.float16},
    }
    for mode, activation, (name, o), real in itertools.product(
        range(5), range(3), kinds.items(), (torch.float32, torch.float64)
    ):

        def call(
            mode: int = mode, activation: int = activation, o: Any = o, real: torch.dtype = real
        ) -> tuple[Tensor, ...]:
            ring, axis = normal(1, 5, 4, 6, 9).to(real) * 3, o.get("axis", 0)
            if mode == 4 and (activation == 0 or o.get("applied")):
                ring = ring.softmax(0)
            weight = normal(2, 7, 5).to(real) if o.get("head") else None
            bias = normal(3, 7).to(real) if o.get("head") else None
            extent = [4, 6, 9]
            extent[axis] = 3
            count = 7 if o.get("head") else 5
            dtype = types.get(mode, o.get("dtype", torch.float32))
            out = torch.zeros(count if mode in (0, 2) else 1, *extent, dtype=dtype)
            total = labels(4, 3, 4, 6, 9).double() if o.get("total") else None
            options = (axis, 6, 9, activation, o.get("applied", False), mode)
            rest = (o.get("divisor", 1.0), 0.4, o.get("fill", 0.0), o.get("clear", True))
            operators.finalize_slab(ring, out, total, weight, bias, *options, *rest)
            return ring, out

        yield f"finalize_slab {mode} {activation} {name} {str(real)[6:]}", call


class Emulated:
    """The CUDA kernels, compiled for the host (tests/emulation)."""

    @functools.cached_property
    def programs(self) -> list[Any]:
        from tests.emulation import emulator

        names = ("SoftConfusion", "RatioLoss", "OverlapAdd", "FinalizeSlab")
        return [getattr(emulator, name)() for name in names]

    def __getattr__(self, name: str) -> Any:
        for program in self.programs:
            if hasattr(program, name):
                return getattr(program, name)
        raise AttributeError(name)


#: Another value for options of losses, one at a time; those of the reduction by process are left.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "absent": ("ignore", "zero"),
    "activation": ("sigmoid", "none"),
    "alpha": (0.2, [0.25, 0.5, 0.75]),
    "balance": (0.3,),
    "batch": (True,),
    "beta": (0.9,),
    "ce_activation": ("sigmoid",),
    "class_pooling": ("simple", "uniform"),
    "class_weight": ([1.0, 2.0, 0.5],),
    "classes": ("all", "present", [1, 2]),
    "delta": (0.7,),
    "focal_activation": ("sigmoid",),
    "focal_alpha": (0.25,),
    "focal_gamma": (0.5,),
    "gamma": (0.5, 2.0),
    "ignore_index": (1,),
    "include_background": (False,),
    "k": (30.0,),
    "label_smoothing": (0.1,),
    "lambda_ce": (0.5,),
    "lambda_dice": (0.5,),
    "lambda_focal": (0.5,),
    "lambda_tversky": (0.5,),
    "likelihood_weight": ([1.0, 2.0, 0.5],),
    "log": (True,),
    "overlap": ("min",),
    "per_image": (True,),
    "pos_weight": ([1.0, 2.0, 0.5],),
    "reduction": ("none", "sum"),
    "smooth_dr": (1.0,),
    "smooth_nr": (0.0, 1.0),
    "squared": (True,),
    "symmetric": (False,),
}


def with_gradient(loss: Callable[..., Tensor], input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """What ``loss`` is, and the gradient that comes of it."""
    leaf = input.requires_grad_()
    value = loss(leaf, *rest)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def losses() -> Iterator[Result]:
    """Every public loss function: dtypes, targets, a weight, and its options one at a time."""
    for name, loss in sorted(vars(functional).items()):
        if not name.endswith("_loss") or not callable(loss):
            continue
        taken = [x for x in inspect.signature(loss).parameters if x in OPTIONS]
        kinds: dict[str, dict[str, Any]] = {dtype: {"dtype": dtype} for dtype in DTYPES}
        kinds |= {name: {"kind": name} for name in ("dense", "weighted")}
        kinds |= {f"{x} {value}": {x: value} for x in taken for value in OPTIONS[x]}
        kinds["reference"], kinds["triton"] = {"backend": "reference"}, {"backend": "triton"}
        for case, options in kinds.items():

            def call(loss: Any = loss, options: dict[str, Any] = options) -> tuple[Tensor, ...]:
                given = dict(options)
                kind, dtype = given.pop("kind", ""), DTYPES[given.pop("dtype", "float32")]
                input = (normal(1, 2, 3, 6, 5, 7) * 3).to(dtype)
                if given.get("activation") == "none":
                    input = input.sigmoid()
                target = labels(2, 3, 2, 1, 6, 5, 7)
                if kind == "dense":
                    target = normal(3, 2, 3, 6, 5, 7).sigmoid().float()
                rest = (normal(4, 2, 6, 5, 7).abs().float(),) if kind == "weighted" else ()
                return with_gradient(functools.partial(loss, **given), input, target, *rest)

            yield f"{name} {case}", call


def heads() -> Iterator[Result]:
    """Modules of the losses; those of logits also on features, and in deep supervision."""
    for name in sorted(voxfuse.__all__):
        made = getattr(voxfuse, name)
        if not name.endswith("Loss") or name == "HeadLoss":
            continue
        for backend in ("auto", "reference"):

            def call(made: Any = made, name: str = name, backend: str = backend) -> Any:
                shape = (2, 3, 8, 8, 8)
                if name == "DeepSupervisionLoss":
                    loss = made(voxfuse.DiceCELoss(backend=backend))
                    given = [normal(i, 2, 3, 8 >> i, 8 >> i, 8 >> i).float() for i in (0, 1, 2)]
                    rest = (labels(2, 3, 2, 1, 8, 8, 8),)
                    return with_gradient(lambda x: loss([x, *given[1:]], *rest), given[0])
                loss = made(backend=backend)
                if name.startswith("Head"):
                    rest = (normal(5, 3, 4, 1, 1, 1).float(), normal(6, 3).float())
                    return with_gradient(
                        lambda x: loss(x, *rest, labels(2, 3, 2, 1, 8, 8, 8)),
                        normal(1, 2, 4, 8, 8, 8).float(),
                    )
                return with_gradient(loss, normal(1, *shape).float(), labels(2, 3, 2, 1, 8, 8, 8))

            yield f"{name} {backend}", call


def adapters() -> Iterator[Result]:
    """The peers' losses, as their users call them."""
    try:
        from voxfuse.integrations import monai, nnunet, smp
    except ImportError:  # without MONAI there is nothing to adapt to
        return
    hard = {"to_onehot_y": True}
    options: dict[str, tuple[dict[str, Any], ...]] = {
        "DiceLoss": (
            {"softmax": True, **hard},
            {"sigmoid": True, **hard, "squared_pred": True, "batch": True},
            {"softmax": True, **hard, "jaccard": True, "include_background": False},
            {"softmax": True, **hard, "reduction": "none", "weight": [1.0, 2.0, 0.5]},
            {"softmax": True, **hard, "ignore_index": 1},
            {"sigmoid": True, **hard, "soft_label": True},
        ),
        "MaskedDiceLoss": ({"softmax": True, **hard},),
        "TverskyLoss": ({"softmax": True, **hard, "alpha": 0.3, "beta": 0.7},),
        "GeneralizedDiceLoss": ({"softmax": True, **hard}, {"w_type": "simple", **hard}),
        "DiceCELoss": (
            {"softmax": True, **hard},
            {"sigmoid": True, **hard, "lambda_ce": 0.5},
            {"softmax": True, **hard, "label_smoothing": 0.1},
        ),
        "DiceFocalLoss": ({"softmax": True, **hard}, {"sigmoid": True, **hard, "alpha": 0.25}),
        "FocalLoss": (
            {**hard},
            {"use_softmax": True, **hard, "gamma": 1.5, "alpha": 0.25},
            {"reduction": "none", **hard, "weight": [1.0, 2.0, 0.5]},
        ),
        "GeneralizedDiceFocalLoss": ({"softmax": True, **hard},),
    }
    x, y = normal(1, 2, 3, 6, 5, 7) * 2, labels(2, 3, 2, 1, 6, 5, 7)
    for name, dtype in itertools.product(options, (torch.float32, torch.float64)):
        for chosen in options[name]:

            def call(
                name: str = name, chosen: dict[str, Any] = chosen, dtype: torch.dtype = dtype
            ) -> tuple[Tensor, ...]:
                loss = getattr(monai, name)(**chosen)
                return with_gradient(loss, x.to(dtype), y)

            yield f"monai {name} {chosen} {str(dtype)[6:]}", call
    modes = {"multiclass": (x, y[:, 0]), "multilabel": (x, (x > 1).float().flip(0))}
    modes["binary"] = (x[:, :1], (y == 1).long())
    more: dict[str, tuple[dict[str, Any], ...]] = {
        "DiceLoss": ({}, {"log_loss": True}, {"smooth": 1.0, "ignore_index": 1}),
        "JaccardLoss": ({}, {"smooth": 1.0}),
        "TverskyLoss": ({"alpha": 0.3, "beta": 0.7, "gamma": 0.75},),
        "FocalLoss": ({}, {"alpha": 0.25, "normalized": True}, {"reduced_threshold": 0.5}),
        "LovaszLoss": ({}, {"per_image": True}),
    }
    for name, (mode, given) in itertools.product(more, modes.items()):
        for chosen in more[name]:

            def smp_call(
                name: str = name, mode: str = mode, given: Any = given, chosen: Any = chosen
            ) -> tuple[Tensor, ...]:
                return with_gradient(getattr(smp, name)(mode, **chosen), given[0].float(), given[1])

            yield f"smp {name} {mode} {chosen}", smp_call
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    regions = (x > 1).flip(0).float()
    compounds: dict[str, tuple[Callable[[], Any], Tensor]] = {
        "DC_and_CE_loss": (lambda: nnunet.DC_and_CE_loss(dict(dice), {}), y),
        "DC_and_CE_loss ignoring": (
            lambda: nnunet.DC_and_CE_loss(dict(dice), {}, 0.5, 2, ignore_label=1),
            y,
        ),
        "DC_and_BCE_loss": (lambda: nnunet.DC_and_BCE_loss({}, dict(dice)), regions),
        "DC_and_topk_loss": (lambda: nnunet.DC_and_topk_loss(dict(dice), {"k": 20}), y),
        "SoftDiceLoss": (lambda: nnunet.SoftDiceLoss(torch.sigmoid, ddp=False), y),
        "MemoryEfficientSoftDiceLoss": (
            lambda: nnunet.MemoryEfficientSoftDiceLoss(nnunet.softmax_helper_dim1, ddp=False),
            y,
        ),
        "RobustCrossEntropyLoss": (lambda: nnunet.RobustCrossEntropyLoss(), y),
        "TopKLoss": (lambda: nnunet.TopKLoss(k=20), y),
    }
    for name, (make, target) in compounds.items():

        def nnunet_call(make: Any = make, target: Tensor = target) -> tuple[Tensor, ...]:
            return with_gradient(make(), x.float(), target)

        yield f"nnunet {name}", nnunet_call


def windows() -> Iterator[Result]:
    """A sliding window over a fixed network, in every output."""
    for output, overlap in itertools.product(("logits", "probabilities", "labels"), (0.25, 0.5)):

        def call(output: str = output, overlap: float = overlap) -> Any:
            kernel = normal(9, 3, 1, 3, 3, 3).float()
            return voxfuse.sliding_window_inference(
                normal(10, 1, 1, 20, 18, 16).float(),
                (8, 8, 8),
                2,
                lambda x: torch.nn.functional.conv3d(x, kernel, padding=1),
                overlap=overlap,
                output=output,
                activation="none" if output == "logits" else "softmax",
            )

        yield f"sliding_window_inference {output} {overlap}", call


def fusers() -> Iterator[Result]:
    """PatchFuser: every output on the backends, windows, grids, votes, and a head."""
    probabilities = {"activation": "softmax"}
    kinds: dict[str, dict[str, Any]] = {
        "logits": {},
        "probabilities": {"output": "probabilities", **probabilities},
        "probabilities by logits": {"output": "probabilities", "voting": "logit", **probabilities},
        "sigmoid": {"output": "probabilities", "activation": "sigmoid"},
        "labels": {"output": "labels"},
        "soft labels": {"output": "labels", "voting": "soft", **probabilities},
        "mask": {"output": "mask", "activation": "sigmoid", "threshold": 0.3},
        "foreground": {"output": "foreground", **probabilities},
        "entropy": {"output": "entropy", **probabilities},
        "head": {"output": "labels", "head": (normal(1, 4, 3).float(), normal(2, 4).float())},
        "members": {"members": 2},
        "axis": {"stream_axis": 1, "output": "labels"},
        "origins": {"origins": (labels(3, 14, 9, 3) - 2).unique(dim=0), "fill": 0.5},
        "half patches": {"grid": "half_patch"},
        "constant": {"window": "constant"},
        "gaussian": {"window": "monai_gaussian"},
        "bspline2": {"window": "bspline2", "overlap": 0.625},
        "hann": {"window": "hann"},
        "float16 sums": {"accumulate": torch.float16, "out": "float16"},
    }
    for (name, options), (dtype, kind), backend in itertools.product(
        kinds.items(),
        (("float32", torch.float32), ("float16", torch.float16), ("float64", torch.float64)),
        ("auto", "reference", "triton"),
    ):
        if backend == "triton" and dtype == "float64":
            continue  # the interpreter takes its time; the operator's own section has float64

        def call(
            options: dict[str, Any] = options, kind: torch.dtype = kind, backend: str = backend
        ) -> tuple[Tensor, ...]:
            given = dict(options)
            if given.pop("out", None):
                given["dtype"] = torch.float16
            fuser = voxfuse.PatchFuser((13, 11, 17), (6, 6, 6), 3, backend=backend, **given)
            patches = normal(4, len(fuser), 3, 6, 6, 6).to(kind)
            members = given.get("members", 1)
            for first in range(0, len(fuser), 4):
                part = slice(first, first + 4)
                for _ in range(members):
                    fuser.add(patches[part], fuser.origins[part])
            return (fuser.result(),)

        yield f"PatchFuser {name} {dtype} {backend}", call


def mistakes() -> Iterator[Result]:
    """Calls that are refused: the text is the result."""
    x, y = normal(1, 1, 3, 4, 4, 4), labels(2, 3, 1, 1, 4, 4, 4)
    tversky = functional.tversky_loss
    yield "error: target's shape", lambda: tversky(x, y[..., :2])
    yield "error: target's batch", lambda: tversky(x, y.expand(2, -1, -1, -1, -1))
    yield "error: input's dtype", lambda: tversky(x.long(), y)
    yield "error: alpha", lambda: tversky(x, y, alpha=-1.0)
    yield "error: reduction", lambda: tversky(x, y, reduction="most")
    yield "error: a label that is no class", lambda: tversky(x, y + 3)
    yield "error: roi_size", lambda: voxfuse.sliding_window_inference(x, (4, 4), 1, lambda z: z)
    yield (
        "error: overlap",
        lambda: voxfuse.sliding_window_inference(x, (2, 2, 2), 1, lambda z: z, overlap=1.5),
    )
    labelled = {name: loss for name, loss in vars(functional).items() if name.endswith("_loss")}
    fuser, window = voxfuse.PatchFuser, voxfuse.sliding_window_inference
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        **{name: (loss, (x, y)) for name, loss in sorted(labelled.items())},
        "PatchFuser": (fuser, ((9, 9, 9), (4, 4, 4), 2)),
        "sliding_window_inference": (window, (x, (2, 2, 2), 1, lambda z: z)),
        "soft_confusion": (voxfuse.soft_confusion, (x, y)),
        "overlap_add": (voxfuse.overlap_add, (x, torch.zeros(1, 3, dtype=torch.int64), (4, 4, 4))),
    }
    for name, (function, given) in calls.items():
        for option, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                continue
            for wrong in ("wrong", -1.5, [1.0], object):

                def call(
                    function: Any = function,
                    given: Any = given,
                    option: str = option,
                    w: Any = wrong,
                ) -> tuple[Tensor, ...]:
                    result = function(*given, **{option: w})
                    return (result,) if isinstance(result, Tensor) else ()

                yield f"{name}({option}={wrong!r})", call


#: Parts of the corpus that every backend and the emulation run.
SHARED = (confusion, fusion, ratio, slabs)


def corpus(only: set[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What to call, by section."""
    backends = {
        "cpp": torch.ops.voxfuse,
        "reference": torch.ops.voxfuse_reference,
        "triton": torch.ops.voxfuse_triton,
    }
    sections: dict[str, Callable[[], Iterator[Result]]] = {
        name: lambda x=operators: itertools.chain(*(part(x) for part in (*SHARED, head)))
        for name, operators in backends.items()
    }
    sections["cuda"] = lambda: itertools.chain(*(part(Emulated()) for part in SHARED))
    sections |= {"losses": losses, "modules": heads, "adapters": adapters, "windows": windows}
    sections |= {"fusers": fusers, "errors": mistakes}
    unknown = only - sections.keys()
    if unknown:
        raise SystemExit(f"--only: got {sorted(unknown)}, expected some of {', '.join(sections)}")
    for section in sections:
        if not only or section in only:
            for name, call in sections[section]():
                yield f"{section}: {name}", call


def outcome(call: Callable[[], Any]) -> tuple[str, list[Tensor]]:
    """A digest of the bytes, dtypes and shapes of what ``call`` returns, or the error's text."""
    try:
        found = call()
    except Exception as error:
        text = re.sub(r"0x[0-9a-f]+", "0x...", str(error))  # addresses of objects
        return f"{type(error).__name__}: {text}", []
    tensors = [found] if isinstance(found, Tensor) else list(found)
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest(), [x.detach().clone() for x in tensors]


def difference(before: list[Tensor], after: list[Tensor]) -> str:
    """The largest distance, over the largest number."""
    if [x.shape for x in before] != [x.shape for x in after]:
        return "other shapes"
    found = []
    for old, new in zip(before, after, strict=True):
        a, b = old.double().nan_to_num(), new.double().nan_to_num()
        size = float(a.abs().max()) if a.numel() else 0.0
        far = float((a - b).abs().max()) if a.numel() else 0.0
        found.append(f"{far:.2e} of {size:.2e}")
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="JSON to write: digest or error by name")
    parser.add_argument("--only", default="", help="sections, by commas")
    parser.add_argument("--compare", type=Path, help="a JSON from before: list what differs")
    parser.add_argument(
        "--keep", type=Path, help="values: written, or with --compare read for the differences"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # NumPy's of what the interpreter meets
    kept = torch.load(options.keep) if options.compare and options.keep else {}
    before = json.loads(options.compare.read_text()) if options.compare else {}
    found, values, changed = {}, {}, 0
    for name, call in corpus({x for x in options.only.split(",") if x}):
        found[name], values[name] = outcome(call)
        if options.compare and before.get(name) != found[name]:
            changed += 1
            size = difference(kept[name], values[name]) if name in kept else ""
            print(f"{name}: {before.get(name, 'new')[:200]} -> {found[name][:200]} {size}")
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.keep and not options.compare:
        torch.save(values, options.keep)
    print(f"{len(found)} recorded" + (f", {changed} differ" if options.compare else ""))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
