#include "../ops/ratio_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

// The statistics are tiny (samples x classes x 8), so everything here is one thread's work.
namespace voxfuse {
namespace {

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

const double* weights_or_null(const std::optional<Tensor>& weights) {
  return weights.has_value() ? weights->const_data_ptr<double>() : nullptr;
}

// One row of the statistics, a sample or the pooled batch: its terms, one a class or one pooled.
class Row {
 public:
  Row(const double* sums, int64_t classes, const double* class_weight, const RatioOptions& options)
      : options_(options), pooled_(options.class_pooling != kUnpooled) {
    const double* first = sums + options.first_class * options.sums;
    const int64_t count = classes - options.first_class;
    std::vector<RatioSums> ratios(count);
    std::vector<bool> present(count);
    for (int64_t c = 0; c < count; ++c) {
      const double* s = first + c * options.sums;
      ratios[c] = ratio_sums(s, options);
      volumes_.push_back(s[kTp] + s[kFn]);
      present[c] = volumes_[c] != 0;
    }
    if (pooled_) {
      find_weights(present, class_weight);
      RatioSums total{0, 0, 0};
      bool any = false;
      for (int64_t c = 0; c < count; ++c) {
        total.misses += weights_[c] * ratios[c].misses;
        total.hits += weights_[c] * ratios[c].hits;
        total.size += weights_[c] * ratios[c].size;
        any = any || present[c];
      }
      add_term(total, any, options_.exponent);
      return;
    }
    weights_.assign(count, 1);
    for (int64_t c = 0; c < count; ++c) {
      if (class_weight != nullptr) weights_[c] = class_weight[c];
      add_term(ratios[c], present[c], exponent_of(options_.first_class + c, options_));
      terms_.back().value *= weights_[c];
    }
  }

  const std::vector<RatioTerm>& terms() const { return terms_; }
  int64_t counted() const { return counted_; }

  // Write scale times the slopes of every class at or above the first.
  void write_slopes(double scale, double* cotangents) const {
    double* out = cotangents + options_.first_class * options_.sums;
    for (size_t c = 0; c < weights_.size(); ++c) {
      const RatioTerm& term = terms_[pooled_ ? 0 : c];
      for (int k = 0; k < options_.sums; ++k) {
        *out++ = scale * (weights_[c] * ratio_slope(term, k, options_));
      }
    }
  }

 private:
  void add_term(const RatioSums& sums, bool present, double exponent) {
    const bool keep = present || options_.absent == kKeepAbsent;
    terms_.push_back(keep ? ratio_term(sums, exponent, options_) : RatioTerm{0, 0, 0});
    if (present || options_.absent != kIgnoreAbsent) ++counted_;
  }

  // Infinite weights borrow the largest finite one, or are 1 in a row that has none.
  void find_weights(const std::vector<bool>& present, const double* class_weight) {
    double largest = 0;
    for (const double volume : volumes_) {
      weights_.push_back(pooling_weight(volume, options_.class_pooling));
      if (!std::isinf(weights_.back())) largest = std::max(largest, weights_.back());
    }
    for (size_t c = 0; c < weights_.size(); ++c) {
      if (std::isinf(weights_[c])) weights_[c] = largest == 0 ? 1 : largest;
      if (options_.absent == kIgnoreAbsent && !present[c]) weights_[c] = 0;
      if (class_weight != nullptr) weights_[c] *= class_weight[c];
    }
  }

  const RatioOptions& options_;
  const bool pooled_;
  std::vector<double> volumes_;
  std::vector<double> weights_;
  std::vector<RatioTerm> terms_;
  int64_t counted_ = 0;
};

// Add the weighted log-likelihood's slopes to the cotangents and return its value.
double likelihood(const double* stats, int64_t samples, int64_t classes, const double* nll_weight,
                  const double* off_weight, const RatioOptions& options, double* cotangents) {
  const auto weight = [](const double* weights, int64_t c) {
    return weights == nullptr ? 1.0 : weights[c];
  };
  double total = 0;
  double divisor = options.normaliser == kByOne ? 1 : 0;
  for (int64_t b = 0; b < samples; ++b) {
    for (int64_t c = 0; c < classes; ++c) {
      const double* s = stats + (b * classes + c) * options.sums;
      const double w = weight(nll_weight, c);
      divisor += normaliser_part(s, static_cast<int>(c), w, options.normaliser);
      total += likelihood_part(s[kNll], w, options.nll_scale);
      if (options.off_scale != 0) {
        total += likelihood_part(s[kOff], weight(off_weight, c), options.off_scale);
      }
    }
  }
  if (divisor == 0) return 0;
  for (int64_t b = 0; b < samples; ++b) {
    for (int64_t c = 0; c < classes; ++c) {
      double* out = cotangents + (b * classes + c) * options.sums;
      if (options.nll_scale != 0) out[kNll] += options.nll_scale * weight(nll_weight, c) / divisor;
      if (options.off_scale != 0) out[kOff] += options.off_scale * weight(off_weight, c) / divisor;
    }
  }
  return total / divisor;
}

void store(const Tensor& loss, int64_t index, double value) {
  if (loss.scalar_type() == ScalarType::Double) {
    loss.mutable_data_ptr<double>()[index] = value;
  } else {
    loss.mutable_data_ptr<float>()[index] = static_cast<float>(value);
  }
}

std::tuple<Tensor, Tensor> ratio_loss(const Tensor& stats_in, const std::vector<double>& numerator,
                                      const std::vector<double>& denominator, double smooth_nr,
                                      double smooth_dr, double min_denominator, double exponent,
                                      bool log, const std::optional<Tensor>& class_weight,
                                      int64_t first_class, bool batch, int64_t class_pooling,
                                      int64_t absent, int64_t reduction, double ratio_scale,
                                      const std::optional<Tensor>& nll_weight,
                                      const std::optional<Tensor>& off_weight, double nll_scale,
                                      double off_scale, int64_t normaliser, bool double_loss,
                                      int64_t exponent_from) {
  const RatioOptions options = ratio_options(
      stats_in, numerator, denominator, smooth_nr, smooth_dr, min_denominator, exponent, log,
      class_weight, first_class, batch, class_pooling, absent, reduction, ratio_scale, nll_weight,
      off_weight, nll_scale, off_scale, normaliser, exponent_from);
  const Tensor stats = stats_in.is_contiguous() ? stats_in : torch::stable::contiguous(stats_in);
  const int64_t samples = stats.size(0);
  const int64_t classes = stats.size(1);
  const int64_t row_length = classes * options.sums;
  const double* const data = stats.const_data_ptr<double>();

  Tensor loss = new_tensor(stats, ratio_loss_shape(stats, options),
                           double_loss ? ScalarType::Double : ScalarType::Float);
  Tensor cotangents_tensor =
      new_tensor(stats, {samples, classes, stats.size(2)}, ScalarType::Double);
  double* const cotangents = cotangents_tensor.mutable_data_ptr<double>();
  std::fill(cotangents, cotangents + samples * row_length, 0.0);

  double value = 0;
  if (options.ratio_scale != 0) {
    std::vector<double> pooled(batch ? row_length : 0, 0.0);
    if (batch) {
      for (int64_t i = 0; i < samples * row_length; ++i) pooled[i % row_length] += data[i];
    }
    const int64_t rows = batch ? 1 : samples;
    std::vector<Row> terms;
    terms.reserve(rows);
    int64_t counted = 0;
    for (int64_t r = 0; r < rows; ++r) {
      terms.emplace_back(batch ? pooled.data() : data + r * row_length, classes,
                         weights_or_null(class_weight), options);
      counted += terms.back().counted();
    }
    double scale = ratio_scale;
    if (options.reduction == kMean) scale /= static_cast<double>(std::max<int64_t>(counted, 1));
    int64_t index = 0;
    for (const Row& row : terms) {
      for (const RatioTerm& term : row.terms()) {
        if (options.reduction == kNoReduction) {
          store(loss, index++, scale * term.value);
        } else {
          value += scale * term.value;
        }
      }
    }
    for (int64_t b = 0; b < samples; ++b) {
      terms[batch ? 0 : b].write_slopes(scale, cotangents + b * row_length);
    }
  } else if (options.reduction == kNoReduction) {
    for (int64_t i = 0; i < loss.numel(); ++i) store(loss, i, 0);
  }
  if (options.reduction != kNoReduction) {
    if (nll_scale != 0 || off_scale != 0) {
      value += likelihood(data, samples, classes, weights_or_null(nll_weight),
                          weights_or_null(off_weight), options, cotangents);
    }
    store(loss, 0, value);
  }
  return {loss, cotangents_tensor};
}

Tensor ratio_loss_backward(const Tensor& grad_loss_in, const Tensor& cotangents_in,
                           int64_t first_class, bool batch, int64_t class_pooling) {
  check_ratio_loss_backward(grad_loss_in, cotangents_in, first_class, batch, class_pooling);
  const auto contiguous = [](const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  };
  const Tensor grad_loss = contiguous(grad_loss_in);
  const Tensor cotangents = contiguous(cotangents_in);
  const int64_t samples = cotangents.size(0);
  const int64_t classes = cotangents.size(1);
  const int64_t sums = cotangents.size(2);
  Tensor result = new_tensor(cotangents, {samples, classes, sums}, ScalarType::Double);
  const double* in = cotangents.const_data_ptr<double>();
  double* out = result.mutable_data_ptr<double>();

  const bool is_double = grad_loss.scalar_type() == ScalarType::Double;
  const void* const grads = grad_loss.const_data_ptr();
  const auto grad_at = [&](int64_t index) {
    return is_double ? static_cast<const double*>(grads)[index]
                     : static_cast<double>(static_cast<const float*>(grads)[index]);
  };
  const bool scalar = grad_loss.dim() == 0;
  const bool per_class = class_pooling == kUnpooled;
  const int64_t row = scalar || batch ? 0 : (per_class ? classes - first_class : 1);
  for (int64_t b = 0; b < samples; ++b) {
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t column = scalar || !per_class ? 0 : c - first_class;
      const double grad = column < 0 ? 0 : grad_at(b * row + column);
      for (int64_t k = 0; k < sums; ++k) *out++ = grad * *in++;
    }
  }
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CPU, m) {
  m.impl("ratio_loss", TORCH_BOX(&ratio_loss));
  m.impl("ratio_loss_backward", TORCH_BOX(&ratio_loss_backward));
}

}  // namespace
}  // namespace voxfuse
