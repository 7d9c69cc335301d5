// Schema of the hard confusion operator. The contract is in src/voxfuse/ops/hard_confusion.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(voxfuse, m) {
  m.def(
      "hard_confusion(Tensor input, Tensor target, Tensor? mask, int decision, float least, "
      "int? num_classes, int? ignore_index) -> Tensor");
}
