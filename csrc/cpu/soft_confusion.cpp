// soft_confusion on the CPU: tensors to pointers, the voxels divided into fixed ranges, the ranges'
// sums added in order.
#include "cpu/soft_confusion.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/soft_confusion_host.h"
#include "ops/soft_confusion.h"

VOXFUSE_DECLARE_KERNEL(bool, confusion_forward(const SoftConfusion& q, int64_t b, int64_t begin,
                                               int64_t end, double* out))
VOXFUSE_DECLARE_KERNEL(bool, confusion_backward(const SoftConfusion& q, int64_t b, int64_t begin,
                                                int64_t end, bool past_caches))

namespace voxfuse {
namespace {

double float16_of(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 0x3ff;
  double magnitude =
      std::ldexp(exponent == 0 ? fraction : fraction | 0x400, exponent == 0 ? -24 : exponent - 25);
  if (exponent == 31) {
    magnitude = fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                              : std::numeric_limits<double>::infinity();
  }
  return (h & 0x8000) != 0 ? -magnitude : magnitude;
}

double float_at(const void* base, Element type, int64_t offset) {
  switch (type) {
    case Element::f64:
      return static_cast<const double*>(base)[offset];
    case Element::f16:
      return float16_of(static_cast<const uint16_t*>(base)[offset]);
    case Element::bf16: {
      const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(base)[offset]) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      return value;
    }
    default:
      return static_cast<const float*>(base)[offset];
  }
}

// In two's complement: of uint64 what 64 bits with a sign do not hold is negative.
int64_t integer_at(const void* base, Element type, int64_t offset) {
  switch (type) {
    case Element::i8:
      return static_cast<const int8_t*>(base)[offset];
    case Element::i16:
      return static_cast<const int16_t*>(base)[offset];
    case Element::u16:
      return static_cast<const uint16_t*>(base)[offset];
    case Element::i32:
      return static_cast<const int32_t*>(base)[offset];
    case Element::u32:
      return static_cast<const uint32_t*>(base)[offset];
    case Element::i64:
    case Element::u64:
      return static_cast<const int64_t*>(base)[offset];
    default:
      return static_cast<const uint8_t*>(base)[offset];
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

namespace {

double number_at(const View& view, int64_t offset) {
  return is_floating(view.type) ? float_at(view.data, view.type, offset)
         : view.type == Element::u64
             ? static_cast<double>(static_cast<const uint64_t*>(view.data)[offset])
             : static_cast<double>(integer_at(view.data, view.type, offset));
}

// Finds the first value of a dense target that is outside [0, 1], and raises.
void raise_wrong_value(const SoftConfusion& q, const Tensor& target) {
  const bool ignores = q.has_ignore && holds(q.target.type, q.ignore_index);
  for (int64_t b = 0; b < q.batch; ++b) {
    for (int64_t c = 0; c < q.classes; ++c) {
      if (q.annotated != nullptr && q.unlabelled == Unlabelled::exclude &&
          q.annotated[b * q.classes + c] == 0) {
        continue;
      }
      for (int64_t v = 0; v < q.voxels; ++v) {
        const Strides& s = q.target.stride;
        const double x = number_at(q.target, b * s.batch + c * s.channel + v * s.voxel);
        if (!(x < -TARGET_ROOM || x > 1 + TARGET_ROOM)) continue;
        if (ignores && x == static_cast<double>(q.ignore_index)) continue;
        const Strides& w = q.weight.stride;
        if (q.weight.data != nullptr && number_at(q.weight, b * w.batch + v * w.voxel) == 0) {
          continue;
        }
        const bool channel = target.dim() > 1 && target.size(1) == q.classes && q.classes > 1;
        VOXFUSE_CHECK_VALUE(false, "target: value ", written(x), " is outside [0, 1] by more than ",
                            written(TARGET_ROOM), ", first at ",
                            place_of(target, b, channel ? c * q.voxels + v : v));
      }
    }
  }
}

}  // namespace

void raise_wrong_label(const SoftConfusion& q, const Tensor& target) {
  if (q.dense && (q.classes > 1 || is_floating(q.target.type))) raise_wrong_value(q, target);
  const int64_t classes = q.classes == 1 ? 2 : q.classes;
  const Element type = q.target.type;
  const bool floating = is_floating(type), ignores = q.has_ignore && holds(type, q.ignore_index);
  int64_t wrong = 0;
  std::string place;  // of the first wrong label
  bool alone = true;
  for (int64_t b = 0; b < q.batch && alone; ++b) {
    for (int64_t v = 0; v < q.voxels && alone; ++v) {
      const int64_t offset = b * q.target.stride.batch + v * q.target.stride.voxel;
      const double x = floating ? float_at(q.target.data, type, offset) : 0;
      const bool whole = std::trunc(x) == x && std::isfinite(x);
      VOXFUSE_CHECK_VALUE(whole || !place.empty(), "target: label ", written(x),
                          " is no integer, first at ", place_of(target, b, v));
      const int64_t label = !floating ? integer_at(q.target.data, type, offset)
                            : whole   ? static_cast<int64_t>(std::clamp(x, -9.2e18, 9.2e18))
                                      : std::numeric_limits<int64_t>::min();
      if ((ignores && label == q.ignore_index) || (label >= 0 && label < classes)) continue;
      alone = place.empty() || label == wrong;
      if (place.empty()) {
        wrong = label;
        place = place_of(target, b, v);
      }
    }
  }
  const std::string value =
      type == Element::u64 ? std::to_string(static_cast<uint64_t>(wrong)) : std::to_string(wrong);
  VOXFUSE_CHECK_VALUE(false, "target: label ", value, " is outside [0, ", classes, ")",
                      q.has_ignore ? " or ignore_index " + std::to_string(q.ignore_index) : "",
                      ", first at ", place,
                      alone && !q.has_ignore && !(type == Element::u64 && wrong < 0)
                          ? "; if " + value + " marks voxels to ignore, pass ignore_index=" + value
                          : "");
}

void check_annotated_classes(const SoftConfusion& q) {
  for (int64_t b = 0; b < q.batch; ++b) {
    const uint8_t* row = q.annotated + b * q.classes;
    if (q.unlabelled == Unlabelled::background) {
      VOXFUSE_CHECK_VALUE(row[0] != 0, "annotated: class 0 of sample ", b,
                          " is not annotated, but with unlabelled='background' the classes that "
                          "are not annotated count as it");
    } else {
      VOXFUSE_CHECK_VALUE(std::any_of(row, row + q.classes, [](uint8_t x) { return x != 0; }),
                          "annotated: no class of sample ", b,
                          " is annotated; leave it out, or give its voxels weight 0 and annotate "
                          "any class");
    }
  }
}

namespace {

// A gradient of this size would push everything else out of a last-level cache.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

Tensor soft_confusion(const Tensor& input, const Tensor& target,
                      const std::optional<Tensor>& weight, int64_t activation, int64_t likelihood,
                      int64_t overlap, const std::optional<int64_t>& ignore_index, double gamma,
                      bool full, const std::optional<int64_t>& focal_classes, int64_t unlabelled,
                      const std::optional<Tensor>& annotated, bool any_target) {
  ConfusionArguments a(
      input, target, weight,
      {activation, likelihood, overlap, ignore_index, gamma, focal_classes, unlabelled, annotated},
      full ? FULL : CORE);
  a.problem.check_range = !any_target;
  const SoftConfusion& q = a.problem;
  const int64_t rows = q.classes * q.columns;
  // The ranges' sums together stay within 512 KiB.
  const int64_t most = std::clamp<int64_t>(65536 / std::max<int64_t>(q.batch * rows, 1), 1, 256);
  const Ranges ranges(q.voxels, kChunkVoxels, most);
  Tensor result =
      torch::stable::new_empty(input, {q.batch, q.classes, q.columns}, ScalarType::Double);
  std::vector<double> partial(q.batch * ranges.count * rows);
  run_ranges(q, target, ranges, [&](int64_t b, int64_t begin, int64_t end, int64_t task) {
    return VOXFUSE_DISPATCH(confusion_forward, q, b, begin, end, partial.data() + task * rows);
  });
  add_ranges(partial.data(), q.batch, ranges.count, rows,
             static_cast<double*>(result.mutable_data_ptr()));
  return result;
}

Tensor soft_confusion_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                               const std::optional<Tensor>& weight, int64_t activation,
                               int64_t likelihood, int64_t overlap,
                               const std::optional<int64_t>& ignore_index, double gamma,
                               const std::optional<int64_t>& focal_classes, int64_t unlabelled,
                               const std::optional<Tensor>& annotated) {
  ConfusionArguments a(
      input, target, weight,
      {activation, likelihood, overlap, ignore_index, gamma, focal_classes, unlabelled, annotated},
      checked_columns(grad, input, input.size(1)));
  SoftConfusion& q = a.problem;
  const Tensor cotangents = torch::stable::contiguous(grad);
  q.cotangents = static_cast<const double*>(cotangents.const_data_ptr());
  Gradient gradient(input, a.input);
  q.gradient = gradient.written.mutable_data_ptr();
  q.gradient_stride = gradient.strides;
  const int64_t bytes = gradient.written.numel() * gradient.written.element_size();
  advise_huge_pages(q.gradient, bytes);

  const Ranges ranges(q.voxels, kChunkVoxels, 256);
  run_ranges(q, target, ranges, [&](int64_t b, int64_t begin, int64_t end, int64_t) {
    return VOXFUSE_DISPATCH(confusion_backward, q, b, begin, end, bytes >= kStreamBytes);
  });
  return gradient.finished();
}

}  // namespace
}  // namespace voxfuse

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CPU, m) {
  m.impl("soft_confusion", TORCH_BOX(&voxfuse::soft_confusion));
  m.impl("soft_confusion_backward", TORCH_BOX(&voxfuse::soft_confusion_backward));
}
