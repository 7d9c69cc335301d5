// Samples in which some classes are not annotated: a staged block is changed so that the cores,
// which know nothing of it, compute what is meant (src/voxfuse/ops/soft_confusion.py). Part of
// soft_confusion_kernel.cpp.
//
// The logit of a class that is left out reads as the lowest number, all others at least half of
// that, so that its probability is 0 whatever they are. Classes that are counted as background have
// given theirs to class 0 before, as log-sum-exp; the background's gradient is theirs by their
// share of its probability.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/simd.h"
#include "cpu/soft_confusion.h"
#include "math/confusion.h"

namespace voxfuse::VOXFUSE_ISA {

template <class R>
struct Partial {
  const uint8_t* annotated = nullptr;  // (classes) of a sample that lacks one, else null
  bool merges = false;                 // into the background
  int64_t classes = 0, room = 0;
  std::vector<R> shares;  // (classes, room): of the background's probability, in a backward pass

  Partial(const SoftConfusion& q, int64_t b, int64_t block)
      : merges(q.unlabelled == Unlabelled::background), classes(q.classes), room(block) {
    if (q.annotated == nullptr) return;
    annotated = q.annotated + b * classes;
    if (std::all_of(annotated, annotated + classes, [](uint8_t x) { return x != 0; })) {
      annotated = nullptr;
    } else if (merges && q.gradient != nullptr) {
      shares.resize(classes * room);
    }
  }

  explicit operator bool() const { return annotated != nullptr; }

  // Where classes are merged, the background is there whatever is said of it.
  bool left_out(int64_t c) const { return annotated[c] == 0 && !(merges && c == 0); }

  // Whether a dense target's values for the class count.
  bool reads(int64_t c) const { return annotated == nullptr || merges || annotated[c] != 0; }

  // The voxels of classes that are left out become background, or ignored; returns whether any is
  // ignored now.
  template <class Label>
  bool change_labels(Label* labels, int64_t n) const {
    const Label instead = merges ? 0 : -1;
    bool ignored = false;
    for (int64_t i = 0; i < n; ++i) {
      if (labels[i] >= 0 && left_out(labels[i])) labels[i] = instead;
      ignored |= labels[i] < 0;
    }
    return ignored;
  }

  void change_dense(R* rows, int64_t n) const {
    for (int64_t c = 0; c < classes; ++c) {
      if (!left_out(c)) continue;
      R* row = rows + c * room;
      for (int64_t i = 0; merges && i < n; ++i) rows[i] += row[i];
      std::fill(row, row + n, R{0});
    }
  }

  // Logits in rows of a tile, `n` of them a whole number of vectors.
  void change_logits(R* tile, int64_t n) {
    using V = Vec<R>;
    const R lowest = -math::largest(R{});
    const V least = broadcast<R>(lowest / 2);
    for (int64_t v = 0; v < n; v += Lanes<R>::width) {
      V from{};
      if (merges) from = merge(tile, v);
      for (int64_t c = 0; c < classes; ++c) {
        R* place = tile + c * room + v;
        if (left_out(c)) {
          store(place, broadcast<R>(lowest));
        } else {
          V z = finite<R>(load(place));
          if (merges && c > 0) z -= from;
          store(place, z < least ? least : z);
        }
      }
    }
  }

  // Rows of a gradient of which the cores have made class 0's, or nothing.
  void change_gradient(R* gradient, int64_t stride, int64_t n) const {
    using V = Vec<R>;
    for (int64_t c = classes - 1; c >= 0; --c) {  // class 0 last
      R* row = gradient + c * stride;
      if (!merges) {
        if (left_out(c)) std::fill(row, row + n, R{0});
      } else if (c == 0 || left_out(c)) {
        for (int64_t v = 0; v < n; v += Lanes<R>::width) {
          const V share = load(shares.data() + c * room + v);
          store(row + v, math::product(load(gradient + v), share));
        }
      }
    }
  }

  // What a core has made of classes that are left out, or would make of their cotangents.
  template <class Number>
  void clear(Number* sums, int64_t columns) const {
    for (int64_t c = 0; c < classes; ++c) {
      if (left_out(c)) std::fill_n(sums + c * columns, columns, Number{0});
    }
  }

 private:
  // Class 0 of a vector of voxels as log-sum-exp of what is counted as background, less the largest
  // of these logits, which is returned.
  Vec<R> merge(R* tile, int64_t v) {
    using V = Vec<R>;
    V most = finite<R>(load(tile + v)), total{};
    const auto each = [&](auto f) __attribute__((always_inline)) {
      for (int64_t c = 0; c < classes; ++c) {
        if (c == 0 || left_out(c)) f(c, finite<R>(load(tile + c * room + v)));
      }
    };
    // A NaN that the maximum passes over comes back with its own exponential.
    each([&](int64_t, V z) { most = at_least<V>(most, z); });
    each([&](int64_t, V z) { total += exponential(z - most); });
    if (!shares.empty()) {
      const V inverse = broadcast<R>(1) / total;
      each([&](int64_t c, V z) {
        store(shares.data() + c * room + v, exponential(z - most) * inverse);
      });
    }
    store(tile + v, math::log_accurate(total));
    return most;
  }
};

}  // namespace voxfuse::VOXFUSE_ISA
