// Patch fusion on the GPU, over plain pointers, always with three spatial axes (missing leading
// ones have extent 1). Everything runs asynchronously on `stream`.
#pragma once

#include <cuda_runtime_api.h>

#include "math/layout.h"

namespace voxfuse::cuda {

struct Fusion {
  int64_t patches = 0, channels = 0;
  int axes = 3;                                  // spatial axes of the tables
  int patch[3] = {1, 1, 1};                      // extent of a patch
  int extent[3] = {1, 1, 1};                     // of the volume or ring
  int begin[3] = {0, 0, 0}, end[3] = {1, 1, 1};  // coordinates that are kept, an axis
  int ring_axis = -1;  // coordinate x lies in slot x % extent[ring_axis]; -1: no ring

  const int64_t* origins = nullptr;  // (patches, axes)
  const int64_t* rows = nullptr;     // (patches, axes), used with separable weights

  bool separable = true;
  const double* weights[3] = {};  // (row_count, patch) an axis, or a dense window in [0]
  int64_t row_count[3] = {1, 1, 1};
  const double* total = nullptr;  // sum of the weights, or null: they are used as they are

  // With floor > 0 products below it count as `floor`, and are divided by their sum over all
  // patches. It comes from a table an axis (cover_count, cover_extent) of the weights of all
  // patches over a coordinate, the k-th of them in row k, negative where there are fewer; null: 1.
  double floor = 0;
  const double* cover[3] = {};
  int cover_count[3] = {1, 1, 1}, cover_extent[3] = {1, 1, 1};

  int flip = 0;  // bit a: the patches of a ring's addition are mirrored along axis a

  int activation = 0;  // of the patches: 0 none, 1 sigmoid, 2 softmax over the channels
  void* softmax =
      nullptr;  // workspace of softmax_workspace(*this) numbers of the accumulation type

  Element type = Element::f32;      // of the patches
  const void* source = nullptr;     // patches (N, C, *patch); backward: gradient (C, *extent)
  void* target = nullptr;           // (C, *extent): patches' type, or accumulation type for a ring;
                                    // backward: (N, C, *patch)
  const void* activated = nullptr;  // backward with an activation: the patches (N, C, *patch)
};

/// Numbers that the forward or a ring's addition keeps during the call: with many channels, the
/// greatest value and one over the sum of a softmax, each (N, *patch); else 0.
int64_t softmax_workspace(const Fusion& problem);

/// target = the fused volume.
cudaError_t overlap_add_forward(const Fusion& problem, cudaStream_t stream);
/// target (a ring) += the patches.
cudaError_t overlap_add_ring(const Fusion& problem, cudaStream_t stream);
/// target (float64, one channel, a ring) += the patches' weights.
cudaError_t overlap_add_weights(const Fusion& problem, cudaStream_t stream);
/// target = gradient of the patches.
cudaError_t overlap_add_backward(const Fusion& problem, cudaStream_t stream);

}  // namespace voxfuse::cuda
