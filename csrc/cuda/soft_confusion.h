// soft_confusion on the GPU, over plain pointers: the operator and the host emulation both call
// these functions. Everything runs asynchronously on `stream`.
#pragma once

#include <cuda_runtime_api.h>

#include <limits>

#include "math/layout.h"

namespace voxfuse::cuda {

/// A (batch, class, voxel) view of device memory; strides in elements.
struct View {
  const void* data = nullptr;
  Element type = Element::f32;
  Strides stride{0, 0, 0};
  bool vector = false;  // aligned runs of voxels can be read as vectors (set by the launch)
};

/// How a thread finds its voxels in the logits and in the gradient.
enum class Layout : int {
  kScalar,      // any strides, element by element
  kPlanar,      // voxel stride 1: vectors along the voxels
  kInterleaved  // channels last without gaps: vectors along classes and voxels
};

struct SoftConfusion {
  int64_t batch = 0, classes = 0, voxels = 0;
  View input, target, weight;  // weight.data may be null
  bool dense = false;          // the target has one value a class
  int activation = 0, likelihood = 0;
  bool use_min = false;
  bool has_ignore = false;
  int64_t ignore_index = 0;
  double gamma = 0;
  int64_t focal_classes = std::numeric_limits<int64_t>::max();  // gamma is 0 from here on
  int statistics = 4;                                           // 4 or 8 a class
  double* sums = nullptr;                                       // forward: (B, C, statistics)
  double* workspace = nullptr;         // forward: workspace_doubles() elements
  const double* cotangents = nullptr;  // backward: (B, C, statistics)
  View gradient;                       // backward: written, input's type

  // Set by the launch.
  Layout input_layout = Layout::kScalar, gradient_layout = Layout::kScalar;
  int64_t chunk = 0;             // voxels whose sum stays in the compute type
  int64_t chunks_per_row = 0;    // chunks that one block adds up, in float64
  int64_t rows = 0;              // of the workspace, for one sample
  int64_t group = 0;             // rows that are added up by the last of their blocks
  int threads = 0;               // of a block of the forward kernel
  unsigned* counters = nullptr;  // all 0, or null: a second kernel adds up the rows
};

int64_t workspace_doubles(const SoftConfusion& problem);
cudaError_t soft_confusion_forward(SoftConfusion problem, cudaStream_t stream);
cudaError_t soft_confusion_backward(SoftConfusion problem, cudaStream_t stream);

/// The kernels for one type of logits; each is instantiated in a file of its own.
template <class T>
cudaError_t launch_forward(SoftConfusion& problem, cudaStream_t stream);
template <class T>
cudaError_t launch_backward(SoftConfusion& problem, cudaStream_t stream);

}  // namespace voxfuse::cuda
