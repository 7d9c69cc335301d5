// Activations of patches. Part of overlap_add.cu.
//
// The softmax of a patch needs the greatest value and the sum over the channels of each of its
// voxels. With few channels a thread works them out whenever it adds a patch's run, from what the
// caches hold of it; with more they are two numbers a voxel, which a launch before works out.
#pragma once

#include <cmath>

#include "cuda/overlap_add_patch.cuh"
#include "math/confusion.h"

namespace voxfuse::cuda {
namespace {

/// What a softmax over the channels needs of a run of voxels: exp(z - greatest) * inverse.
template <class Real, int kRun>
struct Softmax {
  Real greatest[kRun], inverse[kRun];
};

/// Walks through the channels of a run, whose first voxel is at `run` in the first one, a few at a
/// time: `visit` gets (first channel, how many, factors, exponentials). Exponentials are of the
/// distance to the greatest value so far; by the factors what came before is scaled.
template <class Real, int kRun, class T, class Visit>
__device__ inline Softmax<Real, kRun> softmax_of(const T* run, int64_t plane, int64_t channels,
                                                 int first, int last, const Visit& visit) {
  constexpr int kTile = kChannels<T>;
  Real greatest[kRun], sum[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    greatest[i] = -INFINITY;
    sum[i] = 0;
  }
  for (int64_t channel = 0; channel < channels; channel += kTile) {
    const int copies = static_cast<int>(channels - channel < kTile ? channels - channel : kTile);
    Real value[kTile][kRun], factor[kRun];
#pragma unroll
    for (int c = 0; c < kTile; ++c) {
      if (c < copies) {
        load_run<Real, kRun>(run + (channel + c) * plane, first, last, value[c]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      Real top = greatest[i];
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        if (c < copies) top = value[c][i] > top ? value[c][i] : top;
      }
      // Channels of -infinity before the first number weigh nothing.
      const Real shift = top == -INFINITY ? Real(0) : top;
      factor[i] = math::exp_negative(greatest[i] - shift);
      greatest[i] = top;
      sum[i] *= factor[i];
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        if (c >= copies) continue;
        value[c][i] = math::exp_negative(value[c][i] - shift);
        sum[i] += value[c][i];
      }
    }
    visit(channel, copies, factor, value);
  }
  Softmax<Real, kRun> result;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    result.greatest[i] = greatest[i];
    result.inverse[i] = math::reciprocal(sum[i]);
  }
  return result;
}

/// For a softmax of which nothing else is asked.
struct Nothing {
  template <class... Given>
  __device__ void operator()(const Given&...) const {}
};

template <class Real>
__device__ inline Real sigmoid_of(Real z) {
  const Real e = math::exp_negative(z < 0 ? z : -z);  // NaN takes the second branch and stays
  return math::sigmoid(z, e, 1 + e, math::reciprocal(1 + e)).p;  // without its logarithms
}

/// The maximum and one over the sum of the softmax at every voxel of the patches, for `gather`.
template <class T>
__global__ void __launch_bounds__(kThreads) normalise(const __grid_constant__ Fusion q) {
  using Real = typename Compute<T>::Real;
  constexpr int kRun = 16 / sizeof(T);
  const int64_t plane = int64_t{q.patch[0]} * q.patch[1] * q.patch[2];
  const int64_t runs = (plane + kRun - 1) / kRun;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= runs * q.patches) return;
  const int64_t patch = index / runs, voxel = index % runs * kRun;
  const int width = plane - voxel < kRun ? static_cast<int>(plane - voxel) : kRun;
  const T* run = static_cast<const T*>(q.source) + patch * q.channels * plane + voxel;
  const Softmax<Real, kRun> softmax =
      softmax_of<Real, kRun>(run, plane, q.channels, 0, width, Nothing{});
  Real* target = static_cast<Real*>(q.softmax) + 2 * patch * plane + voxel;
  store_run<kRun>(target, width, softmax.greatest);
  store_run<kRun>(target + plane, width, softmax.inverse);
}

}  // namespace
}  // namespace voxfuse::cuda
