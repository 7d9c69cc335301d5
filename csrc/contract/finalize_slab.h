// What the finalisation works on, on any device, free of any tensor library.
#pragma once

#include <cstdint>

#include "contract/codes.h"
#include "math/layout.h"

namespace voxfuse {

// Around the ring's axis a ring is (channels, outer, depth, inner), contiguous, and the slab is
// (classes or 1, outer, slices, inner), whose (slices, inner) are contiguous. Voxel v of the slab's
// (slices, inner) lies in the ring at (first + v) % (depth * inner).
struct Slab {
  int64_t channels, classes;  // of the ring and after the head; the same without one
  int64_t outer, turn;        // turn = depth * inner
  int64_t first, voxels;      // voxels of one outer index

  bool is_double;
  void* ring;
  const double* total;  // like one channel of the ring: 0 where no patch lies; may be null
  const void* weight;   // head (classes, channels), bias (classes), or null
  const void* bias;

  Element type;  // of `out`; labels of 2 bytes are i16
  void* out;
  int64_t out_channel, out_outer;  // strides in elements

  Activation activation;
  bool applied;  // the patches went through the activation already
  Finish mode;
  double divisor, threshold, fill;
  bool clear;

  int64_t chunk;  // on the CPU, voxels of a task at most; tasks are (outer, chunk of voxels)
};

}  // namespace voxfuse
