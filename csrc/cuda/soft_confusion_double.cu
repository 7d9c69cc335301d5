// soft_confusion's kernels for logits of type double; a file of their own so that types compile in
// parallel.
#include "cuda/soft_confusion_launch.cuh"

namespace voxfuse::cuda {

template cudaError_t launch_forward<double>(SoftConfusion&, cudaStream_t);
template cudaError_t launch_backward<double>(SoftConfusion&, cudaStream_t);

}  // namespace voxfuse::cuda
