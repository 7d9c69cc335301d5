// Finalisation on the CPU: the slab's voxels handed to threads in chunks.
#include "ops/finalize_slab.h"

#include <algorithm>

#include "cpu/dispatch.h"

VOXFUSE_DECLARE_KERNEL(void, finalize_chunks(const Slab& q, int64_t first_task, int64_t last_task))

namespace voxfuse {
namespace {

void finalize_slab(const Tensor& ring, const Tensor& out, const std::optional<Tensor>& total,
                   const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                   int64_t ring_axis, int64_t start, int64_t stop, int64_t activation, bool applied,
                   int64_t mode, double divisor, double threshold, double fill, bool clear) {
  SlabPlan plan(ring, out, total, weight, bias, ring_axis, start, stop, activation, applied, mode,
                divisor, threshold, fill, clear);
  Slab& q = plan.q;
  if (q.voxels == 0) return;
  // A chunk of all channels fits the second-level cache.
  const int64_t element = q.is_double ? 8 : 4;
  q.chunk =
      std::clamp<int64_t>(256 * 1024 / (element * (q.channels + q.classes)) / 64 * 64, 64, 2048);
  const int64_t tasks = q.outer * ((q.voxels + q.chunk - 1) / q.chunk);
  const int64_t grain = std::max<int64_t>(32768 / (q.chunk * q.channels), 1);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
    VOXFUSE_DISPATCH(finalize_chunks, q, first, last);
  });
}

}  // namespace
}  // namespace voxfuse

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CPU, m) {
  m.impl("finalize_slab", TORCH_BOX(&voxfuse::finalize_slab));
}
