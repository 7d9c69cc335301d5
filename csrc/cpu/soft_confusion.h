// What the soft-confusion kernels work on, free of any tensor library: raw pointers, element
// strides and options. head_confusion uses the same kernels on a tile of logits that it owns.
#pragma once

#include <cstdint>
#include <limits>

#include "contract/codes.h"
#include "math/layout.h"

namespace voxfuse {

struct Confusion {
  int64_t batch, classes, voxels;

  const void* input;
  Element input_type;
  Strides input_stride;

  const void* target;
  Element target_type;
  Strides target_stride;
  bool dense;  // one value a class instead of a label

  const void* weight;  // null: 1
  Element weight_type;
  Strides weight_stride;

  Activation activation, likelihood;
  Overlap overlap;
  bool has_ignore;
  int64_t ignore_index;
  double gamma;
  // gamma is that of the classes below; the others have 0.
  int64_t focal_classes = std::numeric_limits<int64_t>::max();

  int statistics;  // 4 or 8: in the forward those to compute, in the backward those given

  // Backward only.
  const double* cotangent;  // (batch, classes, statistics), contiguous
  void* gradient;           // of the input's type
  Strides gradient_stride;
  bool stream_gradient = false;  // larger than the caches: they need not hold it
};

// Voxels whose sums are kept in the compute type before they go to float64. Fixed, so that the
// bits of a result depend on the inputs alone.
inline constexpr int64_t kChunkVoxels = 2048;

}  // namespace voxfuse
