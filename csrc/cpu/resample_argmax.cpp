// Resampling on the CPU: target rows handed to threads.
#include "ops/resample_argmax.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/memory.h"

VOXFUSE_DECLARE_KERNEL(void,
                       resample_rows(const Resampling& q, int64_t first_row, int64_t last_row))

namespace voxfuse {
namespace {

void check_indices(const Resampling& q) {
  for (int a = 0; a < 3; ++a) {
    if (q.index[a] == nullptr) continue;
    for (int64_t k = 0; k < q.target[a]; ++k) {
      const bool upper = q.weight[a][q.target[a] + k] != 0;
      STD_TORCH_CHECK(q.index[a][k] >= 0 && q.index[a][k] + upper < q.source[a], "index: got ",
                      q.index[a][k], ", outside of the ", q.source[a], " voxels of the input");
    }
  }
}

void resample_argmax(const Tensor& out, const Tensor& input, const std::vector<Tensor>& index,
                     const std::vector<Tensor>& weight, int64_t kept, double least,
                     const std::vector<int64_t>& regions, bool round_to_half) {
  ResamplingPlan plan(out, input, index, weight, kept, least, regions, round_to_half);
  const Resampling& q = plan.q;
  if (out.numel() == 0) return;
  check_indices(q);
  advise_huge_pages(q.out, out.numel() * bytes_of(q.out_type));
  // Rows of a task follow one another, so that source rows are interpolated once.
  const int64_t grain = std::max<int64_t>(1048576 / (q.target[2] * q.channels), 1);
  torch::stable::parallel_for(
      0, q.target[0] * q.target[1], grain,
      [&](int64_t first, int64_t last) { VOXFUSE_DISPATCH(resample_rows, q, first, last); });
}

}  // namespace
}  // namespace voxfuse

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CPU, m) {
  m.impl("resample_argmax", TORCH_BOX(&voxfuse::resample_argmax));
}
