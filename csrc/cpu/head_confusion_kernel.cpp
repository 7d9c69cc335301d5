// The head-confusion kernels. Compiled once an instruction set (see csrc/cpu/dispatch.h).
//
// A range of voxels is walked in tiles whose features and logits stay in the second-level cache.
// The matrix products are written here rather than left to a BLAS, so that their bits depend
// neither on the number of threads nor on a library; what becomes of a tile of logits is the
// business of the soft-confusion kernels. In the backward pass the tile of logits turns into their
// gradient in place, and the tile of features, when it has served, into the features' gradient.
#include <algorithm>
#include <vector>

#include "cpu/half.h"
#include "cpu/head_confusion.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace voxfuse::VOXFUSE_ISA {

bool confusion_forward(const SoftConfusion& q, int64_t b, int64_t begin, int64_t end, double* out);
bool confusion_backward(const SoftConfusion& q, int64_t b, int64_t begin, int64_t end,
                        bool past_caches);

namespace {

// ---------------------------------------------------------------------------------------------
// Products of small matrices: blocks of kRows x kColumns vectors in registers

// 32 vector registers with AVX-512, 16 elsewhere.
inline constexpr int kRows = kVectorBytes == 64 ? 6 : 4;
inline constexpr int kColumns = kVectorBytes == 64 ? 4 : 2;

// out[m][v] = offset[m] + sum_k a[k][m] b[k][v] for M rows m and kColumns vectors v; `a` is packed.
template <class R, int M>
void multiply_block(const R* a, int64_t depth, const R* b, int64_t b_stride, const R* offset,
                    R* out, int64_t out_stride) {
  using V = Vec<R>;
  constexpr int width = Lanes<R>::width;
  V sum[M][kColumns];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < kColumns; ++n) sum[m][n] = broadcast<R>(offset[m]);
  }
  for (int64_t k = 0; k < depth; ++k) {
    V right[kColumns];
    for (int n = 0; n < kColumns; ++n) right[n] = load(b + k * b_stride + n * width);
    for (int m = 0; m < M; ++m) {
      const R left = a[k * M + m];
      for (int n = 0; n < kColumns; ++n) sum[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < kColumns; ++n) store(out + m * out_stride + n * width, sum[m][n]);
  }
}

// The sum of a vector's lanes, as a tree.
template <class R, int N = Lanes<R>::width>
VOXFUSE_INLINE R tree_sum(const R* lanes) {
  if constexpr (N == 1) {
    return lanes[0];
  } else {
    R half[N / 2];
    for (int i = 0; i < N / 2; ++i) half[i] = lanes[i] + lanes[i + N / 2];
    return tree_sum<R, N / 2>(half);
  }
}
template <class R>
VOXFUSE_INLINE double sum_as_tree(Vec<R> v) {
  R lanes[Lanes<R>::width];
  store(lanes, v);
  return static_cast<double>(tree_sum<R>(lanes));
}

// out[m][n] += sum_v a[m][v] b[n][v] for M x N rows; `voxels` is a multiple of the vector width.
template <class R, int M, int N>
void correlate_block(const R* a, int64_t a_stride, const R* b, int64_t b_stride, int64_t voxels,
                     double* out, int64_t out_stride) {
  using V = Vec<R>;
  V sum[M][N] = {};
  for (int64_t v = 0; v < voxels; v += Lanes<R>::width) {
    V right[N];
    for (int n = 0; n < N; ++n) right[n] = load(b + n * b_stride + v);
    for (int m = 0; m < M; ++m) {
      const V left = load(a + m * a_stride + v);
      for (int n = 0; n < N; ++n) sum[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) out[m * out_stride + n] += sum_as_tree<R>(sum[m][n]);
  }
}

// A matrix (rows, depth) as multiply_block reads it: blocks of kRows rows, in each one all rows'
// numbers of a column together.
template <class R>
struct Packed {
  int64_t rows, depth;
  std::vector<R> numbers, offset;

  template <class Number>
  Packed(int64_t rows, int64_t depth, Number number) : rows(rows), depth(depth) {
    offset.resize(rows);
    numbers.reserve(rows * depth);
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t stop = std::min<int64_t>(row + kRows, rows);
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t r = row; r < stop; ++r) numbers.push_back(number(r, k));
      }
    }
  }
};

// out = a b + offset for a tile b of (depth, voxels); `voxels` is a multiple of kTileVoxels.
template <class R>
void multiply(const Packed<R>& a, const R* b, int64_t stride, int64_t voxels, R* out) {
  constexpr int64_t panel = kColumns * Lanes<R>::width;
  static_assert(kTileVoxels % panel == 0);
  for (int64_t v = 0; v < voxels; v += panel) {
    for (int64_t row = 0; row < a.rows; row += kRows) {
      with_count<kRows>(std::min<int64_t>(kRows, a.rows - row), [&](auto m) {
        multiply_block<R, m()>(a.numbers.data() + row * a.depth, a.depth, b + v, stride,
                               a.offset.data() + row, out + row * stride + v, stride);
      });
    }
  }
}

// out (a_rows, out_stride >= b_rows) += a b^T, both tiles of rows of voxels.
template <class R>
void correlate(const R* a, int64_t a_rows, const R* b, int64_t b_rows, int64_t stride,
               int64_t voxels, double* out, int64_t out_stride) {
  for (int64_t i = 0; i < a_rows; i += kRows) {
    with_count<kRows>(std::min<int64_t>(kRows, a_rows - i), [&](auto m) {
      for (int64_t j = 0; j < b_rows; j += kColumns) {
        with_count<kColumns>(std::min<int64_t>(kColumns, b_rows - j), [&](auto n) {
          correlate_block<R, m(), n()>(a + i * stride, stride, b + j * stride, stride, voxels,
                                       out + i * out_stride + j, out_stride);
        });
      }
    });
  }
}

// ---------------------------------------------------------------------------------------------
// Tiles

template <class R>
std::vector<R> converted(const void* source, Element type, int64_t n) {
  std::vector<R> out(n);
  with_float(
      type, [&](auto tag) { convert_row<R>(element<decltype(tag)>(source, 0), 1, n, out.data()); });
  return out;
}

// Channels-last voxels pass through a buffer in the first-level cache.
inline constexpr int64_t kInterleavedVoxels = 64;

template <class R>
struct Tiles {
  const Head& head;
  const int64_t classes, channels;
  const int64_t
      stride;         // of the rows; one cache line more than a tile, so that rows do not collide
  Packed<R> forward;  // the head's weight and bias
  std::vector<R> features, logits, interleaved;
  std::vector<uint8_t> excluded;

  explicit Tiles(const Head& h)
      : head(h),
        classes(h.confusion.classes),
        channels(h.channels),
        stride(h.tile + 64 / static_cast<int64_t>(sizeof(R))),
        forward(packed_weight(h)),
        features(channels * stride),
        logits(classes * stride) {
    if (h.bias != nullptr) forward.offset = converted<R>(h.bias, h.features.type, classes);
    if (interleaves(h.features.stride) || interleaves(h.gradient_stride)) {
      interleaved.resize(kInterleavedVoxels * channels + Lanes<R>::width);
    }
  }

  static Packed<R> packed_weight(const Head& h) {
    const std::vector<R> weight =
        converted<R>(h.weight, h.features.type, h.confusion.classes * h.channels);
    return Packed<R>(h.confusion.classes, h.channels,
                     [&](int64_t c, int64_t k) { return weight[c * h.channels + k]; });
  }
  static Packed<R> packed_transpose(const Head& h) {
    const std::vector<R> weight =
        converted<R>(h.weight, h.features.type, h.confusion.classes * h.channels);
    return Packed<R>(h.channels, h.confusion.classes,
                     [&](int64_t k, int64_t c) { return weight[c * h.channels + k]; });
  }

  bool interleaves(const Strides& s) const {
    return s.channel == 1 && s.voxel == channels && channels > 1;
  }

  // Brings the features of voxels [begin, begin + n) into rows, 0 up to `padded`.
  void read_features(int64_t b, int64_t begin, int64_t n, int64_t padded) {
    const Strides& s = head.features.stride;
    with_float(head.features.type, [&](auto tag) {
      const auto* source =
          element<decltype(tag)>(head.features.data, b * s.batch + begin * s.voxel);
      if (interleaves(s)) {
        for (int64_t v = 0; v < n; v += kInterleavedVoxels) {
          const int64_t count = std::min(kInterleavedVoxels, n - v);
          convert_row<R>(source + v * channels, 1, count * channels, interleaved.data());
          split_channels(interleaved.data(), count, channels, features.data() + v, stride);
        }
      } else {
        for (int64_t k = 0; k < channels; ++k) {
          convert_row<R>(source + k * s.channel, s.voxel, n, features.data() + k * stride);
        }
      }
    });
    for (int64_t k = 0; k < channels; ++k) {
      R* row = features.data() + k * stride;
      std::fill(row + n, row + padded, R{0});
    }
  }

  // Writes rows of features' gradient to voxels [begin, begin + n).
  void write_gradient(int64_t b, int64_t begin, int64_t n) {
    const Strides& s = head.gradient_stride;
    with_float(head.features.type, [&](auto tag) {
      using T = decltype(tag);
      T* out = static_cast<T*>(head.gradient) + b * s.batch + begin * s.voxel;
      if (interleaves(s)) {
        for (int64_t v = 0; v < n; v += kInterleavedVoxels) {
          const int64_t count = std::min(kInterleavedVoxels, n - v);
          merge_channels(features.data() + v, stride, count, channels, interleaved.data());
          write_row<R>(interleaved.data(), count * channels, out + v * channels, 1);
        }
      } else {
        for (int64_t k = 0; k < channels; ++k) {
          write_row<R>(features.data() + k * stride, n, out + k * s.channel, s.voxel);
        }
      }
    });
  }

  // The soft-confusion problem of this tile. The logits' gradient takes the logits' place, which
  // the kernels allow: they write a voxel's gradient when they have read all its logits.
  SoftConfusion confusion(int64_t b, int64_t begin, int64_t n) {
    SoftConfusion q = head.confusion;
    const auto advance = [&](const View& x) {
      return static_cast<const char*>(x.data) +
             (b * x.stride.batch + begin * x.stride.voxel) * bytes_of(x.type);
    };
    q.batch = 1;
    q.voxels = n;
    q.input = {
        logits.data(), std::is_same_v<R, float> ? Element::f32 : Element::f64, {0, stride, 1}};
    q.target.data = advance(q.target);
    if (q.weight.data != nullptr) q.weight.data = advance(q.weight);
    if (q.annotated != nullptr) q.annotated += b * classes;
    if (q.cotangents != nullptr) {
      q.cotangents += b * classes * q.columns;
      q.gradient = logits.data();
      q.gradient_stride = q.input.stride;
    }
    return q;
  }

  // Sets `excluded` for the tile's voxels; returns whether there is any.
  bool find_excluded(const SoftConfusion& q) {
    excluded.assign(q.voxels, 0);
    uint8_t any = 0;
    if (q.weight.data != nullptr) {
      with_element(q.weight.type, [&](auto tag) {
        const auto* source = element<decltype(tag)>(q.weight.data, 0);
        for (int64_t v = 0; v < q.voxels; ++v) {
          excluded[v] |= to_real<R>(source[v * q.weight.stride.voxel]) == 0;
          any |= excluded[v];
        }
      });
    }
    if (q.has_ignore && holds(q.target.type, q.ignore_index)) {
      with_label(q.target.type, [&](auto tag) {
        using T = decltype(tag);
        const auto* source = element<T>(q.target.data, 0);
        const int64_t ignored = as_read<T>(q.ignore_index);
        for (int64_t v = 0; v < q.voxels; ++v) {
          excluded[v] |= integer_label(source[v * q.target.stride.voxel]) == ignored;
          any |= excluded[v];
        }
      });
    }
    if (q.annotated != nullptr && q.unlabelled == Unlabelled::exclude && !q.dense) {
      with_label(q.target.type, [&](auto tag) {
        const auto* source = element<decltype(tag)>(q.target.data, 0);
        for (int64_t v = 0; v < q.voxels; ++v) {
          const int64_t label = integer_label(source[v * q.target.stride.voxel]);
          const bool is_class = label >= 0 && label < classes;
          excluded[v] |= is_class && q.annotated[label] == 0;
          any |= excluded[v];
        }
      });
    }
    return any != 0;
  }

  void clear_excluded_features() {
    const int64_t n = static_cast<int64_t>(excluded.size());
    for (int64_t k = 0; k < channels; ++k) {
      R* row = features.data() + k * stride;
      for (int64_t v = 0; v < n; ++v) row[v] = excluded[v] ? R{0} : row[v];
    }
  }
};

int64_t padded_to_tile(int64_t n) { return (n + kTileVoxels - 1) / kTileVoxels * kTileVoxels; }

template <class R>
bool forward_range(const Head& head, int64_t b, int64_t begin, int64_t end, double* out) {
  Tiles<R> tiles(head);
  const int64_t rows = tiles.classes * head.confusion.columns;
  std::vector<double> sums(rows);
  std::fill(out, out + rows, 0.0);
  for (int64_t at = begin; at < end; at += head.tile) {
    const int64_t n = std::min(head.tile, end - at), padded = padded_to_tile(n);
    tiles.read_features(b, at, n, padded);
    multiply(tiles.forward, tiles.features.data(), tiles.stride, padded, tiles.logits.data());
    if (confusion_forward(tiles.confusion(b, at, n), 0, 0, n, sums.data())) return true;
    for (int64_t i = 0; i < rows; ++i) out[i] += sums[i];
  }
  return false;
}

template <class R>
bool backward_range(const Head& head, int64_t b, int64_t begin, int64_t end, double* out) {
  Tiles<R> tiles(head);
  const Packed<R> backward = Tiles<R>::packed_transpose(head);
  const int64_t classes = tiles.classes, channels = tiles.channels, stride = tiles.stride;
  R* features = tiles.features.data();
  R* logits = tiles.logits.data();
  if (head.need_head) std::fill(out, out + classes * (channels + 1), 0.0);
  for (int64_t at = begin; at < end; at += head.tile) {
    const int64_t n = std::min(head.tile, end - at), padded = padded_to_tile(n);
    const SoftConfusion q = tiles.confusion(b, at, n);
    tiles.read_features(b, at, n, padded);
    // Zero gradients times NaN features would be NaN in the sums over voxels.
    const bool some_excluded = tiles.find_excluded(q);
    if (some_excluded) tiles.clear_excluded_features();
    multiply(tiles.forward, features, stride, padded, logits);
    if (confusion_backward(q, 0, 0, n, false)) return true;
    for (int64_t c = 0; c < classes; ++c) {
      std::fill(logits + c * stride + n, logits + c * stride + padded, R{0});
    }
    if (head.need_head) {
      correlate(logits, classes, features, channels, stride, padded, out, channels + 1);
      for (int64_t c = 0; c < classes; ++c) {
        Vec<R> sum{};
        for (int64_t v = 0; v < padded; v += Lanes<R>::width) {
          sum += load(logits + c * stride + v);
        }
        out[c * (channels + 1) + channels] += sum_as_tree<R>(sum);
      }
    }
    if (head.gradient != nullptr) {
      multiply(backward, logits, stride, padded, features);
      if (some_excluded) tiles.clear_excluded_features();
      tiles.write_gradient(b, at, n);
    }
  }
  return false;
}

}  // namespace

// Sums of voxels [begin, end) of sample b to out (classes, columns); returns whether a label
// without a class was met, which ends the walk.
bool head_forward(const Head& head, int64_t b, int64_t begin, int64_t end, double* out) {
  return head.features.type == Element::f64 ? forward_range<double>(head, b, begin, end, out)
                                            : forward_range<float>(head, b, begin, end, out);
}

// Writes the features' gradient of voxels [begin, end) of sample b and, to out (classes,
// channels + 1), their sums for weight and bias; returns as head_forward.
bool head_backward(const Head& head, int64_t b, int64_t begin, int64_t end, double* out) {
  return head.features.type == Element::f64 ? backward_range<double>(head, b, begin, end, out)
                                            : backward_range<float>(head, b, begin, end, out);
}

}  // namespace voxfuse::VOXFUSE_ISA
