// Finalisation of a ring's slices on the GPU: a thread owns a few neighbouring voxels and walks
// through their classes, kTile at a time. It keeps the greatest value, its index, sum e and
// sum e (z - max) with e = exp(z - max). Only the values and the mask of a softmax over more
// classes than a tile are walked twice. A thread reads and clears no voxels but its own.
#include <cmath>
#include <type_traits>

#include "cuda/elements.h"
#include "cuda/finalize_slab.h"
#include "math/confusion.h"

namespace voxfuse::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 8;  // classes in registers

template <class Real>
constexpr int kRun = 16 / sizeof(Real);  // voxels of a thread

/// Where a thread's voxels are.
struct Place {
  int64_t ring, out;  // of the first voxel, in channel 0
  int wide;           // voxels, at most kRun
};

template <int kCount>
__device__ inline bool aligned(const void* pointer, int element) {
  return reinterpret_cast<uintptr_t>(pointer) % widest(kCount * element) == 0;
}

/// exp(x) for x <= 0, and no number for no number.
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

template <class Real>
__device__ inline Real sigmoid_of(Real z) {
  // Divided, not multiplied by an inverse as in math::sigmoid: one rounding less.
  const Real e = exponential(z < 0 ? z : -z);
  return (z < 0 ? e : Real(1)) / (1 + e);
}

/// -p log p, 0 at 0.
template <class Real>
__device__ inline Real surprise(Real p) {
  return -math::product(p, math::log_accurate(p));
}

/// Channel k of the ring over the divisor; voxels past the end are 0.
template <class Real>
__device__ inline void load_channel(const Slab& q, const Place& place, int64_t k,
                                    Real (&value)[kRun<Real>]) {
  const Real* source = static_cast<const Real*>(q.ring) + k * (q.outer * q.turn) + place.ring;
  if (place.wide == kRun<Real> && aligned<kRun<Real>>(source, sizeof(Real))) {
    // Not through the read-only cache: the ring is cleared by this kernel.
    const uint4 raw = *reinterpret_cast<const uint4*>(source);
    memcpy(value, &raw, sizeof(raw));
  } else {
#pragma unroll
    for (int i = 0; i < kRun<Real>; ++i) value[i] = i < place.wide ? source[i] : Real(0);
  }
  if (q.divisor != 1) {
#pragma unroll
    for (int i = 0; i < kRun<Real>; ++i) value[i] = value[i] / static_cast<Real>(q.divisor);
  }
}

/// z of kTile classes from `base` on; what is not a class is 0.
template <class Real>
__device__ inline void load_tile(const Slab& q, const Place& place, int64_t base,
                                 Real (&z)[kTile][kRun<Real>]) {
  if (q.weight == nullptr) {
#pragma unroll
    for (int c = 0; c < kTile; ++c) {
#pragma unroll
      for (int i = 0; i < kRun<Real>; ++i) z[c][i] = 0;
      if (base + c < q.classes) load_channel<Real>(q, place, base + c, z[c]);
    }
    return;
  }
  const Real* bias = static_cast<const Real*>(q.bias) + base;
#pragma unroll
  for (int c = 0; c < kTile; ++c) {
    const Real offset = base + c < q.classes ? __ldg(bias + c) : Real(0);
#pragma unroll
    for (int i = 0; i < kRun<Real>; ++i) z[c][i] = offset;
  }
  for (int64_t k = 0; k < q.channels; ++k) {
    Real feature[kRun<Real>];
    load_channel<Real>(q, place, k, feature);
    const Real* row = static_cast<const Real*>(q.weight) + base * q.channels + k;
#pragma unroll
    for (int c = 0; c < kTile; ++c) {
      const Real factor = base + c < q.classes ? __ldg(row + c * q.channels) : Real(0);
#pragma unroll
      for (int i = 0; i < kRun<Real>; ++i) z[c][i] = z[c][i] + factor * feature[i];
    }
  }
}

template <class T, class Value>
__device__ inline T rounded(Value value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(value);
  } else if constexpr (std::is_same_v<T, double>) {
    return static_cast<double>(value);
  } else {
    return Store<T>::from(static_cast<float>(value));
  }
}

template <class T, class Value, int kCount>
__device__ inline void store_as(const Slab& q, const Place& place, int64_t channel,
                                const Value (&value)[kCount], const bool (&covered)[kCount]) {
  T* run = static_cast<T*>(q.out) + channel * q.out_channel + place.out;
  T fill;
  if constexpr (std::is_integral_v<T>) {
    fill = static_cast<T>(q.mode == Finish::mask ? q.fill != 0 : static_cast<int64_t>(q.fill));
  } else {
    fill = rounded<T>(static_cast<float>(q.fill));
  }
  T result[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) result[i] = covered[i] ? rounded<T>(value[i]) : fill;
  if (place.wide == kCount && aligned<kCount>(run, sizeof(T))) {
    store_vector<kCount>(run, result);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < place.wide) run[i] = result[i];
    }
  }
}

/// Writes a run of one channel in the output's type.
template <class Value, int kCount>
__device__ inline void store_run(const Slab& q, const Place& place, int64_t channel,
                                 const Value (&value)[kCount], const bool (&covered)[kCount]) {
  if constexpr (std::is_same_v<Value, int>) {
    switch (q.type) {
      case Element::i16:
        return store_as<uint16_t>(q, place, channel, value, covered);
      case Element::i32:
        return store_as<int32_t>(q, place, channel, value, covered);
      case Element::i64:
        return store_as<int64_t>(q, place, channel, value, covered);
      default:
        return store_as<uint8_t>(q, place, channel, value, covered);
    }
  } else {
    switch (q.type) {
      case Element::f16:
        return store_as<__half>(q, place, channel, value, covered);
      case Element::bf16:
        return store_as<__nv_bfloat16>(q, place, channel, value, covered);
      case Element::f64:
        return store_as<double>(q, place, channel, value, covered);
      default:
        return store_as<float>(q, place, channel, value, covered);
    }
  }
}

template <class Real, Finish kMode>
__global__ void __launch_bounds__(kThreads, 3) finalize(const __grid_constant__ Slab q) {
  constexpr int kCount = kRun<Real>;
  constexpr bool kByClass = kMode == Finish::values || kMode == Finish::mask;
  // A run ends where the ring wraps around.
  const int64_t before = q.turn - q.first < q.voxels ? q.turn - q.first : q.voxels;
  const int64_t runs_before = (before + kCount - 1) / kCount;
  const int64_t runs = runs_before + (q.voxels - before + kCount - 1) / kCount;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= q.outer * runs) return;
  const int64_t row = index / runs, run = index % runs;
  const bool wrapped = run >= runs_before;
  const int64_t column = (wrapped ? run - runs_before : run) * kCount;
  const int64_t left = (wrapped ? q.voxels - before : before) - column;
  const Place place{row * q.turn + (wrapped ? 0 : q.first) + column,
                    row * q.out_outer + (wrapped ? before : 0) + column,
                    left < kCount ? static_cast<int>(left) : kCount};
  const Activation activation =
      q.applied || kMode == Finish::labels ? Activation::none : q.activation;
  const bool binary = q.activation == Activation::sigmoid || q.classes == 1;

  bool covered[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    covered[i] = q.total == nullptr || (i < place.wide && q.total[place.ring + i] != 0);
  }
  Real best[kCount], shift[kCount], sum[kCount], product[kCount];
  int where[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    best[i] = -INFINITY;
    shift[i] = sum[i] = product[i] = 0;
    where[i] = 0;
  }
  Real z[kTile][kCount];
  const bool first_walk = !kByClass || activation == Activation::softmax;
  for (int64_t base = 0; first_walk && base < q.classes; base += kTile) {
    load_tile<Real>(q, place, base, z);
    if (kMode != Finish::labels && activation == Activation::softmax) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        Real greatest = sum[i] == 0 ? Real(-INFINITY) : shift[i];
#pragma unroll
        for (int c = 0; c < kTile; ++c) {
          if (base + c < q.classes && z[c][i] > greatest) greatest = z[c][i];
        }
        // Before anything finite there is nothing to scale; infinity - infinity is no number.
        if (greatest == -INFINITY) greatest = 0;
        const Real step = shift[i] - greatest;
        if (sum[i] != 0) {
          const Real scale = exponential(step);
          product[i] = scale * (product[i] + step * sum[i]);
          sum[i] = scale * sum[i];
        }
        shift[i] = greatest;
#pragma unroll
        for (int c = 0; c < kTile; ++c) {
          if (base + c >= q.classes) continue;
          const Real gap = z[c][i] - greatest, e = exponential(gap);
          sum[i] += e;
          if (kMode == Finish::entropy && e != 0) product[i] += e * gap;
        }
      }
    } else if constexpr (kMode == Finish::entropy) {
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        if (base + c >= q.classes) continue;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const Real p = z[c][i];
          if (activation == Activation::sigmoid) {
            const Real distance = p < 0 ? -p : p, e = exponential(-distance);
            sum[i] += math::log1p_accurate(e) + (e == 0 ? Real(0) : distance * e) / (1 + e);
          } else {
            sum[i] += surprise(p);
            if (binary) sum[i] += surprise(1 - p);
          }
        }
      }
    }
    if constexpr (kMode == Finish::labels || kMode == Finish::foreground) {
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        if (base + c >= q.classes) continue;
        if (kMode == Finish::foreground && !binary && base + c == 0) continue;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const bool missing = z[c][i] != z[c][i] && best[i] == best[i];
          if (z[c][i] > best[i] || missing) {
            best[i] = z[c][i];
            where[i] = static_cast<int>(base) + c;
          }
        }
      }
    }
  }
  if constexpr (kByClass) {
    for (int64_t base = 0; base < q.classes; base += kTile) {
      if (!first_walk || q.classes > kTile) load_tile<Real>(q, place, base, z);
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        if (base + c >= q.classes) continue;
        Real p[kCount];
        int above[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          p[i] = z[c][i];
          if (activation == Activation::sigmoid) p[i] = sigmoid_of(p[i]);
          if (activation == Activation::softmax) p[i] = exponential(p[i] - shift[i]) / sum[i];
          above[i] = p[i] > static_cast<Real>(q.threshold);
        }
        if constexpr (kMode == Finish::mask) {
          store_as<uint8_t>(q, place, base + c, above, covered);
        } else {
          store_run(q, place, base + c, p, covered);
        }
      }
    }
  } else if constexpr (kMode == Finish::labels) {
    store_run(q, place, 0, where, covered);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (kMode == Finish::entropy) {
        best[i] = activation == Activation::softmax
                      ? math::log_accurate(sum[i]) - product[i] / sum[i]
                      : sum[i];
      } else if (activation == Activation::sigmoid) {
        best[i] = sigmoid_of(best[i]);
      } else if (activation == Activation::softmax) {
        best[i] = exponential(best[i] - shift[i]) / sum[i];
      }
    }
    store_run(q, place, 0, best, covered);
  }
  if (!q.clear) return;
  const Real zeros[kCount] = {};
  for (int64_t k = 0; k < q.channels; ++k) {
    Real* own = static_cast<Real*>(q.ring) + k * (q.outer * q.turn) + place.ring;
    if (place.wide == kCount && aligned<kCount>(own, sizeof(Real))) {
      store_vector<kCount>(own, zeros);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i < place.wide) own[i] = 0;
      }
    }
  }
}

template <class Real, Finish kMode>
cudaError_t start(const Slab& q, cudaStream_t stream) {
  constexpr int64_t kCount = kRun<Real>;
  const int64_t before = q.turn - q.first < q.voxels ? q.turn - q.first : q.voxels;
  const int64_t runs = (before + kCount - 1) / kCount + (q.voxels - before + kCount - 1) / kCount;
  const int64_t blocks = (q.outer * runs + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(finalize<Real, kMode>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream,
                q);
}

template <class Real>
cudaError_t start_mode(const Slab& q, cudaStream_t stream) {
  switch (q.mode) {
    case Finish::values:
      return start<Real, Finish::values>(q, stream);
    case Finish::labels:
      return start<Real, Finish::labels>(q, stream);
    case Finish::mask:
      return start<Real, Finish::mask>(q, stream);
    case Finish::foreground:
      return start<Real, Finish::foreground>(q, stream);
    case Finish::entropy:
      return start<Real, Finish::entropy>(q, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t finalize_slab(const Slab& q, cudaStream_t stream) {
  return q.is_double ? start_mode<double>(q, stream) : start_mode<float>(q, stream);
}

}  // namespace voxfuse::cuda
