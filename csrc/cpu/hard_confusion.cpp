// hard_confusion on the CPU: tensors to pointers, the voxels divided into ranges, whose counts are
// whole numbers: in which order they are added does not matter.
#include "ops/hard_confusion.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/soft_confusion_host.h"

VOXFUSE_DECLARE_KERNEL(bool, hard_confusion(const HardConfusion& q, int64_t b, int64_t begin,
                                            int64_t end, int64_t* counts))

namespace voxfuse {
namespace {

// Voxels of a task.
constexpr int64_t kRange = 1 << 15;

Tensor hard_confusion(const Tensor& input, const Tensor& target, const std::optional<Tensor>& mask,
                      int64_t decision, double least, const std::optional<int64_t>& num_classes,
                      const std::optional<int64_t>& ignore_index) {
  const HardArguments a(input, target, mask, decision, least, num_classes, ignore_index);
  const HardConfusion& q = a.problem;
  Tensor result = torch::stable::new_empty(input, {q.batch, q.classes, 4}, ScalarType::Long);
  int64_t* counts = static_cast<int64_t*>(result.mutable_data_ptr());
  std::fill(counts, counts + result.numel(), 0);

  const int64_t ranges = (q.voxels + kRange - 1) / kRange;
  std::atomic<bool> wrong{false};
  torch::stable::parallel_for(0, q.batch * ranges, 1, [&](int64_t first, int64_t last) {
    std::vector<int64_t> own(q.classes * 4);
    for (int64_t task = first; task < last && !wrong.load(std::memory_order_relaxed); ++task) {
      const int64_t b = task / ranges, begin = task % ranges * kRange;
      const int64_t end = std::min(begin + kRange, q.voxels);
      if (VOXFUSE_DISPATCH(hard_confusion, q, b, begin, end, own.data())) {
        wrong.store(true, std::memory_order_relaxed);
      }
      int64_t* sums = counts + b * q.classes * 4;
      for (int64_t i = 0; i < q.classes * 4; ++i) {
        std::atomic_ref<int64_t>(sums[i]).fetch_add(own[i], std::memory_order_relaxed);
      }
    }
  });
  VOXFUSE_CHECK_VALUE(!wrong, "target or input: a label is outside [0, ", q.classes,
                      ") or no integer, or a target with a value a class neither 0 nor 1");

  for (int64_t i = 0; i < q.batch * q.classes; ++i) {
    int64_t* row = counts + 4 * i;
    const int64_t both = row[0], predicted = row[1], truths = row[2], all = row[3];
    row[Count::FP] = predicted - both;
    row[Count::FN] = truths - both;
    row[Count::TN] = all - predicted - truths + both;
  }
  return result;
}

}  // namespace
}  // namespace voxfuse

STABLE_TORCH_LIBRARY_IMPL(voxfuse, CPU, m) {
  m.impl("hard_confusion", TORCH_BOX(&voxfuse::hard_confusion));
}
