// What the CPU operators around the soft-confusion kernels share: tensors as pointers and strides,
// the division of the voxels, the complaint about a label.
#pragma once

#include <algorithm>

#include "cpu/soft_confusion.h"
#include "ops/tensor.h"

namespace voxfuse {

// A tensor with collapsible strides, and those strides: the tensor itself or, at the price of one
// copy, a contiguous one.
struct View {
  Tensor tensor;
  Strides strides;
};

inline View view_of(const Tensor& tensor, bool has_channel) {
  if (const auto strides = strides_of(tensor, has_channel)) return {tensor, *strides};
  const Tensor copy = torch::stable::contiguous(tensor);
  return {copy, *strides_of(copy, has_channel)};
}

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

// Finds the first label that no class has, and raises. Only called when a kernel met one.
[[noreturn]] void raise_wrong_label(const Confusion& q, const Tensor& target);

}  // namespace voxfuse
