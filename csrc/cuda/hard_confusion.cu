// Right and wrong voxels counted on the GPU. A thread reads a few voxels, of every class one run,
// and keeps the greatest class; a block counts in shared memory, and adds what it has counted to
// the result at its end. Whole numbers: in which order they are added does not matter.
#include <algorithm>

#include "cuda/hard_confusion.h"
#include "cuda/labels.cuh"

namespace voxfuse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 1024;        // classes that are counted at one time
constexpr int kFewClasses = 8;     // up to so many, a warp adds up each class before it counts
constexpr int64_t kBlocks = 1024;  // of all samples: what a large GPU holds at one time

/// Voxels of a thread in a turn.
template <class T>
constexpr int kRun = 16 / sizeof(T);

struct HardLaunched : HardConfusion {
  int64_t blocks = 0;                             // of a sample
  int64_t target_classes = 0, input_classes = 0;  // that labels of their types can name
  unsigned long long* counts = nullptr;
};

enum Counted { kBoth, kPredicted, kTruth, kAll, kCounted };
using Tallies = unsigned[kCounted][kTile];

template <class T, int kVoxels>
__device__ inline void load_run(const View& view, int64_t b, int64_t c, const Span& span,
                                T (&out)[kVoxels]) {
  const T* base =
      static_cast<const T*>(view.data) + b * view.stride.batch + c * opaque(view.stride.channel);
  load_span<kVoxels>(base, view.stride.voxel, view.vector && span.step == 1, span, out);
}

/// Which of a thread's voxels count, as far as the mask and the end of the volume say.
template <int kVoxels>
__device__ inline void load_mask(const View& mask, int64_t b, const Span& span,
                                 bool (&kept)[kVoxels]) {
#pragma unroll
  for (int i = 0; i < kVoxels; ++i) kept[i] = span.holds(i);
  if (mask.data == nullptr) return;
  with_bits(mask.type, [&](auto zero) {
    decltype(zero) raw[kVoxels];
    load_bits(mask, b, 0, span, raw);
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) {
      const bool set = is_floating(mask.type) ? floating(mask.type, raw[i]) != 0 : raw[i] != 0;
      kept[i] = kept[i] && set;
    }
  });
}

/// The greatest class of every voxel: ties to the lowest, the first NaN before everything.
template <class T, int kVoxels>
__device__ inline void choose(const HardConfusion& q, int64_t b, const Span& span,
                              int (&where)[kVoxels]) {
  using Real = typename Compute<T>::Real;
  const int classes = static_cast<int>(q.classes);
  Real best[kVoxels];
#pragma unroll
  for (int i = 0; i < kVoxels; ++i) where[i] = 0;
#pragma unroll 4
  for (int c = 0; c < classes; ++c) {
    T raw[kVoxels];
    load_run(q.input, b, c, span, raw);
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) {
      const Real z = Convert<Real>::from(raw[i]);
      const bool better = c == 0 || z > best[i] || (z != z && best[i] == best[i]);
      best[i] = better ? z : best[i];
      where[i] = better ? c : where[i];
    }
  }
}

/// One class of a warp's voxels.
template <class T, Decision kDecision, int kVoxels>
__device__ inline void count_class(const HardConfusion& q, int64_t b, int c, const Span& span,
                                   const bool (&kept)[kVoxels], const int (&truth)[kVoxels],
                                   const int (&predicted)[kVoxels], Tallies& tallies, int place) {
  bool above[kVoxels];
  if constexpr (kDecision == Decision::threshold) {
    T raw[kVoxels];
    load_run(q.input, b, c, span, raw);
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) above[i] = to_float(raw[i]) >= q.least;
  } else {
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) above[i] = predicted[i] == c;
  }
  int own[kVoxels];
  if (q.dense) {
    load_classes(q.target, b, c, {2, q.has_ignore, q.ignore_index}, span, own);
  }
  // Four sums of 16 bits at a time.
  unsigned long long sums = 0;
#pragma unroll
  for (int i = 0; i < kVoxels; ++i) {
    const bool counted = q.dense ? kept[i] && own[i] >= 0 : truth[i] >= 0;
    const bool g = counted && (q.dense ? own[i] == 1 : truth[i] == c), p = counted && above[i];
    sums += static_cast<unsigned long long>(p && g) << (16 * kBoth) |
            static_cast<unsigned long long>(p) << (16 * kPredicted) |
            static_cast<unsigned long long>(g) << (16 * kTruth) |
            static_cast<unsigned long long>(counted) << (16 * kAll);
  }
  sums = warp_sum(sums);
  if (threadIdx.x % kWarp != 0 || sums == 0) return;
#pragma unroll
  for (int k = 0; k < kCounted; ++k) {
    const unsigned own_sum = static_cast<unsigned>(sums >> (16 * k)) & 0xffffu;
    if (own_sum != 0) atomicAdd(&tallies[k][place], own_sum);
  }
}

/// Adds the tallies of classes [base, base + kTile) to the result, and clears them. What a voxel
/// with labels counts for every class comes at the end.
__device__ inline void flush(const HardLaunched& q, int64_t b, int64_t base, Tallies& tallies) {
  for (int64_t i = threadIdx.x; i < kTile && base + i < q.classes; i += kThreads) {
    const unsigned long long both = tallies[kBoth][i], predicted = tallies[kPredicted][i];
    const unsigned long long truth = tallies[kTruth][i];
    const unsigned long long all = q.dense ? tallies[kAll][i] : 0;
    // True negatives may be less than 0 on the way: sums modulo 2^64 are right in the end.
    const unsigned long long sums[] = {both, predicted - both, truth - both,
                                       all - predicted - truth + both};
    unsigned long long* row = q.counts + (b * q.classes + base + i) * 4;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (sums[k] != 0) atomicAdd(row + k, sums[k]);
    }
#pragma unroll
    for (int k = 0; k < kCounted; ++k) tallies[k][i] = 0;
  }
}

// Two blocks at a time allow a thread 128 registers. Left alone, the compiler takes fewer on sm_80
// and spills.
template <class T, Decision kDecision>
__global__ void __launch_bounds__(kThreads, 2) count(const __grid_constant__ HardLaunched q) {
  constexpr int kVoxels = kRun<T>;
  VOXFUSE_SHARED(unsigned, tallies, [kCounted][kTile]);
  VOXFUSE_SHARED(unsigned long long, total, [1]);
  const int64_t b = blockIdx.x / q.blocks;
  const bool several = q.classes > kTile;
  const bool by_class = kDecision == Decision::threshold || q.dense || q.classes <= kFewClasses;
  for (int i = threadIdx.x; i < kCounted * kTile; i += kThreads) {
    tallies[i / kTile][i % kTile] = 0;
  }
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();

  unsigned long long counted = 0;
  constexpr int64_t kChunk = kThreads * kVoxels;
  for (int64_t chunk = blockIdx.x % q.blocks * kChunk; chunk < q.voxels;
       chunk += q.blocks * kChunk) {
    const bool vector = q.input.vector;
    const int64_t first = chunk + static_cast<int64_t>(threadIdx.x) * (vector ? kVoxels : 1);
    const Span span{first, q.voxels, vector ? 1 : kThreads};
    bool kept[kVoxels];
    int truth[kVoxels], predicted[kVoxels];
    load_mask(q.mask, b, span, kept);
    if (!q.dense) {
      load_classes(q.target, b, 0, {q.target_classes, q.has_ignore, q.ignore_index}, span, truth);
    }
    if constexpr (kDecision == Decision::argmax) choose<T>(q, b, span, predicted);
    if constexpr (kDecision == Decision::labels) {
      load_classes(q.input, b, 0, {q.input_classes, false, 0}, span, predicted);
    }
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) {
      const bool known = kDecision != Decision::labels || predicted[i] >= 0;
      truth[i] = !q.dense && kept[i] && known ? truth[i] : -1;
      counted += truth[i] >= 0;
    }
    for (int64_t base = 0; base < q.classes; base += kTile) {
      if (by_class) {
        const int most = static_cast<int>(q.classes - base < kTile ? q.classes - base : kTile);
        for (int c = 0; c < most; ++c) {
          count_class<T, kDecision>(q, b, static_cast<int>(base) + c, span, kept, truth, predicted,
                                    tallies, c);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kVoxels; ++i) {
          if (truth[i] < 0) continue;
          const int64_t t = truth[i] - base, p = predicted[i] - base;
          if (p >= 0 && p < kTile) atomicAdd(&tallies[kPredicted][p], 1u);
          if (t >= 0 && t < kTile) atomicAdd(&tallies[kTruth][t], 1u);
          if (t == p && t >= 0 && t < kTile) atomicAdd(&tallies[kBoth][t], 1u);
        }
      }
      if (!several) break;
      __syncthreads();
      flush(q, b, base, tallies);
      __syncthreads();
    }
  }
  counted = warp_sum(counted);
  if (threadIdx.x % kWarp == 0) atomicAdd(&total[0], counted);
  __syncthreads();
  if (!several) flush(q, b, 0, tallies);
  if (q.dense || total[0] == 0) return;
  for (int64_t c = threadIdx.x; c < q.classes; c += kThreads) {
    atomicAdd(q.counts + (b * q.classes + c) * 4 + Count::TN, total[0]);
  }
}

/// Whether runs of `voxels` can be read as vectors.
bool aligned(const View& view, int voxels) {
  const int64_t element = bytes_of(view.type);
  const int64_t bytes = widest(voxels * static_cast<int>(element));
  return view.stride.voxel == 1 && reinterpret_cast<uintptr_t>(view.data) % bytes == 0 &&
         view.stride.batch * element % bytes == 0 && view.stride.channel * element % bytes == 0;
}

template <class T, Decision kDecision>
cudaError_t start(HardLaunched q, cudaStream_t stream) {
  constexpr int64_t kChunk = kThreads * kRun<T>;
  q.target_classes = std::min(q.classes, classes_held(q.target.type));
  q.input_classes = std::min(q.classes, classes_held(q.input.type));
  q.input.vector = aligned(q.input, kRun<T>);
  q.target.vector = aligned(q.target, kRun<T>);
  q.mask.vector = aligned(q.mask, kRun<T>);
  const int64_t chunks = (q.voxels + kChunk - 1) / kChunk;
  const int64_t share = q.batch < kBlocks ? kBlocks / q.batch : 1;
  q.blocks = chunks < share ? chunks : share;
  if (q.batch * q.blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(count<T, kDecision>, dim3(static_cast<unsigned>(q.batch * q.blocks)),
                dim3(kThreads), stream, q);
}

template <class T>
cudaError_t start_decision(const HardLaunched& q, cudaStream_t stream) {
  return q.decision == Decision::argmax ? start<T, Decision::argmax>(q, stream)
                                        : start<T, Decision::threshold>(q, stream);
}

}  // namespace

cudaError_t hard_confusion(const HardConfusion& problem, int64_t* counts, cudaStream_t stream) {
  HardLaunched q{problem};
  if (q.batch == 0 || q.voxels == 0) return cudaSuccess;
  q.counts = reinterpret_cast<unsigned long long*>(counts);
  if (q.decision == Decision::labels) return start<float, Decision::labels>(q, stream);
  switch (q.input.type) {
    case Element::f16:
      return start_decision<__half>(q, stream);
    case Element::bf16:
      return start_decision<__nv_bfloat16>(q, stream);
    case Element::f64:
      return start_decision<double>(q, stream);
    default:
      return start_decision<float>(q, stream);
  }
}

}  // namespace voxfuse::cuda
