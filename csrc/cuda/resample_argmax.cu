// Channels interpolated to another grid and decided between, on the GPU. A thread owns a column of
// kRows target voxels, neighbouring threads neighbouring columns, and walks through the channels
// with what it has decided so far in registers. Of a channel it holds the two source rows that a
// target row lies between, each at the column's two voxels and between its two slices already, and
// reads another row only where the next target row needs one.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/elements.h"
#include "cuda/resample_argmax.h"

namespace voxfuse::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRegions = 128;  // channels with a label of their own in one launch

struct ResampleLaunched : Resampling {
  int64_t columns = 0;           // of a slice
  int64_t first = 0, last = 0;   // channels; those before are in the result
  int64_t label[kRegions] = {};  // of the channels from `first` on
};

/// Stands for the integer types, which are told apart where they are read.
struct AnyInteger {};

/// Target voxels of a thread. Telling types apart takes the registers of several.
template <class T>
constexpr int kRows = std::is_same_v<T, AnyInteger> ? 1 : 4;

template <class T>
__device__ inline float element(const Resampling& q, int64_t place) {
  if constexpr (std::is_same_v<T, AnyInteger>) {
    float value[1];
    with_bits(q.type, [&](auto zero) {
      using Bits = decltype(zero);
      const Bits raw[1] = {__ldg(static_cast<const Bits*>(q.input) + place)};
      numbers(q.type, raw, value);
    });
    return value[0];
  } else {
    T value[1];
    load_vector<1>(static_cast<const T*>(q.input) + place, value);
    return to_float(value[0]);
  }
}

/// The mean of two neighbours in the CPU's order and roundings.
__device__ inline float mean(float lower, float upper, float w0, float w1) {
  return fmaf(upper, w1, lower * w0);
}

/// Where a target voxel lies on an axis. With an upper weight of 0 it is the lower voxel as it is.
struct Neighbours {
  int64_t lower;
  float w0, w1;
};

template <int kAxis>
__device__ inline Neighbours neighbours(const Resampling& q, int64_t k) {
  if (q.weight[kAxis] == nullptr) return {k, 1, 0};
  // A table from elsewhere must not lead outside.
  const int64_t end = q.source[kAxis] - 1, given = __ldg(q.index[kAxis] + k);
  const int64_t lower = given < 0 ? 0 : given < end ? given : end;
  const float w1 = lower < end ? __ldg(q.weight[kAxis] + q.target[kAxis] + k) : 0.0f;
  return {lower, w1 == 0 ? 1.0f : __ldg(q.weight[kAxis] + k), w1};
}

/// A thread's target voxels, and which source voxels they are made of.
template <class T>
struct Column {
  static constexpr int kCount = kRows<T>;
  enum Move : unsigned { kShift = 1, kLower = 2, kUpper = 4 };

  int64_t out;          // of the first target voxel
  int rows;             // target voxels, at most kCount
  int64_t row[kCount];  // where the lower source row begins, in a channel
  float w0[kCount], w1[kCount];
  unsigned moves = 0;  // a Move of 4 bits a row: what is read before it
  Neighbours z, x;

  __device__ Column(const ResampleLaunched& q, int64_t place) {
    const int64_t group = place / q.target[2], at = place % q.target[2];
    const int64_t slice = group / q.columns, first = group % q.columns * kCount;
    out = (slice * q.target[1] + first) * q.target[2] + at;
    rows = static_cast<int>(q.target[1] - first < kCount ? q.target[1] - first : kCount);
    z = neighbours<0>(q, slice);
    x = neighbours<2>(q, at);
    int64_t held = -1;
    bool pair = false;  // the upper row is held as well
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      // Rows beyond the end are the last one again: nothing is read for them.
      const Neighbours y = neighbours<1>(q, first + (r < rows ? r : rows - 1));
      unsigned move = 0;
      if (r == 0 || y.lower != held) {
        move = pair && y.lower == held + 1 ? kShift : kLower;
        pair = false;
      }
      if (y.w1 != 0 && !pair) move |= kUpper;
      pair = pair || y.w1 != 0;
      held = y.lower;
      moves |= move << (4 * r);
      row[r] = z.lower * q.stride[0] + y.lower * q.stride[1] + x.lower * q.stride[2];
      w0[r] = y.w0;
      w1[r] = y.w1;
    }
  }

  /// Between two slices, at the column's two source voxels.
  __device__ void read(const Resampling& q, int64_t place, float (&both)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == 1 && x.w1 == 0) continue;
      const int64_t own = place + i * q.stride[2];
      both[i] = element<T>(q, own);
      if (z.w1 != 0) both[i] = mean(both[i], element<T>(q, own + q.stride[0]), z.w0, z.w1);
    }
  }

  /// The column's voxels of the channel that begins at `channel`.
  __device__ void interpolate(const Resampling& q, int64_t channel, float (&value)[kCount]) const {
    float lower[2] = {0, 0}, upper[2] = {0, 0};
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const unsigned move = moves >> (4 * r);
      if (move & kShift) {
        lower[0] = upper[0];
        lower[1] = upper[1];
      }
      if (move & kLower) read(q, channel + row[r], lower);
      if (move & kUpper) read(q, channel + row[r] + q.stride[1], upper);
      float left = lower[0], right = lower[1];
      if (w1[r] != 0) {
        left = mean(left, upper[0], w0[r], w1[r]);
        right = mean(right, upper[1], w0[r], w1[r]);
      }
      value[r] = x.w1 == 0 ? left : mean(left, right, x.w0, x.w1);
      if (q.round_to_half) value[r] = __half2float(__float2half_rn(value[r]));
    }
  }
};

// Left alone the compiler takes 107 registers for addresses, and a multiprocessor has half as many
// threads to wait with for the caches.
template <class T, bool kLabels>
__global__ void __launch_bounds__(kThreads, 5)
    resample(const __grid_constant__ ResampleLaunched q) {
  const int64_t place = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (place >= q.target[0] * q.columns * q.target[2]) return;
  const Column<T> column(q, place);
  constexpr int kCount = kRows<T>;
  int64_t chosen[kCount];
  bool decided[kCount];
  float value[kCount];
  if constexpr (kLabels) {
    float most[kCount];
    int where[kCount] = {};
    column.interpolate(q, 0, most);
    const int channels = static_cast<int>(q.channels);
    int64_t channel = 0;
    for (int c = 1; c < channels; ++c) {
      channel += q.channel_stride;
      column.interpolate(q, channel, value);
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
        // The first NaN is the greatest.
        const bool greater = !(value[r] <= most[r]) && most[r] == most[r];
        most[r] = greater ? value[r] : most[r];
        where[r] = greater ? c : where[r];
      }
    }
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      chosen[r] = where[r];
      decided[r] = true;
    }
  } else {
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      chosen[r] = 0;
      decided[r] = q.first == 0;
    }
    const int64_t volume = q.target[0] * q.target[1] * q.target[2];
    for (int64_t c = q.first; c < q.last; ++c) {
      column.interpolate(q, c * q.channel_stride, value);
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
        const int64_t own = c * volume + column.out + r * q.target[2];
        if (r >= column.rows) continue;
        if (q.kept == Resampled::values) {
          static_cast<float*>(q.out)[own] = value[r];
        } else if (q.kept == Resampled::mask) {
          static_cast<bool*>(q.out)[own] = value[r] >= q.least;
        } else if (value[r] >= q.least) {
          chosen[r] = q.label[c - q.first];
          decided[r] = true;
        }
      }
    }
    if (q.kept != Resampled::regions) return;
  }
  with_bits(q.out_type, [&](auto zero) {
    using Label = decltype(zero);
    Label* out = static_cast<Label*>(q.out) + column.out;
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      if (r < column.rows && decided[r]) out[r * q.target[2]] = static_cast<Label>(chosen[r]);
    }
  });
}

template <class T>
cudaError_t start(ResampleLaunched q, cudaStream_t stream) {
  q.columns = (q.target[1] + kRows<T> - 1) / kRows<T>;
  const int64_t threads = q.target[0] * q.columns * q.target[2];
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(q.kept == Resampled::labels ? resample<T, true> : resample<T, false>,
                dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, q);
}

cudaError_t start_type(const ResampleLaunched& q, cudaStream_t stream) {
  switch (q.type) {
    case Element::f32:
      return start<float>(q, stream);
    case Element::f16:
      return start<__half>(q, stream);
    case Element::bf16:
      return start<__nv_bfloat16>(q, stream);
    case Element::f64:
      return start<double>(q, stream);
    default:
      return start<AnyInteger>(q, stream);
  }
}

}  // namespace

cudaError_t resample_argmax(const Resampling& problem, cudaStream_t stream) {
  ResampleLaunched q{problem};
  // More regions than a launch has labels for are a launch more: later ones overwrite earlier.
  const int64_t step = q.kept == Resampled::regions ? kRegions : q.channels;
  for (q.first = 0; q.first < q.channels; q.first += step) {
    q.last = std::min(q.first + step, q.channels);
    if (q.kept == Resampled::regions) {
      std::copy(problem.regions + q.first, problem.regions + q.last, q.label);
    }
    const cudaError_t error = start_type(q, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace voxfuse::cuda
