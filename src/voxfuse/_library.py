"""Loading of the compiled operator libraries."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import shlex
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

_DIRECTORY = Path(__file__).resolve().parent


class _State:
    cpu_error: str | None = "not looked for yet"
    cuda_error: str | None = "not looked for yet"


def _load(path: Path) -> str | None:
    """Load one operator library; return None, or why it could not be loaded."""
    if not path.exists():
        return f"{path.name} is not installed (the package was built without it)"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        # PyTorch names the file alone; the cause is what the dynamic linker said.
        return f"{path.name} does not load: {explained(str(error.__cause__ or error))}"
    return None


def explained(error: str) -> str:
    """What a message of the dynamic linker means, before the message."""
    for pattern, meaning in (
        (r"`GLIBC_", "this system's C library is older than the one it was compiled with"),
        (r"`(GLIBCXX|CXXABI|GCC)_", "this C++ library is older than the one it was compiled with"),
        (r"undefined symbol", f"it was not compiled for this PyTorch, {torch.__version__}"),
        (r"invalid ELF|wrong ELF|file too short", "it is damaged, or for another processor"),
    ):
        if re.search(pattern, error):
            return f"{meaning}: {error}"
    return error


def _driver() -> int:
    """CUDA's version that the driver is for, 13020 if it is 13.2; 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def _newer_than_the_driver() -> str | None:
    """Why the CUDA library would fail at its first kernel: CUDA's runtime is linked into it."""
    driver = _driver()
    compiled = (build_info() or {}).get("cuda", "")
    if driver and compiled and driver // 1000 < int(compiled.split(".")[0]):
        return (
            f"it was compiled with CUDA {compiled}, and this driver is for CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}; a newer driver helps"
        )
    return None


@functools.cache
def load() -> None:
    """Load the libraries that fit this PyTorch, once, and warn once if there is no compiled one.

    ``VOXFUSE_LIBRARY=0`` pretends that nothing was compiled.
    """
    if os.environ.get("VOXFUSE_LIBRARY", "1") == "0":
        _State.cpu_error = _State.cuda_error = "disabled by VOXFUSE_LIBRARY=0"
    else:
        _State.cpu_error = _load(_DIRECTORY / "libvoxfuse_cpu.so")
        if _State.cpu_error is not None:
            _State.cuda_error = "needs libvoxfuse_cpu.so, which declares the operators"
        elif torch.version.cuda is None:
            # The CUDA library calls into libtorch_cuda, which this PyTorch does not have.
            _State.cuda_error = "this PyTorch is built without CUDA"
        else:
            _State.cuda_error = _newer_than_the_driver() or _load(_DIRECTORY / "libvoxfuse_cuda.so")
    if _State.cpu_error is not None:
        warnings.warn(
            f"voxfuse runs without its compiled CPU kernels ({_State.cpu_error}); CPU tensors use "
            f"the PyTorch reference, which is slow ({reference_cost()}). What helps: {remedy()}",
            RuntimeWarning,
            stacklevel=3,
        )


def reference_cost() -> str:
    """How much slower the reference is than the compiled kernels, as it was measured."""
    measured = json.loads((_DIRECTORY / "_reference_cost.json").read_text())
    return "; ".join(
        f"{name}: {row['times_slower']:.{0 if row['times_slower'] > 10 else 1}f} times"
        for name, row in measured["rows"].items()
    )


def remedy() -> str:
    """The command after which the compiled CPU kernels are there."""
    if os.environ.get("VOXFUSE_LIBRARY", "1") == "0":
        return "unset VOXFUSE_LIBRARY"
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11):
        return 'pip install --upgrade "torch>=2.11"'
    too_old = re.search(r"([^\s:]*): version `(GLIBC\w*|CXXABI|GCC)_", _State.cpu_error or "")
    if too_old and str(Path(too_old[1]).parent) in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        return "unset LD_LIBRARY_PATH"
    root = _DIRECTORY.parents[1]
    if (root / "CMakeLists.txt").exists():
        return f"make -C {root} build"
    again = "pip install --force-reinstall --no-deps --no-cache-dir"
    if too_old and too_old[2] != "GLIBC" and os.environ.get("CONDA_PREFIX"):
        return "conda install --channel conda-forge libstdcxx"
    if too_old:
        return f"{again} --no-binary voxfuse voxfuse  (which compiles it here)"
    return f"VOXFUSE_BUILD=1 {again} {_installed_from() or 'voxfuse'}"


def _installed_from() -> str | None:
    """The folder from which pip installed the package, where that was no index."""
    try:
        noted = metadata.distribution("voxfuse").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    found = json.loads(noted or "{}")
    if "dir_info" not in found:
        return None
    return f"--no-build-isolation {shlex.quote(unquote(urlsplit(found['url']).path))}"


def cpu_error() -> str | None:
    """Why the compiled CPU kernels are missing, or None when they are loaded."""
    load()
    return _State.cpu_error


def cuda_error() -> str | None:
    """Why the compiled CUDA kernels are missing, or None when they are loaded."""
    load()
    return _State.cuda_error


def defines_operators() -> bool:
    """Whether the compiled CPU library is loaded (it owns the operators' schemas)."""
    return cpu_error() is None


def cuda_loaded() -> bool:
    """Whether the compiled CUDA kernels are loaded."""
    return cuda_error() is None


def cpu_capability() -> str | None:
    """The instruction set whose kernels run here (baseline, avx2, avx512), or None."""
    if not defines_operators():
        return None
    function = ctypes.CDLL(str(_DIRECTORY / "libvoxfuse_cpu.so")).voxfuse_cpu_capability
    function.restype = ctypes.c_char_p
    return str(function().decode())


def build_info() -> dict[str, Any] | None:
    """What the libraries were built from and for, or None if nothing was built."""
    path = _DIRECTORY / "_build_info.json"
    if not path.exists():
        return None
    info: dict[str, Any] = json.loads(path.read_text())
    for key in ("cpu_instruction_sets", "cuda_architectures"):
        info[key] = [item for item in info[key].split(";") if item]
    return info
