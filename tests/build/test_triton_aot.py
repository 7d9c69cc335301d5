"""Every Triton kernel compiled for NVIDIA GPUs, without one: resources and instructions."""

from __future__ import annotations

import collections
import importlib
import inspect
import itertools
import pkgutil
import platform
import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="the package triton is not installed")
import voxfuse.triton_kernels  # noqa: E402
from tests.build.kernel_instances import INSTANCES, confusion_problem  # noqa: E402
from tests.build.triton_aot import (  # noqa: E402
    AMD,
    AMD_STACKS,
    CAPABILITIES,
    CASES,
    REFUSED,
    compile_in_parallel,
    confusion_problems,
    launch_class,
    on_amd,
    table,
)
from voxfuse.triton_kernels.head_confusion import launch as heads  # noqa: E402
from voxfuse.triton_kernels.overlap_add import launch as fusion  # noqa: E402
from voxfuse.triton_kernels.soft_confusion import launch as soft_confusion  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.system() != "Linux", reason="Triton's assembler for NVIDIA is on Linux only"
    ),
]


#: 16-byte loads at least, and stores in the backward pass.
VECTORS = {
    "forward-2-float32-sm90": 2,
    "forward-2-bfloat16-sm90": 2,
    "forward-2-bfloat16-sm80": 2,
    "forward-4-float32-sm90": 4,
    "backward-2-float32-sm90": 2,
    "backward-2-bfloat16-sm90": 2,
    "backward-8-float32-sm90": 8,
}


#: Every case, on the generation that all of them are compiled for.
FIRST = tuple(case for case in CASES if case.capability == 90)
#: Operators whose kernels are compiled for the other generations only where they are close to the
#: registers that a thread may have. The others' take a third of a second each.
LARGE = ("soft_confusion", "head_confusion")
#: Operators whose kernels are compiled for all of them: products of matrices are other instructions
#: on each, and float64 has been seen to spill on one alone.
EVERYWHERE = ("head_confusion", "ratio_loss")
#: The part of those registers that is close. Of the large cases compiled for several generations
#: none took over 28 % more there than on sm_90.
CLOSE = 1 / 1.28


def instance_of(case):
    return INSTANCES[case.operator](**dict(case.options))


def kernel_of(case):
    return instance_of(case).kernel.fn


def generations(case):
    """The case on every generation."""
    return [x for x in CASES if (x.operator, x.options) == (case.operator, case.options)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the compiler makes of every case for sm_90, of the refused kernels, and for AMD.

    And for sm_80 and sm_100, of every kernel the case with the most registers. Of the others, those
    of the large ones that are close to the registers they may have and all of the small ones are
    compiled for one of the two in turn, for what is compiled is the same until registers are
    assigned; for both, those in EVERYWHERE. The instructions of one case of every kernel and
    generation are counted.
    """
    directory = tmp_path_factory.mktemp("triton")
    # The last ones: a kernel's cases with the most options.
    counted = {kernel_of(case): case.name for case in FIRST}.values()
    cases = (*FIRST, *REFUSED, *on_amd())
    named = {*VECTORS, *counted, *(case.name for case in REFUSED)}
    results = compile_in_parallel(cases, directory, named)

    def registers(case):
        return results[case.name]["registers"]

    everywhere = [case for case in FIRST if len(generations(case)) > 1]
    most = {kernel_of(case): case for case in sorted(everywhere, key=registers)}.values()
    chosen = [
        x
        for x in everywhere
        if x.operator not in LARGE or registers(x) > CLOSE * (instance_of(x).registers or 255)
    ]
    in_turn = [case for case in chosen if case.operator not in EVERYWHERE]
    both = [*most, *(case for case in chosen if case not in in_turn)]
    again = {x for case in both for x in generations(case)}
    # The first and the last of three generations.
    again |= {generations(case)[i % 2 * 2] for i, case in enumerate(in_turn)}
    again |= {case for case in CASES if case.name in VECTORS}
    named = {*VECTORS, *(case.name for first in most for case in generations(first))}
    others = tuple(case for case in CASES if case in again and case.name not in results)
    results |= compile_in_parallel(others, directory, named)
    print("\n" + table(results))
    return results


def test_names_are_distinct():
    assert len({case.name for case in CASES}) == len(CASES)
    assert {x for case in FIRST for x in generations(case)} == set(CASES)


@pytest.mark.parametrize("case", FIRST, ids=lambda case: case.name)
def test_registers_hold_everything(compiled, case):
    for name in (x.name for x in generations(case) if x.name in compiled):
        entry = compiled[name]
        assert entry["registers"] <= 255
        assert entry["shared"] <= 160 << 10  # of the 163 KiB that a program may have on sm_80
        assert entry["local"] == 0
        assert entry["stack"] == 0, f"{name} spills {entry['stack']} bytes a thread"


def test_every_kernel_has_a_case(compiled):
    """Every jitted function that a launch names is compiled for every generation of GPUs."""
    launched = set()
    package = voxfuse.triton_kernels
    forms = (
        r"\b(\w+)\[[^][]+\]\(",
        r"kernel = (\w+) if",
        r" if backward else (\w+)",
        r"Launch\(\s*(\w+)",
    )
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        source = inspect.getsource(module)
        names = {name for form in forms for name in re.findall(form, source)}
        found = (getattr(module, name, None) for name in names)
        launched |= {kernel.fn for kernel in found if hasattr(kernel, "arg_names")}
    found = {}
    for case in (*CASES, *on_amd()):
        if case.name in compiled:
            found.setdefault(kernel_of(case), set()).add(case.capability)
    assert set(found) == launched
    assert all(where == {80, 90, 100, *AMD} for where in found.values()), found


@pytest.mark.parametrize("case", [*FIRST, *on_amd()], ids=lambda case: case.name)
def test_atomics_only_count_programs(compiled, case):
    """Sums in an order that the hardware chooses would differ from run to run.

    A kernel whose programs leave rows of partial sums counts the programs that are done, in one
    place; what counts voxels adds whole numbers, of four kinds. What the assembler makes of it is
    read from one case of every kernel and generation: a fence makes the rows visible before.
    """
    leaves_rows = kernel_of(case).__name__ in (
        "forward_resident",
        "forward_online",
        "head_forward",
    )
    counts = case.operator == "hard_confusion"
    every = (case,) if case.capability in AMD else generations(case)
    for entry in (compiled[x.name] for x in every if x.name in compiled):
        assert entry["atomics"] == 0, entry["name"]
        assert entry["counters"] == (4 if counts else 1 if leaves_rows else 0), entry["name"]
        if "machine_atomics" in entry:
            assert entry["machine_atomics"] == 0, entry["name"]
            assert entry["machine_counters"] == entry["counters"], entry["name"]
            assert counts or entry["fences"] >= entry["counters"], entry["name"]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_floating_point_atomics_are_found(compiled, case):
    entry = compiled[case.name]
    assert entry["atomics"] > 0
    assert entry["machine_atomics"] > 0
    assert entry["counters"] == entry["machine_counters"] == 0


@pytest.mark.parametrize("case", on_amd(), ids=lambda case: case.name)
def test_amd_compiles_every_kernel(compiled, case):
    """And its registers hold everything; none has run."""
    entry = compiled[case.name]
    assert 0 < entry["registers"] <= 512
    assert entry["stack"] <= AMD_STACKS.get(case.name, 0), entry


@pytest.mark.parametrize("name", VECTORS)
def test_logits_are_read_and_written_16_bytes_at_a_time(compiled, name):
    entry = compiled[name]
    assert entry["loads_128"] >= VECTORS[name]
    if name.startswith("backward"):
        assert entry["stores_128"] >= VECTORS[name]


def test_every_launch_shape_of_the_losses_has_a_case():
    """On all generations, with at least as many classes in registers."""
    tiles: dict[tuple[object, ...], int] = {}
    for case in CASES:
        if case.operator == "soft_confusion":
            other = ("target_type", "weight_type", "backward")
            options = {name: value for name, value in case.options if name not in other}
            plan = soft_confusion.plan(confusion_problem(**options), dict(case.options)["backward"])
            key = (case.capability, *launch_class(plan))
            tiles[key] = max(tiles.get(key, 0), plan.options.TILES)
    more = {"target": "binary", "activation": 1, "likelihood": 0, "full": False}
    for _, backward, options in confusion_problems():
        for change in ({}, {"full": True}, {"gamma": 2.0}, {"weighted": True}, more):
            given = {**options, **change}
            # A single class has no labels.
            for classes in range(1 if change is more else 2, 301, 7):
                plan = soft_confusion.plan(confusion_problem(classes, **given), backward)
                for capability in CAPABILITIES:
                    key = (capability, *launch_class(plan))
                    assert tiles.get(key, -1) >= plan.options.TILES, (given, classes)


def test_every_tile_of_the_fusion_has_a_case():
    """At the most channels and with nothing else, everywhere."""
    most = {False: fusion.MAX_CHANNELS, True: fusion.MAX_CHANNELS // 2}
    for capability in CAPABILITIES:
        options = [dict(c.options) for c in CASES if c.capability == capability]
        for launch in ({}, {"ring": 0}, {"backward": True}):
            assert {**launch, "channels": most["ring" in launch]} in options, launch
        assert {"mode": 0, "classes": 117, "activation": 2} in options


def test_every_launch_shape_of_the_heads_has_a_case():
    """On all generations, with at least as many classes and features."""

    def launch(classes, channels, dtype, fast, exact, backward):
        rows, columns = heads.padded(classes), heads.padded(channels)
        return (
            fast,
            exact,
            backward,
            *heads.launch_shape(rows, columns, dtype, fast, exact, backward)[:2],
        )

    compiled = collections.defaultdict(set)
    for case in CASES:
        given = dict(case.options)
        if case.operator == "head_confusion" and "channels" in given:
            size = given["classes"], given["channels"]
            fast = not given.get("full", False)
            kind = launch(
                *size, getattr(torch, given["dtype"]), fast, given["exact"], given["backward"]
            )
            compiled[case.capability, kind].add(size)
    before = torch.get_float32_matmul_precision()
    try:
        for exact, fast, backward, half in itertools.product((False, True), repeat=4):
            torch.set_float32_matmul_precision("highest" if exact else "high")
            for classes, channels in itertools.product((16, 32, 64, 128, 256), (16, 32, 64, 128)):
                dtype = torch.bfloat16 if half and not exact else torch.float32
                if heads.in_registers(dtype, classes, channels, fast, backward):
                    kind = launch(classes, channels, dtype, fast, exact, backward)
                    for capability in CAPABILITIES:
                        sizes = compiled[capability, kind]
                        assert any(
                            most >= classes and columns >= channels for most, columns in sizes
                        ), (classes, channels, kind)
    finally:
        torch.set_float32_matmul_precision(before)
