#!/bin/sh
# Build the wheel of one Python from the unpacked sdist. The operator libraries are the same for every Python:
# they are compiled once, with the PyTorch of the environment that make uses; only _host is compiled again.
#   tests/build/build_wheel.sh PYTHON TOOLS FOLDER     TOOLS/python has PyTorch; FOLDER/source is the sdist
set -eu
here=$(realpath "$(dirname "$0")")
python=$1 tools=$(realpath "$2") folder=$(realpath "$3")
room=$folder/$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')

rm -rf "$room"
"$python" -m venv "$room"
"$room/bin/python" -m pip --disable-pip-version-check install --quiet build "setuptools>=77" wheel "pybind11>=2.13"
mkdir -p "$folder/torch"
ln -sfn "$("$tools/python" -c 'import importlib.util as i, os; print(os.path.dirname(i.find_spec("torch").origin))')" \
  "$folder/torch/torch"
cd "$folder/source"
PATH=$tools:$PATH PYTHONPATH=$folder/torch VOXFUSE_BUILD_DIR=$folder/cmake \
  "$room/bin/python" -m build --no-isolation --skip-dependency-check --wheel --outdir "$room/wheel" . \
  > "$folder/wheel.log"
PATH=$tools:$PATH sh "$here/repair_wheel.sh" "$folder/dist" "$room"/wheel/*.whl
