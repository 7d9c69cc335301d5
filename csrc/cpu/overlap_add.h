// What the patch fusion's CPU kernels know beside the problem. Tables are those of three axes, and
// origins do not lie further outside than a patch reaches.
#pragma once

#include "contract/overlap_add.h"

namespace voxfuse {

struct Fusion : FusionProblem<int64_t> {
  const void* rounded[3] = {};  // the weights in the accumulation type
  bool accumulate = false;      // forward: add to what `target` holds, of the accumulation type

  // Forward: patches over slice z (from begin[0] on), ascending: those in
  // [first_of_slice[z], first_of_slice[z + 1]) of `over_slice`.
  const int64_t* first_of_slice = nullptr;
  const int32_t* over_slice = nullptr;

  // Forward: one task is a block of channels x one slice x rows x columns of the box [low, high).
  int64_t low[3], high[3];
  int64_t task_channels, task_rows, task_columns;
};

inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

}  // namespace voxfuse
