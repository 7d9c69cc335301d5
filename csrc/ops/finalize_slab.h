// The finalisation from tensors to a Slab, the same for every device. What is checked here keeps
// memory safe for callers that reach the operator directly; the rest is the Python wrapper's.
#pragma once

#include "contract/finalize_slab.h"
#include "ops/tensor.h"

namespace voxfuse {

inline bool is_label_type(ScalarType type) {
  return type == ScalarType::Byte || type == ScalarType::UInt16 || type == ScalarType::Short ||
         type == ScalarType::Int || type == ScalarType::Long;
}

inline Element output_type(const Tensor& out, Finish mode) {
  const ScalarType type = out.scalar_type();
  const char* name = torch::headeronly::toString(type);
  if (mode == Finish::labels) {
    STD_TORCH_CHECK(is_label_type(type), "out: got ", name,
                    ", expected uint8, uint16, int16, int32 or int64");
    return type == ScalarType::UInt16 ? Element::i16 : element_of(out, "out");
  }
  if (mode == Finish::mask) {
    STD_TORCH_CHECK(type == ScalarType::Bool || type == ScalarType::Byte, "out: got ", name,
                    ", expected bool or uint8");
    return Element::u8;
  }
  const std::optional<Element> element = known_element(type);
  STD_TORCH_CHECK(element && is_floating(*element), "out: got ", name,
                  ", expected float32, float16, bfloat16 or float64");
  return *element;
}

// The stride of axes [first, last) of `out` walked as one; they must be dense from the innermost
// on with `innermost` elements between neighbours, or the check fails.
inline int64_t walked_stride(const Tensor& out, int64_t first, int64_t last, int64_t innermost) {
  int64_t stride = innermost, expected = innermost;
  bool found = innermost > 0;
  for (int64_t axis = last - 1; axis >= first; --axis) {
    if (out.size(axis) == 1) continue;
    if (!found) {
      stride = expected = out.stride(axis);
      found = true;
    }
    STD_TORCH_CHECK(out.stride(axis) == expected,
                    "out: expected slices of a contiguous tensor along the ring's axis");
    expected *= out.size(axis);
  }
  return stride;
}

/// A Slab and the tensors that its pointers point into; without voxels there is nothing to do.
struct SlabPlan {
  Slab q{};
  Tensor head, offset, sums;

  SlabPlan(const Tensor& ring, const Tensor& out, const std::optional<Tensor>& total,
           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
           int64_t ring_axis, int64_t start, int64_t stop, int64_t activation, bool applied,
           int64_t mode, double divisor, double threshold, double fill, bool clear) {
    const int64_t axes = ring.dim() - 1;
    STD_TORCH_CHECK(
        ring.is_contiguous() && axes >= 1 && ring.size(0) >= 1 &&
            (ring.scalar_type() == ScalarType::Float || ring.scalar_type() == ScalarType::Double),
        "ring: got shape ", shape_of(ring),
        ", expected a contiguous float32 or float64 (C, *extent), C >= 1");
    STD_TORCH_CHECK(ring_axis >= 0 && ring_axis < axes, "ring_axis: got ", ring_axis,
                    ", expected 0 <= ring_axis < ", axes);
    STD_TORCH_CHECK(0 <= start && start <= stop && stop - start <= ring.size(1 + ring_axis),
                    "start, stop: got ", start, ", ", stop, ", expected at most ",
                    ring.size(1 + ring_axis), " slices");
    STD_TORCH_CHECK(mode >= 0 && mode <= 4, "mode: got ", mode, ", expected 0 to 4");

    q.mode = static_cast<Finish>(mode);
    q.is_double = ring.scalar_type() == ScalarType::Double;
    q.channels = q.classes = ring.size(0);
    if (weight) {
      STD_TORCH_CHECK(weight->dim() == 2 && weight->size(1) == q.channels &&
                          weight->scalar_type() == ring.scalar_type(),
                      "weight: got shape ", shape_of(*weight), ", expected (C, ", q.channels,
                      ") of the ring's dtype");
      q.classes = weight->size(0);
      STD_TORCH_CHECK(bias && bias->dim() == 1 && bias->size(0) == q.classes &&
                          bias->scalar_type() == ring.scalar_type(),
                      "bias: expected ", q.classes, " numbers of the ring's dtype");
      head = torch::stable::contiguous(*weight);
      offset = torch::stable::contiguous(*bias);
      q.weight = head.const_data_ptr();
      q.bias = offset.const_data_ptr();
    }
    const bool all = q.mode == Finish::values || q.mode == Finish::mask;
    bool fits = out.dim() == ring.dim() && out.size(0) == (all ? q.classes : 1);
    int64_t depth = 1, inner = 1;
    q.outer = 1;
    for (int64_t axis = 0; axis < axes; ++axis) {
      const int64_t size = ring.size(1 + axis);
      fits = fits && out.size(1 + axis) == (axis == ring_axis ? stop - start : size);
      (axis < ring_axis ? q.outer : axis == ring_axis ? depth : inner) *= size;
    }
    STD_TORCH_CHECK(fits, "out: got shape ", shape_of(out), ", expected ", all ? q.classes : 1,
                    " channels of ", stop - start, " slices of the ring ", shape_of(ring));
    if (out.numel() == 0) return;
    q.type = output_type(out, q.mode);
    walked_stride(out, 2 + ring_axis, out.dim(), 1);
    STD_TORCH_CHECK(stop - start == 1 || out.stride(1 + ring_axis) == inner,
                    "out: expected slices of a contiguous tensor along the ring's axis");
    q.out_channel = out.stride(0);
    q.out_outer = walked_stride(out, 1, 1 + ring_axis, 0);
    if (total) {
      STD_TORCH_CHECK(total->scalar_type() == ScalarType::Double && total->dim() == axes &&
                          total->numel() == q.outer * depth * inner,
                      "total: got shape ", shape_of(*total), ", expected the ring's, float64");
      sums = torch::stable::contiguous(*total);
      q.total = static_cast<const double*>(sums.const_data_ptr());
    }
    q.turn = depth * inner;
    q.first = start * inner % q.turn;
    q.voxels = (stop - start) * inner;
    q.ring = ring.mutable_data_ptr();
    q.out = out.mutable_data_ptr();
    q.activation = static_cast<Activation>(activation);
    q.applied = applied;
    q.divisor = divisor;
    q.threshold = threshold;
    q.fill = fill;
    q.clear = clear;
  }
};

}  // namespace voxfuse
