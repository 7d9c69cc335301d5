// soft_confusion's kernels for logits of type __half; a file of their own so that types compile in
// parallel.
#include "cuda/soft_confusion_launch.cuh"

namespace voxfuse::cuda {

template cudaError_t launch_forward<__half>(SoftConfusion&, cudaStream_t);
template cudaError_t launch_backward<__half>(SoftConfusion&, cudaStream_t);

}  // namespace voxfuse::cuda
