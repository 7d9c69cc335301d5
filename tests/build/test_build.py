"""The compiled libraries: stable ABI only, schemas as Python declares them, absence survived."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import voxfuse
from voxfuse import _library, cli
from voxfuse.contract import SCHEMAS
from voxfuse.losses import engine
from voxfuse.ops import _registry

PACKAGE = Path(voxfuse.__file__).parent
LIBRARIES = ("libvoxfuse_cpu.so", "libvoxfuse_cuda.so")


@pytest.mark.parametrize("name", LIBRARIES)
def test_only_the_stable_abi_is_used(name):
    """No symbol of PyTorch's C++ API may be needed: then one binary fits every torch from 2.11."""
    if not (PACKAGE / name).exists():
        pytest.skip(f"{name} was not built")
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", str(PACKAGE / name)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    needed = [line.split(maxsplit=1)[1] for line in listing.splitlines()]
    forbidden = [s for s in needed if re.search(r"\b(at|c10|torch|caffe2)::", s)]
    assert forbidden == []
    assert any(s.startswith(("aoti_torch_", "torch_")) for s in needed), "does not use LibTorch?"


def test_no_function_of_a_larger_instruction_set_has_a_name_of_all():
    """Of functions with one name the linker keeps one, for every machine."""
    library = PACKAGE / "libvoxfuse_cpu.so"
    if not library.exists():
        pytest.skip("libvoxfuse_cpu.so was not built")
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    listing = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", str(library)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    if (
        "SYMBOL TABLE:\nno symbols"
        in subprocess.run(
            ["objdump", "--syms", str(library)], check=True, capture_output=True, text=True
        ).stdout
    ):
        pytest.skip("libvoxfuse_cpu.so is stripped, as a published wheel's is")
    found: dict[str, set[str]] = {"avx2": set(), "avx512": set(), "": set()}
    function = ""
    for line in listing.splitlines():
        head = re.fullmatch(r"[0-9a-f]+ <(.+)>:", line)
        if head:
            function = head[1]
        elif re.match(r"\s+[0-9a-f]+:\s+v[a-z]", line):  # VEX or EVEX: AVX at least
            of = re.search(r"voxfuse.*\d(avx2|avx512)", function)
            found[of[1] if of else ""].add(function)
    assert found["avx2"]
    assert found["avx512"]
    assert found[""] == set()


def test_host_module_needs_no_torch_symbol():
    modules = list(PACKAGE.glob("_host*.so"))
    if not modules:
        pytest.skip("the host module was not built")
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", str(modules[0])],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert not re.search(r"\b(at|c10|torch)::|aoti_torch|torch_", listing)


@pytest.mark.skipif(
    not _library.defines_operators(), reason="the compiled CPU library is not built"
)
@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_compiled_schema_equals_the_one_python_declares(name):
    compiled = getattr(torch.ops.voxfuse, name).default._schema
    declared = torch._C.parse_schema(name + SCHEMAS[name])
    assert str(compiled).removeprefix("voxfuse::") == str(declared)


@pytest.mark.skipif(
    not _library.defines_operators(), reason="the compiled CPU library is not built"
)
@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_operator_has_a_compiled_cpu_kernel(name):
    registered = torch._C._dispatch_dump(f"voxfuse::{name}")
    line = next(line for line in registered.splitlines() if line.startswith("CPU:"))
    assert ".py" not in line, f"{name} runs the reference on the CPU: {line}"


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_devices_without_kernels_of_ours_run_the_reference_or_say_why_not(name):
    for namespace in _registry.NAMESPACES:
        registered = torch._C._dispatch_dump(f"{namespace}::{name}").splitlines()
        keys = {line.split(":")[0] for line in registered if "_registry.py" in line}
        assert "MPS" in keys
        assert ("XPU" in keys) == (namespace != "voxfuse_triton")


def test_mps_is_an_error_that_says_what_to_do():
    for look_up in (_registry.namespace_of, engine.operators_of):
        with pytest.raises(RuntimeError, match=r"device: got mps, .* move the tensors to the CPU"):
            look_up("auto", torch.device("mps"))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_any_compiled_library_everything_runs_and_one_warning_says_so():
    result = run_python(
        "import torch, voxfuse\n"
        "x = torch.randn(1, 2, 8, requires_grad=True)\n"
        "voxfuse.TverskyLoss()(x, torch.zeros(1, 1, 8, dtype=torch.long)).backward()\n"
        "assert x.grad is not None\n"
        "voxfuse.soft_confusion(x, torch.zeros(1, 8, dtype=torch.long))\n"
        "print(voxfuse.backends()['cpp'].available)\n",
        VOXFUSE_LIBRARY="0",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"
    assert result.stderr.count("runs without its compiled CPU kernels") == 1
    assert _library.reference_cost() in result.stderr
    assert "What helps: unset VOXFUSE_LIBRARY" in result.stderr


def test_the_warning_names_the_command_that_helps(monkeypatch, tmp_path):
    monkeypatch.delenv("VOXFUSE_LIBRARY", raising=False)
    package = tmp_path / "src" / "voxfuse"
    package.mkdir(parents=True)
    monkeypatch.setattr(_library, "_DIRECTORY", package)
    again = "VOXFUSE_BUILD=1 pip install --force-reinstall --no-deps --no-cache-dir"
    for noted, where in (
        (None, "voxfuse"),
        ('{"url": "file:///a.whl", "archive_info": {}}', "voxfuse"),
        ('{"url": "file:///a%20clone", "dir_info": {}}', "--no-build-isolation '/a clone'"),
    ):
        installed = SimpleNamespace(read_text=lambda name, noted=noted: noted)
        monkeypatch.setattr(_library.metadata, "distribution", lambda _, found=installed: found)
        assert _library.remedy() == f"{again} {where}"
    (tmp_path / "CMakeLists.txt").touch()
    assert _library.remedy() == f"make -C {tmp_path} build"
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert _library.remedy() == 'pip install --upgrade "torch>=2.11"'


@pytest.mark.parametrize(
    ("error", "meaning", "remedy"),
    [
        ("/lib/libc.so.6: version `GLIBC_2.99' not found", "C library is older", "--no-binary"),
        ("/opt/libm.so: version `GLIBCXX_3.4' not found", "C\\+\\+ library is older", "conda i"),
        ("/old/libm.so: version `CXXABI_1.3' not found", "C\\+\\+ library is older", "unset LD"),
        ("voxfuse.so: undefined symbol: torch_x", "for this PyTorch, 2", "VOXFUSE_BUILD=1 pip"),
    ],
)  # fmt: skip
def test_what_the_linker_says_is_explained(monkeypatch, tmp_path, error, meaning, remedy):
    def refuse(path):
        raise RuntimeError(f"Could not load this library: {path}") from OSError(error)

    monkeypatch.setattr(torch.ops, "load_library", refuse)
    library = tmp_path / "src" / "voxfuse" / "libvoxfuse_cpu.so"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(_library, "_DIRECTORY", library.parent)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/somewhere:/old")
    monkeypatch.setenv("CONDA_PREFIX", "/opt/conda")
    monkeypatch.setattr(_library._State, "cpu_error", _library._load(library))
    assert re.search(f"{meaning}.*: {re.escape(error)}", _library._State.cpu_error)
    assert remedy in _library.remedy()


@pytest.mark.parametrize(("driver", "loads"), [(0, True), (12080, False), (13000, True)])
def test_cuda_kernels_newer_than_the_driver_are_left_out(monkeypatch, tmp_path, driver, loads):
    (tmp_path / "_build_info.json").write_text(
        '{"cuda": "13.0.88", "cuda_architectures": "80-real", "cpu_instruction_sets": ""}'
    )
    monkeypatch.setattr(_library, "_DIRECTORY", tmp_path)
    monkeypatch.setattr(_library, "_driver", lambda: driver)
    why = _library._newer_than_the_driver()
    assert (why is None) == loads
    assert loads or "compiled with CUDA 13.0.88, and this driver is for CUDA 12.8" in why


def test_the_cost_without_compiled_kernels_is_that_of_the_committed_measurement():
    cost = _library.reference_cost()
    assert (PACKAGE / "_reference_cost.json").is_file()
    times = [float(x) for x in re.findall(r": ([\d.]+) times", cost)]
    assert len(times) == 2
    assert min(times) > 1


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees(capability):
    """The kernels of each instruction set give the same sums up to rounding."""
    if not _library.defines_operators():
        pytest.skip("the compiled CPU library is not built")
    code = (
        "import torch, voxfuse\n"
        "from voxfuse import _library\n"
        "g = torch.Generator().manual_seed(0)\n"
        "worst = 0.0\n"
        "for classes in (1, 2, 3, 9, 20):\n"
        "  a = 'sigmoid' if classes == 1 else 'softmax'\n"
        "  for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):\n"
        "    x = torch.randn(1, classes, 999, generator=g).to(dtype).requires_grad_()\n"
        "    y = torch.randint(0, max(classes, 2), (1, 1, 999), generator=g)\n"
        "    s = voxfuse.soft_confusion(x, y, activation=a)\n"
        "    r = voxfuse.soft_confusion(x.detach().double(), y, backend='reference',\n"
        "        activation=a)\n"
        "    worst = max(worst, ((s - r).abs() / (r + 1e-30)).max().item())\n"
        "    s.sum().backward()\n"
        "print(_library.cpu_capability(), worst)\n"
    )
    result = run_python(code, VOXFUSE_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stderr
    used, worst = result.stdout.split()
    if used != capability:
        pytest.skip(f"this machine has no {capability}")
    assert float(worst) < 1e-5


def test_importing_voxfuse_imports_no_optional_package():
    result = run_python(
        "import sys, voxfuse\n"
        "heavy = {'monai', 'nnunetv2', 'torchio', 'nibabel', 'matplotlib', 'scipy', 'triton'}\n"
        "print(sorted(heavy & set(sys.modules)))\n",
        TRITON_INTERPRET="0",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_info_reports_every_backend(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["backends"]) == {"reference", "cpp", "cuda", "triton"}
    for backend in found["backends"].values():
        assert backend["available"] or backend["reason"]
    assert found["versions"]["torch"] == str(torch.__version__)
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "Backends" in text
    assert "torch" in text
