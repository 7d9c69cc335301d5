"""The end of Triton's forward reductions: who adds up the rows of partial sums, and with what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from tests.ops.head_confusion.cases import head_tensors
from tests.ops.soft_confusion.cases import ConfusionCase, schema_arguments, tensors

triton = pytest.importorskip("triton", reason="the package triton is not installed")
from voxfuse.triton_kernels import reduction  # noqa: E402
from voxfuse.triton_kernels.head_confusion import launch as head_confusion  # noqa: E402
from voxfuse.triton_kernels.soft_confusion import launch as soft_confusion  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = torch.ops.voxfuse_triton


@pytest.fixture(autouse=True)
def counters(monkeypatch) -> dict[torch.device, reduction._Counters]:
    """The counters of every device, none at first."""
    monkeypatch.setattr(reduction, "_devices", {})
    return reduction._devices


@pytest.fixture
def small(monkeypatch):
    """Programs that sum next to nothing, so that there are many of them, and two levels of rows."""
    monkeypatch.setattr(soft_confusion, "MAX_TILES", 1)
    monkeypatch.setattr(head_confusion, "CHUNK_VOXELS", 64)
    monkeypatch.setattr(reduction, "ONE_LEVEL", 0)


def confusion_call(voxels: int, batch: int, **options: object) -> Callable[[], torch.Tensor]:
    full = bool(options.pop("full", False))
    case = ConfusionCase(batch=batch, spatial=(voxels,), target_dtype=torch.uint8, **options)  # type: ignore[arg-type]
    input, target, weight = (None if x is None else x.to(DEVICE) for x in tensors(case))
    arguments = (input, target, weight, *schema_arguments(case), full)
    return functools.partial(OPERATORS.soft_confusion, *arguments)


def head_call(voxels: int, batch: int, classes: int) -> Callable[[], torch.Tensor]:
    case = ConfusionCase(batch=batch, classes=classes, spatial=(voxels,), target_dtype=torch.uint8)
    given = head_tensors(case, 5, True, DEVICE)
    arguments = (*given, *schema_arguments(case), False, 1 << 20)
    return functools.partial(OPERATORS.head_confusion, *arguments)


CALLS = {
    "one group": lambda: confusion_call(2000, 1, classes=2),
    "odd groups": lambda: confusion_call(11_003, 1, classes=2),
    "three samples": lambda: confusion_call(6_007, 3, classes=3, weight=torch.float32),
    "half precision": lambda: confusion_call(9_001, 2, classes=4, dtype=torch.bfloat16),
    "double": lambda: confusion_call(3_001, 2, classes=3, dtype=torch.float64),
    "many classes": lambda: confusion_call(701, 2, classes=21, full=True),
    "online": lambda: confusion_call(701, 1, classes=261),
    "head": lambda: head_call(701, 2, 3),
    "large head": lambda: head_call(331, 1, 70),
}


@pytest.fixture(params=CALLS)
def name(request, small) -> str:
    return request.param


@pytest.fixture
def call(name) -> Callable[[], torch.Tensor]:
    return CALLS[name]()


def rows_of(monkeypatch) -> list[reduction.Rows]:
    """Every launch's rows, as they are made."""
    made: list[reduction.Rows] = []
    initialize = reduction.Rows.__init__

    def recorded(self, *arguments):
        initialize(self, *arguments)
        made.append(self)

    monkeypatch.setattr(reduction.Rows, "__init__", recorded)
    return made


#: What a call gave, by its name.
RESULTS: dict[str, torch.Tensor] = {}


def result_of(name: str) -> torch.Tensor:
    if name not in RESULTS:
        RESULTS[name] = CALLS[name]()()
    return RESULTS[name]


def test_every_call_leaves_counters_of_0_and_gives_the_bits_of_the_second_kernel(
    name, call, monkeypatch, counters
):
    made = rows_of(monkeypatch)
    expected = result_of(name)
    assert torch.equal(call(), expected)
    assert made[-1].in_kernel
    (of_device,) = counters.values()
    assert of_device.taken > 0
    assert of_device.all.count_nonzero() == 0
    monkeypatch.setattr(reduction, "counters_for", lambda device, count: None)
    assert torch.equal(call(), expected)
    assert not made[-1].in_kernel
    assert made[-1].slots > 1


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU starts its programs in whatever order")
@pytest.mark.parametrize("order", ["backwards", "odd ones first"])
def test_the_bits_do_not_depend_on_which_program_is_last(name, call, order, monkeypatch, counters):
    from triton.runtime import interpreter

    expected = result_of(name)
    execute = interpreter.GridExecutor.__call__
    set_index = interpreter.interpreter_builder.set_grid_idx
    grid: list[int] = []

    def executed(self, *arguments, **options):
        grid[:] = self.grid
        return execute(self, *arguments, **options)

    def moved(x, y, z):
        n = grid[0]
        x = n - 1 - x if order == "backwards" else (2 * x + 1 if x < n // 2 else 2 * (x - n // 2))
        set_index(x, y, z)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", executed)
    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", moved)
    assert torch.equal(call(), expected)
    assert grid[0] > 1
    (of_device,) = counters.values()
    assert of_device.all.count_nonzero() == 0


@pytest.mark.parametrize("batch", [1, 3, 255, 256, 257, 600, 5000])
@pytest.mark.parametrize("slots", [2, 31, 32, 33, 131, 1056, 4092, 65536])
@pytest.mark.parametrize("count", [4, 8, 64, 468, 2400])
def test_groups_are_small_and_counters_enough(slots, batch, count):
    group = reduction.rows_of_a_group(slots, batch, count)
    needed = reduction.counters_needed(slots, batch, group)
    assert 1 <= group <= slots
    # More only where one counter a sample is already more than a stream starts with.
    assert needed <= max(reduction.STREAM_COUNTERS, batch)
    if batch == 1 and slots * count > reduction.ONE_LEVEL:
        assert group <= 1 + slots**0.5
        assert triton.cdiv(slots, group) <= 1 + slots**0.5


# --- whose counters they are ---------------------------------------------------------------------


class FakeGPU:
    """What ``counters_for`` asks of PyTorch, without a GPU; its counters lie on the CPU."""

    def __init__(self, monkeypatch) -> None:
        self.stream, self.capturing, self.synchronized = 0, False, 0
        zeros = torch.zeros
        cuda = SimpleNamespace(
            is_current_stream_capturing=lambda: self.capturing,
            current_stream=lambda device: SimpleNamespace(stream_id=self.stream),
            synchronize=self.synchronize,
        )
        substitute = SimpleNamespace(
            cuda=cuda,
            version=SimpleNamespace(hip=None),
            int32=torch.int32,
            zeros=lambda n, dtype, device: zeros(n, dtype=dtype),
        )
        self.torch = substitute
        monkeypatch.setattr(reduction, "torch", substitute)

    def synchronize(self, device) -> None:
        self.synchronized += 1

    def counters(self, count: int, device: str = "cuda:0") -> torch.Tensor | None:
        return reduction.counters_for(torch.device(device), count)


@pytest.fixture
def gpu(monkeypatch) -> FakeGPU:
    return FakeGPU(monkeypatch)


def disjoint(*parts: torch.Tensor) -> bool:
    places = [range(x.data_ptr(), x.data_ptr() + 4 * len(x)) for x in parts]
    return sum(len(x) for x in places) == len(set().union(*places))


def test_a_stream_keeps_its_counters(gpu):
    first = gpu.counters(5)
    assert gpu.counters(500) is first
    gpu.stream = 33
    other = gpu.counters(5)
    assert disjoint(first, other)
    gpu.stream = 0
    assert gpu.counters(5) is first
    assert disjoint(first, other, gpu.counters(5, "cuda:1"))
    assert gpu.synchronized == 2, "once a device"


def test_a_stream_gets_more_counters_if_it_needs_them(gpu):
    few = gpu.counters(5)
    many = gpu.counters(1000)
    assert len(many) >= 1000
    assert disjoint(few, many)
    assert gpu.counters(5) is many


def test_a_captured_launch_has_counters_of_its_own_for_good(gpu):
    outside = gpu.counters(5)
    gpu.capturing = True
    captured = [gpu.counters(n) for n in (1, 5, 66)]
    assert [len(x) >= n for x, n in zip(captured, (1, 5, 66), strict=True)] == [True] * 3
    assert disjoint(outside, *captured)
    assert all(x.data_ptr() % 16 == outside.data_ptr() % 16 for x in captured)
    gpu.capturing = False
    assert gpu.counters(5) is outside


def test_nothing_is_allocated_while_capturing(gpu):
    gpu.capturing = True
    assert gpu.counters(5) is None
    assert gpu.synchronized == 0


def test_counters_run_out(gpu):
    assert gpu.counters(reduction.COUNTERS + 1) is None
    own = gpu.counters(5)
    gpu.capturing = True
    taken = 0
    while gpu.counters(257) is not None:
        taken += 1
        assert taken < 1000
    assert taken == (reduction.COUNTERS - reduction.STREAM_COUNTERS) // 260
    gpu.capturing = False
    assert gpu.counters(5) is own
    gpu.stream = 33
    assert gpu.counters(5) is None


@pytest.mark.parametrize("device", ["cuda:0", "xpu:0"])
def test_other_gpus_take_the_second_kernel(gpu, device):
    gpu.torch.version.hip = "7.0"
    assert gpu.counters(5, device) is None


def test_a_launch_without_counters_while_capturing(small, monkeypatch):
    """The operator as a whole, as in a graph that is captured before anything else has run."""
    made = rows_of(monkeypatch)
    call = CALLS["three samples"]()
    expected = call()
    take = reduction.counters_for
    monkeypatch.setattr(reduction, "counters_for", lambda device, count: None)
    assert torch.equal(call(), expected)
    monkeypatch.setattr(reduction, "counters_for", take)
    assert torch.equal(call(), expected)
    assert [rows.in_kernel for rows in made] == [True, False, True]
