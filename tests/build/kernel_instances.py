"""Instances of every kernel: the types and compile-time values that a launch gives it."""

from __future__ import annotations

from typing import Any

from tests.build.kernel_compiler import Instance

TYPES = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float64": "*fp64",
    "uint8": "*u8",
    "int64": "*i64",
    "uint64": "*u64",
}

#: Parameters that are views.
VIEWS = ("input", "output", "target", "weight")


def confusion_problem(
    classes: int,
    dtype: str = "float32",
    target: str = "labels",
    activation: int = 2,
    likelihood: int | None = None,
    overlap: int = 0,
    has_ignore: bool = False,
    weighted: bool = False,
    gamma: float = 0.0,
    focal: int = -1,
    full: bool = False,
    contiguous: bool = True,
    odd: bool = False,
    tiny: bool = False,
    unlabelled: int = -1,
) -> Any:
    import torch

    from voxfuse.triton_kernels.soft_confusion.options import Problem

    kinds = {"labels": 0, "dense": 1, "indicator": 2, "binary": 3}
    return Problem(
        dtype=getattr(torch, dtype),
        batch=1,
        classes=classes,
        voxels=1 if tiny else 128**3 + odd,
        target_kind=kinds[target],
        activation=activation,
        likelihood=activation if likelihood is None else likelihood,
        overlap=overlap,
        has_ignore=has_ignore,
        has_weight=weighted,
        gamma=gamma,
        sums=8 if full else 4,
        contiguous=contiguous,
        focal=focal,
        unlabelled=unlabelled,
    )


def _soft_confusion_instance(
    classes: int,
    dtype: str = "float32",
    backward: bool = False,
    target: str = "labels",
    weighted: bool = False,
    contiguous: bool = True,
    odd: bool = False,
    tiny: bool = False,
    target_type: str | None = None,
    weight_type: str = "float32",
    **options: Any,
) -> Instance:
    from voxfuse.triton_kernels.reduction import RowViews, shape_of_rows
    from voxfuse.triton_kernels.soft_confusion import launch
    from voxfuse.triton_kernels.views import View, constexprs

    problem = confusion_problem(
        classes,
        dtype=dtype,
        target=target,
        weighted=weighted,
        contiguous=contiguous,
        odd=odd,
        tiny=tiny,
        **options,
    )
    plan = launch.plan(problem, backward)
    constants: dict[str, Any] = {"O": constexprs(plan.options)}
    if not backward:
        constants["ROWS"] = constexprs(shape_of_rows(classes * problem.sums, plan.num_warps))
    step = 1 if tiny else "i32"
    volume = View(TYPES[dtype], step, *((step, 1) if contiguous else (1, "i32")))
    target_type = target_type or ("float32" if target == "dense" else "uint8")
    types: dict[str, Any] = {
        "input": volume,
        "output": volume,
        "target": View(TYPES[target_type], step, step, 1),
        "weight": View(TYPES[weight_type], step, "i32", 1) if weighted else None,
        "annotated": "*u8" if problem.partial else None,
        "rows": RowViews("*fp64", "*fp64", "*i32"),
        "grad": "*fp64",
        "gamma": "fp64",
    }
    if tiny:
        types |= dict.fromkeys(("voxels", "chunks", "tiles_a_chunk", "tiles_a_program"), 1)
    fields = [f"{name}.{field}" for name in VIEWS for field in ("batch", "channel")]
    aligned = () if odd else ("voxels", *fields)
    return Instance(plan.kernel, constants, types, plan.num_warps, aligned, plan.registers)


def _finish_instance() -> Instance:
    from voxfuse.triton_kernels import reduction
    from voxfuse.triton_kernels.views import constexprs

    types = {"partial": "*fp64", "result": "*fp64"}
    constants = {"ROWS": constexprs(reduction.shape_of_rows(8, 4))}
    return Instance(reduction.finish, constants, types)


def _head_confusion_instance(
    classes: int,
    channels: int = 32,
    dtype: str = "float32",
    backward: bool = False,
    full: bool = False,
    gamma: float = 0.0,
    dense: bool = False,
    weighted: bool = False,
    likelihood: int = 2,
    odd: bool = False,
    exact: bool = False,
    need_features: bool = True,
    need_head: bool = True,
    amd: bool = False,
) -> Instance:
    import torch

    from voxfuse.contract import ConfusionOptions
    from voxfuse.triton_kernels.head_confusion import launch
    from voxfuse.triton_kernels.head_confusion.load import Head
    from voxfuse.triton_kernels.reduction import RowViews, shape_of_rows
    from voxfuse.triton_kernels.soft_confusion.options import describe
    from voxfuse.triton_kernels.views import View, constexprs

    shape = (63, 63, 63) if odd else (64, 64, 64)
    features = torch.empty((1, channels, *shape), dtype=getattr(torch, dtype), device="meta")
    target = torch.empty((1, classes if dense else 1, *shape), device="meta")
    voxel_weight = target if weighted else None
    sums, options = 8 if full else 4, ConfusionOptions(2, likelihood, gamma=gamma)
    problem = describe(features, classes, target, voxel_weight, sums, False, options)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if exact else "high")
    fast = problem.labels_only
    assert launch.in_registers(problem.dtype, classes, channels, fast, backward), "through memory"
    plan = launch.plan(problem, channels, backward, need_features, need_head)
    torch.set_float32_matmul_precision(before)
    kernel = launch.head_backward if backward else launch.head_forward
    # What launch.precision says for AMD's.
    head_options = plan.head._replace(PRECISION="ieee") if amd else plan.head
    constants: dict[str, Any] = {"O": constexprs(plan.options), "H": constexprs(head_options)}
    if not backward:
        constants["ROWS"] = constexprs(shape_of_rows(classes * sums, plan.num_warps))
    volume = View(TYPES[dtype], "i32", "i32", 1)
    types: dict[str, Any] = {
        "features": volume,
        "output": volume,
        "head": Head(TYPES[dtype], TYPES[dtype]),
        "target": View(TYPES["float32" if dense else "uint8"], "i32", "i32", 1),
        "voxel_weight": View(TYPES["float32"], "i32", "i32", 1) if weighted else None,
        "rows": RowViews("*fp64", "*fp64", "*i32"),
        "partial": "*fp64",
        "grad": "*fp64",
        "gamma": "fp64",
    }
    names = ("features", "output", "target", "voxel_weight")
    aligned = [f"{name}.{field}" for name in names for field in ("batch", "channel")]
    aligned = [] if odd else ["voxels", "channels", *aligned]
    return Instance(kernel, constants, types, plan.num_warps, tuple(aligned), launch.REGISTERS)


def _ratio_loss_instance(
    classes: int,
    rows: int = 1,
    sums: int = 4,
    nll: bool = False,
    off: bool = False,
    pooling: int = 0,
    absent: int = 0,
    log: bool = False,
    tiny: bool = False,
) -> Instance:
    from voxfuse.triton_kernels import ratio_loss as kernels
    from voxfuse.triton_kernels.views import constexprs

    options = kernels.Options(
        SUMS=sums,
        RATIO=True,
        NLL=nll,
        OFF=off,
        BATCH=False,
        BY_SAMPLE=nll,
        POOLING=pooling,
        ABSENT=absent,
        REDUCTION=1,
        NORMALISER=2 if off else 1,
        LOG=log,
        LINEAR=not log,
        MIXED=False,
        **dict(zip(("ROWS", "CLASSES"), kernels.tile_shape(rows, classes), strict=True)),
    )
    scalars = [f"{letter}{i}" for letter in "nd" for i in range(8)]
    scalars += ["smooth_nr", "smooth_dr", "min_denominator", "exponent", "ratio_scale"]
    scalars += ["nll_scale", "off_scale"]
    types: dict[str, Any] = {"stats": "*fp64", "loss": "*fp32", "cotangents": "*fp64"}
    types["weights"] = kernels.TermWeights(*["*fp64" if nll else None] * 3)
    types["shape"] = kernels.Shape(*[1 if tiny else "i32"] * 5, "i32")
    types |= dict.fromkeys(scalars, "fp64")
    return Instance(kernels.forward, {"OPTIONS": constexprs(options)}, types)


def _ratio_loss_backward_instance() -> Instance:
    from voxfuse.triton_kernels import ratio_loss as kernels

    types = {"grad_loss": "*fp32", "cotangents": "*fp64", "result": "*fp64"}
    constants = {"SUMS": 4, "BY_CLASS": True, "BLOCK": kernels.BLOCK}
    return Instance(kernels.backward, constants, types)


def _overlap_add_instance(
    dtype: str = "float32",
    axes: int = 3,
    channels: int = 4,
    dense: bool = False,
    total: bool = False,
    ring: int = -1,
    weights: bool = False,
    backward: bool = False,
    floor: bool = False,
    activation: int = 0,
    many: bool = False,
    normalise: bool = False,
) -> Instance:
    import torch

    from voxfuse.triton_kernels.overlap_add import gather, launch, scatter, softmax
    from voxfuse.triton_kernels.overlap_add.views import Axes, Floor, Patches, Placement, Ring
    from voxfuse.triton_kernels.views import constexprs

    def three(kind: Any, missing: Any, extent: int = axes) -> Axes:
        return Axes(*[missing] * (3 - extent), *[kind] * extent)

    # Even with more than one tile a row.
    options = launch.options_for(
        getattr(torch, dtype),
        Axes(1, 1 if axes == 1 else 96, 192),
        AXES=axes,
        DENSE=dense,
        RING=ring,
        CHANNELS=launch.channels_a_program(channels, ring >= 0),
        ACTIVATION=activation,
    )
    pointer, length = TYPES[dtype], three("i32", 1)
    tables = three("*fp64", None, 1 if dense else axes)
    kind = "*fp64" if floor else None
    types: dict[str, Any] = {
        "softmax": "*fp32" if many or normalise else None,
        "patches": Patches(None if weights else pointer, "i32", "i32", Axes("i32", "i32", 1)),
        "output": "*fp32" if ring >= 0 and not weights else pointer,
        "grad": pointer,
        "result": pointer,
        "placed": Placement("*i64", "*i64", length, tables, length),
        "total": "*fp64" if total else None,
        "floor": Floor(kind, *[three(x, y) for x, y in ((kind, None), ("i32", 1), ("i32", 1))]),
        "extent": length,
        "size": length,
        "ring": Ring("i32", "i32", "i32"),
    }
    kernel, registers = gather.gather, launch.REGISTERS
    if backward:
        kernel = scatter.scatter_activated if activation else scatter.scatter
        registers = None
    if normalise:
        kernel, registers = softmax.normalise, None
    constants = {"OPTIONS": constexprs(options)}
    return Instance(kernel, constants, types, launch.WARPS, ("size.x",), registers)


def _finalize_slab_instance(
    mode: int,
    classes: int,
    activation: int = 0,
    dtype: str = "float32",
    output: str | None = None,
    head: bool = False,
    total: bool = False,
    divide: bool = False,
) -> Instance:
    import torch

    from voxfuse.triton_kernels import finalize_slab as kernels
    from voxfuse.triton_kernels.views import constexprs

    options = kernels.options_for(
        mode, activation, activation == 1, divide, True, getattr(torch, dtype), classes, 128**3
    )
    pointer = TYPES[dtype]
    weights = pointer if head else None
    written = TYPES[output or ("uint8" if mode in (1, 2) else "float32")]
    types: dict[str, Any] = {
        "tensors": kernels.Tensors(pointer, written, "*fp64" if total else None, weights, weights),
        "slab": kernels.Slab(1, *["i32"] * 6),
        **dict.fromkeys(("divisor", "threshold", "fill"), "fp64"),
    }
    lengths = tuple(f"slab.{field}" for field in kernels.Slab._fields[1:])
    constants = {"OPTIONS": constexprs(options)}
    return Instance(kernels.finalize, constants, types, kernels.WARPS, lengths)


def _hard_confusion_instance(
    decision: int,
    classes: int,
    dtype: str = "float32",
    target: str = "uint8",
    dense: bool = False,
    masked: bool = False,
    has_ignore: bool = False,
) -> Instance:
    import torch

    from voxfuse.triton_kernels import hard_confusion as kernels
    from voxfuse.triton_kernels.views import View, constexprs

    options = kernels.options_for(decision, dense, has_ignore, getattr(torch, dtype), classes)
    types: dict[str, Any] = {
        "tensors": kernels.Tensors(
            View(TYPES[dtype], "i32", "i32", 1),
            View(TYPES[target], "i32", "i32", 1),
            View("*u8", "i32", "i32", 1) if masked else None,
            "*i64",
        ),
        "least": "fp32",
    }
    views = ("input", "target", "mask") if masked else ("input", "target")
    lengths = (f"tensors.{view}.{stride}" for view in views for stride in ("batch", "channel"))
    constants = {"OPTIONS": constexprs(options)}
    return Instance(kernels.count, constants, types, kernels.WARPS, (*lengths, "voxels"))


def _resample_argmax_instance(
    kept: int, axes: int = 3, dtype: str = "float32", output: str = "uint8", half: bool = False
) -> Instance:
    from voxfuse.triton_kernels import resample_argmax as kernels
    from voxfuse.triton_kernels.views import constexprs

    def axis(present: bool, stride: Any = "i32") -> Any:
        if not present:
            return kernels.Axis(None, None, 1, 1, "i32")
        return kernels.Axis("*i64", "*fp32", "i32", "i32", stride)

    types: dict[str, Any] = {
        "volume": kernels.Volume(
            TYPES[dtype],
            TYPES[output],
            "*i64" if kept == 2 else None,
            "i32",
            "i32",
            axis(axes > 2),
            axis(axes > 1),
            axis(True, 1),
        ),
        "least": "fp32",
    }
    constants = {"OPTIONS": constexprs(kernels.Options(kept, half))}
    return Instance(kernels.resample, constants, types, kernels.WARPS)


def _floating_sum_instance(dtype: str) -> Instance:
    """What no kernel may do: sums in an order that the hardware chooses."""
    import triton
    import triton.language as tl

    @triton.jit
    def add_in_any_order(values, total):
        i = tl.program_id(0)
        tl.atomic_add(total, tl.load(values + i))

    return Instance(add_in_any_order, {}, {"values": TYPES[dtype], "total": TYPES[dtype]})


INSTANCES = {
    "soft_confusion": _soft_confusion_instance,
    "finish": _finish_instance,
    "head_confusion": _head_confusion_instance,
    "ratio_loss": _ratio_loss_instance,
    "ratio_loss_backward": _ratio_loss_backward_instance,
    "overlap_add": _overlap_add_instance,
    "finalize_slab": _finalize_slab_instance,
    "hard_confusion": _hard_confusion_instance,
    "resample_argmax": _resample_argmax_instance,
    "floating_sum": _floating_sum_instance,
}
