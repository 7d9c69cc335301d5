// The values that mathematics is written for, V: float, double and, in a CPU kernel, its vectors of
// either. What depends on the type is here; csrc/math/confusion.h has what does not.
//
// A number that all lanes share has the type Real<V>. A comparison of vectors gives a mask: it
// chooses between two values, both of which are computed.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>
#include <utility>

#include "math/host_device.h"
#ifdef VOXFUSE_ISA
#include "cpu/simd.h"
#endif

namespace VOXFUSE_MATH {

template <class V, bool = std::is_floating_point_v<V>>
struct RealOf {
  using type = V;
};
template <class V>
struct RealOf<V, false> {
  using type = std::remove_cvref_t<decltype(std::declval<V&>()[0])>;
};
template <class V>
using Real = typename RealOf<V>::type;

/// x in every lane.
template <class V>
VOXFUSE_HOST_DEVICE inline V splat(Real<V> x) {
  if constexpr (std::is_floating_point_v<V>) {
    return x;
  } else {
    return x - V{};
  }
}

template <class M, class V>
VOXFUSE_HOST_DEVICE inline V select(M condition, V yes, V no) {
  return condition ? yes : no;
}

constexpr float kLog2E = 1.44269504f;
constexpr float kLog2ELow = 1.92596299e-8f;  // log2(e) - kLog2E
constexpr float kLn2 = 0.693147181f;
constexpr float kLn2Low = -1.90465421e-9f;  // log(2) - kLn2

VOXFUSE_HOST_DEVICE inline float largest(float) { return FLT_MAX; }
VOXFUSE_HOST_DEVICE inline double largest(double) { return DBL_MAX; }

/// Infinite values become the largest finite ones; NaN stays.
template <class R>
VOXFUSE_HOST_DEVICE inline R finite(R x) {
  const R limit = largest(x);
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

VOXFUSE_HOST_DEVICE inline float log1p_accurate(float x) { return log1pf(x); }
VOXFUSE_HOST_DEVICE inline double log1p_accurate(double x) { return std::log1p(x); }

VOXFUSE_HOST_DEVICE inline float log_accurate(float x) { return logf(x); }
VOXFUSE_HOST_DEVICE inline double log_accurate(double x) { return std::log(x); }

/// log(1 + x) for 0 <= x <= 1, where inverse = 1 / (1 + x) and one_plus = 1 + x, rounded.
template <class R>
VOXFUSE_HOST_DEVICE inline R log1p(R x, R /*one_plus*/, R inverse) {
  return minus_log1m(x * inverse);
}

/// a b + c, in one rounding wherever the type has an instruction for it.
VOXFUSE_HOST_DEVICE inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
VOXFUSE_HOST_DEVICE inline double multiply_add(double a, double b, double c) {
  return std::fma(a, b, c);
}

/// x^exponent for x in [0, 1].
VOXFUSE_HOST_DEVICE inline float raise(float x, float exponent) {
  return exp2f(exponent * log2f(x));
}
VOXFUSE_HOST_DEVICE inline double raise(double x, double exponent) { return std::pow(x, exponent); }

#ifdef VOXFUSE_ISA
template <class R>
concept Vectorised = !std::is_floating_point_v<R>;

template <Vectorised V>
VOXFUSE_HOST_DEVICE inline V log_accurate(V x) {
  return voxfuse::VOXFUSE_ISA::logarithm(x);
}
template <Vectorised V>
VOXFUSE_HOST_DEVICE inline V log1p(V x, V one_plus, V inverse) {
  return voxfuse::VOXFUSE_ISA::log1p(x, one_plus, inverse);
}
template <Vectorised V>
VOXFUSE_HOST_DEVICE inline V multiply_add(V a, Real<V> b, V c) {
  return voxfuse::VOXFUSE_ISA::multiply_add(a, splat<V>(b), c);
}
template <Vectorised V>
VOXFUSE_HOST_DEVICE inline V raise(V x, Real<V> exponent) {
  return voxfuse::VOXFUSE_ISA::exponential(exponent * voxfuse::VOXFUSE_ISA::logarithm(x));
}
#endif

}  // namespace VOXFUSE_MATH
