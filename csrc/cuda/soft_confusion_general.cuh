// Everything that has no kernel of its own: dense targets under a softmax, two different
// activations, float64, more than 256 classes, samples in which some classes are not annotated
// (kPartial). The logits of a tile of voxels are walked through more than once; after the first
// time they come from the caches.
#pragma once

#include "cuda/soft_confusion_separate.cuh"

namespace voxfuse::cuda {
namespace {

constexpr int kGeneralThreads = 256;
template <bool kPartial>
constexpr int kGeneralTile = kPartial ? 512 : 1024;  // voxels of the forward pass

/// Blocks that a multiprocessor is to hold.
template <class T, bool kPartial>
constexpr int kGeneralBlocks = sizeof(T) == 8 || kPartial ? 2 : 4;

/// Which classes of a sample are annotated; without kPartial all are.
template <bool kPartial>
struct Classes {
  const uint8_t* annotated = nullptr;
  bool merges = false;

  __device__ Classes(const Launched& q, int64_t b) {
    if constexpr (kPartial) {
      annotated = q.annotated + b * q.classes;
      merges = q.unlabelled == Unlabelled::background;
    }
  }
  /// Where classes are merged, the background is there whatever is said of it.
  __device__ bool leave_out(int c) const {
    if constexpr (kPartial) return annotated[c] == 0 && !(merges && c == 0);
    return false;
  }
  __device__ bool merge(int c) const {
    if constexpr (kPartial) return merges && (c == 0 || annotated[c] == 0);
    return false;
  }
};

/// What the classes that are merged into the background make of its logit: log(total), measured, as
/// all logits then are, from the largest of theirs.
template <class Real, bool kPartial>
struct Merged {};
template <class Real>
struct Merged<Real, true> {
  Real from, total;
};

/// The logits of one voxel as its softmax sees them.
template <class T, bool kPartial>
struct Logits : Merged<typename Compute<T>::Real, kPartial> {
  using Real = typename Compute<T>::Real;
  using Merge = Merged<Real, kPartial>;
  const T* data;
  int64_t stride;
  Classes<kPartial> which;

  __device__ Logits(const T* first, int64_t step, const Classes<kPartial>& w, const Merge& merged)
      : Merge(merged), data(first), stride(step), which(w) {}
  __device__ Logits(const T* first, int64_t step, const Classes<kPartial>& w, int classes)
      : Merge{}, data(first), stride(step), which(w) {
    if constexpr (kPartial) {
      if (!which.merges) return;
      this->from = -math::largest(Real(0));
      for (int c = 0; c < classes; ++c) {
        if (which.merge(c) && !(finite(c) <= this->from)) this->from = finite(c);  // NaN stays
      }
      for (int c = 0; c < classes; ++c) {
        if (which.merge(c)) this->total += math::exp_negative(finite(c) - this->from);
      }
    }
  }
  __device__ Real given(int c) const { return Convert<Real>::from(data[c * stride]); }
  __device__ Real finite(int c) const { return math::finite(given(c)); }
  __device__ Real operator()(int c) const {
    if constexpr (kPartial) {
      if (which.merges) return c == 0 ? math::log_accurate(this->total) : finite(c) - this->from;
    }
    return given(c);
  }
  /// d/dz of a logit that is part of the background's, where d is the derivative at that.
  __device__ Real share(Real d, int c) const {
    if constexpr (kPartial) {
      return math::product(d, math::exp_negative(finite(c) - this->from) / this->total);
    }
    return d;
  }
};

/// The softmax of one voxel without its classes: what is needed to evaluate any of them.
template <class Real, bool kPartial>
struct Softmax : Merged<Real, kPartial> {
  Real maximum, inverse, complement_at_maximum, log_total;
  int at;  // first class with the maximum, of those that count

  template <class T>
  __device__ void read(const Logits<T, kPartial>& logits, int classes) {
    static_cast<Merged<Real, kPartial>&>(*this) = logits;
    maximum = -math::largest(Real(0));
    at = 0;
    if constexpr (kPartial) {
      while (at + 1 < classes && logits.which.leave_out(at)) ++at;
    }
    bool nan = false;
    for (int c = 0; c < classes; ++c) {
      if (logits.which.leave_out(c)) continue;
      const Real z = math::finite(logits(c));
      nan = nan || z != z;
      if (z > maximum) {
        maximum = z;
        at = c;
      }
    }
    Real others = 0;
    for (int c = 0; c < classes; ++c) {
      if (logits.which.leave_out(c)) continue;
      const Real z = math::finite(logits(c));
      if (c != at) others += math::exp_negative(z - maximum);
    }
    if (nan) maximum = others = static_cast<Real>(NAN);
    inverse = Real(1) / (Real(1) + others);
    complement_at_maximum = others * inverse;
    log_total = math::log1p_accurate(others);
  }

  __device__ math::Probability<Real> of(Real logit, int c) const {
    const Real z = math::finite(logit);
    const Real p = math::exp_negative(z - maximum) * inverse;
    const Real complement = c == at ? complement_at_maximum : Real(1) - p;
    return {p, complement, (maximum - z) + log_total, Real(0)};
  }
};

template <class Real, bool kPartial>
__device__ inline math::Probability<Real> evaluate(Activation activation,
                                                   const Softmax<Real, kPartial>& softmax, Real z,
                                                   int c) {
  if (activation == Activation::softmax) return softmax.of(z, c);
  return activation == Activation::sigmoid ? math::sigmoid(z) : math::plain(z);
}

/// Target and weight of one voxel and class; a weight of 0 says that it is left out.
template <class Real, bool kPartial>
__device__ inline Real load_one(const Launched& q, const Classes<kPartial>& which, int64_t b, int c,
                                int64_t voxel, Real& g) {
  const Span span{voxel, q.voxels, kGeneralThreads};  // a step that never asks for vectors
  Real weight[1];
  load_weights(q, b, span, weight);
  const Real w = weight[0];
  if (q.dense) {
    Real value[1];
    bool excluded[1];
    load_dense(q, b, c, span, value, excluded);
    g = value[0];
    if constexpr (kPartial) {
      for (int u = 1; c == 0 && which.merges && u < q.classes; ++u) {
        if (!which.merge(u)) continue;
        bool unused[1];
        load_dense(q, b, u, span, value, unused);
        g += value[0];
      }
    }
    return excluded[0] ? Real(0) : w;
  }
  int label[1];
  load_labels(q, b, span, label);
  if constexpr (kPartial) {
    if (label[0] >= 0 && which.leave_out(label[0])) label[0] = which.merges ? 0 : -1;
  }
  g = label[0] == c ? Real(1) : Real(0);
  return label[0] < 0 ? Real(0) : w;
}

template <class T, bool kPartial>
__global__ void __launch_bounds__(kGeneralThreads, kGeneralBlocks<T, kPartial>)
    general_forward(const __grid_constant__ Launched q) {
  using Real = typename Compute<T>::Real;
  constexpr int kTile = kGeneralTile<kPartial>;
  using SoftmaxOf = Softmax<Real, kPartial>;
  VOXFUSE_SHARED(SoftmaxOf, softmax, [kTile]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  constexpr int kWarps = kGeneralThreads / kWarp;
  const int classes = static_cast<int>(q.classes);
  const Row row(q, blockIdx.x);
  const Classes<kPartial> which(q, row.sample);
  const auto* input = static_cast<const T*>(q.input.data) + row.sample * q.input.stride.batch;
  const bool any_softmax =
      q.activation == Activation::softmax || q.likelihood == Activation::softmax;
  // A class belongs to one warp, and its sums to that warp's first lane.
  for (int c = warp; c < classes; c += kWarps) {
    if (lane < q.columns) row.sums[int64_t{c} * q.columns + lane] = 0;
  }
  __syncwarp();

  const int64_t last = row.last * q.chunk < q.voxels ? row.last * q.chunk : q.voxels;
  for (int64_t tile = row.first * q.chunk; tile < last; tile += kTile) {
    const int count = static_cast<int>(last - tile < kTile ? last - tile : kTile);
    if (any_softmax) {
      __syncthreads();
      for (int i = thread; i < count; i += kGeneralThreads) {
        const T* voxel = input + (tile + i) * q.input.stride.voxel;
        softmax[i].read(Logits<T, kPartial>(voxel, q.input.stride.channel, which, classes),
                        classes);
      }
      __syncthreads();
    }
    for (int c = warp; c < classes; c += kWarps) {
      if (which.leave_out(c)) continue;
      const Real gamma = gamma_of<Real>(q, c);
      Real sums[8] = {};
      for (int i = lane; i < count; i += kWarp) {
        Real g;
        const Real w = load_one<Real>(q, which, row.sample, c, tile + i, g);
        if (w == Real(0)) continue;
        const T* voxel = input + (tile + i) * q.input.stride.voxel;
        const Real z = Logits<T, kPartial>(voxel, q.input.stride.channel, which, softmax[i])(c);
        const auto p = evaluate<Real>(q.activation, softmax[i], z, c);
        const auto r =
            q.likelihood == q.activation ? p : evaluate<Real>(q.likelihood, softmax[i], z, c);
        const auto o = math::overlap(p, g, q.overlap == Overlap::min);
        sums[Sum::TP] += w * o.tp;
        sums[Sum::FP] += w * o.fp;
        sums[Sum::FN] += w * o.fn;
        sums[Sum::NLL] += w * math::product(g, math::focal(r.complement, r.minus_log, gamma));
        if (q.columns == FULL) {
          const Real off = q.likelihood == Activation::softmax
                               ? r.minus_log
                               : math::focal(r.p, r.minus_log_complement, gamma);
          sums[Sum::OFF] += w * math::product(Real(1) - g, off);
          sums[Sum::P2] += w * p.p * p.p;
          sums[Sum::G2] += w * g * g;
          sums[Sum::W] += w;
        }
      }
      double* out = row.sums + int64_t{c} * q.columns;
#pragma unroll
      for (int s = 0; s < 8; ++s) {
        if (s < q.columns) {
          const Real sum = warp_sum(sums[s]);
          if (lane == s) out[s] += sum;
        }
      }
    }
  }
  VOXFUSE_SHARED(double, partial, [kGeneralThreads]);
  finish_rows(q, blockIdx.x, 1, partial);
}

template <class T, bool kPartial>
__global__ void __launch_bounds__(kGeneralThreads, kGeneralBlocks<T, kPartial>)
    general_backward(const __grid_constant__ Launched q) {
  using Real = typename Compute<T>::Real;
  const int classes = static_cast<int>(q.classes);
  const unsigned blocks = static_cast<unsigned>((q.voxels + kGeneralThreads - 1) / kGeneralThreads);
  const int64_t b = blockIdx.x / blocks;
  const int64_t voxel = int64_t{blockIdx.x % blocks} * kGeneralThreads + threadIdx.x;
  if (voxel >= q.voxels) return;
  const bool full = q.columns == FULL;
  const auto* input =
      static_cast<const T*>(q.input.data) + b * q.input.stride.batch + voxel * q.input.stride.voxel;
  auto* gradient =
      static_cast<T*>(q.gradient) + b * q.gradient_stride.batch + voxel * q.gradient_stride.voxel;
  const Classes<kPartial> which(q, b);

  Real g;
  if (load_one<Real>(q, which, b, 0, voxel, g) == Real(0)) {
    for (int c = 0; c < classes; ++c) gradient[c * q.gradient_stride.channel] = T(0.0f);
    return;
  }
  const Logits<T, kPartial> logits(input, q.input.stride.channel, which, classes);
  Softmax<Real, kPartial> softmax{};
  math::Slope<Real> best_slope{};
  Real a_best = 0, p_best = 0, mean = 0;    // of the overlap's slopes
  Real u_best = 0, total_without_best = 0;  // of the likelihood's
  const auto slope_of = [&](int c) {
    return math::Slope<Real>(q.cotangents + (b * q.classes + c) * q.columns, full);
  };
  const auto difference = [&](int c, const math::Slope<Real>& slope,
                              const math::Probability<Real>& p) {
    if (c == softmax.at) return Real(0);
    return math::slope_difference(slope, math::overlap_slope(p, g, q.overlap == Overlap::min), p.p,
                                  best_slope.hit, best_slope.miss, a_best,
                                  best_slope.square * p_best);
  };
  if (q.activation == Activation::softmax || q.likelihood == Activation::softmax) {
    softmax.read(logits, classes);
    load_one<Real>(q, which, b, softmax.at, voxel, g);
    best_slope = slope_of(softmax.at);
    const auto best = softmax.of(logits(softmax.at), softmax.at);
    a_best = math::overlap_slope(best, g, q.overlap == Overlap::min);
    p_best = best.p;
    for (int c = 0; c < classes; ++c) {
      if (which.leave_out(c)) continue;
      load_one<Real>(q, which, b, c, voxel, g);
      const auto p = softmax.of(logits(c), c);
      const math::Slope<Real> slope = slope_of(c);
      if (q.activation == Activation::softmax) mean += p.p * difference(c, slope, p);
      if (q.likelihood == Activation::softmax) {
        const Real u = math::likelihood_share(slope, p, g, gamma_of<Real>(q, c), full);
        if (c == softmax.at) {
          u_best = u;
        } else {
          total_without_best += u;
        }
      }
    }
  }
  Real background = 0;  // the gradient at its logit, of which merged classes have their shares
  for (int c = 0; c < classes; ++c) {
    if (which.leave_out(c)) {
      const Real part = which.merges ? logits.share(background, c) : Real(0);
      gradient[c * q.gradient_stride.channel] = Store<T>::from(part);
      continue;
    }
    const Real w = load_one<Real>(q, which, b, c, voxel, g), z = logits(c);
    const math::Slope<Real> slope = slope_of(c);
    const Real gamma = gamma_of<Real>(q, c);
    const auto p = evaluate<Real>(q.activation, softmax, z, c);
    Real value;
    if (q.activation == Activation::softmax) {
      value = p.p * (difference(c, slope, p) - mean);
    } else {
      value = math::slope_of_p(slope, math::overlap_slope(p, g, q.overlap == Overlap::min), p.p);
      if (q.activation == Activation::sigmoid) value *= p.p * p.complement;
    }
    const auto r = q.likelihood == q.activation ? p : evaluate<Real>(q.likelihood, softmax, z, c);
    if (q.likelihood == Activation::softmax) {
      const Real u = math::likelihood_share(slope, r, g, gamma, full);
      const Real others = c == softmax.at ? total_without_best : (total_without_best - u) + u_best;
      value += u * r.complement - r.p * others;
    } else if (q.likelihood == Activation::sigmoid) {
      value += separate_likelihood<kSigmoid>(r, g, slope, gamma, full);
    } else {
      value += separate_likelihood<kNone>(r, g, slope, gamma, full);
    }
    value *= w;
    if constexpr (kPartial) {
      if (c == 0 && which.merges) {
        background = value;
        value = logits.share(background, 0);
      }
    }
    gradient[c * q.gradient_stride.channel] = Store<T>::from(value);
  }
}

}  // namespace
}  // namespace voxfuse::cuda
