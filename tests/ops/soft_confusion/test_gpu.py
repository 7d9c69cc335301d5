"""soft_confusion on a GPU: values, gradients, fakes, labels out of range, 64-bit indices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import voxfuse
from tests.ops.gpu import DEVICE, HALF, REFERENCE, confusion_call, synchronize
from tests.ops.soft_confusion import cases as confusion_cases
from tests.ops.soft_confusion.cases import ConfusionCase

pytestmark = pytest.mark.gpu


CONFUSION = [
    *(
        ConfusionCase(classes=c, target_dtype=torch.uint8, spatial=(17, 13, 11))
        for c in range(2, 18)
    ),
    *(
        ConfusionCase(batch=1, classes=c, spatial=(15, 14, 13))
        for c in (32, 33, 64, 117, 128, 129, 256)
    ),
    *(
        ConfusionCase(batch=1, classes=c, spatial=(9, 8, 7), target_dtype=torch.int16)
        for c in (257, 300)
    ),
    *(ConfusionCase(classes=c, dtype=d, spatial=(17, 16, 9)) for c in (2, 4, 16, 40) for d in HALF),
    ConfusionCase(dtype=torch.float64),
    ConfusionCase(spatial=(64, 65, 66), target_dtype=torch.uint8),
    *(
        ConfusionCase(classes=c, layout="channels_last", spatial=(17, 13, 11))
        for c in (2, 5, 16, 20)
    ),
    ConfusionCase(layout="sliced"),
    ConfusionCase(layout="permuted"),
    ConfusionCase(target="labels_channel", target_dtype=torch.float32, ignore_index=1),
    ConfusionCase(weight=torch.float32, gamma=2.0, full=True, classes=4),
    ConfusionCase(weight=torch.bool, gamma=0.5, classes=20),
    ConfusionCase(target="dense", target_dtype=torch.float32, overlap="min", full=True),
    ConfusionCase(
        activation="sigmoid", target="dense", target_dtype=torch.uint8, gamma=2.0, full=True
    ),
    ConfusionCase(
        activation="sigmoid", dtype=torch.bfloat16, target="dense", target_dtype=torch.bool
    ),
    ConfusionCase(activation="none", target="dense", target_dtype=torch.float32),
    ConfusionCase(
        activation="softmax", likelihood="sigmoid", target="dense", target_dtype=torch.float32
    ),
    ConfusionCase(classes=1, activation="sigmoid", target_dtype=torch.uint8, full=True),
    ConfusionCase(spatial=(1,)),
    ConfusionCase(spread=60.0, classes=4, full=True),
]


@pytest.mark.parametrize("case", CONFUSION, ids=range(len(CONFUSION)))
def test_soft_confusion(case, gpu_operators, poisoned_memory):
    confusion_cases.check(case, gpu_operators, str(DEVICE))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
def test_a_compiler_may_believe_the_fakes_of_soft_confusion(layout, gpu_operators):
    case = ConfusionCase(layout=layout, spatial=(9, 8, 7), target_dtype=torch.uint8)
    input, target, _ = confusion_cases.tensors(case, str(DEVICE))
    options = confusion_cases.schema_arguments(case)
    torch.library.opcheck(
        gpu_operators.soft_confusion.default,
        (input.detach().requires_grad_(), target, None, *options, False),
    )
    grad = torch.randn(2, 3, 4, dtype=torch.float64, device=DEVICE)
    torch.library.opcheck(
        gpu_operators.soft_confusion_backward.default, (grad, input, target, None, *options)
    )


def test_labels_out_of_range_are_ignored_or_refused(gpu_backend, monkeypatch):
    logits = torch.randn(1, 3, 16, 16, 16, device=DEVICE)
    labels = torch.randint(0, 3, (1, 16, 16, 16), device=DEVICE)
    valid = torch.ones(1, 16, 16, 16, device=DEVICE)
    labels[0, :4], valid[0, :4] = 200, 0
    monkeypatch.delenv("VOXFUSE_VALIDATE", raising=False)
    actual = voxfuse.soft_confusion(logits, labels, backend=gpu_backend)
    expected = voxfuse.soft_confusion(logits, labels % 3, valid, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    monkeypatch.setenv("VOXFUSE_VALIDATE", "1")
    with pytest.raises(ValueError, match="200"):
        voxfuse.soft_confusion(logits, labels, backend=gpu_backend)
    with pytest.raises(ValueError, match=r"target: value .* is outside \[0, 1\]"):
        voxfuse.soft_confusion(logits, 2 * torch.ones_like(logits), backend=gpu_backend)


def test_work_goes_to_the_current_stream(gpu_operators, gpu_backend):
    call = confusion_call(gpu_operators, 4, torch.float32)
    expected = call()
    synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        actual = call()
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_streams_and_graphs_add_rows_up_beside_each_other(gpu_operators, gpu_backend):
    """Two streams and a graph at a time: none counts the blocks of another."""
    logits = torch.randn(1, 2, 96, 96, 96, device=DEVICE)
    labels = torch.randint(0, 2, (1, 96, 96, 96), device=DEVICE, dtype=torch.uint8)

    def call() -> Tensor:
        return gpu_operators.soft_confusion(logits, labels, None, 2, 2, 0, None, 0.0, False)

    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    streams = [torch.cuda.Stream() for _ in range(3)]
    synchronize()
    results = []
    for _ in range(50):
        for stream in streams[:2]:
            with torch.cuda.stream(stream):
                results.append(call())
        with torch.cuda.stream(streams[2]):
            graph.replay()
    synchronize()
    assert all(torch.equal(x, expected) for x in (*results, captured))


@pytest.mark.slow
@pytest.mark.xdist_group("most of the memory")
def test_more_than_2_to_the_31_elements(gpu_operators):
    """Two classes of 1024^3 voxels: the last slices are where 32-bit indices would go wrong."""
    if torch.cuda.mem_get_info(DEVICE)[0] < 20 << 30:
        pytest.skip("less than 20 GiB of the device's memory are free")
    edge, depth = 1024, 32
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.empty(1, 2, edge, edge, edge, dtype=torch.bfloat16, device=DEVICE)
    labels = torch.empty(1, edge, edge, edge, dtype=torch.uint8, device=DEVICE)
    for first in range(0, edge, depth):
        part = slice(first, first + depth)
        logits[:, :, part].normal_(generator=generator)
        labels[:, part].random_(0, 2, generator=generator)
    options = (2, 2, 0, None, 0.0)
    sums = gpu_operators.soft_confusion(logits, labels, None, *options, False)
    grad = torch.rand(1, 2, 4, dtype=torch.float64, device=DEVICE)
    gradient = gpu_operators.soft_confusion_backward(grad, logits, labels, None, *options)
    true = torch.zeros_like(sums)
    for first in range(0, edge, depth):
        part = slice(first, first + depth)
        wide = logits[:, :, part].double()
        true += REFERENCE.soft_confusion(wide, labels[:, part], None, *options, False)
        expected = REFERENCE.soft_confusion_backward(grad, wide, labels[:, part], None, *options)
        # One rounding to bfloat16, of values of the order of the cotangents.
        torch.testing.assert_close(
            gradient[:, :, part].double(), expected, rtol=2**-8, atol=1e-5 * grad.max().item()
        )
    # float32 in chunks of at most 2^14 voxels, each adding a rounding of its partial sum.
    torch.testing.assert_close(sums, true, rtol=1e-5, atol=0)
