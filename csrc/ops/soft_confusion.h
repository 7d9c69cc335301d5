// soft_confusion from tensors to its problem, the same for every device. What is checked here keeps
// memory safe for callers that reach the operator directly; the rest is the Python wrapper's.
#pragma once

#include "contract/soft_confusion.h"
#include "ops/tensor.h"

namespace voxfuse {

// The options of the schema that forward and backward share.
struct ConfusionOptions {
  int64_t activation, likelihood, overlap;
  const std::optional<int64_t>& ignore_index;
  double gamma;
  const std::optional<int64_t>& focal_classes;
  int64_t unlabelled;
  const std::optional<Tensor>& annotated;
};

inline void check_floats(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16 || type == ScalarType::Double,
                  name, ": got ", torch::headeronly::toString(type),
                  ", expected float32, float16, bfloat16 or float64");
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

inline View view_of(const Walkable& walkable, const char* name) {
  return {walkable.tensor.const_data_ptr(), element_of(walkable.tensor, name), walkable.strides};
}

// All of a problem but its input: target, weight and options for `classes` classes and the batch
// and spatial axes of `input`.
struct ConfusionCompanions {
  Walkable target;
  std::optional<Walkable> weight;
  std::optional<Tensor> annotated;

  ConfusionCompanions(SoftConfusion& q, const Tensor& input, int64_t classes, const Tensor& target_,
                      const std::optional<Tensor>& weight_, const ConfusionOptions& options,
                      int64_t columns)
      : target(checked_target(target_, input, classes), target_.dim() == input.dim()) {
    q.batch = input.size(0);
    q.classes = classes;
    q.voxels = 1;
    for (int64_t axis = 2; axis < input.dim(); ++axis) q.voxels *= input.size(axis);
    q.target = view_of(target, "target");
    // One value a class, or the indicator of the only one.
    q.dense = classes == 1 || (target_.dim() == input.dim() && target_.size(1) == classes);
    if (weight_) {
      check_weight(*weight_, input);
      weight.emplace(*weight_, weight_->dim() == input.dim());
      q.weight = view_of(*weight, "weight");
    }
    q.activation = static_cast<Activation>(options.activation);
    q.likelihood = static_cast<Activation>(options.likelihood);
    q.overlap = static_cast<Overlap>(options.overlap);
    q.has_ignore = options.ignore_index.has_value();
    q.ignore_index = options.ignore_index.value_or(0);
    q.gamma = options.gamma;
    q.focal_classes = options.focal_classes.value_or(q.focal_classes);
    q.unlabelled = static_cast<Unlabelled>(options.unlabelled);
    if (options.annotated) {
      check_annotated(*options.annotated, input, classes);
      annotated = torch::stable::contiguous(*options.annotated);
      q.annotated = static_cast<const uint8_t*>(annotated->const_data_ptr());
    }
    q.columns = static_cast<int>(columns);
  }

  static void check_annotated(const Tensor& annotated, const Tensor& input, int64_t classes) {
    STD_TORCH_CHECK(annotated.scalar_type() == ScalarType::Bool && annotated.dim() == 2 &&
                        annotated.size(0) == input.size(0) && annotated.size(1) == classes &&
                        annotated.device() == input.device(),
                    "annotated: got ", torch::headeronly::toString(annotated.scalar_type()),
                    " of shape ", shape_of(annotated), ", expected bool (", input.size(0), ", ",
                    classes, ") on the device of input");
  }

  static const Tensor& checked_target(const Tensor& target, const Tensor& input, int64_t classes) {
    STD_TORCH_CHECK(is_companion(target, input, classes), "target: got shape ", shape_of(target),
                    ", expected (B, *spatial), (B, 1, *spatial) or (B, C, *spatial)",
                    " to go with input of shape ", shape_of(input));
    STD_TORCH_CHECK(target.device() == input.device(), "target: is on another device than input");
    return target;
  }

  static void check_weight(const Tensor& weight, const Tensor& input) {
    STD_TORCH_CHECK(is_companion(weight, input, 1), "weight: got shape ", shape_of(weight),
                    ", expected (B, *spatial) or (B, 1, *spatial) to go with input of shape ",
                    shape_of(input));
    STD_TORCH_CHECK(weight.device() == input.device(), "weight: is on another device than input");
  }
};

// A problem with the tensors that its pointers point into.
struct ConfusionArguments {
  Walkable input;
  SoftConfusion problem;
  ConfusionCompanions companions;

  ConfusionArguments(const Tensor& input_, const Tensor& target,
                     const std::optional<Tensor>& weight, const ConfusionOptions& options,
                     int64_t columns)
      : input(checked(input_), true),
        companions(problem, input_, input_.size(1), target, weight, options, columns) {
    problem.input = view_of(input, "input");
  }

  static const Tensor& checked(const Tensor& input) {
    STD_TORCH_CHECK(input.dim() >= 2 && input.size(1) >= 1, "input: got shape ", shape_of(input),
                    ", expected (B, C, *spatial) with C >= 1");
    check_floats(input, "input");
    return input;
  }
};

// The cotangents of the sums of (batch, classes): how many columns there are.
inline int64_t checked_columns(const Tensor& grad, const Tensor& input, int64_t classes) {
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Double && grad.dim() == 3 &&
                      grad.size(0) == input.size(0) && grad.size(1) == classes &&
                      (grad.size(2) == CORE || grad.size(2) == FULL) &&
                      grad.device() == input.device(),
                  "grad: got shape ", shape_of(grad), ", expected float64 (", input.size(0), ", ",
                  classes, ", ", CORE, " or ", FULL, ")");
  return grad.size(2);
}

}  // namespace voxfuse
