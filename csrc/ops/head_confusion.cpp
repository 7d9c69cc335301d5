// Schemas of the head confusion operator. The contract is in src/voxfuse/ops/head_confusion.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(voxfuse, m) {
  m.def(
      "head_confusion(Tensor features, Tensor weight, Tensor? bias, Tensor target, "
      "Tensor? voxel_weight, int activation, int likelihood, int overlap, int? ignore_index, "
      "float gamma, bool full, int chunk_bytes, int? focal_classes=None, int unlabelled=0, "
      "Tensor? annotated=None) -> Tensor");
  m.def(
      "head_confusion_backward(Tensor grad, Tensor features, Tensor weight, Tensor? bias, "
      "Tensor target, Tensor? voxel_weight, int activation, int likelihood, int overlap, "
      "int? ignore_index, float gamma, int chunk_bytes, bool need_features, bool need_head, "
      "int? focal_classes=None, int unlabelled=0, Tensor? annotated=None) "
      "-> (Tensor, Tensor, Tensor)");
}
