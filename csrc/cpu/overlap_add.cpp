// Patch fusion on the CPU: tensors to pointers, patches sorted to the slices that they cover, tiles
// of the result handed to threads.
#include "cpu/overlap_add.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "ops/overlap_add.h"

VOXFUSE_DECLARE_KERNEL(void,
                       overlap_forward(const Fusion& q, int64_t first_task, int64_t last_task))
VOXFUSE_DECLARE_KERNEL(void,
                       overlap_backward(const Fusion& q, int64_t first_task, int64_t last_task))
VOXFUSE_DECLARE_KERNEL(void,
                       overlap_weights(const Fusion& q, int64_t first_task, int64_t last_task))

namespace voxfuse {
namespace {

// The part of a ring's coordinates that it holds; axis -1 stands for a plain volume.
struct Ring {
  int64_t axis = -1, start = 0, stop = 0;
};

// A Fusion and the memory that its pointers refer to.
class Plan {
 public:
  Fusion q{};

  Plan(const Tensor& origins, const Tensor& rows, const std::vector<Tensor>& weights,
       const std::optional<Tensor>& total, const std::vector<int64_t>& extent, int64_t channels,
       bool is_double, Ring ring) {
    const int axes = static_cast<int>(extent.size());
    const int lead = 3 - axes;  // axes of extent 1 in front
    const std::vector<int64_t> patch = patch_shape_of(weights, axes);
    q.patches = origins.size(0);
    q.channels = channels;
    q.ring_axis = ring.axis < 0 ? -1 : lead + static_cast<int>(ring.axis);
    for (int axis = 0; axis < 3; ++axis) {
      q.patch[axis] = axis < lead ? 1 : patch[axis - lead];
      q.extent[axis] = axis < lead ? 1 : extent[axis - lead];
      q.begin[axis] = axis == q.ring_axis ? ring.start : 0;
      q.end[axis] = axis == q.ring_axis ? ring.stop : q.extent[axis];
    }
    take_weights(weights, axes, is_double);
    take_tables(origins, rows, weights, axes);
    if (total) {
      total_ = torch::stable::contiguous(*total);
      q.total = static_cast<const double*>(total_.const_data_ptr());
    }
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Products below `floor` count as `floor`; see Fusion.
  void take_cover(const std::vector<Tensor>& cover, double floor) {
    const int lead = 3 - static_cast<int>(cover.size());
    q.floor = floor;
    for (int axis = 0; axis < 3 && !cover.empty(); ++axis) {
      q.cover[axis] = &one_;
      q.covers[axis] = q.cover_extent[axis] = 1;
      if (axis < lead) continue;
      tensors_.push_back(torch::stable::contiguous(cover[axis - lead]));
      const Tensor& table = tensors_.back();
      q.cover[axis] = static_cast<const double*>(table.const_data_ptr());
      q.covers[axis] = table.size(0);
      q.cover_extent[axis] = table.size(1);
    }
  }

  // Sorts the patches to slices and divides the result into tasks; returns their number. With
  // `whole` every voxel of the result belongs to a task, else only those near a patch.
  int64_t tile(bool whole, int64_t element_size) {
    bool any = false;
    for (int axis = 0; axis < 3; ++axis) {
      q.low[axis] = whole ? q.begin[axis] : q.end[axis];
      q.high[axis] = whole ? q.end[axis] : q.begin[axis];
    }
    const int64_t slices = std::max<int64_t>(q.end[0] - q.begin[0], 0);
    first_of_slice_.assign(slices + 1, 0);
    const auto covered = [&](int64_t i, auto&& visit) {
      int64_t first[3], last[3];
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t origin = q.origins[3 * i + axis];
        first[axis] = std::max(origin, q.begin[axis]);
        last[axis] = std::min(origin + q.patch[axis], q.end[axis]);
        if (first[axis] >= last[axis]) return;
      }
      visit(first, last);
    };
    for (int64_t i = 0; i < q.patches; ++i) {
      covered(i, [&](const int64_t* first, const int64_t* last) {
        any = true;
        for (int axis = 0; axis < 3 && !whole; ++axis) {
          q.low[axis] = std::min(q.low[axis], first[axis]);
          q.high[axis] = std::max(q.high[axis], last[axis]);
        }
        for (int64_t z = first[0]; z < last[0]; ++z) ++first_of_slice_[z - q.begin[0] + 1];
      });
    }
    for (int64_t z = 0; z < slices; ++z) first_of_slice_[z + 1] += first_of_slice_[z];
    over_slice_.resize(first_of_slice_[slices]);
    std::vector<int64_t> next(first_of_slice_);
    for (int64_t i = 0; i < q.patches; ++i) {
      covered(i, [&](const int64_t* first, const int64_t* last) {
        for (int64_t z = first[0]; z < last[0]; ++z) {
          over_slice_[next[z - q.begin[0]]++] = static_cast<int32_t>(i);
        }
      });
    }
    q.first_of_slice = first_of_slice_.data();
    q.over_slice = over_slice_.data();
    if (!whole && !any) return 0;

    // A tile of one channel stays in the first-level cache; where weights are divided by their sum,
    // all channels share the division.
    const int64_t width = q.high[2] - q.low[2], height = q.high[1] - q.low[1];
    const int64_t depth = q.high[0] - q.low[0];
    if (width <= 0 || height <= 0 || depth <= 0 || q.channels == 0) return 0;
    const bool share = q.total != nullptr || q.cover[0] != nullptr;
    q.task_columns = std::min<int64_t>(width, 16384);
    q.task_channels = share ? q.channels : 1;
    if (q.activation != 0) {
      // All channels are activated together.
      constexpr int64_t kTogether = 256 * 1024;
      const int64_t voxels = kTogether / (q.channels * element_size);
      q.task_channels = q.channels;
      q.task_columns = std::min(std::max<int64_t>(voxels, 64), q.task_columns);
      q.task_rows = std::clamp<int64_t>(voxels / q.task_columns, 1, height);
      return depth * blocks(height, q.task_rows) * blocks(width, q.task_columns);
    }
    const int64_t budget = (share ? 64 : 32) * 1024;
    q.task_rows = std::clamp<int64_t>(budget / (q.task_columns * element_size), 1, height);
    return blocks(q.channels, q.task_channels) * depth * blocks(height, q.task_rows) *
           blocks(width, q.task_columns);
  }

 private:
  void take_weights(const std::vector<Tensor>& weights, int axes, bool is_double) {
    const int lead = 3 - axes;
    q.separable = weights_are_separable(weights, axes);
    for (int axis = 0; axis < 3; ++axis) {
      q.exact[axis] = q.rounded[axis] =
          is_double ? static_cast<const void*>(&one_) : static_cast<const void*>(&one_float_);
      q.exact[axis] = &one_;
    }
    tensors_.reserve(weights.size());
    for (size_t k = 0; k < weights.size(); ++k) {
      tensors_.push_back(torch::stable::contiguous(weights[k]));
      const Tensor& table = tensors_.back();
      const int axis = q.separable ? lead + static_cast<int>(k) : 0;
      const double* values = static_cast<const double*>(table.const_data_ptr());
      q.exact[axis] = values;
      if (is_double) {
        q.rounded[axis] = values;
      } else {
        rounded_[axis].assign(values, values + table.numel());
        q.rounded[axis] = rounded_[axis].data();
      }
    }
  }

  void take_tables(const Tensor& origins, const Tensor& rows, const std::vector<Tensor>& weights,
                   int axes) {
    const int lead = 3 - axes;
    const Tensor dense_origins = torch::stable::contiguous(origins);
    const Tensor dense_rows = torch::stable::contiguous(rows);
    const int64_t* from = static_cast<const int64_t*>(dense_origins.const_data_ptr());
    const int64_t* row = static_cast<const int64_t*>(dense_rows.const_data_ptr());
    origins_.assign(3 * q.patches, 0);
    rows_.assign(3 * q.patches, 0);
    for (int64_t i = 0; i < q.patches; ++i) {
      for (int axis = 0; axis < axes; ++axis) {
        const int64_t k = q.separable ? row[i * axes + axis] : 0;
        if (q.separable) {
          const int64_t count = weights[axis].size(0);
          STD_TORCH_CHECK(k >= 0 && k < count, "rows: ", k, " on axis ", axis, " is outside [0, ",
                          count, "), the rows of weights[", axis, "]");
        }
        rows_[3 * i + lead + axis] = k;
        // However far outside a patch lies, its coordinates must not overflow.
        origins_[3 * i + lead + axis] =
            std::clamp(from[i * axes + axis], q.begin[lead + axis] - q.patch[lead + axis],
                       std::max(q.end[lead + axis], q.begin[lead + axis]));
      }
    }
    q.origins = origins_.data();
    q.rows = rows_.data();
  }

  const double one_ = 1.0;
  const float one_float_ = 1.0f;
  std::vector<Tensor> tensors_;
  std::vector<float> rounded_[3];
  Tensor total_;
  std::vector<int64_t> origins_, rows_, first_of_slice_;
  std::vector<int32_t> over_slice_;
};

std::vector<int64_t> sizes_from(const Tensor& tensor, int64_t first) {
  std::vector<int64_t> sizes;
  for (int64_t axis = first; axis < tensor.dim(); ++axis) sizes.push_back(tensor.size(axis));
  return sizes;
}

// Runs tasks [0, tasks) in parallel, each thread with enough of them to be worth waking: `work` is
// the number of values that all tasks together read. Tasks are the same whatever the threads.
template <class F>
void run(int64_t tasks, int64_t work, F&& f) {
  constexpr int64_t kWorkEach = 32768;
  const int64_t grain = std::max<int64_t>(tasks * kWorkEach / std::max<int64_t>(work, 1), 1);
  torch::stable::parallel_for(0, tasks, grain, std::forward<F>(f));
}

int64_t work_of(const Fusion& q) {
  const int64_t read = q.patches * q.patch[0] * q.patch[1] * q.patch[2];
  const int64_t written = q.accumulate ? 0 : q.extent[0] * q.extent[1] * q.extent[2];
  return (read + written) * std::max<int64_t>(q.channels, 1);
}

void run_forward(const Fusion& q, int64_t tasks) {
  run(tasks, work_of(q),
      [&](int64_t first, int64_t last) { VOXFUSE_DISPATCH(overlap_forward, q, first, last); });
}

Tensor overlap_add(const Tensor& patches, const Tensor& origins, const Tensor& rows,
                   std::vector<Tensor> weights, const std::optional<Tensor>& total,
                   std::vector<int64_t> volume_shape, int64_t activation) {
  const int64_t axes = static_cast<int64_t>(volume_shape.size());
  STD_TORCH_CHECK(patches.dim() >= 1, "patches: got shape ", shape_of(patches));
  check_fusion_tables(origins, rows, weights, patches.size(0), axes);
  check_fusion_patches(patches, weights, axes);
  check_fusion_total(total, volume_shape, patches);
  check_fusion_activation(activation);
  std::vector<int64_t> shape{patches.size(1)};
  for (const int64_t size : volume_shape) {
    STD_TORCH_CHECK(size >= 0, "volume_shape: got ", shape_of(volume_shape),
                    ", expected sizes >= 0");
    shape.push_back(size);
  }
  const bool is_double = patches.scalar_type() == ScalarType::Double;
  Plan plan(origins, rows, weights, total, volume_shape, patches.size(1), is_double, {});
  const Tensor source = torch::stable::contiguous(patches);
  Tensor result = torch::stable::new_empty(patches, shape);
  advise_huge_pages(result.mutable_data_ptr(), result.numel() * result.element_size());
  plan.q.type = element_of(patches, "patches");
  plan.q.source = source.const_data_ptr();
  plan.q.target = result.mutable_data_ptr();
  plan.q.activation = static_cast<int>(activation);
  run_forward(plan.q, plan.tile(true, is_double ? 8 : 4));
  return result;
}

void overlap_add_(const Tensor& ring, const Tensor& patches, const Tensor& origins,
                  const Tensor& rows, std::vector<Tensor> weights,
                  const std::optional<Tensor>& total, int64_t ring_axis, int64_t start,
                  int64_t stop, int64_t flip, double floor, int64_t activation) {
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
  check_fusion_activation(activation);
  STD_TORCH_CHECK(ring.scalar_type() == accumulation_type(patches.scalar_type()), "ring: got ",
                  torch::headeronly::toString(ring.scalar_type()), ", expected ",
                  torch::headeronly::toString(accumulation_type(patches.scalar_type())));
  const bool is_double = patches.scalar_type() == ScalarType::Double;
  Plan plan(origins, rows, weights, total, extent, ring.size(0), is_double,
            {ring_axis, start, stop});
  plan.take_cover(cover, floor);
  const Tensor source = torch::stable::contiguous(patches);
  plan.q.type = element_of(patches, "patches");
  plan.q.source = source.const_data_ptr();
  plan.q.target = ring.mutable_data_ptr();
  plan.q.flip = static_cast<int>(flip << (3 - axes));
  plan.q.activation = static_cast<int>(activation);
  plan.q.accumulate = true;
  run_forward(plan.q, plan.tile(false, is_double ? 8 : 4));
}

void overlap_weights_(const Tensor& total, const Tensor& origins, const Tensor& rows,
                      std::vector<Tensor> weights, int64_t ring_axis, int64_t start, int64_t stop) {
  const std::vector<int64_t> extent = sizes_from(total, 0);
  check_fusion_tables(origins, rows, weights, origins.dim() > 0 ? origins.size(0) : 0, total.dim());
  check_fusion_total(total, extent, total);
  check_fusion_ring(total, "total", extent, ring_axis, start, stop);
  Plan plan(origins, rows, weights, std::nullopt, extent, 1, true, {ring_axis, start, stop});
  plan.q.target = total.mutable_data_ptr();
  plan.q.accumulate = true;
  const int64_t tasks = plan.tile(false, 8);
  run(tasks, work_of(plan.q),
      [&](int64_t first, int64_t last) { VOXFUSE_DISPATCH(overlap_weights, plan.q, first, last); });
}

Tensor overlap_add_backward(const Tensor& grad, const Tensor& origins, const Tensor& rows,
                            std::vector<Tensor> weights, const std::optional<Tensor>& total,
                            const std::optional<Tensor>& patches, int64_t activation) {
  check_fusion_dtype(grad, "grad");
  STD_TORCH_CHECK(grad.dim() >= 2, "grad: got shape ", shape_of(grad), ", expected (C, *volume)");
  const std::vector<int64_t> extent = sizes_from(grad, 1);
  const int64_t axes = static_cast<int64_t>(extent.size());
  check_fusion_tables(origins, rows, weights, origins.dim() > 0 ? origins.size(0) : 0, axes);
  check_fusion_total(total, extent, grad);
  check_fusion_activated(patches, activation, grad, weights, origins.size(0));
  std::vector<int64_t> shape{origins.size(0), grad.size(0)};
  for (const int64_t size : patch_shape_of(weights, axes)) shape.push_back(size);
  const bool is_double = grad.scalar_type() == ScalarType::Double;
  Plan plan(origins, rows, weights, total, extent, grad.size(0), is_double, {});
  const Tensor source = torch::stable::contiguous(grad);
  Tensor activated;
  if (activation != 0) {
    activated = torch::stable::contiguous(*patches);
    plan.q.activation = static_cast<int>(activation);
    plan.q.activated = activated.const_data_ptr();
  }
  Tensor result = torch::stable::new_empty(grad, shape);
  advise_huge_pages(result.mutable_data_ptr(), result.numel() * result.element_size());
  plan.q.type = element_of(grad, "grad");
  plan.q.source = source.const_data_ptr();
  plan.q.target = result.mutable_data_ptr();
  const int64_t tasks = plan.q.patches * plan.q.patch[0];
  run(tasks, work_of(plan.q), [&](int64_t first, int64_t last) {
    VOXFUSE_DISPATCH(overlap_backward, plan.q, first, last);
  });
  return result;
}

}  // namespace
}  // namespace voxfuse

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CPU, m) {
  m.impl("overlap_add", TORCH_BOX(&voxfuse::overlap_add));
  m.impl("overlap_add_backward", TORCH_BOX(&voxfuse::overlap_add_backward));
  m.impl("overlap_add_", TORCH_BOX(&voxfuse::overlap_add_));
  m.impl("overlap_weights_", TORCH_BOX(&voxfuse::overlap_weights_));
}
