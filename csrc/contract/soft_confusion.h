// The problem of soft_confusion as kernels see it, on the CPU and on the GPU, free of any tensor
// library.
#pragma once

#include <cstdint>
#include <limits>

#include "contract/codes.h"
#include "math/layout.h"

namespace voxfuse {

/// A (batch, class, voxel) view of memory; strides in elements.
struct View {
  const void* data = nullptr;
  Element type = Element::f32;
  Strides stride{0, 0, 0};
  bool vector = false;  // on a GPU, set by the launch: aligned runs of voxels are read as vectors
};

struct SoftConfusion {
  int64_t batch = 0, classes = 0, voxels = 0;
  View input, target;
  View weight;               // without data every voxel has weight 1
  bool dense = false;        // the target has one value a class instead of a label
  bool check_range = false;  // on the CPU: a dense value outside [0, 1] ends the walk

  Activation activation = Activation::softmax, likelihood = Activation::softmax;
  Overlap overlap = Overlap::product;
  bool has_ignore = false;
  int64_t ignore_index = 0;
  double gamma = 0;  // of the classes below focal_classes; the others have 0
  int64_t focal_classes = std::numeric_limits<int64_t>::max();

  // Which classes are annotated in which sample, (batch, classes), contiguous; null: all. What the
  // others mean is said in src/voxfuse/ops/soft_confusion.py.
  const uint8_t* annotated = nullptr;
  Unlabelled unlabelled = Unlabelled::exclude;

  int columns = CORE;  // CORE or FULL: of the sums that are asked for, or of their cotangents

  // Backward only.
  const double* cotangents = nullptr;  // (batch, classes, columns), contiguous
  void* gradient = nullptr;            // of the input's type
  Strides gradient_stride{0, 0, 0};
};

}  // namespace voxfuse
