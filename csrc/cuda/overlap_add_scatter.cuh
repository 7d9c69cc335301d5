// Gradient of the patches: every thread makes a run of voxels of one patch in all channels. Part of
// overlap_add.cu.
#pragma once

#include "cuda/overlap_add_softmax.cuh"

namespace voxfuse::cuda {
namespace {

/// The run of voxels of one patch, in all channels, that a thread of a backward kernel makes.
template <int kRun>
struct PatchRun {
  Placed at;
  int tz, ty, tx;              // its first voxel in the patch
  int width, first, last;      // voxels, and which of them may be in the volume
  bool inside;                 // whether any is
  int64_t line, place;         // its first voxel in the first channel of volume and patches
  int64_t plane, patch_plane;  // voxels of a channel

  /// Run `index` of all runs; `runs` are in a row of a patch, `per_patch` in a patch.
  __device__ PatchRun(const Fusion& q, int64_t index, int runs, int64_t per_patch)
      : at(q, index / per_patch) {
    const int within = static_cast<int>(index % per_patch);
    tx = within % runs * kRun;
    ty = within / runs % q.patch[1];
    tz = within / runs / q.patch[1];
    const int z = at.origin[0] + tz, y = at.origin[1] + ty, x = at.origin[2] + tx;
    inside = at.valid && z >= 0 && z < q.extent[0] && y >= 0 && y < q.extent[1];
    width = q.patch[2] - tx < kRun ? q.patch[2] - tx : kRun;
    first = -x;
    last = q.extent[2] - x < width ? q.extent[2] - x : width;
    line = (int64_t{z} * q.extent[1] + y) * q.extent[2] + x;
    plane = int64_t{q.extent[0]} * q.extent[1] * q.extent[2];
    patch_plane = int64_t{q.patch[0]} * q.patch[1] * q.patch[2];
    place = at.patch * q.channels * patch_plane + (int64_t{tz} * q.patch[1] + ty) * q.patch[2] + tx;
  }

  __device__ bool has(int i) const { return inside && i >= first && i < last; }

  template <class Real>
  __device__ void weights(const Fusion& q, Real (&weight)[kRun]) const {
    double total[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      total[i] = q.total != nullptr && has(i) ? q.total[line + i] : 0.0;
    }
    weights_of<Real, kRun>(q, at, tz, ty, tx, total, weight);
  }
};

/// Gradient of the patches: every thread makes a run of voxels of one patch in all channels.
template <class T>
__global__ void __launch_bounds__(kThreads) scatter(const __grid_constant__ Fusion q) {
  using Real = typename Compute<T>::Real;
  constexpr int kRun = 16 / sizeof(T);
  const int runs = (q.patch[2] + kRun - 1) / kRun;
  const int64_t per_patch = int64_t{q.patch[0]} * q.patch[1] * runs;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= per_patch * q.patches) return;
  const PatchRun<kRun> own(q, index, runs, per_patch);
  Real weight[kRun];
  if (own.inside) own.weights(q, weight);
  const T* gradient = static_cast<const T*>(q.source) + own.line;
  T* run = static_cast<T*>(q.target) + own.place;
  for (int64_t channel = 0; channel < q.channels; ++channel, run += own.patch_plane) {
    T out[kRun];
    Real value[kRun] = {};
    if (own.inside) {
      load_run<Real, kRun>(gradient + channel * own.plane, own.first, own.last, value);
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      out[i] = Store<T>::from(own.has(i) ? weight[i] * value[i] : Real(0));
    }
    store_run<kRun>(run, own.width, out);
  }
}

/// As scatter, of activated patches: z are their voxels, p the probabilities, a the weighted
/// gradient. Softmax: p_c (a_c - sum_k p_k a_k); sigmoid: p (1 - p) a.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) scatter_activated(const __grid_constant__ Fusion q) {
  using Real = typename Compute<T>::Real;
  constexpr int kRun = 16 / sizeof(T);
  const int runs = (q.patch[2] + kRun - 1) / kRun;
  const int64_t per_patch = int64_t{q.patch[0]} * q.patch[1] * runs;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= per_patch * q.patches) return;
  const PatchRun<kRun> own(q, index, runs, per_patch);
  const T* gradient = static_cast<const T*>(q.source) + own.line;
  const T* patch = static_cast<const T*>(q.activated) + own.place;
  T* run = static_cast<T*>(q.target) + own.place;

  Real weight[kRun], greatest[kRun], mean[kRun];  // mean: sum_k p_k g_k
  const bool softmax = q.activation == Activation::softmax;
  if (own.inside) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      greatest[i] = mean[i] = 0;
      weight[i] = 1;
    }
    if (softmax) {
      const auto add = [&](int64_t channel, int copies, const Real(&factor)[kRun],
                           const Real(&e)[kChannels<T>][kRun]) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) mean[i] *= factor[i];
#pragma unroll
        for (int c = 0; c < kChannels<T>; ++c) {
          if (c >= copies) continue;
          Real slope[kRun];
          load_run<Real, kRun>(gradient + (channel + c) * own.plane, own.first, own.last, slope);
#pragma unroll
          for (int i = 0; i < kRun; ++i) mean[i] += e[c][i] * slope[i];
        }
      };
      const Softmax<Real, kRun> found =
          softmax_of<Real, kRun>(patch, own.patch_plane, q.channels, 0, own.width, add);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        greatest[i] = found.greatest[i];
        mean[i] *= found.inverse[i];
        weight[i] = found.inverse[i];
      }
    }
    Real window[kRun];
    own.weights(q, window);
#pragma unroll
    for (int i = 0; i < kRun; ++i) weight[i] *= window[i];
  }
  for (int64_t channel = 0; channel < q.channels; ++channel) {
    T out[kRun];
    Real value[kRun] = {}, slope[kRun] = {};
    if (own.inside) {
      load_run<Real, kRun>(patch + channel * own.patch_plane, 0, own.width, value);
      load_run<Real, kRun>(gradient + channel * own.plane, own.first, own.last, slope);
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      Real result = 0;
      if (own.has(i)) {
        if (softmax) {
          const Real e = math::exp_negative(value[i] - greatest[i]);
          result = weight[i] * e * (slope[i] - mean[i]);
        } else {
          const Real e = math::exp_negative(value[i] < 0 ? value[i] : -value[i]);
          const Real inverse = math::reciprocal(1 + e);
          result = weight[i] * (e * inverse * inverse) * slope[i];  // p (1 - p), either way round
        }
      }
      out[i] = Store<T>::from(result);
    }
    store_run<kRun>(run + channel * own.patch_plane, own.width, out);
  }
}

template <class T>
cudaError_t start_scatter(const Fusion& q, cudaStream_t stream) {
  constexpr int kRun = 16 / sizeof(T);
  const int64_t runs = int64_t{q.patch[0]} * q.patch[1] * ((q.patch[2] + kRun - 1) / kRun);
  const int64_t blocks = (runs * q.patches + kThreads - 1) / kThreads;
  if (blocks == 0 || q.channels == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(q.activation == Activation::none ? scatter<T> : scatter_activated<T>,
                dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, q);
}

}  // namespace
}  // namespace voxfuse::cuda
