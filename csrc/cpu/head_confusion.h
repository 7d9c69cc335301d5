// What the head-confusion kernels work on, free of any tensor library.
#pragma once

#include "cpu/soft_confusion.h"

namespace voxfuse {

struct Head {
  // Target, voxel weight, options and, in the backward, cotangents; the kernels bring the logits.
  SoftConfusion confusion;

  int64_t channels = 0;
  View features;                 // their type is that of weight, bias and the features' gradient
  const void* weight = nullptr;  // (classes, channels), contiguous
  const void* bias = nullptr;    // (classes,), contiguous, or null

  int64_t tile = 0;  // voxels whose logits exist at one time; a multiple of kTileVoxels

  // Backward only.
  bool need_head = false;    // whether the sums for weight and bias are wanted
  void* gradient = nullptr;  // of the features, or null
  Strides gradient_stride{0, 0, 0};
};

// Tiles are multiples of this many voxels: whole vectors in every instruction set.
inline constexpr int64_t kTileVoxels = 64;

}  // namespace voxfuse
