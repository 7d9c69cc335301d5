// hard_confusion on the GPU, over plain pointers. Runs asynchronously on `stream`.
#pragma once

#include <cuda_runtime_api.h>

#include "contract/hard_confusion.h"

namespace voxfuse::cuda {

/// Adds the counts to `counts` (batch, classes, 4), which the caller has cleared.
cudaError_t hard_confusion(const HardConfusion& problem, int64_t* counts, cudaStream_t stream);

}  // namespace voxfuse::cuda
