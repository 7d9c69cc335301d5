// hard_confusion from tensors to its problem, the same for every device. What is checked here keeps
// memory safe for callers that reach the operator directly; the rest is the Python wrapper's.
#pragma once

#include <optional>

#include "contract/hard_confusion.h"
#include "ops/soft_confusion.h"

namespace voxfuse {

// A problem with the tensors that its pointers point into.
struct HardArguments {
  HardConfusion problem;
  Walkable input, target;
  std::optional<Walkable> mask;

  HardArguments(const Tensor& input_, const Tensor& target_, const std::optional<Tensor>& mask_,
                int64_t decision, double least, const std::optional<int64_t>& num_classes,
                const std::optional<int64_t>& ignore_index)
      : problem(checked(input_, target_, decision, num_classes)),
        input(input_, problem.decision != Decision::labels),
        target(target_, problem.dense && target_.dim() == input_.dim()) {
    HardConfusion& q = problem;
    q.least = static_cast<float>(least);
    q.has_ignore = ignore_index.has_value();
    q.ignore_index = ignore_index.value_or(0);
    q.input = view(input, "input");
    q.target = view(target, "target");
    if (mask_) {
      check_voxels(*mask_, input_, q.batch * q.voxels, "mask");
      mask.emplace(*mask_, false);
      q.mask = view(*mask, "mask");
    }
  }

 private:
  static HardConfusion checked(const Tensor& input, const Tensor& target, int64_t decision,
                               const std::optional<int64_t>& num_classes) {
    HardConfusion q;
    STD_TORCH_CHECK(decision >= 0 && decision <= static_cast<int64_t>(Decision::labels),
                    "decision: got ", decision, ", expected 0, 1 or 2");
    q.decision = static_cast<Decision>(decision);
    const bool labels = q.decision == Decision::labels;
    STD_TORCH_CHECK(input.dim() >= (labels ? 1 : 2), "input: got shape ", shape_of(input),
                    ", expected (B, C, *spatial), or (B, *spatial) of labels");
    q.batch = input.size(0);
    q.voxels = 1;
    for (int64_t axis = labels ? 1 : 2; axis < input.dim(); ++axis) q.voxels *= input.size(axis);
    if (labels) {
      STD_TORCH_CHECK(num_classes.has_value() && *num_classes >= 1,
                      "num_classes: expected a number of classes with predicted labels");
      q.classes = *num_classes;
    } else {
      check_floats(input, "input");
      q.classes = input.size(1);
      STD_TORCH_CHECK(q.classes >= 1 && (!num_classes || *num_classes == q.classes),
                      "num_classes: expected that of input, ", q.classes, " and at least 1");
      q.dense = q.classes == 1 || (target.dim() == input.dim() && target.size(1) == q.classes);
    }
    // Labels are counted in 32 bits.
    STD_TORCH_CHECK(q.classes < (int64_t{1} << 30), "num_classes: got ", q.classes,
                    ", expected less than 2^30");
    check_voxels(target, input, q.batch * q.voxels * (q.dense ? q.classes : 1), "target");
    return q;
  }

  // (B, *spatial) or (B, 1, *spatial), of as many elements as there are; dense, (B, C, *spatial).
  static void check_voxels(const Tensor& tensor, const Tensor& input, int64_t elements,
                           const char* name) {
    STD_TORCH_CHECK(
        tensor.dim() >= 1 && tensor.size(0) == input.size(0) && tensor.numel() == elements, name,
        ": got shape ", shape_of(tensor), ", expected (B, *spatial), ",
        "(B, 1, *spatial) or a target (B, C, *spatial) to go with input of shape ",
        shape_of(input));
    STD_TORCH_CHECK(tensor.device() == input.device(), name, ": is on another device than input");
  }

  static View view(const Walkable& walkable, const char* name) {
    return {walkable.tensor.const_data_ptr(), element_of(walkable.tensor, name), walkable.strides};
  }
};

}  // namespace voxfuse
