// Sigmoid or no activation: the classes do not know of each other, so that a block works on one
// class of one row. Labels and weights are read once a class; the blocks of the classes of a row
// are neighbours, and find them in the L2 cache.
#pragma once

#include "cuda/soft_confusion_tile.cuh"

namespace voxfuse::cuda {
namespace {

constexpr int kSeparateThreads = 256;

// Blocks of the forward pass that a multiprocessor must at least be able to hold. Left alone (0),
// the compiler takes so few registers for sm_80 that some spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kForwardBlocks = 4;
#else
constexpr int kForwardBlocks = 0;
#endif

template <class T>
constexpr int kSeparateVoxels = 16 / static_cast<int>(sizeof(T));

constexpr int kNone = static_cast<int>(Activation::none);
constexpr int kSigmoid = static_cast<int>(Activation::sigmoid);

/// Whether the foreground indicator of a single class is to be left out: the ignored value, and
/// integers that are neither 0 nor 1.
template <class Bits>
__device__ inline bool indicator_excluded(Bits raw, const Launched& q) {
  if (!is_floating(q.target.type)) {
    return raw > Bits(1) || (q.has_ignore && static_cast<int64_t>(raw) == q.ignore_index);
  }
  const auto x = floating(q.target.type, raw);
  using Real = decltype(x + x);
  // The conversion is defined only inside the range of int64.
  if (!q.has_ignore || !(x > Real(-9.2e18) && x < Real(9.2e18))) return false;
  const int64_t value = static_cast<int64_t>(x);
  return value == q.ignore_index && static_cast<Real>(value) == x;
}

/// The dense target of class c at a thread's voxels.
template <class Real, int kVoxels>
__device__ inline void load_dense(const Launched& q, int64_t b, int64_t c, const Span& span,
                                  Real (&g)[kVoxels], bool (&excluded)[kVoxels]) {
  with_bits(q.target.type, [&](auto zero) {
    decltype(zero) raw[kVoxels];
    load_bits(q.target, b, c, span, raw);
    numbers(q.target.type, raw, g);
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) {
      excluded[i] = q.classes == 1 && indicator_excluded(raw[i], q);
    }
  });
}

/// Target values of class c and weights; both are 0 for voxels that are left out.
template <int kVoxels>
__device__ inline void load_class(const Launched& q, int64_t b, int c, const Span& span,
                                  float (&g)[kVoxels], float (&weight)[kVoxels]) {
  if (q.dense) {
    bool excluded[kVoxels];
    load_dense(q, b, c, span, g, excluded);
    load_weights(q, b, span, weight);
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) {
      if (excluded[i] || !span.holds(i)) weight[i] = 0;
      if (weight[i] == 0.0f) g[i] = 0;
    }
  } else {
    int label[kVoxels];
    load_voxels<kVoxels>(q, b, span, label, weight);
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) g[i] = label[i] == c ? 1.0f : 0.0f;
  }
}

/// The logits of one class: as load_logits, but a class's voxels are never interleaved here.
template <class T, int kVoxels>
__device__ inline void load_plane(const Launched& q, int64_t b, int c, const Span& span,
                                  float (&z)[kVoxels]) {
  T raw[kVoxels];
  const auto* base =
      static_cast<const T*>(q.input.data) + b * q.input.stride.batch + c * q.input.stride.channel;
  load_span<kVoxels>(base, q.input.stride.voxel, span.step == 1, span, raw);
#pragma unroll
  for (int i = 0; i < kVoxels; ++i) z[i] = to_float(raw[i]);
}

template <int kActivation, class Real>
__device__ inline math::Probability<Real> probability(Real z) {
  return kActivation == kSigmoid ? math::sigmoid(z) : math::plain(z);
}

template <class T, int kActivation, bool kFull>
__global__ void __launch_bounds__(kSeparateThreads, sizeof(T) == 2 ? 3 : kForwardBlocks)
    separate_forward(const __grid_constant__ Launched q) {
  constexpr int kVoxels = kSeparateVoxels<T>, kSums = kFull ? 8 : 4;
  constexpr int kWarps = kSeparateThreads / kWarp;
  VOXFUSE_SHARED(float, warps, [kWarps][kSums]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const unsigned classes = static_cast<unsigned>(q.classes);
  const int c = static_cast<int>(blockIdx.x % classes);
  const Row row(q, blockIdx.x / classes);
  const float gamma = gamma_of<float>(q, c);
  double total = 0;  // of sum `thread`

  for (int64_t chunk = row.first; chunk < row.last; ++chunk) {
    float sums[kSums] = {};
    const int64_t begin = chunk * q.chunk;
    const int64_t end = begin + q.chunk < q.voxels ? begin + q.chunk : q.voxels;
    for (int64_t tile = begin; tile < end; tile += kVoxels * kSeparateThreads) {
      const Span span = span_of<kVoxels>(q.input_layout, tile, q.voxels, thread, kSeparateThreads);
      float z[kVoxels], g[kVoxels], weight[kVoxels];
      load_plane<T, kVoxels>(q, row.sample, c, span, z);
      load_class<kVoxels>(q, row.sample, c, span, g, weight);
#pragma unroll
      for (int i = 0; i < kVoxels; ++i) {
        const float w = weight[i];
        const auto r = probability<kActivation>(w == 0.0f ? 0.5f : z[i]);
        const auto o = math::overlap(r, g[i], q.overlap == Overlap::min);
        sums[Sum::TP] = fmaf(w, o.tp, sums[Sum::TP]);
        sums[Sum::FP] = fmaf(w, o.fp, sums[Sum::FP]);
        sums[Sum::FN] = fmaf(w, o.fn, sums[Sum::FN]);
        sums[Sum::NLL] += w * math::product(g[i], math::focal(r.complement, r.minus_log, gamma));
        if constexpr (kFull) {
          const float off = math::focal(r.p, r.minus_log_complement, gamma);
          sums[Sum::OFF] += w * math::product(1.0f - g[i], off);
          sums[Sum::P2] = fmaf(w, r.p * r.p, sums[Sum::P2]);
          sums[Sum::G2] = fmaf(w, g[i] * g[i], sums[Sum::G2]);
          sums[Sum::W] += w;
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const float sum = warp_sum(sums[s]);
      if (lane == 0) warps[warp][s] = sum;
    }
    __syncthreads();
    if (thread < kSums) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += warps[w][thread];
    }
    __syncthreads();
  }
  if (thread < kSums) row.sums[c * kSums + thread] = total;
  VOXFUSE_SHARED(double, partial, [kSeparateThreads]);
  finish_rows(q, blockIdx.x, classes, partial);
}

/// Gradient of the likelihood terms of a sigmoid or of plain probabilities.
template <int kActivation, class Real>
__device__ inline Real separate_likelihood(const math::Probability<Real>& r, Real g,
                                           const math::Slope<Real>& slope, Real gamma, bool full) {
  constexpr bool sigmoid = kActivation == kSigmoid;
  Real value = math::likelihood_slope(slope.nll * g, r.p, r.complement, r.minus_log, gamma,
                                      sigmoid ? r.complement : math::reciprocal(r.p));
  if (full) {
    value -=
        math::likelihood_slope(slope.off * (Real(1) - g), r.complement, r.p, r.minus_log_complement,
                               gamma, sigmoid ? r.p : math::reciprocal(r.complement));
  }
  return value;
}

constexpr int kSeparateTiles = 4;  // of a block of the backward pass

template <class T, int kActivation>
__global__ void __launch_bounds__(kSeparateThreads, sizeof(T) == 2 ? 3 : 6)
    separate_backward(const __grid_constant__ Launched q) {
  constexpr int kVoxels = kSeparateVoxels<T>;
  constexpr int kTile = kVoxels * kSeparateThreads, kBlock = kTile * kSeparateTiles;
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned classes = static_cast<unsigned>(q.classes);
  const unsigned blocks = static_cast<unsigned>((q.voxels + kBlock - 1) / kBlock);
  const int c = static_cast<int>(blockIdx.x % classes);
  const int64_t b = blockIdx.x / classes / blocks;
  const int64_t begin = int64_t{blockIdx.x / classes % blocks} * kBlock;
  const int64_t end = begin + kBlock < q.voxels ? begin + kBlock : q.voxels;
  const bool full = q.columns == FULL;
  const math::Slope<float> slope(q.cotangents + (b * q.classes + c) * q.columns, full);
  const float gamma = gamma_of<float>(q, c);
  auto* gradient =
      static_cast<T*>(q.gradient) + b * q.gradient_stride.batch + c * q.gradient_stride.channel;

  for (int64_t tile = begin; tile < end; tile += kTile) {
    const Span span = span_of<kVoxels>(q.input_layout, tile, q.voxels, thread, kSeparateThreads);
    float z[kVoxels], g[kVoxels], weight[kVoxels];
    load_plane<T, kVoxels>(q, b, c, span, z);
    load_class<kVoxels>(q, b, c, span, g, weight);
    T out[kVoxels];
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) {
      const float w = weight[i];
      const auto r = probability<kActivation>(w == 0.0f ? 0.5f : z[i]);
      const float a = math::overlap_slope(r, g[i], q.overlap == Overlap::min);
      float h = math::slope_of_p(slope, a, r.p);
      if (kActivation == kSigmoid) h *= r.p * r.complement;
      h += separate_likelihood<kActivation>(r, g[i], slope, gamma, full);
      out[i] = Store<T>::from(w == 0.0f ? 0.0f : w * h);
    }
    if (q.gradient_layout == Layout::kPlanar && span.step == 1 &&
        span.first + kVoxels <= span.end) {
      store_vector<kVoxels>(gradient + span.first, out);
    } else {
#pragma unroll
      for (int i = 0; i < kVoxels; ++i) {
        if (span.holds(i)) gradient[span.voxel(i) * q.gradient_stride.voxel] = out[i];
      }
    }
  }
}

}  // namespace
}  // namespace voxfuse::cuda
