"""Compile the Triton kernels ahead of time and read their resources off the machine code.

No GPU is needed. Triton's interpreter must be off in the process that compiles, so that the tests
run this file as a program. By hand, ``python -m tests.triton_aot`` prints the table of all cases.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TYPES = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float64": "*fp64",
    "uint8": "*u8",
    "int64": "*i64",
}

CAPABILITIES = (80, 90, 100)

#: Bytes that a thread may keep in memory, by the beginning of a case's name; 0 for all others. The
#: heads hold a tile's logits, and backward the weight's gradient beside them, in registers: with
#: 255 of those a thread, the largest that are admitted (in_registers) do not fit by some words.
#: More warps make it worse, and through memory chunk by chunk all logits would be written. For
#: sm_100 the assembler keeps up to four words of two kernels although it has registers to spare.
STACKS = {
    "head-16-exact-backward": 16,
    "head-16-full-backward": 16,
    "head-117-backward": 32,
    "head-250-forward": 80,
    "head-128x64-backward": 448,
    "online-full-backward-sm100": 16,
    "probabilities-forward-sm100": 16,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel instance."""

    name: str
    operator: str
    capability: int = 90
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def stack(self) -> int:
        """Bytes that a thread may keep in memory."""
        return next((size for name, size in STACKS.items() if self.name.startswith(name)), 0)


def soft_confusion(name: str, capability: int = 90, **options: Any) -> Case:
    return Case(name, "soft_confusion", capability, tuple(options.items()))


def everywhere(operator: str, name: str, **options: Any) -> tuple[Case, ...]:
    return tuple(
        Case(f"{name}-sm{capability}", operator, capability, tuple(options.items()))
        for capability in CAPABILITIES
    )


EXTRAS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("online", dict(classes=300)),
    ("online-full", dict(classes=300, full=True)),
    (
        "binary-sigmoid",
        dict(classes=1, target="binary", activation=1, full=True, gamma=2.0, weighted=True),
    ),
    ("dense-min", dict(classes=3, target="dense", overlap=1)),
    ("mixed-likelihood", dict(classes=3, likelihood=1, full=True, gamma=0.5)),
    ("many-full", dict(classes=40, full=True, weighted=True, odd=True)),
    ("focal-weighted", dict(classes=4, gamma=2.0, weighted=True, has_ignore=True)),
    ("focal-background", dict(classes=4, gamma=0.5, focal=1)),
    ("probabilities", dict(classes=4, activation=0, target="dense", full=True)),
    ("channels-last", dict(classes=4, dtype="bfloat16", contiguous=False)),
    ("one-voxel", dict(classes=3, tiny=True)),
)

HEADS: tuple[tuple[str, bool, tuple[int, ...], dict[str, Any]], ...] = (
    ("2", False, (90,), dict(classes=2, dtype="bfloat16")),
    ("2", True, (90,), dict(classes=2, dtype="bfloat16")),
    ("4", False, CAPABILITIES, dict(classes=4)),
    ("4", True, (90,), dict(classes=4)),
    ("16-exact", False, (90,), dict(classes=16, exact=True)),
    ("16-exact", True, CAPABILITIES, dict(classes=16, exact=True)),
    ("16-full", False, (90,), dict(classes=16, full=True, gamma=2.0, weighted=True, odd=True)),
    (
        "16-full",
        True,
        CAPABILITIES,
        dict(classes=16, full=True, gamma=2.0, weighted=True, odd=True),
    ),
    ("dense", False, (90,), dict(classes=3, dense=True, likelihood=1, full=True)),
    ("dense", True, (90,), dict(classes=3, dense=True, likelihood=1, full=True)),
    ("117", False, (90,), dict(classes=117, dtype="bfloat16")),
    ("117", True, CAPABILITIES, dict(classes=117, dtype="bfloat16")),
    ("117-float32", False, (90,), dict(classes=117)),
    ("60-float16", True, (80, 90), dict(classes=60, dtype="float16")),
    ("250", False, CAPABILITIES, dict(classes=250, dtype="bfloat16")),
    ("128x64", True, CAPABILITIES, dict(classes=128, channels=64, dtype="bfloat16")),
)
CASES = (
    *(
        soft_confusion(
            f"{'backward' if backward else 'forward'}-{classes}-{dtype}-sm{capability}",
            capability,
            classes=classes,
            dtype=dtype,
            backward=backward,
        )
        for backward in (False, True)
        for classes, dtype, capability in (
            (2, "float32", 90),
            (2, "bfloat16", 90),
            (2, "bfloat16", 80),
            (2, "float16", 100),
            (4, "float32", 90),
            (4, "bfloat16", 80),
            (4, "bfloat16", 100),
            (8, "bfloat16", 90),
            (16, "float32", 90),
            (32, "bfloat16", 90),
            (117, "float32", 90),
            (117, "bfloat16", 80),
            (2, "float64", 90),
            # What takes the most registers, and a kernel of every other kind, everywhere.
            (16, "bfloat16", 100),
            (117, "float32", 80),
            (117, "float32", 100),
        )
    ),
    *(
        soft_confusion(
            f"{name}-{'backward' if backward else 'forward'}-sm{capability}",
            capability,
            **options,
            backward=backward,
        )
        for backward in (False, True)
        for name, capability, options in (
            (name, capability, options)
            for capability in CAPABILITIES
            for name, options in EXTRAS
            if capability == 90 or name in ("online-full", "probabilities")
        )
    ),
    *(
        Case(
            f"head-{name}-{'backward' if backward else 'forward'}-sm{capability}",
            "head_confusion",
            capability,
            (*options.items(), ("backward", backward)),
        )
        for name, backward, capabilities, options in HEADS
        for capability in capabilities
    ),
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
            ("gather", dict(dtype="float32")),
            ("gather-8-bfloat16", dict(dtype="bfloat16", channels=8)),
            ("gather-dense-total", dict(dense=True, total=True)),
            ("gather-line", dict(axes=1)),
            ("ring", dict(ring=0, channels=4)),
            ("ring-weights", dict(ring=0, weights=True, channels=1, dtype="float64")),
            ("ring-floor", dict(ring=0, channels=4, floor=True)),
            ("ring-total", dict(ring=2, channels=4, dtype="bfloat16", total=True)),
            ("backward", dict(backward=True, dtype="bfloat16")),
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
        Case(f"finalize-{name}-sm{capability}", "finalize_slab", capability, tuple(options.items()))
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
)

#: Kernels that the test of the atomics must refuse.
REFUSED = tuple(
    Case(f"floating-sum-{dtype}", "floating_sum", options=(("dtype", dtype),))
    for dtype in ("float32", "float16", "float64")
)


@dataclasses.dataclass
class Instance:
    """A kernel with the types and compile-time values of its parameters."""

    kernel: Any
    constants: dict[str, Any]
    types: dict[str, Any]
    num_warps: int = 4
    multiples_of_16: tuple[str, ...] = ()
    registers: int | None = None  # that the launch allows a thread, on NVIDIA


def _soft_confusion_instance(
    classes: int,
    dtype: str = "float32",
    backward: bool = False,
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
) -> Instance:
    import torch

    from voxfuse.triton_kernels import soft_confusion as kernels
    from voxfuse.triton_kernels._partial_sums import shape_of_rows

    kinds = {"labels": 0, "dense": 1, "indicator": 2, "binary": 3}
    problem = kernels.Problem(
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
    )
    plan = kernels.plan(problem, backward)
    constants = dict(plan.constants)
    if not backward:
        constants |= shape_of_rows(classes * problem.sums, plan.num_warps)
    pointer = TYPES[dtype]
    unit = ("input_v", "output_v") if contiguous else ("input_c", "output_c")
    types: dict[str, Any] = {
        "input": pointer,
        "output": pointer,
        "target": TYPES["float32" if target == "dense" else "uint8"],
        "weight": TYPES["float32"] if weighted else None,
        "partial": "*fp64",
        "result": "*fp64",
        "counters": "*i32",
        "grad": "*fp64",
        "gamma": "fp64",
        **dict.fromkeys((*unit, "target_v", "weight_v"), 1),
    }
    strides = ("voxels", "input_b", "input_c", "target_b", "target_c", "weight_b")
    strides += ("output_b", "output_c")
    if tiny:
        types |= dict.fromkeys((*strides, "chunks", "tiles_a_chunk", "tiles_a_program"), 1)
    return Instance(
        plan.kernel,
        constants,
        types,
        plan.num_warps,
        () if odd else tuple(name for name in strides if types.get(name) != 1),
    )


def _finish_instance() -> Instance:
    from voxfuse.triton_kernels import _partial_sums as kernels

    types = {"partial": "*fp64", "result": "*fp64"}
    return Instance(kernels._finish, kernels.shape_of_rows(8, 4), types)


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
) -> Instance:
    import torch

    from voxfuse.triton_kernels import head_confusion as kernels
    from voxfuse.triton_kernels._partial_sums import shape_of_rows

    shape = (63, 63, 63) if odd else (64, 64, 64)
    features = torch.empty((1, channels, *shape), dtype=getattr(torch, dtype), device="meta")
    target = torch.empty((1, classes if dense else 1, *shape), device="meta")
    assert kernels.in_registers(features, classes, backward), "goes through memory chunk by chunk"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if exact else "high")
    constants, num_warps = kernels.constants(
        features,
        classes,
        target,
        (2, likelihood, 0, None, gamma),
        8 if full else 4,
        interpreting=False,
    )
    torch.set_float32_matmul_precision(before)
    if not backward:
        constants |= shape_of_rows(classes * constants["SUMS"], num_warps)
    else:
        constants |= {"NEED_FEATURES": need_features, "NEED_HEAD": need_head}
        constants["GRADIENT_PRECISION"] = constants["PRECISION"]
        num_warps = kernels.backward_warps(num_warps, constants)
    pointer = TYPES[dtype]
    types: dict[str, Any] = {
        **dict.fromkeys(("features", "weight", "bias", "output"), pointer),
        "target": TYPES["float32" if dense else "uint8"],
        "voxel_weight": TYPES["float32"] if weighted else None,
        "partial": "*fp64",
        "result": "*fp64",
        "counters": "*i32",
        "grad": "*fp64",
        "gamma": "fp64",
        **dict.fromkeys(("features_v", "target_v", "weight_v", "output_v"), 1),
    }
    strides = ("voxels", "features_b", "features_c", "target_b", "target_c", "weight_b")
    strides += ("output_b", "output_c", "channels")
    kernel = kernels._head_backward if backward else kernels._head_forward
    aligned = () if odd else strides
    return Instance(kernel, constants, types, num_warps, aligned, kernels.REGISTERS)


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

    constants = kernels.forward_constants(
        sums,
        rows,
        classes,
        True,
        nll,
        off,
        False,
        pooling,
        absent,
        1,
        2 if off else 1,
        log,
        not log,
    )
    scalars = [f"{letter}{i}" for letter in "nd" for i in range(8)]
    scalars += ["smooth_nr", "smooth_dr", "min_denominator", "exponent", "ratio_scale"]
    scalars += ["nll_scale", "off_scale"]
    weight = "*fp64" if nll else None
    types: dict[str, Any] = {"stats": "*fp64", "loss": "*fp32", "cotangents": "*fp64"}
    types |= dict.fromkeys(("class_weight", "nll_weight", "off_weight"), weight)
    types |= dict.fromkeys(scalars, "fp64")
    if tiny:
        types |= dict.fromkeys(("samples", "rows", "classes", "first_class", "terms"), 1)
    return Instance(kernels._forward, constants, types)


def _ratio_loss_backward_instance() -> Instance:
    from voxfuse.triton_kernels import ratio_loss as kernels

    types = {"grad_loss": "*fp32", "cotangents": "*fp64", "result": "*fp64"}
    return Instance(kernels._backward, {"SUMS": 4, "BY_CLASS": True, "BLOCK": 1024}, types)


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

    from voxfuse.triton_kernels import overlap_add as kernels

    height, width = kernels.tile_shape(1 if axes == 1 else 96, 96)
    constants: dict[str, Any] = {
        "AXES": axes,
        "DENSE": dense,
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": width,
        "DTYPE": kernels._accumulation(getattr(torch, dtype)),
    }
    if not backward:
        constants |= {"RING": ring, "ADD": ring >= 0, "WEIGHTS": weights}
        constants["ORIGINS"] = kernels.ORIGINS
    if activation or not backward:
        constants |= {"ACTIVATION": activation, "STEP": kernels.STEP}
    pointer = TYPES[dtype]
    types: dict[str, Any] = {
        "softmax": "*fp32" if many or normalise else None,
        "patches": None if weights else pointer,
        "output": "*fp32" if ring >= 0 and not weights else pointer,
        "grad": pointer,
        "result": pointer,
        "origins": "*i64",
        "rows": "*i64",
        "table_z": "*fp64" if axes > 2 and not dense else None,
        "table_y": "*fp64" if axes > 1 and not dense else None,
        "table_x": "*fp64",
        "total": "*fp64" if total else None,
        **dict.fromkeys(("floor", "cover_z", "cover_y", "cover_x"), "*fp64" if floor else None),
        "patches_x": 1,
    }
    if axes == 1:
        ones = ("size_z", "size_y", "patch_z", "patch_y", "length_z", "length_y")
        types |= dict.fromkeys(ones, 1)
    kernel, registers = kernels._gather, kernels.REGISTERS
    if backward:
        kernel, registers = kernels._scatter_activated if activation else kernels._scatter, None
    if normalise:
        kernel, registers = kernels._normalise, None
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return Instance(kernel, constants, types, 4, ("size_x",), registers)


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
    from voxfuse.triton_kernels import overlap_add

    constants: dict[str, Any] = {
        "MODE": mode,
        "ACTIVATION": activation,
        "BINARY": activation == 1,
        "DIVIDE": divide,
        "CLEAR": True,
        "DTYPE": overlap_add._accumulation(getattr(torch, dtype)),
        **kernels.tiles(classes, 128**3),
    }
    pointer = TYPES[dtype]
    types: dict[str, Any] = {
        "ring": pointer,
        "out": TYPES[output or ("uint8" if mode in (1, 2) else "float32")],
        "total": "*fp64" if total else None,
        "weight": pointer if head else None,
        "bias": pointer if head else None,
        "outer": 1,
        **dict.fromkeys(("divisor", "threshold", "fill"), "fp64"),
    }
    lengths = ("turn", "first", "before", "voxels", "out_channel", "out_outer")
    return Instance(kernels._finalize, constants, types, multiples_of_16=lengths)


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
    "floating_sum": _floating_sum_instance,
}


def compile_case(case: Case) -> dict[str, Any]:
    """Compile one case; return its registers, stack and instructions that matter."""
    return {"name": case.name, **_resources(compile_cubin(case))}


def compile_cubin(case: Case) -> bytes:
    """The machine code of one case."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from voxfuse.triton_kernels._common import LAUNCH_OPTIONS

    instance = INSTANCES[case.operator](**dict(case.options))
    signature, constants, attributes = {}, dict(instance.constants), {}
    for position, name in enumerate(instance.kernel.arg_names):
        kind = instance.types.get(name, "i32")
        if name in instance.constants:
            signature[name] = "constexpr"
        elif kind is None or kind == 1:
            # What Triton does with None and with integers that are 1.
            signature[name], constants[name] = "constexpr", kind
        else:
            signature[name] = kind
            if kind.startswith("*") or name in instance.multiples_of_16:
                attributes[(position,)] = [["tt.divisibility", 16]]
    limit = {} if instance.registers is None else {"maxnreg": instance.registers}
    source = ASTSource(instance.kernel, signature, constants, attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", case.capability, 32),
        options={"num_warps": instance.num_warps, **LAUNCH_OPTIONS, **limit},
    )
    cubin: bytes = compiled.asm["cubin"]
    return cubin


def _resources(cubin: bytes) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, f"cuobjdump reports no resources: {usage}"
    registers, stack, shared, local = map(int, found.groups())
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9.]+)", code, re.M)
    counts = collections.Counter(instructions)
    return {
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "local": local,
        "instructions": len(instructions),
        "loads_128": sum(n for name, n in counts.items() if re.match(r"LDG.*\.128", name)),
        "stores_128": sum(n for name, n in counts.items() if re.match(r"STG.*\.128", name)),
        **_atomics(counts),
        "fences": sum(n for name, n in counts.items() if re.match(r"MEMBAR\..*GPU", name)),
    }


def _atomics(counts: dict[str, int]) -> dict[str, int]:
    """Integer additions that every GPU thread sees, which count, and all other atomics."""
    found = {"counters": 0, "atomics": 0}
    for name, n in counts.items():
        if re.fullmatch(r"(ATOMG?|REDG?)\.E\.ADD(\.S32)?\.STRONG\.GPU", name):
            found["counters"] += n
        # On sm_100 bits in shared memory say which tensor memory is taken: they add nothing up.
        elif re.match(r"(RED|ATOM)[GS]?\.", name) and name not in ("ATOMS.OR", "ATOMS.AND"):
            found["atomics"] += n
    return found


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def compile_in_parallel(cases: tuple[Case, ...], directory: Path) -> dict[str, dict[str, Any]]:
    """Compile ``cases`` in two processes without the interpreter; results by name."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(directory / "cache"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONWARNINGS": "ignore",
    }
    root = Path(__file__).resolve().parent.parent
    workers = []
    for part in range(2):
        names = json.dumps([case.name for case in cases[part::2]])
        output = directory / f"part{part}.json"
        command = [sys.executable, "-m", "tests.triton_aot", names, str(output)]
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        workers.append((process, output))
    results: dict[str, dict[str, Any]] = {}
    for process, output in workers:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        results |= {entry["name"]: entry for entry in json.loads(output.read_text())}
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """The resources of every case, one a line."""
    columns = ("registers", "stack", "shared", "instructions", "loads_128", "stores_128")
    lines = [f"{'kernel':36}" + "".join(f"{column:>13}" for column in columns)]
    for name, entry in results.items():
        lines.append(f"{name:36}" + "".join(f"{entry[column]:>13}" for column in columns))
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if arguments:
        names = set(json.loads(arguments[0]))
        results = [compile_case(case) for case in (*CASES, *REFUSED) if case.name in names]
        Path(arguments[1]).write_text(json.dumps(results))
        return
    with tempfile.TemporaryDirectory() as directory:
        print(table(compile_in_parallel(CASES, Path(directory))))


if __name__ == "__main__":
    main(sys.argv[1:])
