// The hard-confusion kernel. Compiled once an instruction set (see csrc/cpu/dispatch.h).
//
// A range of voxels of one sample is walked in blocks that stay in the first caches. Of a block the
// greatest class is kept, row by row; then its voxels are counted: class by class, or, where there
// are many and a voxel has but one, by its classes.
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "contract/hard_confusion.h"
#include "cpu/argmax.h"
#include "cpu/rows.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

constexpr int64_t kMaxBlock = 2048;

// What a voxel is whose label is no class: left out, or wrong.
constexpr int32_t kLeftOut = -1, kWrong = -2;

// Up to how many classes comparing each with all voxels costs less than counting voxels one by one.
constexpr int64_t kFewClasses = 8;

template <class T>
constexpr bool kIsFloating = !std::is_integral_v<T>;

// The type that values of T are compared in.
template <class T>
using Wide = std::conditional_t<
    kIsFloating<T>, std::conditional_t<std::is_same_v<T, double>, double, float>,
    std::conditional_t<(sizeof(T) < 4) || std::is_same_v<T, int32_t>, int32_t, int64_t>>;

template <class T>
VOXFUSE_INLINE Wide<T> widened(T value) {
  if constexpr (kIsFloating<T>) {
    return to_real<Wide<T>>(value);
  } else {
    return static_cast<Wide<T>>(value);
  }
}

// n values `stride` apart as classes, kLeftOut where they are to be ignored and kWrong where they
// are neither; returns whether any is.
template <class T>
bool read_classes(const T* source, int64_t stride, int64_t n, int64_t classes, bool has_ignore,
                  int64_t ignore_index, int32_t* __restrict out) {
  using W = Wide<T>;
  const W ignore = static_cast<W>(ignore_index), most = static_cast<W>(classes);
  // An index that the type does not hold is not met.
  const bool ignores = has_ignore && static_cast<int64_t>(ignore) == ignore_index;
  int32_t least = 0;
  const auto read = [&](int64_t i, W x) __attribute__((always_inline)) {
    const bool inside = x >= W(0) && x < most;
    const int32_t label = static_cast<int32_t>(inside ? x : W(0));
    int32_t c = inside && static_cast<W>(label) == x ? label : kWrong;
    c = ignores && x == ignore ? kLeftOut : c;
    out[i] = c;
    least = std::min(least, c);
  };
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) read(i, widened(source[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) read(i, widened(source[i * stride]));
  }
  return least == kWrong;
}

bool read_classes(const View& view, int64_t b, int64_t channel, int64_t begin, int64_t n,
                  int64_t classes, bool has_ignore, int64_t ignore_index, int32_t* out) {
  const int64_t offset =
      b * view.stride.batch + channel * view.stride.channel + begin * view.stride.voxel;
  const bool ignores = has_ignore && holds(view.type, ignore_index);
  return with_element(view.type, [&](auto tag) {
    using T = decltype(tag);
    return read_classes(element<T>(view.data, offset), view.stride.voxel, n, classes, ignores,
                        ignore_index, out);
  });
}

// Rows of logits, a class each, of a block of voxels, in the type R.
template <class R>
class Logits {
 public:
  explicit Logits(const HardConfusion& q)
      : q(q),
        last(q.input.stride.channel == 1 && q.input.stride.voxel == q.classes && q.classes > 1),
        direct(!last && q.input.stride.voxel == 1 &&
               q.input.type == (std::is_same_v<R, float> ? Element::f32 : Element::f64)) {
    const int64_t width = Lanes<R>::width;
    block = kMaxBlock;
    if (last) {
      // All classes of a block are brought into rows at a time, of about 24 KiB.
      block = 24576 / (q.classes * static_cast<int64_t>(sizeof(R))) / width * width;
      block = std::clamp<int64_t>(block, 64, kMaxBlock);
      interleaved.resize(q.classes * block + width);
    }
    rows.resize(direct ? 0 : (last ? q.classes : 1) * block);
  }

  void move_to(int64_t b, int64_t begin, int64_t n) {
    offset = b * q.input.stride.batch + begin * q.input.stride.voxel;
    count = n;
    if (!last) return;
    with_float(q.input.type, [&](auto tag) {
      using T = decltype(tag);
      const T* source = element<T>(q.input.data, offset);
      const R* values = nullptr;
      if constexpr (std::is_same_v<T, R>) {
        // The exchange may read a vector beyond the block.
        if (begin + n + Lanes<R>::width <= q.voxels) values = source;
      }
      if (values == nullptr) {
        convert_row<R>(source, 1, n * q.classes, interleaved.data());
        values = interleaved.data();
      }
      split_channels(values, n, q.classes, rows.data(), block);
    });
  }

  // Stays until the next one is asked for.
  const R* row(int64_t c) {
    if (last) return rows.data() + c * block;
    const int64_t start = offset + c * q.input.stride.channel;
    if (direct) return element<R>(q.input.data, start);
    with_float(q.input.type, [&](auto tag) {
      using T = decltype(tag);
      convert_row<R>(element<T>(q.input.data, start), q.input.stride.voxel, count, rows.data());
    });
    return rows.data();
  }

  int64_t block;

 private:
  const HardConfusion& q;
  const bool last, direct;  // channels last; read in place
  int64_t offset = 0, count = 0;
  std::vector<R> rows, interleaved;
};

// What is counted of a class: true positives, predictions, truths and voxels.
struct Counts {
  int64_t both, predicted, true_, all;
};

template <class R>
class Counter {
 public:
  Counter(const HardConfusion& q, Counts* counts)
      : q(q),
        logits(q),
        counts(counts),
        by_class(q.dense || q.decision == Decision::threshold || q.classes <= kFewClasses),
        truth(logits.block),
        predicted(logits.block),
        kept(q.mask.data != nullptr ? logits.block : 0) {
    if (q.decision == Decision::argmax) {
      best.resize(logits.block);
      where.resize(logits.block);
    }
    if (!by_class) tally.resize(2 * (q.classes + 1));
  }

  // Counts a range; returns whether a label is no class, which ends the walk.
  bool operator()(int64_t b, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += logits.block) {
      const int64_t n = std::min(logits.block, end - at);
      if (q.mask.data != nullptr) read_mask(b, at, n);
      if (!q.dense && read_truth(b, at, n)) return true;
      if (q.decision != Decision::labels) logits.move_to(b, at, n);
      if (q.decision == Decision::argmax) {
        choose(n);
      } else if (q.decision == Decision::labels && read_prediction(b, at, n)) {
        return true;
      }
      if (by_class ? count_by_class(b, at, n) : count_by_voxel(n)) return true;
    }
    if (!by_class) add_tally();
    return false;
  }

 private:
  void read_mask(int64_t b, int64_t at, int64_t n) {
    const Strides& stride = q.mask.stride;
    with_element(q.mask.type, [&](auto tag) {
      using T = decltype(tag);
      const T* source = element<T>(q.mask.data, b * stride.batch + at * stride.voxel);
      for (int64_t j = 0; j < n; ++j) kept[j] = widened(source[j * stride.voxel]) != 0;
    });
  }

  void leave_out_masked(int64_t n) {
    if (q.mask.data == nullptr) return;
    int32_t* __restrict t = truth.data();
    for (int64_t j = 0; j < n; ++j) t[j] = kept[j] ? t[j] : kLeftOut;
  }

  bool read_truth(int64_t b, int64_t at, int64_t n) {
    int32_t* __restrict t = truth.data();
    if (read_classes(q.target, b, 0, at, n, q.classes, q.has_ignore, q.ignore_index, t)) {
      return true;
    }
    leave_out_masked(n);
    int64_t all = 0;
    for (int64_t j = 0; j < n; ++j) all += t[j] >= 0;
    // The same for every class.
    for (int64_t c = 0; c < q.classes; ++c) counts[c].all += all;
    return false;
  }

  bool read_prediction(int64_t b, int64_t at, int64_t n) {
    int32_t* __restrict p = predicted.data();
    if (!read_classes(q.input, b, 0, at, n, q.classes, false, 0, p)) return false;
    bool wrong = false;
    for (int64_t j = 0; j < n; ++j) wrong |= p[j] == kWrong && truth[j] >= 0;
    return wrong;
  }

  void choose(int64_t n) {
    std::copy_n(logits.row(0), n, best.data());
    std::fill_n(where.data(), n, Index<R>(0));
    for (int64_t c = 1; c < q.classes; ++c) {
      keep_greater(logits.row(c), n, static_cast<Index<R>>(c), best.data(), where.data());
    }
    for (int64_t j = 0; j < n; ++j) predicted[j] = static_cast<int32_t>(where[j]);
  }

  bool count_by_class(int64_t b, int64_t at, int64_t n) {
    for (int64_t c = 0; c < q.classes; ++c) {
      if (q.dense && read_dense(b, c, at, n)) return true;
      if (q.decision == Decision::threshold) {
        const R* __restrict z = logits.row(c);
        const R least = static_cast<R>(q.least);
        count(c, n, [&](int64_t j) { return z[j] >= least; });
      } else {
        const int32_t* __restrict p = predicted.data();
        const int32_t own = static_cast<int32_t>(c);
        count(c, n, [&](int64_t j) { return p[j] == own; });
      }
    }
    return false;
  }

  // The truth of one class: 0, 1 or kLeftOut.
  bool read_dense(int64_t b, int64_t c, int64_t at, int64_t n) {
    int32_t* __restrict t = truth.data();
    if (read_classes(q.target, b, c, at, n, 2, q.has_ignore, q.ignore_index, t)) return true;
    leave_out_masked(n);
    return false;
  }

  template <class Predicted>
  void count(int64_t c, int64_t n, Predicted is_predicted) {
    const int32_t* __restrict t = truth.data();
    const int32_t own = q.dense ? 1 : static_cast<int32_t>(c);
    int32_t both = 0, predictions = 0, truths = 0, all = 0;
    for (int64_t j = 0; j < n; ++j) {
      const bool p = is_predicted(j), g = t[j] == own, counted = t[j] >= 0;
      both += p & g;
      predictions += p & counted;
      truths += g;
      all += counted;
    }
    Counts& sums = counts[c];
    sums.both += both;
    sums.predicted += predictions;
    sums.true_ += truths;
    if (q.dense) sums.all += all;
  }

  // What is left out counts for a class of its own, the last. Neighbours often share a class: two
  // tallies in turn do not wait for each other.
  bool count_by_voxel(int64_t n) {
    const int32_t none = static_cast<int32_t>(q.classes);
    const auto add = [&](int64_t j, Counts* to) __attribute__((always_inline)) {
      const bool counted = truth[j] >= 0;
      const int32_t t = counted ? truth[j] : none, p = counted ? predicted[j] : none;
      ++to[p].predicted;
      ++to[t].true_;
      to[p].both += p == t;
    };
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) {
      add(j, tally.data());
      add(j + 1, tally.data() + none + 1);
    }
    for (; j < n; ++j) add(j, tally.data());
    return false;
  }

  void add_tally() {
    for (int64_t c = 0; c < q.classes; ++c) {
      for (const Counts& part : {tally[c], tally[c + q.classes + 1]}) {
        counts[c].both += part.both;
        counts[c].predicted += part.predicted;
        counts[c].true_ += part.true_;
      }
    }
  }

  const HardConfusion& q;
  Logits<R> logits;
  Counts* counts;
  const bool by_class;
  std::vector<int32_t> truth, predicted;
  std::vector<uint8_t> kept;
  std::vector<R> best;
  std::vector<Index<R>> where;
  std::vector<Counts> tally;
};

}  // namespace

// Counts of voxels [begin, end) of sample b into `counts` (classes, 4): true positives,
// predictions, truths and voxels; returns whether a label without a class was met.
bool hard_confusion(const HardConfusion& q, int64_t b, int64_t begin, int64_t end,
                    int64_t* counts) {
  // A threshold is compared in float32; the greatest of float64 is that of all their bits.
  std::vector<Counts> sums(q.classes, Counts{});
  const bool wide = q.decision == Decision::argmax && q.input.type == Element::f64;
  const bool wrong = wide ? Counter<double>(q, sums.data())(b, begin, end)
                          : Counter<float>(q, sums.data())(b, begin, end);
  for (int64_t c = 0; c < q.classes; ++c) {
    const Counts& s = sums[c];
    const int64_t columns[] = {s.both, s.predicted, s.true_, s.all};
    std::copy(columns, columns + 4, counts + 4 * c);
  }
  return wrong;
}

}  // namespace voxfuse::VOXFUSE_ISA
