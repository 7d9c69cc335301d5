// The epilogue of the overlap losses on the GPU, over plain pointers. Everything runs
// asynchronously on `stream`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "math/ratio_loss.h"

namespace voxfuse::cuda {

struct RatioLoss {
  RatioOptions options{};
  int64_t samples = 0, classes = 0;
  const double* stats = nullptr;         // (samples, classes, options.sums)
  const double* class_weight = nullptr;  // (classes - first_class,) or null
  const double* nll_weight = nullptr;    // (classes,) or null
  const double* off_weight = nullptr;    // (classes,) or null
  bool double_loss = false;
  void* loss = nullptr;          // float, or double with double_loss
  double* cotangents = nullptr;  // as stats
};

struct RatioLossBackward {
  int64_t samples = 0, classes = 0, sums = 0;
  bool double_grad = false;
  const void* grad_loss = nullptr;
  int64_t sample_stride = 0, class_stride = 0;  // of grad_loss, from first_class on; 0: broadcast
  int64_t first_class = 0;                      // classes below get 0
  const double* cotangents = nullptr;
  double* result = nullptr;
};

cudaError_t ratio_loss(const RatioLoss& problem, cudaStream_t stream);
cudaError_t ratio_loss_backward(const RatioLossBackward& problem, cudaStream_t stream);

}  // namespace voxfuse::cuda
