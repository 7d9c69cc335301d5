// Schemas of the soft confusion operator. The contract is in src/voxfuse/ops/soft_confusion.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(voxfuse, m) {
  m.def(
      "soft_confusion(Tensor input, Tensor target, Tensor? weight, int activation, "
      "int likelihood, int overlap, int? ignore_index, float gamma, bool full, "
      "int? focal_classes=None, int unlabelled=0, Tensor? annotated=None, "
      "bool any_target=False) -> Tensor");
  m.def(
      "soft_confusion_backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, "
      "int activation, int likelihood, int overlap, int? ignore_index, float gamma, "
      "int? focal_classes=None, int unlabelled=0, Tensor? annotated=None) -> Tensor");
}
