// resample_argmax on the GPU, over plain pointers. Runs asynchronously on `stream`.
#pragma once

#include <cuda_runtime_api.h>

#include "contract/resample_argmax.h"

namespace voxfuse::cuda {

/// Tables, input and result are on the device; `problem.regions` is on the host.
cudaError_t resample_argmax(const Resampling& problem, cudaStream_t stream);

}  // namespace voxfuse::cuda
