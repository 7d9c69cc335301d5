// The patch fusion without an activation: a task owns a tile of the result. Part of
// overlap_add_kernel.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/overlap_add_tile.h"
#include "cpu/overlap_add_weights.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

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

// Weights of the rows of a piece, for the columns from one on: row y of products of the axes'
// weights is (scale * scales[y]) * weight ...
template <class R>
struct Products {
  R scale;
  const R* scales;
  const R* weight;

  Products from(int64_t j) const { return {scale, scales, weight + j}; }
  RowWeights<R> row(int64_t y) const { return {scale * scales[y], weight}; }

  // `n` vectors of columns, whose weights stay in registers.
  template <int n>
  struct Strip {
    using Values = Vec<R>;
    Products from;
    Values columns[n];
    VOXFUSE_INLINE explicit Strip(const Products& w) : from(w) {
      for (int k = 0; k < n; ++k) columns[k] = load(w.weight + k * Lanes<R>::width);
    }
    VOXFUSE_INLINE auto row(int64_t y) const {
      const R scale = from.scale * from.scales[y];
      return [this, scale](int k) { return scale * columns[k]; };
    }
  };
};

// ... and else they are in memory, `line` apart.
template <class R>
struct Table {
  const R* weight;
  int64_t line;

  Table from(int64_t j) const { return {weight + j, line}; }
  RowWeights<R> row(int64_t y) const { return {R(1), weight + y * line}; }

  template <int n>
  struct Strip {
    Table from;
    VOXFUSE_INLINE explicit Strip(const Table& w) : from(w) {}
    VOXFUSE_INLINE auto row(int64_t y) const {
      const R* weight = from.weight + y * from.line;
      return [weight](int k) { return load(weight + k * Lanes<R>::width); };
    }
  };
};

// Adds `n` vectors of columns of rows of a patch, `step` apart, to sums `line` apart.
template <int n, class T, class R, class W>
VOXFUSE_INLINE void add_strip(const T* source, int64_t step, const W& weights, int64_t rows,
                              R* sums, int64_t line) {
  constexpr int width = Lanes<R>::width;
  using P = Pack<R, width>;
  const typename W::template Strip<n> strip(weights);
  for (int64_t y = 0; y < rows; ++y) {
    const auto weight = strip.row(y);
    for (int k = 0; k < n; ++k) {
      R* to = sums + k * width;
      P::store(to, P::load(to) + weight(k) * P::load(source + k * width));
    }
    source += step;
    sums += line;
  }
}

// As add_row, row after row, to the same bits.
template <class T, class R, class W>
void add_rows(const T* source, int64_t step, const W& weights, int64_t rows, int64_t size, R* sums,
              int64_t line) {
  constexpr int width = Lanes<R>::width;
  int64_t j = 0;
  const auto strips = [&](auto count) {
    constexpr int n = decltype(count)::value;
    for (; j + n * width <= size; j += n * width) {
      add_strip<n>(source + j, step, weights.from(j), rows, sums + j, line);
    }
  };
  strips(Count<6>{});
  strips(Count<4>{});
  strips(Count<2>{});
  strips(Count<1>{});
  if (j == size) return;
  const W rest = weights.from(j);
  for (int64_t y = 0; y < rows; ++y) {
    add_row(source + y * step + j, rest.row(y), size - j, sums + y * line + j);
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
        product(q.separable && q.total == nullptr && q.floor == 0 && !(q.flip & 4)),
        scratch(in_place ? 0 : q.task_columns),
        turned(q.flip & 4 ? q.patch[2] : 0),
        shares(q) {}

  void operator()(const Tile& tile) {
    pieces.clear();
    find_pieces(q, tile, pieces);
    // Weights that the channels share are made for a few rows at a time.
    int64_t step = tile.y_end - tile.y;
    if (!product) {
      int64_t width = 1;
      for (const Shared& p : pieces) width += p.size;
      step = std::clamp<int64_t>(kWeightBytes / sizeof(R) / width, 1, step);
    }
    for (int64_t first = tile.y; first < tile.y_end; first += step) {
      const int64_t last = std::min(first + step, tile.y_end);
      if (!product) weigh(tile, first, last);
      for (int64_t c = tile.channel; c < tile.channel_end; ++c) {
        find_runs(c, first, last);
        add(tile, c, first, last);
      }
    }
  }

 private:
  static constexpr int64_t kWeightBytes = 48 * 1024;

  // The part of a piece in one channel and some rows.
  struct Run {
    const T* source;  // its first row
    int64_t step;     // from row to row
    Products<R> products;
    Table<R> table;  // if there are no products
    int64_t y, y_end, size, slot;
  };

  // Where place t of an axis is in the patches, which may be mirrored along it.
  template <int axis>
  int64_t place_of(int64_t t) const {
    return q.flip >> axis & 1 ? q.patch[axis] - 1 - t : t;
  }

  void find_runs(int64_t channel, int64_t first, int64_t last) {
    runs.clear();
    for (const Shared& p : pieces) {
      const int64_t y = std::max(first, p.y), y_end = std::min(last, p.y_end);
      if (y >= y_end) continue;
      const int64_t* origin = q.origins + 3 * p.i;
      const int64_t* r = q.rows + 3 * p.i;
      const auto table = [&](int axis) {
        return static_cast<const R*>(q.rounded[axis]) + r[axis] * q.patch[axis];
      };
      const int64_t ty = y - origin[1], tx = p.x - origin[2];
      const int64_t sz = place_of<0>(p.tz), sy = place_of<1>(ty);
      const int64_t sx = q.flip & 4 ? q.patch[2] - tx - p.size : tx;
      const int64_t plane = (p.i * q.channels + channel) * q.patch[0] + sz;
      Run run{static_cast<const T*>(q.source) + (plane * q.patch[1] + sy) * q.patch[2] + sx,
              q.flip & 2 ? -q.patch[2] : q.patch[2],
              {},
              {},
              y,
              y_end,
              p.size,
              p.slot};
      if (product) {
        run.products = {table(0)[p.tz], table(1) + ty, table(2) + tx};
      } else {
        run.table = {weights.data() + p.weights + (y - first) * p.size, p.size};
      }
      runs.push_back(run);
    }
  }

  // The weights of rows [first, last) of all pieces, piece by piece.
  void weigh(const Tile& tile, int64_t first, int64_t last) {
    const int64_t z_slot = slot_of(q, 0, tile.z);
    int64_t used = 0;
    for (Shared& p : pieces) {
      p.weights = used;
      used += (last - first) * p.size;
    }
    if (static_cast<int64_t>(weights.size()) < used) weights.resize(used);
    for (const Shared& p : pieces) {
      const int64_t tx = p.x - q.origins[3 * p.i + 2];
      for (int64_t y = std::max(first, p.y); y < std::min(last, p.y_end); ++y) {
        const int64_t ty = y - q.origins[3 * p.i + 1];
        const int64_t line = (z_slot * q.extent[1] + slot_of(q, 1, y)) * q.extent[2];
        make_weights(q, shares, p.i, p.tz, ty, tx, p.size,
                     q.total == nullptr ? nullptr : q.total + line + p.slot,
                     weights.data() + p.weights + (y - first) * p.size);
      }
    }
  }

  // Adds the runs to rows [first, last) of one channel.
  void add(const Tile& tile, int64_t channel, int64_t first, int64_t last) {
    const int64_t width = tile.x_end - tile.x;
    const int64_t slice = channel * q.extent[0] + slot_of(q, 0, tile.z);
    if (q.accumulate && runs.size() == 1 && q.ring_axis != 1) {
      const Run& run = runs[0];
      R* sums = static_cast<R*>(q.target) + (slice * q.extent[1] + run.y) * q.extent[2];
      return add(run, run.y, run.y_end - run.y, sums, q.extent[2]);
    }
    for (int64_t y = first; y < last; ++y) {
      const int64_t line = (slice * q.extent[1] + slot_of(q, 1, y)) * q.extent[2];
      // Where the sums of slot 0 of this row are.
      R* sums = in_place ? static_cast<R*>(q.target) + line : scratch.data() - tile.x;
      if (!q.accumulate) std::fill(sums + tile.x, sums + tile.x + width, R(0));
      for (const Run& run : runs) {
        if (y >= run.y && y < run.y_end) add(run, y, 1, sums, 0);
      }
      if (in_place) continue;
      const R* __restrict row = sums + tile.x;
      T* __restrict out = static_cast<T*>(q.target) + line + tile.x;
      for (int64_t j = 0; j < width; ++j) out[j] = from_real<T>(row[j]);
    }
  }

  // Adds `rows` rows of a run from `first` on to sums whose slot 0 is at `sums`, `line` apart.
  void add(const Run& run, int64_t first, int64_t rows, R* sums, int64_t line) {
    const T* source = run.source + (first - run.y) * run.step;
    const int64_t skipped = first - run.y;
    sums += run.slot;
    if (product) {
      const Products<R> w{run.products.scale, run.products.scales + skipped, run.products.weight};
      return add_rows(source, run.step, w, rows, run.size, sums, line);
    }
    const Table<R> w{run.table.weight + skipped * run.table.line, run.table.line};
    if (!(q.flip & 4)) return add_rows(source, run.step, w, rows, run.size, sums, line);
    for (int64_t y = 0; y < rows; ++y, source += run.step, sums += line) {
      std::reverse_copy(source, source + run.size, turned.data());
      add_row(turned.data(), w.row(y), run.size, sums);
    }
  }

  const Fusion& q;
  const bool in_place;  // the result's memory holds the sums
  const bool product;   // weights are products of the axes' and rows are read as they lie: tasks
                        // have one channel, and weights are formed in registers
  std::vector<R> scratch, weights;
  std::vector<T> turned;  // a row that was mirrored
  std::vector<Shared> pieces;
  std::vector<Run> runs;
  Shares<R> shares;
};

template <class T, class R>
void forward(const Fusion& q, int64_t first_task, int64_t last_task) {
  Gather<T, R> gather(q);
  for (int64_t task = first_task; task < last_task; ++task) gather(Tile(q, task));
}

}  // namespace
}  // namespace voxfuse::VOXFUSE_ISA
