// Patches, their weights and runs of their voxels, as the patch fusion's kernels see them. Part of
// overlap_add.cu.
#pragma once

#include "cuda/elements.h"
#include "cuda/overlap_add.h"

namespace voxfuse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kListed = 256;  // patches that a block can list; with more it walks through all
// Channels that a thread adds up at a time.
template <class T>
constexpr int kChannels = sizeof(T) == 2 ? 2 : 4;
constexpr int kTileDepth = 8;
constexpr int kFewGroups = 2;  // of kChannels, whose softmax is worked out anew for each

/// A patch as a tile sees it. Origins far outside are moved to where they just do not touch.
struct Placed {
  int64_t patch;
  int origin[3];
  int row[3];
  bool valid;

  __device__ Placed() {}
  __device__ Placed(const Fusion& q, int64_t index) : patch(index), valid(true) {
    const int lead = 3 - q.axes;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      origin[axis] = row[axis] = 0;
      if (axis < lead) continue;
      const int64_t at = q.origins[index * q.axes + axis - lead];
      const int64_t low = int64_t{q.begin[axis]} - q.patch[axis], high = q.end[axis];
      origin[axis] = static_cast<int>(at < low ? low : (at > high ? high : at));
      if (!q.separable) continue;
      const int64_t k = q.rows[index * q.axes + axis - lead];
      valid = valid && k >= 0 && k < q.row_count[axis];  // else out of bounds: left out
      row[axis] = static_cast<int>(k);
    }
  }

  __device__ bool touches(const Fusion& q, const int (&low)[3], const int (&high)[3]) const {
    bool result = valid;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      result = result && origin[axis] < high[axis] && origin[axis] + q.patch[axis] > low[axis];
    }
    return result;
  }
};

__device__ inline int slot(const Fusion& q, int axis, int coordinate) {
  return axis == q.ring_axis ? coordinate % q.extent[axis] : coordinate;
}

template <class Real>
__device__ inline Real axis_weight(const Fusion& q, const Placed& at, int axis, int t) {
  return q.weights[axis] == nullptr
             ? Real(1)
             : static_cast<Real>(
                   __ldg(q.weights[axis] + int64_t{at.row[axis]} * q.patch[axis] + t));
}

__device__ inline double cover_weight(const Fusion& q, int axis, int k, int x) {
  return q.cover[axis] == nullptr ? 1.0
                                  : __ldg(q.cover[axis] + int64_t{k} * q.cover_extent[axis] + x);
}

/// Sums of the raised weights of all patches over `wide` voxels from (z, y, x) on.
template <int kRun>
__device__ inline void raised_sums(const Fusion& q, int z, int y, int x, int wide,
                                   double (&total)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) total[i] = 0;
  for (int k = 0; k < q.cover_count[0]; ++k) {
    const double along_z = cover_weight(q, 0, k, z);
    for (int l = 0; along_z >= 0 && l < q.cover_count[1]; ++l) {
      const double along_y = cover_weight(q, 1, l, y), outer = along_z * along_y;
      for (int m = 0; along_y >= 0 && m < q.cover_count[2]; ++m) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (i >= wide) continue;
          const double across = cover_weight(q, 2, m, x + i), product = outer * across;
          if (across >= 0) total[i] += product < q.floor ? q.floor : product;
        }
      }
    }
  }
}

/// Weights of kRun voxels of a patch from (tz, ty, tx) on; 0 outside the patch. Where there
/// are sums they are raised to the floor, if any, and divided, in float64.
template <class Real, int kRun>
__device__ inline void weights_of(const Fusion& q, const Placed& at, int tz, int ty, int tx,
                                  const double (&total)[kRun], Real (&weight)[kRun]) {
  const auto window = [&](int i) {
    return __ldg(q.weights[0] + (int64_t{tz} * q.patch[1] + ty) * q.patch[2] + tx + i);
  };
  if (q.total == nullptr && q.floor == 0) {
    Real outer = 0;
    if (q.separable) outer = axis_weight<Real>(q, at, 0, tz) * axis_weight<Real>(q, at, 1, ty);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      weight[i] = 0;
      if (tx + i < 0 || tx + i >= q.patch[2]) continue;
      weight[i] =
          q.separable ? outer * axis_weight<Real>(q, at, 2, tx + i) : static_cast<Real>(window(i));
    }
  } else {
    double outer = 0;
    if (q.separable) outer = axis_weight<double>(q, at, 0, tz) * axis_weight<double>(q, at, 1, ty);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      weight[i] = 0;
      if (tx + i < 0 || tx + i >= q.patch[2] || total[i] == 0) continue;
      double exact = q.separable ? outer * axis_weight<double>(q, at, 2, tx + i) : window(i);
      if (q.floor > 0 && exact < q.floor) exact = q.floor;
      weight[i] = static_cast<Real>(exact / total[i]);
    }
  }
}

template <int kRun>
__device__ inline bool is_aligned(const void* pointer, int element) {
  return reinterpret_cast<uintptr_t>(pointer) % widest(kRun * element) == 0;
}

/// A run of patch voxels; those outside [first, last) are 0.
template <class Real, int kRun, class T>
__device__ inline void load_run(const T* run, int first, int last, Real (&value)[kRun]) {
  if (first <= 0 && last >= kRun && is_aligned<kRun>(run, sizeof(T))) {
    T raw[kRun];
    load_vector<kRun>(run, raw);
#pragma unroll
    for (int i = 0; i < kRun; ++i) value[i] = Convert<Real>::from(raw[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      value[i] = i >= first && i < last ? Convert<Real>::from(run[i]) : Real(0);
    }
  }
}

/// Writes the first `width` values of a run.
template <int kRun, class T>
__device__ inline void store_run(T* run, int width, const T (&value)[kRun]) {
  if (width == kRun && is_aligned<kRun>(run, sizeof(T))) {
    store_vector<kRun>(run, value);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < width) run[i] = value[i];
    }
  }
}

template <class Real, int kRun>
__device__ inline void turn_run(Real (&value)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun / 2; ++i) {
    const Real first = value[i];
    value[i] = value[kRun - 1 - i];
    value[kRun - 1 - i] = first;
  }
}

}  // namespace
}  // namespace voxfuse::cuda
