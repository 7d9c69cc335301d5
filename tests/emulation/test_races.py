"""The CUDA kernels' barriers: emulated with real threads under ThreadSanitizer, without a GPU.

Every kernel that uses shared memory, barriers or other blocks' results runs here with one thread of
the operating system a CUDA thread and two blocks at a time. Only what CUDA promises orders memory
(tests/emulation/cuda_emulation_threads.cpp), so that a missing barrier is a data race. Results are
held to the reference as in tests/ops/*/test_cuda.py, which has the larger set of cases.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
import torch

from tests.emulation import emulator
from tests.emulation.hard_confusion import HardConfusion
from tests.ops.hard_confusion.cases import HardCase
from tests.ops.hard_confusion.cases import check as check_counts
from tests.ops.overlap_add.cases import assert_fused, fusion_case
from tests.ops.ratio_loss.cases import check_ratio, with_absent_class
from tests.ops.soft_confusion.cases import ConfusionCase, check
from voxfuse.reference import overlap_add as fusion_reference


def why_not() -> str | None:
    if emulator.missing() is not None:
        return emulator.missing()
    probe = run_broken("right")
    return None if probe.returncode == 0 else f"ThreadSanitizer does not start: {probe.stderr}"


def run_broken(name: str) -> subprocess.CompletedProcess[str]:
    program = emulator.build("broken", ("tests/emulation/broken_main.cpp",), "threads")
    return subprocess.run(
        [*emulator.fixed_addresses(), str(program), name],
        env={**os.environ, **emulator.SANITIZERS},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture(scope="module", autouse=True)
def _thread_sanitizer() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no CUDA emulation with threads: {reason}")


# --- The emulation itself ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("right", [63 - i + 1 for i in range(64)]),
        ("warp_barrier", [1] * 64),
        ("last_block", [1] * 62 + [24, 0]),
    ],
)
def test_correct_kernels_are_not_reported(name, expected):
    result = run_broken(name)
    assert result.returncode == 0, result.stderr
    assert [int(x) for x in result.stdout.split()] == expected


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("missing_barrier", "missing_barrier"),
        ("shuffle_instead_of_barrier", "shuffle_instead_of_barrier"),
        ("last_block_without_fences", "last_block"),
    ],
)
def test_a_missing_barrier_or_fence_is_reported(name, place):
    result = run_broken(name)
    assert result.returncode == 66, result.stderr
    assert "WARNING: ThreadSanitizer: data race" in result.stderr
    assert place in result.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("barrier_in_a_branch", "__syncthreads() after a thread of the block has ended"),
        ("shuffle_in_a_branch", "has ended"),
    ],
)
def test_threads_that_miss_a_barrier_end_the_program(name, message):
    result = run_broken(name)
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.parametrize("barrier", [0, 1, 2])
def test_every_barrier_of_a_shipped_kernel_is_needed(tmp_path, barrier):
    """The epilogue without one of its barriers is reported, whichever it is."""
    source = (emulator.ROOT / "csrc/cuda/ratio_loss.cu").read_text()
    pieces = source.split("__syncthreads();")
    assert len(pieces) == 4
    broken = "__syncthreads();".join(pieces[: barrier + 1])
    broken += ";" + "__syncthreads();".join(pieces[barrier + 1 :])
    (tmp_path / "ratio_loss.cu").write_text(broken)

    class Broken(emulator.RatioLoss):
        NAME = f"ratio_loss_without_barrier_{barrier}"
        SOURCES = (str(tmp_path / "ratio_loss.cu"), *emulator.RatioLoss.SOURCES[1:])

    operators = Broken("threads")
    with pytest.raises(emulator.EmulationFailed, match="ThreadSanitizer: data race"):
        check_ratio(operators, with_absent_class(2, 3, 8), reduction=2, nll_scale=0.5, normaliser=1)


# --- The kernels ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def soft_confusion() -> Iterator[emulator.SoftConfusion]:
    # Two rows of partial sums: several chunks a block, one block beside the other.
    operators = emulator.SoftConfusion("threads", EMULATION_ROWS="2")
    yield operators
    operators.close()


@pytest.mark.parametrize(
    "case",
    [
        ConfusionCase(classes=2, spatial=(2 * 2048 + 70,)),
        ConfusionCase(classes=3, spatial=(2 * 2048 + 70,), full=True, dtype=torch.bfloat16),
        ConfusionCase(classes=6, spatial=(2 * 2048 + 70,), weight=torch.float32),  # cells
        ConfusionCase(classes=16, spatial=(2048 + 70,), dtype=torch.float16),
        ConfusionCase(classes=20, spatial=(2 * 2048 + 70,)),  # many_*<8>
        ConfusionCase(classes=140, spatial=(330,)),  # many_*<16>
        ConfusionCase(classes=3, spatial=(2 * 2048 + 70,), activation="sigmoid", full=True),
        ConfusionCase(classes=2, spatial=(2 * 2048 + 70,), activation="none", dtype=torch.float16),
        ConfusionCase(classes=3, spatial=(2 * 2048 + 70,), dtype=torch.float64, full=True),
        ConfusionCase(classes=10, spatial=(2048 + 70,), likelihood="sigmoid"),  # general
    ],
    ids=lambda case: f"{case.activation}-{case.classes}-{str(case.dtype)[6:]}",
)
def test_soft_confusion(soft_confusion, case):
    check(case, soft_confusion)


@pytest.mark.parametrize("class_pooling", [0, 2])
def test_ratio_loss(class_pooling):
    operators = emulator.RatioLoss("threads")
    for samples, classes, reduction in ((2, 3, 1), (5, 130, 0)):
        check_ratio(
            operators,
            with_absent_class(samples, classes, 8),
            class_pooling=class_pooling,
            reduction=reduction,
            nll_scale=0.5 if reduction else 0.0,
            normaliser=1,
        )
    operators.close()


@pytest.mark.parametrize("decision", ["argmax", "threshold", "labels"])
def test_hard_confusion(decision):
    """Counters in shared memory and in the result; more classes than are counted at one time."""
    operators = HardConfusion("threads")
    for case in (
        HardCase(decision, 3, batch=1, spatial=(1100,), mask=torch.uint8),
        HardCase(decision, 9, batch=2, spatial=(30,), ignore_index=1),
        HardCase("labels", 1030, batch=1, spatial=(5,)),
    ):
        check_counts(case, operators.hard_confusion)
    operators.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fusion(dtype):
    operators = emulator.OverlapAdd("threads")
    patch, volume = (3, 4, 16), (20, 9, 40)
    patches, origins, rows, tables, _ = fusion_case(patch, volume, 14, 6, dtype)
    assert_fused(
        operators.overlap_add(patches, origins, rows, tables, None, volume),
        lambda p: fusion_reference.overlap_add(p, origins, rows, tables, None, volume),
        patches,
        dtype,
        "overlap_add",
    )
    grad = torch.randn(6, *volume, dtype=torch.float64).to(dtype)
    assert_fused(
        operators.overlap_add_backward(grad, origins, rows, tables, None),
        lambda g: fusion_reference.overlap_add_backward(g, origins, rows, tables, None),
        grad,
        dtype,
        "overlap_add_backward",
    )
    ring = torch.zeros(6, *volume, dtype=torch.promote_types(dtype, torch.float32))
    operators.overlap_add_(ring, patches, origins, rows, tables, None, 0, 0, volume[0])
    expected = ring.clone().zero_()
    fusion_reference.overlap_add_(
        expected, patches.to(ring.dtype), origins, rows, tables, None, 0, 0, volume[0]
    )
    torch.testing.assert_close(ring, expected, rtol=1e-5, atol=1e-5)
    many = torch.randn(14, 9, *patch).to(dtype)  # a softmax in two launches
    ring = torch.zeros(9, *volume, dtype=torch.promote_types(dtype, torch.float32))
    expected = ring.clone()
    place = (origins, rows, tables, None, 0, 0, volume[0], 0, 0.0, 2)
    operators.overlap_add_(ring, many, *place)
    fusion_reference.overlap_add_(expected, many.to(ring.dtype), *place)
    torch.testing.assert_close(ring, expected, rtol=1e-5, atol=1e-5)
    total = torch.zeros(volume, dtype=torch.float64)
    operators.overlap_weights_(total, origins, rows, tables, 0, 0, volume[0])
    expected = total.clone().zero_()
    fusion_reference.overlap_weights_(expected, origins, rows, tables, 0, 0, volume[0])
    torch.testing.assert_close(total, expected, rtol=1e-14, atol=0)
    operators.close()
