// The patch fusion kernels. Compiled once an instruction set (see csrc/cpu/dispatch.h).
//
// Forward (gather form): a task owns a tile of the result and adds the patches over it one after
// the other while the tile stays in cache, so that every result byte is written to memory once and
// no two tasks meet. Backward: a task owns one slice of one patch.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/half.h"
#include "cpu/overlap_add.h"
#include "cpu/simd.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

// Coordinates [first, last) whose slots are consecutive, from `slot` on.
struct Segment {
  int64_t first, last, slot;
};

int64_t slot_of(const Fusion& q, int axis, int64_t x) {
  return axis == q.ring_axis ? x % q.extent[axis] : x;
}

// Coordinates [first, last) of an axis, split where a ring wraps around.
struct Segments {
  Segment part[2];
  int count;

  Segments(const Fusion& q, int axis, int64_t first, int64_t last) {
    const int64_t slot = slot_of(q, axis, first);
    const int64_t split = std::min(last, first + q.extent[axis] - slot);
    part[0] = {first, split, slot};
    part[1] = {split, last, 0};
    count = split == last ? 1 : 2;
  }
  const Segment* begin() const { return part; }
  const Segment* end() const { return part + count; }
};

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

// Weights of a piece of a row, divided by their sum over all patches.
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

template <class E, int n>
struct VectorOf {
  typedef E Type __attribute__((vector_size(n * sizeof(E))));
};

// `n` values of R as one vector, read from any element type.
template <class R, int n>
struct Pack {
  using Values = typename VectorOf<R, n>::Type;
  using Words = typename VectorOf<uint32_t, n>::Type;
  using Halves = typename VectorOf<uint16_t, n>::Type;

  static VOXFUSE_INLINE Values load(const R* p) {
    Values v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static VOXFUSE_INLINE Values load(const BFloat16* p) {
    return reinterpret_cast<Values>(widened(p) << 16);
  }
  static VOXFUSE_INLINE Values load(const Half* p) {
#if defined(__AVX512F__)
    if constexpr (n == 16) {
      __m256i halves;
      std::memcpy(&halves, p, sizeof(halves));
      return reinterpret_cast<Values>(_mm512_maskz_cvtph_ps(0xffff, halves));
    }
#endif
#if defined(__F16C__)
    if constexpr (n == 8) {
      __m128i halves;
      std::memcpy(&halves, p, sizeof(halves));
      return reinterpret_cast<Values>(_mm256_cvtph_ps(halves));
    }
#endif
    // As half_to_float of half.h, on vectors.
    const Words bits = widened(p);
    const Words magnitude = (bits & 0x7fffu) << 13;
    const Values scaled = reinterpret_cast<Values>(magnitude) * 5.192296858534828e33f;  // 2^112
    const Words special = reinterpret_cast<Words>((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return reinterpret_cast<Values>(reinterpret_cast<Words>(scaled) | special |
                                    ((bits & 0x8000u) << 16));
  }
  static VOXFUSE_INLINE void store(R* p, Values v) { std::memcpy(p, &v, sizeof(v)); }

 private:
  template <class T>
  static VOXFUSE_INLINE Words widened(const T* p) {
    Halves halves;
    std::memcpy(&halves, p, sizeof(halves));
    return __builtin_convertvector(halves, Words);
  }
};

// Adds scale * weight * source to as many packs of n values as fit; returns where it stopped.
template <int n, class T, class R>
VOXFUSE_INLINE int64_t add_packs(const T* source, R scale, const R* weight, int64_t j, int64_t size,
                                 R* sums) {
  using P = Pack<R, n>;
  for (; j + n <= size; j += n) {
    P::store(sums + j, P::load(sums + j) + (scale * P::load(weight + j)) * P::load(source + j));
  }
  return j;
}

// Adds a row of a patch to the sums.
template <class T, class R>
VOXFUSE_INLINE void add_row(const T* source, const RowWeights<R>& w, int64_t size, R* sums) {
  constexpr int width = Lanes<R>::width;
  int64_t j = add_packs<width>(source, w.scale, w.row, 0, size, sums);
  if constexpr (width > 8) j = add_packs<8>(source, w.scale, w.row, j, size, sums);
  if constexpr (width > 4) j = add_packs<4>(source, w.scale, w.row, j, size, sums);
  for (; j < size; ++j) sums[j] += (w.scale * w.row[j]) * to_real<R>(source[j]);
}

// Adds rows of a patch, `step` apart, to sums `line` apart; row y has weights
// (scale * scales[y]) * weight. `n` vectors of columns, whose weights stay in registers.
template <int n, class T, class R>
VOXFUSE_INLINE void add_strip(const T* source, int64_t step, R scale, const R* scales,
                              const R* weight, int64_t rows, R* sums, int64_t line) {
  constexpr int width = Lanes<R>::width;
  using P = Pack<R, width>;
  typename P::Values weights[n];
  for (int k = 0; k < n; ++k) weights[k] = P::load(weight + k * width);
  for (int64_t y = 0; y < rows; ++y) {
    const R row_scale = scale * scales[y];
    for (int k = 0; k < n; ++k) {
      R* to = sums + k * width;
      P::store(to, P::load(to) + (row_scale * weights[k]) * P::load(source + k * width));
    }
    source += step;
    sums += line;
  }
}

// As add_row, row after row, to the same bits.
template <class T, class R>
void add_rows(const T* source, int64_t step, R scale, const R* scales, const R* weight,
              int64_t rows, int64_t size, R* sums, int64_t line) {
  constexpr int width = Lanes<R>::width;
  int64_t j = 0;
  const auto strips = [&](auto count) {
    constexpr int n = decltype(count)::value;
    for (; j + n * width <= size; j += n * width) {
      add_strip<n>(source + j, step, scale, scales, weight + j, rows, sums + j, line);
    }
  };
  strips(std::integral_constant<int, 6>{});
  strips(std::integral_constant<int, 4>{});
  strips(std::integral_constant<int, 2>{});
  strips(std::integral_constant<int, 1>{});
  if (j == size) return;
  for (int64_t y = 0; y < rows; ++y) {
    const RowWeights<R> w{scale * scales[y], weight + j};
    add_row(source + y * step + j, w, size - j, sums + y * line + j);
  }
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

// What a patch and a tile share: `size` columns from `x` on, in consecutive slots from `slot` on,
// of rows [y, y_end) of the patch's slice tz.
struct Shared {
  int64_t i, tz, y, y_end, x, size, slot;
};

// Appends what the patches share with the tile to `pieces`, in patch order.
void find_pieces(const Fusion& q, const Tile& tile, std::vector<Shared>& pieces) {
  const int64_t slice = tile.z - q.begin[0];
  for (int64_t k = q.first_of_slice[slice]; k < q.first_of_slice[slice + 1]; ++k) {
    const int64_t i = q.over_slice[k];
    const int64_t* origin = q.origins + 3 * i;
    const int64_t y = std::max(tile.y, origin[1]),
                  y_end = std::min(tile.y_end, origin[1] + q.patch[1]);
    const int64_t x = std::max(tile.x, origin[2]),
                  x_end = std::min(tile.x_end, origin[2] + q.patch[2]);
    if (y >= y_end || x >= x_end) continue;
    for (const Segment& xs : Segments(q, 2, x, x_end)) {
      pieces.push_back({i, tile.z - origin[0], y, y_end, xs.first, xs.last - xs.first, xs.slot});
    }
  }
}

// One task of the forward: the sums of one tile, row by row. All patches over a row are added while
// it is in the first-level cache, and each patch's slice is read from its beginning to its end.
template <class T, class R>
class Gather {
 public:
  explicit Gather(const Fusion& q)
      : q(q),
        in_place(q.accumulate || std::is_same_v<T, R>),
        product(q.separable && q.total == nullptr && !(q.flip & 4)),
        scratch(in_place ? 0 : q.task_channels * q.task_columns),
        divided(q.total != nullptr ? q.patch[2] : 0),
        turned(q.flip & 4 ? q.patch[2] : 0) {}

  void operator()(const Tile& tile) {
    pieces.clear();
    find_pieces(q, tile, pieces);
    const int64_t z_slot = slot_of(q, 0, tile.z), width = tile.x_end - tile.x;
    if (product) find_runs(tile);
    if (product && q.accumulate && runs.size() == 1 && q.ring_axis != 1) {
      const Run& run = runs[0];
      const int64_t slice = tile.channel * q.extent[0] + z_slot;
      R* sums = static_cast<R*>(q.target) + (slice * q.extent[1] + run.y) * q.extent[2];
      return run.add(run.y, run.y_end - run.y, sums, q.extent[2]);
    }
    for (int64_t y = tile.y; y < tile.y_end; ++y) {
      const int64_t first_slot = (z_slot * q.extent[1] + slot_of(q, 1, y)) * q.extent[2];
      // Where the sums of slot 0 of this row are.
      R* sums = scratch.data() - tile.x;
      int64_t channel_stride = q.task_columns;
      if (in_place) {
        channel_stride = q.extent[0] * q.extent[1] * q.extent[2];
        sums = static_cast<R*>(q.target) + tile.channel * channel_stride + first_slot;
      }
      const int64_t channels = tile.channel_end - tile.channel;
      for (int64_t c = 0; c < channels && !q.accumulate; ++c) {
        R* row = sums + c * channel_stride + tile.x;
        std::fill(row, row + width, R(0));
      }
      for (const Run& run : runs) {
        if (y >= run.y && y < run.y_end) run.add(y, 1, sums, 0);
      }
      for (const Shared& piece : pieces) {
        if (product || y < piece.y || y >= piece.y_end) continue;
        add(tile, piece, y, sums + piece.slot, channel_stride, first_slot + piece.slot);
      }
      if (in_place) continue;
      T* target = static_cast<T*>(q.target) + first_slot + tile.x;
      for (int64_t c = 0; c < channels; ++c) {
        const R* __restrict row = sums + c * channel_stride + tile.x;
        T* __restrict out = target + (tile.channel + c) * q.extent[0] * q.extent[1] * q.extent[2];
        for (int64_t j = 0; j < width; ++j) out[j] = from_real<T>(row[j]);
      }
    }
  }

 private:
  // A piece of the tile's channel, where weights are products of the axes' and used as they are.
  struct Run {
    const T* source;  // its first row
    int64_t step;     // from row to row
    R scale;
    const R* scales;  // of its rows
    const R* weight;  // of its columns
    int64_t y, y_end, size, slot;

    // Adds `rows` rows from `first` on to sums whose slot 0 is at `sums`, `line` apart.
    void add(int64_t first, int64_t rows, R* sums, int64_t line) const {
      add_rows(source + (first - y) * step, step, scale, scales + (first - y), weight, rows, size,
               sums + slot, line);
    }
  };

  // Where place t of an axis is in the patches, which may be mirrored along it.
  template <int axis>
  int64_t place_of(int64_t t) const {
    return q.flip >> axis & 1 ? q.patch[axis] - 1 - t : t;
  }

  void find_runs(const Tile& tile) {
    runs.clear();
    for (const Shared& p : pieces) {
      const int64_t* origin = q.origins + 3 * p.i;
      const int64_t* r = q.rows + 3 * p.i;
      const auto table = [&](int axis) {
        return static_cast<const R*>(q.rounded[axis]) + r[axis] * q.patch[axis];
      };
      const int64_t ty = p.y - origin[1], tx = p.x - origin[2];
      const int64_t sz = place_of<0>(p.tz), sy = place_of<1>(ty);
      const int64_t plane = (p.i * q.channels + tile.channel) * q.patch[0] + sz;
      const T* source =
          static_cast<const T*>(q.source) + (plane * q.patch[1] + sy) * q.patch[2] + tx;
      runs.push_back({source, q.flip & 2 ? -q.patch[2] : q.patch[2], table(0)[p.tz], table(1) + ty,
                      table(2) + tx, p.y, p.y_end, p.size, p.slot});
    }
  }

  // Adds row y of a piece; `slot` is where its weights' sums are.
  void add(const Tile& tile, const Shared& p, int64_t y, R* sums, int64_t channel_stride,
           int64_t slot) {
    const int64_t* origin = q.origins + 3 * p.i;
    const int64_t ty = y - origin[1], tx = p.x - origin[2];
    const int64_t patch_voxels = q.patch[0] * q.patch[1] * q.patch[2];
    const int64_t sz = place_of<0>(p.tz), sy = place_of<1>(ty);
    const int64_t sx = q.flip & 4 ? q.patch[2] - tx - p.size : tx;
    const T* source = static_cast<const T*>(q.source) +
                      (p.i * q.channels + tile.channel) * patch_voxels +
                      (sz * q.patch[1] + sy) * q.patch[2] + sx;
    RowWeights<R> w;
    if (q.total == nullptr) {
      w = row_weights<R>(q, q.rounded, p.i, p.tz, ty);
      w.row += tx;
    } else {
      divided_weights<R>(row_weights<double>(q, q.exact, p.i, p.tz, ty), tx, q.total + slot, p.size,
                         divided.data());
      w = {R(1), divided.data()};
    }
    const R one = 1;
    for (int64_t c = tile.channel; c < tile.channel_end; ++c) {
      const T* row = source;
      if (q.flip & 4) {
        std::reverse_copy(source, source + p.size, turned.data());
        row = turned.data();
      }
      add_rows(row, 0, w.scale, &one, w.row, 1, p.size, sums, 0);
      source += patch_voxels;
      sums += channel_stride;
    }
  }

  const Fusion& q;
  const bool in_place;  // the result's memory holds the sums
  const bool product;   // tasks have one channel, and `runs` instead of `pieces` is added: rows are
                        // read as they lie
  std::vector<R> scratch, divided;
  std::vector<T> turned;  // a row that was mirrored
  std::vector<Shared> pieces;
  std::vector<Run> runs;
};

template <class T, class R>
void forward(const Fusion& q, int64_t first_task, int64_t last_task) {
  Gather<T, R> gather(q);
  for (int64_t task = first_task; task < last_task; ++task) gather(Tile(q, task));
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
  double* target = static_cast<double*>(q.target);
  std::vector<Shared> pieces;
  for (int64_t task = first_task; task < last_task; ++task) {
    const Tile tile(q, task);
    const int64_t z_slot = slot_of(q, 0, tile.z);
    pieces.clear();
    find_pieces(q, tile, pieces);
    for (int64_t y = tile.y; y < tile.y_end; ++y) {
      double* line = target + (z_slot * q.extent[1] + slot_of(q, 1, y)) * q.extent[2];
      for (const Shared& p : pieces) {
        if (y < p.y || y >= p.y_end) continue;
        const int64_t* origin = q.origins + 3 * p.i;
        const RowWeights<double> w = row_weights<double>(q, q.exact, p.i, p.tz, y - origin[1]);
        const double* __restrict row = w.row + (p.x - origin[2]);
        double* __restrict sums = line + p.slot;
        for (int64_t j = 0; j < p.size; ++j) sums[j] += w.scale * row[j];
      }
    }
  }
}

}  // namespace voxfuse::VOXFUSE_ISA
