// hard_confusion on the GPU: tensors to pointers. The kernel knows nothing of PyTorch.
#include "cuda/hard_confusion.h"
#include "cuda/operator.h"
#include "ops/hard_confusion.h"

namespace voxfuse::cuda {
namespace {

Tensor count(const Tensor& input, const Tensor& target, const std::optional<Tensor>& mask,
             int64_t decision, double least, const std::optional<int64_t>& num_classes,
             const std::optional<int64_t>& ignore_index) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const HardArguments a(input, target, mask, decision, least, num_classes, ignore_index);
  const HardConfusion& q = a.problem;
  Tensor counts = torch::stable::new_empty(input, {q.batch, q.classes, 4}, ScalarType::Long);
  torch::stable::zero_(counts);
  check_launch(
      hard_confusion(q, static_cast<int64_t*>(counts.mutable_data_ptr()), current_stream(input)),
      "hard_confusion");
  return counts;
}

}  // namespace
}  // namespace voxfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CUDA, m) {
  m.impl("hard_confusion", TORCH_BOX(&voxfuse::cuda::count));
}
