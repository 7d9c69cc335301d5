// The one place where the CUDA compiler and the host emulation of it (tests/emulation) differ.
//
// Kernels include this header instead of CUDA's own, and start through launch(): with
// VOXFUSE_EMULATE_CUDA defined the same source is plain host C++ that the sanitizers can watch.
#pragma once

#ifdef VOXFUSE_EMULATE_CUDA
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

/// Shared memory, `VOXFUSE_SHARED(float, sums, [8][32]);`: the emulation gives every block its own,
/// filled with NaN and watched at both ends.
#ifdef VOXFUSE_EMULATE_CUDA
#define VOXFUSE_SHARED(type, name, dimensions)         \
  using name##_shared = type dimensions;               \
  static voxfuse::emulation::SharedMemory name##_slot; \
  name##_shared& name = *reinterpret_cast<name##_shared*>(name##_slot.get(sizeof(name##_shared)))
#else
#define VOXFUSE_SHARED(type, name, dimensions) __shared__ type name dimensions
#endif

namespace voxfuse::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

/// Starts `kernel` and returns the launch's own error; the kernel runs asynchronously.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                   const Arguments&... arguments) {
#ifdef VOXFUSE_EMULATE_CUDA
  (void)stream;
  return emulation::launch(kernel, grid, block, arguments...);
#else
  // clang-format off
  kernel<<<grid, block, 0, stream>>>(arguments...);
  // clang-format on
  return cudaGetLastError();
#endif
}

/// `value`, unknown to the optimiser: what is computed from it inside a loop stays inside, instead
/// of occupying registers all along (one stride times many classes).
__device__ inline int64_t opaque(int64_t value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(value));
#endif
  return value;
}

/// Sum over the warp in every lane, always in the same order.
template <class Real>
__device__ inline Real warp_sum(Real value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

}  // namespace voxfuse::cuda
