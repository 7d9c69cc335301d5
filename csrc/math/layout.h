// Element types and strides as the kernels see them, free of any tensor library.
#pragma once

#include <cstdint>

namespace voxfuse {

enum class Element : int { f32, f16, bf16, f64, boolean, u8, i16, i32, i64, i8, u16, u32 };

// Strides in elements of a (batch, channel, voxel) view.
struct Strides {
  int64_t batch, channel, voxel;
};

}  // namespace voxfuse
