// The soft-confusion kernels. Compiled once an instruction set (see csrc/cpu/dispatch.h).
//
// A range of voxels of one sample is walked in blocks that fit the first-level cache. Labels,
// weights and, where the layout or the type asks for it, logits of a block are first brought into
// one canonical form (unit voxel stride, compute type); then a core works on vectors of voxels:
//   - softmax (soft_confusion_softmax.h): labels, the common options, all classes of a vector in
//     registers (C <= 16);
//   - sigmoid: the common options;
//   - general: every option and any number of classes, the classes of a vector in scratch memory.
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/half.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/soft_confusion.h"
#include "cpu/soft_confusion_softmax.h"

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
  std::vector<R> logits, interleaved, labels, dense, weight, scratch;
  std::vector<int32_t> ids;

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
    ids.resize(block);
    if (q.dense) dense.resize(q.classes * block);
    weight.resize(block);
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

// Logits of voxels [begin, begin + n) of sample b: read in place where they are contiguous in the
// compute type, else brought into the workspace's tile.
template <class R>
void stage_logits(const Confusion& q, int64_t b, int64_t begin, int64_t n, Workspace<R>& work,
                  const R*& logits, int64_t& logits_stride) {
  const int64_t width = Lanes<R>::width;
  const int64_t padded = (n + width - 1) / width * width;
  const int64_t room = work.block;
  constexpr Element own = std::is_same_v<R, float> ? Element::f32 : Element::f64;
  const int64_t offset = b * q.input_stride.batch + begin * q.input_stride.voxel;
  const bool direct = q.input_type == own && q.input_stride.voxel == 1 && padded == n &&
                      q.classes <= 32;  // more streams than that outrun the prefetcher
  if (direct) {
    logits = element<R>(q.input, offset);
    logits_stride = q.input_stride.channel;
    return;
  }
  R* tile = work.logits.data();
  with_element(q.input_type, [&](auto tag) {
    using T = decltype(tag);
    const T* source = element<T>(q.input, offset);
    if (q.input_stride.channel == 1 && q.input_stride.voxel == q.classes && q.classes > 1) {
      // Channels last. The transposition may read a vector beyond the block: the last block of the
      // last sample is copied to where that is harmless, and so is what needs conversion.
      const R* interleaved = nullptr;
      if constexpr (std::is_same_v<T, R>) {
        if ((n + width) * q.classes <= (q.voxels - begin) * q.classes) interleaved = source;
      }
      if (interleaved == nullptr) {
        convert_row<R>(source, 1, n * q.classes, work.interleaved.data());
        interleaved = work.interleaved.data();
      }
      split_channels(interleaved, n, q.classes, tile, room);
    } else {
      for (int64_t c = 0; c < q.classes; ++c) {
        convert_row<R>(source + c * q.input_stride.channel, q.input_stride.voxel, n,
                       tile + c * room);
      }
    }
  });
  for (int64_t c = 0; c < q.classes && padded != n; ++c) {
    std::fill(tile + c * room + n, tile + c * room + padded, R{0.5});
  }
  logits = tile;
  logits_stride = room;
}

// A label as 32 bits, or the least number if it has more or is no integer.
inline constexpr int32_t kNoLabel = std::numeric_limits<int32_t>::min();

template <class T>
VOXFUSE_INLINE int32_t short_label(T value) {
  if constexpr (std::is_integral_v<T> && sizeof(T) < 8) {
    return value;
  } else if constexpr (std::is_integral_v<T>) {
    return value == static_cast<int32_t>(value) ? static_cast<int32_t>(value) : kNoLabel;
  } else {
    const auto x = to_real<float>(value);
    const int32_t label =
        x > -2147483648.f && x < 2147483648.f ? static_cast<int32_t>(x) : kNoLabel;
    return static_cast<float>(label) == x ? label : kNoLabel;
  }
}

// Labels of a row as classes, -1 where they are to be ignored; returns whether one is neither, and
// whether any is ignored.
template <class T>
bool stage_classes(const Confusion& q, const T* source, int64_t stride, int64_t n, int32_t* out,
                   bool& ignores) {
  const uint32_t classes = static_cast<uint32_t>(q.classes);
  const auto walk = [&](auto label) __attribute__((always_inline)) {
    int32_t bad = 0, ignored = 0;
    const auto step = [&](int64_t i, T value) __attribute__((always_inline)) {
      const int32_t c = label(value);
      bad |= c != -1 && static_cast<uint32_t>(c) >= classes;
      ignored |= c == -1;
      out[i] = c;
    };
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) step(i, source[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) step(i, source[i * stride]);
    }
    ignores = ignored != 0;
    return bad != 0;
  };
  // What is -1 in the source, and not to be ignored, is wrong: any other negative number is as
  // well.
  const auto kept = [](int32_t label) { return label < 0 ? kNoLabel : label; };
  if (!q.has_ignore) return walk([&](T value) { return kept(short_label(value)); });
  const int32_t ignore = static_cast<int32_t>(q.ignore_index);
  if (ignore == q.ignore_index && ignore != kNoLabel) {
    return walk([&](T value) {
      const int32_t label = short_label(value);
      return label == ignore ? -1 : kept(label);
    });
  }
  return walk([&](T value) {
    return integer_label(value) == q.ignore_index ? -1 : kept(short_label(value));
  });
}

template <class R>
void stage_weights(const Confusion& q, int64_t b, int64_t begin, int64_t n, R* weight) {
  with_element(q.weight_type, [&](auto tag) {
    using T = decltype(tag);
    convert_row<R>(element<T>(q.weight, b * q.weight_stride.batch + begin * q.weight_stride.voxel),
                   q.weight_stride.voxel, n, weight);
  });
  if (q.weight_type == Element::boolean) {
    for (int64_t i = 0; i < n; ++i) weight[i] = weight[i] != 0 ? R{1} : R{0};
  }
}

// Whether rows of this type and voxel stride are read, or written, by the core itself as halves.
bool halves_in_place(const Confusion& q, const Strides& strides, int64_t n) {
  return kHalvesInRegisters && (q.input_type == Element::f16 || q.input_type == Element::bf16) &&
         strides.voxel == 1 && n % Lanes<float>::width == 0 && q.classes <= 32;
}

// Whether the core itself reads, or writes, channels-last float32 voxels.
bool interleaved_in_place(const Confusion& q, const Strides& strides, int64_t n) {
  const bool full = q.statistics == 8 && q.gradient == nullptr;
  return q.input_type == Element::f32 && !full && strides.channel == 1 &&
         strides.voxel == q.classes && n % Lanes<float>::width == 0 &&
         exchanges_in_registers(q.classes);
}

// How the softmax core reads and writes a block: in place in the forms it knows, else rows of
// float32, which may be a tile.
Form form_of(const Confusion& q, int64_t n) {
  const bool backward = q.gradient != nullptr;
  const auto both = [&](auto in_place) {
    return in_place(q, q.input_stride, n) && (!backward || in_place(q, q.gradient_stride, n));
  };
  if (both(halves_in_place)) return Form::halves;
  if (both(interleaved_in_place)) return Form::interleaved;
  return Form::rows;
}

// Voxels [begin, begin + n) of sample b for the softmax core; returns whether a label has no class.
bool stage_labelled(const Confusion& q, int64_t b, int64_t begin, int64_t n, Form form,
                    Workspace<float>& work, LabelledBlock& out, bool& weighted) {
  constexpr int64_t width = Lanes<float>::width;
  const int64_t padded = (n + width - 1) / width * width;
  int32_t* labels = work.ids.data();
  float* weight = work.weight.data();
  bool wrong = false, ignores = false;
  with_element(q.target_type, [&](auto tag) {
    using T = decltype(tag);
    const int64_t offset = b * q.target_stride.batch + begin * q.target_stride.voxel;
    wrong = stage_classes<T>(q, element<T>(q.target, offset), q.target_stride.voxel, n, labels,
                             ignores);
  });
  if (wrong) return true;
  if (q.weight != nullptr) {
    stage_weights(q, b, begin, n, weight);
    for (int64_t i = 0; i < n; ++i) {
      labels[i] = weight[i] == 0 ? -1 : labels[i];
      weight[i] = labels[i] < 0 ? 0.f : weight[i];
    }
  } else if (ignores || padded != n) {
    for (int64_t i = 0; i < n; ++i) weight[i] = labels[i] < 0 ? 0.f : 1.f;
  }
  std::fill(labels + n, labels + padded, -1);
  std::fill(weight + n, weight + padded, 0.f);
  weighted = q.weight != nullptr || ignores || padded != n;
  out.voxels = padded;
  out.labels = labels;
  out.weight = weight;
  const int64_t offset = b * q.input_stride.batch + begin * q.input_stride.voxel;
  out.logits_stride = q.input_stride.channel;
  out.bfloat = q.input_type == Element::bf16;
  if (form == Form::halves) {
    out.halves = element<uint16_t>(q.input, offset);
  } else if (form == Form::interleaved) {
    out.logits = element<float>(q.input, offset);
  } else {
    stage_logits(q, b, begin, n, work, out.logits, out.logits_stride);
  }
  return false;
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
    stage_weights(q, b, begin, n, weight);
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

  stage_logits(q, b, begin, n, work, out.logits, out.logits_stride);
  return wrong;
}

// ---------------------------------------------------------------------------------------------
// Elementwise mathematics on vectors

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

// g - p, from the complements where both are close to 1 and p may have rounded to it.
template <class R>
VOXFUSE_INLINE Vec<R> missed_of(Vec<R> p, Vec<R> complement, Vec<R> g) {
  return g >= R(0.5) ? complement - (1 - g) : g - p;
}

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
        const V missed = missed_of<R>(p, load(rows.overlap.complement + c * width), g);
        add(0, at_most(p, g));
        add(1, at_least(-missed, V{}));
        add(2, at_least(missed, V{}));
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

    // h = a on + (1 - a) off, a the overlap's slope. A softmax takes that of the most probable
    // class off every h, which leaves nothing large to cancel, and forms the differences before it
    // multiplies: of what a class and that one share of `on` and of `off`, and of what one has as
    // `on` and the other as `off`.
    const auto on = [&](int64_t c) { return cotangent[c * S] - cotangent[c * S + 2]; };
    const auto off = [&](int64_t c) { return cotangent[c * S + 1]; };
    const auto square = [&](int64_t c) { return S == 8 ? 2 * cotangent[c * S + 5] : R{0}; };
    const bool softmax = q.activation == Activation::softmax;
    V most = broadcast<R>(-1), best_a{}, best_on{}, best_off{}, best_square{};
    for (int64_t c = 0; c < q.classes; ++c) {
      const V g = target_of(block, c, v);
      const V p = load(rows.overlap.p + c * width);
      V a = g;
      if (q.overlap == Overlap::min) {
        const V missed = missed_of<R>(p, load(rows.overlap.complement + c * width), g);
        a = missed > 0 ? broadcast<R>(1) : (missed < 0 ? V{} : missed + R(0.5));  // NaN stays
      }
      if (!softmax) {
        store(rows.h + c * width, a * on(c) + (1 - a) * off(c) + p * square(c));
        continue;
      }
      store(rows.h + c * width, a);
      const Mask<R> more = p > most;
      most = more ? p : most;
      best_a = more ? a : best_a;
      best_on = more ? broadcast<R>(on(c)) : best_on;
      best_off = more ? broadcast<R>(off(c)) : best_off;
      if (S == 8) best_square = more ? p * square(c) : best_square;
    }
    V mean_h{};
    for (int64_t c = 0; softmax && c < q.classes; ++c) {
      const V p = load(rows.overlap.p + c * width);
      const V a = load(rows.h + c * width);
      const Mask<R> above = a > best_a;
      V h = (above ? best_a : a) * (on(c) - best_on);
      h += (1 - (above ? a : best_a)) * (off(c) - best_off);
      h += (a - best_a) * (above ? on(c) - best_off : best_on - off(c));
      if (S == 8) h += p * square(c) - best_square;
      mean_h += p * h;
      store(rows.h + c * width, h);
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
    // The sum of u without the likeliest class's, of which it may be all but a trace.
    V likeliest = broadcast<R>(-1), u_likeliest{}, rest_u{};
    if (q.likelihood == Activation::softmax) {
      for (int64_t c = 0; c < q.classes; ++c) {
        const V u = slope_u(c);
        const V r = load(rows.likelihood.p + c * width);
        const Mask<R> more = r > likeliest;
        rest_u += more ? u_likeliest : u;
        u_likeliest = more ? u : u_likeliest;
        likeliest = more ? r : likeliest;
      }
    }
    for (int64_t c = 0; c < q.classes; ++c) {
      const R* t = cotangent + c * S;
      const V p = load(rows.overlap.p + c * width);
      const V h = load(rows.h + c * width);
      V d;
      if (softmax) {
        d = p * (h - mean_h);
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
        const Mask<R> certain = (r == likeliest) & (r > R(0.5));
        d += u * complement - r * (certain ? rest_u : rest_u + u_likeliest - u);
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
// Sigmoid with any target (float32 arithmetic): product overlap, one activation, no focal
// modulation

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
      const V inverse = reciprocal(total);
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
      const V inverse = reciprocal(1.f + e);
      const V p = z < 0.f ? e * inverse : inverse;
      const V complement = z < 0.f ? inverse : e * inverse;
      const V rest = 1.f - g;
      const V h = g * on + rest * off + p * square;
      const V d = p * complement * h - g * complement * t[3] + rest * p * o;
      store(gradient + c * gradient_stride + v, w * d);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Which core

enum class Core { general, sigmoid, softmax };

// What the common options are; the rest goes through the general core.
template <class R>
Core core_of(const Confusion& q) {
  if (!std::is_same_v<R, float> || q.activation != q.likelihood || q.overlap != Overlap::product ||
      q.gamma != 0) {
    return Core::general;
  }
  if (q.activation == Activation::sigmoid) return Core::sigmoid;
  const bool labels = q.activation == Activation::softmax && !q.dense && q.classes >= 2 &&
                      q.classes < std::numeric_limits<int32_t>::max();
  return labels ? Core::softmax : Core::general;
}

using SoftmaxForward = void (*)(int64_t classes, const LabelledBlock&, float* scratch, float* sums);
using SoftmaxBackward = void (*)(int64_t classes, const LabelledBlock&, float* scratch,
                                 const Cotangents&, const BlockGradient&);

// One function for each number of classes up to kMaxFastClasses, from three on, and one for the
// rest.
using FastClasses = std::make_integer_sequence<int, kMaxFastClasses - 2>;

template <bool Full, bool Weighted, Form F, int... I>
SoftmaxForward softmax_forward_of(int64_t classes, std::integer_sequence<int, I...>) {
  static constexpr SoftmaxForward table[] = {softmax_forward<I + 3, Full, Weighted, F>...};
  if (classes == 2) {
    return [](int64_t, const LabelledBlock& block, float*, float* sums) {
      two_classes_forward<Full, Weighted, F>(block, sums);
    };
  }
  return classes <= kMaxFastClasses ? table[classes - 3] : softmax_forward<0, Full, Weighted, F>;
}

template <bool Weighted, Form F, int... I>
SoftmaxBackward softmax_backward_of(int64_t classes, std::integer_sequence<int, I...>) {
  static constexpr SoftmaxBackward table[] = {softmax_backward<I + 3, Weighted, F>...};
  if (classes == 2) {
    return [](int64_t, const LabelledBlock& block, float*, const Cotangents& cotangent,
              const BlockGradient& gradient) {
      two_classes_backward<Weighted, F>(block, cotangent, gradient);
    };
  }
  return classes <= kMaxFastClasses ? table[classes - 3] : softmax_backward<0, Weighted, F>;
}

// The instances for channels-last voxels, of the class counts that exchange in registers.
template <bool Weighted, int... C>
SoftmaxForward interleaved_forward_of(int64_t classes, std::integer_sequence<int, C...>) {
  SoftmaxForward found = [](int64_t, const LabelledBlock& block, float*, float* sums) {
    two_classes_forward<false, Weighted, Form::interleaved>(block, sums);
  };
  const auto consider = [&](auto tag) {
    constexpr int count = decltype(tag)::value;
    if constexpr (exchanges_in_registers(count)) {
      if (classes == count) found = softmax_forward<count, false, Weighted, Form::interleaved>;
    }
  };
  (consider(std::integral_constant<int, C>{}), ...);
  return found;
}

template <bool Weighted, int... C>
SoftmaxBackward interleaved_backward_of(int64_t classes, std::integer_sequence<int, C...>) {
  SoftmaxBackward found = [](int64_t, const LabelledBlock& block, float*,
                             const Cotangents& cotangent, const BlockGradient& gradient) {
    two_classes_backward<Weighted, Form::interleaved>(block, cotangent, gradient);
  };
  const auto consider = [&](auto tag) {
    constexpr int count = decltype(tag)::value;
    if constexpr (exchanges_in_registers(count)) {
      if (classes == count) found = softmax_backward<count, Weighted, Form::interleaved>;
    }
  };
  (consider(std::integral_constant<int, C>{}), ...);
  return found;
}

using InterleavedClasses = std::integer_sequence<int, 4, 8, 12, 16>;

template <bool Full, Form F>
SoftmaxForward softmax_forward_of(int64_t classes, bool weighted) {
  return weighted ? softmax_forward_of<Full, true, F>(classes, FastClasses{})
                  : softmax_forward_of<Full, false, F>(classes, FastClasses{});
}

SoftmaxForward softmax_forward_of(int64_t classes, bool full, bool weighted, Form form) {
  if (form == Form::interleaved) {
    return weighted ? interleaved_forward_of<true>(classes, InterleavedClasses{})
                    : interleaved_forward_of<false>(classes, InterleavedClasses{});
  }
  if constexpr (kHalvesInRegisters) {
    if (form == Form::halves) {
      return full ? softmax_forward_of<true, Form::halves>(classes, weighted)
                  : softmax_forward_of<false, Form::halves>(classes, weighted);
    }
  }
  return full ? softmax_forward_of<true, Form::rows>(classes, weighted)
              : softmax_forward_of<false, Form::rows>(classes, weighted);
}

SoftmaxBackward softmax_backward_of(int64_t classes, bool weighted, Form form) {
  if (form == Form::interleaved) {
    return weighted ? interleaved_backward_of<true>(classes, InterleavedClasses{})
                    : interleaved_backward_of<false>(classes, InterleavedClasses{});
  }
  if constexpr (kHalvesInRegisters) {
    if (form == Form::halves) {
      return weighted ? softmax_backward_of<true, Form::halves>(classes, FastClasses{})
                      : softmax_backward_of<false, Form::halves>(classes, FastClasses{});
    }
  }
  return weighted ? softmax_backward_of<true, Form::rows>(classes, FastClasses{})
                  : softmax_backward_of<false, Form::rows>(classes, FastClasses{});
}

// Whether the cotangents of the statistics that only `full` has are all zero.
template <class R>
bool basic_cotangents(const std::vector<R>& cotangent, int64_t classes, int statistics) {
  if (statistics == 4) return true;
  for (int64_t c = 0; c < classes; ++c) {
    if (cotangent[c * 8 + 4] != 0 || cotangent[c * 8 + 5] != 0) return false;
  }
  return true;
}

// ---------------------------------------------------------------------------------------------
// Walk over a range of voxels

template <class R>
int64_t forward_range(const Confusion& q, int64_t b, int64_t begin, int64_t end, double* out) {
  constexpr int64_t width = Lanes<R>::width;
  const Core core = core_of<R>(q);
  const bool full = q.statistics == 8;
  Workspace<R> work(q);
  Block<R> block;
  LabelledBlock labelled{};
  const int64_t rows = q.classes * q.statistics;
  std::vector<R> sums(rows * width);
  std::fill(out, out + rows, 0.0);
  for (int64_t chunk = begin; chunk < end; chunk += kChunkVoxels) {
    const int64_t stop = std::min(chunk + kChunkVoxels, end);
    std::fill(sums.begin(), sums.end(), R{0});
    for (int64_t at = chunk; at < stop; at += work.block) {
      const int64_t n = std::min(work.block, stop - at);
      if constexpr (std::is_same_v<R, float>) {
        if (core == Core::softmax) {
          bool weighted;
          const Form form = form_of(q, n);
          if (stage_labelled(q, b, at, n, form, work, labelled, weighted)) return 1;
          softmax_forward_of(q.classes, full, weighted, form)(q.classes, labelled,
                                                              work.scratch.data(), sums.data());
          continue;
        }
      }
      const int64_t wrong = stage(q, b, at, n, work, block);
      if (wrong != 0) return wrong;
      if constexpr (std::is_same_v<R, float>) {
        if (core == Core::sigmoid) {
          full ? sigmoid_forward<true>(q, block, sums.data())
               : sigmoid_forward<false>(q, block, sums.data());
          continue;
        }
      }
      general_forward(q, block, work, sums.data());
    }
    for (int64_t i = 0; i < rows; ++i) out[i] += sum_of_lanes<R>(load(sums.data() + i * width));
  }
  return 0;
}

// A gradient in the tile to where it belongs, in the input's type and layout.
template <class R>
void write_gradient(const Confusion& q, const R* tile, int64_t stride, int64_t n, int64_t offset,
                    Workspace<R>& work) {
  with_element(q.input_type, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (!std::is_integral_v<T>) {
      T* out = static_cast<T*>(q.gradient) + offset;
      if (q.gradient_stride.channel == 1 && q.gradient_stride.voxel == q.classes && q.classes > 1) {
        if constexpr (std::is_same_v<T, R>) {
          if (merges_exactly<R>(q.classes)) return merge_channels(tile, stride, n, q.classes, out);
        }
        R* interleaved = work.interleaved.data();
        merge_channels(tile, stride, n, q.classes, interleaved);
        write_row(interleaved, n * q.classes, out, 1);
        return;
      }
      for (int64_t c = 0; c < q.classes; ++c) {
        write_row(tile + c * stride, n, out + c * q.gradient_stride.channel,
                  q.gradient_stride.voxel);
      }
    }
  });
}

// Whether the gradient may be written past the caches: the caller wants it, and every vector of it
// is aligned.
template <class R>
bool streams(const Confusion& q) {
  const auto aligned = [](int64_t elements) { return elements * sizeof(R) % kVectorBytes == 0; };
  const bool interleaved = q.gradient_stride.channel == 1;  // whole vectors of voxels then are
  return q.stream_gradient && reinterpret_cast<uintptr_t>(q.gradient) % kVectorBytes == 0 &&
         aligned(q.gradient_stride.batch) && (interleaved || aligned(q.gradient_stride.channel));
}

template <class R>
int64_t backward_range(const Confusion& q, int64_t b, int64_t begin, int64_t end) {
  Workspace<R> work(q);
  Block<R> block;
  LabelledBlock labelled{};
  const int64_t rows = q.classes * q.statistics;
  std::vector<R> cotangent(rows);
  for (int64_t i = 0; i < rows; ++i) cotangent[i] = static_cast<R>(q.cotangent[b * rows + i]);
  Core core = core_of<R>(q);
  Cotangents by_label;
  if constexpr (std::is_same_v<R, float>) {
    if (core == Core::softmax) {
      if (basic_cotangents(cotangent, q.classes, q.statistics)) {
        by_label = Cotangents(cotangent.data(), q.classes, q.statistics);
      } else {
        core = Core::general;
      }
    }
  }
  constexpr Element own = std::is_same_v<R, float> ? Element::f32 : Element::f64;
  const bool streamed = streams<R>(q);
  for (int64_t at = begin; at < end; at += work.block) {
    const int64_t n = std::min(work.block, end - at);
    const int64_t offset = b * q.gradient_stride.batch + at * q.gradient_stride.voxel;
    const Form form = core == Core::softmax ? form_of(q, n) : Form::rows;
    const bool interleaved = form == Form::interleaved, halves = form == Form::halves;
    const bool direct = interleaved || (q.input_type == own && q.gradient_stride.voxel == 1 &&
                                        n % Lanes<R>::width == 0);
    // A core writes a voxel's gradient when it has read all its logits: it may take their place.
    R* gradient = direct ? static_cast<R*>(q.gradient) + offset : work.logits.data();
    const int64_t stride = direct || halves ? q.gradient_stride.channel : work.block;
    bool done = false;
    if constexpr (std::is_same_v<R, float>) {
      if (core == Core::softmax) {
        bool weighted;
        if (stage_labelled(q, b, at, n, form, work, labelled, weighted)) return 1;
        uint16_t* half_rows = halves ? static_cast<uint16_t*>(q.gradient) + offset : nullptr;
        softmax_backward_of(q.classes, weighted, form)(
            q.classes, labelled, work.scratch.data(), by_label,
            {gradient, half_rows, labelled.bfloat, stride, direct && streamed});
        done = true;
      }
    }
    if (!done) {
      const int64_t wrong = stage(q, b, at, n, work, block);
      if (wrong != 0) return wrong;
      if constexpr (std::is_same_v<R, float>) {
        if (core == Core::sigmoid) {
          sigmoid_backward(q, block, cotangent.data(), gradient, stride);
          done = true;
        }
      }
    }
    if (!done) general_backward(q, block, work, cotangent.data(), gradient, stride);
    if (!direct && !halves) write_gradient(q, gradient, stride, n, offset, work);
  }
  if (streamed) stream_fence();
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
