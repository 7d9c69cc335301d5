// head_confusion on the CPU: tensors to pointers, the voxels divided into fixed ranges of tiles,
// the ranges' sums added in order.
#include "cpu/head_confusion.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/soft_confusion_host.h"
#include "ops/head_confusion.h"

VOXFUSE_DECLARE_KERNEL(bool, head_forward(const Head& head, int64_t b, int64_t begin, int64_t end,
                                          double* out))
VOXFUSE_DECLARE_KERNEL(bool, head_backward(const Head& head, int64_t b, int64_t begin, int64_t end,
                                           double* out))

namespace voxfuse {
namespace {

// A tile's features and logits stay in a second-level cache of 1 MiB.
constexpr int64_t kTileBytes = int64_t{640} << 10;
// The ranges' sums together, as long as there are at least kFewRanges a sample.
constexpr int64_t kPartialBytes = int64_t{4} << 20;
constexpr int64_t kFewRanges = 8, kManyRanges = 256;

// A problem with the tensors that its pointers point into.
struct Arguments {
  Walkable features;
  Tensor weight;
  std::optional<Tensor> bias;
  Head head;
  ConfusionCompanions companions;

  Arguments(const Tensor& features_, const Tensor& weight_, const std::optional<Tensor>& bias_,
            const Tensor& target, const std::optional<Tensor>& voxel_weight,
            const ConfusionOptions& options, int64_t chunk_bytes, int64_t columns)
      : features(checked(features_, weight_, bias_), true),
        weight(torch::stable::contiguous(weight_)),
        companions(head.confusion, features_, weight_.size(0), target, voxel_weight, options,
                   columns) {
    head.channels = features_.size(1);
    head.features = view_of(features, "features");
    head.weight = weight.const_data_ptr();
    if (bias_) {
      bias = torch::stable::contiguous(*bias_);
      head.bias = bias->const_data_ptr();
    }
    const int64_t voxel_bytes =
        (head.confusion.classes + head.channels) * (head.features.type == Element::f64 ? 8 : 4);
    const int64_t most = std::min(kTileBytes, chunk_bytes) / voxel_bytes;
    head.tile = std::clamp(most / kTileVoxels * kTileVoxels, kTileVoxels, kChunkVoxels);
  }

  static const Tensor& checked(const Tensor& features, const Tensor& weight,
                               const std::optional<Tensor>& bias) {
    check_head_confusion(features, weight, bias);
    return features;
  }
};

Ranges ranges_of(const Head& head, int64_t sums) {
  const int64_t batch = std::max<int64_t>(head.confusion.batch, 1);
  const int64_t affordable = kPartialBytes / (batch * sums * static_cast<int64_t>(sizeof(double)));
  return Ranges(head.confusion.voxels, head.tile, std::clamp(affordable, kFewRanges, kManyRanges));
}

Tensor head_confusion(const Tensor& features, const Tensor& weight,
                      const std::optional<Tensor>& bias, const Tensor& target,
                      const std::optional<Tensor>& voxel_weight, int64_t activation,
                      int64_t likelihood, int64_t overlap,
                      const std::optional<int64_t>& ignore_index, double gamma, bool full,
                      int64_t chunk_bytes, const std::optional<int64_t>& focal_classes,
                      int64_t unlabelled, const std::optional<Tensor>& annotated) {
  Arguments a(
      features, weight, bias, target, voxel_weight,
      {activation, likelihood, overlap, ignore_index, gamma, focal_classes, unlabelled, annotated},
      chunk_bytes, full ? FULL : CORE);
  a.head.confusion.check_range = true;
  const SoftConfusion& q = a.head.confusion;
  const int64_t rows = q.classes * q.columns;
  const Ranges ranges = ranges_of(a.head, rows);
  Tensor result =
      torch::stable::new_empty(features, {q.batch, q.classes, q.columns}, ScalarType::Double);
  std::vector<double> partial(q.batch * ranges.count * rows);
  run_ranges(q, target, ranges, [&](int64_t b, int64_t begin, int64_t end, int64_t task) {
    return VOXFUSE_DISPATCH(head_forward, a.head, b, begin, end, partial.data() + task * rows);
  });
  add_ranges(partial.data(), q.batch, ranges.count, rows,
             static_cast<double*>(result.mutable_data_ptr()));
  return result;
}

std::tuple<Tensor, Tensor, Tensor> head_confusion_backward(
    const Tensor& grad, const Tensor& features, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& target,
    const std::optional<Tensor>& voxel_weight, int64_t activation, int64_t likelihood,
    int64_t overlap, const std::optional<int64_t>& ignore_index, double gamma, int64_t chunk_bytes,
    bool need_features, bool need_head, const std::optional<int64_t>& focal_classes,
    int64_t unlabelled, const std::optional<Tensor>& annotated) {
  Arguments a(
      features, weight, bias, target, voxel_weight,
      {activation, likelihood, overlap, ignore_index, gamma, focal_classes, unlabelled, annotated},
      chunk_bytes, checked_columns(grad, features, weight.size(0)));
  Head& head = a.head;
  SoftConfusion& q = head.confusion;
  const Tensor cotangents = torch::stable::contiguous(grad);
  q.cotangents = static_cast<const double*>(cotangents.const_data_ptr());
  head.need_head = need_head;

  const auto nothing = [&] { return torch::stable::new_empty(features, {0}); };
  std::optional<Gradient> gradient;
  if (need_features) {
    gradient.emplace(features, a.features);
    head.gradient = gradient->written.mutable_data_ptr();
    head.gradient_stride = gradient->strides;
    advise_huge_pages(head.gradient, gradient->written.numel() * gradient->written.element_size());
  }

  const int64_t columns = head.channels + 1;
  const int64_t sums = need_head ? q.classes * columns : 0;
  const Ranges ranges = ranges_of(head, std::max<int64_t>(sums, 1));
  std::vector<double> partial(q.batch * ranges.count * sums);
  run_ranges(q, target, ranges, [&](int64_t b, int64_t begin, int64_t end, int64_t task) {
    return VOXFUSE_DISPATCH(head_backward, head, b, begin, end, partial.data() + task * sums);
  });
  const Tensor result = need_features ? gradient->finished() : nothing();
  if (!need_head) return {result, nothing(), nothing()};

  Tensor weight_gradient = torch::stable::new_empty(weight, {q.classes, head.channels});
  Tensor bias_gradient = bias ? torch::stable::new_empty(weight, {q.classes}) : nothing();
  Tensor weight_sums =
      torch::stable::new_empty(weight, {q.classes, head.channels}, ScalarType::Double);
  Tensor bias_sums = torch::stable::new_empty(weight, {q.classes}, ScalarType::Double);
  double* w = static_cast<double*>(weight_sums.mutable_data_ptr());
  double* o = static_cast<double*>(bias_sums.mutable_data_ptr());
  std::vector<double> total(sums);
  add_ranges(partial.data(), 1, q.batch * ranges.count, sums, total.data());
  for (int64_t c = 0; c < q.classes; ++c) {
    std::copy_n(total.data() + c * columns, head.channels, w + c * head.channels);
    o[c] = total[c * columns + head.channels];
  }
  torch::stable::copy_(weight_gradient, weight_sums);
  if (bias) torch::stable::copy_(bias_gradient, bias_sums);
  return {result, weight_gradient, bias_gradient};
}

}  // namespace
}  // namespace voxfuse

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CPU, m) {
  m.impl("head_confusion", TORCH_BOX(&voxfuse::head_confusion));
  m.impl("head_confusion_backward", TORCH_BOX(&voxfuse::head_confusion_backward));
}
