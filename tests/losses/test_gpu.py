"""Losses on a GPU: gradients, the compiler, peak memory, streams, a second GPU, launches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import voxfuse
from tests.ops.gpu import DEVICE, loss_call, on_device, synchronize
from tests.ops.ratio_loss.cases import FORMULA_CASES

pytestmark = pytest.mark.gpu


def test_a_loss_and_its_gradient(gpu_backend):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 20, 21, 22, generator=generator)
    labels = torch.randint(0, 5, (2, 1, 20, 21, 22), generator=generator, dtype=torch.uint8)
    results = []
    for name, device, dtype in (
        ("reference", "cpu", torch.float64),
        (gpu_backend, DEVICE, torch.float32),
    ):
        leaf = logits.to(device, dtype).requires_grad_()
        loss = voxfuse.DiceCELoss(backend=name)(leaf, labels.to(device))
        loss.backward()
        results.append((loss.detach().cpu().double(), leaf.grad.cpu().double()))
    (value, gradient), (actual, actual_gradient) = results
    assert abs(actual - value) <= 1e-6 * abs(value)
    assert (actual_gradient - gradient).abs().max() <= 1e-5 * gradient.abs().max()


@pytest.mark.slow
def test_a_compiled_loss(gpu_backend):
    logits = torch.randn(2, 4, 24, 25, 26, device=DEVICE)
    labels = torch.randint(0, 4, (2, 1, 24, 25, 26), device=DEVICE, dtype=torch.uint8)
    module = voxfuse.TverskyCELoss(backend=gpu_backend)
    results = []
    for function in (module, torch.compile(module, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, labels)
        value.backward()
        results.append((value.detach(), leaf.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 4, 16, 117])
def test_a_loss_keeps_at_most_one_mebibyte_beside_its_gradient(classes, dtype, gpu_backend):
    logits = torch.randn(1, classes, 64, 64, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, classes, (1, 1, 64, 64, 64), device=DEVICE, dtype=torch.uint8)
    module = voxfuse.TverskyLoss(backend=gpu_backend)

    def step() -> None:
        logits.grad = None
        module(logits, labels).backward()

    step()
    logits.grad = None
    synchronize()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    step()
    synchronize()
    beyond = torch.cuda.max_memory_allocated(DEVICE) - before
    beyond -= logits.numel() * logits.element_size()
    if beyond > 1 << 20:  # not an assertion: this says nothing of a result's being right
        pytest.fail(f"{beyond} bytes beside logits and gradient")


def test_gradients_follow_the_stream_of_the_loss(gpu_backend):
    """PyTorch calculates them in a thread of its own, on the stream of the forward pass."""
    call = loss_call(gpu_backend)
    expected = [x.clone() for x in call()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    busy = torch.empty(1 << 28, device=DEVICE)
    busy.zero_()  # what waits for the default stream would come late
    with torch.cuda.stream(side):
        actual = call()
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_second_gpu(gpu_backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("PyTorch sees one CUDA device")
    logits = torch.randn(1, 4, 24, 25, 26)
    labels = torch.randint(0, 4, (1, 1, 24, 25, 26), dtype=torch.uint8)
    module = voxfuse.TverskyCELoss(backend=gpu_backend)
    results = []
    for index in (0, 1):  # the current device is 0 throughout
        leaf = logits.to(f"cuda:{index}").requires_grad_()
        value = module(leaf, labels.to(leaf.device))
        value.backward()
        results.append((value.detach().cpu(), leaf.grad.cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(2, 2, 96, 96, 96), (1, 16, 64, 64, 64), (1, 117, 48, 48, 48)])
def test_launches_of_a_loss(shape, gpu_operators):
    """Two kernels forward, two backward."""
    logits = torch.randn(shape, device=DEVICE)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), device=DEVICE, dtype=torch.uint8)
    options = (2, 2, 0, None, 0.0)
    arguments = FORMULA_CASES[0].arguments()

    def forward() -> Tensor:
        sums = gpu_operators.soft_confusion(logits, labels, None, *options, False)
        return gpu_operators.ratio_loss(sums, *on_device(*arguments))[1]

    cotangents = forward()
    grad = torch.ones((), device=DEVICE, dtype=torch.float64)

    def backward() -> None:
        scaled = gpu_operators.ratio_loss_backward(grad, cotangents, 0, False, 0)
        gpu_operators.soft_confusion_backward(scaled, logits, labels, None, *options)

    for call in (forward, backward):
        for _ in range(2):  # what the first session of a process sees is not complete
            synchronize()
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profiler:
                call()
                synchronize()
        kernels = [
            event.name
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not event.name.startswith(("Mem", "Activity"))
            and "Sync" not in event.name
        ]
        if not 0 < len(kernels) <= 2:  # no assertion: this says nothing of a result
            pytest.fail(f"{len(kernels)} kernels, expected one or two: {kernels}")
