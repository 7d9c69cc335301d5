// soft_confusion on the GPU: how the voxels are divided, the second stage of the sums, and the way
// to the kernels for the type of the logits.
//
// A sample's voxels form chunks of fixed size; a block adds up the chunks of one row of the
// workspace, each in the compute type and their sums in float64; a second kernel adds the rows in
// order. All of it depends on the shape alone, never on the device.
#include <algorithm>
#include <cstdlib>

#include "cuda/launch.h"
#include "cuda/soft_confusion.h"

namespace voxfuse::cuda {
namespace {

constexpr int64_t kWorkspace = (1 << 20) / sizeof(double);
constexpr int64_t kRowsAtLeast = 132, kRowsAtMost = 60 * 132;  // whole waves on 132 multiprocessors
constexpr int64_t kChunk = 2048, kLargestChunk = 8 * kChunk;   // a multiple of every kernel's tile

void plan(SoftConfusion& q) {
  // Larger chunks cost fewer reductions, as long as there are enough for every multiprocessor.
  q.chunk = kChunk;
  while (q.chunk < kLargestChunk && q.batch * q.voxels / (2 * q.chunk) >= 8 * kRowsAtLeast) {
    q.chunk *= 2;
  }
  int64_t most = std::min(kWorkspace / (q.classes * q.statistics), kRowsAtMost);
  most = std::max(most / kRowsAtLeast, int64_t{1}) * kRowsAtLeast;
  most = std::max(most / q.batch, int64_t{1});
#ifdef VOXFUSE_EMULATE_CUDA
  // Tests of rows with several chunks would otherwise need millions of voxels.
  if (const char* rows = std::getenv("EMULATION_ROWS")) most = std::atoi(rows);
#endif
  const int64_t chunks = (q.voxels + q.chunk - 1) / q.chunk;
  q.chunks_per_row = (chunks + most - 1) / most;
  q.rows = (chunks + q.chunks_per_row - 1) / q.chunks_per_row;
}

constexpr int kFinishThreads = 1024;

/// Adds up the rows of one sample. A block makes `width` of its `count` sums; each is the sum of
/// kFinishThreads / width partial sums over interleaved rows, added in order.
__global__ void __launch_bounds__(kFinishThreads)
    finish(const double* rows_of_all, double* sums, int64_t rows, int count, int width) {
  VOXFUSE_SHARED(double, partial, [kFinishThreads]);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.y;
  const int column = static_cast<int>(blockIdx.x) * width + thread % width;
  const int groups = kFinishThreads / width;
  double sum = 0;
  if (column < count) {
    const double* base = rows_of_all + b * rows * count + column;
#pragma unroll 8
    for (int64_t row = thread / width; row < rows; row += groups) sum += base[row * count];
  }
  partial[thread] = sum;
  __syncthreads();
  for (int half = kFinishThreads / 2; half >= width; half /= 2) {
    if (thread < half) partial[thread] += partial[thread + half];
    __syncthreads();
  }
  if (thread < width && column < count) sums[b * count + column] = partial[thread];
}

template <class Launch>
cudaError_t by_type(Element type, const Launch& start) {
  switch (type) {
    case Element::f32:
      return start(float{});
    case Element::f16:
      return start(__half{});
    case Element::bf16:
      return start(__nv_bfloat16{});
    case Element::f64:
      return start(double{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

int64_t workspace_doubles(const SoftConfusion& problem) {
  SoftConfusion q = problem;
  plan(q);
  return q.batch * q.rows * q.classes * q.statistics;
}

cudaError_t soft_confusion_forward(SoftConfusion q, cudaStream_t stream) {
  plan(q);
  const cudaError_t error =
      by_type(q.input.type, [&](auto zero) { return launch_forward<decltype(zero)>(q, stream); });
  if (error != cudaSuccess) return error;
  const int count = static_cast<int>(q.classes) * q.statistics;
  int width = 4;
  while (width < count && width < kWarp) width *= 2;
  // Samples are the slower axis of the grid, which holds 65535.
  for (int64_t first = 0; first < q.batch; first += 65535) {
    const dim3 grid(static_cast<unsigned>((count + width - 1) / width),
                    static_cast<unsigned>(std::min<int64_t>(q.batch - first, 65535)));
    const cudaError_t failed =
        launch(finish, grid, dim3(kFinishThreads), stream,
               static_cast<const double*>(q.workspace) + first * q.rows * count,
               q.sums + first * count, q.rows, count, width);
    if (failed != cudaSuccess) return failed;
  }
  return cudaSuccess;
}

cudaError_t soft_confusion_backward(SoftConfusion q, cudaStream_t stream) {
  return by_type(q.input.type,
                 [&](auto zero) { return launch_backward<decltype(zero)>(q, stream); });
}

}  // namespace voxfuse::cuda
