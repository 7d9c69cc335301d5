// Schemas of the ratio loss operator. The contract is in src/voxfuse/ops/ratio_loss.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(voxfuse, m) {
  m.def(
      "ratio_loss(Tensor stats, float[] numerator, float[] denominator, float smooth_nr, "
      "float smooth_dr, float min_denominator, float exponent, bool log, Tensor? class_weight, "
      "int first_class, bool batch, int class_pooling, int absent, int reduction, "
      "float ratio_scale, Tensor? nll_weight, Tensor? off_weight, float nll_scale, "
      "float off_scale, int normaliser, bool double_loss, int exponent_from=0) "
      "-> (Tensor loss, Tensor cotangents)");
  m.def(
      "ratio_loss_backward(Tensor grad_loss, Tensor cotangents, int first_class, bool batch, "
      "int class_pooling) -> Tensor");
}
