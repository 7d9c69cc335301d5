"""The built CUDA library: its operators, and what the compiler made of the kernels."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import voxfuse

LIBRARY = Path(voxfuse.__file__).parent / "libvoxfuse_cuda.so"


def cuobjdump() -> str | None:
    """CUDA's disassembler: Triton's package carries one, so no toolkit is needed."""
    carried = Path(sysconfig.get_path("purelib")) / "triton/backends/nvidia/bin/cuobjdump"
    return str(carried) if carried.exists() else shutil.which("cuobjdump")


if not LIBRARY.exists():
    pytest.skip("libvoxfuse_cuda.so was not built", allow_module_level=True)
if cuobjdump() is None:
    pytest.skip("cuobjdump is not installed (Triton's package has one)", allow_module_level=True)


def dump(*options: str) -> str:
    command = [str(cuobjdump()), *options, str(LIBRARY)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclasses.dataclass(frozen=True)
class Kernel:
    architecture: str
    symbol: str
    name: str  # as in the source, e.g. few_forward<float, 2, false>
    registers: int
    stack: int
    shared: int
    local: int


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    found = []
    architecture = ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line.strip()):
            architecture = match[1]
        elif match := re.match(r"Function (\S+):", line.strip()):
            symbol = match[1]
        elif match := re.match(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line.strip()):
            found.append(Kernel(architecture, symbol, symbol, *map(int, match.groups())))
    names = (
        subprocess.run(
            ["c++filt"], input="\n".join(k.symbol for k in found), capture_output=True, text=True
        ).stdout.splitlines()
        if shutil.which("c++filt")
        else [k.symbol for k in found]
    )
    short = [
        re.sub(r">\(.*", ">", re.sub(r"^void |voxfuse::cuda::|\(anonymous namespace\)::", "", name))
        for name in names
    ]
    return [dataclasses.replace(k, name=n) for k, n in zip(found, short, strict=True)]


def test_number_of_instances(kernels):
    per_architecture: dict[str, int] = {}
    for kernel in kernels:
        per_architecture[kernel.architecture] = per_architecture.get(kernel.architecture, 0) + 1
    assert per_architecture
    assert all(100 < count <= 210 for count in per_architecture.values()), per_architecture


def test_no_kernel_uses_local_memory(kernels):
    """Neither spilled registers nor arrays that are indexed at run time."""
    offenders = [f"{k.name} {k.architecture}" for k in kernels if k.stack or k.local]
    assert offenders == []


def test_shared_memory_fits_without_asking_for_more(kernels):
    assert max(kernel.shared for kernel in kernels) <= 48 * 1024


#: Bits that a thread of a kernel reads (and, backward, writes) at once.
WIDE = {
    "few_forward<float, 2, false>": 128,
    "few_forward<float, 16, false>": 128,
    "few_forward<__nv_bfloat16, 2, false>": 128,
    "few_forward<__half, 2, false>": 128,
    "few_forward<__nv_bfloat16, 4, false>": 64,
    "few_backward<float, 2>": 128,
    "few_backward<__nv_bfloat16, 2>": 128,
    "many_forward<float, 8>": 128,
    "many_backward<float, 8>": 128,
    "separate_forward<float, 1, false>": 128,
    "separate_backward<__nv_bfloat16, 1>": 128,
    "gather<float, (Mode)0, false>": 128,
    "gather<__nv_bfloat16, (Mode)0, false>": 128,
    "gather<float, (Mode)0, true>": 128,
    "gather<__nv_bfloat16, (Mode)1, true>": 128,
    "normalise<__half>": 128,
    "scatter<__half>": 128,
    "scatter_activated<float>": 128,
    "finalize<float, (voxfuse::Finish)1>": 128,
    "finalize<double, (voxfuse::Finish)0>": 128,
    "count<float, (voxfuse::Decision)0>": 128,
    "count<__half, (voxfuse::Decision)1>": 128,
}


@pytest.fixture(scope="module")
def code(kernels) -> dict[str, str]:
    """Instructions of the kernels in WIDE, by symbol; the library is read once for all of them."""
    symbols = {kernel.symbol for kernel in kernels if kernel.name in WIDE}
    found: dict[str, str] = {}
    for part in dump("--dump-sass", "--function", ",".join(symbols)).split("Function : ")[1:]:
        symbol, _, body = part.partition("\n")
        found[symbol] = found.get(symbol, "") + body
    return found


@pytest.mark.parametrize("kernel", WIDE)
def test_wide_loads_and_stores(kernels, code, kernel):
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt (binutils) is not installed")
    chosen = [k for k in kernels if k.name == kernel]
    assert chosen, f"no kernel {kernel} in {sorted({k.name for k in kernels})}"
    instructions, width = code[chosen[0].symbol], WIDE[kernel]
    assert re.search(rf"LDG\.E(\.\w+)*\.{width}", instructions)
    if "backward" in kernel or kernel.startswith(("gather", "scatter")):
        assert re.search(rf"STG\.E(\.\w+)*\.{width}", instructions)
    assert not re.search(r"\b(LDL|STL)\b", instructions)


def test_the_library_registers_a_kernel_for_every_operator(tmp_path):
    """Also under a PyTorch without CUDA, where an empty library stands in for libtorch_cuda."""
    cpu_library = LIBRARY.with_name("libvoxfuse_cpu.so")
    if not cpu_library.exists():
        pytest.skip("libvoxfuse_cpu.so, which declares the operators, was not built")
    environment = dict(os.environ)
    if torch.version.cuda is None:
        if shutil.which("g++") is None:
            pytest.skip("g++ is not installed")
        stub = tmp_path / "stub.cpp"
        stub.write_text(
            'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'
        )
        library = tmp_path / "libtorch_cuda.so"
        subprocess.run(
            ["g++", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", stub, "-o", library],
            check=True,
        )
        environment["LD_LIBRARY_PATH"] = str(tmp_path)
    operators = [
        "soft_confusion",
        "soft_confusion_backward",
        "ratio_loss",
        "ratio_loss_backward",
        "overlap_add",
        "overlap_add_backward",
        "overlap_add_",
        "overlap_weights_",
        "finalize_slab",
        "hard_confusion",
        "resample_argmax",
    ]
    code = (
        "import sys, torch\n"
        "for path in sys.argv[1:3]: torch.ops.load_library(path)\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print([name for name in sys.argv[3:] if not has('voxfuse::' + name, 'CUDA')])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(cpu_library), str(LIBRARY), *operators],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
