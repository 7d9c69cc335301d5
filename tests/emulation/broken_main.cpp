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

/// A shuffle orders no memory: what another lane wrote before it may not be there.
__global__ void shuffle_instead_of_barrier(int* out) {
  VOXFUSE_SHARED(int, values, [64]);
  values[threadIdx.x] = 1;
  const int other = __shfl_xor_sync(kAllLanes, 1, 1);
  out[threadIdx.x] = values[threadIdx.x ^ 1u] + other;
}

/// Right: __syncwarp orders the memory of a warp.
__global__ void warp_barrier(int* out) {
  VOXFUSE_SHARED(int, values, [64]);
  values[threadIdx.x] = 1;
  __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1u];
}

/// The block that counts last adds up what all have written; right only with fences.
template <bool kFenced>
__global__ void last_block(int* out) {
  VOXFUSE_SHARED(bool, last, [1]);
  auto* counter = reinterpret_cast<unsigned*>(out + 63);
  out[blockIdx.x * 4 + threadIdx.x % 4] = 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (kFenced) __threadfence();
    last[0] = atomicAdd(counter, 1u) + 1 == gridDim.x;
    if (kFenced) __threadfence();
    if (last[0]) *counter = 0;
  }
  __syncthreads();
  if (!last[0] || threadIdx.x > 0) return;
  int sum = 0;
  for (unsigned i = 0; i < 4 * gridDim.x; ++i) sum += out[i];
  out[62] = sum;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> out(64, 1);
  const auto run = [&](void (*kernel)(int*), unsigned blocks = 1, unsigned threads = 64) {
    voxfuse::cuda::launch(kernel, dim3(blocks), dim3(threads), nullptr, out.data());
  };
  const char* name = argc > 1 ? argv[1] : "";
  if (std::strcmp(name, "right") == 0) run(right);
  if (std::strcmp(name, "beyond_shared") == 0) run(beyond_shared<64>);
  if (std::strcmp(name, "beyond_global") == 0) run(beyond_global);
  if (std::strcmp(name, "barrier_in_a_branch") == 0) run(barrier_in_a_branch);
  if (std::strcmp(name, "shuffle_in_a_branch") == 0) run(shuffle_in_a_branch);
  if (std::strcmp(name, "shift_too_far") == 0) run(shift_too_far);
  if (std::strcmp(name, "missing_barrier") == 0) run(missing_barrier);
  if (std::strcmp(name, "shuffle_instead_of_barrier") == 0) run(shuffle_instead_of_barrier);
  if (std::strcmp(name, "warp_barrier") == 0) run(warp_barrier);
  if (std::strncmp(name, "last_block", 10) == 0) out[63] = 0;  // the counter
  if (std::strcmp(name, "last_block") == 0) run(last_block<true>, 6, 4);
  if (std::strcmp(name, "last_block_without_fences") == 0) run(last_block<false>, 6, 4);
  for (int value : out) std::printf("%d ", value);
  std::printf("\n");
  return 0;
}
