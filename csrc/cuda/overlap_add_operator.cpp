// The patch fusion operators on the GPU. The kernels know nothing of PyTorch.
#include "cuda/operator.h"
#include "cuda/overlap_add.h"
#include "ops/overlap_add.h"

namespace voxfuse::cuda {
namespace {

/// The GPU's plan: the tables as they are, a workspace for softmaxes of many channels.
class Plan : public FusionPlan<Fusion> {
 public:
  Plan(const Tensor& partner, const Tensor& origins, const Tensor& rows,
       const std::vector<Tensor>& weights, const std::optional<Tensor>& total,
       const std::vector<int64_t>& extent, int64_t channels, Ring ring)
      : FusionPlan(partner, origins, weights, total, extent, channels, ring) {
    q.origins = static_cast<const int64_t*>(keep(origins, "origins").const_data_ptr());
    q.rows = static_cast<const int64_t*>(keep(rows, "rows").const_data_ptr());
    for (size_t k = 0; k < weights.size(); ++k) {
      const Tensor& table = keep(weights[k], "weights");
      const int axis = q.separable ? lead_ + static_cast<int>(k) : 0;
      q.weights[axis] = static_cast<const double*>(table.const_data_ptr());
      q.row_count[axis] = table.size(0);
    }
  }

  void forward(const Tensor&) {
    take_workspace();
    start(overlap_add_forward, "overlap_add");
  }

  void add() {
    take_workspace();
    start(overlap_add_ring, "overlap_add_");
  }

  void add_weights() { start(overlap_add_weights, "overlap_weights_"); }

  void backward(const Tensor&) { start(overlap_add_backward, "overlap_add_backward"); }

 private:
  void take_workspace() {
    const int64_t numbers = softmax_workspace(q);
    if (numbers == 0) return;
    tensors_.push_back(
        torch::stable::new_empty(partner_, {numbers}, accumulation_type(partner_.scalar_type())));
    q.softmax = tensors_.back().mutable_data_ptr();
  }

  void start(cudaError_t (*kernel)(const Fusion&, cudaStream_t), const char* name) {
    const torch::stable::accelerator::DeviceGuard guard(partner_.get_device_index());
    check_launch(kernel(q, current_stream(partner_)), name);
  }
};

}  // namespace
}  // namespace voxfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CUDA, m) {
  using voxfuse::cuda::Plan;
  m.impl("overlap_add", TORCH_BOX(&voxfuse::overlap_add_on<Plan>));
  m.impl("overlap_add_backward", TORCH_BOX(&voxfuse::overlap_add_backward_on<Plan>));
  m.impl("overlap_add_", TORCH_BOX(&voxfuse::overlap_add_to_ring_on<Plan>));
  m.impl("overlap_weights_", TORCH_BOX(&voxfuse::overlap_weights_on<Plan>));
}
