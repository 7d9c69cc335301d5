// Patch fusion on the GPU: a block owns a tile of the result, lists the patches that touch it in
// their order, and every thread adds up runs of voxels in registers. Each voxel is written once; no
// atomics, so the bits are those of the patch order.
//
// The softmax of a patch needs the greatest value and the sum over the channels of each of its
// voxels. With few channels a thread works them out whenever it adds a patch's run, from what the
// caches hold of it; with more they are two numbers a voxel, which a launch before works out.
#include <algorithm>
#include <cmath>

#include "cuda/elements.h"
#include "cuda/overlap_add.h"
#include "math/confusion.h"

namespace voxfuse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kListed = 256;  // patches that a block can list; with more it walks through all
// Channels that a thread adds up at a time.
template <class T>
constexpr int kChannels = sizeof(T) == 2 ? 2 : 4;
constexpr int kTileDepth = 8;
constexpr int kFewGroups = 2;  // of kChannels, whose softmax is worked out anew for each

enum class Mode { kForward, kRing, kWeights };

/// What a launch adds to the problem: how a block's tile lies in the result.
struct Tiling {
  int columns;  // threads along the last axis; kThreads / columns rows
  int tiles[3];
  int64_t channels_per_block;
};

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
  return (z < 0 ? e : Real(1)) * math::reciprocal(1 + e);
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
            if (q.activation == math::kSoftmax) {
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
                value[i] = q.activation == math::kSoftmax
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
  const bool softmax = q.activation == math::kSoftmax;
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

template <class T>
cudaError_t start_scatter(const Fusion& q, cudaStream_t stream) {
  constexpr int kRun = 16 / sizeof(T);
  const int64_t runs = int64_t{q.patch[0]} * q.patch[1] * ((q.patch[2] + kRun - 1) / kRun);
  const int64_t blocks = (runs * q.patches + kThreads - 1) / kThreads;
  if (blocks == 0 || q.channels == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(q.activation == math::kNone ? scatter<T> : scatter_activated<T>,
                dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, q);
}

template <class Start>
cudaError_t by_type(Element type, const Start& start) {
  switch (type) {
    case Element::f32:
      return start(float{});
    case Element::f16:
      return start(__half{});
    case Element::bf16:
      return start(__nv_bfloat16{});
    case Element::f64:
      return start(double{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

int64_t softmax_workspace(const Fusion& q) {
  const int group = element_size(q.type) == 2 ? kChannels<__half> : kChannels<float>;
  if (q.activation != math::kSoftmax || q.channels <= kFewGroups * group) return 0;
  return 2 * q.patches * q.patch[0] * q.patch[1] * q.patch[2];
}

cudaError_t overlap_add_forward(const Fusion& q, cudaStream_t stream) {
  return by_type(q.type, [&](auto zero) {
    using T = decltype(zero);
    return q.activation == math::kNone ? start_gather<T, Mode::kForward, false>(q, stream)
                                       : start_gather<T, Mode::kForward, true>(q, stream);
  });
}

cudaError_t overlap_add_ring(const Fusion& q, cudaStream_t stream) {
  return by_type(q.type, [&](auto zero) {
    using T = decltype(zero);
    return q.activation == math::kNone ? start_gather<T, Mode::kRing, false>(q, stream)
                                       : start_gather<T, Mode::kRing, true>(q, stream);
  });
}

cudaError_t overlap_add_weights(const Fusion& q, cudaStream_t stream) {
  return start_gather<double, Mode::kWeights, false>(q, stream);
}

cudaError_t overlap_add_backward(const Fusion& q, cudaStream_t stream) {
  return by_type(q.type, [&](auto zero) { return start_scatter<decltype(zero)>(q, stream); });
}

}  // namespace voxfuse::cuda
