// Schema of the operator that interpolates channels and keeps what is decided from them. The
// contract is in src/voxfuse/ops/resample_argmax.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(voxfuse, m) {
  m.def(
      "resample_argmax(Tensor(a!) out, Tensor input, Tensor[] index, Tensor[] weight, "
      "int kept, float least, int[] regions, bool round_to_half) -> ()");
}
