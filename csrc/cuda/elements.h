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
__device__ inline float to_float(uint8_t x) { return x; }
__device__ inline float to_float(int16_t x) { return x; }
__device__ inline float to_float(int32_t x) { return static_cast<float>(x); }
__device__ inline float to_float(int64_t x) { return static_cast<float>(x); }

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
  __device__ static double from(int64_t x) { return static_cast<double>(x); }
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

inline int element_size(Element type) {
  switch (type) {
    case Element::f64:
    case Element::i64:
      return 8;
    case Element::f32:
    case Element::i32:
      return 4;
    case Element::f16:
    case Element::bf16:
    case Element::i16:
      return 2;
    default:
      return 1;
  }
}

}  // namespace voxfuse::cuda
