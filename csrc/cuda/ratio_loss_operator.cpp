// ratio_loss on the GPU. The kernel knows nothing of PyTorch.
#include "cuda/operator.h"
#include "cuda/ratio_loss.h"
#include "ops/ratio_loss.h"

namespace voxfuse::cuda {
namespace {

void forward(const RatioLoss& q, const Tensor& stats) {
  const torch::stable::accelerator::DeviceGuard guard(stats.get_device_index());
  check_launch(ratio_loss(q, current_stream(stats)), "ratio_loss");
}

void backward(const RatioLossBackward& q, const Tensor& cotangents) {
  const torch::stable::accelerator::DeviceGuard guard(cotangents.get_device_index());
  check_launch(ratio_loss_backward(q, current_stream(cotangents)), "ratio_loss_backward");
}

}  // namespace
}  // namespace voxfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CUDA, m) {
  m.impl("ratio_loss", TORCH_BOX(&voxfuse::ratio_loss_on<voxfuse::cuda::forward>));
  m.impl("ratio_loss_backward",
         TORCH_BOX(&voxfuse::ratio_loss_backward_on<voxfuse::cuda::backward>));
}
