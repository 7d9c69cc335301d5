// Portable short vectors for the CPU kernels: GCC/Clang vector extensions, one width an
// instruction set, and the few elementary functions the kernels need. Included only by
// *_kernel.cpp, which CMake compiles once an instruction set with VOXFUSE_ISA set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
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
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
  static constexpr int width = kVectorBytes / 4;
};

template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t U __attribute__((vector_size(kVectorBytes)));
  static constexpr int width = kVectorBytes / 8;
};

template <class R>
using Vec = typename Lanes<R>::V;
template <class R>
using Mask = typename Lanes<R>::I;

#define VOXFUSE_INLINE inline __attribute__((always_inline))

// Calls f(integral_constant<int, n>) for a run-time n of 1 to Most.
template <int Most, class F>
VOXFUSE_INLINE void with_count(int64_t n, F&& f) {
  if constexpr (Most > 0) {
    if (n == Most) {
      f(std::integral_constant<int, Most>{});
    } else {
      with_count<Most - 1>(n, f);
    }
  }
}

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

// a b + c, in one rounding where there is an instruction for it: which of several products is
// rounded alone is then not the compiler's choice.
VOXFUSE_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
VOXFUSE_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// exp(x) for x <= 0 within about 1 ulp; below -87.33, where the result would be subnormal, 0. NaN
// survives.
#if defined(__AVX512F__)
// exp(x) = 2^n 2^(j/16) exp(r), |r| <= log(2)/32: the sixteen powers stand in one register, which
// leaves a cubic for exp(r).
VOXFUSE_INLINE Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  const V powers = {1.f,         1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                    1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                    1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
  constexpr float magic = 786432.f;  // 1.5 * 2^19: adding it rounds to a multiple of 1/16
  const V shifted = x * 1.44269504088896341f + magic;
  const V n = shifted - magic;
  V r = x - n * 0.693147182464599609375f;
  r = r - n * -1.90465429995776804525e-9f;
  const V power = _mm512_permutexvar_ps(_mm512_castps_si512(shifted), powers);  // its low 4 bits
  const V slope = r * 0.16666667163372039794921875f + 0.5f;
  const V y = power + power * (slope * (r * r) + r);
  // The scaling takes the floor of n. What lanes below the limit hold is meaningless, and masked.
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast<float>(-87.33f), _CMP_NLT_UQ), y,
                                n);
}
#else
VOXFUSE_INLINE Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  const V clamped = at_least(x, broadcast<float>(-87.34f));
  constexpr float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = clamped * 1.44269504088896341f + magic;
  const V n = shifted - magic;
  V r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V y = broadcast<float>(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + (r + 1.f);
  using I = Mask<float>;
  const I bits = reinterpret_cast<I>(shifted) << 23;  // the low bits of `shifted` hold n
  const V scale = reinterpret_cast<V>(bits + 0x3f800000);
  return x < -87.33f ? V{} : y * scale;
}
#endif

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

// 1 / x of a normal x within about 1 ulp.
VOXFUSE_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> y = _mm512_rcp14_ps(x);
  return y + y * (1.f - x * y);
#else
  return 1.f / x;
#endif
}
VOXFUSE_INLINE Vec<double> reciprocal(Vec<double> x) { return 1. / x; }

// A logit with infinities replaced by the largest finite numbers; NaN stays NaN.
template <class R>
VOXFUSE_INLINE Vec<R> finite(Vec<R> z) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<R, float>) {
    // One response for each class of number: quiet NaN itself, infinities the largest, rest itself.
    const __m512i responses = _mm512_set1_epi32(0x11ef1122);
    return _mm512_fixupimm_ps(z, z, responses, 0);
  }
#endif
  const R limit = std::numeric_limits<R>::max();
  return at_least(at_most(z, broadcast<R>(limit)), broadcast<R>(-limit));
}

// A yes or no for each lane of a float vector: a mask register where there are any.
using Ints = Lanes<float>::I;
#if defined(__AVX512F__)
using Choice = __mmask16;
VOXFUSE_INLINE Choice equal(Ints a, int32_t b) {
  return _mm512_cmpeq_epi32_mask(reinterpret_cast<__m512i>(a), _mm512_set1_epi32(b));
}
VOXFUSE_INLINE Choice equal(Vec<float> a, float b) {
  return _mm512_cmp_ps_mask(a, broadcast<float>(b), _CMP_EQ_OQ);
}
VOXFUSE_INLINE Choice above(Vec<float> a, float b) {
  return _mm512_cmp_ps_mask(a, broadcast<float>(b), _CMP_GT_OQ);
}
VOXFUSE_INLINE Vec<float> select(Choice c, Vec<float> yes, Vec<float> no) {
  return _mm512_mask_blend_ps(c, no, yes);
}
VOXFUSE_INLINE Vec<float> select(Choice c, Vec<float> yes) { return _mm512_maskz_mov_ps(c, yes); }
VOXFUSE_INLINE Vec<float> add_where(Choice c, Vec<float> sum, Vec<float> x) {
  return _mm512_mask_add_ps(sum, c, sum, x);
}
VOXFUSE_INLINE Vec<float> add_product_where(Choice c, Vec<float> sum, Vec<float> x, Vec<float> y) {
  return _mm512_mask3_fmadd_ps(x, y, sum, c);
}
VOXFUSE_INLINE uint32_t lanes_of(Choice c) { return c; }
#else
using Choice = Ints;
VOXFUSE_INLINE Choice equal(Ints a, int32_t b) { return a == b; }
VOXFUSE_INLINE Choice equal(Vec<float> a, float b) { return a == b; }
VOXFUSE_INLINE Choice above(Vec<float> a, float b) { return a > b; }
VOXFUSE_INLINE Vec<float> select(Choice c, Vec<float> yes, Vec<float> no) { return c ? yes : no; }
VOXFUSE_INLINE Vec<float> select(Choice c, Vec<float> yes) { return c ? yes : Vec<float>{}; }
VOXFUSE_INLINE Vec<float> add_where(Choice c, Vec<float> sum, Vec<float> x) {
  return sum + select(c, x);
}
VOXFUSE_INLINE Vec<float> add_product_where(Choice c, Vec<float> sum, Vec<float> x, Vec<float> y) {
  return sum + select(c, x * y);
}
VOXFUSE_INLINE uint32_t lanes_of(Choice c) {
#if defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(c));
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(c));
#else
  uint32_t bits = 0;
  for (int i = 0; i < Lanes<float>::width; ++i) bits |= c[i] != 0 ? 1u << i : 0u;
  return bits;
#endif
}
#endif

VOXFUSE_INLINE Ints load(const int32_t* p) {
  Ints v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
VOXFUSE_INLINE Lanes<double>::I load(const int64_t* p) {
  Lanes<double>::I v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// float16 and bfloat16 in and out of a vector of float32, where the instruction set has both.
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
#if defined(__AVX512F__)
inline constexpr bool kHalvesInRegisters = true;
VOXFUSE_INLINE Vec<float> load_half(const uint16_t* p, bool bfloat) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (!bfloat) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
VOXFUSE_INLINE Halves round_to_half(Vec<float> x, bool bfloat) {
  typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));
  __m256i bits;
  if (bfloat) {
    // NaN becomes the one that rounding cannot carry into a number.
    const __m512i wide =
        _mm512_castps_si512(_mm512_fixupimm_ps(x, x, _mm512_set1_epi32(0x11111133), 0));
    // To the nearest, ties to even: half a unit less one bit, and that bit where the last kept one
    // is odd.
    const __mmask16 odd = _mm512_test_epi32_mask(wide, _mm512_set1_epi32(0x10000));
    __m512i rounded = _mm512_add_epi32(wide, _mm512_set1_epi32(0x7fff));
    rounded = _mm512_mask_add_epi32(rounded, odd, wide, _mm512_set1_epi32(0x8000));
    const Shorts upper = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    bits =
        _mm512_castsi512_si256(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(upper), rounded));
  } else {
    bits = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  return reinterpret_cast<Halves>(bits);
}
#else
inline constexpr bool kHalvesInRegisters = false;
inline Vec<float> load_half(const uint16_t*, bool) { return Vec<float>{}; }
inline Halves round_to_half(Vec<float>, bool) { return Halves{}; }
#endif
VOXFUSE_INLINE void store(uint16_t* p, Halves x) { std::memcpy(p, &x, sizeof(x)); }

// table[index] lane by lane, for a table with 16 elements at least of which the first C may be
// meant (C = 0: any). Short tables fit into a register.
template <int C>
VOXFUSE_INLINE Vec<float> look_up(const float* table, Ints index) {
#if defined(__AVX512F__)
  if constexpr (C > 0 && C <= 16) {
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), load(table));
  }
  return _mm512_i32gather_ps(reinterpret_cast<__m512i>(index), table, 4);
#elif defined(__AVX2__)
  if constexpr (C > 0 && C <= 8) {
    return _mm256_permutevar8x32_ps(load(table), reinterpret_cast<__m256i>(index));
  }
  return _mm256_i32gather_ps(table, reinterpret_cast<__m256i>(index), 4);
#else
  Vec<float> v;
  for (int i = 0; i < Lanes<float>::width; ++i) v[i] = table[index[i]];
  return v;
#endif
}

// Writes around the caches; `p` is aligned to a vector. After the last one, stream_fence.
VOXFUSE_INLINE void stream(float* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, v);
#else
  store(p, v);
#endif
}
VOXFUSE_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Elements of two vectors; `Pick` gives the place of each in a followed by b.
template <class Pick, std::size_t... L>
VOXFUSE_INLINE Vec<float> pick(Vec<float> a, Vec<float> b, Pick, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, Pick::of(L)...);
}

// The lower (or upper) halves of every 128 bits of both, `Run` elements at a time in turn.
template <int Run, int Upper>
struct InTurn {
  static constexpr int of(int l) {
    constexpr int W = Lanes<float>::width;
    const int lane = l / 4 * 4, within = l % 4;
    return lane + Upper * 2 + within / (2 * Run) * Run + within % Run + (within / Run % 2) * W;
  }
};

// Every other 128 bits of a, then of b.
template <int Odd>
struct EveryOther128 {
  static constexpr int of(int l) {
    constexpr int W = Lanes<float>::width;
    const int lane = l / 4, lanes = W / 4;
    const int from = lanes == 1 ? 0 : (lane % (lanes / 2)) * 2 + Odd;
    return (lane / (lanes / 2 > 0 ? lanes / 2 : 1)) * W + from * 4 + l % 4;
  }
};

// Transposes a square of vectors in place: 4 x 4 elements within 128 bits, then the 128 bits. Every
// step is one instruction that x86 has without a register for the places.
VOXFUSE_INLINE void transpose(Vec<float>* rows) {
  using V = Vec<float>;
  constexpr int W = Lanes<float>::width;
  constexpr auto lanes = std::make_index_sequence<W>{};
  for (int i = 0; i < W; i += 4) {
    const V a = pick(rows[i], rows[i + 1], InTurn<1, 0>{}, lanes);
    const V b = pick(rows[i], rows[i + 1], InTurn<1, 1>{}, lanes);
    const V c = pick(rows[i + 2], rows[i + 3], InTurn<1, 0>{}, lanes);
    const V d = pick(rows[i + 2], rows[i + 3], InTurn<1, 1>{}, lanes);
    rows[i] = pick(a, c, InTurn<2, 0>{}, lanes);
    rows[i + 1] = pick(a, c, InTurn<2, 1>{}, lanes);
    rows[i + 2] = pick(b, d, InTurn<2, 0>{}, lanes);
    rows[i + 3] = pick(b, d, InTurn<2, 1>{}, lanes);
  }
  if constexpr (W == 8) {
    for (int k = 0; k < 4; ++k) {
      const V a = rows[k], b = rows[4 + k];
      rows[k] = pick(a, b, EveryOther128<0>{}, lanes);
      rows[4 + k] = pick(a, b, EveryOther128<1>{}, lanes);
    }
  } else if constexpr (W == 16) {
    for (int k = 0; k < 4; ++k) {
      const V a = pick(rows[k], rows[4 + k], EveryOther128<0>{}, lanes);
      const V b = pick(rows[k], rows[4 + k], EveryOther128<1>{}, lanes);
      const V c = pick(rows[8 + k], rows[12 + k], EveryOther128<0>{}, lanes);
      const V d = pick(rows[8 + k], rows[12 + k], EveryOther128<1>{}, lanes);
      rows[k] = pick(a, c, EveryOther128<0>{}, lanes);
      rows[4 + k] = pick(b, d, EveryOther128<0>{}, lanes);
      rows[8 + k] = pick(a, c, EveryOther128<1>{}, lanes);
      rows[12 + k] = pick(b, d, EveryOther128<1>{}, lanes);
    }
  }
}

}  // namespace voxfuse::VOXFUSE_ISA
