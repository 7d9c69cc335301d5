#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../math/ratio_loss.h"

// Checks of the ratio loss, the same for every device.
namespace voxfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_class_weights(const char* name, const std::optional<Tensor>& weights,
                                int64_t length) {
  if (!weights.has_value()) return;
  STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Double && weights->dim() == 1 &&
                      weights->size(0) == length && weights->is_contiguous(),
                  name, ": expected a contiguous float64 tensor of shape (", length, ",)");
}

inline void check_coefficients(const char* name, const std::vector<double>& coefficients,
                               int64_t sums) {
  STD_TORCH_CHECK(static_cast<int64_t>(coefficients.size()) <= sums, name, ": got ",
                  coefficients.size(), " numbers for ", sums, " sums");
}

// Check the arguments of ratio_loss and collect those that do not depend on the data.
inline RatioOptions ratio_options(const Tensor& stats, const std::vector<double>& numerator,
                                  const std::vector<double>& denominator, double smooth_nr,
                                  double smooth_dr, double min_denominator, double exponent,
                                  bool log, const std::optional<Tensor>& class_weight,
                                  int64_t first_class, bool batch, int64_t class_pooling,
                                  int64_t absent, int64_t reduction, double ratio_scale,
                                  const std::optional<Tensor>& nll_weight,
                                  const std::optional<Tensor>& off_weight, double nll_scale,
                                  double off_scale, int64_t normaliser, int64_t exponent_from) {
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Double, "stats: expected float64");
  STD_TORCH_CHECK(stats.dim() == 3 && (stats.size(2) == 4 || stats.size(2) == 8),
                  "stats: expected shape (B, C, 4) or (B, C, 8)");
  const int64_t classes = stats.size(1);
  const int64_t sums = stats.size(2);
  STD_TORCH_CHECK(first_class >= 0 && first_class <= classes, "first_class: got ", first_class,
                  " for ", classes, " classes");
  check_coefficients("numerator", numerator, sums);
  check_coefficients("denominator", denominator, sums);
  check_class_weights("class_weight", class_weight, classes - first_class);
  check_class_weights("nll_weight", nll_weight, classes);
  check_class_weights("off_weight", off_weight, classes);
  STD_TORCH_CHECK(class_pooling >= kUnpooled && class_pooling <= kSquare, "class_pooling: got ",
                  class_pooling, ", expected 0 to 3");
  STD_TORCH_CHECK(absent >= kKeepAbsent && absent <= kZeroAbsent, "absent: got ", absent,
                  ", expected 0 to 2");
  STD_TORCH_CHECK(reduction >= kNoReduction && reduction <= kSum, "reduction: got ", reduction,
                  ", expected 0 to 2");
  STD_TORCH_CHECK(normaliser >= kByOne && normaliser <= kByVolume, "normaliser: got ", normaliser,
                  ", expected 0 to 4");
  STD_TORCH_CHECK(
      sums == 8 || (off_scale == 0 && normaliser != kByVoxels && normaliser != kByElements),
      "stats: off_scale and the normalisers 'voxels' and 'elements' need all 8 sums");

  STD_TORCH_CHECK(exponent_from == 0 || (exponent_from > 0 && class_pooling == kUnpooled),
                  "exponent_from: got ", exponent_from,
                  ", expected an int >= 0, and 0 with pooled classes");

  RatioOptions options{};
  for (size_t k = 0; k < numerator.size(); ++k) options.numerator[k] = numerator[k];
  for (size_t k = 0; k < denominator.size(); ++k) options.denominator[k] = denominator[k];
  options.smooth_nr = smooth_nr;
  options.smooth_dr = smooth_dr;
  options.min_denominator = min_denominator;
  options.exponent = exponent;
  options.ratio_scale = ratio_scale;
  options.nll_scale = nll_scale;
  options.off_scale = off_scale;
  options.sums = static_cast<int>(sums);
  options.first_class = static_cast<int>(first_class);
  options.exponent_from = static_cast<int>(std::min(exponent_from, classes));
  options.class_pooling = static_cast<int>(class_pooling);
  options.absent = static_cast<int>(absent);
  options.reduction = static_cast<int>(reduction);
  options.normaliser = static_cast<int>(normaliser);
  options.log = log;
  options.batch = batch;
  return options;
}

// Shape of the loss: () unless there is no reduction.
inline std::vector<int64_t> ratio_loss_shape(const Tensor& stats, const RatioOptions& options) {
  std::vector<int64_t> shape;
  if (options.reduction != kNoReduction) return shape;
  if (!options.batch) shape.push_back(stats.size(0));
  if (options.class_pooling == kUnpooled) shape.push_back(stats.size(1) - options.first_class);
  return shape;
}

inline void check_ratio_loss_backward(const Tensor& grad_loss, const Tensor& cotangents,
                                      int64_t first_class, bool batch, int64_t class_pooling) {
  STD_TORCH_CHECK(cotangents.scalar_type() == ScalarType::Double && cotangents.dim() == 3,
                  "cotangents: expected float64 of shape (B, C, S)");
  STD_TORCH_CHECK(
      grad_loss.scalar_type() == ScalarType::Float || grad_loss.scalar_type() == ScalarType::Double,
      "grad_loss: expected float32 or float64");
  if (grad_loss.dim() == 0) return;
  const bool pooled = class_pooling != kUnpooled;
  const int64_t classes = cotangents.size(1) - first_class;
  const int64_t expected = (batch ? 1 : cotangents.size(0)) * (pooled ? 1 : classes);
  STD_TORCH_CHECK(grad_loss.numel() == expected, "grad_loss: got ", grad_loss.numel(),
                  " elements, expected ", expected);
}

}  // namespace voxfuse
