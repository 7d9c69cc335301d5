// Patch fusion on the CPU: tensors to pointers, patches sorted to the slices that they cover, tiles
// of the result handed to threads.
#include "cpu/overlap_add.h"

#include <algorithm>
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

// The CPU's plan: tables of three axes, weights in the accumulation type, tiles.
class Plan : public FusionPlan<Fusion> {
 public:
  Plan(const Tensor& partner, const Tensor& origins, const Tensor& rows,
       const std::vector<Tensor>& weights, const std::optional<Tensor>& total,
       const std::vector<int64_t>& extent, int64_t channels, Ring ring)
      : FusionPlan(partner, origins, weights, total, extent, channels, ring),
        is_double_(partner.scalar_type() == ScalarType::Double) {
    take_weights(weights);
    take_tables(origins, rows, weights);
  }

  void forward(const Tensor& result) {
    advise_huge_pages(q.target, result.numel() * result.element_size());
    run_forward(true);
  }

  void add() {
    q.accumulate = true;
    run_forward(false);
  }

  void add_weights() {
    q.accumulate = true;
    const int64_t tasks = tile(false);
    run(tasks,
        [&](int64_t first, int64_t last) { VOXFUSE_DISPATCH(overlap_weights, q, first, last); });
  }

  void backward(const Tensor& result) {
    advise_huge_pages(q.target, result.numel() * result.element_size());
    run(q.patches * q.patch[0],
        [&](int64_t first, int64_t last) { VOXFUSE_DISPATCH(overlap_backward, q, first, last); });
  }

 private:
  void run_forward(bool whole) {
    const int64_t tasks = tile(whole);
    run(tasks,
        [&](int64_t first, int64_t last) { VOXFUSE_DISPATCH(overlap_forward, q, first, last); });
  }

  // Runs tasks [0, tasks) in parallel, each thread with enough of them to be worth waking. Tasks
  // are the same whatever the threads.
  template <class F>
  void run(int64_t tasks, F&& f) {
    constexpr int64_t kWorkEach = 32768;
    const int64_t read = q.patches * q.patch[0] * q.patch[1] * q.patch[2];
    const int64_t written = q.accumulate ? 0 : q.extent[0] * q.extent[1] * q.extent[2];
    const int64_t work = (read + written) * std::max<int64_t>(q.channels, 1);
    const int64_t grain = std::max<int64_t>(tasks * kWorkEach / std::max<int64_t>(work, 1), 1);
    torch::stable::parallel_for(0, tasks, grain, std::forward<F>(f));
  }

  // Sorts the patches to slices and divides the result into tasks; returns their number. With
  // `whole` every voxel of the result belongs to a task, else only those near a patch.
  int64_t tile(bool whole) {
    const int64_t element_size = is_double_ ? 8 : 4;
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
    const bool share = q.total != nullptr || q.floor > 0;
    q.task_columns = std::min<int64_t>(width, 16384);
    q.task_channels = share ? q.channels : 1;
    if (q.activation != Activation::none) {
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

  void take_weights(const std::vector<Tensor>& weights) {
    for (int axis = 0; axis < 3; ++axis) {
      q.weights[axis] = q.cover[axis] = &one_;
      q.rounded[axis] =
          is_double_ ? static_cast<const void*>(&one_) : static_cast<const void*>(&one_float_);
    }
    for (size_t k = 0; k < weights.size(); ++k) {
      const Tensor& table = keep(weights[k], "weights");
      const int axis = q.separable ? lead_ + static_cast<int>(k) : 0;
      const double* values = static_cast<const double*>(table.const_data_ptr());
      q.weights[axis] = values;
      q.row_count[axis] = table.size(0);
      if (is_double_) {
        q.rounded[axis] = values;
      } else {
        rounded_[axis].assign(values, values + table.numel());
        q.rounded[axis] = rounded_[axis].data();
      }
    }
  }

  void take_tables(const Tensor& origins, const Tensor& rows, const std::vector<Tensor>& weights) {
    const int axes = q.axes;
    const int64_t* from = static_cast<const int64_t*>(keep(origins, "origins").const_data_ptr());
    const int64_t* row = static_cast<const int64_t*>(keep(rows, "rows").const_data_ptr());
    origins_.assign(3 * q.patches, 0);
    rows_.assign(3 * q.patches, 0);
    for (int64_t i = 0; i < q.patches; ++i) {
      for (int axis = 0; axis < axes; ++axis) {
        const int64_t k = q.separable ? row[i * axes + axis] : 0;
        if (q.separable) {
          const int64_t count = weights[axis].size(0);
          VOXFUSE_CHECK_VALUE(k >= 0 && k < count, "rows: ", k, " on axis ", axis,
                              " is outside [0, ", count, "), the rows of weights[", axis, "]");
        }
        rows_[3 * i + lead_ + axis] = k;
        // However far outside a patch lies, its coordinates must not overflow.
        origins_[3 * i + lead_ + axis] =
            std::clamp(from[i * axes + axis], q.begin[lead_ + axis] - q.patch[lead_ + axis],
                       std::max(q.end[lead_ + axis], q.begin[lead_ + axis]));
      }
    }
    q.axes = 3;
    q.origins = origins_.data();
    q.rows = rows_.data();
  }

  const bool is_double_;  // the accumulation
  const double one_ = 1.0;
  const float one_float_ = 1.0f;
  std::vector<float> rounded_[3];
  std::vector<int64_t> origins_, rows_, first_of_slice_;
  std::vector<int32_t> over_slice_;
};

}  // namespace
}  // namespace voxfuse

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CPU, m) {
  using voxfuse::Plan;
  m.impl("overlap_add", TORCH_BOX(&voxfuse::overlap_add_on<Plan>));
  m.impl("overlap_add_backward", TORCH_BOX(&voxfuse::overlap_add_backward_on<Plan>));
  m.impl("overlap_add_", TORCH_BOX(&voxfuse::overlap_add_to_ring_on<Plan>));
  m.impl("overlap_weights_", TORCH_BOX(&voxfuse::overlap_weights_on<Plan>));
}
