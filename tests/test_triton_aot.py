"""Every Triton kernel compiled for NVIDIA GPUs, without one: resources and instructions."""

from __future__ import annotations

import importlib
import inspect
import platform
import re

import pytest

from tests.triton_aot import CASES, INSTANCES, REFUSED, STACKS, compile_in_parallel, table

triton = pytest.importorskip("triton", reason="the package triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.system() != "Linux", reason="Triton's assembler for NVIDIA is on Linux only"
    ),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    results = compile_in_parallel((*CASES, *REFUSED), tmp_path_factory.mktemp("triton"))
    print("\n" + table(results))
    return results


def test_names_are_distinct():
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_registers_hold_everything(compiled, case):
    """But for what STACKS admits and explains, mostly the largest heads."""
    entry = compiled[case.name]
    assert entry["registers"] <= 255
    assert entry["shared"] <= 160 << 10  # of the 163 KiB that a program may have on sm_80
    assert entry["local"] == 0
    assert entry["stack"] <= case.stack, f"{case.name} spills {entry['stack']} bytes a thread"


def test_only_heads_may_spill_much():
    assert all(any(case.name.startswith(name) for case in CASES) for name in STACKS)
    assert all(c.operator == "head_confusion" for c in CASES if c.stack > 16)


def test_every_kernel_has_a_case():
    """Every jitted function that a launch names, on every generation of GPUs."""
    jitted = set()
    operators = ("soft_confusion", "ratio_loss", "overlap_add", "finalize_slab", "head_confusion")
    for name in (*operators, "_partial_sums"):
        source = inspect.getsource(importlib.import_module(f"voxfuse.triton_kernels.{name}"))
        jitted |= {f"{name}.{found}" for found in re.findall(r"\b(_\w+)\[\(", source)}
        jitted |= {f"{name}.{found}" for found in re.findall(r"kernel = (_\w+) if", source)}
        jitted |= {f"{name}.{found}" for found in re.findall(r" if backward else (_\w+)", source)}
        jitted |= {f"{name}.{found}" for found in re.findall(r"Plan\((_\w+)", source)}
    compiled = {}
    for case in CASES:
        kernel = INSTANCES[case.operator](**dict(case.options)).kernel
        name = f"{kernel.fn.__module__.rsplit('.')[-1]}.{kernel.fn.__name__}"
        compiled.setdefault(name, set()).add(case.capability)
    assert set(compiled) == jitted
    assert all(found == {80, 90, 100} for found in compiled.values()), compiled


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_atomics_only_count_programs(compiled, case):
    """Sums in an order that the hardware chooses would differ from run to run.

    A kernel whose programs leave rows of partial sums counts the programs that are done, in one
    place, and a fence makes their rows visible before.
    """
    entry = compiled[case.name]
    kernel = INSTANCES[case.operator](**dict(case.options)).kernel
    leaves_rows = kernel.fn.__name__ in ("_forward_resident", "_forward_online", "_head_forward")
    assert entry["atomics"] == 0
    assert entry["counters"] == (1 if leaves_rows else 0)
    assert entry["fences"] >= entry["counters"]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_floating_point_atomics_are_found(compiled, case):
    assert compiled[case.name]["atomics"] > 0
    assert compiled[case.name]["counters"] == 0


@pytest.mark.parametrize(
    ("name", "loads"),
    [
        ("forward-2-float32-sm90", 2),
        ("forward-2-bfloat16-sm90", 2),
        ("forward-2-bfloat16-sm80", 2),
        ("forward-4-float32-sm90", 4),
        ("backward-2-float32-sm90", 2),
        ("backward-2-bfloat16-sm90", 2),
        ("backward-4-float32-sm90", 4),
    ],
)
def test_logits_are_read_and_written_16_bytes_at_a_time(compiled, name, loads):
    entry = compiled[name]
    assert entry["loads_128"] >= loads
    if name.startswith("backward"):
        assert entry["stores_128"] >= loads
