// soft_confusion's kernels for logits of type __nv_bfloat16; a file of their own so that types
// compile in parallel.
#include "cuda/soft_confusion_launch.cuh"

namespace voxfuse::cuda {

template cudaError_t launch_forward<__nv_bfloat16>(SoftConfusion&, cudaStream_t);
template cudaError_t launch_backward<__nv_bfloat16>(SoftConfusion&, cudaStream_t);

}  // namespace voxfuse::cuda
