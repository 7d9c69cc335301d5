// Labels on the GPU, of any type, as classes.
#pragma once

#include <type_traits>

#include "contract/soft_confusion.h"
#include "cuda/elements.h"

namespace voxfuse::cuda {
namespace {

/// What makes a label a class: in 32 bits, which holds every class.
struct Labels {
  int classes, ignored;  // ignored is -1 if no class is

  __device__ Labels(int classes, int ignored) : classes(classes), ignored(ignored) {}
  __device__ Labels(int64_t known, bool has_ignore, int64_t ignore_index)
      : classes(static_cast<int>(known)) {
    const bool is_class = has_ignore && ignore_index >= 0 && ignore_index < known;
    ignored = is_class ? static_cast<int>(ignore_index) : -1;
  }

  /// The class of a label, or -1 if the voxel is to be left out. Integers come without their sign:
  /// what is negative is beyond the classes, see classes_held.
  __device__ int of(uint32_t raw) const {
    const int label = static_cast<int>(raw);
    return raw < static_cast<unsigned>(classes) && label != ignored ? label : -1;
  }
  __device__ int of(uint64_t raw) const {
    return raw < static_cast<uint64_t>(classes) ? of(static_cast<uint32_t>(raw)) : -1;
  }
  template <class Real>
  __device__ int whole(Real raw) const {
    // In range before the conversion, for any bit pattern; what is no integer is no class. Compared
    // as a float, for the registers that a double takes.
    const float near = to_float(raw);
    const int value =
        near >= 0.0f && near < static_cast<float>(classes) ? static_cast<int>(raw) : -1;
    return static_cast<Real>(value) == raw ? of(static_cast<uint32_t>(value)) : -1;
  }
};

/// The bits of a channel of the target, or of the weight, at a thread's voxels.
template <class Bits, int kVoxels>
__device__ inline void load_bits(const View& view, int64_t b, int64_t c, const Span& span,
                                 Bits (&bits)[kVoxels]) {
  const auto* base =
      static_cast<const Bits*>(view.data) + b * view.stride.batch + c * view.stride.channel;
  load_span<kVoxels>(base, view.stride.voxel, view.vector && span.step == 1, span, bits);
}

/// Labels of a thread's voxels as classes, -1 for those that are none or ignored.
template <int kVoxels>
__device__ inline void load_classes(const View& view, int64_t b, int64_t c, const Labels& labels,
                                    const Span& span, int (&label)[kVoxels]) {
  const Element type = view.type;
  with_bits(type, [&](auto zero) {
    decltype(zero) raw[kVoxels];
    load_bits(view, b, c, span, raw);
    if (is_floating(type)) {
#pragma unroll
      for (int i = 0; i < kVoxels; ++i) label[i] = labels.whole(floating(type, raw[i]));
    } else {
#pragma unroll
      for (int i = 0; i < kVoxels; ++i) {
        using Wide = std::conditional_t<sizeof(zero) == 8, uint64_t, uint32_t>;
        label[i] = labels.of(static_cast<Wide>(raw[i]));
      }
    }
  });
}

}  // namespace
}  // namespace voxfuse::cuda
