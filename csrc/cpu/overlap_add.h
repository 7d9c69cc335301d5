// What the patch fusion kernels work on, free of any tensor library: raw pointers, extents and
// tables, always with three spatial axes (missing leading axes have extent 1).
#pragma once

#include <cstdint>

#include "math/layout.h"

namespace voxfuse {

struct Fusion {
  int64_t patches, channels;
  int64_t patch[3];
  int64_t extent[3];         // of the volume or ring
  int64_t begin[3], end[3];  // coordinates that are kept, an axis
  int ring_axis;             // coordinate x lies in slot x % extent[ring_axis]; -1: no ring

  const int64_t* origins;  // (patches, 3)
  const int64_t* rows;     // (patches, 3)

  // Weights in float64 and rounded to the accumulation type: a table an axis, or one dense window
  // in exact[0] and rounded[0].
  bool separable;
  const void* exact[3];
  const void* rounded[3];
  const double* total;  // sum of the weights, or null: the weights are used as they are

  // With a least weight the products' sum comes from a table an axis, (covers, cover_extent), of
  // the weights of all patches over a coordinate: the k-th of them in row k, negative where there
  // are fewer. Null: no least weight.
  double floor;
  const double* cover[3];
  int64_t covers[3], cover_extent[3];

  Element type;           // of patches
  const void* source;     // forward: patches (N, C, *patch); backward: gradient (C, *extent)
  void* target;           // forward: (C, *extent); backward: (N, C, *patch)
  int flip;               // bit a: patches are mirrored along axis a, and turned back when read
  int activation;         // of the patches: 0 none, 1 sigmoid, 2 softmax over the channels
  const void* activated;  // backward with an activation: the patches (N, C, *patch)
  bool accumulate;        // forward: add to what `target` holds, which is of the accumulation type

  // Forward: patches over slice z (from begin[0] on), ascending: those in
  // [first_of_slice[z], first_of_slice[z + 1]) of `over_slice`.
  const int64_t* first_of_slice;
  const int32_t* over_slice;

  // Forward: one task is a block of channels x one slice x rows x columns of the box [low, high).
  int64_t low[3], high[3];
  int64_t task_channels, task_rows, task_columns;
};

inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

}  // namespace voxfuse
