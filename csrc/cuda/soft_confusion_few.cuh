// Softmax over 2 to 16 classes with labels: a thread holds all classes of its voxels in registers,
// and the logits are read once.
//
// The sums of FP (and OFF, P2), to which every class of a voxel adds, live in registers. TP, FN
// and NLL receive one value a voxel, at its label: up to 4 classes they are registers too, beyond
// that one cell a thread in shared memory, where only that thread writes.
#pragma once

#include "cuda/soft_confusion_tile.cuh"

namespace voxfuse::cuda {
namespace {

// Blocks that a multiprocessor must at least be able to hold. Left alone (0), the compiler mostly
// chooses well for sm_90; for sm_80 it chooses so few registers that some spill. Where a number is
// given, it spills with fewer registers than that number leaves.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kAnyBlocks = 2, kFourBlocks = 2, kFiveOrSixBlocks = 2, kSixteenBlocks = 2;
#else
constexpr int kAnyBlocks = 0, kFourBlocks = 3, kFiveOrSixBlocks = 5, kSixteenBlocks = 3;
#endif

template <class T, int kClasses>
struct FewShape {
  static constexpr int kThreads = kClasses <= 4 ? 256 : 128;
  static constexpr bool kCells = kClasses > 4;
  // Beyond 8, a kernel serves an even number of classes and the odd one below.
  static constexpr int kSure = kClasses <= 8 ? kClasses : kClasses - 1;
};

template <class T, int kClasses, bool kFull>
struct FewForward : FewShape<T, kClasses> {
  // Voxels of a thread: as many as leave registers for enough warps to hide the latencies.
  static constexpr int kVoxels = kClasses == 2 ? 8 : kFull && kClasses > 8 ? 2 : 4;
  static constexpr int blocks() {
    if (kFull) return kClasses <= 4 ? 2 : kClasses <= 8 ? 4 : 3;
    if (kClasses == 16 && sizeof(T) == 4) return kSixteenBlocks;
    return kClasses == 4 && sizeof(T) == 2 ? kFourBlocks : kAnyBlocks;
  }
  static constexpr int kBlocks = blocks();
};

template <class T, int kClasses>
struct FewBackward : FewShape<T, kClasses> {
  static constexpr int kVoxels = kClasses == 2 ? 16 / sizeof(T) : kClasses <= 8 ? 4 : 2;
  static constexpr int blocks() {
    if (kClasses == 3 || kClasses == 4) return 3;
    if (kClasses == 5 || kClasses == 10) return kFiveOrSixBlocks;
    return kClasses == 6 && sizeof(T) == 2 ? kFiveOrSixBlocks : kAnyBlocks;
  }
  static constexpr int kBlocks = blocks();
  static constexpr int kTiles = 4;  // by one block
};

/// Beyond this, z log2(e) - max log2(e) in one rounding could be far from 0 at the maximum.
constexpr float kLargeLogit = 1e6f;

/// Moves voxel i's logits so that their maximum is 0; infinite ones count as the largest finite.
template <int kClasses, int kVoxels>
__device__ inline void center(float (&z)[kClasses][kVoxels], int i, int64_t classes) {
  float maximum = -FLT_MAX;
#pragma unroll
  for (int c = 0; c < kClasses; ++c) {
    if (c < classes) {
      z[c][i] = math::finite(z[c][i]);
      maximum = fmaxf(maximum, z[c][i]);
    }
  }
#pragma unroll
  for (int c = 0; c < kClasses; ++c) z[c][i] -= maximum;
}

template <int kClasses, int kVoxels>
__device__ inline float maximum_of(float (&z)[kClasses][kVoxels], int i, int64_t classes) {
  float maximum = z[0][i];
#pragma unroll
  for (int c = 1; c < kClasses; ++c) maximum = fmaxf(maximum, z[c][i]);
  if (!(fabsf(maximum) <= kLargeLogit)) {  // also if all are NaN
    center(z, i, classes);
    maximum = 0.0f;
  }
  return maximum;
}

/// The common case: neither weights nor voxels that are left out nor focal modulation, and logits
/// within kLargeLogit. It needs no checks a voxel, and about half the instructions.
///
/// Of two classes: the difference of the logits, and what follows from it, up to the logarithm.
struct PlainPair {
  bool positive;          // difference > 0
  float distance;         // |difference|
  float e, small, large;  // e = exp(-distance); the probabilities e / (1 + e) and 1 / (1 + e)

  __device__ explicit PlainPair(float difference) {
    positive = difference > 0.0f;
    distance = fabsf(difference);
    e = math::exp_negative_finite(-distance);
    large = math::reciprocal(1.0f + e);
    small = e * large;
  }
};

/// z[1] - z[0] of every voxel; false if one is infinite or NaN.
template <int kVoxels>
__device__ inline bool differences(const float (&z)[2][kVoxels], float (&difference)[kVoxels]) {
  float zero = 0;
#pragma unroll
  for (int i = 0; i < kVoxels; ++i) {
    difference[i] = z[1][i] - z[0][i];
    zero = fmaf(difference[i], 0.0f, zero);
  }
  return zero == 0.0f;
}

/// Maxima of every voxel's logits; false if one needs center().
template <int kClasses, int kVoxels>
__device__ inline bool maxima(const float (&z)[kClasses][kVoxels], float (&maximum)[kVoxels]) {
  bool small = true;
#pragma unroll
  for (int i = 0; i < kVoxels; ++i) {
    maximum[i] = z[0][i];
#pragma unroll
    for (int c = 1; c < kClasses; ++c) maximum[i] = fmaxf(maximum[i], z[c][i]);
    small = small && fabsf(maximum[i]) <= kLargeLogit;
  }
  return small;
}

/// Two classes are one sigmoid: of d = the other logit - the label's.
struct Pair {
  float p, complement, minus_log, minus_log_other;

  __device__ Pair(float own, float other) {
    float d = other - own;
    if (!(fabsf(d) <= FLT_MAX)) d = math::finite(other) - math::finite(own);
    const float e = math::exp_negative(-fabsf(d));
    const float large = math::reciprocal(1.0f + e), small = e * large;
    const float tail = math::minus_log1m(small);
    p = d > 0.0f ? small : large;
    complement = d > 0.0f ? large : small;
    minus_log = tail + fmaxf(d, 0.0f);
    minus_log_other = tail + fmaxf(-d, 0.0f);
  }
};

template <class T, int kClasses, bool kFull>
__global__ void __launch_bounds__(FewForward<T, kClasses, kFull>::kThreads,
                                  FewForward<T, kClasses, kFull>::kBlocks)
    few_forward(const __grid_constant__ Launched q) {
  using Shape = FewForward<T, kClasses, kFull>;
  constexpr int kVoxels = Shape::kVoxels, kThreads = Shape::kThreads, kWarps = kThreads / kWarp;
  constexpr int kSums = kFull ? 8 : 4, kMarks = kFull ? 4 : 3;
  constexpr bool kCells = Shape::kCells;
  constexpr int kOwn = kCells ? 1 : kClasses, kAll = kClasses == 2 ? 1 : kClasses;
  constexpr int kExtra = kFull ? kClasses : 1;
  VOXFUSE_SHARED(double, totals, [kClasses * kSums]);
  VOXFUSE_SHARED(float, warps, [kWarps][kClasses * kSums]);
  VOXFUSE_SHARED(float, cells, [kCells ? kMarks * kClasses * kThreads : 1]);

  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const float gamma = static_cast<float>(q.gamma);
  const bool can_be_plain = gamma == 0.0f && q.weight.data == nullptr;
  const Row row(q, blockIdx.x);
  for (int i = thread; i < kClasses * kSums; i += kThreads) {
    totals[i] = 0;
    for (int w = 0; w < kWarps; ++w) warps[w][i] = 0;
  }
  if constexpr (kCells) {
    for (int i = 0; i < kMarks * kClasses; ++i) cells[i * kThreads + thread] = 0;
  }
  __syncthreads();

  for (int64_t chunk = row.first; chunk < row.last; ++chunk) {
    float tp[kOwn] = {}, fn[kOwn] = {}, nll[kOwn] = {}, g2[kOwn] = {};
    float fp[kAll] = {}, off[kExtra] = {}, p2[kExtra] = {}, voxels = 0;
    [[maybe_unused]] float factors[2] = {0, 0};  // products of 1 + e, less 1
    const int64_t begin = chunk * q.chunk;
    const int64_t end = begin + q.chunk < q.voxels ? begin + q.chunk : q.voxels;
    for (int64_t tile = begin; tile < end; tile += kVoxels * kThreads) {
      const Span span = span_of<kVoxels>(q.input_layout, tile, q.voxels, thread, kThreads);
      float z[kClasses][kVoxels], weight[kVoxels];
      int label[kVoxels];
      load_logits<T, Shape::kSure>(q, row.sample, 0, span, z);
      const bool excluded = load_voxels<kVoxels>(q, row.sample, span, label, weight);
      if (excluded) clear_excluded(label, z);
      if constexpr (!kFull && kClasses <= 8) {
        if (can_be_plain && !excluded) {
          if constexpr (kClasses == 2) {
            float difference[kVoxels];
            if (differences(z, difference)) {
#pragma unroll
              for (int i = 0; i < kVoxels; ++i) {
                const PlainPair pair(difference[i]);
                const bool first = label[i] == 0;
                const float g0 = first ? 1.0f : 0.0f, g1 = first ? 0.0f : 1.0f;
                const float p0 = pair.positive ? pair.small : pair.large;
                const float p1 = pair.positive ? pair.large : pair.small;
                tp[0] = fmaf(g0, p0, tp[0]);
                tp[1] = fmaf(g1, p1, tp[1]);
                fn[0] = fmaf(g0, p1, fn[0]);
                fn[1] = fmaf(g1, p0, fn[1]);
                // -log p = log(1 + e), plus the distance if the label's class is the less probable
                // one. The product of all 1 + e less 1 keeps the small ones; one logarithm a chunk.
                const float far = first == pair.positive ? pair.distance : 0.0f;
                nll[0] = fmaf(g0, far, nll[0]);
                nll[1] = fmaf(g1, far, nll[1]);
                const float e0 = g0 * pair.e, e1 = g1 * pair.e;
                factors[0] = fmaf(factors[0], e0, factors[0] + e0);
                factors[1] = fmaf(factors[1], e1, factors[1] + e1);
              }
              if (fmaxf(factors[0], factors[1]) > 1e18f) {  // a factor is at most 2
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                  nll[c] += math::log1p_accurate(factors[c]);
                  factors[c] = 0;
                }
              }
              continue;
            }
          } else {
            float maximum[kVoxels];
            if (maxima(z, maximum)) {
#pragma unroll
              for (int i = 0; i < kVoxels; ++i) {
                const int y = label[i];
                const float shift = maximum[i] * math::kLog2E;
                float own = 0, others = 0, exponent = 0;
#pragma unroll
                for (int c = 0; c < kClasses; ++c) {
                  const float t = fmaf(z[c][i], math::kLog2E, -shift);
                  const float e = math::exp2_fast(t);
                  own = c == y ? e : own;
                  exponent = c == y ? t : exponent;
                  z[c][i] = c == y ? 0.0f : e;
                  others += z[c][i];
                }
                const float inverse = math::reciprocal(own + others);
#pragma unroll
                for (int c = 0; c < kClasses; ++c) fp[c] = fmaf(z[c][i], inverse, fp[c]);
                const float own_tp = own * inverse, own_fn = others * inverse;
                const float own_nll = label_minus_log(own, others, inverse, exponent);
                if constexpr (kCells) {
                  float* cell = cells + y * kThreads + thread;
                  cell[0] += own_tp;
                  cell[kClasses * kThreads] += own_fn;
                  cell[2 * kClasses * kThreads] += own_nll;
                } else {
#pragma unroll
                  for (int c = 0; c < kClasses; ++c) {
                    if (c == y) {
                      tp[c] += own_tp;
                      fn[c] += own_fn;
                      nll[c] += own_nll;
                    }
                  }
                }
              }
              continue;
            }
          }
        }
      }

#pragma unroll
      for (int i = 0; i < kVoxels; ++i) {
        const float w = weight[i];
        const int y = label[i] < 0 ? 0 : label[i];
        float own_tp, own_fn, own_nll;
        if constexpr (kClasses == 2) {
          const Pair pair(y == 0 ? z[0][i] : z[1][i], y == 0 ? z[1][i] : z[0][i]);
          own_tp = w * pair.p;
          own_fn = w * pair.complement;
          own_nll = pair.minus_log;
          if (gamma != 0.0f && y < q.focal_classes) {
            own_nll = math::focal(pair.complement, own_nll, gamma);
          }
          if constexpr (kFull) {
            const float hit = own_tp * pair.p, miss = own_fn * pair.complement;
            off[0] += y == 1 ? w * pair.minus_log_other : 0.0f;
            off[1] += y == 0 ? w * pair.minus_log_other : 0.0f;
            p2[0] += y == 0 ? hit : miss;
            p2[1] += y == 0 ? miss : hit;
          }
        } else {
          const float maximum = maximum_of(z, i, q.classes);
          const float shift = maximum * math::kLog2E;
          float own = 0, others = 0, exponent = 0, below = 0, at = 0;
#pragma unroll
          for (int c = 0; c < kClasses; ++c) {
            const float t =
                kFull ? (z[c][i] - maximum) * math::kLog2E : fmaf(z[c][i], math::kLog2E, -shift);
            const float e = math::exp2_fast(t);
            own = c == y ? e : own;
            exponent = c == y ? t : exponent;
            others += c == y ? 0.0f : e;
            if constexpr (kFull) {  // the logits are needed again
              below += z[c][i] == maximum ? 0.0f : e;
              at += z[c][i] == maximum ? 1.0f : 0.0f;
            } else {
              z[c][i] = c == y ? 0.0f : e;
            }
          }
          const float inverse = math::reciprocal(own + others), scale = w * inverse;
          if constexpr (kFull) {
            const float log_total = math::log1p_accurate(below + (at - 1.0f));
#pragma unroll
            for (int c = 0; c < kClasses; ++c) {
              const float d = z[c][i] - maximum;
              const float e = math::exp2_fast(d * math::kLog2E);
              p2[c] = fmaf(e * inverse, e * scale, p2[c]);
              fp[c] += c == y ? 0.0f : e * scale;
              off[c] += c == y ? 0.0f : math::product(w, log_total - d);
            }
          } else {
#pragma unroll
            for (int c = 0; c < kClasses; ++c) fp[c] = fmaf(z[c][i], scale, fp[c]);
          }
          own_tp = own * scale;
          own_fn = others * scale;
          own_nll = label_minus_log(own, others, inverse, exponent);
          if (gamma != 0.0f && y < q.focal_classes) {
            own_nll = math::focal(others * inverse, own_nll, gamma);
          }
        }
        own_nll *= w;
        if constexpr (kCells) {
          float* cell = cells + y * kThreads + thread;
          cell[0] += own_tp;
          cell[kClasses * kThreads] += own_fn;
          cell[2 * kClasses * kThreads] += own_nll;
          if constexpr (kFull) cell[3 * kClasses * kThreads] += w;
        } else {
#pragma unroll
          for (int c = 0; c < kClasses; ++c) {
            tp[c] += c == y ? own_tp : 0.0f;
            fn[c] += c == y ? own_fn : 0.0f;
            nll[c] += c == y ? own_nll : 0.0f;
            if constexpr (kFull) g2[c] += c == y ? w : 0.0f;
          }
        }
        if constexpr (kFull) voxels += w;
      }
    }

    if constexpr (kClasses == 2 && !kFull) {
#pragma unroll
      for (int c = 0; c < 2; ++c) nll[c] += math::log1p_accurate(factors[c]);
    }
    const auto emit = [&](int c, Sum::Column s, float value) {
      value = warp_sum(value);
      if (lane == 0) warps[warp][c * kSums + s] = value;
    };
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      if constexpr (kClasses == 2) {
        emit(1 - c, Sum::FP, fn[c]);  // the two probabilities sum to 1
      } else {
        emit(c, Sum::FP, fp[c]);
      }
      if constexpr (!kCells) {
        emit(c, Sum::TP, tp[c]);
        emit(c, Sum::FN, fn[c]);
        emit(c, Sum::NLL, nll[c]);
        if constexpr (kFull) emit(c, Sum::G2, g2[c]);
      }
      if constexpr (kFull) {
        emit(c, Sum::OFF, off[c]);
        emit(c, Sum::P2, p2[c]);
      }
    }
    if constexpr (kFull) emit(0, Sum::W, voxels);
    if constexpr (kCells) {
      __syncthreads();
      for (int r = warp; r < kMarks * kClasses; r += kWarps) {
        float value = 0;
#pragma unroll
        for (int t = 0; t < kThreads; t += kWarp) {
          value += cells[r * kThreads + t + lane];
          cells[r * kThreads + t + lane] = 0;
        }
        value = warp_sum(value);
        const int mark = r / kClasses, c = r % kClasses;
        const int s = mark == 0 ? Sum::TP : mark == 1 ? Sum::FN : mark == 2 ? Sum::NLL : Sum::G2;
        if (lane == 0) warps[0][c * kSums + s] = value;
      }
    }
    __syncthreads();
    for (int i = thread; i < kClasses * kSums; i += kThreads) {
      double sum = totals[i];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += warps[w][i];
      totals[i] = sum;
    }
    __syncthreads();
  }
  double* sums = Row(q, static_cast<unsigned>(opaque(blockIdx.x))).sums;
  for (int i = thread; i < q.classes * kSums; i += kThreads) {
    sums[i] = kFull && i % kSums == Sum::W ? totals[Sum::W] : totals[i];
  }
  VOXFUSE_SHARED(double, partial, [kThreads]);
  finish_rows<3>(q, blockIdx.x, 1, partial);
}

/// A softmax's gradient p_c (h_c - sum p h) does not change when a constant is taken off every h:
/// they are measured from the most probable class's, and h_c - base is formed before it is
/// multiplied or summed. Otherwise the small gradients of a confident prediction, right or wrong,
/// would be differences of large numbers.
template <class T, int kClasses>
__global__ void __launch_bounds__(FewBackward<T, kClasses>::kThreads,
                                  FewBackward<T, kClasses>::kBlocks)
    few_backward(const __grid_constant__ Launched q) {
  using Shape = FewBackward<T, kClasses>;
  constexpr int kVoxels = Shape::kVoxels, kThreads = Shape::kThreads;
  constexpr int kTile = kVoxels * kThreads, kBlock = kTile * Shape::kTiles;
  VOXFUSE_SHARED(float, hit, [kClasses]);
  VOXFUSE_SHARED(float, miss, [kClasses]);
  VOXFUSE_SHARED(float, nll, [kClasses]);
  VOXFUSE_SHARED(float, off, [kClasses]);
  VOXFUSE_SHARED(float, square, [kClasses]);

  const int thread = static_cast<int>(threadIdx.x);
  const unsigned blocks = static_cast<unsigned>((q.voxels + kBlock - 1) / kBlock);
  const int64_t b = blockIdx.x / blocks, begin = int64_t{blockIdx.x % blocks} * kBlock;
  if (thread < kClasses) {
    math::Slope<float> slope{};
    if (thread < q.classes) {
      const double* cotangents = q.cotangents + (b * q.classes + thread) * q.columns;
      slope = math::Slope<float>(cotangents, q.columns == FULL);
    }
    hit[thread] = slope.hit;
    miss[thread] = slope.miss;
    nll[thread] = slope.nll;
    off[thread] = slope.off;
    square[thread] = slope.square;
  }
  __syncthreads();
  const bool full = q.columns == FULL;
  const float gamma = static_cast<float>(q.gamma);
  const bool can_be_plain = !full && gamma == 0.0f && q.weight.data == nullptr;

  const int64_t end = begin + kBlock < q.voxels ? begin + kBlock : q.voxels;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const Span span = span_of<kVoxels>(q.input_layout, tile, q.voxels, thread, kThreads);
    float z[kClasses][kVoxels], weight[kVoxels];
    int label[kVoxels];
    load_logits<T, Shape::kSure>(q, b, 0, span, z);
    const bool excluded = load_voxels<kVoxels>(q, b, span, label, weight);
    if (excluded) clear_excluded(label, z);
    if (can_be_plain && !excluded) {
      if constexpr (kClasses == 2) {
        float difference[kVoxels];
        if (differences(z, difference)) {
          const float h0 = hit[0] - miss[1], h1 = hit[1] - miss[0], l0 = nll[0], l1 = nll[1];
#pragma unroll
          for (int i = 0; i < kVoxels; ++i) {
            const PlainPair pair(difference[i]);
            const bool first = label[i] == 0, wrong = first == pair.positive;
            const float p = wrong ? pair.small : pair.large;
            const float complement = wrong ? pair.large : pair.small;
            const float value = complement * fmaf(p, first ? h0 : h1, first ? -l0 : -l1);
            z[0][i] = first ? value : -value;
            z[1][i] = -z[0][i];
          }
          store_gradient<T, Shape::kSure>(q, b, 0, span, z);
          continue;
        }
      } else {
        float maximum[kVoxels];
        if (maxima(z, maximum)) {
#pragma unroll
          for (int i = 0; i < kVoxels; ++i) {
            const int y = label[i];
            const float shift = maximum[i] * math::kLog2E;
            const float at_maximum = math::exp2_fast(fmaf(maximum[i], math::kLog2E, -shift));
            float own = 0, others = 0, sum = 0;
            int best = 0;
#pragma unroll
            for (int c = 0; c < kClasses; ++c) {
              const float e = math::exp2_fast(fmaf(z[c][i], math::kLog2E, -shift));
              own = c == y ? e : own;
              others += c == y ? 0.0f : e;
              best = e == at_maximum ? c : best;
              z[c][i] = e;
            }
            const float base = best == y ? hit[best] : miss[best];
            const float inverse = math::reciprocal(own + others);
#pragma unroll
            for (int c = 0; c < kClasses; ++c) {
              sum = fmaf(z[c][i], (c == y ? hit[c] : miss[c]) - base, sum);
            }
            const float p = own * inverse, complement = others * inverse, mean = sum * inverse;
            const float u = -nll[y];
            const float at_label = fmaf(p, hit[y] - base - mean, u * complement);
            const float away = mean + u;
#pragma unroll
            for (int c = 0; c < kClasses; ++c) {
              const float value = z[c][i] * inverse * ((miss[c] - base) - away);
              z[c][i] = c == y ? at_label : value;
            }
          }
          store_gradient<T, Shape::kSure>(q, b, 0, span, z);
          continue;
        }
      }
    }

    if constexpr (kClasses == 2) {
#pragma unroll
      for (int i = 0; i < kVoxels; ++i) {
        const bool first = label[i] <= 0;
        const Pair pair(first ? z[0][i] : z[1][i], first ? z[1][i] : z[0][i]);
        float h = first ? hit[0] - miss[1] : hit[1] - miss[0];
        const float l = first ? nll[0] : nll[1];
        float value = 0;
        if (full) {
          h += pair.p * (first ? square[0] : square[1]) -
               pair.complement * (first ? square[1] : square[0]);
          value = pair.p * (first ? off[1] : off[0]);
        }
        float u = -l;
        if (gamma != 0.0f && (first ? 0 : 1) < q.focal_classes)
          u = l * math::focal_slope(pair.p, pair.complement, pair.minus_log, gamma);
        value = weight[i] * (fmaf(pair.complement, fmaf(pair.p, h, u), value));
        z[0][i] = first ? value : -value;
        z[1][i] = first ? -value : value;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVoxels; ++i) {
        const int y = label[i] < 0 ? 0 : label[i];
        const float maximum = maximum_of(z, i, q.classes);
        const float shift = maximum * math::kLog2E;
        const float at_maximum = math::exp2_fast(fmaf(maximum, math::kLog2E, -shift));
        float own = 0, others = 0, exponent = 0, sum = 0;
        int best = 0;
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          const float t = fmaf(z[c][i], math::kLog2E, -shift);
          const float e = math::exp2_fast(t);
          own = c == y ? e : own;
          exponent = c == y ? t : exponent;
          others += c == y ? 0.0f : e;
          best = e == at_maximum ? c : best;
          z[c][i] = e;
        }
        const float inverse = math::reciprocal(own + others), scale = weight[i] * inverse;
        const float base = best == y ? hit[best] : miss[best];
        // Of the other classes than the most probable one: exponentials, and OFF's cotangents.
        float below = 0, rest_of_best = 0, rest = 0, square_of_best = 0;
        if (full) {
#pragma unroll
          for (int c = 0; c < kClasses; ++c) {
            below += c == best ? 0.0f : z[c][i];
            rest_of_best += c == best || c == y ? 0.0f : off[c];
          }
          rest = rest_of_best + (best == y ? 0.0f : off[best]);
          square_of_best = square[best] * (at_maximum * inverse);
        }
        const auto square_difference = [&](int c) {
          return c == best ? 0.0f : fmaf(square[c], z[c][i] * inverse, -square_of_best);
        };
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          float h = (c == y ? hit[c] : miss[c]) - base;
          if (full) h += square_difference(c);
          sum = fmaf(z[c][i], h, sum);
        }
        const float p = own * inverse, complement = others * inverse, mean = sum * inverse;
        float u = -nll[y];
        if (gamma != 0.0f && y < q.focal_classes) {
          const float minus_log = label_minus_log(own, others, inverse, exponent);
          u = nll[y] * math::focal_slope(p, complement, minus_log, gamma);
        }
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          float h = (c == y ? hit[c] : miss[c]) - base;
          if (full) h += square_difference(c);
          h -= mean;
          float value = 0;
          if (c == y) {
            value = weight[i] * fmaf(p, h + rest, u * complement);
          } else {
            // u_c (1 - p_c) - p_c times the others' u: the most probable class's own u must not
            // be among the others'.
            value = z[c][i] * scale * (h - (u - (c == best ? rest_of_best : rest)));
            if (full) value = fmaf(-off[c], c == best ? below * scale : weight[i], value);
          }
          z[c][i] = value;
        }
      }
    }
    if (excluded) clear_excluded(label, z);
    store_gradient<T, Shape::kSure>(q, b, 0, span, z);
  }
}

}  // namespace
}  // namespace voxfuse::cuda
