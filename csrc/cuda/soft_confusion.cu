// soft_confusion on the GPU: how the voxels are divided, the second stage of the sums, and the way
// to the kernels for the type of the logits.
//
// A sample's voxels form chunks of fixed size; a block adds up the chunks of one row of the
// workspace, each in the compute type and their sums in float64; the last block of a group of rows
// adds those up, and the last of these blocks the groups, each in a fixed order. Where there are no
// counters to tell the last one by, a second kernel adds up the rows. All of it depends on the
// shape and on that alone, never on the device.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <mutex>

#include "cuda/soft_confusion_tile.cuh"

namespace voxfuse::cuda {
namespace {

constexpr int64_t kWorkspace = (1 << 20) / sizeof(double);
constexpr int64_t kRowsAtLeast = 132, kRowsAtMost = 60 * 132;  // whole waves on 132 multiprocessors
constexpr int64_t kChunk = 2048, kLargestChunk = 8 * kChunk;   // a multiple of every kernel's tile

// Counters of one stream, and of all streams and graphs of a device.
constexpr int64_t kCountersOfStream = 512, kCounters = 64 * kCountersOfStream;

/// One for every group of rows of every sample and one for every sample.
int64_t counters_needed(const Launched& q) {
  return q.batch * ((q.rows + q.group - 1) / q.group + 1);
}

__device__ unsigned all_counters[kCounters];  // all 0 between launches

/// Counters that no launch uses beside one on `stream`, or null if there are none. A stream has its
/// own, for its launches follow each other; a launch that is being captured gets some for good,
/// because graphs run beside the stream and beside each other.
unsigned* find_counters(cudaStream_t stream, int64_t count) {
#ifdef VOXFUSE_EMULATE_CUDA
  (void)stream;
  (void)count;
  return std::getenv("EMULATION_NO_COUNTERS") == nullptr ? all_counters : nullptr;
#else
  struct Device {
    unsigned* counters = nullptr;
    int64_t taken = 0;
    std::map<unsigned long long, int64_t> of_stream;  // by an id that is never given again
  };
  static std::mutex mutex;
  static std::map<int, Device> devices;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  int index = 0;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess ||
      status == cudaStreamCaptureStatusInvalidated || cudaGetDevice(&index) != cudaSuccess) {
    return nullptr;
  }
  const bool capturing = status == cudaStreamCaptureStatusActive;
  const std::lock_guard<std::mutex> guard(mutex);
  Device& device = devices[index];
  if (device.counters == nullptr) {
    void* address = nullptr;
    if (capturing || cudaGetSymbolAddress(&address, all_counters) != cudaSuccess) return nullptr;
    device.counters = static_cast<unsigned*>(address);
  }
  unsigned long long id = 0;
  if (!capturing) {
    if (cudaStreamGetId(stream, &id) != cudaSuccess) return nullptr;
    if (const auto own = device.of_stream.find(id); own != device.of_stream.end()) {
      return device.counters + own->second;
    }
  }
  const int64_t size = capturing ? count : kCountersOfStream;
  if (device.taken + size > kCounters) return nullptr;
  const int64_t first = device.taken;
  device.taken += size;
  if (!capturing) device.of_stream[id] = first;
  return device.counters + first;
#endif
}

unsigned* counters_for(cudaStream_t stream, int64_t count) {
  unsigned* found = count > kCountersOfStream ? nullptr : find_counters(stream, count);
#ifndef VOXFUSE_EMULATE_CUDA
  if (found == nullptr) cudaGetLastError();  // not to be taken for a launch's
#endif
  return found;
}

void plan(Launched& q) {
  // Larger chunks cost fewer reductions, as long as there are enough for every multiprocessor.
  q.chunk = kChunk;
  while (q.chunk < kLargestChunk && q.batch * q.voxels / (2 * q.chunk) >= 8 * kRowsAtLeast) {
    q.chunk *= 2;
  }
  int64_t most = std::min(kWorkspace / (q.classes * q.columns), kRowsAtMost);
  most = std::max(most / kRowsAtLeast, int64_t{1}) * kRowsAtLeast;
  most = std::max(most / q.batch, int64_t{1});
#ifdef VOXFUSE_EMULATE_CUDA
  // Tests of rows with several chunks would otherwise need millions of voxels.
  if (const char* rows = std::getenv("EMULATION_ROWS")) most = std::atoi(rows);
  if (const char* chunk = std::getenv("EMULATION_CHUNK")) q.chunk = std::atoi(chunk);
#endif
  const int64_t chunks = (q.voxels + q.chunk - 1) / q.chunk;
  q.chunks_per_row = (chunks + most - 1) / most;
  q.rows = (chunks + q.chunks_per_row - 1) / q.chunks_per_row;
}

/// Rows of a group: so that groups and the rows of one are about as many, and counters enough.
void plan_groups(Launched& q) {
  q.group = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(q.rows))));
  if (q.rows <= 32) q.group = q.rows;
  while (q.group < q.rows && counters_needed(q) > kCountersOfStream) q.group *= 2;
  q.group = std::min(q.group, q.rows);
}

constexpr int kMostThreads = 512;  // of a forward kernel

/// What the last blocks of the forward kernels do, in the same order and so with the same bits:
/// every block adds up one group of rows of one sample or, with `groups`, the groups.
__global__ void __launch_bounds__(kMostThreads)
    finish(const __grid_constant__ Launched q, bool groups) {
  VOXFUSE_SHARED(double, partial, [kMostThreads]);
  const int count = static_cast<int>(q.classes) * q.columns;
  double* base = q.workspace + blockIdx.y * q.rows * count;
  double* sums = q.sums + int64_t{blockIdx.y} * count;
  if (groups) {
    add_rows<8>(base, (q.rows + q.group - 1) / q.group, q.group, count, sums, partial);
    return;
  }
  const int64_t first = blockIdx.x * q.group;
  const int64_t rows = q.rows - first < q.group ? q.rows - first : q.group;
  double* own = base + first * count;
  add_rows<8>(own, rows, 1, count, q.group == q.rows ? sums : own, partial);
}

cudaError_t finish_rows_of_all(Launched q, cudaStream_t stream) {
  const unsigned groups = static_cast<unsigned>((q.rows + q.group - 1) / q.group);
  const int64_t count = q.classes * q.columns;
  const dim3 block(static_cast<unsigned>(q.threads));
  while (q.batch > 0) {  // samples are the slower axis of the grid, which holds 65535
    const unsigned samples = static_cast<unsigned>(std::min<int64_t>(q.batch, 65535));
    cudaError_t error = launch(finish, dim3(groups, samples), block, stream, q, false);
    if (error == cudaSuccess && groups > 1) {
      error = launch(finish, dim3(1, samples), block, stream, q, true);
    }
    if (error != cudaSuccess) return error;
    q.batch -= samples;
    q.workspace += samples * q.rows * count;
    q.sums += samples * count;
  }
  return cudaSuccess;
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
  Launched q{problem};
  plan(q);
  return q.batch * q.rows * q.classes * q.columns;
}

cudaError_t soft_confusion_forward(const SoftConfusion& problem, double* sums, double* workspace,
                                   cudaStream_t stream) {
  Launched q{problem};
  q.sums = sums;
  q.workspace = workspace;
  plan(q);
  plan_groups(q);
  q.counters = counters_for(stream, counters_needed(q));
  const cudaError_t error =
      by_type(q.input.type, [&](auto zero) { return launch_forward<decltype(zero)>(q, stream); });
  if (error != cudaSuccess || q.counters != nullptr) return error;
  return finish_rows_of_all(q, stream);
}

cudaError_t soft_confusion_backward(const SoftConfusion& problem, cudaStream_t stream) {
  Launched q{problem};
  return by_type(q.input.type,
                 [&](auto zero) { return launch_backward<decltype(zero)>(q, stream); });
}

}  // namespace voxfuse::cuda
