#!/bin/sh
# Strip a wheel and give it the lowest manylinux tag that its symbols allow, with nothing of PyTorch inside.
#   tests/build/repair_wheel.sh FOLDER WHEEL           the result lies in FOLDER
set -eu
# CUDA's runtime is linked in; the rest of these is the user's PyTorch.
auditwheel repair --strip --exclude "libtorch*.so*" --exclude "libc10*.so*" --wheel-dir "$1" "$2"
