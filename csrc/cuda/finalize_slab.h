// Finalisation of a ring's slices on the GPU, over plain pointers. Runs asynchronously on `stream`.
#pragma once

#include <cuda_runtime_api.h>

#include "contract/finalize_slab.h"

namespace voxfuse::cuda {

cudaError_t finalize_slab(const Slab& problem, cudaStream_t stream);

}  // namespace voxfuse::cuda
