// Checks of soft_confusion's arguments, shared by the CPU and the CUDA operator. They repeat the
// Python wrapper's, with the same words, for callers that reach the operator directly.
#pragma once

#include <limits>

#include "ops/tensor.h"

namespace voxfuse {

// Whether the target holds one value a class (or the foreground indicator of one class).
inline bool target_is_dense(const Tensor& input, int64_t classes, const Tensor& target) {
  return classes == 1 || (target.dim() == input.dim() && target.size(1) == classes);
}
inline bool target_is_dense(const Tensor& input, const Tensor& target) {
  return target_is_dense(input, input.size(1), target);
}

inline bool is_companion(const Tensor& tensor, const Tensor& input, int64_t channels) {
  const int64_t n = input.dim();
  const bool channel_axis = tensor.dim() == n;
  if (!channel_axis && tensor.dim() != n - 1) return false;
  if (channel_axis && tensor.size(1) != 1 && tensor.size(1) != channels) return false;
  if (tensor.size(0) != input.size(0)) return false;
  for (int64_t axis = 2; axis < n; ++axis) {
    if (tensor.size(channel_axis ? axis : axis - 1) != input.size(axis)) return false;
  }
  return true;
}

// Target, weight and options for an input with the batch and spatial axes of `input` and `classes`
// channels.
inline void check_confusion_companions(const Tensor& input, int64_t classes, const Tensor& target,
                                       const std::optional<Tensor>& weight, int64_t activation,
                                       int64_t likelihood, int64_t overlap,
                                       const std::optional<int64_t>& ignore_index, double gamma) {
  STD_TORCH_CHECK(has_element(target.scalar_type()), "target: got ",
                  torch::headeronly::toString(target.scalar_type()),
                  ", expected bool, uint8, int16, int32, int64 or a float");
  STD_TORCH_CHECK(is_companion(target, input, classes), "target: got shape ", shape_of(target),
                  ", expected (B, *spatial), (B, 1, *spatial) or (B, C, *spatial)",
                  " to go with input of shape ", shape_of(input));
  STD_TORCH_CHECK(target.device() == input.device(), "target: is on another device than input");
  if (weight) {
    STD_TORCH_CHECK(is_companion(*weight, input, 1), "weight: got shape ", shape_of(*weight),
                    ", expected (B, *spatial) or (B, 1, *spatial) to go with input of shape ",
                    shape_of(input));
    const ScalarType w = weight->scalar_type();
    STD_TORCH_CHECK(w == ScalarType::Bool || w == ScalarType::Float || w == ScalarType::Half ||
                        w == ScalarType::BFloat16 || w == ScalarType::Double,
                    "weight: got ", torch::headeronly::toString(w), ", expected bool or float");
    STD_TORCH_CHECK(weight->device() == input.device(), "weight: is on another device than input");
  }
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation: got ", activation,
                  ", expected 0 (none), 1 (sigmoid) or 2 (softmax)");
  STD_TORCH_CHECK(likelihood >= 0 && likelihood <= 2, "likelihood: got ", likelihood,
                  ", expected 0 (none), 1 (sigmoid) or 2 (softmax)");
  STD_TORCH_CHECK(overlap == 0 || overlap == 1, "overlap: got ", overlap,
                  ", expected 0 (product) or 1 (min)");
  STD_TORCH_CHECK(gamma >= 0 && gamma <= 1.7976931348623157e308, "gamma: got ", gamma,
                  ", expected a finite number >= 0");
  STD_TORCH_CHECK(!ignore_index || classes == 1 || !target_is_dense(input, classes, target),
                  "ignore_index: needs labels, but the target is dense");
}

inline void check_soft_confusion(const Tensor& input, const Tensor& target,
                                 const std::optional<Tensor>& weight, int64_t activation,
                                 int64_t likelihood, int64_t overlap,
                                 const std::optional<int64_t>& ignore_index, double gamma) {
  STD_TORCH_CHECK(input.dim() >= 2 && input.size(1) >= 1, "input: got shape ", shape_of(input),
                  ", expected (B, C, *spatial) with C >= 1");
  const ScalarType type = input.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16 || type == ScalarType::Double,
                  "input: got ", torch::headeronly::toString(type),
                  ", expected float32, float16, bfloat16 or float64");
  check_confusion_companions(input, input.size(1), target, weight, activation, likelihood, overlap,
                             ignore_index, gamma);
}

// How many classes, from the first on, have the likelihood's exponent gamma.
inline int64_t focal_classes_of(const std::optional<int64_t>& focal_classes) {
  STD_TORCH_CHECK(!focal_classes || *focal_classes >= 0, "focal_classes: got ", *focal_classes,
                  ", expected an int >= 0 or None");
  return focal_classes.value_or(std::numeric_limits<int64_t>::max());
}

inline void check_soft_confusion_grad(const Tensor& grad, const Tensor& input) {
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Double && grad.dim() == 3 &&
                      grad.size(0) == input.size(0) && grad.size(1) == input.size(1) &&
                      (grad.size(2) == 4 || grad.size(2) == 8) && grad.device() == input.device(),
                  "grad: got shape ", shape_of(grad),
                  ", expected float64 (B, C, 4) or (B, C, 8) for input of shape ", shape_of(input));
}

}  // namespace voxfuse
