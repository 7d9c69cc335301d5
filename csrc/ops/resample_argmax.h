// The resampling from tensors to a Resampling, the same for every device. What is checked here
// keeps memory safe for callers that reach the operator directly; the rest is the Python wrapper's.
#pragma once

#include <vector>

#include "contract/resample_argmax.h"
#include "ops/tensor.h"

namespace voxfuse {

/// A Resampling and the tensors that its pointers point into.
struct ResamplingPlan {
  Resampling q{};
  std::vector<Tensor> tables;
  std::vector<int64_t> labels;

  ResamplingPlan(const Tensor& out, const Tensor& input, const std::vector<Tensor>& index,
                 const std::vector<Tensor>& weight, int64_t kept, double least,
                 const std::vector<int64_t>& regions, bool round_to_half)
      : labels(regions) {
    const int64_t axes = input.dim() - 1;
    STD_TORCH_CHECK(axes >= 1 && axes <= 3 && input.size(0) >= 1, "input: got shape ",
                    shape_of(input), ", expected (C, *spatial) with 1 to 3 axes, C >= 1");
    STD_TORCH_CHECK(kept >= 0 && kept <= 3, "kept: got ", kept, ", expected 0 to 3");
    STD_TORCH_CHECK(
        static_cast<int64_t>(index.size()) == axes && static_cast<int64_t>(weight.size()) == axes,
        "index, weight: got ", index.size(), " and ", weight.size(), ", expected ", axes);
    q.kept = static_cast<Resampled>(kept);
    q.channels = input.size(0);
    q.type = element_of(input, "input");
    q.input = input.const_data_ptr();
    q.channel_stride = input.stride(0);
    const bool all = q.kept == Resampled::mask || q.kept == Resampled::values;
    bool fits =
        out.is_contiguous() && out.dim() == 1 + axes && out.size(0) == (all ? q.channels : 1);
    STD_TORCH_CHECK(out.device() == input.device(), "out: is on another device than input");
    for (int64_t a = 0; a < axes; ++a) {
      STD_TORCH_CHECK(index[a].device() == input.device() && weight[a].device() == input.device(),
                      "index, weight: axis ", a, ": is on another device than input");
      const int64_t place = 3 - axes + a, size = index[a].numel();
      STD_TORCH_CHECK(index[a].dim() == 1 && index[a].scalar_type() == ScalarType::Long &&
                          index[a].is_contiguous() && weight[a].dim() == 2 &&
                          weight[a].size(0) == 2 && weight[a].size(1) == size &&
                          weight[a].scalar_type() == ScalarType::Float && weight[a].is_contiguous(),
                      "index, weight: axis ", a, ": expected int64 (m,) and float32 (2, m)");
      q.source[place] = input.size(1 + a);
      q.stride[place] = input.stride(1 + a);
      q.target[place] = size;
      q.index[place] = static_cast<const int64_t*>(index[a].const_data_ptr());
      q.weight[place] = static_cast<const float*>(weight[a].const_data_ptr());
      fits = fits && out.size(1 + a) == size;
    }
    STD_TORCH_CHECK(fits, "out: got shape ", shape_of(out), ", expected a contiguous tensor of ",
                    all ? q.channels : 1, " channels of the tables' sizes");
    STD_TORCH_CHECK(
        q.kept != Resampled::regions || static_cast<int64_t>(labels.size()) == q.channels,
        "regions: got ", labels.size(), ", expected ", q.channels);
    q.regions = labels.data();
    q.least = static_cast<float>(least);
    q.round_to_half = round_to_half;
    q.out = out.mutable_data_ptr();
    q.out_type = element_of(out, "out");
    STD_TORCH_CHECK(q.kept == Resampled::values ? q.out_type == Element::f32
                    : q.kept == Resampled::mask ? q.out_type == Element::boolean
                                                : !is_floating(q.out_type),
                    "out: got ", torch::headeronly::toString(out.scalar_type()),
                    ", which does not hold the result");
  }
};

}  // namespace voxfuse
