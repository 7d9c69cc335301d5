"""Settings for every test. Triton reads TRITON_INTERPRET when it is imported: set it before."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest

from tests.interpreter import remember_types_and_shapes, replace_the_language_once_a_launch

if os.environ.get("TRITON_INTERPRET") == "1":
    replace_the_language_once_a_launch()
    remember_types_and_shapes()

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker a core: more threads would only wait for each other.
    torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "voxfuse", deadline=None, derandomize=True, max_examples=60, print_blob=True
)
hypothesis.settings.load_profile("voxfuse")


TESTS = Path(__file__).resolve().parent

#: Files that take longest. Several workers begin with them, so that none is left alone at the end.
LONGEST = (
    "build/test_triton_aot.py",
    "emulation/test_coverage.py",
    "emulation/test_races.py",
    "training/test_simulation.py",
    "ops/soft_confusion/test_cuda.py",
    "build/test_gpu_report.py",
    "examples/test_skull_strip.py",
    "ops/head_confusion/test_triton.py",
    "ops/soft_confusion/test_triton.py",
    "ops/overlap_add/test_triton.py",
    "losses/test_compiled.py",
    "losses/test_training.py",
    "ops/overlap_add/test_cpu.py",
    "losses/test_distributed.py",
    "build/test_installed.py",
    "integrations/test_nnunet_losses.py",
    "ops/soft_confusion/test_types.py",
    "integrations/test_monai.py",
    "ops/head_confusion/test_cpu.py",
    "build/test_cuda_resources.py",
    "ops/test_reduction_triton.py",
    "integrations/test_smp.py",
    "losses/test_head.py",
    "losses/test_memory.py",
    "losses/test_modules.py",
    "ops/finalize_slab/test_triton.py",
    "training/test_end_to_end.py",
    "training/test_trainer.py",
    "integrations/test_nnunet_training.py",
    "build/test_build.py",
    "metrics/test_evaluate.py",
    "integrations/test_nnunet_inference.py",
)


def file_of(item: pytest.Item) -> str:
    return os.path.relpath(item.path, TESTS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(file_of(item), len(LONGEST)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="PyTorch sees no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test draws its own numbers, whatever ran before it and wherever its file is."""
    torch.manual_seed(zlib.crc32(item.name.encode()))


@pytest.fixture
def poisoned_memory():
    """Fill every fresh allocation with NaN, so that a value that is never written shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def one_thread():
    """Small tensors gain nothing from threads of PyTorch, which the CUDA emulation needs itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request) -> str:
    import voxfuse

    found = voxfuse.backends()[request.param]
    if not found.available:
        pytest.skip(f"the {request.param} backend is not available: {found.reason}")
    return request.param


@pytest.fixture
def gpu_operators(gpu_backend) -> object:
    return torch.ops.voxfuse_triton if gpu_backend == "triton" else torch.ops.voxfuse


def _real_data(name):
    """A folder below VOXFUSE_DATA, or below ../shared/data beside the project."""
    folder = Path(os.environ.get("VOXFUSE_DATA", TESTS.parents[1] / "shared" / "data")) / name
    if not folder.is_dir():
        pytest.skip(f"there are no scans in {folder}: set VOXFUSE_DATA to the folder above")
    return folder


@pytest.fixture
def ms_lesions():
    """The folder of MS lesions."""
    return _real_data("ms_lesions")


@pytest.fixture
def hippocampi():
    """The folder of hippocampi."""
    return _real_data("hippocampus")
