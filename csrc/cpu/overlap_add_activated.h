// The patch fusion kernels for patches that are activated as they are added. Part of
// overlap_add_kernel.cpp.
//
// A block of voxels is activated in all its channels at once, in scratch memory that stays in the
// caches: a patch is read once, as without an activation, and nothing of its size is kept. A
// sigmoid, and a softmax of few channels, is added straight from registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/overlap_add_gather.h"
#include "cpu/rows.h"
#include "math/confusion.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

constexpr int kRegisters = 8;  // channels whose softmax fits into them

template <class R>
VOXFUSE_INLINE Vec<R> sigmoid_of(Vec<R> z) {
  const Vec<R> e = exponential(-absolute(z)), one_plus = R(1) + e;
  return math::sigmoid(z, e, one_plus, reciprocal(one_plus)).p;  // without its logarithms
}

// Some voxels of a patch, (channels, room) values and what all channels share. With few channels
// they stay in the first-level cache; with more, rows of a channel are long enough for streams of
// memory, and the block stays in the second-level cache.
template <class R>
class Block {
 public:
  static constexpr int width = Lanes<R>::width;

  explicit Block(int64_t channels)
      : channels(channels),
        most(voxels_for(std::max<int64_t>(channels, 1))),
        room(most + width),
        values(channels * room),
        weights(room),
        greatest(room),
        sums(room) {}

  R* row(int64_t channel) { return values.data() + channel * room; }

  // Turns the first n values of all channels into exp(z - greatest), and into `sums` their sums.
  void softmax(int64_t n) {
    if (channels <= kRegisters) return softmax_in_registers(n);
    const V lowest = broadcast<R>(-std::numeric_limits<R>::infinity());
    for (int64_t j = 0; j < n; j += width) {
      store(greatest.data() + j, lowest);
      store(sums.data() + j, V{});
    }
    for (int64_t c = 0; c < channels; ++c) {
      const R* z = row(c);
      for (int64_t j = 0; j < n; j += width) {
        R* top = greatest.data() + j;
        store(top, at_least(load(top), load(z + j)));
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      R* z = row(c);
      for (int64_t j = 0; j < n; j += width) {
        // NaN stays, and an infinite maximum makes one.
        const V e = exponential(load(z + j) - load(greatest.data() + j));
        store(z + j, e);
        store(sums.data() + j, load(sums.data() + j) + e);
      }
    }
  }

  // The same, to the same bits, voxel by voxel: the block is in the first-level cache.
  void softmax_in_registers(int64_t n) {
    for (int64_t j = 0; j < n; j += width) {
      R* z = values.data() + j;
      V top = broadcast<R>(-std::numeric_limits<R>::infinity()), sum{};
      for (int64_t c = 0; c < channels; ++c) top = at_least(top, load(z + c * room));
      for (int64_t c = 0; c < channels; ++c) {
        const V e = exponential(load(z + c * room) - top);
        store(z + c * room, e);
        sum += e;
      }
      store(sums.data() + j, sum);
    }
  }

  void sigmoid(int64_t n) {
    for (int64_t c = 0; c < channels; ++c) {
      R* row_of = row(c);
      for (int64_t j = 0; j < n; j += width) store(row_of + j, sigmoid_of<R>(load(row_of + j)));
    }
  }

  // weights /= sums
  void divide_weights(int64_t n) {
    for (int64_t j = 0; j < n; j += width) {
      R* w = weights.data() + j;
      store(w, load(w) * reciprocal(load(sums.data() + j)));
    }
  }

  using V = Vec<R>;
  const int64_t channels;
  const int64_t most;  // voxels that it takes
  const int64_t room;  // and some that vectors reach beyond
  std::vector<R> values, weights, greatest, sums;

 private:
  static constexpr int64_t kFar = 65536, kNear = 4096;  // values in a block

  static int64_t voxels_for(int64_t channels) {
    const int64_t far = std::clamp<int64_t>(kFar / channels, 64, 512);
    return (std::max(far, kNear / channels) + width - 1) / width * width;
  }
};

// Adds the weighted softmax of one vector of voxels, channels `step` apart, to sums `stride` apart.
template <int C, class T, class R>
VOXFUSE_INLINE void add_softmax(const T* source, int64_t step, Vec<R> weight, R* sums,
                                int64_t stride) {
  using P = Pack<R, Lanes<R>::width>;
  using V = Vec<R>;
  V z[C], top = broadcast<R>(-std::numeric_limits<R>::infinity()), sum{};
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) top = at_least(top, z[c] = P::load(source + c * step));
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) sum += z[c] = exponential(z[c] - top);
  weight = weight * reciprocal(sum);
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    R* to = sums + c * stride;
    store(to, load(to) + weight * z[c]);
  }
}

// Calls f(source, step, weight, sums, stride) for the vectors of a row of C channels; its last
// voxels as a vector, too, so that a voxel's bits do not depend on where rows are cut.
template <int C, class T, class R, class F>
VOXFUSE_INLINE void by_vectors(const T* source, int64_t step, const R* weights, int64_t n, R* sums,
                               int64_t stride, const F& f) {
  constexpr int width = Lanes<R>::width;
  int64_t j = 0;
  for (; j + width <= n; j += width) f(source + j, step, load(weights + j), sums + j, stride);
  if (j == n) return;
  T last[C * width] = {};
  R last_sums[C * width] = {}, last_weights[width] = {};
  std::copy(weights + j, weights + n, last_weights);
  for (int c = 0; c < C; ++c) {
    std::copy(source + c * step + j, source + c * step + n, last + c * width);
    std::copy(sums + c * stride + j, sums + c * stride + n, last_sums + c * width);
  }
  f(last, width, load(last_weights), last_sums, width);
  for (int c = 0; c < C; ++c) {
    std::copy(last_sums + c * width, last_sums + c * width + (n - j), sums + c * stride + j);
  }
}

// One task of the forward with activated patches: all channels of a tile, patch after patch.
template <class T, class R>
class ActivatedGather {
 public:
  explicit ActivatedGather(const Fusion& q)
      : q(q),
        in_place(q.accumulate || std::is_same_v<T, R>),
        registers(!(q.flip & 4) &&
                  (q.activation != Activation::softmax || q.channels <= kRegisters)),
        patch_voxels(q.patch[0] * q.patch[1] * q.patch[2]),
        block(registers ? 0 : q.channels),
        shares(q),
        scratch(in_place ? 0 : q.channels * q.task_rows * q.task_columns) {}

  void operator()(const Tile& tile) {
    pieces.clear();
    find_pieces(q, tile, pieces);
    const int64_t z_slot = slot_of(q, 0, tile.z);
    const int64_t volume = q.extent[0] * q.extent[1] * q.extent[2];
    const int64_t stride = in_place ? volume : q.task_rows * q.task_columns;
    const auto line = [&](int64_t y) {
      return (z_slot * q.extent[1] + slot_of(q, 1, y)) * q.extent[2];
    };
    // Where the sums of slot 0 of a row of the first channel are.
    const auto sums_of = [&](int64_t y) {
      return in_place ? static_cast<R*>(q.target) + line(y)
                      : scratch.data() + (y - tile.y) * q.task_columns - tile.x;
    };
    const int64_t columns = tile.x_end - tile.x;
    for (int64_t c = 0; c < q.channels && !q.accumulate; ++c) {
      for (int64_t y = tile.y; y < tile.y_end; ++y) {
        R* row = sums_of(y) + c * stride + tile.x;
        std::fill(row, row + columns, R(0));
      }
    }
    for (const Shared& piece : pieces) {
      for (int64_t x = 0; x < piece.size; x += block.most) {
        const int64_t size = std::min(block.most, piece.size - x);
        const int64_t rows = block.most / size;
        for (int64_t y = piece.y; y < piece.y_end; y += rows) {
          const int64_t y_end = std::min(y + rows, piece.y_end);
          add(piece, x, size, y, y_end, stride, line, sums_of);
        }
      }
    }
    if (in_place) return;
    for (int64_t c = 0; c < q.channels; ++c) {
      for (int64_t y = tile.y; y < tile.y_end; ++y) {
        const R* row = sums_of(y) + c * stride + tile.x;
        write_row(row, columns, static_cast<T*>(q.target) + c * volume + line(y) + tile.x, 1);
      }
    }
  }

 private:
  // Adds rows [y, y_end) of `size` columns of a piece from its column x on.
  template <class Line, class Sums>
  void add(const Shared& p, int64_t x, int64_t size, int64_t y, int64_t y_end, int64_t stride,
           const Line& line, const Sums& sums_of) {
    const int64_t* origin = q.origins + 3 * p.i;
    const int64_t ty = y - origin[1], tx = p.x + x - origin[2], rows = y_end - y;
    const int64_t sz = q.flip & 1 ? q.patch[0] - 1 - p.tz : p.tz;
    const int64_t sx = q.flip & 4 ? q.patch[2] - tx - size : tx;
    const T* slice = static_cast<const T*>(q.source) + p.i * q.channels * patch_voxels +
                     sz * q.patch[1] * q.patch[2];
    // Row r of the first channel, in the patch and in the sums.
    const auto source = [&](int64_t r) {
      return slice + (q.flip & 2 ? q.patch[1] - 1 - (ty + r) : ty + r) * q.patch[2] + sx;
    };
    const auto sums = [&](int64_t r) { return sums_of(y + r) + p.slot + x; };
    for (int64_t r = 0; r < rows; ++r) {
      const double* total = q.total == nullptr ? nullptr : q.total + line(y + r) + p.slot + x;
      make_weights(q, shares, p.i, p.tz, ty + r, tx, size, total, block.weights.data() + r * size);
    }
    if (!registers) {
      add_from_block(source, sums, rows, size, stride);
    } else if (q.activation == Activation::softmax) {
      add_softmax_from_registers(source, sums, rows, size, stride);
    } else {
      add_sigmoid_from_registers(source, sums, rows, size, stride);
    }
  }

  template <class Source, class Sums>
  void add_from_block(const Source& source, const Sums& sums, int64_t rows, int64_t size,
                      int64_t stride) {
    const bool dense = size == q.patch[2] && !(q.flip & 6);
    for (int64_t c = 0; c < q.channels; ++c) {
      R* to = block.row(c);
      if (dense) {
        convert_row<R>(source(0) + c * patch_voxels, 1, rows * size, to);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r, to += size) {
        convert_row<R>(source(r) + c * patch_voxels, 1, size, to);
        if (q.flip & 4) std::reverse(to, to + size);
      }
    }
    const int64_t n = rows * size;
    if (q.activation == Activation::softmax) {
      block.softmax(n);
      block.divide_weights(n);
    } else {
      block.sigmoid(n);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const RowWeights<R> w{R(1), block.weights.data() + r * size};
      for (int64_t c = 0; c < q.channels; ++c) {
        add_row(block.row(c) + r * size, w, size, sums(r) + c * stride);
      }
    }
  }

  // Inlined, so that what the lambdas hold need not be in memory for every row.
  template <class Source, class Sums>
  VOXFUSE_INLINE void add_softmax_from_registers(const Source& source, const Sums& sums,
                                                 int64_t rows, int64_t size, int64_t stride) {
    with_count<kRegisters>(q.channels, [&](auto channels) {
      constexpr int C = channels();
      for (int64_t r = 0; r < rows; ++r) {
        by_vectors<C>(source(r), patch_voxels, block.weights.data() + r * size, size, sums(r),
                      stride, [](auto... vector) { add_softmax<C>(vector...); });
      }
    });
  }

  template <class Source, class Sums>
  VOXFUSE_INLINE void add_sigmoid_from_registers(const Source& source, const Sums& sums,
                                                 int64_t rows, int64_t size, int64_t stride) {
    using P = Pack<R, Lanes<R>::width>;
    const auto add_one = [](const T* from, int64_t, Vec<R> weight, R* to, int64_t) {
      store(to, load(to) + weight * sigmoid_of<R>(P::load(from)));
    };
    for (int64_t c = 0; c < q.channels; ++c) {
      for (int64_t r = 0; r < rows; ++r) {
        by_vectors<1>(source(r) + c * patch_voxels, 0, block.weights.data() + r * size, size,
                      sums(r) + c * stride, 0, add_one);
      }
    }
  }

  const Fusion& q;
  const bool in_place;   // the result's memory holds the sums
  const bool registers;  // where patches are activated, instead of in a block
  const int64_t patch_voxels;
  Block<R> block;  // from registers, its weights alone
  Shares<R> shares;
  std::vector<R> scratch;
  std::vector<Shared> pieces;
};

template <class T, class R>
void forward_activated(const Fusion& q, int64_t first_task, int64_t last_task) {
  ActivatedGather<T, R> gather(q);
  for (int64_t task = first_task; task < last_task; ++task) gather(Tile(q, task));
}

// One task is slice tz of patch i: p_c (a_c - sum_k p_k a_k) or p (1 - p) a, where a is the
// weighted gradient.
template <class T, class R>
void backward_activated(const Fusion& q, int64_t first_task, int64_t last_task) {
  using V = Vec<R>;
  constexpr int width = Lanes<R>::width;
  const int64_t patch_voxels = q.patch[0] * q.patch[1] * q.patch[2];
  const int64_t volume = q.extent[0] * q.extent[1] * q.extent[2];
  Block<R> block(q.channels);
  Shares<R> shares(q);
  std::vector<R> slopes(q.channels * block.room), means(block.room);
  const T* source = static_cast<const T*>(q.source);
  const T* activated = static_cast<const T*>(q.activated);
  T* target = static_cast<T*>(q.target);

  const auto part = [&](int64_t i, int64_t tz, int64_t ty, int64_t tx, int64_t n) {
    // Columns [first, last) of the row's part are inside.
    const int64_t* origin = q.origins + 3 * i;
    const int64_t z = origin[0] + tz, y = origin[1] + ty, x = origin[2] + tx;
    const bool inside = z >= 0 && z < q.extent[0] && y >= 0 && y < q.extent[1];
    const int64_t first = std::clamp<int64_t>(-x, 0, n);
    const int64_t last = inside ? std::clamp<int64_t>(q.extent[2] - x, first, n) : first;
    const int64_t line = (z * q.extent[1] + y) * q.extent[2] + x;
    const int64_t place = i * q.channels * patch_voxels + (tz * q.patch[1] + ty) * q.patch[2] + tx;
    for (int64_t c = 0; c < q.channels; ++c) {
      T* out = target + place + c * patch_voxels;
      std::fill(out, out + first, T{});
      std::fill(out + last, out + n, T{});
    }
    if (first == last) return;
    const int64_t count = last - first;
    for (int64_t c = 0; c < q.channels; ++c) {
      convert_row<R>(activated + place + c * patch_voxels + first, 1, count, block.row(c));
      convert_row<R>(source + c * volume + line + first, 1, count, slopes.data() + c * block.room);
    }
    const double* total = q.total == nullptr ? nullptr : q.total + line + first;
    make_weights(q, shares, i, tz, ty, tx + first, count, total, block.weights.data());
    if (q.activation == Activation::softmax) {
      block.softmax(count);
      block.divide_weights(count);
      for (int64_t j = 0; j < count; j += width) {
        V dot{};
        for (int64_t c = 0; c < q.channels; ++c) {
          dot += load(block.row(c) + j) * load(slopes.data() + c * block.room + j);
        }
        store(means.data() + j, dot / load(block.sums.data() + j));
      }
    }
    for (int64_t c = 0; c < q.channels; ++c) {
      R* value = block.row(c);
      const R* slope = slopes.data() + c * block.room;
      for (int64_t j = 0; j < count; j += width) {
        const V w = load(block.weights.data() + j), z = load(value + j), g = load(slope + j);
        if (q.activation == Activation::softmax) {
          store(value + j, w * z * (g - load(means.data() + j)));
        } else {
          // p (1 - p), whichever of the two is the small one
          const V e = exponential(-absolute(z)), inverse = R(1) / (R(1) + e);
          store(value + j, w * (e * inverse * inverse) * g);
        }
      }
      write_row(value, count, target + place + c * patch_voxels + first, 1);
    }
  };
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t i = task / q.patch[0], tz = task % q.patch[0];
    for (int64_t ty = 0; ty < q.patch[1]; ++ty) {
      for (int64_t tx = 0; tx < q.patch[2]; tx += block.most) {
        part(i, tz, ty, tx, std::min(block.most, q.patch[2] - tx));
      }
    }
  }
}

}  // namespace
}  // namespace voxfuse::VOXFUSE_ISA
