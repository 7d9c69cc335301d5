// soft_confusion with a sigmoid and any target, in float32 arithmetic: product overlap, one
// activation, no focal modulation. Part of soft_confusion_kernel.cpp. It stands for the general
// core, class by class and with the weight multiplied in first; a test holds the two against each
// other. The block comes by value: a store could change what is behind a reference, which is then
// read again for every vector.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "cpu/soft_confusion_general.h"
#include "cpu/soft_confusion_staging.h"
#include "math/confusion.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

template <bool Full>
void sigmoid_forward(const SoftConfusion& q, const Block<float> block, float* sums) {
  using V = Vec<float>;
  constexpr int width = Lanes<float>::width;
  constexpr int S = Full ? FULL : CORE;
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
      const auto [p, complement, minus_log, minus_log_complement] =
          math::sigmoid(z, e, total, reciprocal(total));
      const V wg = w * g, wrest = w * (1.f - g);
      held[Sum::TP] += p * wg;
      held[Sum::FP] += p * wrest;
      held[Sum::FN] += complement * wg;
      held[Sum::NLL] += math::product(wg, minus_log);
      if constexpr (Full) {
        held[Sum::OFF] += math::product(wrest, minus_log_complement);
        held[Sum::P2] += p * p * w;
        held[Sum::G2] += g * wg;
        held[Sum::W] += w;
      }
    }
    for (int s = 0; s < S; ++s) store(sum + s * width, held[s]);
  }
}

void sigmoid_backward(const SoftConfusion& q, const Block<float> block, const float* cotangent,
                      float* gradient, int64_t gradient_stride) {
  using V = Vec<float>;
  constexpr int width = Lanes<float>::width;
  for (int64_t c = 0; c < q.classes; ++c) {
    const math::Slope<float> slope(cotangent + c * q.columns, q.columns == FULL);
    for (int64_t v = 0; v < block.voxels; v += width) {
      const V w = load(block.weight + v);
      const V raw = load(block.logits + c * block.logits_stride + v);
      const V z = w == 0 ? V{} : finite<float>(raw);
      const V g = target_of(block, c, v);
      const V e = exponential(-absolute(z));
      const V total = 1.f + e;
      const auto r = math::sigmoid(z, e, total, reciprocal(total));
      const V rest = 1.f - g;
      const V h = math::slope_of_p(slope, g, r.p);
      const V d = r.p * r.complement * h - g * r.complement * slope.nll + rest * r.p * slope.off;
      store(gradient + c * gradient_stride + v, w * d);
    }
  }
}

}  // namespace
}  // namespace voxfuse::VOXFUSE_ISA
