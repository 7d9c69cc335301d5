// Interpolation of channels with the decision taken in registers. Compiled once an instruction set
// (see csrc/cpu/dispatch.h).
//
// A task is a few target rows of one target slice. The source rows that one of them lies between
// are interpolated between two slices once, for all channels, and stay as long as target rows need
// them; a target row is then a mean of two of them, and along it the channels of a vector of voxels
// are interpolated and compared in registers. No array of channels at the target's size exists.
//
// Four channels decide in some 20 instructions a vector, so that what is beside them counts: labels
// are narrowed in registers, and of source rows that are tame (no NaN, nothing infinite: looked at
// once, when they are read) no comparison asks for a NaN, and no voxel whether its second
// neighbour, of weight 0, is one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "contract/resample_argmax.h"
#include "cpu/rows.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

constexpr int kWidth = Lanes<float>::width;
using V = Vec<float>;
using I = Mask<float>;
constexpr float kTamest = 1e38f;

// The target voxels of one vector along the row: which source voxels they read, from `base` on, and
// how much each counts.
struct Columns {
  enum Reach { same, one, two, far } reach;  // how many vectors of source voxels hold them all
  bool single;                               // some read one source voxel only
  int64_t base;
  I lower, upper;
  V weight[2];
};

class Rows {
 public:
  explicit Rows(const Resampling& q)
      : q(q), width(padded(q.target[2])), span(padded(q.source[2]) + 2 * kWidth) {
    for (int64_t x = 0; x < q.target[2]; x += kWidth) columns.push_back(columns_from(x));
    // Lanes beyond a row are read, and then left unused.
    slices.resize(2 * q.channels * span);
    mixed.resize(q.channels * span);
    row.resize(span);
    values.resize(width);
  }

  void operator()(int64_t z, int64_t y) {
    const float* channels = between_rows(z, y);
    const int64_t place = (z * q.target[1] + y) * q.target[2];
    if (q.kept == Resampled::labels || q.kept == Resampled::regions) {
      return with_label(q.out_type, [&](auto label) {
        using T = decltype(label);
        if constexpr (std::is_integral_v<T>) decide<T>(channels, static_cast<T*>(q.out) + place);
      });
    }
    for (int64_t c = 0; c < q.channels; ++c) {
      for (size_t k = 0; k < columns.size(); ++k) {
        store(values.data() + k * kWidth, interpolated(channels + c * span, columns[k]));
      }
      write_values(c, place);
    }
  }

 private:
  static int64_t padded(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

  float lower_weight(int axis, int64_t k) const {
    return q.weight[axis] == nullptr ? 1.f : q.weight[axis][k];
  }
  float upper_weight(int axis, int64_t k) const {
    return q.weight[axis] == nullptr ? 0.f : q.weight[axis][q.target[axis] + k];
  }

  Columns columns_from(int64_t x) const {
    Columns result{};
    bool same = true;
    int64_t places[2][kWidth], low = std::numeric_limits<int64_t>::max(), high = 0;
    for (int j = 0; j < kWidth; ++j) {
      const int64_t k = std::min(x + j, q.target[2] - 1);
      const bool pair = upper_weight(2, k) != 0;
      places[0][j] = q.index[2] == nullptr ? k : q.index[2][k];
      places[1][j] = places[0][j] + pair;
      low = std::min(low, places[0][j]);
      high = std::max(high, places[1][j]);
      result.weight[0][j] = lower_weight(2, k);
      result.weight[1][j] = upper_weight(2, k);
      result.single |= !pair;
      same &= !pair && (x + j >= q.target[2] || places[0][j] == places[0][0] + j);
    }
    result.base = low;
    for (int j = 0; j < kWidth; ++j) {
      result.lower[j] = static_cast<int32_t>(places[0][j] - low);
      result.upper[j] = static_cast<int32_t>(places[1][j] - low);
    }
    result.reach = same                      ? Columns::same
                   : high - low < kWidth     ? Columns::one
                   : high - low < 2 * kWidth ? Columns::two
                                             : Columns::far;
    return result;
  }

  // All channels of target row y of slice z at the source's columns, `span` apart.
  const float* between_rows(int64_t z, int64_t y) {
    const int64_t first = q.index[1] == nullptr ? y : q.index[1][y];
    const float w1 = upper_weight(1, y);
    const float* low = between_slices(z, first);
    tame = tame_rows[first % 2];
    if (w1 == 0) return low;
    const float* high = between_slices(z, first + 1);
    tame = tame && tame_rows[(first + 1) % 2];
    const float w0 = lower_weight(1, y);
    for (int64_t c = 0; c < q.channels; ++c) {
      mean(low + c * span, high + c * span, w0, w1, q.source[2], mixed.data() + c * span);
    }
    return mixed.data();
  }

  // All channels of source row `place`, interpolated between the slices of target slice z.
  const float* between_slices(int64_t z, int64_t place) {
    float* rows = slices.data() + place % 2 * q.channels * span;
    if (held[place % 2] != place || slice_held[place % 2] != z) {
      held[place % 2] = place;
      slice_held[place % 2] = z;
      with_element(q.type, [&](auto element) { read_row<decltype(element)>(z, place, rows); });
      tame_rows[place % 2] = all_tame(rows);
    }
    return rows;
  }

  // Whether nothing in the rows is NaN or infinite, or so great that a mean of means could be.
  bool all_tame(const float* rows) const {
    I most{};
    for (int64_t c = 0; c < q.channels; ++c, rows += span) {
      int64_t i = 0;
      for (; i + kWidth <= q.source[2]; i += kWidth) {
        const I bits = reinterpret_cast<I>(load(rows + i)) & 0x7fffffff;
        most = bits > most ? bits : most;
      }
      for (; i < q.source[2]; ++i) {
        if (!(std::abs(rows[i]) < kTamest)) return false;
      }
    }
    const V greatest = reinterpret_cast<V>(most);
    for (int j = 0; j < kWidth; ++j) {
      if (!(greatest[j] < kTamest)) return false;
    }
    return true;
  }

  template <class T>
  void read_row(int64_t z, int64_t place, float* rows) {
    const int64_t slice = q.index[0] == nullptr ? z : q.index[0][z], n = q.source[2];
    const float w0 = lower_weight(0, z), w1 = upper_weight(0, z);
    const T* from = static_cast<const T*>(q.input) + slice * q.stride[0] + place * q.stride[1];
    for (int64_t c = 0; c < q.channels; ++c, from += q.channel_stride, rows += span) {
      if (w1 == 0) {
        convert_row(from, q.stride[2], n, rows);
      } else if (std::is_same_v<T, float> && q.stride[2] == 1) {
        const float* low = reinterpret_cast<const float*>(from);
        mean(low, low + q.stride[0], w0, w1, n, rows);
      } else {
        convert_row(from, q.stride[2], n, rows);
        convert_row(from + q.stride[0], q.stride[2], n, row.data());
        mean(rows, row.data(), w0, w1, n, rows);
      }
    }
  }

  static void mean(const float* a, const float* b, float w0, float w1, int64_t n, float* out) {
    const V v0 = broadcast<float>(w0), v1 = broadcast<float>(w1);
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      store(out + i, multiply_add(load(b + i), v1, load(a + i) * v0));
    }
    if (i == n) return;
    float x[kWidth] = {}, y[kWidth] = {};
    std::copy(a + i, a + n, x);
    std::copy(b + i, b + n, y);
    const V v = multiply_add(load(y), v1, load(x) * v0);
    std::memcpy(out + i, &v, (n - i) * sizeof(float));
  }

  static VOXFUSE_INLINE V pick(V first, V second, I place) {
#if defined(__AVX512F__)
    return _mm512_permutex2var_ps(first, reinterpret_cast<__m512i>(place), second);
#else
    return __builtin_shuffle(first, second, place);
#endif
  }
  static VOXFUSE_INLINE V pick(V first, I place) {
#if defined(__AVX512F__)
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(place), first);
#elif defined(__AVX2__)
    return _mm256_permutevar8x32_ps(first, reinterpret_cast<__m256i>(place));
#else
    return __builtin_shuffle(first, place);
#endif
  }

  // Where v is greater than the most so far. A NaN is greater than any number, and nothing than it;
  // among tame values there is none to look for.
  template <bool kTame>
  static VOXFUSE_INLINE Choice greater(V v, V most) {
#if defined(__AVX512F__)
    if constexpr (kTame) return _mm512_cmp_ps_mask(v, most, _CMP_GT_OQ);
    const Choice number = _mm512_cmp_ps_mask(most, most, _CMP_ORD_Q);
    return _mm512_mask_cmp_ps_mask(number, v, most, _CMP_NLE_UQ);
#else
    return kTame ? v > most : ~(v <= most) & (most == most);
#endif
  }

  static VOXFUSE_INLINE I label_where(Choice c, int32_t label, I otherwise) {
    const I labels = I{} + label;
#if defined(__AVX512F__)
    return reinterpret_cast<I>(_mm512_mask_blend_epi32(c, reinterpret_cast<__m512i>(otherwise),
                                                       reinterpret_cast<__m512i>(labels)));
#else
    return c ? labels : otherwise;
#endif
  }

  template <Columns::Reach kReach, bool kPlain>
  VOXFUSE_INLINE V interpolated_from(const float* from, const Columns& at) const {
    V low, high;
    if constexpr (kReach == Columns::same) {
      low = load(from);
      return !kPlain && q.round_to_half ? rounded_to_half(low) : low;
    } else if constexpr (kReach == Columns::one) {
      const V a = load(from);
      low = pick(a, at.lower);
      high = pick(a, at.upper);
    } else if constexpr (kReach == Columns::two) {
      const V a = load(from), b = load(from + kWidth);
      low = pick(a, b, at.lower);
      high = pick(a, b, at.upper);
    } else {
      for (int j = 0; j < kWidth; ++j) {
        low[j] = from[at.lower[j]];
        high[j] = from[at.upper[j]];
      }
    }
    V v = multiply_add(high, at.weight[1], low * at.weight[0]);
    if constexpr (kPlain) return v;
    // What is not read does not count, infinite or NaN.
    if (at.single) v = at.weight[1] == V{} ? low : v;
    return q.round_to_half ? rounded_to_half(v) : v;
  }

  // Calls f(reach, plain) with what the compiler is to know of a vector of columns: whether every
  // voxel may be computed as a mean of two, and stays float32. Where the upper weight is 0, tame
  // values may: but for the sign of a 0.
  template <class F>
  VOXFUSE_INLINE void with_columns(const Columns& at, bool tame, F&& f) const {
    using Reach = Columns::Reach;
    const bool plain = (tame || !at.single) && !q.round_to_half;
    if (at.reach == Columns::one && plain) {
      f(std::integral_constant<Reach, Columns::one>{}, std::true_type{});
    } else if (at.reach == Columns::two && plain) {
      f(std::integral_constant<Reach, Columns::two>{}, std::true_type{});
    } else if (at.reach == Columns::same) {
      f(std::integral_constant<Reach, Columns::same>{}, std::false_type{});
    } else if (at.reach == Columns::one) {
      f(std::integral_constant<Reach, Columns::one>{}, std::false_type{});
    } else if (at.reach == Columns::two) {
      f(std::integral_constant<Reach, Columns::two>{}, std::false_type{});
    } else {
      f(std::integral_constant<Reach, Columns::far>{}, std::false_type{});
    }
  }

  V interpolated(const float* channel, const Columns& at) const {
    V v;
    with_columns(at, false, [&](auto reach, auto plain) __attribute__((always_inline)) {
      v = interpolated_from<reach(), plain()>(channel + at.base, at);
    });
    return v;
  }

  static VOXFUSE_INLINE V rounded_to_half(V v) {
    float x[kWidth];
    store(x, v);
    for (float& one : x) one = half_to_float(float_to_half(one));
    return load(x);
  }

  // Decides between the channels of a row.
  template <class T>
  void decide(const float* channels, T* out) {
    if (q.kept == Resampled::regions) {
      along<T>(out, [&](const Columns& at, auto reach, auto plain) __attribute__((always_inline)) {
        return region<reach(), plain()>(channels + at.base, at);
      });
    } else if (tame) {
      along<T>(out, [&](const Columns& at, auto reach, auto plain) __attribute__((always_inline)) {
        return greatest<reach(), plain(), true>(channels + at.base, at);
      });
    } else {
      along<T>(out, [&](const Columns& at, auto reach, auto plain) __attribute__((always_inline)) {
        return greatest<reach(), plain(), false>(channels + at.base, at);
      });
    }
  }

  // Writes label(columns, reach, plain) of a row, a vector of target voxels at a time.
  template <class T, class F>
  void along(T* out, F&& label) const {
    int64_t left = q.target[2];
    for (const Columns& at : columns) {
      I wide;
      with_columns(at, tame, [&](auto reach, auto plain) __attribute__((always_inline)) {
        wide = label(at, reach, plain);
      });
      const Narrow<T> narrow = narrowed<T>(wide);
      if (left >= kWidth) {
        std::memcpy(out, &narrow, sizeof(narrow));
      } else {
        std::memcpy(out, &narrow, left * sizeof(T));
      }
      out += kWidth;
      left -= kWidth;
    }
  }

  template <class T>
  using Narrow __attribute__((vector_size(kWidth * sizeof(T)))) = T;

  // Labels that a T holds, as such.
  template <class T>
  static VOXFUSE_INLINE Narrow<T> narrowed(I label) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // Element by element otherwise.
    if constexpr (sizeof(T) <= 2) {
      const __m256i wide = reinterpret_cast<__m256i>(label);
      __m128i half =
          _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
      if constexpr (sizeof(T) == 1) half = _mm_packus_epi16(half, half);
      Narrow<T> result;
      std::memcpy(&result, &half, sizeof(result));
      return result;
    }
#endif
    return __builtin_convertvector(label, Narrow<T>);
  }

  // The greatest channel of a vector of voxels: ties to the lower, the first NaN is the greatest.
  template <Columns::Reach kReach, bool kPlain, bool kTame>
  VOXFUSE_INLINE I greatest(const float* from, const Columns& at) const {
    V most = interpolated_from<kReach, kPlain>(from, at);
    I label{};
    for (int64_t c = 1; c < q.channels; ++c) {
      const V v = interpolated_from<kReach, kPlain>(from += span, at);
      const Choice chosen = greater<kTame>(v, most);
      most = select(chosen, v, most);
      label = label_where(chosen, static_cast<int32_t>(c), label);
    }
    return label;
  }

  // The label of the last channel that is at least so great, or 0.
  template <Columns::Reach kReach, bool kPlain>
  VOXFUSE_INLINE I region(const float* from, const Columns& at) const {
    const V least = broadcast<float>(q.least);
    I label{};
    for (int64_t c = 0; c < q.channels; ++c, from += span) {
      const I own = I{} + static_cast<int32_t>(q.regions[c]);
      label = interpolated_from<kReach, kPlain>(from, at) >= least ? own : label;
    }
    return label;
  }

  void write_values(int64_t c, int64_t place) {
    const int64_t at = c * q.target[0] * q.target[1] * q.target[2] + place;
    if (q.kept == Resampled::values) {
      std::copy_n(values.data(), q.target[2], static_cast<float*>(q.out) + at);
    } else {
      bool* to = static_cast<bool*>(q.out) + at;
      for (int64_t x = 0; x < q.target[2]; ++x) to[x] = values[x] >= q.least;
    }
  }

  const Resampling& q;
  int64_t width, span;
  std::vector<Columns> columns;
  // Source rows of all channels between two slices, an even and an odd one, and which they are.
  std::vector<float> slices;
  int64_t held[2] = {-1, -1}, slice_held[2] = {-1, -1};
  // Of each of them, and of what the row is made of at present: whether all of it is tame.
  bool tame_rows[2] = {false, false}, tame = false;
  std::vector<float> mixed, row, values;
};

}  // namespace

void resample_rows(const Resampling& q, int64_t first_row, int64_t last_row) {
  Rows rows(q);
  for (int64_t row = first_row; row < last_row; ++row) {
    rows(row / q.target[1], row % q.target[1]);
  }
}

}  // namespace voxfuse::VOXFUSE_ISA
