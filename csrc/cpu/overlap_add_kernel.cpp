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

template <int n>
using Count = std::integral_constant<int, n>;

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

// Weights with a lower bound: the product of the axes' weights or `floor`, whichever is greater,
// divided by the sum of those of all patches over the voxel. The sums are formed anew in every row,
// in registers: reading them from memory takes longer.
template <class R>
class Shares {
 public:
  explicit Shares(const Fusion& q) : q(q) {
    if (q.cover[0] == nullptr) return;
    const int64_t extent = q.cover_extent[2];
    rounded.assign(q.cover[2], q.cover[2] + q.covers[2] * extent);
    highest = *std::max_element(q.cover[2], q.cover[2] + q.covers[2] * extent);
    for (int64_t k = 0; k < q.covers[2]; ++k) {
      const double* row = q.cover[2] + k * extent;
      int64_t first = 0, last = extent;
      while (first < last && row[first] < 0) ++first;
      while (last > first && row[last - 1] < 0) --last;
      spans.push_back({first, last});
    }
    exact_scales.resize(q.covers[0] * q.covers[1]);
    rounded_scales.resize(exact_scales.size());
  }

  // Writes the weights of n columns from x on, tx of the patch, of a row (z, y), whose products are
  // those of `exact`, or of `own` times the scale.
  void of(const RowWeights<double>& exact, const R* own, int64_t z, int64_t y, int64_t x,
          int64_t tx, int64_t n, R* out) {
    // What a row of patches contributes: at least `floor`, and no more where even its highest
    // weight is below.
    int64_t low = 0;
    count = 0;
    for (int64_t k = 0; k < q.covers[0]; ++k) {
      const double along_z = q.cover[0][k * q.cover_extent[0] + z];
      for (int64_t l = 0; l < q.covers[1]; ++l) {
        const double along_y = q.cover[1][l * q.cover_extent[1] + y];
        if (along_z < 0 || along_y < 0) continue;
        const double product = along_z * along_y;
        if (product * highest <= q.floor) {
          ++low;
        } else {
          exact_scales[count++] = product;
        }
      }
    }
    // With this few terms a weight in float32 is off by at most 12 roundings (3 each of the product
    // and of the terms, one of the quotient, the rest of the additions).
    int64_t terms = count + (low > 0);
    // Of the patch's whole row: the bits must not depend on where it is cut.
    const int64_t begin = x - tx, end = begin + q.patch[2];
    for (const Span& span : spans) terms += begin < span.last && end > span.first;
    if (terms <= kFew) {
      for (int64_t i = 0; i < count; ++i) rounded_scales[i] = static_cast<R>(exact_scales[i]);
      row(static_cast<R>(exact.scale), own, rounded.data(), rounded_scales.data(), low, x, n, out);
    } else {
      row(exact.scale, exact.row, q.cover[2], exact_scales.data(), low, x, n, out);
    }
  }

 private:
  static constexpr int64_t kFew = 7;

  template <class A>
  void row(A scale, const A* own, const A* cover, const A* scales, int64_t low, int64_t x,
           int64_t n, R* out) const {
    constexpr int width = Lanes<A>::width;
    int64_t j = 0;
    const auto packs = [&](auto vectors, auto lanes) {
      constexpr int step = decltype(vectors)::value * decltype(lanes)::value;
      for (; j + step <= n; j += step) {
        pack<decltype(vectors)::value, decltype(lanes)::value>(scale, own + j, cover, scales, low,
                                                               x + j, out + j);
      }
    };
    packs(Count<3>{}, Count<width>{});
    packs(Count<1>{}, Count<width>{});
    packs(Count<1>{}, Count<1>{});
  }

  template <int vectors, int lanes, class A>
  VOXFUSE_INLINE void pack(A scale, const A* own, const A* cover, const A* scales, int64_t low,
                           int64_t x, R* out) const {
    using P = Pack<A, lanes>;
    using V = typename P::Values;
    const V least = static_cast<A>(q.floor) - V{}, constant = static_cast<A>(low) * least;
    const auto raised = [&](A factor, V weight) {
      const V product = factor * weight;
      return product < least ? least : product;
    };
    V sum[vectors] = {};
    for (int64_t k = 0; k < q.covers[2]; ++k) {
      if (x + vectors * lanes <= spans[k].first || x >= spans[k].last) continue;
      const A* weights = cover + k * q.cover_extent[2] + x;
      V across[vectors], part[vectors];
      for (int v = 0; v < vectors; ++v) {
        across[v] = P::load(weights + v * lanes);
        part[v] = constant;
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int v = 0; v < vectors; ++v) part[v] += raised(scales[i], across[v]);
      }
      for (int v = 0; v < vectors; ++v) sum[v] += across[v] < 0 ? V{} : part[v];
    }
    for (int v = 0; v < vectors; ++v) {
      const V quotient = raised(scale, P::load(own + v * lanes)) / sum[v];
      const V share = sum[v] == 0 ? V{} : quotient;
      using Rounded = typename VectorOf<R, lanes>::Type;
      const Rounded rounded = __builtin_convertvector(share, Rounded);
      std::memcpy(out + v * lanes, &rounded, sizeof(rounded));
    }
  }

  struct Span {
    int64_t first, last;  // outside, a row of the last axis' table is negative
  };

  const Fusion& q;
  std::vector<R> rounded;  // the last axis' table
  std::vector<Span> spans;
  double highest = 0;                // weight along the last axis
  std::vector<double> exact_scales;  // of the rows of patches over a row
  std::vector<R> rounded_scales;
  int64_t count = 0;
};

// Makes the weights of n columns of row (tz, ty) of patch i, from its column tx on. Where they are
// divided by sums in memory, those are at `total`.
template <class R>
void make_weights(const Fusion& q, Shares<R>& shares, int64_t i, int64_t tz, int64_t ty, int64_t tx,
                  int64_t n, const double* total, R* out) {
  if (q.cover[0] != nullptr) {
    const int64_t* origin = q.origins + 3 * i;
    RowWeights<double> w = row_weights<double>(q, q.exact, i, tz, ty);
    w.row += tx;
    const R* own = row_weights<R>(q, q.rounded, i, tz, ty).row + tx;
    shares.of(w, own, origin[0] + tz, origin[1] + ty, origin[2] + tx, tx, n, out);
  } else if (q.total != nullptr) {
    divided_weights<R>(row_weights<double>(q, q.exact, i, tz, ty), tx, total, n, out);
  } else {
    const RowWeights<R> w = row_weights<R>(q, q.rounded, i, tz, ty);
    for (int64_t j = 0; j < n; ++j) out[j] = w.scale * w.row[tx + j];
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
  int64_t weights = 0;  // where its weights are, if they are made beforehand
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
        product(q.separable && q.total == nullptr && q.cover[0] == nullptr && !(q.flip & 4)),
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

}  // namespace
}  // namespace voxfuse::VOXFUSE_ISA

#include "cpu/overlap_add_activated.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

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

// Calls f with a value of the patches' type and one of the accumulation type.
template <class F>
void by_type(Element type, const F& f) {
  switch (type) {
    case Element::f16:
      return f(Half{}, float{});
    case Element::bf16:
      return f(BFloat16{}, float{});
    case Element::f64:
      return f(double{}, double{});
    default:
      return f(float{}, float{});
  }
}

}  // namespace

void overlap_forward(const Fusion& q, int64_t first_task, int64_t last_task) {
  by_type(q.type, [&](auto patch, auto sum) {
    using T = decltype(patch);
    using R = decltype(sum);
    if (q.activation != 0) return forward_activated<T, R>(q, first_task, last_task);
    forward<T, R>(q, first_task, last_task);
  });
}

void overlap_backward(const Fusion& q, int64_t first_task, int64_t last_task) {
  by_type(q.type, [&](auto patch, auto sum) {
    using T = decltype(patch);
    using R = decltype(sum);
    if (q.activation != 0) return backward_activated<T, R>(q, first_task, last_task);
    backward<T, R>(q, first_task, last_task);
  });
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
