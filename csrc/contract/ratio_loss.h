// What the ratio loss works on, on any device: raw pointers and options, free of any tensor
// library.
#pragma once

#include <cstdint>

#include "contract/codes.h"

namespace voxfuse {

// Everything about a ratio loss that does not depend on the data.
struct RatioOptions {
  double numerator[FULL];
  double denominator[FULL];
  double smooth_nr;
  double smooth_dr;
  double min_denominator;
  double exponent;
  double ratio_scale;
  double nll_scale;
  double off_scale;
  int width;  // of the sums: CORE or FULL
  int first_class;
  int exponent_from;  // classes before have the exponent 1
  ClassPooling class_pooling;
  Absent absent;
  Reduction reduction;
  Normaliser normaliser;
  bool log;
  bool batch;
};

struct RatioLoss {
  RatioOptions options{};
  int64_t samples = 0, classes = 0;
  const double* stats = nullptr;         // (samples, classes, options.width)
  const double* class_weight = nullptr;  // ([samples,] classes - first_class) or null
  int64_t class_weight_stride = 0;       // from sample to sample; 0: one row for all
  const double* nll_weight = nullptr;    // (classes,) or null
  const double* off_weight = nullptr;    // (classes,) or null
  bool double_loss = false;
  void* loss = nullptr;          // float, or double with double_loss
  double* cotangents = nullptr;  // as stats
};

struct RatioLossBackward {
  int64_t samples = 0, classes = 0, width = 0;
  bool double_grad = false;
  const void* grad_loss = nullptr;
  int64_t sample_stride = 0, class_stride = 0;  // of grad_loss, from first_class on; 0: broadcast
  int64_t first_class = 0;                      // classes below get 0
  const double* cotangents = nullptr;
  double* result = nullptr;
};

}  // namespace voxfuse
