// The soft-confusion kernels. Compiled once an instruction set (see csrc/cpu/dispatch.h).
//
// A range of voxels of one sample is walked in blocks that fit the first-level cache. Labels,
// weights and, where the layout or the type asks for it, logits of a block are first brought into
// one canonical form (unit voxel stride, compute type); then a core works on vectors of voxels:
//   - Fast*: labels, the common options, all classes of a vector in registers (C <= 16);
//   - general_*: every option and any number of classes, the classes of a vector in scratch memory.
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/half.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/soft_confusion.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

inline constexpr int kMaxFastClasses = 16;
inline constexpr int64_t kMaxBlock = 256;

// ---------------------------------------------------------------------------------------------
// Staging

// One block of voxels in canonical form. Excluded voxels have weight 0 and label -1.
template <class R>
struct Block {
  int64_t voxels;   // a multiple of the vector width; the tail is excluded padding
  const R* logits;  // (classes, voxels), class stride logits_stride
  int64_t logits_stride;
  const R* labels;  // (voxels), or null if dense
  const R* dense;   // (classes, voxels), class stride kMaxBlock-padded
  int64_t dense_stride;
  const R* weight;  // (voxels)
  bool unweighted;  // every voxel has weight 1
};

template <class R>
struct Workspace {
  int64_t block;  // voxels a block
  std::vector<R> logits, interleaved, labels, dense, weight, gradient, scratch;

  explicit Workspace(const Confusion& q) {
    const int64_t width = Lanes<R>::width;
    // Tiles of a block stay within about 24 KiB.
    block = std::clamp<int64_t>(6144 * 4 / (q.classes * static_cast<int64_t>(sizeof(R))), 64,
                                kMaxBlock);
    block = block / width * width;
    logits.resize(q.classes * block);
    if (q.input_stride.channel == 1 || (q.gradient != nullptr && q.gradient_stride.channel == 1)) {
      interleaved.resize(q.classes * block + width);
    }
    labels.resize(block);
    if (q.dense) dense.resize(q.classes * block);
    weight.resize(block);
    gradient.resize(q.gradient != nullptr ? q.classes * block : 0);
    scratch.resize(kScratchRows * q.classes * width);
  }
  static constexpr int64_t kScratchRows = 9;
};

// Labels to the compute type with -1 for ignored voxels; returns how many have no class.
template <class R, class T>
int64_t stage_labels(const Confusion& q, const T* source, int64_t stride, int64_t n, R* out) {
  int64_t wrong = 0;
  if constexpr (std::is_same_v<T, uint8_t> || std::is_same_v<T, int16_t> ||
                std::is_same_v<T, int32_t>) {
    if (stride == 1) {
      const int32_t classes =
          static_cast<int32_t>(std::min<int64_t>(q.classes, std::numeric_limits<int32_t>::max()));
      const bool representable = q.has_ignore &&
                                 q.ignore_index >= std::numeric_limits<int32_t>::min() &&
                                 q.ignore_index <= std::numeric_limits<int32_t>::max();
      int32_t bad = 0;
      if (representable) {
        const int32_t ignore = static_cast<int32_t>(q.ignore_index);
        for (int64_t i = 0; i < n; ++i) {
          const int32_t label = source[i];
          const bool ignored = label == ignore;
          bad += ignored ? 0 : (label < 0) | (label >= classes);
          out[i] = static_cast<R>(ignored ? -1 : label);
        }
      } else {
        for (int64_t i = 0; i < n; ++i) {
          const int32_t label = source[i];
          bad += (label < 0) | (label >= classes);
          out[i] = static_cast<R>(label);
        }
      }
      return bad;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t label = integer_label(source[i * stride]);
    const bool ignored = q.has_ignore && label == q.ignore_index;
    wrong += !ignored && (label < 0 || label >= q.classes);
    out[i] = static_cast<R>(ignored ? -1 : label);
  }
  return wrong;
}

// Brings voxels [begin, begin + n) of sample b into canonical form. Returns the number of labels
// that no class has.
template <class R>
int64_t stage(const Confusion& q, int64_t b, int64_t begin, int64_t n, Workspace<R>& work,
              Block<R>& out) {
  const int64_t width = Lanes<R>::width;
  const int64_t padded = (n + width - 1) / width * width;
  const int64_t room = work.block;
  int64_t wrong = 0;
  out.voxels = padded;

  // Weights, and through them the excluded voxels.
  R* weight = work.weight.data();
  bool unweighted = q.weight == nullptr;
  if (unweighted) {
    std::fill(weight, weight + n, R{1});
  } else {
    with_element(q.weight_type, [&](auto tag) {
      using T = decltype(tag);
      convert_row<R>(
          element<T>(q.weight, b * q.weight_stride.batch + begin * q.weight_stride.voxel),
          q.weight_stride.voxel, n, weight);
    });
    if (q.weight_type == Element::boolean) {
      for (int64_t i = 0; i < n; ++i) weight[i] = weight[i] != 0 ? R{1} : R{0};
    }
  }

  const int64_t target_offset = b * q.target_stride.batch + begin * q.target_stride.voxel;
  out.labels = nullptr;
  out.dense = nullptr;
  if (q.dense) {
    R* dense = work.dense.data();
    with_element(q.target_type, [&](auto tag) {
      using T = decltype(tag);
      for (int64_t c = 0; c < q.classes; ++c) {
        const T* source = element<T>(q.target, target_offset + c * q.target_stride.channel);
        R* row = dense + c * room;
        convert_row<R>(source, q.target_stride.voxel, n, row);
        if (q.target_type == Element::boolean) {
          for (int64_t i = 0; i < n; ++i) row[i] = row[i] != 0 ? R{1} : R{0};
        }
        std::fill(row + n, row + padded, R{0});
      }
      if (q.has_ignore) {  // one class: the wrapper allows ignore_index with a dense target only so
        const T* source = element<T>(q.target, target_offset);
        for (int64_t i = 0; i < n; ++i) {
          if (integer_label(source[i * q.target_stride.voxel]) == q.ignore_index) {
            weight[i] = 0;
            unweighted = false;
          }
        }
      }
      if constexpr (std::is_integral_v<T>) {
        if (q.classes == 1 && q.target_type != Element::boolean) {
          for (int64_t i = 0; i < n; ++i) {
            const R g = dense[i];
            wrong += !(g == 0 || g == 1) &&
                     !(q.has_ignore && weight[i] == 0 && static_cast<int64_t>(g) == q.ignore_index);
          }
        }
      }
    });
    if (!unweighted) {
      for (int64_t c = 0; c < q.classes; ++c) {
        R* row = dense + c * room;
        for (int64_t i = 0; i < n; ++i) row[i] = weight[i] == 0 ? R{0} : row[i];
      }
    }
    out.dense = dense;
    out.dense_stride = room;
  } else {
    R* labels = work.labels.data();
    with_element(q.target_type, [&](auto tag) {
      using T = decltype(tag);
      wrong = stage_labels<R, T>(q, element<T>(q.target, target_offset), q.target_stride.voxel, n,
                                 labels);
    });
    if (q.has_ignore) {
      R ignored = 0;
      for (int64_t i = 0; i < n; ++i) {
        ignored += labels[i] < 0 ? R{1} : R{0};
        weight[i] = labels[i] < 0 ? R{0} : weight[i];
      }
      if (ignored > 0) unweighted = false;
    }
    if (!unweighted) {
      for (int64_t i = 0; i < n; ++i) labels[i] = weight[i] == 0 ? R{-1} : labels[i];
    }
    std::fill(labels + n, labels + padded, R{-1});
    out.labels = labels;
  }
  std::fill(weight + n, weight + padded, R{0});
  out.weight = weight;
  out.unweighted = unweighted && padded == n;

  // Logits: read in place where they are contiguous in the compute type.
  constexpr Element own = std::is_same_v<R, float> ? Element::f32 : Element::f64;
  const int64_t offset = b * q.input_stride.batch + begin * q.input_stride.voxel;
  const bool direct = q.input_type == own && q.input_stride.voxel == 1 && padded == n &&
                      q.classes <= 32;  // more streams than that outrun the prefetcher
  if (direct) {
    out.logits = element<R>(q.input, offset);
    out.logits_stride = q.input_stride.channel;
  } else {
    R* tile = work.logits.data();
    with_element(q.input_type, [&](auto tag) {
      using T = decltype(tag);
      const T* source = element<T>(q.input, offset);
      if (q.input_stride.channel == 1 && q.input_stride.voxel == q.classes && q.classes > 1) {
        // Channels last. A copy in the first-level cache gives the transposition room to overrun.
        R* interleaved = work.interleaved.data();
        convert_row<R>(source, 1, n * q.classes, interleaved);
        split_channels(interleaved, n, q.classes, tile, room);
      } else {
        for (int64_t c = 0; c < q.classes; ++c) {
          convert_row<R>(source + c * q.input_stride.channel, q.input_stride.voxel, n,
                         tile + c * room);
        }
      }
    });
    for (int64_t c = 0; c < q.classes; ++c) {
      std::fill(tile + c * room + n, tile + c * room + padded, R{0.5});
    }
    out.logits = tile;
    out.logits_stride = room;
  }
  return wrong;
}

// ---------------------------------------------------------------------------------------------
// Elementwise mathematics on vectors

template <class R>
VOXFUSE_INLINE Vec<R> finite(Vec<R> z) {
  const R limit = std::numeric_limits<R>::max();
  return at_least(at_most(z, broadcast<R>(limit)), broadcast<R>(-limit));
}

// factor * value, 0 where factor is 0 whatever the value.
template <class R>
VOXFUSE_INLINE Vec<R> product(Vec<R> factor, Vec<R> value) {
  return factor == 0 ? Vec<R>{} : factor * value;
}

template <class R>
VOXFUSE_INLINE Vec<R> power(Vec<R> base, R exponent) {
  if (exponent == 0) return broadcast<R>(1);
  if (exponent == 1) return base;
  if (exponent == 2) return base * base;
  return exponential(exponent * logarithm(base));
}

// q = gamma r (1-r)^(gamma-1) log r - (1-r)^gamma; 0 at r = 1 for gamma > 0.
template <class R>
VOXFUSE_INLINE Vec<R> likelihood_slope(Vec<R> r, Vec<R> complement, Vec<R> minus_log, R gamma) {
  if (gamma == 0) return broadcast<R>(-1);
  const Mask<R> at_one = complement == 0;
  const Vec<R> base = at_one ? broadcast<R>(1) : complement;
  const Vec<R> lower = power<R>(base, gamma - 1);
  const Vec<R> slope = -gamma * product<R>(r, lower * minus_log) - lower * base;
  return at_one ? Vec<R>{} : slope;
}

// ---------------------------------------------------------------------------------------------
// General core

// Probabilities of the classes of one vector of voxels: rows of `width` values a class.
template <class R>
struct Rows {
  R *p, *complement, *minus_log;
  R* minus_log_complement;  // null for softmax
};

template <class R>
void probabilities(const Block<R>& block, int64_t classes, int64_t voxel, Vec<R> weight,
                   Activation activation, bool logs, const Rows<R>& rows) {
  using V = Vec<R>;
  constexpr int64_t width = Lanes<R>::width;
  const V one = broadcast<R>(1);
  const V harmless = broadcast<R>(0.5);
  const auto value = [&](int64_t c) {
    const V z = load(block.logits + c * block.logits_stride + voxel);
    return weight == 0 ? harmless : z;
  };
  if (activation == Activation::softmax) {
    V largest = finite<R>(value(0));
    // A NaN that the maximum passes over comes back with its own exponential.
    for (int64_t c = 1; c < classes; ++c) largest = at_least<V>(largest, finite<R>(value(c)));
    V total{}, others{};
    for (int64_t c = 0; c < classes; ++c) {
      const V z = finite<R>(value(c));
      const V e = exponential(z - largest);
      total += e;
      others += z == largest ? V{} : e;
      store(rows.p + c * width, e);
    }
    // Where one class alone is largest, `others` keeps what 1 + others rounds away.
    others = total > R(1.5) ? total - 1 : others;
    total = one + others;
    const V inverse = one / total;
    const V log_total = logs ? log1p(others, total, inverse) : V{};
    for (int64_t c = 0; c < classes; ++c) {
      const V e = load(rows.p + c * width);
      store(rows.p + c * width, e * inverse);
      store(rows.complement + c * width, (e == 1 ? others : total - e) * inverse);
      if (logs) store(rows.minus_log + c * width, (largest - finite<R>(value(c))) + log_total);
    }
  } else if (activation == Activation::sigmoid) {
    for (int64_t c = 0; c < classes; ++c) {
      const V z = finite<R>(value(c));
      const V e = exponential(-absolute(z));
      const V total = one + e;
      const V inverse = one / total;
      const V small = e * inverse;
      // z is tested against 0 so that a NaN, for which e is NaN too, stays one.
      store(rows.p + c * width, z < 0 ? small : inverse);
      store(rows.complement + c * width, z < 0 ? inverse : small);
      if (logs) {
        const V tail = log1p(e, total, inverse);
        store(rows.minus_log + c * width, (z < 0 ? -z : V{}) + tail);
        store(rows.minus_log_complement + c * width, (z < 0 ? V{} : z) + tail);
      }
    }
  } else {
    for (int64_t c = 0; c < classes; ++c) {
      const V p = value(c);
      store(rows.p + c * width, p);
      store(rows.complement + c * width, one - p);
      if (logs) {
        store(rows.minus_log + c * width, -logarithm(p));
        store(rows.minus_log_complement + c * width, -logarithm(one - p));
      }
    }
  }
}

template <class R>
VOXFUSE_INLINE Vec<R> target_of(const Block<R>& block, int64_t c, int64_t voxel) {
  if (block.dense != nullptr) return load(block.dense + c * block.dense_stride + voxel);
  return load(block.labels + voxel) == static_cast<R>(c) ? broadcast<R>(1) : Vec<R>{};
}

// Two sets of rows in the workspace's scratch: the overlap's probabilities and the likelihood's
// (the same rows if the activations agree).
template <class R>
struct Scratch {
  Rows<R> overlap, likelihood;
  R* h;
  Scratch(const Confusion& q, Workspace<R>& work) {
    const int64_t row = q.classes * Lanes<R>::width;
    R* s = work.scratch.data();
    overlap = {s, s + row, s + 2 * row, s + 3 * row};
    likelihood = q.likelihood == q.activation
                     ? overlap
                     : Rows<R>{s + 4 * row, s + 5 * row, s + 6 * row, s + 7 * row};
    h = s + 8 * row;
  }
};

template <class R>
void general_forward(const Confusion& q, const Block<R>& block, Workspace<R>& work, R* sums) {
  using V = Vec<R>;
  constexpr int64_t width = Lanes<R>::width;
  const Scratch<R> rows(q, work);
  const R gamma = static_cast<R>(q.gamma);
  const bool same = q.likelihood == q.activation;
  const bool full = q.statistics == 8;
  for (int64_t v = 0; v < block.voxels; v += width) {
    const V w = load(block.weight + v);
    probabilities(block, q.classes, v, w, q.activation, same, rows.overlap);
    if (!same) probabilities(block, q.classes, v, w, q.likelihood, true, rows.likelihood);
    for (int64_t c = 0; c < q.classes; ++c) {
      R* sum = sums + c * q.statistics * width;
      const auto add = [&](int s, V term) {
        store(sum + s * width, load(sum + s * width) + product<R>(w, term));
      };
      const V g = target_of(block, c, v);
      const V p = load(rows.overlap.p + c * width);
      if (q.overlap == Overlap::min) {
        add(0, at_most(p, g));
        add(1, at_least(p - g, V{}));
        add(2, at_least(g - p, V{}));
      } else {
        add(0, p * g);
        add(1, p * (1 - g));
        add(2, load(rows.overlap.complement + c * width) * g);
      }
      const V r = load(rows.likelihood.p + c * width);
      const V complement = load(rows.likelihood.complement + c * width);
      const V minus_log = load(rows.likelihood.minus_log + c * width);
      const R focal = c < q.focal_classes ? gamma : R{0};
      add(3, product<R>(g, power<R>(complement, focal) * minus_log));
      if (full) {
        add(4, product<R>(1 - g, q.likelihood == Activation::softmax
                                     ? minus_log
                                     : power<R>(r, focal) *
                                           load(rows.likelihood.minus_log_complement + c * width)));
        add(5, p * p);
        add(6, g * g);
        add(7, broadcast<R>(1));
      }
    }
  }
}

template <class R>
void general_backward(const Confusion& q, const Block<R>& block, Workspace<R>& work,
                      const R* cotangent, R* gradient, int64_t gradient_stride) {
  using V = Vec<R>;
  constexpr int64_t width = Lanes<R>::width;
  const Scratch<R> rows(q, work);
  const R gamma = static_cast<R>(q.gamma);
  const int S = q.statistics;
  const bool same = q.likelihood == q.activation;
  const bool logs = gamma != 0;
  for (int64_t v = 0; v < block.voxels; v += width) {
    const V w = load(block.weight + v);
    probabilities(block, q.classes, v, w, q.activation, same && logs, rows.overlap);
    if (!same) probabilities(block, q.classes, v, w, q.likelihood, logs, rows.likelihood);

    // h, measured from the most probable class's, so that the small gradients of a nearly perfect
    // prediction are not differences of large numbers; u of the likelihood.
    V best = broadcast<R>(-1), reference{}, mean_u{};
    for (int64_t c = 0; c < q.classes; ++c) {
      const R* t = cotangent + c * S;
      const V g = target_of(block, c, v);
      const V p = load(rows.overlap.p + c * width);
      V a = g;
      if (q.overlap == Overlap::min) {
        a = p < g ? broadcast<R>(1) : (p > g ? V{} : broadcast<R>(0.5));
      }
      V h = a * (t[0] - t[2]) + (1 - a) * t[1];
      if (S == 8) h += 2 * p * t[5];
      store(rows.h + c * width, h);
      if (q.activation == Activation::softmax) {
        reference = p > best ? h : reference;
        best = p > best ? p : best;
      }
    }
    V mean_h{};
    if (q.activation == Activation::softmax) {
      for (int64_t c = 0; c < q.classes; ++c) {
        mean_h += load(rows.overlap.p + c * width) * (load(rows.h + c * width) - reference);
      }
    }
    const auto focal = [&](int64_t c) { return c < q.focal_classes ? gamma : R{0}; };
    const auto slope_u = [&](int64_t c) {
      const R* t = cotangent + c * S;
      const V g = target_of(block, c, v);
      const V r = load(rows.likelihood.p + c * width);
      V u = t[3] * g *
            likelihood_slope<R>(r, load(rows.likelihood.complement + c * width),
                                logs ? load(rows.likelihood.minus_log + c * width) : V{}, focal(c));
      if (S == 8) u -= t[4] * (1 - g);
      return u;
    };
    if (q.likelihood == Activation::softmax) {
      for (int64_t c = 0; c < q.classes; ++c) mean_u += slope_u(c);
    }
    for (int64_t c = 0; c < q.classes; ++c) {
      const R* t = cotangent + c * S;
      const V p = load(rows.overlap.p + c * width);
      const V h = load(rows.h + c * width);
      V d;
      if (q.activation == Activation::softmax) {
        d = p * ((h - reference) - mean_h);
      } else if (q.activation == Activation::sigmoid) {
        d = p * load(rows.overlap.complement + c * width) * h;
      } else {
        d = h;
      }
      const V g = target_of(block, c, v);
      const V r = load(rows.likelihood.p + c * width);
      const V complement = load(rows.likelihood.complement + c * width);
      if (q.likelihood == Activation::softmax) {
        // u_c - r_c sum u, with the class's own part as u_c (1 - r_c).
        const V u = slope_u(c);
        d += u * complement - r * (mean_u - u);
      } else {
        const bool sigmoid = q.likelihood == Activation::sigmoid;
        const V one = broadcast<R>(1);
        const V minus_log = logs ? load(rows.likelihood.minus_log + c * width) : V{};
        const V slope = likelihood_slope<R>(r, complement, minus_log, focal(c));
        // Without a cotangent there is no slope, not even an infinite one (r = 0).
        d += product<R>(t[3] * g, slope * (sigmoid ? complement : one / r));
        if (S == 8) {
          const V mirrored = logs ? load(rows.likelihood.minus_log_complement + c * width) : V{};
          const V off = likelihood_slope<R>(complement, r, mirrored, focal(c));
          d -= product<R>(t[4] * (1 - g), off * (sigmoid ? r : one / complement));
        }
      }
      store(gradient + c * gradient_stride + v, product<R>(w, d));
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Fast cores (float32 arithmetic): product overlap, one activation, no focal modulation; softmax
// with labels, sigmoid with any target

// The softmax of one vector of voxels: exponentials relative to the largest logit, their total
// 1 + others, and its inverse. C = 0: as many classes as q.classes says, exponentials in memory.
template <int C, bool Weighted>
struct Softmax {
  using V = Vec<float>;
  static constexpr int width = Lanes<float>::width;
  V e[C == 0 ? 1 : C];
  float* rows;
  V largest, others, total, inverse;

  VOXFUSE_INLINE V logit(const Block<float>& block, int64_t c, int64_t v) const {
    const V z = finite<float>(load(block.logits + c * block.logits_stride + v));
    if constexpr (Weighted) {
      return load(block.weight + v) == 0 ? broadcast<float>(0.5f) : z;
    }
    return z;
  }
  VOXFUSE_INLINE V exponential_of(int64_t c) const {
    if constexpr (C == 0) return load(rows + c * width);
    return e[c];
  }
  // 1 - p of a class, from its exponential.
  VOXFUSE_INLINE V complement(V exponential) const {
    return (exponential == 1.f ? others : total - exponential) * inverse;
  }

  VOXFUSE_INLINE void compute(const Block<float>& block, int64_t classes, int64_t v) {
    if constexpr (C == 2) {
      const V d = logit(block, 0, v) * 0.5f - logit(block, 1, v) * 0.5f;  // halves: no overflow
      const V distance = absolute(d);
      others = exponential(-distance - distance);
      // A NaN makes `others`, and through it everything, NaN.
      e[0] = d < 0.f ? others : broadcast<float>(1.f);
      e[1] = d < 0.f ? broadcast<float>(1.f) : others;
      total = 1.f + others;
    } else {
      largest = logit(block, 0, v);
      for (int64_t c = 1; c < classes; ++c) largest = at_least(largest, logit(block, c, v));
      V sum{}, rest{};
      for (int64_t c = 0; c < classes; ++c) {
        const V z = logit(block, c, v);
        const V x = exponential(z - largest);
        sum += x;
        rest += z == largest ? V{} : x;
        if constexpr (C == 0) {
          store(rows + c * width, x);
        } else {
          e[c] = x;
        }
      }
      others = sum > 1.5f ? sum - 1.f : rest;
      total = 1.f + others;
    }
    inverse = 1.f / total;
  }

  // -log p of the class whose exponential is given, `below` the largest logit by that much.
  VOXFUSE_INLINE V log_total() const { return log1p(others, total, inverse); }
};

template <int C, bool Full, bool Weighted>
void softmax_forward(const Confusion& q, const Block<float>& block, float* scratch, float* sums) {
  using V = Vec<float>;
  constexpr int width = Lanes<float>::width;
  constexpr int S = Full ? 8 : 4;
  constexpr bool registers = C > 0 && C <= 4;
  const int64_t classes = C == 0 ? q.classes : C;
  V held[registers ? C * S : 1];
  if constexpr (registers) {
    for (int i = 0; i < C * S; ++i) held[i] = load(sums + i * width);
  }
  const auto add = [&](int64_t c, int s, V term) __attribute__((always_inline)) {
    if constexpr (registers) {
      held[c * S + s] += term;
    } else {
      float* sum = sums + (c * S + s) * width;
      store(sum, load(sum) + term);
    }
  };
  Softmax<C, Weighted> x;
  x.rows = scratch;
  for (int64_t v = 0; v < block.voxels; v += width) {
    x.compute(block, classes, v);
    const V label = load(block.labels + v);
    const V w = Weighted ? load(block.weight + v) : broadcast<float>(1.f);
    const V log_total = x.log_total();
    V own{}, own_z{};
    for (int64_t c = 0; c < classes; ++c) {
      const Mask<float> is = label == static_cast<float>(c);
      const V e = x.exponential_of(c);
      V p = e * x.inverse;
      if constexpr (Full) add(c, 5, Weighted ? V(p * p * w) : V(p * p));
      if constexpr (Weighted) p *= w;
      own = is ? e : own;
      if constexpr (C != 0) add(c, 0, is ? p : V{});
      add(c, 1, is ? V{} : p);
      if constexpr (C != 2) own_z = is ? x.logit(block, c, v) : own_z;
      if constexpr (Full) {
        V minus_log;
        if constexpr (C == 2) {
          const V d = x.logit(block, 1 - c, v) - x.logit(block, c, v);
          minus_log = (d > 0.f ? d : V{}) + log_total;
        } else {
          minus_log = (x.largest - x.logit(block, c, v)) + log_total;
        }
        if constexpr (Weighted) minus_log *= w;
        add(c, 4, is ? V{} : minus_log);
        add(c, 6, is ? w : V{});
        add(c, 7, w);
      }
    }
    V fn = x.complement(own);
    V nll;
    if constexpr (C == 2) {
      const V z0 = x.logit(block, 0, v), z1 = x.logit(block, 1, v);
      const V d = label == 0.f ? z1 - z0 : z0 - z1;
      nll = (d > 0.f ? d : V{}) + log_total;
    } else {
      nll = (x.largest - own_z) + log_total;
    }
    if constexpr (Weighted) {
      fn *= w;
      nll = product<float>(w, nll);
    }
    if constexpr (C != 0) {
      for (int64_t c = 0; c < classes; ++c) {
        const Mask<float> is = label == static_cast<float>(c);
        add(c, 2, is ? fn : V{});
        add(c, 3, is ? nll : V{});
      }
    } else {
      // One class a voxel: every lane adds to its own place, so no two lanes meet.
      const V tp = own * x.inverse * w;
      for (int i = 0; i < width; ++i) {
        const int64_t c = static_cast<int64_t>(label[i]);
        if (c < 0) continue;
        float* sum = sums + c * S * width + i;
        sum[0] += tp[i];
        sum[2 * width] += fn[i];
        sum[3 * width] += nll[i];
      }
    }
  }
  if constexpr (registers) {
    for (int i = 0; i < C * S; ++i) store(sums + i * width, held[i]);
  }
}

// With h_c = f_c off the label and A = t - n on it, K = -(cotangent of NLL) of the label, and sums
// taken relative to the label's own h (so that nothing large cancels when the label is nearly
// certain): D = sum_{k != label} p_k (f_k - A),
//   dz_c = p_c (f_c - A - D - K)  off the label,   K (1 - p) - p D  on it.
template <int C, bool Weighted>
void softmax_backward(const Confusion& q, const Block<float>& block, float* scratch,
                      const float* cotangent, float* gradient, int64_t gradient_stride) {
  using V = Vec<float>;
  constexpr int width = Lanes<float>::width;
  const int64_t classes = C == 0 ? q.classes : C;
  const int S = q.statistics;
  Softmax<C, Weighted> x;
  x.rows = scratch;
  for (int64_t v = 0; v < block.voxels; v += width) {
    x.compute(block, classes, v);
    const V label = load(block.labels + v);
    V own{}, a{}, k{}, f{};
    for (int64_t c = 0; c < classes; ++c) {
      const float* t = cotangent + c * S;
      const Mask<float> is = label == static_cast<float>(c);
      const V e = x.exponential_of(c);
      own = is ? e : own;
      if constexpr (C != 0) {
        a = is ? broadcast<float>(t[0] - t[2]) : a;
        k = is ? broadcast<float>(-t[3]) : k;
      }
      f += is ? V{} : e * t[1];
    }
    if constexpr (C == 0) {
      for (int i = 0; i < width; ++i) {
        const int64_t c = static_cast<int64_t>(label[i]);
        if (c < 0) continue;
        a[i] = cotangent[c * S] - cotangent[c * S + 2];
        k[i] = -cotangent[c * S + 3];
      }
    }
    const V complement = x.complement(own);
    const V d = f * x.inverse - a * complement;
    const V base = a + d + k;
    const V on_label = k * complement - own * x.inverse * d;
    V scale = x.inverse;
    const V w = Weighted ? load(block.weight + v) : broadcast<float>(1.f);
    if constexpr (Weighted) scale *= w;
    for (int64_t c = 0; c < classes; ++c) {
      const Mask<float> is = label == static_cast<float>(c);
      const V off_label = x.exponential_of(c) * scale * (cotangent[c * S + 1] - base);
      store(gradient + c * gradient_stride + v,
            is ? (Weighted ? V(on_label * w) : on_label) : off_label);
    }
  }
}

template <bool Full>
void sigmoid_forward(const Confusion& q, const Block<float>& block, float* sums) {
  using V = Vec<float>;
  constexpr int width = Lanes<float>::width;
  constexpr int S = Full ? 8 : 4;
  for (int64_t c = 0; c < q.classes; ++c) {
    V held[S];
    float* sum = sums + c * S * width;
    for (int s = 0; s < S; ++s) held[s] = load(sum + s * width);
    for (int64_t v = 0; v < block.voxels; v += width) {
      const V w = load(block.weight + v);
      const V raw = load(block.logits + c * block.logits_stride + v);
      const V z = w == 0 ? V{} : finite<float>(raw);
      const V g = target_of(block, c, v);
      const V e = exponential(-absolute(z));
      const V total = 1.f + e;
      const V inverse = 1.f / total;
      const V p = z < 0.f ? e * inverse : inverse;
      const V complement = z < 0.f ? inverse : e * inverse;
      const V tail = log1p(e, total, inverse);
      const V wg = w * g, wrest = w * (1.f - g);
      held[0] += p * wg;
      held[1] += p * wrest;
      held[2] += complement * wg;
      held[3] += product<float>(wg, (z < 0.f ? -z : V{}) + tail);
      if constexpr (Full) {
        held[4] += product<float>(wrest, (z < 0.f ? V{} : z) + tail);
        held[5] += p * p * w;
        held[6] += g * wg;
        held[7] += w;
      }
    }
    for (int s = 0; s < S; ++s) store(sum + s * width, held[s]);
  }
}

void sigmoid_backward(const Confusion& q, const Block<float>& block, const float* cotangent,
                      float* gradient, int64_t gradient_stride) {
  using V = Vec<float>;
  constexpr int width = Lanes<float>::width;
  const int S = q.statistics;
  for (int64_t c = 0; c < q.classes; ++c) {
    const float* t = cotangent + c * S;
    const float on = t[0] - t[2], off = t[1];
    const float o = S == 8 ? t[4] : 0.f, square = S == 8 ? 2 * t[5] : 0.f;
    for (int64_t v = 0; v < block.voxels; v += width) {
      const V w = load(block.weight + v);
      const V raw = load(block.logits + c * block.logits_stride + v);
      const V z = w == 0 ? V{} : finite<float>(raw);
      const V g = target_of(block, c, v);
      const V e = exponential(-absolute(z));
      const V inverse = 1.f / (1.f + e);
      const V p = z < 0.f ? e * inverse : inverse;
      const V complement = z < 0.f ? inverse : e * inverse;
      const V rest = 1.f - g;
      const V h = g * on + rest * off + p * square;
      const V d = p * complement * h - g * complement * t[3] + rest * p * o;
      store(gradient + c * gradient_stride + v, w * d);
    }
  }
}

using FastForward = void (*)(const Confusion&, const Block<float>&, float* scratch, float* sums);
using FastBackward = void (*)(const Confusion&, const Block<float>&, float* scratch,
                              const float* cotangent, float* gradient, int64_t stride);

template <int C, bool Full>
void run_softmax_forward(const Confusion& q, const Block<float>& block, float* scratch,
                         float* sums) {
  if (block.unweighted) {
    softmax_forward<C, Full, false>(q, block, scratch, sums);
  } else {
    softmax_forward<C, Full, true>(q, block, scratch, sums);
  }
}

template <int C>
void run_softmax_backward(const Confusion& q, const Block<float>& block, float* scratch,
                          const float* cotangent, float* gradient, int64_t stride) {
  if (block.unweighted) {
    softmax_backward<C, false>(q, block, scratch, cotangent, gradient, stride);
  } else {
    softmax_backward<C, true>(q, block, scratch, cotangent, gradient, stride);
  }
}

template <bool Full, int... I>
FastForward softmax_forward_for(int64_t classes, std::integer_sequence<int, I...>) {
  static constexpr FastForward table[] = {run_softmax_forward<I + 2, Full>...};
  return classes <= kMaxFastClasses ? table[classes - 2] : run_softmax_forward<0, Full>;
}

template <int... I>
FastBackward softmax_backward_for(int64_t classes, std::integer_sequence<int, I...>) {
  static constexpr FastBackward table[] = {run_softmax_backward<I + 2>...};
  return classes <= kMaxFastClasses ? table[classes - 2] : run_softmax_backward<0>;
}

using FastClasses = std::make_integer_sequence<int, kMaxFastClasses - 1>;

bool common_options(const Confusion& q) {
  return q.activation == q.likelihood && q.overlap == Overlap::product && q.gamma == 0;
}

FastForward fast_forward(const Confusion& q) {
  if (!common_options(q)) return nullptr;
  const bool full = q.statistics == 8;
  if (q.activation == Activation::sigmoid) {
    return full ? [](const Confusion& q, const Block<float>& block, float*,
                     float* sums) { sigmoid_forward<true>(q, block, sums); }
                : [](const Confusion& q, const Block<float>& block, float*, float* sums) {
                    sigmoid_forward<false>(q, block, sums);
                  };
  }
  if (q.activation != Activation::softmax || q.dense || q.classes < 2) return nullptr;
  return full ? softmax_forward_for<true>(q.classes, FastClasses{})
              : softmax_forward_for<false>(q.classes, FastClasses{});
}

FastBackward fast_backward(const Confusion& q, const float* cotangent) {
  if (!common_options(q)) return nullptr;
  if (q.activation == Activation::sigmoid) {
    return [](const Confusion& q, const Block<float>& block, float*, const float* cotangent,
              float* gradient,
              int64_t stride) { sigmoid_backward(q, block, cotangent, gradient, stride); };
  }
  if (q.activation != Activation::softmax || q.dense || q.classes < 2) return nullptr;
  if (q.statistics == 8) {
    for (int64_t c = 0; c < q.classes; ++c) {
      if (cotangent[c * 8 + 4] != 0 || cotangent[c * 8 + 5] != 0) return nullptr;
    }
  }
  return softmax_backward_for(q.classes, FastClasses{});
}

// ---------------------------------------------------------------------------------------------
// Walk over a range of voxels

template <class R>
int64_t forward_range(const Confusion& q, int64_t b, int64_t begin, int64_t end, double* out) {
  constexpr int64_t width = Lanes<R>::width;
  Workspace<R> work(q);
  Block<R> block;
  const int64_t rows = q.classes * q.statistics;
  std::vector<R> sums(rows * width);
  std::fill(out, out + rows, 0.0);
  FastForward fast = nullptr;
  if constexpr (std::is_same_v<R, float>) fast = fast_forward(q);
  int64_t wrong = 0;
  for (int64_t chunk = begin; chunk < end; chunk += kChunkVoxels) {
    const int64_t stop = std::min(chunk + kChunkVoxels, end);
    std::fill(sums.begin(), sums.end(), R{0});
    for (int64_t at = chunk; at < stop; at += work.block) {
      wrong += stage(q, b, at, std::min(work.block, stop - at), work, block);
      if (wrong != 0) return wrong;
      if constexpr (std::is_same_v<R, float>) {
        if (fast != nullptr) {
          fast(q, block, work.scratch.data(), sums.data());
          continue;
        }
      }
      general_forward(q, block, work, sums.data());
    }
    for (int64_t i = 0; i < rows; ++i) out[i] += sum_of_lanes<R>(load(sums.data() + i * width));
  }
  return wrong;
}

template <class R>
int64_t backward_range(const Confusion& q, int64_t b, int64_t begin, int64_t end) {
  Workspace<R> work(q);
  Block<R> block;
  const int64_t rows = q.classes * q.statistics;
  std::vector<R> cotangent(rows);
  for (int64_t i = 0; i < rows; ++i) cotangent[i] = static_cast<R>(q.cotangent[b * rows + i]);
  FastBackward fast = nullptr;
  if constexpr (std::is_same_v<R, float>) fast = fast_backward(q, cotangent.data());
  constexpr Element own = std::is_same_v<R, float> ? Element::f32 : Element::f64;
  for (int64_t at = begin; at < end; at += work.block) {
    const int64_t n = std::min(work.block, end - at);
    const int64_t wrong = stage(q, b, at, n, work, block);
    if (wrong != 0) return wrong;
    const int64_t offset = b * q.gradient_stride.batch + at * q.gradient_stride.voxel;
    const bool direct = q.input_type == own && q.gradient_stride.voxel == 1 && block.voxels == n;
    R* gradient = direct ? static_cast<R*>(q.gradient) + offset : work.gradient.data();
    const int64_t stride = direct ? q.gradient_stride.channel : work.block;
    bool done = false;
    if constexpr (std::is_same_v<R, float>) {
      if (fast != nullptr) {
        fast(q, block, work.scratch.data(), cotangent.data(), gradient, stride);
        done = true;
      }
    }
    if (!done) general_backward(q, block, work, cotangent.data(), gradient, stride);
    if (direct) continue;
    with_element(q.input_type, [&](auto tag) {
      using T = decltype(tag);
      if constexpr (!std::is_integral_v<T>) {
        T* out = static_cast<T*>(q.gradient) + offset;
        if (q.gradient_stride.channel == 1 && q.gradient_stride.voxel == q.classes &&
            q.classes > 1) {
          R* interleaved = work.interleaved.data();
          merge_channels(gradient, stride, n, q.classes, interleaved);
          write_row(interleaved, n * q.classes, out, 1);
          return;
        }
        for (int64_t c = 0; c < q.classes; ++c) {
          write_row(gradient + c * stride, n, out + c * q.gradient_stride.channel,
                    q.gradient_stride.voxel);
        }
      }
    });
  }
  return 0;
}

}  // namespace

// Sums of voxels [begin, end) of sample b to out (classes, statistics); returns 0, or the number of
// labels without a class that were met before the walk stopped.
int64_t confusion_forward(const Confusion& q, int64_t b, int64_t begin, int64_t end, double* out) {
  return q.input_type == Element::f64 ? forward_range<double>(q, b, begin, end, out)
                                      : forward_range<float>(q, b, begin, end, out);
}

// Writes the gradient of voxels [begin, end) of sample b; returns as confusion_forward.
int64_t confusion_backward(const Confusion& q, int64_t b, int64_t begin, int64_t end) {
  return q.input_type == Element::f64 ? backward_range<double>(q, b, begin, end)
                                      : backward_range<float>(q, b, begin, end);
}

}  // namespace voxfuse::VOXFUSE_ISA
