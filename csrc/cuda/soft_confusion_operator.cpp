// soft_confusion on the GPU: tensors to pointers. The kernels know nothing of PyTorch.
#include <optional>

#include "cuda/operator.h"
#include "cuda/soft_confusion.h"
#include "ops/soft_confusion.h"

namespace voxfuse::cuda {
namespace {

Tensor forward(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
               int64_t activation, int64_t likelihood, int64_t overlap,
               const std::optional<int64_t>& ignore_index, double gamma, bool full,
               const std::optional<int64_t>& focal_classes, int64_t unlabelled,
               const std::optional<Tensor>& annotated, bool /*any_target*/) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const ConfusionArguments a(
      input, target, weight,
      {activation, likelihood, overlap, ignore_index, gamma, focal_classes, unlabelled, annotated},
      full ? FULL : CORE);
  const SoftConfusion& q = a.problem;
  Tensor sums =
      torch::stable::new_empty(input, {q.batch, q.classes, q.columns}, ScalarType::Double);
  if (input.numel() == 0) return torch::stable::zero_(sums);
  Tensor workspace = torch::stable::new_empty(input, {workspace_doubles(q)}, ScalarType::Double);
  check_launch(soft_confusion_forward(q, static_cast<double*>(sums.mutable_data_ptr()),
                                      static_cast<double*>(workspace.mutable_data_ptr()),
                                      current_stream(input)),
               "soft_confusion");
  return sums;
}

Tensor backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                const std::optional<Tensor>& weight, int64_t activation, int64_t likelihood,
                int64_t overlap, const std::optional<int64_t>& ignore_index, double gamma,
                const std::optional<int64_t>& focal_classes, int64_t unlabelled,
                const std::optional<Tensor>& annotated) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  ConfusionArguments a(
      input, target, weight,
      {activation, likelihood, overlap, ignore_index, gamma, focal_classes, unlabelled, annotated},
      checked_columns(grad, input, input.size(1)));
  Gradient gradient(input, a.input);
  if (input.numel() == 0) return gradient.result;
  const Tensor cotangents = torch::stable::contiguous(grad);
  a.problem.cotangents = static_cast<const double*>(cotangents.const_data_ptr());
  a.problem.gradient = gradient.written.mutable_data_ptr();
  a.problem.gradient_stride = gradient.strides;
  check_launch(soft_confusion_backward(a.problem, current_stream(input)),
               "soft_confusion_backward");
  return gradient.finished();
}

}  // namespace
}  // namespace voxfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CUDA, m) {
  m.impl("soft_confusion", TORCH_BOX(&voxfuse::cuda::forward));
  m.impl("soft_confusion_backward", TORCH_BOX(&voxfuse::cuda::backward));
}
