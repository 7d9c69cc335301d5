// soft_confusion's forward kernels for logits of type double: types and directions have files of
// their own, to compile in parallel.
#include "cuda/soft_confusion_launch.cuh"

namespace voxfuse::cuda {

template cudaError_t launch_forward<double>(Launched&, cudaStream_t);

}  // namespace voxfuse::cuda
