// ratio_loss on the GPU: tensors to pointers. The kernel knows nothing of PyTorch.
#include <tuple>

#include "cuda/operator.h"
#include "cuda/ratio_loss.h"
#include "ops/ratio_loss.h"

namespace voxfuse::cuda {
namespace {

const double* weights_or_null(const std::optional<Tensor>& weights, const Tensor& stats,
                              const char* name) {
  if (!weights) return nullptr;
  STD_TORCH_CHECK(weights->device() == stats.device(), name, ": is on another device than stats");
  return static_cast<const double*>(weights->const_data_ptr());
}

std::tuple<Tensor, Tensor> forward(const Tensor& stats_in, const std::vector<double>& numerator,
                                   const std::vector<double>& denominator, double smooth_nr,
                                   double smooth_dr, double min_denominator, double exponent,
                                   bool log, const std::optional<Tensor>& class_weight,
                                   int64_t first_class, bool batch, int64_t class_pooling,
                                   int64_t absent, int64_t reduction, double ratio_scale,
                                   const std::optional<Tensor>& nll_weight,
                                   const std::optional<Tensor>& off_weight, double nll_scale,
                                   double off_scale, int64_t normaliser, bool double_loss,
                                   int64_t exponent_from) {
  RatioLoss q;
  q.options = ratio_options(stats_in, numerator, denominator, smooth_nr, smooth_dr, min_denominator,
                            exponent, log, class_weight, first_class, batch, class_pooling, absent,
                            reduction, ratio_scale, nll_weight, off_weight, nll_scale, off_scale,
                            normaliser, exponent_from);
  const torch::stable::accelerator::DeviceGuard guard(stats_in.get_device_index());
  const Tensor stats = torch::stable::contiguous(stats_in);
  Tensor loss = torch::stable::new_empty(stats, ratio_loss_shape(stats, q.options),
                                         double_loss ? ScalarType::Double : ScalarType::Float);
  Tensor cotangents = torch::stable::empty_like(stats);
  q.samples = stats.size(0);
  q.classes = stats.size(1);
  q.stats = static_cast<const double*>(stats.const_data_ptr());
  q.class_weight = weights_or_null(class_weight, stats, "class_weight");
  q.nll_weight = weights_or_null(nll_weight, stats, "nll_weight");
  q.off_weight = weights_or_null(off_weight, stats, "off_weight");
  q.double_loss = double_loss;
  q.loss = loss.mutable_data_ptr();
  q.cotangents = static_cast<double*>(cotangents.mutable_data_ptr());
  check_launch(ratio_loss(q, current_stream(stats)), "ratio_loss");
  return {loss, cotangents};
}

Tensor backward(const Tensor& grad_loss_in, const Tensor& cotangents_in, int64_t first_class,
                bool batch, int64_t class_pooling) {
  check_ratio_loss_backward(grad_loss_in, cotangents_in, first_class, batch, class_pooling);
  STD_TORCH_CHECK(grad_loss_in.device() == cotangents_in.device(),
                  "grad_loss: is on another device than cotangents");
  const torch::stable::accelerator::DeviceGuard guard(cotangents_in.get_device_index());
  const Tensor grad_loss = torch::stable::contiguous(grad_loss_in);
  const Tensor cotangents = torch::stable::contiguous(cotangents_in);
  Tensor result = torch::stable::empty_like(cotangents);
  RatioLossBackward q;
  q.samples = cotangents.size(0);
  q.classes = cotangents.size(1);
  q.sums = cotangents.size(2);
  q.double_grad = grad_loss.scalar_type() == ScalarType::Double;
  q.grad_loss = grad_loss.const_data_ptr();
  if (grad_loss.dim() > 0) {
    const bool pooled = class_pooling != kUnpooled;
    q.first_class = pooled ? 0 : first_class;
    q.class_stride = pooled ? 0 : 1;
    q.sample_stride = batch ? 0 : (pooled ? 1 : q.classes - first_class);
  }
  q.cotangents = static_cast<const double*>(cotangents.const_data_ptr());
  q.result = static_cast<double*>(result.mutable_data_ptr());
  check_launch(ratio_loss_backward(q, current_stream(cotangents)), "ratio_loss_backward");
  return result;
}

}  // namespace
}  // namespace voxfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CUDA, m) {
  m.impl("ratio_loss", TORCH_BOX(&voxfuse::cuda::forward));
  m.impl("ratio_loss_backward", TORCH_BOX(&voxfuse::cuda::backward));
}
