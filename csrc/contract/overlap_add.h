// What the patch fusion works on, on any device: raw pointers, extents and tables, free of any
// tensor library, always with three spatial axes (missing leading ones have extent 1).
#pragma once

#include <cstdint>

#include "contract/codes.h"
#include "math/layout.h"

namespace voxfuse {

// Size holds a coordinate: 64 bits on the CPU, 32 on a GPU, where registers are scarce.
template <class Size>
struct FusionProblem {
  int64_t patches = 0, channels = 0;
  int axes = 3;                                   // spatial axes of the tables
  Size patch[3] = {1, 1, 1};                      // extent of a patch
  Size extent[3] = {1, 1, 1};                     // of the volume or ring
  Size begin[3] = {0, 0, 0}, end[3] = {1, 1, 1};  // coordinates that are kept, an axis
  int ring_axis = -1;  // coordinate x lies in slot x % extent[ring_axis]; -1: no ring

  const int64_t* origins = nullptr;  // (patches, axes)
  const int64_t* rows = nullptr;     // (patches, axes), used with separable weights

  bool separable = true;
  const double* weights[3] = {};  // (row_count, patch) an axis, or a dense window in [0]; null: 1
  int64_t row_count[3] = {1, 1, 1};
  const double* total = nullptr;  // sum of the weights, or null: they are used as they are

  // With floor > 0 products below it count as `floor`, and are divided by their sum over all
  // patches. It comes from a table an axis (cover_count, cover_extent) of the weights of all
  // patches over a coordinate, the k-th of them in row k, negative where there are fewer; null: 1.
  double floor = 0;
  const double* cover[3] = {};
  Size cover_count[3] = {1, 1, 1}, cover_extent[3] = {1, 1, 1};

  int flip = 0;  // bit a: patches are mirrored along axis a, and turned back when read
  Activation activation = Activation::none;  // of the patches, softmax over the channels

  Element type = Element::f32;      // of the patches
  const void* source = nullptr;     // patches (N, C, *patch); backward: gradient (C, *extent)
  void* target = nullptr;           // (C, *extent): patches' type, or accumulation type for a ring;
                                    // backward: (N, C, *patch)
  const void* activated = nullptr;  // backward with an activation: the patches (N, C, *patch)
};

}  // namespace voxfuse
