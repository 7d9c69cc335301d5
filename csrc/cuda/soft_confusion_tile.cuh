// What the kernels of soft_confusion share: reading labels, weights and logits, and the places of
// the sums.
#pragma once

#include "cuda/labels.cuh"
#include "cuda/soft_confusion.h"
#include "math/confusion.h"

namespace voxfuse::cuda {
namespace {

/// The classes of a thread's voxels, -1 for those that are left out or past the end.
template <int kVoxels>
__device__ inline void load_labels(const Launched& q, int64_t b, const Span& span,
                                   int (&label)[kVoxels]) {
  load_classes(q.target, b, 0, {q.label_classes, q.ignored_label}, span, label);
  if (span.holds(kVoxels - 1)) return;
#pragma unroll
  for (int i = 0; i < kVoxels; ++i) {
    if (!span.holds(i)) label[i] = -1;
  }
}

template <class Real, int kVoxels>
__device__ inline void load_weights(const Launched& q, int64_t b, const Span& span,
                                    Real (&weight)[kVoxels]) {
  if (q.weight.data == nullptr) {
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) weight[i] = Real(1);
    return;
  }
  with_bits(q.weight.type, [&](auto zero) {
    decltype(zero) raw[kVoxels];
    load_bits(q.weight, b, 0, span, raw);
    numbers(q.weight.type, raw, weight);
  });
}

/// Labels and weights together; `label` is -1 and `weight` 0 for voxels that are left out. Returns
/// whether there are any.
template <int kVoxels>
__device__ inline bool load_voxels(const Launched& q, int64_t b, const Span& span,
                                   int (&label)[kVoxels], float (&weight)[kVoxels]) {
  load_labels(q, b, span, label);
  load_weights(q, b, span, weight);
  if (q.weight.data != nullptr) {
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) {
      if (weight[i] == 0.0f) label[i] = -1;
    }
  }
  int every = 0;
#pragma unroll
  for (int i = 0; i < kVoxels; ++i) every |= label[i];
  const bool excluded = every < 0;
  if (excluded) {
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) {
      if (label[i] < 0) weight[i] = 0.0f;
    }
  }
  return excluded;
}

/// Logits of classes [first, first + kClasses) at a thread's voxels; those beyond q.classes are
/// -infinity. The first kSure classes are known to exist.
template <class T, int kSure, int kClasses, int kVoxels>
__device__ inline void load_logits(const Launched& q, int64_t b, int first, const Span& span,
                                   float (&z)[kClasses][kVoxels]) {
  const int64_t channel = opaque(q.input.stride.channel);
  const T* plane = static_cast<const T*>(q.input.data) + b * q.input.stride.batch + first * channel;
  const bool whole = span.step == 1 && span.first + kVoxels <= span.end;
  if (q.input_layout == Layout::kPlanar && whole) {
    T raw[kClasses][kVoxels];
    plane += span.first;
#pragma unroll
    for (int c = 0; c < kClasses; ++c, plane += channel) {
      if (c >= kSure) {
#pragma unroll
        for (int i = 0; i < kVoxels; ++i) raw[c][i] = Store<T>::from(-INFINITY);
      }
      if (c < kSure || first + c < q.classes) load_vector<kVoxels>(plane, raw[c]);
    }
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
#pragma unroll
      for (int i = 0; i < kVoxels; ++i) z[c][i] = to_float(raw[c][i]);
    }
  } else if (kSure > 0 && q.input_layout == Layout::kInterleaved && whole) {
    T raw[kClasses * kVoxels];
    load_vector<kClasses * kVoxels>(plane + span.first * kClasses, raw);
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
#pragma unroll
      for (int i = 0; i < kVoxels; ++i) z[c][i] = to_float(raw[i * kClasses + c]);
    }
  } else {
#pragma unroll
    for (int c = 0; c < kClasses; ++c, plane += channel) {
#pragma unroll
      for (int i = 0; i < kVoxels; ++i) {
        z[c][i] = -INFINITY;
        if (c < kSure || first + c < q.classes) {
          z[c][i] = span.holds(i) ? to_float(plane[span.voxel(i) * q.input.stride.voxel]) : 0.0f;
        }
      }
    }
  }
}

template <class T, int kSure, int kClasses, int kVoxels>
__device__ inline void store_gradient(const Launched& q, int64_t b, int first, const Span& span,
                                      const float (&value)[kClasses][kVoxels]) {
  const int64_t channel = opaque(q.gradient_stride.channel);
  T* plane = static_cast<T*>(q.gradient) + b * q.gradient_stride.batch + first * channel;
  const bool whole = span.step == 1 && span.first + kVoxels <= span.end;
  if (kSure > 0 && q.gradient_layout == Layout::kInterleaved && whole) {
    T raw[kClasses * kVoxels];
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) {
#pragma unroll
      for (int c = 0; c < kClasses; ++c) raw[i * kClasses + c] = Store<T>::from(value[c][i]);
    }
    store_vector<kClasses * kVoxels>(plane + span.first * kClasses, raw);
    return;
  }
#pragma unroll
  for (int c = 0; c < kClasses; ++c, plane += channel) {
    if (c >= kSure && first + c >= q.classes) continue;
    if (q.gradient_layout == Layout::kPlanar && whole) {
      T raw[kVoxels];
#pragma unroll
      for (int i = 0; i < kVoxels; ++i) raw[i] = Store<T>::from(value[c][i]);
      store_vector<kVoxels>(plane + span.first, raw);
    } else {
#pragma unroll
      for (int i = 0; i < kVoxels; ++i) {
        if (span.holds(i)) {
          plane[span.voxel(i) * q.gradient_stride.voxel] = Store<T>::from(value[c][i]);
        }
      }
    }
  }
}

/// The voxels of thread `thread` of `threads` in the tile that starts at `tile`: consecutive ones
/// where they are read as vectors, else neighbouring threads take neighbouring voxels.
template <int kVoxels>
__device__ inline Span span_of(Layout layout, int64_t tile, int64_t end, int thread, int threads) {
  if (layout == Layout::kScalar) return {tile + thread, end, threads};
  return {tile + thread * kVoxels, end, 1};
}

template <int kClasses, int kVoxels>
__device__ inline void clear_excluded(const int (&label)[kVoxels], float (&z)[kClasses][kVoxels]) {
#pragma unroll
  for (int i = 0; i < kVoxels; ++i) {
    if (label[i] < 0) {
#pragma unroll
      for (int c = 0; c < kClasses; ++c) z[c][i] = 0.0f;
    }
  }
}

/// The likelihood's exponent of class c.
template <class Real>
__device__ inline Real gamma_of(const Launched& q, int c) {
  return c < q.focal_classes ? static_cast<Real>(q.gamma) : Real(0);
}

/// -log p of the label's class from its exponential, that of all others and its exponent in base 2.
__device__ inline float label_minus_log(float own, float others, float inverse, float exponent) {
  const float tail = math::minus_log1m(fminf(own, others) * inverse);
  return own >= others ? tail : tail + math::kLn2 * (math::log2_fast(others) - exponent);
}

/// The chunks whose sums this block adds up, and where they go.
struct Row {
  int64_t sample, first, last;  // chunks [first, last)
  double* sums;                 // (classes, columns)

  __device__ Row(const Launched& q, unsigned index) {
    const unsigned rows = static_cast<unsigned>(q.rows);
    sample = index / rows;
    first = index % rows * q.chunks_per_row;
    const int64_t chunks = (q.voxels + q.chunk - 1) / q.chunk;
    last = first + q.chunks_per_row < chunks ? first + q.chunks_per_row : chunks;
    sums = q.workspace + index * q.classes * q.columns;
  }
};

/// Whether this block is the last of `total` ones to come here; whatever they wrote before is then
/// visible. The last one leaves the counter at 0, as it found it.
__device__ inline bool comes_last(unsigned* counter, unsigned total) {
  VOXFUSE_SHARED(bool, last, [1]);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = atomicAdd(counter, 1u) + 1 == total;
    __threadfence();
    if (last[0]) *counter = 0;
  }
  __syncthreads();
  return last[0];
}

/// Adds up rows of `count` sums, each `stride` rows after the one before, in float64 and in an
/// order that depends on their number and on the block's size alone. `partial` has one place a
/// thread; kAhead reads are under way at a time.
template <int kAhead>
__device__ inline void add_rows(const double* rows, int64_t number, int64_t stride, int count,
                                double* sums, double* partial) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int first = 0; first < count; first += threads) {
    const int width = count - first < threads ? count - first : threads;
    const int groups = threads / width, group = thread / width;
    double sum = 0;
    if (group < groups) {
      const double* base = rows + first + thread % width;
#pragma unroll kAhead
      for (int64_t row = group; row < number; row += groups) {
        // From the second-level cache: another multiprocessor has written it.
        sum += __ldcg(base + row * stride * count);
      }
    }
    partial[thread] = sum;
    __syncthreads();
    if (thread < width) {
      for (int other = 1; other < groups; ++other) sum += partial[thread + other * width];
      sums[first + thread] = sum;
    }
    __syncthreads();
  }
}

/// The end of a forward kernel: the last block of a group of rows adds them up, into the first of
/// them, and the last block to do so adds up the groups. Which block that is changes no order.
template <int kAhead = 8>
__device__ inline void finish_rows(const Launched& q, unsigned block, unsigned blocks_of_row,
                                   double* partial) {
  if (q.counters == nullptr) return;
  // Computed again rather than kept in registers all along.
  const unsigned index = static_cast<unsigned>(opaque(block)) / blocks_of_row;
  const Row row(q, index);
  const unsigned rows = static_cast<unsigned>(q.rows), size = static_cast<unsigned>(q.group);
  const unsigned groups = (rows + size - 1) / size, group = index % rows / size;
  const unsigned first = group * size, here = rows - first < size ? rows - first : size;
  const int count = static_cast<int>(q.classes) * q.columns;
  double* base = q.workspace + row.sample * q.rows * count;
  double* sums = q.sums + row.sample * count;
  unsigned* counters = q.counters + row.sample * (groups + 1);
  if (!comes_last(counters + 1 + group, here * blocks_of_row)) return;
  double* own = base + int64_t{first} * count;
  add_rows<kAhead>(own, here, 1, count, groups == 1 ? sums : own, partial);
  if (groups == 1 || !comes_last(counters, groups)) return;
  add_rows<kAhead>(base, groups, size, count, sums, partial);
}

}  // namespace
}  // namespace voxfuse::cuda
