"""Settings for every test. Triton reads TRITON_INTERPRET when it is imported: set it before."""

from __future__ import annotations

import os
import zlib

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker a core: more threads would only wait for each other.
    torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "voxfuse", deadline=None, derandomize=True, max_examples=60, print_blob=True
)
hypothesis.settings.load_profile("voxfuse")


#: Files that take minutes. Several workers begin with them, so that none is left alone at the end.
LONGEST = (
    "test_triton_aot",
    "test_examples",
    "test_soft_confusion_triton",
    "test_head_confusion_triton",
    "test_cuda_races",
    "test_cuda_emulation",
    "test_gpu_report",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="PyTorch sees no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test draws its own numbers, whatever ran before it in the same process."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


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
