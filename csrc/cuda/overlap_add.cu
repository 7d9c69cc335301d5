// Patch fusion on the GPU: a block owns a tile of the result, lists the patches that touch it in
// their order, and every thread adds up runs of voxels in registers. Each voxel is written once; no
// atomics, so the bits are those of the patch order.
#include "cuda/overlap_add_gather.cuh"
#include "cuda/overlap_add_scatter.cuh"

namespace voxfuse::cuda {
namespace {

template <class Start>
cudaError_t by_type(Element type, const Start& start) {
  switch (type) {
    case Element::f32:
      return start(float{});
    case Element::f16:
      return start(__half{});
    case Element::bf16:
      return start(__nv_bfloat16{});
    case Element::f64:
      return start(double{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

int64_t softmax_workspace(const Fusion& q) {
  const int group = bytes_of(q.type) == 2 ? kChannels<__half> : kChannels<float>;
  if (q.activation != Activation::softmax || q.channels <= kFewGroups * group) return 0;
  return 2 * q.patches * q.patch[0] * q.patch[1] * q.patch[2];
}

cudaError_t overlap_add_forward(const Fusion& q, cudaStream_t stream) {
  return by_type(q.type, [&](auto zero) {
    using T = decltype(zero);
    return q.activation == Activation::none ? start_gather<T, Mode::kForward, false>(q, stream)
                                            : start_gather<T, Mode::kForward, true>(q, stream);
  });
}

cudaError_t overlap_add_ring(const Fusion& q, cudaStream_t stream) {
  return by_type(q.type, [&](auto zero) {
    using T = decltype(zero);
    return q.activation == Activation::none ? start_gather<T, Mode::kRing, false>(q, stream)
                                            : start_gather<T, Mode::kRing, true>(q, stream);
  });
}

cudaError_t overlap_add_weights(const Fusion& q, cudaStream_t stream) {
  return start_gather<double, Mode::kWeights, false>(q, stream);
}

cudaError_t overlap_add_backward(const Fusion& q, cudaStream_t stream) {
  return by_type(q.type, [&](auto zero) { return start_scatter<decltype(zero)>(q, stream); });
}

}  // namespace voxfuse::cuda
