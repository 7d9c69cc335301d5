// The ratio loss on the CPU. The statistics are tiny (samples x classes x 8), so everything here is
// one thread's work.
#include "math/ratio_loss.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/ratio_loss.h"

namespace voxfuse {
namespace {

// One row of the statistics, a sample or the pooled batch: its terms, one a class or one pooled.
class Row {
 public:
  Row(const RatioLoss& q, int64_t r, const double* sums)
      : options_(q.options), pooled_(q.options.class_pooling != ClassPooling::none) {
    const RatioOptions& options = q.options;
    const double* first = sums + options.first_class * options.width;
    const int64_t count = q.classes - options.first_class;
    std::vector<RatioSums> ratios(count);
    std::vector<bool> present(count);
    std::vector<double> class_weight(count);
    for (int64_t c = 0; c < count; ++c) {
      const double* s = first + c * options.width;
      ratios[c] = ratio_sums(s, options);
      volumes_.push_back(s[Sum::TP] + s[Sum::FN]);
      class_weight[c] = weight_in_row(q, r, c);
      present[c] = is_present(q, volumes_[c], class_weight[c]);
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
    weights_ = class_weight;
    for (int64_t c = 0; c < count; ++c) {
      add_term(ratios[c], present[c], exponent_of(options_.first_class + c, options_));
      terms_.back().value *= weights_[c];
    }
  }

  const std::vector<RatioTerm>& terms() const { return terms_; }
  int64_t counted() const { return counted_; }

  // Write scale times the slopes of every class at or above the first, for one of the samples.
  void write_slopes(const RatioLoss& q, int64_t sample, double scale) const {
    double* out = q.cotangents + (sample * q.classes + options_.first_class) * options_.width;
    for (size_t c = 0; c < weights_.size(); ++c) {
      if (options_.batch && !is_annotated(q, sample, c)) {
        out += options_.width;  // stays 0
        continue;
      }
      const RatioTerm& term = terms_[pooled_ ? 0 : c];
      for (int k = 0; k < options_.width; ++k) {
        *out++ = scale * (weights_[c] * ratio_slope(term, k, options_));
      }
    }
  }

 private:
  void add_term(const RatioSums& sums, bool present, double exponent) {
    const bool keep = present || options_.absent == Absent::keep;
    terms_.push_back(keep ? ratio_term(sums, exponent, options_) : RatioTerm{0, 0, 0});
    if (present || options_.absent != Absent::ignore) ++counted_;
  }

  // Infinite weights borrow the largest finite one, or are 1 in a row that has none.
  void find_weights(const std::vector<bool>& present, const std::vector<double>& class_weight) {
    double largest = 0;
    for (const double volume : volumes_) {
      weights_.push_back(pooling_weight(volume, options_.class_pooling));
      if (!std::isinf(weights_.back())) largest = std::max(largest, weights_.back());
    }
    for (size_t c = 0; c < weights_.size(); ++c) {
      if (std::isinf(weights_[c])) weights_[c] = largest == 0 ? 1 : largest;
      if (options_.absent == Absent::ignore && !present[c]) weights_[c] = 0;
      weights_[c] *= class_weight[c];
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
double likelihood(const RatioLoss& q) {
  const RatioOptions& o = q.options;
  const auto weight = [](const double* weights, int64_t c) {
    return weights == nullptr ? 1.0 : weights[c];
  };
  double total = 0;
  double divisor = o.normaliser == Normaliser::one ? 1 : 0;
  for (int64_t i = 0; i < q.samples * q.classes; ++i) {
    const int64_t c = i % q.classes;
    const double* s = q.stats + i * o.width;
    const double w = weight(q.nll_weight, c);
    divisor += normaliser_part(s, static_cast<int>(c), w, o.normaliser);
    total += likelihood_part(s[Sum::NLL], w, o.nll_scale);
    if (o.off_scale != 0) {
      total += likelihood_part(s[Sum::OFF], weight(q.off_weight, c), o.off_scale);
    }
  }
  if (divisor == 0) return 0;
  for (int64_t i = 0; i < q.samples * q.classes; ++i) {
    const int64_t c = i % q.classes;
    double* out = q.cotangents + i * o.width;
    if (o.nll_scale != 0) out[Sum::NLL] += o.nll_scale * weight(q.nll_weight, c) / divisor;
    if (o.off_scale != 0) out[Sum::OFF] += o.off_scale * weight(q.off_weight, c) / divisor;
  }
  return total / divisor;
}

void store(const RatioLoss& q, int64_t index, double value) {
  if (q.double_loss) {
    static_cast<double*>(q.loss)[index] = value;
  } else {
    static_cast<float*>(q.loss)[index] = static_cast<float>(value);
  }
}

// Writes the slopes of the terms; stores the terms, or returns their sum.
double ratio(const RatioLoss& q) {
  const RatioOptions& o = q.options;
  const int64_t rows = o.batch ? 1 : q.samples, length = q.classes * o.width;
  std::vector<double> pooled(o.batch ? length : 0, 0.0);
  if (o.batch) {
    for (int64_t i = 0; i < q.samples * length; ++i) {
      const int64_t c = i % length / o.width - o.first_class;
      if (c < 0 || is_annotated(q, i / length, c)) pooled[i % length] += q.stats[i];
    }
  }
  std::vector<Row> terms;
  terms.reserve(rows);
  int64_t counted = 0;
  for (int64_t r = 0; r < rows; ++r) {
    terms.emplace_back(q, r, o.batch ? pooled.data() : q.stats + r * length);
    counted += terms.back().counted();
  }
  double scale = o.ratio_scale;
  if (o.reduction == Reduction::mean) scale /= static_cast<double>(std::max<int64_t>(counted, 1));
  double value = 0;
  int64_t index = 0;
  for (const Row& row : terms) {
    for (const RatioTerm& term : row.terms()) {
      if (o.reduction == Reduction::none) {
        store(q, index++, scale * term.value);
      } else {
        value += scale * term.value;
      }
    }
  }
  for (int64_t b = 0; b < q.samples; ++b) {
    terms[o.batch ? 0 : b].write_slopes(q, b, scale);
  }
  return value;
}

void forward(const RatioLoss& q, const Tensor&) {
  const RatioOptions& o = q.options;
  std::fill(q.cotangents, q.cotangents + q.samples * q.classes * o.width, 0.0);
  double value = 0;
  if (o.ratio_scale != 0) {
    value = ratio(q);
  } else if (o.reduction == Reduction::none) {
    const int64_t rows = o.batch ? 1 : q.samples;
    const int64_t losses =
        o.class_pooling == ClassPooling::none ? rows * (q.classes - o.first_class) : rows;
    for (int64_t i = 0; i < losses; ++i) store(q, i, 0);
  }
  if (o.reduction == Reduction::none) return;
  if (o.nll_scale != 0 || o.off_scale != 0) value += likelihood(q);
  store(q, 0, value);
}

void backward(const RatioLossBackward& q, const Tensor&) {
  const auto grad_at = [&](int64_t index) {
    return q.double_grad ? static_cast<const double*>(q.grad_loss)[index]
                         : static_cast<double>(static_cast<const float*>(q.grad_loss)[index]);
  };
  for (int64_t i = 0; i < q.samples * q.classes; ++i) {
    const int64_t b = i / q.classes, c = i % q.classes - q.first_class;
    const double grad = c < 0 ? 0 : grad_at(b * q.sample_stride + c * q.class_stride);
    for (int64_t k = i * q.width; k < (i + 1) * q.width; ++k) q.result[k] = grad * q.cotangents[k];
  }
}

}  // namespace
}  // namespace voxfuse

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CPU, m) {
  m.impl("ratio_loss", TORCH_BOX(&voxfuse::ratio_loss_on<voxfuse::forward>));
  m.impl("ratio_loss_backward", TORCH_BOX(&voxfuse::ratio_loss_backward_on<voxfuse::backward>));
}
