// The fused volume, a ring's addition, the weights: a block owns a tile of the result, lists the
// patches that touch it in their order, and every thread adds up runs of voxels in registers. Part
// of overlap_add.cu.
#pragma once

#include <algorithm>

#include "cuda/overlap_add_softmax.cuh"

namespace voxfuse::cuda {
namespace {

enum class Mode { kForward, kRing, kWeights };

/// What a launch adds to the problem: how a block's tile lies in the result.
struct Tiling {
  int columns;  // threads along the last axis; kThreads / columns rows
  int tiles[3];
  int64_t channels_per_block;
};

template <class T, Mode kMode>
struct Output {
  using type = T;
};
template <class T>
struct Output<T, Mode::kRing> {
  using type = typename Compute<T>::Real;
};

template <class T, Mode kMode, bool kActivated>
__global__ void __launch_bounds__(kThreads, kActivated && sizeof(T) == 8 ? 1 : 2)
    gather(const __grid_constant__ Fusion q, const __grid_constant__ Tiling tiling) {
  using Real = typename Compute<T>::Real;
  using Out = typename Output<T, kMode>::type;
  constexpr int kRun = 16 / sizeof(T);
  // Half types into a ring leave no registers for the values of two channels or, activated, for
  // the sums of two.
  constexpr bool kTight = kMode == Mode::kRing && sizeof(T) == 2;
  constexpr bool kInTurn = kActivated || kTight;
  constexpr int kCopies = kMode == Mode::kWeights || (kTight && kActivated) ? 1 : kChannels<T>;
  VOXFUSE_SHARED(Placed, list, [kListed]);
  VOXFUSE_SHARED(int, warp_counts, [kThreads / kWarp]);

  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int thread_rows = kThreads / tiling.columns;
  const unsigned tile = blockIdx.x;
  const int tile_x = static_cast<int>(tile % tiling.tiles[2]);
  const int tile_y = static_cast<int>(tile / tiling.tiles[2] % tiling.tiles[1]);
  const int tile_z = static_cast<int>(tile / tiling.tiles[2] / tiling.tiles[1]);
  const int low[3] = {q.begin[0] + tile_z * kTileDepth, q.begin[1] + tile_y * thread_rows,
                      q.begin[2] + tile_x * tiling.columns * kRun};
  const int size[3] = {kTileDepth, thread_rows, tiling.columns * kRun};
  int high[3];
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    high[axis] = low[axis] + size[axis] < q.end[axis] ? low[axis] + size[axis] : q.end[axis];
  }

  // The patches over this tile, in ascending order.
  int listed = 0;
  for (int64_t first = 0; first < q.patches; first += kThreads) {
    Placed placed;
    bool touches = false;
    if (first + thread < q.patches) {
      placed = Placed(q, first + thread);
      touches = placed.touches(q, low, high);
    }
    const unsigned votes = __ballot_sync(kAllLanes, touches);
    if (lane == 0) warp_counts[warp] = __popc(votes);
    __syncthreads();
    int before = listed + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w < warp) before += warp_counts[w];
      listed += warp_counts[w];
    }
    if (touches && before < kListed) list[before] = placed;
    __syncthreads();
  }
  if (kMode != Mode::kForward && listed == 0) return;
  const bool walk_all = listed > kListed;
  const int64_t steps = walk_all ? q.patches : listed;

  const int y = low[1] + thread / tiling.columns, x = low[2] + thread % tiling.columns * kRun;
  if (thread / tiling.columns >= thread_rows || y >= high[1] || x >= high[2]) return;
  const int64_t first_channel = blockIdx.y * tiling.channels_per_block;
  const int64_t last_channel = first_channel + tiling.channels_per_block < q.channels
                                   ? first_channel + tiling.channels_per_block
                                   : q.channels;
  const int64_t plane = int64_t{q.extent[0]} * q.extent[1] * q.extent[2];
  const int64_t patch_plane = int64_t{q.patch[0]} * q.patch[1] * q.patch[2];
  auto* target = static_cast<Out*>(q.target);
  const auto* source = static_cast<const T*>(q.source);

  for (int z = low[0]; z < high[0]; ++z) {
    const int64_t line = (int64_t{slot(q, 0, z)} * q.extent[1] + slot(q, 1, y)) * q.extent[2];
    const int wide = high[2] - x < kRun ? high[2] - x : kRun;
    double total[kRun];
    const auto load_total = [&] {
      if (kMode == Mode::kRing && q.floor > 0) {
        raised_sums<kRun>(q, z, y, x, wide, total);
      } else if (q.total != nullptr) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          total[i] = i < wide ? q.total[line + slot(q, 2, x + i)] : 0.0;
        }
      }
    };
    // Activated, it is got again for every patch: exponentials take the registers.
    if (!kActivated) load_total();
    for (int64_t channel = first_channel; channel < last_channel; channel += kCopies) {
      Real sum[kCopies][kRun] = {};
      bool touched = false;
      const int copies =
          static_cast<int>(last_channel - channel < kCopies ? last_channel - channel : kCopies);
      if constexpr (kMode != Mode::kForward) {
#pragma unroll
        for (int c = 0; c < kCopies; ++c) {
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            if (c < copies && i < wide) {
              sum[c][i] = target[(channel + c) * plane + line + slot(q, 2, x + i)];
            }
          }
        }
      }
      for (int64_t step = 0; step < steps; ++step) {
        const Placed at = walk_all ? Placed(q, step) : list[step];
        const int tz = z - at.origin[0], ty = y - at.origin[1], tx = x - at.origin[2];
        if (!at.valid || tz < 0 || tz >= q.patch[0] || ty < 0 || ty >= q.patch[1] ||
            tx + kRun <= 0 || tx >= q.patch[2]) {
          continue;
        }
        touched = true;
        Real weight[kRun];
        if (kActivated) load_total();
        weights_of<Real, kRun>(q, at, tz, ty, tx, total, weight);
        if constexpr (kMode == Mode::kWeights) {
#pragma unroll
          for (int i = 0; i < kRun; ++i) sum[0][i] += weight[i];
        } else {
          const int first = -tx, last = q.patch[2] - tx;
          // Where the run begins in a patch that is mirrored; along the last axis it is turned.
          const int flip = kMode == Mode::kRing ? q.flip : 0;
          const int sz = flip & 1 ? q.patch[0] - 1 - tz : tz;
          const int sy = flip & 2 ? q.patch[1] - 1 - ty : ty;
          const int sx = flip & 4 ? q.patch[2] - kRun - tx : tx;
          const int64_t offset = (int64_t{sz} * q.patch[1] + sy) * q.patch[2] + sx;
          const int64_t base = (at.patch * q.channels + channel) * patch_plane + offset;
          [[maybe_unused]] Real greatest[kRun];
          if constexpr (kActivated) {
            if (q.activation == Activation::softmax) {
              Softmax<Real, kRun> softmax;
              if (q.softmax == nullptr) {
                softmax = softmax_of<Real, kRun>(
                    source + (at.patch * q.channels * patch_plane + offset), patch_plane,
                    q.channels, -sx, q.patch[2] - sx, Nothing{});
              } else {
                const Real* run =
                    static_cast<const Real*>(q.softmax) + 2 * at.patch * patch_plane + offset;
                load_run<Real, kRun>(run, -sx, q.patch[2] - sx, softmax.greatest);
                load_run<Real, kRun>(run + patch_plane, -sx, q.patch[2] - sx, softmax.inverse);
              }
              if (flip & 4) {
                turn_run(softmax.greatest);
                turn_run(softmax.inverse);
              }
#pragma unroll
              for (int i = 0; i < kRun; ++i) {
                greatest[i] = softmax.greatest[i];
                weight[i] = weight[i] * softmax.inverse[i];
              }
            }
          }
          const auto load = [&](int c, Real(&value)[kRun]) {
            load_run<Real, kRun>(source + (base + c * patch_plane), -sx, q.patch[2] - sx, value);
            if (flip & 4) turn_run(value);
          };
          const auto add = [&](int c, const Real(&value)[kRun]) {
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
              // Outside the patch there is nothing to add, whatever was read.
              if (i >= first && i < last) sum[c][i] = sum[c][i] + weight[i] * value[i];
            }
          };
          if constexpr (kInTurn) {
#pragma unroll
            for (int c = 0; c < kCopies; ++c) {
              if (c >= copies) continue;
              Real value[kRun];
              load(c, value);
#pragma unroll
              for (int i = 0; kActivated && i < kRun; ++i) {
                value[i] = q.activation == Activation::softmax
                               ? math::exp_negative(value[i] - greatest[i])
                               : sigmoid_of(value[i]);
              }
              add(c, value);
            }
          } else {
            Real value[kCopies][kRun];
#pragma unroll
            for (int c = 0; c < kCopies; ++c) {
              if (c < copies) load(c, value[c]);
            }
#pragma unroll
            for (int c = 0; c < kCopies; ++c) {
              if (c < copies) add(c, value[c]);
            }
          }
        }
      }
      if (kMode != Mode::kForward && !touched) continue;
#pragma unroll
      for (int c = 0; c < kCopies; ++c) {
        if (c >= copies) continue;
        Out* run = target + (channel + c) * plane + line;
        Out out[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) out[i] = Store<Out>::from(sum[c][i]);
        if (wide == kRun && q.ring_axis != 2 && is_aligned<kRun>(run + x, sizeof(Out))) {
          store_vector<kRun>(run + x, out);
        } else {
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            if (i < wide) run[slot(q, 2, x + i)] = out[i];
          }
        }
      }
    }
  }
}

template <class T, Mode kMode, bool kActivated>
cudaError_t start_gather(const Fusion& q, cudaStream_t stream) {
  constexpr int kRun = 16 / sizeof(T);
  Tiling tiling{};
  // As many threads along a row as fill it evenly, at most a warp.
  const int runs = (q.end[2] - q.begin[2] + kRun - 1) / kRun;
  if (runs <= 0 || q.end[1] <= q.begin[1] || q.end[0] <= q.begin[0] || q.channels == 0) {
    return cudaSuccess;
  }
  const int across = (runs + kWarp - 1) / kWarp;
  tiling.columns = (runs + across - 1) / across;
  const int size[3] = {kTileDepth, kThreads / tiling.columns, tiling.columns * kRun};
  int64_t tiles = 1;
  for (int axis = 0; axis < 3; ++axis) {
    tiling.tiles[axis] = (q.end[axis] - q.begin[axis] + size[axis] - 1) / size[axis];
    tiles *= tiling.tiles[axis];
  }
  // Channels are divided among blocks only where the tiles alone would not fill a GPU.
  const int64_t groups = (q.channels + kChannels<T> - 1) / kChannels<T>;
  const int64_t split = std::clamp<int64_t>(1056 / tiles, 1, std::min<int64_t>(groups, 65535));
  tiling.channels_per_block = (groups + split - 1) / split * kChannels<T>;
  const int64_t blocks = (q.channels + tiling.channels_per_block - 1) / tiling.channels_per_block;
  if (tiles > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (kActivated && q.softmax != nullptr) {
    constexpr int kSpan = 16 / sizeof(T);
    const int64_t plane = int64_t{q.patch[0]} * q.patch[1] * q.patch[2];
    const int64_t runs = (plane + kSpan - 1) / kSpan * q.patches;
    const int64_t grid = (runs + kThreads - 1) / kThreads;
    if (grid > 0x7fffffff) return cudaErrorInvalidConfiguration;
    const cudaError_t error = grid == 0 ? cudaSuccess
                                        : launch(normalise<T>, dim3(static_cast<unsigned>(grid)),
                                                 dim3(kThreads), stream, q);
    if (error != cudaSuccess) return error;
  }
  return launch(gather<T, kMode, kActivated>,
                dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(blocks)), dim3(kThreads),
                stream, q, tiling);
}

}  // namespace
}  // namespace voxfuse::cuda
