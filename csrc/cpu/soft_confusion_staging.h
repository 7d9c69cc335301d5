// Blocks of voxels in the one form that the cores of soft_confusion work on: labels as integers,
// weights, and logits with unit voxel stride in the compute type, in place where they lie like that
// in memory. Part of soft_confusion_kernel.cpp.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <span>
#include <type_traits>
#include <utility>

#include "cpu/half.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/soft_confusion.h"
#include "cpu/soft_confusion_partial.h"

namespace voxfuse::VOXFUSE_ISA {

inline constexpr int64_t kMaxBlock = 256;

// How the logits of a block lie, and its gradient: a row a class, of the compute type or of halves,
// or the classes of a voxel side by side (channels last). All but rows is the softmax core's.
enum class Form { rows, halves, interleaved };

// An integer as wide as R, so that a vector of labels has as many lanes as one of logits.
template <class R>
using Label = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;

// A block of voxels. Excluded ones have the label -1, or the dense target 0, and the weight 0.
template <class R>
struct Block {
  int64_t voxels;   // a multiple of the vector width; the tail is excluded padding
  const R* logits;  // (classes, voxels), class stride logits_stride
  int64_t logits_stride;
  const uint16_t* halves;  // instead of logits, in Form::halves
  bool bfloat;             // what the halves are
  const Label<R>* labels;  // (voxels), or null if dense
  const R* dense;          // (classes, voxels), class stride dense_stride
  int64_t dense_stride;
  const R* weight;  // (voxels)
  bool weighted;    // else every weight is 1
};

template <class R>
struct Workspace {
  int64_t block;  // voxels a block
  std::span<R> logits, interleaved, dense, weight, scratch;
  std::span<Label<R>> labels;
  Partial<R> partial;

  Workspace(const SoftConfusion& q, int64_t b) : block(block_of(q)), partial(q, b, block) {
    const int64_t width = Lanes<R>::width;
    const int64_t tile = q.classes * block;
    const bool interleaves =
        q.input.stride.channel == 1 || (q.gradient != nullptr && q.gradient_stride.channel == 1);
    const int64_t rows = kScratchRows * q.classes * width;
    // One allocation, for a range has few voxels; malloc aligns to 16 bytes, and by chance then
    // every vector would lie across two cache lines.
    const size_t bytes =
        (tile + (interleaves ? tile + width : 0) + (q.dense ? tile : block) + block + rows) *
        sizeof(R);
    size_t room = bytes + kLine;
    memory = std::make_unique_for_overwrite<std::byte[]>(room);
    void* start = memory.get();
    R* free = static_cast<R*>(std::align(kLine, bytes, start, room));
    const auto take = [&](int64_t n) { return std::span<R>(std::exchange(free, free + n), n); };
    logits = take(tile);
    if (interleaves) interleaved = take(tile + width);
    if (q.dense) {
      dense = take(tile);
    } else {
      labels = {reinterpret_cast<Label<R>*>(take(block).data()), static_cast<size_t>(block)};
    }
    weight = take(block);
    scratch = take(rows);
  }

 private:
  static constexpr int64_t kScratchRows = 9;
  static constexpr size_t kLine = 64;
  std::unique_ptr<std::byte[]> memory;

  static int64_t block_of(const SoftConfusion& q) {
    // Tiles of a block stay within about 24 KiB.
    const int64_t voxels = 6144 * 4 / (q.classes * static_cast<int64_t>(sizeof(R)));
    return std::clamp<int64_t>(voxels, 64, kMaxBlock) / Lanes<R>::width * Lanes<R>::width;
  }
};

template <class R>
alignas(kVectorBytes) inline constexpr std::array<R, kMaxBlock> kOnes = [] {
  std::array<R, kMaxBlock> ones{};
  ones.fill(R{1});
  return ones;
}();

namespace {

template <class R>
constexpr Element kOwnElement = std::is_same_v<R, float> ? Element::f32 : Element::f64;

template <class R>
constexpr int64_t whole_vectors(int64_t n) {
  return (n + Lanes<R>::width - 1) / Lanes<R>::width * Lanes<R>::width;
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
    const auto x = to_real<std::conditional_t<std::is_same_v<T, double>, double, float>>(value);
    const int32_t label =
        x > -2147483648.f && x < 2147483648.f ? static_cast<int32_t>(x) : kNoLabel;
    return label == x ? label : kNoLabel;
  }
}

// Labels of a row as classes, -1 where they are to be ignored; returns whether one is neither, and
// whether any is ignored.
template <class R, class T>
bool stage_classes(const SoftConfusion& q, const T* source, int64_t stride, int64_t n,
                   Label<R>* out, bool& ignores) {
  const uint32_t classes = static_cast<uint32_t>(std::min(q.classes, classes_held(q.target.type)));
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
  if (!q.has_ignore || !holds(q.target.type, q.ignore_index)) {
    return walk([&](T value) { return kept(short_label(value)); });
  }
  const int64_t ignored_label = as_read<T>(q.ignore_index);
  const int32_t ignore = static_cast<int32_t>(ignored_label);
  if (ignore == ignored_label && ignore != kNoLabel) {
    return walk([&](T value) {
      const int32_t label = short_label(value);
      return label == ignore ? -1 : kept(label);
    });
  }
  return walk([&](T value) {
    return integer_label(value) == ignored_label ? -1 : kept(short_label(value));
  });
}

// One value a class. Of one class alone it is the indicator of the foreground, which may have an
// ignored value, and as an integer has to be 0 or 1: returns whether it is neither.
template <class R, class T>
bool stage_dense(const SoftConfusion& q, const T* source, int64_t n, Workspace<R>& work) {
  const int64_t stride = q.target.stride.voxel;
  for (int64_t c = 0; c < q.classes; ++c) {
    R* row = work.dense.data() + c * work.block;
    convert_row<R>(source + c * q.target.stride.channel, stride, n, row);
    if (q.target.type == Element::boolean) {
      for (int64_t i = 0; i < n; ++i) row[i] = row[i] != 0 ? R{1} : R{0};
    }
    std::fill(row + n, row + whole_vectors<R>(n), R{0});
  }
  const bool binary = q.classes == 1 && std::is_integral_v<T> && q.target.type != Element::boolean;
  const bool ignores = q.has_ignore && holds(q.target.type, q.ignore_index);
  if (!binary && !ignores) return false;
  bool wrong = false;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t value = integer_label(source[i * stride]);
    const bool ignored = ignores && value == q.ignore_index;
    wrong |= binary && !ignored && value != 0 && value != 1;
    if (ignored) work.weight[i] = 0;
  }
  return wrong;
}

// Whether a value that is read is outside [0, 1]; NaN is not. Rows hold a whole number of vectors.
template <class R>
bool outside(const Workspace<R>& work, int64_t classes, int64_t padded) {
  using U = typename Lanes<R>::U;
  using Bits = std::conditional_t<sizeof(R) == 4, uint32_t, uint64_t>;
  constexpr R room = static_cast<R>(TARGET_ROOM), limit = R{1} + room;
  // As unsigned numbers, the bits of what is below 0 or NaN are above those of any other.
  U most{};
  for (int64_t c = 0; c < classes; ++c) {
    const R* row = work.dense.data() + c * work.block;
    for (int64_t v = 0; work.partial.reads(c) && v < padded; v += Lanes<R>::width) {
      const U bits = reinterpret_cast<U>(load(row + v));
      most = bits > most ? bits : most;
    }
  }
  const auto beyond = most > std::bit_cast<Bits>(limit);
  std::array<uint64_t, kVectorBytes / 8> lanes;
  std::memcpy(lanes.data(), &beyond, sizeof(lanes));
  if (std::accumulate(lanes.begin(), lanes.end(), uint64_t{0}, std::bit_or<>()) == 0) return false;
  for (int64_t c = 0; c < classes; ++c) {
    const R* row = work.dense.data() + c * work.block;
    for (int64_t v = 0; work.partial.reads(c) && v < padded; ++v) {
      if (row[v] < -room || row[v] > limit) return true;
    }
  }
  return false;
}

template <class R>
void stage_weights(const SoftConfusion& q, int64_t b, int64_t begin, int64_t n, R* weight) {
  with_element(q.weight.type, [&](auto tag) {
    using T = decltype(tag);
    convert_row<R>(
        element<T>(q.weight.data, b * q.weight.stride.batch + begin * q.weight.stride.voxel),
        q.weight.stride.voxel, n, weight);
  });
  if (q.weight.type == Element::boolean) {
    for (int64_t i = 0; i < n; ++i) weight[i] = weight[i] != 0 ? R{1} : R{0};
  }
}

// Target and weights of voxels [begin, begin + n) of sample b; returns whether a label has no
// class, or a value is outside [0, 1].
template <class R>
bool stage_target(const SoftConfusion& q, int64_t b, int64_t begin, int64_t n, Workspace<R>& work,
                  Block<R>& out) {
  const int64_t padded = whole_vectors<R>(n);
  R* weight = work.weight.data();
  Label<R>* labels = work.labels.data();
  if (q.weight.data != nullptr) stage_weights(q, b, begin, n, weight);
  if (q.dense && q.weight.data == nullptr) std::fill_n(weight, n, R{1});

  bool wrong = false, ignores = q.dense && q.has_ignore;
  const int64_t offset = b * q.target.stride.batch + begin * q.target.stride.voxel;
  if (q.dense) {
    with_element(q.target.type, [&](auto tag) {
      wrong = stage_dense(q, element<decltype(tag)>(q.target.data, offset), n, work);
    });
  } else {
    with_label(q.target.type, [&](auto tag) {
      const auto* source = element<decltype(tag)>(q.target.data, offset);
      wrong = stage_classes<R>(q, source, q.target.stride.voxel, n, labels, ignores);
    });
  }
  if (wrong) return true;
  if (work.partial && !q.dense) ignores = work.partial.change_labels(labels, n);

  out.weighted = q.weight.data != nullptr || ignores || padded != n;
  if (q.dense) {
    for (int64_t c = 0; out.weighted && c < q.classes; ++c) {
      R* row = work.dense.data() + c * work.block;
      for (int64_t i = 0; i < n; ++i) row[i] = weight[i] == 0 ? R{0} : row[i];
    }
    const bool ranged = q.check_range && q.target.type != Element::boolean;
    if (ranged && outside(work, q.classes, padded)) return true;
    if (work.partial) work.partial.change_dense(work.dense.data(), n);
  } else {
    if (q.weight.data != nullptr) {
      for (int64_t i = 0; i < n; ++i) {
        labels[i] = weight[i] == 0 ? -1 : labels[i];
        weight[i] = labels[i] < 0 ? R{0} : weight[i];
      }
    } else if (out.weighted) {
      for (int64_t i = 0; i < n; ++i) weight[i] = labels[i] < 0 ? R{0} : R{1};
    }
    std::fill(labels + n, labels + padded, -1);
  }
  std::fill(weight + n, weight + padded, R{0});
  out.labels = q.dense ? nullptr : labels;
  out.dense = q.dense ? work.dense.data() : nullptr;
  out.dense_stride = work.block;
  out.weight = out.weighted ? weight : kOnes<R>.data();
  return false;
}

// Logits of voxels [begin, begin + n) of sample b: read in place where they are contiguous in the
// compute type, else brought into the workspace's tile.
template <class R>
void stage_logits(const SoftConfusion& q, int64_t b, int64_t begin, int64_t n, Workspace<R>& work,
                  Block<R>& out) {
  const int64_t width = Lanes<R>::width, padded = whole_vectors<R>(n), room = work.block;
  const int64_t offset = b * q.input.stride.batch + begin * q.input.stride.voxel;
  const bool direct = q.input.type == kOwnElement<R> && q.input.stride.voxel == 1 && padded == n &&
                      !work.partial &&
                      q.classes <= 32;  // more streams than that outrun the prefetcher
  if (direct) {
    out.logits = element<R>(q.input.data, offset);
    out.logits_stride = q.input.stride.channel;
    return;
  }
  R* tile = work.logits.data();
  with_float(q.input.type, [&](auto tag) {
    using T = decltype(tag);
    const T* source = element<T>(q.input.data, offset);
    if (q.input.stride.channel == 1 && q.input.stride.voxel == q.classes && q.classes > 1) {
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
        convert_row<R>(source + c * q.input.stride.channel, q.input.stride.voxel, n,
                       tile + c * room);
      }
    }
  });
  for (int64_t c = 0; c < q.classes && padded != n; ++c) {
    std::fill(tile + c * room + n, tile + c * room + padded, R{0.5});
  }
  if (work.partial) work.partial.change_logits(tile, padded);
  out.logits = tile;
  out.logits_stride = room;
}

// Brings voxels [begin, begin + n) of sample b into a block; returns as stage_target.
template <class R>
bool stage(const SoftConfusion& q, int64_t b, int64_t begin, int64_t n, Form form,
           Workspace<R>& work, Block<R>& out) {
  out.voxels = whole_vectors<R>(n);
  if (stage_target(q, b, begin, n, work, out)) return true;
  if (form == Form::rows) {
    stage_logits(q, b, begin, n, work, out);
    return false;
  }
  const int64_t offset = b * q.input.stride.batch + begin * q.input.stride.voxel;
  out.logits_stride = q.input.stride.channel;
  out.bfloat = q.input.type == Element::bf16;
  if (form == Form::halves) {
    out.halves = element<uint16_t>(q.input.data, offset);
  } else {
    out.logits = element<R>(q.input.data, offset);
  }
  return false;
}

// Whether rows of this type and voxel stride are read, or written, by the softmax core as halves.
inline bool halves_in_place(const SoftConfusion& q, const Strides& strides, int64_t n) {
  return kHalvesInRegisters && (q.input.type == Element::f16 || q.input.type == Element::bf16) &&
         strides.voxel == 1 && n % Lanes<float>::width == 0 && q.classes <= 32;
}

// Whether the softmax core itself reads, or writes, channels-last float32 voxels.
inline bool interleaved_in_place(const SoftConfusion& q, const Strides& strides, int64_t n) {
  const bool full = q.columns == FULL && q.gradient == nullptr;
  return q.input.type == Element::f32 && !full && strides.channel == 1 &&
         strides.voxel == q.classes && n % Lanes<float>::width == 0 &&
         exchanges_in_registers(q.classes);
}

// How the softmax core reads and writes a block: in place in the forms it knows, else rows of
// float32, which may be a tile.
inline Form form_of(const SoftConfusion& q, int64_t n) {
  const bool backward = q.gradient != nullptr;
  const auto both = [&](auto in_place) {
    return in_place(q, q.input.stride, n) && (!backward || in_place(q, q.gradient_stride, n));
  };
  if (both(halves_in_place)) return Form::halves;
  if (both(interleaved_in_place)) return Form::interleaved;
  return Form::rows;
}

// A gradient in the tile to where it belongs, in the input's type and layout.
template <class R>
void write_gradient(const SoftConfusion& q, const R* tile, int64_t stride, int64_t n,
                    int64_t offset, Workspace<R>& work) {
  with_float(q.input.type, [&](auto tag) {
    using T = decltype(tag);
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
      write_row(tile + c * stride, n, out + c * q.gradient_stride.channel, q.gradient_stride.voxel);
    }
  });
}

// Whether every vector of the gradient is aligned, as writing past the caches asks for.
template <class R>
bool is_aligned(const SoftConfusion& q) {
  const auto whole = [](int64_t elements) { return elements * sizeof(R) % kVectorBytes == 0; };
  const bool interleaved = q.gradient_stride.channel == 1;  // whole vectors of voxels then are
  return reinterpret_cast<uintptr_t>(q.gradient) % kVectorBytes == 0 &&
         whole(q.gradient_stride.batch) && (interleaved || whole(q.gradient_stride.channel));
}

}  // namespace
}  // namespace voxfuse::VOXFUSE_ISA
