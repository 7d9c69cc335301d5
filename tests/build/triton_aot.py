"""Compile the Triton kernels ahead of time and read their resources off the machine code.

No GPU is needed. Triton's interpreter must be off in the process that compiles, so that the tests
run this file as a program. ``python -m tests.build.triton_aot`` prints the table of all cases.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.build import machine_code
from tests.build.kernel_compiler import AMD, compile_instance
from tests.build.kernel_instances import INSTANCES, confusion_problem
from tests.build.parallel_compiler import compile_in_parallel, table

CAPABILITIES = (80, 90, 100)
#: Bytes in memory that the largest launches may need on AMD's GPUs, whose threads have at most 256
#: registers and which no limit was read off for.
AMD_STACKS = {
    "forward-249-float32-gfx942": 384,
    "backward-185-float32-gfx942": 172,
    "head-64x32-ieee-backward-gfx1100": 276,
}


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One kernel instance for NVIDIA's GPUs of a compute capability, or for one of AMD's."""

    name: str
    operator: str
    capability: int | str = 90
    options: tuple[tuple[str, Any], ...] = ()


def soft_confusion(name: str, capability: int = 90, **options: Any) -> Compilation:
    return Compilation(name, "soft_confusion", capability, tuple(options.items()))


def everywhere(operator: str, name: str, **options: Any) -> tuple[Compilation, ...]:
    return tuple(
        Compilation(f"{name}-sm{capability}", operator, capability, tuple(options.items()))
        for capability in CAPABILITIES
    )


EXTRAS: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    (
        "binary-sigmoid",
        (90,),
        dict(classes=1, target="binary", activation=1, full=True, gamma=2.0, weighted=True),
    ),
    ("dense-min", (90,), dict(classes=3, target="dense", overlap=1)),
    ("mixed-likelihood", (90,), dict(classes=3, likelihood=1, full=True, has_ignore=True)),
    ("focal-background", (90,), dict(classes=4, gamma=0.5, focal=1)),
    (
        "wide-types",
        (90,),
        dict(classes=16, weighted=True, target_type="uint64", weight_type="int64"),
    ),
    ("many-odd", (90,), dict(classes=40, full=True, weighted=True, odd=True)),
    (
        "probabilities",
        CAPABILITIES,
        dict(classes=4, activation=0, target="dense", full=True),
    ),
    ("one-voxel", (90,), dict(classes=3, tiny=True)),
    ("exclude", (90,), dict(classes=4, unlabelled=0)),
    (
        "background",
        CAPABILITIES,
        dict(classes=40, unlabelled=1, target="dense", weighted=True, gamma=0.5, full=True),
    ),
)

#: Of every launch shape of the heads (head_confusion.launch_shape) the ones with the most classes
#: and features, by precision, for labels with softmax and for whatever takes registers.
HEADS: tuple[tuple[bool, str, tuple[tuple[int, int], ...]], ...] = (
    (False, "tf32", ((16, 128), (128, 128), (256, 128))),
    (False, "ieee", ((16, 32), (64, 32), (256, 32), (16, 128), (128, 128))),
    (False, "bfloat16", ((256, 128),)),
    (False, "tf32-full", ((16, 32), (64, 32), (128, 32), (64, 128))),
    (False, "ieee-full", ((16, 32), (64, 32), (128, 32), (64, 128))),
    (True, "tf32", ((16, 64), (16, 128), (128, 32), (64, 64))),
    (True, "ieee", ((16, 128), (32, 64), (64, 32), (128, 16))),
    (True, "bfloat16", ((128, 32),)),
    (True, "tf32-full", ((16, 64), (64, 32), (128, 16))),
    (True, "ieee-full", ((16, 64), (64, 32), (128, 16))),
)
HEAD_FULL = dict(full=True, gamma=0.5, weighted=True, odd=True)
MASKED = dict(target="float32", masked=True, has_ignore=True)


def head_cases() -> Iterator[Compilation]:
    for backward, kind, shapes in HEADS:
        options: dict[str, Any] = {"backward": backward, "exact": kind.startswith("ieee")}
        options["dtype"] = "bfloat16" if kind == "bfloat16" else "float32"
        options |= HEAD_FULL if kind.endswith("full") else {}
        name = f"head-{{}}x{{}}-{kind}-{'backward' if backward else 'forward'}"
        for classes, channels in shapes:
            more = {**options, "classes": classes, "channels": channels}
            yield from everywhere("head_confusion", name.format(classes, channels), **more)
    for backward in (False, True):
        name = f"head-dense-{'backward' if backward else 'forward'}-sm90"
        dense = dict(classes=3, dense=True, likelihood=1, full=True, backward=backward)
        yield Compilation(name, "head_confusion", 90, tuple(dense.items()))


#: What a loss asks for beside its classes: the commonest case, labels with all else, and whatever
#: takes registers, with 8 and with 4 sums. Earlier ones come first.
FEATURES: dict[str, dict[str, Any]] = {
    "": {},
    "-weighted": dict(weighted=True, gamma=0.5),
    "-full": dict(target="dense", likelihood=1, full=True, weighted=True, gamma=0.5),
    "-dense": dict(target="dense", likelihood=1, weighted=True, gamma=0.5),
}
MOST_CLASSES = 300


def launch_class(plan: Any) -> tuple[Any, ...]:
    """What launches have in common of which the one with the most classes needs most registers.

    The logits' type is no part of it: what is computed, and how many voxels a thread holds, is.
    Nor are other strides, for which a thread may take more registers.
    """
    o = plan.options
    return (
        plan.kernel.__name__,
        o.PATH,
        o.CLASSES,
        o.BLOCK,
        plan.num_warps,
        str(o.DTYPE),
        o.STATS,
        o.LOGS,
        o.FOLD > 1,
        o.FOLD > 1 and o.CONTIGUOUS,
    )


def confusion_problems() -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Every kind of problem that the losses' launches tell apart: its name, whether it is the
    backward pass, its options.
    """
    for backward in (False, True):
        for dtype in ("float32", "bfloat16", "float64"):
            for feature, options in FEATURES.items():
                for layout in ("", "-strided"):
                    name = f"{'backward' if backward else 'forward'}-{{}}-{dtype}{layout}{feature}"
                    yield name, backward, {**options, "dtype": dtype, "contiguous": not layout}


def confusion_cases() -> tuple[Compilation, ...]:
    """A case of every class of launches, on every GPU.

    It is the problem with the most classes, of all up to MOST_CLASSES.
    """
    from voxfuse.triton_kernels.soft_confusion import launch

    found: dict[tuple[Any, ...], tuple[int, str, dict[str, Any]]] = {}
    for name, backward, options in confusion_problems():
        for classes in range(2, MOST_CLASSES + 1):
            plan = launch.plan(confusion_problem(classes, **options), backward)
            key = launch_class(plan)
            tiles = plan.options.TILES
            if key not in found or found[key][0] < tiles:
                more = {**options, "classes": classes, "backward": backward}
                found[key] = tiles, name.format(classes), more
    return tuple(
        case
        for _, name, options in found.values()
        for case in everywhere("soft_confusion", name, **options)
    )


CASES = (
    *confusion_cases(),
    *(
        soft_confusion(
            f"{name}-{'backward' if backward else 'forward'}-sm{capability}",
            capability,
            **options,
            backward=backward,
        )
        for name, capabilities, options in EXTRAS
        for backward in (False, True)
        for capability in capabilities
    ),
    *head_cases(),
    *everywhere("finish", "second-stage"),
    *everywhere("ratio_loss", "ratio-loss", classes=4),
    *everywhere(
        "ratio_loss", "ratio-loss-pooled", classes=16, rows=4, pooling=3, absent=1, log=True
    ),
    *everywhere(
        "ratio_loss", "ratio-loss-likelihood", classes=16, rows=4, sums=8, nll=True, off=True
    ),
    *everywhere("ratio_loss", "ratio-loss-tiny", classes=1, tiny=True),
    *everywhere("ratio_loss_backward", "ratio-loss-backward"),
    *(
        case
        for name, options in (
            ("gather", dict(channels=8)),
            ("gather-8-bfloat16", dict(dtype="bfloat16", channels=8)),
            ("gather-dense-total", dict(dense=True, total=True)),
            ("gather-line", dict(axes=1)),
            ("ring", dict(ring=0, channels=4)),
            ("ring-weights", dict(ring=0, weights=True, channels=1, dtype="float64")),
            ("ring-floor", dict(ring=0, channels=4, floor=True)),
            ("ring-total", dict(ring=2, channels=4, dtype="bfloat16", total=True)),
            ("backward", dict(backward=True, channels=8)),
            ("backward-bfloat16", dict(backward=True, dtype="bfloat16")),
            ("sigmoid", dict(channels=8, activation=1)),
            ("softmax-few", dict(channels=8, activation=2)),
            ("softmax-many-bfloat16", dict(channels=8, activation=2, many=True, dtype="bfloat16")),
            ("ring-softmax-few-bfloat16", dict(ring=0, activation=2, dtype="bfloat16")),
            ("ring-softmax-many", dict(ring=2, activation=2, many=True, total=True)),
            ("softmax-normalise", dict(activation=2, normalise=True)),
            ("softmax-normalise-bfloat16", dict(activation=2, normalise=True, dtype="bfloat16")),
            ("softmax-backward", dict(activation=2, backward=True)),
            ("softmax-backward-bfloat16", dict(activation=2, backward=True, dtype="bfloat16")),
            ("sigmoid-backward", dict(activation=1, backward=True, total=True)),
        )
        for case in everywhere("overlap_add", f"fusion-{name}", **options)
    ),
    *(
        Compilation(
            f"finalize-{name}-sm{capability}", "finalize_slab", capability, tuple(options.items())
        )
        for capability in (80, 90, 100)
        for name, options in (
            ("labels-4", dict(mode=1, classes=4)),
            ("labels-117", dict(mode=1, classes=117, total=True, divide=True)),
            ("values-2", dict(mode=0, classes=2, activation=2, output="float16")),
            ("values-117", dict(mode=0, classes=117, activation=2)),
            ("mask", dict(mode=2, classes=3, activation=1, total=True)),
            ("foreground", dict(mode=3, classes=16, activation=2, output="bfloat16")),
            ("entropy", dict(mode=4, classes=16, activation=2)),
            ("labels-head", dict(mode=1, classes=117, head=True)),
            ("double", dict(mode=0, classes=16, activation=2, dtype="float64", output="float64")),
        )
    ),
    *(
        case
        for name, options in (
            ("argmax-4", dict(decision=0, classes=4)),
            ("argmax-117-float64", dict(decision=0, classes=117, dtype="float64", **MASKED)),
            ("threshold", dict(decision=1, classes=16, dtype="bfloat16", dense=True, **MASKED)),
            ("labels", dict(decision=2, classes=117, dtype="int64")),
        )
        for case in everywhere("hard_confusion", f"count-{name}", **options)
    ),
    *(
        case
        for name, options in (
            ("labels", dict(kept=0)),
            ("mask-plane", dict(kept=1, axes=2, dtype="bfloat16")),
            ("values-line", dict(kept=3, axes=1, dtype="uint8", output="float32")),
            ("regions", dict(kept=2, dtype="float64", output="int64", half=True)),
        )
        for case in everywhere("resample_argmax", f"resample-{name}", **options)
    ),
)


#: Kernels that the test of the atomics must refuse.
REFUSED = tuple(
    Compilation(f"floating-sum-{dtype}", "floating_sum", options=(("dtype", dtype),))
    for dtype in ("float32", "float16", "float64")
)


def on_amd() -> tuple[Compilation, ...]:
    """Every kernel for AMD's GPUs, in the commonest launches; for the data centre's in those that
    take the most registers, too.
    """
    names = (
        "forward-2-float32", "forward-97-float32-full", "backward-2-float32",
        "backward-81-float32-full", "second-stage", "ratio-loss", "ratio-loss-backward",
        "head-128x128-ieee-forward", "head-64x32-ieee-backward", "fusion-softmax-normalise",
        "fusion-softmax-backward", "fusion-gather", "fusion-backward", "finalize-values-117",
        "count-argmax-4", "resample-labels",
    )  # fmt: skip
    largest = ("forward-249-float32", "backward-185-float32")
    cases = {case.name: case for case in CASES}
    return tuple(
        dataclasses.replace(cases[f"{name}-sm90"], name=f"{name}-{gpu}", capability=gpu)
        for gpu in AMD
        for name in (names if gpu == "gfx1100" else (*names, *largest))
    )


def compile_case(case: Compilation, disassemble: bool = True) -> dict[str, Any]:
    """Compile one case; return its registers and stack, and instructions if they are asked for."""
    compiled = compile_kernel(case)
    if "amdgcn" in compiled:
        return {"name": case.name, **machine_code.amd_resources(compiled["amdgcn"])}
    return {
        "name": case.name,
        **machine_code.ptx_atomics(compiled["ptx"]),
        **machine_code.resources(compiled["cubin"]),
        **(machine_code.instructions(compiled["cubin"]) if disassemble else {}),
    }


def compile_cubin(case: Compilation) -> bytes:
    """The machine code of one case."""
    return compile_kernel(case)["cubin"]


def compile_kernel(case: Compilation) -> dict[str, Any]:
    """What the compiler makes of one case, by the name of the stage."""
    options = dict(case.options)
    if case.operator == "head_confusion":
        options["amd"] = isinstance(case.capability, str)
    return compile_instance(INSTANCES[case.operator](**options), case.capability)


def main(arguments: list[str]) -> None:
    if arguments:
        names = json.loads(arguments[0])
        results = [
            compile_case(case, names[case.name])
            for case in (*CASES, *REFUSED, *on_amd())
            if case.name in names
        ]
        Path(arguments[1]).write_text(json.dumps(results))
        return
    with tempfile.TemporaryDirectory() as directory:
        everything = {case.name for case in CASES}
        cases = (*CASES, *on_amd())
        print(table(compile_in_parallel(cases, Path(directory), everything)))


if __name__ == "__main__":
    main(sys.argv[1:])
