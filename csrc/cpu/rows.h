// Rows of elements of any type in and out of the compute type, and channels-last voxels in and out
// of rows. Included only by *_kernel.cpp, like simd.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/half.h"
#include "cpu/simd.h"
#include "math/layout.h"

namespace voxfuse::VOXFUSE_ISA {

// A row of weights, logits or dense values in the compute type.
template <class R, class T>
void convert_row(const T* source, int64_t stride, int64_t n, R* out) {
  if (stride == 1) {
    if constexpr (std::is_same_v<T, Half> && std::is_same_v<R, float>) {
      half_row_to_float(source, n, out);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<R>(to_real<R>(source[i]));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<R>(to_real<R>(source[i * stride]));
  }
}

// A row of the compute type written as T.
template <class R, class T>
void write_row(const R* source, int64_t n, T* out, int64_t stride) {
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) out[i * stride] = from_real<T>(source[i]);
  } else if constexpr (std::is_same_v<T, Half> && std::is_same_v<R, float>) {
    float_row_to_half(source, n, out);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = from_real<T>(source[i]);
  }
}

// The elements of two vectors at even or at odd places, and the other way round: the elements of
// two vectors in turn, those of the lower or of the upper halves.
template <int Odd, std::size_t... L>
VOXFUSE_INLINE Vec<float> every_other(Vec<float> a, Vec<float> b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, (2 * L + Odd)...);
}
template <int Upper, std::size_t... L>
VOXFUSE_INLINE Vec<float> in_turn(Vec<float> a, Vec<float> b, std::index_sequence<L...>) {
  constexpr int W = sizeof...(L);
  return __builtin_shufflevector(a, b, ((L % 2) * W + Upper * W / 2 + L / 2)...);
}

// Whether the classes of a vector of voxels change places with its voxels in registers: two and
// four by taking every other element, once or twice; whole vectors of classes by transposition.
constexpr bool exchanges_in_registers(int64_t classes) {
  return classes == 2 || classes == 4 ||
         (classes > 0 && classes <= 16 && classes % Lanes<float>::width == 0);
}

// Vectors in the order of memory, voxel by voxel, to a vector a class; and back.
template <int C>
VOXFUSE_INLINE void split_vectors(Vec<float>* x) {
  static_assert(exchanges_in_registers(C));
  using V = Vec<float>;
  constexpr int W = Lanes<float>::width;
  constexpr auto lanes = std::make_index_sequence<W>{};
  if constexpr (C == 2) {
    const V a = x[0], b = x[1];
    x[0] = every_other<0>(a, b, lanes);
    x[1] = every_other<1>(a, b, lanes);
  } else if constexpr (C == 4) {
    const V even[2] = {every_other<0>(x[0], x[1], lanes), every_other<0>(x[2], x[3], lanes)};
    const V odd[2] = {every_other<1>(x[0], x[1], lanes), every_other<1>(x[2], x[3], lanes)};
    x[0] = every_other<0>(even[0], even[1], lanes);
    x[2] = every_other<1>(even[0], even[1], lanes);
    x[1] = every_other<0>(odd[0], odd[1], lanes);
    x[3] = every_other<1>(odd[0], odd[1], lanes);
  } else {
    V y[C];
    for (int group = 0; group < C / W; ++group) {
      for (int j = 0; j < W; ++j) y[group * W + j] = x[j * (C / W) + group];
      transpose(y + group * W);
    }
    for (int c = 0; c < C; ++c) x[c] = y[c];
  }
}
template <int C>
VOXFUSE_INLINE void merge_vectors(Vec<float>* x) {
  static_assert(exchanges_in_registers(C));
  using V = Vec<float>;
  constexpr int W = Lanes<float>::width;
  constexpr auto lanes = std::make_index_sequence<W>{};
  if constexpr (C == 2) {
    const V a = x[0], b = x[1];
    x[0] = in_turn<0>(a, b, lanes);
    x[1] = in_turn<1>(a, b, lanes);
  } else if constexpr (C == 4) {
    const V even[2] = {in_turn<0>(x[0], x[2], lanes), in_turn<1>(x[0], x[2], lanes)};
    const V odd[2] = {in_turn<0>(x[1], x[3], lanes), in_turn<1>(x[1], x[3], lanes)};
    for (int k = 0; k < 2; ++k) {
      x[2 * k] = in_turn<0>(even[k], odd[k], lanes);
      x[2 * k + 1] = in_turn<1>(even[k], odd[k], lanes);
    }
  } else {
    V y[C];
    for (int group = 0; group < C / W; ++group) {
      transpose(x + group * W);
      for (int j = 0; j < W; ++j) y[j * (C / W) + group] = x[group * W + j];
    }
    for (int c = 0; c < C; ++c) x[c] = y[c];
  }
}

// (n, C) interleaved to rows of a tile (C, room), for a C known to the compiler.
template <int C, class R>
void split_channels(const R* source, int64_t n, R* tile, int64_t room) {
  int64_t i = 0;
  if constexpr (std::is_same_v<R, float> && exchanges_in_registers(C)) {
    constexpr int W = Lanes<float>::width;
    for (; i + W <= n; i += W) {
      Vec<float> x[C];
      for (int k = 0; k < C; ++k) x[k] = load(source + i * C + k * W);
      split_vectors<C>(x);
      for (int c = 0; c < C; ++c) store(tile + c * room + i, x[c]);
    }
  }
  for (; i < n; ++i) {
    for (int c = 0; c < C; ++c) tile[c * room + i] = source[i * C + c];
  }
}
template <int C, class R>
void merge_channels(const R* tile, int64_t room, int64_t n, R* out) {
  int64_t i = 0;
  if constexpr (std::is_same_v<R, float> && exchanges_in_registers(C)) {
    constexpr int W = Lanes<float>::width;
    for (; i + W <= n; i += W) {
      Vec<float> x[C];
      for (int c = 0; c < C; ++c) x[c] = load(tile + c * room + i);
      merge_vectors<C>(x);
      for (int k = 0; k < C; ++k) store(out + i * C + k * W, x[k]);
    }
  }
  for (; i < n; ++i) {
    for (int c = 0; c < C; ++c) out[i * C + c] = tile[c * room + i];
  }
}

// (n, classes) interleaved to a tile (classes, room); `source` may be read up to a vector beyond.
template <class R>
void split_channels(const R* source, int64_t n, int64_t classes, R* tile, int64_t room) {
  if (classes == 1) return split_channels<1>(source, n, tile, room);
  if (classes == 2) return split_channels<2>(source, n, tile, room);
  if (classes == 3) return split_channels<3>(source, n, tile, room);
  if (classes == 4) return split_channels<4>(source, n, tile, room);
  int64_t i = 0;
  if constexpr (std::is_same_v<R, float>) {
    constexpr int W = Lanes<float>::width;
    for (; i + W <= n; i += W) {
      for (int64_t c = 0; c < classes; c += W) {
        Vec<float> rows[W];
        for (int j = 0; j < W; ++j) rows[j] = load(source + (i + j) * classes + c);
        transpose(rows);
        const int64_t stop = std::min<int64_t>(W, classes - c);
        for (int64_t k = 0; k < stop; ++k) store(tile + (c + k) * room + i, rows[k]);
      }
    }
  }
  for (; i < n; ++i) {
    for (int64_t c = 0; c < classes; ++c) tile[c * room + i] = source[i * classes + c];
  }
}

// Whether merge_channels writes nothing beyond its last voxel.
template <class R>
bool merges_exactly(int64_t classes) {
  return !std::is_same_v<R, float> || classes <= 4 || classes % Lanes<R>::width == 0;
}

// The other way round; `out` may be written up to a vector beyond.
template <class R>
void merge_channels(const R* tile, int64_t room, int64_t n, int64_t classes, R* out) {
  if (classes == 1) return merge_channels<1>(tile, room, n, out);
  if (classes == 2) return merge_channels<2>(tile, room, n, out);
  if (classes == 3) return merge_channels<3>(tile, room, n, out);
  if (classes == 4) return merge_channels<4>(tile, room, n, out);
  int64_t i = 0;
  if constexpr (std::is_same_v<R, float>) {
    constexpr int W = Lanes<float>::width;
    for (; i + W <= n; i += W) {
      // The last, partial group of channels first: what it writes beyond a voxel is overwritten.
      for (int64_t c = (classes - 1) / W * W; c >= 0; c -= W) {
        Vec<float> rows[W];
        const int64_t stop = std::min<int64_t>(W, classes - c);
        for (int64_t k = 0; k < W; ++k) {
          rows[k] = k < stop ? load(tile + (c + k) * room + i) : Vec<float>{};
        }
        transpose(rows);
        for (int j = 0; j < W; ++j) store(out + (i + j) * classes + c, rows[j]);
      }
    }
  }
  for (; i < n; ++i) {
    for (int64_t c = 0; c < classes; ++c) out[i * classes + c] = tile[c * room + i];
  }
}

template <class F>
decltype(auto) with_float(Element type, F&& f) {
  switch (type) {
    case Element::f16:
      return f(Half{});
    case Element::bf16:
      return f(BFloat16{});
    case Element::f64:
      return f(double{});
    default:
      return f(float{});
  }
}

// With the type that labels are read as: integers of a width with and without a sign as one, see
// classes_held. Of 4 and 8 bytes these are signed, so that what cannot be a class is negative.
template <class F>
decltype(auto) with_label(Element type, F&& f) {
  if (is_floating(type)) return with_float(type, f);
  switch (bytes_of(type)) {
    case 1:
      return f(uint8_t{});
    case 2:
      return f(uint16_t{});
    case 4:
      return f(int32_t{});
    default:
      return f(int64_t{});
  }
}

// With the type itself, for values.
template <class F>
decltype(auto) with_element(Element type, F&& f) {
  switch (type) {
    case Element::i8:
      return f(int8_t{});
    case Element::i16:
      return f(int16_t{});
    case Element::u32:
      return f(uint32_t{});
    case Element::u64:
      return f(uint64_t{});
    default:
      return with_label(type, f);
  }
}

template <class T>
const T* element(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

// What with_label reads where the label is `value`, which the label's own type holds.
template <class T>
VOXFUSE_INLINE int64_t as_read(int64_t value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<int64_t>(static_cast<T>(value));
  } else {
    return value;
  }
}

// The label as an integer, or INT64_MIN if it is none (a fraction, NaN) or beyond 64 bits.
template <class T>
VOXFUSE_INLINE int64_t integer_label(T value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<int64_t>(value);
  } else {
    const double x = static_cast<double>(to_real<double>(value));
    const int64_t label =
        x > -9.2e18 && x < 9.2e18 ? static_cast<int64_t>(x) : std::numeric_limits<int64_t>::min();
    return static_cast<double>(label) == x ? label : std::numeric_limits<int64_t>::min();
  }
}

}  // namespace voxfuse::VOXFUSE_ISA
