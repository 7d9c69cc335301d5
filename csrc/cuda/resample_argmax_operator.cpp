// resample_argmax on the GPU: tensors to pointers. The kernel knows nothing of PyTorch.
#include "cuda/operator.h"
#include "cuda/resample_argmax.h"
#include "ops/resample_argmax.h"

namespace voxfuse::cuda {
namespace {

void resample(const Tensor& out, const Tensor& input, const std::vector<Tensor>& index,
              const std::vector<Tensor>& weight, int64_t kept, double least,
              const std::vector<int64_t>& regions, bool round_to_half) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const ResamplingPlan plan(out, input, index, weight, kept, least, regions, round_to_half);
  if (out.numel() == 0) return;
  check_launch(resample_argmax(plan.q, current_stream(input)), "resample_argmax");
}

}  // namespace
}  // namespace voxfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CUDA, m) {
  m.impl("resample_argmax", TORCH_BOX(&voxfuse::cuda::resample));
}
