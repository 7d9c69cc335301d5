// soft_confusion on the GPU, over plain pointers: the operator and the host emulation both call
// these functions. Everything runs asynchronously on `stream`.
#pragma once

#include <cuda_runtime_api.h>

#include "contract/soft_confusion.h"

namespace voxfuse::cuda {

/// How a thread finds its voxels in the logits and in the gradient.
enum class Layout : int {
  kScalar,      // any strides, element by element
  kPlanar,      // voxel stride 1: vectors along the voxels
  kInterleaved  // channels last without gaps: vectors along classes and voxels
};

/// A problem and how it is launched: what the kernels are given.
struct Launched : SoftConfusion {
  double* sums = nullptr;       // forward: (batch, classes, columns)
  double* workspace = nullptr;  // forward: workspace_doubles() elements

  int label_classes = 0;   // of the classes those that a label of the target's type can name
  int ignored_label = -1;  // the class that does not count, or -1
  Layout input_layout = Layout::kScalar, gradient_layout = Layout::kScalar;
  int64_t chunk = 0;             // voxels whose sum stays in the compute type
  int64_t chunks_per_row = 0;    // chunks that one block adds up, in float64
  int64_t rows = 0;              // of the workspace, for one sample
  int64_t group = 0;             // rows that are added up by the last of their blocks
  int threads = 0;               // of a block of the forward kernel
  unsigned* counters = nullptr;  // all 0, or null: a second kernel adds up the rows
};

int64_t workspace_doubles(const SoftConfusion& problem);
cudaError_t soft_confusion_forward(const SoftConfusion& problem, double* sums, double* workspace,
                                   cudaStream_t stream);
cudaError_t soft_confusion_backward(const SoftConfusion& problem, cudaStream_t stream);

/// The kernels for one type of logits; each is instantiated in a file of its own.
template <class T>
cudaError_t launch_forward(Launched& problem, cudaStream_t stream);
template <class T>
cudaError_t launch_backward(Launched& problem, cudaStream_t stream);

}  // namespace voxfuse::cuda
