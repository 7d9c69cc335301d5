// The finalisation operator on the GPU: tensors to pointers. The kernel knows nothing of PyTorch.
#include "cuda/finalize_slab.h"
#include "cuda/operator.h"
#include "ops/finalize_slab.h"

namespace voxfuse::cuda {
namespace {

void finalize(const Tensor& ring, const Tensor& out, const std::optional<Tensor>& total,
              const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
              int64_t ring_axis, int64_t start, int64_t stop, int64_t activation, bool applied,
              int64_t mode, double divisor, double threshold, double fill, bool clear) {
  STD_TORCH_CHECK(out.device() == ring.device(), "out: is on another device than ring");
  for (const std::optional<Tensor>& tensor : {total, weight, bias}) {
    STD_TORCH_CHECK(!tensor || tensor->device() == ring.device(),
                    "total, weight, bias: expected on the device of ring");
  }
  const torch::stable::accelerator::DeviceGuard guard(ring.get_device_index());
  const SlabPlan plan(ring, out, total, weight, bias, ring_axis, start, stop, activation, applied,
                      mode, divisor, threshold, fill, clear);
  if (plan.q.voxels == 0) return;
  check_launch(finalize_slab(plan.q, current_stream(ring)), "finalize_slab");
}

}  // namespace
}  // namespace voxfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CUDA, m) {
  m.impl("finalize_slab", TORCH_BOX(&voxfuse::cuda::finalize));
}
