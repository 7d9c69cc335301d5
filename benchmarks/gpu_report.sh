#!/usr/bin/env bash
# Build, check and measure voxfuse on the GPU of this machine, in under nine minutes.
#
#   benchmarks/gpu_report.sh OUT                 report.json, report.md and logs, in OUT
#   benchmarks/gpu_report.sh OUT --dry-run       the same steps on the CPU, small
#   benchmarks/gpu_report.sh OUT --help          the other options
#
# Needs Python 3.10 or newer with PyTorch (CUDA) and pytest; for the CUDA kernels also nvcc, CMake
# and pybind11, and Ninja if it is there. PYTHON names the interpreter (default python3). Nothing is
# installed and nothing is downloaded: what is missing is listed in the report.
set -euo pipefail

if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
out=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
command -v "$python" > /dev/null || { echo "$python was not found; set PYTHON" >&2; exit 2; }
exec "$python" "$root/benchmarks/gpu_report.py" "$out" "$@"
