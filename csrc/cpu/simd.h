// Portable short vectors for the CPU kernels: GCC/Clang vector extensions, one width an
// instruction set, and the few elementary functions the kernels need. Included only by
// *_kernel.cpp, which CMake compiles once an instruction set with VOXFUSE_ISA set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace voxfuse::VOXFUSE_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class R>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int width = kVectorBytes / 4;
};

template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int width = kVectorBytes / 8;
};

template <class R>
using Vec = typename Lanes<R>::V;
template <class R>
using Mask = typename Lanes<R>::I;

#define VOXFUSE_INLINE inline __attribute__((always_inline))

template <class R>
VOXFUSE_INLINE Vec<R> load(const R* p) {
  Vec<R> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class R>
VOXFUSE_INLINE void store(R* p, Vec<R> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <class R>
VOXFUSE_INLINE Vec<R> broadcast(R x) {
  return x - Vec<R>{};
}

template <class R>
VOXFUSE_INLINE double sum_of_lanes(Vec<R> v) {
  double total = 0;
  for (int i = 0; i < Lanes<R>::width; ++i) total += static_cast<double>(v[i]);
  return total;
}

// NaN in `a` survives; NaN in `b` gives `a`.
template <class V>
VOXFUSE_INLINE V at_least(V a, V b) {
  return a < b ? b : a;
}
template <class V>
VOXFUSE_INLINE V at_most(V a, V b) {
  return a > b ? b : a;
}

VOXFUSE_INLINE Vec<float> absolute(Vec<float> x) {
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Mask<float>>(x) & 0x7fffffff);
}
VOXFUSE_INLINE Vec<double> absolute(Vec<double> x) {
  return reinterpret_cast<Vec<double>>(reinterpret_cast<Mask<double>>(x) & 0x7fffffffffffffffll);
}

// exp(x) for x <= 0 within about 1 ulp; below -87.33, where the result would be subnormal, 0. NaN
// survives.
VOXFUSE_INLINE Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  const V clamped = at_least(x, broadcast<float>(-87.34f));
#if defined(__AVX512F__)
  const V n = _mm512_roundscale_ps(clamped * 1.44269504088896341f,
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  constexpr float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = clamped * 1.44269504088896341f + magic;
  const V n = shifted - magic;
#endif
  V r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V y = broadcast<float>(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + (r + 1.f);
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast<float>(-87.33f), _CMP_NLT_UQ), y,
                                n);
#else
  using I = Mask<float>;
  const I bits = reinterpret_cast<I>(shifted) << 23;  // the low bits of `shifted` hold n
  const V scale = reinterpret_cast<V>(bits + 0x3f800000);
  return x < -87.33f ? V{} : y * scale;
#endif
}

VOXFUSE_INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::width; ++i) x[i] = std::exp(x[i]);
  return x;
}

// log(x) of positive normal x within about 1 ulp.
VOXFUSE_INLINE Vec<float> logarithm_of_normal(Vec<float> x) {
  using V = Vec<float>;
  using I = Mask<float>;
  // x = 2^n * m with m in [sqrt(1/2), sqrt(2))
  const I bits = reinterpret_cast<I>(x) - 0x3f3504f3;
  const I n = bits >> 23;
  const V m = reinterpret_cast<V>((bits & 0x007fffff) + 0x3f3504f3) - 1.f;
  const V exponent = __builtin_convertvector(n, V);
  V y = broadcast<float>(7.0376836292e-2f);
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  const V z = m * m;
  V tail = y * m * z + exponent * -2.12194440e-4f;
  tail = tail - 0.5f * z;
  return m + tail + exponent * 0.693359375f;
}

VOXFUSE_INLINE Vec<float> logarithm(Vec<float> x) {
  using V = Vec<float>;
  const V infinity = broadcast<float>(std::numeric_limits<float>::infinity());
  const Mask<float> subnormal = x < 1.17549435e-38f;
  const V scaled = subnormal ? x * 8388608.f : x;
  V y = logarithm_of_normal(scaled) - (subnormal ? broadcast<float>(15.9423847f) : V{});
  y = x == infinity ? infinity : y;
  y = x == 0.f ? -infinity : y;
  return (x < 0.f) | (x != x) ? broadcast<float>(std::numeric_limits<float>::quiet_NaN()) : y;
}

VOXFUSE_INLINE Vec<double> logarithm(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::width; ++i) x[i] = std::log(x[i]);
  return x;
}

// log(1 + x) for x >= 0, where one_plus = 1 + x (rounded) and inverse = 1 / one_plus: the last term
// gives back what the rounding of 1 + x lost.
VOXFUSE_INLINE Vec<float> log1p(Vec<float> x, Vec<float> one_plus, Vec<float> inverse) {
  return logarithm_of_normal(one_plus) + (x - (one_plus - 1.f)) * inverse;
}
VOXFUSE_INLINE Vec<double> log1p(Vec<double> x, Vec<double>, Vec<double>) {
  for (int i = 0; i < Lanes<double>::width; ++i) x[i] = std::log1p(x[i]);
  return x;
}

// One step of a transposition: rows i and i + D of a group of 2 D exchange their off-diagonal
// D x D blocks.
template <int D, std::size_t... L>
VOXFUSE_INLINE void exchange_rows(Vec<float>* rows, std::index_sequence<L...>) {
  constexpr int W = sizeof...(L);
  for (int i = 0; i < W; ++i) {
    if ((i & D) != 0) continue;
    const Vec<float> a = rows[i], b = rows[i + D];
    rows[i] = __builtin_shufflevector(a, b, ((L & D) != 0 ? W + L - D : L)...);
    rows[i + D] = __builtin_shufflevector(a, b, ((L & D) != 0 ? W + L : L + D)...);
  }
}

// Transposes a square of vectors in place.
VOXFUSE_INLINE void transpose(Vec<float>* rows) {
  constexpr int W = Lanes<float>::width;
  constexpr auto lanes = std::make_index_sequence<W>{};
  if constexpr (W >= 16) exchange_rows<8>(rows, lanes);
  if constexpr (W >= 8) exchange_rows<4>(rows, lanes);
  exchange_rows<2>(rows, lanes);
  exchange_rows<1>(rows, lanes);
}

}  // namespace voxfuse::VOXFUSE_ISA
