#!/bin/sh
# Install the wheel under one PyTorch, away from the source tree, and run the CPU tests there.
#   tests/build/check_wheel.sh PYTHON TORCH FOLDER     FOLDER/wheel holds the wheel
set -eu
python=$1 torch=$2 folder=$3
room=$folder/$(printf %s "$torch" | tr -c 'A-Za-z0-9.' '_')

echo "-- $torch"
rm -rf "$room"
"$python" -m venv "$room/venv"
"$room/venv/bin/python" -m pip --disable-pip-version-check install --quiet \
  "$torch" "$folder"/wheel/voxfuse-*.whl pytest hypothesis scipy
# The tests alone, so that voxfuse can only come from the wheel.
cp -r tests pyproject.toml "$room"
cd "$room"
./venv/bin/voxfuse info
./venv/bin/python -c "
import voxfuse
cpp = voxfuse.backends()['cpp']
assert cpp.available, cpp.reason
assert '$room' in voxfuse.__file__ or 'site-packages' in voxfuse.__file__, voxfuse.__file__
"
./venv/bin/python -m pytest -q -m "not gpu" \
  --ignore-glob "tests/*triton*" --ignore-glob "*/test_cuda*.py" --ignore tests/emulation \
  --ignore tests/examples --ignore tests/losses/test_launches.py \
  --ignore tests/build/test_documentation.py --ignore tests/build/test_gpu_report.py \
  --ignore tests/build/test_instructions.py --ignore tests/build/test_kernels_page.py
