// The common case in registers: softmax of float32 arithmetic, labels, product overlap, one
// activation, no focal modulation. Part of soft_confusion_kernel.cpp. It stands for the general
// core, with csrc/math/confusion.h, where a test holds the two against each other.
//
// With one label a voxel, everything follows from a few numbers a voxel: the label's own
// exponential and the sum of the others', so that 1 - p of the label is a sum, never a difference.
// Where no voxel is weighted or left out, the logarithms are put off: log prod (1 + u_i) = log1p(s)
// with s' = s + u + s u, which keeps small u as they are, costs one logarithm for sixteen voxels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/soft_confusion_staging.h"
#include "math/confusion.h"

namespace voxfuse::VOXFUSE_ISA {

// Vectors whose 1 + u may be multiplied without leaving float32's range: 16^16 = 2^64.
inline constexpr int kVectorsALogarithm = 16;

template <Form F, bool Weighted>
VOXFUSE_INLINE Vec<float> logit_of(const Block<float>& block, int64_t c, int64_t v,
                                   Choice excluded) {
  static_assert(F != Form::interleaved);
  const int64_t at = c * block.logits_stride + v;
  const Vec<float> z = finite<float>(F == Form::halves ? load_half(block.halves + at, block.bfloat)
                                                       : load(block.logits + at));
  return Weighted ? select(excluded, Vec<float>{}, z) : z;
}

// Those of all classes, which C knows.
template <int C, Form F, bool Weighted>
VOXFUSE_INLINE void logits_of(const Block<float>& block, int64_t v, Choice excluded,
                              Vec<float>* z) {
  if constexpr (F == Form::interleaved) {
    constexpr int width = Lanes<float>::width;
    for (int k = 0; k < C; ++k) z[k] = load(block.logits + v * C + k * width);
    split_vectors<C>(z);
    for (int c = 0; c < C; ++c) {
      z[c] = finite<float>(z[c]);
      if (Weighted) z[c] = select(excluded, Vec<float>{}, z[c]);
    }
  } else {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) z[c] = logit_of<F, Weighted>(block, c, v, excluded);
  }
}

VOXFUSE_INLINE void accumulate(float* sum, Vec<float> x) { store(sum, load(sum) + x); }

// Adds the logarithm of a row of products 1 + s.
VOXFUSE_INLINE Vec<float> logarithm_of_product(Vec<float> s) {
  const Vec<float> total = 1.f + s;
  return log1p(s, total, reciprocal(total));
}

// --- Two classes --------------------------------------------------------------------------------

// What a voxel of two classes comes down to: the probabilities of its label (hit) and of the other
// class (missed), and by how much the other's logit is larger, if it is (wrong).
struct TwoClasses {
  using V = Vec<float>;
  V gap, others, total, inverse, hit, missed;
  Choice one, wrong;

  VOXFUSE_INLINE TwoClasses(V z0, V z1, Ints label) {
    const V difference = z1 - z0;
    gap = absolute(difference);
    others = exponential(-gap);
    total = 1.f + others;
    inverse = reciprocal(total);
    const V small = others * inverse;
    one = equal(label, 1);
    wrong = one ^ above(difference, 0.f);  // an excluded voxel's is never used
    hit = select(wrong, small, inverse);
    missed = select(wrong, inverse, small);
  }
};

template <bool Full, bool Weighted, Form F>
void two_classes_forward(int64_t, const Block<float>& block, float*, float* sums) {
  using V = Vec<float>;
  constexpr int width = Lanes<float>::width;
  constexpr int S = Full ? FULL : CORE;
  const auto row = [&](int c, int s) { return sums + (c * S + s) * width; };
  V tp0{}, tp1{}, fn0{}, fn1{}, nll0{}, nll1{}, square0{}, square1{}, count0{}, count1{};
  for (int64_t v = 0; v < block.voxels;) {
    const int64_t stop = std::min<int64_t>(block.voxels, v + kVectorsALogarithm * width);
    V product0{}, product1{};
    for (; v < stop; v += width) {
      const Ints label = load(block.labels + v);
      const Choice excluded = Weighted ? equal(label, -1) : Choice{};
      V z[2];
      logits_of<2, F, Weighted>(block, v, excluded, z);
      const TwoClasses x(z[0], z[1], label);
      const Choice zero = Weighted ? equal(label, 0) : static_cast<Choice>(~x.one);
      V hit = x.hit, missed = x.missed;
      [[maybe_unused]] const V w = Weighted ? load(block.weight + v) : broadcast<float>(1.f);
      if constexpr (Full) {
        const V hits = Weighted ? V(hit * hit * w) : V(hit * hit);
        const V misses = Weighted ? V(missed * missed * w) : V(missed * missed);
        square0 += select(x.one, misses, hits);
        square1 += select(x.one, hits, misses);
        count0 = add_where(zero, count0, w);
        count1 = add_where(x.one, count1, w);
      }
      if constexpr (Weighted) {
        hit *= w;
        missed *= w;
        const V nll = (select(x.wrong, x.gap) + log1p(x.others, x.total, x.inverse)) * w;
        nll0 = add_where(zero, nll0, nll);
        nll1 = add_where(x.one, nll1, nll);
      } else {
        nll0 = add_where(zero & x.wrong, nll0, x.gap);
        nll1 = add_where(x.one & x.wrong, nll1, x.gap);
        product0 = add_where(zero, product0, product0 * x.others + x.others);
        product1 = add_where(x.one, product1, product1 * x.others + x.others);
      }
      tp0 = add_where(zero, tp0, hit);
      tp1 = add_where(x.one, tp1, hit);
      fn0 = add_where(zero, fn0, missed);
      fn1 = add_where(x.one, fn1, missed);
      if constexpr (Full) {
        // -log p of the other class: the label's with the sign of the difference turned.
        const V off = select(x.wrong, V{}, x.gap);
        if constexpr (Weighted) {
          const V all = (off + log1p(x.others, x.total, x.inverse)) * w;
          accumulate(row(0, Sum::OFF), select(x.one, all));
          accumulate(row(1, Sum::OFF), select(zero, all));
        } else {
          accumulate(row(0, Sum::OFF), select(x.one, off));
          accumulate(row(1, Sum::OFF), select(zero, off));
        }
      }
    }
    if constexpr (!Weighted) {
      const V log0 = logarithm_of_product(product0), log1 = logarithm_of_product(product1);
      nll0 += log0;
      nll1 += log1;
      if constexpr (Full) {
        accumulate(row(0, Sum::OFF), log1);
        accumulate(row(1, Sum::OFF), log0);
      }
    }
  }
  accumulate(row(0, Sum::TP), tp0);
  accumulate(row(1, Sum::TP), tp1);
  // What one class misses is what the other wrongly claims.
  accumulate(row(0, Sum::FP), fn1);
  accumulate(row(1, Sum::FP), fn0);
  accumulate(row(0, Sum::FN), fn0);
  accumulate(row(1, Sum::FN), fn1);
  accumulate(row(0, Sum::NLL), nll0);
  accumulate(row(1, Sum::NLL), nll1);
  if constexpr (Full) {
    accumulate(row(0, Sum::P2), square0);
    accumulate(row(1, Sum::P2), square1);
    accumulate(row(0, Sum::G2), count0);
    accumulate(row(1, Sum::G2), count1);
    accumulate(row(0, Sum::W), count0 + count1);
    accumulate(row(1, Sum::W), count0 + count1);
  }
}

// --- Any number of classes ----------------------------------------------------------------------

// The softmax of one vector of voxels: exponentials relative to the largest logit, those of the
// label (own) and of all other classes (rest), and 1 over their sum. C = 0: as many classes as at
// run time, exponentials in memory.
template <int C, bool Weighted, Form F>
struct Softmax {
  using V = Vec<float>;
  static constexpr int width = Lanes<float>::width;
  V e[C == 0 ? 1 : C];
  float* rows;
  V largest, own, own_logit, rest, inverse;

  VOXFUSE_INLINE V exponential_of(int64_t c) const {
    if constexpr (C == 0) return load(rows + c * width);
    return e[c];
  }

  VOXFUSE_INLINE void keep(int64_t c, V x) {
    if constexpr (C == 0) {
      store(rows + c * width, x);
    } else {
      e[c] = x;
    }
  }

  VOXFUSE_INLINE void compute(const Block<float>& block, int64_t classes, int64_t v, Ints label) {
    compute(block, classes, v, label, [](int64_t, V) {});
  }

  // Calls seen(class, its exponential) for every class on the way.
  template <class Seen>
  VOXFUSE_INLINE void compute(const Block<float>& block, int64_t classes, int64_t v, Ints label,
                              Seen seen) {
    const Choice excluded = Weighted ? equal(label, -1) : Choice{};
    if constexpr (F == Form::interleaved) logits_of<C, F, Weighted>(block, v, excluded, e);
    // The logits wait where the exponentials will be: a second look at as many rows of the volume
    // would miss the first-level cache where the rows lie a multiple of 4 KiB apart.
#pragma GCC unroll 16
    for (int64_t c = 0; c < classes; ++c) {
      V z;
      if constexpr (F == Form::interleaved) {
        z = e[c];
      } else {
        z = logit_of<F, Weighted>(block, c, v, excluded);
      }
      // A NaN that the maximum passes over comes back with its own exponential.
      largest = c == 0 ? z : at_least(largest, z);
      keep(c, z);
    }
    own = own_logit = rest = V{};
#pragma GCC unroll 16
    for (int64_t c = 0; c < classes; ++c) {
      const V z = exponential_of(c);
      const V x = exponential(z - largest);
      const Choice is = equal(label, static_cast<int32_t>(c));
      own = select(is, x, own);
      own_logit = select(is, z, own_logit);
      rest = add_where(~is, rest, x);
      seen(c, x);
      keep(c, x);
    }
    inverse = reciprocal(own + rest);
  }

  // The sum of all exponentials less the largest one, which is 1: exact where the label is largest.
  VOXFUSE_INLINE V others() const { return select(equal(own, 1.f), rest, own + rest - 1.f); }
};

// Calls f(class, its lanes) for every class that has lanes of the vector: one or two in most
// vectors of a segmentation.
template <class F>
VOXFUSE_INLINE void for_each_label(Ints label, const int32_t* labels, uint32_t excluded, F f) {
  constexpr int width = Lanes<float>::width;
  uint32_t left = ((1u << width) - 1) & ~excluded;
  while (left != 0) {
    const int32_t c = labels[__builtin_ctz(left)];
    const Choice is = equal(label, c);
    left &= ~lanes_of(is);
    f(c, is);
  }
}

template <int C, bool Full, bool Weighted, Form F>
void softmax_forward(int64_t runtime_classes, const Block<float>& block, float* scratch,
                     float* sums) {
  using V = Vec<float>;
  constexpr int width = Lanes<float>::width;
  constexpr int S = Full ? FULL : CORE;
  // Few classes: sums in registers, logarithms put off.
  constexpr bool few = C > 0 && C <= 4;
  constexpr bool products = few && !Weighted;
  const int64_t classes = C == 0 ? runtime_classes : C;
  V tp[few ? C : 1]{}, fp[few ? C : 1]{}, fn[few ? C : 1]{}, nll[few ? C : 1]{};
  const auto row = [&](int64_t c, int s)
                       __attribute__((always_inline)) { return sums + (c * S + s) * width; };
  [[maybe_unused]] V weights{};
  Softmax<C, Weighted, F> x;
  x.rows = scratch;
  for (int64_t v = 0; v < block.voxels;) {
    const int64_t stop = std::min<int64_t>(block.voxels, v + kVectorsALogarithm * width);
    V product[products ? C : 1]{};
    for (; v < stop; v += width) {
      const Ints label = load(block.labels + v);
      x.compute(block, classes, v, label);
      const Choice excluded = Weighted ? equal(label, -1) : Choice{};
      const V w = Weighted ? load(block.weight + v) : broadcast<float>(1.f);
      const V scale = Weighted ? V(x.inverse * w) : x.inverse;
      const V hit = x.own * scale, missed = x.rest * scale;
      const V others = x.others();
      V below = x.largest - x.own_logit;
      [[maybe_unused]] V log_total{};
      if constexpr (!products) {
        log_total = log1p(others, 1.f + others, x.inverse);
        below = Weighted ? V((below + log_total) * w) : V(below + log_total);
      }
      if constexpr (few) {
#pragma GCC unroll 16
        for (int64_t c = 0; c < classes; ++c) {
          const Choice is = equal(label, static_cast<int32_t>(c));
          fp[c] = add_product_where(~is, fp[c], x.exponential_of(c), scale);
          tp[c] = add_where(is, tp[c], hit);
          fn[c] = add_where(is, fn[c], missed);
          nll[c] = add_where(is, nll[c], below);
          if constexpr (products) {
            product[c] = add_where(is, product[c], product[c] * others + others);
          }
        }
      } else {
        for (int64_t c = 0; c < classes; ++c) {
          const Choice is = equal(label, static_cast<int32_t>(c));
          float* sum = row(c, Sum::FP);
          store(sum, add_product_where(~is, load(sum), x.exponential_of(c), scale));
        }
        for_each_label(label, block.labels + v, lanes_of(excluded), [&](int64_t c, Choice is) {
          accumulate(row(c, Sum::TP), select(is, hit));
          accumulate(row(c, Sum::FN), select(is, missed));
          accumulate(row(c, Sum::NLL), select(is, below));
        });
      }
      if constexpr (Full) {
        for (int64_t c = 0; c < classes; ++c) {
          const Choice is = equal(label, static_cast<int32_t>(c));
          const V z = logit_of<F, Weighted>(block, c, v, excluded);
          const V p = x.exponential_of(c) * x.inverse;
          V off = (x.largest - z) + log_total;
          if constexpr (Weighted) off *= w;
          accumulate(row(c, Sum::OFF), select(is, V{}, off));
          accumulate(row(c, Sum::P2), Weighted ? V(p * p * w) : V(p * p));
          accumulate(row(c, Sum::G2), select(is, w));
        }
        weights += w;
      }
    }
    if constexpr (products) {
      V logarithms[C];
      for (int64_t c = 0; c < classes; ++c) {
        logarithms[c] = logarithm_of_product(product[c]);
        nll[c] += logarithms[c];
      }
      if constexpr (Full) {
        for (int64_t c = 0; c < classes; ++c) {
          V off{};
          for (int64_t k = 0; k < classes; ++k) off += k == c ? V{} : logarithms[k];
          accumulate(row(c, Sum::OFF), off);
        }
      }
    }
  }
  if constexpr (Full) {
    for (int64_t c = 0; c < classes; ++c) accumulate(row(c, Sum::W), weights);
  }
  if constexpr (few) {
    for (int64_t c = 0; c < classes; ++c) {
      accumulate(row(c, Sum::TP), tp[c]);
      accumulate(row(c, Sum::FP), fp[c]);
      accumulate(row(c, Sum::FN), fn[c]);
      accumulate(row(c, Sum::NLL), nll[c]);
    }
  }
}

// --- Backward -----------------------------------------------------------------------------------

// The cotangents of a sample, laid out for look-ups by label; index -1 finds zeros.
struct Cotangents {
  std::vector<float> hit, likelihood, miss;  // the first two with one element in front; -NLL's

  Cotangents() = default;
  Cotangents(const float* cotangents, int64_t classes, int columns)
      : hit(room(classes)), likelihood(room(classes)), miss(classes) {
    for (int64_t c = 0; c < classes; ++c) {
      const math::Slope<float> slope(cotangents + c * columns, false);
      hit[c + 1] = slope.hit;
      likelihood[c + 1] = -slope.nll;
      miss[c] = slope.miss;
    }
  }

 private:
  static int64_t room(int64_t classes) { return std::max<int64_t>(classes, 16) + 1; }
};

// Where the gradient of a block goes, past the caches if it is large.
struct BlockGradient {
  float* data;
  uint16_t* halves;  // instead of data, in Form::halves
  bool bfloat;
  int64_t stride;
  bool streamed;

  // The gradient of a vector of voxels at class c.
  template <Form F>
  VOXFUSE_INLINE void write(int64_t c, int64_t v, Vec<float> x) const {
    static_assert(F != Form::interleaved);
    const int64_t at = c * stride + v;
    if constexpr (F == Form::halves) {
      store(halves + at, round_to_half(x, bfloat));
    } else {
      write_at(at, x);
    }
  }

  // That of two classes, which are opposite: rounding does not see the sign.
  template <Form F>
  VOXFUSE_INLINE void write_opposite(int64_t v, Vec<float> at_one) const {
    if constexpr (F == Form::halves) {
      const Halves bits = round_to_half(at_one, bfloat);
      store(halves + v, bits ^ 0x8000);
      store(halves + stride + v, bits);
    } else {
      Vec<float> both[2] = {-at_one, at_one};
      write<2, F>(v, both);
    }
  }

  // At all classes, which C knows; takes the vectors apart.
  template <int C, Form F>
  VOXFUSE_INLINE void write(int64_t v, Vec<float>* x) const {
    if constexpr (F == Form::interleaved) {
      constexpr int width = Lanes<float>::width;
      merge_vectors<C>(x);
      for (int k = 0; k < C; ++k) write_at(v * C + k * width, x[k]);
    } else {
      for (int c = 0; c < C; ++c) write<F>(c, v, x[c]);
    }
  }

 private:
  VOXFUSE_INLINE void write_at(int64_t at, Vec<float> x) const {
    if (streamed) {
      stream(data + at, x);
    } else {
      store(data + at, x);
    }
  }
};

// With A = hit of the label, F = miss of the other class and K = -nll of the label, the label's
// logit has the gradient (1 - p) (K - p (F - A)), the other's is its negative.
template <bool Weighted, Form F>
void two_classes_backward(int64_t, const Block<float>& block, float*, const Cotangents& cotangent,
                          const BlockGradient& gradient) {
  using V = Vec<float>;
  constexpr int width = Lanes<float>::width;
  const V k0 = broadcast(cotangent.likelihood[1]), k1 = broadcast(cotangent.likelihood[2]);
  const V d0 = broadcast(cotangent.miss[1] - cotangent.hit[1]);
  const V d1 = broadcast(cotangent.miss[0] - cotangent.hit[2]);
  for (int64_t v = 0; v < block.voxels; v += width) {
    const Ints label = load(block.labels + v);
    const Choice excluded = Weighted ? equal(label, -1) : Choice{};
    V z[2];
    logits_of<2, F, Weighted>(block, v, excluded, z);
    const TwoClasses x(z[0], z[1], label);
    V g = x.missed * (select(x.one, k1, k0) - x.hit * select(x.one, d1, d0));
    if constexpr (Weighted) g = select(excluded, V{}, g * load(block.weight + v));
    const V at_one = select(x.one, g, -g);
    gradient.template write_opposite<F>(v, at_one);
  }
}

// With h_c = miss_c off the label and A = hit on it, K = -nll of the label, and every h less that
// of the class with the greatest logit, which the gradient does not see: D = sum_k p_k h_k,
//   dz_c = p_c (h_c - D - K)  off the label,   K (1 - p) + p (h - D)  on it.
// Where that class is nearly certain, whether it is the label or not, D is as small as the other
// probabilities, and nothing large is left to cancel. Added back, the greatest one's h would round
// the differences away.
template <int C, bool Weighted, Form F>
void softmax_backward(int64_t runtime_classes, const Block<float>& block, float* scratch,
                      const Cotangents& cotangent, const BlockGradient& gradient) {
  using V = Vec<float>;
  constexpr int width = Lanes<float>::width;
  const int64_t classes = C == 0 ? runtime_classes : C;
  Softmax<C, Weighted, F> x;
  x.rows = scratch;
  for (int64_t v = 0; v < block.voxels; v += width) {
    const Ints label = load(block.labels + v);
    V best{};  // h of the greatest: of several, the last one's
    x.compute(block, classes, v, label, [&](int64_t c, V e) __attribute__((always_inline)) {
      best = select(equal(e, 1.f), broadcast(cotangent.miss[c]), best);
    });
    // Whatever an excluded voxel finds: its scale is 0.
    const V own = look_up<C>(cotangent.hit.data() + 1, label);
    const V k = look_up<C>(cotangent.likelihood.data() + 1, label);
    best = select(equal(x.own, 1.f), own, best);
    const V a = own - best;
    V d = x.own * a;
#pragma GCC unroll 16
    for (int64_t c = 0; c < classes; ++c) {
      const Choice is = equal(label, static_cast<int32_t>(c));
      d = add_product_where(~is, d, x.exponential_of(c), broadcast(cotangent.miss[c]) - best);
    }
    d *= x.inverse;
    const V base = d + k;
    V scale = x.inverse;
    if constexpr (Weighted) scale *= load(block.weight + v);
    const V on_label = (k * x.rest + x.own * (a - d)) * scale;
#pragma GCC unroll 16
    for (int64_t c = 0; c < classes; ++c) {
      const Choice is = equal(label, static_cast<int32_t>(c));
      const V off_label = x.exponential_of(c) * scale * ((cotangent.miss[c] - best) - base);
      if constexpr (F == Form::interleaved) {
        x.keep(c, select(is, on_label, off_label));
      } else {
        gradient.template write<F>(c, v, select(is, on_label, off_label));
      }
    }
    if constexpr (F == Form::interleaved) gradient.template write<C, F>(v, x.e);
  }
}

}  // namespace voxfuse::VOXFUSE_ISA
