// The gradient of a softmax against soft targets with the common options (float32 arithmetic):
// product overlap, one activation, no focal modulation. Part of soft_confusion_kernel.cpp.
//
// What the general core does, without rows for what follows from the exponentials: e is 1 at the
// most probable class, 1 - p is the other exponentials' share.
#pragma once

#include <cstdint>

#include "contract/codes.h"
#include "cpu/simd.h"
#include "cpu/soft_confusion_staging.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

template <bool Likelihood>
void dense_softmax_backward(int64_t classes, const Block<float>& block, float* scratch,
                            const float* cotangent, int columns, float* gradient,
                            int64_t gradient_stride) {
  using V = Vec<float>;
  constexpr int64_t width = Lanes<float>::width;
  float* rows = scratch;
  float* slopes = scratch + classes * width;
  const auto hit = [&](int64_t c) {
    const float* t = cotangent + c * columns;
    return t[Sum::TP] - t[Sum::FN];
  };
  const auto miss = [&](int64_t c) { return cotangent[c * columns + Sum::FP]; };
  const auto nll = [&](int64_t c) { return cotangent[c * columns + Sum::NLL]; };
  const V one = broadcast(1.f);
  for (int64_t v = 0; v < block.voxels; v += width) {
    const V w = load(block.weight + v);
    const Choice excluded = equal(w, 0.f);
    const auto target = [&](int64_t c) { return load(block.dense + c * block.dense_stride + v); };
    V largest{};
    for (int64_t c = 0; c < classes; ++c) {
      const V raw = finite<float>(load(block.logits + c * block.logits_stride + v));
      const V z = select(excluded, V{}, raw);
      // A NaN that the maximum passes over comes back with its own exponential.
      largest = c == 0 ? z : at_least(largest, z);
      store(rows + c * width, z);
    }
    V total{}, others{}, best_g{}, best_hit{}, best_miss{};
    V all_u{}, rest_u{};  // sums of u = -nll g, the second without the most probable class
    for (int64_t c = 0; c < classes; ++c) {
      const V e = exponential(load(rows + c * width) - largest);
      const V g = target(c);
      const Choice best = equal(e, 1.f);
      total += e;
      others = add_where(~best, others, e);
      best_g = select(best, g, best_g);
      best_hit = select(best, broadcast(hit(c)), best_hit);
      best_miss = select(best, broadcast(miss(c)), best_miss);
      if constexpr (Likelihood) {
        const V u = g * -nll(c);
        all_u += u;
        rest_u = add_where(~best, rest_u, u);
      }
      store(rows + c * width, e);
    }
    // Where several classes are largest, `others` lacks all of them.
    const Choice several = above(total, 1.5f);
    others = select(several, total - one, others);
    total = one + others;
    const V inverse = one / total;
    V mean{};
    for (int64_t c = 0; c < classes; ++c) {
      const V g = target(c);
      const V lower = at_most(g, best_g), upper = at_least(best_g, g);
      const V rise = g - best_g;
      V h = lower * (hit(c) - best_hit);
      h += (1.f - upper) * (miss(c) - best_miss);
      h += rise * select(above(rise, 0.f), hit(c) - best_miss, best_hit - miss(c));
      mean += load(rows + c * width) * h;
      store(slopes + c * width, h);
    }
    mean *= inverse;
    for (int64_t c = 0; c < classes; ++c) {
      const V e = load(rows + c * width);
      const V p = e * inverse;
      V d = load(slopes + c * width) - mean;
      if constexpr (Likelihood) {
        // u_c - p_c sum u, with the class's own part as u_c (1 - p_c).
        const V u = target(c) * -nll(c);
        const Choice best = equal(e, 1.f);
        const V complement = select(best, others, total - e) * inverse;
        const V rest = select(best & ~several, rest_u, all_u - u);
        d = p * (d - rest) + u * complement;
      } else {
        d *= p;
      }
      store(gradient + c * gradient_stride + v, select(excluded, V{}, w * d));
    }
  }
}

void dense_softmax_backward(int64_t classes, const Block<float>& block, float* scratch,
                            const float* cotangent, int columns, float* gradient,
                            int64_t gradient_stride) {
  bool likelihood = false;
  for (int64_t c = 0; c < classes; ++c) likelihood |= cotangent[c * columns + Sum::NLL] != 0;
  const auto run = likelihood ? dense_softmax_backward<true> : dense_softmax_backward<false>;
  run(classes, block, scratch, cotangent, columns, gradient, gradient_stride);
}

}  // namespace
}  // namespace voxfuse::VOXFUSE_ISA
