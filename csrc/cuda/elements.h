// Reading and writing tensors of any element type and stride: vectors of up to 16 bytes where
// alignment allows, single elements elsewhere.
#pragma once

#include <cstring>

#include "cuda/launch.h"
#include "math/layout.h"

namespace voxfuse::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(double x) { return static_cast<float>(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(int8_t x) { return x; }
__device__ inline float to_float(uint8_t x) { return x; }
__device__ inline float to_float(int16_t x) { return x; }
__device__ inline float to_float(uint16_t x) { return x; }
__device__ inline float to_float(int32_t x) { return static_cast<float>(x); }
__device__ inline float to_float(uint32_t x) { return static_cast<float>(x); }
__device__ inline float to_float(int64_t x) { return static_cast<float>(x); }
__device__ inline float to_float(uint64_t x) { return static_cast<float>(x); }

template <class Real>
struct Convert;

template <>
struct Convert<float> {
  template <class T>
  __device__ static float from(T x) {
    return to_float(x);
  }
};

template <>
struct Convert<double> {
  template <class T>
  __device__ static double from(T x) {
    return to_float(x);
  }
  __device__ static double from(double x) { return x; }
  __device__ static double from(int32_t x) { return x; }
  __device__ static double from(uint32_t x) { return x; }
  __device__ static double from(int64_t x) { return static_cast<double>(x); }
  __device__ static double from(uint64_t x) { return static_cast<double>(x); }
};

template <class T>
struct Store;
template <>
struct Store<float> {
  __device__ static float from(float x) { return x; }
};
template <>
struct Store<double> {
  __device__ static double from(double x) { return x; }
};
template <>
struct Store<__half> {
  __device__ static __half from(float x) { return __float2half_rn(x); }
};
template <>
struct Store<__nv_bfloat16> {
  __device__ static __nv_bfloat16 from(float x) { return __float2bfloat16_rn(x); }
};

/// The arithmetic of a logits type.
template <class T>
struct Compute {
  using Real = float;
};
template <>
struct Compute<double> {
  using Real = double;
};

template <int kBytes>
struct Piece;
template <>
struct Piece<1> {
  using type = uint8_t;
};
template <>
struct Piece<2> {
  using type = uint16_t;
};
template <>
struct Piece<4> {
  using type = unsigned;
};
template <>
struct Piece<8> {
  using type = uint2;
};
template <>
struct Piece<16> {
  using type = uint4;
};

/// Bytes of the widest access that divides `bytes`.
constexpr int widest(int bytes) {
  return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : bytes % 2 == 0 ? 2 : 1;
}

/// Reads kCount consecutive elements; `source` is aligned to widest(kCount * sizeof(T)).
template <int kCount, class T>
__device__ inline void load_vector(const T* source, T (&out)[kCount]) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T)), kWide = widest(kBytes);
  using P = typename Piece<kWide>::type;
  P pieces[kBytes / kWide];
#pragma unroll
  for (int i = 0; i < kBytes / kWide; ++i)
    pieces[i] = __ldg(reinterpret_cast<const P*>(source) + i);
  memcpy(out, pieces, kBytes);
}

template <int kCount, class T>
__device__ inline void store_vector(T* destination, const T (&in)[kCount]) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T)), kWide = widest(kBytes);
  using P = typename Piece<kWide>::type;
  P pieces[kBytes / kWide];
  memcpy(pieces, in, kBytes);
#pragma unroll
  for (int i = 0; i < kBytes / kWide; ++i) reinterpret_cast<P*>(destination)[i] = pieces[i];
}

/// The voxels of one thread: first, first + step, ... of a sample with `end` voxels.
struct Span {
  int64_t first;
  int64_t end;
  int step;

  __device__ int64_t voxel(int i) const { return first + i * step; }
  __device__ bool holds(int i) const { return voxel(i) < end; }
};

/// Reads a thread's voxels; those past the end are 0.
template <int kVoxels, class T>
__device__ inline void load_span(const T* base, int64_t stride, bool vector, const Span& span,
                                 T (&out)[kVoxels]) {
  if (vector && span.first + kVoxels <= span.end) {
    load_vector<kVoxels>(base + span.first, out);
  } else {
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) {
      out[i] = span.holds(i) ? base[span.voxel(i) * stride] : T(0.0f);
    }
  }
}

/// Runs f with the unsigned integer as wide as an element: targets and weights are read by their
/// width and told apart afterwards, so that reading exists four times and not once a type.
template <class F>
__device__ inline void with_bits(Element type, const F& f) {
  switch (bytes_of(type)) {
    case 1:
      return f(uint8_t{});
    case 2:
      return f(uint16_t{});
    case 8:
      return f(uint64_t{});
    default:
      return f(uint32_t{});
  }
}

template <class T, class Bits>
__device__ inline T from_bits(Bits bits) {
  static_assert(sizeof(T) == sizeof(Bits));
  T value;
  memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

template <class T, class Bits, class Real, int kCount>
__device__ inline void numbers_as(const Bits (&bits)[kCount], Real (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = Convert<Real>::from(from_bits<T>(bits[i]));
}

/// The numbers that `bits` are as elements of a type of their width.
template <class Bits, class Real, int kCount>
__device__ inline void numbers(Element type, const Bits (&bits)[kCount], Real (&out)[kCount]) {
  if constexpr (sizeof(Bits) == 1) {
    type == Element::i8 ? numbers_as<int8_t>(bits, out) : numbers_as<uint8_t>(bits, out);
  } else if constexpr (sizeof(Bits) == 2) {
    type == Element::f16    ? numbers_as<__half>(bits, out)
    : type == Element::bf16 ? numbers_as<__nv_bfloat16>(bits, out)
    : type == Element::i16  ? numbers_as<int16_t>(bits, out)
                            : numbers_as<uint16_t>(bits, out);
  } else if constexpr (sizeof(Bits) == 4) {
    type == Element::f32   ? numbers_as<float>(bits, out)
    : type == Element::i32 ? numbers_as<int32_t>(bits, out)
                           : numbers_as<uint32_t>(bits, out);
  } else {
    type == Element::f64   ? numbers_as<double>(bits, out)
    : type == Element::i64 ? numbers_as<int64_t>(bits, out)
                           : numbers_as<uint64_t>(bits, out);
  }
}

/// The one of a floating type: exactly, as float or as double.
template <class Bits>
__device__ inline auto floating(Element type, Bits bits) {
  if constexpr (sizeof(Bits) == 8) {
    return from_bits<double>(bits);
  } else if constexpr (sizeof(Bits) == 4) {
    return from_bits<float>(bits);
  } else if constexpr (sizeof(Bits) == 2) {
    return type == Element::f16 ? to_float(from_bits<__half>(bits))
                                : to_float(from_bits<__nv_bfloat16>(bits));
  } else {
    return 0.0f;  // no floating type has one byte
  }
}

}  // namespace voxfuse::cuda
