// Softmax over 17 to 256 classes with labels: the warps of a block share the classes of one tile
// of voxels, each holding kClasses of them in registers, so that the logits are read once. Maxima
// and sums meet in shared memory.
#pragma once

#include "cuda/soft_confusion_tile.cuh"

namespace voxfuse::cuda {
namespace {

constexpr int kManyWarps = 16;  // at most, in a block

template <int kClasses>
struct ManyShape {
  static constexpr int kVoxels = 32 / kClasses;  // of a thread
  static constexpr int kTile = kVoxels * kWarp;
  static constexpr int kTiles = 8;  // of a block of the backward pass
};

/// What the warps tell each other about the voxels of a tile.
template <int kTile>
struct ManyShared {
  float maximum[kManyWarps][kTile];  // of the warp's classes
  float others[kManyWarps][kTile];   // exponentials except the label's, from that maximum
  float own[kTile], own_distance[kTile], own_maximum[kTile];  // of the label's class
  float weight[kTile];
  int label[kTile];
  float total_maximum[kTile], scale[kTile];  // scale = weight / sum
};

__device__ inline float exp_fast(float x) { return math::exp2_fast(x * math::kLog2E); }

/// The voxel's place in the tile.
template <int kVoxels>
__device__ inline int slot_of(const Span& span, int lane, int i) {
  return span.step == 1 ? lane * kVoxels + i : lane + i * kWarp;
}

/// Turns a warp's logits into exponentials from its own maximum and publishes what the other warps
/// need. The label's own exponential is published and replaced by 0. `best` is to receive, for each
/// voxel, which of the warp's classes has that maximum.
template <int kClasses, int kVoxels, int kTile>
__device__ inline void many_exponentials(ManyShared<kTile>& shared, int64_t classes, int first,
                                         const Span& span, const int (&label)[kVoxels],
                                         const float (&weight)[kVoxels],
                                         float (&z)[kClasses][kVoxels], float (&maximum)[kVoxels],
                                         int* best = nullptr) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int i = 0; i < kVoxels; ++i) {
    const int slot = slot_of<kVoxels>(span, lane, i);
    maximum[i] = z[0][i];
#pragma unroll
    for (int k = 1; k < kClasses; ++k) maximum[i] = fmaxf(maximum[i], z[k][i]);
    if (!(fabsf(maximum[i]) <= FLT_MAX)) {
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        if (first + k < classes) z[k][i] = math::finite(z[k][i]);
      }
      maximum[i] = z[0][i];
#pragma unroll
      for (int k = 1; k < kClasses; ++k) maximum[i] = fmaxf(maximum[i], z[k][i]);
    }
    if (best != nullptr) {
      best[i] = 0;
#pragma unroll
      for (int k = 1; k < kClasses; ++k) best[i] = z[k][i] == maximum[i] ? k : best[i];
    }
    float others = 0;
#pragma unroll
    for (int k = 0; k < kClasses; ++k) {
      const float distance = z[k][i] - maximum[i];
      const float e = exp_fast(distance);
      const bool match = first + k == label[i];
      if (match) {
        shared.own[slot] = e;
        shared.own_distance[slot] = distance;
        shared.own_maximum[slot] = maximum[i];
      }
      z[k][i] = match ? 0.0f : e;
      others += z[k][i];
    }
    shared.maximum[warp][slot] = maximum[i];
    shared.others[warp][slot] = others;
    if (warp == 0) {
      shared.label[slot] = label[i];
      shared.weight[slot] = weight[i];
    }
  }
}

/// The whole softmax of one voxel of the tile.
struct ManyVoxel {
  float maximum, own, others, inverse, minus_log, complement;

  template <int kTile>
  __device__ ManyVoxel(const ManyShared<kTile>& shared, int slot, int warps) {
    maximum = shared.maximum[0][slot];
    for (int w = 1; w < warps; ++w) maximum = fmaxf(maximum, shared.maximum[w][slot]);
    others = 0;
    for (int w = 0; w < warps; ++w) {
      others = fmaf(shared.others[w][slot], exp_fast(shared.maximum[w][slot] - maximum), others);
    }
    own = 0;
    float exponent = 0;  // in base 2
    if (shared.label[slot] >= 0) {
      const float drop = shared.own_maximum[slot] - maximum;
      own = shared.own[slot] * exp_fast(drop);
      exponent = (shared.own_distance[slot] + drop) * math::kLog2E;
    }
    inverse = math::reciprocal(own + others);
    complement = others * inverse;
    minus_log = label_minus_log(own, others, inverse, exponent);
  }
};

template <class T, int kClasses>
__global__ void __launch_bounds__(kManyWarps* kWarp)
    many_forward(const __grid_constant__ Launched q) {
  using Shape = ManyShape<kClasses>;
  constexpr int kVoxels = Shape::kVoxels, kTile = Shape::kTile;
  VOXFUSE_SHARED(ManyShared<kTile>, shared, );
  VOXFUSE_SHARED(float, tp, [kTile]);
  VOXFUSE_SHARED(float, fn, [kTile]);
  VOXFUSE_SHARED(float, nll, [kTile]);
  VOXFUSE_SHARED(float, own_sums, [kManyWarps * kClasses][3]);
  VOXFUSE_SHARED(double, totals, [kManyWarps * kClasses][4]);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  const int first = warp * kClasses;
  const Row row(q, blockIdx.x);
  // Every class belongs to one warp; only its first lane touches these.
  if (lane == 0) {
    for (int k = 0; k < kClasses; ++k) {
      for (int s = 0; s < 3; ++s) own_sums[first + k][s] = 0;
      for (int s = 0; s < 4; ++s) totals[first + k][s] = 0;
    }
  }

  for (int64_t chunk = row.first; chunk < row.last; ++chunk) {
    float fp[kClasses] = {};
    const int64_t begin = chunk * q.chunk;
    const int64_t end = begin + q.chunk < q.voxels ? begin + q.chunk : q.voxels;
    for (int64_t tile = begin; tile < end; tile += kTile) {
      const Span span = span_of<kVoxels>(q.input_layout, tile, q.voxels, lane, kWarp);
      float z[kClasses][kVoxels], weight[kVoxels], maximum[kVoxels];
      int label[kVoxels];
      load_logits<T, 0>(q, row.sample, first, span, z);
      if (load_voxels<kVoxels>(q, row.sample, span, label, weight)) clear_excluded(label, z);
      many_exponentials(shared, q.classes, first, span, label, weight, z, maximum);
      __syncthreads();
      for (int slot = thread; slot < kTile; slot += threads) {
        const ManyVoxel voxel(shared, slot, warps);
        const float scale = shared.weight[slot] * voxel.inverse;
        const float gamma = gamma_of<float>(q, shared.label[slot]);
        shared.total_maximum[slot] = voxel.maximum;
        shared.scale[slot] = scale;
        tp[slot] = voxel.own * scale;
        fn[slot] = voxel.others * scale;
        nll[slot] = shared.weight[slot] * math::focal(voxel.complement, voxel.minus_log, gamma);
      }
      __syncthreads();
      float scale[kVoxels];
#pragma unroll
      for (int i = 0; i < kVoxels; ++i) {
        const int slot = slot_of<kVoxels>(span, lane, i);
        scale[i] = exp_fast(maximum[i] - shared.total_maximum[slot]) * shared.scale[slot];
      }
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
#pragma unroll
        for (int i = 0; i < kVoxels; ++i) fp[k] = fmaf(z[k][i], scale[i], fp[k]);
      }
#pragma unroll 1
      for (int k = 0; k < kClasses; ++k) {
        bool any = false;
#pragma unroll
        for (int i = 0; i < kVoxels; ++i) any = any || first + k == label[i];
        if (!__any_sync(kAllLanes, any)) continue;  // few classes have a label in this tile
        float sums[3] = {0, 0, 0};
#pragma unroll
        for (int i = 0; i < kVoxels; ++i) {
          const int slot = slot_of<kVoxels>(span, lane, i);
          const bool match = first + k == label[i];
          sums[0] += match ? tp[slot] : 0.0f;
          sums[1] += match ? fn[slot] : 0.0f;
          sums[2] += match ? nll[slot] : 0.0f;
        }
#pragma unroll
        for (int s = 0; s < 3; ++s) {
          sums[s] = warp_sum(sums[s]);
          if (lane == 0) own_sums[first + k][s] += sums[s];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kClasses; ++k) {
      const float sum = warp_sum(fp[k]);
      if (lane == 0) {
        totals[first + k][Sum::FP] += sum;
        totals[first + k][Sum::TP] += own_sums[first + k][0];
        totals[first + k][Sum::FN] += own_sums[first + k][1];
        totals[first + k][Sum::NLL] += own_sums[first + k][2];
        for (int s = 0; s < 3; ++s) own_sums[first + k][s] = 0;
      }
    }
  }
  if (lane == 0) {
    for (int k = 0; k < kClasses && first + k < q.classes; ++k) {
      for (int s = 0; s < 4; ++s) row.sums[(first + k) * CORE + s] = totals[first + k][s];
    }
  }
  // A warp has 4 kClasses >= 32 totals: one place a thread at least.
  finish_rows(q, blockIdx.x, 1, &totals[0][0]);
}

template <class T, int kClasses>
__global__ void __launch_bounds__(kManyWarps* kWarp)
    many_backward(const __grid_constant__ Launched q) {
  using Shape = ManyShape<kClasses>;
  constexpr int kVoxels = Shape::kVoxels, kTile = Shape::kTile;
  VOXFUSE_SHARED(ManyShared<kTile>, shared, );
  VOXFUSE_SHARED(float, bases, [kManyWarps][kTile]);   // slope of the warp's most probable class
  VOXFUSE_SHARED(float, slopes, [kManyWarps][kTile]);  // sums of exponential times slope - base
  VOXFUSE_SHARED(float, total_base, [kTile]);
  VOXFUSE_SHARED(float, offset, [kTile]);
  VOXFUSE_SHARED(float, at_label, [kTile]);
  VOXFUSE_SHARED(float, hit, [kManyWarps * kClasses]);
  VOXFUSE_SHARED(float, miss, [kManyWarps * kClasses]);
  VOXFUSE_SHARED(float, nll, [kManyWarps * kClasses]);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  const int first = warp * kClasses;
  constexpr int kBlock = kTile * Shape::kTiles;
  const unsigned blocks = static_cast<unsigned>((q.voxels + kBlock - 1) / kBlock);
  const int64_t b = blockIdx.x / blocks, begin = int64_t{blockIdx.x % blocks} * kBlock;
  for (int c = thread; c < warps * kClasses; c += threads) {
    math::Slope<float> slope{};
    if (c < q.classes) {
      slope = math::Slope<float>(q.cotangents + (b * q.classes + c) * CORE, false);
    }
    hit[c] = slope.hit;
    miss[c] = slope.miss;
    nll[c] = slope.nll;
  }
  __syncthreads();

  const int64_t end = begin + kBlock < q.voxels ? begin + kBlock : q.voxels;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const Span span = span_of<kVoxels>(q.input_layout, tile, q.voxels, lane, kWarp);
    float z[kClasses][kVoxels], weight[kVoxels], maximum[kVoxels];
    int label[kVoxels];
    load_logits<T, 0>(q, b, first, span, z);
    const bool excluded = load_voxels<kVoxels>(q, b, span, label, weight);
    if (excluded) clear_excluded(label, z);
    int best[kVoxels];
    many_exponentials(shared, q.classes, first, span, label, weight, z, maximum, best);
    // The slopes are measured from the most probable class's: see few_backward. Here that is the
    // warp's, as no warp knows the others yet.
    float sum[kVoxels] = {}, base[kVoxels];
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) {
      const int c = first + best[i];
      base[i] = c == label[i] ? hit[c] : miss[c];
    }
#pragma unroll
    for (int k = 0; k < kClasses; ++k) {
      const float out = miss[first + k];
#pragma unroll
      for (int i = 0; i < kVoxels; ++i) sum[i] = fmaf(z[k][i], out - base[i], sum[i]);
    }
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) {
      const int slot = slot_of<kVoxels>(span, lane, i);
      bases[warp][slot] = base[i];
      slopes[warp][slot] = sum[i];
    }
    __syncthreads();
    for (int slot = thread; slot < kTile; slot += threads) {
      const ManyVoxel voxel(shared, slot, warps);
      const int y = shared.label[slot] < 0 ? 0 : shared.label[slot];
      float base = bases[0][slot];
      for (int w = 1; w < warps; ++w) {
        base = shared.maximum[w][slot] == voxel.maximum ? bases[w][slot] : base;
      }
      float mean = voxel.own * (hit[y] - base);
      for (int w = 0; w < warps; ++w) {
        const float sum = fmaf(shared.others[w][slot], bases[w][slot] - base, slopes[w][slot]);
        mean = fmaf(sum, exp_fast(shared.maximum[w][slot] - voxel.maximum), mean);
      }
      mean *= voxel.inverse;
      const float p = voxel.own * voxel.inverse;
      const float gamma = gamma_of<float>(q, y);
      const float u = nll[y] * math::focal_slope(p, voxel.complement, voxel.minus_log, gamma);
      shared.total_maximum[slot] = voxel.maximum;
      shared.scale[slot] = shared.weight[slot] * voxel.inverse;
      total_base[slot] = base;
      offset[slot] = mean + u;
      at_label[slot] = shared.weight[slot] * fmaf(p, hit[y] - base - mean, u * voxel.complement);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kVoxels; ++i) {
      const int slot = slot_of<kVoxels>(span, lane, i);
      const float scale = exp_fast(maximum[i] - shared.total_maximum[slot]) * shared.scale[slot];
      const float from = total_base[slot], away = offset[slot], own = at_label[slot];
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        const float value = z[k][i] * scale * ((miss[first + k] - from) - away);
        z[k][i] = first + k == label[i] ? own : value;
      }
    }
    if (excluded) clear_excluded(label, z);
    store_gradient<T, 0>(q, b, first, span, z);
  }
}

}  // namespace
}  // namespace voxfuse::cuda
