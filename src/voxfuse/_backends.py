"""What can run here, and why not."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass, field

import torch

from voxfuse import _library

NAMES = ("reference", "cpp", "cuda", "triton")


@dataclass(frozen=True)
class Backend:
    """One backend: whether it is available, why not, and for which devices."""

    name: str
    available: bool
    reason: str
    devices: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        state = f"available ({', '.join(self.devices)})" if self.available else "not available"
        return f"{self.name:<10} {state}" + (f": {self.reason}" if self.reason else "")


def backends() -> dict[str, Backend]:
    """Return every backend by name, with whether it is available and the reason if it is not.

    Example:
        >>> import voxfuse
        >>> voxfuse.backends()["reference"].available
        True
    """
    return {name: _probe(name) for name in NAMES}


def _probe(name: str) -> Backend:
    gpu = torch.cuda.is_available()
    if name == "reference":
        # Intel's GPUs run it by themselves. Apple's (mps) cannot: they have no float64.
        others = (("cuda",) if gpu else ()) + (("xpu",) if torch.xpu.is_available() else ())
        return Backend(name, True, "", ("cpu", *others))
    if name == "cpp":
        error = _library.cpu_error()
        return Backend(name, error is None, error or "", ("cpu",))
    if name == "cuda":
        error = _library.cuda_error()
        if error is None and not gpu:
            error = "PyTorch sees no CUDA device"
        return Backend(name, error is None, error or "", ("cuda",))
    error = triton_error()
    interpreted = interpreting()
    devices = (("cuda",) if gpu else ()) + (("cpu",) if interpreted else ())
    reason = error or ("kernels run in the interpreter, slowly" if interpreted else "")
    return Backend(name, error is None, reason, devices)


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, and so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_error() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if not _triton_installed():
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not interpreting():
        return "PyTorch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def check_name(name: str) -> None:
    """Raise ValueError unless a backend, or the choice between them, has this name."""
    allowed = ("auto", *NAMES)
    if name not in allowed:
        listed = ", ".join(map(repr, allowed))
        raise ValueError(f"backend: got {name!r}, expected one of {listed}")


def require(name: str, device: torch.device) -> None:
    """Raise unless backend ``name`` can run on tensors of ``device``.

    Raises:
        ValueError: no such backend.
        RuntimeError: not available here, with the reason.
    """
    check_name(name)
    backend = _probe(name)
    if not backend.available:
        raise RuntimeError(f"backend: {name!r} is not available here: {backend.reason}")
    if device.type not in backend.devices and device.type != "meta":
        allowed = " or ".join(backend.devices)
        raise RuntimeError(
            f"backend: {name!r} runs on {allowed} tensors, but the input is on {device}"
        )


# It asks the file system and the driver, which a compiler cannot trace; torch.compiler's decorator
# of this meaning would import the compiler with this package.
require._dynamo_marked_constant = True  # type: ignore[attr-defined]


def versions() -> dict[str, str]:
    """Versions of the packages that the kernels depend on."""
    found = {"torch": str(torch.__version__)}
    for package in ("voxfuse", "triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
