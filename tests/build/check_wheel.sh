#!/bin/sh
# Install the wheel under one PyTorch, away from the source tree and with no compiler on the path, and run
# the README's examples there, and a few tests: other ones if pytest's arguments are given.
#   tests/build/check_wheel.sh PYTHON TORCH FOLDER [ARGUMENT ...]     FOLDER/dist holds the wheel
set -eu
python=$1 torch=$2 folder=$(realpath "$3")
shift 3
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
room=$folder/$tag-$(printf %s "$torch" | tr -c 'A-Za-z0-9.' '_')

echo "-- $tag, $torch"
rm -rf "$room"
"$python" -m venv "$room/venv"
"$room/venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile \
  "$torch" "$folder"/dist/voxfuse-*-"$tag"-*.whl pytest hypothesis scipy
# The tests and the page alone, so that voxfuse can only come from the wheel.
cp -r tests pyproject.toml README.md "$room"
cd "$room"
mkdir tools
for tool in nm objdump; do # tests read the libraries with them
  if found=$(command -v $tool); then ln -s "$found" tools/; fi
done
PATH=$room/venv/bin:$room/tools
for compiler in cc gcc c++ g++ clang clang++ nvcc cmake ninja; do
  if command -v $compiler; then echo "$compiler is on the path"; exit 1; fi
done

voxfuse info
python -W error - <<'END'
import torch
import voxfuse

found = voxfuse.backends()
assert "site-packages" in voxfuse.__file__, voxfuse.__file__
assert found["cpp"].available, found["cpp"].reason
built = voxfuse._library.build_info()["cuda"]
if built and torch.version.cuda:
    assert voxfuse._library.cuda_loaded(), found["cuda"].reason
else:
    print("CUDA kernels: not in this wheel" if not built else "CUDA kernels: not for this PyTorch")
END
if [ $# = 0 ]; then
  set -- "tests/build/test_documentation.py::test_python_examples_of_a_page_run[README.md]" \
    tests/build/test_build.py tests/ops/ratio_loss/test_cpu.py tests/ops/finalize_slab/test_cpu.py
else
  set -- "$@" --ignore-glob "tests/*triton*" --ignore-glob "*/test_cuda*.py" --ignore tests/emulation \
    --ignore tests/examples --ignore tests/losses/test_launches.py \
    --ignore tests/build/test_documentation.py --ignore tests/build/test_gpu_report.py \
    --ignore tests/build/test_instructions.py --ignore tests/build/test_kernels_page.py \
    --ignore tests/build/test_installed.py
fi
python -m pytest -q "$@"
