// What the CUDA operators need from PyTorch, on LibTorch's stable ABI.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops/tensor.h"

namespace voxfuse::cuda {

/// PyTorch's current stream on the tensor's device.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* operation) {
  STD_TORCH_CHECK(error == cudaSuccess, operation, ": ", cudaGetErrorString(error));
}

/// A tensor that kernels can walk, kept alive as long as they are being launched: the tensor
/// itself or, at the price of one copy, a contiguous one.
struct Walkable {
  Tensor tensor;
  Strides strides;

  Walkable(const Tensor& original, bool has_channel) : tensor(original) {
    std::optional<Strides> own = strides_of(tensor, has_channel);
    if (!own) {
      tensor = torch::stable::contiguous(tensor);
      own = strides_of(tensor, has_channel);
    }
    strides = *own;
  }
};

}  // namespace voxfuse::cuda
