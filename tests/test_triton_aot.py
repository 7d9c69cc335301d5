"""Every Triton kernel compiled for NVIDIA GPUs, without one: resources and instructions."""

from __future__ import annotations

import platform

import pytest

from tests.triton_aot import CASES, compile_in_parallel, table

triton = pytest.importorskip("triton", reason="the package triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.system() != "Linux", reason="Triton's assembler for NVIDIA is on Linux only"
    ),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    results = compile_in_parallel(CASES, tmp_path_factory.mktemp("triton"))
    print("\n" + table(results))
    return results


def test_names_are_distinct():
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_without_spills_that_matter(compiled, case):
    entry = compiled[case.name]
    assert entry["registers"] <= 255
    assert entry["local"] == 0
    # The assembler trades a few words that do not change in the inner loop for occupancy.
    allowed = 0 if case.fast else 64
    assert entry["stack"] <= allowed, f"{case.name} spills {entry['stack']} bytes a thread"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_atomics(compiled, case):
    """Sums in an order that the hardware chooses would differ from run to run."""
    assert compiled[case.name]["atomics"] == 0


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
