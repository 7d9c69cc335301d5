// Schemas of the patch fusion operators. The contract is in src/voxfuse/ops/overlap_add.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(voxfuse, m) {
  m.def(
      "overlap_add(Tensor patches, Tensor origins, Tensor rows, Tensor[] weights, Tensor? total, "
      "int[] volume_shape, int activation=0) -> Tensor");
  m.def(
      "overlap_add_backward(Tensor grad, Tensor origins, Tensor rows, Tensor[] weights, "
      "Tensor? total, Tensor? patches=None, int activation=0) -> Tensor");
  m.def(
      "overlap_add_(Tensor(a!) ring, Tensor patches, Tensor origins, Tensor rows, "
      "Tensor[] weights, Tensor? total, int ring_axis, int start, int stop, int flip=0, "
      "float floor=0.0, int activation=0, Tensor[]? cover=None) -> ()");
  m.def(
      "overlap_weights_(Tensor(a!) total, Tensor origins, Tensor rows, Tensor[] weights, "
      "int ring_axis, int start, int stop) -> ()");
}
