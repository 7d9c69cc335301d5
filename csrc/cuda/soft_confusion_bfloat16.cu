// soft_confusion's forward kernels for logits of type __nv_bfloat16: types and directions have
// files of their own, to compile in parallel.
#include "cuda/soft_confusion_launch.cuh"

namespace voxfuse::cuda {

template cudaError_t launch_forward<__nv_bfloat16>(Launched&, cudaStream_t);

}  // namespace voxfuse::cuda
