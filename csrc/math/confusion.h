// The mathematics of soft_confusion for one voxel and class: CPU, CUDA and the tests include it.
//
// V is a value type (csrc/math/value.h). Nothing here is computed as a difference that could
// cancel: 1 - p and -log p keep their relative accuracy however close p is to 1. NaN goes through
// everywhere.
#pragma once

#include "contract/codes.h"
#include "math/value.h"

namespace VOXFUSE_MATH {

/// factor * value where 0 * infinity (as in 0 log 0) is 0.
template <class V>
VOXFUSE_HOST_DEVICE inline V product(V factor, V value) {
  // Not select(): a GPU may skip the product, and needs no register for it.
  return factor == Real<V>(0) ? splat<V>(0) : factor * value;
}

/// x^exponent for x in [0, 1] and exponent != 0; 0 at x = 0 for exponent > 0.
template <class V>
VOXFUSE_HOST_DEVICE inline V power(V x, Real<V> exponent) {
  if (exponent == Real<V>(1)) return x;
  if (exponent == Real<V>(2)) return x * x;
  return raise(x, exponent);
}

/// A prediction and its complement; their negative logarithms are what makes likelihoods.
template <class V>
struct Probability {
  V p, complement, minus_log, minus_log_complement;
};

/// The sigmoid of z from e = exp(-|z|), one_plus = 1 + e and inverse = 1 / one_plus. The logarithms
/// are softplus(-z) and softplus(z).
template <class V>
VOXFUSE_HOST_DEVICE inline Probability<V> sigmoid(V z, V e, V one_plus, V inverse) {
  const V small = e * inverse, tail = log1p(e, one_plus, inverse);
  const auto negative = z < Real<V>(0);  // of NaN, for which e is NaN too, either will do
  return {select(negative, small, inverse), select(negative, inverse, small),
          select(negative, -z, splat<V>(0)) + tail, select(negative, splat<V>(0), z) + tail};
}

template <class R>
VOXFUSE_HOST_DEVICE inline Probability<R> sigmoid(R logit) {
  const R z = finite(logit);
  const R e = exp_negative(z < R(0) ? z : -z), one_plus = R(1) + e;
  return sigmoid(z, e, one_plus, reciprocal(one_plus));
}

/// A probability as it was given.
template <class V>
VOXFUSE_HOST_DEVICE inline Probability<V> plain(V p) {
  const V complement = Real<V>(1) - p;
  return {p, complement, -log_accurate(p), -log_accurate(complement)};
}

/// What a voxel adds to the sums of one class, before its weight.
template <class V>
struct Overlap {
  V tp, fp, fn;
};

/// g - p, from the complements where both are close to 1 and p may have rounded to it.
template <class V>
VOXFUSE_HOST_DEVICE inline V missed(const Probability<V>& q, V g) {
  return select(g >= Real<V>(0.5), q.complement - (Real<V>(1) - g), g - q.p);
}

template <class V>
VOXFUSE_HOST_DEVICE inline Overlap<V> overlap(const Probability<V>& q, V g, bool use_min) {
  if (!use_min) return {q.p * g, q.p * (Real<V>(1) - g), q.complement * g};
  const V fn = missed(q, g), zero = splat<V>(0);
  // Of NaN no comparison is true: the sum is NaN where a choice would be a plausible number.
  return {select(q.p < g, q.p, select(q.p >= g, g, q.p + g)), select(fn > Real<V>(0), zero, -fn),
          select(fn < Real<V>(0), zero, fn)};
}

/// d TP / d p with overlap min, g with the product.
template <class V>
VOXFUSE_HOST_DEVICE inline V overlap_slope(const Probability<V>& q, V g, bool use_min) {
  if (!use_min) return g;
  const V fn = missed(q, g);
  return select(fn > Real<V>(0), splat<V>(1),
                select(fn < Real<V>(0), splat<V>(0), fn + Real<V>(0.5)));  // NaN stays
}

/// (1 - r)^gamma (-log r).
template <class V>
VOXFUSE_HOST_DEVICE inline V focal(V complement, V minus_log, Real<V> gamma) {
  return gamma == Real<V>(0) ? minus_log : power(complement, gamma) * minus_log;
}

/// q = gamma r (1-r)^(gamma-1) log r - (1-r)^gamma, which tends to 0 as r tends to 1 if gamma > 0.
template <class V>
VOXFUSE_HOST_DEVICE inline V focal_slope(V r, V complement, V minus_log, Real<V> gamma) {
  if (gamma == Real<V>(0)) return splat<V>(-1);
  const auto certain = complement == Real<V>(0);
  const V base = select(certain, splat<V>(1), complement);
  const V lower = gamma == Real<V>(1) ? splat<V>(1) : power(base, gamma - Real<V>(1));
  return select(certain, splat<V>(0), -gamma * product(r, lower * minus_log) - lower * base);
}

/// The cotangents of one class: hit is TP's less FN's, which counts where g = 1, miss FP's, where
/// g = 0; then NLL's, OFF's and twice P2's.
template <class R>
struct Slope {
  R hit, miss, nll, off, square;

  Slope() = default;
  template <class T>
  VOXFUSE_HOST_DEVICE Slope(const T* cotangent, bool full)
      : hit(static_cast<R>(cotangent[Sum::TP] - cotangent[Sum::FN])),
        miss(static_cast<R>(cotangent[Sum::FP])),
        nll(static_cast<R>(cotangent[Sum::NLL])),
        off(full ? static_cast<R>(cotangent[Sum::OFF]) : R(0)),
        square(full ? R(2) * static_cast<R>(cotangent[Sum::P2]) : R(0)) {}
};

/// h = a hit + (1 - a) miss + p square, where a is the overlap's slope.
template <class V>
VOXFUSE_HOST_DEVICE inline V slope_of_p(const Slope<Real<V>>& s, V a, V p) {
  return multiply_add(p, s.square, multiply_add(a, s.hit, (Real<V>(1) - a) * s.miss));
}

/// h less that of another class. Formed before anything is multiplied, so that nothing large is
/// left to cancel: of what the two share of hit and of miss, and of what one has as hit and the
/// other as miss. T is V or, for numbers of one class in all lanes, Real<V>.
template <class V, class T>
VOXFUSE_HOST_DEVICE inline V slope_difference(const Slope<Real<V>>& s, V a, V p, T other_hit,
                                              T other_miss, V other_a, V other_square) {
  const auto above = a > other_a;
  V h = select(above, other_a, a) * (s.hit - other_hit);
  h += (Real<V>(1) - select(above, a, other_a)) * (s.miss - other_miss);
  h += (a - other_a) * select(above, s.hit - other_miss, other_hit - s.miss);
  return h + (p * s.square - other_square);
}

/// u of a softmax's likelihood.
template <class V>
VOXFUSE_HOST_DEVICE inline V likelihood_share(const Slope<Real<V>>& s, const Probability<V>& r, V g,
                                              Real<V> gamma, bool full) {
  V u = s.nll * g * focal_slope(r.p, r.complement, r.minus_log, gamma);
  if (full) u -= s.off * (Real<V>(1) - g);
  return u;
}

/// The slope of the likelihood of a class that does not know the others, where chain is d r / d z
/// over r and factor is the cotangent times g. Without a cotangent there is none, not even an
/// infinite one (r = 0). That of the negatives has the complement in the place of r.
template <class V>
VOXFUSE_HOST_DEVICE inline V likelihood_slope(V factor, V r, V complement, V minus_log,
                                              Real<V> gamma, V chain) {
  return product(factor, focal_slope(r, complement, minus_log, gamma) * chain);
}

}  // namespace VOXFUSE_MATH
