// Checks of head_confusion's arguments. They repeat the Python wrapper's, with the same words, for
// callers that reach the operator directly.
#pragma once

#include "ops/soft_confusion.h"

namespace voxfuse {

inline void check_head_confusion(const Tensor& features, const Tensor& weight,
                                 const std::optional<Tensor>& bias, const Tensor& target,
                                 const std::optional<Tensor>& voxel_weight, int64_t activation,
                                 int64_t likelihood, int64_t overlap,
                                 const std::optional<int64_t>& ignore_index, double gamma,
                                 int64_t chunk_bytes) {
  STD_TORCH_CHECK(features.dim() >= 2 && features.size(1) >= 1, "features: got shape ",
                  shape_of(features), ", expected (B, K, *spatial) with K >= 1");
  const ScalarType type = features.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16 || type == ScalarType::Double,
                  "features: got ", torch::headeronly::toString(type),
                  ", expected float32, float16, bfloat16 or float64");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) == features.size(1),
                  "weight: got shape ", shape_of(weight), ", expected (C, ", features.size(1),
                  ") with C >= 1 to go with features of shape ", shape_of(features));
  const int64_t classes = weight.size(0);
  const auto check_companion = [&](const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": got ",
                    torch::headeronly::toString(tensor.scalar_type()),
                    ", expected the features' dtype ", torch::headeronly::toString(type));
    STD_TORCH_CHECK(tensor.device() == features.device(), name,
                    ": is on another device than features");
  };
  check_companion("weight", weight);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == classes, "bias: got shape ",
                    shape_of(*bias), ", expected (", classes, ",)");
    check_companion("bias", *bias);
  }
  STD_TORCH_CHECK(chunk_bytes >= 1, "chunk_bytes: got ", chunk_bytes, ", expected at least 1");
  check_confusion_companions(features, classes, target, voxel_weight, activation, likelihood,
                             overlap, ignore_index, gamma);
}

inline void check_head_confusion_grad(const Tensor& grad, const Tensor& features,
                                      const Tensor& weight) {
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Double && grad.dim() == 3 &&
                      grad.size(0) == features.size(0) && grad.size(1) == weight.size(0) &&
                      (grad.size(2) == 4 || grad.size(2) == 8) &&
                      grad.device() == features.device(),
                  "grad: got shape ", shape_of(grad),
                  ", expected float64 (B, C, 4) or (B, C, 8) for ", weight.size(0), " classes");
}

}  // namespace voxfuse
