// What the CPU operators around the soft-confusion kernels share: the division of the voxels, and
// the complaint about a label.
#pragma once

#include <algorithm>
#include <atomic>

#include "cpu/soft_confusion.h"
#include "ops/tensor.h"

namespace voxfuse {

// Fixed division of a sample's voxels into at most `most` ranges of whole chunks: it depends on the
// shape alone.
struct Ranges {
  int64_t count, voxels;
  Ranges(int64_t all, int64_t chunk, int64_t most) {
    const int64_t chunks = std::max<int64_t>((all + chunk - 1) / chunk, 1);
    const int64_t chunks_each = (chunks + most - 1) / most;
    voxels = chunks_each * chunk;
    count = (chunks + chunks_each - 1) / chunks_each;
  }
};

// Finds the first label that no class has, or value outside [0, 1], and raises. Only called when a
// kernel met one.
[[noreturn]] void raise_wrong_label(const SoftConfusion& q, const Tensor& target);

// Raises if a sample lacks a class that it needs.
void check_annotated_classes(const SoftConfusion& q);

// Runs kernel(b, begin, end, task) for every range of every sample; raises if one has met a label
// that no class has.
template <class Kernel>
void run_ranges(const SoftConfusion& q, const Tensor& target, const Ranges& ranges, Kernel kernel) {
  if (q.annotated != nullptr) check_annotated_classes(q);
  std::atomic<bool> wrong{false};
  torch::stable::parallel_for(0, q.batch * ranges.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last && !wrong.load(std::memory_order_relaxed); ++task) {
      const int64_t begin = task % ranges.count * ranges.voxels;
      const int64_t end = std::min(begin + ranges.voxels, q.voxels);
      if (kernel(task / ranges.count, begin, end, task)) {
        wrong.store(true, std::memory_order_relaxed);
      }
    }
  });
  if (wrong) raise_wrong_label(q, target);
}

// Adds the ranges' rows of sums in order: out (batch, rows) from partial (batch, ranges, rows).
inline void add_ranges(const double* partial, int64_t batch, int64_t ranges, int64_t rows,
                       double* out) {
  std::fill(out, out + batch * rows, 0.0);
  for (int64_t task = 0; task < batch * ranges; ++task) {
    double* row = out + task / ranges * rows;
    for (int64_t i = 0; i < rows; ++i) row[i] += partial[task * rows + i];
  }
}

}  // namespace voxfuse
