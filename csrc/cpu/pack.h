// Short vectors of any length, read from any element type. Included only by kernels.
#pragma once

#include <cstring>
#include <type_traits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/half.h"
#include "cpu/simd.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

template <int n>
using Count = std::integral_constant<int, n>;

template <class E, int n>
struct VectorOf {
  typedef E Type __attribute__((vector_size(n * sizeof(E))));
};

// `n` values of R as one vector, read from any element type.
template <class R, int n>
struct Pack {
  using Values = typename VectorOf<R, n>::Type;
  using Words = typename VectorOf<uint32_t, n>::Type;
  using Halves = typename VectorOf<uint16_t, n>::Type;

  static VOXFUSE_INLINE Values load(const R* p) {
    Values v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static VOXFUSE_INLINE Values load(const BFloat16* p) {
    return reinterpret_cast<Values>(widened(p) << 16);
  }
  static VOXFUSE_INLINE Values load(const Half* p) {
#if defined(__AVX512F__)
    if constexpr (n == 16) {
      __m256i halves;
      std::memcpy(&halves, p, sizeof(halves));
      return reinterpret_cast<Values>(_mm512_maskz_cvtph_ps(0xffff, halves));
    }
#endif
#if defined(__F16C__)
    if constexpr (n == 8) {
      __m128i halves;
      std::memcpy(&halves, p, sizeof(halves));
      return reinterpret_cast<Values>(_mm256_cvtph_ps(halves));
    }
#endif
    // As half_to_float of half.h, on vectors.
    const Words bits = widened(p);
    const Words magnitude = (bits & 0x7fffu) << 13;
    const Values scaled = reinterpret_cast<Values>(magnitude) * 5.192296858534828e33f;  // 2^112
    const Words special = reinterpret_cast<Words>((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return reinterpret_cast<Values>(reinterpret_cast<Words>(scaled) | special |
                                    ((bits & 0x8000u) << 16));
  }
  static VOXFUSE_INLINE void store(R* p, Values v) { std::memcpy(p, &v, sizeof(v)); }

 private:
  template <class T>
  static VOXFUSE_INLINE Words widened(const T* p) {
    Halves halves;
    std::memcpy(&halves, p, sizeof(halves));
    return __builtin_convertvector(halves, Words);
  }
};

}  // namespace
}  // namespace voxfuse::VOXFUSE_ISA
