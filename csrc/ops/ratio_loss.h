// The ratio loss from tensors to a problem, the same for every device. What is checked here keeps
// memory safe for callers that reach the operator directly; the rest is the Python wrapper's.
#pragma once

#include <algorithm>
#include <tuple>

#include "contract/ratio_loss.h"
#include "ops/tensor.h"

namespace voxfuse {

inline const double* class_weights(const char* name, const std::optional<Tensor>& weights,
                                   int64_t length, const Tensor& stats, int64_t samples = 0) {
  if (!weights) return nullptr;
  const int64_t axes = weights->dim();
  const bool by_sample = samples > 0 && axes == 2 && weights->size(0) == samples;
  STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Double && (axes == 1 || by_sample) &&
                      weights->size(axes - 1) == length && weights->is_contiguous(),
                  name, ": expected a contiguous float64 tensor of shape (", length, ",)",
                  samples > 0 ? " or with the samples before" : "");
  STD_TORCH_CHECK(weights->device() == stats.device(), name, ": is on another device than stats");
  return static_cast<const double*>(weights->const_data_ptr());
}

inline void take_coefficients(const char* name, const std::vector<double>& given,
                              double (&coefficients)[FULL]) {
  STD_TORCH_CHECK(given.size() <= FULL, name, ": got ", given.size(), " numbers for ", FULL,
                  " sums");
  std::copy(given.begin(), given.end(), coefficients);
}

// Shape of the loss: () unless there is no reduction.
inline std::vector<int64_t> ratio_loss_shape(const RatioLoss& q) {
  std::vector<int64_t> shape;
  if (q.options.reduction != Reduction::none) return shape;
  if (!q.options.batch) shape.push_back(q.samples);
  if (q.options.class_pooling == ClassPooling::none) {
    shape.push_back(q.classes - q.options.first_class);
  }
  return shape;
}

// The operator, of which the device's part is `run(problem, stats)`.
template <auto run>
std::tuple<Tensor, Tensor> ratio_loss_on(const Tensor& stats_in, std::vector<double> numerator,
                                         std::vector<double> denominator, double smooth_nr,
                                         double smooth_dr, double min_denominator, double exponent,
                                         bool log, const std::optional<Tensor>& class_weight,
                                         int64_t first_class, bool batch, int64_t class_pooling,
                                         int64_t absent, int64_t reduction, double ratio_scale,
                                         const std::optional<Tensor>& nll_weight,
                                         const std::optional<Tensor>& off_weight, double nll_scale,
                                         double off_scale, int64_t normaliser, bool double_loss,
                                         int64_t exponent_from) {
  STD_TORCH_CHECK(stats_in.scalar_type() == ScalarType::Double, "stats: expected float64");
  STD_TORCH_CHECK(stats_in.dim() == 3 && (stats_in.size(2) == CORE || stats_in.size(2) == FULL),
                  "stats: expected shape (B, C, 4) or (B, C, 8)");
  const Tensor stats = torch::stable::contiguous(stats_in);
  RatioLoss q;
  q.samples = stats.size(0);
  q.classes = stats.size(1);
  STD_TORCH_CHECK(first_class >= 0 && first_class <= q.classes, "first_class: got ", first_class,
                  " for ", q.classes, " classes");
  RatioOptions& o = q.options;
  take_coefficients("numerator", numerator, o.numerator);
  take_coefficients("denominator", denominator, o.denominator);
  o.smooth_nr = smooth_nr;
  o.smooth_dr = smooth_dr;
  o.min_denominator = min_denominator;
  o.exponent = exponent;
  o.ratio_scale = ratio_scale;
  o.nll_scale = nll_scale;
  o.off_scale = off_scale;
  o.width = static_cast<int>(stats.size(2));
  o.first_class = static_cast<int>(first_class);
  o.exponent_from = static_cast<int>(std::min(exponent_from, q.classes));
  o.class_pooling = static_cast<ClassPooling>(class_pooling);
  o.absent = static_cast<Absent>(absent);
  o.reduction = static_cast<Reduction>(reduction);
  o.normaliser = static_cast<Normaliser>(normaliser);
  o.log = log;
  o.batch = batch;
  STD_TORCH_CHECK(
      o.width == FULL || (off_scale == 0 && o.normaliser != Normaliser::voxels &&
                          o.normaliser != Normaliser::elements &&
                          std::max(numerator.size(), denominator.size()) <= CORE),
      "stats: off_scale, the normalisers 'voxels' and 'elements' and further coefficients need all "
      "8 sums");
  const int64_t counted = q.classes - first_class;
  q.class_weight = class_weights("class_weight", class_weight, counted, stats, q.samples);
  q.class_weight_stride = class_weight && class_weight->dim() == 2 ? counted : 0;
  q.nll_weight = class_weights("nll_weight", nll_weight, q.classes, stats);
  q.off_weight = class_weights("off_weight", off_weight, q.classes, stats);

  Tensor loss = torch::stable::new_empty(stats, ratio_loss_shape(q),
                                         double_loss ? ScalarType::Double : ScalarType::Float);
  Tensor cotangents = torch::stable::empty_like(stats);
  q.stats = static_cast<const double*>(stats.const_data_ptr());
  q.double_loss = double_loss;
  q.loss = loss.mutable_data_ptr();
  q.cotangents = static_cast<double*>(cotangents.mutable_data_ptr());
  run(q, stats);
  return {loss, cotangents};
}

template <auto run>
Tensor ratio_loss_backward_on(const Tensor& grad_loss_in, const Tensor& cotangents_in,
                              int64_t first_class, bool batch, int64_t class_pooling) {
  STD_TORCH_CHECK(cotangents_in.scalar_type() == ScalarType::Double && cotangents_in.dim() == 3,
                  "cotangents: expected float64 of shape (B, C, S)");
  STD_TORCH_CHECK(grad_loss_in.scalar_type() == ScalarType::Float ||
                      grad_loss_in.scalar_type() == ScalarType::Double,
                  "grad_loss: expected float32 or float64");
  STD_TORCH_CHECK(grad_loss_in.device() == cotangents_in.device(),
                  "grad_loss: is on another device than cotangents");
  const Tensor grad_loss = torch::stable::contiguous(grad_loss_in);
  const Tensor cotangents = torch::stable::contiguous(cotangents_in);
  Tensor result = torch::stable::empty_like(cotangents);
  RatioLossBackward q;
  q.samples = cotangents.size(0);
  q.classes = cotangents.size(1);
  q.width = cotangents.size(2);
  q.double_grad = grad_loss.scalar_type() == ScalarType::Double;
  q.grad_loss = grad_loss.const_data_ptr();
  if (grad_loss.dim() > 0) {
    const bool pooled = static_cast<ClassPooling>(class_pooling) != ClassPooling::none;
    const int64_t losses = pooled ? 1 : q.classes - first_class;
    STD_TORCH_CHECK(grad_loss.numel() == (batch ? 1 : q.samples) * losses, "grad_loss: got ",
                    grad_loss.numel(), " elements, expected ", (batch ? 1 : q.samples) * losses);
    q.first_class = pooled ? 0 : first_class;
    q.class_stride = pooled ? 0 : 1;
    q.sample_stride = batch ? 0 : losses;
  }
  q.cotangents = static_cast<const double*>(cotangents.const_data_ptr());
  q.result = static_cast<double*>(result.mutable_data_ptr());
  run(q, cotangents);
  return result;
}

}  // namespace voxfuse
