// What the resampling works on, on any device, free of any tensor library.
#pragma once

#include <cstdint>

#include "contract/codes.h"
#include "math/layout.h"

namespace voxfuse {

// Always three axes; missing leading ones have extent 1. Voxel k of an axis is the mean, by the two
// weights, of the source's voxels index[k] and index[k] + 1; with an upper weight of 0 it is the
// first of them, and the second may not exist.
struct Resampling {
  int64_t channels = 0;
  int64_t source[3] = {1, 1, 1}, target[3] = {1, 1, 1};
  int64_t stride[3] = {0, 0, 0}, channel_stride = 0;  // of the input, in elements
  Element type = Element::f32;
  const void* input = nullptr;
  const int64_t* index[3] = {};
  const float* weight[3] = {};  // (2, target): lower, upper; null: the axis stays as it is

  Resampled kept = Resampled::labels;
  float least = 0;                   // mask, regions: a channel is chosen from this value on
  const int64_t* regions = nullptr;  // the label of a channel; later channels overwrite earlier
  bool round_to_half = false;        // values are rounded to float16 before anything is decided

  Element out_type = Element::u8;
  void* out = nullptr;  // (channels or 1, *target), contiguous
};

}  // namespace voxfuse
