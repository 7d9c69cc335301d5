// soft_confusion on the CPU: tensors to pointers, the voxels divided into fixed ranges, the ranges'
// sums added in order.
#include "cpu/soft_confusion.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/soft_confusion_host.h"
#include "ops/soft_confusion.h"

VOXFUSE_DECLARE_KERNEL(int64_t, confusion_forward(const Confusion& q, int64_t b, int64_t begin,
                                                  int64_t end, double* out))
VOXFUSE_DECLARE_KERNEL(int64_t, confusion_backward(const Confusion& q, int64_t b, int64_t begin,
                                                   int64_t end))

namespace voxfuse {
namespace {

double value_at(const void* base, Element type, int64_t offset) {
  switch (type) {
    case Element::f32:
      return static_cast<const float*>(base)[offset];
    case Element::f64:
      return static_cast<const double*>(base)[offset];
    case Element::f16: {
      const uint16_t h = static_cast<const uint16_t*>(base)[offset];
      const int exponent = h >> 10 & 31, fraction = h & 0x3ff;
      double magnitude = std::ldexp(exponent == 0 ? fraction : fraction | 0x400,
                                    exponent == 0 ? -24 : exponent - 25);
      if (exponent == 31) {
        magnitude = fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                                  : std::numeric_limits<double>::infinity();
      }
      return (h & 0x8000) != 0 ? -magnitude : magnitude;
    }
    case Element::boolean:
    case Element::u8:
      return static_cast<const uint8_t*>(base)[offset];
    case Element::i16:
      return static_cast<const int16_t*>(base)[offset];
    case Element::i32:
      return static_cast<const int32_t*>(base)[offset];
    case Element::i64:
      return static_cast<double>(static_cast<const int64_t*>(base)[offset]);
    default:
      return 0;
  }
}

// The place of voxel v of sample b in the target, as Python writes it.
std::string place_of(const Tensor& target, int64_t b, int64_t v) {
  std::string place;
  for (int64_t axis = target.dim() - 1; axis > 0; --axis) {
    place = ", " + std::to_string(v % target.size(axis)) + place;
    v /= target.size(axis);
  }
  return "target[" + std::to_string(b) + place + "]";
}

std::string written(double x) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", x);
  return text;
}

}  // namespace

void raise_wrong_label(const Confusion& q, const Tensor& target) {
  const int64_t classes = q.classes == 1 ? 2 : q.classes;
  for (int64_t b = 0; b < q.batch; ++b) {
    for (int64_t v = 0; v < q.voxels; ++v) {
      const int64_t offset = b * q.target_stride.batch + v * q.target_stride.voxel;
      const double x = value_at(q.target, q.target_type, offset);
      VOXFUSE_CHECK_VALUE(std::trunc(x) == x && std::isfinite(x), "target: label ", written(x),
                          " is no integer, first at ", place_of(target, b, v));
      const int64_t label = q.target_type == Element::i64
                                ? static_cast<const int64_t*>(q.target)[offset]
                                : static_cast<int64_t>(std::clamp(x, -9.2e18, 9.2e18));
      if (q.has_ignore && label == q.ignore_index) continue;
      if (label >= 0 && label < classes) continue;
      VOXFUSE_CHECK_VALUE(false, "target: label ", label, " is outside [0, ", classes, ")",
                          q.has_ignore ? " or ignore_index " + std::to_string(q.ignore_index) : "",
                          ", first at ", place_of(target, b, v));
    }
  }
  VOXFUSE_CHECK_VALUE(false, "target: a label is outside [0, ", classes, ")");
}

namespace {

// A gradient of this size would push everything else out of a last-level cache.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

// The operator's arguments; the views keep copies alive as long as the pointers are used.
struct Arguments {
  View input, target;
  std::optional<View> weight;
  Confusion confusion;
};

Arguments arguments(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                    int64_t activation, int64_t likelihood, int64_t overlap,
                    const std::optional<int64_t>& ignore_index, double gamma, int statistics,
                    const std::optional<int64_t>& focal_classes) {
  check_soft_confusion(input, target, weight, activation, likelihood, overlap, ignore_index, gamma);
  Arguments a{view_of(input, true), view_of(target, target.dim() == input.dim()), std::nullopt, {}};
  Confusion& q = a.confusion;
  q.batch = input.size(0);
  q.classes = input.size(1);
  q.voxels = 1;
  for (int64_t axis = 2; axis < input.dim(); ++axis) q.voxels *= input.size(axis);
  q.input = a.input.tensor.const_data_ptr();
  q.input_type = element_of(input, "input");
  q.input_stride = a.input.strides;
  q.target = a.target.tensor.const_data_ptr();
  q.target_type = element_of(target, "target");
  q.target_stride = a.target.strides;
  q.dense = target_is_dense(input, target);
  q.weight = nullptr;
  if (weight) {
    a.weight = view_of(*weight, weight->dim() == input.dim());
    q.weight = a.weight->tensor.const_data_ptr();
    q.weight_type = element_of(*weight, "weight");
    q.weight_stride = a.weight->strides;
  }
  q.activation = static_cast<Activation>(activation);
  q.likelihood = static_cast<Activation>(likelihood);
  q.overlap = static_cast<Overlap>(overlap);
  q.has_ignore = ignore_index.has_value();
  q.ignore_index = ignore_index.value_or(0);
  q.gamma = gamma;
  q.focal_classes = focal_classes_of(focal_classes);
  q.statistics = statistics;
  q.cotangent = nullptr;
  q.gradient = nullptr;
  return a;
}

Tensor soft_confusion(const Tensor& input, const Tensor& target,
                      const std::optional<Tensor>& weight, int64_t activation, int64_t likelihood,
                      int64_t overlap, const std::optional<int64_t>& ignore_index, double gamma,
                      bool full, const std::optional<int64_t>& focal_classes) {
  const int statistics = full ? 8 : 4;
  const Arguments a = arguments(input, target, weight, activation, likelihood, overlap,
                                ignore_index, gamma, statistics, focal_classes);
  const Confusion& q = a.confusion;
  const int64_t rows = q.classes * statistics;
  // The ranges' sums together stay within 512 KiB.
  const int64_t most = std::clamp<int64_t>(65536 / std::max<int64_t>(q.batch * rows, 1), 1, 256);
  const Ranges ranges(q.voxels, kChunkVoxels, most);
  Tensor result =
      torch::stable::new_empty(input, {q.batch, q.classes, statistics}, ScalarType::Double);
  double* out = static_cast<double*>(result.mutable_data_ptr());

  std::vector<double> partial(q.batch * ranges.count * rows);
  std::atomic<bool> wrong{false};
  torch::stable::parallel_for(0, q.batch * ranges.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last && !wrong.load(std::memory_order_relaxed); ++task) {
      const int64_t b = task / ranges.count;
      const int64_t begin = task % ranges.count * ranges.voxels;
      const int64_t end = std::min(begin + ranges.voxels, q.voxels);
      if (VOXFUSE_DISPATCH(confusion_forward, q, b, begin, end, partial.data() + task * rows)) {
        wrong.store(true, std::memory_order_relaxed);
      }
    }
  });
  if (wrong) raise_wrong_label(q, target);
  for (int64_t b = 0; b < q.batch; ++b) {
    double* row = out + b * rows;
    std::fill(row, row + rows, 0.0);
    for (int64_t range = 0; range < ranges.count; ++range) {
      const double* sums = partial.data() + (b * ranges.count + range) * rows;
      for (int64_t i = 0; i < rows; ++i) row[i] += sums[i];
    }
  }
  return result;
}

Tensor soft_confusion_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                               const std::optional<Tensor>& weight, int64_t activation,
                               int64_t likelihood, int64_t overlap,
                               const std::optional<int64_t>& ignore_index, double gamma,
                               const std::optional<int64_t>& focal_classes) {
  check_soft_confusion_grad(grad, input);
  Arguments a = arguments(input, target, weight, activation, likelihood, overlap, ignore_index,
                          gamma, static_cast<int>(grad.size(2)), focal_classes);
  Confusion& q = a.confusion;
  const Tensor cotangent = torch::stable::contiguous(grad);
  q.cotangent = static_cast<const double*>(cotangent.const_data_ptr());

  Tensor result = torch::stable::empty_like(input);
  const auto own = strides_of(result, true);
  // Where the input's axes do not collapse, the gradient is written contiguously and copied.
  Tensor written = own ? result : torch::stable::empty_like(a.input.tensor);
  q.gradient = written.mutable_data_ptr();
  q.gradient_stride = own ? *own : *strides_of(written, true);
  const int64_t bytes = written.numel() * written.element_size();
  advise_huge_pages(q.gradient, bytes);
  q.stream_gradient = bytes >= kStreamBytes;

  const Ranges ranges(q.voxels, kChunkVoxels, 256);
  std::atomic<bool> wrong{false};
  torch::stable::parallel_for(0, q.batch * ranges.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last && !wrong.load(std::memory_order_relaxed); ++task) {
      const int64_t b = task / ranges.count;
      const int64_t begin = task % ranges.count * ranges.voxels;
      const int64_t end = std::min(begin + ranges.voxels, q.voxels);
      if (VOXFUSE_DISPATCH(confusion_backward, q, b, begin, end)) {
        wrong.store(true, std::memory_order_relaxed);
      }
    }
  });
  if (wrong) raise_wrong_label(q, target);
  if (!own) torch::stable::copy_(result, written);
  return result;
}

}  // namespace
}  // namespace voxfuse

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CPU, m) {
  m.impl("soft_confusion", TORCH_BOX(&voxfuse::soft_confusion));
  m.impl("soft_confusion_backward", TORCH_BOX(&voxfuse::soft_confusion_backward));
}
