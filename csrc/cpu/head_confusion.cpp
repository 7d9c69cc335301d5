// head_confusion on the CPU: tensors to pointers, the voxels divided into fixed ranges of tiles,
// the ranges' sums added in order.
#include "cpu/head_confusion.h"

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/soft_confusion_host.h"
#include "ops/head_confusion.h"

VOXFUSE_DECLARE_KERNEL(int64_t, head_forward(const Head& head, int64_t b, int64_t begin,
                                             int64_t end, double* out))
VOXFUSE_DECLARE_KERNEL(int64_t, head_backward(const Head& head, int64_t b, int64_t begin,
                                              int64_t end, double* out))

namespace voxfuse {
namespace {

// A tile's features and logits stay in a second-level cache of 1 MiB.
constexpr int64_t kTileBytes = int64_t{640} << 10;
// The ranges' sums together, as long as there are at least kFewRanges a sample.
constexpr int64_t kPartialBytes = int64_t{4} << 20;
constexpr int64_t kFewRanges = 8, kManyRanges = 256;

struct Arguments {
  View features, target;
  Tensor weight;
  std::optional<Tensor> bias;
  std::optional<View> voxel_weight;
  Head head;
};

Arguments arguments(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
                    const Tensor& target, const std::optional<Tensor>& voxel_weight,
                    int64_t activation, int64_t likelihood, int64_t overlap,
                    const std::optional<int64_t>& ignore_index, double gamma, int64_t chunk_bytes,
                    int statistics, const std::optional<int64_t>& focal_classes) {
  check_head_confusion(features, weight, bias, target, voxel_weight, activation, likelihood,
                       overlap, ignore_index, gamma, chunk_bytes);
  Arguments a{view_of(features, true),
              view_of(target, target.dim() == features.dim()),
              torch::stable::contiguous(weight),
              std::nullopt,
              std::nullopt,
              {}};
  Head& head = a.head;
  Confusion& q = head.confusion;
  q.batch = features.size(0);
  q.classes = weight.size(0);
  q.voxels = 1;
  for (int64_t axis = 2; axis < features.dim(); ++axis) q.voxels *= features.size(axis);
  q.target = a.target.tensor.const_data_ptr();
  q.target_type = element_of(target, "target");
  q.target_stride = a.target.strides;
  q.dense = target_is_dense(features, q.classes, target);
  q.weight = nullptr;
  if (voxel_weight) {
    a.voxel_weight = view_of(*voxel_weight, voxel_weight->dim() == features.dim());
    q.weight = a.voxel_weight->tensor.const_data_ptr();
    q.weight_type = element_of(*voxel_weight, "voxel_weight");
    q.weight_stride = a.voxel_weight->strides;
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

  head.channels = features.size(1);
  head.features = a.features.tensor.const_data_ptr();
  head.type = element_of(features, "features");
  head.features_stride = a.features.strides;
  head.weight = a.weight.const_data_ptr();
  head.bias = nullptr;
  if (bias) {
    a.bias = torch::stable::contiguous(*bias);
    head.bias = a.bias->const_data_ptr();
  }
  const int64_t voxel_bytes = (q.classes + head.channels) * (head.type == Element::f64 ? 8 : 4);
  const int64_t most = std::min(kTileBytes, chunk_bytes) / voxel_bytes;
  head.tile = std::clamp(most / kTileVoxels * kTileVoxels, kTileVoxels, kChunkVoxels);
  head.need_head = false;
  head.gradient = nullptr;
  head.gradient_stride = {0, 0, 0};
  return a;
}

Ranges ranges_of(const Head& head, int64_t sums) {
  const int64_t batch = std::max<int64_t>(head.confusion.batch, 1);
  const int64_t affordable = kPartialBytes / (batch * sums * static_cast<int64_t>(sizeof(double)));
  return Ranges(head.confusion.voxels, head.tile, std::clamp(affordable, kFewRanges, kManyRanges));
}

// Runs kernel(b, begin, end, task) for every range of every sample.
template <class Kernel>
void run(const Confusion& q, const Tensor& target, const Ranges& ranges, Kernel kernel) {
  std::atomic<bool> wrong{false};
  torch::stable::parallel_for(0, q.batch * ranges.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last && !wrong.load(std::memory_order_relaxed); ++task) {
      const int64_t begin = task % ranges.count * ranges.voxels;
      const int64_t end = std::min(begin + ranges.voxels, q.voxels);
      if (kernel(task / ranges.count, begin, end, task) != 0) {
        wrong.store(true, std::memory_order_relaxed);
      }
    }
  });
  if (wrong) raise_wrong_label(q, target);
}

Tensor head_confusion(const Tensor& features, const Tensor& weight,
                      const std::optional<Tensor>& bias, const Tensor& target,
                      const std::optional<Tensor>& voxel_weight, int64_t activation,
                      int64_t likelihood, int64_t overlap,
                      const std::optional<int64_t>& ignore_index, double gamma, bool full,
                      int64_t chunk_bytes, const std::optional<int64_t>& focal_classes) {
  const int statistics = full ? 8 : 4;
  const Arguments a =
      arguments(features, weight, bias, target, voxel_weight, activation, likelihood, overlap,
                ignore_index, gamma, chunk_bytes, statistics, focal_classes);
  const Confusion& q = a.head.confusion;
  const int64_t rows = q.classes * statistics;
  const Ranges ranges = ranges_of(a.head, rows);
  Tensor result =
      torch::stable::new_empty(features, {q.batch, q.classes, statistics}, ScalarType::Double);
  double* out = static_cast<double*>(result.mutable_data_ptr());
  std::vector<double> partial(q.batch * ranges.count * rows);
  run(q, target, ranges, [&](int64_t b, int64_t begin, int64_t end, int64_t task) {
    return VOXFUSE_DISPATCH(head_forward, a.head, b, begin, end, partial.data() + task * rows);
  });
  std::fill(out, out + q.batch * rows, 0.0);
  for (int64_t task = 0; task < q.batch * ranges.count; ++task) {
    double* row = out + task / ranges.count * rows;
    for (int64_t i = 0; i < rows; ++i) row[i] += partial[task * rows + i];
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor> head_confusion_backward(
    const Tensor& grad, const Tensor& features, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& target,
    const std::optional<Tensor>& voxel_weight, int64_t activation, int64_t likelihood,
    int64_t overlap, const std::optional<int64_t>& ignore_index, double gamma, int64_t chunk_bytes,
    bool need_features, bool need_head, const std::optional<int64_t>& focal_classes) {
  check_head_confusion_grad(grad, features, weight);
  Arguments a =
      arguments(features, weight, bias, target, voxel_weight, activation, likelihood, overlap,
                ignore_index, gamma, chunk_bytes, static_cast<int>(grad.size(2)), focal_classes);
  Head& head = a.head;
  Confusion& q = head.confusion;
  const Tensor cotangent = torch::stable::contiguous(grad);
  q.cotangent = static_cast<const double*>(cotangent.const_data_ptr());
  head.need_head = need_head;

  const auto nothing = [&] { return torch::stable::new_empty(features, {0}); };
  Tensor result = need_features ? torch::stable::empty_like(features) : nothing();
  // Where the features' axes do not collapse, the gradient is written contiguously and copied.
  const auto own = strides_of(result, true);
  Tensor written = own || !need_features ? result : torch::stable::empty_like(a.features.tensor);
  if (need_features) {
    head.gradient = written.mutable_data_ptr();
    head.gradient_stride = own ? *own : *strides_of(written, true);
    advise_huge_pages(head.gradient, written.numel() * written.element_size());
  }

  const int64_t columns = head.channels + 1;
  const int64_t sums = need_head ? q.classes * columns : 0;
  const Ranges ranges = ranges_of(head, std::max<int64_t>(sums, 1));
  std::vector<double> partial(q.batch * ranges.count * sums);
  run(q, target, ranges, [&](int64_t b, int64_t begin, int64_t end, int64_t task) {
    return VOXFUSE_DISPATCH(head_backward, head, b, begin, end, partial.data() + task * sums);
  });
  if (need_features && !own) torch::stable::copy_(result, written);
  if (!need_head) return {result, nothing(), nothing()};

  Tensor weight_gradient = torch::stable::new_empty(weight, {q.classes, head.channels});
  Tensor bias_gradient = bias ? torch::stable::new_empty(weight, {q.classes}) : nothing();
  Tensor weight_sums =
      torch::stable::new_empty(weight, {q.classes, head.channels}, ScalarType::Double);
  Tensor bias_sums = torch::stable::new_empty(weight, {q.classes}, ScalarType::Double);
  double* w = static_cast<double*>(weight_sums.mutable_data_ptr());
  double* o = static_cast<double*>(bias_sums.mutable_data_ptr());
  std::vector<double> total(sums);
  for (int64_t task = 0; task < q.batch * ranges.count; ++task) {
    for (int64_t i = 0; i < sums; ++i) total[i] += partial[task * sums + i];
  }
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
