// The epilogue of the overlap losses on the GPU, over plain pointers. Everything runs
// asynchronously on `stream`.
#pragma once

#include <cuda_runtime_api.h>

#include "contract/ratio_loss.h"

namespace voxfuse::cuda {

cudaError_t ratio_loss(const RatioLoss& problem, cudaStream_t stream);
cudaError_t ratio_loss_backward(const RatioLossBackward& problem, cudaStream_t stream);

}  // namespace voxfuse::cuda
