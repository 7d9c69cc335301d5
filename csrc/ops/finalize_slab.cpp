// Schema of the operator that turns finished slices of a ring into results. The contract is in
// src/voxfuse/ops/finalize_slab.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(voxfuse, m) {
  m.def(
      "finalize_slab(Tensor(a!) ring, Tensor(b!) out, Tensor? total, Tensor? weight, Tensor? bias, "
      "int ring_axis, int start, int stop, int activation, bool applied, int finish, "
      "float divisor, float threshold, float fill, bool clear) -> ()");
}
