// The problem of hard_confusion as kernels see it, on the CPU and on the GPU, free of any tensor
// library.
#pragma once

#include <cstdint>

#include "contract/soft_confusion.h"

namespace voxfuse {

struct HardConfusion {
  int64_t batch = 0, classes = 0, voxels = 0;
  Decision decision = Decision::argmax;
  View input;   // logits, or predicted labels
  View target;  // labels; or, if dense, 0 or 1 a class
  View mask;    // a voxel counts where it is not 0; without data all do
  bool dense = false;
  float least = 0;  // of Decision::threshold: a logit at or above it is a prediction
  bool has_ignore = false;
  int64_t ignore_index = 0;
};

// Columns of the result, (batch, classes, 4).
struct Count {
  enum Column : int { TP, FP, FN, TN };
};

}  // namespace voxfuse
