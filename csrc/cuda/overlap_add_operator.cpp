// The patch fusion operators on the GPU: tensors to pointers. The kernels know nothing of PyTorch.
#include <limits>

#include "cuda/operator.h"
#include "cuda/overlap_add.h"
#include "ops/overlap_add.h"

namespace voxfuse::cuda {
namespace {

/// A Fusion and the tensors that its pointers point into.
class Plan {
 public:
  Fusion q;

  Plan(const Tensor& partner, const Tensor& origins, const Tensor& rows,
       const std::vector<Tensor>& weights, const std::optional<Tensor>& total,
       const std::vector<int64_t>& extent, int64_t channels)
      : origins_(torch::stable::contiguous(origins)), rows_(torch::stable::contiguous(rows)) {
    const int axes = static_cast<int>(extent.size()), lead = 3 - axes;
    const std::vector<int64_t> patch = patch_shape_of(weights, axes);
    check_device(origins, partner, "origins");
    check_device(rows, partner, "rows");
    q.patches = origins.size(0);
    q.channels = channels;
    q.axes = axes;
    for (int axis = lead; axis < 3; ++axis) {
      q.patch[axis] = axis_size(patch[axis - lead], "weights");
      q.extent[axis] = q.end[axis] = axis_size(extent[axis - lead], "volume_shape");
    }
    q.origins = static_cast<const int64_t*>(origins_.const_data_ptr());
    q.rows = static_cast<const int64_t*>(rows_.const_data_ptr());
    q.separable = weights_are_separable(weights, axes);
    for (size_t k = 0; k < weights.size(); ++k) {
      check_device(weights[k], partner, "weights");
      tensors_.push_back(torch::stable::contiguous(weights[k]));
      const int axis = q.separable ? lead + static_cast<int>(k) : 0;
      q.weights[axis] = static_cast<const double*>(tensors_.back().const_data_ptr());
      q.row_count[axis] = tensors_.back().size(0);
    }
    if (total) {
      check_device(*total, partner, "total");
      tensors_.push_back(torch::stable::contiguous(*total));
      q.total = static_cast<const double*>(tensors_.back().const_data_ptr());
    }
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  void take_cover(const std::vector<Tensor>& cover, const Tensor& partner, double floor) {
    q.floor = floor;
    for (size_t k = 0; k < cover.size(); ++k) {
      check_device(cover[k], partner, "weights");
      tensors_.push_back(torch::stable::contiguous(cover[k]));
      const int axis = 3 - q.axes + static_cast<int>(k);
      q.cover[axis] = static_cast<const double*>(tensors_.back().const_data_ptr());
      q.cover_count[axis] = axis_size(tensors_.back().size(0), "weights");
      q.cover_extent[axis] = axis_size(tensors_.back().size(1), "weights");
    }
  }

  /// Sets the activation, and has memory for what a softmax of many channels keeps.
  void set_activation(int64_t activation, const Tensor& patches) {
    check_fusion_activation(activation);
    q.activation = static_cast<int>(activation);
    const int64_t numbers = softmax_workspace(q);
    if (numbers == 0) return;
    tensors_.push_back(
        torch::stable::new_empty(patches, {numbers}, accumulation_type(patches.scalar_type())));
    q.softmax = tensors_.back().mutable_data_ptr();
  }

  void set_ring(int64_t axis, int64_t start, int64_t stop) {
    q.ring_axis = 3 - q.axes + static_cast<int>(axis);
    STD_TORCH_CHECK(stop <= kLargest, "stop: got ", stop, ", expected at most ", kLargest);
    q.begin[q.ring_axis] = static_cast<int>(start);
    q.end[q.ring_axis] = static_cast<int>(stop);
  }

 private:
  // Coordinates plus a patch must fit into 32 bits.
  static constexpr int64_t kLargest = std::numeric_limits<int>::max() / 2;

  static int axis_size(int64_t size, const char* name) {
    STD_TORCH_CHECK(size >= 0 && size <= kLargest, name, ": got an axis of ", size,
                    ", expected 0 to ", kLargest);
    return static_cast<int>(size);
  }

  static void check_device(const Tensor& tensor, const Tensor& partner, const char* name) {
    STD_TORCH_CHECK(tensor.device() == partner.device(), name,
                    ": is on another device than the data");
  }

  Tensor origins_, rows_;
  std::vector<Tensor> tensors_;
};

std::vector<int64_t> sizes_from(const Tensor& tensor, int64_t first) {
  std::vector<int64_t> sizes;
  for (int64_t axis = first; axis < tensor.dim(); ++axis) sizes.push_back(tensor.size(axis));
  return sizes;
}

Tensor add(const Tensor& patches, const Tensor& origins, const Tensor& rows,
           std::vector<Tensor> weights, const std::optional<Tensor>& total,
           std::vector<int64_t> volume_shape, int64_t activation) {
  const int64_t axes = static_cast<int64_t>(volume_shape.size());
  STD_TORCH_CHECK(patches.dim() >= 1, "patches: got shape ", shape_of(patches));
  check_fusion_tables(origins, rows, weights, patches.size(0), axes);
  check_fusion_patches(patches, weights, axes);
  check_fusion_total(total, volume_shape, patches);
  const torch::stable::accelerator::DeviceGuard guard(patches.get_device_index());
  Plan plan(patches, origins, rows, weights, total, volume_shape, patches.size(1));
  std::vector<int64_t> shape{patches.size(1)};
  shape.insert(shape.end(), volume_shape.begin(), volume_shape.end());
  const Tensor source = torch::stable::contiguous(patches);
  Tensor result = torch::stable::new_empty(patches, shape);
  plan.q.type = element_of(patches, "patches");
  plan.q.source = source.const_data_ptr();
  plan.q.target = result.mutable_data_ptr();
  plan.set_activation(activation, patches);
  check_launch(overlap_add_forward(plan.q, current_stream(patches)), "overlap_add");
  return result;
}

void add_to_ring(const Tensor& ring, const Tensor& patches, const Tensor& origins,
                 const Tensor& rows, std::vector<Tensor> weights,
                 const std::optional<Tensor>& total, int64_t ring_axis, int64_t start, int64_t stop,
                 int64_t flip, double floor, int64_t activation) {
  STD_TORCH_CHECK(
      ring.dim() >= 2 && patches.dim() == ring.dim() + 1 && ring.size(0) == patches.size(1),
      "ring: got shape ", shape_of(ring), ", expected (C, *extent) to go with patches of shape ",
      shape_of(patches));
  const std::vector<int64_t> extent = sizes_from(ring, 1);
  const int64_t axes = static_cast<int64_t>(extent.size());
  const std::vector<Tensor> cover = take_cover(weights, floor, total, extent, ring_axis, stop);
  check_fusion_tables(origins, rows, weights, patches.size(0), axes);
  check_fusion_patches(patches, weights, axes);
  check_fusion_total(total, extent, patches);
  check_fusion_ring(ring, "ring", extent, ring_axis, start, stop);
  check_fusion_flip(flip, axes);
  STD_TORCH_CHECK(ring.scalar_type() == accumulation_type(patches.scalar_type()), "ring: got ",
                  torch::headeronly::toString(ring.scalar_type()), ", expected ",
                  torch::headeronly::toString(accumulation_type(patches.scalar_type())));
  STD_TORCH_CHECK(ring.device() == patches.device(), "ring: is on another device than patches");
  const torch::stable::accelerator::DeviceGuard guard(patches.get_device_index());
  Plan plan(patches, origins, rows, weights, total, extent, ring.size(0));
  plan.take_cover(cover, patches, floor);
  plan.set_ring(ring_axis, start, stop);
  plan.q.flip = static_cast<int>(flip << (3 - axes));
  const Tensor source = torch::stable::contiguous(patches);
  plan.q.type = element_of(patches, "patches");
  plan.q.source = source.const_data_ptr();
  plan.q.target = ring.mutable_data_ptr();
  plan.set_activation(activation, patches);
  check_launch(overlap_add_ring(plan.q, current_stream(patches)), "overlap_add_");
}

void add_weights(const Tensor& total, const Tensor& origins, const Tensor& rows,
                 std::vector<Tensor> weights, int64_t ring_axis, int64_t start, int64_t stop) {
  const std::vector<int64_t> extent = sizes_from(total, 0);
  check_fusion_tables(origins, rows, weights, origins.dim() > 0 ? origins.size(0) : 0, total.dim());
  check_fusion_total(total, extent, total);
  check_fusion_ring(total, "total", extent, ring_axis, start, stop);
  const torch::stable::accelerator::DeviceGuard guard(total.get_device_index());
  Plan plan(total, origins, rows, weights, std::nullopt, extent, 1);
  plan.set_ring(ring_axis, start, stop);
  plan.q.target = total.mutable_data_ptr();
  check_launch(overlap_add_weights(plan.q, current_stream(total)), "overlap_weights_");
}

Tensor backward(const Tensor& grad, const Tensor& origins, const Tensor& rows,
                std::vector<Tensor> weights, const std::optional<Tensor>& total,
                const std::optional<Tensor>& patches, int64_t activation) {
  check_fusion_dtype(grad, "grad");
  STD_TORCH_CHECK(grad.dim() >= 2, "grad: got shape ", shape_of(grad), ", expected (C, *volume)");
  const std::vector<int64_t> extent = sizes_from(grad, 1);
  const int64_t axes = static_cast<int64_t>(extent.size());
  check_fusion_tables(origins, rows, weights, origins.dim() > 0 ? origins.size(0) : 0, axes);
  check_fusion_total(total, extent, grad);
  check_fusion_activated(patches, activation, grad, weights, origins.size(0));
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  Plan plan(grad, origins, rows, weights, total, extent, grad.size(0));
  std::vector<int64_t> shape{origins.size(0), grad.size(0)};
  for (const int64_t size : patch_shape_of(weights, axes)) shape.push_back(size);
  const Tensor source = torch::stable::contiguous(grad);
  Tensor activated;
  if (activation != 0) {
    activated = torch::stable::contiguous(*patches);
    plan.q.activation = static_cast<int>(activation);
    plan.q.activated = activated.const_data_ptr();
  }
  Tensor result = torch::stable::new_empty(grad, shape);
  plan.q.type = element_of(grad, "grad");
  plan.q.source = source.const_data_ptr();
  plan.q.target = result.mutable_data_ptr();
  check_launch(overlap_add_backward(plan.q, current_stream(grad)), "overlap_add_backward");
  return result;
}

}  // namespace
}  // namespace voxfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CUDA, m) {
  m.impl("overlap_add", TORCH_BOX(&voxfuse::cuda::add));
  m.impl("overlap_add_backward", TORCH_BOX(&voxfuse::cuda::backward));
  m.impl("overlap_add_", TORCH_BOX(&voxfuse::cuda::add_to_ring));
  m.impl("overlap_weights_", TORCH_BOX(&voxfuse::cuda::add_weights));
}
