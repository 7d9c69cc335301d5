// soft_confusion's backward kernels for logits of type __half: types and directions have files of
// their own, to compile in parallel.
#include "cuda/soft_confusion_launch.cuh"

namespace voxfuse::cuda {

template cudaError_t launch_backward<__half>(Launched&, cudaStream_t);

}  // namespace voxfuse::cuda
