// Element types and strides as the kernels see them, free of any tensor library.
#pragma once

#include <cstdint>
#include <limits>

#include "math/host_device.h"

namespace voxfuse {

enum class Element : int { f32, f16, bf16, f64, boolean, u8, i16, i32, i64, i8, u16, u32, u64 };

VOXFUSE_HOST_DEVICE constexpr bool is_floating(Element e) { return e <= Element::f64; }

VOXFUSE_HOST_DEVICE constexpr int64_t bytes_of(Element e) {
  switch (e) {
    case Element::boolean:
    case Element::u8:
    case Element::i8:
      return 1;
    case Element::f16:
    case Element::bf16:
    case Element::i16:
    case Element::u16:
      return 2;
    case Element::f64:
    case Element::i64:
    case Element::u64:
      return 8;
    default:
      return 4;
  }
}

VOXFUSE_HOST_DEVICE constexpr bool is_signed(Element e) {
  return e == Element::i8 || (e >= Element::i16 && e <= Element::i64) || is_floating(e);
}

/// Whether an integer type holds `value`. Of the floating types it is not asked: true.
VOXFUSE_HOST_DEVICE constexpr bool holds(Element e, int64_t value) {
  if (is_floating(e)) return true;
  if (!is_signed(e) && value < 0) return false;
  if (bytes_of(e) == 8) return true;
  const int64_t values = int64_t{1} << (8 * bytes_of(e) - (is_signed(e) ? 1 : 0));
  return value < values && value >= -values;
}

/// How many classes labels of an integer type can name. Kernels read labels without their sign:
/// what is negative lies beyond these.
VOXFUSE_HOST_DEVICE constexpr int64_t classes_held(Element e) {
  if (is_floating(e) || bytes_of(e) == 8) return std::numeric_limits<int64_t>::max();
  return int64_t{1} << (8 * bytes_of(e) - (is_signed(e) ? 1 : 0));
}

// Strides in elements of a (batch, channel, voxel) view.
struct Strides {
  int64_t batch, channel, voxel;
};

}  // namespace voxfuse
