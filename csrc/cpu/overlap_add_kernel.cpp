// The patch fusion kernels. Compiled once an instruction set (see csrc/cpu/dispatch.h).
//
// Forward (gather form): a task owns a tile of the result and adds the patches over it one after
// the other while the tile stays in cache, so that every result byte is written to memory once and
// no two tasks meet. Backward: a task owns one slice of one patch.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/half.h"
#include "cpu/overlap_add.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

// A piece of a row that is contiguous in the volume or ring.
struct Segment {
  int64_t first, last;  // coordinates
  int64_t slot;         // where `first` lies
};

int64_t slot_of(const Fusion& q, int axis, int64_t x) {
  return axis == q.ring_axis ? x % q.extent[axis] : x;
}

// Splits coordinates [first, last) of the innermost axis where a ring wraps around.
int segments_of(const Fusion& q, int64_t first, int64_t last, Segment (&out)[2]) {
  const int64_t slot = slot_of(q, 2, first);
  const int64_t split = std::min(last, first + q.extent[2] - slot);
  out[0] = {first, split, slot};
  if (split == last) return 1;
  out[1] = {split, last, 0};
  return 2;
}

// Weights of one row (tz, ty, *) of patch i: scale * row[tx].
template <class R>
struct RowWeights {
  R scale;
  const R* row;
};

template <class R>
RowWeights<R> row_weights(const Fusion& q, const void* const (&tables)[3], int64_t i, int64_t tz,
                          int64_t ty) {
  const auto table = [&](int axis) { return static_cast<const R*>(tables[axis]); };
  if (!q.separable) return {R(1), table(0) + (tz * q.patch[1] + ty) * q.patch[2]};
  const int64_t* r = q.rows + 3 * i;
  return {table(0)[r[0] * q.patch[0] + tz] * table(1)[r[1] * q.patch[1] + ty],
          table(2) + r[2] * q.patch[2]};
}

// Weights of a segment of a row, divided by their sum over all patches.
template <class R>
void divided_weights(const RowWeights<double>& w, int64_t offset, const double* __restrict total,
                     int64_t n, R* __restrict out) {
  const double scale = w.scale;
  const double* __restrict row = w.row + offset;
  for (int64_t j = 0; j < n; ++j) {
    const double quotient = scale * row[j] / total[j];
    out[j] = static_cast<R>(total[j] == 0 ? 0.0 : quotient);
  }
}

template <class T, class R>
void add_row(const T* __restrict source, R scale, const R* __restrict weight, int64_t n,
             R* __restrict sums) {
  for (int64_t j = 0; j < n; ++j) sums[j] += (scale * weight[j]) * to_real<R>(source[j]);
}

template <class T, class R>
void scale_row(const T* __restrict source, R scale, const R* __restrict weight, int64_t n,
               T* __restrict out) {
  for (int64_t j = 0; j < n; ++j) {
    out[j] = from_real<T>((scale * weight[j]) * to_real<R>(source[j]));
  }
}

struct Tile {
  int64_t channel, channel_end, z, y, y_end, x, x_end;

  Tile(const Fusion& q, int64_t task) {
    const int64_t columns = blocks(q.high[2] - q.low[2], q.task_columns);
    const int64_t rows = blocks(q.high[1] - q.low[1], q.task_rows);
    const int64_t slices = q.high[0] - q.low[0];
    x = q.low[2] + task % columns * q.task_columns;
    x_end = std::min(x + q.task_columns, q.high[2]);
    task /= columns;
    y = q.low[1] + task % rows * q.task_rows;
    y_end = std::min(y + q.task_rows, q.high[1]);
    task /= rows;
    z = q.low[0] + task % slices;
    channel = task / slices * q.task_channels;
    channel_end = std::min(channel + q.task_channels, q.channels);
  }
};

// Calls visit(patch, tz, first, last) for every patch over the tile, in patch order, with the
// coordinates [first[a], last[a]) of rows (a = 0) and columns (a = 1) that they share.
template <class Visit>
void for_patches_over(const Fusion& q, const Tile& tile, Visit&& visit) {
  const int64_t slice = tile.z - q.begin[0];
  for (int64_t k = q.first_of_slice[slice]; k < q.first_of_slice[slice + 1]; ++k) {
    const int64_t i = q.over_slice[k];
    const int64_t* origin = q.origins + 3 * i;
    const int64_t y = std::max(tile.y, origin[1]);
    const int64_t y_end = std::min(tile.y_end, origin[1] + q.patch[1]);
    const int64_t x = std::max(tile.x, origin[2]);
    const int64_t x_end = std::min(tile.x_end, origin[2] + q.patch[2]);
    if (y < y_end && x < x_end) visit(i, tile.z - origin[0], y, y_end, x, x_end);
  }
}

template <class T, class R>
void forward(const Fusion& q, int64_t first_task, int64_t last_task) {
  const T* source = static_cast<const T*>(q.source);
  const bool in_place = q.accumulate || std::is_same_v<T, R>;
  const int64_t patch_voxels = q.patch[0] * q.patch[1] * q.patch[2];
  std::vector<R> scratch(in_place ? 0 : q.task_channels * q.task_rows * q.task_columns);
  std::vector<R> divided(q.total != nullptr ? q.patch[2] : 0);

  for (int64_t task = first_task; task < last_task; ++task) {
    const Tile tile(q, task);
    const int64_t z_slot = slot_of(q, 0, tile.z);
    // Where the sums of a row of the tile start, for the column in slot `x_slot`.
    const auto sums_of = [&](int64_t c, int64_t y, int64_t x_slot) -> R* {
      if (!in_place) {
        return scratch.data() + ((c - tile.channel) * q.task_rows + y - tile.y) * q.task_columns +
               x_slot - tile.x;
      }
      return static_cast<R*>(q.target) +
             ((c * q.extent[0] + z_slot) * q.extent[1] + slot_of(q, 1, y)) * q.extent[2] + x_slot;
    };
    if (!q.accumulate) {
      for (int64_t c = tile.channel; c < tile.channel_end; ++c) {
        for (int64_t y = tile.y; y < tile.y_end; ++y) {
          R* sums = sums_of(c, y, tile.x);
          std::fill(sums, sums + (tile.x_end - tile.x), R(0));
        }
      }
    }

    for_patches_over(
        q, tile, [&](int64_t i, int64_t tz, int64_t y, int64_t y_end, int64_t x, int64_t x_end) {
          const int64_t* origin = q.origins + 3 * i;
          Segment segments[2];
          const int count = segments_of(q, x, x_end, segments);
          for (; y < y_end; ++y) {
            const int64_t ty = y - origin[1];
            for (int s = 0; s < count; ++s) {
              const int64_t tx = segments[s].first - origin[2];
              const int64_t n = segments[s].last - segments[s].first;
              RowWeights<R> w;
              if (q.total != nullptr) {
                const double* total = q.total +
                                      (z_slot * q.extent[1] + slot_of(q, 1, y)) * q.extent[2] +
                                      segments[s].slot;
                divided_weights<R>(row_weights<double>(q, q.exact, i, tz, ty), tx, total, n,
                                   divided.data() + tx);
                w = {R(1), divided.data()};
              } else {
                w = row_weights<R>(q, q.rounded, i, tz, ty);
              }
              for (int64_t c = tile.channel; c < tile.channel_end; ++c) {
                const T* row = source + (i * q.channels + c) * patch_voxels +
                               (tz * q.patch[1] + ty) * q.patch[2];
                add_row<T, R>(row + tx, w.scale, w.row + tx, n, sums_of(c, y, segments[s].slot));
              }
            }
          }
        });

    if (in_place) continue;
    for (int64_t c = tile.channel; c < tile.channel_end; ++c) {
      for (int64_t y = tile.y; y < tile.y_end; ++y) {
        const R* __restrict sums = sums_of(c, y, tile.x);
        T* __restrict out = static_cast<T*>(q.target) +
                            ((c * q.extent[0] + tile.z) * q.extent[1] + y) * q.extent[2] + tile.x;
        for (int64_t j = 0; j < tile.x_end - tile.x; ++j) out[j] = from_real<T>(sums[j]);
      }
    }
  }
}

// One task is slice tz of patch i.
template <class T, class R>
void backward(const Fusion& q, int64_t first_task, int64_t last_task) {
  const T* source = static_cast<const T*>(q.source);
  T* target = static_cast<T*>(q.target);
  const int64_t patch_voxels = q.patch[0] * q.patch[1] * q.patch[2];
  const int64_t volume_voxels = q.extent[0] * q.extent[1] * q.extent[2];
  std::vector<R> divided(q.total != nullptr ? q.patch[2] : 0);

  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t i = task / q.patch[0], tz = task % q.patch[0];
    const int64_t* origin = q.origins + 3 * i;
    const int64_t z = origin[0] + tz;
    const bool slice_inside = z >= 0 && z < q.extent[0];
    const int64_t x = std::max<int64_t>(0, origin[2]);
    const int64_t x_end = std::min(q.extent[2], origin[2] + q.patch[2]);
    const auto gradient_row = [&](int64_t c, int64_t ty, const RowWeights<R>& w) {
      T* out = target + (i * q.channels + c) * patch_voxels + (tz * q.patch[1] + ty) * q.patch[2];
      const int64_t y = origin[1] + ty;
      if (!slice_inside || y < 0 || y >= q.extent[1] || x >= x_end) {
        std::fill(out, out + q.patch[2], T{});
        return;
      }
      const int64_t tx = x - origin[2], n = x_end - x;
      std::fill(out, out + tx, T{});
      scale_row<T, R>(source + c * volume_voxels + (z * q.extent[1] + y) * q.extent[2] + x, w.scale,
                      w.row + tx, n, out + tx);
      std::fill(out + tx + n, out + q.patch[2], T{});
    };
    if (q.total == nullptr) {
      for (int64_t c = 0; c < q.channels; ++c) {
        for (int64_t ty = 0; ty < q.patch[1]; ++ty) {
          gradient_row(c, ty, row_weights<R>(q, q.rounded, i, tz, ty));
        }
      }
      continue;
    }
    for (int64_t ty = 0; ty < q.patch[1]; ++ty) {
      const int64_t y = origin[1] + ty;
      if (slice_inside && y >= 0 && y < q.extent[1] && x < x_end) {
        const int64_t tx = x - origin[2];
        divided_weights<R>(row_weights<double>(q, q.exact, i, tz, ty), tx,
                           q.total + (z * q.extent[1] + y) * q.extent[2] + x, x_end - x,
                           divided.data() + tx);
      }
      for (int64_t c = 0; c < q.channels; ++c) gradient_row(c, ty, {R(1), divided.data()});
    }
  }
}

}  // namespace

void overlap_forward(const Fusion& q, int64_t first_task, int64_t last_task) {
  switch (q.type) {
    case Element::f16:
      return forward<Half, float>(q, first_task, last_task);
    case Element::bf16:
      return forward<BFloat16, float>(q, first_task, last_task);
    case Element::f64:
      return forward<double, double>(q, first_task, last_task);
    default:
      return forward<float, float>(q, first_task, last_task);
  }
}

void overlap_backward(const Fusion& q, int64_t first_task, int64_t last_task) {
  switch (q.type) {
    case Element::f16:
      return backward<Half, float>(q, first_task, last_task);
    case Element::bf16:
      return backward<BFloat16, float>(q, first_task, last_task);
    case Element::f64:
      return backward<double, double>(q, first_task, last_task);
    default:
      return backward<float, float>(q, first_task, last_task);
  }
}

void overlap_weights(const Fusion& q, int64_t first_task, int64_t last_task) {
  double* total = static_cast<double*>(q.target);
  for (int64_t task = first_task; task < last_task; ++task) {
    const Tile tile(q, task);
    const int64_t z_slot = slot_of(q, 0, tile.z);
    for_patches_over(
        q, tile, [&](int64_t i, int64_t tz, int64_t y, int64_t y_end, int64_t x, int64_t x_end) {
          const int64_t* origin = q.origins + 3 * i;
          Segment segments[2];
          const int count = segments_of(q, x, x_end, segments);
          for (; y < y_end; ++y) {
            const RowWeights<double> w = row_weights<double>(q, q.exact, i, tz, y - origin[1]);
            for (int s = 0; s < count; ++s) {
              const double* __restrict row = w.row + (segments[s].first - origin[2]);
              double* __restrict sums = total +
                                        (z_slot * q.extent[1] + slot_of(q, 1, y)) * q.extent[2] +
                                        segments[s].slot;
              const int64_t n = segments[s].last - segments[s].first;
              for (int64_t j = 0; j < n; ++j) sums[j] += w.scale * row[j];
            }
          }
        });
  }
}

}  // namespace voxfuse::VOXFUSE_ISA
