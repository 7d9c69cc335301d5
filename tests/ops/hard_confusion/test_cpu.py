"""hard_confusion on the CPU: the reference by its definition, the C++ kernel by the reference."""

from __future__ import annotations

import dataclasses
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import voxfuse
from tests.ops.hard_confusion.cases import (
    INTEGERS,
    LABELS,
    MASKS,
    HardCase,
    arguments,
    check,
    random_case,
)
from voxfuse import _library
from voxfuse.contract import Activation, Decision
from voxfuse.reference.hard_confusion import least_above

BACKENDS = ["reference", "auto"]
compiled = pytest.mark.skipif(
    not _library.defines_operators(), reason="the compiled CPU library is not built"
)


def counted_voxel_by_voxel(input, target, mask, decision, least, num_classes, ignore_index):
    """The definition, in plain Python."""
    batch = input.shape[0]
    classes = num_classes or input.shape[1]
    dense = decision != Decision.labels and (
        classes == 1 or (target.ndim == input.ndim and target.shape[1] == classes)
    )
    z = input.reshape(batch, 1 if num_classes else classes, -1).tolist()
    g = target.reshape(batch, classes if dense else 1, -1).tolist()
    m = None if mask is None else mask.reshape(batch, -1).tolist()
    counts = torch.zeros(batch, classes, 4, dtype=torch.int64)
    for b in range(batch):
        for v in range(len(z[b][0])):
            if m is not None and m[b][v] == 0:
                continue
            column = [row[v] for row in z[b]]
            greatest = 0
            for c, x in enumerate(column):
                best = column[greatest]
                if not math.isnan(best) and (math.isnan(x) or x > best):
                    greatest = c
            for c in range(classes):
                label = g[b][c if dense else 0][v]
                if label == ignore_index:
                    continue
                true = label == (1 if dense else c)
                predicted = {
                    Decision.argmax: greatest == c,
                    Decision.threshold: column[c if num_classes is None else 0] >= least,
                    Decision.labels: column[0] == c,
                }[decision]
                counts[b, c, 2 * (not predicted) + (predicted != true)] += 1
    # (predicted, true): TP 0, FP 1, TN 2, FN 3
    return counts[..., [0, 1, 3, 2]]


@pytest.mark.parametrize("part", range(4))
def test_the_reference_counts_what_the_definition_says(part):
    for seed in range(part, 120, 4):
        given = arguments(random_case(seed, most_voxels=30))
        expected = counted_voxel_by_voxel(*given)
        assert torch.equal(torch.ops.voxfuse_reference.hard_confusion(*given), expected), seed


@compiled
@pytest.mark.parametrize("part", range(4))
def test_the_kernel_counts_what_the_reference_counts(part):
    for seed in range(1000 + part, 1600, 4):
        check(random_case(seed), torch.ops.voxfuse.hard_confusion)


@compiled
@pytest.mark.parametrize("decision", list(Decision.__members__))
def test_several_ranges_and_blocks(decision):
    """More voxels than a task has, of few and of many classes, the last block not whole."""
    for classes, layout in ((2, "contiguous"), (21, "contiguous"), (21, "channels_last")):
        case = HardCase(
            decision, classes, spatial=(35, 31, 37), layout=layout, mask=torch.uint8, ignore_index=1
        )
        check(case, torch.ops.voxfuse.hard_confusion)
        half = dataclasses.replace(case, dtype=torch.bfloat16, target_dtype=torch.uint8)
        check(half, torch.ops.voxfuse.hard_confusion)


@compiled
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_every_instruction_set_counts_alike(capability):
    """In a process of its own: the choice is made once."""
    script = (
        "import torch\n"
        "from tests.ops.hard_confusion.cases import check, random_case\n"
        "import voxfuse\n"
        "for seed in range(2000, 2060):\n"
        "    check(random_case(seed), torch.ops.voxfuse.hard_confusion)\n"
    )
    environment = {**os.environ, "VOXFUSE_CPU_CAPABILITY": capability}
    subprocess.run(
        [sys.executable, "-c", script], check=True, env=environment, cwd=Path(__file__).parents[3]
    )


def test_the_cases_meet_every_kind():
    """The corpus is not lopsided: every decision meets every type."""
    cases = [random_case(seed) for seed in range(1000, 1600)]
    for decision in Decision.__members__:
        own = [case for case in cases if case.decision == decision]
        assert {case.target_dtype for case in own} >= set(LABELS)
        assert {case.mask for case in own} == {None, *MASKS}
    dense = [case for case in cases if case.target == "dense"]
    assert {case.target_dtype for case in dense} == set(MASKS)
    assert {case.layout for case in dense} == {
        "contiguous",
        "channels_last",
        "sliced",
        "permuted",
    }


# --- What decides ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_nan_are_decided_as_torch_argmax_decides(backend):
    nan, inf = math.nan, math.inf
    rows = [[1, 1, 0], [0, 2, 2], [nan, inf, nan], [-inf, -inf, -inf], [-0.0, 0.0, -1], [1, nan, 2]]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        logits = torch.tensor(rows, dtype=dtype).T[None]
        counts = voxfuse.hard_confusion(logits, torch.zeros(1, 6).long(), backend=backend)
        predicted = counts[0, :, 0] + counts[0, :, 1]
        assert predicted.tolist() == [4, 2, 0]
        assert torch.equal(predicted, torch.bincount(logits.argmax(1)[0], minlength=3))


def neighbours(x: float, count: int) -> torch.Tensor:
    """Float32 around ``x``, in order."""
    (bits,) = struct.unpack("<i", struct.pack("<f", x))
    place = bits if bits >= 0 else -(bits & 0x7FFFFFFF)
    places = torch.arange(place - count, place + count + 1)
    bits = torch.where(places >= 0, places, -places - 2**31)
    return bits.to(torch.int32).view(torch.float32)


THRESHOLDS = [0.5, 0.3, 0.7, 1e-3, 0.999, 1e-30, 1 - 2**-24, 0.1 + 1e-9]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_a_threshold_is_compared_with_the_sigmoid_rounded_to_float32(threshold):
    """Exactly; PyTorch's own sigmoid in float32 gives the same but within its error of it."""
    least = least_above(Activation.sigmoid, threshold)
    x = torch.cat([neighbours(least, 2000), torch.randn(2000), torch.randn(2000) * 20])
    level = torch.tensor(threshold, dtype=torch.float32)
    above = x.double().sigmoid().float() > level
    assert torch.equal(x >= least, above)
    assert 0 < int(above.sum()) < len(above)
    pytorch = x.sigmoid()
    close = (pytorch.double() - level.double()).abs() <= 4 * torch.finfo(torch.float32).eps * level
    assert bool(((pytorch > level) == above)[~close].all())

    logits = x.reshape(1, 1, -1)
    counts = voxfuse.hard_confusion(
        logits, torch.ones_like(logits), "threshold", threshold=threshold
    )
    assert counts[0, 0].tolist() == [int(above.sum()), 0, int((~above).sum()), 0]


def test_bounds_at_the_ends():
    none, sigmoid = Activation.none, Activation.sigmoid
    inf = math.inf
    for activation, threshold, expected in (
        (none, 0.0, 2.0**-149),
        (none, 1.0, 1 + 2.0**-23),
        (none, -1.0, -1 + 2.0**-24),
        (none, -inf, -torch.finfo(torch.float32).max),
        (none, 1e300, math.nan),
        (sigmoid, -0.1, -inf),
        (sigmoid, 1.0, math.nan),
        (
            sigmoid,
            0.5,
            2.0**-23 + 2.0**-46,
        ),  # 2^-23 itself is half a unit above 0.5, and even rounds down
    ):
        least = least_above(activation, threshold)
        assert least == expected or (math.isnan(least) and math.isnan(expected)), threshold


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_the_threshold_is_strict_and_nan_is_not_above(backend, activation):
    logits = torch.tensor([[[math.nan, math.inf, -math.inf, 0.0, 1.0]]])
    for threshold, expected in ((0.5, 2), (-0.5, 4 if activation == "sigmoid" else 3), (1.0, 1)):
        expected -= activation == "sigmoid" and threshold == 1.0  # a sigmoid is not above 1
        counts = voxfuse.hard_confusion(
            logits,
            torch.zeros(1, 5),
            "threshold",
            activation=activation,
            threshold=threshold,
            backend=backend,
        )
        assert counts[0, 0].tolist() == [0, expected, 0, 5 - expected], threshold
    half = torch.full((1, 1, 3), 0.5)
    counts = voxfuse.hard_confusion(half, half > 0, "threshold", activation="none", backend=backend)
    assert counts[0, 0].tolist() == [0, 0, 3, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_voxel_left_out_holds_does_not_matter(backend):
    """A predicted label that is no class counts as little as the voxel that it is in."""
    predicted = torch.tensor([[0, 1, 99, 1]])
    truth = torch.tensor([[0, 1, 255, 0]])
    counts = voxfuse.hard_confusion(
        predicted, truth, "labels", num_classes=2, ignore_index=255, backend=backend
    )
    assert counts.tolist() == [[[1, 0, 1, 1], [1, 1, 0, 1]]]
    mask = torch.tensor([[1, 1, 0, 1]])
    again = voxfuse.hard_confusion(
        predicted, truth % 2, "labels", num_classes=2, mask=mask, backend=backend
    )
    assert torch.equal(again, counts)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_that_the_library_itself_returns(dtype):
    """From 257 classes on ``output="labels"`` is uint16."""
    classes = 300 if torch.iinfo(dtype).max >= 299 else 100
    labels = torch.arange(classes).reshape(1, 1, -1)
    counts = voxfuse.hard_confusion(
        labels.to(dtype), labels.to(dtype), "labels", num_classes=classes
    )
    assert torch.equal(counts[0, :, 0], torch.ones(classes, dtype=torch.int64))
    assert int(counts[0, :, 1:3].sum()) == 0


# --- How it is called -----------------------------------------------------------------------------


def test_no_voxels_and_no_samples():
    for backend in BACKENDS:
        empty = voxfuse.hard_confusion(
            torch.zeros(2, 3, 0), torch.zeros(2, 0, dtype=torch.int64), backend=backend
        )
        assert torch.equal(empty, torch.zeros(2, 3, 4, dtype=torch.int64))
        none = voxfuse.hard_confusion(
            torch.zeros(0, 3, 5), torch.zeros(0, 5, dtype=torch.int64), backend=backend
        )
        assert none.shape == (0, 3, 4)


def test_logits_with_a_gradient_and_subclasses_are_counted():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    labels = torch.randint(0, 3, (1, 5))
    counts = voxfuse.hard_confusion(logits, labels)
    assert not counts.requires_grad
    assert torch.equal(counts, voxfuse.hard_confusion(logits.detach(), labels))


@pytest.mark.parametrize("seed", [3, 11])
def test_passes_opcheck(seed):
    given = arguments(random_case(seed))
    for operators in (torch.ops.voxfuse, torch.ops.voxfuse_reference):
        torch.library.opcheck(operators.hard_confusion.default, given)


def test_compiles_into_one_graph_and_maps_over_samples():
    logits, labels = torch.randn(3, 2, 4, 6, 5), torch.randint(0, 4, (3, 2, 6, 5))
    expected = torch.stack(
        [voxfuse.hard_confusion(x, y) for x, y in zip(logits, labels, strict=True)]
    )
    assert torch.equal(torch.vmap(voxfuse.hard_confusion)(logits, labels), expected)

    def above(x, y):
        return voxfuse.hard_confusion(x, y, "threshold", threshold=0.3).sum(0)

    fast = torch.compile(above, fullgraph=True, backend="eager")
    assert torch.equal(fast(logits[0], labels[0]), above(logits[0], labels[0]))


@compiled
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the high-water mark of the resident set cannot be reset here",
)
def test_counting_takes_at_most_one_mebibyte():
    script = (
        "import torch, voxfuse\n"
        "from benchmarks import harness\n"
        "cpu = torch.device('cpu')\n"
        "logits = torch.randn(1, 4, 128, 128, 128)\n"
        "labels = torch.randint(0, 4, (1, 128, 128, 128), dtype=torch.uint8)\n"
        "for mode, input, more in (('argmax', logits, {}), ('threshold', logits, {}),\n"
        "                          ('labels', labels, {'num_classes': 4})):\n"
        "    count = lambda: voxfuse.hard_confusion(input, labels, mode, mask=labels, **more)\n"
        "    print(harness.peak_extra_bytes(count, cpu))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert [int(line) for line in done.stdout.split()] <= [1 << 20] * 3, done.stdout
