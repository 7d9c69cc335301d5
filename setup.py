"""Drives CMake; everything else about the package is in pyproject.toml.

Environment:
    VOXFUSE_CUDA=auto|1|0     build the CUDA kernels if nvcc is found and PyTorch has CUDA (auto),
                              always, or never
    TORCH_CUDA_ARCH_LIST      compute capabilities, in PyTorch's notation ("8.0;9.0+PTX")
    VOXFUSE_BUILD=0           install the Python code alone
    VOXFUSE_BUILD_DIR         where CMake works (default build/cmake)
    MAX_JOBS                  parallel compile jobs
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cuda_architectures() -> str:
    """Translate TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") into CMake's notation ("80-real;90")."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    translated = []
    for item in re.split(r"[;, ]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
        if not match:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: got {item!r}, expected capabilities such as 9.0 or 9.0+PTX"
            )
        major, minor, suffix, ptx = match.groups()
        translated.append(f"{major}{minor}{suffix}" + ("" if ptx else "-real"))
    return ";".join(translated)


def what_is_missing() -> str | None:
    """What this machine lacks for compiling the kernels, and what to do, in a line; or None."""
    if not sys.platform.startswith("linux"):
        return f"the kernels are compiled on Linux alone so far, and this is {sys.platform}"
    if shutil.which("cmake") is None:
        return "CMake was not found. Install it (pip install cmake ninja)"
    compilers = (
        [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    )
    if not any(map(shutil.which, compilers)):
        found = " or ".join(compilers)
        return f"no C++ compiler was found ({found}). Install one (apt-get install g++)"
    return None


class CMakeBuild(build_ext):
    """Configure, build and install the CMake project into the package's directory."""

    def run(self) -> None:
        package = ROOT / "src" if self.inplace or self.editable_mode else Path(self.build_lib)
        target = package.resolve() / "voxfuse"
        build = Path(os.environ.get("VOXFUSE_BUILD_DIR", ROOT / "build" / "cmake")).resolve()
        missing = what_is_missing()
        if missing:
            raise SystemExit(
                f"voxfuse: {missing}; or set VOXFUSE_BUILD=0, to install without compiled kernels."
            )
        # The path too: pip's ninja of an earlier build is gone with its environment.
        ninja = shutil.which("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            *("-U_Python*", "-UPython*", "-Upybind11*"),  # of another Python's build there
            *generator,
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DVOXFUSE_CUDA={os.environ.get('VOXFUSE_CUDA', 'auto')}",
            f"-DVOXFUSE_CUDA_ARCHITECTURES={cuda_architectures()}",
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (
            configure,
            ["cmake", "--build", str(build), "--parallel", jobs],
            ["cmake", "--install", str(build)],
        ):
            subprocess.run(command, check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


compiled = os.environ.get("VOXFUSE_BUILD", "1") != "0"
setup(
    # The sources are CMake's business; the extension is named so that wheels carry a platform tag.
    ext_modules=[Extension("voxfuse._host", sources=[])] if compiled else [],
    cmdclass={"build_ext": CMakeBuild} if compiled else {},
)
