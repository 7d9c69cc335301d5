// soft_confusion with every option and any number of classes: the classes of a vector of voxels in
// scratch memory. Part of soft_confusion_kernel.cpp.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "cpu/soft_confusion_staging.h"
#include "math/confusion.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

// Probabilities of the classes of one vector of voxels: rows of `width` values a class.
template <class R>
struct Rows {
  R *p, *complement, *minus_log, *minus_log_complement;

  // Where there are no logarithms, they are what the last vector left.
  VOXFUSE_INLINE math::Probability<Vec<R>> of(int64_t c) const {
    const int64_t at = c * Lanes<R>::width;
    return {load(p + at), load(complement + at), load(minus_log + at),
            load(minus_log_complement + at)};
  }
  VOXFUSE_INLINE void keep(int64_t c, const math::Probability<Vec<R>>& x, bool logs) const {
    const int64_t at = c * Lanes<R>::width;
    store(p + at, x.p);
    store(complement + at, x.complement);
    if (logs) {
      store(minus_log + at, x.minus_log);
      store(minus_log_complement + at, x.minus_log_complement);
    }
  }
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
      const V e = exponential(-absolute(z)), total = one + e;
      rows.keep(c, math::sigmoid(z, e, total, one / total), logs);
    }
  } else {
    for (int64_t c = 0; c < classes; ++c) rows.keep(c, math::plain(value(c)), logs);
  }
}

template <class R>
VOXFUSE_INLINE Vec<R> target_of(const Block<R>& block, int64_t c, int64_t voxel) {
  if (block.dense != nullptr) return load(block.dense + c * block.dense_stride + voxel);
  return load(block.labels + voxel) == static_cast<Label<R>>(c) ? broadcast<R>(1) : Vec<R>{};
}

// Two sets of rows in the workspace's scratch: the overlap's probabilities and the likelihood's
// (the same rows if the activations agree).
template <class R>
struct Scratch {
  Rows<R> overlap, likelihood;
  R* h;
  Scratch(const SoftConfusion& q, Workspace<R>& work) {
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
void general_forward(const SoftConfusion& q, const Block<R>& block, Workspace<R>& work, R* sums) {
  using V = Vec<R>;
  constexpr int64_t width = Lanes<R>::width;
  const Scratch<R> rows(q, work);
  const R gamma = static_cast<R>(q.gamma);
  const bool same = q.likelihood == q.activation;
  const bool full = q.columns == FULL;
  for (int64_t v = 0; v < block.voxels; v += width) {
    const V w = load(block.weight + v);
    probabilities(block, q.classes, v, w, q.activation, same, rows.overlap);
    if (!same) probabilities(block, q.classes, v, w, q.likelihood, true, rows.likelihood);
    for (int64_t c = 0; c < q.classes; ++c) {
      R* sum = sums + c * q.columns * width;
      const auto add = [&](int s, V term) {
        store(sum + s * width, load(sum + s * width) + math::product(w, term));
      };
      const V g = target_of(block, c, v);
      const auto p = rows.overlap.of(c), r = rows.likelihood.of(c);
      const auto overlap = math::overlap(p, g, q.overlap == Overlap::min);
      add(Sum::TP, overlap.tp);
      add(Sum::FP, overlap.fp);
      add(Sum::FN, overlap.fn);
      const R focal = c < q.focal_classes ? gamma : R{0};
      add(Sum::NLL, math::product(g, math::focal(r.complement, r.minus_log, focal)));
      if (full) {
        const V off = q.likelihood == Activation::softmax
                          ? r.minus_log
                          : math::focal(r.p, r.minus_log_complement, focal);
        add(Sum::OFF, math::product(1 - g, off));
        add(Sum::P2, p.p * p.p);
        add(Sum::G2, g * g);
        add(Sum::W, broadcast<R>(1));
      }
    }
  }
}

template <class R>
void general_backward(const SoftConfusion& q, const Block<R>& block, Workspace<R>& work,
                      const R* cotangent, R* gradient, int64_t gradient_stride) {
  using V = Vec<R>;
  constexpr int64_t width = Lanes<R>::width;
  const Scratch<R> rows(q, work);
  const R gamma = static_cast<R>(q.gamma);
  const int S = q.columns;
  const bool full = S == FULL;
  const bool same = q.likelihood == q.activation;
  const bool logs = gamma != 0;
  for (int64_t v = 0; v < block.voxels; v += width) {
    const V w = load(block.weight + v);
    probabilities(block, q.classes, v, w, q.activation, same && logs, rows.overlap);
    if (!same) probabilities(block, q.classes, v, w, q.likelihood, logs, rows.likelihood);

    // Of a softmax, h less that of the most probable class: the gradient does not see it, and
    // nothing large is left to cancel.
    const bool softmax = q.activation == Activation::softmax;
    V most = broadcast<R>(-1), best_a{}, best_hit{}, best_miss{}, best_square{};
    for (int64_t c = 0; c < q.classes; ++c) {
      const math::Slope<R> slope(cotangent + c * S, full);
      const auto p = rows.overlap.of(c);
      const V a = math::overlap_slope(p, target_of(block, c, v), q.overlap == Overlap::min);
      if (!softmax) {
        store(rows.h + c * width, math::slope_of_p(slope, a, p.p));
        continue;
      }
      store(rows.h + c * width, a);
      const Mask<R> more = p.p > most;
      most = more ? p.p : most;
      best_a = more ? a : best_a;
      best_hit = more ? broadcast<R>(slope.hit) : best_hit;
      best_miss = more ? broadcast<R>(slope.miss) : best_miss;
      if (full) best_square = more ? p.p * slope.square : best_square;
    }
    V mean_h{};
    for (int64_t c = 0; softmax && c < q.classes; ++c) {
      const math::Slope<R> slope(cotangent + c * S, full);
      const V p = load(rows.overlap.p + c * width);
      const V a = load(rows.h + c * width);
      const V h = math::slope_difference(slope, a, p, best_hit, best_miss, best_a, best_square);
      mean_h += p * h;
      store(rows.h + c * width, h);
    }
    const auto focal = [&](int64_t c) { return c < q.focal_classes ? gamma : R{0}; };
    const auto share = [&](int64_t c) {
      return math::likelihood_share(math::Slope<R>(cotangent + c * S, full), rows.likelihood.of(c),
                                    target_of(block, c, v), focal(c), full);
    };
    // The sum of u without the likeliest class's, of which it may be all but a trace.
    V likeliest = broadcast<R>(-1), u_likeliest{}, rest_u{};
    if (q.likelihood == Activation::softmax) {
      for (int64_t c = 0; c < q.classes; ++c) {
        const V u = share(c);
        const V r = load(rows.likelihood.p + c * width);
        const Mask<R> more = r > likeliest;
        rest_u += more ? u_likeliest : u;
        u_likeliest = more ? u : u_likeliest;
        likeliest = more ? r : likeliest;
      }
    }
    for (int64_t c = 0; c < q.classes; ++c) {
      const auto p = rows.overlap.of(c), r = rows.likelihood.of(c);
      const V h = load(rows.h + c * width);
      V d;
      if (softmax) {
        d = p.p * (h - mean_h);
      } else if (q.activation == Activation::sigmoid) {
        d = p.p * p.complement * h;
      } else {
        d = h;
      }
      if (q.likelihood == Activation::softmax) {
        // u_c - r_c sum u, with the class's own part as u_c (1 - r_c).
        const V u = share(c);
        const Mask<R> certain = (r.p == likeliest) & (r.p > R(0.5));
        d += u * r.complement - r.p * (certain ? rest_u : rest_u + u_likeliest - u);
      } else {
        const bool sigmoid = q.likelihood == Activation::sigmoid;
        const V one = broadcast<R>(1);
        const math::Slope<R> slope(cotangent + c * S, full);
        const V g = target_of(block, c, v);
        d += math::likelihood_slope(slope.nll * g, r.p, r.complement, r.minus_log, focal(c),
                                    sigmoid ? r.complement : one / r.p);
        if (full) {
          d -=
              math::likelihood_slope(slope.off * (1 - g), r.complement, r.p, r.minus_log_complement,
                                     focal(c), sigmoid ? r.p : one / r.complement);
        }
      }
      store(gradient + c * gradient_stride + v, math::product(w, d));
    }
  }
}

}  // namespace
}  // namespace voxfuse::VOXFUSE_ISA
