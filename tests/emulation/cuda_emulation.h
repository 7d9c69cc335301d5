// Runs CUDA kernels on the host, so that sanitizers can watch them: with one fiber a CUDA thread
// (cuda_emulation.cpp) for AddressSanitizer and UndefinedBehaviorSanitizer, with one thread of the
// operating system each (cuda_emulation_threads.cpp, VOXFUSE_EMULATE_THREADS) for ThreadSanitizer.
//
// With fibers blocks run one after another; the threads of a block take turns and switch only at
// barriers and warp collectives. EMULATION_ORDER=reverse runs the threads of a block from the last
// to the first: results that depend on the order lack a barrier. A barrier that not all threads
// reach aborts. Supported: threadIdx, blockIdx, blockDim, gridDim, VOXFUSE_SHARED
// (csrc/cuda/launch.h),
// __syncthreads, __syncwarp, __shfl_sync, __shfl_xor_sync, __shfl_down_sync, __ballot_sync,
// __any_sync, __all_sync, __popc, __ldg, __ldcg, atomicAdd(unsigned*) and of 64 bits,
// __threadfence.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace voxfuse::emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

/// Runs `body` once for every thread of every block.
cudaError_t run_grid(dim3 grid, dim3 block, const std::function<void()>& body);

void block_barrier();
void warp_barrier(unsigned mask);

/// Publishes `value` to the lanes of `mask` and returns the one that lane `source` published; a
/// source outside the mask gives back `value`.
std::uint64_t exchange(unsigned mask, std::uint64_t value, int source);

/// A shared array: every block gets fresh memory on the heap, where AddressSanitizer sees an access
/// beyond its ends (static arrays of templates are not watched), filled with NaN.
class SharedMemory {
 public:
  void* get(std::size_t bytes);

 private:
  std::unique_ptr<unsigned char[]> data_;
  std::uint64_t block_ = 0;  // that it was made for
};

/// One bit a lane of `mask`.
unsigned ballot(unsigned mask, bool predicate);

int lane();

unsigned atomic_add(unsigned* address, unsigned value);
unsigned long long atomic_add(unsigned long long* address, unsigned long long value);

/// __threadfence().
void fence();

/// What a problem asks of a kernel at run time, as ` name=value` words; the tests see to it that
/// every value is met.
template <class Problem>
std::string features(const Problem& q) {
  std::string words;
  [[maybe_unused]] const auto add = [&](const char* name, auto value) {
    words += std::string(" ") + name + "=" + std::to_string(static_cast<long long>(value));
  };
  if constexpr (requires { q.input_layout; }) {
    add("dense", q.dense);
    add("target", q.target.type);
    add("weight", q.weight.data == nullptr ? -1 : static_cast<int>(q.weight.type));
    add("layout", q.input_layout);
    add("gradient", q.gradient == nullptr ? -1 : static_cast<int>(q.gradient_layout));
    add("sums", q.columns);
    add("focal", q.gamma != 0);
  } else if constexpr (requires { q.ring_axis; }) {
    add("separable", q.separable);
    add("divided", q.total != nullptr);
    add("ring", q.ring_axis);
    add("axes", q.axes);
    add("activation", q.activation);
    add("kept", q.softmax != nullptr);
  } else if constexpr (requires { q.decision; }) {
    add("dense", q.dense);
    add("input", q.input.type);
    add("target", q.target.type);
    add("mask", q.mask.data == nullptr ? -1 : static_cast<int>(q.mask.type));
    add("vector", q.input.vector);
    add("classes", q.classes);
  } else if constexpr (requires { q.turn; }) {
    add("type", q.type);
    add("activation", q.activation);
    add("applied", q.applied);
    add("head", q.weight != nullptr);
    add("total", q.total != nullptr);
    add("clear", q.clear);
  } else if constexpr (requires { q.round_to_half; }) {
    add("type", q.type);
    add("kept", q.kept);
    add("out", q.out_type);
    add("half", q.round_to_half);
  }
  return words;
}

/// Appends a line to the file EMULATION_LOG: where the kernel lies in the program, and features.
void log_launch(const void* kernel, const std::string& features);

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   const Arguments&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> copies(arguments...);
  log_launch(reinterpret_cast<const void*>(kernel), (std::string() + ... + features(arguments)));
  return run_grid(grid, block, [&] { std::apply(kernel, copies); });
}

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace voxfuse::emulation

#ifdef VOXFUSE_EMULATE_THREADS
extern thread_local voxfuse::emulation::Index threadIdx, blockIdx;
#else
extern voxfuse::emulation::Index threadIdx, blockIdx;
#endif
extern dim3 blockDim, gridDim;

inline void __syncthreads() { voxfuse::emulation::block_barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { voxfuse::emulation::warp_barrier(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return voxfuse::emulation::shuffle(mask, value, source & 31);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return voxfuse::emulation::shuffle(mask, value, voxfuse::emulation::lane() ^ lane_mask);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int source = voxfuse::emulation::lane() + static_cast<int>(delta);
  return voxfuse::emulation::shuffle(mask, value, source < 32 ? source : 32);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return voxfuse::emulation::ballot(mask, predicate != 0);
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return voxfuse::emulation::atomic_add(address, value);
}

inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return voxfuse::emulation::atomic_add(address, value);
}

inline void __threadfence() { voxfuse::emulation::fence(); }
