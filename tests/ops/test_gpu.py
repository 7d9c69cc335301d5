"""What only a GPU can show: the CUDA and Triton kernels on one, against the float64 reference.

Every operator and backend: values, gradients, equal bits in every run, capture in a graph, no
synchronisation with the host, peak memory, and more than 2^31 elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import voxfuse
from tests.ops.finalize_slab.test_cpu import MODES, finalized
from tests.ops.head_confusion import cases as head_cases
from tests.ops.overlap_add.test_cpu import make_case
from tests.ops.ratio_loss.test_cpu import FORMULA_CASES, statistics
from tests.ops.soft_confusion import cases as confusion_cases
from tests.ops.soft_confusion.cases import Case
from voxfuse.fusion.grids import plan_grid
from voxfuse.ops.finalize_slab import finalize_slab

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
REFERENCE = torch.ops.voxfuse_reference
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(params=["cuda", "triton"])
def backend(request) -> str:
    found = voxfuse.backends()[request.param]
    if not found.available:
        pytest.skip(f"the {request.param} backend is not available: {found.reason}")
    return request.param


@pytest.fixture
def operators(backend) -> Any:
    return torch.ops.voxfuse_triton if backend == "triton" else torch.ops.voxfuse


def on_device(*values: Any) -> list[Any]:
    """Tensors, and lists of them, on the GPU; other values as they are."""
    return [
        v.to(DEVICE) if isinstance(v, Tensor) else on_device(*v) if isinstance(v, list) else v
        for v in values
    ]


def synchronize() -> None:
    torch.cuda.synchronize(DEVICE)


# --- parity --------------------------------------------------------------------------------------

CONFUSION = [
    *(Case(classes=c, target_dtype=torch.uint8, spatial=(17, 13, 11)) for c in range(2, 18)),
    *(Case(batch=1, classes=c, spatial=(15, 14, 13)) for c in (32, 33, 64, 117, 128, 129, 256)),
    *(Case(batch=1, classes=c, spatial=(9, 8, 7), target_dtype=torch.int16) for c in (257, 300)),
    *(Case(classes=c, dtype=d, spatial=(17, 16, 9)) for c in (2, 4, 16, 40) for d in HALF),
    Case(dtype=torch.float64),
    Case(spatial=(64, 65, 66), target_dtype=torch.uint8),
    *(Case(classes=c, layout="channels_last", spatial=(17, 13, 11)) for c in (2, 5, 16, 20)),
    Case(layout="sliced"),
    Case(layout="permuted"),
    Case(target="labels_channel", target_dtype=torch.float32, ignore_index=1),
    Case(weight=torch.float32, gamma=2.0, full=True, classes=4),
    Case(weight=torch.bool, gamma=0.5, classes=20),
    Case(target="dense", target_dtype=torch.float32, overlap="min", full=True),
    Case(activation="sigmoid", target="dense", target_dtype=torch.uint8, gamma=2.0, full=True),
    Case(activation="sigmoid", dtype=torch.bfloat16, target="dense", target_dtype=torch.bool),
    Case(activation="none", target="dense", target_dtype=torch.float32),
    Case(activation="softmax", likelihood="sigmoid", target="dense", target_dtype=torch.float32),
    Case(classes=1, activation="sigmoid", target_dtype=torch.uint8, full=True),
    Case(spatial=(1,)),
    Case(spread=60.0, classes=4, full=True),
]


@pytest.mark.parametrize("case", CONFUSION, ids=range(len(CONFUSION)))
def test_soft_confusion(case, operators, poisoned_memory):
    confusion_cases.check(case, operators, str(DEVICE))


@pytest.mark.parametrize("case", FORMULA_CASES, ids=range(len(FORMULA_CASES)))
def test_ratio_loss(case, operators):
    stats, arguments = statistics(), case.arguments()
    moved = on_device(*arguments)
    actual, slopes = operators.ratio_loss(stats.to(DEVICE), *moved)
    expected, expected_slopes = REFERENCE.ratio_loss(stats, *arguments)
    # The arithmetic is float64 in both; powers and logarithms may differ in their last bits.
    tolerance = {"rtol": 1e-11 if case.double_loss else 1e-6, "atol": 1e-14, "equal_nan": True}
    torch.testing.assert_close(actual.cpu(), expected, **tolerance)
    close = {"rtol": 1e-10, "atol": 1e-14, "equal_nan": True}
    torch.testing.assert_close(slopes.cpu(), expected_slopes, **close)
    grad = torch.rand(expected.shape, dtype=expected.dtype)
    where = (case.first_class, case.batch, case.class_pooling)
    gradient = operators.ratio_loss_backward(grad.to(DEVICE), slopes, *where)
    exact = REFERENCE.ratio_loss_backward(grad, slopes.cpu(), *where)
    torch.testing.assert_close(gradient.cpu(), exact, rtol=0, atol=0, equal_nan=True)


FUSION = [
    dict(volume=(21, 18, 37), patch=(8, 7, 16), count=12, channels=5),
    dict(volume=(21, 18, 37), patch=(8, 7, 16), count=12, general=True),
    dict(volume=(21, 18, 37), patch=(8, 7, 15), count=12, dense=True, general=True),
    dict(volume=(40, 33), patch=(9, 16), count=9, channels=3),
    dict(volume=(200,), patch=(33,), count=9),
    dict(volume=(12, 12, 12), patch=(3, 3, 3), count=400),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64])
@pytest.mark.parametrize("options", FUSION, ids=range(len(FUSION)))
def test_overlap_add(options, dtype, operators, poisoned_memory):
    case = make_case(dtype=dtype, **options)
    tables = (case.origins, case.rows, case.weights, case.total)
    moved = on_device(*tables)
    volume = list(case.volume)
    wide = case.patches.double()
    magnitude = REFERENCE.overlap_add(wide.abs(), *tables, volume)
    expected = REFERENCE.overlap_add(wide, *tables, volume)
    actual = operators.overlap_add(case.patches.to(DEVICE), *moved, volume)
    assert actual.dtype == dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    # Each of at most `count` terms and additions rounds once in the compute type, four times with
    # the weights; the result is rounded to its own type at the end.
    allowed = (4 + case.patches.shape[0]) * torch.finfo(compute).eps * magnitude
    allowed += torch.finfo(dtype).eps * expected.abs()
    # Half types have subnormal numbers where their relative precision ends.
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert bool(((actual.cpu().double() - expected).abs() <= allowed + smallest).all())

    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    true = REFERENCE.overlap_add_backward(grad.double(), *tables)
    gradient = operators.overlap_add_backward(grad.to(DEVICE), *moved)
    allowed = 6 * torch.finfo(compute).eps * true.abs() + torch.finfo(dtype).eps * true.abs()
    assert bool(((gradient.cpu().double() - true).abs() <= allowed + smallest).all())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rings(axis, operators):
    case = make_case((9, 8, 20), (4, 5, 9), 10, channels=3)
    extent = list(case.volume)
    start, stop = 5, 5 + extent[axis] - 2
    tables = (case.origins + (axis == 0) * 3, case.rows, case.weights)
    rings = []
    for namespace, move in ((REFERENCE, list), (operators, lambda values: on_device(*values))):
        origins, rows, weights, patches = move([*tables, case.patches])
        device = patches.device
        total = torch.zeros(extent, dtype=torch.float64, device=device)
        namespace.overlap_weights_(total, origins, rows, weights, axis, start, stop)
        ring = torch.zeros(3, *extent, device=device)
        namespace.overlap_add_(ring, patches, origins, rows, weights, total, axis, start, stop)
        rings.append((total.cpu(), ring.cpu()))
    (true_total, expected), (total, actual) = rings
    assert true_total.count_nonzero() > 0
    torch.testing.assert_close(total, true_total, rtol=1e-13, atol=0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["identity", "softmax"])
@pytest.mark.parametrize("mode", MODES)
def test_finalize_slab(mode, activation, backend):
    if mode == "entropy" and activation == "identity":
        ring = torch.randn(5, 12, 9, 17).softmax(0)
    else:
        ring = torch.randn(5, 12, 9, 17, generator=torch.Generator().manual_seed(0))
    options = {"activation": activation, "applied": False}
    arguments = (mode, 0, 10, 15, 5, torch.float32)
    expected, cleared = finalized("reference", ring, *arguments, **options)
    out = torch.full(expected.shape, 77, dtype=expected.dtype, device=DEVICE)
    left = ring.to(DEVICE)
    finalize_slab(left, out, mode, ring_axis=0, start=10, stop=15, backend=backend, **options)
    torch.testing.assert_close(left.cpu(), cleared, rtol=0, atol=0)
    exact = out.dtype == torch.uint8
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out.cpu(), expected, **tolerance)


HEADS = [
    (Case(classes=3, spatial=(9, 8, 7)), 5),
    (Case(classes=14, spatial=(9, 8, 7), weight=torch.float32, gamma=2.0), 32),
    (Case(batch=1, classes=117, spatial=(12, 11, 10), target_dtype=torch.uint8), 32),
    (Case(batch=1, classes=200, spatial=(9, 8, 7)), 24),
    (Case(batch=1, classes=300, spatial=(6, 5, 4)), 8),
    (Case(classes=5, activation="sigmoid", target="dense", target_dtype=torch.float32), 16),
    (Case(classes=5, layout="channels_last", spatial=(9, 8, 7), full=True), 16),
    (Case(dtype=torch.float64), 4),
    *((Case(batch=1, classes=40, spatial=(9, 8, 7), dtype=d), 32) for d in HALF),
]


@pytest.mark.parametrize(("case", "channels"), HEADS, ids=range(len(HEADS)))
def test_head_confusion(case, channels, operators):
    head_cases.check(case, channels, operators, device=str(DEVICE))


def test_a_loss_and_its_gradient(backend):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 20, 21, 22, generator=generator)
    labels = torch.randint(0, 5, (2, 1, 20, 21, 22), generator=generator, dtype=torch.uint8)
    results = []
    for name, device, dtype in (
        ("reference", "cpu", torch.float64),
        (backend, DEVICE, torch.float32),
    ):
        leaf = logits.to(device, dtype).requires_grad_()
        loss = voxfuse.DiceCELoss(backend=name)(leaf, labels.to(device))
        loss.backward()
        results.append((loss.detach().cpu().double(), leaf.grad.cpu().double()))
    (value, gradient), (actual, actual_gradient) = results
    assert abs(actual - value) <= 1e-6 * abs(value)
    assert (actual_gradient - gradient).abs().max() <= 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("host", [False, True], ids=["stays", "to the host"])
@pytest.mark.parametrize("output", ["logits", "probabilities", "labels"])
def test_a_sliding_window(output, host, backend):
    """Patches predicted on the GPU; finished slabs stay there or reach the host behind the rest."""
    volume = torch.rand(1, 1, 70, 40, 36, generator=torch.Generator().manual_seed(0))

    def network(patches: Tensor) -> Tensor:
        return torch.cat([patches, 1 - patches, 2 * patches * patches], 1)

    options = {"output": output, "tta": [(), (0, 2), (1,)]}
    options |= {} if output == "logits" else {"activation": "softmax", "voting": "logit"}
    if output == "probabilities":
        options["mode"] = "gaussian"  # clamped as MONAI's, so that its sums are formed on the way
    arguments = ((16, 16, 16), 3, network, 0.5)
    expected = voxfuse.sliding_window_inference(volume, *arguments, backend="reference", **options)
    if host:
        options["out"] = torch.empty_like(expected)
    actual = voxfuse.sliding_window_inference(
        volume.to(DEVICE), *arguments, backend=backend, **options
    )
    assert actual.device.type == ("cpu" if host else DEVICE.type)
    if output == "labels":  # two values a rounding apart may change places
        assert (actual.cpu() != expected).sum() <= 2
    else:
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-6)


# --- how they run --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
def test_a_compiler_may_believe_the_fakes_of_soft_confusion(layout, operators):
    case = Case(layout=layout, spatial=(9, 8, 7), target_dtype=torch.uint8)
    input, target, _ = confusion_cases.tensors(case, str(DEVICE))
    options = confusion_cases.schema_arguments(case)
    torch.library.opcheck(
        operators.soft_confusion.default,
        (input.detach().requires_grad_(), target, None, *options, False),
    )
    grad = torch.randn(2, 3, 4, dtype=torch.float64, device=DEVICE)
    torch.library.opcheck(
        operators.soft_confusion_backward.default, (grad, input, target, None, *options)
    )


def test_a_compiler_may_believe_the_fakes_of_the_others(operators):
    arguments = FORMULA_CASES[1].arguments()
    stats = statistics().to(DEVICE)
    torch.library.opcheck(operators.ratio_loss.default, (stats, *on_device(*arguments)))
    case = make_case((21, 18, 37), (8, 7, 16), 12)
    patches, *tables = on_device(case.patches, case.origins, case.rows, case.weights, None)
    torch.library.opcheck(operators.overlap_add.default, (patches, *tables, list(case.volume)))
    head = Case(classes=3, spatial=(9, 8, 7), layout="channels_last")
    given = head_cases.head_tensors(head, 5, True, str(DEVICE))
    options = (*confusion_cases.schema_arguments(head), False, head_cases.CHUNK_BYTES)
    torch.library.opcheck(operators.head_confusion.default, (*given, *options))


@pytest.mark.slow
def test_a_compiled_loss(backend):
    logits = torch.randn(2, 4, 24, 25, 26, device=DEVICE)
    labels = torch.randint(0, 4, (2, 1, 24, 25, 26), device=DEVICE, dtype=torch.uint8)
    module = voxfuse.TverskyCELoss(backend=backend)
    results = []
    for function in (module, torch.compile(module, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, labels)
        value.backward()
        results.append((value.detach(), leaf.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


def confusion_call(operators: Any, classes: int, dtype: torch.dtype) -> Callable[[], Any]:
    case = Case(classes=classes, spatial=(40, 41, 42), dtype=dtype, target_dtype=torch.uint8)
    input, target, _ = confusion_cases.tensors(case, str(DEVICE))
    arguments = (input, target, None, *confusion_cases.schema_arguments(case))
    grad = torch.randn(2, classes, 4, dtype=torch.float64, device=DEVICE)
    return lambda: (
        operators.soft_confusion(*arguments, False),
        operators.soft_confusion_backward(grad, *arguments),
    )


def fusion_call(operators: Any) -> Callable[[], Any]:
    grid = plan_grid((40, 40, 40), (16, 16, 16), 0.5)
    tables = grid.tables("bspline")
    origins, rows, weights = on_device(tables.origins, tables.rows, tables.weights)
    patches = torch.randn(len(grid), 3, 16, 16, 16, device=DEVICE)
    grad = torch.randn(3, 40, 40, 40, device=DEVICE)
    return lambda: (
        operators.overlap_add(patches, origins, rows, weights, None, [40, 40, 40]),
        operators.overlap_add_backward(grad, origins, rows, weights, None),
    )


def head_call(operators: Any) -> Callable[[], Any]:
    case = Case(batch=1, classes=117, spatial=(20, 21, 22), target_dtype=torch.uint8)
    given = head_cases.head_tensors(case, 32, True, str(DEVICE))
    options = confusion_cases.schema_arguments(case)
    grad = torch.randn(1, 117, 4, dtype=torch.float64, device=DEVICE)
    more = (*options, head_cases.CHUNK_BYTES)
    return lambda: (
        operators.head_confusion(*given, *options, False, head_cases.CHUNK_BYTES),
        *operators.head_confusion_backward(grad, *given, *more, True, True),
    )


def loss_call(backend: str) -> Callable[[], Any]:
    logits = torch.randn(2, 4, 24, 25, 26, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 4, (2, 1, 24, 25, 26), device=DEVICE, dtype=torch.uint8)
    module = voxfuse.TverskyCELoss(backend=backend)

    def call() -> Any:
        logits.grad = None
        value = module(logits, labels)
        value.backward()
        return value.detach(), logits.grad

    return call


def make_call(kind: str, operators: Any, backend: str) -> Callable[[], Any]:
    if kind == "loss":
        return loss_call(backend)
    if kind == "fusion":
        return fusion_call(operators)
    if kind == "head":
        return head_call(operators)
    classes, dtype = kind.split()
    return confusion_call(operators, int(classes), getattr(torch, dtype))


KINDS = [
    *(f"{classes} {dtype}" for classes in (2, 4, 16, 40, 150) for dtype in ("float32", "bfloat16")),
    "300 float32",
    "loss",
    "fusion",
    "head",
]


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_in_20_runs(kind, operators, backend):
    call = make_call(kind, operators, backend)
    first = [x.clone() for x in call()]
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


@pytest.mark.parametrize("kind", ["2 float32", "4 bfloat16", "40 float32", "loss", "fusion"])
def test_a_captured_graph_replays_the_same_bits(kind, operators, backend):
    call = make_call(kind, operators, backend)
    expected = [x.clone() for x in call()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        for x in captured:
            x.detach().fill_(77)
        graph.replay()
        synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("kind", ["2 float32", "40 float32", "300 float32", "loss", "fusion"])
def test_nothing_waits_for_the_device(kind, operators, backend):
    call = make_call(kind, operators, backend)
    call()
    synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 4, 16, 117])
def test_a_loss_keeps_at_most_one_mebibyte_beside_its_gradient(classes, dtype, backend):
    logits = torch.randn(1, classes, 64, 64, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, classes, (1, 1, 64, 64, 64), device=DEVICE, dtype=torch.uint8)
    module = voxfuse.TverskyLoss(backend=backend)

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


def test_labels_out_of_range_are_ignored_or_refused(backend, monkeypatch):
    logits = torch.randn(1, 3, 16, 16, 16, device=DEVICE)
    labels = torch.randint(0, 3, (1, 16, 16, 16), device=DEVICE)
    valid = torch.ones(1, 16, 16, 16, device=DEVICE)
    labels[0, :4], valid[0, :4] = 200, 0
    monkeypatch.delenv("VOXFUSE_VALIDATE", raising=False)
    actual = voxfuse.soft_confusion(logits, labels, backend=backend)
    expected = voxfuse.soft_confusion(logits, labels % 3, valid, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    monkeypatch.setenv("VOXFUSE_VALIDATE", "1")
    with pytest.raises(ValueError, match="200"):
        voxfuse.soft_confusion(logits, labels, backend=backend)


def test_work_goes_to_the_current_stream(operators, backend):
    call = confusion_call(operators, 4, torch.float32)
    expected = call()
    synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        actual = call()
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_gradients_follow_the_stream_of_the_loss(backend):
    """PyTorch calculates them in a thread of its own, on the stream of the forward pass."""
    call = loss_call(backend)
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


def test_a_second_gpu(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("PyTorch sees one CUDA device")
    logits = torch.randn(1, 4, 24, 25, 26)
    labels = torch.randint(0, 4, (1, 1, 24, 25, 26), dtype=torch.uint8)
    module = voxfuse.TverskyCELoss(backend=backend)
    results = []
    for index in (0, 1):  # the current device is 0 throughout
        leaf = logits.to(f"cuda:{index}").requires_grad_()
        value = module(leaf, labels.to(leaf.device))
        value.backward()
        results.append((value.detach().cpu(), leaf.grad.cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_streams_and_graphs_add_rows_up_beside_each_other(operators, backend):
    """Two streams and a graph at a time: none counts the blocks of another."""
    logits = torch.randn(1, 2, 96, 96, 96, device=DEVICE)
    labels = torch.randint(0, 2, (1, 96, 96, 96), device=DEVICE, dtype=torch.uint8)

    def call() -> Tensor:
        return operators.soft_confusion(logits, labels, None, 2, 2, 0, None, 0.0, False)

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


@pytest.mark.parametrize("shape", [(2, 2, 96, 96, 96), (1, 16, 64, 64, 64), (1, 117, 48, 48, 48)])
def test_launches_of_a_loss(shape, operators):
    """Two kernels forward, two backward."""
    logits = torch.randn(shape, device=DEVICE)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), device=DEVICE, dtype=torch.uint8)
    options = (2, 2, 0, None, 0.0)
    arguments = FORMULA_CASES[0].arguments()

    def forward() -> Tensor:
        sums = operators.soft_confusion(logits, labels, None, *options, False)
        return operators.ratio_loss(sums, *on_device(*arguments))[1]

    cotangents = forward()
    grad = torch.ones((), device=DEVICE, dtype=torch.float64)

    def backward() -> None:
        scaled = operators.ratio_loss_backward(grad, cotangents, 0, False, 0)
        operators.soft_confusion_backward(scaled, logits, labels, None, *options)

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


@pytest.mark.slow
@pytest.mark.xdist_group("most of the memory")
def test_more_than_2_to_the_31_elements(operators):
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
    sums = operators.soft_confusion(logits, labels, None, *options, False)
    grad = torch.rand(1, 2, 4, dtype=torch.float64, device=DEVICE)
    gradient = operators.soft_confusion_backward(grad, logits, labels, None, *options)
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
