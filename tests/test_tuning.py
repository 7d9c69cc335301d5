"""Tuned launch configurations: each is right, and the choice is measured, kept and read back."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import voxfuse
from benchmarks import byte_model
from tests.confusion_cases import Case, check, schema_arguments, tensors
from voxfuse import cli, tuning
from voxfuse.ops.finalize_slab import finalize_slab

triton = pytest.importorskip("triton", reason="the package triton is not installed")
from voxfuse.triton_kernels import (  # noqa: E402
    _tuning,
    overlap_add,
    soft_confusion,
)
from voxfuse.triton_kernels import (  # noqa: E402
    finalize_slab as slabs,
)

OPERATORS = torch.ops.voxfuse_triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parent.parent
IMAGINARY = "an imaginary GPU, capability 0.0"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A cache folder of the test's own, and a process that has read nothing yet."""
    monkeypatch.setenv("VOXFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("VOXFUSE_TUNE", raising=False)
    _tuning.forget()
    yield tmp_path / "cache"
    _tuning.forget()


# --- every configuration is right ----------------------------------------------------------------


def forced(monkeypatch, index: int) -> list[object]:
    """Launch configuration ``index`` of every set, the last where there are fewer."""
    used: list[object] = []

    def run(self, problem, outputs, call):
        allowed = self.configurations(problem)
        used.append(allowed[min(index, len(allowed) - 1)])
        call(used[-1], *outputs)

    monkeypatch.setattr(_tuning.Family, "run", run)
    return used


def problem_of(case: Case) -> soft_confusion.Problem:
    input, target, weight = tensors(case)
    *options, ignore_index, gamma = schema_arguments(case)
    return soft_confusion._describe(
        input,
        target,
        *options,
        ignore_index,
        weight is not None,
        gamma,
        8 if case.full else 4,
        soft_confusion.strides_of(input)[2] == 1,
        case.focal_classes,
    )


LOSSES = {
    "two": Case(classes=2, spatial=(1300,)),
    "two-half": Case(classes=2, spatial=(2300,), dtype=torch.bfloat16, weight=torch.float32),
    "few": Case(classes=4, batch=1, spatial=(1100,), gamma=2.0),
    "eight": Case(classes=8, batch=1, spatial=(700,), dtype=torch.float16),
    "sixteen": Case(classes=16, batch=1, spatial=(300,)),
    "many": Case(classes=20, batch=1, spatial=(150,)),
    "more": Case(classes=70, batch=1, spatial=(150,), dtype=torch.bfloat16),
    "online": Case(classes=300, batch=1, spatial=(20,)),
    "strided": Case(classes=3, spatial=(37, 17), layout="channels_last"),
    "double": Case(classes=3, spatial=(300,), dtype=torch.float64, full=True),
    "dense": Case(classes=3, spatial=(300,), target="dense", target_dtype=torch.float32),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_configuration_of_the_losses(name, monkeypatch):
    """Sums within the rule of accuracy; gradients to the last bit as by default."""
    case = LOSSES[name]
    problem = problem_of(case)
    forward = soft_confusion.configurations(problem, backward=False)
    backward = soft_confusion.configurations(problem, backward=True)
    assert len(set(forward)) == len(forward) >= 2
    assert len(set(backward)) == len(backward) >= 3
    input, target, weight = (None if x is None else x.to(DEVICE) for x in tensors(case))
    grad = torch.randn(case.batch, case.classes, 8 if case.full else 4, dtype=torch.float64)
    arguments = (grad.to(DEVICE), input, target, weight, *schema_arguments(case))
    monkeypatch.setattr(soft_confusion, "TILES_TO_FILL", 1)  # so that programs differ in length
    expected = OPERATORS.soft_confusion_backward(*arguments)
    for index in range(max(len(forward), len(backward))):
        with monkeypatch.context() as patch:
            used = forced(patch, index)
            if index < len(forward):
                check(case, OPERATORS, DEVICE)
                assert used[0] == forward[index]
            gradient = OPERATORS.soft_confusion_backward(*arguments)
            assert used[-1] == backward[min(index, len(backward) - 1)]
        assert torch.equal(gradient, expected), used[-1]


def fusion(dtype: torch.dtype, channels: int):
    """Arguments of one call each of overlap_add, its gradient and overlap_add_."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.tensor([[0, 0, 0], [0, 1, 40], [1, 1, 0]])
    rows = torch.zeros_like(grid)
    weights = [torch.rand(1, n, dtype=torch.float64, generator=generator) for n in (1, 3, 45)]
    patches = torch.randn(3, channels, 1, 3, 45, generator=generator).to(dtype).to(DEVICE)
    volume = [2, 4, 85]
    grad = torch.randn(channels, *volume, generator=generator).to(dtype).to(DEVICE)
    ring = torch.randn(channels, *volume, generator=generator).to(DEVICE)
    return patches, grid, rows, weights, volume, grad, ring


@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 5), (torch.bfloat16, 1)])
def test_every_configuration_of_the_fusion(dtype, channels, monkeypatch):
    """The same bits in each, and those are right."""
    patches, grid, rows, weights, volume, grad, ring = fusion(dtype, channels)

    def results():
        added = ring.clone()
        OPERATORS.overlap_add_(added, patches, grid, rows, weights, None, 0, 0, 2)
        return (
            OPERATORS.overlap_add(patches, grid, rows, weights, None, volume),
            OPERATORS.overlap_add_backward(grad, grid, rows, weights, None),
            added,
        )

    expected = results()
    truth = torch.ops.voxfuse_reference.overlap_add(
        patches.cpu().double(), grid, rows, weights, None, volume
    )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(expected[0].cpu().double(), truth, rtol=4 * eps, atol=4 * eps)
    sets = set()
    for index in range(4):
        with monkeypatch.context() as patch:
            used = forced(patch, index)
            actual = results()
            sets.update(used)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b), used
    assert len(sets) >= (6 if channels > 1 else 3)  # a ring's have fewer channels
    assert len({overlap_add.tile_shape(96, 96, tile) for tile in sets}) == 3


@pytest.mark.parametrize("mode", ["labels", "values", "mask", "foreground", "entropy"])
def test_every_configuration_of_the_slabs(mode, monkeypatch):
    """The same bits in each as by default, and the ring is cleared; the default has other tests."""
    ring = torch.randn(11, 3, 9, 47, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    channels = 11 if mode in ("values", "mask") else 1
    dtype = {"labels": torch.uint8, "mask": torch.bool}.get(mode, torch.float32)

    def result():
        out = torch.zeros(channels, 2, 9, 47, dtype=dtype, device=DEVICE)
        kept = ring.clone()
        options = dict(start=2, stop=4, activation="softmax", threshold=0.1, clear=True)
        finalize_slab(kept, out, mode, backend="triton", **options)
        return out, kept

    expected = result()
    sets = set()
    for index in range(3):
        with monkeypatch.context() as patch:
            used = forced(patch, index)
            actual = result()
        sets.update(used)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), used
    assert len(sets) == 3


def test_sets_are_small_and_begin_with_the_default():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for classes in (1, 2, 4, 8, 16, 17, 64, 117, 200, 300):
            for contiguous in (True, False):
                problem = soft_confusion.Problem(
                    dtype, 1, classes, 4096, 0, 2, 2, 0, False, False, 0.0, 4, contiguous
                )
                for backward in (False, True):
                    allowed = soft_confusion.configurations(problem, backward)
                    assert 2 <= len(set(allowed)) == len(allowed) <= 5
                    plan = soft_confusion.plan(problem, backward)
                    assert soft_confusion.plan(problem, backward, allowed[0]) == plan
            fused = overlap_add.Problem(dtype, classes, (8, 8, 8), (4, 4, 4), False, True)
            assert 1 <= len(overlap_add.configurations(fused)) <= 4
            slab = slabs.Problem(dtype, dtype, classes, classes, 512, 0, 0, False, False)
            assert slabs.tiles(classes, 512, slabs.configurations(slab)[0]) == slabs.tiles(
                classes, 512
            )


# --- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ([[10.0] * 5, [9.0] * 5, [8.0] * 5], 2),
        ([[10.0] * 5, [9.9] * 5], 0),  # 1 %
        ([[10.0, 8.0, 12.0, 10.0, 10.0], [9.5, 7.5, 11.5, 9.5, 9.5]], 1),  # outliers are no noise
        ([[9.0, 9.0, 10.0, 11.0, 11.0], [8.5, 8.5, 9.5, 10.5, 10.5]], 0),  # less than the noise
        ([[10.0] * 5, []], 0),  # cannot run here
        ([[10.0] * 5, [], [9.0] * 5], 2),
        ([[10.0] * 5, [11.0] * 5], 0),
    ],
)
def test_the_default_stays_unless_something_is_faster_by_more_than_the_noise(seconds, chosen):
    assert _tuning.fastest(seconds) == chosen


def test_gates():
    ones = torch.ones(4)
    nan = torch.tensor([1.0, float("nan"), float("inf"), 1.0])
    assert _tuning.same_bits(nan, nan.clone())
    assert not _tuning.same_bits(ones, nan)
    assert not _tuning.same_bits(ones, ones + torch.tensor([0, 0, 0, 2.0**-23]))
    assert _tuning.same_bits(torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert _tuning.same_sums(nan, nan.clone())
    assert _tuning.same_sums(ones, ones + 2.0**-20)
    assert not _tuning.same_sums(ones, ones + 1e-3)
    assert not _tuning.same_sums(ones, nan)
    assert not _tuning.same_sums(torch.tensor([float("inf")]), torch.tensor([1.0]))


class Stopwatch:
    """A clock for machines without a GPU: time as the test says it passes."""

    def __init__(self, cost) -> None:
        self.cost = cost
        self.timed: list[object] = []

    def seconds(self, call) -> float:
        configuration = call.args[0]
        self.timed.append(configuration)
        return self.cost(configuration)


def prefer(value: object):
    return lambda configuration: 1.0 if configuration == value else 2.0


@pytest.fixture
def measurable(monkeypatch):
    """Pretend that the device at hand can be measured; returns the clock to set."""
    watch = Stopwatch(lambda configuration: 1.0)
    monkeypatch.setattr(_tuning, "device_name", lambda device: IMAGINARY)
    monkeypatch.setattr(_tuning, "clock", lambda device: watch)
    return watch


CASE = Case(classes=3, batch=1, spatial=(40,), target_dtype=torch.uint8)
SET = soft_confusion.configurations(problem_of(CASE), backward=False)
KEY = "soft_confusion float32, 3 classes, labels, softmax, up to 2^6 voxels"


def launched(monkeypatch) -> list[object]:
    """The configurations of plan(), which every launch of the losses asks."""
    seen: list[object] = []
    plan = soft_confusion.plan

    def watched(problem, backward, shape=None):
        seen.append(shape)
        return plan(problem, backward, shape)

    monkeypatch.setattr(soft_confusion, "plan", watched)
    return seen


def sums() -> torch.Tensor:
    input, target, _ = (None if x is None else x.to(DEVICE) for x in tensors(CASE))
    return OPERATORS.soft_confusion(input, target, None, *schema_arguments(CASE), False)


def test_without_tuning_nothing_is_measured_or_looked_up(measurable, monkeypatch, folder):
    seen = launched(monkeypatch)
    sums()
    assert seen == [None]
    assert not measurable.timed
    assert not folder.exists()
    assert not _tuning.state().chosen


def test_a_first_call_measures_and_later_ones_look_up(measurable, monkeypatch, folder):
    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    measurable.cost = prefer(SET[2])
    seen = launched(monkeypatch)
    expected = sums()
    assert seen[-1] == SET[2]
    assert measurable.timed.count(SET[0]) == measurable.timed.count(SET[2]) >= _tuning.LEAST_ROUNDS
    measurable.timed.clear()
    seen.clear()
    assert torch.equal(sums(), expected)
    assert seen == [SET[2]]
    assert not measurable.timed
    found = json.loads((folder / "tuned.json").read_text())
    assert found["format"] == _tuning.FORMAT
    choice = found["devices"][IMAGINARY][KEY]
    assert choice["configuration"] == SET[2]._asdict()
    assert choice["default"] == SET[0]._asdict()
    assert choice["us"] < choice["default_us"]


def test_a_default_that_stays_is_remembered_too(measurable, monkeypatch, folder):
    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    sums()
    assert measurable.timed
    measurable.timed.clear()
    _tuning.forget()
    sums()
    assert not measurable.timed
    found = json.loads((folder / "tuned.json").read_text())
    assert found["devices"][IMAGINARY][KEY]["configuration"] == SET[0]._asdict()


def test_a_volume_of_almost_the_same_size_shares_the_choice(measurable, monkeypatch):
    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    measurable.cost = prefer(SET[1])
    sums()
    measurable.timed.clear()
    seen = launched(monkeypatch)
    input = torch.randn(1, 3, 50, device=DEVICE)
    target = torch.zeros(1, 50, dtype=torch.uint8, device=DEVICE)
    OPERATORS.soft_confusion(input, target, None, *schema_arguments(CASE), False)
    assert seen == [SET[1]]
    assert not measurable.timed


def test_a_new_process_reads_the_choice(measurable, monkeypatch, folder):
    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    measurable.cost = prefer(SET[2])
    sums()
    code = """
from tests import test_tuning as t
t._tuning.device_name = lambda device: t.IMAGINARY
t._tuning.clock = None
plan = t.soft_confusion.plan
def watched(problem, backward, shape=None):
    print("launched", shape)
    return plan(problem, backward, shape)
t.soft_confusion.plan = watched
t.sums()
"""
    outputs = {}
    for value in ("", "0"):
        environment = {**os.environ, "VOXFUSE_TUNE": value}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
        outputs[value] = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("launched ")[1:]
    assert [line.strip() for line in outputs[""]] == [repr(SET[2])]
    assert [line.strip() for line in outputs["0"]] == ["None"]  # the table is not used


def test_zero_ignores_the_table_and_nonsense_is_refused(measurable, monkeypatch):
    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    measurable.cost = prefer(SET[2])
    sums()
    monkeypatch.setenv("VOXFUSE_TUNE", "0")
    _tuning.forget()
    seen = launched(monkeypatch)
    sums()
    assert seen == [None]
    monkeypatch.setenv("VOXFUSE_TUNE", "yes")
    _tuning.forget()
    with pytest.raises(ValueError, match="VOXFUSE_TUNE: got 'yes'"):
        sums()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 99, "devices": {}}',
        '{"format": 1}',
        '{"format": 1, "devices": {"a GPU": []}}',
        '{"format": 1, "devices": {"a GPU": {"a key": {"configuration": 7}}}}',
        "\x00\xff",
    ],
)
def test_a_damaged_file_is_reported_ignored_and_left_alone(text, measurable, monkeypatch, folder):
    folder.mkdir()
    path = folder / "tuned.json"
    path.write_bytes(text.encode("latin-1"))
    seen = launched(monkeypatch)
    with pytest.warns(RuntimeWarning, match="damaged or not its own.*voxfuse tune --clear"):
        sums()
    assert seen == [None]
    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    measurable.cost = prefer(SET[1])
    _tuning.forget()
    with pytest.warns(RuntimeWarning, match="damaged"):
        sums()
    assert seen[-1] == SET[1]  # for this process
    assert path.read_bytes() == text.encode("latin-1")
    assert tuning.information()["error"]
    assert tuning.clear() == path
    assert not path.exists()


def test_a_choice_outside_the_set_is_not_used(measurable, monkeypatch, folder):
    folder.mkdir()
    choice = {"configuration": {**SET[0]._asdict(), "num_warps": 32}}
    whole = {"format": _tuning.FORMAT, "devices": {IMAGINARY: {KEY: choice}}}
    (folder / "tuned.json").write_text(json.dumps(whole))
    seen = launched(monkeypatch)
    sums()
    assert seen == [None]


def test_nothing_is_measured_while_a_graph_is_captured(measurable, monkeypatch):
    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    measurable.cost = prefer(SET[2])
    seen = launched(monkeypatch)
    monkeypatch.setattr(_tuning, "capturing", lambda device: True)
    sums()
    assert seen == [None]
    assert not measurable.timed
    monkeypatch.setattr(_tuning, "capturing", lambda device: False)
    sums()  # the capture has not settled it
    assert seen[-1] == SET[2]
    monkeypatch.setattr(_tuning, "capturing", lambda device: True)
    seen.clear()
    sums()  # what is known is used in a capture too
    assert seen == [SET[2]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_nothing_is_measured_in_the_interpreter(monkeypatch, folder):
    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    seen = launched(monkeypatch)
    sums()
    assert seen == [None]
    assert not folder.exists()


def test_a_configuration_with_other_results_is_left_out(measurable, monkeypatch):
    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    measurable.cost = prefer(SET[2])
    plan = soft_confusion.plan

    def broken(problem, backward, shape=None):
        chosen = plan(problem, backward, shape)
        if shape != SET[2]:
            return chosen
        return chosen._replace(constants={**chosen.constants, "GAMMA": 2, "LOGS": False})

    monkeypatch.setattr(soft_confusion, "plan", broken)
    with pytest.warns(RuntimeWarning, match="gives another result"):
        sums()
    assert SET[2] not in measurable.timed
    assert SET[1] in measurable.timed


def test_what_a_device_has_too_little_of_is_left_out(measurable, monkeypatch):
    from triton.runtime.errors import OutOfResources

    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    plan = soft_confusion.plan

    def scarce(problem, backward, shape=None):
        if shape == SET[2]:
            raise OutOfResources(2, 1, "threads")
        return plan(problem, backward, shape)

    monkeypatch.setattr(soft_confusion, "plan", scarce)
    sums()
    assert SET[2] not in measurable.timed
    assert _tuning.state().log[0].medians[2] is None


def test_other_errors_are_not_swallowed(measurable, monkeypatch):
    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    plan = soft_confusion.plan

    def wrong(problem, backward, shape=None):
        if shape == SET[1]:
            raise ZeroDivisionError
        return plan(problem, backward, shape)

    monkeypatch.setattr(soft_confusion, "plan", wrong)
    with pytest.raises(ZeroDivisionError):
        sums()


def test_without_memory_to_measure_in_the_default_runs(measurable, monkeypatch):
    def full(device):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    monkeypatch.setattr(_tuning, "clock", full)
    seen = launched(monkeypatch)
    with pytest.warns(RuntimeWarning, match="no memory to measure"):
        sums()
    assert seen[-1] is None


def test_what_is_written_into_is_not_disturbed(measurable, monkeypatch):
    """Rings are added to once, however often that is measured."""
    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    patches, grid, rows, weights, _, _, ring = fusion(torch.float32, 1)
    expected, actual = ring.clone(), ring.clone()
    arguments = (patches, grid, rows, weights, None, 0, 0, 2)

    class Real(Stopwatch):
        def seconds(self, call) -> float:
            call()
            return super().seconds(call)

    monkeypatch.setattr(_tuning, "clock", lambda device: Real(lambda configuration: 1.0))
    monkeypatch.setattr(_tuning, "ROUNDS", 1)
    OPERATORS.overlap_add_(actual, *arguments)
    assert _tuning.state().log
    monkeypatch.setenv("VOXFUSE_TUNE", "0")
    _tuning.forget()
    OPERATORS.overlap_add_(expected, *arguments)
    assert torch.equal(actual, expected)


# --- the file between processes ------------------------------------------------------------------


def test_many_writers_lose_nothing_and_agree(folder):
    """Each with a state of its own, as the ranks of a distributed run have."""
    states = [_tuning._State(measuring=True) for _ in range(8)]
    agreed = []

    def write(number: int) -> None:
        own = {"configuration": {"num_warps": number}}
        states[number].keep("a GPU", f"key {number}", own)
        agreed.append(states[number].keep("a GPU", "shared", own)["configuration"])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(len(states))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tables = _tuning.read_file(folder / "tuned.json")
    assert len(tables["a GPU"]) == len(states) + 1
    assert all(one == agreed[0] for one in agreed)
    assert {path.name for path in folder.iterdir()} == {"tuned.json", "tuned.lock"}


def test_a_folder_that_cannot_be_written_costs_a_warning(measurable, monkeypatch, folder):
    folder.write_text("a file where the folder should be")
    monkeypatch.setenv("VOXFUSE_TUNE", "1")
    measurable.cost = prefer(SET[1])
    seen = launched(monkeypatch)
    with pytest.warns(RuntimeWarning):
        sums()
    assert seen[-1] == SET[1]


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    assert _tuning.cache_file() == tmp_path / "cache" / "tuned.json"
    monkeypatch.delenv("VOXFUSE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert _tuning.cache_file() == tmp_path / "shared" / "voxfuse" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _tuning.cache_file() == tmp_path / ".cache" / "voxfuse" / "tuned.json"


# --- voxfuse.tune and the command ----------------------------------------------------------------


@pytest.fixture
def pretended_gpu(measurable, monkeypatch):
    """voxfuse.tune on the CPU: in the interpreter, with the test's clock."""
    monkeypatch.setattr(tuning, "_require_gpu", lambda device: None)
    monkeypatch.setattr(tuning, "_fits", lambda size, device: True)
    return measurable


def test_tune_measures_every_family_once(pretended_gpu, folder):
    pretended_gpu.cost = lambda configuration: 2.0 if configuration[0] == 4 else 1.0
    shapes = [(1, 2, 6, 5, 4)]
    found = tuning.tune(shapes, [torch.float32], device=DEVICE)
    counts = collections.Counter(one.key.split()[0] for one in found)
    assert counts == {
        "soft_confusion": 1,
        "soft_confusion_backward": 1,
        "overlap_add": 2,  # into a volume and into a ring
        "overlap_add_backward": 1,
        "finalize_slab": 2,  # labels and values
    }
    assert all(one.chosen != 0 and one.speedup == 2 for one in found)
    assert all("us with num_warps" in str(one) for one in found)
    assert tuning.tune(shapes, [torch.float32], device=DEVICE) == []  # all of it is known
    assert len(_tuning.read_file(folder / "tuned.json")[IMAGINARY]) == len(found)


def test_tune_ends_with_its_time(pretended_gpu):
    assert tuning.tune([(1, 2, 6, 5, 4)], device=DEVICE, seconds=1e-9) == []


def test_the_defaults_of_tune_are_the_benchmarks_shapes():
    assert set(byte_model.LOSS_SHAPES) <= set(tuning.SHAPES)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"shapes": [(1, 2)]}, ValueError, r"shapes: got \(1, 2\)"),
        ({"shapes": [(1, 2, 0)]}, ValueError, "shapes"),
        ({"dtypes": [torch.int32]}, TypeError, "dtypes: got torch.int32"),
        ({"operators": ["conv"]}, ValueError, "operators: got 'conv'"),
        ({"seconds": 0}, ValueError, "seconds: got 0"),
    ],
)
def test_bad_input(arguments, error, match):
    with pytest.raises(error, match=match):
        voxfuse.tune(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_tune_says_why_it_cannot(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="interpreter"):
        voxfuse.tune()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="no GPU"):
        voxfuse.tune()
    assert cli.main(["tune", "--shapes", "1,2,8"]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_the_command(pretended_gpu, capsys, monkeypatch):
    pretended_gpu.cost = lambda configuration: 2.0 if configuration[0] == 4 else 1.0
    arguments = ["tune", "--shapes", "1x2x6x5x4", "--dtypes", "float32", "--device", DEVICE]
    assert cli.main([*arguments, "--operators", "soft_confusion"]) == 0
    assert "2 launches measured, 2 not the default any more" in capsys.readouterr().out
    assert cli.main([*arguments, "--operators", "finalize_slab", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["speedup"] for row in rows} == {2.0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "imaginary")
    assert tuning.information()["choices"] == 4
    line = cli.info._tuning_line(tuning.information())
    assert line.startswith("yes: 4 launches measured, 4 not the default")
    monkeypatch.setenv("VOXFUSE_TUNE", "0")
    assert cli.info._tuning_line(tuning.information()).startswith("no, by VOXFUSE_TUNE=0")
    assert cli.main(["tune", "--clear"]) == 0
    assert "removed" in capsys.readouterr().out
    assert cli.info._tuning_line(tuning.information()).startswith("no: nothing was measured")
    assert cli.main(["tune", "--clear"]) == 0
    assert "nothing to clear" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["tune", "--shapes", "1,two"])
    assert "got '1,two'" in capsys.readouterr().err


def test_info_says_whether_a_table_is_in_use(capsys):
    assert cli.main(["info"]) == 0
    assert "tuned       no: nothing was measured" in capsys.readouterr().out


@pytest.mark.gpu
def test_measuring_on_a_gpu(folder):
    """The real clock, and a second look that measures nothing."""
    found = voxfuse.tune([(1, 3, 40, 40, 40)], [torch.float32])
    assert {one.key.split()[0] for one in found} >= {"soft_confusion", "finalize_slab"}
    assert all(one.seconds[0] > 0 for one in found)
    assert all(one.seconds[one.chosen] <= one.seconds[0] for one in found)
    assert voxfuse.tune([(1, 3, 40, 40, 40)], [torch.float32]) == []
    assert tuning.information()["choices"] == len(found)
