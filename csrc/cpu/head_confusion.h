// What the head-confusion kernels work on, free of any tensor library.
#pragma once

#include "cpu/soft_confusion.h"

namespace voxfuse {

struct Head {
  // Target, voxel weight, options and, in the backward, cotangents; the kernels bring the logits.
  Confusion confusion;

  int64_t channels;
  const void* features;
  Element type;  // of features, weight, bias and the features' gradient
  Strides features_stride;
  const void* weight;  // (classes, channels), contiguous
  const void* bias;    // (classes,), contiguous, or null

  int64_t tile;  // voxels whose logits exist at one time; a multiple of kTileVoxels

  // Backward only.
  bool need_head;  // whether the sums for weight and bias are wanted
  void* gradient;  // of the features, or null
  Strides gradient_stride;
};

// Tiles are multiples of this many voxels: whole vectors in every instruction set.
inline constexpr int64_t kTileVoxels = 64;

}  // namespace voxfuse
