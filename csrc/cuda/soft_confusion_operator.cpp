// soft_confusion on the GPU: tensors to pointers. The kernels know nothing of PyTorch.
#include <optional>

#include "cuda/operator.h"
#include "cuda/soft_confusion.h"
#include "ops/soft_confusion.h"

namespace voxfuse::cuda {
namespace {

/// The operator's arguments, with the tensors that the pointers in `problem` point into.
struct Arguments {
  Walkable input, target;
  std::optional<Walkable> weight;
  SoftConfusion problem;

  Arguments(const Tensor& input_, const Tensor& target_, const std::optional<Tensor>& weight_,
            int64_t activation, int64_t likelihood, int64_t overlap,
            const std::optional<int64_t>& ignore_index, double gamma, int statistics,
            const std::optional<int64_t>& focal_classes)
      : input(
            checked(input_, target_, weight_, activation, likelihood, overlap, ignore_index, gamma),
            true),
        target(target_, target_.dim() == input_.dim()) {
    SoftConfusion& q = problem;
    q.batch = input_.size(0);
    q.classes = input_.size(1);
    q.voxels = 1;
    for (int64_t axis = 2; axis < input_.dim(); ++axis) q.voxels *= input_.size(axis);
    q.input = view(input, "input");
    q.target = view(target, "target");
    if (weight_) {
      weight.emplace(*weight_, weight_->dim() == input_.dim());
      q.weight = view(*weight, "weight");
    }
    q.dense = target_is_dense(input_, target_);
    q.activation = static_cast<int>(activation);
    q.likelihood = static_cast<int>(likelihood);
    q.use_min = overlap == 1;
    q.has_ignore = ignore_index.has_value();
    q.ignore_index = ignore_index.value_or(0);
    q.gamma = gamma;
    q.focal_classes = focal_classes_of(focal_classes);
    q.statistics = statistics;
  }

  static View view(const Walkable& walkable, const char* name) {
    View result;
    result.data = walkable.tensor.const_data_ptr();
    result.type = element_of(walkable.tensor, name);
    result.stride = walkable.strides;
    return result;
  }

  static const Tensor& checked(const Tensor& input, const Tensor& target,
                               const std::optional<Tensor>& weight, int64_t activation,
                               int64_t likelihood, int64_t overlap,
                               const std::optional<int64_t>& ignore_index, double gamma) {
    check_soft_confusion(input, target, weight, activation, likelihood, overlap, ignore_index,
                         gamma);
    return input;
  }
};

Tensor forward(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
               int64_t activation, int64_t likelihood, int64_t overlap,
               const std::optional<int64_t>& ignore_index, double gamma, bool full,
               const std::optional<int64_t>& focal_classes) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const int statistics = full ? 8 : 4;
  Arguments a(input, target, weight, activation, likelihood, overlap, ignore_index, gamma,
              statistics, focal_classes);
  Tensor sums = torch::stable::new_empty(input, {input.size(0), input.size(1), statistics},
                                         ScalarType::Double);
  if (input.numel() == 0) return torch::stable::zero_(sums);
  Tensor workspace =
      torch::stable::new_empty(input, {workspace_doubles(a.problem)}, ScalarType::Double);
  a.problem.sums = static_cast<double*>(sums.mutable_data_ptr());
  a.problem.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  check_launch(soft_confusion_forward(a.problem, current_stream(input)), "soft_confusion");
  return sums;
}

Tensor backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                const std::optional<Tensor>& weight, int64_t activation, int64_t likelihood,
                int64_t overlap, const std::optional<int64_t>& ignore_index, double gamma,
                const std::optional<int64_t>& focal_classes) {
  check_soft_confusion_grad(grad, input);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Arguments a(input, target, weight, activation, likelihood, overlap, ignore_index, gamma,
              static_cast<int>(grad.size(2)), focal_classes);
  Tensor result = torch::stable::empty_like(input);
  if (input.numel() == 0) return result;
  const Tensor cotangents = torch::stable::contiguous(grad);
  const std::optional<Strides> own = strides_of(result, true);
  // Where the input's axes do not collapse, the gradient is written contiguously and copied.
  const Tensor written = own ? result : torch::stable::empty_like(a.input.tensor);
  a.problem.gradient.data = written.mutable_data_ptr();
  a.problem.gradient.type = a.problem.input.type;
  a.problem.gradient.stride = own ? *own : *strides_of(written, true);
  a.problem.cotangents = static_cast<const double*>(cotangents.const_data_ptr());
  check_launch(soft_confusion_backward(a.problem, current_stream(input)),
               "soft_confusion_backward");
  if (!own) torch::stable::copy_(result, written);
  return result;
}

}  // namespace
}  // namespace voxfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CUDA, m) {
  m.impl("soft_confusion", TORCH_BOX(&voxfuse::cuda::forward));
  m.impl("soft_confusion_backward", TORCH_BOX(&voxfuse::cuda::backward));
}
