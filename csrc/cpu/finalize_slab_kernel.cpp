// The finalisation kernel. Compiled once an instruction set (see csrc/cpu/dispatch.h).
//
// One pass over the ring: a chunk of voxels of all channels is read, turned into what is asked for,
// written, and its place in the ring cleared while it is still in cache. Nothing larger than a
// chunk is allocated.
#include <algorithm>
#include <cstring>
#include <vector>

#include "contract/finalize_slab.h"
#include "cpu/argmax.h"
#include "cpu/rows.h"
#include "math/confusion.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

// `channels` rows of values, `stride` apart.
template <class R>
struct Values {
  const R* data;
  int64_t stride;
};

template <class R>
VOXFUSE_INLINE Mask<R> is_nan(Vec<R> v) {
  return v != v;
}

// The greater of two; NaN of either survives.
template <class R>
VOXFUSE_INLINE Vec<R> maximum(Vec<R> a, Vec<R> b) {
  return (b > a) | is_nan<R>(b) ? b : a;
}

template <class R>
class Chunk {
  static constexpr int kWidth = Lanes<R>::width;

 public:
  explicit Chunk(const Slab& q)
      : q(q),
        room((q.chunk + kWidth - 1) / kWidth * kWidth),
        activate(!q.applied && q.activation != Activation::none && q.mode != Finish::labels),
        direct(q.weight == nullptr && q.divisor == 1 && !activate && q.mode != Finish::entropy),
        tile(direct ? 0 : q.classes * room),
        features(q.weight == nullptr ? 0 : q.channels * room),
        best(room),
        where(q.mode == Finish::labels ? room : 0) {}

  void operator()(int64_t outer, int64_t voxel, int64_t n) {
    const int64_t place = (q.first + voxel) % q.turn;
    R* source = static_cast<R*>(q.ring) + outer * q.turn + place;
    const int64_t stride = q.outer * q.turn;
    Values<R> values{source, stride};
    if (!direct) {
      load(source, stride, n);
      values = {tile.data(), room};
      if (activate) apply(n);
    }
    with_output([&](auto element) {
      using T = decltype(element);
      T* out = static_cast<T*>(q.out) + outer * q.out_outer + voxel;
      write(values, n, out);
      if (q.total != nullptr) leave_uncovered(q.total + outer * q.turn + place, n, out);
    });
    if (q.clear) {
      for (int64_t c = 0; c < q.channels; ++c) {
        std::fill(source + c * stride, source + c * stride + n, R(0));
      }
    }
  }

 private:
  template <class F>
  void with_output(F&& f) {
    switch (q.type) {
      case Element::f32:
        return f(float{});
      case Element::f16:
        return f(Half{});
      case Element::bf16:
        return f(BFloat16{});
      case Element::f64:
        return f(double{});
      case Element::i16:
        return f(uint16_t{});
      case Element::i32:
        return f(int32_t{});
      case Element::i64:
        return f(int64_t{});
      default:
        return f(uint8_t{});
    }
  }

  // Values divided by the number of predictions a patch, and through the head, into the tile. What
  // lies between n and a whole vector is 0, so that every voxel takes the same way.
  void load(const R* source, int64_t stride, int64_t n) {
    R* rows = q.weight == nullptr ? tile.data() : features.data();
    const R divisor = static_cast<R>(q.divisor);
    const int64_t end = (n + kWidth - 1) / kWidth * kWidth;
    for (int64_t c = 0; c < q.channels; ++c) {
      R* __restrict row = rows + c * room;
      const R* __restrict from = source + c * stride;
      if (q.divisor == 1) {
        std::copy(from, from + n, row);
      } else {
        for (int64_t j = 0; j < n; ++j) row[j] = from[j] / divisor;
      }
      std::fill(row + n, row + end, R(0));
    }
    if (q.weight == nullptr) return;
    int64_t c = 0;
    for (; c + 4 <= q.classes; c += 4) multiply<4>(c, end);
    for (; c < q.classes; ++c) multiply<1>(c, end);
  }

  // tile[c ... c + N) = bias + weight features
  template <int N>
  void multiply(int64_t c, int64_t end) {
    int64_t j = 0;
    for (; j + 2 * kWidth <= end; j += 2 * kWidth) multiply_vectors<N, 2>(c, j);
    for (; j < end; j += kWidth) multiply_vectors<N, 1>(c, j);
  }

  template <int N, int V>
  VOXFUSE_INLINE void multiply_vectors(int64_t c, int64_t j) {
    const R* weight = static_cast<const R*>(q.weight) + c * q.channels;
    const R* bias = static_cast<const R*>(q.bias) + c;
    Vec<R> sums[N][V];
    for (int i = 0; i < N; ++i) {
      for (int v = 0; v < V; ++v) sums[i][v] = broadcast<R>(bias[i]);
    }
    for (int64_t k = 0; k < q.channels; ++k) {
      Vec<R> x[V];
      for (int v = 0; v < V; ++v) x[v] = load_vector(features.data() + k * room + j + v * kWidth);
      for (int i = 0; i < N; ++i) {
        const Vec<R> w = broadcast<R>(weight[i * q.channels + k]);
        for (int v = 0; v < V; ++v) sums[i][v] += w * x[v];
      }
    }
    for (int i = 0; i < N; ++i) {
      for (int v = 0; v < V; ++v) store(tile.data() + (c + i) * room + j + v * kWidth, sums[i][v]);
    }
  }

  static VOXFUSE_INLINE Vec<R> load_vector(const R* p) { return voxfuse::VOXFUSE_ISA::load(p); }

  void apply(int64_t n) {
    for (int64_t j = 0; j < n; j += kWidth) {
      R* column = tile.data() + j;
      if (q.activation == Activation::sigmoid) {
        for (int64_t c = 0; c < q.classes; ++c) {
          const Vec<R> z = load_vector(column + c * room);
          const Vec<R> e = exponential(-absolute(z));
          // Divided, not multiplied by an inverse as in math::sigmoid: one rounding less, in a
          // kernel that waits for memory.
          store(column + c * room, (z < R(0) ? e : broadcast<R>(R(1))) / (e + R(1)));
        }
        continue;
      }
      Vec<R> most = load_vector(column);
      for (int64_t c = 1; c < q.classes; ++c) {
        most = maximum<R>(most, load_vector(column + c * room));
      }
      Vec<R> sum{};
      for (int64_t c = 0; c < q.classes; ++c) {
        const Vec<R> e = exponential(load_vector(column + c * room) - most);
        sum += e;
        store(column + c * room, e);
      }
      const Vec<R> inverse = broadcast<R>(R(1)) / sum;
      for (int64_t c = 0; c < q.classes; ++c) {
        store(column + c * room, load_vector(column + c * room) * inverse);
      }
    }
  }

  template <class T>
  void write(const Values<R>& values, int64_t n, T* out) {
    constexpr bool floating = std::is_same_v<T, float> || std::is_same_v<T, double> ||
                              std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;
    if constexpr (floating) {
      if (q.mode == Finish::foreground) {
        foreground(values, n);
        write_row(best.data(), n, out, 1);
      } else if (q.mode == Finish::entropy) {
        entropy(values, n);
        write_row(best.data(), n, out, 1);
      } else {
        for (int64_t c = 0; c < q.classes; ++c) {
          write_row(values.data + c * values.stride, n, out + c * q.out_channel, 1);
        }
      }
    } else if (q.mode == Finish::labels) {
      labels(values, n);
      const Index<R>* __restrict from = where.data();
      for (int64_t j = 0; j < n; ++j) out[j] = static_cast<T>(from[j]);
    } else {
      const R threshold = static_cast<R>(q.threshold);
      for (int64_t c = 0; c < q.classes; ++c) {
        const R* __restrict row = values.data + c * values.stride;
        T* __restrict to = out + c * q.out_channel;
        for (int64_t j = 0; j < n; ++j) to[j] = row[j] > threshold ? 1 : 0;
      }
    }
  }

  // The greatest channel's index: ties to the lower, the first NaN before everything.
  void labels(const Values<R>& values, int64_t n) {
    std::copy(values.data, values.data + n, best.data());
    std::fill(where.begin(), where.begin() + n, Index<R>(0));
    for (int64_t c = 1; c < q.classes; ++c) {
      keep_greater(values.data + c * values.stride, n, static_cast<Index<R>>(c), best.data(),
                   where.data());
    }
  }

  // The greatest value of all channels but the background; with a sigmoid, or one channel, there is
  // no background.
  void foreground(const Values<R>& values, int64_t n) {
    const int64_t first = q.classes > 1 && q.activation != Activation::sigmoid ? 1 : 0;
    std::copy(values.data + first * values.stride, values.data + first * values.stride + n,
              best.data());
    for (int64_t c = first + 1; c < q.classes; ++c) {
      const R* __restrict row = values.data + c * values.stride;
      R* __restrict b = best.data();
      for (int64_t j = 0; j < n; ++j) b[j] = (row[j] > b[j]) | (row[j] != row[j]) ? row[j] : b[j];
    }
  }

  // -sum p log p in nats over the classes; for a sigmoid, or one channel, the sum of the channels'
  // binary entropies.
  void entropy(const Values<R>& values, int64_t n) {
    const bool binary = q.classes == 1 || q.activation == Activation::sigmoid;
    for (int64_t j = 0; j < n; j += kWidth) {
      Vec<R> sum{};
      for (int64_t c = 0; c < q.classes; ++c) {
        const Vec<R> p = load_vector(values.data + c * values.stride + j);
        sum -= surprise(p);
        if (binary) sum -= surprise(R(1) - p);
      }
      store(best.data() + j, sum);
    }
  }

  // p log p, 0 at 0.
  static VOXFUSE_INLINE Vec<R> surprise(Vec<R> p) { return math::product(p, logarithm(p)); }

  template <class T>
  void leave_uncovered(const double* total, int64_t n, T* out) {
    T fill;
    if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>) {
      fill = from_real<T>(static_cast<float>(q.fill));
    } else if constexpr (std::is_floating_point_v<T>) {
      fill = static_cast<T>(static_cast<float>(q.fill));
    } else {
      fill = static_cast<T>(q.mode == Finish::mask ? q.fill != 0 : static_cast<int64_t>(q.fill));
    }
    const bool all = q.mode == Finish::values || q.mode == Finish::mask;
    for (int64_t c = 0; c < (all ? q.classes : 1); ++c) {
      T* __restrict row = out + c * q.out_channel;
      for (int64_t j = 0; j < n; ++j) row[j] = total[j] == 0 ? fill : row[j];
    }
  }

  const Slab& q;
  const int64_t room;
  const bool activate, direct;
  std::vector<R> tile, features, best;
  std::vector<Index<R>> where;
};

template <class R>
void finalize(const Slab& q, int64_t first_task, int64_t last_task) {
  Chunk<R> chunk(q);
  const int64_t chunks = (q.voxels + q.chunk - 1) / q.chunk;
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t outer = task / chunks;
    int64_t voxel = task % chunks * q.chunk;
    const int64_t end = std::min(voxel + q.chunk, q.voxels);
    while (voxel < end) {
      const int64_t until_wrap = q.turn - (q.first + voxel) % q.turn;
      const int64_t n = std::min(end - voxel, until_wrap);
      chunk(outer, voxel, n);
      voxel += n;
    }
  }
}

}  // namespace

void finalize_chunks(const Slab& q, int64_t first_task, int64_t last_task) {
  if (q.is_double) return finalize<double>(q, first_task, last_task);
  finalize<float>(q, first_task, last_task);
}

}  // namespace voxfuse::VOXFUSE_ISA
