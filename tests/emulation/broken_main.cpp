// Kernels with one mistake each: the tests see that the emulation finds it.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/launch.h"

namespace {

using voxfuse::cuda::kAllLanes;

/// Right: every thread adds its neighbour's value.
__global__ void right(int* out) {
  VOXFUSE_SHARED(int, values, [64]);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x] + __shfl_xor_sync(kAllLanes, out[threadIdx.x], 1);
}

template <int kSize>
__global__ void beyond_shared(int* out) {
  VOXFUSE_SHARED(int, values, [kSize]);
  values[threadIdx.x] = 1;
  __syncthreads();
  const int* next = values + 1;
  out[threadIdx.x] = next[threadIdx.x];
}

__global__ void beyond_global(int* out) { out[threadIdx.x + 1] = 0; }

__global__ void barrier_in_a_branch(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void shuffle_in_a_branch(int* out) {
  if (threadIdx.x < 7) out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
}

__global__ void shift_too_far(int* out) { out[threadIdx.x] = 1 << static_cast<int>(threadIdx.x); }

/// The value read depends on which thread runs first: a barrier is missing.
__global__ void missing_barrier(int* out) {
  VOXFUSE_SHARED(int, values, [64]);
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = 7;
  out[threadIdx.x] = values[63 - threadIdx.x];
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> out(64, 1);
  const auto run = [&](void (*kernel)(int*)) {
    voxfuse::cuda::launch(kernel, dim3(1), dim3(64), nullptr, out.data());
  };
  const char* name = argc > 1 ? argv[1] : "";
  if (std::strcmp(name, "right") == 0) run(right);
  if (std::strcmp(name, "beyond_shared") == 0) run(beyond_shared<64>);
  if (std::strcmp(name, "beyond_global") == 0) run(beyond_global);
  if (std::strcmp(name, "barrier_in_a_branch") == 0) run(barrier_in_a_branch);
  if (std::strcmp(name, "shuffle_in_a_branch") == 0) run(shuffle_in_a_branch);
  if (std::strcmp(name, "shift_too_far") == 0) run(shift_too_far);
  if (std::strcmp(name, "missing_barrier") == 0) run(missing_barrier);
  for (int value : out) std::printf("%d ", value);
  std::printf("\n");
  return 0;
}
