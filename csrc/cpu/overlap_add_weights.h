// Weights of the rows of patches. Part of overlap_add_kernel.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/overlap_add.h"
#include "cpu/pack.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

// Weights of one row (tz, ty, *) of patch i: scale * row[tx].
template <class R>
struct RowWeights {
  R scale;
  const R* row;
};

template <class R, class Table>
RowWeights<R> row_weights(const Fusion& q, const Table* const (&tables)[3], int64_t i, int64_t tz,
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

// Weights with a lower bound: the product of the axes' weights or `floor`, whichever is greater,
// divided by the sum of those of all patches over the voxel. The sums are formed anew in every row,
// in registers: reading them from memory takes longer.
template <class R>
class Shares {
 public:
  explicit Shares(const Fusion& q) : q(q) {
    if (q.floor == 0) return;
    const int64_t extent = q.cover_extent[2];
    rounded.assign(q.cover[2], q.cover[2] + q.cover_count[2] * extent);
    highest = *std::max_element(q.cover[2], q.cover[2] + q.cover_count[2] * extent);
    for (int64_t k = 0; k < q.cover_count[2]; ++k) {
      const double* row = q.cover[2] + k * extent;
      int64_t first = 0, last = extent;
      while (first < last && row[first] < 0) ++first;
      while (last > first && row[last - 1] < 0) --last;
      spans.push_back({first, last});
    }
    exact_scales.resize(q.cover_count[0] * q.cover_count[1]);
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
    for (int64_t k = 0; k < q.cover_count[0]; ++k) {
      const double along_z = q.cover[0][k * q.cover_extent[0] + z];
      for (int64_t l = 0; l < q.cover_count[1]; ++l) {
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
    for (int64_t k = 0; k < q.cover_count[2]; ++k) {
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
  if (q.floor > 0) {
    const int64_t* origin = q.origins + 3 * i;
    RowWeights<double> w = row_weights<double>(q, q.weights, i, tz, ty);
    w.row += tx;
    const R* own = row_weights<R>(q, q.rounded, i, tz, ty).row + tx;
    shares.of(w, own, origin[0] + tz, origin[1] + ty, origin[2] + tx, tx, n, out);
  } else if (q.total != nullptr) {
    divided_weights<R>(row_weights<double>(q, q.weights, i, tz, ty), tx, total, n, out);
  } else {
    const RowWeights<R> w = row_weights<R>(q, q.rounded, i, tz, ty);
    for (int64_t j = 0; j < n; ++j) out[j] = w.scale * w.row[tx + j];
  }
}

}  // namespace
}  // namespace voxfuse::VOXFUSE_ISA
