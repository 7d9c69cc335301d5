// Patch fusion on the GPU, over plain pointers. Everything runs asynchronously on `stream`.
#pragma once

#include <cuda_runtime_api.h>

#include "contract/overlap_add.h"

namespace voxfuse::cuda {

struct Fusion : FusionProblem<int> {
  void* softmax = nullptr;  // softmax_workspace(*this) numbers of the accumulation type
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
