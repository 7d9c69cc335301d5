#pragma once

#include <cmath>
#include <cstdint>

#include "contract/ratio_loss.h"
#include "math/host_device.h"

// The scalar mathematics of the ratio losses, in double precision throughout. The definition and
// the names are those of src/voxfuse/reference/ratio_loss.py.
namespace voxfuse {

// Numerator (hits), denominator (size) and their difference (misses), without the smoothing.
struct RatioSums {
  double misses;
  double hits;
  double size;
};

// A term of the loss and its slopes: d term / d s_k = a (den_k - num_k) + b den_k.
struct RatioTerm {
  double value;
  double a;
  double b;
};

// A sum with coefficient 0 is not looked at: it may be infinite.
VOXFUSE_HOST_DEVICE inline RatioSums ratio_sums(const double* sums, const RatioOptions& options) {
  RatioSums result{0, 0, 0};
  for (int k = 0; k < FULL; ++k) {  // coefficients beyond options.width are 0
    const double num = options.numerator[k];
    const double den = options.denominator[k];
    if (num != 0) result.hits += num * sums[k];
    if (den != 0) result.size += den * sums[k];
    if (den != num) result.misses += (den - num) * sums[k];
  }
  return result;
}

VOXFUSE_HOST_DEVICE inline double ratio_slope(const RatioTerm& term, int k,
                                              const RatioOptions& options) {
  const double num = options.numerator[k];
  const double den = options.denominator[k];
  return term.a * (den - num) + term.b * den;
}

// The exponent of the terms of a class.
VOXFUSE_HOST_DEVICE inline double exponent_of(int64_t class_index, const RatioOptions& options) {
  return class_index < options.exponent_from ? 1 : options.exponent;
}

VOXFUSE_HOST_DEVICE inline RatioTerm ratio_term(const RatioSums& sums, double exponent,
                                                const RatioOptions& options) {
  const double n = sums.hits + options.smooth_nr;
  double d = sums.size + options.smooth_dr;
  const bool clamped = d < options.min_denominator;
  if (clamped) d = options.min_denominator;
  // Two empty sets and no smoothing: 0 / 0 agrees perfectly.
  if (d == 0) return {0, 0, 0};
  // 1 - N/D without a difference of nearly equal numbers, as long as D is not clamped.
  const double index =
      (clamped ? d - n : sums.misses + (options.smooth_dr - options.smooth_nr)) / d;
  RatioTerm term{index, 1 / d, 0};
  if (options.log) {
    const double ratio = n / d;
    if (ratio < options.min_denominator) {
      term = {-std::log(options.min_denominator), 0, 0};
    } else {
      term = {index < 0.5 ? -std::log1p(-index) : -std::log(ratio), 1 / n, 0};
    }
  } else if (exponent != 1) {
    // The slope of I^exponent at I = 0 is taken as 0, for exponents below 1 too.
    if (index <= 0) return {0, 0, 0};
    const double power = std::pow(index, exponent - 1);
    term = {power * index, exponent * power / d, 0};
  }
  term.b = clamped ? -term.a : -index * term.a;
  return term;
}

// Weight of class c (from first_class on) in sample b.
VOXFUSE_HOST_DEVICE inline double weight_in_sample(const RatioLoss& q, int64_t b, int64_t c) {
  return q.class_weight == nullptr ? 1 : q.class_weight[b * q.class_weight_stride + c];
}

// Whether sample b counts for class c; a weight for every sample may leave it out.
VOXFUSE_HOST_DEVICE inline bool is_annotated(const RatioLoss& q, int64_t b, int64_t c) {
  return q.class_weight_stride == 0 || weight_in_sample(q, b, c) != 0;
}

// Weight of class c in row r, a sample or the pooled batch; 0 if that has no annotated sample.
VOXFUSE_HOST_DEVICE inline double weight_in_row(const RatioLoss& q, int64_t r, int64_t c) {
  if (q.class_weight_stride == 0 || !q.options.batch) return weight_in_sample(q, r, c);
  double sum = 0, count = 0;
  for (int64_t b = 0; b < q.samples; ++b) {
    sum += weight_in_sample(q, b, c);
    count += is_annotated(q, b, c) ? 1 : 0;
  }
  return count == 0 ? 0 : sum / count;
}

// Whether a class has target volume in a row; not where weights by sample leave it out.
VOXFUSE_HOST_DEVICE inline bool is_present(const RatioLoss& q, double volume, double row_weight) {
  return volume != 0 && (q.class_weight_stride == 0 || row_weight != 0);
}

// Weight of a class of this target volume in the generalised Dice loss; may be infinite.
VOXFUSE_HOST_DEVICE inline double pooling_weight(double volume, ClassPooling class_pooling) {
  if (class_pooling == ClassPooling::uniform) return 1;
  return 1 / (class_pooling == ClassPooling::simple ? volume : volume * volume);
}

// The part of one (sample, class) in what the log-likelihood is divided by.
VOXFUSE_HOST_DEVICE inline double normaliser_part(const double* sums, int class_index,
                                                  double nll_weight, Normaliser normaliser) {
  switch (normaliser) {
    case Normaliser::target:
      return nll_weight * (sums[Sum::TP] + sums[Sum::FN]);
    case Normaliser::voxels:
      return class_index == 0 ? sums[Sum::W] : 0;
    case Normaliser::elements:
      return sums[Sum::W];
    case Normaliser::volume:
      return sums[Sum::TP] + sums[Sum::FN];
    default:
      return 0;
  }
}

// scale * weight * sum, where a weight or scale of 0 leaves out even an infinite sum.
VOXFUSE_HOST_DEVICE inline double likelihood_part(double sum, double weight, double scale) {
  return weight == 0 || scale == 0 ? 0 : scale * weight * sum;
}

}  // namespace voxfuse
