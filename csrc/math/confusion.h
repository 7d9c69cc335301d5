// Scalar mathematics of soft_confusion for one voxel and class, for host and device.
//
// Real is float or double. Nothing here is computed as a difference that could cancel: 1 - p and
// -log p keep their relative accuracy however close p is to 1. NaN goes through everywhere.
#pragma once

#include <cfloat>
#include <cmath>

#include "math/host_device.h"

namespace voxfuse::math {

enum Activation : int { kNone = 0, kSigmoid = 1, kSoftmax = 2 };

constexpr float kLog2E = 1.44269504f;
constexpr float kLog2ELow = 1.92596299e-8f;  // log2(e) - kLog2E
constexpr float kLn2 = 0.693147181f;
constexpr float kLn2Low = -1.90465421e-9f;  // log(2) - kLn2

VOXFUSE_HOST_DEVICE inline float largest(float) { return FLT_MAX; }
VOXFUSE_HOST_DEVICE inline double largest(double) { return DBL_MAX; }

/// Infinite values become the largest finite ones; NaN stays.
template <class Real>
VOXFUSE_HOST_DEVICE inline Real finite(Real x) {
  const Real limit = largest(x);
  return x > limit ? limit : (x < -limit ? -limit : x);
}

/// 2^x to about 2 units in the last place; results below 2^-126 become 0.
VOXFUSE_HOST_DEVICE inline float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
#endif
}

VOXFUSE_HOST_DEVICE inline float log2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::log2(x);
#endif
}

/// 1 / x to 1 unit in the last place.
VOXFUSE_HOST_DEVICE inline float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

VOXFUSE_HOST_DEVICE inline double reciprocal(double x) { return 1.0 / x; }

/// e^x for x <= 0. The product with log2(e) is carried in two parts, or its rounding would cost as
/// many units in the last place as |x|.
VOXFUSE_HOST_DEVICE inline float exp_negative(float x) {
  const float product = x * kLog2E;
  const float error = fmaf(x, kLog2ELow, fmaf(x, kLog2E, -product));
  const float y = exp2_fast(product);
  // Far below the smallest float, product and error are infinite or NaN; y is 0 there.
  return y == 0.0f ? 0.0f : fmaf(y, error * kLn2, y);
}

/// As exp_negative for finite x, in fewer instructions: 0 below -100.
VOXFUSE_HOST_DEVICE inline float exp_negative_finite(float x) {
  const float z = fmaxf(x, -100.0f);
  const float product = z * kLog2E;
  // What e^z has beside 2^product: z - product log(2), with log(2) in two parts.
  const float rest = fmaf(product, -kLn2Low, fmaf(product, -kLn2, z));
  const float y = exp2_fast(product);
  return fmaf(y, rest, y);
}

VOXFUSE_HOST_DEVICE inline double exp_negative(double x) { return std::exp(x); }

/// -log(1 - y) for 0 <= y <= 1/2, to a few units in the last place: a minimax polynomial of
/// -log(1 - y) / y with relative error 2.3e-8.
VOXFUSE_HOST_DEVICE inline float minus_log1m(float y) {
  float s = 1.4410337209701538f;
  s = fmaf(s, y, -1.6956636905670166f);
  s = fmaf(s, y, 1.2575494050979614f);
  s = fmaf(s, y, -0.20348811149597168f);
  s = fmaf(s, y, 0.26960086822509766f);
  s = fmaf(s, y, 0.2428065836429596f);
  s = fmaf(s, y, 0.3337005078792572f);
  s = fmaf(s, y, 0.49999284744262695f);
  s = fmaf(s, y, 1.0f);
  return s * y;
}

VOXFUSE_HOST_DEVICE inline double minus_log1m(double y) { return -std::log1p(-y); }

VOXFUSE_HOST_DEVICE inline float log_accurate(float x) { return logf(x); }
VOXFUSE_HOST_DEVICE inline double log_accurate(double x) { return std::log(x); }

VOXFUSE_HOST_DEVICE inline float log1p_accurate(float x) { return log1pf(x); }
VOXFUSE_HOST_DEVICE inline double log1p_accurate(double x) { return std::log1p(x); }

/// x^gamma for x in [0, 1] and gamma != 0; 0 at x = 0 for gamma > 0.
VOXFUSE_HOST_DEVICE inline float power(float x, float gamma) {
  if (gamma == 1.0f) return x;
  if (gamma == 2.0f) return x * x;
  return exp2f(gamma * log2f(x));
}

VOXFUSE_HOST_DEVICE inline double power(double x, double gamma) { return std::pow(x, gamma); }

/// factor * value where 0 * infinity (as in 0 log 0) is 0.
template <class Real>
VOXFUSE_HOST_DEVICE inline Real product(Real factor, Real value) {
  return factor == Real(0) ? Real(0) : factor * value;
}

template <class Real>
struct Probability {
  Real p, complement, minus_log, minus_log_complement;
};

template <class Real>
VOXFUSE_HOST_DEVICE inline Probability<Real> sigmoid(Real logit) {
  const Real z = finite(logit);
  const Real e = exp_negative(z < Real(0) ? z : -z);  // NaN takes the second branch and stays
  const Real large = reciprocal(Real(1) + e), small = e * large;
  const Real tail = minus_log1m(small);
  const bool positive = z >= Real(0);
  return {positive ? large : small, positive ? small : large, (positive ? Real(0) : -z) + tail,
          (positive ? z : Real(0)) + tail};
}

template <class Real>
VOXFUSE_HOST_DEVICE inline Probability<Real> plain(Real p) {
  const Real complement = Real(1) - p;
  return {p, complement, -log_accurate(p), -log_accurate(complement)};
}

/// What a voxel adds to the sums of one class, before its weight.
template <class Real>
struct Overlap {
  Real tp, fp, fn;
};

/// g - p, from the complements where both are close to 1 and p may have rounded to it.
template <class Real>
VOXFUSE_HOST_DEVICE inline Real missed(const Probability<Real>& q, Real g) {
  return g >= Real(0.5) ? q.complement - (Real(1) - g) : g - q.p;
}

template <class Real>
VOXFUSE_HOST_DEVICE inline Overlap<Real> overlap(const Probability<Real>& q, Real g, bool use_min) {
  if (!use_min) return {q.p * g, q.p * (Real(1) - g), q.complement * g};
  // A comparison with NaN would choose a plausible number.
  if (q.p != q.p || g != g) return {q.p + g, q.p + g, q.p + g};
  const Real fn = missed(q, g);
  return {q.p < g ? q.p : g, fn < Real(0) ? -fn : Real(0), fn > Real(0) ? fn : Real(0)};
}

/// d TP / d p with overlap min, g with the product.
template <class Real>
VOXFUSE_HOST_DEVICE inline Real overlap_slope(const Probability<Real>& q, Real g, bool use_min) {
  if (!use_min) return g;
  const Real fn = missed(q, g);
  return fn > Real(0) ? Real(1) : (fn < Real(0) ? Real(0) : Real(0.5) + fn);  // NaN stays
}

/// (1 - r)^gamma (-log r).
template <class Real>
VOXFUSE_HOST_DEVICE inline Real focal(Real complement, Real minus_log, Real gamma) {
  return gamma == Real(0) ? minus_log : power(complement, gamma) * minus_log;
}

/// q = gamma r (1-r)^(gamma-1) log r - (1-r)^gamma, which tends to 0 as r tends to 1 if gamma > 0.
template <class Real>
VOXFUSE_HOST_DEVICE inline Real focal_slope(Real r, Real complement, Real minus_log, Real gamma) {
  if (gamma == Real(0)) return Real(-1);
  if (complement == Real(0)) return Real(0);
  const Real lower = gamma == Real(1) ? Real(1) : power(complement, gamma - Real(1));
  return -gamma * product(r, lower * minus_log) - lower * complement;
}

}  // namespace voxfuse::math
