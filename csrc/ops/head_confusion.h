// Checks of head_confusion's arguments that keep memory safe for callers that reach the operator
// directly; the rest is the Python wrapper's.
#pragma once

#include "ops/soft_confusion.h"

namespace voxfuse {

inline void check_head_confusion(const Tensor& features, const Tensor& weight,
                                 const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(features.dim() >= 2 && features.size(1) >= 1, "features: got shape ",
                  shape_of(features), ", expected (B, K, *spatial) with K >= 1");
  check_floats(features, "features");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) == features.size(1),
                  "weight: got shape ", shape_of(weight), ", expected (C, ", features.size(1),
                  ") with C >= 1 to go with features of shape ", shape_of(features));
  const ScalarType type = features.scalar_type();
  const auto check_companion = [&](const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": got ",
                    torch::headeronly::toString(tensor.scalar_type()),
                    ", expected the features' dtype ", torch::headeronly::toString(type));
    STD_TORCH_CHECK(tensor.device() == features.device(), name,
                    ": is on another device than features");
  };
  check_companion("weight", weight);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias: got shape ",
                    shape_of(*bias), ", expected (", weight.size(0), ",)");
    check_companion("bias", *bias);
  }
}

}  // namespace voxfuse
